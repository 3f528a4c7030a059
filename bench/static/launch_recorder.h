// Included before a room's cuda.cpp, so that its operators take CPU tensors: the launches they make
// go to launch_recorder.cpp, which writes them down and runs nothing.
//
// Headers of PyTorch's come first, since CUDA means CPU from the last line on: the operators are
// then registered for CPU tensors. The headers of PyTorch's CUDA guard and stream are empty in this
// build; what they would define is below.
#pragma once

#include <ATen/ATen.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(at::Device) {}
};

inline cudaStream_t getCurrentCUDAStream(int = -1) { return nullptr; }

}  // namespace c10::cuda

namespace at::cuda {
using c10::cuda::CUDAGuard;
using c10::cuda::getCurrentCUDAStream;
}  // namespace at::cuda

#define CUDA CPU
