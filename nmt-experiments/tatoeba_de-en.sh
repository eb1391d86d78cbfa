#!/usr/bin/env bash
# Tatoeba German-English, deep: the same 18L-18L Transformer with every init type (tatoeba_de-en.md).

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SOURCE=de TARGET=en BEAM=5 LENPEN=1 TESTS=(test)
ENCODER_LAYERS=${ENCODER_LAYERS:-18} DECODER_LAYERS=${DECODER_LAYERS:-18}
EPOCHS=${EPOCHS:-20} MAX_TOKENS=${MAX_TOKENS:-4096} BATCHES=${BATCHES:-1}
parse_arguments "$@"
prepare prepare_tatoeba.sh

TRAIN=(--arch transformer_iwslt_de_en --share-all-embeddings
    --dropout 0.1 --attention-dropout 0.1 --activation-dropout 0.1
    --optimizer radam --adam-betas '(0.9, 0.98)' --weight-decay 1e-4 --clip-norm 0
    --lr 1e-3 --lr-scheduler inverse_sqrt --warmup-init-lr 1e-7 --warmup-updates 4000
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1)
run_recipe
