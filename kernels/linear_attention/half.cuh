// Linear attention in half precision, on tensor cores: what a block of eight warps does with one
// key/value head and its state. cuda.cu makes kernels of these pieces.
//
// Tiles of tokens come to shared memory by asynchronous copies, as they are, and go to the tensor
// cores from there; phi is formed in registers, from operands already loaded (a relu of a packed pair,
// exact). Every product accumulates in float32. What meets the tensor cores rounded:
//
//   S' = S - z m^T   once, with m_d = sum_f S_fd / sum_f z_f: outputs and gradients are differences of
//                    weighted means of v, and S, rounded as it is, would lose them where v has a mean.
//                    By m both are exact again:
//                      out = (phi(q) S' + m (phi(q) . z)) / E
//                      dphi(q) = S' g / E - c z,   c = (phi(q) . S' g - eps (m . g)) / E^2
//   g / E            not: a high and a low term, two products. With dS rounded too, once would make three
//                    roundings on the way to dk and dv, their own included, and an error 1.7 times what a
//                    float32 composition has. By c, the same for every key, the key's gradient is centred:
//                      dS = sum phi(q) (g / E)^T,  dz' = - sum phi(q) c = dz + dS m
//   dS               once, as it is:   dphi(k) = dS v + (dz' - dS m)   with m against the rounded dS
//                    Of a dS and dz from elsewhere (linear_attention_state_backward), m is the mean of a
//                    block's first values, and dz' = dz + dS m with the exact dS.
//
// A high and a low term of S and dS, instead, would cost twice in every product that has them: at D = 64
// 96 FLOP a byte of least traffic forward and 146 backward, and here it is 64 and 91, where a byte takes
// as long as about 110 FLOP of mma.sync. z, phi(q) . z, E, m . g and c are float32 (c and z enter the
// sums over tokens as three half-precision terms, which hold all of it; z's are ones).
//
// float16 has little range: powers of two, taken in float32 and given back there, bring the largest
// S' (dS) to 2^13 and every row's g / E to g's size (phi(q) takes the row's other factor).
#pragma once

#include "../cuda/common.cuh"
#include "../cuda/ptx.cuh"
#include "features.cuh"
#include "tiles.h"

namespace {

// ---- sizes -----------------------------------------------------------------------------------------

template <int D>
struct Half {
  static constexpr HalfTile kTile = tile_of(kHalfTiles, D);
  static constexpr int kTokens = kTile.tokens, kChunks = D / 8;  // chunks of 16 bytes in a row

  // Sums over tokens: a warp owns kM x 16 features (twice, for both halves of phi), kN x 8 columns.
  static constexpr int kFeatureWarps = kTile.feature_warps, kColumnWarps = kTile.column_warps;
  static constexpr int kTokenWarps = 8 / (kFeatureWarps * kColumnWarps);
  static constexpr int kM = D / 16 / kFeatureWarps, kN = D / 8 / kColumnWarps;

  // Products of rows with the state: a warp owns 16 rows, and kBlocks x 16 features or columns.
  static constexpr int kRowWarps = kTokens / 16, kGroups = 8 / kRowWarps;
  static constexpr int kBlocks = D / 16 / kGroups;

  // Rows of a shared tile: 16-byte chunks change places, or rows are padded, so that eight rows' equal
  // chunks, which a matrix load wants at once, lie in different banks.
  static constexpr bool kSwizzled = D % 64 == 0;
  static constexpr int kPitch = kSwizzled ? D : D + 8;

  static_assert(kTokens % (16 * kTokenWarps) == 0 && 8 % kRowWarps == 0);
  static_assert(kM * 16 * kFeatureWarps == D && kN * 8 * kColumnWarps == D);
  static_assert(kBlocks * 16 * kGroups == D);

  __device__ static int at(int row, int chunk) {
    return row * kPitch + (kSwizzled ? chunk ^ (row & 7) : chunk) * 8;
  }
};

template <typename T, int D>
struct TokenTile {
  alignas(16) T rows[Half<D>::kTokens * Half<D>::kPitch];
};

// The state as a tensor-core operand, and what goes with it in float32.
template <typename T, int D>
struct StateTile {
  using H = Half<D>;
  alignas(16) T rows[2 * D * H::kPitch];  // S' or dS, times 1 / unscale
  float z[2 * D];                         // z, or the bias of dphi(k)
  float mean[D];                          // m
  float partial[2][H::kGroups][H::kTokens];
  float over_E[H::kTokens];  // 1 / E
  alignas(16) T weight[3][H::kTokens];  // a row's -c, in three terms
  alignas(16) T row_scale[H::kTokens];  // float16: what phi(q) is multiplied by
  float scratch[8];
  float unscale;       // of the product with rows
  float dS_scale;      // float16: a power of two near z, for g / E
  float weight_scale;  // float16: another, for c
};

__device__ inline int lane_group() { return threadIdx.x % 32 / 4; }
__device__ inline int lane_pair() { return threadIdx.x % 4 * 2; }
__device__ inline int warp_index() { return threadIdx.x / 32; }

// A float16 beyond the largest is the largest, and not infinity; NaN stays NaN.
template <typename T>
__device__ float finite(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
  } else {
    return x;
  }
}

// A power of two no greater than x, of the same binade.
__device__ inline float power_of_two(float x) {
  const float inside = fminf(fmaxf(x, 1e-30f), 1e30f);
  return __uint_as_float(__float_as_uint(inside) & 0x7f800000u);
}

