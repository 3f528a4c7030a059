"""An operation and a backend that nobody here has heard of: shown in plots, tables and page."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from linear_vit.reports import claims, groups
from linear_vit.reports.__main__ import main
from linear_vit.reports.saved.runs import load
from tests.reports import saved

TITLE, COLOUR = "Fourier mixing", "#123456"


def toy_case(backend: str, mode: str, length: int) -> dict[str, Any]:
    made = saved.case("linear_attention", "torch", mode, length)
    made["name"] = f"test_kernel[fourier_mixing-{mode}-float32-N{length}-{backend}]"
    shape = {"B": 3, "length": length, "channels": 48}
    made["extra_info"] |= {"operation": "fourier_mixing", "backend": backend, "shape": shape}
    made["extra_info"] |= {"implementation": f"{backend} of a toy"}
    factor = {"torch": 1.0, "mine": 0.5}[backend]
    made["stats"] = saved.stats(1e-7 * factor * length)
    return made


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A toy operation on PyTorch and on a toy backend, which also does linear attention."""
    document = saved.run()
    document["benchmarks"] += [
        toy_case(backend, mode, 2**i)
        for backend in ("torch", "mine")
        for mode in ("forward", "forward+backward")
        for i in range(6, 13)
    ]
    for i in range(6, 13):
        case = saved.case("linear_attention", "compiled", "forward", 2**i)
        case["extra_info"]["backend"] = "mine"
        document["benchmarks"].append(case)
    suite = document["kernel_suite"]
    suite["operations"] |= {"fourier_mixing": {"title": TITLE}}
    mine = {"title": "My kernels", "colour": COLOUR, "own": True}
    suite["backends"] = suite["backends"] | {"mine": mine}
    return saved.save(tmp_path / "results" / "run.json", document)


def test_plots_and_fits(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["scaling", str(run), "--ops", "fourier-mixing", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"{TITLE}, forward, mine: time ~ N^1.00 (1.00 to 1.00)" in said
    stems = {path.stem for path in out.glob("*.svg")}
    assert stems == {
        f"fourier_mixing-{picture}-float32" for picture in ("time", "memory", "speedup-over-torch")
    }
    svg = (out / "fourier_mixing-time-float32.svg").read_text()
    assert COLOUR in svg
    assert TITLE in svg
    rows = list(csv.DictReader((out / "fourier_mixing-speedup-over-torch-float32.csv").open()))
    assert [float(row["value"]) for row in rows] == pytest.approx([2.0] * 14)


def test_its_cases_are_one_curve(run: Path) -> None:
    """Its length goes by a name of its own, and is still no setting that splits curves."""
    found = [g for g in groups.groups(load([run])) if g.family.name == "fourier_mixing"]
    assert [g.setting for g in found] == [""]
    assert set(found[0].frame["setting"]) == {"B = 3, channels = 48"}


def test_compared_with_the_others(run: Path, capsys) -> None:
    assert main(["compare", "--baseline", "torch", "--backends", "mine", str(run)]) == 0
    said = capsys.readouterr().out
    assert f"{TITLE}, forward, float32, " in said
    assert "linear attention, forward, float32, " in said
    assert said.count("geometric mean 2.00×, worst 2.00×") == 3
    assert main(["compare", str(run), str(run), "--backends", "mine"]) == 0
    assert "fourier_mixing forward float32 mine" in capsys.readouterr().out


def test_page(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "index.html"
    assert main(["page", "--results", str(run.parent), "--out", str(out)]) == 0
    html = out.read_text(encoding="utf-8")
    data = re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', html, re.S)
    assert data is not None
    page = json.loads(data.group(1))
    assert page["styles"]["mine"]["colour"] == COLOUR
    titles = [figure["title"] for figure in page["figures"]]
    for beginning in (
        f"{TITLE}: time per call, forward; float32",
        f"{TITLE}: peak memory beyond inputs and outputs, forward; float32",
        f"{TITLE}: speed-up over torch; ",
        f"Roofline: {TITLE}; float32",
    ):
        assert any(title.startswith(beginning) for title in titles), beginning
    # In the filters, in the tables, and with what it ran; attention crosses SDPA on it, too.
    assert f'<option value="fourier_mixing">{TITLE}</option>' in html
    assert '<option value="mine">mine</option>' in html
    assert f"<h3>{TITLE}, forward; float32" in html
    assert "mine: mine of a toy" in html
    heading = "<h3>Crossover: from which N linear attention beats SDPA"
    crossing = re.search(rf"{heading}.*?</table>", html, re.S)
    assert crossing is not None
    assert ">mine<" in crossing.group()


def test_what_is_compared_is_stated_once() -> None:
    """No module but the tables of claims, targets and old names knows what was measured."""
    root = Path(claims.__file__).parent
    names = {name for family in claims.FAMILIES for name in family.operations}
    names |= {"compiled", "triton"}
    # A file of counted traffic says no backend: those of old are of one.
    known = {("page/proofs.py", "triton")}
    found = set()
    for path in root.rglob("*.py"):
        file = str(path.relative_to(root))
        if file not in ("claims.py", "saved/convert.py", "targets.py"):
            quoted = set(re.findall(r'"([a-z_]+)"', path.read_text()))
            found |= {(file, name) for name in quoted & names}
    assert found - known == set()
