"""README.md: its forward pass is the one that runs, its example runs as printed, every target of make is named."""

import inspect
import re
import textwrap
from pathlib import Path

from lora.linear import LoRALinear

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_blocks():
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_forward_pass_is_the_one_in_the_code():
    forward, _ = python_blocks()
    assert forward == textwrap.dedent(inspect.getsource(LoRALinear.forward))


def test_the_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, example = python_blocks()
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert not any(isinstance(module, LoRALinear) for module in names["model"].modules())
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    assert "trainable" in capsys.readouterr().out


def test_every_target_of_the_makefile_is_named():
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = set(re.findall(r"`make ([a-z-]+)`", README))
    assert "train" in targets and set(targets) - {"help"} <= named
