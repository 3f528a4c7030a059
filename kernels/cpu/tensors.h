// From tensors to the kernels' arguments, the choice of an instruction set, and threads: what every
// operation's cpu.cpp shares.
//
// PyTorch is known through its stable headers only, which compile several times faster than the
// others (and take no tags and no permute: hence a few lines here).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "arguments.h"

using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

inline ElementType element_type(const Tensor& x) {
  using Type = torch::headeronly::ScalarType;
  const Type type = x.scalar_type();
  if (type == Type::Float) return kFloat32;
  if (type == Type::Half) return kFloat16;
  if (type == Type::BFloat16) return kBFloat16;
  throw std::runtime_error("linear_vit: the dtype must be float32, float16 or bfloat16");
}

// An output this large does not fit the cores' own caches. It is written past them, which spares reading
// what is written over, and pays even where it is read next.
constexpr int64_t kStreamedBytes = int64_t{4} << 20;

// Four axes of a tensor that its owner keeps alive. (To ask a tensor is a call into PyTorch.)
struct View {
  char* data;
  ElementType element;
  int64_t size[4], stride[4];
  bool past_caches = false;

  explicit View(const Tensor& x)
      : View(x, {x.size(0), x.size(1), x.size(2), x.size(3)},
             {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}) {}

  // Other axes of x than its own, from element `first` on.
  View(const Tensor& x, const int64_t (&sizes)[4], const int64_t (&strides)[4], int64_t first = 0)
      : element(element_type(x)) {
    // Validation has refused it, but not in an exported program, whose graph has the operators alone.
    const bool rows = sizes[0] * sizes[1] * sizes[2] > 0;  // an empty tensor's strides mean nothing
    if (strides[3] != 1 && sizes[3] > 1 && rows) {
      throw std::runtime_error("linear_vit: the last axis must be contiguous: call .contiguous()");
    }
    data = static_cast<char*>(x.data_ptr()) + first * element_size();
    std::copy(sizes, sizes + 4, size);
    std::copy(strides, strides + 4, stride);
  }

  int64_t element_size() const { return element == kFloat32 ? 4 : 2; }

  int64_t bytes() const { return size[0] * size[1] * size[2] * size[3] * element_size(); }

  // The same, to be written only.
  View output() const {
    constexpr int64_t kLine = 64;
    View view = *this;
    view.past_caches = bytes() >= kStreamedBytes && reinterpret_cast<uintptr_t>(data) % kLine == 0;
    for (int axis = 0; axis < 3; ++axis) {
      view.past_caches &= stride[axis] * element_size() % kLine == 0;
    }
    return view;
  }

  // x[i][j][k:], row by row along axis 2.
  Rows rows(int64_t i, int64_t j, int64_t k) const {
    const int64_t at = i * stride[0] + j * stride[1] + k * stride[2];
    return {data + at * element_size(), stride[2], past_caches};
  }
};

// x with a contiguous last axis: an incoming gradient may be expanded or transposed.
inline Tensor readable(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.stride(last) == 1 || x.size(last) == 1 ? x : torch::stable::contiguous(x);
}

// Uninitialised. (Not through the stable headers' new_empty, which takes the dispatcher's slow way.)
inline Tensor empty_strided(const Sizes& sizes, const Sizes& strides, int32_t dtype) {
  AtenTensorHandle out = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}

// Its axes nested in this order: the last one of `order` is contiguous.
inline Tensor empty_nested(const Sizes& sizes, const Sizes& order, int32_t dtype) {
  const auto axes = static_cast<int64_t>(sizes.size());
  Sizes strides(axes);
  int64_t stride = 1;
  for (int64_t i = axes - 1; i >= 0; --i) {
    strides[order[i]] = stride;
    stride *= std::max<int64_t>(sizes[order[i]], 1);
  }
  return empty_strided(sizes, strides, dtype);
}

inline Tensor empty_contiguous(const Sizes& sizes, int32_t dtype) {
  Sizes order(sizes.size());
  std::iota(order.begin(), order.end(), 0);
  return empty_nested(sizes, order, dtype);
}

inline int32_t dtype_of(const Tensor& x) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

inline Tensor empty_floats(const Sizes& sizes) {
  return empty_contiguous(sizes, aoti_torch_dtype_float32());
}

// Of x's sizes and dtype.
inline Tensor empty_contiguous(const Tensor& x) {
  return empty_contiguous(x.sizes().vec(), dtype_of(x));
}

// Asks for pages of 2 MB inside a large new tensor. The allocator gives such memory back to the system
// each time it is freed, and touching 100 MB anew in pages of 4 KB takes about as long as computing
// what goes there.
inline Tensor in_large_pages(const Tensor& x) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(x.data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t end = (begin + x.numel() * x.element_size()) / kPage * kPage;
  // A refusal (an old kernel, pages turned off) costs speed only.
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
  return x;
}

