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
// as long as about 110 FLOP of mma.sync. z, phi(q) . z, E, m . g and c are float32. Where they meet the
// tensor cores, z in phi(q) . z for out, m in m . g, and c in the sums over tokens, they are three
// half-precision terms, which hold all of them.
//
// float16 has little range: powers of two, taken in float32 and given back there, bring the largest
// S' (dS) to 2^13 and every row's g / E to g's size (phi(q) takes the row's other factor; queries that it
// would make infinite are limited before, which most tiles need not be: limit_queries).
#pragma once

#include <cfloat>

#include "../cuda/common.cuh"
#include "../cuda/ptx.cuh"
#include "features.cuh"
#include "tiles.h"

namespace {

// ---- sizes -----------------------------------------------------------------------------------------

template <int kHeadDim, int kRows>
struct Half {
  static constexpr int D = kHeadDim, kTokens = kRows, kChunks = D / 8;  // 16 bytes of a row
  static constexpr HalfTile kTile = tile_of(kHalfTiles, D);

  // Sums over tokens: a warp owns kM x 16 features (twice, for both halves of phi), kN x 8 columns.
  static constexpr int kFeatureWarps = kTile.feature_warps, kColumnWarps = kTile.column_warps;
  static constexpr int kTokenWarps = 8 / (kFeatureWarps * kColumnWarps);
  static constexpr int kM = D / 16 / kFeatureWarps, kN = D / 8 / kColumnWarps;

  // Products of rows with the state: a warp owns 16 rows, and kBlocks x 16 features or columns. With one
  // group nobody else reads a warp's rows, so that results take the tile's place on their way out.
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
  // Of row + lane_row and chunk 2 block + lane_chunk, with row a multiple of eight and lane_chunk 0 or 1:
  // what depends on the lane is worked out once for all of them.
  __device__ static int at(int row, int lane_row, int block, int lane_chunk) {
    const int of_lane = at(lane_row, lane_chunk);
    return row * kPitch + (kSwizzled ? of_lane ^ block * 16 : of_lane + block * 16);
  }
};

// Tiles of kernels that are launched for few tokens, and for many.
template <int D>
using Short = Half<D, tile_of(kHalfTiles, D).tokens>;
template <int D>
using Long = Half<D, tile_of(kHalfTiles, D).long_tokens>;

template <typename T, typename H>
struct TokenTile {
  alignas(16) T rows[H::kTokens * H::kPitch];
};

// z as three terms, times 1 / unscale: an operand, for out.
template <typename T, typename H>
struct TermsOfZ {
  static constexpr int kPitch = 2 * H::D + 8;
  alignas(16) T rows[3 * kPitch];
  float unscale;
};

// The state as a tensor-core operand, and what goes with it in float32. Tensor cores are given
// min(x, 0) where phi has relu(-x), which takes an instruction less, and so everything of that half of
// the features has its sign turned here: S', dS, z, the bias.
template <typename T, typename H>
struct StateTile {
  static constexpr int D = H::D;
  // At D = 128 m's terms are no more than 99 KB has room for.
  static constexpr bool kMeanTerms = D <= 96;

  // What a tile's rows have to tell other warps.
  struct RowTerms {
    float partial[2][H::kGroups][H::kTokens];
    float scale[H::kTokens];  // of g on its way to dS
    // In the order in which an operand's lanes want them, side by side: see place_of.
    alignas(16) T weight[3][H::kTokens];  // -c, in three terms
    alignas(16) T row_scale[H::kTokens];  // float16: what phi(q) is multiplied by

    // Of a token of a tile: a lane has two tokens, and the two that are eight further on.
    __device__ static int place_of(int token) {
      return token / 16 * 16 + token % 8 / 2 * 4 + token / 8 % 2 * 2 + token % 2;
    }
  };

  // S' or dS, times 1 / unscale; and three terms of m, times 1 / mean_unscale.
  alignas(16) T rows[(2 * D + (kMeanTerms ? 3 : 0)) * H::kPitch];
  union {
    struct {
      RowTerms row;
      float z[2 * D];  // z, or the bias of dphi(k)
    };
    TermsOfZ<T, H> z_terms;  // of kernels that make out, in the end
  };
  float mean[D];  // m
  float scratch[8];
  float unscale;       // of the product with rows
  float mean_unscale;
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
    return ptx::max_nan(ptx::min_nan(x, 65504.0f), -65504.0f);
  } else {
    return x;
  }
}

// A power of two no greater than x, of the same binade.
__device__ inline float power_of_two(float x) {
  const float inside = fminf(fmaxf(x, 1e-30f), 1e30f);
  return __uint_as_float(__float_as_uint(inside) & 0x7f800000u);
}

