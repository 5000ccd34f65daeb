"""Steps that benchmarks of lowered graphs run, the inputs and caches that they need, and how they are timed."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from backends.base import HardwareBackend
from backends.errors import BackendError
from backends.lowering.lower import lower
from backends.lowering.program import GraphProgram
from backends.operators.communicator import Communicator
from backends.operators.registry import KernelRegistry
from backends.step_inputs import KVTensors, StepInputs
from sagellm.models.model_config import ModelConfig
from sagellm.runtime.execution_graph.ir import ExecutionGraph
from sagellm.runtime.execution_graph.tensors import StepSizes

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Step:
    """Sequences of one length, of which the last ``query_len`` tokens are computed."""

    name: str
    num_seqs: int
    query_len: int
    context_len: int

    @property
    def sizes(self) -> StepSizes:
        """What the step's price depends on."""
        num_pairs = self.query_len * self.context_len - self.query_len * (self.query_len - 1) // 2
        return StepSizes(
            num_tokens=self.num_seqs * self.query_len,
            num_seqs=self.num_seqs,
            num_sampled=self.num_seqs,
            num_context_tokens=self.num_seqs * self.context_len,
            num_token_pairs=self.num_seqs * num_pairs,
        )

    @property
    def num_blocks(self) -> int:
        return self.num_seqs * -(-self.context_len // BLOCK_SIZE)


def decode_step(num_seqs: int, context_len: int) -> Step:
    return Step(f"decode x {num_seqs}", num_seqs, 1, context_len)


def prefill_step(num_tokens: int) -> Step:
    return Step(f"prefill {num_tokens}", 1, num_tokens, num_tokens)


def lowered(
    graph: ExecutionGraph,
    weights: dict[str, torch.Tensor],
    backend: HardwareBackend,
    device: torch.device,
    num_positions: int,
    communicator: Communicator | None = None,
    kernels: KernelRegistry | None = None,
) -> GraphProgram:
    """A program of the backend's kernels, which ``kernels``, an empty registry, may give back otherwise."""
    kernels = kernels or KernelRegistry()
    backend.register_operators(kernels)
    return lower(
        graph,
        weights,
        kernels=kernels,
        backend=backend.name,
        device=device,
        num_positions=num_positions,
        communicator=communicator,
    )


def make_kv(config: ModelConfig, steps: list[Step], device: torch.device, tp: int = 1) -> KVTensors:
    """One rank's cache, large enough for each of the steps, full of random numbers."""
    num_blocks = max(step.num_blocks for step in steps)
    shape = (num_blocks, BLOCK_SIZE, config.shape.kv_heads_per_rank(tp), config.shape.head_dim)
    dtype = getattr(torch, config.dtype)
    layers = range(config.shape.num_layers)
    keys = [torch.randn(shape, dtype=dtype, device=device) for _ in layers]
    return KVTensors(keys, [torch.randn(shape, dtype=dtype, device=device) for _ in layers], BLOCK_SIZE)


def make_inputs(step: Step, vocab_size: int, device: torch.device) -> StepInputs:
    """The same on every rank; blocks lie in random order, as after some time of serving."""
    torch.manual_seed(0)
    num_tokens = step.num_seqs * step.query_len
    tables = torch.randperm(step.num_blocks).view(step.num_seqs, -1)
    positions = torch.arange(step.context_len - step.query_len, step.context_len).repeat(step.num_seqs)
    rows = torch.arange(step.num_seqs).repeat_interleave(step.query_len)
    slots = tables[rows, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    starts = torch.arange(0, num_tokens + 1, step.query_len)
    return StepInputs(
        token_ids=torch.randint(vocab_size, (num_tokens,)).to(device),
        positions=positions.to(device),
        slot_mapping=slots.to(device),
        query_starts=starts.to(torch.int32).to(device),
        context_lens=torch.full((step.num_seqs,), step.context_len, dtype=torch.int32, device=device),
        block_tables=tables.to(torch.int32).to(device),
        sampled_rows=(starts[1:] - 1).to(device),
        num_decodes=step.num_seqs if step.query_len == 1 else 0,
        query_len_max=step.query_len,
        context_len_max=step.context_len,
    )


def greedy_drawing(backend: HardwareBackend, num_rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """What draws the most likely tokens of that many rows of logits: the backend's kernel where it has one."""
    draw_tokens = backend.token_drawing()
    if draw_tokens is None:
        return lambda logits: logits.argmax(-1)
    places = torch.zeros(2, num_rows, dtype=torch.int64, device=backend.torch_device(0))
    temperature = torch.zeros(num_rows, device=backend.torch_device(0))
    return lambda logits: draw_tokens(logits, temperature, places[0], places[1])[0]


def replayed_ms(
    call: Callable[[], object], backend: HardwareBackend, device_index: int, budget_s: float
) -> float | None:
    """Milliseconds of a step captured in a device graph: the device's share, without gaps between launches.

    None where the device has no graphs, or refused to capture this one.
    """
    if not backend.capabilities(device_index).graph_capture:
        return None
    graph = backend.create_graph()
    try:
        with graph.capture():
            call()
    except (BackendError, RuntimeError) as error:
        print(f"not captured: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    duration = median_ms(graph.replay, backend, device_index, budget_s)
    graph.reset()
    return duration


def median_ms(call: Callable[[], object], backend: HardwareBackend, device_index: int, budget_s: float) -> float:
    """The median over at least 3 and at most 100 calls, each waited for."""
    call()
    backend.synchronize(device_index)
    durations_s: list[float] = []
    deadline_s = time.perf_counter() + budget_s
    while len(durations_s) < 3 or (time.perf_counter() < deadline_s and len(durations_s) < 100):
        start_s = time.perf_counter()
        call()
        backend.synchronize(device_index)
        durations_s.append(time.perf_counter() - start_s)
    return statistics.median(durations_s) * 1000


def gain(before: float | None, after: float | None) -> str:
    """How much shorter, in per cent of what it was."""
    return "-" if before is None or after is None else f"{100 * (before - after) / before:.1f}%"
