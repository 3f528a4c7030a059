"""From run records to the results table: statistics, and the claims they are set beside.

``table.json``::

    schema    "linear-vit-table/1"
    created   ISO time, UTC
    claims    {source, backbone, accuracy: {data set: {model: percent}}, speedup: {...}}
    datasets  one entry per data set and setting:
        dataset, title      key of DATASETS, its name in full
        status              "measured" or "not run" (then setting and environment are null)
        setting             what the runs have in common (preset, sizes, epochs, lr, ...)
        environment         torch, device, cpu, threads ... of the first run
        rows                one per model:
            model, title, attention_type, local_branch
            status          "measured" or "not run" (then the measured fields are null)
            seeds           list of the seeds measured
            parameters      their number
            accuracy        {mean, half_width, values}: test accuracy in percent; the 95 %
                            t-interval over seeds is mean +- half_width (null for one seed)
            images_per_second  {median, values, how}: training steps; values are the runs' own,
                            one per seed; how is "by turns" where there is a speed record
                            (training.speed) and the median is its, else "in the runs"
            speedup         {median, low, high, values, how}: images/s over the baseline's; by turns
                            [low, high] is the 95 % interval, in the runs the range of values, those
                            of the same seed, run next to each other; null for lack of such pairs
            claim           {accuracy, speedup} or null
            gain            {mean, half_width, values}: accuracy over the baseline's of the same
                            seed, in points; null without pairs
            time_to_baseline  {target_percent, seconds, reached, seeds, speedup}: training seconds
                            until validation accuracy first reached the baseline's final one
                            (median of the seeds that did), and how much faster than the baseline
                            itself got there {median, low, high, values}; null without pairs.
                            Images seen by then over the images/s above, where by turns
            complexity      {order, exponent, low, high, pass, backend, dtype, machine}: of the
                            attention core; all but order null where it was not measured
            hours_200_epochs  training steps alone, from the median epoch, or the rate by turns
            peak_memory     bytes on a CUDA device, the most of any seed; null on a CPU
            verdict         "reproduced", "not reproduced", "not run" or "no claim", and why:
            verdict_reason  a sentence
        arithmetic      what the FLOP of a layer allow: {tokens, dim, core_share, free_core,
                        pooled, no_attention}, the last three as speed-ups of a layer
    exponents   the file of the measured exponents, or null
    ablations   the ablation-*.json there were (training.ablation), in short: {text, setting,
                best, claimed_best, dataset}
"""

import csv
import io
import statistics
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from linear_vit.training import ablation, speed
from linear_vit.training.config import COMPARED, DATASETS, MODELS, digest
from linear_vit.training.errors import UserError
from linear_vit.training.metrics import interval_text, paired_ratios, ratio_text, t_interval
from linear_vit.training.record import MACHINE

SCHEMA = "linear-vit-table/1"
ROWS = COMPARED

# What the original Linear-ViT system stated of itself. Accuracy in percent; speed-up of training.
CLAIMS: dict[str, Any] = {
    "source": "the original Linear-ViT system's own results table",
    "backbone": "patch 4, dim 384, depth 12, 6 heads, MLP 1536, 200 epochs of batch 128",
    "accuracy": {
        "cifar100": {"baseline": 72.3, "ripple": 85.3, "hydra": 84.8},
        "tiny-imagenet": {"baseline": 65.2, "ripple": 75.2, "hydra": 74.6},
    },
    "speedup": {
        "cifar100": {"baseline": 1.0, "ripple": 2.1, "hydra": 2.0},
        "tiny-imagenet": {"baseline": 1.0, "ripple": 2.0, "hydra": 1.9},
    },
    "hours_200_epochs": {"cifar100": 4, "tiny-imagenet": 12},  # one RTX 3090, CUDA kernels
    "peak_memory_gb": 8,
    "best": ablation.CLAIMED_BEST,
}
# What a run has to have in common with the original for its claims to be put to the test.
_CLAIMED_SETTING = {"dim": 384, "depth": 12, "mlp_dim": 1536, "batch_size": 128, "epochs": 200}
_EXPONENT_FILES = ("reports/out/scaling/exponents.csv", "reports/measurements/*/exponents.csv")