// inverse(), by a reciprocal within 1 ulp: to round it right takes ten instructions more.
__device__ inline float quick_inverse(float met, float eps) {
  return met == 0.0f || fabsf(met + eps) < FLT_MIN ? 0.0f : ptx::reciprocal(met + eps);
}

// ---- sums over lanes and warps ---------------------------------------------------------------------

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

// Over all threads, in a fixed order; begins with a barrier and ends with every thread's read.
template <typename Combine>
__device__ float over_block(float x, float (&scratch)[8], Combine combine) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x = combine(x, __shfl_xor_sync(kFullWarp, x, lane));
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[warp_index()] = x;
  __syncthreads();
  float total = scratch[0];
#pragma unroll
  for (int warp = 1; warp < 8; ++warp) total = combine(total, scratch[warp]);
  return total;
}

__device__ inline float sum_over_block(float x, float (&scratch)[8]) {
  return over_block(x, scratch, [](float a, float b) { return a + b; });
}

// Drops NaN, which finds its way through the values themselves.
__device__ inline float max_over_block(float x, float (&scratch)[8]) {
  return over_block(x, scratch, [](float a, float b) { return fmaxf(a, b); });
}

// ---- tiles of tokens -------------------------------------------------------------------------------

// Begins to copy `valid` rows to a tile; the others are 0. Narrow rows are copied at once. Every thread
// has as many chunks, so that the loop is none in the machine code.
template <typename T, int D>
__device__ void copy_tile(TokenTile<T, D>& tile, const T* source, int64_t stride, int valid,
                          bool wide) {
  using H = Half<D>;
  constexpr int kEach = H::kTokens * H::kChunks / kThreads;
  static_assert(kEach * kThreads == H::kTokens * H::kChunks);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int own = threadIdx.x + i * kThreads, row = own / H::kChunks, chunk = own % H::kChunks;
    T* const target = tile.rows + H::at(row, chunk);
    const T* const from = source + (row < valid ? row * stride + chunk * 8 : 0);
    if (wide) {
      ptx::cp_async_16(target, from, row < valid ? 16 : 0);
    } else {
      Vector<T, 8> values = {};
      if (row < valid) {
#pragma unroll
        for (int e = 0; e < 8; ++e) values.value[e] = load_global(from + e);
      }
      *reinterpret_cast<Vector<T, 8>*>(target) = values;
    }
  }
}

// Tiles begin ... end of a sequence, kStages of them in shared memory at once. load(stage) begins to copy
// the next one, process(stage) finds the next one there; both are called in the order of the tiles.
template <int kStages, typename Load>
struct Stream {
  Load load;
  int begin, end;

  __device__ void start() const {
#pragma unroll
    for (int ahead = 0; ahead < kStages - 1; ++ahead) {
      if (begin + ahead < end) load(ahead);
      ptx::cp_async_commit();
    }
  }

  template <typename Process>
  __device__ void run(Process process) const {
    int stage = 0, last = kStages - 1;  // of this tile, and of the latest to be copied
    for (int tile = begin; tile < end; ++tile) {
      if constexpr (kStages > 1) ptx::cp_async_wait<kStages - 2>();
      __syncthreads();  // this tile is here, and the one before has been read
      if (tile + kStages - 1 < end) load(last);
      ptx::cp_async_commit();
      if constexpr (kStages == 1) {
        ptx::cp_async_wait<0>();
        __syncthreads();
      }
      process(stage);
      last = stage;
      stage = stage + 1 < kStages ? stage + 1 : 0;
    }
    ptx::cp_async_wait<0>();
  }
};

template <int kStages, typename Load>
__device__ Stream<kStages, Load> stream(int begin, int end, Load load) {
  return {load, begin, end};
}

// Goes through the tiles of the heads from first_head on, in order. A tile's place would cost a division.
struct TilePlace {
  int64_t head, first = 0;
  int valid;

  __device__ TilePlace(int tile, int64_t first_head, int64_t tokens, int tile_tokens)
      : per_head(static_cast<int>((tokens + tile_tokens - 1) / tile_tokens)),
        tile_tokens(tile_tokens),
        left(static_cast<int>(tokens - int64_t{per_head - 1} * tile_tokens)) {
    head = first_head;
    in_head = tile;
    if (per_head > 0 && tile >= per_head) head += tile / per_head, in_head = tile % per_head;
    find();
  }

  __device__ void next() {
    if (++in_head == per_head) in_head = 0, ++head;
    find();
  }

 private:
  int in_head, per_head, tile_tokens, left;  // left: tokens of a head's last tile

  __device__ void find() {
    first = static_cast<int64_t>(in_head) * tile_tokens;
    valid = in_head + 1 == per_head ? left : tile_tokens;
  }
};

// ---- operands from shared memory -------------------------------------------------------------------
// Sixteen rows and sixteen columns (block `block`) of a tile, as an a operand ...

template <int D, typename T>
__device__ void load_rows(unsigned (&a)[4], const T* tile, int row, int block) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4(a, tile + Half<D>::at(row + lane % 16, 2 * block + lane / 16));
}

// ... transposed: a's rows are the tile's columns ...
template <int D, typename T>
__device__ void load_columns(unsigned (&a)[4], const T* tile, int row, int block) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4_trans(
      a, tile + Half<D>::at(row + lane / 16 * 8 + lane % 8, 2 * block + lane / 8 % 2));
}

