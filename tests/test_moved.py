"""A project that was moved or copied: it works where it is, and the original never hears of it."""
import contextlib, hashlib, json, sqlite3, subprocess, sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from matplotlib.figure import Figure

from conftest import PATIENCE, copy_of
from llmops_ref.core.config import load_config
from llmops_ref.core.workspace import open_workspace
from llmops_ref.kit.doctor import check_database

STORE = ("stores", "staging")


@pytest.fixture(scope="module")
def copied(finished, tmp_path_factory):
    "A copy of the finished project, under a name that is not easy."
    return copy_of(finished, tmp_path_factory.mktemp("100% ü's copy #1"))


def digest(folder: Path) -> str: # Of everything in it
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        whole.update(f"{path.relative_to(folder)} {path.lstat().st_mode}".encode())
        if path.is_file() and not path.is_symlink(): whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


REMEMBERED = """SELECT artifact_uri FROM runs UNION SELECT storage_location FROM model_versions UNION SELECT artifact_location FROM logged_models
UNION SELECT value FROM trace_tags WHERE key = 'mlflow.artifactLocation'
UNION SELECT artifact_location FROM experiments WHERE name <> 'Default'"""

def locations(project) -> set[str]: # Stores to which all that MLflow remembers leads
    address = f"{project.root.joinpath(*STORE, 'mlflow.db').as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(address, uri=True)) as tables: found = [location for location, in tables.execute(REMEMBERED)]
    return {location.partition("/artifacts")[0] for location in found if location.startswith("file:")}     # prompts have no file


def test_a_run_of_a_copy_leaves_the_original_as_it_is(finished, copied):
    "Which is still there, and which MLflow's rows led to. All other tests run whole stages in copies of one original."
    before, there = digest(finished.root), locations(finished)
    ws = open_workspace(load_config("staging", copied.root))
    state, store = check_database(ws.config)        # `llmops doctor` says so before anything is written
    assert (state.state, store.about) == ("ok", "the store") and [unquote(place)[7:] in store.found for place in there] == [True]
    ws.start_run("example")
    ws.finish("example", "a run with a figure", dict(one=1.0), figures=dict(empty=Figure()))
    assert ws.mlflow().MlflowClient().list_artifacts(ws.mlflow().last_active_run().info.run_id)[0].path == "example-empty.png"
    assert locations(copied) == {copied.root.joinpath(*STORE).as_uri()}
    assert (digest(finished.root), locations(finished)) == (before, there)


def test_a_project_that_was_moved_works_where_it_is(copied):
    "Its assistant answers, and nothing has to run again; the report leads to the notebooks of the earlier runs."
    old = copied.root
    copied.root = old.rename(old.parent.parent / "moved")
    copied.environment |= dict(PYTHONPATH=str(copied.root))
    assert "stale" not in copied.inside("status", "--env", "staging").stdout
    assert "Everything is up to date" in copied.inside("run", "--env", "staging").stdout
    said = copied.inside("ask", "How do I log a metric?", "--env", "staging")
    assert said.returncode == 0 and f"The store was in {old.joinpath(*STORE)}. " in said.stderr, said.stdout + said.stderr
    assert locations(copied) == {copied.root.joinpath(*STORE).as_uri()} and not old.exists()
    assert "The store was in" not in copied.inside("versions", "--env", "staging").stderr       # said once
    run = json.loads((copied.root / "runs" / "staging" / "latest" / "run.json").read_text())
    for stage in run["stages"]: assert (copied.root / "runs" / "staging" / "latest" / stage["executed"]).resolve().is_file()


def test_the_same_store_by_another_path_is_no_other_store(finished):
    "A link to the project leads nothing anywhere."
    ws = open_workspace(load_config("staging", finished.root))
    ws.mlflow()
    before = locations(finished)
    link = finished.root.parent / "linked"
    link.symlink_to(finished.root)
    linked = open_workspace(load_config("staging", finished.root, store=str(link.joinpath(*STORE))))
    assert linked.mlflow().get_experiment_by_name(ws.experiment).artifact_location == ws.path("artifacts").as_uri()
    assert locations(finished) == before


def test_many_who_open_a_copy_at_once_find_it_led_there(finished, tmp_path):
    "One of them does it, and says so."
    project = copy_of(finished, tmp_path)
    store, code = project.root.joinpath(*STORE), "from llmops_ref.core.database import *; print(len(follow_store(*map(Path, sys.argv[1:]))))"
    command = [sys.executable, "-c", f"import sys; from pathlib import Path; {code}", store / "mlflow.db", store / "artifacts"]
    opened = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert sorted(one.communicate(timeout=PATIENCE)[0].strip() for one in opened) == ["0", "0", "0", "1"]
    assert locations(project) == {project.root.joinpath(*STORE).as_uri()}
