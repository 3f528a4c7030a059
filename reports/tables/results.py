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
            verdict         "reproduced", "not reproduced", "not run" or "no claim"
            verdict_reason  a sentence
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


@dataclass(frozen=True)
class Exponents:
    """Measured fits and the file they are from; rows have the columns of exponents.csv."""

    source: str | None = None
    rows: Sequence[Mapping[str, Any]] = ()
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
    groups: dict[str, list[Record]] = {}
    for run in runs:
        if run["status"] == "finished":
            groups.setdefault(json.dumps(common(run), sort_keys=True), []).append(run)
    order = list(DATASETS)

    def place(item: tuple[str, list[Record]]) -> tuple[int, str]:
        name = item[1][0]["config"]["dataset"]
        return (order.index(name) if name in order else len(order), item[0])

    tables, files = [], set()
    for _, group in sorted(groups.items(), key=place):
        by_model = _by_model(group)
        first = [(model, by_model[model][min(by_model[model])]) for model in by_model]
        first.sort(key=lambda item: item[0] != BASELINE)
        timed = pairs.by_turns(first, steps) if BASELINE in by_model else {}
        files |= {str(step["file"]) for step in timed.values()}
        tables.append(_dataset_table(by_model, timed, exponents.rows))
    measured = {table["dataset"] for table in tables}
    tables += [_not_run(name) for name in CLAIMS["accuracy"] if name not in measured]
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


def common(run: Record) -> dict[str, Any]:
    """What runs of one table share."""
    where = run["environment"]
    processes = where.get("processes")
    setting = pairs.setting(run["config"])
    return {"setting": setting, "machine": machines.label(where), "processes": processes}


def _by_model(runs: Iterable[Record]) -> dict[str, dict[int, Record]]:
    """By model and seed; of one that was run again the latest counts."""
    by_model: dict[str, dict[int, Record]] = {}
    for run in sorted(runs, key=lambda run: run.get("started", "")):
        by_model.setdefault(run["model"], {})[run["config"]["seed"]] = run
    return by_model


