"""Reward servers: one HTTP application per reward, and the client that calls them.

- What travels: protocol.py, wire.py (openapi.py writes it down for other languages).
- Who asks: client.py, exchange.py, answer.py, retrying.py, image_files.py. They need neither Ray nor torch.
- Who answers: app.py around engine.py, as server_config.py says; under Ray Serve by deployment.py and
  launch.py, without Ray by local.py.
- What is scored: a file of scorers/ for each reward, as scorer.py says. What several of them share, or what
  is too much for one file, has a folder: networks/ (torch), ocr/, shapes/, vlm/, geneval/. deqa/ is a server
  for an environment of its own.

Depends on nothing of this project but its own protocol (and services.config in launch.py), so that it can be
built into an image of its own.
"""
