"""Timed cases as the page's sections take them: by what they share, and what a tip says of each."""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from linear_vit.reports.tables.table import disturbance
from linear_vit.reports.units import exact
from linear_vit.screen import counted

Case = dict[str, Any]  # a row of Runs.kernels, or of a picture's data


def competing(found: Iterable[Case]) -> list[Case]:
    """Those that may be the best of something: undisturbed, and of the function asked for."""
    return [
        case
        for case in found
        if not disturbance(case) and not isinstance(case["other_function"], str)
    ]


def cases(frame: pd.DataFrame) -> list[Case]:
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def by(found: Iterable[Case], *names: str) -> dict[tuple[Any, ...], list[Case]]:
    """Cases by the values of some columns, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in found:
        groups.setdefault(tuple(case[name] for name in names), []).append(case)
    return groups


def time_tip(case: Case) -> str:
    """The exact time, and what it is known from."""
    rounds = counted(case["rounds"], "round") if case["rounds"] else "its rounds were not kept"
    return (
        f"{exact(case['median_s'] * 1e3, 'ms')} (quartiles {exact(case['q1_s'] * 1e3)} to "
        f"{exact(case['q3_s'] * 1e3)}; {rounds})"
    )


def details(info: dict[str, Any]) -> str:
    """Lines on a case beyond its time; of what is damaged, nothing."""
    try:
        return "\n".join(_lines(info))
    except (TypeError, ValueError, AttributeError):
        return ""


def _lines(info: dict[str, Any]) -> Iterable[str]:
    if info.get("share_of_limit") is not None:
        yield f"{info['share_of_limit']:.0%} of the {info.get('limit')} limit"
    if info.get("host_s") is not None:
        yield f"{info['host_s'] * 1e6:.3g} µs of the host to enqueue it, beside its time"
    worst = [error.get("rms") for error in (info.get("error") or {}).values()]
    if worst and None not in worst:
        yield f"rms error {max(worst):.1e} against float64"
    ran = info.get("ran")
    if isinstance(ran, list) and ran:
        more = f" and {len(ran) - 4} more" if ran[4:] else ""
        yield f"ran: {', '.join(str(name)[:60] for name in ran[:4])}{more}"
    telemetry = info.get("telemetry")
    for name, value in (telemetry if isinstance(telemetry, dict) else {}).items():
        if isinstance(value, list) and value and all(isinstance(v, int | float) for v in value):
            value = " / ".join(f"{v:.4g}" for v in value)  # least, median, greatest
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        if value not in (None, "", False):
            yield f"{name.replace('_', ' ')}: {value}"
    if info.get("energy_per_call_j") is not None:
        yield f"{info['energy_per_call_j']:.4g} J a call"
    if second := info.get("second_clock"):
        yield f"{second['difference']:+.1%} against a second clock: {second['clock']}"
    if info.get("cache"):
        yield f"{info['cache']} cache"
    if info.get("other_function"):
        yield f"computes another function: {info['other_function']}"
    if info.get("stop"):
        yield f"stopped: {info['stop']}"


def short(value: float) -> float:
    """Enough digits to draw, and few enough to keep the page small."""
    return float(f"{value:.6g}")
