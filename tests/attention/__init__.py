"""Tests of windowlm.attention."""
