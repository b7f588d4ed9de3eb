"""What averages hide: far repeats, key words, pasted spans, forced choices, and the controls beside them."""
