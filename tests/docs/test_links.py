"""Links in the documents: local files exist, and the headings and definitions that are named are in them."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def outside_code_blocks(path):
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(path):
    """GitHub's anchor of each heading: lower case, hyphens for spaces, punctuation removed."""
    headings = re.findall(r"^#+ (.+)$", outside_code_blocks(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def definitions(node, prefix=""):
    """Qualified names of all functions, classes and methods."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + child.name
            yield from definitions(child, f"{prefix}{child.name}.")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_to_what_they_name(document):
    for text, link in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", outside_code_blocks(document)):
        if re.match(r"\w+:", link):  # a URL
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{link}: no such file"
        if target.suffix == ".py":
            assert not anchor, f"{link}: link to the file, without a line number"
            name = text.strip("`")
            if re.fullmatch(r"\w+(\.\w+)*", name):
                found = definitions(ast.parse(target.read_text(encoding="utf-8")))
                assert name in found, f"[{text}]({link}): the file defines no {name}"
        elif anchor:
            assert anchor in anchors(target), f"{link}: no such heading"
