"""Inputs of steps over a paged cache, for sequences whose blocks are chosen once, in random order."""

from dataclasses import dataclass

import torch

from backends.step_inputs import KVTensors, StepInputs
from sagellm.models.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence that a step computes, behind ``num_computed_tokens`` that are in the cache."""

    sequence: int
    token_ids: list[int]
    num_computed_tokens: int


class PagedSequences:
    """A cache with room for sequences of up to ``num_tokens_max`` tokens. What was never written is not a number."""

    def __init__(
        self, config: ModelConfig, num_seqs: int, num_tokens_max: int, device: torch.device, block_size: int = 16
    ) -> None:
        blocks_each = -(-num_tokens_max // block_size)
        generator = torch.Generator().manual_seed(0)
        self._tables = torch.randperm(num_seqs * blocks_each, generator=generator).view(num_seqs, blocks_each)
        self._device = device
        shape = (num_seqs * blocks_each, block_size, config.shape.num_kv_heads, config.shape.head_dim)
        dtype, layers = getattr(torch, config.dtype), range(config.shape.num_layers)
        empty = [[torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in layers] for _ in range(2)]
        self.kv = KVTensors(empty[0], empty[1], block_size)

    def inputs(self, chunks: list[Chunk], *, all_rows: bool) -> StepInputs:
        """One step; logits of all rows, or of each chunk's last. Chunks of one token must come first."""
        counts = torch.tensor([len(chunk.token_ids) for chunk in chunks])
        computed = torch.tensor([chunk.num_computed_tokens for chunk in chunks])
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
        rows = torch.arange(len(chunks)).repeat_interleave(counts)
        positions = torch.arange(int(starts[-1])) - starts[rows] + computed[rows]
        tables, block_size = self._tables[[chunk.sequence for chunk in chunks]], self.kv.block_size
        slots = tables[rows, positions // block_size] * block_size + positions % block_size
        contexts = computed + counts
        sampled = torch.arange(int(starts[-1])) if all_rows else starts[1:] - 1
        return StepInputs(
            token_ids=torch.tensor([token for chunk in chunks for token in chunk.token_ids]).to(self._device),
            positions=positions.to(self._device),
            slot_mapping=slots.to(self._device),
            query_starts=starts.to(torch.int32).to(self._device),
            context_lens=contexts.to(torch.int32).to(self._device),
            block_tables=tables.to(torch.int32).to(self._device),
            sampled_rows=sampled.to(self._device),
            num_decodes=int((counts == 1).long().cumprod(0).sum()),
            query_len_max=int(counts.max()),
            context_len_max=int(contexts.max()),
        )
