# What the prepare_*.sh scripts share; to be sourced. A script sets NAME, SOURCE and TARGET, and calls
# parse_prepare_arguments "$@". Text goes to $OUT/text, the binarised data to $OUT/data-bin.
# shellcheck shell=bash
set -euo pipefail

# shellcheck source=../nmt-experiments/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../nmt-experiments/common.sh"

prepare_usage() {
    awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
    cat <<END

Options:
  --data DIR    already downloaded files or archives (anywhere below DIR); then nothing is downloaded
  --out DIR     where to put what is made: text/, data-bin/, downloads in orig/ ($ROOT/runs/$NAME)
  --workers N   processes ($WORKERS)
Finished steps are skipped.
END
}

parse_prepare_arguments() {
    DATA='' OUT=$ROOT/runs/$NAME
    while (($#)); do
        case $1 in
            -h | --help) prepare_usage && exit ;;
        esac
        (($# > 1)) || misused "$1: an unknown option, or one without its value"
        case $1 in
            --data) DATA=$2 ;;
            --out) OUT=$2 ;;
            --workers) WORKERS=$2 ;;
            *) misused "$1: unknown option" ;;
        esac
        shift 2
    done
    if [[ -n $DATA ]]; then
        [[ -d $DATA ]] || die "--data $DATA: no such directory"
        DATA=$(cd "$DATA" && pwd)
    fi
    mkdir -p "$OUT/text/.done" "$OUT/orig"
    OUT=$(cd "$OUT" && pwd)
    TEXT=$OUT/text
}

# input NAME...: path of the first of the files that is at hand; nothing if none is.
input() {
    local name found
    for name; do
        found=$(find -L ${DATA:+"$DATA"} "$OUT/orig" -type f -name "$name" -print 2>/dev/null | LC_ALL=C sort | head -n 1)
        if [[ -n $found ]]; then
            printf '%s\n' "$found"
            return
        fi
    done
}

# fetch URL: downloads to $OUT/orig, unless --data says that all is there.
fetch() {
    local file=$OUT/orig/${1##*/}
    [[ -z $DATA ]] || die "${1##*/} is not in $DATA; without --data it is downloaded from $1"
    say "downloading $1"
    if command -v curl >/dev/null; then
        curl --fail --location --retry 3 --output "$file.part" "$1"
    elif command -v wget >/dev/null; then
        wget --tries 3 --output-document "$file.part" "$1"
    else
        die "neither curl nor wget is installed; download $1 yourself and use --data"
    fi
    mv "$file.part" "$file"
}

# need URL FILE...: has the FILEs at hand, as they are, or from the archive that URL names, or by downloading that.
need() {
    local url=$1 file archive missing=''
    shift
    for file; do
        if [[ -z $(input "$file" "$file.gz") ]]; then missing=$file; fi
    done
    if [[ -z $missing ]]; then return; fi
    if [[ -z $(input "${url##*/}") ]]; then
        if [[ -n $DATA ]]; then die "neither $missing nor ${url##*/} is in $DATA"; fi
        fetch "$url"
    fi
    archive=$(input "${url##*/}")
    if [[ $missing != "${archive##*/}" ]]; then
        say "unpacking $archive"
        case $archive in
            *.zip) "$PYTHON" -m zipfile -e "$archive" "$OUT/orig" ;;
            *) tar -xf "$archive" -C "$OUT/orig" ;;
        esac
    fi
    for file; do
        if [[ -z $(input "$file" "$file.gz") ]]; then die "$archive holds no $file"; fi
    done
}

# concatenate OUTPUT FILE...: the files, compressed or not, one after the other.
concatenate() {
    local output=$1 file
    shift
    for file; do
        if [[ $file == *.gz ]]; then gzip -dc "$file"; else cat "$file"; fi
    done >"$output.part"
    mv "$output.part" "$output"
}

# same_length A B: stops if the two files do not have as many lines.
same_length() {
    local left right
    left=$(wc -l <"$1") right=$(wc -l <"$2")
    ((left == right)) || die "$1 has $((left)) lines, $2 has $((right)): they must be parallel"
}

# learn_bpe MERGES: joint BPE of both languages' training text, $TEXT/train.
learn_bpe() {
    once "$TEXT/.done/codes" corpus learn-bpe --merges "$1" --codes "$TEXT/codes" \
        "$TEXT/train.$SOURCE" "$TEXT/train.$TARGET"
}

# apply_bpe NAME...: $TEXT/NAME.LANG -> $TEXT/bpe.NAME.LANG.
apply_bpe() {
    local name language
    for name; do
        for language in "$SOURCE" "$TARGET"; do
            once "$TEXT/.done/bpe.$name.$language" parallel_corpus apply-bpe --codes "$TEXT/codes" \
                "$TEXT/$name.$language" "$TEXT/bpe.$name.$language"
        done
    done
}

preprocess() { fairseq preprocess "$@" --workers "$WORKERS"; }

# binarize TRAIN VALID TEST[,TEST...]: names of files in $TEXT -> $OUT/data-bin with one dictionary.
binarize() {
    once "$TEXT/.done/data-bin" preprocess -s "$SOURCE" -t "$TARGET" --trainpref "$TEXT/$1" \
        --validpref "$TEXT/$2" --testpref "$TEXT/${3//,/,$TEXT/}" --destdir "$OUT/data-bin" --joined-dictionary
    once "$TEXT/.done/bpe.codes" cp "$TEXT/codes" "$OUT/data-bin/bpe.codes"
}

# prepare_wmt14 PAIR MERGES EVERY TRAINING_FILE...: the known WMT'14 recipe for English to $TARGET. PAIR is as in the
# test set's name, EVERY the share held out for validation, TRAINING_FILE a name without the language.
prepare_wmt14() {
    local pair=$1 merges=$2 every=$3 language side name files
    shift 3
    for language in en "$TARGET"; do
        files=()
        for name; do files+=("$(input "$name.$language" "$name.$language.gz")"); done
        once "$TEXT/.done/raw.$language" concatenate "$TEXT/raw.$language" "${files[@]}"
        once "$TEXT/.done/tok.$language" parallel_corpus tokenize -l "$language" \
            --normalize-punctuation --remove-nonprinting --aggressive-hyphens \
            "$TEXT/raw.$language" "$TEXT/tok.$language"
        side=ref
        if [[ $language == en ]]; then side=src; fi
        once "$TEXT/.done/segments.$language" corpus segments "$(input "newstest2014-$pair-$side.$language.sgm")" \
            "$TEXT/test.raw.$language"
        once "$TEXT/.done/test.$language" parallel_corpus tokenize -l "$language" --aggressive-hyphens \
            "$TEXT/test.raw.$language" "$TEXT/test.$language"
        once "$TEXT/.done/split.$language" corpus split --every "$every" "$TEXT/tok.$language" \
            "$TEXT/train.$language" "$TEXT/valid.$language"
    done
    for name in tok test; do same_length "$TEXT/$name.en" "$TEXT/$name.$TARGET"; done
    learn_bpe "$merges"
    apply_bpe train valid test
    for name in train valid; do
        once "$TEXT/.done/clean.$name" corpus clean --ratio 1.5 --max-words 250 "$TEXT/bpe.$name.en" \
            "$TEXT/bpe.$name.$TARGET" "$TEXT/clean.$name.en" "$TEXT/clean.$name.$TARGET"
    done
    binarize clean.train clean.valid bpe.test
}
