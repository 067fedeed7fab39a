# For the run.sh of each benchmark: trainings and benches in time slices of a few minutes each. Every
# slice resumes where the last one stopped or was killed.
#
#   scale=full     on a GPU; scale=small in hours, scale=tiny in minutes on a CPU; scale=smoke in
#                  seconds, to try the script
#   data=FOLDER    a local copy of the images in the hub's schema; without, they are fetched by name
#   runs=FOLDER    where everything goes; runs
#   minutes=N      per slice; 9
#   once=true      stop after one slice, with exit status 75 if more is to be done; the same command
#                  resumes

set -euo pipefail

scale=full data= runs=runs minutes=9 once=false
for word in "$@"; do
  case $word in
    scale=full | scale=small | scale=tiny | scale=smoke) ;;
    data=?* | runs=?* | once=true | once=false) ;;
    minutes=[1-9] | minutes=[1-9][0-9]) ;;
    feature=?* | out=?*) ;;        # where the card knows them
    *)
      echo "$(basename "$0"): scale, data, runs, minutes, once or feature must be set (KEY=VALUE), got $word" >&2
      exit 2
      ;;
  esac
  declare "$word"
done

# train RUN OVERRIDES…: until its summary, the last file, is there.
train() {
  local run=$1 limit
  shift
  limit=$(printf '00:00:%02d:00' "$minutes")
  while [[ ! -f $run/summary.json ]]; do
    if [[ -n $(find "$run" -name '*.ckpt' 2>/dev/null) ]]; then
      rolldiff train resume="$run" time_limit="$limit"
    else
      # Killed before its first checkpoint, it begins again.
      [[ ! -e $run ]] || mv "$run" "$run-killed-$(date +%s)"
      rolldiff train run_dir="$run" time_limit="$limit" "$@" ${data:+data.path="$data"}
    fi
    [[ -f $run/summary.json ]] || pause
  done
}

# bench NAME RUN OVERRIDES…: until all cells are there. Those of several benches of a run gather in
# one file.
bench() {
  local done=$2/bench/$1.done run=$2 status
  shift 2
  until [[ -f $done ]]; do
    status=0
    timeout -k 10 "${minutes}m" rolldiff bench ckpt="$run" "$@" || status=$?
    case $status in
      0) touch "$done" ;;
      124 | 137) pause ;;          # the slice ended in the middle of a cell
      *) exit "$status" ;;
    esac
  done
}

# sweep RUN GROUPS OVERRIDES…: the benches of a full card, the most important cells first.
sweep() {
  local run=$1 all=("bench.num_groups=$2" "${@:3}") no_more=bench.joint_steps=[]
  bench cost "$run" "${all[@]}" bench.steps=[16,32,64] bench.joint_steps=[4,8,128,256]
  bench overlap "$run" "${all[@]}" bench.overlap=[0.5,0.75] bench.steps=[16,32,64] $no_more
  bench order "$run" "${all[@]}" bench.order=[bottom_to_top] bench.steps=[16,64] $no_more
  bench guidance "$run" "${all[@]}" bench.guidance=[0.5] bench.steps=[16,32] $no_more
  bench few_steps "$run" "${all[@]}" bench.overlap=[0,0.5,0.75] bench.steps=[4,8] $no_more
}

# tiny_sweep RUN GROUPS OVERLAPPED OVERRIDES…: those of a tiny one; only some counts overlap.
tiny_sweep() {
  local run=$1 all=("${@:4}" bench.steps=[16] bench.joint_steps=[])
  bench cost "$run" "${@:4}" "bench.num_groups=$2" bench.steps=[4,16] bench.joint_steps=[32]
  bench overlap "$run" "${all[@]}" "bench.num_groups=$3" bench.overlap=[0.5]
  bench order "$run" "${all[@]}" bench.num_groups=[2,4] bench.order=[bottom_to_top]
  bench guidance "$run" "${all[@]}" bench.num_groups=[1,4] bench.guidance=[0.5]
}

pause() {
  if [[ $once == true ]]; then
    echo "More is to be done: the same command goes on."
    exit 75
  fi
}
