// The launchers of cuda.cu. Each enqueues on `stream` and returns CUDA's error; none allocates.
#pragma once

#include "../cuda/arguments.h"

// One stage of the pyramid. `fine` is the grid (batch, rows, cols, channels). Pooling has stride 2
// along `axis` and writes `out` (the coarse grid); expansion has stride 1, writes `out` (a fine
// grid) and reads z (the coarse grid) and pair_weight (2, channels). Views and pointers that an
// operation doesn't use are null. Weights are contiguous, of the grids' element type.
struct RippleArguments {
  int32_t element, axis, stride;
  int64_t batch, rows, cols, channels;
  TensorView x, z;        // inputs
  TensorView out;         // the result, or in a backward pass its gradient
  TensorView dx, dz;      // gradients
  const void* weight;     // (channels, 3, 3)
  const void* pair_weight;
  void* dweight;
  void* dpair_weight;
  int64_t num_splits;  // of the output's tokens, for the weights' gradients
  float* workspace;    // num_splits * 11 * channels floats
};

extern "C" {
int64_t ripple_num_splits(int64_t tokens, int64_t channels, int64_t multiprocessors);
cudaError_t ripple_forward(const RippleArguments*, cudaStream_t);
cudaError_t ripple_backward(const RippleArguments*, cudaStream_t);
}
