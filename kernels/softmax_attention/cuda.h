// The launchers of cuda.cu. Each enqueues on `stream` and returns CUDA's error; none allocates.
// lse and delta are (batch, heads, query_tokens), contiguous float32. key_mask is (batch, key_tokens)
// bytes, contiguous, 0 for a key that is not there; null where all are. What a masked key and its value
// hold has to be numbers, and there is something, of no use, in their gradients.
#pragma once

#include <cstddef>

#include "../cuda/arguments.h"

struct SoftmaxForwardArguments {
  int32_t element, head_dim;
  int64_t batch, heads, group, query_tokens, key_tokens;  // query head h reads head h / group
  TensorView q, k, v, out;
  const uint8_t* key_mask;
  float* lse;
  float scale;
};

struct SoftmaxBackwardArguments {
  int32_t element, head_dim;
  int64_t batch, heads, group, query_tokens, key_tokens;
  TensorView dout, q, k, v, out, dq, dk, dv;
  const uint8_t* key_mask;
  const float* lse;
  float* delta;  // workspace
  float scale;
  // Bits 0 to 2: whether dq, dk, dv is asked for. A launch that makes none of these is left out; one that
  // makes another, too, writes it (without query_gradient's delta a dk that nobody reads).
  int32_t wanted;
};

extern "C" {
cudaError_t softmax_attention_forward(const SoftmaxForwardArguments*, cudaStream_t);
cudaError_t softmax_attention_backward(const SoftmaxBackwardArguments*, cudaStream_t);
// The kernels' tiles in a line; empty for what was not compiled in.
void softmax_attention_describe(int32_t element, int32_t head_dim, char* line, size_t size);
}
