"""A machine as the driver keeps it: what is on its way to it, and, for an instance, its device."""

from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.messages import InstanceEvent
from sagellm.runtime.instance import Instance
from sim.cluster import SimInstance
from sim.device import SimDevice


class DrivenMachine:
    """The control plane or an instance: one that is polled."""

    __slots__ = ("instance_id", "is_dirty")

    def __init__(self, instance_id: InstanceId) -> None:
        self.instance_id = instance_id
        self.is_dirty = False  # it heard something since it was last polled


class DrivenInstance(DrivenMachine):
    """One instance of a run."""

    __slots__ = ("arriving", "arriving_ns", "device", "lost", "machine", "plans_late", "request_overhead_ns", "told_of")

    def __init__(self, instance: SimInstance) -> None:
        super().__init__(instance.config.instance_id)
        self.machine = Instance(instance.config)
        self.request_overhead_ns = instance.cost_model.request_overhead_ns
        self.plans_late = instance.config.plan_lead_ns > 0
        self.device: SimDevice
        self.lost = False
        self.told_of: dict[RequestId, None] = {}  # requests that it was ever given
        self.arriving_ns = 0  # no message arrives before one that was sent earlier
        self.arriving: list[InstanceEvent] = []  # those that arrive at that time
