"""What the simulator needs of a cluster: frozen configurations and prices, with no names left to resolve."""

from dataclasses import dataclass, field

from sagellm.core.config import ControlPlaneConfig, InstanceConfig
from sagellm.cost_model.link import Link
from sagellm.cost_model.step_cost import StepCostModel

MESSAGE_LATENCY_NS = 50_000
"""Between two machines of a cluster, one way: a small message over loopback or a data-centre network."""


@dataclass(frozen=True, slots=True)
class SimInstance:
    """One instance and the price of its steps."""

    config: InstanceConfig
    cost_model: StepCostModel


@dataclass(frozen=True, slots=True)
class SimCluster:
    """One cluster, ready to run."""

    name: str
    control_plane: ControlPlaneConfig
    instances: tuple[SimInstance, ...]
    link: Link
    message_latency_ns: int = field(default=MESSAGE_LATENCY_NS)
