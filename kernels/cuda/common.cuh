// What every kernel shares: element types, access to global memory, tiles, sums over lanes, dispatch
// and launch.
//
// Global memory is read and written through load_global and store_global (and ptx::cp_async_16)
// only: built for the host they count the bytes, on a GPU they are one instruction each. 16 bytes a
// thread where the tensor allows, one element otherwise.
//
// Float tiles (load_tile, store_tile, write_tile) lie in shared memory as float32. Their block is 256
// threads seen as 16 x 16: thread (x, y) owns rows y, y + 16, ... and columns x, x + 16, ... of a
// tile, so neighbouring threads read neighbouring words, and the sum of a row is a sum over 16
// neighbouring lanes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <set>
#include <type_traits>
#include <utility>

#include "arguments.h"
#include "ptx.cuh"

// Narrowed by builds that want one kernel in a second (-DLINEAR_VIT_HEAD_DIMS=32).
#ifndef LINEAR_VIT_HEAD_DIMS
#define LINEAR_VIT_HEAD_DIMS 16, 32, 48, 64, 96, 128
#endif
#ifndef LINEAR_VIT_ELEMENT_TYPES
#define LINEAR_VIT_ELEMENT_TYPES float, __half, __nv_bfloat16
#endif

constexpr int kThreads = 256;
constexpr int kSide = 16;  // of the block's square of threads
constexpr unsigned kFullWarp = 0xffffffffu;

// ---- elements ------------------------------------------------------------------------------------

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

template <typename T, int kSize>
struct alignas(kSize * sizeof(T)) Vector {
  T value[kSize];
};

template <typename T>
constexpr int kWide = 16 / sizeof(T);  // elements of a 16-byte access

// ---- global memory -------------------------------------------------------------------------------

template <typename Value>
__device__ inline Value load_global(const Value* source) {
#ifdef LINEAR_VIT_CUDA_HOST
  cuda_host::count_load(source, sizeof(Value));
#endif
  return *source;
}

template <typename Value>
__device__ inline void store_global(Value* target, Value value) {
#ifdef LINEAR_VIT_CUDA_HOST
  cuda_host::count_store(target, sizeof(Value));
#endif
  if constexpr (sizeof(Value) == 16 || sizeof(Value) == 8) {
    unsigned words[sizeof(Value) / 4];
    memcpy(words, &value, sizeof(Value));
    if constexpr (sizeof(Value) == 16) {
      ptx::store_16(target, words);
    } else {
      ptx::store_8(target, words);
    }
  } else {
    *target = value;
  }
}

// ---- tensors -------------------------------------------------------------------------------------

template <typename T>
struct Rows {
  T* data;
  int64_t stride[3];
  bool wide;  // every row starts on a 16-byte boundary

  __device__ T* at(int64_t i, int64_t j, int64_t k) const {
    return data + i * stride[0] + j * stride[1] + k * stride[2];
  }
};

template <typename T>
Rows<T> rows_of(const TensorView& view) {
  bool wide = reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  for (int64_t stride : view.stride) wide = wide && stride % kWide<T> == 0;
  return {static_cast<T*>(view.data), {view.stride[0], view.stride[1], view.stride[2]}, wide};
}

// ---- shared memory -------------------------------------------------------------------------------

// What a block can have on compute capability 8.6: no GPU that these kernels run on has less (8.0 has
// 163 KB, 9.0 and 10.0 have 227).
constexpr size_t kSharedLimit = 99 * 1024;

__device__ inline float* shared_memory() {
  extern __shared__ float4 linear_vit_shared[];
  return reinterpret_cast<float*>(linear_vit_shared);
}

template <typename Shared>
__device__ Shared& shared_memory_as() {
  static_assert(sizeof(Shared) <= kSharedLimit);
  return *reinterpret_cast<Shared*>(shared_memory());
}

// tile[row][column] = source[row * stride + column] for kRows x kColumns; rows from `valid` on are
// 0. kPitch is the tile's row length: odd where a column is read by neighbouring lanes.
template <int kRows, int kColumns, int kPitch, typename T>
__device__ void load_tile(float* tile, const T* source, int64_t stride, int valid, bool wide) {
  auto load = [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    constexpr int kPerRow = kColumns / kSize;
#pragma unroll 4
    for (int i = threadIdx.x; i < kRows * kPerRow; i += kThreads) {
      const int row = i / kPerRow, column = i % kPerRow * kSize;
      Vector<T, kSize> loaded = {};
      if (row < valid) {
        loaded = load_global(
            reinterpret_cast<const Vector<T, kSize>*>(source + row * stride + column));
      }
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        tile[row * kPitch + column + e] = to_float(loaded.value[e]);
      }
    }
  };
  if (wide) {
    load(std::integral_constant<int, kWide<T>>{});
  } else {
    load(std::integral_constant<int, 1>{});
  }
}

