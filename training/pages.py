"""Pages for a browser: one HTML file each, with nothing to load from anywhere.

What data contains is shown as text, never as markup: the templates escape it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from lora.files import atomic_write

TEMPLATES = Path(__file__).parent / "templates"


def write_page(template: str, path: Path, **values: Any) -> None:
    """Fill a template of training/templates and write it, whole or not at all. Values that are SVG are `Markup`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_whole(path, environment.get_template(template).render(**values))


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8", errors="replace")
