"""Which cluster and which model ``sagellm serve`` serves, and on what."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from backends.errors import BackendError
from backends.profile_files import list_profiles
from backends.registry import get_backend
from sagellm.cluster.backends import backend_of_profile
from sagellm.cluster.description import ClusterDescription, InstanceGroup
from sagellm.cluster.errors import ClusterFileError
from sagellm.cluster.reading import read_cluster
from sagellm.commands.serve_options import ServeOptions
from sagellm.commands.serve_requirements import NO_BACKEND
from sagellm.commands.user_error import UserError, user_errors
from sagellm.models.known_models import known_model_ids, load_model_config
from sagellm.models.model_config import ModelConfig
from sagellm.server.live.deployment import Deployment, ModelChoice, deploy

TOY_CLUSTER = "cpu-toy"
CPU_BACKEND = "cpu"
CPU_PROFILE = "cpu/spec"
_WITHOUT_CHECKPOINT = "sagellm/"  # models that are for random weights only


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model as the HTTP side must know it."""

    name: str
    config: ModelConfig
    folder: Path | None  # with its weights and tokeniser; None where there is none

    @property
    def tokenizer_folder(self) -> Path | None:
        return self.folder if self.folder is not None and (self.folder / "tokenizer.json").is_file() else None


@dataclass(frozen=True, slots=True)
class ServedCluster:
    """All that is to be started."""

    deployment: Deployment
    model: ServedModel
    is_toy: bool


def choose_served_cluster(options: ServeOptions) -> ServedCluster:
    """What the options name, checked, each instance with a device that is there.

    Raises:
        UserError: something is wrong with it, or missing on this machine.
    """
    with user_errors(ClusterFileError, BackendError, ValueError):
        is_toy = options.cluster is None and options.model is None
        cluster = _cluster(options)
        # The devices come first: a model may have to be fetched, which is vain where nothing can run it.
        num_devices = {
            name: get_backend(name).get_device_count()
            for name in _backends_of(cluster, options.backend)
            if name not in (CPU_BACKEND, NO_BACKEND)
        }
        model = _model(cluster.model, options)
        cluster = replace(cluster, model=str(model.folder or cluster.model))
        num_instances = sum(group.count for group in cluster.instances)
        deployment = deploy(
            cluster,
            ModelChoice(options.load_format, options.dtype, options.seed),
            backend=options.backend,
            num_devices=num_devices,
            num_threads=options.num_threads or _num_threads(num_instances),
        )
    return ServedCluster(deployment, model, is_toy)


def _cluster(options: ServeOptions) -> ClusterDescription:
    if options.cluster is not None:
        cluster = read_cluster(options.cluster)
        return cluster if options.model is None else replace(cluster, model=options.model)
    if options.model is None:
        return read_cluster(TOY_CLUSTER)
    return ClusterDescription("one-instance", options.model, (InstanceGroup(_profile_here(options.backend)),))


def _profile_here(backend_name: str | None) -> str:
    """The spec sheet of the best device of this machine."""
    if backend_name == NO_BACKEND:
        return CPU_PROFILE
    backend = get_backend(backend_name)
    if backend.name == CPU_BACKEND:
        return CPU_PROFILE
    try:
        device = backend.get_device_info(0).name
    except RuntimeError as error:  # the driver's, be it too old or its device busy
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(f"device 0 of backend {backend.name!r} cannot be used: {first_line}") from error
    profile = _profile_of_device(device, list_profiles())
    if profile is None:
        raise UserError(f"there is no profile of this {device}; describe it in a cluster file and give it by --cluster")
    return profile


def _profile_of_device(device_name: str, profiles: Iterable[str]) -> str | None:
    """The spec profile of the device that a driver calls so: ``NVIDIA H200`` is ``h200/spec``."""
    words = re.split(r"[^a-z0-9]+", device_name.lower())
    by_device = {name.partition("/")[0]: name for name in profiles if name.endswith("/spec")}
    return next((by_device[word] for word in words if word in by_device), None)


def _model(name: str, options: ServeOptions) -> ServedModel:
    """The model of that name: known, in a folder, or on the Hub."""
    path = Path(name)
    is_known = not path.exists() and _is_known(name)
    if path.is_dir():
        return ServedModel(path.resolve().name, load_model_config(name), path)
    if path.is_file() or (is_known and (options.load_format == "dummy" or options.backend == NO_BACKEND)):
        return ServedModel(name, load_model_config(name), None)
    if is_known and name.startswith(_WITHOUT_CHECKPOINT):
        return ServedModel(name, load_model_config(name), None)
    from backends.weights.model_folder import model_folder

    folder = model_folder(name)
    return ServedModel(name, load_model_config(str(folder)), folder)


def _is_known(name: str) -> bool:
    return name.lower() in (known.lower() for known in known_model_ids())


def _backends_of(cluster: ClusterDescription, backend: str | None) -> tuple[str, ...]:
    if backend is not None:
        return (backend,)
    return tuple(dict.fromkeys(backend_of_profile(group.profile) for group in cluster.instances))


def _num_threads(num_instances: int) -> int:
    """Of one CPU instance: what is left when the front has a core, shared out."""
    return max(1, ((os.cpu_count() or 1) - 1) // num_instances)
