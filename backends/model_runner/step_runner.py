"""Runs one step: from a plan to tokens on their way to the host. Everything is launched, nothing is waited for."""

from dataclasses import dataclass
from itertools import repeat
from typing import TextIO

import torch

from backends.base import HardwareBackend
from backends.memory import MemoryKind
from backends.model_runner.decode_graphs import CapturedStep, DecodeGraphs
from backends.model_runner.device_tables import DeviceTables
from backends.model_runner.kv_blocks import KVBlocks
from backends.model_runner.loaded_model import LoadedModel
from backends.model_runner.mixed_graphs import CapturedMixedStep, MixedGraphs
from backends.model_runner.packed_arrays import ArrayPacker, StagingBuffer
from backends.model_runner.request_table import RequestTable, SequenceRows
from backends.model_runner.sampler.device_draw_plan import DeviceDrawPlan, PackedDrawPlan
from backends.model_runner.sampler.draw_plan import DrawPlan
from backends.model_runner.sampler.draw_planner import DrawPlanner
from backends.model_runner.sampler.logprob_report import DrawnLogprobs
from backends.model_runner.sampler.sampler import DrawnTokens, Sampler
from backends.model_runner.step_arrays import StepArrays, sampled_sequences, step_arrays
from sagellm.core.plan import StepPlan
from sagellm.core.step_executor import TokenLogprobs


class StepMemory:
    """Host memory of one step in flight, for what goes to the device and what comes back."""

    def __init__(self, backend: HardwareBackend, device_index: int, num_sampled_max: int) -> None:
        is_pinned = backend.capabilities(device_index).pinned_memory
        self.staging = StagingBuffer(is_pinned)
        self._backend, self._device_index = backend, device_index
        self._outcome = self._allocated(num_sampled_max)

    def outcome(self, num_words: int) -> torch.Tensor:
        """[num_words] int32, for what the host is told of the step. Grows with what requests want to know."""
        if num_words > self._outcome.numel():
            self._outcome = self._allocated(2 * num_words)
        return self._outcome[:num_words]

    def _allocated(self, num_words: int) -> torch.Tensor:
        return self._backend.allocate_tensor((num_words,), torch.int32, MemoryKind.PINNED, self._device_index)


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
        # Columns become lists at once, and rows of tuples by zip: a list for each row takes twice as long.
        token_ids = zip(*self.logprobs.token_ids.numpy().T.tolist(), strict=True)
        logprobs = zip(*self.logprobs.logprobs.numpy().T.tolist(), strict=True)
        following_ranks = range(1, self.logprobs.token_ids.shape[1])
        ranks = zip(self.logprobs.drawn_ranks.tolist(), *map(repeat, following_ranks), strict=False)
        entries = map(TokenLogprobs, token_ids, logprobs, ranks)
        if rows.num_logprobs.min() < rows.num_logprobs_max:
            ends = (rows.num_logprobs + 1).tolist()
            entries = map(_shortened, entries, ends)
        return dict(zip(rows.rows.tolist(), entries, strict=True))


def _shortened(entry: TokenLogprobs, end: int) -> TokenLogprobs:
    return TokenLogprobs(entry.token_ids[:end], entry.logprobs[:end], entry.ranks[:end])


