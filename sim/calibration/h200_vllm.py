"""What is known of vLLM 0.22.1 on an H200 beside the fitted numbers: the card, the engine, the sources."""

from sagellm.cost_model.price_table import StepPriceTable
from sagellm.cost_model.profile import (
    AnalyticProfile,
    DeviceSheet,
    EngineMemory,
    FittedProfile,
    HostConstants,
    OperatorRates,
    ProfileHeader,
)
from sagellm.models.known_models import load_model
from sim.calibration.host_fit import HostFit
from sim.calibration.operator_tables import DATA_FOLDER, read_all_reduce_table, read_gemm_table, read_qk_norm_ns
from sim.calibration.regression import hat_weights
from sim.calibration.step_fit import CONTEXT_KNOTS, DECODE_KNOTS, GRAPH_SIZES, MIXED_KNOTS, StepFit

MODEL_ID = "Qwen/Qwen2.5-7B"
ENGINE = "vLLM 0.22.1, bf16, device graphs, chunked prefill"
DATE = "2026-11-22"
MEMORY_UTILISATION = 0.9
KV_TOKENS = 2_056_176  # what vLLM reported for the 7B at that utilisation

DEVICE = DeviceSheet(
    memory_bytes=143_771 << 20,  # as nvidia-smi reports it
    memory_gbps=4800.0,
    bf16_tflops=989.0,
    scale_up_gbps=450.0,
    network_gbps=50.0,
    power_w=700.0,
)


def memory() -> EngineMemory:
    """What is neither weights nor KV cache: from vLLM's own KV figure for the 7B."""
    model = load_model(MODEL_ID)
    usable = int(DEVICE.memory_bytes * MEMORY_UTILISATION)
    activation_bytes = usable - model.weight_bytes - KV_TOKENS * model.kv_bytes_per_token
    return EngineMemory(MEMORY_UTILISATION, activation_bytes, KV_TOKENS)


def fitted_profile(fit: StepFit, host: HostFit) -> FittedProfile:
    """The profile of the 7B on one card. ``fit`` must have the host's share of each sequence taken off."""
    return FittedProfile(
        header=ProfileHeader(
            name="h200/vllm-0.22.1-qwen2.5-7b",
            hardware="NVIDIA H200",
            engine=ENGINE,
            date=DATE,
            source="python -m sim.calibration fit, on synchronous steps of that engine and model; "
            "host constants from online runs with asynchronous scheduling",
            status="measured",
        ),
        device=DEVICE,
        model=load_model(MODEL_ID),
        tp=1,
        table=_price_table(fit, host),
        memory=memory(),
        request_overhead_ns=round(host.request_overhead_us * 1e3),
    )


def family_start() -> AnalyticProfile:
    """The family before its constants are fitted. The rates that stay as they are here are assumptions."""
    folder = DATA_FOLDER / "h200"
    return AnalyticProfile(
        header=ProfileHeader(
            name="h200/vllm-0.22.1",
            hardware="NVIDIA H200",
            engine=ENGINE,
            date=DATE,
            source="GEMM, query-key norm and all-reduce times of benchmarks/h200 (torch 2.11, CUDA 13, driver 580); "
            "other constants by python -m sim.calibration fit, on synchronous steps of the 7B",
            status="measured",
            notes=(
                "step_fixed_ns is assumed: twenty small kernels a step",
                "all-reduces of more than two ranks are extrapolated from two",
            ),
        ),
        device=DEVICE,
        rates=OperatorRates(
            gemm_compute_efficiency=0.67,
            gemm_memory_efficiency=0.75,
            stream_memory_efficiency=0.87,  # an addition over [8192, 3584] streams at 4.19 TB/s
            attention_compute_efficiency=0.5,
            attention_read_tiles=(1,),
            attention_read_efficiency=(0.8,),
            mixed_attention_read_efficiency=0.3,
            layer_fixed_ns=0,
            mixed_layer_fixed_ns=0,
            qk_norm_ns=read_qk_norm_ns(folder),
            step_fixed_ns=40_000,
            seq_ns=0,
            all_reduce_fixed_ns=7000,
            all_reduce_efficiency=0.6,
        ),
        host=HostConstants(base_ns=0, seq_ns=0, launch_layer_ns=0, request_overhead_ns=0),
        memory=EngineMemory(MEMORY_UTILISATION, memory().activation_bytes),
        graph_sizes=GRAPH_SIZES,
        gemm_table=read_gemm_table(folder),
        all_reduce_table=read_all_reduce_table(folder),
    )


def _price_table(fit: StepFit, host: HostFit) -> StepPriceTable:
    context_us = [
        sum(w * v for w, v in zip(hat_weights(knot, CONTEXT_KNOTS), fit.decode_context_us, strict=True))
        for knot in DECODE_KNOTS
    ]
    return StepPriceTable(
        graph_sizes=GRAPH_SIZES,
        decode_num_seqs=DECODE_KNOTS,
        decode_base_fs=tuple(_fs(us - host.base_us) for us in fit.decode_base_us),
        decode_context_fs=tuple(_fs(us, 6) for us in context_us),
        mixed_num_tokens=MIXED_KNOTS,
        mixed_base_fs=tuple(_fs(us - host.base_us) for us in fit.mixed_base_us),
        mixed_floor_fs=0,
        mixed_seq_fs=0,
        mixed_context_fs=_fs(fit.mixed_context_us, 6),
        token_pair_fs=_fs(fit.token_pair_us, 8),
        chunk_context_fs=_fs(fit.mixed_context_us, 6),
        host_base_fs=_fs(fit.schedule_base_us + host.base_us),
        host_seq_fs=_fs(fit.schedule_seq_us + host.seq_us),
    )


def _fs(microseconds: float, digits: int = 3) -> int:
    return round(round(microseconds, digits) * 1e9)
