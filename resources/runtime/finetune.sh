#!/usr/bin/env bash
# What AI Runtime runs on a machine with a GPU, after it has installed the environment `gpu` and unpacked what the task before left.
set -euo pipefail
unset MLFLOW_RUN_ID MLFLOW_EXPERIMENT_ID MLFLOW_EXPERIMENT_NAME     # the stage has a run in the project's experiment
cd "$CODE_SOURCE_PATH"
exec python resources/runtime/task.py finetune "root='$PWD'" "$(cat task.txt)" gpu=true
