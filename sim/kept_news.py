"""Word for the control plane that may wait until it hears of something else."""

from sagellm.core.messages import ControlPlaneEvent


class KeptNews:
    """In order of arrival: what arrived, and when."""

    __slots__ = ("arrivals_ns", "messages")

    def __init__(self) -> None:
        self.messages: list[ControlPlaneEvent] = []
        self.arrivals_ns: list[int] = []

    def __bool__(self) -> bool:
        return bool(self.messages)

    def keep(self, message: ControlPlaneEvent, at_ns: int) -> None:
        """It arrives at that time, and no earlier than what was kept before."""
        self.messages.append(message)
        self.arrivals_ns.append(at_ns)

    def num_due(self, until_ns: int) -> int:
        """How many have arrived by then."""
        num_due, num_kept = 0, len(self.arrivals_ns)
        while num_due < num_kept and self.arrivals_ns[num_due] <= until_ns:
            num_due += 1
        return num_due

    def drop(self, count: int) -> None:
        """The first ones were handed out."""
        del self.messages[:count]
        del self.arrivals_ns[:count]

    def take_all(self) -> list[tuple[ControlPlaneEvent, int]]:
        """All of them, with their times; none is left."""
        kept = list(zip(self.messages, self.arrivals_ns, strict=True))
        self.drop(len(kept))
        return kept
