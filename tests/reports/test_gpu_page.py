"""What bench.gpu and --profile saved, on the page: all of it, and nothing that is not there."""

import re
from pathlib import Path

import pytest

from linear_vit.reports import scaling
from linear_vit.reports.__main__ import main
from linear_vit.reports.page import gpu_sections, profile_sections
from linear_vit.reports.page.kernel_sections import Extras
from linear_vit.reports.page.parts import Section, Table
from linear_vit.reports.saved import documents
from linear_vit.reports.saved.runs import load
from tests.reports import saved


def gpu_folder(folder: Path, changes: dict | None = None) -> Path:
    for name, document in saved.gpu().items():
        saved.save(folder / "card" / "gpu" / f"{name}.json", document | (changes or {}))
    return folder / "card" / "gpu"


def table(section: Section, title: str) -> Table:
    (found,) = [one for one in section.tables if one.title.startswith(title)]
    return found


def text(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row.cells] for row in table.rows]


def test_every_section_of_a_gpu_run_is_shown(tmp_path: Path) -> None:
    gpu_folder(tmp_path)
    found = documents.load([], tmp_path)
    section = gpu_sections.section(found)
    assert found.skipped == []
    assert found.checks == []  # bench.gpu's check.json is no bench.check
    assert text(table(section, "Ceilings"))[0][:2] == ["4,000 GB/s", "50 TFLOP/s"]
    ((what, *cells),) = text(table(section, "1 of 3 checks right"))
    assert (what, cells) == ("linear attention bfloat16 D=64", ["✓ 1.0e-03", "✗", "✗"])
    forward = text(table(section, "Attention, forward"))
    assert len(forward) == 3 * 4  # lengths, and contenders with the one that is absent
    # 8,192 bytes a token in 4 ns: 2,048 GB/s of 4,000.
    assert forward[0][:6] == [
        *("B1 H16 N1,024 D64", "linear attention", "triton", "4.10 µs"),
        *("2,048", "51%"),
    ]
    assert forward[3][2:4] == ["sdpa_math", "–"]
    assert text(table(section, "CUDA graphs;"))[0][4:] == ["20.0 µs", "10.0 µs", "2.00×"]
    assert text(table(section, "Training step"))[0][:4] == ["ripple", "triton", "20.0 ms", "6,400"]
    assert text(table(section, "Sizes past"))[0][1] == "out of memory"
    assert text(table(section, "CUDA graphs: a captured call"))[0][1] == "✓ right"
    assert section.notes == ["training: hydra cuda: left out: no time left"]
    assert len(section.figures) == 2
    first = section.figures[0].data["series"][0]
    assert [point["x"] for point in first["points"]] == [1024, 4096, 16_384]
    assert {one["backend"] for one in section.figures[0].data["series"]} == {
        *("triton", "torch", "sdpa_flash"),
    }


def test_a_dry_run_is_called_one(tmp_path: Path) -> None:
    gpu_folder(tmp_path, {"dry_run": True})
    section = gpu_sections.section(documents.load([], tmp_path))
    assert "its times mean nothing" in section.notes[0]
    assert all("dry run" in one.title for one in (*section.tables, *section.figures))


def test_of_two_devices_none_is_mixed_with_the_other(tmp_path: Path) -> None:
    gpu_folder(tmp_path)
    other = {"machine": saved.MACHINE | {"device": "cuda", "device_name": "Other GPU"}}
    gpu_folder(tmp_path / "other", other)
    section = gpu_sections.section(documents.load([], tmp_path))
    titles = [one.title for one in section.tables if one.title.startswith("Ceilings")]
    assert ["Test GPU" in titles[0], "Other GPU" in titles[1]] == [True, True]


@pytest.mark.parametrize("name", ["check", "sweep", "training"])
def test_a_damaged_file_is_named_and_the_rest_shown(tmp_path: Path, name: str) -> None:
    folder = gpu_folder(tmp_path)
    (folder / f"{name}.json").write_text('{"kind": "gpu", "schema": 1, "resu')
    found = documents.load([], tmp_path)
    assert {line.partition(": ")[0] for line in found.skipped} == {str(folder / f"{name}.json")}
    assert table(gpu_sections.section(found), "CUDA graphs;")


