"""Runs execution graphs with numpy in float64, all ranks in step: the meaning that passes must keep."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sagellm.runtime.execution_graph import expert_operators as moe
from sagellm.runtime.execution_graph import fused_operators as fused
from sagellm.runtime.execution_graph import operators as ops
from sagellm.runtime.execution_graph.ir import ExecutionGraph, Node
from sagellm.runtime.execution_graph.tensors import WeightSpec

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Batch:
    """Rows of some sequences. Sequence i has ``context_lens[i]`` tokens, of which the last ``num_rows[i]`` are here."""

    num_rows: list[int]
    context_lens: list[int]
    token_ids: Array
    sampled_rows: Array

    @property
    def positions(self) -> Array:
        counts = zip(self.num_rows, self.context_lens, strict=True)
        return np.concatenate([np.arange(length - rows, length) for rows, length in counts])

    def rows_of(self, seq: int) -> slice:
        start = sum(self.num_rows[:seq])
        return slice(start, start + self.num_rows[seq])


@dataclass
class Run:
    """What came out, by rank."""

    outputs: list[dict[str, Array]]
    caches: list[dict[int, list[Array]]]  # by layer: for each sequence [context_len, keys and values side by side]


@dataclass
class _Rank:
    rank: int
    tp: int
    batch: Batch
    seed: int
    values: dict[str, Array] = field(default_factory=dict)
    cache: dict[int, list[Array]] = field(default_factory=dict)

    def layer_cache(self, layer: int, width: int) -> list[Array]:
        """KV of a layer; what earlier steps wrote is made up, and alike for all graphs of equal ``seed``."""
        if layer not in self.cache:
            made_up = np.random.default_rng((self.seed, layer, self.rank))
            self.cache[layer] = [made_up.normal(size=(length, 2 * width)) for length in self.batch.context_lens]
        return self.cache[layer]


def run(
    graph: ExecutionGraph,
    batch: Batch,
    checkpoint: Callable[[str, tuple[int, ...]], Array],
    seed: int = 0,
    before_node: Callable[[Node], None] = lambda node: None,
) -> Run:
    """Runs nodes in the graph's order. ``checkpoint`` gives the tensor of a name and shape."""
    ranks = [_Rank(rank, graph.tp, batch, seed) for rank in range(graph.tp)]
    for state in ranks:
        state.values |= {"token_ids": batch.token_ids, "positions": batch.positions, "sampled_rows": batch.sampled_rows}
        state.values |= {spec.name: make_weight(spec, checkpoint, state.rank, graph.tp) for spec in graph.weights}
    for node in graph.nodes:
        before_node(node)
        inputs = [[state.values[name] for name in node.inputs] for state in ranks]
        if isinstance(node.operator, ops.AllReduce):
            outputs = [(sum(one[0] for one in inputs),)] * graph.tp
        elif isinstance(node.operator, ops.AllGather):
            joined = np.concatenate([one[0] for one in inputs], axis=1)[:, : node.operator.width]
            outputs = [(joined,)] * graph.tp
        else:
            outputs = [_execute(node, state, *one) for state, one in zip(ranks, inputs, strict=True)]
        for state, produced in zip(ranks, outputs, strict=True):
            state.values.update(zip(node.outputs, produced, strict=True))
    return Run(
        [{name: state.values[name] for name in graph.outputs} for state in ranks], [state.cache for state in ranks]
    )


def make_weight(spec: WeightSpec, checkpoint: Callable[[str, tuple[int, ...]], Array], rank: int, tp: int) -> Array:
    parts = []
    for source in spec.sources:
        dim, first, end = source.range_of(rank, tp)
        part = np.zeros(source.rank_shape)
        held = [slice(None)] * len(source.shape)
        held[dim] = slice(0, end - first)
        taken = [slice(None)] * len(source.shape)
        taken[dim] = slice(first, end)
        part[tuple(held)] = checkpoint(source.name, source.shape)[tuple(taken)]
        parts.append(part)
    return np.concatenate(parts).reshape(spec.shape)


