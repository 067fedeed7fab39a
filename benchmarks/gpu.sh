#!/usr/bin/env bash
# A day on a GPU in one command: the tests that need one, the engine, CIFAR-10 and Fashion-MNIST, each
# in pieces of a few minutes. Killed or stopped, the same command goes on. See pieces.sh for scale
# (full or smoke), runs, minutes, once and feature, and
#
#   data=FOLDER    with the folders cifar10 and fashion_mnist; without, the images are fetched
#   out=FOLDER     where results and reports are gathered; RUNS/results
out=
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/pieces.sh"

out=${out:-$runs/results}
mkdir -p "$runs" "$out"
sizes=(--quick)
if [[ $scale == full ]]; then
  sizes=(--device cuda)
  python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "gpu.sh: scale must be smoke where torch sees no GPU, got full" >&2; exit 2; }
fi

# step NAME COMMAND…: once, in one piece.
step() {
  local done=$runs/$1.done status=0
  shift
  [[ ! -f $done ]] || return 0
  timeout -k 10 "${minutes}m" "$@" || status=$?
  [[ $status == 0 ]] || exit "$status"
  touch "$done"
  pause
}

# card NAME ARGUMENTS…: the pieces of a card.
card() {
  local name=$1 status=0
  shift
  [[ -z $data ]] || set -- "$@" data="$data/$name"
  bash "$here/$name/run.sh" scale="$scale" runs="$runs" minutes="$minutes" once="$once" "$@" ||
    status=$?
  gather
  [[ $status == 0 ]] || exit "$status"
}

# gather: what is worth keeping of every bench.
gather() {
  local results folder
  while read -r results; do
    folder=$out/$(basename "$(dirname "$(dirname "$results")")")
    mkdir -p "$folder"
    cp "$results" "$folder"
    cp "$(dirname "$results")/report.md" "$(dirname "$results")/../summary.json" "$folder" || true
  done < <(find "$runs" -path "$out" -prune -o -name results.jsonl -print)
}

step tests python -m pytest -n 0 -m gpu "$here/../tests"
step engine python "$here/engine.py" "${sizes[@]}" --out "$out/engine.json"
card cifar10 ${feature:+feature="$feature"}
card fashion_mnist
