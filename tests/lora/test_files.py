"""Our own files are written whole or not at all, and what is said to be written is on the disk."""

import errno
import os
from pathlib import Path

import pytest

from lora.files import atomic_write


def test_written_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done, file = [], tmp_path / "report.json"
    real_replace = Path.replace

    def flush(descriptor):
        places = {path.stat().st_ino: path.name for path in (tmp_path, *tmp_path.iterdir())}
        done.append(f"flush {places[os.fstat(descriptor).st_ino]}")

    def replace(path, target):
        done.append("rename")
        return real_replace(path, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "replace", replace)
    with atomic_write(file) as part:
        part.write_text("whole")
    assert done == ["flush report.json.part", "rename", f"flush {tmp_path.name}"]
    assert file.read_text() == "whole" and list(tmp_path.iterdir()) == [file]


def refuse(number):
    def flush(descriptor):
        raise OSError(number, os.strerror(number))

    return flush


def test_folder_that_knows_no_flush_is_written_to_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    with atomic_write(tmp_path / "report.json") as part:
        part.write_text("whole")
    assert (tmp_path / "report.json").read_text() == "whole"


def test_flush_that_finds_the_disk_full_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "report.json").write_text("before")
    monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"), atomic_write(tmp_path / "report.json") as part:
        part.write_text("whole")
    assert (tmp_path / "report.json").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(errno.ENOSPC, "No space left on device")])
def test_file_that_could_not_be_written_is_what_it_was(tmp_path, error):
    file = tmp_path / "report.json"
    file.write_text("before")
    with pytest.raises(type(error)) as raised, atomic_write(file) as part:
        part.write_text("half")
        raise error
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]
    if isinstance(error, OSError):
        assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(file)
