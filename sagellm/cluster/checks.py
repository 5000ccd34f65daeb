"""What must hold in a cluster file beyond its shape: names that exist, roles that fit, a model that fits."""

from collections.abc import Iterable
from pathlib import Path

from backends.profile_files import list_profiles, load_profile
from sagellm.cluster.build import room_for_kv
from sagellm.cluster.description import ClusterDescription, InstanceGroup
from sagellm.cluster.errors import suggestion
from sagellm.cluster.yaml_lines import FieldPath, ParsedYaml
from sagellm.control_plane.routing import ROUTING_NAMES
from sagellm.control_plane.strategies.base import STRATEGY_NAMES
from sagellm.core.config import Role
from sagellm.cost_model.factory import make_step_cost_model
from sagellm.cost_model.link import LINKS
from sagellm.cost_model.profile import FittedProfile
from sagellm.kv_policy.eviction import EVICTION_POLICIES
from sagellm.models.known_models import known_model_ids, load_model
from sagellm.models.model_shape import ModelShape


def check_cluster(cluster: ClusterDescription, parsed: ParsedYaml) -> None:
    """Raises ClusterFileError for the first thing that is wrong."""
    model = _check_model(cluster.model, parsed)
    _check_known(parsed, ("routing", "strategy"), cluster.routing.strategy, STRATEGY_NAMES, "strategy")
    _check_known(parsed, ("routing", "routing"), cluster.routing.routing, ROUTING_NAMES, "routing")
    if isinstance(cluster.link, str):
        _check_known(parsed, ("links", "between_instances"), cluster.link, LINKS, "link")
    for index, group in enumerate(cluster.instances):
        _check_group(group, ("instances", index), parsed)
    _check_roles(cluster, parsed)
    _check_names(cluster, parsed)
    for index, group in enumerate(cluster.instances):
        _check_model_fits(model, group, ("instances", index), parsed)


def _check_model(model: str, parsed: ParsedYaml) -> ModelShape:
    try:
        return load_model(model)
    except ValueError as error:
        problem = f"{model!r} is not a known model, nor a config.json; {suggestion(model, known_model_ids())}"
        # Where there is such a file, what is wrong with it says more.
        raise parsed.error(("model",), str(error) if Path(model).exists() else problem) from error


def _check_known(parsed: ParsedYaml, path: FieldPath, value: str, known: Iterable[str], what: str) -> None:
    if value not in known:
        raise parsed.error(path, f"{value!r} is not a known {what}; {suggestion(value, known)}")


def _check_group(group: InstanceGroup, path: FieldPath, parsed: ParsedYaml) -> None:
    if not group.profile.endswith(".json"):
        said_by = "profile" if (*path, "profile") in parsed.lines else "device"
        _check_known(parsed, (*path, said_by), group.profile, list_profiles(), "profile")
    _check_known(parsed, (*path, "eviction"), group.eviction, EVICTION_POLICIES, "eviction policy")
    if group.max_num_batched_tokens < group.max_num_seqs:
        raise parsed.error(
            (*path, "max_num_batched_tokens"),
            f"{group.max_num_batched_tokens} is less than max_num_seqs ({group.max_num_seqs}), but must be at least "
            "that, so that every running request gets its token in every step",
        )
    if group.kv_tokens is not None and group.kv_tokens < group.block_size:
        raise parsed.error(
            (*path, "kv_tokens"),
            f"{group.kv_tokens} is less than one block ({group.block_size} tokens), but must be one or more",
        )


def _check_roles(cluster: ClusterDescription, parsed: ParsedYaml) -> None:
    """Whoever decodes only must get prompts from somebody, and whoever prefills only must hand them on."""
    roles = [group.role for group in cluster.instances]
    if Role.DECODE in roles and Role.PREFILL not in roles:
        raise parsed.error(
            ("instances", roles.index(Role.DECODE), "role"),
            "there are decode instances but no prefill instance, which must compute their prompts; "
            "add one with role: prefill, or make this one mixed",
        )
    if Role.PREFILL in roles and not {Role.DECODE, Role.MIXED}.intersection(roles):
        raise parsed.error(
            ("instances", roles.index(Role.PREFILL), "role"),
            "there are prefill instances but none that goes on with their requests; "
            "add one with role: decode, or make this one mixed",
        )


def _check_names(cluster: ClusterDescription, parsed: ParsedYaml) -> None:
    first_group: dict[str, int] = {}
    group_indices = (index for index, group in enumerate(cluster.instances) for _ in range(group.count))
    for index, (name, _group) in zip(group_indices, cluster.named_instances(), strict=True):
        if first_group.setdefault(name, index) != index:
            raise parsed.error(
                ("instances", index, "name"),
                f"two instances are called {name!r} (the other is in instances[{first_group[name]}]); "
                "every instance must have a name of its own",
            )


def _check_model_fits(model: ModelShape, group: InstanceGroup, path: FieldPath, parsed: ParsedYaml) -> None:
    try:
        profile = load_profile(group.profile)
        if isinstance(profile, FittedProfile):
            make_step_cost_model(profile, model, group.tp)
        num_tokens = room_for_kv(profile, model, group)
        num_tokens_at_most = room_for_kv(profile, model, group, 1.0)
    except ValueError as error:
        raise parsed.error(path, str(error)) from error
    if num_tokens < group.block_size:
        raise parsed.error(
            path,
            f"beside the model there is room for {num_tokens} KV tokens, which is less than one block "
            f"({group.block_size}); raise tp or memory_utilization",
        )
    if group.kv_tokens is not None and group.kv_tokens > num_tokens_at_most:
        raise parsed.error(
            (*path, "kv_tokens"),
            f"{group.kv_tokens} tokens do not fit into the device's memory beside the model, where there is room for "
            f"{num_tokens_at_most}; give fewer, or leave this key out",
        )
