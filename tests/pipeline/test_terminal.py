"""Shades that can be read, marks without colours, columns of equal width, and text that cannot steer a terminal."""

from __future__ import annotations

import io
import itertools
import os
import re
import subprocess
import sys

import pytest

from sdtp.pipeline import terminal
from sdtp.pipeline.terminal import BLACK, KEPT, RAMP, WHITE, cells, columns, marked, printable, shade, shaded

CODE = re.compile("\x1b\\[48;5;(\\d+);38;5;(\\d+)m(.*?)\x1b\\[0m")
TEXTS = ["The", " people", "", " met", "\n", "there", " 人"]
STAGES = [2, 0, 1, 0, 1, 2, 1]


def luminance(colour: int) -> float:
    """Of a colour of the 256-colour cube, 0 to 1, as WCAG 2 defines it."""
    levels = (0, 95, 135, 175, 215, 255)
    index = colour - 16
    parts = (levels[index // 36] / 255, levels[index // 6 % 6] / 255, levels[index % 6] / 255)
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_later_stages_are_brighter_and_text_can_be_read() -> None:
    for stages in (1, 2, 9, len(RAMP)):
        backgrounds = []
        for stage in range(stages + 1):
            ((background, foreground, text),) = CODE.findall(shade("x", stage, stages))
            assert text == "x"
            assert int(foreground) in (BLACK, WHITE)
            one, other = sorted((luminance(int(background)), luminance(int(foreground))))
            assert (other + 0.05) / (one + 0.05) >= 4.5  # WCAG's contrast for text
            backgrounds.append(int(background))
        assert backgrounds[-1] == KEPT
        assert all(luminance(a) < luminance(b) for a, b in itertools.pairwise(backgrounds))
    many = [CODE.findall(shade("x", stage, 27))[0][0] for stage in range(27)]
    assert list(dict.fromkeys(many)) == list(map(str, RAMP))  # more stages than shades: neighbours share


def test_tokens_are_shaded_in_runs_and_lines() -> None:
    found = shaded(TEXTS, STAGES, 2)
    first, last, kept = (shade("x", stage, 2).split("x")[0] for stage in (0, 1, 2))
    assert found == (f"{kept}The\x1b[0m{first} people met\x1b[0m{last}↵\x1b[0m\n{kept}there\x1b[0m{last} 人\x1b[0m")
    assert CODE.sub(r"\3", found).replace("↵", "") == "".join(TEXTS)


def test_marks_name_the_layer() -> None:
    assert marked(TEXTS, STAGES, (4, 7)) == "The⟨4| people met⟩⟨7|↵\n⟩there⟨7| 人⟩"
    assert marked(["a\nb"], [2], (4, 7)) == "a\nb"  # what stays needs no mark


def test_control_characters_are_pictures() -> None:
    assert printable("a\x1b[31mb\r\x07\x7f\x9b0m\tc\nd") == "a␛[31mb␍␇␡\N{REPLACEMENT CHARACTER}0m\tc\nd"
    for text in (shaded(["\x1b[2J"], [0], 1), marked(["\x1b[2J"], [1], (4,)), *columns("\x1b[2J", "", 40)):
        assert "\x1b[2J" not in text


def test_columns_wrap_by_cells() -> None:
    assert cells("a人́") == 3  # one and two cells, and none for the accent
    lines = columns("one two three four\n\nfive", "人民人民人民人民人民 " + "x" * 15, 27)
    assert lines == [
        "one two      │ 人民人民人民",
        "three four   │ 人民人民",
        "             │ xxxxxxxxxxxx",
        "five         │ xxx",
    ]
    assert all(cells(line) <= 27 for line in lines)
    assert len({cells(line.split("│")[0]) for line in lines}) == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_only_where_they_are_wanted() -> None:
    assert terminal.use_colour(Terminal(), {"TERM": "xterm"})
    assert terminal.use_colour(Terminal(), {"TERM": "xterm", "NO_COLOR": ""})  # empty is not set, says no-color.org
    assert not terminal.use_colour(Terminal(), {"TERM": "xterm", "NO_COLOR": "1"})
    assert not terminal.use_colour(Terminal(), {"TERM": "dumb"})
    assert not terminal.use_colour(io.StringIO(), {"TERM": "xterm"})


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_reader_that_leaves_is_no_fault(encoding: str) -> None:
    code = "from sdtp.pipeline.terminal import tell\nfor _ in range(10000): tell('人 a line that is told')"
    found = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "{code}" | head -1; echo "${{PIPESTATUS[0]}}"'],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.splitlines() == [f"{'人' if encoding == 'utf-8' else '?'} a line that is told", "1"]
    assert found.stderr == ""
