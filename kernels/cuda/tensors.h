// From tensors to the launchers' arguments: what every operation's cuda.cpp shares.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "arguments.h"

inline TensorView view(const at::Tensor& x) {
  // Validation has refused it, but not in an exported program, whose graph has the operators alone.
  TORCH_CHECK(x.stride(3) == 1 || x.size(3) <= 1 || x.numel() == 0,
              "linear_vit: the last axis must be contiguous: call .contiguous()");
  return {x.data_ptr(), {x.stride(0), x.stride(1), x.stride(2)}};
}

// What an operator returns for its i-th gradient: of shape (0,), unless bit i of `wanted` asks for it.
inline at::Tensor if_wanted(const at::Tensor& gradient, int64_t wanted, int64_t i) {
  return (wanted >> i & 1) != 0 ? gradient : at::empty({0}, gradient.options());
}

// Memory for an operator's i-th gradient, in x's memory order: of shape (0,) in the same way.
inline at::Tensor gradient_of(const at::Tensor& x, int64_t wanted, int64_t i) {
  return (wanted >> i & 1) != 0 ? empty_in_order(x) : at::empty({0}, x.options());
}

// What of it may be written: null for one that is not asked for.
inline TensorView view_if_any(const at::Tensor& gradient) {
  return gradient.dim() == 1 ? TensorView{} : view(gradient);
}
inline void* data_if_any(const at::Tensor& gradient) {
  return gradient.dim() == 1 ? nullptr : gradient.data_ptr();
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
