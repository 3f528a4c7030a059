// Linear attention in CUDA C++: five kernels, forward and backward.
//
//   1 feature_outer       sum over tokens of phi(x)^T (scale w) and of phi(x) weight: S, z from k, v;
//                         dS, dz from q, dout
//   2 reduce              adds the partial sums of kernel 1's splits, in order
//   3 apply               out = phi(q) S / E,  E = phi(q) . z + eps
//   4 query_gradient      dq, and per row 1/E and -(phi(q) . a)/E^2 for kernel 1
//   5 key_value_gradient  dk, dv from dS, dz
//
// phi(x) = [relu(x), relu(-x)] is formed in registers from x, never in memory. Arithmetic is float32
// on the FMA units for every element type. No atomics: results repeat bit for bit.
//
// Letters as in the formulas: D head dimension, S (2D x D) and z (2D) the state, g = dout,
// a = S g, and the prefix d for a gradient.
#include "cuda.h"

#include "../cuda/common.cuh"

namespace {

// NaN compares false, so it passes through; fmaxf would drop it.
__device__ inline float positive_part(float x) { return x <= 0.0f ? 0.0f : x; }
__device__ inline float negative_part(float x) { return x >= 0.0f ? 0.0f : -x; }

// d/dx of a function of phi(x), given its gradients by both halves of phi: 0 at x = 0, NaN at NaN.
__device__ inline float feature_gradient(float x, float by_positive, float by_negative) {
  return x > 0.0f ? by_positive : x < 0.0f ? -by_negative : x;
}

// A query row that meets no key has E = eps, or 0 with eps = 0; its output is 0, not 0/0.
__device__ inline float inverse(float E) { return E != 0.0f ? 1.0f / E : 0.0f; }

// ---- 1 feature_outer -------------------------------------------------------------------------------
// One block: the tokens of one split (of every query head of the group) of one key/value head, and
// all D features against kColumns columns of w, a D/16 x kColumns/16 micro-tile per half of phi and
// thread. Reads x and w once (x twice for D > 64, whose S is halved to stay in registers).
//
// Sums are two-level, 256 tokens at a time: a plain float32 sum of n terms is off by
// 3e-8 sqrt(n / 2), which is past 1e-6 from 4,000 tokens on.
//
// The 1 in __launch_bounds__ keeps ptxas from trading spills for more blocks a multiprocessor.

template <typename T>
struct FeatureOuter {
  Rows<const T> x, w;
  int64_t kv_heads, group, tokens, num_splits, tokens_per_split;
  const float* row_scale;
  const float* row_weight;
  float* S;  // [split][batch * kv_heads][2 D][D]
  float* z;  // [split][batch * kv_heads][2 D]
  int64_t states;
};

template <int D>
struct FeatureOuterTile {
  static constexpr int kTokens = 32;
  static constexpr int kChunk = 256;
  static constexpr int kColumns = D > 64 ? D / 2 : D;
  static constexpr int kColumnBlocks = D / kColumns;
  struct Shared {
    float x[kTokens][D];
    float w[kTokens][kColumns];
    float scale[kTokens];
    float weight[kTokens];
  };
};

template <int D, typename T>
__global__ void __launch_bounds__(kThreads, 1) feature_outer_kernel(FeatureOuter<T> p) {
  using Tile = FeatureOuterTile<D>;
  constexpr int F = D / kSide, C = Tile::kColumns / kSide;
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(shared_memory());
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;

  int64_t index = blockIdx.x;
  const int column0 = static_cast<int>(index % Tile::kColumnBlocks) * Tile::kColumns;
  index /= Tile::kColumnBlocks;
  const int64_t split = index % p.num_splits;
  const int64_t state = index / p.num_splits;
  const int64_t batch = state / p.kv_heads, kv_head = state % p.kv_heads;
  const int64_t begin = split * p.tokens_per_split;
  const int64_t end = begin + p.tokens_per_split < p.tokens ? begin + p.tokens_per_split : p.tokens;

  float S[2][F][C] = {}, z[2][F] = {};
  for (int64_t g = 0; g < p.group; ++g) {
    const int64_t head = kv_head * p.group + g;
    const int64_t row0 = (batch * p.kv_heads * p.group + head) * p.tokens;
    for (int64_t chunk = begin; chunk < end; chunk += Tile::kChunk) {
      const int64_t chunk_end = chunk + Tile::kChunk < end ? chunk + Tile::kChunk : end;
      float S_sum[2][F][C] = {}, z_sum[2][F] = {};
      for (int64_t first = chunk; first < chunk_end; first += Tile::kTokens) {
        const int64_t left = chunk_end - first;
        const int valid = left < Tile::kTokens ? static_cast<int>(left) : Tile::kTokens;
        __syncthreads();  // the tile before has been read
        load_tile<Tile::kTokens, D, D>(&shared.x[0][0], p.x.at(batch, head, first), p.x.stride[2],
                                       valid, p.x.wide);
        load_tile<Tile::kTokens, Tile::kColumns, Tile::kColumns>(
            &shared.w[0][0], p.w.at(batch, head, first) + column0, p.w.stride[2], valid, p.w.wide);
        for (int t = threadIdx.x; t < Tile::kTokens; t += kThreads) {
          const int64_t row = row0 + first + t;
          shared.scale[t] = t < valid && p.row_scale ? p.row_scale[row] : 1.0f;
          shared.weight[t] = t < valid && p.row_weight ? p.row_weight[row] : 1.0f;
        }
        __syncthreads();
#pragma unroll 2
        for (int t = 0; t < Tile::kTokens; ++t) {
          float phi[2][F], w[C];
#pragma unroll
          for (int i = 0; i < F; ++i) {
            const float x = shared.x[t][ty + kSide * i];
            phi[0][i] = positive_part(x);
            phi[1][i] = negative_part(x);
          }
#pragma unroll
          for (int j = 0; j < C; ++j) w[j] = shared.w[t][tx + kSide * j] * shared.scale[t];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < F; ++i) {
#pragma unroll
              for (int j = 0; j < C; ++j) S_sum[half][i][j] += phi[half][i] * w[j];
              z_sum[half][i] += phi[half][i] * shared.weight[t];
            }
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < F; ++i) {
#pragma unroll
          for (int j = 0; j < C; ++j) S[half][i][j] += S_sum[half][i][j];
          z[half][i] += z_sum[half][i];
        }
      }
    }
  }

