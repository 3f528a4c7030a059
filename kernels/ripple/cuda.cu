// Ripple pooling and expansion in CUDA C++: channels last, five kernels.
//
//   1 forward           depthwise 3 x 3, stride 1 or 2 along the axis; plus, expanding, the pair term
//   2 input_gradient    dx, the transposed 3 x 3
//   3 coarse_gradient   dz of the pair term
//   4 weight_gradient   partial sums of both weights' gradients, one a split of the output's tokens
//   5 reduce            adds the splits, in order, and rounds
//
// A warp is 32 neighbouring channel vectors (16 bytes a thread where the tensors allow, one channel
// otherwise) of one token; a block has eight tokens in flight and keeps its weights in registers
// over kTokensPerThread rounds. Each grid is read from memory once: the nine taps of a token find
// their neighbours in the cache. Sums are float32. No atomics: results repeat bit for bit.
#include "cuda.h"

#include "../cuda/common.cuh"

namespace {

constexpr int kLanes = 32;
constexpr int kWarps = kThreads / kLanes;
constexpr int kTokensPerThread = 8;
constexpr int kTaps = 9;
constexpr int kPairTaps = 2;

template <typename T>
struct Ripple {
  Rows<const T> x, z;
  Rows<T> out, dx, dz;
  const T* weight;
  const T* pair_weight;  // null when pooling
  int axis, row_stride, col_stride;
  int64_t batch, rows, cols, channels;    // of x
  int64_t out_rows, out_cols;             // of out
  int64_t coarse_rows, coarse_cols;       // of z
  int64_t num_splits, tokens_per_split;   // kernel 4
  float* workspace;                       // [num_splits][kTaps + kPairTaps][channels]
};

template <typename T, int kSize>
__device__ void load(float (&value)[kSize], const T* source) {
  const auto loaded = *reinterpret_cast<const Vector<T, kSize>*>(source);
#pragma unroll
  for (int e = 0; e < kSize; ++e) value[e] = to_float(loaded.value[e]);
}

template <typename T, int kSize>
__device__ void store(T* target, const float (&value)[kSize]) {
  Vector<T, kSize> rounded;
#pragma unroll
  for (int e = 0; e < kSize; ++e) rounded.value[e] = from_float<T>(value[e]);
  *reinterpret_cast<Vector<T, kSize>*>(target) = rounded;
}

template <typename T, int kSize>
__device__ void load_weight(float (&weight)[kTaps][kSize], const T* source, int64_t channel) {
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      weight[tap][e] = to_float(source[(channel + e) * kTaps + tap]);
    }
  }
}

struct Token {
  int64_t batch, row, col;

  __device__ Token(int64_t index, int64_t rows, int64_t cols)
      : batch(index / cols / rows), row(index / cols % rows), col(index % cols) {}
};

// Calls body(token index) for each token of a thread and passes by channels past the end.
template <int kSize, typename Body>
__device__ void for_tokens(int64_t tokens, int64_t channels, Body body) {
  const int64_t channel_blocks = (channels + kLanes * kSize - 1) / (kLanes * kSize);
  const int64_t channel =
      (blockIdx.x % channel_blocks * kLanes + threadIdx.x % kLanes) * kSize;
  if (channel >= channels) return;
  const int64_t first = blockIdx.x / channel_blocks * (kWarps * kTokensPerThread);
  body(channel, [&](auto each) {
#pragma unroll 1
    for (int i = 0; i < kTokensPerThread; ++i) {
      const int64_t token = first + i * kWarps + threadIdx.x / kLanes;
      if (token < tokens) each(token);
    }
  });
}

