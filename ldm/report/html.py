"""Rendering of templates, in which every value is escaped."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, Template
from markupsafe import Markup


@cache
def _template(text: str) -> Template:
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)


def render(template: str, **values: Any) -> Markup:
    """Return a Jinja template filled with values; text is escaped, and :class:`markupsafe.Markup` is not."""
    return Markup(_template(template).render(values).strip())
