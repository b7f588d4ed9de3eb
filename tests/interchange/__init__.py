"""Mirrors windowlm.interchange."""
