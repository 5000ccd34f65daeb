"""How long ``x[m, k] @ weight[n, k].T`` takes: from peaks, or from measured shapes."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sagellm.cost_model.profile import DeviceSheet, GemmTable, OperatorRates

NEIGHBOURS = 4
"""So many measured shapes stand in for one that was not measured."""


class GemmTime(Protocol):
    """Prices matrix products in one element size."""

    def gemm_ns(self, m: int, n: int, k: int) -> float:
        """Nanoseconds of ``x[m, k] @ weight[n, k].T``."""


@dataclass(frozen=True, slots=True)
class RooflineGemm:
    """The longer of arithmetic and memory traffic, each at its stated share of the peak."""

    device: DeviceSheet
    rates: OperatorRates
    dtype_bytes: int

    def gemm_ns(self, m: int, n: int, k: int) -> float:
        flops_ns = 2 * m * n * k / (self.device.bf16_tflops * self.rates.gemm_compute_efficiency * 1e3)
        num_bytes = self.dtype_bytes * (n * k + m * k + m * n)
        return max(flops_ns, num_bytes / (self.device.memory_gbps * self.rates.gemm_memory_efficiency))


@dataclass(frozen=True, slots=True)
class MeasuredGemm:
    """Interpolates measured shapes.

    A measured shape is returned as measured. For any other the efficiency against the roofline at
    full peaks is averaged over the nearest measured shapes in (log n, log k), weighted by the inverse
    square of the distance: kernels of similar shapes are similarly efficient, and bytes and operations
    carry the size.
    """

    table: GemmTable
    device: DeviceSheet
    dtype_bytes: int
    # What has been worked out before. It changes no answer.
    _nearest_by_shape: dict[tuple[int, int], list[tuple[float, int]]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def gemm_ns(self, m: int, n: int, k: int) -> float:
        factor = clamped(self.table.step_factor_num_tokens, self.table.step_factor, m)
        return factor * self._isolated_ns(m, n, k)

    def _isolated_ns(self, m: int, n: int, k: int) -> float:
        nearest = self._nearest_by_shape.get((n, k))
        if nearest is None:
            nearest = self._nearest_by_shape[n, k] = self._nearest(n, k)
        if nearest[0][0] == 0.0:
            return self._measured_ns(nearest[0][1], m)
        total = weight_sum = 0.0
        for distance, index in nearest:
            curve = self.table.curves[index]
            total += self._measured_ns(index, m) / self._peak_ns(m, curve.n, curve.k) / distance
            weight_sum += 1 / distance
        return self._peak_ns(m, n, k) * total / weight_sum

    def _nearest(self, n: int, k: int) -> list[tuple[float, int]]:
        """(distance, index) of the nearest curves."""
        return sorted(
            (math.log(curve.n / n) ** 2 + math.log(curve.k / k) ** 2, index)
            for index, curve in enumerate(self.table.curves)
        )[:NEIGHBOURS]

    def _measured_ns(self, index: int, m: int) -> float:
        grid, times_us = self.table.num_tokens, self.table.curves[index].us
        return 1000 * linear(grid[: len(times_us)], times_us, m)

    def _peak_ns(self, m: int, n: int, k: int) -> float:
        num_bytes = self.dtype_bytes * (n * k + m * k + m * n)
        return max(2 * m * n * k / (self.device.bf16_tflops * 1e3), num_bytes / self.device.memory_gbps)


def linear(knots: Sequence[float], values: Sequence[float], point: float) -> float:
    """Linear between knots, constant before the first, with the last slope beyond the last.

    For times, the last stretch is where they grow with the size; for factors and efficiencies use
    ``clamped``.
    """
    if point > knots[-1] and len(knots) > 1 and values[-1] > values[-2]:
        return values[-1] + (values[-1] - values[-2]) * (point - knots[-1]) / (knots[-1] - knots[-2])
    return clamped(knots, values, point)


def clamped(knots: Sequence[float], values: Sequence[float], point: float) -> float:
    """Linear between knots, constant outside them."""
    if point <= knots[0]:
        return values[0]
    if point >= knots[-1]:
        return values[-1]
    index = bisect_right(knots, point) - 1
    share = (point - knots[index]) / (knots[index + 1] - knots[index])
    return values[index] + share * (values[index + 1] - values[index])