def make_table(
    runs: list[dict[str, Any]],
    *,
    speeds: Iterable[dict[str, Any]] = (),
    exponents: dict[str, Any] | None = None,
    ablations: Iterable[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The content of table.json from run records; those not finished are left out.

    Runs are put together where all but model and seed is equal, the device and torch included.
    Data sets that carry a claim are listed even if never run. ``speeds`` is what
    ``speed.read_models`` returns, ``exponents`` what ``read_exponents`` does, ``ablations`` what
    ``ablation.read`` does.
    """
    measured_exponents = exponents or {"source": None, "rows": []}
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for run in runs:
        if run["status"] == "finished":
            dataset = run["config"]["dataset"]
            key = (list(DATASETS).index(dataset), digest(common(run)))
            groups.setdefault(key, []).append(run)
    in_order = [group for _, group in sorted(groups.items(), key=lambda item: item[0])]
    by_setting = {
        digest(common(found)): found["models"]
        for found in sorted(speeds, key=lambda found: str(found["created"]))  # the latest counts
    }
    tables = [
        _dataset_table(
            group, by_setting.get(digest(common(group[0])), {}), measured_exponents["rows"]
        )
        for group in in_order
    ]
    measured = {table["dataset"] for table in tables}
    tables += [_not_run(name) for name in CLAIMS["accuracy"] if name not in measured]
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "claims": CLAIMS,
        "datasets": tables,
        "exponents": measured_exponents["source"],
        "ablations": [
            {
                "text": ablation.describe(found),
                **{key: found[key] for key in ("setting", "best", "claimed_best", "dataset")},
            }
            for found in ablations
        ],
    }


def common(run: dict[str, Any]) -> dict[str, Any]:
    """What runs of one table share."""
    setting = dict(run["config"])
    for name in ("attention_type", "local_branch", "seed"):
        setting.pop(name)
    machine = {name: run["environment"].get(name) for name in MACHINE}
    return {"setting": setting, "machine": machine}


def _dataset_table(
    runs: list[dict[str, Any]],
    speeds: dict[str, dict[str, float]],
    exponents: list[dict[str, str]],
) -> dict[str, Any]:
    name = runs[0]["config"]["dataset"]
    by_model: dict[str, dict[int, dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: run.get("started", "")):
        by_model.setdefault(run["model"], {})[run["config"]["seed"]] = run  # the latest counts
    models = [m for m in MODELS if m in ROWS or m in by_model]
    setting = common(runs[0])["setting"]
    return {
        "dataset": name,
        "title": DATASETS[name].title,
        "status": "measured",
        "setting": setting,
        "environment": runs[0]["environment"],
        "rows": [
            _row(name, model, by_model.get(model, {}), by_model, speeds, exponents)
            for model in models
        ],
        "arithmetic": arithmetic(
            DATASETS[name].image_size, setting["patch_size"], setting["dim"], setting["mlp_dim"]
        ),
    }


def _not_run(name: str) -> dict[str, Any]:
    image_size = DATASETS[name].image_size
    return {
        "dataset": name,
        "title": DATASETS[name].title,
        "status": "not run",
        "setting": None,
        "environment": None,
        "rows": [_row(name, model, {}, {}, {}, []) for model in ROWS],
        # The claimed backbone of 64 tokens: patches of an eighth of the image.
        "arithmetic": arithmetic(image_size, image_size // 8, 384, 1536),
    }


def _row(
    dataset: str,
    model: str,
    runs: dict[int, dict[str, Any]],
    by_model: dict[str, dict[int, dict[str, Any]]],
    speeds: dict[str, dict[str, float]],
    exponents: list[dict[str, str]],
) -> dict[str, Any]:
    claim = None
    if model in CLAIMS["accuracy"].get(dataset, {}):
        claim = {kind: CLAIMS[kind][dataset][model] for kind in ("accuracy", "speedup")}
    row: dict[str, Any] = {
        "model": model,
        "title": MODELS[model].title,
        "attention_type": MODELS[model].attention_type,
        "local_branch": MODELS[model].local_branch,
        "status": "measured" if runs else "not run",
        "seeds": sorted(runs),
        "parameters": None,
        "accuracy": None,
        "images_per_second": None,
        "speedup": None,
        "claim": claim,
        "gain": None,
        "time_to_baseline": None,
        "complexity": _complexity(model, runs, exponents),
        "hours_200_epochs": None,
        "peak_memory": None,
    }
    if runs:
        seeds = row["seeds"]
        rates = [runs[seed]["images_per_second"] for seed in seeds]
        baseline = by_model.get("baseline", {})
        pairs = [seed for seed in seeds if seed in baseline]
        row["parameters"] = runs[seeds[0]]["parameters"]
        row["accuracy"] = t_interval([100 * runs[s]["test_accuracy"] for s in seeds]).as_json()
        row["images_per_second"] = {
            "median": statistics.median(rates),
            "values": rates,
            "how": "in the runs",
        }
        row["speedup"] = paired_ratios(runs, baseline, lambda run: run["images_per_second"])
        if row["speedup"] is not None:
            row["speedup"]["how"] = "in the runs"
        if model in speeds and "baseline" in speeds:
            _take_turns(row, speeds[model], speeds["baseline"])
        if pairs and model != "baseline":
            gains = [100 * (runs[s]["test_accuracy"] - baseline[s]["test_accuracy"]) for s in pairs]
            row["gain"] = t_interval(gains).as_json()
        if pairs:
            row["time_to_baseline"] = _time_to_baseline(
                {seed: runs[seed] for seed in pairs}, baseline, _rate(speeds, model, "baseline")
            )
        [rate, _] = _rate(speeds, model, "baseline")
        epochs = [epoch_seconds(entry, rate) for run in runs.values() for entry in run["epochs"]]
        row["hours_200_epochs"] = 200 * statistics.median(epochs) / 3600
        peaks = [run["peak_memory"] for run in runs.values() if run.get("peak_memory")]
        row["peak_memory"] = max(peaks, default=None)
    row["verdict"], row["verdict_reason"] = _verdict(row, runs)
    return row


def _rate(
    speeds: dict[str, dict[str, float]], model: str, other: str
) -> tuple[float, float] | tuple[None, None]:
    """Images per second of both by turns, or of neither: one clock for what is compared."""
    if model not in speeds or other not in speeds:
        return None, None
    return speeds[model]["images_per_second"], speeds[other]["images_per_second"]


def _take_turns(row: dict[str, Any], own: dict[str, float], base: dict[str, float]) -> None:
    """Speeds measured in one process by turns, in the place of those of the runs."""
    row["images_per_second"] |= {"median": own["images_per_second"], "how": "by turns"}
    values = (row["speedup"] or {}).get("values", [])
    row["speedup"] = {**speed.over(own, base), "values": values}


def _time_to_baseline(
    runs: dict[int, dict[str, Any]],
    baseline: dict[int, dict[str, Any]],
    rates: tuple[float, float] | tuple[None, None],
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


def _verdict(row: dict[str, Any], runs: dict[int, dict[str, Any]]) -> tuple[str, str]:
    """Whether accuracy and training speed-up reach what was claimed.

    A claim counts as reproduced where it is not above the upper end of the 95 % interval; of one
    seed, not above the value.
    """
    claim = row["claim"]
    if claim is None:
        return "no claim", "the original states nothing of this model on this data set"
    if not runs:
        return "not run", "no record of it"
    config = next(iter(runs.values()))["config"]
    differ = [f"{k} {v} (here {config[k]})" for k, v in _CLAIMED_SETTING.items() if config[k] != v]
    if differ:
        return "not run", f"not at the size the claim is for: {', '.join(differ)}"
    if row["speedup"] is None:
        return "not run", "no baseline of the same seed to compare its speed with"
    accuracy, speedup = row["accuracy"], row["speedup"]
    fastest = speedup["high"]
    if speedup["how"] == "in the runs":
        over_seeds = t_interval(speedup["values"])
        fastest = over_seeds.mean + (over_seeds.half_width or 0)
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


def read_exponents(path: Path | None) -> dict[str, Any] | None:
    """The rows of an exponents.csv that hold a fit, and where they were found.

    With None, the newest of those below ``reports/``, or None. UserError for a file that was asked
    for and can't be read.
    """
    if path is None:
        found = [file for pattern in _EXPONENT_FILES for file in sorted(Path().glob(pattern))]
        if not found:
            return None
        path = found[0]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no readable exponents.csv ({error})") from error
    needed = {"machine", "operation", "pass", "dtype", "backend", "exponent", "low", "high"}
    if rows and not needed <= set(rows[0]):
        lacks = ", ".join(sorted(needed - set(rows[0])))
        raise UserError(f"{path} is no exponents.csv of `python -m reports scaling`: lacks {lacks}")
    return {"source": str(path), "rows": [r for r in rows if r["exponent"] and not r.get("reason")]}


def _complexity(
    model: str, runs: dict[int, dict[str, Any]], exponents: list[dict[str, str]]
) -> dict[str, Any]:
    """The order of the attention core, and the exponent measured for its operation.

    Of several fits: one made on the runs' processor and device, by their backend, of both passes.
    """
    quadratic = MODELS[model].attention_type == "baseline"
    operation = "softmax_attention" if quadratic else "linear_attention"
    fits = [fit for fit in exponents if fit["operation"] == operation]
    result: dict[str, Any] = {"order": "O(N²)" if quadratic else "O(N)"}
    keys = ("pass", "backend", "dtype", "machine")
    if not fits or not runs:
        return result | dict.fromkeys(("exponent", "low", "high", *keys))
    run = next(iter(runs.values()))
    machine, device = run["environment"], run["environment"].get("device")
    name = str(machine.get("cpu") if device == "cpu" else device)

    def preference(fit: dict[str, str]) -> tuple[bool, bool, bool]:
        return (
            name in fit["machine"],
            fit["backend"] == (run["config"].get("backend") or "torch"),
            fit["pass"] == "forward+backward",
        )

    best = max(fits, key=preference)
    numbers = {key: float(best[key]) for key in ("exponent", "low", "high")}
    return result | numbers | {key: best[key] for key in keys}


COLUMNS = (
    "Model",
    "Parameters",
    "Accuracy claimed",
    "Accuracy measured",
    "Over the baseline",
    "Complexity",
    "Images/s",
    "Speed-up claimed",
    "Speed-up measured",
    "Time to baseline's accuracy",
    "Verdict",
)


def to_markdown(table: dict[str, Any]) -> str:
    """The table for people: one section per data set."""
    sections = []
    for dataset in table["datasets"]:
        lines = [f"## {dataset['title']}", "", _describe(dataset), ""]
        lines.append("| " + " | ".join(COLUMNS) + " |")
        lines.append("|---" + "|---:" * (len(COLUMNS) - 2) + "|---|")
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in dataset["rows"]]
        lines += ["", _describe_arithmetic(dataset["arithmetic"])]
        lines += _also_claimed(dataset)
        sections.append("\n".join(lines))
    notes = [
        "Accuracy: on the test set, read once per run; mean ± 95 % t-interval over the seeds. "
        "Over the baseline: the same in percentage points, paired by seed. "
        "Complexity: of the attention core in N tokens, and the exponent measured. "
        "Images/s: training steps alone. Speed-up: images/s over the baseline's; where there is a "
        "speed record, both are medians of steps of all models taking turns in one process, with "
        "the 95 % interval; otherwise medians over steps, then over the seeds' own pairs [least – "
        "greatest]. "
        "Time to the baseline's accuracy: seconds of training steps until the validation accuracy "
        "first reached the baseline's final one of the same seed, and the speed-up over the "
        "baseline's own first time; medians of the seeds that got there. "
        "Verdict: reproduced where accuracy and speed-up, at the claimed size, reach the claim "
        "within their 95 % t-intervals. "
        f"Claimed: as stated in {CLAIMS['source']} ({CLAIMS['backbone']})."
    ]
    notes += [entry["text"] for entry in table["ablations"]]
    if table["exponents"]:
        notes.append(f"Exponents: {table['exponents']}.")
    return "\n\n".join([*sections, *notes]) + "\n"


def _describe(dataset: dict[str, Any]) -> str:
    if dataset["status"] == "not run":
        command = f"python train_minimal.py table --dataset {dataset['dataset']} --preset full"
        return f"Not run; `{command}` runs it."
    s, machine = dataset["setting"], dataset["environment"]
    device = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    threads = f", {_count(machine['threads'], 'thread')}" if machine["device"] == "cpu" else ""
    seeds = {seed for row in dataset["rows"] for seed in row["seeds"]}
    return (
        f"Preset {s['preset']}, recipe {s['recipe']}: dim {s['dim']}, depth {s['depth']}, "
        f"{s['heads']} heads, MLP {s['mlp_dim']}, patch {s['patch_size']}, batch "
        f"{s['batch_size']}, {s['epochs']} epochs, lr {s['lr']:g}, amp {s['amp']}"
        f"{', compiled' if s['compile'] else ''}; "
        f"{_count(len(seeds), 'seed')}; on {device}{threads}, torch {machine['torch']}."
    )


def _describe_arithmetic(a: dict[str, Any]) -> str:
    return (
        f"What arithmetic allows at {a['tokens']} tokens and dim {a['dim']}: the softmax core is "
        f"{a['core_share']:.1%} of a layer's FLOP, so a free one gives {a['free_core']:.2f}×, "
        f"attention on an eighth of the tokens {a['pooled']:.2f}×, no attention at all "
        f"{a['no_attention']:.2f}×."
    )


def _also_claimed(dataset: dict[str, Any]) -> list[str]:
    """Hours for 200 epochs and peak memory, beside what was claimed of them."""
    rows = [row for row in dataset["rows"] if row["status"] == "measured"]
    if not rows:
        return []
    hours = ", ".join(f"{row['title']} {row['hours_200_epochs']:.2g} h" for row in rows)
    claim = CLAIMS["hours_200_epochs"].get(dataset["dataset"])
    lines = ["", f"200 epochs of training steps, at the images/s above: {hours}"]
    lines[-1] += f"; claimed: about {claim} h on one RTX 3090." if claim else "."
    peaks = [row for row in rows if row["peak_memory"]]
    if peaks:
        sizes = ", ".join(f"{row['title']} {row['peak_memory'] / 1e9:.2g} GB" for row in peaks)
        lines.append(f"Peak memory: {sizes}; claimed: {CLAIMS['peak_memory_gb']} GB.")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _cells(row: dict[str, Any]) -> list[str]:
    claim = row["claim"]
    measured = row["status"] == "measured"

    def value(text: str) -> str:
        return text if measured else "not run"

    return [
        row["title"],
        value(f"{row['parameters'] or 0:,}"),
        f"{claim['accuracy']:.1f} %" if claim else "–",
        value(interval_text(row["accuracy"]) if measured else ""),
        value(_points(row["gain"])),
        _order(row["complexity"]),
        value(f"{row['images_per_second']['median']:,.0f}" if measured else ""),
        f"{claim['speedup']:.1f}×" if claim else "–",
        value(ratio_text(row["speedup"])),
        value(_time(row["time_to_baseline"])),
        row["verdict"],
    ]


def _points(gain: dict[str, Any] | None) -> str:
    if gain is None:
        return "–"
    half = f" ± {gain['half_width']:.1f}" if gain["half_width"] is not None else ""
    return f"{gain['mean']:+.1f}{half}"


def _order(complexity: dict[str, Any]) -> str:
    if complexity["exponent"] is None:
        return str(complexity["order"])
    c = complexity
    return f"{c['order']}, measured N^{c['exponent']:.2f} ({c['low']:.2f} to {c['high']:.2f})"


def _time(found: dict[str, Any] | None) -> str:
    if found is None:
        return "no baseline"
    if not found["reached"]:
        return "not reached"
    few = (
        ""
        if found["reached"] == found["seeds"]
        else (f", reached in {found['reached']} of {found['seeds']}")
    )
    speedup = f", {ratio_text(found['speedup'])}" if found["speedup"] else ""
    return f"{found['seconds']:,.3g} s{speedup}{few}"


CSV_COLUMNS = (
    "dataset",
    "preset",
    "model",
    "status",
    "seeds",
    "parameters",
    "accuracy_claimed_percent",
    "accuracy_mean_percent",
    "accuracy_half_width_percent",
    "images_per_second",
    "speedup_claimed",
    "speedup_median",
    "speedup_low",
    "speedup_high",
    "gain_mean_points",
    "gain_half_width_points",
    "complexity",
    "measured_exponent",
    "time_to_baseline_seconds",
    "time_to_baseline_speedup",
    "time_to_baseline_reached",
    "hours_200_epochs",
    "peak_memory_bytes",
    "verdict",
    "verdict_reason",
)


def to_csv(table: dict[str, Any]) -> str:
    """One line per data set, setting and model; empty where not run or not claimed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for dataset in table["datasets"]:
        for row in dataset["rows"]:
            claim, spread = row["claim"] or {}, row["speedup"] or {}
            exact, rates = row["accuracy"] or {}, row["images_per_second"] or {}
            gain, time = row["gain"] or {}, row["time_to_baseline"] or {}
            writer.writerow(
                [
                    dataset["dataset"],
                    (dataset["setting"] or {}).get("preset"),
                    row["model"],
                    row["status"],
                    len(row["seeds"]),
                    row["parameters"],
                    claim.get("accuracy"),
                    exact.get("mean"),
                    exact.get("half_width"),
                    rates.get("median"),
                    claim.get("speedup"),
                    spread.get("median"),
                    spread.get("low"),
                    spread.get("high"),
                    gain.get("mean"),
                    gain.get("half_width"),
                    row["complexity"]["order"],
                    row["complexity"]["exponent"],
                    time.get("seconds"),
                    (time.get("speedup") or {}).get("median"),
                    time.get("reached"),
                    row["hours_200_epochs"],
                    row["peak_memory"],
                    row["verdict"],
                    row["verdict_reason"],
                ]
            )
    return text.getvalue()
