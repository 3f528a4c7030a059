"""The command line's flags and defaults: what a command took once, it takes."""

import argparse
from typing import Any

import pytest

from linear_vit.training.config import OPTIONS
from linear_vit.training.options import COMMANDS, chosen_config, make_parser, varied

SETTINGS = """dataset preset recipe dim depth heads mlp_dim patch_size ripple_stages hydra_branches
    dropout drop_path batch_size accumulate epochs lr weight_decay warmup_epochs label_smoothing
    clip backend use_cuda_kernels amp compile device"""
# Flags, and the defaults of those that are the command's own.
EXPECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "train": (
        f"{SETTINGS} attention_type local_branch seed out resume checkpoint_every data_dir workers",
        {
            "checkpoint_every": 0,
            "data_dir": "data",
            "out": None,
            "resume": False,
            "workers": None,
        },
    ),
    "evaluate": ("checkpoint dataset out device data_dir", {"data_dir": "data", "out": None}),
    "table": (
        f"{SETTINGS} seeds models run no_run runs out exponents ablations seconds data_dir workers",
        {
            "seeds": 5,
            "models": ["baseline", "baseline-local", "linear", "ripple", "hydra", "hydra-local"],
            "run": True,
            "runs": "runs",
            "out": "reports/out/training",
            "exponents": None,
            "ablations": "reports/out/ablation",
            "seconds": 5.0,
        },
    ),
    "ablate": (
        f"{SETTINGS} attention_type local_branch seeds runs out seconds data_dir workers",
        {
            "seeds": 3,
            "runs": "reports/out/ablation/runs",
            "out": "reports/out/ablation",
            "seconds": 5.0,
        },
    ),
    "bench": (
        f"{SETTINGS} models backends seconds out",
        {
            "backends": None,
            "seconds": 3.0,
            "out": "reports/out/training",
        },
    ),
    "profile": (
        f"{SETTINGS} models steps out workers",
        {
            "steps": 10,
            "out": "reports/out/training",
        },
    ),
}
# What is trained where nothing is said.
SETTING = {
    "train": ("cifar100", "full"),
    "table": ("digits", "small"),
    "ablate": ("digits", "small"),
    "bench": ("fashion-mnist", "small"),
    "profile": ("fashion-mnist", "small"),
}
SWITCHES = {"use_cuda_kernels", "compile", "local_branch", "resume", "run", "no_run"}
VALUES = {"amp": "bf16", "models": "ripple"}


def parse(command: str, *arguments: str) -> argparse.Namespace:
    needed = ["--checkpoint=x"] if command == "evaluate" else []
    return make_parser(None).parse_args([command, *needed, *arguments])


@pytest.mark.parametrize("command", EXPECTED)
def test_every_flag_in_both_spellings(command: str) -> None:
    for name in EXPECTED[command][0].split():
        given = "" if name in SWITCHES else f"={VALUES.get(name, '1')}"
        for spelled in {name, name.replace("_", "-")}:
            if spelled == "no_run":
                continue
            parsed = vars(parse(command, f"--{spelled}{given}"))
            assert parsed["run" if name == "no_run" else name] is not None


@pytest.mark.parametrize("command", EXPECTED)
def test_defaults(command: str) -> None:
    parsed = vars(parse(command))
    for name, value in EXPECTED[command][1].items():
        assert parsed[name] == value, name
    if command != "evaluate":
        assert not set(parsed) & {"dim", "lr", "amp", "seed"}, "presets could not fill these"
        config = chosen_config(parse(command, "--device=cpu"))
        assert (config.dataset, config.preset, config.amp) == (*SETTING[command], "off")


def test_commands() -> None:
    assert list(COMMANDS) == list(EXPECTED)


@pytest.mark.parametrize("command", EXPECTED)
def test_help_fits_on_a_screen(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(command, "--help")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - {"seed"}))
def test_ablate_varies_any_setting(name: str) -> None:
    """Numbers, words, choices and switches; and each value makes another configuration."""
    values = {
        "dataset": "digits,fashion-mnist",
        "attention_type": "baseline,hydra",
        "preset": "small,full",
        "recipe": "light,strong",
        "amp": "off,bf16",
        "backend": "torch,reference",
        "local_branch": "off,on",
        "compile": "off,on",
        "lr": "0.001,0.002",
    }
    rates = ("dropout", "drop_path", "label_smoothing")
    text = values.get(name, "0.1,0.2" if name in rates else "1,2")
    args = parse("ablate", "--device=cpu", f"--{name}={text}")
    found, given = varied(args)
    configs = [chosen_config(args, **{name: value}) for value in given]
    assert found == name
    assert len({getattr(config, name) for config in configs}) == 2


def test_ablate_still_takes_switches(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("ablate", "--compile", "--dim=16,32").compile is True
    assert parse("ablate", "--local_branch", "off").local_branch is False
    with pytest.raises(SystemExit):
        parse("ablate", "--compile=perhaps")
    assert "must be on or off, got 'perhaps'" in capsys.readouterr().err


def test_ablate_alone_takes_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("ablate", "--dim=16,32").dim == (16, 32)
    assert parse("ablate", "--dim=16").dim == 16
    with pytest.raises(SystemExit):
        parse("train", "--dim=16,32")
    assert "--dim: invalid int value: '16,32'" in capsys.readouterr().err
