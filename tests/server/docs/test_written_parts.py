"""The parts of docs/ that the code writes are what it would write today."""

from __future__ import annotations

import re

import pytest

from server.docs import DOCS, PARTS, updated


@pytest.mark.parametrize("part", PARTS)
def test_a_written_part_is_what_the_code_says(part: str) -> None:
    page = (DOCS / PARTS[part][0]).read_text()

    assert updated(page, part) == page, "run: make docs"


def test_every_mark_in_a_page_has_its_writer() -> None:
    marked = {
        (path.name, name)
        for path in DOCS.glob("*.md")
        for name in re.findall(r"<!-- (\w+) begin -->", path.read_text())
    }

    assert marked == {(page, part) for part, (page, _) in PARTS.items()}


def test_what_stands_around_a_part_is_left_alone() -> None:
    page = "# Title\n\n<!-- profiles begin -->\nstale\n<!-- profiles end -->\n\nMore.\n"

    written = updated(page, "profiles")

    assert written.startswith("# Title\n\n<!-- profiles begin -->\n| profile |")
    assert written.endswith("|\n<!-- profiles end -->\n\nMore.\n")
    assert updated(written, "profiles") == written


def test_a_page_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lacks <!-- settings begin -->"):
        updated("# A page", "settings")
