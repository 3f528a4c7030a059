// Kernels that have one race each, or just none, for test_races.py.
#include "../../kernels/cuda/common.cuh"

namespace {

constexpr int kThreadsHere = 128;

struct Racy {
  int which;
  const float* in;
  float* out;
};

__device__ void copy(float* to, const float* from) {
  ptx::cp_async_16(to, from, 16);
  ptx::cp_async_commit();
}

__device__ void read_and_write(int which, float* x, const Racy& p) {
  const int t = threadIdx.x, same_warp = t ^ 5, other_warp = t ^ 40;
  float got = 0.0f;
  switch (which) {
    case 0:  // written, a barrier, read by another warp
      x[t] = 1.0f;
      __syncthreads();
      got = x[other_warp];
      break;
    case 1:
      x[t] = 1.0f;
      __syncwarp();
      got = x[other_warp];
      break;
    case 2:
      x[t] = 1.0f;
      __syncwarp();
      got = x[same_warp];
      break;
    case 3:
      x[t] = 1.0f;
      got = __shfl_xor_sync(kFullWarp, 1.0f, 1) + x[same_warp];
      break;
    case 4:  // read by others when it is written again
      x[t] = 1.0f;
      __syncthreads();
      if (t < 32) {
        got = x[t + 32];
      } else {
        x[t] = 2.0f;
      }
      break;
    case 5:
      x[t] = 1.0f;
      __syncwarp();
      got = x[same_warp];
      __syncwarp();
      x[t] = 2.0f;
      break;
    case 6:
      x[t] = 1.0f;
      __syncwarp();
      if (t % 32 < 16) {
        got = x[t + 16];
      } else {
        x[t] = 2.0f;
      }
      break;
    case 7:
      x[t % 64] = 1.0f;
      break;
    case 8:
      got = x[t];
      break;
    case 9:  // a copy, the wait of its thread, a barrier
      copy(x + 4 * t, p.in + 4 * t);
      ptx::cp_async_wait<0>();
      __syncthreads();
      got = x[t];
      break;
    case 10:
      copy(x + 4 * t, p.in + 4 * t);
      __syncthreads();
      ptx::cp_async_wait<0>();
      got = x[t];
      break;
    case 11:  // its own is still to be waited for
      copy(x + 4 * t, p.in + 4 * t);
      ptx::cp_async_wait<1>();
      got = x[4 * t];
      ptx::cp_async_wait<0>();
      break;
    case 12:  // two groups, of which the first is there
      copy(x + 4 * t, p.in + 4 * t);
      copy(x + 4 * (kThreadsHere + t), p.in + 4 * t);
      ptx::cp_async_wait<1>();
      got = x[4 * t];
      ptx::cp_async_wait<0>();
      break;
    case 13:
      copy(x + 4 * t, p.in + 4 * t);
      x[4 * t] = 1.0f;
      ptx::cp_async_wait<0>();
      break;
    case 14:  // a stage is asked for again that others still read
      copy(x + 4 * t, p.in + 4 * t);
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (t < 32) {
        got = x[4 * (t + 32)];
      } else {
        copy(x + 4 * t, p.in + 4 * t);
      }
      ptx::cp_async_wait<0>();
      break;
    case 15: {  // a matrix that nobody says is there
      x[t] = 1.0f;
      unsigned matrices[4];
      ptx::ldmatrix_x4_trans(matrices, x + t / 32 * 32 + t % 8 * 4);
      got = __uint_as_float(matrices[0]);
      break;
    }
    case 16: {  // every lane has read it when the load is over
      x[t] = 1.0f;
      __syncwarp();
      unsigned matrices[4];
      ptx::ldmatrix_x4_trans(matrices, x + t / 32 * 32 + t % 8 * 4);
      got = __uint_as_float(matrices[0]);
      x[t] = 2.0f;
      break;
    }
    case 17:  // a warp takes the next barrier for its own
      if (t < 96) __syncthreads();
      __syncthreads();
      if (t >= 96) __syncthreads();
      break;
    case 18:
      store_global(p.out + kThreadsHere + t / 2, 1.0f);
      break;
    case 19:  // by both blocks
      store_global(p.out + kThreadsHere + t, 1.0f);
      break;
    case 20:
      store_global(p.out + kThreadsHere * (1 + blockIdx.x) + t, 1.0f);
      __syncthreads();
      got = load_global(p.out + kThreadsHere * (1 + blockIdx.x) + other_warp);
      break;
    case 21:
      store_global(p.out + kThreadsHere * (1 + blockIdx.x) + t, 1.0f);
      got = load_global(p.out + kThreadsHere * (1 + blockIdx.x) + same_warp);
      break;
  }
  if (blockIdx.x == 0) store_global(p.out + t, got);
}

__global__ void racy_kernel(Racy p) { read_and_write(p.which, shared_memory(), p); }

}  // namespace

extern "C" cudaError_t racy(const Racy* p, cudaStream_t stream) {
  return launch(racy_kernel, 2, 4096, stream, *p, kThreadsHere);
}
