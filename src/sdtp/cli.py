"""`sdtp STEP ...`: maps a step's name to its module and calls it, nothing else.

No step is imported before it is asked for, so that `sdtp --help` is instant.
"""

import argparse
import ast
import errno
import importlib
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from sdtp.errors import UserError
from sdtp.pipeline.launch import process_name, speaks
from sdtp.pipeline.reading import out_of_memory

LEASE = "lease"
# What a person calls; Snakemake calls the other steps.
TOOLS = ("doctor", "show", "compare", "verify", "recommend", "tune-schedule", "track", LEASE)
LOGGER = logging.getLogger("sdtp.cli")  # also where this file is run as `python -m sdtp.cli`
_STEPS = Path(__file__).parent / "pipeline" / "steps"


def steps() -> dict[str, Path]:
    """Name of each step, as the command line writes it, and the file of its module."""
    paths = sorted(path for path in _STEPS.glob("*.py") if not path.stem.startswith("_"))
    return {path.stem.replace("_", "-"): path for path in paths}


def _modules() -> dict[str, Path]:
    """`steps`, and what is called like one."""
    return {**steps(), LEASE: _STEPS.parent / "devices.py"}


def _summary(path: Path) -> str:
    # Read, not imported: a step's module imports torch.
    docstring = ast.get_docstring(ast.parse(path.read_bytes()))
    return docstring.splitlines()[0] if docstring else ""


def _listed(names: Iterable[str]) -> list[str]:
    """A line for each: its name, and what it does."""
    modules = _modules()
    width = max(map(len, modules))
    # The module of the lease is about devices in general.
    said = {LEASE: "Runs a command on GPUs that nobody else is using."}
    return [f"  {name:<{width}}  {said.get(name) or _summary(modules[name])}" for name in names]


def _options() -> argparse.ArgumentParser:
    """What can stand before a step's name."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--version", action="version", version=f"sdtp {version('sdtp')}")
    parser.add_argument("--log", type=Path, metavar="FILE", help="also write messages to this file")
    level = parser.add_mutually_exclusive_group()
    level.add_argument("-q", "--quiet", action="store_true", help="warnings and errors only, no progress bars")
    level.add_argument("-v", "--verbose", action="store_true", help="more messages, of libraries too")
    parser.add_argument("--debug", action="store_true", help="show tracebacks, and debug messages")
    return parser


def _parser() -> argparse.ArgumentParser:
    names = [*steps(), LEASE]
    parser = argparse.ArgumentParser(
        prog="sdtp",
        description="Tools around token pruning, and the steps of its workflow, which Snakemake calls; "
        "`sdtp STEP --help` explains one.",
        epilog="\n".join(["tools:", *_listed(TOOLS), "", "steps:", *_listed(n for n in names if n not in TOOLS)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[_options()],
    )
    parser.add_argument("step", choices=names, metavar="STEP", help="one of the tools and steps below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the step")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one step; returns the exit code: 0, or 1 after a fault of input, disk or memory, told in one line.

    Ctrl-C ends the process as that signal does, so that whoever started it knows.
    """
    if "_ARGCOMPLETE" in os.environ:  # a shell asks, see sdtp.completion
        importlib.import_module("sdtp.completion").complete(_options(), _modules(), os.environ.get("COMP_LINE", ""))
    parser = _parser()
    if argv == [] or (argv is None and len(sys.argv) == 1):
        parser.print_help(sys.stderr)
        return 2
    args = parser.parse_args(argv)
    # Of a step that keeps a log, what was called and how long it took belong in it; a person at a terminal knows.
    told = logging.DEBUG if args.log is None else logging.INFO
    module = "sdtp.pipeline.devices" if args.step == LEASE else f"sdtp.pipeline.steps.{args.step.replace('-', '_')}"
    started = time.monotonic()
    try:
        _configure_logging(args)
        if args.step != LEASE:  # which becomes the command it runs
            LOGGER.log(told, "sdtp %s: %s", version("sdtp"), shlex.join([args.step, *args.arguments]))
        importlib.import_module(module).main(args.arguments)
    except KeyboardInterrupt:
        LOGGER.error("%s: interrupted", args.step)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except Exception as error:
        fault = _fault(error, args)
        if fault is not None and not args.debug:
            LOGGER.error("error: %s", fault)
            return 1
        # Python prints the traceback to stderr on its own; this puts it into the log file as well.
        if args.log is not None and args.log.exists():
            _log_file_only(args.log, error)
        raise
    LOGGER.log(told, "%s: done in %.1f s", args.step, time.monotonic() - started)
    return 0


# What a line about a file ends with, by the number of the fault.
_REMEDIES = {
    errno.ENOSPC: "free some space, then run this again",
    errno.EDQUOT: "free some space, then run this again",
    errno.EROFS: "mount it to be written, or run in another folder",
    errno.EACCES: "give this user the right to it, or run as its owner",
    errno.EPERM: "give this user the right to it, or run as its owner",
    errno.ENOENT: "it was there when this was planned, or should be made first",
}


def _fault(error: Exception, args: argparse.Namespace) -> str | None:
    """One line for a fault that is not the program's: of input, of a file, of memory; None for any other."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        remedy = _REMEDIES.get(error.errno)
        return f"{os.fsdecode(error.filename)}: {error.strerror}" + (f"; {remedy}" if remedy else "")
    if out_of_memory(error):
        output = args.arguments[args.arguments.index("--output") + 1] if "--output" in args.arguments else "its output"
        return (
            f"{args.step}: out of memory before {output} was made; "
            "run fewer jobs at once, with smaller batches or shorter prompts, or on a larger machine"
        )
    return None


def _configure_logging(args: argparse.Namespace) -> None:
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    # Of processes that were launched together the first one speaks, and the others of their own failures only.
    first = speaks(os.environ)
    name = "" if first else process_name(os.environ)
    if args.log is not None:
        args.log.parent.mkdir(parents=True, exist_ok=True)
        if first:
            args.log.write_text("", encoding="utf-8")
        # Appended to: what launched the processes has it open as well, and one that fails writes to it.
        handlers.append(logging.FileHandler(args.log, mode="a", encoding="utf-8", delay=not first))
    libraries, own = logging.WARNING, logging.INFO
    # What tqdm reads when a step imports it.
    if args.quiet:
        own = logging.WARNING
        os.environ["TQDM_DISABLE"] = "1"
    elif not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")  # seconds between the lines of a bar in a file
    if args.verbose:
        libraries, own = logging.INFO, logging.DEBUG
    if not first:
        libraries = own = logging.ERROR
    if args.debug:
        own = logging.DEBUG
    line = f"{name}: %(message)s" if name else "%(message)s"
    logging.basicConfig(level=libraries, format=line, handlers=handlers, force=True)
    logging.getLogger("sdtp").setLevel(own)
    logging.captureWarnings(True)
    logging.raiseExceptions = args.debug  # a full disk under the log is no fault of the step's


def _log_file_only(log: Path, error: Exception) -> None:
    import traceback

    name = process_name(os.environ)
    lines = [f"{name} failed:\n"] if name else []
    text = "".join([*lines, *traceback.format_exception(error)])
    # In one piece: where one process fails, others that waited for it fail at the same time.
    with log.open("ab", buffering=0) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


if __name__ == "__main__":
    sys.exit(main())
