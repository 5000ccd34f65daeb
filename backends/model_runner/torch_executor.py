"""Runs an instance's steps with torch, on any device that a hardware backend drives.

One thread launches: it alone touches the model, in the order of the calls. Where the device works beside the
host, a second thread waits for the steps' events and reports them, so that a step is launched while the one
before it runs.
"""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import torch

from backends.base import HardwareBackend
from backends.executor_settings import ExecutorSettings
from backends.model_runner.device_failures import compiler_errors, first_line, is_out_of_memory, let_go_of_frames
from backends.model_runner.executor_error import ExecutorError
from backends.model_runner.kv_blocks import KVBlocks
from backends.model_runner.loaded_model import LoadModel, load_model
from backends.model_runner.runner_start import device_name, started_runner
from backends.model_runner.step_runner import StepMemory, StepRunner, StepTokens
from backends.registry import get_backend
from backends.streams import DeviceEvent, DeviceStream
from sagellm.core.identity import BlockId, RequestId
from sagellm.core.messages import RunStep, StepFailed, StepFinished
from sagellm.core.request import RequestSpec
from sagellm.core.step_executor import StepOutcome, TokenLogprobs

_JOIN_S = 10.0

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class _LaunchedStep:
    """A step on its way back. ``tokens`` is None where it failed, and ``failure`` says why."""

    step: RunStep
    memory: StepMemory
    tokens: StepTokens | None
    event: DeviceEvent | None
    failure: str = ""


