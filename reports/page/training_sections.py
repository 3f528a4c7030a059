"""The page's sections on models: accuracy beside the claims, and where a training step goes."""

import math
from typing import Any

import pandas as pd

from linear_vit.reports import plots
from linear_vit.reports.page.kernel_sections import cases
from linear_vit.reports.page.parts import (
    Cell,
    Figure,
    Row,
    Section,
    Table,
    columns,
    exact,
    number,
    word,
)
from linear_vit.reports.saved.documents import Documents, Saved
from linear_vit.reports.saved.runs import Runs

HOW_TO_TRAIN = "python train_minimal.py table"
HOW_TO_PROFILE = "python train_minimal.py profile --backend torch --out reports/out/training"
HOW_TO_TIME_STEPS = "python train_minimal.py bench --out reports/out/training"

# The dtype of a kernel's inputs under training's --amp.
_DTYPES = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}
_VERDICTS = {"reproduced": "best", "not reproduced": "failed"}
_SHARES = ("attention", "projections", "mlp", "optimizer", "augmentation", "loader", "other")
# What a model's attention is made of, as timed by the kernel benchmarks.
_OPERATIONS = {
    "baseline": ("softmax_attention",),
    "hydra": ("linear_attention",),
    "ripple": ("ripple_pool", "ripple_expand"),
}


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
    section.tables += found.each(found.ablations, _ablation)
    if not section.tables:
        section.missing = f"{HOW_TO_TRAIN} --out reports/out/training"
    return section


def _results_of(saved: Saved) -> tuple[list[Table], list[Figure], list[str]]:
    content = saved.content
    claims = content["claims"]
    tables, figures, notes = [], [], []
    for dataset in content["datasets"]:
        measured = dataset["setting"] is not None
        how = _setting(dataset["setting"]) if measured else "not run"
        cells = [_result_cells(row) for row in dataset["rows"]]
        # A column that says nothing of any model is left out.
        titles = [t for t in cells[0] if t == "model" or any(row[t].text != "–" for row in cells)]
        rows = [Row([row[title] for title in titles]) for row in cells]
        words = ["model", "complexity", "verdict"]
        note = _also_claimed(dataset, claims) if measured else ""
        tables.append(Table(f"{dataset['title']}: {how}", columns(titles, words), rows, note))
        if measured:
            figures += _accuracy_figure(dataset)
        if dataset.get("arithmetic"):
            notes.append(_arithmetic(dataset))
    notes.append(f"Claims: {claims['source']}, at {claims['backbone']}.")
    notes += [str(entry["text"]) for entry in content.get("ablations") or []]
    if content.get("exponents"):
        notes.append(f"Exponents in the results table: {content['exponents']}.")
    return tables, figures, notes


def _result_cells(row: dict[str, Any]) -> dict[str, Cell]:
    claim = row["claim"] or {}
    accuracy, rate, speedup = row["accuracy"], row["images_per_second"], row["speedup"]
    gain, order, peak = row.get("gain"), row.get("complexity"), row.get("peak_memory")
    seeds, verdict = len(row["seeds"]), row.get("verdict", "–")
    return {
        "model": word(row["title"]),
        "accuracy": number(_accuracy(accuracy), accuracy["mean"], _values(accuracy["values"], "%"))
        if accuracy
        else Cell("not run"),
        "accuracy claimed": _maybe(claim.get("accuracy"), "{:.1f} %"),
        "over baseline": number(_points(gain), gain["mean"], _values(gain["values"], "points"))
        if gain
        else Cell("–"),
        "training speed-up": number(
            f"{speedup['median']:.2f}×",
            speedup["median"],
            f"{exact(speedup['median'])}×, {speedup['low']:.3f} to {speedup['high']:.3f} "
            f"{speedup.get('how', 'by seed')}",
        )
        if speedup
        else Cell("–"),
        "speed-up claimed": _maybe(claim.get("speedup"), "{:.1f}×"),
        "time to baseline’s accuracy": _time_to(row.get("time_to_baseline")),
        "verdict": word(verdict, str(row.get("verdict_reason", "")), _VERDICTS.get(verdict, "")),
        "images/s": number(
            f"{rate['median']:,.0f}", rate["median"], _values(rate["values"], "images/s")
        )
        if rate
        else Cell("–"),
        "200 epochs": _maybe(row.get("hours_200_epochs"), "{:.2g} h"),
        "peak memory": _maybe(peak and peak / 1e9, "{:.2g} GB"),
        "parameters": _maybe(row["parameters"], "{:,}"),
        "complexity": word(*_complexity(order)) if order else Cell("–"),
        "seeds": number(str(seeds), seeds) if seeds else Cell("–"),
    }


