"""SparseLinear and SparseMLP: the numbers of dense layers in the time of the non-zeros that a ReLU leaves.

Floor 4, on dc.sparse_linear and dc.sparse_mlp. They take the place of trained layers without a change of state_dict.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dyncore import activations
from dyncore.nn.base import expect_choice, expect_size
from dyncore.nn.dense_mlps import Parts, matching_parts
from dyncore.ops import sparse_linear, sparse_mlp
from dyncore.ops.autograd import wants_grad
from dyncore.ops.sparse_mlp import ACTIVATIONS, SAVE

_Layer = TypeVar("_Layer", bound="SparseLinear")


class SparseLinear(nn.Linear):
    """A Linear layer that skips the zeros of its input (dc.sparse_linear): exact for any input, made for one after a
    ReLU.

    The weight is a Parameter of nn.Linear's shape [N, I], stored neuron-major (strides (1, N)), so that few rows read
    the weights of neurons that are on, alone. It stays so through load_state_dict, copies, pickles and `to`. What takes
    contiguous Parameters only (FSDP, torch.nn.utils.parameters_to_vector, safetensors by itself) needs
    `lay_out(neuron_major=False)`; a whole model, `dyncore.convert.lay_out(model, neuron_major=False)`.
    """

    neuron_major: bool = True

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        expect_size("in_features", in_features)
        expect_size("out_features", out_features)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._lay_out()

    def forward(self, h: Tensor) -> Tensor:
        """h [..., I] to [..., N], skipping the zeros of h."""
        if isinstance(h, Tensor) and h.dim() == 1:  # one row without its dimension
            return self.forward(h[None])[0]
        return sparse_linear(h, self.weight, self.bias)

    def lay_out(self, neuron_major: bool) -> None:
        """Store the weight neuron-major, or like any Linear layer's; its values, shape and Parameter stay."""
        if not isinstance(neuron_major, bool):
            raise TypeError(f"neuron_major: expected a bool, got {type(neuron_major).__name__}")
        self.neuron_major = neuron_major
        self._lay_out()

    def _lay_out(self) -> None:
        weight = self.weight
        if self.neuron_major and not weight.t().is_contiguous():
            weight.data = weight.detach().t().contiguous().t()
        elif not self.neuron_major and not weight.is_contiguous():
            weight.data = weight.detach().contiguous()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lay_out()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._lay_out()  # assign=True puts another tensor in its place

    @classmethod
    def from_dense(cls: type[_Layer], linear: nn.Linear) -> _Layer:
        """A SparseLinear that shares the Parameters of `linear`, whose weight is stored neuron-major from now on."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        for name, parameter in linear._parameters.items():
            layer.register_parameter(name, parameter)
        layer.training = linear.training
        layer._lay_out()
        return layer


def _is_plain(linear: nn.Module) -> bool:
    """Whether a forward may use a layer's Parameters and not call it: no hooks, and no adapter in its place."""
    return (type(linear) is nn.Linear or type(linear) is SparseLinear) and not (
        linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    )


def _joined_weight(gate: Tensor, up: Tensor) -> Tensor:
    """[2I, H]: without a copy where they lie so in memory already and no gradient is wanted."""
    if (
        not torch.compiler.is_compiling()
        and not wants_grad(gate, up)
        and not torch._C._are_functorch_transforms_active()
        and type(gate.data) is Tensor
        and gate.is_contiguous()
        and up.is_contiguous()
        and gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
        and up.storage_offset() == gate.storage_offset() + gate.numel()
    ):
        return gate.detach().as_strided((gate.shape[0] + up.shape[0], gate.shape[1]), gate.stride())
    return torch.cat([gate, up])


def _joined_bias(gate: nn.Linear, up: nn.Linear) -> Tensor | None:
    if gate.bias is None and up.bias is None:
        return None
    zeros = gate.weight.new_zeros
    return torch.cat([zeros(part.weight.shape[0]) if part.bias is None else part.bias for part in (gate, up)])


