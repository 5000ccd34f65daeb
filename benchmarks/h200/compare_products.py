"""Whole decode steps with the backend's own products, and with torch's for all of them, in turns.

    python -m benchmarks.h200.compare_products OUT.json [--rows 1,8,16,24,32,48,64,96,128,160,192,256]

A product that starts early gains by what is beside it, so it is timed where it is: in captured steps of the whole
model. Two graphs of each size are replayed in turns, so that both find the card equally warm (where a device has no
graphs, both are launched). Prints medians and how far logits differ.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from backends.lowering.program import GraphProgram
from backends.operators.registry import REFERENCE, Kernel, KernelRegistry
from backends.registry import get_backend
from backends.streams import DeviceGraph
from benchmarks.h200.attempt import attempted
from benchmarks.h200.json_file import write_json
from benchmarks.h200.step_table import Bench, words_of
from benchmarks.h200.timed_steps import Step, decode_step
from sagellm.models.known_models import load_model_config
from sagellm.runtime.execution_graph.builder import build_graph
from sagellm.runtime.execution_graph.passes.early_selection import select_rows_early
from sagellm.runtime.execution_graph.passes.fusion import fuse

ROWS = "1,8,16,24,32,48,64,96,128,160,192,256"
TURNS = 40


@dataclass(frozen=True, slots=True)
class ComparedStep:
    """Medians of replays that took turns; ``logits_difference`` is relative, by the norm."""

    num_rows: int
    own_ms: float
    torch_ms: float
    logits_difference: float

    @property
    def gain(self) -> float:
        return 1 - self.own_ms / self.torch_ms


@dataclass(slots=True)
class Document:
    """What the JSON file holds."""

    model: str
    device: str
    torch: str
    context: int
    steps: list[ComparedStep] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class WithTorchProducts(KernelRegistry):
    """A backend's kernels, but for its products."""

    def kernel(self, backend: str, operator: str) -> Kernel:
        return super().kernel(REFERENCE if operator == "linear" else backend, operator)


class Repeated:
    """A step that can be run again, captured where the device has graphs."""

    def __init__(self, bench: Bench, program: GraphProgram, step: Step) -> None:
        self._bench, self._program = bench, program
        self._inputs = bench.inputs(step)
        self._graph: DeviceGraph | None = None
        self.logits = program.run(self._inputs, bench.kv)
        bench.backend.synchronize(0)
        if bench.backend.capabilities(0).graph_capture:
            self._graph = bench.backend.create_graph()
            with self._graph.capture():
                self.logits = program.run(self._inputs, bench.kv)

    def waited_ms(self) -> float:
        """Of one more run, waited for."""
        started_s = time.perf_counter()
        if self._graph is None:
            self._program.run(self._inputs, self._bench.kv)
        else:
            self._graph.replay()
        self._bench.backend.synchronize(0)
        return (time.perf_counter() - started_s) * 1e3

    def let_go(self) -> None:
        if self._graph is not None:
            self._graph.reset()


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    backend = get_backend(arguments.backend)
    config = load_model_config(arguments.model)
    document = Document(arguments.model, backend.get_device_info(0).name, torch.__version__, arguments.context)
    steps = [decode_step(int(rows), arguments.context) for rows in words_of(arguments.rows)]
    with torch.no_grad():
        bench = Bench(config, backend, steps, select_rows_early(fuse(build_graph(config))))
        plain = bench.lowered(WithTorchProducts())
        print(heading := f"{'rows':>6}{'own ms':>10}{'torch ms':>10}{'gain':>8}{'logits differ':>15}")
        for step in steps:
            found = attempted(step.name, partial(compared, bench, plain, step), document.failures)
            if found is not None:
                document.steps.append(found)
                print(line_of(found), flush=True)
            write_json(arguments.out, document)
    print(f"\n{document.model} on {document.device}, torch {document.torch}\n{heading}")
    print("\n".join(map(line_of, document.steps)))
    return 1 if document.failures else 0


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file for the figures")
    parser.add_argument("--backend", default="cuda", help="name of a hardware backend")
    parser.add_argument("--model", default="Qwen/Qwen2.5-7B", help="known model, or a config.json")
    parser.add_argument("--rows", default=ROWS, help="decodes in a step")
    parser.add_argument("--context", type=int, default=1024, help="tokens of KV of each decode")
    return parser.parse_args(words)


def compared(bench: Bench, plain: GraphProgram, step: Step) -> ComparedStep:
    own, other = Repeated(bench, bench.program, step), Repeated(bench, plain, step)
    times_ms = [(own.waited_ms(), other.waited_ms()) for _ in range(TURNS)]
    own_ms, other_ms = map(statistics.median, zip(*times_ms, strict=True))
    difference = torch.linalg.vector_norm(own.logits - other.logits) / torch.linalg.vector_norm(other.logits)
    own.let_go()
    other.let_go()
    return ComparedStep(step.num_seqs, own_ms, other_ms, float(difference))


def line_of(row: ComparedStep) -> str:
    return f"{row.num_rows:6}{row.own_ms:10.3f}{row.torch_ms:10.3f}{row.gain:8.1%}{row.logits_difference:15.2g}"


if __name__ == "__main__":
    sys.exit(main())