// ---- 1 forward -------------------------------------------------------------------------------------

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) forward_kernel(Ripple<T> p) {
  const int64_t tokens = p.batch * p.out_rows * p.out_cols;
  for_tokens<kSize>(tokens, p.channels, [&](int64_t channel, auto for_each) {
    float weight[kTaps][kSize];
    load_weight<T, kSize>(weight, p.weight, channel);
    for_each([&](int64_t index) {
      const Token token(index, p.out_rows, p.out_cols);
      float sum[kSize] = {};
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const int64_t row = token.row * p.row_stride + tap / 3 - 1;
        const int64_t col = token.col * p.col_stride + tap % 3 - 1;
        if (row < 0 || row >= p.rows || col < 0 || col >= p.cols) continue;
        float x[kSize];
        load<T, kSize>(x, p.x.at(token.batch, row, col) + channel);
#pragma unroll
        for (int e = 0; e < kSize; ++e) sum[e] += weight[tap][e] * x[e];
      }
      if (p.pair_weight) {
        const int64_t along = p.axis == 0 ? token.row : token.col;
        const int64_t row = p.axis == 0 ? token.row / 2 : token.row;
        const int64_t col = p.axis == 0 ? token.col : token.col / 2;
        float z[kSize];
        load<T, kSize>(z, p.z.at(token.batch, row, col) + channel);
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          sum[e] += to_float(p.pair_weight[along % 2 * p.channels + channel + e]) * z[e];
        }
      }
      store<T, kSize>(p.out.at(token.batch, token.row, token.col) + channel, sum);
    });
  });
}

// ---- 2 input_gradient ------------------------------------------------------------------------------
// x[r, c] met weight tap (i, j) in out[(r + 1 - i) / row_stride, (c + 1 - j) / col_stride], where
// these divide.

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) input_gradient_kernel(Ripple<T> p) {
  const int64_t tokens = p.batch * p.rows * p.cols;
  for_tokens<kSize>(tokens, p.channels, [&](int64_t channel, auto for_each) {
    float weight[kTaps][kSize];
    load_weight<T, kSize>(weight, p.weight, channel);
    for_each([&](int64_t index) {
      const Token token(index, p.rows, p.cols);
      float sum[kSize] = {};
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const int64_t row = token.row + 1 - tap / 3, col = token.col + 1 - tap % 3;
        if (row < 0 || col < 0 || row % p.row_stride != 0 || col % p.col_stride != 0) continue;
        const int64_t out_row = row / p.row_stride, out_col = col / p.col_stride;
        if (out_row >= p.out_rows || out_col >= p.out_cols) continue;
        float g[kSize];
        load<T, kSize>(g, p.out.at(token.batch, out_row, out_col) + channel);
#pragma unroll
        for (int e = 0; e < kSize; ++e) sum[e] += weight[tap][e] * g[e];
      }
      store<T, kSize>(p.dx.at(token.batch, token.row, token.col) + channel, sum);
    });
  });
}

// ---- 3 coarse_gradient -----------------------------------------------------------------------------

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) coarse_gradient_kernel(Ripple<T> p) {
  const int64_t tokens = p.batch * p.coarse_rows * p.coarse_cols;
  for_tokens<kSize>(tokens, p.channels, [&](int64_t channel, auto for_each) {
    for_each([&](int64_t index) {
      const Token token(index, p.coarse_rows, p.coarse_cols);
      float sum[kSize] = {};
#pragma unroll
      for (int parity = 0; parity < kPairTaps; ++parity) {
        const int64_t row = p.axis == 0 ? token.row * 2 + parity : token.row;
        const int64_t col = p.axis == 0 ? token.col : token.col * 2 + parity;
        if (row >= p.rows || col >= p.cols) continue;  // an odd size cuts the last pair
        float g[kSize];
        load<T, kSize>(g, p.out.at(token.batch, row, col) + channel);
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          sum[e] += to_float(p.pair_weight[parity * p.channels + channel + e]) * g[e];
        }
      }
      store<T, kSize>(p.dz.at(token.batch, token.row, token.col) + channel, sum);
    });
  });
}

