"""Converting trained models, in place and under the same names, to layers that skip."""

from dyncore.convert.acmize import acmize
from dyncore.convert.add_early_exits import add_early_exits
from dyncore.convert.lay_out import lay_out
from dyncore.convert.mixture_of_depths import mixture_of_depths
from dyncore.convert.moefy import moefy
from dyncore.convert.relu_sparse import relu_sparse

__all__ = ["acmize", "add_early_exits", "lay_out", "mixture_of_depths", "moefy", "relu_sparse"]
