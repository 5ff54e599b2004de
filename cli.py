"""The `compress` program. Its commands are in mergekit_plus/commands."""

from __future__ import annotations

import gc
import re
import sys
import warnings

from mergekit_plus.commands import app

_OWN_STEP = r"^compress ((?:adapter )?(\w+)): (?:step 1, )?\2(?:_adapters?)?: "  # what a command made of its arguments


def main() -> None:
    """Run the program: one line on stderr and exit code 2 for the user's mistakes, 1 where a check failed."""
    from mergekit_plus.errors import CheckFailed, CompressError, printable

    gc.set_threshold(100_000)  # a plan is very many small objects that live until the end: looking for garbage among them takes longer than making them
    warnings.formatwarning = lambda message, *_: printable(f"compress: warning: {message}") + "\n"
    try:
        app()
    except CompressError as error:
        message = re.sub(_OWN_STEP, r"\1: ", str(error)).removeprefix("compress ")  # a recipe made of arguments goes by its command
        print(printable(f"compress: {message}"), file=sys.stderr)
        sys.exit(2)
    except CheckFailed as error:
        print(printable(f"compress: check failed: {error}"), file=sys.stderr)
        sys.exit(1)
