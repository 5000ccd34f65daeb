"""Measures what each optimiser pass of the execution graph gains on a device, with random weights.

Every variant of the graph is lowered to the backend's kernels and timed: decode steps, launched one by one
and (where the device can) replayed from a device graph, and prefills. Launches are operators that run
something; one that the backend has no kernel for is several of torch's, as the reference of a lone rotary
embedding is. Memory is the activations' peak as the allocator saw it, and as the memory pass plans it beside
what they would take with no buffer used twice. Prints a table; writes all figures to the JSON file given.

    python -m benchmarks.h200.measure_passes OUT.json --backend cuda --model Qwen/Qwen2.5-7B

The scheduling pass is measured on prefills that hand their KV over (``kv_send_timing``): ``--only kv-sends`` leaves
the fusions out.
"""

import argparse
import gc
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from backends.base import HardwareBackend
from backends.lowering.program import GraphProgram
from backends.registry import get_backend
from backends.step_inputs import KVTensors
from backends.weights.dummy import DummyWeights
from backends.weights.load import load_weights
from backends.weights.progress import NoProgress
from benchmarks.h200.kv_send_timing import KVSendMeasurement, measure_kv_sends, print_kv_sends
from benchmarks.h200.timed_steps import (
    Step,
    decode_step,
    gain,
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
from sagellm.runtime.execution_graph.passes.fusion import (
    fuse_add_norm,
    fuse_head_norms,
    fuse_rotary_kv_write,
    fuse_silu_multiply,
)
from sagellm.runtime.execution_graph.passes.joined_projections import join_projections
from sagellm.runtime.execution_graph.passes.memory import plan_buffers

Pass = Callable[[ExecutionGraph], ExecutionGraph]
# Silu x gate needs the joined projection, head norms the joined rotary and KV write.
VARIANTS: dict[str, tuple[Pass, ...]] = {
    "unfused": (),
    "join projections": (join_projections,),
    "join projections, silu x gate": (join_projections, fuse_silu_multiply),
    "add + norm": (fuse_add_norm,),
    "rotary + KV write": (fuse_rotary_kv_write,),
    "rotary + KV write, head norms": (fuse_rotary_kv_write, fuse_head_norms),
    "all": (join_projections, fuse_silu_multiply, fuse_add_norm, fuse_rotary_kv_write),
    "all, head norms": (join_projections, fuse_silu_multiply, fuse_add_norm, fuse_rotary_kv_write, fuse_head_norms),
}


@dataclass(frozen=True, slots=True)
class Measurement:
    """One variant of the graph on one step. Milliseconds are medians of whole steps, waited for."""

    variant: str
    step: str
    num_launches: int
    launched_ms: float
    replayed_ms: float | None  # None where the device has no graphs, or refused to capture this one
    activations_peak_mib: float
    planned_peak_mib: float
    unshared_mib: float


@dataclass(slots=True)
class Document:
    """What the JSON file holds."""

    model: str
    device: str
    torch: str
    decode_context_tokens: int
    weights: str = "random"
    measurements: list[Measurement] = field(default_factory=list)
    kv_sends: list[KVSendMeasurement] = field(default_factory=list)


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    backend = get_backend(arguments.backend)
    config = load_model_config(arguments.model)
    prefills = [prefill_step(int(size)) for size in arguments.prompts.split(",")]
    steps = [decode_step(int(size), arguments.context) for size in arguments.batches.split(",")] + prefills
    document = Document(arguments.model, backend.get_device_info(0).name, torch.__version__, arguments.context)
    for variant in () if arguments.only == "kv-sends" else VARIANTS:
        if is_no_other(config, variant):
            continue
        graph = build_graph(config)
        for rewrite in VARIANTS[variant]:
            graph = rewrite(graph)
        document.measurements += measure_variant(variant, graph, config, steps, backend, arguments.budget_s)
        write(arguments.out, document)
    if arguments.only != "fusions":
        document.kv_sends += measure_kv_sends(config, prefills, backend, arguments.budget_s)
        write(arguments.out, document)
    print_table(steps, document.measurements)
    print_kv_sends(document.kv_sends)


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="JSON file for the figures")
    parser.add_argument("--backend", "--device", default="cuda", help="name of a hardware backend")
    parser.add_argument("--model", default="Qwen/Qwen2.5-7B", help="known model, or a config.json")
    parser.add_argument("--batches", default="1,32,256", help="decodes in a step")
    parser.add_argument("--context", type=int, default=1024, help="tokens of KV of each decode")
    parser.add_argument("--prompts", default="1024,8192", help="tokens of a prefill")
    parser.add_argument("--budget-s", type=float, default=0.5, help="seconds of timing for each figure")
    parser.add_argument("--only", choices=("fusions", "kv-sends"), help="measure only these passes")
    return parser.parse_args(words)


