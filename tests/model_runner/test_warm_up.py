"""What a model runs before it serves are steps that the runner can run, of all the kinds that serving has."""

import pytest
import torch
from context_program import VOCAB_SIZE, ContextProgram

from backends.model_runner.kv_blocks import KVBlocks
from backends.model_runner.loaded_model import LoadedModel
from backends.model_runner.step_runner import StepMemory, StepRunner
from backends.model_runner.warm_up import WarmUp, small_steps, steps_of_serving
from backends.registry import get_backend
from backends.step_inputs import KVTensors, StepInputs
from sagellm.core.config import InstanceConfig
from sagellm.core.identity import InstanceId

NUM_POSITIONS = 300


class Watched(ContextProgram):
    """Keeps the sizes of all steps; what they compute is no matter."""

    def __init__(self) -> None:
        super().__init__(num_positions=NUM_POSITIONS)
        self.sizes: list[tuple[int, int, int, int]] = []

    def run(self, inputs: StepInputs, kv: KVTensors) -> torch.Tensor:
        num_seqs, num_tokens = inputs.context_lens.numel(), inputs.token_ids.numel()
        assert inputs.context_len_max <= NUM_POSITIONS
        assert int(inputs.slot_mapping.max()) < kv.keys[0].numel() - kv.block_size
        self.sizes.append((inputs.num_decodes, num_seqs - inputs.num_decodes, num_tokens, inputs.context_len_max))
        return torch.zeros(inputs.sampled_rows.numel(), VOCAB_SIZE)


def run(lots: tuple[WarmUp, ...], instance: InstanceConfig) -> Watched:
    backend, program = get_backend("cpu"), Watched()
    kv = KVBlocks(backend, 0, (1, 2, instance.num_blocks, instance.block_size, 1, 1), torch.float32)
    model = LoadedModel(program, 1, 1, 1, torch.float32, min(NUM_POSITIONS, instance.num_token_slots))
    for lot in lots:
        runner = StepRunner(model, kv, backend, 0)
        for request in lot.requests:
            runner.requests.add(request, ())
        for plan in lot.plans:
            assert min(runner.run(plan, StepMemory(backend, 0, instance.max_num_seqs)).token_ids()) >= 0
    return program


@pytest.mark.parametrize("num_blocks", [1, 2, 9, 64])
@pytest.mark.parametrize("max_num_seqs", [1, 2, 7])
def test_any_instance_can_run_them(num_blocks: int, max_num_seqs: int) -> None:
    instance = InstanceConfig(
        InstanceId("i"), num_blocks=num_blocks, block_size=16, max_num_seqs=max_num_seqs, max_num_batched_tokens=40
    )
    num_positions = min(NUM_POSITIONS, instance.num_token_slots)
    for steps in (small_steps, steps_of_serving):
        program = run(steps(instance, num_positions), instance)
        assert max(num_tokens for _, _, num_tokens, _ in program.sizes) <= 40


def test_all_kinds_of_steps_are_met() -> None:
    instance = InstanceConfig(
        InstanceId("i"), num_blocks=100, block_size=16, max_num_seqs=7, max_num_batched_tokens=128
    )
    sizes = run(steps_of_serving(instance, NUM_POSITIONS), instance).sizes
    assert sizes[0] == (0, 7, 7 * (128 // 7), 128 // 7)
    mixed = [size for size in sizes if size[0] and size[1]]
    assert {num_decodes for num_decodes, *_ in mixed} == {1, 4}
    assert {context.bit_length() for *_, context in mixed} == {4, 5, 6, 7, 8}
    assert {16, 32, 64} <= {num_tokens for num_decodes, _, num_tokens, _ in sizes if not num_decodes}
    assert {1, 7} <= {num_decodes for num_decodes, num_chunks, *_ in sizes if not num_chunks}
