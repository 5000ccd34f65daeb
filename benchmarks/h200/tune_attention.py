"""Tries attention kernels and their tiles, products and the drawing of tokens at shapes of Qwen2.5-7B, in bfloat16.

    python -m benchmarks.h200.tune_attention OUT.json [--group decode|prefill|linear|sampling ...] [--limit-s 120]

Every variant is compiled in processes at the same time, then timed alone: the median of CUDA graph replays on
rotating buffers larger than the L2 cache. For each case the table has the variants from the fastest on. What the
backend uses now is marked ``*``, and what it should use is read off this table by hand.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from backends.cuda import operator_kernels
from backends.cuda.kernels.decode_attention import decode_attention, share_out
from backends.cuda.kernels.device_properties import num_compute_units
from backends.cuda.kernels.hopper_attention import hopper_attention
from backends.cuda.kernels.prefill_attention import prefill_attention
from backends.cuda.kernels.prompt_tiles import lay_out_tiles
from backends.cuda.kernels.sampling import draw_tokens
from backends.cuda.kernels.tile_shapes import HOPPER_ROWS, HopperTiles, TileShape
from backends.model_runner.sampler.gumbel_noise import exponential_noise, token_hashes
from benchmarks.h200.measure_kernels import (
    BLOCK_SIZE,
    HEAD_DIM,
    HIDDEN,
    INTERMEDIATE,
    NUM_HEADS,
    NUM_KV_HEADS,
    PEAK_BYTES_PER_S,
    PEAK_FLOPS_PER_S,
    graph_us,
    paged_inputs,
    random,
    rotating,
)

VOCAB_SIZE = 152064
SCALE = HEAD_DIM**-0.5
PROCESSES = 12
GROUP_SIZE = NUM_HEADS // NUM_KV_HEADS

DECODE_SHAPES = tuple(
    TileShape(16, *rest)
    for rest in ((64, 4, 3), (64, 4, 4), (64, 4, 2), (64, 2, 3), (32, 4, 4), (32, 2, 4), (128, 4, 2), (128, 8, 2))
)
PREFILL_SHAPES = tuple(
    TileShape(*shape)
    for shape in (
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3),
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (128, 32, 8, 4),
    )
)  # fmt: skip
HOPPER_TILES = tuple(HopperTiles(*tiles) for tiles in ((128, 3), (128, 2), (64, 4), (64, 3), (64, 6)))


@dataclass(frozen=True, slots=True)
class Variant:
    """``runs(num_buffers)`` are calls on as many buffers; ``is_current`` is what the backend does now."""

    group: str
    case: str
    name: str
    num_bytes: int
    num_flops: int
    runs: Callable[[int], list[Callable[[], object]]]
    is_current: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    group: str
    case: str
    variant: str
    us: float
    share_of_peak: float
    is_current: bool
    error: str


# Attention


@dataclass(frozen=True, slots=True)
class Batch:
    """(rows, context length) of each sequence; a kernel's call on it is made by ``on``."""

    sequences: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        return sum(rows for rows, _ in self.sequences)

    @property
    def num_bytes(self) -> int:
        context = sum(context_len for _, context_len in self.sequences)
        return 4 * context * NUM_KV_HEADS * HEAD_DIM + 4 * self.num_tokens * NUM_HEADS * HEAD_DIM

    @property
    def num_flops(self) -> int:
        pairs = sum(rows * context_len - rows * (rows - 1) // 2 for rows, context_len in self.sequences)
        return 4 * NUM_HEADS * HEAD_DIM * pairs

    def variant(self, group: str, case: str, name: str, call: Callable[..., object], is_current: bool) -> Variant:
        def runs(num_buffers: int) -> list[Callable[[], object]]:
            inputs = paged_inputs(self.sequences)
            num_blocks = int(inputs.block_tables.max()) + 1
            found: list[Callable[[], object]] = []
            for _ in range(num_buffers):
                query = random(self.num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)[:, : NUM_HEADS * HEAD_DIM]
                keys, values = (random(num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM) for _ in range(2))
                found.append(lambda q=query, k=keys, v=values: call(q, k, v, inputs))
            return found

        return Variant(group, case, name, self.num_bytes, self.num_flops, runs, is_current)


def decode_call(shape: TileShape, num_parts: int) -> Callable[..., object]:
    def call(query, keys, values, inputs):  # type: ignore[no-untyped-def]
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        num_programs = num_parts * inputs.context_lens.shape[0] * NUM_KV_HEADS
        shares = share_out(inputs.context_lens, NUM_KV_HEADS, num_programs, sliding_window=0)
        where = (inputs.context_lens, inputs.block_tables, shares, shape)
        decode_attention(query, keys, values, out, *where, scale=SCALE, sliding_window=0)

    return call


def prefill_call(shape: TileShape) -> Callable[..., object]:
    def call(query, keys, values, inputs):  # type: ignore[no-untyped-def]
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        tiles = lay_out_tiles(inputs.query_starts, inputs.context_lens, query.shape[0], shape.num_rows // GROUP_SIZE)
        where = (tiles, inputs.block_tables, shape)
        prefill_attention(query, keys, values, out, *where, scale=SCALE, sliding_window=0)

    return call


def hopper_call(shape: HopperTiles) -> Callable[..., object]:
    def call(query, keys, values, inputs):  # type: ignore[no-untyped-def]
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        tiles = lay_out_tiles(inputs.query_starts, inputs.context_lens, query.shape[0], HOPPER_ROWS // GROUP_SIZE)
        where = (tiles, inputs.block_tables, shape, num_compute_units(query.device))
        hopper_attention(query, keys, values, out, *where, scale=SCALE)

    return call


def torch_call(backend: SDPBackend) -> Callable[..., object]:
    """Torch's attention of one prompt, on keys and values that lie one after the other."""

    def call(query, keys, values, inputs):  # type: ignore[no-untyped-def]
        heads = query.unflatten(1, (-1, HEAD_DIM)).transpose(0, 1).unsqueeze(0)
        rows = (tensor.flatten(0, 1)[: query.shape[0]].transpose(0, 1).unsqueeze(0) for tensor in (keys, values))
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(heads, *rows, is_causal=True, scale=SCALE, enable_gqa=True)

    return call


def current_call(query, keys, values, inputs):  # type: ignore[no-untyped-def]
    return operator_kernels.attention(query, keys, values, inputs, scale=SCALE)


def decode_variants() -> Iterator[Variant]:
    for batch, context, parts in (
        (1, 1000, (8, 16)), (1, 32000, (64, 128)), (8, 1000, (8, 16)), (32, 1000, (2, 3, 4, 6, 8)),
        (128, 1000, (1, 2, 3, 4)), (256, 600, (1, 2)), (32, 8000, (4, 8)),
    ):  # fmt: skip
        what, case = Batch(((1, context),) * batch), f"{batch} x {context}"
        yield what.variant("decode", case, "current", current_call, True)
        for num_parts in parts:
            for shape in DECODE_SHAPES:
                yield what.variant("decode", case, named(shape, num_parts), decode_call(shape, num_parts), False)


def prefill_variants() -> Iterator[Variant]:
    for case, sequences in (
        ("128", ((128, 128),)),
        ("512", ((512, 512),)),
        ("1024", ((1024, 1024),)),
        ("8192", ((8192, 8192),)),
        ("8 x 1024", ((1024, 1024),) * 8),
        ("32 x 256", ((256, 256),) * 32),
        ("64 of 1024", ((64, 1024),)),
        ("512 of 4096", ((512, 4096),)),
        ("2048 of 32768", ((2048, 32768),)),
    ):
        what = Batch(sequences)
        yield what.variant("prefill", case, "current", current_call, True)
        if len(sequences) == 1 and sequences[0][0] == sequences[0][1]:
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                yield what.variant("prefill", case, f"torch {backend.name.lower()}", torch_call(backend), False)
        for hopper in HOPPER_TILES:
            name = f"Hopper, {hopper.num_keys} keys, {hopper.num_stages} stages"
            yield what.variant("prefill", case, name, hopper_call(hopper), False)
        for shape in PREFILL_SHAPES:
            yield what.variant("prefill", case, named(shape), prefill_call(shape), False)


def named(shape: TileShape, num_parts: int = 0) -> str:
    parts = f"{num_parts:3} parts, " if num_parts else ""
    return f"{parts}{shape.num_rows}x{shape.num_keys}, {shape.num_warps} warps, {shape.num_stages} stages"


# Products


def linear_variants() -> Iterator[Variant]:
    qkv = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    for name, inputs, outputs, has_bias in (
        ("qkv", HIDDEN, qkv, True),
        ("o", HIDDEN, HIDDEN, False),
        ("gate up", HIDDEN, 2 * INTERMEDIATE, False),
        ("down", INTERMEDIATE, HIDDEN, False),
        ("head", HIDDEN, VOCAB_SIZE, False),
    ):
        for tokens in (1, 8, 32, 64, 128, 256):
            yield from product_variants(f"{name}, {tokens} tokens", tokens, inputs, outputs, has_bias)


def product_variants(case: str, tokens: int, inputs: int, outputs: int, has_bias: bool) -> Iterator[Variant]:
    num_bytes, num_flops = 2 * (inputs * outputs + tokens * (inputs + outputs)), 2 * tokens * inputs * outputs

    def variant(name: str, call: Callable[..., object], library: str, reduced: bool, is_current: bool) -> Variant:
        def runs(num_buffers: int) -> list[Callable[[], object]]:
            torch.backends.cuda.preferred_blas_library(library)
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced
            bias = random(outputs) if has_bias else None
            buffers = [(random(tokens, inputs), random(outputs, inputs)) for _ in range(num_buffers)]
            return [lambda b=buffer: call(*b, bias) for buffer in buffers]

        return Variant("linear", case, name, num_bytes, num_flops, runs, is_current)

    yield variant("linear", functional.linear, "default", True, True)
    yield variant("linear, cublas", functional.linear, "cublas", True, False)
    yield variant("linear, cublaslt", functional.linear, "cublaslt", True, False)
    yield variant("linear, no reduced precision", functional.linear, "default", False, False)
    yield variant("transposed product", transposed_product, "default", True, False)
    if has_bias:
        yield variant("product, then bias", product_then_bias, "default", True, False)


def transposed_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Lets the library see the weight as the left operand."""
    product = torch.mm(weight, x.t())
    return product if bias is None else product.add_(bias.unsqueeze(1))


def product_then_bias(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, weight).add_(bias)


# Drawing of tokens


def sampling_variants() -> Iterator[Variant]:
    cuts = {
        "greedy": (0.0, None, None, None),
        "uncut": (1.0, None, None, None),
        "top_k 50": (1.0, 50, None, None),
        "top_p 0.9": (1.0, None, 0.9, None),
        "min_p 0.05": (1.0, None, None, 0.05),
    }
    for rows in (1, 32, 256):
        for name, cut in cuts.items():
            yield drawing(rows, name, *cut)
        yield Variant("sampling", f"{rows} rows", "torch, uncut", 4 * rows * VOCAB_SIZE, 0, torch_drawing(rows), True)


def drawing(rows: int, name: str, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None):  # type: ignore[no-untyped-def]
    def runs(num_buffers: int) -> list[Callable[[], object]]:
        places = (torch.arange(rows, device="cuda"), torch.arange(rows, device="cuda"))
        values = [
            None if value is None else torch.full((rows,), value, device="cuda") for value in (top_k, top_p, min_p)
        ]
        heat = torch.full((rows,), temperature, device="cuda")
        buffers = [torch.randn(rows, VOCAB_SIZE, device="cuda") for _ in range(num_buffers)]
        return [lambda b=buffer: draw_tokens(b, heat, *places, *values) for buffer in buffers]

    return Variant("sampling", f"{rows} rows", name, 4 * rows * VOCAB_SIZE, 0, runs)


def torch_drawing(rows: int) -> Callable[[int], list[Callable[[], object]]]:
    def runs(num_buffers: int) -> list[Callable[[], object]]:
        hashes = token_hashes(VOCAB_SIZE, torch.device("cuda"))
        keys = torch.ones(2, rows, dtype=torch.int32, device="cuda")
        buffers = [torch.randn(rows, VOCAB_SIZE, device="cuda") for _ in range(num_buffers)]
        return [lambda b=buffer: b.sub(exponential_noise(hashes, keys).log_()).argmax(1) for buffer in buffers]

    return runs


GROUPS = {
    "decode": decode_variants,
    "prefill": prefill_variants,
    "linear": linear_variants,
    "sampling": sampling_variants,
}


def compile_variants(group: str, first: int) -> None:
    """Run every PROCESSES-th variant of a group once, from the given one on, so that its kernels are cached."""
    seen = set()
    for variant in GROUPS[group]():
        # A tile's kernels are the same for all cases of a group.
        kernel = (variant.name.split("parts")[-1], variant.name.startswith("  1 parts"))
        if kernel in seen:
            continue
        seen.add(kernel)
        if len(seen) % PROCESSES == first:
            with ThreadPoolExecutor(max_workers=1) as executor:
                executor.submit(lambda v=variant: [run() for run in v.runs(1)]).exception()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def measure(variant: Variant) -> Row:
    runs = variant.runs(rotating(variant.num_bytes))
    us = graph_us(runs, calls=10, replays=5)
    share = max(variant.num_bytes / us * 1e6 / PEAK_BYTES_PER_S, variant.num_flops / us * 1e6 / PEAK_FLOPS_PER_S)
    return Row(variant.group, variant.case, variant.name, us, share, variant.is_current, "")


def outcome(variant: Variant, future: Future[Row]) -> Row:
    error = future.exception()
    if error is None:
        return future.result()
    text = " ".join(str(error).split())[:200]
    failure = f"{type(error).__name__}: {text}"
    return Row(variant.group, variant.case, variant.name, float("inf"), 0.0, variant.is_current, failure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--group", choices=tuple(GROUPS), nargs="+", default=tuple(GROUPS))
    parser.add_argument("--limit-s", type=float, default=150.0, help="begin no case after this long")
    arguments = parser.parse_args()
    started_s = time.monotonic()
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        compiled = [
            pool.submit(compile_variants, group, first)
            for group in arguments.group
            if group != "linear"
            for first in range(PROCESSES)
        ]
        failures = [str(future.exception()) for future in compiled if future.exception() is not None]
    print(f"compiled in {time.monotonic() - started_s:.0f} s", *failures[:3], flush=True)
    rows: list[Row] = []
    cases: dict[tuple[str, str], list[Row]] = {}
    torch.manual_seed(0)
    with ThreadPoolExecutor(max_workers=1) as executor:
        for group in arguments.group:
            for variant in GROUPS[group]():
                if time.monotonic() - started_s > arguments.limit_s and (group, variant.case) not in cases:
                    continue
                row = outcome(variant, executor.submit(measure, variant))
                cases.setdefault((group, variant.case), []).append(row)
                rows.append(row)
                torch.cuda.empty_cache()
            arguments.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
            print_group(group, cases)
    print(f"done in {time.monotonic() - started_s:.0f} s", flush=True)
    return 0


def print_group(group: str, cases: dict[tuple[str, str], list[Row]]) -> None:
    """The eight fastest of each case, the current one, and what failed."""
    for (row_group, case), rows in cases.items():
        if row_group != group:
            continue
        print(f"{group} {case}")
        ranked = sorted(rows, key=lambda row: row.us)
        for rank, row in enumerate(ranked):
            if rank < 8 or row.is_current or row.error or row.variant.startswith("torch"):
                mark = "*" if row.is_current else " "
                print(f"  {mark} {row.variant:42}{row.us:10.1f} us{row.share_of_peak:8.1%} {row.error}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
