// What cpu.cpp (operators) asks of cpu_simd.cpp, which is compiled once per instruction set.
//
// A line is one row of a token grid: `Rows` from its first token, with elements from token to token.
// Weights are float32, [tap][channels rounded up to 16], so that a tap's weights are vectors too.
#pragma once

#include "../cpu/arguments.h"

// The lines that a line of results reads, at most three, each with its three taps' weights (or
// their gradients): [3][padded channels]. Where there are fewer the rest are lines of zeros, with
// weights of zero that are not to be written.
struct Window {
  int32_t lines;
  Rows line[3];
  float* taps[3];
};

// What expanding adds to token j: pair[j % 2], or pair[0] for all where `along` is false, times z at
// j / 2, or j.
struct Spread {
  Rows z;
  const float* pair[2];
  bool along;
};

struct RippleKernels {
  const char* name;

  // (C, 3, 3) to [3][3][padded], rows and columns reversed if asked for; (2, C) to [2][padded].
  void (*load_weight)(ElementType, int64_t channels, const void* weight, bool reversed, float* taps);
  void (*load_pair)(ElementType, int64_t channels, const void* pair, float* to);
  // Sums `parts` of [11][padded], in order, into (C, 3, 3) and (2, C), each if not null.
  void (*store_gradients)(ElementType, int64_t channels, int64_t parts, float* sums, void* weight,
                          void* pair);

  // A line of `cols` results from lines as long, twice as long, and half as long.
  void (*same)(ElementType, int64_t channels, int64_t cols, const Window&, Rows out,
               const Spread* spread);
  void (*halve)(ElementType, int64_t channels, int64_t fine_cols, const Window&, Rows out);
  void (*twice)(ElementType, int64_t channels, int64_t fine_cols, const Window&, Rows out);
  // The window's taps += Σ_j dout[j] x[j · stride + tap - 1].
  void (*weight_gradient)(ElementType, int64_t channels, int64_t cols, int64_t stride,
                          const Window&, Rows dout);
  // Expansion: dz from the one or two lines of dout, and pair's gradient, summed.
  void (*spread_gradient)(ElementType, int64_t channels, int64_t fine_cols, Rows dout,
                          const Spread& spread, float* const dpair[2]);
  void (*coarse_gradient)(ElementType, int64_t channels, int64_t fine_cols, int64_t lines,
                          const Rows* dout, const Spread& spread);
};

constexpr int64_t padded(int64_t channels) { return (channels + 15) / 16 * 16; }

extern const RippleKernels ripple_avx512, ripple_avx2, ripple_portable;
