// A CUDA that runs on the host, one thread at a time: enough of it for this project's kernels.
//
// Stands in for the toolkit's cuda_runtime.h when a .cu file is compiled by an ordinary C++
// compiler with this folder first on the include path. The kernels are the very same text.
//
// A block's threads are fibers. A thread runs until it reaches a barrier (of the block, of the warp),
// a shuffle or one of ptx_host.h's collective instructions, then the next one does, in the order
// cuda_host_configure chose. So a missing barrier is seen as what it is: a thread reading what
// another has not written yet. Shared memory is filled with NaN before each block and guarded by a
// pattern past its end; asynchronous copies arrive no sooner than they are waited for; threads that
// wait for different things forever, or leave while others wait, end the launch with an error.
//
// It counts global traffic: kernels/cuda/common.cuh and ptx.cuh call count_load and count_store for
// every access to global memory, and cuda_host_traffic says, for each range of memory that was named
// with cuda_host_watch and for all else, how many bytes were loaded and stored, by 16-byte accesses
// and by narrower ones.
//
// Not modelled: registers, caches, time, and races that only some interleaving of instructions
// between two barriers would show (the three thread orders show most; races.h, compiled in, finds all
// that the accesses made can have).
#pragma once

#define LINEAR_VIT_CUDA_HOST

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __launch_bounds__(...)
#define __forceinline__ inline

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
using std::max;
using std::min;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

constexpr size_t kMostSharedBytes = 99 * 1024;  // of a block, on compute capability 8.6
constexpr size_t kGuardBytes = 1024;
inline float4 linear_vit_shared[(kMostSharedBytes + kGuardBytes) / sizeof(float4)];

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace cuda_host {

constexpr unsigned kWarpSize = 32;
inline const char* failure = nullptr;

inline void fail(const char* what) {
  if (!failure) failure = what;
}

}  // namespace cuda_host

#include "races.h"

namespace cuda_host {

constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned char kGuard = 0xA5;

enum class Wait { nothing, block, warp, done };

// An asynchronous copy of 16 bytes on its way.
struct PendingCopy {
  void* target;
  unsigned char bytes[16];
};

// A thread's asynchronous copies: the group still open, and the committed ones, oldest first.
struct Copies {
  std::vector<PendingCopy> open;
  std::vector<std::vector<PendingCopy>> committed;

  void commit() {
    committed.push_back(std::move(open));
    open.clear();
  }
  CUDA_HOST_UNSEEN void finish_all_but(size_t latest) {
    while (committed.size() > latest) {
      for (const PendingCopy& copy : committed.front()) {
        races::copy_arrives(copy.target);
        std::memcpy(copy.target, copy.bytes, 16);
      }
      committed.erase(committed.begin());
    }
  }
  bool none() const {
    bool none = open.empty();
    for (const auto& group : committed) none = none && group.empty();
    return none;
  }
};

// What a lane puts down for the others of its warp.
struct alignas(16) Deposit {
  unsigned char bytes[64];
};

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool started;
  Wait wait;
  int line;            // of the __syncthreads() it waits at
  bool vote;           // which it brings to it
  unsigned exchanges;  // so far: their parity chooses the buffer
  Copies copies;
};

struct Scheduler {
  std::vector<Fiber> fibers;
  std::vector<char> stacks;
  std::vector<Deposit> exchange[2];
  size_t shared_bytes;
  ucontext_t context;
  jmp_buf resume;
  unsigned current;
  bool any_vote;  // of those at the latest __syncthreads()
  void (*body)(void*);
  void* argument;
};

inline Scheduler scheduler;
// 0 forward, 1 reverse, each warp as far ahead of the others as it gets, 2 a stride through the block
inline int thread_order = 0;
inline int device = 0;  // the current one
inline int most_shared = kMostSharedBytes;  // what it says; more than that it does not grant
// Shared memory that cudaFuncSetAttribute granted, by kernel and device.
inline std::map<std::pair<const void*, int>, size_t> granted;

// ---- global traffic, in bytes --------------------------------------------------------------------

struct Watched {
  uintptr_t begin, end;
  int64_t bytes[4];  // loaded 16 at a time, loaded otherwise, stored 16 at a time, stored otherwise
};

// The last one stands for everything that no other holds. Where ranges overlap, the first counts.
inline std::vector<Watched> watched = {{0, UINTPTR_MAX, {}}};

inline void count(const void* pointer, size_t bytes, int kind) {
  static size_t last = 0;  // most accesses are where the one before was
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  auto holds = [&](const Watched& range) { return address >= range.begin && address < range.end; };
  if (last >= watched.size() || !holds(watched[last]) || last + 1 == watched.size()) {
    last = 0;
    while (!holds(watched[last])) ++last;
  }
  watched[last].bytes[kind + (bytes == 16 ? 0 : 1)] += static_cast<int64_t>(bytes);
}

