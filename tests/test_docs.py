"""The documentation: code in README, docs and the quick start runs as it stands, links lead somewhere, and everything
public has a docstring, which the API reference shows."""

import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/branches.md",
    "docs/drop_in.md",
    "docs/early_exits.md",
    "docs/experts.md",
    "docs/gates_and_policies.md",
    "docs/halting.md",
    "docs/measuring.md",
    "docs/nested_width.md",
    "docs/quickstart.ipynb",
    "docs/relu_sparsity.md",
    "docs/tokens.md",
    "docs/tree.md",
    "docs/your_own_layer.md",
)
FRAGMENTS = ("docs/transformers.md",)  # code around a model of the reader's own
PUBLIC = (
    "dyncore",
    "dyncore.audit",
    "dyncore.nn",
    "dyncore.nn.attention",
    "dyncore.nn.exits",
    "dyncore.nn.experts",
    "dyncore.nn.gates",
    "dyncore.nn.losses",
    "dyncore.nn.policies",
    "dyncore.ops",
    "dyncore.measure",
    "dyncore.convert",
    "dyncore.masks",
    "dyncore.report",
    "dyncore.integrations.transformers",
)
INHERITED = ("extra_repr",)  # torch says what it is


def pages() -> list[str]:
    """Every page for readers, relative to the root."""
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.ipynb")]
    return sorted(str(path.relative_to(ROOT)) for path in files)


def cells(page: str, kind: str) -> list[str]:
    """The cells of a notebook; of a Markdown page its Python code, or the whole text."""
    text = (ROOT / page).read_text()
    if page.endswith(".ipynb"):
        return ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == kind]
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if kind == "code" else [text]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, capsys):
    torch.use_deterministic_algorithms(False)  # as a reader runs it
    names = {}
    for number, cell in enumerate(cells(page, "code")):
        exec(compile(cell, f"{page}, code {number}", "exec"), names)
        results = [names[name] for name in ("y", "loss") if name in names]
        assert all(torch.isfinite(result).all() for result in results)
    assert results


def test_every_page_with_code_is_run():
    assert {page for page in pages() if cells(page, "code")} - {*FRAGMENTS} == {*PAGES}


def test_the_notebook_holds_no_results():
    notebook = json.loads((ROOT / "docs/quickstart.ipynb").read_text())
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


def anchors(page: str) -> set[str]:
    """The headings of a page, as links name them."""
    headings = re.findall(
        r"^#+ (.*)", re.sub(r"^```.*?^```", "", "\n".join(cells(page, "markdown")), flags=re.S | re.M), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page):
    for text in cells(page, "markdown"):
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            file, _, anchor = link.partition("#")
            target = ((ROOT / page).parent / file).resolve() if file else ROOT / page
            assert target.exists(), link
            assert not anchor or anchor in anchors(str(target.relative_to(ROOT))), link


def test_the_index_lists_every_page():
    index = (ROOT / "docs/README.md").read_text()
    assert [page for page in pages() if page.startswith("docs/") and f"({page[5:]})" not in index] == ["docs/README.md"]


def public_names(module) -> list[str]:
    """__all__, or what a module without one defines under a name of its own."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return getattr(module, "__all__", [name for name in own if not name.startswith("_")])


def undocumented(name: str, value) -> list[str]:
    """What of a public function, class or module has no docstring of its own, bases within the package included."""
    if inspect.ismodule(value) or inspect.isfunction(value):
        return [] if value.__doc__ else [name]
    if not inspect.isclass(value):
        return []
    said = value.__doc__ and not value.__doc__.startswith(f"{value.__name__}(")  # a dataclass shows its signature
    found = [] if said else [name]
    for base in value.__mro__:
        for member, thing in vars(base).items() if base.__module__.startswith("dyncore") else ():
            function = getattr(thing, "__func__", getattr(thing, "fget", thing))
            public = not member.startswith("_") and member not in INHERITED
            if public and inspect.isfunction(function) and not function.__doc__:
                found.append(f"{base.__name__}.{member}")
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_has_a_docstring(name):
    module = importlib.import_module(name)
    names = public_names(module)
    assert module.__doc__
    assert names
    assert [lacking for n in names for lacking in undocumented(n, getattr(module, n))] == []


def test_the_api_reference_shows_everything_public(tmp_path):
    pytest.importorskip("pdoc", reason="needs the extra dyncore[docs]")
    importlib.import_module("docs.api_reference").build(tmp_path)
    for name in PUBLIC:
        page, module = (tmp_path / f"{name.replace('.', '/')}.html").read_text(), importlib.import_module(name)
        things = [n for n in public_names(module) if not inspect.ismodule(getattr(module, n))]
        assert [n for n in things if f'id="{n}"' not in page] == []
    start = (tmp_path / "dyncore.html").read_text()
    assert [n for n in PUBLIC[1:] if n.count(".") == 1 and f'href="{n.replace(".", "/")}.html"' not in start] == []
    assert 'href="dyncore/integrations/transformers.html"' in start