  float* const S_out = p.S + (split * p.states + state) * 2 * D * D;
  float* const z_out = p.z + (split * p.states + state) * 2 * D;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < F; ++i) {
      const int feature = half * D + ty + kSide * i;
#pragma unroll
      for (int j = 0; j < C; ++j) {
        S_out[feature * D + column0 + tx + kSide * j] = S[half][i][j];
      }
      if (column0 == 0 && tx == 0) z_out[feature] = z[half][i];
    }
  }
}

// ---- 2 reduce --------------------------------------------------------------------------------------
// One thread an element, the splits in order.

struct Reduce {
  const float* partials;  // [num_splits][size]
  float* sum;
  int64_t size, num_splits;
};

__global__ void __launch_bounds__(kThreads) reduce_kernel(Reduce p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.size) return;
  float sum = 0.0f;
  for (int64_t split = 0; split < p.num_splits; ++split) sum += p.partials[split * p.size + i];
  p.sum[i] = sum;
}

// ---- products of a tile of rows with the state, shared by kernels 3 to 5 ---------------------------
// One block: kRows tokens of one head, kRows/16 x D/16 values a thread. The state passes through
// shared memory sixteen features, or columns, at a time: all of it is 128 KiB at D = 128.

template <int D>
struct RowTile {
  static constexpr int kRows = D >= 96 ? 64 : 128;
  static constexpr int kPerThread = kRows / kSide;
  static constexpr int kColumns = D / kSide;  // per thread
  static constexpr int kPitch = D + 1;
  using Values = float[kPerThread][kColumns];

  float rows[kRows][kPitch];
};

template <int D>
struct StateSlab {
  static constexpr int kDepth = 16;
  static constexpr int kPitch = 2 * D + 1;
  float value[kDepth * kPitch];
};

