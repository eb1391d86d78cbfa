"""Training criterions; importing this package registers them."""

from fairseq.criterions import cross_entropy

__all__ = ["cross_entropy"]
