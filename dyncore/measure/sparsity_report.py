"""ActivationSparsity: what measure.activation_sparsity found, as a table, as JSON and as plots."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from torch import Tensor

from dyncore import break_even
from dyncore.measure.records import new_results, write_results
from dyncore.measure.sparsity_statistics import LayerSparsity
from dyncore.measure.sparsity_verdict import PHASES

SCHEMA = "dyncore.activation_sparsity/1"
_BREAK_EVENS = {
    True: "measured on this machine by dyncore tune",
    False: "defaults; dyncore tune measures this machine's",
}


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _table(rows: list[list[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


@dataclasses.dataclass(frozen=True)
class ActivationSparsity:
    """Zeros of each watched layer, in the order of the model. print() makes a table of it:

        layer, kind             its name; "mlp" or "gated" where the products that make the activation are known, else
                                "linear": only the product that takes it is judged
        neurons, zeros          I, and the share of zeros among all activations
        5%..95% of tokens       zeros by token: 5% of the tokens have at most the first share, 95% at most the second
        dead, hot               shares of neurons that never fire, and that fire on at least `hot_rate` of the tokens
        Gini                    of the neurons' rates: 0 where all fire equally often
        Jaccard, random         similarity of the active sets of consecutive tokens, and of random ones
        union n                 share of neurons that n consecutive tokens need together
        decode ..., forward,    estimated speed-ups of skipping over dense execution, for 1 and 8 rows, and for many; of
        training                the MLP's products, without the time of calls, which small layers feel, and for training
                                without a dropout between the activation and the layer that takes it: while one is
                                active, that layer alone skips (its product and the gradient of its weight)

    Attributes:
        layers: LayerSparsity by name: the same as numbers, and `verdict`.
        unwatched: why other layers were not watched, by name.
        masks: bool [R, I] by layer: the first rows, as many as `record_masks` asked for; `dyncore.masks.save` stores
            them.
        advice: where no layer was watched, what of the model could skip.
    """

    layers: dict[str, LayerSparsity]
    unwatched: dict[str, str]
    masks: dict[str, Tensor]
    advice: str = ""

    def record(self) -> dict[str, Any]:
        """A document of schema dyncore.activation_sparsity/1: created, environment, which break-evens served
        ("defaults" or "measured" by dyncore tune), and a record of each layer."""
        results = new_results("measure.activation_sparsity")
        return {
            "schema": SCHEMA,
            "created": results["created"],
            "environment": results["environment"],
            "break_evens": "measured" if break_even.tuned() else "defaults",
            "unwatched": dict(self.unwatched),
            "records": [layer.record() for layer in self.layers.values()],
        }

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write it all as numbers."""
        write_results(path, self.record())

    def plot(self, path: str | os.PathLike[str], *, dark: bool = False) -> None:
        """Write a picture (PNG, or what the name says): zeros by layer, neurons by rate, union by tile.

        Needs matplotlib (the extra "bench"). Raises ValueError where no layer was watched.
        """
        from dyncore.measure.sparsity_plots import sparsity_plot

        if not self.layers:
            raise ValueError("plot: expected at least one watched layer, got none")
        figure = sparsity_plot(list(self.layers.values()), "-dark" if dark else "")
        figure.savefig(path, facecolor=figure.get_facecolor())

    def __str__(self) -> str:
        if not self.layers:
            why = "" if self.unwatched else ": no nn.Linear and no module that fuses one was found, or none was chosen"
            layers = (f"{n}: {w}" for n, w in self.unwatched.items())
            return "\n".join([f"no layer was watched{why}", *layers, *self.advice.splitlines()])
        sizes = list(next(iter(self.layers.values())).union)
        tiles = [f"union {size}" for size in sizes if size > 1]
        head = ["layer", "kind", "neurons", "zeros", "5%..95% of tokens", "dead", "hot", "Gini", "Jaccard", "random"]
        rows = [[*head, *tiles, *PHASES]]
        for layer in self.layers.values():
            low, high = layer.token_quantile(0.05), layer.token_quantile(0.95)
            similar = [layer.jaccard_neighbours, layer.jaccard_random]
            speedups = layer.verdict.speedups.values()
            rows.append(
                [
                    layer.name,
                    layer.products.kind,
                    str(layer.neurons),
                    _percent(layer.zero_fraction),
                    f"{_percent(low)}..{_percent(high)}",
                    _percent(layer.dead),
                    _percent(layer.hot),
                    f"{layer.gini:.2f}",
                    *("-" if s is None else f"{s:.2f}" for s in similar),
                    *(_percent(layer.union[size]) for size in sizes if size > 1),
                    *(f"{s:.2f}x" for s in speedups),
                ]
            )
        hot_rate = next(iter(self.layers.values())).hot_rate
        notes = [
            f"hot: fires on at least {hot_rate:.0%} of tokens",
            "x: estimated speed-up of the layer's MLP (linear: of the layer) over dense execution, from counts of "
            "products alone: calls cost more where layers are small; training: without dropout on the activation, "
            "which leaves the skipping to the layer that takes it",
            f"break-evens: {_BREAK_EVENS[break_even.tuned()]}",
        ]
        return "\n".join([_table(rows), *notes])
