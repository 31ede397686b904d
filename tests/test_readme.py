"""The README's code runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", range(len(SNIPPETS)))
def test_snippets_run(snippet, capsys):
    torch.use_deterministic_algorithms(False)  # as a reader runs them
    names = {}
    exec(SNIPPETS[snippet], names)
    assert torch.isfinite(names["y"] if "y" in names else names["loss"]).all()


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2
