"""What the commands print of the repository's own records: whole on any screen."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from linear_vit.bench import check, traffic
from linear_vit.bench.static import table as static

MEASUREMENTS = Path(__file__).parents[2] / "reports" / "measurements"
TABLES: dict[str, tuple[str, str, Callable[[list[Any]], str], list[str]]] = {
    "check": ("*/check.json", "results", check.matrix, ["linear_attention_state", "bfloat16"]),
    "static": ("static/static-triton.json", "rows", static.render, ["_feature_outer", "169–255"]),
    "static --all": (
        "static/static-cuda.json",
        "rows",
        lambda rows: static.render(rows[:60], every=True),
        ["sm_80", "float16"],
    ),
    "traffic": (
        "static/traffic.json",
        "rows",
        lambda rows: traffic.render(rows[:40]),
        ["linear_attention", "workspace", "32,768"],
    ),
}


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("command", TABLES)
def test_tables_fit(monkeypatch: pytest.MonkeyPatch, command: str, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    pattern, key, render, words = TABLES[command]
    (path,) = MEASUREMENTS.glob(pattern)
    text = render(json.loads(path.read_text())[key])
    # Below the tables stand sentences, a line each.
    *tables, _ = text.rpartition("─\n")
    shown = "".join(tables)
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in text
    for word in words:
        assert word in text
