"""95 % intervals: the bootstrap where a text drawn twice does no harm, else the jackknife.

Texts are taken as independent draws. Synthetic texts that saw each other as negatives are not
quite, and a fine-tune's own chance (its seed) is in no interval: compare several runs for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from .result import Estimate

NUM_RESAMPLES = 1000
NUM_GROUPS = 20
CONFIDENCE = 0.95
BOOTSTRAP = "95 % bootstrap over texts"


def resample_weights(num_texts: int, rng: np.random.Generator) -> np.ndarray:
    """How often each text is drawn in each resample: [NUM_RESAMPLES, num_texts], rows sum to 1."""
    counts = rng.multinomial(num_texts, np.full(num_texts, 1 / num_texts), size=NUM_RESAMPLES)
    return counts / num_texts


def percentile_estimate(value: float, resampled: np.ndarray, interval: str = BOOTSTRAP) -> Estimate:
    """A value with the percentile interval of its resamples (Efron 1979)."""
    tail = (1 - CONFIDENCE) / 2
    low, high = map(float, np.quantile(resampled, [tail, 1 - tail]))
    value = float(value)
    # Of equal texts all resamples are equal, but for rounding, which may miss the value.
    return Estimate(value, min(low, value), max(high, value), interval)


def bootstrap_mean(values: Sequence[float] | np.ndarray, seed: int) -> Estimate:
    """The mean of one number per text."""
    values = np.asarray(values, dtype=np.float64)
    weights = resample_weights(len(values), np.random.default_rng(seed))
    return percentile_estimate(values.mean(), weights @ values)


def jackknife(
    value: float,
    leave_one_out: np.ndarray,
    *,
    what: str = "one text",
    low: float = -math.inf,
    high: float = math.inf,
) -> Estimate:
    """A value with the interval value +- t * se, cut to [low, high].

        se^2 = (m - 1) / m * sum over i of (leave_one_out[i] - their mean)^2

    For symmetric statistics this is conservative on average: it overstates the variance (Efron
    and Stein 1981).

    Args:
        leave_one_out: [m] the statistic without each unit; t has m - 1 degrees of freedom.
        what: what a unit is.
    """
    from scipy.stats import t

    num_units = len(leave_one_out)
    if num_units < 2:
        return Estimate(float(value))
    deviations = leave_one_out - leave_one_out.mean()
    error = math.sqrt((num_units - 1) / num_units * float(deviations @ deviations))
    half = float(t.ppf((1 + CONFIDENCE) / 2, num_units - 1)) * error
    return Estimate(
        float(value),
        max(float(value) - half, low),
        min(float(value) + half, high),
        f"95 % jackknife, leaving out {what}",
    )


def group_jackknife(
    statistic: Callable[[np.ndarray], Sequence[float]], num_texts: int, seed: int
) -> list[Estimate]:
    """Statistics with jackknife intervals from leaving out one of NUM_GROUPS random groups.

    For what is too dear to compute without each single text.

    Args:
        statistic: several numbers from the indices of the texts that stay. Statistics of two sets
            of num_texts leave the same places out of both, so both variances are in it.
    """
    values = statistic(np.arange(num_texts))
    order = np.random.default_rng(seed).permutation(num_texts)
    groups = np.array_split(order, min(NUM_GROUPS, num_texts))
    without = np.array([statistic(np.setdiff1d(order, group)) for group in groups])
    what = f"a {len(groups)}th of the texts"
    return [jackknife(v, column, what=what) for v, column in zip(values, without.T, strict=True)]
