"""The HTML pages of a run: each one file that holds everything it shows and loads nothing."""

import base64
import hashlib
from collections.abc import Collection, Iterable, Mapping
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from sdtp.errors import UserError
from sdtp.pipeline.formats import change, memory, number, signed
from sdtp.pipeline.plotstyle import name_of
from sdtp.pipeline.results import few, smoke

MAX_BYTES = 10_000_000
TEMPLATES = files("sdtp.pipeline") / "templates"


def render(template: str, name: str, scripts: Iterable[str], remedy: str = "", **values: Any) -> str:
    """A page as HTML; equal input gives equal text.

    Args:
        template: file in templates/.
        name: what the page is called where it is refused.
        scripts: files in templates/ that the template puts into the page with `scripts`, in this order; a browser is
            told, by `script_hashes`, to run these and no other.
        remedy: what makes the page smaller.
        values: what the template shows; all text is escaped.

    Raises:
        UserError: the page is 10 MB or more.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sdtp.pipeline"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters.update(number=number, signed=signed, change=change, memory=memory, name_of=name_of, smoke=smoke)
    environment.tests.update(few=few)
    texts = [(TEMPLATES / script).read_text("utf-8") for script in scripts]
    page = environment.get_template(template).render(
        scripts=list(map(Markup, texts)),
        script_hashes=[base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts],
        **values,
    )
    size = len(page.encode())
    if size >= MAX_BYTES:
        raise UserError(f"{name} is {size / 1e6:.1f} MB; accepted: below {MAX_BYTES / 1e6:.0f} MB{remedy}")
    return page


def embedded(figures: Mapping[str, bytes], names: Collection[str]) -> dict[str, str]:
    """The figures in base64, by name.

    Raises:
        UserError: one of `names` is missing.
    """
    missing = [name for name in names if name not in figures]
    if missing:
        raise UserError(f"figures: no {', '.join(f'{name}.svg' for name in missing)}; accepted: one SVG each")
    return {name: base64.b64encode(figures[name]).decode() for name in names}
