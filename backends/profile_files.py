"""Reads profiles: the JSON files beside the backends that they describe.

The file ``backends/<vendor>/profiles/<device>_<what>.json`` holds the profile ``<device>/<what>``.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from sagellm.cost_model.price_table import StepPriceTable
from sagellm.cost_model.profile import (
    AllReduceTable,
    AnalyticProfile,
    DeviceSheet,
    EngineMemory,
    FittedProfile,
    GemmCurve,
    GemmTable,
    HostConstants,
    OperatorRates,
    Profile,
    ProfileHeader,
)
from sagellm.cost_model.step_cost import FEMTOSECONDS_PER_NANOSECOND
from sagellm.models.known_models import load_model

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class _Header(_Part):
    name: str
    hardware: str
    engine: str
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    source: str
    status: Literal["measured", "spec", "estimate"]
    fit_error: str = ""
    notes: tuple[str, ...] = ()


class _Device(_Part):
    memory_bytes: int = Field(gt=0)
    memory_gbps: Positive
    bf16_tflops: Positive
    scale_up_gbps: Positive
    network_gbps: NonNegative = 0.0
    power_w: NonNegative = 0.0


class _Rates(_Part):
    gemm_compute_efficiency: Share
    gemm_memory_efficiency: Share
    stream_memory_efficiency: Share
    attention_compute_efficiency: Share
    attention_read_tiles: tuple[int, ...] = Field(min_length=1)
    attention_read_efficiency: tuple[Share, ...] = Field(min_length=1)
    mixed_attention_read_efficiency: Share
    layer_fixed_ns: NonNegative
    mixed_layer_fixed_ns: NonNegative
    qk_norm_ns: NonNegative
    step_fixed_ns: NonNegative
    seq_ns: NonNegative
    all_reduce_fixed_ns: NonNegative
    all_reduce_efficiency: Share

    @model_validator(mode="after")
    def _knots_match(self) -> "_Rates":
        _check_knots("attention_read", self.attention_read_tiles, self.attention_read_efficiency)
        return self


class _GemmCurve(_Part):
    n: int = Field(gt=0)
    k: int = Field(gt=0)
    us: tuple[float, ...] = Field(min_length=2)


class _GemmTable(_Part):
    num_tokens: tuple[int, ...]
    curves: tuple[_GemmCurve, ...] = Field(min_length=1)
    step_factor_num_tokens: tuple[int, ...]
    step_factor: tuple[Positive, ...]

    @model_validator(mode="after")
    def _knots_match(self) -> "_GemmTable":
        _check_knots("step_factor", self.step_factor_num_tokens, self.step_factor)
        if any(len(curve.us) > len(self.num_tokens) for curve in self.curves):
            raise ValueError("gemm_table: a curve has more times than num_tokens has entries")
        return self


class _AllReduceTable(_Part):
    num_bytes: tuple[int, ...] = Field(min_length=2)
    us: tuple[Positive, ...]

    @model_validator(mode="after")
    def _knots_match(self) -> "_AllReduceTable":
        _check_knots("all_reduce_table", self.num_bytes, self.us)
        return self


class _Host(_Part):
    base_ns: NonNegative
    seq_ns: NonNegative
    launch_layer_ns: NonNegative
    request_overhead_ns: int = Field(ge=0)
    steps_in_flight_max: Literal[1, 2] = 2


class _Memory(_Part):
    memory_utilisation: Share
    activation_bytes: int = Field(ge=0)
    kv_tokens_measured: int = Field(default=0, ge=0)


class _AnalyticFile(_Part):
    schema_: Literal[1] = Field(alias="schema")
    kind: Literal["analytic"]
    header: _Header
    device: _Device
    rates: _Rates
    host: _Host
    memory: _Memory
    graph_sizes: tuple[int, ...] = ()
    gemm_table: _GemmTable | None = None
    all_reduce_table: _AllReduceTable | None = None


class _PricesNs(_Part):
    """A ``StepPriceTable`` in nanoseconds."""

    decode_num_seqs: tuple[int, ...]
    decode_base_ns: tuple[float, ...]
    decode_context_ns: tuple[float, ...]
    mixed_num_tokens: tuple[int, ...]
    mixed_base_ns: tuple[float, ...]
    mixed_floor_ns: NonNegative
    mixed_seq_ns: NonNegative
    mixed_context_ns: NonNegative
    token_pair_ns: NonNegative
    chunk_context_ns: NonNegative
    host_base_ns: NonNegative
    host_seq_ns: NonNegative
    sustained_extra_permille: Annotated[int, Field(ge=0)] = 0
    sustained_ns: Annotated[int, Field(ge=1)] = 1


class _FittedFile(_Part):
    schema_: Literal[1] = Field(alias="schema")
    kind: Literal["fitted"]
    header: _Header
    device: _Device
    model: str
    tp: int = Field(ge=1)
    graph_sizes: tuple[int, ...] = ()
    prices: _PricesNs
    memory: _Memory
    request_overhead_ns: int = Field(ge=0)
    steps_in_flight_max: Literal[1, 2] = 2
    plan_lead_ns: Annotated[int, Field(ge=0)] = 0


_ProfileFile = Annotated[_AnalyticFile | _FittedFile, Field(discriminator="kind")]


def list_profiles() -> tuple[str, ...]:
    """Names of all shipped profiles, sorted. No file is read."""
    return tuple(sorted(_profile_paths()))


def load_profile(name: str) -> Profile:
    """A shipped profile by name, or the profile in a ``.json`` file of one's own.

    Raises ``ValueError`` where there is none of that name, or the file does not hold a profile.
    """
    if name.endswith(".json"):
        return read_profile(Path(name))
    paths = _profile_paths()
    if name not in paths:
        raise ValueError(f"profile: {name!r} is not known; must be one of {', '.join(sorted(paths))}, or a .json file")
    return read_profile(paths[name])


def read_profile(path: Path) -> Profile:
    """Parses one profile file; raises ``ValueError`` naming file and field where it is wrong."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a profile's JSON file") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}); give a profile's JSON file") from error
    try:
        parsed = TypeAdapter[_AnalyticFile | _FittedFile](_ProfileFile).validate_python(raw)
        return _analytic(parsed) if isinstance(parsed, _AnalyticFile) else _fitted(parsed)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: {where}: {first['msg']} (it is {first['input']!r:.60})") from error


