"""What the two OCR scorers share: where text is, and how right a recognised text is."""
