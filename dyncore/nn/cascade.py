"""Cascade: models in order of cost; a sample goes to the next one only where those before were not sure enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyncore.nn import exits
from dyncore.nn.base import expect_callable
from dyncore.nn.early_exit import Costs, ExitLayer, Running
from dyncore.nn.inputs import called


class Cascade(ExitLayer):
    """Models in order of cost: a sample stops at the first with confidence >= theta_k, the last answers the rest.

    Of two models and `exits.Margin` this is Big/Little (Park 2015): a margin p1 - p2 below the threshold sends a sample
    on. With `exits.Learned` it is adaptive network selection (Bolukbasi 2017).

    Args:
        models: K modules with the same arguments and classes, the cheapest first. Each returns logits [B, C], or
            something that has them as `.logits`, as the models of transformers do.
        criterion: logits -> confidence, with a threshold: `exits.Margin(0.5)` if None.
        costs: K numbers, what each model costs, such as its FLOPs; equal if None.

    A forward takes what the models take; tensors among the arguments are [B, ...] each. In evaluation it returns logits
    [B, C]: model k+1 runs on the samples that model k was not sure of, their arguments moved side by side. In training,
    and by `every_exit`, all models run on all samples, and the list of all logits is returned. At threshold -inf the
    first model answers alone, exactly; at inf the last one does, and all others run for nothing: a cascade saves
    against its last model only where enough samples stop. See `ExitLayer` for last_exit, last_plan, last_cost (a
    share of running all models), `EarlyExit` for accelerators and errors.
    """

    def __init__(self, models: Sequence[nn.Module], criterion: Any = None, costs: Costs = None) -> None:
        if not len(models):
            raise ValueError("models: expected at least one, got none")
        super().__init__(exits.Margin() if criterion is None else criterion, costs, len(models))
        for i, model in enumerate(models):
            expect_callable(f"models[{i}]", model)
        self.models: nn.ModuleList = nn.ModuleList(models)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | list[Tensor]:
        """Logits [B, C]; in training the list of all models' logits."""
        running = Running(self, (args, kwargs))
        if self.training:
            self.finish(torch.full_like(running.exit, self.num_exits - 1), training=True)
            return self.every_exit(*args, **kwargs)
        run = 0
        for model in self.models:
            args, kwargs = running.visit(
                run, logits_of(called(f"models[{run}]", model, *args, **kwargs)), (args, kwargs)
            )
            run += 1
            if running.nobody:
                break
        self.finish(running.exit)
        return running.result(*self.models[run:])

    def every_exit(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Logits [B, C] of all models, each run on all samples."""
        return [logits_of(called(f"models[{i}]", model, *args, **kwargs)) for i, model in enumerate(self.models)]


def logits_of(output: Any) -> Any:
    """The logits of a model's output: itself, or its `.logits`."""
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)
