"""The accuracy rule: how far from a float64 reference a result may be.

For output and every gradient, against the reference evaluated in float64 on the same, already
rounded, inputs::

    rms(x - ref) <= rms_tol * rms(ref)      and      max|x - ref| <= max_tol * max|ref|

plus what rounding the exact result to the dtype costs, where that alone is more (float16
subnormals). Tests, cross-checks and benchmarks all ask this file, so that one rule decides.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Relative tolerances of one dtype; ``rms_*`` against rms(ref), ``max_*`` against max|ref|."""

    rms_forward: float
    rms_gradient: float
    max_forward: float
    max_gradient: float


TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-13, 3e-13, 5e-13, 1e-12),
    torch.float32: Tolerance(1e-6, 3e-6, 5e-6, 1e-5),
    torch.float16: Tolerance(4e-4, 8e-4, 1.5e-3, 3e-3),
    torch.bfloat16: Tolerance(3e-3, 6e-3, 8e-3, 2e-2),
}


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found. Errors and tolerances are relative: to rms(ref), to max|ref|."""

    rms_error: float
    max_error: float
    rms_tolerance: float
    max_tolerance: float
    passed: bool

    def __str__(self) -> str:
        return (
            f"rms error {self.rms_error:.2e} (allowed {self.rms_tolerance:.2e}), "
            f"max error {self.max_error:.2e} (allowed {self.max_tolerance:.2e})"
        )


def compare(
    actual: Tensor,
    expected: Tensor,
    *,
    gradient: bool,
    dtype: torch.dtype | None = None,
    roundings: int = 1,
) -> Comparison:
    """Compare a result with its float64 reference by the accuracy rule.

    Args:
        actual: the result, any shape, in the dtype under test.
        expected: the reference, float64, of the same shape.
        gradient: whether the gradient tolerances apply.
        dtype: whose tolerances apply; defaults to ``actual.dtype`` (a float32 state computed from
            bfloat16 inputs is still held to float32: its inputs are exact).
        roundings: operations in a row, each of which may round its result to the dtype: their
            errors add up as squares.

    Returns:
        The errors, the tolerances and the verdict. A NaN or an infinity in ``actual`` where the
        reference has none never passes; two empty tensors agree.

    Raises:
        ValueError: the shapes differ, or ``expected`` is not float64 (a reference in the
            precision under test proves nothing).
    """
    if actual.shape != expected.shape:
        raise ValueError(f"actual has shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
    if expected.dtype != torch.float64:
        raise ValueError(f"expected must be float64, got {expected.dtype}")
    dtype = actual.dtype if dtype is None else dtype
    tolerance = TOLERANCES[dtype]
    slack = math.sqrt(roundings)
    rms_tolerance = slack * (tolerance.rms_gradient if gradient else tolerance.rms_forward)
    max_tolerance = slack * (tolerance.max_gradient if gradient else tolerance.max_forward)
    if expected.numel() == 0:
        return Comparison(0.0, 0.0, rms_tolerance, max_tolerance, True)

    reference = expected.detach().cpu()
    error = (actual.detach().cpu().double() - reference).abs()
    rounding = (reference.to(dtype).double() - reference).abs()
    rms_reference, max_reference = _rms(reference), reference.abs().max().item()
    rms_allowed, max_allowed = rms_tolerance * rms_reference, max_tolerance * max_reference
    if _rms(rounding) > rms_allowed:
        rms_allowed += _rms(rounding)
    if rounding.max().item() > max_allowed:
        max_allowed += rounding.max().item()
    rms_error, max_error = _rms(error), error.max().item()
    # Written so that a NaN on either side of <= is a failure.
    passed = bool(rms_error <= rms_allowed and max_error <= max_allowed)
    return Comparison(
        rms_error=_ratio(rms_error, rms_reference),
        max_error=_ratio(max_error, max_reference),
        rms_tolerance=_ratio(rms_allowed, rms_reference) if rms_reference else rms_tolerance,
        max_tolerance=_ratio(max_allowed, max_reference) if max_reference else max_tolerance,
        passed=passed,
    )


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _ratio(error: float, reference: float) -> float:
    if reference == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / reference
