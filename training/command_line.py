"""Shared by all commands: options from dataclasses, user errors as one line, and exit codes.

0 success, 1 a run of a table failed, 2 an input can't be used (one line names it and the fix), 3 another process of the
same run died, 130 or 143 stopped by Ctrl-C or SIGTERM. Any other error is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import io
import itertools
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import tyro

from data.errors import DataError
from lora.errors import LoRAError
from roberta.files import CheckpointError
from training.distributed import ALONE, World
from training.errors import ConfigError, LostProcessError

Options = TypeVar("Options")

EXIT_BAD_INPUT = 2
EXIT_LOST = 3
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count

# In RuntimeErrors of torch: "DefaultCPUAllocator: can't allocate memory" (on Windows "not enough memory"), "MPS backend
# out of memory", CUBLAS_STATUS_ALLOC_FAILED.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


def run_command(command: Callable[[], int], world: World = ALONE) -> int:
    """Run `command` and return its exit code; a user error becomes one line on stderr and exit code 2.

    Of several processes only the first that fails prints a line.
    """
    code = EXIT_BAD_INPUT
    try:
        return command()
    except (ConfigError, DataError, LoRAError, CheckpointError) as error:
        message = str(error)
    except LostProcessError as error:
        message, code = str(error), EXIT_LOST
    except (MemoryError, RuntimeError, OSError) as error:
        message = _memory_message(error) or _write_message(error)
        if not message:
            raise
    except KeyboardInterrupt:
        world.report_error("interrupted")
        return EXIT_INTERRUPTED
    world.report_error(f"error: {' '.join(message.split())}")
    return code


def _memory_message(error: Exception) -> str:
    """The message for an out-of-memory error; empty for any other."""
    of_gpu = isinstance(error, torch.OutOfMemoryError)
    of_cpu = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    by_text = isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
    if not (of_gpu or of_cpu or by_text):
        return ""
    return (
        f"out of {'GPU ' if of_gpu else ''}memory; free some (--resume then continues the run), or "
        "lower train.batch_size, train.eval_batch_size or data.max_length"
    )


def _write_message(error: Exception) -> str:
    """The message for a file that can't be written; empty for any other error. Reading raises the classes above."""
    if not isinstance(error, OSError):
        return ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    reason = "the disk is full; free space" if full else f"{error.strerror or error}; fix that"
    return f"{error.filename or 'a file of the run'}: can't be written, {reason} or choose another folder"


def parse_options(kind: type[Options], arguments: list[str], *, prog: str, default: Options | None = None) -> Options:
    """Parse a command line into the dataclass `kind`. Raises ConfigError; --help prints and exits."""
    start = tyro.MISSING_NONPROP if default is None else default
    box, known = io.StringIO(), option_names(kind)
    given = [word.partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--")]
    for name in known:
        if known[name] and given.count(name) > 1:  # only the last would count
            raise ConfigError(f"command line: {name} is given {given.count(name)} times; give all its values after one")
    try:
        with contextlib.redirect_stderr(box):
            options, unknown = tyro.cli(
                kind,
                args=arguments,
                prog=prog,
                default=start,
                return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        # tyro draws a box: the title, a rule unless the terminal has box characters, the error, a rule, advice.
        lines = [line.strip("│|─- ") for line in box.getvalue().splitlines()[1:]]
        error = " ".join(itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines)))
        error = error.removeprefix("Error parsing ").removesuffix(".")
        error = re.sub(r"^(\S+): (?=\1[.:])", "", error)  # tyro puts the section before an error that names it
        error = error.replace("invalid literal for int() with base 10:", "not an integer:")
        error = error.replace("could not convert string to float:", "not a number:")
        option, _, reason = error.partition(":")
        if known.get(option) and (word := re.search(r"'([^' ]+,[^' ]*)'", reason)):
            values = word[1].replace(",", " ")
            error = f"{option}: {word[0]} is one word; write the values with blanks between them: {option} {values}"
        raise ConfigError(f"command line: {error}; --help lists the options") from None
    if unknown:
        names = [word.partition("=")[0].replace("_", "-") for word in unknown if word.startswith("--")]
        near = [match for name in names for match in difflib.get_close_matches(name, known, n=1)]
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        if absent := {
            section
            for name in near
            for section in [name[2:].partition(".")[0].replace("-", "_")]
            if _is_off(default, section)
        }:
            meant = f"; it needs the table [{min(absent)}] in the TOML file"
        raise ConfigError(f"command line: unknown {' '.join(unknown)}{meant}; --help lists the options")
    return options


def option_names(kind: Any, prefix: str = "--") -> dict[str, bool]:
    """The options of a dataclass and its sections (--output, --lora.rank, ...); whether each takes several values."""
    names: dict[str, bool] = {}
    hints = typing.get_type_hints(kind, include_extras=True)
    for name in (field.name for field in dataclasses.fields(kind)):
        hint, option = hints[name], prefix + name.replace("_", "-")
        if section := section_of(hint):
            names |= option_names(section, f"{option}.")
        elif tyro.conf.Positional not in (marks := getattr(hint, "__metadata__", ())):
            several = any(typing.get_origin(part) in (tuple, Mapping) for part in (hint, *typing.get_args(hint)))
            names[option] = several and tyro.conf.UseAppendAction not in marks  # that one is repeated for each value
    return names


def _is_off(options: Any, section: str) -> bool:
    """Whether the section of a method is None: its options exist only where a file turns it on."""
    return options is not None and getattr(options, section, options) is None


def section_of(hint: Any) -> Any:
    """The dataclass that a field holds, or may hold; None for another field."""
    return next((kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)), None)
