"""What proves: ``python -m bench check|static|traffic|tune``. What times is pytest's.

``-p MODULE``, before the command, imports a module that adds operations or backends of its own.
"""

import importlib
import sys
from collections.abc import Sequence

from linear_vit import screen
from linear_vit.options import OptionError, load_plugins

COMMANDS = {
    "check": ("linear_vit.bench.check", "every backend against the float64 reference"),
    "static": ("linear_vit.bench.static.table", "every GPU kernel compiled, with no GPU"),
    "traffic": ("linear_vit.bench.traffic", "every byte the Triton kernels load and store"),
    "tune": ("linear_vit.bench.tune", "the fastest tiles of the Triton kernels on this GPU"),
    "noise": (
        "linear_vit.bench.noise",
        "is a neighbour noticed, a slow-down caught? (minutes)",
    ),
}
USAGE = "\n".join(
    [
        f"usage: python -m bench [-p MODULE] {{{','.join(COMMANDS)}}} [options]",
        "",
        *(f"  {name:8} {what}" for name, (_, what) in COMMANDS.items()),
        "",
        "-p MODULE imports a module that adds operations or backends of its own.",
        "Each command has --help. What times is pytest --benchmark-only.",
    ]
)


@screen.command
def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    plugins = []
    while given[:1] == ["-p"] and len(given) > 1:
        plugins.append(given[1])
        del given[:2]
    name = given[0] if given else ""
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    if name not in COMMANDS:
        print(USAGE + (f"\n\nno command {name!r}" if name else ""), file=sys.stderr)
        return 2
    try:
        load_plugins(plugins)
        module, _ = COMMANDS[name]
        return int(importlib.import_module(module).main(given[1:]))
    except OptionError as error:
        screen.say(error, sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
