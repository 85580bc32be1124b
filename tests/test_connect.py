"""`DatabricksWorkspace` with the clients that it has on Databricks, against a workspace of this machine (tests/sail_workspace.py).

The quick half takes Spark's own client of Spark Connect, which is here. The slow half takes Databricks Connect, of the
version and the Python that serverless jobs have, in an environment of its own that holds nothing of the project but a
wheel; the address is https, the token is asked for, and a worker of Spark first lacks our package and then has it.
"""
import contextlib, json, os, re, shutil, subprocess, sys
from pathlib import Path

import pandas as pd
import pytest
from starlette.testclient import TestClient

from conftest import BIN, ROOT, until
from llmops_ref.core.config import load_config
from llmops_ref.core.workspace import open_workspace
from llmops_ref.feedback.chat import chat_app, example_questions

HERE = Path(__file__).parent
CONTRACT = HERE / "connect_contract.py"
CHECKS = re.findall(r"^def (check_\w+)", CONTRACT.read_text(), flags=re.M)
CONNECT, PYTHON = "17.3", (3, 12)                       # of serverless environments 4 and 5
FREE = {k: v for k, v in os.environ.items() if not k.startswith(("DATABRICKS_", "LLMOPS_", "MLFLOW_", "SPARK_", "PYTHON"))}


@contextlib.contextmanager
def workspace(folder: Path, python, *words, **environment):
    "The workspace as a process; gives the variables by which a client finds it."
    folder.mkdir()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(python), "-W", "ignore", str(HERE / "sail_workspace.py"), str(folder), *words], env=FREE | environment, stdout=log, stderr=log
        )
    try:
        until(lambda: (folder / "workspace.json").exists() or process.poll() is not None)
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        at = json.loads((folder / "workspace.json").read_text())
        yield dict(
            DATABRICKS_HOST=at["host"], DATABRICKS_TOKEN=at["token"], DATABRICKS_CONFIG_FILE=os.devnull, CONTRACT_RULES=str(folder / "rules.json")
        ) | (dict(SPARK_REMOTE=at["spark"]) if "--plain" in words else {
            name: str(folder / "ca.pem") for name in ("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
        })
    finally: process.terminate(); process.wait()


def settings(folder: Path) -> Path: # All that a client needs of the repository
    folder.mkdir()
    shutil.copy(ROOT / "settings.ini", folder)
    return folder


def run_contract(python, folder: Path, **environment) -> dict: # Check -> what it said
    done = subprocess.run(
        [str(python), "-W", "ignore", "-P", str(CONTRACT), str(settings(folder))], env=FREE | environment, cwd=folder, capture_output=True, text=True,
        timeout=600,
    )
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"check"')]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return {line["check"]: line for line in said}


def hold(said: dict, check: str):
    assert said[check]["ok"], said[check]["facts"]


# --- Spark's own client

@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    with workspace(tmp_path_factory.mktemp("plain") / "workspace", sys.executable, "--plain", PYTHONPATH=str(ROOT)) as where: yield where


@pytest.fixture(scope="module")
def said_plain(plain, tmp_path_factory):
    return run_contract(sys.executable, tmp_path_factory.mktemp("contract") / "project", **plain, PYTHONPATH=str(ROOT))


@pytest.mark.parametrize("check", CHECKS)
def test_with_the_client_of_spark(said_plain, check): hold(said_plain, check)


# --- Databricks Connect

def python_of(version) -> Path:
    "A Python of that version on this machine."
    name = "python{}.{}".format(*version)
    places = [sys.executable, shutil.which(name) or "", *map(str, Path("~/.pyenv/versions").expanduser().glob("{}.{}.*/bin/python".format(*version)))]
    if uv := shutil.which("uv", path=f"{BIN}:{os.environ['PATH']}"):
        places.append(subprocess.run([uv, "python", "find", "{}.{}".format(*version)], capture_output=True, text=True).stdout.strip())
    for place in filter(None, places):
        done = subprocess.run([place, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True)
        if done.stdout.strip() == str(tuple(version)): return Path(place)
    pytest.skip(f"needs Python {version[0]}.{version[1]}, as Databricks' serverless environments have it: install {name}, or `uv python install`")


def environment(folder: Path, python, *packages) -> Path: # Its interpreter
    uv, ours = shutil.which("uv", path=f"{BIN}:{os.environ['PATH']}"), folder / "bin" / "python"
    subprocess.run([uv, "venv", "-q", "--python", str(python), str(folder)] if uv else [str(python), "-m", "venv", str(folder)], check=True)
    install = [uv, "pip", "install", "-q", "--python", str(ours)] if uv else [str(ours), "-m", "pip", "install", "-q"]
    for some in packages: subprocess.run([*install, *some], check=True)
    return ours


def locked(*names) -> list[str]:
    lock = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines())
    return [f"{name}=={lock[name]}" for name in names]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "The package as jobs install it, built from the files of the repository."
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "llmops_ref", source / "llmops_ref", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "build", "-w", "-n", "-x", "-o", str(made), str(source)], check=True, capture_output=True)
    return next(made.glob("*.whl"))


