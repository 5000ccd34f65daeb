"""Reference operators against numpy in float64, written as their definitions read."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batches import PagedCache, Sequence

from backends.operators import reference, reference_attention
from backends.operators.reference_experts import experts_at_once, experts_in_groups, experts_in_turn
from backends.operators.registry import REFERENCE, KernelRegistry
from backends.operators.rotary_table import rotary_table
from sagellm.models.rope import LinearScaling, Llama3Scaling, Rope

Array = np.ndarray


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(tensor: torch.Tensor, expected: Array) -> bool:
    return tensor.shape == expected.shape and bool(np.allclose(tensor.double().numpy(), expected, atol=2e-5))


def exact(tensor: torch.Tensor) -> Array:
    return tensor.double().numpy()


def naive_norm(x: Array, weight: Array, epsilon: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight


def naive_silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def naive_rotary(x: Array, positions: Array, theta: float, head_dim: int) -> Array:
    """Pairs (i, i + half) as complex numbers, turned."""
    half = head_dim // 2
    heads = x.reshape(len(x), -1, head_dim)
    angles = positions[:, None] * theta ** (-np.arange(half) / half)
    turned = (heads[..., :half] + 1j * heads[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate((turned.real, turned.imag), -1).reshape(x.shape)


def naive_attention(query: Array, keys: Array, values: Array, group: int, scale: float, first_key: int) -> Array:
    """One row: [num_heads, head_dim] over [num_keys, num_kv_heads, head_dim]."""
    rows = []
    for head, q in enumerate(query):
        scores = keys[first_key:, head // group] @ q * scale
        weights = np.exp(scores - scores.max())
        rows.append(weights / weights.sum() @ values[first_key:, head // group])
    return np.stack(rows)


def test_norms() -> None:
    x, residual, weight = random(5, 24), random(5, 24, seed=1), random(24, seed=2)
    expected = naive_norm(exact(x), exact(weight), 1e-5)
    assert close(reference.rms_norm(x, weight, epsilon=1e-5), expected)
    normed, total = reference.add_rms_norm(x, residual, weight, epsilon=1e-5)
    assert close(total, exact(x) + exact(residual))
    assert close(normed, naive_norm(exact(x) + exact(residual), exact(weight), 1e-5))
    heads = reference.head_rms_norm(x, weight[:8], epsilon=1e-5)
    assert close(heads, naive_norm(exact(x).reshape(5, 3, 8), exact(weight[:8]), 1e-5).reshape(5, 24))
    centred = exact(x) - exact(x).mean(-1, keepdims=True)
    bias = random(24, seed=3)
    layer_normed = naive_norm(centred, exact(weight), 1e-5) + exact(bias)
    assert close(reference.layer_norm(x, weight, bias, epsilon=1e-5), layer_normed)


def test_norms_are_computed_in_float32() -> None:
    """Squares of 300 are beyond float16."""
    x = torch.full((1, 8), 300.0, dtype=torch.float16)
    assert torch.equal(reference.rms_norm(x, torch.ones(8, dtype=torch.float16), epsilon=0.0), torch.ones_like(x))


def test_activations() -> None:
    x = random(5, 12)
    gate, up = np.split(exact(x), 2, axis=1)
    assert close(reference.silu(x), naive_silu(exact(x)))
    assert close(reference.silu_multiply(x), naive_silu(gate) * up)
    assert close(reference.relu(x), np.maximum(exact(x), 0))


@pytest.mark.parametrize("theta", [100.0, 10_000.0])
def test_rotary_turns_pairs_of_elements_by_their_position(theta: float) -> None:
    x, positions = random(6, 24), torch.tensor([0, 1, 5, 5, 30, 99])
    table = rotary_table(Rope(theta), 8, 100, "cpu")
    assert close(reference.rotary(x, positions, table), naive_rotary(exact(x), positions.numpy(), theta, 8))


@pytest.mark.parametrize("scaling", [None, LinearScaling(4.0), Llama3Scaling(8.0, 1.0, 4.0, 64)])
def test_rotary_tables_hold_the_angles_of_the_rope(scaling: LinearScaling | Llama3Scaling | None) -> None:
    rope = Rope(1000.0, scaling)
    angles = np.arange(50)[:, None] * np.array(rope.inverse_frequencies(16))
    table = rotary_table(rope, 16, 50, "cpu")
    assert table.dtype == torch.float32
    assert close(table, np.concatenate((np.cos(angles), np.sin(angles)), -1))


def test_rotary_kv_write_is_its_parts() -> None:
    query, key, value = random(3, 32), random(3, 16, seed=1), random(3, 16, seed=2)
    query_weight, key_weight = random(8, seed=3), random(8, seed=4)
    positions, slots, table = torch.tensor([4, 0, 9]), torch.tensor([7, 2, 0]), rotary_table(Rope(), 8, 10, "cpu")
    for norms in (False, True):
        caches = [torch.full((2, 4, 2, 8), 9.0) for _ in range(2)]
        if norms:
            turned = reference.head_norm_rotary_kv_write(
                query, key, value, positions, query_weight, key_weight, table, *caches, slots, epsilon=1e-6
            )
        else:
            turned = reference.rotary_kv_write(query, key, value, positions, table, *caches, slots)
        normed_query = reference.head_rms_norm(query, query_weight, epsilon=1e-6) if norms else query
        normed_key = reference.head_rms_norm(key, key_weight, epsilon=1e-6) if norms else key
        assert torch.equal(turned, reference.rotary(normed_query, positions, table))
        assert torch.equal(caches[0].view(8, 16)[slots], reference.rotary(normed_key, positions, table))
        assert torch.equal(caches[1].view(8, 16)[slots], value)
        others = [slot for slot in range(8) if slot not in slots]
        assert all((cache.view(8, 16)[others] == 9.0).all() for cache in caches)


@settings(deadline=None, max_examples=60)
@given(
    decodes=st.lists(st.integers(1, 40), max_size=5),
    prefills=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 12)), max_size=3),
    group=st.sampled_from([1, 2, 4]),
    sliding_window=st.sampled_from([0, 1, 3, 16, 64]),
    block_size=st.sampled_from([1, 4, 16]),
)
def test_attention_is_softmax_over_each_rows_own_tokens(
    decodes: list[int], prefills: list[tuple[int, int]], group: int, sliding_window: int, block_size: int
) -> None:
    """What no sequence wrote is not a number, and must not come near a result."""
    contexts = decodes + [before + count for before, count in prefills]
    if not contexts:
        return
    counts = [1] * len(decodes) + [count for _, count in prefills]
    cache = PagedCache(num_layers=1, num_blocks=400, block_size=block_size, num_kv_heads=2, head_dim=4, seed=1)
    sequences = [Sequence([0] * context) for context in contexts]
    keys = [random(context, 2, 4, seed=index) for index, context in enumerate(contexts)]
    values = [random(context, 2, 4, seed=50 + index) for index, context in enumerate(contexts)]
    for sequence, key, value in zip(sequences, keys, values, strict=True):
        inputs = cache.batch([(sequence, sequence.num_left)])
        cache.kv.keys[0].view(-1, 2, 4)[inputs.slot_mapping] = key
        cache.kv.values[0].view(-1, 2, 4)[inputs.slot_mapping] = value
    for sequence, count in zip(sequences, counts, strict=True):
        sequence.num_computed_tokens = len(sequence.token_ids) - count
    inputs = cache.batch(list(zip(sequences, counts, strict=True)))
    query = random(sum(counts), 2 * group * 4, seed=99)
    found = reference.attention(
        query, cache.kv.keys[0], cache.kv.values[0], inputs, scale=0.7, sliding_window=sliding_window
    )
    rows = []
    for index, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        for position in range(context - count, context):
            first_key = max(0, position + 1 - sliding_window) if sliding_window else 0
            seen = exact(keys[index])[: position + 1], exact(values[index])[: position + 1]
            heads = exact(query[len(rows)]).reshape(-1, 4)
            rows.append(naive_attention(heads, *seen, group, 0.7, first_key).reshape(-1))
    assert close(found, np.stack(rows))


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40))
def test_decodes_go_together_while_few_tokens_pad_them(lengths: list[int]) -> None:
    together = reference_attention.rows_together(lengths)
    assert sorted(row for rows in together for row in rows) == list(range(len(lengths)))
    for rows in together:
        longest, shortest = max(lengths[row] for row in rows), min(lengths[row] for row in rows)
        assert len(rows) == 1 or (longest < 2 * shortest and longest * len(rows) <= 2048)


@pytest.mark.parametrize("normalise", [False, True])
def test_experts_are_summed_by_their_shares(normalise: bool) -> None:
    x, logits = random(7, 8), random(7, 5, seed=1)
    logits[:, 2] -= 9  # nobody wants it
    gate_up, down = random(5, 8, 8, seed=2), random(5, 8, 4, seed=3)
    ids, shares = reference.moe_router(logits, experts_per_token=2, normalise=normalise)
    expected = np.zeros((7, 8))
    for token in range(7):
        probabilities = np.exp(exact(logits)[token]) / np.exp(exact(logits)[token]).sum()
        chosen = np.argsort(-probabilities)[:2]
        whole = probabilities[chosen].sum() if normalise else 1.0
        for expert in chosen:
            gate, up = np.split(exact(gate_up)[expert] @ exact(x)[token], 2)
            expected[token] += probabilities[expert] / whole * (exact(down)[expert] @ (naive_silu(gate) * up))
    for experts in (reference.moe_experts, experts_in_turn, experts_at_once, experts_in_groups):
        assert close(experts(x, ids, shares, gate_up, down), expected)


def test_parts_of_an_embedding_add_up_to_the_whole() -> None:
    table, ids = random(10, 4), torch.tensor([0, 3, 4, 9])
    whole = reference.embedding(ids, table)
    parts = [
        reference.embedding(ids, table[:4], sharded=True),
        reference.embedding(ids, table[4:], first_row=-4, sharded=True),
    ]
    assert torch.equal(whole, table[ids])
    assert torch.equal(parts[0] + parts[1], whole)
    assert torch.equal(reference.embedding(ids[:3], table, first_row=2), table[ids[:3] + 2])


def test_kernels_are_the_backends_own_or_the_reference() -> None:
    def silu(x: torch.Tensor) -> torch.Tensor:
        return x

    registry = KernelRegistry()
    registry.register("mine", "silu", silu)
    assert registry.kernel("mine", "silu").run is silu
    assert registry.kernel("other", "silu").run is reference.silu
    assert registry.kernel("mine", "relu") == registry.kernel(REFERENCE, "relu")
    assert registry.has_own("mine", "silu")
    assert not registry.has_own("mine", "relu")
    with pytest.raises(ValueError, match="silu of backend 'mine' has a kernel already"):
        registry.register("mine", "silu", silu)
    with pytest.raises(ValueError, match="'gelu' is none; operators are add, "):
        registry.register("mine", "gelu", silu)
    with pytest.raises(ValueError, match=r"multiply of backend 'mine' takes \['x'\], must take \['x', 'other'\]"):
        registry.register("mine", "multiply", silu)
