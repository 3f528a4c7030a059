// Ripple pooling and expansion in CUDA C++: channels last, one stage or a whole pyramid.
//
// Single stages, for grids of any size:
//   1 forward        depthwise 3 x 3, stride 1 or 2 along the axis; plus, expanding, the pair term
//   2 backward       every gradient at once: a token's dx and its part of dweight are made of the
//                    same nine dout, and those of an even and its odd token make dz
// A pyramid whose grid fits in shared memory, in one launch each way:
//   3 pool_stages             x once from memory, every level once to memory
//   4 pool_stages_backward    x and the levels' gradients once, dx once
//   5 expand_stages           levels and z once, out once
//   6 expand_stages_backward  dout, levels and z once; dz and the levels' gradients once
// and for the weights' gradients
//   7 reduce         adds the splits' partial sums, in order, and rounds
//
// Decomposition: a thread has a vector of channels (16 bytes where the tensors allow, one channel
// otherwise) of one token at a time; `lanes` neighbouring threads have neighbouring vectors, so a
// warp reads whole sectors of 32 / lanes tokens. Channels never meet. In 1 and 2 a block strides
// over tokens with its weights in registers, and neighbours come from the cache. In 3 to 6 a block
// has one image at a time, up to 64 channels wide, in shared memory: the tokens of every level for a
// 3 x 3 to read, in the element type where they are inputs or results, in float32 where they are
// sums. It is as wide as leaves 48 KB and two blocks a multiprocessor.
//
// Traffic of 3 to 6, with level s of n_s tokens (n_0 = B rows cols): exactly the least, e C times
//   pool     n_0 + ... + n_S          backward  2 n_0 + n_1 + ... + n_S
//   expand   2 n_0 + n_1 + ... + n_S  backward  3 n_0 + 2 (n_1 + ... + n_S)
// plus the weights, and for their gradients a workspace of 36 or 44 bytes a split, stage and channel.
// What passes between stages stays in shared memory, and what backward needs of it is computed again:
// pooled levels from x, expanded levels from z.
//
// Sums are float32. No atomics: results repeat bit for bit.
//
// Backward, a gradient that is not asked for is not stored. Where no weight's is, variants without
// sums (kSummed false) read the gradients that came in alone, and 7 is not launched. Where some are,
// all sums are made, and 7 rounds those asked for.
#include "cuda.h"

#include "../cuda/common.cuh"

namespace {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTokensPerThread = 8;
constexpr int kTaps = 9;
constexpr int kPairTaps = 2;
constexpr int kSums = kTaps + kPairTaps;  // of a weight gradient, per channel
constexpr int kRound = 3;                 // sums that add_block_sums takes through memory at a time

// ---- vectors of channels ---------------------------------------------------------------------------

template <typename T, int kSize>
__device__ void load(float (&value)[kSize], const T* source) {
  const auto loaded = load_global(reinterpret_cast<const Vector<T, kSize>*>(source));
#pragma unroll
  for (int e = 0; e < kSize; ++e) value[e] = to_float(loaded.value[e]);
}

template <typename T, int kSize>
__device__ Vector<T, kSize> rounded(const float (&value)[kSize]) {
  Vector<T, kSize> result;
#pragma unroll
  for (int e = 0; e < kSize; ++e) result.value[e] = from_float<T>(value[e]);
  return result;
}

template <typename T, int kSize>
__device__ void store(T* target, const float (&value)[kSize]) {
  store_global(reinterpret_cast<Vector<T, kSize>*>(target), rounded<T>(value));
}

// weight[tap][e] of the channels from `channel` on: contiguous, kTaps vectors of them.
template <typename T, int kSize>
__device__ void load_weight(float (&weight)[kTaps][kSize], const T* source, int64_t channel) {
  float flat[kTaps][kSize];
#pragma unroll
  for (int i = 0; i < kTaps; ++i) load<T, kSize>(flat[i], source + channel * kTaps + i * kSize);
#pragma unroll
  for (int i = 0; i < kTaps * kSize; ++i) weight[i % kTaps][i / kTaps] = flat[i / kSize][i % kSize];
}

template <int kSize>
__device__ void add_product(float (&sum)[kSize], const float (&a)[kSize], const float (&b)[kSize]) {
#pragma unroll
  for (int e = 0; e < kSize; ++e) sum[e] += a[e] * b[e];
}

// A thread of a block that takes `lanes` vectors of channels of several tokens at once.
struct Place {
  int lane, slot, slots;
  int64_t channel;  // the thread's first
  bool inside;      // it has channels at all

  __device__ Place(int lanes, int size, int64_t channels, int64_t channel_block)
      : lane(threadIdx.x % lanes),
        slot(threadIdx.x / lanes),
        slots(kThreads / lanes),
        channel((channel_block * lanes + lane) * size),
        inside(channel < channels) {}
};

// ---- sums over a block -----------------------------------------------------------------------------
// total[i][c] += sum of sum[i] over the block's slots, in a fixed order. Every thread calls it. Both
// arrays are in shared memory with rows of lanes * kSize, an element's lanes next to one another;
// exchange has kWarps * kRound rows. Ends before all have read exchange, or written total.

template <int kCount, int kSize>
__device__ void add_block_sums(float* total, float* exchange, float (&sum)[kCount][kSize],
                               int lanes) {
  const int width = lanes * kSize;
  const int thread = threadIdx.x, lane = thread % lanes, warp = thread / kWarp;
#pragma unroll
  for (int first = 0; first < kCount; first += kRound) {
    const int count = kCount - first < kRound ? kCount - first : kRound;
    __syncthreads();  // the round before has been read
#pragma unroll
    for (int i = first; i < first + kRound && i < kCount; ++i) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        float value = sum[i][e];
        for (int other = lanes; other < kWarp; other *= 2) {
          value += __shfl_xor_sync(kFullWarp, value, other);
        }
        if (thread % kWarp < lanes) {
          exchange[(warp * kRound + i - first) * width + e * lanes + lane] = value;
        }
      }
    }
    __syncthreads();
    for (int c = thread; c < count * width; c += kThreads) {
      float value = total[first * width + c];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) value += exchange[w * kRound * width + c];
      total[first * width + c] = value;
    }
  }
}

