// Element types and memory order of tensors, for the operators of every cuda.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "element_type.h"

inline ElementType element_type(const at::Tensor& x) {
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

// x with a contiguous last axis: an incoming gradient may be expanded or transposed.
inline at::Tensor readable(const at::Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
}

// Contiguous, and where 16-byte accesses reach it: a state or a weight may be a view of anything.
inline at::Tensor contiguous_and_aligned(const at::Tensor& x) {
  const at::Tensor there = x.contiguous();
  return reinterpret_cast<uintptr_t>(there.const_data_ptr()) % 16 == 0 ? there : there.clone();
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
