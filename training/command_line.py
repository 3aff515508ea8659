"""What the commands share at their outermost line: which errors are the user's, and exit codes.

0 all went well, 1 a run of a table failed, 2 an input can't be used (one line says which and how to mend it), 3 another
process of the same run died, 130 or 143 stopped by Ctrl-C or SIGTERM. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import io
import re
from collections.abc import Callable
from typing import TypeVar

import torch
import tyro

from data.errors import DataError
from lora.config import LoRAError
from roberta.config import CheckpointError
from training.distributed import ALONE, World
from training.errors import ConfigError, LostProcessError

Options = TypeVar("Options")

EXIT_BAD_INPUT = 2
EXIT_LOST = 3
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count

_SUGGESTS = ("Perhaps you meant", "Arguments similar to")  # titles of tyro's, for one unknown option and for several

# A CPU without memory is a plain RuntimeError of torch ("DefaultCPUAllocator: can't allocate memory", on Windows "not
# enough memory"), and so is Apple's GPU ("MPS backend out of memory"). CUDA has an error of its own, but its libraries
# have not (CUBLAS_STATUS_ALLOC_FAILED).
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


def run_command(command: Callable[[], int], world: World = ALONE) -> int:
    """Run `command`; turn the user's errors into one line on stderr and exit code 2.

    Of several processes only the first that fails prints its line: the others fail for the same reason, or of it.
    """
    code = EXIT_BAD_INPUT
    try:
        return command()
    except (ConfigError, DataError, LoRAError, CheckpointError) as error:
        message = str(error)
    except LostProcessError as error:
        message, code = str(error), EXIT_LOST
    except (MemoryError, RuntimeError, OSError) as error:
        message = _about_memory(error) or _about_writing(error)
        if not message:
            raise
    except KeyboardInterrupt:
        world.report_error("interrupted")
        return EXIT_INTERRUPTED
    world.report_error(f"error: {' '.join(message.split())}")
    return code


def _about_memory(error: Exception) -> str:
    """The line for an error that says that memory is used up; empty for any other."""
    of_gpu = isinstance(error, torch.OutOfMemoryError)
    of_cpu = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    by_text = isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
    if not (of_gpu or of_cpu or by_text):
        return ""
    return (
        f"out of {'GPU ' if of_gpu else ''}memory; free some (a run that it cut off then goes on with --resume), or "
        "lower train.batch_size, train.eval_batch_size or data.max_length"
    )


def _about_writing(error: Exception) -> str:
    """The line for a file that can't be written: files that are read have errors of their own."""
    if not isinstance(error, OSError):
        return ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    reason = "the disk is full; free space" if full else f"{error.strerror or error}; mend that"
    return f"{error.filename or 'a file of the run'}: can't be written, {reason} or choose another folder"


def parse_options(kind: type[Options], arguments: list[str], *, prog: str, default: Options | None = None) -> Options:
    """Options of a command line as an instance of the dataclass `kind`. Raises ConfigError; --help prints and exits."""
    complaint = io.StringIO()
    given = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=arguments, prog=prog, **given)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ConfigError(f"command line: {_complaint(complaint.getvalue())}; --help lists the options") from None


def _complaint(box: str) -> str:
    """What tyro says in a box, as one line: what is wrong and, below a rule, what may have been meant."""
    sections: list[list[str]] = [[]]
    for line in (line.strip("│| ") for line in box.splitlines()[1:]):
        if line.strip("─-"):
            sections[-1].append(line)
        elif sections[-1]:  # a terminal without box characters gets a rule below the title as well
            sections.append([])
    wrong = " ".join(sections[0]).removesuffix(".")
    wrong = re.sub(r"^Error parsing (\S+): ", r"\1: ", wrong)
    # int() and float() speak to programmers.
    wrong = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is no whole number", wrong)
    wrong = re.sub(r"could not convert string to float: (.*)", r"\1 is no number", wrong)
    meant = [section for section in sections if section and section[0].startswith(_SUGGESTS)]
    # tyro keeps unknown options in a set, whose order changes from process to process; here they come as typed.
    meant.sort(key=lambda section: (wrong.find(section[0].removesuffix(":").rpartition(" ")[2]), section[0]))
    options = dict.fromkeys(line.split()[0].strip(",") for part in meant for line in part if line.startswith("--"))
    return wrong + (f"; did you mean {' or '.join(options)}?" if options else "")
