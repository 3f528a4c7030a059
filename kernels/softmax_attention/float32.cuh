// The kernels for float32: products of IEEE grade, on the FMA units.
//
// Traffic and decomposition as in cuda.cu. A block is 16 x 16 threads and owns 64 rows (32 at D = 128)
// of queries, in the third kernel of keys; it passes over the other side 32 rows at a time. Thread
// (x, y) has rows y, y + 16, ... and columns x, x + 16, ... of every product.
//
// A row of P or dS is written and read by the same half warp, so a warp's barrier is enough for it.
// Sums over many rows are two-level (a tile's sum is formed, then added): a plain float32 sum of n
// terms is off by 3e-8 sqrt(n / 2), which is past 1e-6 from 4,000 rows on.
#pragma once

#include "problem.cuh"

namespace float32 {

constexpr int kTile = 32;  // rows of the side passed over
constexpr int kTilePerThread = kTile / kSide;

template <int D>
struct Block {
  static constexpr int kRows = D > 96 ? 32 : 64;  // rows of the side owned
  static constexpr int kPerThread = kRows / kSide;
  static constexpr int kColumns = D / kSide;  // of a row of D, per thread
  static constexpr int kPitch = D + 1;
  static constexpr int kProbabilityPitch = kTile + 1;

  using Owned = float[kRows][kPitch];
  using Passed = float[kTile][kPitch];
  using Probabilities = float[kRows][kProbabilityPitch];
  using Scores = float[kPerThread][kTilePerThread];
  using Values = float[kPerThread][kColumns];
};

// product = a b^T: the owned rows against the rows passed over.
template <int D>
__device__ void multiply_rows(typename Block<D>::Scores& product,
                              const typename Block<D>::Owned& a,
                              const typename Block<D>::Passed& b) {
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
#pragma unroll
  for (int i = 0; i < Block<D>::kPerThread; ++i) {
#pragma unroll
    for (int j = 0; j < kTilePerThread; ++j) product[i][j] = 0.0f;
  }
#pragma unroll 4
  for (int d = 0; d < D; ++d) {
    float row[kTilePerThread];
#pragma unroll
    for (int j = 0; j < kTilePerThread; ++j) row[j] = b[tx + kSide * j][d];
#pragma unroll
    for (int i = 0; i < Block<D>::kPerThread; ++i) {
      const float value = a[ty + kSide * i][d];
#pragma unroll
      for (int j = 0; j < kTilePerThread; ++j) product[i][j] += value * row[j];
    }
  }
}

// total = total * scale + p b, with the product formed first.
template <int D>
__device__ void accumulate(typename Block<D>::Values& total,
                           const float (&scale)[Block<D>::kPerThread],
                           const typename Block<D>::Probabilities& p,
                           const typename Block<D>::Passed& b) {
  using B = Block<D>;
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  float sum[B::kPerThread][B::kColumns] = {};
#pragma unroll 2
  for (int t = 0; t < kTile; ++t) {
    float row[B::kColumns];
#pragma unroll
    for (int j = 0; j < B::kColumns; ++j) row[j] = b[t][tx + kSide * j];
#pragma unroll
    for (int i = 0; i < B::kPerThread; ++i) {
      const float value = p[ty + kSide * i][t];
#pragma unroll
      for (int j = 0; j < B::kColumns; ++j) sum[i][j] += value * row[j];
    }
  }
#pragma unroll
  for (int i = 0; i < B::kPerThread; ++i) {
#pragma unroll
    for (int j = 0; j < B::kColumns; ++j) total[i][j] = total[i][j] * scale[i] + sum[i][j];
  }
}

// ---- forward --------------------------------------------------------------------------------------

template <int D>
struct ForwardShared {
  typename Block<D>::Owned q;
  typename Block<D>::Passed k, v;
  typename Block<D>::Probabilities p;
};

template <int D, bool kMasked>
__global__ void __launch_bounds__(kThreads) forward_kernel(Forward<float> a) {
  using B = Block<D>;
  auto& shared = shared_memory_as<ForwardShared<D>>();
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  const RowBlock block(a.heads, a.query_tokens, B::kRows);
  const int64_t kv_head = block.head / a.group;
  const float to_log2 = a.scale * kLog2E;

  load_tile<B::kRows, D, B::kPitch>(&shared.q[0][0], a.q.at(block.batch, block.head, block.first),
                                    a.q.stride[2], block.valid, a.q.wide);
  float out[B::kPerThread][B::kColumns] = {};
  float maximum[B::kPerThread], sum[B::kPerThread] = {};
#pragma unroll
  for (float& value : maximum) value = kLeast<kMasked>;

  for (int64_t first = 0; first < a.key_tokens; first += kTile) {
    const int valid = valid_rows(a.key_tokens, first, kTile);
    __syncthreads();  // the tiles before have been read
    load_tile<kTile, D, B::kPitch>(&shared.k[0][0], a.k.at(block.batch, kv_head, first),
                                   a.k.stride[2], valid, a.k.wide);
    load_tile<kTile, D, B::kPitch>(&shared.v[0][0], a.v.at(block.batch, kv_head, first),
                                   a.v.stride[2], valid, a.v.wide);
    __syncthreads();
    float score[B::kPerThread][kTilePerThread], rescale[B::kPerThread];
    multiply_rows<D>(score, shared.q, shared.k);
    const Keys<kMasked> key(a, block.batch, first, valid);
#pragma unroll
    for (int i = 0; i < B::kPerThread; ++i) {
      float largest = maximum[i];
#pragma unroll
      for (int j = 0; j < kTilePerThread; ++j) {
        score[i][j] = key.there(tx + kSide * j) ? score[i][j] * to_log2 : -kInfinity;
        largest = fmaxf(largest, score[i][j]);
      }
      // fmaxf drops a NaN score, but its exponential below is NaN again and reaches sum and out.
      largest = row_max(largest);
      rescale[i] = exp2f(maximum[i] - largest);
      maximum[i] = largest;
      float tile_sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kTilePerThread; ++j) {
        const float p = exp2f(score[i][j] - largest);
        tile_sum += p;
        shared.p[ty + kSide * i][tx + kSide * j] = p;
      }
      sum[i] = sum[i] * rescale[i] + row_sum(tile_sum);
    }
    __syncwarp();
    accumulate<D>(out, rescale, shared.p, shared.v);
  }

#pragma unroll
  for (int i = 0; i < B::kPerThread; ++i) {
    const int row = ty + kSide * i;
    const float inverse = sum[i] != 0.0f ? 1.0f / sum[i] : 0.0f;  // no key at all: 0
#pragma unroll
    for (int j = 0; j < B::kColumns; ++j) out[i][j] *= inverse;
    if (tx == 0 && row < block.valid) {
      const int64_t token =
          (block.batch * a.heads + block.head) * a.query_tokens + block.first + row;
      store_global(a.lse + token, (maximum[i] + log2f(sum[i])) * kLn2);
    }
  }
  __syncthreads();  // q has been read: its tile now takes the result
  write_tile<B::kPerThread, B::kColumns, B::kPitch>(&shared.q[0][0], out);
  __syncthreads();
  store_tile<B::kRows, D, B::kPitch>(a.out.at(block.batch, block.head, block.first),
                                     a.out.stride[2], block.valid, a.out.wide, &shared.q[0][0]);
}

