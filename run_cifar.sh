#!/usr/bin/env bash
# Train every network with every method on every data set and seed, then print all results as Markdown tables. Runs that
# are finished are skipped and interrupted ones resumed: start the script again to go on. Give other settings another
# OUT: a finished run that has other options than those asked for is kept, and named. Words after the script's name are
# options of every run. Every tenth epoch is evaluated, unless --eval-every says otherwise. The output of each run is in
# OUT/RUN.log. Paths are relative to the directory that you call it from.
#
# Variables, all optional:
#   ARCHS      networks (default: msdnet slimmable)
#   DATASETS   cifar10, cifar100, shapes, or folders that hold train/<class>/* and test/<class>/* (default: cifar10 cifar100)
#   METHODS    ways to train (default: ce ipkd ipkd-ta)
#   SEEDS      (default: 0 1 2)
#   EPOCHS     of every run (default: 300 for MSDNet, 200 for slimmable)
#   MSDNET     options of the MSDNet runs only
#   SLIMMABLE  options of the slimmable runs only
#   OUT        where the runs go (default: runs/cifar)
#   JOBS       runs side by side (default: the number of GPUs, one run on each; 1 where there is none)
#   PYTHON     (default: python)
#
#   ./run_cifar.sh                                                          # the whole study
#   JOBS=4 EPOCHS=30 DATASETS=cifar10 SEEDS=0 OUT=short ./run_cifar.sh      # a part of it, four runs side by side
#   DATASETS="photos data/flowers" MSDNET="--exits 5" OUT=own ./run_cifar.sh --lr 0.05     # folders of images
set -uo pipefail
case " $* " in
  *" --help "* | *" -h "*) awk 'NR > 1 { if (!sub(/^# ?/, "")) exit; print }' "$0"; exit ;;
esac

ARCHS=${ARCHS-"msdnet slimmable"}
DATASETS=${DATASETS-"cifar10 cifar100"}
METHODS=${METHODS-"ce ipkd ipkd-ta"}
SEEDS=${SEEDS-"0 1 2"}
EPOCHS=${EPOCHS-}
MSDNET=${MSDNET-} SLIMMABLE=${SLIMMABLE-}
OUT=${OUT-runs/cifar}
PYTHON=${PYTHON-python}

