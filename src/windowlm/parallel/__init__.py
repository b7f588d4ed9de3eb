"""Work on one sequence, or one batch, by several processes over torch.distributed."""
