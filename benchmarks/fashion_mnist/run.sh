#!/usr/bin/env bash
# Fashion-MNIST: does grouping help? See ../pieces.sh for the arguments. scale=small trains one
# checkpoint for every num_groups and networks for a single setting, in about ten hours of one CPU
# core; scale=full adds a checkpoint of single pixels, whose most groups are pixel autoregression.
source "$(dirname "$0")/../pieces.sh"

run=$runs/fashion_mnist pixels=$runs/fashion_mnist-pixels
features=bench.features=[classifier]

# The test split and as many images of the training; a classifier sees those of the training alone.
compared=(
  data=fashion_mnist data.split=test ${data:+data.path="$data"} bench.training_images=10000
  bench.features=[classifier,pixels,efficientnet_lite0] features.efficientnet_lite0.size=112
  bench.likelihood=bound bench.batch_size=100
)

# specialist NAME SEED GROUPS OVERLAP OVERRIDES…: a training for one setting, and its bench.
specialist() {
  local of=$small/$1-s$2 seed=$2 groups=$3 overlap=$4
  shift 4
  train "$of" experiment=fashion_mnist_small seed="$seed" training.num_groups="[$groups]" \
    training.overlap="[$overlap]" report.num_groups="[$groups]" "$@"
  bench cost "$of" "${compared[@]}" bench.steps=[16] bench.joint_steps=[] \
    bench.num_groups="[$groups]" bench.overlap="[$overlap]"
}

case $scale in
  full)
    train "$run" experiment=fashion_mnist
    train "$pixels" experiment=fashion_mnist_pixels
    same=("$features" bench.samples=10000 bench.batch_size=1000 compile=true)
    bench pixels "$pixels" "${same[@]}" bench.num_groups=[1,7,28,784] bench.steps=[4,16] \
      bench.joint_steps=[64,256]
    sweep "$run" [1,2,4,7,14] "${same[@]}"
    ;;
  small)
    # Three seeds of the noise where it is the question, one where settings are many.
    small=$runs/fashion_mnist-small
    same=("${compared[@]}" bench.joint_steps=[])
    for seed in 0 1; do
      run=$small/universal-s$seed
      wide=("${same[@]}" run_dir="$run/wide" bench.seeds=[0])
      train "$run" experiment=fashion_mnist_small seed="$seed"
      bench cost "$run" "${same[@]}" bench.num_groups=[1,7] bench.steps=[16]
      bench wide "$run" "${wide[@]}" bench.num_groups=[2,4,14,28,49] bench.steps=[16]
      bench overlap "$run" "${wide[@]}" bench.num_groups=[7] bench.overlap=[0.5,0.75] bench.steps=[16]
      bench half "$run" "${wide[@]}" bench.num_groups=[4,49] bench.overlap=[0.5] bench.steps=[16]
      bench more "$run" "${wide[@]}" bench.num_groups=[1] bench.steps=[32,64,128]
      bench long "$run" "${wide[@]}" bench.num_groups=[7] bench.overlap=[0,0.75] bench.steps=[64]
      specialist one "$seed" 1 0
      run=$small/one-s$seed
      bench more "$run" "${same[@]}" run_dir="$run/wide" bench.seeds=[0] bench.steps=[32,64]
      specialist seven "$seed" 7 0
    done
    specialist seven_half 0 7 0.5
    run=$small/seven_half-s0
    bench long "$run" "${same[@]}" run_dir="$run/wide" bench.seeds=[0] bench.num_groups=[7] \
      bench.overlap=[0.5] bench.steps=[64]
    specialist forty_nine 0 49 0
    ;;
  tiny)
    pixels=$pixels-tiny
    train "$pixels" experiment=fashion_mnist_pixels_tiny
    bench pixels "$pixels" "$features" bench.samples=500 bench.seeds=[0,1] bench.batch_size=250 \
      bench.num_groups=[1,196] bench.steps=[4,16] bench.joint_steps=[]
    ;;
  smoke)
    small=$runs/fashion_mnist-small-smoke pixels=$pixels-smoke
    few=("data.split='train[:20]'" max_steps=2 report.samples=10)
    compared+=(bench.training_images=20 bench.samples=10 bench.seeds=[0] bench.likelihood_images=4)
    compared+=("data.split='test[:20]'" features.efficientnet_lite0.size=32)
    train "$small/universal-s0" experiment=fashion_mnist_small "${few[@]}"
    bench cost "$small/universal-s0" "${compared[@]}" bench.num_groups=[1,2] bench.steps=[2] \
      bench.joint_steps=[]
    specialist seven_half 0 7 0.5 "${few[@]}"
    train "$pixels" experiment=fashion_mnist_pixels_tiny "${few[@]}"
    bench pixels "$pixels" "$features" bench.samples=10 bench.seeds=[0] bench.num_groups=[1,196] \
      bench.steps=[2] bench.joint_steps=[]
    ;;
esac
