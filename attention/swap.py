"""Swap the attention of a model, ours or another library's, and say what became of its weights."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

from torch import nn

from linear_vit.attention.adapters.core import Change, Wanted
from linear_vit.attention.layers import Grid
from linear_vit.attention.vit import ATTENTION_TYPES

LIBRARIES = ("timm", "transformers", "diffusers")


@dataclass(frozen=True)
class Replaced:
    """What :func:`replace` did.

    Attributes:
        attention_type: what the attention is now.
        names: of the modules, as ``model.named_modules()`` has them.
        kept: of a module's weights those that stayed, by the names of its parts.
        new: those that did not, and what they are now.
        notes: what else a user has to know.
    """

    attention_type: str
    names: tuple[str, ...]
    kept: tuple[str, ...]
    new: dict[str, str]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        many = "attention module is" if len(self.names) == 1 else "attention modules are"
        new = ", ".join(f"{name} ({what})" for name, what in self.new.items())
        lines = [f"{len(self.names)} {many} {self.attention_type} now"]
        lines += [f"weights kept: {', '.join(self.kept) or 'none'}"]
        lines += [f"new weights: {new}"] if new else []
        return "\n".join([*lines, *self.notes])


def replace(
    model: nn.Module,
    attention_type: str,
    *,
    backend: str | None = None,
    ripple_stages: int = 3,
    hydra_branches: int | None = None,
    grid: Grid | None = None,
    prefix_tokens: int | None = None,
) -> Replaced:
    """Swap every attention module of a model that is known, in place.

    Known are our own modules, timm's ``Attention``, the vision transformers of transformers, and
    Sana's linear attention in diffusers. Weights are kept where their shapes allow it. Accuracy is
    not: it has to be trained back.

    Args:
        model: holds the modules; is changed.
        attention_type: ``baseline`` (softmax), ``linear``, ``ripple`` or ``hydra``.
        backend: a name from ``kernels.BACKENDS``, or None for the fastest usable one.
        ripple_stages: how often ripple halves the grid of patch tokens.
        hydra_branches: None takes as many as heads, and only our own models can take others.
        grid: (rows, cols) of the patch tokens, for ripple in other libraries' models; None takes
            a square one. Our own are told theirs at call.
        prefix_tokens: class and register tokens before the patch tokens, which ripple does not
            pool; None asks the model.

    Returns:
        How many modules are swapped, and what became of their weights; print it.

    Raises:
        ValueError: an unknown attention_type, no module that is known, or one that can't become
            this. At call, a swapped module raises it for what it can't do: a mask that is no
            key mask, ``is_causal``, dropout of attention weights in training.
    """
    if attention_type not in ATTENTION_TYPES:
        raise ValueError(
            f"attention_type must be one of {', '.join(ATTENTION_TYPES)}, got {attention_type!r}"
        )
    wanted = Wanted(attention_type, backend, ripple_stages, hydra_branches, grid)
    names: list[str] = []
    changes: list[Change] = []
    for adapter in _adapters():
        found = dict(adapter.modules(model))
        if found:
            before = adapter.prefix_tokens(model) if prefix_tokens is None else prefix_tokens
            changes.append(adapter.change(model, found, changed(wanted, prefix_tokens=before)))
            names += found
            if attention_type == "ripple" and before:
                note = f"{before} class and register tokens are attended to, and not pooled"
                changes.append(Change(notes=(note,)))
    if not names:
        raise ValueError(_none_known(model))
    return Replaced(
        attention_type,
        tuple(names),
        tuple(dict.fromkeys(name for one in changes for name in one.kept)),
        {name: what for one in changes for name, what in one.new},
        tuple(note for one in changes for note in one.notes),
    )


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules of a model that :func:`replace` knows, swapped ones too, by name."""
    return {name: module for adapter in _adapters() for name, module in adapter.modules(model)}


def _adapters() -> Iterator[Any]:
    """Our own, and those of the libraries that were imported."""
    for name in ("own", *(library for library in LIBRARIES if library in sys.modules)):
        yield importlib.import_module(f"linear_vit.attention.adapters.{name}")


def _none_known(model: nn.Module) -> str:
    there = {type(m).__name__ for m in model.modules() if "atten" in type(m).__name__.lower()}
    has = f"; it has {', '.join(sorted(there))}" if there else ""
    return (
        f"no attention module in {type(model).__name__} is known{has}. Known are our own, timm's "
        "Attention, vision transformers of transformers, and Sana's of diffusers"
    )
