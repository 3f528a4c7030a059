// The kernels for float16 and bfloat16: products on tensor cores (mma.sync), softmax in registers.
//
// Traffic and decomposition as in cuda.cu. A block is 4 warps. A warp owns 16 rows (32 in the forward
// kernel up to D = 64, so that what it reads of a key or value serves twice as many rows): a row's
// products, statistics and sums stay in the 4 lanes that the tensor core gives the row to, and P and dS
// become operands where they are, as FlashAttention-2 does it. The other side passes through two
// stages of shared memory, one being copied while the other is used, 32 rows at a time (64 in the
// forward kernel up to D = 64):
//
//   forward             q in registers                    k, v: 2 stages
//   query_gradient      q, dout in shared memory          k, v: 2 stages
//   key_value_gradient  k, v in shared memory             q, dout: 2 stages
//
// The backward kernels keep their operands in registers too up to D = 64.
//
// P and dS are rounded once, as operands. Backward they are about 1 / key_tokens, which is subnormal in
// float16 from 16,384 keys on; so there P, which is at most 1, is carried times 2^15, and dS times a
// power of two that grows with the number of keys (dscore_scale).
#pragma once

#include "../cuda/ptx.cuh"
#include "problem.cuh"

namespace half_precision {

constexpr int kBlockThreads = 128;
constexpr int kWarps = kBlockThreads / 32;

// Rows in shared memory are padded by 16 bytes: the 8 rows of a matrix load lie in different banks.
template <int D>
constexpr int kPitch = D + 8;

template <int D>
struct ForwardTile {
  static constexpr int kRowTiles = D <= 64 ? 2 : 1;  // of 16 rows, per warp
  static constexpr int kOwned = 16 * kRowTiles * kWarps;
  static constexpr int kPassed = D <= 64 ? 64 : 32;
  static constexpr int kStage = 2 * kPassed * kPitch<D>;  // elements: keys, then values
  static constexpr size_t kSharedBytes = 2 * kStage * 2;
  static_assert(kOwned == 2 * kPassed, "q passes through a stage, and so does out");
  static_assert(kSharedBytes <= kSharedLimit);
};

template <int D>
struct BackwardTile {
  static constexpr int kOwned = 16 * kWarps;
  static constexpr int kPassed = 32;
  static constexpr bool kHeld = D <= 64;  // the owned operands, in registers
  static constexpr int kOwnedTile = kOwned * kPitch<D>;
  static constexpr int kStage = 2 * kPassed * kPitch<D>;
  static constexpr size_t kSharedBytes = 2 * (2 * kOwnedTile + 2 * kStage);
  static constexpr size_t kStatistics = 2 * 2 * kPassed * sizeof(float);  // in both stages
  static_assert(kOwned == 2 * kPassed, "out passes through a stage");
  static_assert(kSharedBytes + kStatistics <= kSharedLimit);
};

__device__ inline int lane_index() { return threadIdx.x % 32; }
__device__ inline int warp_index() { return threadIdx.x / 32; }

// Over the 4 lanes of a row; every one of them gets the result. The maximum drops NaN, as fmaxf does.
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}

// Which keys of a tile of kPassed are there, at a lane's places of a product: e of each 8 from 8 j on.
// Of a mask a lane reads one byte in 32, and has a bit of each: bytes would not fit in the registers.
template <bool kMasked, int kPassed>
struct LaneKeys {
  unsigned bits[kPassed / 32];
  int column, valid;

  template <typename Arguments>
  __device__ LaneKeys(const Arguments& a, int64_t batch, int64_t first, int valid)
      : column(2 * (lane_index() % 4)), valid(valid) {
    if constexpr (kMasked) {
      const Keys<true> keys(a, batch, first, valid);
#pragma unroll
      for (int i = 0; i < kPassed / 32; ++i) {
        bits[i] = __ballot_sync(kFullWarp, keys.there(32 * i + lane_index())) >> column;
      }
    }
  }
  __device__ bool there(int j, int e) const {
    if constexpr (kMasked) {
      return bits[j / 4] >> (8 * (j % 4) + e) & 1;
    } else {
      return 8 * j + column + e < valid;
    }
  }
};

// ---- tiles ---------------------------------------------------------------------------------------

