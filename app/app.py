"""The chat page: on this machine (`python app/app.py`) and, with the same file, as a Databricks App.

LLMOPS_ENV names the environment (dev by default); a Databricks App says itself at which port it must listen.
"""
import os, signal, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llmops_ref.core.config import SettingsError, begin_process, load_config

begin_process()                                     # before anything is imported that tells its makers how it is used

from llmops_ref.feedback.chat import champion_host, serve_chat
from llmops_ref.core.services import free_port
from llmops_ref.core.files import DataError
from llmops_ref.core.workspace import open_workspace


def main():
    port, host_name = int(os.environ.get("DATABRICKS_APP_PORT", 8080)), "0.0.0.0" if "DATABRICKS_APP_PORT" in os.environ else "127.0.0.1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # what was started for the page ends with it, however politely we are asked
    free_port(port, "DATABRICKS_APP_PORT")                          # said now, not after the model has been loaded
    ws = open_workspace(load_config(os.environ.get("LLMOPS_ENV", "dev"), ROOT))
    host = champion_host(ws)
    print(f"The assistant of {ws.config.env} is at http://{host_name}:{port}", flush=True)
    serve_chat(ws, host, port, host_name)


if __name__ == "__main__":
    try: main()
    except (SettingsError, DataError) as error: sys.exit(f"Error: {error}")
    except KeyboardInterrupt: print()
