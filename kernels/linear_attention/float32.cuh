// Linear attention in float32, at IEEE grade: plain FMA, no tensor cores. Five kernels:
//
//   1 sum                  sum over tokens of phi(x)^T (scale w) and of phi(x) weight: S, z of k, v;
//                          for D > 64 also dS, dz of q, dout
//   2 apply                out = phi(q) S / E,  E = phi(q) . z + eps
//   3 query_gradient       dq, and per row 1/E and -(phi(q) . a)/E^2 for kernel 1, for D > 64
//   4 query_gradient_sum   dq, dS and dz in one, for D <= 64, where S fits beside the tiles
//   5 key_value_gradient   dk, dv from dS, dz
//
// Each reads what it needs once, but kernel 1 reads x D / sum_columns times, and for D > 64 q and dout
// are read by kernels 3 and 1: forward (2 q + 3 k) where least is (2 q + 2 k), backward (6 q + 4 k)
// where least is (3 q + 4 k). FMA is the limit, not traffic: at D = 64 the forward has 32 FLOP a byte.
//
// A block is 16 x 16 threads: see kernels/cuda/common.cuh.
#pragma once

#include "../cuda/common.cuh"
#include "features.cuh"
#include "problem.cuh"
#include "tiles.h"

namespace {

// ---- 1 sum -----------------------------------------------------------------------------------------
// One block: the tokens of one split (of every query head of the group) of one key/value head, and
// all D features against kColumns columns of w, a D/16 x kColumns/16 micro-tile per half of phi and
// thread. S is halved for D > 64 to stay in registers.
//
// Sums are two-level, 256 tokens at a time: a plain float32 sum of n terms is off by
// 3e-8 sqrt(n / 2), which is past 1e-6 from 4,000 tokens on.
//
// The 1 in __launch_bounds__ keeps ptxas from trading spills for more blocks a multiprocessor.

struct FloatSum {
  Rows<const float> x, w;
  int64_t kv_heads, group, tokens, num_splits, tokens_per_split;
  const float* row_scale;
  const float* row_weight;
  float* S;  // [split][batch * kv_heads][2 D][D]
  float* z;  // [split][batch * kv_heads][2 D]
  int64_t states;
};

template <int D>
struct FloatSumTile {
  static constexpr int kTokens = tile_of(kFloatTiles, D).sum_tokens;
  static constexpr int kChunk = 256;
  static constexpr int kColumns = tile_of(kFloatTiles, D).sum_columns;
  static constexpr int kColumnBlocks = D / kColumns;
  struct Shared {
    float x[kTokens][D];
    float w[kTokens][kColumns];
    float scale[kTokens];
    float weight[kTokens];
  };
};

template <int D>
__global__ void __launch_bounds__(kThreads, 1) float_sum_kernel(FloatSum p) {
  using Tile = FloatSumTile<D>;
  constexpr int F = D / kSide, C = Tile::kColumns / kSide;
  auto& shared = shared_memory_as<typename Tile::Shared>();
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
          shared.scale[t] = t < valid && p.row_scale ? load_global(p.row_scale + row) : 1.0f;
          shared.weight[t] = t < valid && p.row_weight ? load_global(p.row_weight + row) : 1.0f;
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
        store_global(S_out + feature * D + column0 + tx + kSide * j, S[half][i][j]);
      }
      if (column0 == 0 && tx == 0) store_global(z_out + feature, z[half][i]);
    }
  }
}

// Launches kernel 1; group heads of x and w go to a state.
template <int D>
cudaError_t launch_float_sum(const TensorView& x, const TensorView& w, int64_t kv_heads,
                             int64_t group, int64_t tokens, int64_t states, int64_t num_splits,
                             const float* row_scale, const float* row_weight, float* S, float* z,
                             cudaStream_t stream) {
  using Tile = FloatSumTile<D>;
  const int64_t each = ceil_div(ceil_div(tokens, num_splits), Tile::kTokens) * Tile::kTokens;
  return launch(float_sum_kernel<D>, states * num_splits * Tile::kColumnBlocks,
                sizeof(typename Tile::Shared), stream,
                FloatSum{rows_of<const float>(x), rows_of<const float>(w), kv_heads, group,
                                  tokens, num_splits, each, row_scale, row_weight, S, z, states});
}

