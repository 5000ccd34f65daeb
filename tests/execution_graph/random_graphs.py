"""Random models, random graphs and random batches, all tiny."""

import zlib
from dataclasses import replace
from random import Random

import numpy as np
from hypothesis import strategies as st
from numpy_interpreter import Array, Batch, Run

from sagellm.models.model_config import ModelConfig
from sagellm.models.model_shape import ModelShape
from sagellm.models.rope import LinearScaling, Llama3Scaling, Rope
from sagellm.runtime.execution_graph import operators as ops
from sagellm.runtime.execution_graph.assembly import GraphAssembly
from sagellm.runtime.execution_graph.ir import ExecutionGraph
from sagellm.runtime.execution_graph.tensors import WeightSource

HEAD_DIM = 4
WIDTHS = (8, 16)
NUM_IDS = 12


def checkpoint(name: str, shape: tuple[int, ...]) -> Array:
    """The tensor of that name: random, and always the same."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape) / np.sqrt(shape[-1])


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    seqs = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=3))
    num_rows = [rows for rows, _ in seqs]
    total = sum(num_rows)
    token_ids = draw(st.lists(st.integers(0, NUM_IDS - 1), min_size=total, max_size=total))
    sampled = draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=3))
    return Batch(num_rows, [rows + past for rows, past in seqs], np.array(token_ids), np.array(sampled))


@st.composite
def model_configs(draw: st.DrawFn, tp: int = 1) -> ModelConfig:
    """A tiny model of any family, whose heads ``tp`` ranks can share; vocabulary and MLP need not divide."""
    family = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "opt"]))
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    heads = max(kv_heads, tp) * draw(st.sampled_from([1, 2]))
    gated = family != "opt"
    experts = draw(st.integers(2, 5)) if family == "qwen3_moe" else 0
    bias = draw(st.booleans()) if gated else True
    num_layers = draw(st.integers(1, 3))
    shape = ModelShape(
        name="tiny",
        num_layers=num_layers,
        hidden_size=draw(st.sampled_from(WIDTHS)),
        num_heads=heads,
        num_kv_heads=kv_heads if gated else heads,
        head_dim=HEAD_DIM,
        intermediate_size=draw(st.integers(4, 9)),
        vocab_size=draw(st.integers(NUM_IDS, NUM_IDS + 5)),
        tied_embeddings=draw(st.booleans()),
        gated_mlp=gated,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        qk_norm=family.startswith("qwen3"),
        norm_bias=not gated,
        num_position_embeddings=0 if gated else 16,
        num_experts=experts,
        experts_per_token=draw(st.integers(1, experts)) if experts else 0,
        expert_intermediate_size=draw(st.integers(2, 5)) if experts else 0,
        dense_layers=(0,) if experts and draw(st.booleans()) else (),
    )
    windows = tuple(draw(st.sampled_from([0, 3])) for _ in range(num_layers)) if family == "mistral" else ()
    rope = draw(st.sampled_from([Rope(), Rope(100.0, LinearScaling(2.0)), Rope(50.0, Llama3Scaling(4.0, 1.0, 2.0, 8))]))
    return ModelConfig(shape, family, "float32", rope=rope if gated else None, sliding_windows=windows)


@st.composite
def random_graphs(draw: st.DrawFn, tp: int = 1) -> ExecutionGraph:
    """A graph that nobody would build: any operators on any tensors that fit, any of them outputs."""
    rng = Random(draw(st.integers(0, 2**32)))
    shape = ModelShape("odd", 3, 8, 2, 2, HEAD_DIM, 8, NUM_IDS)
    graph = GraphAssembly(replace(ModelConfig(shape), dtype="float32"), tp)
    pool: dict[int, list[str]] = {width: [] for width in WIDTHS}
    for width in WIDTHS:
        table = graph.whole(f"table{width}", NUM_IDS, width)
        pool[width].append(graph.add(f"embedding{width}", ops.Embedding(), "token_ids", table))
    open_layers = list(range(shape.num_layers))
    for index in range(draw(st.integers(3, 14))):
        _add_something(graph, pool, rng, index, open_layers)
    names = [name for width in WIDTHS for name in pool[width]]
    outputs = rng.sample(names, rng.randint(1, min(4, len(names))))
    return graph.finish(*outputs)


def _add_something(
    graph: GraphAssembly, pool: dict[int, list[str]], rng: Random, index: int, open_layers: list[int]
) -> None:
    width = rng.choice(WIDTHS)
    x, y = rng.choice(pool[width]), rng.choice(pool[width])
    name = f"n{index}"
    kind = rng.choice(["add", "add_norm", "multiply", "gated", "norm", "linears", "linears", "kv", "kv", "reduce"])
    if kind == "add":
        pool[width].append(graph.add(name, ops.Add(), x, y))
    elif kind == "add_norm":
        total = graph.add(f"{name}.add", ops.Add(), x, y)
        weight = graph.whole(f"{name}.weight", width)
        pool[width] += [total, graph.add(name, ops.RmsNorm(1e-6), total, weight)]
    elif kind == "multiply":
        pool[width].append(graph.add(name, ops.Multiply(), x, y))
    elif kind == "gated":
        halves = [_linear(graph, f"{name}.{part}_proj", x, width, width) for part in ("first", "second")]
        gate, up = rng.choice([halves, halves, halves[::-1]])
        activated = graph.add(f"{name}.silu", ops.Silu(), gate)
        factors = rng.sample([activated, up], 2)
        pool[width] += [
            graph.add(name, ops.Multiply(), *factors),
            *rng.sample([gate, up, activated], rng.randint(0, 1)),
        ]
    elif kind == "norm":
        pool[width].append(graph.add(name, ops.RmsNorm(1e-6), x, graph.whole(f"{name}.weight", width)))
    elif kind == "linears":
        for number in range(rng.randint(1, 3)):
            wide = rng.choice(WIDTHS)
            pool[wide].append(_linear(graph, f"{name}.{number}_proj", x, width, wide, bias=rng.random() < 0.3))
    elif kind == "reduce":
        pool[width].append(graph.all_reduce(x) if graph.tp > 1 and f"{x}.all_reduce" not in pool[width] else x)
    elif kind == "kv" and open_layers:
        _add_attention(graph, pool, rng, name, width, open_layers.pop())


def _add_attention(
    graph: GraphAssembly, pool: dict[int, list[str]], rng: Random, name: str, width: int, layer: int
) -> None:
    q, k, v = (rng.choice(pool[width]) for _ in range(3))
    weight = graph.whole(f"{name}.head_norm", HEAD_DIM)
    if rng.random() < 0.5:
        eps, other_eps = rng.choice([(1e-6, 1e-6), (1e-6, 0.5)])
        q = graph.add(f"{name}.q_norm", ops.HeadRmsNorm(HEAD_DIM, eps), q, weight, layer=layer)
        k = graph.add(f"{name}.k_norm", ops.HeadRmsNorm(HEAD_DIM, other_eps), k, weight, layer=layer)
    rope, other_rope = rng.choice([(Rope(), Rope()), (Rope(), Rope(100.0))])
    q = graph.add(f"{name}.q_rotary", ops.Rotary(HEAD_DIM, rope), q, "positions", layer=layer)
    k = graph.add(f"{name}.k_rotary", ops.Rotary(HEAD_DIM, other_rope), k, "positions", layer=layer)
    v = rng.choice([v, v, q])
    graph.add_many(f"{name}.write", ops.KVWrite(), k, v, layer=layer)
    heads = width // HEAD_DIM
    attended = graph.add(name, ops.Attention(heads, heads, HEAD_DIM, 0.5), q, layer=layer)
    pool[width] += [attended, *rng.sample([q, k], rng.randint(0, 1))]


def _linear(graph: GraphAssembly, name: str, x: str, width: int, wide: int, bias: bool = False) -> str:
    operands = [x, graph.weight(f"{name}.weight", WeightSource(f"{name}.weight", (wide, width)))]
    if bias:
        operands.append(graph.whole(f"{name}.bias", wide))
    return graph.add(name, ops.Linear(), *operands)


def assert_same(one: Run, other: Run) -> None:
    """Equal outputs and equal caches on every rank, but for the last bits."""
    for outputs, others in zip(one.outputs, other.outputs, strict=True):
        assert outputs.keys() == others.keys()
        for name, values in outputs.items():
            np.testing.assert_allclose(values, others[name], rtol=1e-8, atol=1e-8)
    for cache, other_cache in zip(one.caches, other.caches, strict=True):
        assert cache.keys() == other_cache.keys()
        for layer, entries in cache.items():
            for mine, theirs in zip(entries, other_cache[layer], strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=1e-8, atol=1e-8)
