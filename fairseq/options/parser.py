"""The argument parser of all commands: short usage lines, and an answer to flags that are not there."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from typing import Any

CLOSE = 0.75  # of 1: likeness from which another flag may have been meant
_NOT_HERE = "fairseq's, not supported here"
_LEAVE = "leave it out"
_PROCESSES = "run fairseq-train under torchrun, which tells the processes about each other"
_STOPS = "SIGUSR1 stops it with a checkpoint: timeout --signal USR1 3h fairseq-train ..."
_AVERAGE = "fairseq-average averages the parameters of checkpoints"
_MMAP = "data-bins are read in the mmap format alone, which fairseq-preprocess writes"
# Flags of fairseq that translation with Transformers may be used with, and what to do here
_INSTEAD = (
    ("--memory-efficient-fp16 --amp --fp16-no-flatten-grads", "use --fp16 alone; parameters stay in float32"),
    ("--memory-efficient-bf16", "use --bf16 alone; parameters stay in float32"),
    ("--distributed-init-method --distributed-rank --distributed-backend --distributed-no-spawn", _PROCESSES),
    ("--nprocs-per-node --device-id --local_rank --local-rank --distributed-num-procs", _PROCESSES),
    ("--raw-text --lazy-load --output-format", _MMAP),
    ("--left-pad-target", "targets are padded on the right"),
    ("--relative-step --warmup-init", "give --lr, and the schedule that you want"),
    ("--max-lr", "with --lr-scheduler cosine --lr is the highest rate and --min-lr the lowest"),
    ("--find-unused-parameters --fix-batches-to-gpus --empty-cache-freq --all-gather-list-size", _LEAVE),
    ("--no-beamable-mm --no-early-stop --data-buffer-size --suppress-crashes --fixed-validation-seed", _LEAVE),
    ("--moses-source-lang --moses-target-lang", "they are --source-lang and --target-lang"),
    ("--num-batch-buckets", "--batch-shapes N pads to few shapes"),
    ("--align-suffix --alignfile", _NOT_HERE),
    ("--eval-bleu-detok-args", "the detokeniser's language is --target-lang"),
    ("--sacrebleu-tokenizer --sacrebleu-lowercase --sacrebleu-char-level", "sacrebleu's defaults are used"),
    ("--optimizer-overrides", "training that resumes takes the optimiser's flags as they are given"),
    ("--checkpoint-suffix --checkpoint-shard-count", "a checkpoint is one file"),
    ("--cpu-offload", "--ddp-backend fully_sharded, --checkpoint-activations and --offload-activations save memory"),
    ("--amp-init-scale", "use --fp16-init-scale"),
    ("--amp-scale-window", "use --fp16-scale-window"),
    ("--use-old-adam --fast-stat-sync --broadcast-buffers --gradient-as-bucket-view --no-seed-provided", _LEAVE),
    ("--use-plasma-view --plasma-path --no-reshard-after-forward --fp32-reduce-scatter --use-sharded-state", _LEAVE),
    ("--not-fsdp-flatten-parameters --min-params-to-wrap --load-checkpoint-on-all-dp-ranks --reset-logging", _LEAVE),
    ("--on-cpu-convert-precision --amp-batch-retries --distributed-wrapper --tbmf-wrapper", _LEAVE),
    ("--ignore-unused-valid-subsets", "only --valid-subset is validated on"),
    ("--zero-sharding", "--ddp-backend fully_sharded divides parameters and the optimiser's state"),
    ("--bpe-separator", "it is @@"),
    ("--constraints --diverse-beam-groups --diverse-beam-strength --diversity-rate", _NOT_HERE),
    ("--lm-path --lm-weight --print-step --eos-token", _NOT_HERE),
    ("--encoder-layerdrop --decoder-layerdrop --encoder-layers-to-keep --decoder-layers-to-keep", _NOT_HERE),
    ("--tie-adaptive-weights --tie-adaptive-proj --char-inputs --export", _NOT_HERE),
    ("--decoder-input-dim --decoder-output-dim --encoder-embed-path --decoder-embed-path", _NOT_HERE),
    ("--no-cross-attention --cross-self-attention --layer-wise-attention --no-decoder-final-norm", _NOT_HERE),
    ("--encoder-xformers-att-config --decoder-xformers-att-config --model-parallel-size", _NOT_HERE),
    ("--report-accuracy --ignore-prefix-size --load-alignments --fp16-adam-stats --decoding-format", _NOT_HERE),
    ("--curriculum --combine-valid-subsets --combine-val --validate-after-updates --max-valid-steps --nval", _NOT_HERE),
    ("--grouped-shuffling --skip-remainder-batch --update-epoch-batch-itr --update-ordered-indices-seed", _NOT_HERE),
    ("--continue-once --keep-interval-updates-pattern --use-bmuf --tpu", _NOT_HERE),
    ("--stop-time-hours", _STOPS),
    ("--store-ema --ema-decay --ema-start-update --ema-update-freq --ema-fp32 --ema-seed-model", _AVERAGE),
    ("--azureml-logging --profile --ddp-comm-hook --localsgd-frequency --quantization-config-path", _NOT_HERE),
)
_FAMILIES_NOT_HERE = (
    *("--adaptive-", "--aim-", "--base-", "--iter-decode-", "--pipeline-", "--quant-noise-", "--retain-"),
    "--slowmo-",
)
_ADVICE = {flag: advice for flags, advice in _INSTEAD for flag in flags.split()}


class Parser(argparse.ArgumentParser):
    """Usage is one line; an unknown flag is answered with what to do instead, or with the flag that looks like it.

    others: flags that only another choice has (such as another optimiser), and whose. elsewhere: a flag -> the command
    that has it, or nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.others: dict[str, str] = {}
        self.elsewhere: Callable[[str], str] = lambda flag: ""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's. Exits with status 2 on a usage error."""
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown) + self._advice(unknown)}")
        return known

    def taken(self) -> set[str]:
        """What no other flag may be called: all flags, those in ``others``, and positional arguments as flags."""
        positional = {f"--{action.dest.replace('_', '-')}" for action in self._actions}
        return {*self._option_string_actions, *self.others, *positional}

    def format_usage(self) -> str:
        """One line."""
        self._shorten_usage()
        return super().format_usage()

    def format_help(self) -> str:
        """All flags, by group."""
        self._shorten_usage()
        return super().format_help()

    def _shorten_usage(self) -> None:
        names = [str(action.metavar or action.dest) for action in self._actions if not action.option_strings]
        self.usage = " ".join(["%(prog)s", *names, "[flags]; --help lists them"])

    def _advice(self, unknown: Sequence[str]) -> str:
        found = []
        for name in dict.fromkeys(word.partition("=")[0] for word in unknown if word.startswith("--")):
            like = difflib.get_close_matches(name, self._option_string_actions, 1, CLOSE)
            if name in self.others:
                found.append(f"{name}: a flag of {self.others[name]}")
            elif name in _ADVICE:
                found.append(f"{name}: {_ADVICE[name]}")
            elif name.startswith(_FAMILIES_NOT_HERE):
                found.append(f"{name}: {_NOT_HERE}")
            elif command := self.elsewhere(name):
                found.append(f"{name}: a flag of {command}")
            elif like:
                found.append(f"{name}: did you mean {like[0]}?")
        return f" ({'; '.join(found)})" if found else ""
