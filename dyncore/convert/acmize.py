"""acmize: the MLPs and projections of a trained model as adaptive computation modules, ordered learners that add up to
what the dense layer computes (Wojcik 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dyncore import activations
from dyncore.convert.mlps import Found, Report, find_mlps, rows_seen
from dyncore.convert.relu_sparse import Kept, Swap
from dyncore.nn.acm import ACM, ACMLinear, CountGate
from dyncore.nn.base import expect_size
from dyncore.nn.dense_mlps import expect_plain, hooked

# projections of attention by the names in use: Llama and its kin, BERT and ViT, T5, this package
_PROJECTIONS = frozenset(
    {"q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "query", "key", "value", "q", "k", "v", "o"}
)
_SURE = 4.0  # how many log-odds "all learners" has over the others before the gate has learnt: P = 0.98


def _gate(dim: int, num_learners: int, like: Tensor) -> CountGate:
    """A CountGate that says "all learners" of every row until it is trained."""
    gate = CountGate(dim, num_learners)
    assert isinstance(gate.score, nn.Linear)
    nn.init.zeros_(gate.score.weight)
    nn.init.zeros_(gate.score.bias)
    with torch.no_grad():
        gate.score.bias[-1] = _SURE + math.log(num_learners)
    return gate.to(device=like.device)


@torch.no_grad()
def _importance(found: Found, rows: Tensor | None) -> Tensor:
    """What each neuron adds to the output: the mean of |hidden| on rows, or the size of its input weights without any,
    times the size of its output weights: [I]."""
    w_in, w_out, b_in, _, activation = found.weights
    if rows is None:
        size = w_in.float().norm(dim=1)
        size = size.view(-1, w_out.shape[1]).prod(0)
    else:
        size = activations.hidden(nn.functional.linear(rows, w_in, b_in), activation).float().abs().mean(0)
    return size * w_out.float().norm(dim=0)


def acmize(model: nn.Module, num_learners: int = 4, data: object = None, *, attention: bool = False) -> Report:
    """Turn every dense MLP of a model, plain or gated, into an `nn.ACM`, in place; and the projections of attention
    into `nn.ACMLinear`, if asked for.

    The learners of an ACM are slices of the dense layer's neurons, the most important first, so that all of them
    together compute what the dense layer did, up to the order of sums. In evaluation they do so until the gates are
    trained, which say "all learners" of every row; in training their noise takes fewer for one row in fifty. Train the
    model on with `losses.compute_target` of `collect_costs(model)` to learn how many each row needs. The paper also
    distills each learner first.

    Args:
        model: any module; known MLPs are those of `moefy`. Parameters keep their values, dtype and requires_grad, but
            MLPs' not their names.
        num_learners: N; a layer of another width than a multiple of it is kept.
        data: what the model is called with, or an iterable of such batches, to see which neurons matter; None: by the
            sizes of their weights.
        attention: also nn.Linear layers under the names of projections (q_proj, query, q, o_proj, ...). Their learners
            take parts of the input in its own order.

    Returns a Report of what was changed, and of what looks like it and was kept, and why. Convert before wrapping the
    model or making an optimizer. Dropouts inside of an MLP are gone. Raises TypeError where `model` is no module,
    ValueError on sizes and on data that misses an MLP.
    """
    expect_size("num_learners", num_learners)
    found, kept = find_mlps(model)
    fits = [f for f in found if f.weights.w_out.shape[1] % num_learners == 0]
    for f in found:
        if f.weights.w_out.shape[1] % num_learners:
            width = f.weights.w_out.shape[1]
            kept.append(Kept(f.name, f.was, f"expected a width that {num_learners} learners can share, got {width}"))
    rows = None if data is None or not fits else rows_seen(model, data, [f.probe for f in fits])
    swapped: list[Swap] = []
    for i, f in enumerate(fits):
        weights = f.weights
        dim, hidden_dim = weights.w_out.shape
        gate = _gate(dim, num_learners, weights.w_out)
        layer = ACM(dim, num_learners, hidden_dim // num_learners, gate, activation=weights.activation)
        order = _importance(f, None if rows is None else rows[i]).argsort(descending=True, stable=True)
        layer.fill(weights, order)
        gate.to(dtype=torch.promote_types(weights.w_out.dtype, torch.float32))
        layer.train(f.probe.training)
        swapped.append(f.swap(layer, f"{num_learners} learners of {hidden_dim // num_learners}"))
    if attention:
        _projections(model, num_learners, swapped, kept)
    return Report("acmize", tuple(swapped), tuple(kept))


def _projections(model: nn.Module, num_learners: int, swapped: list[Swap], kept: list[Kept]) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            reason = "its projections are one packed weight, which torch's attention reads itself"
            kept.append(Kept(name or "the model", type(module).__name__, reason))
            continue
        for child_name, child in list(module._modules.items()):
            if child_name not in _PROJECTIONS or not isinstance(child, nn.Linear):
                continue
            where = f"{name}.{child_name}" if name else child_name
            try:
                linear = expect_plain(child, child_name)
                hook = hooked(linear)
                if hook:
                    raise ValueError(f"expected nothing that hangs on it, got {hook}")
                gate = _gate(linear.in_features, num_learners, linear.weight)
                layer = ACMLinear.from_dense(linear, num_learners, gate)
                gate.to(dtype=torch.promote_types(linear.weight.dtype, torch.float32))
            except ValueError as error:
                kept.append(Kept(where, type(child).__name__, str(error)))
                continue
            layer.train(child.training)
            module._modules[child_name] = layer
            shape = (linear.out_features, linear.in_features)
            swapped.append(Swap(where, "Linear", "ACMLinear", "none", shape, f"{num_learners} learners"))
