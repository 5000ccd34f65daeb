"""Captured decode steps give what steps launched one by one give, at any batch size and after any capture."""

import gc
import io
import logging
import random
from dataclasses import dataclass

import pytest
import torch
from context_program import loading
from hypothesis import given
from hypothesis import strategies as st
from instance_loop import InstanceLoop
from recording_backend import RecordedGraph, RecordingBackend, install

from backends.model_runner.batch_sizes import NUM_SEQS_CAPTURED_MAX, captured_sizes, sizes_worth_keeping, smallest_size
from backends.model_runner.decode_graphs import DecodeGraphs
from backends.model_runner.graph_set import GraphSet
from backends.model_runner.kv_blocks import KVBlocks
from backends.model_runner.mixed_graphs import NUM_PROMPTS_MAX
from backends.step_inputs import KVTensors, StepInputs, sampled_inputs
from sagellm.core.config import InstanceConfig
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.messages import RunStep
from sagellm.core.request import RequestSpec
from sagellm.core.sampling import GREEDY, SamplingParameters

VOCAB_SIZE = 61
BLOCK_SIZE = 4


@dataclass(slots=True)
class HashProgram:
    """Logits of a number that every token and position of the context goes into; nothing is asked of the host."""

    vocab_size: int = VOCAB_SIZE
    num_positions: int = 200
    num_runs: int = 0

    def run(self, inputs: StepInputs, kv: KVTensors) -> torch.Tensor:
        self.num_runs += 1
        keys = kv.keys[0].view(-1)
        keys.index_copy_(0, inputs.slot_mapping, inputs.token_ids.to(keys.dtype))
        rows = inputs.sampled_rows
        sequences = torch.searchsorted(inputs.query_starts[1:], rows, right=True)
        places = torch.arange(inputs.block_tables.shape[1] * kv.block_size)
        blocks = inputs.block_tables[sequences][:, places // kv.block_size].long()
        tokens = keys[blocks * kv.block_size + places % kv.block_size].long()
        seen = places < inputs.context_lens[sequences].unsqueeze(1)
        seen &= places <= inputs.positions[rows].unsqueeze(1)
        return logits_of(torch.where(seen, hashed(tokens, places), 0).sum(1))


class SplitHashProgram(HashProgram):
    """The same in two parts."""

    def all_rows(self, inputs: StepInputs, kv: KVTensors) -> tuple[torch.Tensor, ...]:
        keys = kv.keys[0].view(-1)
        keys.index_copy_(0, inputs.slot_mapping, inputs.token_ids.to(keys.dtype))
        return (inputs.positions.clone(),)

    def logits(self, hidden: tuple[torch.Tensor, ...], inputs: StepInputs, kv: KVTensors) -> torch.Tensor:
        rows = sampled_inputs(inputs)
        (positions,) = hidden
        assert torch.equal(positions[inputs.sampled_rows], rows.positions)
        places = torch.arange(rows.block_tables.shape[1] * kv.block_size)
        blocks = rows.block_tables[:, places // kv.block_size].long()
        tokens = kv.keys[0].view(-1)[blocks * kv.block_size + places % kv.block_size].long()
        return logits_of(torch.where(places < rows.context_lens.unsqueeze(1), hashed(tokens, places), 0).sum(1))


def hashed(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    mixed = (tokens + 1) * 2654435761 + (positions + 1) * 40503
    return (mixed ^ (mixed >> 13)) * 2246822519 % 1000003


def logits_of(sums: torch.Tensor) -> torch.Tensor:
    return torch.sin(sums.unsqueeze(1) * torch.arange(1, VOCAB_SIZE + 1).double()).float()


def expected_greedy(prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        known = torch.tensor(tokens)
        tokens.append(int(logits_of(hashed(known, torch.arange(known.numel())).sum(0, keepdim=True)).argmax()))
    return tokens[len(prompt) :]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> RecordingBackend:
    return install(RecordingBackend(), monkeypatch)


def config(**limits: int) -> InstanceConfig:
    base = {"num_blocks": 200, "block_size": BLOCK_SIZE, "max_num_seqs": 19, "max_num_batched_tokens": 64}
    return InstanceConfig(InstanceId("i"), repeat_max=1, **{**base, **limits})


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 40))] for _ in range(count)]


def num_decode_steps(steps: list[RunStep]) -> int:
    return sum(not step.plan.chunks for step in steps)


def check_greedy(loop: InstanceLoop, count: int) -> None:
    """Requests of different lengths, so that the batch shrinks one by one."""
    all_prompts = prompts(count)
    for index, prompt in enumerate(all_prompts):
        loop.submit(RequestSpec(RequestId(str(index)), 0, len(prompt), 5 + 3 * index, prompt_token_ids=tuple(prompt)))
    loop.run()
    for index, prompt in enumerate(all_prompts):
        assert loop.outputs[RequestId(str(index))] == expected_greedy(prompt, 5 + 3 * index), f"request {index}"


