"""What a step's code is, as one hash: a rule carries it as a param, so that an edit reruns the steps it can change.

The hash covers the syntax trees, docstrings left out, of the step's module and of every module of this package that it
imports, directly or through others, also inside functions. Comments, formatting and docstrings therefore rerun nothing,
and an edit of plotting code redraws figures but trains nothing.
"""

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grimp

PACKAGE = "sdtp"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# Modules that many steps import but whose edits change no result: they pass settings and devices on, raise, or record.
# What decides anything about a result, such as a schedule or a number format, has no place in them.
# What only they import does not count either. The CLI is not imported by steps; it stands here so that it never is.
NEUTRAL = frozenset(
    {
        f"{PACKAGE}.cli",
        f"{PACKAGE}.errors",
        f"{PACKAGE}.pipeline.architecture",
        f"{PACKAGE}.pipeline.block",
        f"{PACKAGE}.pipeline.config",
        f"{PACKAGE}.pipeline.devices",
        f"{PACKAGE}.pipeline.gguf_file",
        f"{PACKAGE}.pipeline.launch",
        f"{PACKAGE}.pipeline.limits",
        f"{PACKAGE}.pipeline.reading",
        f"{PACKAGE}.pipeline.step",
        f"{PACKAGE}.pipeline.target_settings",
        f"{PACKAGE}.pipeline.tracking",
    }
)

# Files of the package that a module reads are code as well.
READS = {
    f"{PACKAGE}.pipeline.html_page": (
        "pipeline/templates/page.js",
        "pipeline/templates/parts.html.j2",
        "pipeline/templates/style.css",
    ),
    f"{PACKAGE}.pipeline.paper.page": ("pipeline/templates/paper.html.j2",),
    f"{PACKAGE}.pipeline.paper.published": ("pipeline/paper/published.csv",),
    f"{PACKAGE}.pipeline.report": ("pipeline/templates/report.html.j2", "pipeline/templates/tokens.js"),
}


def code_hash(module: str) -> str:
    """SHA-256, 64 hexadecimal digits, of the code that decides what `module` does (see `modules_of`).

    Raises ValueError when the module does not exist.
    """
    digest = hashlib.sha256()
    for name in sorted(modules_of(module)):
        digest.update(f"{name} {_module_digest(name)}\n".encode())
    return digest.hexdigest()


def modules_of(module: str) -> frozenset[str]:
    """The modules of this package whose code counts for `module`: itself and what it imports, neutral ones left out.

    Imports for type checkers only do not count. Raises ValueError when the module does not exist.
    """
    imports = _import_graph()
    if module not in imports.modules:
        raise ValueError(f"module {module} does not exist in package {PACKAGE}")
    found, waiting = {module}, [module]
    while waiting:
        for name in imports.find_modules_directly_imported_by(waiting.pop()) - found - NEUTRAL:
            found.add(name)
            waiting.append(name)
    return frozenset(found)


@functools.cache
def _import_graph() -> grimp.ImportGraph:
    return grimp.build_graph(PACKAGE, exclude_type_checking_imports=True, cache_dir=None)


@functools.cache
def _module_digest(module: str) -> str:
    # The spec of the package, not of the module: finding a module's own spec would import its parents.
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0])
    path = root.joinpath(*module.split(".")[1:])
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(source.read_bytes(), filename=str(source))
    digest = hashlib.sha256(dump(tree).encode())
    for name in READS.get(module, ()):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def dump(node: ast.AST) -> str:
    """A syntax tree as text, docstrings left out: the same for the same code under every Python that runs it.

    `ast.dump` is not, since newer versions have fields that older ones lack, and print empty ones or leave them out.
    """
    parts: list[str] = []
    _write(node, parts.append)
    return "".join(parts)


def _write(value: object, out: Callable[[str], None]) -> None:
    separator = ""
    if isinstance(value, list):
        out("[")
        for item in value:
            out(separator)
            _write(item, out)
            separator = ", "
        out("]")
    elif isinstance(value, ast.AST):
        out(f"{type(value).__name__}(")
        for name in value._fields:
            field: Any = getattr(value, name, None)
            if name == "body" and isinstance(value, DOCUMENTED) and ast.get_docstring(value, clean=False) is not None:
                field = field[1:]
            if field is not None and field != []:
                out(f"{separator}{name}=")
                _write(field, out)
                separator = ", "
        out(")")
    else:
        out(repr(value))