// ... as two b operands side by side: b's rows are the tile's rows ...
template <int D, typename T>
__device__ void load_b_rows(unsigned (&b)[4], const T* tile, int row, int block) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4_trans(b, tile + Half<D>::at(row + lane % 16, 2 * block + lane / 16));
}

// ... or the tile's columns.
template <int D, typename T>
__device__ void load_b_columns(unsigned (&b)[4], const T* tile, int row, int block) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4(b, tile + Half<D>::at(row + lane / 16 * 8 + lane % 8, 2 * block + lane / 8 % 2));
}

template <typename T>
__device__ void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned* b) {
  const unsigned pair[2] = {b[0], b[1]};
  ptx::mma_16816<T>(d, a, pair);
}

template <typename T>
__device__ void positive_and_negative(unsigned (&positive)[4], unsigned (&negative)[4],
                                      const unsigned (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    positive[i] = ptx::relu2<T>(x[i]);
    negative[i] = ptx::relu2<T>(ptx::negate2(x[i]));
  }
}

// Two of a 16 x 16 block's 8-column products, as four packed registers, to global memory: 16 bytes
// a lane, after the four lanes of a row have exchanged what they hold.
template <typename T>
__device__ void store_block(T* target, int64_t stride, int valid, bool wide,
                            const float (&left)[4], const float (&right)[4]) {
  unsigned r[4] = {ptx::pack2<T>(left[0], left[1]), ptx::pack2<T>(left[2], left[3]),
                   ptx::pack2<T>(right[0], right[1]), ptx::pack2<T>(right[2], right[3])};
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {  // transposes four registers of four lanes
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const unsigned received = __shfl_xor_sync(kFullWarp, upper ? r[i] : r[i + bit], bit);
      r[i] = upper ? received : r[i];
      r[i + bit] = upper ? r[i + bit] : received;
    }
  }
  const int which = threadIdx.x % 4, row = lane_group() + 8 * (which % 2);
  if (row >= valid) return;
  T* const to = target + row * stride + 8 * (which / 2);
  if (wide) {
    store_global(reinterpret_cast<uint4*>(to), make_uint4(r[0], r[1], r[2], r[3]));
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float2 both = ptx::unpack2<T>(r[e / 2]);
      store_global(to + e, from_float<T>(e % 2 ? both.y : both.x));
    }
  }
}

// ---- sums over tokens: S and z of keys and values, dS and dz of queries and gradients ----------------

template <int D>
struct Sums {
  using H = Half<D>;
  float S[2][H::kM][H::kN][4];
  float z[2][H::kM][4];  // columns to be added up; in the first column's warps

  static __device__ int feature_warp() { return warp_index() % H::kFeatureWarps; }
  static __device__ int column_warp() {
    return warp_index() / H::kFeatureWarps % H::kColumnWarps;
  }
  static __device__ int token_warp() {
    return warp_index() / (H::kFeatureWarps * H::kColumnWarps);
  }
  // Of the element i of S[half][m][n]; row 0 to 2 D - 1.
  static __device__ int row(int half, int m, int i) {
    return half * D + (feature_warp() * H::kM + m) * 16 + lane_group() + i / 2 * 8;
  }
  static __device__ int column(int n, int i) {
    return (column_warp() * H::kN + n) * 8 + lane_pair() + i % 2;
  }

  __device__ void clear() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int m = 0; m < H::kM; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          z[half][m][i] = 0.0f;
#pragma unroll
          for (int n = 0; n < H::kN; ++n) S[half][m][n][i] = 0.0f;
        }
      }
    }
  }

  __device__ void add(const Sums& other) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int m = 0; m < H::kM; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          z[half][m][i] += other.z[half][m][i];
