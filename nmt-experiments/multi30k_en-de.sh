#!/usr/bin/env bash
# Multi30k English-German with Transformer-Tiny: prepare, profile, train, average, translate, score (multi30k_en-de.md).

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SOURCE=en TARGET=de BEAM=5 LENPEN=1 TESTS=(test test1 test2)
ENCODER_LAYERS=${ENCODER_LAYERS:-4} DECODER_LAYERS=${DECODER_LAYERS:-4}
EPOCHS=${EPOCHS:-90} MAX_TOKENS=${MAX_TOKENS:-4096} BATCHES=${BATCHES:-1}
parse_arguments "$@"
prepare prepare_multi30k.sh

TRAIN=(--arch transformer_tiny --share-all-embeddings --dropout 0.3
    --optimizer adam --adam-betas '(0.9, 0.98)' --weight-decay 0 --clip-norm 0
    --lr 0.005 --lr-scheduler inverse_sqrt --warmup-init-lr 1e-7 --warmup-updates 2000
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1)
run_recipe
