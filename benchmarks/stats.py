"""The statistics of report.py, on arrays of final returns. One task: Student, Welch, Holm. Over tasks: rliable."""

import itertools
import warnings
from collections.abc import Callable

import numpy as np
import scipy.stats
from rliable import library, metrics
from statsmodels.stats.multitest import multipletests

LEVEL = 0.95
RESAMPLES = 2000


def student_interval(values: np.ndarray, level: float = LEVEL) -> float:
    """Half the width of a mean's confidence interval, by Student's t with n - 1 degrees of freedom. NaN for n = 1."""
    return half_width(np.std(values, ddof=1), len(values), level) if len(values) > 1 else float("nan")


def half_width(std: float, n: int, level: float = LEVEL) -> float:
    """The same from the standard deviation, with n - 1, of n values."""
    return float(scipy.stats.t.ppf((1 + level) / 2, n - 1) * std / np.sqrt(n))


def against(values: np.ndarray, mean: float, std: float, n: int) -> tuple[float, float]:
    """Half the width of the interval of mean(values) - mean, and the p-value, by Welch's t test of `values` against n
    others of which only the mean and the standard deviation, with n - 1, are known. Without the deviation (NaN), by a
    one-sample t test against the mean as a point. NaN for one value, and where nothing varies."""
    if len(values) < 2:
        return float("nan"), float("nan")
    own = np.var(values, ddof=1) / len(values) if np.ptp(values) else 0.0  # rounding alone is no variance
    parts = np.array([own, 0.0 if np.isnan(std) else std**2 / n])
    if not parts.any():
        return float("nan"), float("nan")
    degrees = parts.sum() ** 2 / (parts**2 / np.array([len(values) - 1, max(n - 1, 1)])).sum()
    error = np.sqrt(parts.sum())
    half = scipy.stats.t.ppf((1 + LEVEL) / 2, degrees) * error
    return float(half), float(2 * scipy.stats.t.sf(abs(np.mean(values) - mean) / error, degrees))


def holm(p_values: list[float]) -> list[float]:
    """Holm's correction for as many looks as there are p-values; those that are NaN are no look and stay."""
    adjusted = np.array(p_values, float)
    known = ~np.isnan(adjusted)
    if known.any():
        adjusted[known] = multipletests(adjusted[known], method="holm")[1]
    return adjusted.tolist()


def welch(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float, float]:
    """mean(b) - mean(a), the ends of its interval, and the p-value, by Welch's t test, which does not take the two
    spreads for equal. NaN where there is a single seed, or no spread at all."""
    difference = float(np.mean(b) - np.mean(a))
    if min(len(a), len(b)) < 2 or np.ptp(a) == np.ptp(b) == 0:
        return difference, float("nan"), float("nan"), float("nan")
    with warnings.catch_warnings(action="ignore"):  # that one side has no spread
        test = scipy.stats.ttest_ind(b, a, equal_var=False)
    low, high = test.confidence_interval(LEVEL)
    return difference, float(low), float(high), float(test.pvalue)


def improvement(scores_x: np.ndarray, scores_y: np.ndarray) -> np.ndarray:
    """P(X > Y) for random seeds, a tie counting half, averaged over tasks: [n, tasks] and [m, tasks] to [1].

    The same number as rliable.metrics.probability_of_improvement, without its Mann-Whitney test per task, which
    thousands of resamples would take minutes over."""
    return 0.5 + 0.5 * np.sign(scores_x[:, None] - scores_y[None]).mean(axis=(0, 1)).mean(keepdims=True)


def bootstrap(
    scores: np.ndarray | list[np.ndarray], function: Callable[..., np.ndarray], resamples: int = RESAMPLES
) -> tuple[np.ndarray, np.ndarray]:
    """function(scores) and its interval [2, ...], by rliable's bootstrap, which resamples the seeds of each task apart.
    `scores` is [seeds, tasks], or a list of such arrays, which are resampled independently. The same at every call."""
    np.random.seed(0)  # noqa: NPY002  rliable draws from here, whatever its random_state says
    points, intervals = library.get_interval_estimates({"": scores}, function, reps=resamples)
    return points[""], intervals[""]


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half of all seeds and tasks: [seeds, tasks] to [1]."""
    return np.array([metrics.aggregate_iqm(scores)])


def profile(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Share of seeds and tasks above each threshold: [seeds, tasks] to [thresholds]."""
    return (scores[None] > thresholds[:, None, None]).mean(axis=(1, 2))


def comparable(tasks_of: dict[str, set[str]], algos: int = 2, tasks: int = 3) -> tuple[list[str], list[str]]:
    """The algorithms and tasks of a fair aggregate: the most algorithms that have three tasks or more in common, then
    the most tasks. Both empty if there are no two."""
    for size in range(len(tasks_of), algos - 1, -1):
        shared = {
            group: set.intersection(*(tasks_of[a] for a in group)) for group in itertools.combinations(tasks_of, size)
        }
        best = max(shared, key=lambda group: len(shared[group]))
        if len(shared[best]) >= tasks:
            return list(best), sorted(shared[best])
    return [], []