// A GPU takes no access whose address is not a multiple of its size.
inline void check_global(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    fail("an access to global memory whose address is not a multiple of its size");
  }
}

inline void count_load(const void* pointer, size_t bytes) {
  check_global(pointer, bytes);
  races::global_access(pointer, bytes, false);
  count(pointer, bytes, 0);
}
inline void count_store(const void* pointer, size_t bytes) {
  check_global(pointer, bytes);
  races::global_access(pointer, bytes, true);
  count(pointer, bytes, 2);
}

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
  Fiber& fiber = scheduler.fibers[scheduler.current];
  if (!fiber.copies.none()) fail("a thread left before its asynchronous copies arrived");
  fiber.wait = Wait::done;
  yield();
}

inline void start(Fiber& fiber, unsigned thread) {
  races::thread_begins(thread);
  fiber.started = true;
  fiber.exchanges = 0;
  fiber.copies = {};
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = scheduler.stacks.data() + thread * kStackBytes;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

CUDA_HOST_UNSEEN inline void run_until_it_waits(unsigned thread) {
  Fiber& fiber = scheduler.fibers[thread];
  scheduler.current = thread;
  races::thread_runs(thread);
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
  for (unsigned t = begin; t < end && what == Wait::block; ++t) {
    if (scheduler.fibers[t].line != scheduler.fibers[begin].line) {
      fail("threads meet at two different __syncthreads()");
    }
  }
  if (what == Wait::block) scheduler.any_vote = false;
  for (unsigned t = begin; t < end; ++t) {
    if (what == Wait::block) scheduler.any_vote |= scheduler.fibers[t].vote;
    scheduler.fibers[t].wait = Wait::nothing;
  }
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
      // In the reverse order a warp's first thread is its last to run: the warp goes on alone.
      if (thread_order == 1 && thread % kWarpSize == 0 &&
          release(thread, thread + kWarpSize, Wait::warp)) {
        i -= kWarpSize;
      }
    }
    bool progress = release(0, threads, Wait::block);
    for (unsigned warp = 0; warp < threads; warp += kWarpSize) {
      progress |= release(warp, warp + kWarpSize, Wait::warp);
    }
    if (progress) continue;
    for (const Fiber& fiber : scheduler.fibers) {
      if (fiber.wait != Wait::done) {
        fail("threads wait at different barriers, or some left before a barrier");
      }
    }
    return failure == nullptr;
  }
}

