"""The table a benchmark run ends with."""

from typing import Any

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