#pragma unroll
          for (int n = 0; n < H::kN; ++n) S[half][m][n][i] += other.S[half][m][n][i];
        }
      }
    }
  }

  // The tokens of a tile that a warp takes, sixteen at a time.
  static constexpr int kSteps = H::kTokens / (16 * H::kTokenWarps);
  static __device__ int first_token(int step) {
    return (step * H::kTokenWarps + token_warp()) * 16;
  }

  // S += phi(x)^T w for sixteen tokens; x's operands are a. With kWeighted, z += phi(x)^T of_z too.
  template <bool kWeighted, typename T>
  __device__ void add(const unsigned (&a)[H::kM][4], const TokenTile<T, D>& w, int token,
                      const unsigned (&of_z)[2]) {
    const int lane = threadIdx.x % 32, first_chunk = column_warp() * H::kN;
    unsigned b[H::kN + H::kN % 2][2];
#pragma unroll
    for (int n = 0; n + 1 < H::kN; n += 2) {
      unsigned both[4];
      ptx::ldmatrix_x4_trans(both, w.rows + H::at(token + lane % 16, first_chunk + n + lane / 16));
      b[n][0] = both[0], b[n][1] = both[1], b[n + 1][0] = both[2], b[n + 1][1] = both[3];
    }
    if constexpr (H::kN % 2 == 1) {
      constexpr int n = H::kN - 1;
      ptx::ldmatrix_x2_trans(b[n], w.rows + H::at(token + lane % 16, first_chunk + n));
    }
#pragma unroll
    for (int m = 0; m < H::kM; ++m) {
      unsigned phi[2][4];
      positive_and_negative<T>(phi[0], phi[1], a[m]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < H::kN; ++n) multiply<T>(S[half][m][n], phi[half], b[n]);
        if (kWeighted && column_warp() == 0) multiply<T>(z[half][m], phi[half], of_z);
      }
    }
  }

  template <typename T>
  static __device__ void load(unsigned (&a)[H::kM][4], const TokenTile<T, D>& x, int token) {
#pragma unroll
    for (int m = 0; m < H::kM; ++m) {
      load_columns<D>(a[m], x.rows, token, feature_warp() * H::kM + m);
    }
  }

  // S and z of a tile of keys and values.
  template <typename T>
  __device__ void add_keys(const TokenTile<T, D>& k, const TokenTile<T, D>& v) {
    const unsigned one = lane_group() == 0 ? ptx::pack2<T>(1.0f, 1.0f) : 0u;
    const unsigned ones[2] = {one, one};
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      unsigned a[H::kM][4];
      load(a, k, first_token(step));
      add<true>(a, v, first_token(step), ones);
    }
  }

  // dS and dz' of a tile of queries, whose operands `q` were loaded before g / E took the tile's place.
  template <typename T>
  __device__ void add_queries(unsigned (&q)[kSteps][H::kM][4], const TokenTile<T, D>& high,
                              const TokenTile<T, D>& low, const StateTile<T, D>& state) {
    auto two_of = [](const T* x) { return *reinterpret_cast<const unsigned*>(x); };
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int token = first_token(step), pair = token + lane_pair();
      if constexpr (std::is_same_v<T, __half>) {
        const unsigned scale[2] = {two_of(state.row_scale + pair),
                                   two_of(state.row_scale + pair + 8)};
#pragma unroll
        for (int m = 0; m < H::kM; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            q[step][m][i] = ptx::multiply_half2(q[step][m][i], scale[i / 2]);
          }
        }
      }
      const int term = lane_group() < 3 ? lane_group() : 0;
      const unsigned weights[2] = {two_of(state.weight[term] + pair),
                                   two_of(state.weight[term] + pair + 8)};
      const unsigned of_z[2] = {lane_group() < 3 ? weights[0] : 0u,
                                lane_group() < 3 ? weights[1] : 0u};
      add<true>(q[step], high, token, of_z);
      add<false>(q[step], low, token, of_z);
    }
  }

  // Adds up the warps that shared the tokens, in order, into the first of them, and z's columns, in
  // every lane of four. Needs two tiles' memory to itself, and ends with all of it read.
  __device__ void combine(float* scratch) {
    constexpr int kPerThread = sizeof(Sums) / sizeof(float), kOwners = kThreads / H::kTokenWarps;
    constexpr int kRoom = 2 * H::kTokens * H::kPitch * 2 / sizeof(float) / kOwners;
    auto* const own = reinterpret_cast<float*>(this);
    const int owner = threadIdx.x % kOwners;
#pragma unroll 1
    for (int warp = 1; warp < H::kTokenWarps; ++warp) {
#pragma unroll
      for (int first = 0; first < kPerThread; first += kRoom) {
        __syncthreads();
        if (token_warp() == warp) {
#pragma unroll
          for (int i = 0; i < kRoom; ++i) {
            if (first + i < kPerThread) scratch[i * kOwners + owner] = own[first + i];
          }
        }
        __syncthreads();
        if (token_warp() == 0) {
#pragma unroll
          for (int i = 0; i < kRoom; ++i) {
            if (first + i < kPerThread) own[first + i] += scratch[i * kOwners + owner];
          }
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int m = 0; m < H::kM; ++m) {
        float(&d)[4] = z[half][m];
        d[0] = quad_sum(d[0] + d[1]);
        d[2] = quad_sum(d[2] + d[3]);
      }
    }
    __syncthreads();
  }

  // Times two powers of two.
  __device__ void rescale(float of_S, float of_z) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int m = 0; m < H::kM; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          z[half][m][i] *= of_z;
#pragma unroll
          for (int n = 0; n < H::kN; ++n) S[half][m][n][i] *= of_S;
        }
      }
    }
  }

  // body(half, m) by the warps that hold the result.
  template <typename Body>
  __device__ void for_features(Body body) const {
    if (token_warp() != 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int m = 0; m < H::kM; ++m) body(half, m);
    }
  }

  // After combine: to global memory. A lane has two columns of two rows, and its neighbour the next two:
  // they exchange, so that each stores four of one row.
  __device__ void store(float* S_out, float* z_out) const {
    const bool odd = threadIdx.x % 2 == 1;
    for_features([&](int half, int m) {
#pragma unroll
      for (int n = 0; n < H::kN; ++n) {
        const float(&d)[4] = S[half][m][n];
        const float x = __shfl_xor_sync(kFullWarp, odd ? d[0] : d[2], 1);
        const float y = __shfl_xor_sync(kFullWarp, odd ? d[1] : d[3], 1);
        float* const to = S_out + row(half, m, odd ? 2 : 0) * D + column(n, 0) - (odd ? 2 : 0);
        store_global(reinterpret_cast<float4*>(to), odd ? make_float4(x, y, d[2], d[3])
                                                        : make_float4(d[0], d[1], x, y));
      }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        if (column_warp() == 0 && lane_pair() == 0) {
          store_global(z_out + row(half, m, i), z[half][m][i]);
        }
      }
    });
  }
};

// ---- the state as an operand -----------------------------------------------------------------------

template <typename T, int D>
struct State : StateTile<T, D> {
  using H = Half<D>;
  // S in global memory is read four columns a thread, kRows rows at a time.
  static constexpr int kQuads = D / 4, kRows = kThreads / kQuads;
  static constexpr int kPerThread = (2 * D + kRows - 1) / kRows;

