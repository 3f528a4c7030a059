// Ripple pooling and expansion for the CPU: the arithmetic, a line (grid row) of tokens at a time.
//
// Vectors run over channels, the last axis. A line of results is made from left to right, 16 tokens
// and of these four vectors of channels at a time: each token of the window's lines is loaded and
// converted once (at the ends of 16, twice) and serves the three results it is a neighbour of, whose
// sums wait in registers. Per result and vector that is 3 loads of tokens, 9 of weights (from the L1
// cache) and 9 FMAs: a grid that is not in cache comes no faster than memory brings it, which is the
// limit. (A whole line by four vectors at a time, a few cache lines of every token, took a quarter to a
// half longer.)
//
// Backward is the same walk: the gradient of a 3×3 correlation is one with reversed weights, over
// the lines that exist; the weights' gradients keep their nine sums in registers along a line.
#include "cpu.h"

#include "../cpu/simd.h"

namespace {

// function(an Element)
template <typename Function>
INLINE void with_element(ElementType element, const Function& function) {
  if (element == kFloat32) return function(float{});
  if (element == kFloat16) return function(Float16{});
  return function(BFloat16{});
}

// kWidth vectors of channels of one token. A single one may be the last of all, and partial: not a
// type of its own, since all code is compiled for each.
template <typename Element, int kWidth>
struct Channels {
  static constexpr int width = kWidth;
  int64_t first, count;  // count: of a single vector

