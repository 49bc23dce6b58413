"""Reward servers: one HTTP application per reward, and the client that calls them.

Depends on nothing of this project but its own protocol (and services.config in launch.py), so that it can be
built into an image of its own. See protocol.py for what travels, scorers/ for what is scored.
"""
