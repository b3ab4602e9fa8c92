"""The code blocks of the project's pages."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from tests.workflow.project import ROOT

PAGES = ("README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md")))
_FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", flags=re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: the file, relative to the root.
        line: of the page where the block begins, from 1.
        language: what follows the fence.
        text: what is in it.
    """

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*languages: str, page: str | None = None) -> list[Block]:
    """Every block in one of the languages, all if none is named, of one page or of all."""
    found = []
    for name in PAGES if page is None else (page,):
        text = (ROOT / name).read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            if not languages or match[2] in languages:
                found.append(Block(name, line, match[2], match[3]))
    return found


def commands(block: Block) -> list[str]:
    """The commands of a shell block: continued lines joined, comments and blank lines left out."""
    joined = re.sub(r"\\\n\s*", " ", block.text)
    lines = [re.sub(r"\s+#.*$", "", line).strip() for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def files(page: str) -> dict[str, str]:
    """The files that a page gives in whole: YAML blocks whose first line is a comment with the file's name."""
    found = {}
    for block in blocks("yaml", page=page):
        first = re.match(r"# (\S+\.yaml)\b", block.text)
        if first:
            found[first[1]] = block.text
    return found


def indented_code(page: str) -> list[str]:
    """Lines that Markdown takes for code because they are indented, outside of fences and lists."""
    text = _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    return re.findall(r"(?<=\n\n)    \S.*", text)


def existing(path: str | Path) -> bool:
    """Whether the repository has it."""
    return (ROOT / path).exists()