  INLINE bool partial() const { return kWidth == 1 && count < kLanes; }
  INLINE Floats get(Rows line, int64_t j, int w) const {
    const Element* p = (const Element*)line.data + j * line.stride + first + w * kLanes;
    if (!partial()) return load(p);
    Element some[kLanes] = {};
    __builtin_memcpy(some, p, count * sizeof(Element));
    return load(some);
  }
  INLINE void put(Rows line, int64_t j, int w, Floats x) const {
    Element* p = (Element*)line.data + j * line.stride + first + w * kLanes;
    if (!partial()) return line.past_caches ? stream(p, x) : store(p, x);
    Element some[kLanes];
    store(some, x);
    __builtin_memcpy(p, some, count * sizeof(Element));
  }
  // The same channels of a token some way ahead; past a line's end, of the next line, or of nothing.
  INLINE void fetch(Rows line, int64_t j) const {
    constexpr int64_t kAhead = 8, kBytes = kWidth * kLanes * sizeof(Element);
    const char* p = (const char*)line.data + ((j + kAhead) * line.stride + first) * sizeof(Element);
    for (int64_t at = 0; at < kBytes; at += 64) __builtin_prefetch(p + at);
  }
  // Weights are padded: never partial.
  INLINE Floats weight(const float* taps, int w) const { return load(taps + first + w * kLanes); }
  INLINE void add(float* taps, int w, Floats x) const {
    store(taps + first + w * kLanes, weight(taps, w) + x);
  }
};

// function(Channels, first token, end) over all channels and `tokens`, at most kTokens at a time.
constexpr int64_t kAll = INT64_MAX / 2;
template <int64_t kTokens = 16, typename Function>  // an even number: halve and twice go by pairs
INLINE void for_pieces(ElementType element, int64_t channels, int64_t tokens,
                       const Function& function) {
  with_element(element, [&](auto example) {
    using Element = decltype(example);
    for (int64_t first = 0; first < tokens; first += kTokens) {
      const int64_t end = kTokens < tokens - first ? first + kTokens : tokens;
      int64_t c = 0;
      for (; c + 4 * kLanes <= channels; c += 4 * kLanes) {
        function(Channels<Element, 4>{c, kLanes}, first, end);
      }
      for (; c < channels; c += kLanes) {
        const int64_t count = channels - c < kLanes ? channels - c : kLanes;
        function(Channels<Element, 1>{c, count}, first, end);
      }
    }
  });
}

// function(std::integral_constant<int, lines>)
template <typename Function>
INLINE void with_lines(int lines, const Function& function) {
  if (lines == 3) return function(std::integral_constant<int, 3>());
  if (lines == 2) return function(std::integral_constant<int, 2>());
  return function(std::integral_constant<int, 1>());
}

// Σ over the window's lines of one token's share at one tap.
template <int kLines, typename C>
INLINE Floats share(const C& c, const Window& window, const Floats* x, int tap, int64_t pad, int w) {
  Floats total = x[0] * c.weight(window.taps[0] + tap * pad, w);
  for (int r = 1; r < kLines; ++r) total += x[r] * c.weight(window.taps[r] + tap * pad, w);
  return total;
}

// Below, loops work on copies of their arguments: a result that is stored may, for all the compiler
// knows, be stored in the arguments, and they would be read again for each one.

void same(ElementType element, int64_t channels, int64_t cols_, const Window& window_, Rows out_,
          const Spread* spread_) {
  with_lines(window_.lines, [&](auto lines) {
    constexpr int kLines = lines;
    for_pieces(element, channels, cols_, [&](auto c, int64_t first, int64_t end) {
      constexpr int kWidth = decltype(c)::width;
      const Window window = window_;
      const Rows out = out_;
      const bool spreads = spread_ != nullptr;
      const Spread spread = spreads ? *spread_ : Spread{};
      const int64_t cols = cols_, pad = padded(channels);
      Floats waiting[kWidth] = {}, next[kWidth] = {};
      const auto emit = [&](int64_t j, int w, Floats x) INLINE_LAMBDA {
        if (spreads) {
          const int64_t at = spread.along ? j / 2 : j;
          x += c.get(spread.z, at, w) * c.weight(spread.pair[spread.along ? j % 2 : 0], w);
        }
        c.put(out, j, w, x);
      };
      // From the neighbour before the first to the one after the last.
      const int64_t after = end < cols ? end + 1 : cols;
      for (int64_t j = first > 0 ? first - 1 : 0; j < after; ++j) {
        for (int r = 0; r < kLines; ++r) c.fetch(window.line[r], j);
#pragma GCC unroll 4
        for (int w = 0; w < kWidth; ++w) {
          Floats x[kLines];
          for (int r = 0; r < kLines; ++r) x[r] = c.get(window.line[r], j, w);
          if (j > first) emit(j - 1, w, waiting[w] + share<kLines>(c, window, x, 2, pad, w));
          waiting[w] = next[w] + share<kLines>(c, window, x, 1, pad, w);
          next[w] = share<kLines>(c, window, x, 0, pad, w);
        }
      }
      for (int w = 0; end == cols && w < kWidth; ++w) emit(cols - 1, w, waiting[w]);
    });
  });
}

void halve(ElementType element, int64_t channels, int64_t fine_cols_, const Window& window_,
           Rows out_) {
  for_pieces(element, channels, fine_cols_, [&](auto c, int64_t first, int64_t end) {
    constexpr int kWidth = decltype(c)::width;
    const Window window = window_;
    const Rows out = out_;
    const int64_t pad = padded(channels);
    Floats waiting[kWidth] = {};
    const auto tokens = [&](int64_t j, int w, Floats* x) INLINE_LAMBDA {
      for (int r = 0; r < 3; ++r) x[r] = c.get(window.line[r], j, w);
    };
    for (int w = 0; first > 0 && w < kWidth; ++w) {
      Floats x[3];
      tokens(first - 1, w, x);
      waiting[w] = share<3>(c, window, x, 0, pad, w);
    }
    for (int64_t j = first; j < end; j += 2) {
      for (int r = 0; r < 3; ++r) {
        c.fetch(window.line[r], j);
        c.fetch(window.line[r], j + 1);
      }
#pragma GCC unroll 4
      for (int w = 0; w < kWidth; ++w) {
        Floats x[3];
        tokens(j, w, x);
        Floats result = waiting[w] + share<3>(c, window, x, 1, pad, w);
        if (j + 1 < end) {
          tokens(j + 1, w, x);
          result += share<3>(c, window, x, 2, pad, w);
          waiting[w] = share<3>(c, window, x, 0, pad, w);
        }
        c.put(out, j / 2, w, result);
      }
    }
  });
}

void twice(ElementType element, int64_t channels, int64_t fine_cols_, const Window& window_,
           Rows out_) {
  for_pieces(element, channels, fine_cols_, [&](auto c, int64_t first, int64_t end) {
    constexpr int kWidth = decltype(c)::width;
    const Window window = window_;
    const Rows out = out_;
    const int64_t fine_cols = fine_cols_, pad = padded(channels);
    Floats waiting[kWidth] = {};
    // An odd token is made with the even one after it, which may be the next piece's first.
    const int64_t after = end < fine_cols ? end + 1 : end;
    for (int64_t j = first; j < after; j += 2) {
      for (int r = 0; r < 3; ++r) c.fetch(window.line[r], j / 2);
#pragma GCC unroll 4
      for (int w = 0; w < kWidth; ++w) {
        Floats x[3];
        for (int r = 0; r < 3; ++r) x[r] = c.get(window.line[r], j / 2, w);
        if (j > first) c.put(out, j - 1, w, waiting[w] + share<3>(c, window, x, 2, pad, w));
        if (j == end) continue;
        c.put(out, j, w, share<3>(c, window, x, 1, pad, w));
        waiting[w] = share<3>(c, window, x, 0, pad, w);
      }
    }
    for (int w = 0; after == end && end % 2 == 0 && w < kWidth; ++w) {
      c.put(out, end - 1, w, waiting[w]);
    }
  });
}

void weight_gradient(ElementType element, int64_t channels, int64_t cols_, int64_t stride_,
                     const Window& window_, Rows dout_) {
  const int64_t tokens_ = (cols_ + stride_ - 1) / stride_;  // of dout
  // A whole line at a time: sums begin anew with every piece, and 16 tokens took a quarter longer.
  for_pieces<kAll>(element, channels, tokens_, [&](auto c, int64_t first, int64_t end) {
    const Window window = window_;
    const Rows dout = dout_;
    const int64_t tokens = tokens_, cols = cols_, stride = stride_, pad = padded(channels);
    for (int w = 0; w < decltype(c)::width; ++w) {
      Floats total[3][3] = {};
      const auto add = [&](int tap, Floats g, const Floats* x) INLINE_LAMBDA {
        for (int r = 0; r < 3; ++r) total[r][tap] += g * x[r];
      };
      Floats before = first > 0 ? c.get(dout, first - 1, w) : Floats{};
      Floats here = c.get(dout, first, w);
      for (int64_t j = first; j < end; ++j) {
        if (w == 0) {  // the first vector of four brings the others
          c.fetch(dout, j);
          for (int r = 0; r < 3; ++r) {
            c.fetch(window.line[r], stride * j);
            if (stride == 2) c.fetch(window.line[r], 2 * j + 1);
          }
        }
        const Floats after = j + 1 < tokens ? c.get(dout, j + 1, w) : Floats{};
        Floats x[3];
        for (int r = 0; r < 3; ++r) x[r] = c.get(window.line[r], stride * j, w);
        add(1, here, x);
        if (stride == 1) {
          add(0, after, x);
          add(2, before, x);
        } else if (2 * j + 1 < cols) {
          for (int r = 0; r < 3; ++r) x[r] = c.get(window.line[r], 2 * j + 1, w);
          add(0, after, x);
          add(2, here, x);
        }
        before = here;
        here = after;
      }
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) {
        if (r == window.lines) break;
        for (int tap = 0; tap < 3; ++tap) c.add(window.taps[r] + tap * pad, w, total[r][tap]);
      }
    }
  });
}

