"""The decode side of a KV hand-over: who has room reserved, and for which attempt.

Blocks are reserved before anything is sent. The sender has the say over them until it hands the
request over or calls the hand-over off; until then nothing else may touch them.
"""

from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.messages import HandoverFinished, KVReserved, ReleaseKV
from sagellm.runtime.local_request import LocalRequest
from sagellm.runtime.scheduler.step_scheduler import StepScheduler


class KVReceiver:
    """Reservations of one instance: in line in its scheduler, or given and answered."""

    def __init__(self, instance_id: InstanceId, scheduler: StepScheduler) -> None:
        self._instance_id = instance_id
        self._scheduler = scheduler
        self._answers: dict[RequestId, KVReserved] = {}

    def admit(self) -> list[tuple[LocalRequest, KVReserved]]:
        """Reserve blocks for those in line, as far as there is room; the answers to their senders."""
        admitted: list[tuple[LocalRequest, KVReserved]] = []
        while not self._first_in_line_is_here() and (reserved := self._scheduler.admit_reservation()) is not None:
            reservation, request, first_block_index = reserved
            assert request.blocks is not None
            answer = KVReserved(
                instance_id=reservation.source_instance_id,
                request_id=request.request_id,
                target_instance_id=self._instance_id,
                attempt=reservation.attempt,
                first_block_index=first_block_index,
                block_ids=tuple(request.blocks.block_ids[first_block_index:]),
            )
            self._answers[request.request_id] = answer
            admitted.append((request, answer))
        return admitted

    def _first_in_line_is_here(self) -> bool:
        """True where an earlier attempt still has its blocks: the word that it is off is on its way from the source."""
        line = self._scheduler.reservations
        return bool(line) and line[0].request.request_id in self._answers

    def called_off(self, event: ReleaseKV) -> RequestId | None:
        """The request whose blocks are to be given back; None where it had none, or for another attempt."""
        line = self._scheduler.reservations
        for reservation in line:
            if reservation.request.request_id == event.request_id and reservation.attempt == event.attempt:
                line.remove(reservation)
                return None
        answer = self._answers.get(event.request_id)
        return event.request_id if answer is not None and answer.attempt == event.attempt else None

    def called_off_by_loss(self, source_id: InstanceId) -> list[RequestId]:
        """The same for all hand-overs from an instance that is gone."""
        line = self._scheduler.reservations
        for reservation in [each for each in line if each.source_instance_id == source_id]:
            line.remove(reservation)
        return [answer.request_id for answer in self._answers.values() if answer.instance_id == source_id]

    def forget(self, request_id: RequestId) -> None:
        del self._answers[request_id]

    def is_due(self, event: HandoverFinished) -> bool:
        """True where this is the end of the hand-over that has its room here; anything else is stale."""
        answer = self._answers.get(event.request_id)
        return answer is not None and answer.attempt == event.attempt