// Whether x's axes, in some order, fill memory without gaps: its strides are those of a copy then.
inline bool is_dense(int64_t axes, const int64_t* sizes, const int64_t* strides) {
  int64_t filled = 1;
  for (int64_t found = 0; found < axes; ++found) {
    int64_t next = 0;
    while (next < axes && (sizes[next] < 2 || strides[next] != filled)) ++next;
    if (next == axes) break;
    filled *= sizes[next];
  }
  return filled == std::accumulate(sizes, sizes + axes, int64_t{1}, std::multiplies<>());
}

// What a kernel writes: uninitialised, in x's memory order; the last axis is always contiguous.
inline Tensor output_like(const Tensor& x) {
  const Sizes sizes = x.sizes().vec(), strides = x.strides().vec();
  if (strides.back() == 1 && is_dense(x.dim(), sizes.data(), strides.data())) {
    // Not through the dispatcher, which takes longer than the allocation.
    return in_large_pages(empty_strided(sizes, strides, dtype_of(x)));
  }
  const Tensor out = torch::stable::empty_like(x);
  return in_large_pages(out.stride(out.dim() - 1) == 1 ? out : empty_contiguous(x));
}

// The same with other sizes: the axes nest as x's do, densely.
inline Tensor output_like(const Tensor& x, const Sizes& sizes) {
  Sizes order(sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end() - 1,
                   [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
  return in_large_pages(empty_nested(sizes, order, dtype_of(x)));
}

// Bit i of `wanted` asks for an operator's i-th gradient; else it comes out as `nothing_like`.
inline bool is_wanted(int64_t wanted, int64_t i) { return (wanted >> i & 1) != 0; }
inline Tensor nothing_like(const Tensor& x) { return empty_contiguous({0}, dtype_of(x)); }

// The i-th gradient, in x's memory order; the view's address is null where it is not asked for.
struct Gradient {
  Tensor tensor;
  View view;

  Gradient(const Tensor& x, int64_t wanted, int64_t i)
      : tensor(is_wanted(wanted, i) ? output_like(x) : nothing_like(x)),
        view(View(is_wanted(wanted, i) ? tensor : x).output()) {
    if (!is_wanted(wanted, i)) view.data = nullptr;
  }
};

// Uninitialised floats from the start of a cache line on, the call's own.
struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Memory = std::unique_ptr<float[], Free>;

inline Memory memory(int64_t floats) {
  const auto bytes = static_cast<size_t>((std::max<int64_t>(floats, 1) + 15) / 16 * 64);
  auto* const p = static_cast<float*>(std::aligned_alloc(64, bytes));
  if (p == nullptr) {
    throw std::runtime_error("linear_vit: no memory for " + std::to_string(bytes) + " bytes");
  }
  return Memory(p);
}

// An instruction set's name, whether it can be used here, and an operation's kernels for it.
template <typename Kernels>
struct InstructionSet {
  const char* name;
  bool usable;
  const Kernels* kernels;
};

#if defined(LINEAR_VIT_X86)
inline bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("bmi2");
  return has;
}
inline bool has_avx512() {
  static const bool has = has_avx2() && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has;
}
#endif

// The kernels of the first usable instruction set, or of the one that LINEAR_VIT_CPU names: read at
// every call, so that tests can choose.
template <typename Kernels>
const Kernels& choose(std::initializer_list<InstructionSet<Kernels>> sets) {
  const char* variable = std::getenv("LINEAR_VIT_CPU");
  const bool any = variable == nullptr || variable[0] == '\0';
  std::string names;
  for (const auto& set : sets) {
    if (set.usable && (any || std::strcmp(variable, set.name) == 0)) return *set.kernels;
    if (set.usable) names += (names.empty() ? "" : ", ") + std::string(set.name);
  }
  throw std::runtime_error("linear_vit: LINEAR_VIT_CPU is '" + std::string(variable) +
                           "', which is not one of those that were built, that this processor has "
                           "and that the system lets it use (" + names + "): unset it");
}

// A call of fewer floating-point operations stays on its thread: another takes longer to wake than to do
// its share.
constexpr int64_t kWakingFlop = 1'100'000;

// function(item, scratch) for every item of a call of `flop`, on PyTorch's threads, in any order: an item
// writes where no other does, so that results do not depend on the number of threads. Threads take the
// next item when they are free: one that another program's work delays holds up one item and not a share.
template <typename Function>
void parallel(int64_t items, int64_t scratch_floats, int64_t flop, const Function& function) {
  const int64_t most = flop < kWakingFlop ? 1 : torch::stable::get_num_threads();
  const int64_t threads = std::min<int64_t>(most, items);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const Memory scratch = memory(scratch_floats);  // a thread's cache lines are its own
    for (int64_t item; (item = next.fetch_add(1)) < items;) function(item, scratch.get());
#if defined(LINEAR_VIT_X86)
    __builtin_ia32_sfence();  // what went past the caches is there for other threads
#endif
  });
}
