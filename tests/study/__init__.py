"""Tests of the study measures."""
