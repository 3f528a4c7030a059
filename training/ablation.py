"""One setting varied, all else equal: accuracy and speed of every value, as table and plot.

``ablation-<setting>.json``::

    schema       "linear-vit-ablation/1"
    setting      the name of the setting varied
    model, dataset, config    what the runs have in common, but for that setting and the seed
    environment  of the first run
    rows         one per value: value, seeds, parameters, accuracy and val_accuracy {mean,
                 half_width, values} in percent; images_per_second {median, values, how} and
                 speedup {median, low, high, values, how} over the first value: where how is "by
                 turns", of training steps of all values by turns in one process (low and high: 95 %
                 interval), else "in the runs", paired by seed (low and high: range of values)
    best         the value of the best validation accuracy (test accuracy chooses nothing)
    claimed_best what the original found best, or null
"""

import csv
import dataclasses
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linear_vit.training import speed
from linear_vit.training.config import DATASETS, MODELS, Config
from linear_vit.training.metrics import interval_text, paired_ratios, ratio_text, t_interval
from linear_vit.training.record import MACHINE, read_records, writing

SCHEMA = "linear-vit-ablation/1"
MODEL_OF = {"ripple_stages": "ripple", "hydra_branches": "hydra"}
CLAIMED_BEST = {"ripple_stages": 3, "hydra_branches": 4}


def summarise(
    name: str,
    configs: Sequence[Config],
    runs: Sequence[dict[str, Any]],
    machine: dict[str, Any],
    speeds: Mapping[Any, dict[str, float]] | None = None,
) -> dict[str, Any]:
    """The content of ablation-<name>.json from the records of these configurations here.

    ``speeds`` has the ``speed.rate`` of every value, timed by turns.
    """
    by_value: dict[Any, dict[int, dict[str, Any]]] = {}
    for config in configs:
        for run in runs:
            here = all(run["environment"].get(key) == machine[key] for key in MACHINE)
            if here and run["config"] == dataclasses.asdict(config):
                by_value.setdefault(getattr(config, name), {})[config.seed] = run
    first_value = getattr(configs[0], name)
    first = by_value[first_value]
    rows = []
    for value, found in by_value.items():
        seeds = sorted(found)
        rates = [found[seed]["images_per_second"] for seed in seeds]
        rate, how = statistics.median(rates), "in the runs"
        speedup = paired_ratios(found, first, lambda run: run["images_per_second"])
        if speeds:
            rate, how = speeds[value]["images_per_second"], "by turns"
            ratios = (speedup or {}).get("values", [])
            speedup = {**speed.over(speeds[value], speeds[first_value]), "values": ratios}
        rows.append(
            {
                "value": value,
                "seeds": seeds,
                "parameters": found[seeds[0]]["parameters"],
                "accuracy": t_interval([100 * found[s]["test_accuracy"] for s in seeds]).as_json(),
                "val_accuracy": t_interval([100 * _best_val(found[s]) for s in seeds]).as_json(),
                "images_per_second": {"median": rate, "values": rates, "how": how},
                "speedup": speedup and {"how": how, **speedup},
            }
        )
    config = configs[0]
    best = max(rows, key=lambda row: row["val_accuracy"]["mean"])
    common = {key: value for key, value in config.setting.items() if key != name}
    return {
        "schema": SCHEMA,
        "setting": name,
        "model": config.model,
        "dataset": config.dataset,
        "config": common,
        "environment": first[min(first)]["environment"],
        "rows": rows,
        "best": best["value"],
        "claimed_best": CLAIMED_BEST.get(name),
    }


def read(folder: Path) -> list[dict[str, Any]]:
    """The ablations saved in a folder; files that are none are left out."""
    fields = {"setting", "rows", "best"}
    return list(read_records(folder.glob("ablation-*.json"), SCHEMA, fields)[0].values())


def describe(found: dict[str, Any]) -> str:
    """Which value is best, beside the claim, in a sentence."""
    rows = {row["value"]: row for row in found["rows"]}
    best = rows[found["best"]]["val_accuracy"]
    interval = "" if best["half_width"] is None else f" ± {best['half_width']:.1f}"
    claim = f"; claimed: {found['claimed_best']}" if found["claimed_best"] is not None else ""
    return (
        f"{found['setting']} of {', '.join(str(value) for value in rows)} on "
        f"{DATASETS[found['dataset']].title}: best {found['best']} by validation accuracy "
        f"({best['mean']:.1f}{interval} %){claim}."
    )


def to_markdown(found: dict[str, Any]) -> str:
    columns = ("Parameters", "Validation accuracy", "Test accuracy", "Images/s", "Speed")
    lines = [
        f"{MODELS[found['model']].title}: {describe(found)}",
        "",
        f"| {found['setting']} | " + " | ".join(columns) + " | Seeds |",
        "|---:" * (len(columns) + 2) + "|",
    ]
    for row in found["rows"]:
        speedup = row["speedup"]
        cells = [
            str(row["value"]),
            f"{row['parameters']:,}",
            interval_text(row["val_accuracy"]),
            interval_text(row["accuracy"]),
            f"{row['images_per_second']['median']:,.0f}",
            ratio_text(speedup),
            str(len(row["seeds"])),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    how = {
        "by turns": "training steps of all values by turns in one process; 95 % interval",
        "in the runs": "same seed; median and range",
    }[found["rows"][0]["images_per_second"]["how"]]
    lines += ["", f"Speed: images/s over those of {found['rows'][0]['value']}: {how}."]
    return "\n".join(lines) + "\n"


def to_csv(found: dict[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            found["setting"],
            "seeds",
            "parameters",
            "val_accuracy_mean_percent",
            "accuracy_mean_percent",
            "accuracy_half_width_percent",
            "images_per_second",
            "speedup_median",
        ]
    )
    for row in found["rows"]:
        writer.writerow(
            [
                row["value"],
                len(row["seeds"]),
                row["parameters"],
                row["val_accuracy"]["mean"],
                row["accuracy"]["mean"],
                row["accuracy"]["half_width"],
                row["images_per_second"]["median"],
                (row["speedup"] or {}).get("median"),
            ]
        )
    return text.getvalue()


def plot(found: dict[str, Any], path: Path) -> None:
    """Accuracy above, images/s below, over the values; an SVG."""
    from matplotlib.figure import Figure

    rows = found["rows"]
    places = range(len(rows))
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for key, label, colour in (
        ("val_accuracy", "validation", "tab:gray"),
        ("accuracy", "test", "tab:blue"),
    ):
        above.errorbar(
            places,
            [row[key]["mean"] for row in rows],
            [row[key]["half_width"] or 0 for row in rows],
            marker="o",
            capsize=3,
            label=label,
            color=colour,
        )
    above.set_ylabel("accuracy, % (95 % t-interval)")
    above.set_title(f"{MODELS[found['model']].title} on {DATASETS[found['dataset']].title}")
    above.legend()
    below.plot(places, [row["images_per_second"]["median"] for row in rows], "o-", color="tab:blue")
    below.set_ylim(bottom=0)
    below.set_ylabel("training images/s")
    below.set_xlabel(found["setting"])
    below.set_xticks(list(places), [str(row["value"]) for row in rows])
    for axes in (above, below):
        axes.grid(alpha=0.3)
    with writing(path) as temporary:
        figure.savefig(temporary, format="svg")


def _best_val(run: dict[str, Any]) -> float:
    return max(entry["val_accuracy"] for entry in run["epochs"])
