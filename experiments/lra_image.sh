#!/bin/sh
# The paper's lra-image run, its first 1,000 steps, drawn over the band of the published runs.
# usage: sh experiments/lra_image.sh [PUBLISHED.csv] [more options of main_learnable_skewness.py]
# PUBLISHED.csv has the columns task,seed,run,step,dev_loss,dev_accuracy; without it only our run is drawn.
# Interrupted, the same command goes on. The data comes from preprocess/create_cifar10.py.
# May be set: PYTHON, OUTPUT_DIR (runs/lra_image), STEPS (1000).
set -eu
PYTHON=${PYTHON:-python}
out=${OUTPUT_DIR:-runs/lra_image}
steps=${STEPS:-1000}
published=
case ${1:-} in
*.csv)
    published=$1
    shift
    ;;
esac
here=$(dirname "$0")
metrics=$out/logs/log-0/lra-image/sat.metrics.jsonl

if ! grep -qs "\"event\": \"train\", \"step\": $steps," "$metrics"; then
    resume=
    [ ! -e "$metrics" ] || resume=--resume
    "$PYTHON" "$here/../main_learnable_skewness.py" --mode train --task lra-image --sk 1.7 --ds 1.3 \
        --stop_after "$steps" --output_dir "$out" $resume "$@"
fi
"$PYTHON" "$here/plot_trajectory.py" "$metrics" ${published:+--published "$published"} \
    --output "$out/trajectory.png"
