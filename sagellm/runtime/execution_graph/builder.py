"""From a model's configuration to the graph of its forward pass, operator by operator; passes join them.

Tensor parallelism splits each layer as Shoeybi et al. (Megatron-LM, 2019) do: query, key, value, gate and
up projections by outputs, the output and down projections by inputs, with a sum over ranks after each.
Embedding and logits are split by vocabulary. Weights carry the names of Hugging Face checkpoints.
"""

import math

from sagellm.models.model_config import PLAIN_ROPE, ModelConfig
from sagellm.runtime.execution_graph.assembly import GraphAssembly
from sagellm.runtime.execution_graph.expert_operators import Experts, RouteToExperts
from sagellm.runtime.execution_graph.ir import ExecutionGraph
from sagellm.runtime.execution_graph.operators import (
    Add,
    AddBias,
    AllGather,
    Attention,
    Embedding,
    HeadRmsNorm,
    KVWrite,
    Linear,
    Multiply,
    RmsNorm,
    Rotary,
    SelectRows,
    Silu,
)
from sagellm.runtime.execution_graph.opt_builder import build_opt_graph
from sagellm.runtime.execution_graph.tensors import WeightSource


def build_graph(config: ModelConfig, tp: int = 1) -> ExecutionGraph:
    """The graph of one rank of ``tp``, unfused.

    Inputs are ``token_ids``, ``positions`` and ``sampled_rows``; the output is ``logits``
    [num_sampled, vocab_size]. Raises ``ValueError`` where ``tp`` does not divide the model's heads.
    """
    if config.family == "opt":
        return build_opt_graph(config, tp)
    graph = GraphAssembly(config, tp)
    hidden = _embedding(graph)
    for layer in range(config.shape.num_layers):
        hidden = _attention_block(graph, hidden, layer)
        hidden = _mlp_block(graph, hidden, layer)
    norm = graph.whole("model.norm.weight", config.shape.hidden_size)
    normed = graph.add("norm", RmsNorm(config.norm_eps), hidden, norm)
    return graph.finish(_logits(graph, normed))


def _embedding(graph: GraphAssembly) -> str:
    table = _vocabulary_table(graph, "model.embed_tokens.weight")
    rows = graph.add("embedding", Embedding(sharded=graph.tp > 1), "token_ids", table)
    return graph.all_reduce(rows)


def _vocabulary_table(graph: GraphAssembly, name: str) -> str:
    shape = graph.config.shape
    return graph.sharded(name, (shape.vocab_size, shape.hidden_size), dim=0)


def _logits(graph: GraphAssembly, normed: str) -> str:
    shape = graph.config.shape
    rows = graph.add("sampled_hidden", SelectRows(), normed, "sampled_rows")
    head = _vocabulary_table(graph, "model.embed_tokens.weight" if shape.tied_embeddings else "lm_head.weight")
    if graph.tp == 1:
        return graph.add("logits", Linear(), rows, head)
    columns = graph.add("logits.columns", Linear(), rows, head)
    return graph.add("logits", AllGather(shape.vocab_size), columns)


def _attention_block(graph: GraphAssembly, hidden: str, layer: int) -> str:
    config, shape = graph.config, graph.config.shape
    prefix, weights = f"layers.{layer}", f"model.layers.{layer}"
    num_kv_parts = min(graph.tp, shape.num_kv_heads)
    norm = graph.whole(f"{weights}.input_layernorm.weight", shape.hidden_size)
    normed = graph.add(f"{prefix}.input_norm", RmsNorm(config.norm_eps), hidden, norm, layer=layer)
    q = _column_linear(graph, normed, layer, "self_attn.q_proj", shape.query_width, shape.qkv_bias)
    k = _column_linear(graph, normed, layer, "self_attn.k_proj", shape.kv_width, shape.qkv_bias, num_kv_parts)
    v = _column_linear(graph, normed, layer, "self_attn.v_proj", shape.kv_width, shape.qkv_bias, num_kv_parts)
    if shape.qk_norm:
        q = _head_norm(graph, q, layer, "q_norm")
        k = _head_norm(graph, k, layer, "k_norm")
    rotary = Rotary(shape.head_dim, config.rope or PLAIN_ROPE)
    q = graph.add(f"{prefix}.q_rotary", rotary, q, "positions", layer=layer)
    k = graph.add(f"{prefix}.k_rotary", rotary, k, "positions", layer=layer)
    graph.add_many(f"{prefix}.kv_write", KVWrite(), k, v, layer=layer)
    attention = Attention(
        num_heads=shape.num_heads // graph.tp,
        num_kv_heads=shape.kv_heads_per_rank(graph.tp),
        head_dim=shape.head_dim,
        scale=1 / math.sqrt(shape.head_dim),
        sliding_window=config.sliding_window(layer),
    )
    mixed = graph.add(f"{prefix}.attention", attention, q, layer=layer)
    output = _row_linear(graph, mixed, layer, "self_attn.o_proj", shape.query_width, shape.output_bias)
    return graph.add(f"{prefix}.attention_residual", Add(), hidden, output, layer=layer)


