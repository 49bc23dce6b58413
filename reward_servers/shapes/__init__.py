"""Coloured shapes: what there are, how they are drawn, how they are found in an image."""
