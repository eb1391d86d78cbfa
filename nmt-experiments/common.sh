# What the recipes share; to be sourced. A recipe sets its defaults, calls parse_arguments "$@" and prepare, fills the
# array TRAIN with fairseq-train's flags, and calls run_recipe.
# shellcheck shell=bash
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
NAME=$(basename "$0" .sh)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    if [[ -x $ROOT/.venv/bin/python ]]; then PYTHON=$ROOT/.venv/bin/python; fi
fi
WORKERS=${WORKERS:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)}

say() { printf '== %s\n' "$*"; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}
misused() { # wrong arguments: status 2, as argparse
    printf 'error: %s; see %s --help\n' "$*" "$0" >&2
    exit 2
}

# fairseq train ...: the console command fairseq-train where it is installed, else the module.
fairseq() {
    local name=$1
    shift
    if command -v "fairseq-$name" >/dev/null; then "fairseq-$name" "$@"; else "$PYTHON" -m "fairseq.cli.$name" "$@"; fi
}

corpus() { "$PYTHON" "$ROOT/scripts/prepare_corpus.py" "$@"; }
parallel_corpus() { corpus "$@" --workers "$WORKERS"; } # apart, so that another number of processes repeats no step
if [[ ! -t 2 ]]; then export TQDM_MININTERVAL=30; fi # no endless progress lines in a log file

# once MARKER COMMAND...: runs COMMAND unless MARKER holds it as finished; a step that runs makes the later ones run too.
RERUN=''
once() {
    local marker=$1
    shift
    if [[ -z $RERUN && -f $marker && $(<"$marker") == "$*" ]]; then
        say "done before: ${marker#"$OUT"/}"
        return
    fi
    RERUN=1
    say "$*"
    "$@"
    mkdir -p "$(dirname "$marker")"
    printf '%s\n' "$*" >"$marker.part"
    mv "$marker.part" "$marker"
}

# The comment at the top of the script, then the options below.
usage() {
    awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
    cat <<END

Options, with defaults (those marked * also as environment variables, MAX_TOKENS=2048 for instance):
* --model NAME                 which Transformer to train ($MODEL): postln, preln, admin, closed-form, rezero,
                               rezero_postln, looklinear, deepnet, subln or b2t
  --data DIR                   already downloaded files; then nothing is downloaded
  --out DIR                    data, checkpoints and results ($OUT)
  --run NAME                   directory of this run in it (MODEL-6L-6L, by the numbers of layers)
* --epochs N                   training epochs ($EPOCHS)
* --max-tokens N               tokens in a batch on one GPU ($MAX_TOKENS)
* --batches N                  such batches in an update, all GPUs together ($BATCHES)
  --layers N                   encoder and decoder layers
* --encoder-layers N           encoder layers ($ENCODER_LAYERS)
* --decoder-layers N           decoder layers ($DECODER_LAYERS)
* --seed N                     random seed ($SEED)
* --workers N                  processes that prepare the data ($WORKERS)
  --prepare-only               stop when the data is binarised
  -- FLAGS                     further flags for fairseq-train, in profiling too
Finished steps are skipped; training goes on from its last checkpoint.
END
}

parse_arguments() {
    MODEL=${MODEL:-admin} SEED=${SEED:-1} DATA='' OUT=$ROOT/runs/$NAME RUN='' PREPARE_ONLY=''
    EXTRA=()
    while (($#)); do
        case $1 in
            -h | --help) usage && exit ;;
            --prepare-only) PREPARE_ONLY=1 && shift && continue ;;
            --) shift && EXTRA=("$@") && break ;;
        esac
        (($# > 1)) || misused "$1: an unknown option, or one without its value"
        case $1 in
            --model) MODEL=$2 ;;
            --data) DATA=$2 ;;
            --out) OUT=$2 ;;
            --epochs) EPOCHS=$2 ;;
            --max-tokens) MAX_TOKENS=$2 ;;
            --batches) BATCHES=$2 ;;
            --layers) ENCODER_LAYERS=$2 DECODER_LAYERS=$2 ;;
            --encoder-layers) ENCODER_LAYERS=$2 ;;
            --decoder-layers) DECODER_LAYERS=$2 ;;
            --seed) SEED=$2 ;;
            --run) RUN=$2 ;;
            --workers) WORKERS=$2 ;;
            *) misused "$1: unknown option" ;;
        esac
        shift 2
    done
    case $MODEL in
        postln) INIT=(--init-type default) ;;
        preln) INIT=(--init-type default --encoder-normalize-before --decoder-normalize-before) ;;
        admin) INIT=(--init-type adaptive) ;;
        closed-form) INIT=(--init-type adaptive-closed-form) ;;
        rezero | rezero_postln | looklinear | deepnet | subln | b2t) INIT=(--init-type "$MODEL") ;;
        *) misused "--model $MODEL: unknown" ;;
    esac
    mkdir -p "$OUT"
    OUT=$(cd "$OUT" && pwd)
    BIN=$OUT/data-bin
    RUN=$OUT/${RUN:-$MODEL-${ENCODER_LAYERS}L-${DECODER_LAYERS}L}
}

