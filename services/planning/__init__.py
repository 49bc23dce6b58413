"""`dgpo plan`: what an update costs, and how to split GPUs between rollouts, learner and rewards.

Promises
- Pure arithmetic: needs no GPU, no Ray and no server, and starts nothing.
- What is assumed and what was measured is told beside the figures (show.py).
- The same step-time model (step.py) is held against a simulated cluster by `dgpo bench plan`.

Nothing is imported here: `dgpo bench gpu` uses published.py where little is installed.
"""
