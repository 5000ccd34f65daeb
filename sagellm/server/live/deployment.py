"""From a cluster's description to what each process of it is told."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from backends.executor_settings import ExecutorSettings
from sagellm.cluster.backends import backend_of_profile
from sagellm.cluster.build import build_cluster
from sagellm.cluster.description import ClusterDescription
from sagellm.core.config import ControlPlaneConfig
from sagellm.core.identity import InstanceId

PLAN_LEAD_NS = 2_000_000
"""Several times what the host takes to plan and launch a step."""
_HOSTS = ("cpu", "none")
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class DeploymentError(ValueError):
    """A cluster that cannot be served as it is described. The message is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """How the model's weights are had, beside its name."""

    load_format: str = "auto"
    dtype: str = "auto"
    seed: int = 0  # of dummy weights


@dataclass(frozen=True, slots=True)
class DeployedInstance:
    """One instance and where it runs."""

    settings: ExecutorSettings
    device: str  # for people, such as cuda:0

    @property
    def instance_id(self) -> InstanceId:
        return self.settings.instance.instance_id


@dataclass(frozen=True, slots=True)
class Deployment:
    """A cluster, ready to be started."""

    cluster: str
    model: str
    control_plane: ControlPlaneConfig
    instances: tuple[DeployedInstance, ...]  # in the cluster file's order


def deploy(
    cluster: ClusterDescription,
    choice: ModelChoice | None = None,
    *,
    backend: str | None = None,
    num_devices: Mapping[str, int] | None = None,
    num_threads: int = 0,
) -> Deployment:
    """Give every instance its configuration and its device, the first free one of its kind.

    ``backend`` stands in for that of every profile (``none`` for an engine that costs nothing).
    ``num_devices`` says how many devices a backend has; one that is not named has no bound, and no
    numbers either (the CPU). ``num_threads`` is what one CPU instance may use.

    Raises:
        DeploymentError: an instance wants more devices than there are, or several.
        ValueError: as ``build_cluster``.
    """
    choice = choice or ModelChoice()
    built = build_cluster(cluster, fast_forward=False, dtype_bytes=DTYPE_BYTES.get(choice.dtype))
    num_taken: Counter[str] = Counter()
    instances: list[DeployedInstance] = []
    for each, (instance_id, group) in zip(built.instances, cluster.named_instances(), strict=True):
        own_backend = backend or backend_of_profile(group.profile)
        if group.tp > 1 and own_backend != "none":
            raise DeploymentError(
                f"{instance_id}: tp is {group.tp}, but an instance on live devices has one device for now; "
                "give tp: 1, or simulate this cluster with `sagellm replay`"
            )
        index = _next_device(own_backend, num_taken, num_devices or {}, instance_id)
        plan_lead_ns = each.config.plan_lead_ns
        if not plan_lead_ns and group.plan_lead_ns is None:
            plan_lead_ns = _plan_lead_ns(own_backend)
        settings = ExecutorSettings(
            instance=replace(each.config, repeat_max=1, plan_lead_ns=plan_lead_ns),
            model=cluster.model,
            backend=own_backend,
            device_indexes=(0 if index is None else index,),
            load_format=choice.load_format,
            dtype=choice.dtype,
            seed=choice.seed,
            max_model_len=built.control_plane.max_model_len,
            num_threads=num_threads,
        )
        device = own_backend if index is None else f"{own_backend}:{index}"
        instances.append(DeployedInstance(settings, device))
    return Deployment(cluster.name, cluster.model, built.control_plane, tuple(instances))


def _plan_lead_ns(backend: str) -> int:
    """A device of its own is given its next step late; one that is the host is never ahead of it."""
    return 0 if backend in _HOSTS else PLAN_LEAD_NS


def _next_device(
    backend: str, num_taken: Counter[str], num_devices: Mapping[str, int], instance_id: InstanceId
) -> int | None:
    if backend not in num_devices:
        return None
    index = num_taken[backend]
    num_taken[backend] += 1
    if index >= num_devices[backend]:
        raise DeploymentError(
            f"{instance_id}: no {backend} device is left for it; there are {num_devices[backend]}, "
            "and every instance needs its own"
        )
    return index
