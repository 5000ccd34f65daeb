"""Which steps are measured: decodes, prompts and both together, small and large, in an order drawn at random.

The order matters where a machine gets slower or faster over minutes: each kind of step is spread over
the whole measurement, and so is what changes meanwhile.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sagellm.core.config import InstanceConfig
from sim.calibration.probed_instance import Arrival, Case

DECODE_STEPS = 12  # of an unchanged batch in one case
MIXED_EVERY = 3  # steps between two prompts that join decodes


@dataclass(frozen=True, slots=True)
class ProbeRange:
    """What the fit is to hold for, and how much work the measurement may make."""

    num_seqs_max: int
    chunk_tokens_max: int
    request_tokens_max: int  # prompt and output of one request
    case_tokens_max: int  # prompt tokens of one case: large batches are measured with shorter contexts only


def probe_range(instance: InstanceConfig, request_tokens_max: int, case_tokens_max: int) -> ProbeRange:
    """All that the instance can be asked for, up to requests of that length."""
    return ProbeRange(
        num_seqs_max=instance.max_num_seqs,
        chunk_tokens_max=instance.max_num_batched_tokens,
        request_tokens_max=min(request_tokens_max, instance.num_token_slots // 2),
        case_tokens_max=min(case_tokens_max, instance.num_token_slots // 2),
    )


def probe_cases(probe: ProbeRange, rounds: int, seed: int) -> list[Case]:
    """Every kind of case ``rounds`` times over, each round in an order of its own."""
    rng = random.Random(seed)
    cases: list[Case] = []
    for _ in range(rounds):
        one_round = [*_decode_cases(probe), *_prefill_cases(probe), *_mixed_cases(probe)]
        rng.shuffle(one_round)
        cases += one_round
    return cases


def size_knots(low: int, high: int, factor: int = 2) -> tuple[int, ...]:
    """``low``, ``low * factor``, ... and ``high``, two of them at least."""
    knots = [low]
    while knots[-1] * factor < high:
        knots.append(knots[-1] * factor)
    return (*knots, max(high, low + 1))


def _contexts(probe: ProbeRange, num_seqs: int) -> Sequence[int]:
    longest = min(probe.request_tokens_max - 2 * DECODE_STEPS, probe.case_tokens_max // num_seqs)
    return size_knots(16, longest, factor=4) if longest > 16 else (max(1, longest),)


def _decode_cases(probe: ProbeRange) -> Iterator[Case]:
    """Batches of every size over contexts of every length; the requests of a batch end one after the other."""
    for num_seqs in size_knots(1, probe.num_seqs_max):
        for context in _contexts(probe, num_seqs):
            yield tuple(Arrival(0, context, DECODE_STEPS + index % 4) for index in range(num_seqs))


def _prefill_cases(probe: ProbeRange) -> Iterator[Case]:
    """Prompts alone: of one chunk, of several, and several at once."""
    for num_tokens in size_knots(4, min(probe.chunk_tokens_max, probe.request_tokens_max - 1)):
        yield (Arrival(0, num_tokens, 1),)
    longest = min(probe.request_tokens_max - 1, probe.case_tokens_max)
    if longest > probe.chunk_tokens_max:
        yield (Arrival(0, longest, 1),)
    share = max(1, probe.chunk_tokens_max // 4)
    yield tuple(Arrival(0, min(share, longest), 1) for _ in range(8))


def _mixed_cases(probe: ProbeRange) -> Iterator[Case]:
    """Prompts of every length that join batches which decode."""
    for num_seqs in size_knots(2, max(3, probe.num_seqs_max - 1), factor=4):
        context = _contexts(probe, num_seqs)[0]
        lengths = [
            length
            for length in size_knots(8, probe.chunk_tokens_max // 2, factor=4)
            if length < probe.request_tokens_max
        ]
        num_steps = MIXED_EVERY * (len(lengths) + 1)
        decodes = [Arrival(0, context, num_steps + index % 4) for index in range(num_seqs - 1)]
        joining = [Arrival(MIXED_EVERY * (i + 1), length, 2) for i, length in enumerate(lengths)]
        yield (*decodes, *joining)
