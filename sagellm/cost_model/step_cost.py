"""The contract between a step and its price.

Prices are integers of femtoseconds, so that sums of many small terms are exact and the time of a
step repeated k times is an exact polynomial in k: jumping over k steps and walking through them end
at the same nanosecond.

A run makes a pair of these for every step that it prices, so they are structs: as immutable as a
frozen dataclass, and many times as fast to make.
"""

from typing import Protocol

import msgspec

FEMTOSECONDS_PER_NANOSECOND = 1_000_000


class StepFeatures(msgspec.Struct, frozen=True, gc=False):
    """What a step asks of its instance's device."""

    num_decode_seqs: int  # requests that get one token
    num_decode_context_tokens: int  # KV tokens that these read, summed, before this step
    chunks: tuple[tuple[int, int], ...] = ()  # (num_tokens, num_computed_tokens) of every other request
    prefilling_ns: int = 0  # for how long steps with chunks have followed each other right before this one


class StepCost(msgspec.Struct, frozen=True, gc=False):
    """The price of a step, and of its repetitions.

    Repetition ``j`` (from 0) occupies the device for ``device_fs + j * device_growth_fs``, for
    ``j < linear_repeat_max``; beyond that the price must be asked for anew.
    ``host_fs`` is the host's own work for one step (scheduling, launch, sampling, driver). It is
    serial on the host; it hides behind the device where two steps are in flight, and adds up where
    only one is.
    """

    device_fs: int
    device_growth_fs: int
    host_fs: int
    linear_repeat_max: int = 1 << 60


class StepCostModel(Protocol):
    """Prices steps of one model on one kind of instance. Pure: equal features, equal price."""

    @property
    def status(self) -> str:
        """``measured``, ``spec`` or ``estimate``; every report prints it."""

    @property
    def request_overhead_ns(self) -> int:
        """From the client to the scheduler and back, once a request: HTTP, tokenising, queues."""

    def step_cost(self, features: StepFeatures) -> StepCost: ...
