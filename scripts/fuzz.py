"""Feed damaged files, flags and lines to every reader: nothing but FairseqError, or exit status 2, may come.

    python scripts/fuzz.py --target checkpoint            # 100,000 cases
    python scripts/fuzz.py --engine atheris --target idx  # guided by coverage; needs the extra [fuzz]

A case starts from a valid file and is changed: bits, bytes, lengths and numbers, cut short, parts repeated, removed,
exchanged or taken from another file. Hypothesis makes the changes from a seed, so that a run can be repeated; atheris,
where it is installed, looks for changes that reach new code. The memory that the process may add is bounded. A case
that fails is written to ``--keep`` and named.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import random
import resource
import shutil
import string
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairseq import admin
from fairseq.checkpoint import build_from_checkpoint, load_checkpoint, updates_of, without_optimizer
from fairseq.cli.generate import check_generation_flags
from fairseq.clinic.omega import read_omega
from fairseq.data.dictionary import Dictionary
from fairseq.data.encoders import make_text_pipeline
from fairseq.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from fairseq.data.translation import LanguagePairDataset
from fairseq.errors import FairseqError
from fairseq.generation.translate import encode_source, translate_ids
from fairseq.models.config import TransformerConfig
from fairseq.models.state_dict import to_fairseq
from fairseq.models.transformer import Transformer
from fairseq.options import GENERATE_SECTIONS, GenerationConfig, PreprocessConfig, parse_args, parse_train_args

CASES = 100_000
MEMORY = 2**30  # bytes that a run may add to what the process has after its imports
LONGEST = 2000  # bytes of a line for the model, which is slow on long ones
NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63 - 1, 2**63, 2**64 - 1)
WORDS = [b"0", b"-1", b"1e400", b"nan", b"inf", b"9" * 400, b"(" * 200, b"\xff\xfe", b"\xef\xbb\xbf", b"\x00", b"\r\n"]
WORDS += [
    b"\n",
    b" ",
    b"#fairseq:overwrite",
    b"os\nsystem\n",
    b"R",
    b".",
    b"(",
    b"h\x00",
    b"\x8f",
    b"@@",
    b"\xe2\x80\xa8",
]

Check = Callable[[bytes], Any]
_folder = Path()


class Changes:
    """Where changes come from: an integer below a limit. Hypothesis, atheris and `random` all serve."""

    def __init__(self, below: Callable[[int], int]) -> None:
        self.below = below

    def of(self, items: Any) -> Any:
        return items[self.below(len(items))]


def mutated(data: bytes, others: list[bytes], changes: Changes) -> bytes:
    """``data`` with one to six changes."""
    out = bytearray(data)
    for _ in range(1 + changes.below(6)):
        at = changes.below(len(out) + 1)
        kind = changes.below(10)
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << changes.below(8)
        elif kind == 1 and out:
            out[at % len(out)] = changes.below(256)
        elif kind == 2:
            size = changes.of((1, 2, 4, 8))
            number = changes.of(NUMBERS) % 256**size
            out[at : at + size] = number.to_bytes(size, changes.of(("little", "big")))
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            del out[at : at + 1 + changes.below(16)]
        elif kind == 5:
            out[at:at] = out[at : at + 1 + changes.below(64)] * changes.of((1, 2, 20))
        elif kind == 6:
            out[at:at] = changes.of(WORDS)
        elif kind == 7:
            word = changes.of(WORDS)
            out[at : at + len(word)] = word
        elif kind == 8:
            other = changes.of(others)
            start = changes.below(len(other) + 1)
            out[at : at + changes.below(64)] = other[start : start + changes.below(256)]
        else:
            out[at:at] = bytes(changes.below(256) for _ in range(changes.below(9)))
    return bytes(out)


def _file(name: str, data: bytes) -> Path:
    path = _folder / name
    path.write_bytes(data)
    return path


# --- what is fuzzed: valid data to start from, and what is done with a case --------------------------------------


def toy_dictionary() -> Dictionary:
    return Dictionary.build({letter: 100 - i for i, letter in enumerate(string.ascii_lowercase)}, padding_factor=1)


def _model() -> Transformer:
    torch.manual_seed(1)
    cfg = TransformerConfig(
        encoder_layers=1, decoder_layers=1, encoder_embed_dim=4, encoder_ffn_embed_dim=4, encoder_attention_heads=1,
        decoder_attention_heads=1, init_type="adaptive", max_source_positions=64, max_target_positions=64,
    )  # fmt: skip
    return Transformer(cfg, len(toy_dictionary()), len(toy_dictionary())).eval()


def _checkpoints() -> list[bytes]:
    model = _model()
    settings = Namespace(**vars(model.cfg), source_lang="xx", target_lang="yy", user_dir=str(_folder / "no"))
    state = {
        "args": settings,
        "model": to_fairseq(model.state_dict()),
        "optimizer_history": [{"num_updates": 3, "optimizer_name": "adam"}],
        "extra_state": {"omega": {"encoder": [1.0, 1.0], "decoder": [1.0] * 3}, "train_iterator": {"epoch": 1}},
        "last_optimizer_state": {"state": {0: {"step": torch.ones(1), "exp_avg": torch.ones(2, 3)}}},
    }
    cfg = state | {"args": None, "cfg": {"model": vars(settings) | {"_name": "transformer"}, "task": {"data": ["x"]}}}
    found = []
    torch.serialization.set_crc32_options(False)  # else nearly all changes are found by a checksum
    try:
        for content in (state, cfg):
            for zipped in (True, False):
                buffer = io.BytesIO()
                torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
                found.append(buffer.getvalue())
    finally:
        torch.serialization.set_crc32_options(True)
    return found


def _check_checkpoint(data: bytes) -> None:
    path = _file("model.pt", data)
    state = load_checkpoint(path)
    updates_of(state)
    without_optimizer(state)
    with contextlib.suppress(FairseqError):
        read_omega(path)
    build_from_checkpoint(state, path)


def _dictionaries() -> list[bytes]:
    path = _folder / "dict.txt"
    toy_dictionary().save(path)
    return [path.read_bytes(), b"a 3\nb 2\na 1 #fairseq:overwrite\n", "\u00e4 1\n\u2581 2\n".encode()]


def _check_dictionary(data: bytes) -> None:
    dictionary = Dictionary.load(_file("dict.txt", data))
    assert dictionary.encode_line("a b \u00e4").max() < len(dictionary)
    dictionary.save(_folder / "again.txt")
    assert Dictionary.load(_folder / "again.txt") == dictionary


def _indices() -> list[bytes]:
    """``.idx`` and ``.bin`` in one: the length of the first, then both."""
    found = []
    for kind in (np.uint16, np.int32):
        prefix = _folder / "data"
        with IndexedDatasetWriter(prefix, kind) as writer:
            for size in (1, 3, 7, 2):
                writer.add(np.arange(4, 4 + size))
        index, data = (prefix.with_suffix(suffix).read_bytes() for suffix in (".idx", ".bin"))
        found.append(bytes([len(index)]) + index + data)
    return found


def _check_index(data: bytes) -> None:
    size = data[0] if data else 0
    _file("data.idx", data[1 : 1 + size])
    _file("data.bin", data[1 + size :])
    dictionary = toy_dictionary()
    side = IndexedDataset(_folder / "data")
    dataset = LanguagePairDataset(side, side, dictionary, dictionary)
    for first in range(0, len(dataset), 100):
        batch = dataset.collate(np.arange(first, min(first + 100, len(dataset))))
        assert batch["net_input"]["src_tokens"].max() < len(dictionary)
        assert batch["net_input"]["src_tokens"].min() >= 0


def _omegas() -> list[bytes]:
    path = _folder / "omega"
    admin.OmegaProfile([1.5, 2.25], [1.0, 3.5, 2.0], ["model: encoder_layers=1"]).save(path)
    return [path.read_bytes(), b"1 2.0\n2 2.0\n1 1.0\n2 1.0\n3 1.0\n"]


def _check_omega(data: bytes) -> None:
    path = _file("omega", data)
    profile = admin.OmegaProfile.load(path)
    model = _toy_model()
    with contextlib.suppress(FairseqError):
        admin.omega.check_comments(profile, model.cfg, path)
    admin.apply_profile(model, profile, path)


def _options() -> list[bytes]:
    """Arguments with a zero byte between them, the command first."""
    lines = (
        "train data --arch transformer_tiny --max-tokens 100 --adam-betas (0.9,0.98) --lr 0.1,0.2 --update-freq [2,1]",
        'train data -s de -t en --batch-size 8 --eval-bleu --eval-bleu-args {"beam":4} --criterion cross_entropy',
        "train data --lr-scheduler cosine --warmup-updates 4 --optimizer sgd --init-type adaptive --max-epoch 3",
        'generate data --path a.pt:b.pt --beam 4 --lenpen 0.6 --model-overrides {"dropout":0.1} --remove-bpe',
        "generate data --path a.pt --sampling --sampling-topk 3 --num-shards 2 --shard-id 1 --fp16 --max-len-b 9",
        "preprocess -s de -t en --trainpref a --validpref b,c --destdir d --workers 2 --joined-dictionary",
    )
    return [line.replace(" ", "\0").encode() for line in lines]


def _check_options(data: bytes) -> None:
    command, *argv = data.decode("utf-8", "surrogateescape").split("\0")
    if any(argument.startswith("--user-dir") for argument in argv):
        return  # which is meant to run code
    try:
        if command == "train":
            parse_train_args(argv)
        elif command == "generate":
            parse_args("fairseq-generate", "", GENERATE_SECTIONS, argv, check_generation_flags)
        else:
            parse_args("fairseq-preprocess", "", ((PreprocessConfig, "preprocessing"),), argv)
    except SystemExit as error:
        assert error.code in (0, 2)


def _lines() -> list[bytes]:
    return [
        b"the cat sat on the mat",
        "\u00e4\u00f6 \u4e2d\u6587 \U0001f600".encode(),
        b"a@@ b @-@ &amp; <s> </s>",
        b"",
    ]


def _check_line(data: bytes) -> None:
    """Tokenise, segment, number and translate, as ``fairseq-interactive`` does with a line that is UTF-8."""
    text = data[:LONGEST].decode("utf-8", "ignore")
    words = _pipeline().encode(text).split()
    dictionary = toy_dictionary()
    ids = encode_source(words, dictionary, 64, "line", truncate=True)
    search = GenerationConfig(beam=2, max_len_b=8)
    [translation] = translate_ids([_toy_model()], [ids], search)
    _pipeline().decode(dictionary.string(translation.hypotheses[0].tokens))


def _codes() -> list[bytes]:
    return [b"#version: 0.2\nt h\nth e</w>\na t</w>\n", b"a b\nab c\n"]


def _check_codes(data: bytes) -> None:
    path = _file("codes", data)
    make_text_pipeline(bpe="subword_nmt", bpe_codes=str(path)).encode("the cat sat")


_made: dict[str, Any] = {}


def _toy_model() -> Transformer:
    if "model" not in _made:
        _made["model"] = _model()
    return _made["model"]


def _pipeline() -> Any:
    if "pipeline" not in _made:
        codes = _file("codes", b"#version: 0.2\nt h\nth e</w>\na t</w>\n")
        _made["pipeline"] = make_text_pipeline("moses", "subword_nmt", bpe_codes=str(codes))
    return _made["pipeline"]


TARGETS: dict[str, tuple[Callable[[], list[bytes]], Check]] = {
    "dictionary": (_dictionaries, _check_dictionary),
    "idx": (_indices, _check_index),
    "checkpoint": (_checkpoints, _check_checkpoint),
    "omega": (_omegas, _check_omega),
    "options": (_options, _check_options),
    "interactive": (_lines, _check_line),
    "bpe": (_codes, _check_codes),
}


def run_case(check: Check, data: bytes) -> bool:
    """Whether a case was accepted; a FairseqError, of one line, is what refuses it. Raises what else comes."""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            check(data)
    except FairseqError as error:
        assert len(str(error).splitlines()) == 1, error
        return False
    return True


# --- engines -------------------------------------------------------------------------------------------------------


def fuzz_hypothesis(check: Check, seeds: list[bytes], cases: int, seed: int, report: Callable[[bytes], None]) -> int:
    """``cases`` cases by Hypothesis; returns how many were accepted."""
    import hypothesis
    from hypothesis import strategies as st

    accepted, done = 0, 0
    # one draw seeds a case: a draw for each change would spend nearly all time in Hypothesis
    strategy = st.tuples(st.integers(0, 2**64 - 1), st.sampled_from(seeds))

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def cases_of(drawn: tuple[int, bytes]) -> None:
        nonlocal accepted, done
        data = mutated(drawn[1], seeds, Changes(random.Random(drawn[0]).randrange))
        try:
            accepted += run_case(check, data)
        except BaseException:
            report(data)
        done += 1
        if done % 10_000 == 0:
            print(f"  {done:,} cases", flush=True)

    cases_of()
    return accepted


def fuzz_atheris(check: Check, seeds: list[bytes], cases: int, seed: int, report: Callable[[bytes], None]) -> None:
    """``cases`` cases by atheris, which ends the process."""
    import atheris

    def one(data: bytes) -> None:
        try:
            run_case(check, data)
        except BaseException:
            report(data)
            raise

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        if seed % 2:
            return atheris.Mutate(data, max_size)
        return mutated(data, seeds, Changes(random.Random(seed).randrange))[:max_size]

    corpus = _folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds):
        (corpus / str(number)).write_bytes(data)
    for name in [name for name in sys.modules if name.startswith("fairseq.") and name != "fairseq.errors"]:
        for value in list(vars(sys.modules[name]).values()):
            if getattr(value, "__module__", None) == name and hasattr(value, "__code__"):
                atheris.instrument_func(value)
            elif isinstance(value, type) and value.__module__ == name:
                for method in list(vars(value).values()):
                    if hasattr(method, "__code__"):
                        atheris.instrument_func(method)
    longest = 2 * max(map(len, seeds))
    flags = [f"-runs={cases}", f"-seed={seed}", f"-max_len={longest}", "-rss_limit_mb=4096", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()


@contextlib.contextmanager
def bounded_memory(extra: int) -> Iterator[None]:
    """The address space may grow by ``extra`` bytes."""
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def run(target: str, cases: int, seed: int, engine: str, keep: Path) -> int:
    """Fuzz one target and print what came of it; returns how many cases failed."""
    global _folder
    started = time.monotonic()
    failures: dict[str, int] = {}
    _folder = Path(tempfile.mkdtemp(prefix="fuzz."))
    _made.clear()

    def report(data: bytes) -> None:
        error = sys.exc_info()[1]
        assert error is not None
        where = traceback.extract_tb(error.__traceback__)[-1]
        key = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
        if key not in failures:
            keep.mkdir(parents=True, exist_ok=True)
            path = keep / f"{target}-{len(failures)}"
            path.write_bytes(data)
            print(f"FAILED {target}: {key}: {str(error)[:200]}; the case is {path}", flush=True)
            traceback.print_exception(error, limit=-4)
        failures[key] = failures.get(key, 0) + 1

    try:
        make, check = TARGETS[target]
        seeds = make()
        for data in seeds:
            assert run_case(check, data) or target == "options", "a valid case is refused"
        with bounded_memory(MEMORY):
            if engine == "atheris":
                fuzz_atheris(check, seeds, cases, seed, report)
                return len(failures)
            accepted = fuzz_hypothesis(check, seeds, cases, seed, report)
    finally:
        shutil.rmtree(_folder, ignore_errors=True)
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{target}: {cases:,} cases, {accepted:,} accepted, {sum(failures.values()):,} failed in {len(failures)} places"
        f"; {seconds:.0f} s, peak {peak:.0f} MiB",
        flush=True,
    )
    return sum(failures.values())


def main() -> None:
    """Parse, fuzz, exit with status 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=sorted(TARGETS), help="what to fuzz (default: all)")
    parser.add_argument("--cases", type=int, default=CASES, help=f"cases a target (default: {CASES})")
    parser.add_argument("--seed", type=int, default=1, help="seed of the changes (default: 1)")
    parser.add_argument("--engine", choices=("hypothesis", "atheris"), default="hypothesis")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="directory of cases that failed")
    args = parser.parse_args()
    if args.engine == "atheris" and args.target is None:
        parser.error("--engine atheris fuzzes one --target at a time")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    targets = [args.target] if args.target else sorted(TARGETS)
    failed = sum(run(target, args.cases, args.seed, args.engine, args.keep) for target in targets)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "80")
    main()
