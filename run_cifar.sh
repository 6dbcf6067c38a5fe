#!/usr/bin/env bash
# Train every architecture with every method on every data set and seed, one after the other, then print all results
# as Markdown tables, mean ± standard deviation over the seeds. Runs that are finished are skipped and interrupted ones
# resumed, so the script can be started again; give other settings another OUT. Options given to the script are passed on
# to every run, those in MSDNET and SLIMMABLE to the runs of that architecture.
#
#   ./run_cifar.sh                                                        # the whole study
#   EPOCHS=30 DATASETS=cifar10 SEEDS="0 1 2" OUT=short ./run_cifar.sh     # a part of it
#   MSDNET="--exits 5 --step-mode lin_grow" ARCHS=msdnet OUT=five ./run_cifar.sh --lr 0.05
set -uo pipefail
cd "$(dirname "$0")" || exit

ARCHS=${ARCHS-"msdnet slimmable"}
DATASETS=${DATASETS-"cifar10 cifar100"}
METHODS=${METHODS-"ce ipkd ipkd-ta"}
SEEDS=${SEEDS-"0 1 2"}
EPOCHS=${EPOCHS-}             # empty: 300 for MSDNet, 200 for slimmable
MSDNET=${MSDNET-}
SLIMMABLE=${SLIMMABLE-}
OUT=${OUT-runs/cifar}
PYTHON=${PYTHON-python}

failed=()
for seed in $SEEDS; do
  for dataset in $DATASETS; do
    for arch in $ARCHS; do
      for method in $METHODS; do
        name=$arch-$dataset-$method-seed$seed
        if [ -f "$OUT/$name/results.json" ]; then
          echo "== $name: already finished"
          continue
        fi
        echo "== $name"
        [ "$arch" = msdnet ] && own=$MSDNET || own=$SLIMMABLE
        # shellcheck disable=SC2086             # $own is several words
        "$PYTHON" ipkd_ta.py --arch "$arch" --dataset "$dataset" --method "$method" --seed "$seed" \
          ${EPOCHS:+--epochs "$EPOCHS"} --out "$OUT/$name" --resume $own "$@"
        status=$?
        [ $status -eq 130 ] && exit 130          # interrupted from the keyboard: stop altogether
        [ $status -eq 0 ] || failed+=("$name")
      done
    done
  done
done

echo
"$PYTHON" ipkd_ta.py --report "$OUT"
status=$?
if [ ${#failed[@]} -gt 0 ]; then
  echo "run_cifar.sh: failed: ${failed[*]}" >&2
  status=1
fi
exit $status
