"""One step's inputs as tensors, and what turns them into logits."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class StepInputs:
    """A batch of sequences, prefill and decode alike, flattened token by token.

    Sequence i's tokens are rows ``query_starts[i] : query_starts[i + 1]``; it has ``context_lens[i]``
    tokens of KV once this step's are written, so its first row's position is ``context_lens[i]`` less its
    number of rows. Decodes (one row each) come first, as in the plan.
    """

    token_ids: "torch.Tensor"  # [num_tokens] int64
    positions: "torch.Tensor"  # [num_tokens] int64
    slot_mapping: "torch.Tensor"  # [num_tokens] int64: block_id * block_size + offset, where K and V go
    query_starts: "torch.Tensor"  # [num_seqs + 1] int32
    context_lens: "torch.Tensor"  # [num_seqs] int32
    block_tables: "torch.Tensor"  # [num_seqs, num_blocks_max] int32
    sampled_rows: "torch.Tensor"  # [num_sampled] int64, rising: rows whose logits are wanted
    num_decodes: int  # sequences of one row at the front
    query_len_max: int
    context_len_max: int
    decode_count: "torch.Tensor | None" = None
    """[1] int32, in captured steps with prompts: how many of the ``num_decodes`` sequences have a row. The others, and
    prompts that there are not, have a context of 0 tokens; rows beyond the last prompt's are nobody's."""

    @property
    def samples_all_rows(self) -> bool:
        return self.sampled_rows.shape[0] == self.positions.shape[0]


def sampled_inputs(inputs: StepInputs) -> StepInputs:
    """The same step for its sampled rows alone: each is a sequence with one row, which sees what is before it."""
    import torch

    rows = inputs.sampled_rows
    num_rows = rows.shape[0]
    # Whose row it is: as many sequences end at or before it.
    sequences = torch.searchsorted(inputs.query_starts[1:], rows.to(torch.int32), right=True)
    positions = inputs.positions.index_select(0, rows)
    numbers = torch.arange(num_rows + 1, dtype=torch.int32, device=rows.device)
    return StepInputs(
        token_ids=inputs.token_ids.index_select(0, rows),
        positions=positions,
        slot_mapping=inputs.slot_mapping.index_select(0, rows),
        query_starts=numbers,
        context_lens=(positions + 1).to(torch.int32),
        block_tables=inputs.block_tables.index_select(0, sequences),
        sampled_rows=numbers[:num_rows].to(torch.int64),
        num_decodes=num_rows,
        query_len_max=1,
        context_len_max=inputs.context_len_max,
    )


@dataclass(slots=True)
class KVTensors:
    """The paged KV cache of one rank.

    ``keys[layer]`` and ``values[layer]`` are [num_blocks, block_size, num_kv_heads, head_dim].
    """

    keys: "list[torch.Tensor]"
    values: "list[torch.Tensor]"
    block_size: int


class ModelProgram(Protocol):
    """A model's execution graph, lowered for one device."""

    vocab_size: int

    def run(self, inputs: StepInputs, kv: KVTensors) -> "torch.Tensor":
        """Write this step's K and V into the cache; logits [num_sampled, vocab_size] in float32."""


@runtime_checkable
class SplitProgram(ModelProgram, Protocol):
    """One that also runs in two parts."""

    def all_rows(self, inputs: StepInputs, kv: KVTensors) -> "tuple[torch.Tensor, ...]":
        """Write this step's K and V into the cache; what logits are made from, each [num_tokens, some width]."""

    def logits(self, hidden: "tuple[torch.Tensor, ...]", inputs: StepInputs, kv: KVTensors) -> "torch.Tensor":
        """From what ``all_rows`` gave, of the sampled rows: [num_sampled, vocab_size] in the model's type."""
