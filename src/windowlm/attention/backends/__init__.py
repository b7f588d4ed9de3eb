"""The ways to compute windowed attention, one file each; `dispatch.py` chooses between them."""
