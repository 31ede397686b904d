"""MoE: mixture of experts on dc.grouped_mlp, dropless, tokens choosing experts or experts choosing tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyncore import activations
from dyncore.nn import losses
from dyncore.nn.base import DynamicLayer, expect_choice, expect_recorded
from dyncore.nn.experts import ExpertWeights, read_expert, write_expert
from dyncore.nn.full_precision import full_precision
from dyncore.nn.inputs import expect_rows
from dyncore.nn.mlp import ACTIVATIONS, MLP
from dyncore.ops import grouped_mlp
from dyncore.ops.packed import PackedMLP, grouped_mlp_packed
from dyncore.plan import Plan, route, route_mask, route_topk

ROUTING = ("token_choice", "expert_choice")
OPTIONS = ("routing", "normalize", "capacity", "shared_experts")  # of from_experts; all else follows from the experts


def _share(plan: Plan, shape: torch.Size) -> Tensor:
    """The share of the groups that each row took, of the shape of x's leading dimensions."""
    slots = plan.row_offsets[1:] - plan.row_offsets[:-1]
    return (slots.float() / plan.num_groups).view(shape)


def _admitted(expert: Tensor, num_experts: int, limit: int) -> Tensor:
    """`expert` [T, K] with -1 where an expert has `limit` slots already: of first choices, then of earlier rows."""
    choices = expert.t().reshape(-1)
    taken = (choices[:, None] == torch.arange(num_experts, device=expert.device)).cumsum(0)
    place = taken.gather(1, choices[:, None])[:, 0]
    return torch.where(place <= limit, choices, -1).view(expert.shape[1], expert.shape[0]).t()


