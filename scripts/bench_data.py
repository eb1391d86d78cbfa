"""Measure the way of the data: fairseq-preprocess, planning an epoch's batches, padding, and reading batches.

    python scripts/bench_data.py --databin data-bin/multi30k_en-de --json data.json

Each step runs in processes of its own. The text for fairseq-preprocess is the data-bin's training set, decoded and
repeated.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from fairseq.data.indexed_dataset import HEADER, MAGIC, VERSION
from fairseq.data.iterators import EpochBatchIterator
from fairseq.data.translation import LanguagePairDataset, TranslationData
from fairseq.options import DataConfig
from fairseq.utils.io import atomic_write

LONGEST = 175  # words; the usual limit in cleaning WMT'14


def peak_mib() -> float:
    """This process's peak memory. Not by getrusage: of one that a larger process started that tells the larger's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


# fairseq-preprocess, which then prints its main process's peak memory
PREPROCESS = f"""
from pathlib import Path
from fairseq.cli.preprocess import main
{inspect.getsource(peak_mib)}
main()
print(peak_mib())
"""


def preprocess(databin: str, pairs: int, workers: int) -> dict[str, Any]:
    """Lines of both sides a second through the whole command, start included: joined dictionary, training set alone."""
    data = TranslationData.open(DataConfig(databin))
    dataset = data.load("train")
    assert dataset.tgt is not None
    with tempfile.TemporaryDirectory() as directory:
        repeats = max(1, round(pairs / len(dataset)))
        for name, side, dictionary in (("src", dataset.src, data.src_dict), ("tgt", dataset.tgt, data.tgt_dict)):
            lines = (" ".join(map(dictionary.symbols.__getitem__, side[i][:-1])) for i in range(len(side)))
            text = "".join(f"{line}\n" for line in lines)
            with open(f"{directory}/train.{name}", "w", encoding="utf-8") as handle:
                for _ in range(repeats):
                    handle.write(text)
        command = [sys.executable, "-c", PREPROCESS, "-s", "src", "-t", "tgt", "--joined-dictionary"]
        command += ["--trainpref", f"{directory}/train", "--destdir", f"{directory}/bin", "--workers", str(workers)]
        began = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
    return {
        "lines_per_second": 2 * repeats * len(dataset) / seconds,
        "seconds": seconds,
        "peak_mib": float(done.stdout),
    }


def write_lengths(directory: str, pairs: int) -> None:
    """A data-bin en-fr of ``pairs`` pairs whose lengths are spread as WMT'14's; its ids are a hole in a file, all 0."""
    rng = np.random.default_rng(0)
    common = rng.standard_normal(pairs, dtype=np.float32)
    for language, mean in (("en", 3.2), ("fr", 3.33)):  # of the logarithm: about 30 and 34 tokens on average
        own = rng.standard_normal(pairs, dtype=np.float32)
        sizes = np.exp(mean + 0.65 * (0.95 * common + 0.31 * own)).clip(1, LONGEST).astype(np.int32) + 1
        starts = np.cumsum(sizes, dtype=np.int64) - sizes
        with open(f"{directory}/train.en-fr.{language}.idx", "wb") as handle:
            handle.write(HEADER.pack(MAGIC, VERSION, 8, pairs))
            handle.write(sizes.astype("<i4").data)
            handle.write((2 * starts).astype("<i8").data)
        with open(f"{directory}/train.en-fr.{language}.bin", "wb") as handle:
            handle.truncate(2 * int(sizes.sum(dtype=np.int64)))
        Path(f"{directory}/dict.{language}.txt").write_text("a 1\n", encoding="utf-8")


def plan(databin: str, max_tokens: int, shapes: int = 0) -> dict[str, Any]:
    """Open a data-bin, plan its first epoch, read a batch, plan the second; seconds, and the process's peak memory."""
    began = time.perf_counter()
    iterator = batches(TranslationData.open(DataConfig(databin)).load("train"), max_tokens, shapes=shapes)
    opened = time.perf_counter()
    count = iterator.n_batches
    planned = time.perf_counter()
    next(iter(iterator.updates(1)))
    read = time.perf_counter()
    iterator.next_epoch()
    assert iterator.n_batches == count
    return {
        "batches": count,
        "open_seconds": opened - began,
        "plan_seconds": planned - opened,
        "first_batch_seconds": read - planned,
        "second_plan_seconds": time.perf_counter() - read,
        "peak_mib": peak_mib(),
    }


