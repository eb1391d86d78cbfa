#!/usr/bin/env bash
# Prepares the German-English sentence pairs of Tatoeba (deu-eng.zip of manythings.org/anki): tokenised, lower-cased,
# joint BPE of 10,000 merges. Many English sentences come with several translations, so validation and test sets hold
# out distinct English sentences, 1 in 100 each, with all their translations.

# shellcheck source=prepare_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/prepare_common.sh"

NAME=tatoeba_de-en SOURCE=de TARGET=en
URL=https://www.manythings.org/anki/deu-eng.zip
parse_prepare_arguments "$@"

need "$URL" deu.txt
once "$TEXT/.done/split" corpus split-pairs --left en --right de --every 100 "$(input deu.txt)" \
    "$TEXT/raw.train" "$TEXT/raw.valid" "$TEXT/raw.test"
for part in train valid test; do
    for language in de en; do
        once "$TEXT/.done/$part.$language" parallel_corpus tokenize -l "$language" --lowercase \
            "$TEXT/raw.$part.$language" "$TEXT/$part.$language"
    done
    same_length "$TEXT/$part.de" "$TEXT/$part.en"
done
learn_bpe 10000
apply_bpe train valid test
binarize bpe.train bpe.valid bpe.test