def _head_norm(graph: GraphAssembly, x: str, layer: int, name: str) -> str:
    config = graph.config
    weight = graph.whole(f"model.layers.{layer}.self_attn.{name}.weight", config.shape.head_dim)
    operator = HeadRmsNorm(config.shape.head_dim, config.norm_eps)
    return graph.add(f"layers.{layer}.{name}", operator, x, weight, layer=layer)


def _mlp_block(graph: GraphAssembly, hidden: str, layer: int) -> str:
    config, shape = graph.config, graph.config.shape
    norm = graph.whole(f"model.layers.{layer}.post_attention_layernorm.weight", shape.hidden_size)
    normed = graph.add(f"layers.{layer}.mlp_norm", RmsNorm(config.norm_eps), hidden, norm, layer=layer)
    output = _experts(graph, normed, layer) if shape.has_experts(layer) else _gated_mlp(graph, normed, layer)
    return graph.add(f"layers.{layer}.mlp_residual", Add(), hidden, output, layer=layer)


def _gated_mlp(graph: GraphAssembly, normed: str, layer: int) -> str:
    shape = graph.config.shape
    gate = _column_linear(graph, normed, layer, "mlp.gate_proj", shape.intermediate_size, shape.mlp_bias)
    up = _column_linear(graph, normed, layer, "mlp.up_proj", shape.intermediate_size, shape.mlp_bias)
    activated = graph.add(f"layers.{layer}.silu", Silu(), gate, layer=layer)
    gated = graph.add(f"layers.{layer}.gated", Multiply(), activated, up, layer=layer)
    return _row_linear(graph, gated, layer, "mlp.down_proj", shape.intermediate_size, shape.mlp_bias)


def _experts(graph: GraphAssembly, normed: str, layer: int) -> str:
    """Every rank holds its columns of every expert's gate and up projection, and the rows of the down projection."""
    config, shape = graph.config, graph.config.shape
    prefix, weights = f"layers.{layer}", f"model.layers.{layer}.mlp"
    hidden, width, num_experts = shape.hidden_size, shape.expert_intermediate_size, shape.num_experts
    router = graph.whole(f"{weights}.gate.weight", num_experts, hidden)
    scores = graph.add(f"{prefix}.router", Linear(), normed, router, layer=layer)
    ids, shares = f"{prefix}.expert_ids", f"{prefix}.expert_shares"
    route = RouteToExperts(shape.experts_per_token, config.normalise_expert_shares)
    graph.add_many(f"{prefix}.route", route, scores, outputs=(ids, shares), layer=layer)
    rank_width = -(-width // graph.tp)
    gate_up = graph.weight(
        f"{weights}.experts.gate_up_proj.weight",
        *(
            WeightSource(f"{weights}.experts.{expert}.{part}_proj.weight", (width, hidden), graph.shard(0))
            for expert in range(num_experts)
            for part in ("gate", "up")
        ),
        shape=(num_experts, 2 * rank_width, hidden),
    )
    down = graph.weight(
        f"{weights}.experts.down_proj.weight",
        *(
            WeightSource(f"{weights}.experts.{expert}.down_proj.weight", (hidden, width), graph.shard(1))
            for expert in range(num_experts)
        ),
        shape=(num_experts, hidden, rank_width),
    )
    output = graph.add(f"{prefix}.experts", Experts(), normed, ids, shares, gate_up, down, layer=layer)
    return graph.all_reduce(output, layer)


def _column_linear(
    graph: GraphAssembly, x: str, layer: int, name: str, width: int, bias: bool, num_parts: int | None = None
) -> str:
    """A projection of which each rank holds some outputs."""
    stem = f"model.layers.{layer}.{name}"
    operands = [x, graph.sharded(f"{stem}.weight", (width, graph.config.shape.hidden_size), 0, num_parts)]
    if bias:
        operands.append(graph.sharded(f"{stem}.bias", (width,), 0, num_parts))
    return graph.add(f"layers.{layer}.{name.split('.')[1]}", Linear(), *operands, layer=layer)


def _row_linear(graph: GraphAssembly, x: str, layer: int, name: str, width: int, bias: bool) -> str:
    """A projection back to the hidden size, of which each rank holds some inputs; the ranks' results are summed."""
    hidden = graph.config.shape.hidden_size
    stem, prefix = f"model.layers.{layer}.{name}", f"layers.{layer}.{name.split('.')[1]}"
    operands = [x, graph.sharded(f"{stem}.weight", (hidden, width), 1)]
    if bias and graph.tp == 1:
        operands.append(graph.whole(f"{stem}.bias", hidden))
    output = graph.all_reduce(graph.add(prefix, Linear(), *operands, layer=layer), layer)
    if bias and graph.tp > 1:
        output = graph.add(f"{prefix}.bias", AddBias(), output, graph.whole(f"{stem}.bias", hidden), layer=layer)
    return output
