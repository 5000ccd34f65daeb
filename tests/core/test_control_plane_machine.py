"""ControlPlane: any legal order of events leaves each request one owner, one end, and its tokens once."""

import os
from collections import Counter
from random import Random

import hypothesis.strategies as st
from chosen_events import ChosenEvents, happens
from cluster_shadow import Client, FakeCluster, FakeInstance
from hypothesis import HealthCheck, settings
from hypothesis.stateful import initialize, invariant, run_state_machine_as_test

from sagellm.control_plane.control_plane import ControlPlane
from sagellm.core.config import ControlPlaneConfig, HandoverStart, Role
from sagellm.core.identity import CONTROL_PLANE, InstanceId, RequestId
from sagellm.core.messages import InstanceJoined, RequestArrived, RequestCancelled
from sagellm.core.request import FinishReason, LatencySLO, RequestSpec

NUM_EXAMPLES = int(os.environ.get("SAGELLM_EXAMPLES", "60"))
STOP_TOKEN = 2
SEEN: Counter[str] = Counter()

CONFIGS = st.builds(
    ControlPlaneConfig,
    strategy=st.sampled_from(["fifo", "priority", "slo_aware", "adaptive"]),
    routing=st.sampled_from(["round_robin", "least_loaded", "power_of_two", "prefix_affinity"]),
    queue_max=st.sampled_from([100, 100, 3]),
    dispatch_tokens_max=st.sampled_from([1000, 50, 1]),
    handover_start=st.sampled_from(HandoverStart),
    disaggregate_min_tokens=st.sampled_from([0, 0, 0, 20]),
    attempts_max=st.sampled_from([3, 3, 2, 1]),
    max_model_len=st.sampled_from([0, 0, 0, 90]),
)
SHAPES = st.sampled_from(
    [
        [Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE],
        [Role.PREFILL, Role.DECODE, Role.DECODE],
        [Role.PREFILL, Role.DECODE],
        [Role.PREFILL, Role.DECODE, Role.MIXED],
        [Role.MIXED, Role.MIXED],
    ]
)


