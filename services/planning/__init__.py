"""`dgpo plan`: what an update costs, and how to split GPUs between rollouts, learner and rewards.

Promises
- Pure arithmetic: needs no GPU, no Ray and no server, and starts nothing.
- What is assumed and what was measured is told beside the figures (`show`).
- The same step-time model is held against a simulated cluster by `dgpo bench plan`.
"""

from services.planning.local import architecture
from services.planning.plan import Costs, Plan, costs_of, make_plan
from services.planning.show import as_json, shown
from services.planning.traffic import Machine

__all__ = ["Costs", "Machine", "Plan", "architecture", "as_json", "costs_of", "make_plan", "shown"]
