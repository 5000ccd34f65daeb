"""Measures passes of the execution graph under tensor parallelism, on two devices of one host, with random weights.

Unfused and fused graphs are run with collectives in line with computation, and scheduled by the prices of their
nodes, which puts collectives on a stream of their own. Checked are that all ranks have the same logits, and that a
small model's are those of one rank alone. Steps are launched one by one, and (where the device can) replayed from a
device graph; milliseconds are medians on rank 0. Prints a table; writes all figures to the JSON file given.

    python -m benchmarks.h200.measure_tp_passes OUT.json --backend cuda --model Qwen/Qwen2.5-7B
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing

from backends.base import HardwareBackend
from backends.errors import BackendError
from backends.lowering.program import GraphProgram
from backends.operators.communicator import Communicator, DistributedRank, SingleRank
from backends.profile_files import load_profile
from backends.registry import get_backend
from backends.step_inputs import KVTensors, StepInputs
from backends.streams import DeviceGraph
from backends.weights.dummy import DummyWeights
from backends.weights.load import load_weights
from backends.weights.progress import NoProgress
from benchmarks.h200.timed_steps import Step, decode_step, gain, lowered, make_inputs, make_kv, prefill_step
from sagellm.cost_model.graph_prices import node_prices
from sagellm.cost_model.profile import AnalyticProfile
from sagellm.models.known_models import load_model_config
from sagellm.models.model_config import ModelConfig
from sagellm.runtime.execution_graph.builder import build_graph
from sagellm.runtime.execution_graph.ir import ExecutionGraph
from sagellm.runtime.execution_graph.passes.fusion import fuse
from sagellm.runtime.execution_graph.passes.scheduling import schedule

NUM_RANKS = 2
PROFILE = "h200/spec"
TIMEOUT = timedelta(seconds=60)  # of a collective, should a rank be lost
NOTE = (
    "Each sum over ranks of a dense layer is read by the very next operator, so the scheduling pass finds nothing to "
    "run beside it:\na stream of its own shows what the events between streams cost, not a gain."
)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One variant of the graph on one step."""

    variant: str
    step: str
    num_launches: int
    launched_ms: float
    replayed_ms: float | None  # None where the device has no graphs, or refused to capture this one
    ranks_difference_max: float  # of logits, between the ranks


@dataclass(slots=True)
class Rank:
    """One process's part of the benchmark."""

    communicator: Communicator
    backend: HardwareBackend
    device: torch.device
    num_calls: int

    def sum(self, number: float) -> float:
        """Over all ranks."""
        return float(self.communicator.all_reduce(torch.tensor([number], device=self.device)))

    def synchronize(self) -> None:
        self.backend.synchronize()


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(measure_rank, (arguments, str(Path(folder) / "meeting")), nprocs=NUM_RANKS)


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="JSON file for the figures")
    parser.add_argument("--backend", default="cuda", help="name of a hardware backend")
    parser.add_argument("--model", default="Qwen/Qwen2.5-7B", help="known model, or a config.json")
    parser.add_argument(
        "--small-model", default="sagellm/qwen3-100m", help="model whose logits are compared with one rank's"
    )
    parser.add_argument("--batches", default="1,32,256", help="decodes in a step")
    parser.add_argument("--context", type=int, default=1024, help="tokens of KV of each decode")
    parser.add_argument("--prompts", default="1024,8192", help="tokens of a prefill")
    parser.add_argument("--num-calls", type=int, default=10, help="timed calls for each figure")
    return parser.parse_args(words)


def measure_rank(rank: int, arguments: argparse.Namespace, meeting_file: str) -> None:
    """What each process runs."""
    backend = get_backend(arguments.backend)
    backend.set_device(rank % backend.get_device_count())
    device = backend.torch_device()
    distributed.init_process_group(
        backend.capabilities().collectives,
        init_method=f"file://{meeting_file}",
        rank=rank,
        world_size=NUM_RANKS,
        timeout=TIMEOUT,
        device_id=None if device.type == "cpu" else device,
    )
    try:
        one = Rank(DistributedRank(), backend, device, arguments.num_calls)
        difference = small_model_difference(load_model_config(arguments.small_model), one)
        steps = [decode_step(int(size), arguments.context) for size in arguments.batches.split(",")]
        steps += [prefill_step(int(size)) for size in arguments.prompts.split(",")]
        found = measure_model(load_model_config(arguments.model), steps, one)
        if rank == 0:
            write(arguments, backend, difference, found)
            print_table(found, arguments, difference)
    finally:
        distributed.destroy_process_group()


def small_model_difference(config: ModelConfig, rank: Rank) -> float:
    """The greatest difference between a prompt's logits of this group and of one rank alone, scheduled."""
    step = prefill_step(32)
    alone = replace(rank, communicator=SingleRank())
    logits = [
        ScheduledModel(fuse(build_graph(config, of.communicator.size)), config, [step], of) for of in (alone, rank)
    ]
    one, both = (model.programs(step)["scheduled"].run(model.inputs(step), model.kv) for model in logits)
    return float((one - both).abs().max())


