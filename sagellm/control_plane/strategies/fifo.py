"""First come, first served."""

from sagellm.control_plane.strategies.keyed_queue import KeyedStrategy


class FifoStrategy(KeyedStrategy):
    """By arrival. A request that comes back from a lost instance keeps its place."""

    def __init__(self) -> None:
        super().__init__(lambda request: (request.spec.arrival_ns,))
