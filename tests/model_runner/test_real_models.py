"""Greedy text of small random models is that of ``transformers.generate``, however it came about."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from instance_loop import InstanceLoop
from recording_backend import RecordingBackend, install

from backends.base import HardwareBackend
from backends.executor_settings import ExecutorSettings
from backends.model_runner.loaded_model import LoadedModel, LoadModel, load_model
from backends.registry import list_backends
from backends.step_inputs import KVTensors, ModelProgram, StepInputs
from sagellm.core.config import InstanceConfig, Role
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.request import RequestSpec

NUM_OUTPUT_TOKENS = 40
VOCAB_SIZE = 97
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "initializer_range": 0.3,  # so that layers matter, and texts do not end in a circle at once
    "dtype": torch.float32,
}
CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "mistral": transformers.MistralConfig(**_SIZES, sliding_window=7),
    "qwen3": transformers.Qwen3Config(**_SIZES, head_dim=16),
}
_SHARED = [(7 * index) % VOCAB_SIZE for index in range(24)]
PROMPTS = [
    [5],
    [*_SHARED, 1, 2],
    [11, 12, 13],
    [*_SHARED, 1, 3, 4],
    [(index * index) % VOCAB_SIZE for index in range(41)],
    [*_SHARED],
    [96, 0, 95],
]


BACKENDS = [*(state.name for state in list_backends() if state.available), RecordingBackend.name]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend that this machine has, and one whose graphs are a CPU's."""
    name = str(request.param)
    if name == RecordingBackend.name:
        install(RecordingBackend(), monkeypatch)
    return name


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """A model's folder, and what transformers makes of the prompts."""

    folder: Path
    outputs: list[list[int]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpointed]:
    return {name: _make(config, tmp_path_factory.mktemp(name)) for name, config in CONFIGS.items()}


def _make(config: transformers.PreTrainedConfig, folder: Path) -> Checkpointed:
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=NUM_OUTPUT_TOKENS, eos_token_id=None, pad_token_id=0
    )
    longest = max(map(len, PROMPTS))
    token_ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    outputs = model.generate(token_ids, attention_mask=mask)[:, longest:].tolist()
    assert all(len(output) == NUM_OUTPUT_TOKENS for output in outputs)
    assert all(len(set(output)) > 5 for output in outputs)
    return Checkpointed(folder, outputs)


@dataclass(slots=True)
class RunCounter:
    """Counts a program's runs once it serves; those that only warm up or are captured do not count."""

    is_serving: bool = False
    num_runs: int = 0

    def next(self) -> int:
        self.num_runs += self.is_serving
        return self.num_runs


@dataclass(frozen=True, slots=True)
class FailingProgram:
    """A program of which some runs, counted from 1, write half of what they should, and then fail."""

    program: ModelProgram
    counter: RunCounter
    failing: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        return self.program.vocab_size

    def run(self, inputs: StepInputs, kv: KVTensors) -> torch.Tensor:
        logits = self.program.run(inputs, kv)
        if self.counter.next() in self.failing:
            kv.values[0].flatten(0, 1)[inputs.slot_mapping[::2]] = 1e9
            raise torch.OutOfMemoryError("no memory left")
        return logits


def failing_in(counter: RunCounter, *numbers: int) -> LoadModel:
    def load(settings: ExecutorSettings, backend: HardwareBackend) -> LoadedModel:
        model = load_model(settings, backend)
        program = FailingProgram(model.program, counter, numbers)
        return LoadedModel(
            program, model.num_layers, model.num_kv_heads, model.head_dim, model.kv_dtype, model.num_positions
        )

    return load


def config(role: Role = Role.MIXED, **limits: int) -> InstanceConfig:
    base = {"num_blocks": 400, "block_size": 4, "max_num_seqs": 7, "max_num_batched_tokens": 160, "repeat_max": 1}
    return InstanceConfig(InstanceId(role.value), role=role, **{**base, **limits})  # type: ignore[arg-type]


def check(loop: InstanceLoop, model: Checkpointed) -> None:
    for index, prompt in enumerate(PROMPTS):
        loop.submit(
            RequestSpec(RequestId(str(index)), 0, len(prompt), NUM_OUTPUT_TOKENS, prompt_token_ids=tuple(prompt))
        )
    loop.run()
    assert not loop.deaths
    for index, output in enumerate(model.outputs):
        assert loop.outputs[RequestId(str(index))] == output, f"prompt {index}"


@pytest.mark.parametrize("name", CONFIGS)
def test_all_at_once(models: dict[str, Checkpointed], name: str, backend: str) -> None:
    with InstanceLoop(config(), model=str(models[name].folder), backend=backend) as loop:
        check(loop, models[name])


def chunked(loop: InstanceLoop) -> bool:
    return sum(chunk.num_computed_tokens > 0 for step in loop.steps for chunk in step.plan.chunks) > 10


def hits_prefixes(loop: InstanceLoop) -> bool:
    first = {chunk.request_id: chunk for step in reversed(loop.steps) for chunk in step.plan.chunks}
    return sum(chunk.num_computed_tokens >= 24 - 4 for chunk in first.values()) >= 2


def preempts(loop: InstanceLoop) -> bool:
    return any(step.plan.preempted_request_ids for step in loop.steps)


@pytest.mark.parametrize("steps_in_flight_max", [1, 2])
@pytest.mark.parametrize(
    ("limits", "happened"),
    [
        ({"max_num_batched_tokens": 8, "max_num_seqs": 5}, chunked),
        ({"max_num_seqs": 2}, hits_prefixes),
        ({"num_blocks": 60, "prefix_caching": False}, preempts),
        ({"num_blocks": 60, "max_num_batched_tokens": 16}, preempts),
    ],
)
def test_whatever_the_schedule(
    models: dict[str, Checkpointed],
    limits: dict[str, int],
    happened: Callable[[InstanceLoop], bool],
    steps_in_flight_max: int,
    backend: str,
) -> None:
    limited = config(**limits, steps_in_flight_max=steps_in_flight_max)
    with InstanceLoop(limited, model=str(models["qwen3"].folder), backend=backend) as loop:
        check(loop, models["qwen3"])
        assert happened(loop)


@pytest.mark.parametrize("steps_in_flight_max", [1, 2])
def test_after_steps_that_failed(models: dict[str, Checkpointed], steps_in_flight_max: int, backend: str) -> None:
    limited = config(steps_in_flight_max=steps_in_flight_max, step_attempts_max=10)
    counter = RunCounter()
    # Where decodes are replayed from graphs, only the first steps of all are runs of the program.
    loads = (failing_in(counter, 1, 2, 3, 20, 21, 40),)
    with InstanceLoop(limited, loads=loads, model=str(models["mistral"].folder), backend=backend) as loop:
        counter.is_serving = True
        check(loop, models["mistral"])
        assert len(loop.failures) >= 3


@pytest.mark.parametrize("name", CONFIGS)
def test_after_a_hand_over(models: dict[str, Checkpointed], name: str, backend: str) -> None:
    configs = config(Role.PREFILL, max_num_batched_tokens=16), config(Role.DECODE, num_blocks=90)
    with InstanceLoop(*configs, model=str(models[name].folder), backend=backend) as loop:
        check(loop, models[name])
        assert loop.num_blocks_moved > 20
