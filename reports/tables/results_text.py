"""The results table as people read it: a part per data set, the notes below, and CSV."""

from dataclasses import dataclass
from typing import Any

from linear_vit.reports.saved import machines
from linear_vit.reports.statistics.seeds import points_text, ratio_text
from linear_vit.reports.tables import pairs, table
from linear_vit.reports.tables.table import NOTHING, Cell, Line, Table, count, number, word
from linear_vit.reports.units import exact
from linear_vit.screen import counted

_VERDICTS = {"reproduced": "best", "not reproduced": "failed"}
_NOTES = (
    "Accuracy: on the test set, read once per run; mean ± 95 % t-interval over the seeds. "
    "Over the baseline: the same in percentage points, paired by seed. "
    "Complexity: of the attention core in N tokens, and the exponent measured. "
    "Images/s: training steps alone. Speed-up: images/s over the baseline's; where there is a "
    "saved run of the models' training steps, turn by turn in one process, with the 95 % interval; "
    "otherwise medians over steps, then over the seeds' own pairs [least – greatest]. "
    "Time to the baseline's accuracy: seconds of training steps until the validation accuracy "
    "first reached the baseline's final one of the same seed, and the speed-up over the "
    "baseline's own first time; medians of the seeds that got there. "
    "Verdict: reproduced where accuracy and speed-up, at the claimed size, reach the claim "
    "within their 95 % t-intervals."
)


@dataclass(frozen=True)
class Part:
    """A data set at one setting: what was run where, the table, and what is said below it."""

    title: str
    where: str
    table: Table
    notes: list[str]
    content: dict[str, Any]


def parts(content: dict[str, Any]) -> list[Part]:
    """A part per data set of table.json."""
    return [_part(dataset, content["claims"]) for dataset in content["datasets"]]


def notes(content: dict[str, Any]) -> list[str]:
    """What is said once, of all data sets."""
    claims = content["claims"]
    said = [f"{_NOTES} Claimed: as stated in {claims['source']} ({claims['backbone']})."]
    said += [entry["text"] for entry in content["ablations"]]
    if content["exponents"]:
        said.append(f"Exponents: {content['exponents']}.")
    if content.get("speeds"):
        said.append(f"Speed-ups by turns: {', '.join(content['speeds'])}.")
    return said


def document(content: dict[str, Any]) -> list[table.Part]:
    """The whole table for people: one section per data set."""
    lines: list[table.Part] = []
    for part in parts(content):
        lines += [f"## {part.title}", part.where, part.table, *part.notes]
    return [*lines, *notes(content)]


def _part(dataset: dict[str, Any], claims: dict[str, Any]) -> Part:
    here = machines.label(dataset["environment"]) if dataset["environment"] else ""
    lines = [_line(row, here) for row in dataset["rows"]]
    said = [arithmetic(dataset["arithmetic"])] if dataset["arithmetic"] else []
    hours = claims["hours_200_epochs"].get(dataset["dataset"])
    if hours and dataset["status"] == "measured" and not dataset.get("subset"):
        said.append(f"Claimed for 200 epochs: about {hours} h on one RTX 3090.")
    if any(row["peak_memory"] for row in dataset["rows"]):
        said.append(f"Claimed peak memory: {claims['peak_memory_gb']} GB.")
    said += [_trained_back(row) for row in dataset["rows"] if row.get("init_from")]
    title = str(dataset["title"])
    return Part(title, _where(dataset), Table(title, table.without_empty(lines)), said, dataset)


def _trained_back(row: dict[str, Any]) -> str:
    """What came back of the accuracy of the weights that a model began with."""
    began, gain = row["init_from"], row["gain"]
    over = f", {points_text(gain)} points over the baseline" if gain else ""
    return (
        f"{row['title']}: {began['swapped']:.1f} % of the validation images right after its "
        f"attention was swapped, and {row['accuracy']['mean']:.1f} % of the test images after "
        f"{counted(began['epochs'], 'epoch')} more{over}."
    )


def _where(dataset: dict[str, Any]) -> str:
    if dataset["status"] == "not run":
        command = f"python train_minimal.py table --dataset {dataset['dataset']} --preset full"
        return f"Not run; `{command}` runs it."
    s = dataset["setting"]
    seeds = {seed for row in dataset["rows"] for seed in row["seeds"]}
    return (
        f"Preset {s['preset']}, recipe {s['recipe']}: dim {s['dim']}, depth {s['depth']}, "
        f"{counted(s['heads'], 'head')}, MLP {s['mlp_dim']}, patch {s['patch_size']}, batch "
        f"{s['batch_size']}, {counted(s['epochs'], 'epoch')}, lr {s['lr']:g}, amp {s['amp']}"
        f"{', compiled' if s['compile'] else ''}; {counted(len(seeds), 'seed')}; "
        f"on {machines.label(dataset['environment'])}."
    )


