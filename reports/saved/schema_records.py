"""What every saved file but a timed run holds, as :mod:`reports.saved.schema` has it."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from linear_vit.reports.claims import DATASETS
from linear_vit.reports.saved.schema import (
    Amount,
    Count,
    Damaged,
    Date,
    Machine,
    Model,
    Name,
    Rate,
    Seconds,
    Size,
    StepSetting,
    check,
    free,
    many,
    maybe,
    of,
)


def scalar(value: Any) -> Any:
    if not isinstance(value, str | int | float | None):
        raise ValueError("neither a number nor a name")
    return value


Share = Annotated[float, Field(ge=0, le=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
Points = Annotated[float, Field(ge=-100, le=100)]
Exponent = Annotated[float, Field(ge=0, le=10)]
Scalar = Annotated[Any, AfterValidator(scalar)]
How = Literal["by turns", "in the runs"]


# ---- training ------------------------------------------------------------------------------------

Setting = of(
    StepSetting, preset=Name, recipe=Name, heads=Size, mlp_dim=Size, epochs=Size,
    lr=Annotated[float, Field(ge=0, le=1e3)], amp=Name, compile=bool,
)  # fmt: skip
Config = of(
    Setting, attention_type=Name, local_branch=bool, seed=Annotated[int, Field(ge=0, lt=2**64)]
)


def _rate(epoch: Any) -> str:
    lacks = epoch.images and not epoch.images_per_second
    return "images_per_second: missing beside images" if lacks else ""


# Older epochs have no images.
Epoch = of(
    val_accuracy=Share, seconds=Seconds, images=(Size, 0), images_per_second=(Rate, 0.0), rule=_rate
)
# A training run, whether it ended or not.
Started = of(
    schema_=Literal["linear-vit-run/2"],
    status=Literal["running", "finished", "interrupted", "failed"],
)


def _known(run: Any) -> str:
    name = run.config.dataset
    known = name in DATASETS or run.dataset_title
    return "" if known else f"config.dataset: an unknown data set, {name!r}"


# A run that began with another's weights, its attention swapped.
Beginning = of(checkpoint=Name, model=Name, model_title=Name, config=Config, val_accuracy=Share)
Finished = of(
    Started, config=Config, environment=Machine, model=Name, model_title=free(Name),
    dataset_title=free(Name), image_size=free(Size), started=(Date, ""),
    parameters=Size, images_per_second=Rate, test_accuracy=Share, peak_memory=free(Count),
    epochs=many(Epoch, 1), init_from=free(Beginning), rule=_known,
)  # fmt: skip

HalfWidth = maybe(Annotated[float, Field(ge=0, le=1e4)])
Accuracy = of(mean=Percent, half_width=HalfWidth, values=many(Percent))
Gain = of(mean=Points, half_width=HalfWidth, values=many(Points))
Ratio = of(median=Rate, low=Rate, high=Rate, values=(many(Rate), []), how=(How, "in the runs"))
Speed = of(median=Rate, values=many(Rate), how=(How, "in the runs"))


def _of_exponent(fit: Any) -> str:
    if fit.exponent is None:
        return ""
    needed = ("low", "high", "pass_", "backend", "dtype", "machine")
    lacks = [name.strip("_") for name in needed if getattr(fit, name) is None]
    return f"{', '.join(lacks)}: missing beside an exponent" if lacks else ""


Complexity = of(
    order=Name,
    **dict.fromkeys(("exponent", "low", "high"), free(Exponent)),
    **dict.fromkeys(("pass_", "backend", "dtype", "machine"), free(str)),
    rule=_of_exponent,
)
TimeToBaseline = of(
    target_percent=Percent, seconds=maybe(Seconds), reached=Count, seeds=Count, speedup=maybe(Ratio)
)
ResultRow = of(
    model=Name, title=Name, local_branch=bool, status=Literal["measured", "not run"],
    seeds=many(Count), parameters=maybe(Size), accuracy=maybe(Accuracy),
    images_per_second=maybe(Speed), speedup=maybe(Ratio), gain=maybe(Gain),
    time_to_baseline=maybe(TimeToBaseline), complexity=Complexity, hours_200_epochs=maybe(Rate),
    peak_memory=maybe(Count), claim=maybe(of(accuracy=Percent, speedup=Rate)),
    verdict=Literal["reproduced", "not reproduced", "not run", "no claim"], verdict_reason=str,
)  # fmt: skip
Arithmetic = of(
    tokens=Size, dim=Size, core_share=Share, free_core=Rate, pooled=Rate, no_attention=Rate
)


def _measured(found: Any) -> str:
    lacks = found.status == "measured" and None in (found.setting, found.environment)
    return "setting, environment: null, and yet measured" if lacks else ""


Results = of(
    dataset=Name, title=Name, status=Literal["measured", "not run"], setting=maybe(Setting),
    environment=maybe(Machine), rows=many(ResultRow, 1), arithmetic=maybe(Arithmetic),
    rule=_measured,
)  # fmt: skip
Claims = of(
    source=Name, backbone=Name, hours_200_epochs=dict[str, Rate], peak_memory_gb=(Rate, 8.0)
)
ResultsTable = of(
    schema_=Literal["linear-vit-table/1"], created=(Date, ""), claims=Claims,
    datasets=many(Results), exponents=maybe(str), speeds=(many(str), []),
    ablations=many(of(text=str)),
)  # fmt: skip


def _varied(found: Any) -> str:
    """What is varied is no part of the setting."""
    try:
        check(Setting, {found.setting: found.rows[0].value} | found.config)
    except Damaged as error:
        return f"config.{error}"
    known = found.best in [row.value for row in found.rows]
    return "" if known else f"best: not one of the rows' values, {found.best!r}"


AblationRow = of(
    value=Scalar, seeds=many(Count), parameters=Size, accuracy=Accuracy, val_accuracy=Accuracy,
    images_per_second=of(Speed, how=How), speedup=maybe(Ratio),
)  # fmt: skip
Ablation = of(
    schema_=Literal["linear-vit-ablation/1"], setting=Name, model=Name,
    model_title=free(Name), dataset=Name, dataset_title=free(Name),
    config=dict[str, Any],
    environment=Machine, rows=many(AblationRow, 1), best=Scalar, claimed_best=Scalar, rule=_varied,
)  # fmt: skip


def _alike(found: Any) -> str:
    names = {"attention"}.union(*(row.shares for row in found.rows))
    lacking = [(n, names - {*row.shares}) for n, row in enumerate(found.rows)]
    return next((f"rows[{n}].shares.{min(these)}: missing" for n, these in lacking if these), "")


StepShares = of(
    model=Name, title=Name, seconds=Seconds, images_per_second=Rate, shares=dict[str, Share]
)
Breakdown = of(
    schema_=Literal["linear-vit-step-breakdown/1"],
    environment=Machine,
    setting=Setting,
    rows=many(StepShares, 1),
    rule=_alike,
)


def _fitted(row: Any) -> str:
    lacking = [name for name in ("exponent", "low", "high") if getattr(row, name) is None]
    return f"{lacking[0]}: missing, and no reason why" if lacking and not row.reason else ""


class Text(Model, strict=False):
    """A row of a CSV file, where a number is text, and an empty one is none."""


Fitted = Annotated[Exponent | None, BeforeValidator(lambda text: text or None)]
Exponents = of(
    Text, machine=Name, operation=Name, pass_=Name, dtype=Name, backend=Name, exponent=Fitted,
    low=Fitted, high=Fitted, reason=(str, ""), rule=_fitted,
)  # fmt: skip


# ---- proofs --------------------------------------------------------------------------------------


def _of_what_ran(check: Any) -> str:
    if check.status == "passed" and check.worst_rms_error is None:
        return "worst_rms_error: missing where it passed"
    lacks = check.status in ("passed", "failed") and check.tensors is None
    return "tensors: missing where it ran" if lacks else ""


Tensor = of(tensor=Name, shape=str, rms_error=free(Amount), rms_tolerance=free(Rate))
Checked = of(
    operation=Name, backend=Name, dtype=Name, device=Name,
    status=Literal["passed", "failed", "unusable", "left out"], mode=Name, reason=maybe(str),
    tensors=free(many(Tensor)), worst_rms_error=free(Amount), rule=_of_what_ran,
)  # fmt: skip
Check = of(
    kind=Literal["check"],
    schema_=Literal[1],
    created=(Date, ""),
    device=Name,
    machine=Machine,
    results=many(Checked),
)
Compiled = of(
    **dict.fromkeys(("backend", "room", "kernel", "architecture"), Name), head_dim=maybe(Count),
    dtype=maybe(Name), registers=Count, static_shared=Count,
    **dict.fromkeys(("spill_stores", "spill_loads", "dynamic_shared"), maybe(Count)),
    occupancy=maybe(Share), tensor_core=Count, wide_loads=Count,
    wide_stores=Count, faults=many(str),
    # Of a kernel without a main loop null, and missing in files that don't count them.
    **dict.fromkeys(("steady", "steady_barriers", "steady_tensor_core"), free(Count)),
    copy_share=free(Share),
    **dict.fromkeys(("issue_us", "copy_us", "instructions_per_kib"), free(Amount)),
)  # fmt: skip
Counted = of(
    operation=Name, pass_=Name, dtype=Name, backend=(str, ""), shape=str, launches=str, tensor=Name,
    loaded=Count, distinct=Count, stored=Count, ratio=maybe(Amount),
)  # fmt: skip
Proof = of(schema_=Literal[1], created=(Date, ""), machine=free(Machine))
Toolchain = of(torch=free(str), triton=free(str), nvcc=free(str))
Static = of(Proof, kind=Literal["static"], toolchain=free(Toolchain), rows=many(Compiled))
Traffic = of(Proof, kind=Literal["traffic"], rows=many(Counted))


def _of_every_length(record: Any) -> str:
    for i, process in enumerate(record.processes):
        for name in ("median_s", "log", "error"):
            if len(getattr(process, name)) != len(record.tokens):
                return f"processes[{i}].{name}: not a value for each of tokens"
    return ""


LogRatio = Annotated[float, Field(ge=-20, le=20)]
Process = of(planted=Share, median_s=many(Seconds), log=many(LogRatio), error=many(Amount))
Repeats = of(
    kind=Literal["repeats"], schema_=Literal[1], created=(Date, ""), machine=Machine,
    operation=Name, backend=Name, tokens=many(Size, 3), left_out=Count, processes=many(Process, 2),
    rule=_of_every_length,
)  # fmt: skip
