"""The commands on saved runs: what they write, what they skip, and what they say."""

import csv
import hashlib
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from linear_vit.reports import plots
from linear_vit.reports.__main__ import main
from linear_vit.reports.groups import groups, pictures
from linear_vit.reports.page import training_sections
from linear_vit.reports.page.parts import Seen
from linear_vit.reports.saved import documents
from linear_vit.reports.saved.runs import NoRuns, Words, load
from linear_vit.reports.styles import page_style, style
from linear_vit.reports.tables.table import Cell, Table
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


def test_a_plots_legend_hides_no_bar(tmp_path: Path) -> None:
    """One round in four took a hundred times as long: the bar ends at the panel's upper edge."""
    run = saved.run()
    for case in run["benchmarks"][:14]:
        case["stats"]["q3"] *= 100
    (group, *_) = groups(load([saved.save(tmp_path / "run.json", run)]))
    ((picture, frame), *_) = pictures(group)
    figure = plots.draw(group, picture, frame, group.passes)
    figure.canvas.draw()
    for axis in figure.axes:
        legend = axis.get_legend()
        assert legend is not None
        assert legend.get_window_extent().y1 <= axis.get_window_extent().y0
        assert legend.get_window_extent().y0 >= 0
        assert axis.get_ylim()[1] >= frame["q3_s"].max()


def test_options_narrow_what_is_drawn(tmp_path: Path) -> None:
    run = saved.save(tmp_path / "run.json", saved.run())
    out = tmp_path / "out"
    arguments = ["scaling", str(run), "--op", "ripple_pool", "--dtype", "float32", "--out"]
    assert main([*arguments, str(out)]) == 0
    assert {path.name.partition("-")[0] for path in out.glob("*.png")} == {"ripple"}


