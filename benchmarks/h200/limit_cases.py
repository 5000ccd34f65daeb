"""The cases of `check_limits`: each provokes one shortage, runs in a process of its own, and says what it saw.

What is not as it must be raises AssertionError.
"""

import asyncio
import gc
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import backends
from backends.executor_settings import ExecutorSettings
from benchmarks.h200.limit_models import (
    CLOSE_BY_DTYPE,
    NUM_OUTPUT_TOKENS,
    SMALL_MODELS,
    SmallModel,
    folder_of,
    read_expected,
)
from benchmarks.h200.memory_hog import MemoryHog
from sagellm.core.config import ControlPlaneConfig, InstanceConfig
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.core.sampling import GREEDY

if TYPE_CHECKING:
    import torch

    from backends.base import HardwareBackend
    from backends.model_runner.loaded_model import LoadedModel
    from backends.step_inputs import KVTensors, ModelProgram, StepInputs
    from sagellm.server.live.front_driver import LiveEngine

REFUSED_S_MAX = 5.0
LEFT_BYTES_MAX = 64 << 20
_LONG_CHUNK = 8192  # tokens, whose activations are larger than what the allocator has left over here and there
_LARGE_MODEL = "Qwen/Qwen2.5-72B"  # 271 GiB in float32
_MARK = "SAGELLM_CHECK_LIMITS"
BeforeRun = Callable[["ModelProgram", "StepInputs", "KVTensors"], "torch.Tensor"]


@dataclass(frozen=True, slots=True)
class CaseInput:
    """What a case is given."""

    backend: str
    folder: Path  # of the small models


