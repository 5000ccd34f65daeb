"""The figures of a running server, folded from what passes through the front process."""

from sagellm.core.messages import Effect, Event
from sagellm.server.engine import InstanceStatus


class ServingMetrics:
    """An `EngineObserver`. Make it first, hand it to the live driver and to `create_app`.

    It keeps something for each unfinished request only, so its memory is bounded by what is served.
    """

    def __init__(self, model_name: str, max_model_len: int) -> None:
        self.model_name = model_name
        self.max_model_len = max_model_len

    def observe(self, now_ns: int, record: Event | Effect) -> None:
        """An event or effect of the control plane, or tokens that go out to clients."""

    def observe_status(self, now_ns: int, status: InstanceStatus) -> None:
        """An instance spoke of itself."""
