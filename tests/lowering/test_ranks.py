"""Tensor parallelism: ranks in threads of one process give the logits of one rank alone."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from paged_batches import Sequence
from tiny_models import NUM_POSITIONS, VOCAB_SIZE, TinyModel, make_tiny_model

from backends.lowering.lower import lower
from backends.operators.communicator import SingleRank, ThreadGroup
from backends.operators.registry import KernelRegistry
from backends.weights.checkpoint import Checkpoint
from backends.weights.load import load_weights
from backends.weights.progress import NoProgress
from sagellm.runtime.execution_graph.ir import ExecutionGraph

PROMPT, NUM_DECODES = list(range(0, 60, 2)), 3


def logits_of_rank(model: TinyModel, graph: ExecutionGraph, group: ThreadGroup, rank: int) -> torch.Tensor:
    """Logits of a prompt and some decodes, in a cache of this rank's heads."""
    weights = load_weights(graph, Checkpoint(model.folder), rank=rank, device="cpu", progress=NoProgress())
    program = lower(
        graph,
        weights,
        kernels=KernelRegistry(),
        backend="cpu",
        device="cpu",
        num_positions=NUM_POSITIONS,
        communicator=group.rank(rank) if group.size > 1 else SingleRank(),
    )
    cache = model.cache(seed=rank, tp=graph.tp)
    sequence = Sequence(PROMPT)
    rows = []
    for num_tokens in (len(PROMPT) - NUM_DECODES, *[1] * NUM_DECODES):
        rows.append(program.run(cache.batch([(sequence, num_tokens)]), cache.kv))
        sequence.num_computed_tokens += num_tokens
    return torch.cat(rows)


def logits_of_all(model: TinyModel, graph: ExecutionGraph) -> list[torch.Tensor]:
    group = ThreadGroup(graph.tp)
    # Each thread has a number of threads of its own to compute with.
    with ThreadPoolExecutor(graph.tp, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(lambda rank: logits_of_rank(model, graph, group, rank), range(graph.tp)))


@pytest.mark.parametrize("name", ["llama-biased", "llama-llama3-rope-tied", "qwen2", "qwen3", "qwen3-moe", "opt"])
def test_ranks_together_give_the_logits_of_one(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """8 ranks are more than there are key-value heads; 97 tokens of vocabulary divide by none of them."""
    model = make_tiny_model(name, tmp_path_factory.mktemp(name))
    expected = logits_of_all(model, model.graph(1))[0]
    assert expected.shape == (len(PROMPT), VOCAB_SIZE)
    assert (expected - model.logits(PROMPT)).abs().max() < 1e-4
    for tp in (2, 8):
        for logits in logits_of_all(model, model.graph(tp)):
            assert (logits - expected).abs().max() < 1e-4, f"tp {tp}"


def test_a_group_of_another_size_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = make_tiny_model("qwen2", tmp_path_factory.mktemp("qwen2"))
    graph = model.graph(2)
    weights = load_weights(graph, Checkpoint(model.folder), rank=0, device="cpu", progress=NoProgress())
    with pytest.raises(ValueError, match=r"its size is 1, must be the graph's tp \(2\)"):
        lower(graph, weights, kernels=KernelRegistry(), backend="cpu", device="cpu", num_positions=8)
