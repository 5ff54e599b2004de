"""`compress` in this process, where a process of its own would only be slower."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from mergekit_plus.__main__ import main


class Ended(NamedTuple):
    """How a run ended."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def line(self) -> str:
        """The one printable line of a run that was refused, with exit code 2."""
        assert (self.returncode, self.stdout) == (2, ""), self.stderr
        lines = self.stderr.removesuffix("\n").split("\n")  # those before it, on a slow machine, say how long something took
        assert all(line.isprintable() for line in lines), self.stderr
        assert [line.startswith("compress: ") for line in lines] == [False] * (len(lines) - 1) + [True]
        return lines[-1]


class Program:
    """Runs `compress` in a folder."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        patch.chdir(folder)
        patch.setattr("warnings.formatwarning", None)  # which the program sets
        self.capsys, self.patch = capsys, patch

    def __call__(self, *arguments: object) -> Ended:
        self.patch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        self.capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return Ended(code, *self.capsys.readouterr())
