"""The executor without a device keeps the contract of `StepExecutor`."""

import subprocess
import sys
import threading
import time

import pytest

from backends.executor_settings import ExecutorSettings
from backends.model_runner.executor_error import ExecutorError
from backends.model_runner.factory import make_executor
from backends.null.executor import NullExecutor, made_up_token_id
from sagellm.core.config import InstanceConfig
from sagellm.core.identity import BlockId, InstanceId, RequestId, StepId
from sagellm.core.messages import RunStep, StepFinished
from sagellm.core.plan import StepPlan, TokenChunk
from sagellm.core.request import RequestSpec
from sagellm.core.sampling import SamplingParameters
from sagellm.core.step_executor import StepOutcome

INSTANCE = InstanceId("i0")
SETTINGS = ExecutorSettings(instance=InstanceConfig(INSTANCE, num_blocks=8), model="none", backend="none")
A = RequestId("a")


def request(request_id: RequestId = A, sampling: SamplingParameters | None = None) -> RequestSpec:
    return RequestSpec(request_id, 0, num_prompt_tokens=5, max_output_tokens=30, sampling=sampling)


def step(step_id: int, decodes: tuple[RequestId, ...] = (), chunks: tuple[TokenChunk, ...] = ()) -> RunStep:
    return RunStep(INSTANCE, StepId(step_id), StepPlan(decodes, 0, chunks, ()))


def started(executor: NullExecutor) -> list[StepOutcome]:
    outcomes: list[StepOutcome] = []
    executor.start(outcomes.append, pytest.fail)
    return outcomes


def tokens_of(outcome: StepOutcome) -> tuple[tuple[int, ...], ...] | None:
    assert isinstance(outcome.event, StepFinished)
    return outcome.event.token_ids


def test_tokens_follow_the_output_position_through_cuts_and_restarts() -> None:
    executor = NullExecutor(SETTINGS)
    outcomes = started(executor)
    executor.add_request(request(), (1, 2))
    executor.launch(step(0, chunks=(TokenChunk(A, 4, 0, False),)))
    executor.launch(step(1, chunks=(TokenChunk(A, 3, 4, True),)))
    executor.launch(step(2, (A,)))
    executor.launch(step(3, chunks=(TokenChunk(A, 7, 0, True),)))
    assert [tokens_of(outcome) for outcome in outcomes] == [
        (),
        ((made_up_token_id(2),),),
        ((made_up_token_id(3),),),
        ((made_up_token_id(2),),),
    ]
    assert made_up_token_id(2) != made_up_token_id(3)


def test_steps_last_as_long_as_told_one_after_the_other() -> None:
    executor = NullExecutor(SETTINGS, step_duration_ns=lambda plan: 20_000_000)
    ends: list[tuple[int, int]] = []
    over = threading.Event()

    def on_outcome(outcome: StepOutcome) -> None:
        ends.append((outcome.event.step_id, time.monotonic_ns()))
        if len(ends) == 2:
            over.set()

    executor.start(on_outcome, pytest.fail)
    executor.add_request(request(), (1,))
    begin_ns = time.monotonic_ns()
    executor.launch(step(0, (A,)))
    executor.launch(step(1, (A,)))
    assert not ends
    assert over.wait(5)
    executor.close()
    assert [step_id for step_id, _ in ends] == [0, 1]
    assert ends[0][1] - begin_ns >= 20_000_000
    assert ends[1][1] - begin_ns >= 40_000_000


def test_logprobs_come_for_those_that_asked() -> None:
    executor = NullExecutor(SETTINGS)
    outcomes = started(executor)
    executor.add_request(request(sampling=SamplingParameters(num_logprobs=3)), (1,))
    executor.add_request(request(RequestId("b")), (1,))
    executor.launch(step(0, (A, RequestId("b"))))
    ((token,),) = [entry.token_ids[:1] for entry in outcomes[0].logprobs[A]]
    assert ((token,),) == tokens_of(outcomes[0])[:1]  # type: ignore[index]
    assert len(outcomes[0].logprobs[A][0].token_ids) == 4
    assert set(outcomes[0].logprobs) == {A}


def test_what_is_wrong_is_said() -> None:
    executor = NullExecutor(SETTINGS)
    started(executor)
    with pytest.raises(ExecutorError, match="request a: in a plan, but not known"):
        executor.launch(step(0, (A,)))
    with pytest.raises(ValueError, match="data: 1 bytes, must be 2"):
        executor.write_blocks((BlockId(0), BlockId(1)), b"x")


def test_factory_gives_it_without_torch() -> None:
    assert isinstance(make_executor(SETTINGS), NullExecutor)
    code = "import sys, backends.model_runner.factory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
