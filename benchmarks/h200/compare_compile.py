"""`torch.compile` beside the hand-lowered graph, on the steps of the table of `step_table.py`.

    python -m benchmarks.h200.compare_compile OUT.json

*Whole*: every layer but the first is one function of torch's operators, compiled by inductor for the step's shapes. It
is compiled once and called for all layers. Attention and the write to the KV cache stay this project's kernels, as
custom operators. *Piecewise*: only what lies between one layer's attention and the next one's write to the cache is
compiled. The first layer, the embedding and the head are launched as always. All are captured in device graphs, and
timed with the drawing of tokens; logits are compared with the hand-lowered graph's.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from backends.base import HardwareBackend
from backends.lowering.operator_calls import RankContext
from backends.operators.communicator import SingleRank
from backends.operators.registry import KernelRegistry
from backends.operators.rotary_table import rotary_table
from backends.registry import get_backend
from backends.step_inputs import StepInputs
from benchmarks.h200.attempt import attempted
from benchmarks.h200.graph_parts import PartsProgram, between_attentions, cut, make_function, whole_layers
from benchmarks.h200.json_file import write_json
from benchmarks.h200.step_table import Bench, words_of
from benchmarks.h200.timed_steps import Step, decode_step, greedy_drawing, median_ms, prefill_step, replayed_ms
from sagellm.models.known_models import load_model_config
from sagellm.models.rope import Rope
from sagellm.runtime.execution_graph.builder import build_graph
from sagellm.runtime.execution_graph.passes.fusion import fuse

VARIANTS = {"whole": whole_layers, "piecewise": between_attentions}
HAND_LOWERED = "hand-lowered"
RUNS_BEFORE_CAPTURE = 3


@dataclass(frozen=True, slots=True)
class CompiledStep:
    """One way of running one step. Milliseconds are medians of whole steps, waited for."""

    variant: str
    step: str
    launched_ms: float
    replayed_ms: float | None
    compile_s: float
    logits_difference: float  # norm of the difference to the hand-lowered graph's, by their norm

    @property
    def ms(self) -> float:
        return self.launched_ms if self.replayed_ms is None else self.replayed_ms


@dataclass(slots=True)
class Document:
    """What the JSON file holds."""

    model: str
    device: str
    torch: str
    mode: str
    steps: list[CompiledStep] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class StepKernels:
    """This project's attention and cache write as custom operators, which a compiler calls and does not look into.

    What attention wants of the step beside tensors is held here; ``step`` says which step comes next.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.registry = KernelRegistry()
        bench.backend.register_operators(self.registry)
        self._tables: dict[tuple[Rope, int], torch.Tensor] = {}
        self.rank = RankContext(SingleRank(), self._table)
        self._attention = self.kernel("attention")
        self._prepared: Any = None
        self.attend = torch.library.custom_op("sagellm_benchmark::attend", self._attend, mutates_args=())
        self.attend.register_fake(lambda query, keys, values, scale, window: torch.empty_like(query).contiguous())
        caches = ("key_cache", "value_cache")
        self.write_kv = torch.library.custom_op("sagellm_benchmark::write_kv", self._write_kv, mutates_args=caches)
        self.write_kv.register_fake(lambda query, *rest: query.new_empty(query.shape))

    def kernel(self, operator: str) -> Any:
        return self.registry.kernel(self._bench.backend.name, operator)

    def step(self, inputs: StepInputs) -> Any:
        """What attention is given of this step, for the one sliding window of the model."""
        prepare = self._attention.prepare
        window = self._bench.config.sliding_window(0)
        block_size = self._bench.kv.block_size
        self._prepared = inputs
        if prepare is not None:
            self._prepared = prepare(inputs, block_size=block_size, sliding_window=window)
        return self._prepared

    def _table(self, rope: Rope, head_dim: int) -> torch.Tensor:
        if (rope, head_dim) not in self._tables:
            table = rotary_table(rope, head_dim, self._bench.num_positions, self._bench.device)
            self._tables[rope, head_dim] = table
        return self._tables[rope, head_dim]

    def _attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int
    ) -> torch.Tensor:
        mixed: torch.Tensor = self._attention.run(
            query, keys, values, self._prepared, scale=scale, sliding_window=window
        )
        return mixed

    def _write_kv(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        run = self.kernel("rotary_kv_write").run
        turned: torch.Tensor = run(query, key, value, positions, cos_sin, key_cache, value_cache, slot_mapping)
        return turned


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    backend = get_backend(arguments.backend)
    steps = [decode_step(int(batch), arguments.context) for batch in words_of(arguments.batches)]
    steps += [prefill_step(int(size)) for size in words_of(arguments.prompts)]
    document = Document(arguments.model, backend.get_device_info(0).name, torch.__version__, arguments.mode)
    deadline_s = time.monotonic() + arguments.limit_s
    with torch.no_grad():
        config = load_model_config(arguments.model)
        bench = Bench(config, backend, steps, fuse(build_graph(config)))
        kernels = StepKernels(bench)
        for step in steps:
            measure_step(bench, kernels, step, arguments, document, deadline_s)
            gc.collect()
            backend.release_cached_memory()
    write_json(arguments.out, document)
    print_table(document)
    return 1 if document.failures else 0


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file for the figures")
    parser.add_argument("--backend", default="cuda", help="name of a hardware backend")
    parser.add_argument("--model", default="Qwen/Qwen2.5-7B", help="known model, or a config.json")
    parser.add_argument("--batches", default="1,32,256", help="decodes in a step")
    parser.add_argument("--context", type=int, default=1024, help="tokens of KV of each decode")
    parser.add_argument("--prompts", default="1024,8192", help="tokens of a prefill")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    modes = ("default", "max-autotune-no-cudagraphs")
    parser.add_argument("--mode", choices=modes, default="default", help="of torch.compile; the second takes minutes")
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile; eager only traces")
    parser.add_argument("--budget-s", type=float, default=0.5, help="seconds of timing for each figure")
    parser.add_argument("--limit-s", type=float, default=100.0, help="compile nothing more after this long")
    return parser.parse_args(words)


def measure_step(
    bench: Bench,
    kernels: StepKernels,
    step: Step,
    arguments: argparse.Namespace,
    document: Document,
    deadline_s: float,
) -> None:
    """Of all variants; every one is printed and written as soon as it is there."""
    inputs = bench.inputs(step)
    logits = bench.program.run(inputs, bench.kv)
    found: list[CompiledStep | None] = []
    found.append(
        attempted(
            f"{HAND_LOWERED}, {step.name}",
            lambda: timed(HAND_LOWERED, step, bench.call(step), bench.backend, arguments.budget_s, 0.0, 0.0),
            document.failures,
        )
    )
    for variant in words_of(arguments.variants):
        if time.monotonic() > deadline_s:
            document.failures.append(f"{variant}, {step.name}: not begun, {arguments.limit_s:.0f} s are over")
            continue

        def call(variant: str = variant) -> CompiledStep:
            return measure_compiled(bench, kernels, variant, step, logits, arguments)

        found.append(attempted(f"{variant}, {step.name}", call, document.failures))
    document.steps += [row for row in found if row is not None]
    write_json(arguments.out, document)


def measure_compiled(
    bench: Bench,
    kernels: StepKernels,
    variant: str,
    step: Step,
    expected: torch.Tensor,
    arguments: argparse.Namespace,
) -> CompiledStep:
    # Dynamo gives up on code that it has compiled for several shapes.
    torch.compiler.reset()
    parts = cut(bench.graph, VARIANTS[variant](bench.graph))
    program = PartsProgram(bench.graph, parts, bench.weights, kernels.kernel, kernels.rank)
    first, *others = [part for part in parts if part.is_compiled]
    if any(part.code != first.code for part in others):
        raise ValueError(f"{variant}: the layers of {bench.config.shape.name} differ, must be alike to share code")
    function = make_function(first, kernels.rank, kernels.attend, kernels.write_kv)
    mode = None if arguments.mode == "default" else arguments.mode
    compiled = torch.compile(function, fullgraph=True, dynamic=False, mode=mode, backend=arguments.compiler)
    inputs, draw = bench.inputs(step), greedy_drawing(bench.backend, step.num_seqs)

    def run() -> torch.Tensor:
        return program.run(inputs, bench.kv, kernels.step(inputs), compiled)

    started_s = time.monotonic()
    difference = relative_difference(run(), expected)
    compile_s = time.monotonic() - started_s
    for _ in range(RUNS_BEFORE_CAPTURE):
        run()
    return timed(variant, step, lambda: draw(run()), bench.backend, arguments.budget_s, compile_s, difference)


def timed(
    variant: str,
    step: Step,
    call: Callable[[], object],
    backend: HardwareBackend,
    budget_s: float,
    compile_s: float,
    difference: float,
) -> CompiledStep:
    launched_ms = median_ms(call, backend, 0, budget_s)
    row = CompiledStep(variant, step.name, launched_ms, replayed_ms(call, backend, 0, budget_s), compile_s, difference)
    print(line_of(row), flush=True)
    return row


def relative_difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(logits - expected) / torch.linalg.vector_norm(expected))


def line_of(row: CompiledStep) -> str:
    replayed = "-" if row.replayed_ms is None else f"{row.replayed_ms:.3f}"
    return (
        f"{row.step:16}{row.variant:14}{row.launched_ms:12.3f}{replayed:>13}{row.compile_s:11.1f}"
        f"{row.logits_difference:14.2g}"
    )


def print_table(document: Document) -> None:
    print(f"\n{document.model} on {document.device}, torch {document.torch}, mode {document.mode}")
    print(f"{'step':16}{'':14}{'launched ms':>12}{'replayed ms':>13}{'compile s':>11}{'logits differ':>14}{'gain':>8}")
    by_hand = {row.step: row.ms for row in document.steps if row.variant == HAND_LOWERED}
    for row in document.steps:
        gain = f"{1 - row.ms / by_hand[row.step]:8.1%}" if row.step in by_hand and row.variant != HAND_LOWERED else ""
        print(line_of(row) + gain)
    for failure in document.failures:
        print(f"failed: {failure}")


if __name__ == "__main__":
    sys.exit(main())