// ---- products of a tile of rows with the state, shared by kernels 2, 3 and 5 ------------------------
// One block: kRows tokens of one head, kRows/16 x D/16 values a thread. The state passes through
// shared memory sixteen features, or columns, at a time: all of it is 128 KiB at D = 128.

template <int D>
struct RowTile {
  static constexpr int kRows = tile_of(kFloatTiles, D).tokens;
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
      slab.value[i] = load_global(S + feature0 * D + i);
      slab.value[kDepth * D + i] = load_global(S + (D + feature0) * D + i);
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
      slab.value[column * kPitch + feature] = load_global(S + feature * D + column0 + column);
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

// 1 / E, of E = phi(q) . z + eps, for each of a thread's rows.
template <int D>
__device__ void normaliser(float (&inverse_E)[RowTile<D>::kPerThread], const RowTile<D>& q,
                           const float* z, float eps) {
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
    inverse_E[i] = inverse(row_sum(sum), eps);
  }
}

// Which rows a block of kernels 2, 3 and 5 owns.
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

// ---- 2 apply ---------------------------------------------------------------------------------------
// Reads q, writes out, once each; the state comes from L2.

struct FloatApply {
  Rows<const float> q;
  Rows<float> out;
  int64_t heads, group, tokens;
  const float* S;
  const float* z;
  float eps;
};

template <int D>
struct FloatApplyShared {
  RowTile<D> q;
  StateSlab<D> slab;
  float z[2 * D];
};

template <int D>
__global__ void __launch_bounds__(kThreads) float_apply_kernel(FloatApply p) {
  using Tile = RowTile<D>;
  auto& shared = shared_memory_as<FloatApplyShared<D>>();
  const RowBlock block(p.heads, p.tokens, Tile::kRows);
  const int64_t state =
      block.batch * (p.heads / p.group) + block.head / p.group;

  load_tile<Tile::kRows, D, Tile::kPitch>(&shared.q.rows[0][0],
                                          p.q.at(block.batch, block.head, block.first),
                                          p.q.stride[2], block.valid, p.q.wide);
  for (int i = threadIdx.x; i < 2 * D; i += kThreads) {
    shared.z[i] = load_global(p.z + state * 2 * D + i);
  }
  __syncthreads();
  float inverse_E[Tile::kPerThread];
  normaliser<D>(inverse_E, shared.q, shared.z, p.eps);

  float out[Tile::kPerThread][Tile::kColumns] = {};
  multiply_features<D>(out, shared.q, p.S + state * 2 * D * D, shared.slab);
#pragma unroll
  for (int i = 0; i < Tile::kPerThread; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) out[i][j] *= inverse_E[i];
  }

  __syncthreads();  // q has been read: its tile now takes the result
  write_tile<Tile::kPerThread, Tile::kColumns, Tile::kPitch>(&shared.q.rows[0][0], out);
  __syncthreads();
  store_tile<Tile::kRows, D, Tile::kPitch>(p.out.at(block.batch, block.head, block.first),
                                           p.out.stride[2], block.valid, p.out.wide,
                                           &shared.q.rows[0][0]);
}

// ---- 3 query_gradient ------------------------------------------------------------------------------
// Reads q and dout, writes dq, once each, and two floats a row.

struct FloatQueryGradient {
  Rows<const float> dout, q;
  Rows<float> dq;
  int64_t heads, group, tokens;
  const float* S;
  const float* z;
  float eps;
  float* row_scale;
  float* row_weight;
};

template <int D>
struct FloatQueryGradientShared {
  RowTile<D> q;
  RowTile<D> g;
  StateSlab<D> slab;
  float z[2 * D];
};

