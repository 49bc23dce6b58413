"""The diffusion model: families (SD3, ...), adapters, velocity, encode, decode, export."""

from policy.base import Condition, Policy
from policy.errors import InstallError, PolicyError
from policy.registry import load_encoders, load_policy

__all__ = ["Condition", "InstallError", "Policy", "PolicyError", "load_encoders", "load_policy"]
