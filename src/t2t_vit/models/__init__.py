"""The model family, and old weights for it."""
