"""The command lines that cause each message in ``docs/errors.md``, and the files that they need."""

from __future__ import annotations

import shlex
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fairseq.models.config import TransformerConfig
from fairseq.models.transformer import Transformer
from tests.toys import VOCAB, toy_model, write_toy_checkpoint, write_toy_databin
from tests.training_runs import TINY

TRAIN = "train bin " + shlex.join(TINY) + " --save-dir out"
RUN = f"{TRAIN} --max-epoch 1 --train-subset test --valid-subset test"
GENERATE = "generate bin --path toy.pt --cpu --num-workers 0"
INTERACTIVE = "interactive bin --path toy.pt --cpu"
OMEGA = f"{RUN} --init-type adaptive --omega-file"
SHAPE = "--max-tokens 100 --encoder-embed-dim 16 --encoder-ffn-embed-dim 24 --encoder-attention-heads 2"
DEPENDENCY = "clinic dependency bin --cpu --out-dir out"
AVERAGE = "average --output out.pt"
EXPORT = "export toy.pt --data bin --output out"
HUGGINGFACE = "--data bin --output out --format huggingface"


def _override(name: str, value: object) -> str:
    return GENERATE + " --model-overrides " + shlex.quote(f'{{"{name}": {value}}}')


# The beginning of a documented message -> command lines in a directory of `write_material`'s files. "without PACKAGE:"
# before one: as if it were not installed. python: a statement.
CASES = {
    # all commands
    "unrecognized arguments": [f"{TRAIN} --max-epoch 1 --max-tokns 3", f"{GENERATE} --beem 3"],
    "the following arguments": ["clinic", "generate", "average", "prepare_corpus clean"],
    "argument *: expected one": [f"{GENERATE} --beam"],
    "argument *: invalid choice": [f"{RUN} --arch nope", f"{RUN} --optimizer nope", "export a.pt --format nope"],
    "argument *: invalid * value": [f"{GENERATE} --beam five"],
    "argument *: *: must be a finite": [f"{RUN} --clip-norm nan", f"{GENERATE} --lenpen inf"],
    "argument *: *: must be *": [f"{RUN} --max-tokens 0", f"{RUN} --dropout 2", f"{GENERATE} --beam {2**70}"],
    "argument *: '*' is neither": [f"{GENERATE} --left-pad-source maybe"],
    "argument *: '*' is not a list": [f"{RUN} --lr 0.1,big"],
    "argument *: '*' is not a tuple": [
        f"{RUN} --adam-betas {shlex.quote(v)}" for v in ("(" * 5000, "0.9", f"({'9' * 400},)")
    ],
    "argument *: '*' is not a JSON": [
        f"{GENERATE} --model-overrides {'[' * 5000}",
        f"{RUN} --eval-bleu-args \"{{b'beam': 4, 'nbets': 1}}\"",
    ],
    "--fp16 and --bf16": [
        f"{RUN} --fp16 --bf16",
        "generate bin --path toy.pt --fp16 --bf16",
        "validate bin --path toy.pt --fp16 --bf16",
    ],
    "--fp16 needs a GPU; on": [f"{TRAIN} --max-epoch 1 --fp16", "interactive bin --path toy.pt --fp16 --cpu"],
    "--fp16 needs a GPU and": [
        "train bin --max-tokens 100 --max-epoch 1 --fp16 --save-dir out",
        "generate bin --path toy.pt --fp16",
        "validate bin --path toy.pt --fp16",
    ],
    "--user-dir *: no package": [f"{RUN} --user-dir {name}" for name in ("bin", "../radam_fairseq")],
    "--user-dir *: * on import": [f"{RUN} --user-dir user_broken"],
    "* '*' is registered twice": [f"{RUN} --user-dir user_twice"],
    "* '*': its config is no": [f"{RUN} --user-dir user_undecorated"],
    "*: cannot read: *": [
        "preprocess -s xx -t yy --trainpref nowhere --destdir out",
        f"{INTERACTIVE} --input bin",
        f"{GENERATE} --replace-unk nowhere",
        "score --sys nowhere --ref good.xx",
        "clinic omega nowhere",
        "clinic report --out-dir json_is_directory",
        "prepare_corpus talks nowhere out",
    ],
    "*: cannot write: *": [
        "preprocess -s xx -t yy --trainpref good --destdir good.xx/out",
        f"{RUN} --log-file good.xx/log",
        f"{RUN} --tensorboard-logdir good.xx/log",
        "export toy.pt --output good.xx/out",
        "average --inputs toy.pt --output good.xx/out.pt",
    ],
    "*: begins with a byte order mark": [
        "preprocess -s xx -t yy --trainpref bom --destdir out",
        "preprocess -s xx -t yy --trainpref good --srcdict bom.xx --destdir out",
        f"{INTERACTIVE} --input bom.xx",
        "score --sys bom.xx --ref bom.xx",
    ],
    "* needs the package": [
        "without ctranslate2: export toy.pt --data bin --output out --format ctranslate2",
        "without ctranslate2: generate bin --path model.ct2 --backend ctranslate2 --cpu",
        "without transformers: export toy.pt --data bin --output out --format huggingface",
    ],
    # fairseq-preprocess
    "give the source language": ["preprocess -t yy --trainpref good --destdir out"],
    "give the target language": ["preprocess -s xx --trainpref good --destdir out"],
    "--source-lang and --target-lang are": ["preprocess -s xx -t xx --trainpref good --destdir out"],
    "--joined-dictionary means": [
        "preprocess -s xx -t yy --trainpref good --joined-dictionary --srcdict a --tgtdict b --destdir out"
    ],
    "nothing to do": ["preprocess -s xx -t yy --destdir out"],
    "* has * lines and": ["preprocess -s xx -t yy --trainpref short --destdir out"],
    "*, line *: not UTF-8 (*); convert or": [
        f"preprocess -s xx -t yy --trainpref {name} --destdir out" for name in ("latin", "binary")
    ],
    "*: the file is empty": ["preprocess -s xx -t yy --trainpref empty --destdir out"],
    "no dictionary for": ["preprocess -s xx -t yy --validpref good --destdir out"],
    "*: another dictionary is there": ["preprocess -s xx -t yy --trainpref good --destdir bin"],
    # dictionaries and data-bins
    "*: cannot read the dictionary": ["preprocess -s xx -t yy --trainpref good --srcdict bin --destdir out"],
    "*: the dictionary is empty": ["preprocess -s xx -t yy --trainpref good --srcdict empty.xx --destdir out"],
    "*, line *: '*' is not 'token count'": ["preprocess -s xx -t yy --trainpref good --srcdict good.xx --destdir out"],
    "*: '*' is in the dictionary": ["preprocess -s xx -t yy --trainpref good --srcdict twice --destdir out"],
    "*, line *: more than": ["preprocess -s xx -t yy --trainpref good --srcdict long --destdir out"],
    "*, line *: not UTF-8 (*); convert the": [
        "preprocess -s xx -t yy --trainpref good --srcdict latin_dictionary --destdir out"
    ],
    "*: no such data-bin": [RUN.replace(" bin ", " nowhere ")],
    "* has *; give": [RUN.replace(" bin ", " json ")],
    "language '*' is not": [f"{RUN} -s zz"],
    "*: fairseq-preprocess did not": ["generate unfinished --path toy.pt --cpu"],
    "*: no split '*'": [
        "generate half_bin --path toy.pt --cpu",
        f"{GENERATE} --gen-subset nope",
        f"{TRAIN} --max-epoch 1",
        "validate bin --path toy.pt --cpu",
    ],
    "*: there is no * side": [RUN.replace(" bin ", " one_side ") + " -s xx -t yy"],
    "* lacks its * side": [RUN.replace(" bin ", " half_of_two ")],
    "* has * sentences and": ["generate uneven --path toy.pt --cpu"],
    "*: cut short; make": ["generate short_index --path toy.pt --cpu"],
    "*: cut short: *": ["generate cut_data --path toy.pt --cpu"],
    "*: * bytes do not fit": ["generate cut_index --path toy.pt --cpu"],
    "*: its sizes and offsets": ["generate bad_index --path toy.pt --cpu"],
    "*: not fairseq's mmap": ["generate no_index --path toy.pt --cpu"],
    "*: unknown format version": ["generate later --path toy.pt --cpu"],
    "*: token id *": ["generate bad_ids --path toy.pt --cpu --num-workers 0"],
    "*: there is no sentence": [
        "generate no_sentence --path toy.pt --cpu",
        "validate no_sentence --path toy.pt --cpu --valid-subset test",
        RUN.replace(" bin ", " no_sentence "),
    ],
    "*: sentence * has": [f"{GENERATE} --max-source-positions 3", f"{RUN} --max-target-positions 3"],
    "*: every sentence is": [f"{GENERATE} --max-source-positions 1 --skip-invalid-size-inputs-valid-test"],
    "sentence * has * tokens": [f"{RUN} --max-tokens-valid 3", f"{GENERATE} --max-tokens 3"],
    # checkpoints
    "checkpoint *: no such file": ["generate bin --path nowhere.pt --cpu", "export nowhere.pt --output out"],
    "checkpoint *: is a directory": ["generate bin --path bin --cpu"],
    "checkpoint *: damaged": [f"generate bin --path {name} --cpu" for name in ("cut.pt", "good.xx", "empty.xx")],
    "checkpoint *: not a fairseq": ["generate bin --path tensor.pt --cpu"],
    "checkpoint *: 'model' holds": ["generate bin --path no_tensor.pt --cpu"],
    "checkpoint *: no settings": ["generate bin --path no_settings.pt --cpu"],
    "checkpoint *: no parameter": ["generate bin --path other_model.pt --cpu"],
    "checkpoint *: embeddings of": ["generate bin --path one_token.pt --cpu"],
    "checkpoint *: its settings say": [_override("encoder_layers", 3)],
    "checkpoint *: its settings make a model": [
        _override("max_source_positions", 2**21),
        _override("encoder_embed_dim", 2**20),
    ],
    "checkpoint *: its settings make no": [_override("encoder_embed_dim", '"wide"')],
    "checkpoint *: trained with": [
        "generate bin --path adaptive_softmax.pt --cpu",
        f"{RUN} --finetune-from-model cross_self_attention.pt",
    ],
    "parameter * of shape": ["generate bin --path fused.pt --cpu"],
    "checkpoint * does not fit": [
        f"{RUN} --finetune-from-model toy.pt",
        _override("encoder_layers", 1),
        _override("encoder_ffn_embed_dim", 23),
    ],
    "checkpoint * was trained with": [
        "generate other --path toy.pt --cpu",
        "validate other --path toy.pt --cpu",
        "export toy.pt --data other --output out --format huggingface",
    ],
    "checkpoint * translates": [
        f"{command} bin --path toy.pt --cpu -s yy -t xx" for command in ("generate", "validate", "interactive")
    ],
    # model, Admin and omega files
    "--*-embed-dim": [f"{RUN} --encoder-attention-heads 3"],
    "--*-layers": [_override("decoder_layers", 0)],
    "--share-all-embeddings needs one": [RUN.replace(" bin ", " other ") + " --share-all-embeddings"],
    "--share-all-embeddings needs --": [f"{RUN} --share-all-embeddings --decoder-embed-dim 32"],
    "unknown * '*'": [_override("init_type", '"nope"')],
    "* does nothing with --init-type": [f"{RUN} --profile-batches 2"],
    "--init-type * with --*-normalize": [f"{RUN} --init-type adaptive --encoder-normalize-before"],
    "--init-type looklinear": [f"{RUN} --init-type looklinear --decoder-ffn-embed-dim 25"],
    "--profile-batches": [f"{RUN} --init-type adaptive-profiling --omega-file out/omega --profile-batches 100"],
    "omega file *: *; make": [f"{OMEGA} bin"],
    "omega file *: not a text": [f"{OMEGA} binary.xx"],
    "omega file *: more than": [f"{OMEGA} omega.large"],
    "omega file *, line *: '*'": [f"{OMEGA} good.xx", "clinic omega good.xx"],
    "omega file *, line *: omega": [f"{OMEGA} omega.negative"],
    "omega file *, line *: index": [f"{OMEGA} omega.order"],
    "omega file *: * runs": [f"{OMEGA} omega.half", "clinic omega empty.xx"],
    "* has * sub-layers": [f"{OMEGA} omega.deep"],
    "omega file * was profiled": [f"{OMEGA} omega.wide"],
    # fairseq-train
    "give --max-tokens or": ["train bin --max-epoch 1 --save-dir out"],
    "training would never": [f"{TRAIN} --train-subset test"],
    "--offload-activations": [f"{RUN} --offload-activations"],
    "--checkpoint-activations-every": [f"{RUN} --checkpoint-activations-every 2"],
    "--best-checkpoint-metric": [f"{RUN} --best-checkpoint-metric bleu --maximize-best-checkpoint-metric"],
    "bleu as": [f"{RUN} --maximize-best-checkpoint-metric", f"{RUN} --eval-bleu --best-checkpoint-metric bleu"],
    "--eval-bleu-args: '*'": [f"{RUN} --eval-bleu --eval-bleu-args " + shlex.quote('{"beem": 4}')],
    "--eval-bleu-args: --": [f"{RUN} --eval-bleu --eval-bleu-args " + shlex.quote('{"beam": 0}')],
    "--eval-bleu-args: *;": [
        f"{RUN} --eval-bleu --eval-bleu-args " + shlex.quote(text)
        for text in ('{"beam": "four"}', '{"beam": null}', '{"lenpen": {}}', '{"temperature": NaN}', '{"beam": 1.5}')
    ],
    "--patience": [f"{RUN} --patience 3 --disable-validation"],
    "--sacrebleu and --scoring chrf": [f"{GENERATE} --sacrebleu --scoring chrf"],
    "--finetune-from-model contradicts": [f"{RUN} --finetune-from-model toy.pt --restore-file toy.pt"],
    "--finetune-from-model *": [f"{RUN} --finetune-from-model nowhere.pt"],
    "--restore-file *": [f"{RUN} --restore-file nowhere.pt --save-dir saved"],
    "--save-dir *": [f"{RUN} --save-dir good.xx/out"],
    "checkpoint *; continue": [f"{RUN} --save-dir damaged_last"],
    "checkpoint * has no optimiser": [f"{RUN} --restore-file tiny.pt"],
    "checkpoint * holds": [f"{RUN} --restore-file tiny_nag.pt"],
    "checkpoint *: what it holds": [f"{RUN} --restore-file tiny_other.pt"],
    "--label-smoothing": [f"{RUN} --criterion label_smoothed_cross_entropy --label-smoothing 1.5"],
    "--optimizer *": [f"{RUN} --adam-eps=-1"],
    "--optimizer adafactor": [f"{RUN} --optimizer adafactor --ddp-backend fully_sharded"],
    "--adam-betas *: two": [f"{RUN} --adam-betas '(0.9,)'"],
    "--adam-betas *: radam": [f"{RUN} --optimizer radam --adam-betas '(0.9, 0.5)'"],
    "--lr *: --lr-scheduler": [f"{RUN} --lr 0.1,0.01"],
    "--lr *: must be above": [f"{RUN} --lr-scheduler cosine --lr-period-updates 10 --lr 0.1 --min-lr 0.2"],
    "--lr-scheduler *: give --total": [f"{RUN} --lr-scheduler polynomial_decay"],
    "--lr-scheduler cosine": [f"{RUN} --lr-scheduler cosine"],
    "--warmup-updates": [f"{RUN} --lr-scheduler polynomial_decay --max-update 5"],
    "--end-learning-rate": [f"{RUN} --lr-scheduler polynomial_decay --max-update 9 --end-learning-rate=-1"],
    "--t-mult": [f"{RUN} --lr-scheduler cosine --lr-period-updates 10 --t-mult 0.5"],
    "training diverges": [
        f"{RUN} --max-epoch 20 --disable-validation --no-save --lr 1e30 --lr-scheduler fixed",
    ],
    "*: * is not finite": [
        f"{RUN} --finetune-from-model nan.pt --encoder-layers 2 --decoder-layers 2 --decoder-learned-pos"
    ],
    "--tensorboard-logdir": [f"without tensorboard: {RUN} --tensorboard-logdir out"],
    "--wandb-project needs": [f"without wandb: {RUN} --wandb-project name"],
    # several processes
    "--distributed-port": [f"{RUN} --distributed-world-size 2 --distributed-port PORT"],
    # fairseq-generate, fairseq-interactive, fairseq-validate
    "--path FILE is missing": ["generate bin", "validate bin", "interactive bin"],
    "--path: fairseq-validate": ["validate bin --path toy.pt:toy.pt --cpu"],
    "--path *: name a checkpoint": ["generate bin --path toy.pt: --cpu"],
    "* has dictionaries": ["generate bin --path toy.pt:wide.pt --cpu"],
    "model overrides": [_override("encoder_leyers", 2)],
    "--beam *: must be at least": [f"{GENERATE} --beam 0", f"{INTERACTIVE} --beam 0"],
    "--beam *: the target": [f"{GENERATE} --beam 100"],
    "--nbest": [f"{GENERATE} --nbest 6"],
    "--min-len": [f"{GENERATE} --min-len=-1"],
    "--max-len-a": [f"{GENERATE} --max-len-a=-1"],
    "--max-len-b": [f"{GENERATE} --max-len-b 0", f"{GENERATE} --max-len-b 3 --min-len 4"],
    "--no-repeat-ngram-size": [f"{GENERATE} --no-repeat-ngram-size=-1"],
    "--lenpen": [f"{GENERATE} --lenpen 2147483648"],
    "--temperature": [f"{GENERATE} --temperature 0"],
    "--sampling-topp *": [f"{GENERATE} --sampling --sampling-topp 1.5"],
    "--sampling-topk needs": [f"{GENERATE} --sampling-topk 3"],
    "--sampling-topp needs": [f"{GENERATE} --sampling-topp 0.5"],
    "--shard-id": [f"{GENERATE} --num-shards 2 --shard-id 2"],
    "* needs references": [
        f"generate one_side -s xx -t yy --path toy.pt --cpu --num-workers 0 {flag}"
        for flag in ("--prefix-size 1", "--score-reference", "--prefix-size 1 --path model.ct2 --backend ctranslate2")
    ],
    "sentence * has no translation": [f"{GENERATE} --no-repeat-ngram-size 1 --min-len 30"],
    "--replace-unk *, line": [f"{GENERATE} --replace-unk good.xx"],
    "--replace-unk *: not": [f"{GENERATE} --replace-unk latin_dictionary"],
    "nothing to score": ["score --sys empty.xx --ref empty.yy"],
    "*, line *: not valid UTF-8": [f"{INTERACTIVE} --input latin.xx", "prepare_corpus talks latin.xx out"],
    "*: * tokens, and": [f"{INTERACTIVE} --input good.xx --max-source-positions 2"],
    "--bpe * needs --bpe-codes": [f"{INTERACTIVE} --input good.xx --bpe {name}" for name in ("subword_nmt", "fastbpe")],
    "--bpe sentencepiece needs": [f"{INTERACTIVE} --input good.xx --bpe sentencepiece"],
    "--bpe-codes *": [
        f"{INTERACTIVE} --input good.xx --bpe subword_nmt --bpe-codes {name}"
        for name in ("nowhere", "binary.xx", "bom.xx", "latin_dictionary")
    ],
    "--sentencepiece-model *": [
        f"{INTERACTIVE} --input good.xx --bpe sentencepiece --sentencepiece-model {name}"
        for name in ("nowhere", "good.xx", "empty.xx")
    ],
    "* does nothing without --serve": [f"{INTERACTIVE} --model a=toy.pt", f"{INTERACTIVE} --serve-timeout 3"],
    "--serve reads no lines": [f"{INTERACTIVE} --serve 0 --input good.xx", f"{INTERACTIVE} --serve 0 --buffer-size 2"],
    "--serve *: not HOST:PORT": [f"{INTERACTIVE} --serve localhost:port"],
    "--serve *: *; give": [f"{INTERACTIVE} --serve 192.0.2.1:80"],
    "--serve needs": [f"without uvicorn: {INTERACTIVE} --serve 0"],
    "--model *: not": [f"{INTERACTIVE} --serve 0 --model toy.pt"],
    "--model *: there is": [f"{INTERACTIVE} --serve 0 --model a=toy.pt --model a=toy.pt"],
    "--backend ctranslate2 does not": [
        f"generate bin --path model.ct2 --backend ctranslate2 {flag}" for flag in ("--sampling", "--bf16")
    ]
    + ["interactive bin --path model.ct2 --backend ctranslate2 --unkpen 1"],
    "*: cannot read: *; is it": ["generate bin --path toy.pt --backend ctranslate2"],
    "*: no JSON": ["generate bin --path no_json.ct2 --backend ctranslate2"],
    "*: not what fairseq-export": [
        f"generate bin --path {name}.ct2 --backend ctranslate2"
        for name in ("other_json", "no_words", "no_start", "no_positions")
    ],
    "*: not a model of fairseq-export": [
        f"generate bin --path {name}.ct2 --backend ctranslate2" for name in ("empty", "other_words")
    ],
    "* has another * vocabulary": ["generate other --path model.ct2 --backend ctranslate2"],
    "--prefix-size: a reference": [
        "generate bin --path model.ct2 --backend ctranslate2 --prefix-size 9 --num-workers 0"
    ],
    # fairseq-score and fairseq-average
    "--ref FILE": ["score --sys good.xx"],
    "--sacrebleu goes": [
        f"score --sys good.xx --ref good.yy --sacrebleu {flag}" for flag in ("-o 3", "--sentence-bleu")
    ],
    "* has * lines, * has *; they": ["score --sys short.yy --ref short.xx"],
    "*: line * is not UTF-8": ["score --sys latin.xx --ref latin.yy"],
    "--output FILE": ["average --inputs toy.pt"],
    "--num-epoch-checkpoints and --num-update-checkpoints contradict": [
        f"{AVERAGE} --inputs bin --num-epoch-checkpoints 1 --num-update-checkpoints 1"
    ],
    "--num-epoch-checkpoints and --num-update-checkpoints take": [
        f"{AVERAGE} --inputs toy.pt --num-epoch-checkpoints 1"
    ],
    "--checkpoint-upper-bound": [f"{AVERAGE} --inputs toy.pt --checkpoint-upper-bound 3"],
    "--inputs is a directory": [f"{AVERAGE} --inputs bin"],
    "--inputs *: no such": [f"{AVERAGE} --inputs nowhere --num-epoch-checkpoints 2"],
    "*: * files *, and": [f"{AVERAGE} --inputs bin --num-update-checkpoints 2 --checkpoint-upper-bound 9"],
    "* has parameter": [f"{AVERAGE} --inputs toy.pt tiny.pt"],
    "*: * is *, and": [f"{AVERAGE} --inputs toy.pt wide.pt"],
    # fairseq-export
    "--output DIR": ["export toy.pt"],
    "--output *: is the": ["export toy.pt --output toy.pt"],
    "*: is there already": ["export toy.pt --data bin --output bin --format huggingface"],
    "--* does nothing with --format": [EXPORT, "export toy.pt --output out --quantization int8"],
    "--* does nothing without --bpe": [f"export toy.pt {HUGGINGFACE} --bpe-codes good.xx"],
    "init type * cannot be folded": ["export pre_ln.pt --output out --fold"],
    "cannot fold": ["export omega_zero.pt --output out --fold"],
    "--format * needs an ordinary": [f"export rezero.pt {HUGGINGFACE}"],
    "no dict": ["export toy.pt --data json --output out --format huggingface"],
    "* entries of the": ["export toy.pt --data overwritten --output out --format huggingface"],
    "CTranslate2 has no": [f"export linear.pt {HUGGINGFACE} --format ctranslate2"],
    "--format huggingface has no": [f"export toy.pt {HUGGINGFACE} --quantization int8"],
    "transformers has no architecture whose": [f"export half_pre_ln.pt {HUGGINGFACE}"],
    "transformers has no architecture for": [f"export narrow_decoder.pt {HUGGINGFACE}"],
    "transformers' architecture": [f"export pre_ln.pt {HUGGINGFACE}"],
    "the exported model": ["export nan.pt --output out --fold"],
    # fairseq-clinic
    "--out-dir *": ["clinic omega omega.deep --out-dir good.xx/out"],
    "--name": ["clinic omega omega.deep --name a/b", f"{DEPENDENCY} --name ../b"],
    "--* does nothing with --path": [f"{DEPENDENCY} --path toy.pt --models pre-ln"],
    "--models: unknown": [f"{DEPENDENCY} --models nope", "clinic stability bin --cpu --out-dir out --models nope"],
    "two of the models": [f"{DEPENDENCY} --path toy.pt:toy.pt"],
    "--depths": [f"clinic stability bin --cpu --out-dir out --depths {depths}" for depths in ("6,12", "6,7,8")],
    "fairseq-clinic check": ["clinic check bin --cpu --train-subset test --batch-size 4"],
    "checkpoint *: no omega": ["clinic omega toy.pt --out-dir out"],
    "checkpoint *: * is empty": ["clinic omega omega_empty.pt --out-dir out"],
    "*: no results": ["clinic report --out-dir bin"],
    "*: not a result": ["clinic report --out-dir json"],
    "*: a damaged result": ["clinic report --out-dir damaged_result"],
    # scripts/prepare_corpus.py
    "* has * lines, * has more": ["prepare_corpus clean short.xx short.yy out.xx out.yy"],
    "*, line *: a <seg>": ["prepare_corpus segments segments out"],
    "*, line *: not two texts": [
        "prepare_corpus split-pairs good.xx out-train out-valid out-test --left xx --right yy --every 5"
    ],
    "*: no text to learn": ["prepare_corpus learn-bpe --merges 3 --codes out empty.xx"],
    "*, line *: not a BPE merge": ["prepare_corpus apply-bpe --codes long good.xx out"],
    # from Python alone
    "'*' is no setting": ["python load('toy.pt').generate(['a'], beem=3)"],
    "translate: '*'": ["python load('toy.pt').translate('a', nbest=3)"],
    "--tokenizer *": ["python load('toy.pt', tokenizer='nope')"],
    "--bpe *": ["python load('toy.pt', bpe='nope')"],
    "--scoring": ["python Scorer('nope')"],
    "--order": ["python Scorer(order=0)"],
    "no limit": ["python plan_batches(np.ones(3), None, np.arange(3), BatchLimits())"],
    "* checkpoints to average": ["python last_checkpoints('bin', 0)"],
    "no checkpoints": ["python average_checkpoints([])"],
    "this model has no omega": ["python profile(load_model('toy.pt'), {})"],
}

