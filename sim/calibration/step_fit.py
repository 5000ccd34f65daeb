"""Piecewise-linear fit of synchronous steps: what a step takes from the start of scheduling to its tokens.

The host's share is taken off elsewhere; here it is still in, as ``schedule_us`` (its own regression) and
as the rest, which cannot be told from the device's share by synchronous steps alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sagellm.cost_model.price_table import padded_size
from sim.calibration.measured_steps import MeasuredStep
from sim.calibration.regression import Array, fit_relative, hat_weights

GRAPH_SIZES = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))
"""Numbers of tokens for which vLLM captures device graphs by default: steps are padded to the next one."""

DECODE_KNOTS = (1, 4, 16, 32, 64, 128, 192, 256)
CONTEXT_KNOTS = (1, 16, 64, 256)
MIXED_KNOTS = (8, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
TOKEN_PAIRS_UNIT = 1e6  # keeps the columns of the regression near one magnitude
CONTEXT_UNIT = 1e3


@dataclass(frozen=True, slots=True)
class StepFit:
    """Microseconds of synchronous steps less their scheduling, at the knots above."""

    schedule_base_us: float
    schedule_seq_us: float
    decode_base_us: tuple[float, ...]
    decode_context_us: tuple[float, ...]  # for each context token, at CONTEXT_KNOTS
    mixed_base_us: tuple[float, ...]
    token_pair_us: float
    mixed_context_us: float

    def decode_us(self, num_seqs: float, num_context_tokens: float) -> float:
        size = padded(num_seqs)
        base = _dot(hat_weights(size, DECODE_KNOTS), self.decode_base_us)
        return base + num_context_tokens * _dot(hat_weights(size, CONTEXT_KNOTS), self.decode_context_us)

    def mixed_us(self, num_tokens: float, num_token_pairs: float, num_context_tokens: float) -> float:
        base = _dot(hat_weights(padded(num_tokens), MIXED_KNOTS), self.mixed_base_us)
        return base + num_token_pairs * self.token_pair_us + num_context_tokens * self.mixed_context_us


def fit_steps(steps: Sequence[MeasuredStep], host_seq_us: float = 0.0) -> StepFit:
    """Fits decode-only steps of unchanged batches, and steps with prefill chunks.

    ``host_seq_us`` of each sequence is taken off beforehand, as the host's and not the device's.

    Decode steps right after a request came or went are left out: with synchronous scheduling they pay
    for that on the host, which no decode of an unchanged batch does.
    """
    schedule, _ = fit_relative([[1.0, step.num_seqs] for step in steps], [step.schedule_us for step in steps])
    decodes = [step for step in steps if step.steady]
    mixed = [step for step in steps if step.chunks]
    decode, _ = fit_relative([_decode_row(step) for step in decodes], [_rest_us(step, host_seq_us) for step in decodes])
    prefill, _ = fit_relative([_mixed_row(step) for step in mixed], [_rest_us(step, host_seq_us) for step in mixed])
    return StepFit(
        schedule_base_us=float(schedule[0]),
        schedule_seq_us=float(schedule[1]),
        decode_base_us=_floats(decode[: len(DECODE_KNOTS)]),
        decode_context_us=_floats(decode[len(DECODE_KNOTS) :] / CONTEXT_UNIT),
        mixed_base_us=_floats(prefill[: len(MIXED_KNOTS)]),
        token_pair_us=float(prefill[-2]) / TOKEN_PAIRS_UNIT,
        mixed_context_us=float(prefill[-1]) / CONTEXT_UNIT,
    )


def padded(size: float) -> int:
    return padded_size(GRAPH_SIZES, round(size))


def _rest_us(step: MeasuredStep, host_seq_us: float) -> float:
    return step.duration_us - step.schedule_us - host_seq_us * step.num_seqs


def _decode_row(step: MeasuredStep) -> list[float]:
    size = padded(step.num_decode_seqs)
    context = step.num_decode_context_tokens / CONTEXT_UNIT
    return [*hat_weights(size, DECODE_KNOTS), *(weight * context for weight in hat_weights(size, CONTEXT_KNOTS))]


def _mixed_row(step: MeasuredStep) -> list[float]:
    pairs = step.num_token_pairs / TOKEN_PAIRS_UNIT
    return [*hat_weights(padded(step.num_tokens), MIXED_KNOTS), pairs, step.num_decode_context_tokens / CONTEXT_UNIT]


def _dot(weights: Sequence[float], values: Sequence[float]) -> float:
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def _floats(values: Array) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
