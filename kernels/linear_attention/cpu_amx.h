// Linear attention in bfloat16 on AMX tiles: sizes, and how rows and states become tiles.
//
// Rows are padded to P columns, a multiple of 32. S is kept as the tiles that the products over tokens
// leave, float32: [16 features][sign][16 columns][16][16]. The columns of each pair of tiles are in the
// order that unpacking leaves: 0-3, 8-11, 16-19, 24-27 of 32 in the first, the others in the second.
#pragma once

#include "../cpu/tiles.h"
#include "../cpu/wide.h"
#include "cpu.h"

namespace {

typedef uint16_t BF16;  // bits

// P / 32: known to the compiler (kW) for the head dims used most, from 33 to 64, or not (0).
template <int kW>
struct Dim {
  int w_;
  INLINE int w() const { return kW != 0 ? kW : w_; }
  INLINE int padded() const { return 32 * w(); }
  INLINE int chunks() const { return 2 * w(); }  // of 16 features, or 16 columns
  INLINE int64_t s_floats() const { return 2 * int64_t{1} * padded() * padded(); }
};

// function(a Dim)
template <typename Function>
auto with_dim(int64_t head_dim, const Function& function) {
  const int w = (int)((head_dim + 31) / 32);
  return w == 2 ? function(Dim<2>{2}) : function(Dim<0>{w});
}

// Tokens that are summed before the sums leave the tiles.
constexpr int kTokens = 128, kGroups = kTokens / 32;

// ---- rows ----------------------------------------------------------------------------------------

struct Source {
  const BF16* p = nullptr;
  int64_t stride = 0;
  INLINE const BF16* row(int64_t n) const { return p + n * stride; }
};
struct Target {
  BF16* p = nullptr;
  int64_t stride = 0;
  bool past_caches = false;
  INLINE BF16* row(int64_t n) const { return p + n * stride; }
  // To 32 columns of row n from `first` on.
  INLINE void put(int64_t n, int64_t first, Halves x) const {
    past_caches ? stream_halves(row(n) + first, x) : store_halves(row(n) + first, x);
  }
};

INLINE Source from(Rows rows, int64_t first) {
  return {(const BF16*)rows.data + first * rows.stride, rows.stride};
}

// `wanted` rows of P columns from `first` on, of which `there` are there: where they lie, or copied to
// `buffer` with zeros around them.
template <class D>
INLINE Source padded_rows(const D& d, int64_t head_dim, Rows rows, int64_t first, int64_t there,
                          int64_t wanted, BF16* buffer) {
  const Source source = from(rows, first);
  if (there >= wanted && head_dim == d.padded()) return source;
  __builtin_memset(buffer, 0, wanted * d.padded() * sizeof(BF16));
  for (int64_t n = 0; n < wanted && n < there; ++n) {
    __builtin_memcpy(buffer + n * d.padded(), source.row(n), head_dim * sizeof(BF16));
  }
  return {buffer, d.padded()};
}

// The other way: 16 rows to write, then given to where they belong.
struct Result {
  Target to;         // where to write
  Target final;      // of `there` rows
  int64_t there;
};
template <class D>
INLINE Result padded_target(const D& d, int64_t head_dim, Rows rows, int64_t first, int64_t tokens,
                            BF16* buffer) {
  const Target final = {(BF16*)rows.data + first * rows.stride, rows.stride, rows.past_caches};
  const int64_t there = tokens - first < 16 ? tokens - first : 16;
  if (there == 16 && head_dim == d.padded()) return {final, final, 0};
  return {{buffer, d.padded()}, final, there};
}
INLINE void deliver(const Result& result, int64_t head_dim) {
  for (int64_t n = 0; n < result.there; ++n) {
    __builtin_memcpy(result.final.row(n), result.to.row(n), head_dim * sizeof(BF16));
  }
}

INLINE void fetch_row(const BF16* row, int bytes) {
  for (int at = 0; at < bytes; at += 64) __builtin_prefetch((const char*)row + at, 0, 2);
}

// ---- rows to tiles -------------------------------------------------------------------------------

// 32 columns of 32 rows of v (or dout) as two tiles to multiply with: pairs of tokens.
INLINE void pair_tokens(const BF16* v, int64_t stride, char* to) {
  for (int r = 0; r < 16; ++r) {
    const Halves x = load_halves(v + 2 * r * stride), y = load_halves(v + (2 * r + 1) * stride);
    store_halves(to + r * 64, unpack<false, Halves>(x, y));
    store_halves(to + 1024 + r * 64, unpack<true, Halves>(x, y));
  }
}

// 8 features of 32 tokens: rows of two tiles, φ₊ at `to` and φ₋ a tile on.
INLINE void transpose_phi(const BF16* k, int64_t stride, char* to) {
  Halves x[8], y[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) x[i] = four_rows(k + i * stride, 8 * stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    y[i] = unpack<false, Halves>(x[i], x[i + 1]);
    y[i + 1] = unpack<true, Halves>(x[i], x[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    x[i] = unpack<false, Quads>(y[i], y[i + 2]);
    x[i + 1] = unpack<true, Quads>(y[i], y[i + 2]);
    x[i + 2] = unpack<false, Quads>(y[i + 1], y[i + 3]);
    x[i + 3] = unpack<true, Quads>(y[i + 1], y[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    y[2 * i] = unpack<false, Octs>(x[i], x[4 + i]);
    y[2 * i + 1] = unpack<true, Octs>(x[i], x[4 + i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const Halves plus = relu(y[i]);
    store_halves(to + i * 64, plus);
    store_halves(to + 1024 + i * 64, relu_minus(y[i], plus));
  }
}

// 16 features of 32 tokens.
INLINE void transpose_phi16(const BF16* k, int64_t stride, char* to) {
  transpose_phi(k, stride, to);
  transpose_phi(k + 8, stride, to + 512);
}

// Row n of the tiles φ(q): P / 32 of each sign.
template <class D>
INLINE void phi_row(const D& d, const BF16* q, int n, char* to) {
#pragma GCC unroll 2
  for (int j = 0; j < d.w(); ++j) {
    const Halves x = load_halves(q + 32 * j), plus = relu(x);
    store_halves(to + j * 1024 + n * 64, plus);
    store_halves(to + (d.w() + j) * 1024 + n * 64, relu_minus(x, plus));
  }
}

// Two tiles' rows of 16 columns each, one after the other, as 32 columns in order.
INLINE Halves in_order(Halves rows) {
  const Octs fours = (Octs)rows;
  return (Halves)lanes(fours, fours, std::integer_sequence<int, 0, 4, 1, 5, 2, 6, 3, 7>());
}
INLINE Halves round_columns(Wide x, Wide y) { return in_order(round_two(x, y)); }

// Columns 0 to 31, to and from the order of two tiles' rows.
INLINE void to_tile_order(Wide a, Wide b, Wide& x, Wide& y) {
  x = (Wide)lanes((Octs)a, (Octs)b, std::integer_sequence<int, 0, 1, 4, 5, 8, 9, 12, 13>());
  y = (Wide)lanes((Octs)a, (Octs)b, std::integer_sequence<int, 2, 3, 6, 7, 10, 11, 14, 15>());
}
INLINE void from_tile_order(Wide x, Wide y, Wide& a, Wide& b) {
  a = (Wide)lanes((Octs)x, (Octs)y, std::integer_sequence<int, 0, 1, 8, 9, 2, 3, 10, 11>());
  b = (Wide)lanes((Octs)x, (Octs)y, std::integer_sequence<int, 4, 5, 12, 13, 6, 7, 14, 15>());
}

// Two rows of floats as pairs of bfloat16.
INLINE Halves round_pairs(Wide even, Wide odd) {
  const Halves x = round_two(even, odd);
  return lanes(x, x, std::integer_sequence<int, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7,
                                           23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30,
                                           15, 31>());
}

// 16 rows of 32 columns, transposed in pairs of columns: a tile.
INLINE void transpose_pairs(const BF16* rows, char* to) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // four pairs
    Halves x[4], y[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) x[i] = four_rows(rows + 32 * i + 8 * j, 4 * 32);
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2) {
      y[i] = unpack<false, Quads>(x[i], x[i + 1]);
      y[i + 1] = unpack<true, Quads>(x[i], x[i + 1]);
    }
    store_halves(to + (4 * j) * 64, unpack<false, Octs>(y[0], y[2]));
    store_halves(to + (4 * j + 1) * 64, unpack<true, Octs>(y[0], y[2]));
    store_halves(to + (4 * j + 2) * 64, unpack<false, Octs>(y[1], y[3]));
    store_halves(to + (4 * j + 3) * 64, unpack<true, Octs>(y[1], y[3]));
  }
}

// ---- a state -------------------------------------------------------------------------------------

// S as tiles, z [sign][P], m [P] in the order of tiles, and two numbers: whether nothing has been summed
// yet, and whether z, of gradients, is still to be lessened by S m (see cpu_amx_gradients.h).
template <class D>
struct State {
  float *S, *z, *m, *empty, *centred;
  const D d;

  INLINE State(const D& dim, float* state)
      : S(state), z(state + dim.s_floats()), m(z + 2 * dim.padded()), empty(m + dim.padded()),
        centred(empty + 1), d(dim) {}
  INLINE float* tile(int chunk, int sign, int column) const {
    return S + ((chunk * 2 + sign) * d.chunks() + column) * 256;
  }
};

// 16 numbers, each as the sum of three bfloat16, into columns 0 to 2 of rows of pairs. (Three lose
// nothing: what is made of them may cancel.)
INLINE void three_terms(Wide x, char* rows) {
  Halves terms[4] = {};
  for (int i = 0; i < 3; ++i) {
    terms[i] = round_two(x, Wide{});
    x -= float_of(half_of(terms[i], 0));
  }
  const Halves a = unpack<false, Quads>(terms[0], terms[1]), b = unpack<true, Quads>(terms[0], terms[1]);
  const Halves c = unpack<false, Quads>(terms[2], terms[3]), d = unpack<true, Quads>(terms[2], terms[3]);
  store_first_fours(rows, 4 * 64, unpack<false, Octs>(a, c));
  store_first_fours(rows + 64, 4 * 64, unpack<true, Octs>(a, c));
  store_first_fours(rows + 128, 4 * 64, unpack<false, Octs>(b, d));
  store_first_fours(rows + 192, 4 * 64, unpack<true, Octs>(b, d));
}
// The sums of columns 0 to 2 of a tile's rows.
INLINE Wide sums_of_terms(const float* tile) {
  Halves x[4];
  for (int i = 0; i < 4; ++i) x[i] = four_rows((const BF16*)(tile + 16 * i), 4 * 32);
  const Halves a = unpack<false, Quads>(x[0], x[1]), b = unpack<false, Quads>(x[2], x[3]);
  const Halves c = unpack<true, Quads>(x[0], x[1]), d = unpack<true, Quads>(x[2], x[3]);
  const Wide first = (Wide)unpack<false, Octs>(a, b), second = (Wide)unpack<true, Octs>(a, b);
  return first + second + (Wide)unpack<false, Octs>(c, d);
}

// z as tiles to multiply φ(q) with, one for each 32 features, `step` bytes apart.
template <class D>
void z_tiles(const D& d, const State<D>& state, char* to, int64_t step) {
  for (int i = 0; i < d.chunks(); ++i, to += step) {
    __builtin_memset(to, 0, 1024);
    three_terms(load_wide(state.z + 32 * i), to);
    three_terms(load_wide(state.z + 32 * i + 16), to + 512);
  }
}

// S likewise, [32 features][16 columns][1 KB], and z as one more tile of columns.
template <class D>
INLINE char* state_tile(const D& d, char* tiles, int step, int column) {
  return tiles + (step * (d.chunks() + 1) + column) * 1024;
}
template <class D>
void state_tiles(const D& d, const State<D>& state, char* tiles) {
  for (int step = 0; step < d.chunks(); ++step) {
    const int sign = step / d.w(), j = step % d.w();
    for (int half = 0; half < 2; ++half) {
      for (int column = 0; column < d.chunks(); ++column) {
        const float* S = state.tile(2 * j + half, sign, column);
        char* to = state_tile(d, tiles, step, column) + half * 512;
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) {
          store_halves(to + r * 64, round_pairs(load_wide(S + 32 * r), load_wide(S + 32 * r + 16)));
        }
      }
    }
  }
  z_tiles(d, state, state_tile(d, tiles, 0, d.chunks()), (d.chunks() + 1) * 1024);
}

}  // namespace