# What takes more than a command line in a directory: a process that is killed, a limit, a stand-in -> the test that
# causes it, by real command lines
ELSEWHERE = {
    "a worker process died": "test_error_processes.py::test_a_worker_that_is_killed",
    "a reading process died": "test_error_processes.py::test_a_reading_process_that_is_killed",
    "* '*' has a flag": "test_own_rules.py::test_a_flag_that_is_there_already",
    "checkpoint * was trained with --init-type": "test_own_rules.py::test_resuming_with_another_init_type",
    "checkpoint *: '*' is no": "test_own_rules.py::test_a_checkpoint_with_a_value_that_the_flag_refuses",
    "checkpoint *: no permission": "test_error_processes.py::test_a_checkpoint_that_may_not_be_read",
    "--save-dir *: another": "test_faults.py::test_two_trainings_in_one_directory",
    "--wandb-project *": "test_error_processes.py::test_weights_and_biases_refuses",
    "out of memory": "test_out_of_memory.py::test_memory_that_is_really_not_there",
    "*out of memory*, and": "test_out_of_memory.py::test_what_several_processes_cannot_survive_ends_them",
    "*out of memory*, the": "test_out_of_memory.py::test_memory_that_is_really_not_there",
    "process * cannot meet": "test_error_processes.py::test_the_port_of_the_meeting_is_taken",
    "process * has no GPU": "test_error_processes.py::test_more_processes_than_gpus",
    "--distributed-world-size": "test_error_processes.py::test_more_processes_than_gpus",
    "process * of * has a model": "test_error_processes.py::test_processes_with_different_models",
    "process * of * was ended": "test_distributed.py::test_one_failing_process_ends_all_with_one_line",
    "process * of * ended with": "test_distributed.py::test_one_failing_process_ends_all_with_one_line",
    "process * of * failed": "test_distributed.py::test_one_failing_process_ends_all_with_one_line",
    "process * of * has lost": "test_distributed.py::test_a_process_that_loses_the_others",
    "process * of * on * has given": "test_heartbeat.py::test_a_stopped_process",
    "process * of * on * has waited": "test_heartbeat.py::test_a_reader_that_hangs",
    "no answer for": "test_heartbeat.py::test_a_cut_cable",
    "*: the stream": "test_error_processes.py::test_a_rule_of_the_user_that_has_no_dependency",
    "* cannot be profiled": "test_own_rules.py::test_a_variant_without_its_norm_cannot_be_profiled",
    "generate takes text": "test_hub.py::test_step_by_step",
}

