"""Documents from disk or the hub to batches of packed sequences."""