@dataclass(frozen=True, slots=True)
class _LaunchedModel:
    """What a step's drawing goes on with."""

    logits: torch.Tensor  # [num_sampled, vocab_size] float32, unless nobody looks at them
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
        self._logit_kernels = backend.logit_kernels()
        self._sampler = Sampler(vocab_size, self._device, draw_tokens, self._logit_kernels)
        graphs_of = (model.program, kv, model.num_positions, backend, device_index)
        self.decode_graphs = DecodeGraphs(*graphs_of)
        self.mixed_graphs = MixedGraphs(*graphs_of)

    def capture_graphs(self, num_tokens_max: int, num_seqs_max: int, terminal: TextIO) -> None:
        """Capture the steps whose launch would keep the device waiting."""
        self.decode_graphs.capture(num_seqs_max, terminal)
        if self.decode_graphs.graphs:
            self.mixed_graphs.capture(num_tokens_max, num_seqs_max, terminal)

    def give_up_graphs(self, reason: str) -> None:
        """From now on steps are launched operator by operator."""
        self.decode_graphs.graphs.give_up(reason)
        self.mixed_graphs.graphs.give_up(reason)

    def warn_of_failed_graphs(self) -> None:
        """One line for each kind of steps of which not all are captured."""
        self.decode_graphs.graphs.warn_of_failure()
        self.mixed_graphs.graphs.warn_of_failure()

    def run(self, plan: StepPlan, memory: StepMemory) -> StepTokens:
        """Launch the step on the current stream.

        Raises ExecutorError where the plan does not fit what is known, and what torch raises where memory is
        out. Requests then stand as if the step had run, until a plan begins them again.
        """
        sequences = self.requests.apply(plan)
        draw_plan = self._draw_planner.plan(*sampled_sequences(sequences))
        packer = ArrayPacker(memory.staging)
        launched = self._launch(sequences, draw_plan, packer)
        if not draw_plan.num_rows:
            return StepTokens(memory.outcome(0), draw_plan, None)
        return self._drawn(launched, draw_plan, memory)

    def _drawn(self, launched: _LaunchedModel, draw_plan: DrawPlan, memory: StepMemory) -> StepTokens:
        """The step's tokens, and what else the host is told, in one copy."""
        num_sampled, report_shape = draw_plan.num_rows, self._sampler.report_shape(draw_plan)
        num_words = num_sampled + report_shape[0] * report_shape[1]
        outcome = torch.empty(num_words, dtype=torch.int32, device=self._device)
        report_words = outcome[num_sampled:].view(report_shape) if draw_plan.logprobs is not None else None
        tokens = self._sampler.draw(
            launched.logits, launched.draw_plan, self._tables.token_ids, launched.drawn, report_words
        )
        self._keep(launched.drawn_cells, tokens, outcome[:num_sampled])
        host = memory.outcome(num_words)
        host.copy_(outcome, non_blocking=True)
        logprobs = None if report_words is None else DrawnLogprobs(host[num_sampled:].view(report_shape))
        return StepTokens(host[:num_sampled], draw_plan, logprobs)

    def _keep(self, cells: torch.Tensor, tokens: DrawnTokens, outcome: torch.Tensor) -> None:
        """Drawn tokens become the last ones of their sequences, and are told in ``outcome`` [num_sampled] int32."""
        if self._logit_kernels is not None:
            self._logit_kernels.keep_drawn(tokens.token_ids, tokens.is_invalid, cells, self._tables.token_ids, outcome)
            return
        token_ids = tokens.token_ids.to(torch.int32)
        self._tables.keep_drawn(cells, token_ids)
        outcome.copy_(token_ids.masked_fill_(tokens.is_invalid, -1))

    def _launch(self, sequences: SequenceRows, draw_plan: DrawPlan, packer: ArrayPacker) -> _LaunchedModel:
        """The way that takes the host the least time."""
        context_len_max = sequences.context_len_max
        if sequences.only_decodes:
            captured = self.decode_graphs.step_for(sequences.num_decodes, context_len_max)
            if captured is not None:
                return self._replay(captured, sequences, draw_plan, packer)
        arrays = step_arrays(self.requests, sequences)
        if not sequences.only_decodes:
            num_prompts = arrays.table_rows.size - arrays.num_decodes
            mixed = self.mixed_graphs.step_for(arrays.positions.size, num_prompts, context_len_max)
            if mixed is not None:
                return self._replay_mixed(mixed, arrays, draw_plan, packer)
        return self._launch_operators(arrays, draw_plan, packer)

    def _launch_operators(self, arrays: StepArrays, draw_plan: DrawPlan, packer: ArrayPacker) -> _LaunchedModel:
        step = self._tables.pack(arrays, packer)
        draw = PackedDrawPlan(draw_plan, packer)
        packed = packer.copy_to(self._device)
        logits = self._model.program.run(self._tables.inputs(step, packed), self._kv.tensors)
        return _LaunchedModel(logits, draw.on(packed), step.sampled_cells.on(packed), None)

    def _replay_mixed(
        self, captured: CapturedMixedStep, arrays: StepArrays, draw_plan: DrawPlan, packer: ArrayPacker
    ) -> _LaunchedModel:
        step = self._tables.pack_mixed(arrays, captured, packer)
        draw = PackedDrawPlan(draw_plan, packer)
        packed = packer.copy_to(self._device)
        self._tables.fill_mixed(captured, step, packed)
        captured.graph.replay()
        logits = self.mixed_graphs.logits(captured, step.sampled_rows.on(packed), arrays.context_len_max)
        return _LaunchedModel(logits, draw.on(packed), step.sampled_cells.on(packed), None)

    def _replay(
        self, captured: CapturedStep, sequences: SequenceRows, draw_plan: DrawPlan, packer: ArrayPacker
    ) -> _LaunchedModel:
        drawn = captured.drawn if draw_plan.is_plain else None
        step = self._tables.pack_decodes(sequences, captured, None if drawn is None else draw_plan.kernel, packer)
        draw = PackedDrawPlan(draw_plan, packer, drawn_already=drawn is not None)
        packed = packer.copy_to(self._device)
        drawn_cells = self._tables.fill_captured(captured, step, packed)
        captured.graph.replay()
        num_seqs = step.num_seqs
        if drawn is not None:
            drawn = drawn[0][:num_seqs], drawn[1][:num_seqs]
        logits = captured.logits[:num_seqs]
        if drawn is None or draw_plan.logprobs is not None:
            logits = logits.float()
        return _LaunchedModel(logits, draw.on(packed), drawn_cells, drawn)