// kRows rows of x, from `source` on, into a tile; rows from `valid` on are 0. By asynchronous copies
// where x allows.
template <int kRows, int D, typename T>
__device__ void copy_rows(T* tile, const Rows<const T>& x, const T* source, int valid) {
  const int64_t stride = x.stride[2];
  if (x.wide) {
    constexpr int kPerRow = D / kWide<T>;
#pragma unroll
    for (int i = threadIdx.x; i < kRows * kPerRow; i += kBlockThreads) {
      const int row = i / kPerRow, column = i % kPerRow * kWide<T>;
      const bool inside = row < valid;
      ptx::cp_async_16(tile + row * kPitch<D> + column,
                       source + (inside ? row * stride + column : 0), inside ? 16 : 0);
    }
  } else {
#pragma unroll 4
    for (int i = threadIdx.x; i < kRows * D; i += kBlockThreads) {
      const int row = i / D, column = i % D;
      tile[row * kPitch<D> + column] =
          row < valid ? load_global(source + row * stride + column) : from_float<T>(0.0f);
    }
  }
}

// A warp's kRows rows of results, times `factor` by row half, through its own rows of a tile.
template <int kRowTiles, int D, typename T>
__device__ void store_rows(const Rows<T>& x, T* target, int valid, T* tile,
                           const float (&result)[kRowTiles][D / 8][4],
                           const float (&factor)[kRowTiles][2]) {
  const int lane = lane_index();
  __syncwarp();  // the tile's rows have been read
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T* const pair = tile + (16 * i + 8 * half + lane / 4) * kPitch<D> + 8 * j + 2 * (lane % 4);
        *reinterpret_cast<unsigned*>(pair) =
            ptx::pack2<T>(result[i][j][2 * half] * factor[i][half],
                          result[i][j][2 * half + 1] * factor[i][half]);
      }
    }
  }
  __syncwarp();
  auto store = [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    constexpr int kPerRow = D / kSize;
    using Piece = Vector<T, kSize>;
#pragma unroll 2
    for (int i = lane; i < 16 * kRowTiles * kPerRow; i += 32) {
      const int row = i / kPerRow, column = i % kPerRow * kSize;
      if (row >= valid) break;
      store_global(reinterpret_cast<Piece*>(target + row * x.stride[2] + column),
                   *reinterpret_cast<const Piece*>(tile + row * kPitch<D> + column));
    }
  };
  if (x.wide) {
    store(std::integral_constant<int, kWide<T>>{});
  } else {
    store(std::integral_constant<int, 1>{});
  }
}

// ---- products ------------------------------------------------------------------------------------

// The a operand: 16 x 16 elements from `corner` on.
template <int D, typename T>
__device__ void load_a(unsigned (&a)[4], const T* corner) {
  const int lane = lane_index();
  ptx::ldmatrix_x4(a, corner + lane % 16 * kPitch<D> + lane / 16 * 8);
}

// A warp's rows of a tile as a operands: held in registers, or read when they are wanted.
template <int kRowTiles, int D, bool kHeld, typename T>
struct Operand {
  const T* rows;
  unsigned held[kHeld ? kRowTiles : 1][kHeld ? D / 16 : 1][4];

  __device__ explicit Operand(const T* tile) : rows(tile) {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int k = 0; k < D / 16; ++k) load_a<D>(held[i][k], rows + 16 * i * kPitch<D> + 16 * k);
      }
    }
  }

  __device__ void get(unsigned (&a)[4], int i, int k) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int r = 0; r < 4; ++r) a[r] = held[i][k][r];
    } else {
      load_a<D>(a, rows + 16 * i * kPitch<D> + 16 * k);
    }
  }
};

// product = a xᵀ for the kPassed rows of the tile x.
template <int kRowTiles, int kPassed, int D, bool kHeld, typename T>
__device__ void multiply_rows(float (&product)[kRowTiles][kPassed / 8][4],
                              const Operand<kRowTiles, D, kHeld, T>& operand, const T* x) {
  const int lane = lane_index();
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kPassed / 8; ++j) {
#pragma unroll
      for (float& value : product[i][j]) value = 0.0f;
    }
  }
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    unsigned a[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) operand.get(a[i], i, k);
#pragma unroll
    for (int j = 0; j < kPassed / 16; ++j) {
      unsigned rows[4];  // 8 rows of x by 16 columns of depth, and the 8 rows after them
      ptx::ldmatrix_x4(rows, x + (16 * j + lane / 16 * 8 + lane % 8) * kPitch<D> + 16 * k +
                                 lane / 8 % 2 * 8);
      const unsigned b[2][2] = {{rows[0], rows[1]}, {rows[2], rows[3]}};
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        ptx::mma_16816<T>(product[i][2 * j], a[i], b[0]);
        ptx::mma_16816<T>(product[i][2 * j + 1], a[i], b[1]);
      }
    }
  }
}