// The inverse: the first `valid` rows of the tile, rounded to T.
template <int kRows, int kColumns, int kPitch, typename T>
__device__ void store_tile(T* target, int64_t stride, int valid, bool wide, const float* tile) {
  auto store = [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    constexpr int kPerRow = kColumns / kSize;
#pragma unroll 2
    for (int i = threadIdx.x; i < kRows * kPerRow; i += kThreads) {
      const int row = i / kPerRow, column = i % kPerRow * kSize;
      if (row >= valid) return;
      Vector<T, kSize> rounded;
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        rounded.value[e] = from_float<T>(tile[row * kPitch + column + e]);
      }
      store_global(reinterpret_cast<Vector<T, kSize>*>(target + row * stride + column), rounded);
    }
  };
  if (wide) {
    store(std::integral_constant<int, kWide<T>>{});
  } else {
    store(std::integral_constant<int, 1>{});
  }
}

// tile[row][column] of a thread's own kRows x kColumns values.
template <int kRows, int kColumns, int kPitch>
__device__ void write_tile(float* tile, const float (&value)[kRows][kColumns]) {
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) tile[(y + kSide * i) * kPitch + x + kSide * j] = value[i][j];
  }
}

// ---- reductions over the 16 threads of a row: every one of them gets the result --------------------

__device__ inline float row_sum(float value) {
#pragma unroll
  for (int lane = kSide / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(kFullWarp, value, lane);
  return value;
}

// Drops NaN, as fmaxf does.
__device__ inline float row_max(float value) {
#pragma unroll
  for (int lane = kSide / 2; lane > 0; lane /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, lane));
  }
  return value;
}

// ---- host: dispatch and launch ---------------------------------------------------------------------

template <typename T>
struct Type {
  using type = T;
};

namespace dispatch {

template <typename... Ts>
struct Types {};

template <typename T>
constexpr int32_t code() {
  return std::is_same_v<T, float> ? kFloat32 : std::is_same_v<T, __half> ? kFloat16 : kBFloat16;
}

template <typename... Ts, typename Function>
cudaError_t element_type(Types<Ts...>, int32_t element, Function function) {
  cudaError_t error = cudaErrorInvalidValue;
  ((element == code<Ts>() ? (error = function(Type<Ts>{}), true) : false) || ...);
  return error;
}

template <int... kDims, typename Function>
cudaError_t head_dim(std::integer_sequence<int, kDims...>, int32_t dim, Function function) {
  cudaError_t error = cudaErrorInvalidValue;
  ((dim == kDims ? (error = function(std::integral_constant<int, kDims>{}), true) : false) || ...);
  return error;
}

}  // namespace dispatch

// function(Type<T>{}) for the element type; cudaErrorInvalidValue if it was not compiled in.
template <typename Function>
cudaError_t for_element_type(int32_t element, Function function) {
  return dispatch::element_type(dispatch::Types<LINEAR_VIT_ELEMENT_TYPES>{}, element, function);
}

// function(Type<T>{}, std::integral_constant<int, D>{}) likewise.
template <typename Function>
cudaError_t for_element_type_and_head_dim(int32_t element, int32_t head_dim, Function function) {
  return for_element_type(element, [&](auto type) {
    return dispatch::head_dim(std::integer_sequence<int, LINEAR_VIT_HEAD_DIMS>{}, head_dim,
                              [&](auto dim) { return function(type, dim); });
  });
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes that a block can have on the current device; 0 where it can't be asked.
inline size_t most_shared_memory() {
  int device = 0, most = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  const auto attribute = cudaDevAttrMaxSharedMemoryPerBlockOptin;
  if (cudaDeviceGetAttribute(&most, attribute, device) != cudaSuccess) return 0;
  return static_cast<size_t>(most);
}

// More than 48 KB of shared memory a kernel gets only if it asks: once on a device, for the most there
// is. With a limit of each launch's own size, one host thread would lower what another just raised.
inline cudaError_t allow_most_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> asked;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (asked.count({kernel, device}) > 0) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(most_shared_memory()));
  if (error == cudaSuccess) asked.insert({kernel, device});
  return error;
}

// Runs a kernel of one argument on `blocks` blocks of `threads`; none for an empty problem. Its shared
// memory is dynamic, all of it.
template <typename Arguments>
cudaError_t launch(void (*kernel)(Arguments), int64_t blocks, size_t shared_bytes,
                   cudaStream_t stream, Arguments arguments, int threads = kThreads) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = allow_most_shared_memory(reinterpret_cast<const void*>(kernel));
    if (error != cudaSuccess) return error;
  }
  void* pointers[] = {&arguments};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), pointers,
                          shared_bytes, stream);
}
