"""docs/architecture.md: imports follow its arrows; its diffs apply to the code and do what the page says."""

import ast
import gc
import os
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

from tests.forked import end_if_stuck, fail_if_stuck

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("lora", "roberta", "data", "training", "tests/parity/oracle.py")
OURS = {"lora", "roberta", "data", "tests", "training", "cpu", "train", "evaluate", "experiments", "benchmarks"}

USES = {
    "lora/ssf.py": """
import torch
from lora import inject_lora, load_adapter, merge_lora, save_adapter
from tests.parity.oracle import assert_close, our_copy, ragged_batch, reference_model
from training.config import parse_config

config = parse_config({"ssf": {"target_modules": ["query", "output.dense"]}}, "ssf.toml").ssf
ours = inject_lora(our_copy(reference_model(), "base"), config)
plain = our_copy(reference_model(), "plain")
with torch.no_grad():
    for name, parameter in ours.named_parameters():
        if name.endswith((".scale", ".shift")):
            parameter.normal_(std=0.3)
    for name, layer in plain.named_modules():
        if name.endswith(("query", "output.dense")):
            adapter = ours.get_submodule(name)
            layer.weight.mul_(adapter.scale[:, None]), layer.bias.mul_(adapter.scale).add_(adapter.shift)
batch = ragged_batch([9, 4, 1])
inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
expected = plain(**inputs)
assert_close(ours(**inputs), expected, 1e-10, "logits")
save_adapter(ours, "adapter")
again = our_copy(reference_model(), "again")
load_adapter(again, "adapter")
assert_close(again.eval()(**inputs), expected, 1e-10, "logits of the file")
merge_lora(ours)
assert_close(ours(**inputs), expected, 1e-10, "logits, merged")
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
from roberta.weights import load_checkpoint
sizes = dict(vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40)
config = transformers.Data2VecTextConfig(**sizes, max_position_embeddings=34, type_vocab_size=1, num_labels=3)
theirs = transformers.Data2VecTextForSequenceClassification(config).eval()
theirs.save_pretrained("data2vec")
ours = load_checkpoint("data2vec").eval()
ids = torch.randint(3, 60, (4, 9))
mask = torch.ones_like(ids)
torch.testing.assert_close(ours(ids, mask), theirs(ids, attention_mask=mask).logits)
""",
}


# What each folder may import of this project, as the page's arrows say.
ARROWS = {"lora": set(), "roberta": set(), "cpu": set(), "data": set(), "training": {"data", "roberta", "lora"}}


@pytest.mark.parametrize("folder", ARROWS)
def test_imports_follow_the_arrows(folder):
    others = {*ARROWS, "train", "evaluate", "experiments", "benchmarks", "tests"} - {folder} - ARROWS[folder]
    for path in (ROOT / folder).rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        if path == ROOT / "lora/budget.py":
            imported -= {"roberta.config", "roberta.model"}  # the command's, inside its functions
        assert not others & {str(name).split(".")[0] for name in imported}, path


def diffs():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    return re.findall(r"```diff\n(.*?)```", text, flags=re.DOTALL)


def test_every_diff_is_used():
    assert [sum(f"+++ b/{path}" in diff for diff in diffs()) for path in USES] == [1, 1, 1] and len(diffs()) == 3


@pytest.fixture(scope="module")
def libraries():
    """What the uses compare with is imported once, and not in every fork."""
    import peft
    import transformers

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork has only the thread that made it
    yield peft, transformers
    torch.set_num_threads(before)


def in_a_fork(folder, code):
    """Run code in a fork, with this project's modules from `folder` alone: (exit code, what it printed)."""
    shown = folder / "shown.txt"
    pid = os.fork()
    if pid == 0:
        result = 1
        try:
            sys.stdout = sys.stderr = shown.open("w", buffering=1)
            end_if_stuck()
            gc.freeze()
            os.chdir(folder)
            for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
                del sys.modules[name]
            sys.path[:] = [str(folder), *(one for one in sys.path if one and Path(one).resolve() != ROOT)]
            sys.path_importer_cache.clear()
            exec(compile(code, "use", "exec"), {"__name__": "__main__"})
            files = [
                Path(module.__file__)
                for name, module in sys.modules.items()
                if name.split(".")[0] in OURS and getattr(module, "__file__", None)
            ]
            assert files and all(file.is_relative_to(folder) for file in files), files
            result = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(result)
    _, status = os.waitpid(pid, 0)
    fail_if_stuck(shown.read_text())
    return os.waitstatus_to_exitcode(status), shown.read_text()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git to apply a diff")
@pytest.mark.parametrize("path", USES)
def test_a_diff_applies_and_works(path, tmp_path, libraries):
    before, after = tmp_path / "before", tmp_path / "after"
    for copy in (before, after):
        for name in COPIED:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, copy / name)
    (diff,) = (diff for diff in diffs() if f"+++ b/{path}" in diff)

    assert in_a_fork(before, USES[path])[0] != 0, "the code does this without the diff"
    applied = subprocess.run(["git", "apply", "-"], cwd=after, input=diff, capture_output=True, text=True)
    assert (applied.returncode, applied.stdout + applied.stderr) == (0, "")
    code, shown = in_a_fork(after, USES[path])
    assert code == 0, shown