class TorchStepExecutor:
    """A `StepExecutor` of one device.

    ``load`` gives the model; another one than `load_model` serves programs that are not lowered graphs.
    """

    def __init__(self, settings: ExecutorSettings, load: LoadModel = load_model) -> None:
        self._settings = settings
        self._instance = settings.instance
        self._load_model = load
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._launched: queue.SimpleQueue[_LaunchedStep | None] = queue.SimpleQueue()
        self._spare_memory: queue.SimpleQueue[StepMemory] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._death = threading.Lock()  # held from the moment of death on
        self._backend: HardwareBackend
        self._stream: DeviceStream
        self._copy_stream: DeviceStream
        self._runner: StepRunner | None = None
        self._kv: KVBlocks | None = None

    # --- calls of the driver ------------------------------------------------------------------------

    def start(self, on_outcome: Callable[[StepOutcome], None], on_dead: Callable[[str], None]) -> None:
        """See `StepExecutor`.

        Raises ExecutorError, or ValueError or BackendError of one sentence, where the model cannot be loaded,
        the device is not there, or the KV cache does not fit beside the model.
        """
        self._on_outcome, self._on_dead = on_outcome, on_dead
        self._backend = get_backend(self._settings.backend)
        self._device_index = self._settings.device_indexes[0]
        self._stream = self._backend.create_stream(self._device_index)
        self._copy_stream = self._backend.create_stream(self._device_index)
        self._works_beside_host = self._backend.capabilities(self._device_index).concurrent_streams
        self._start_thread(self._run_commands, "executor-launch")
        if self._works_beside_host:
            self._start_thread(self._report_launched, "executor-report")
        try:
            self._ask(self._load).result()
        except BaseException as error:
            let_go_of_frames(error)  # of the thread that launches: they have the model and its KV
            self.close()
            raise

    def add_request(self, request: RequestSpec, output_token_ids: tuple[int, ...]) -> None:
        """See `StepExecutor`."""
        self._commands.put(lambda: self._started().requests.add(request, output_token_ids))

    def remove_request(self, request_id: RequestId) -> None:
        """See `StepExecutor`."""
        self._commands.put(lambda: self._started().requests.remove(request_id))

    def launch(self, step: RunStep) -> None:
        """See `StepExecutor`."""
        self._commands.put(lambda: self._run_step(step))

    def read_blocks(self, block_ids: tuple[BlockId, ...]) -> bytes:
        """See `StepExecutor`. Raises ExecutorError where there is no such block, or the executor is dead."""
        kv = self._living_kv()
        kv.checked(block_ids, len(block_ids) * kv.block_bytes)
        host, event = self._ask(lambda: kv.read(block_ids, self._copy_stream)).result()
        event.synchronize()
        return host.numpy().tobytes()

    def write_blocks(self, block_ids: tuple[BlockId, ...], data: bytes) -> None:
        """See `StepExecutor`. Also raises where there is no such block, or the executor is dead.

        Returns when the order is given. An executor that then cannot write is dead: nobody would know
        that the blocks do not hold what they should.
        """
        kv = self._living_kv()
        kv.checked(block_ids, len(data))
        host = kv.host_memory(len(block_ids))
        host.numpy().reshape(-1).view("u1")[:] = memoryview(data)
        self._commands.put(lambda: self._write(kv, block_ids, host))

    def close(self) -> None:
        """See `StepExecutor`."""
        self._commands.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_JOIN_S)
        self._threads.clear()
        self._runner = self._kv = None
        if hasattr(self, "_backend"):
            self._backend.release_cached_memory()

    # --- the launching thread -----------------------------------------------------------------------

    def _run_commands(self) -> None:
        self._backend.set_device(self._device_index)
        if self._settings.num_threads:
            torch.set_num_threads(self._settings.num_threads)
        try:
            with torch.inference_mode(), self._backend.use_stream(self._stream):
                while (command := self._commands.get()) is not None:
                    command()
        except BaseException as error:
            self._die(f"the launching thread failed: {error!r}")
            raise
        finally:
            self._launched.put(None)

    def _started(self) -> StepRunner:
        assert self._runner is not None, "the executor was not started"
        return self._runner

    def _load(self) -> None:
        self._runner, self._kv = started_runner(self._settings, self._backend, self._load_model)

    def _run_step(self, step: RunStep) -> None:
        if self._death.locked():
            return
        memory = self._step_memory()
        try:
            with compiler_errors():
                tokens = self._started().run(step.plan, memory)
            event = self._backend.create_event(device_index=self._device_index)
            event.record()
            launched = _LaunchedStep(step, memory, tokens, event)
        except (RuntimeError, MemoryError, ExecutorError) as error:
            if not self._survives(error):
                return
            launched = _LaunchedStep(step, memory, None, None, first_line(error))
        if self._works_beside_host:
            self._launched.put(launched)
        else:
            self._report(launched)

    def _survives(self, error: Exception) -> bool:
        """Whether the device still works after a step failed. It is asked, since an error of its own stays."""
        if is_out_of_memory(error):
            # What the step held up to there can only be given back once its frames do not hold it any more.
            let_go_of_frames(error)
            self._backend.release_cached_memory()
        try:
            self._backend.synchronize(self._device_index)
        except RuntimeError as sticky:
            self._die(first_line(sticky))
            return False
        return True

    def _write(self, kv: KVBlocks, block_ids: tuple[BlockId, ...], host: torch.Tensor) -> None:
        try:
            try:
                kv.write(block_ids, host, self._copy_stream)
            except (torch.OutOfMemoryError, MemoryError):
                self._backend.release_cached_memory()
                kv.write(block_ids, host, self._copy_stream)
        except (RuntimeError, MemoryError) as error:
            self._die(f"KV could not be written: {first_line(error)}")

    def _step_memory(self) -> StepMemory:
        try:
            return self._spare_memory.get_nowait()
        except queue.Empty:
            return StepMemory(self._backend, self._device_index, self._instance.max_num_seqs)

    # --- reports ------------------------------------------------------------------------------------

    def _report_launched(self) -> None:
        self._backend.set_device(self._device_index)
        while (launched := self._launched.get()) is not None:
            if not self._death.locked():
                self._report(launched)

    def _report(self, launched: _LaunchedStep) -> None:
        """Wait for the step and tell the driver."""
        if launched.event is not None:
            try:
                launched.event.synchronize()
            except RuntimeError as error:
                self._die(first_line(error))
                return
        outcome = _outcome(launched, time.monotonic_ns())
        self._spare_memory.put(launched.memory)
        self._on_outcome(outcome)

    def _die(self, reason: str) -> None:
        if self._death.acquire(blocking=False):
            self._on_dead(f"{self._device_name()}: {reason}")

    # --- what both need -----------------------------------------------------------------------------

    def _start_thread(self, target: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _ask(self, question: Callable[[], _Result]) -> Future[_Result]:
        """Have the launching thread answer in its turn."""
        answer: Future[_Result] = Future()

        def command() -> None:
            try:
                answer.set_result(question())
            except (ValueError, RuntimeError, MemoryError) as error:
                answer.set_exception(error)
            except BaseException as error:
                answer.set_exception(error)
                raise

        self._commands.put(command)
        return answer

    def _living_kv(self) -> KVBlocks:
        if self._kv is None or self._death.locked():
            raise ExecutorError("the executor is not started, closed or dead; it has no KV")
        return self._kv

    def _device_name(self) -> str:
        return device_name(self._settings)


def _outcome(launched: _LaunchedStep, end_ns: int) -> StepOutcome:
    step, tokens = launched.step, launched.tokens
    if tokens is None:
        return StepOutcome(StepFailed(step.instance_id, step.step_id, launched.failure))
    token_ids = tokens.token_ids()
    sampled_ids = step.plan.sampled_request_ids
    invalid_ids: tuple[RequestId, ...] = ()
    if token_ids and min(token_ids) < 0:
        invalid_ids = tuple(
            request_id for request_id, token_id in zip(sampled_ids, token_ids, strict=True) if token_id < 0
        )
        token_ids = [max(token_id, 0) for token_id in token_ids]
    drawn = tuple((token_id,) for token_id in token_ids)
    event = StepFinished(step.instance_id, step.step_id, (end_ns,), drawn, invalid_ids)
    logprobs: dict[RequestId, tuple[TokenLogprobs, ...]] = {
        sampled_ids[place]: (entry,) for place, entry in tokens.token_logprobs().items()
    }
    return StepOutcome(event, logprobs)
