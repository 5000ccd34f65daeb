"""From a cluster file, or the name of one that comes with the package, to a checked description."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sagellm.cluster.checks import check_cluster
from sagellm.cluster.description import (
    ClusterDescription,
    CustomLink,
    InstanceGroup,
    Limits,
    Routing,
)
from sagellm.cluster.errors import ClusterFileError, suggestion
from sagellm.cluster.file_schema import ClusterFile, InstanceSection, LimitsSection, LinksSection, Section
from sagellm.cluster.named_files import list_clusters, named_cluster_text
from sagellm.cluster.yaml_lines import FieldPath, ParsedYaml, parse_yaml
from sagellm.core.config import HandoverStart, Role
from sagellm.core.request import LatencySLO


def read_cluster(name_or_path: str) -> ClusterDescription:
    """The cluster of that name, or in that file.

    Raises:
        ClusterFileError: there is no such cluster or file, or it is wrong; one sentence that says
            where and what would be right.
    """
    if name_or_path in list_clusters():
        return parse_cluster(named_cluster_text(name_or_path), source=f"{name_or_path}.yaml", name=name_or_path)
    path = Path(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ClusterFileError(
            f"{name_or_path}: neither a file nor a named cluster; {suggestion(name_or_path, list_clusters())}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ClusterFileError(f"{name_or_path}: cannot read this cluster file: {reason}") from error
    return parse_cluster(text, source=str(path), name=path.stem, directory=path.parent)


def parse_cluster(text: str, *, source: str, name: str, directory: Path | None = None) -> ClusterDescription:
    """The cluster that ``text`` describes; ``source`` names it in errors, ``name`` in reports.

    ``directory`` is where a relative path of a model's config.json starts.

    Raises:
        ClusterFileError: as ``read_cluster``.
    """
    parsed = parse_yaml(text, source)
    if not isinstance(parsed.values, dict):
        raise ClusterFileError(f"{source}: this is not a mapping; a cluster file begins with `model:` and `instances:`")
    try:
        cluster_file = ClusterFile.model_validate(parsed.values)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        path, problem = _explain(details)
        raise parsed.error(path, problem) from error
    description = _describe(cluster_file, parsed, name, directory)
    check_cluster(description, parsed)
    return description


def _explain(details: ErrorDetails) -> tuple[FieldPath, str]:
    """Where pydantic's first complaint is, and the complaint in our words."""
    path = details["loc"]
    value = details["input"]
    context = details.get("ctx", {})
    match details["type"]:
        case "extra_forbidden":
            return path, f"unknown key; {suggestion(str(path[-1]), _keys_beside(path))}"
        case "missing":
            return path, "this key is missing, and has no default"
        case "literal_error":
            known = [word.strip("'") for word in str(context["expected"]).replace(" or ", ", ").split(", ")]
            return path, f"{value!r} is not possible here; {suggestion(str(value), known)}"
        case "value_error":
            return path, str(context["error"])
        case "string_pattern_mismatch":
            return path, f"{value!r} is not a name; use letters, digits, '.', '_' and '-'"
        case "model_type" | "dict_type":
            return path, f"{value!r} must be a mapping of keys to values"
        case _:
            return path, f"{value!r} is not possible here: {details['msg'][0].lower()}{details['msg'][1:]}"


def _keys_beside(path: FieldPath) -> tuple[str, ...]:
    """The keys that may stand where ``path`` ends."""
    section: type[Section] = ClusterFile
    for part in path[:-1]:
        if isinstance(part, int):
            continue
        section = InstanceSection if part == "instances" else _section_type(part)
    return tuple(section.model_fields)


def _section_type(key: str) -> type[Section]:
    annotation: Any = ClusterFile.model_fields[key].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else ClusterFile


def _describe(cluster_file: ClusterFile, parsed: ParsedYaml, name: str, directory: Path | None) -> ClusterDescription:
    routing = cluster_file.routing
    groups = [_group(section, parsed, index, directory) for index, section in enumerate(cluster_file.instances)]
    return ClusterDescription(
        name=cluster_file.name or name,
        model=_from_directory(cluster_file.model, directory),
        instances=tuple(groups),
        link=_link(cluster_file.links),
        limits=_limits(cluster_file.limits),
        routing=Routing(
            strategy=routing.strategy,
            routing=routing.routing,
            disaggregate_min_tokens=routing.disaggregate_min_tokens,
            handover=HandoverStart(routing.handover),
        ),
        slo=LatencySLO(ttft_ns=cluster_file.slo.ttft, tpot_ns=cluster_file.slo.tpot),
    )


def _from_directory(path: str, directory: Path | None) -> str:
    """A file that a cluster file names is looked for from the cluster file's own directory first."""
    if directory is not None and (directory / path).exists():
        return str(directory / path)
    return path


def _group(section: InstanceSection, parsed: ParsedYaml, index: int, directory: Path | None) -> InstanceGroup:
    return InstanceGroup(
        profile=_profile(section, parsed, index, directory),
        count=section.count,
        role=Role(section.role),
        name=section.name,
        tp=section.tp,
        max_num_seqs=section.max_num_seqs,
        max_num_batched_tokens=section.max_num_batched_tokens,
        block_size=section.block_size,
        prefix_caching=section.prefix_caching,
        eviction=section.eviction,
        steps_in_flight=section.steps_in_flight,
        plan_lead_ns=section.plan_lead,
        kv_tokens=section.kv_tokens,
        memory_utilization=section.memory_utilization,
    )


def _profile(section: InstanceSection, parsed: ParsedYaml, index: int, directory: Path | None) -> str:
    """``<device>/<engine>`` from ``device``, ``profile`` or both; a device alone means its spec sheet."""
    device, profile = section.device, section.profile
    if profile is not None and profile.endswith(".json"):
        return _from_directory(profile, directory)
    if device is None:
        assert profile is not None, "the schema wants one of them"
        return profile
    if profile is None:
        return f"{device.casefold()}/spec"
    if "/" not in profile:
        return f"{device.casefold()}/{profile}"
    if profile.partition("/")[0].casefold() != device.casefold():
        raise parsed.error(
            ("instances", index, "profile"),
            f"{profile!r} is not a profile of the device {device!r}; give one of them",
        )
    return profile


def _link(section: LinksSection) -> str | CustomLink:
    if section.bandwidth is not None and section.latency is not None:
        return CustomLink(section.bandwidth, section.latency)
    assert section.between_instances is not None, "the schema wants one of them"
    return section.between_instances


def _limits(section: LimitsSection) -> Limits:
    return Limits(
        queue_max=section.queue_max,
        dispatch_tokens_max=section.dispatch_tokens_max,
        max_model_len=section.max_model_len or 0,
        attempts_max=section.attempts_max,
    )