def _profile_paths() -> dict[str, Path]:
    folder = Path(__file__).parent
    return {path.stem.replace("_", "/", 1): path for path in folder.glob("*/profiles/*.json")}


def _analytic(parsed: _AnalyticFile) -> AnalyticProfile:
    table = parsed.gemm_table
    reduce_table = parsed.all_reduce_table
    return AnalyticProfile(
        header=ProfileHeader(**parsed.header.model_dump()),
        device=DeviceSheet(**parsed.device.model_dump()),
        rates=OperatorRates(**parsed.rates.model_dump()),
        host=HostConstants(**parsed.host.model_dump()),
        memory=EngineMemory(**parsed.memory.model_dump()),
        graph_sizes=parsed.graph_sizes,
        gemm_table=None if table is None else _gemm_table(table),
        all_reduce_table=None if reduce_table is None else AllReduceTable(reduce_table.num_bytes, reduce_table.us),
    )


def _gemm_table(parsed: _GemmTable) -> GemmTable:
    curves = tuple(GemmCurve(curve.n, curve.k, curve.us) for curve in parsed.curves)
    return GemmTable(parsed.num_tokens, curves, parsed.step_factor_num_tokens, parsed.step_factor)


def _fitted(parsed: _FittedFile) -> FittedProfile:
    prices = parsed.prices
    table = StepPriceTable(
        graph_sizes=parsed.graph_sizes,
        decode_num_seqs=prices.decode_num_seqs,
        decode_base_fs=_all_fs(prices.decode_base_ns),
        decode_context_fs=_all_fs(prices.decode_context_ns),
        mixed_num_tokens=prices.mixed_num_tokens,
        mixed_base_fs=_all_fs(prices.mixed_base_ns),
        mixed_floor_fs=_fs(prices.mixed_floor_ns),
        mixed_seq_fs=_fs(prices.mixed_seq_ns),
        mixed_context_fs=_fs(prices.mixed_context_ns),
        token_pair_fs=_fs(prices.token_pair_ns),
        chunk_context_fs=_fs(prices.chunk_context_ns),
        host_base_fs=_fs(prices.host_base_ns),
        host_seq_fs=_fs(prices.host_seq_ns),
        sustained_extra_permille=prices.sustained_extra_permille,
        sustained_ns=prices.sustained_ns,
    )
    return FittedProfile(
        header=ProfileHeader(**parsed.header.model_dump()),
        device=DeviceSheet(**parsed.device.model_dump()),
        model=load_model(parsed.model),
        tp=parsed.tp,
        table=table,
        memory=EngineMemory(**parsed.memory.model_dump()),
        request_overhead_ns=parsed.request_overhead_ns,
        steps_in_flight_max=parsed.steps_in_flight_max,
        plan_lead_ns=parsed.plan_lead_ns,
    )


def _check_knots(name: str, knots: tuple[int, ...], values: tuple[float, ...]) -> None:
    if len(knots) != len(values) or list(knots) != sorted(set(knots)):
        raise ValueError(f"{name}: must have as many values as knots, and knots that rise")


def _fs(nanoseconds: float) -> int:
    return round(nanoseconds * FEMTOSECONDS_PER_NANOSECOND)


def _all_fs(nanoseconds: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(_fs(value) for value in nanoseconds)