# What no command line causes here -> why, and the test that causes it from within if there is one
UNCAUSED = {
    "LOGLEVEL=* in": "needs another environment; tests/test_logging.py",
    "*: CTranslate2 cannot load": "its files are checked before; tests/test_export_formats.py",
    "*: CTranslate2 cannot translate": "its files are checked before",
    "the fp16 loss scale": "needs a GPU; tests/test_precision.py",
    "the tokenizer reads": "needs a faulty tokenizer; tests/test_export_tokenizers.py",
    "--ddp-backend": "needs an older torch; tests/test_sharding.py",
}


def write_material(root: Path) -> None:
    """Good and bad files of all kinds."""
    _write_texts(root)
    _write_databins(root)
    _write_checkpoints(root)
    for name, code in (
        ("user_broken", "import nothing_of_this_name"),
        ("user_twice", "from fairseq.registry import OPTIMIZERS\nOPTIMIZERS.add('adam', None)"),
        ("user_undecorated", "from fairseq.registry import OPTIMIZERS\nOPTIMIZERS.add('undecorated', None, object)"),
    ):
        (root / name).mkdir()
        (root / name / "__init__.py").write_text(code + "\n")


def _write_texts(root: Path) -> None:
    texts = {
        "good": (b"a b\nc\n", b"a\nb c\n"),
        "short": (b"a\nb\n", b"a\n"),
        "latin": (b"a\n\xe4\xf6\n", b"a\nb\n"),
        "binary": (bytes(range(256)), b"\xff" + bytes(range(256))),
        "empty": (b"", b""),
        "bom": (b"\xef\xbb\xbfa 1\n", b"a\n"),
    }
    for name, (source, target) in texts.items():
        (root / f"{name}.xx").write_bytes(source)
        (root / f"{name}.yy").write_bytes(target)
    (root / "twice").write_bytes(b"a 2\r\nb 1\r\na 1\r\n")
    (root / "long").write_bytes(b"a" * 100_000)
    (root / "latin_dictionary").write_bytes(b"a 1\n\xe4 1\n")
    (root / "segments").write_text("<seg> one\nline more </seg>\n")
    omega = {
        "deep": "".join(f"{i} 1.0\n" for i in [*range(1, 5), *range(1, 7)]),
        "half": "1 1.0\n2 1.0\n",
        "order": "1 1.0\n3 1.0\n",
        "negative": "1 -1.0\n",
        "wide": "# model: encoder_embed_dim=1024\n1 1.0\n2 1.0\n1 1.0\n2 1.0\n3 1.0\n",
        "large": "\n" * (2**24 + 1),
    }
    for name, text in omega.items():
        (root / f"omega.{name}").write_text(text)
    results = {
        "json/other.json": "[" * 100_000,
        "damaged_result/omega.json": '{"kind": "omega", "data": {"models": 3}}',
    }
    for name, text in results.items():
        (root / name).parent.mkdir()
        (root / name).write_text(text)
    (root / "json_is_directory" / "omega.json").mkdir(parents=True)


