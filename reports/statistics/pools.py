"""One verdict for all lengths of an operation on a backend: what single cases leave undecided.

A case's x is log(time after / before) against that of the control at its place, and free of what
moved both. Over the k lengths of a pool x = θ + uᵢ + eᵢ: the change asked for, how much a length
differs from it (truly, or by the luck of where a process put its memory) and the error of the
medians (of variance vᵢ, from their rounds). θ is estimated by the plain mean of the xᵢ, that is, by
the geometric mean of the ratios; its variance by their scatter s²/k, which holds both u and e
whatever their sizes, with Student's t of k − 1 (Student, Biometrika 6, 1908). Of ten lengths or
more the tenth at either end is left out, since a machine that is taken away for a while puts single
ones off by anything; s² is then Winsorised (Yuen, Biometrika 61, 1974). Where lengths agree better
than their medians are known, that is luck, and Σvᵢ/k² counts. Equal weights, since those of 1/vᵢ
and an estimated variance of u cover less than they say with few lengths (Shuster, Statistics in
Medicine 29, 2010).

What a process does to all lengths of one backend alike can't be seen in one pair of processes: it
looks like a change. So a pool is slower or faster only where its interval lies past the margin as
a whole: at a margin of 3 %, luck of 1 % a process and backend (standard deviation) then raises a
false alarm in less than 5 % of comparisons, where without the margin it would in one of three.
"""

import numpy as np
import pandas as pd

KEY = ["operation", "pass", "dtype", "backend"]
FEWEST = 3  # of two lengths Student's t decides nothing


def pooled(cases: pd.DataFrame, changes: np.ndarray, variances: np.ndarray) -> pd.DataFrame:
    """A row per pool of at least three lengths, with its estimate.

    Args:
        cases: per case the columns of ``KEY``.
        changes: per case log(after / before), less the control's; NaN leaves it out.
        variances: of these, from their rounds.

    Returns:
        ``KEY``, ``cases`` (how many), ``change`` (θ), ``error`` (its standard error) and
        ``freedom`` (of Student's t).
    """
    rows = []
    numbered = cases[KEY].assign(index=np.arange(len(cases)))[np.isfinite(changes)]
    for key, part in numbered.groupby(KEY, sort=False):
        if len(part) >= FEWEST:
            estimate = mean_change(changes[part["index"]], variances[part["index"]])
            rows.append((*key, len(part), *estimate))
    return pd.DataFrame(rows, columns=[*KEY, "cases", "change", "error", "freedom"])


def mean_change(x: np.ndarray, variance: np.ndarray) -> tuple[float, float, int]:
    """Mean of changes that differ from one another, its standard error and degrees of freedom.

    Args:
        x: at least two changes.
        variance: that of each by itself.
    """
    k = len(x)
    ends = k // 10
    h = k - 2 * ends
    kept = np.argsort(x, kind="stable")[ends : k - ends]
    low, high = x[kept[[0, -1]]]
    scatter = (k - 1) * float(np.clip(x, low, high).var(ddof=1))
    error = np.sqrt(max(scatter / (h * (h - 1)), float(variance[kept].sum()) / (h * k)))
    return float(x[kept].mean()), float(error), h - 1
