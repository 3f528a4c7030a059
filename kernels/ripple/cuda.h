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
  TensorView dx, dz;      // gradients; null where they are not asked for, as dweight and its like
  const void* weight;     // (channels, 3, 3)
  const void* pair_weight;
  void* dweight;
  void* dpair_weight;
  int64_t num_splits;  // of x's tokens, for the weights' gradients
  float* workspace;    // num_splits * 11 * channels floats; null without a weight's gradient
};

constexpr int kMostStages = 4;

// A pyramid: level 0 is (batch, rows, cols, channels), stage s halves level s along axes[s]. With S
// stages, pooling reads level 0 and writes levels 1 to S; expansion reads levels 0 to S, of which
// level S is the coarse grid z, and writes `out`. Backward, gradient[s] is that of level s: pooling
// reads those of 1 to S and level 0, and writes that of 0; expansion reads that of `out` and all
// levels, and writes all. Weights as above; in an expansion `weight` is the lateral one. Gradients
// that are not asked for are null.
struct RippleStagesArguments {
  int32_t element, num_stages;
  int32_t axes[kMostStages];
  int64_t batch, rows, cols, channels;
  TensorView level[kMostStages + 1];
  TensorView gradient[kMostStages + 1];
  TensorView out;
  const void* weight[kMostStages];
  const void* pair_weight[kMostStages];
  void* dweight[kMostStages];
  void* dpair_weight[kMostStages];
  int64_t multiprocessors;  // to fill
  int64_t num_splits;       // of the batch, for the weights' gradients
  float* workspace;         // num_splits * num_stages * 11 * channels floats; null in the same way
};

// Whether any weight's gradient is asked for.
inline bool needs_sums(const RippleArguments& a) { return a.dweight || a.dpair_weight; }
inline bool needs_sums(const RippleStagesArguments& a) {
  for (int s = 0; s < a.num_stages; ++s) {
    if (a.dweight[s] || a.dpair_weight[s]) return true;
  }
  return false;
}

extern "C" {
int64_t ripple_num_splits(int64_t tokens, int64_t channels, int64_t multiprocessors);
cudaError_t ripple_forward(const RippleArguments*, cudaStream_t);
cudaError_t ripple_backward(const RippleArguments*, cudaStream_t);

// Splits for a backward pass whose other arguments are all there; `expand` 0 or 1.
int64_t ripple_stages_num_splits(const RippleStagesArguments*, int32_t expand);
// cudaErrorInvalidValue where the grid does not fit in shared memory.
cudaError_t ripple_pool_stages(const RippleStagesArguments*, cudaStream_t);
cudaError_t ripple_pool_stages_backward(const RippleStagesArguments*, cudaStream_t);
cudaError_t ripple_expand_stages(const RippleStagesArguments*, cudaStream_t);
cudaError_t ripple_expand_stages_backward(const RippleStagesArguments*, cudaStream_t);
}
