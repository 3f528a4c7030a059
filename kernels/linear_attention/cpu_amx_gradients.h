// The backward pass on tiles: dq and dS of queries, dk and dv of keys.
//
// S is centred before it is rounded: with m = Σ S / Σ z, a mean of v, and S' = S - z mᵀ, a = S g is
// S' g + z (m·g), and
//
//   dφ(q) = S'g/E - c z,   c = (φ(q)·S'g - eps (m·g))/E²,   dz = dz' - dS m,   dz' = -Σ φ(q) c
//   dφ(k) = dS (v - m) + dz'
//
// so that what cancels is never rounded: dS v - dS m is taken of one rounded dS. Gradients are kept as dS,
// dz' and m. Where dS and dz were given, with no m, dφ(k) = (dS rounded) v + (what rounding took) m + dz
// with another mean of v. And g/E is the sum of two bfloat16 where dS is made of it: with one, gradients
// that cancel are 1.74 times as far off as the composition's; with two, 1.42.
#pragma once

#include "cpu_amx_apply.h"
#include "cpu_amx_sums.h"

namespace {

// A state's tiles with columns and features exchanged, [step of 32 columns][sign][16 features][1 KB], of
// S - z mᵀ rounded, where kCentred. Otherwise of S, and `lost` per row: (whole S - S rounded) · m, where
// `whole` is 1 or 0. m is in the order of tiles.
template <bool kCentred, class D>
void exchanged_tiles(const D& d, const State<D>& state, const float* m, float whole, float* lost,
                     char* to) {
  alignas(64) BF16 rows[16 * 32];
  for (int c = 0; c < d.chunks(); ++c) {
    for (int sign = 0; sign < 2; ++sign) {
      const float* z = state.z + sign * d.padded() + 16 * c;
      Wide missing[16] = {};
      for (int h = 0; h < d.w(); ++h) {
        const float *S = state.tile(c, sign, 2 * h), *mean = m + 32 * h;
        for (int f = 0; f < 16; ++f) {
          Wide x = load_wide(S + 16 * f), y = load_wide(S + 256 + 16 * f);
          if (kCentred) x -= z[f] * load_wide(mean), y -= z[f] * load_wide(mean + 16);
          const Halves rounded = round_two(x, y);
          if (!kCentred) {
            missing[f] += (whole * x - float_of(half_of(rounded, 0))) * load_wide(mean);
            missing[f] += (whole * y - float_of(half_of(rounded, 1))) * load_wide(mean + 16);
          }
          store_halves(rows + 32 * f, in_order(rounded));
        }
        transpose_pairs(rows, to + ((h * 2 + sign) * d.chunks() + c) * 1024);
      }
      for (int f = 0; f < 16 && !kCentred; ++f) {
        lost[sign * d.padded() + 16 * c + f] = sum_of(missing[f]);
      }
    }
  }
}

// m = Σ S / Σ z, by column, in the order of tiles.
template <class D>
void mean_of_state(const D& d, const State<D>& state, float* m) {
  float z = 0.0f, size = 0.0f;
  for (int f = 0; f < 2 * d.padded(); ++f) z += state.z[f], size += __builtin_fabsf(state.z[f]);
  // Any m is right. Of a state whose z is of both signs, which no keys give, this one may be so large
  // that S - z m has nothing left of S.
  const float inverse = z <= 0.5f * size || z < FLT_MIN ? 0.0f : 1.0f / z;
  for (int column = 0; column < d.chunks(); ++column) {
    Wide sum = {};
    for (int row = 0; row < 2 * d.padded(); ++row) {
      sum += load_wide(state.tile(row / 32, row / 16 % 2, column) + row % 16 * 16);
    }
    store_wide(m + 16 * column, sum * inverse);
  }
}

// The mean of the first rows of v, by the weight that they have in z, in the order of tiles.
template <class D>
void mean_of_rows(const D& d, int64_t head_dim, int64_t tokens, Rows k, Rows v, BF16* buffer,
                  float* m) {
  const int64_t count = tokens < kTokens ? tokens : kTokens;
  float weights[kTokens], all = 0.0f;
  Source rows = padded_rows(d, head_dim, k, 0, count, count, buffer);
  for (int64_t n = 0; n < count; ++n) {
    Wide sum = {};
    for (int f = 0; f < d.padded(); f += 16) {
      sum += (Wide)((Quads)load_bfloat16(rows.row(n) + f) & 0x7fffffff);
    }
    all += weights[n] = sum_of(sum);
  }
  rows = padded_rows(d, head_dim, v, 0, count, count, buffer);
  const float inverse = all == 0.0f ? 0.0f : 1.0f / all;
  for (int h = 0; h < d.padded(); h += 32) {
    Wide a = {}, b = {}, x, y;
    for (int64_t n = 0; n < count; ++n) {
      const float weight = weights[n] * inverse;
      a += weight * load_bfloat16(rows.row(n) + h);
      b += weight * load_bfloat16(rows.row(n) + h + 16);
    }
    to_tile_order(a, b, x, y);
    store_wide(m + h, x), store_wide(m + h + 16, y);
  }
}

// What z is still to be lessened by: the row of `sign` and feature f of S m.
template <class D>
float missing_in_z(const State<D>& state, int sign, int f) {
  if (*state.centred == 0) return 0.0f;
  Wide sum = {};
  for (int column = 0; column < state.d.chunks(); ++column) {
    sum += load_wide(state.tile(f / 16, sign, column) + f % 16 * 16) *
           load_wide(state.m + 16 * column);
  }
  return sum_of(sum);
}
template <class D>
void settle(const State<D>& state) {
  for (int row = 0; row < 2 * state.d.padded(); ++row) {
    const int sign = row / state.d.padded(), f = row % state.d.padded();
    state.z[row] -= missing_in_z(state, sign, f);
  }
  *state.centred = 0;
}

// plus where x > 0, -minus where x < 0; x is not 0.
INLINE Wide signed_pick(Wide x, Wide plus, Wide minus) {
  return (SignedQuads)x < 0 ? -minus : plus;
}
INLINE Wide unless_zero(Wide x, Wide value) { return x == 0.0f ? Wide{} : value; }

struct GradientScratch {
  char *exchanged, *tiles, *phi;  // of the state; of 16 rows
  float *c[2], *e[2];             // products by feature; by column, or with z
  float *m, *m_tiles, *bias;      // [P]; the same in the order of tiles; [2P]
  BF16 *x, *y, *to, *to_too;      // rows (16; of y 128) where they had to be copied
  BF16* scaled;                   // g/E in two terms, [term][128][P]
};

// Rows y by the exchanged tiles: 16 rows of all features, both signs.
template <class D, class Meanwhile>
INLINE void multiply_features(const D& d, Source y, const char* exchanged, float* c,
                              const Meanwhile& meanwhile) {
  const int64_t step = 2 * d.chunks() * 1024;
  Factors x = {(const char*)y.p, 64, y.stride * (int64_t)sizeof(BF16), exchanged, step, d.w()};
#pragma GCC unroll 2
  for (int i = 0; i < d.w(); ++i, x.b += 4096, c += 1024) {
    multiply<4, false>(x, nullptr, c, nullptr, meanwhile);
  }
}

// rows(n) for all 16, a share in each of `calls` calls: what the vector units do meanwhile.
template <class Row>
struct Shares {
  int calls, call;
  const Row& row;
  INLINE void operator()(int) {
    for (int n = 16 * call / calls; n < 16 * (call + 1) / calls; ++n) row(n);
    ++call;
  }
};

// ---- queries -------------------------------------------------------------------------------------

// A query's dq, its row of g/E in two terms; returns its weight in dz. `sums` are those
// of its row: S'g. Where not kAll, dq and `high` may be null, for what is not asked for.
template <bool kAll, class D>
INLINE float finish_query(const D& d, const float* sums, float inverse, float eps, const BF16* q,
                          const BF16* g, const float* z, const float* m, bool centred,
                          const Target& dq, int row, BF16* high) {
  constexpr int kMost = std::is_same_v<D, Dim<2>> ? 4 : 16;  // chunks
  Wide x[kMost], a[kMost], y[kMost], total = {}, mean = {};
  const Wide f = wide(inverse);
#pragma GCC unroll 4
  for (int i = 0; i < d.chunks(); ++i) {
    x[i] = load_bfloat16(q + 16 * i), y[i] = load_bfloat16(g + 16 * i);
    a[i] = signed_pick(x[i], load_wide(sums + i * 256), load_wide(sums + (d.chunks() + i) * 256));
    total += x[i] * a[i];
    mean += y[i] * load_wide(m + 16 * i);
  }
  const float mean_g = sum_of(mean), weight = (sum_of(total) - eps * mean_g) * inverse;  // c E
#pragma GCC unroll 2
  for (int i = 0; i < d.chunks(); i += 2) {
    Wide rest[2];
#pragma GCC unroll 2
    for (int j = i; j < i + 2; ++j) {
      const Wide picked = signed_pick(x[j], load_wide(z + 16 * j), load_wide(z + d.padded() + 16 * j));
      a[j] = unless_zero(x[j], f * (a[j] - weight * picked));
      y[j] *= f;
    }
    if (kAll || dq.p != nullptr) dq.put(row, 16 * i, round_two(a[i], a[i + 1]));
    if (!kAll && high == nullptr) continue;
    const Halves rounded = round_two(y[i], y[i + 1]);
    for (int j = 0; j < 2; ++j) rest[j] = y[i + j] - float_of(half_of(rounded, j));
    store_halves(high + 16 * i, rounded);
    store_halves(high + kTokens * d.padded() + 16 * i, round_two(rest[0], rest[1]));
  }
  return -(centred ? weight : weight + mean_g) * inverse;
}

// A query's row of g/E in two terms, where nothing else is asked for.
template <class D>
INLINE void scale_query(const D& d, float inverse, const BF16* g, BF16* high) {
#pragma GCC unroll 2
  for (int i = 0; i < d.chunks(); i += 2) {
    Wide y[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) y[j] = load_bfloat16(g + 16 * (i + j)) * wide(inverse);
    const Halves rounded = round_two(y[0], y[1]);
    for (int j = 0; j < 2; ++j) y[j] -= float_of(half_of(rounded, j));
    store_halves(high + 16 * i, rounded);
    store_halves(high + kTokens * d.padded() + 16 * i, round_two(y[0], y[1]));
  }
}

// dq, g/E and weights of one block of 32 * groups tokens from n on, as far as they are asked for.
// Returns whether all rows are safe.
template <class D>
bool query_block(const D& d, int64_t head_dim, int64_t tokens, int64_t n, int groups, Rows dout,
                 Rows q, Rows dq, const State<D>& state, float eps, bool centred, Sums wanted,
                 const GradientScratch& s, char* weights) {
  const bool pulled = dq.data != nullptr || wanted.z;
  const bool all = dq.data != nullptr && wanted.any();
  const int steps = 2 * groups, bytes = d.padded() * (int)sizeof(BF16);
  alignas(64) float inverse[16], weight[16];
  bool fine = true;
  for (int i = 0; i <= steps; ++i) {  // multiply step i, finish step i - 1
    const int64_t here = n + 16 * i, last = here - 16;
    const bool finish = i > 0;
    const float* sums = s.c[(i + 1) & 1];
    BF16* high = wanted.any() ? s.scaled + 16 * (i - 1) * d.padded() : nullptr;
    Source x, y;
    Result to = {};
    if (finish) {
      x = padded_rows(d, head_dim, q, last, tokens - last, 16, s.x + 16 * d.padded());
      y = padded_rows(d, head_dim, dout, last, tokens - last, 16, s.y + 16 * d.padded());
      if (dq.data != nullptr) to = padded_target(d, head_dim, dq, last, tokens, s.to);
      const uint32_t low = invert(s.e[(i + 1) & 1], eps, inverse);
      if (low != 0 && any_in(low, head_dim, q, last, tokens)) fine = false;
    }
    const auto row = [&](int r) INLINE_LAMBDA {
      if (!finish) return;
      if (!pulled) return scale_query(d, inverse[r], y.row(r), high + r * d.padded());
      const float *c = sums + 16 * r, f = inverse[r];
      BF16* const terms = high == nullptr ? nullptr : high + r * d.padded();
      weight[r] = all ? finish_query<true>(d, c, f, eps, x.row(r), y.row(r), state.z, s.m, centred,
                                           to.to, r, terms)
                      : finish_query<false>(d, c, f, eps, x.row(r), y.row(r), state.z, s.m, centred,
                                            to.to, r, terms);
    };
    Shares<decltype(row)> rows = {d.w() * d.w(), 0, row};
    if (i < steps) {
      const Source q_here = padded_rows(d, head_dim, q, here, tokens - here, 16, s.x);
      const Source g_here = padded_rows(d, head_dim, dout, here, tokens - here, 16, s.y);
      for (int r = 0; r < 16; ++r) {
        phi_row(d, q_here.row(r), r, s.phi);
        if (here + kTokens + r >= tokens) continue;
        fetch_row(from(q, here + kTokens + r).p, bytes);
        fetch_row(from(dout, here + kTokens + r).p, bytes);
      }
      if (pulled) {
        multiply_features(d, g_here, s.exchanged, s.c[i & 1], [&](int) INLINE_LAMBDA { rows(0); });
      }
      const Factors by_z = {s.phi, 1024, 64, s.tiles, 1024, d.chunks()};
      multiply<0, true>(by_z, s.tiles, nullptr, s.e[i & 1], Nothing());
    }
    while (rows.call < rows.calls) rows(0);
    if (finish && wanted.z) three_terms(load_wide(weight), weights + (i - 1) * 512);
    deliver(to, head_dim);
  }
  return fine;
}

// S' as tiles, and m.
template <class D>
void centre(const D& d, const State<D>& state, const GradientScratch& s) {
  mean_of_state(d, state, s.m_tiles);
  for (int i = 0; i < d.padded(); i += 32) {
    Wide a, b;
    from_tile_order(load_wide(s.m_tiles + i), load_wide(s.m_tiles + i + 16), a, b);
    store_wide(s.m + i, a), store_wide(s.m + i + 16, b);
  }
  exchanged_tiles<true>(d, state, s.m_tiles, 1.0f, nullptr, s.exchanged);
}

// dq of queries of whose sums nothing is asked for. False: some rows are too small for tiles.
template <class D>
bool query_slopes(const D& d, int64_t head_dim, int64_t tokens, Rows dout, Rows q, Rows dq,
                  const State<D>& state, float eps, const GradientScratch& s) {
  centre(d, state, s);
  z_tiles(d, state, s.tiles, 1024);
  bool fine = true;
  for (int64_t n = 0; n < tokens; n += kTokens) {
    const int64_t left = tokens - n < kTokens ? tokens - n : kTokens;
    fine &= query_block(d, head_dim, tokens, n, (int)(left + 31) / 32, dout, q, dq, state, eps,
                        false, Sums{false, false}, s, nullptr);
  }
  return fine;
}

// dq, and dS and dz += these queries' share. False: some rows are too small for tiles.
template <class D>
bool query_gradients(const D& d, int64_t head_dim, int64_t tokens, Rows dout, Rows q, Rows dq,
                     const State<D>& state, float eps, const State<D>& gradient, Sums wanted,
                     const GradientScratch& s, const SumScratch& sums) {
  const bool pulled = dq.data != nullptr || wanted.z;
  if (pulled) centre(d, state, s);
  if (pulled && *gradient.empty != 0) {
    __builtin_memcpy(gradient.m, s.m_tiles, d.padded() * sizeof(float));
    *gradient.centred = 1;
  }
  const bool centred = *gradient.centred != 0;
  z_tiles(d, state, s.tiles, 1024);
  __builtin_memset(sums.weights, 0, kGroups * 1024);
  bool fine = true;
  sum_rows<2>(d, head_dim, tokens, q, gradient, sums, [&](int64_t n, int64_t, Block<2>& b) {
    fine &= query_block(d, head_dim, tokens, n, b.groups, dout, q, dq, state, eps, centred, wanted,
                        s, sums.weights);
    b.y[0] = {s.scaled, d.padded()};
    b.y[1] = {s.scaled + kTokens * d.padded(), d.padded()};
  });
  return fine;
}

// ---- keys ----------------------------------------------------------------------------------------

// A key's dk: `sums` are those of its row, dS v; `bias` what there is without v.
template <class D>
INLINE void finish_key(const D& d, const float* sums, const float* bias, const BF16* k,
                       const Target& dk, int row) {
#pragma GCC unroll 2
  for (int i = 0; i < d.chunks(); i += 2) {
    Wide slope[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const Wide x = load_bfloat16(k + 16 * (i + j));
      const Wide plus = load_wide(sums + (i + j) * 256) + load_wide(bias + 16 * (i + j));
      const Wide minus = load_wide(sums + (d.chunks() + i + j) * 256) +
                         load_wide(bias + d.padded() + 16 * (i + j));
      slope[j] = unless_zero(x, signed_pick(x, plus, minus));
    }
    dk.put(row, 16 * i, round_two(slope[0], slope[1]));
  }
}

// dk, dv or both.
template <class D>
void key_gradients(const D& d, int64_t head_dim, int64_t tokens, Rows k, Rows v, Rows dk, Rows dv,
                   const State<D>& gradient, const GradientScratch& s) {
  if (dk.data != nullptr) {
    const bool centred = *gradient.centred != 0;
    if (!centred) mean_of_rows(d, head_dim, tokens, k, v, s.y, s.m_tiles);
    exchanged_tiles<false>(d, gradient, centred ? gradient.m : s.m_tiles, centred ? 0.0f : 1.0f,
                           s.bias, s.exchanged);
    for (int f = 0; f < 2 * d.padded(); f += 16) {
      store_wide(s.bias + f, load_wide(s.bias + f) + load_wide(gradient.z + f));
    }
  }
  if (dv.data != nullptr) state_tiles(d, gradient, s.tiles);
  const int bytes = d.padded() * (int)sizeof(BF16);
  const int64_t steps = (tokens + 15) / 16;
  for (int64_t i = 0; i <= steps; ++i) {  // multiply step i, finish step i - 1
    const int64_t here = 16 * i, last = here - 16;
    const bool finish = i > 0;
    const float *sums = s.c[(i + 1) & 1], *values = s.e[(i + 1) & 1];
    Source x;
    Result to_dk = {}, to_dv = {};
    if (finish) {
      x = padded_rows(d, head_dim, k, last, tokens - last, 16, s.x + 16 * d.padded());
      if (dk.data != nullptr) to_dk = padded_target(d, head_dim, dk, last, tokens, s.to);
      if (dv.data != nullptr) to_dv = padded_target(d, head_dim, dv, last, tokens, s.to_too);
    }
    const auto row = [&](int r) INLINE_LAMBDA {
      if (!finish) return;
      if (dk.data != nullptr) finish_key(d, sums + 16 * r, s.bias, x.row(r), to_dk.to, r);
      if (dv.data != nullptr) finish_row(d, values, 1.0f, r, to_dv.to);
    };
    Shares<decltype(row)> rows = {d.w() * d.w(), 0, row};
    if (i < steps) {
      const Source k_here = padded_rows(d, head_dim, k, here, tokens - here, 16, s.x);
      const Source v_here = padded_rows(d, head_dim, v, here, tokens - here, 16, s.y);
      for (int r = 0; r < 16; ++r) {
        phi_row(d, k_here.row(r), r, s.phi);
        if (here + kTokens + r >= tokens) continue;
        fetch_row(from(k, here + kTokens + r).p, bytes);
        fetch_row(from(v, here + kTokens + r).p, bytes);
      }
      if (dk.data != nullptr) {
        multiply_features(d, v_here, s.exchanged, s.c[i & 1], [&](int) INLINE_LAMBDA { rows(0); });
      }
      if (dv.data != nullptr) {
        multiply_all<false>(by_state(d, s.phi, s.tiles), d.chunks(), nullptr, s.e[i & 1], nullptr,
                            Nothing());
      }
    }
    while (rows.call < rows.calls) rows(0);
    deliver(to_dk, head_dim);
    deliver(to_dv, head_dim);
  }
}

}  // namespace
