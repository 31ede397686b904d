"""What the commands' arguments are made of: a parser whose errors are one line, and types that say what they expect."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

DTYPES = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}


class Commands(Protocol):
    """What argparse's add_subparsers returns."""

    def add_parser(self, name: str, **kwargs: Any) -> argparse.ArgumentParser:
        """A parser of one command."""
        ...


_EXAMPLES = "examples:\n"


def examples(*commands: str) -> str:
    """The end of a help text: a command a line, not broken, so that it can be copied."""
    return _EXAMPLES + "\n".join(f"  {command}" for command in commands)


class _Formatter(argparse.HelpFormatter):
    """Breaks lines anywhere but in examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(_EXAMPLES) else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """Errors are one line, exit status 2; examples stand as they are typed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _Formatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def positive_int(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def dtype(text: str) -> torch.dtype:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(DTYPES)}, got {text!r}")
    return DTYPES[text]


def cuda_index(text: str) -> int | None:
    """The number of a CUDA device, None for the CPU."""
    name, _, index = text.partition(":")
    if text == "cpu":
        return None
    if text == "cuda" or (name == "cuda" and index.isascii() and index.isdecimal()):
        return int(index or 0)
    raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:<number>, got {text!r}")


def device_of(index: int | None, parser: argparse.ArgumentParser) -> torch.device:
    """The device of a `cuda_index`; the command ends where there is no such device."""
    if index is None:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if index >= count:
        found = f"{count} CUDA device{'s' * (count > 1)}" if count else "no CUDA device"
        parser.error(f"argument --device: expected a device that is there, PyTorch finds {found}")
    return torch.device("cuda", index)


def folder(text: str) -> Path:
    """A folder, which need not be there yet."""
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got ''")
    path = Path(text)
    if os.path.exists(path) and not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, {text!r} is a file")
    return path


def new_file(text: str) -> Path:
    """A file that can be written: it may be there, its folder must."""
    path = Path(text)
    if not text or path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, got {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that is there, got {text!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text!r}")
    return path


def lacks(command: str, packages: Sequence[str]) -> bool:
    """Whether one of the packages cannot be imported, which is then said."""
    missing: list[str] = []
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        print(f"dyncore {command} needs {' and '.join(missing)}: pip install 'dyncore[bench]'", file=sys.stderr)
    return bool(missing)
