"""Measure training: python scripts/bench_train.py DATA-BIN [--arch ARCH ...] [--max-tokens N ...] [--baseline] ...

Every row of the table is a process of its own that trains as fairseq-train would, on batches in memory: label smoothing
0.1, Adam, dropout as the architecture says, tied embeddings. The batches timed are taken at even distances from all of
the split's, ordered by length. --variants measures ways to do an update one by one: eager; shapes (eager, on batches of
--batch-shapes shapes); compile (--compile, on batches of any shape); graphs (--cuda-graphs, on batches of few shapes);
compile+graphs. --baseline adds a plain loop over torch.nn.Transformer of the same shape, on the same data batched as
fairseq batches it (sorted by source, then target length; multiples of 8). With batches of few shapes two of each are
done before the clock starts, since the first is eager and the second recorded.

start-up: seconds from the command to the end of the first update; steady: to the start of the clock; again: the same of
a second process, which finds what the first has compiled (--again).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq.data.batching import BatchLimits, LengthBuckets, plan_batches, select_by_size
from fairseq.data.shapes import choose_shapes
from fairseq.data.translation import Batch, BatchShape, TranslationData, map_batch
from fairseq.errors import FairseqError
from fairseq.models.config import TransformerConfig
from fairseq.modules.positional_embedding import PositionalEmbedding
from fairseq.options import DataConfig, parse_train_args, section
from fairseq.training.distributed import World
from fairseq.training.flops import device_peak_flops, training_flops
from fairseq.training.precision import autocast
from fairseq.training.train import build_model
from fairseq.training.trainer import Trainer
from fairseq.training.transfer import to_device
from fairseq.utils.devices import choose_device
from fairseq.utils.io import atomic_write
from fairseq.utils.memory import keep_freed_memory, peak_memory
from fairseq.utils.symbols import PAD

LABEL_SMOOTHING = 0.1
COLUMNS = (
    "model",
    "tokens",
    "precision",
    "wps",
    "ms/step",
    "memory",
    "TFLOP/s",
    "MFU",
    "padding",
    "start-up",
    "steady",
    "again",
)
VARIANTS = ("eager", "shapes", "compile", "graphs", "compile+graphs")


def main() -> None:
    args = _parse_args()
    if "fp16" in args.precision and choose_device(args.cpu).type == "cpu":
        raise FairseqError("--precision fp16 needs a GPU; on the CPU use float32 or bf16")
    rows: list[dict[str, Any]] = []
    _print_header(args)
    for arch in args.arch:
        for max_tokens in args.max_tokens:
            for precision in args.precision:
                for kind in ["baseline"] * args.baseline + args.variants:
                    row = _in_new_process(args, kind, arch, max_tokens, precision)
                    if args.again:
                        row["steady_again_seconds"] = _in_new_process(args, kind, arch, max_tokens, precision)[
                            "steady_seconds"
                        ]
                    rows.append(row)
                    print(_line(row), flush=True)
    if args.json:
        with atomic_write(args.json) as file:
            file.write(json.dumps(rows, indent=2) + "\n")


def _parse_args() -> Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data", help="data-bin with a split train")
    parser.add_argument("--arch", nargs="+", default=["transformer_iwslt_de_en"], help="architectures")
    parser.add_argument("--max-tokens", nargs="+", type=int, default=[4096], help="tokens a batch, padding included")
    parser.add_argument("--precision", nargs="+", choices=("float32", "bf16", "fp16"), default=["float32"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["eager"], help="ways to do an update")
    parser.add_argument("--batch-shapes", type=int, default=48, help="shapes of all but eager, compile and --baseline")
    parser.add_argument("--again", action="store_true", help="start each a second time, for its time to steady state")
    parser.add_argument("--baseline", action="store_true", help="also a plain loop over torch.nn.Transformer")
    parser.add_argument("--updates", type=int, default=20, help="updates to time")
    parser.add_argument("--warmup", type=int, default=5, help="updates before those")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU even when a GPU is there")
    parser.add_argument("--flags", default="", help="more flags of fairseq-train, as one argument: '--dropout 0.3'")
    parser.add_argument("--json", metavar="FILE", help="write the rows here too")
    return parser.parse_args()


def _in_new_process(args: Namespace, *row: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, args, time.time(), *row).result()


def _measure(args: Namespace, started: float, kind: str, arch: str, max_tokens: int, precision: str) -> dict[str, Any]:
    """One row, in a process of its own. started: when that was asked for, in seconds since the epoch."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.cpu)
    flags = [args.data, "--arch", arch, "--max-tokens", max_tokens, "--max-update", 1, "--no-save", *args.flags.split()]
    flags += [
        "--criterion",
        "label_smoothed_cross_entropy",
        "--label-smoothing",
        LABEL_SMOOTHING,
        "--optimizer",
        "adam",
    ]
    flags += ["--share-all-embeddings", "--lr", 1e-4]
    flags += [f"--{precision}"] * (precision == "bf16") + ["--compile"] * ("compile" in kind)
    flags += ["--cuda-graphs" if "graphs" in kind else "--no-cuda-graphs"]
    train_args = parse_train_args([str(flag) for flag in flags])
    train_args.fp16 = precision == "fp16"
    data = TranslationData.open(section(DataConfig, train_args))
    train_args.source_lang, train_args.target_lang = data.source_lang, data.target_lang
    shapes = args.batch_shapes if kind == "shapes" or "graphs" in kind else 0
    before_clock, timed = _batches(kind, data, train_args, args.warmup, args.updates, shapes)
    if device.type == "cuda":  # as fairseq-train reads them
        before_clock, timed = (
            [map_batch(batch, Tensor, Tensor.pin_memory) for batch in batches] for batches in (before_clock, timed)
        )
    step = (_plain_loop if kind == "baseline" else _trainer)(train_args, data, device)
    before = peak_memory(device)
    start_up = 0.0
    for batch in before_clock:
        step(batch)
        if not start_up:
            _wait(device)
            start_up = time.time() - started
    _wait(device)
    steady, seconds = time.time() - started, -time.perf_counter()
    for batch in timed:
        step(batch)
    _wait(device)
    seconds += time.perf_counter()
    return _row(kind, train_args, data, device, timed, seconds) | {
        "precision": precision,
        "startup_seconds": start_up,
        "steady_seconds": steady,
        "memory_gb": peak_memory(device) if device.type == "cuda" else peak_memory(device) - before,
    }


