"""Every reader that is fuzzed: valid data to start from, and what is done with a case."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gettext
import io
import json
import string
import typing
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from starlette.types import Message

from fairseq import admin
from fairseq.checkpoint import build_from_checkpoint, check_languages, load_checkpoint, updates_of, without_optimizer
from fairseq.cli import clinic, interactive
from fairseq.cli.generate import check_generation_flags
from fairseq.clinic.omega import read_omega
from fairseq.data.dictionary import Dictionary
from fairseq.data.encoders import TextPipeline, make_text_pipeline
from fairseq.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from fairseq.data.translation import LanguagePairDataset
from fairseq.errors import FairseqError
from fairseq.export import export_ctranslate2
from fairseq.generation.ctranslate2_backend import CTranslate2Model
from fairseq.generation.output import TextFormat
from fairseq.generation.translate import encode_source, translate_ids
from fairseq.hub import TransformerModel
from fairseq.interactive.app import make_app
from fairseq.models.config import TransformerConfig
from fairseq.models.state_dict import to_fairseq
from fairseq.models.transformer import Transformer
from fairseq.options import (
    GENERATE_SECTIONS,
    INTERACTIVE_SECTIONS,
    VALIDATE_SECTIONS,
    ExportConfig,
    GenerationConfig,
    ModelPathConfig,
    PreprocessConfig,
    ValidationConfig,
    parse_args,
    parse_clinic_args,
    parse_train_args,
)
from fairseq.training.validation import generation_config

LONGEST = 2000  # bytes of a text, most of which is cut off before the model sees it
LINES = 4  # of a text


@dataclass(frozen=True)
class Target:
    """A reader. seeds: folder -> valid cases; check: (folder, case) reads it. words: bytes that mean something in it.

    ``folder`` is a directory for whatever files are needed.
    """

    seeds: Callable[[Path], list[bytes]]
    check: Callable[[Path, bytes], Any]
    words: list[bytes] = field(default_factory=list)


def _file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# --- a model with a dictionary of letters --------------------------------------------------------------------------


@functools.cache
def _dictionary() -> Dictionary:
    return Dictionary.build({letter: 100 - i for i, letter in enumerate(string.ascii_lowercase)}, padding_factor=1)


@functools.cache
def _model() -> Transformer:
    torch.manual_seed(1)
    cfg = TransformerConfig(
        encoder_layers=1, decoder_layers=1, encoder_embed_dim=4, encoder_ffn_embed_dim=4, encoder_attention_heads=1,
        decoder_attention_heads=1, init_type="adaptive", max_source_positions=64, max_target_positions=64,
    )  # fmt: skip
    return Transformer(cfg, len(_dictionary()), len(_dictionary())).eval()


def _checkpoint() -> dict[str, Any]:
    settings = Namespace(**_model().cfg.flat(), source_lang="xx", target_lang="yy", user_dir="/no")
    return {
        "args": settings,
        "model": to_fairseq(_model().state_dict()),
        "optimizer_history": [{"num_updates": 3, "optimizer_name": "adam"}],
        "extra_state": {"omega": {"encoder": [1.0, 1.0], "decoder": [1.0] * 3}, "train_iterator": {"epoch": 1}},
        "last_optimizer_state": {"state": {0: {"step": torch.ones(1), "exp_avg": torch.ones(2, 3)}}},
    }


MERGES = b"#version: 0.2\nt h\nth e</w>\na t</w>\n"


def _pipeline(folder: Path) -> TextPipeline:
    return make_text_pipeline("moses", "subword_nmt", bpe_codes=str(_file(folder / "merges", MERGES)))


# --- files ---------------------------------------------------------------------------------------------------------


def _checkpoints(folder: Path) -> list[bytes]:
    state = _checkpoint()
    settings = vars(state["args"]) | {"_name": "transformer"}
    cfg = state | {"args": None, "cfg": {"model": settings, "task": {"data": ["x"]}}}
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


def _check_checkpoint(folder: Path, data: bytes) -> None:
    path = _file(folder / "model.pt", data)
    state = load_checkpoint(path)
    updates_of(state)
    without_optimizer(state)
    with contextlib.suppress(FairseqError):
        read_omega(path)
    build_from_checkpoint(state, path)
    check_languages(state["args"], "xx", "yy", path)


def _dictionaries(folder: Path) -> list[bytes]:
    path = folder / "dict.txt"
    _dictionary().save(path)
    return [path.read_bytes(), b"a 3\nb 2\na 1 #fairseq:overwrite\n", "\u00e4 1\n\u2581 2\n".encode()]


def _check_dictionary(folder: Path, data: bytes) -> None:
    dictionary = Dictionary.load(_file(folder / "dict.txt", data))
    assert dictionary.encode_line("a b \u00e4").max() < len(dictionary)
    dictionary.save(folder / "again.txt")
    assert Dictionary.load(folder / "again.txt") == dictionary


def _indices(folder: Path) -> list[bytes]:
    """``.idx`` and ``.bin`` in one: the length of the first, then both."""
    found = []
    for kind in (np.uint16, np.int32):
        prefix = folder / "data"
        with IndexedDatasetWriter(prefix, kind) as writer:
            for size in (1, 3, 7, 2):
                writer.add(np.arange(4, 4 + size))
        index, data = (prefix.with_suffix(suffix).read_bytes() for suffix in (".idx", ".bin"))
        found.append(bytes([len(index)]) + index + data)
    return found


def _check_index(folder: Path, data: bytes) -> None:
    size = data[0] if data else 0
    _file(folder / "data.idx", data[1 : 1 + size])
    _file(folder / "data.bin", data[1 + size :])
    side = IndexedDataset(folder / "data")
    dataset = LanguagePairDataset(side, side, _dictionary(), _dictionary())
    for first in range(0, len(dataset), 100):
        batch = dataset.collate(np.arange(first, min(first + 100, len(dataset))))
        assert batch["net_input"]["src_tokens"].max() < len(_dictionary())
        assert batch["net_input"]["src_tokens"].min() >= 0


def _omegas(folder: Path) -> list[bytes]:
    path = folder / "omega"
    admin.OmegaProfile([1.5, 2.25], [1.0, 3.5, 2.0], ["model: encoder_layers=1"]).save(path)
    return [path.read_bytes(), b"1 2.0\n2 2.0\n1 1.0\n2 1.0\n3 1.0\n"]


def _check_omega(folder: Path, data: bytes) -> None:
    path = _file(folder / "omega", data)
    profile = admin.OmegaProfile.load(path)
    with contextlib.suppress(FairseqError):
        admin.omega.check_comments(profile, _model().cfg, path)
    admin.apply_profile(_model(), profile, path)


def _codes(folder: Path) -> list[bytes]:
    return [MERGES, b"a b\nab c\n"]


def _check_codes(folder: Path, data: bytes) -> None:
    path = _file(folder / "codes", data)
    make_text_pipeline(bpe="subword_nmt", bpe_codes=str(path)).encode("the cat sat")


def _sentencepiece_models(folder: Path) -> list[bytes]:
    """One of each kind without a table of characters, which would take most of the changes, and one with it."""
    from sentencepiece import SentencePieceTrainer

    text = [f"the cat sat on the mat {i} \u00e4\u00f6\u00fc \u4e2d\u6587 hello world" for i in range(200)]
    found = []
    for kind, size, rule in (
        ("unigram", 60, "identity"),
        ("bpe", 60, "identity"),
        ("char", 30, "identity"),
        ("word", 60, "identity"),
        ("unigram", 60, "nmt_nfkc"),
    ):
        buffer = io.BytesIO()
        SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=buffer, vocab_size=size, model_type=kind, minloglevel=2,
            character_coverage=1.0, hard_vocab_limit=False, normalization_rule_name=rule,
        )  # fmt: skip
        found.append(buffer.getvalue())
    return found


def _check_sentencepiece(folder: Path, data: bytes) -> None:
    path = _file(folder / "sentencepiece.model", data)
    pipeline = make_text_pipeline(bpe="sentencepiece", sentencepiece_model=str(path))
    for line in ("the cat sat on the mat", "\u00e4\u00f6 \u4e2d\u6587 \U0001f600\u200b \ufb01", "", "a" * 300):
        tokens = pipeline.encode(line)
        assert "\n" not in tokens
        pipeline.decode(tokens)


def _clinic_results(folder: Path) -> list[bytes]:
    rows = {"beta2": [[1.0], [0.5, 0.25]], "bias": [0.1, 0.2]}
    fit = {"linear_r2": 0.9, "logarithmic_r2": 0.8, "exponent": 0.5}
    curves = {f"{kind}_mean": [0.1, 0.2, 0.4] for kind in ("random", "step")}
    norms = {stack: {"parameters": [1.0, 0.5]} for stack in ("encoder", "decoder")}
    omega = {"start": [1.0, 2.0], "mean": [1.5, 2.5], "std": None, "least": [1.0], "most": [2.0]}
    kinds = {
        "dependency": {"stack": "encoder", "models": [{"label": "a", "stage": "trained", "encoder": rows}]},
        "stability": {
            "models": [{"label": "a", "depths": [6, 12, 18], "fits": {"random": fit, "step": fit}, **curves}]
        },
        "gradients": {"models": [{"label": "a", **norms}]},
        "omega": {"models": [{"label": "a", "encoder": omega, "decoder": omega}]},
    }
    about = {"command": "fairseq-clinic", "torch": "2.6.0", "machine": "CPU"}
    return [json.dumps({"kind": kind, **about, "data": data}).encode() for kind, data in kinds.items()]


def _check_clinic(folder: Path, data: bytes) -> None:
    results = folder / "clinic"
    results.mkdir(exist_ok=True)
    _file(results / "case.json", data)
    clinic.COMMANDS["report"][0](["--out-dir", str(results)])
    page = (results / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page


# --- CTranslate2 ---------------------------------------------------------------------------------------------------


def _ctranslate2_model(folder: Path) -> Path:
    """A directory as ``fairseq-export`` writes it."""
    directory = folder / "ctranslate2"
    if not directory.exists():
        torch.save(_checkpoint(), folder / "exported.pt")
        for language in ("xx", "yy"):
            _dictionary().save(folder / f"dict.{language}.txt")
        export_ctranslate2(
            ExportConfig(str(folder / "exported.pt"), "ctranslate2", output=str(directory), data=str(folder))
        )
    return directory


def _translate_with_ctranslate2(directory: Path) -> None:
    model = CTranslate2Model(directory)
    model.check_dictionaries(_dictionary(), _dictionary(), directory)
    model.translate([torch.tensor([4, 5, 2])], GenerationConfig(beam=2, max_len_b=2, print_alignment="hard"))


def _ctranslate2_weights(folder: Path) -> list[bytes]:
    return [(_ctranslate2_model(folder) / "model.bin").read_bytes()]


def _check_ctranslate2_weights(folder: Path, data: bytes) -> None:
    _file(folder / "ctranslate2" / "model.bin", data)
    _translate_with_ctranslate2(folder / "ctranslate2")


def _ctranslate2_json(folder: Path) -> list[bytes]:
    directory = _ctranslate2_model(folder)
    return [(directory / name).read_bytes() for name in ("config.json", "shared_vocabulary.json")]


def _check_ctranslate2_json(folder: Path, data: bytes) -> None:
    """A list as the vocabulary, all else as the configuration."""
    directory = folder / "ctranslate2"
    path = directory / ("shared_vocabulary.json" if data.startswith(b"[") else "config.json")
    valid = path.read_bytes()
    try:
        _file(path, data)
        _translate_with_ctranslate2(directory)
    finally:
        _file(path, valid)


# --- flags ---------------------------------------------------------------------------------------------------------


@functools.cache
def _fast_parsers() -> None:
    """Parsers are made anew for each case; what is the same each time, and none of ours, is remembered."""
    typing.get_type_hints = functools.cache(typing.get_type_hints)  # type: ignore[assignment]
    gettext.dgettext = lambda domain, message: message  # looks for a file of translations with each message


def _options(folder: Path) -> list[bytes]:
    """Arguments with a zero byte between them, the command first."""
    _fast_parsers()
    lines = (
        "train data --arch transformer_tiny --max-tokens 100 --adam-betas (0.9,0.98) --lr 0.1,0.2 --update-freq [2,1]",
        'train data -s de -t en --batch-size 8 --eval-bleu --eval-bleu-args {"beam":4} --criterion cross_entropy',
        "train data --lr-scheduler cosine --warmup-updates 4 --optimizer sgd --init-type adaptive --max-epoch 3",
        'generate data --path a.pt:b.pt --beam 4 --lenpen 0.6 --model-overrides {"dropout":0.1} --remove-bpe',
        "generate data --path a.pt --sampling --sampling-topk 3 --num-shards 2 --shard-id 1 --fp16 --max-len-b 9",
        "interactive data --path a.pt --buffer-size 2 --serve [::1]:80 --model a=b.pt --serve-timeout 3 --bpe x",
        "validate data --path a.pt --valid-subset valid,test --max-tokens 9 --batch-size 4 --log-format json",
        "clinic data --models post-ln,adaptive --depths 6,12,18 --seeds 3 --max-tokens 99 --name a --out-dir b",
        "preprocess -s de -t en --trainpref a --validpref b,c --destdir d --workers 2 --joined-dictionary",
    )
    return [line.replace(" ", "\0").encode() for line in lines]


OPTION_WORDS = [
    f"\0{word}\0".encode()
    for word in (
        *(
            "--lr",
            "--beam",
            "--seed",
            "--help",
            "--version",
            "--max-epoch",
            "--user-dir",
            "--path",
            "--",
            "-s",
            "--fp16",
        ),
        *("--bf16", "--cpu", "--optimizer", "--lr-scheduler", "--criterion", "--arch", "adafactor", "polynomial", "-1"),
        *(
            "0",
            "1e9",
            "99999999999999999999",
            "nan",
            "--model-overrides",
            "{}",
            "--adam-betas",
            "(1,",
            "[]",
            "True",
            "",
        ),
        *("--valid-subset", "--patience", "--save-dir", "--encoder-layers", "--init-type", "--serve", "--model", "a=b"),
    )
]


def _check_options(folder: Path, data: bytes) -> None:
    command, *argv = data.decode("utf-8", "surrogateescape").split("\0")
    if any(argument.startswith("--user-dir") for argument in argv):
        return  # which is meant to run code
    try:
        if command == "train":
            parse_train_args(argv)
        elif command == "generate":
            parse_args("fairseq-generate", "", GENERATE_SECTIONS, argv, check_generation_flags)
        elif command == "interactive":
            parse_args("fairseq-interactive", "", INTERACTIVE_SECTIONS, argv, interactive.check_flags)
        elif command == "validate":
            parse_args("fairseq-validate", "", VALIDATE_SECTIONS, argv)
        elif command == "clinic":
            parse_clinic_args("fairseq-clinic stability", "", (*clinic.MEASURE, *clinic.DEPTHS), argv)
        else:
            parse_args("fairseq-preprocess", "", ((PreprocessConfig, "preprocessing"),), argv)
    except SystemExit as error:
        assert error.code in (0, 2)


def _json_flags(folder: Path) -> list[bytes]:
    return [
        b'{"beam": 2, "lenpen": 0.6, "nbest": 2, "max_len_b": 2, "no_repeat_ngram_size": 2, "unkpen": 1}',
        b'{"sampling": true, "sampling_topk": 3, "temperature": 0.5, "max_len_a": 0.1, "max_len_b": 2, "min_len": 1}',
        b'{"dropout": 0.1, "encoder_layers": 1, "init_type": "adaptive", "activation_fn": "gelu", "data": null}',
    ]


def _check_json_flags(folder: Path, data: bytes) -> None:
    """As ``--eval-bleu-args``, with a translation, and as ``--model-overrides``, with a model."""
    _fast_parsers()
    text = data.decode("utf-8", "surrogateescape")
    sections = ((ValidationConfig, "validation"), (ModelPathConfig, "model"))
    try:
        args = parse_args("fairseq-validate", "", sections, ["--eval-bleu-args", text, "--model-overrides", text])
    except SystemExit as error:
        assert error.code == 2
        raise FairseqError("a usage error") from None
    with contextlib.suppress(FairseqError):
        search = generation_config(args.eval_bleu_args, _model().decoder.embed_tokens.num_embeddings)
        search.max_len_a, search.max_len_b = min(search.max_len_a, 1.0), min(search.max_len_b, 2)
        translate_ids([_model()], [torch.tensor([4, 5, 2])], search)
    state = {"args": _model().cfg.flat(), "model": to_fairseq(_model().state_dict())}
    build_from_checkpoint(state, "model.pt", args.model_overrides)


# --- text ----------------------------------------------------------------------------------------------------------


def _texts(folder: Path) -> list[bytes]:
    return [
        b"the cat sat on the mat\nthe\n",
        "\u00e4\u00f6 \u4e2d\u6587 \U0001f600\r\n".encode(),
        b"a@@ b @-@ &amp; <s> </s>",
        b"",
    ]


def _check_text(folder: Path, data: bytes) -> None:
    """Decode, tokenise, segment, number, translate and print, as ``fairseq-interactive`` does with its input."""
    pipeline, text = _text_format(folder)
    lines = data[:LONGEST].splitlines(keepends=True)[:LINES]
    words = [pipeline.encode(line).split() for line in interactive.decode_lines(lines, "-")]
    ids = [encode_source(line, _dictionary(), 64, "line", truncate=True) for line in words]
    for translation in translate_ids([_model()], ids, GenerationConfig(beam=1, max_len_b=1, print_alignment="hard")):
        text.source(translation.src_tokens)
        text.hypothesis_lines(0, translation.hypotheses[0], words[translation.id])


@functools.lru_cache(1)
def _text_format(folder: Path) -> tuple[TextPipeline, TextFormat]:
    pipeline = _pipeline(folder)
    shown = TextFormat(
        _dictionary(),
        _dictionary(),
        post_process="subword_nmt",
        print_alignment="hard",
        decode=pipeline.decode,
        decode_source=pipeline.decode_source,
    )
    return pipeline, shown


def _requests(folder: Path) -> list[bytes]:
    return [
        b'{"text": "the cat\\nsat", "beam": 2, "nbest": 2, "lenpen": 0.5, "attention": true, "model": "toy"}',
        b'{"text": "\\u00e4 &amp; \\ud83d\\ude00"}',
    ]


@functools.lru_cache(1)
def _server(folder: Path) -> tuple[Any, asyncio.AbstractEventLoop]:
    model = TransformerModel([_model()], _dictionary(), _dictionary(), _pipeline(folder))
    settings = asdict(GenerationConfig(beam=1, max_len_b=1)) | {"truncate_source": True}
    return make_app({"toy": model}, settings), asyncio.new_event_loop()


def _check_request(folder: Path, data: bytes) -> None:
    """The body of a request to translate; its answer is JSON, and no error of the server's own."""
    app, loop = _server(folder)
    sent: list[Message] = []
    parts = [data[:100], data[100:]]

    async def receive() -> Message:
        if not parts:
            await asyncio.Event().wait()  # the client waits for the answer
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    scope = {"type": "http", "method": "POST", "path": "/api/translate", "headers": headers, "query_string": b""}
    loop.run_until_complete(app(scope, receive, send))
    status = sent[0]["status"]
    answer = json.loads(b"".join(message.get("body", b"") for message in sent))
    assert status in (200, 400, 404, 413, 422), (status, answer)
    if status != 200:
        raise FairseqError(answer["error"])
    assert answer["translations"]