// inverse(), by a reciprocal within 1 ulp: to round it right takes ten instructions more. It flushes
// numbers that are not normal: a power of two keeps E and 1 / E away from them.
__device__ inline float quick_inverse(float met, float eps) {
  const float E = met + eps, power = fabsf(E) > 1.0f ? 0.25f : 4.0f;
  const float inverse = ptx::reciprocal(E * power) * power;
  return met == 0.0f || fabsf(E) < FLT_MIN ? 0.0f : inverse;
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

// Products with three terms, in a b operand's first three columns; the other five are the third's again.
__device__ inline int term_of_lane() { return threadIdx.x % 8 < 3 ? threadIdx.x % 8 : 2; }

// A lane's of them; four lanes' are the sum.
__device__ inline float own_terms(const float (&product)[4], int r) {
  const float second = lane_pair() == 0 ? product[2 * r + 1] : 0.0f;
  return lane_pair() <= 2 ? product[2 * r] + second : 0.0f;
}

// ---- tiles of tokens -------------------------------------------------------------------------------

// Rows of a tile in global memory; those from `valid` on are not there.
template <typename T>
struct TileRows {
  T* head;
  int64_t stride;
  unsigned first;
  int valid;
  bool wide;

  __device__ T* at(int row) const { return head + int64_t{first + row} * stride; }
};

// Chunks of sixteen bytes that kOwners threads take by turns: thread `owner` has owner + i kOwners.
template <int kOwners, typename H>
struct Chunks {
  // Then a thread's chunks are below one another, and need no product to be found.
  static constexpr bool kBelow = kOwners % H::kChunks == 0;
  static constexpr int kRows = kOwners / H::kChunks;
  int owner;

  __device__ int row(int i) const {
    return kBelow ? owner / H::kChunks + i * kRows : (owner + i * kOwners) / H::kChunks;
  }
  __device__ int chunk(int i) const { return (kBelow ? owner : owner + i * kOwners) % H::kChunks; }

  // In a shared tile, from a row on that is a multiple of eight.
  __device__ int at(int i) const {
    if constexpr (!kBelow || !H::kSwizzled) return H::at(row(i), chunk(i));
    return (H::at(row(0), chunk(0)) ^ i * kRows % 8 * 8) + i * kRows * H::kPitch;
  }

  // In global memory, from a row on.
  template <typename T>
  __device__ T* in(const TileRows<T>& rows, int from, int i) const {
    if constexpr (!kBelow) return rows.at(from + row(i)) + chunk(i) * 8;
    return rows.at(from + row(0)) + chunk(0) * 8 + i * (kRows * rows.stride);
  }
};

// Begins to copy the rows of a tile; those that are not there are 0. Narrow rows are copied at once.
// Every thread has as many chunks, so that the loop is none in the machine code.
template <typename T, typename H>
__device__ void copy_tile(TokenTile<T, H>& tile, const TileRows<const T>& rows) {
  constexpr int kEach = H::kTokens * H::kChunks / kThreads;
  static_assert(kEach * kThreads == H::kTokens * H::kChunks);
  const Chunks<kThreads, H> own{static_cast<int>(threadIdx.x)};
  if (rows.wide) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      ptx::cp_async_16(tile.rows + own.at(i), own.in(rows, 0, i), own.row(i) < rows.valid ? 16 : 0);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    Vector<T, 8> values = {};
    if (own.row(i) < rows.valid) {
      const T* const from = own.in(rows, 0, i);
#pragma unroll
      for (int e = 0; e < 8; ++e) values.value[e] = load_global(from + e);
    }
    *reinterpret_cast<Vector<T, 8>*>(tile.rows + own.at(i)) = values;
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

// All tiles of a sequence, of which one or two are in shared memory at once, as there is room. The first
// is asked for by start(), long before it is wanted.
template <typename Load>
struct ShortStream {
  Load load;
  int end, stages;

  __device__ void start() const {
    if (end > 0) load(0);
    ptx::cp_async_commit();
  }

  template <typename Process>
  __device__ void run(Process process) const {
    for (int tile = 0; tile < end; ++tile) {
      const bool more = tile + 1 < end;
      ptx::cp_async_wait<0>();
      __syncthreads();  // the tile is here
      if (more && stages == 2) load((tile + 1) % 2);
      ptx::cp_async_commit();
      process(stages == 2 ? tile % 2 : 0);
      if (more && stages == 1) {
        __syncthreads();  // the only tile has been read
        load(0);
        ptx::cp_async_commit();
      }
    }
  }
};

template <typename Load>
__device__ ShortStream<Load> short_stream(int end, int stages, Load load) {
  return {load, end, stages};
}

template <int kStages, typename Load>
__device__ Stream<kStages, Load> stream(int begin, int end, Load load) {
  return {load, begin, end};
}

// Goes through the tiles of the heads from first_head on, in order. A tile's place would cost a division.
struct TilePlace {
  unsigned head, first = 0;
  int valid;

  __device__ TilePlace(int tile, int64_t first_head, int64_t tokens, int tile_tokens)
      : per_head(static_cast<int>((tokens + tile_tokens - 1) / tile_tokens)),
        tile_tokens(tile_tokens),
        left(static_cast<int>(tokens - int64_t{per_head - 1} * tile_tokens)) {
    head = static_cast<unsigned>(first_head);
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
    first = static_cast<unsigned>(in_head) * tile_tokens;
    valid = in_head + 1 == per_head ? left : tile_tokens;
  }
};

// ---- operands from shared memory -------------------------------------------------------------------
// Sixteen rows and sixteen columns (block `block`) of a tile, as an a operand ...

template <typename H, typename T>
__device__ void load_rows(unsigned (&a)[4], const T* tile, int row, int block) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4(a, tile + H::at(row, lane % 16, block, lane / 16));
}

// ... transposed: a's rows are the tile's columns ...
template <typename H, typename T>
__device__ void load_columns(unsigned (&a)[4], const T* tile, int row, int block) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4_trans(a, tile + H::at(row, lane / 16 * 8 + lane % 8, block, lane / 8 % 2));
}

// ... as two b operands side by side: b's rows are the tile's rows ...
template <typename H, typename T>
__device__ void load_b_rows(unsigned (&b)[4], const T* tile, int row, int block) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4_trans(b, tile + H::at(row, lane % 16, block, lane / 16));
}

// ... or the tile's columns.
template <typename H, typename T>
__device__ void load_b_columns(unsigned (&b)[4], const T* tile, int row, int block) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4(b, tile + H::at(row, lane / 16 * 8 + lane % 8, block, lane / 8 % 2));
}

template <typename T>
__device__ void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned* b) {
  const unsigned pair[2] = {b[0], b[1]};
  ptx::mma_16816<T>(d, a, pair);
}

// phi(x), its second half with the sign turned.
template <typename T>
__device__ void positive_and_negative(unsigned (&phi)[2][4], const unsigned (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    phi[0][i] = ptx::relu2<T>(x[i]);
    phi[1][i] = ptx::least2<T>(x[i]);
  }
}

// A float32 as three half-precision terms, which hold all of it.
template <typename T>
__device__ void three_terms(T (&terms)[3], float x) {
  x = finite<T>(x);
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    terms[i] = from_float<T>(x);
    x -= to_float(terms[i]);
  }
}

// A warp owns sixteen rows of a tile (its lanes' rows are lane_group() and that + 8), and a group of
// features or columns.
template <typename H>
__device__ inline int own_rows() {
  return (H::kGroups == 1 ? warp_index() : warp_index() % H::kRowWarps) * 16;
}
template <typename H>
__device__ inline int own_group() {
  return H::kGroups == 1 ? 0 : warp_index() / H::kRowWarps;
}

