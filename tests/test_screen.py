"""What a terminal shows: it fits any width, and every cell can be read off whole."""

import contextlib
import io
import os
import re

import pytest

from linear_vit import screen

COLUMNS = ["N", "reference", "torch", "compiled", "cpu", "triton (graph)", "GFLOP/s*", "of limit*"]
ROWS = [
    ["64", "1.23 ms ±3%", "*371 µs ±3%", "–", "1.00 s ±12%", "128 ns ±1%", "1,234", "7% copy"],
    ["16,384", "–", "99.9 ms ±0%", "2.00 s ±4%", "*12.3 ms ±5%", "–", "98.7", "100% matmul"],
]


def cells(text: str) -> str:
    """All that stands in a table, without spaces and rules."""
    return re.sub(r"[\s─]", "", text)


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120, 200])
def test_a_table_fits_and_nothing_is_cut(width: int) -> None:
    text = screen.draw(COLUMNS, ROWS, at_most=width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    # A time stays on one line, with its unit, its spread and its mark.
    for cell in (cell for row in ROWS for cell in row[:-1]):
        assert re.search(rf"(?<!\S){re.escape(cell)}(?!\S)", text), cell
    # Whatever block a figure is in, its length stands in its row.
    for line in text.splitlines():
        if "371 µs" in line:
            assert line.split()[0] == "64"
        if "12.3 ms" in line:
            assert line.split()[0] == "16,384"


def test_wide_enough_is_one_line_a_row() -> None:
    lines = screen.draw(COLUMNS, ROWS, at_most=200).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert lines[0].split("  ")[-1] == "of limit*"
    # Numbers end where their column ends.
    time = "*371 µs ±3%"
    assert lines[2].index(time) + len(time) == lines[0].index("torch") + len("torch")


@pytest.mark.parametrize("width", [24, 40, 60])
def test_words_fold_between_words_and_intervals_stay_whole(width: int) -> None:
    rows = [["Baseline ViT + local branch", "0.89× [0.88 – 0.90]", "no fit: the exponent is any"]]
    text = screen.draw(["Model", "Speed-up", "p"], rows, words=[True, False, True], at_most=width)
    assert max(map(len, text.splitlines())) <= width
    for whole in ("Baseline", "branch", "[0.88 – 0.90]", "0.89×", "exponent"):
        assert whole in text
    assert sorted(cells(text).replace("Model", "")) == sorted(
        cells("".join(rows[0]) + "Speed-up" + "p") + cells(rows[0][0]) * (text.count("Model") - 1)
    )


def test_rows_are_numbered_where_their_names_are_too_wide_for_every_block() -> None:
    columns = ["operation", "pass", "loaded", "stored"]
    rows = [["linear_attention", "forward", "262,144", "1"], ["ripple_pool", "forward", "9", "3"]]
    text = screen.draw(columns, rows, words=[True, True], keys=2, at_most=28)
    assert max(map(len, text.splitlines())) <= 28
    at = {line.split()[0]: line for line in text.splitlines() if "262,144" in line}
    assert list(at) == ["1"]
    assert "linear_attention" in text


def test_a_pass_may_fold_behind_its_sign() -> None:
    text = screen.draw(["pass", "p"], [["forward+backward", "1.00"]], at_most=16)
    assert text.splitlines()[2].split() == ["forward+", "1.00"]
    assert text.splitlines()[3].split() == ["backward"]


def test_the_width_is_that_of_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "57")
    assert screen.width() == 57
    text = screen.draw(COLUMNS, ROWS)
    assert 40 < max(map(len, text.splitlines())) <= 57


def test_a_table_without_rows_is_its_head() -> None:
    assert screen.draw(["N", "time"], [], at_most=40).splitlines() == ["N  time", "─  ────"]


def test_short_cells_fold_last() -> None:
    """Rather a block below than a figure on two lines."""
    columns = ["operation", *"abcdef"]
    rows = [["linear_attention_state", *["ok 3e-07"] * 6]]
    text = screen.draw(columns, rows, at_most=50)
    assert text.count("ok 3e-07") == 6


LINES = """\
undecided  linear_attention forward float32 compiled                  9 cases together  1.000× (0.96 to 1.04)
  N =        64   93.6 ms against   514 ms    6.84× (its rounds were not kept)
FAIL          forward, float32, N ≥ 1,024, over the matmul's rate: mean 0.74×, worst 0.72×
note: one run a side does not show the luck of a process; several do (--with)
"""  # noqa: E501


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_lines_are_folded_between_words(width: int) -> None:
    text = screen.folded(LINES, width)
    assert max(map(len, text.splitlines())) <= width
    assert text.split() == LINES.split()
    for whole in ("1,024", "93.6 ms", "514 ms", "9 cases"):
        assert whole in text
    # What goes on is indented, so that each line's begin is seen.
    begins = [line for line in text.splitlines() if not line.startswith("    ")]
    assert len(begins) == 4


def test_a_line_is_folded_at_its_gaps_below_its_first_one() -> None:
    assert screen.folded(LINES, 75).splitlines()[:2] == [
        "undecided  linear_attention forward float32 compiled  9 cases together",
        "           1.000× (0.96 to 1.04)",
    ]
    assert screen.folded(LINES, 0) == LINES.rstrip()
    assert screen.folded("", 40) == ""


def test_what_is_counted() -> None:
    assert [screen.counted(n, "case") for n in (0, 1, 2000)] == ["0 cases", "1 case", "2,000 cases"]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_command_that_nobody_reads_on_ends_quietly(stream: str) -> None:
    """As in ``python -m reports targets RUN | head -1``."""
    read, write = os.pipe()
    redirect = getattr(contextlib, f"redirect_{stream}")
    os.close(read)
    by_line = stream == "stderr"
    with io.TextIOWrapper(os.fdopen(write, "wb"), line_buffering=by_line) as pipe, redirect(pipe):

        @screen.command
        def main(text: str) -> int:
            print(text, file=pipe)
            return 0

        assert main("small: it is noticed at the end") == 141
        assert main("here nobody is told of") == 0  # now it goes nowhere
    with redirect(io.StringIO()):

        @screen.command
        def stopped() -> int:
            raise KeyboardInterrupt

        assert stopped() == 130

        @screen.command
        def broken() -> int:
            raise BrokenPipeError("of a process of ours")

        with pytest.raises(BrokenPipeError):
            broken()
