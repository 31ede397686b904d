"""Dynamic layers: drop-in modules that skip what their gate or router says, with gradients through the skip."""

from dyncore.nn import attention, experts, gates, losses
from dyncore.nn.acm import ACM, ACMLinear, CountGate
from dyncore.nn.attention import Attention, TransformerBlock
from dyncore.nn.base import Decision, DynamicLayer, collect_costs, collect_losses
from dyncore.nn.cache import KeyValueCache
from dyncore.nn.dynamic_width import BlockGate, BlockMLP, DynamicWidthMLP
from dyncore.nn.gates import GumbelGate, StraightThroughGate, ThresholdGate, TopKGate
from dyncore.nn.mlp import MLP
from dyncore.nn.moe import MoE
from dyncore.nn.skip import Skip
from dyncore.nn.sparse_mlp import SparseLinear, SparseMLP
from dyncore.nn.token_drop import LocalGlobalScore, TokenDrop, TokenMerge
from dyncore.nn.tokens import MixtureOfDepths, TokenSkip

__all__ = [
    "ACM",
    "MLP",
    "ACMLinear",
    "Attention",
    "BlockGate",
    "BlockMLP",
    "CountGate",
    "Decision",
    "DynamicLayer",
    "DynamicWidthMLP",
    "GumbelGate",
    "KeyValueCache",
    "LocalGlobalScore",
    "MixtureOfDepths",
    "MoE",
    "Skip",
    "SparseLinear",
    "SparseMLP",
    "StraightThroughGate",
    "ThresholdGate",
    "TokenDrop",
    "TokenMerge",
    "TokenSkip",
    "TopKGate",
    "TransformerBlock",
    "attention",
    "collect_costs",
    "collect_losses",
    "experts",
    "gates",
    "losses",
]
