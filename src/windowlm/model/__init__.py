"""The decoder-only language model around the attention layer."""
