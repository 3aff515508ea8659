"""User errors become one line and an exit code; all other errors keep their traceback."""

import errno
import io
import os
import sys

import pytest
import torch

from training.command_line import EXIT_BAD_INPUT, EXIT_LOST, run_command
from training.errors import LostProcessError
from training.progress import say


def failing(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (lambda: torch.empty(1 << 60, dtype=torch.uint8), "out of memory"),  # torch's real error on this machine
        (failing(MemoryError()), "out of memory"),
        (failing(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))), "out of memory"),
        (failing(RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB)")), "out of memory"),
        (failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2.00 GiB.")), "out of GPU memory"),
        (failing(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")), "out of memory"),
    ],
)
def test_out_of_memory_is_one_line_that_names_what_to_lower(command, words, capsys):
    assert run_command(command) == EXIT_BAD_INPUT
    err = capsys.readouterr().err
    assert err.startswith(f"error: {words}; ") and err.count("\n") == 1
    assert "--resume" in err and "train.batch_size" in err


def test_a_lost_process_is_not_an_out_of_memory_error(capsys):
    assert run_command(failing(LostProcessError("another process is out of memory"))) == EXIT_LOST
    assert capsys.readouterr().err == "error: another process is out of memory\n"


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("a bug")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error), match=str(error)):
        run_command(failing(error))


def test_what_the_console_can_not_encode_does_not_end_the_run(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    say("体育 0.9")
    assert sys.stdout.buffer.getvalue() == rb"\u4f53\u80b2 0.9" + os.linesep.encode()