def _write_databins(root: Path) -> None:
    write_toy_databin(root / "bin")
    write_toy_databin(root / "one_side", only_source=True)
    write_toy_databin(root / "no_sentence", count=0)
    write_toy_databin(root / "uneven", count=12)
    for side in ("idx", "bin"):
        shutil.copy(root / f"bin/test.xx-yy.yy.{side}", root / "uneven")
    shutil.copytree(root / "bin", root / "half_bin")
    (root / "half_bin/test.xx-yy.xx.bin").unlink()
    shutil.copytree(root / "bin", root / "half_of_two")
    for side in ("idx", "bin"):
        shutil.copy(root / f"bin/test.xx-yy.xx.{side}", root / f"half_of_two/test1.xx-yy.xx.{side}")
    index, data = "test.xx-yy.xx.idx", "test.xx-yy.xx.bin"
    whole = (root / "bin" / index).read_bytes()
    content = (root / "bin" / data).read_bytes()
    for name, file, changed in (
        ("cut_index", index, whole[:-4]),
        ("short_index", index, whole[:20]),
        ("bad_index", index, whole[:26] + b"\xff\xff\xff\xff" + whole[30:]),
        ("no_index", index, b"TNTIDX\0\0" + whole),
        ("later", index, whole[:9] + b"\2" + whole[10:]),
        ("cut_data", data, content[:-2]),
        ("bad_ids", data, b"\xff\xff" + content[2:]),
    ):
        shutil.copytree(root / "bin", root / name)
        (root / name / file).write_bytes(changed)
    words = (root / "bin/dict.xx.txt").read_text().splitlines()
    for name, lines in (("other", [*words, "another 1"]), ("overwritten", [*words[:-1], "a 1 #fairseq:overwrite"])):
        shutil.copytree(root / "bin", root / name)
        (root / name / "dict.xx.txt").write_text("\n".join(lines) + "\n")
    shutil.copytree(root / "bin", root / "unfinished")
    (root / "unfinished/.publishing").mkdir()