// total += p x for the kPassed rows of the tile x; p is rounded to T.
template <int kRowTiles, int kPassed, int D, typename T>
__device__ void accumulate(float (&total)[kRowTiles][D / 8][4],
                           const float (&p)[kRowTiles][kPassed / 8][4], const T* x) {
  const int lane = lane_index();
#pragma unroll
  for (int k = 0; k < kPassed / 16; ++k) {
    unsigned a[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float(&tile)[4] = p[i][2 * k + r / 2];
        a[i][r] = ptx::pack2<T>(tile[2 * (r % 2)], tile[2 * (r % 2) + 1]);
      }
    }
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      unsigned columns[4];  // 16 rows of depth by 8 columns of x, and the 8 columns after them
      ptx::ldmatrix_x4_trans(columns, x + (16 * k + lane % 16) * kPitch<D> + 16 * j + lane / 16 * 8);
      const unsigned b[2][2] = {{columns[0], columns[1]}, {columns[2], columns[3]}};
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        ptx::mma_16816<T>(total[i][2 * j], a[i], b[0]);
        ptx::mma_16816<T>(total[i][2 * j + 1], a[i], b[1]);
      }
    }
  }
}

// ---- forward -------------------------------------------------------------------------------------

// With a mask the registers for one block more would not be enough: it spilled at D = 128.
template <int D, typename T, bool kMasked>
__global__ void __launch_bounds__(kBlockThreads, kMasked ? 1 : 0) forward_kernel(Forward<T> a) {
  using Tile = ForwardTile<D>;
  constexpr int kRowTiles = Tile::kRowTiles, kPassed = Tile::kPassed;
  T* const stages = reinterpret_cast<T*>(shared_memory());
  const RowBlock block(a.heads, a.query_tokens, Tile::kOwned);
  const int64_t kv_head = block.head / a.group;
  const int lane = lane_index(), warp_row = 16 * kRowTiles * warp_index();
  const bool busy = warp_row < block.valid;  // a short block leaves warps with copies only
  auto copy = [&](int stage, int64_t first) {
    T* const tile = stages + stage * Tile::kStage;
    const int valid = valid_rows(a.key_tokens, first, kPassed);
    copy_rows<kPassed, D>(tile, a.k, a.k.at(block.batch, kv_head, first), valid);
    copy_rows<kPassed, D>(tile + kPassed * kPitch<D>, a.v, a.v.at(block.batch, kv_head, first),
                          valid);
    ptx::cp_async_commit();
  };

  copy_rows<Tile::kOwned, D>(stages + Tile::kStage, a.q,
                             a.q.at(block.batch, block.head, block.first), block.valid);
  copy(0, 0);
  ptx::cp_async_wait<0>();
  __syncthreads();
  Operand<kRowTiles, D, true, T> q(stages + Tile::kStage + warp_row * kPitch<D>);
  if (a.scale < 0.0f) {  // the largest score is to be the largest product
#pragma unroll
    for (auto& row_tile : q.held) {
#pragma unroll
      for (auto& fragment : row_tile) {
#pragma unroll
        for (unsigned& pair : fragment) pair = ptx::negate2<T>(pair);
      }
    }
  }
  __syncthreads();  // q has been read: its stage takes the second tile

  // To base-2 logarithms; not 0, which would make a NaN of a masked score.
  const float to_log2 = fmaxf(fabsf(a.scale) * kLog2E, 1e-30f);
  float out[kRowTiles][D / 8][4] = {};
  float maximum[kRowTiles][2], sum[kRowTiles][2] = {};
#pragma unroll
  for (auto& row_tile : maximum) row_tile[0] = row_tile[1] = kLeast<kMasked>;
  int stage = 0;
  for (int64_t first = 0; first < a.key_tokens; first += kPassed, stage ^= 1) {
    if (first + kPassed < a.key_tokens) copy(stage ^ 1, first + kPassed);
    if (busy) {
      const T* const keys = stages + stage * Tile::kStage;
      const int valid = valid_rows(a.key_tokens, first, kPassed);
      float score[kRowTiles][kPassed / 8][4];
      multiply_rows<kRowTiles, kPassed>(score, q, keys);
      const LaneKeys<kMasked, kPassed> present(a, block.batch, first, valid);
      if (kMasked || valid < kPassed) {
#pragma unroll
        for (int j = 0; j < kPassed / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (!present.there(j, e % 2)) {
#pragma unroll
              for (int i = 0; i < kRowTiles; ++i) score[i][j][e] = -kInfinity;
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float largest = -kInfinity;
#pragma unroll
          for (int j = 0; j < kPassed / 8; ++j) {
            largest = fmaxf(largest, fmaxf(score[i][j][2 * half], score[i][j][2 * half + 1]));
          }
          // fmaxf drops a NaN score, but its exponential below is NaN again and reaches sum and out.
          largest = fmaxf(maximum[i][half], quad_max(largest) * to_log2);
          const float rescale = ptx::exp2(maximum[i][half] - largest);
          maximum[i][half] = largest;
          sum[i][half] *= rescale;
#pragma unroll
          for (int j = 0; j < kPassed / 8; ++j) {
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) {
              score[i][j][e] = ptx::exp2(score[i][j][e] * to_log2 - largest);
              sum[i][half] += score[i][j][e];
            }
          }
#pragma unroll
          for (int j = 0; j < D / 8; ++j) {
            out[i][j][2 * half] *= rescale;
            out[i][j][2 * half + 1] *= rescale;
          }
        }
      }
      accumulate<kRowTiles, kPassed, D>(out, score, keys + kPassed * kPitch<D>);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // the next tile is there, and this one has been read
  }
  if (!busy) return;

  float inverse[kRowTiles][2];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = quad_sum(sum[i][half]);
      const int row = warp_row + 16 * i + 8 * half + lane / 4;
      inverse[i][half] = total != 0.0f ? 1.0f / total : 0.0f;  // no key at all: 0
      if (lane % 4 == 0 && row < block.valid) {
        const int64_t head = block.batch * a.heads + block.head;
        store_global(a.lse + head * a.query_tokens + block.first + row,
                     (maximum[i][half] + log2f(total)) * kLn2);
      }
    }
  }
  store_rows<kRowTiles, D>(a.out, a.out.at(block.batch, block.head, block.first + warp_row),
                           block.valid - warp_row, stages + warp_row * kPitch<D>, out, inverse);
}

