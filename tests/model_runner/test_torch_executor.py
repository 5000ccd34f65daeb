"""The executor gives each request the tokens that it would have alone, whatever happens around it."""

import random
from collections.abc import Callable

import pytest
import torch
from context_program import VOCAB_SIZE, ContextProgram, expected_greedy, loading
from instance_loop import InstanceLoop

from backends.step_inputs import KVTensors, StepInputs
from sagellm.core.config import InstanceConfig, Role
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.core.sampling import SamplingParameters


def config(name: str = "i0", role: Role = Role.MIXED, **limits: int) -> InstanceConfig:
    base = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 16, "repeat_max": 1}
    return InstanceConfig(InstanceId(name), role=role, **{**base, **limits})  # type: ignore[arg-type]


def prompts(count: int, seed: int = 0, len_max: int = 30) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, len_max))] for _ in range(count)]


def spec(name: str, prompt: list[int], num_tokens: int = 20, **fields: object) -> RequestSpec:
    return RequestSpec(
        RequestId(name),
        0,
        len(prompt),
        num_tokens,
        prompt_token_ids=tuple(prompt),
        **fields,  # type: ignore[arg-type]
    )


def run_all(loop: InstanceLoop, all_prompts: list[list[int]], num_tokens: int = 20) -> None:
    for index, prompt in enumerate(all_prompts):
        loop.submit(spec(f"r{index}", prompt, num_tokens))
    loop.run()
    for index, prompt in enumerate(all_prompts):
        assert loop.outputs[RequestId(f"r{index}")] == expected_greedy(prompt, num_tokens), f"request {index}"


@pytest.mark.parametrize("steps_in_flight_max", [1, 2])
def test_batches_and_chunks(steps_in_flight_max: int) -> None:
    program = ContextProgram()
    with InstanceLoop(config(steps_in_flight_max=steps_in_flight_max), loads=(loading(program),)) as loop:
        run_all(loop, prompts(12))
        assert loop.num_in_flight_max == steps_in_flight_max
        assert any(chunk.num_computed_tokens for step in loop.steps for chunk in step.plan.chunks)
        assert any(step.plan.decode_request_ids and step.plan.chunks for step in loop.steps)
    assert program.thread_names == {"executor-launch"}


def test_prefix_hits() -> None:
    shared = prompts(1, len_max=1)[0] * 17
    all_prompts = [shared + prompt for prompt in prompts(6, seed=3, len_max=5)]
    with InstanceLoop(config(max_num_batched_tokens=64, max_num_seqs=2), loads=(loading(ContextProgram()),)) as loop:
        run_all(loop, all_prompts)
        first_chunks = [chunk for step in loop.steps for chunk in step.plan.chunks]
        assert any(chunk.num_computed_tokens >= 16 for chunk in first_chunks)


@pytest.mark.parametrize("steps_in_flight_max", [1, 2])
def test_preemption(steps_in_flight_max: int) -> None:
    small = config(num_blocks=16, steps_in_flight_max=steps_in_flight_max)
    with InstanceLoop(small, loads=(loading(ContextProgram()),)) as loop:
        run_all(loop, prompts(8, seed=5, len_max=12), num_tokens=24)
        assert any(step.plan.preempted_request_ids for step in loop.steps)


def out_of_memory_in(*numbers: int) -> Callable[[int, StepInputs], None]:
    def before_run(number: int, inputs: StepInputs) -> None:
        if number in numbers:
            raise torch.OutOfMemoryError("no memory left\nmore words")

    return before_run


@pytest.mark.parametrize("steps_in_flight_max", [1, 2])
def test_steps_that_fail_leave_no_trace(steps_in_flight_max: int) -> None:
    program = ContextProgram(out_of_memory_in(3, 9, 30))  # the first two are the warm-up's
    with InstanceLoop(config(steps_in_flight_max=steps_in_flight_max), loads=(loading(program),)) as loop:
        run_all(loop, prompts(7, seed=7))
        assert [failure.reason for failure in loop.failures] == ["no memory left"] * 3
        assert not loop.deaths


def test_a_request_goes_on_where_another_instance_was_lost() -> None:
    (prompt,) = prompts(1, seed=9)
    output = expected_greedy(prompt, 20)
    with InstanceLoop(config(), loads=(loading(ContextProgram()),)) as loop:
        loop.submit(spec("a", prompt), tuple(output[:7]))
        loop.run()
        assert loop.outputs[RequestId("a")] == output


@pytest.mark.parametrize("decode_blocks", [64, 14])
def test_hand_over(decode_blocks: int) -> None:
    configs = config("p", Role.PREFILL), config("d", Role.DECODE, num_blocks=decode_blocks)
    with InstanceLoop(*configs, loads=(loading(ContextProgram()), loading(ContextProgram()))) as loop:
        run_all(loop, prompts(9, seed=11, len_max=16))
        assert loop.num_blocks_moved >= 9


