"""Times whole decoder layers of one decode step, compiled and replayed from a CUDA graph.

Beside the matrix products a layer holds small kernels (norms, rotary embedding, KV write, attention,
activation). What is left of a layer's time after its measured GEMMs is theirs; this shows whether it is
the same for different models, and what query and key norms add. Writes ``decode_layers.csv`` (model, tp,
batch, microseconds a layer) into the folder given.

    python benchmarks/h200/measure_decode_layers.py OUT_FOLDER
"""

import csv
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as functional

HEAD_DIM = 128
CONTEXT = 256
NUM_LAYERS = 6
BATCHES = (1, 8, 32, 128)


@dataclass(frozen=True)
class Shape:
    """One rank's share of one layer."""

    name: str
    tp: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    qk_norm: bool


SHAPES = (
    Shape("qwen2.5-7b", 1, 3584, 28, 4, 18944, False),
    Shape("qwen3-8b", 1, 4096, 32, 8, 12288, True),
    Shape("qwen3-8b-without-qk-norm", 1, 4096, 32, 8, 12288, False),
    Shape("qwen2.5-32b", 2, 5120, 20, 4, 13824, False),
    Shape("qwen3-32b", 2, 5120, 32, 4, 12800, True),
)


class Layer:
    """Weights and KV cache of one layer, filled with random numbers."""

    def __init__(self, shape: Shape, batch: int) -> None:
        def weight(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, device="cuda").mul_(0.02).to(torch.bfloat16)

        self.shape = shape
        width, kv_width = shape.heads * HEAD_DIM, shape.kv_heads * HEAD_DIM
        self.qkv = weight(width + 2 * kv_width, shape.hidden)
        self.output = weight(shape.hidden, width)
        self.up = weight(2 * shape.intermediate, shape.hidden)
        self.down = weight(shape.hidden, shape.intermediate)
        self.norms = torch.ones(2, shape.hidden, device="cuda", dtype=torch.bfloat16)
        self.head_norms = torch.ones(2, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        kv_shape = (2, batch, shape.kv_heads, CONTEXT, HEAD_DIM)
        self.cache = torch.randn(kv_shape, device="cuda", dtype=torch.bfloat16)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), dim=-1).to(x.dtype)


def before_attention(
    hidden: torch.Tensor, residual: torch.Tensor, layer: Layer, angles: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual add, norm, qkv, query and key norms, rotary embedding and the KV write."""
    shape = layer.shape
    residual = residual + hidden
    qkv = functional.linear(rms_norm(residual, layer.norms[0]), layer.qkv)
    width, kv_width = shape.heads * HEAD_DIM, shape.kv_heads * HEAD_DIM
    query, key, value = qkv.split((width, kv_width, kv_width), dim=-1)
    query = query.view(-1, shape.heads, HEAD_DIM)
    key = key.view(-1, shape.kv_heads, HEAD_DIM)
    if shape.qk_norm:
        query, key = rms_norm(query, layer.head_norms[0]), rms_norm(key, layer.head_norms[1])
    query, key = rotate(query, angles[0], angles[1]), rotate(key, angles[0], angles[1])
    layer.cache[0].index_copy_(2, slots, key.unsqueeze(2))
    layer.cache[1].index_copy_(2, slots, value.view(-1, shape.kv_heads, 1, HEAD_DIM))
    return query, residual


def after_attention(attended: torch.Tensor, residual: torch.Tensor, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention output, residual add, norm and MLP."""
    residual = residual + functional.linear(attended, layer.output)
    gate, up = functional.linear(rms_norm(residual, layer.norms[1]), layer.up).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, layer.down), residual


def layer_us(shape: Shape, batch: int) -> float:
    """Median microseconds of one layer over graph replays."""
    layers = [Layer(shape, batch) for _ in range(NUM_LAYERS)]
    first = torch.compile(before_attention, dynamic=False)
    second = torch.compile(after_attention, dynamic=False)
    hidden = torch.randn(batch, shape.hidden, device="cuda", dtype=torch.bfloat16)
    residual = torch.randn_like(hidden)
    angles = torch.randn(2, 1, 1, HEAD_DIM // 2, device="cuda")
    slots = torch.tensor([CONTEXT - 1], device="cuda")

    def run() -> torch.Tensor:
        x, rest = hidden, residual
        for layer in layers:
            query, rest = first(x, rest, layer, angles, slots)
            attended = functional.scaled_dot_product_attention(
                query.unsqueeze(2), layer.cache[0], layer.cache[1], enable_gqa=True
            )
            x, rest = second(attended.reshape(batch, -1), rest, layer)
        return x

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    times_ms = []
    for _ in range(60):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    return statistics.median(times_ms) * 1000 / NUM_LAYERS


@torch.inference_mode()
def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    torch._dynamo.config.recompile_limit = 1000
    begin_s = time.perf_counter()
    with (out / "decode_layers.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("model", "tp", "batch", "us_per_layer"))
        for shape in SHAPES:
            for batch in BATCHES:
                torch._dynamo.reset()
                row = (shape.name, shape.tp, batch, round(layer_us(shape, batch), 2))
                writer.writerow(row)
                file.flush()
                print(row, f"at {time.perf_counter() - begin_s:.0f} s", flush=True)


if __name__ == "__main__":
    main()
