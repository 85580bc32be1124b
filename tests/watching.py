"""Whom the processes of a command try to reach, and what they leave in the home folder.

An audit hook in each process of Python, also in kernels and servers, notes the first. What is not Python's, ONNX Runtime above all, leaves
its identifier and its events in the home folder as soon as it speaks; so the home folder is new, and looked at.
"""
import ipaddress, json, os, socket
from pathlib import Path
from types import SimpleNamespace

import matplotlib

from llmops_ref.core.config import QUIET

PROXIES = {f"{kind}_proxy" for kind in ("http", "https", "all", "grpc", "no", "no_grpc")}

HOOK = '''
import json, os, sys

def note(event, given):
    if event not in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"): return
    where = given[0] if event.startswith("socket.get") else given[-1]
    with open(os.environ["TESTS_WATCH"], "a") as file: file.write(json.dumps([event, where], default=str) + "\\n")

sys.addaudithook(note)
'''


def without_proxies(environment): return {key: value for key, value in environment.items() if key.lower() not in PROXIES}


def watched(project, folder: Path, **given):
    "The environment of a process in a new home, with these variables, that notes whom it tries to reach; and the two places to look at."
    home, hook = folder / "home", folder / "hook"
    for new in (home, hook): new.mkdir(parents=True, exist_ok=True)            # another worker tries again what one could not
    (hook / "sitecustomize.py").write_text(HOOK)
    outside = ("HF_", "MLFLOW_", "XDG_", *QUIET)    # nothing may be off because somebody has said so already
    environment = {key: value for key, value in without_proxies(project.environment).items() if not key.startswith(outside)}
    environment |= given | dict(
        HOME=str(home), PYTHONPATH=f"{hook}:{project.root}", TESTS_WATCH=str(folder / "reached"), MPLCONFIGDIR=matplotlib.get_configdir(),
        MPLBACKEND="agg",
    )                                               # Matplotlib's list of fonts takes it seconds to make
    return SimpleNamespace(environment=environment, home=home, reached=folder / "reached")


def is_ours(event, where):
    if event.startswith("socket.get"): name = where
    elif isinstance(where, str): return True        # a socket of this machine, by its path
    else: name = where[0]
    if name in (None, "", "localhost", socket.gethostname()): return True
    try: return ipaddress.ip_address(name).is_loopback or name == "0.0.0.0"
    except ValueError: return False


def check_kept(seen):
    "Nobody outside was tried to be reached, and the home folder is as empty as it was."
    reached = [json.loads(line) for line in seen.reached.read_text().splitlines()] if seen.reached.exists() else []
    assert [one for one in reached if not is_ours(*one)] == []
    assert [str(path.relative_to(seen.home)) for path in seen.home.rglob("*") if path.is_file()] == []
    return reached
