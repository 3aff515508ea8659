"""Inputs and device of a run, checked before the first step and printed on the console."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from data.assets import Checkpoint, fetch_checkpoint, sha256_of
from data.augmentation import AugmentationConfig, augment_texts, check_texts
from data.batching import (
    WIDTH_MULTIPLE,
    Batch,
    EncodedSplit,
    Unlabelled,
    batches_per_epoch,
    describe_long,
    encode_split,
    training_batches,
)
from data.sources import LabelledText, Split, load_source, read_without_labels
from lora.config import MethodConfig
from lora.quantized import quantize
from roberta.config import RobertaConfig
from roberta.files import weight_files
from roberta.masked_lm import load_masked_lm
from roberta.model import Encoder, RobertaForSequenceClassification
from roberta.tokenizer import TextTokenizer
from roberta.weights import head_of, load_checkpoint
from training.budget import check_budget
from training.classes import match_classes
from training.config import RunConfig, TrainConfig
from training.distributed import World
from training.errors import ConfigError
from training.precision import WIDTH_WHEN_COMPILED, Compute, choose_compute, use_determinism
from training.progress import say
from training.substitution import check_words, substitute
from training.tmix import mix_layers


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (CPU and GPU)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def set_up_process(settings: TrainConfig, world: World) -> Compute:
    """Choose device and number format, kernels and seeds. Raises ConfigError for a device that is missing."""
    use_determinism(settings.deterministic)
    world.take_gpu(settings.device)
    compute = choose_compute(settings)
    seed_everything(settings.seed)
    return compute


@dataclass(frozen=True)
class Inputs:
    """What a run reads."""

    text: LabelledText
    checkpoint: Checkpoint
    model_config: RobertaConfig
    tokenizer: TextTokenizer
    splits: dict[str, EncodedSplit]
    """Token ids of train, validation and test, and of unlabelled texts, whose labels of 0 are not read."""
    new_head: bool
    """Whether the head is newly initialized, not read from the checkpoint."""
    steps_per_epoch: int
    """Optimizer steps per epoch."""

    def fingerprints(self) -> dict[str, str]:
        """Hashes of the inputs that must be unchanged when a run is resumed."""
        return {
            "the data": self.text.fingerprint,
            "the base weights": " ".join(map(sha256_of, weight_files(self.checkpoint.directory))),
            "the tokenizer": self.tokenizer.fingerprint,
        }


def load_inputs(config: RunConfig, world: World) -> Inputs:
    """Read text and checkpoint, check that they and the settings fit each other, and tokenize.

    Raises ConfigError, DataError, CheckpointError or LoRAError for what can't be used.
    """
    text = _read_text(config, world)
    with world.main_first():
        checkpoint = fetch_checkpoint(config.model.checkpoint)
    say(f"checkpoint  {checkpoint.origin}")
    model_config, text, new_head = _configure_model(config, checkpoint, text)
    check_settings(config, model_config, world)  # before anything large is read
    windows = config.data.windows, config.data.window_overlap
    tokenizer = TextTokenizer.from_directory(checkpoint.directory, config.data.max_length, *windows)
    tokenizer.check_fits(model_config, checkpoint.directory)
    splits = _tokenize(config, checkpoint, text, tokenizer)

    rows = (1 + config.data.augmentation.n_aug) * len(splits["train"].lengths)
    ratio = config.unlabelled.ratio if config.unlabelled else 1
    batches = batches_per_epoch(rows, config.train.batch_size, len(text.unlabelled), ratio)
    steps_per_epoch = -(-batches // config.train.accumulation_steps)
    return Inputs(text, checkpoint, model_config, tokenizer, splits, new_head, steps_per_epoch)


def _read_text(config: RunConfig, world: World) -> LabelledText:
    """The cleaned texts of a run. Raises ConfigError or DataError if the settings don't fit them."""
    unlabelled, augmentation = config.unlabelled, config.data.augmentation
    with world.main_first():
        text = _with_unlabelled(config, load_source(config.data, config.train.seed)).cleaned(config.data.cleaning)
    multi_label = ", multi-label" if text.multi_label else ""
    say(f"data        {text.origin}")
    say(
        f"            {len(text.train.texts):,} texts to train on, {len(text.validation.texts):,} to validate, "
        f"{len(text.test.texts):,} to test, {len(text.label_names)} classes{multi_label}"
    )
    if multi_label and config.train.class_weights != "none":
        raise ConfigError(
            'train.class_weights weights texts of one class each, and the data is multi-label; set "none"'
        )
    if unlabelled is not None:
        say(f"            {len(text.unlabelled):,} unlabelled texts, {unlabelled.ratio} per labelled text of a batch")
    for note in (f"training texts per class: {text.class_counts()}", *text.notes):
        say(f"            {note}")
    if augmentation.n_aug:
        if augmentation.kind != "mlm":  # which is checked on tokens
            check_texts(text.train.texts, text.origin, augmentation.kind)
        alpha = f", alpha {augmentation.alpha:g}" if augmentation.kind != "aeda" else ""
        say(f"            {augmentation.kind.upper()}: {augmentation.n_aug} new texts of each training text{alpha}")
    if unlabelled is not None and unlabelled.method != "pseudo_label":
        where = text.origin if unlabelled.source == "rest" else unlabelled.source
        check_texts(text.unlabelled, where, "eda", 'set unlabelled.method = "pseudo_label"')
    return text


