"""Every flag of every command, once, in fairseq's spelling.

A group of flags is a dataclass, here in files by topic. ``fairseq.options.commands`` lists the groups of each command
and builds its parser. ``fairseq-train`` adds the flags of the chosen architecture, optimiser, schedule and criterion,
which live beside their code.
"""

from fairseq.options.clinic import (
    ClinicCheckpointConfig,
    ClinicConfig,
    ClinicDataConfig,
    ClinicDepthConfig,
    ClinicOutputConfig,
    ClinicReportConfig,
)
from fairseq.options.commands import (
    GENERATE_SECTIONS,
    INTERACTIVE_SECTIONS,
    TRAIN_SECTIONS,
    VALIDATE_SECTIONS,
    Sections,
    check_result_name,
    make_parser,
    parse_args,
    parse_clinic_args,
    parse_train_args,
    section,
)
from fairseq.options.common import CommonConfig, LogConfig
from fairseq.options.data import DataConfig, PreprocessConfig, SubsetConfig
from fairseq.options.generation import (
    BackendConfig,
    GenerateDataConfig,
    GenerationConfig,
    InteractiveConfig,
    ReferenceConfig,
    ScoreConfig,
    ServeConfig,
    TextConfig,
)
from fairseq.options.model import ArchConfig, AverageConfig, ComponentConfig, ExportConfig, ModelPathConfig
from fairseq.options.training import (
    LAST,
    CheckpointConfig,
    DistributedConfig,
    MemoryConfig,
    OptimizationConfig,
    TrainDataConfig,
    TrainLogConfig,
    ValidationConfig,
)

__all__ = [
    "GENERATE_SECTIONS",
    "INTERACTIVE_SECTIONS",
    "LAST",
    "TRAIN_SECTIONS",
    "VALIDATE_SECTIONS",
    "ArchConfig",
    "AverageConfig",
    "BackendConfig",
    "CheckpointConfig",
    "ClinicCheckpointConfig",
    "ClinicConfig",
    "ClinicDataConfig",
    "ClinicDepthConfig",
    "ClinicOutputConfig",
    "ClinicReportConfig",
    "CommonConfig",
    "ComponentConfig",
    "DataConfig",
    "DistributedConfig",
    "ExportConfig",
    "GenerateDataConfig",
    "GenerationConfig",
    "InteractiveConfig",
    "LogConfig",
    "MemoryConfig",
    "ModelPathConfig",
    "OptimizationConfig",
    "PreprocessConfig",
    "ReferenceConfig",
    "ScoreConfig",
    "Sections",
    "ServeConfig",
    "SubsetConfig",
    "TextConfig",
    "TrainDataConfig",
    "TrainLogConfig",
    "ValidationConfig",
    "check_result_name",
    "make_parser",
    "parse_args",
    "parse_clinic_args",
    "parse_train_args",
    "section",
]
