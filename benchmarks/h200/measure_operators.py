"""Times the operators of dense decoder models on one CUDA device, with torch alone.

Writes ``gemm.csv`` (m, n, k, microseconds), ``attention.csv``, ``elementwise.csv``, ``sustained.csv``
and ``environment.json`` into the folder given. Every figure is the median over replays of a CUDA graph
that holds many calls on rotating buffers of random data larger than the L2 cache, so neither launch
gaps nor a warm cache enter.

    python benchmarks/h200/measure_operators.py OUT_FOLDER
"""

import csv
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

NUM_TOKENS_GRID = (
    *(1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512),
    *(640, 768, 1024, 1280, 1536, 2048, 3072, 4096, 5120, 6144, 7168, 8192),
)
L2_BYTES = 60 << 20

# (name, hidden, query width, key-value width, intermediate, vocabulary) of public dense models.
MODELS = (
    ("qwen2.5-7b", 3584, 3584, 512, 18944, 152064),
    ("qwen3-8b", 4096, 4096, 1024, 12288, 151936),
    ("llama-3.1-8b", 4096, 4096, 1024, 14336, 128256),
    ("qwen2.5-14b", 5120, 5120, 1024, 13824, 152064),
    ("qwen2.5-32b", 5120, 5120, 1024, 27648, 152064),
    ("qwen3-32b", 5120, 8192, 1024, 25600, 151936),
    ("qwen2.5-72b", 8192, 8192, 1024, 29568, 152064),
    ("qwen3-0.6b", 1024, 2048, 1024, 3072, 151936),
)
ATTENTION_HEADS = ((28, 4), (32, 8), (40, 8), (64, 8), (32, 4), (20, 4), (14, 2))


