#!/usr/bin/env bash
# What a GPU is measured for, in parts of ten minutes at most:  benchmarks/gpu.sh PART [FOLDER]
#   tests    kernels, compiled blocks and sampling on the GPU against the CPU
#   kernels  attention backends against dense attention, at the head sizes of configs/t2i-*.yaml
#   train    a training step of t2i-300m and t2i-1b by attention backend: seconds, MFU, memory
#   imm      a step of Inductive Moment Matching over one of flow matching, by the share of noisy tokens
#   latency  a token and a refinement step of t2i-1b at batch 1, with CUDA graphs and without, and how near to memory's speed
#   sample   latency over plans at 1B, with the cache and without
#   loader   samples a second beside WebDataset
# Results are JSON files in FOLDER (benchmarks/results/<the device's name>). QUICK=1 tries a part at small sizes, on
# any machine; its figures claim nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
[[ -x $(command -v "$python") ]] || python=python3
parts="tests kernels train imm latency sample loader"
part=${1:-}
if [[ -z $part || " $parts " != *" $part "* ]]; then
  echo "benchmarks/gpu.sh: error: part '$part' must be one of: $parts" >&2
  exit 2
fi
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")')
if [[ $device == "no GPU" && -z ${QUICK:-} ]]; then
  echo "benchmarks/gpu.sh: error: no GPU here; QUICK=1 tries the script without one" >&2
  exit 2
fi
out=${2:-benchmarks/results/$(tr -c 'A-Za-z0-9\n' _ <<<"$device")}
mkdir -p "$out"
quick=(${QUICK:+--quick})

failed=()
bench_train() { # NAME CONFIG [OPTION...]: one JSON file, which is there whole or not at all; the next one is tried anyway
  local name=$1
  shift
  if "$python" -m mmgen bench train "$@" --synthetic --json >"$out/$name.json.new"; then
    mv "$out/$name.json.new" "$out/$name.json"
  else
    rm -f "$out/$name.json.new"
    failed+=("$name")
  fi
}

case $part in
tests) "$python" -m pytest -q tests/gpu ;;
kernels)
  "$python" -m benchmarks.kernels "${quick[@]}" --seeds 1 --heads 8 --kv-heads 4 --head-dim 128 --lengths 512 2048 8192 \
    --out "$out/kernels.json"
  ;;
train)
  if [[ -n ${QUICK:-} ]]; then
    bench_train train_smoke configs/smoke.yaml --steps 2 --warmup 1
  else
    # one packed batch a step: the optimizer's share is more than in training, where 64 of them are a step
    for size in 300m 1b; do
      for attention in flex dense; do
        bench_train "train_${size}_$attention" "configs/t2i-$size.yaml" --train.attention "$attention" \
          --train.micro_batches 4
      done
    done
  fi
  ;;
imm)
  "$python" -m benchmarks.target_pass "${quick[@]}" --seeds 1 --width 1024 --num-layers 20 --documents 64 \
    --attention dense --compile --out "$out/target_pass.json"
  ;;
latency) "$python" -m benchmarks.latency "${quick[@]}" --out "$out/latency.json" ;;
sample)
  "$python" -m benchmarks.sampling "${quick[@]}" --width 2048 --num-layers 20 --seeds 1 --precision bf16 --out "$out/sampling.json"
  ;;
loader) "$python" -m benchmarks.loader "${quick[@]}" --seeds 1 --out "$out/loader.json" ;;
esac
if ((${#failed[@]})); then
  echo "benchmarks/gpu.sh: error: $device: of $part these failed: ${failed[*]}" >&2
  exit 1
fi
echo "$device: $part written to $out"