def _accuracy_figure(dataset: dict[str, Any]) -> list[Figure]:
    rows = [row for row in dataset["rows"] if row["accuracy"]]
    if not rows:
        return []
    points = []
    for row in rows:
        half = row["accuracy"]["half_width"]
        mean = row["accuracy"]["mean"]
        points.append(
            {
                "label": row["title"],
                "mean": mean,
                "low": mean - half if half is not None else None,
                "high": mean + half if half is not None else None,
                "values": row["accuracy"]["values"],
                "claim": (row["claim"] or {}).get("accuracy"),
                "tip": f"{row['title']}\n{_accuracy(row['accuracy'])}\n"
                f"{_values(row['accuracy']['values'], '%')}",
            }
        )
    title = f"Test accuracy on {dataset['title']}: {_setting(dataset['setting'])}"
    return [
        Figure("intervals", title, _see_accuracy(rows), {"rows": points, "unit": "accuracy, %"})
    ]


def _see_accuracy(rows: list[dict[str, Any]]) -> str:
    best = max(rows, key=lambda row: row["accuracy"]["mean"])
    text = f"Highest: {best['title']}, {_accuracy(best['accuracy'])}. "
    apart: list[str] = []
    open_: list[str] = []
    for row in rows:
        gain = row.get("gain")
        if not gain or row["model"] == "baseline" or gain["half_width"] is None:
            continue
        (apart if abs(gain["mean"]) > gain["half_width"] else open_).append(
            f"{row['title']} ({_points(gain)})"
        )
    if apart:
        text += f"Apart from the baseline, in points paired by seed: {', '.join(apart)}. "
    if open_:
        text += f"Not told apart from it: {', '.join(open_)}. "
    return text + "Bars: 95 % t-intervals; small dots: one seed each; a diamond: the claim."


def _ablation(saved: Saved) -> Table:
    content = saved.content
    rows = []
    for row in content["rows"]:
        accuracy, held_out = row["accuracy"], row["val_accuracy"]
        rate, speedup = row["images_per_second"]["median"], row["speedup"]
        best = "best" if row["value"] == content["best"] else ""
        rows.append(
            Row(
                [
                    number(str(row["value"]), row["value"]),
                    number(f"{row['parameters']:,}", row["parameters"]),
                    number(
                        _accuracy(held_out),
                        held_out["mean"],
                        _values(held_out["values"], "%"),
                        best,
                    ),
                    number(_accuracy(accuracy), accuracy["mean"], _values(accuracy["values"], "%")),
                    number(f"{rate:,.0f}", rate, exact(rate, "images/s")),
                    number(
                        f"{speedup['median']:.2f}×",
                        speedup["median"],
                        f"{speedup['low']:.3f} to {speedup['high']:.3f} {speedup['how']}",
                    )
                    if speedup
                    else Cell("–"),
                    number(str(len(row["seeds"])), len(row["seeds"])),
                ]
            )
        )
    titles = [
        content["setting"],
        "parameters",
        "validation accuracy",
        "test accuracy",
        "images/s",
        "speed",
        "seeds",
    ]
    claimed = content["claimed_best"]
    note = f"Best by validation accuracy: {content['best']}"
    note += f"; claimed: {claimed}." if claimed is not None else "."
    config = content["config"]
    title = (
        f"{content['setting'].replace('_', ' ').capitalize()} of {content['model']} on "
        f"{content['dataset']}: dim {config['dim']}, depth {config['depth']}, "
        f"{config['epochs']} epochs"
    )
    return Table(title, columns(titles), rows, note)


# Training steps.


