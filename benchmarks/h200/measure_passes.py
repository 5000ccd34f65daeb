"""Measures what each optimiser pass of the execution graph gains on a device, with random weights.

Every variant of the graph is lowered to the backend's kernels and timed: decode steps, launched one by one
and (where the device can) replayed from a device graph, and prefills. Launches are operators that run
something; one that the backend has no kernel for is several of torch's, as the reference of a lone rotary
embedding is. Memory is the activations' peak as the allocator saw it, and as the memory pass plans it beside
what they would take with no buffer used twice. Prints a table; writes all figures to the JSON file given.

    python benchmarks/h200/measure_passes.py OUT.json --backend cuda --model Qwen/Qwen2.5-7B
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from backends.base import HardwareBackend
from backends.errors import BackendError
from backends.lowering.lower import lower
from backends.lowering.program import GraphProgram
from backends.operators.registry import KernelRegistry
from backends.registry import get_backend
from backends.step_inputs import KVTensors, StepInputs
from backends.weights.dummy import DummyWeights
from backends.weights.load import load_weights
from backends.weights.progress import NoProgress
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
from sagellm.runtime.execution_graph.tensors import StepSizes

BLOCK_SIZE = 16

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
class Step:
    """What is timed."""

    name: str
    num_seqs: int
    query_len: int
    context_len: int


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


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    backend = get_backend(arguments.backend)
    config = load_model_config(arguments.model)
    batches = [int(size) for size in arguments.batches.split(",")]
    prompts = [int(size) for size in arguments.prompts.split(",")]
    steps = [Step(f"decode x {size}", size, 1, arguments.context) for size in batches]
    steps += [Step(f"prefill {size}", 1, size, size) for size in prompts]
    measurements: list[Measurement] = []
    for variant, passes in VARIANTS.items():
        if is_no_other(config, variant):
            continue
        graph = build_graph(config)
        for rewrite in passes:
            graph = rewrite(graph)
        measurements += measure_variant(variant, graph, config, steps, backend, arguments.budget_s)
        write(arguments.out, arguments.model, backend, arguments.context, measurements)
    print_table(steps, measurements)


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="JSON file for the figures")
    parser.add_argument("--backend", "--device", default="cuda", help="name of a hardware backend")
    parser.add_argument("--model", default="Qwen/Qwen2.5-7B", help="known model, or a config.json")
    parser.add_argument("--batches", default="1,32,256", help="decodes in a step")
    parser.add_argument("--context", type=int, default=1024, help="tokens of KV of each decode")
    parser.add_argument("--prompts", default="1024,8192", help="tokens of a prefill")
    parser.add_argument("--budget-s", type=float, default=0.5, help="seconds of timing for each figure")
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
    kernels = KernelRegistry()
    backend.register_operators(kernels)
    weights = load_weights(graph, DummyWeights(device), rank=0, device=device, progress=NoProgress())
    program = lower(
        graph,
        weights,
        kernels=kernels,
        backend=backend.name,
        device=device,
        num_positions=max(step.context_len for step in steps),
    )
    kv = make_kv(config, max(blocks_of(step) for step in steps), device)
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
    num_tokens = step.num_seqs * step.query_len
    plan = plan_buffers(graph, StepSizes(num_tokens, step.num_seqs, step.num_seqs, 0, 0))
    return Measurement(
        variant=variant,
        step=step.name,
        num_launches=program.num_launches,
        launched_ms=median_ms(lambda: program.run(inputs, kv), backend, budget_s),
        replayed_ms=replayed_ms(program, inputs, kv, backend, budget_s) if step.query_len == 1 else None,
        activations_peak_mib=peak / 2**20,
        planned_peak_mib=plan.peak_bytes / 2**20,
        unshared_mib=plan.unshared_bytes / 2**20,
    )


def replayed_ms(
    program: GraphProgram, inputs: StepInputs, kv: KVTensors, backend: HardwareBackend, budget_s: float
) -> float | None:
    """Milliseconds of a step captured in a device graph: the device's share, without gaps between launches."""
    if not backend.capabilities(0).graph_capture:
        return None
    graph = backend.create_graph()
    try:
        with graph.capture():
            program.run(inputs, kv)
    except (BackendError, RuntimeError) as error:
        print(f"not captured: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    duration = median_ms(graph.replay, backend, budget_s)
    graph.reset()
    return duration


def median_ms(call: Callable[[], object], backend: HardwareBackend, budget_s: float) -> float:
    """The median over at least 3 and at most 100 calls, each waited for."""
    call()
    backend.synchronize()
    durations_s: list[float] = []
    deadline_s = time.perf_counter() + budget_s
    while len(durations_s) < 3 or (time.perf_counter() < deadline_s and len(durations_s) < 100):
        start_s = time.perf_counter()
        call()
        backend.synchronize()
        durations_s.append(time.perf_counter() - start_s)
    return statistics.median(durations_s) * 1000


def blocks_of(step: Step) -> int:
    return step.num_seqs * -(-step.context_len // BLOCK_SIZE)


def make_kv(config: ModelConfig, num_blocks: int, device: torch.device) -> KVTensors:
    shape = (num_blocks, BLOCK_SIZE, config.shape.num_kv_heads, config.shape.head_dim)
    dtype = getattr(torch, config.dtype)
    layers = range(config.shape.num_layers)
    keys = [torch.randn(shape, dtype=dtype, device=device) for _ in layers]
    return KVTensors(keys, [torch.randn(shape, dtype=dtype, device=device) for _ in layers], BLOCK_SIZE)


def make_inputs(step: Step, vocab_size: int, device: torch.device) -> StepInputs:
    """The last ``query_len`` tokens of each context; blocks lie in random order, as after some time of serving."""
    torch.manual_seed(0)
    num_tokens = step.num_seqs * step.query_len
    tables = torch.randperm(blocks_of(step)).view(step.num_seqs, -1)
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


def write(path: Path, model: str, backend: HardwareBackend, context_len: int, measurements: list[Measurement]) -> None:
    """After every variant, so that an interrupted run leaves what it has."""
    document = {
        "model": model,
        "device": backend.get_device_info(0).name,
        "torch": torch.__version__,
        "decode_context_tokens": context_len,
        "weights": "random",
        "measurements": [asdict(one) for one in measurements],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def print_table(steps: list[Step], measurements: list[Measurement]) -> None:
    for step in steps:
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


def gain(before: float | None, after: float | None) -> str:
    """How much shorter, in per cent of what it was."""
    return "-" if before is None or after is None else f"{100 * (before - after) / before:.1f}%"


if __name__ == "__main__":
    main()