def _write_checkpoints(root: Path) -> None:
    toy = toy_model()
    write_toy_checkpoint(toy, root / "toy.pt")
    diverged = toy_model()
    diverged.encoder.layers[1].feed_forward.fc1.bias.data[3] = float("nan")
    write_toy_checkpoint(diverged, root / "nan.pt")
    (root / "saved").mkdir()
    shutil.copy(root / "toy.pt", root / "saved/checkpoint_last.pt")
    (root / "cut.pt").write_bytes((root / "toy.pt").read_bytes()[:5000])
    torch.save(torch.ones(3), root / "tensor.pt")
    state: dict[str, Any] = torch.load(root / "toy.pt", weights_only=False)
    omega = "encoder.layers.0.self_attn_residual.omega"

    def save(name: str, change: Callable[[dict[str, Any]], object], settings: dict[str, Any] | None = None) -> None:
        args = Namespace(**vars(state["args"]) | (settings or {}))
        changed = state | {"args": args, "model": dict(state["model"])}
        change(changed)
        torch.save(changed, root / f"{name}.pt")

    save("no_tensor", lambda s: s["model"].update(version=3))
    save("no_settings", lambda s: s.pop("args"))
    save("other_model", lambda s: s.update(model={"weight": torch.ones(3)}))
    save("fused", lambda s: s["model"].update({"encoder.layers.0.self_attn.in_proj_weight": torch.ones(4, 2)}))
    save("one_token", lambda s: s["model"].update({"decoder.embed_tokens.weight": torch.ones(1, 16)}))
    save("omega_empty", lambda s: s["model"].update({omega: torch.ones(0)}))
    save("adaptive_softmax", lambda s: None, {"adaptive_softmax_cutoff": "100,200"})
    save("cross_self_attention", lambda s: None, {"cross_self_attention": True})

    shape: dict[str, Any] = {
        "encoder_layers": 1, "encoder_embed_dim": 16, "encoder_ffn_embed_dim": 24, "encoder_attention_heads": 2,
        "decoder_layers": 1, "decoder_attention_heads": 2,
    }  # fmt: skip
    models = {
        "tiny": {},
        "rezero": {"init_type": "rezero"},
        "linear": {"activation_fn": "linear"},
        "pre_ln": {"encoder_normalize_before": True, "decoder_normalize_before": True},
        "half_pre_ln": {"encoder_normalize_before": True},
        "narrow_decoder": {"decoder_embed_dim": 8},
        "omega_zero": {"init_type": "adaptive"},
    }
    for name, settings in models.items():
        model = Transformer(TransformerConfig(**(shape | settings)), VOCAB, VOCAB)
        if name == "omega_zero":
            torch.nn.init.zeros_(model.get_parameter(omega))
        write_toy_checkpoint(model, root / f"{name}.pt")
    write_toy_checkpoint(Transformer(toy.cfg, VOCAB + 8, VOCAB), root / "wide.pt")
    tiny: dict[str, Any] = torch.load(root / "tiny.pt", weights_only=False)
    for name, optimizer in (("tiny_nag", "nag"), ("tiny_other", "adam")):
        history = [{"optimizer_name": optimizer, "num_updates": 3}]
        torch.save(tiny | {"optimizer_history": history, "last_optimizer_state": 3}, root / f"{name}.pt")
    (root / "damaged_last").mkdir()
    shutil.copy(root / "cut.pt", root / "damaged_last/checkpoint_last.pt")
    shutil.copy(root / "tiny_other.pt", root / "damaged_last/checkpoint1.pt")
