"""The command line of train_minimal.py: commands, their flags, and the settings made of Config.

A setting that is not given stays absent from the parsed arguments, so that presets can fill it.
Every option can be written with ``_`` or ``-``.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from linear_vit import cluster, options
from linear_vit.training import distributed
from linear_vit.training.config import COMPARED, MODELS, OPTIONS, Config, Option, resolve
from linear_vit.training.errors import UserError


class Listed(tuple):
    """Several values of one option, as ``ablate`` takes them: 1,2,3,4."""


@dataclass(frozen=True)
class Command:
    """A subcommand: what it is for, flags that others have too (of ``_SHARED``), and its own.

    ``defaults`` are those of its dataset and preset; where they are none, it has no settings.
    """

    help: str
    shared: str
    flags: Mapping[str, Mapping[str, Any]]
    defaults: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lists: bool = False  # settings take several values, separated by commas


def positive(text: str) -> int:
    return _at_least(1, text)


def natural(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value


def seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1e9, got {text}")
    return value


def local(text: str) -> str:
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no folder of this machine; a URL is for --runs alone"
        )
    return text


def on_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"must be on or off, got {text!r}")
    return text == "on"


def _flag(help: str, metavar: str | None = None, **more: Any) -> dict[str, Any]:
    kind = {"type": local} if metavar == "DIR" else {}
    return {"help": help, "metavar": metavar, **kind, **more}


def _switch(help: str) -> dict[str, Any]:
    return {"help": help, "action": "store_true"}


def _folder(default: str, what: str = "") -> dict[str, Any]:
    return _flag(f"{what} ({default})".strip(), "DIR", default=default)


def _count(default: int, help: str) -> dict[str, Any]:
    return _flag(f"{help} ({default})", "N", type=positive, default=default)


def _seconds(default: float, help: str) -> dict[str, Any]:
    return _flag(f"{help} ({default:g})", "X", type=seconds, default=default)


def _runs(default: str) -> dict[str, Any]:
    what = f"folder of the run records, or a URL of fsspec's: s3://bucket/runs ({default})"
    return _flag(what, "DIR|URL", default=default)


_SHARED: dict[str, dict[str, Any]] = {
    "device": _flag("cpu, cuda or cuda:NUMBER (cuda where there is one)", "NAME"),
    "out": _folder("reports/out/training", "of the table"),
    "data_dir": _folder("data", "where data sets are, or go to"),
    "workers": _flag("that augment images (CPU: 0; CUDA: all cores but one)", "N", type=natural),
    "cluster": _flag(
        "run on this Ray cluster, or auto: the one here; without a value, start one here",
        "HOST:PORT",
        nargs="?",
        const=cluster.LOCAL,
    ),
    "models": _flag(
        f"of {', '.join(MODELS)} (all but ripple-local)",
        "MODEL",
        nargs="+",
        default=list(COMPARED),
        choices=list(MODELS),
    ),
}
COMMANDS: dict[str, Command] = {
    "train": Command(
        "train one model (default)",
        "device data_dir workers",
        {
            "out": _flag("folder of the run (runs/ and a name made of the settings)", "DIR"),
            "resume": _switch("go on with --out's run, or else with the newest unfinished one"),
            "init_from": _flag(
                "begin with this checkpoint's weights and settings, its attention swapped", "FILE"
            ),
            "checkpoint_every": _flag(
                "steps from a write of last.pt to the next (0: once an epoch)",
                "N",
                type=natural,
                default=0,
            ),
            "sequence_parallel": _count(
                1, "processes of torchrun that share their images, each with a band of rows"
            ),
            "fsdp": _switch("each of torchrun's processes keeps a part of the weights (FSDP2)"),
        },
        {"preset": "full", "dataset": "cifar100"},
    ),
    "evaluate": Command(
        "test saved models",
        "device data_dir",
        {
            "checkpoint": _flag(
                "best.pt files, or a quoted glob of them", "FILE", nargs="+", required=True
            ),
            "dataset": _flag("the data set it was trained on, as a check", "NAME"),
            "out": _flag("folder for the results (beside each checkpoint)", "DIR"),
        },
    ),
    "table": Command(
        "compare all models",
        "device out data_dir workers models cluster",
        {
            "seeds": _count(5, "runs per model, seeds 0, 1, ..."),
            "run": {
                "action": argparse.BooleanOptionalAction,
                "default": True,
                "help": "train what no record covers, or read records alone (--run)",
            },
            "runs": _runs("runs"),
            "exponents": _flag("exponents.csv of measured complexity (found in reports/)", "FILE"),
            "ablations": _folder("reports/out/ablation", "of the ablations"),
            "seconds": _seconds(5.0, "to time each model's training step by turns"),
        },
        {"preset": "small", "dataset": "digits"},
    ),
    "ablate": Command(
        "vary one setting: --ripple_stages 1,2,3,4",
        "device data_dir workers cluster",
        {
            "seeds": _count(3, "runs per value, seeds 0, 1, ..."),
            "runs": _runs("reports/out/ablation/runs"),
            "out": _folder("reports/out/ablation", "of table and plot"),
            "seconds": _seconds(5.0, "to time each value's step; 0: speeds of the runs"),
        },
        {"preset": "small", "dataset": "digits"},
        lists=True,
    ),
    "bench": Command(
        "time training steps, with and without own kernels",
        "device out models",
        {
            "backends": _flag(
                "such as torch,compiled,cuda (torch and the own ones)", "LIST", type=options.words
            ),
            "seconds": _seconds(3.0, "to spend on each model and backend"),
        },
        {"preset": "small", "dataset": "fashion-mnist"},
    ),
    "profile": Command(
        "what a training step spends its time on",
        "device out models workers",
        {
            "steps": _count(10, "steps to take"),
        },
        {"preset": "small", "dataset": "fashion-mnist"},
    ),
}


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        made = commands.add_parser(
            name,
            help=command.help,
            usage=f"%(prog)s [OPTION ...]   ({command.help})",
            allow_abbrev=False,
            formatter_class=functools.partial(
                argparse.HelpFormatter, max_help_position=26, width=100
            ),
        )
        if command.defaults:
            _add_settings(made, name, command)
        shared = {flag: _SHARED[flag] for flag in command.shared.split()}
        for flag, details in {**shared, **command.flags}.items():
            _add(made, flag, **details)
    return parser


def _add_settings(parser: argparse.ArgumentParser, name: str, command: Command) -> None:
    """The fields of Config that a command has, and the original's name for one value of one."""
    text = "by default as the preset has them (in brackets: the full one); a _ may be a -"
    group = parser.add_argument_group("settings", text)
    for field in dataclasses.fields(Config):
        option: Option = OPTIONS[field.name]
        if option.commands is not None and name not in option.commands:
            continue
        default = command.defaults.get(field.name, option.default or f"{field.default}")
        details: dict[str, Any] = {"default": argparse.SUPPRESS}
        if isinstance(field.default, bool):
            details |= _switch(option.help)
            if command.lists:
                details = {**details, "action": "store", "nargs": "?", "const": True}
                details |= {"type": _listed(on_off), "metavar": "on,off"}
        else:
            text = " ".join(filter(None, (option.help, ", ".join(option.choices))))
            details["help"] = f"{text} ({default})"
            kind = str if field.default is None else type(field.default)
            details["metavar"] = {int: "N", float: "X", str: "NAME"}[kind]
            details["type"] = _listed(kind) if command.lists else kind
        _add(group, field.name, **details)
    _add(group, "use_cuda_kernels", **_switch("the CUDA C++ kernels: --backend cuda"))


