#!/usr/bin/env bash
# Trains on all GPUs of a machine; on several machines, start it on each, with NODES, NODE and MASTER_ADDR set.
#
#     bash docs/scripts/torchrun.sh --stage all --config configs/mine.yaml trainer.strategy=ddp
set -euo pipefail

exec torchrun \
    --nproc-per-node "${PROCESSES:-gpu}" \
    --nnodes "${NODES:-1}" \
    --node-rank "${NODE:-0}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" \
    --master-port "${MASTER_PORT:-29500}" \
    tools/train.py "$@"
