"""What the front knows of one instance."""

from dataclasses import dataclass

from sagellm.core.identity import InstanceId
from sagellm.core.messages import InstanceJoined
from sagellm.server.engine import InstanceSnapshot, InstanceStatus
from sagellm.server.live.deployment import DeployedInstance


@dataclass(slots=True)
class InstanceRecord:
    """Where one instance stands."""

    deployed: DeployedInstance
    status: InstanceStatus
    is_lost: bool = False
    incarnation: int = 0  # how often it was lost before


def new_record(deployed: DeployedInstance) -> InstanceRecord:
    return InstanceRecord(deployed, first_status(deployed.instance_id))


def first_status(instance_id: InstanceId) -> InstanceStatus:
    return InstanceStatus(instance_id, *[0] * 10)


def joined(deployed: DeployedInstance) -> InstanceJoined:
    config = deployed.settings.instance
    return InstanceJoined(
        config.instance_id, config.role, config.num_token_slots, config.max_num_seqs, config.max_num_batched_tokens
    )


def snapshot(record: InstanceRecord) -> InstanceSnapshot:
    config = record.deployed.settings.instance
    return InstanceSnapshot(
        instance_id=config.instance_id,
        role=config.role,
        device=record.deployed.device,
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        is_lost=record.is_lost,
        status=record.status,
    )
