#!/usr/bin/env bash
# WMT'14 English-German: prepare, profile, train, average, translate, score (wmt14_en-de.md).
# 6L-6L by default; --layers 12 and --layers 18 for the deep models.

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SOURCE=en TARGET=de BEAM=4 LENPEN=0.6 TESTS=(test)
ENCODER_LAYERS=${ENCODER_LAYERS:-6} DECODER_LAYERS=${DECODER_LAYERS:-6}
EPOCHS=${EPOCHS:-100} MAX_TOKENS=${MAX_TOKENS:-8192} BATCHES=${BATCHES:-4}
parse_arguments "$@"
prepare prepare_wmt14_en-de.sh
PLAIN_REFERENCE=$OUT/text/test.raw.de

TRAIN=(--arch transformer_wmt_en_de --share-all-embeddings
    --dropout 0.1 --attention-dropout 0.1 --activation-dropout 0.1
    --optimizer radam --adam-betas '(0.9, 0.98)' --weight-decay 0 --clip-norm 0
    --lr 1e-3 --lr-scheduler inverse_sqrt --warmup-init-lr 1e-7 --warmup-updates 8000
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1)
run_recipe
