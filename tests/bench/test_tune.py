"""Tuning without a GPU: what is tried, what is kept, and that the kernels ask for it."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from linear_vit.bench import tune
from linear_vit.bench.instruments import clock, machine
from linear_vit.bench.problems import AttentionShape
from linear_vit.kernels.triton import tuning

CPU = torch.device("cpu")
START = {"BLOCK_N": 64, "num_warps": 8, "num_stages": 3}


def test_every_kernel_of_the_table_has_a_workload() -> None:
    assert list(tune.WORKLOADS) == list(tuning.TABLE)


def test_a_kernel_without_head_dims_is_tuned_for_channels() -> None:
    dimensions = {kernel: tune.dimension_of(kernel) for kernel in tune.WORKLOADS}
    assert dimensions["linear_attention.state"] == "head-dims"
    assert {k for k in dimensions if dimensions[k] == "channels"} == {
        k for k in dimensions if k.startswith("ripple.")
    }


def test_neighbours_differ_by_one_step() -> None:
    found = tune.neighbours({**START, "RESIDENT": 0})
    assert found[0] == {**START, "RESIDENT": 0}
    assert all(options["RESIDENT"] == 0 for options in found)
    changed = [{k: v for k, v in options.items() if START.get(k, 0) != v} for options in found[1:]]
    assert changed == [
        {"BLOCK_N": 32}, {"BLOCK_N": 128}, {"num_warps": 4}, {"num_warps": 16},
        {"num_stages": 2}, {"num_stages": 4},
    ]  # fmt: skip


def test_a_candidate_is_the_table_while_it_is_tried() -> None:
    def chosen() -> dict[str, int]:
        return tuning.options("linear_attention.apply", 64, torch.bfloat16, CPU)

    before = chosen()
    candidate = {"BLOCK_N": 16, "num_warps": 2, "num_stages": 2}
    assert before != candidate
    with tuning.using({"linear_attention.apply": (tuning.Rule(candidate),)}):
        assert chosen() == candidate
    assert chosen() == before


def test_steps_lead_to_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 16 tokens to 128 there are three steps, each faster than the one before."""
    monkeypatch.setattr(tuning, "options", lambda *asked: {**START, "BLOCK_N": 16})

    def seconds(kernel: str, options: tune.Options, *rest: Any) -> float:
        return abs(options["BLOCK_N"] - 128) + abs(options["num_warps"] - 4) + 1.0

    monkeypatch.setattr(tune, "_time", seconds)
    workload = dataclasses.replace(
        tune.WORKLOADS["linear_attention.apply"],
        operation="linear_attention",
        shape=lambda dim: AttentionShape(1, 1, 1, 8, 8, dim),
    )
    monkeypatch.setitem(tune.WORKLOADS, "linear_attention.apply", workload)
    found = tune.tune("linear_attention.apply", 16, torch.float32, CPU)
    assert found == {"BLOCK_N": 128, "num_warps": 4, "num_stages": 3}


def test_a_candidate_that_is_disturbed_is_timed_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = clock.Timing((1.0, 2.0, 3.0), 1, "made up")
    bad = dataclasses.replace(good, disturbed="a neighbour")
    answers = iter([bad, good, bad, bad])
    monkeypatch.setattr(clock, "measure", lambda *_, **__: next(answers))
    monkeypatch.setattr(tune, "check", lambda *_: {})
    problem = SimpleNamespace(call=lambda *_: None)
    asked: Any = ("linear_attention.apply", START, problem, "forward", None, CPU)
    assert tune._time(*asked) == 2.0
    assert tune._time(*asked) == float("inf")
    assert capsys.readouterr().out.endswith("num_stages=3: a neighbour\n")


@pytest.mark.parametrize("kernel", tune.WORKLOADS)
def test_what_is_found_is_what_a_kernel_asks_for(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of rules, through the environment variable, to the launcher's question."""
    found = {"BLOCK_N": 7, "num_warps": 1, "num_stages": 1}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "tune", lambda *asked: found)
    out = tmp_path / "tuning.json"
    with tuning.assume("sm_90", 132):
        assert tune.main(["--kernels", kernel, "--out", str(out)]) == 0
        assert len(json.loads(out.read_text())["rules"]) == 1
        monkeypatch.setenv(tuning.OVERRIDES, str(out))
        dim = 384 if kernel.startswith("ripple.") else 64
        asked = tune.dtype_of(kernel, torch.bfloat16)
        assert tuning.options(kernel, dim, asked, CPU) == found


def test_a_dry_run_lists_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--dry_run", "--list", "--arch", "8.6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert named == list(tuning.TABLE)
    assert all("num_warps=" in line for line in lines if line.startswith(" "))


@pytest.mark.skipif(machine.version("triton") is None, reason="Triton is not installed here")
def test_a_dry_run_compiles_the_candidates(capsys: pytest.CaptureFixture[str]) -> None:
    """One small kernel: all of them are minutes, and the command's affair."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert tune.main(["--dry-run", "--kernels", "ripple.sum_partials"]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "ripple.sum_partials 384 bfloat16 sm_90a"
    assert len(lines) >= 4
    assert all("registers" in line and line.endswith("%") for line in lines), lines


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--kernels", "linear_attention.appply"], "there are linear_attention.state"),
        (["--dtypes", "float8"], "unknown dtype 'float8'; there are float32"),
        (["--arch", "sm_75"], "unknown architecture 'sm_75'; there are sm_80"),
        (["--head-dims", "64;32"], "numbers with commas"),
        (["--channels", "0"], "numbers with commas"),
    ):
        with pytest.raises(SystemExit):
            tune.main(["--dry-run", "--list", *options])
        assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err
