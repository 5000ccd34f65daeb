"""What must hold in a cluster file beyond its shape: names that exist, roles that fit, a model that fits."""

from collections.abc import Iterable

from sagellm.cluster import registries
from sagellm.cluster.description import ClusterDescription, InstanceGroup
from sagellm.cluster.errors import suggestion
from sagellm.cluster.yaml_lines import FieldPath, ParsedYaml
from sagellm.core.config import Role


def check_cluster(cluster: ClusterDescription, parsed: ParsedYaml) -> None:
    """Raises ClusterFileError for the first thing that is wrong."""
    _check_known(parsed, ("model",), cluster.model, registries.known_models(), "model")
    _check_known(parsed, ("routing", "strategy"), cluster.routing.strategy, registries.known_strategies(), "strategy")
    _check_known(parsed, ("routing", "routing"), cluster.routing.routing, registries.known_routings(), "routing")
    if isinstance(cluster.link, str):
        _check_known(parsed, ("links", "between_instances"), cluster.link, registries.known_links(), "link")
    for index, group in enumerate(cluster.instances):
        _check_group(group, ("instances", index), parsed)
    _check_roles(cluster, parsed)
    _check_names(cluster, parsed)
    for index, group in enumerate(cluster.instances):
        _check_model_fits(cluster.model, group, ("instances", index), parsed)


def _check_known(parsed: ParsedYaml, path: FieldPath, value: str, known: Iterable[str], what: str) -> None:
    if value not in known:
        raise parsed.error(path, f"{value!r} is not a known {what}; {suggestion(value, known)}")


def _check_group(group: InstanceGroup, path: FieldPath, parsed: ParsedYaml) -> None:
    _check_known(parsed, (*path, "profile"), group.profile, registries.known_profiles(), "profile")
    _check_known(parsed, (*path, "eviction"), group.eviction, registries.known_evictions(), "eviction policy")
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


def _check_model_fits(model: str, group: InstanceGroup, path: FieldPath, parsed: ParsedYaml) -> None:
    problem = registries.model_misfit(model, group)
    if problem is not None:
        raise parsed.error(path, problem)