void spread_gradient(ElementType element, int64_t channels, int64_t fine_cols, Rows dout,
                     const Spread& spread, float* const dpair[2]) {
  for_pieces(element, channels, fine_cols, [&](const auto& c, int64_t first, int64_t end) {
    for (int w = 0; w < std::decay_t<decltype(c)>::width; ++w) {
      Floats total[2] = {};
      for (int64_t j = first; j < end; ++j) {
        const Floats g = c.get(dout, j, w);
        if (spread.along) {
          const Floats share = g * c.get(spread.z, j / 2, w);
          if (j % 2 == 0) total[0] += share; else total[1] += share;
        } else {
          total[0] += g * c.get(spread.z, j, w);
        }
      }
      c.add(dpair[0], w, total[0]);
      if (spread.along) c.add(dpair[1], w, total[1]);
    }
  });
}

void coarse_gradient(ElementType element, int64_t channels, int64_t fine_cols, int64_t lines,
                     const Rows* dout, const Spread& spread) {
  const int64_t coarse_cols = spread.along ? (fine_cols + 1) / 2 : fine_cols;
  for_pieces(element, channels, coarse_cols, [&](const auto& c, int64_t first, int64_t end) {
    for (int64_t j = first; j < end; ++j) {
      for (int w = 0; w < std::decay_t<decltype(c)>::width; ++w) {
        const int64_t at = spread.along ? 2 * j : j;
        Floats total = c.get(dout[0], at, w) * c.weight(spread.pair[0], w);
        if (spread.along && at + 1 < fine_cols) {
          total += c.get(dout[0], at + 1, w) * c.weight(spread.pair[1], w);
        } else if (!spread.along && lines == 2) {
          total += c.get(dout[1], at, w) * c.weight(spread.pair[1], w);
        }
        c.put(spread.z, j, w, total);
      }
    }
  });
}

