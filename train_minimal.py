"""Train, evaluate and compare the three vision transformers. Commands to copy:

    python train_minimal.py --dataset digits --preset small --attention_type hydra
    python train_minimal.py --attention_type ripple --dataset cifar100 --batch_size 128 \\
        --epochs 200 --lr 3e-4
    python train_minimal.py evaluate --checkpoint runs/*/best.pt
    python train_minimal.py table                            # every model on the embedded digits
    python train_minimal.py table --dataset fashion-mnist    # the same on other data
    python train_minimal.py table --no-run                   # only from the records there are

``train`` is the default command. A run leaves run.json, best.pt and last.pt in its folder;
``table`` trains what is missing from those below --runs, prints the results table and writes it
as table.md, table.csv and table.json.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from training import datasets, evaluation, results
from training.augmentation import normalise, random_crop_flip
from training.checkpoints import load_checkpoint, load_weights, save_checkpoint
from training.clock import StepClock, median_images_per_second
from training.config import DATASETS, MODELS, PRESETS, Config, build_model, model_settings, resolve
from training.errors import UserError
from training.metrics import accuracy, predict
from training.progress import Progress
from training.record import (
    SCHEMA,
    check_writable,
    environment,
    read_runs,
    write_json,
    write_text,
)
from training.step import make_optimizer, training_step

WARMUP_STEPS = 5  # steps left out of images/s: they allocate, compile and fill caches


def learning_rate(step: int, *, total: int, warmup: int, peak: float) -> float:
    """Linear warm-up to ``peak`` over ``warmup`` steps, then half a cosine to 0 at ``total``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def train(
    config: Config, data: datasets.Dataset, out: Path, device: torch.device
) -> dict[str, Any]:
    """Trains one model; leaves run.json, best.pt and last.pt in ``out``; returns the record."""
    check_writable(out)
    torch.manual_seed(config.seed)  # dropout; weights, batches and crops have streams of their own
    model = build_model(config).to(device)
    optimizer = make_optimizer(model, lr=config.lr, weight_decay=config.weight_decay)
    data = data.to(device)
    images, labels = data.train.images, data.train.labels
    batches = math.ceil(len(labels) / config.batch_size)
    total, warmup = config.epochs * batches, round(config.warmup_epochs * batches)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "status": "running",
        "config": dataclasses.asdict(config),
        "model": config.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "environment": environment(device),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "epochs": [],
    }
    seconds: list[float] = []  # of every step, and
    sizes: list[int] = []  # its images
    best = -1.0
    begin = time.perf_counter()
    board = tensorboard(out)
    try:
        with Progress(f"{config.dataset} {config.model}", config.epochs, batches) as progress:
            for epoch in range(config.epochs):
                # Batches and crops follow from seed and epoch alone: all models see the same.
                draws = torch.Generator().manual_seed(1_000_003 * config.seed + epoch)
                order = torch.randperm(len(labels), generator=draws).to(device)
                clock, losses, correct = StepClock(device), [], []
                for step, batch in enumerate(order.split(config.batch_size), epoch * batches):
                    clock.start()
                    lr = learning_rate(step, total=total, warmup=warmup, peak=config.lr)
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                    crops = random_crop_flip(
                        images[batch],
                        padding=data.info.crop_padding,
                        flip=data.info.flip,
                        generator=draws,
                    )
                    loss, hits = training_step(
                        model,
                        optimizer,
                        normalise(crops, data.info.mean, data.info.std),
                        labels[batch],
                        amp=config.amp,
                        label_smoothing=config.label_smoothing,
                        clip=config.clip,
                    )
                    clock.stop()
                    losses.append(loss)
                    correct.append(hits)
                    sizes.append(len(batch))
                    # Reading the loss waits for the device, so not at every step.
                    if len(losses) % 50 == 0 or len(losses) == batches:
                        check_finite(losses, first_step=epoch * batches, lr=lr)
                    progress.step()
                seconds += clock.seconds()
                predictions = predict(model, data.val.images, data.info, amp=config.amp)
                entry = {
                    "epoch": epoch + 1,
                    "lr": lr,
                    "loss": torch.stack(losses).mean().item(),
                    "train_accuracy": torch.stack(correct).sum().item() / len(labels),
                    "val_accuracy": accuracy(predictions, data.val.labels),
                    "seconds": sum(seconds[-batches:]),
                    "images_per_second": median_images_per_second(
                        seconds[-batches:], sizes[-batches:], skip=0 if epoch else WARMUP_STEPS
                    ),
                }
                record["epochs"].append(entry)
                progress.epoch(entry)
                for name, value in entry.items():
                    if board is not None and name != "epoch":
                        board.add_scalar(name, value, epoch + 1)
                if entry["val_accuracy"] > best:
                    best, record["best_epoch"] = entry["val_accuracy"], epoch + 1
                    save_checkpoint(out / "best.pt", model, config, epoch=epoch + 1)
                save_checkpoint(out / "last.pt", model, config, epoch=epoch + 1)
                write_json(out / "run.json", record)
        # The best on the validation images is tested, once; nothing is chosen by what comes out.
        load_weights(model, load_checkpoint(out / "best.pt"), out / "best.pt")
        predictions = predict(model, data.test.images, data.info, amp=config.amp)
    except UserError as error:
        write_json(out / "run.json", {**record, "status": "failed", "error": str(error)})
        raise
    finally:
        if board is not None:
            board.close()
    record["images_per_second"] = median_images_per_second(seconds, sizes, skip=WARMUP_STEPS)
    record["test_accuracy"] = accuracy(predictions, data.test.labels)
    record["seconds"] = time.perf_counter() - begin
    record["status"] = "finished"
    write_json(out / "run.json", record)
    return record


