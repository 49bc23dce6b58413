"""Vision-language judges: what they are asked, at which endpoint, and how a score is read from the answer."""
