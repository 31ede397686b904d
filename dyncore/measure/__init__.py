"""dyncore.measure: what was executed, how long it took, and what a saved FLOP was worth.

Floor 4: knows modules and callables, the layers that decide, and ops by their names and FLOP formulas. Needs torch
alone.
"""

from dyncore.measure.activation_sparsity import activation_sparsity
from dyncore.measure.baselines import NoBaseline, dense_twin
from dyncore.measure.environment import environment, last_level_cache
from dyncore.measure.exits import Exits, ExitStatistics, exit_costs, exits
from dyncore.measure.flops import Flops, flops
from dyncore.measure.forcing import NotForced, force_keep
from dyncore.measure.ranking import Ranking, ranking
from dyncore.measure.records import new_results, read_results, write_results
from dyncore.measure.savings import (
    Savings,
    SavingsError,
    break_even,
    realised_saving,
    savings,
    scaling_efficiency,
)
from dyncore.measure.savings_record import GateSweep
from dyncore.measure.sparsity_report import ActivationSparsity
from dyncore.measure.sparsity_statistics import LayerSparsity
from dyncore.measure.sweeps import ForcedGate, sweep
from dyncore.measure.timing import Interleaved, Timing, cold_copies

__all__ = [
    "ActivationSparsity",
    "ExitStatistics",
    "Exits",
    "Flops",
    "ForcedGate",
    "GateSweep",
    "Interleaved",
    "LayerSparsity",
    "NoBaseline",
    "NotForced",
    "Ranking",
    "Savings",
    "SavingsError",
    "Timing",
    "activation_sparsity",
    "break_even",
    "cold_copies",
    "dense_twin",
    "environment",
    "exit_costs",
    "exits",
    "flops",
    "force_keep",
    "last_level_cache",
    "new_results",
    "ranking",
    "read_results",
    "realised_saving",
    "savings",
    "scaling_efficiency",
    "sweep",
    "write_results",
]
