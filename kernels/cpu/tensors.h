// From tensors to the kernels' arguments, the choice of an instruction set, and threads: what every
// operation's cpu.cpp shares.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../tensors.h"
#include "arguments.h"

// x[i][j][k:], a tensor of four axes, row by row along axis 2.
inline Rows rows(const at::Tensor& x, int64_t i, int64_t j, int64_t k) {
  const int64_t at = i * x.stride(0) + j * x.stride(1) + k * x.stride(2);
  return {static_cast<char*>(x.data_ptr()) + at * x.element_size(), x.stride(2)};
}

// Asks for pages of 2 MB inside a large new tensor. The allocator gives such memory back to the system
// each time it is freed, and touching 100 MB anew in pages of 4 KB takes about as long as computing
// what goes there.
inline at::Tensor in_large_pages(at::Tensor x) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(x.data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t end = (begin + x.nbytes()) / kPage * kPage;
  // A refusal (an old kernel, pages turned off) costs speed only.
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
  return x;
}

// What a kernel writes: uninitialised, in x's memory order, of its sizes or of others.
inline at::Tensor output_like(const at::Tensor& x) { return in_large_pages(empty_in_order(x)); }
inline at::Tensor output_like(const at::Tensor& x, at::IntArrayRef sizes) {
  return in_large_pages(empty_in_order(x, sizes));
}

// The kernels of the widest instruction set that this processor has, or of the one that
// LINEAR_VIT_CPU names (avx512, avx2, portable): read at every call, so that tests can choose.
template <typename Kernels>
const Kernels& choose([[maybe_unused]] const Kernels* avx512, [[maybe_unused]] const Kernels* avx2,
                      const Kernels* portable) {
  const char* variable = std::getenv("LINEAR_VIT_CPU");
  const std::string wanted = variable == nullptr ? "" : variable;
#if defined(LINEAR_VIT_X86)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                               __builtin_cpu_supports("bmi2");
  static const bool has_avx512 =
      has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (wanted.empty() || wanted == "avx512")) return *avx512;
  if (has_avx2 && (wanted.empty() || wanted == "avx2")) return *avx2;
#endif
  TORCH_CHECK(wanted.empty() || wanted == "portable", "linear_vit: LINEAR_VIT_CPU is '", wanted,
              "', which is not one of avx512, avx2, portable that this processor has: unset it");
  return *portable;
}

// function(item, scratch) for every item, on PyTorch's threads, in any order: an item writes where
// no other does, so that results do not depend on the number of threads. Threads take the next item
// when they are free: one that another program's work delays holds up one item and not a share.
template <typename Function>
void parallel(int64_t items, int64_t scratch_floats, const Function& function) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), items);
  if (threads == 0) return;
  const int64_t stride = (scratch_floats + 15) / 16 * 16;  // one thread's cache lines are its own
  const at::Tensor scratch = at::empty({threads, stride}, at::TensorOptions(at::kFloat));
  float* const base = scratch.data_ptr<float>();
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t item; (item = next.fetch_add(1)) < items;) {
        function(item, base + thread * stride);
      }
    }
  });
}