template <int D>
__global__ void __launch_bounds__(kThreads) float_query_gradient_kernel(FloatQueryGradient p) {
  using Tile = RowTile<D>;
  auto& shared = shared_memory_as<FloatQueryGradientShared<D>>();
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
  for (int i = threadIdx.x; i < 2 * D; i += kThreads) {
    shared.z[i] = load_global(p.z + state * 2 * D + i);
  }
  __syncthreads();
  float inverse_E[Tile::kPerThread];
  normaliser<D>(inverse_E, shared.q, shared.z, p.eps);

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
    const float scale = inverse_E[i];
    const float weight = -(row_sum(dot) * scale) * scale;
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) {
      const int feature = tx + kSide * j;
      dq[i][j] = feature_gradient(shared.q.rows[row][feature],
                                  a[0][i][j] * scale + weight * shared.z[feature],
                                  a[1][i][j] * scale + weight * shared.z[D + feature]);
    }
    if (tx == 0 && row < block.valid) {
      store_global(p.row_scale + row0 + row, scale);
      store_global(p.row_weight + row0 + row, weight);
    }
  }

  __syncthreads();  // g has been read: its tile now takes the result
  write_tile<Tile::kPerThread, Tile::kColumns, Tile::kPitch>(&shared.g.rows[0][0], dq);
  __syncthreads();
  store_tile<Tile::kRows, D, Tile::kPitch>(p.dq.at(block.batch, block.head, block.first),
                                           p.dq.stride[2], block.valid, p.dq.wide,
                                           &shared.g.rows[0][0]);
}

// ---- 4 query_gradient_sum ----------------------------------------------------------------------------
// Reads q and dout, writes dq, once each, the state from shared memory; then g / E takes g's place and
// meets phi(q), which is still there. Sums in chunks of 256 tokens, as kernel 1.

template <int D>
struct FloatQuerySumShared {
  static constexpr int kRows = 64, kPitch = D + 1, kChunk = 256 / kRows;
  float q[kRows][kPitch];
  float g[kRows][kPitch];
  float S[2 * D][kPitch];
  float z[2 * D];
  float weight[kRows];
};

template <int D>
__global__ void __launch_bounds__(kThreads, 1)
    float_query_gradient_sum_kernel(Problem<float> p) {
  using Shared = FloatQuerySumShared<D>;
  constexpr int kRows = Shared::kRows, kPitch = Shared::kPitch;
  constexpr int kPerThread = kRows / kSide, F = D / kSide;
  auto& shared = shared_memory_as<Shared>();
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  const int64_t tiles_per_head = (p.queries + kRows - 1) / kRows;
  const Part part(p.kv_heads, p.num_splits, p.group * tiles_per_head);
  load_tile<2 * D, D, kPitch>(&shared.S[0][0], p.S + part.state * 2 * D * D, D, 2 * D, true);
  for (int i = threadIdx.x; i < 2 * D; i += kThreads) {
    shared.z[i] = load_global(p.z + part.state * 2 * D + i);
  }

  float S[2][F][F] = {}, z[2][F] = {};
  for (int chunk = part.begin; chunk < part.end; chunk += Shared::kChunk) {
    float S_sum[2][F][F] = {}, z_sum[2][F] = {};
    const int chunk_end = chunk + Shared::kChunk < part.end ? chunk + Shared::kChunk : part.end;
    for (int tile = chunk; tile < chunk_end; ++tile) {
      const int64_t head = part.kv_head * p.group + tile / tiles_per_head;
      const int64_t first = tile % tiles_per_head * kRows;
      const int valid = p.queries - first < kRows ? static_cast<int>(p.queries - first) : kRows;
      __syncthreads();  // the tile before has been read
      load_tile<kRows, D, kPitch>(&shared.q[0][0], p.q.at(part.batch, head, first), p.q.stride[2],
                                  valid, p.q.wide);
      load_tile<kRows, D, kPitch>(&shared.g[0][0], p.dout.at(part.batch, head, first),
                                  p.dout.stride[2], valid, p.dout.wide);
      __syncthreads();

      float a[2][kPerThread][F] = {};
#pragma unroll 2
      for (int c = 0; c < D; ++c) {
        float state[2][F];
#pragma unroll
        for (int j = 0; j < F; ++j) {
          state[0][j] = shared.S[tx + kSide * j][c];
          state[1][j] = shared.S[D + tx + kSide * j][c];
        }
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
          const float value = shared.g[ty + kSide * i][c];
#pragma unroll
          for (int j = 0; j < F; ++j) {
            a[0][i][j] += value * state[0][j];
            a[1][i][j] += value * state[1][j];
          }
        }
      }
      float scale[kPerThread];
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        float dot = 0.0f, normaliser = 0.0f;
#pragma unroll
        for (int j = 0; j < F; ++j) {
          const int feature = tx + kSide * j;
          const float x = shared.q[ty + kSide * i][feature];
          dot += positive_part(x) * a[0][i][j] + negative_part(x) * a[1][i][j];
          normaliser +=
              positive_part(x) * shared.z[feature] + negative_part(x) * shared.z[D + feature];
        }
        scale[i] = inverse(row_sum(normaliser), p.eps);
        const float weight = -(row_sum(dot) * scale[i]) * scale[i];
        if (tx == 0) shared.weight[ty + kSide * i] = weight;
#pragma unroll
        for (int j = 0; j < F; ++j) {
          const int feature = tx + kSide * j;
          a[0][i][j] = feature_gradient(shared.q[ty + kSide * i][feature],
                                        a[0][i][j] * scale[i] + weight * shared.z[feature],
                                        a[1][i][j] * scale[i] + weight * shared.z[D + feature]);
        }
      }
      __syncwarp();  // a row is one half-warp's, which has read g: g / E takes its place
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int row = ty + kSide * i;
#pragma unroll
        for (int j = 0; j < F; ++j) {
          shared.g[row][tx + kSide * j] *= scale[i];
          if (row < valid) {
            store_global(p.dq.at(part.batch, head, first) + row * p.dq.stride[2] + tx + kSide * j,
                         a[0][i][j]);
          }
        }
      }
      __syncthreads();  // g / E and the weights are there