// ---- query_gradient -------------------------------------------------------------------------------
// P = exp(scale q k^T - lse),  dS = P (g v^T - delta),  dq = scale dS k.

template <int D>
struct QueryGradientShared {
  typename Block<D>::Owned q, g;
  typename Block<D>::Passed k, v;
  typename Block<D>::Probabilities ds;
};

template <int D, bool kMasked>
__global__ void __launch_bounds__(kThreads) query_gradient_kernel(Backward<float> a) {
  using B = Block<D>;
  auto& shared = shared_memory_as<QueryGradientShared<D>>();
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  const RowBlock block(a.heads, a.query_tokens, B::kRows);
  const int64_t kv_head = block.head / a.group;
  const int64_t row0 = (block.batch * a.heads + block.head) * a.query_tokens + block.first;
  const float to_log2 = a.scale * kLog2E;

  load_tile<B::kRows, D, B::kPitch>(&shared.q[0][0], a.q.at(block.batch, block.head, block.first),
                                    a.q.stride[2], block.valid, a.q.wide);
  load_tile<B::kRows, D, B::kPitch>(&shared.g[0][0],
                                    a.dout.at(block.batch, block.head, block.first),
                                    a.dout.stride[2], block.valid, a.dout.wide);
  // k's and v's tiles, one after the other, have room for out.
  static_assert(B::kRows <= 2 * kTile);
  load_tile<B::kRows, D, B::kPitch>(&shared.k[0][0],
                                    a.out.at(block.batch, block.head, block.first),
                                    a.out.stride[2], block.valid, a.out.wide);
  float lse2[B::kPerThread], delta[B::kPerThread], one[B::kPerThread];
#pragma unroll
  for (int i = 0; i < B::kPerThread; ++i) {
    const int row = ty + kSide * i;
    lse2[i] = row < block.valid ? load_global(a.lse + row0 + row) * kLog2E : 0.0f;
    one[i] = 1.0f;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < B::kPerThread; ++i) {
    const int row = ty + kSide * i;
    const float* const out = &shared.k[0][0] + row * B::kPitch;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < B::kColumns; ++j) {
      sum += shared.g[row][tx + kSide * j] * out[tx + kSide * j];
    }
    delta[i] = row_sum(sum);
    if (tx == 0 && row < block.valid) store_global(a.delta + row0 + row, delta[i]);
  }
  float dq[B::kPerThread][B::kColumns] = {};
  for (int64_t first = 0; first < a.key_tokens; first += kTile) {
    const int valid = valid_rows(a.key_tokens, first, kTile);
    __syncthreads();  // the tiles before have been read
    load_tile<kTile, D, B::kPitch>(&shared.k[0][0], a.k.at(block.batch, kv_head, first),
                                   a.k.stride[2], valid, a.k.wide);
    load_tile<kTile, D, B::kPitch>(&shared.v[0][0], a.v.at(block.batch, kv_head, first),
                                   a.v.stride[2], valid, a.v.wide);
    __syncthreads();
    float score[B::kPerThread][kTilePerThread], dp[B::kPerThread][kTilePerThread];
    multiply_rows<D>(score, shared.q, shared.k);
    multiply_rows<D>(dp, shared.g, shared.v);
    const Keys<kMasked> keys(a, block.batch, first, valid);
#pragma unroll
    for (int i = 0; i < B::kPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < kTilePerThread; ++j) {
        const int key = tx + kSide * j;
        const float p = exp2f(score[i][j] * to_log2 - lse2[i]);
        shared.ds[ty + kSide * i][key] =
            keys.there(key) ? p * (dp[i][j] - delta[i]) * a.scale : 0.0f;
      }
    }
    __syncwarp();
    accumulate<D>(dq, one, shared.ds, shared.k);
  }

  __syncthreads();  // q has been read: its tile now takes the result
  write_tile<B::kPerThread, B::kColumns, B::kPitch>(&shared.q[0][0], dq);
  __syncthreads();
  store_tile<B::kRows, D, B::kPitch>(a.dq.at(block.batch, block.head, block.first), a.dq.stride[2],
                                     block.valid, a.dq.wide, &shared.q[0][0]);
}

