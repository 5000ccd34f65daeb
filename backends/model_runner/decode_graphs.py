"""Steps in which every sequence decodes one token, captured once in device graphs and replayed from then on.

A graph saves the host from launching each operator. It is made for a number of sequences; a step with fewer
fills up with rows that are of no account.
"""

import logging
import time
from dataclasses import dataclass
from typing import TextIO

import torch

from backends.base import HardwareBackend
from backends.model_runner.batch_sizes import captured_sizes, sizes_worth_keeping, smallest_size
from backends.model_runner.captured_inputs import CapturedInputs
from backends.model_runner.count_progress import CountProgress
from backends.model_runner.device_failures import is_of_device
from backends.model_runner.kv_blocks import KVBlocks
from backends.step_inputs import ModelProgram
from backends.streams import DeviceGraph

_LOG = logging.getLogger(__name__)
_GIB = 1 << 30
_NUM_TIMED_REPLAYS = 4


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A graph and the memory that belongs to its number of sequences."""

    num_seqs: int
    spare_slot: int  # where rows write that only fill the step up
    graph: DeviceGraph
    token_ids: torch.Tensor  # [num_seqs] int32
    places: torch.Tensor  # [NUM_PLACES, num_seqs] int64: see `CapturedInputs.places`
    block_tables: torch.Tensor  # [num_seqs, num_blocks_max] int32
    logits: torch.Tensor  # [num_seqs, vocab_size] float32
    drawn: tuple[torch.Tensor, torch.Tensor] | None  # tokens and whether they are invalid, where a kernel draws


class DecodeGraphs:
    """The captured steps of one model on one device. They share their memory: one of them runs at a time."""

    def __init__(
        self, program: ModelProgram, kv: KVBlocks, num_positions: int, backend: HardwareBackend, device_index: int
    ) -> None:
        self._program = program
        self._kv = kv
        self._num_positions = num_positions
        self._backend = backend
        self._draw_tokens = backend.token_drawing()
        self._device_index = device_index
        self._steps: dict[int, CapturedStep] = {}
        self._sizes: tuple[int, ...] = ()
        self._inputs: CapturedInputs | None = None  # graphs know where it is, and do not keep it there
        self._failure = ""  # why not all sizes are captured
        self._num_seqs_failed = 0
        self.capture_s = 0.0
        self.memory_bytes = 0

    def __len__(self) -> int:
        return len(self._steps)

    def capture(self, num_seqs_max: int, terminal: TextIO) -> None:
        """Capture steps of up to so many sequences, large ones first, whose memory serves the smaller ones.

        What is captured writes to nobody's block only. Where a step cannot be captured, no more are: smaller ones
        then run as the smallest that was, or operator by operator (`warn_of_failure`).
        """
        begin_bytes = self._reserved_bytes()
        sizes = captured_sizes(num_seqs_max)
        progress = CountProgress(terminal, f"{self._device_name()} decode graphs", len(sizes))
        try:
            inputs = self._inputs = CapturedInputs(
                sizes[-1],
                self._num_positions,
                self._kv.tensors.block_size,
                self._kv.spare_slot,
                self._backend.torch_device(self._device_index),
            )
            # Compilers and libraries set themselves up in steps that are not captured.
            for size in reversed(sizes):
                inputs.fill_up(size)
                self._run(size, inputs, None)
            for size in reversed(sizes):
                inputs.fill_up(size)
                self._steps[size] = self._captured(size, inputs)
                progress.advance()
        except Exception as error:  # a compiler's errors have nothing in common
            if not is_of_device(error):
                raise
            self._failure = _first_line(error)
            self._num_seqs_failed = next(size for size in reversed(sizes) if size not in self._steps)
        if not self._steps:
            self._inputs = None
        self._sizes = sizes_worth_keeping({size: self._replayed_s(step) for size, step in self._steps.items()})
        self.memory_bytes = max(0, self._reserved_bytes() - begin_bytes)
        self.capture_s = progress.end(f", {self.memory_bytes / _GIB:.2f} GiB")

    def give_up(self, reason: str) -> None:
        """Let go of all that was captured; from now on steps are launched operator by operator."""
        if self._steps:
            self._failure, self._num_seqs_failed = reason, max(self._steps)
        self._steps.clear()
        self._sizes, self._inputs, self.memory_bytes = (), None, 0
        self._reserved_bytes()  # the allocator gives back what nobody holds any more

    def warn_of_failure(self) -> None:
        """One line, where not all sizes are captured, that says what steps do instead, and why."""
        if self._failure:
            instead = f"filled up to {min(self._steps)}" if self._steps else "launched operator by operator"
            what = f"decode steps of up to {self._num_seqs_failed} sequences are {instead}, not captured"
            _LOG.warning("%s: %s: %s", self._device_name(), what, self._failure)

    def _replayed_s(self, step: CapturedStep) -> float:
        """The least of some times."""
        assert self._inputs is not None
        self._inputs.fill_up(step.num_seqs)  # all sizes share the memory, and each lays it out its own way
        durations_s = []
        for _ in range(_NUM_TIMED_REPLAYS):
            self._backend.synchronize(self._device_index)
            started_s = time.perf_counter()
            step.graph.replay()
            self._backend.synchronize(self._device_index)
            durations_s.append(time.perf_counter() - started_s)
        return min(durations_s)

    def step_for(self, num_seqs: int, context_len_max: int) -> CapturedStep | None:
        """The captured step that so many decodes fit into; None where they are to be launched one by one."""
        if context_len_max > self._num_positions:
            return None
        size = smallest_size(self._sizes, num_seqs)
        return self._steps[size] if size else None

    def _captured(self, size: int, inputs: CapturedInputs) -> CapturedStep:
        largest = next(iter(self._steps.values()), None)
        graph = self._backend.create_graph(None if largest is None else largest.graph)
        with graph.capture():
            logits, drawn = self._run(size, inputs, largest)
        block_tables = inputs.block_tables[:size]
        spare_slot, token_ids = self._kv.spare_slot, inputs.token_ids[:size]
        return CapturedStep(size, spare_slot, graph, token_ids, inputs.places(size), block_tables, logits, drawn)

    def _run(
        self, size: int, inputs: CapturedInputs, largest: CapturedStep | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """The step's logits, in the memory of those of the largest step, and what a kernel draws from them."""
        logits = self._program.run(inputs.step_inputs(size), self._kv.tensors)
        if largest is not None:
            logits = largest.logits[:size].copy_(logits)
        return logits, None if self._draw_tokens is None else self._draw_tokens(logits, *inputs.drawing(size))

    def _device_name(self) -> str:
        return f"{self._backend.name}:{self._device_index}"

    def _reserved_bytes(self) -> int:
        """Of what is in use, on the whole: the allocator keeps nothing for later."""
        self._backend.synchronize(self._device_index)
        self._backend.release_cached_memory()
        return self._backend.memory_info(self._device_index).reserved_bytes


def _first_line(error: BaseException) -> str:
    """Of the error that all others came of."""
    while error.__context__ is not None:
        error = error.__context__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
