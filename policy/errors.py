"""Errors about a model or weights for it; the text says what, where, and what would be valid."""

from __future__ import annotations


class PolicyError(ValueError):
    """The model directory cannot be used as a policy."""


class InstallError(ValueError):
    """The tensors do not fit the policy: nothing was installed."""