// workspace[i][channel] = total[i][c] for `count` sums of the block's channels.
template <int kSize>
__device__ void store_block_sums(float* workspace, const float* total, int count, int lanes,
                                 int64_t channels, int64_t channel_block) {
  const int width = lanes * kSize;
  for (int c = threadIdx.x; c < count * width; c += kThreads) {
    const int i = c / width, e = c % width / lanes, lane = c % lanes;
    const int64_t channel = (channel_block * lanes + lane) * kSize + e;
    if (channel < channels) store_global(workspace + i * channels + channel, total[c]);
  }
}

// ---- single stages ---------------------------------------------------------------------------------

template <typename T>
struct Ripple {
  Rows<const T> x, z;
  Rows<T> out, dx, dz;
  const T* weight;
  const T* pair_weight;  // null when pooling
  int axis, row_stride, col_stride, lanes;
  int64_t batch, rows, cols, channels;   // of x
  int64_t out_rows, out_cols;            // of out
  int64_t num_splits, tokens_per_split;  // kernel 2
  float* workspace;                      // [num_splits][kSums][channels]
};

struct Token {
  int64_t batch, row, col;

  __device__ Token(int64_t index, int64_t rows, int64_t cols) {
    if (index >> 32 == 0 && cols >> 32 == 0) {  // a 64-bit division is a hundred instructions
      const uint32_t i = static_cast<uint32_t>(index), n = static_cast<uint32_t>(cols);
      const uint32_t line = i / n, m = static_cast<uint32_t>(rows);
      batch = rows >> 32 == 0 ? line / m : 0;
      row = line - batch * rows;
      col = i - line * n;
    } else {
      batch = index / cols / rows;
      row = index / cols % rows;
      col = index % cols;
    }
  }
};

// 1 forward

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) forward_kernel(Ripple<T> p) {
  const int64_t tokens = p.batch * p.out_rows * p.out_cols;
  const int64_t channel_blocks = (p.channels + p.lanes * kSize - 1) / (p.lanes * kSize);
  const Place place(p.lanes, kSize, p.channels, blockIdx.x % channel_blocks);
  if (!place.inside) return;
  float weight[kTaps][kSize];
  load_weight<T, kSize>(weight, p.weight, place.channel);
  const int64_t first = blockIdx.x / channel_blocks * (place.slots * kTokensPerThread);
#pragma unroll 1
  for (int i = 0; i < kTokensPerThread; ++i) {
    const int64_t index = first + i * place.slots + place.slot;
    if (index >= tokens) return;
    const Token token(index, p.out_rows, p.out_cols);
    float sum[kSize] = {};
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      const int64_t row = token.row * p.row_stride + tap / 3 - 1;
      const int64_t col = token.col * p.col_stride + tap % 3 - 1;
      if (row < 0 || row >= p.rows || col < 0 || col >= p.cols) continue;
      float x[kSize];
      load<T, kSize>(x, p.x.at(token.batch, row, col) + place.channel);
      add_product(sum, weight[tap], x);
    }
    if (p.pair_weight) {
      const int64_t along = p.axis == 0 ? token.row : token.col;
      const int64_t row = p.axis == 0 ? token.row / 2 : token.row;
      const int64_t col = p.axis == 0 ? token.col : token.col / 2;
      float z[kSize], pair[kSize];
      load<T, kSize>(z, p.z.at(token.batch, row, col) + place.channel);
      load<T, kSize>(pair, p.pair_weight + along % 2 * p.channels + place.channel);
      add_product(sum, pair, z);
    }
    store<T, kSize>(p.out.at(token.batch, token.row, token.col) + place.channel, sum);
  }
}

// 2 backward
// x[r, c] met weight tap (i, j) in out[(r + 1 - i) / row_stride, (c + 1 - j) / col_stride], where
// these divide: dx is a sum over taps, dweight a sum over tokens, of the same nine dout.

template <typename T, int kSize, bool kPairs, bool kSummed>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(Ripple<T> p) {
  const int64_t channel_blocks = (p.channels + p.lanes * kSize - 1) / (p.lanes * kSize);
  const int64_t channel_block = blockIdx.x % channel_blocks, split = blockIdx.x / channel_blocks;
  const Place place(p.lanes, kSize, p.channels, channel_block);
  const int64_t tokens = p.batch * p.rows * p.cols;
  const int64_t begin = split * p.tokens_per_split;
  const int64_t end = begin + p.tokens_per_split < tokens ? begin + p.tokens_per_split : tokens;

  float sum[kPairs ? kSums : kTaps][kSize] = {};
  if (place.inside) {
    float weight[kTaps][kSize];
    load_weight<T, kSize>(weight, p.weight, place.channel);
#pragma unroll 1
    for (int64_t index = begin + place.slot; index < end; index += place.slots) {
      const Token token(index, p.rows, p.cols);
      float x[kSize], dx[kSize] = {};
      float own[kSize] = {}, next[kSize] = {};  // dout of this token, and of the one after it
      if constexpr (kSummed) {
        load<T, kSize>(x, p.x.at(token.batch, token.row, token.col) + place.channel);
      }
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const int64_t row = token.row + 1 - tap / 3, col = token.col + 1 - tap % 3;
        if (row < 0 || col < 0) continue;
        if (!kPairs && (row % p.row_stride != 0 || col % p.col_stride != 0)) continue;
        const int64_t out_row = kPairs ? row : row / p.row_stride;
        const int64_t out_col = kPairs ? col : col / p.col_stride;
        if (out_row >= p.out_rows || out_col >= p.out_cols) continue;
        float g[kSize];
        load<T, kSize>(g, p.out.at(token.batch, out_row, out_col) + place.channel);
        add_product(dx, weight[tap], g);
        if constexpr (kSummed) add_product(sum[tap], x, g);
        if constexpr (kPairs) {
          if (tap == 4) {
#pragma unroll
            for (int e = 0; e < kSize; ++e) own[e] = g[e];
          } else if (tap == 1 || tap == 3) {  // the next row, the next column
            if ((tap == 1) == (p.axis == 0)) {
#pragma unroll
              for (int e = 0; e < kSize; ++e) next[e] = g[e];
            }
          }
        }
      }
      if (p.dx.data) {
        store<T, kSize>(p.dx.at(token.batch, token.row, token.col) + place.channel, dx);
      }
      if constexpr (kPairs) {
        const int64_t row = p.axis == 0 ? token.row / 2 : token.row;
        const int64_t col = p.axis == 0 ? token.col : token.col / 2;
        const bool odd = (p.axis == 0 ? token.row : token.col) % 2 != 0;
        if constexpr (kSummed) {
          float z[kSize];
          load<T, kSize>(z, p.z.at(token.batch, row, col) + place.channel);
          if (odd) {
            add_product(sum[kTaps + 1], own, z);
          } else {
            add_product(sum[kTaps], own, z);
          }
        }
        if (!odd && p.dz.data) {
          float pair[kSize], dz[kSize] = {};
          load<T, kSize>(pair, p.pair_weight + place.channel);
          add_product(dz, pair, own);
          load<T, kSize>(pair, p.pair_weight + p.channels + place.channel);
          add_product(dz, pair, next);  // 0 where an odd size cuts the last pair
          store<T, kSize>(p.dz.at(token.batch, row, col) + place.channel, dz);
        }
      }
    }
  }

  if constexpr (kSummed) {
    constexpr int kCount = kPairs ? kSums : kTaps;
    const int width = p.lanes * kSize;
    float* const total = shared_memory();
    for (int c = threadIdx.x; c < kCount * width; c += kThreads) total[c] = 0.0f;
    add_block_sums(total, total + kSums * width, sum, p.lanes);
    __syncthreads();
    store_block_sums<kSize>(p.workspace + split * kSums * p.channels, total, kCount, p.lanes,
                            p.channels, channel_block);
  }
}

