"""Optimiser passes change no logits: every pass, alone and with the others, on whole tiny models."""

from collections.abc import Callable

import pytest
import torch
from paged_batches import PagedCache, Sequence
from test_ranks import logits_of_all
from tiny_models import CONFIGS, TinyModel, make_tiny_model

from backends.lowering.launches import StepState
from backends.lowering.lifetimes import Lifetimes
from backends.lowering.program import GraphProgram
from backends.lowering.registers import Registers
from backends.step_inputs import StepInputs
from sagellm.runtime.execution_graph.ir import ExecutionGraph, from_json, to_json
from sagellm.runtime.execution_graph.passes.early_selection import select_rows_early
from sagellm.runtime.execution_graph.passes.fusion import (
    fuse,
    fuse_add_norm,
    fuse_head_norms,
    fuse_rotary_kv_write,
    fuse_silu_multiply,
)
from sagellm.runtime.execution_graph.passes.joined_projections import join_projections
from sagellm.runtime.execution_graph.passes.kv_sends import add_kv_sends
from sagellm.runtime.execution_graph.passes.memory import plan_buffers, storage_names
from sagellm.runtime.execution_graph.passes.scheduling import schedule
from sagellm.runtime.execution_graph.tensors import StepSizes
from sagellm.runtime.execution_graph.validation import validate

DIFFERENCE_MAX = 1e-4
PASSES: dict[str, tuple[Callable[[ExecutionGraph], ExecutionGraph], ...]] = {
    "join projections": (join_projections,),
    "join projections, silu x gate": (join_projections, fuse_silu_multiply),
    "add and norm": (fuse_add_norm,),
    "rotary and KV write": (fuse_rotary_kv_write,),
    "rotary, head norms and KV write": (fuse_rotary_kv_write, fuse_head_norms),
    "early selection": (select_rows_early,),
    "all fusions, early selection": (fuse, fuse_head_norms, select_rows_early),
    "KV sends": (add_kv_sends,),
    "schedule": (lambda graph: schedule(graph, lambda node: 1.0 + len(node.name) % 3).graph,),
    "all": (
        fuse,
        fuse_head_norms,
        select_rows_early,
        add_kv_sends,
        lambda graph: schedule(graph, lambda node: 1.0).graph,
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def expected(model: TinyModel) -> torch.Tensor:
    return logits_of_all(model, model.graph())[0]


def optimised(graph: ExecutionGraph, passes: str) -> ExecutionGraph:
    for rewrite in PASSES[passes]:
        graph = rewrite(graph)
    validate(graph)
    return from_json(to_json(graph))


@pytest.mark.parametrize("passes", PASSES)
def test_logits_are_those_of_the_plain_graph(model: TinyModel, expected: torch.Tensor, passes: str) -> None:
    logits = logits_of_all(model, optimised(model.graph(), passes))[0]
    assert (logits - expected).abs().max() < DIFFERENCE_MAX


def test_all_passes_keep_the_logits_of_several_ranks(model: TinyModel, expected: torch.Tensor) -> None:
    for logits in logits_of_all(model, optimised(model.graph(4), "all")):
        assert (logits - expected).abs().max() < DIFFERENCE_MAX


def test_fusion_saves_launches(model: TinyModel) -> None:
    plain, fused = model.program(), model.program(optimised(model.graph(), "all"))
    # OPT joins two of three projections; a KV send for each layer is one more.
    saved_of_layer = (2 if model.reference.config.model_type == "opt" else 6) - 1
    assert plain.num_launches == len(model.graph().nodes)
    saved = plain.num_launches - fused.num_launches
    # Selecting rows early, two tensors' rows are selected, not one's.
    assert saved >= saved_of_layer * model.reference.config.num_hidden_layers - 1


@pytest.mark.parametrize("passes", ["join projections", "schedule", "all"])
def test_logits_are_the_same_in_planned_buffers(model: TinyModel, passes: str) -> None:
    """Every activation is moved to its place in one arena that is full of garbage."""
    graph = optimised(model.graph(), passes)
    token_ids = list(range(3, 33))
    cache = model.cache()
    inputs = cache.batch([(Sequence(token_ids), len(token_ids))])
    logits = run_in_arena(graph, model.program(graph), inputs, cache)
    assert (logits - model.logits(token_ids)).abs().max() < DIFFERENCE_MAX


def run_in_arena(graph: ExecutionGraph, program: GraphProgram, inputs: StepInputs, cache: PagedCache) -> torch.Tensor:
    num_tokens = len(inputs.token_ids)
    sizes = StepSizes(num_tokens=num_tokens, num_seqs=1, num_sampled=num_tokens)
    plan = plan_buffers(graph, sizes)
    assert plan.peak_bytes < plan.unshared_bytes
    arena = torch.full((plan.peak_bytes,), 255, dtype=torch.uint8)
    offsets = {placement.name: placement.offset for placement in plan.placements}
    registers, storage = Registers(graph, Lifetimes(graph).released_after), storage_names(graph)
    step = StepState([None] * registers.count, inputs, cache.kv, program.attention_inputs(inputs, cache.kv))
    for name in graph.inputs:
        step.registers[registers.by_name[name]] = getattr(inputs, name)
    nodes = {node.name: node for node in graph.nodes}
    for launch in program.launches:
        launch.run(step)
        for name in nodes[launch.node].outputs:
            if storage[name] == name:
                result = step.registers[registers.by_name[name]]
                place = arena[offsets[name] :][: result.nbytes].view(result.dtype).view(result.shape)
                place.copy_(result)
                step.registers[registers.by_name[name]] = place
    logits: torch.Tensor = step.registers[registers.by_name[graph.outputs[0]]]
    return logits
