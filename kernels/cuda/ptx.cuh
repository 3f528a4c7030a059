// The PTX of this project, and all of it: tensor-core products, matrix loads, asynchronous copies,
// vector stores, packed half-precision arithmetic, exponentials. Compute capability 8.0 and up.
//
// Registers hold two half-precision elements, the lower one first. Fragments are as in the PTX
// manual, with group = lane / 4 and pair = 2 (lane % 4):
//   a, 16 x 16   a[0] row group,     columns pair, pair + 1     a[2] columns + 8
//                a[1] row group + 8, the same columns           a[3] likewise
//   b, 16 x 8    b[0] rows pair, pair + 1 of column group       b[1] rows + 8
//   d, 16 x 8    d[0], d[1] row group, columns pair, pair + 1   d[2], d[3] row group + 8
// so a 16 x 8 product, rounded and packed, is half of an a operand.
//
// Where the sources are compiled for the host (tests/cuda_host), its ptx_host.h has the same names.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

// Matrices are stored to shared memory as they are loaded from compute capability 9.0 on; before, word
// by word. On the host LINEAR_VIT_NO_STMATRIX chooses that.
#if !defined(LINEAR_VIT_NO_STMATRIX) && (defined(LINEAR_VIT_CUDA_HOST) || __CUDA_ARCH__ >= 900)
#define LINEAR_VIT_STMATRIX
#endif

#ifdef LINEAR_VIT_CUDA_HOST
#include <ptx_host.h>
#else

namespace ptx {

__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// ---- 8 x 8 matrices of half-precision elements from shared memory ----------------------------------
// Lane i gives the address of a row, 16-byte aligned: row i % 8 of matrix i / 8. Lane i gets elements
// 2 (i % 4) and + 1 of row i / 4 of each matrix; transposed, of column i / 4.

__device__ inline void ldmatrix_x4(unsigned (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void ldmatrix_x4_trans(unsigned (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}

// Only the addresses of lanes 0 to 15 count.
__device__ inline void ldmatrix_x2(unsigned (&d)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void ldmatrix_x2_trans(unsigned (&d)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(shared_address(row))
               : "memory");
}

#ifdef LINEAR_VIT_STMATRIX
// The inverse of ldmatrix_x4.
__device__ inline void stmatrix_x4(void* row, const unsigned (&d)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               :
               : "r"(shared_address(row)), "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3])
               : "memory");
}
#endif

// ---- tensor cores ----------------------------------------------------------------------------------

// d += a b, accumulated in float32.
template <typename T>
__device__ inline void mma_16816(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// ---- asynchronous copies from global to shared memory ----------------------------------------------

// 16 bytes, both addresses 16-byte aligned: the first `bytes` of them from `global`, the rest 0. With
// bytes == 0 nothing is read, and `global` may be anywhere.
__device__ inline void cp_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}

// Closes this thread's group of copies.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but this thread's latest kPending groups have arrived. Other threads see them after a
// barrier.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

// ---- stores to global memory of 16 and of 8 bytes, to addresses that are multiples of that ----------
// Left to itself the compiler takes a vector whose elements come from a product or a shuffle apart,
// and stores them one by one, in some kernels and not in others.

__device__ inline void store_16(void* global, const unsigned (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(global)), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
               : "memory");
}

__device__ inline void store_8(void* global, const unsigned (&words)[2]) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};"
               :
               : "l"(__cvta_generic_to_global(global)), "r"(words[0]), "r"(words[1])
               : "memory");
}

// ---- pairs of half-precision elements --------------------------------------------------------------

// The greater of each pair and 0; a NaN stays one, which fmaxf would drop.
template <typename T>
__device__ inline unsigned relu2(unsigned x) {
  unsigned result;
  if constexpr (std::is_same_v<T, __half>) {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(x), "r"(0u));
  } else {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(x), "r"(0u));
  }
  return result;
}

// The lesser of each pair and 0; a NaN stays one.
template <typename T>
__device__ inline unsigned least2(unsigned x) {
  unsigned result;
  if constexpr (std::is_same_v<T, __half>) {
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(x), "r"(0u));
  } else {
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(x), "r"(0u));
  }
  return result;
}

