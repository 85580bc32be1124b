"""The assistant as a Databricks App: serve the version that ASSISTANT_URI names, with the version's own code.

`llmops_ref.release.hosting.AppHost` deploys this folder and sets the variables; the packages are in requirements.txt.
"""
import os, sys, tempfile

import mlflow

code = mlflow.artifacts.download_artifacts(f"{os.environ['ASSISTANT_URI']}/code", dst_path=tempfile.mkdtemp())
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")]))
os.execv(sys.executable, [sys.executable, "-P", "-m", "llmops_ref.release.serving", "--host", "0.0.0.0", "--port", os.environ.get("DATABRICKS_APP_PORT", "8000")])