// ---- key_value_gradient ---------------------------------------------------------------------------
// dv = P^T g,  dk = scale dS^T q, summed over the query heads that read this head.

template <int D>
struct KeyValueGradientShared {
  typename Block<D>::Owned k, v;
  typename Block<D>::Passed q, g;
  typename Block<D>::Probabilities p, ds;
  float lse2[kTile], delta[kTile];
};

template <int D>
__global__ void __launch_bounds__(kThreads) key_value_gradient_kernel(Backward<float> a) {
  using B = Block<D>;
  auto& shared = shared_memory_as<KeyValueGradientShared<D>>();
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  const RowBlock block(a.heads / a.group, a.key_tokens, B::kRows);
  const float to_log2 = a.scale * kLog2E;

  load_tile<B::kRows, D, B::kPitch>(&shared.k[0][0], a.k.at(block.batch, block.head, block.first),
                                    a.k.stride[2], block.valid, a.k.wide);
  load_tile<B::kRows, D, B::kPitch>(&shared.v[0][0], a.v.at(block.batch, block.head, block.first),
                                    a.v.stride[2], block.valid, a.v.wide);
  float one[B::kPerThread];
#pragma unroll
  for (float& value : one) value = 1.0f;
  float dk[B::kPerThread][B::kColumns] = {}, dv[B::kPerThread][B::kColumns] = {};
  for (int64_t head = block.head * a.group; head < (block.head + 1) * a.group; ++head) {
    const int64_t row0 = (block.batch * a.heads + head) * a.query_tokens;
    for (int64_t first = 0; first < a.query_tokens; first += kTile) {
      const int valid = valid_rows(a.query_tokens, first, kTile);
      __syncthreads();  // the tiles before have been read
      load_tile<kTile, D, B::kPitch>(&shared.q[0][0], a.q.at(block.batch, head, first),
                                     a.q.stride[2], valid, a.q.wide);
      load_tile<kTile, D, B::kPitch>(&shared.g[0][0], a.dout.at(block.batch, head, first),
                                     a.dout.stride[2], valid, a.dout.wide);
      for (int t = threadIdx.x; t < valid; t += kThreads) {
        shared.lse2[t] = load_global(a.lse + row0 + first + t) * kLog2E;
        shared.delta[t] = load_global(a.delta + row0 + first + t);
      }
      __syncthreads();
      float score[B::kPerThread][kTilePerThread], dp[B::kPerThread][kTilePerThread];
      multiply_rows<D>(score, shared.k, shared.q);
      multiply_rows<D>(dp, shared.v, shared.g);
#pragma unroll
      for (int i = 0; i < B::kPerThread; ++i) {
#pragma unroll
        for (int j = 0; j < kTilePerThread; ++j) {
          const int key = ty + kSide * i, query = tx + kSide * j;
          float p = 0.0f, ds = 0.0f;
          if (query < valid) {
            p = exp2f(score[i][j] * to_log2 - shared.lse2[query]);
            ds = p * (dp[i][j] - shared.delta[query]) * a.scale;
          }
          shared.p[key][query] = p;
          shared.ds[key][query] = ds;
        }
      }
      __syncwarp();
      accumulate<D>(dv, one, shared.p, shared.g);
      accumulate<D>(dk, one, shared.ds, shared.q);
    }
  }

  __syncthreads();  // k and v have been read: their tiles now take the results
  write_tile<B::kPerThread, B::kColumns, B::kPitch>(&shared.k[0][0], dk);
  write_tile<B::kPerThread, B::kColumns, B::kPitch>(&shared.v[0][0], dv);
  __syncthreads();
  store_tile<B::kRows, D, B::kPitch>(a.dk.at(block.batch, block.head, block.first), a.dk.stride[2],
                                     block.valid, a.dk.wide, &shared.k[0][0]);
  store_tile<B::kRows, D, B::kPitch>(a.dv.at(block.batch, block.head, block.first), a.dv.stride[2],
                                     block.valid, a.dv.wide, &shared.v[0][0]);
}

}  // namespace float32
