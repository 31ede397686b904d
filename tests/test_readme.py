"""The code in the README and on the page about ReLU sparsity runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SNIPPETS = {
    f"{page}:{at}": snippet
    for page in ("README.md", "docs/relu_sparsity.md")
    for at, snippet in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))
}


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run(snippet, capsys):
    torch.use_deterministic_algorithms(False)  # as a reader runs them
    names = {}
    exec(SNIPPETS[snippet], names)
    assert torch.isfinite(names["y"] if "y" in names else names["loss"]).all()


def test_there_are_snippets():
    assert {name.partition(":")[0] for name in SNIPPETS} == {"README.md", "docs/relu_sparsity.md"}
