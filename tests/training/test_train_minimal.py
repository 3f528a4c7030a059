"""The command line, end to end on the digits at a tiny size, and its wrong turns."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from linear_vit import train_minimal
from linear_vit.training import board, record
from linear_vit.training.checkpoints import load_checkpoint
from linear_vit.training.config import build_model
from linear_vit.training.data import datasets
from linear_vit.training.errors import UserError
from linear_vit.training.options import chosen_config, make_parser
from tests import processes

open_board = board.open_board
ROOT = Path(__file__).parents[2]
TINY_SIZES = {"dim": 16, "depth": 1, "heads": 1, "hydra_branches": 1, "batch_size": 64}
TINY = [
    "--dataset=digits",
    "--recipe=light",
    *(f"--{name}={value}" for name, value in TINY_SIZES.items()),
]

pytestmark = pytest.mark.usefixtures("few_digits")


def main(*arguments: object) -> int:
    return train_minimal.main([str(argument) for argument in arguments])


def without_times(run: dict[str, Any]) -> dict[str, Any]:
    kept = {k: run[k] for k in ("config", "parameters", "test_accuracy", "best_epoch")}
    timed = ("seconds", "images_per_second")
    kept["epochs"] = [{k: v for k, v in e.items() if k not in timed} for e in run["epochs"]]
    return kept


def test_train_records_and_repeats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        assert main(*TINY, "--epochs", 2, "--dropout", 0.2, "--out", tmp_path / name) == 0
    assert "test accuracy" in capsys.readouterr().out
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
    run = runs[0]
    assert run["schema"] == record.SCHEMA
    assert run["status"] == "finished"
    assert run["config"]["dim"] == 16
    assert run["environment"]["torch"] == torch.__version__
    assert [entry["epoch"] for entry in run["epochs"]] == [1, 2]
    assert run["images_per_second"] > 0
    assert 0 <= run["test_accuracy"] <= 1
    best = max(run["epochs"], key=lambda entry: entry["val_accuracy"])
    assert run["best_epoch"] == best["epoch"]
    assert without_times(runs[0]) == without_times(runs[1])
    weights = [load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("one", "two")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    leftovers = {path.name for path in (tmp_path / "one").iterdir()}
    assert leftovers == {".lock", "run.json", "best.pt", "last.pt"}


def test_all_models_see_the_same_batches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[list[torch.Tensor]] = []

    def recording(model: Any, optimizer: Any, images: Any, labels: Any, **_: Any) -> Any:
        seen[-1] += [images, labels]
        return torch.tensor(1.0), torch.tensor(0.0)

    monkeypatch.setattr(train_minimal, "training_step", recording)
    for kind in ("baseline", "ripple", "hydra"):
        seen.append([])
        main(*TINY, "--attention_type", kind, "--epochs", 2, "--out", tmp_path / kind)
    assert len(seen[0]) == 2 * 2 * 3
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))
    assert not torch.equal(seen[0][1], seen[0][7])  # each epoch has its own order


def test_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(*TINY, "--epochs", 1, "--out", tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    assert main("evaluate", "--checkpoint", tmp_path / "best.pt", "--dataset", "digits") == 0
    result = json.loads((tmp_path / "best-evaluation.json").read_text())
    assert result["accuracy"] == run["test_accuracy"]
    confusion = torch.tensor(result["confusion"])
    assert confusion.sum() == result["images"] == 40
    assert confusion.diag().sum() / 40 == pytest.approx(result["accuracy"])
    for name, value in result["per_class"].items():
        row = confusion[int(name)]
        assert value == (pytest.approx(row[int(name)] / row.sum()) if row.sum() else None)
    with (tmp_path / "best-confusion.csv").open() as file:
        lines = list(csv.reader(file))
    assert [[int(cell) for cell in line[1:]] for line in lines[1:]] == result["confusion"]
    assert (tmp_path / "best-confusion.png").read_bytes().startswith(b"\x89PNG")
    assert main("evaluate", "--checkpoint", tmp_path / "best.pt", "--dataset", "cifar100") == 2
    assert "was trained on digits" in capsys.readouterr().err


def test_table_trains_what_is_missing_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--runs", tmp_path / "runs", "--out", tmp_path / "out"]
    command = ["table", *TINY, "--epochs", 1, "--models", "baseline", "ripple", *where]
    command += ["--seconds", 0.1]
    assert main(*command, "--seeds", 1) == 0
    assert len(list((tmp_path / "runs").rglob("run.json"))) == 2
    [speeds] = (tmp_path / "runs").glob("steps-*.json")
    timed = json.loads(speeds.read_text())["benchmarks"]
    assert [saved["param"] for saved in timed] == ["baseline-default", "ripple-default"]
    times = {
        path: path.stat().st_mtime_ns for path in [*(tmp_path / "runs").rglob("run.json"), speeds]
    }
    capsys.readouterr()
    assert main(*command, "--seeds", 2) == 0
    text = capsys.readouterr().out
    assert "2 of 4 runs recorded" in text
    assert "± " in text
    assert len(list((tmp_path / "runs").rglob("run.json"))) == 4
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    digits = table["datasets"][0]
    assert [row["status"] for row in digits["rows"]] == [
        "measured",
        "not run",
        "measured",
        "not run",
        "not run",
    ]
    assert digits["rows"][2]["seeds"] == [0, 1]
    assert digits["rows"][2]["speedup"]["how"] == "by turns"
    assert "| RippleViT |" in (tmp_path / "out" / "table.md").read_text()
    assert "\nRippleViT  " in text  # drawn, not as Markdown
    assert main("table", "--no-run", *where) == 0
    assert "RippleViT" in capsys.readouterr().out


def test_a_diverging_run_stops_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = (torch.tensor(float("nan")), torch.tensor(0))
    monkeypatch.setattr(train_minimal, "training_step", lambda *_, **__: nan)
    assert main(*TINY, "--epochs", 1, "--out", tmp_path) == 2
    assert "became nan at step 1 " in capsys.readouterr().err
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"] == "failed"
    assert "nan" in run["error"]


def test_the_original_command_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = make_parser(None)
    text = "--attention_type ripple --dataset cifar100 --batch_size 128 --epochs 200 --lr 3e-4"
    dashes = "--attention-type ripple --dataset cifar100 --batch-size 128 --epochs 200 --lr 3e-4"
    configs = [
        chosen_config(parser.parse_args(["train", *line.split()]), amp="off")
        for line in (text, dashes, "")
    ]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].attention_type == "ripple"
    seen: list[str] = []
    monkeypatch.setattr(train_minimal, "train_command", lambda args: seen.append(args.command))
    main()
    main("--dataset", "digits")
    assert seen == ["train", "train"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "mnist"], "dataset must be one of digits, fashion-mnist"),
        (["--dataset", "digits", "--epochs", "-3"], "epochs must be at least 1, got -3"),
        (["--dataset", "digits", "--dim", "100", "--heads", "3"], "dim 100 and heads 3"),
        (["--dataset", "digits", "--patch_size", "3"], "img_size 8x8 and patch_size 3"),
        (["--dataset", "digits", "--ripple_stages", "9"], "can be halved at most 6 times"),
        (["--dataset", "digits", "--device", "tpu9"], "device"),
        (["--dataset", "digits", "--device", "meta"], "device"),
        (["evaluate", "--checkpoint", "nowhere/best.pt"], "no checkpoint at nowhere/best.pt"),
        (["table", "--dataset", "imagenet"], "dataset must be one of digits"),
        (["table", "--no-run", "--runs", "nowhere"], "no run records in nowhere"),
        (["table", "--models", "vit"], "'vit'"),
        (["table", "--seeds", "0"], "must be at least 1, got 0"),
        (["table", "--seconds", "inf"], "--seconds: must be at least 0 and below 1e9, got inf"),
        (["bench", "--seconds", "nan"], "--seconds: must be at least 0 and below 1e9, got nan"),
        (["ablate", "--seconds", "-1"], "--seconds: must be at least 0 and below 1e9, got -1"),
        (["--dataset", "digits", "--dim", "1000000", "--heads", "1"], "out of memory"),
        (["--dataset", "digits", "--backend", "magic"], "magic"),
        (["--batchsize", "3"], "unrecognized arguments: --batchsize"),
        (["--epochs", "many"], "invalid int value: 'many'"),
        (["tabel"], "invalid choice: 'tabel'"),
    ],
)
def test_wrong_turns(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code: Any = main(*arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


OPTIONS = """
    --attention_type hydra --dataset tiny-imagenet --batch_size 64 --epochs 5 --lr 1e-3 --dim 192
    --depth 6 --heads 2 --mlp_dim 100 --patch_size 8 --dropout 0 --drop_path 0.2 --ripple_stages 2
    --hydra_branches 2 --seed 3 --recipe strong --amp fp16 --compile --accumulate 2 --backend torch
    --weight_decay 0.1 --warmup_epochs 1 --label_smoothing 0 --clip 2 --local_branch