def test_rows_are_used_again_while_steps_are_in_flight() -> None:
    with InstanceLoop(config(), loads=(loading(ContextProgram()),)) as loop:
        for wave in range(4):
            all_prompts = prompts(5, seed=wave)
            for index, prompt in enumerate(all_prompts):
                # Of ten tokens each: a stop token ends some in the middle, with a step for them under way.
                stop = expected_greedy(prompt, 10)[4]
                loop.submit(spec(f"w{wave}-{index}", prompt, 10, stop_token_ids=(stop,)))
            loop.run()
            for index, prompt in enumerate(all_prompts):
                output = expected_greedy(prompt, 10)
                end = output.index(output[4]) + 1
                request_id = RequestId(f"w{wave}-{index}")
                assert loop.outputs[request_id] == output[:end]
                assert loop.reasons[request_id] is FinishReason.STOP


WISHES = (
    SamplingParameters(seed=1),
    SamplingParameters(seed=2, top_p=0.7, temperature=1.4),
    SamplingParameters(seed=3, top_k=7, repetition_penalty=1.5, num_logprobs=1),
    SamplingParameters(temperature=0.0, frequency_penalty=0.9, presence_penalty=0.6),
    SamplingParameters(seed=5, min_p=0.1, bad_words=((4,), (9, 9), (30, 2)), logit_bias=((9, 2.0),)),
    SamplingParameters(seed=6, allowed_token_ids=tuple(range(0, 50, 3)), min_tokens=15),
)


def run_random(loop: InstanceLoop, indexes: range) -> dict[RequestId, list[int]]:
    """Requests that are drawn at random, each with wishes of its own."""
    for index in indexes:
        prompt = prompts(1, seed=100 + index, len_max=12)[0]
        loop.submit(spec(f"r{index}", prompt, 24, sampling=WISHES[index % len(WISHES)], stop_token_ids=(0, 12)))
    loop.run()
    return loop.outputs


@pytest.fixture(scope="module")
def drawn_alone() -> dict[RequestId, list[int]]:
    outputs: dict[RequestId, list[int]] = {}
    for index in range(2 * len(WISHES)):
        with InstanceLoop(config(steps_in_flight_max=1), loads=(loading(ContextProgram()),)) as loop:
            outputs |= run_random(loop, range(index, index + 1))
    assert sum(len(output) == 24 for output in outputs.values()) >= 3
    return outputs


@pytest.mark.parametrize("seed", range(3))
def test_random_draws_depend_on_the_request_alone(drawn_alone: dict[RequestId, list[int]], seed: int) -> None:
    rng = random.Random(seed)
    program = ContextProgram(out_of_memory_in(*rng.sample(range(3, 60), 4)))
    tight = config(num_blocks=18, max_num_batched_tokens=9, steps_in_flight_max=1 + seed % 2, step_attempts_max=9)
    with InstanceLoop(tight, loads=(loading(program),)) as loop:
        assert run_random(loop, range(len(drawn_alone))) == drawn_alone
        assert loop.failures
        assert any(step.plan.preempted_request_ids for step in loop.steps)


def test_random_draws_go_on_after_a_hand_over(drawn_alone: dict[RequestId, list[int]]) -> None:
    configs = config("p", Role.PREFILL), config("d", Role.DECODE)
    with InstanceLoop(*configs, loads=(loading(ContextProgram()), loading(ContextProgram()))) as loop:
        assert run_random(loop, range(len(drawn_alone))) == drawn_alone
        assert loop.num_blocks_moved >= len(drawn_alone)


class Spoilt(ContextProgram):
    """Logits are not finite for whoever is at one position."""

    def __init__(self, position: int) -> None:
        super().__init__()
        self._position = position

    def run(self, inputs: StepInputs, kv: KVTensors) -> torch.Tensor:
        logits = super().run(inputs, kv)
        for row, sampled in enumerate(inputs.sampled_rows.tolist()):
            if inputs.positions[sampled] == self._position:
                logits[row, 3] = (torch.nan, torch.inf, -torch.inf)[row % 3]
        return logits


def test_logits_that_are_not_finite_end_one_request() -> None:
    long_prompts, short_prompts = [[index] * 12 for index in range(3)], prompts(3, seed=13, len_max=3)
    with InstanceLoop(config(), loads=(loading(Spoilt(position=17)),)) as loop:
        for index, prompt in enumerate(long_prompts):
            loop.submit(spec(f"long{index}", prompt))
        for index, prompt in enumerate(short_prompts):
            loop.submit(spec(f"short{index}", prompt, 14))
        loop.run()
        for index, prompt in enumerate(long_prompts):
            # The logits at position 17 are those for token 18, the seventh of the output.
            assert loop.outputs[RequestId(f"long{index}")] == expected_greedy(prompt, 6)
            assert loop.reasons[RequestId(f"long{index}")] is FinishReason.ERROR
        for index, prompt in enumerate(short_prompts):
            assert loop.outputs[RequestId(f"short{index}")] == expected_greedy(prompt, 14)
            assert loop.reasons[RequestId(f"short{index}")] is FinishReason.LENGTH