// ---- 4 weight_gradient -----------------------------------------------------------------------------
// dweight[c, tap] = sum over out's tokens of dout x[tap]; dpair_weight[parity, c] = sum of dout z.
// One block: one split of the tokens, 32 channel vectors; its eight warps take tokens in turn and
// are added at the end, in order.

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) weight_gradient_kernel(Ripple<T> p) {
  const int64_t channel_blocks = (p.channels + kLanes * kSize - 1) / (kLanes * kSize);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t channel0 = blockIdx.x % channel_blocks * kLanes * kSize;
  const int64_t channel = channel0 + lane * kSize;
  const int64_t split = blockIdx.x / channel_blocks;
  const int64_t tokens = p.batch * p.out_rows * p.out_cols;
  const int64_t begin = split * p.tokens_per_split;
  const int64_t end = begin + p.tokens_per_split < tokens ? begin + p.tokens_per_split : tokens;

  float sum[kTaps + kPairTaps][kSize] = {};
  if (channel < p.channels) {
#pragma unroll 1
    for (int64_t index = begin + warp; index < end; index += kWarps) {
      const Token token(index, p.out_rows, p.out_cols);
      float g[kSize];
      load<T, kSize>(g, p.out.at(token.batch, token.row, token.col) + channel);
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const int64_t row = token.row * p.row_stride + tap / 3 - 1;
        const int64_t col = token.col * p.col_stride + tap % 3 - 1;
        if (row < 0 || row >= p.rows || col < 0 || col >= p.cols) continue;
        float x[kSize];
        load<T, kSize>(x, p.x.at(token.batch, row, col) + channel);
#pragma unroll
        for (int e = 0; e < kSize; ++e) sum[tap][e] += g[e] * x[e];
      }
      if (p.pair_weight) {
        const int64_t along = p.axis == 0 ? token.row : token.col;
        const int64_t row = p.axis == 0 ? token.row / 2 : token.row;
        const int64_t col = p.axis == 0 ? token.col : token.col / 2;
        float z[kSize];
        load<T, kSize>(z, p.z.at(token.batch, row, col) + channel);
#pragma unroll
        for (int parity = 0; parity < kPairTaps; ++parity) {
          if (along % 2 != parity) continue;
#pragma unroll
          for (int e = 0; e < kSize; ++e) sum[kTaps + parity][e] += g[e] * z[e];
        }
      }
    }
  }

  float* const shared = shared_memory();  // [kWarps][kLanes * kSize]
  constexpr int kBlockChannels = kLanes * kSize;
#pragma unroll
  for (int tap = 0; tap < kTaps + kPairTaps; ++tap) {
    __syncthreads();  // the tap before has been read
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      shared[warp * kBlockChannels + lane * kSize + e] = sum[tap][e];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < kBlockChannels && channel0 + c < p.channels; c += kThreads) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += shared[w * kBlockChannels + c];
      p.workspace[(split * (kTaps + kPairTaps) + tap) * p.channels + channel0 + c] = total;
    }
  }
}

// ---- 5 reduce --------------------------------------------------------------------------------------

template <typename T>
struct Reduce {
  const float* partials;  // [num_splits][kTaps + kPairTaps][channels]
  int64_t num_splits, channels;
  T* dweight;       // (channels, kTaps)
  T* dpair_weight;  // (kPairTaps, channels), or null
};

template <typename T>
__global__ void __launch_bounds__(kThreads) reduce_kernel(Reduce<T> p) {
  const int64_t size = (kTaps + kPairTaps) * p.channels;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t tap = i / p.channels, channel = i % p.channels;
  if (i >= size || (tap >= kTaps && !p.dpair_weight)) return;
  float sum = 0.0f;
  for (int64_t split = 0; split < p.num_splits; ++split) sum += p.partials[split * size + i];
  if (tap < kTaps) {
    p.dweight[channel * kTaps + tap] = from_float<T>(sum);
  } else {
    p.dpair_weight[(tap - kTaps) * p.channels + channel] = from_float<T>(sum);
  }
}

