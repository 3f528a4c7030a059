// Races on shared memory, and on what a launch writes to global memory: which accesses are ordered by
// a barrier, whatever order the emulator ran them in. Compiled in by -DCUDA_HOST_RACES (races.py has
// all the flags), where the compiler's calls for ThreadSanitizer tell of every load and store.
//
// Two accesses of one byte, one of them a write, are ordered if
//   - they are of one thread,
//   - __syncthreads() is between them, or
//   - they are of one warp, and __syncwarp() is between them.
// A shuffle, a vote or a product orders nothing: CUDA promises no memory order by them. A matrix load
// waits until every lane of the warp has executed it, so what a lane does afterwards comes after what
// all of them have read. An asynchronous copy is a write that lasts from cp.async to the wait of the
// thread that asked for it: until then nobody may touch its target, and then it is that thread's write.
// Two blocks of a launch are not ordered at all.
//
// Every byte of shared memory remembers its last write, and each warp's last reads. Since all barriers
// are those of a block and of a warp, a count of both says what came before what.
#pragma once

#ifndef CUDA_HOST_RACES

#define CUDA_HOST_UNSEEN

namespace races {
inline void launch_begins() {}
inline void block_begins(size_t) {}
inline void thread_begins(unsigned) {}
inline void thread_runs(unsigned) {}
inline void passes_block_barrier() {}
inline void passes_warp_barrier() {}
inline void copy_begins(const void*, const void*) {}
inline void copy_arrives(const void*) {}
inline void global_access(const void*, size_t, bool) {}
struct MatrixLoad {
  MatrixLoad() {}
};
}  // namespace races

#else

#include <unordered_map>

// For functions whose own accesses and calls are not to be told of.
#define CUDA_HOST_UNSEEN __attribute__((no_sanitize("thread")))

extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start[];  // where the library begins

