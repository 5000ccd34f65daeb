"""Prices any dense model from operator FLOPs and bytes.

One step of a decoder layer is four matrix products (qkv, attention output, gate and up, down), the
attention itself, and operators that only stream activations; with tensor parallelism an all-reduce
follows the attention and the MLP (Shoeybi et al., Megatron-LM, 2019). Each is priced on one rank, and the
sum is compiled into a ``StepPriceTable``.
"""

from collections.abc import Callable
from dataclasses import dataclass

from sagellm.cost_model.gemm_time import GemmTime, MeasuredGemm, RooflineGemm, clamped, linear
from sagellm.cost_model.price_table import StepPriceTable
from sagellm.cost_model.profile import AnalyticProfile
from sagellm.cost_model.step_cost import FEMTOSECONDS_PER_NANOSECOND
from sagellm.models.model_shape import ModelShape

SIZES = (
    *(1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512),
    *(640, 768, 1024, 1280, 1536, 2048, 3072, 4096, 5120, 6144, 7168, 8192, 16384, 32768),
)
"""Numbers of tokens at which a step is priced operator by operator; between them prices are linear."""


@dataclass(frozen=True, slots=True)
class Projection:
    """A matrix product of one rank: ``x[tokens, num_inputs] @ weight[num_outputs, num_inputs].T``."""

    name: str
    num_outputs: int
    num_inputs: int


