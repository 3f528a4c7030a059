"""The page's sections on models: accuracy beside the claims, and where a training step goes."""

import math
from dataclasses import replace
from typing import Any

from linear_vit.reports.claims import BASELINE, PYTORCH, model_of
from linear_vit.reports.page.parts import Figure, Section
from linear_vit.reports.saved import machines
from linear_vit.reports.saved.documents import Documents, Saved
from linear_vit.reports.saved.runs import Runs
from linear_vit.reports.statistics.seeds import percent_text, points_text
from linear_vit.reports.tables import ablation, breakdown, pairs, results_text, steps
from linear_vit.reports.tables.results_text import Part
from linear_vit.reports.tables.steps import Steps
from linear_vit.reports.tables.table import (
    NOTHING,
    Cell,
    Line,
    Table,
    maybe,
    number,
    of_lines,
    word,
)
from linear_vit.reports.units import duration, exact

HOW_TO_TRAIN = "python train_minimal.py table"
HOW_TO_PROFILE = "python train_minimal.py profile --backend torch --out reports/out/training"
HOW_TO_TIME_STEPS = "python train_minimal.py bench --out reports/out/training"


# Results.


def results(found: Documents) -> Section:
    section = Section(
        "results",
        "Results",
        "Test accuracy (mean and 95 % t-interval over seeds) and speed of training, beside what "
        "the original claimed. The local branch (a depthwise 3×3 convolution) has rows of its own, "
        "so that what it gains can be told from what the attention gains.",
    )
    for tables, figures, notes in found.each(found.tables, _results_of):
        section.tables += tables
        section.figures += figures
        section.notes += notes
    section.tables += found.each(found.ablations, lambda saved: ablation.as_table(saved.content))
    if not section.tables:
        section.missing = f"{HOW_TO_TRAIN} --out reports/out/training"
    return section


def _results_of(saved: Saved) -> tuple[list[Table], list[Figure], list[str]]:
    tables, figures = [], []
    for part in results_text.parts(saved.content):
        title = f"{part.title}: {part.where}".replace("`", "")
        tables.append(replace(part.table, title=title, note=" ".join(part.notes)))
        figures += _accuracy_figure(part)
    return tables, figures, results_text.notes(saved.content)


def _accuracy_figure(part: Part) -> list[Figure]:
    rows = [row for row in part.content["rows"] if row["accuracy"]]
    if not rows:
        return []
    points = []
    for row in rows:
        accuracy, mean = row["accuracy"], row["accuracy"]["mean"]
        half = accuracy["half_width"]
        values = pairs.values(accuracy, "%")
        points.append(
            {
                "label": row["title"],
                "mean": mean,
                "low": mean - half if half is not None else None,
                "high": mean + half if half is not None else None,
                "values": accuracy["values"],
                "claim": (row["claim"] or {}).get("accuracy"),
                "tip": f"{row['title']}\n{percent_text(accuracy)}\n{values}",
            }
        )
    title = f"Test accuracy on {part.title}: {part.where}"
    return [
        Figure("intervals", title, _see_accuracy(rows), {"rows": points, "unit": "accuracy, %"})
    ]


def _see_accuracy(rows: list[dict[str, Any]]) -> str:
    best = max(rows, key=lambda row: row["accuracy"]["mean"])
    text = f"Highest: {best['title']}, {percent_text(best['accuracy'])}. "
    apart: list[str] = []
    open_: list[str] = []
    for row in rows:
        gain = row.get("gain")
        if not gain or row["model"] == BASELINE or gain["half_width"] is None:
            continue
        (apart if abs(gain["mean"]) > gain["half_width"] else open_).append(
            f"{row['title']} ({points_text(gain)})"
        )
    if apart:
        text += f"Apart from the baseline, in points paired by seed: {', '.join(apart)}. "
    if open_:
        text += f"Not told apart from it: {', '.join(open_)}. "
    return text + "Bars: 95 % t-intervals; small dots: one seed each; a diamond: the claim."


