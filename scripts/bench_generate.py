"""How fast a checkpoint translates: one table of devices, models, beams, batches and threads.

    python scripts/bench_generate.py DATA-BIN --path model.pt --beam 1 5 --batch-size 128 --threads 1 2

Each figure is from a process of its own: the wall time of translating the subset after loading, the best of --repeat
runs after a short one that warms up, and the largest memory that the process ever held (on a GPU: that PyTorch held).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import IndexedDataset
from fairseq.errors import FairseqError
from fairseq.generation import translate
from fairseq.generation.translate import load_ensemble, translate_ids
from fairseq.options import GenerationConfig
from fairseq.utils.devices import choose_dtype
from fairseq.utils.io import atomic_write
from fairseq.utils.memory import keep_freed_memory

COLUMNS = (
    "device", "model", "search", "precision", "beam", "batch", "threads", "sentences/s", "tokens/s", "load s",
    "peak MiB",
)  # fmt: skip
Row = dict[str, Any]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="data-bin")
    parser.add_argument("--path", required=True, help="checkpoint, or several with a colon between them")
    parser.add_argument("--gen-subset", default="test", help="the subset whose source side is translated")
    parser.add_argument("-s", "--source-lang", help="needed where the data-bin has several subsets of that name")
    parser.add_argument("--beam", type=int, nargs="+", default=[5])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[128], help="sentences")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="of the CPU")
    parser.add_argument("--precision", nargs="+", default=["float32"], choices=["float32", "bf16", "fp16"])
    parser.add_argument("--limit", type=int, help="translate only that many sentences")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="the CPU even if there is a GPU")
    parser.add_argument("--cuda-graphs", action="store_true", help="on a GPU, time the search with that flag as well")
    parser.add_argument("--reference", action="store_true", help="time the tests' straightforward search as well")
    parser.add_argument("--ctranslate2", metavar="DIR", help="time CTranslate2 as well, with the model exported there")
    parser.add_argument("--json", metavar="FILE", help="write the table there, too")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the configuration that a child process measures
    return parser


def read_sources(data: str, subset: str, source_lang: str | None, limit: int | None) -> tuple[list[Tensor], str]:
    """The subset's source sentences, (src_len,) each, and the source language."""
    found = sorted(Path(data).glob(f"{subset}.{source_lang or '*'}-*.idx"))
    found = [path for path in found if path.name.split(".")[1].split("-")[0] == path.name.split(".")[2]]
    if len(found) != 1:
        what = "no source side" if not found else "several source sides; give --source-lang"
        raise FairseqError(f"{data}: {what} of the subset {subset}")
    dataset = IndexedDataset(found[0].with_suffix(""))
    count = len(dataset) if limit is None else min(limit, len(dataset))
    return [torch.tensor(dataset[i].tolist()) for i in range(count)], found[0].name.split(".")[2]


def native(args: argparse.Namespace, one: Row, sources: list[Tensor], device: str) -> Callable[[int], int]:
    """Load the models; returns what translates the first so many sentences and counts the tokens of the outputs."""
    if one["search"] == "reference":
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        reference_search = importlib.import_module("tests.reference_search").reference_search
        translate.search_batches = lambda models, batches, cfg, check=None, threads=None, **options: (
            reference_search(models, batch.src_tokens, cfg, **options) for batch in batches
        )
    precision = one["precision"]
    dtype = choose_dtype(torch.device(device), precision == "fp16", precision == "bf16")
    models, _ = load_ensemble(args.path.split(":"), device=device, dtype=dtype)
    cfg = GenerationConfig(beam=one["beam"], cuda_graphs=one["search"] == "graphs")

    def run(count: int) -> int:
        found = translate_ids(models, sources[:count], cfg, batch_size=one["batch"])
        return sum(len(translation.hypotheses[0].tokens) for translation in found)

    return run


def ctranslate2(args: argparse.Namespace, one: Row, sources: list[Tensor], language: str) -> Callable[[int], int]:
    """As ``native``, for an export."""
    library = importlib.import_module("ctranslate2")
    compute = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}[one["precision"]]
    device = "cpu" if args.cpu or not torch.cuda.is_available() else "cuda"
    translator = library.Translator(args.ctranslate2, device, compute_type=compute, intra_threads=one["threads"])
    dictionary = Dictionary.load(Path(args.data) / f"dict.{language}.txt")
    words = [[dictionary[token] for token in source.tolist()[:-1]] for source in sources]

    def run(count: int) -> int:
        found = translator.translate_batch(
            words[:count], beam_size=one["beam"], max_batch_size=one["batch"], batch_type="examples"
        )
        return sum(len(result.hypotheses[0]) + 1 for result in found)

    return run


def measure(args: argparse.Namespace, one: Row) -> Row:
    """One row of the table, in this process."""
    keep_freed_memory()
    torch.set_num_threads(one["threads"])
    device = "cpu" if args.cpu or not torch.cuda.is_available() else "cuda"
    sources, language = read_sources(args.data, args.gen_subset, args.source_lang, args.limit)
    start = time.perf_counter()
    if one["search"] == "ctranslate2":
        run = ctranslate2(args, one, sources, language)
    else:
        run = native(args, one, sources, device)
    load = time.perf_counter() - start
    run(min(len(sources), one["batch"]))
    seconds, tokens = float("inf"), 0
    for _ in range(args.repeat):
        start = time.perf_counter()
        tokens = run(len(sources))
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = min(seconds, time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    if device == "cuda" and one["search"] != "ctranslate2":
        peak = torch.cuda.max_memory_allocated()
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {"device": name, "model": Path(args.path.split(":")[0]).stem} | one | {
        "sentences/s": round(len(sources) / seconds, 1),
        "tokens/s": round(tokens / seconds),
        "load s": round(load, 2),
        "peak MiB": round(peak / 2**20),
    }  # fmt: skip


def configurations(args: argparse.Namespace) -> list[Row]:
    """What to measure, in order."""
    searches = ["fairseq"] + ["graphs"] * args.cuda_graphs + ["reference"] * args.reference
    searches += ["ctranslate2"] * (args.ctranslate2 is not None)
    return [
        {"search": search, "precision": precision, "beam": beam, "batch": batch, "threads": threads}
        for precision in args.precision
        for threads in args.threads
        for batch in args.batch_size
        for beam in args.beam
        for search in searches
    ]


def table(rows: list[Row]) -> str:
    """As Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([f"{row[column]}" for column in COLUMNS] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Measure each configuration in a process of its own, and print the table."""
    args = make_parser().parse_args()
    if args.one:
        print(json.dumps(measure(args, json.loads(args.one))))
        return
    if args.ctranslate2 is not None and importlib.util.find_spec("ctranslate2") is None:
        raise FairseqError("--ctranslate2 needs the package ctranslate2: pip install ctranslate2")
    rows = []
    for one in configurations(args):
        command = [sys.executable, __file__, *sys.argv[1:], "--one", json.dumps(one)]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if child.returncode:
            raise FairseqError(f"{one} could not be measured; its error is above")
        rows.append(json.loads(child.stdout.splitlines()[-1]))
        print(rows[-1], file=sys.stderr)
    print(table(rows))
    if args.json:
        with atomic_write(Path(args.json)) as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    try:
        main()
    except FairseqError as error:
        sys.exit(f"bench_generate: {error}")