// ---- pyramids in shared memory ---------------------------------------------------------------------

template <typename T>
struct Stages {
  Rows<T> level[kMostStages + 1], gradient[kMostStages + 1], out;
  const T* weight[kMostStages];
  const T* pair_weight[kMostStages];
  int num_stages, lanes;
  int axes[kMostStages];
  int rows[kMostStages + 1], cols[kMostStages + 1];   // of a level
  int tokens[kMostStages + 1];                        // of a level of one image
  int first[kMostStages + 2];                         // tokens of the finer levels together
  int64_t batch, channels, num_splits;
  float* workspace;  // [num_splits][num_stages][kSums][channels]
};

// Shared memory of kernels 3 to 6, in this order: tokens in the element type, tokens in float32,
// block sums and their exchange.
struct Shared {
  int64_t elements, floats, sums;  // tokens, tokens, rows of lanes * size floats

  __host__ __device__ static int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }
  __host__ __device__ int64_t floats_at(int64_t token_elements, int64_t element_size) const {
    return aligned(elements * token_elements * element_size);
  }
  __host__ __device__ int64_t sums_at(int64_t token_elements, int64_t element_size) const {
    return floats_at(token_elements, element_size) + aligned(floats * token_elements * 4);
  }
  __host__ __device__ int64_t bytes(int64_t token_elements, int64_t element_size) const {
    return sums_at(token_elements, element_size) + sums * token_elements * 4;
  }
};

template <typename T>
__host__ __device__ Shared pool_shared(const Stages<T>& p) {
  return {p.first[p.num_stages], 0, 0};
}
template <typename T>
__host__ __device__ Shared pool_backward_shared(const Stages<T>& p) {
  return {p.first[p.num_stages], p.first[p.num_stages + 1] - p.first[1],
          p.num_stages * kTaps + kWarps * kRound};
}
template <typename T>
__host__ __device__ Shared expand_shared(const Stages<T>& p) {
  return {p.first[p.num_stages], p.first[p.num_stages] - p.first[1], 0};
}
template <typename T>
__host__ __device__ Shared expand_backward_shared(const Stages<T>& p) {
  return {p.first[p.num_stages],
          p.first[p.num_stages] + p.first[p.num_stages + 1] - 2 * p.first[1],
          p.num_stages * kSums + kWarps * kRound};
}

// Tokens of several levels in the element type: [token][lane].
template <typename T, int kSize>
struct Elements {
  Vector<T, kSize>* data;
  int lanes, lane;

  __device__ Vector<T, kSize>& at(int token) const { return data[token * lanes + lane]; }
  __device__ void read(float (&value)[kSize], int token) const {
    const Vector<T, kSize> loaded = at(token);
#pragma unroll
    for (int e = 0; e < kSize; ++e) value[e] = to_float(loaded.value[e]);
  }
};

// The same in float32, by quarters of 16 bytes so that neighbouring lanes meet no bank conflict:
// [token][quarter][lane].
template <int kSize>
struct Floats {
  static constexpr int kPart = kSize < 4 ? kSize : 4;
  Vector<float, kPart>* data;
  int lanes, lane;

  __device__ Floats(void* memory, int lanes, int lane)
      : data(static_cast<Vector<float, kPart>*>(memory)), lanes(lanes), lane(lane) {}
  __device__ void read(float (&value)[kSize], int token) const {
#pragma unroll
    for (int q = 0; q < kSize / kPart; ++q) {
      const auto part = data[(token * (kSize / kPart) + q) * lanes + lane];
#pragma unroll
      for (int e = 0; e < kPart; ++e) value[q * kPart + e] = part.value[e];
    }
  }
  __device__ void write(int token, const float (&value)[kSize]) const {
#pragma unroll
    for (int q = 0; q < kSize / kPart; ++q) {
      Vector<float, kPart> part;
#pragma unroll
      for (int e = 0; e < kPart; ++e) part.value[e] = value[q * kPart + e];
      data[(token * (kSize / kPart) + q) * lanes + lane] = part;
    }
  }
};

// elements[first token + i] = the level's token i of one image.
template <typename T, int kSize>
__device__ void load_level(const Elements<T, kSize>& elements, int first, const Rows<T>& level,
                           int64_t image, int tokens, int cols, const Place& place) {
#pragma unroll 4
  for (int i = place.slot; i < tokens; i += place.slots) {
    const T* const source = level.at(image, i / cols, i % cols) + place.channel;
    elements.at(first + i) = load_global(reinterpret_cast<const Vector<T, kSize>*>(source));
  }
}

// sum += the 3 x 3 around (row, col) of a grid in `elements`.
template <typename T, int kSize>
__device__ void add_window(float (&sum)[kSize], const float (&weight)[kTaps][kSize],
                           const Elements<T, kSize>& elements, int first, int row, int col,
                           int rows, int cols) {
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    const int r = row + tap / 3 - 1, c = col + tap % 3 - 1;
    if (r < 0 || r >= rows || c < 0 || c >= cols) continue;
    float x[kSize];
    elements.read(x, first + r * cols + c);
    add_product(sum, weight[tap], x);
  }
}

// 3 pool_stages. A block: one image, lanes * kSize channels.

