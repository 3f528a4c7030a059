"""The options that all commands share, in argparse's parsers and in pytest's groups."""

import argparse
from pathlib import Path

import pytest
from _pytest.config import argparsing

from linear_vit import options


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="command")
    options.add(parser, "ops", "tokens", "minutes", "out", "device", arch="GPUs to compile for")
    options.option(parser, "--head-dims", "--dims", type=options.numbers, help="of every head")
    return parser


def test_lists_have_commas(parser: argparse.ArgumentParser) -> None:
    given = parser.parse_args(["--ops", "a,b-c", "--tokens", "64,1024", "--minutes", "2.5"])
    assert (given.ops, given.tokens, given.minutes) == (("a", "b-c"), (64, 1024), 2.5)
    assert (given.arch, given.head_dims, given.device) == (None, None, None)
    assert parser.parse_args(["--out", "a/b.json"]).out == Path("a/b.json")


@pytest.mark.parametrize("spelling", ["--head-dims", "--head_dims", "--dims"])
def test_underscores_are_hyphens_and_old_spellings_work(
    parser: argparse.ArgumentParser, spelling: str
) -> None:
    assert parser.parse_args([spelling, "16,32"]).head_dims == (16, 32)


def test_help_shows_one_spelling(parser: argparse.ArgumentParser) -> None:
    text = parser.format_help()
    assert "--head-dims" in text
    assert "GPUs to compile for" in text
    assert not any(other in text for other in ("--head_dims", "--dims", "SUPPRESS"))


@pytest.mark.parametrize("word", ["sm_90a", "sm-90a", "90a", "9.0a", "SM_90A"])
def test_an_architecture_has_many_spellings(word: str) -> None:
    assert options.architectures(f"{word},8.6,10.0") == ("sm_90a", "sm_86", "sm_100")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tokens", "64;128"], "'64;128' is no list of numbers with commas"),
        (["--tokens", "0"], "'0' is no list of numbers"),
        (["--minutes", "0"], "'0' is no number above 0"),
        (["--minutes", "nan"], "'nan' is no number above 0"),
        (["--arch", "hopper"], "'hopper' is no architecture like sm_90a"),
        (["--ops", ","], "not nothing"),
    ],
)
def test_what_is_no_value_is_told(
    parser: argparse.ArgumentParser,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(given)
    assert message in capsys.readouterr().err


def test_names_are_spelled_as_those_that_there_are() -> None:
    there = ("ripple_pool", "ripple_expand")
    assert options.known("ops", ["ripple-expand", "ripple_expand"], there) == ("ripple_expand",)
    assert options.known("ops", None, there) == options.known("ops", ["all"], there) == there
    assert options.known("head-dims", ["64"], (16, 64)) == (64,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("backends", "--backends: unknown backend 'x'; there are torch, cpu"),
        ("ops", "--ops: unknown operation 'x'; there are torch, cpu"),
        ("head-dims", "--head-dims: unknown head dim 'x'; there are torch, cpu"),
    ],
)
def test_an_unknown_name_is_answered_by_those_that_there_are(name: str, message: str) -> None:
    with pytest.raises(options.OptionError) as caught:
        options.known(name, ["cpu", "x"], ("torch", "cpu"))
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["tpu9", "meta"])
def test_a_device_is_one_that_kernels_run_on(name: str) -> None:
    with pytest.raises(options.OptionError, match=rf"--device: '{name}'.*cpu or cuda"):
        options.device(name)
    assert options.device("cpu").type == "cpu"


def test_they_are_options_of_pytest_too() -> None:
    parser = argparsing.Parser(_ispytest=True)
    group = parser.getgroup("suite")
    options.add(group, "ops", "tokens", "out")
    options.option(group, "--dry-run", action="store_true", default=None, help="list only")
    given = parser.parse(["--ops", "a,b", "--out", "x.json", "--dry_run"])
    assert (given.ops, given.out, given.dry_run) == (("a", "b"), Path("x.json"), True)
    assert given.tokens is None
    assert parser.parse([]).dry_run is None
    with pytest.raises(pytest.UsageError, match="'many' is no list of numbers"):
        parser.parse(["--tokens", "many"])
