"""What `StepExecutor` promises beside tokens: order, KV as bytes, errors in their place, a clean end."""

import queue
import threading
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import pytest
import torch
from context_program import NUM_POSITIONS, VOCAB_SIZE, ContextProgram, expected_greedy, loading

from backends.cpu.backend import CpuBackend
from backends.errors import BackendError
from backends.executor_settings import ExecutorSettings
from backends.model_runner.executor_error import ExecutorError
from backends.model_runner.factory import make_executor
from backends.model_runner.torch_executor import TorchStepExecutor
from backends.step_inputs import StepInputs
from sagellm.core.config import InstanceConfig
from sagellm.core.identity import BlockId, InstanceId, RequestId, StepId
from sagellm.core.messages import RunStep, StepFailed, StepFinished
from sagellm.core.plan import StepPlan, TokenChunk
from sagellm.core.request import RequestSpec
from sagellm.core.sampling import SamplingParameters
from sagellm.core.step_executor import StepOutcome

INSTANCE = InstanceId("i0")
A, B = RequestId("a"), RequestId("b")
WAIT_S = 20.0


def settings(**fields: object) -> ExecutorSettings:
    instance = InstanceConfig(INSTANCE, num_blocks=32, block_size=4, max_num_seqs=8, repeat_max=1)
    return ExecutorSettings(**{"instance": instance, "model": "test", "backend": "cpu", **fields})  # type: ignore[arg-type]


class Bench:
    """An executor that is told plans by hand."""

    def __init__(
        self, before_run: Callable[[int, StepInputs], None] | None = None, num_positions: int = NUM_POSITIONS
    ) -> None:
        self.outcomes: queue.SimpleQueue[StepOutcome] = queue.SimpleQueue()
        self.deaths: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.program = ContextProgram(before_run, num_positions)
        self.executor = TorchStepExecutor(settings(), loading(self.program))
        self.executor.start(self.outcomes.put, self.deaths.put)
        self._num_steps = 0

    def launch(
        self,
        decodes: tuple[RequestId, ...] = (),
        chunks: tuple[TokenChunk, ...] = (),
        blocks: tuple[tuple[RequestId, tuple[int, ...]], ...] = (),
        preempted: tuple[RequestId, ...] = (),
    ) -> None:
        new = tuple((request_id, tuple(map(BlockId, block_ids))) for request_id, block_ids in blocks)
        plan = StepPlan(decodes, 0, chunks, new, preempted)
        self.executor.launch(RunStep(INSTANCE, StepId(self._num_steps), plan))
        self._num_steps += 1

    def outcome(self) -> StepOutcome:
        return self.outcomes.get(timeout=WAIT_S)

    def tokens(self) -> list[int]:
        event = self.outcome().event
        assert isinstance(event, StepFinished), event
        assert event.token_ids is not None
        return [token_id for (token_id,) in event.token_ids]


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.executor.close()


def spec(request_id: RequestId, prompt: list[int], num_tokens: int = 20, **fields: object) -> RequestSpec:
    return RequestSpec(request_id, 0, len(prompt), num_tokens, prompt_token_ids=tuple(prompt), **fields)  # type: ignore[arg-type]


def whole(request_id: RequestId, num_tokens: int) -> tuple[TokenChunk, ...]:
    return (TokenChunk(request_id, num_tokens, 0, True),)


PROMPT = [3, 1, 4, 1, 5]
OUTPUT = expected_greedy(PROMPT, 8)


def test_steps_are_launched_before_tokens_are_known(bench: Bench) -> None:
    bench.executor.add_request(spec(A, PROMPT), ())
    bench.launch(chunks=whole(A, 5), blocks=((A, (7, 3)),))
    for _ in range(3):
        bench.launch((A,))
    bench.launch((A,), blocks=((A, (30,)),))
    assert [bench.tokens() for _ in range(5)] == [[token] for token in OUTPUT[:5]]


def test_a_request_may_leave_while_its_steps_are_under_way_and_its_place_be_taken(bench: Bench) -> None:
    bench.executor.add_request(spec(A, PROMPT), ())
    bench.launch(chunks=whole(A, 5), blocks=((A, (0, 1)),))
    bench.launch((A,))
    bench.executor.remove_request(A)
    bench.executor.add_request(spec(B, [9, 9]), ())
    bench.launch(chunks=whole(B, 2), blocks=((B, (2,)),))
    bench.executor.add_request(spec(A, [8]), ())
    bench.launch((B,), whole(A, 1), blocks=((A, (4,)),))
    b_output = expected_greedy([9, 9], 2)
    assert [bench.tokens() for _ in range(3)] == [[OUTPUT[0]], [OUTPUT[1]], [b_output[0]]]
    assert bench.tokens() == [b_output[1], expected_greedy([8], 1)[0]]