// Level s + 1 of an image from level s in `elements`: to be kept there, to global memory, or both.
template <typename T, int kSize>
__device__ void pool_level(const Stages<T>& p, const Elements<T, kSize>& elements,
                           const Place& place, int s, int64_t image, bool keep, bool output) {
  float weight[kTaps][kSize];
  load_weight<T, kSize>(weight, p.weight[s], place.channel);
  const int row_stride = p.axes[s] == 0 ? 2 : 1, col_stride = p.axes[s] == 0 ? 1 : 2;
  const int cols = p.cols[s + 1];
#pragma unroll 1
  for (int i = place.slot; i < p.tokens[s + 1]; i += place.slots) {
    const int row = i / cols, col = i % cols;
    float sum[kSize] = {};
    add_window(sum, weight, elements, p.first[s], row * row_stride, col * col_stride, p.rows[s],
               p.cols[s]);
    const Vector<T, kSize> result = rounded<T>(sum);
    if (keep) elements.at(p.first[s + 1] + i) = result;
    if (output) {
      T* const target = p.level[s + 1].at(image, row, col) + place.channel;
      store_global(reinterpret_cast<Vector<T, kSize>*>(target), result);
    }
  }
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) pool_stages_kernel(Stages<T> p) {
  const int64_t channel_blocks = (p.channels + p.lanes * kSize - 1) / (p.lanes * kSize);
  const Place place(p.lanes, kSize, p.channels, blockIdx.x % channel_blocks);
  const int64_t image = blockIdx.x / channel_blocks;
  const Elements<T, kSize> elements{reinterpret_cast<Vector<T, kSize>*>(shared_memory()), p.lanes,
                                    place.lane};
  if (place.inside) {
    load_level(elements, 0, p.level[0], image, p.tokens[0], p.cols[0], place);
  }
#pragma unroll 1
  for (int s = 0; s < p.num_stages; ++s) {
    __syncthreads();  // level s is there
    if (place.inside) pool_level(p, elements, place, s, image, s + 1 < p.num_stages, true);
  }
}

// 4 pool_stages_backward. A block: a split of the images in turn, lanes * kSize channels. Levels are
// pooled again, from x: they come out as they were rounded. Then from the coarsest down, the total
// gradient of level s is its own plus what stage s brings back from level s + 1.

template <typename T, int kSize, bool kSummed>
__global__ void __launch_bounds__(kThreads, 1) pool_stages_backward_kernel(Stages<T> p) {
  const int64_t channel_blocks = (p.channels + p.lanes * kSize - 1) / (p.lanes * kSize);
  const int64_t channel_block = blockIdx.x % channel_blocks, split = blockIdx.x / channel_blocks;
  const Place place(p.lanes, kSize, p.channels, channel_block);
  const int width = p.lanes * kSize, last = p.num_stages;
  char* const memory = reinterpret_cast<char*>(shared_memory());
  const Shared shared = pool_backward_shared(p);
  const Elements<T, kSize> elements{reinterpret_cast<Vector<T, kSize>*>(memory), p.lanes,
                                    place.lane};  // levels 0 to S - 1
  const Floats<kSize> gradient(memory + shared.floats_at(width, sizeof(T)), p.lanes,
                               place.lane);  // of levels 1 to S
  float* const total = reinterpret_cast<float*>(memory + shared.sums_at(width, sizeof(T)));
  float* const exchange = total + last * kTaps * width;
  if constexpr (kSummed) {
    for (int c = threadIdx.x; c < last * kTaps * width; c += kThreads) total[c] = 0.0f;
  }

#pragma unroll 1
  for (int64_t image = split; image < p.batch; image += p.num_splits) {
    if constexpr (!kSummed) __syncthreads();  // the image before has been read
    // add_block_sums has met since the image before was read
    if (place.inside) {
      if constexpr (kSummed) {
        load_level(elements, 0, p.level[0], image, p.tokens[0], p.cols[0], place);
      }
#pragma unroll 1
      for (int i = place.slot; i < p.tokens[last]; i += place.slots) {
        float g[kSize];
        load<T, kSize>(
            g, p.gradient[last].at(image, i / p.cols[last], i % p.cols[last]) + place.channel);
        gradient.write(p.first[last] - p.first[1] + i, g);
      }
    }
#pragma unroll 1
    for (int s = 0; kSummed && s + 1 < last; ++s) {
      __syncthreads();  // level s is there, to be pooled again
      if (place.inside) pool_level(p, elements, place, s, image, true, false);
    }
#pragma unroll 1
    for (int s = last - 1; s >= 0; --s) {
      __syncthreads();  // the gradient of level s + 1 is there
      float sum[kTaps][kSize] = {};
      if (place.inside) {
        float weight[kTaps][kSize];
        load_weight<T, kSize>(weight, p.weight[s], place.channel);
        const int row_shift = p.axes[s] == 0, col_shift = p.axes[s] != 0;  // of a stride of 2
        const int cols = p.cols[s], coarse = p.first[s + 1] - p.first[1];
#pragma unroll 1
        for (int i = place.slot; i < p.tokens[s]; i += place.slots) {
          const int row = i / cols, col = i % cols;
          float x[kSize], dx[kSize] = {};
          if constexpr (kSummed) elements.read(x, p.first[s] + i);
          if (s > 0) load<T, kSize>(dx, p.gradient[s].at(image, row, col) + place.channel);
#pragma unroll
          for (int tap = 0; tap < kTaps; ++tap) {
            const int r = row + 1 - tap / 3, c = col + 1 - tap % 3;
            if (r < 0 || c < 0 || (r & row_shift) || (c & col_shift)) continue;
            const int out_row = r >> row_shift, out_col = c >> col_shift;
            if (out_row >= p.rows[s + 1] || out_col >= p.cols[s + 1]) continue;
            float g[kSize];
            gradient.read(g, coarse + out_row * p.cols[s + 1] + out_col);
            add_product(dx, weight[tap], g);
            if constexpr (kSummed) add_product(sum[tap], x, g);
          }
          if (s > 0) {
            gradient.write(p.first[s] - p.first[1] + i, dx);
          } else if (p.gradient[0].data) {
            store<T, kSize>(p.gradient[0].at(image, row, col) + place.channel, dx);
          }
        }
      }
      if constexpr (kSummed) add_block_sums(total + s * kTaps * width, exchange, sum, p.lanes);
    }
  }
  if constexpr (!kSummed) return;
  __syncthreads();
  for (int s = 0; s < last; ++s) {
    store_block_sums<kSize>(p.workspace + (split * last + s) * kSums * p.channels,
                            total + s * kTaps * width, kTaps, p.lanes, p.channels, channel_block);
  }
}

