"""The page's sections on models: accuracy beside the claims, and where a training step goes."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from linear_vit.reports.claims import PYTORCH, model_of
from linear_vit.reports.page import captions
from linear_vit.reports.page.parts import Figure, Part, Seen
from linear_vit.reports.saved import machines
from linear_vit.reports.saved.documents import Documents, Saved
from linear_vit.reports.statistics.seeds import percent_text
from linear_vit.reports.tables import ablation, breakdown, pairs, results_text, steps
from linear_vit.reports.tables.steps import Steps
from linear_vit.reports.tables.table import NOTHING, Cell, Line, Table, number, word
from linear_vit.reports.units import duration, exact

HOW_TO_TRAIN = "python train_minimal.py table"
HOW_TO_PROFILE = "python train_minimal.py profile --backend torch --out reports/out/training"
HOW_TO_TIME_STEPS = "python train_minimal.py bench --out reports/out/training"


# Results.


def results(seen: Seen) -> Iterator[Part]:
    """Every data set that was measured, then those that were not, and what is said of all once."""
    parts = [
        part
        for of_one in seen.found.each(seen.found.tables, lambda s: results_text.parts(s.content))
        for part in of_one
    ]
    there = [part for part in parts if part.content["status"] == "measured"]
    whole = {part.content["dataset"] for part in there if not part.content.get("subset")}
    lacking = {part.content["dataset"]: part for part in parts if part not in there}
    for part in there:
        yield from _measured(part, alone=[one.title for one in there].count(part.title) == 1)
    yield from (_table(part) for name, part in lacking.items() if name not in whole)
    shown = [found.content for found in seen.found.ablations]
    yield from seen.each(seen.found.ablations, lambda saved: [ablation.as_table(saved.content)])
    notes = [note for saved in seen.found.tables for note in results_text.notes(saved.content)]
    yield from (n for n in dict.fromkeys(notes) if n not in map(ablation.describe, shown))


def _table(part: results_text.Part) -> Table:
    title = f"{part.title}: {part.where}".replace("`", "")
    return replace(part.table, title=title, note=" ".join(part.notes))


def _measured(part: results_text.Part, *, alone: bool) -> Iterator[Part]:
    rows = [row for row in part.content["rows"] if row["accuracy"]]
    data = {"rows": [_interval(row) for row in rows], "unit": "accuracy, %"}
    title = f"Test accuracy on {part.title}" + ("" if alone else f": {part.where}")
    if rows:
        yield Figure("intervals", title, captions.of_accuracies(rows), data)
    yield _table(part)


def _interval(row: dict[str, Any]) -> dict[str, Any]:
    accuracy = row["accuracy"]
    mean, half = accuracy["mean"], accuracy["half_width"]
    return {
        "label": row["title"],
        "mean": mean,
        "low": mean - half if half is not None else None,
        "high": mean + half if half is not None else None,
        "values": accuracy["values"],
        "claim": (row["claim"] or {}).get("accuracy"),
        "tip": f"{row['title']}\n{percent_text(accuracy)}\n{pairs.values(accuracy, '%')}",
    }


# Training steps.


def training_steps(seen: Seen) -> Iterator[Part]:
    timed = steps.groups(seen.runs) if seen.runs else []
    joined = [_joined(one, seen.found) for one in timed if any(map(one.gain, one.models))]
    shares = seen.each(seen.found.breakdowns, _breakdown)
    yield from (*joined, *map(steps.as_table, timed), *shares)
    if not joined and (timed or shares):
        yield f"No step with and without own kernels; make it: {HOW_TO_TIME_STEPS}"
    elif joined and not seen.found.breakdowns:
        yield f"No share of the step; make it: {HOW_TO_PROFILE}"


def _breakdown(saved: Saved) -> Iterator[Part]:
    rows, names = saved.content["rows"], breakdown.parts(saved.content)
    table = breakdown.as_table(saved.content)
    bars = [
        {
            "label": row["title"],
            "part": name,
            "value": row["shares"][name],
            "tip": breakdown.tip(row, name),
        }
        for row in rows
        for name in names
    ]
    caption = captions.of_shares(rows)
    yield table
    yield Figure("bars", table.title, caption, {"rows": bars, "parts": names})


def _joined(timed: Steps, found: Documents) -> Table:
    """From kernel to model in one line each: k, s, the step predicted and measured, accuracy."""
    lines = [_joined_line(timed, model, found) for model in timed.models]
    note = (
        "Kernel speed-up: forward + backward over PyTorch's, of the benchmarked length nearest to "
        "the model’s, largest batch first (of several operations, together). Share: of the "
        "attention core in a step with PyTorch’s kernels. The two need not agree: the share holds "
        "reshapes and the hooks’ own cost, and a step calls kernels on its own batch and dims."
    )
    return Table(f"From kernel to model; {timed.where}", lines, note)


def _joined_line(timed: Steps, model: str, found: Documents) -> Line:
    own = timed.own(model)
    kernel, kernel_tip = _kernel_speedup(timed, model, own, found) or (None, "")
    share, share_tip = _share(timed, model, found, kernel) or (None, "")
    predicted = 1 / (1 - share + share / kernel) if kernel and share is not None else None
    accuracy = _accuracy_of(model, timed.setting, found)
    line = {
        "model": word(timed.title(model)),
        "own kernels": word(own or "none usable"),
        "kernel speed-up": number(kernel, "{:.2f}×", kernel_tip),
        "share of the step": number(share, "{:.1%}", share_tip),
        "step, predicted": number(predicted, "{:.2f}×"),
        "step, measured": number(timed.gain(model), "{:.2f}×"),
        "test accuracy": pairs.accuracy_cell(accuracy, missing=f"make it with {HOW_TO_TRAIN}"),
    }
    if kernel is None:
        no_kernel = "no timed kernel of this backend at such a length"
        line["kernel speed-up"] = Cell(NOTHING, tip=no_kernel)
    if share is None:
        line["share of the step"] = Cell(NOTHING, tip=f"make it with {HOW_TO_PROFILE}")
    return line


def _datasets(found: Documents) -> Iterator[dict[str, Any]]:
    for table in found.tables:
        yield from table.content["datasets"]


def _tokens(setting: dict[str, Any], found: Documents) -> int | None:
    """Tokens of a model, from a results table that has its data set."""
    for dataset in _datasets(found):
        patch = (dataset["setting"] or {}).get("patch_size")
        if dataset["dataset"] == setting["dataset"] and dataset.get("arithmetic") and patch:
            side = math.isqrt(dataset["arithmetic"]["tokens"]) * patch
            return int((side // setting["patch_size"]) ** 2)
    return None


def _kernel_speedup(
    timed: Steps, model: str, own: str | None, found: Documents
) -> tuple[float, str] | None:
    """Of the operations that a model's attention calls, on the machine of its steps."""
    operations, tokens = list(model_of(model).calls), _tokens(timed.setting, found)
    if not own or not tokens or found.runs is None or found.runs.kernels.empty or not operations:
        return None
    frame, words = found.runs.kernels, found.runs.words
    frame = frame[[not info.get("disturbed") for info in frame["info"]]]
    dtype = timed.dtype.partition(" ")[0]  # of the kernels' inputs under autocast
    frame = frame[(frame["pass"] == "forward+backward") & (frame["dtype"] == dtype)]
    frame = frame[(frame["machine"] == timed.machine) & frame["operation"].isin(operations)]
    # A shape a row: where a length was timed with several heads or dims, one of them is taken.
    case = ["operation", "file", "sweep", "total_tokens", "setting", "N"]
    both = frame.pivot_table("median_s", case, "backend").reindex(columns=[PYTORCH, own])
    both = both.dropna().reset_index()
    both["far"] = np.log(both["N"] / tokens).abs()
    both = both.sort_values(["far", "total_tokens"], ascending=[True, False], kind="stable")
    near = both.groupby("operation").first().reindex(operations)
    if near.isna().any(axis=None):
        return None
    tips = [
        f"{words.operation(str(operation))} at N = {row['N']:,.0f}: {PYTORCH} "
        f"{duration(row[PYTORCH])}, {own} {duration(row[own])}"
        for operation, row in near.iterrows()
    ]
    tips = [f"the model has N = {tokens:,}", *tips, timed.machine]
    return float(near[PYTORCH].sum() / near[own].sum()), "\n".join(tips)


