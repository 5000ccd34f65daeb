"""Times of whole steps on a card beside what it could give, and where the time of a step goes.

    python -m benchmarks.h200.step_table OUT.json [--perfetto FILE.json]

Decodes and prefills of Qwen2.5-7B's shape with random weights, a prompt of 32,768 tokens in chunks, and decodes of
long contexts. A step is the lowered graph that serving runs, and the drawing of tokens. *Launched* is one operator
after the other from the host, *replayed* from a device graph; both are medians, waited for. Bytes and FLOPs are counted
from the execution graph, each tensor once. The share is of 4.3 TB/s (a copy) or 790 TFLOP/s (bf16 products),
whichever is nearer; the floor has weights and KV cross memory once, and computes meanwhile; *by operator* is the floor
of one operator after the other. vLLM's steps are medians of synchronous ones, with the host's share.

Some steps are profiled. ``--perfetto`` keeps the profiles, one for each, with the step's name in the file's.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from backends.base import HardwareBackend
from backends.lowering.program import GraphProgram
from backends.operators.registry import KernelRegistry
from backends.registry import get_backend
from backends.step_inputs import KVTensors, StepInputs
from backends.weights.dummy import DummyWeights
from backends.weights.load import load_weights
from backends.weights.progress import NoProgress
from benchmarks.h200.annotated_kernels import AnnotatedKernels, annotated
from benchmarks.h200.attempt import attempted
from benchmarks.h200.kernel_breakdown import Breakdown, KernelTime, profile_step, read_breakdown
from benchmarks.h200.step_work import DRAWING, PEAK_BYTES_PER_S, PEAK_FLOPS_PER_S, Work, work_by_kind
from benchmarks.h200.timed_steps import (
    Step,
    decode_step,
    greedy_drawing,
    lowered,
    make_inputs,
    make_kv,
    median_ms,
    prefill_step,
    replayed_ms,
)
from sagellm.models.known_models import load_model_config
from sagellm.models.model_config import ModelConfig
from sagellm.runtime.execution_graph.builder import build_graph
from sagellm.runtime.execution_graph.ir import ExecutionGraph
from sagellm.runtime.execution_graph.passes.early_selection import select_rows_early
from sagellm.runtime.execution_graph.passes.fusion import fuse

VLLM_MODEL = "Qwen/Qwen2.5-7B"
VLLM_STEP_MS = {
    ("decode x 1", 1024): 5.44,
    ("decode x 32", 1024): 6.30,
    ("decode x 128", 1024): 8.69,
    ("prefill 128", 128): 7.27,
    ("prefill 1024", 1024): 22.6,
    ("prefill 8192", 8192): 188.6,
}
"""vLLM 0.22.1 on the same kind of card, by a step's name and context: medians of synchronous steps."""
NUM_POSITIONS_UNSTATED = 32_768
NUM_KERNELS_SHOWN = 8


@dataclass(frozen=True, slots=True)
class KindRow:
    """One kind of operator in a step's profile. ``floor_ms`` is what the card needs for it at full rate."""

    kind: str
    num_kernels: int
    ms: float
    floor_ms: float


@dataclass(frozen=True, slots=True)
class StepRow:
    """One step. Milliseconds are medians of whole steps, waited for."""

    step: str
    num_tokens: int
    context_len: int
    launched_ms: float
    replayed_ms: float | None  # None where the device has no graphs
    num_bytes: int
    num_flops: int
    floor_ms: float
    operators_floor_ms: float
    vllm_ms: float | None

    @property
    def ms(self) -> float:
        return self.launched_ms if self.replayed_ms is None else self.replayed_ms

    @property
    def share_of_peak(self) -> float:
        """Of the nearer of the two limits."""
        return max(self.num_bytes / PEAK_BYTES_PER_S, self.num_flops / PEAK_FLOPS_PER_S) / (self.ms / 1e3)


@dataclass(frozen=True, slots=True)
class ProfiledStep:
    """Where a step's time goes, as one run of it was seen on the device."""

    step: str
    source: str  # replayed, launched, or host where there is no device
    kinds: tuple[KindRow, ...]
    kernels: tuple[KernelTime, ...]  # longest first
    gaps_ms: float  # between kernels
    span_ms: float


