"""Runs one step: from a plan to tokens on their way to the host. Everything is launched, nothing is waited for."""

from dataclasses import dataclass

import torch

from backends.base import HardwareBackend
from backends.memory import MemoryKind
from backends.model_runner.decode_graphs import CapturedStep, DecodeGraphs
from backends.model_runner.device_tables import DeviceTables
from backends.model_runner.kv_blocks import KVBlocks
from backends.model_runner.loaded_model import LoadedModel
from backends.model_runner.packed_arrays import ArrayPacker, StagingBuffer
from backends.model_runner.request_table import RequestTable, SequenceRows
from backends.model_runner.sampler.device_draw_plan import DeviceDrawPlan, PackedDrawPlan
from backends.model_runner.sampler.draw_plan import DrawPlan
from backends.model_runner.sampler.draw_planner import DrawPlanner
from backends.model_runner.sampler.sampler import DrawnLogprobs, Sampler
from backends.model_runner.step_arrays import sampled_sequences, step_arrays
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
        found = self.logprobs
        ends = (rows.num_logprobs + 1).clip(max=found.token_ids.shape[1])
        following_ranks = tuple(range(1, found.token_ids.shape[1]))
        return {
            row: TokenLogprobs(tuple(token_ids[:end]), tuple(logprobs[:end]), (drawn_rank, *following_ranks[: end - 1]))
            for row, end, token_ids, logprobs, drawn_rank in zip(
                rows.rows.tolist(),
                ends.tolist(),
                found.token_ids.tolist(),
                found.logprobs.tolist(),
                found.drawn_ranks.tolist(),
                strict=True,
            )
        }


@dataclass(frozen=True, slots=True)
class _LaunchedModel:
    """What a step's drawing goes on with."""

    logits: torch.Tensor  # [num_sampled, vocab_size] float32
    draw_plan: DeviceDrawPlan
    drawn_cells: torch.Tensor  # [num_sampled] int64
    drawn: tuple[torch.Tensor, torch.Tensor] | None  # tokens, and whether they are invalid, where they are drawn


class StepRunner:
    """A model, its KV cache and its requests on one device. All calls come from one thread."""

    def __init__(self, model: LoadedModel, kv: KVBlocks, backend: HardwareBackend, device_index: int) -> None:
        vocab_size = model.program.vocab_size
        self._model = model
        self._kv = kv
        self._device = backend.torch_device(device_index)
        self.requests = RequestTable(kv.tensors.block_size, vocab_size, model.num_positions)
        self._tables = DeviceTables(self.requests, self._device)
        draw_tokens = backend.token_drawing()
        self._draw_planner = DrawPlanner(self.requests.parameters, vocab_size, by_kernel=draw_tokens is not None)
        self._sampler = Sampler(vocab_size, self._device, draw_tokens)
        self.decode_graphs = DecodeGraphs(model.program, kv, model.num_positions, backend, device_index)

    def run(self, plan: StepPlan, memory: StepMemory) -> StepTokens:
        """Launch the step on the current stream.

        Raises ExecutorError where the plan does not fit what is known, and what torch raises where memory is
        out. Requests then stand as if the step had run, until a plan begins them again.
        """
        sequences = self.requests.apply(plan)
        draw_plan = self._draw_planner.plan(*sampled_sequences(sequences))
        packer = ArrayPacker(memory.staging)
        captured = self._captured_step(sequences)
        if captured is None:
            launched = self._launch_operators(sequences, draw_plan, packer)
        else:
            launched = self._replay(captured, sequences, draw_plan, packer)
        num_sampled = draw_plan.num_rows
        host_drawn = memory.drawn[:num_sampled]
        if not num_sampled:
            return StepTokens(host_drawn, draw_plan, None)
        tokens = self._sampler.draw(launched.logits, launched.draw_plan, self._tables.token_ids, launched.drawn)
        token_ids = tokens.token_ids.to(torch.int32)
        self._tables.keep_drawn(launched.drawn_cells, token_ids)
        host_drawn.copy_(token_ids.masked_fill_(tokens.is_invalid, -1), non_blocking=True)
        return StepTokens(host_drawn, draw_plan, None if tokens.logprobs is None else _on_host(tokens.logprobs))

    def _captured_step(self, sequences: SequenceRows) -> CapturedStep | None:
        if not sequences.only_decodes:
            return None
        return self.decode_graphs.step_for(sequences.num_decodes, sequences.context_len_max)

    def _launch_operators(self, sequences: SequenceRows, draw_plan: DrawPlan, packer: ArrayPacker) -> _LaunchedModel:
        step = self._tables.pack(step_arrays(self.requests, sequences), packer)
        draw = PackedDrawPlan(draw_plan, packer)
        packed = packer.copy_to(self._device)
        logits = self._model.program.run(self._tables.inputs(step, packed), self._kv.tensors)
        return _LaunchedModel(logits, draw.on(packed), step.sampled_cells.on(packed), None)

    def _replay(
        self, captured: CapturedStep, sequences: SequenceRows, draw_plan: DrawPlan, packer: ArrayPacker
    ) -> _LaunchedModel:
        drawn = captured.drawn if draw_plan.is_plain else None
        step = self._tables.pack_decodes(sequences, captured, draw_plan.kernel, packer)
        draw = PackedDrawPlan(draw_plan, packer, drawn_already=drawn is not None)
        packed = packer.copy_to(self._device)
        drawn_cells = self._tables.fill_captured(captured, step, packed)
        captured.graph.replay()
        num_seqs = step.num_seqs
        if drawn is not None:
            drawn = drawn[0][:num_seqs], drawn[1][:num_seqs]
        return _LaunchedModel(captured.logits[:num_seqs], draw.on(packed), drawn_cells, drawn)


def _on_host(logprobs: DrawnLogprobs) -> DrawnLogprobs:
    return DrawnLogprobs(_to_host(logprobs.token_ids), _to_host(logprobs.logprobs), _to_host(logprobs.drawn_ranks))


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
