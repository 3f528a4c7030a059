// What softmax attention's kernels share: their arguments, and which rows a block owns.
#pragma once

#include "../cuda/common.cuh"

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kInfinity = __builtin_huge_valf();

// Query head h reads key/value head h / group. lse and delta are (batch, heads, query_tokens).
template <typename T>
struct Forward {
  Rows<const T> q, k, v;
  Rows<T> out;
  int64_t heads, group, query_tokens, key_tokens;
  float* lse;
  float scale;
};

template <typename T>
struct Backward {
  Rows<const T> dout, q, k, v, out;
  Rows<T> dq, dk, dv;
  int64_t heads, group, query_tokens, key_tokens;
  const float* lse;
  float* delta;
  float scale;
  float dscore_scale;  // of dS as an operand: a power of two
};

__device__ inline int valid_rows(int64_t tokens, int64_t first, int rows) {
  return tokens - first < rows ? static_cast<int>(tokens - first) : rows;
}

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
