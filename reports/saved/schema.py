"""What saved files hold, of which types and within which bounds; what is not read may be anything.

:func:`check` says what is wrong with a file in one line that names the field. A field that may be
missing has a default here. Numbers are finite wherever they stand.
"""

import math
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from linear_vit.reports.claims import DATASETS

RUN = "linear-vit-run/2"
TABLE = "linear-vit-table/1"
ABLATION = "linear-vit-ablation/1"
BREAKDOWN = "linear-vit-step-breakdown/1"
BENCHMARKS = 2


class Damaged(ValueError):
    """A file is not what it should be; the message names the field, where one is to blame."""


def check(model: type[BaseModel], content: Any) -> Any:
    """The content as this model has it.

    Raises:
        Damaged: it does not fit; one line says where, and what is wrong there.
    """
    for field in _not_finite(content):
        raise Damaged(f"{field}: not a finite number")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"[{n}]" if isinstance(n, int) else f".{n}" for n in first["loc"])
        said = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if first["type"] == "missing":
            said = "missing"
        elif first["type"] != "value_error":
            said += f", not {first['input']!r:.40}"
        more = error.error_count() - 1
        text = f"{where.strip('.')}: {said}" if where else said
        raise Damaged(text + f" (and {more} more)" * bool(more)) from error


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


def _scalar(value: Any) -> Any:
    if not isinstance(value, str | int | float | None):
        raise ValueError("neither a number nor a name")
    return value


class Model(BaseModel):
    """Fields that are words of Python's, or of pydantic's, end in an underscore here."""

    model_config = ConfigDict(
        strict=True,
        extra="allow",
        protected_namespaces=(),
        alias_generator=lambda name: name.removesuffix("_"),
    )