def _execute(node: Node, state: _Rank, *inputs: Array) -> tuple[Array, ...]:
    match node.operator:
        case ops.Add() | ops.AddBias():
            return (inputs[0] + inputs[1],)
        case ops.Multiply():
            return (inputs[0] * inputs[1],)
        case ops.Silu():
            return (_silu(inputs[0]),)
        case ops.Relu():
            return (np.maximum(inputs[0], 0),)
        case ops.Split(widths):
            return tuple(np.split(inputs[0], np.cumsum(widths)[:-1], axis=1))
        case ops.SelectRows():
            return (inputs[0][inputs[1]],)
        case ops.Embedding():
            return (_embedding(node.operator, state, *inputs),)
        case ops.Linear():
            return (inputs[0] @ inputs[1].T + (inputs[2] if len(inputs) == 3 else 0),)
        case ops.RmsNorm(eps):
            return (_rms_norm(inputs[0], inputs[1], eps),)
        case ops.LayerNorm(eps):
            centred = inputs[0] - inputs[0].mean(1, keepdims=True)
            return (_rms_norm(centred, inputs[1], eps) + inputs[2],)
        case ops.HeadRmsNorm(head_dim, eps):
            return (_head_norm(inputs[0], inputs[1], head_dim, eps),)
        case ops.Rotary(head_dim, rope):
            return (_rotate(inputs[0], inputs[1], head_dim, rope),)
        case ops.KVWrite():
            return _write(node, state, *inputs)
        case ops.Attention():
            return (_attention(node.operator, state, _of_layer(node), inputs[0]),)
        case ops.KVSend():
            return ()
        case moe.RouteToExperts(count, normalise):
            return _route(inputs[0], count, normalise)
        case moe.Experts():
            return (_experts(*inputs),)
        case fused.AddRmsNorm(eps):
            total = inputs[0] + inputs[1]
            return (_rms_norm(total, inputs[2], eps), total)
        case fused.SiluMultiply():
            gate, up = np.split(inputs[0], 2, axis=1)
            return (_silu(gate) * up,)
        case fused.RotaryKVWrite(head_dim, rope):
            q, k, v, positions = inputs
            _write(node, state, _rotate(k, positions, head_dim, rope), v)
            return (_rotate(q, positions, head_dim, rope),)
        case fused.HeadNormRotaryKVWrite(head_dim, rope, eps):
            q, k, v, positions, q_weight, k_weight = inputs
            _write(node, state, _rotate(_head_norm(k, k_weight, head_dim, eps), positions, head_dim, rope), v)
            return (_rotate(_head_norm(q, q_weight, head_dim, eps), positions, head_dim, rope),)
    raise AssertionError(f"no meaning for {node.operator}")


def _of_layer(node: Node) -> int:
    assert node.layer is not None
    return node.layer


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def _rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _head_norm(x: Array, weight: Array, head_dim: int, eps: float) -> Array:
    return _rms_norm(x.reshape(len(x), -1, head_dim), weight, eps).reshape(x.shape)


def _rotate(x: Array, positions: Array, head_dim: int, rope: ops.Rope) -> Array:
    angles = positions[:, None] * np.array(rope.inverse_frequencies(head_dim))
    cos, sin = (rope.attention_factor * f(angles)[:, None, :] for f in (np.cos, np.sin))
    low, high = np.split(x.reshape(len(x), -1, head_dim), 2, axis=2)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=2).reshape(x.shape)


def _embedding(operator: ops.Embedding, state: _Rank, ids: Array, table: Array) -> Array:
    rows = ids + operator.first_row
    if not operator.sharded:
        return table[rows]
    here = rows - state.rank * len(table)
    mine = (here >= 0) & (here < len(table))
    return np.where(mine[:, None], table[np.where(mine, here, 0)], 0.0)


def _write(node: Node, state: _Rank, keys: Array, values: Array) -> tuple[()]:
    cache = state.layer_cache(_of_layer(node), keys.shape[1])
    written = np.concatenate([keys, values], axis=1)
    for seq, entries in enumerate(cache):
        rows = written[state.batch.rows_of(seq)]
        entries[len(entries) - len(rows) :] = rows
    return ()


def _attention(operator: ops.Attention, state: _Rank, layer: int, q: Array) -> Array:
    width = operator.num_kv_heads * operator.head_dim
    group = operator.num_heads // operator.num_kv_heads
    output = np.empty_like(q)
    for seq, entries in enumerate(state.layer_cache(layer, width)):
        keys, values = (part.reshape(len(entries), -1, operator.head_dim) for part in np.split(entries, 2, axis=1))
        keys, values = keys.repeat(group, axis=1), values.repeat(group, axis=1)
        rows = state.batch.rows_of(seq)
        position = np.arange(len(entries) - state.batch.num_rows[seq], len(entries))[:, None]
        seen = np.arange(len(entries))[None, :] <= position
        if operator.sliding_window:
            seen &= np.arange(len(entries))[None, :] > position - operator.sliding_window
        queries = q[rows].reshape(-1, operator.num_heads, operator.head_dim)
        scores = np.einsum("qhd,khd->hqk", queries, keys) * operator.scale
        scores = np.where(seen[None], scores, -np.inf)
        weights = np.exp(scores - scores.max(2, keepdims=True))
        weights /= weights.sum(2, keepdims=True)
        output[rows] = np.einsum("hqk,khd->qhd", weights, values).reshape(-1, q.shape[1])
    return output


def _route(scores: Array, count: int, normalise: bool) -> tuple[Array, Array]:
    shares = np.exp(scores - scores.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    ids = np.argsort(-shares, axis=1, kind="stable")[:, :count]
    chosen = np.take_along_axis(shares, ids, 1)
    return ids, chosen / chosen.sum(1, keepdims=True) if normalise else chosen


def _experts(x: Array, ids: Array, shares: Array, gate_up: Array, down: Array) -> Array:
    output = np.zeros_like(x)
    for row in range(len(x)):
        for expert, share in zip(ids[row], shares[row], strict=True):
            gate, up = np.split(gate_up[expert] @ x[row], 2)
            output[row] += share * (down[expert] @ (_silu(gate) * up))
    return output