# the GPUs that may be used, by their numbers; as many runs side by side as there are
gpus=${CUDA_VISIBLE_DEVICES-$(nvidia-smi -L 2>/dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p' | paste -sd , -)}
IFS=, read -ra gpus <<<"$gpus"
default_jobs=${#gpus[@]}
[ "$default_jobs" -gt 0 ] || default_jobs=1
JOBS=${JOBS-$default_jobs}

program=$(dirname "$0")/ipkd_ta.py
fail() { echo "run_cifar.sh: $1" >&2; exit 2; }
command -v "$PYTHON" >/dev/null || fail "PYTHON must be one command, there is no '$PYTHON'"
[[ $JOBS =~ ^[1-9][0-9]*$ ]] || fail "JOBS must be a whole number from 1, got '$JOBS'"
twins=$(for dataset in $DATASETS; do basename "$dataset"; done | sort | uniq -d)
[ -z "$twins" ] || fail "two data sets have the name $twins: give each an OUT of its own"
mkdir -p "$OUT" || exit 2

# runs side by side share the cores
threads=$(($(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) / JOBS))
[ "$JOBS" -eq 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

# on a CPU, freed memory is kept for the next step instead of returned to the system (glibc)
export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_-2147483647}

stop() {                                  # Ctrl-C does not reach what runs in the background
  trap '' INT TERM
  # until none is left: a run that has just begun may miss the first signal
  while kill $(jobs -pr); do sleep 0.1; done 2>/dev/null
  exit "$1"
}
trap 'echo "stopped: call it again to go on" >&2; stop 130' INT
trap 'echo "stopped: call it again to go on" >&2; stop 143' TERM

# CIFAR is fetched once, before the runs would all do it
data_dir=data previous=
for word in "$@"; do
  [ "$previous" != --data-dir ] || data_dir=$word
  [ "$word" = "${word#--data-dir=}" ] || data_dir=${word#--data-dir=}
  previous=$word
done
fetch='
import os, sys, torchvision
cls = getattr(torchvision.datasets, sys.argv[1])
try:
    cls(os.path.expanduser(sys.argv[2]), download=True)
except Exception as error:
    page = "https://www.cs.toronto.edu/~kriz/cifar.html"
    sys.exit(" ".join(f"put {cls.filename} of {page} there ({error})".split()))
'
for dataset in $DATASETS; do
  case $dataset in cifar10 | cifar100)
    why=$("$PYTHON" -c "$fetch" "CIFAR${dataset#cifar}" "$data_dir" 2>&1 >/dev/null) ||
      fail "$dataset could not be fetched into '$data_dir': $(tail -n 1 <<<"$why")"
  esac
done

running=() names=() failed=() ended=0     # process and name of the run in each place from 0 to JOBS - 1

wait_for_place() {                        # until fewer than $1 runs are going; says which have ended
  while true; do
    for place in "${!running[@]}"; do
      kill -0 "${running[place]}" 2>/dev/null && continue
      wait "${running[place]}" 2>/dev/null
      status=$?
      echo "${names[place]}: ends with status $status"
      ended=$((ended + 1))
      if [ $status -ne 0 ]; then
        failed+=("${names[place]}")
        tail -n 1 "$OUT/${names[place]}.log" | sed 's/^/  /'
      fi
      unset "running[place]"

      # something is wrong with all of them
      if [ $ended -eq 3 ] && [ ${#failed[@]} -eq 3 ]; then
        echo "run_cifar.sh: the first three runs have failed, the others are not begun" >&2
        stop 1
      fi
    done
    [ ${#running[@]} -ge "$1" ] || break
    sleep 0.5
  done
}

for seed in $SEEDS; do for dataset in $DATASETS; do for arch in $ARCHS; do for method in $METHODS; do
  folder=${dataset%/}
  name=$arch-${folder##*/}-$method-seed$seed

  # later options win: ours, those of the network and of the script, then what makes this run
  [ "$arch" = msdnet ] && own=$MSDNET || own=$SLIMMABLE
  read -ra options <<<"${EPOCHS:+--epochs $EPOCHS} --eval-every 10 $own"
  options+=("$@")
  case $dataset in
    cifar10 | cifar100 | shapes | folder) options+=(--dataset "$dataset") ;;
    *) options+=(--dataset folder --data-dir "$dataset") ;;
  esac
  options+=(--arch "$arch" --method "$method" --seed "$seed")

  # the program leaves a finished run as it is, and says which of these options it does not have
  command=("$PYTHON" "$program" "${options[@]}" --out "$OUT/$name" --resume)
  if [ -f "$OUT/$name/results.json" ]; then
    other=$("${command[@]}" | sed -n 's/.* keeps its own options: //p')
    echo "$name: already finished${other:+, it has other options: $other}"
    continue
  fi

  # in the first free place, which has its GPU
  wait_for_place "$JOBS"
  for ((place = 0; place < JOBS; place++)); do [ -n "${running[place]-}" ] || break; done
  [ ${#gpus[@]} -lt 2 ] || export CUDA_VISIBLE_DEVICES=${gpus[place % ${#gpus[@]}]}
  echo "$name: begins"
  "${command[@]}" </dev/null >>"$OUT/$name.log" 2>&1 &
  running[place]=$! names[place]=$name
done; done; done; done
wait_for_place 1

echo
"$PYTHON" "$program" --report "$OUT"
status=$?
if [ ${#failed[@]} -gt 0 ]; then
  echo "run_cifar.sh: failed: ${failed[*]}" >&2
  status=1
fi
exit $status
