"""README.md of a run: what was trained on which data, its scores, its limits, how to load it.

The sections are those of Mitchell et al. 2019, "Model Cards for Model Reporting", as far as the run has data.
"""

from __future__ import annotations

import shlex

from lora.config import METHODS
from lora.peft_format import read_base_model
from training.pages import write_page
from training.progress import minutes
from training.run_folder import RunFolder


def write_model_card(folder: RunFolder) -> None:
    """Write README.md into the folder of a finished or interrupted run, from its report.json."""
    report = folder.read_report()
    config, test = report["config"], report["test"]
    trained = [part for part, row in report["parameters_by_part"].items() if row["trainable"]]
    tables = [table for table in METHODS if config.get(table)]
    methods = [config[table] for table in tables]
    numbers = [item for method in methods for item in method.items() if isinstance(item[1], int | float) and item[1]]
    base = read_base_model(folder.adapter) or config["model"]["checkpoint"]
    facts = {
        "base model": base,
        "base weights": f"{bits} bits" if (bits := config["model"]["base_bits"]) < 16 else "",
        "data": report["origins"]["data"],
        "trained": ", ".join(trained),
        "with": ", ".join(f"{name} {value:g}" for name, value in numbers),
        "trained parameters": f"{report['trainable_parameters']:,} of {report['total_parameters']:,}",
    }
    multi_label = report.get("problem_type") == "multi_label_classification"
    if test:
        facts["test exact match" if multi_label else "test accuracy"] = f"{100 * test['accuracy']:.2f} %"
        facts |= {"micro F1": f"{test['micro']['f1']:.3f}"} if multi_label else {}
        facts["macro precision, recall, F1"] = f"{test['precision']:.3f}, {test['recall']:.3f}, {test['f1']:.3f}"
    facts = {name: value for name, value in facts.items() if value}
    facts["training"] = f"{report['epochs_run']} epochs in {minutes(report['train_seconds'])} on {report['device']}"
    write_page(
        "card.md",
        folder.card,
        name=folder.path.name,
        path=shlex.quote(str(folder.path)),
        adapter=str(folder.adapter),
        base=base,
        model_type=report["origins"]["model_type"],
        several=len(methods) > 1,
        in_peft=all(METHODS[table].in_peft for table in tables)
        and not any(config[table][name] for table in tables for name in METHODS[table].peft_refuses),
        merges=all(METHODS[table].merges for table in tables),
        adapterhub=any(METHODS[table].adapterhub for table in tables),
        labels=report["label_names"],
        multi_label=multi_label,
        facts=facts,
        test=test,
        calibration=report.get("calibration"),
        best_epoch=report["best_epoch"],
        keep=config["train"].get("keep", "best"),
        max_length=config["data"]["max_length"],
        windows=config["data"].get("windows", 1),
        cleaning=[step for step, on in config["data"]["cleaning"].items() if on],
        settings=folder.config.read_text(encoding="utf-8").strip(),
    )
