// What kernels/cpu/tiles.h has, in plain C++: AMX tiles for machines without any.
//
// The product as processors do it: for each sum two chains of fused multiply-adds from zero, of the
// even and of the odd numbers, added to each other and then to the sum. Subnormals are zeros, going in
// and coming out, after every step. (Rounding to nearest, whatever the thread's mode.)
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

struct Tile {
  char rows[16][64];
};
// What was never loaded is NaN, or a shape never configured.
struct State {
  Tile tiles[8];
  bool configured = false;
};
inline thread_local State state;

inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline float bfloat16(const char* from) {
  uint16_t half;
  std::memcpy(&half, from, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return flush(x);
}

[[noreturn]] inline void fail() { __builtin_trap(); }

inline Tile& tile(int i) {
  if (!state.configured) fail();  // as the processor: an invalid instruction
  return state.tiles[i];
}

__attribute__((noinline)) inline void dot(Tile& sums, const Tile& a, const Tile& b) {
  float x[2][16], y[2][16][16];
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < 16; ++n) {
      for (int odd = 0; odd < 2; ++odd) y[odd][k][n] = bfloat16(b.rows[k] + 4 * n + 2 * odd);
    }
  }
  for (int m = 0; m < 16; ++m) {
    float sum[16], chain[2][16] = {};
    std::memcpy(sum, sums.rows[m], 64);
    for (int k = 0; k < 16; ++k) {
      for (int odd = 0; odd < 2; ++odd) x[odd][k] = bfloat16(a.rows[m] + 4 * k + 2 * odd);
    }
    for (int odd = 0; odd < 2; ++odd) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 16; ++n) {
          chain[odd][n] = flush(std::fma(x[odd][k], y[odd][k][n], chain[odd][n]));
        }
      }
    }
    for (int n = 0; n < 16; ++n) sum[n] = flush(flush(sum[n]) + flush(chain[0][n] + chain[1][n]));
    std::memcpy(sums.rows[m], sum, 64);
  }
}

}  // namespace emulated

namespace {

inline bool tiles_allowed() { return true; }

struct Tiles {
  Tiles() {
    std::memset(emulated::state.tiles, 0xff, sizeof emulated::state.tiles);
    emulated::state.configured = true;
  }
  ~Tiles() { emulated::state.configured = false; }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <int kTile>
__attribute__((noinline)) void tile_zero() {
  std::memset(emulated::tile(kTile).rows, 0, 1024);
}
template <int kTile>
__attribute__((noinline)) void tile_load(const void* from, int64_t stride) {
  for (int r = 0; r < 16; ++r) {
    std::memcpy(emulated::tile(kTile).rows[r], static_cast<const char*>(from) + r * stride, 64);
  }
}
template <int kTile>
__attribute__((noinline)) void tile_store(void* to, int64_t stride) {
  for (int r = 0; r < 16; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, emulated::tile(kTile).rows[r], 64);
  }
}
template <int kSum, int kA, int kB>
__attribute__((noinline)) void tile_dot() {
  emulated::dot(emulated::tile(kSum), emulated::tile(kA), emulated::tile(kB));
}

}  // namespace