// 5 expand_stages. A block: one image, lanes * kSize channels. A thread has a coarse token at a
// time and makes the two fine ones of it, so a coarse token is read once.

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) expand_stages_kernel(Stages<T> p) {
  const int64_t channel_blocks = (p.channels + p.lanes * kSize - 1) / (p.lanes * kSize);
  const Place place(p.lanes, kSize, p.channels, blockIdx.x % channel_blocks);
  const int64_t image = blockIdx.x / channel_blocks;
  char* const memory = reinterpret_cast<char*>(shared_memory());
  const Elements<T, kSize> elements{reinterpret_cast<Vector<T, kSize>*>(memory), p.lanes,
                                    place.lane};
  const Floats<kSize> expanded(memory + expand_shared(p).floats_at(p.lanes * kSize, sizeof(T)),
                               p.lanes, place.lane);  // levels 1 to S - 1
  if (place.inside) {
    for (int s = p.num_stages - 1; s >= 0; --s) {
      load_level(elements, p.first[s], p.level[s], image, p.tokens[s], p.cols[s], place);
    }
  }
#pragma unroll 1
  for (int s = p.num_stages - 1; s >= 0; --s) {
    __syncthreads();  // level s is there, and the expanded level s + 1
    if (!place.inside) continue;
    float weight[kTaps][kSize], pair[kPairTaps][kSize];
    load_weight<T, kSize>(weight, p.weight[s], place.channel);
#pragma unroll
    for (int parity = 0; parity < kPairTaps; ++parity) {
      load<T, kSize>(pair[parity], p.pair_weight[s] + parity * p.channels + place.channel);
    }
    const int rows = p.rows[s], cols = p.cols[s], coarse_cols = p.cols[s + 1];
#pragma unroll 1
    for (int i = place.slot; i < p.tokens[s + 1]; i += place.slots) {
      const int coarse_row = i / coarse_cols, coarse_col = i % coarse_cols;
      float z[kSize];
      if (s + 1 == p.num_stages) {
        load<T, kSize>(z, p.level[s + 1].at(image, coarse_row, coarse_col) + place.channel);
      } else {
        expanded.read(z, p.first[s + 1] - p.first[1] + i);
      }
#pragma unroll
      for (int parity = 0; parity < kPairTaps; ++parity) {
        const int row = p.axes[s] == 0 ? coarse_row * 2 + parity : coarse_row;
        const int col = p.axes[s] == 0 ? coarse_col : coarse_col * 2 + parity;
        if (row >= rows || col >= cols) continue;  // an odd size cuts the last pair
        float sum[kSize] = {};
        add_window(sum, weight, elements, p.first[s], row, col, rows, cols);
        add_product(sum, pair[parity], z);
        if (s > 0) {
          expanded.write(p.first[s] - p.first[1] + row * cols + col, sum);
        } else {
          store<T, kSize>(p.out.at(image, row, col) + place.channel, sum);
        }
      }
    }
  }
}

// 6 expand_stages_backward. A block: a split of the images in turn, lanes * kSize channels. Down: the
// expanded levels again, from z. Up: their gradients, from dout to dz, and on the way those of the
// pair weights. Then every level's own gradient and its lateral weight's.

