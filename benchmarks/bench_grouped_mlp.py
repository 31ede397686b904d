"""grouped_mlp: token skipping and mixture of experts, the points of `dyncore bench`."""

import pytest

from dyncore.bench import points


@pytest.mark.parametrize("point", points(["token-skipping", "moe"]), ids=str)
def test_grouped_mlp(contest, point):
    contest(point)