# prepare SCRIPT: has the data prepared by the script, into $OUT.
prepare() {
    bash "$ROOT/scripts/$1" ${DATA:+--data "$DATA"} --out "$OUT" --workers "$WORKERS"
    if [[ -n $PREPARE_ONLY ]]; then exit; fi
}

# Sets GPUS, their number, and PRECISION: --bf16 on a GPU that has it, --fp16 on an older one, nothing on the CPU.
find_gpus() {
    local found
    found=$("$PYTHON" -c '
import torch
gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(gpus, "" if not gpus else "--bf16" if torch.cuda.get_device_capability() >= (8, 0) else "--fp16")')
    GPUS=${found%% *}
    PRECISION=${PRECISION-${found#* }}
    say "$GPUS GPU(s) ${PRECISION:+with $PRECISION}"
}

# generate_to FILE SUBSET: translates SUBSET with the averaged model; the last line of FILE is BLEU.
generate_to() {
    # shellcheck disable=SC2086  # PRECISION is one flag or none
    fairseq generate "$BIN" -s "$SOURCE" -t "$TARGET" --path "$RUN/averaged.pt" --gen-subset "$2" --beam "$BEAM" \
        --lenpen "$LENPEN" --batch-size 128 --post-process subword_nmt --scoring bleu $PRECISION >"$1.part"
    mv "$1.part" "$1"
}

# score_plain_text GENERATED REFERENCE: sacrebleu of the detokenised hypotheses against raw text.
score_plain_text() {
    grep '^H-' "$1" | LC_ALL=C sort -t- -k2n | cut -f3 >"$RUN/hypotheses.tok"
    corpus detokenize -l "$TARGET" "$RUN/hypotheses.tok" "$RUN/hypotheses.txt"
    fairseq score --sys "$RUN/hypotheses.txt" --ref "$2" --sacrebleu >"$RUN/sacrebleu.part"
    mv "$RUN/sacrebleu.part" "$RUN/sacrebleu.txt"
}

average() {
    local count
    count=$(find "$RUN" -maxdepth 1 -name 'checkpoint[0-9]*.pt' ! -name '*_*' | wc -l)
    fairseq average --inputs "$RUN" --num-epoch-checkpoints $((count < 10 ? count : 10)) --output "$RUN/averaged.pt"
}

# Profile (Admin only), train, average the last 10 epochs, translate every test set, score.
run_recipe() {
    local subset common
    mkdir -p "$RUN"
    find_gpus
    # The published batch, whatever the number of GPUs: what they do not do at once they do in turns.
    local update_freq=$(((BATCHES + (GPUS > 0 ? GPUS : 1) - 1) / (GPUS > 0 ? GPUS : 1)))
    common=("$BIN" -s "$SOURCE" -t "$TARGET" "${TRAIN[@]}" --encoder-layers "$ENCODER_LAYERS"
        --decoder-layers "$DECODER_LAYERS" --max-tokens "$MAX_TOKENS" --update-freq "$update_freq"
        --max-epoch "$EPOCHS" --seed "$SEED" ${EXTRA[@]+"${EXTRA[@]}"})
    if [[ $MODEL == admin ]]; then
        INIT+=(--omega-file "$RUN/profile.ratio.init")
        once "$RUN/.done/profile" fairseq train "${common[@]}" --init-type adaptive-profiling \
            --omega-file "$RUN/profile.ratio.init" --save-dir "$RUN/profile" --no-save
    fi
    # shellcheck disable=SC2086
    once "$RUN/.done/train" fairseq train "${common[@]}" "${INIT[@]}" --save-dir "$RUN" --keep-last-epochs 10 $PRECISION
    once "$RUN/.done/average" average
    for subset in "${TESTS[@]}"; do
        once "$RUN/.done/$subset" generate_to "$RUN/generate-$subset.txt" "$subset"
    done
    if [[ -n ${PLAIN_REFERENCE:-} ]]; then
        once "$RUN/.done/sacrebleu" score_plain_text "$RUN/generate-test.txt" "$PLAIN_REFERENCE"
    fi
    say "results of ${RUN##*/}"
    for subset in "${TESTS[@]}"; do tail -n 1 "$RUN/generate-$subset.txt"; done
    if [[ -n ${PLAIN_REFERENCE:-} ]]; then cat "$RUN/sacrebleu.txt"; fi
}
