"""Texts as an instance generates them: its machine decides, the executor runs its steps, replaying device graphs."""

import queue
from collections import deque

from backends.executor_settings import ExecutorSettings
from backends.model_runner.torch_executor import TorchStepExecutor
from sagellm.core.identity import RequestId
from sagellm.core.messages import (
    AssignRequest,
    EmitTokens,
    InstanceEffect,
    InstanceEvent,
    RequestFinished,
    RunStep,
    StepFailed,
)
from sagellm.core.request import RequestSpec
from sagellm.core.sampling import GREEDY
from sagellm.core.step_executor import StepOutcome
from sagellm.runtime.instance import Instance

_OUTCOME_S = 60.0


class InstanceTexts:
    """One run of an instance, from its requests to their texts. The instance's ``repeat_max`` must be 1."""

    def __init__(self, settings: ExecutorSettings) -> None:
        self._instance_id = settings.instance.instance_id
        self._instance = Instance(settings.instance)
        self._executor = TorchStepExecutor(settings)
        self._outcomes: queue.SimpleQueue[StepOutcome | str] = queue.SimpleQueue()
        self._inbox: deque[InstanceEvent] = deque()
        self._texts: dict[RequestId, list[int]] = {}
        self._num_running = 0
        self._now_ns = 0

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """The most likely tokens after each prompt; raises RuntimeError where a step fails."""
        self._executor.start(self._outcomes.put, self._outcomes.put)
        try:
            for index, prompt in enumerate(prompts):
                self._submit(RequestId(str(index)), prompt, num_tokens)
            while self._num_running:
                self._turn()
                if self._num_running and not self._inbox:
                    self._inbox.append(self._next_event())
        finally:
            self._executor.close()
        return list(self._texts.values())

    def _submit(self, request_id: RequestId, prompt: list[int], num_tokens: int) -> None:
        spec = RequestSpec(request_id, 0, len(prompt), num_tokens, prompt_token_ids=tuple(prompt), sampling=GREEDY)
        self._texts[request_id] = []
        self._num_running += 1
        self._executor.add_request(spec, ())
        self._inbox.append(AssignRequest(self._instance_id, spec))

    def _turn(self) -> None:
        self._now_ns += 1
        while self._inbox:
            self._instance.handle(self._inbox.popleft(), self._now_ns)
        for effect in self._instance.poll(self._now_ns):
            self._perform(effect)

    def _perform(self, effect: InstanceEffect) -> None:
        match effect:
            case RunStep():
                self._executor.launch(effect)
            case EmitTokens(request_ids=request_ids, token_ids=token_ids):
                for request_id, ids in zip(request_ids, token_ids or (), strict=True):
                    self._texts[request_id].extend(ids)
            case RequestFinished(request_id=request_id):
                self._executor.remove_request(request_id)
                self._num_running -= 1
            case _:
                pass

    def _next_event(self) -> InstanceEvent:
        outcome = self._outcomes.get(timeout=_OUTCOME_S)
        if isinstance(outcome, str):
            raise RuntimeError(f"the executor ended: {outcome}")
        if isinstance(outcome.event, StepFailed):
            raise RuntimeError(f"a step failed: {outcome.event.reason}")
        return outcome.event
