"""The classical baseline: TF-IDF of words and word pairs, then logistic regression, on the data of a run's settings.

    python -m benchmarks.tfidf experiments/quickstart.toml

The strength of the regularisation is chosen on the same validation rows on which a LoRA run chooses its epoch; the
final model is then fitted on every training text, including the validation rows.
"""

from __future__ import annotations

import sys
import time

from data.sources import Split, load_source
from training.command_line import run_command
from training.config import parse_command_line

REGULARISATIONS = (1.0, 10.0, 100.0)


def main() -> int:
    """Choose C on validation, fit on train + validation, print the test accuracy. Returns the exit code."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline, make_pipeline

    def fit(split: Split, regularisation: float) -> Pipeline:
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
        return make_pipeline(words, LogisticRegression(C=regularisation, max_iter=1000)).fit(split.texts, split.labels)

    config = parse_command_line(sys.argv[1:])
    text = load_source(config.data, config.train.seed).cleaned(config.data.cleaning)
    started = time.perf_counter()
    scores = {c: fit(text.train, c).score(text.validation.texts, text.validation.labels) for c in REGULARISATIONS}
    chosen = max(scores, key=scores.__getitem__)
    everything = Split(text.train.texts + text.validation.texts, text.train.labels + text.validation.labels)
    accuracy = fit(everything, chosen).score(text.test.texts, text.test.labels)
    seconds = time.perf_counter() - started
    print(f"{text.origin}: TF-IDF + logistic regression (C = {chosen:g}), test accuracy {100 * accuracy:.2f} %", end="")
    print(f", {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
