"""README.md of a run: its numbers equal the report's, its code loads the model, text from data is escaped."""

import json
import re

import pytest
import torch

from evaluate import Arguments, classify, load_trained
from roberta.tokenizer import TextTokenizer
from training.model_card import write_model_card
from training.pages import escape_markdown
from training.run_folder import RunFolder


@pytest.fixture
def run_folder(finished_run):
    return RunFolder(finished_run)


def test_a_card_holds_the_reports_numbers_and_its_code_classifies(run_folder, capsys):
    card = run_folder.card.read_text()
    report = json.loads(run_folder.report.read_text())
    assert f"| test accuracy | {100 * report['test']['accuracy']:.2f} % |" in card
    assert "| trained | LoRA on attention.self.query, LoRA on attention.self.key, LoRA on attention" in card
    assert "| with | rank 4, alpha 8 |" in card
    assert f"{report['trainable_parameters']:,} of {report['total_parameters']:,}" in card
    for label, row in report["test"]["per_class"].items():
        assert f"| {label} | {row['support']} | {row['precision']:.3f} |" in card
    assert run_folder.config.read_text().strip() in card

    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    tokenizer = TextTokenizer.from_directory(run_folder.adapter, 16)

    def their_tokenizer(text, **options):  # transformers has no class for the tiny tokenizer
        assert options == {
            "truncation": True,
            "max_length": report["config"]["data"]["max_length"],
            "return_tensors": "pt",
        }
        return {"input_ids": torch.tensor(tokenizer.encode_batch([text]))}

    code, replaced = re.subn(r"tokenizer = .*", "tokenizer = their_tokenizer", code)
    texts = ["goal in the cup", "oil price today"]
    loaded = {"their_tokenizer": their_tokenizer}
    exec(code.replace('"one text"', repr(texts[0])), loaded)
    printed = capsys.readouterr().out.splitlines()[-1]
    (ours,) = classify([load_trained(Arguments(run=run_folder.path))], texts)
    assert replaced == 1 and printed == report["label_names"][ours[0].argmax()]
    with torch.no_grad():
        logits = torch.stack([loaded["model"](torch.tensor([i])).logits[0] for i in tokenizer.encode_batch(texts)])
    expected = (logits.double() / report["calibration"]["temperature"]).softmax(dim=-1)
    torch.testing.assert_close(expected, ours, rtol=1e-5, atol=1e-6)


def test_cards_of_other_runs(run_folder):
    report = json.loads(run_folder.report.read_text())

    def card(**changes):
        run_folder.report.write_text(json.dumps(report | changes))
        write_model_card(run_folder)
        return run_folder.card.read_text()

    assert "adapter of epoch 7, the best" in card(best_epoch=7)

    interrupted = card(test=None, complete=False)
    assert "was interrupted" in interrupted and "The adapter is that of epoch" in interrupted
    assert "The adapter is that of the last step." in card(test=None, complete=False, best_epoch=0)
    assert "## Scores" not in interrupted and "test accuracy" not in interrupted

    found = {"temperature": 1.5, "error": 0.02, "error_before": 0.05}
    assert "softmax(logits / 1.500): expected calibration error 0.020" in card(calibration=found)
    assert "are not calibrated" in card(calibration=found | {"temperature": 1.0})
    assert "are not calibrated" in card(calibration=None)

    assert "PeftModel" in card(origins=report["origins"] | {"model_type": "xlm-roberta"})
    bert = card(origins=report["origins"] | {"model_type": "bert"})  # merged before transformers opens it
    assert "--export merged/" in bert and "PeftModel" not in bert
    assert "cleans a text" not in bert
    changed = report["config"] | {"lora": None, "bottleneck": {"form": "pfeiffer", "reduction_factor": 16.0}}
    hub = card(config=changed)
    assert "use_safetensors=True" in hub and "PeftModel" not in hub and "--export" not in hub
    assert "library_name: adapter-transformers" in hub
    both = card(config=changed | {"lora": report["config"]["lora"]})
    assert "No other library has these methods" in both and "use_safetensors" not in both and "--export" not in both

    bitfit = card(config=report["config"] | {"lora": None, "bitfit": {"modules_to_save": ["classifier"]}})
    assert "peft does not have this method. First merge" in bitfit and "peft\n" not in bitfit and "with |" not in bitfit

    prompt = {"num_virtual_tokens": 20, "after_first": False}
    assert "PeftModel" in card(config=report["config"] | {"lora": None, "prompt_tuning": prompt})
    for alone in ({"prompt_tuning": prompt | {"after_first": True}}, {"prefix_tuning": {"num_virtual_tokens": 20}}):
        ours = card(config=report["config"] | {"lora": None} | alone)
        assert "No other library has these methods" in ours and "PeftModel" not in ours and "--export" not in ours

    cleaning = report["config"]["data"] | {"cleaning": {"html": True, "punctuation": False, "lowercase": True}}
    cleaned = card(config=report["config"] | {"data": cleaning})
    assert "cleans a text as training did (html, lowercase;" in cleaned

    assert "labels = ['\N{GRINNING FACE}']" in card(label_names=["\N{GRINNING FACE}"])  # as Python reads it
    evil = "<b>a|b</b>\n# [x](http://y) `z` ~~$1_$2~~"  # names from data are escaped
    row = next(iter(report["test"]["per_class"].values()))
    named = card(label_names=[evil], test=report["test"] | {"per_class": {evil: row}})
    assert evil not in named and "\\<b\\>a\\|b\\</b\\> \\# \\[x\\](http://y) \\`z\\` \\~\\~\\$1\\_\\$2\\~\\~" in named
    assert escape_markdown("plain words") == "plain words"
