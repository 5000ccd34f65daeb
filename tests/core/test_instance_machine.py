"""Instance: any legal order of events keeps blocks, budgets, ids and tokens, and everybody ends."""

import os
from collections import Counter

import hypothesis.strategies as st
from chosen_events import ChosenEvents, happens
from hypothesis import HealthCheck, settings
from hypothesis.stateful import initialize, run_state_machine_as_test
from instance_shadow import Incoming, InstanceShadow, Outgoing, ShadowRequest

from sagellm.core.config import InstanceConfig
from sagellm.core.identity import BlockId, InstanceId, RequestId
from sagellm.core.messages import (
    AbortRequest,
    AssignRequest,
    DecodeHere,
    HandoverFinished,
    InstanceEvent,
    KVReserved,
    KVTransferFailed,
    KVTransferred,
    ReleaseKV,
    ReserveKV,
    StepFailed,
    StepFinished,
    StepProgressed,
)
from sagellm.core.request import RequestSpec
from sagellm.runtime.instance import Instance

NUM_EXAMPLES = int(os.environ.get("SAGELLM_EXAMPLES", "45"))
ME, PEER = InstanceId("me"), InstanceId("peer")
STOP_TOKEN = 2
SEEN: Counter[str] = Counter()  # what occurred in any example, to be sure that the rules reach it

CONFIGS = st.builds(
    InstanceConfig,
    instance_id=st.just(ME),
    num_blocks=st.sampled_from([6, 9, 14, 40]),
    block_size=st.sampled_from([1, 2, 4]),
    kv_bytes_per_token=st.just(2),
    max_num_seqs=st.sampled_from([1, 2, 3, 6]),
    max_num_batched_tokens=st.sampled_from([6, 7, 30]),
    max_num_chunks=st.sampled_from([0, 0, 1, 2]),
    max_chunk_tokens=st.sampled_from([0, 0, 4]),
    steps_in_flight_max=st.sampled_from([1, 2]),
    prefix_caching=st.sampled_from([True, True, False]),
    watermark_blocks=st.sampled_from([0, 0, 1]),
    repeat_max=st.sampled_from([1, 3, 1 << 30]),
    step_attempts_max=st.sampled_from([1, 2, 4]),
    transfer_timeout_ns=st.sampled_from([20, 1_000_000]),
    transfer_attempts_max=st.sampled_from([1, 2]),
)