  __device__ static int own_column() { return threadIdx.x % kQuads * 4; }
  __device__ static int own_row(int i) {
    return threadIdx.x / kQuads < kRows ? threadIdx.x / kQuads + i * kRows : 2 * D;
  }

  __device__ static void read(float4 (&value)[kPerThread], const float* S) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int row = own_row(i);
      value[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (row < 2 * D) {
        value[i] = load_global(reinterpret_cast<const float4*>(S + row * D + own_column()));
      }
    }
  }

  __device__ static float largest(const float4& x) {
    return fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
  }

  // What brings the largest element to 2^13; the operand's unscale, and its largest element.
  __device__ float choose_scale(float largest_own) {
    if constexpr (!std::is_same_v<T, __half>) {
      if (threadIdx.x == 0) this->unscale = 1.0f;
      return 1.0f;
    } else {
      const float most = max_over_block(largest_own, this->scratch);
      const float binade = most > 0.0f ? power_of_two(most) : 1.0f;
      if (threadIdx.x == 0) {
        this->unscale = binade / 8192.0f;
        this->weight_scale = binade;  // over z: see choose_gradient_scales
      }
      return 8192.0f / binade;
    }
  }

  // For c and g / E: powers of two near 1 / (m - out) and z. `z_total` is z's sum.
  __device__ void choose_gradient_scales(float z_total) {
    if (threadIdx.x != 0) return;
    const bool half = std::is_same_v<T, __half> && z_total > 0.0f;
    this->dS_scale = half ? power_of_two(z_total / D) : 1.0f;
    this->weight_scale = half ? power_of_two(this->dS_scale / this->weight_scale) : 1.0f;
  }

  __device__ void write(const float4 (&value)[kPerThread], float scale) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int row = own_row(i), column = own_column();
      if (row >= 2 * D) continue;
      const Vector<unsigned, 2> packed = {
          {ptx::pack2<T>(value[i].x * scale, value[i].y * scale),
           ptx::pack2<T>(value[i].z * scale, value[i].w * scale)}};
      *reinterpret_cast<Vector<unsigned, 2>*>(this->rows + H::at(row, column / 8) + column % 8) =
          packed;
    }
  }

  // S' and what goes with it, from S and z in global memory. Needs a tile's memory to itself; what it
  // leaves is seen after a barrier.
  __device__ void load_centred(const float* S, const float* z_in, float* scratch) {
    static_assert(sizeof(TokenTile<T, D>) >= kRows * D * sizeof(float));
    float4 value[kPerThread];
    read(value, S);
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      sum.x += value[i].x, sum.y += value[i].y, sum.z += value[i].z, sum.w += value[i].w;
    }
    if (threadIdx.x / kQuads < kRows) {
      *reinterpret_cast<float4*>(scratch + threadIdx.x / kQuads * D + own_column()) = sum;
    }
    const float own_z = threadIdx.x < 2 * D ? load_global(z_in + threadIdx.x) : 0.0f;
    if (threadIdx.x < 2 * D) this->z[threadIdx.x] = own_z;
    const float z_total = sum_over_block(own_z, this->scratch);  // a barrier for scratch, too
    if (threadIdx.x < D) {
      float column_sum = 0.0f;
      for (int row = 0; row < kRows; ++row) column_sum += scratch[row * D + threadIdx.x];
      this->mean[threadIdx.x] = z_total != 0.0f ? column_sum / z_total : 0.0f;
    }
    __syncthreads();
    const float4 m = *reinterpret_cast<const float4*>(this->mean + own_column());
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const float z_row = this->z[own_row(i) < 2 * D ? own_row(i) : 0];
      if (own_row(i) >= 2 * D) continue;
      value[i].x -= z_row * m.x, value[i].y -= z_row * m.y;
      value[i].z -= z_row * m.z, value[i].w -= z_row * m.w;
      most = fmaxf(most, largest(value[i]));
    }
    write(value, choose_scale(most));
    choose_gradient_scales(z_total);
  }

  // The mean of a tile's columns, a NaN aside, which has no say in other rows' gradients.
  __device__ void take_mean(const TokenTile<T, D>& tile, int valid) {
    if (threadIdx.x >= D) return;
    float sum = 0.0f;
    for (int row = 0; row < valid; ++row) {
      const float x = to_float(tile.rows[H::at(row, threadIdx.x / 8) + threadIdx.x % 8]);
      sum += x == x ? x : 0.0f;
    }
    this->mean[threadIdx.x] = valid > 0 ? sum / valid : 0.0f;
  }

  // dS as it is, and the bias of dphi(k): of dz', with m in global memory; or, without, of dz, with the
  // m of take_mean.
  __device__ void load_gradient(const float* dS, const float* dz, const float* m) {
    float4 value[kPerThread];
    read(value, dS);
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) most = fmaxf(most, largest(value[i]));
    write(value, choose_scale(most));
    if (m && threadIdx.x < D) this->mean[threadIdx.x] = load_global(m + threadIdx.x);
    if (threadIdx.x < 2 * D) this->z[threadIdx.x] = load_global(dz + threadIdx.x);
    subtract_mean(m ? nullptr : dS);
  }

  // z -= dS m, with dS as it was rounded; or only by how much that is off the exact dS.
  __device__ void subtract_mean(const float* exact = nullptr) {
    __syncthreads();
    if (threadIdx.x < 2 * D) {
      float sum = 0.0f;
#pragma unroll 4
      for (int chunk = 0; chunk < H::kChunks; ++chunk) {
        const auto values =
            *reinterpret_cast<const Vector<T, 8>*>(this->rows + H::at(threadIdx.x, chunk));
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          float x = to_float(values.value[e]) * this->unscale;
          if (exact) x -= load_global(exact + threadIdx.x * D + chunk * 8 + e);
          sum += x * this->mean[chunk * 8 + e];
        }
      }
      this->z[threadIdx.x] -= sum;
    }
  }

  // The same two from a block's own sums. Needs kFeatureWarps x D floats of a tile's memory.
  __device__ void take_centred(Sums<D>& sums, float* scratch) {
    if (sums.column_warp() == 0 && lane_pair() == 0) take_z(sums);
    if (sums.token_warp() == 0) {
#pragma unroll
      for (int n = 0; n < H::kN; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float sum = 0.0f;
          sums.for_features([&](int half, int m) {
            sum += sums.S[half][m][n][i] + sums.S[half][m][n][i + 2];
          });
#pragma unroll
          for (int lane = 4; lane < 32; lane *= 2) sum += __shfl_xor_sync(kFullWarp, sum, lane);
          if (lane_group() == 0) scratch[sums.feature_warp() * D + sums.column(n, i)] = sum;
        }
      }
    }
    __syncthreads();
    const float z_total =
        sum_over_block(threadIdx.x < 2 * D ? this->z[threadIdx.x] : 0.0f, this->scratch);
    if (threadIdx.x < D) {
      float column_sum = 0.0f;
      for (int warp = 0; warp < H::kFeatureWarps; ++warp) {
        column_sum += scratch[warp * D + threadIdx.x];
      }
      this->mean[threadIdx.x] = z_total != 0.0f ? column_sum / z_total : 0.0f;
    }
    __syncthreads();
    sums.for_features([&](int half, int m) {
#pragma unroll
      for (int n = 0; n < H::kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums.S[half][m][n][i] -=
              this->z[sums.row(half, m, i)] * this->mean[sums.column(n, i)];
        }
      }
    });
    take_S(sums);
    choose_gradient_scales(z_total);
  }

  __device__ void take_gradient(const Sums<D>& sums) {
    if (sums.column_warp() == 0 && lane_pair() == 0) take_z(sums);
    take_S(sums);
    subtract_mean();
  }

  __device__ void take_z(const Sums<D>& sums) {
    sums.for_features([&](int half, int m) {
      this->z[sums.row(half, m, 0)] = sums.z[half][m][0];
      this->z[sums.row(half, m, 2)] = sums.z[half][m][2];
    });
  }

  __device__ void take_S(const Sums<D>& sums) {
    float most = 0.0f;
    sums.for_features([&](int half, int m) {
#pragma unroll
      for (int n = 0; n < H::kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) most = fmaxf(most, fabsf(sums.S[half][m][n][i]));
      }
    });
    const float scale = choose_scale(most);
    sums.for_features([&](int half, int m) {
#pragma unroll
      for (int n = 0; n < H::kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const float(&d)[4] = sums.S[half][m][n];
          T* const to = this->rows + H::at(sums.row(half, m, i), sums.column(n, 0) / 8);
          *reinterpret_cast<unsigned*>(to + lane_pair()) =
              ptx::pack2<T>(d[i] * scale, d[i + 1] * scale);
        }
      }
    });
  }
};

