"""What goes wrong in a run, and when: a plan of faults, told to a driver before it runs."""

from dataclasses import dataclass
from typing import assert_never

from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.messages import RequestCancelled
from sim.driver import SimDriver


@dataclass(frozen=True, slots=True)
class InstanceDies:
    """For good; the control plane hears of it ``detection_ns`` later."""

    at_ns: int
    instance_id: InstanceId
    detection_ns: int = 1_000_000_000


@dataclass(frozen=True, slots=True)
class StepFails:
    """The forward pass after the one under way, as from running out of memory; the instance lives on."""

    at_ns: int
    instance_id: InstanceId


@dataclass(frozen=True, slots=True)
class TransfersFail:
    """All KV transfers from and to the instance that are under way."""

    at_ns: int
    instance_id: InstanceId


@dataclass(frozen=True, slots=True)
class InstanceSlows:
    """Its steps take ``slowdown`` times as long from then on; 1 makes it well again."""

    at_ns: int
    instance_id: InstanceId
    slowdown: int


@dataclass(frozen=True, slots=True)
class ClientCancels:
    """The client goes away. Nothing happens where its request is over, or not there yet."""

    at_ns: int
    request_id: RequestId


Fault = InstanceDies | StepFails | TransfersFail | InstanceSlows | ClientCancels


def arm_faults(driver: SimDriver, faults: tuple[Fault, ...]) -> None:
    """Let each fault happen at its time. To be called before the driver runs."""
    for fault in faults:
        driver.at(fault.at_ns, lambda fault=fault: _strike(driver, fault))  # type: ignore[misc]


def _strike(driver: SimDriver, fault: Fault) -> None:
    match fault:
        case InstanceDies(instance_id=instance_id, detection_ns=detection_ns):
            driver.lose(instance_id, detection_ns)
        case StepFails(instance_id=instance_id):
            driver.fail_next_step(instance_id)
        case TransfersFail(instance_id=instance_id):
            driver.fail_transfers(instance_id)
        case InstanceSlows(instance_id=instance_id, slowdown=slowdown):
            driver.set_slowdown(instance_id, slowdown)
        case ClientCancels(request_id=request_id):
            driver.submit(RequestCancelled(request_id))
        case _:
            assert_never(fault)