template <typename T, int kSize, bool kSummed>
__global__ void __launch_bounds__(kThreads, 1) expand_stages_backward_kernel(Stages<T> p) {
  const int64_t channel_blocks = (p.channels + p.lanes * kSize - 1) / (p.lanes * kSize);
  const int64_t channel_block = blockIdx.x % channel_blocks, split = blockIdx.x / channel_blocks;
  const Place place(p.lanes, kSize, p.channels, channel_block);
  const int width = p.lanes * kSize, last = p.num_stages;
  char* const memory = reinterpret_cast<char*>(shared_memory());
  const Shared shared = expand_backward_shared(p);
  // dout in the place of level 0, then levels 1 to S - 1.
  const Elements<T, kSize> elements{reinterpret_cast<Vector<T, kSize>*>(memory), p.lanes,
                                    place.lane};
  // The gradients of the expanded levels 1 to S - 1, then the expanded levels 1 to S, S being z.
  const Floats<kSize> floats(memory + shared.floats_at(width, sizeof(T)), p.lanes, place.lane);
  const int gradients = -p.first[1], expanded = p.first[last] - 2 * p.first[1];
  float* const total = reinterpret_cast<float*>(memory + shared.sums_at(width, sizeof(T)));
  float* const exchange = total + last * kSums * width;
  if constexpr (kSummed) {
    for (int c = threadIdx.x; c < last * kSums * width; c += kThreads) total[c] = 0.0f;
  }

  const auto add_pair = [&](float (&sum)[kSize], int s, int parity, const float (&x)[kSize]) {
    float pair[kSize];
    load<T, kSize>(pair, p.pair_weight[s] + parity * p.channels + place.channel);
    add_product(sum, pair, x);
  };

#pragma unroll 1
  for (int64_t image = split; image < p.batch; image += p.num_splits) {
    if constexpr (!kSummed) __syncthreads();  // the image before has been read
    // add_block_sums has met since the image before was read
    if (place.inside) {
      load_level(elements, 0, p.out, image, p.tokens[0], p.cols[0], place);
      for (int s = 1; kSummed && s < last; ++s) {
        load_level(elements, p.first[s], p.level[s], image, p.tokens[s], p.cols[s], place);
      }
#pragma unroll 1
      for (int i = place.slot; kSummed && i < p.tokens[last]; i += place.slots) {
        float z[kSize];
        load<T, kSize>(
            z, p.level[last].at(image, i / p.cols[last], i % p.cols[last]) + place.channel);
        floats.write(expanded + p.first[last] + i, z);
      }
    }

#pragma unroll 1
    for (int s = last - 1; kSummed && s > 0; --s) {  // down
      __syncthreads();  // the expanded level s + 1 is there, and level s
      if (!place.inside) continue;
      float weight[kTaps][kSize];
      load_weight<T, kSize>(weight, p.weight[s], place.channel);
      const int rows = p.rows[s], cols = p.cols[s];
#pragma unroll 1
      for (int i = place.slot; i < p.tokens[s]; i += place.slots) {
        const int row = i / cols, col = i % cols;
        const int coarse = p.axes[s] == 0 ? row / 2 * cols + col : row * p.cols[s + 1] + col / 2;
        float sum[kSize] = {}, z[kSize];
        add_window(sum, weight, elements, p.first[s], row, col, rows, cols);
        floats.read(z, expanded + p.first[s + 1] + coarse);
        add_pair(sum, s, (p.axes[s] == 0 ? row : col) % 2, z);
        floats.write(expanded + p.first[s] + i, sum);
      }
    }

#pragma unroll 1
    for (int s = 0; s < last; ++s) {  // up
      __syncthreads();  // the gradient of the expanded level s is there, and that level
      float sum[kPairTaps][kSize] = {};
      if (place.inside) {
        const int rows = p.rows[s], cols = p.cols[s], coarse_cols = p.cols[s + 1];
#pragma unroll 1
        for (int i = place.slot; i < p.tokens[s + 1]; i += place.slots) {
          const int coarse_row = i / coarse_cols, coarse_col = i % coarse_cols;
          float z[kSize], dz[kSize] = {};
          if constexpr (kSummed) floats.read(z, expanded + p.first[s + 1] + i);
#pragma unroll
          for (int parity = 0; parity < kPairTaps; ++parity) {
            const int row = p.axes[s] == 0 ? coarse_row * 2 + parity : coarse_row;
            const int col = p.axes[s] == 0 ? coarse_col : coarse_col * 2 + parity;
            if (row >= rows || col >= cols) continue;
            float g[kSize];
            if (s == 0) {
              elements.read(g, row * cols + col);
            } else {
              floats.read(g, gradients + p.first[s] + row * cols + col);
            }
            add_pair(dz, s, parity, g);
            if constexpr (kSummed) add_product(sum[parity], z, g);
          }
          if (s + 1 < last) {
            floats.write(gradients + p.first[s + 1] + i, dz);
          } else if (p.gradient[last].data) {
            store<T, kSize>(p.gradient[last].at(image, coarse_row, coarse_col) + place.channel, dz);
          }
        }
      }
      if constexpr (kSummed) {
        add_block_sums(total + (s * kSums + kTaps) * width, exchange, sum, p.lanes);
      }
    }

#pragma unroll 1
    for (int s = 0; s < last; ++s) {
      float sum[kTaps][kSize] = {};
      if (place.inside) {
        float weight[kTaps][kSize];
        load_weight<T, kSize>(weight, p.weight[s], place.channel);
        const int rows = p.rows[s], cols = p.cols[s], first = p.first[s];
#pragma unroll 1
        for (int i = place.slot; i < p.tokens[s]; i += place.slots) {
          const int row = i / cols, col = i % cols;
          float x[kSize], dx[kSize] = {};
          if constexpr (kSummed) {
            if (s == 0) {
              load<T, kSize>(x, p.level[0].at(image, row, col) + place.channel);
            } else {
              elements.read(x, first + i);
            }
          }
#pragma unroll
          for (int tap = 0; tap < kTaps; ++tap) {
            const int r = row + 1 - tap / 3, c = col + 1 - tap % 3;
            if (r < 0 || r >= rows || c < 0 || c >= cols) continue;
            float g[kSize];
            if (s == 0) {
              elements.read(g, r * cols + c);
            } else {
              floats.read(g, gradients + first + r * cols + c);
            }
            add_product(dx, weight[tap], g);
            if constexpr (kSummed) add_product(sum[tap], x, g);
          }
          if (p.gradient[s].data) {
            store<T, kSize>(p.gradient[s].at(image, row, col) + place.channel, dx);
          }
        }
      }
      if constexpr (kSummed) add_block_sums(total + s * kSums * width, exchange, sum, p.lanes);
    }
  }
  if constexpr (!kSummed) return;
  __syncthreads();
  store_block_sums<kSize>(p.workspace + split * last * kSums * p.channels, total, last * kSums,
                          p.lanes, p.channels, channel_block);
}

// ---- 7 reduce --------------------------------------------------------------------------------------

struct Reduce {
  const float* partials;  // [num_splits][num_stages][kSums][channels]
  int64_t num_splits, num_stages, channels;
  int32_t element;                  // of the weights
  void* dweight[kMostStages];       // (channels, kTaps), or null
  void* dpair_weight[kMostStages];  // (kPairTaps, channels), or null
};

__device__ inline void store_element(void* target, int64_t index, float x, int32_t element) {
  if (element == kFloat32) {
    store_global(static_cast<float*>(target) + index, x);
  } else if (element == kFloat16) {
    store_global(static_cast<__half*>(target) + index, from_float<__half>(x));
  } else {
    store_global(static_cast<__nv_bfloat16*>(target) + index, from_float<__nv_bfloat16>(x));
  }
}

__global__ void __launch_bounds__(kThreads) reduce_kernel(Reduce p) {
  const int64_t size = kSums * p.channels;
  const unsigned blocks_per_stage = static_cast<unsigned>((size + kThreads - 1) / kThreads);
  const int s = blockIdx.x / blocks_per_stage;
  const int64_t i = blockIdx.x % blocks_per_stage * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t tap = i / p.channels, channel = i % p.channels;
  void *dweight = nullptr, *dpair_weight = nullptr;
#pragma unroll
  for (int stage = 0; stage < kMostStages; ++stage) {  // an index would put the struct in memory
    if (stage == s) dweight = p.dweight[stage], dpair_weight = p.dpair_weight[stage];
  }
  if (i >= size || !(tap < kTaps ? dweight : dpair_weight)) return;
  const float* const partials = p.partials + s * size + i;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t split = 0; split < p.num_splits; ++split) {
    sum += load_global(partials + split * p.num_stages * size);
  }
  if (tap < kTaps) {
    store_element(dweight, channel * kTaps + tap, sum, p.element);
  } else {
    store_element(dpair_weight, (tap - kTaps) * p.channels + channel, sum, p.element);
  }
}

cudaError_t launch_reduce(const Reduce& p, cudaStream_t stream) {
  return launch(reduce_kernel, p.num_stages * ceil_div(kSums * p.channels, kThreads), 0, stream,
                p);
}

// ---- choices ---------------------------------------------------------------------------------------

