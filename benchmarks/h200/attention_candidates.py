"""Attention by the backend's own kernels and by torch's, each behind one call on a set of buffers.

torch's kernels know no paged cache of small blocks (its flash kernel wants pages of 256 tokens). They are timed with
K and V gathered from the cache inside the timed region (*gathered*), and, for whole prompts, on the K and V that
the projection has just made (*contiguous*). SDPA and the cuDNN kernels align causality to the first key, so they
cannot do a chunk of a longer context; the variable-length flash kernel aligns it to the last key, and can.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.h200.attention_cases import BLOCK_SIZE, AttentionBatch, Buffers

Run = Callable[[Buffers], torch.Tensor | list[torch.Tensor]]


class NotOfferedError(Exception):
    """The candidate cannot do this case; the message says why."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """``run`` gives rows of heads, [num_tokens, num_heads, head_dim] once joined; ``plan_us`` is the host's."""

    run: Run
    plan_us: float | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    name: str
    prepare: Callable[[AttentionBatch], Prepared]


def torch_candidates() -> list[Candidate]:
    """The likely winners first."""
    return [
        Candidate("ours", prepare_ours),
        Candidate("cudnn, contiguous", lambda batch: prepare_sdpa(batch, SDPBackend.CUDNN_ATTENTION, False)),
        Candidate("cudnn, gathered", lambda batch: prepare_sdpa(batch, SDPBackend.CUDNN_ATTENTION, True)),
        Candidate("cudnn varlen, contiguous", lambda batch: prepare_cudnn_varlen(batch, False)),
        Candidate("cudnn varlen, gathered", lambda batch: prepare_cudnn_varlen(batch, True)),
        Candidate("flash varlen, gathered", lambda batch: prepare_flash_varlen(batch, True)),
        Candidate("flash varlen, contiguous", lambda batch: prepare_flash_varlen(batch, False)),
        Candidate("flash, contiguous", lambda batch: prepare_sdpa(batch, SDPBackend.FLASH_ATTENTION, False)),
        Candidate("flash, gathered", lambda batch: prepare_sdpa(batch, SDPBackend.FLASH_ATTENTION, True)),
    ]


def flex_candidates() -> list[Candidate]:
    """Apart, since each shape is compiled for seconds."""
    return [Candidate("flex, contiguous", prepare_flex)]


def prepare_ours(batch: AttentionBatch) -> Prepared:
    """How rows and keys are shared out is worked out before, as it is once for all layers of a step."""
    from backends.cuda.kernels.paged_attention import attention, prepare_attention

    step = prepare_attention(batch.inputs, block_size=BLOCK_SIZE)

    def run(buffers: Buffers) -> torch.Tensor:
        caches = (buffers.key_cache, buffers.value_cache)
        flat = attention(buffers.query.flatten(1), *caches, step, scale=batch.scale)
        return flat.view(buffers.query.shape)

    return Prepared(run)


def prepare_sdpa(batch: AttentionBatch, backend: SDPBackend, is_gathered: bool) -> Prepared:
    """One call per prompt, or one for all decodes if their contexts are equal."""
    case = batch.case
    if not is_gathered:
        require_prompts(batch)
    if case.has_only_decodes:
        return Prepared(sdpa_of_decodes(batch, backend))
    if not case.has_only_prompts:
        raise NotOfferedError("its causal mask is aligned to the first key")
    lengths = [rows for rows, _ in case.sequences]

    def run(buffers: Buffers) -> list[torch.Tensor]:
        keys, values = keys_and_values(batch, buffers, is_gathered)
        prompts = zip(*(part.split(lengths) for part in (buffers.query, keys, values)), strict=True)
        with sdpa_kernel(backend):
            return [sdpa(*(part.unsqueeze(0) for part in prompt), batch.scale, True)[0] for prompt in prompts]

    return Prepared(run)


def sdpa_of_decodes(batch: AttentionBatch, backend: SDPBackend) -> Run:
    lengths = {context_len for _, context_len in batch.case.sequences}
    if len(lengths) > 1:
        raise NotOfferedError("contexts of decodes differ in length")
    shape = (len(batch.case.sequences), *lengths)

    def run(buffers: Buffers) -> torch.Tensor:
        keys, values = (part.unflatten(0, shape) for part in keys_and_values(batch, buffers, True))
        with sdpa_kernel(backend):
            return sdpa(buffers.query.unsqueeze(1), keys, values, batch.scale, False).squeeze(1)

    return run


def sdpa(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, is_causal: bool) -> torch.Tensor:
    """Attention of [num_seqs, num_rows, num_heads, head_dim], result likewise."""
    heads_first = (part.transpose(1, 2) for part in (query, keys, values))
    attended = functional.scaled_dot_product_attention(*heads_first, is_causal=is_causal, scale=scale, enable_gqa=True)
    return attended.transpose(1, 2)


def prepare_flash_varlen(batch: AttentionBatch, is_gathered: bool) -> Prepared:
    if not is_gathered:
        require_prompts(batch)
    inputs = batch.inputs
    limits = (inputs.query_starts, batch.key_starts, inputs.query_len_max, inputs.context_len_max)

    def run(buffers: Buffers) -> torch.Tensor:
        keys, values = keys_and_values(batch, buffers, is_gathered)
        return torch.ops.aten._flash_attention_forward(
            buffers.query, keys, values, *limits, 0.0, True, False, scale=batch.scale
        )[0]

    return Prepared(run)


def prepare_cudnn_varlen(batch: AttentionBatch, is_gathered: bool) -> Prepared:
    if not is_gathered:
        require_prompts(batch)
    if not (batch.case.has_only_prompts or batch.case.has_only_decodes):
        raise NotOfferedError("its causal mask is aligned to the first key")
    inputs = batch.inputs
    limits = (inputs.query_starts, batch.key_starts, inputs.query_len_max, inputs.context_len_max)
    is_causal = batch.case.has_only_prompts

    def run(buffers: Buffers) -> torch.Tensor:
        keys, values = keys_and_values(batch, buffers, is_gathered)
        return torch.ops.aten._cudnn_attention_forward(
            buffers.query, keys, values, None, *limits, False, 0.0, is_causal, False, scale=batch.scale
        )[0]

    return Prepared(run)


def prepare_flex(batch: AttentionBatch) -> Prepared:
    """One prompt only: compiled with torch's defaults, its block mask made once for the shape."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    require_prompts(batch)
    if len(batch.case.sequences) > 1:
        raise NotOfferedError("measured for one prompt only")
    length, device = batch.case.num_tokens, batch.buffers[0].query.device
    mask = create_block_mask(lambda _batch, _head, row, key: row >= key, None, None, length, length, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(buffers: Buffers) -> torch.Tensor:
        parts = (part.transpose(0, 1).unsqueeze(0) for part in (buffers.query, buffers.keys, buffers.values))
        return compiled(*parts, block_mask=mask, scale=batch.scale, enable_gqa=True)[0].transpose(0, 1)

    return Prepared(run)


def require_prompts(batch: AttentionBatch) -> None:
    if not batch.case.has_only_prompts:
        raise NotOfferedError("older keys are in the cache only")


def keys_and_values(batch: AttentionBatch, buffers: Buffers, is_gathered: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if is_gathered:
        return batch.gather.of(buffers.key_cache), batch.gather.of(buffers.value_cache)
    return buffers.keys, buffers.values