// product += phi(x) S. Begins and ends with every thread past its last read of the slab or not: a
// caller that overwrites x or the slab synchronises first.
template <int D>
__device__ void multiply_features(typename RowTile<D>::Values& product, const RowTile<D>& x,
                                  const float* S, StateSlab<D>& slab) {
  using Tile = RowTile<D>;
  constexpr int kDepth = StateSlab<D>::kDepth;
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  for (int feature0 = 0; feature0 < D; feature0 += kDepth) {
    __syncthreads();  // x has been written, the slab before has been read
    for (int i = threadIdx.x; i < kDepth * D; i += kThreads) {
      slab.value[i] = S[feature0 * D + i];
      slab.value[kDepth * D + i] = S[(D + feature0) * D + i];
    }
    __syncthreads();
#pragma unroll 2
    for (int f = 0; f < kDepth; ++f) {
      float positive[Tile::kColumns], negative[Tile::kColumns];
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) {
        positive[j] = slab.value[f * D + tx + kSide * j];
        negative[j] = slab.value[(kDepth + f) * D + tx + kSide * j];
      }
#pragma unroll
      for (int i = 0; i < Tile::kPerThread; ++i) {
        const float value = x.rows[ty + kSide * i][feature0 + f];
#pragma unroll
        for (int j = 0; j < Tile::kColumns; ++j) {
          product[i][j] += positive_part(value) * positive[j];
          product[i][j] += negative_part(value) * negative[j];
        }
      }
    }
  }
}

// product[half] += g S[half]^T: the gradient by phi, for both halves of phi.
template <int D>
__device__ void multiply_columns(typename RowTile<D>::Values (&product)[2], const RowTile<D>& g,
                                 const float* S, StateSlab<D>& slab) {
  using Tile = RowTile<D>;
  constexpr int kDepth = StateSlab<D>::kDepth, kPitch = StateSlab<D>::kPitch;
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  for (int column0 = 0; column0 < D; column0 += kDepth) {
    __syncthreads();  // g has been written, the slab before has been read
    for (int i = threadIdx.x; i < 2 * D * kDepth; i += kThreads) {
      const int feature = i / kDepth, column = i % kDepth;
      slab.value[column * kPitch + feature] = S[feature * D + column0 + column];
    }
    __syncthreads();
#pragma unroll 2
    for (int c = 0; c < kDepth; ++c) {
      float state[2][Tile::kColumns];
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) {
        state[0][j] = slab.value[c * kPitch + tx + kSide * j];
        state[1][j] = slab.value[c * kPitch + D + tx + kSide * j];
      }
#pragma unroll
      for (int i = 0; i < Tile::kPerThread; ++i) {
        const float value = g.rows[ty + kSide * i][column0 + c];
#pragma unroll
        for (int j = 0; j < Tile::kColumns; ++j) {
          product[0][i][j] += value * state[0][j];
          product[1][i][j] += value * state[1][j];
        }
      }
    }
  }
}

// E = phi(q) . z + eps for each of a thread's rows.
template <int D>
__device__ void normaliser(float (&E)[RowTile<D>::kPerThread], const RowTile<D>& q, const float* z,
                           float eps) {
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
#pragma unroll
  for (int i = 0; i < RowTile<D>::kPerThread; ++i) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < RowTile<D>::kColumns; ++j) {
      const int feature = tx + kSide * j;
      const float x = q.rows[ty + kSide * i][feature];
      sum += positive_part(x) * z[feature] + negative_part(x) * z[D + feature];
    }
    E[i] = row_sum(sum) + eps;
  }
}

// Which rows a block of kernels 3 to 5 owns.
struct RowBlock {
  int64_t batch, head, first;
  int valid;

  __device__ RowBlock(int64_t heads, int64_t tokens, int rows) {
    const int64_t tiles = (tokens + rows - 1) / rows;
    first = blockIdx.x % tiles * rows;
    batch = blockIdx.x / tiles / heads;
    head = blockIdx.x / tiles % heads;
    valid = tokens - first < rows ? static_cast<int>(tokens - first) : rows;
  }
};

template <int D>
int64_t row_blocks(int64_t batch, int64_t heads, int64_t tokens) {
  return batch * heads * ceil_div(tokens, RowTile<D>::kRows);
}

// ---- 3 apply ---------------------------------------------------------------------------------------
// Reads q, writes out, once each; the state comes from L2.

template <typename T>
struct Apply {
  Rows<const T> q;
  Rows<T> out;
  int64_t heads, group, tokens;
  const float* S;
  const float* z;
  float eps;
};

