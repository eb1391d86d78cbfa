"""Admin (Liu et al. 2020): profile a deep Post-LN Transformer once, start it balanced, train it.

``residual`` holds the rule and its relatives, ``profiling`` measures the branch variances, ``omega`` is the file.
"""

from fairseq.admin.fold import fold
from fairseq.admin.omega import OmegaProfile, apply_profile, check_comments, current_profile, describe
from fairseq.admin.profiling import profile

__all__ = ["OmegaProfile", "apply_profile", "check_comments", "current_profile", "describe", "fold", "profile"]