// Eight elements to global memory that are not on a 16-byte boundary there.
template <typename T>
__device__ void store_narrow(T* to, const uint4& value) {
  const unsigned pairs[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const float2 both = ptx::unpack2<T>(pairs[e / 2]);
    store_global(to + e, from_float<T>(e % 2 ? both.y : both.x));
  }
}

// The inverse of load_rows.
template <typename H, typename T>
__device__ void store_rows(T* tile, const unsigned (&a)[4], int row, int block) {
#ifdef LINEAR_VIT_STMATRIX
  const int lane = threadIdx.x % 32;
  ptx::stmatrix_x4(tile + H::at(row, lane % 16, block, lane / 16), a);
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    T* const to = tile + H::at(row, lane_group() + i % 2 * 8, block, i / 2) + lane_pair();
    *reinterpret_cast<unsigned*>(to) = a[i];
  }
#endif
}

// A packed 16 x 16 block, from a row and column on, to global memory: 16 bytes a lane, after the four
// lanes of a row have exchanged what they hold.
template <typename T>
__device__ void store_block(const TileRows<T>& target, int row, int column, unsigned (&r)[4]) {
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
  const int which = threadIdx.x % 4, own = row + lane_group() + 8 * (which % 2);
  if (own >= target.valid) return;
  T* const to = target.at(own) + column + 8 * (which / 2);
  const uint4 value = make_uint4(r[0], r[1], r[2], r[3]);
  if (target.wide) {
    store_global(reinterpret_cast<uint4*>(to), value);
  } else {
    store_narrow(to, value);
  }
}

// A warp's own sixteen rows of a shared tile, as it has written them, to global memory.
template <typename T, typename H>
__device__ void store_own_rows(const TileRows<T>& target, const TokenTile<T, H>& tile) {
  constexpr int kEach = 16 * H::kChunks / 32;
  static_assert(H::kGroups == 1 && kEach * 32 == 16 * H::kChunks);
  __syncwarp();
  const Chunks<32, H> own{static_cast<int>(threadIdx.x % 32)};
  const int rows = own_rows<H>(), valid = target.valid - rows;
  const T* const from = tile.rows + rows * H::kPitch;
  uint4 value[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) value[i] = *reinterpret_cast<const uint4*>(from + own.at(i));
  if (target.wide) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      T* const to = own.in(target, rows, i);
      if (own.row(i) < valid) store_global(reinterpret_cast<uint4*>(to), value[i]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (own.row(i) < valid) store_narrow(own.in(target, rows, i), value[i]);
  }
}

// ---- sums over tokens: S and z of keys and values, dS and dz of queries and gradients ----------------

template <typename H>
struct Sums {
  static constexpr int D = H::D;
  float S[2][H::kM][H::kN][4];
  float z[2][H::kM][4];  // columns to be added up; in the first column's warps

  static __device__ int feature_warp() { return warp_index() % H::kFeatureWarps; }
  static __device__ int column_warp() {
    return H::kColumnWarps == 1 ? 0 : warp_index() / H::kFeatureWarps % H::kColumnWarps;
  }
  static __device__ int token_warp() {
    return H::kTokenWarps == 1 ? 0 : warp_index() / (H::kFeatureWarps * H::kColumnWarps);
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

  // Only every so many steps are asked whether they have a token: of a long tile the few that have none
  // cost less than the question. Their tokens are 0, and what goes with them has to be there, too. (At
  // D = 48 that would spill on sm_100a.)
  static constexpr int kAtOnce = H::kTokens >= 128 && H::D != 48 ? 2 : 1;
  static constexpr int kPastEnd = (kAtOnce - 1) * 16 * H::kTokenWarps;
  static __device__ bool has_none(int step, int valid) {
    return step % kAtOnce == 0 && first_token(step) >= valid;
  }

  // The columns of z are the first column warps'.
  static __device__ bool has_z() { return __any_sync(kFullWarp, column_warp() == 0); }

  // S += phi^T w for sixteen tokens; and z += phi^T of_z, or not.
  template <typename T>
  __device__ void add(const unsigned (&phi)[H::kM][2][4], const TokenTile<T, H>& w, int token,
                      const unsigned (&of_z)[2], bool with_z) {
    const int lane = threadIdx.x % 32, first_chunk = column_warp() * H::kN;
    unsigned b[H::kN + H::kN % 2][2];
#pragma unroll
    for (int n = 0; n + 1 < H::kN; n += 2) {
      unsigned both[4];
      if constexpr (H::kN % 2 == 0) {
        load_b_rows<H>(both, w.rows, token, first_chunk / 2 + n / 2);
      } else {
        ptx::ldmatrix_x4_trans(both,
                               w.rows + H::at(token + lane % 16, first_chunk + n + lane / 16));
      }
      b[n][0] = both[0], b[n][1] = both[1], b[n + 1][0] = both[2], b[n + 1][1] = both[3];
    }
    if constexpr (H::kN % 2 == 1) {
      constexpr int n = H::kN - 1;
      ptx::ldmatrix_x2_trans(b[n], w.rows + H::at(token + lane % 16, first_chunk + n));
    }
#pragma unroll
    for (int m = 0; m < H::kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < H::kN; ++n) multiply<T>(S[half][m][n], phi[m][half], b[n]);
        if (with_z) multiply<T>(z[half][m], phi[m][half], of_z);
      }
    }
  }

  template <typename T>
  static __device__ void load(unsigned (&a)[H::kM][4], const TokenTile<T, H>& x, int token) {
#pragma unroll
    for (int m = 0; m < H::kM; ++m) {
      load_columns<H>(a[m], x.rows, token, feature_warp() * H::kM + m);
    }
  }

  // S and z of a tile of keys and values.
  template <typename T>
  __device__ void add_keys(const TokenTile<T, H>& k, const TokenTile<T, H>& v, int valid) {
    const unsigned one = lane_group() == 0 ? ptx::pack2<T>(1.0f, 1.0f) : 0u;
    const unsigned ones[2] = {one, one};
    const bool with_z = has_z();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (has_none(step, valid)) break;
      unsigned a[H::kM][4], phi[H::kM][2][4];
      load(a, k, first_token(step));
#pragma unroll
      for (int m = 0; m < H::kM; ++m) positive_and_negative<T>(phi[m], a[m]);
      add(phi, v, first_token(step), ones, with_z);
    }
  }

  // Brings what add_queries takes of a float16 tile to where a row's factor leaves it finite.
  template <typename T>
  static __device__ void limit_queries(unsigned (&q)[kSteps][H::kM][4],
                                       const StateTile<T, H>& state, int valid) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (has_none(step, valid)) break;
      const auto scale = *reinterpret_cast<const Vector<unsigned, 2>*>(
          state.row.row_scale + first_token(step) + 2 * lane_pair());
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // 65504 over a power of two from 1 on: integers, since its inverse may be no float16.
        const unsigned bits = scale.value[i / 2], one = 0x3c00u;
        const unsigned low = max(bits & 0xffffu, one), high = max(bits >> 16, one);
        const unsigned limit = 0x7bff7bffu - ((high - one) << 16 | (low - one));