# Training steps.


def training_steps(found: Documents) -> Section:
    section = Section(
        "steps",
        "Training steps",
        "What a step costs, where its time goes, and what a faster kernel is worth to the model. "
        "By Amdahl’s law a kernel k times as fast, with a share s of the step, makes the step "
        "1 / (1 − s + s/k) times as fast.",
    )
    timed = steps.groups(found.runs) if found.runs else []
    joined = [_joined(one, found) for one in timed if any(map(one.gain, one.models))]
    section.tables += joined
    section.tables += [steps.as_table(one) for one in timed]
    for table, figure in found.each(found.breakdowns, _breakdown):
        section.tables.append(table)
        section.figures.append(figure)
    if not section.tables:
        section.missing = f"{HOW_TO_TIME_STEPS} && {HOW_TO_PROFILE}"
    elif not joined:
        section.notes.append(f"No step with and without own kernels; make it: {HOW_TO_TIME_STEPS}")
    elif not found.breakdowns:
        section.notes.append(f"No share of the step; make it: {HOW_TO_PROFILE}")
    return section


def _breakdown(saved: Saved) -> tuple[Table, Figure]:
    content, names = saved.content, breakdown.parts(saved.content)
    table = breakdown.as_table(content)
    bars = [
        {
            "label": row["title"],
            "part": name,
            "value": row["shares"][name],
            "tip": breakdown.tip(row, name),
        }
        for row in content["rows"]
        for name in names
    ]
    attention = {row["title"]: row["shares"]["attention"] for row in content["rows"]}
    most = max(attention, key=attention.__getitem__)
    least = min(attention, key=attention.__getitem__)
    caption = (
        f"The attention core takes {attention[most]:.0%} of a step of {most} and "
        f"{attention[least]:.0%} of {least}; only that part gets faster with a faster kernel."
    )
    return table, Figure("bars", table.title, caption, {"rows": bars, "parts": names})


def _joined(timed: Steps, found: Documents) -> Table:
    """From kernel to model in one line each: k, s, the step predicted and measured, accuracy."""
    lines = [_joined_line(timed, model, found) for model in timed.models]
    note = (
        "Kernel speed-up: forward + backward over PyTorch's, of the benchmarked length nearest to "
        "the model’s, largest batch first (of several operations, together). Share: of the "
        "attention core in a step with PyTorch’s kernels. The two need not agree: the share holds "
        "reshapes and the hooks’ own cost, and a step calls kernels on its own batch and dims."
    )
    return of_lines(f"From kernel to model; {timed.where}", lines, note)


def _joined_line(timed: Steps, model: str, found: Documents) -> Line:
    own = timed.own(model)
    kernel = _kernel_speedup(timed, model, own, _tokens(timed.setting, found), found.runs)
    share, share_tip = _share(timed, model, found, kernel and kernel[0])
    predicted = 1 / (1 - share + share / kernel[0]) if kernel and share is not None else None
    accuracy = _accuracy_of(model, timed.setting, found)
    return {
        "model": word(timed.title(model)),
        "own kernels": word(own or "none usable"),
        "kernel speed-up": number(f"{kernel[0]:.2f}×", kernel[0], kernel[1])
        if kernel
        else Cell(NOTHING, tip="no timed kernel of this backend at such a length"),
        "share of the step": number(f"{share:.1%}", share, share_tip)
        if share is not None
        else Cell(NOTHING, tip=f"make it with {HOW_TO_PROFILE}"),
        "step, predicted": maybe(predicted, "{:.2f}×"),
        "step, measured": maybe(timed.gain(model), "{:.2f}×"),
        "test accuracy": number(
            percent_text(accuracy), accuracy["mean"], pairs.values(accuracy, "%")
        )
        if accuracy
        else Cell(NOTHING, tip=f"make it with {HOW_TO_TRAIN}"),
    }


