"""A cluster, described: which model, which instances on which devices, and by which rules they serve.

The values are what a cluster file says, checked, with every default filled in. Nothing here knows
whether the cluster will be simulated or deployed.
"""

from collections import Counter
from dataclasses import dataclass, field

from sagellm.core.config import HandoverStart, Role
from sagellm.core.identity import InstanceId
from sagellm.core.request import LatencySLO

UNLIMITED = 1 << 60
"""Of requests or tokens: more than any run has."""


@dataclass(frozen=True, slots=True)
class InstanceGroup:
    """``count`` equal instances."""

    profile: str  # "<device>/<engine>", such as h200/vllm-0.22.1
    count: int = 1
    role: Role = Role.MIXED
    name: str | None = None  # None: numbered on within the role
    tp: int = 1  # devices of one instance, over which its tensors are split
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16  # tokens
    prefix_caching: bool = True
    eviction: str = "lru"
    steps_in_flight: int | None = None  # 1: synchronous scheduling, 2: asynchronous; None: as the profile's engine
    plan_lead_ns: int | None = None  # see `InstanceConfig`; None: as the profile's engine, or the device deployed to
    kv_tokens: int | None = None  # of one instance; None: what the device's memory leaves
    memory_utilization: float | None = None  # share of the device's memory to use; None: as the profile's engine


@dataclass(frozen=True, slots=True)
class CustomLink:
    """A link that no profile describes."""

    bandwidth_bytes_per_s: int
    latency_ns: int


@dataclass(frozen=True, slots=True)
class Limits:
    """Where the cluster says no, or not yet."""

    queue_max: int = 100_000  # requests that may wait in the control plane
    dispatch_tokens_max: int = 0  # prompt tokens that an instance may hold not yet prefilled; 0: five steps' worth
    max_model_len: int = 0  # prompt and output tokens of one request; 0: as KV allows
    attempts_max: int = 3


@dataclass(frozen=True, slots=True)
class Routing:
    """In which order requests are served, and where."""

    strategy: str = "fifo"
    routing: str = "least_loaded"
    disaggregate_min_tokens: int = 0  # shorter uncached prompts are prefilled where they decode
    handover: HandoverStart = HandoverStart.AT_END


@dataclass(frozen=True, slots=True)
class ClusterDescription:
    """One cluster."""

    name: str
    model: str  # a known model's Hub id, or the path of a config.json
    instances: tuple[InstanceGroup, ...]
    link: str | CustomLink = "rdma-400"  # over which instances pass KV to each other
    limits: Limits = field(default=Limits())
    routing: Routing = field(default=Routing())
    slo: LatencySLO = field(default=LatencySLO())

    def named_instances(self) -> tuple[tuple[InstanceId, InstanceGroup], ...]:
        """Every instance with its group, in the file's order.

        A group's name is the name of its one instance, or numbers several (``name-0``, ``name-1``).
        Groups without a name number on within their role: ``prefill-0``, ``prefill-1``, ``decode-0``.
        """
        named: list[tuple[InstanceId, InstanceGroup]] = []
        num_unnamed: Counter[Role] = Counter()
        for group in self.instances:
            for index in range(group.count):
                if group.name is None:
                    name = f"{group.role}-{num_unnamed[group.role]}"
                    num_unnamed[group.role] += 1
                else:
                    name = group.name if group.count == 1 else f"{group.name}-{index}"
                named.append((InstanceId(name), group))
        return tuple(named)