#pragma unroll
        for (int m = 0; m < H::kM; ++m) q[step][m][i] = ptx::limit_half2(q[step][m][i], limit);
      }
    }
  }

  // dS and dz' of a tile of queries, whose operands `q` were loaded before g / E took the tile's place.
  // In float16 the second half of phi is relu(-q), which takes no more where a factor goes with it, and
  // no product is infinite: see limit_queries.
  template <typename T>
  __device__ void add_queries(const unsigned (&q)[kSteps][H::kM][4], const TokenTile<T, H>& high,
                              const TokenTile<T, H>& low, const StateTile<T, H>& state, int valid) {
    const bool with_z = has_z();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (has_none(step, valid)) break;
      const int token = first_token(step);
      unsigned phi[H::kM][2][4];
      if constexpr (std::is_same_v<T, __half>) {
        const auto scale = *reinterpret_cast<const Vector<unsigned, 2>*>(
            state.row.row_scale + token + 2 * lane_pair());
#pragma unroll
        for (int m = 0; m < H::kM; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const unsigned x = q[step][m][i], of_rows = scale.value[i / 2];
            phi[m][0][i] = ptx::multiply_relu_half2(x, of_rows);
            phi[m][1][i] = ptx::multiply_relu_half2(x, ptx::negate2<T>(of_rows));
          }
        }
      } else {
#pragma unroll
        for (int m = 0; m < H::kM; ++m) positive_and_negative<T>(phi[m], q[step][m]);
      }
      const T* const weight = state.row.weight[lane_group() < 3 ? lane_group() : 2];
      const auto weights =
          *reinterpret_cast<const Vector<unsigned, 2>*>(weight + token + 2 * lane_pair());
      const unsigned of_z[2] = {weights.value[0], weights.value[1]};
      add(phi, high, token, of_z, with_z);
      add(phi, low, token, of_z, false);
    }
  }

  // Adds up the warps that shared the tokens, in order, into the first of them, and z's columns, in
  // every lane of four. Needs kBytes to itself, and ends with all of it read.
  template <int kBytes>
  __device__ void combine(float* scratch) {
    constexpr int kPerThread = sizeof(Sums) / sizeof(float), kOwners = kThreads / H::kTokenWarps;
    constexpr int kRoom = kBytes / static_cast<int>(sizeof(float)) / kOwners;
    static_assert(kRoom > 0 || H::kTokenWarps == 1);
    auto* const own = reinterpret_cast<float*>(this);
    const int owner = threadIdx.x % kOwners;
#pragma unroll 1
    for (int warp = 1; warp < H::kTokenWarps; ++warp) {
#pragma unroll
      for (int first = 0; first < kPerThread; first += kRoom > 0 ? kRoom : kPerThread) {
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
        d[0] = quad_sum(own_terms(d, 0));
        d[2] = quad_sum(own_terms(d, 1));
      }
    }
    __syncthreads();
  }

  // Times two powers of two, and the second half's sign turned or not.
  __device__ void rescale(float of_S, float of_z, bool turn) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 1 && turn) of_S = -of_S, of_z = -of_z;
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

  // After combine: to global memory, with the signs that S and z have. A lane has two columns of two
  // rows, and its neighbour the next two: they exchange, so that each stores four of one row.
  __device__ void store(float* S_out, float* z_out) const {
    const bool odd = threadIdx.x % 2 == 1;
    for_features([&](int half, int m) {
#pragma unroll
      for (int n = 0; n < H::kN; ++n) {
        const float sign = half ? -1.0f : 1.0f;
        const float d[4] = {sign * S[half][m][n][0], sign * S[half][m][n][1],
                            sign * S[half][m][n][2], sign * S[half][m][n][3]};
        const float x = __shfl_xor_sync(kFullWarp, odd ? d[0] : d[2], 1);
        const float y = __shfl_xor_sync(kFullWarp, odd ? d[1] : d[3], 1);
        float* const to = S_out + row(half, m, odd ? 2 : 0) * D + column(n, 0) - (odd ? 2 : 0);
        store_global(reinterpret_cast<float4*>(to), odd ? make_float4(x, y, d[2], d[3])
                                                        : make_float4(d[0], d[1], x, y));
      }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        if (column_warp() == 0 && lane_pair() == 0) {
          store_global(z_out + row(half, m, i), half ? -z[half][m][i] : z[half][m][i]);
        }
      }
    });
  }
};

// ---- the state as an operand -----------------------------------------------------------------------

template <typename T, typename H>
struct State : StateTile<T, H> {
  static constexpr int D = H::D;
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

  // Of a feature's numbers here: relu(-x) has the second half.
  __device__ static float sign_of(int row) { return row < D ? 1.0f : -1.0f; }

  __device__ static void turn_signs(float4 (&value)[kPerThread]) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const float sign = sign_of(own_row(i));
      value[i].x *= sign, value[i].y *= sign, value[i].z *= sign, value[i].w *= sign;
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

  // What brings the largest of some numbers near 2^13, in float16.
  __device__ static float scale_of_terms(float largest) {
    return std::is_same_v<T, __half> ? 8192.0f / power_of_two(largest) : 1.0f;
  }

