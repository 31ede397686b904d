"""Three panels of a model's zeros: by layer, by neuron, by tile of rows. Needs matplotlib."""

from __future__ import annotations

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dyncore.measure.figures import THEMES, legend, new_figure, style
from dyncore.measure.sparsity_statistics import LayerSparsity

_NAMED = 8  # lines with a legend; more are told apart by their shade alone, first layer dark, last one light
_LETTERS = 24  # of a layer's name
_POINTS = 400  # of a curve over neurons


def short_names(names: list[str]) -> list[str]:
    """What tells the names apart: without the parts that all begin or end with, and the last letters of long ones."""
    parts = [name.split(".") for name in names]
    first, last = min(parts), max(parts)
    shortest = min(map(len, parts)) - 1  # something stays
    head = next((i for i in range(shortest) if first[i] != last[i]), shortest) if len(names) > 1 else 0
    tail = 0
    while len(names) > 1 and tail < shortest - head and len({p[-1 - tail] for p in parts}) == 1:
        tail += 1
    kept = [".".join(p[head : len(p) - tail]) for p in parts]
    return [name if len(name) <= _LETTERS else "…" + name[1 - _LETTERS :] for name in kept]


def sparsity_plot(layers: list[LayerSparsity], theme: str) -> Figure:
    figure = new_figure(6.4, 11.4, theme)  # one column: readable on a phone
    zeros, rates, unions = figure.subplots(3)
    shades = matplotlib.colormaps["viridis"].resampled(len(layers) + 2)
    colours = [shades(i + 1) for i in range(len(layers))]

    middle = [layer.token_quantile(0.5) for layer in layers]
    below = [m - layer.token_quantile(0.05) for m, layer in zip(middle, layers, strict=True)]
    above = [layer.token_quantile(0.95) - m for m, layer in zip(middle, layers, strict=True)]
    places, names = range(len(layers)), short_names([layer.name for layer in layers])
    zeros.errorbar(places, middle, yerr=(below, above), fmt="none", ecolor=THEMES[theme][1], capsize=3)
    zeros.scatter(places, [layer.zero_fraction for layer in layers], color=colours, zorder=3)
    if len(layers) <= 3 * _NAMED:
        zeros.set_xticks(places, names, fontsize=7, rotation=30, ha="right")
    else:
        zeros.set_xlabel("layer")
    zeros.set(ylabel="zeros", title="mean, and 5% to 95% of tokens", ylim=(None, 1.0))

    for layer, name, colour in zip(layers, names, colours, strict=True):
        curve = layer.rates.quantile(torch.linspace(1, 0, _POINTS, dtype=torch.float64))
        share = torch.linspace(0, 1, _POINTS)
        fired = curve > 0  # a logarithmic axis has no zero: the dead are where the curve ends
        rates.plot(share[fired].tolist(), curve[fired].tolist(), color=colour, label=name)
        tiles = {size: share for size, share in layer.union.items() if share is not None}
        unions.plot(list(tiles), list(tiles.values()), marker="o", color=colour, label=name)
    rates.set(xlabel="share of neurons, hottest first", ylabel="share of tokens", yscale="log", xlim=(0, 1))
    rates.set_title("how often a neuron fires")
    unions.set(xlabel="consecutive rows", ylabel="share of neurons", xscale="log", ylim=(0, None))
    sizes = sorted({size for layer in layers for size in layer.union})
    unions.set_xticks(sizes, [str(size) for size in sizes])
    unions.minorticks_off()
    unions.set_title("neurons that some row of a tile needs")

    for axes in (zeros, rates, unions):
        axes.title.set_fontsize(9)
        style(axes, theme)
    for axis in (zeros.yaxis, rates.xaxis, unions.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    if len(layers) <= _NAMED:
        legend(unions, theme)
    return figure
