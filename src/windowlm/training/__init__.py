"""Training a decoder with Lightning."""
