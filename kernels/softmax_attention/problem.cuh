// What softmax attention's kernels share: their arguments, and which rows a block owns.
#pragma once

#include "../cuda/common.cuh"

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kInfinity = __builtin_huge_valf();
// What a running maximum starts from. A tile without a key has one of -inf, and -inf from -inf is no
// number.
template <bool kMasked>
constexpr float kLeast = kMasked ? -1e38f : -kInfinity;

// Query head h reads key/value head h / group. lse and delta are (batch, heads, query_tokens).
template <typename T>
struct Forward {
  Rows<const T> q, k, v;
  Rows<T> out;
  int64_t heads, group, query_tokens, key_tokens;
  const uint8_t* key_mask;  // (batch, key_tokens), 0 where a key is not there: for kMasked kernels
  float* lse;
  float scale;
};

template <typename T>
struct Backward {
  Rows<const T> dout, q, k, v, out;
  Rows<T> dq, dk, dv;
  int64_t heads, group, query_tokens, key_tokens;
  const uint8_t* key_mask;  // as above
  const float* lse;
  float* delta;
  float scale;
  float dscore_scale;  // of dS as an operand: a power of two
};

__device__ inline int valid_rows(int64_t tokens, int64_t first, int rows) {
  return tokens - first < rows ? static_cast<int>(tokens - first) : rows;
}

// Which keys of a tile, from `first` on, are there: of the first `valid`, those that are not masked.
template <bool kMasked>
struct Keys {
  const uint8_t* mask;  // of the tile
  int valid;

  template <typename Arguments>
  __device__ Keys(const Arguments& a, int64_t batch, int64_t first, int valid)
      : mask(kMasked ? a.key_mask + batch * a.key_tokens + first : nullptr), valid(valid) {}
  __device__ bool there(int key) const {
    if constexpr (kMasked) {
      return key < valid && load_global(mask + key) != 0;
    } else {
      return key < valid;
    }
  }
};

// Block after block along a head's rows, so that neighbours share the other side in the L2 cache.
struct RowBlock {
  int64_t batch, head, first;
  int valid;

  __device__ RowBlock(int64_t heads, int64_t tokens, int rows) {
    const int64_t tiles = (tokens + rows - 1) / rows;
    first = blockIdx.x % tiles * rows;
    batch = blockIdx.x / tiles / heads;
    head = blockIdx.x / tiles % heads;
    valid = valid_rows(tokens, first, rows);
  }
};
