#!/usr/bin/env bash
# Admin trains an 18-layer encoder and 18-layer decoder that plain Post-LN cannot: minutes on 2 CPU cores, offline.
#
# Makes .venv if it is missing, generates an English-German corpus, then runs the public commands: preprocess, train
# Post-LN, profile and train Admin with the same budget, seed and learning rate, average, generate, BLEU.
#
#   scripts/demo.sh [--quick] [--out DIR]
#
#   --quick    a shorter budget (under 2 minutes): the loss curves part, the translations are not good yet
#   --out DIR  where everything goes (demo-out in the repository); made anew each time
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
updates=500 tokens=1024 warmup=150 beam=5 saves=10 out=''
while (($#)); do
  case $1 in
    --quick) updates=150 tokens=512 warmup=75 beam=1 saves=5 ;;
    --out) out=${2:?--out needs a directory}; mkdir -p "$out"; out=$(cd "$out" && pwd); shift ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;;
    *) echo "error: $1: unknown option; see scripts/demo.sh --help" >&2; exit 2 ;;
  esac
  shift
done
source "$here/setup.sh"
out=${out:-$root/demo-out}
demo=$root/nmt-experiments/demo
say() { printf '\n== %s\n' "$*"; }
started=$SECONDS

say "corpus: language data of CLDR and num2words in a small grammar, 20,000 + 500 + 500 pairs"
rm -rf "$out/corpus" "$out/data-bin" "$out/postln" "$out/admin"
python "$demo/make_corpus.py" "$out/corpus" --seed 1 --train 20000 --sentencepiece 2000
paste -d '\n' <(head -n 2 "$out/corpus/test.en") <(head -n 2 "$out/corpus/test.de")

say "fairseq-preprocess"
fairseq-preprocess -s en -t de --joined-dictionary --destdir "$out/data-bin" \
  --trainpref "$out/corpus/train.sp" --validpref "$out/corpus/valid.sp" --testpref "$out/corpus/test.sp"

flags=("$out/data-bin" --arch transformer --encoder-layers 18 --decoder-layers 18
  --encoder-embed-dim 64 --encoder-ffn-embed-dim 128 --encoder-attention-heads 4 --decoder-attention-heads 4
  --share-all-embeddings --dropout 0 --optimizer adam --adam-betas '(0.9, 0.98)'
  --lr 3e-3 --lr-scheduler inverse_sqrt --warmup-updates "$warmup"
  --criterion label_smoothed_cross_entropy --label-smoothing 0.1
  --max-tokens "$tokens" --max-update "$updates" --log-interval 20 --seed 1 --cpu)
saving=(--save-interval-updates $((updates / saves)) --keep-interval-updates 3 --no-epoch-checkpoints)

export OMP_NUM_THREADS=1 # the two runs share two cores: a thread each
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

say "Post-LN, 18 + 18 layers: fairseq-train --init-type default (in the background, log in $out/postln/train.log)"
fairseq-train "${flags[@]}" "${saving[@]}" --init-type default \
  --save-dir "$out/postln" --log-file "$out/postln/train.log" --log-format none &
postln=$!

say "Admin, step 1: fairseq-train --init-type adaptive-profiling"
fairseq-train "${flags[@]}" --init-type adaptive-profiling --omega-file "$out/admin/profile.ratio.init"

say "Admin, step 2: fairseq-train --init-type adaptive"
fairseq-train "${flags[@]}" "${saving[@]}" --init-type adaptive --omega-file "$out/admin/profile.ratio.init" \
  --save-dir "$out/admin" --log-file "$out/admin/train.log"

say "waiting for Post-LN to finish the same number of updates"
wait "$postln"
grep ' valid ' "$out/postln/train.log"

for run in postln admin; do
  say "$run: fairseq-average of the last 3 checkpoints, fairseq-generate on the test set"
  fairseq-average --inputs "$out/$run" --num-update-checkpoints 3 --output "$out/$run/averaged.pt"
  fairseq-generate "$out/data-bin" --path "$out/$run/averaged.pt" --beam "$beam" --batch-size 64 --max-len-a 1.5 \
    --max-len-b 10 --remove-bpe sentencepiece --scoring sacrebleu --cpu > "$out/$run/generate.txt"
  grep -m 6 '^[STH]-' "$out/$run/generate.txt"
done

say "result, $((SECONDS - started)) seconds after installation"
python "$demo/summary.py" --out "$out/curves.png" "Post-LN=$out/postln" "Admin=$out/admin"
