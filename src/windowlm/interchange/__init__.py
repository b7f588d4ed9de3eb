"""Models out to transformers' layout and in from it."""