def test_a_file_that_lacks_a_figure_costs_no_other(tmp_path: Path) -> None:
    folder = gpu_folder(tmp_path)
    sweep = saved.gpu()["sweep"]
    del sweep["results"][0]["times"]["sdpa/flash"]["seconds"]
    saved.save(folder / "sweep.json", sweep)
    found = documents.load([], tmp_path)
    section = gpu_sections.section(found)
    assert found.skipped == [f"{folder / 'sweep.json'}: damaged (KeyError: 'seconds')"]
    assert table(section, "CUDA graphs;")
    assert section.figures == []


def test_another_schema_is_named_and_not_guessed_at(tmp_path: Path) -> None:
    folder = gpu_folder(tmp_path, {"schema": 2})
    found = documents.load([], tmp_path)
    assert all("of another schema" in line for line in found.skipped)
    assert str(folder / "sweep.json") in "".join(found.skipped)
    # Nothing of it is shown: what is, if anything, is the repository's.
    assert not any(saved.path.is_relative_to(tmp_path) for saved in found.gpus)


def profiled(folder: Path, **changes: object) -> Section:
    run = saved.run()
    for case in run["benchmarks"][:2]:
        case["extra_info"]["profile"] = saved.profile(case) | changes
    loaded = load([saved.save(folder / "runs" / "run.json", run)])
    return profile_sections.section(scaling.groups(loaded), Extras(loaded), folder / "pages")


def test_a_profiled_case_has_its_top_kernels(tmp_path: Path) -> None:
    (found,) = profiled(tmp_path).tables
    assert found.title.startswith("Linear attention, forward; float32, Test CPU <3 GHz>")
    assert found.note == "No counters: ncu is not installed."
    assert len(found.rows) == 2 * 2
    assert text(found)[0][:6] == ["64", "reference", "state_kernel", "75.0%", "30.0 µs", "3"]
    assert found.rows[0].cells[2].tip == "void state_kernel<64, (bool)1>(float const*)"


def test_counters_are_in_the_units_of_their_headings(tmp_path: Path) -> None:
    counted = {
        "gpu__time_duration.sum": 25_000.0,  # ns
        "dram__bytes_read.sum": 4e6,
        "launch__registers_per_thread": 96.0,
    }
    _, found = profiled(tmp_path, ncu={"state_kernel": counted}).tables
    titles = [column.title for column in found.columns]
    cells = dict(zip(titles, text(found)[0], strict=True))
    assert (cells["µs"], cells["MB read"], cells["registers"]) == ("25", "4", "96")
    assert cells["MB written"] == "–"


@pytest.mark.parametrize(
    ("name", "there", "link"),
    [
        ("profiles/a b.trace.json.gz", True, "../runs/profiles/a%20b.trace.json.gz"),
        ("profiles/gone.trace.json.gz", False, ""),
        ("javascript:alert(1)//.trace.json.gz", False, ""),
        ("../../etc/passwd", False, ""),
    ],
)
def test_a_trace_is_linked_where_it_is(tmp_path: Path, name: str, there: bool, link: str) -> None:
    if there:
        path = tmp_path / "runs" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    (found,) = profiled(tmp_path, trace=name).tables
    assert {row.cells[-1].link for row in found.rows} == {link}


@pytest.mark.parametrize(
    "profile", [{}, {"trace": 1, "top": None}, {"trace": "a", "top": [{"name": "x"}]}]
)
def test_a_damaged_profile_is_said_and_costs_no_page(tmp_path: Path, profile: dict) -> None:
    run = saved.run()
    run["benchmarks"][0]["extra_info"]["profile"] = profile
    saved.save(tmp_path / "run.json", run)
    out = tmp_path / "index.html"
    assert main(["page", "--results", str(tmp_path), "--out", str(out)]) == 0
    page = out.read_text()
    assert "Linear attention, forward; float32" in page
    assert bool(re.search(r"damaged profile", page)) is (profile != {})