def layer_projections(model: ModelShape, tp: int) -> tuple[Projection, ...]:
    """The four matrix products of one layer on one of ``tp`` ranks."""
    query_width = model.query_width // tp
    kv_width = model.kv_heads_per_rank(tp) * model.head_dim
    up_width = model.intermediate_size * (2 if model.gated_mlp else 1) // tp
    return (
        Projection("qkv", query_width + 2 * kv_width, model.hidden_size),
        Projection("attention_output", model.hidden_size, query_width),
        Projection("up", up_width, model.hidden_size),
        Projection("down", model.hidden_size, model.intermediate_size // tp),
    )


def layer_stream_bytes_per_token(model: ModelShape, tp: int) -> int:
    """Bytes that the streaming operators of one layer read and write for one token, on one rank.

    Two residual-add norms read two rows and write two; the activation reads what the up projection wrote
    and writes its output; rotary embedding and the KV write pass over queries, keys and values.
    """
    kv_width = model.kv_heads_per_rank(tp) * model.head_dim
    qkv_width = model.query_width // tp + 2 * kv_width
    activation_width = model.intermediate_size * (3 if model.gated_mlp else 2) // tp
    norm_width = 2 * qkv_width if model.qk_norm else 0
    return model.dtype_bytes * (8 * model.hidden_size + activation_width + 2 * qkv_width + norm_width)


def rank_kv_bytes_per_token_layer(model: ModelShape, tp: int) -> int:
    return 2 * model.kv_heads_per_rank(tp) * model.head_dim * model.dtype_bytes


def compile_price_table(profile: AnalyticProfile, model: ModelShape, tp: int) -> StepPriceTable:
    """Prices ``model`` on ``tp`` devices of the profile.

    Raises ``ValueError`` where ``tp`` does not divide the model's heads.
    """
    model.check_tp(tp)
    sizes = tuple(sorted({*SIZES, *(size for size in profile.graph_sizes if size <= SIZES[-1])}))
    gemm = _cached(make_gemm_time(profile, model.dtype_bytes))
    work_ns = [step_work_ns(profile, model, tp, size, gemm) for size in sizes]
    head_ns = [gemm(size, -(-model.vocab_size // tp), model.hidden_size) for size in sizes]
    rates, memory_gbps = profile.rates, profile.device.memory_gbps
    fixed_ns = step_fixed_ns(profile, model)
    mixed_fixed_ns = model.num_layers * rates.mixed_layer_fixed_ns
    read_bytes = model.num_layers * rank_kv_bytes_per_token_layer(model, tp)
    pair_flops = 4 * model.num_layers * model.query_width // tp
    pair_ns = pair_flops / (profile.device.bf16_tflops * rates.attention_compute_efficiency * 1e3)
    mixed_read_ns = read_bytes / (memory_gbps * rates.mixed_attention_read_efficiency)
    return StepPriceTable(
        graph_sizes=profile.graph_sizes,
        decode_num_seqs=sizes,
        decode_base_fs=tuple(
            to_fs(fixed_ns + work + head + rates.seq_ns * size)
            for size, work, head in zip(sizes, work_ns, head_ns, strict=True)
        ),
        decode_context_fs=tuple(
            to_fs(read_bytes / (memory_gbps * attention_read_efficiency(profile, model, tp, size))) for size in sizes
        ),
        mixed_num_tokens=sizes,
        mixed_base_fs=tuple(to_fs(fixed_ns + mixed_fixed_ns + work + head_ns[0]) for work in work_ns),
        mixed_floor_fs=to_fs(model.num_layers * profile.host.launch_layer_ns),
        mixed_seq_fs=to_fs(rates.seq_ns),
        mixed_context_fs=to_fs(mixed_read_ns),
        token_pair_fs=to_fs(pair_ns),
        chunk_context_fs=to_fs(mixed_read_ns),
        host_base_fs=to_fs(profile.host.base_ns),
        host_seq_fs=to_fs(profile.host.seq_ns),
    )


def step_work_ns(profile: AnalyticProfile, model: ModelShape, tp: int, num_tokens: int, gemm: "Gemm") -> float:
    """All layers' matrix products, streaming operators and all-reduces at so many tokens."""
    gemms_ns = sum(gemm(num_tokens, p.num_outputs, p.num_inputs) for p in layer_projections(model, tp))
    stream_gbps = profile.device.memory_gbps * profile.rates.stream_memory_efficiency
    stream_ns = num_tokens * layer_stream_bytes_per_token(model, tp) / stream_gbps
    reduced_bytes = num_tokens * model.hidden_size * model.dtype_bytes
    return model.num_layers * (gemms_ns + stream_ns + 2 * all_reduce_ns(profile, reduced_bytes, tp))


def step_fixed_ns(profile: AnalyticProfile, model: ModelShape) -> float:
    """Latency of the small kernels of a step, whatever its size."""
    layer_ns = profile.rates.layer_fixed_ns + (profile.rates.qk_norm_ns if model.qk_norm else 0.0)
    return model.num_layers * layer_ns + profile.rates.step_fixed_ns


def all_reduce_ns(profile: AnalyticProfile, num_bytes: int, tp: int) -> float:
    """An all-reduce over ``tp`` ranks: a fixed cost, and 2 (tp - 1) / tp of the bytes over each link.

    Between two ranks the measured table is used where the profile has one; for more ranks its part
    that grows with the size is scaled by the bytes that cross a link.
    """
    if tp == 1:
        return 0.0
    crossing = 2 * (tp - 1) / tp
    table = profile.all_reduce_table
    if table is not None:
        fixed_us = table.us[0]
        return 1000 * (fixed_us + crossing * (linear(table.num_bytes, table.us, num_bytes) - fixed_us))
    link_gbps = profile.device.scale_up_gbps * profile.rates.all_reduce_efficiency
    return profile.rates.all_reduce_fixed_ns + crossing * num_bytes / link_gbps


def attention_read_efficiency(profile: AnalyticProfile, model: ModelShape, tp: int, num_seqs: int) -> float:
    """Share of memory bandwidth at which decode attention reads the KV of ``num_seqs`` sequences."""
    num_tiles = num_seqs * model.kv_heads_per_rank(tp)
    return clamped(profile.rates.attention_read_tiles, profile.rates.attention_read_efficiency, num_tiles)


Gemm = Callable[[int, int, int], float]


def make_gemm_time(profile: AnalyticProfile, dtype_bytes: int) -> GemmTime:
    """Measured shapes where the profile has them, else the roofline."""
    if profile.gemm_table is not None:
        return MeasuredGemm(profile.gemm_table, profile.device, dtype_bytes)
    return RooflineGemm(profile.device, profile.rates, dtype_bytes)


def _cached(gemm_time: GemmTime) -> Gemm:
    known: dict[tuple[int, int, int], float] = {}

    def gemm(m: int, n: int, k: int) -> float:
        value = known.get((m, n, k))
        if value is None:
            value = known[m, n, k] = gemm_time.gemm_ns(m, n, k)
        return value

    return gemm


def to_fs(nanoseconds: float) -> int:
    return round(nanoseconds * FEMTOSECONDS_PER_NANOSECOND)