def _dataset_table(
    by_model: dict[str, dict[int, Record]],
    timed: Steps,
    exponents: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    run = next(iter(next(iter(by_model.values())).values()))
    name, setting = run["config"]["dataset"], common(run)["setting"]
    title, image_size = DATASETS.get(name, (name, 0))
    models = [m for m in MODELS if m in ROWS or m in by_model]
    models += [m for m in by_model if m not in MODELS]
    side = run.get("image_size") or image_size
    sizes = (setting["patch_size"], setting["dim"], setting["mlp_dim"])
    return {
        "dataset": name,
        "title": run.get("dataset_title") or title,
        "status": "measured",
        "setting": setting,
        "environment": run["environment"],
        "rows": [_row(name, model, by_model, timed, exponents) for model in models],
        "arithmetic": arithmetic(side, *sizes) if side else None,
    }


def _not_run(name: str) -> dict[str, Any]:
    title, image_size = DATASETS[name]
    return {
        "dataset": name,
        "title": title,
        "status": "not run",
        "setting": None,
        "environment": None,
        "rows": [_row(name, model, {}, {}, ()) for model in ROWS],
        # The claimed backbone of 64 tokens: patches of an eighth of the image.
        "arithmetic": arithmetic(image_size, image_size // 8, 384, 1536),
    }


def _row(
    dataset: str,
    model: str,
    by_model: dict[str, dict[int, Record]],
    timed: Steps,
    exponents: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    runs = by_model.get(model, {})
    first = runs[min(runs)] if runs else {}
    attention, _, local = model.partition("-")
    claim = None
    if model in CLAIMS["accuracy"].get(dataset, {}):
        claim = {kind: CLAIMS[kind][dataset][model] for kind in ("accuracy", "speedup")}
    of_runs = ["parameters", "accuracy", "images_per_second", "speedup", "gain"]
    of_runs += ["time_to_baseline", "hours_200_epochs", "peak_memory"]
    row: dict[str, Any] = {
        "model": model,
        "title": model_of(model, first.get("model_title")).title,
        "attention_type": attention,
        "local_branch": bool(local),
        "status": "measured" if runs else "not run",
        "seeds": sorted(runs),
        **dict.fromkeys(of_runs),
        "claim": claim,
        "complexity": _complexity(model, first, exponents),
    }
    if runs:
        row |= _measured(model, runs, by_model.get(BASELINE, {}), timed)
    row["verdict"], row["verdict_reason"] = _verdict(row, first)
    return row


def _measured(
    model: str, runs: dict[int, Record], baseline: dict[int, Record], timed: Steps
) -> dict[str, Any]:
    """What the runs of a model say: the fields that are null where there are none."""
    seeds = sorted(runs)
    # Images per second of both by turns, or of neither: one clock for what is compared.
    by_turns = (timed[m]["images_per_s"] if model in timed else None for m in (model, BASELINE))
    rate, base = by_turns
    own = [runs[seed]["images_per_second"] for seed in seeds]
    paired = [seed for seed in seeds if seed in baseline]
    how = "in the runs" if rate is None else "by turns"
    speedup = paired_ratios(runs, baseline, lambda run: run["images_per_second"])
    speedup = speedup and {**speedup, "how": how}
    if rate is not None:
        values = (speedup or {}).get("values", [])
        speedup = {**pairs.over(timed[model], timed[BASELINE]), "values": values}
    gain = [100 * (runs[s]["test_accuracy"] - baseline[s]["test_accuracy"]) for s in paired]
    epochs = [epoch_seconds(entry, rate) for run in runs.values() for entry in run["epochs"]]
    peaks = [run["peak_memory"] for run in runs.values() if run.get("peak_memory")]
    of_pairs = {seed: runs[seed] for seed in paired}
    return {
        "parameters": runs[seeds[0]]["parameters"],
        "accuracy": t_interval([100 * runs[seed]["test_accuracy"] for seed in seeds]),
        "images_per_second": {
            "median": statistics.median(own) if rate is None else rate,
            "values": own,
            "how": how,
        },
        "speedup": speedup,
        "gain": t_interval(gain) if gain and model != BASELINE else None,
        "time_to_baseline": _time_to_baseline(of_pairs, baseline, (rate, base)) if paired else None,
        "hours_200_epochs": 200 * statistics.median(epochs) / 3600,
        "peak_memory": max(peaks, default=None),
    }


def _time_to_baseline(
    runs: dict[int, Record],
    baseline: dict[int, Record],
    rates: tuple[float | None, float | None],
) -> dict[str, Any]:
    targets = {seed: baseline[seed]["epochs"][-1]["val_accuracy"] for seed in runs}
    own = {seed: seconds_to(runs[seed]["epochs"], targets[seed], rates[0]) for seed in runs}
    theirs = {seed: seconds_to(baseline[seed]["epochs"], targets[seed], rates[1]) for seed in runs}
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


def _complexity(model: str, run: Record, exponents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The order of the attention core, and the exponent measured for its operation.

    Only a fit that was made on the runs' own machine, device and PyTorch counts. Of several: one by
    their backend, of both passes.
    """
    of = model_of(model)
    result: dict[str, Any] = {"order": of.order}
    keys = ("pass", "backend", "dtype", "machine")
    where = machines.label(run["environment"]) if run else None
    fits = [f for f in exponents if f["operation"] == of.grows_as and f["machine"] == where]
    if not fits:
        return result | dict.fromkeys(("exponent", "low", "high", *keys))

    def preference(fit: Mapping[str, Any]) -> tuple[bool, ...]:
        backend = run["config"].get("backend") or PYTORCH
        of_run = fit["backend"] == backend, fit["pass"] == "forward+backward"
        return (*of_run, not fit.get("sweep"))  # a sweep of its own comes after the usual one

    best = max(fits, key=preference)
    numbers = {key: float(best[key]) for key in ("exponent", "low", "high")}
    return result | numbers | {key: best[key] for key in keys}
