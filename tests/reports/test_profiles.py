"""What --profile saved, on the page: all of it, and nothing that is not there."""

import re
from pathlib import Path

import pytest

from linear_vit.reports import groups
from linear_vit.reports.__main__ import main
from linear_vit.reports.page import profile_sections
from linear_vit.reports.page.parts import Section, Seen
from linear_vit.reports.saved import documents
from linear_vit.reports.saved.runs import load
from linear_vit.reports.tables.table import Table
from tests.reports import saved


def text(table: Table) -> list[list[str]]:
    return [[cell.text for cell in line.values()] for line in table.lines]


def profiled(folder: Path, **changes: object) -> Section:
    run = saved.run()
    for case in run["benchmarks"][:2]:
        case["extra_info"]["profile"] = saved.profile(case) | changes
    loaded = load([saved.save(folder / "runs" / "run.json", run)])
    found = groups.groups(loaded)
    seen = Seen(documents.Documents(loaded), found, folder / "pages")
    return Section(list(profile_sections.section(seen)))


def test_a_profiled_case_has_its_top_kernels(tmp_path: Path) -> None:
    (found,) = profiled(tmp_path).tables
    assert found.title.startswith("Linear attention, forward; float32, Test CPU <3 GHz>")
    assert found.note == "No counters: ncu is not installed."
    assert len(found.lines) == 2 * 2
    assert text(found)[0][:6] == ["64", "reference", "state_kernel", "75.0%", "30.0 µs", "3"]
    assert (
        found.lines[0]["kernel or operator"].tip == "void state_kernel<64, (bool)1>(float const*)"
    )


def test_counters_are_in_the_units_of_their_headings(tmp_path: Path) -> None:
    counted = {
        "gpu__time_duration.sum": 25_000.0,  # ns
        "dram__bytes_read.sum": 4e6,
        "launch__registers_per_thread": 96.0,
    }
    _, found = profiled(tmp_path, ncu={"state_kernel": counted}).tables
    cells = found.lines[0]
    assert [cells[x].text for x in ("µs", "MB read", "registers")] == ["25", "4", "96"]
    assert cells["MB written"].text == "–"


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
    assert {line["trace"].link for line in found.lines} == {link}


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
