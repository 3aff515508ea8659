"""The classical baseline: TF-IDF of words and word pairs, then logistic regression, on the data of a run's settings.

    python -m benchmarks.tfidf experiments/quickstart.toml

It sees every training text, also those that a LoRA run holds out for validation, as it chooses nothing on them.
"""

from __future__ import annotations

import sys
import time

from data.sources import load_source
from training.command_line import run_command
from training.config import parse_command_line


def main() -> int:
    """Fit on train + validation, print the accuracy on the test split."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    config = parse_command_line(sys.argv[1:])
    text = load_source(config.data, config.train.seed)
    started = time.perf_counter()
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2), LogisticRegression(C=30, max_iter=1000)
    )
    model.fit(text.train.texts + text.validation.texts, list(text.train.labels) + list(text.validation.labels))
    accuracy = model.score(text.test.texts, text.test.labels)
    print(f"{text.origin}: TF-IDF + logistic regression, test accuracy {100 * accuracy:.2f} %", end="")
    print(f" ({time.perf_counter() - started:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