"""


def test_every_option_in_both_spellings() -> None:
    parser = make_parser(None)
    others = ["--use_cuda_kernels", "--checkpoint_every=3", "--data_dir=d", "--out=o", "--resume"]
    found = []
    for spelled in (lambda text: text, lambda text: text.replace("_", "-")):
        words = [spelled(w) if w.startswith("--") else w for w in [*OPTIONS.split(), *others]]
        args = parser.parse_args(["train", *words])
        assert (args.checkpoint_every, args.data_dir, args.out) == (3, "d", "o")
        assert args.resume
        assert args.use_cuda_kernels
        args.use_cuda_kernels = False
        found.append(chosen_config(args))
    assert found[0] == found[1]
    config = found[0]
    given = {name.lstrip("-"): value for name, value in _pairs(OPTIONS.split())}
    for name, value in given.items():
        kind = type(getattr(config, name))
        assert getattr(config, name) == (True if value is None else kind(value)), name


def _pairs(words: list[str]) -> list[tuple[str, str | None]]:
    values = [*words[1:], "--"]
    return [
        (word, None if after.startswith("--") else after)
        for word, after in zip(words, values, strict=True)
        if word.startswith("--")
    ]


def test_the_original_troubleshooting_lines() -> None:
    parser = make_parser(None)
    for line, heads in (("--batch_size 64 --dim 256", 4), ("--dim 192 --depth 6", 3)):
        config = chosen_config(parser.parse_args(["train", *line.split()]))
        assert (config.heads, config.mlp_dim) == (heads, 4 * config.dim)
    args = parser.parse_args(["train", "--use_cuda_kernels"])
    assert chosen_config(args).backend == "cuda"
    args = parser.parse_args(["train", "--use_cuda_kernels", "--backend", "torch"])
    with pytest.raises(UserError, match="give one"):
        chosen_config(args)


def test_evaluate_a_quoted_glob(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        main(*TINY, "--epochs", 1, "--seed", seed, "--out", tmp_path / str(seed))
    capsys.readouterr()
    assert main("evaluate", "--checkpoint", tmp_path / "*" / "best.pt") == 0
    assert capsys.readouterr().out.count("test images") == 2
    for seed in (0, 1):
        assert (tmp_path / str(seed) / "best-evaluation.json").exists()
    assert main("evaluate", "--checkpoint", tmp_path / "*" / "worst.pt") == 2
    assert "no checkpoint matches" in capsys.readouterr().err


def test_ablate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*TINY, "--epochs=1", "--backend=torch", f"--runs={tmp_path}/runs"]
    options += [f"--out={tmp_path}", "--ripple_stages=1,2", "--seconds=0.01"]
    assert main("ablate", *options, "--seeds", 2) == 0
    found = json.loads((tmp_path / "ablation-ripple_stages.json").read_text())
    assert [row["value"] for row in found["rows"]] == [1, 2]
    assert all(row["seeds"] == [0, 1] for row in found["rows"])
    assert found["model"] == "ripple"
    assert [row["images_per_second"]["how"] for row in found["rows"]] == ["by turns"] * 2
    names = {path.name for path in tmp_path.iterdir()}
    assert {f"ablation-ripple_stages.{kind}" for kind in ("md", "csv", "svg")} <= names
    capsys.readouterr()
    assert main("ablate", *options, "--seeds", 1) == 0  # nothing is trained twice
    assert "2 of 2 runs recorded" in capsys.readouterr().out
    assert main("ablate", *options, "--seeds", 1, "--hydra_branches", "1,2") == 2
    assert main("ablate", *TINY) == 2
    assert "varies one setting" in capsys.readouterr().err


def test_bench_and_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*TINY, "--models", "baseline", "hydra", f"--out={tmp_path}"]
    assert main("bench", *options, "--backends=torch,cuda,triton", "--seconds=0.01") == 0
    saved = json.loads((tmp_path / "step-speed.json").read_text())
    names = {"baseline-torch", "hydra-torch"}
    assert names <= {one["param"] for one in saved["benchmarks"]}
    if not torch.cuda.is_available():
        assert "hydra-cuda" in saved["kernel_suite"]["not_timed"]
    assert "PyTorch" in capsys.readouterr().out
    assert main("bench", *options, "--backends=magic") == 2
    for recipe in ("light", "strong"):
        more = ("--recipe", recipe, "--steps", 2, "--backend", "torch")
        assert main("profile", *options, *more) == 0
        for row in json.loads((tmp_path / "step-breakdown.json").read_text())["rows"]:
            assert sum(row["shares"].values()) == pytest.approx(1)
            for name in ("attention", "projections", "mlp", "optimizer", "augmentation"):
                assert 0 < row["shares"][name] < 1, name
            assert row["shares"]["other"] > 0


def test_torchrun_is_for_train(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main("table", "--no-run") == 2
    assert "torchrun is for train" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["light", "strong"])
def test_two_processes_train_as_one(tmp_path: Path, recipe: str) -> None:
    """The same weights up to rounding; the last batch, of two images, leaves one with nothing."""
    options = [
        *("--dataset=digits", f"--recipe={recipe}", "--dropout=0", "--drop_path=0", "--dim=16"),
        *("--depth=1", "--heads=1", "--batch_size=157", "--epochs=2", "--backend=torch"),
        *("--lr=1e-3", "--checkpoint_every=4", "--accumulate=2", "--device=cpu"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, command in {
        "one": [sys.executable],
        "two": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
    }.items():
        more = ["--nproc-per-node=2"] if name == "two" else []
        script = [str(ROOT / "train_minimal.py"), *options, f"--out={tmp_path / name}"]
        done = subprocess.run(
            [*command, *more, *script],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("test accuracy") == 1  # rank 0 alone speaks and writes
    contents = [load_checkpoint(tmp_path / name / "last.pt") for name in ("one", "two")]
    assert len(contents[1]["rng"]) == 2
    torch.testing.assert_close(
        contents[1]["history"]["loss"], contents[0]["history"]["loss"], rtol=1e-4, atol=1e-5
    )
    for name, weight in contents[0]["model"].items():
        torch.testing.assert_close(contents[1]["model"][name], weight, rtol=1e-3, atol=1e-4)
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
    assert [run["environment"]["processes"] for run in runs] == [1, 2]


_HANGS = """
import os, sys, time
sys.path.insert(0, {root!r})
from linear_vit import train_minimal
original, steps = train_minimal.training_step, 0

