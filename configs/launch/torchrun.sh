#!/bin/bash
# Trains on all GPUs of one node, or of several: start it on each, with the same options and the address of one of them.
#
#     bash torchrun.sh --config scratch_7b.yaml --run_folder runs/7b
#     NODES=2 ADDRESS=node0:29500 bash torchrun.sh --config scratch_7b.yaml --run_folder /shared/runs/7b
#
# Ctrl-C or SIGTERM saves and ends; the same with --ckpt_path last goes on. run_folder is one that all nodes share.
set -euo pipefail
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
exec torchrun --nnodes "${NODES:-1}" --nproc_per_node "$GPUS" \
    --rdzv_backend c10d --rdzv_endpoint "${ADDRESS:-localhost:29500}" -m lskip fit "$@"
