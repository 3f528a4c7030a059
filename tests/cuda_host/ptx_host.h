// What kernels/cuda/ptx.cuh has in PTX, on the host: the same names, the same register layouts.
//
// A product or a matrix load is collective: every lane of the warp puts down what it holds, waits
// for the others, and takes what the PTX manual says is its share. The sum of a product is formed
// in float64 and then rounded toward zero to float32: no tensor core is documented to do better. A
// copy poisons its target with NaN when it is issued and is made when the thread waits for it, so
// that a missing wait, or a tile refilled while others still read it, shows in the numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace ptx {

namespace host {

template <typename T>
float element(unsigned packed, int index) {
  const auto bits = static_cast<uint16_t>(packed >> (16 * index));
  T value;
  std::memcpy(&value, &bits, sizeof(value));
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else {
    return __bfloat162float(value);
  }
}

template <typename T>
uint16_t rounded(float x) {
  T value;
  if constexpr (std::is_same_v<T, __half>) {
    value = __float2half_rn(x);
  } else {
    value = __float2bfloat16_rn(x);
  }
  uint16_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float toward_zero(double x) {
  const auto nearest = static_cast<float>(x);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(x) ? std::nextafterf(nearest, 0.0f)
                                                                : nearest;
}

template <int kMatrices, bool kTransposed>
void ldmatrix(unsigned (&d)[kMatrices], const void* row) {
  const unsigned lane = cuda_host::scheduler.current % cuda_host::kWarpSize;
  if (static_cast<int>(lane) < 8 * kMatrices) cuda_host::check_shared(row, 16);
  const cuda_host::Deposit* const lanes = cuda_host::exchange(&row, sizeof(row));
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    uint16_t pair[2];
    for (unsigned e = 0; e < 2; ++e) {
      const unsigned along = 2 * (lane % 4) + e, across = lane / 4;
      const void* address;
      std::memcpy(&address, lanes[8 * matrix + (kTransposed ? along : across)].bytes,
                  sizeof(address));
      const races::MatrixLoad reading;
      std::memcpy(&pair[e], static_cast<const char*>(address) + 2 * (kTransposed ? across : along),
                  sizeof(pair[e]));
    }
    d[matrix] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
  }
  // The values are taken now, and nobody goes on to overwrite them before all have.
  cuda_host::wait_for(cuda_host::Wait::warp);
}

}  // namespace host

inline void stmatrix_x4(void* row, const unsigned (&d)[4]) {
  struct Stored {
    void* row;
    unsigned d[4];
  } mine{row, {d[0], d[1], d[2], d[3]}};
  cuda_host::check_shared(row, 16);
  const unsigned lane = cuda_host::scheduler.current % cuda_host::kWarpSize;
  const cuda_host::Deposit* const lanes = cuda_host::exchange(&mine, sizeof(mine));
  // Its own row, of matrix lane / 8, whose pairs four lanes hold.
  for (unsigned pair = 0; pair < 4; ++pair) {
    Stored other;
    std::memcpy(&other, lanes[lane % 8 * 4 + pair].bytes, sizeof(other));
    std::memcpy(static_cast<char*>(row) + 4 * pair, &other.d[lane / 8], 4);
  }
  cuda_host::wait_for(cuda_host::Wait::warp);
}

inline void ldmatrix_x4(unsigned (&d)[4], const void* row) { host::ldmatrix<4, false>(d, row); }
inline void ldmatrix_x4_trans(unsigned (&d)[4], const void* row) { host::ldmatrix<4, true>(d, row); }
inline void ldmatrix_x2(unsigned (&d)[2], const void* row) { host::ldmatrix<2, false>(d, row); }
inline void ldmatrix_x2_trans(unsigned (&d)[2], const void* row) { host::ldmatrix<2, true>(d, row); }