def hanging(*arguments, **options):
    global steps
    steps += 1
    if os.environ["RANK"] == "1" and steps == 3:
        time.sleep(1000)
    return original(*arguments, **options)

train_minimal.training_step = hanging
sys.exit(train_minimal.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3, 4])
def test_a_process_that_hangs_ends_the_others_by_name(tmp_path: Path, processes: int) -> None:
    """The others: those that share its images, and those that wait for its gradients."""
    script = tmp_path / "hangs.py"
    script.write_text(_HANGS.format(root=str(ROOT)))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start.append(f"--nproc-per-node={processes}")
    options = [*TINY, "--checkpoint_every=1", "--device=cpu", f"--out={tmp_path / 'run'}"]
    if processes == 4:
        options += ["--sequence_parallel=2", "--ripple_stages=1"]
    done = subprocess.run(
        [*start, str(script), *options],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LINEAR_VIT_PATIENCE_S": "8"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    told = f"of {processes} processes, 1 did not answer for 8 s"
    assert f"train_minimal.py: error: {told}" in done.stderr
    assert done.stderr.count("did not answer") == done.stderr.count(told)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "failed"
    assert told in run["error"]
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2


def test_the_board_gets_curves_graph_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = chosen_config(make_parser(None).parse_args(["train", *TINY, "--attention_type=hydra"]))
    model = build_model(config)
    data = datasets.load_once("digits", "data")
    writer = open_board(tmp_path)
    assert writer is not None
    writer.add_graph(model, (1, 8, 8))
    numbers = dict.fromkeys(("loss", "lr", "seconds", "images_per_second", "train_accuracy"), 1.0)
    writer.add_curves({**numbers, "val_accuracy": 0.5, "epoch": 1})
    val, names = data.val, data.class_names
    writer.add_predictions(val.images, val.labels, val.labels, names, data.info, 1)
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    assert {"loss", "lr", "val_accuracy", "images_per_second"} <= set(tags["scalars"])
    assert tags["images"]
    names = {node.name for node in events.Graph().node}
    assert {"head", "blocks/0/attention/qkv"} <= names


def test_of_a_resumed_run_what_came_after_its_checkpoint_is_hidden(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    numbers = dict.fromkeys(("lr", "seconds", "images_per_second", "train_accuracy"), 1.0)
    for done, losses in ((0, [5.0, 4.0, 9.0]), (2, [3.0])):
        writer = open_board(tmp_path, epochs_done=done)
        assert writer is not None
        for epoch, loss in enumerate(losses, done + 1):
            writer.add_curves({**numbers, "loss": loss, "val_accuracy": 0.5, "epoch": epoch})
        writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss")] == [(1, 5), (2, 4), (3, 3)]


def test_out_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(*TINY, "--out", tmp_path / "file" / "run") == 2
    assert "cannot write" in capsys.readouterr().err
    assert main("table", "--out", tmp_path / "file") == 2
    assert "choose another folder with --out" in capsys.readouterr().err


def test_foreign_and_truncated_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(*TINY, "--epochs", 1, "--out", tmp_path)
    whole = (tmp_path / "best.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save(Path("code"), tmp_path / "object.pt")
    for name in ("cut", "text", "empty", "other", "tensor", "object"):
        assert main("evaluate", "--checkpoint", tmp_path / f"{name}.pt") == 2
        error = capsys.readouterr().err
        assert f"{name}.pt" in error
        assert len(error.splitlines()) == 1


def test_empty_data_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    assert main("--dataset", "cifar100", "--preset", "small", "--data_dir", tmp_path) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "CIFAR-100 was not found" in error
    assert "network is unreachable" in error
    assert "--dataset digits" in error


def test_writing_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    record.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="nan"):
        record.write_json(path, {"a": float("nan")})
    with pytest.raises(OverflowError), record.writing(path) as temporary:
        temporary.write_bytes((300).to_bytes(1, "big"))
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]
    with pytest.raises(UserError, match="cannot write"):
        record.write_json(path / "below", {})


def test_as_a_program(tmp_path: Path) -> None:
    """Started from another folder, with tensorboard and rich hidden: no traceback, exit code 2."""
    for name in ("tensorboard", "rich"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} here')")
    program = str(ROOT / "train_minimal.py")
    found = {"PYTHONPATH": str(tmp_path)}
    result = processes.python(program, *TINY, "--epochs", "1", cwd=tmp_path, **found)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("no TensorBoard logs") == 1
    assert len(list(tmp_path.glob("runs/digits-ripple-seed0-*/run.json"))) == 1
