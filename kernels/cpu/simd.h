// One vector of floats, as wide as the instruction set this file is compiled for: 16 lanes of
// AVX-512, 8 of AVX2, 4 of anything else (SSE2, NEON), and the element types that go in and out.
//
// Arithmetic is GCC's and clang's vector extension (a * b + c contracts to an FMA), so that one
// source serves every width. Intrinsics only where that has no word for it: sign bits, float16.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define LINEAR_VIT_AVX512
constexpr int kLanes = 16;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LINEAR_VIT_AVX2
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

namespace {  // each instruction set's copy is its own: no symbol of one may be linked for another

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));
typedef Floats UnalignedFloats __attribute__((aligned(4), may_alias));
typedef Shorts UnalignedShorts __attribute__((aligned(2), may_alias));

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr int32_t kSign = INT32_MIN;

INLINE Floats splat(float x) { return x - Floats{}; }  // x - 0 is x for every x, -0 included
INLINE Floats splat(const float* x) {
#if defined(__AVX__)
  Floats lanes;  // one load: the compiler may add a copy from register to register
  asm("vbroadcastss %1, %0" : "=v"(lanes) : "m"(*x));
  return lanes;
#else
  return splat(*x);
#endif
}
INLINE Floats where_negative(Floats x, Floats negative, Floats otherwise) {
  return (Ints)x < 0 ? negative : otherwise;
}
INLINE Floats where_zero(Floats x, Floats zero, Floats otherwise) {
  return x == 0.0f ? zero : otherwise;
}

// Where the address sanitizer watches: of an array of `all` elements, in memory that it shares, only
// the first `there` may be touched.
#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_poison_memory_region(const volatile void*, size_t);
extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t);
template <typename T>
void hide(const T* array, int64_t there, int64_t all) {
  __asan_unpoison_memory_region(array, there * sizeof(T));
  __asan_poison_memory_region(array + there, (all - there) * sizeof(T));
}
#else
template <typename T>
INLINE void hide(const T*, int64_t, int64_t) {}
#endif

// Keeps x in a register: the compiler would rather load it again for each use, and loads are what
// the kernels run out of.
INLINE void keep(Floats& x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
}

// Keeps an address or offset as it is, in one register: the compiler would rather have several,
// each of which takes an instruction to make.
template <typename Scalar>
INLINE void opaque(Scalar& x) {
  asm("" : "+r"(x));
}

// The place of x's lowest set bit; x is not 0.
INLINE uint64_t lowest_bit(uint64_t x) {
#if defined(__BMI__)
  uint64_t place;  // as the compiler does it, but for clearing `place` first, for older processors
  asm("tzcnt %1, %0" : "=r"(place) : "r"(x) : "cc");
  return place;
#else
  return __builtin_ctzll(x);
#endif
}

// One lane in all lanes. AVX-512 has registers for the 16 shuffles, which spare as many loads.
struct OneLane {
#if defined(LINEAR_VIT_AVX512)
  static constexpr bool kLoadless = true;
  Ints lanes[kLanes];

  INLINE OneLane() {
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) {
      lanes[j] = Ints{} + j;
      asm("" : "+v"(lanes[j]));  // or the compiler loads it where it is used
    }
  }
  INLINE Floats operator()(Floats x, int j) const {
    return (Floats)_mm512_permutexvar_ps((__m512i)lanes[j], (__m512)x);
  }
#else
  static constexpr bool kLoadless = false;
  INLINE Floats operator()(Floats x, int j) const { return x[j] + Floats{}; }
#endif
};

// Bit i: whether lane i's sign bit is set.
INLINE uint32_t sign_bits(Floats x) {
#if defined(LINEAR_VIT_AVX512)
  return _mm512_movepi32_mask((__m512i)x);
#elif defined(LINEAR_VIT_AVX2)
  return _mm256_movemask_ps((__m256)x);
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)x);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= ((uint32_t)((Ints)x)[i] >> 31) << i;
  return bits;
#endif
}

// ---- elements in memory --------------------------------------------------------------------------

INLINE Floats load(const float* p) { return *(const UnalignedFloats*)p; }
INLINE void store(float* p, Floats x) { *(UnalignedFloats*)p = x; }

INLINE Floats load(const BFloat16* p) {
  return (Floats)(__builtin_convertvector(*(const UnalignedShorts*)p, Ints) << 16);
}

INLINE void store(BFloat16* p, Floats x) {
  const Words bits = (Words)x;
  Words rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  rounded = x == x ? rounded : (bits | 0x400000);      // a NaN stays one
  *(UnalignedShorts*)p = __builtin_convertvector(rounded >> 16, Shorts);
}

