// S += φ(x)ᵀ y and z += φ(x)ᵀ w over tokens, on tiles.
//
// Blocks of 128 tokens. For each 16 features, both signs, and each 32 columns of y: four tiles of sums,
// and two more of z with the first columns. While the tile unit works the vector units make what it
// needs next: tiles of y during the first pass, and in every last pass over the columns the φ of the next
// 16 features, in the place of those just read, so that all of it stays in the L1 cache. A tile is made
// well before it is loaded: a load waits for the stores to leave the store buffer.
#pragma once

#include "cpu_amx.h"

namespace {

constexpr int kLead = 3;  // groups of 32 tokens that y's tiles are made ahead

struct SumScratch {
  char* phi;      // [group][sign][1 KB]
  char* y;        // [term][group][columns / 16][1 KB]
  char* weights;  // [group][1 KB]: w's terms, in columns 0 to 2
  float* z;       // [16 features][sign][256]: sums, in columns 0 to 2
  BF16 *x, *rows;  // 128 rows each of x and of y, where they had to be copied
};

// One block's part. y is the sum of kTerms matrices.
template <int kTerms>
struct Block {
  Source x, y[kTerms];
  int groups;
  Source next_x;  // the block whose first φ is to be made, and its groups
  int next_groups;
  Source far_x, far_y;  // rows to be brought near
  int far_rows;
};

template <int kTerms, class D>
INLINE char* y_tile(const D& d, const SumScratch& s, int term, int group, int column) {
  return s.y + ((term * kGroups + group) * d.chunks() + column) * 1024;
}

template <int kTerms, class D>
INLINE void make_y(const D& d, const SumScratch& s, const Block<kTerms>& b, int group) {
#pragma GCC unroll 2
  for (int term = 0; term < kTerms; ++term) {
#pragma GCC unroll 2
    for (int h = 0; h < d.w(); ++h) {
      pair_tokens(b.y[term].row(32 * group) + 32 * h, b.y[term].stride,
                  y_tile<kTerms>(d, s, term, group, 2 * h));
    }
  }
}

// Sums of 16 features (both signs) and 32 columns (and z, with the first) over a block.
template <int kTerms, bool kZ, class D, class Meanwhile>
INLINE void sum_tiles(const D& d, const SumScratch& s, int groups, int h, float* plus,
                      float* minus, float* z, bool first, const Meanwhile& meanwhile) {
  if (first) {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    if (kZ) tile_zero<4>(), tile_zero<5>();
  } else {
    tile_load<0>(plus, 64), tile_load<1>(plus + 256, 64);
    tile_load<2>(minus, 64), tile_load<3>(minus + 256, 64);
    if (kZ) tile_load<4>(z, 64), tile_load<5>(z + 256, 64);
  }
  for (int g = 0; g < groups; ++g) {
    const char *phi = s.phi + g * 2048, *y = y_tile<kTerms>(d, s, 0, g, 2 * h);
    if constexpr (kZ) {
      tile_load<6>(phi, 64);
      tile_load<7>(y, 64), tile_dot<0, 6, 7>();
      tile_load<7>(y + 1024, 64), tile_dot<1, 6, 7>();
      tile_load<7>(s.weights + g * 1024, 64), tile_dot<4, 6, 7>();
      tile_load<6>(phi + 1024, 64), tile_dot<5, 6, 7>();
      tile_load<7>(y, 64), tile_dot<2, 6, 7>();
      tile_load<7>(y + 1024, 64), tile_dot<3, 6, 7>();
    } else {
      tile_load<4>(phi, 64), tile_load<6>(y, 64), tile_dot<0, 4, 6>();
      tile_load<7>(y + 1024, 64), tile_dot<1, 4, 7>();
      tile_load<5>(phi + 1024, 64), tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
    }
    if constexpr (kTerms == 2) {
      y = y_tile<kTerms>(d, s, 1, g, 2 * h);
      tile_load<7>(y, 64);
      if constexpr (kZ) {
        tile_dot<2, 6, 7>();  // φ₋ is in 6
        tile_load<7>(y + 1024, 64), tile_dot<3, 6, 7>();
        tile_load<6>(phi, 64), tile_dot<1, 6, 7>();
        tile_load<7>(y, 64), tile_dot<0, 6, 7>();
      } else {
        tile_dot<0, 4, 7>(), tile_dot<2, 5, 7>();
        tile_load<7>(y + 1024, 64), tile_dot<1, 4, 7>(), tile_dot<3, 5, 7>();
      }
    }
    meanwhile(g);
  }
  tile_store<0>(plus, 64), tile_store<1>(plus + 256, 64);
  tile_store<2>(minus, 64), tile_store<3>(minus + 256, 64);
  if (kZ) tile_store<4>(z, 64), tile_store<5>(z + 256, 64);
}

// The φ of the block's first 16 features is there.
template <int kTerms, class D>
INLINE void sum_block(const D& d, const State<D>& state, const SumScratch& s,
                      const Block<kTerms>& b, bool first) {
  const int bytes = d.padded() * (int)sizeof(BF16), steps = d.chunks() * d.w() * b.groups;
  const int share = (b.far_rows + steps - 1) / steps;
  int far = 0;
  const auto fetch = [&]() INLINE_LAMBDA {  // a share of the rows to come
    for (int i = 0; i < share && far < b.far_rows; ++i, ++far) {
      fetch_row(b.far_x.row(far), bytes);
      fetch_row(b.far_y.row(far), bytes);
    }
  };
  for (int g = 0; g < kLead && g < b.groups; ++g) make_y(d, s, b, g);
#pragma GCC unroll 1
  for (int c = 0; c < d.chunks(); ++c) {
    const bool last = c + 1 == d.chunks();
    const Source from = last ? b.next_x : Source{b.x.p + 16 * (c + 1), b.x.stride};
    const int count = last ? b.next_groups : b.groups;
    const auto make_phi = [&](int g) INLINE_LAMBDA {
      if (g < count) transpose_phi16(from.row(32 * g), from.stride, s.phi + g * 2048);
    };
    sum_tiles<kTerms, true>(d, s, b.groups, 0, state.tile(c, 0, 0), state.tile(c, 1, 0),
                            s.z + c * 512, first, [&](int g) INLINE_LAMBDA {
                              fetch();
                              if (c == 0 && g + kLead < b.groups) make_y(d, s, b, g + kLead);
                              if (d.w() == 1) make_phi(g);
                            });
#pragma GCC unroll 1
    for (int h = 1; h < d.w(); ++h) {
      sum_tiles<kTerms, false>(d, s, b.groups, h, state.tile(c, 0, 2 * h), state.tile(c, 1, 2 * h),
                               nullptr, first, [&](int g) INLINE_LAMBDA {
                                 fetch();
                                 if (h + 1 == d.w()) make_phi(g);
                               });
    }
  }
}

// The sums in z's tiles, to the state's z.
template <class D>
INLINE void collect_z(const D& d, const State<D>& state, const float* tiles) {
  const bool first = *state.empty != 0;
  for (int c = 0; c < d.chunks(); ++c) {
    for (int sign = 0; sign < 2; ++sign) {
      float* z = state.z + sign * d.padded() + 16 * c;
      const Wide sum = sums_of_terms(tiles + (2 * c + sign) * 256);
      store_wide(z, first ? sum : load_wide(z) + sum);
    }
  }
  *state.empty = 0;
}

// Over all `tokens` rows of x. ys(n, count, groups, block): sets the y (and weights) of `count` tokens from
// n on, padded with zeros to whole groups; x's rows past the last are zeros.
template <int kTerms, class D, class Ys>
INLINE void sum_rows(const D& d, int64_t head_dim, int64_t tokens, Rows x, const State<D>& state,
                     const SumScratch& s, const Ys& ys) {
  const auto whole_groups = [&](int64_t n) {  // that can be read where they are
    const int64_t groups = head_dim == d.padded() ? (tokens - n) / 32 : 0;
    return (int)(groups < kGroups ? groups : kGroups);
  };
  bool ready = false, first = *state.empty != 0;
  if (!first) __builtin_memset(s.z, 0, d.chunks() * 512 * sizeof(float));
  for (int64_t n = 0, count; n < tokens; n += count) {
    Block<kTerms> b;
    b.groups = whole_groups(n);
    count = 32 * b.groups;
    if (b.groups == 0) {
      count = tokens - n < kTokens ? tokens - n : kTokens;
      b.groups = (int)(count + 31) / 32;
    }
    b.x = padded_rows(d, head_dim, x, n, count, 32 * b.groups, s.x);
    b.next_groups = n + count < tokens ? whole_groups(n + count) : 0;
    b.next_x = from(x, n + count);
    b.far_rows = 0;
    ys(n, count, b);
    for (int g = 0; !ready && g < b.groups; ++g) {
      transpose_phi16(b.x.row(32 * g), b.x.stride, s.phi + g * 2048);
    }
    sum_block(d, state, s, b, first);
    ready = b.next_groups != 0, first = false;
  }
  if (tokens > 0) collect_z(d, state, s.z);
}

// Sums over keys. A weight of 1 makes z.
template <class D>
void sum_keys(const D& d, int64_t head_dim, int64_t tokens, Rows k, Rows v, const State<D>& state,
              const SumScratch& s) {
  const int64_t groups = tokens < kTokens ? (tokens + 31) / 32 : kGroups;
  __builtin_memset(s.weights, 0, groups * 1024);
  for (int r = 0; r < 16 * groups; ++r) {
    BF16* row = (BF16*)(s.weights + r * 64);
    row[0] = row[1] = 0x3f80;
  }
  sum_rows<1>(d, head_dim, tokens, k, state, s, [&](int64_t n, int64_t count, Block<1>& b) {
    b.y[0] = padded_rows(d, head_dim, v, n, count, 32 * b.groups, s.rows);
    const int64_t far = n + count + kTokens, left = tokens - far;  // two blocks on
    b.far_rows = (int)(left < 0 ? 0 : left < kTokens ? left : kTokens);
    b.far_x = from(k, far);
    b.far_y = from(v, far);
  });
}

}  // namespace
