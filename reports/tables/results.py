"""From run records to the results table: statistics, and the claims they are set beside.

``table.json``::

    schema    "linear-vit-table/1"
    created   ISO time, UTC
    claims    {source, backbone, accuracy: {data set: {model: percent}}, speedup: {...}}
    datasets  one entry per data set and setting: dataset, title, status ("measured", or "not run":
        then setting and environment are null), setting (what the runs have in common), environment
        (of the first run), arithmetic (what the FLOP of a layer allow, as :func:`arithmetic`), and
        rows, one per model, whose measured fields are null where it was not run:
            model, title, attention_type, local_branch, status, seeds (those measured), parameters
            accuracy        {mean, half_width, values}: test accuracy in percent; the 95 %
                            t-interval over seeds is mean ± half_width (null for one seed)
            images_per_second  {median, values, how}: training steps; values are the runs' own, one
                            per seed; how is "by turns" where a saved run has the models' steps and
                            the median is its, else "in the runs"
            speedup         {median, low, high, values, how}: images/s over the baseline's; by turns
                            [low, high] is the 95 % interval, in the runs the range of values, those
                            of the same seed; null for lack of such pairs
            gain            {mean, half_width, values}: accuracy over the baseline's of the same
                            seed, in points; null without pairs
            time_to_baseline  {target_percent, seconds, reached, seeds, speedup}: training seconds
                            until validation accuracy first reached the baseline's final one (median
                            of the seeds that did), and how much faster than the baseline itself
            complexity      {order, exponent, low, high, pass, backend, dtype, machine}: of the
                            attention core; all but order null unless measured on the runs' machine
            hours_200_epochs  training steps alone, from the median epoch, or the rate by turns
            peak_memory     bytes on a CUDA device, the most of any seed; null on a CPU
            claim           {accuracy, speedup} or null
            init_from       of runs that began with another model's weights, their attention
                            swapped: {model, model_title, swapped, epochs}, swapped being validation
                            accuracy in percent before anything was trained; else not there. They
                            stand in the table of the runs that they began with, by these runs'
                            seed, and their time to the baseline has no speed-up
            verdict         "reproduced", "not reproduced", "not run" or "no claim"
            verdict_reason  a sentence
        subset: true where the runs had a part of the data set's classes; its title says so, and no
        claim is set beside it
    exponents, speeds   the files of the measured exponents (or null), and of the speeds by turns
    ablations   the ablation-*.json there were: {text, setting, best, claimed_best, dataset}
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from linear_vit.reports.claims import (
    BASELINE,
    CLAIMED_SETTING,
    CLAIMS,
    DATASETS,
    MODELS,
    PYTORCH,
    ROWS,
    model_of,
)
from linear_vit.reports.saved import machines
from linear_vit.reports.saved.records import Record
from linear_vit.reports.statistics.seeds import paired_ratios, t_interval
from linear_vit.reports.tables import ablation, pairs

SCHEMA = "linear-vit-table/1"
# Of a row, null where nothing was run.
_MEASURED = (
    "parameters",
    "accuracy",
    "images_per_second",
    "speedup",
    "gain",
    "time_to_baseline",
    "hours_200_epochs",
    "peak_memory",
)
ByModel = Mapping[str, dict[int, Record]]  # runs by model and seed
Fits = Sequence[Mapping[Any, Any]]  # with the columns of exponents.csv


@dataclass(frozen=True)
class Exponents:
    """Measured fits and the file they are from."""

    source: str | None = None
    rows: Fits = ()
    skipped: Sequence[str] = ()  # a line for each row that is damaged


# Timed steps of a table's models that took turns, by model; empty where there are none.
Steps = Mapping[str, pairs.Step]


def make(
    runs: Iterable[Record],
    *,
    steps: pd.DataFrame | None = None,
    exponents: Exponents | None = None,
    ablations: Iterable[Record] = (),
) -> dict[str, Any]:
    """The content of table.json from run records; those not finished are left out.

    Runs are put together where all but model and seed is equal, the machine included. Data sets
    that carry a claim are listed even if never run.

    Args:
        runs: content of run.json files.
        steps: timed training steps, ``Runs.training``.
        exponents: of these the ones that were measured on the runs' machine are taken.
        ablations: content of ablation-*.json files.
    """
    exponents = exponents or Exponents()
    groups: dict[tuple[int, str], dict[str, dict[int, Record]]] = {}
    # Of a run that was made again the latest counts.
    for run in sorted(runs, key=lambda run: run.get("started", "")):
        if run["status"] == "finished":
            by_model = groups.setdefault(_place(run), {})
            by_model.setdefault(_name(run), {})[_begun(run)["seed"]] = run
    tables, files = [], set()
    for _, by_model in sorted(groups.items()):
        firsts = [(model, found[min(found)]) for model, found in by_model.items()]
        firsts.sort(key=lambda item: item[0] != BASELINE)
        timed = pairs.by_turns(firsts, steps) if BASELINE in by_model else {}
        files |= {str(step["file"]) for step in timed.values()}
        tables.append(_dataset(firsts[0][1]["config"]["dataset"], by_model, timed, exponents.rows))
    measured = {table["dataset"] for table in tables if not table["subset"]}
    tables += [_dataset(name, {}, {}, ()) for name in CLAIMS["accuracy"] if name not in measured]
    used = any(row["complexity"]["exponent"] for table in tables for row in table["rows"])
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "claims": CLAIMS,
        "datasets": tables,
        "exponents": exponents.source if used else None,
        "speeds": sorted(files),
        "ablations": [
            {
                "text": ablation.describe(found),
                **{key: found[key] for key in ("setting", "best", "claimed_best", "dataset")},
            }
            for found in ablations
        ],
    }


def _begun(run: Record) -> dict[str, Any]:
    """The configuration of a run, or of the one whose weights it began with."""
    return dict((run.get("init_from") or run)["config"])


def _name(run: Record) -> str:
    """A run's row: its model, and the one whose weights it began with."""
    began = run.get("init_from")
    return f"{run['model']} from {began['model']}" if began else str(run["model"])


