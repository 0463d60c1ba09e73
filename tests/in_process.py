"""The command line, run in this process."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

from evit_deploy.cli import main


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line on stderr, which must be the error."""
        line = self.err.splitlines()[-1]
        assert line.startswith("evit-deploy: error: "), self.err
        return line


def cli(*arguments: str | Path) -> Outcome:
    """`evit-deploy ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())
