"""One file a model family. A file declares `FAMILIES`, its classes of policies (policy/registry.py)."""