def _place(run: Record) -> tuple[int, str]:
    """Where the table of a run stands; runs of one table have the same."""
    where, name, order = run["environment"], run["config"]["dataset"], list(DATASETS)
    alike: dict[str, Any] = {"setting": pairs.setting(_begun(run))}
    alike["machine"] = machines.label(where)
    alike |= {"processes": where.get("processes"), "part": pairs.part_of(run)}
    return order.index(name) if name in order else len(order), json.dumps(alike, sort_keys=True)


def _dataset(name: str, by_model: ByModel, timed: Steps, fits: Fits) -> dict[str, Any]:
    """A data set at one setting; one that was never run has no runs."""
    models = [m for m in MODELS if m in ROWS or m in by_model]
    models += [m for m in by_model if m not in MODELS]
    title, side = DATASETS.get(name, (name, 0))
    run = next((run for found in by_model.values() for run in found.values()), None)
    setting = run and pairs.setting(_begun(run))
    # The claimed backbone of 64 tokens: patches of an eighth of the image.
    sizes = (side // 8, 384, 1536)
    if run and setting:
        title = pairs.part_of(run) or run.get("dataset_title") or title
        side = run.get("image_size") or side
        sizes = (setting["patch_size"], setting["dim"], setting["mlp_dim"])
    return {
        "dataset": name,
        "title": title,
        "subset": bool(run and run.get("dataset_subset")),
        "status": "measured" if run else "not run",
        "setting": setting,
        "environment": run and run["environment"],
        "rows": [_row(name, model, by_model, timed, fits) for model in models],
        "arithmetic": arithmetic(side, *sizes) if side else None,
    }


def _row(dataset: str, model: str, by_model: ByModel, timed: Steps, fits: Fits) -> dict[str, Any]:
    runs = by_model.get(model, {})
    first = runs[min(runs)] if runs else {}
    attention, _, local = model.partition(" ")[0].partition("-")
    began = first.get("init_from")
    title = first.get("model_title")
    if began and title:
        title += f" from {began['model_title']}"
    claim = None
    subset = any(run.get("dataset_subset") for found in by_model.values() for run in found.values())
    if model in CLAIMS["accuracy"].get(dataset, {}) and not subset:
        claim = {kind: CLAIMS[kind][dataset][model] for kind in ("accuracy", "speedup")}
    row: dict[str, Any] = {
        "model": model,
        "title": model_of(model, title).title,
        "attention_type": attention,
        "local_branch": bool(local),
        "status": "measured" if runs else "not run",
        "seeds": [],
        **dict.fromkeys(_MEASURED),
        "claim": claim,
        "complexity": _complexity(model.partition(" ")[0], first, fits),
    }
    if began:
        swapped = statistics.fmean(run["init_from"]["val_accuracy"] for run in runs.values())
        row["init_from"] = {name: began[name] for name in ("model", "model_title")}
        row["init_from"] |= {"swapped": 100 * swapped, "epochs": first["config"]["epochs"]}
    if runs:
        row |= _measured(model, runs, by_model.get(BASELINE, {}), timed)
    if began and row["time_to_baseline"]:
        # What the baseline itself took, which such a run begins after, is no part of its time.
        row["time_to_baseline"]["speedup"] = None
    row["verdict"], row["verdict_reason"] = _verdict(row, first)
    if subset:
        row["verdict_reason"] = "of a part of the classes, about which the original states nothing"
    return row


def _measured(
    model: str, runs: dict[int, Record], baseline: dict[int, Record], timed: Steps
) -> dict[str, Any]:
    """What the runs of a model say: the fields that are null where there are none."""
    steps = (timed.get(model), timed.get(BASELINE))
    rate, base = (float(step["images_per_s"]) if step else None for step in steps)
    paired = {seed: run for seed, run in runs.items() if seed in baseline}
    gain = [
        100 * (run["test_accuracy"] - baseline[seed]["test_accuracy"])
        for seed, run in sorted(paired.items())
    ]
    epochs = [epoch_seconds(entry, rate) for run in runs.values() for entry in run["epochs"]]
    peaks = [run["peak_memory"] for run in runs.values() if run.get("peak_memory")]
    return {
        **pairs.compared(runs, baseline, *steps),
        "gain": t_interval(gain) if gain and model != BASELINE else None,
        "time_to_baseline": _time_to_baseline(paired, baseline, (rate, base)) if paired else None,
        "hours_200_epochs": 200 * statistics.median(epochs) / 3600,
        "peak_memory": max(peaks, default=None),
    }


def _time_to_baseline(
    runs: dict[int, Record],
    baseline: dict[int, Record],
    rates: tuple[float | None, float | None],
) -> dict[str, Any]:
    targets = {seed: baseline[seed]["epochs"][-1]["val_accuracy"] for seed in runs}
    own, theirs = (
        {seed: seconds_to(of[seed]["epochs"], target, rate) for seed, target in targets.items()}
        for of, rate in zip((runs, baseline), rates, strict=True)
    )
    reached = [seconds for seconds in own.values() if seconds is not None]
    return {
        "target_percent": 100 * statistics.fmean(targets.values()),
        "seconds": statistics.median(reached) if reached else None,
        "reached": len(reached),
        "seeds": len(runs),
        "speedup": paired_ratios(theirs, own, lambda seconds: seconds),
    }


def epoch_seconds(entry: dict[str, Any], rate: float | None = None) -> float:
    """Training seconds of an epoch: its images over ``rate``, or over that of its median step.

    So a pause of the machine in the middle of it is nobody's merit or fault. Records from before
    ``images`` was in them give the sum over their steps.
    """
    if "images" not in entry:
        return float(entry["seconds"])
    return float(entry["images"] / (rate or entry["images_per_second"]))


def seconds_to(
    epochs: list[dict[str, Any]], target: float, rate: float | None = None
) -> float | None:
    """Training seconds until the validation accuracy of a run first reached ``target``.

    Interpolated linearly between the epochs on both sides; within the first epoch nothing was
    measured, so it counts whole. None where the run never got there. ``rate``: images per second,
    if not the run's own.
    """
    elapsed, before = 0.0, None
    for entry in epochs:
        seconds, value = epoch_seconds(entry, rate), entry["val_accuracy"]
        if value >= target:
            share = 1.0 if before is None else (target - before) / (value - before)
            return elapsed + share * seconds
        elapsed, before = elapsed + seconds, value
    return None


def _verdict(row: dict[str, Any], run: Record) -> tuple[str, str]:
    """Whether accuracy and training speed-up reach what was claimed.

    A claim counts as reproduced where it is not above the upper end of the 95 % interval; of one
    seed, not above the value.
    """
    claim = row["claim"]
    if claim is None:
        return "no claim", "the original states nothing of this model on this data set"
    if not run:
        return "not run", "no record of it"
    config = run["config"]
    differ = [f"{k} {v} (here {config[k]})" for k, v in CLAIMED_SETTING.items() if config[k] != v]
    if differ:
        return "not run", f"not at the size the claim is for: {', '.join(differ)}"
    if row["speedup"] is None:
        return "not run", "no baseline of the same seed to compare its speed with"
    accuracy, speedup = row["accuracy"], row["speedup"]
    fastest = speedup["high"]
    if speedup["how"] == "in the runs":
        over_seeds = t_interval(speedup["values"])
        fastest = over_seeds["mean"] + (over_seeds["half_width"] or 0)
    short = []
    if accuracy["mean"] + (accuracy["half_width"] or 0) < claim["accuracy"]:
        short.append(f"accuracy {accuracy['mean']:.1f} % of {claim['accuracy']:.1f} %")
    if fastest < claim["speedup"]:
        short.append(f"training speed-up {speedup['median']:.2f}× of {claim['speedup']:.1f}×")
    if short:
        return "not reproduced", " and ".join(short)
    return "reproduced", "accuracy and training speed-up reach the claim within their intervals"


def arithmetic(image_size: int, patch_size: int, dim: int, mlp_dim: int) -> dict[str, Any]:
    """What the FLOP of a layer allow, per token: 8·dim² in projections, 4·dim·mlp_dim in the MLP
    and 4·N·dim in the softmax core, for N tokens.

    ``free_core`` is the speed-up of a layer whose softmax core costs nothing, ``pooled`` that of
    one whose attention, projections included, works on an eighth of the tokens (three ripple
    stages), ``no_attention`` that of one without any.
    """
    tokens = (image_size // patch_size) ** 2
    projections, mlp, core = 8 * dim**2, 4 * dim * mlp_dim, 4 * tokens * dim
    whole = projections + mlp + core
    return {
        "tokens": tokens,
        "dim": dim,
        "core_share": core / whole,
        "free_core": whole / (whole - core),
        "pooled": whole / (mlp + projections / 8 + core / 64),
        "no_attention": whole / mlp,
    }


def _complexity(model: str, run: Record, fits: Fits) -> dict[str, Any]:
    """The order of the attention core, and the exponent measured for its operation.

    Only a fit that was made on the runs' own machine, device and PyTorch counts. Of several: one by
    their backend, of both passes.
    """
    of = model_of(model)
    keys = ("exponent", "low", "high", "pass", "backend", "dtype", "machine")
    where = machines.label(run["environment"]) if run else None
    here = [f for f in fits if f["operation"] == of.grows_as and f["machine"] == where]
    if not here:
        return {"order": of.order, **dict.fromkeys(keys)}
    backend = run["config"].get("backend") or PYTORCH

    def preference(fit: Mapping[str, Any]) -> tuple[bool, ...]:
        of_run = fit["backend"] == backend, fit["pass"] == "forward+backward"
        return (*of_run, not fit.get("sweep"))  # a sweep of its own comes after the usual one

    best = max(here, key=preference)
    numbers = {key: float(best[key]) for key in keys[:3]}
    return {"order": of.order, **numbers, **{key: best[key] for key in keys[3:]}}
