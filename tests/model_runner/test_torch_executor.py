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
