"""What may stand in a cluster file, key by key. Only the shape is checked here; see ``checks.py``."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from sagellm.cluster.description import UNLIMITED
from sagellm.cluster.quantities import parse_bandwidth_bytes_per_s, parse_duration_ns


def _text(value: Any, example: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} has no unit; write it like {example}")
    return value


def _duration_ns(value: Any) -> int:
    return parse_duration_ns(_text(value, "500ms"))


def _bandwidth_bytes_per_s(value: Any) -> int:
    return parse_bandwidth_bytes_per_s(_text(value, "400Gb/s"))


def _unlimited(value: Any) -> Any:
    return UNLIMITED if value == "unlimited" else value


def _duration_ns_or_none(value: Any) -> int:
    return 0 if value == "none" else _duration_ns(value)


DurationNs = Annotated[int, BeforeValidator(_duration_ns)]
DurationNsOrNone = Annotated[int, BeforeValidator(_duration_ns_or_none)]
BandwidthBytesPerS = Annotated[int, BeforeValidator(_bandwidth_bytes_per_s)]
Count = Annotated[int, Field(ge=1)]
CountOrUnlimited = Annotated[int, Field(ge=1), BeforeValidator(_unlimited)]


class Section(BaseModel):
    """A mapping in the file: no unknown keys, no text for numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class InstanceSection(Section):
    """An entry of ``instances``."""

    count: Count = 1
    role: Literal["mixed", "prefill", "decode"] = "mixed"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    device: str | None = None
    profile: str | None = None
    tp: Count = 1
    max_num_seqs: Count = 256
    max_num_batched_tokens: Count = 8192
    block_size: Count = 16
    prefix_caching: bool = True
    eviction: str = "lru"
    steps_in_flight: Annotated[int, Field(ge=1, le=2)] | None = None
    plan_lead: DurationNsOrNone | None = None
    kv_tokens: Count | None = None
    memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _runs_on_something(self) -> "InstanceSection":
        names_device = self.profile is not None and ("/" in self.profile or self.profile.endswith(".json"))
        if self.device is None and not names_device:
            raise ValueError("says not what it runs on; give device: h200, or profile: h200/vllm-0.22.1")
        return self

    @model_validator(mode="after")
    def _has_a_step_to_hold_back(self) -> "InstanceSection":
        if self.plan_lead and self.steps_in_flight == 1:
            raise ValueError("has plan_lead and steps_in_flight: 1, so no step to hold back; leave one of them out")
        return self


class LinksSection(Section):
    """``links``: a named link, or one's own numbers."""

    between_instances: str | None = None
    bandwidth: BandwidthBytesPerS | None = None
    latency: DurationNs | None = None

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> "LinksSection":
        if (self.bandwidth is None) != (self.latency is None):
            raise ValueError("has bandwidth or latency without the other; give both, or the name of a link")
        if (self.between_instances is None) == (self.bandwidth is None):
            raise ValueError("must have either between_instances, the name of a link, or bandwidth and latency")
        return self


class LimitsSection(Section):
    """``limits``."""

    queue_max: CountOrUnlimited = 100_000
    dispatch_tokens_max: CountOrUnlimited = 0  # five steps' worth of each instance
    max_model_len: Count | None = None
    attempts_max: Count = 3


class RoutingSection(Section):
    """``routing``."""

    strategy: str = "fifo"
    routing: str = "least_loaded"
    disaggregate_min_tokens: Annotated[int, Field(ge=0)] = 0
    handover: Literal["at_end", "streamed"] = "at_end"


class SLOSection(Section):
    """``slo``."""

    ttft: DurationNs | None = None
    tpot: DurationNs | None = None


class ClusterFile(Section):
    """The whole file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    model: str
    instances: Annotated[list[InstanceSection], Field(min_length=1)]
    links: LinksSection = LinksSection(between_instances="rdma-400")
    limits: LimitsSection = LimitsSection()
    routing: RoutingSection = RoutingSection()
    slo: SLOSection = SLOSection()
