// Ripple's CPU operators: which lines of the grid make which, and how they are shared out;
// cpu_simd.cpp does the work. Shapes and dtypes have been checked by the public functions.
//
// At most 32 runs of neighbouring lines, which share what they read in one core's cache, are the
// items of work, cut by the grid's size alone; each sums its own share of the weights' gradients,
// and these are added in order: the same for any number of threads. Memory beyond tensors: 11
// float32 weights per channel and run. Backward leaves out what is not asked for.
#include <cstring>

#include "../cpu/tensors.h"
#include "cpu.h"

namespace {

const RippleKernels& kernels() {
  return choose<RippleKernels>({
#if defined(LINEAR_VIT_X86)
      {"avx512", has_avx512(), &ripple_avx512},
      {"amx", has_avx512(), &ripple_avx512},  // no products of matrices here
      {"avx2", has_avx2(), &ripple_avx2},
#endif
      {"portable", true, &ripple_portable},
  });
}

// Runs of the lines of all images: at most 32, each of a few at least.
struct Runs {
  int64_t lines, runs;
  int64_t flop;  // of nine products and sums, over all elements of the lines

  explicit Runs(const View& grid)
      : lines(grid.bytes() == 0 ? 0 : grid.size[0] * grid.size[1]),
        runs(std::min<int64_t>(lines, 32)),
        flop(18 * lines * grid.size[2] * grid.size[3]) {}

  // function(line) for those of a run, where there are `of` lines in all.
  template <typename Function>
  void each(int64_t run, int64_t of, const Function& function) const {
    for (int64_t line = of * run / runs; line < of * (run + 1) / runs; ++line) function(line);
  }
};

// A line's tokens, (B, rows, cols, C) seen as lines.
Rows line_of(const View& grid, int64_t line) {
  return grid.rows(line / grid.size[1], line % grid.size[1], 0);
}

// Weights in float32, as the kernels take them, and zeros: a token, or taps, of lines that are not.
struct Taps {
  int64_t pad;
  Memory all;
  float *first, *zeros;

  Taps(const RippleKernels& kernel, const Tensor& weight_any, bool reversed)
      : pad(padded(weight_any.size(0))), all(memory(12 * pad)), first(all.get()),
        zeros(first + 9 * pad) {
    const Tensor weight = contiguous(weight_any);
    kernel.load_weight(element_type(weight), weight.size(0), weight.data_ptr(), reversed, first);
    std::memset(zeros, 0, 3 * pad * sizeof(float));
  }
};

Window no_lines(const Taps& weights) {
  const Rows line{weights.zeros, 0};
  float* const taps = weights.zeros;
  return {0, {line, line, line}, {taps, taps, taps}};
}

// The lines first, first + 1, first + 2 of an image of `grid` that are there, each with its three
// taps of the weights, or of their gradients.
Window window(const View& grid, int64_t image, int64_t first, float* taps, const Taps& weights) {
  Window w = no_lines(weights);
  for (int64_t r = 0; r < 3; ++r) {
    const int64_t row = first + r;
    if (row < 0 || row >= grid.size[1]) continue;
    w.line[w.lines] = line_of(grid, image * grid.size[1] + row);
    w.taps[w.lines++] = taps + 3 * r * weights.pad;
  }
  return w;
}

// The same, of the lines first / 2, … that are even numbers' halves: those a pooled line came from.
Window halved_window(const View& grid, int64_t image, int64_t first, const Taps& weights) {
  Window w = no_lines(weights);
  for (int64_t r = 0; r < 3; ++r) {
    const int64_t row = first + r;
    if (row < 0 || row % 2 != 0 || row / 2 >= grid.size[1]) continue;
    w.line[w.lines] = line_of(grid, image * grid.size[1] + row / 2);
    w.taps[w.lines++] = weights.first + 3 * r * weights.pad;
  }
  return w;
}

// (2, C) in float32.
Memory load_pair(const RippleKernels& kernel, const Tensor& pair_any) {
  const Tensor pair = contiguous(pair_any);
  Memory to = memory(2 * padded(pair.size(1)));
  kernel.load_pair(element_type(pair), pair.size(1), pair.data_ptr(), to.get());
  return to;
}

// A weight's gradient, the i-th of the operator's.
Tensor weight_gradient(const Tensor& weight, int64_t wanted, int64_t i) {
  return is_wanted(wanted, i) ? empty_contiguous(weight) : nothing_like(weight);
}

// Sums of the weights' gradients, of which each run zeroes its own; none where none is asked for.
struct Sums {
  int64_t floats, runs;  // of a run
  Memory all;

  Sums(int64_t pad, int64_t runs_, bool needed)
      : floats(needed ? 11 * pad : 0), runs(runs_),
        all(memory(std::max<int64_t>(runs, 1) * floats)) {
    if (runs == 0) zeroed(0);
  }

