"""What `dyncore audit` is pointed at: a model out of somebody's code, and inputs from a file or made from shapes.

Every function raises ValueError, naming the argument, on what cannot be found, read or understood.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import pickle
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dyncore.measure.calls import told

_SPEC = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?(?:<(?P<bound>\d+|vocab))?", re.ASCII
)
_EXAMPLE = "8x128x512, 8x128x512:bfloat16, 2x64:int64<vocab or input_ids=2x64:int64<32000"


class Failed(Exception):
    """Code that is not dyncore's failed: the model's factory or its forward."""


def place_of(error: BaseException) -> str:
    """ "Kind: first line (file:line)" of an exception, the place being the innermost outside of torch and dyncore."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), str(Path(importlib.__file__).parent))
    theirs = [f for f in frames if not f.filename.startswith((*inside, "<frozen"))]
    text = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".rstrip(": ")
    return f"{text} ({theirs[-1].filename}:{theirs[-1].lineno})" if theirs else text


# The model ------------------------------------------------------------------------------------------------------------


def _module_of(text: str) -> Any:
    """The Python module of "package.module" or "file.py"."""
    try:
        if text.endswith(".py"):
            path = Path(text)
            if not path.is_file():
                raise ValueError(f"factory: expected a file or module that is there, got {text!r}")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(path.stem, module)  # pickling and dataclasses look there
            sys.path.insert(0, str(path.parent.resolve()))  # as `python file.py` has it
            spec.loader.exec_module(module)
            return module
        if "" not in sys.path:
            sys.path.insert(0, "")  # as `python -m` has it
        return importlib.import_module(text)
    except ValueError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and f"{text}.".startswith(f"{error.name}."):
            raise ValueError(f"factory: expected a module that can be imported, got {text!r}: {error}") from error
        raise Failed(f"factory: importing {text} failed: {place_of(error)}") from error
    except Exception as error:
        raise Failed(f"factory: importing {text} failed: {place_of(error)}") from error


def load_model(text: str) -> tuple[nn.Module, Any]:
    """(model, inputs or None) of "package.module:factory" or "file.py:factory".

    The factory is a module, or called without arguments gives one, or a pair of one and its inputs (what `load_inputs`
    takes from a file). Raises ValueError where there is no such thing, Failed where it fails.
    """
    where, colon, attribute = text.partition(":")
    if not (where and colon and attribute):
        raise ValueError(f"factory: expected package.module:factory or file.py:factory, got {text!r}")
    found = _module_of(where)
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise ValueError(f"factory: expected a name in {where}, which has no {attribute!r}")
        found = getattr(found, name)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ValueError(f"factory: expected a callable or a torch.nn.Module, {text} is a {type(found).__name__}")
        try:
            found = found()
        except Exception as error:
            raise Failed(f"factory: {text} failed: {place_of(error)}") from error
    inputs = None
    if isinstance(found, (tuple, list)) and len(found) == 2:
        found, inputs = found
    if not isinstance(found, nn.Module):
        raise ValueError(f"factory: expected {text} to give a torch.nn.Module, got {type(found).__name__}")
    return found, inputs


# Its inputs -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a model is called with: model(*args, **kwargs); `random`: made from shapes."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    random: bool = False

    def call(self, model: nn.Module) -> Any:
        return model(*self.args, **self.kwargs)

    def to(self, device: torch.device) -> Inputs:
        def move(t: Tensor) -> Tensor:
            return t.to(device)

        return Inputs(*pytree.tree_map_only(Tensor, move, (self.args, self.kwargs)), random=self.random)

    def __str__(self) -> str:
        def text(value: Any) -> str:
            if isinstance(value, Tensor):
                return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
            return type(value).__name__ if pytree.tree_leaves(value) != [value] else repr(value)

        named = [f"{name} {text(value)}" for name, value in self.kwargs.items()]
        return ", ".join([*map(text, self.args), *named]) or "nothing"


def as_inputs(value: Any) -> Inputs:
    """Inputs of a tensor, a tuple or list of arguments, or a mapping of keyword arguments."""
    if isinstance(value, Inputs):
        return value
    if isinstance(value, Mapping):
        return Inputs(kwargs={str(name): argument for name, argument in value.items()})
    return Inputs(tuple(value)) if isinstance(value, (tuple, list)) else Inputs((value,))


def _vocabulary(model: nn.Module, text: str) -> int:
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if isinstance(size, int):
        return size
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if embedding is None:
        raise ValueError(f"inputs: expected a bound such as {text}<100, for the model holds no nn.Embedding, got none")
    return embedding.num_embeddings


def _made(text: str, model: nn.Module, generator: torch.Generator) -> tuple[str | None, Tensor]:
    """(name or None, tensor) of one shape: normal numbers, whole ones below their bound, or True everywhere."""
    match = _SPEC.fullmatch(text)
    if match is None:
        raise ValueError(f"inputs: expected a file or a shape such as {_EXAMPLE}, got {text!r}")
    shape = [int(size) for size in match["shape"].split("x")]
    if 0 in shape:
        raise ValueError(f"inputs: expected sizes above 0, got {text!r}: of nothing, nothing is measured")
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    dtype: Any = torch.int64 if match["bound"] else floats[0] if floats else torch.float32
    if match["dtype"]:
        dtype = getattr(torch, match["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"inputs: expected a dtype of torch, got {match['dtype']!r} in {text!r}")
    if match["bound"] and (dtype.is_floating_point or dtype == torch.bool):
        raise ValueError(f"inputs: expected a bound with whole numbers alone, got {text!r}")
    if dtype.is_floating_point:
        return match["name"], torch.randn(shape, generator=generator).to(dtype)
    if dtype == torch.bool:
        return match["name"], torch.ones(shape, dtype=dtype)
    bound = int(match["bound"]) if match["bound"] not in (None, "vocab") else _vocabulary(model, text)
    if bound < 1:
        raise ValueError(f"inputs: expected a bound above 0, got {text!r}")
    return match["name"], torch.randint(bound, shape, generator=generator).to(dtype)


def _from_file(path: Path) -> Inputs:
    try:
        return as_inputs(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"inputs: expected a file of torch.save with tensors, numbers, tuples, lists and dicts, got {path}, which "
            "torch.load(weights_only=True) refuses"
        ) from error
    except Exception as error:
        raise ValueError(f"inputs: expected a file of torch.save, cannot read {path} ({told(error)})") from error


def load_inputs(texts: Sequence[str], model: nn.Module, found: Any = None) -> Inputs:
    """Inputs of one file of torch.save, or of shapes (see docs/audit.md); without any, those that came with the model:
    `found`, or its `dummy_inputs`, as models of transformers have them."""
    files = [text for text in texts if _SPEC.fullmatch(text) is None and Path(text).is_file()]
    if files:
        if len(texts) > 1:
            raise ValueError(f"inputs: expected one file, or shapes alone, got {' '.join(texts)}")
        return _from_file(Path(files[0]))
    if texts:
        generator = torch.Generator().manual_seed(0)
        made = [_made(text, model, generator) for text in texts]
        names = [name for name, _ in made if name is not None]
        if len(set(names)) < len(names):
            raise ValueError(f"inputs: expected each name once, got {' '.join(texts)}")
        named = {name: t for name, t in made if name is not None}
        return Inputs(tuple(t for name, t in made if name is None), named, random=True)
    if found is None:
        found = getattr(model, "dummy_inputs", None)
    if found is None:
        takes = inspect.signature(model.forward)
        raise ValueError(
            f"inputs: expected --inputs with a file or shapes such as {_EXAMPLE}: forward takes {takes}, got none"
        )
    return as_inputs(found)
