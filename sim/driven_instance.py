"""An instance as the driver keeps it: the machine, its device, and what is on its way to it."""

from sagellm.runtime.instance import Instance
from sim.cluster import SimInstance
from sim.device import SimDevice


class DrivenInstance:
    """One instance of a run."""

    __slots__ = ("device", "instance_id", "lost", "machine", "message_clock_ns", "request_overhead_ns", "told_of")

    def __init__(self, instance: SimInstance) -> None:
        self.instance_id = instance.config.instance_id
        self.machine = Instance(instance.config)
        self.request_overhead_ns = instance.cost_model.request_overhead_ns
        self.device: SimDevice
        self.lost = False
        self.message_clock_ns = 0  # no message arrives before one that was sent earlier
        self.told_of: dict[str, None] = {}  # requests that it was ever given