class InstanceMachine(ChosenEvents):
    """The world around one instance: control plane, peers, device and network, all of them erratic."""

    @initialize(config=CONFIGS, real_tokens=st.booleans())
    def start(self, config: InstanceConfig, real_tokens: bool) -> None:
        self.config = config
        self.real_tokens = real_tokens
        self.machine = Instance(config)
        self.shadow = InstanceShadow(config)
        self.now_ns = 0
        self.num_requests = 0
        self.num_polls_skipped = 0
        self.next_target_block = 1000
        self.is_sound = True

    # --- helpers -----------------------------------------------------------------------------------

    def give(self, event: InstanceEvent) -> None:
        self.is_sound = False  # until this is through: a machine that failed is not driven on
        self.machine.handle(event, self.now_ns)
        if self.num_polls_skipped:
            self.num_polls_skipped -= 1
            self.is_sound = True
        else:
            self.poll()

    def poll(self) -> None:
        self.is_sound = False
        effects = self.machine.poll(self.now_ns)
        self.shadow.observe(effects)
        self.machine.check()
        self.is_sound = True

    def here(self, *, hand_over: bool | None = None) -> list[ShadowRequest]:
        return [
            request
            for request in self.shadow.requests.values()
            if request.is_here
            and request.spec.request_id not in self.shadow.incoming
            and (hand_over is None or request.hand_over is hand_over)
        ]

    def pick(self, items: list, data: st.DataObject):  # type: ignore[no-untyped-def,type-arg]
        return items[data.draw(st.integers(0, len(items) - 1))]

    def spec(self, data: st.DataObject) -> RequestSpec:
        self.num_requests += 1
        slots = self.config.num_token_slots
        num_prompt = data.draw(st.integers(1, max(1, min(20, slots - 1))))
        num_output = data.draw(st.integers(1, min(30, slots - num_prompt)) if slots > num_prompt else st.just(1))
        # Few different tokens, so that prefixes are shared.
        pattern = data.draw(st.sampled_from([(0,), (0, 1), (0, 0, 1)]))
        tokens = tuple(pattern[i % len(pattern)] for i in range(num_prompt))
        has_tokens = self.real_tokens or data.draw(st.booleans())
        return RequestSpec(
            RequestId(f"r{self.num_requests}"),
            self.now_ns,
            num_prompt,
            num_output,
            prompt_token_ids=tokens if has_tokens else None,
            stop_token_ids=(STOP_TOKEN,) if self.real_tokens and data.draw(st.booleans()) else (),
        )

    def output_before(self, spec: RequestSpec, data: st.DataObject, at_most: int) -> int:
        """Tokens that a lost instance had sent already, mostly none."""
        return data.draw(st.sampled_from([0, 0, min(at_most, 1), min(at_most, 5)]))

    def output_ids(self, num_output: int) -> tuple[int, ...] | None:
        return tuple([1] * num_output) if self.real_tokens and num_output else None

    def tokens_of(self, spec: RequestSpec, num_output: int) -> list[int] | None:
        if spec.prompt_token_ids is None:
            return None
        return [*spec.prompt_token_ids, *(self.output_ids(num_output) or ())]

    # --- the control plane -------------------------------------------------------------------------

    @happens(5, data=st.data(), hand_over=st.booleans())
    def assign(self, data: st.DataObject, hand_over: bool) -> None:
        spec = self.spec(data)
        num_output = self.output_before(spec, data, spec.max_output_tokens - 1)
        self.shadow.requests[spec.request_id] = ShadowRequest(
            spec, hand_over, self.tokens_of(spec, num_output), num_output
        )
        self.give(AssignRequest(ME, spec, hand_over, num_output, self.output_ids(num_output)))

    @happens(1, when=lambda self: self.shadow.requests, data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """Of any request that ever was here, but for those that only have a reservation."""
        known = [r for r in self.shadow.requests.values() if r.spec.request_id not in self.shadow.incoming]
        if known:
            request = self.pick(known, data)
            request.aborted = True
            self.give(AbortRequest(ME, request.spec.request_id))

    @happens(1, when=lambda self: self.here(hand_over=True), data=st.data())
    def decode_here(self, data: st.DataObject) -> None:
        request = self.pick(self.here(hand_over=True), data)
        request.hand_over = False
        self.give(DecodeHere(ME, request.spec.request_id))

    # --- a peer hands over to this instance -------------------------------------------------------------

    @happens(3, data=st.data())
    def reserve(self, data: st.DataObject) -> None:
        spec = self.spec(data)
        if spec.max_output_tokens < 2:
            return
        num_output = self.output_before(spec, data, spec.max_output_tokens - 2)
        self.reserve_for(spec, num_output, attempt=1)

    def reserve_for(self, spec: RequestSpec, num_output: int, attempt: int) -> None:
        self.shadow.requests[spec.request_id] = ShadowRequest(
            spec, False, self.tokens_of(spec, num_output), num_output, announced=True, attempt=attempt
        )
        self.shadow.incoming[spec.request_id] = Incoming(spec, attempt, num_output)
        self.give(ReserveKV(ME, spec, PEER, attempt, num_output))

    @happens(when=lambda self: self.shadow.incoming, data=st.data(), again=st.booleans())
    def release(self, data: st.DataObject, again: bool) -> None:
        """The peer gives a hand-over up; the control plane may start it anew."""
        incoming = self.pick(list(self.shadow.incoming.values()), data)
        request_id = incoming.spec.request_id
        del self.shadow.incoming[request_id]
        self.shadow.requests[request_id].moved = True
        self.shadow.unchecked = [a for a in self.shadow.unchecked if a.request_id != request_id]
        self.give(ReleaseKV(ME, request_id, incoming.attempt))
        if again:
            self.reserve_for(incoming.spec, incoming.num_output_tokens, incoming.attempt + 1)

    @happens(1, when=lambda self: self.shadow.requests, data=st.data())
    def release_of_an_older_attempt(self, data: st.DataObject) -> None:
        request = self.pick(list(self.shadow.requests.values()), data)
        self.give(ReleaseKV(ME, request.spec.request_id, request.attempt - 1))

    @happens(4, when=lambda self: any(i.answer for i in self.shadow.incoming.values()), data=st.data())
    def handed_over(self, data: st.DataObject) -> None:
        incoming = self.pick([i for i in self.shadow.incoming.values() if i.answer], data)
        self.finish_incoming(incoming)

    def finish_incoming(self, incoming: Incoming) -> None:
        spec, num_output = incoming.spec, incoming.num_output_tokens + 1
        request = self.shadow.requests[spec.request_id]
        del self.shadow.incoming[spec.request_id]
        num_computed = spec.num_prompt_tokens + num_output - 1
        request.num_emitted, request.tokens = num_output, self.tokens_of(spec, num_output)
        request.num_planned = request.num_returned = num_computed
        assert incoming.answer is not None
        self.shadow.kv_arrived(incoming.answer, request, num_computed)
        event = HandoverFinished(
            ME, spec.request_id, incoming.attempt, num_computed, num_output, self.output_ids(num_output)
        )
        self.give(event)
        SEEN["handed over to it"] += 1

    # --- this instance hands over to a peer --------------------------------------------------------------

    @happens(3, when=lambda self: self.here(hand_over=True), data=st.data(), skips=st.integers(1, 2))
    def peer_reserved(self, data: st.DataObject, skips: int) -> None:
        """First or anew: after a failure, or because the former target was lost."""
        request = self.pick(self.here(hand_over=True), data)
        if request.num_emitted >= request.spec.max_output_tokens:
            return
        request.attempt += skips
        self.peer_answers(request, request.attempt, data.draw(st.integers(0, 3)))

    def peer_answers(self, request: ShadowRequest, attempt: int, first: int) -> None:
        size, spec = self.config.block_size, request.spec
        first = min(first, (spec.num_prompt_tokens - 1) // size)
        num_output = request.num_emitted - request.announced
        num_blocks = -(-(spec.num_prompt_tokens + num_output) // size) - first
        block_ids = tuple(BlockId(self.next_target_block + i) for i in range(num_blocks))
        self.next_target_block += num_blocks
        target = InstanceId(f"{PEER}{attempt}")
        answer = KVReserved(ME, spec.request_id, target, attempt, first, block_ids)
        self.shadow.outgoing[spec.request_id, attempt] = Outgoing(answer)
        self.give(answer)

    @happens(3, data=st.data())
    def assign_with_a_peer_at_hand(self, data: st.DataObject) -> None:
        """As with hand-overs that are streamed: the decode instance is chosen on arrival."""
        spec = self.spec(data)
        self.shadow.requests[spec.request_id] = ShadowRequest(spec, True, self.tokens_of(spec, 0), 0, attempt=1)
        self.give(AssignRequest(ME, spec, True, 0, None))
        if spec.max_output_tokens > 1 and self.shadow.requests[spec.request_id].is_here:
            self.peer_answers(self.shadow.requests[spec.request_id], 1, data.draw(st.integers(0, 3)))

    @happens(1, when=lambda self: self.shadow.requests, data=st.data())
    def stale_peer_reserved(self, data: st.DataObject) -> None:
        """An answer to an attempt that a newer one has replaced, or for a request that is gone."""
        request = self.pick(list(self.shadow.requests.values()), data)
        if request.spec.request_id in self.shadow.incoming:
            return
        attempt = request.attempt - 1 if request.is_here else request.attempt + 1
        key = (request.spec.request_id, attempt)
        if attempt < 1 or key in self.shadow.outgoing:
            return
        request.attempt = max(request.attempt, attempt)
        self.num_polls_skipped = 0
        newer = self.shadow.outgoing.get((request.spec.request_id, request.attempt))
        is_replaced = newer is not None and not newer.closed
        self.peer_answers(request, attempt, 0)
        if is_replaced and newer is not None and not newer.closed and not self.shadow.steps:
            assert self.shadow.outgoing[key].closed, "a stale reservation is kept"

    @happens(4, when=lambda self: self.shadow.transfers, data=st.data(), well=st.booleans())
    def transfer_closed(self, data: st.DataObject, well: bool) -> None:
        self.close_transfer(data.draw(st.integers(0, len(self.shadow.transfers) - 1)), well=well)

    def close_transfer(self, index: int, *, well: bool) -> None:
        transfer_id = list(self.shadow.transfers)[index]
        del self.shadow.transfers[transfer_id]
        SEEN["transfers"] += 1
        self.give(KVTransferred(transfer_id) if well else KVTransferFailed(transfer_id, "broken"))

    @happens(1, when=lambda self: self.shadow.used_transfers, data=st.data(), well=st.booleans())
    def transfer_closed_again(self, data: st.DataObject, well: bool) -> None:
        """F9: a duplicate changes nothing."""
        closed = sorted(self.shadow.used_transfers - self.shadow.transfers.keys())
        if closed:
            transfer_id = self.pick(closed, data)
            self.give(KVTransferred(transfer_id) if well else KVTransferFailed(transfer_id, "broken"))

    # --- the device --------------------------------------------------------------------------------------

    def returns(self, num_ends: int, data: st.DataObject | None) -> tuple[tuple[int, ...], object]:
        """Times, and tokens where they are real, of so many repetitions of the first step."""
        step = self.shadow.steps[0].step
        self.now_ns += num_ends
        ends_ns = tuple(range(self.now_ns - num_ends + 1, self.now_ns + 1))
        sampled = step.plan.sampled_request_ids
        tokens: dict[RequestId, tuple[int, ...]] = {}
        for request_id in sampled:
            may_stop = data is not None and self.real_tokens
            drawn = data.draw(st.integers(0, 8)) if may_stop and data is not None else num_ends
            ids = [1] * num_ends
            if drawn < num_ends:
                ids[drawn] = STOP_TOKEN
            tokens[request_id] = tuple(ids)
        self.shadow.given.setdefault(step.step_id, []).append((ends_ns, tokens))
        return ends_ns, tuple(tokens[r] for r in sampled) if self.real_tokens else None

    @happens(10, when=lambda self: self.shadow.steps, data=st.data())
    def step_finished(self, data: st.DataObject) -> None:
        record = self.shadow.steps[0]
        num_max = 1 if record.progressed else min(record.step.repeat_max, 40)
        num_ends = data.draw(st.integers(1, num_max))
        if len(self.shadow.steps) > 1 and not record.progressed:
            num_ends = 1  # a step behind it was planned, so it was not repeated
        self.finish_step(num_ends, data)

    def finish_step(self, num_ends: int, data: st.DataObject | None) -> None:
        ends_ns, token_ids = self.returns(num_ends, data)
        step_id = self.shadow.steps[0].step.step_id
        self.shadow.step_returned(num_ends, closes=True)
        SEEN["repeated"] += num_ends > 1
        self.give(StepFinished(ME, step_id, ends_ns, token_ids))  # type: ignore[arg-type]

    @happens(3, when=lambda self: self.shadow.steps, data=st.data(), num_steps=st.integers(2, 12))
    def steps_go_well(self, data: st.DataObject, num_steps: int) -> None:
        """A while without faults, in which repeated steps are repeated as often as they may be."""
        for _ in range(num_steps):
            if not self.shadow.steps:
                return
            record = self.shadow.steps[0]
            is_alone = len(self.shadow.steps) == 1 and not record.progressed
            num_max = min(record.step.repeat_max, 40) if is_alone else 1
            self.finish_step(num_max, data if self.real_tokens and num_max > 1 else None)

    @happens(8, when=lambda self: len(self.shadow.steps) == 1 and self.can_progress(), data=st.data())
    def step_progressed(self, data: st.DataObject) -> None:
        record = self.shadow.steps[0]
        num_ends = data.draw(st.integers(0, min(record.step.repeat_max, 40) - 1))
        ends_ns, token_ids = self.returns(num_ends, data)
        self.shadow.step_returned(num_ends, closes=False)
        SEEN["progressed"] += 1
        self.give(StepProgressed(ME, record.step.step_id, ends_ns, token_ids))  # type: ignore[arg-type]

    def can_progress(self) -> bool:
        record = self.shadow.steps[0]
        return not record.progressed and record.step.repeat_max > 1

    @happens(1, when=lambda self: self.shadow.steps)
    def step_failed(self) -> None:
        self.now_ns += 1
        step_id = self.shadow.steps[0].step.step_id
        self.shadow.step_failed()
        SEEN["failed"] += 1
        self.give(StepFailed(ME, step_id, "out of memory"))

    # --- time --------------------------------------------------------------------------------------------

    @happens(1)
    def deadline_passes(self) -> None:
        deadline_ns = self.machine.deadline_ns()
        if deadline_ns is not None:
            self.now_ns = max(self.now_ns, deadline_ns)
            SEEN["deadline"] += 1
            self.poll()

    @happens(1, num_events=st.integers(1, 3))
    def several_events_in_one_instant(self, num_events: int) -> None:
        self.num_polls_skipped = num_events

    # --- in the end ----------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Faults stop, and everything outstanding is closed: then everybody ends, and no block is held."""
        if not getattr(self, "is_sound", False):
            return
        self.num_polls_skipped = 0
        self.poll()
        for _ in range(5000):
            if not self.goes_on():
                break
        SEEN.update(self.shadow.events)
        assert not [r for r in self.shadow.requests.values() if r.is_here], "I12: somebody never ends"
        assert self.machine.num_unfinished == 0
        self.machine.check()
        assert self.machine.deadline_ns() is None
        assert all(outgoing.closed for outgoing in self.shadow.outgoing.values()), "I8: a peer's room is not given back"

    def goes_on(self) -> bool:
        shadow = self.shadow
        if shadow.transfers:
            self.close_transfer(0, well=True)
            return True
        for incoming in list(shadow.incoming.values()):
            if incoming.answer is not None:
                self.finish_incoming(incoming)
                return True
        if shadow.steps:
            self.finish_step(1, None)
            return True
        for request in self.here(hand_over=True):
            open_ones = [o for key, o in shadow.outgoing.items() if key[0] == request.spec.request_id and not o.closed]
            if request.announced and not open_ones:
                request.hand_over = False
                self.give(DecodeHere(ME, request.spec.request_id))
                return True
        return False


def test_any_legal_order_of_events() -> None:
    SEEN.clear()
    run_state_machine_as_test(
        InstanceMachine,
        settings=settings(
            max_examples=NUM_EXAMPLES,
            stateful_step_count=100,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    expected = (
        "preempted",
        "hit",
        "repeated",
        "progressed",
        "failed",
        "deadline",
        "transfers",
        "handed over to it",
        "RequestMoved",
        "HandoverFailed",
        "CancelTransfer",
        "ended: stop",
        "ended: length",
        "ended: abort",
        "ended: error",
    )
    assert not [what for what in expected if not SEEN[what]], "the rules no longer reach all that they should"
