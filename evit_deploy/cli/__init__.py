"""The command line: one file per command, and the one place where an error becomes a line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from types import FrameType
from typing import Annotated

import typer

from evit_deploy.cli import (
    bench,
    build_trt,
    doctor,
    evaluate,
    export,
    headroom,
    inspect,
    kernels,
    models,
    quantize,
    verify,
)
from evit_deploy.cli.output import StdoutClosed, emit
from evit_deploy.cli.progress import debugging
from evit_deploy.errors import (
    EXIT_FAILED,
    EXIT_LIMIT,
    EXIT_MISSING,
    EXIT_OK,
    EXIT_USAGE,
    EvitDeployError,
)

PROGRAM = "evit-deploy"
# A shell reports a process that a signal ended as 128 + the signal's number; so does this program.
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM
EXIT_STDOUT_CLOSED = 128 + signal.SIGPIPE

app = typer.Typer(
    name=PROGRAM,
    help="Takes a trained EfficientViT checkpoint to a verified ONNX bundle, and measures it.",
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 parity failed, 4 something is missing, 5 unstable or a limit.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help is quicker, and readable at 80 columns
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for _module in (export, headroom, quantize, verify, evaluate, build_trt, bench, inspect, models, doctor):
    app.command(_module.__name__.rpartition(".")[2].replace("_", "-"))(_module.command)
app.add_typer(kernels.app, name="kernels")

# Typer brings its own copy of Click or depends on it, by version; the base of all usage errors is found through the
# one that Typer exports.
_UsageErrorBase: type[Exception] = typer.BadParameter.__mro__[2]


def _print_version(wanted: bool) -> None:
    if wanted:
        from evit_deploy import __version__

        emit(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(EXIT_USAGE)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(EXIT_TERMINATED)


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that locks are released and staging folders removed on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _complain(summary: str, hint: str = "", details: Sequence[str] = ()) -> None:
    """One line on stderr: what happened, what to do; findings below it, if there are any."""
    if debugging() and sys.exc_info()[0] is not None:
        traceback.print_exc()
    line = " ".join(f"{summary}: {hint}".split() if hint else summary.split())
    sys.stderr.write("\n".join([f"{PROGRAM}: error: {line}", *(f"  {detail}" for detail in details)]) + "\n")
    sys.stderr.flush()


def _complain_about_usage(error: Exception) -> None:
    """Typer's own usage errors, in the same one line."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else PROGRAM
    possibilities = getattr(error, "possibilities", None)
    if possibilities:
        name = getattr(error, "option_name", "")
        closest = get_close_matches(name, possibilities, n=1, cutoff=0)[0]
        _complain(f"no such option {name} of {path}", f"did you mean {closest}?")
        return
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    _complain(message.rstrip("."), "" if "Did you mean" in message else f"see {path} --help")


def _run(arguments: list[str]) -> int:
    """Parse and run; every error it knows has become a line on stderr when this returns."""
    command = typer.main.get_command(app)
    try:
        with command.make_context(PROGRAM, arguments) as context:
            command.invoke(context)
    except typer.Exit as error:
        return error.exit_code
    except EvitDeployError as error:
        _complain(error.summary, error.hint, error.details)
        return error.exit_code
    except StdoutClosed:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it at exit
        return EXIT_STDOUT_CLOSED
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted", "nothing was left half done; run the same command again")
        return EXIT_INTERRUPTED
    except ModuleNotFoundError as error:
        _complain(f"the Python package {error.name} is not installed", f"see {PROGRAM} doctor")
        return EXIT_MISSING
    except MemoryError:
        _complain("out of memory", "use a smaller --batch or --image-size, or a machine with more")
        return EXIT_LIMIT
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _complain(f"{error.strerror or error}{where}", "mend that and run the same command again")
        return EXIT_FAILED
    except Exception as error:  # noqa: BLE001 - whatever is left is our own mistake, and still ends in one line
        if isinstance(error, _UsageErrorBase):
            _complain_about_usage(error)
            return EXIT_USAGE
        hint = "the traceback is above" if debugging() else "set EVIT_DEPLOY_DEBUG=1 for the traceback and report it"
        _complain(f"internal error, {type(error).__name__}: {error}", hint)
        return EXIT_FAILED
    return EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments without the program's name; those of the process by default.

    Returns:
        The exit code; see docs/exit_codes.md.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a class name must not break an ASCII terminal
    with _sigterm_unwinds():
        return _run(list(sys.argv[1:] if argv is None else argv))
