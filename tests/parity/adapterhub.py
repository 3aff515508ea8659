"""The numbers of AdapterHub's library that test_bottleneck.py compares with: adapterhub.json.

    .venv-adapters/bin/python -m tests.parity.adapterhub        (or: make adapters-env)

The library pins another version of `transformers`, so it has an environment of its own. The script also loads our files
there, in both kinds of model that the library has. Weights follow a formula, so that no random generator matters.
"""

import json
import logging
import tempfile
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F

from lora.config import BottleneckConfig
from lora.inject import inject_lora
from lora.peft_format import load_adapter, save_adapter
from roberta.config import RobertaConfig
from roberta.model import RobertaForSequenceClassification

PATH = Path(__file__).with_suffix(".json")
FILES = ("adapter.safetensors", "model_head.safetensors")
CASES = {
    "pfeiffer": {"form": "pfeiffer", "reduction_factor": 3},
    "pfeiffer, one layer, width 1": {"form": "pfeiffer", "reduction_factor": 100, "leave_out": (1,)},
    "houlsby": {"form": "houlsby", "reduction_factor": 2.5},
}
SIZES = {
    "vocab_size": 23,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LABELS = ("World", "Sports", "Business")
INPUTS = {
    "input_ids": torch.tensor([[0, 5, 21, 14, 9, 2], [0, 7, 3, 2, 1, 1]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
}
TARGETS = torch.tensor([2, 0])


@torch.no_grad()
def fill(model, names):
    """Set each parameter to numbers that depend on its common name alone, to which `names` maps its name."""
    for name, parameter in model.named_parameters():
        index = torch.arange(parameter.numel(), dtype=torch.float64)
        start = zlib.crc32(names(name).encode()) % 1000
        values = 0.5 * torch.sin(start + 1.3 * index + 0.01 * index**2).reshape(parameter.shape)
        parameter.copy_(values + 1 if name.endswith("LayerNorm.weight") else values)
    return model


def our_base():
    """Our model of these sizes, float64."""
    return fill(RobertaForSequenceClassification(RobertaConfig(**SIZES, label_names=LABELS)).double().eval(), str)


@torch.no_grad()
def without_head(model):
    """The model with a head of zeros, so that a file that is loaded must bring it."""
    for parameter in model.classifier.parameters():
        parameter.zero_()
    return model


def our_model(case):
    """It with the bottlenecks of a case."""
    model, names = inject_lora(our_base(), BottleneckConfig(**CASES[case])), {}
    for part, module in model.named_modules():
        if hasattr(module, "peft_keys"):
            names |= {f"{part}.{own}": f"{part}.{key}" for own, key in module.peft_keys.items()}
    return fill(model.double(), lambda name: names.get(name, name).replace(".base.", "."))


def step(model, forward):
    """One backward pass; returns the logits."""
    logits = forward(model)
    F.cross_entropy(logits, TARGETS).backward()
    return logits


def twenty_steps(model, forward):
    """Twenty steps of AdamW; returns the logits after them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        step(model, forward)
        optimizer.step()
    return forward(model)


def logits_of(model):
    """The logits of either library's model."""
    logits = model(**INPUTS)
    return getattr(logits, "logits", logits)


def main():
    """Compute the numbers, load files both ways, write adapterhub.json."""
    import adapters
    import transformers
    from safetensors.torch import load_file

    logging.getLogger("adapters").setLevel(logging.ERROR)  # it warns between two calls that none is active
    torch.set_default_dtype(torch.float64)
    found = {"adapters": adapters.__version__, "transformers": transformers.__version__, "cases": {}}

    def their_base(kind):
        """A model of `transformers` with the library's methods ("static"), or one with its own heads ("flexible")."""
        names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
        config = transformers.RobertaConfig(**SIZES, **names, type_vocab_size=1, layer_norm_eps=1e-5)
        if kind == "flexible":
            return fill(adapters.RobertaAdapterModel(config).eval(), str)
        model = transformers.RobertaForSequenceClassification(config)
        adapters.init(model)
        return without_head(fill(model.eval(), str))

    def common(name):
        name = name.replace("heads.topics.1.", "classifier.dense.").replace("heads.topics.4.", "classifier.out_proj.")
        return name.replace(".adapters.topics.", ".")

    def numbers(tensor):
        return [float(f"{value:.14g}") for value in tensor.flatten().tolist()]

    def same(ours, theirs, what):
        worst = (ours - theirs).abs().max().item()
        assert worst < 1e-12, f"{what}: {worst}"
        print(f"{worst:.1e}  {what}")

    for case, settings in CASES.items():
        folder, record = Path(tempfile.mkdtemp()), found["cases"].setdefault(case, {})
        config = adapters.SeqBnConfig if settings["form"] == "pfeiffer" else adapters.DoubleSeqBnConfig
        save_adapter(our_model(case), folder / "ours")
        for kind in ("flexible", "static"):
            model, empty = their_base(kind), their_base(kind)
            model.add_adapter(
                "topics",
                config=config(
                    reduction_factor=settings["reduction_factor"], leave_out=list(settings.get("leave_out", ()))
                ),
            )
            if kind == "flexible":
                model.add_classification_head("topics", num_labels=len(LABELS), id2label=dict(enumerate(LABELS)))
            model.train_adapter("topics")
            fill(model.eval(), common).save_adapter(str(folder / kind), "topics", use_safetensors=True)
            logits = logits_of(model)
            load_adapter(ours := without_head(our_base()), folder / kind)
            same(logits_of(ours), logits, f"{case}: ours with the file of the library's {kind} model")
            name = empty.load_adapter(str(folder / "ours"), use_safetensors=True, set_active=True)
            same(logits_of(empty), logits, f"{case}: the library's {kind} model with our file, {name!r}")
            files = sorted((folder / kind).iterdir())
            record[kind] = {
                path.name: json.loads(path.read_text()) if path.suffix == ".json" else sorted(load_file(path))
                for path in files
            }
        step(model, logits_of)
        trained = {common(name): value for name, value in model.named_parameters() if value.requires_grad}
        record |= {
            "logits": numbers(logits),
            "trained": sum(value.numel() for value in trained.values()),
            "gradients": {name: numbers(value.grad) for name, value in sorted(trained.items())},
            "logits after 20 steps": numbers(twenty_steps(model, logits_of)),
        }
    PATH.write_text(json.dumps(found, sort_keys=True) + "\n")
    print(f"written: {PATH}")


if __name__ == "__main__":
    main()
