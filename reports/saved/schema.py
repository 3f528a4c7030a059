"""What timed runs hold, of which types and within which bounds; what is not read may be anything.

:func:`check` says what is wrong with a file in one line that names the field. A field that may be
missing has a default here. Numbers are finite wherever they stand. Other files than timed runs are
in :mod:`reports.saved.schema_records`.
"""

import functools
import math
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)


class Damaged(ValueError):
    """A file is not what it should be; the message names the field, where one is to blame."""


WHOLE = "whole"  # the type of an error whose message names the field itself


def check(model: Any, content: Any) -> Any:
    """The content as this model has it.

    Raises:
        Damaged: it does not fit; one line says where, and what is wrong there.
    """
    for field in _not_finite(content):
        raise Damaged(f"{field}: not a finite number")
    try:
        return _adapter(model).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"[{n}]" if isinstance(n, int) else f".{n}" for n in first["loc"])
        said = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if first["type"] == "missing":
            said = "missing"
        elif first["type"] not in ("value_error", WHOLE):
            said += f", not {first['input']!r:.40}"
        text = f"{where}{'.' if first['type'] == WHOLE else ': '}{said}".strip(".: ")
        more = error.error_count() - 1
        raise Damaged(text + f" (and {more} more)" * bool(more)) from error


@functools.cache
def _adapter(model: Any) -> TypeAdapter[Any]:
    return TypeAdapter(model)


def _not_finite(value: Any, where: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _not_finite(item, f"{where}.{name}" if where else str(name))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _not_finite(item, f"{where}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield where


def _date(text: str) -> str:
    if text:
        datetime.fromisoformat(text)
    return text


class Model(BaseModel):
    """Fields that are words of Python's, or of pydantic's, end in an underscore here."""

    model_config = ConfigDict(
        strict=True,
        allow_inf_nan=False,
        extra="allow",
        protected_namespaces=(),
        alias_generator=lambda name: name.removesuffix("_"),
    )


Name = Annotated[str, Field(min_length=1)]
Date = Annotated[str, AfterValidator(_date)]  # ISO; empty where it is not known
Count = Annotated[int, Field(ge=0, le=10**15)]
Size = Annotated[int, Field(ge=1, le=10**15)]
Seconds = Annotated[float, Field(gt=0, le=1e9)]
Amount = Annotated[float, Field(ge=0, le=1e24)]
Rate = Annotated[float, Field(gt=0, le=1e24)]


class Machine(Model):
    """Of a benchmark, or a training run's environment."""

    device: Name
    torch: Name
    cpu: Name
    threads: Size
    cores: Size | None = None
    processes: Size | None = None
    device_name: Name | None = None
    git: str | None = None
    revision: str | None = None
    memory: str | None = None


class StepSetting(Model):
    dataset: Name
    dim: Size
    depth: Size
    patch_size: Size
    batch_size: Size
    backend: str | None = None


# ---- timed runs ----------------------------------------------------------------------------------


_FRESH = ("fresh_bytes_per_s", "fresh_large_bytes_per_s")


class Limits(Model):
    copy_bytes_per_s: Rate | None = None
    matmul_flop_per_s: dict[str, Rate] | None = None
    launch_s: Seconds | None = None
    measured: Date | None = None
    probes: dict[str, Rate | None] | None = None
    fresh_bytes_per_s: Rate | None = None
    fresh_large_bytes_per_s: Rate | None = None

    @model_validator(mode="after")
    def _all_or_none(self) -> Self:
        """The probes are read together, and beside the rates of memory."""
        probes = self.probes or {}
        needed = {f"probes.{name}": probes.get(name) for name in ("fma", "load", "instructions")}
        needed |= {name: getattr(self, name) for name in ("copy_bytes_per_s", *_FRESH)}
        lacking = [name for name, value in needed.items() if value is None]
        if lacking and any(probes.values()):
            raise ValueError(f"limits.{lacking[0]}: missing beside the probes")
        return self


class Operation(Model):
    title: Name


class Backend(Model):
    title: Name
    colour: Annotated[str, Field(pattern="^#[0-9A-Fa-f]{6}$")] | None
    own: bool


class Suite(Model):
    """The run as a whole, ``kernel_suite``."""

    schema_: Literal[2]
    sweep: Name | None = None
    machine: Machine
    limits: Limits | None = None
    operations: dict[str, Operation] = {}
    backends: dict[str, Backend] = {}
    not_timed: dict[str, str] = {}
    failed: dict[str, str] = {}


class Head(Model):
    kernel_suite: Suite
    datetime: Date = ""


class Stats(Model):
    median: Seconds
    q1: Seconds
    q3: Seconds
    rounds: Count
    data: list[Seconds] | None = None


class Info(Model):
    """What every case has in its ``extra_info``; ``COLUMNS`` are those of a table of cases."""

    COLUMNS: ClassVar = {"operation", "backend", "pass_", "dtype", "turns", "clock", "device"} | {
        "peak_memory_bytes", "disturbed"}  # fmt: skip

    schema_: Literal[2]
    operation: Name
    backend: Name
    pass_: Name
    dtype: Name
    machine: Machine | None = None
    device: Name | None = None
    clock: Name | None = None
    turns: Name | None = None
    captured: bool = False
    peak_memory_bytes: Count | None = None
    median_interval_s: Annotated[list[Seconds], Field(min_length=2, max_length=2)] | None = None
    ratios: dict[str, Rate] | None = None
    ran: list[str] | None = None
    cache: Name | None = None
    energy_per_call_j: Amount | None = None
    disturbed: Name | None = None


class Error(Model):
    rms: Amount


class Shape(Model):
    """Fields of the shapes that this project's operations have; others may have others."""

    B: Count | None = None
    H: Count | None = None
    Hk: Count | None = None
    N: Count | None = None
    M: Count | None = None
    D: Count | None = None
    rows: Count | None = None
    cols: Count | None = None


class Kernel(Info):
    COLUMNS = Info.COLUMNS | {"N", "implementation", "other_function", "least_bytes"} | {
        "gb_per_s", "tflop_per_s", "limit", "share_of_limit"}  # fmt: skip

    N: Size
    shape: Shape | None = None
    total_tokens: Size | None = None
    implementation: Name | None = None
    other_function: Name | None = None
    error: dict[str, Error] = {}
    least_bytes: Count | None = None
    least_flop: Amount | None = None
    gb_per_s: Amount | None = None
    tflop_per_s: Amount | None = None
    limit: Name | None = None
    share_of_limit: Amount | None = None
    limits_s: dict[str, Amount] | None = None
    bounds_s: dict[str, Amount] | None = None


class Step(Info):
    COLUMNS = Info.COLUMNS | {"model", "model_title", "images_per_s"}

    model: Name
    model_title: Name
    images_per_s: Rate
    settings: StepSetting


class Case(Model):
    """Of a document's ``benchmarks``."""

    name: Name
    stats: Stats
    extra_info: Kernel


class StepCase(Case):
    extra_info: Step  # type: ignore[assignment]
