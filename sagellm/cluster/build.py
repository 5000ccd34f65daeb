"""From a description to what a driver needs to make the machines: their configurations, prices and links."""

from dataclasses import dataclass, replace

from backends.profile_files import load_profile
from sagellm.cluster.description import ClusterDescription, CustomLink, InstanceGroup
from sagellm.core.config import ControlPlaneConfig, InstanceConfig, Role
from sagellm.core.identity import InstanceId
from sagellm.cost_model.factory import make_step_cost_model, plan_lead_ns, steps_in_flight_max
from sagellm.cost_model.kv_capacity import kv_capacity_tokens
from sagellm.cost_model.link import Link, link_named
from sagellm.cost_model.profile import Profile
from sagellm.cost_model.step_cost import StepCostModel
from sagellm.models.known_models import load_model
from sagellm.models.model_shape import ModelShape
from sagellm.runtime.execution_graph.tensors import StepSizes

STATUSES = ("measured", "spec", "estimate")
"""How far a number can be trusted, best first."""


@dataclass(frozen=True, slots=True)
class BuiltInstance:
    """One instance's configuration and the price of its steps."""

    config: InstanceConfig
    cost_model: StepCostModel


@dataclass(frozen=True, slots=True)
class BuiltCluster:
    """A cluster with no names left to resolve, ready to be driven."""

    name: str
    control_plane: ControlPlaneConfig
    instances: tuple[BuiltInstance, ...]  # in the file's order
    link: Link  # each instance has one such link out and one in
    profile_status: str  # the worst of all profiles, and of the link's where KV moves over it


def build_cluster(
    cluster: ClusterDescription, *, fast_forward: bool = True, dtype_bytes: int | None = None
) -> BuiltCluster:
    """Configurations and cost models of a checked description; ``fast_forward`` off makes every step a single one.

    ``dtype_bytes`` is the size of a weight and of a number in the KV cache; None: as the model's configuration.

    Raises:
        ValueError: a profile, model or link is not known, or the model does not fit; ``read_cluster``
            finds all of that first.
    """
    model = load_model(cluster.model)
    if dtype_bytes is not None:
        model = replace(model, dtype_bytes=dtype_bytes)
    link = make_link(cluster.link)
    profiles = {group.profile: load_profile(group.profile) for group in cluster.instances}
    cost_models = {
        group: make_step_cost_model(profiles[group.profile], model, group.tp)
        for group in dict.fromkeys(cluster.instances)
    }
    statuses = [cost_model.status for cost_model in cost_models.values()]
    if any(group.role is Role.PREFILL for group in cluster.instances):
        statuses.append(link.status)
    return BuiltCluster(
        name=cluster.name,
        control_plane=_control_plane_config(cluster, model),
        instances=tuple(
            BuiltInstance(
                _instance_config(instance_id, group, profiles[group.profile], model, fast_forward), cost_models[group]
            )
            for instance_id, group in cluster.named_instances()
        ),
        link=link,
        profile_status=max(statuses, key=STATUSES.index),
    )


def room_for_kv(
    profile: Profile, model: ModelShape, group: InstanceGroup, memory_utilization: float | None = None
) -> int:
    """KV tokens that fit beside the weights and the largest step of such an instance.

    Raises ValueError where not even one fits.
    """
    utilization = group.memory_utilization if memory_utilization is None else memory_utilization
    largest_step = StepSizes(group.max_num_batched_tokens, group.max_num_seqs, group.max_num_seqs)
    return kv_capacity_tokens(profile, model, group.tp, utilization, largest_step)


def make_link(link: str | CustomLink) -> Link:
    """The link of that name, or the one described; raises ValueError for an unknown name."""
    if isinstance(link, str):
        return link_named(link)
    return Link("custom", link.latency_ns, link.bandwidth_bytes_per_s / 1e9, "estimate", "the cluster file")


def _control_plane_config(cluster: ClusterDescription, model: ModelShape) -> ControlPlaneConfig:
    return ControlPlaneConfig(
        strategy=cluster.routing.strategy,
        routing=cluster.routing.routing,
        queue_max=cluster.limits.queue_max,
        dispatch_tokens_max=cluster.limits.dispatch_tokens_max,
        handover_start=cluster.routing.handover,
        disaggregate_min_tokens=cluster.routing.disaggregate_min_tokens,
        attempts_max=cluster.limits.attempts_max,
        max_model_len=cluster.limits.max_model_len or model.max_model_len,
    )


def _instance_config(
    instance_id: InstanceId, group: InstanceGroup, profile: Profile, model: ModelShape, fast_forward: bool
) -> InstanceConfig:
    kv_tokens = group.kv_tokens or room_for_kv(profile, model, group)
    # With more ranks than KV heads, some ranks hold copies.
    num_kv_heads = model.kv_heads_per_rank(group.tp) * group.tp
    config = InstanceConfig(
        instance_id=instance_id,
        num_blocks=kv_tokens // group.block_size,
        role=group.role,
        block_size=group.block_size,
        kv_bytes_per_token=2 * model.num_layers * num_kv_heads * model.head_dim * model.dtype_bytes,
        max_num_seqs=group.max_num_seqs,
        max_num_batched_tokens=group.max_num_batched_tokens,
        steps_in_flight_max=group.steps_in_flight or steps_in_flight_max(profile),
        prefix_caching=group.prefix_caching,
        eviction=group.eviction,
        plan_lead_ns=plan_lead_ns(profile) if group.plan_lead_ns is None else group.plan_lead_ns,
    )
    return config if fast_forward else replace(config, repeat_max=1)
