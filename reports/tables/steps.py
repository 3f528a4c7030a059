"""Timed training steps of a saved run: every model's time by backend, and what own kernels gain."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from linear_vit.reports.claims import BASELINE, MODELS, PYTORCH, model_of
from linear_vit.reports.saved.runs import Runs, Words
from linear_vit.reports.statistics import turns
from linear_vit.reports.tables import pairs, table
from linear_vit.reports.tables.table import NOTHING, Cell, Column, Table, maybe, number, word
from linear_vit.reports.units import duration, exact

DEFAULT = "default"  # of a step: the fastest backend of each operation


@dataclass(frozen=True)
class Steps:
    """The steps of one machine, file and setting; ``frame`` holds rows of ``Runs.training``."""

    machine: str
    file: str
    setting: dict[str, Any]
    dtype: str
    frame: pd.DataFrame
    words: Words
    not_timed: Mapping[str, str]

    @property
    def models(self) -> list[str]:
        """In the order of the results table."""
        known, there = list(MODELS), list(dict.fromkeys(self.frame["model"]))
        return sorted(there, key=lambda m: known.index(m) if m in known else len(known))

    @property
    def backends(self) -> list[str]:
        return list(dict.fromkeys(self.frame["backend"]))

    @property
    def where(self) -> str:
        s = self.setting
        return (
            f"{s['dataset']}, dim {s['dim']}, depth {s['depth']}, batch {s['batch_size']}, "
            f"{self.dtype}; {self.machine}"
        )

    def row(self, model: str, backend: str | None) -> pairs.Step | None:
        """The step of a model with a backend, if it was timed."""
        here = self.frame[(self.frame["model"] == model) & (self.frame["backend"] == backend)]
        return here.iloc[0].to_dict() if len(here) else None

    def own(self, model: str) -> str | None:
        """The fastest of our own backends that the model was timed with."""
        here = self.frame[self.frame["model"] == model]
        here = here[here["backend"].map(self.words.own).astype(bool)]
        fastest = here.sort_values("median_s", kind="stable")
        return None if here.empty else str(fastest["backend"].iloc[0])

    def gain(self, model: str, backend: str | None = None) -> float | None:
        """PyTorch's step over that with a backend, the fastest own one if none is named."""
        own, base = self.row(model, backend or self.own(model)), self.row(model, PYTORCH)
        return math.exp(turns.speedup(own, base)[0]) if own and base else None

    def title(self, model: str) -> str:
        """What the model is called."""
        said = self.frame[self.frame["model"] == model]["model_title"].iloc[0]
        return model_of(model, said if said != model else None).title


def groups(runs: Runs) -> list[Steps]:
    """The timed training steps, by machine, file, setting and dtype."""
    if runs.training.empty:
        return []
    frame = runs.training
    settings = [sorted(pairs.without_backend(one).items()) for one in frame["settings"]]
    keys = [frame["machine"], frame["file"], pd.Series(map(str, settings)), frame["dtype"]]
    left_out = {head["file"]: head["not_timed"] for head in runs.heads}
    return [
        Steps(
            str(machine),
            str(file),
            dict(part["settings"].iloc[0]),
            str(dtype),
            part,
            runs.words,
            left_out.get(str(file), {}),
        )
        for (machine, file, _, dtype), part in frame.groupby(keys, sort=False)
    ]


def as_table(steps: Steps) -> Table:
    """A row per model: time with each backend, speed-up, images/s of PyTorch's and of the best."""
    lines = [dict(_cells(steps, model)) for model in steps.models]
    titles = {steps.words.backend(name): {"backend": name} for name in steps.backends}
    heads = {title: Column(title, facets=facets) for title, facets in titles.items()}
    note = "All took turns. Speed-up: PyTorch's step over that with the fastest own kernels."
    for why, names in _reasons(steps).items():
        note += f" Not timed ({', '.join(names)}): {why}."
    title = f"Time of a training step; {steps.where}"
    return table.of_lines(title, table.without_empty(lines), note, heads=heads)


def _cells(steps: Steps, model: str) -> Iterator[tuple[str, Cell]]:
    yield "Model", word(steps.title(model))
    own = steps.own(model)
    for backend in steps.backends:
        yield steps.words.backend(backend), _time(steps, model, backend, own)
    yield "Speed-up", maybe(steps.gain(model), "{:.2f}×")
    yield "Over the baseline", _over_baseline(steps, model)
    for title, name in (("PyTorch", PYTORCH), ("own", own), ("fastest", DEFAULT)):
        row = steps.row(model, name)
        yield f"Images/s, {title}", maybe(float(row["images_per_s"]) if row else None, "{:,.0f}")


def _time(steps: Steps, model: str, backend: str, own: str | None) -> Cell:
    row = steps.row(model, backend)
    if row is None:
        return Cell(NOTHING, tip=str(steps.not_timed.get(f"{model}-{backend}", "")))
    tip = f"{exact(1e3 * row['median_s'], 'ms')}, {exact(row['images_per_s'])} images/s"
    mark = "best" if backend == own and (steps.gain(model) or 0) > 1 else ""
    return number(duration(row["median_s"]), row["median_s"], tip, mark)


def _over_baseline(steps: Steps, model: str) -> Cell:
    """With what is the fastest for each; where that was not timed, nothing."""
    row, base = steps.row(model, DEFAULT), steps.row(BASELINE, DEFAULT)
    if row is None or base is None:
        return Cell(NOTHING)
    return pairs.speedup_cell(pairs.over(row, row if model == BASELINE else base))


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
    frames = []
    for steps in found:
        named = zip(steps.frame["model"], steps.frame["backend"], strict=True)
        gains = pd.Series([steps.gain(*names) for names in named], steps.frame.index, float)
        frames.append(steps.frame[columns].assign(speedup_over_pytorch=gains))
    return str(pd.concat(frames).to_csv(index=False))