INLINE Floats load(const Float16* p) {
#if defined(LINEAR_VIT_AVX512)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(LINEAR_VIT_AVX2)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  const Ints half = __builtin_convertvector(*(const UnalignedShorts*)p, Ints);
  const Ints size = (half & 0x7fff) << 13;
  const Ints normal = size + (112 << 23);
  const Ints subnormal = (Ints)((Floats)(size + (113 << 23)) - 0x1p-14f);
  Ints bits = size < (1 << 23) ? subnormal : normal;
  bits = size >= (31 << 23) ? (size | 0x7f800000) : bits;  // infinity, NaN
  return (Floats)(bits | (half & 0x8000) << 16);
#endif
}

INLINE void store(Float16* p, Floats x) {
#if defined(LINEAR_VIT_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(LINEAR_VIT_AVX2)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  const Ints size = (Ints)x & ~kSign;
  const Ints normal = (size - (112 << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
  const Ints subnormal = (Ints)((Floats)size + 0.5f) - 0x3f000000;  // the addition rounds
  Ints half = size < (113 << 23) ? subnormal : normal;
  half = size >= 0x477ff000 ? Ints{} + 0x7c00 : half;  // 65,520 and more
  half = x == x ? half : Ints{} + 0x7e00;
  *(UnalignedShorts*)p = __builtin_convertvector(half | (((Ints)x >> 16) & 0x8000), Shorts);
#endif
}

// Past the caches, to a multiple of what a vector of elements takes.
template <typename Element>
INLINE void stream(Element* p, Floats x) {
  alignas(sizeof(Floats)) Element some[kLanes];
  store(some, x);
#if defined(LINEAR_VIT_AVX512)
  if constexpr (sizeof(some) == 64) {
    _mm512_stream_si512((__m512i*)p, *(const __m512i*)some);
  } else {
    _mm256_stream_si256((__m256i*)p, *(const __m256i*)some);
  }
#elif defined(LINEAR_VIT_AVX2)
  if constexpr (sizeof(some) == 32) {
    _mm256_stream_si256((__m256i*)p, *(const __m256i*)some);
  } else {
    _mm_stream_si128((__m128i*)p, *(const __m128i*)some);
  }
#else
  store(p, x);
#endif
}

// `count` elements from anywhere to `padded` floats (a multiple of kLanes); the rest are zeros.
template <typename Element>
INLINE void load_row(const Element* from, int64_t count, float* to, int64_t padded) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) {
    Element rest[kLanes] = {};
    for (int64_t j = i; j < count; ++j) rest[j - i] = from[j];
    store(to + i, load(rest));
    i += kLanes;
  }
  for (; i < padded; i += kLanes) store(to + i, Floats{});
}

// The first `count` lanes, or all.
template <typename Element>
INLINE void store_some(Element* to, int64_t count, Floats x) {
  if (count >= kLanes) return store(to, x);
  Element rest[kLanes];
  store(rest, x);
  for (int64_t j = 0; j < count; ++j) to[j] = rest[j];
}

// `count` elements; reads whole vectors of `from`.
template <typename Element>
INLINE void store_row(Element* to, int64_t count, const float* from) {
  for (int64_t i = 0; i < count; i += kLanes) store_some(to + i, count - i, load(from + i));
}

// ---- sums across lanes ---------------------------------------------------------------------------

// Lane kLane... of a and b, one after the other.
template <int... kLane>
INLINE Floats select(Floats a, Floats b, std::integer_sequence<int, kLane...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, kLane...);
#else
  return __builtin_shuffle(a, b, Ints{kLane...});
#endif
}

// Half of the lanes of two vectors that each hold `count` sums, in parts, and the other half: added,
// they hold the sums of both. Lanes are taken in fours, as processors shuffle them fastest.
constexpr int half_lane(int count, bool other, int lane) {
  const int four = lane / 4, i = lane % 4;
  if (count == 1) return (i % 2) * kLanes + 4 * four + i / 2 + (other ? 2 : 0);
  if (count == 2) return (i / 2) * kLanes + 4 * four + i % 2 + (other ? 2 : 0);
  return 8 * four + i + (other ? 4 : 0);
}

template <int kCount, int... kLane>
INLINE Floats merge(Floats a, Floats b, std::integer_sequence<int, kLane...>) {
  return select(a, b, std::integer_sequence<int, half_lane(kCount, false, kLane)...>()) +
         select(a, b, std::integer_sequence<int, half_lane(kCount, true, kLane)...>());
}

// Lane i: the sum over the lanes of vector(i), for kLanes vectors. vector(i) is made when it is
// needed, so that few are alive at once.
template <int kCount = kLanes, int kFirst = 0, typename Vector>
INLINE Floats sums_across(const Vector& vector) {
  if constexpr (kCount == 1) {
    return vector(kFirst);
  } else {
    return merge<kCount / 2>(sums_across<kCount / 2, kFirst>(vector),
                             sums_across<kCount / 2, kFirst + kCount / 2>(vector),
                             std::make_integer_sequence<int, kLanes>());
  }
}

}  // namespace