// ---- query_gradient ------------------------------------------------------------------------------
// delta = rowsum(g out),  P = exp(scale q kᵀ - lse),  dS = P (g vᵀ - delta),  dq = scale dS k.

template <int D, typename T, bool kMasked>
__global__ void __launch_bounds__(kBlockThreads) query_gradient_kernel(Backward<T> a) {
  using Tile = BackwardTile<D>;
  constexpr int kPassed = Tile::kPassed;
  T* const owned = reinterpret_cast<T*>(shared_memory());
  T* const stages = owned + 2 * Tile::kOwnedTile;
  const RowBlock block(a.heads, a.query_tokens, Tile::kOwned);
  const int64_t kv_head = block.head / a.group;
  const int64_t row0 = (block.batch * a.heads + block.head) * a.query_tokens + block.first;
  const int lane = lane_index(), warp_row = 16 * warp_index();
  const bool busy = warp_row < block.valid;
  auto copy = [&](int stage, int64_t first) {
    T* const tile = stages + stage * Tile::kStage;
    const int valid = valid_rows(a.key_tokens, first, kPassed);
    copy_rows<kPassed, D>(tile, a.k, a.k.at(block.batch, kv_head, first), valid);
    copy_rows<kPassed, D>(tile + kPassed * kPitch<D>, a.v, a.v.at(block.batch, kv_head, first),
                          valid);
    ptx::cp_async_commit();
  };
  auto copy_owned = [&](T* tile, const Rows<const T>& x) {
    copy_rows<Tile::kOwned, D>(tile, x, x.at(block.batch, block.head, block.first), block.valid);
  };

  copy_owned(owned, a.q);
  copy_owned(owned + Tile::kOwnedTile, a.dout);
  copy_owned(stages + Tile::kStage, a.out);
  copy(0, 0);
  ptx::cp_async_wait<0>();
  __syncthreads();
  const Operand<1, D, Tile::kHeld, T> q(owned + warp_row * kPitch<D>);
  const Operand<1, D, Tile::kHeld, T> g(owned + Tile::kOwnedTile + warp_row * kPitch<D>);
  float delta[2] = {}, lse2[2];
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    unsigned x[4], y[4];
    g.get(x, 0, k);
    load_a<D>(y, stages + Tile::kStage + warp_row * kPitch<D> + 16 * k);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float2 gradient = ptx::unpack2<T>(x[r]), out = ptx::unpack2<T>(y[r]);
      delta[r % 2] += gradient.x * out.x + gradient.y * out.y;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + 8 * half + lane / 4;
    delta[half] = quad_sum(delta[half]);
    lse2[half] = 0.0f;
    if (row < block.valid) {
      lse2[half] = load_global(a.lse + row0 + row) * kLog2E;
      if (lane % 4 == 0) store_global(a.delta + row0 + row, delta[half]);
    }
    delta[half] *= a.dscore_scale;
  }
  __syncthreads();  // out has been read: its stage takes the second tile

  const float to_log2 = a.scale * kLog2E;
  float dq[1][D / 8][4] = {};
  int stage = 0;
  for (int64_t first = 0; first < a.key_tokens; first += kPassed, stage ^= 1) {
    if (first + kPassed < a.key_tokens) copy(stage ^ 1, first + kPassed);
    if (busy) {
      const T* const keys = stages + stage * Tile::kStage;
      const int valid = valid_rows(a.key_tokens, first, kPassed);
      float score[1][kPassed / 8][4], dp[1][kPassed / 8][4];
      multiply_rows<1, kPassed>(score, q, keys);
      multiply_rows<1, kPassed>(dp, g, keys + kPassed * kPitch<D>);
#pragma unroll
      for (int j = 0; j < kPassed / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float p = ptx::exp2(score[0][j][e] * to_log2 - lse2[e / 2]);
          score[0][j][e] = p * (dp[0][j][e] * a.dscore_scale - delta[e / 2]);
        }
      }
      if (kMasked || valid < kPassed) {
        const LaneKeys<kMasked, kPassed> present(a, block.batch, first, valid);
#pragma unroll
        for (int j = 0; j < kPassed / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (!present.there(j, e % 2)) score[0][j][e] = 0.0f;
          }
        }
      }
      accumulate<1, kPassed, D>(dq, score, keys);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // the next tile is there, and this one has been read
  }
  if (!busy) return;
  const float factor = a.scale / a.dscore_scale;
  store_rows<1, D>(a.dq, a.dq.at(block.batch, block.head, block.first + warp_row),
                   block.valid - warp_row, owned + warp_row * kPitch<D>, dq, {{factor, factor}});
}

