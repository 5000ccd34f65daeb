"""The graph of OPT models: learned positions, layer norms, biases everywhere, one ReLU projection."""

import math

from sagellm.models.model_config import ModelConfig
from sagellm.runtime.execution_graph.assembly import GraphAssembly
from sagellm.runtime.execution_graph.ir import ExecutionGraph
from sagellm.runtime.execution_graph.operators import (
    Add,
    AddBias,
    AllGather,
    Attention,
    Embedding,
    KVWrite,
    LayerNorm,
    Linear,
    Relu,
    SelectRows,
)

_STEM = "model.decoder"
_PADDING_POSITIONS = 2


def build_opt_graph(config: ModelConfig, tp: int) -> ExecutionGraph:
    """As ``build_graph``."""
    graph = GraphAssembly(config, tp)
    shape = config.shape
    table_shape = (shape.vocab_size, shape.hidden_size)
    table = graph.sharded(f"{_STEM}.embed_tokens.weight", table_shape, dim=0)
    rows = graph.all_reduce(graph.add("embedding", Embedding(sharded=tp > 1), "token_ids", table))
    positions = graph.whole(f"{_STEM}.embed_positions.weight", shape.num_position_embeddings, shape.hidden_size)
    placed = graph.add("position_embedding", Embedding(first_row=_PADDING_POSITIONS), "positions", positions)
    hidden = graph.add("placed_embedding", Add(), rows, placed)
    for layer in range(shape.num_layers):
        hidden = _attention_block(graph, hidden, layer)
        hidden = _mlp_block(graph, hidden, layer)
    normed = _layer_norm(graph, "norm", f"{_STEM}.final_layer_norm", hidden, None)
    sampled = graph.add("sampled_hidden", SelectRows(), normed, "sampled_rows")
    head = table if shape.tied_embeddings else graph.sharded("lm_head.weight", table_shape, dim=0)
    if tp == 1:
        return graph.finish(graph.add("logits", Linear(), sampled, head))
    columns = graph.add("logits.columns", Linear(), sampled, head)
    return graph.finish(graph.add("logits", AllGather(shape.vocab_size), columns))


def _attention_block(graph: GraphAssembly, hidden: str, layer: int) -> str:
    shape, prefix = graph.config.shape, f"layers.{layer}"
    normed = _norm_of_layer(graph, "input_norm", "self_attn_layer_norm", hidden, layer)
    q, k, v = (
        _column_linear(graph, normed, layer, f"self_attn.{name}_proj", shape.query_width, shape.hidden_size)
        for name in ("q", "k", "v")
    )
    graph.add_many(f"{prefix}.kv_write", KVWrite(), k, v, layer=layer)
    heads = shape.num_heads // graph.tp
    attention = Attention(heads, heads, shape.head_dim, 1 / math.sqrt(shape.head_dim))
    mixed = graph.add(f"{prefix}.attention", attention, q, layer=layer)
    output = _row_linear(graph, mixed, layer, "self_attn.out_proj", shape.hidden_size, shape.query_width)
    return graph.add(f"{prefix}.attention_residual", Add(), hidden, output, layer=layer)


def _mlp_block(graph: GraphAssembly, hidden: str, layer: int) -> str:
    shape, prefix = graph.config.shape, f"layers.{layer}"
    normed = _norm_of_layer(graph, "mlp_norm", "final_layer_norm", hidden, layer)
    up = _column_linear(graph, normed, layer, "fc1", shape.intermediate_size, shape.hidden_size)
    activated = graph.add(f"{prefix}.relu", Relu(), up, layer=layer)
    output = _row_linear(graph, activated, layer, "fc2", shape.hidden_size, shape.intermediate_size)
    return graph.add(f"{prefix}.mlp_residual", Add(), hidden, output, layer=layer)


def _norm_of_layer(graph: GraphAssembly, name: str, weights: str, x: str, layer: int) -> str:
    return _layer_norm(graph, f"layers.{layer}.{name}", f"{_STEM}.layers.{layer}.{weights}", x, layer)


def _layer_norm(graph: GraphAssembly, name: str, weights: str, x: str, layer: int | None) -> str:
    width = graph.config.shape.hidden_size
    scale, shift = graph.whole(f"{weights}.weight", width), graph.whole(f"{weights}.bias", width)
    return graph.add(name, LayerNorm(graph.config.norm_eps), x, scale, shift, layer=layer)


def _column_linear(graph: GraphAssembly, x: str, layer: int, name: str, num_outputs: int, num_inputs: int) -> str:
    stem = f"{_STEM}.layers.{layer}.{name}"
    operands = [x, graph.sharded(f"{stem}.weight", (num_outputs, num_inputs), 0)]
    if graph.config.shape.mlp_bias:
        operands.append(graph.sharded(f"{stem}.bias", (num_outputs,), 0))
    return graph.add(f"layers.{layer}.{name.split('.')[-1]}", Linear(), *operands, layer=layer)


def _row_linear(graph: GraphAssembly, x: str, layer: int, name: str, num_outputs: int, num_inputs: int) -> str:
    stem, node = f"{_STEM}.layers.{layer}.{name}", f"layers.{layer}.{name.split('.')[-1]}"
    bias = graph.whole(f"{stem}.bias", num_outputs) if graph.config.shape.mlp_bias else None
    operands = [x, graph.sharded(f"{stem}.weight", (num_outputs, num_inputs), 1)]
    if bias and graph.tp == 1:
        operands.append(bias)
    output = graph.all_reduce(graph.add(node, Linear(), *operands, layer=layer), layer)
    if bias and graph.tp > 1:
        output = graph.add(f"{node}.bias", AddBias(), output, bias, layer=layer)
    return output
