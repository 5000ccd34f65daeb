"""The more urgent class first; first come, first served within a class."""

from sagellm.control_plane.strategies.keyed_queue import KeyedStrategy


class PriorityStrategy(KeyedStrategy):
    """By (priority, arrival), strictly: a flood of urgent requests holds the others back for as long as it lasts."""

    def __init__(self) -> None:
        super().__init__(lambda request: (request.spec.priority, request.arrival_ns))