def _with_unlabelled(config: RunConfig, text: LabelledText) -> LabelledText:
    """The data set with the unlabelled texts that the run uses, if any. Raises ConfigError or DataError."""
    settings, texts, notes = config.unlabelled, text.unlabelled, list(text.notes)
    if settings is None:
        return dataclasses.replace(text, unlabelled=())
    if text.multi_label:
        raise ConfigError("[unlabelled] needs one class per text, and the data is multi-label; remove the table")
    if settings.source != "rest":
        texts, found = read_without_labels(Path(settings.source), config.data, text.label_names)
        notes += found
    if not texts:
        raise ConfigError(
            'unlabelled.source is "rest", but no training rows are left out; set data.train_rows, or name a file'
        )
    if shared := len({*texts} & {*text.validation.texts, *text.test.texts}):
        notes.append(f"{shared:,} unlabelled texts are also validation or test texts")
    if len(text.validation.labels) > len(text.train.labels):
        notes.append("the validation split is larger than the training split: its labels, too, decide the result")
    return dataclasses.replace(text, unlabelled=tuple(texts), notes=tuple(notes))


def _configure_model(
    config: RunConfig, checkpoint: Checkpoint, text: LabelledText
) -> tuple[RobertaConfig, LabelledText, bool]:
    """The model's configuration, the text with the classes of its head, and whether that head is new."""
    dropouts = {
        "hidden_dropout_prob": config.model.hidden_dropout,
        "attention_probs_dropout_prob": config.model.attention_dropout,
        "classifier_dropout": config.model.classifier_dropout,
    }
    changed = {name: value for name, value in dropouts.items() if value is not None}
    model_config = RobertaConfig.from_file(checkpoint.directory / "config.json")
    head = head_of(checkpoint.directory)
    new_head = config.model.new_head or head != "ours"
    if new_head:
        unused = {"none": "", "ours": "; the checkpoint's is not used"}
        say(f"head        new{unused.get(head, f'; not used of the checkpoint: {head}')}")
    else:
        say("head        read from the checkpoint")
        names = model_config.label_names
        text = match_classes(text, names, "the checkpoint", fix="rename the labels, or add --model.new-head")
    # The data decides: a head that the checkpoint already has is trained further by the loss that fits the labels.
    kind = "multi_label_classification" if text.multi_label else "single_label_classification"
    model_config = dataclasses.replace(model_config, label_names=text.label_names, problem_type=kind, **changed)
    return model_config, text, new_head


def check_settings(config: RunConfig, model_config: RobertaConfig, world: World) -> None:
    """Raise ConfigError or LoRAError if R-Drop, TMix, the budget or the length don't fit the model; say what is on."""
    settings = config.train
    if settings.r_drop:
        check_dropout(model_config, config.methods)
        say(f"R-Drop      each text twice in a step, alpha {settings.r_drop:g}")
    if settings.tmix:
        if settings.batch_size < 2 * world.size:
            raise ConfigError("train.tmix mixes texts of a batch, of which a process has one; raise train.batch_size")
        layers = " or ".join(map(str, mix_layers(model_config.num_hidden_layers)))
        say(f"TMix        texts mixed in pairs after layer {layers}, alpha {settings.tmix:g}")
    check_budget(model_config, config.methods, settings.max_trainable)
    virtual = sum(method.num_virtual_tokens for method in config.methods)
    if config.data.max_length + virtual > model_config.max_length:
        raise ConfigError(
            f"data.max_length is {config.data.max_length}{f', with {virtual} virtual tokens' if virtual else ''}, but "
            f"the checkpoint has positions for {model_config.max_length} tokens; lower it"
        )


def check_dropout(model: RobertaConfig, methods: Iterable[MethodConfig]) -> None:
    """Raise ConfigError if no dropout is on: R-Drop's two passes would then be the same."""
    rates = [model.hidden_dropout_prob, model.attention_probs_dropout_prob, model.classifier_dropout]
    rates += [getattr(method, name, 0) for method in methods for name in ("dropout", "encoder_dropout")]
    if not any(rates):
        raise ConfigError(
            "train.r_drop compares two passes with other dropout masks, but no dropout is on; "
            "set model.hidden_dropout, or train.r_drop = 0"
        )


