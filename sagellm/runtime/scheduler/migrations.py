"""KV transfers that are under way, as tasks that a caller draws and completes."""

from collections.abc import Mapping
from dataclasses import dataclass

from sagellm.core.identity import InstanceId, TransferId
from sagellm.core.messages import TransferKV
from sagellm.runtime.scheduler.base import KVMigrationTask


@dataclass(slots=True)
class _Open:
    effect: TransferKV
    task: KVMigrationTask
    is_drawn: bool = False
    is_cancelled: bool = False


class Migrations:
    """Tasks by the id of their transfer, in the order in which they were asked for."""

    def __init__(self, device_ids: Mapping[InstanceId, int]) -> None:
        self._device_ids = device_ids
        self._open: dict[TransferId, _Open] = {}

    def add(self, effect: TransferKV) -> None:
        task = KVMigrationTask(
            transfer_id=effect.transfer_id,
            request_id=effect.request_id,
            source_device_id=self._device_ids[effect.source_instance_id],
            target_device_id=self._device_ids[effect.target_instance_id],
            source_block_ids=effect.source_block_ids,
            target_block_ids=effect.target_block_ids,
            num_bytes=effect.num_bytes,
        )
        self._open[effect.transfer_id] = _Open(effect, task)

    def draw(self) -> list[KVMigrationTask]:
        """Tasks that were not drawn before."""
        fresh = [migration for migration in self._open.values() if not migration.is_drawn]
        for migration in fresh:
            migration.is_drawn = True
        return [migration.task for migration in fresh]

    def cancel(self, transfer_id: TransferId) -> InstanceId | None:
        """Nobody needs the transfer any more. The source, where the transfer had not begun and is closed so."""
        migration = self._open.get(transfer_id)
        if migration is None:
            return None
        migration.is_cancelled = True
        if migration.is_drawn:
            return None
        return self._open.pop(transfer_id).effect.source_instance_id

    def is_cancelled(self, task: KVMigrationTask) -> bool:
        migration = self._open.get(task.transfer_id)
        return migration is not None and migration.is_cancelled

    def close(self, task: KVMigrationTask) -> InstanceId:
        """The source of a task that is over. Raises ValueError where it is not under way."""
        migration = self._open.get(task.transfer_id)
        if migration is None or not migration.is_drawn:
            raise ValueError(f"task: {task.transfer_id!r}, must be drawn and not yet completed")
        return self._open.pop(task.transfer_id).effect.source_instance_id