def batches(
    dataset: LanguagePairDataset, max_tokens: int, multiple: int = 8, workers: int = 0, shapes: int = 0
) -> EpochBatchIterator:
    """The training batches that fairseq-train would read."""
    return EpochBatchIterator(
        lambda epoch: dataset,
        max_tokens=max_tokens,
        max_sentences=None,
        required_batch_size_multiple=multiple,
        max_positions=(1024, 1024),
        seed=1,
        num_workers=workers,
        batch_shapes=shapes,
    )


def read(
    databin: str, max_tokens: int, multiple: int, seq_multiple: int, workers: int, shapes: int = 0
) -> dict[str, Any]:
    """Read an epoch as fast as it comes: its shapes and padding in percent, batches and target tokens a second."""
    dataset = TranslationData.open(DataConfig(databin), seq_multiple).load("train")
    iterator = batches(dataset, max_tokens, multiple, workers, shapes)
    count, tokens, seen = iterator.n_batches, 0, set()
    began = time.perf_counter()
    for group in iterator.updates(1):
        for batch in group:
            assert batch is not None
            tokens += batch["ntokens"]
            seen.add((batch["net_input"]["src_tokens"].shape, batch["net_input"]["prev_output_tokens"].shape))
    seconds = time.perf_counter() - began
    stats = iterator.take_stats()
    return {
        "batches": count,
        "shapes": len(seen),
        "padding_percent": 100 * (1 - stats["tokens"] / stats["positions"]),
        "batches_per_second": count / seconds,
        "target_tokens_per_second": tokens / seconds,
    }


def apart(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """``function(*args)`` in a process of its own, so that its peak memory is its own."""
    receiver, sender = get_context("spawn").Pipe(duplex=False)
    process = get_context("spawn").Process(target=_send, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        sys.exit(f"error: {function.__name__} failed")
    finally:
        process.join()


def _send(sender: Any, function: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> None:
    sender.send(function(*args))


def report(title: str, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    """Print a table of ``rows`` under their ``columns``."""
    cells = [[name.replace("_", " ") for name in columns]]
    cells += [[_text(row[name]) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for line in cells:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


def _text(value: float | int) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--databin", required=True, metavar="DIR", help="data-bin whose training set is measured")
    parser.add_argument("--text-pairs", type=int, default=600_000, metavar="N", help="pairs to preprocess (0: do not)")
    parser.add_argument("--plan-pairs", type=int, default=36_000_000, metavar="N", help="pairs to plan (0: do not)")
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[4096, 16384], metavar="N", help="batch sizes")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="reading processes")
    parser.add_argument("--batch-shapes", type=int, default=48, metavar="N", help="also with this many shapes")
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    args = parser.parse_args()
    result: dict[str, Any] = {"cpus": os.cpu_count()}
    if args.text_pairs > 0:
        result["preprocess"] = [{"workers": n} | apart(preprocess, args.databin, args.text_pairs, n) for n in (1, 2)]
        columns: tuple[str, ...] = ("workers", "lines_per_second", "seconds", "peak_mib")
        report("fairseq-preprocess, lines of both sides", columns, result["preprocess"])
    if args.plan_pairs > 0:
        with tempfile.TemporaryDirectory() as directory:
            write_lengths(directory, args.plan_pairs)
            result["plan"] = [
                {"pairs": args.plan_pairs, "max_tokens": n, "batch_shapes": shapes} | apart(plan, directory, n, shapes)
                for n in args.max_tokens
                for shapes in (0, args.batch_shapes)
            ]
        columns = ("pairs", "max_tokens", "batch_shapes", "batches")
        columns += ("open_seconds", "plan_seconds", "first_batch_seconds", "second_plan_seconds", "peak_mib")
        report("planning an epoch", columns, result["plan"])
    result["padding"] = [
        {"max_tokens": n, "batch_size_multiple": size, "seq_len_multiple": length, "batch_shapes": shapes}
        | apart(read, args.databin, n, size, length, 0, shapes)
        for n in args.max_tokens
        for size, length, shapes in ((1, 1, 0), (8, 1, 0), (8, 8, 0), (8, 1, args.batch_shapes))
    ]
    columns = ("max_tokens", "batch_size_multiple", "seq_len_multiple", "batch_shapes")
    columns += ("batches", "shapes", "padding_percent")
    report("padding, of source and target positions", columns, result["padding"])
    result["reading"] = [
        {"max_tokens": n, "workers": workers} | apart(read, args.databin, n, 8, 1, workers)
        for n in args.max_tokens
        for workers in args.workers
    ]
    columns = ("max_tokens", "workers", "batches", "batches_per_second", "target_tokens_per_second")
    report("reading an epoch, start of the workers included", columns, result["reading"])
    if args.json:
        with atomic_write(args.json) as handle:
            json.dump(result, handle, indent=2)
            handle.write("\n")


if __name__ == "__main__":
    main()