template <int D>
struct ApplyShared {
  RowTile<D> q;
  StateSlab<D> slab;
  float z[2 * D];
};

template <int D, typename T>
__global__ void __launch_bounds__(kThreads) apply_kernel(Apply<T> p) {
  using Tile = RowTile<D>;
  auto& shared = *reinterpret_cast<ApplyShared<D>*>(shared_memory());
  const RowBlock block(p.heads, p.tokens, Tile::kRows);
  const int64_t state =
      block.batch * (p.heads / p.group) + block.head / p.group;

  load_tile<Tile::kRows, D, Tile::kPitch>(&shared.q.rows[0][0],
                                          p.q.at(block.batch, block.head, block.first),
                                          p.q.stride[2], block.valid, p.q.wide);
  for (int i = threadIdx.x; i < 2 * D; i += kThreads) shared.z[i] = p.z[state * 2 * D + i];
  __syncthreads();
  float E[Tile::kPerThread];
  normaliser<D>(E, shared.q, shared.z, p.eps);

  float out[Tile::kPerThread][Tile::kColumns] = {};
  multiply_features<D>(out, shared.q, p.S + state * 2 * D * D, shared.slab);
#pragma unroll
  for (int i = 0; i < Tile::kPerThread; ++i) {
    const float scale = inverse(E[i]);
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) out[i][j] *= scale;
  }

  __syncthreads();  // q has been read: its tile now takes the result
  write_tile<Tile::kPerThread, Tile::kColumns, Tile::kPitch>(&shared.q.rows[0][0], out);
  __syncthreads();
  store_tile<Tile::kRows, D, Tile::kPitch>(p.out.at(block.batch, block.head, block.first),
                                           p.out.stride[2], block.valid, p.out.wide,
                                           &shared.q.rows[0][0]);
}

// ---- 4 query_gradient ------------------------------------------------------------------------------
// Reads q and dout, writes dq, once each, and two floats a row.

template <typename T>
struct QueryGradient {
  Rows<const T> dout, q;
  Rows<T> dq;
  int64_t heads, group, tokens;
  const float* S;
  const float* z;
  float eps;
  float* row_scale;
  float* row_weight;
};

template <int D>
struct QueryGradientShared {
  RowTile<D> q;
  RowTile<D> g;
  StateSlab<D> slab;
  float z[2 * D];
};

template <int D, typename T>
__global__ void __launch_bounds__(kThreads) query_gradient_kernel(QueryGradient<T> p) {
  using Tile = RowTile<D>;
  auto& shared = *reinterpret_cast<QueryGradientShared<D>*>(shared_memory());
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  const RowBlock block(p.heads, p.tokens, Tile::kRows);
  const int64_t state = block.batch * (p.heads / p.group) + block.head / p.group;
  const int64_t row0 = (block.batch * p.heads + block.head) * p.tokens + block.first;

  load_tile<Tile::kRows, D, Tile::kPitch>(&shared.q.rows[0][0],
                                          p.q.at(block.batch, block.head, block.first),
                                          p.q.stride[2], block.valid, p.q.wide);
  load_tile<Tile::kRows, D, Tile::kPitch>(&shared.g.rows[0][0],
                                          p.dout.at(block.batch, block.head, block.first),
                                          p.dout.stride[2], block.valid, p.dout.wide);
  for (int i = threadIdx.x; i < 2 * D; i += kThreads) shared.z[i] = p.z[state * 2 * D + i];
  __syncthreads();
  float E[Tile::kPerThread];
  normaliser<D>(E, shared.q, shared.z, p.eps);

  float a[2][Tile::kPerThread][Tile::kColumns] = {};
  multiply_columns<D>(a, shared.g, p.S + state * 2 * D * D, shared.slab);

  float dq[Tile::kPerThread][Tile::kColumns];
#pragma unroll
  for (int i = 0; i < Tile::kPerThread; ++i) {
    const int row = ty + kSide * i;
    float dot = 0.0f;  // phi(q) . a
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) {
      const float x = shared.q.rows[row][tx + kSide * j];
      dot += positive_part(x) * a[0][i][j] + negative_part(x) * a[1][i][j];
    }
    const float scale = inverse(E[i]);
    const float weight = -(row_sum(dot) * scale) * scale;
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) {
      const int feature = tx + kSide * j;
      dq[i][j] = feature_gradient(shared.q.rows[row][feature],
                                  a[0][i][j] * scale + weight * shared.z[feature],
                                  a[1][i][j] * scale + weight * shared.z[D + feature]);
    }
    if (tx == 0 && row < block.valid) {
      p.row_scale[row0 + row] = scale;
      p.row_weight[row0 + row] = weight;
    }
  }

  __syncthreads();  // g has been read: its tile now takes the result
  write_tile<Tile::kPerThread, Tile::kColumns, Tile::kPitch>(&shared.g.rows[0][0], dq);
  __syncthreads();
  store_tile<Tile::kRows, D, Tile::kPitch>(p.dq.at(block.batch, block.head, block.first),
                                           p.dq.stride[2], block.valid, p.dq.wide,
                                           &shared.g.rows[0][0]);
}

