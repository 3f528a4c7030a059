"""Train, evaluate and compare the vision transformers. Commands to copy:

    python train_minimal.py --dataset digits --preset small --attention_type hydra
    python train_minimal.py --attention_type ripple --dataset cifar100 --batch_size 128 \\
        --epochs 200 --lr 3e-4 --use_cuda_kernels
    python train_minimal.py --attention_type ripple --recipe strong --amp bf16 --compile
    python train_minimal.py --init_from runs/NAME/best.pt --attention_type linear --epochs 4
    python train_minimal.py --resume                         # the newest unfinished run goes on
    torchrun --nproc-per-node 4 train_minimal.py --attention_type ripple   # on several GPUs
    torchrun --nproc-per-node 4 train_minimal.py --sequence_parallel 2     # two for each image
    python train_minimal.py evaluate --checkpoint 'runs/*/best.pt'
    python train_minimal.py table                            # every model on the embedded digits
    python train_minimal.py table --dataset fashion-mnist    # the same on other data
    python train_minimal.py table --no-run                   # only from the records there are
    python train_minimal.py ablate --ripple_stages 1,2,3,4   # or --hydra_branches 2,4,6,8
    python train_minimal.py table --cluster HOST:6379        # the runs on a Ray cluster
    python train_minimal.py bench                            # images/s, with and without kernels
    python train_minimal.py profile                          # what a step spends its time on

``train`` is the default command. A run leaves run.json, best.pt and last.pt in its folder;
``table`` trains what is missing from those below --runs, prints the results table and writes it
as table.md, table.csv and table.json. It makes 25 runs, ``ablate`` 3 a value; on the digits each
took 23 to 106 s on two cores of a 2.5 GHz Xeon.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from linear_vit import screen
from linear_vit.bench.instruments.memory import is_out_of_memory
from linear_vit.bench.store import StoreError
from linear_vit.options import OptionError
from linear_vit.reports import tables
from linear_vit.reports.saved.runs import NoRuns
from linear_vit.training import breakdown, cluster, distributed, evaluation, experiments
from linear_vit.training.checkpoints import load_checkpoint, load_weights
from linear_vit.training.config import Config, build_model, model_settings
from linear_vit.training.data import datasets
from linear_vit.training.data.loader import Loader
from linear_vit.training.data.streams import stream
from linear_vit.training.errors import UserError, first_line, notice
from linear_vit.training.evaluation import check_usable
from linear_vit.training.finetune import Start
from linear_vit.training.logbook import Logbook
from linear_vit.training.metrics import predict
from linear_vit.training.options import (
    chosen_config,
    chosen_device,
    given_settings,
    make_parser,
    varied,
)
from linear_vit.training.record import check_writable, environment, finished_record
from linear_vit.training.runs import Runs, opened
from linear_vit.training.step import make_optimizer, make_scaler, training_step


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
    start: Start | None = None,
) -> dict[str, Any]:
    """Trains one model; leaves run.json, best.pt and last.pt in ``out``; returns the record.

    last.pt is written after every epoch, and after every ``checkpoint_every`` steps if that is not
    0. With ``resume``, a run goes on from it (and starts anew where there is none): however often
    it is killed, it ends, on a CPU, with the very weights of one that never was.
    With ``start``, the model begins with the weights of a run of another attention type.
    """
    init_from = start.path if start else None
    if resume and (done := finished_record(out, config, data.info.title, init_from=init_from)):
        return done
    model = build_model(config, data.info.classes).to(device)
    if start:
        start.put_into(model, config, data)
    distributed.shard_sequence(model)
    if config.compile:
        for part in model.blocks if distributed.uses_fsdp() else [model]:
            part.compile()
    network = distributed.parallel(model)  # the same, where there is one process
    optimizer = make_optimizer(model, lr=config.lr, weight_decay=config.weight_decay)
    scaler = make_scaler(config.amp, device)
    # Dropout; initial weights, order and augmentation have streams of their own.
    torch.manual_seed(stream("dropout", config.seed, distributed.rank()))
    book = Logbook(out, config, data, model, optimizer, scaler, checkpoint_every=checkpoint_every)
    if resume:
        book.take_up()
        if start:
            start.check_resumed(book.record, out)
    loader = Loader(config, data.train, data.info, device, start=book.done, workers=workers)
    warmup = round(config.warmup_epochs * loader.steps_per_epoch)
    val = data.val.images.to(device)
    if start and not book.done:
        book.began(start, predict(model, val, data.info, amp=config.amp))

    with book:
        for step, images, targets in book.steps(loader):
            lr = learning_rate(step, total=loader.steps, warmup=warmup, peak=config.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, hits = training_step(
                network,
                optimizer,
                images,
                targets,
                batch_size=loader.batch_size(step),
                scaler=scaler,
                **config.of_step,
            )
            book.step(loss, hits, lr)
            if book.epoch_ends:
                book.epoch(predict(model, val, data.info, amp=config.amp))
        if book.writes:
            # The best on validation images is tested, once; nothing is chosen by what comes out.
            # By this process alone, with a model that it has to itself.
            model = build_model(config, data.info.classes).to(device)
            load_weights(model, load_checkpoint(book.best), book.best)
            test = data.test.images.to(device)
            book.finish(predict(model, test, data.info, amp=config.amp))
    return book.record


# --- commands -------------------------------------------------------------------------------------


def train_command(args: argparse.Namespace) -> None:
    device = chosen_device(args.device)
    start = Start(Path(args.init_from)) if args.init_from else None
    config = chosen_config(args, start.settings(given_settings(args)) if start else None)
    name = config.run_name + (f"-from-{start.config.run_name}" if start else "")
    out = Path(args.out) if args.out else Path("runs") / name
    with distributed.processes(device, args.sequence_parallel, fsdp=args.fsdp):
        main = distributed.rank() == 0
        if args.resume and not args.out and not start:
            given = given_settings(args)
            found = experiments.to_resume(given, config, Path("runs")) if main else None
            config, out = distributed.gather(found)[0]
        elif main and (out / "last.pt").exists() and not args.resume:
            notice(f"{out}/last.pt will be overwritten; --resume would go on from it")
        elif main and args.resume and not (out / "last.pt").exists():
            notice(f"no {out}/last.pt to resume from: starting anew")
        check_usable(config, device)
        if main:
            check_writable(out)  # before a download, too
        with distributed.first_before_others():  # one download of what is missing is enough
            data = datasets.load_once(config.dataset, args.data_dir)
        how = {"resume": args.resume, "checkpoint_every": args.checkpoint_every, "start": start}
        record = train(config, data, out, device, workers=args.workers, **how)
        if main:
            screen.say(
                f"{data.info.title} {config.model}: test accuracy {record['test_accuracy']:.1%} "
                f"(weights of epoch {record['best_epoch']}, the best on validation images), "
                f"{record['images_per_second']:,.0f} images/s, {record['seconds']:.0f} s; see {out}"
            )


def evaluate_command(args: argparse.Namespace) -> None:
    device, paths, failed = chosen_device(args.device), evaluation.matching(args.checkpoint), 0
    for path in paths:
        out = Path(args.out) / path.parent.name if args.out else path.parent
        try:
            result = evaluation.evaluate(path, args.dataset, args.data_dir, out, device)
            screen.say(evaluation.describe(result))
        except UserError as error:
            if len(paths) == 1:
                raise
            notice(f"skipped: {error}")
            failed += 1
    if failed:
        raise UserError(
            f"{failed} of {screen.counted(len(paths), 'checkpoint')} could not be tested"
        )


def table_command(args: argparse.Namespace) -> None:
    out, device = Path(args.out), chosen_device(args.device)
    check_writable(out)
    with opened(args.runs) as runs:
        if args.run:
            models = [model_settings(name) for name in args.models]
            train_missing(args, experiments.by_seed(args.seeds, models), runs, device)
            configs = [chosen_config(args, seed=0, **model) for model in models]
            experiments.time_models(configs, runs, device, seconds=args.seconds)
        elif not runs.exists():
            raise UserError(f"no run records in {runs.folder}; leave out --no-run to train them")
        exponents = Path(args.exponents) if args.exponents else None
        ablations = Path(args.ablations)
        shown = tables.write_results(runs.folder, out, exponents=exponents, ablations=ablations)
        screen.say(shown)


def ablate_command(args: argparse.Namespace) -> None:
    out, device = Path(args.out), chosen_device(args.device)
    setting, values = varied(args)
    more = experiments.model_of(setting) if "attention_type" not in vars(args) else {}
    given = [{**more, setting: value} for value in values]
    experiments.check_varies(setting, [chosen_config(args, **one) for one in given])
    check_writable(out)
    with opened(args.runs) as runs:
        configs = train_missing(args, experiments.by_seed(args.seeds, given), runs, device)
        speeds = []  # those of the runs
        if args.seconds > 0:
            how = {"seconds": args.seconds}
            speeds = [experiments.time_values(setting, configs, runs, device, **how)]
        found = [asdict(config) for config in configs]
        where = environment(device)
        shown = tables.write_ablation(
            setting, found, runs.folder, out, environment=where, speeds=speeds
        )
        screen.say(shown)


def train_missing(
    args: argparse.Namespace, given: list[dict[str, Any]], runs: Runs, device: torch.device
) -> list[Config]:
    """Trains what no finished record below --runs covers; all that was asked for."""
    runs.check()
    configs = [chosen_config(args, **more) for more in given]

    def load(name: str) -> datasets.Dataset:
        return datasets.load_once(name, args.data_dir)

    left = experiments.missing(configs, runs.folder, device, lambda name: load(name).info.title)
    if args.cluster is not None:
        one = "linear_vit.train_minimal:train_one"  # for other processes to import
        how = {"address": args.cluster, "workers": args.workers}
        cluster.train_all(one, left, load, runs, device, **how)
    else:
        for number, config in enumerate(left, 1):
            screen.say(f"run {number} of {len(left)}: {config.title}")
            train_one(runs, args.workers, config, load(config.dataset), device)
    runs.read()
    return configs


def train_one(
    runs: Runs, workers: int | None, config: Config, data: datasets.Dataset, device: torch.device
) -> dict[str, Any]:
    """Trains one of many in its own folder, where another process may have done it meanwhile."""
    with runs.run(config.run_name) as out:
        for run in experiments.recorded([config], out, device, lambda _: data.info.title).values():
            return run
        # A finished record of another machine is no state to go on from.
        resume = not finished_record(out, config)
        return train(config, data, out, device, resume=resume, workers=workers)


def bench_command(args: argparse.Namespace) -> None:
    out, device = Path(args.out), chosen_device(args.device)
    check_writable(out)
    configs = [chosen_config(args, **model_settings(name)) for name in args.models]
    saved = experiments.time_backends(configs, args.backends, out, device, seconds=args.seconds)
    screen.say(tables.write_steps(saved, out))


def profile_command(args: argparse.Namespace) -> None:
    out, device = Path(args.out), chosen_device(args.device)
    check_writable(out)
    configs = [chosen_config(args, **model_settings(name)) for name in args.models]
    saved = breakdown.write(configs, out, device, steps=args.steps, workers=args.workers)
    screen.say(tables.write_breakdown(saved, out))


@screen.command
def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "train")
    args = make_parser(__doc__).parse_args(arguments)
    commands = {
        "train": train_command,
        "evaluate": evaluate_command,
        "table": table_command,
        "ablate": ablate_command,
        "bench": bench_command,
        "profile": profile_command,
    }
    try:
        if args.command != "train" and distributed.local_rank() is not None:
            raise UserError(f"torchrun is for train; {args.command} runs in one process")
        commands[args.command](args)
    except BrokenPipeError:
        raise
    except (UserError, NoRuns, OptionError, StoreError, OSError) as error:  # a full disk, say
        screen.say(f"train_minimal.py: error: {error}", sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        text = f"train_minimal.py: error: out of memory: {first_line(error)}"
        screen.say(text, sys.stderr)
        return 2
    except KeyboardInterrupt:
        screen.say("stopped; what is finished is recorded, and --resume goes on", sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