def _tokens(setting: dict[str, Any], found: Documents) -> int | None:
    """Tokens of a model, from a results table that has its data set."""
    for table in found.tables:
        for dataset in table.content["datasets"]:
            if dataset["dataset"] == setting["dataset"] and dataset.get("arithmetic"):
                patch = (dataset["setting"] or {}).get("patch_size")
                if patch:
                    side = math.isqrt(dataset["arithmetic"]["tokens"]) * patch
                    return int((side // setting["patch_size"]) ** 2)
    return None


def _kernel_speedup(
    timed: Steps, model: str, own: str | None, tokens: int | None, loaded: Runs | None
) -> tuple[float, str] | None:
    """Of the operations that a model's attention calls, on the machine of its steps."""
    operations = model_of(model).calls
    if not own or not tokens or loaded is None or loaded.kernels.empty or not operations:
        return None
    dtype = timed.dtype.partition(" ")[0]  # of the kernels' inputs under autocast
    times: dict[str, float] = {PYTORCH: 0.0, own: 0.0}
    tips = []
    for operation in operations:
        frame = loaded.kernels
        frame = frame[(frame["operation"] == operation) & (frame["pass"] == "forward+backward")]
        frame = frame[(frame["dtype"] == dtype) & (frame["machine"] == timed.machine)]
        # A shape a row: where a length was timed with several heads or dims, one of them is taken.
        case = ["file", "sweep", "total_tokens", "setting", "N"]
        both = frame.pivot_table("median_s", case, "backend")
        if own not in both or PYTORCH not in both:
            return None
        both = both.dropna(subset=[own, PYTORCH]).reset_index()
        if both.empty:
            return None
        distance = (both["N"].astype(float) / tokens).map(lambda r: abs(math.log(r)))
        near = both[distance == distance.min()].sort_values("total_tokens", kind="stable").iloc[-1]
        for name in times:
            times[name] += float(near[name])
        tips.append(
            f"{loaded.words.operation(operation)} at N = {near['N']:,}: {PYTORCH} "
            f"{duration(near[PYTORCH])}, {own} {duration(near[own])}"
        )
    tips = [f"the model has N = {tokens:,}", *tips, timed.machine]
    return times[PYTORCH] / times[own], "\n".join(tips)


def _share(
    timed: Steps, model: str, found: Documents, kernel: float | None
) -> tuple[float | None, str]:
    """Of the attention core in a step with PyTorch's kernels, on the machine of the steps."""
    keys = ("dataset", "dim", "depth", "patch_size", "batch_size")
    for saved in found.breakdowns:
        content = saved.content
        alike = all(content["setting"].get(key) == timed.setting.get(key) for key in keys)
        if not alike or machines.label(content["environment"]) != timed.machine:
            continue
        for row in content["rows"]:
            if row["model"] != model:
                continue
            share = row["shares"].get("attention")
            if share is None:
                continue
            if content["setting"].get("backend") == PYTORCH:
                return share, f"{exact(100 * share, '%')} of a step with PyTorch’s kernels"
            if kernel:
                # Measured with own kernels: in PyTorch's step that part is k times as long.
                pytorch = share * kernel / (1 - share + share * kernel)
                return pytorch, f"{exact(100 * share, '%')} of a step with own kernels, converted"
    return None, ""


def _accuracy_of(model: str, setting: dict[str, Any], found: Documents) -> dict[str, Any] | None:
    keys = ("dataset", "dim", "depth", "patch_size")
    wanted = {key: setting.get(key) for key in keys}
    for saved in found.tables:
        for dataset in saved.content["datasets"]:
            own = (dataset["setting"] or {}) | {"dataset": dataset["dataset"]}
            if {key: own.get(key) for key in keys} == wanted:
                for row in dataset["rows"]:
                    if row["model"] == model and row["accuracy"]:
                        return row["accuracy"]
    return None
