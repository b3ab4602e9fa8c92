"""What tools print for people: shades of 256-colour terminals, columns, and text that cannot steer the terminal."""

from __future__ import annotations

import itertools
import os
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO

# From dark to bright in the colour cube of 256-colour terminals; the brightest is for what was never removed.
RAMP = (53, 55, 24, 61, 30, 36, 71, 77, 114, 150)
KEPT = 226
BLACK, WHITE = 16, 231
# From this shade on black text is easier to read than white.
_FIRST_BRIGHT = 4

_NEW_LINE = "↵"
_RESET = "\x1b[0m"


def use_colour(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether to write colours: to a terminal that has them, where NO_COLOR (https://no-color.org) is not set."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def shade(text: str, stage: int, stages: int) -> str:
    """`text` on the background that stands for a stage: the later it removed, the brighter; `stages` for never."""
    if stage == stages:
        background, dark = KEPT, False
    else:
        index = 0 if stages == 1 else round(stage * (len(RAMP) - 1) / (stages - 1))
        background, dark = RAMP[index], index < _FIRST_BRIGHT
    return f"\x1b[48;5;{background};38;5;{WHITE if dark else BLACK}m{text}{_RESET}"


def shaded(texts: Sequence[str], stages: Sequence[int], count: int) -> str:
    """Tokens one after the other, each shaded by the stage that removed it.

    Args:
        texts: of the tokens.
        stages: for each the 0-based stage that removed it, `count` where none did.
        count: number of stages.
    """
    return "".join(_lines(text, stage, count) for stage, text in _runs(texts, stages))


def marked(texts: Sequence[str], stages: Sequence[int], layers: Sequence[int]) -> str:
    """The same without colour: ⟨layer|text⟩ around what was removed before that layer."""
    return "".join(
        printable(text) if stage == len(layers) else f"⟨{layers[stage]}|{_seen(text)}⟩"
        for stage, text in _runs(texts, stages)
    )


def printable(text: str) -> str:
    """`text` with pictures in place of control characters, line breaks and tabs apart: a prompt may hold anything."""
    return "".join(map(_picture, text))


def columns(left: str, right: str, width: int) -> list[str]:
    """Two texts beside each other in lines of at most `width` cells, wrapped at spaces where there are any."""
    half = max(8, (width - 3) // 2)
    pairs = itertools.zip_longest(_wrapped(left, half), _wrapped(right, half), fillvalue="")
    return [f"{one}{' ' * (half - cells(one))} │ {other}".rstrip() for one, other in pairs]


def cells(text: str) -> int:
    """Columns of a terminal that `text` takes: two for wide characters, none for what joins the one before."""
    return sum(map(_width, text))


def tell(text: str) -> None:
    """Write lines to standard output, with ? for characters that its encoding lacks; quietly end the process where
    nobody reads them any more, as under `head`."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would write what is left in the buffer when it ends, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _runs(texts: Sequence[str], stages: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Stage and joined text of neighbouring tokens that share it; tokens without text of their own are in no run."""
    pairs = ((stage, text) for stage, text in zip(stages, texts, strict=True) if text)
    for stage, run in itertools.groupby(pairs, key=lambda pair: pair[0]):
        yield stage, "".join(text for _, text in run)


def _lines(text: str, stage: int, count: int) -> str:
    """Shaded line by line: a background that goes on over a line break would colour the rest of the line."""
    return "\n".join(shade(line, stage, count) if line else "" for line in _seen(text).split("\n"))


def _seen(text: str) -> str:
    """`printable`, line breaks marked as well: they are removed like other tokens."""
    return printable(text).replace("\n", f"{_NEW_LINE}\n")


def _picture(character: str) -> str:
    if character in "\n\t":
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    return "\N{REPLACEMENT CHARACTER}" if 0x80 <= code < 0xA0 else character


def _width(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _wrapped(text: str, width: int) -> list[str]:
    return [line for paragraph in printable(text).expandtabs(4).split("\n") for line in _broken(paragraph, width)]


def _broken(paragraph: str, width: int) -> Iterator[str]:
    """Lines of at most `width` cells; the space at which one ends is in none."""
    while cells(paragraph) > width:
        taken, end = 0, 0
        while taken + _width(paragraph[end]) <= width:
            taken += _width(paragraph[end])
            end += 1
        space = end if paragraph[end] == " " else paragraph.rfind(" ", 0, end)
        if space > 0:
            yield paragraph[:space]
            paragraph = paragraph[space + 1 :]
        else:
            yield paragraph[:end]
            paragraph = paragraph[end:]
    yield paragraph
