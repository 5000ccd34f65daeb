"""Rows are selected as early as can be, and sampled rows get the logits that they would have got."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batches import Sequence
from tiny_models import CONFIGS, VOCAB_SIZE, TinyModel, make_tiny_model

from backends.lowering.program import GraphProgram
from sagellm.runtime.execution_graph.ir import ExecutionGraph
from sagellm.runtime.execution_graph.operators import Attention, SelectRows
from sagellm.runtime.execution_graph.passes.early_selection import select_rows_early
from sagellm.runtime.execution_graph.passes.fusion import fuse
from sagellm.runtime.execution_graph.tensors import NUM_SAMPLED, StepSizes
from sagellm.runtime.execution_graph.validation import validate


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def programs(model: TinyModel) -> tuple[GraphProgram, GraphProgram]:
    return model.program(), model.program(select_rows_early(fuse(model.graph())))


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_sampled_rows_have_the_logits_of_the_plain_graph(
    model: TinyModel, programs: tuple[GraphProgram, GraphProgram], data: st.DataObject
) -> None:
    plain, early = programs
    decodes = data.draw(st.lists(st.integers(1, 20), max_size=3), label="contexts of decodes")
    prompts = data.draw(st.lists(st.tuples(st.integers(0, 6), st.integers(2, 9)), max_size=3), label="chunks")
    chunks = [(before, 1) for before in decodes] + prompts
    if not chunks:
        return
    cache = model.cache(seed=len(chunks))
    sequences = [Sequence([(7 * i + 3 * j) % VOCAB_SIZE for j in range(sum(c))]) for i, c in enumerate(chunks)]
    for sequence, (before, _) in zip(sequences, chunks, strict=True):
        if before:
            plain.run(cache.batch([(sequence, before)]), cache.kv)
            sequence.num_computed_tokens = before
    inputs = cache.batch([(sequence, count) for sequence, (_, count) in zip(sequences, chunks, strict=True)])
    num_rows = len(inputs.token_ids)
    rows = sorted(data.draw(st.sets(st.integers(0, num_rows - 1)), label="sampled rows"))
    expected = plain.run(inputs, cache.kv)[rows]
    sampled = replace(inputs, sampled_rows=torch.tensor(rows, dtype=torch.int64))
    for name, found in (
        ("at once", early.run(sampled, cache.kv)),
        ("in two parts", early.logits(early.all_rows(sampled, cache.kv), sampled, cache.kv)),
    ):
        assert found.shape == expected.shape, name
        if rows:
            assert (found - expected).abs().max() < 1e-4, name


def test_all_of_the_last_layer_behind_its_keys_and_values_is_for_sampled_rows(model: TinyModel) -> None:
    for plain in (model.graph(), fuse(model.graph())):
        graph = select_rows_early(plain)
        validate(graph)
        last = model.reference.config.num_hidden_layers - 1
        of_sampled = [node.layer for node in graph.nodes if is_attention_of_sampled_rows(graph, node.name)]
        assert of_sampled == [last]
        first = next(place for place, node in enumerate(graph.nodes) if isinstance(node.operator, SelectRows))
        assert any(node.operator.writes_kv and node.layer == last for node in graph.nodes[:first])
        for node in graph.nodes[first:]:
            for tensor in graph.tensors_of(node.outputs):
                assert tensor.shape[0] == NUM_SAMPLED, node.name
        assert {node.name for node in plain.nodes} - {node.name for node in graph.nodes} == {"sampled_hidden"}


def test_a_prompt_costs_less(model: TinyModel) -> None:
    plain = fuse(model.graph())
    sizes = StepSizes(num_tokens=64, num_seqs=1, num_sampled=1, num_context_tokens=64, num_token_pairs=64 * 32)
    before, after = (
        sum(graph.work(node, sizes).flops for node in graph.nodes) for graph in (plain, select_rows_early(plain))
    )
    num_layers = model.reference.config.num_hidden_layers
    assert (1 - 1 / num_layers) * before < after < (1 - 0.6 / num_layers) * before


def is_attention_of_sampled_rows(graph: ExecutionGraph, name: str) -> bool:
    operator = next(node.operator for node in graph.nodes if node.name == name)
    return isinstance(operator, Attention) and operator.of_sampled_rows
