#!/bin/sh
# A run to watch: ListOps with short expressions, made on the spot; dense attention until it has settled, then block-sparse.
# usage: sh experiments/demo.sh      (or: make demo)
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
data=data/demo
out=runs/demo
run="--task lra-listops --data_dir $data --output_dir $out"

rm -rf "$out"
echo "== data: ListOps expressions of 10 to 100 tokens, made on the spot"
"$PYTHON" preprocess/create_listops.py --output_dir "$data" --min_length 10 --max_length 100 \
    --padded_length 256 --num_train 9600 --num_dev 1000 --num_test 2000
echo "== training: dense, then sparse"
# --sk 4.5: padding alone makes a skewness of 3.5 to 4.6 here; --ds 5: the mean of 32 examples moves more than that of the paper's 512
"$PYTHON" main_learnable_skewness.py --mode train $run --sk 4.5 --ds 5 --max_dense_steps 120 --train_steps 300 --batch_size 32 \
    --set model.max_seq_len=256 --set model.num_layers=2 --set model.block_size=16 --set model.density=0.1 \
    --set training.learning_rate=0.004 --set training.warmup=30 --set training.eval_frequency=100
echo "== inference"
"$PYTHON" main_inference.py --mode eval $run
logs=$out/logs/log-0/lra-listops
echo "== where to look next"
echo "report of the run: $logs/train.sat.html"
echo "its numbers: $logs/sat.metrics.jsonl and $logs/sat.run.json; tensorboard --logdir $logs"
echo "a real task: python preprocess/create_cifar10.py && python main_learnable_skewness.py --mode train"
