"""Runs one step: from a plan to tokens on their way to the host. Everything is launched, nothing is waited for."""

from dataclasses import dataclass

import torch

from backends.base import HardwareBackend
from backends.memory import MemoryKind
from backends.model_runner.decode_graphs import CapturedStep, DecodeGraphs
from backends.model_runner.device_tables import DeviceTables, PackedStep
from backends.model_runner.kv_blocks import KVBlocks
from backends.model_runner.loaded_model import LoadedModel
from backends.model_runner.packed_arrays import ArrayPacker, ArraysOnDevice, StagingBuffer
from backends.model_runner.request_table import RequestTable
from backends.model_runner.sampler.device_draw_plan import PackedDrawPlan
from backends.model_runner.sampler.draw_plan import DrawPlan, plan_drawing
from backends.model_runner.sampler.sampler import DrawnLogprobs, Sampler
from backends.model_runner.step_arrays import StepArrays, step_arrays
from sagellm.core.plan import StepPlan
from sagellm.core.step_executor import TokenLogprobs


class StepMemory:
    """Host memory of one step in flight, for what goes to the device and what comes back."""

    def __init__(self, backend: HardwareBackend, device_index: int, num_sampled_max: int) -> None:
        is_pinned = backend.capabilities(device_index).pinned_memory
        self.staging = StagingBuffer(is_pinned)
        self.drawn = backend.allocate_tensor((num_sampled_max,), torch.int32, MemoryKind.PINNED, device_index)


@dataclass(frozen=True, slots=True)
class StepTokens:
    """What a step drew, on the host once the step's event is done."""

    drawn: torch.Tensor  # [num_sampled] int32; -1 where the logits meant nothing
    draw_plan: DrawPlan
    logprobs: DrawnLogprobs | None

    def token_ids(self) -> list[int]:
        """One for each sampled request, in the plan's order; -1 where its logits meant nothing."""
        token_ids: list[int] = self.drawn.tolist()
        return token_ids

    def token_logprobs(self) -> dict[int, TokenLogprobs]:
        """Of the sampled requests that asked, by their place in the plan's order."""
        if self.logprobs is None:
            return {}
        rows = self.draw_plan.logprobs
        assert rows is not None
        drawn_ranks = self.logprobs.drawn_ranks.tolist()
        token_ids, logprobs = self.logprobs.token_ids.tolist(), self.logprobs.logprobs.tolist()
        reported = {}
        for index, (row, num_logprobs) in enumerate(zip(rows.rows.tolist(), rows.num_logprobs.tolist(), strict=True)):
            end = min(num_logprobs + 1, len(token_ids[index]))
            ranks = (drawn_ranks[index], *range(1, end))
            reported[row] = TokenLogprobs(tuple(token_ids[index][:end]), tuple(logprobs[index][:end]), ranks)
        return reported


class StepRunner:
    """A model, its KV cache and its requests on one device. All calls come from one thread."""

    def __init__(self, model: LoadedModel, kv: KVBlocks, backend: HardwareBackend, device_index: int) -> None:
        vocab_size = model.program.vocab_size
        self._model = model
        self._kv = kv
        self._vocab_size = vocab_size
        self._device = backend.torch_device(device_index)
        self.requests = RequestTable(kv.tensors.block_size, vocab_size, model.num_positions)
        self._tables = DeviceTables(self.requests, self._device)
        draw_tokens = backend.token_drawing()
        self._draws_by_kernel = draw_tokens is not None
        self._sampler = Sampler(vocab_size, self._device, draw_tokens)
        self.decode_graphs = DecodeGraphs(model.program, kv, model.num_positions, backend, device_index)

    def run(self, plan: StepPlan, memory: StepMemory) -> StepTokens:
        """Launch the step on the current stream.

        Raises ExecutorError where the plan does not fit what is known, and what torch raises where memory is
        out. Requests then stand as if the step had run, until a plan begins them again.
        """
        sequences = self.requests.apply(plan)
        arrays = step_arrays(self.requests, sequences)
        draw_plan = plan_drawing(
            self.requests.parameters,
            arrays.sampled_table_rows,
            arrays.sampled_positions,
            self._vocab_size,
            by_kernel=self._draws_by_kernel,
        )
        captured = self._captured_step(arrays)
        packer = ArrayPacker(memory.staging)
        if captured is None:
            packed_step = self._tables.pack(arrays, packer)
        else:
            packed_step = self._tables.pack_decodes(arrays, captured, draw_plan.kernel, packer)
        drawn = captured.drawn if captured is not None and draw_plan.is_plain else None
        packed_draw = PackedDrawPlan(draw_plan, packer, drawn_already=drawn is not None)
        packed = packer.copy_to(self._device)
        logits = self._logits(captured, packed_step, packed)
        num_sampled = draw_plan.num_rows
        host_drawn = memory.drawn[:num_sampled]
        if not num_sampled:
            return StepTokens(host_drawn, draw_plan, None)
        if drawn is not None:
            drawn = drawn[0][:num_sampled], drawn[1][:num_sampled]
        tokens = self._sampler.draw(logits, packed_draw.on(packed), self._tables.token_ids, drawn)
        token_ids = tokens.token_ids.to(torch.int32)
        self._tables.keep_drawn(packed_step, packed, token_ids)
        host_drawn.copy_(token_ids.masked_fill_(tokens.is_invalid, -1), non_blocking=True)
        return StepTokens(host_drawn, draw_plan, None if tokens.logprobs is None else _on_host(tokens.logprobs))

    def _captured_step(self, arrays: StepArrays) -> CapturedStep | None:
        if arrays.num_decodes < arrays.table_rows.size:
            return None
        return self.decode_graphs.step_for(arrays.num_decodes, arrays.context_len_max)

    def _logits(self, captured: CapturedStep | None, step: PackedStep, packed: ArraysOnDevice) -> torch.Tensor:
        """[num_sampled, vocab_size] float32."""
        if captured is None:
            return self._model.program.run(self._tables.inputs(step, packed), self._kv.tensors)
        self._tables.fill_captured(captured, step, packed)
        captured.graph.replay()
        return captured.logits[: step.arrays.num_decodes]


def _on_host(logprobs: DrawnLogprobs) -> DrawnLogprobs:
    return DrawnLogprobs(_to_host(logprobs.token_ids), _to_host(logprobs.logprobs), _to_host(logprobs.drawn_ranks))


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
