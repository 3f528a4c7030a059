// The launchers of cuda.cu. Each enqueues on `stream` and returns CUDA's error; none allocates or
// waits. All take the same arguments and use those they need; a tensor that is not used may be null.
#pragma once

#include "../cuda/arguments.h"

struct LinearAttentionArguments {
  int32_t element, head_dim;
  int64_t batch, kv_heads, group, queries, keys;  // kv_heads * group query heads
  int64_t multiprocessors;
  int64_t num_splits;  // of every sum over tokens; 0: chosen, or all in one launch (see one_launch)
  float eps;
  TensorView q, k, v, out, dout, dq, dk, dv;
  // Contiguous float32: S and its gradient (batch, kv_heads, 2 head_dim, head_dim), z and its gradient
  // (batch, kv_heads, 2 head_dim); S, dS and the workspace begin on a 16-byte boundary. Null S and z: forward, not to be kept; backward, to be made again.
  float* S;
  float* z;
  float* dS;
  float* dz;
  float* workspace;  // so many floats as linear_attention_workspace says
  // Backward and apply backward: whether nothing but dq is asked for. Launches for the others are left
  // out; where one launch makes all, all are written.
  int64_t only_dq;
};

enum LinearAttentionPass : int32_t {
  kForward = 0,        // q, k, v -> out, and S, z
  kBackward = 1,       // dout, q, k, v, S, z -> dq, dk, dv
  kState = 2,          // k, v -> S, z
  kStateBackward = 3,  // dS, dz, k, v -> dk, dv
  kApply = 4,          // q, S, z -> out
  kApplyBackward = 5,  // dout, q, S, z -> dq, dS, dz
};

extern "C" {
int64_t linear_attention_workspace(const LinearAttentionArguments*, LinearAttentionPass);
cudaError_t linear_attention_forward(const LinearAttentionArguments*, cudaStream_t);
cudaError_t linear_attention_backward(const LinearAttentionArguments*, cudaStream_t);
cudaError_t linear_attention_state(const LinearAttentionArguments*, cudaStream_t);
cudaError_t linear_attention_state_backward(const LinearAttentionArguments*, cudaStream_t);
cudaError_t linear_attention_apply(const LinearAttentionArguments*, cudaStream_t);
cudaError_t linear_attention_apply_backward(const LinearAttentionArguments*, cudaStream_t);

// Launches of a pass, and the bytes of partial sums, states and their gradients that it moves between
// them and to and from the multiprocessors; a state that is kept counts where it is written and read.
int64_t linear_attention_launches(const LinearAttentionArguments*, LinearAttentionPass);
int64_t linear_attention_workspace_bytes(const LinearAttentionArguments*, LinearAttentionPass);
// One line: tile, warps, stages.
const char* linear_attention_describe(int32_t element, int32_t head_dim);
}