// ---- products of a tile's rows with the state --------------------------------------------------------
// A warp owns sixteen rows (its lanes' rows are lane_group() and that + 8) and a group of features or
// columns.

template <int D>
__device__ inline int own_rows() {
  return warp_index() % Half<D>::kRowWarps * 16;
}
template <int D>
__device__ inline int own_group() {
  return warp_index() / Half<D>::kRowWarps;
}

// product += rows (their columns of block `step` are a) times both halves of the state's block `block` of
// features, transposed: a = S' g.
template <typename T, int D>
__device__ void multiply_state_columns(float (&product)[2][2][4], const State<T, D>& state,
                                       const unsigned (&a)[4], int step, int block) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    unsigned b[4];
    load_b_columns<D>(b, state.rows, half * D + block * 16, step);
    multiply<T>(product[half][0], a, b);
    multiply<T>(product[half][1], a, b + 2);
  }
}

// product += phi(x) S' for sixteen features (block `step`) of x.
template <typename T, int D>
__device__ void multiply_state_rows(float (&product)[2 * Half<D>::kBlocks][4],
                                    const State<T, D>& state, const unsigned (&x)[4], int step) {
  using H = Half<D>;
  unsigned phi[2][4];
  positive_and_negative<T>(phi[0], phi[1], x);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int block = 0; block < H::kBlocks; ++block) {
      unsigned b[4];
      load_b_rows<D>(b, state.rows, half * D + step * 16, own_group<D>() * H::kBlocks + block);
      multiply<T>(product[2 * block], phi[half], b);
      multiply<T>(product[2 * block + 1], phi[half], b + 2);
    }
  }
}

__device__ inline float2 two(const float* x) {
  return *reinterpret_cast<const float2*>(x);
}

// Of z's halves the one of x's sign; they are kFeatures apart.
template <int kFeatures>
__device__ inline float2 by_sign(float2 x, const float* z) {
  const float2 positive = two(z), negative = two(z + kFeatures);
  return make_float2(x.x > 0.0f ? positive.x : negative.x, x.y > 0.0f ? positive.y : negative.y);
}

