"""The other side of the benchmarks: the same work in `transformers` and `peft`, as their users write it.

python -m benchmarks.theirs AG_NEWS_FOLDER OUTPUT     the script whose time to the first step is measured
"""

from __future__ import annotations

import csv
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import LORA, default_matmul
from data.assets import fetch_checkpoint
from data.batching import Batch
from data.sources import Split
from lora.config import LoRAConfig
from roberta.config import RobertaConfig
from training.precision import Compute


def quiet() -> None:
    """No progress bars and no advice between the rows."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def versions() -> str:
    """Of the libraries that are compared with."""
    import peft
    import transformers

    return f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"


def minilm_directory() -> Path:
    """Where MiniLM's files are."""
    return fetch_checkpoint("minilm").directory


def _lora(config: LoRAConfig, dropout: float) -> Any:
    import peft

    return peft.LoraConfig(
        task_type="SEQ_CLS",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=dropout,
        target_modules=list(config.target_modules),
    )


def fresh_peft_model(config: RobertaConfig, dropout: float, lora: LoRAConfig) -> nn.Module:
    """RoBERTa of the same sizes with random weights, SDPA attention and LoRA, in training mode."""
    import peft
    import transformers

    theirs = transformers.RobertaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        type_vocab_size=config.type_vocab_size,
        layer_norm_eps=config.layer_norm_eps,
        pad_token_id=config.pad_token_id,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=config.num_labels,
    )
    theirs._attn_implementation = "sdpa"
    model = transformers.RobertaForSequenceClassification(theirs)
    return peft.get_peft_model(model, _lora(lora, dropout)).train()


def peft_model(ours: nn.Module, config: RobertaConfig, dropout: float, lora: LoRAConfig) -> nn.Module:
    """The same with the weights of `ours`, frozen and trainable."""
    model = fresh_peft_model(config, dropout, lora)
    mine = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            plain = name.removeprefix("base_model.model.").replace("base_layer", "base").replace(".default", "")
            plain = plain.replace(".modules_to_save", "").replace(".lora_A.weight", ".lora_A")
            plain = plain.replace(".lora_B.weight", ".lora_B").replace(".original_module", "")
            parameter.copy_(mine[plain])
    return model


def step(model: nn.Module, compute: Compute) -> Callable[[Batch], Tensor]:
    """One training step as a user of the two libraries writes it: AdamW, linear decay, clipping, autocast."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    on_gpu = compute.device.type == "cuda"
    optimizer = torch.optim.AdamW(trainable, lr=5e-4, weight_decay=0.01, fused=on_gpu or None)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: max(0.0, 1 - i / 1000))
    scaler = compute.grad_scaler()

    @default_matmul()
    def train(batch: Batch) -> Tensor:
        ids, labels = batch.input_ids.to(compute.device), batch.labels.to(compute.device)
        mask = batch.attention_mask.to(compute.device).long()
        with compute.autocast():
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        return loss.detach()

    return train


def _trainer(checkpoint: Path, split: Split, lora: LoRAConfig, grouped: bool, on_gpu: bool, folder: str) -> Any:
    """A `transformers.Trainer` for MiniLM with LoRA, dynamic padding, batches of 32."""
    import datasets
    import peft
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=4)
    model = peft.get_peft_model(model, _lora(lora, 0.1))
    rows = datasets.Dataset.from_dict({"text": split.texts, "labels": split.labels})
    rows = rows.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=128), batched=True, remove_columns=["text"]
    )
    settings = {
        "output_dir": folder,
        "per_device_train_batch_size": 32,
        "num_train_epochs": 1,
        "learning_rate": 5e-4,
        "weight_decay": 0.01,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not on_gpu,
        "bf16": on_gpu,
    }
    if grouped:  # renamed in transformers 5
        name = "group_by_length" if "group_by_length" in transformers.TrainingArguments.__dataclass_fields__ else None
        settings |= {name: True} if name else {"train_sampling_strategy": "group_by_length"}
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**settings),
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )
    trainer.remove_callback(transformers.PrinterCallback)  # prints lines between the rows
    return trainer


def trainer_epoch(
    checkpoint: Path, split: Split, lora: LoRAConfig, grouped: bool, device: torch.device
) -> Callable[[], None]:
    """A call that does what a script with `Trainer` does in one epoch, starting with loading the model."""

    @default_matmul()
    def epoch() -> None:
        import datasets

        datasets.disable_caching()
        datasets.disable_progress_bars()
        with tempfile.TemporaryDirectory() as folder:
            _trainer(checkpoint, split, lora, grouped, device.type == "cuda", folder).train()

    return epoch


def main() -> None:
    """Load data and model, train, and write a file after the first step."""
    import transformers

    quiet()
    folder, output = Path(sys.argv[1]), sys.argv[2]
    with (folder / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    split = Split([f"{title} {text}" for _, title, text in rows], [int(label) - 1 for label, _, _ in rows])
    os.environ["HF_DATASETS_CACHE"] = f"{output}/datasets"

    class FirstStep(transformers.TrainerCallback):
        def on_step_end(self, *_arguments: Any, **_more: Any) -> None:
            Path(output, "first_step").write_text("done", encoding="utf-8")

    trainer = _trainer(minilm_directory(), split, LORA, False, False, output)
    trainer.add_callback(FirstStep())
    trainer.train()


if __name__ == "__main__":
    main()
