"""Tests of windowlm.tokenization."""
