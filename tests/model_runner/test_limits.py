"""With too little memory nothing starts, or it serves right all the same; what is slower is told in one line."""

import gc
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from instance_loop import InstanceLoop
from limited_backend import LimitedBackend
from recording_backend import RecordingBackend, install

from backends.base import HardwareBackend
from backends.executor_settings import ExecutorSettings
from backends.model_runner.executor_error import ExecutorError
from backends.model_runner.loaded_model import LoadedModel, LoadModel, load_model
from backends.operators.reference_attention import prepare_attention
from backends.registry import get_backend
from backends.step_inputs import KVTensors, ModelProgram, StepInputs
from backends.weights.load import load_weights, weight_bytes
from backends.weights.progress import NoProgress
from sagellm.core.config import InstanceConfig
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.models.known_models import load_model_config
from sagellm.runtime.execution_graph.builder import build_graph
from sagellm.runtime.execution_graph.passes.fusion import fuse

MODEL = "sagellm/toy"
PROMPTS = [[(7 * index + place * place) % 260 for place in range(1 + 9 * index)] for index in range(7)]
NUM_TOKENS = 12
CONFIG = InstanceConfig(
    InstanceId("i"), 40, block_size=8, max_num_seqs=6, max_num_batched_tokens=6, repeat_max=1, prefix_caching=False
)
AMPLE_BYTES = 1 << 40
COMPILER_ERROR = type("OutOfResources", (Exception,), {"__module__": "triton.runtime.errors"})


@dataclass(frozen=True, slots=True)
class Served:
    outputs: dict[RequestId, list[int]]
    reasons: set[FinishReason]
    num_steps: int
    failures: list[str]


def serve(backend: HardwareBackend, load: LoadModel = load_model, config: InstanceConfig = CONFIG) -> Served:
    with InstanceLoop(config, loads=(load,), model=MODEL, backend=backend.name) as loop:
        for index, prompt in enumerate(PROMPTS):
            loop.submit(RequestSpec(RequestId(str(index)), 0, len(prompt), NUM_TOKENS, prompt_token_ids=tuple(prompt)))
        loop.run()
        assert not loop.deaths
    failures = [failure.reason for failure in loop.failures]
    return Served(loop.outputs, set(loop.reasons.values()), len(loop.steps), failures)


