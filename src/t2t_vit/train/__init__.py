"""Training from scratch and from weights."""