class ScheduledModel:
    """A graph with this rank's weights and cache; lowered as it is, and as it is scheduled for a step."""

    def __init__(self, graph: ExecutionGraph, config: ModelConfig, steps: list[Step], rank: Rank) -> None:
        self._graph = graph
        self._rank = rank
        self._num_positions = max(step.context_len for step in steps)
        number, device = rank.communicator.rank, rank.device
        self._weights = load_weights(graph, DummyWeights(device), rank=number, device=device, progress=NoProgress())
        self.kv = make_kv(config, steps, device, graph.tp)

    def programs(self, step: Step) -> dict[str, GraphProgram]:
        profile = load_profile(PROFILE)
        assert isinstance(profile, AnalyticProfile), f"{PROFILE} prices no operators"
        prices = node_prices(profile, self._graph, step.sizes)
        scheduled = schedule(self._graph, lambda node: prices[node.name]).graph
        return {"in line": self._lowered(self._graph), "scheduled": self._lowered(scheduled)}

    def inputs(self, step: Step) -> StepInputs:
        logits = self._graph.tensors_by_name[self._graph.outputs[0]]
        return make_inputs(step, logits.width, self._rank.device)

    def _lowered(self, graph: ExecutionGraph) -> GraphProgram:
        rank = self._rank
        return lowered(graph, self._weights, rank.backend, rank.device, self._num_positions, rank.communicator)


def measure_model(config: ModelConfig, steps: list[Step], rank: Rank) -> list[Measurement]:
    found: list[Measurement] = []
    plain = build_graph(config, NUM_RANKS)
    for passes, graph in (("unfused", plain), ("fused", fuse(plain))):
        model = ScheduledModel(graph, config, steps, rank)
        for step in steps:
            inputs = model.inputs(step)
            for variant, program in model.programs(step).items():
                found.append(measure_program(f"{passes}, {variant}", program, step, inputs, model.kv, rank))
        del model
        gc.collect()
        rank.backend.release_cached_memory()
    return found


def measure_program(
    variant: str, program: GraphProgram, step: Step, inputs: StepInputs, kv: KVTensors, rank: Rank
) -> Measurement:
    def call() -> torch.Tensor:
        return program.run(inputs, kv)

    logits = call()
    first = logits.clone()
    distributed.broadcast(first, 0)
    difference = rank.sum(float((logits - first).abs().max()))
    return Measurement(
        variant=variant,
        step=step.name,
        num_launches=program.num_launches,
        launched_ms=median_ms(call, rank),
        replayed_ms=replayed_ms(call, rank),
        ranks_difference_max=difference,
    )


def median_ms(call: Callable[[], object], rank: Rank) -> float:
    """Every rank makes the same calls, each begun by all together and waited for."""
    durations_s: list[float] = []
    for _ in range(rank.num_calls):
        distributed.barrier()
        rank.synchronize()
        start_s = time.perf_counter()
        call()
        rank.synchronize()
        durations_s.append(time.perf_counter() - start_s)
    return statistics.median(durations_s) * 1000


def replayed_ms(call: Callable[[], object], rank: Rank) -> float | None:
    """None where any rank could not capture the step."""
    if not rank.backend.capabilities().graph_capture:
        return None
    graph = captured(call, rank.backend)
    if rank.sum(float(graph is None)) or graph is None:
        return None
    graph.replay()
    duration = median_ms(graph.replay, rank)
    graph.reset()
    return duration


def captured(call: Callable[[], object], backend: HardwareBackend) -> DeviceGraph | None:
    graph = backend.create_graph()
    try:
        with graph.capture():
            call()
    except (BackendError, RuntimeError) as error:
        print(f"not captured: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return graph


def write(
    arguments: argparse.Namespace, backend: HardwareBackend, difference: float, measurements: list[Measurement]
) -> None:
    document = {
        "model": arguments.model,
        "device": backend.get_device_info().name,
        "num_ranks": NUM_RANKS,
        "torch": torch.__version__,
        "decode_context_tokens": arguments.context,
        "weights": "random",
        "small_model": arguments.small_model,
        "small_model_difference_max": difference,
        "note": NOTE,
        "measurements": [asdict(one) for one in measurements],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def print_table(measurements: list[Measurement], arguments: argparse.Namespace, difference: float) -> None:
    for step in dict.fromkeys(one.step for one in measurements):
        found = [one for one in measurements if one.step == step]
        print(f"\n{step}, {NUM_RANKS} ranks")
        print(f"{'':22}{'launches':>9}{'ms':>10}{'gain':>7}{'replayed ms':>13}{'gain':>7}{'ranks differ':>14}")
        for one in found:
            print(
                f"{one.variant:22}{one.num_launches:9}{one.launched_ms:10.3f}"
                f"{gain(found[0].launched_ms, one.launched_ms):>7}"
                f"{'-' if one.replayed_ms is None else f'{one.replayed_ms:.3f}':>13}"
                f"{gain(found[0].replayed_ms, one.replayed_ms):>7}{one.ranks_difference_max:14.2g}"
            )
    print(f"\n{NOTE}")
    print(f"{arguments.small_model}: logits differ from one rank's by at most {difference:.2g}")


if __name__ == "__main__":
    main()
