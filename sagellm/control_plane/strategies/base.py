"""The strategies by name."""

from sagellm.control_plane.strategies.adaptive import AdaptiveStrategy
from sagellm.control_plane.strategies.fifo import FifoStrategy
from sagellm.control_plane.strategies.priority import PriorityStrategy
from sagellm.control_plane.strategies.slo_aware import SLOAwareStrategy
from sagellm.control_plane.strategies.strategy import Strategy

STRATEGY_NAMES = ("fifo", "priority", "slo_aware", "adaptive")


def make_strategy(name: str) -> Strategy:
    """Raises ValueError for an unknown name, naming the known ones."""
    match name:
        case "fifo":
            return FifoStrategy()
        case "priority":
            return PriorityStrategy()
        case "slo_aware":
            return SLOAwareStrategy()
        case "adaptive":
            return AdaptiveStrategy()
        case _:
            raise ValueError(f"strategy: {name!r}, must be one of {', '.join(STRATEGY_NAMES)}")