def test_history_is_cut_where_a_chunk_says_that_it_ends(bench: Bench) -> None:
    bench.executor.add_request(spec(A, PROMPT), ())
    bench.launch(chunks=whole(A, 5), blocks=((A, (0, 1)),))
    for _ in range(3):
        bench.launch((A,))  # the last two of these are void
    bench.launch(chunks=whole(A, 6), blocks=((A, (5, 6)),), preempted=(A,))
    bench.launch((A,))
    assert [bench.tokens()[0] for _ in range(6)] == [*OUTPUT[:4], OUTPUT[1], OUTPUT[2]]


def test_room_that_is_reserved_again_begins_a_new_table(bench: Bench) -> None:
    bench.executor.add_request(spec(A, PROMPT), ())
    bench.executor.add_request(spec(B, PROMPT), ())
    bench.launch(chunks=whole(A, 5), blocks=((A, (0, 1)), (B, (10, 11))))
    bench.executor.add_request(spec(B, PROMPT), ())
    bench.launch((A,), blocks=((B, (20, 21)),))
    kv = bench.executor.read_blocks((BlockId(0), BlockId(1)))
    bench.executor.write_blocks((BlockId(20), BlockId(21)), kv)
    assert [bench.tokens(), bench.tokens()] == [[OUTPUT[0]], [OUTPUT[1]]]
    bench.executor.add_request(spec(B, PROMPT), (OUTPUT[0],))
    # The first decode may come with the block that it needs; it extends the table.
    bench.launch((B,), blocks=((B, (22,)),))
    bench.launch((B,))
    assert [bench.tokens(), bench.tokens()] == [[OUTPUT[1]], [OUTPUT[2]]]


def test_blocks_are_read_as_launched_steps_leave_them(bench: Bench) -> None:
    bench.executor.add_request(spec(A, PROMPT), ())
    bench.launch(chunks=whole(A, 5), blocks=((A, (4, 2)),))
    data = bench.executor.read_blocks((BlockId(2), BlockId(4)))
    kv = torch.frombuffer(bytearray(data), dtype=torch.float32).view(2, 1, 2, 4)  # blocks, layers, sides, tokens
    assert kv[1, 0].tolist() == [PROMPT[:4], [0, 1, 2, 3]]
    assert kv[0, 0, :, 0].tolist() == [PROMPT[4], 4]
    bench.executor.write_blocks((BlockId(9), BlockId(8)), data)
    assert bench.executor.read_blocks((BlockId(8), BlockId(9))) == data[len(data) // 2 :] + data[: len(data) // 2]


def test_bytes_that_do_not_fit_are_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="data: 7 bytes, must be 32 for 1 blocks of 32 bytes"):
        bench.executor.write_blocks((BlockId(0),), b"x" * 7)
    with pytest.raises(ValueError, match="block_ids: 32 is none of 32 blocks"):
        bench.executor.read_blocks((BlockId(32),))


def test_a_plan_that_makes_no_sense_fails_and_nothing_else(bench: Bench) -> None:
    bench.executor.add_request(spec(A, PROMPT), ())
    bench.launch(chunks=whole(B, 5), blocks=((A, (0, 1)),))
    bench.launch(chunks=whole(A, 9))
    bench.launch(chunks=whole(A, 5))
    first, second = bench.outcome().event, bench.outcome().event
    assert isinstance(first, StepFailed)
    assert isinstance(second, StepFailed)
    assert "request b: in a plan, but not known" in first.reason
    assert "request a: 2 blocks of 4 tokens, but its context is 9 tokens long" in second.reason
    assert bench.tokens() == OUTPUT[:1]


@pytest.mark.parametrize(
    ("prompt", "num_tokens"), [([1, VOCAB_SIZE, 2], 5), ([-1], 5)], ids=["beyond the vocabulary", "negative"]
)
def test_a_token_that_the_model_does_not_have_ends_its_request_alone(
    bench: Bench, prompt: list[int], num_tokens: int
) -> None:
    bench.executor.add_request(spec(A, PROMPT), ())
    bench.executor.add_request(spec(B, prompt, num_tokens), ())
    bench.launch(chunks=whole(B, len(prompt)) + whole(A, 5), blocks=((A, (0, 1)), (B, (2,))))
    event = bench.outcome().event
    assert isinstance(event, StepFinished)
    assert event.invalid_request_ids == (B,)
    assert event.token_ids is not None
    assert event.token_ids[0][0] in range(VOCAB_SIZE)  # means nothing, but whoever looks it up finds something
    assert event.token_ids[1] == (OUTPUT[0],)


