#!/usr/bin/env bash
# WMT'14 English-French: prepare, profile, train, average, translate, score (wmt14_en-fr.md).
# 6L-6L by default; --encoder-layers 60 --decoder-layers 12 for the very deep model, which has other batches:
# 256 of 5,000 tokens an update instead of 80 of 8,000, unless they are given.

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SOURCE=en TARGET=fr BEAM=5 LENPEN=0.8 TESTS=(test)
ENCODER_LAYERS=${ENCODER_LAYERS:-6} DECODER_LAYERS=${DECODER_LAYERS:-6}
EPOCHS=${EPOCHS:-50} MAX_TOKENS=${MAX_TOKENS:-by depth} BATCHES=${BATCHES:-by depth}
parse_arguments "$@"
deep=$((ENCODER_LAYERS > 18))
if [[ $MAX_TOKENS == by* ]]; then MAX_TOKENS=$((deep ? 5000 : 8000)); fi
if [[ $BATCHES == by* ]]; then BATCHES=$((deep ? 256 : 80)); fi
prepare prepare_wmt14_en-fr.sh
PLAIN_REFERENCE=$OUT/text/test.raw.fr

TRAIN=(--arch transformer_wmt_en_de --share-all-embeddings
    --dropout 0.1 --attention-dropout 0.1 --activation-dropout 0.1
    --optimizer radam --adam-betas '(0.9, 0.98)' --weight-decay 0 --clip-norm 0
    --lr 7e-4 --lr-scheduler inverse_sqrt --warmup-init-lr 1e-7 --warmup-updates 8000
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1)
run_recipe
