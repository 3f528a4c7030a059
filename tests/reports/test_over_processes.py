"""A sequence over processes in reports: the model, held against times that follow it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from linear_vit.reports.page import page
from linear_vit.reports.saved import runs
from linear_vit.reports.statistics import exchange
from linear_vit.reports.statistics.exchange import Gpus, Kernels
from linear_vit.reports.tables import over_processes
from linear_vit.reports.tables.over_processes import LINEAR, SOFTMAX, Over
from tests.reports.saved import MACHINE

LENGTHS = (256, 1024, 4096, 16_384)
KERNELS = Kernels(a=20e-6, c=100e-9)
LATENCY, RATE = 250e-6, 1e9
SENT = 200_000


def seconds(attention: str, processes: int, tokens: int) -> float:
    if attention == SOFTMAX:
        return 1e-9 * tokens**2 / processes
    exchanged = LATENCY + SENT / RATE if processes > 1 else 0.0
    return KERNELS(tokens / processes) + exchanged


def case(attention: str, processes: int, tokens: int, factor: float = 1.0) -> dict[str, Any]:
    median = factor * seconds(attention, processes, tokens)
    noise = 1 + 0.004 * np.random.default_rng([tokens, processes]).standard_normal(13)
    rounds = [float(median * x) for x in noise / np.median(noise)]
    several = processes > 1
    param = f"over_processes-forward-float32-N{tokens}-P{processes}-{attention}"
    info = {
        "schema": 2,
        "operation": "over_processes",
        "backend": attention,
        "pass": "forward",
        "dtype": "float32",
        "N": tokens,
        "processes": processes,
        "batch": 1,
        "heads": 6,
        "head_dim": 64,
        "sent_bytes": SENT * several,
        "exchanges": int(several),
        "all_reduce_latency_s": LATENCY if several else None,
        "all_reduce_bytes_per_s": RATE if several else None,
        "turns": str(tokens),
        "median_interval_s": [0.999 * median, 1.001 * median],
        "disturbed": None,
    }
    stats = {"median": median, "q1": 0.99 * median, "q3": 1.01 * median, "rounds": 13}
    return {
        "param": param,
        "name": f"test_kernel[{param}]",
        "extra_info": info,
        "stats": stats | {"data": rounds},
    }


def saved(folder: Path, factor: float = 1.0) -> Path:
    """``factor``: how many times as long as by the model two processes take."""
    benchmarks = [
        case(attention, processes, tokens, factor if processes > 1 else 1.0)
        for tokens in LENGTHS
        for attention in (LINEAR, SOFTMAX)
        for processes in (1, 2)
    ]
    titles = {"over_processes": {"title": "Attention over processes"}}
    suite = {"kind": "benchmarks", "schema": 2, "sweep": "cpu", "device": "cpu"}
    suite |= {"machine": MACHINE, "operations": titles, "backends": {}}
    path = folder / "over.json"
    document = {"datetime": "2030-01-02T03:04:05+00:00", "benchmarks": benchmarks}
    path.write_text(json.dumps({**document, "kernel_suite": suite | {"not_timed": {}}}))
    return path


def over(folder: Path, **how: Any) -> Over:
    loaded = runs.load([saved(folder, **how)])
    assert loaded.kernels.empty
    [found] = over_processes.groups(loaded)
    return found


def test_times_that_follow_the_model_are_the_models(tmp_path: Path) -> None:
    found = over(tmp_path)
    assert found.kernels is not None
    assert found.kernels.c == pytest.approx(KERNELS.c)
    assert found.kernels.a == pytest.approx(KERNELS.a)
    for tokens in LENGTHS:
        assert found.modelled(2, tokens) == pytest.approx(seconds(LINEAR, 2, tokens))
    table = over_processes.as_table(found)
    assert [line["measured over model"].text for line in table.lines] == ["1.00"] * 4
    slower = over_processes.as_table(over(tmp_path, factor=1.5))
    assert [line["measured over model"].text for line in slower.lines] == ["1.50"] * 4
    assert table.lines[0]["linear sends"].text == "195 KiB"


def test_a_second_process_pays_where_the_curves_cross(tmp_path: Path) -> None:
    found = over(tmp_path)
    crossing = 2 * (LATENCY + SENT / RATE) / KERNELS.c
    assert found.pays_by_model() == pytest.approx(crossing)
    answer = found.pays()
    assert answer is not None
    assert answer.low < crossing < answer.high
    [line] = over_processes.paying([found]).lines  # type: ignore[union-attr]
    assert line["Model"].text == f"{crossing:,.0f}"


def test_a_fit_has_no_negative_floor() -> None:
    """Times that grow faster than the length would have one."""
    kernels = exchange.fitted([100, 1000], [1e-6, 100e-6])
    assert kernels.a == 0
    assert kernels.c == pytest.approx((1e-8 + 1e-7) / 2)


def test_the_model_of_gpus_by_hand() -> None:
    gpus = Gpus()
    size = 4 * 6 * (2 * 64 * 64 + 2 * 64)
    assert exchange.state_bytes(1, 6, 64) == size
    two = 14e-6 + 2 * 1.25e-6 + 2 * size / 450e9
    assert gpus.exchange(2, backward=False) == pytest.approx(two)
    assert gpus.exchange(2, backward=True) == pytest.approx(2 * two)
    # 128 nodes: seven levels of the tree above the eight GPUs of a node.
    many = 14e-6 + 2 * (7 * 1.25e-6 + 7 * 8.5e-6) + 2 * size / 50e9
    assert gpus.exchange(1024, backward=False) == pytest.approx(many)
    assert gpus.exchange(1, backward=False) == 0
    kernels = gpus.kernels(backward=False)
    assert kernels.c == pytest.approx(4 * 6 * 64 * 2 / (0.9 * 4.8e12))
    pays = exchange.pays_from(kernels, two, 2)
    assert kernels(pays) == pytest.approx(kernels(pays / 2) + two)
    first = over_processes.on_gpus().lines[0]
    assert first["GPUs"].text == "2"
    assert first["Faster than one from N"].value == pytest.approx(pays)
    assert first["k and v of that N"].value == pytest.approx(2 * 2 * pays * 384 / 2 / 2**20)


def test_the_page_shows_both(tmp_path: Path) -> None:
    out = tmp_path / "index.html"
    page.write([saved(tmp_path)], tmp_path / "nothing", out)
    text = " ".join(out.read_text().split())
    assert "linear, 2 processes, by the model" in text
    assert "From which N on a second process makes linear attention faster" in text
    assert "Nothing here was measured" in text


@pytest.mark.parametrize(
    ("field", "value"),
    [("processes", 0), ("sent_bytes", -1), ("exchanges", "two"), ("all_reduce_latency_s", 0)],
)
def test_a_damaged_case_is_named_and_left_out(tmp_path: Path, field: str, value: Any) -> None:
    path = saved(tmp_path)
    document = json.loads(path.read_text())
    document["benchmarks"][2]["extra_info"][field] = value
    path.write_text(json.dumps(document))
    found = runs.load([path])
    assert len(found.over) == len(document["benchmarks"]) - 1
    assert f"benchmarks[2].extra_info.{field}" in found.skipped[0]
