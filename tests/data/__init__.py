"""Tests of windowlm.data."""
