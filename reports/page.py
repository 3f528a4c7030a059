"""``python -m reports page``: everything measured, on one self-contained HTML page."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup

from reports import plots, proofs, runs, scaling
from reports.runs import Runs

HOW_TO_CHECK = "python -m bench.check --json reports/out/check.json"
HOW_TO_COMPILE = "python -m bench.static --json reports/out/static.json"
HOW_TO_COUNT = "python -m bench.traffic --json reports/out/traffic.json"
HOW_TO_TRAIN = "python train_minimal.py table"
_CHECK_SCHEMA = 1
_PROOF_SCHEMA = 1
_TABLE_SCHEMA = "linear-vit-table/1"


@dataclass
class Table:
    """A table as the template draws it: ``best`` marks a cell of a row, by index."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    best: list[int | None] = field(default_factory=list)
    note: str = ""


@dataclass
class Plot:
    svg: Markup
    caption: str


@dataclass
class Section:
    """One part of the page; where it has nothing, ``missing`` is the command that makes it."""

    anchor: str
    title: str
    intro: str
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: str | None = None


def write(paths: Sequence[Path], results: Path, out: Path) -> int:
    """Build the page and write it; its size in bytes.

    Args:
        paths: saved benchmark runs; empty takes the newest in ``results``, else the repository's.
        results: folder with ``check.json``, and ``table.json`` in it or in ``training/``.
        out: the HTML file.
    """
    skipped: list[str] = []
    loaded = _runs(paths, results, skipped)
    check = _document(
        results / "check.json", lambda d: d["schema"] == _CHECK_SCHEMA and d["results"], skipped
    )
    table = _table_document(results, skipped)
    static = _own_or_saved("static", results, skipped)
    found = scaling.groups(loaded) if loaded else []
    sections = [
        _where(loaded, check, table, skipped),
        _results(table),
        _complexity(found),
        _speed(found),
        _training_steps(loaded),
        _correctness(check),
        _static(static),
        _traffic(_own_or_saved("traffic", results, skipped)),
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("page.html").render(
        sections=sections,
        facts=_headlines(found, table, check),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return len(text.encode())


# Input files. A damaged one is named on the page, and costs only its section.


def _runs(paths: Sequence[Path], results: Path, skipped: list[str]) -> Runs | None:
    try:
        loaded = runs.load(paths or runs.default_paths(results))
    except runs.NoRuns:
        if paths:
            raise
        return None
    skipped += loaded.skipped
    return loaded


def _document(
    path: Path, is_right: Callable[[Any], Any], skipped: list[str]
) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not is_right(document):
            raise ValueError("of another schema")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        skipped.append(f"{path}: {error}")
        return None
    return document


def _table_document(results: Path, skipped: list[str]) -> dict[str, Any] | None:
    for path in (results / "training" / "table.json", results / "table.json"):
        document = _document(
            path, lambda d: d["schema"] == _TABLE_SCHEMA and d["datasets"], skipped
        )
        if document is not None:
            return document
    return None


def _own_or_saved(name: str, results: Path, skipped: list[str]) -> dict[str, Any] | None:
    """What this machine made, else what the repository holds: machine code is the same anywhere."""
    for folder in (results, runs.MEASUREMENTS / "static"):
        document = _document(
            folder / f"{name}.json",
            lambda d: d["kind"] == name and d["schema"] == _PROOF_SCHEMA and d["rows"],
            skipped,
        )
        if document is not None:
            return document
    return None


# Sections.


def _headlines(
    found: list[scaling.Group], table: dict[str, Any] | None, check: dict[str, Any] | None
) -> list[tuple[str, str]]:
    """The few figures that a reader came for, each with what it is."""
    facts = []
    if check:
        ran = [r for r in check["results"] if r["status"] in ("passed", "failed")]
        right = sum(r["status"] == "passed" for r in ran)
        facts.append((f"{right} of {len(ran)}", "kernel checks agree with the float64 reference"))
    for group in found:
        fits = {k: f for k, f in group.fits.items() if k[1] == "forward" and f.reason is None}
        for operation in ("linear_attention", "softmax_attention"):
            fit = fits.get((operation, "forward", "torch"))
            if fit:
                facts.append(
                    (
                        f"N^{fit.exponent:.2f}",
                        f"growth of {plots.label(operation)}'s time (torch, forward, "
                        f"{group.dtype}; 95 %: {fit.low:.2f} to {fit.high:.2f})",
                    )
                )
        answers = [(b, a) for _, m, b, a in scaling.crossovers([group]) if m == "forward"]
        if answers:
            backend, answer = min(answers, key=lambda item: item[1].estimate)
            facts.append(
                (
                    answer.text.partition(" (")[0],
                    f"crossover with SDPA ({backend}, forward, {group.dtype}: {answer.text})",
                )
            )
        break
    for dataset in (table or {}).get("datasets", []):
        rows = {r["model"]: r for r in dataset["rows"] if r["accuracy"]}
        for model in ("baseline", "ripple", "hydra"):
            if model in rows:
                row = rows[model]
                facts.append(
                    (
                        f"{row['accuracy']['mean']:.1f} %",
                        f"{row['title']} on {dataset['title']} ({len(row['seeds'])} seeds)",
                    )
                )
    return facts


def _where(
    loaded: Runs | None,
    check: dict[str, Any] | None,
    table: dict[str, Any] | None,
    skipped: list[str],
) -> Section:
    section = Section("where", "What ran where", "Every figure below comes from these files.")
    rows = []
    for head in loaded.heads if loaded else []:
        facts = head["facts"]
        rows.append(
            [
                head["file"],
                f"{head['cases']} timed cases",
                _machine(facts),
                str(facts.get("git") or "–"),
                head["datetime"][:16].replace("T", " "),
            ]
        )
    if check:
        facts = check["machine"]
        ran = sum(r["status"] in ("passed", "failed") for r in check["results"])
        rows.append(
            ["check.json", f"{ran} checks", _machine(facts), str(facts.get("git") or "–"), ""]
        )
    for dataset in (table or {}).get("datasets", []):
        if dataset["status"] == "measured":
            e = dataset["environment"]
            count = sum(len(row["seeds"]) for row in dataset["rows"])
            device = e["cpu"] if e["device"] == "cpu" else e["device"]
            where = f"{device}, {e['threads']} threads, torch {e['torch']}"
            created = str((table or {}).get("created", ""))[:16].replace("T", " ")
            what = f"{count} training runs on {dataset['title']}"
            rows.append(["table.json", what, where, str(e.get("revision") or "–"), created])
    if rows:
        columns = ["file", "what", "machine", "revision", "when (UTC)"]
        section.tables.append(Table("", columns, rows))
    for head in loaded.heads if loaded else []:
        section.notes += [f"Not timed: {what}: {why}." for what, why in head["not_timed"].items()]
        cases: dict[str, list[str]] = {}
        for case, why in head["failed"].items():
            cases.setdefault(why, []).append(case)
        for why, names in cases.items():
            others = f" and {len(names) - 1} more cases" if len(names) > 1 else ""
            section.notes.append(f"Failed: {names[0]}{others}: {why}")
    section.notes += [f"Skipped {line}" for line in skipped]
    if not rows:
        section.missing = "make demo"
    return section


def _results(table: dict[str, Any] | None) -> Section:
    section = Section(
        "results",
        "Results",
        "Test accuracy (mean and 95 % t-interval over seeds) and speed of training, beside what "
        "the original claimed. The local branch (a depthwise 3×3 convolution) has rows of its own, "
        "so that what it gains can be told from what the attention gains.",
    )
    if table is None:
        section.missing = f"{HOW_TO_TRAIN} --out reports/out/training"
        return section
    for dataset in table["datasets"]:
        rows = []
        for row in dataset["rows"]:
            claim = row["claim"] or {}
            rows.append(
                [
                    row["title"],
                    f"{row['parameters']:,}" if row["parameters"] else "–",
                    _accuracy(row["accuracy"]) if row["accuracy"] else "not run",
                    f"{claim['accuracy']:.1f} %" if claim else "–",
                    f"{row['images_per_second']['median']:,.0f}"
                    if row["images_per_second"]
                    else "not run",
                    _speedup(row["speedup"]),
                    f"{claim['speedup']:.1f}×" if claim else "–",
                    str(len(row["seeds"])) if row["seeds"] else "–",
                ]
            )
        setting = dataset["setting"]
        how = (
            f": dim {setting['dim']}, depth {setting['depth']}, {setting['epochs']} epochs of "
            f"batch {setting['batch_size']}"
            if setting
            else ": not run"
        )
        columns = [
            "model",
            "parameters",
            "accuracy",
            "claimed",
            "images/s",
            "speed-up",
            "claimed",
            "seeds",
        ]
        section.tables.append(Table(f"{dataset['title']}{how}", columns, rows))
    claims = table["claims"]
    section.notes.append(f"Claims: {claims['source']}, at {claims['backbone']}.")
    return section


def _complexity(found: list[scaling.Group]) -> Section:
    section = Section(
        "complexity",
        "Complexity",
        "Time, memory and speed-up against the number of tokens N, one sequence of 6 heads of 64 "
        "(ripple: one grid of 384 channels). Fitted: time = a + b·N^p.",
    )
    if not found:
        section.missing = runs.HOW_TO_MEASURE
        return section
    for number, group in enumerate(found):
        for picture, frame in scaling.pictures(group):
            for mode in group.passes:
                if not (frame["pass"] == mode).any():
                    continue
                figure = scaling.draw(group, picture, frame, [mode])
                name = f"g{number}-{picture.name}-{mode.replace('+', '-')}"
                title = plots.title(group.operations, picture)
                svg = Markup(plots.inline_svg(figure, name))
                section.plots.append(Plot(svg, f"{title}, {mode}. {picture.caption}"))
    answers = [
        [group.where, mode, backend, answer.text]
        for group, mode, backend, answer in scaling.crossovers(found)
    ]
    if answers:
        section.tables.append(
            Table(
                "Crossover: from which N linear attention beats SDPA",
                ["where", "pass", "backend", "crossover (95 % interval)"],
                answers,
            )
        )
    fits = [
        [plots.label(operation), mode, group.dtype, backend, *_fit_cells(fit)]
        for group in found
        for (operation, mode, backend), fit in group.fits.items()
    ]
    columns = ["operation", "pass", "dtype", "backend", "exponent p", "residual", "last slope"]
    section.tables.append(
        Table(
            "Fitted exponents",
            columns,
            fits,
            note="Residual: rms of log time about the fit. Last slope: the local exponent between "
            "the two longest lengths, which says whether the growth has settled.",
        )
    )
    return section


def _speed(found: list[scaling.Group]) -> Section:
    section = Section(
        "speed",
        "Speed",
        "Median time per call; the fastest of a row is marked. GFLOP/s and GB/s are those of the "
        "fastest, by the operation's least work and least traffic, whatever the implementation "
        "does. Of limit: the time that the machine's copy or matmul rate, measured in the same "
        "run, allows for that, over the time taken.",
    )
    if not found:
        section.missing = runs.HOW_TO_MEASURE
        return section
    for group in found:
        for (operation, mode), part in group.frame.groupby(["operation", "pass"], sort=False):
            backends = list(part["backend"].unique())
            limits = part["limit"].notna().any()
            rows, best = [], []
            for tokens, line in part.groupby("N"):
                at = line.set_index("backend")
                fastest = str(at["median_s"].idxmin())
                cells = [f"{tokens:,}"]
                for backend in backends:
                    cells.append(
                        plots.duration(float(at["median_s"][backend]))
                        if backend in at.index
                        else "–"
                    )
                cells.append(_rate(float(at["tflop_per_s"][fastest]) * 1e3))
                cells.append(_rate(float(at["gb_per_s"][fastest])))
                if limits:
                    share, limit = at["share_of_limit"][fastest], at["limit"][fastest]
                    cells.append(f"{share:.0%} {limit}" if limit else "–")
                rows.append(cells)
                best.append(1 + backends.index(fastest) if len(at) > 1 else None)
            title = f"{plots.label(str(operation))}, {mode}, {group.where}"
            columns = ["N", *map(str, backends), "GFLOP/s", "GB/s"]
            columns += ["of limit"] if limits else []
            what = part.drop_duplicates("backend").set_index("backend")["implementation"]
            note = "; ".join(
                text if text.startswith(f"{backend}:") else f"{backend}: {text}"
                for backend, text in what.items()
            )
            section.tables.append(Table(title, columns, rows, best, note))
    return section


def _training_steps(loaded: Runs | None) -> Section:
    section = Section(
        "steps",
        "Training steps",
        "One optimiser step of each model on a fixed random batch: forward, loss, backward, "
        "clipping, AdamW. No data loading.",
    )
    if loaded is None or loaded.training.empty:
        section.missing = f"{runs.HOW_TO_MEASURE} --ops training_step"
        return section
    for machine, frame in loaded.training.groupby("machine", sort=False):
        baseline = frame[frame["model"] == "baseline"].set_index("backend")["median_s"]
        rows = []
        for row in frame.to_dict("records"):
            base = baseline.get(row["backend"])
            rows.append(
                [
                    row["model_title"],
                    row["backend"],
                    plots.duration(row["median_s"]),
                    f"{row['images_per_s']:,.0f}",
                    f"{base / row['median_s']:.2f}×" if base else "–",
                ]
            )
        s = frame.iloc[0]["settings"]
        title = (
            f"dim {s['dim']}, depth {s['depth']}, batch {s['batch_size']}, {s['dataset']} sizes, "
            f"{frame.iloc[0]['dtype']}, {machine}"
        )
        columns = ["model", "backend", "time", "images/s", "over baseline"]
        section.tables.append(Table(title, columns, rows))
    return section


def _correctness(check: dict[str, Any] | None) -> Section:
    section = Section(
        "correctness",
        "Correctness",
        "Output and every gradient against the float64 reference: the largest relative rms error, "
        "where all are within tolerance; failed; or – where a backend can't run here.",
    )
    if check is None:
        section.missing = HOW_TO_CHECK
        return section
    backends = list(dict.fromkeys(r["backend"] for r in check["results"]))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    notes: dict[str, list[str]] = {}
    for r in check["results"]:
        if r["status"] == "passed":
            mark = " (interpreter)" if r["mode"] == "interpreter" else ""
            cell = f"✓ {r['worst_rms_error']:.1e}{mark}"
        elif r["status"] == "failed":
            cell = "✗ failed"
            where = f"{r['operation']} {r['dtype']} {r['backend']}"
            notes.setdefault(r["reason"], []).append(f"Failed: {where}")
        else:
            cell = "–"
            who = notes.setdefault(r["reason"], [])
            if r["backend"] not in who:
                who.append(r["backend"])
        rows.setdefault((r["operation"], r["dtype"]), {})[r["backend"]] = cell
    table = [
        [plots.label(operation), dtype, *(cells.get(b, "") for b in backends)]
        for (operation, dtype), cells in rows.items()
    ]
    section.tables.append(
        Table(_machine(check["machine"]), ["operation", "dtype", *backends], table)
    )
    section.notes += [f"{', '.join(who)}: {reason}" for reason, who in notes.items()]
    if any(r["mode"] == "interpreter" and r["status"] == "passed" for r in check["results"]):
        section.notes.append(
            "(interpreter): Triton's kernels run instruction by instruction on the CPU, on small "
            "shapes; this shows that they are right and says nothing about their speed."
        )
    return section


def _static(static: dict[str, Any] | None) -> Section:
    section = Section(
        "static",
        "Compiled kernels",
        "Every kernel and configuration that ships, compiled for every architecture, with no GPU. "
        "A line is a kernel's range over its head dims, dtypes and tiles; spilled bytes and shared "
        "memory are those that ptxas reports, the instruction counts are of the machine code, and "
        "the occupancy is what registers and shared memory allow.",
    )
    if static is None:
        section.missing = HOW_TO_COMPILE
        return section
    rows = static["rows"]
    wrong = [row for row in rows if row["faults"]]
    title = f"{len(rows):,} kernels compiled, {len(wrong)} at fault"
    section.tables.append(Table(title, list(proofs.STATIC_COLUMNS), proofs.static_rows(rows)))
    section.notes += [
        f"{row['backend']} {row['room']} {row['kernel']} {row['architecture']} D={row['head_dim']} "
        f"{row['dtype']}: {'; '.join(row['faults'])}"
        for row in wrong
    ]
    return section


def _traffic(traffic: dict[str, Any] | None) -> Section:
    section = Section(
        "traffic",
        "Traffic",
        "Bytes that the Triton kernels load and store, counted while Triton's interpreter runs "
        "them: exact, and the same on any machine. Beside each tensor, how often the least traffic "
        "that is; what is neither input nor result is workspace, as a share of the whole least "
        "traffic. A byte loaded twice counts twice, though the second time may come from a cache.",
    )
    if traffic is None:
        section.missing = HOW_TO_COUNT
        return section
    title = f"{len(traffic['rows']):,} tensors counted"
    rows = proofs.traffic_rows(traffic["rows"])
    section.tables.append(Table(title, list(proofs.TRAFFIC_COLUMNS), rows))
    return section


# Cells.


def _machine(facts: dict[str, Any]) -> str:
    return f"{runs.machine_label(facts)}, {facts.get('cores', '?')} cores"


def _accuracy(accuracy: dict[str, Any]) -> str:
    half = accuracy["half_width"]
    return f"{accuracy['mean']:.1f} %" + (f" ± {half:.1f}" if half is not None else "")


def _speedup(speedup: dict[str, Any] | None) -> str:
    return f"{speedup['median']:.2f}×" if speedup else "–"


def _fit_cells(fit: Any) -> Iterable[str]:
    if math.isnan(fit.residual):  # too few lengths to fit anything
        return fit.reason, "–", "–"
    if fit.reason:
        return f"no fit: {fit.reason}", f"{fit.residual:.0%}", f"{fit.local_slope:.2f}"
    exponent = f"{fit.exponent:.2f} ({fit.low:.2f} to {fit.high:.2f})"
    return exponent, f"{fit.residual:.0%}", f"{fit.local_slope:.2f}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
