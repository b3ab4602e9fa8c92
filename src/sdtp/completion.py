"""Shell completion of `sdtp`: the steps' names, and the options of the step that is being typed.

Options are read from the source of the step's module: to import it would take seconds, at every press of the key.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# What of an argument's declaration decides what may follow on the command line.
_KEPT = ("action", "choices", "nargs", "help", "metavar")


def complete(parser: argparse.ArgumentParser, modules: Mapping[str, Path], line: str) -> None:
    """Answer a shell that asks what could come next, and end the process; return where none asks.

    Args:
        parser: with the options that come before a step's name; names of steps are added to it.
        modules: of each step the file of its module.
        line: what has been typed; options are read of steps that are named in it.
    """
    import argcomplete

    with_options(parser, modules, line)
    argcomplete.autocomplete(parser)


def with_options(parser: argparse.ArgumentParser, modules: Mapping[str, Path], line: str) -> None:
    """Add every step to `parser`, with its arguments where `line` names it."""
    words = line.split()
    steps = parser.add_subparsers(metavar="STEP")
    for name, path in modules.items():
        step = steps.add_parser(name)
        for flags, kept in arguments(path) if name in words else ():
            step.add_argument(*flags, **kept)


def arguments(path: Path) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """The names and settings of every argument that a module's `add_argument` calls declare, as far as written out."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            flags = [word for word in map(_literal, node.args) if isinstance(word, str)]
            settings = {keyword.arg: _literal(keyword.value) for keyword in node.keywords if keyword.arg in _KEPT}
            if flags:
                yield flags, {str(name): value for name, value in settings.items() if value is not None}


def _literal(node: ast.expr) -> Any:
    """The value of an expression without names in it; None of any other."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