  // z or m, which are there, as an operand of three terms: z for out, whose own place they take (its sum
  // is no less than its largest), m for the gradients.
  __device__ void write_terms(float z_total, bool for_out) {
    T terms[3];
    if (for_out) {
      TermsOfZ<T, H>& to = this->z_terms;
      const float scale = scale_of_terms(z_total);
      if (threadIdx.x < 2 * D) three_terms<T>(terms, this->z[threadIdx.x] * scale);
      __syncthreads();  // z has been read
      if (threadIdx.x == 0) to.unscale = 1.0f / scale;
      if (threadIdx.x >= 2 * D) return;
#pragma unroll
      for (int i = 0; i < 3; ++i) to.rows[i * to.kPitch + threadIdx.x] = terms[i];
    } else if constexpr (StateTile<T, H>::kMeanTerms) {
      if (threadIdx.x >= D) return;
      float most = 0.0f;
      if constexpr (std::is_same_v<T, __half>) {
        for (int d = 0; d < D; ++d) most = fmaxf(most, fabsf(this->mean[d]));
      }
      const float scale = scale_of_terms(most);
      if (threadIdx.x == 0) this->mean_unscale = 1.0f / scale;
      three_terms<T>(terms, this->mean[threadIdx.x] * scale);
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        this->rows[H::at(2 * D + i, threadIdx.x / 8) + threadIdx.x % 8] = terms[i];
      }
    }
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
  __device__ void load_centred(const float* S, const float* z_in, float* scratch, bool for_out) {
    static_assert(sizeof(TokenTile<T, H>) >= kRows * D * sizeof(float));
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
    if (threadIdx.x < 2 * D) this->z[threadIdx.x] = sign_of(threadIdx.x) * own_z;
    turn_signs(value);
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
    write_terms(z_total, for_out);
    choose_gradient_scales(z_total);
  }

  // The mean of a tile's columns, NaN and infinity aside, which have no say in other rows' gradients.
  __device__ void take_mean(const TokenTile<T, H>& tile, int valid) {
    if (threadIdx.x >= D) return;
    float sum = 0.0f;
    for (int row = 0; row < valid; ++row) {
      const float x = to_float(tile.rows[H::at(row, threadIdx.x / 8) + threadIdx.x % 8]);
      sum += fabsf(x) <= FLT_MAX ? x : 0.0f;
    }
    this->mean[threadIdx.x] = valid > 0 ? sum / valid : 0.0f;
  }

  // dS as it is, and the bias of dphi(k): of dz', with m in global memory; or, without, of dz, with the
  // m of take_mean.
  __device__ void load_gradient(const float* dS, const float* dz, const float* m) {
    float4 value[kPerThread];
    read(value, dS);
    turn_signs(value);
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) most = fmaxf(most, largest(value[i]));
    write(value, choose_scale(most));
    if (m && threadIdx.x < D) this->mean[threadIdx.x] = load_global(m + threadIdx.x);
    if (threadIdx.x < 2 * D) {
      this->z[threadIdx.x] = sign_of(threadIdx.x) * load_global(dz + threadIdx.x);
    }
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
          if (exact) {
            x -= sign_of(threadIdx.x) * load_global(exact + threadIdx.x * D + chunk * 8 + e);
          }
          sum += x * this->mean[chunk * 8 + e];
        }
      }
      this->z[threadIdx.x] -= sum;
    }
  }

  // The same two from a block's own sums. Needs kFeatureWarps x D floats in `scratch`.
  __device__ void take_centred(Sums<H>& sums, float* scratch, bool for_out) {
    if (sums.column_warp() == 0 && lane_pair() == 0) take_z(sums);
    if (sums.token_warp() == 0) {
#pragma unroll
      for (int n = 0; n < H::kN; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float sum = 0.0f;
          sums.for_features([&](int half, int m) {
            const float two_rows = sums.S[half][m][n][i] + sums.S[half][m][n][i + 2];
            sum += half ? -two_rows : two_rows;
          });
#pragma unroll
          for (int lane = 4; lane < 32; lane *= 2) sum += __shfl_xor_sync(kFullWarp, sum, lane);
          if (lane_group() == 0) scratch[sums.feature_warp() * D + sums.column(n, i)] = sum;
        }
      }
    }
    __syncthreads();
    const float z_total =
        sum_over_block(threadIdx.x < 2 * D ? sign_of(threadIdx.x) * this->z[threadIdx.x] : 0.0f,
                       this->scratch);
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
    write_terms(z_total, for_out);
    choose_gradient_scales(z_total);
  }

  __device__ void take_gradient(const Sums<H>& sums) {
    if (sums.column_warp() == 0 && lane_pair() == 0) take_z(sums);
    take_S(sums);
    subtract_mean();
  }

  __device__ void take_z(const Sums<H>& sums) {
    sums.for_features([&](int half, int m) {
      this->z[sums.row(half, m, 0)] = sums.z[half][m][0];
      this->z[sums.row(half, m, 2)] = sums.z[half][m][2];
    });
  }

  __device__ void take_S(const Sums<H>& sums) {
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

// product += rows (their columns of block `step` are a) times both halves of the state's block `block` of
// features, transposed: a = S' g.
template <typename T, typename H>
__device__ void multiply_state_columns(float (&product)[2][2][4], const State<T, H>& state,
                                       const unsigned (&a)[4], int step, int block) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    unsigned b[4];
    load_b_columns<H>(b, state.rows, half * H::D + block * 16, step);
    multiply<T>(product[half][0], a, b);
    multiply<T>(product[half][1], a, b + 2);
  }
}

// product += phi S' for sixteen features (block `step`).
template <typename T, typename H>
__device__ void multiply_state_rows(float (&product)[2 * H::kBlocks][4], const State<T, H>& state,
                                    const unsigned (&phi)[2][4], int step) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int block = 0; block < H::kBlocks; ++block) {
      unsigned b[4];
      load_b_rows<H>(b, state.rows, half * H::D + step * 16, own_group<H>() * H::kBlocks + block);
      multiply<T>(product[2 * block], phi[half], b);
      multiply<T>(product[2 * block + 1], phi[half], b + 2);
    }
  }
}

