"""Files rendered from templates: HTML pages without network requests, and the Markdown of a model card.

Values from data are shown as text, never as markup: HTML is escaped automatically, Markdown by the filter `md`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2

from lora.files import atomic_write


def write_page(template: str, path: Path, /, **values: Any) -> None:
    """Fill a template of training/templates and write it atomically. SVG among the values must be `Markup`."""
    write_text_atomic(path, _environment().get_template(template).render(**values))


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text file atomically: a reader sees the old file or the complete new one."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8", errors="replace")


def escape_markdown(text: str) -> str:
    """`text` as Markdown shows it literally, within one cell of a table."""
    return re.sub(r"([\\`*_~$\[\]<>|#&])", r"\\\1", re.sub(r"\s+", " ", str(text)))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=jinja2.select_autoescape(),  # by the template's name: .html, not .md
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"md": escape_markdown, "python": repr}
    return environment
