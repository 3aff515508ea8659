"""Use a trained adapter: score the test split again, classify texts, or write the merged model.

    python evaluate.py runs/quickstart
    python evaluate.py runs/quickstart --text "Oil prices rise" "Cup final goes to penalties"
    python evaluate.py runs/quickstart --predict unlabelled.csv --out submission.csv
    python evaluate.py runs/quickstart --on 20newsgroups --map map.toml
    python evaluate.py runs/quickstart --noise
    python evaluate.py runs/quickstart --speed
    python evaluate.py runs/quickstart --merged --export merged/
    python evaluate.py --adapter runs/news --adapter runs/mails --text "Oil prices rise"

The folder is a run of `train.py`, or an adapter that peft wrote.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

from cpu import speed_up
from data.assets import TOKENIZER_FILES, fetch_checkpoint
from data.batching import Batch, EncodedSplit, describe_long, encode_split, evaluation_batches, joined
from data.cleaning import make_cleaner
from data.errors import DataError
from data.files import listed
from data.noise import CORRUPTIONS, SEVERITIES
from data.sources import LabelledText, Split, load_source, read_unlabelled
from lora.files import atomic_write
from lora.inject import merge_lora, unload_lora
from lora.peft_format import adapter_folders, adapter_shapes, load_adapter, read_base_model
from lora.quantized import dequantize
from lora.several import Several, share_base
from roberta.config import RobertaConfig
from roberta.model import RobertaForSequenceClassification
from roberta.tokenizer import TextTokenizer
from roberta.weights import head_of, refuse_regression, save_checkpoint
from training.calibration import abstention_summary, calibrate, probabilities, read_temperature
from training.class_map import load_other, map_texts
from training.classes import match_classes, numbered
from training.command_line import parse_options, run_command
from training.config import RunConfig, TrainConfig, read_config
from training.errors import ConfigError
from training.pages import write_text_atomic
from training.plots import draw_noise, save_png
from training.precision import Compute, choose_compute
from training.progress import say
from training.run_folder import RunFolder
from training.scoring import Scores, check_finite, class_names, mean_of_windows, predict, score
from training.setup import load_base
from training.speed import measure_speed, speed_table

_SEPARATOR = "|"  # between the labels of a text in --out


@dataclass(frozen=True)
class Arguments:
    """Score the test split with a trained adapter, or classify texts, or export the merged model."""

    run: tyro.conf.Positional[Path | None] = None
    """A run folder, or an adapter folder that peft wrote."""
    adapter: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Instead: several such folders, each after an --adapter. All of them classify each text, over one base."""
    text: tuple[str, ...] | None = None
    """Texts to classify."""
    file: Path | None = None
    """A file of texts to classify, one per line."""
    predict: Path | None = None
    """A file of texts without labels, in a format that training files have, to be classified into --out."""
    out: Path | None = None
    """Where --predict writes: a CSV file with the columns ID and label (multi-label: labels above 0.5, a|b)."""
    text_columns: tuple[str, ...] = ()
    """For --predict: the columns of the text, joined by a space; those of the run, or "text", unless given."""
    id_column: str | None = None
    """For --predict: the column of the ID; id or ID if there is one, else the row's number from 0, unless given."""
    encoding: str = "utf-8"
    """For --predict: the encoding of a text file; a byte-order mark takes precedence."""
    indices: bool = False
    """For --predict: write the number of the class instead of its name."""
    on: str | None = None
    """Score the test texts of another source: a value of data.source (a file: all rows), or a TOML file with [data];
    not with another cleaning, max_length or windows."""
    map: Path | None = None
    """For --on: a TOML file of lines "class of the source" = "class of the adapter"; equal names unless given."""
    noise: bool = False
    """Accuracy on test texts with typing errors, markup, lost words and more: printed, plots/noise.png, noise.json."""
    abstain: float | None = None
    """Leave texts undecided whose highest probability is below this number between 0 and 1."""
    speed: bool = False
    """Measure texts per second and time per call, adapters separate and merged, at batch 1 and 64."""
    merged: bool = False
    """Fold the adapters into the weights first."""
    export: Path | None = None
    """Write the merged model to this folder, for transformers."""
    base: str | None = None
    """The pretrained checkpoint, by name or folder, instead of the one that the adapter names."""
    base_bits: Literal[16, 8, 4] | None = None
    """Bits per weight of the base; those of the training unless given, 16 for an adapter folder."""
    config: Path | None = None
    """Settings that name other data to score, its cleaning, max_length and windows and, for an adapter folder, its
    classes; they do not change the base."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] | None = None
    """Data type of the matmuls; that of the training unless given."""


@dataclass(frozen=True)
class Trained:
    """A model with its adapter, and what is needed to use it."""

    model: RobertaForSequenceClassification
    tokenizer: TextTokenizer
    label_names: tuple[str, ...]
    config: RunConfig
    """The settings of the run or of --config; the defaults for an adapter alone."""
    has_data: bool
    """Whether there are such settings, so that the test split is known."""
    text: LabelledText | None
    """Its labelled text, if it was read already."""
    clean: Callable[[str], str]
    """The cleaning of `config`."""
    compute: Compute
    temperature: float
    """What logits are divided by for probabilities; 1 without one."""


def load_trained(arguments: Arguments) -> Trained:
    """Load the base checkpoint and the adapter.

    Raises ConfigError if the folder is neither a run nor an adapter, or if part of the head is missing; DataError,
    CheckpointError or LoRAError if checkpoint or adapter can't be read or don't fit each other.
    """
    run = arguments.run
    assert run is not None, "checked by check_arguments"
    folder = RunFolder(run)
    is_run = folder.config.is_file()
    if not is_run and not (adapter_folders(run)[0] / "adapter_config.json").is_file():
        raise ConfigError(f"{run}: neither a run folder (config.toml) nor an adapter (adapter_config.json)")
    adapter = folder.adapter if is_run else run
    training = read_config(folder.config) if is_run else None
    given = read_config(arguments.config) if arguments.config else training
    config = given or RunConfig()

    base = arguments.base or (training.model.checkpoint if training else read_base_model(adapter))
    if base is None:
        raise ConfigError(f"{adapter}/adapter_config.json names no base model; give it with --base")
    try:
        checkpoint = fetch_checkpoint(base)
    except DataError as error:
        if arguments.base:
            raise
        raise DataError(f"{error}; if the base model has moved, name its folder with --base") from None
    say(f"checkpoint  {checkpoint.origin}")
    say(f"adapter     {adapter}")

    shapes = adapter_shapes(adapter)
    model_config = RobertaConfig.from_file(checkpoint.directory / "config.json")
    labels, text = _classes(folder, given, model_config, shapes)
    own = adapter / "config.json"  # of a run of train.py, where the data decides
    problem_type = (RobertaConfig.from_file(own) if own.is_file() else model_config).problem_type
    model_config = dataclasses.replace(model_config, label_names=labels, problem_type=problem_type)
    head_in_adapter = {name for name in shapes if name.startswith("classifier.")}
    head = {f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")}
    new_head = head_of(checkpoint.directory) != "ours" or head_in_adapter >= head
    if head_in_adapter >= head:
        described = own if own.is_file() else checkpoint.directory / "config.json"
        refuse_regression(described, shapes["classifier.out_proj.weight"])
    bits = arguments.base_bits or (training.model.base_bits if training else 16)
    model = load_base(checkpoint.directory, model_config, new_head, bits)
    methods = load_adapter(model, adapter)  # first, as it names the likely cause where the keys are another model's
    if new_head and head_in_adapter < head:
        raise ConfigError(
            f"{adapter}: neither the adapter nor {checkpoint.directory} holds "
            f"{', '.join(sorted(head - head_in_adapter))}; train the head, or name the fine-tuned base with --base"
        )

    precision = arguments.precision or (training or config).train.precision
    compute = choose_compute(TrainConfig(device=arguments.device, precision=precision))  # never compiled
    model.to(compute.device).eval()
    if compute.device.type == "cpu":
        speed_up(model)
    room = model_config.max_length - sum(method.num_virtual_tokens for method in methods)
    max_length = min(config.data.max_length, room)  # another base may have fewer positions
    # One that was saved with the adapter is the one it was trained with.
    files = adapter if any((adapter / name).is_file() for name in TOKENIZER_FILES) else checkpoint.directory
    if files == adapter and not is_run:
        say(f"tokenizer   {adapter}")
    tokenizer = TextTokenizer.from_directory(files, max_length, config.data.windows, config.data.window_overlap)
    tokenizer.check_fits(model_config, files)
    clean = make_cleaner(config.data.cleaning)
    temperature = 1.0 if model_config.multi_label else read_temperature(adapter)
    if temperature != 1:
        say(f"temperature {temperature:.3f}")
    return Trained(model, tokenizer, labels, config, given is not None, text, clean, compute, temperature)


def _classes(
    folder: RunFolder, config: RunConfig | None, base: RobertaConfig, shapes: dict[str, list[int]]
) -> tuple[tuple[str, ...], LabelledText | None]:
    """Class names in the order of the logits, and the labelled text, if it was read to name them.

    The names stored with the adapter; else those of `config`'s data, in the base's order if it has the same; else the
    base's, if it has as many as the adapter's head; else numbers. Raises ConfigError if they don't fit the head.
    """
    stored, own_head = folder.read_labels(), shapes.get("classifier.out_proj.weight")
    number = own_head[0] if own_head else len(stored or base.label_names)
    if stored is not None:
        if len(stored) != number:
            raise ConfigError(f"{folder.labels} names {len(stored)} classes, but the adapter's head has {number}")
        return stored, None
    names = base.label_names if number == base.num_labels else numbered(number)
    if config is None:
        whose = "numbers" if names == numbered(number) else "the base checkpoint's names"
        say(f"classes     {listed(names)}: {whose}, as {folder.labels} does not exist")
        return names, None
    # A head in the adapter may have been trained on other classes than the base's.
    text = load_source(config.data, config.train.seed)
    text = match_classes(text, names, "the base checkpoint", certain=own_head is None)
    return text.label_names, text


def read_texts(arguments: Arguments) -> list[str]:
    """The texts given by --text and --file. Raises ConfigError for an empty text or a file that can't be read."""
    if arguments.text == ():
        raise ConfigError('--text has no text; write one after it, in quotes: --text "Oil prices rise"')
    texts = {f"--text number {i}": text for i, text in enumerate(arguments.text or (), start=1)}
    if arguments.file is not None:
        try:
            # Not `splitlines`, which also splits at a form feed and at Unicode's line separators.
            content = arguments.file.read_text(encoding="utf-8-sig")
            lines = content.removesuffix("\n").split("\n") if content else []
        except OSError as error:
            raise ConfigError(f"{arguments.file}: can't be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{arguments.file}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
        texts |= {f"{arguments.file}, line {i}": line for i, line in enumerate(lines, start=1)}
        if not lines:
            raise ConfigError(f"{arguments.file}: is empty; write one text per line")
    for source, text in texts.items():
        if not text.strip():
            raise ConfigError(f"{source}: the text is empty; remove it or write one")
        if any("\ud800" <= character <= "\udfff" for character in text):  # how Python reads other bytes of arguments
            raise ConfigError(f"{source}: is not UTF-8; write it in UTF-8")
    return list(texts.values())


def load_several(arguments: Arguments) -> dict[str, Trained]:
    """What --adapter names, by folder, over one base in memory. Raises ConfigError or LoRAError if bases differ."""
    loaded: dict[str, Trained] = {}
    for folder in arguments.adapter:
        trained = load_trained(dataclasses.replace(arguments, run=folder))
        first = next(iter(loaded.values()), trained)
        ours, theirs = trained.model.config, first.model.config
        if dataclasses.replace(ours, label_names=theirs.label_names, problem_type=theirs.problem_type) != theirs:
            raise ConfigError(f"{folder}: its base differs from that of {arguments.adapter[0]}; evaluate it alone")
        if trained.compute != first.compute:
            raise ConfigError(f"{folder}: trained in another precision than the first; choose one by --precision")
        for other in loaded.values():  # now, so that no third copy of the base is loaded
            share_base(trained.model, other.model, str(folder))
        loaded[str(folder)] = trained
    return loaded


def classify(adapters: Sequence[Trained], texts: list[str]) -> list[torch.Tensor]:
    """Probabilities (texts, classes) by each adapter: softmax(logits / T), or sigmoids of the logits.

    Each adapter gets the texts cleaned and truncated, or in windows, by its settings, those of its training unless
    --config is given.
    """
    splits = [_encode(trained, Split(texts, [0] * len(texts))) for trained in adapters]
    found = [_logits(adapters[0], splits[0])] if len(adapters) == 1 else _logits_of_several(adapters, splits)
    return [
        torch.sigmoid(logits) if trained.model.config.multi_label else probabilities(logits, trained.temperature)
        for trained, logits in zip(adapters, found, strict=True)
    ]


def _encode(trained: Trained, split: Split, announce: bool = True) -> EncodedSplit:
    """The texts, cleaned and truncated, or in windows, by `trained.config`; `announce` says how many are longer."""
    encoded = encode_split(Split([*map(trained.clean, split.texts)], split.labels), trained.tokenizer)
    if encoded.longer and announce:
        say(f"            {describe_long([encoded], trained.tokenizer)}")
    return encoded


def _logits(trained: Trained, split: EncodedSplit) -> torch.Tensor:
    return mean_of_windows(predict(trained.model, _batches(trained, split), len(split.lengths), trained.compute), split)


def _batches(trained: Trained, split: EncodedSplit) -> Iterable[Batch]:
    batch_size, padding = trained.config.train.eval_batch_size, trained.config.data.padding
    return evaluation_batches(split, batch_size, trained.tokenizer.pad_token_id, padding, trained.compute.device)


@torch.no_grad()
def _logits_of_several(adapters: Sequence[Trained], splits: Sequence[EncodedSplit]) -> list[torch.Tensor]:
    """Logits (texts, classes) by each adapter of its split of the same texts; batches mix the rows of all."""
    several = Several({str(number): trained.model for number, trained in enumerate(adapters)})
    names = [str(number) for number, split in enumerate(splits) for _ in split.lengths]
    first, rows = adapters[0], joined(splits)
    logits = torch.full((len(names), max(len(trained.label_names) for trained in adapters)), -math.inf)
    for batch in _batches(first, rows):
        inputs = (batch.input_ids.to(first.compute.device), batch.attention_mask.to(first.compute.device))
        with first.compute.autocast():
            batch_logits = several([names[row] for row in batch.indices], *inputs)
        logits[batch.indices, : batch_logits.shape[1]] = batch_logits.float().cpu()
    found = zip(logits.split([len(split.lengths) for split in splits]), adapters, splits, strict=True)
    return [mean_of_windows(check_finite(own[:, : len(one.label_names)]), split) for own, one, split in found]


def write_predictions(adapters: dict[str, Trained], arguments: Arguments) -> None:
    """Classify the rows of --predict into --out, written atomically; of several adapters each has a column."""
    source, out = arguments.predict, arguments.out
    assert source is not None and out is not None, "checked by check_arguments"
    columns = {arguments.text_columns or trained.config.data.text_columns for trained in adapters.values()}
    if len(columns) > 1:
        raise ConfigError("the adapters were trained on columns of different names; choose them by --text-columns")
    ids, texts, notes = read_unlabelled(source, columns.pop(), arguments.id_column, arguments.encoding)
    for note in notes:
        say(f"            {note}")
    for trained in adapters.values():
        separated = trained.model.config.multi_label and not arguments.indices
        if separated and any(_SEPARATOR in name for name in trained.label_names):
            raise ConfigError(f"a class name has {_SEPARATOR!r} in it, which separates labels in --out; add --indices")
    labels = []
    for (adapter, trained), found in zip(adapters.items(), classify([*adapters.values()], texts), strict=True):
        names = [*map(str, range(len(trained.label_names)))] if arguments.indices else trained.label_names
        chosen = found > 0.5 if trained.model.config.multi_label else found.argmax(dim=1)
        labels.append(class_names(chosen.numpy(), names, _SEPARATOR))
        if arguments.abstain is not None:
            undecided = (found.amax(dim=1) < arguments.abstain).tolist()
            labels[-1] = ["" if doubt else label for doubt, label in zip(undecided, labels[-1], strict=True)]
            whose = f" by {adapter}" if adapter else ""
            say(f"undecided   {sum(undecided):,} of {len(ids):,} rows{whose}: their label is empty")
    with atomic_write(out) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("ID", *(adapters if arguments.adapter else ["label"])))
        writer.writerows(zip(ids, *labels, strict=True))
    say(f"written     {out}: {len(ids):,} rows")


