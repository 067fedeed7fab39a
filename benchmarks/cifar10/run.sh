#!/usr/bin/env bash
# CIFAR-10: one checkpoint, every num_groups, both orders. See ../pieces.sh for the arguments, and
# feature=FILE for resnet56-cifar10.safetensors; without it a classifier is trained on the data.
feature=
source "$(dirname "$0")/../pieces.sh"

features=(bench.features=[classifier])
if [[ -n $feature ]]; then
  features=(bench.features=[resnet56_cifar10] features.resnet56_cifar10.path="$feature")
fi
run=$runs/cifar10
groups=[1,2,4,8,16]

case $scale in
  full)
    train "$run" experiment=cifar10
    same=("${features[@]}" bench.samples=10000 bench.batch_size=1000 compile=true)
    sweep "$run" "$groups" "${same[@]}"
    ;;
  tiny)
    run=$run-tiny
    train "$run" experiment=cifar10_tiny
    same=("${features[@]}" bench.samples=500 bench.seeds=[0,1] bench.batch_size=250)
    tiny_sweep "$run" "$groups" [2,4,8] "${same[@]}"
    ;;
  smoke)
    run=$run-smoke
    train "$run" experiment=cifar10_tiny max_steps=2 report.samples=10 \
      "data.split='train[:20]'"
    bench cost "$run" "${features[@]}" bench.samples=10 bench.seeds=[0] bench.num_groups=[1,2] \
      bench.steps=[2] bench.joint_steps=[]
    ;;
esac
