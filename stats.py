"""
Means and how sure they are: standard errors and intervals for evaluation.

Translated benchmarks ask the same questions in every language, so their answers are not independent: what is averaged over
languages is clustered by question (Miller 2024, https://arxiv.org/abs/2411.00640).
"""

import math
import statistics

import numpy as np


def stderr(values):
    """Of a mean: sample standard deviation / sqrt(n), as lm-evaluation-harness has it. 0 for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def pooled_stderr(groups):
    """Of the mean over groups of values of which each has its own mean, as lm-evaluation-harness has it of a group of tasks."""
    n, free = sum(map(len, groups)), sum(len(values) - 1 for values in groups)
    return math.sqrt(sum((len(g) - 1) * stderr(g) ** 2 * len(g) for g in groups) / free / n) if free else 0.0


def wilson(share, n, z=1.96):
    """95 % interval of a share of n (Wilson 1927): unlike mean and standard error it holds near 0 and 1 and for few."""
    middle, width = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - width) / (1 + z * z / n), (middle + width) / (1 + z * z / n)


def clustered_stderr(values, clusters):
    """Of a mean over rows of which those of one cluster move together: sqrt(sum over clusters of (sum of (x - mean))^2) / n."""
    values, (names, index) = np.asarray(values, dtype=float), np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(index, weights=values - values.mean(), minlength=len(names))
    return float(np.sqrt((sums**2).sum()) / len(values))


def clustered_interval(values, clusters, seed=0, resamples=2000):
    """
    Mean of `values` and its 95 % percentile interval when whole clusters are drawn with replacement:
    (n,), (n,) -> (mean, low, high).
    """
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    total = np.bincount(index, weights=values, minlength=len(names))
    count = np.bincount(index, minlength=len(names))
    drawn = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    means = total[drawn].sum(1) / count[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(np.mean(values)), float(low), float(high)


def table_of(samples, columns, extra=lambda rows: {}):
    """
    Sample rows with "language" and "question" (what languages share) -> {language or "all": {column: mean, column_stderr, n}}
    for columns that hold a number, True or False; rows where it is None or missing are not counted in it. `extra`: more
    metrics of a list of rows.
    """
    out = {}
    for language in ["all", *dict.fromkeys(s["language"] for s in samples)]:
        at = [s for s in samples if language in ("all", s["language"])]
        out[language] = {"n": len(at)}
        for column in columns:
            kept = [(float(s[column]), s["question"]) for s in at if s.get(column) is not None]
            if kept:
                values, clusters = zip(*kept)
                error = clustered_stderr(values, clusters) if language == "all" else stderr(values)
                out[language] |= {column: statistics.fmean(values), f"{column}_stderr": error}
        out[language] |= extra(at)
    return out
