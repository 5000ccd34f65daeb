"""The command line, and with it the composition root: here it is chosen who drives the machines."""

import gc
import os
import sys
from collections.abc import Sequence

import click
from click.exceptions import NoArgsIsHelpError

from sagellm import __version__
from sagellm.commands.clusters import clusters
from sagellm.commands.log import log
from sagellm.commands.replay import replay
from sagellm.commands.serve import serve
from sagellm.commands.traces import traces
from sagellm.commands.user_error import EXIT_CODE

EPILOG = """\b
Start here:
  sagellm replay                           2,000 made-up chat requests, two clusters side by side
  sagellm replay --report report.html      the same, with pictures
  sagellm serve                            a toy model on this CPU, behind OpenAI's API
  sagellm clusters show h200x4-pd          a cluster file to start your own from
  sagellm traces list                      workloads that can be generated
"""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=EPILOG,
)
@click.version_option(__version__, prog_name="sagellm")
def cli() -> None:
    """One scheduling core for LLM serving: simulated on a laptop, deployed unchanged.

    sageLLM decides which request runs where and when. `replay` lets it decide over a recorded or
    generated trace, on a cluster that need not exist, and says what the clients would have seen. `serve`
    lets it decide over requests that arrive, on devices that do.
    """


for command in (replay, serve, traces, clusters, log):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process: 0 done, 1 a difference was found, 2 the user must act."""
    try:
        status = cli.main(args=arguments, prog_name="sagellm", standalone_mode=False)
        gc.freeze()  # The process ends: what a run leaves behind needs no last look for cycles.
        sys.exit(status)
    except NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(0)
    except click.ClickException as error:
        click.echo(f"sagellm: {error.format_message()}", err=True)
        sys.exit(EXIT_CODE)
    except click.Abort:
        click.echo("sagellm: stopped; nothing was written", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has gone. Python would complain once more when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