def steps(found: Documents) -> Section:
    section = Section(
        "steps",
        "Training steps",
        "What a step costs, where its time goes, and what a faster kernel is worth to the model. "
        "By Amdahl’s law a kernel k times as fast, with a share s of the step, makes the step "
        "1 / (1 − s + s/k) times as fast.",
    )
    section.tables += found.each(found.speeds, lambda saved: _joined(saved, found))
    section.tables += found.each(found.speeds, _step_speed)
    for table, figure in found.each(found.breakdowns, _breakdown):
        section.tables.append(table)
        section.figures.append(figure)
    section.tables += _benchmarked(found.runs)
    if not section.tables:
        section.missing = f"{HOW_TO_TIME_STEPS} && {HOW_TO_PROFILE}"
    elif not found.speeds:
        section.notes.append(f"No step with and without own kernels; make it: {HOW_TO_TIME_STEPS}")
    elif not found.breakdowns:
        section.notes.append(f"No share of the step; make it: {HOW_TO_PROFILE}")
    return section


def _breakdown(saved: Saved) -> tuple[Table, Figure]:
    content = saved.content
    backend = content["setting"].get("backend") or "the fastest backend"
    rows, bars, attention = [], [], {}
    for row in content["rows"]:
        shares = row["shares"]
        attention[row["title"]] = shares["attention"]
        cells = [word(row["title"])]
        for name in _SHARES:
            seconds = shares[name] * row["seconds"]
            tip = f"{row['title']}, {name}\n{shares[name]:.2%} of a step, {exact(seconds * 1e3)} ms"
            cells.append(number(f"{shares[name]:.1%}", shares[name], tip))
            bars.append({"label": row["title"], "part": name, "value": shares[name], "tip": tip})
        cells.append(number(plots.duration(row["seconds"]), row["seconds"]))
        rate = row["images_per_second"]
        cells.append(number(f"{rate:,.0f}", rate, exact(rate, "images/s")))
        rows.append(Row(cells))
    where = _where(content)
    title = f"Shares of a training step, {backend}; {where}"
    most, least = (
        max(attention, key=attention.__getitem__),
        min(attention, key=attention.__getitem__),
    )
    caption = (
        f"The attention core takes {attention[most]:.0%} of a step of {most} and "
        f"{attention[least]:.0%} of {least}; only that part gets faster with a faster kernel. "
        "Projections are the linear layers around attention; other is norms, embedding, head, loss "
        "and clipping."
    )
    titles = ["model", *_SHARES, "step", "images/s"]
    table = Table(title, columns(titles, ["model"]), rows)
    return table, Figure("bars", title, caption, {"rows": bars, "parts": list(_SHARES)})


def _step_speed(saved: Saved) -> Table:
    content = saved.content
    names = list(dict.fromkeys(name for row in content["rows"] for name in row["backends"]))
    rows = []
    for row in content["rows"]:
        cells = [word(row["title"])]
        for name in names:
            timing = row["backends"].get(name, {})
            if "seconds" in timing:
                tip = (
                    f"{exact(timing['seconds'] * 1e3, 'ms')}, {exact(timing['images_per_second'])}"
                )
                tip += f" images/s; quartiles {timing['relative_iqr']:.1%} apart"
                mark = "best" if name == row["own"] and (row["speedup"] or 0) > 1 else ""
                cells.append(
                    number(plots.duration(timing["seconds"]), timing["seconds"], tip, mark)
                )
            else:
                cells.append(Cell("–", tip=str(timing.get("reason", ""))))
        cells.append(_maybe(row["speedup"], "{:.2f}×"))
        rows.append(Row(cells))
    table_columns = columns(["model", *names, "speed-up"], ["model"])
    for column in table_columns:
        if column.title in names:
            column.facets["backend"] = column.title
    note = "Speed-up: PyTorch’s step over that with the fastest own kernels."
    return Table(f"A training step by backend; {_where(content)}", table_columns, rows, note)


