#!/usr/bin/env bash
# Prepares IWSLT'14 German-English as the widely used recipe does: TED talks, tokenised, cleaned (1 to 175 words, length
# ratio 1.5), lower-cased, every 23rd pair held out for validation, joint BPE of 10,000 merges. The test set is dev2010,
# dev2012, tst2010, tst2011 and tst2012 together, or those of them that --data has.

# shellcheck source=prepare_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/prepare_common.sh"

NAME=iwslt14_de-en SOURCE=de TARGET=en
URL=https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz
parse_prepare_arguments "$@"

need "$URL" train.tags.de-en.de train.tags.de-en.en
sets=()
for part in dev2010 dev2012 tst2010 tst2011 tst2012; do
    if [[ -n $(input "IWSLT*.TED*.$part.de-en.de.xml") ]]; then sets+=("$part"); else say "no test set $part"; fi
done
((${#sets[@]})) || die "no test set (IWSLT*.TED*.de-en.de.xml) is in $DATA"

for language in de en; do
    once "$TEXT/.done/raw.$language" corpus talks "$(input "train.tags.de-en.$language")" "$TEXT/raw.$language"
    once "$TEXT/.done/tok.$language" parallel_corpus tokenize -l "$language" --lowercase \
        "$TEXT/raw.$language" "$TEXT/tok.$language"
    files=()
    for part in "${sets[@]}"; do
        xml=$(input "IWSLT*.TED*.$part.de-en.$language.xml")
        [[ -n $xml ]] || die "$part is there in German, but not in English"
        once "$TEXT/.done/$part.$language" corpus segments "$xml" "$TEXT/$part.$language"
        files+=("$TEXT/$part.$language")
    done
    once "$TEXT/.done/test.raw.$language" concatenate "$TEXT/test.raw.$language" "${files[@]}"
    once "$TEXT/.done/test.$language" parallel_corpus tokenize -l "$language" --lowercase \
        "$TEXT/test.raw.$language" "$TEXT/test.$language"
done
for part in tok "${sets[@]}"; do same_length "$TEXT/$part.de" "$TEXT/$part.en"; done
once "$TEXT/.done/clean" corpus clean --ratio 1.5 --max-words 175 "$TEXT/tok.de" "$TEXT/tok.en" \
    "$TEXT/clean.de" "$TEXT/clean.en"
for language in de en; do
    once "$TEXT/.done/split.$language" corpus split --every 23 "$TEXT/clean.$language" \
        "$TEXT/train.$language" "$TEXT/valid.$language"
done
learn_bpe 10000
apply_bpe train valid test
binarize bpe.train bpe.valid bpe.test