@dataclass(slots=True)
class Document:
    """What the JSON file holds."""

    model: str
    device: str
    torch: str
    steps: list[StepRow] = field(default_factory=list)
    profiles: list[ProfiledStep] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Bench:
    """A model's graph on a device, and steps of it."""

    def __init__(self, config: ModelConfig, backend: HardwareBackend, steps: list[Step], graph: ExecutionGraph) -> None:
        self.config, self.backend, self.graph = config, backend, graph
        self.device = backend.torch_device(0)
        self.weights = load_weights(
            self.graph, DummyWeights(self.device), rank=0, device=self.device, progress=NoProgress()
        )
        longest = max(step.context_len for step in steps)
        self.num_positions = max(longest, config.max_model_len or NUM_POSITIONS_UNSTATED)
        self.program = self.lowered(None)
        self.kv: KVTensors = make_kv(config, steps, self.device)

    def lowered(self, kernels: KernelRegistry | None) -> GraphProgram:
        where = (self.graph, self.weights, self.backend, self.device, self.num_positions)
        return lowered(*where, kernels=kernels)

    def annotated_program(self) -> GraphProgram:
        return self.lowered(AnnotatedKernels(self.program.vocab_size))

    def inputs(self, step: Step) -> StepInputs:
        """As serving has them: decodes are captured for contexts of any length."""
        inputs = make_inputs(step, self.program.vocab_size, self.device)
        return replace(inputs, context_len_max=self.num_positions) if inputs.num_decodes else inputs

    def call(self, step: Step) -> Callable[[], object]:
        inputs, draw = self.inputs(step), greedy_drawing(self.backend, step.num_seqs)
        return lambda: draw(self.program.run(inputs, self.kv))

    def annotated_call(self, step: Step, program: GraphProgram) -> Callable[[], object]:
        inputs, draw = self.inputs(step), annotated(DRAWING, greedy_drawing(self.backend, step.num_seqs))
        return lambda: draw(program.run(inputs, self.kv))

    def work(self, step: Step) -> dict[str, Work]:
        return work_by_kind(self.graph, step.sizes)


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    backend = get_backend(arguments.backend)
    config = load_model_config(arguments.model)
    steps = chosen_steps(arguments)
    document = Document(arguments.model, backend.get_device_info(0).name, torch.__version__)
    bench = Bench(config, backend, steps, select_rows_early(fuse(build_graph(config))))
    print(f"{document.model} on {document.device}, torch {document.torch}: {len(steps)} steps", flush=True)
    for step in steps:
        row = attempted(step.name, partial(measured, bench, step, arguments), document.failures)
        if row is not None:
            document.steps.append(row)
            print(line_of(row), flush=True)
        write(arguments.out, document)
        gc.collect()
        backend.release_cached_memory()
    profile_steps(bench, steps, arguments, document)
    write(arguments.out, document)
    print_table(document)
    return 1 if document.failures else 0


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file for the figures")
    parser.add_argument("--backend", default="cuda", help="name of a hardware backend")
    parser.add_argument("--model", default=VLLM_MODEL, help="known model, or a config.json")
    parser.add_argument("--batches", default="1,32,128,256", help="decodes in a step")
    parser.add_argument("--context", type=int, default=1024, help="tokens of KV of each decode")
    parser.add_argument("--prompts", default="128,1024,8192", help="tokens of a prefill")
    parser.add_argument("--long-prompt", type=int, default=32768, help="tokens of a prompt in chunks; 0: none")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of each of its chunks")
    parser.add_argument("--long-decodes", default="1x32768,16x16384", help="batches of decodes of long contexts")
    parser.add_argument("--profile", default="decode x 1,decode x 32,decode x 256,prefill 1024,prefill 8192")
    parser.add_argument("--perfetto", type=Path, help="keep the profiles")
    parser.add_argument("--budget-s", type=float, default=0.6, help="seconds of timing for each figure")
    return parser.parse_args(words)


def chosen_steps(arguments: argparse.Namespace) -> list[Step]:
    steps = [decode_step(int(batch), arguments.context) for batch in words_of(arguments.batches)]
    steps += [prefill_step(int(size)) for size in words_of(arguments.prompts)]
    ends = range(arguments.chunk, arguments.long_prompt + 1, arguments.chunk)
    steps += [Step(f"prompt {end - arguments.chunk}..{end}", 1, arguments.chunk, end) for end in ends]
    for long in words_of(arguments.long_decodes):
        batch, context = map(int, long.split("x"))
        steps.append(Step(f"decode x {batch} of {context}", batch, 1, context))
    return steps


