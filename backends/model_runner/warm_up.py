"""Steps that a model runs before it serves: they compile, tune and allocate what the first real ones would wait for."""

from dataclasses import dataclass

from backends.model_runner.sampler.draw_plan import FEW_CANDIDATES_MAX
from sagellm.core.config import InstanceConfig
from sagellm.core.identity import BlockId, RequestId
from sagellm.core.plan import StepPlan, TokenChunk
from sagellm.core.request import RequestSpec
from sagellm.core.sampling import GREEDY, SamplingParameters

_SAMPLING = SamplingParameters(temperature=1.0, top_p=0.9)  # the kind that takes most memory
# A kernel may be compiled for each combination of cut-offs in a batch.
_CUTOFFS = tuple(
    SamplingParameters(top_k=top_k, top_p=top_p, min_p=min_p)
    for top_k in (0, 20)
    for top_p in (1.0, 0.9)
    for min_p in (0.0, 0.1)
)
_WISHES = (
    GREEDY,
    *_CUTOFFS,
    SamplingParameters(top_k=FEW_CANDIDATES_MAX + 1),
    SamplingParameters(repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1),
    SamplingParameters(temperature=0.0, num_logprobs=5),
    SamplingParameters(logit_bias=((0, 1.0),), bad_words=((1,), (0, 1))),
    SamplingParameters(allowed_token_ids=(0, 1)),
)
_NUM_SEQS_SMALL = 2
_NUM_TOKENS_SMALL = 8
_NUM_TOKENS_LEAST = 16  # of contexts and prompts that double from step to step
# Kernels tell arrays that begin at a multiple of 16 bytes, as the fifth of a row of int32 does, from others.
_NUMS_MIXED_DECODES = (1, 4)
_NUM_STEPS_MIXED = len(_NUMS_MIXED_DECODES) + 1


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Requests, and steps that run them in this order, with nobody else."""

    requests: tuple[RequestSpec, ...]
    plans: tuple[StepPlan, ...]


def small_steps(instance: InstanceConfig, num_positions: int) -> tuple[WarmUp, ...]:
    """Just enough to have run everything once."""
    num_seqs = min(_NUM_SEQS_SMALL, _num_seqs_max(instance))
    return (_steps(instance, num_positions, num_seqs, _NUM_TOKENS_SMALL, _SAMPLING),)


def steps_of_serving(instance: InstanceConfig, num_positions: int) -> tuple[WarmUp, ...]:
    """What serving will meet: first the steps that take most memory, then all kinds of sampling, prompts and batches.

    Sizes double: kernels are chosen and compiled by magnitudes, by what divides a size, and by nothing else.
    """
    num_seqs_max = _num_seqs_max(instance)
    largest = _steps(instance, num_positions, num_seqs_max, instance.max_num_batched_tokens, _SAMPLING)
    drawing = [
        _steps(instance, num_positions, num_seqs, _NUM_TOKENS_SMALL, wishes)
        for wishes in _WISHES
        for num_seqs in sorted({1, num_seqs_max})
    ]
    prompt_len_max = min(instance.max_num_batched_tokens, num_positions) - 1
    prompts = [
        _steps(instance, num_positions, 1, prompt_len, GREEDY) for prompt_len in _doubling(prompt_len_max, spare=0)
    ]
    contexts = _doubling(num_positions, spare=_NUM_STEPS_MIXED)
    mixed = [_mixed_steps(instance, context_len) for context_len in contexts] if num_seqs_max > 1 else []
    return (largest, _longest(instance, num_positions), *drawing, *prompts, *mixed)


def _longest(instance: InstanceConfig, num_positions: int) -> WarmUp:
    """The end of the longest prompt, in as large a chunk as there can be: some attention takes memory for both."""
    prompt_len = max(1, num_positions - 1)
    chunk_len = min(instance.max_num_batched_tokens, prompt_len)
    request_id = RequestId("warm-up-longest")
    block_ids = tuple(map(BlockId, range(-(-prompt_len // instance.block_size))))
    plan = StepPlan(
        decode_request_ids=(),
        num_decode_context_tokens=0,
        chunks=(TokenChunk(request_id, chunk_len, prompt_len - chunk_len, True),),
        new_block_ids=((request_id, block_ids),),
    )
    return WarmUp((RequestSpec(request_id, 0, prompt_len, 1, sampling=GREEDY),), (plan,))


def _num_seqs_max(instance: InstanceConfig) -> int:
    return min(instance.max_num_seqs, instance.num_blocks)


def _doubling(count_max: int, spare: int) -> list[int]:
    """Powers of two up to ``count_max``, each less what is to be kept free."""
    counts: list[int] = []
    while (count := _NUM_TOKENS_LEAST << len(counts)) <= count_max:
        counts.append(count - spare)
    return counts


def _mixed_steps(instance: InstanceConfig, context_len: int) -> WarmUp:
    """Some decode, with that many tokens of context or a few more, while another one's prompt is computed.

    All have the same blocks: what they compute is nothing that anybody reads.
    """
    nums_decodes = sorted({min(number, _num_seqs_max(instance) - 1) for number in _NUMS_MIXED_DECODES})
    ids = tuple(RequestId(f"warm-up-{index}") for index in range(nums_decodes[-1]))
    prompt_ids = tuple(RequestId(f"warm-up-prompt-{index}") for index in range(len(nums_decodes)))
    needed = -(-(context_len + _NUM_STEPS_MIXED) // instance.block_size)
    block_ids = tuple(map(BlockId, range(needed)))
    ends = StepPlan(
        decode_request_ids=(),
        num_decode_context_tokens=0,
        chunks=tuple(TokenChunk(request_id, 1, context_len - 1, True) for request_id in ids),
        new_block_ids=tuple((request_id, block_ids) for request_id in ids),
    )
    prompt_len = min(_NUM_TOKENS_SMALL, context_len)
    mixed = [
        StepPlan(
            decode_request_ids=ids[:num_decodes],
            num_decode_context_tokens=num_decodes * context_len,
            chunks=(TokenChunk(prompt_id, prompt_len, 0, True),),
            new_block_ids=((prompt_id, block_ids[: -(-prompt_len // instance.block_size)]),),
        )
        for num_decodes, prompt_id in zip(nums_decodes, prompt_ids, strict=True)
    ]
    requests = [RequestSpec(request_id, 0, context_len, _NUM_STEPS_MIXED, sampling=GREEDY) for request_id in ids]
    requests += [RequestSpec(request_id, 0, prompt_len, 1, sampling=GREEDY) for request_id in prompt_ids]
    return WarmUp(tuple(requests), (ends, *mixed))


def _steps(
    instance: InstanceConfig, num_positions: int, num_seqs: int, num_tokens: int, sampling: SamplingParameters
) -> WarmUp:
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
        tuple(RequestSpec(request_id, 0, prompt_len, 2, sampling=sampling) for request_id in ids),
        (prefill, decode) if room >= prompt_len else (prefill,),
    )