// Ones in the place of each element that is not zero, a NaN among them; whichever type they are of.
__device__ inline unsigned nonzero2(unsigned x) {
  unsigned result;
  asm("set.neu.u32.f16x2 %0, %1, %2;" : "=r"(result) : "r"(x), "r"(0u));
  return result;
}

// The greater of the products of float16 pairs and 0; a NaN stays one.
__device__ inline unsigned multiply_relu_half2(unsigned a, unsigned b) {
  unsigned result;
  asm("fma.rn.relu.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(0u));
  return result;
}

// The sign turned; of float16 it is part of the instruction that takes it.
template <typename T>
__device__ inline unsigned negate2(unsigned x) {
  if constexpr (std::is_same_v<T, __half>) {
    unsigned result;
    asm("neg.f16x2 %0, %1;" : "=r"(result) : "r"(x));
    return result;
  } else {
    return x ^ 0x80008000u;
  }
}

// a b + c of pairs, rounded once.
template <typename T>
__device__ inline unsigned fma2(unsigned a, unsigned b, unsigned c) {
  unsigned result;
  if constexpr (std::is_same_v<T, __half>) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  }
  return result;
}

// Pairs of float16, of which none is beyond its positive limit; a NaN stays one.
__device__ inline unsigned limit_half2(unsigned x, unsigned limit) {
  asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(x) : "r"(limit));
  asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(x) : "r"(limit ^ 0x80008000u));
  return x;
}

// Two float32, rounded to nearest even.
template <typename T>
__device__ inline unsigned pack2(float low, float high) {
  unsigned result;
  if constexpr (std::is_same_v<T, __half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  }
  return result;
}

// The lesser and the greater of two, or NaN if one of them is.
__device__ inline float min_nan(float x, float y) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
}
__device__ inline float max_nan(float x, float y) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
}

// ---- special functions -----------------------------------------------------------------------------

// 1 / x within 1 ulp; what is below the smallest normal number, x or the result, is 0.
__device__ inline float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 2^x within 2 ulp; results below the smallest normal number are 0.
__device__ inline float exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace ptx

#endif

namespace ptx {

// A float16 beyond the largest is the largest, and not infinity; a NaN stays one.
template <typename T>
__device__ inline unsigned finite2(unsigned x) {
  return std::is_same_v<T, __half> ? limit_half2(x, 0x7bff7bffu) : x;
}

// Each element that is a NaN, and 0 for the others.
template <typename T>
__device__ inline unsigned nan2(unsigned x) {
  return least2<T>(relu2<T>(x));
}

template <typename T>
__device__ inline float2 unpack2(unsigned x) {
  if constexpr (std::is_same_v<T, __half>) {
    return make_float2(__half2float(__ushort_as_half(static_cast<unsigned short>(x))),
                       __half2float(__ushort_as_half(static_cast<unsigned short>(x >> 16))));
  } else {
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
  }
}

// Which elements of a pair are greater than 0: both by one comparison, where there is one.
template <typename T>
struct Signs {
  bool low, high;

  __device__ explicit Signs(unsigned x) {
#if defined(__CUDA_ARCH__)
    constexpr bool kHalf = std::is_same_v<T, __half>;
    if constexpr (kHalf || __CUDA_ARCH__ >= 900) {
      unsigned first, second;
      if constexpr (kHalf) {
        asm("{.reg .pred p, q; setp.gt.f16x2 p|q, %2, %3; selp.u32 %0, 1, 0, p; selp.u32 %1, 1, 0, q;}"
            : "=r"(first), "=r"(second)
            : "r"(x), "r"(0u));
      } else {
        asm("{.reg .pred p, q; setp.gt.bf16x2 p|q, %2, %3; selp.u32 %0, 1, 0, p; selp.u32 %1, 1, 0, q;}"
            : "=r"(first), "=r"(second)
            : "r"(x), "r"(0u));
      }
      low = first != 0, high = second != 0;
      return;
    }
#endif
    const float2 pair = unpack2<T>(x);
    low = pair.x > 0.0f, high = pair.y > 0.0f;
  }
};

}  // namespace ptx
