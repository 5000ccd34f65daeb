"""What a profile holds: the numbers that describe a device, an engine on it, or a measured pair of both.

Units are in the names: ``gbps`` is gigabytes (1e9) a second, ``tflops`` is 1e12 floating-point
operations a second, where a multiply and an add count as two.
"""

from dataclasses import dataclass

from sagellm.cost_model.price_table import StepPriceTable
from sagellm.models.model_shape import ModelShape


@dataclass(frozen=True, slots=True)
class ProfileHeader:
    """Where the numbers come from. ``status`` is ``measured``, ``spec`` or ``estimate``."""

    name: str  # for example h200/spec
    hardware: str
    engine: str
    date: str
    source: str
    status: str
    fit_error: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceSheet:
    """One device's peaks, dense, as its maker or a second source states them."""

    memory_bytes: int
    memory_gbps: float
    bf16_tflops: float
    scale_up_gbps: float  # to its neighbours in a tensor-parallel group, one way
    network_gbps: float = 0.0  # to other hosts, one way; 0 where not stated
    power_w: float = 0.0  # 0 where not stated


@dataclass(frozen=True, slots=True)
class OperatorRates:
    """How much of the peaks an engine's operators reach, and what is fixed.

    Efficiencies are shares of the device sheet's peaks. ``attention_read_*`` gives the share of memory
    bandwidth that decode attention reaches, by the number of (sequence, KV head) tiles it has to spread
    over the device, interpolated between its knots.
    """

    gemm_compute_efficiency: float
    gemm_memory_efficiency: float
    stream_memory_efficiency: float  # norms, activations, rotary embedding
    attention_compute_efficiency: float
    attention_read_tiles: tuple[int, ...]
    attention_read_efficiency: tuple[float, ...]
    mixed_attention_read_efficiency: float  # decodes that share a step with chunks
    layer_fixed_ns: float  # small kernels of one layer, whatever the batch
    mixed_layer_fixed_ns: float  # more of the same where attention runs outside of the device graph
    qk_norm_ns: float  # the two more where queries and keys are normed
    step_fixed_ns: float  # embedding, final norm, sampling
    seq_ns: float  # for each sequence: logits and sampling
    all_reduce_fixed_ns: float
    all_reduce_efficiency: float  # of scale_up_gbps


@dataclass(frozen=True, slots=True)
class GemmCurve:
    """Measured time of one weight matrix (n outputs, k inputs) at each of the table's token counts."""

    n: int
    k: int
    us: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class GemmTable:
    """Measured GEMM times of many shapes. ``step_factor`` corrects them to what they take inside a step."""

    num_tokens: tuple[int, ...]
    curves: tuple[GemmCurve, ...]
    step_factor_num_tokens: tuple[int, ...]
    step_factor: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class AllReduceTable:
    """Measured all-reduce times between two devices, by message size."""

    num_bytes: tuple[int, ...]
    us: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class HostConstants:
    """The host's share. See ``StepCost.host_fs`` for when it counts."""

    base_ns: float
    seq_ns: float
    launch_layer_ns: float  # launching one layer of a step that no single device graph holds
    request_overhead_ns: int
    steps_in_flight_max: int = 2  # what the engine does: 2 with asynchronous scheduling


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """What the engine leaves for the KV cache."""

    memory_utilisation: float
    activation_bytes: int  # on one device, beside weights and KV cache; 0: what the execution graph needs
    kv_tokens_measured: int = 0  # the engine's own figure where it is known; 0: computed


@dataclass(frozen=True, slots=True)
class AnalyticProfile:
    """Prices any model: a device's peaks and the rates that an engine reaches on it."""

    header: ProfileHeader
    device: DeviceSheet
    rates: OperatorRates
    host: HostConstants
    memory: EngineMemory
    graph_sizes: tuple[int, ...] = ()
    gemm_table: GemmTable | None = None
    all_reduce_table: AllReduceTable | None = None


@dataclass(frozen=True, slots=True)
class FittedProfile:
    """Prices one model on one kind of instance, from that pair's measured steps."""

    header: ProfileHeader
    device: DeviceSheet
    model: ModelShape
    tp: int
    table: StepPriceTable
    memory: EngineMemory
    request_overhead_ns: int
    steps_in_flight_max: int = 2
    plan_lead_ns: int = 0  # how long before a step's end the engine plans the next one; 0: at once

    def is_for(self, model: ModelShape, tp: int) -> bool:
        """Whether this was fitted to a model of that shape on so many devices."""
        return self.tp == tp and self.model.costs_the_same_as(model)


Profile = AnalyticProfile | FittedProfile
