"""Sliding-window attention: one definition of the window, several backends proven equal to a reference.

The folder depends on torch and einops alone and on nothing else of the project, so it can be copied.
Start at `window.py` (what a query may see), then `dispatch.py` (who computes it), then `layers.py`.
"""
