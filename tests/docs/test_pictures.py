"""The committed pictures are the ones that the script draws, whole, and legible on light and on dark."""

import re
from xml.etree import ElementTree

import pytest

from docs.draw import FOLDER, PICTURES


@pytest.mark.parametrize("name", PICTURES)
def test_committed_picture_is_the_drawn_one(name):
    svg = PICTURES[name]().svg()
    assert (FOLDER / f"{name}.svg").read_text(encoding="utf-8") == svg, "run python docs/draw.py"
    root = ElementTree.fromstring(svg)
    assert "prefers-color-scheme: dark" in svg
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        assert 0 <= float(text.get("x")) <= PICTURES[name]().width, text.text


def test_every_class_that_is_drawn_has_a_colour_on_both():
    for draw in PICTURES.values():
        light, dark = draw().svg().partition("@media")[::2]
        style = light.partition("<style>")[2]
        for kind in set(re.findall(r'class="([\w-]+)"', "".join(draw().parts))) - {"quiet", "back", "mono", "bold"}:
            assert f".{kind}{{" in style and f".{kind}{{" in dark, kind
