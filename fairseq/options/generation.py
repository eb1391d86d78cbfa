"""Flags of translating: the search, text in and out, the web page, and the score of the result."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.options.common import POST_PROCESSORS, SEGMENTATIONS
from fairseq.utils.flags import flag

BACKENDS = ("native", "ctranslate2")


@dataclass
class GenerationConfig:
    """Beam search and its relatives."""

    beam: int = flag(5, "beam size")
    nbest: int = flag(1, "hypotheses to print a sentence")
    max_len_a: float = flag(0.0, "longest output is a * source length + b: a")
    max_len_b: int = flag(200, "longest output is a * source length + b: b")
    min_len: int = flag(1, "shortest output, in tokens before </s>")
    lenpen: float = flag(1.0, "length penalty: below 1 favours shorter, above 1 longer outputs")
    unkpen: float = flag(0.0, "penalty of <unk>: above 0 gives fewer")
    unnormalized: bool = flag(False, "compare hypotheses by their summed score, not by length-normalised ones")
    match_source_len: bool = flag(False, "outputs exactly as long as the source; </s> counts in their scores")
    no_repeat_ngram_size: int = flag(0, "no n-gram of this size twice in an output")
    sampling: bool = flag(False, "sample instead of searching")
    sampling_topk: int = flag(-1, "sample among the K likeliest tokens")
    sampling_topp: float = flag(-1.0, "sample among the likeliest tokens that together have this probability")
    temperature: float = flag(1.0, "divide logits by this: above 1 flattens the distribution")
    print_alignment: str | None = flag(
        None,
        "print A- lines, by attention: each output token's source position (hard, also alone) or all weights (soft)",
        choices=("hard", "soft"),
        const="hard",
    )
    replace_unk: str | None = flag(
        None, "replace <unk> by the source word it attends to, translated if in this file", metavar="FILE", const=""
    )
    cuda_graphs: bool = flag(
        False, "record the steps of the search as CUDA graphs and repeat those: on one GPU; not yet tried on a GPU"
    )


@dataclass
class ReferenceConfig:
    """What else the references serve for."""

    prefix_size: int = flag(0, "force the first N tokens to be the reference's", least=0)
    score_reference: bool = flag(False, "do not search: score the reference; there is no BLEU then")


@dataclass
class TextConfig:
    """Text in and out of the model's tokens."""

    post_process: str | None = flag(
        None,
        "undo this subword segmentation in the output (alone: subword_nmt)",
        "--remove-bpe",
        choices=POST_PROCESSORS,
        const="subword_nmt",
    )
    tokenizer: str | None = flag(None, "tokenise raw input, and detokenise D- lines", choices=("moses", "space"))
    moses_no_dash_splits: bool = flag(False, "--tokenizer moses: leave well-known whole, not well @-@ known")
    moses_no_escape: bool = flag(False, "--tokenizer moses: leave &, quotes and brackets as they are")
    bpe: str | None = flag(None, "segment raw input, and undo that in D- lines", choices=SEGMENTATIONS)
    bpe_codes: str | None = flag(None, "merges of --bpe subword_nmt or fastbpe", metavar="FILE")
    sentencepiece_model: str | None = flag(
        None, "model of --bpe sentencepiece", "--sentencepiece-vocab", metavar="FILE"
    )


@dataclass
class BackendConfig:
    """Which program translates."""

    backend: str = flag(
        "native", "what translates; ctranslate2: --path is a directory of fairseq-export", choices=BACKENDS
    )


@dataclass
class GenerateDataConfig:
    """Which part of the data-bin to translate, how to score it, and where results go."""

    gen_subset: str = flag("test", "subset to translate", metavar="SPLIT")
    num_shards: int = flag(1, "split the subset in N parts", least=1)
    shard_id: int = flag(0, "translate this part, from 0", least=0)
    results_path: str | None = flag(
        None, "write generate-SPLIT.txt here (generate-SPLIT.shardI.txt of a shard) and print the score", metavar="DIR"
    )
    scoring: str = flag("bleu", "score: tokenised BLEU, sacrebleu, chrF", choices=("bleu", "sacrebleu", "chrf"))
    sacrebleu: bool = flag(False, "the same as --scoring sacrebleu")
    quiet: bool = flag(False, "print the score alone")


@dataclass
class InteractiveConfig:
    """Where ``fairseq-interactive`` reads from."""

    input: str = flag("-", "file of source sentences; - is standard input", metavar="FILE")
    buffer_size: int = flag(0, "read N lines before translating them together (0 or 1: one by one)", least=0)


@dataclass
class ServeConfig:
    """``fairseq-interactive`` as a web page."""

    serve: str | None = flag(
        None,
        "serve a web page and a JSON interface instead (alone: on 127.0.0.1:8000)",
        metavar="HOST:PORT",
        const="127.0.0.1:8000",
    )
    model: list[str] = flag(
        [], "a model to choose on the page; may be given several times", metavar="NAME=FILE[:FILE]", repeat=True
    )
    serve_timeout: float = flag(30.0, "longest a request may take, in seconds", least=0.1)


@dataclass
class ScoreConfig:
    """What ``fairseq-score`` compares, and how."""

    sys: str = flag("-", "translations, one a line; - is standard input", "-s", metavar="FILE")
    ref: str = flag("", "references, one a line", "-r", metavar="FILE")
    order: int = flag(4, "longest n-gram", "-o", least=1)
    ignore_case: bool = flag(False, "compare in lower case")
    sacrebleu: bool = flag(False, "score detokenised text with sacrebleu's tokeniser, and print its signature")
    sentence_bleu: bool = flag(False, "a score for each line, smoothed by counting one match more from bigrams on")