inline bool run_grid(size_t shared_bytes) {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  scheduler.fibers.resize(threads);
  scheduler.stacks.resize(threads * kStackBytes);
  for (auto& buffer : scheduler.exchange) buffer.resize(threads);
  scheduler.shared_bytes = shared_bytes;
  auto* const shared = reinterpret_cast<unsigned char*>(linear_vit_shared);
  races::launch_begins();
  for (unsigned i = 0; i < gridDim.x; ++i) {
    blockIdx = dim3(thread_order == 1 ? gridDim.x - 1 - i : i);
    races::block_begins(shared_bytes);
    std::memset(shared, 0xFF, shared_bytes);  // every float a NaN
    std::memset(shared + shared_bytes, kGuard, sizeof(linear_vit_shared) - shared_bytes);
    if (!run_block()) return false;
    for (size_t byte = shared_bytes; byte < sizeof(linear_vit_shared); ++byte) {
      if (shared[byte] != kGuard) {
        fail("a write past the end of shared memory");
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

// All threads of a block have to meet at the same one: the line is the caller's.
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  cuda_host::Fiber& fiber = cuda_host::scheduler.fibers[cuda_host::scheduler.current];
  fiber.line = line;
  fiber.vote = predicate != 0;
  races::passes_block_barrier();
  cuda_host::wait_for(cuda_host::Wait::block);
  return cuda_host::scheduler.any_vote;
}

inline void __syncthreads(int line = __builtin_LINE()) { __syncthreads_or(0, line); }

inline void __syncwarp() {
  races::passes_warp_barrier();
  cuda_host::wait_for(cuda_host::Wait::warp);
}

namespace cuda_host {

inline Copies& copies() { return scheduler.fibers[scheduler.current].copies; }

// Puts down `size` bytes and, when every lane of the warp has, returns what each put down, by lane.
// Good until the next exchange but one. Every thread of the warp takes part; threadIdx is
// one-dimensional.
inline const Deposit* exchange(const void* bytes, size_t size) {
  const unsigned thread = scheduler.current;
  std::vector<Deposit>& buffer = scheduler.exchange[scheduler.fibers[thread].exchanges++ % 2];
  std::memcpy(buffer[thread].bytes, bytes, size);
  wait_for(Wait::warp);
  return buffer.data() + thread / kWarpSize * kWarpSize;
}

template <typename Value>
Value value_of(const Value& value, unsigned lane) {
  static_assert(sizeof(Value) == 4 || sizeof(Value) == 8);
  Value other;
  std::memcpy(&other, exchange(&value, sizeof(value))[lane].bytes, sizeof(other));
  return other;
}

inline unsigned lane() { return scheduler.current % kWarpSize; }

// Matrix loads and asynchronous copies want whole 16-byte rows of the block's shared memory.
inline void check_shared(const void* pointer, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(linear_vit_shared);
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address % 16 != 0) fail("an address in shared memory that is not 16-byte aligned");
  if (address < begin || address + bytes > begin + scheduler.shared_bytes) {
    fail("an address outside of the block's shared memory");
  }
}

}  // namespace cuda_host

template <typename Value>
Value __shfl_xor_sync(unsigned, Value value, int lane_mask) {
  return cuda_host::value_of(value, cuda_host::lane() ^ static_cast<unsigned>(lane_mask));
}

template <typename Value>
Value __shfl_sync(unsigned, Value value, int lane) {
  return cuda_host::value_of(value, static_cast<unsigned>(lane) % cuda_host::kWarpSize);
}

template <typename Value>
Value __shfl_down_sync(unsigned, Value value, unsigned delta) {
  const unsigned lane = cuda_host::lane() + delta;
  return cuda_host::value_of(value, lane < cuda_host::kWarpSize ? lane : cuda_host::lane());
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  const cuda_host::Deposit* const all = cuda_host::exchange(&predicate, sizeof(predicate));
  unsigned bits = 0;
  for (unsigned lane = 0; lane < cuda_host::kWarpSize; ++lane) {
    int of_lane;
    std::memcpy(&of_lane, all[lane].bytes, sizeof(of_lane));
    bits |= static_cast<unsigned>(of_lane != 0) << lane;
  }
  return bits;
}

inline int __any_sync(unsigned lanes, int predicate) {
  return __ballot_sync(lanes, predicate) != 0;
}

// Once a kernel and device: another host thread's launch may be between two of them.
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (static_cast<size_t>(value) > kMostSharedBytes) return cudaErrorInvalidValue;
  if (!cuda_host::granted.try_emplace({kernel, cuda_host::device}, value).second) {
    cuda_host::fail("a kernel's limit of shared memory is set again");
    return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

template <typename Argument>
cudaError_t cudaLaunchKernel(void (*kernel)(Argument), dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  const auto granted =
      cuda_host::granted.find({reinterpret_cast<const void*>(kernel), cuda_host::device});
  const size_t most = granted == cuda_host::granted.end() ? 48 * 1024 : granted->second;
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
inline __attribute__((used)) cudaError_t cudaGetDevice(int* device) {
  *device = cuda_host::device;
  return cudaSuccess;
}
inline __attribute__((used)) cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute,
                                                                int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 1 : cuda_host::most_shared;
  return cudaSuccess;
}
inline __attribute__((used)) const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : cuda_host::failure ? cuda_host::failure : "an error";
}
inline __attribute__((used)) void cuda_host_set_device(int device) { cuda_host::device = device; }
inline __attribute__((used)) void cuda_host_set_most_shared(int bytes) {
  cuda_host::most_shared = bytes;
}

inline __attribute__((used)) void cuda_host_configure(int thread_order) {
  cuda_host::thread_order = thread_order;
  cuda_host::failure = nullptr;
}
inline __attribute__((used)) const char* cuda_host_failure() { return cuda_host::failure; }

// Counts the traffic of [begin, end) apart from now on; returns its index for cuda_host_traffic.
inline __attribute__((used)) int cuda_host_watch(const void* begin, const void* end) {
  auto& watched = cuda_host::watched;
  watched.insert(watched.end() - 1, {reinterpret_cast<uintptr_t>(begin),
                                     reinterpret_cast<uintptr_t>(end), {}});
  return static_cast<int>(watched.size()) - 2;
}
// Forgets all ranges and counts.
inline __attribute__((used)) void cuda_host_watch_nothing() {
  cuda_host::watched = {{0, UINTPTR_MAX, {}}};
}
// Four counts of a range, in bytes (see Watched); an index past the last range: of everything else.
inline __attribute__((used)) void cuda_host_traffic(int index, int64_t* bytes) {
  const auto& watched = cuda_host::watched;
  const size_t which = std::min(static_cast<size_t>(index), watched.size() - 1);
  std::memcpy(bytes, watched[which].bytes, sizeof(watched[which].bytes));
}
}