@pytest.mark.parametrize("option", ["--op", "--dtypes", "--backends"])
def test_unknown_choice_lists_those_there_are(tmp_path: Path, capsys, option: str) -> None:
    run = saved.save(tmp_path / "run.json", saved.run())
    assert main(["scaling", str(run), option, "nope", "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.splitlines()[-1].startswith(option if option != "--op" else "--ops")
    assert "'nope'" in message
    assert {"--op": "linear_attention", "--dtypes": "float32", "--backends": "torch"}[
        option
    ] in message


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
    field = "benchmarks[0].stats.median: missing"
    assert f"{field} (and 3 more) (1 case left out)" in named["good.json"]
    assert "benchmarks[0].extra_info.schema: should be 2, not 99" in named["newer.json"]
    assert "benchmarks[0].extra_info.schema: missing" in named["other-suite.json"]
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
    from linear_vit.reports.saved.runs import DEFAULT_OUT, default_paths, measured

    monkeypatch.chdir(tmp_path)
    assert default_paths() == measured() != []
    saved.save(DEFAULT_OUT / "check.json", saved.check())
    saved.save(DEFAULT_OUT / "old.json", saved.run("2030-01-01T00:00:00+00:00"))
    new = saved.save(DEFAULT_OUT / "new.json", saved.run("2031-01-01T00:00:00+00:00"))
    (DEFAULT_OUT / "broken.json").write_text("{")
    assert [path.resolve() for path in default_paths()] == [new.resolve()]


def test_the_repositorys_numbers_are_not_taken_for_ones_own(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    """Bare commands show them, say whose they are, and leave reports/out/scaling alone."""
    monkeypatch.chdir(tmp_path)
    arguments = ["scaling", "--ops", "ripple-pool"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "no run in reports/out: these are the repository's own measurements" in shown.err
    assert shown.out.rstrip().endswith(" files in reports/out/repository")
    assert [path.name for path in Path("reports/out").iterdir()] == ["repository"]
    assert documents.load([], Path("reports/out")).of_repository
    saved.save(Path("reports/out/benchmark.json"), saved.run())
    assert main(arguments) == 0
    assert capsys.readouterr().out.rstrip().endswith(" files in reports/out/scaling")
    assert not documents.load([], Path("reports/out")).of_repository


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
        self.tips = ""
        self.data = ""
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._inside = f"{tag} {given.get('id', '')}".strip()
        for name, value in attrs:
            if name in ("src", "srcset", "data") or (name == "href" and tag != "a"):
                self.loads.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            if name == "data-tip":
                self.tips += f"{value}\n"

    def handle_data(self, data: str) -> None:
        if self._inside == "script data":
            self.data += data
        elif self._inside.partition(" ")[0] not in ("script", "style"):
            self.text += data


def _page(html: str) -> _Loads:
    page = _Loads()
    page.feed(html)
    # Where a line is not broken.
    page.text = page.text.replace("\u00a0", " ").replace("\u2060", "")
    return page


def test_page_is_self_contained_and_complete(tmp_path: Path) -> None:
    saved.save_all(tmp_path)
    out = tmp_path / "pages" / "index.html"
    assert main(["page", "--results", str(tmp_path), "--out", str(out)]) == 0
    html = out.read_text(encoding="utf-8")
    assert len(html.encode()) < 3_000_000
    page = _page(html)
    # The empty icon keeps browsers from asking for one.
    assert page.loads == ["data:,"]
    assert "default-src 'none'" in html
    assert not re.search(r"@import|url\(", html[: html.index("</style>")])
    assert len(page.ids) == len(set(page.ids))
    figures = json.loads(page.data)["figures"]
    kinds = Counter(figure["kind"] for figure in figures)
    # 7 pictures less the speed-up over torch, of 2 passes each, with 2 rooflines; of the C++: time,
    # speed-up over softmax and 2 rooflines; on a GPU: time and memory of 2 passes, a roofline.
    assert kinds == {"curves": 12 + 4 + 5, "heat": 4, "intervals": 1, "bars": 1}
    assert html.count("<figure") == len(figures)
    for text in (
        "95.5 ± 0.4 %",
        "97.2 ± 0.4 %",
        "+1.8 ± 0.4",
        "not run",
        "85.3 %",
        "2.1×",
        "12.5 s, 1.60× [1.44 – 1.76], reached in 2 of 3",
        "O(N), measured N^1.02 (0.90 to 1.10)",
        "no claim",
        "the softmax core is 2.7% of a layer",
        "best 2 by validation accuracy (93.0 ± 0.4 %); claimed: 3.",
        "✗ failed",
        "✓ 3.0e-07 (interpreter)",
        "cuda: no device",
        f"Not timed in {tmp_path}/run.json: backend cuda: no CUDA device here",
        f"Failed in {tmp_path}/run.json: linear_attention-forward-float32-N64-odd: wrong result",
        "2 of 3",
        "1.50×",
        "3 kernels compiled, 1 at fault; triton 3.8.0",
        "linear_attention: state",
        "96 – 168",
        "D=128 float32: spills 24 bytes",
        "262,144",
        "2.00",
        "+1.2%",
        "Test CPU <3 GHz>",
        "Of 28 cases over torch: faster in 14 and slower in 14.",
        "Linear attention of 4,096 tokens takes 1.64 ms at best (compiled, 2.0× as fast as torch)",
        "The attention core takes 25% of a step of Hydra",
        "Limits measured 2030-01-01 22:04 UTC.",
        "Linear attention of 16,384 tokens takes 65.5 µs at best (triton, 4.0× as fast as torch)",
        "Linear attention of 32,768 tokens takes 3.28 ms with cpu, which no other backend was "
        "timed beside, growing as N^1.00",
        f"{tmp_path}/test-gpu/benchmark.json: sdpa_math N=1024 and 1 more: out of memory.",
    ):
        assert text in page.text, text
    for text in (
        "no record of it",
        "not usable here: no device",
        "ran: aten::bmm, aten::relu",
        "clock mhz: 1900 / 1980 / 1985",
        "hot cache",
        "to 95 % validation accuracy, reached by 2 of 3 seeds",
    ):
        assert text in page.tips, text


def test_equal_files_make_an_equal_page(tmp_path: Path) -> None:
    saved.save_all(tmp_path)
    pages = []
    for name in ("one.html", "two.html"):
        main(["page", "--results", str(tmp_path), "--out", str(tmp_path / name)])
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_a_page_too_large_leaves_out_details_of_cases(tmp_path: Path, monkeypatch) -> None:
    from linear_vit.reports.page import page

    saved.save(tmp_path / "run.json", saved.run())
    monkeypatch.setattr(page, "_MOST_BYTES", 600_000)
    out = tmp_path / "index.html"
    page.write([], tmp_path, out)
    made = _page(out.read_text(encoding="utf-8"))
    assert "to keep this page under 3 MB" in made.text
    assert "aten::bmm" not in made.tips
    assert "0.0512 ms (quartiles" in made.tips


def test_a_peer_of_another_function_is_marked(tmp_path: Path) -> None:
    run = saved.run()
    peer = saved.case("linear_attention", "torch", "forward", 64)
    peer["extra_info"] |= {"backend": "a peer", "other_function": "a one-sided ReLU"}
    run["benchmarks"].append(peer)
    saved.save(tmp_path / "run.json", run)
    out = tmp_path / "index.html"
    assert main(["page", "--results", str(tmp_path), "--out", str(out)]) == 0
    text = _page(out.read_text(encoding="utf-8")).text
    assert "a peer computes another function: a one-sided ReLU" in text


def joined(folder: Path) -> dict[str, Cell]:
    """The line from kernel to model, by column."""
    parts = training_sections.training_steps(Seen(documents.load([], folder)))
    (table,) = [p for p in parts if isinstance(p, Table) and p.title.startswith("From")]
    return table.lines[0]


def test_kernel_and_step_speed_meet_in_one_line(tmp_path: Path) -> None:
    saved.save_all(tmp_path)
    run = saved.run()
    run["benchmarks"] += [
        saved.case("linear_attention", "cpu", "forward+backward", 2**i) for i in range(6, 13)
    ]
    saved.save(tmp_path / "run.json", run)
    breakdown = saved.step_breakdown()
    k, s = saved.KERNEL_SPEEDUP, saved.ATTENTION_SHARE
    predicted = 1 / (1 - s + s / k)
    cells = joined(tmp_path)
    assert cells["kernel speed-up"].value == pytest.approx(k)
    assert cells["share of the step"].value == pytest.approx(s)
    assert cells["step, predicted"].value == pytest.approx(predicted)
    assert cells["step, measured"].value == pytest.approx(saved.STEP_SPEEDUP)

    # Measured with own kernels, attention is a smaller share of a shorter step.
    breakdown["setting"] = breakdown["setting"] | {"backend": None}
    own = (s / k) / (1 - s + s / k)
    breakdown["rows"][0]["shares"]["attention"] = own
    saved.save(tmp_path / "training" / "step-breakdown.json", breakdown)
    cells = joined(tmp_path)
    assert cells["share of the step"].value == pytest.approx(s)
    assert cells["step, predicted"].value == pytest.approx(predicted)

    # Of another machine it says nothing of this one's step.
    breakdown["environment"] = breakdown["environment"] | {"threads": 1}
    saved.save(tmp_path / "training" / "step-breakdown.json", breakdown)
    assert joined(tmp_path)["share of the step"].value is None


def test_page_names_damaged_documents_and_shows_the_rest(tmp_path: Path) -> None:
    saved.save_all(tmp_path)
    lacking = saved.step_breakdown()
    del lacking["rows"][0]["shares"]["attention"]
    saved.save(tmp_path / "training" / "step-breakdown.json", lacking)
    saved.save(tmp_path / "training" / "table.json", saved.table() | {"schema": "another/9"})
    saved.save(tmp_path / "static.json", {"kind": "static", "schema": 1, "rows": [{}]})
    (tmp_path / "cpu.json").write_text("{")
    (tmp_path / "check.json").write_text('{"kind": "check", ')
    out = tmp_path / "index.html"
    assert main(["page", "--results", str(tmp_path), "--out", str(out)]) == 0
    page = _page(out.read_text(encoding="utf-8"))
    for name in ("training/step-breakdown", "training/table", "static", "cpu", "check"):
        assert f"Skipped {tmp_path / f'{name}.json'}: " in page.text, name
    assert "Fitted exponents" in page.text
    assert "tensors counted" in page.text


def test_strings_from_files_stay_text(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028"
    run = saved.run()
    run["kernel_suite"]["machine"] = saved.MACHINE | {"cpu": hostile}
    for benchmark in run["benchmarks"]:
        info = benchmark["extra_info"]
        info["implementation"] = hostile
    saved.save(tmp_path / "run.json", run)
    out = tmp_path / "index.html"
    assert main(["page", "--results", str(tmp_path), "--out", str(out)]) == 0
    html = out.read_text(encoding="utf-8")
    assert "<img" not in html
    # The data, the library's two files and the page's own script.
    assert html.count("<script") == html.count("</script") == 4
    page = _page(html)
    assert hostile.removesuffix("\u2028") in page.text
    assert all(hostile in figure["title"] for figure in json.loads(page.data)["figures"])


def test_page_without_data_says_which_commands_make_it(tmp_path: Path, monkeypatch) -> None:
    from linear_vit.reports.saved import runs

    monkeypatch.setattr(runs, "MEASUREMENTS", tmp_path)
    (tmp_path / "check.json").write_text("{damaged")
    out = tmp_path / "index.html"
    assert main(["page", "--results", str(tmp_path), "--out", str(out)]) == 0
    page = _page(out.read_text(encoding="utf-8"))
    for command in (
        "pytest --benchmark-only --benchmark-json=reports/out/benchmark.json",
        "python -m bench check --json reports/out/check.json",
        "python train_minimal.py table",
        "python train_minimal.py profile --backend torch",
        "python -m bench static --json reports/out/static.json",
        "python -m bench traffic --json reports/out/traffic.json",
    ):
        assert command in page.text
    assert page.text.count(f"Skipped {tmp_path / 'check.json'}") == 1


def test_library_files_are_those_that_are_named() -> None:
    folder = Path(documents.__file__).parents[1] / "page" / "vendor"
    text = (folder / "README.md").read_text(encoding="utf-8")
    for path in folder.glob("*.js"):
        assert f"`{path.name}`" in text
        assert hashlib.sha256(path.read_bytes()).hexdigest() in text, f"{path.name} was changed"


WORDS = Words(backends=saved.BACKENDS)


def test_backends_keep_their_colour_and_markers() -> None:
    names = tuple(saved.BACKENDS)
    assert len({style(name, WORDS)[0] for name in names}) == len(names)
    assert len({style(name, WORDS)[1] for name in names}) == len(names)
    assert style("a peer", WORDS) == style("a peer", Words())
    # One that a run gives a colour to has it, with a marker that none of the palette has.
    own = Words(backends={"mine": {"title": "Mine", "colour": "#123456", "own": True}})
    colour, marker = style("mine", own)
    assert colour == "#123456"
    assert marker not in {style(name, WORDS)[1] for name in names}


def test_page_draws_a_backend_as_the_papers_plots_do() -> None:
    for name in saved.BACKENDS:
        assert page_style(name, WORDS)["colour"] == style(name, WORDS)[0]
    assert len({page_style(name, WORDS)["symbol"] for name in saved.BACKENDS}) == 4


@pytest.mark.parametrize(
    ("kernels", "roof"),
    [
        ({"bfloat16": "brg:avx512_amx"}, "matmul on the matrix unit (AMX), brg:avx512_amx"),
        ({"bfloat16": "brg:avx512_bf16"}, "matmul on vectors, brg:avx512_bf16"),
        ({"float32": "brg:avx512_amx"}, "matmul"),
    ],
)
def test_a_roof_says_what_multiplied(kernels: dict[str, str], roof: str, tmp_path: Path) -> None:
    made = saved.run()
    made["benchmarks"] = [
        saved.case("linear_attention", "torch", "forward", tokens, "bfloat16")
        for tokens in (64, 128)
    ]
    limits = made["kernel_suite"]["limits"]
    limits |= {"matmul_flop_per_s": {"bfloat16": 1e12}, "matmul_kernels": kernels}
    saved.save(tmp_path / "run.json", made)
    out = tmp_path / "index.html"
    assert main(["page", "--results", str(tmp_path), "--out", str(out)]) == 0
    figures = json.loads(_page(out.read_text(encoding="utf-8")).data)["figures"]
    (figure,) = (f for f in figures if f["title"].startswith("Roofline: "))
    assert [line["label"] for line in figure["lines"]][1] == f"{roof}, 1,000 GFLOP/s"
