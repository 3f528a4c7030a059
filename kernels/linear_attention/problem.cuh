// What every kernel of linear attention is given, and how sums over tokens are split and added up.
#pragma once

#include "../cuda/common.cuh"

namespace {

template <typename T>
struct Problem {
  Rows<const T> q, k, v, dout;
  Rows<T> out, dq, dk, dv;
  int64_t kv_heads, group, queries, keys, states;  // states: batch * kv_heads
  int64_t num_splits;                              // blocks that share the tiles of a state
  int query_stages;                                // backward with keys that stay: 1 or 2
  float eps;
  const float* S;    // what is read: of one state (2 D x D), (2 D), (D)
  const float* z;
  const float* dS;
  const float* dz;
  const float* mean;
  float* S_out;      // what is written: [split][state]...
  float* z_out;
  float* mean_out;   // [state]
};

// A block's state, and which of its `tiles` tiles of tokens it takes.
struct Part {
  int64_t state, split, batch, kv_head;
  int begin, end;

  __device__ Part(int64_t kv_heads, int64_t num_splits, int64_t tiles) {
    split = blockIdx.x % num_splits;
    state = blockIdx.x / num_splits;
    batch = state / kv_heads;
    kv_head = state % kv_heads;
    const int64_t each = (tiles + num_splits - 1) / num_splits;
    begin = static_cast<int>(split * each < tiles ? split * each : tiles);
    end = static_cast<int>(begin + each < tiles ? begin + each : tiles);
  }
};

__device__ inline int64_t tiles_of(int64_t heads, int64_t tokens, int tile_tokens) {
  return heads * ((tokens + tile_tokens - 1) / tile_tokens);
}

// ---- reduce: adds up the partial sums of the splits, in a fixed order -----------------------------------
// A thread adds four elements of S, or of z, of every kAdders-th split; a block's kAdders threads of the
// same elements then add up what they have. Both sizes are multiples of four.

struct Reduce {
  static constexpr int kAdders = 8, kQuads = kThreads / kAdders;
  const float* S;  // [num_splits][S_size]
  const float* z;  // [num_splits][z_size]
  float* S_out;
  float* z_out;
  int64_t S_size, z_size, num_splits;
};

__device__ inline void add_to(float4& sum, const float4& x) {
  sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
}

__global__ void __launch_bounds__(kThreads) reduce_kernel(Reduce p) {
  const int adder = threadIdx.x / Reduce::kQuads, quad = threadIdx.x % Reduce::kQuads;
  int64_t i = (static_cast<int64_t>(blockIdx.x) * Reduce::kQuads + quad) * 4;
  const bool of_S = i < p.S_size;
  if (!of_S) i -= p.S_size;
  const int64_t size = of_S ? p.S_size : p.z_size;
  const float* const partials = (of_S ? p.S : p.z) + i;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (i < size) {
#pragma unroll 4
    for (int64_t split = adder; split < p.num_splits; split += Reduce::kAdders) {
      add_to(sum, load_global(reinterpret_cast<const float4*>(partials + split * size)));
    }
  }
  auto* const sums = reinterpret_cast<float4*>(shared_memory());
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (adder > 0 || i >= size) return;
#pragma unroll
  for (int other = 1; other < Reduce::kAdders; ++other) {
    add_to(sum, sums[other * Reduce::kQuads + quad]);
  }
  store_global(reinterpret_cast<float4*>((of_S ? p.S_out : p.z_out) + i), sum);
}

// ---- uncentre: dz = dz' - dS m, for a caller who has no m; one warp a feature ---------------------------

struct Uncentre {
  const float* dS;
  const float* mean;
  float* dz;
  int64_t features, head_dim;  // of all states
};

__global__ void __launch_bounds__(kThreads) uncentre_kernel(Uncentre p) {
  const int64_t feature = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (feature >= p.features) return;
  const float* const mean = p.mean + feature / (2 * p.head_dim) * p.head_dim;
  float sum = 0.0f;
  for (int64_t d = threadIdx.x % 32; d < p.head_dim; d += 32) {
    sum += load_global(p.dS + feature * p.head_dim + d) * load_global(mean + d);
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(kFullWarp, sum, lane);
  if (threadIdx.x % 32 == 0) store_global(p.dz + feature, load_global(p.dz + feature) - sum);
}

}  // namespace