// product += phi z for sixteen features (block `step`).
template <typename T, typename H>
__device__ void multiply_z(float (&product)[4], const State<T, H>& state,
                           const unsigned (&phi)[2][4], int step) {
  const int lane = threadIdx.x % 32, feature = lane / 16 * H::D + lane / 8 % 2 * 8 + step * 16;
  unsigned b[4];
  ptx::ldmatrix_x4(b, state.z_terms.rows + term_of_lane() * state.z_terms.kPitch + feature);
  multiply<T>(product, phi[0], b);
  multiply<T>(product, phi[1], b + 2);
}

// product += rows (their columns of block `step` are a) times m, likewise.
template <typename T, typename H>
__device__ void multiply_mean(float (&product)[4], const State<T, H>& state,
                              const unsigned (&a)[4], int step) {
  const int lane = threadIdx.x % 32;
  unsigned b[2];
  ptx::ldmatrix_x2(b, state.rows + H::at(2 * H::D, term_of_lane(), step, lane / 8 % 2));
  multiply<T>(product, a, b);
}

// Float16's operands are scaled, and their products with the state have to be given back what that was.
template <typename T, typename H>
__device__ float unscale_of(const State<T, H>& state) {
  return std::is_same_v<T, __half> ? state.unscale : 1.0f;
}

__device__ inline float2 two(const float* x) {
  return *reinterpret_cast<const float2*>(x);
}

// Of both halves the one of x's sign: of products, for element i of a 16 x 16 a operand ...
template <typename T>
__device__ float2 by_sign(const ptx::Signs<T>& x, const float (&both)[2][2][4], int i) {
  const float(&positive)[4] = both[0][i / 2];
  const float(&negative)[4] = both[1][i / 2];
  const int first = i % 2 * 2;
  return make_float2(x.low ? positive[first] : negative[first],
                     x.high ? positive[first + 1] : negative[first + 1]);
}

// ... or of z, whose halves are kFeatures apart.
template <int kFeatures, typename T>
__device__ float2 by_sign(const ptx::Signs<T>& x, const float* z) {
  const float2 positive = two(z), negative = two(z + kFeatures);
  return make_float2(x.low ? positive.x : negative.x, x.high ? positive.y : negative.y);
}

// out of a tile of queries.
template <typename T, typename H>
__device__ void apply_tile(const State<T, H>& state, TokenTile<T, H>& q, float eps,
                           const TileRows<T>& out) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  const int rows = own_rows<H>();
  if (!__any_sync(kFullWarp, rows < out.valid)) return;
  float product[2 * H::kBlocks][4] = {}, met[4] = {};
#pragma unroll
  for (int step = 0; step < H::D / 16; ++step) {
    unsigned x[4], phi[2][4];
    load_rows<H>(x, q.rows, rows, step);
    positive_and_negative<T>(phi, x);
    multiply_z(met, state, phi, step);
    multiply_state_rows(product, state, phi, step);
  }
  float of_product[2], of_mean[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float dot = quad_sum(own_terms(met, r)) * (kHalf ? state.z_terms.unscale : 1.0f);
    const float inverse_E = quick_inverse(dot, eps);
    of_product[r] = inverse_E * unscale_of(state), of_mean[r] = dot * inverse_E;
  }
#pragma unroll
  for (int block = 0; block < H::kBlocks; ++block) {
    const int column = (own_group<H>() * H::kBlocks + block) * 16;
    unsigned packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // row lane_group() + 8 (i % 2), columns + 8 (i / 2)
      const float2 m = two(state.mean + column + i / 2 * 8 + lane_pair());
      const float* const d = &product[2 * block + i / 2][i % 2 * 2];
      packed[i] = ptx::pack2<T>(d[0] * of_product[i % 2] + m.x * of_mean[i % 2],
                                d[1] * of_product[i % 2] + m.y * of_mean[i % 2]);
    }
    if constexpr (H::kGroups == 1) {
      store_rows<H>(q.rows, packed, rows, block);
    } else {
      store_block(out, rows, column, packed);
    }
  }
  if constexpr (H::kGroups == 1) store_own_rows(out, q);
}

// A query's power of two, for phi(q) in float16, which brings its g / E to g's size: times it, 1 / E is
// between a half and one, but for rows that meet next to nothing, or far more than others.
__device__ inline float power_of_row(float scale) {
  const int inverse = 0x7e800000 - static_cast<int>(__float_as_uint(scale) & 0x7f800000u);
  return __uint_as_float(min(max(inverse, 112 << 23), 141 << 23));  // 2^-15, 2^14
}

// 1 / x of a power of two.
__device__ inline float inverse_power(float x) {
  return __uint_as_float(0x7f000000u - __float_as_uint(x));
}

// A scale as two half-precision terms, and a pair times it as two again: the first, rounded, of the
// product with the scale's first; what that leaves is exact, and the rest is added to it.
// kLimited: of a scale above one, which could make a float16 infinite.
template <typename T, bool kLimited>
struct TwoTerms {
  unsigned first, second;

  __device__ explicit TwoTerms(float scale) {
    if (kLimited) scale = finite<T>(scale);
    first = ptx::pack2<T>(scale, scale);
    const float rest = scale - ptx::unpack2<T>(first).x;
    second = ptx::pack2<T>(rest, rest);
  }

  __device__ void times(unsigned x, unsigned& high, unsigned& low) const {
    high = ptx::fma2<T>(x, first, 0x80008000u);  // + -0
    if (kLimited) high = ptx::finite2<T>(high);
    low = ptx::fma2<T>(x, second, ptx::fma2<T>(x, first, ptx::negate2<T>(high)));
    if (kLimited) low = ptx::finite2<T>(low);
  }
};

// What a warp finds of its queries on the way to dq, and needs again. Of a's two halves a feature needs
// the one of q's sign; where registers are scarce, q and z are read twice.
template <typename T, typename H>
struct QueryRows {
  static constexpr bool kKeepsG = H::kGroups == 1, kKeeps = H::D == 64;
  static constexpr bool kHalf = std::is_same_v<T, __half>;
  unsigned g[H::D / 16][4], q[H::kBlocks][4];
  float2 a[H::kBlocks][4], z[H::kBlocks][4];
  float met[2], numerator[2];  // phi(q) . z, phi(q) . S' g - eps (m . g); summed up over the group

