"""A tenth of the digits, for tests of anything but how well they are learned."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from linear_vit import train_minimal
from linear_vit.training import board
from linear_vit.training.data import datasets
from linear_vit.training.data.datasets import Dataset, Split


def few(data: Dataset) -> Dataset:
    def some(split: Split, count: int) -> Split:
        return Split(split.images[:count], split.labels[:count])

    if data.name != "digits":
        return data
    train, val, test = some(data.train, 130), some(data.val, 30), some(data.test, 40)
    return Dataset(data.name, data.info, train, val, test, data.class_names)


def take_few(patch: pytest.MonkeyPatch) -> None:
    """From now on, the digits are few, and nothing is told to TensorBoard."""
    original = datasets.load_once
    patch.setattr(datasets, "load_once", lambda name, folder: few(original(name, folder)))
    patch.setattr(board, "open_board", lambda _out, **_: None)


def stop_in(patch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    """From now on, this training step, from 1 on, raises the exception."""
    original, count = train_minimal.training_step, 0

    def stopping(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == step:
            raise error
        return original(*arguments, **options)

    patch.setattr(train_minimal, "training_step", stopping)


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], None]:
    """:func:`stop_in` for this test."""
    return functools.partial(stop_in, monkeypatch)


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    take_few(monkeypatch)