// ---- 5 key_value_gradient --------------------------------------------------------------------------
// Reads k and v, writes dk and dv, once each.

template <typename T>
struct KeyValueGradient {
  Rows<const T> k, v;
  Rows<T> dk, dv;
  int64_t kv_heads, tokens;
  const float* dS;
  const float* dz;
};

template <int D>
struct KeyValueGradientShared {
  RowTile<D> k;
  RowTile<D> v;
  StateSlab<D> slab;
};

template <int D, typename T>
__global__ void __launch_bounds__(kThreads) key_value_gradient_kernel(KeyValueGradient<T> p) {
  using Tile = RowTile<D>;
  auto& shared = *reinterpret_cast<KeyValueGradientShared<D>*>(shared_memory());
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  const RowBlock block(p.kv_heads, p.tokens, Tile::kRows);
  const int64_t state = block.batch * p.kv_heads + block.head;
  const float* const dS = p.dS + state * 2 * D * D;
  const float* const dz = p.dz + state * 2 * D;

  load_tile<Tile::kRows, D, Tile::kPitch>(&shared.k.rows[0][0],
                                          p.k.at(block.batch, block.head, block.first),
                                          p.k.stride[2], block.valid, p.k.wide);
  load_tile<Tile::kRows, D, Tile::kPitch>(&shared.v.rows[0][0],
                                          p.v.at(block.batch, block.head, block.first),
                                          p.v.stride[2], block.valid, p.v.wide);
  {
    float dphi[2][Tile::kPerThread][Tile::kColumns] = {};
    multiply_columns<D>(dphi, shared.v, dS, shared.slab);
    float dk[Tile::kPerThread][Tile::kColumns];
#pragma unroll
    for (int i = 0; i < Tile::kPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) {
        const int feature = tx + kSide * j;
        dk[i][j] = feature_gradient(shared.k.rows[ty + kSide * i][feature],
                                    dphi[0][i][j] + dz[feature], dphi[1][i][j] + dz[D + feature]);
      }
    }
    __syncthreads();  // v has been read: its tile now takes the result
    write_tile<Tile::kPerThread, Tile::kColumns, Tile::kPitch>(&shared.v.rows[0][0], dk);
    __syncthreads();
    store_tile<Tile::kRows, D, Tile::kPitch>(p.dk.at(block.batch, block.head, block.first),
                                             p.dk.stride[2], block.valid, p.dk.wide,
                                             &shared.v.rows[0][0]);
  }
  float dv[Tile::kPerThread][Tile::kColumns] = {};
  multiply_features<D>(dv, shared.k, dS, shared.slab);
  __syncthreads();  // k has been read: its tile now takes the result
  write_tile<Tile::kPerThread, Tile::kColumns, Tile::kPitch>(&shared.k.rows[0][0], dv);
  __syncthreads();
  store_tile<Tile::kRows, D, Tile::kPitch>(p.dv.at(block.batch, block.head, block.first),
                                           p.dv.stride[2], block.valid, p.dv.wide,
                                           &shared.k.rows[0][0]);
}

}  // namespace

// ---- launchers -------------------------------------------------------------------------------------