// sum += |x| z; NaN stays NaN.
__device__ inline void weigh(float& sum, float2 x, float2 z) {
  sum += fabsf(x.x) * z.x;
  sum += fabsf(x.y) * z.y;
}

// out of a tile of queries.
template <typename T, int D>
__device__ void apply_tile(const State<T, D>& state, const TokenTile<T, D>& q, float eps, T* out,
                           int64_t stride, int valid, bool wide) {
  using H = Half<D>;
  float product[2 * H::kBlocks][4] = {}, dot[2] = {};
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    unsigned x[4];
    load_rows<D>(x, q.rows, own_rows<D>(), step);
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // row lane_group() + 8 (i % 2), columns + 8 (i / 2)
      const float* const z = state.z + step * 16 + i / 2 * 8 + lane_pair();
      const float2 q_pair = ptx::unpack2<T>(x[i]);
      weigh(dot[i % 2], q_pair, by_sign<D>(q_pair, z));
    }
    multiply_state_rows(product, state, x, step);
  }
  float inverse_E[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    dot[r] = quad_sum(dot[r]);
    inverse_E[r] = quick_inverse(dot[r], eps);
  }
#pragma unroll
  for (int n = 0; n < 2 * H::kBlocks; ++n) {
    const int column = own_group<D>() * H::kBlocks * 16 + n * 8 + lane_pair();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      product[n][i] =
          (product[n][i] * state.unscale + dot[i / 2] * state.mean[column + i % 2]) *
          inverse_E[i / 2];
    }
  }
#pragma unroll
  for (int block = 0; block < H::kBlocks; ++block) {
    const int column = (own_group<D>() * H::kBlocks + block) * 16;
    store_block<T>(out + own_rows<D>() * stride + column, stride, valid - own_rows<D>(), wide,
                   product[2 * block], product[2 * block + 1]);
  }
}

// dq of a tile of queries, and its part of dS and dz'.
template <typename T, int D>
__device__ void query_gradient_tile(State<T, D>& state, Sums<D>& sums, TokenTile<T, D>& q,
                                    TokenTile<T, D>& g, float eps, T* dq, int64_t stride, int valid,
                                    bool wide) {
  using H = Half<D>;
  const int group = own_group<D>(), rows = own_rows<D>();
  // Sixteen features at a time: of a's two halves a feature needs the one of q's sign, so that half of
  // the registers are free again for the next sixteen.
  float a[2 * H::kBlocks][4], a_dot[2] = {}, z_dot[2] = {}, mean_dot[2] = {};
  // What is needed again of q and z stays in registers, where there are enough.
  constexpr bool kKeep = D <= 64;
  unsigned kept_q[H::kBlocks][4];
  float2 kept_z[H::kBlocks][4];
#pragma unroll
  for (int block = 0; block < H::kBlocks; ++block) {
    float both[2][2][4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      unsigned of_g[4];
      load_rows<D>(of_g, g.rows, rows, step);
      multiply_state_columns(both, state, of_g, step, group * H::kBlocks + block);
      if (block == 0 && step % H::kGroups == group) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 x = ptx::unpack2<T>(of_g[i]);
          const float2 m = two(state.mean + step * 16 + i / 2 * 8 + lane_pair());
          mean_dot[i % 2] += x.x * m.x + x.y * m.y;
        }
      }
    }
    unsigned packed[4];
    load_rows<D>(packed, q.rows, rows, group * H::kBlocks + block);
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // row lane_group() + 8 (i % 2), columns + 8 (i / 2)
      const float2 x = ptx::unpack2<T>(packed[i]);
      float* const kept = &a[2 * block + i / 2][i % 2 * 2];
      const float* const positive = &both[0][i / 2][i % 2 * 2];
      const float* const negative = &both[1][i / 2][i % 2 * 2];
      kept[0] = x.x > 0.0f ? positive[0] : negative[0];
      kept[1] = x.y > 0.0f ? positive[1] : negative[1];
      a_dot[i % 2] += fabsf(x.x) * kept[0] + fabsf(x.y) * kept[1];
      const float* const z = state.z + (group * H::kBlocks + block) * 16 + i / 2 * 8 + lane_pair();
      const float2 of_z = by_sign<D>(x, z);
      weigh(z_dot[i % 2], x, of_z);
      if constexpr (kKeep) kept_q[block][i] = packed[i], kept_z[block][i] = of_z;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float numerator = quad_sum(a_dot[r] * state.unscale - eps * mean_dot[r]);
    const float normaliser = quad_sum(z_dot[r]);
    if (lane_pair() == 0) {
      state.partial[0][group][rows + lane_group() + 8 * r] = normaliser;
      state.partial[1][group][rows + lane_group() + 8 * r] = numerator;
    }
  }
  __syncthreads();
  auto sum_of = [&](int which, int row) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < H::kGroups; ++i) sum += state.partial[which][i][row];
    return sum;
  };

  float inverse_E[2], c[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = rows + lane_group() + 8 * r;
    inverse_E[r] = quick_inverse(sum_of(0, row), eps);
    if (group == 0 && lane_pair() == 0) state.over_E[row] = inverse_E[r];
    c[r] = sum_of(1, row) * inverse_E[r] * inverse_E[r];
    inverse_E[r] *= state.unscale;
  }
