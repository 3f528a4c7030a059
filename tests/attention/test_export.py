"""A swapped model of timm's leaves Python: torch.export, AOTInductor, ONNX; equal values."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from linear_vit import attention, kernels

timm = pytest.importorskip("timm")


def swapped(kind: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=64, **sizes)
    attention.replace(model, kind, ripple_stages=2, backend="torch")
    return model.eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=16)
    return torch.export.export(model, (images(),), dynamic_shapes=({0: batch},))


@pytest.mark.parametrize("kind", attention.ATTENTION_TYPES)
def test_torch_export_of_any_batch(kind: str) -> None:
    model = swapped(kind)
    program = exported(model)
    for batch in (2, 3):
        given = images(batch)
        torch.testing.assert_close(program.module()(given), model(given))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in names if "linear_vit" in name]


@pytest.mark.parametrize("kind", ["linear", "ripple"])
def test_an_exported_program_has_gradients(kind: str) -> None:
    model = swapped(kind)
    program = torch.export.export(model, (images(),)).module()
    program(images()).square().sum().backward()
    model(images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        found = program.get_parameter(name).grad
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-5)


def test_own_kernels_are_named_by_the_exported_program() -> None:
    if why := kernels.backends("linear_attention", "cpu")["cpu"]:
        pytest.skip(why)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=24, depth=1).eval()
    attention.replace(model, "linear", backend="cpu")
    program = torch.export.export(model, (images(),))
    torch.testing.assert_close(program.module()(images()), model(images()))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "linear_vit.cpu_linear_attention.default" in names


ELSEWHERE = """
import sys, torch
images = torch.load(sys.argv[2])
if sys.argv[1].endswith(".pt2") and sys.argv[4] == "aot":
    out = torch._inductor.aoti_load_package(sys.argv[1])(images)
else:
    out = torch.export.load(sys.argv[1]).module()(images)
torch.save(out, sys.argv[3])
assert not [name for name in sys.modules if name.startswith(("linear_vit", "timm"))]
"""


def run_elsewhere(path: Path, folder: Path, how: str) -> Tensor:
    """What a process gives that has nothing of ours."""
    torch.save(images(), folder / "images.pt")
    names = [str(path), str(folder / "images.pt"), str(folder / "out.pt"), how]
    command = [sys.executable, "-c", ELSEWHERE, *names]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: Tensor = torch.load(folder / "out.pt")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "ripple"])
def test_a_saved_program_runs_where_nothing_of_ours_is(kind: str, tmp_path: Path) -> None:
    model = swapped(kind)
    path = tmp_path / "model.pt2"
    torch.export.save(exported(model), path)
    torch.testing.assert_close(run_elsewhere(path, tmp_path, "export"), model(images()).detach())


@pytest.mark.slow
def test_aotinductors_package_runs_where_nothing_of_ours_is(tmp_path: Path) -> None:
    model = swapped("linear")
    path = tmp_path / "model.pt2"
    torch._inductor.aoti_compile_and_package(exported(model), package_path=str(path))
    got = run_elsewhere(path, tmp_path, "aot")
    torch.testing.assert_close(got, model(images()).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "ripple", "hydra"])
def test_onnx(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = swapped(kind), tmp_path / "model.onnx"
    torch.onnx.export(model, (images(),), str(path), dynamo=True)
    session = onnxruntime.InferenceSession(str(path))
    [out] = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    torch.testing.assert_close(
        torch.from_numpy(out), model(images()).detach(), rtol=1e-4, atol=1e-5
    )
