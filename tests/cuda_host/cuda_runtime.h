// A CUDA that runs on the host, one thread at a time: enough of it for this project's kernels.
//
// Stands in for the toolkit's cuda_runtime.h when a .cu file is compiled by an ordinary C++
// compiler with this folder first on the include path. The kernels are the very same text.
//
// A block's threads are fibers. A thread runs until it reaches a barrier (of the block, of the warp)
// or a shuffle, then the next one does, in the order cuda_host_configure chose. So a missing barrier is
// seen as what it is: a thread reading what another has not written yet. Shared memory is filled
// with NaN before each block and guarded by a pattern past its end; threads that wait for different
// things forever, or leave while others wait, end the launch with an error.
//
// Not modelled: registers, caches, time, and races that only some interleaving of instructions
// between two barriers would show (the three thread orders show most).
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

constexpr size_t kMostSharedBytes = 99 * 1024;  // of a block, on compute capability 8.6
constexpr size_t kGuardBytes = 1024;
inline float4 linear_vit_shared[(kMostSharedBytes + kGuardBytes) / sizeof(float4)];

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace cuda_host {

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned char kGuard = 0xA5;

enum class Wait { nothing, block, warp, done };

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool started;
  Wait wait;
  unsigned shuffles;  // so far: their parity chooses the exchange buffer
};

struct Scheduler {
  std::vector<Fiber> fibers;
  std::vector<char> stacks;
  std::vector<float> exchange[2];
  ucontext_t context;
  jmp_buf resume;
  unsigned current;
  void (*body)(void*);
  void* argument;
};

inline Scheduler scheduler;
inline int thread_order = 0;      // 0 forward, 1 reverse, 2 a stride through the block
inline size_t granted_bytes = 0;  // by cudaFuncSetAttribute, for the launch that follows
inline const char* failure = nullptr;

#ifdef CUDA_HOST_SANITIZE
// AddressSanitizer follows swapcontext; it does not follow longjmp between stacks.
inline void yield() {
  Fiber& fiber = scheduler.fibers[scheduler.current];
  swapcontext(&fiber.context, &scheduler.context);
}
#else
// swapcontext makes two system calls a switch. After a fiber's first entry, longjmp does without.
inline void yield() {
  Fiber& fiber = scheduler.fibers[scheduler.current];
  if (_setjmp(fiber.resume) == 0) _longjmp(scheduler.resume, 1);
}
#endif

inline void fiber_main() {
  scheduler.body(scheduler.argument);
  scheduler.fibers[scheduler.current].wait = Wait::done;
  yield();
}

inline void start(Fiber& fiber, unsigned thread) {
  fiber.started = true;
  fiber.shuffles = 0;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = scheduler.stacks.data() + thread * kStackBytes;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

inline void run_until_it_waits(unsigned thread) {
  Fiber& fiber = scheduler.fibers[thread];
  scheduler.current = thread;
  threadIdx = dim3(thread % blockDim.x, thread / blockDim.x % blockDim.y,
                   thread / blockDim.x / blockDim.y);
  fiber.wait = Wait::nothing;
#ifdef CUDA_HOST_SANITIZE
  if (!fiber.started) start(fiber, thread);
  swapcontext(&scheduler.context, &fiber.context);
#else
  if (_setjmp(scheduler.resume) != 0) return;  // it waits
  if (fiber.started) _longjmp(fiber.resume, 1);
  start(fiber, thread);
  setcontext(&fiber.context);
#endif
}

// Lets every thread of [begin, end) go on that waits for `what`, if all of them do.
inline bool release(unsigned begin, unsigned end, Wait what) {
  for (unsigned t = begin; t < end; ++t) {
    if (scheduler.fibers[t].wait != what) return false;
  }
  for (unsigned t = begin; t < end; ++t) scheduler.fibers[t].wait = Wait::nothing;
  return true;
}

inline unsigned in_order(unsigned i, unsigned count) {
  if (thread_order == 1) return count - 1 - i;
  if (thread_order == 2) return i * 97 % count;  // 97 is prime: a permutation of a power of two
  return i;
}

inline bool run_block() {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  for (Fiber& fiber : scheduler.fibers) fiber.started = false, fiber.wait = Wait::nothing;
  for (;;) {
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned thread = in_order(i, threads);
      if (scheduler.fibers[thread].wait == Wait::nothing) run_until_it_waits(thread);
    }
    bool progress = release(0, threads, Wait::block);
    for (unsigned warp = 0; warp < threads; warp += kWarpSize) {
      progress |= release(warp, warp + kWarpSize, Wait::warp);
    }
    if (progress) continue;
    for (const Fiber& fiber : scheduler.fibers) {
      if (fiber.wait != Wait::done) {
        failure = "threads wait at different barriers, or some left before a barrier";
        return false;
      }
    }
    return true;
  }
}