class Warnings(logging.Handler):
    """What the backends had to say."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        logging.getLogger("backends").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class WatchedProgram:
    """A program whose runs go through ``run_it``."""

    def __init__(self, program: "ModelProgram", run_it: BeforeRun) -> None:
        self.vocab_size = program.vocab_size
        self._program = program
        self._run_it = run_it

    def run(self, inputs: "StepInputs", kv: "KVTensors") -> "torch.Tensor":
        return self._run_it(self._program, inputs, kv)


# --- refusals ---------------------------------------------------------------------------------------------


def settings(given: CaseInput, model: str, num_blocks: int, **fields: object) -> ExecutorSettings:
    limits = {"block_size": 16, "max_num_seqs": 8, "max_num_batched_tokens": 2048}
    limits |= {name: fields.pop(name) for name in list(fields) if name in limits}  # type: ignore[misc]
    instance = InstanceConfig(InstanceId("limits"), num_blocks, repeat_max=1, prefix_caching=False, **limits)
    return ExecutorSettings(instance, model, given.backend, **fields)  # type: ignore[arg-type]


def refusal(given: ExecutorSettings) -> tuple[str, float]:
    """Why it does not start, and after how many seconds it says so."""
    from backends.model_runner.executor_error import ExecutorError
    from backends.model_runner.torch_executor import TorchStepExecutor

    executor = TorchStepExecutor(given)
    begin_s, reason = time.monotonic(), ""
    try:
        executor.start(lambda _: None, lambda _: None)
    except ExecutorError as error:
        reason = str(error)
    finally:
        executor.close()
    gc.collect()  # what was made in part may refer to itself
    assert reason, "it started"
    assert "\n" not in reason, reason
    return reason, time.monotonic() - begin_s


def weights_too_large(given: CaseInput) -> str:
    reason, duration_s = refusal(settings(given, _LARGE_MODEL, 64, load_format="dummy", dtype="float32"))
    assert "GiB free" in reason, reason
    assert duration_s < REFUSED_S_MAX, f"refused only after {duration_s:.1f} s"
    return f"{duration_s:.1f} s: {reason}"


def kv_too_large(given: CaseInput) -> str:
    reason, _ = refusal(settings(given, "sagellm/toy", 10**9))
    num_blocks = num_tokens_fitting(reason) // 16 if given.backend == "cuda" else 2048
    start_and_stop(settings(given, "sagellm/toy", num_blocks // 2))
    return reason


def start_and_stop(given: ExecutorSettings) -> None:
    from backends.model_runner.torch_executor import TorchStepExecutor

    executor = TorchStepExecutor(given)
    executor.start(lambda _: None, lambda _: None)
    executor.close()


def step_too_large(given: CaseInput) -> str:
    """KV takes all but what 50 blocks do."""
    wide = {"load_format": "dummy", "max_num_batched_tokens": 8192}
    reason, _ = refusal(settings(given, "Qwen/Qwen3-0.6B", 10**9, **wide))
    reason, duration_s = refusal(settings(given, "Qwen/Qwen3-0.6B", num_tokens_fitting(reason) // 16 - 50, **wide))
    assert "leave too little" in reason, reason
    return f"{duration_s:.1f} s: {reason}"


def num_tokens_fitting(reason: str) -> int:
    """As a refusal says it."""
    found = re.search(r"at most (\d+) tokens fit", reason)
    assert found is not None, reason
    return int(found[1])


def serve_refused(given: CaseInput) -> str:
    """``sagellm serve`` with a profile that promises more memory than the device has."""
    profile = given.folder / given.backend / "profiles" / "large.json"
    profile.parent.mkdir(parents=True, exist_ok=True)
    sheet = json.loads((Path(backends.__file__).parent / "cuda/profiles/h200_spec.json").read_text(encoding="utf-8"))
    sheet["device"]["memory_bytes"] = 10**13
    profile.write_text(json.dumps(sheet), encoding="utf-8")
    cluster = given.folder / f"large-{given.backend}.yaml"
    cluster.write_text(f"model: {_LARGE_MODEL}\ninstances: [{{profile: {profile}}}]\n", encoding="utf-8")
    command = ["-m", "sagellm", "serve", "--cluster", str(cluster), "--load-format", "dummy", "--dtype", "float32"]
    mark = f"{time.monotonic_ns()}"
    begin_s = time.monotonic()
    finished = subprocess.run(
        [sys.executable, *command, "--host", "127.0.0.1", "--port", "0"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, _MARK: mark},
    )
    duration_s = time.monotonic() - begin_s
    lines = finished.stderr.splitlines()
    assert finished.returncode == 2, f"exit code {finished.returncode}: {lines}"
    assert len(lines) == 2, lines
    assert lines[1].startswith("sagellm: "), lines
    assert not (left := marked_processes(mark)), f"processes {left} are still there"
    return f"exit code 2 after {duration_s:.1f} s, no process left: {lines[1]}"


def marked_processes(mark: str) -> list[str]:
    """Processes whose environment says that they are of one run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{_MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
        except OSError:
            continue  # it has ended, or is somebody else's
    return found


# --- slower paths -----------------------------------------------------------------------------------------


def heads(given: CaseInput, model: SmallModel) -> str:
    return serves_right(given, model, num_warnings=(int(given.backend == "cuda" and not model.in_kernels),))


def triton_absent(given: CaseInput) -> str:
    """The parent hides the package before anything is imported."""
    assert sys.modules["triton"] is None
    return serves_right(given, SMALL_MODELS[0], num_warnings=(int(given.backend == "cuda"),))


def compiler_absent(given: CaseInput) -> str:
    """The parent names a C compiler that is not there, and an empty cache."""
    return serves_right(given, SMALL_MODELS[0], num_warnings=(int(given.backend == "cuda"),))


def serves_right(
    given: CaseInput,
    model: SmallModel,
    *,
    num_warnings: tuple[int, ...],
    run_it: BeforeRun | None = None,
    max_num_seqs: int = 8,
) -> str:
    """Outputs are those of transformers, and there are as many warnings as there may be."""
    warnings = Warnings()
    name = str(folder_of(model, given.folder))
    limits = {"block_size": model.block_size, "max_num_seqs": max_num_seqs}
    with_model = settings(given, name, 256, load_format="safetensors", **limits)
    expected = read_expected(model, given.folder)

    async def generate(engine: "LiveEngine") -> list[list[int]]:
        found = await asyncio.gather(*(generated(engine, prompt) for prompt in expected.prompts))
        return [tokens for tokens, _ in found]

    outputs = asyncio.run(with_engine(with_model, generate, run_it))
    num_differing = expected.num_differing(outputs, CLOSE_BY_DTYPE[model.dtype])
    assert not num_differing, f"{num_differing} of {len(outputs)} outputs differ"
    assert len(warnings.lines) in num_warnings, f"{len(warnings.lines)} warnings: {warnings.lines}"
    return "; ".join([f"{len(outputs)} outputs as transformers has them", *warnings.lines])


# --- memory that goes while the process runs --------------------------------------------------------------


def capture_out_of_memory(given: CaseInput, num_captured: int) -> str:
    """The device's memory is taken when one capture more has begun, and given back once that has failed.

    A later capture finds what its tensors need in the first one's memory; the driver may want some for itself.
    """
    hog, num_begun, is_taken = MemoryHog(), 0, False

    def run_it(program: "ModelProgram", inputs: "StepInputs", kv: "KVTensors") -> "torch.Tensor":
        nonlocal num_begun, is_taken
        import torch

        capturing = torch.cuda.is_current_stream_capturing()
        if is_taken and not capturing:
            hog.give()
            is_taken = False
        if capturing and num_begun == num_captured:
            hog.take()
            is_taken = True
        num_begun += capturing
        try:
            return program.run(inputs, kv)
        except RuntimeError:
            if is_taken:
                hog.give()
                is_taken = False
            raise

    try:
        # So many sequences have tensors that what is left over here and there does not hold.
        seen = serves_right(
            given,
            SMALL_MODELS[0],
            num_warnings=(0, 1, 2) if num_captured else (1,),
            run_it=run_it,
            max_num_seqs=256,
        )
        return f"{num_begun} captures begun; {seen}; {checked_left_bytes()}"
    finally:
        hog.end()


def serving_out_of_memory(given: CaseInput) -> str:
    """The device's memory is taken before a step of serving: for all attempts at first, then for one only."""
    hog, model = MemoryHog(), SMALL_MODELS[0]
    num_failing, num_failed = 0, 0
    expected = read_expected(model, given.folder)
    long_prompt = [index % 500 for index in range(2 * _LONG_CHUNK - 100)]

    def run_it(program: "ModelProgram", inputs: "StepInputs", kv: "KVTensors") -> "torch.Tensor":
        nonlocal num_failing, num_failed
        import torch

        if not num_failing or inputs.token_ids.numel() < _LONG_CHUNK:
            return program.run(inputs, kv)
        torch.cuda.empty_cache()
        hog.take()
        num_failing -= 1
        try:
            return program.run(inputs, kv)
        except torch.OutOfMemoryError:
            num_failed += 1
            raise
        finally:
            hog.give()

    async def scenario(engine: "LiveEngine") -> list[list[int]]:
        nonlocal num_failing
        num_failing = 3
        _, reason = await generated(engine, long_prompt)
        assert reason is FinishReason.ERROR, f"a request whose steps never fit ended with {reason}"
        num_failing = 1
        tokens, reason = await generated(engine, long_prompt)
        assert (len(tokens), reason) == (NUM_OUTPUT_TOKENS, FinishReason.LENGTH), reason
        found = await asyncio.gather(*(generated(engine, prompt) for prompt in expected.prompts))
        return [tokens for tokens, _ in found]

    try:
        name = str(folder_of(model, given.folder))
        with_model = settings(given, name, 1024, load_format="safetensors", max_num_batched_tokens=_LONG_CHUNK)
        outputs = asyncio.run(with_engine(with_model, scenario, run_it))
    finally:
        hog.end()
    assert num_failed == 4, f"{num_failed} of 4 steps failed"
    assert not expected.num_differing(outputs, CLOSE_BY_DTYPE[model.dtype])
    return f"{num_failed} steps failed, one request ended with an error, all others right; {checked_left_bytes()}"


def checked_left_bytes() -> str:
    """Once the executor is closed nothing may be kept, not by captures that failed either."""
    import torch

    torch.cuda.empty_cache()
    left_bytes = torch.cuda.memory_reserved()
    assert left_bytes <= LEFT_BYTES_MAX, f"{left_bytes >> 20} MiB were not given back"
    return f"{left_bytes >> 20} MiB left at the end"


# --- serving ----------------------------------------------------------------------------------------------


async def with_engine(
    given: ExecutorSettings,
    scenario: "Callable[[LiveEngine], Awaitable[list[list[int]]]]",
    run_it: BeforeRun | None,
) -> list[list[int]]:
    """What the scenario gives, on an engine whose only instance is a thread of this process."""
    from backends.model_runner.loaded_model import load_model
    from backends.model_runner.torch_executor import TorchStepExecutor
    from sagellm.server.live.deployment import DeployedInstance, Deployment
    from sagellm.server.live.front_driver import LiveEngine
    from sagellm.server.live.instance_driver import DriverOptions
    from sagellm.server.live.threaded_instances import ThreadedInstances

    def load(settings: ExecutorSettings, backend: "HardwareBackend") -> "LoadedModel":
        model = load_model(settings, backend)
        return model if run_it is None else replace(model, program=WatchedProgram(model.program, run_it))

    deployment = Deployment("limits", given.model, ControlPlaneConfig(), (DeployedInstance(given, given.backend),))
    host = ThreadedInstances([given], lambda each: TorchStepExecutor(each, load), DriverOptions())
    engine = LiveEngine(deployment, host)
    await engine.start()
    try:
        return await scenario(engine)
    finally:
        await engine.drain(5)


async def generated(engine: "LiveEngine", prompt: list[int]) -> tuple[list[int], FinishReason | None]:
    """A request's tokens, and how it ended."""
    from sagellm.server.engine import OutputDelta

    request_id = RequestId(f"{time.monotonic_ns()}-{len(prompt)}")
    spec = RequestSpec(
        request_id, engine.now_ns(), len(prompt), NUM_OUTPUT_TOKENS, prompt_token_ids=tuple(prompt), sampling=GREEDY
    )
    tokens: list[int] = []
    reason = None
    async for item in engine.submit(spec):
        if isinstance(item, OutputDelta):
            tokens.extend(item.token_ids)
        else:
            reason = item.reason
    return tokens, reason
