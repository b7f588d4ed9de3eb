"""Text to tokens and back, with the exact number of UTF-8 bytes behind every token."""
