// Vectors of 64 bytes, a row of a tile, whatever the instruction set: 32 bfloat16 or 16 floats.
//
// Arithmetic and shuffles are GCC's and clang's vector extension, which any processor runs. Intrinsics
// only where compilers make poor code of that: rounding to bfloat16, rows gathered from four places.
#pragma once

#include <cstdint>
#include <utility>

#include "simd.h"

namespace {

typedef uint16_t Halves __attribute__((vector_size(64)));
typedef int16_t SignedHalves __attribute__((vector_size(64)));
typedef uint32_t Quads __attribute__((vector_size(64)));
typedef int32_t SignedQuads __attribute__((vector_size(64)));
typedef uint64_t Octs __attribute__((vector_size(64)));
typedef float Wide __attribute__((vector_size(64)));
typedef uint16_t Narrow __attribute__((vector_size(32)));
typedef Halves UnalignedHalves __attribute__((aligned(2), may_alias));
typedef Narrow UnalignedNarrow __attribute__((aligned(2), may_alias));
typedef Wide UnalignedWide __attribute__((aligned(4), may_alias));
typedef Halves AlignedHalves __attribute__((may_alias));

INLINE Halves load_halves(const void* p) { return *(const UnalignedHalves*)p; }
INLINE void store_halves(void* p, Halves x) { *(UnalignedHalves*)p = x; }
INLINE Wide load_wide(const float* p) { return *(const UnalignedWide*)p; }
INLINE void store_wide(float* p, Wide x) { *(UnalignedWide*)p = x; }
INLINE Wide wide(float x) { return x - Wide{}; }

// Past the caches, to where a row of a tile is aligned.
INLINE void stream_halves(void* p, Halves x) {
#if defined(LINEAR_VIT_AVX512)
  _mm512_stream_si512((__m512i*)p, (__m512i)x);
#else
  store_halves(p, x);
#endif
}
// Before the same is stored again.
INLINE void end_streams() {
#if defined(LINEAR_VIT_AVX512)
  _mm_sfence();
#endif
}

template <typename Vector, int... kLane>
INLINE Vector lanes(Vector a, Vector b, std::integer_sequence<int, kLane...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, kLane...);
#else
  typedef decltype(a < b) Mask;
  return __builtin_shuffle(a, b, Mask{kLane...});
#endif
}

// In each 16 bytes: the low (or high) half of a's and of b's, one element of each by turns.
constexpr int unpacked_lane(int count, bool high, int i) {
  const int n = count / 4, from = i / n * n + (high ? n / 2 : 0) + i % n / 2;
  return from + (i % 2 ? count : 0);
}
template <bool kHigh, typename Vector, int... kLane>
INLINE Vector unpack(Vector a, Vector b, std::integer_sequence<int, kLane...>) {
  return lanes(a, b, std::integer_sequence<int, unpacked_lane(sizeof...(kLane), kHigh, kLane)...>());
}
template <bool kHigh, typename Vector>
INLINE Halves unpack(Halves a, Halves b) {
  constexpr int kCount = sizeof(Vector) / sizeof(Vector{}[0]);
  return (Halves)unpack<kHigh>((Vector)a, (Vector)b, std::make_integer_sequence<int, kCount>());
}

// Eight elements each of four rows, `step` elements apart.
INLINE Halves four_rows(const uint16_t* p, int64_t step) {
#if defined(LINEAR_VIT_AVX512)
  const auto row = [&](int i) INLINE_LAMBDA { return _mm_loadu_si128((const __m128i*)(p + i * step)); };
  const __m256i a = _mm256_inserti128_si256(_mm256_castsi128_si256(row(0)), row(1), 1);
  const __m256i b = _mm256_inserti128_si256(_mm256_castsi128_si256(row(2)), row(3), 1);
  return (Halves)_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
#else
  Halves x;
  for (int i = 0; i < 4; ++i) __builtin_memcpy((char*)&x + 16 * i, p + i * step, 16);
  return x;
#endif
}

// The first 16 bytes of x, and the second ones `step` bytes on.
INLINE void store_first_fours(char* p, int64_t step, Halves x) {
#if defined(LINEAR_VIT_AVX512)
  _mm_storeu_si128((__m128i*)p, _mm512_castsi512_si128((__m512i)x));
  _mm_storeu_si128((__m128i*)(p + step), _mm512_extracti32x4_epi32((__m512i)x, 1));
#else
  for (int i = 0; i < 2; ++i) __builtin_memcpy(p + i * step, (const char*)&x + 16 * i, 16);
#endif
}

// x then y, to bfloat16, as AVX-512's instruction does it: subnormals become zeros.
INLINE Halves round_two(Wide x, Wide y) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
#else
  union {
    Narrow half[2];
    Halves all;
  } result;
  const Wide in[2] = {x, y};
  for (int i = 0; i < 2; ++i) {
    const Quads bits = (Quads)in[i], size = bits & 0x7fffffff;
    Quads rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
    rounded = size < 0x00800000 ? bits & 0x80000000 : rounded;
    rounded = size > 0x7f800000 ? bits | 0x400000 : rounded;  // a NaN stays one
    result.half[i] = __builtin_convertvector(rounded >> 16, Narrow);
  }
  return result.all;
#endif
}
INLINE Wide float_of(Narrow x) {
#if defined(LINEAR_VIT_AVX512)
  return (Wide)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);
#else
  return (Wide)(__builtin_convertvector(x, Quads) << 16);
#endif
}
INLINE Wide load_bfloat16(const uint16_t* p) { return float_of(*(const UnalignedNarrow*)p); }
INLINE Narrow half_of(Halves x, int which) {
  union {
    Halves all;
    Narrow half[2];
  } parts = {x};
  return parts.half[which];
}

INLINE float sum_of(Wide x) {
#if defined(LINEAR_VIT_AVX512)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float part[16];
  store_wide(part, x);
  for (int n = 8; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) part[i] += part[i + n];
  }
  return part[0];
#endif
}

// φ of bfloat16: relu(x), and relu(-x) given that. A NaN is in one of them, by its sign.
INLINE Halves relu(Halves x) {
  return (Halves)((SignedHalves)x > 0 ? (SignedHalves)x : SignedHalves{});
}
INLINE Halves relu_minus(Halves x, Halves plus) { return (x ^ plus) & 0x7fff; }

}  // namespace
