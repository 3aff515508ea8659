"""README.md of a run: what was trained on what, how good it is, what it can't do, how to load it.

The sections are those of Mitchell et al. 2019, "Model Cards for Model Reporting", as far as a run can fill them in.
"""

from __future__ import annotations

import json
import re

import jinja2

from lora.peft_format import read_base_model
from training.pages import TEMPLATES, write_whole
from training.progress import minutes
from training.run_folder import RunFolder


def write_model_card(folder: RunFolder) -> None:
    """Write README.md into a run folder that has a report.json, of a finished run or one that was interrupted."""
    report = json.loads(folder.report.read_text(encoding="utf-8"))
    config, test, lora = report["config"], report["test"], report["config"]["lora"]
    layers = lora["layers_to_transform"]
    where = f", layers {', '.join(map(str, layers))} from 0" if layers else ", all layers"
    base = read_base_model(folder.adapter) or config["model"]["checkpoint"]
    facts = [
        ("base model", base),
        ("data", report["origins"]["data"]),
        ("LoRA", f"rank {lora['rank']}, alpha {lora['alpha']:g}, on {_listed(lora['target_modules'])}{where}"),
        (
            "trained parameters",
            f"{report['trainable_parameters']:,} of {report['total_parameters']:,}; the rest is the base model's",
        ),
    ]
    if test:
        facts += [
            ("test accuracy", f"{100 * test['accuracy']:.2f} %"),
            ("macro precision, recall, F1", f"{test['precision']:.3f}, {test['recall']:.3f}, {test['f1']:.3f}"),
        ]
    facts.append(
        ("training", f"{report['epochs_run']} epochs in {minutes(report['train_seconds'])} on {report['device']}")
    )
    environment = jinja2.Environment(  # Markdown: HTML's escapes would show
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["md"] = escaped
    environment.filters["python"] = repr
    text = environment.get_template("card.md").render(
        name=folder.path.name,
        path=folder.path,
        adapter=str(folder.adapter),
        base=base,
        model_type=report["origins"]["model_type"],
        labels=report["label_names"],
        facts=facts,
        test=test,
        best_epoch=report["best_epoch"],
        max_length=config["data"]["max_length"],
        cleaning=[step for step, on in config["data"]["cleaning"].items() if on],
        settings=folder.config.read_text(encoding="utf-8").strip(),
    )
    write_whole(folder.card, text)


def escaped(text: str) -> str:
    """`text` as Markdown shows it literally, within one cell of a table: names of classes come from data."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", re.sub(r"\s+", " ", str(text)))


def _listed(names: str | list[str]) -> str:
    return names if isinstance(names, str) else ", ".join(names)
