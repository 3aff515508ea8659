"""Links from documents to definitions: `[LoRALinear.forward](../lora/linear.py#L65-L71)`.

    python docs/relink.py            rewrite the line numbers of all links to where the definitions are now
    python docs/relink.py --check    change nothing; exit code 1 if a link points elsewhere

The name in brackets, in backticks or not, is a function, a class or Class.method of the linked file; the link spans
its lines, from `def` or `class` to its end. tests/docs/test_links.py runs the check.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\[`?(?P<name>[\w.]+)`?\]\((?P<path>[^)#\s]+\.py)(?:#L(?P<first>\d+)(?:-L(?P<last>\d+))?)?\)")


class LinkError(ValueError):
    """A link that leads nowhere: one line that names the document, the link and the mend."""


@functools.cache
def definitions(path: Path) -> dict[str, tuple[int, int]]:
    """First and last line of every function, class and method of a Python file, by its qualified name."""
    found: dict[str, tuple[int, int]] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found[prefix + child.name] = (child.lineno, child.end_lineno or child.lineno)
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return found


def relinked(document: Path, text: str) -> tuple[str, list[str]]:
    """`text` of a document with all links put right, and what each link that was wrong is now.

    Raises LinkError if a file or a definition is not there, which only a person can mend.
    """
    changes: list[str] = []

    def mend(match: re.Match[str]) -> str:
        name, target = match["name"], (document.parent / match["path"]).resolve()
        if not target.is_file():
            raise LinkError(f"{document.name}: {match[0]}: no such file; name one relative to the document")
        if name not in definitions(target):
            raise LinkError(f"{document.name}: {match[0]}: {target.name} defines no {name}; name what took its place")
        first, last = definitions(target)[name]
        lines = f"#L{first}" + (f"-L{last}" if last > first else "")
        right = f"{match[0].partition('](')[0]}]({match['path']}{lines})"
        if right != match[0]:
            changes.append(f"{document.name}: {right}")
        return right

    return _LINK.sub(mend, text), changes


def documents() -> list[Path]:
    """The documents whose links are kept: README.md and docs/*.md."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(arguments: list[str]) -> int:
    """Rewrite the links, or with --check only look. Returns the exit code."""
    if arguments not in ([], ["--check"]):
        print("usage: python docs/relink.py [--check]", file=sys.stderr)
        return 2
    wrong: list[str] = []
    try:
        for document in documents():
            text, changes = relinked(document, document.read_text(encoding="utf-8"))
            wrong += changes
            if changes and not arguments:
                document.write_text(text, encoding="utf-8")
    except LinkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*wrong, f"{len(wrong)} links {'point elsewhere' if arguments else 'rewritten'}", sep="\n")
    return 1 if wrong and arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
