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
            images_per_second  {median, values}: training steps, one value per seed
            speedup         {median, low, high, values}: images/s over the baseline's of the same
                            seed, run next to it; null for lack of such pairs
            claim           {accuracy, speedup} or null
"""

import csv
import io
import statistics
from datetime import UTC, datetime
from typing import Any

from training.config import DATASETS, MODELS, digest
from training.metrics import t_interval

SCHEMA = "linear-vit-table/1"
MACHINE = ("device", "cpu", "torch", "threads")  # speeds compare where these are equal
ROWS = ("baseline", "baseline-local", "ripple", "hydra", "hydra-local")

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
}


def make_table(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of table.json from run records; those not finished are left out.

    Runs are put together where all but model and seed is equal, the device and torch included.
    Data sets that carry a claim are listed even if never run.
    """
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for run in runs:
        if run["status"] == "finished":
            dataset = run["config"]["dataset"]
            key = (list(DATASETS).index(dataset), digest(_common(run)))
            groups.setdefault(key, []).append(run)
    tables = [
        _dataset_table(group) for _, group in sorted(groups.items(), key=lambda item: item[0])
    ]
    measured = {table["dataset"] for table in tables}
    tables += [_not_run(name) for name in CLAIMS["accuracy"] if name not in measured]
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "claims": CLAIMS,
        "datasets": tables,
    }


def _common(run: dict[str, Any]) -> dict[str, Any]:
    """What runs of one table share."""
    setting = dict(run["config"])
    for name in ("attention_type", "local_branch", "seed"):
        setting.pop(name)
    machine = {name: run["environment"].get(name) for name in MACHINE}
    return {"setting": setting, "machine": machine}


def _dataset_table(runs: list[dict[str, Any]]) -> dict[str, Any]:
    name = runs[0]["config"]["dataset"]
    by_model: dict[str, dict[int, dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: run.get("started", "")):
        by_model.setdefault(run["model"], {})[run["config"]["seed"]] = run  # the latest counts
    models = [m for m in MODELS if m in ROWS or m in by_model]
    return {
        "dataset": name,
        "title": DATASETS[name].title,
        "status": "measured",
        "setting": _common(runs[0])["setting"],
        "environment": runs[0]["environment"],
        "rows": [_row(name, model, by_model.get(model, {}), by_model) for model in models],
    }


def _not_run(name: str) -> dict[str, Any]:
    return {
        "dataset": name,
        "title": DATASETS[name].title,
        "status": "not run",
        "setting": None,
        "environment": None,
        "rows": [_row(name, model, {}, {}) for model in ROWS],
    }


def _row(
    dataset: str,
    model: str,
    runs: dict[int, dict[str, Any]],
    by_model: dict[str, dict[int, dict[str, Any]]],
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
    }
    if runs:
        seeds = row["seeds"]
        rates = [runs[seed]["images_per_second"] for seed in seeds]
        baseline = by_model.get("baseline", {})
        ratios = [
            runs[seed]["images_per_second"] / baseline[seed]["images_per_second"]
            for seed in seeds
            if seed in baseline
        ]
        row["parameters"] = runs[seeds[0]]["parameters"]
        row["accuracy"] = t_interval([100 * runs[s]["test_accuracy"] for s in seeds]).as_json()
        row["images_per_second"] = {"median": statistics.median(rates), "values": rates}
        if ratios:
            row["speedup"] = {
                "median": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
                "values": ratios,
            }
    return row


COLUMNS = (
    "Model",
    "Parameters",
    "Accuracy claimed",
    "Accuracy measured",
    "Images/s",
    "Speed-up claimed",
    "Speed-up measured",
)


def to_markdown(table: dict[str, Any]) -> str:
    """The table for people: one section per data set."""
    sections = []
    for dataset in table["datasets"]:
        lines = [f"## {dataset['title']}", "", _describe(dataset), ""]
        lines.append("| " + " | ".join(COLUMNS) + " |")
        lines.append("|---" + "|---:" * (len(COLUMNS) - 1) + "|")
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in dataset["rows"]]
        sections.append("\n".join(lines))
    notes = (
        "Accuracy: on the test set, read once per run; mean ± 95 % t-interval over the seeds. "
        "Images/s: training steps alone, the median over steps, then over seeds. Speed-up: "
        "images/s over the baseline's of the same seed; median [least – greatest]. "
        f"Claimed: as stated in {CLAIMS['source']} ({CLAIMS['backbone']})."
    )
    return "\n\n".join([*sections, notes]) + "\n"


def _describe(dataset: dict[str, Any]) -> str:
    if dataset["status"] == "not run":
        command = f"python train_minimal.py table --dataset {dataset['dataset']} --preset full"
        return f"Not run; `{command}` runs it."
    s, machine = dataset["setting"], dataset["environment"]
    device = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    threads = f", {_count(machine['threads'], 'thread')}" if machine["device"] == "cpu" else ""
    seeds = {seed for row in dataset["rows"] for seed in row["seeds"]}
    return (
        f"Preset {s['preset']}: dim {s['dim']}, depth {s['depth']}, {s['heads']} heads, "
        f"MLP {s['mlp_dim']}, patch {s['patch_size']}, batch {s['batch_size']}, "
        f"{s['epochs']} epochs, lr {s['lr']:g}; "
        f"{_count(len(seeds), 'seed')}; on {device}{threads}, torch {machine['torch']}."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _cells(row: dict[str, Any]) -> list[str]:
    claim = row["claim"]
    cells = [row["title"]]
    measured = row["status"] == "measured"
    cells.append(f"{row['parameters']:,}" if measured else "not run")
    cells.append(f"{claim['accuracy']:.1f} %" if claim else "–")
    cells.append(_interval(row["accuracy"]) if measured else "not run")
    cells.append(f"{row['images_per_second']['median']:,.0f}" if measured else "not run")
    cells.append(f"{claim['speedup']:.1f}×" if claim else "–")
    cells.append(_ratio(row["speedup"]) if measured else "not run")
    return cells


def _interval(interval: dict[str, Any]) -> str:
    if interval["half_width"] is None:
        return f"{interval['mean']:.1f} % (one seed)"
    return f"{interval['mean']:.1f} ± {interval['half_width']:.1f} %"


def _ratio(speedup: dict[str, Any] | None) -> str:
    if speedup is None:
        return "no baseline"
    if speedup["low"] == speedup["high"]:
        return f"{speedup['median']:.2f}×"
    return f"{speedup['median']:.2f}× [{speedup['low']:.2f} – {speedup['high']:.2f}]"


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
                ]
            )
    return text.getvalue()
