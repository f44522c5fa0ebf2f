"""Rendering of templates, in which every value is escaped, and of complete pages."""

from __future__ import annotations

from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template
from markupsafe import Markup

from ldm import __version__


@cache
def _template(text: str) -> Template:
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)


def render(template: str, **values: Any) -> Markup:
    """Return a Jinja template filled with values; text is escaped, and :class:`markupsafe.Markup` is not."""
    return Markup(_template(template).render(values).strip())


def render_page(title: str, template: str, **values: Any) -> Markup:
    """Return a page without references to other files, whose header and main part are a template filled with values."""
    return render(
        _PAGE,
        title=title,
        content=render(template, **values),
        style=_asset("style.css"),
        script=_asset("script.js"),
        version=__version__,
        now=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _asset(name: str) -> Markup:
    return Markup(Path(__file__).with_name(name).read_text(encoding="utf-8"))


_PAGE = """
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline';
script-src 'unsafe-inline'">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<style>{{ style }}</style>
</head>
<body>
{{ content }}
<footer>Made by ldm {{ version }} on {{ now }}.</footer>
<script>{{ script }}</script>
</body>
</html>
"""
