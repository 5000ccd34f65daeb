"""Where a replay runs: which clusters are simulated, and which servers are asked."""

from collections.abc import Sequence
from dataclasses import dataclass

from sagellm.commands.output_set import OutputPaths
from sagellm.commands.user_error import UserError
from sagellm.load_client.endpoint import Endpoint, parse_base_url

SIMULATION = "sim"


@dataclass(frozen=True, slots=True)
class ReplayTargets:
    """At least one of the two is not empty."""

    clusters: tuple[str, ...]  # files or names of those that are simulated
    servers: tuple[Endpoint, ...]


def choose_targets(
    on: Sequence[str], clusters: tuple[str, ...], default_clusters: tuple[str, ...], api_key: str | None
) -> ReplayTargets:
    """From the words of ``--on`` and ``--cluster``.

    Raises:
        UserError: one is neither ``sim`` nor a server's address, or clusters are given that nobody simulates.
    """
    servers = tuple(Endpoint(_base_url(word), api_key) for word in on if word != SIMULATION)
    if SIMULATION in on:
        return ReplayTargets(clusters or default_clusters, servers)
    if clusters:
        raise UserError("--cluster names what is simulated, but --on names servers only; add --on sim, or drop it")
    return ReplayTargets((), servers)


def check_outputs(targets: ReplayTargets, outputs: OutputPaths) -> None:
    """Raises UserError where an output is wanted that only a simulation gives, and none is run."""
    if targets.clusters:
        return
    for option, path in (("--log", outputs.log), ("--perfetto", outputs.perfetto)):
        if path is not None:
            raise UserError(f"{option} writes what the machines decided, which a server does not tell; add --on sim")


def _base_url(word: str) -> str:
    try:
        return parse_base_url(word)
    except ValueError as error:
        raise UserError(f"--on: {error}, or sim") from error
