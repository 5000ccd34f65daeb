"""Instances with real executors, driven by a loop small enough to be read."""

import queue
from collections import deque
from dataclasses import dataclass, field
from typing import Self

from backends.executor_settings import ExecutorSettings
from backends.model_runner.loaded_model import LoadModel, load_model
from backends.model_runner.torch_executor import TorchStepExecutor
from sagellm.core.config import InstanceConfig
from sagellm.core.identity import RequestId
from sagellm.core.messages import (
    AssignRequest,
    EmitTokens,
    HandoverFinished,
    InstanceEffect,
    InstanceEvent,
    KVReserved,
    KVTransferred,
    PrefillFinished,
    ReleaseKV,
    RequestFinished,
    RequestMoved,
    ReserveKV,
    RunStep,
    StepFailed,
    TransferKV,
)
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.core.step_executor import StepOutcome, TokenLogprobs
from sagellm.runtime.instance import Instance

_OUTCOME_S = 20.0


@dataclass
class Machine:
    """One instance and its executor."""

    instance: Instance
    executor: TorchStepExecutor
    outcomes: "queue.SimpleQueue[StepOutcome]"
    num_in_flight: int = 0
    inbox: deque[InstanceEvent] = field(default_factory=deque)


class InstanceLoop:
    """One or two instances. With two, the first prefills and hands over to the second."""

    def __init__(
        self,
        *configs: InstanceConfig,
        loads: tuple[LoadModel, ...] = (),
        model: str = "test",
        backend: str = "cpu",
    ) -> None:
        self.outputs: dict[RequestId, list[int]] = {}
        self.logprobs: dict[RequestId, list[TokenLogprobs]] = {}
        self.reasons: dict[RequestId, FinishReason] = {}
        self.steps: list[RunStep] = []
        self.failures: list[StepFailed] = []
        self.num_in_flight_max = 0
        self.num_blocks_moved = 0
        self.deaths: list[str] = []
        self._specs: dict[RequestId, RequestSpec] = {}
        self._now_ns = 0
        self.machines = []
        for index, config in enumerate(configs):
            load = loads[index] if loads else load_model
            executor_settings = ExecutorSettings(instance=config, model=model, backend=backend)
            machine = Machine(Instance(config), TorchStepExecutor(executor_settings, load), queue.SimpleQueue())
            machine.executor.start(machine.outcomes.put, self.deaths.append)
            self.machines.append(machine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.machines:
            machine.executor.close()

    # --- what tests call ----------------------------------------------------------------------------

    def submit(self, spec: RequestSpec, output_token_ids: tuple[int, ...] = ()) -> None:
        self._specs[spec.request_id] = spec
        self.outputs[spec.request_id] = list(output_token_ids)
        first = self.machines[0]
        first.executor.add_request(spec, output_token_ids)
        first.inbox.append(
            AssignRequest(
                first.instance.config.instance_id,
                spec,
                hand_over=len(self.machines) > 1,
                num_output_tokens=len(output_token_ids),
                output_token_ids=output_token_ids or None,
            )
        )

    def run(self) -> None:
        """Until all requests are over."""
        while True:
            for machine in self.machines:
                self._turn(machine)
            if len(self.reasons) == len(self._specs) or self.deaths:
                break
            if not any(machine.inbox for machine in self.machines):
                self._await_outcome()
        for machine in self.machines:
            self._settle(machine)
            machine.instance.check()

    # --- the loop -----------------------------------------------------------------------------------

    def _turn(self, machine: Machine) -> None:
        self._now_ns += 1
        while machine.inbox:
            machine.instance.handle(machine.inbox.popleft(), self._now_ns)
        for effect in machine.instance.poll(self._now_ns):
            self._perform(machine, effect)

    def _settle(self, machine: Machine) -> None:
        while machine.num_in_flight and not self.deaths:
            self._take(machine, machine.outcomes.get(timeout=_OUTCOME_S))
            self._turn(machine)
        self._turn(machine)

    def _await_outcome(self) -> None:
        busy = [machine for machine in self.machines if machine.num_in_flight]
        assert busy, "nothing runs, and requests are left"
        self._take(busy[0], busy[0].outcomes.get(timeout=_OUTCOME_S))

    def _take(self, machine: Machine, outcome: StepOutcome) -> None:
        machine.num_in_flight -= 1
        machine.inbox.append(outcome.event)
        if isinstance(outcome.event, StepFailed):
            self.failures.append(outcome.event)
        for request_id, entries in outcome.logprobs.items():
            self.logprobs.setdefault(request_id, []).extend(entries)

    def _perform(self, machine: Machine, effect: InstanceEffect) -> None:
        match effect:
            case RunStep():
                assert effect.repeat_max == 1
                self.steps.append(effect)
                machine.num_in_flight += 1
                self.num_in_flight_max = max(self.num_in_flight_max, machine.num_in_flight)
                machine.executor.launch(effect)
            case EmitTokens(request_ids=request_ids, token_ids=token_ids):
                assert token_ids is not None
                for request_id, ids in zip(request_ids, token_ids, strict=True):
                    self.outputs[request_id].extend(ids)
            case RequestFinished(request_id=request_id, reason=reason):
                machine.executor.remove_request(request_id)
                self.reasons[request_id] = reason
            case _:
                self._hand_over(machine, effect)

    def _hand_over(self, machine: Machine, effect: InstanceEffect) -> None:
        source, target = self.machines[0], self.machines[-1]
        target_id = target.instance.config.instance_id
        match effect:
            case PrefillFinished(request_id=request_id):
                if machine is source and machine is not target and request_id not in self.reasons:
                    spec = self._specs[request_id]
                    target.executor.add_request(spec, ())
                    target.inbox.append(ReserveKV(target_id, spec, source.instance.config.instance_id, attempt=0))
            case KVReserved():
                source.inbox.append(effect)
            case TransferKV():
                data = source.executor.read_blocks(effect.source_block_ids)
                target.executor.write_blocks(effect.target_block_ids, data)
                self.num_blocks_moved += len(effect.source_block_ids)
                source.inbox.append(KVTransferred(effect.transfer_id))
            case HandoverFinished():
                target.executor.add_request(self._specs[effect.request_id], effect.output_token_ids or ())
                target.inbox.append(effect)
            case ReleaseKV():
                target.executor.remove_request(effect.request_id)
                target.inbox.append(effect)
            case RequestMoved(request_id=request_id):
                source.executor.remove_request(request_id)
            case _:
                raise AssertionError(f"not looked after: {effect}")
