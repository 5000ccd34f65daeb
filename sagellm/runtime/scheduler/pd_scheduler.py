"""A scheduler that is called rather than run: requests in, batches out, tokens back.

It decides nothing. It is a small driver of the machines that decide: one `ControlPlane`, and one
`Instance` for each device. It carries their messages, shows the steps that they plan as batches and
the KV transfers that they ask for as migrations, and tells them when these are over. So what it
schedules is what the same machines schedule in simulation and behind the server.
"""

from collections.abc import Sequence

from sagellm.core.identity import CONTROL_PLANE, InstanceId
from sagellm.core.messages import (
    CancelTransfer,
    DecodeHere,
    Effect,
    EmitTokens,
    Event,
    HandoverFinished,
    KVReserved,
    KVTransferFailed,
    KVTransferred,
    PrefillFinished,
    RejectRequest,
    RequestArrived,
    RequestCancelled,
    RequestFinished,
    RunStep,
    StepFailed,
    StepFinished,
    TransferKV,
)
from sagellm.core.metrics import MetricsFold
from sagellm.core.randomness import Rng
from sagellm.core.request import FinishReason
from sagellm.core.run_metrics import RunMetrics
from sagellm.runtime.scheduler.base import (
    Batch,
    BatchPhase,
    KVMigrationTask,
    Request,
    RequestProgress,
    RequestStatus,
    SchedulerStatistics,
)
from sagellm.runtime.scheduler.message_loop import MessageLoop
from sagellm.runtime.scheduler.migrations import Migrations
from sagellm.runtime.scheduler.open_steps import OpenStep, OpenSteps
from sagellm.runtime.scheduler.pd_config import (
    PDMode,
    PDSchedulerConfig,
    control_plane_config,
    instance_config,
)
from sagellm.runtime.scheduler.request_records import RequestRecords

__all__ = ["PDMode", "PDScheduler", "PDSchedulerConfig"]