@pytest.fixture(scope="module")
def expected() -> dict[RequestId, list[int]]:
    return serve(get_backend("cpu")).outputs


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was warned of since it was asked last."""
    caplog.set_level(logging.WARNING)

    def taken() -> list[str]:
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        assert not any("\n" in message for message in messages)
        return messages

    return taken


def graph_of_toy():  # type: ignore[no-untyped-def]
    return fuse(build_graph(load_model_config(MODEL)))


# --- too little memory ------------------------------------------------------------------------------------


def kind_of_refusal(reason: str) -> str:
    assert "\n" not in reason
    assert reason.startswith(("model: ", "kv_tokens: "))
    for words in ("but limited:0 has", "do not fit into the memory", "at most", "leave too little"):
        if words in reason and not (words.startswith("but") and "at most" in reason):
            return words
    raise AssertionError(reason)


def outcome(backend: LimitedBackend, expected: dict[RequestId, list[int]], lines: Callable[[], list[str]]) -> str:
    """What comes of a start with so much memory; it is right, and holds to the limit."""
    try:
        served = serve(backend)
    except ExecutorError as error:
        reason = kind_of_refusal(str(error))
    else:
        assert served.outputs == expected
        assert not served.failures, "what was warmed up was not the largest step"
        told = lines()
        kinds = [line.split()[1] for line in told]  # of steps
        assert len(kinds) == len(set(kinds))
        reason = "; ".join(told) or "all captured"
    gc.collect()  # a graph that was lowered in part refers to itself
    assert backend.meter.live_bytes() == 0
    return reason


def test_any_amount_of_memory_serves_right_or_is_refused(
    monkeypatch: pytest.MonkeyPatch, expected: dict[RequestId, list[int]], lines: Callable[[], list[str]]
) -> None:
    weights = weight_bytes(graph_of_toy())
    limits = [round(weights * times) for times in (0.5, 1.001, 1.35, 2.5, 4, 7, 40)]
    outcomes = [outcome(install(LimitedBackend(limit), monkeypatch), expected, lines) for limit in limits]
    assert outcomes[:4] == ["but limited:0 has", "do not fit into the memory", "at most", "leave too little"]
    assert outcomes[-1] == "all captured"
    assert any("launched operator by operator, not captured" in each for each in outcomes)
    assert any("filled up to" in each for each in outcomes)


def test_as_many_tokens_of_kv_fit_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = weight_bytes(graph_of_toy()) + 3_000_000

    def refusal(num_blocks: int) -> str:
        install(LimitedBackend(limit), monkeypatch)
        with (
            pytest.raises(ExecutorError) as caught,
            InstanceLoop(replace(CONFIG, num_blocks=num_blocks), model=MODEL, backend=LimitedBackend.name),
        ):
            pass
        return str(caught.value)

    found = re.search(r"at most (\d+) tokens fit", refusal(10**6))
    assert found is not None
    num_fitting = int(found[1]) // CONFIG.block_size
    assert num_fitting > 512, "as many as the model has positions, or tables of positions would differ"
    assert f"at most {found[1]} tokens fit" in refusal(num_fitting + 1)
    assert "leave too little" in refusal(num_fitting)


class NoWeights:
    """A `WeightSupply` that leaves tensors as they are."""

    def check(self, sources: object) -> None: ...

    def fill(self, target: torch.Tensor, source: object, dim: int, first: int, end: int) -> None: ...


@pytest.mark.parametrize("model", [MODEL, "Qwen/Qwen2.5-7B", "Qwen/Qwen3-30B-A3B"])
def test_weights_take_what_is_foreseen(model: str) -> None:
    graph = fuse(build_graph(load_model_config(model)))
    weights = load_weights(graph, NoWeights(), rank=0, device="meta", progress=NoProgress())
    assert weight_bytes(graph) == sum({id(tensor): tensor.nbytes for tensor in weights.values()}.values())


# --- what goes wrong while it serves ----------------------------------------------------------------------


class Watched:
    """A program; ``before`` is called with the number of each run, and ``after`` whatever becomes of it."""

    def __init__(self, program: ModelProgram, before: Callable[[int], None], after: Callable[[], None]) -> None:
        self.vocab_size = program.vocab_size
        self.num_runs = 0
        self._program = program
        self._before = before
        self._after = after

    def run(self, inputs: StepInputs, kv: KVTensors) -> torch.Tensor:
        self.num_runs += 1
        self._before(self.num_runs)
        try:
            return self._program.run(inputs, kv)
        finally:
            self._after()


def watched(before: Callable[[int], None], into: list[Watched], after: Callable[[], None] = lambda: None) -> LoadModel:
    def load(settings: ExecutorSettings, backend: HardwareBackend) -> LoadedModel:
        model = load_model(settings, backend)
        into.append(Watched(model.program, before, after))
        return replace(model, program=into[-1])

    return load


def num_warm_up_runs(backend: HardwareBackend) -> int:
    programs: list[Watched] = []
    with InstanceLoop(CONFIG, loads=(watched(lambda _: None, programs),), model=MODEL, backend=backend.name):
        return programs[0].num_runs


def test_a_device_that_is_full_for_a_while_fails_steps_and_no_more(
    monkeypatch: pytest.MonkeyPatch, expected: dict[RequestId, list[int]]
) -> None:
    backend = install(LimitedBackend(AMPLE_BYTES), monkeypatch)
    first_run = num_warm_up_runs(backend) + 1
    held_bytes: list[int] = []

    def fill_up(number: int) -> None:
        """Somebody takes all memory before two runs of serving, and gives it back after each."""
        if number - first_run in (2, 9):
            backend.meter.limit_bytes = backend.meter.live_bytes() + 10_000
            if not held_bytes:
                backend.released_at_bytes.clear()  # by captures

    def empty() -> None:
        if backend.meter.limit_bytes < AMPLE_BYTES:
            held_bytes.append(backend.meter.live_bytes())
        backend.meter.limit_bytes = AMPLE_BYTES

    served = serve(backend, watched(fill_up, [], empty))
    assert len(served.failures) == 2
    assert all("out of memory" in failure and "more words" not in failure for failure in served.failures)
    assert served.outputs == expected
    assert served.reasons == {FinishReason.LENGTH}
    assert len(held_bytes) == 2
    assert all(map(int.__lt__, backend.released_at_bytes, held_bytes)), "what the step held was still held"


@pytest.mark.parametrize("reason", ["Triton Error [CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling it"])
def test_memory_that_a_library_misses_is_told_like_any_other(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    backend = install(RecordingBackend(), monkeypatch)

    def fail(number: int) -> None:
        raise RuntimeError(f"{reason}\nCompile with this and that")

    with pytest.raises(ExecutorError, match=r"kv_tokens: 320 tokens of KV leave too little of recording:0 for a step"):
        serve(backend, watched(fail, []))


# --- kernels that are missing -----------------------------------------------------------------------------


def test_a_kernel_that_cannot_be_compiled_refuses_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = install(RecordingBackend(), monkeypatch)

    def fail(number: int) -> None:
        raise COMPILER_ERROR("out of resource: shared memory\nmore words")

    with pytest.raises(ExecutorError, match=r"a kernel cannot be compiled for recording:0 \(out of resource.*\);"):
        serve(backend, watched(fail, []))


def test_a_kernel_that_cannot_be_compiled_later_fails_its_step_alone(
    monkeypatch: pytest.MonkeyPatch, expected: dict[RequestId, list[int]]
) -> None:
    backend = install(LimitedBackend(AMPLE_BYTES), monkeypatch)
    fails_at = num_warm_up_runs(backend) + 4

    def fail(number: int) -> None:
        if number == fails_at:
            raise COMPILER_ERROR("no such instruction\nmore words")

    served = serve(backend, watched(fail, []))
    assert served.failures == ["no such instruction"]
    assert served.outputs == expected


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted when stream is capturing"), COMPILER_ERROR("x")]
)
def test_any_failure_of_a_capture_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[RequestId, list[int]],
    lines: Callable[[], list[str]],
    error: Exception,
) -> None:
    backend = install(RecordingBackend(), monkeypatch)

    def refuse() -> None:
        raise error

    monkeypatch.setattr(backend, "before_capture", refuse)
    assert serve(backend).outputs == expected
    assert lines() == [
        f"recording:0: decode steps of up to 6 sequences are launched operator by operator, not captured: {error}"
    ]


class NarrowBackend(RecordingBackend):
    """Its attention knows no heads but of eight."""

    def unknown_to_kernels(self, head_dim: int, num_heads_each: int) -> tuple[str, ...]:
        return () if head_dim == 8 else ("attention", "rms_norm")


def test_heads_that_no_kernel_knows_run_the_reference_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, expected: dict[RequestId, list[int]], lines: Callable[[], list[str]]
) -> None:
    backend = install(NarrowBackend(), monkeypatch)
    assert serve(backend).outputs == expected
    assert backend.num_captures == 0, "captured, the reference looks at the longest context each time"
    assert lines() == [
        "recording:0: torch's operators, which are slower, run attention, and decode steps are not captured: "
        "backend 'recording' has no kernel for 2 query heads of size 16 to a key-value head"
    ]


@pytest.mark.parametrize(
    ("num_decodes", "context_len_max", "window"), [(256, 32_768, 0), (256, 900, 0), (3, 500_000, 64)]
)
def test_what_the_reference_gathers_on_a_device_is_bounded(num_decodes: int, context_len_max: int, window: int) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    inputs = StepInputs(
        token_ids=empty(num_decodes), positions=empty(num_decodes), slot_mapping=empty(num_decodes),
        query_starts=empty(num_decodes + 1), context_lens=empty(num_decodes),
        block_tables=empty(num_decodes, context_len_max // 16 + 1), sampled_rows=empty(num_decodes),
        num_decodes=num_decodes, query_len_max=1, context_len_max=context_len_max,
    )  # fmt: skip
    buckets = prepare_attention(inputs, block_size=16, sliding_window=window).decodes
    assert sum(bucket.num_rows for bucket in buckets) == num_decodes
    assert all(bucket.num_rows * bucket.length <= 1 << 18 for bucket in buckets)
    assert all(bucket.length == min(context_len_max, window or context_len_max) for bucket in buckets)