  // Sixteen features at a time, so that half of the registers are free again for the next sixteen.
  __device__ void find(const State<T, H>& state, const TokenTile<T, H>& q_tile,
                       const TokenTile<T, H>& g_tile, float eps) {
    const int group = own_group<H>(), rows = own_rows<H>();
    float a_dot[2] = {}, z_dot[2] = {}, mean_dot[2] = {}, of_mean[4] = {};
#pragma unroll
    for (int block = 0; block < H::kBlocks; ++block) {
      float both[2][2][4] = {};
#pragma unroll
      for (int step = 0; step < H::D / 16; ++step) {
        if (!kKeepsG || block == 0) load_rows<H>(g[step], g_tile.rows, rows, step);
        multiply_state_columns(both, state, g[step], step, group * H::kBlocks + block);
        if (block > 0 || step % H::kGroups != group) continue;
        if constexpr (State<T, H>::kMeanTerms) {
          multiply_mean(of_mean, state, g[step], step);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 pair = ptx::unpack2<T>(g[step][i]);
            const float2 m = two(state.mean + step * 16 + i / 2 * 8 + lane_pair());
            mean_dot[i % 2] += pair.x * m.x + pair.y * m.y;
          }
        }
      }
      load_rows<H>(q[block], q_tile.rows, rows, group * H::kBlocks + block);
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // row lane_group() + 8 (i % 2), columns + 8 (i / 2)
        const float2 x = ptx::unpack2<T>(q[block][i]);
        const ptx::Signs<T> signs(q[block][i]);
        a[block][i] = by_sign(signs, both, i);
        z[block][i] = by_sign<H::D>(signs, state.z + column(block, i));
        a_dot[i % 2] += x.x * a[block][i].x;
        a_dot[i % 2] += x.y * a[block][i].y;
        z_dot[i % 2] += x.x * z[block][i].x;
        z_dot[i % 2] += x.y * z[block][i].y;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if constexpr (State<T, H>::kMeanTerms) {
        mean_dot[r] = own_terms(of_mean, r) * (kHalf ? state.mean_unscale : 1.0f);
      }
      met[r] = quad_sum(z_dot[r]);
      numerator[r] = quad_sum(a_dot[r] * unscale_of(state) - eps * mean_dot[r]);
    }
  }

  // dq, packed, of a block of sixteen features; over_E gives back a's scale, too.
  __device__ void gradient(unsigned (&packed)[4], const State<T, H>& state,
                           const TokenTile<T, H>& q_tile, int block, const float (&over_E)[2],
                           const float (&c)[2]) {
    if constexpr (!kKeeps) {
      load_rows<H>(q[block], q_tile.rows, own_rows<H>(), own_group<H>() * H::kBlocks + block);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (!kKeeps) {
        z[block][i] = by_sign<H::D>(ptx::Signs<T>(q[block][i]), state.z + column(block, i));
      }
      packed[i] = ptx::pack2<T>(a[block][i].x * over_E[i % 2] - z[block][i].x * c[i % 2],
                                a[block][i].y * over_E[i % 2] - z[block][i].y * c[i % 2]) &
                  ptx::nonzero2(q[block][i]);
    }
  }

  __device__ static int column(int block, int i) {
    return (own_group<H>() * H::kBlocks + block) * 16 + i / 2 * 8 + lane_pair();
  }
};

// dq of a tile of queries, and its part of dS and dz'.
template <typename T, typename H>
__device__ void query_gradient_tile(State<T, H>& state, Sums<H>& sums, TokenTile<T, H>& q,
                                    TokenTile<T, H>& g, float eps, const TileRows<T>& dq) {
  constexpr bool kAlone = H::kGroups == 1, kHalf = std::is_same_v<T, __half>;
  const int group = own_group<H>(), rows = own_rows<H>();
  const bool any = __any_sync(kFullWarp, rows < dq.valid + Sums<H>::kPastEnd);
  QueryRows<T, H> own;
  if (any) own.find(state, q, g, eps);
  if constexpr (!kAlone) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (any && lane_pair() == 0) {
        state.row.partial[0][group][rows + lane_group() + 8 * r] = own.met[r];
        state.row.partial[1][group][rows + lane_group() + 8 * r] = own.numerator[r];
      }
    }
    __syncthreads();  // every group's part is there
  }

  float scale[2] = {};  // of g, on its way to dS
  // Float16: whether a query times its row's factor may be infinite, so that the block has to limit the
  // tile's queries. It may where the factor is above one, which is where E is below dS_scale: of rows whose
  // elements' sizes add up to less than one or two, or that meet far less than others; and where the
  // query is infinite itself.
  bool beyond = false;
  if (any) {
    const float unscale = unscale_of(state), dS_scale = state.dS_scale;
    float over_E[2], c[2], weight[2], power[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if constexpr (!kAlone) {
        own.met[r] = own.numerator[r] = 0.0f;
#pragma unroll
        for (int i = 0; i < H::kGroups; ++i) {
          own.met[r] += state.row.partial[0][i][rows + lane_group() + 8 * r];
          own.numerator[r] += state.row.partial[1][i][rows + lane_group() + 8 * r];
        }
      }
      const float inverse_E = quick_inverse(own.met[r], eps);
      const float of_c = own.numerator[r] * inverse_E;
      c[r] = weight[r] = of_c * inverse_E;
      scale[r] = over_E[r] = inverse_E;
      if constexpr (kHalf) {
        over_E[r] *= unscale;
        scale[r] *= dS_scale;
        power[r] = power_of_row(scale[r]);
        scale[r] *= power[r];
        weight[r] = of_c * scale[r];
        beyond |= power[r] < 1.0f || fabsf(own.met[r]) > FLT_MAX;
      }
    }
    // A lane of the four for each of their two rows.
    if (group == 0 && lane_pair() <= 2) {
      const bool second = lane_pair() == 2;
      const int row = rows + lane_group() + 4 * lane_pair(), place = state.row.place_of(row);
      float own_weight = second ? weight[1] : weight[0];
      if constexpr (kHalf) {
        own_weight *= state.weight_scale;
        state.row.row_scale[place] = from_float<T>(inverse_power(second ? power[1] : power[0]));
      }
      T terms[3];
      three_terms<T>(terms, -own_weight);
#pragma unroll
      for (int term = 0; term < 3; ++term) state.row.weight[term][place] = terms[term];
      if constexpr (!kAlone) state.row.scale[row] = second ? scale[1] : scale[0];
    }
#pragma unroll
    for (int block = 0; block < H::kBlocks; ++block) {
      unsigned packed[4];
      own.gradient(packed, state, q, block, over_E, c);
      if constexpr (kAlone) {
        store_rows<H>(g.rows, packed, rows, block);
      } else {
        store_block(dq, rows, (group * H::kBlocks + block) * 16, packed);
      }
    }
    if constexpr (kAlone) store_own_rows(dq, g);
  } else if (!kAlone && group == 0 && lane_pair() == 0) {
#pragma unroll
    for (int r = 0; r < 2; ++r) state.row.scale[rows + lane_group() + 8 * r] = 0.0f;  // it is read
  }

  unsigned of_q[Sums<H>::kSteps][H::kM][4];
