#!/bin/sh
# The method in a few minutes, on a task whose answer is known: dense until attention has concentrated, then block-sparse; and
# the same run again from the same moment with the blocks that the original's rule would have kept.
# usage: sh experiments/demo.sh      (or: make demo)
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
data=data/demo
out=runs/demo
logs=$out/logs/log-0/planted
# threads that spin while they wait make a machine with other work on it many times slower
OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
export OMP_WAIT_POLICY
run="--task planted --data_dir $data --output_dir $out --train_steps 500"

rm -rf "$out"
echo "== data: the label of each sequence is to be read through 51 of its 1,024 pairs of blocks"
"$PYTHON" preprocess/create_planted.py --output_dir "$data"
echo "== training: dense until attention concentrates, then sparse with the blocks that hold most of it"
"$PYTHON" main_learnable_skewness.py --mode train $run --name mass --pattern mass \
    --transition_when concentrated --max_dense_steps 300
step=$("$PYTHON" -c 'import json, sys; print(next(e["step"] for e in map(json.loads, open(sys.argv[1])) if e["event"] == "transition"))' \
    "$logs/mass.metrics.jsonl")
echo "== the same run, switched after the same $step steps with the learned pattern of the original"
"$PYTHON" main_learnable_skewness.py --mode train $run --name learned --pattern learned \
    --transition_when after --max_dense_steps "$step"
echo "== inference"
"$PYTHON" main_inference.py --mode eval --task planted --data_dir "$data" --output_dir "$out" --name mass
"$PYTHON" experiments/compare.py "$logs/mass.metrics.jsonl" "$logs/learned.metrics.jsonl" --picture "$out/demo.png"
echo "== what you have seen: two runs, equal up to step $step, then each with 5 % of the blocks: mass keeps those that hold most attention"
echo "the reports, for a browser: $logs/train.mass.html and train.learned.html; both in one picture: $out/demo.png"
echo "which pattern to use and when a run switches: docs/method.md"
echo "next, a real task (fetches 170 MB): $PYTHON preprocess/create_cifar10.py && $PYTHON main_learnable_skewness.py --task lra-image --dry_run"