def _row(
    kind: str, args: Namespace, data: TranslationData, device: torch.device, batches: list[Batch], seconds: float
) -> dict[str, Any]:
    cfg: TransformerConfig = section(TransformerConfig, args)
    vocab = len(data.tgt_dict)
    flops = sum(
        training_flops(cfg, vocab, batch["nsentences"], int(batch["net_input"]["src_lengths"].sum()), batch["ntokens"])
        for batch in batches
    )
    sides = [
        side for batch in batches for side in (batch["net_input"]["src_tokens"], batch["target"]) if side is not None
    ]
    real = sum(int(side.ne(PAD).sum()) for side in sides)
    peak = device_peak_flops(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "model": args.arch + {"eager": "", "baseline": " torch.nn"}.get(kind, f" {kind}"),
        "kind": kind,
        "arch": args.arch,
        "max_tokens": args.max_tokens,
        "wps": sum(batch["ntokens"] for batch in batches) / seconds,
        "ms_per_step": 1000 * seconds / len(batches),
        "tflops": flops / seconds / 1e12,
        "mfu": peak and flops / seconds / peak,
        "padding": 1 - real / sum(side.numel() for side in sides),
        "updates": len(batches),
    }


def _batches(
    kind: str, data: TranslationData, args: Namespace, warmup: int, count: int, shapes: int
) -> tuple[list[Batch], list[Batch]]:
    """Batches to warm up with and to time, each from the shortest sentences to the longest at even distances.

    shapes: most that they may have (0: any), and then two of each come first.
    """
    dataset, rng = data.load("train", 1), np.random.default_rng(1)
    assert dataset.tgt_sizes is not None
    sizes, budget = (dataset.src_sizes, dataset.tgt_sizes), BatchLimits(args.max_tokens, rows_multiple=8)
    longest = args.max_source_positions, args.max_target_positions
    order = select_by_size(*sizes, longest, name=dataset.src.prefix, skip=True)
    if kind == "baseline":
        order = rng.permutation(order)
        order = order[np.argsort(dataset.tgt_sizes[order], kind="stable")]
        order = order[np.argsort(dataset.src_sizes[order], kind="stable")]
        plan = _of_any_shape(plan_batches(*sizes, order, budget))
    else:
        buckets = LengthBuckets(*sizes, order, budget)
        order = buckets.shuffled(rng)
        if shapes:
            plan = list(zip(*choose_shapes(buckets, shapes).cut(order, rng), strict=True))
        else:
            plan = _of_any_shape(buckets.cut(order))
    first, timed = (
        [dataset.collate(*plan[(2 * i + 1) * len(plan) // (2 * n)]) for i in range(n)] for n in (warmup, count)
    )
    if shapes:
        one_each = [dataset.collate(*batch) for batch in {batch[1]: batch for batch in plan}.values()]
        first = one_each * 2 + first
    return first, timed


def _of_any_shape(batches: Iterable[np.ndarray]) -> list[tuple[np.ndarray, BatchShape | None]]:
    return [(batch, None) for batch in batches]


def _trainer(args: Namespace, data: TranslationData, device: torch.device) -> Callable[[Batch], Any]:
    if device.type == "cpu":
        keep_freed_memory()  # as fairseq-train does
    trainer = Trainer(args, build_model(args, len(data.src_dict), len(data.tgt_dict)), World(0, 1, device))
    return lambda batch: trainer.train_step([batch])


class _PlainTransformer(nn.Module):
    """torch.nn.Transformer with embeddings, positions and a tied projection; dropout where the presets have it."""

    def __init__(self, cfg: TransformerConfig, vocab: int) -> None:
        super().__init__()
        dim = cfg.encoder_embed_dim
        self.embedding = nn.Embedding(vocab, dim, padding_idx=PAD)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.positions = PositionalEmbedding(1024, dim, PAD, learned=False)
        self.dropout = nn.Dropout(cfg.dropout)
        self.scale = math.sqrt(dim)
        self.transformer = nn.Transformer(
            dim,
            cfg.encoder_attention_heads,
            cfg.encoder_layers,
            cfg.decoder_layers,
            cfg.encoder_ffn_embed_dim,
            cfg.dropout,
            batch_first=True,
        )
        self.transformer.encoder.norm = self.transformer.decoder.norm = None
        for module in self.transformer.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = cfg.attention_dropout
            if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
                module.dropout.p = cfg.activation_dropout

    def embed(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.scale * self.embedding(tokens) + self.positions(tokens))

    def forward(self, src_tokens: Tensor, src_lengths: Tensor, prev_output_tokens: Tensor) -> Tensor:
        padding = src_tokens.eq(PAD)
        length = prev_output_tokens.size(1)
        causal = torch.ones(length, length, dtype=torch.bool, device=padding.device).triu(1)
        x = self.transformer(
            self.embed(src_tokens),
            self.embed(prev_output_tokens),
            tgt_mask=causal,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_key_padding_mask=prev_output_tokens.eq(PAD),
        )
        return F.linear(x, self.embedding.weight)


def _plain_loop(args: Namespace, data: TranslationData, device: torch.device) -> Callable[[Batch], Any]:
    torch.manual_seed(1)
    model = _PlainTransformer(section(TransformerConfig, args), len(data.tgt_dict)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=args.fp16)

    def step(batch: Batch) -> None:
        batch = to_device(batch, device)
        assert batch["target"] is not None
        optimizer.zero_grad()
        with autocast(device, args.fp16, args.bf16):
            logits = model(**batch["net_input"])
        loss = F.cross_entropy(
            logits.float().flatten(0, 1),
            batch["target"].flatten(),
            ignore_index=PAD,
            label_smoothing=LABEL_SMOOTHING,
        )
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _print_header(args: Namespace) -> None:
    device = choose_device(args.cpu)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    threads = args.threads or torch.get_num_threads()
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}, {threads} CPU threads")
    print(f"{args.data}: {args.updates} updates timed after {args.warmup}")
    print(_format(COLUMNS), flush=True)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()


def _line(row: dict[str, Any]) -> str:
    return _format(
        (
            row["model"],
            row["max_tokens"],
            row["precision"],
            f"{row['wps']:,.0f}",
            f"{row['ms_per_step']:,.1f}",
            f"{row['memory_gb']:.2f} GB",
            f"{row['tflops']:.3f}" if row["tflops"] < 1 else f"{row['tflops']:.1f}",
            f"{100 * row['mfu']:.1f}%" if row["mfu"] else "-",
            f"{100 * row['padding']:.1f}%",
            f"{row['startup_seconds']:.1f} s",
            f"{row['steady_seconds']:.1f} s",
            f"{row['steady_again_seconds']:.1f} s" if "steady_again_seconds" in row else "-",
        )
    )


def _format(cells: Iterable[Any]) -> str:
    first, *rest = cells
    return f"{first:38}" + "".join(f"{cell:>10}" for cell in rest)


if __name__ == "__main__":
    try:
        main()
    except FairseqError as error:
        sys.exit(f"error: {error}")
