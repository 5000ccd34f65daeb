"""The cluster files that come with the package."""

from functools import cache
from importlib.resources import files


@cache
def list_clusters() -> tuple[str, ...]:
    """Names that ``--cluster`` takes, sorted."""
    names = (entry.name for entry in files(__package__).joinpath("named").iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


def named_cluster_text(name: str) -> str:
    """The file's text, to start one's own from."""
    return files(__package__).joinpath("named", f"{name}.yaml").read_text(encoding="utf-8")