#pragma unroll
  for (int block = 0; block < H::kBlocks; ++block) {
    if constexpr (!kKeep) load_rows<D>(kept_q[block], q.rows, rows, group * H::kBlocks + block);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = ptx::unpack2<T>(kept_q[block][i]);
      const float* const z = state.z + (group * H::kBlocks + block) * 16 + i / 2 * 8 + lane_pair();
      if constexpr (!kKeep) kept_z[block][i] = by_sign<D>(x, z);
      const float2 of_z = kept_z[block][i];
      float* const d = &a[2 * block + i / 2][i % 2 * 2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float value = e ? x.y : x.x;
        const float by_phi = d[e] * inverse_E[i % 2] - (e ? of_z.y : of_z.x) * c[i % 2];
        d[e] = feature_gradient(value, by_phi, by_phi);
      }
    }
    const int column = (group * H::kBlocks + block) * 16;
    store_block<T>(dq + rows * stride + column, stride, valid - rows, wide, a[2 * block],
                   a[2 * block + 1]);
  }

  unsigned of_q[Sums<D>::kSteps][H::kM][4];
#pragma unroll
  for (int step = 0; step < Sums<D>::kSteps; ++step) {
    sums.load(of_q[step], q, sums.first_token(step));
  }
  __syncthreads();  // q and g have been read, and 1 / E is there

  // g / E: its high term takes g's place, the low one q's. A row's power of two, so that a float16
  // g / E has g's size, goes to phi(q).
  auto row_scale = [&](float over_E) {
    if (!std::is_same_v<T, __half> || over_E == 0.0f) return 1.0f;
    const float power = power_of_two(1.0f / fabsf(over_E * state.dS_scale));
    return fminf(fmaxf(power, 1.0f / 32768.0f), 16384.0f);
  };
#pragma unroll
  for (int j = 0; j < H::kTokens * H::kChunks / kThreads; ++j) {
    const int i = threadIdx.x + j * kThreads, row = i / H::kChunks;
    const float over_E = state.over_E[row];
    const float scale = over_E * state.dS_scale * row_scale(over_E);
    const int at = H::at(row, i % H::kChunks);
    auto* const chunk = reinterpret_cast<Vector<unsigned, 4>*>(g.rows + at);
    Vector<unsigned, 4> high = *chunk, low;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float2 x = ptx::unpack2<T>(high.value[e]);
      x = make_float2(finite<T>(x.x * scale), finite<T>(x.y * scale));
      high.value[e] = ptx::pack2<T>(x.x, x.y);
      const float2 rounded = ptx::unpack2<T>(high.value[e]);
      low.value[e] = ptx::pack2<T>(x.x - rounded.x, x.y - rounded.y);
    }
    *chunk = high;
    *reinterpret_cast<Vector<unsigned, 4>*>(q.rows + at) = low;
  }
  for (int row = threadIdx.x; row < H::kTokens; row += kThreads) {
    const float over_E = state.over_E[row], power = row_scale(over_E);
    float left = -sum_of(1, row) * over_E * state.weight_scale * (over_E * state.dS_scale * power);
#pragma unroll
    for (int term = 0; term < 3; ++term) {
      const T rounded = from_float<T>(finite<T>(left));
      state.weight[term][row] = rounded;
      left -= to_float(rounded);
    }
    state.row_scale[row] = from_float<T>(1.0f / power);
  }
  __syncthreads();  // g / E and the weights are there
  sums.add_queries(of_q, g, q, state);
}

// dk and dv of a tile of keys and values; `state` holds dS and the bias of dphi(k).
template <typename T, int D>
__device__ void key_value_gradient_tile(const State<T, D>& state, const TokenTile<T, D>& k,
                                        const TokenTile<T, D>& v, T* dk, int64_t dk_stride,
                                        bool dk_wide, T* dv, int64_t dv_stride, bool dv_wide,
                                        int valid) {
  using H = Half<D>;
  const int group = own_group<D>(), rows = own_rows<D>();
#pragma unroll
  for (int block = 0; block < H::kBlocks; ++block) {
    float both[2][2][4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      unsigned of_v[4];
      load_rows<D>(of_v, v.rows, rows, step);
      multiply_state_columns(both, state, of_v, step, group * H::kBlocks + block);
    }
    unsigned packed[4];
    load_rows<D>(packed, k.rows, rows, group * H::kBlocks + block);
    const int column = (group * H::kBlocks + block) * 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = ptx::unpack2<T>(packed[i]);
      const float* const bias = state.z + column + i / 2 * 8 + lane_pair();
      float* const positive = &both[0][i / 2][i % 2 * 2];
      const float* const negative = &both[1][i / 2][i % 2 * 2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        positive[e] = feature_gradient(e ? x.y : x.x, positive[e] * state.unscale + bias[e],
                                       negative[e] * state.unscale + bias[D + e]);
      }
    }
    store_block<T>(dk + rows * dk_stride + column, dk_stride, valid - rows, dk_wide, both[0][0],
                   both[0][1]);
  }
  float product[2 * H::kBlocks][4] = {};
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    unsigned x[4];
    load_rows<D>(x, k.rows, rows, step);
    multiply_state_rows(product, state, x, step);
  }
#pragma unroll
  for (int block = 0; block < H::kBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      product[2 * block][i] *= state.unscale;
      product[2 * block + 1][i] *= state.unscale;
    }
    const int column = (group * H::kBlocks + block) * 16;
    store_block<T>(dv + rows * dv_stride + column, dv_stride, valid - rows, dv_wide,
                   product[2 * block], product[2 * block + 1]);
  }
}

}  // namespace
