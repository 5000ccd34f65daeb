"""``sagellm clusters``: the cluster files that come with the package."""

import click

from sagellm.commands.user_error import UserError


@click.group(
    epilog="\b\nMake your own:\n  sagellm clusters show h200x4-pd > mine.yaml\n  sagellm replay --cluster mine.yaml\n"
)
def clusters() -> None:
    """List and print named clusters.

    A cluster file says which model runs on which devices, in which roles, by which rules and
    limits. The same file is simulated by `replay` and deployed for serving.
    """


@clusters.command("list")
def list_command() -> None:
    """Name every cluster, with the first line of its description."""
    from sagellm.cluster.named_files import list_clusters, named_cluster_text

    names = list_clusters()
    width = max(map(len, names))
    for name in names:
        summary = named_cluster_text(name).partition("\n")[0].lstrip("# ")
        click.echo(f"{name.ljust(width)}  {summary}")


@clusters.command()
@click.argument("name")
def show(name: str) -> None:
    """Print the file of the cluster NAME, to start one's own from."""
    from sagellm.cluster.errors import suggestion
    from sagellm.cluster.named_files import list_clusters, named_cluster_text

    if name not in list_clusters():
        raise UserError(f"{name!r} is not a named cluster; {suggestion(name, list_clusters())}")
    click.echo(named_cluster_text(name), nl=False)
