"""Whole models as cases: how they are named and built, and what a case says of itself."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from linear_vit.bench import problems
from linear_vit.bench.problems import Case
from linear_vit.options import OptionError
from linear_vit.training.models import Logits, build, builder
from linear_vit.training.steps import DEFAULT
from linear_vit.training.whole_models import (
    INFERENCE,
    STEP,
    WHOLE_MODEL,
    Asked,
    ModelShape,
    WholeModel,
)
from tests import processes

CPU = torch.device("cpu")
MINE = """
from linear_vit.attention import VisionTransformer

def build(image_size):
    return VisionTransformer(image_size, 8, 5, 32, 2, 2, 32, "baseline")

def fixed():
    return build(32)

NUMBER = 3
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return f"{path}:build"


def test_a_file_says_how_to_build_a_model(mine: str) -> None:
    assert builder(mine)(64).img_size == (64, 64)
    assert builder(mine.replace(":build", ":fixed"))(64).img_size == (32, 32)
    images = torch.randn(2, 3, 64, 64)
    same = [build(mine, "linear", 64, "torch").eval()(images) for _ in range(2)]
    assert torch.equal(*same)
    assert same[0].shape == (2, 5)
    assert not torch.allclose(same[0], build(mine, "original", 64).eval()(images))


def test_what_names_no_model_is_refused(tmp_path: Path, mine: str) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import none_such\n")
    refused = {
        "vit": "names no model; write timm:NAME",
        "none.py:build": "names no model",
        mine.replace(":build", ":make"): "has no function make",
        mine.replace(":build", ":NUMBER"): "has no function NUMBER",
        f"{broken}:build": "can't be imported: ModuleNotFoundError: No module named 'none_such'",
    }
    for name, why in refused.items():
        with pytest.raises(OptionError, match=why):
            builder(name)
    with pytest.raises(OptionError, match="--attention: unknown type 'flash'"):
        WholeModel().ask(Asked(models=(mine,), attention=("flash",)))


def test_one_tensor_comes_out_whatever_is_wrapped_around_it() -> None:
    class Wrapped(nn.Module):
        def __init__(self, out: object) -> None:
            super().__init__()
            self.out = out

        def forward(self, images: torch.Tensor) -> object:
            return self.out

    logits, tokens = torch.randn(2, 5), torch.randn(2, 7, 5)
    plain = {"logits": logits, "pooler_output": None, "last_hidden_state": tokens}
    for out, expected in (
        (logits, logits),
        ((logits, tokens), logits),
        (SimpleNamespace(**plain), logits),
        (SimpleNamespace(last_hidden_state=tokens), tokens.mean(1)),
        (tokens[:, :, None].expand(2, 7, 3, 5), tokens.mean(2)),
    ):
        torch.testing.assert_close(Logits(Wrapped(out))(logits), expected)


def test_a_sweep_has_every_attention_at_every_resolution(mine: str) -> None:
    of = WholeModel()
    assert not list(of.sizes("cpu", "full", (), None))
    of.ask(Asked(models=(mine,), attention=("linear", "hydra"), resolutions=(64, 32)))
    shapes = list(of.sizes("cpu", "quick", (), None))
    assert [(s.resolution, s.attention) for s in shapes] == [
        (side, kind) for side in (32, 64) for kind in ("original", "linear", "hydra")
    ]
    assert len({of.turn_key(shape) for shape in shapes}) == 2
    names = [of.case_name(Case(of.name, m, "float32", shapes[1], DEFAULT)) for m in of.modes]
    assert names == [
        "mine.py:build-linear-32-inference-default",
        "mine.py:build-linear-32-step-default",
    ]


def test_the_original_is_timed_once(mine: str) -> None:
    of = WholeModel()
    of.ask(Asked(models=(mine,), resolutions=(32,), backends=("torch", "compiled")))
    original, linear = (ModelShape(1, mine, kind, 32) for kind in ("original", "linear"))
    assert of.backends(CPU, ()) == {DEFAULT: None}
    assert of.backends(CPU, ("torch", "compiled")).keys() == {"torch", "compiled"}
    assert of.unusable(original, "torch", CPU) is None
    assert of.unusable(original, "compiled", CPU) == (
        "the original has its own attention: it is timed once"
    )
    assert of.unusable(linear, "compiled", CPU) is None