namespace races {

constexpr unsigned kMostThreads = 256, kMostWarps = kMostThreads / cuda_host::kWarpSize;
constexpr unsigned kMostCalls = 64;

struct Access {
  unsigned block_barriers, warp_barriers;  // that its thread had passed
  unsigned thread;
  unsigned code, caller;  // return addresses, counted from where the library begins
};

struct Byte {
  Access write;  // where its block_barriers are less than `first`: of another block, or none
  bool copying;
  struct {
    Access last;
    unsigned lanes;  // that have read since they passed warp_barriers; none of a matrix load
  } reads[kMostWarps];
};

struct Thread {
  unsigned block_barriers, warp_barriers, calls;
  unsigned callers[kMostCalls];  // return addresses, outermost first
};

inline Byte shared[kMostSharedBytes];
inline std::unordered_map<uintptr_t, Access> global;  // the last write in this launch, by address
inline Thread threads[kMostThreads];
inline unsigned current = 0;     // thread
inline size_t shared_bytes = 0;  // of the block
// Barriers are counted on from block to block: where this one began, and the most so far.
inline unsigned first = 1, most = 1;
inline bool matrix_load = false;
inline bool busy = false;  // what global_access() calls is not to be told of

CUDA_HOST_UNSEEN inline unsigned from_beginning(const void* code) {
  return static_cast<unsigned>(static_cast<const char*>(code) - __ehdr_start);
}

CUDA_HOST_UNSEEN inline Access access_now(const void* code) {
  const Thread& now = threads[current];
  const unsigned caller = now.calls > 0 && now.calls <= kMostCalls ? now.callers[now.calls - 1] : 0;
  return {now.block_barriers, now.warp_barriers, current, from_beginning(code), caller};
}

// Whether an access by this block is ordered before what the current thread does now.
CUDA_HOST_UNSEEN inline bool is_before(const Access& access) {
  const Thread& now = threads[current];
  if (access.thread == current || access.block_barriers < now.block_barriers) return true;
  return access.thread / cuda_host::kWarpSize == current / cuda_host::kWarpSize &&
         access.warp_barriers < now.warp_barriers;
}

// Ends the launch. races.py looks for the addresses as they are written here.
CUDA_HOST_UNSEEN inline void report(const char* memory, size_t byte, const char* fault,
                                    const void* code, const Access* other) {
  if (cuda_host::failure) return;  // the first is told of
  static char text[2048];
  const Thread& now = threads[current];
  int length = std::snprintf(text, sizeof(text), "race: %s memory, byte %zu, block %u: thread %u %s;",
                             memory, byte, blockIdx.x, current, fault);
  length += std::snprintf(text + length, sizeof(text) - length, " at +0x%x", from_beginning(code));
  for (unsigned i = now.calls < kMostCalls ? now.calls : kMostCalls; i > 0; --i) {
    length += std::snprintf(text + length, sizeof(text) - length, " +0x%x", now.callers[i - 1]);
  }
  if (other) {
    std::snprintf(text + length, sizeof(text) - length, "; thread %u at +0x%x +0x%x", other->thread,
                  other->code, other->caller);
  }
  cuda_host::fail(text);
}

constexpr const char* kReadsWritten = "reads what another wrote, with no barrier between";
constexpr const char* kWritesWritten = "writes what another wrote, with no barrier between";

CUDA_HOST_UNSEEN inline void read(Byte& byte, size_t index, const void* code) {
  if (byte.write.block_barriers < first) {
    report("shared", index, "reads what was never written", code, nullptr);
  } else if (!is_before(byte.write)) {
    report("shared", index, kReadsWritten, code, &byte.write);
  }
  const Access now = access_now(code);
  auto& reads = byte.reads[current / cuda_host::kWarpSize];
  if (reads.last.block_barriers != now.block_barriers ||
      reads.last.warp_barriers != now.warp_barriers) {
    reads.lanes = 0;
  }
  reads.last = now;
  if (!matrix_load) reads.lanes |= 1u << current % cuda_host::kWarpSize;
}

CUDA_HOST_UNSEEN inline void write(Byte& byte, size_t index, const void* code) {
  const Access now = access_now(code);
  if (byte.write.block_barriers >= first && !is_before(byte.write)) {
    report("shared", index, kWritesWritten, code, &byte.write);
  }
  for (unsigned warp = 0; warp < kMostWarps; ++warp) {
    const auto& reads = byte.reads[warp];
    if (reads.last.block_barriers < now.block_barriers) continue;
    if (warp == current / cuda_host::kWarpSize &&
        (reads.last.warp_barriers < now.warp_barriers ||
         (reads.lanes & ~(1u << current % cuda_host::kWarpSize)) == 0)) {
      continue;
    }
    report("shared", index, "writes what another read, with no barrier between", code, &reads.last);
  }
  byte.write = now;
}

// The first of `bytes` bytes of the block's shared memory, or null.
CUDA_HOST_UNSEEN inline Byte* bytes_at(const void* pointer) {
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  const auto begin = reinterpret_cast<uintptr_t>(linear_vit_shared);
  return begin <= at && at < begin + shared_bytes ? shared + (at - begin) : nullptr;
}

CUDA_HOST_UNSEEN inline void access(const void* pointer, size_t bytes, bool is_write,
                                    const void* code) {
  Byte* const begin = bytes_at(pointer);
  if (!begin || cuda_host::failure) return;
  for (Byte* byte = begin; byte < begin + bytes; ++byte) {
    const auto index = static_cast<size_t>(byte - shared);
    if (byte->copying && byte->write.block_barriers >= first) {
      report("shared", index, is_write ? "writes where a copy is on its way" :
             "reads where a copy is on its way", code, &byte->write);
    }
    if (is_write) {
      write(*byte, index, code);
    } else {
      read(*byte, index, code);
    }
  }
}

// Of load_global, store_global and cp_async_16. What one thread reads, and another writes later, is seen
// in that order of threads in which it is written first.
__attribute__((noinline)) CUDA_HOST_UNSEEN inline void global_access(const void* pointer, size_t bytes,
                                                                     bool is_write) {
  if (cuda_host::failure) return;
  busy = true;
  const void* const code = __builtin_return_address(0);
  for (size_t i = 0; i < bytes; ++i) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(pointer) + i;
    const auto found = global.find(at);
    if (found != global.end()) {
      const Access& other = found->second;
      if (other.block_barriers < first) {
        report("global", at, is_write ? "writes what another block wrote" :
               "reads what another block wrote", code, &other);
      } else if (!is_before(other)) {
        report("global", at, is_write ? kWritesWritten : kReadsWritten, code, &other);
      }
    }
    if (is_write) global.insert_or_assign(at, access_now(code));
  }
  busy = false;
}

