#!/usr/bin/env bash
# Prepares Multi30k English-German (task 1): the tokenised, lower-cased text is split by joint BPE of 10,000 merges and
# binarised. Test sets: test is Flickr 2016, test1 Flickr 2017, test2 the ambiguous MSCOCO captions of 2017.

# shellcheck source=prepare_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/prepare_common.sh"

NAME=multi30k_en-de SOURCE=en TARGET=de
URL=https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/tok
parse_prepare_arguments "$@"

for part in train:train val:valid test_2016_flickr:test2016 test_2017_flickr:test2017 test_2017_mscoco:mscoco; do
    name=${part#*:}
    for language in en de; do
        file=${part%:*}.lc.norm.tok.$language
        need "$URL/$file" "$file"
        once "$TEXT/.done/$name.$language" concatenate "$TEXT/$name.$language" "$(input "$file")"
    done
    same_length "$TEXT/$name.en" "$TEXT/$name.de"
done
learn_bpe 10000
apply_bpe train valid test2016 test2017 mscoco
binarize bpe.train bpe.valid bpe.test2016,bpe.test2017,bpe.mscoco
