"""How far a cost model is from measured synchronous steps, by region."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sagellm.cost_model.price_table import TabulatedStepCost
from sagellm.cost_model.step_cost import FEMTOSECONDS_PER_NANOSECOND, StepFeatures
from sim.calibration.measured_steps import MeasuredStep

FEMTOSECONDS_PER_MICROSECOND = 1000 * FEMTOSECONDS_PER_NANOSECOND
COMPILATION_FACTOR = 3.0
"""A step that takes so many times its price was a first call that compiled; it is counted, not averaged."""


@dataclass(frozen=True, slots=True)
class RegionError:
    """Relative errors (price / measured - 1) of one region's steps."""

    region: str
    num_steps: int
    mean: float
    median_absolute: float
    p90_absolute: float
    num_compilations: int


def region_errors(model: TabulatedStepCost, steps: Sequence[MeasuredStep]) -> list[RegionError]:
    """One entry for each region that has steps, in a fixed order."""
    errors = []
    for name, belongs in _regions():
        ratios = np.array([step_us(model, step) / step.duration_us for step in steps if belongs(step)])
        usual = ratios[ratios > 1 / COMPILATION_FACTOR] - 1
        if len(usual):
            absolute = np.abs(usual)
            errors.append(
                RegionError(
                    name,
                    len(usual),
                    float(usual.mean()),
                    float(np.median(absolute)),
                    float(np.percentile(absolute, 90)),
                    len(ratios) - len(usual),
                )
            )
    return errors


def step_us(model: TabulatedStepCost, step: MeasuredStep) -> float:
    """A synchronous step's price: the host's share and the device's, one after the other."""
    cost = model.step_cost(StepFeatures(step.num_decode_seqs, step.num_decode_context_tokens, step.chunks))
    return (cost.host_fs + cost.device_fs) / FEMTOSECONDS_PER_MICROSECOND


def summary(errors: Sequence[RegionError]) -> str:
    """The table in one line, for a profile's ``fit_error``."""
    parts = [f"{e.region} {e.median_absolute:.1%} median, {e.p90_absolute:.1%} p90" for e in errors if e.num_steps >= 5]
    return "; ".join(parts)


def table_text(errors: Sequence[RegionError]) -> str:
    lines = [f"{'region':<34}{'steps':>6}{'mean':>9}{'|err| p50':>11}{'|err| p90':>11}{'compiling':>11}"]
    for e in errors:
        figures = f"{e.num_steps:>6}{e.mean:>+9.2%}{e.median_absolute:>11.2%}{e.p90_absolute:>11.2%}"
        lines.append(f"{e.region:<34}{figures}{e.num_compilations:>11}")
    return "\n".join(lines)


Region = tuple[str, Callable[[MeasuredStep], bool]]


def _regions() -> list[Region]:
    regions: list[Region] = [
        (_decode_name(low, high, short), _decode_region(low, high, short))
        for low, high in ((1, 1), (2, 16), (17, 64), (65, 128), (129, 256))
        for short in (True, False)
    ]
    regions.append(("decode, batch changed", lambda s: not s.chunks and not s.steady))
    for mixed in (False, True):
        kind = "mixed" if mixed else "prefill"
        for low, high in ((1, 128), (129, 512), (513, 4096), (4097, 8192)):
            regions.append((f"{kind}, {low}-{high} tokens", _chunk_region(low, high, mixed)))
    return regions


def _decode_name(low: int, high: int, short: bool) -> str:
    return f"decode, batch {low}-{high}, context {'<' if short else '>='} 512"


def _decode_region(low: int, high: int, short: bool) -> Callable[[MeasuredStep], bool]:
    def belongs(step: MeasuredStep) -> bool:
        if not step.steady or not low <= step.num_decode_seqs <= high:
            return False
        return (step.num_decode_context_tokens < 512 * step.num_decode_seqs) == short

    return belongs


def _chunk_region(low: int, high: int, mixed: bool) -> Callable[[MeasuredStep], bool]:
    return lambda step: bool(step.chunks) and (step.num_decode_seqs > 0) == mixed and low <= step.num_tokens <= high
