"""Flags of the clinic: what its commands measure and on what."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.options.common import CommonConfig
from fairseq.options.data import DataConfig
from fairseq.utils.flags import flag, same_flag


@dataclass
class ClinicDataConfig:
    """The sentences that the clinic runs models on."""

    data: str = flag("", "data-bin; the first training batch of each seed is what models are run on", positional=True)
    source_lang: str | None = same_flag(DataConfig, "source_lang")
    target_lang: str | None = same_flag(DataConfig, "target_lang")
    max_tokens: int = flag(512, "most tokens in that batch, padding included", least=1)


@dataclass
class ClinicConfig:
    """What the clinic measures."""

    models: str | None = flag(
        None,
        "models at the start of training: post-ln, pre-ln and init types (default: post-ln,pre-ln,adaptive)",
        metavar="NAMES",
    )
    seeds: list[int] = flag([1, 2, 3], "seeds of the models, which results are averaged over", least=0, below=2**63)
    cpu: bool = same_flag(CommonConfig, "cpu")
    user_dir: str | None = flag(
        None, "run the Python package in this directory, which may register init types", metavar="DIR"
    )


@dataclass
class ClinicOutputConfig:
    """Where results go."""

    out_dir: str = flag("clinic", "directory of results: JSON and PNG", metavar="DIR")
    name: str | None = flag(None, "name of the result's files (default: the command's)", metavar="NAME")


@dataclass
class ClinicReportConfig:
    """Where results are, and the report goes."""

    out_dir: str = same_flag(ClinicOutputConfig, "out_dir")


@dataclass
class ClinicDepthConfig:
    """How deep."""

    depths: list[int] = flag([6, 12, 24, 50, 100, 200], "encoder sub-layers, two a layer", least=2)


@dataclass
class ClinicCheckpointConfig:
    """Trained models."""

    path: str | None = flag(
        None,
        "measure these checkpoints, as they started and as they are, instead of --models",
        metavar="[NAME=]FILE[:...]",
    )
