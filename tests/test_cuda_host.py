"""The host machine that runs CUDA kernels is itself right, and notices what a GPU would do wrong.

What it proves of each operation's kernels is in ``tests/cuda_host/test_*.py``.
"""

import ctypes

import pytest
import torch
from torch import Tensor

from tests.cuda_host import emulator
from tests.cuda_host.checks import needs_compiler

pytestmark = needs_compiler

# Each kernel does one thing; run(which, ...) launches one of them on a warp or two.
KERNELS = """
#include "{kernels}/cuda/common.cuh"
#include "{kernels}/cuda/ptx.cuh"

struct Arguments {{
  const void* a;
  const void* b;
  float* out;
}};

__device__ __half* tile() {{ return reinterpret_cast<__half*>(shared_memory()); }}

__global__ void diverge(Arguments) {{
  if (threadIdx.x != 3) __syncthreads();
}}
__global__ void overrun(Arguments) {{ shared_memory()[1024 / 4] = 1.0f; }}

// out (16, 8) = a (16, 16) b (16, 8): a by rows, b by rows, through every kind of matrix load.
template <typename T>
__global__ void product(Arguments p) {{
  const int lane = threadIdx.x, group = lane / 4, pair = lane % 4 * 2;
  for (int i = lane; i < 16 * 16 / 8; i += 32) {{
    ptx::cp_async_16(tile() + i * 8, static_cast<const T*>(p.a) + i * 8, 16);
  }}
  ptx::cp_async_commit();
  for (int i = lane; i < 16; i += 32) {{
    ptx::cp_async_16(tile() + 256 + i * 8, static_cast<const T*>(p.b) + i * 8, 16);
  }}
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  unsigned a[4], b[2], again[2];
  ptx::ldmatrix_x4(a, tile() + lane % 16 * 16 + lane / 16 * 8);
  ptx::ldmatrix_x2_trans(b, tile() + 256 + lane % 16 * 8);
  float d[4] = {{}};
  ptx::mma_16816<T>(d, a, b);
  ptx::ldmatrix_x2(again, tile() + lane % 16 * 16);  // rows 0 to 15 of the first eight columns
  if (again[0] != a[0] || again[1] != a[1]) d[0] = __uint_as_float(0x7fc00000);
  unsigned back[4];  // a's halves have changed places
  ptx::stmatrix_x4(tile() + lane % 16 * 16 + (1 - lane / 16) * 8, a);
  ptx::ldmatrix_x4(back, tile() + lane % 16 * 16 + lane / 16 * 8);
  for (int i = 0; i < 4; ++i) {{
    if (back[i] != a[i ^ 2]) d[0] = __uint_as_float(0x7fc00000);
  }}
  p.out[group * 8 + pair] = d[0];
  p.out[group * 8 + pair + 1] = d[1];
  p.out[(group + 8) * 8 + pair] = d[2];
  p.out[(group + 8) * 8 + pair + 1] = d[3];
}}

// What is read before a copy is waited for, before a barrier, and after both.
__global__ void copy(Arguments p) {{
  const int i = threadIdx.x;
  const auto at = [&](int chunk) {{ return shared_memory() + chunk * 4; }};
  const auto* const a = static_cast<const float*>(p.a);
  *at(i) = 7.0f;
  ptx::cp_async_16(at(i), a + i * 4, i == 63 ? 4 : 16);
  ptx::cp_async_commit();
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  p.out[i] = *at(63 - i);
  __syncthreads();
  p.out[64 + i] = *at(63 - i);
  p.out[128 + i] = at(63 - i)[1];
  ptx::cp_async_wait<0>();
  __syncthreads();
  ptx::cp_async_16(at(i), a + i * 4, 16);
  ptx::cp_async_commit();
  __syncthreads();
  p.out[192 + i] = *at(63 - i);
  __syncthreads();
  ptx::cp_async_wait<0>();
}}
__global__ void leave_early(Arguments p) {{
  ptx::cp_async_16(tile(), p.a, 16);
  ptx::cp_async_commit();
}}
__global__ void crooked_row(Arguments) {{
  unsigned a[4];
  ptx::ldmatrix_x4(a, tile() + threadIdx.x * 8 + 1);
}}
__global__ void row_outside(Arguments) {{
  unsigned a[4];
  ptx::ldmatrix_x4(a, tile() + (threadIdx.x + 64) * 8);
}}
__global__ void crooked_copy(Arguments p) {{
  ptx::cp_async_16(tile() + threadIdx.x * 8, static_cast<const __half*>(p.a) + 1, 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}}
__global__ void move(Arguments p) {{
  const auto* const a = static_cast<const Vector<float, 4>*>(p.a);
  const auto value = load_global(a + threadIdx.x);
  store_global(p.out + threadIdx.x, value.value[0] + load_global(static_cast<const float*>(p.b)));
}}
__global__ void shuffle(Arguments p) {{
  const unsigned lane = threadIdx.x;
  p.out[lane] = __shfl_xor_sync(kFullWarp, static_cast<float>(lane), 5);
  p.out[32 + lane] = static_cast<float>(__shfl_sync(kFullWarp, lane, 9));
  p.out[64 + lane] = __shfl_down_sync(kFullWarp, static_cast<float>(lane), 4u);
}}

__global__ void nothing(Arguments) {{}}
extern "C" int with_shared_memory(int bytes, int device) {{
  cuda_host_configure(0);
  cuda_host_set_device(device);
  return launch(nothing, 1, bytes, nullptr, Arguments{{}}, 32);
}}

extern "C" int run(const char* name, const void* a, const void* b, float* out, int order) {{
  cuda_host_configure(order);
  const std::pair<const char*, void (*)(Arguments)> kernels[] = {{
      {{"diverge", diverge}},         {{"overrun", overrun}},
      {{"product f16", product<__half>}}, {{"product bf16", product<__nv_bfloat16>}},
      {{"copy", copy}},               {{"leave early", leave_early}},
      {{"crooked row", crooked_row}}, {{"row outside", row_outside}},
      {{"crooked copy", crooked_copy}}, {{"move", move}}, {{"shuffle", shuffle}},
  }};
  for (const auto& [known, kernel] : kernels) {{
    const int threads = std::strcmp(name, "copy") == 0 ? 64 : 32;
    if (std::strcmp(name, known) == 0) {{
      return launch(kernel, 1, 1024, nullptr, Arguments{{a, b, out}}, threads);
    }}
  }}
  return -1;
}}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("host")
    source = folder / "kernels.cu"
    source.write_text(KERNELS.format(kernels=emulator.KERNELS))
    library = ctypes.CDLL(str(emulator.build({"kernels": source}, folder)["kernels"]))
    library.cuda_host_failure.restype = ctypes.c_char_p
    return library


def run(
    library: ctypes.CDLL, name: str, a: Tensor, b: Tensor, out: Tensor, order: int = 0
) -> str | None:
    """What the launch failed of, or None."""
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (a, b, out))
    error = library.run(name.encode(), *pointers, order)
    assert error >= 0, f"no such kernel: {name}"
    return library.cuda_host_failure().decode() if error else None


def aligned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=random).to(dtype)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_warps_product_is_the_matrix_product(
    library: ctypes.CDLL, name: str, dtype: torch.dtype, order: int
) -> None:
    a, b, out = aligned(16, 16, dtype=dtype), aligned(16, 8, dtype=dtype), aligned(16, 8)
    assert run(library, f"product {name}", a, b, out, order) is None
    exact = a.double() @ b.double()
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6)
    assert (out.double().abs() <= exact.abs()).all()  # rounded toward zero


def test_an_asynchronous_copy_arrives_when_it_is_waited_for(library: ctypes.CDLL) -> None:
    a, out = aligned(64, 4), aligned(4, 64)
    assert run(library, "copy", a, a, out) is None
    unsynchronised, first, second, refilled = out
    # Thread 0 reads what thread 63 has not even issued; 63 reads what 0 has waited for.
    assert not torch.equal(unsynchronised, a[:, 0].flip(0))
    assert torch.equal(first, a[:, 0].flip(0))
    assert second[0] == 0  # the last copy brought four bytes and zeros
    assert torch.equal(second[1:], a[:, 1].flip(0)[1:])
    assert refilled.isnan().all()  # neither the old tile nor yet the new one


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("diverge", "barrier"),
        ("overrun", "past the end of shared memory"),
        ("leave early", "before its asynchronous copies arrived"),
        ("crooked row", "not 16-byte aligned"),
        ("row outside", "outside of the block's shared memory"),
        ("crooked copy", "not 16-byte aligned"),
    ],
)
def test_what_a_gpu_would_do_wrong_is_an_error(
    library: ctypes.CDLL, name: str, reason: str
) -> None:
    x = aligned(64, 4)
    failure = run(library, name, x, x, aligned(64, 4))
    assert failure is not None
    assert reason in failure


def test_an_access_has_to_lie_on_a_multiple_of_its_size(library: ctypes.CDLL) -> None:
    a, out = aligned(33, 4), aligned(32)
    assert run(library, "move", a, a, out) is None
    for first in (1, 2):
        failure = run(library, "move", a.flatten()[first:], a, out)
        assert failure is not None
        assert "not a multiple of its size" in failure


def test_the_limit_of_shared_memory_is_raised_once_a_device_to_the_most(
    library: ctypes.CDLL,
) -> None:
    """The host refuses to set it again, since another thread may launch in between."""
    most = 99 * 1024
    for device in (0, 1, 0):
        for size in (1024, 60_000, 50_000, most):
            assert library.with_shared_memory(size, device) == 0, library.cuda_host_failure()
    assert library.with_shared_memory(most + 16, 0) != 0


def test_shuffles(library: ctypes.CDLL) -> None:
    out = torch.zeros(3, 32)
    assert run(library, "shuffle", out, out, out) is None
    lane = torch.arange(32)
    assert torch.equal(out[0], (lane ^ 5).float())
    assert torch.equal(out[1], torch.full((32,), 9.0))
    assert torch.equal(out[2], torch.where(lane + 4 < 32, lane + 4, lane).float())


def test_traffic_is_counted_by_tensor_and_width(library: ctypes.CDLL) -> None:
    a, b, out = aligned(32, 4), aligned(1), aligned(32)
    library.cuda_host_watch_nothing()
    for x in (a, out):
        begin = x.data_ptr()
        library.cuda_host_watch(ctypes.c_void_p(begin), ctypes.c_void_p(begin + 4 * x.numel()))
    assert run(library, "move", a, b, out) is None
    counted = []
    for index in range(3):
        values = (ctypes.c_int64 * 4)()
        library.cuda_host_traffic(index, values)
        counted.append(list(values))
    library.cuda_host_watch_nothing()
    assert counted == [[512, 0, 0, 0], [0, 0, 0, 128], [0, 128, 0, 0]]