def _score(trained: Trained, split: Split, announce: bool = True) -> Scores:
    encoded = _encode(trained, split, announce)
    return score(_logits(trained, encoded), encoded.labels, trained.label_names)


def report_on(trained: Trained, source: str, path: Path | None) -> None:
    """Print the scores on another source, whose classes the file `path` maps to the adapter's."""
    if trained.model.config.multi_label:
        raise ConfigError("--on needs one class per text, but the adapter is multi-label; leave --on out")
    mapped = map_texts(load_other(source, trained.config.data), trained.label_names, path)
    encoded = _encode(trained, mapped.split)
    scores = score(mapped.group_logits(_logits(trained, encoded)), encoded.labels, tuple(mapped.groups))
    say(f"\n{scores.table()}\n\n{scores.headline()} on {len(encoded.labels):,} texts of {source}")


def report_noise(trained: Trained, folder: RunFolder, own_settings: bool) -> None:
    """Print the accuracy (multi-label: exact match) on the test texts by corruption and severity.

    With `own_settings`, those of the run itself, the accuracies are also drawn and written into the folder.
    """
    split = _test_split(trained)
    clean = _score(trained, split).accuracy
    measure = "exact match" if trained.model.config.multi_label else "accuracy"
    say(f"\n{measure} (%) by severity: the share of words, or of marks, that are corrupted")
    say(f"{'':<14}" + "".join(f"{severity:>8.2f}" for severity in (0, *SEVERITIES)))
    accuracies: dict[str, list[float]] = {}
    for name, corrupt in CORRUPTIONS.items():
        splits = (Split(corrupt(split.texts, severity, random.Random(0)), split.labels) for severity in SEVERITIES)
        accuracies[name] = [clean, *(_score(trained, corrupted, announce=False).accuracy for corrupted in splits)]
        say(f"{name:<14}" + "".join(f"{100 * accuracy:>8.2f}" for accuracy in accuracies[name]))
    if not own_settings:
        say("\nnoise.json and plots/noise.png are not written: they are for the run's own settings")
        return
    write_text_atomic(folder.path / "noise.json", json.dumps(accuracies))
    folder.plots.mkdir(exist_ok=True)
    draw = partial(draw_noise, severities=(0, *SEVERITIES), accuracies=accuracies, measure=measure)
    save_png(draw, folder.plots / "noise.png", (6.6, 3.6))
    say(f"\nwritten     {folder.plots / 'noise.png'}, {folder.path / 'noise.json'}")