def _tokenize(
    config: RunConfig, checkpoint: Checkpoint, text: LabelledText, tokenizer: TextTokenizer
) -> dict[str, EncodedSplit]:
    """`Inputs.splits`. Raises ConfigError or DataError if masked language modelling can't replace words of them."""
    mlm = config.data.augmentation.n_aug > 0 and config.data.augmentation.kind == "mlm"
    if mlm and ("lm_head" not in head_of(checkpoint.directory) or tokenizer.mask_token_id is None):
        raise ConfigError(
            f"{checkpoint.directory}: has no lm_head or no <mask>, so data.augmentation.kind can't be mlm; choose "
            "another checkpoint or kind"
        )
    splits = {
        name: encode_split(getattr(text, name), tokenizer, description=f"tokenizing {name}")
        for name in ("train", "validation", "test")
    }
    if config.unlabelled is not None:
        unlabelled = Split([*text.unlabelled], [0] * len(text.unlabelled))
        splits["unlabelled"] = encode_split(unlabelled, tokenizer, description="tokenizing unlabelled texts")
    say(f"            {describe_long([*splits.values()], tokenizer)}")
    if unknown := sum(int((split.input_ids == tokenizer.unk_token_id).sum()) for split in splits.values()):
        total = sum(len(split.input_ids) for split in splits.values())
        say(f"            {unknown:,} of {total:,} tokens are unknown to the tokenizer")
    if mlm:
        check_words(splits["train"], tokenizer.entries, text.origin)
    return splits


def load_base(directory: Path, config: RobertaConfig, new_head: bool, bits: int) -> RobertaForSequenceClassification:
    """The model of a checkpoint (`load_checkpoint`); below 16 bits, with the encoder's matrices quantized as read."""
    if bits == 16:
        return load_checkpoint(directory, config, new_head=new_head)
    say(f"            the encoder's matrices in {bits} bits")
    return load_checkpoint(directory, config, new_head=new_head, on_meta=lambda model: quantize(model.roberta, bits))


def recompute_activations(encoder: Encoder) -> None:
    """Keep only the input of each layer until the backward pass, which computes the rest again, dropout masks included.

    Memory for one layer's activations instead of all, for one more forward pass. Source: Chen et al. 2016, "Training
    Deep Nets with Sublinear Memory Cost", section 3, with a segment per layer.
    """
    for layer in encoder.layer:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def _say_truncated(new: EncodedSplit, split: EncodedSplit, epoch: int) -> None:
    """Say in the first epoch how many more of the new texts are truncated than of those they were made from."""
    if epoch == 1 and (cut := new.truncated - split.truncated) > 0:
        say(f"            {cut:,} new texts are longer than {new.max_length} tokens and are truncated")


def epoch_batches(
    inputs: Inputs, config: RunConfig, epoch: int, skip: int, compute: Compute, world: World
) -> Iterable[Batch]:
    """The training batches of an epoch without the first `skip`: shuffled again, texts of similar length together.

    With augmentation, they hold the training texts and the new texts generated from them; with unlabelled texts, these
    and their changed copies.
    """
    settings, split, augmentation = config.train, inputs.splits["train"], config.data.augmentation
    if augmentation.n_aug and augmentation.kind == "mlm":
        model = load_masked_lm(inputs.checkpoint.directory).to(compute.device)
        split = substitute(split, model, inputs.tokenizer, augmentation, settings.seed, epoch, compute)
    elif augmentation.n_aug:
        train = inputs.text.train
        new = augment_texts(train.texts, train.labels, augmentation, settings.seed, epoch)
        split = encode_split(Split(*new), inputs.tokenizer, description="tokenizing augmented texts")
        _say_truncated(split, inputs.splits["train"], epoch)
    if settings.class_weights == "balanced":
        from sklearn.utils.class_weight import compute_sample_weight  # slow to import

        split = split.weighted(compute_sample_weight("balanced", split.labels))
    unlabelled = None
    if config.unlabelled is not None:
        changed = texts = inputs.splits["unlabelled"]
        if config.unlabelled.method != "pseudo_label":
            eda = AugmentationConfig(n_aug=1, alpha=config.unlabelled.alpha)
            both, labels = augment_texts(inputs.text.unlabelled, texts.labels, eda, settings.seed, epoch)
            copies = Split(both[1::2], labels[1::2])  # each text is followed by its changed copy
            changed = encode_split(copies, inputs.tokenizer, description="tokenizing changed texts")
            _say_truncated(changed, texts, epoch)
        unlabelled = Unlabelled(texts, changed, config.unlabelled.ratio)
    return training_batches(
        split,
        settings.batch_size,
        inputs.tokenizer.pad_token_id,
        settings.seed,
        epoch,
        config.data.padding,
        compute.device,
        skip,
        world.share,
        WIDTH_WHEN_COMPILED if settings.compile != "off" else WIDTH_MULTIPLE,
        unlabelled,
    )
