"""What a scheduler remembers of every request, from the effects that name it."""

from collections.abc import Iterator
from typing import assert_never

from sagellm.core.config import Role
from sagellm.core.identity import InstanceId
from sagellm.core.messages import (
    DecodeHere,
    EmitTokens,
    HandoverFinished,
    PrefillFinished,
    RejectRequest,
    RequestFinished,
    RunStep,
)
from sagellm.core.request import FinishReason
from sagellm.runtime.scheduler.base import Request, RequestProgress, RequestStatus

StatusEffect = RunStep | EmitTokens | PrefillFinished | DecodeHere | HandoverFinished | RequestFinished | RejectRequest
_OVER = (RequestStatus.FINISHED, RequestStatus.REJECTED)


class RequestRecord:
    """One request's life so far."""

    __slots__ = (
        "arrival_ns",
        "cancelled",
        "device_id",
        "finish_reason",
        "first_token_ns",
        "last_token_ns",
        "output_token_ids",
        "reject_reason",
        "request",
        "status",
    )

    def __init__(self, request: Request, arrival_ns: int) -> None:
        self.request = request
        self.status = RequestStatus.WAITING
        self.device_id: int | None = None
        self.output_token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.reject_reason: str | None = None
        self.arrival_ns = arrival_ns
        self.first_token_ns: int | None = None
        self.last_token_ns: int | None = None
        self.cancelled = False

    @property
    def num_tokens(self) -> int:
        """Tokens known of it: the prompt's and those that came out."""
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    @property
    def is_over(self) -> bool:
        return self.status in _OVER

    def token_ids(self, first: int, count: int) -> tuple[int, ...]:
        """Its tokens from position ``first`` on."""
        num_prompt_tokens = len(self.request.prompt_token_ids)
        outputs = self.output_token_ids[max(0, first - num_prompt_tokens) : max(0, first + count - num_prompt_tokens)]
        return (*self.request.prompt_token_ids[first : first + count], *outputs)

    def progress(self) -> RequestProgress:
        return RequestProgress(
            request=self.request,
            status=self.status,
            device_id=self.device_id,
            output_token_ids=tuple(self.output_token_ids),
            finish_reason=self.finish_reason,
            reject_reason=self.reject_reason,
            arrival_ns=self.arrival_ns,
            first_token_ns=self.first_token_ns,
            last_token_ns=self.last_token_ns,
        )


class RequestRecords:
    """All requests by id. They stay when they are over, so that their outcome can be asked for."""

    def __init__(self, device_ids: dict[InstanceId, int], roles: dict[InstanceId, Role]) -> None:
        self._device_ids = device_ids
        self._roles = roles
        self._records: dict[str, RequestRecord] = {}
        self.num_unfinished = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._records

    def __iter__(self) -> Iterator[RequestRecord]:
        return iter(self._records.values())

    def __getitem__(self, request_id: str) -> RequestRecord:
        """Raises KeyError, saying what it lacks, for a request that was never added."""
        record = self._records.get(request_id)
        if record is None:
            raise KeyError(f"request_id: {request_id!r}, must be that of a request that was added")
        return record

    def add(self, request: Request, arrival_ns: int) -> None:
        self._records[request.request_id] = RequestRecord(request, arrival_ns)
        self.num_unfinished += 1

    def kv_lost(self, instance_id: InstanceId) -> None:
        """A step failed there: what its instance was computing begins again."""
        device_id = self._device_ids[instance_id]
        for record in self._records.values():
            if record.device_id == device_id and record.status in (RequestStatus.PREFILLING, RequestStatus.DECODING):
                record.status = RequestStatus.PREEMPTED

    def take(self, effect: StatusEffect) -> None:
        """Note what the effect says of its requests."""
        match effect:
            case RunStep():
                self._take_step(effect)
            case EmitTokens():
                self._take_tokens(effect)
            case PrefillFinished(request_id=request_id, instance_id=instance_id):
                if self._roles[instance_id] is Role.PREFILL:
                    self._records[request_id].status = RequestStatus.MIGRATING
            case DecodeHere(request_id=request_id):
                self._goes_on(request_id, RequestStatus.DECODING)
            case HandoverFinished(instance_id=instance_id, request_id=request_id):
                self._goes_on(request_id, RequestStatus.DECODING)
                self._records[request_id].device_id = self._device_ids[instance_id]
            case RequestFinished(request_id=request_id, reason=reason):
                self._end(request_id, RequestStatus.FINISHED).finish_reason = reason
            case RejectRequest(request_id=request_id, reason=why):
                self._reject(request_id, why)
            case _:
                assert_never(effect)

    def _take_step(self, effect: RunStep) -> None:
        device_id = self._device_ids[effect.instance_id]
        for request_id in effect.plan.preempted_request_ids:
            self._goes_on(request_id, RequestStatus.PREEMPTED)
        for request_id in effect.plan.decode_request_ids:
            self._records[request_id].status = RequestStatus.DECODING
        for chunk in effect.plan.chunks:
            record = self._records[chunk.request_id]
            record.status, record.device_id = RequestStatus.PREFILLING, device_id

    def _take_tokens(self, effect: EmitTokens) -> None:
        assert effect.token_ids is not None
        for request_id, token_ids in zip(effect.request_ids, effect.token_ids, strict=True):
            record = self._records[request_id]
            record.output_token_ids.extend(token_ids)
            record.last_token_ns = effect.ends_ns[-1]
            if record.first_token_ns is None:
                record.first_token_ns = effect.ends_ns[0]
            record.status = RequestStatus.DECODING

    def _goes_on(self, request_id: str, status: RequestStatus) -> None:
        """News of a request, which may have ended before it came."""
        record = self._records[request_id]
        if not record.is_over:
            record.status = status

    def _reject(self, request_id: str, reason: str) -> None:
        if self._records[request_id].cancelled:
            self._end(request_id, RequestStatus.FINISHED).finish_reason = FinishReason.ABORT
        else:
            self._end(request_id, RequestStatus.REJECTED).reject_reason = reason

    def _end(self, request_id: str, status: RequestStatus) -> RequestRecord:
        record = self._records[request_id]
        assert not record.is_over, f"I3: {request_id} ended twice"
        record.status = status
        self.num_unfinished -= 1
        return record
