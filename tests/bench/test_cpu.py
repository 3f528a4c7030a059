"""bench.cpu's rows: kept in a file in pieces, of one machine, and judged against the targets."""

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from linear_vit.bench import cpu

MACHINE = {"cpu": "a", "threads": 2, "torch": "2", "kernels": "AVX-512"}


def row(n: int, ratio: float, over_matmul: float = 2.0) -> dict[str, Any]:
    table = "Linear attention, forward, float32"
    return {"name": f"N = {n}", "table": table, "tokens": n, "against": "compiled"} | {
        "ratio": ratio,
        "over_matmul": over_matmul,
        "over_softmax": None,
    }


def test_a_row_measured_again_replaces_the_one_before() -> None:
    rows = cpu.merged([row(64, 1.0), row(256, 2.0)], [row(64, 3.0), row(1024, 4.0)])
    assert [(r["tokens"], r["ratio"]) for r in rows] == [(64, 3.0), (256, 2.0), (1024, 4.0)]


def test_rows_of_another_machine_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    assert cpu.earlier_rows(path, MACHINE) == []
    cpu.save(path, {"kind": cpu.KIND, "machine": MACHINE, "rows": [row(64, 1.0)]})
    assert cpu.earlier_rows(path, MACHINE) == [row(64, 1.0)]
    with pytest.raises(ValueError, match="was measured with threads 2, this is 8: choose another"):
        cpu.earlier_rows(path, MACHINE | {"threads": 8})
    with pytest.raises(ValueError, match="was measured with memory None, this is 'kept': choose"):
        cpu.earlier_rows(path, MACHINE | {"memory": cpu.KEPT})
    path.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=r"is not a file of bench\.cpu"):
        cpu.earlier_rows(path, MACHINE)


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [((5.1, 5.1), "yes"), ((20.0, 2.9), "**no**"), ((4.9, 4.9), "**no**")],
)
def test_both_the_mean_and_the_worst_have_to_meet_a_target(
    ratios: tuple[float, float], verdict: str
) -> None:
    rows = [row(64, ratios[0]), row(256, ratios[1])]
    line = next(x for x in cpu.targets_met(rows) if x.startswith("| forward, float32, over comp"))
    assert line.endswith(f"| {verdict} |")


def test_lengths_that_are_no_target_do_not_count() -> None:
    lines = cpu.targets_met([row(64, 5.0), row(128, 0.1), row(1024, 5.0, over_matmul=1.6)])
    assert "mean 5.00×, worst 5.00×" in lines[2]
    assert "mean 1.60×, worst 1.60×" in lines[3]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="--keep-memory sets glibc's malloc")
def test_memory_that_is_kept_is_not_cleared_again() -> None:
    """Page faults of the last of ten tensors of 64 MB, one after the other, in another process.

    The last, since glibc places a few first ones behind one another: an aligned block takes a
    little more room than the free one that it has left.
    """
    source = (
        "import resource, sys, torch\n"
        "from bench import cpu\n"
        "if 'keep' in sys.argv: cpu.keep_freed_memory()\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(10):\n"
        "    before = faults()\n"
        "    torch.ones(1 << 24)\n"
        "    of_one = faults() - before\n"
        "print(of_one)\n"
    )

    def faults(*arguments: str) -> int:
        command = [sys.executable, "-c", source, *arguments]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert 2 * faults("keep") + 20 < faults()  # of 4 KB or 2 MB each
