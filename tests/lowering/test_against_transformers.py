"""Logits of lowered graphs agree with transformers, however the tokens are cut into steps and batches."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batches import Sequence
from tiny_models import CONFIGS, VOCAB_SIZE, TinyModel, make_tiny_model

from backends.lowering.program import GraphProgram

DIFFERENCE_MAX = 1e-4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    return {name: make_tiny_model(name, tmp_path_factory.mktemp(name)) for name in CONFIGS}


@pytest.fixture(scope="module")
def programs(models: dict[str, TinyModel]) -> dict[str, GraphProgram]:
    return {name: model.program() for name, model in models.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_one_prompt(models: dict[str, TinyModel], programs: dict[str, GraphProgram], name: str) -> None:
    model = models[name]
    token_ids = torch.randint(VOCAB_SIZE, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    cache = model.cache()
    logits = programs[name].run(cache.batch([(Sequence(token_ids), 100)]), cache.kv)
    expected = model.logits(token_ids)
    assert logits.dtype == torch.float32
    assert expected.std() > 0.1
    assert (logits - expected).abs().max() < DIFFERENCE_MAX


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]]]:
    """Sequences, and the numbers of tokens that each step computes of each."""
    tokens = st.integers(0, VOCAB_SIZE - 1)
    sequences = draw(st.lists(st.lists(tokens, min_size=1, max_size=24), min_size=1, max_size=5))
    left = [len(sequence) for sequence in sequences]
    steps = []
    while any(left):
        counts = [draw(st.sampled_from([n, 1, 1, min(n, 2), n // 2, 0])) if n else 0 for n in left]
        if any(counts):
            steps.append(counts)
            left = [n - count for n, count in zip(left, counts, strict=True)]
    return sequences, steps


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2-half-sliding", "qwen3", "qwen3-moe"])
@settings(deadline=None, max_examples=20)
@given(schedule=schedules(), block_size=st.sampled_from([1, 3, 16]), seed=st.integers(0, 99))
def test_any_schedule_gives_the_logits_of_one_pass(
    models: dict[str, TinyModel],
    programs: dict[str, GraphProgram],
    name: str,
    schedule: tuple[list[list[int]], list[list[int]]],
    block_size: int,
    seed: int,
) -> None:
    model, program = models[name], programs[name]
    cache = model.cache(block_size, seed)
    sequences = [Sequence(token_ids) for token_ids in schedule[0]]
    expected = [model.logits(token_ids) for token_ids in schedule[0]]
    for counts in schedule[1]:
        chunks = [(index, count) for index, count in enumerate(counts) if count]
        chunks.sort(key=lambda chunk: chunk[1] != 1)
        logits = program.run(cache.batch([(sequences[index], count) for index, count in chunks]), cache.kv)
        row = 0
        for index, count in chunks:
            first = sequences[index].num_computed_tokens
            difference = logits[row : row + count] - expected[index][first : first + count]
            assert difference.abs().max() < DIFFERENCE_MAX
            sequences[index].num_computed_tokens += count
            row += count


def test_only_sampled_rows_come_out(models: dict[str, TinyModel]) -> None:
    model = models["qwen3"]
    cache = model.cache()
    inputs = cache.batch([(Sequence([1, 2, 3]), 3), (Sequence([4, 5]), 2)])
    inputs.sampled_rows = torch.tensor([2, 4])
    logits = model.program().run(inputs, cache.kv)
    assert logits.shape == (2, VOCAB_SIZE)
    assert (logits[0] - model.logits([1, 2, 3])[-1]).abs().max() < DIFFERENCE_MAX
    assert (logits[1] - model.logits([4, 5])[-1]).abs().max() < DIFFERENCE_MAX


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_transformers_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_tiny_model("qwen3", tmp_path)
    token_ids = list(range(40))
    exact = model.logits(token_ids)
    half = TinyModel(model.reference.to(dtype), tmp_path)
    half.reference.save_pretrained(tmp_path)
    cache = half.cache()
    cache.kv.keys = [keys.to(dtype) for keys in cache.kv.keys]
    cache.kv.values = [values.to(dtype) for values in cache.kv.values]
    logits = half.program().run(cache.batch([(Sequence(token_ids), 40)]), cache.kv)
    own_error = (half.logits(token_ids).float() - exact).abs().mean()
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().mean() < 1.5 * own_error
