// AMX tiles: eight of 16 rows by 64 bytes, and the product of bfloat16 tiles summed in float32.
//
// A test defines LINEAR_VIT_TILES as the name of a header with the same functions in plain C++, so
// that what is built on them runs on any machine.
#pragma once

#include <cstdint>

#if defined(LINEAR_VIT_TILES)
#include LINEAR_VIT_TILES
#else
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <type_traits>

namespace {

inline bool processor_has_tiles() {
  uint32_t a = 0, b = 0, c = 0, d = 0, also = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if (__get_cpuid_count(7, 1, &also, &b, &c, &a) == 0) return false;
  const bool bfloat16_tiles = d >> 22 & 1, tiles = d >> 24 & 1, bfloat16_vectors = also >> 5 & 1;
  return bfloat16_tiles && tiles && bfloat16_vectors;
}

// Whether this process may use tiles: Linux wants to be asked. It refuses where it is too old, and
// where a thread has a signal stack too small for eight tiles.
inline bool tiles_allowed() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return processor_has_tiles() && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// A thread's tiles, for as long as it uses them: other libraries want theirs of other shapes.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const shape;
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// The compilers' intrinsics are macros that take no template parameter.
#define LINEAR_VIT_TILE template <int kTile> inline __attribute__((always_inline)) void
LINEAR_VIT_TILE tile_zero() { asm volatile("tilezero %%tmm%c0" : : "i"(kTile)); }
LINEAR_VIT_TILE tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}
LINEAR_VIT_TILE tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}
// sum += a b: a's rows are 32 numbers, b's are 16 pairs of them, one of each of two rows.
template <int kSum, int kA, int kB>
inline __attribute__((always_inline)) void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}

}  // namespace
#endif
