#!/usr/bin/env bash
# Makes the clinic's figures in img/ again: layer dependency before and after training, output change, gradients, omega.
#
# Generates the demo's English-German corpus, trains Post-LN, Pre-LN and Admin with 6 and with 18 layers on it (64
# dimensions, 500 updates; on 2 CPU cores about half an hour), and measures them with fairseq-clinic.
#
#   scripts/make_figures.sh [--out DIR]
#
#   --out DIR  where everything goes (figures-out in the repository); trainings that have finished there are not repeated
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=''
while (($#)); do
  case $1 in
    --out) out=${2:?--out needs a directory}; shift ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;;
    *) echo "error: $1: unknown option; see scripts/make_figures.sh --help" >&2; exit 2 ;;
  esac
  shift
done
source "$here/setup.sh"
mkdir -p "${out:=$root/figures-out}"
out=$(cd "$out" && pwd)
img=$root/img
say() { printf '\n== %s\n' "$*"; }

if [ ! -f "$out/data-bin/dict.de.txt" ]; then
  say "corpus"
  python "$root/nmt-experiments/demo/make_corpus.py" "$out/corpus" --seed 1 --train 20000 --sentencepiece 2000
  fairseq-preprocess -s en -t de --joined-dictionary --destdir "$out/data-bin" \
    --trainpref "$out/corpus/train.sp" --validpref "$out/corpus/valid.sp" --testpref "$out/corpus/test.sp"
fi

shape=(--encoder-embed-dim 64 --encoder-ffn-embed-dim 128 --encoder-attention-heads 4 --decoder-attention-heads 4
  --share-all-embeddings)
export OMP_NUM_THREADS=1 # two trainings at a time, a thread each
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

# train NAME LAYERS FLAG...
train() {
  local name=$1 layers=$2
  shift 2
  if [ -f "$out/$name/done" ]; then return; fi
  say "training $name, log in $out/$name/train.log"
  mkdir -p "$out/$name"
  fairseq-train "$out/data-bin" --arch transformer --encoder-layers "$layers" --decoder-layers "$layers" \
    "${shape[@]}" --dropout 0 --optimizer adam --adam-betas '(0.9, 0.98)' \
    --lr 3e-3 --lr-scheduler inverse_sqrt --warmup-updates 150 \
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --max-tokens 1024 --max-update 500 \
    --validate-interval-updates 250 --no-epoch-checkpoints --log-interval 20 --seed 1 --cpu \
    --save-dir "$out/$name" --log-file "$out/$name/train.log" --log-format none "$@"
  touch "$out/$name/done"
}

pre_ln=(--encoder-normalize-before --decoder-normalize-before)
for layers in 18 6; do
  train "postln-$layers" "$layers" &
  train "preln-$layers" "$layers" "${pre_ln[@]}" &
  wait -n
  train "admin-$layers" "$layers" --init-type adaptive --omega-file "$out/admin-$layers/profile.ratio.init" &
  wait
done
for run in {postln,preln,admin}-{6,18}; do
  [ -f "$out/$run/done" ] || { echo "error: the training $run failed, see $out/$run/train.log" >&2; exit 1; }
done

clinic=$out/clinic
for layers in 6 18; do
  say "layer dependency, $layers layers"
  fairseq-clinic dependency "$out/data-bin" --cpu --out-dir "$clinic" --name "dependency-$layers" --path \
    "Post-LN=$out/postln-$layers/checkpoint_last.pt:Pre-LN=$out/preln-$layers/checkpoint_last.pt:Admin=$out/admin-$layers/checkpoint_last.pt"
done
say "output change"
fairseq-clinic stability "$out/data-bin" --cpu "${shape[@]}" --encoder-embed-dim 128 --encoder-ffn-embed-dim 256 \
  --out-dir "$clinic" --seeds 1,2,3,4,5,6,7,8
say "gradients"
fairseq-clinic gradients "$out/data-bin" --cpu "${shape[@]}" --out-dir "$clinic" \
  --encoder-layers 18 --decoder-layers 18 --models post-ln,pre-ln,adaptive,deepnet
say "omega"
fairseq-clinic omega "6L-6L=$out/admin-6/checkpoint_last.pt" "18L-18L=$out/admin-18/checkpoint_last.pt" --out-dir "$clinic"
fairseq-clinic report --out-dir "$clinic"
cp "$clinic"/*.png "$img/"
say "figures in $img, report in $clinic/report.html"
