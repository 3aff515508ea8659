"""The tokenizer that a folder's files describe, by the rules of `transformers` 5. A learner can skip this file.

`tokenizer_config.json`, else `config.json`, names a class. `PreTrainedTokenizerFast` uses `tokenizer.json` as it is.
The classes of RoBERTa, BERT, XLM-R and CamemBERT take only the vocabulary from it (or from `vocab.json` + `merges.txt`,
or `vocab.txt`), and their rules from the settings. Special and added tokens can be in any of four files.
"""

from __future__ import annotations

import base64
import contextlib
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from roberta.files import MAX_JSON, MAX_TOKENIZER, CheckpointError, check_file, read_json

_CLASSES = {
    "roberta": "RobertaTokenizer",
    "bert": "BertTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
}
_AS_IT_IS = ("PreTrainedTokenizer", "TokenizersBackend")  # the first without its suffix "Fast"
_MODELS = {"RobertaTokenizer": "BPE", "BertTokenizer": "WordPiece"}  # the others: Unigram
_VOCABULARIES = {"RobertaTokenizer": ("vocab.json", "merges.txt"), "BertTokenizer": ("vocab.txt",)}
# Roles in the order in which transformers adds the tokens that a vocabulary lacks.
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ROBERTA_TOKENS = ("<s>", "</s>", "<unk>", "</s>", "<pad>", "<s>", "<mask>")
_BERT_TOKENS = (None, None, "[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
_CAMEMBERT_EXTRA = ["<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED"]
_TYPES: dict[str, Any] = {
    "tokenizer_class": str,
    "add_prefix_space": bool,
    "do_lower_case": bool,
    "tokenize_chinese_chars": bool,
    "strip_accents": bool,
}
_TOKEN_FIELDS: dict[str, Any] = {
    "added_tokens_decoder": dict,
    "model_specific_special_tokens": dict,
    "additional_special_tokens": list,
    "extra_special_tokens": (list, dict),
}
# Settings with which transformers gives other ids; only this value of each is supported.
_SUPPORTED: dict[str, Any] = {
    "padding_side": "right",
    "split_special_tokens": False,
    "fast_tokenizer_files": [],
    "auto_map": {},
    "init_inputs": [],
    "vocab": {},
    "merges": [],
}


class TokenizerFiles(NamedTuple):
    """What the files of a folder describe."""

    source: Path
    """The file with the vocabulary."""
    tokenizer: Tokenizer
    special_tokens: dict[str, str]
    """The token of each role ("pad_token", ...) that the files or the class name."""
    truncation_side: str
    """Which end of a long text is cut off: "right" or "left"."""


class _Tokens(NamedTuple):
    roles: dict[str, AddedToken]
    extra: list[AddedToken]
    """Special tokens without a role."""
    added: list[AddedToken]
    """In the order of their ids."""


def read_tokenizer(directory: Path) -> TokenizerFiles:
    """The tokenizer that `transformers.AutoTokenizer.from_pretrained(directory)` builds.

    Raises CheckpointError if a file is missing or damaged, or if a setting is not supported.
    """
    settings, single = _settings(directory / "tokenizer_config.json"), directory / "tokenizer.json"
    raw = _read(single, MAX_TOKENIZER)
    name = _class(directory, settings, _read(directory / "config.json"))
    files = [single] if single.exists() else [directory / file for file in _VOCABULARIES.get(name, (single.name,))]
    if not all(file.exists() for file in files):
        raise CheckpointError(f"{directory}: {_what_is_missing(directory)}")
    for file in files:
        check_file(file, MAX_TOKENIZER)
    tokens = _tokens(directory, name, settings, raw)
    try:
        if name in _AS_IT_IS:
            tokenizer = Tokenizer.from_file(str(single))
            _add(tokenizer, tokens)
        else:
            tokenizer = _built(name, files, settings, raw, tokens)
        side = (raw.get("truncation") or {}).get("direction", "Right").lower()
    except CheckpointError as error:
        raise CheckpointError(f"{files[0]}: {error}") from None
    except Exception as error:  # the library raises bare Exception for every kind of broken file
        raise CheckpointError(f"{files[0]}: not a tokenizer ({error}); fetch the checkpoint again") from None
    special = {role: token.content for role, token in tokens.roles.items()}
    return TokenizerFiles(files[0], tokenizer, special, settings.get("truncation_side", side))


def _read(path: Path, largest: int = MAX_JSON) -> dict[str, Any]:
    """A JSON object; {} if there is no such file. Raises CheckpointError."""
    return read_json(path, largest) if path.exists() else {}


def _settings(path: Path, **flags: bool) -> dict[str, Any]:
    """The fields of tokenizer_config.json or special_tokens_map.json; tokens that are objects become `AddedToken`.

    Fields that are null are left out, except roles. `flags` apply to each token that is an object. Raises
    CheckpointError for a field of the wrong type or with a value that is not supported.
    """
    settings = {key: value for key, value in _read(path).items() if value is not None or key in _ROLES}
    for key, value in settings.items():
        if key in _SUPPORTED and value != _SUPPORTED[key]:
            raise CheckpointError(f"{path}: {key} is {value!r:.60}, only {_SUPPORTED[key]!r} is supported")
        if not isinstance(value, (_TYPES | _TOKEN_FIELDS).get(key, object)):
            raise CheckpointError(f"{path}: {key} is {value!r:.60}, a value of the wrong type; correct it")
        if key == "truncation_side" and value not in ("right", "left"):
            raise CheckpointError(f"{path}: truncation_side is {value!r:.60}, it must be 'right' or 'left'")
        if key in _TOKEN_FIELDS and isinstance(value, dict):
            settings[key] = {name: _token(path, f"{key} {name!r:.60}", token, flags) for name, token in value.items()}
        elif key in _TOKEN_FIELDS:
            settings[key] = [_token(path, key, token, flags) for token in value]
        elif value is not None and (key in _ROLES or (key.endswith("_token") and isinstance(value, str | dict))):
            settings[key] = _token(path, key, value, flags)
    return settings


def _token(path: Path, field: str, value: Any, flags: dict[str, bool]) -> str | AddedToken:
    """A token as a file gives it: a text, or an object with `content` and flags. Raises CheckpointError."""
    with contextlib.suppress(TypeError, ValueError):  # a flag that is not a bool, text that is not UTF-8
        if isinstance(value, str) and AddedToken(value).content:
            return value
        if isinstance(value, dict) and isinstance(value.get("content"), str) and value["content"]:
            return AddedToken(**{key: flag for key, flag in value.items() if key != "__type"} | flags)
    raise CheckpointError(f"{path}: {field} is {value!r:.60}, it must be a text, or an object with content and flags")


def _class(directory: Path, settings: dict[str, Any], config: dict[str, Any]) -> str:
    """The name of the tokenizer class, without "Fast". Raises CheckpointError for an unknown one."""
    name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if not name and "model_type" in config:
        name = _CLASSES.get(str(config["model_type"]))
    elif not name and not (directory / "tokenizer.json").exists():
        name = next((one for one, files in _VOCABULARIES.items() if (directory / files[0]).exists()), None)
    name = str(name or "TokenizersBackend").removesuffix("Fast")
    if name not in (*_AS_IT_IS, *_CLASSES.values()):
        raise CheckpointError(
            f"{directory}: tokenizer_class {name!r:.60} is not supported, only {', '.join(_CLASSES.values())}; "
            "name PreTrainedTokenizerFast in tokenizer_config.json to use tokenizer.json as it is"
        )
    return name


def _what_is_missing(directory: Path) -> str:
    if found := next(directory.glob("sentencepiece*.model"), None):
        return (
            f'{found.name} is not read; convert it: python -c "from transformers import AutoTokenizer; '
            f"AutoTokenizer.from_pretrained('{directory}').save_pretrained('{directory}')\""
        )
    return "holds no tokenizer; it needs tokenizer.json, or vocab.json + merges.txt (RoBERTa), or vocab.txt (BERT)"


def _tokens(directory: Path, name: str, settings: dict[str, Any], raw: dict[str, Any]) -> _Tokens:
    """All tokens that the files of a folder name, and a class by itself.

    `special_tokens_map.json` and `added_tokens.json` count only if the settings have no `added_tokens_decoder`.
    Raises CheckpointError for what is not a token or not an id.
    """
    listed = settings.get("added_tokens_decoder")
    older = _settings(directory / "special_tokens_map.json", special=True) if listed is None else {}
    given = {key: value for key, value in (settings | older).items() if key in _ROLES}
    custom = {key: value for key, value in (older | settings).items() if key.endswith("_token") and key not in _ROLES}
    custom = {key: value for key, value in custom.items() if isinstance(value, str | AddedToken)}
    extra, additional = settings.get("extra_special_tokens"), settings.get("additional_special_tokens")
    if not extra and additional is not None:
        extra, additional = additional, None
    more, additional = older.get("extra_special_tokens"), older.get("additional_special_tokens", additional)
    for fields in (settings.get("model_specific_special_tokens"), extra, more):
        custom |= fields if isinstance(fields, dict) else {}
    extra = None if isinstance(extra, dict) or isinstance(more, dict) else extra
    if isinstance(more, list):
        extra = (extra or []) + more

    path = directory / "tokenizer_config.json"
    try:
        if listed is None:
            special = {str(token) for token in (*given.values(), *(extra or [])) if token}
            path, listed = directory / "added_tokens.json", {}
            for text, number in _read(path).items():
                listed[int(number)] = AddedToken(text, normalized=text not in special, special=text in special)
            path = directory / "tokenizer.json"
            for entry in raw.get("added_tokens", []):
                listed[entry["id"]] = AddedToken(**{key: value for key, value in entry.items() if key != "id"})
        added = [_special(token) for _, token in sorted((int(number), token) for number, token in listed.items())]
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: an added token or its id is damaged ({error}); correct it") from None
    if extra is None:
        extra = _CAMEMBERT_EXTRA if additional is None and name == "CamembertTokenizer" else additional or []
    if name in _AS_IT_IS:
        default = {"pad_token": padding.get("pad_token")} if isinstance(padding := raw.get("padding"), dict) else {}
    else:
        default = dict(zip(_ROLES, _BERT_TOKENS if name == "BertTokenizer" else _ROBERTA_TOKENS, strict=True))
    roles = dict.fromkeys(_ROLES) | default | given | custom
    return _Tokens({k: _special(v) for k, v in roles.items() if v}, [_special(token) for token in extra], added)


def _special(token: str | AddedToken) -> AddedToken:
    return AddedToken(token, special=True) if isinstance(token, str) else token


def _add(tokenizer: Tokenizer, tokens: _Tokens) -> None:
    """Add the tokens in the order of transformers, which determines the ids of those that the vocabulary lacks."""
    new = list(tokens.added)
    known = {token.content for token in (*tokenizer.get_added_tokens_decoder().values(), *new)}
    for token in (*tokens.roles.values(), *tokens.extra):
        if token.content not in known and repr(token) not in map(repr, new):
            new.append(token)
    tokenizer.add_tokens(new)


def _built(name: str, files: list[Path], settings: dict[str, Any], raw: dict[str, Any], tokens: _Tokens) -> Tokenizer:
    """The tokenizer of a class: the vocabulary of the files with the rules of the settings."""
    bert, first, last = name == "BertTokenizer", *(("cls_token", "sep_token") if name in _MODELS else _ROLES[:2])
    if missing := [role for role in (first, last, "unk_token") if role not in tokens.roles]:
        raise CheckpointError(f"there is no {missing[0]}; name it in tokenizer_config.json")
    tokenizer = Tokenizer(_model(name, files, raw, tokens.roles["unk_token"].content))
    if bert:
        tokenizer.normalizer = normalizers.BertNormalizer(
            handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
            strip_accents=settings.get("strip_accents"),
            lowercase=settings.get("do_lower_case", True),
        )
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
    elif name == "RobertaTokenizer":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space", False))
        tokenizer.decoder = decoders.ByteLevel()
    else:
        rules = raw.get("normalizer") or {}
        for rule in rules["normalizers"] if rules.get("type") == "Sequence" else [rules]:
            if rule.get("type") == "Precompiled":
                tokenizer.normalizer = normalizers.Precompiled(base64.b64decode(rule["precompiled_charsmap"]))
                break
        prepend = "always" if settings.get("add_prefix_space", True) else "never"
        words = pre_tokenizers.Metaspace(prepend_scheme=prepend)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    _add(tokenizer, tokens)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    begin, end = ((token, ids[token]) for token in (tokens.roles[role].content for role in (first, last)))
    processor = processors.BertProcessing(end, begin) if bert else processors.RobertaProcessing(end, begin)
    tokenizer.post_processor = processor
    return tokenizer


def _model(name: str, files: list[Path], raw: dict[str, Any], unk: str) -> models.Model:
    """BPE, WordPiece or Unigram with the vocabulary of tokenizer.json, else of the older files."""
    if files[0].name != "tokenizer.json":
        paths = [str(file) for file in files]
        return models.WordPiece.from_file(*paths, unk_token=unk) if len(paths) == 1 else models.BPE.from_file(*paths)
    model, kind = raw["model"], _MODELS.get(name, "Unigram")
    if model.get("type", kind) != kind:
        raise CheckpointError(
            f"holds {model['type']!r:.60}, and {name} is {kind}; name another tokenizer_class in tokenizer_config.json"
        )
    if kind == "WordPiece":
        return models.WordPiece(model["vocab"], unk_token=unk)
    if kind == "BPE":
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        return models.BPE(model["vocab"], merges)
    pieces = [(piece, score) for piece, score in model["vocab"]]
    found = next((number for number, (piece, _) in enumerate(pieces) if piece == unk), 0)
    return models.Unigram(pieces, unk_id=found if name == "CamembertTokenizer" else 3, byte_fallback=False)
