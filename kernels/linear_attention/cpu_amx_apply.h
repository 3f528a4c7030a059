// Rows times a state, on tiles: 16 tokens at a time, by up to four tiles of columns at once.
//
// φ of the rows is the first factor as it lies; the state is rounded once a call. Three bfloat16 terms of z
// make one more tile of columns, of which the normaliser comes. While the tile unit multiplies, the vector
// units finish the last 16 rows and make the φ of the next.
#pragma once

#include "cpu_amx.h"

namespace {

// The first factor: `steps` tiles of 16 rows; the second: as many tiles for each 16 columns.
struct Factors {
  const char* a;
  int64_t a_step, a_stride;  // bytes from tile to tile, and from row to row
  const char* b;
  int64_t b_step;
  int steps;
};

// kColumns tiles of products to c, and that with tiles of z to e; meanwhile(step) after each step.
template <int kColumns, bool kZ, class Meanwhile>
INLINE void multiply(const Factors& x, const char* z, float* c, float* e, const Meanwhile& meanwhile) {
  if (kColumns > 0) tile_zero<0>(), tile_zero<1>();
  if (kColumns > 2) tile_zero<2>(), tile_zero<3>();
  if (kZ) tile_zero<4>();
#pragma GCC unroll 4
  for (int step = 0; step < x.steps; ++step) {
    const char* b = x.b + step * x.b_step;
    tile_load<5>(x.a + step * x.a_step, x.a_stride);
    if constexpr (kColumns > 0) {
      tile_load<6>(b, 64), tile_dot<0, 5, 6>();
      tile_load<7>(b + 1024, 64), tile_dot<1, 5, 7>();
    }
    if constexpr (kColumns > 2) {
      tile_load<6>(b + 2048, 64), tile_dot<2, 5, 6>();
      tile_load<7>(b + 3072, 64), tile_dot<3, 5, 7>();
    }
    if (kZ) tile_load<6>(z + step * x.b_step, 64), tile_dot<4, 5, 6>();
    meanwhile(step);
  }
  if (kZ) tile_store<4>(e, 64);
  if (kColumns > 0) tile_store<0>(c, 64), tile_store<1>(c + 256, 64);
  if (kColumns > 2) tile_store<2>(c + 512, 64), tile_store<3>(c + 768, 64);
}

struct Nothing {
  INLINE void operator()(int) const {}
};

// All columns: those of the first pass with z, if any. meanwhile(part) for `steps` parts of the work.
template <bool kZ, class Meanwhile>
INLINE void multiply_all(Factors x, int columns, const char* z, float* c, float* e,
                         const Meanwhile& meanwhile) {
  if (columns == 2) return multiply<2, kZ>(x, z, c, e, meanwhile);
  multiply<4, kZ>(x, z, c, e, meanwhile);
#pragma GCC unroll 1
  for (int column = 4; column < columns; column += 4) {
    x.b += 4096, c += 1024;
    if (column + 2 == columns) {
      multiply<2, false>(x, nullptr, c, nullptr, Nothing());
    } else {
      multiply<4, false>(x, nullptr, c, nullptr, Nothing());
    }
  }
}

// φ(x) of 16 rows by a state's tiles.
template <class D>
INLINE Factors by_state(const D& d, const char* phi, const char* tiles) {
  return {phi, 1024, 64, tiles, (d.chunks() + 1) * 1024, d.chunks()};
}

// Below this a normaliser may lack what the unit takes for zero.
constexpr float kSafe = 0x1p-64f;

// 1 / (e + eps) of 16 rows, 0 where that has no float inverse. Bit n of what is returned: e of row n is not safe.
INLINE uint32_t invert(const float* e, float eps, float* inverse) {
  uint32_t low = 0;
  const Wide sums = sums_of_terms(e);
  const float least = least_met(eps);
  store_wide(inverse, ((sums <= least) & (sums >= -least)) ? Wide{} : 1.0f / (sums + eps));
  const SignedQuads unsafe = sums < kSafe;
#if defined(LINEAR_VIT_AVX512)
  low = _mm512_movepi32_mask((__m512i)unsafe);
#else
  for (int n = 0; n < 16; ++n) low |= (uint32_t)(unsafe[n] & 1) << n;
#endif
  return low;
}

// Whether one of these rows holds something: its normaliser should have been more.
inline bool any_in(uint32_t low, int64_t head_dim, Rows q, int64_t first, int64_t tokens) {
  for (int n = 0; n < 16 && first + n < tokens; ++n) {
    const BF16* row = from(q, first + n).p;
    for (int64_t f = 0; (low >> n & 1) != 0 && f < head_dim; ++f) {
      if ((row[f] & 0x7fff) != 0) return true;
    }
  }
  return false;
}

// Row n of the sums c times `factor`.
template <class D>
INLINE void finish_row(const D& d, const float* c, float factor, int n, const Target& out) {
  const Wide f = wide(factor);
#pragma GCC unroll 2
  for (int h = 0; h < d.w(); ++h) {
    const float* sums = c + h * 512 + n * 16;
    out.put(n, 32 * h, round_columns(f * load_wide(sums), f * load_wide(sums + 256)));
  }
}

struct ApplyScratch {
  char *tiles, *phi[2];  // of the state; of 16 rows
  float* c[2];           // sums of 16 rows, and the normaliser's tile
  BF16 *in, *out;        // 16 rows, where they had to be copied
};

// False: some rows are too small for tiles, and out is not to be used.
template <class D>
bool apply_state(const D& d, int64_t head_dim, int64_t tokens, Rows q, Rows out, float eps,
                 const ApplyScratch& s) {
  const int64_t steps = (tokens + 15) / 16;
  const int parts = d.chunks(), bytes = d.padded() * (int)sizeof(BF16);
  alignas(64) float inverse[16];
  bool fine = true;
#pragma GCC unroll 1
  for (int64_t i = -1; i <= steps; ++i) {  // make φ of i + 1, multiply i, finish i - 1
    const int64_t next_row = 16 * (i + 1), last_row = 16 * (i - 1);
    const bool make = i + 1 < steps, finish = i > 0;
    const float* sums = s.c[(i + 1) & 1];
    char* phi = s.phi[(i + 1) & 1];
    Source next;
    Result last = {};
    if (make) next = padded_rows(d, head_dim, q, next_row, tokens - next_row, 16, s.in);
    if (finish) {
      last = padded_target(d, head_dim, out, last_row, tokens, s.out);
      const uint32_t low = invert(sums + d.chunks() * 256, eps, inverse);
      if (low != 0 && any_in(low, head_dim, q, last_row, tokens)) fine = false;
    }
    const auto rows = [&](int part) INLINE_LAMBDA {
#pragma GCC unroll 4
      for (int n = 16 * part / parts; n < 16 * (part + 1) / parts; ++n) {
        if (make) phi_row(d, next.row(n), n, phi);
        if (finish) finish_row(d, sums, inverse[n], n, last.to);
        const int64_t far = next_row + 256 + n;
        if (far < tokens) fetch_row(from(q, far).p, bytes);
      }
    };
    if (i >= 0 && i < steps) {
      float* c = s.c[i & 1];
      multiply_all<true>(by_state(d, s.phi[i & 1], s.tiles), d.chunks(),
                         state_tile(d, s.tiles, 0, d.chunks()), c, c + d.chunks() * 256, rows);
    } else {
      for (int part = 0; part < parts; ++part) rows(part);
    }
    deliver(last, head_dim);
  }
  return fine;
}

}  // namespace
