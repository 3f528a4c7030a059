// The launchers of cuda.cu. Each enqueues on `stream` and returns CUDA's error; none allocates.
// S is (batch, kv_heads, 2 head_dim, head_dim) and z (batch, kv_heads, 2 head_dim), contiguous
// float32, and so are their gradients.
#pragma once

#include "../cuda/arguments.h"

struct FeatureOuterArguments {
  int32_t element, head_dim;
  int64_t batch, kv_heads, group, tokens;  // x and w have kv_heads * group heads
  int64_t num_splits;
  TensorView x, w;
  const float* row_scale;   // (batch, heads, tokens) or null, meaning 1
  const float* row_weight;  // likewise
  float* S;
  float* z;
  float* workspace;  // num_splits * (size of S + size of z) floats; unused when num_splits is 1
};

struct ApplyArguments {
  int32_t element, head_dim;
  int64_t batch, heads, group, tokens;  // query head h reads state h / group
  TensorView q, out;
  const float* S;
  const float* z;
  float eps;
};

struct QueryGradientArguments {
  int32_t element, head_dim;
  int64_t batch, heads, group, tokens;
  TensorView dout, q, dq;
  const float* S;
  const float* z;
  float eps;
  float* row_scale;   // (batch, heads, tokens): 1 / E
  float* row_weight;  // -(phi(q) . a) / E^2
};

struct KeyValueGradientArguments {
  int32_t element, head_dim;
  int64_t batch, kv_heads, tokens;
  TensorView k, v, dk, dv;
  const float* dS;
  const float* dz;
};

extern "C" {
// How many blocks share the tokens of one head: enough for the GPU, few enough to be worth it.
int64_t linear_attention_num_splits(int64_t batch_heads, int64_t tokens, int64_t multiprocessors);
cudaError_t linear_attention_feature_outer(const FeatureOuterArguments*, cudaStream_t);
cudaError_t linear_attention_apply(const ApplyArguments*, cudaStream_t);
cudaError_t linear_attention_query_gradient(const QueryGradientArguments*, cudaStream_t);
cudaError_t linear_attention_key_value_gradient(const KeyValueGradientArguments*, cudaStream_t);
}
