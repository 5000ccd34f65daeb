"""Sequences over a paged cache, and the batches that compute them."""

import random
from dataclasses import dataclass, field

import torch

from backends.step_inputs import KVTensors, StepInputs


@dataclass(slots=True)
class Sequence:
    """Tokens of which some are computed, and the blocks that hold their KV."""

    token_ids: list[int]
    block_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0

    @property
    def num_left(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens


class PagedCache:
    """Free blocks in random order. What was never written is not a number."""

    def __init__(
        self, *, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, seed: int
    ) -> None:
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        self.kv = KVTensors(
            [torch.full(shape, float("nan")) for _ in range(num_layers)],
            [torch.full(shape, float("nan")) for _ in range(num_layers)],
            block_size,
        )
        self._free = random.Random(seed).sample(range(num_blocks), num_blocks)

    def batch(self, chunks: list[tuple[Sequence, int]]) -> StepInputs:
        """Inputs that compute so many more tokens of each sequence, all rows sampled; decodes must come first."""
        for sequence, num_tokens in chunks:
            self._grow(sequence, sequence.num_computed_tokens + num_tokens)
        block_size = self.kv.block_size
        ids, positions, slots, starts = [], [], [], [0]
        for sequence, num_tokens in chunks:
            for position in range(sequence.num_computed_tokens, sequence.num_computed_tokens + num_tokens):
                ids.append(sequence.token_ids[position])
                positions.append(position)
                slots.append(sequence.block_ids[position // block_size] * block_size + position % block_size)
            starts.append(len(ids))
        contexts = [sequence.num_computed_tokens + num_tokens for sequence, num_tokens in chunks]
        tables = torch.zeros(len(chunks), max(len(sequence.block_ids) for sequence, _ in chunks), dtype=torch.int32)
        for index, (sequence, _) in enumerate(chunks):
            tables[index, : len(sequence.block_ids)] = torch.tensor(sequence.block_ids)
        return StepInputs(
            token_ids=torch.tensor(ids),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=tables,
            sampled_rows=torch.arange(len(ids)),
            num_decodes=next((i for i, (_, count) in enumerate(chunks) if count != 1), len(chunks)),
            query_len_max=max(count for _, count in chunks),
            context_len_max=max(contexts),
        )

    def _grow(self, sequence: Sequence, num_tokens: int) -> None:
        while len(sequence.block_ids) * self.kv.block_size < num_tokens:
            sequence.block_ids.append(self._free.pop())