def test_what_a_model_cannot_become_is_left_out_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"{MINE}\ndef none():\n    return torch.nn.Linear(2, 2)\n")
    of, shape = WholeModel(), ModelShape(1, f"{path}:none", "linear", 32)
    of.ask(Asked(models=(shape.model,), resolutions=(32,)))
    assert of.unusable(shape, DEFAULT, CPU) == "NameError: name 'torch' is not defined"
    path = tmp_path / "other.py"
    path.write_text(f"import torch\n{MINE}\ndef none():\n    return torch.nn.Linear(2, 2)\n")
    shape = replace(shape, model=f"{path}:none")
    why = of.unusable(shape, DEFAULT, CPU)
    assert why is not None
    assert why.startswith("ValueError: no attention module in Linear is known")
    assert of.unusable(replace(shape, attention="original"), DEFAULT, CPU) is None


@pytest.mark.slow
def test_sana_beside_our_kernels_as_the_docs_have_it(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    text = (processes.ROOT / "docs/your-model.md").read_text()
    [code] = [x for x in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "Denoiser" in x]
    path = tmp_path / "sana.py"
    path.write_text(code)
    outputs = {}
    for kind in ("original", "linear"):
        shape = ModelShape(1, f"{path}:build", kind, 16)
        problem = problems.make_problem(WHOLE_MODEL.name, shape, torch.float32, CPU)
        [outputs[kind]] = problem.call("torch", INFERENCE)()
        facts = WHOLE_MODEL.facts(Case("", INFERENCE, "float32", shape, "torch"), 1.0)
        assert facts["N"] == 16 * 16
        assert facts["attention_s"] > 0
        assert (facts["attention_alone_s"] is None) == (kind == "original")
    torch.testing.assert_close(outputs["linear"], outputs["original"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "transformers:dinov2"])
def test_models_of_libraries_are_built_for_a_side(name: str) -> None:
    pytest.importorskip(name.partition(":")[0])
    for kind in ("original", "ripple"):
        with torch.inference_mode():
            out = build(name, kind, 112, "torch").eval()(torch.randn(1, 3, 112, 112))
        assert out.dim() == 2
        assert out.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "mode"), [("original", STEP), ("hydra", STEP), ("ripple", INFERENCE)]
)
def test_a_case_runs_and_says_what_attention_takes(mine: str, kind: str, mode: str) -> None:
    shape = ModelShape(2, mine, kind, 64)
    backend = DEFAULT if kind == "original" else "torch"
    case = Case(WHOLE_MODEL.name, mode, "float32", shape, backend)
    problem = problems.make_problem(WHOLE_MODEL.name, shape, torch.float32, CPU)
    call = problem.call(backend, mode)
    assert [x.shape for x in call()] == ([(2, 5)] if mode == INFERENCE else [])
    facts = WHOLE_MODEL.facts(case, 0.5)
    assert (facts["attention"], facts["resolution"], facts["batch"]) == (kind, 64, 2)
    assert (facts["N"], facts["images_per_s"]) == (64, 4.0)
    assert facts["parameters"] > 10_000
    assert 0 < facts["attention_s"] < 0.5
    assert 0 < facts["attention_alone_s"] < 0.5
    assert not [
        m for m in problem.running.made[(backend, mode)].model.modules() if m._forward_hooks
    ]


def test_it_has_nothing_to_check_and_no_lengths() -> None:
    assert problems.operation("whole_model") is WHOLE_MODEL
    assert not WHOLE_MODEL.check_shapes(64)
    assert not WHOLE_MODEL.lengths("cpu", "full")


@pytest.mark.slow
def test_models_are_timed_by_turns_and_reported(mine: str, tmp_path: Path) -> None:
    """From the command line to the saved run, its table and its plots."""
    options = ["--benchmark-only", "--models", mine, "--attention", "linear,ripple"]
    options += ["--resolutions", "64,128", "--device", "cpu", f"--out={tmp_path}"]
    done = processes.pytest(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    saved = json.loads((tmp_path / "benchmark.json").read_text())
    infos = [benchmark["extra_info"] for benchmark in saved["benchmarks"]]
    assert len(infos) == 2 * 2 * 3
    assert len({info["turns"] for info in infos}) == 4
    assert all(info["peak_memory_bytes"] > 0 for info in infos)
    assert "side" in done.stdout
    report = ["-m", "linear_vit.reports", "models", str(tmp_path)]
    done = processes.python(*report, "--out", str(tmp_path / "shown"))
    assert done.returncode == 0, done.stderr
    assert "has to be trained back" in " ".join(done.stdout.split())
    written = {path.suffix for path in (tmp_path / "shown").iterdir()}
    assert written == {".md", ".csv", ".png", ".svg"}
