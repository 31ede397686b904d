"""Dynamic layers: drop-in modules that skip what their gate or router says, with gradients through the skip."""

from dyncore.nn import attention, exits, experts, gates, losses, policies
from dyncore.nn.acm import ACM, ACMLinear, CountGate
from dyncore.nn.attention import Attention, TransformerBlock
from dyncore.nn.base import Decision, DynamicLayer, collect_costs, collect_losses
from dyncore.nn.branch import Branch, Hierarchy
from dyncore.nn.cache import KeyValueCache
from dyncore.nn.cascade import Cascade
from dyncore.nn.choices import Choices
from dyncore.nn.dynamic_k import DynamicKMoE, NormRouter, fit_router
from dyncore.nn.dynamic_width import BlockGate, BlockMLP, DynamicWidthMLP
from dyncore.nn.early_exit import EarlyExit, ExitLayer
from dyncore.nn.gates import (
    ChoiceGate,
    GumbelGate,
    HardConcreteGate,
    RectifiedGate,
    StraightThroughGate,
    ThresholdGate,
    TopKGate,
)
from dyncore.nn.halting import AdaptiveDepth, FeatureScore
from dyncore.nn.mlp import MLP
from dyncore.nn.moe import MoE
from dyncore.nn.policies import BernoulliPolicy
from dyncore.nn.policy_skip import PolicySkip
from dyncore.nn.skip import Skip
from dyncore.nn.soft_moe import SoftMoE
from dyncore.nn.sparse_mlp import SparseLinear, SparseMLP
from dyncore.nn.token_drop import LocalGlobalScore, TokenDrop, TokenMerge
from dyncore.nn.tokens import MixtureOfDepths, TokenSkip
from dyncore.nn.tree import TreeMLP
from dyncore.nn.with_exits import WithExits

__all__ = [
    "ACM",
    "MLP",
    "ACMLinear",
    "AdaptiveDepth",
    "Attention",
    "BernoulliPolicy",
    "BlockGate",
    "BlockMLP",
    "Branch",
    "Cascade",
    "ChoiceGate",
    "Choices",
    "CountGate",
    "Decision",
    "DynamicKMoE",
    "DynamicLayer",
    "DynamicWidthMLP",
    "EarlyExit",
    "ExitLayer",
    "FeatureScore",
    "GumbelGate",
    "HardConcreteGate",
    "Hierarchy",
    "KeyValueCache",
    "LocalGlobalScore",
    "MixtureOfDepths",
    "MoE",
    "NormRouter",
    "PolicySkip",
    "RectifiedGate",
    "Skip",
    "SoftMoE",
    "SparseLinear",
    "SparseMLP",
    "StraightThroughGate",
    "ThresholdGate",
    "TokenDrop",
    "TokenMerge",
    "TokenSkip",
    "TopKGate",
    "TransformerBlock",
    "TreeMLP",
    "WithExits",
    "attention",
    "collect_costs",
    "collect_losses",
    "exits",
    "experts",
    "fit_router",
    "gates",
    "losses",
    "policies",
]
