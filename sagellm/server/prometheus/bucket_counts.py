"""Histograms that cost an addition for each value, and the bounds that vLLM's dashboards know."""

from bisect import bisect_left
from collections.abc import Sequence

from prometheus_client.utils import floatToGoString

# Upper bounds as vLLM has them, in seconds or tokens, so that dashboards and recording rules work unchanged.
TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TTFT_WITH_SLOS_S = tuple(sorted((*TTFT_S, 0.2, 2.0, 3.0)))
"""With the bounds that service-level objectives usually name, which vLLM's lack."""
TOKEN_GAP_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
NUM_CHOICES = (1, 2, 5, 10, 20)


def one_two_five(largest: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 and so on, up to the largest value there can be."""
    bounds = [factor * 10**power for power in range(len(str(largest))) for factor in (1, 2, 5)]
    return tuple(bound for bound in bounds if bound <= largest)


class BucketCounts:
    """How many values fell at or below each bound, and their sum."""

    __slots__ = ("_counts", "bounds", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self._counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def add(self, value: float, count: int = 1) -> None:
        """Take a value that occurred so many times."""
        self._counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def cumulative(self) -> list[tuple[str, float]]:
        """(bound, values at or below it) as Prometheus has it, the last bound infinity."""
        rows: list[tuple[str, float]] = []
        so_far = 0
        for bound, count in zip((*map(float, self.bounds), float("inf")), self._counts, strict=True):
            so_far += count
            rows.append((str(floatToGoString(bound)), so_far))  # type: ignore[no-untyped-call]
        return rows
