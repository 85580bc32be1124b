#!/usr/bin/env bash
# As finetune.sh, for the job smoke: what AI Runtime runs on a machine with a GPU. It makes a row of what it sees, also where there is none.
set -euo pipefail
unset MLFLOW_RUN_ID MLFLOW_EXPERIMENT_ID MLFLOW_EXPERIMENT_NAME
cd "$CODE_SOURCE_PATH"
exec python resources/runtime/task.py smoke_gpu "root='$PWD'" "$(cat task.txt)"
