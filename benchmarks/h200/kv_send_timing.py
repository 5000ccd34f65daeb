"""What the scheduling pass gains for a prefill instance: sends of KV on a stream of their own beside compute.

Each prefill is run without sends, with the send of each layer in line with its computation, and scheduled by
the prices of its nodes, which puts sends on their own stream. What was staged in memory of the host is compared
with the cache, and logits with those of the prefill that sends nothing.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from backends.base import HardwareBackend
from backends.lowering.kv_sends import KVSends, allocate_staging
from backends.profile_files import load_profile
from backends.step_inputs import KVTensors
from backends.weights.dummy import DummyWeights
from backends.weights.load import load_weights
from backends.weights.progress import NoProgress
from benchmarks.h200.timed_steps import Step, lowered, make_inputs, make_kv, replayed_ms
from sagellm.cost_model.graph_prices import node_prices
from sagellm.cost_model.profile import AnalyticProfile
from sagellm.models.model_config import ModelConfig
from sagellm.runtime.execution_graph.builder import build_graph
from sagellm.runtime.execution_graph.ir import ExecutionGraph
from sagellm.runtime.execution_graph.passes.fusion import fuse
from sagellm.runtime.execution_graph.passes.kv_sends import add_kv_sends
from sagellm.runtime.execution_graph.passes.scheduling import schedule
from sagellm.runtime.execution_graph.tensors import StepSizes

PROFILE = "h200/spec"


@dataclass(frozen=True, slots=True)
class KVSendMeasurement:
    """One variant of one prefill. Milliseconds are medians of whole steps, waited for, of all variants in turn."""

    variant: str
    step: str
    launched_ms: float
    replayed_ms: float | None
    sent_mib: float
    logits_difference_max: float


def measure_kv_sends(
    config: ModelConfig, steps: list[Step], backend: HardwareBackend, budget_s: float
) -> list[KVSendMeasurement]:
    """Raises ``ValueError`` where what was staged is not what the cache holds."""
    device = backend.torch_device(0)
    graph = fuse(build_graph(config))
    weights = load_weights(graph, DummyWeights(device), rank=0, device=device, progress=NoProgress())
    kv = make_kv(config, steps, device)
    staging = allocate_staging(backend, kv, max(step.query_len for step in steps))
    num_positions = max(step.context_len for step in steps)
    found: list[KVSendMeasurement] = []
    for step in steps:
        inputs = make_inputs(step, config.shape.vocab_size, device)
        sends = KVSends(inputs.slot_mapping, staging)
        calls: dict[str, Callable[[], torch.Tensor]] = {}
        for variant, of_variant in variants(graph, step.sizes).items():
            program = lowered(of_variant, weights, backend, device, num_positions)
            calls[variant] = lambda program=program, inputs=inputs, sends=sends: program.run(inputs, kv, sends)
        found += measure_step(step, calls, sends, kv, backend, budget_s)
    return found


def variants(graph: ExecutionGraph, sizes: StepSizes) -> dict[str, ExecutionGraph]:
    profile = load_profile(PROFILE)
    assert isinstance(profile, AnalyticProfile), f"{PROFILE} prices no operators"
    sending = add_kv_sends(graph)
    prices = node_prices(profile, sending, sizes)
    return {
        "no sends": graph,
        "sends in line": sending,
        "sends scheduled": schedule(sending, lambda node: prices[node.name]).graph,
    }


def measure_step(
    step: Step,
    calls: dict[str, Callable[[], torch.Tensor]],
    sends: KVSends,
    kv: KVTensors,
    backend: HardwareBackend,
    budget_s: float,
) -> list[KVSendMeasurement]:
    differences: dict[str, float] = {}
    plain = calls["no sends"]()
    for variant, call in calls.items():
        sends.staging.zero_()
        differences[variant] = float((call() - plain).abs().max())
        backend.synchronize(0)
        if variant != "no sends":
            check_staged(f"{step.name}, {variant}", sends, kv)
    launched_ms = medians_ms(calls, backend, budget_s)
    found = []
    for variant, call in calls.items():
        sends.staging.zero_()
        replay_ms = replayed_ms(call, backend, 0, budget_s)
        if variant != "no sends" and replay_ms is not None:
            check_staged(f"{step.name}, {variant}, replayed", sends, kv)
        sent_mib = 0.0 if variant == "no sends" else sends.num_bytes / 2**20
        found.append(
            KVSendMeasurement(variant, step.name, launched_ms[variant], replay_ms, sent_mib, differences[variant])
        )
    return found


def check_staged(what: str, sends: KVSends, kv: KVTensors) -> None:
    """Raises ``ValueError`` where the staging is not the cache's content."""
    num_tokens = sends.slots.shape[0]
    for layer, caches in enumerate(zip(kv.keys, kv.values, strict=True)):
        for kind, cache in enumerate(caches):
            held = cache.flatten(0, 1)[sends.slots].cpu()
            if not torch.equal(sends.staging[layer, kind, :num_tokens], held):
                raise ValueError(f"{what}: layer {layer}'s {'KV'[kind]} was staged otherwise than the cache holds it")


def medians_ms(
    calls: dict[str, Callable[[], torch.Tensor]], backend: HardwareBackend, budget_s: float
) -> dict[str, float]:
    """All calls in turn, so that what changes on the device meanwhile meets them alike."""
    durations_s: dict[str, list[float]] = {variant: [] for variant in calls}
    deadline_s = time.perf_counter() + budget_s * len(calls)
    for num_rounds in range(100):
        if num_rounds >= 3 and time.perf_counter() > deadline_s:
            break
        for variant, call in calls.items():
            start_s = time.perf_counter()
            call()
            backend.synchronize(0)
            durations_s[variant].append(time.perf_counter() - start_s)
    return {variant: statistics.median(durations) * 1000 for variant, durations in durations_s.items()}


def print_kv_sends(measurements: list[KVSendMeasurement]) -> None:
    for step in dict.fromkeys(one.step for one in measurements):
        found = {one.variant: one for one in measurements if one.step == step}
        print(f"\n{step}, handing its KV over")
        print(f"{'':20}{'ms':>10}{'over no sends':>15}{'replayed ms':>13}{'sent MiB':>10}{'logits differ':>15}")
        for one in found.values():
            print(
                f"{one.variant:20}{one.launched_ms:10.3f}{one.launched_ms - found['no sends'].launched_ms:15.3f}"
                f"{'-' if one.replayed_ms is None else f'{one.replayed_ms:.3f}':>13}"
                f"{one.sent_mib:10.1f}{one.logits_difference_max:15.2g}"
            )
        in_line, scheduled = found["sends in line"], found["sends scheduled"].launched_ms
        sends_ms = in_line.launched_ms - found["no sends"].launched_ms
        if sends_ms <= 0:
            print("sends in line took no time that could be seen")
            continue
        print(
            f"sends in line: {in_line.sent_mib * 2**20 / sends_ms / 1e6:.1f} GB/s; "
            f"the schedule hides {100 * (in_line.launched_ms - scheduled) / sends_ms:.0f}% of their time"
        )