def projection_shapes(tp: int) -> list[tuple[int, int]]:
    """Distinct (n, k) of qkv, output, gate-up and down projections, on one of ``tp`` ranks."""
    shapes: dict[tuple[int, int], None] = {}
    for _, hidden, query, key_value, intermediate, _ in MODELS:
        shapes[(query + 2 * key_value) // tp, hidden] = None
        shapes[hidden, query // tp] = None
        shapes[2 * intermediate // tp, hidden] = None
        shapes[hidden, intermediate // tp] = None
    return list(shapes)


def median_us(call: Callable[[int], object], calls_per_graph: int, budget_s: float) -> float:
    """Median microseconds of ``call(i)``, over replays of a graph of ``calls_per_graph`` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
        call(1)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls_per_graph):
            call(i)
    graph.replay()
    torch.cuda.synchronize()
    times_ms: list[float] = []
    deadline_s = time.perf_counter() + budget_s
    while len(times_ms) < 5 or (time.perf_counter() < deadline_s and len(times_ms) < 200):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    del graph
    return statistics.median(times_ms) * 1000 / calls_per_graph


def gemm_rows(pool: torch.Tensor, deadline_s: float) -> list[tuple[int, int, int, float]]:
    """Times ``x[m, k] @ weight[n, k].T`` for every projection and every number of tokens."""
    heads = [(vocab // tp, hidden) for tp in (1, 2) for _, hidden, _, _, _, vocab in MODELS]
    shapes = list(dict.fromkeys(projection_shapes(1) + projection_shapes(2)))
    tasks = [(n, k, m) for n, k in dict.fromkeys(heads) for m in (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)]
    tasks += [(n, k, m) for n, k in shapes for m in NUM_TOKENS_GRID]
    rows: list[tuple[int, int, int, float]] = []
    activations = torch.randn(8192 * 29568 + 8192, device="cuda", dtype=torch.bfloat16)
    for n, k, m in tasks:
        if time.perf_counter() > deadline_s:
            print(f"stopped for time after {len(rows)} of {len(tasks)} GEMMs")
            break
        copies = max(2, min(8, -(-4 * L2_BYTES // (2 * n * k)), pool.numel() // (n * k)))
        weights = [pool[i * n * k : (i + 1) * n * k].view(n, k) for i in range(copies)]
        inputs = activations[: m * k].view(m, k)
        floor_s = max(2 * n * k / 4.0e12, 2 * m * n * k / 7.5e14)
        calls = max(2, min(32, int(4e-3 / floor_s)))
        budget_s = 0.12 if m >= 1024 else 0.03
        micros = median_us(lambda i, x=inputs, w=weights, c=copies: functional.linear(x, w[i % c]), calls, budget_s)
        rows.append((m, n, k, round(micros, 3)))
    return rows


def attention_rows(deadline_s: float) -> list[tuple[str, str, int, int, int, int, float]]:
    """Times prefill (causal, query length = context) and decode (query length 1) attention."""
    rows: list[tuple[str, str, int, int, int, int, float]] = []
    backends = (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION))
    prefill = [(1, s) for s in (256, 512, 1024, 2048, 4096, 8192)] + [(8, 1024), (2, 4096)]
    decode = [(b, c) for b in (1, 8, 32, 64, 128, 256) for c in (128, 1024, 4096) if b * c <= 256 * 1024]
    for num_heads, num_kv_heads in ATTENTION_HEADS:
        for kind, cases in (("prefill", prefill), ("decode", decode)):
            for batch, context in cases:
                for name, backend in backends:
                    if time.perf_counter() > deadline_s:
                        return rows
                    micros = attention_us(kind, batch, context, num_heads, num_kv_heads, backend)
                    if micros is not None:
                        rows.append((kind, name, batch, context, num_heads, num_kv_heads, round(micros, 3)))
    return rows


def attention_us(kind: str, batch: int, context: int, heads: int, kv_heads: int, backend: SDPBackend) -> float | None:
    """One attention figure; None where torch's backend does not take the shape."""
    causal = kind == "prefill"
    query = torch.randn(batch, heads, context if causal else 1, 128, device="cuda", dtype=torch.bfloat16)
    kv_bytes = 2 * 2 * batch * kv_heads * context * 128
    copies = max(2, min(8, -(-3 * L2_BYTES // kv_bytes)))
    keys_values = [
        torch.randn(2, batch, kv_heads, context, 128, device="cuda", dtype=torch.bfloat16) for _ in range(copies)
    ]

    def call(i: int) -> torch.Tensor:
        key, value = keys_values[i % copies]
        return functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)

    try:
        with sdpa_kernel(backend):
            return median_us(call, 16 if context * batch <= 4096 else 4, 0.03)
    except RuntimeError as error:
        print("skipped", kind, batch, context, heads, kv_heads, backend, str(error)[:80])
        torch.cuda.synchronize()
        return None


def elementwise_rows() -> list[tuple[str, int, int, float]]:
    """Times an addition and an RMS norm over [tokens, width]: launch floor and streaming bandwidth."""
    rows: list[tuple[str, int, int, float]] = []
    pool = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(8192 * 18944, device="cuda", dtype=torch.bfloat16)
    for width in (3584, 5120, 18944):
        weight = torch.ones(width, device="cuda", dtype=torch.bfloat16)
        for m in (1, 8, 64, 256, 1024, 4096, 8192):
            size = m * width
            copies = max(1, min(64, pool.numel() // (2 * size)))
            pairs = [
                (pool[2 * i * size :][:size].view(m, width), pool[(2 * i + 1) * size :][:size].view(m, width))
                for i in range(copies)
            ]
            target = out[:size].view(m, width)
            add_us = median_us(lambda i, p=pairs, c=copies, t=target: torch.add(*p[i % c], out=t), 32, 0.03)
            norm_us = median_us(
                lambda i, p=pairs, c=copies, w=weight: functional.rms_norm(p[i % c][0], (w.numel(),), w), 32, 0.03
            )
            rows += [("add", m, width, round(add_us, 3)), ("rms_norm", m, width, round(norm_us, 3))]
    return rows


def sustained_rows(pool: torch.Tensor, seconds: float) -> list[tuple[float, float]]:
    """Time of one layer's four projections of a 7B model at 8192 tokens, under load that goes on.

    Rows of (seconds since the load began, microseconds a layer): shows what the power limit takes.
    """
    shapes = ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944))
    layers = []
    for n, k in shapes:
        layers.append((torch.randn(8192, k, device="cuda").to(torch.bfloat16), pool[: n * k].view(n, k)))
    torch.cuda.synchronize()
    time.sleep(1.0)
    begin_s = time.perf_counter()
    rows: list[tuple[float, float]] = []
    while time.perf_counter() < begin_s + seconds:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(8):
            for x, weight in layers:
                functional.linear(x, weight)
        end.record()
        end.synchronize()
        rows.append((round(time.perf_counter() - begin_s, 3), round(start.elapsed_time(end) * 1000 / 8, 1)))
    return rows


def write_csv(path: Path, header: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def environment() -> dict[str, str]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "num_multiprocessors": str(properties.multi_processor_count),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def main() -> None:
    out = Path(sys.argv[1])
    budget_s = float(sys.argv[2]) if len(sys.argv) > 2 else 240.0
    out.mkdir(parents=True, exist_ok=True)
    start_s = time.perf_counter()
    torch.manual_seed(0)
    (out / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    write_csv(out / "elementwise.csv", ("op", "tokens", "width", "us"), list(elementwise_rows()))
    attention = attention_rows(start_s + 0.3 * budget_s)
    header = ("kind", "backend", "batch", "context", "num_heads", "num_kv_heads", "us")
    write_csv(out / "attention.csv", header, list(attention))
    print(f"attention done at {time.perf_counter() - start_s:.0f} s")
    torch.cuda.empty_cache()
    pool = torch.cat([torch.randn(1 << 28, device="cuda").mul_(0.02).to(torch.bfloat16) for _ in range(10)])
    write_csv(out / "sustained.csv", ("s", "us_per_layer"), list(sustained_rows(pool, 3.0)))
    gemms = gemm_rows(pool, start_s + budget_s)
    write_csv(out / "gemm.csv", ("m", "n", "k", "us"), list(gemms))
    print(f"{len(gemms)} GEMMs, done at {time.perf_counter() - start_s:.0f} s")


if __name__ == "__main__":
    main()