// ---- key_value_gradient --------------------------------------------------------------------------
// dv = Pᵀ g,  dk = scale dSᵀ q, summed over the query heads that read this head. Scores are formed
// transposed, keys by queries, so that Pᵀ and dSᵀ are operands where they are.

template <int D, typename T>
__global__ void __launch_bounds__(kBlockThreads) key_value_gradient_kernel(Backward<T> a) {
  using Tile = BackwardTile<D>;
  constexpr int kPassed = Tile::kPassed;
  constexpr float kShift = std::is_same_v<T, __half> ? 15.0f : 0.0f;  // P is carried times 2^kShift
  T* const owned = reinterpret_cast<T*>(shared_memory());
  T* const stages = owned + 2 * Tile::kOwnedTile;
  float* const statistics = reinterpret_cast<float*>(stages + 2 * Tile::kStage);
  const RowBlock block(a.heads / a.group, a.key_tokens, Tile::kOwned);
  const int lane = lane_index(), warp_row = 16 * warp_index();
  const bool busy = warp_row < block.valid;
  const float dscore_factor = a.dscore_scale * exp2f(-kShift);

  // Query tiles come head after head. A thread's `statistic` is one row's lse, or delta.
  int64_t tiles = a.group * ((a.query_tokens + kPassed - 1) / kPassed);
  int64_t head = block.head * a.group, first = 0;
  float statistic = 0.0f;
  auto copy_next = [&](int stage) {
    T* const tile = stages + stage * Tile::kStage;
    const int valid = valid_rows(a.query_tokens, first, kPassed);
    copy_rows<kPassed, D>(tile, a.q, a.q.at(block.batch, head, first), valid);
    copy_rows<kPassed, D>(tile + kPassed * kPitch<D>, a.dout, a.dout.at(block.batch, head, first),
                          valid);
    ptx::cp_async_commit();
    const int row = threadIdx.x % kPassed;
    const int64_t at = (block.batch * a.heads + head) * a.query_tokens + first + row;
    statistic = 0.0f;  // past the end, where q and g are 0 too and so add nothing
    if (threadIdx.x < 2 * kPassed && row < valid) {
      statistic = threadIdx.x < kPassed ? load_global(a.lse + at) * kLog2E - kShift
                                        : load_global(a.delta + at) * dscore_factor;
    }
    first += kPassed;
    if (first >= a.query_tokens) {
      first = 0;
      ++head;
    }
  };
  auto put_statistic = [&](int stage) {
    if (threadIdx.x < 2 * kPassed) statistics[2 * kPassed * stage + threadIdx.x] = statistic;
  };
  auto copy_owned = [&](T* tile, const Rows<const T>& x) {
    copy_rows<Tile::kOwned, D>(tile, x, x.at(block.batch, block.head, block.first), block.valid);
  };

  copy_owned(owned, a.k);
  copy_owned(owned + Tile::kOwnedTile, a.v);
  ptx::cp_async_commit();
  if (tiles > 0) {
    copy_next(0);
    put_statistic(0);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  const Operand<1, D, Tile::kHeld, T> k(owned + warp_row * kPitch<D>);
  const Operand<1, D, Tile::kHeld, T> v(owned + Tile::kOwnedTile + warp_row * kPitch<D>);

  const float to_log2 = a.scale * kLog2E;
  float dk[1][D / 8][4] = {}, dv[1][D / 8][4] = {};
  int stage = 0;
  for (; tiles > 0; --tiles, stage ^= 1) {
    if (tiles > 1) copy_next(stage ^ 1);
    if (busy) {
      const T* const queries = stages + stage * Tile::kStage;
      const T* const gradients = queries + kPassed * kPitch<D>;
      const float* const lse2 = statistics + 2 * kPassed * stage + 2 * (lane % 4);
      const float* const delta = lse2 + kPassed;
      float p[1][kPassed / 8][4], dp[1][kPassed / 8][4];
      multiply_rows<1, kPassed>(p, k, queries);
#pragma unroll
      for (int j = 0; j < kPassed / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          p[0][j][e] = ptx::exp2(p[0][j][e] * to_log2 - lse2[8 * j + e % 2]);
        }
      }
      accumulate<1, kPassed, D>(dv, p, gradients);
      multiply_rows<1, kPassed>(dp, v, gradients);
#pragma unroll
      for (int j = 0; j < kPassed / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          dp[0][j][e] = p[0][j][e] * (dp[0][j][e] * dscore_factor - delta[8 * j + e % 2]);
        }
      }
      accumulate<1, kPassed, D>(dk, dp, queries);
    }
    if (tiles > 1) put_statistic(stage ^ 1);
    ptx::cp_async_wait<0>();
    __syncthreads();  // the next tile is there, and this one has been read
  }
  if (!busy) return;
  const float dk_factor = a.scale / a.dscore_scale, dv_factor = exp2f(-kShift);
  store_rows<1, D>(a.dk, a.dk.at(block.batch, block.head, block.first + warp_row),
                   block.valid - warp_row, owned + warp_row * kPitch<D>, dk,
                   {{dk_factor, dk_factor}});
  store_rows<1, D>(a.dv, a.dv.at(block.batch, block.head, block.first + warp_row),
                   block.valid - warp_row, owned + Tile::kOwnedTile + warp_row * kPitch<D>, dv,
                   {{dv_factor, dv_factor}});
}

}  // namespace half_precision
