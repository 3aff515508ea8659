"""Fixtures for all tests."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real text and the real vocabulary, beside the project where there are; never needed."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "ag_news_csv").is_dir():
        pytest.skip("no ../shared folder with AG News text and RoBERTa's vocabulary")
    return folder