def test_logprobs_and_wishes_reach_the_sampler(bench: Bench) -> None:
    wishes = SamplingParameters(temperature=0.0, allowed_token_ids=(1, 2, 3), num_logprobs=2)
    bench.executor.add_request(spec(A, PROMPT), ())
    bench.executor.add_request(spec(B, PROMPT, sampling=wishes), ())
    bench.launch(chunks=whole(A, 5) + whole(B, 5), blocks=((A, (0, 1)), (B, (2, 3))))
    outcome = bench.outcome()
    assert isinstance(outcome.event, StepFinished)
    assert outcome.event.token_ids is not None
    ((a_token,), (b_token,)) = outcome.event.token_ids
    (reported,) = outcome.logprobs[B]
    assert set(outcome.logprobs) == {B}
    assert a_token == OUTPUT[0] == reported.token_ids[1]
    assert b_token == reported.token_ids[0]
    assert b_token in (1, 2, 3)
    assert reported.ranks[0] > 1
    assert reported.ranks[1:] == (1, 2)
    assert reported.logprobs[1] >= reported.logprobs[2] >= reported.logprobs[0]


def test_an_error_that_stays_ends_the_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_device(number: int, inputs: StepInputs) -> None:
        if number == 3:
            monkeypatch.setattr(CpuBackend, "synchronize", lambda self, index=None: _raise("CUDA error: unspecified"))
            raise RuntimeError("CUDA error: unspecified")

    bench = Bench(break_device)
    bench.executor.add_request(spec(A, PROMPT), ())
    bench.launch(chunks=whole(A, 5), blocks=((A, (0, 1)),))
    bench.launch((A,))
    bench.launch((A,))
    assert bench.tokens() == OUTPUT[:1]
    assert "CUDA error: unspecified" in bench.deaths.get(timeout=WAIT_S)
    with pytest.raises(ExecutorError, match="dead"):
        bench.executor.read_blocks((BlockId(0),))
    bench.executor.close()
    assert bench.deaths.empty()
    assert bench.outcomes.empty()


def _raise(message: str) -> None:
    raise RuntimeError(message)


def test_it_ends_without_a_trace(bench: Bench) -> None:
    bench.executor.close()
    bench.executor.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("executor")]


def refusal(**fields: object) -> str:
    executor = make_executor(settings(**fields))
    with pytest.raises((ValueError, BackendError)) as caught:
        executor.start(lambda outcome: None, lambda reason: None)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("executor")]
    return str(caught.value)


def test_what_cannot_start_says_why() -> None:
    too_many = InstanceConfig(INSTANCE, num_blocks=10**9, repeat_max=1)
    toy: dict[str, object] = {"model": "sagellm/toy", "load_format": "dummy"}
    reason = refusal(**{**toy, "instance": too_many})
    assert reason.startswith(
        "kv_tokens: 16000000000 tokens of KV (1000000000 blocks of 8192 bytes) need 7629.39 GiB, but cpu:0 has"
    )
    assert "no such model" in refusal(model="no such model")
    assert "device_indexes: (0, 1), must be one device" in refusal(**{**toy, "device_indexes": (0, 1)})
    assert "dtype: 'int3', must be auto or one of" in refusal(**{**toy, "dtype": "int3"})
    assert "load_format: 'gguf', must be one of" in refusal(**{**toy, "load_format": "gguf"})
    assert "'vax'" in refusal(**{**toy, "backend": "vax"})


def test_weights_are_made_up_only_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = tmp_path / "config.json"
    config.write_bytes(resources.files("sagellm.models").joinpath("configs", "toy.json").read_bytes())
    for model in (str(config), str(tmp_path), "Qwen/Qwen3-0.6B", "nobody/nothing"):
        for load_format in ("auto", "safetensors"):
            reason = refusal(model=model, load_format=load_format)
            assert "--load-format dummy" in reason, model
            assert "\n" not in reason
    for model, load_format in ((str(config), "dummy"), (str(tmp_path), "dummy"), ("sagellm/toy", "auto")):
        executor = make_executor(settings(model=model, load_format=load_format))
        executor.start(lambda outcome: None, lambda reason: None)
        executor.close()


def test_a_sequence_that_outgrows_the_model_ends_alone() -> None:
    bench = Bench(num_positions=6)
    bench.executor.add_request(spec(A, PROMPT), ())
    bench.executor.add_request(spec(B, [1]), ())
    bench.launch(chunks=whole(A, 5) + whole(B, 1), blocks=((A, (0, 1)), (B, (2,))))
    bench.launch((A, B))
    bench.launch((A, B))
    events = [bench.outcome().event for _ in range(3)]
    assert [event.invalid_request_ids for event in events if isinstance(event, StepFinished)] == [(), (), (A,)]
    bench.executor.close()