TARGETS: dict[str, Target] = {
    "bpe": Target(_codes, _check_codes),
    "checkpoint": Target(_checkpoints, _check_checkpoint),
    "clinic": Target(_clinic_results, _check_clinic, [b"<script>", b"NaN", b'"kind": "omega"', b"[" * 3000, b"null"]),
    "ctranslate2": Target(_ctranslate2_weights, _check_ctranslate2_weights, [b"encoder/", b"layer_0", b"/weight"]),
    "ctranslate2-json": Target(_ctranslate2_json, _check_ctranslate2_json, [b"null", b'"a", ', b"{}", b"[" * 3000]),
    "dictionary": Target(_dictionaries, _check_dictionary),
    "idx": Target(_indices, _check_index),
    "interactive": Target(_texts, _check_text, [b"&#0;", b"&#x110000;", b"@-@", b"\xe2\x96\x81", b"\xed\xa0\x80"]),
    "json-flags": Target(_json_flags, _check_json_flags, [b"NaN", b"-Infinity", b"[" * 3000, b'{"a": ' * 3000]),
    "omega": Target(_omegas, _check_omega),
    "options": Target(_options, _check_options, OPTION_WORDS),
    "sentencepiece": Target(_sentencepiece_models, _check_sentencepiece, [b"\xe2\x96\x81", b"<unk>", b"<0x41>"]),
    "serve": Target(_requests, _check_request, [b"\\ud800", b"NaN", b'"beam": 1e0', b"[" * 3000, b'"text": "']),
}
