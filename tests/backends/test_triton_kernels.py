"""The CUDA backend's kernels, interpreted on the CPU, against exact results.

Interpreting is slow, so batches are small, and it rounds bfloat16 differently: on a device the conformance
suite does it all.
"""

import importlib.util
import itertools
import os
from dataclasses import replace
from math import ceil

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"

from backends.conformance import oracle
from backends.conformance.batches import HeadShape, paged_batch
from backends.conformance.check import Check, Subject
from backends.conformance.closeness import expect_close
from backends.conformance.operator_checks import operator_checks
from backends.cpu.backend import CpuBackend
from backends.cuda import operator_kernels
from backends.cuda.kernels import prompt_attention
from backends.cuda.kernels.decode_attention import decode_attention, share_out
from backends.cuda.kernels.prefill_attention import prefill_attention
from backends.cuda.kernels.prompt_tiles import lay_out_tiles
from backends.cuda.kernels.tile_shapes import decode_tile, prefill_tile
from backends.cuda.operator_kernels import register_kernels
from backends.operators import reference
from backends.operators.registry import KernelRegistry
from backends.step_inputs import StepInputs

# A part of a decode that sees no key has the logarithm of zero.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")

MIXED = ((1, 1), (1, 37), (3, 9), (20, 20), (5, 70))
OWN_KERNELS = "rms_norm", "silu_multiply", "rotary_kv_write"


@pytest.fixture
def subject() -> Subject:
    registry = KernelRegistry()
    register_kernels(registry, "cpu")
    return Subject(CpuBackend(), registry)


@pytest.mark.parametrize(
    "check",
    [check for check in operator_checks(("float16",)) if any(name in check.name for name in OWN_KERNELS)],
    ids=lambda check: check.name,
)
def test_kernels_pass_conformance(check: Check, subject: Subject) -> None:
    check.run(subject)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "block_size", "window"),
    [
        (HeadShape(7, 1, 64), 16, 0),
        (HeadShape(4, 2, 128), 8, 6),
        (HeadShape(3, 3, 80), 48, 0),
        (HeadShape(2, 1, 256), 16, 1),
        (HeadShape(4, 2, 8), 16, 0),
        (HeadShape(3, 1, 12), 16, 5),
    ],
    ids=str,
)
def test_attention_of_a_mixed_batch(
    heads: HeadShape, block_size: int, window: int, dtype: torch.dtype, subject: Subject
) -> None:
    batch = paged_batch(MIXED, heads, block_size, dtype)
    arguments = (batch.query, batch.key_cache, batch.value_cache, batch.inputs)
    found = subject.registry.kernel("cpu", "attention").run(*arguments, scale=0.1, sliding_window=window)
    exact = oracle.attention(*arguments, scale=0.1, sliding_window=window)
    expect_close(found, exact, dtype, "attention")


