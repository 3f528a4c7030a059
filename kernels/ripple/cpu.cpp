// Ripple's CPU operators: which lines of the grid make which, and how they are shared out;
// cpu_simd.cpp does the work. Shapes and dtypes have been checked by the public functions.
//
// At most 32 runs of neighbouring lines, which share what they read in one core's cache, are the
// items of work, cut by the grid's size alone; each sums its own share of the weights' gradients,
// and these are added in order: the same for any number of threads. Memory beyond tensors: 11
// float32 weights per channel and run.
#include <torch/library.h>

#include <cstring>

#include "../cpu/tensors.h"
#include "cpu.h"

namespace {

using at::Tensor;

const RippleKernels& kernels() {
#if defined(LINEAR_VIT_X86)
  return choose(&ripple_avx512, &ripple_avx2, &ripple_portable);
#else
  return choose<RippleKernels>(nullptr, nullptr, &ripple_portable);
#endif
}

// Runs of the lines of all images: at most 32, each of a few at least.
struct Runs {
  int64_t lines, runs;

  explicit Runs(int64_t lines_) : lines(lines_), runs(std::min<int64_t>(lines_, 32)) {}

  // function(line) for those of a run, where there are `of` lines in all.
  template <typename Function>
  void each(int64_t run, int64_t of, const Function& function) const {
    for (int64_t line = of * run / runs; line < of * (run + 1) / runs; ++line) function(line);
  }
};

Rows line_of(const Tensor& grid, int64_t line) {
  Rows row = rows(grid, line / grid.size(1), line % grid.size(1), 0);
  return {row.data, grid.stride(2)};
}

// The lines first, first + 1, first + 2 of an image of `grid` that are there, with their taps.
Window window(const Tensor& grid, int64_t image, int64_t first, float* taps, int64_t pad) {
  Window w{};
  for (int64_t r = 0; r < 3; ++r) {
    const int64_t row = first + r;
    if (row < 0 || row >= grid.size(1)) continue;
    w.line[w.lines] = line_of(grid, image * grid.size(1) + row);
    w.taps[w.lines++] = taps + 3 * r * pad;
  }
  return w;
}

// The same, of the lines first / 2, … that are even numbers' halves: those a pooled line came from.
Window halved_window(const Tensor& grid, int64_t image, int64_t first, float* taps, int64_t pad) {
  Window w{};
  for (int64_t r = 0; r < 3; ++r) {
    const int64_t row = first + r;
    if (row < 0 || row % 2 != 0 || row / 2 >= grid.size(1)) continue;
    w.line[w.lines] = line_of(grid, image * grid.size(1) + row / 2);
    w.taps[w.lines++] = taps + 3 * r * pad;
  }
  return w;
}

Tensor load_weight(const RippleKernels& kernel, const Tensor& weight_any, bool reversed) {
  const Tensor weight = weight_any.contiguous();
  Tensor taps = empty_floats(weight, {9, padded(weight.size(0))});
  kernel.load_weight(element_type(weight), weight.size(0), weight.data_ptr(), reversed,
                     taps.data_ptr<float>());
  return taps;
}

Tensor load_pair(const RippleKernels& kernel, const Tensor& pair_any) {
  const Tensor pair = pair_any.contiguous();
  Tensor to = empty_floats(pair, {2, padded(pair.size(1))});
  kernel.load_pair(element_type(pair), pair.size(1), pair.data_ptr(), to.data_ptr<float>());
  return to;
}

// Sums of the weights' gradients, of which each run zeroes its own.
struct Sums {
  int64_t pad, runs;
  Tensor memory;

  Sums(const Tensor& x, int64_t runs_)
      : pad(padded(x.size(3))), runs(runs_),
        memory(empty_floats(x, {std::max<int64_t>(runs, 1), 11, pad})) {
    if (runs == 0) memory.zero_();
  }

  float* zeroed(int64_t run) const {
    float* const sums = memory.data_ptr<float>() + run * 11 * pad;
    return static_cast<float*>(std::memset(sums, 0, 11 * pad * sizeof(float)));
  }

