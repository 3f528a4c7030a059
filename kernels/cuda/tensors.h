// From tensors to the launchers' arguments: what every operation's cuda.cpp shares.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "arguments.h"

inline int32_t element_type(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return kFloat32;
    case at::kHalf:
      return kFloat16;
    case at::kBFloat16:
      return kBFloat16;
    default:
      TORCH_CHECK(false, "linear_vit: the dtype must be float32, float16 or bfloat16, got ",
                  x.scalar_type());
  }
}

inline TensorView view(const at::Tensor& x) {
  return {x.data_ptr(), {x.stride(0), x.stride(1), x.stride(2)}};
}

// x with a contiguous last axis: an incoming gradient may be expanded or transposed.
inline at::Tensor readable(const at::Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
}

inline at::Tensor empty_floats(const at::Tensor& x, at::IntArrayRef sizes) {
  return at::empty(sizes, x.options().dtype(at::kFloat));
}

// Uninitialised, in x's memory order; the last axis is contiguous whatever x is.
inline at::Tensor empty_in_order(const at::Tensor& x) {
  at::Tensor out = at::empty_like(x);
  return out.stride(-1) == 1 ? out : at::empty_like(x, at::MemoryFormat::Contiguous);
}

// The same with other sizes: the axes nest as x's do, densely.
inline at::Tensor empty_in_order(const at::Tensor& x, at::IntArrayRef sizes) {
  const int64_t last = x.dim() - 1;
  std::vector<int64_t> order(x.dim()), dense(x.dim()), inverse(x.dim());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.begin() + last,
                   [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
  for (int64_t i = 0; i <= last; ++i) {
    dense[i] = sizes[order[i]];
    inverse[order[i]] = i;
  }
  return at::empty(dense, x.options()).permute(inverse);
}

inline int64_t multiprocessors() {
  int device = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  }
  TORCH_CHECK(error == cudaSuccess, "linear_vit: CUDA says ", cudaGetErrorString(error));
  return count;
}

// launcher(&arguments, the current stream), with CUDA's error turned into an exception.
template <typename Arguments>
void run(const char* name, cudaError_t (*launcher)(const Arguments*, cudaStream_t),
         const Arguments& arguments) {
  const cudaError_t error = launcher(&arguments, c10::cuda::getCurrentCUDAStream());
  TORCH_CHECK(error == cudaSuccess, "linear_vit: launching ", name, " failed, CUDA says ",
              cudaGetErrorString(error));
}