def _add(parser: Any, name: str, **details: Any) -> None:
    """An option in both spellings, --batch_size and --batch-size."""
    if details.get("metavar", "") is None:
        del details["metavar"]
    options.option(parser, f"--{name}", f"--{name.replace('_', '-')}", **details)


def _listed(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type: one value of ``kind``, or with commas a Listed of them."""

    def parse(text: str) -> Any:
        return Listed(map(kind, text.split(","))) if "," in text else kind(text)

    parse.__name__ = kind.__name__  # argparse's message says "invalid int value"
    return parse


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given explicitly, by name."""
    given = {name: value for name, value in vars(args).items() if name in OPTIONS}
    if args.use_cuda_kernels:
        if given.get("backend", "cuda") != "cuda":
            raise UserError(f"--use_cuda_kernels and --backend {given['backend']}: give one")
        given["backend"] = "cuda"
    return given


def chosen_config(
    args: argparse.Namespace, begin: Mapping[str, Any] | None = None, **more: Any
) -> Config:
    """The configuration of what was given explicitly (and ``more``), preset and defaults.

    ``begin``: settings that stand in the place of the command's defaults.
    """
    given = {**(begin or COMMANDS[args.command].defaults), **given_settings(args)}
    if "amp" not in given:
        given["amp"] = "bf16" if chosen_device(args.device).type == "cuda" else "off"
    return resolve({**given, **more})


def varied(args: argparse.Namespace) -> tuple[str, list[Any]]:
    """The one setting that was given several values, and these; UserError for none or more."""
    names = [name for name, value in vars(args).items() if isinstance(value, Listed)]
    if len(names) != 1:
        raise UserError(
            "ablate varies one setting: give one option a list of values, as in "
            f"--ripple_stages 1,2,3,4 (got {', '.join(names) or 'no list'})"
        )
    return names[0], list(getattr(args, names[0]))


def chosen_device(name: str | None) -> torch.device:
    """The device of this name, by default CUDA where there is one; under torchrun, one each.

    Raises OptionError for one that is not there.
    """
    rank = distributed.local_rank()
    if name is None and rank is not None and torch.cuda.is_available():
        name = f"cuda:{rank}"
    device: torch.device = options.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device
