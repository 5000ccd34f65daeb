"""Times the CUDA backend's operator kernels at shapes of Qwen2.5-7B, in bfloat16.

    python benchmarks/h200/measure_kernels.py OUT.json --group decode|prefill|mixed|elementwise|linear

Each figure is the median of CUDA graph replays that hold many calls, on rotating buffers together larger than
the L2 cache. Bytes are those that must move at least once, operations those of the visible part of attention.
The share of peak is of the memory's 4.3 TB/s or the tensor cores' 790 TFLOP/s, what an H200 sustains in
``measure_operators.py``, whichever is nearer. ``torch us`` is the reference operator on the same data.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from backends.conformance.batches import step_inputs
from backends.cuda import operator_kernels
from backends.operators import reference
from backends.step_inputs import StepInputs

PEAK_BYTES_PER_S = 4.3e12
PEAK_FLOPS_PER_S = 790e12
ROTATING_BYTES = 256 << 20
HIDDEN, INTERMEDIATE = 3584, 18944
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 28, 4, 128
BLOCK_SIZE = 16
CONTEXT = 1024
BATCHES = (1, 32, 128, 256)
PROMPT_LENGTHS = (128, 1024, 8192)
TOKENS = (1, 32, 128, 256, 1024, 8192)


@dataclass(frozen=True, slots=True)
class Case:
    """``runs[i]`` calls the kernel on the i-th of the rotating buffers; ``reference_run`` is torch's operator."""

    kernel: str
    case: str
    num_bytes: int
    num_flops: int
    runs: list[Callable[[], object]]
    reference_run: Callable[[], object] | None


@dataclass(frozen=True, slots=True)
class Row:
    kernel: str
    case: str
    us: float
    torch_us: float
    gb_per_s: float
    tflop_per_s: float
    share_of_peak: float
    error: str


