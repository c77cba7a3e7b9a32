#!/bin/sh
# A run to watch: ListOps with short expressions, made on the spot; dense attention until it has settled, then block-sparse.
# usage: sh experiments/demo.sh      (or: make demo)
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
data=data/demo
out=runs/demo
# fp32, so that every machine shows the same: in bf16 this short run had not left its plateau after 300 steps
run="--task lra-listops --data_dir $data --output_dir $out --precision fp32"

rm -rf "$out"
echo "== data: ListOps expressions of 10 to 200 tokens, made on the spot"
"$PYTHON" preprocess/create_listops.py --output_dir "$data" --min_length 10 --max_length 200 \
    --padded_length 512 --num_train 9600 --num_dev 1000 --num_test 2000
echo "== training: dense, then sparse"
"$PYTHON" main_learnable_skewness.py --mode train $run --sk 1.7 --ds 1.3 --train_steps 300 \
    --batch_size 32 --set model.max_seq_len=512 --set model.block_size=16 --set model.density=0.1 \
    --set training.learning_rate=0.004 --set training.warmup=30 --set training.eval_frequency=100
echo "== inference"
"$PYTHON" main_inference.py --mode eval $run
logs=$out/logs/log-0/lra-listops
echo "== where to look next"
echo "pictures of the run: $logs/train.sat.png and $logs/train.sat.transition.png"
echo "its numbers: $logs/sat.metrics.jsonl and $logs/sat.run.json; tensorboard --logdir $logs"
echo "a real task: python preprocess/create_cifar10.py && python main_learnable_skewness.py --mode train"
