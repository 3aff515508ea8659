"""The diffs of docs/architecture.md apply to the code as it is, and do what is said of them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("lora", "roberta", "data", "ops")

USES = {
    "lora/inject.py": """
import torch
from lora import LoRAConfig, count_parameters, inject_lora
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 4))
inject_lora(model, LoRAConfig(rank=4, target_modules=("0",), modules_to_save=("1",), train_A=False))
assert count_parameters(model).trainable == 64 * 4 + 64 * 4 + 4
""",
    "data/sources.py": """
from pathlib import Path
from data.sources import DataConfig, load_source
Path("sst").mkdir()
for name, count in (("train", 40), ("dev", 10)):
    rows = [f"{('bad', 'good')[i % 2]} film {i}\\t{i % 2}\\n" for i in range(count)]
    Path("sst", f"{name}.tsv").write_text("sentence\\tlabel\\n" + "".join(rows))
text = load_source(DataConfig(source="sst2", directory="sst"), seed=0)
assert text.label_names == ("negative", "positive") and len(text.test.texts) == 10
assert [text.label_names[label] == "positive" for label in text.train.labels] == ["good" in t for t in text.train.texts]
""",
    "roberta/config.py": """
import torch, transformers
from roberta.config import RobertaConfig
from roberta.weights import load_checkpoint
sizes = dict(vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40)
config = transformers.XLMRobertaConfig(**sizes, max_position_embeddings=34, type_vocab_size=1, num_labels=3)
theirs = transformers.XLMRobertaForSequenceClassification(config).eval()
theirs.save_pretrained("xlmr")
ours = load_checkpoint("xlmr", RobertaConfig.from_file("xlmr/config.json")).eval()
ids = torch.randint(3, 60, (4, 9))
mask = torch.ones_like(ids)
torch.testing.assert_close(ours(ids, mask), theirs(ids, attention_mask=mask).logits)
""",
}


def diffs():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    return re.findall(r"```diff\n(.*?)```", text, flags=re.DOTALL)


def test_every_diff_is_used():
    assert [sum(f"+++ b/{path}" in diff for diff in diffs()) for path in USES] == [1, 1, 1] and len(diffs()) == 3


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git to apply a diff")
@pytest.mark.parametrize("path", USES)
def test_a_diff_applies_and_works(path, tmp_path):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (diff,) = (diff for diff in diffs() if f"+++ b/{path}" in diff)

    def run(*command, stdin=None):
        done = subprocess.run(command, cwd=tmp_path, input=stdin, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    before = run(sys.executable, "-c", USES[path])
    assert before[0] != 0, "the code does this without the diff"
    shutil.rmtree(tmp_path / "sst", ignore_errors=True)
    shutil.rmtree(tmp_path / "xlmr", ignore_errors=True)
    assert run("git", "apply", "-", stdin=diff) == (0, "")
    code, shown = run(sys.executable, "-c", USES[path])
    assert code == 0, shown