  void store(const RippleKernels& kernel, const Tensor& dweight, void* dpair) const {
    kernel.store_gradients(element_type(dweight), dweight.size(0), runs, memory.data_ptr<float>(),
                           dweight.data_ptr(), dpair);
  }
};

// What expanding adds to a line of the fine grid, or takes from it.
Spread spread_of(const Tensor& z, const Tensor& pair, int64_t axis, int64_t image, int64_t row) {
  float* const p = pair.data_ptr<float>();
  const int64_t coarse = axis == 0 ? row / 2 : row, pad = pair.size(1);
  Spread s{line_of(z, image * z.size(1) + coarse), {p, p + pad}, axis == 1};
  if (axis == 0 && row % 2 == 1) s.pair[0] = p + pad;
  return s;
}

Tensor pool(const Tensor& x, const Tensor& weight, int64_t axis) {
  const RippleKernels& kernel = kernels();
  const ElementType element = element_type(x);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes[axis + 1] = (sizes[axis + 1] + 1) / 2;
  const Tensor out = output_like(x, sizes);
  if (out.numel() == 0) return out;
  const Tensor taps = load_weight(kernel, weight, false);
  const int64_t channels = x.size(3), pad = padded(channels);
  const Runs runs(sizes[0] * sizes[1]);
  parallel(runs.runs, 0, [&](int64_t run, float*) {
    runs.each(run, runs.lines, [&](int64_t line) {
      const int64_t image = line / sizes[1], row = line % sizes[1];
      const Window w =
          window(x, image, (axis == 0 ? 2 * row : row) - 1, taps.data_ptr<float>(), pad);
      if (axis == 0) {
        kernel.same(element, channels, x.size(2), w, line_of(out, line), nullptr);
      } else {
        kernel.halve(element, channels, x.size(2), w, line_of(out, line));
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> pool_backward(const Tensor& dout_any, const Tensor& x,
                                         const Tensor& weight, int64_t axis) {
  const RippleKernels& kernel = kernels();
  const ElementType element = element_type(x);
  const Tensor dout = readable(dout_any);
  const Tensor dx = output_like(x), dweight = at::empty(weight.sizes(), weight.options());
  const Tensor taps = load_weight(kernel, weight, true);
  const int64_t channels = x.size(3), pad = padded(channels), cols = x.size(2);
  const Runs runs(x.numel() == 0 ? 0 : x.size(0) * x.size(1));
  const Sums sums(x, runs.runs);
  parallel(runs.runs, 0, [&](int64_t run, float*) {
    float* const gradient = sums.zeroed(run);
    runs.each(run, dout.size(0) * dout.size(1), [&](int64_t line) {
      const int64_t image = line / dout.size(1), row = line % dout.size(1);
      const Window w = window(x, image, (axis == 0 ? 2 * row : row) - 1, gradient, pad);
      kernel.weight_gradient(element, channels, cols, axis == 0 ? 1 : 2, w, line_of(dout, line));
    });
    runs.each(run, runs.lines, [&](int64_t line) {
      const int64_t image = line / x.size(1), row = line % x.size(1);
      float* const reversed = taps.data_ptr<float>();
      if (axis == 0) {
        const Window w = halved_window(dout, image, row - 1, reversed, pad);
        kernel.same(element, channels, cols, w, line_of(dx, line), nullptr);
      } else {
        const Window w = window(dout, image, row - 1, reversed, pad);
        kernel.twice(element, channels, cols, w, line_of(dx, line));
      }
    });
  });
  sums.store(kernel, dweight, nullptr);
  return {dx, dweight};
}

Tensor expand(const Tensor& z, const Tensor& x, const Tensor& weight, const Tensor& lateral_weight,
              int64_t axis) {
  const RippleKernels& kernel = kernels();
  const ElementType element = element_type(x);
  const Tensor out = output_like(x);
  if (out.numel() == 0) return out;
  const Tensor taps = load_weight(kernel, lateral_weight, false), pair = load_pair(kernel, weight);
  const int64_t channels = x.size(3), pad = padded(channels);
  const Runs runs(x.size(0) * x.size(1));
  parallel(runs.runs, 0, [&](int64_t run, float*) {
    runs.each(run, runs.lines, [&](int64_t line) {
      const int64_t image = line / x.size(1), row = line % x.size(1);
      const Window w = window(x, image, row - 1, taps.data_ptr<float>(), pad);
      const Spread s = spread_of(z, pair, axis, image, row);
      kernel.same(element, channels, x.size(2), w, line_of(out, line), &s);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> expand_backward(const Tensor& dout_any, const Tensor& z,
                                                           const Tensor& x, const Tensor& weight,
                                                           const Tensor& lateral_weight,
                                                           int64_t axis) {
  const RippleKernels& kernel = kernels();
  const ElementType element = element_type(x);
  const Tensor dout = readable(dout_any);
  const Tensor dz = output_like(z), dx = output_like(x);
  const Tensor dweight = at::empty(weight.sizes(), weight.options());
  const Tensor dlateral_weight = at::empty(lateral_weight.sizes(), lateral_weight.options());
  const Tensor taps = load_weight(kernel, lateral_weight, true), pair = load_pair(kernel, weight);
  const int64_t channels = x.size(3), pad = padded(channels), cols = x.size(2);
  const Runs runs(x.numel() == 0 ? 0 : x.size(0) * x.size(1));
  const Sums sums(x, runs.runs);
  parallel(runs.runs, 0, [&](int64_t run, float*) {
    float* const gradient = sums.zeroed(run);
    float* const dpair[2] = {gradient + 9 * pad, gradient + 10 * pad};
    runs.each(run, runs.lines, [&](int64_t line) {
      const int64_t image = line / x.size(1), row = line % x.size(1);
      kernel.weight_gradient(element, channels, cols, 1, window(x, image, row - 1, gradient, pad),
                             line_of(dout, line));
      const Spread s = spread_of(z, pair, axis, image, row);
      float* const own[2] = {axis == 0 ? dpair[row % 2] : dpair[0], dpair[1]};
      kernel.spread_gradient(element, channels, cols, line_of(dout, line), s, own);
      const Window w = window(dout, image, row - 1, taps.data_ptr<float>(), pad);
      kernel.same(element, channels, cols, w, line_of(dx, line), nullptr);
    });
    runs.each(run, z.size(0) * z.size(1), [&](int64_t line) {
      const int64_t image = line / z.size(1), row = (axis == 0 ? 2 : 1) * (line % z.size(1));
      const int64_t fine = image * x.size(1) + row;
      const int64_t lines = axis == 0 && row + 1 < x.size(1) ? 2 : 1;
      const Rows from[2] = {line_of(dout, fine), lines == 2 ? line_of(dout, fine + 1) : Rows{}};
      kernel.coarse_gradient(element, channels, cols, lines, from,
                             spread_of(dz, pair, axis, image, row));
    });
  });
  sums.store(kernel, dlateral_weight, dweight.data_ptr());
  return {dz, dx, dweight, dlateral_weight};
}

std::string instruction_set() { return kernels().name; }

}  // namespace

TORCH_LIBRARY_FRAGMENT(linear_vit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("cpu_ripple_pool(Tensor x, Tensor weight, int axis) -> Tensor", tags);
  m.def(
      "cpu_ripple_pool_backward(Tensor dout, Tensor x, Tensor weight, int axis)"
      " -> (Tensor, Tensor)",
      tags);
  m.def(
      "cpu_ripple_expand(Tensor z, Tensor x, Tensor weight, Tensor lateral_weight, int axis)"
      " -> Tensor",
      tags);
  m.def(
      "cpu_ripple_expand_backward(Tensor dout, Tensor z, Tensor x, Tensor weight,"
      " Tensor lateral_weight, int axis) -> (Tensor, Tensor, Tensor, Tensor)",
      tags);
  m.def("cpu_ripple_instruction_set() -> str", instruction_set);
}

TORCH_LIBRARY_IMPL(linear_vit, CPU, m) {
  m.impl("cpu_ripple_pool", pool);
  m.impl("cpu_ripple_pool_backward", pool_backward);
  m.impl("cpu_ripple_expand", expand);
  m.impl("cpu_ripple_expand_backward", expand_backward);
}