class MoE(DynamicLayer):
    """y = shared(x) + sum over the chosen experts e of weight_e * expert_e(x)  (Shazeer 2017; Switch, Fedus 2021).

    Args:
        dim: H. hidden_dim: I, the width of each expert. num_experts: E.
        top_k: experts of each token; under expert choice the mean of them.
        activation: any of dc.grouped_mlp.
        bias: whether experts have biases.
        routing: "token_choice": softmax over experts, each token takes its top_k. "expert_choice" (Zhou 2022): each
            expert takes its top_k * T / E best of the T tokens of the call. It balances by construction and is NOT
            causal: whether a token is taken depends on later tokens and on the rest of the batch.
        normalize: token choice: divide the weights of a token by their sum; by default where top_k > 1 (at 1 it would
            cut the router's gradient).
        capacity: token choice: the most slots of an expert, as a multiple of its even share top_k * T / E (Switch;
            GShard, Lepikhin 2021): first choices come before second ones, earlier tokens before later ones, and what
            finds no room is dropped. None: dropless.
        shared_experts: this many experts' width of MLP that every token passes, added unweighted.
        router: a module [T, H] -> logits [T, E] instead of the Linear; logits are float32 in any case.

    Parameters, as dc.grouped_mlp wants them: w_in [E, I, H], gated [E, 2I, H] gate half first; w_out [E, H, I];
    b_in [E, I or 2I], b_out [E, H]. Without a capacity nothing is dropped, and no expert is ever padded. `last_cost` is
    the share of the experts that a token took; `losses()` has load_balance (token choice) and router_z. `pack()` speeds
    up inference on a CPU.
    """

    _transient = (*DynamicLayer._transient, "_logits", "_packed")
    _logits: Tensor | None = None
    _packed: PackedMLP | None = None

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int = 2,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        routing: str = "token_choice",
        normalize: bool | None = None,
        capacity: float | None = None,
        shared_experts: int = 0,
        router: nn.Module | None = None,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "hidden_dim": hidden_dim, "num_experts": num_experts}
        for name, value in (*sizes.items(), ("top_k", top_k), ("shared_experts", shared_experts)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {value!r} ({type(value).__name__})")
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k: expected 1..{num_experts} (num_experts), got {top_k}")
        if capacity is not None:
            if isinstance(capacity, bool) or not isinstance(capacity, (int, float)):
                raise TypeError(f"capacity: expected a number or None, got {type(capacity).__name__}")
            if not 0 < capacity < math.inf:
                raise ValueError(f"capacity: expected a number > 0, got {capacity}")
            if routing == "expert_choice":
                raise ValueError("capacity: expected None where experts choose, for they take equally many tokens")
        if shared_experts < 0:
            raise ValueError(f"shared_experts: expected a number >= 0, got {shared_experts}")
        self.dim = dim
        self.hidden_dim = hidden_dim
        self.num_experts = num_experts
        self.top_k = top_k
        self.activation: str = expect_choice("activation", activation, ACTIVATIONS)
        self.routing: str = expect_choice("routing", routing, ROUTING)
        self.normalize: bool = top_k > 1 if normalize is None else normalize
        # in integers: torch.compile makes a float attribute a symbol
        self._capacity: tuple[int, int] | None = None if capacity is None else float(capacity).as_integer_ratio()
        width = 2 * hidden_dim if activation in activations.GATED else hidden_dim
        self.router: nn.Module = nn.Linear(dim, num_experts, bias=False) if router is None else router
        self.w_in: nn.Parameter = nn.Parameter(torch.empty(num_experts, width, dim))
        self.w_out: nn.Parameter = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.b_in: nn.Parameter | None = nn.Parameter(torch.empty(num_experts, width)) if bias else None
        self.b_out: nn.Parameter | None = nn.Parameter(torch.empty(num_experts, dim)) if bias else None
        shared_dim = shared_experts * hidden_dim
        self.shared: MLP | None = MLP(dim, shared_dim, activation=activation, bias=bias) if shared_experts else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every expert as nn.Linear draws its own: uniform within 1/sqrt(fan in)."""
        for tensor, fan_in in (
            (self.w_in, self.dim),
            (self.b_in, self.dim),
            (self.w_out, self.hidden_dim),
            (self.b_out, self.hidden_dim),
        ):
            if tensor is not None:
                nn.init.uniform_(tensor, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens x [..., H] to [..., H], in the dtype of x."""
        expect_rows(x, self.dim, self.w_in)
        rows = x.reshape(math.prod(x.shape[:-1]), self.dim)
        logits = full_precision(self.router, rows, "router")
        if logits.shape != (rows.shape[0], self.num_experts):
            raise ValueError(f"router: expected logits [T, {self.num_experts}], got {list(logits.shape)}")
        plan = self._route(logits)
        self.record(plan, functools.partial(_share, plan, x.shape[:-1]), _logits=logits)
        residual = None if self.shared is None else self.shared(x)
        if not torch.compiler.is_compiling() and self._packed is not None:
            weights = (self.w_in, self.w_out, self._packed, self.b_in, self.b_out)
            return grouped_mlp_packed(x, *weights, plan=plan, residual=residual)
        return grouped_mlp(
            x,
            self.w_in,
            self.w_out,
            self.b_in,
            self.b_out,
            plan=plan,
            activation=self.activation,
            residual=residual,
        )

    def pack(self) -> int:
        """Store the experts' weights once more, as the CPU kernels read them, so that inference does not pack them.

        Returns the bytes that this takes until `unpack()`: those of the weights, with I and H rounded up to 32 columns;
        twice that in float16, and in bfloat16 on a CPU that does not multiply its pairs, where panels are float32. 0 on
        another device, in float64 and without compiled kernels: there nothing is stored, and the layer computes as
        before.

        The panels serve forwards that want no gradient (`no_grad`, `inference_mode`), outside of autocast,
        `torch.compile`, `torch.export` and "masked" execution; all else uses the parameters. After a change of these
        (an optimizer's step, `load_state_dict`, `to`) a forward that would use panels raises RuntimeError until pack()
        or unpack() is called. A write through `.data` or NumPy, or to inference tensors, is not seen: call pack() after
        it. Panels are for the instruction set in use (ValueError under another), in no state_dict, and neither copied
        nor pickled.
        """
        self._packed = None  # its memory first
        packed = PackedMLP(self.w_in, self.w_out, self.activation)
        if packed.nbytes:
            self._packed = packed
        return packed.nbytes

    def unpack(self) -> None:
        """Drop what `pack()` stored."""
        self._packed = None

    def _route(self, logits: Tensor) -> Plan:
        if (
            self.routing == "token_choice" and logits.is_cuda and self._capacity is None
        ):  # two kernels; on a CPU topk is faster than its sort
            return route_topk(logits, self.top_k, normalize=self.normalize)
        probabilities = torch.softmax(logits, dim=-1)
        if self.routing == "token_choice":
            weight, expert = probabilities.topk(self.top_k, dim=-1)
            if self.normalize:
                weight = weight / weight.sum(-1, keepdim=True)
            if self._capacity is not None:
                share, parts = self._capacity
                limit = -(-share * expert.numel() // (parts * self.num_experts))
                expert = _admitted(expert, self.num_experts, limit)
            return route(expert, weight, num_groups=self.num_experts)
        num_rows = probabilities.shape[0]
        each = min(num_rows, -(-self.top_k * num_rows // self.num_experts))
        taken = probabilities.detach().topk(each, dim=0).indices
        mask = torch.zeros_like(probabilities, dtype=torch.bool).scatter(0, taken, True)
        return route_mask(mask, probabilities, max_slots=each * self.num_experts)

    def losses(self) -> dict[str, Tensor]:
        """Unweighted auxiliary losses of the latest forward: load_balance (token choice only) and router_z."""
        if self._logits is None or self.last_plan is None:
            return {}
        expect_recorded("losses", self._logits)
        found = {"router_z": losses.router_z(self._logits)}
        if self.routing == "token_choice":
            counts = self.last_plan.offsets[1:] - self.last_plan.offsets[:-1]
            found["load_balance"] = losses.load_balance(torch.softmax(self._logits, dim=-1), counts)
        return found

    @classmethod
    def from_experts(
        cls,
        experts: Sequence[nn.Module],
        router: nn.Module,
        *,
        top_k: int = 2,
        activation: str | None = None,
        **options: Any,
    ) -> MoE:
        """A MoE with copies of the weights of MLP modules of one shape.

        Args:
            experts: modules that `dyncore.nn.experts.read_expert` knows: w1/w2/w3, gate_proj/up_proj/down_proj,
                fc1/fc2, w_in/w_out or Sequential(Linear, activation, Linear), with nothing else in them and dropout 0.
                Each is run on random rows against what was read. A stack none of whose parts requires grad stays so.
            router: the module [T, H] -> logits [T, E] (kept, not copied); a new one is nn.Linear(H, E, bias=False).
            activation: where the modules do not show theirs.
            options: routing, normalize, shared_experts.

        Raises TypeError on other options and where the router is no module; ValueError on experts of unknown build, of
        several builds, dtypes or devices, or that compute something else than the MLP of their weights.
        """
        for name, value in options.items():
            if name not in OPTIONS:
                raise TypeError(f"{name}: expected one of the options {', '.join(OPTIONS)}, got {name}={value!r}")
        if not isinstance(router, nn.Module):
            raise TypeError(
                "router: expected the module that gives logits [T, E] (a new one: nn.Linear(H, E, bias=False)), "
                f"got {type(router).__name__}"
            )
        if not experts:
            raise ValueError("experts: expected at least one module, got none")
        read = [read_expert(module, activation, name=f"experts[{i}]") for i, module in enumerate(experts)]
        first = read[0]
        for what in ("dtype", "device"):
            for i, other in enumerate(read):
                got, want = getattr(other.w_in, what), getattr(first.w_in, what)
                if got != want:
                    raise ValueError(
                        f"experts: expected one {what}, got expert {i} with {got} and expert 0 with {want}"
                    )
        for i, other in enumerate(read):
            for name, a, b in zip(first._fields, first, other, strict=True):
                if (a.shape if isinstance(a, Tensor) else a) != (b.shape if isinstance(b, Tensor) else b):
                    raise ValueError(f"experts: expected one build, got expert {i} with another {name} than 0")
        dim, hidden_dim = first.w_out.shape
        layer = cls(dim, hidden_dim, len(read), top_k, activation=first.activation, **options)
        layer.to(first.w_in.device, first.w_in.dtype)
        layer.router = router  # kept as it is: it may be wider than the experts
        for name in ("w_in", "w_out", "b_in", "b_out"):
            parts = [getattr(weights, name) for weights in read]
            trained = any(p is not None and p.requires_grad for p in parts)
            stacked = None if parts[0] is None else torch.stack([p.detach() for p in parts])
            setattr(layer, name, None if stacked is None else nn.Parameter(stacked, requires_grad=trained))
        return layer

    def to_experts(self) -> list[MLP]:
        """One `MLP` an expert, with copies of its weights: the reverse of `from_experts`."""
        absent = (None,) * self.num_experts
        b_in, b_out = (absent if b is None else b.unbind(0) for b in (self.b_in, self.b_out))
        stacks = zip(self.w_in.unbind(0), self.w_out.unbind(0), b_in, b_out, strict=True)
        return [write_expert(ExpertWeights(wi, wo, bi, bo, self.activation)) for wi, wo, bi, bo in stacks]

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, {self.hidden_dim}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"activation={self.activation}, routing={self.routing}"
        )
