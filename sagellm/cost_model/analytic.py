"""Prices any model from the FLOPs and bytes of its execution graph.

Every operator of one rank's graph is priced (``graph_prices``) at a grid of sizes, and the sums are
compiled into a ``StepPriceTable``.
"""

from sagellm.cost_model.graph_prices import GraphPrices, attention_read_efficiency, engine_graph, make_graph_prices
from sagellm.cost_model.price_table import StepPriceTable
from sagellm.cost_model.profile import AnalyticProfile
from sagellm.cost_model.step_cost import FEMTOSECONDS_PER_NANOSECOND
from sagellm.models.model_shape import ModelShape
from sagellm.runtime.execution_graph.tensors import StepSizes

SIZES = (
    *(1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512),
    *(640, 768, 1024, 1280, 1536, 2048, 3072, 4096, 5120, 6144, 7168, 8192, 16384, 32768),
)
"""Numbers of tokens at which a step is priced operator by operator; between them prices are linear."""


def compile_price_table(profile: AnalyticProfile, model: ModelShape, tp: int) -> StepPriceTable:
    """Prices ``model`` on ``tp`` devices of the profile.

    Raises ``ValueError`` where ``tp`` does not divide the model's heads.
    """
    prices = make_graph_prices(profile, engine_graph(model, tp))
    sizes = tuple(sorted({*SIZES, *(size for size in profile.graph_sizes if size <= SIZES[-1])}))
    rates, memory_gbps = profile.rates, profile.device.memory_gbps
    fixed_ns = step_fixed_ns(profile, model)
    mixed_fixed_ns = model.num_layers * rates.mixed_layer_fixed_ns
    num_kv_heads = model.kv_heads_per_rank(tp)
    read_bytes = prices.attention_work(StepSizes(num_context_tokens=1)).kv_read_bytes
    pair_ns = pair_flops(prices) / (profile.device.bf16_tflops * rates.attention_compute_efficiency * 1e3)
    mixed_read_ns = read_bytes / (memory_gbps * rates.mixed_attention_read_efficiency)
    return StepPriceTable(
        graph_sizes=profile.graph_sizes,
        decode_num_seqs=sizes,
        decode_base_fs=tuple(
            to_fs(fixed_ns + prices.work_ns(decode_sizes(size)) + rates.seq_ns * size) for size in sizes
        ),
        decode_context_fs=tuple(
            to_fs(read_bytes / (memory_gbps * attention_read_efficiency(profile, size * num_kv_heads)))
            for size in sizes
        ),
        mixed_num_tokens=sizes,
        mixed_base_fs=tuple(to_fs(fixed_ns + mixed_fixed_ns + prices.work_ns(mixed_sizes(size))) for size in sizes),
        mixed_floor_fs=to_fs(model.num_layers * profile.host.launch_layer_ns),
        mixed_seq_fs=to_fs(rates.seq_ns),
        mixed_context_fs=to_fs(mixed_read_ns),
        token_pair_fs=to_fs(pair_ns),
        chunk_context_fs=to_fs(mixed_read_ns),
        host_base_fs=to_fs(profile.host.base_ns),
        host_seq_fs=to_fs(profile.host.seq_ns),
    )


def decode_sizes(num_seqs: int) -> StepSizes:
    """A step in which every sequence gets one token, without what attention reads."""
    return StepSizes(num_tokens=num_seqs, num_seqs=num_seqs, num_sampled=num_seqs)


def mixed_sizes(num_tokens: int) -> StepSizes:
    """A step with one chunk, without what attention reads; more sequences are priced by ``mixed_seq_fs``."""
    return StepSizes(num_tokens=num_tokens, num_seqs=1, num_sampled=1)


def pair_flops(prices: GraphPrices) -> int:
    """Of one query token and one key that it attends to, over all layers."""
    return prices.attention_work(StepSizes(num_token_pairs=1)).flops


def step_fixed_ns(profile: AnalyticProfile, model: ModelShape) -> float:
    """Latency of the small kernels of a step, whatever its size."""
    layer_ns = profile.rates.layer_fixed_ns + (profile.rates.qk_norm_ns if model.qk_norm else 0.0)
    return model.num_layers * layer_ns + profile.rates.step_fixed_ns


def to_fs(nanoseconds: float) -> int:
    return round(nanoseconds * FEMTOSECONDS_PER_NANOSECOND)