// ---- weights -------------------------------------------------------------------------------------

// Converted a vector at a time, and then transposed: one element at a time takes longer than a small grid.

void load_weight(ElementType element, int64_t channels, const void* weight, bool reversed,
                 float* taps) {
  const int64_t pad = padded(channels);
  with_element(element, [&](auto example) {
    for (int64_t c = 0; c < pad; c += kLanes) {
      const int64_t there = channels - c, count = there < 0 ? 0 : there < kLanes ? there : kLanes;
      float some[9 * kLanes];
      load_row((const decltype(example)*)weight + 9 * c, 9 * count, some, 9 * kLanes);
      for (int tap = 0; tap < 9; ++tap) {
        float* to = taps + (reversed ? 8 - tap : tap) * pad + c;
        for (int i = 0; i < kLanes; ++i) to[i] = some[9 * i + tap];
      }
    }
  });
}

void load_pair(ElementType element, int64_t channels, const void* pair, float* to) {
  const int64_t pad = padded(channels);
  with_element(element, [&](auto example) {
    const auto* from = (const decltype(example)*)pair;
    load_row(from, channels, to, pad);
    load_row(from + channels, channels, to + pad, pad);
  });
}

void store_gradients(ElementType element, int64_t channels, int64_t parts, float* sums,
                     void* weight, void* pair) {
  const int64_t pad = padded(channels), floats = 11 * pad;
  for (int64_t p = 1; p < parts; ++p) {
    for (int64_t i = 0; i < floats; i += kLanes) {
      store(sums + i, load(sums + i) + load(sums + p * floats + i));
    }
  }
  with_element(element, [&](auto example) {
    using Element = decltype(example);
    for (int64_t c = 0; weight != nullptr && c < channels; c += kLanes) {
      float some[9 * kLanes];
      for (int tap = 0; tap < 9; ++tap) {
        for (int i = 0; i < kLanes; ++i) some[9 * i + tap] = sums[tap * pad + c + i];
      }
      const int64_t count = channels - c < kLanes ? channels - c : kLanes;
      store_row((Element*)weight + 9 * c, 9 * count, some);
    }
    for (int64_t p = 0; pair != nullptr && p < 2; ++p) {
      store_row((Element*)pair + p * channels, channels, sums + (9 + p) * pad);
    }
  });
}

}  // namespace

#if defined(LINEAR_VIT_AVX512)
extern const RippleKernels ripple_avx512 = {
    "AVX-512",
#elif defined(LINEAR_VIT_AVX2)
extern const RippleKernels ripple_avx2 = {
    "AVX2",
#else
extern const RippleKernels ripple_portable = {
    "portable code",
#endif
    load_weight, load_pair,       store_gradients, same,            halve,
    twice,       weight_gradient, spread_gradient, coarse_gradient,
};
