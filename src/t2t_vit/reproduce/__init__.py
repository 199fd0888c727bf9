"""The paper's argument again: its structures, and its comparisons at a scale of one's own."""
