"""Every link of a document to a definition still points at it."""

import pytest

from docs.relink import LinkError, documents, relinked


@pytest.mark.parametrize("document", documents(), ids=lambda document: document.name)
def test_links_point_at_the_definitions_they_name(document):
    _, wrong = relinked(document, document.read_text(encoding="utf-8"))
    assert not wrong, f"run python docs/relink.py: {wrong}"


@pytest.fixture
def document(tmp_path):
    (tmp_path / "a.py").write_text("X = 1\n\n\nclass C:\n    def f(self):\n        pass\n\n    x = 1\n")
    return tmp_path / "a.md"


def test_lines_are_put_right(document):
    text = "see [`C.f`](a.py#L1), [C](a.py) and [C](a.py#L4-L8), [a page](b.md)"
    expected = "see [`C.f`](a.py#L5-L6), [C](a.py#L4-L8) and [C](a.py#L4-L8), [a page](b.md)"
    assert relinked(document, text) == (expected, ["a.md: [`C.f`](a.py#L5-L6)", "a.md: [C](a.py#L4-L8)"])
    assert relinked(document, expected) == (expected, [])


@pytest.mark.parametrize(("link", "says"), [("[g](a.py#L1)", "defines no g"), ("[C](b.py#L1)", "no such file")])
def test_a_link_to_nothing_is_an_error_that_names_it(document, link, says):
    with pytest.raises(LinkError, match=says):
        relinked(document, link)
