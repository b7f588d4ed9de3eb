"""Perplexity against context length: fixed targets, float64 sums, paired differences."""