class PDScheduler:
    """Prefill and decode over several devices, batch by batch. See `PDMode` for how they share them.

    A caller draws batches, runs them, and completes them with the tokens that came out, in any order
    over the devices; in ``strict`` mode it carries out the KV migrations as well. A device's next step
    is planned when its last one is completed, with what was known then.

    Its clock is logical: each call that does something takes place a nanosecond after the one before,
    or at ``now_ns`` where that is given, which must not lie before the call before. A wrong argument
    raises ValueError, or KeyError for a request that was never added, and changes nothing.
    """

    def __init__(self, config: PDSchedulerConfig, rng: Rng | None = None) -> None:
        """``rng`` is the source of chance of the routing policy ``power_of_two``, which needs one.

        Raises ValueError for a strategy or routing policy that does not exist.
        """
        if rng is None and config.routing == "power_of_two":
            raise ValueError("rng: None, must be a seeded random.Random where routing is 'power_of_two'")
        self.config = config
        machines = [instance_config(config, device_id, role) for device_id, role in config.device_roles.items()]
        self._instance_ids = {
            device_id: machine.instance_id for device_id, machine in zip(config.device_roles, machines, strict=True)
        }
        device_ids = {instance_id: device_id for device_id, instance_id in self._instance_ids.items()}
        roles = {machine.instance_id: machine.role for machine in machines}
        self._fold = MetricsFold()
        self._records = RequestRecords(device_ids, roles)
        self._steps = OpenSteps(config.mode, device_ids, roles, config.block_size)
        self._migrations = Migrations(device_ids)
        self._now_ns = 0
        self._num_batches = dict.fromkeys(BatchPhase, 0)
        self._num_chunk_tokens = 0
        self._num_decode_tokens = 0
        self._loop = MessageLoop(control_plane_config(config), machines, rng or _NoChance(), self._observe)
        self._loop.settle(0)

    # --- requests --------------------------------------------------------------------------------------

    def add_request(self, request: Request, now_ns: int | None = None) -> None:
        """Queue a request. Requests that are added before the next batch is drawn are ordered together.

        One that can never be served gets the status ``rejected`` then.
        """
        if request.request_id in self._records:
            raise ValueError(f"request_id: {request.request_id!r}, was added before; must be new")
        self._advance(now_ns)
        self._records.add(request, self._now_ns)
        self._tell(CONTROL_PLANE, RequestArrived(request.spec(self._now_ns)))

    def abort_request(self, request_id: str, now_ns: int | None = None) -> bool:
        """Stop a request; False where it was over already.

        It is over at once, or, where its device has a step planned or under way, when that is completed;
        where that step gives its last token, it ends as if it had not been aborted.
        """
        record = self._records[request_id]
        self._advance(now_ns)
        if record.is_over:
            return False
        record.cancelled = True
        self._tell(CONTROL_PLANE, RequestCancelled(record.request.spec(record.arrival_ns).request_id))
        self._loop.settle(self._now_ns)
        return True

    def get_request(self, request_id: str) -> RequestProgress:
        """What has become of a request so far; also after its end."""
        return self._records[request_id].progress()

    @property
    def has_unfinished_requests(self) -> bool:
        return self._records.num_unfinished > 0

    # --- batches ---------------------------------------------------------------------------------------

    def get_prefill_batch(self, device_id: int | None = None, now_ns: int | None = None) -> Batch | None:
        """A batch to run now, of one device or of any; None where none is ready.

        ``strict``: of a prefill device. ``time_share``: of chunks of prompts only. ``hybrid``: with chunks of
        prompts, and beside them the decodes of its device.
        """
        return self._draw(BatchPhase.PREFILL, device_id, now_ns)

    def get_decode_batch(self, device_id: int | None = None, now_ns: int | None = None) -> Batch | None:
        """A batch to run now, of one device or of any; None where none is ready.

        ``strict``: of a decode device, where preempted requests are computed again too. ``time_share`` and
        ``hybrid``: of decodes only.
        """
        return self._draw(BatchPhase.DECODE, device_id, now_ns)

    def complete_prefill(self, batch: Batch, token_ids: Sequence[int], now_ns: int | None = None) -> None:
        """A batch of `get_prefill_batch` was run: one token for each of its ``sampled_request_ids``."""
        self._complete(batch, BatchPhase.PREFILL, token_ids, now_ns)

    def complete_decode(self, batch: Batch, token_ids: Sequence[int], now_ns: int | None = None) -> None:
        """A batch of `get_decode_batch` was run: one token for each of its ``sampled_request_ids``.

        In ``time_share`` mode the two batches of one turn end together, when the second is completed.
        """
        self._complete(batch, BatchPhase.DECODE, token_ids, now_ns)

    def fail_batch(self, batch: Batch, reason: str, now_ns: int | None = None) -> None:
        """A batch gave nothing. What its device was computing is computed again; a request that is in
        three failed steps ends with an error.
        """
        step = self._steps.drawn(batch)
        self._advance(now_ns)
        self._steps.close(step)
        self._records.kv_lost(step.effect.instance_id)
        self._finish_step(StepFailed(step.effect.instance_id, step.effect.step_id, reason))

    # --- KV migrations -----------------------------------------------------------------------------------

    def get_migrations(self, now_ns: int | None = None) -> list[KVMigrationTask]:
        """KV copies to start now; each is given once."""
        self._advance(now_ns)
        self._loop.settle(self._now_ns)
        return self._migrations.draw()

    def complete_migration(self, task: KVMigrationTask, now_ns: int | None = None) -> None:
        """The blocks are on the target device."""
        source_id = self._close_migration(task, now_ns)
        self._tell(source_id, KVTransferred(task.transfer_id))
        self._loop.settle(self._now_ns)

    def fail_migration(self, task: KVMigrationTask, reason: str, now_ns: int | None = None) -> None:
        """The copy is over without success: it is tried again, then with another target, then not at all."""
        source_id = self._close_migration(task, now_ns)
        self._tell(source_id, KVTransferFailed(task.transfer_id, reason))
        self._loop.settle(self._now_ns)

    def is_cancelled(self, task: KVMigrationTask) -> bool:
        """True where a task under way may be stopped, because its request ended; it must be closed all the same."""
        return self._migrations.is_cancelled(task)

    # --- what came of it -----------------------------------------------------------------------------------

    @property
    def now_ns(self) -> int:
        """When the last call took place."""
        return self._now_ns

    @property
    def metrics(self) -> RunMetrics:
        """The same figures, from the same code, as those of a simulated or a live run."""
        return self._fold.metrics

    def statistics(self) -> SchedulerStatistics:
        records = list(self._records)
        reasons = [record.finish_reason for record in records]
        moved = [t for t in self.metrics.transfers if t.end_ns is not None and not t.failed]
        ttfts_ns = [r.first_token_ns - r.arrival_ns for r in records if r.first_token_ns is not None]
        return SchedulerStatistics(
            num_requests=len(records),
            num_unfinished=self._records.num_unfinished,
            num_completed=reasons.count(FinishReason.LENGTH) + reasons.count(FinishReason.STOP),
            num_aborted=reasons.count(FinishReason.ABORT),
            num_failed=reasons.count(FinishReason.ERROR),
            num_rejected=sum(record.status is RequestStatus.REJECTED for record in records),
            num_prefill_batches=self._num_batches[BatchPhase.PREFILL],
            num_decode_batches=self._num_batches[BatchPhase.DECODE],
            num_mixed_batches=self._num_batches[BatchPhase.MIXED],
            num_prefill_tokens=self._num_chunk_tokens,
            num_decode_tokens=self._num_decode_tokens,
            num_preemptions=self.metrics.num_preemptions,
            num_migrations=len(moved),
            num_migrated_bytes=sum(transfer.num_bytes for transfer in moved),
            mean_ttft_ns=sum(ttfts_ns) / len(ttfts_ns) if ttfts_ns else None,
        )

    def check(self) -> None:
        """Assert the machines' invariants: blocks conserved, views that add up, nothing held by nobody."""
        self._loop.check()

    # --- leaves --------------------------------------------------------------------------------------------

    def _advance(self, now_ns: int | None) -> None:
        if now_ns is None:
            self._now_ns += 1
        elif now_ns < self._now_ns:
            raise ValueError(f"now_ns: {now_ns}, must be {self._now_ns} or later, which is when the last call was")
        else:
            self._now_ns = now_ns

    def _tell(self, machine_id: InstanceId, event: Event) -> None:
        self._fold.observe(self._now_ns, event)
        self._loop.tell(machine_id, event)

    def _draw(self, phase: BatchPhase, device_id: int | None, now_ns: int | None) -> Batch | None:
        if device_id is not None and device_id not in self._instance_ids:
            known = ", ".join(map(str, self._instance_ids))
            raise ValueError(f"device_id: {device_id}, must be one of {known}")
        self._advance(now_ns)
        self._loop.settle(self._now_ns)
        return self._steps.draw(phase, device_id)

    def _complete(self, batch: Batch, phase: BatchPhase, token_ids: Sequence[int], now_ns: int | None) -> None:
        step = self._steps.drawn(batch)
        if step.drawn_as is not phase:
            raise ValueError(f"batch: {batch.batch_id} was drawn by get_{step.drawn_as}_batch, must be completed "
                             f"by complete_{step.drawn_as}")  # fmt: skip
        if len(token_ids) != len(batch.sampled_request_ids):
            raise ValueError(
                f"token_ids: {len(token_ids)} of them, must be {len(batch.sampled_request_ids)}, one for each of "
                f"the sampled_request_ids of batch {batch.batch_id}"
            )
        self._advance(now_ns)
        self._count(batch, step)
        if self._steps.complete(step, token_ids):
            effect = step.effect
            ends_ns = (self._now_ns,)
            self._finish_step(StepFinished(effect.instance_id, effect.step_id, ends_ns, step.sampled_token_ids()))

    def _finish_step(self, event: StepFinished | StepFailed) -> None:
        # What was asked for before has its say in the step that is planned now.
        self._loop.settle(self._now_ns)
        self._tell(event.instance_id, event)
        self._loop.settle(self._now_ns)

    def _count(self, batch: Batch, step: OpenStep) -> None:
        self._num_batches[batch.phase] += 1
        num_decodes = 0 if batch.phase is BatchPhase.PREFILL else len(step.effect.plan.decode_request_ids)
        self._num_decode_tokens += num_decodes
        self._num_chunk_tokens += batch.num_tokens - num_decodes

    def _close_migration(self, task: KVMigrationTask, now_ns: int | None) -> InstanceId:
        if now_ns is not None and now_ns < self._now_ns:
            self._advance(now_ns)
        source_id = self._migrations.close(task)
        self._advance(now_ns)
        return source_id

    def _observe(self, effect: Effect) -> None:
        """Every effect of every machine passes here, in order."""
        self._fold.observe(self._now_ns, effect)
        match effect:
            case RunStep():
                self._records.take(effect)
                self._steps.add(effect, self._records)
            case EmitTokens() | PrefillFinished() | DecodeHere() | HandoverFinished():
                self._records.take(effect)
            case RequestFinished() | RejectRequest():
                self._records.take(effect)
                self._steps.forget_request(effect.request_id)
            case KVReserved(target_instance_id=target_id, request_id=reserved_id):
                self._steps.begin_table(target_id, reserved_id)
            case TransferKV():
                self._migrations.add(effect)
            case CancelTransfer(transfer_id=transfer_id):
                source_id = self._migrations.cancel(transfer_id)
                if source_id is not None:
                    self._tell(source_id, KVTransferFailed(transfer_id, "cancelled before it began"))
            case _:
                pass


class _NoChance:
    """Stands where a source of chance would be that nothing asks."""

    def randrange(self, stop: int, /) -> int:
        raise AssertionError("a policy that needs chance was given none")
