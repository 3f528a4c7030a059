"""Tables of a terminal: they fit any width, and every cell can be read off them whole."""

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