inline bool run_grid(size_t shared_bytes) {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  scheduler.fibers.resize(threads);
  scheduler.stacks.resize(threads * kStackBytes);
  for (auto& buffer : scheduler.exchange) buffer.resize(threads);
  auto* const shared = reinterpret_cast<unsigned char*>(linear_vit_shared);
  for (unsigned i = 0; i < gridDim.x; ++i) {
    blockIdx = dim3(thread_order == 1 ? gridDim.x - 1 - i : i);
    std::memset(shared, 0xFF, shared_bytes);  // every float a NaN
    std::memset(shared + shared_bytes, kGuard, sizeof(linear_vit_shared) - shared_bytes);
    if (!run_block()) return false;
    for (size_t byte = shared_bytes; byte < sizeof(linear_vit_shared); ++byte) {
      if (shared[byte] != kGuard) {
        failure = "a write past the end of shared memory";
        return false;
      }
    }
  }
  return true;
}

inline void wait_for(Wait what) {
  scheduler.fibers[scheduler.current].wait = what;
  yield();
}

}  // namespace cuda_host

inline void __syncthreads() { cuda_host::wait_for(cuda_host::Wait::block); }

inline void __syncwarp() { cuda_host::wait_for(cuda_host::Wait::warp); }

// Every thread of the warp takes part; threadIdx is one-dimensional.
inline float __shfl_xor_sync(unsigned, float value, int lane_mask) {
  auto& s = cuda_host::scheduler;
  const unsigned thread = s.current;
  std::vector<float>& buffer = s.exchange[s.fibers[thread].shuffles++ % 2];
  buffer[thread] = value;
  cuda_host::wait_for(cuda_host::Wait::warp);
  return buffer[thread ^ static_cast<unsigned>(lane_mask)];
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int value) {
  if (static_cast<size_t>(value) > kMostSharedBytes) return cudaErrorInvalidValue;
  cuda_host::granted_bytes = static_cast<size_t>(value);
  return cudaSuccess;
}

template <typename Argument>
cudaError_t cudaLaunchKernel(void (*kernel)(Argument), dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  const size_t most = cuda_host::granted_bytes > 48 * 1024 ? cuda_host::granted_bytes : 48 * 1024;
  cuda_host::granted_bytes = 0;
  if (grid.x == 0 || block.x * block.y * block.z % cuda_host::kWarpSize != 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes > most) return cudaErrorInvalidValue;
  struct Call {
    void (*kernel)(Argument);
    Argument argument;
  } call{kernel, *static_cast<Argument*>(arguments[0])};
  gridDim = grid;
  blockDim = block;
  cuda_host::scheduler.argument = &call;
  cuda_host::scheduler.body = [](void* pointer) {
    const Call& c = *static_cast<Call*>(pointer);
    c.kernel(c.argument);
  };
  return cuda_host::run_grid(shared_bytes) ? cudaSuccess : cudaErrorLaunchFailure;
}

extern "C" {
inline __attribute__((used)) void cuda_host_configure(int thread_order) {
  cuda_host::thread_order = thread_order;
  cuda_host::failure = nullptr;
}
inline __attribute__((used)) const char* cuda_host_failure() { return cuda_host::failure; }
}
