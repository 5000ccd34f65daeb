"""When the next step is planned, while one is on the device.

A step that is planned as soon as there is room takes in nobody who arrives before the one under way ends. Planned just
before that end, it leaves the device no more idle, and a request that arrives meanwhile waits one step less.
"""

from sagellm.core.ends import Ends, last_end_ns, num_ends
from sagellm.core.plan import StepPlan

_SEQS_FOR_TWICE_THE_LEAD = 512


class StepPace:
    """Learns how long steps take, and holds the next one back until so long before the end of the one under way.

    The host takes longer for a step of more sequences, so the lead is half as long again for every 256 of them.

    A step without prompts is expected to take as long as the last one did; one with prompts longer by what each of
    their tokens took last, less a tenth. Who ends early leaves the device idle for less than it was early.
    """

    __slots__ = ("_decode_ns", "_ended_ns", "_in_flight", "_lead_ns", "_ns_per_token", "_num_seqs")

    def __init__(self, lead_ns: int) -> None:
        self._lead_ns = lead_ns
        self._in_flight: list[tuple[int, int]] = []  # prompt tokens and time of launch; two at most
        self._num_seqs = 0  # of the last one that was launched
        self._ended_ns = 0  # the last one
        self._decode_ns = 0  # 0: not known yet
        self._ns_per_token = 0

    def launched(self, plan: StepPlan, now_ns: int) -> None:
        """A step was put behind those in flight."""
        self._num_seqs = plan.num_seqs
        self._in_flight.append((sum([chunk.num_tokens for chunk in plan.chunks]), now_ns))

    def progressed(self, ends_ns: Ends) -> None:
        """Executions of the first step in flight ended, which has no prompts; one more is under way."""
        num_new = num_ends(ends_ns)
        if num_new:
            began_ns = max(self._in_flight[0][1], self._ended_ns) if num_new == 1 else ends_ns[-2]
            self._ended_ns = last_end_ns(ends_ns)
            self._decode_ns = self._ended_ns - began_ns

    def finished(self, ends_ns: Ends, now_ns: int) -> None:
        """The first step in flight is over, after executions of which these are news."""
        if num_ends(ends_ns) > 1:
            self._ended_ns = ends_ns[-2]
        self.ended(now_ns)

    def ended(self, now_ns: int) -> None:
        """The first step in flight, or the last execution of it, is over."""
        num_tokens, launched_ns = self._in_flight.pop(0)
        duration_ns = now_ns - max(launched_ns, self._ended_ns)
        self._ended_ns = now_ns
        if not num_tokens:
            self._decode_ns = duration_ns
        elif self._decode_ns:
            self._ns_per_token = max(0, duration_ns - self._decode_ns) // num_tokens

    def failed(self, now_ns: int) -> None:
        """The first step in flight gave nothing; how long it took says nothing."""
        self._in_flight.pop(0)
        self._ended_ns = now_ns

    def plan_ns(self) -> int:
        """When the next step is to be planned: 0 where nothing is to be waited for."""
        if len(self._in_flight) != 1 or not self._decode_ns:
            return 0
        num_tokens, launched_ns = self._in_flight[0]
        if num_tokens and not self._ns_per_token:
            return 0
        expected_ns = self._decode_ns + num_tokens * self._ns_per_token * 9 // 10
        return max(launched_ns, self._ended_ns) + expected_ns - self.lead_ns

    @property
    def expected_ns(self) -> int:
        """How long a step without prompts is expected to take; 0: not known."""
        return self._decode_ns

    @property
    def lead_ns(self) -> int:
        """How long before the end of the last step launched the one behind it is planned."""
        return self._lead_ns + self._lead_ns * self._num_seqs // _SEQS_FOR_TWICE_THE_LEAD