#pragma unroll
  for (int step = 0; step < Sums<H>::kSteps; ++step) {
    sums.load(of_q[step], q, sums.first_token(step));
  }
  // q and g have been read, and a row's scale is there.
  if constexpr (kHalf) {
    if (__syncthreads_or(beyond)) sums.limit_queries(of_q, state, dq.valid);
  } else {
    __syncthreads();
  }

  // g / E: its high term takes g's place, the low one q's.
  if constexpr (kAlone) {
    auto put = [&](auto limited) {
      using Terms = TwoTerms<T, decltype(limited)::value>;
      const Terms scales[2] = {Terms(scale[0]), Terms(scale[1])};
#pragma unroll
      for (int step = 0; step < H::D / 16; ++step) {
        unsigned high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Terms& of_row = scales[i % 2];
          of_row.times(own.g[step][i], high[i], low[i]);
        }
        store_rows<H>(g.rows, high, rows, step);
        store_rows<H>(q.rows, low, rows, step);
      }
    };
    if (kHalf && __any_sync(kFullWarp, fmaxf(fabsf(scale[0]), fabsf(scale[1])) > 1.0f)) {
      put(std::true_type{});
    } else {
      put(std::false_type{});
    }
  } else {
#pragma unroll
    for (int j = 0; j < H::kTokens * H::kChunks / kThreads; ++j) {
      const int i = threadIdx.x + j * kThreads, row = i / H::kChunks;
      const TwoTerms<T, true> scale_of_row(state.row.scale[row]);
      const int at = H::at(row, i % H::kChunks);
      auto* const chunk = reinterpret_cast<Vector<unsigned, 4>*>(g.rows + at);
      Vector<unsigned, 4> high = *chunk, low;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const unsigned x = high.value[e];
        scale_of_row.times(x, high.value[e], low.value[e]);
      }
      *chunk = high;
      *reinterpret_cast<Vector<unsigned, 4>*>(q.rows + at) = low;
    }
  }
  __syncthreads();  // g / E and the weights are there
  sums.add_queries(of_q, g, q, state, dq.valid);
}

// dk and dv of a tile of keys and values; `state` holds dS and the bias of dphi(k).
template <typename T, typename H>
__device__ void key_value_gradient_tile(const State<T, H>& state, TokenTile<T, H>& k,
                                        TokenTile<T, H>& v, const TileRows<T>& dk,
                                        const TileRows<T>& dv) {
  constexpr bool kAlone = H::kGroups == 1;
  const int group = own_group<H>(), rows = own_rows<H>();
  if (!__any_sync(kFullWarp, rows < dk.valid)) return;
  const float unscale = unscale_of(state);
  unsigned of_k[H::D / 16][4], of_v[H::D / 16][4];
#pragma unroll
  for (int block = 0; block < H::kBlocks; ++block) {
    float both[2][2][4] = {};
#pragma unroll
    for (int step = 0; step < H::D / 16; ++step) {
      if (!kAlone || block == 0) load_rows<H>(of_v[step], v.rows, rows, step);
      multiply_state_columns(both, state, of_v[step], step, group * H::kBlocks + block);
    }
    unsigned(&x)[4] = of_k[block], packed[4];
    load_rows<H>(x, k.rows, rows, group * H::kBlocks + block);
    const int column = (group * H::kBlocks + block) * 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const ptx::Signs<T> signs(x[i]);
      const float2 bias = by_sign<H::D>(signs, state.z + column + i / 2 * 8 + lane_pair());
      const float2 d = by_sign(signs, both, i);
      packed[i] = ptx::pack2<T>(d.x * unscale + bias.x, d.y * unscale + bias.y);
      packed[i] = (packed[i] & ptx::nonzero2(x[i])) | ptx::nan2<T>(x[i]);
    }
    if constexpr (kAlone) {
      store_rows<H>(k.rows, packed, rows, block);
    } else {
      store_block(dk, rows, column, packed);
    }
  }
  if constexpr (kAlone) store_own_rows(dk, k);
  float product[2 * H::kBlocks][4] = {};
#pragma unroll
  for (int step = 0; step < H::D / 16; ++step) {
    unsigned phi[2][4];
    if constexpr (!kAlone) load_rows<H>(of_k[step], k.rows, rows, step);
    positive_and_negative<T>(phi, of_k[step]);
    multiply_state_rows(product, state, phi, step);
  }
#pragma unroll
  for (int block = 0; block < H::kBlocks; ++block) {
    unsigned packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* const d = &product[2 * block + i / 2][i % 2 * 2];
      packed[i] = ptx::pack2<T>(d[0] * unscale, d[1] * unscale);
    }
    if constexpr (kAlone) {
      store_rows<H>(v.rows, packed, rows, block);
    } else {
      store_block(dv, rows, (group * H::kBlocks + block) * 16, packed);
    }
  }
  if constexpr (kAlone) store_own_rows(dv, v);
}

}  // namespace