def _after_load(layer: SparseMLP, keys: Any) -> None:
    layer._lay_out()


def feed_forward(
    x: Tensor,
    first: nn.Linear,
    up: nn.Linear | None,
    last: nn.Linear,
    dropout: nn.Module | None,
    activation: str,
    save: str,
) -> Tensor:
    """last(dropout(act(first(x)))), with reglu act(first(x)) * up(x), or where `up` is None, `first` is both halves.

    By dc.sparse_mlp where nothing stands between, else the layers are called, and `last`, a SparseLinear, skips alone.
    """
    if (
        (dropout is not None and dropout.training and dropout.p > 0)  # type: ignore[operator]
        or not (_is_plain(first) and _is_plain(last) and (up is None or _is_plain(up)))
        or first._parameters["weight"].dtype is not last._parameters["weight"].dtype  # type: ignore[union-attr]
    ):
        h = hidden(x, first, up, activation)
        return last((h if dropout is None else dropout(h)).to(last.weight.dtype))
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
    inner, output = first._parameters, last._parameters  # an attribute of a module takes 0.4 us to find
    w_in, b_in = inner["weight"], inner["bias"]
    assert w_in is not None
    if x.dim() == 0 or x.shape[-1] != w_in.shape[1]:
        raise ValueError(f"x: expected shape [..., {w_in.shape[1]}], got {list(x.shape)}")
    if up is not None:
        w_in, b_in = _joined_weight(w_in, up.weight), _joined_bias(first, up)
    rows = x[None] if x.dim() == 1 else x  # Linear layers take one row without its dimension
    y = sparse_mlp(rows, w_in, output["weight"], b_in, output["bias"], activation=activation, save=save)  # type: ignore[arg-type]
    return y if rows is x else y[0]


def hidden(x: Tensor, first: nn.Module, up: nn.Module | None, activation: str) -> Tensor:
    """The hidden activation [..., I], as a tensor."""
    if up is not None:
        return activations.value(first(x), activations.GATED[activation]) * up(x)
    return activations.hidden(first(x), activation)