@pytest.mark.parametrize("steps_in_flight_max", [1, 2])
def test_every_decode_step_is_replayed_and_right(backend: RecordingBackend, steps_in_flight_max: int) -> None:
    program = HashProgram()
    limits = config(steps_in_flight_max=steps_in_flight_max)
    with InstanceLoop(limits, loads=(loading(program),), backend=backend.name) as loop:
        num_runs, num_timed = program.num_runs, backend.num_replays
        check_greedy(loop, 19)
        sizes = {len(step.plan.decode_request_ids) for step in loop.steps if not step.plan.chunks}
        assert len(sizes - set(captured_sizes(19))) > 8, "hardly a step was filled up"
        assert backend.num_captures == len(captured_sizes(19))
        num_replays = backend.num_replays - num_timed
        assert num_replays == num_decode_steps(loop.steps)
        assert program.num_runs - num_runs == len(loop.steps) - num_replays


@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 24}, {"max_num_seqs": 40, "max_num_chunks": 30}])
def test_small_steps_with_prompts_are_replayed_and_right(backend: RecordingBackend, limits: dict[str, int]) -> None:
    program = SplitHashProgram()
    with InstanceLoop(config(**limits), loads=(loading(program),), backend=backend.name) as loop:
        num_runs, num_timed = program.num_runs, backend.num_replays
        check_greedy(loop, 40)
        assert backend.num_captures > len(captured_sizes(19))
        num_launched = program.num_runs - num_runs
        assert backend.num_replays - num_timed == len(loop.steps) - num_launched
        most_prompts = max(len(step.plan.chunks) for step in loop.steps)
        assert (num_launched > 0) == (most_prompts > NUM_PROMPTS_MAX)
        assert any(step.plan.chunks and step.plan.decode_request_ids for step in loop.steps)


def test_preempted_and_resumed(backend: RecordingBackend) -> None:
    with InstanceLoop(config(num_blocks=60), loads=(loading(HashProgram()),), backend=backend.name) as loop:
        check_greedy(loop, 15)
        assert any(step.plan.preempted_request_ids for step in loop.steps)
        assert backend.num_replays > 20


@pytest.mark.parametrize("has_kernel", [False, True])
@pytest.mark.parametrize("is_plain", [False, True])
def test_all_ways_of_drawing(monkeypatch: pytest.MonkeyPatch, is_plain: bool, has_kernel: bool) -> None:
    backend = install(RecordingBackend(has_kernel=has_kernel), monkeypatch)
    wishes = (
        SamplingParameters(seed=2**63 + 11),
        SamplingParameters(seed=12, temperature=0.3),
        GREEDY,
        SamplingParameters(temperature=0.0, num_logprobs=2),
    )
    wishes += (
        ()
        if is_plain
        else (
            SamplingParameters(seed=2, top_p=0.7, temperature=1.4),
            SamplingParameters(seed=3, top_k=7, repetition_penalty=1.5, num_logprobs=1),
            SamplingParameters(seed=5, min_p=0.1, bad_words=((4,), (9, 9)), logit_bias=((9, 2.0),)),
        )
    )
    outputs = []
    for name in (backend.name, "cpu"):
        with InstanceLoop(config(), loads=(loading(HashProgram()),), backend=name) as loop:
            for index, prompt in enumerate(prompts(11)):
                spec = RequestSpec(
                    RequestId(str(index)), 0, len(prompt), 12 + index, prompt_token_ids=tuple(prompt),
                    sampling=wishes[index % len(wishes)],
                )  # fmt: skip
                loop.submit(spec)
            loop.run()
            outputs.append((loop.outputs, loop.logprobs))
            if name == backend.name:
                num_mixed = len(loop.steps) - num_decode_steps(loop.steps)
    assert backend.num_replays > 10
    assert outputs[0] == outputs[1]
    if has_kernel and is_plain:
        # Nothing is left to draw after a replay.
        num_warm_up, num_captured = 4, 2 * len(captured_sizes(19))
        assert backend.num_draws == num_warm_up + num_captured + num_mixed


def test_filling_up_writes_to_nobodys_blocks(backend: RecordingBackend) -> None:
    kv = KVBlocks(backend, 0, (1, 2, 6, BLOCK_SIZE, 1, 1), torch.float32)
    for tensor in (*kv.tensors.keys, *kv.tensors.values):
        tensor[:6] = 7.0
    graphs = DecodeGraphs(HashProgram(), kv, 20, backend, 0)
    graphs.capture(4, io.StringIO())
    step = graphs.step_for(3, 20)
    assert step is not None
    step.places[1] = torch.tensor([3, 9, step.spare_slot, step.spare_slot])
    step.token_ids[:2] = torch.tensor([11, 12])
    step.graph.replay()
    changed = (kv.tensors.keys[0].view(-1)[: step.spare_slot] != 7.0).nonzero().view(-1).tolist()
    assert changed == [3, 9]