template <typename T>
void mma_16816(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  struct Operands {
    float a[4][2], b[2][2];
  } mine;
  for (int e = 0; e < 2; ++e) {
    for (int i = 0; i < 4; ++i) mine.a[i][e] = host::element<T>(a[i], e);
    for (int i = 0; i < 2; ++i) mine.b[i][e] = host::element<T>(b[i], e);
  }
  const unsigned lane = cuda_host::scheduler.current % cuda_host::kWarpSize;
  const cuda_host::Deposit* const lanes = cuda_host::exchange(&mine, sizeof(mine));
  auto of = [&](unsigned which) { return reinterpret_cast<const Operands*>(lanes[which].bytes); };
  for (unsigned i = 0; i < 4; ++i) {  // d[i]: row lane / 4 (+ 8), column 2 (lane % 4) (+ 1)
    const unsigned group = lane / 4, column = 2 * (lane % 4) + i % 2;
    double sum = d[i];
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned pair = k % 8 / 2, upper = k / 8;
      sum += static_cast<double>(of(4 * group + pair)->a[2 * upper + i / 2][k % 2]) *
             of(4 * column + pair)->b[upper][k % 2];
    }
    d[i] = host::toward_zero(sum);
  }
}

CUDA_HOST_UNSEEN inline void cp_async_16(void* shared, const void* global, int bytes) {
  cuda_host::check_shared(shared, 16);
  if (bytes > 0 && reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    cuda_host::fail("an asynchronous copy from an address that is not 16-byte aligned");
  }
  cuda_host::PendingCopy copy{shared, {}};
  std::memcpy(copy.bytes, global, static_cast<size_t>(bytes));
  if (bytes > 0) cuda_host::count_load(global, static_cast<size_t>(bytes));
  std::memset(shared, 0xFF, 16);
  races::copy_begins(shared, __builtin_return_address(0));
  cuda_host::copies().open.push_back(copy);
}

inline void cp_async_commit() { cuda_host::copies().commit(); }

template <int kPending>
void cp_async_wait() {
  cuda_host::copies().finish_all_but(kPending);
}

inline void store_16(void* global, const unsigned (&words)[4]) {
  cuda_host::check_global(global, 16);
  std::memcpy(global, words, 16);
}

inline void store_8(void* global, const unsigned (&words)[2]) {
  cuda_host::check_global(global, 8);
  std::memcpy(global, words, 8);
}

template <typename T>
unsigned relu2(unsigned x) {
  unsigned result = 0;
  for (int e = 0; e < 2; ++e) {
    const float value = host::element<T>(x, e);
    const unsigned bits = value <= 0.0f ? 0 : x >> (16 * e) & 0xffff;  // a NaN compares false
    result |= bits << (16 * e);
  }
  return result;
}

template <typename T>
unsigned least2(unsigned x) {
  unsigned result = 0;
  for (int e = 0; e < 2; ++e) {
    const float value = host::element<T>(x, e);
    const unsigned bits = value >= 0.0f ? 0 : x >> (16 * e) & 0xffff;  // a NaN compares false
    result |= bits << (16 * e);
  }
  return result;
}

inline unsigned nonzero2(unsigned x) {
  return (x & 0x7fffu ? 0xffffu : 0u) | (x & 0x7fff0000u ? 0xffff0000u : 0u);
}

inline unsigned limit_half2(unsigned x, unsigned limit) {
  for (int e = 0; e < 2; ++e) {
    const unsigned most = limit >> (16 * e) & 0xffff, own = x >> (16 * e) & 0x7fff;
    if (own > most && own <= 0x7c00) x = (x & ~(0x7fffu << (16 * e))) | most << (16 * e);
  }
  return x;
}

template <typename T>
unsigned negate2(unsigned x) {
  return x ^ 0x80008000u;
}

template <typename T>
unsigned pack2(float low, float high) {
  return host::rounded<T>(low) | static_cast<unsigned>(host::rounded<T>(high)) << 16;
}

template <typename T>
unsigned fma2(unsigned a, unsigned b, unsigned c) {
  auto one = [&](int e) {
    // Exact in float64, but for a rounding to it that half precision's hides.
    return static_cast<float>(static_cast<double>(host::element<T>(a, e)) * host::element<T>(b, e) +
                              host::element<T>(c, e));
  };
  return pack2<T>(one(0), one(1));
}

inline float flushed(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

inline float reciprocal(float x) { return flushed(1.0f / flushed(x)); }

inline float exp2(float x) {
  const float result = std::exp2(x);
  return result < std::numeric_limits<float>::min() ? 0.0f : result;  // a NaN compares false
}

inline unsigned multiply_relu_half2(unsigned a, unsigned b) {
  return relu2<__half>(fma2<__half>(a, b, 0));
}

inline float min_nan(float x, float y) { return x != x || x < y ? x : y; }
inline float max_nan(float x, float y) { return x != x || x > y ? x : y; }

}  // namespace ptx
