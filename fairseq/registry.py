"""Names on the command line -> the code behind them. ``--user-dir`` adds to these tables; nothing else does."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from fairseq.errors import FairseqError

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named implementations of one kind, each with an optional dataclass of its own flags."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._configs: dict[str, type | None] = {}

    def register(self, name: str, config: type | None = None) -> Callable[[T], T]:
        """Decorator that adds an implementation under ``name``; ``config`` is a dataclass of flags of its own.

        Each field is a ``fairseq.utils.flags.flag``. The implementation is called with an instance of it.
        """

        def decorate(entry: T) -> T:
            self.add(name, entry, config)
            return entry

        return decorate

    def add(self, name: str, entry: T, config: type | None = None) -> None:
        """Add ``entry`` under ``name``. Raises FairseqError when the name is taken or ``config`` is no dataclass."""
        if name in self._entries:
            raise FairseqError(f"{self.kind} '{name}' is registered twice; choose another name")
        if config is not None and not dataclasses.is_dataclass(config):
            raise FairseqError(f"{self.kind} '{name}': its config is no dataclass; decorate it with @dataclass")
        self._entries[name] = entry
        self._configs[name] = config

    def get(self, name: str) -> T:
        """The entry called ``name``. Raises FairseqError, listing the known names, when there is none."""
        if name not in self._entries:
            names = ", ".join(self.names())
            raise FairseqError(f"unknown {self.kind} '{name}' (choose from {names}; --user-dir adds one of your own)")
        return self._entries[name]

    def config(self, name: str) -> type | None:
        """The flags dataclass registered with ``name``."""
        self.get(name)
        return self._configs[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def flag_names(self) -> set[str]:
        """The fields of all flags dataclasses."""
        return {field.name for config in self._configs.values() if config for field in dataclasses.fields(config)}


ARCHITECTURES: Registry[dict[str, Any]] = Registry("architecture")  # name -> TransformerConfig fields it sets
OPTIMIZERS: Registry[Callable[..., Any]] = Registry("optimizer")
LR_SCHEDULERS: Registry[Callable[..., Any]] = Registry("learning-rate schedule")
CRITERIONS: Registry[Callable[..., Any]] = Registry("criterion")
RESIDUAL_RULES: Registry[Callable[..., Any]] = Registry("init type")


_BUILT_IN = {"radam_fairseq": "; --optimizer radam needs none"}  # directory of other programs -> advice


def import_user_dir(path: str | None) -> None:
    """Import the Python package at directory ``path`` (``--user-dir``) so that it can register its own parts.

    This runs the code found there; it is the one place where code is loaded, and only the command line names it: the
    ``user_dir`` in a checkpoint's settings is not looked at.
    Raises FairseqError when the directory is missing, has no ``__init__.py`` or fails to import.
    """
    if path is None:
        return
    directory = Path(path).resolve()
    hint = _BUILT_IN.get(directory.name, "")
    init = directory / "__init__.py"
    name = f"fairseq_user_dir_{hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]}"  # names may repeat
    if name in sys.modules:
        return
    if not init.is_file():
        raise FairseqError(f"--user-dir {path}: no package there; make a directory with an __init__.py{hint}")
    spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(directory)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except FairseqError:
        del sys.modules[name]
        raise
    except Exception as error:
        del sys.modules[name]
        raise FairseqError(f"--user-dir {path}: {type(error).__name__} on import: {error}{hint}") from error