OURS = ("fastcore", "joblib", "filelock", "deltalake", "httpx", "pypdf", "beautifulsoup4", "markdownify", "markdown-it-py", "docutils")


@pytest.fixture(scope="module")
def pythons(wheel, tmp_path_factory):
    "The interpreter of a client, that of a worker without our package, and the folder that makes it one with it."
    python, folder = python_of(PYTHON), tmp_path_factory.mktemp("environments")
    needed = [*locked(*OURS), "pandas<3"]
    client = environment(folder / "client", python, [f"databricks-connect=={CONNECT}.*", *needed], ["--no-deps", str(wheel)])
    worker = environment(folder / "worker", python, [*locked("pysail", "pyspark-client"), *needed, "trustme"])
    target = folder / "with_us"
    shutil.unpack_archive(str(wheel), target, "zip")
    return client, worker, target


@pytest.fixture(scope="module")
def said_without(pythons, tmp_path_factory):
    folder = tmp_path_factory.mktemp("without")
    with workspace(folder / "workspace", pythons[1]) as where: return run_contract(pythons[0], folder / "project", **where)


@pytest.mark.slow(reason="an environment with Databricks Connect")
@pytest.mark.parametrize("check", CHECKS)
def test_with_databricks_connect(said_without, check): hold(said_without, check)


@pytest.mark.slow(reason="an environment with Databricks Connect")
def test_a_worker_without_our_package_costs_its_cores_and_nothing_else(said_without):
    hold(said_without, "check_work_on_rows")
    assert said_without["check_work_on_rows"]["facts"] == [
        "The workers of Spark cannot do this work (ModuleNotFoundError: No module named 'llmops_ref'). 5 rows are worked on here."
    ]


@pytest.mark.slow(reason="an environment with Databricks Connect")
def test_a_worker_with_our_package_does_the_work(pythons, tmp_path):
    with workspace(tmp_path / "workspace", pythons[1], PYTHONPATH=str(pythons[2])) as where:
        said = run_contract(pythons[0], tmp_path / "project", **where)
    hold(said, "check_work_on_rows")
    assert said["check_work_on_rows"]["facts"] == []


@pytest.mark.slow(reason="an environment with Databricks Connect")
def test_a_client_without_databricks_connect_says_so(pythons, tmp_path):
    ask = "from llmops_ref.core.config import load_config; from llmops_ref.core.workspace import open_workspace; import sys\n" \
          "open_workspace(load_config('dev', sys.argv[1], platform='databricks', store='/Volumes/a/b/c')).read('chunks')"
    done = subprocess.run([str(pythons[1]), "-c", ask, str(settings(tmp_path / "project"))], env=FREE | dict(PYTHONPATH=str(pythons[2])), capture_output=True, text=True)
    assert "UnityError: Spark on Databricks needs the package databricks-connect" in done.stderr and "DATABRICKS_WAREHOUSE_ID" in done.stderr


# --- a workspace of yours

def test_on_a_real_workspace(tmp_path):
    "The same contract; it makes tables in the schema that CONTRACT_CATALOG and CONTRACT_SCHEMA name, and drops them."
    missing = [name for name in ("DATABRICKS_HOST", "CONTRACT_CATALOG", "CONTRACT_SCHEMA", "CONTRACT_PYTHON") if not os.environ.get(name)]
    if missing:
        pytest.skip(f"needs a Databricks workspace: {', '.join(missing)} not there (CONTRACT_PYTHON is one with databricks-connect and our wheel)")
    theirs = {k: v for k, v in os.environ.items() if k.startswith(("DATABRICKS_", "CONTRACT_"))}
    wrong = {check: line["facts"] for check, line in run_contract(os.environ["CONTRACT_PYTHON"], tmp_path / "project", **theirs).items() if not line["ok"]}
    assert not wrong, wrong


