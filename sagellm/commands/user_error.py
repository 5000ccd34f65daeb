"""What the user can put right: one sentence on standard error, and exit code 2."""

from collections.abc import Iterator
from contextlib import contextmanager

import click

EXIT_CODE = 2


class UserError(click.ClickException):
    """A sentence for the user."""

    exit_code = EXIT_CODE


@contextmanager
def user_errors(*error_types: type[Exception]) -> Iterator[None]:
    """Turn errors whose messages are written for users into a ``UserError``."""
    try:
        yield
    except error_types as error:
        raise UserError(str(error)) from error
