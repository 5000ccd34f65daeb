"""What a model takes on one device beside its KV cache, from its execution graph.

Layers of one kind are alike, so a graph with two of each kind tells the sizes of one with all of them.
"""

from collections import Counter
from dataclasses import replace
from functools import lru_cache

from sagellm.cost_model.graph_prices import engine_graph
from sagellm.models.model_shape import ModelShape
from sagellm.runtime.execution_graph.passes.memory import plan_buffers
from sagellm.runtime.execution_graph.tensors import StepSizes

NO_TOKENS = StepSizes()


@lru_cache(maxsize=64)
def rank_weight_bytes(model: ModelShape, tp: int) -> int:
    """Weights on one of ``tp`` ranks.

    Raises ``ValueError`` where ``tp`` does not divide the model's heads.
    """
    small = _few_layers(model)
    graph = engine_graph(small, tp)
    layers: dict[str, int | None] = {}
    for node in graph.nodes:
        for name in node.inputs:
            layers.setdefault(name, node.layer)
    num_bytes: Counter[int | None] = Counter()
    for tensor in graph.tensors:
        if tensor.kind == "weight":
            num_bytes[layers[tensor.name]] += tensor.num_bytes(NO_TOKENS)
    first_of_kind = {small.has_experts(layer): layer for layer in range(small.num_layers)}
    return num_bytes[None] + sum(num_bytes[first_of_kind[model.has_experts(i)]] for i in range(model.num_layers))


@lru_cache(maxsize=64)
def activation_bytes(model: ModelShape, tp: int, sizes: StepSizes) -> int:
    """The arena that holds all activations of a step of ``sizes`` on one of ``tp`` ranks.

    Raises ``ValueError`` where ``tp`` does not divide the model's heads.
    """
    return plan_buffers(engine_graph(_few_layers(model), tp), sizes).peak_bytes


def _few_layers(model: ModelShape) -> ModelShape:
    """The same model with at most two layers of each kind."""
    layers_of_kind = {
        kind: [layer for layer in range(model.num_layers) if model.has_experts(layer) is kind][:2]
        for kind in (False, True)
    }
    num_dense = len(layers_of_kind[False])
    return replace(
        model,
        num_layers=num_dense + len(layers_of_kind[True]),
        dense_layers=tuple(range(num_dense)) if model.num_experts else (),
    )