@pytest.mark.parametrize("window", [0, 1, 40, 100])
@pytest.mark.parametrize("num_programs", [1, 4, 7, 1000])
@pytest.mark.parametrize("contexts", [(1, 300), (700,), (64, 65, 0, 128, 0, 0), (0, 3, 513, 2), (0, 0)], ids=str)
def test_parts_of_decodes_join_to_the_whole(contexts: tuple[int, ...], num_programs: int, window: int) -> None:
    batch = paged_batch(tuple((1, max(1, length)) for length in contexts), HeadShape(6, 2, 64), 16, torch.float32)
    found = torch.full(batch.query.shape, torch.nan)
    lens = torch.tensor(contexts, dtype=torch.int32)
    shares = share_out(lens, 2, num_programs, sliding_window=window)
    shape = decode_tile(64, 3, 4)
    caches = (batch.key_cache, batch.value_cache)
    where = (lens, batch.inputs.block_tables, shares, shape)
    decode_attention(batch.query, *caches, found, *where, scale=0.125, sliding_window=window)
    exact = oracle.attention(batch.query, *caches, batch.inputs, scale=0.125, sliding_window=window)
    is_there = lens > 0
    assert found[~is_there].isnan().all(), "a row was written that is nobody's"
    if is_there.any():
        expect_close(found[is_there], exact[is_there], torch.float32, "joined parts")


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40), st.integers(1, 600), st.sampled_from([0, 100]))
@settings(max_examples=25, deadline=None)
def test_shares_are_even(contexts: list[int], num_programs: int, window: int) -> None:
    shares = share_out(torch.tensor(contexts, dtype=torch.int32), 2, num_programs, sliding_window=window)
    *starts, num_tiles, share_len = shares.starts.tolist()
    seen = [length - max(length - window, 0) // 64 * 64 if window else length for length in contexts]
    counts = [after - before for before, after in itertools.pairwise([*starts, num_tiles])]
    needed = [ceil(length / 64) for length in seen]
    assert counts == needed
    assert share_len == max(1, ceil(sum(needed) / max(1, num_programs // 2)))
    assert ceil(num_tiles / share_len) <= shares.num_shares
    of_tile = [sequence for sequence, count in enumerate(counts) for _ in range(count)]
    for first_tile, (first, last) in zip(range(0, num_tiles, share_len), shares.sequences.tolist(), strict=False):
        assert (first, last) == (of_tile[first_tile], of_tile[min(first_tile + share_len, num_tiles) - 1])


@pytest.mark.parametrize("window", [0, 5])
def test_the_kernel_of_prompts_computes_decodes_too(window: int) -> None:
    batch = paged_batch(((1, 1), (1, 70), (3, 9), (20, 20), (1, 33)), HeadShape(6, 2, 64), 8, torch.float32)
    found = torch.full(batch.query.shape, torch.nan)
    caches = (batch.key_cache, batch.value_cache)
    shape = prefill_tile(64, 3, 4, 70, False)
    inputs = batch.inputs
    tiles = lay_out_tiles(inputs.query_starts, inputs.context_lens, batch.query.shape[0], shape.num_rows // 3)
    where = (tiles, inputs.block_tables, shape)
    prefill_attention(batch.query, *caches, found, *where, scale=0.125, sliding_window=window)
    exact = oracle.attention(batch.query, *caches, batch.inputs, scale=0.125, sliding_window=window)
    expect_close(found, exact, torch.float32, "attention")


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0, 1, 5, 17, 18, 19, 36, 100, 300]), st.sampled_from([0, 7, 50])), min_size=1),
    st.sampled_from([0, 7]),
    st.sampled_from([18, 64]),
    st.sampled_from([0, 33]),
)
@example([(5, 0)], 0, 18, 33)  # a tile that ends before its first key was put behind the last place
def test_every_row_of_prompts_is_in_one_tile_and_long_contexts_come_first(
    sequences: list[tuple[int, int]], first_row: int, tokens: int, num_rows_of_nobody: int
) -> None:
    # The last sequence's rows are of no account: they have no context, and fill a captured step up.
    sequences = [*sequences, (num_rows_of_nobody, -num_rows_of_nobody)]
    rows, before = zip(*sequences, strict=True)
    starts = list(itertools.accumulate(rows, initial=first_row))
    context_lens = torch.tensor([each + seen for each, seen in sequences], dtype=torch.int32)
    found = lay_out_tiles(torch.tensor(starts, dtype=torch.int32), context_lens, sum(rows), tokens)
    tiles = [tuple(tile) for tile in found.tiles.tolist()]
    num_tiles = int(found.num_tiles)
    wanted = [
        (starts[sequence] + token, rows[sequence] - token, before[sequence] + token, sequence)
        for sequence in range(len(rows) - 1)
        for token in range(0, rows[sequence], tokens)
    ]
    assert sorted(tiles[:num_tiles]) == sorted(wanted)
    ends = [position + min(num_left, tokens) for _, num_left, position, _ in tiles[:num_tiles]]
    assert ends == sorted(ends, reverse=True)
    assert all(num_left <= 0 or sequence == len(rows) - 1 for _, num_left, _, sequence in tiles[num_tiles:])


