"""The command-line tools under one name: ``linear-vit``, or ``python -m linear_vit``.

The words behind it are those of a checkout: ``linear-vit bench check`` for ``python -m bench
check``, ``linear-vit pytest --benchmark-only`` for ``pytest --benchmark-only``.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_HERE = Path(__file__).parent
# A tool's module, and what it is for.
TOOLS = {
    "pytest": ("", "time kernels, training steps and whole models: --benchmark-only"),
    "bench": ("linear_vit.bench.__main__", "prove: check, static, traffic, tune"),
    "kernels": ("linear_vit.kernels.__main__", "build the kernels ahead of time"),
    "reports": ("linear_vit.reports.__main__", "show: scaling, compare, models, page ..."),
    "train_minimal.py": ("linear_vit.train_minimal", "train, evaluate and compare our models"),
}
USAGE = "\n".join(
    [
        "usage: linear-vit TOOL [options]",
        "",
        *(f"  {name:17} {what}" for name, (_, what) in TOOLS.items()),
        "",
        "Each has --help, and the options that it has in a checkout.",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a tool; its exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    name = given[0] if given else ""
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    tool = {"train": "train_minimal.py", "train_minimal": "train_minimal.py"}.get(name, name)
    if tool not in TOOLS:
        print(USAGE + (f"\n\nno tool {name!r}" if name else ""), file=sys.stderr)
        return 2
    if tool == "pytest":
        return _pytest(given[1:])
    run: Callable[[Sequence[str]], int] = importlib.import_module(TOOLS[tool][0]).main
    return int(run(given[1:]))


def _pytest(given: Sequence[str]) -> int:
    """pytest with our options on our benchmarks, from any folder."""
    import pytest

    root = _HERE.parent if (_HERE / "bench").is_symlink() else _HERE  # a checkout, or a wheel
    settings = ["--rootdir", str(root), "--confcutdir", str(root), "--import-mode=importlib"]
    # A project around this package may have options of its own for pytest.
    settings += ["-o", "addopts=", "-o", "python_files=bench_*.py", "-p", "no:cacheprovider"]
    return int(pytest.main([*settings, *given, str(root / "bench")]))


if __name__ == "__main__":
    sys.exit(main())
