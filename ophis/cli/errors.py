"""Mistakes of the user, as opposed to the program's: one line, no traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Its text is shown after `ophis: error:`."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Within it, what the library raises about its input is the user's mistake: a file, a value, a missing extra."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise UserError(str(error)) from error
