"""Steps that a model runs before it serves: they compile, tune and allocate what the first real ones would wait for."""

from dataclasses import dataclass

from sagellm.core.config import InstanceConfig
from sagellm.core.identity import BlockId, RequestId
from sagellm.core.plan import StepPlan, TokenChunk
from sagellm.core.request import RequestSpec
from sagellm.core.sampling import SamplingParameters

_SAMPLING = SamplingParameters(temperature=1.0, top_p=0.9)  # the kind that takes most memory
_NUM_SEQS_SMALL = 2
_NUM_TOKENS_SMALL = 8


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Requests, a step that prefills them all, and, where there is room, one that decodes them."""

    requests: tuple[RequestSpec, ...]
    plans: tuple[StepPlan, ...]


def largest_steps(instance: InstanceConfig, num_positions: int) -> WarmUp:
    """As many sequences and tokens as one step of the instance can have."""
    num_seqs = min(instance.max_num_seqs, instance.num_blocks)
    return _steps(instance, num_positions, num_seqs, instance.max_num_batched_tokens)


def small_steps(instance: InstanceConfig, num_positions: int) -> WarmUp:
    """Just enough to have run everything once."""
    num_seqs = min(_NUM_SEQS_SMALL, instance.max_num_seqs, instance.num_blocks)
    return _steps(instance, num_positions, num_seqs, _NUM_TOKENS_SMALL)


def _steps(instance: InstanceConfig, num_positions: int, num_seqs: int, num_tokens: int) -> WarmUp:
    num_blocks_each = instance.num_blocks // num_seqs
    # One token of the room is for the step that decodes.
    room = min(num_blocks_each * instance.block_size, num_positions) - 1
    prompt_len = max(1, min(num_tokens // num_seqs, room))
    num_blocks_used = min(num_blocks_each, -(-(prompt_len + 1) // instance.block_size))
    ids = tuple(RequestId(f"warm-up-{index}") for index in range(num_seqs))
    first_blocks = range(0, num_seqs * num_blocks_used, num_blocks_used)
    prefill = StepPlan(
        decode_request_ids=(),
        num_decode_context_tokens=0,
        chunks=tuple(TokenChunk(request_id, prompt_len, 0, True) for request_id in ids),
        new_block_ids=tuple(
            (request_id, tuple(map(BlockId, range(first, first + num_blocks_used))))
            for request_id, first in zip(ids, first_blocks, strict=True)
        ),
    )
    decode = StepPlan(ids, prompt_len * num_seqs, (), ())
    return WarmUp(
        tuple(RequestSpec(request_id, 0, prompt_len, 2, sampling=_SAMPLING) for request_id in ids),
        (prefill, decode) if room >= prompt_len else (prefill,),
    )
