// What a launcher takes: plain structs of pointers and numbers, so that a .cu file needs no PyTorch
// header and can be called from any language. Shared by every operation's cuda.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../element_type.h"

// A four-axis tensor whose last axis is contiguous. stride[i] is that of axis i, in elements; 0 for
// an expanded axis.
struct TensorView {
  void* data;
  int64_t stride[3];
};