def _joined(saved: Saved, found: Documents) -> Table:
    """From kernel to model in one line each: k, s, the step predicted and measured, accuracy."""
    content = saved.content
    tokens = _tokens(content["setting"], found)
    rows = []
    for row in content["rows"]:
        own = row["own"]
        dtype = _DTYPES.get(content["setting"]["amp"], "float32")
        kernel = _kernel_speedup(row["model"], own, tokens, dtype, found.runs)
        share, share_tip = _share(row["model"], content, found, kernel and kernel[0])
        predicted = 1 / (1 - share + share / kernel[0]) if kernel and share is not None else None
        measured = row["speedup"]
        accuracy = _accuracy_of(row["model"], content["setting"], found)
        rows.append(
            Row(
                [
                    word(row["title"]),
                    word(own or "none usable"),
                    number(f"{kernel[0]:.2f}×", kernel[0], kernel[1])
                    if kernel
                    else Cell("–", tip="no timed kernel of this backend at such a length"),
                    number(f"{share:.1%}", share, share_tip)
                    if share is not None
                    else Cell("–", tip=f"make it with {HOW_TO_PROFILE}"),
                    _maybe(predicted, "{:.2f}×"),
                    _maybe(measured, "{:.2f}×"),
                    number(_accuracy(accuracy), accuracy["mean"], _values(accuracy["values"], "%"))
                    if accuracy
                    else Cell("–", tip=f"make it with {HOW_TO_TRAIN}"),
                ]
            )
        )
    titles = [
        "model",
        "own kernels",
        "kernel speed-up",
        "share of the step",
        "step, predicted",
        "step, measured",
        "test accuracy",
    ]
    note = (
        "Kernel speed-up: forward + backward over torch, of the benchmarked length nearest to the "
        "model’s, largest batch first (ripple: pooling and expansion together). Share: of the "
        "attention core in a step with PyTorch’s kernels. The two need not agree: the share holds "
        "reshapes and the hooks’ own cost, and a step calls kernels on its own batch and dims."
    )
    title = f"From kernel to model; {_where(content)}"
    return Table(title, columns(titles, titles[:2]), rows, note)


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
    model: str, own: str | None, tokens: int | None, dtype: str, loaded: Runs | None
) -> tuple[float, str] | None:
    operations = _OPERATIONS.get(model.partition("-")[0], ())
    if not own or not tokens or loaded is None or loaded.kernels.empty or not operations:
        return None
    times: dict[str, float] = {"torch": 0.0, own: 0.0}
    tips = []
    for operation in operations:
        frame = loaded.kernels
        frame = frame[(frame["operation"] == operation) & (frame["pass"] == "forward+backward")]
        frame = frame[frame["dtype"] == dtype]
        both = frame.pivot_table("median_s", ["machine", "total_tokens", "N"], "backend")
        if own not in both or "torch" not in both:
            return None
        both = both.dropna(subset=[own, "torch"]).reset_index()
        if both.empty:
            return None
        distance = (both["N"].astype(float) / tokens).map(lambda r: abs(math.log(r)))
        near = both[distance == distance.min()].sort_values("total_tokens").iloc[-1]
        for name in times:
            times[name] += float(near[name])
        tips.append(
            f"{plots.label(operation)} at N = {near['N']:,}: torch "
            f"{plots.duration(near['torch'])}, "
            f"{own} {plots.duration(near[own])} ({near['machine']})"
        )
    return times["torch"] / times[own], "\n".join([f"the model has N = {tokens:,}", *tips])


def _share(
    model: str, speed: dict[str, Any], found: Documents, kernel: float | None
) -> tuple[float | None, str]:
    """Of the attention core in a step with PyTorch's kernels."""
    keys = ("dataset", "dim", "depth", "patch_size", "batch_size")
    for saved in found.breakdowns:
        content = saved.content
        if any(content["setting"].get(key) != speed["setting"].get(key) for key in keys):
            continue
        for row in content["rows"]:
            if row["model"] != model:
                continue
            share = row["shares"]["attention"]
            if content["setting"].get("backend") == "torch":
                return share, f"{exact(100 * share, '%')} of a step with torch’s kernels"
            if kernel:
                # Measured with own kernels: in PyTorch's step that part is k times as long.
                torch = share * kernel / (1 - share + share * kernel)
                return torch, f"{exact(100 * share, '%')} of a step with own kernels, converted"
    return None, ""


def _accuracy_of(model: str, setting: dict[str, Any], found: Documents) -> dict[str, Any] | None:
    keys = ("dataset", "dim", "depth", "patch_size")
    for saved in found.tables:
        for dataset in saved.content["datasets"]:
            own = dataset["setting"] or {}
            if dataset["dataset"] != setting["dataset"] or any(
                own.get(key) != setting.get(key) for key in keys
            ):
                continue
            for row in dataset["rows"]:
                if row["model"] == model and row["accuracy"]:
                    return row["accuracy"]
    return None


