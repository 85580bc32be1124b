"""One task of a job: `task.py corpus "env=prod root=/Workspace/... platform=databricks ..."`.

The words after the task are settings, `key=value`; of two with the same key the first counts. The bundle writes them. The package
is installed, as every other: the task's environment has the wheel that the bundle built. `root` is where the other files lie.
"""
import shlex, sys

from llmops_ref.runner.jobs import run_task

task, *words = sys.argv[1:]
given = [word.split("=", 1) for text in words for word in shlex.split(text)]
run_task(task, **dict(reversed(given)))
