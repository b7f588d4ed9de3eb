"""Text from a model: sampling, streaming, many prompts at once."""