def _benchmarked(loaded: Runs | None) -> list[Table]:
    """Steps as the benchmarks time them: one fixed random batch, no data loading."""
    if loaded is None or loaded.training.empty:
        return []
    tables = []
    for machine, frame in loaded.training.groupby("machine", sort=False):
        baseline = frame[frame["model"] == "baseline"].set_index("backend")["median_s"]
        rows = [Row(_step_cells(row, baseline)) for row in cases(frame)]
        s = frame.iloc[0]["settings"]
        title = (
            f"Optimiser step on a fixed random batch: dim {s['dim']}, depth {s['depth']}, batch "
            f"{s['batch_size']}, {s['dataset']} sizes, {frame.iloc[0]['dtype']}; {machine}"
        )
        titles = ["model", "backend", "time", "images/s", "over baseline"]
        tables.append(Table(title, columns(titles, titles[:2]), rows))
    return tables


def _step_cells(row: dict[str, Any], baseline: "pd.Series[float]") -> list[Cell]:
    base = baseline.get(row["backend"])
    over = float(base) / row["median_s"] if base else None
    return [
        word(row["model_title"]),
        word(row["backend"]),
        number(
            plots.duration(row["median_s"]), row["median_s"], exact(row["median_s"] * 1e3, "ms")
        ),
        number(f"{row['images_per_s']:,.0f}", row["images_per_s"], exact(row["images_per_s"])),
        _maybe(over, "{:.2f}×"),
    ]


# Words.


def _where(content: dict[str, Any]) -> str:
    s, machine = content["setting"], content["environment"]
    device = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    return (
        f"{s['dataset']}, dim {s['dim']}, depth {s['depth']}, batch {s['batch_size']}, "
        f"amp {s['amp']}; {device}, {machine['threads']} threads, torch {machine['torch']}"
    )


def _setting(setting: dict[str, Any]) -> str:
    return (
        f"dim {setting['dim']}, depth {setting['depth']}, {setting['epochs']} epochs of batch "
        f"{setting['batch_size']}"
    )


def _arithmetic(dataset: dict[str, Any]) -> str:
    a = dataset["arithmetic"]
    return (
        f"What arithmetic allows for {dataset['title']}, {a['tokens']} tokens and dim {a['dim']}: "
        f"the softmax core is {a['core_share']:.1%} of a layer’s FLOP, so a free one gives "
        f"{a['free_core']:.2f}×, attention on an eighth of the tokens {a['pooled']:.2f}×, no "
        f"attention at all {a['no_attention']:.2f}×."
    )


def _also_claimed(dataset: dict[str, Any], claims: dict[str, Any]) -> str:
    hours = (claims.get("hours_200_epochs") or {}).get(dataset["dataset"])
    text = "Verdict: of the claims at the size they were made for; point at it for the reason."
    if hours:
        text += f" Claimed for 200 epochs: about {hours} h on one RTX 3090."
    if claims.get("peak_memory_gb") and any(row.get("peak_memory") for row in dataset["rows"]):
        text += f" Claimed peak memory: {claims['peak_memory_gb']} GB."
    return text


def _accuracy(accuracy: dict[str, Any]) -> str:
    half = accuracy["half_width"]
    return f"{accuracy['mean']:.1f} %" + (f" ± {half:.1f}" if half is not None else "")


def _points(gain: dict[str, Any]) -> str:
    half = f" ± {gain['half_width']:.1f}" if gain["half_width"] is not None else ""
    return f"{gain['mean']:+.1f}{half}"


def _complexity(order: dict[str, Any]) -> tuple[str, str]:
    if order["exponent"] is None:
        return str(order["order"]), "not measured"
    fit = f"N^{order['exponent']:.2f} ({order['low']:.2f} to {order['high']:.2f})"
    tip = f"{order['pass']}, {order['backend']}, {order['dtype']}, {order['machine']}"
    return f"{order['order']}: {fit}", tip


def _time_to(reached: dict[str, Any] | None) -> Cell:
    if reached is None:
        return Cell("–")
    share = f"{reached['reached']} of {reached['seeds']} seeds"
    tip = f"to {exact(reached['target_percent'])} % validation accuracy, reached by {share}"
    if reached["seconds"] is None:
        return Cell("not reached", tip=tip)
    text = f"{reached['seconds']:,.3g} s"
    if reached["speedup"]:
        text += f", {reached['speedup']['median']:.2f}×"
    return number(text, reached["seconds"], tip)


def _maybe(value: float | None, form: str) -> Cell:
    return Cell("–") if value is None else number(form.format(value), value, exact(value))


def _values(values: list[float], unit: str) -> str:
    return f"{', '.join(f'{value:,.4g}' for value in values)} {unit}" if values else ""