# --- the page of an App, which has no Spark

@pytest.fixture
def app(plain, tmp_path, monkeypatch):
    "The workspace as an App has it, and as a job has it."
    for key in [k for k in os.environ if k.startswith(("DATABRICKS_", "SPARK_"))]: monkeypatch.delenv(key)
    for key in ("DATABRICKS_HOST", "DATABRICKS_TOKEN", "DATABRICKS_CONFIG_FILE"): monkeypatch.setenv(key, plain[key])
    config = load_config("dev", settings(tmp_path / "project"), platform="databricks", store="/Volumes/a/b/c", catalog="llmops_dev", schema="reference", corpus="packages")
    job = open_workspace(config)
    monkeypatch.setenv("SPARK_REMOTE", plain["SPARK_REMOTE"])
    assert job.spark is not None                        # opened before this is an App
    monkeypatch.delenv("SPARK_REMOTE")
    monkeypatch.setenv("DATABRICKS_APP_NAME", "chat")
    monkeypatch.setenv("DATABRICKS_WAREHOUSE_ID", "a1b2c3d4e5f6")
    page, here = open_workspace(config), open_workspace(load_config("dev", config.root, platform="local", store=str(tmp_path / "store")))
    page.mlflow = here.mlflow                           # what MLflow says of traces is in tests/test_feedback.py
    yield page, job
    job.spark.stop()                                    # else it says good-bye to a server that is gone, for ten minutes


def test_the_page_of_an_app_reads_and_reviews_through_a_warehouse(app):
    ws, job = app
    assert example_questions(ws) == [], "no table yet is no failure"
    job.write("questions", pd.DataFrame(dict(
        id=["q1", "q2"], question=["How do I log several metrics at once?", "How do I log a parameter?"], type="howto",
        gold=[["mlflow.log_metrics"], ["mlflow.log_param"]], answer="", split=["test", "train"],
    )))
    now = pd.Timestamp.now(tz="UTC").floor("us")
    job.add("feedback", pd.DataFrame([dict(
        feedback_id="f1", trace_id="tr-1", time=now, good=False, reason="wrong", comment="it's not so", correction="Use mlflow.log_param.", source="u",
    )]), "feedback_id")
    job.add("requests", pd.DataFrame([dict(trace_id="tr-1", time=now, question="How do I log it?", answer="You don't.", passages=[])]), "trace_id")
    assert example_questions(ws) == ["How do I log a parameter?"]
    page = TestClient(chat_app(ws, host=None, questions=example_questions(ws)))
    me = {"X-Forwarded-Email": "ada@acme.example"}
    waiting = page.get("/api/reviews", headers=me)
    assert waiting.status_code == 200, waiting.text
    assert [(row["feedback_id"], row["question"]) for row in waiting.json()["waiting"]] == [("f1", "How do I log it?")], waiting.json()
    accepted = page.post("/api/review", json=dict(feedback_id="f1", accept=False), headers=me)
    assert accepted.status_code == 200, accepted.text
    assert page.get("/api/reviews", headers=me).json()["waiting"] == []
    assert job.read("reviewed")[["id", "by", "accepted"]].values.tolist() == [["f1", "ada@acme.example", False]]


def test_an_app_without_a_warehouse_or_rights_says_which(app, plain, monkeypatch):
    ws, job = app
    page = TestClient(chat_app(ws, host=None))
    me = {"X-Forwarded-Email": "ada@acme.example"}
    rules = Path(plain["CONTRACT_RULES"])
    rules.write_text(json.dumps(dict(refuse=[dict(on="feedback", code="INTERNAL", message="[INSUFFICIENT_PERMISSIONS] User does not have SELECT.")])))
    try: refused = page.get("/api/reviews", headers=me)
    finally: rules.unlink()
    assert refused.status_code >= 400 and "GRANT USE CATALOG" in refused.json()["error"], refused.text
    monkeypatch.delenv("DATABRICKS_WAREHOUSE_ID")
    bare = TestClient(chat_app(open_workspace(ws.config), host=None)).get("/api/reviews", headers=me)
    assert "Add a resource `sql_warehouse`" in bare.json()["error"], bare.text
    assert example_questions(open_workspace(ws.config)) == [], "the page is there all the same"
