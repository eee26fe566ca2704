"""A page holds what it was filled with, as text and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import UndefinedError

from wardround.common.pages import filled


def test_every_text_is_escaped_also_in_a_template_that_is_included(tmp_path: Path):
    (tmp_path / "page.jinja").write_text("<p>{{ name }}</p>{% include 'part.jinja' %}")
    (tmp_path / "part.jinja").write_text("<i>{{ name }}</i>")
    assert filled(tmp_path / "page.jinja", name="<b>&") == "<p>&lt;b&gt;&amp;</p><i>&lt;b&gt;&amp;</i>"


def test_a_name_that_nothing_was_given_for_is_refused_and_not_left_blank(tmp_path: Path):
    (tmp_path / "page.jinja").write_text("<p>{{ name }}</p>")
    with pytest.raises(UndefinedError, match="name"):
        filled(tmp_path / "page.jinja", nmae="x")