Name = Annotated[str, Field(min_length=1)]
Date = Annotated[str, AfterValidator(_date)]  # ISO; empty where it is not known
Scalar = Annotated[Any, AfterValidator(_scalar)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Size = Annotated[int, Field(ge=1, le=10**15)]
Seconds = Annotated[float, Field(gt=0, le=1e9)]
Amount = Annotated[float, Field(ge=0, le=1e24)]
Rate = Annotated[float, Field(gt=0, le=1e24)]
Share = Annotated[float, Field(ge=0, le=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
Points = Annotated[float, Field(ge=-100, le=100)]
Exponent = Annotated[float, Field(ge=0, le=10)]


class Machine(Model):
    """Of a benchmark, or a training run's environment."""

    device: Name
    torch: Name
    cpu: Name
    threads: Size
    cores: Size | None = None
    device_name: Name | None = None
    git: str | None = None
    revision: str | None = None
    memory: str | None = None


# ---- training ------------------------------------------------------------------------------------


class StepSetting(Model):
    dataset: Name
    dim: Size
    depth: Size
    patch_size: Size
    batch_size: Size
    backend: str | None = None


class Setting(StepSetting):
    preset: Name
    recipe: Name
    heads: Size
    mlp_dim: Size
    epochs: Size
    lr: Annotated[float, Field(ge=0, le=1e3)]
    amp: Name
    compile: bool


class Config(Setting):
    attention_type: Name
    local_branch: bool
    seed: Annotated[int, Field(ge=0, lt=2**64)]


class Epoch(Model):
    val_accuracy: Share
    seconds: Seconds
    images: Size | None = None
    images_per_second: Rate | None = None

    @model_validator(mode="after")
    def _rate(self) -> Self:
        if self.images is not None and self.images_per_second is None:
            raise ValueError("images_per_second: missing beside images")
        return self


class Started(Model):
    """A training run, whether it ended or not."""

    schema_: Literal["linear-vit-run/2"]
    status: Literal["running", "finished", "interrupted", "failed"]


class Finished(Started):
    config: Config
    environment: Machine
    model: Name
    model_title: Name | None = None
    dataset_title: Name | None = None
    image_size: Size | None = None
    started: Date = ""
    parameters: Size
    images_per_second: Rate
    test_accuracy: Share
    peak_memory: Count | None = None
    epochs: Annotated[list[Epoch], Field(min_length=1)]

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.config.dataset not in DATASETS and self.dataset_title is None:
            raise ValueError(f"config.dataset: an unknown data set, {self.config.dataset!r}")
        return self


class Interval(Model):
    mean: Points
    half_width: Annotated[float, Field(ge=0, le=1e4)] | None
    values: list[Points]


class Accuracy(Interval):
    mean: Percent
    values: list[Percent]


class Ratio(Model):
    median: Rate
    low: Rate
    high: Rate
    values: list[Rate] = []
    how: Name = ""


class Speed(Model):
    median: Rate
    values: list[Rate]
    how: Name = ""


class Complexity(Model):
    order: Name
    exponent: Exponent | None = None
    low: Exponent | None = None
    high: Exponent | None = None
    pass_: str | None = None
    backend: str | None = None
    dtype: str | None = None
    machine: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.exponent is not None and (self.low is None or self.high is None):
            raise ValueError("low, high: missing beside an exponent")
        return self


class TimeToBaseline(Model):
    target_percent: Percent
    seconds: Seconds | None
    reached: Count
    seeds: Count
    speedup: Ratio | None


class Claim(Model):
    accuracy: Percent
    speedup: Rate


class ResultRow(Model):
    model: Name
    title: Name
    local_branch: bool
    status: Literal["measured", "not run"]
    seeds: list[Count]
    parameters: Size | None
    accuracy: Accuracy | None
    images_per_second: Speed | None
    speedup: Ratio | None
    gain: Interval | None
    time_to_baseline: TimeToBaseline | None
    complexity: Complexity
    hours_200_epochs: Rate | None
    peak_memory: Count | None
    claim: Claim | None
    verdict: Literal["reproduced", "not reproduced", "not run", "no claim"]
    verdict_reason: str


class Arithmetic(Model):
    tokens: Size
    dim: Size
    core_share: Share
    free_core: Rate
    pooled: Rate
    no_attention: Rate


class Results(Model):
    dataset: Name
    title: Name
    status: Literal["measured", "not run"]
    setting: Setting | None
    environment: Machine | None
    rows: Annotated[list[ResultRow], Field(min_length=1)]
    arithmetic: Arithmetic | None

    @model_validator(mode="after")
    def _measured(self) -> Self:
        if self.status == "measured" and (self.setting is None or self.environment is None):
            raise ValueError("setting, environment: null, and yet measured")
        return self


class Claims(Model):
    source: Name
    backbone: Name
    hours_200_epochs: dict[str, Rate]
    peak_memory_gb: Rate = 8


class Told(Model):
    text: str


class ResultsTable(Model):
    schema_: Literal["linear-vit-table/1"]
    created: Date = ""
    claims: Claims
    datasets: list[Results]
    exponents: str | None
    speeds: list[str] = []
    ablations: list[Told]


class AblationRow(Model):
    value: Scalar
    seeds: list[Count]
    parameters: Size
    accuracy: Accuracy
    val_accuracy: Accuracy
    images_per_second: Speed
    speedup: Ratio | None


class Ablation(Model):
    schema_: Literal["linear-vit-ablation/1"]
    setting: Name
    model: Name
    model_title: Name | None = None
    dataset: Name
    dataset_title: Name | None = None
    config: dict[str, Any]
    environment: Machine
    rows: Annotated[list[AblationRow], Field(min_length=1)]
    best: Scalar
    claimed_best: Scalar = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        """What is varied is no part of the setting."""
        Setting.model_validate({self.setting: self.rows[0].value} | self.config)
        if self.best not in [row.value for row in self.rows]:
            raise ValueError(f"best: not one of the rows' values, {self.best!r}")
        return self


class StepShares(Model):
    model: Name
    title: Name
    seconds: Seconds
    images_per_second: Rate
    shares: dict[str, Share]


class Breakdown(Model):
    schema_: Literal["linear-vit-step-breakdown/1"]
    environment: Machine
    setting: Setting
    rows: Annotated[list[StepShares], Field(min_length=1)]

    @model_validator(mode="after")
    def _alike(self) -> Self:
        names = {"attention"}.union(*(row.shares for row in self.rows))
        for number, row in enumerate(self.rows):
            if lacking := names - set(row.shares):
                raise ValueError(f"rows[{number}].shares.{min(lacking)}: missing")
        return self


class Exponents(Model):
    """A row of exponents.csv; where there is no fit, its numbers are empty."""

    model_config = ConfigDict(strict=False)

    machine: Name
    operation: Name
    pass_: Name
    dtype: Name
    backend: Name
    exponent: Exponent | Literal[""]
    low: Exponent | Literal[""]
    high: Exponent | Literal[""]
    reason: str = ""


# ---- proofs --------------------------------------------------------------------------------------


class Tensor(Model):
    tensor: Name
    shape: str
    rms_error: Amount | None = None
    rms_tolerance: Rate | None = None


class Checked(Model):
    operation: Name
    backend: Name
    dtype: Name
    status: Literal["passed", "failed", "unusable", "left out"]
    mode: Name
    reason: str | None
    tensors: list[Tensor] | None = None
    worst_rms_error: Amount | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.status == "passed" and self.worst_rms_error is None:
            raise ValueError("worst_rms_error: missing where it passed")
        if self.status in ("passed", "failed") and self.tensors is None:
            raise ValueError("tensors: missing where it ran")
        return self


class Check(Model):
    kind: Literal["check"]
    schema_: Literal[1]
    created: Date = ""
    machine: Machine
    results: list[Checked]


class Compiled(Model):
    backend: Name
    room: Name
    kernel: Name
    architecture: Name
    head_dim: Count | None
    dtype: Name | None
    registers: Count
    spill_stores: Count
    spill_loads: Count
    static_shared: Count
    dynamic_shared: Count | None
    occupancy: Share | None
    tensor_core: Count
    wide_loads: Count
    wide_stores: Count
    faults: list[str]


class Static(Model):
    kind: Literal["static"]
    schema_: Literal[1]
    created: Date = ""
    machine: Machine | None = None
    rows: list[Compiled]


class Counted(Model):
    operation: Name
    pass_: Name
    dtype: Name
    backend: str = ""
    shape: str
    launches: str
    tensor: Name
    loaded: Count
    distinct: Count
    stored: Count
    ratio: Amount | None


class Traffic(Model):
    kind: Literal["traffic"]
    schema_: Literal[1]
    created: Date = ""
    machine: Machine | None = None
    rows: list[Counted]


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
