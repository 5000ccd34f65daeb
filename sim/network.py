"""KV transfers that share links.

Each instance has one link out and one link in. The transfers on a link share its bandwidth evenly; a
transfer goes as fast as the slower of its two shares, after a fixed time of its own. Shares change
whenever a transfer starts or ends.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from sagellm.core.identity import InstanceId, TransferId
from sagellm.cost_model.link import Link
from sim.environment import CallQueue, FunctionCall


@dataclass(slots=True)
class _Transfer:
    source: InstanceId
    target: InstanceId
    out_link: tuple[str, InstanceId]
    in_link: tuple[str, InstanceId]
    num_bytes_left: float
    done: Callable[[], None]


class Network:
    """Transfers under way."""

    def __init__(self, link: Link, calls: CallQueue) -> None:
        self._link = link
        self._calls = calls
        self._moving: dict[TransferId, _Transfer] = {}
        self._pending: dict[TransferId, _Transfer] = {}  # in their fixed time
        self._load: Counter[tuple[str, InstanceId]] = Counter()  # transfers by link
        self._updated_ns = 0
        self._generation = 0

    def start(
        self,
        transfer_id: TransferId,
        source: InstanceId,
        target: InstanceId,
        num_bytes: int,
        now_ns: int,
        done: Callable[[], None],
    ) -> None:
        """Move ``num_bytes``; ``done`` is called when they are there."""
        transfer = _Transfer(source, target, ("out", source), ("in", target), float(num_bytes), done)
        self._pending[transfer_id] = transfer

        def begin(starts_ns: int) -> None:
            if transfer_id not in self._pending:
                return
            del self._pending[transfer_id]
            self._settle(starts_ns)
            self._moving[transfer_id] = transfer
            self._load[transfer.out_link] += 1
            self._load[transfer.in_link] += 1
            self._arm(starts_ns)

        self._calls.call_at(now_ns + self._link.fixed_ns, FunctionCall(begin))

    def cancel(self, transfer_id: TransferId, now_ns: int) -> bool:
        """Stop a transfer; False where there is none of that id any more."""
        if transfer_id in self._pending:
            del self._pending[transfer_id]
            return True
        if transfer_id not in self._moving:
            return False
        self._settle(now_ns)
        self._remove(transfer_id)
        self._arm(now_ns)
        return True

    def transfers_of(self, instance_id: InstanceId) -> list[tuple[TransferId, InstanceId]]:
        """Transfers from or to an instance, each with its source."""
        return [
            (transfer_id, transfer.source)
            for transfers in (self._pending, self._moving)
            for transfer_id, transfer in transfers.items()
            if instance_id in (transfer.source, transfer.target)
        ]

    def _rate(self, transfer: _Transfer) -> float:
        """Bytes per nanosecond."""
        num_sharing = max(self._load[transfer.out_link], self._load[transfer.in_link])
        return self._link.gbps / num_sharing

    def _settle(self, now_ns: int) -> None:
        """Take off what has moved since shares last changed."""
        elapsed_ns = now_ns - self._updated_ns
        self._updated_ns = now_ns
        for transfer in self._moving.values():
            transfer.num_bytes_left -= elapsed_ns * self._rate(transfer)

    def _remove(self, transfer_id: TransferId) -> _Transfer:
        transfer = self._moving.pop(transfer_id)
        self._load[transfer.out_link] -= 1
        self._load[transfer.in_link] -= 1
        return transfer

    def _arm(self, now_ns: int) -> None:
        """Wake when the first transfer is through, at present shares."""
        self._generation += 1
        if not self._moving:
            return
        generation = self._generation
        left_ns = min(max(0.0, t.num_bytes_left) / self._rate(t) for t in self._moving.values())

        def finish(at_ns: int) -> None:
            if generation != self._generation:
                return
            self._settle(at_ns)
            through = [transfer_id for transfer_id, t in self._moving.items() if t.num_bytes_left <= 0.0]
            finished = [self._remove(transfer_id) for transfer_id in through]
            self._arm(at_ns)
            for transfer in finished:
                transfer.done()

        self._calls.call_at(now_ns + int(left_ns) + 1, FunctionCall(finish))