class ControlPlaneMachine(ChosenEvents):
    """Clients come, cancel and are served by instances that die and join."""

    @initialize(config=CONFIGS, roles=SHAPES, seed=st.integers(0, 99), is_real=st.booleans())
    def start(self, config: ControlPlaneConfig, roles: list[Role], seed: int, is_real: bool) -> None:
        self.config = config
        self.machine = ControlPlane(config, Random(seed))
        self.cluster = FakeCluster()
        self.cluster.is_real = is_real
        self.now_ns = 0
        self.num_instances = 0
        self.is_sound = True
        for role in roles:
            self.join(role, 100)

    # --- helpers -----------------------------------------------------------------------------------

    def poll(self) -> None:
        self.is_sound = False
        effects = self.machine.poll(self.now_ns)
        SEEN.update(type(effect).__name__ for effect in effects)
        self.cluster.perform(effects)
        self.machine.check()
        self.is_sound = True

    def serving(self, *stages: str, handover: bool = False) -> list[tuple[FakeInstance, RequestId]]:
        return [
            (instance, request_id)
            for instance in self.cluster.instances.values()
            for request_id, served in instance.served.items()
            if served.stage in stages and (served.handover is not None or not handover)
        ]

    def deliver_one(self) -> None:
        """The oldest message arrives."""
        self.is_sound = False
        receiver, message = self.cluster.network.popleft()
        if receiver == CONTROL_PLANE:
            if isinstance(message, str):
                message = self.cluster.loss(InstanceId(message))
            self.machine.handle(message, self.now_ns)  # type: ignore[arg-type]
        elif receiver in self.cluster.instances:
            self.cluster.receive(self.cluster.instances[receiver], message)
        self.is_sound = True

    # --- the world -----------------------------------------------------------------------------------

    @happens(2, role=st.sampled_from(Role), num_slots=st.sampled_from([100, 40]))
    def another_joins(self, role: Role, num_slots: int) -> None:
        if len(self.cluster.instances) < 4:
            self.join(role, num_slots)

    def join(self, role: Role, num_slots: int) -> None:
        self.num_instances += 1
        instance_id = InstanceId(f"i{self.num_instances}")
        self.cluster.instances[instance_id] = FakeInstance(instance_id, role, num_slots)
        self.machine.handle(InstanceJoined(instance_id, role, num_slots, 4, 64), self.now_ns)
        self.poll()

    @happens(
        6,
        num_prompt=st.sampled_from([10, 30, 1, 30, 10, 80, 20, 200]),
        num_output=st.sampled_from([3, 2, 10, 1]),
        priority=st.integers(0, 2),
        ttft_ns=st.sampled_from([None, 5, 500]),
        again=st.booleans(),
        gap_ns=st.integers(0, 5),
    )
    def arrive(
        self, num_prompt: int, num_output: int, priority: int, ttft_ns: int | None, again: bool, gap_ns: int
    ) -> None:
        self.now_ns += gap_ns
        request_id = RequestId(f"r{len(self.cluster.clients)}")
        spec = RequestSpec(
            request_id,
            self.now_ns,
            num_prompt,
            num_output,
            priority,
            LatencySLO(ttft_ns),
            stop_token_ids=(STOP_TOKEN,) if self.cluster.is_real else (),
        )
        self.cluster.clients[request_id] = Client(spec)
        num_before = self.machine.num_queued
        self.machine.handle(RequestArrived(spec), self.now_ns)
        self.poll()
        if again and not self.cluster.clients[request_id].ends:
            self.machine.handle(RequestArrived(spec), self.now_ns)  # a duplicate is no second request
            self.poll()
        assert self.machine.num_queued <= max(self.config.queue_max, num_before), "F31: the queue is bounded"
        if num_prompt == 200:
            assert self.cluster.clients[request_id].ends, "F24: what never fits is rejected at once"

    @happens(when=lambda self: self.cluster.clients, data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Of any request, known or over."""
        request_id = data.draw(st.sampled_from(sorted(self.cluster.clients)))
        self.cluster.clients[request_id].cancelled = True
        self.machine.handle(RequestCancelled(request_id), self.now_ns)
        self.poll()

    @happens(8, num_messages=st.integers(1, 6), in_one_instant=st.booleans())
    def deliver(self, num_messages: int, in_one_instant: bool) -> None:
        for _ in range(min(num_messages, len(self.cluster.network))):
            self.deliver_one()
            if not in_one_instant:
                self.poll()
        self.poll()

    @happens(1, num_events=st.integers(1, 12))
    def all_goes_well(self, num_events: int) -> None:
        for _ in range(num_events):
            self.goes_on()

    @happens(5, when=lambda self: self.serving("prefill", "decode"), data=st.data(), num_tokens=st.integers(1, 4))
    def tokens(self, data: st.DataObject, num_tokens: int) -> None:
        instance, request_id = data.draw(st.sampled_from(self.serving("prefill", "decode")))
        for _ in range(num_tokens):
            if request_id in instance.served and instance.served[request_id].stage != "prefilled":
                is_last = self.cluster.is_real and data.draw(st.integers(0, 5)) == 0
                self.cluster.next_token(instance, request_id, STOP_TOKEN if is_last else 1)

    @happens(1, when=lambda self: self.serving("prefill", "decode", "prefilled"), data=st.data())
    def ends_with_an_error(self, data: st.DataObject) -> None:
        instance, request_id = data.draw(st.sampled_from(self.serving("prefill", "decode", "prefilled")))
        self.cluster.finish(instance, request_id, FinishReason.ERROR)

    @happens(4, when=lambda self: any(i.asked for i in self.cluster.instances.values()), data=st.data())
    def room_is_there(self, data: st.DataObject) -> None:
        instances = [i for i in self.cluster.instances.values() if i.asked]
        instance = data.draw(st.sampled_from(instances))
        self.cluster.answer(instance, data.draw(st.sampled_from(sorted(instance.asked))))

    @happens(4, when=lambda self: self.serving("prefilled", handover=True), data=st.data())
    def hand_over(self, data: st.DataObject) -> None:
        self.cluster.hand_over(*data.draw(st.sampled_from(self.serving("prefilled", handover=True))))
        SEEN["hand_over"] += 1

    @happens(when=lambda self: self.serving("prefill", "prefilled", handover=True), data=st.data())
    def hand_over_fails(self, data: st.DataObject) -> None:
        self.cluster.fail_handover(*data.draw(st.sampled_from(self.serving("prefill", "prefilled", handover=True))))
        SEEN["hand_over_fails"] += 1

    @happens(1, when=lambda self: self.may_lose_one(), data=st.data(), num_last_tokens=st.integers(0, 3))
    def die(self, data: st.DataObject, num_last_tokens: int) -> None:
        """An instance dies; of its last tokens its clients know, but nobody was told what they mean."""
        instance = data.draw(st.sampled_from(list(self.cluster.instances.values())))
        for request_id, served in instance.served.items():
            client = self.cluster.clients[request_id]
            for _ in range(num_last_tokens if served.stage == "decode" else 0):
                if not client.is_served_out:
                    self.cluster.emit(request_id, 1)
        self.cluster.die(instance.instance_id)
        SEEN["die"] += 1

    def may_lose_one(self) -> bool:
        """The last one too, but late: afterwards there is nothing to be seen."""
        return len(self.cluster.instances) > (1 if len(self.cluster.clients) < 15 else 0)

    @invariant()
    def nobody_ends_twice(self) -> None:
        if hasattr(self, "cluster"):
            assert all(len(client.ends) <= 1 for client in self.cluster.clients.values())

    # --- in the end ----------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Faults stop: every client gets an end, and nothing is left anywhere."""
        if not getattr(self, "is_sound", False):
            return
        for _ in range(3000):
            if not self.goes_on():
                break
        self.poll()
        endless = [request_id for request_id, client in self.cluster.clients.items() if not client.ends]
        assert not endless, f"I12: {endless} never end"
        assert self.machine.num_unfinished == 0
        assert self.machine.num_queued == 0
        for view in self.machine._fleet.views.values():
            counts = (view.num_requests, view.num_prefill_tokens, view.num_kv_tokens)
            assert counts == (0, 0, 0), f"I8: {view.instance_id} still counts {counts}"
        for instance in self.cluster.instances.values():
            assert not instance.asked, "I8: room is asked for, and nobody will use it"
            assert not instance.reserved, "I8: room is kept, and nobody will use it"

    def goes_on(self) -> bool:
        cluster = self.cluster
        if cluster.network:
            self.deliver_one()
            self.poll()
            return True
        for instance in cluster.instances.values():
            if instance.asked:
                cluster.answer(instance, next(iter(instance.asked)))
                return True
        for instance, request_id in self.serving("prefilled", handover=True):
            cluster.hand_over(instance, request_id)
            SEEN["hand_over"] += 1
            return True
        for instance, request_id in self.serving("prefill", "decode"):
            cluster.next_token(instance, request_id, 1)
            return True
        return False


def test_any_legal_order_of_events() -> None:
    SEEN.clear()
    run_state_machine_as_test(
        ControlPlaneMachine,
        settings=settings(
            max_examples=NUM_EXAMPLES,
            stateful_step_count=100,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    expected = (
        "die",
        "hand_over",
        "hand_over_fails",
        "AssignRequest",
        "ReserveKV",
        "AbortRequest",
        "ReleaseKV",
        "DecodeHere",
        "SourceLost",
        "RejectRequest",
        "RequestFinished",
    )
    assert not [what for what in expected if not SEEN[what]], "the rules no longer reach all that they should"
