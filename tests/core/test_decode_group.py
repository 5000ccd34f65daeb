"""The group against a model that visits every member."""

from hypothesis import given
from hypothesis import strategies as st

from sagellm.core.identity import RequestId
from sagellm.core.request import RequestSpec
from sagellm.runtime.decode_group import DecodeGroup
from sagellm.runtime.local_request import LocalRequest

BLOCK_SIZE = 4


def request(sequence: int, num_prompt_tokens: int, max_output_tokens: int) -> LocalRequest:
    spec = RequestSpec(RequestId(str(sequence)), 0, num_prompt_tokens, max_output_tokens)
    made = LocalRequest(spec, hand_over=False, num_output_tokens=0)
    made.sequence = sequence
    return made


class Model:
    """What the group must say, worked out from all members each time."""

    def __init__(self) -> None:
        self.members: list[LocalRequest] = []  # in the order in which they joined

    def finishing_by(self, clock: int) -> list[LocalRequest]:
        finishing = [member for member in self.members if member.finish_clock <= clock]
        return sorted(finishing, key=lambda member: (member.finish_clock, member.sequence))

    def growing(self, clock: int) -> list[LocalRequest]:
        """Those whose computed tokens fill their blocks before the step."""
        computed = {m: m.base_computed + clock - 1 - m.join_clock for m in self.members}
        return [member for member in self.members if computed[member] % BLOCK_SIZE == 0]

    def agrees_with(self, group: DecodeGroup, clock: int) -> None:
        members = self.members
        finish_clocks = [member.finish_clock for member in members]
        assert group.request_ids == tuple(member.request_id for member in members)
        assert group.next_finish_clock() == min(finish_clocks, default=None)
        assert group.num_context_tokens(clock) == sum(m.base_computed + clock - m.join_clock for m in members)
        for later in range(clock + 1, clock + 1 + BLOCK_SIZE):
            assert group.growing(later) == self.growing(later)
            assert group.goes_on_after(later) == any(finish_clock > later for finish_clock in finish_clocks)


Joining = st.tuples(st.integers(1, 9), st.integers(2, 6))


@given(st.lists(st.tuples(st.lists(Joining, max_size=3), st.none() | st.integers(0, 5)), max_size=12))
def test_members_join_leave_and_finish_in_order(
    steps: list[tuple[list[tuple[int, int]], int | None]],
) -> None:
    """In each step some join, perhaps one leaves early, and those whose last step it is are taken out."""
    group, model = DecodeGroup(BLOCK_SIZE), Model()
    sequence = 0
    for clock, (joining, leaving) in enumerate(steps):
        for num_prompt_tokens, max_output_tokens in joining:
            sequence += 1
            member = request(sequence, num_prompt_tokens, max_output_tokens)
            group.join(member, clock, base_computed=num_prompt_tokens, base_output=1)
            model.members.append(member)
        if leaving is not None and leaving < len(model.members):
            group.leave(model.members.pop(leaving))
        model.agrees_with(group, clock)
        for member in model.finishing_by(clock + 1):
            assert group.pop_fully_planned(clock + 1) is member
            model.members.remove(member)
        assert group.pop_fully_planned(clock + 1) is None
        model.agrees_with(group, clock + 1)