def graph_us(runs: list[Callable[[], object]], calls: int, replays: int = 9) -> float:
    """Median microseconds of a call, from replays of a graph of ``calls`` calls or more."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for run in runs[:2]:
            run()
    stream.synchronize()
    rounds = max(1, -(-calls // len(runs)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for run in runs:
                run()
    graph.replay()
    times_ms = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    return statistics.median(times_ms) * 1000 / (rounds * len(runs))


def eager_us(run: Callable[[], object], replays: int = 5) -> float:
    """Median microseconds of a call from the host, which may be bound by launches."""
    run()
    times_ms = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    return statistics.median(times_ms) * 1000


def measure(case: Case) -> Row:
    us = graph_us(case.runs, calls=20)
    torch_us = 0.0 if case.reference_run is None else eager_us(case.reference_run)
    bytes_per_s, flops_per_s = case.num_bytes / us * 1e6, case.num_flops / us * 1e6
    share = max(bytes_per_s / PEAK_BYTES_PER_S, flops_per_s / PEAK_FLOPS_PER_S)
    return Row(case.kernel, case.case, us, torch_us, bytes_per_s / 1e9, flops_per_s / 1e12, share, "")


def rotating(case_bytes: int) -> int:
    """How many sets of buffers are together larger than the L2 cache."""
    return max(1, min(64, ROTATING_BYTES // max(case_bytes, 1) + 1))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


# Attention


def attention_case(kernel: str, title: str, sequences: tuple[tuple[int, int], ...]) -> Case:
    """Sequences are (rows, context length), blocks in random order."""
    num_tokens = sum(rows for rows, _ in sequences)
    context = sum(context_len for _, context_len in sequences)
    pairs = sum(rows * context_len - rows * (rows - 1) // 2 for rows, context_len in sequences)
    kv_bytes = 2 * context * NUM_KV_HEADS * HEAD_DIM * 2
    num_bytes = kv_bytes + 2 * num_tokens * NUM_HEADS * HEAD_DIM * 2
    inputs = paged_inputs(sequences)
    num_blocks = int(inputs.block_tables.max()) + 1
    buffers = [
        (
            random(num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)[:, : NUM_HEADS * HEAD_DIM],
            random(num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM),
            random(num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM),
        )
        for _ in range(rotating(num_bytes))
    ]
    scale = HEAD_DIM**-0.5

    def run_on(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Callable[[], object]:
        return lambda: operator_kernels.attention(query, keys, values, inputs, scale=scale)

    return Case(
        kernel,
        title,
        num_bytes,
        4 * NUM_HEADS * HEAD_DIM * pairs,
        [run_on(*buffer) for buffer in buffers],
        lambda: reference.attention(*buffers[0], inputs, scale=scale),
    )


def paged_inputs(sequences: tuple[tuple[int, int], ...]) -> StepInputs:
    num_blocks = [-(-context_len // BLOCK_SIZE) for _, context_len in sequences]
    order = torch.randperm(sum(num_blocks)).to(torch.int32)
    tables = torch.zeros(len(sequences), max(num_blocks), dtype=torch.int32)
    taken = 0
    for index, count in enumerate(num_blocks):
        tables[index, :count] = order[taken : taken + count]
        taken += count
    inputs = step_inputs(sequences, tables)
    return StepInputs(
        token_ids=inputs.token_ids.cuda(),
        positions=inputs.positions.cuda(),
        slot_mapping=inputs.slot_mapping.cuda(),
        query_starts=inputs.query_starts.cuda(),
        context_lens=inputs.context_lens.cuda(),
        block_tables=inputs.block_tables.cuda(),
        sampled_rows=inputs.sampled_rows.cuda(),
        num_decodes=inputs.num_decodes,
        query_len_max=inputs.query_len_max,
        context_len_max=inputs.context_len_max,
    )


def decode_cases() -> Iterator[Callable[[], Case]]:
    for batch in BATCHES:
        yield lambda b=batch: attention_case("decode attention", f"batch {b}, context {CONTEXT}", ((1, CONTEXT),) * b)
    yield lambda: attention_case("decode attention", "batch 1, context 32768", ((1, 32768),))
    yield lambda: attention_case("decode attention", "batch 32, context 8192", ((1, 8192),) * 32)


def prefill_cases() -> Iterator[Callable[[], Case]]:
    for length in PROMPT_LENGTHS:
        yield lambda n=length: attention_case("prefill attention", f"prompt of {n}", ((n, n),))
    yield lambda: attention_case("prefill attention", "8 prompts of 1024", ((1024, 1024),) * 8)


def mixed_cases() -> Iterator[Callable[[], Case]]:
    yield lambda: attention_case(
        "mixed attention", "128 decodes, prompt of 1024", ((1, CONTEXT),) * 128 + ((1024, 1024),)
    )
    yield lambda: attention_case(
        "mixed attention", "256 decodes, chunk 512 of 4096", ((1, CONTEXT),) * 256 + ((512, 4096),)
    )


# Everything else


def add_norm_case(tokens: int) -> Case:
    num_bytes = 4 * tokens * HIDDEN * 2
    weight = random(HIDDEN)
    buffers = [(random(tokens, HIDDEN), random(tokens, HIDDEN)) for _ in range(rotating(num_bytes))]
    runs = [lambda b=b: operator_kernels.add_rms_norm(*b, weight, epsilon=1e-6) for b in buffers]
    return Case(
        "add_rms_norm", f"{tokens} tokens", num_bytes, 0, runs,
        lambda: reference.add_rms_norm(*buffers[0], weight, epsilon=1e-6),
    )  # fmt: skip


def norm_case(tokens: int) -> Case:
    num_bytes = 2 * tokens * HIDDEN * 2
    weight = random(HIDDEN)
    buffers = [random(tokens, HIDDEN) for _ in range(rotating(num_bytes))]
    runs = [lambda b=b: operator_kernels.rms_norm(b, weight, epsilon=1e-6) for b in buffers]
    return Case(
        "rms_norm", f"{tokens} tokens", num_bytes, 0, runs, lambda: reference.rms_norm(buffers[0], weight, epsilon=1e-6)
    )


def gate_case(tokens: int) -> Case:
    num_bytes = 3 * tokens * INTERMEDIATE * 2
    buffers = [random(tokens, 2 * INTERMEDIATE) for _ in range(rotating(num_bytes))]
    runs = [lambda b=b: operator_kernels.silu_multiply(b) for b in buffers]
    return Case("silu_multiply", f"{tokens} tokens", num_bytes, 0, runs, lambda: reference.silu_multiply(buffers[0]))


def rotary_case(tokens: int, with_norms: bool) -> Case:
    widths = [NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM]
    num_bytes = 2 * tokens * sum(widths) * 2
    table = torch.randn(tokens, HEAD_DIM, device="cuda")
    positions = torch.arange(tokens, device="cuda")
    slots = torch.randperm(-(-tokens // BLOCK_SIZE) * BLOCK_SIZE, device="cuda")[:tokens]
    norms = (random(HEAD_DIM), random(HEAD_DIM)) if with_norms else ()
    options = {"epsilon": 1e-6} if with_norms else {}
    name = "head_norm_rotary_kv_write" if with_norms else "rotary_kv_write"

    def arguments() -> tuple[torch.Tensor, ...]:
        query, key, value = torch.split(random(tokens, sum(widths)), widths, dim=-1)
        caches = (random(-(-tokens // BLOCK_SIZE), BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM) for _ in range(2))
        return (query, key, value, positions, *norms, table, *caches, slots)

    buffers = [arguments() for _ in range(rotating(num_bytes))]
    run, run_reference = getattr(operator_kernels, name), getattr(reference, name)
    return Case(
        name, f"{tokens} tokens", num_bytes, 0, [lambda b=b: run(*b, **options) for b in buffers],
        lambda: run_reference(*buffers[0], **options),
    )  # fmt: skip


def elementwise_cases() -> Iterator[Callable[[], Case]]:
    for tokens in TOKENS:
        yield lambda n=tokens: norm_case(n)
        yield lambda n=tokens: add_norm_case(n)
        yield lambda n=tokens: gate_case(n)
        yield lambda n=tokens: rotary_case(n, with_norms=False)
        yield lambda n=tokens: rotary_case(n, with_norms=True)


def linear_case(name: str, tokens: int, inputs: int, outputs: int) -> Case:
    num_bytes = 2 * (inputs * outputs + tokens * (inputs + outputs))
    buffers = [(random(tokens, inputs), random(outputs, inputs)) for _ in range(rotating(num_bytes))]
    runs = [lambda b=b: reference.linear(*b) for b in buffers]
    return Case(f"linear {name}", f"{tokens} tokens", num_bytes, 2 * tokens * inputs * outputs, runs, None)


def linear_cases() -> Iterator[Callable[[], Case]]:
    qkv = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    for tokens in (1, 128, 8192):
        yield lambda n=tokens: linear_case("qkv", n, HIDDEN, qkv)
        yield lambda n=tokens: linear_case("gate and up", n, HIDDEN, 2 * INTERMEDIATE)
        yield lambda n=tokens: linear_case("down", n, INTERMEDIATE, HIDDEN)


GROUPS = {
    "decode": decode_cases,
    "prefill": prefill_cases,
    "mixed": mixed_cases,
    "elementwise": elementwise_cases,
    "linear": linear_cases,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--group", choices=tuple(GROUPS), required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    with ThreadPoolExecutor(max_workers=1) as executor:
        for number, make in enumerate(GROUPS[arguments.group]()):
            rows.append(outcome(executor.submit(lambda make=make: measure(make())), arguments.group, number))
            print_row(rows[-1])
            arguments.out.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
            torch.cuda.empty_cache()
    return 1 if any(row.error for row in rows) else 0


def outcome(future: Future[Row], group: str, number: int) -> Row:
    """The case's row, or one that says what it raised, so that the others still run."""
    error = future.exception()
    if error is None:
        return future.result()
    text = " ".join(str(error).split())[:500]
    return Row(f"{group}, case {number}", "", 0, 0, 0, 0, 0, f"{type(error).__name__}: {text}")


def print_row(row: Row) -> None:
    figures = f"{row.us:10.1f}{row.torch_us:10.1f}{row.gb_per_s:8.0f}{row.tflop_per_s:9.1f}{row.share_of_peak:9.1%}"
    print(f"| {row.kernel:24}{row.case:34}{row.error or figures}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
