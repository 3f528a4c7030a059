"""Cases that differ in batch, heads or head dim are of different curves, whatever reads them."""

import json
from pathlib import Path
from typing import Any

import pytest

from linear_vit.reports import groups
from linear_vit.reports.changes import changes
from linear_vit.reports.compare import speedups, summarise
from linear_vit.reports.page import training_sections
from linear_vit.reports.page.parts import Seen
from linear_vit.reports.saved import documents
from linear_vit.reports.saved.runs import load
from linear_vit.reports.tables import cpu
from linear_vit.reports.tables.table import Table
from linear_vit.reports.targets import CPU, GPU, verdicts
from tests.reports import saved

# Batch, heads and head dim of what one GPU sweep times, and of a head dim twice as large.
SHAPES = ((1, 16, 64), (4, 16, 64), (128, 6, 64), (1, 16, 128))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return saved.save(tmp_path / "gpu.json", saved.gpu(*SHAPES))


def test_curves_fits_and_crossovers_are_of_one_shape(run: Path) -> None:
    found = groups.groups(load([run]))
    of = {(f"B = {b}, H = {h}, Hk = {h}, D = {d}"): (b, h, d) for b, h, d in SHAPES}
    assert {group.setting for group in found} == set(of)
    for group in found:
        for (operation, *_), fit in group.fits.items():
            assert fit.lengths == 6
            truth = 2 if operation == "softmax_attention" else 1
            assert fit.exponent == pytest.approx(truth, abs=0.02), group.setting
        for picture, frame in groups.pictures(group):
            assert not frame.duplicated(["operation", "pass", "backend", "N"]).any(), picture
        crossings = {b: c.estimate for g, _, b, c in groups.crossovers([group])}
        heads = of[group.setting][1]
        assert crossings["triton"] == pytest.approx(2048 * 16 / heads, rel=0.05), group.setting


def test_speed_ups_are_of_one_shape(run: Path) -> None:
    loaded = load([run])
    cases = speedups(loaded, "torch", ["triton"])
    assert len(cases) == len(SHAPES) * 6 * 2
    assert cases["speedup"].tolist() == pytest.approx([4.0] * len(cases))
    assert len(summarise(cases)) == len(SHAPES) * 2
    both = changes(loaded, loaded, control="torch").cases
    assert len(both) == len(SHAPES) * 6 * 2 * 2
    assert both["ratio"].tolist() == pytest.approx([1.0] * len(both))


@pytest.mark.parametrize("first", [0, 1])
def test_a_gpus_targets_mix_no_head_dims(tmp_path: Path, first: int) -> None:
    """Ours wins with one head dim and loses with the other, whichever stands first in the file."""
    made = saved.gpu((4, 16, 64), (4, 16, 128))
    cases = [c for c in made["benchmarks"] if c["extra_info"]["N"] == 1024]
    for case in cases:
        info = case["extra_info"]
        info["N"] = info["shape"]["N"] = info["shape"]["M"] = 512
        factor = 10.0 if info["shape"]["D"] == 64 else 0.1
        saved.slow_down(case, factor if info["operation"] == "softmax_attention" else 1.0)
    made["benchmarks"] = cases[::-1] if first else cases
    found = verdicts(load([saved.save(tmp_path / "run.json", made)]), GPU)
    (crossover,) = [v for v in found if v.target.name == "forward, B·H ≥ 64"]
    assert crossover.found == ("slower at N=512", False)


def of_heads(heads: int, factor: float) -> list[dict[str, Any]]:
    """C++ and compiled products on batches, and C++ on one sequence, as long as their heads say."""
    cases = []
    for total, lengths in ((65_536, (64, 1024)), (None, tuple(1024 << i for i in range(6)))):
        for tokens in lengths:
            for backend in ("cpu", "compiled") if total else ("cpu",):
                case = saved.case("linear_attention", backend, "forward", tokens)
                info = case["extra_info"] | {"total_tokens": total}
                batch = total // tokens if total else 1
                info["shape"] = info["shape"] | {"H": heads, "Hk": heads, "B": batch}
                case["name"] += f" {heads} heads"
                slower = factor * (6.0 if backend == "compiled" else 1.0)
                case["stats"] = saved.stats(slower * 1e-7 * heads * tokens)
                cases.append(case | {"extra_info": info})
    return cases


@pytest.mark.parametrize("order", [1, -1])
def test_a_cpus_targets_and_tables_mix_no_heads(tmp_path: Path, order: int) -> None:
    made = saved.run()
    # One of the two has a length more, and is the curve whose growth is judged.
    made["benchmarks"] = (of_heads(6, 1.0) + of_heads(16, 3.0)[:-1])[::order]
    loaded = load([saved.save(tmp_path / "run.json", made)])
    found = {v.target.name: v.found for v in verdicts(loaded, CPU)}
    assert found["forward, float32, over compiled"] == ("mean 6.00×, worst 6.00×", True)
    exponent = found["exponent of time against N"]
    assert exponent is not None
    assert exponent[0].startswith("N^1.00")
    tables = cpu.against_others(loaded)
    assert sorted(one.title.rpartition("float32, ")[2] for one in tables) == [
        "H = 16, Hk = 16, D = 64",
        "H = 6, Hk = 6, D = 64",
    ]
    for one in tables:
        assert [line["over compiled"].text for line in one.lines] == ["6.00×", "6.00×"]


def test_a_models_kernel_speed_up_is_of_one_shape(tmp_path: Path) -> None:
    """Another number of heads, on which ours is much slower, is not averaged in."""
    saved.save_all(tmp_path)
    made = saved.run()
    for heads, factor in ((6, 1.0), (16, 50.0)):
        for backend in ("torch", "cpu"):
            case = saved.case("linear_attention", backend, "forward+backward", 64)
            case["extra_info"]["shape"] |= {"H": heads, "Hk": heads}
            case["name"] += f" {heads} heads"
            saved.slow_down(case, factor if backend == "cpu" else 1.0)
            made["benchmarks"].append(case)
    saved.save(tmp_path / "run.json", json.loads(json.dumps(made)))
    parts = training_sections.training_steps(Seen(documents.load([], tmp_path)))
    (table,) = [p for p in parts if isinstance(p, Table) and p.title.startswith("From")]
    value = table.lines[0]["kernel speed-up"].value
    assert value == pytest.approx(saved.KERNEL_SPEEDUP) or value == pytest.approx(2 / 50)