extern "C" int64_t linear_attention_num_splits(int64_t batch_heads, int64_t tokens,
                                               int64_t multiprocessors) {
  constexpr int64_t kBlocksPerMultiprocessor = 2;
  constexpr int64_t kFewestTokens = 256;      // below that a split costs more than it gains
  constexpr int64_t kMostTokens = 64 * 1024;  // above that float32 sums lose too much
  if (batch_heads == 0 || tokens == 0) return 1;
  const int64_t wanted = ceil_div(kBlocksPerMultiprocessor * multiprocessors, batch_heads);
  const int64_t most = ceil_div(tokens, kFewestTokens), fewest = ceil_div(tokens, kMostTokens);
  const int64_t splits = wanted < most ? wanted : most;
  return splits > fewest ? splits : fewest;
}

extern "C" cudaError_t linear_attention_feature_outer(const FeatureOuterArguments* arguments,
                                                      cudaStream_t stream) {
  const FeatureOuterArguments& p = *arguments;
  return for_element_type_and_head_dim(p.element, p.head_dim, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    constexpr int D = decltype(head_dim)::value;
    using Tile = FeatureOuterTile<D>;
    const int64_t states = p.batch * p.kv_heads;
    const int64_t S_size = states * 2 * D * D, z_size = states * 2 * D;
    const bool split = p.num_splits > 1;
    float* const S = split ? p.workspace : p.S;
    float* const z = split ? p.workspace + p.num_splits * S_size : p.z;
    const int64_t tokens_per_split =
        ceil_div(ceil_div(p.tokens, p.num_splits), Tile::kTokens) * Tile::kTokens;
    cudaError_t error = launch(
        feature_outer_kernel<D, T>, states * p.num_splits * Tile::kColumnBlocks,
        sizeof(typename Tile::Shared), stream,
        FeatureOuter<T>{rows_of<const T>(p.x), rows_of<const T>(p.w), p.kv_heads, p.group, p.tokens,
                        p.num_splits, tokens_per_split, p.row_scale, p.row_weight, S, z, states});
    if (!split || error != cudaSuccess) return error;
    error = launch(reduce_kernel, ceil_div(S_size, kThreads), 0, stream,
                   Reduce{S, p.S, S_size, p.num_splits});
    if (error != cudaSuccess) return error;
    return launch(reduce_kernel, ceil_div(z_size, kThreads), 0, stream,
                  Reduce{z, p.z, z_size, p.num_splits});
  });
}

extern "C" cudaError_t linear_attention_apply(const ApplyArguments* arguments,
                                              cudaStream_t stream) {
  const ApplyArguments& p = *arguments;
  return for_element_type_and_head_dim(p.element, p.head_dim, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    constexpr int D = decltype(head_dim)::value;
    return launch(apply_kernel<D, T>, row_blocks<D>(p.batch, p.heads, p.tokens),
                  sizeof(ApplyShared<D>), stream,
                  Apply<T>{rows_of<const T>(p.q), rows_of<T>(p.out), p.heads, p.group, p.tokens, p.S,
                           p.z, p.eps});
  });
}

extern "C" cudaError_t linear_attention_query_gradient(const QueryGradientArguments* arguments,
                                                       cudaStream_t stream) {
  const QueryGradientArguments& p = *arguments;
  return for_element_type_and_head_dim(p.element, p.head_dim, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    constexpr int D = decltype(head_dim)::value;
    return launch(query_gradient_kernel<D, T>, row_blocks<D>(p.batch, p.heads, p.tokens),
                  sizeof(QueryGradientShared<D>), stream,
                  QueryGradient<T>{rows_of<const T>(p.dout), rows_of<const T>(p.q),
                                   rows_of<T>(p.dq), p.heads, p.group, p.tokens, p.S, p.z, p.eps,
                                   p.row_scale, p.row_weight});
  });
}

extern "C" cudaError_t linear_attention_key_value_gradient(
    const KeyValueGradientArguments* arguments, cudaStream_t stream) {
  const KeyValueGradientArguments& p = *arguments;
  return for_element_type_and_head_dim(p.element, p.head_dim, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    constexpr int D = decltype(head_dim)::value;
    return launch(key_value_gradient_kernel<D, T>, row_blocks<D>(p.batch, p.kv_heads, p.tokens),
                  sizeof(KeyValueGradientShared<D>), stream,
                  KeyValueGradient<T>{rows_of<const T>(p.k), rows_of<const T>(p.v),
                                      rows_of<T>(p.dk), rows_of<T>(p.dv), p.kv_heads, p.tokens,
                                      p.dS, p.dz});
  });
}