bool is_wide(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int64_t channel_blocks(int64_t channels, int64_t width) { return ceil_div(channels, width); }

// Lanes of the single-stage kernels: 128 to 256 bytes of a token, and few idle ones.
int token_lanes(int64_t channels, int size) {
  const int64_t vectors = ceil_div(channels, size);
  if (size == 1) return vectors <= 8 ? 8 : kWarp;
  return vectors % 16 == 0 ? 16 : vectors > 4 ? 8 : 4;
}

// function(integral_constant<int, elements a thread reads at once>)
template <typename T, typename Function>
cudaError_t for_vector_size(bool wide, Function function) {
  return wide ? function(std::integral_constant<int, kWide<T>>{})
              : function(std::integral_constant<int, 1>{});
}

template <typename T>
Ripple<T> parameters(const RippleArguments& p) {
  const int row_stride = p.axis == 0 ? p.stride : 1, col_stride = p.axis == 1 ? p.stride : 1;
  return {rows_of<const T>(p.x),
          rows_of<const T>(p.z),
          rows_of<T>(p.out),
          rows_of<T>(p.dx),
          rows_of<T>(p.dz),
          static_cast<const T*>(p.weight),
          static_cast<const T*>(p.pair_weight),
          p.axis,
          row_stride,
          col_stride,
          0,
          p.batch,
          p.rows,
          p.cols,
          p.channels,
          ceil_div(p.rows, row_stride),
          ceil_div(p.cols, col_stride),
          p.num_splits,
          ceil_div(p.batch * p.rows * p.cols, p.num_splits),
          p.workspace};
}

// function(parameters, vector size); unused views are wide.
template <typename Function>
cudaError_t for_stage(const RippleArguments& arguments, Function function) {
  return for_element_type(arguments.element, [&](auto type) {
    using T = typename decltype(type)::type;
    Ripple<T> p = parameters<T>(arguments);
    const bool wide = p.channels % kWide<T> == 0 && p.x.wide && p.z.wide && p.out.wide &&
                      p.dx.wide && p.dz.wide && is_wide(p.weight) && is_wide(p.pair_weight);
    return for_vector_size<T>(wide, [&](auto size) {
      p.lanes = token_lanes(p.channels, decltype(size)::value);
      return function(p, size);
    });
  });
}

template <typename T>
Stages<T> parameters(const RippleStagesArguments& a) {
  Stages<T> p{};
  p.num_stages = a.num_stages;
  p.batch = a.batch;
  p.channels = a.channels;
  p.num_splits = a.num_splits;
  p.workspace = a.workspace;
  p.out = rows_of<T>(a.out);
  int64_t rows = a.rows, cols = a.cols;
  for (int s = 0; s <= a.num_stages; ++s) {
    p.level[s] = rows_of<T>(a.level[s]);
    p.gradient[s] = rows_of<T>(a.gradient[s]);
    p.rows[s] = static_cast<int>(rows);
    p.cols[s] = static_cast<int>(cols);
    p.tokens[s] = p.rows[s] * p.cols[s];
    p.first[s + 1] = p.first[s] + p.tokens[s];
    if (s == a.num_stages) break;
    p.axes[s] = a.axes[s];
    p.weight[s] = static_cast<const T*>(a.weight[s]);
    p.pair_weight[s] = static_cast<const T*>(a.pair_weight[s]);
    (a.axes[s] == 0 ? rows : cols) = ceil_div(a.axes[s] == 0 ? rows : cols, 2);
  }
  return p;
}

// As many lanes as leave the shared memory for four blocks on the larger multiprocessors (227 KB),
// two on the smaller (99 KB), and two blocks a multiprocessor in the grid; 0 where even one lane has
// no room. Not fewer than a 32-byte sector for the sake of more blocks.
template <typename T>
int image_lanes(const Stages<T>& p, const Shared& shared, int size, int64_t multiprocessors) {
  constexpr int64_t kPreferred = 48 * 1024, kMost = kSharedLimit, kWidest = 64;
  const auto bytes = [&](int lanes) { return shared.bytes(lanes * size, sizeof(T)); };
  const auto blocks = [&](int lanes) { return p.batch * channel_blocks(p.channels, lanes * size); };
  int lanes = size == 1 ? kWarp : static_cast<int>(kWidest) / size;
  while (lanes > 1 && lanes / 2 * size >= p.channels) lanes /= 2;
  while (lanes > 1 && bytes(lanes) > kPreferred) lanes /= 2;
  while (lanes * size * sizeof(T) > 32 && blocks(lanes) < 2 * multiprocessors) lanes /= 2;
  return bytes(lanes) <= kMost ? lanes : 0;
}

// function(parameters, vector size, bytes of shared memory)
template <typename SharedOf, typename Function>
cudaError_t for_stages(const RippleStagesArguments& arguments, SharedOf shared_of,
                       Function function) {
  constexpr int64_t kMostTokens = 1 << 16;  // sizes are 32-bit from here on
  if (arguments.num_stages < 1 || arguments.num_stages > kMostStages ||
      arguments.rows * arguments.cols > kMostTokens) {
    return cudaErrorInvalidValue;
  }
  return for_element_type(arguments.element, [&](auto type) {
    using T = typename decltype(type)::type;
    Stages<T> p = parameters<T>(arguments);
    bool wide = p.channels % kWide<T> == 0 && p.out.wide;
    for (int s = 0; s <= p.num_stages; ++s) wide = wide && p.level[s].wide && p.gradient[s].wide;
    for (int s = 0; s < p.num_stages; ++s) {
      wide = wide && is_wide(p.weight[s]) && is_wide(p.pair_weight[s]);
    }
    const Shared shared = shared_of(p);
    return for_vector_size<T>(wide, [&](auto size) {
      constexpr int kSize = decltype(size)::value;
      p.lanes = image_lanes(p, shared, kSize, arguments.multiprocessors);
      if (p.lanes == 0) return cudaErrorInvalidValue;
      return function(p, size, shared.bytes(p.lanes * kSize, sizeof(T)));
    });
  });
}

// Two blocks a multiprocessor, of whole images; at most 512 images in one float32 sum.
int64_t image_splits(int64_t batch, int64_t blocks_of_channels, int64_t multiprocessors) {
  const int64_t wanted = ceil_div(2 * multiprocessors, blocks_of_channels);
  const int64_t fewest = ceil_div(batch, 512);
  const int64_t splits = wanted < batch ? wanted : batch;
  return splits > fewest ? splits : fewest > 0 ? fewest : 1;
}

template <typename T>
Reduce reduction(const RippleStagesArguments& a, const Stages<T>& p) {
  Reduce r{p.workspace, p.num_splits, p.num_stages, p.channels, a.element, {}, {}};
  for (int s = 0; s < p.num_stages; ++s) {
    r.dweight[s] = a.dweight[s];
    r.dpair_weight[s] = a.dpair_weight[s];
  }
  return r;
}

constexpr auto kPoolShared = [](const auto& p) { return pool_shared(p); };
constexpr auto kPoolBackwardShared = [](const auto& p) { return pool_backward_shared(p); };
constexpr auto kExpandShared = [](const auto& p) { return expand_shared(p); };
constexpr auto kExpandBackwardShared = [](const auto& p) { return expand_backward_shared(p); };

}  // namespace