#pragma unroll 2
      for (int t = 0; t < kRows; ++t) {
        float phi[2][F], w[F];
#pragma unroll
        for (int i = 0; i < F; ++i) {
          const float x = shared.q[t][ty + kSide * i];
          phi[0][i] = positive_part(x);
          phi[1][i] = negative_part(x);
          w[i] = shared.g[t][tx + kSide * i];
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int i = 0; i < F; ++i) {
#pragma unroll
            for (int j = 0; j < F; ++j) S_sum[half][i][j] += phi[half][i] * w[j];
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
        for (int j = 0; j < F; ++j) S[half][i][j] += S_sum[half][i][j];
        z[half][i] += z_sum[half][i];
      }
    }
  }

  const int64_t index = part.split * p.states + part.state;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < F; ++i) {
      const int feature = half * D + ty + kSide * i;
#pragma unroll
      for (int j = 0; j < F; ++j) {
        store_global(p.S_out + (index * 2 * D + feature) * D + tx + kSide * j, S[half][i][j]);
      }
      if (tx == 0) store_global(p.z_out + index * 2 * D + feature, z[half][i]);
    }
  }
}

// ---- 5 key_value_gradient --------------------------------------------------------------------------
// Reads k and v, writes dk and dv, once each.

struct FloatKeyValueGradient {
  Rows<const float> k, v;
  Rows<float> dk, dv;
  int64_t kv_heads, tokens;
  const float* dS;
  const float* dz;
};

template <int D>
struct FloatKeyValueGradientShared {
  RowTile<D> k;
  RowTile<D> v;
  StateSlab<D> slab;
};

template <int D>
__global__ void __launch_bounds__(kThreads) float_key_value_gradient_kernel(FloatKeyValueGradient p) {
  using Tile = RowTile<D>;
  auto& shared = shared_memory_as<FloatKeyValueGradientShared<D>>();
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
                                    dphi[0][i][j] + load_global(dz + feature),
                                    dphi[1][i][j] + load_global(dz + D + feature));
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
