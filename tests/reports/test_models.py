"""Whole models in reports: from which resolution an attention pays, and what explains it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from linear_vit.reports import models as command
from linear_vit.reports.__main__ import main
from linear_vit.reports.page import page
from linear_vit.reports.saved import runs
from linear_vit.reports.tables import models
from tests.reports.saved import BACKENDS, MACHINE

SIDES = (128, 256, 512, 1024)


def seconds(attention: str, side: int) -> float:
    """The rest takes a second at 1,024 pixels and grows as their number; softmax crosses at 362."""
    pixels = (side / 1024) ** 2
    core = {"original": 2.0 * pixels**2, "linear": 0.25 * pixels}[attention]
    return pixels + core


def case(attention: str, side: int, mode: str = "inference") -> dict[str, Any]:
    median = seconds(attention, side)
    noise = 1 + 0.004 * np.random.default_rng([side, len(attention)]).standard_normal(13)
    rounds = [float(median * x) for x in noise / np.median(noise)]
    param = f"timm:vit-{attention}-{side}-{mode}-default"
    return {
        "param": param,
        "name": f"test_model[{param}]",
        "extra_info": {
            "schema": 2,
            "operation": "whole_model",
            "backend": "default",
            "pass": mode,
            "dtype": "float32",
            "whole_model": "timm:vit",
            "attention": attention,
            "resolution": side,
            "batch": 1,
            "N": (side // 16) ** 2 + 1,
            "images_per_s": 1 / median,
            "parameters": 5_000_000,
            "attention_s": 1.1 * (median - (side / 1024) ** 2),
            "attention_alone_s": median - (side / 1024) ** 2,
            "peak_memory_bytes": 1000 * side * side,
            "turns": f"{mode}-{side}",
            "median_interval_s": [0.999 * median, 1.001 * median],
            "disturbed": None,
        },
        "stats": {
            "median": median,
            "q1": 0.99 * median,
            "q3": 1.01 * median,
            "rounds": 13,
            "data": rounds,
        },
    }


def saved(folder: Path, **changes: Any) -> Path:
    benchmarks = [case(kind, side) for side in SIDES for kind in ("original", "linear")]
    for one in benchmarks:
        one["extra_info"] |= changes.get(one["param"], {})
    suite = {
        "kind": "benchmarks",
        "schema": 2,
        "sweep": "quick",
        "device": "cpu",
        "machine": MACHINE,
        "operations": {"whole_model": {"title": "Whole model"}},
        "backends": BACKENDS,
        "not_timed": {},
        "failed": {},
    }
    path = folder / "models.json"
    document = {"datetime": "2030-01-02T03:04:05+00:00", "benchmarks": benchmarks}
    path.write_text(json.dumps({**document, "kernel_suite": suite}))
    return path


def swapped(folder: Path, **changes: Any) -> models.Swapped:
    [found] = models.groups(runs.load([saved(folder, **changes)]))
    return found


def test_the_side_from_which_it_pays_is_where_the_curves_cross(tmp_path: Path) -> None:
    answer = swapped(tmp_path).pays("linear")
    assert answer is not None
    crossing = 1024 * np.sqrt(0.25 / 2.0)
    assert answer.low < crossing < answer.high
    assert answer.estimate == pytest.approx(crossing, rel=0.03)
    assert answer.text.startswith("side ≈ 3")


def test_kernels_alone_explain_the_models_time(tmp_path: Path) -> None:
    """Where all else stays, the speed-up is that which the kernels' own times make."""
    found = swapped(tmp_path)
    for side in SIDES:
        over = found.over("linear", side)
        assert over is not None
        assert found.expected("linear", side) == pytest.approx(np.exp(over[0]), rel=0.01)
    table = models.as_table(found)
    line = next(
        x for x in table.lines if (x["Side"].text, x["Attention"].text) == ("1,024", "linear")
    )
    assert line["Share of attention"].text == "22% (20%)"
    assert line["Expected"].text == "2.40×"
    assert line["Over the original"].value == pytest.approx(2.4, rel=0.01)
    assert line["Over the original"].mark == "best"
    assert "–" in [x["Expected"].text for x in table.lines if x["Attention"].text == "original"]


def test_a_disturbed_case_is_compared_with_nothing(tmp_path: Path) -> None:
    found = swapped(tmp_path, **{"timm:vit-linear-1024-inference-default": {"disturbed": "steal"}})
    assert found.over("linear", 1024) is None
    assert found.expected("linear", 1024) is None
    assert "‡ disturbed" in models.as_table(found).note


def test_kernels_that_were_disturbed_predict_nothing(tmp_path: Path) -> None:
    name = "timm:vit-linear-1024-inference-default"
    found = swapped(tmp_path, **{name: {"attention_alone_disturbed": "steal"}})
    assert found.expected("linear", 1024) is None
    assert found.expected("linear", 512) is not None
    line = models.as_table(found).lines[-1]
    assert line["Share of attention"].text == "22%"
    assert line["Share of attention"].tip.endswith("its kernels alone: steal")


def test_shares_that_are_not_known_are_left_out(tmp_path: Path) -> None:
    unknown = {"attention_s": None, "attention_alone_s": None, "N": None}
    changes = {
        f"timm:vit-{k}-{s}-inference-default": unknown
        for s in SIDES
        for k in ("original", "linear")
    }
    found = swapped(tmp_path, **changes)
    assert found.expected("linear", 512) is None
    assert not {"Share of attention", "Expected", "Tokens"} & set(models.as_table(found).lines[0])


def test_the_command_writes_tables_and_plots(tmp_path: Path, capsys: Any) -> None:
    path = saved(tmp_path)
    assert main(["models", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "side ≈ 3" in capsys.readouterr().out
    text = " ".join((tmp_path / "out" / "models.md").read_text().split())
    assert "lost its accuracy, which has to be trained back" in text
    assert "| 1000 MiB |" in text
    header, *lines = (tmp_path / "out" / "models.csv").read_text().splitlines()
    assert len(lines) == 2 * len(SIDES)
    assert header.startswith("model,pass,batch,attention,backend,resolution,N,median_s,")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"models-timm-vit-inference.svg", "models-timm-vit-inference.png"} < names


def test_a_run_without_models_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(runs.NoRuns, match="--models timm:vit_tiny"):
        command.write(runs.load(runs.measured()[:1]), tmp_path)


def test_the_page_shows_them(tmp_path: Path) -> None:
    page.write([saved(tmp_path)], tmp_path / "none", tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text()
    assert "Whole model; timm:vit, inference, batch 1, float32" in text
    assert "From which side of an image, in pixels, each attention pays" in text
    assert '"label":"side of the image, pixels"' in text
    assert "has to be trained back" in text