def _share(
    timed: Steps, model: str, found: Documents, kernel: float | None
) -> tuple[float, str] | None:
    """Of the attention core in a step with PyTorch's kernels, on the machine of the steps."""
    keys = ("dataset", "dim", "depth", "patch_size", "batch_size")
    for content in (saved.content for saved in found.breakdowns):
        setting = content["setting"]
        alike = all(setting.get(key) == timed.setting.get(key) for key in keys)
        if not alike or machines.label(content["environment"]) != timed.machine:
            continue
        shares = {row["model"]: row["shares"].get("attention") for row in content["rows"]}
        share = shares.get(model)
        if share is not None and setting.get("backend") == PYTORCH:
            return share, f"{exact(100 * share, '%')} of a step with PyTorch’s kernels"
        if share is not None and kernel:
            # Measured with own kernels: in PyTorch's step that part is k times as long.
            pytorch = share * kernel / (1 - share + share * kernel)
            return pytorch, f"{exact(100 * share, '%')} of a step with own kernels, converted"
    return None


def _accuracy_of(model: str, setting: dict[str, Any], found: Documents) -> dict[str, Any] | None:
    keys = ("dataset", "dim", "depth", "patch_size")
    for dataset in _datasets(found):
        own = (dataset["setting"] or {}) | {"dataset": dataset["dataset"]}
        if not dataset.get("subset") and all(own.get(key) == setting.get(key) for key in keys):
            for row in dataset["rows"]:
                if row["model"] == model and row["accuracy"]:
                    return dict(row["accuracy"])
    return None