template <typename T>
Ripple<T> parameters(const RippleArguments& p) {
  const int row_stride = p.axis == 0 ? p.stride : 1, col_stride = p.axis == 1 ? p.stride : 1;
  const int64_t out_rows = ceil_div(p.rows, row_stride), out_cols = ceil_div(p.cols, col_stride);
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
          p.batch,
          p.rows,
          p.cols,
          p.channels,
          out_rows,
          out_cols,
          p.axis == 0 ? ceil_div(p.rows, 2) : p.rows,
          p.axis == 1 ? ceil_div(p.cols, 2) : p.cols,
          p.num_splits,
          ceil_div(p.batch * out_rows * out_cols, p.num_splits),
          p.workspace};
}

// function(integral_constant<int, elements a thread reads at once>); unused views are wide.
template <typename T, typename Function>
cudaError_t for_vector_size(const Ripple<T>& p, Function function) {
  const bool wide = p.channels % kWide<T> == 0 && p.x.wide && p.z.wide && p.out.wide && p.dx.wide &&
                    p.dz.wide;
  return wide ? function(std::integral_constant<int, kWide<T>>{})
              : function(std::integral_constant<int, 1>{});
}

int64_t channel_blocks(int64_t channels, int size) { return ceil_div(channels, kLanes * size); }

int64_t token_blocks(int64_t tokens) { return ceil_div(tokens, kWarps * kTokensPerThread); }

}  // namespace

// ---- launchers -------------------------------------------------------------------------------------

extern "C" int64_t ripple_num_splits(int64_t tokens, int64_t channels, int64_t multiprocessors) {
  constexpr int64_t kFewestTokens = 64;
  constexpr int64_t kMostTokens = 4096;  // 512 a thread: float32 sums of more lose too much
  if (tokens == 0 || channels == 0) return 1;
  const int64_t wanted = ceil_div(2 * multiprocessors, channel_blocks(channels, 4));
  const int64_t most = ceil_div(tokens, kFewestTokens), fewest = ceil_div(tokens, kMostTokens);
  const int64_t splits = wanted < most ? wanted : most;
  return splits > fewest ? splits : fewest;
}

extern "C" cudaError_t ripple_forward(const RippleArguments* arguments, cudaStream_t stream) {
  return for_element_type(arguments->element, [&](auto type) {
    using T = typename decltype(type)::type;
    const Ripple<T> p = parameters<T>(*arguments);
    return for_vector_size(p, [&](auto size) {
      constexpr int kSize = decltype(size)::value;
      return launch(forward_kernel<T, kSize>,
                    channel_blocks(p.channels, kSize) *
                        token_blocks(p.batch * p.out_rows * p.out_cols),
                    0, stream, p);
    });
  });
}

extern "C" cudaError_t ripple_backward(const RippleArguments* arguments, cudaStream_t stream) {
  return for_element_type(arguments->element, [&](auto type) {
    using T = typename decltype(type)::type;
    const Ripple<T> p = parameters<T>(*arguments);
    return for_vector_size(p, [&](auto size) {
      constexpr int kSize = decltype(size)::value;
      const int64_t blocks = channel_blocks(p.channels, kSize);
      cudaError_t error =
          launch(input_gradient_kernel<T, kSize>,
                 blocks * token_blocks(p.batch * p.rows * p.cols), 0, stream, p);
      if (error != cudaSuccess) return error;
      if (p.pair_weight) {
        error = launch(coarse_gradient_kernel<T, kSize>,
                       blocks * token_blocks(p.batch * p.coarse_rows * p.coarse_cols), 0, stream,
                       p);
        if (error != cudaSuccess) return error;
      }
      error = launch(weight_gradient_kernel<T, kSize>, blocks * p.num_splits,
                     kWarps * kLanes * kSize * sizeof(float), stream, p);
      if (error != cudaSuccess) return error;
      return launch(reduce_kernel<T>, ceil_div((kTaps + kPairTaps) * p.channels, kThreads), 0,
                    stream,
                    Reduce<T>{p.workspace, p.num_splits, p.channels,
                              static_cast<T*>(arguments->dweight),
                              static_cast<T*>(arguments->dpair_weight)});
    });
  });
}
