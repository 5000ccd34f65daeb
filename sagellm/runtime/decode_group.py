"""Requests that each gain one token in every step, kept so that a step costs nothing per request.

An instance counts its steps: its *clock*. Every member of the group is in every step, so what a
member has computed is ``base_computed + (clock - join_clock)``, and so on for its output tokens, the
step in which it needs its next block, and the step that is its last. Advancing all members by k
steps is then one addition.
"""

from sagellm.core.identity import RequestId
from sagellm.runtime.local_request import LocalRequest


class DecodeGroup:
    """The members, in the order in which they joined."""

    __slots__ = (
        "_by_finish",
        "_context_offset",
        "_request_ids",
        "block_size",
        "by_growth",
        "members",
        "num_stoppable",
    )

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.members: dict[RequestId, LocalRequest] = {}
        self.num_stoppable = 0  # members that a token may end before their last
        self._request_ids: tuple[RequestId, ...] | None = ()
        self._context_offset = 0
        # Members by the step, modulo the block size, in which they need a new block.
        self.by_growth: list[list[LocalRequest]] = [[] for _ in range(block_size)]
        # Members by the step that is their last, then by admission; the first to finish at the end, where it goes
        # away for nothing.
        self._by_finish: list[LocalRequest] = []

    def __len__(self) -> int:
        return len(self.members)

    @property
    def request_ids(self) -> tuple[RequestId, ...]:
        """The same tuple for as long as the members stay the same."""
        if self._request_ids is None:
            self._request_ids = tuple(self.members)
        return self._request_ids

    def join(self, request: LocalRequest, clock: int, *, base_computed: int, base_output: int) -> None:
        """From step ``clock + 1`` on the request takes part, with ``base_computed`` tokens computed.

        ``base_output`` output tokens will have come back when step ``clock`` has.
        """
        request.join_clock = clock
        request.base_computed = base_computed
        request.base_output = base_output
        request.finish_clock = clock + request.max_output_tokens - base_output
        assert request.finish_clock > clock
        self.members[request.request_id] = request
        self.num_stoppable += request.is_stoppable
        if self._request_ids is not None:
            self._request_ids += (request.request_id,)
        self._context_offset += base_computed - clock
        self._growing_with(request).append(request)
        self._by_finish.insert(self._place(request), request)

    def leave(self, request: LocalRequest) -> None:
        """Take a member out, whatever it still has to do."""
        del self.members[request.request_id]
        place = self._place(request)
        assert self._by_finish[place] is request
        del self._by_finish[place]
        self.num_stoppable -= request.is_stoppable
        self._request_ids = None
        self._context_offset -= request.base_computed - request.join_clock
        growing = self._growing_with(request)
        index = 0
        while growing[index] is not request:
            index += 1
        del growing[index]

    def num_context_tokens(self, clock: int) -> int:
        """Tokens computed for all members together once step ``clock`` has run."""
        return self._context_offset + len(self.members) * clock

    def growing(self, clock: int) -> list[LocalRequest]:
        """Members that need one more block for step ``clock``."""
        return self.by_growth[clock % self.block_size]

    def _growing_with(self, request: LocalRequest) -> list[LocalRequest]:
        """Those that need one in the same steps as this member."""
        return self.growing(1 + request.join_clock - request.base_computed)

    def num_returned_output(self, request: LocalRequest, done_clock: int) -> int:
        """Output tokens of a member, or former member, that have come back once step ``done_clock`` has."""
        if done_clock < request.join_clock:
            return request.num_output_tokens
        return request.base_output + min(done_clock, request.finish_clock) - request.join_clock

    def next_finish_clock(self) -> int | None:
        """The first step that is some member's last; None without members."""
        return self._by_finish[-1].finish_clock if self._by_finish else None

    def _place(self, request: LocalRequest) -> int:
        """Where a member is, or is to be, among all by their finish."""
        by_finish, finish_clock, sequence = self._by_finish, request.finish_clock, request.sequence
        low, high = 0, len(by_finish)
        while low < high:
            middle = (low + high) >> 1
            other = by_finish[middle]
            if other.finish_clock > finish_clock or (other.finish_clock == finish_clock and other.sequence > sequence):
                low = middle + 1
            else:
                high = middle
        return low

    def goes_on_after(self, clock: int) -> bool:
        """True where some member's last step comes after that one."""
        return bool(self._by_finish) and self._by_finish[0].finish_clock > clock

    def pop_fully_planned(self, clock: int) -> LocalRequest | None:
        """Remove and give the next member whose last step is ``clock`` or earlier; None where there is none left."""
        if not self._by_finish or self._by_finish[-1].finish_clock > clock:
            return None
        request = self._by_finish[-1]
        self.leave(request)
        return request

    def repeat_max(self, clock: int, num_blocks_available: int, repeat_max: int) -> int:
        """How many steps, from ``clock`` on, can be repeated without asking for a block in vain.

        Blocks for step ``clock`` itself are already there.
        """
        num_members = len(self.members)
        if not num_members:
            return repeat_max
        # In block_size steps each member needs exactly one block, so whole rounds can be skipped.
        num_rounds = num_blocks_available // num_members
        num_left = num_blocks_available - num_rounds * num_members
        repeats = num_rounds * self.block_size + 1
        while repeats < repeat_max:
            num_left -= len(self.growing(clock + repeats))
            if num_left < 0:
                return repeats
            repeats += 1
        return repeat_max
