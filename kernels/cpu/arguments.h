// What the kernels of every instruction set take: plain structs of pointers and numbers, so that
// they compile with no PyTorch header, in a second or two each.
#pragma once

#include <cstdint>

#include "../element_type.h"

// The rows (tokens) of one head: the first one's first element, and elements from row to row.
struct Rows {
  void* data;
  int64_t stride;
  bool past_caches = false;  // of an output: may be written so, and every row begins a cache line
};