def is_no_other(config: ModelConfig, variant: str) -> bool:
    """Without norms of heads, the variants that join them are the same as those that do not."""
    return "head norms" in variant and not config.shape.qk_norm


def measure_variant(
    variant: str,
    graph: ExecutionGraph,
    config: ModelConfig,
    steps: list[Step],
    backend: HardwareBackend,
    budget_s: float,
) -> list[Measurement]:
    device = backend.torch_device(0)
    weights = load_weights(graph, DummyWeights(device), rank=0, device=device, progress=NoProgress())
    program = lowered(graph, weights, backend, device, max(step.context_len for step in steps))
    kv = make_kv(config, steps, device)
    found = [measure_step(variant, graph, program, step, kv, backend, budget_s) for step in steps]
    del program, weights, kv
    gc.collect()
    backend.release_cached_memory()
    return found


def measure_step(
    variant: str,
    graph: ExecutionGraph,
    program: GraphProgram,
    step: Step,
    kv: KVTensors,
    backend: HardwareBackend,
    budget_s: float,
) -> Measurement:
    inputs = make_inputs(step, program.vocab_size, backend.torch_device(0))
    program.run(inputs, kv)  # compiles and tunes what there is to
    backend.synchronize()
    before = backend.memory_info(0).allocated_bytes
    backend.reset_memory_peak(0)
    program.run(inputs, kv)
    backend.synchronize()
    peak = backend.memory_info(0).allocated_bytes_max - before
    plan = plan_buffers(graph, step.sizes)

    def call() -> object:
        return program.run(inputs, kv)

    return Measurement(
        variant=variant,
        step=step.name,
        num_launches=program.num_launches,
        launched_ms=median_ms(call, backend, 0, budget_s),
        replayed_ms=replayed_ms(call, backend, 0, budget_s) if step.query_len == 1 else None,
        activations_peak_mib=peak / 2**20,
        planned_peak_mib=plan.peak_bytes / 2**20,
        unshared_mib=plan.unshared_bytes / 2**20,
    )


def write(path: Path, document: Document) -> None:
    """After every variant, so that an interrupted run leaves what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(document), indent=1) + "\n", encoding="utf-8")


def print_table(steps: list[Step], measurements: list[Measurement]) -> None:
    for step in steps if measurements else ():
        found = [one for one in measurements if one.step == step.name]
        print(f"\n{step.name}")
        print(
            f"{'':34}{'launches':>9}{'ms':>10}{'gain':>7}{'replayed ms':>13}{'gain':>7}{'peak MiB':>10}{'planned':>9}"
        )
        for one in found:
            print(
                f"{one.variant:34}{one.num_launches:9}{one.launched_ms:10.3f}"
                f"{gain(found[0].launched_ms, one.launched_ms):>7}"
                f"{'-' if one.replayed_ms is None else f'{one.replayed_ms:.3f}':>13}"
                f"{gain(found[0].replayed_ms, one.replayed_ms):>7}"
                f"{one.activations_peak_mib:10.1f}{one.planned_peak_mib:9.1f}"
            )
        print(f"no buffer used twice: {found[0].unshared_mib:.1f} MiB unfused, {found[-1].unshared_mib:.1f} MiB fused")


if __name__ == "__main__":
    main()
