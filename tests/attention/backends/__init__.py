"""Tests of windowlm.attention.backends."""
