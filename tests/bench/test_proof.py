"""What ran, by name: every backend's own names pass, and those of another are told apart."""

import pytest
import torch

from linear_vit import kernels
from linear_vit.bench import peers
from linear_vit.bench.group import claim
from linear_vit.bench.instruments.proof import fallback, names_of, shown
from linear_vit.bench.problems import BACKWARD, FORWARD, FORWARD_BACKWARD, make_problem
from linear_vit.bench.problems import operation as operation_of

CPU = torch.device("cpu")
PLAIN = ("aten::matmul", "aten::relu")
COMPILED = ("Torch-Compiled Region: 0/0", "## Call CompiledFxGraph abc ##", "aten::bmm")
OWN = {name: (f"linear_vit::{name}_linear_attention",) for name in ("cpu", "triton", "cuda")}
KERNEL = ("_state_kernel", "Memset (Device)")


@pytest.mark.parametrize(
    ("backend", "operators", "on_device", "on"),
    [
        ("torch", PLAIN, (), "cpu"),
        ("torch", PLAIN, ("void at::native::reduce",), "cuda"),
        ("reference", PLAIN, (), "cpu"),
        ("compiled", COMPILED, (), "cpu"),
        ("cpu", OWN["cpu"], (), "cpu"),
        ("triton", OWN["triton"], KERNEL, "cuda"),
        ("cuda", OWN["cuda"], KERNEL, "cuda"),
        ("sdpa_math", ("aten::_scaled_dot_product_attention_math",), (), "cpu"),
        ("fla", PLAIN, ("chunk_fwd_kernel_h",), "cuda"),
        ("fla", PLAIN, ("chunk_bwd_kernel_dv",), "cuda"),
        ("flash_bla", PLAIN, ("fused_bwd_kernel_ds_dq", "fused_bwd_kernel_dk_dv"), "cuda"),
    ],
)
def test_the_one_asked_for_passes(backend, operators, on_device, on) -> None:
    assert fallback(claim("linear_attention", backend), operators, on_device, on) == ""


@pytest.mark.parametrize(
    ("backend", "operators", "on_device", "on", "words"),
    [
        ("cpu", PLAIN, (), "cpu", "no operator linear_vit::cpu_… ran, but aten::matmul"),
        ("triton", PLAIN, ("void at::native::x",), "cuda", "no operator linear_vit::triton_"),
        ("triton", OWN["cuda"], KERNEL, "cuda", "no operator linear_vit::triton_"),
        ("triton", OWN["triton"], ("void at::native::x",), "cuda", "only PyTorch's own kernels"),
        ("cuda", OWN["cuda"], (), "cuda", "nothing ran on the device"),
        ("cuda", OWN["cuda"] + OWN["triton"], KERNEL, "cuda", "kernels of triton ran"),
        ("compiled", PLAIN, (), "cpu", "no compiled graph ran"),
        ("torch", COMPILED, (), "cpu", "a compiled graph ran"),
        ("torch", OWN["cpu"] + PLAIN, (), "cpu", "kernels of cpu ran, where torch was asked for"),
        ("torch", (), (), "cpu", "no operator of PyTorch ran"),
        ("sdpa_flash", ("aten::_scaled_dot_product_attention_math",), (), "cpu", "flash"),
        ("flash_bla", PLAIN, KERNEL, "cuda", "no …fused_fwd_kernel… or …fused_bwd_kernel… ran"),
    ],
)
def test_a_fallback_is_named(backend, operators, on_device, on, words) -> None:
    assert words in fallback(claim("linear_attention", backend), operators, on_device, on)


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD, FORWARD_BACKWARD])
@pytest.mark.parametrize("operation", ["linear_attention", "softmax_attention", "ripple_pool"])
def test_names_of_what_runs_here(operation: str, mode: str) -> None:
    """Each backend's real names pass as its own and as no other's of another kind."""
    problem = make_problem(operation, operation_of(operation).shape(16), torch.float32, CPU)
    usable = kernels.backends(operation, CPU, head_dim=64)
    for backend in ("torch", "reference", "cpu"):
        if usable[backend] is not None:
            continue
        call = problem.call(backend, mode)
        operators, on_device = names_of(call, CPU)
        assert on_device == ()
        assert fallback(claim("linear_attention", backend), operators, on_device, "cpu") == ""
        other = "torch" if backend == "cpu" else "cpu"
        assert fallback(claim("linear_attention", other), operators, on_device, "cpu")
        assert fallback(claim("linear_attention", "compiled"), operators, on_device, "cpu")
        first = shown(operators, on_device)[0]
        assert first.startswith("linear_vit::cpu_") == (backend == "cpu")


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD, FORWARD_BACKWARD])
def test_sdpa_kernels_are_told_apart(mode: str) -> None:
    problem = make_problem(
        "softmax_attention", operation_of("softmax_attention").shape(16), torch.float32, CPU
    )
    usable = peers.backends("softmax_attention", CPU, torch.float32)
    names = [name for name, reason in usable.items() if reason is None]
    assert {"sdpa_math", "sdpa_flash"} <= set(names)
    for name in names:
        operators, _ = names_of(problem.call(name, mode), CPU)
        passes = [
            n for n in names if not fallback(claim("softmax_attention", n), operators, (), "cpu")
        ]
        assert passes == [name]


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD, FORWARD_BACKWARD])
def test_timm_is_seen_in_either_pass(mode: str) -> None:
    problem = make_problem(
        "linear_attention", operation_of("linear_attention").shape(16), torch.float32, CPU
    )
    operators, _ = names_of(problem.call("litemla", mode), CPU)
    assert fallback(claim("linear_attention", "litemla"), operators, (), "cpu") == ""