@pytest.mark.parametrize("num_captured", [0, 1, 3])
def test_a_capture_that_runs_out_of_memory_is_told_once(
    num_captured: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = install(RecordingBackend(fails_at=num_captured), monkeypatch)
    with (
        caplog.at_level(logging.WARNING),
        InstanceLoop(config(), loads=(loading(HashProgram()),), backend=backend.name) as loop,
    ):
        num_timed = backend.num_replays
        check_greedy(loop, 19)
        # Without a graph of their own, smaller batches are filled up to the smallest that has one.
        assert backend.num_replays - num_timed == (num_decode_steps(loop.steps) if num_captured else 0)
    (record,) = caplog.records
    assert "no room for a graph" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_step_is_filled_up_to_the_size_that_is_replayed_fastest(
    backend: RecordingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GraphSet, "_replayed_s", lambda _, step: 2.0 if step.num_seqs == 8 else 1.0)
    kv = KVBlocks(backend, 0, (1, 2, 40, BLOCK_SIZE, 1, 1), torch.float32)
    graphs = DecodeGraphs(HashProgram(), kv, 20, backend, 0)
    graphs.capture(16, io.StringIO())
    assert len(graphs) == len(captured_sizes(16)) - 1, "a graph is kept that nobody replays"
    sizes = [step.num_seqs for number in (4, 5, 8, 9) if (step := graphs.step_for(number, 20)) is not None]
    assert sizes == [4, 16, 16, 16]


def test_graphs_that_cannot_be_replayed_are_given_up(
    backend: RecordingBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(graph: RecordedGraph) -> None:
        raise RuntimeError("the device refuses the graph")

    monkeypatch.setattr(RecordedGraph, "replay", fail)
    with (
        caplog.at_level(logging.WARNING),
        InstanceLoop(config(), loads=(loading(SplitHashProgram()),), backend=backend.name) as loop,
    ):
        check_greedy(loop, 9)
    (record,) = caplog.records
    assert "up to 19 sequences are launched operator by operator" in record.getMessage()


@given(st.dictionaries(st.integers(1, 40), st.integers(1, 10).map(float), min_size=1))
def test_no_step_is_filled_up_to_a_size_that_a_larger_one_beats(durations_s: dict[int, float]) -> None:
    kept = sizes_worth_keeping(durations_s)
    assert kept[-1] == max(durations_s), "something would fit nowhere"
    assert list(kept) == sorted(kept)
    for size in durations_s:
        chosen = smallest_size(kept, size)
        assert durations_s[chosen] == min(each for other, each in durations_s.items() if other >= size)


def test_what_graphs_read_stays_in_place() -> None:
    backend = RecordingBackend(has_kernel=True)
    kv = KVBlocks(backend, 0, (1, 2, 6, BLOCK_SIZE, 1, 1), torch.float32)
    graphs = DecodeGraphs(HashProgram(), kv, 20, backend, 0)
    graphs.capture(9, io.StringIO())
    memory = [each for graph in backend.graphs for each in graph.memory_from_outside()]
    assert len(memory) >= 4 * len(graphs), "inputs, cache and logits at least"
    for graph in backend.graphs:
        graph.reset()  # a device's graph keeps nothing
    gc.collect()
    assert not any(each.expired() for each in memory)
    del graphs
    gc.collect()
    assert any(each.expired() for each in memory)


def test_a_context_beyond_the_models_is_not_replayed(backend: RecordingBackend) -> None:
    kv = KVBlocks(backend, 0, (1, 2, 6, BLOCK_SIZE, 1, 1), torch.float32)
    graphs = DecodeGraphs(HashProgram(), kv, 20, backend, 0)
    graphs.capture(4, io.StringIO())
    assert graphs.step_for(4, 20) is not None
    assert graphs.step_for(4, 21) is None
    assert graphs.step_for(5, 20) is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_seen_on_a_terminal_alone(backend: RecordingBackend) -> None:
    kv = KVBlocks(backend, 0, (1, 2, 6, BLOCK_SIZE, 1, 1), torch.float32)
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        DecodeGraphs(HashProgram(), kv, 20, backend, 0).capture(20, stream)
    assert pipe.getvalue() == ""
    last_line = terminal.getvalue().rsplit("\r", 1)[-1]
    assert f"{len(captured_sizes(20))} / {len(captured_sizes(20))}" in last_line
    assert "GiB" in last_line
    assert last_line.endswith("\n")


@pytest.mark.parametrize("num_seqs_max", [1, 2, 3, 7, 8, 9, 100, 255, 256, 257, 512, 4000])
def test_sizes_rise_and_waste_little(num_seqs_max: int) -> None:
    sizes = captured_sizes(num_seqs_max)
    assert sizes[-1] == min(num_seqs_max, NUM_SEQS_CAPTURED_MAX)
    assert list(sizes) == sorted(set(sizes))
    for num_seqs in range(1, sizes[-1] + 1):
        size = smallest_size(sizes, num_seqs)
        assert num_seqs <= size < 2 * num_seqs or num_seqs == size
        assert size - num_seqs < max(8, size / 16)
    assert smallest_size(sizes, sizes[-1] + 1) == 0
    assert smallest_size((), 1) == 0
