"""One file a model family. A file declares `FAMILIES`: pipeline class name -> loader (policy/registry.py)."""
