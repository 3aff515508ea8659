"""The comparison of runs on corrupted texts."""

from __future__ import annotations

import json

import pytest

from data.noise import CORRUPTIONS
from experiments.robustness import Arguments, compare
from training.errors import ConfigError


def test_means_over_severities_and_seeds_and_differences_of_equal_seeds(tmp_path):
    drops = {"plain": (0.1, 0.3), "eda": (0.06, 0.22), "other": (0, 0.3)}  # by seed: what each severity takes away
    runs = [tmp_path / name for name in ("plain-s0", "plain-s1", "eda-s0", "eda-s1", "other-s1")]
    for run in runs:
        run.mkdir()
        name, _, seed = run.name.partition("-s")
        drop = drops[name][int(seed)]
        clean = 0.8 if name == "eda" else 0.9
        lost = {corruption: [clean, *[clean - k * drop for k in (0.5, 1, 1, 1.5)]] for corruption in CORRUPTIONS}
        lost["markup"][1] -= 0.24  # a mean of 0.06 over the severities, 0.01 over the corruptions
        (run / "noise.json").write_text(json.dumps(lost))
    assert compare(Arguments(tuple(runs), tmp_path / "out")) == 0
    _, _, plain, eda, other = (tmp_path / "out" / "robustness.md").read_text().splitlines()
    assert plain == "| plain | 2 | 90.00 | 70.00 | 70.00 | 70.00 | 64.00 | 70.00 | 70.00 | 69.00 |  |"
    # The differences are -6 and -2: mean -4, standard error |-6 + 2| / 2.
    assert eda == "| eda | 2 | 80.00 | 66.00 | 66.00 | 66.00 | 60.00 | 66.00 | 66.00 | 65.00 | -4.00 ± 2.00 |"
    assert other == "| other | 1 | 90.00 | 60.00 | 60.00 | 60.00 | 54.00 | 60.00 | 60.00 | 59.00 | +0.00 |"
    assert (tmp_path / "out" / "robustness.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(ConfigError, match="a second run folder named eda-s1"):
        compare(Arguments((*runs, runs[3]), tmp_path / "other"))
    each = ['"abcde"', "[0.5]", "[null, 0.5, 0.5, 0.5, 0.5]"]
    damaged = ["{" + ", ".join(f'"{corruption}": {one}' for corruption in CORRUPTIONS) + "}" for one in each]
    for content in ("", "[]", "{}", "[" * 100_000, *damaged):
        (runs[0] / "noise.json").write_text(content)
        with pytest.raises(ConfigError, match=r"plain-s0/noise\.json: missing or incomplete; run first: .* --noise"):
            compare(Arguments(tuple(runs), tmp_path / "other"))
    with pytest.raises(ConfigError, match="at least one run"):
        compare(Arguments(()))
    assert not (tmp_path / "other").exists()
