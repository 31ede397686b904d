"""activation_sparsity: which neurons of a model are zero on real data, and whether skipping them would pay."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dyncore import activations
from dyncore.measure.sparsity_report import ActivationSparsity
from dyncore.measure.sparsity_statistics import Accumulator, LayerSparsity
from dyncore.measure.sparsity_verdict import Products
from dyncore.nn.advice import advice
from dyncore.nn.fused_pair import FusedSecond, emptied

Rows = Callable[[Any, str], Tensor | None]
Layers = Iterable[str] | Callable[[str, nn.Module], bool]


def activation_sparsity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Layers | None = None,
    rows: str | Rows | None = None,
    tiles: Sequence[int] = (1, 8, 32, 128),
    call: Callable[[Any], object] | None = None,
    min_zeros: float = 0.1,
    hot_rate: float = 0.5,
    record_masks: int = 0,
) -> ActivationSparsity:
    """Zeros of a model's activations over `batches`: by token, layer and neuron, and what skipping them would be worth.

    Watched is the input [..., I] of every `nn.Linear` of which at least `min_zeros` is exactly zero the first time it
    is called (so behind a ReLU wherever it is made, in OPT, T5 or torch's transformers), and the hidden activation of
    modules that fuse it, such as `nn.SparseMLP`. Activations are counted and forgotten: memory is of the layers'
    widths. The model runs in eval mode (dropout's zeros are no ReLU's), without gradients, and is left as it was. NaN
    is not zero. The last dimension of an activation is the neurons', the one before it the sequence; convolutions are
    not understood, and models are to be measured before torch.compile, which calls no hooks.

    The report's speed-ups are estimates from counts of products and the break-evens in force; calls are not in them.

    Args:
        batches: each a tensor or a tuple or list of arguments or a mapping of keyword arguments of `model`.
        layers: names of modules to watch instead, or (name, module) -> bool, whatever the share of zeros. Of a linear
            layer the input is watched, of other modules (an `nn.ReLU`) the output; of the parts of an MLP that
            `relu_sparse` fused into its first layer (OPT's activation_fn and fc2) the hidden activation, as before.
        rows: which rows count: the key of a batch's mask ("attention_mask"), or (batch, name of the layer) -> a bool
            tensor of the shape of the layer's rows, or None for all.
        tiles: sizes of the tiles of consecutive rows whose unions are measured.
        call: batch -> anything: runs the model instead, such as `lambda b: model.generate(**b)`.
        min_zeros: see above; hot_rate: neurons that fire on at least this share of tokens are called hot.
        record_masks: keep the masks of so many first rows of each layer in the report, for `dyncore.masks.save`.

    Raises TypeError or ValueError that name the argument, on names of layers that the model lacks, masks of rows that
    do not fit, and where there are no batches.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected an iterable of batches, got {type(batches).__name__}: put it into a list")
    for name, share in (("min_zeros", min_zeros), ("hot_rate", hot_rate)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: expected a number from 0 to 1, got {share}")
    if not isinstance(record_masks, int) or record_masks < 0:
        raise ValueError(f"record_masks: expected an int >= 0, got {record_masks!r}")
    if not isinstance(tiles, Sequence) or isinstance(tiles, str):
        raise TypeError(f"tiles: expected a sequence of ints, got {type(tiles).__name__}: put it into a list")
    for size in tiles:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"tiles: expected ints >= 1, got {size!r}")
    if layers is None:
        watched = _candidates(model)
    else:
        watched, min_zeros = _chosen(model, layers), 0.0
    watch = _Watch(model, watched, rows, sorted(set(tiles)), min_zeros, record_masks)
    run: Callable[[Any], object] = call or functools.partial(_call, model)
    seen = 0
    with watch.hooked(), _as_in_eval(model), torch.no_grad():
        for batch in batches:
            watch.batch = batch
            run(batch)
            seen += 1
    if not seen:
        raise ValueError("batches: expected at least one, got none")
    return watch.report(hot_rate)


def _call(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@contextmanager
def _as_in_eval(model: nn.Module) -> Generator[None, None, None]:
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


# What is watched ------------------------------------------------------------------------------------------------------


def _fuses(module: nn.Module) -> bool:
    """Whether a module makes its hidden activation where no hook sees it, but can say what it is: hidden(x)."""
    return callable(getattr(type(module), "hidden", None)) and isinstance(getattr(module, "activation", None), str)


def _hidden(module: Any, x: Tensor) -> Tensor:
    return module.hidden(x)


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers and modules that fuse; the linear layers of the latter compute nothing of their own."""
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if _fuses(module):
            inside.update(module.modules())
            found[name] = module
        elif isinstance(module, nn.Linear) and not isinstance(module, FusedSecond) and module not in inside:
            found[name] = module
    return found


def _chosen(model: nn.Module, layers: Layers) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    measured = {**modules, **dict(emptied(model))}  # where the activation is made, by the name it is asked for
    if callable(layers):
        return {name: measured[name] for name, module in modules.items() if layers(name, module)}
    if isinstance(layers, str):
        raise TypeError("layers: expected an iterable of names or a callable, got a str: put it into a list")
    names = list(layers)
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(f"layers: expected names of model.named_modules(), got {', '.join(map(repr, unknown))}")
    return {name: module for name, module in measured.items() if name in names}


def _products(model: nn.Module, name: str, module: nn.Module, neurons: int, like: Tensor) -> Products:
    """The products around a watched activation."""
    device = like.device.type
    if _fuses(module):
        kind = "gated" if module.activation in activations.GATED else "mlp"
        return Products(kind, like.shape[-1], neurons, like.shape[-1], like.dtype, device)
    if not isinstance(module, nn.Linear):
        return Products("linear", 0, neurons, neurons, like.dtype, device)
    makers, halves = _makers(model.get_submodule(name.rpartition(".")[0]), module)
    kind = ("linear", "mlp", "gated")[halves]
    return Products(
        kind, makers[0].in_features if halves else 0, neurons, module.out_features, module.weight.dtype, device
    )


def _makers(parent: nn.Module, down: nn.Linear) -> tuple[list[nn.Linear], int]:
    """The linear layers beside `down` that make its input, and how many halves of a gate they make: 0 where unknown.

    They have the width of its input, and as inputs what it gives back, or stand right before it.
    """
    beside = [m for m in parent.children() if isinstance(m, nn.Linear)]
    width = down.in_features
    around = [m for m in beside if m.in_features == down.out_features] if width != down.out_features else []
    whole = [m for m in around if m.out_features == width]
    double = [m for m in around if m.out_features == 2 * width]
    if not isinstance(parent, nn.Sequential):
        if len(whole) in (1, 2):
            return whole, len(whole)
        if len(double) == 1:
            return double, 2
    before = beside[: beside.index(down)][-1:] if down in beside else []
    return (before, 1) if before and before[0].out_features == width else ([], 0)


class _Watch:
    """The hooks of one measurement, and what they have counted."""

    batch: Any = None

    def __init__(
        self,
        model: nn.Module,
        modules: dict[str, nn.Module],
        rows: str | Rows | None,
        tiles: Sequence[int],
        min_zeros: float,
        record_masks: int,
    ) -> None:
        self._model, self._modules, self._rows = model, modules, rows
        self._tiles, self._min_zeros, self._record_masks = tiles, min_zeros, record_masks
        self._accumulators: dict[str, Accumulator] = {}
        self._products: dict[str, Products] = {}
        self._unwatched: dict[str, str] = {}
        self._without_rows: set[str] = set()

    @contextmanager
    def hooked(self) -> Generator[None, None, None]:
        with ExitStack() as stack:
            for name, module in self._modules.items():
                fused = _fuses(module)
                if fused or isinstance(module, nn.Linear):
                    handle = module.register_forward_pre_hook(self._before(name, fused), with_kwargs=True)
                else:
                    handle = module.register_forward_hook(self._after(name))
                stack.callback(handle.remove)
            yield

    def _before(self, name: str, fused: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            self._see(name, module, _hidden(module, x) if fused else x, x)

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, Tensor):
                raise TypeError(f"layers: expected modules that return a tensor, {name!r} a {type(output).__name__}")
            self._see(name, module, output, output)

        return hook

    def _see(self, name: str, module: nn.Module, h: Tensor, like: Tensor) -> None:
        if name in self._unwatched or h.dim() == 0:
            return
        valid = self._valid(name, h.shape[:-1], h.device)
        mask = (h != 0).view(*valid.shape, h.shape[-1])
        if name not in self._accumulators:
            counted = int(valid.sum()) * h.shape[-1]
            if not counted:
                self._without_rows.add(name)
                return
            zeros = 1 - int(mask[valid].sum()) / counted
            if zeros < self._min_zeros:
                self._unwatched[name] = f"{zeros:.1%} zeros at its first call, watched from {self._min_zeros:.1%}"
                return
            self._accumulators[name] = Accumulator(h.shape[-1], self._tiles, self._record_masks, h.device)
            self._products[name] = _products(self._model, name, module, h.shape[-1], like)
        accumulator = self._accumulators[name]
        if h.shape[-1] != accumulator.fired.shape[0]:
            width = accumulator.fired.shape[0]
            raise ValueError(f"layers: expected {width} neurons of {name!r} in each call, got {h.shape[-1]}")
        accumulator.add(mask, valid)

    def _valid(self, name: str, shape: torch.Size, device: torch.device) -> Tensor:
        """bool [..., S]: the rows of the layer's activation that count."""
        valid: Any = None
        if isinstance(self._rows, str):
            if not isinstance(self.batch, Mapping) or self._rows not in self.batch:
                raise ValueError(f"rows: expected batches that are mappings with the key {self._rows!r}")
            valid = self.batch[self._rows]
        elif self._rows is not None:
            valid = self._rows(self.batch, name)
        if valid is None:
            return torch.ones(shape or (1,), dtype=torch.bool, device=device)
        if not isinstance(valid, Tensor):
            raise TypeError(f"rows: expected a bool tensor, got {type(valid).__name__}")
        if valid.numel() != math.prod(shape) or valid.dim() == 0:
            raise ValueError(f"rows: expected a mask of the rows {list(shape)} of {name!r}, got {list(valid.shape)}")
        return valid.to(device, torch.bool)

    def report(self, hot_rate: float) -> ActivationSparsity:
        layers: dict[str, LayerSparsity] = {}
        for name in self._modules:
            found = self._accumulators.get(name)
            if found is None:
                self._unwatched.setdefault(
                    name, "called with no rows" if name in self._without_rows else "never called"
                )
                continue
            layers[name] = LayerSparsity(
                name=name,
                rows=found.rows,
                neurons=found.fired.shape[0],
                fired=found.fired.cpu(),
                tokens=found.tokens.cpu(),
                jaccard_neighbours=found.neighbours.value,
                jaccard_random=found.strangers.value,
                union={size: union.mean.value for size, union in found.unions.items()},
                hot_rate=hot_rate,
                products=self._products[name],
            )
        masks = {name: self._accumulators[name].recorded for name in layers} if self._record_masks else {}
        unwatched = {name: self._unwatched[name] for name in self._modules if name in self._unwatched}
        return ActivationSparsity(layers, unwatched, masks, "" if layers else advice(self._model))
