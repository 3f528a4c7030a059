"""``python -m kernels build``: the CUDA sources built ahead of time, for any GPU.

python -m kernels build                     # for the GPU in this machine
python -m kernels build --arch 8.0,9.0a     # for others; sm_80,sm_90a says the same
"""

import argparse
import re
import sys
from collections.abc import Sequence

import torch

from linear_vit import screen
from linear_vit.kernels import build, toolchains


@screen.command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels", description="The kernels' sources.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    ahead = commands.add_parser(
        "build",
        help="build the CUDA extensions ahead of time, and load them",
        description="Build the CUDA extensions ahead of time, and load them; no GPU is needed.",
    )
    ahead.add_argument(
        "--arch",
        type=_architectures,
        metavar="LIST",
        help="compute capabilities to build for, like 8.0,9.0a or sm_80,sm_90a "
        "(default: this machine's GPU)",
    )
    return _build(parser.parse_args(arguments).arch)


def _build(architectures: tuple[str, ...] | None) -> int:
    """Build and load; the exit status."""
    reason = toolchains.no_cuda_toolchain()
    if reason is not None:
        screen.say(reason, sys.stderr)
        return 1
    if architectures is None and torch.cuda.is_available():
        architectures = (toolchains.architecture(torch.device("cuda")),)
    elif architectures is None:
        architectures = ("9.0a",)
        screen.say("no CUDA device here: building for 9.0a (choose with --arch)")
    version = toolchains.nvcc_version()
    assert version is not None
    screen.say(
        f"nvcc {version[0]}.{version[1]} in {toolchains.cuda_root()}, PyTorch {torch.__version__}"
    )
    try:
        build.load("cuda", architectures=architectures)
    except build.BuildError as error:
        print(error, file=sys.stderr)
        return 1
    for family in toolchains.CUDA.families():
        screen.say(f"built and loaded {build.folder_of('cuda', family, architectures)}")
    return 0


def _architectures(words: str) -> tuple[str, ...]:
    """Compute capabilities as PyTorch writes them, "9.0a", of that or of nvcc's "sm_90a"."""
    found = []
    for word in words.split(","):
        match = re.fullmatch(r"(?:sm[_-])?(\d+)\.?(\d)([af]?)", word.strip())
        if match is None:
            raise argparse.ArgumentTypeError(
                f"compute capabilities like 8.0,9.0a or sm_80,sm_90a, not {word.strip()!r}"
            )
        found.append("{}.{}{}".format(*match.groups()))
    return tuple(found)


if __name__ == "__main__":
    sys.exit(main())