def words_of(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def measured(bench: Bench, step: Step, arguments: argparse.Namespace) -> StepRow:
    call = bench.call(step)
    launched_ms = median_ms(call, bench.backend, 0, arguments.budget_s)
    replay_ms = replayed_ms(call, bench.backend, 0, arguments.budget_s)
    work = sum(bench.work(step).values(), Work())
    is_like_vllm = arguments.model == VLLM_MODEL
    return StepRow(
        step.name,
        step.num_seqs * step.query_len,
        step.context_len,
        launched_ms,
        replay_ms,
        work.num_bytes,
        work.num_flops,
        work.floor_s * 1e3,
        work.operators_s * 1e3,
        VLLM_STEP_MS.get((step.name, step.context_len)) if is_like_vllm else None,
    )


def profile_steps(bench: Bench, steps: list[Step], arguments: argparse.Namespace, document: Document) -> None:
    program = bench.annotated_program()
    wanted = words_of(arguments.profile)
    with tempfile.TemporaryDirectory() as folder:
        kept = arguments.perfetto or Path(folder) / "profile.json"
        for step in steps:
            if step.name not in wanted:
                continue
            path = kept.with_name(f"{kept.stem}.{step.name.replace(' ', '-')}{kept.suffix or '.json'}")
            found = attempted(
                f"profile of {step.name}",
                partial(profiled, bench, program, step, path),
                document.failures,
            )
            if found is not None:
                document.profiles.append(found)
                write(arguments.out, document)
                print_profile(found)


def profiled(bench: Bench, program: GraphProgram, step: Step, path: Path) -> ProfiledStep:
    backend, launch = bench.backend, bench.annotated_call(step, program)
    for _ in range(2):
        launch()
    backend.synchronize(0)
    graph = backend.create_graph() if backend.capabilities(0).graph_capture else None
    if graph is not None:
        call = bench.call(step)
        with graph.capture():
            call()
        graph.replay()
    replay = None if graph is None else graph.replay
    written = profile_step(launch, replay, lambda: backend.synchronize(0), path)
    if graph is not None:
        graph.reset()
    return profile_row(step.name, read_breakdown(written), bench.work(step))


def profile_row(step: str, found: Breakdown, work: dict[str, Work]) -> ProfiledStep:
    kinds = tuple(
        KindRow(each.kind, each.num_kernels, each.ms, work.get(each.kind, Work()).operators_s * 1e3)
        for each in found.kinds
    )
    return ProfiledStep(step, found.source, kinds, found.kernels, found.gaps_ms, found.span_ms)


def write(path: Path, document: Document) -> None:
    """After every step, so that an interrupted run leaves what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(row) | {"share_of_peak": row.share_of_peak} for row in document.steps]
    path.write_text(json.dumps(asdict(document) | {"steps": rows}, indent=1) + "\n", encoding="utf-8")


HEADING = (
    f"{'step':22}{'launched':>9}{'replayed':>9}{'GB':>8}{'TFLOP':>8}{'TB/s':>7}{'TFLOP/s':>9}{'of peak':>8}"
    f"{'floor':>8}{'by oper.':>9}{'vLLM':>8}"
)


def line_of(row: StepRow) -> str:
    seconds = row.ms / 1e3
    return (
        f"{row.step:22}{row.launched_ms:9.2f}{milliseconds(row.replayed_ms):>9}{row.num_bytes / 1e9:8.2f}"
        f"{row.num_flops / 1e12:8.2f}{row.num_bytes / 1e12 / seconds:7.2f}{row.num_flops / 1e12 / seconds:9.1f}"
        f"{row.share_of_peak:8.0%}{row.floor_ms:8.2f}{row.operators_floor_ms:9.2f}{milliseconds(row.vllm_ms):>8}"
    )


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def print_profile(found: ProfiledStep) -> None:
    print(f"\n{found.step}, {found.source}: {found.span_ms:.3f} ms from the first kernel to the last")
    print(f"{'':22}{'kernels':>9}{'ms':>9}{'share':>8}{'floor':>9}{'of floor':>9}")
    for row in found.kinds:
        of_floor = f"{row.floor_ms / row.ms:.0%}" if row.ms and row.floor_ms else "-"
        share = row.ms / found.span_ms if found.span_ms else 0.0
        print(f"{row.kind:22}{row.num_kernels:9}{row.ms:9.3f}{share:8.1%}{row.floor_ms:9.3f}{of_floor:>9}")
    print(f"{'gaps':22}{'':9}{found.gaps_ms:9.3f}{found.gaps_ms / found.span_ms if found.span_ms else 0.0:8.1%}")
    for kernel in found.kernels[:NUM_KERNELS_SHOWN]:
        print(f"  {kernel.ms:9.3f} ms {kernel.count:5} x {kernel.kind}: {kernel.name[:80]}")
    sys.stdout.flush()


def print_table(document: Document) -> None:
    print(f"\n{HEADING}")
    for row in document.steps:
        print(line_of(row))
    chunks = [row for row in document.steps if row.step.startswith("prompt ")]
    if chunks:
        print(
            f"prompt of {chunks[-1].context_len} tokens in {len(chunks)} chunks: {sum(row.ms for row in chunks):.1f} ms"
        )
    print("milliseconds; vLLM's steps are synchronous and include its host's share")
    for failure in document.failures:
        print(f"failed: {failure}")


if __name__ == "__main__":
    sys.exit(main())