def check_usable(config: Config, device: torch.device) -> None:
    """UserError, before data is read, for sizes that don't fit or a backend that can't run."""
    model = build_model(config).to(device)
    if config.backend is not None:
        info = DATASETS[config.dataset]
        try:
            predict(model, torch.zeros(1, info.channels, *model.img_size, device=device), info)
        except ValueError as error:
            raise UserError(str(error)) from error


def check_finite(losses: list[torch.Tensor], *, first_step: int, lr: float) -> None:
    """Stops a run whose loss is no longer a number, naming the step."""
    finite = torch.isfinite(torch.stack(losses))
    if not finite.all():
        step = first_step + int(finite.int().argmin()) + 1
        raise UserError(
            f"the loss became {losses[step - first_step - 1].item()} at step {step} "
            f"(learning rate {lr:.2g}): training stopped, last.pt holds the weights of the epoch "
            "before, if there was one; try a smaller --lr"
        )


_notices: set[str] = set()


def notice(text: str) -> None:
    """Prints a line to stderr, once a process."""
    if text not in _notices:
        _notices.add(text)
        print(text, file=sys.stderr)


def tensorboard(out: Path) -> Any:
    """A SummaryWriter, or None and one line saying why."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as error:  # it pulls in protobuf, which can fail in more than one way
        notice(
            f"no TensorBoard logs ({str(error) or type(error).__name__}): pip install tensorboard"
        )
        return None
    return SummaryWriter(str(out))


# --- commands -------------------------------------------------------------------------------------


def train_command(args: argparse.Namespace) -> None:
    config, device = chosen_config(args), chosen_device(args.device)
    out = Path(args.out) if args.out else Path("runs") / config.run_name
    check_usable(config, device)
    data = datasets.load_once(config.dataset, args.data_dir)
    record = train(config, data, out, device)
    print(
        f"{config.dataset} {config.model}: test accuracy {record['test_accuracy']:.1%} "
        f"(weights of epoch {record['best_epoch']}, the best on validation images), "
        f"{record['images_per_second']:,.0f} images/s, {record['seconds']:.0f} s; see {out}"
    )


def evaluate_command(args: argparse.Namespace) -> None:
    device = chosen_device(args.device)
    for path in map(Path, args.checkpoint):
        content = load_checkpoint(path)
        out = Path(args.out) / path.parent.name if args.out else path.parent
        result = evaluation.evaluate(
            content, path, args.dataset, args.data_dir, out, device, notice=notice
        )
        print(evaluation.describe(result))


def table_command(args: argparse.Namespace) -> None:
    folder, out, device = Path(args.runs), Path(args.out), chosen_device(args.device)
    check_writable(out)
    if args.run:
        run_missing(args, folder, device)
    elif not folder.is_dir():
        raise UserError(f"no folder {folder} of run records; leave out --no-run to train them")
    runs, skipped = read_runs(folder)
    for line in skipped:
        print(line, file=sys.stderr)
    table = results.make_table(runs)
    markdown = results.to_markdown(table)
    write_json(out / "table.json", table)
    write_text(out / "table.md", markdown)
    write_text(out / "table.csv", results.to_csv(table))
    print(f"\n{markdown}\nwritten to {out}/table.md, table.csv and table.json")


def run_missing(args: argparse.Namespace, folder: Path, device: torch.device) -> None:
    """Trains every model and seed that no finished record covers.

    All models of a seed run next to each other, in alternating order, so that a machine that
    drifts (heat, neighbours) does so for all alike: speed-ups compare within a seed.
    """
    configs = [
        chosen_config(args, seed=seed, **model_settings(name))
        for seed in range(args.seeds)
        for name in args.models[:: 1 if seed % 2 == 0 else -1]
    ]
    for config in configs[: len(args.models)]:
        check_usable(config, device)
    machine = environment(device)
    done = [
        run["config"]
        for run in read_runs(folder)[0]
        if run["status"] == "finished"
        and all(run["environment"].get(key) == machine[key] for key in results.MACHINE)
    ]
    missing = [config for config in configs if dataclasses.asdict(config) not in done]
    if len(missing) < len(configs):
        print(f"{len(configs) - len(missing)} of {len(configs)} runs are recorded in {folder}")
    for number, config in enumerate(missing, 1):
        print(f"run {number} of {len(missing)}: {config.dataset} {config.model} seed {config.seed}")
        data = datasets.load_once(config.dataset, args.data_dir)
        train(config, data, folder / config.run_name, device)


# --- command line ---------------------------------------------------------------------------------


def chosen_config(args: argparse.Namespace, **more: Any) -> Config:
    """The configuration of what was given explicitly (and ``more``), preset and defaults."""
    names = {field.name for field in dataclasses.fields(Config)}
    given = {name: value for name, value in vars(args).items() if name in names}
    if given.get("amp") is None:
        given["amp"] = "bf16" if chosen_device(args.device).type == "cuda" else "off"
    return resolve({**given, **more})


def chosen_device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"device must be cpu, cuda or cuda:NUMBER, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device must be cpu, cuda or cuda:NUMBER, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is usable here; leave --device out, or give --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"there are {torch.cuda.device_count()} CUDA devices, got --device {name}")
    return device


def add(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """An option in both spellings, --batch_size and --batch-size."""
    parser.add_argument(f"--{name}", *{f"--{name.replace('_', '-')}"} - {f"--{name}"}, **options)


def add_config_options(parser: argparse.ArgumentParser, *, preset: str, dataset: str) -> None:
    """Every field of Config. One that is not given stays absent, so that presets can fill it."""
    unset = argparse.SUPPRESS
    add(
        parser,
        "dataset",
        default=dataset,
        metavar="NAME",
        help=f"{', '.join(DATASETS)} (default {dataset})",
    )
    text = f"{', '.join(PRESETS)} (default {preset}); below, in brackets, are the values of full"
    add(parser, "preset", default=preset, metavar="NAME", help=text)
    numbers: list[tuple[str, Any, str]] = [
        ("dim", int, "embedding dimension (384)"),
        ("depth", int, "number of blocks (12)"),
        ("heads", int, "attention heads; not used by hydra (dim / 64)"),
        ("mlp_dim", int, "hidden dimension of the MLP (4 * dim)"),
        ("patch_size", int, "side of a patch in pixels (4; digits: 1)"),
        ("ripple_stages", int, "halvings of the token grid, ripple only (3)"),
        ("hydra_branches", int, "query branches, hydra only (4)"),
        ("dropout", float, "rate (0.1)"),
        ("batch_size", int, "images per step (128)"),
        ("epochs", int, "passes over the training images (200)"),
        ("lr", float, "peak of the learning rate (3e-4)"),
        ("weight_decay", float, "of AdamW, on the matrices of linear layers (0.05)"),
        ("warmup_epochs", float, "linear warm-up (10 of 200, in proportion)"),
        ("label_smoothing", float, "(0.1)"),
        ("clip", float, "greatest norm of the gradient (1.0)"),
    ]
    for name, kind, text in numbers:
        add(parser, name, type=kind, default=unset, metavar="N" if kind is int else "X", help=text)
    add(
        parser,
        "backend",
        default=unset,
        metavar="NAME",
        help="of the kernels (the fastest usable one)",
    )
    add(parser, "amp", choices=("off", "bf16"), help="autocast (bf16 on CUDA, off on a CPU)")


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    add(
        parser,
        "data_dir",
        default="data",
        metavar="DIR",
        help="where data sets are, or go to (data)",
    )
    add(parser, "device", help="cpu, cuda or cuda:NUMBER (cuda where there is one)")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="train one model (default)", allow_abbrev=False)
    command.set_defaults(run_command=train_command)
    unset = argparse.SUPPRESS
    add_config_options(command, preset="full", dataset="cifar100")
    add(
        command,
        "attention_type",
        default=unset,
        metavar="NAME",
        help="baseline, ripple or hydra (ripple)",
    )
    add(command, "local_branch", action="store_true", help="add a depthwise 3x3 to the attention")
    add(command, "seed", type=int, default=unset, metavar="N", help="(0)")
    add(
        command,
        "out",
        metavar="DIR",
        help="folder of the run (runs/ and a name that follows from the settings)",
    )
    add_machine_options(command)

    command = commands.add_parser("evaluate", help="test saved models", allow_abbrev=False)
    command.set_defaults(run_command=evaluate_command)
    add(command, "checkpoint", nargs="+", required=True, metavar="FILE", help="best.pt files")
    add(command, "dataset", metavar="NAME", help="the data set it was trained on, as a check")
    add(command, "out", metavar="DIR", help="folder for the results (beside each checkpoint)")
    add_machine_options(command)

    command = commands.add_parser("table", help="compare all models", allow_abbrev=False)
    command.set_defaults(run_command=table_command)
    add_config_options(command, preset="small", dataset="digits")
    add(
        command,
        "seeds",
        type=positive,
        default=3,
        metavar="N",
        help="runs per model, seeds 0, 1, ... (3)",
    )
    add(
        command,
        "models",
        nargs="+",
        default=list(results.ROWS),
        choices=list(MODELS),
        metavar="MODEL",
        help=f"of {', '.join(MODELS)} (all but ripple-local)",
    )
    command.add_argument(
        "--run",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train what no record covers (default), or only read the records",
    )
    add(command, "runs", default="runs", metavar="DIR", help="folder of the run records (runs)")
    table_folder = "reports/out/training"
    add(command, "out", default=table_folder, metavar="DIR", help=f"of the table ({table_folder})")
    add_machine_options(command)
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "train")
    args = make_parser().parse_args(arguments)
    try:
        args.run_command(args)
    except UserError as error:
        print(f"train_minimal.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what is finished is recorded", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
