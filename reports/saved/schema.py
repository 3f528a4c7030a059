"""What timed runs hold, of which types and within which bounds; what is not read may be anything.

:func:`check` says what is wrong with a file in one line that names the field. A field that may be
missing has its default behind it, as ``(Name, "")``; one that may be null is ``maybe(Name)``.
Numbers are finite wherever they stand. Other files than timed runs are in
:mod:`reports.saved.schema_records`.
"""

import functools
import math
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    create_model,
)
from pydantic_core import PydanticCustomError


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
Gain = Annotated[float, Field(gt=-1, le=1e24)]
Rate = Annotated[float, Field(gt=0, le=1e24)]


def of(base: Any = Model, /, *, rule: Callable[[Any], str] | None = None, **fields: Any) -> Any:
    """A model of these fields, and of those of a base.

    Args:
        rule: what is wrong with a whole one, or nothing: the field, a colon, and why.
    """
    required: Any = {n: t if isinstance(t, tuple) else (t, ...) for n, t in fields.items()}
    made: Any = create_model("Record", __base__=base, **required)

    def keep(record: Any) -> Any:
        if rule and (wrong := rule(record)):
            raise PydanticCustomError(WHOLE, "{wrong}", {"wrong": wrong})
        return record

    return Annotated[made, AfterValidator(keep)] if rule else made


def maybe(kind: Any) -> Any:
    return kind | None


def free(kind: Any) -> Any:
    """What may be missing, or null."""
    return kind | None, None


def named(kind: Any) -> Any:
    """Any number of them by name, or nothing at all."""
    return dict[str, kind], {}


def many(kind: Any, least: int = 0) -> Any:
    return Annotated[list[kind], Field(min_length=least)]


Machine = of(
    device=Name, torch=Name, cpu=Name, threads=Size, cores=free(Size), processes=free(Size),
    device_name=free(Name), git=free(str), revision=free(str), memory=free(str),
)  # fmt: skip
StepSetting = of(
    dataset=Name, dim=Size, depth=Size, patch_size=Size, batch_size=Size, backend=free(str)
)


def _probed(limits: Any) -> str:
    """The probes are read together, and beside the rates of memory."""
    probes = limits.probes or {}
    needed = {f"probes.{name}": probes.get(name) for name in ("fma", "load", "instructions")}
    needed |= {name: getattr(limits, name) for name in _MEMORY}
    lacking = [name for name, value in needed.items() if value is None]
    return f"{lacking[0]}: missing beside the probes" if lacking and any(probes.values()) else ""


_MEMORY = ("copy_bytes_per_s", "fresh_bytes_per_s", "fresh_large_bytes_per_s")
Limits = of(
    **dict.fromkeys(_MEMORY, free(Rate)), launch_s=free(Seconds),
    measured=free(Date), disturbed=free(Name), matmul_flop_per_s=free(dict[str, Rate]),
    probes=free(dict[str, Rate | None]), matmul_kernels=free(dict[str, Name]), rule=_probed,
)  # fmt: skip
Operation = of(title=Name)
Backend = of(title=Name, own=bool, colour=maybe(Annotated[str, Field(pattern="^#[0-9A-Fa-f]{6}$")]))
# The run as a whole.
Suite = of(
    schema_=Literal[2], sweep=free(Name), machine=Machine, limits=free(Limits),
    operations=named(Operation), backends=named(Backend),
    not_timed=named(str), failed=named(str),
)  # fmt: skip
Head = of(kernel_suite=Suite, datetime=(Date, ""))

# A case: what all have, what kernels have, and what training steps have.
Stats = of(median=Seconds, q1=Seconds, q3=Seconds, rounds=Count, data=free(list[Seconds]))
Info = of(
    schema_=Literal[2], operation=Name, backend=Name, pass_=Name, dtype=Name, machine=free(Machine),
    device=free(Name), clock=free(Name), turns=free(Name), captured=(bool, False),
    peak_memory_bytes=free(Count), ran=free(list[str]), cache=free(Name),
    median_interval_s=free(Annotated[list[Seconds], Field(min_length=2, max_length=2)]),
    second_clock=free(of(seconds=Seconds, difference=Gain, clock=Name)),
    ratios=free(dict[str, Rate]), energy_per_call_j=free(Amount), disturbed=free(Name),
)  # fmt: skip
# Fields of the shapes that this project's operations have; others may have others.
Shape = of(**dict.fromkeys(("B", "H", "Hk", "N", "M", "D", "rows", "cols"), free(Count)))
Kernel = of(
    Info, N=Size, shape=free(Shape), total_tokens=free(Size), implementation=free(Name),
    other_function=free(Name), error=named(of(rms=Amount)), least_bytes=free(Count),
    **dict.fromkeys(("least_flop", "gb_per_s", "tflop_per_s", "share_of_limit"), free(Amount)),
    limit=free(Name), limits_s=free(dict[str, Amount]), bounds_s=free(dict[str, Amount]),
)  # fmt: skip
Step = of(Info, model=Name, model_title=Name, images_per_s=Rate, settings=StepSetting)
WholeModel = of(
    Info, N=free(Size), whole_model=Name, attention=Name, resolution=Size, batch=Size,
    images_per_s=Rate, parameters=free(Count),
    attention_s=free(Amount), attention_alone_s=free(Amount), attention_alone_disturbed=free(Name),
)  # fmt: skip
OverProcesses = of(
    Info, N=Size, processes=Size, batch=Size, heads=Size, head_dim=Size, sent_bytes=Count,
    exchanges=Count, all_reduce_latency_s=free(Seconds), all_reduce_bytes_per_s=free(Rate),
)  # fmt: skip
Case = of(name=Name, stats=Stats, extra_info=Kernel)
StepCase = of(name=Name, stats=Stats, extra_info=Step)
ModelCase = of(name=Name, stats=Stats, extra_info=WholeModel)
OverCase = of(name=Name, stats=Stats, extra_info=OverProcesses)
