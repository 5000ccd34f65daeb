"""Every operator once more, in float64 on the CPU and in the plainest way: what results are compared with.

Meant to be read against the papers, not to be fast; nothing is shared with the operators under test.
"""

import math

import torch

from backends.step_inputs import StepInputs


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    product = x.double() @ weight.double().T
    return product if bias is None else product + bias.double()


def embedding(ids: torch.Tensor, table: torch.Tensor, *, first_row: int = 0, sharded: bool = False) -> torch.Tensor:
    rows = []
    for row in (ids + first_row).tolist():
        is_there = 0 <= row < table.shape[0]
        rows.append(table[row].double() if is_there or not sharded else torch.zeros(table.shape[1]).double())
    return torch.stack(rows)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, epsilon: float) -> torch.Tensor:
    x = x.double()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight.double()


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, epsilon: float) -> torch.Tensor:
    x = x.double() - x.double().mean(-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight.double() + bias.double()


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x.double() + residual.double()
    return rms_norm(total, weight, epsilon=epsilon), total


def head_rms_norm(x: torch.Tensor, weight: torch.Tensor, *, epsilon: float) -> torch.Tensor:
    heads = x.double().reshape(x.shape[0], -1, weight.shape[0])
    return rms_norm(heads, weight, epsilon=epsilon).reshape(x.shape)


def silu_multiply(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.double().chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def rotary(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    half = cos_sin.shape[1] // 2
    heads = x.double().reshape(x.shape[0], -1, 2 * half)
    turns = torch.complex(cos_sin[positions, None, :half].double(), cos_sin[positions, None, half:].double())
    turned = torch.complex(heads[..., :half], heads[..., half:]) * turns
    return torch.cat((turned.real, turned.imag), dim=-1).reshape(x.shape)


def kv_write(
    key: torch.Tensor, value: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The caches, in float64, as they are to be afterwards."""
    caches = key_cache.double().clone(), value_cache.double().clone()
    for row, slot in enumerate(slots.tolist()):
        block, offset = divmod(slot, key_cache.shape[1])
        for cache, written in zip(caches, (key, value), strict=True):
            cache[block, offset] = written[row].double().reshape(cache.shape[2:])
    return caches


def moe_router(logits: torch.Tensor, *, experts_per_token: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    exponentials = torch.exp(logits.double() - logits.double().amax(-1, keepdim=True))
    shares = exponentials / exponentials.sum(-1, keepdim=True)
    ids = torch.argsort(shares, dim=-1, descending=True, stable=True)[:, :experts_per_token]
    shares = shares.gather(1, ids)
    return ids, shares / shares.sum(-1, keepdim=True) if normalise else shares


def moe_experts(
    x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    result = torch.zeros(x.shape, dtype=torch.float64)
    for row in range(x.shape[0]):
        for place, expert in enumerate(ids[row].tolist()):
            hidden = silu_multiply(linear(x[row : row + 1], gate_up[expert]))
            result[row] += shares[row, place].double() * linear(hidden, down[expert])[0]
    return result


def attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    inputs: StepInputs,
    *,
    scale: float,
    sliding_window: int = 0,
) -> torch.Tensor:
    """Sequence by sequence: gather its keys in order, one softmax for each row and head over what the row sees."""
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    result = torch.zeros(query.shape, dtype=torch.float64)
    starts, context_lens = inputs.query_starts.tolist(), inputs.context_lens.tolist()
    for sequence, context_len in enumerate(context_lens):
        rows = slice(starts[sequence], starts[sequence + 1])
        blocks = inputs.block_tables[sequence, : math.ceil(context_len / block_size)].long()
        keys = key_cache[blocks].reshape(-1, num_kv_heads, head_dim)[:context_len].double()
        values = value_cache[blocks].reshape(-1, num_kv_heads, head_dim)[:context_len].double()
        heads = query[rows].double().reshape(rows.stop - rows.start, num_kv_heads, -1, head_dim)
        scores = torch.einsum("rkgd,ckd->rkgc", heads, keys) * scale
        distance = inputs.positions[rows, None] - torch.arange(context_len)[None, :]
        hidden = distance < 0 if sliding_window == 0 else (distance < 0) | (distance >= sliding_window)
        weights = torch.softmax(scores.masked_fill(hidden[:, None, None, :], -math.inf), dim=-1)
        result[rows] = torch.einsum("rkgc,ckd->rkgd", weights, values).reshape(rows.stop - rows.start, -1)
    return result
