"""Timed training steps of a saved run: every model's time by backend, and what own kernels gain."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from linear_vit.reports.claims import BASELINE, MODELS, PYTORCH, model_of
from linear_vit.reports.saved.runs import Runs, Words
from linear_vit.reports.statistics import turns
from linear_vit.reports.tables import pairs, table
from linear_vit.reports.tables.table import NOTHING, Cell, Column, Line, Table, number, word
from linear_vit.reports.units import exact

DEFAULT = "default"  # of a step: the fastest backend of each operation


@dataclass(frozen=True)
class Steps:
    """The steps of one machine, file and setting, by model and backend: rows of ``Runs.training``.

    ``not_timed`` says why steps, by model-backend, were left out.
    """

    machine: str
    file: str
    setting: dict[str, Any]
    dtype: str
    at: dict[tuple[str, str], pairs.Step]
    words: Words
    not_timed: Mapping[str, str]

    @property
    def models(self) -> list[str]:
        """In the order of the results table."""
        known, there = list(MODELS), dict.fromkeys(model for model, _ in self.at)
        return sorted(there, key=lambda m: known.index(m) if m in known else len(known))

    @property
    def backends(self) -> list[str]:
        return list(dict.fromkeys(backend for _, backend in self.at))

    @property
    def where(self) -> str:
        s = self.setting
        return (
            f"{s['dataset']}, dim {s['dim']}, depth {s['depth']}, batch {s['batch_size']}, "
            f"{self.dtype}; {self.machine}"
        )

    def own(self, model: str) -> str | None:
        """The fastest of our own backends that the model was timed with."""
        times = {b: s["median_s"] for (m, b), s in self.at.items() if m == model}
        able = [b for b in times if self.words.own(b) and self.quiet(model, b)]
        return min(able, key=times.__getitem__, default=None)

    def gain(self, model: str, backend: str | None = None) -> float | None:
        """PyTorch's step over that with a backend, the fastest own one if none is named."""
        own = self.quiet(model, backend or self.own(model) or "")
        base = self.quiet(model, PYTORCH)
        return math.exp(turns.speedup(own, base)[0]) if own and base else None

    def quiet(self, model: str, backend: str) -> pairs.Step | None:
        """A step that others may be compared with: one that nothing disturbed."""
        step = self.at.get((model, backend))
        return step if step and not table.disturbance(step) else None

    def title(self, model: str) -> str:
        """What the model is called."""
        said = next(step["model_title"] for (name, _), step in self.at.items() if name == model)
        return model_of(model, said if said != model else None).title


def groups(runs: Runs) -> list[Steps]:
    """The timed training steps, by machine, file, setting and dtype."""
    left_out = {head["file"]: head["not_timed"] for head in runs.heads}
    found: dict[str, Steps] = {}
    for row in runs.training.to_dict("records"):
        where = (str(row["machine"]), str(row["file"]))
        alike = sorted(pairs.without_backend(row["settings"]).items())
        new = Steps(
            *where, row["settings"], row["dtype"], {}, runs.words, left_out.get(row["file"], {})
        )
        steps = found.setdefault(str((where, alike, row["dtype"])), new)
        steps.at.setdefault((row["model"], row["backend"]), row)
    return list(found.values())


def as_table(steps: Steps) -> Table:
    """A row per model: time with each backend, speed-up, images/s of PyTorch's and of the best."""
    titles = {name: steps.words.backend(name) for name in steps.backends}
    heads = {title: Column(title, facets={"backend": name}) for name, title in titles.items()}
    note = "All took turns. Speed-up: PyTorch's step over that with the fastest own kernels."
    note = " ".join(filter(None, [note, table.of_disturbed(steps.at.values())]))
    for why, names in _reasons(steps).items():
        note += f" Not timed ({', '.join(names)}): {why}."
    lines = table.without_empty([_line(steps, model) for model in steps.models])
    return Table(f"Time of a training step; {steps.where}", lines, note, heads=heads)


def _line(steps: Steps, model: str) -> Line:
    own, nobody = steps.own(model), {"images_per_s": None}
    shown = (("PyTorch", PYTORCH), ("own", own), ("fastest", DEFAULT))
    rates = {name: steps.at.get((model, b or ""), nobody)["images_per_s"] for name, b in shown}
    return {
        "Model": word(steps.title(model)),
        **{steps.words.backend(b): _time(steps, model, b, own) for b in steps.backends},
        "Speed-up": number(steps.gain(model), "{:.2f}×"),
        "Over the baseline": _over_baseline(steps, model),
        **{f"Images/s, {name}": number(rate, "{:,.0f}") for name, rate in rates.items()},
    }


def _time(steps: Steps, model: str, backend: str, own: str | None) -> Cell:
    step = steps.at.get((model, backend))
    if step is None:
        return Cell(NOTHING, tip=str(steps.not_timed.get(f"{model}-{backend}", "")))
    tip = f"{exact(1e3 * step['median_s'], 'ms')}, {exact(step['images_per_s'])} images/s"
    best = "best" if backend == own and (steps.gain(model) or 0) > 1 else ""
    return table.time_of(step, tip, best)


def _over_baseline(steps: Steps, model: str) -> Cell:
    """With what is the fastest for each; where that was not timed, nothing."""
    step, base = steps.quiet(model, DEFAULT), steps.quiet(BASELINE, DEFAULT)
    return pairs.speedup_cell(pairs.over(step, base) if step and base else None)


def _reasons(steps: Steps) -> dict[str, list[str]]:
    """Why steps of these models were not timed, each reason once."""
    reasons: dict[str, list[str]] = {}
    for name, why in steps.not_timed.items():
        if any(name.startswith(f"{model}-") for model in steps.models):
            reasons.setdefault(str(why).partition(". ")[0], []).append(name)
    return reasons


def to_csv(found: list[Steps]) -> str:
    """One line per step."""
    columns = ["model", "backend", "dtype", "median_s", "images_per_s", "machine"]
    rows = [
        {name: step[name] for name in columns} | {"speedup_over_pytorch": steps.gain(*names)}
        for steps in found
        for names, step in steps.at.items()
    ]
    return str(pd.DataFrame(rows).to_csv(index=False))
