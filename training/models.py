"""Models of other libraries and of a user's file: how they are named, built and swapped.

timm:vit_small_patch16_224     timm.create_model, with random weights
transformers:dinov2            the model of this type, as its configuration is by default
mine.py:build                  build(image_size), or build(), of a file gives the model
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from linear_vit import attention, options
from linear_vit.options import OptionError

ORIGINAL = "original"  # a model as it comes
_LIBRARIES = ("timm", "transformers")
Build = Callable[[int], nn.Module]


def builder(name: str) -> Build:
    """What builds a model for square images of a side.

    Args:
        name: see the head of this file.

    Raises:
        OptionError: it names no library, file or function that is there.
    """
    where, _, what = name.rpartition(":")
    if where in _LIBRARIES:
        if importlib.util.find_spec(where) is None:
            raise OptionError(f"--models {name}: pip install {where}")
        return functools.partial(_of_timm if where == "timm" else _of_transformers, what)
    path = Path(where)
    if path.suffix != ".py" or not path.is_file():
        raise OptionError(
            f"--models: {name!r} names no model; write timm:NAME, transformers:TYPE or "
            "FILE.py:FUNCTION with a file that is there"
        )
    function = getattr(_loaded(path.resolve()), what, None)
    if not callable(function):
        raise OptionError(f"--models {name}: {where} has no function {what}")
    if "image_size" in inspect.signature(function).parameters:
        return lambda side: function(image_size=side)
    return lambda side: function()


def build(name: str, attention_type: str, side: int, backend: str | None = None) -> nn.Module:
    """A model for images of this side, its attention swapped unless that is ``original``.

    Weights are random, and the same every time. It returns logits (B, classes) or features (B, C).
    """
    torch.manual_seed(0)
    model = builder(name)(side)
    if attention_type != ORIGINAL:
        attention.replace(model, attention_type, backend=backend)
    return Logits(model)


class Logits(nn.Module):
    """A model of one tensor, whatever its library wraps its results in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        out = self.model(images)
        for name in ("logits", "pooler_output", "last_hidden_state"):
            found = getattr(out, name, None)
            out = out if found is None else found
        out = out[0] if isinstance(out, tuple | list) else out
        if out.dim() == 4:  # an image of channels
            return out.flatten(2).mean(dim=2)
        return out.mean(dim=1) if out.dim() == 3 else out


def _of_timm(name: str, side: int) -> nn.Module:
    import timm

    try:
        model: nn.Module = timm.create_model(name, pretrained=False, img_size=side)
    except TypeError:  # one that takes images of any size
        model = timm.create_model(name, pretrained=False)
    return model


def _of_transformers(kind: str, side: int) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    model: nn.Module = AutoModel.from_config(AutoConfig.for_model(kind, image_size=side))
    return model


@functools.cache
def _loaded(path: Path) -> ModuleType:
    """A user's file, imported once; OptionError, with its own error, where that fails."""
    try:
        return options.load_module(str(path))
    except ImportError as error:
        why = error.__cause__ or error
        text = f"--models: {path} can't be imported: {type(why).__name__}: {why}"
        raise OptionError(text) from error


def attention_sizes(module: Any) -> tuple[int, int]:
    """Heads and channels C of an attention module, as its library names them."""
    counts = (getattr(module, name, None) for name in _HEADS)
    heads = next((int(count) for count in counts if count), 1)
    linear = next(m for m in module.modules() if isinstance(m, nn.Linear))
    return heads, linear.in_features


_HEADS = ("heads", "branches", "num_heads", "num_attention_heads")
