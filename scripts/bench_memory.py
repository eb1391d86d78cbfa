#!/usr/bin/env python3
"""Memory of one update, counted: what parameters, gradients and optimiser take, and the peak of everything else.

    python scripts/bench_memory.py --arch transformer_wmt_en_de --encoder-layers 200 --decoder-layers 200 \\
        --share-all-embeddings --max-tokens 4096 --bf16 --checkpoint-activations

Takes fairseq-train's flags for the model, the precision and memory, and makes up a batch of --max-tokens source and
target tokens in sentences of --length. The update runs on tensors that have shapes and no contents, so any size needs
no memory; every storage that an operator makes is counted while it exists. Gradients of an earlier micro-batch are
there, as with --update-freq or several processes; without either they come into being one by one, and the peak is
lower. The kernels are the CPU's, whose
attention, like a GPU's, keeps no matrix of weights unless there is attention dropout. --run does the update for real on
the CPU as well, in a process of its own, whose peak of resident memory stands beside the count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import weakref
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fairseq.cli import command
from fairseq.models.config import TransformerConfig
from fairseq.models.transformer import Transformer
from fairseq.options import parse_train_args, section
from fairseq.registry import CRITERIONS
from fairseq.training.activations import checkpoint_layers
from fairseq.training.losses import batch_losses
from fairseq.training.trainer import component
from fairseq.utils.symbols import PAD

CPU = torch.device("cpu")
GIB = 2**30
ADAM_BYTES = 8  # of state a parameter


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators have made and that still exist: ``now`` and their ``peak``."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default and isinstance(args[0], FakeTensor):
            # without contents there is no telling which tokens are padding; here none is
            out = torch.arange(args[0].numel(), device=args[0].device)[:, None]
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def build(args: Namespace) -> Transformer:
    """The model that the flags describe, in training mode, its layers checkpointed as they say."""
    model = Transformer(section(TransformerConfig, args), args.vocab, args.vocab)
    if args.checkpoint_activations:
        checkpoint_layers(model, args.checkpoint_activations_every)
    return model.train()


def forward_backward(model: Transformer, args: Namespace) -> None:
    """Gradients of one batch without padding."""
    tokens = torch.full((args.max_tokens // args.length, args.length), PAD + 3)
    inputs = {"src_tokens": tokens, "src_lengths": None, "prev_output_tokens": tokens}
    counts = {"id": tokens[:, 0], "nsentences": len(tokens), "ntokens": tokens.numel()}
    batch: Any = {"net_input": inputs, "target": tokens, **counts}
    criterion = component(CRITERIONS, args.criterion, args, PAD)
    loss, _ = batch_losses(model, criterion, batch, args, CPU)
    loss.backward()


def count(args: Namespace, fake: bool = True) -> dict[str, int]:
    """parameters: their number; peak: bytes at the peak of an update, parameters, gradients and Adam's state included.

    fake: on tensors without contents.
    """
    with FakeTensorMode() if fake else contextlib.nullcontext(), LiveBytes() as live:
        model = build(args)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        forward_backward(model, args)
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "peak": live.peak + ADAM_BYTES * parameters}


def resident(args: Namespace) -> int:
    """Peak of this process's resident memory in two micro-batches, less what it was before it had a model; in bytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    forward_backward(model, args)
    optimizer.step()  # makes the optimiser's state
    forward_backward(model, args)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def parse(argv: Sequence[str]) -> Namespace:
    """This script's flags and fairseq-train's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=32768, help="entries of the dictionary (32768)")
    parser.add_argument("--length", type=int, default=32, help="tokens of a sentence (32)")
    parser.add_argument("--run", action="store_true", help="do the update for real too, on the CPU")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--only-resident", action="store_true", help=argparse.SUPPRESS)
    own, rest = parser.parse_known_args(argv)
    args = parse_train_args(["-", *rest], prog="bench_memory.py")
    return Namespace(**vars(args), **vars(own))


def _main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.only_resident:
        print(resident(args))
        return
    result: dict[str, Any] = count(args)
    static = (8 + ADAM_BYTES) * result["parameters"]
    result |= {"static": static, "activations": result["peak"] - static, "predicted": predict(args)}
    if args.run:
        command = [sys.executable, __file__, "--only-resident", *argv]
        # freed blocks go back to the system: what malloc keeps between them is no part of the update
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout
        result["resident"] = int(output)
    if args.json:
        print(json.dumps(result))
        return
    shape = f"{args.encoder_layers}L-{args.decoder_layers}L"
    print(f"{shape}, {result['parameters']:,} parameters, {args.max_tokens} tokens")
    for key, meaning in (
        ("static", "parameters, gradients and Adam's moments, 16 bytes a parameter"),
        ("activations", "everything else at the peak"),
        ("peak", "together"),
        ("predicted", "together, as extrapolated from few layers"),
        ("resident", "together, as the process's resident memory grew"),
    ):
        if key in result:
            print(f"{result[key] / GIB:9.2f} GiB  {meaning}")


def predict(args: Namespace) -> int:
    """The peak as that of few layers predicts it: each layer more adds the same.

    With --checkpoint-activations-every K that is true of each K layers more.
    """

    def peak(encoder: int, decoder: int) -> int:
        return count(Namespace(**{**vars(args), "encoder_layers": encoder, "decoder_layers": decoder}))["peak"]

    every = args.checkpoint_activations_every
    few = 2 * every
    base = peak(few, few)
    more_encoder, more_decoder = peak(few + every, few) - base, peak(few, few + every) - base
    more = (args.encoder_layers - few) * more_encoder + (args.decoder_layers - few) * more_decoder
    return base + more // every


if __name__ == "__main__":
    command(_main)(None)