def arithmetic(a: dict[str, Any]) -> str:
    """What the FLOP of a layer allow, in a sentence."""
    return (
        f"What arithmetic allows at {a['tokens']} tokens and dim {a['dim']}: the softmax core is "
        f"{a['core_share']:.1%} of a layer's FLOP, so a free one gives {a['free_core']:.2f}×, "
        f"attention on an eighth of the tokens {a['pooled']:.2f}×, no attention at all "
        f"{a['no_attention']:.2f}×."
    )


def _line(row: dict[str, Any], here: str) -> Line:
    """The cells of a model; ``here`` is the machine that its table is of."""
    claim, accuracy, gain, nothing = row["claim"] or {}, row["accuracy"], row["gain"], Cell(NOTHING)
    rate, peak, points = row["images_per_second"], row["peak_memory"], points_text(gain)
    return {
        "Model": word(row["title"]),
        "Parameters": count(row["parameters"]),
        "Accuracy": pairs.accuracy_cell(accuracy) if accuracy else Cell("not run"),
        "Accuracy claimed": number(claim.get("accuracy"), "{:.1f} %"),
        "Over the baseline": number(gain["mean"], points, pairs.values(gain, "points"))
        if gain
        else nothing,
        "Complexity": _order(row["complexity"], here),
        "Images/s": number(rate["median"], "{:,.0f}", pairs.values(rate, "images/s"))
        if rate
        else nothing,
        "Speed-up": pairs.speedup_cell(row["speedup"]),
        "Speed-up claimed": number(claim.get("speedup"), "{:.1f}×"),
        "Time to baseline's accuracy": _time_to(row["time_to_baseline"]),
        "200 epochs": number(row["hours_200_epochs"], "{:.2g} h"),
        "Peak memory": number(peak and peak / 1e9, "{:.2g} GB"),
        "Seeds": count(len(row["seeds"]) or None),
        "Verdict": word(row["verdict"], row["verdict_reason"], _VERDICTS.get(row["verdict"], "")),
    }


def _order(c: dict[str, Any], here: str) -> Cell:
    if c.get("exponent") is None:
        return word(c["order"], "not measured on this machine")
    fit = f"N^{c['exponent']:.2f} ({c['low']:.2f} to {c['high']:.2f})"
    tip = f"{c['pass']}, {c['backend']}, {c['dtype']}, {c['machine']}"
    if c["machine"] != here:  # tables of older versions have mixed two
        return word(c["order"], f"{fit} on another machine: {tip}")
    return word(f"{c['order']}, measured {fit}", tip)


def _time_to(found: dict[str, Any] | None) -> Cell:
    if found is None:
        return Cell(NOTHING)
    share = f"{found['reached']} of {found['seeds']}"
    tip = f"to {exact(found['target_percent'])} % validation accuracy, reached by "
    tip += f"{found['reached']} of {counted(found['seeds'], 'seed')}"
    if found["seconds"] is None:
        return Cell("not reached", tip=tip)
    text = f"{found['seconds']:,.3g} s"
    if found["speedup"]:
        text += f", {ratio_text(found['speedup'])}"
    if found["reached"] != found["seeds"]:
        text += f", reached in {share}"
    return number(found["seconds"], text, tip)


# Column of table.csv, and where in a row of table.json it stands.
_CSV = {
    **{name: name for name in ("model", "status", "seeds", "parameters")},
    "accuracy_claimed_percent": "claim.accuracy",
    "accuracy_mean_percent": "accuracy.mean",
    "accuracy_half_width_percent": "accuracy.half_width",
    "images_per_second": "images_per_second.median",
    "speedup_claimed": "claim.speedup",
    "speedup_median": "speedup.median",
    "speedup_low": "speedup.low",
    "speedup_high": "speedup.high",
    "gain_mean_points": "gain.mean",
    "gain_half_width_points": "gain.half_width",
    "complexity": "complexity.order",
    "measured_exponent": "complexity.exponent",
    "exponent_machine": "complexity.machine",
    "time_to_baseline_seconds": "time_to_baseline.seconds",
    "time_to_baseline_speedup": "time_to_baseline.speedup.median",
    "time_to_baseline_reached": "time_to_baseline.reached",
    "hours_200_epochs": "hours_200_epochs",
    "peak_memory_bytes": "peak_memory",
    **{name: name for name in ("verdict", "verdict_reason")},
}


def to_csv(content: dict[str, Any]) -> str:
    """One line per data set, setting and model; empty where not run or not claimed."""
    rows = []
    for dataset in content["datasets"]:
        setting, where = dataset["setting"], dataset["environment"]
        alike = {
            "dataset": dataset["title"] if dataset.get("subset") else dataset["dataset"],
            "preset": setting and setting["preset"],
            "machine": where and machines.label(where),
        }
        for row in dataset["rows"]:
            rows.append(alike | table.picked(row | {"seeds": len(row["seeds"])}, _CSV))
    return table.to_csv(rows)