  float* zeroed(int64_t run) const {
    return static_cast<float*>(std::memset(all.get() + run * floats, 0, floats * sizeof(float)));
  }

  // To (C, 3, 3) and (2, C), each if it is there.
  void store(const RippleKernels& kernel, const View& x, const Tensor& dweight,
             const Tensor* dpair = nullptr) const {
    const auto there = [](const Tensor& to) { return to.numel() == 0 ? nullptr : to.data_ptr(); };
    if (floats == 0) return;
    kernel.store_gradients(x.element, x.size[3], runs, all.get(), there(dweight),
                           dpair == nullptr ? nullptr : there(*dpair));
  }
};

// What expanding adds to a line of the fine grid, or takes from it.
Spread spread_of(const View& z, float* pair, int64_t axis, int64_t image, int64_t row) {
  const int64_t coarse = axis == 0 ? row / 2 : row, pad = padded(z.size[3]);
  Spread s{line_of(z, image * z.size[1] + coarse), {pair, pair + pad}, axis == 1};
  if (axis == 0 && row % 2 == 1) s.pair[0] = pair + pad;
  return s;
}

Tensor pool(const Tensor& x_all, const Tensor& weight, int64_t axis) {
  const RippleKernels& kernel = kernels();
  const View x(x_all);
  Sizes sizes(x.size, x.size + 4);
  sizes[axis + 1] = (sizes[axis + 1] + 1) / 2;
  const Tensor out_all = output_like(x_all, sizes);
  if (out_all.numel() == 0) return out_all;
  const View out = View(out_all).output();
  const Taps taps(kernel, weight, false);
  const int64_t channels = x.size[3], cols = x.size[2];
  const Runs runs(out);
  parallel(runs.runs, 0, runs.flop, [&](int64_t run, float*) {
    runs.each(run, runs.lines, [&](int64_t line) {
      const int64_t image = line / sizes[1], row = line % sizes[1];
      const Window w = window(x, image, (axis == 0 ? 2 * row : row) - 1, taps.first, taps);
      if (axis == 0) {
        kernel.same(x.element, channels, cols, w, line_of(out, line), nullptr);
      } else {
        kernel.halve(x.element, channels, cols, w, line_of(out, line));
      }
    });
  });
  return out_all;
}

std::tuple<Tensor, Tensor> pool_backward(const Tensor& dout_any, const Tensor& x_all,
                                         const Tensor& weight, int64_t axis, int64_t wanted) {
  const RippleKernels& kernel = kernels();
  const Tensor dout_all = readable(dout_any);
  const Gradient dx(x_all, wanted, 0);
  const Tensor dweight = weight_gradient(weight, wanted, 1);
  const View dout(dout_all), x(x_all);
  const Taps taps(kernel, weight, true);
  const int64_t channels = x.size[3], cols = x.size[2];
  const Runs runs(x);
  const bool weights = is_wanted(wanted, 1);
  const Sums sums(taps.pad, runs.runs, weights);
  parallel(runs.runs, 0, runs.flop, [&](int64_t run, float*) {
    float* const gradient = sums.zeroed(run);
    runs.each(run, weights ? dout.size[0] * dout.size[1] : 0, [&](int64_t line) {
      const int64_t image = line / dout.size[1], row = line % dout.size[1];
      const Window w = window(x, image, (axis == 0 ? 2 * row : row) - 1, gradient, taps);
      kernel.weight_gradient(x.element, channels, cols, axis == 0 ? 1 : 2, w, line_of(dout, line));
    });
    runs.each(run, is_wanted(wanted, 0) ? runs.lines : 0, [&](int64_t line) {
      const int64_t image = line / x.size[1], row = line % x.size[1];
      if (axis == 0) {
        const Window w = halved_window(dout, image, row - 1, taps);
        kernel.same(x.element, channels, cols, w, line_of(dx.view, line), nullptr);
      } else {
        const Window w = window(dout, image, row - 1, taps.first, taps);
        kernel.twice(x.element, channels, cols, w, line_of(dx.view, line));
      }
    });
  });
  sums.store(kernel, x, dweight);
  return {dx.tensor, dweight};
}

Tensor expand(const Tensor& z_all, const Tensor& x_all, const Tensor& weight,
              const Tensor& lateral_weight, int64_t axis) {
  const RippleKernels& kernel = kernels();
  const Tensor out_all = output_like(x_all);
  if (out_all.numel() == 0) return out_all;
  const View z(z_all), x(x_all), out = View(out_all).output();
  const Taps taps(kernel, lateral_weight, false);
  const Memory pair = load_pair(kernel, weight);
  const Runs runs(x);
  parallel(runs.runs, 0, runs.flop, [&](int64_t run, float*) {
    runs.each(run, runs.lines, [&](int64_t line) {
      const int64_t image = line / x.size[1], row = line % x.size[1];
      const Window w = window(x, image, row - 1, taps.first, taps);
      const Spread s = spread_of(z, pair.get(), axis, image, row);
      kernel.same(x.element, x.size[3], x.size[2], w, line_of(out, line), &s);
    });
  });
  return out_all;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> expand_backward(const Tensor& dout_any,
                                                           const Tensor& z_all,
                                                           const Tensor& x_all,
                                                           const Tensor& weight,
                                                           const Tensor& lateral_weight,
                                                           int64_t axis, int64_t wanted) {
  const RippleKernels& kernel = kernels();
  const Tensor dout_all = readable(dout_any);
  const Gradient dz(z_all, wanted, 0), dx(x_all, wanted, 1);
  const Tensor dweight = weight_gradient(weight, wanted, 2);
  const Tensor dlateral_weight = weight_gradient(lateral_weight, wanted, 3);
  const bool pairs = is_wanted(wanted, 2), laterals = is_wanted(wanted, 3);
  const View dout(dout_all), z(z_all), x(x_all);
  const Taps taps(kernel, lateral_weight, true);
  const Memory pair = load_pair(kernel, weight);
  const int64_t channels = x.size[3], cols = x.size[2], pad = taps.pad;
  const Runs runs(x);
  const Sums sums(pad, runs.runs, pairs || laterals);
  const bool fine = laterals || pairs || is_wanted(wanted, 1);
  parallel(runs.runs, 0, runs.flop, [&](int64_t run, float*) {
    float* const gradient = sums.zeroed(run);
    float* const dpair[2] = {gradient + 9 * pad, gradient + 10 * pad};
    runs.each(run, fine ? runs.lines : 0, [&](int64_t line) {
      const int64_t image = line / x.size[1], row = line % x.size[1];
      if (laterals) {
        const Window lines = window(x, image, row - 1, gradient, taps);
        kernel.weight_gradient(x.element, channels, cols, 1, lines, line_of(dout, line));
      }
      if (pairs) {
        const Spread s = spread_of(z, pair.get(), axis, image, row);
        float* const own[2] = {axis == 0 ? dpair[row % 2] : dpair[0], dpair[1]};
        kernel.spread_gradient(x.element, channels, cols, line_of(dout, line), s, own);
      }
      if (dx.view.data != nullptr) {
        const Window w = window(dout, image, row - 1, taps.first, taps);
        kernel.same(x.element, channels, cols, w, line_of(dx.view, line), nullptr);
      }
    });
    runs.each(run, is_wanted(wanted, 0) ? z.size[0] * z.size[1] : 0, [&](int64_t line) {
      const int64_t image = line / z.size[1], row = (axis == 0 ? 2 : 1) * (line % z.size[1]);
      const int64_t first = image * x.size[1] + row;
      const int64_t lines = axis == 0 && row + 1 < x.size[1] ? 2 : 1;
      const Rows from[2] = {line_of(dout, first), lines == 2 ? line_of(dout, first + 1) : Rows{}};
      kernel.coarse_gradient(x.element, channels, cols, lines, from,
                             spread_of(dz.view, pair.get(), axis, image, row));
    });
  });
  sums.store(kernel, x, dlateral_weight, &dweight);
  return {dz.tensor, dx.tensor, dweight, dlateral_weight};
}

std::string instruction_set() { return kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(linear_vit, m) {
  m.def("cpu_ripple_pool(Tensor x, Tensor weight, int axis) -> Tensor");
  m.def(
      "cpu_ripple_pool_backward(Tensor dout, Tensor x, Tensor weight, int axis, int wanted)"
      " -> (Tensor, Tensor)");
  m.def(
      "cpu_ripple_expand(Tensor z, Tensor x, Tensor weight, Tensor lateral_weight, int axis)"
      " -> Tensor");
  m.def(
      "cpu_ripple_expand_backward(Tensor dout, Tensor z, Tensor x, Tensor weight,"
      " Tensor lateral_weight, int axis, int wanted) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_ripple_instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(linear_vit, CPU, m) {
  m.impl("cpu_ripple_pool", TORCH_BOX(&pool));
  m.impl("cpu_ripple_pool_backward", TORCH_BOX(&pool_backward));
  m.impl("cpu_ripple_expand", TORCH_BOX(&expand));
  m.impl("cpu_ripple_expand_backward", TORCH_BOX(&expand_backward));
}

// Without tensors there is no device to choose by.
STABLE_TORCH_LIBRARY_IMPL(linear_vit, CompositeExplicitAutograd, m) {
  m.impl("cpu_ripple_instruction_set", TORCH_BOX(&instruction_set));
}
