"""No command dies of a character that standard output can't show: ASCII, or Latin-1 without λ."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from linear_vit import options, screen

ROOT = Path(__file__).parents[1]
SAVED = ROOT / "reports/measurements/xeon-2.5ghz-2-cores/benchmark.json"
ENCODINGS = ("ascii", "latin-1")
HELP = [
    *(f"train_minimal {name}".strip() for name in ("", "train", "evaluate", "table", "ablate")),
    *("train_minimal bench", "train_minimal profile", "kernels.__main__", "kernels.__main__ build"),
    *(f"bench.__main__ {name}".strip() for name in ("", "check", "static", "traffic", "tune")),
    *("bench.__main__ noise", "reports.__main__"),
    *(
        f"reports.__main__ {name}"
        for name in (
            "scaling",
            "compare",
            "targets",
            "table",
            "page",
            "results",
            "power",
            "convert",
        )
    ),
]


def run(command: str, encoding: str) -> tuple[int, str]:
    """The exit code of a command and what it says on a standard output of this encoding."""
    name, *words = command.split()
    main = importlib.import_module(f"linear_vit.{name}").main
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with contextlib.redirect_stdout(stream):
        try:
            code = int(main(words))
        except SystemExit as stop:
            code = int(stop.code or 0)
        stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return code, stream.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_an_encoding_lacks_is_spelled(encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    chosen = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")  # by the user
    with contextlib.redirect_stdout(stream):
        with pytest.raises(UnicodeEncodeError):
            print("λ-weighted", flush=True)
        options.spell_out()
        print("λ-weighted", flush=True)
    assert isinstance(stream.buffer, io.BytesIO)
    assert stream.buffer.getvalue() == b"\\u03bb-weighted\n"
    with contextlib.redirect_stdout(chosen):
        options.spell_out()
    assert chosen.errors == "replace"


def test_a_table_is_plain_where_there_is_ascii_alone() -> None:
    """What stands for a character is in line, too."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(stream):
        options.spell_out()
        print(screen.draw(["N", "time"], [["64", "371 µs ±3%"], ["128", "2 × 3 – 4"]], at_most=40))
        screen.say("‡ disturbed → 1.00× …")
        stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    assert stream.buffer.getvalue().decode("ascii").splitlines() == [
        "N           time",
        "---  -----------",
        "64   371 us +-3%",
        "128    2 x 3 - 4",
        "",
        "! disturbed -> 1.00x ...",
    ]


@pytest.mark.parametrize("command", HELP)
def test_every_command_shows_its_help(command: str) -> None:
    code, said = run(f"{command} --help", "ascii")
    assert code == 0
    assert "usage: " in said


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("bench.__main__ check --ops linear_attention --backends torch", "linear_attention"),
        (f"reports.__main__ compare {SAVED} --baseline torch --ops linear_attention", "torch"),
        (f"reports.__main__ scaling {SAVED} --ops linear_attention --out OUT", "OUT"),
        (f"reports.__main__ targets {SAVED}", "exponent"),
        ("reports.__main__ table RUNS --out OUT", "RippleViT"),
        ("train_minimal table --no-run --runs RUNS --out OUT", "RippleViT"),
    ],
    ids=lambda text: " ".join(text.split()[:2]),
)
def test_a_small_run_of_every_command(
    command: str, words: str, encoding: str, tmp_path: Path
) -> None:
    places = {"OUT": str(tmp_path), "RUNS": str(ROOT / "tests/training/golden")}
    for name, place in places.items():
        command, words = command.replace(name, place), words.replace(name, place)
    code, said = run(command, encoding)
    assert code in (0, 1)  # 1: a target is broken
    assert words in said
    assert "\\" not in said  # nothing that a reader would have to decode


@pytest.mark.slow
def test_training_ends_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    """A recipe that mixes images, whose accuracy is λ-weighted, in a process of its own."""
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "train_minimal.py"), "--dataset=digits", "--dim=8"),
            *("--depth=1", "--heads=1", "--epochs=1", "--batch_size=512", "--recipe=strong"),
            *("--backend=torch", "--device=cpu", f"--out={tmp_path}"),
        ],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        cwd=tmp_path,
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert b"train (\\u03bb-weighted)" in done.stdout
    assert (tmp_path / "best.pt").exists()