// ---- launchers -------------------------------------------------------------------------------------

extern "C" int64_t ripple_num_splits(int64_t tokens, int64_t channels, int64_t multiprocessors) {
  constexpr int64_t kFewestTokens = 64;
  constexpr int64_t kMostTokens = 4096;  // 512 a thread at most: float32 sums of more lose too much
  if (tokens == 0 || channels == 0) return 1;
  const int64_t wanted = ceil_div(2 * multiprocessors, channel_blocks(channels, 128));
  const int64_t most = ceil_div(tokens, kFewestTokens), fewest = ceil_div(tokens, kMostTokens);
  const int64_t splits = wanted < most ? wanted : most;
  return splits > fewest ? splits : fewest;
}

extern "C" cudaError_t ripple_forward(const RippleArguments* arguments, cudaStream_t stream) {
  return for_stage(*arguments, [&](const auto& p, auto size) {
    constexpr int kSize = decltype(size)::value;
    using T = std::remove_const_t<std::remove_pointer_t<decltype(p.weight)>>;
    const int64_t tokens_per_block = kThreads / p.lanes * kTokensPerThread;
    const int64_t blocks = channel_blocks(p.channels, p.lanes * kSize) *
                           ceil_div(p.batch * p.out_rows * p.out_cols, tokens_per_block);
    return launch(forward_kernel<T, kSize>, blocks, 0, stream, p);
  });
}

extern "C" cudaError_t ripple_backward(const RippleArguments* arguments, cudaStream_t stream) {
  return for_stage(*arguments, [&](const auto& p, auto size) {
    constexpr int kSize = decltype(size)::value;
    using T = std::remove_const_t<std::remove_pointer_t<decltype(p.weight)>>;
    const int64_t blocks = channel_blocks(p.channels, p.lanes * kSize) * p.num_splits;
    if (!needs_sums(*arguments)) {
      return p.pair_weight
                 ? launch(backward_kernel<T, kSize, true, false>, blocks, 0, stream, p)
                 : launch(backward_kernel<T, kSize, false, false>, blocks, 0, stream, p);
    }
    const size_t shared = (kSums + kWarps * kRound) * p.lanes * kSize * sizeof(float);
    const cudaError_t error =
        p.pair_weight ? launch(backward_kernel<T, kSize, true, true>, blocks, shared, stream, p)
                      : launch(backward_kernel<T, kSize, false, true>, blocks, shared, stream, p);
    if (error != cudaSuccess) return error;
    return launch_reduce(Reduce{p.workspace,
                                p.num_splits,
                                1,
                                p.channels,
                                arguments->element,
                                {arguments->dweight},
                                {arguments->dpair_weight}},
                         stream);
  });
}

extern "C" int64_t ripple_stages_num_splits(const RippleStagesArguments* arguments,
                                            int32_t expand) {
  int64_t splits = 1;
  const auto choose = [&](const auto& p, auto size, int64_t) {
    const int64_t blocks = channel_blocks(p.channels, p.lanes * decltype(size)::value);
    splits = image_splits(p.batch, blocks, arguments->multiprocessors);
    return cudaSuccess;
  };
  if (expand) {
    for_stages(*arguments, kExpandBackwardShared, choose);
  } else {
    for_stages(*arguments, kPoolBackwardShared, choose);
  }
  return splits;
}

extern "C" cudaError_t ripple_pool_stages(const RippleStagesArguments* arguments,
                                          cudaStream_t stream) {
  return for_stages(*arguments, kPoolShared, [&](const auto& p, auto size, int64_t shared) {
    constexpr int kSize = decltype(size)::value;
    using T = std::remove_pointer_t<decltype(p.out.data)>;
    return launch(pool_stages_kernel<T, kSize>,
                  p.batch * channel_blocks(p.channels, p.lanes * kSize), shared, stream, p);
  });
}

extern "C" cudaError_t ripple_pool_stages_backward(const RippleStagesArguments* arguments,
                                                   cudaStream_t stream) {
  return for_stages(*arguments, kPoolBackwardShared, [&](const auto& p, auto size, int64_t shared) {
    constexpr int kSize = decltype(size)::value;
    using T = std::remove_pointer_t<decltype(p.out.data)>;
    const int64_t blocks = p.num_splits * channel_blocks(p.channels, p.lanes * kSize);
    if (!needs_sums(*arguments)) {
      return launch(pool_stages_backward_kernel<T, kSize, false>, blocks, shared, stream, p);
    }
    const cudaError_t error =
        launch(pool_stages_backward_kernel<T, kSize, true>, blocks, shared, stream, p);
    return error != cudaSuccess ? error : launch_reduce(reduction<T>(*arguments, p), stream);
  });
}

extern "C" cudaError_t ripple_expand_stages(const RippleStagesArguments* arguments,
                                            cudaStream_t stream) {
  return for_stages(*arguments, kExpandShared, [&](const auto& p, auto size, int64_t shared) {
    constexpr int kSize = decltype(size)::value;
    using T = std::remove_pointer_t<decltype(p.out.data)>;
    return launch(expand_stages_kernel<T, kSize>,
                  p.batch * channel_blocks(p.channels, p.lanes * kSize), shared, stream, p);
  });
}

extern "C" cudaError_t ripple_expand_stages_backward(const RippleStagesArguments* arguments,
                                                     cudaStream_t stream) {
  return for_stages(
      *arguments, kExpandBackwardShared, [&](const auto& p, auto size, int64_t shared) {
        constexpr int kSize = decltype(size)::value;
        using T = std::remove_pointer_t<decltype(p.out.data)>;
        const int64_t blocks = p.num_splits * channel_blocks(p.channels, p.lanes * kSize);
        if (!needs_sums(*arguments)) {
          return launch(expand_stages_backward_kernel<T, kSize, false>, blocks, shared, stream, p);
        }
        const cudaError_t error =
            launch(expand_stages_backward_kernel<T, kSize, true>, blocks, shared, stream, p);
        return error != cudaSuccess ? error : launch_reduce(reduction<T>(*arguments, p), stream);
      });
}
