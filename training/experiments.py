"""Many runs: which are missing from a folder of records, and the speed of steps by turns."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from linear_vit.screen import counted, say
from linear_vit.training.checkpoints import differences, load_checkpoint
from linear_vit.training.config import OPTIONS, Config, digest, ignored
from linear_vit.training.errors import UserError, notice
from linear_vit.training.evaluation import check_usable
from linear_vit.training.record import (
    environment,
    finished_record,
    lock,
    read_runs,
    same_machine,
    unlock,
)
from linear_vit.training.runs import Runs
from linear_vit.training.steps import compared_backends, step_case, time_steps, were_timed

_MOST_LISTED = 5


def to_resume(given: Mapping[str, Any], config: Config, folder: Path) -> tuple[Config, Path]:
    """The run below ``folder`` to go on with: its configuration, and its own folder.

    It is the newest of the unfinished ones that have all ``given`` settings, and before these the
    one of just this ``config``, if anything was given. One that is finished is as good, if there is
    no other. Raises UserError, with what differs in each, where no run has these settings.
    """
    here, asked = folder / config.run_name, dataclasses.asdict(config)
    left = _unfinished(folder)
    agree = {path: run for path, run in left.items() if not differences(run, given)}
    exact = [path for path, run in agree.items() if given and run == asked]
    for path in [*exact, *agree][:1]:
        others = f"; {len(agree) - 1} more with --out" if len(agree) > 1 else ""
        notice(f"going on with {path}, the newest unfinished run of these settings{others}")
        return Config(**agree[path]), path
    if finished_record(here, config):
        return config, here
    runs = [f"{path} has {differences(run, given)}" for path, run in left.items()]
    found = "; ".join(runs[:_MOST_LISTED]) or f"none below {folder} is unfinished"
    more = f" (and {len(runs) - _MOST_LISTED} more)" if len(runs) > _MOST_LISTED else ""
    raise UserError(
        f"no run to resume: {found}{more}; leave out --resume to start one, or give --out the "
        "folder of one"
    )


def _unfinished(folder: Path) -> dict[Path, dict[str, Any]]:
    """Folders with a last.pt of a run that has not ended, the newest first, and its settings."""
    found = {}
    for last in sorted(folder.rglob("last.pt"), key=lambda path: -path.stat().st_mtime):
        runs, _ = read_runs(last.parent)
        run = runs.get(last.with_name("run.json"))
        if run and run["status"] == "finished":
            continue
        try:
            config = Config(**run["config"]) if run else load_checkpoint(last)["config"]
            unlock(lock(last.parent))
            found[last.parent] = dataclasses.asdict(config)
        except (UserError, TypeError) as error:  # damaged, or being trained
            notice(f"skipped {last}: {error}")
    return found


def model_of(setting: str) -> dict[str, Any]:
    """The model that a setting is of alone, as a setting."""
    models = OPTIONS[setting].models
    return {"attention_type": models[0]} if len(models) == 1 else {}


def check_varies(setting: str, configs: Sequence[Config]) -> None:
    """Raises UserError where a setting makes no difference to what is trained."""
    for config in configs:
        if why := ignored(setting, config):
            raise UserError(f"varying {setting} would change nothing: {why}")


def by_seed(seeds: int, settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """These settings with every seed, in alternating order.

    All of a seed run next to each other, so that a machine that drifts (heat, neighbours) does so
    for all alike: speed-ups compare within a seed.
    """
    return [
        {**setting, "seed": seed}
        for seed in range(seeds)
        for setting in settings[:: 1 if seed % 2 == 0 else -1]
    ]


def recorded(
    configs: Sequence[Config],
    folder: Path,
    device: torch.device,
    title_of: Callable[[str], str] | None = None,
) -> dict[Path, dict[str, Any]]:
    """The finished records below ``folder`` of these configurations on this machine, in order.

    A record of a part of a data set is one of these where ``title_of`` gives that part's title for
    the data set's name.
    """
    here, wanted = environment(device), [dataclasses.asdict(config) for config in configs]
    runs, skipped = read_runs(folder)
    for line in skipped:
        notice(line)
    found = {
        path: run
        for path, run in runs.items()
        if run["status"] == "finished"
        and run["config"] in wanted
        and "init_from" not in run
        and same_machine(run["environment"], here)
        and not (
            run.get("dataset_subset")
            and title_of is not None
            and run["dataset_title"] != title_of(run["config"]["dataset"])
        )
    }
    return dict(sorted(found.items(), key=lambda item: wanted.index(item[1]["config"])))


def missing(
    configs: Sequence[Config],
    folder: Path,
    device: torch.device,
    title_of: Callable[[str], str] | None = None,
) -> list[Config]:
    """The configurations that no finished record here covers."""
    for config in dict.fromkeys(dataclasses.replace(config, seed=0) for config in configs):
        check_usable(config, device)
    done = [run["config"] for run in recorded(configs, folder, device, title_of).values()]
    left = [config for config in configs if dataclasses.asdict(config) not in done]
    if len(left) < len(configs):
        done_of = f"{len(configs) - len(left)} of {counted(len(configs), 'run')}"
        say(f"{done_of} recorded in {folder}")
    return left


def time_models(
    configs: Sequence[Config], runs: Runs, device: torch.device, *, seconds: float
) -> None:
    """Training steps of a table's models by turns, in a saved run beside the runs, if missing.

    Runs are minutes apart, so what their own images/s say of two models is also what the machine
    did meanwhile.
    """
    cases = [step_case(config) for config in dict.fromkeys(configs)]
    path = runs.folder / f"steps-{digest(configs[0].setting)}.json"
    if not were_timed(cases, path, device):
        say(f"training steps of {', '.join(config.model for config in configs)}, by turns")
        runs.save(time_steps(cases, path, device, seconds=seconds))


def time_values(
    setting: str, configs: Sequence[Config], runs: Runs, device: torch.device, *, seconds: float
) -> Path:
    """Training steps of an ablation's values by turns; the saved run."""
    cases = {
        value: step_case(config, variant=f"{setting}={value}")
        for config in configs
        for value in [getattr(config, setting)]
    }
    say(f"training steps of {setting} {', '.join(map(str, cases))}, by turns")
    path = runs.folder / f"steps-{setting}.json"
    runs.save(time_steps(list(cases.values()), path, device, seconds=seconds))
    return path


def time_backends(
    configs: Sequence[Config],
    backends: Sequence[str] | None,
    out: Path,
    device: torch.device,
    *,
    seconds: float,
) -> Path:
    """Training steps of models on backends (PyTorch's and our own), all by turns; the saved run."""
    names = compared_backends() if backends is None else backends
    cases = [step_case(config, name) for config in dict.fromkeys(configs) for name in names]
    return time_steps(cases, out / "step-speed.json", device, seconds=seconds)
