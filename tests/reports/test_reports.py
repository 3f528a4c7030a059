"""The commands on saved runs: what they write, what they skip, and what they say."""

import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from reports.__main__ import main
from reports.runs import NoRuns, load
from tests.reports import saved


def test_scaling_writes_every_picture_in_three_formats(tmp_path: Path, capsys) -> None:
    run = saved.save(tmp_path / "run.json", saved.run())
    out = tmp_path / "out"
    assert main(["scaling", str(run), "--out", str(out)]) == 0
    stems = {path.stem for path in out.iterdir()} - {"exponents", "crossovers"}
    assert stems == {
        "attention-time-float32",
        "attention-memory-float32",
        "attention-speedup-over-softmax-float32",
        "attention-speedup-over-torch-float32",
        "ripple-time-float32",
        "ripple-memory-float32",
        "ripple-speedup-over-torch-float32",
    }
    for stem in stems:
        assert (out / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (out / f"{stem}.svg").read_text()
        assert len((out / f"{stem}.csv").read_text().splitlines()) > 10

    exponents = list(csv.DictReader((out / "exponents.csv").open()))
    assert len(exponents) == 18
    for row in exponents:
        truth = 2.0 if row["operation"] == "softmax_attention" else 1.0
        assert float(row["exponent"]) == pytest.approx(truth, abs=0.02), row
    crossovers = {
        (row["backend"], row["pass"]): row
        for row in csv.DictReader((out / "crossovers.csv").open())
    }
    # torch's softmax against torch's linear attention cross at N = 400 by construction; a backend
    # twice as fast at half of it.
    assert float(crossovers["torch", "forward"]["estimate"]) == pytest.approx(400, rel=0.02)
    fast = crossovers["compiled", "forward+backward"]
    assert float(fast["low"]) <= 200 <= float(fast["high"])
    assert "crossover" in capsys.readouterr().out


def test_options_narrow_what_is_drawn(tmp_path: Path) -> None:
    run = saved.save(tmp_path / "run.json", saved.run())
    out = tmp_path / "out"
    arguments = ["scaling", str(run), "--op", "ripple_pool", "--dtype", "float32", "--out"]
    assert main([*arguments, str(out)]) == 0
    assert {path.name.partition("-")[0] for path in out.glob("*.png")} == {"ripple"}


@pytest.mark.parametrize("option", ["--op", "--dtype"])
def test_unknown_choice_lists_those_there_are(tmp_path: Path, capsys, option: str) -> None:
    run = saved.save(tmp_path / "run.json", saved.run())
    assert main(["scaling", str(run), option, "nope", "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "'nope'" in message
    assert ("linear_attention" if option == "--op" else "float32") in message


def test_damaged_and_foreign_files_are_named_and_left_out(tmp_path: Path, capsys) -> None:
    good = saved.run()
    good["benchmarks"][0]["stats"] = {}
    saved.save(tmp_path / "good.json", good)
    saved.save(tmp_path / "foreign.json", {"hello": 1})
    saved.save(tmp_path / "list.json", [1, 2])
    other = saved.run()
    for benchmark in other["benchmarks"]:
        benchmark["extra_info"] = {}
    saved.save(tmp_path / "other-suite.json", other)
    newer = saved.run()
    for benchmark in newer["benchmarks"]:
        benchmark["extra_info"]["schema"] = 99
    saved.save(tmp_path / "newer.json", newer)
    (tmp_path / "truncated.json").write_text('{"benchmarks": [')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x80")
    saved.save(tmp_path / "check.json", saved.check())

    loaded = load([tmp_path])
    named = {Path(line.partition(": ")[0]).name: line for line in loaded.skipped}
    assert set(named) == {
        "good.json",
        "foreign.json",
        "list.json",
        "other-suite.json",
        "newer.json",
        "truncated.json",
        "binary.json",
    }
    assert "1 damaged cases" in named["good.json"]
    assert "schema version 99" in named["newer.json"]
    assert "another suite" in named["other-suite.json"]
    assert "no valid JSON" in named["truncated.json"]
    assert len(loaded.kernels) + len(loaded.training) == len(good["benchmarks"]) - 1
    out = str(tmp_path / "out")
    assert main(["scaling", str(tmp_path), "--op", "ripple_pool", "--out", out]) == 0
    assert "skipped " in capsys.readouterr().err


def test_newest_measurement_of_a_case_counts(tmp_path: Path) -> None:
    old = saved.save(tmp_path / "b.json", saved.run("2030-01-01T00:00:00+00:00"))
    newer = saved.run("2030-06-01T00:00:00+00:00")
    newer["benchmarks"] = newer["benchmarks"][:1]
    newer["benchmarks"][0]["stats"]["median"] = 123.0
    loaded = load([saved.save(tmp_path / "a.json", newer), old])
    assert len(loaded.kernels) == len(saved.run()["benchmarks"]) - 2
    assert (loaded.kernels["median_s"] == 123.0).sum() == 1


def test_without_runs_it_says_what_makes_one(tmp_path: Path, capsys) -> None:
    assert main(["scaling", str(tmp_path)]) == 2
    assert "pytest --benchmark-only --benchmark-json=" in capsys.readouterr().err
    assert main(["scaling", str(tmp_path / "absent.json")]) == 2
    assert "absent.json: there is no such file" in capsys.readouterr().err
    with pytest.raises(NoRuns):
        load([tmp_path])


def test_default_input_is_the_newest_run_of_the_folder(tmp_path: Path, monkeypatch) -> None:
    from reports.runs import DEFAULT_OUT, MEASUREMENTS, default_paths

    monkeypatch.chdir(tmp_path)
    assert default_paths() == [MEASUREMENTS]
    saved.save(DEFAULT_OUT / "check.json", saved.check())
    saved.save(DEFAULT_OUT / "old.json", saved.run("2030-01-01T00:00:00+00:00"))
    new = saved.save(DEFAULT_OUT / "new.json", saved.run("2031-01-01T00:00:00+00:00"))
    (DEFAULT_OUT / "broken.json").write_text("{")
    assert [path.resolve() for path in default_paths()] == [new.resolve()]


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["scaling", "--nonsense"]])
def test_wrong_turns_show_the_usage(arguments: list[str], capsys) -> None:
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert "usage: python -m reports" in capsys.readouterr().err


class _Loads(HTMLParser):
    """Collects what a browser would fetch, ids, and the visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "srcset", "data") or (name == "href" and tag != "a"):
                self.loads.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_self_contained_and_complete(tmp_path: Path) -> None:
    saved.save(tmp_path / "run.json", saved.run())
    saved.save(tmp_path / "check.json", saved.check())
    saved.save(tmp_path / "training" / "table.json", saved.table())
    saved.save(tmp_path / "static.json", saved.static())
    saved.save(tmp_path / "traffic.json", saved.traffic())
    out = tmp_path / "pages" / "index.html"
    assert main(["page", "--results", str(tmp_path), "--out", str(out)]) == 0
    html = out.read_text(encoding="utf-8")
    assert len(html.encode()) < 3_000_000
    page = _Loads()
    page.feed(html)
    # References within the page, and the empty icon that keeps browsers from asking for one.
    assert {u for u in page.loads if not u.startswith("#")} == {"data:,"}
    assert {u[1:] for u in page.loads if u.startswith("#")} <= set(page.ids)
    assert not re.search(r"@import|url\((?!#)|<script", html)
    assert len(page.ids) == len(set(page.ids))
    assert html.count("<svg") == 14  # 7 pictures, 2 passes
    for text in (
        "95.5 % ± 0.4",
        "97.2 % ± 0.4",
        "not run",
        "85.3 %",
        "2.1×",
        "✗ failed",
        "✓ 3.0e-07 (interpreter)",
        "cuda: no device",
        "Not timed: backend cuda: no CUDA device here",
        "Failed: linear_attention-forward-float32-N64-odd: wrong result: out",
        "2 of 3",
        "1.50×",
        "3 kernels compiled, 1 at fault",
        "linear_attention: state",
        "96 – 168",
        "D=128 float32: spills 24 bytes",
        "262,144",
        "2.00",
        "+1.2%",
        "Test CPU <3 GHz>",
    ):
        assert text in page.text, text


def test_page_without_data_says_which_commands_make_it(tmp_path: Path, monkeypatch) -> None:
    from reports import runs

    monkeypatch.setattr(runs, "MEASUREMENTS", tmp_path)
    (tmp_path / "check.json").write_text("{damaged")
    out = tmp_path / "index.html"
    assert main(["page", "--results", str(tmp_path), "--out", str(out)]) == 0
    page = _Loads()
    page.feed(out.read_text(encoding="utf-8"))
    for command in (
        "pytest --benchmark-only --benchmark-json=reports/out/benchmark.json",
        "python -m bench.check --json reports/out/check.json",
        "python train_minimal.py table",
        "python -m bench.static --json reports/out/static.json",
        "python -m bench.traffic --json reports/out/traffic.json",
    ):
        assert command in page.text
    assert f"Skipped {tmp_path / 'check.json'}" in page.text


def test_backends_keep_their_colour_and_markers() -> None:
    from reports.plots import style

    names = ("reference", "torch", "compiled", "triton", "cuda", "cpu")
    assert len({style(name)[0] for name in names}) == len(names)
    assert len({style(name)[1] for name in names}) == len(names)
    assert style("a peer") == style("a peer")
