"""The API reference as HTML, made by pdoc from the docstrings of everything public: `make docs`."""

import sys
import warnings
from pathlib import Path

import pdoc
from torch import nn

# What a package shows of these modules stands on its own page.
INSIDE = r"!dyncore\.(execution|(ops|measure|convert|audit|report)\..*)"


def build(folder: Path) -> None:
    """A page for each public module. Warnings are errors: a module that is not read, an annotation not understood."""
    # what torch says of these would stand in every layer; pdoc leaves out what is marked private
    inherited = {nn.Module.__init__: "<!-- the class has it -->", nn.Module.extra_repr: "@private"}
    before = {method: method.__doc__ for method in inherited}
    for method, doc in inherited.items():
        method.__doc__ = doc
    pdoc.render.configure(docformat="google")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "Error parsing type annotation ForwardRef")  # of a NamedTuple's __new__
            pdoc.pdoc("dyncore", INSIDE, output_directory=folder)
    finally:
        for method, doc in before.items():
            method.__doc__ = doc


if __name__ == "__main__":
    build(Path(sys.argv[1]))
    print(f"{sys.argv[1]}/index.html")
