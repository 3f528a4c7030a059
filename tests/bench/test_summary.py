"""The table a benchmark run ends with."""

import re
from typing import Any

import pytest

from linear_vit.bench import summary


def row(N: int, backend: str, seconds: float, **more: Any) -> summary.Row:
    shape = {"B": 1, "H": 6, "N": N} | more.pop("shape", {})
    info = {"operation": "op", "pass": "forward", "dtype": "float32", "N": N, "backend": backend}
    info |= {"shape": shape, "relative_iqr": 0.02, "tflop_per_s": 1.0, "gb_per_s": 1.0}
    return summary.Row(info | {"share_of_limit": 0.5, "limit": "copy"} | more, seconds)


def test_cases_of_other_heads_have_a_table_of_their_own() -> None:
    one = [row(64, "a", 1.0), row(64, "b", 2.0), row(128, "a", 3.0)]
    text = summary.render(one, 120, False)
    assert text.count("op, forward, float32") == 1
    more = [row(64, "a", 0.5, shape={"H": 16}), row(64, "a", 0.25, captured=True)]
    text = summary.render([*one, *more], 120, False)
    titles = [line for line in text.splitlines() if line.startswith("op, ")]
    assert titles == [
        "op, forward, float32, B=1 H=6",
        "op, forward, float32, B=1 H=16",
        "op, forward, float32, B=1 H=6 replayed",
    ]
    assert "1.00 s" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_fits_the_screen_with_every_length_time_and_mark(width: int) -> None:
    """As on a GPU: many backends, long sequences, several dtypes."""
    backends = ["reference", "torch", "compiled", "triton", "triton (graph)", "cuda", "sdpa_flash"]
    cases = [
        row(N, backend, (3.71e-4 + 1e-6 * i) * N, dtype=dtype)
        for dtype in ("float32", "bfloat16")
        for N in (64, 16_384, 1_048_576)
        for i, backend in enumerate(backends)
    ]
    text = summary.render(cases, width, False)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for case in cases:
        mark = re.escape("*" if case.info["backend"] == "reference" else "")
        assert re.search(rf"(?<!\S){mark}{re.escape(case.time)}(?!\S)", text), case.time
    for whole in ("1,048,576", "float32", "bfloat16", *(b for b in backends if " " not in b)):
        assert whole in text


def test_what_was_disturbed_is_marked_named_and_never_the_fastest() -> None:
    why = "threads of ours waited 31 % of the time"
    cases = [row(64, "a", 1.0, disturbed=why), row(64, "b", 2.0), row(64, "c", 3.0)]
    text = summary.render(cases, 80, False)
    assert "‡1.00 s ±1%" in text
    assert "*2.00 s ±1%" in text
    assert f"‡ disturbed, so compared with nothing: op forward float32 N=64 a: {why}" in " ".join(
        text.split()
    )
    # Of a length where every case was, nothing is said to be reached.
    alone = summary.render([row(64, "a", 1.0, disturbed=why)], 80, False)
    assert "50% copy" not in alone
    assert "*1.00 s" not in alone


def test_a_disturbed_baseline_is_no_baseline() -> None:
    step = {"settings": {"dim": 64, "depth": 2, "batch_size": 8, "dataset": "digits"}}
    step |= {"dtype": "float32", "backend": "default", "relative_iqr": 0.02, "images_per_s": 8.0}
    quiet, disturbed = (
        [
            summary.Row(step | {"model": m, "model_title": m, "disturbed": why}, seconds)
            for m, seconds, why in (("baseline", 2.0, said), ("hydra", 1.0, None))
        ]
        for said in (None, "another process used the GPU")
    )
    assert "2.00×" in summary.render(quiet, 80, False)
    assert "2.00×" not in summary.render(disturbed, 80, False)
    said = " ".join(summary.render(disturbed, 80, False).split())
    assert "baseline default: another process used the GPU" in said


def test_no_share_of_a_limit_is_above_all_of_it_without_a_word() -> None:
    cases = [row(64, "a", 1.0, share_of_limit=1.5, limit="copy"), row(128, "a", 2.0)]
    text = summary.render(cases, 80, False)
    assert "§150% copy" in text
    assert "§ above the limit: its data were in a cache" in text
    assert "§50%" not in text
    said = summary.render([row(64, "a", 1.0, share_of_limit=1.5, limit_note="in L2")], 80, False)
    assert "§ in L2" in said
    unknown = row(64, "a", 1.0, share_of_limit=None, limit=None)
    assert "None" not in summary.render([unknown], 80, False)


def test_how_far_apart_two_clocks_are() -> None:
    told = ({"difference": d, "seconds": 1.0, "clock": "CUPTI"} for d in (0.01, -0.02, 0.03))
    cases = [row(64 + n, "a", 1.0, second_clock=second) for n, second in enumerate(told)]
    text = summary.render([*cases, row(32, "a", 1.0, second_clock=None)], 200, False)
    said = "(CUPTI) of 3 of the cases: events show +1.0% in the median, -2.0% to +3.0%."
    assert said in text


def test_what_the_host_takes_has_a_column_where_the_device_was_timed() -> None:
    text = summary.render([row(64, "a", 1e-5, host_s=4e-5), row(64, "b", 2e-5)], 120, False)
    assert "host*" in text
    assert "40.0 µs" in text
    assert "host" not in summary.render([row(64, "a", 1.0)], 120, False)