def report_speed(trained: Trained) -> None:
    """Print texts per second and time per call on the test texts, adapters separate and merged, side by side."""
    split = _encode(trained, _test_split(trained))
    merged = copy.deepcopy(trained.model)
    if dequantize(merged):
        say("dequantized the base's weights of the merged copy")
    merge_lora(merged)
    models = {"adapters separate": trained.model, "adapters merged": unload_lora(merged)}
    rows = []
    for size, calls in ((1, 100), (64, 10)):
        batches = evaluation_batches(split, size, trained.tokenizer.pad_token_id, "longest", trained.compute.device)
        full = [batch for batch in batches if len(batch.labels) == size]
        # Evenly from the shortest to the longest texts.
        chosen = [full[i * len(full) // calls] for i in range(calls)] if len(full) > calls else full
        if chosen:
            rows += measure_speed(models, chosen, trained.compute).items()
    counted = "; each window counts as a text" if trained.tokenizer.windows > 1 else ""
    say(f"compute     {trained.compute.describe()}, from token ids to logits{counted}\n")
    say(speed_table(rows))


def _test_split(trained: Trained) -> Split:
    """The test texts. Raises ConfigError if there are no settings, or other classes than the adapter's."""
    if not trained.has_data:
        raise ConfigError("an adapter alone has no test split; add --config FILE.toml, or --text")
    config = trained.config
    text = trained.text
    if text is None:
        text = match_classes(load_source(config.data, config.train.seed), trained.label_names, "the adapter")
    say(f"data        {text.origin}, {len(text.test.texts):,} test texts")
    if text.multi_label != trained.model.config.multi_label:
        which = "the data is multi-label, the adapter is not" if text.multi_label else "the adapter is multi-label only"
        raise ConfigError(f"{text.origin}: {which}; give data like that of its training")
    return text.test


def check_arguments(arguments: Arguments) -> None:
    """Raise ConfigError for incompatible arguments and for outputs that can't be written, before any work."""
    if (arguments.run is None) == (not arguments.adapter):
        raise ConfigError("give either one folder, or several with --adapter FOLDER before each")
    if len(set(arguments.adapter)) < len(arguments.adapter):
        raise ConfigError("--adapter: a folder is given twice; give each once")
    questions = {
        "--text and --file": arguments.text is not None or arguments.file is not None,
        "--predict": arguments.predict is not None,
        "--on": arguments.on is not None,
        "--noise": arguments.noise,
        "--speed": arguments.speed,
    }
    if sum(questions.values()) > 1:
        given = ", ".join(name for name, asked in questions.items() if asked)
        raise ConfigError(f"{given} ask for different things; give one of them")
    if arguments.adapter and not (questions["--text and --file"] or questions["--predict"]):
        raise ConfigError("--adapter needs --text, --file or --predict; scores and speed are those of one folder")
    if arguments.map is not None and arguments.on is None:
        raise ConfigError("--map has no effect without --on; remove it")
    if arguments.adapter and (arguments.merged or arguments.export is not None):
        raise ConfigError("--merged and --export are for one folder; several adapters can't be merged into one base")
    if arguments.abstain is not None and not 0 < arguments.abstain < 1:
        raise ConfigError(f"--abstain {arguments.abstain}: give a probability between 0 and 1")
    ignoring = [name for name in ("--on", "--noise", "--speed") if questions[name]]
    if arguments.export is not None and not any(questions.values()):
        ignoring.append("--export alone")
    if arguments.abstain is not None and ignoring:
        raise ConfigError(f"--abstain has no effect with {ignoring[0]}; remove it")
    export = arguments.export
    if export is not None and export.exists() and not (export.is_dir() and not any(export.iterdir())):
        raise ConfigError(f"{export}: exists and is not an empty folder; export to a new one")
    if (arguments.predict is None) != (arguments.out is None):
        raise ConfigError("--predict FILE and --out FILE go together; give both")
    for option in dataclasses.fields(Arguments):
        of_predict = option.name in ("text_columns", "id_column", "encoding", "indices")
        if of_predict and arguments.predict is None and getattr(arguments, option.name) != option.default:
            raise ConfigError(f"--{option.name.replace('_', '-')} has no effect without --predict; remove it")
    if arguments.out is not None and arguments.out.exists():
        raise ConfigError(f"{arguments.out} exists; remove it, or give another --out")
    if arguments.out is not None and not arguments.out.parent.is_dir():
        raise ConfigError(f"{arguments.out}: there is no folder {arguments.out.parent}; make it, or give another --out")
    if arguments.speed and (arguments.merged or arguments.export is not None):
        raise ConfigError("--speed measures both, merged and not; leave --merged and --export out")


def report_classes(adapters: dict[str, Trained], texts: Sequence[str], abstain: float | None) -> None:
    """Print the most likely classes of each text, by each adapter."""
    for adapter, one in adapters.items():
        count, whose = len(one.label_names), f" by {adapter}" if adapter else ""
        each = ", multi-label: one does not exclude another" if one.model.config.multi_label else ""
        say(f"            the {min(4, count)} most likely of {count} classes{whose}, with probabilities{each}")
    width = max(map(len, adapters))
    for text, *rows in zip(texts, *classify([*adapters.values()], texts), strict=True):
        for (adapter, one), row in zip(adapters.items(), rows, strict=True):
            order = row.argsort(descending=True)[:4].tolist()
            answers = "  ".join(f"{one.label_names[i]} {row[i]:.3f}" for i in order)
            if abstain is not None and row.max() < abstain:
                answers = f"undecided  {answers}"
            say(f"{adapter:<{width}}{'  ' if adapter else ''}{answers}   {text[:80]}")


def report_test(trained: Trained, abstain: float | None) -> None:
    """Print the scores of the test split."""
    split = _encode(trained, _test_split(trained))
    logits = _logits(trained, split)
    scores = score(logits, split.labels, trained.label_names)
    say(f"\n{scores.table()}\n\n{scores.summary()}")
    if not trained.model.config.multi_label:
        say(calibrate(logits, split.labels, trained.temperature).summary())
    if abstain is not None:
        say(abstention_summary(logits, split.labels, trained.temperature, abstain))


def export(trained: Trained, folder: Path) -> None:
    """Write the merged model as a checkpoint folder that gives the same probabilities."""
    if trained.temperature != 1:
        say(f"divided     the last layer by the temperature: logits are z / {trained.temperature:.3f}")
    plain = unload_lora(trained.model).cpu()
    for parameter in plain.classifier.out_proj.parameters():
        parameter.data /= trained.temperature  # so that softmax(logits) are the probabilities given here
    save_checkpoint(plain, folder, trained.tokenizer)
    say(f"exported    {folder}: open it with transformers' AutoModelForSequenceClassification")
    if trained.tokenizer.windows > 1:
        say("            windows are not part of it: average the logits of a long text's windows yourself")


def evaluate(arguments: Arguments) -> int:
    """Run what the arguments ask for; returns the exit code."""
    check_arguments(arguments)
    texts = read_texts(arguments)
    adapters = load_several(arguments) if arguments.adapter else {"": load_trained(arguments)}
    trained = next(iter(adapters.values()))
    for adapter, one in adapters.items():
        if arguments.abstain is not None and one.model.config.multi_label:
            raise ConfigError(f"--abstain is for one class per text; {adapter or arguments.run} is multi-label")
    if arguments.merged or arguments.export is not None:
        if dequantize(trained.model):
            say("dequantized the base's weights")
        merge_lora(trained.model)
        say("merged      the adapters are folded into the weights")

    if texts:
        report_classes(adapters, texts, arguments.abstain)
    elif arguments.predict is not None:
        write_predictions(adapters, arguments)
    elif arguments.on is not None:
        report_on(trained, arguments.on, arguments.map)
    elif arguments.noise:
        assert arguments.run is not None, "checked by check_arguments"
        folder = RunFolder(arguments.run)
        merged = arguments.merged or arguments.export is not None
        others = arguments.config, arguments.base, arguments.base_bits, arguments.precision, merged
        report_noise(trained, folder, own_settings=not (folder.config.is_file() and any(others)))
    elif arguments.speed:
        report_speed(trained)
    elif arguments.export is None:
        report_test(trained, arguments.abstain)
    if arguments.export is not None:
        export(trained, arguments.export)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: evaluate(parse_options(Arguments, sys.argv[1:], prog="evaluate.py"))))
