"""Train, evaluate and compare the three vision transformers. Commands to copy:

    python train_minimal.py --dataset digits --preset small --attention_type hydra
    python train_minimal.py --attention_type ripple --dataset cifar100 --batch_size 128 \\
        --epochs 200 --lr 3e-4 --use_cuda_kernels
    python train_minimal.py --attention_type ripple --recipe strong --amp bf16 --compile
    python train_minimal.py --resume                         # go on where a killed run was
    torchrun --nproc-per-node 4 train_minimal.py --attention_type ripple   # on several GPUs
    python train_minimal.py evaluate --checkpoint 'runs/*/best.pt'
    python train_minimal.py table                            # every model on the embedded digits
    python train_minimal.py table --dataset fashion-mnist    # the same on other data
    python train_minimal.py table --no-run                   # only from the records there are
    python train_minimal.py ablate --ripple_stages 1,2,3,4   # or --hydra_branches 2,4,6,8
    python train_minimal.py bench                            # images/s, with and without kernels
    python train_minimal.py profile                          # what a step spends its time on

``train`` is the default command. A run leaves run.json, best.pt and last.pt in its folder;
``table`` trains what is missing from those below --runs, prints the results table and writes it
as table.md, table.csv and table.json.
"""

import argparse
import dataclasses
import glob
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from linear_vit.bench.instruments.clock import measure_interleaved
from linear_vit.training import ablation, board, breakdown, distributed, evaluation, results, speed
from linear_vit.training.checkpoints import (
    load_checkpoint,
    load_for_resume,
    load_weights,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from linear_vit.training.clock import StepClock, median_images_per_second
from linear_vit.training.config import (
    DATASETS,
    MODELS,
    PRESETS,
    RECIPES,
    Config,
    build_model,
    model_settings,
    resolve,
)
from linear_vit.training.data import datasets
from linear_vit.training.data.augmentation import torchvision_v2
from linear_vit.training.data.loader import Loader
from linear_vit.training.errors import UserError
from linear_vit.training.metrics import accuracy, predict
from linear_vit.training.progress import Progress
from linear_vit.training.record import (
    SCHEMA,
    check_writable,
    environment,
    read_runs,
    remove_leftovers,
    write_json,
    write_text,
)
from linear_vit.training.step import make_optimizer, make_scaler, step_of, training_step
from linear_vit.training.streams import stream

WARMUP_STEPS = 5  # steps left out of images/s: they allocate, compile and fill caches


def learning_rate(step: int, *, total: int, warmup: int, peak: float) -> float:
    """Linear warm-up to ``peak`` over ``warmup`` steps, then half a cosine to 0 at ``total``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def train(
    config: Config,
    data: datasets.Dataset,
    out: Path,
    device: torch.device,
    *,
    resume: bool = False,
    checkpoint_every: int = 0,
    workers: int | None = None,
) -> dict[str, Any]:
    """Trains one model; leaves run.json, best.pt and last.pt in ``out``; returns the record.

    last.pt is written after every epoch, and after every ``checkpoint_every`` steps if that is not
    0. With ``resume``, a run goes on from it (and starts anew where there is none): however often
    it is killed, it ends, on a CPU, with the very weights of one that never was.
    """
    last, best = out / "last.pt", out / "best.pt"
    main = distributed.rank() == 0  # the process that writes
    if main:
        check_writable(out)
        remove_leftovers(out)
    if resume and (finished := finished_record(out, config)):
        return finished
    saved = load_for_resume(last, config) if resume and last.exists() else None

    model = build_model(config).to(device)
    if config.compile:
        model.compile()
    network = distributed.parallel(model)
    optimizer = make_optimizer(model, lr=config.lr, weight_decay=config.weight_decay)
    scaler = make_scaler(config.amp, device)
    # Dropout; initial weights, order and augmentation have streams of their own.
    torch.manual_seed(stream("dropout", config.seed, distributed.rank()))
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "status": "running",
        "config": dataclasses.asdict(config),
        "model": config.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "environment": environment(device),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed": 0,
        "train_accuracy_is": "lambda-weighted" if RECIPES[config.recipe].mixes else "plain",
        "epochs": [],
        "seconds": 0.0,
        "peak_memory": None,
    }
    history: dict[str, list[float]] = {"loss": [], "hits": [], "seconds": [], "images": []}
    start = 0
    if saved is not None:
        start = saved["step"]
        load_weights(model, saved, last)
        optimizer.load_state_dict(saved["optimizer"])
        if scaler is not None:
            scaler.load_state_dict(saved["scaler"])
        if len(saved["rng"]) == distributed.world():  # else other dropout, of the same rate
            set_rng_state(saved["rng"][distributed.rank()], device)
        history = {name: values.tolist() for name, values in saved["history"].items()}
        record |= saved["progress"]
        record["resumed"] += 1
    loader = Loader(config, data.train, data.info, device, start=start, workers=workers)
    val, test = data.val.to(device), data.test
    epoch_steps, total = loader.steps_per_epoch, loader.steps
    warmup = round(config.warmup_epochs * epoch_steps)
    # Reading the loss waits for the device, and for other processes, so not at every step.
    read_every = 10 if device.type == "cpu" and distributed.world() == 1 else 50

    writer = board.open_board(out, epochs_done=len(record["epochs"])) if main else None
    if writer is not None and start == 0:
        board.add_graph(writer, model, tuple(data.train.images.shape[1:]))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter() - record["seconds"]
    clock, unread = StepClock(device), []  # of the steps since the last reading
    checkpoint = f"{last} (step {start})" if saved else None
    progress = Progress(
        f"{config.dataset} {config.model}",
        config.epochs,
        epoch_steps,
        start=start,
        accuracy="train (λ-weighted)" if RECIPES[config.recipe].mixes else "train",
        silent=not main,
    )
    try:
        with progress:
            batches = iter(loader)
            for step in range(start, total):
                clock.start()
                images, targets = next(batches)
                lr = learning_rate(step, total=total, warmup=warmup, peak=config.lr)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                loss, hits = training_step(
                    network,
                    optimizer,
                    images,
                    targets,
                    amp=config.amp,
                    label_smoothing=config.label_smoothing,
                    clip=config.clip,
                    accumulate=config.accumulate,
                    batch_size=loader.batch_size(step),
                    scaler=scaler,
                )
                clock.stop()
                unread.append(torch.stack([loss.double(), hits.double()]))

                done = step + 1
                epoch_ends = done % epoch_steps == 0
                saves = epoch_ends or (checkpoint_every > 0 and done % checkpoint_every == 0)
                if not saves and len(unread) < read_every:
                    continue
                losses, counts = distributed.total(torch.stack(unread, dim=1)).tolist()
                history["loss"] += losses
                history["hits"] += counts
                history["seconds"] += clock.seconds()
                history["images"] += [loader.batch_size(s) for s in range(done - len(losses), done)]
                clock, unread = StepClock(device), []
                check_finite(losses, first_step=done - len(losses), lr=lr, checkpoint=checkpoint)
                of_epoch = {
                    name: values[step // epoch_steps * epoch_steps :]
                    for name, values in history.items()
                }
                summary = {
                    "loss": sum(of_epoch["loss"]) / len(of_epoch["loss"]),
                    "train_accuracy": sum(of_epoch["hits"]) / sum(of_epoch["images"]),
                    "images_per_second": median_images_per_second(
                        of_epoch["seconds"],
                        of_epoch["images"],
                        skip=WARMUP_STEPS if step < epoch_steps else 0,
                    ),
                }
                progress.steps(
                    done,
                    summary["loss"],
                    summary["train_accuracy"],
                    summary["images_per_second"],
                )

                names = [last]
                if epoch_ends:
                    predictions = predict(model, val.images, data.info, amp=config.amp)
                    entry: dict[str, Any] = {
                        "epoch": done // epoch_steps,
                        "lr": lr,
                        **summary,
                        "images": sum(of_epoch["images"]),
                        "val_accuracy": accuracy(predictions, val.labels),
                        "seconds": sum(of_epoch["seconds"]),
                    }
                    before = [other["val_accuracy"] for other in record["epochs"]]
                    if entry["val_accuracy"] > max(before, default=-1.0):
                        record["best_epoch"] = entry["epoch"]
                        names = [best, last]
                    record["epochs"].append(entry)
                    progress.epoch(entry)
                    if writer is not None:
                        board.add_curves(writer, entry)
                    if writer is not None and entry["epoch"] in (1, config.epochs):
                        shown = val.images[:16], val.labels[:16], predictions[:16]
                        board.add_predictions(
                            writer, *shown, data.class_names, data.info, entry["epoch"]
                        )
                if saves:
                    record["seconds"] = time.perf_counter() - begin
                    record["peak_memory"] = peak_memory(device, record["peak_memory"])
                    kept = ("started", "resumed", "epochs", "best_epoch", "seconds", "peak_memory")
                    state = {
                        "optimizer": optimizer.state_dict(),
                        "scaler": scaler.state_dict() if scaler is not None else None,
                        "step": done,
                        "epoch": done // epoch_steps,
                        "rng": distributed.gather(rng_state(device)),
                        "history": {
                            name: torch.tensor(values, dtype=torch.float64)
                            for name, values in history.items()
                        },
                        "progress": {name: record[name] for name in kept if name in record},
                    }
                    for path in names if main else []:
                        save_checkpoint(path, model, config, **state)
                    if main:
                        write_json(out / "run.json", record)
                    checkpoint = f"{last} (step {done})"
        if main:
            # The best on validation images is tested, once; nothing is chosen by what comes out.
            load_weights(model, load_checkpoint(best), best)
            predictions = predict(model, test.images.to(device), data.info, amp=config.amp)
            record["images_per_second"] = median_images_per_second(
                history["seconds"], history["images"], skip=WARMUP_STEPS
            )
            record["test_accuracy"] = accuracy(predictions.cpu(), test.labels)
            record["seconds"] = time.perf_counter() - begin
            record["status"] = "finished"
            write_json(out / "run.json", record)
        distributed.wait_for_all()
    except BaseException as error:
        failure = out_of_memory(error, config) or error
        stopped = isinstance(failure, KeyboardInterrupt)
        record["status"] = "interrupted" if stopped else "failed"
        record["error"] = str(failure) or type(failure).__name__
        if main:
            with suppress(UserError):  # a full disk, say: what went wrong first is what counts
                write_json(out / "run.json", record)
        raise failure from error if failure is not error else None
    finally:
        if writer is not None:
            writer.close()
    return record


def finished_record(out: Path, config: Config) -> dict[str, Any] | None:
    """The record of a finished run of just this configuration, if ``out`` holds one."""
    for run in read_runs(out)[0]:
        if run["status"] == "finished" and run["config"] == dataclasses.asdict(config):
            return run
    return None


def check_usable(config: Config, device: torch.device) -> None:
    """UserError, before data is read, for sizes that don't fit or a backend that can't run."""
    model = build_model(config).to(device)
    if RECIPES[config.recipe].per_image:
        torchvision_v2()
    if config.backend is not None:
        info = DATASETS[config.dataset]
        try:
            predict(model, torch.zeros(1, info.channels, *model.img_size, device=device), info)
        except ValueError as error:
            raise UserError(str(error)) from error


def check_finite(
    losses: list[float], *, first_step: int, lr: float, checkpoint: str | None
) -> None:
    """Stops a run whose loss is no longer a number, naming the step and what to go back to."""
    for step, loss in enumerate(losses, first_step + 1):
        if not math.isfinite(loss):
            back = "there is no checkpoint yet"
            if checkpoint is not None:
                back = f"the last good checkpoint is {checkpoint}"
            raise UserError(
                f"the loss or its gradient became {loss} at step {step} (learning rate {lr:.2g}): "
                f"training stopped; {back}; try a smaller --lr"
            )


def out_of_memory(error: BaseException, config: Config) -> UserError | None:
    """What to do where memory ran out; None for any other error."""
    text = str(error)
    cpu = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text
    )
    if not cpu and not isinstance(error, torch.OutOfMemoryError):
        return None
    size = DATASETS[config.dataset].image_size
    smaller = max(1, config.batch_size // 2)
    return UserError(
        f"out of memory: a batch of {config.batch_size} images of {size}x{size} did not fit with "
        f"the {config.model} model of dim {config.dim}, depth {config.depth} and {config.heads} "
        f"heads ({(text.splitlines() or ['no memory'])[0]:.120}); try --batch_size {smaller}, or "
        f"--accumulate {2 * config.accumulate}, which keeps the batch and its result"
    )


def peak_memory(device: torch.device, before: int | None) -> int | None:
    """Most bytes of tensors on a CUDA device, in this process or the resumed ones before."""
    if device.type != "cuda":
        return None
    return max(torch.cuda.max_memory_allocated(device), before or 0)


# --- commands -------------------------------------------------------------------------------------


def train_command(args: argparse.Namespace) -> None:
    device = chosen_device(args.device)
    config = chosen_config(args)
    out = Path(args.out) if args.out else Path("runs") / config.run_name
    with distributed.processes(device):
        main = distributed.rank() == 0
        if main and (out / "last.pt").exists() and not args.resume:
            board.notice(f"{out}/last.pt will be overwritten; --resume would go on from it")
        if main and args.resume and not (out / "last.pt").exists():
            board.notice(f"no {out}/last.pt to resume from: starting anew")
        check_usable(config, device)
        if not main:
            distributed.wait_for_all()  # until rank 0 has downloaded what is missing
        data = datasets.load_once(config.dataset, args.data_dir)
        if main:
            distributed.wait_for_all()
        record = train(
            config,
            data,
            out,
            device,
            resume=args.resume,
            checkpoint_every=args.checkpoint_every,
            workers=args.workers,
        )
        if main:
            print(
                f"{config.dataset} {config.model}: test accuracy {record['test_accuracy']:.1%} "
                f"(weights of epoch {record['best_epoch']}, the best on validation images), "
                f"{record['images_per_second']:,.0f} images/s, {record['seconds']:.0f} s; see {out}"
            )


def evaluate_command(args: argparse.Namespace) -> None:
    device = chosen_device(args.device)
    for path in matching(args.checkpoint):
        content = load_checkpoint(path)
        out = Path(args.out) / path.parent.name if args.out else path.parent
        result = evaluation.evaluate(
            content, path, args.dataset, args.data_dir, out, device, notice=board.notice
        )
        print(evaluation.describe(result))


def matching(patterns: Sequence[str]) -> list[Path]:
    """Files named, or matched by a glob that no shell expanded, each once."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        paths = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not paths and glob.has_magic(pattern):
            raise UserError(f"no checkpoint matches {pattern}; a training run leaves best.pt")
        found |= dict.fromkeys(map(Path, paths or [pattern]))
    return list(found)


def table_command(args: argparse.Namespace) -> None:
    folder, out, device = Path(args.runs), Path(args.out), chosen_device(args.device)
    check_writable(out)
    if args.run:
        configs = [
            chosen_config(args, seed=seed, **model_settings(name))
            for seed in range(args.seeds)
            for name in args.models[:: 1 if seed % 2 == 0 else -1]
        ]
        run_missing(args, configs, folder, device)
        compare_speeds(args, folder, device)
    elif not folder.is_dir():
        raise UserError(f"no folder {folder} of run records; leave out --no-run to train them")
    speeds, skipped = speed.read_models(folder)
    for line in skipped:
        board.notice(line)
    table = results.make_table(
        finished_runs(folder),
        speeds=speeds,
        exponents=results.read_exponents(Path(args.exponents) if args.exponents else None),
        ablations=ablation.read(Path(args.ablations)),
    )
    markdown = results.to_markdown(table)
    write_json(out / "table.json", table)
    write_text(out / "table.md", markdown)
    write_text(out / "table.csv", results.to_csv(table))
    print(f"\n{markdown}\nwritten to {out}/table.md, table.csv and table.json")


def ablate_command(args: argparse.Namespace) -> None:
    folder, out, device = Path(args.runs), Path(args.out), chosen_device(args.device)
    check_writable(out)
    varied = [name for name, value in vars(args).items() if isinstance(value, Listed)]
    if len(varied) != 1:
        raise UserError(
            "ablate varies one setting: give one option a list of values, as in "
            f"--ripple_stages 1,2,3,4 (got {', '.join(varied) or 'no list'})"
        )
    [name] = varied
    values = list(getattr(args, name))
    more: dict[str, Any] = {}
    if "attention_type" not in vars(args) and name in ablation.MODEL_OF:
        more["attention_type"] = ablation.MODEL_OF[name]
    configs = [
        chosen_config(args, **{**more, "seed": seed, name: value})
        for seed in range(args.seeds)
        for value in values[:: 1 if seed % 2 == 0 else -1]
    ]
    run_missing(args, configs, folder, device)
    speeds = {}
    if args.seconds > 0:
        print(f"training steps of {name} {', '.join(map(str, values))}, by turns")
        of_value = {getattr(c, name): dataclasses.replace(c, seed=0) for c in configs}
        steps = {value: step_of(config, device) for value, config in of_value.items()}
        timings = measure_interleaved(steps, device, budget_s=args.seconds)
        speeds = {v: speed.rate(c.batch_size, timings[v]) for v, c in of_value.items()}
    machine = environment(device)
    found = ablation.summarise(name, configs, finished_runs(folder), machine, speeds)
    write_json(out / f"ablation-{name}.json", found)
    write_text(out / f"ablation-{name}.csv", ablation.to_csv(found))
    markdown = ablation.to_markdown(found)
    write_text(out / f"ablation-{name}.md", markdown)
    try:
        ablation.plot(found, out / f"ablation-{name}.svg")
    except ImportError as error:
        board.notice(f"no plot ({error}): pip install matplotlib")
    print(f"\n{markdown}\nwritten to {out}/ablation-{name}.md, .csv, .json and .svg")


def run_missing(
    args: argparse.Namespace, configs: list[Config], folder: Path, device: torch.device
) -> None:
    """Trains every configuration that no finished record covers, and finishes interrupted ones.

    All models of a seed run next to each other, in alternating order, so that a machine that
    drifts (heat, neighbours) does so for all alike: speed-ups compare within a seed.
    """
    for config in dict.fromkeys(dataclasses.replace(config, seed=0) for config in configs):
        check_usable(config, device)
    machine = environment(device)
    done = [
        run["config"]
        for run in finished_runs(folder)
        if all(run["environment"].get(key) == machine[key] for key in results.MACHINE)
    ]
    missing = [config for config in configs if dataclasses.asdict(config) not in done]
    if len(missing) < len(configs):
        print(f"{len(configs) - len(missing)} of {len(configs)} runs are recorded in {folder}")
    for number, config in enumerate(missing, 1):
        print(f"run {number} of {len(missing)}: {config.dataset} {config.model} seed {config.seed}")
        data = datasets.load_once(config.dataset, args.data_dir)
        # A finished record of another machine is no state to go on from.
        out = folder / config.run_name
        resume = not finished_record(out, config)
        train(config, data, out, device, resume=resume, workers=args.workers)


def compare_speeds(args: argparse.Namespace, folder: Path, device: torch.device) -> None:
    """Training steps of the table's models by turns, in a record beside the runs, if it is missing.

    Runs are minutes apart, so what their own images/s say of two models is also what the machine
    did meanwhile.
    """
    configs = [chosen_config(args, seed=0, **model_settings(name)) for name in args.models]
    names = [config.model for config in configs]
    path = speed.models_path(folder, configs[0])
    wanted = {"config": dataclasses.asdict(configs[0]), "environment": environment(device)}
    for known in speed.read_models(folder)[0]:
        same = results.common(known) == results.common(wanted)
        if same and set(names) <= set(known["models"]):
            return
    print(f"training steps of {', '.join(names)}, by turns")
    steps = {config.model: step_of(config, device) for config in configs}
    timings = measure_interleaved(steps, device, budget_s=args.seconds)
    write_json(path, speed.summarise_models(configs, timings, device))


def finished_runs(folder: Path) -> list[dict[str, Any]]:
    """Records of finished runs below a folder; a line on stderr for each file that is none."""
    runs, skipped = read_runs(folder)
    for line in skipped:
        board.notice(line)
    return [run for run in runs if run["status"] == "finished"]


def bench_command(args: argparse.Namespace) -> None:
    out, device = Path(args.out), chosen_device(args.device)
    check_writable(out)
    configs = [chosen_config(args, **model_settings(name)) for name in args.models]
    backends = [speed.PYTORCH, *speed.OWN] if args.backends is None else args.backends
    steps: dict[tuple[str, str], Callable[[], None]] = {}
    reasons: dict[tuple[str, str], str] = {}
    for config in configs:
        usable, unusable = speed.prepare(config, backends, device)
        steps |= {(config.model, name): step for name, step in usable.items()}
        reasons |= {(config.model, name): why for name, why in unusable.items()}
    # By turns, so that a machine that drifts does so for all alike.
    calls = {" ".join(case): step for case, step in steps.items()}
    timings = measure_interleaved(calls, device, budget_s=args.seconds)
    timed = {case: timings[" ".join(case)] for case in steps}
    measured = speed.summarise(configs, timed, reasons, device)
    write_json(out / "step-speed.json", measured)
    markdown = speed.to_markdown(measured)
    write_text(out / "step-speed.md", markdown)
    print(f"\n{markdown}\nwritten to {out}/step-speed.md and .json")


def profile_command(args: argparse.Namespace) -> None:
    out, device = Path(args.out), chosen_device(args.device)
    check_writable(out)
    configs = [chosen_config(args, **model_settings(name)) for name in args.models]
    measured = breakdown.measure(configs, device, steps=args.steps, workers=args.workers)
    write_json(out / "step-breakdown.json", measured)
    markdown = breakdown.to_markdown(measured)
    write_text(out / "step-breakdown.md", markdown)
    print(f"\n{markdown}\nwritten to {out}/step-breakdown.md and .json")


# --- command line ---------------------------------------------------------------------------------


def chosen_config(args: argparse.Namespace, **more: Any) -> Config:
    """The configuration of what was given explicitly (and ``more``), preset and defaults."""
    names = {field.name for field in dataclasses.fields(Config)}
    given = {name: value for name, value in vars(args).items() if name in names}
    if given.get("amp") is None:
        given["amp"] = "bf16" if chosen_device(args.device).type == "cuda" else "off"
    if args.use_cuda_kernels:
        if given.get("backend", "cuda") != "cuda":
            raise UserError(f"--use_cuda_kernels and --backend {given['backend']}: give one")
        given["backend"] = "cuda"
    return resolve({**given, **more})


def chosen_device(name: str | None) -> torch.device:
    rank = distributed.local_rank()
    if name is None and rank is not None and torch.cuda.is_available():
        name = f"cuda:{rank}"
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
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


class Listed(tuple):
    """Several values of one option, as ``ablate`` takes them: 1,2,3,4."""


def listed(kind: Any) -> Any:
    """An argparse type: one value of ``kind``, or with commas a Listed of them."""

    def parse(text: str) -> Any:
        return Listed(map(kind, text.split(","))) if "," in text else kind(text)

    parse.__name__ = kind.__name__  # argparse's message says "invalid int value"
    return parse


def add(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """An option in both spellings, --batch_size and --batch-size."""
    parser.add_argument(f"--{name}", *{f"--{name.replace('_', '-')}"} - {f"--{name}"}, **options)


def add_config_options(
    parser: argparse.ArgumentParser, *, preset: str, dataset: str, lists: bool = False
) -> None:
    """The fields of Config that a command shares. One that is not given stays absent, so that
    presets can fill it. With ``lists``, an option takes several values, separated by commas."""
    unset = argparse.SUPPRESS
    text = f"{', '.join(DATASETS)} (default {dataset})"
    add(parser, "dataset", default=dataset, metavar="NAME", help=text)
    text = f"{', '.join(PRESETS)} (default {preset}); below, in brackets, are the values of full"
    add(parser, "preset", default=preset, metavar="NAME", help=text)
    options: list[tuple[str, Any, str]] = [
        ("recipe", str, f"of augmentation: {', '.join(RECIPES)} (seed)"),
        ("dim", int, "embedding dimension (384)"),
        ("depth", int, "number of blocks (12)"),
        ("heads", int, "attention heads; not used by hydra (dim / 64)"),
        ("mlp_dim", int, "hidden dimension of the MLP (4 * dim)"),
        ("patch_size", int, "side of a patch in pixels (4; digits: 1)"),
        ("ripple_stages", int, "halvings of the token grid, ripple only (3)"),
        ("hydra_branches", int, "query branches, hydra only (4)"),
        ("dropout", float, "rate (0.1)"),
        ("drop_path", float, "rate of stochastic depth (0; strong: 0.1)"),
        ("batch_size", int, "images per step, over all processes (128)"),
        ("accumulate", int, "parts that a process's share of a batch is worked through in (1)"),
        ("epochs", int, "passes over the training images (200)"),
        ("lr", float, "peak of the learning rate (3e-4; strong: 1e-3)"),
        ("weight_decay", float, "of AdamW, on the matrices of linear layers (0.05)"),
        ("warmup_epochs", float, "linear warm-up (10 of 200, in proportion)"),
        ("label_smoothing", float, "(0.1)"),
        ("clip", float, "greatest norm of the gradient (1.0)"),
        ("backend", str, "of the kernels (the fastest usable one)"),
    ]
    for name, kind, text in options:
        metavar = {int: "N", float: "X", str: "NAME"}[kind]
        parse = listed(kind) if lists else kind
        add(parser, name, type=parse, default=unset, metavar=metavar, help=text)
    text = "the CUDA C++ kernels: --backend cuda"
    add(parser, "use_cuda_kernels", action="store_true", help=text)
    text = "autocast (bf16 on CUDA, off on a CPU); fp16 scales its loss"
    add(parser, "amp", choices=("bf16", "fp16", "off"), help=text)
    text = "compile the model with torch.compile"
    add(parser, "compile", action="store_true", default=unset, help=text)
    add(parser, "device", help="cpu, cuda or cuda:NUMBER (cuda where there is one)")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which of the models, for the commands that are about one."""
    text = "baseline, ripple or hydra (ripple)"
    add(parser, "attention_type", default=argparse.SUPPRESS, metavar="NAME", help=text)
    text = "add a depthwise 3x3 to the attention"
    add(parser, "local_branch", action="store_true", default=argparse.SUPPRESS, help=text)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    text = "where data sets are, or go to (data)"
    add(parser, "data_dir", default="data", metavar="DIR", help=text)


def add_workers(parser: argparse.ArgumentParser) -> None:
    text = "processes that augment images (0 on a CPU; all cores but one for CUDA)"
    add(parser, "workers", type=natural, metavar="N", help=text)


def add_models(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    text = f"of {', '.join(MODELS)} ({', '.join(default)})"
    known = list(MODELS)
    add(parser, "models", nargs="+", default=default, choices=known, metavar="MODEL", help=text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, allow_abbrev=False)
        made.set_defaults(run_command=run)
        return made

    made = command("train", train_command, "train one model (default)")
    add_config_options(made, preset="full", dataset="cifar100")
    add_model_options(made)
    add(made, "seed", type=int, default=argparse.SUPPRESS, metavar="N", help="(0)")
    text = "folder of the run (runs/ and a name that follows from the settings)"
    add(made, "out", metavar="DIR", help=text)
    add(made, "resume", action="store_true", help="go on from the folder's last.pt")
    text = "write last.pt after so many steps too, not only after each epoch (0: not)"
    add(made, "checkpoint_every", type=natural, default=0, metavar="N", help=text)
    add_data_options(made)
    add_workers(made)

    made = command("evaluate", evaluate_command, "test saved models")
    text = "best.pt files, or a quoted glob of them"
    add(made, "checkpoint", nargs="+", required=True, metavar="FILE", help=text)
    add(made, "dataset", metavar="NAME", help="the data set it was trained on, as a check")
    add(made, "out", metavar="DIR", help="folder for the results (beside each checkpoint)")
    add(made, "device", help="cpu, cuda or cuda:NUMBER (cuda where there is one)")
    add_data_options(made)

    made = command("table", table_command, "compare all models")
    add_config_options(made, preset="small", dataset="digits")
    text = "runs per model, seeds 0, 1, ... (5)"
    add(made, "seeds", type=positive, default=5, metavar="N", help=text)
    add_models(made, results.ROWS)
    made.add_argument(
        "--run",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train what no record covers (default), or only read the records",
    )
    add(made, "runs", default="runs", metavar="DIR", help="folder of the run records (runs)")
    folder = "reports/out/training"
    add(made, "out", default=folder, metavar="DIR", help=f"of the table ({folder})")
    text = "exponents.csv of measured complexity (found in reports/ where it is not given)"
    add(made, "exponents", metavar="FILE", help=text)
    text = "folder of ablation-*.json (reports/out/ablation)"
    add(made, "ablations", default="reports/out/ablation", metavar="DIR", help=text)
    text = "to spend on each model where their training steps are timed by turns (5)"
    add(made, "seconds", type=float, default=5.0, metavar="X", help=text)
    add_data_options(made)
    add_workers(made)

    made = command("ablate", ablate_command, "vary one setting: --ripple_stages 1,2,3,4")
    add_config_options(made, preset="small", dataset="digits", lists=True)
    add_model_options(made)
    text = "runs per value, seeds 0, 1, ... (3)"
    add(made, "seeds", type=positive, default=3, metavar="N", help=text)
    folder = "reports/out/ablation"
    add(made, "runs", default=f"{folder}/runs", metavar="DIR", help=f"({folder}/runs)")
    add(made, "out", default=folder, metavar="DIR", help=f"of table and plot ({folder})")
    text = "to spend on timing each value's training step by turns; 0: images/s of the runs (5)"
    add(made, "seconds", type=float, default=5.0, metavar="X", help=text)
    add_data_options(made)
    add_workers(made)

    folder = "reports/out/training"
    made = command("bench", bench_command, "time training steps, with and without own kernels")
    add_config_options(made, preset="small", dataset="fashion-mnist")
    add_models(made, results.ROWS)
    text = "such as torch,compiled,cuda (torch and the own ones)"
    add(made, "backends", type=lambda text: text.split(","), metavar="LIST", help=text)
    text = "to spend on each model and backend (3)"
    add(made, "seconds", type=float, default=3.0, metavar="X", help=text)
    add(made, "out", default=folder, metavar="DIR", help=f"({folder})")

    made = command("profile", profile_command, "what a training step spends its time on")
    add_config_options(made, preset="small", dataset="fashion-mnist")
    add_models(made, results.ROWS)
    add(made, "steps", type=positive, default=10, metavar="N", help="steps to take the median of")
    add(made, "out", default=folder, metavar="DIR", help=f"({folder})")
    add_workers(made)
    return parser


def positive(text: str) -> int:
    return at_least(1, text)


def natural(text: str) -> int:
    return at_least(0, text)


def at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "train")
    args = make_parser().parse_args(arguments)
    try:
        if args.command != "train" and distributed.local_rank() is not None:
            raise UserError(f"torchrun is for train; {args.command} runs in one process")
        args.run_command(args)
    except UserError as error:
        print(f"train_minimal.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what is finished is recorded, and --resume goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