class SparseMLP(nn.Module):
    """w_out act(w_in x + b_in) + b_out on [..., H], skipping the neurons that the ReLU shuts: exact at any sparsity.

    Args:
        dim: H. hidden_dim: I.
        activation: "relu" (Mirzadeh et al. 2023), "relu2" (So et al. 2021) or "reglu" (Shazeer 2020), whose w_in has
            [2I, H], gate half first.
        save: "compressed", "dense" or "recompute": what of the hidden layer is kept for the backward (dc.sparse_mlp).

    `w_in` and `w_out` are Linear layers; `w_out.weight` is stored neuron-major. `from_dense` takes trained layers.
    A layer that `from_dense` made of one with a dropout on the activation (p > 0) is called part by part in training:
    the output layer alone skips, and tensors [T, I] are saved. In evaluation, and with p = 0, all of it skips.
    A penalty on activations needs them as a tensor: `h = mlp.hidden(x); y = mlp.project(h)` is the same MLP in two
    steps, of which the second alone skips zeros.
    """

    def __init__(
        self, dim: int, hidden_dim: int, *, activation: str = "relu", bias: bool = True, save: str = "compressed"
    ) -> None:
        super().__init__()
        expect_size("dim", dim)
        expect_size("hidden_dim", hidden_dim)
        expect_choice("activation", activation, ACTIVATIONS)
        self.save: str = expect_choice("save", save, SAVE)
        self._parts = Parts("w_in", None, "w_out", None, None, activation)
        self.w_in: nn.Linear = nn.Linear(dim, 2 * hidden_dim if activation == "reglu" else hidden_dim, bias=bias)
        self.w_out: SparseLinear = SparseLinear(hidden_dim, dim, bias=bias)

    @property
    def activation(self) -> str:
        """ "relu", "relu2" or "reglu"."""
        return self._parts.activation

    @property
    def dim(self) -> int:
        """H."""
        return self._part(self._parts.last).out_features

    @property
    def hidden_dim(self) -> int:
        """I."""
        return self._part(self._parts.last).in_features

    def _part(self, name: str | None) -> Any:
        return None if name is None else self._modules[name]

    def forward(self, x: Tensor) -> Tensor:
        """Rows x [..., H] to rows [..., H]."""
        first, up, last, dropout, out_dropout, activation = self._parts
        get = self._modules.get  # of None, a part that there is not, None
        y = feed_forward(x, get(first), get(up), get(last), get(dropout), activation, self.save)  # type: ignore[arg-type]
        return y if out_dropout is None else self._part(out_dropout)(y)

    def hidden(self, x: Tensor) -> Tensor:
        """The hidden activation [..., I] of x, differentiable."""
        h = hidden(x, self._part(self._parts.first), self._part(self._parts.up), self.activation)
        return h if self._parts.dropout is None else self._part(self._parts.dropout)(h)

    def project(self, h: Tensor) -> Tensor:
        """The output [..., H] of a hidden activation, whose zeros are skipped."""
        last = self._part(self._parts.last)
        y = last(h.to(last.weight.dtype))
        return y if self._parts.out_dropout is None else self._part(self._parts.out_dropout)(y)

    @classmethod
    def from_dense(cls, module: nn.Module, *, save: str = "compressed") -> SparseMLP:
        """A SparseMLP of the Parameters of a trained ReLU MLP, under the same names: its state_dict is module's.

        Args:
            module: Sequential(Linear, ReLU, [Dropout,] Linear [, Dropout]); dyncore.nn.MLP; or a module with Linear
                layers fc1/fc2, wi/wo, wi_0/wi_1/wo (T5), linear1/linear2, lin1/lin2, up_proj/down_proj, w_in/w_out, or
                gated gate_proj/up_proj/down_proj, w1/w3/w2, and a ReLU or squared ReLU that shows. It is run on random
                rows, in evaluation and in training, against what was read.

        The Parameters are shared with `module`; they keep shape and values, but the output weight is stored
        neuron-major from now on, and a gate's and its up's weights side by side. A dropout on the hidden layer stays:
        while it is active (in training, p > 0) the hidden layer is computed in full and saved, and the output layer
        alone skips.

        Raises TypeError where it is no module; ValueError, with the reason, on other builds and activations, on what
        computes something else, and on layers that are hooked, quantised, parametrized or share memory with others.
        """
        expect_choice("save", save, SAVE)
        if isinstance(module, nn.Module) and any(isinstance(child, SparseLinear) for child in module.children()):
            raise ValueError(f"module: expected a dense MLP, got {type(module).__name__}, which is already sparse")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.save = save
        matching_parts(module, layer._take)
        layer.training = module.training
        layer.add_module(layer._parts.last, SparseLinear.from_dense(layer._part(layer._parts.last)))
        if layer._parts.up is not None:
            layer.register_load_state_dict_post_hook(_after_load)  # assign=True puts other tensors in their place
        layer._lay_out()
        return layer

    def _take(self, module: nn.Module, parts: Parts) -> SparseMLP:
        """Itself, with these parts of a module."""
        self._parts = parts
        self._modules.clear()
        for name, child in module._modules.items():  # in its order, which a state_dict has too
            if name in parts[:5]:
                self.add_module(name, child)
        return self

    def _lay_out(self) -> None:
        """The weights of gate and up side by side, so that a forward reads them as one."""
        gate, up = self._part(self._parts.first), self._part(self._parts.up)
        if not (type(gate) is nn.Linear and type(up) is nn.Linear):
            return
        with torch.no_grad():
            both = _joined_weight(gate.weight, up.weight)
        if both.untyped_storage().data_ptr() != gate.weight.untyped_storage().data_ptr():
            gate.weight.data, up.weight.data = both.chunk(2)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lay_out()

    def _apply(self, *args: Any, **kwargs: Any) -> SparseMLP:
        super()._apply(*args, **kwargs)
        self._lay_out()
        return self

    def extra_repr(self) -> str:
        return f"activation={self.activation}, save={self.save}"
