"""Robust linear regression on relative errors, and the basis of piecewise-linear functions."""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ROUNDS = 40
OUTLIER_SIGMAS = 1.5
MEAN_OUTLIER_SIGMAS = 3.0


def hat_weights(point: float, knots: Sequence[int]) -> list[float]:
    """Weights of the knots' values in the linear interpolation at ``point``; constant outside the knots."""
    weights = [0.0] * len(knots)
    point = min(max(point, knots[0]), knots[-1])
    index = min(bisect_right(knots, point) - 1, len(knots) - 2)
    share = (point - knots[index]) / (knots[index + 1] - knots[index])
    weights[index], weights[index + 1] = 1 - share, share
    return weights


def fit_relative(rows: Sequence[Sequence[float]], targets: Sequence[float]) -> tuple[Array, Array]:
    """Coefficients of ``rows @ coefficients ~ targets``, and the relative errors.

    Iteratively reweighted least squares with Huber weights on the error relative to the target: a first
    call's compilation, fifty times the usual step, gets next to no weight.
    """
    matrix: Array = np.asarray(rows, dtype=np.float64)
    values: Array = np.asarray(targets, dtype=np.float64)
    relative: Array = 1 / np.abs(values)
    weights: Array = relative.copy()
    coefficients: Array = np.zeros(matrix.shape[1])
    errors: Array = np.zeros(len(values))
    for _ in range(ROUNDS):
        solution = np.linalg.lstsq(matrix * weights[:, None], values * weights, rcond=None)[0]
        coefficients = np.asarray(solution, dtype=np.float64)
        errors = (matrix @ coefficients - values) * relative
        sigma = 1.4826 * float(np.median(np.abs(errors))) + 1e-9
        huber = np.minimum(1.0, OUTLIER_SIGMAS * sigma / np.maximum(np.abs(errors), 1e-12))
        weights = relative * np.sqrt(huber)
    return coefficients, errors


def fit_mean(rows: Sequence[Sequence[float]], targets: Sequence[float], floor: float = 0.0) -> Array:
    """Coefficients of ``rows @ coefficients ~ mean of targets``, each error relative to the fitted value.

    An error relative to the target, as in `fit_relative`, makes a fit to scattered times too low: the
    same distance weighs more below than above. This one is for sums of many times, such as a request's
    steps, of which the mean counts. Beyond three sigmas an outlier weighs no more than at three.
    ``floor`` bounds what an error is related to from below.
    """
    matrix: Array = np.asarray(rows, dtype=np.float64)
    values: Array = np.asarray(targets, dtype=np.float64)
    least = max(floor, 1e-3 * float(np.median(np.abs(values))), 1e-12)
    weights: Array = 1 / np.maximum(np.abs(values), least)
    coefficients: Array = np.zeros(matrix.shape[1])
    for _ in range(ROUNDS):
        solution = np.linalg.lstsq(matrix * weights[:, None], values * weights, rcond=None)[0]
        coefficients = np.asarray(solution, dtype=np.float64)
        fitted: Array = matrix @ coefficients
        relative: Array = 1 / np.maximum(fitted, least)
        errors: Array = (fitted - values) * relative
        sigma = 1.4826 * float(np.median(np.abs(errors))) + 1e-9
        huber = np.minimum(1.0, MEAN_OUTLIER_SIGMAS * sigma / np.maximum(np.abs(errors), 1e-12))
        weights = relative * np.sqrt(huber)
    return coefficients
