#!/usr/bin/env bash
# Fashion-MNIST: one checkpoint for every num_groups, and one of single pixels, whose most groups are
# pixel autoregression. See ../pieces.sh for the arguments.
source "$(dirname "$0")/../pieces.sh"

run=$runs/fashion_mnist pixels=$runs/fashion_mnist-pixels
features=bench.features=[classifier]

case $scale in
  full)
    train "$run" experiment=fashion_mnist
    train "$pixels" experiment=fashion_mnist_pixels
    same=("$features" bench.samples=10000 bench.batch_size=1000 compile=true)
    bench pixels "$pixels" "${same[@]}" bench.num_groups=[1,7,28,784] bench.steps=[4,16] \
      bench.joint_steps=[64,256]
    sweep "$run" [1,2,4,7,14] "${same[@]}"
    ;;
  tiny)
    run=$run-tiny pixels=$pixels-tiny
    train "$run" experiment=fashion_mnist_tiny
    train "$pixels" experiment=fashion_mnist_pixels_tiny
    same=("$features" bench.samples=500 bench.seeds=[0,1] bench.batch_size=250)
    tiny_sweep "$run" [1,2,4,7] [2,4] "${same[@]}"
    bench pixels "$pixels" "${same[@]}" bench.num_groups=[1,196] bench.steps=[4,16] \
      bench.joint_steps=[]
    ;;
  smoke)
    run=$run-smoke pixels=$pixels-smoke
    train "$run" experiment=fashion_mnist_tiny max_steps=2 report.samples=10 \
      "data.split='train[:20]'"
    train "$pixels" experiment=fashion_mnist_pixels_tiny max_steps=2 report.samples=10 \
      "data.split='train[:20]'"
    same=("$features" bench.samples=10 bench.seeds=[0] bench.steps=[2] bench.joint_steps=[])
    bench cost "$run" "${same[@]}" bench.num_groups=[1,2]
    bench pixels "$pixels" "${same[@]}" bench.num_groups=[1,196]
    ;;
esac
