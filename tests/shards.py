"""The slow tests in parts of equal length, by how long each took when it was last recorded.

To record anew:

    make test-slow RECORD=seconds.tsv
    python -m tests.shards seconds.tsv
"""

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

RECORD = Path(__file__).with_name("slow_seconds.json")
UNKNOWN_S = 10.0


def load() -> dict[str, float]:
    """Seconds of a processor by test function, ``file::name``; a test that takes much longer than
    others of its function (its first, which builds for all) has a row of its own."""
    seconds: dict[str, float] = json.loads(RECORD.read_text())
    return seconds


def weight(test: str, seconds: Mapping[str, float]) -> float:
    """What the test was recorded with; a new one weighs as the mean of its file, or 10 s."""
    function = test.partition("[")[0]
    for known in (test, function):
        if known in seconds:
            return seconds[known]
    file = function.partition("::")[0] + "::"
    beside = [value for name, value in seconds.items() if name.startswith(file)]
    return sum(beside) / len(beside) if beside else UNKNOWN_S


def assign(tests: Iterable[str], count: int, seconds: Mapping[str, float]) -> dict[str, int]:
    """Shard 1 to ``count`` of every test: the longest first, each to the shard with least so far.

    The same tests and record give the same shards, in whatever order the tests come.
    """
    loads = [0.0] * count
    shards = {}
    for test in sorted(tests, key=lambda test: (-weight(test, seconds), test)):
        lightest = loads.index(min(loads))
        loads[lightest] += weight(test, seconds)
        shards[test] = lightest + 1
    return shards


def parse(text: str) -> tuple[int, int]:
    """``"2/6"`` is (2, 6); anything that is no shard raises ValueError."""
    which, _, count = text.partition("/")
    if not (which.isdecimal() and count.isdecimal() and 1 <= int(which) <= int(count)):
        raise ValueError(f"--shard takes k/n with 1 <= k <= n, like 2/6, not {text!r}")
    return int(which), int(count)


def summarise(seconds: Mapping[str, float]) -> dict[str, float]:
    """The record of tests' seconds: the median of each function, and tests far above it."""
    functions = defaultdict(list)
    for test, value in seconds.items():
        functions[test.partition("[")[0]].append(value)
    medians = {name: statistics.median(values) for name, values in functions.items()}
    record = {name: round(median, 1) for name, median in medians.items()}
    for test, value in seconds.items():
        if value > medians[test.partition("[")[0]] * 1.5 + 5:
            record[test] = round(value, 1)
    return dict(sorted(record.items()))


def main(path: str) -> None:
    rows = (line.rsplit("\t", 1) for line in Path(path).read_text().splitlines())
    record = summarise({test: float(value) for test, value in rows})
    RECORD.write_text(json.dumps(record, indent=0) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
