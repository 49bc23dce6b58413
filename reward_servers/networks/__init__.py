"""Neural networks that scorers share: how they are loaded, how images become pixels, which ones there are."""