def test_where_the_kernel_for_hopper_fails_another_computes_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # This device is no such one, as its compiler finds out.
    monkeypatch.setattr(prompt_attention, "compute_capability", lambda device: 9)
    prompt_attention._takes_hopper.cache_clear()
    batch = paged_batch(((20, 20), (5, 45)), HeadShape(6, 2, 64), 16, torch.float16)
    caches = (batch.key_cache, batch.value_cache)
    for _ in range(2):
        found = operator_kernels.attention(batch.query, *caches, batch.inputs, scale=0.125)
        exact = oracle.attention(batch.query, *caches, batch.inputs, scale=0.125, sliding_window=0)
        expect_close(found, exact, torch.float16, "attention")
    prompt_attention._takes_hopper.cache_clear()
    (record,) = caplog.records
    assert "slower kernel" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_negative_slot_is_written_nowhere(subject: Subject) -> None:
    heads, head_dim = 2, 16
    key_cache, value_cache = torch.zeros(2, 2, heads, head_dim), torch.zeros(2, 2, heads, head_dim)
    ones = torch.ones(2, heads * head_dim)
    table = torch.cat((torch.ones(4, head_dim // 2), torch.zeros(4, head_dim // 2)), dim=1)
    slots = torch.tensor([-1, 2])
    run = subject.registry.kernel("cpu", "rotary_kv_write").run
    run(ones, ones, ones, torch.tensor([0, 1]), table, key_cache, value_cache, slots)
    for cache in (key_cache, value_cache):
        assert cache[1, 0].eq(1).all()
        assert cache.sum() == heads * head_dim


def test_a_head_size_that_no_kernel_knows_runs_the_reference(subject: Subject) -> None:
    batch = paged_batch(((1, 5), (3, 3)), HeadShape(2, 1, 320), 4, torch.float32)
    run = subject.registry.kernel("cpu", "attention").run
    found = run(batch.query, batch.key_cache, batch.value_cache, batch.inputs, scale=0.05)
    expected = reference.attention(batch.query, batch.key_cache, batch.value_cache, batch.inputs, scale=0.05)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("num_decodes", [0, 1, 2, 5])
def test_a_captured_batch_counts_its_decodes_on_the_device(num_decodes: int, window: int, subject: Subject) -> None:
    prompts = ((20, 20), (3, 9), (1, 33))
    batch = paged_batch(((1, 70),) * num_decodes + prompts, HeadShape(6, 2, 64), 8, torch.float32)
    arguments = (batch.query, batch.key_cache, batch.value_cache, batch.inputs)
    exact = oracle.attention(*arguments, scale=0.125, sliding_window=window)
    step = with_room(batch.inputs, num_decodes_max=7, num_prompts_max=4)
    query = torch.cat((batch.query, torch.full((9, batch.query.shape[1]), torch.nan)))
    run = subject.registry.kernel("cpu", "attention").run
    found = run(query, *arguments[1:3], step, scale=0.125, sliding_window=window)
    expect_close(found[: exact.shape[0]], exact, torch.float32, "attention")


def with_room(inputs: StepInputs, num_decodes_max: int, num_prompts_max: int) -> StepInputs:
    """The same step, as captured ones have it: with room for sequences that are not there, and for nine more rows."""
    num_decodes, num_seqs = inputs.num_decodes, inputs.context_lens.shape[0]
    starts = torch.full((num_decodes_max + num_prompts_max + 1,), int(inputs.query_starts[-1]), dtype=torch.int32)
    starts[:num_decodes_max] = num_decodes
    starts[num_decodes_max : num_decodes_max + num_seqs - num_decodes + 1] = inputs.query_starts[num_decodes:]
    rows = torch.full((num_decodes_max + num_prompts_max,), -1)
    rows[:num_decodes] = torch.arange(num_decodes)
    rows[num_decodes_max : num_decodes_max + num_seqs - num_decodes] = torch.arange(num_decodes, num_seqs)
    return replace(
        inputs,
        positions=torch.cat((inputs.positions, torch.zeros(9, dtype=inputs.positions.dtype))),
        query_starts=starts,
        context_lens=torch.where(rows < 0, 0, inputs.context_lens[rows]),
        block_tables=inputs.block_tables[rows],
        num_decodes=num_decodes_max,
        decode_count=starts[num_decodes_max : num_decodes_max + 1],
    )
