"""A program whose logits depend on every token and position of the context, read through the block table.

The "KV" of a token is the token and its position. So a wrong block, slot, position, token or order of writes
changes what comes out, and nothing is hidden by rounding.
"""

import threading
from collections.abc import Callable
from zlib import crc32

import torch

from backends.base import HardwareBackend
from backends.executor_settings import ExecutorSettings
from backends.model_runner.loaded_model import LoadedModel, LoadModel
from backends.step_inputs import KVTensors, StepInputs

VOCAB_SIZE = 50
NUM_POSITIONS = 4096


def logits_of(context: list[tuple[int, int]]) -> torch.Tensor:
    """The model: any function of the (token, position) pairs will do. [VOCAB_SIZE] float32."""
    seed = crc32(repr(context).encode())
    return torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


def expected_greedy(prompt: list[int], num_tokens: int) -> list[int]:
    """What one device with endless memory makes of the prompt."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(logits_of([(token, at) for at, token in enumerate(tokens)]).argmax()))
    return tokens[len(prompt) :]


class ContextProgram:
    """`ModelProgram` on the CPU. ``before_run`` is called with the number of each run, from 0."""

    vocab_size = VOCAB_SIZE

    def __init__(
        self, before_run: Callable[[int, StepInputs], None] | None = None, num_positions: int = NUM_POSITIONS
    ) -> None:
        self.num_runs = 0
        self.num_positions = num_positions
        self._before_run = before_run
        self.thread_names: set[str] = set()

    def run(self, inputs: StepInputs, kv: KVTensors) -> torch.Tensor:
        number, self.num_runs = self.num_runs, self.num_runs + 1
        self.thread_names.add(threading.current_thread().name)
        keys, values = kv.keys[0].view(-1), kv.values[0].view(-1)
        keys[inputs.slot_mapping] = inputs.token_ids.to(keys.dtype)
        if self._before_run is not None:
            self._before_run(number, inputs)
        values[inputs.slot_mapping] = inputs.positions.to(values.dtype)
        self._check(inputs)
        rows = [self._row(inputs, keys, values, kv.block_size, row) for row in inputs.sampled_rows.tolist()]
        return torch.stack(rows) if rows else torch.zeros(0, VOCAB_SIZE)

    def _row(
        self, inputs: StepInputs, keys: torch.Tensor, values: torch.Tensor, block_size: int, row: int
    ) -> torch.Tensor:
        sequence = int((inputs.query_starts[1:] <= row).sum())
        num_context = int(inputs.positions[row]) + 1
        position = torch.arange(num_context)
        block_ids = inputs.block_tables[sequence, position // block_size].long()
        slots = block_ids * block_size + position % block_size
        return logits_of(list(zip(keys[slots].int().tolist(), values[slots].int().tolist(), strict=True)))

    def _check(self, inputs: StepInputs) -> None:
        """What `StepInputs` promises."""
        lens = inputs.query_starts.diff()
        starts = inputs.query_starts[:-1].long()
        first_positions = (inputs.context_lens - lens).clamp(max=self.num_positions - 1)
        assert (inputs.positions[starts] == first_positions).all()
        assert (inputs.positions < self.num_positions).all()
        assert (lens[: inputs.num_decodes] == 1).all()
        assert inputs.query_len_max == lens.max()
        assert inputs.context_len_max == inputs.context_lens.max()
        assert inputs.query_starts[-1] == inputs.token_ids.numel() == inputs.positions.numel()
        assert inputs.slot_mapping.unique().numel() == inputs.slot_mapping.numel()


def loading(program: ContextProgram) -> LoadModel:
    """A ``load`` for `TorchStepExecutor` that gives the program."""

    def load(settings: ExecutorSettings, backend: HardwareBackend) -> LoadedModel:
        return LoadedModel(
            program,
            num_layers=1,
            num_kv_heads=1,
            head_dim=1,
            kv_dtype=torch.float32,
            num_positions=program.num_positions,
        )

    return load
