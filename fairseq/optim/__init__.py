"""Optimisers and learning-rate schedules; importing this package registers them."""

from fairseq.optim import lr_scheduler, optimizers

__all__ = ["lr_scheduler", "optimizers"]
