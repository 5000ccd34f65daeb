"""Every operator of the execution graph in plain torch: the meaning that kernels must keep, on any device.

Activations are [num_tokens, width]; heads lie side by side in the width, so a tensor of queries is
[num_tokens, num_heads * head_dim]. Rows may be strided (a slice of a fused projection's result), elements
of a row are next to each other. No operator changes its inputs, but for the KV cache.

Where ``transformers`` computes in float32 whatever the model's type (norms, softmax, rotary embedding),
so does this; results are rounded to the type of the first argument.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional

from backends.operators.reference_attention import attention
from backends.operators.reference_experts import moe_experts, moe_router

if TYPE_CHECKING:
    from backends.operators.communicator import Communicator

__all__ = [
    "add",
    "add_bias",
    "add_rms_norm",
    "all_gather",
    "all_reduce",
    "attention",
    "embedding",
    "head_norm_rotary_kv_write",
    "head_rms_norm",
    "kv_send",
    "kv_write",
    "layer_norm",
    "linear",
    "moe_experts",
    "moe_router",
    "multiply",
    "relu",
    "rms_norm",
    "rotary",
    "rotary_kv_write",
    "select_rows",
    "silu",
    "silu_multiply",
    "split",
]


def embedding(ids: torch.Tensor, table: torch.Tensor, *, first_row: int = 0, sharded: bool = False) -> torch.Tensor:
    """Row ``id + first_row`` of ``table`` [num_rows, width] for each id: [num_ids, width].

    ``first_row`` may be negative. With ``sharded`` the table is a part of a greater one, and ids whose row
    is not in it give zeros, so that the sum over all parts is the whole table's row.
    """
    rows = ids + first_row if first_row else ids
    if not sharded:
        return functional.embedding(rows, table)
    foreign = (rows < 0) | (rows >= table.shape[0])
    return functional.embedding(rows.masked_fill(foreign, 0), table).masked_fill(foreign.unsqueeze(-1), 0)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, epsilon: float) -> torch.Tensor:
    """Root mean square norm over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight * (wide * scale).to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, epsilon: float) -> torch.Tensor:
    """Layer norm over the last dimension (Ba, Kiros and Hinton 2016, arXiv:1607.06450)."""
    return functional.layer_norm(x, weight.shape, weight, bias, epsilon)


def head_rms_norm(x: torch.Tensor, weight: torch.Tensor, *, epsilon: float) -> torch.Tensor:
    """``rms_norm`` of each head on its own; ``weight`` is [head_dim], ``x`` [num_tokens, num_heads * head_dim]."""
    heads = torch.unflatten(x, -1, (-1, weight.shape[0]))
    return rms_norm(heads, weight, epsilon=epsilon).flatten(-2)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``; ``weight`` is [out_width, in_width]."""
    return functional.linear(x, weight, bias)


def add_bias(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``x + bias`` for every row; ``bias`` is [width]."""
    return x + bias


def rotary(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of each head (Su et al. 2021, arXiv:2104.09864), halves paired.

    ``x`` is [num_tokens, num_heads * head_dim], ``cos_sin`` a float32 table [num_positions, head_dim]:
    head_dim / 2 cosines, then as many sines (``backends.operators.rotary_table``).
    """
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    return _rotated(x, cos, sin)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = torch.unflatten(x, -1, (-1, 2 * cos.shape[-1])).float().chunk(2, dim=-1)
    turned = torch.cat(
        (torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)), dim=-1
    )
    return turned.to(x.dtype).flatten(-2)


def kv_write(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Put each token's K and V ([num_tokens, num_kv_heads * head_dim]) into its slot of the paged cache.

    The caches are [num_blocks, block_size, num_kv_heads, head_dim]; a slot is block_id * block_size + offset.
    """
    width = key.shape[1]
    key_cache.view(-1, width).index_copy_(0, slot_mapping, key.to(key_cache.dtype))
    value_cache.view(-1, width).index_copy_(0, slot_mapping, value.to(value_cache.dtype))


def kv_send(key_cache: torch.Tensor, value_cache: torch.Tensor, slots: torch.Tensor, staging: torch.Tensor) -> None:
    """Copy K and V of these slots, in their order, to ``staging`` [2, num_slots or more, num_kv_heads, head_dim].

    ``staging`` may be on another device, or page-locked memory of the host, for which the host does not wait.
    """
    for cache, room in zip((key_cache, value_cache), staging, strict=True):
        found = cache.view(-1, *cache.shape[2:]).index_select(0, slots)
        room[: slots.shape[0]].copy_(found, non_blocking=True)


def rotary_kv_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """``rotary`` of queries and keys, then ``kv_write``: the turned queries."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    kv_write(_rotated(key, cos, sin), value, key_cache, value_cache, slot_mapping)
    return _rotated(query, cos, sin)


def head_norm_rotary_kv_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    epsilon: float,
) -> torch.Tensor:
    """``head_rms_norm`` of queries and keys, then ``rotary_kv_write``: the turned queries."""
    query = head_rms_norm(query, query_weight, epsilon=epsilon)
    key = head_rms_norm(key, key_weight, epsilon=epsilon)
    return rotary_kv_write(query, key, value, positions, cos_sin, key_cache, value_cache, slot_mapping)


def add(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return x + other


def multiply(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return x * other


def silu(x: torch.Tensor) -> torch.Tensor:
    """``x * sigmoid(x)``."""
    return functional.silu(x)


def relu(x: torch.Tensor) -> torch.Tensor:
    """``max(x, 0)``."""
    return functional.relu(x)


def silu_multiply(x: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of a joined projection's result [num_tokens, 2 * width], the gate's columns first."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of ``x + residual``, and that sum."""
    total = x + residual
    return rms_norm(total, weight, epsilon=epsilon), total


def select_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of ``x`` with these indexes: [len(rows), width]."""
    return x.index_select(0, rows)


def split(x: torch.Tensor, *, widths: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Views of ``x`` cut along its width."""
    return torch.split(x, list(widths), dim=-1)


def all_reduce(x: torch.Tensor, communicator: "Communicator") -> torch.Tensor:
    """The sum of all ranks' tensors."""
    return communicator.all_reduce(x)


def all_gather(x: torch.Tensor, communicator: "Communicator", *, width: int) -> torch.Tensor:
    """All ranks' tensors side by side, cut to ``width`` columns (the last rank's may be padded)."""
    return communicator.all_gather(x)[..., :width]