// ---- what the emulator tells -----------------------------------------------------------------------

inline void launch_begins() { global.clear(); }

CUDA_HOST_UNSEEN inline void block_begins(size_t of_shared) {
  if (blockDim.x > kMostThreads) cuda_host::fail("a block has more threads than races.h allows for");
  first = ++most;
  shared_bytes = of_shared;
}

CUDA_HOST_UNSEEN inline void thread_begins(unsigned thread) {
  threads[thread].block_barriers = first;
  threads[thread].warp_barriers = threads[thread].calls = 0;
}

CUDA_HOST_UNSEEN inline void thread_runs(unsigned thread) { current = thread; }

CUDA_HOST_UNSEEN inline void passes_block_barrier() {
  if (++threads[current].block_barriers > most) most = threads[current].block_barriers;
}
CUDA_HOST_UNSEEN inline void passes_warp_barrier() { ++threads[current].warp_barriers; }

// Of 16 bytes: nobody may touch them in between. Arriving is a write by the thread that waits.
CUDA_HOST_UNSEEN inline void copy_begins(const void* pointer, const void* code) {
  access(pointer, 16, true, code);
  Byte* const begin = bytes_at(pointer);
  for (int i = 0; begin && i < 16; ++i) begin[i].copying = true;
}
CUDA_HOST_UNSEEN inline void copy_arrives(const void* pointer) {
  Byte* const begin = bytes_at(pointer);
  for (int i = 0; begin && i < 16; ++i) {
    begin[i].copying = false;
    begin[i].write.block_barriers = threads[current].block_barriers;
    begin[i].write.warp_barriers = threads[current].warp_barriers;
  }
}

// As long as it lives, reads are those of a matrix load.
struct MatrixLoad {
  CUDA_HOST_UNSEEN MatrixLoad() { matrix_load = true; }
  CUDA_HOST_UNSEEN ~MatrixLoad() { matrix_load = false; }
};

}  // namespace races

// ---- what the compiler tells -----------------------------------------------------------------------

#define RACES_HOOK(result) \
  extern "C" inline __attribute__((used)) CUDA_HOST_UNSEEN result

RACES_HOOK(void) __tsan_init() {}
RACES_HOOK(void) __tsan_func_entry(void* caller) {
  if (races::busy) return;
  races::Thread& now = races::threads[races::current];
  if (now.calls < races::kMostCalls) now.callers[now.calls] = races::from_beginning(caller);
  ++now.calls;
}
RACES_HOOK(void) __tsan_func_exit() {
  races::Thread& now = races::threads[races::current];
  if (!races::busy && now.calls > 0) --now.calls;
}
// Of a function's static variable, which a launcher has.
RACES_HOOK(unsigned char) __tsan_atomic8_load(const volatile unsigned char* pointer, int) {
  return *pointer;
}

#define RACES_ACCESS(name, bytes, is_write)                               \
  RACES_HOOK(void) __tsan_##name(void* pointer) {                         \
    races::access(pointer, bytes, is_write, __builtin_return_address(0)); \
  }
#define RACES_ACCESSES(bytes)                       \
  RACES_ACCESS(read##bytes, bytes, false)           \
  RACES_ACCESS(write##bytes, bytes, true)           \
  RACES_ACCESS(unaligned_read##bytes, bytes, false) \
  RACES_ACCESS(unaligned_write##bytes, bytes, true)

RACES_ACCESSES(1)
RACES_ACCESSES(2)
RACES_ACCESSES(4)
RACES_ACCESSES(8)
RACES_ACCESSES(16)
RACES_HOOK(void) __tsan_read_range(void* pointer, unsigned long bytes) {
  races::access(pointer, bytes, false, __builtin_return_address(0));
}
RACES_HOOK(void) __tsan_write_range(void* pointer, unsigned long bytes) {
  races::access(pointer, bytes, true, __builtin_return_address(0));
}

#undef RACES_ACCESSES
#undef RACES_ACCESS
#undef RACES_HOOK

#endif
