"""A distribution given by a few quantiles, drawn from one value at a time."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class QuantileTable:
    """``values[i]`` is the quantile at ``percents[i]``, from 0 to 100; between them lies a straight line.

    With ``logarithmic`` the straight line is in the value's logarithm; values must then be above 0.
    """

    percents: tuple[float, ...]
    values: tuple[float, ...]
    logarithmic: bool = False

    def __post_init__(self) -> None:
        if len(self.percents) != len(self.values) or self.percents[0] != 0 or self.percents[-1] != 100:
            raise ValueError("a quantile table needs a value for each percent, from 0 to 100")

    def draw(self, random: Random) -> float:
        """One value."""
        percent = 100 * random.random()
        above = min(bisect_right(self.percents, percent), len(self.percents) - 1)
        low, high = self.values[above - 1], self.values[above]
        share = (percent - self.percents[above - 1]) / (self.percents[above] - self.percents[above - 1])
        if self.logarithmic:
            return math.exp(math.log(low) + (math.log(high) - math.log(low)) * share)
        return low + (high - low) * share
