"""The smoke job: here all its checks for real, and against a workspace on a socket that refuses in each of the ways that we know of."""
import json, os, shutil, socket, subprocess, sys

import pytest
from databricks.sdk.service import catalog as uc, serving, vectorsearch
from databricks.sdk.service.jobs import Run

from conftest import CACHE, ROOT
from llmops_ref.core.client import REMEDIES, brief_client
from llmops_ref.core.config import SettingsError, load_config
from llmops_ref.core.files import DataError
from llmops_ref.core.workspace import open_workspace
from llmops_ref.evaluation.judges import check_judges
from llmops_ref.kit.doctor import check_workspace
from llmops_ref.release.hosting import asking_for
from llmops_ref.runner.bundle import load_bundle
from llmops_ref.runner import smoke
from llmops_ref.runner.plan import check_databricks
from llmops_ref.runner.smoke import CHECKS, IN_A_KERNEL, Row, keep_rows, rows_of_run, try_check, verdict_task
from socket_workspace import MISSING, SocketWorkspace, on_a_socket, strict
from test_bundle import VALUES, Emulator

ME = "ada.lovelace@acme.example"


# --- for real, on this machine

@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    "The job on an emulated workspace, which starts each task as a process of this machine; the store, and what each task said."
    folder = tmp_path_factory.mktemp("smoke")
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("LLMOPS_", "MLFLOW_", "DATABRICKS_"))}
    emulator = Emulator(folder, keep | dict(PYTHONPATH=str(ROOT), LLMOPS_CACHE=CACHE))
    try:
        files = emulator.upload(load_bundle(ROOT, "staging", VALUES).workspace["file_path"])
        words = dict(env="staging", root=files, platform="local", store=folder / "store", commit="0123456789ab", vector_index="faiss",
                     embedder="int8", embedder_model="auto", models="data/models.toml", serving_token="", serving_target="model_serving")
        said = dict(settings=" ".join(f"{k}='{v}'" for k, v in words.items()), handed_over=f"{folder}/store/handed_over")
        job = load_bundle(ROOT, "staging", VALUES | said).resources["jobs"]["smoke"]
        gpu = next(task for task in job["tasks"] if task["task_key"] == "gpu")
        gpu["depends_on"] = [dict(task_key="checks")]                           # minilake knows no conditions
        yield folder / "store", emulator.run(job)
    finally: emulator.process.terminate(); emulator.process.wait(); emulator.log.close()


def test_the_whole_job_on_this_machine(ran):
    "From a kernel of papermill that a task starts: each check that has a meaning here passes, and nothing of it stays."
    store, ended = ran
    assert {name: end for name, (end, _) in ended.items()} == dict.fromkeys(("checks", "gpu", "verdict"), "SUCCESS"), ended
    report = json.loads((store / "smoke" / "report.json").read_text())
    rows = {row["check"]: row for row in report["rows"]}
    assert list(rows) == [*IN_A_KERNEL, "task values", "GPU"] and (report["env"], report["commit"]) == ("staging", "0123456789ab")
    skipped = {"login", "secret", "AI Search", "serving", "GPU"}
    assert {name: row["state"] for name, row in rows.items()} == {name: "skipped" if name in skipped else "passed" for name in rows}, rows
    assert "1 new, 1 changed, 1 gone" in rows["table"]["seen"] and "passed" in ended["verdict"][1]
    assert json.loads((store / "handed_over" / "smoke.json").read_text()) == dict(smoke="seen", gpu="false")
    assert not list((store / "tables").iterdir()) and not list((store / "smoke").glob("probe-*"))


def test_a_kernel_that_dies_keeps_the_rows_before_it(tmp_path, monkeypatch):
    "Out of memory, as the system does it: what was seen until then is in the report, and the death is a row."
    monkeypatch.setattr(smoke, "CODE", f"{smoke.CODE}\nimport os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    rows = smoke.checks_in_a_kernel(open_workspace(load_config("dev", ROOT, platform="local", store=str(tmp_path))), ["file", "folder"])
    assert [(row.check, row.state) for row in rows] == [("file", "passed"), ("folder", "passed"), ("papermill", "failed")]
    assert "kernel died" in rows[-1].seen and "after 2 checks" in rows[-1].fix


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="a file system of a few kilobytes takes a namespace, which this system does not give",
)
def test_a_volume_that_is_full(tmp_path):
    "It is told as such, by each check that writes, and the verdict says it although it can write no report."
    code = f"""
from llmops_ref.core.config import load_config
from llmops_ref.core.files import DataError
from llmops_ref.core.workspace import open_workspace
from llmops_ref.runner import smoke
ws = open_workspace(load_config("dev", {str(ROOT)!r}, platform="local", store={str(tmp_path)!r}))
for name in ("file", "folder", "mapped file"):
    row = smoke.try_check(smoke.CHECKS[name], ws)
    print(row.state, row.check, row.seen, row.fix, sep="|")
(ws.store / "filler").write_bytes(b"x" * ((ws.store / "filler").write_bytes(b"") or 200_000))
try: smoke._hand_on(ws, "checks", [row], "77")
except DataError as error: print(error)
"""
    small = 'mount -t tmpfs -o size=256k tmpfs "$0" && exec "$@"'
    words = ["unshare", "-rm", "sh", "-c", small, tmp_path, sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    lines = [line.split("|") for line in done.stdout.splitlines() if "|" in line]
    assert [line[:2] for line in lines] == [["failed", "file"], ["passed", "folder"], ["failed", "mapped file"]], done.stdout + done.stderr
    assert all("No space left on device" in line[2] and line[3].startswith("The Volume is full. Delete old runs") for line in lines[::2])


# --- a workspace that refuses

class Refusing(SocketWorkspace):
    "A workspace of Ada's in which all is well, until `says` answers a path otherwise."
    prefix = "/"                                        # an endpoint is asked outside of /api/

    def __init__(self):
        super().__init__()
        self.says, self.report = {}, None

    def answer(self, method, path, query, body):
        for ending, answer in self.says.items():
            if path.endswith(ending): return answer
        if path.endswith("/scim/v2/Me"): return 200, dict(userName=ME, groups=[])
        if path.endswith("/catalogs/acme_dev"): return 200, strict(uc.CatalogInfo, dict(name="acme_dev", owner="root")).as_dict()
        if "/effective-permissions/" in path:
            held = dict(principal=ME, privileges=[dict(privilege=p) for p in ("USE_CATALOG", "CREATE_SCHEMA")])
            return 200, strict(uc.EffectivePermissionsList, dict(privilege_assignments=[held])).as_dict()
        if path.endswith("/vector-search/endpoints"):
            return 200, strict(vectorsearch.ListEndpointResponse, dict(endpoints=[dict(name="acme")])).as_dict()
        if path.endswith("/serving-endpoints/gte/invocations"):
            vectors = [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]
            data = [dict(index=i, object="embedding", embedding=vector) for i, vector in enumerate(vectors)]
            return 200, strict(serving.QueryEndpointResponse, dict(data=data)).as_dict()
        if path.endswith("/serving-endpoints"): return 200, dict(endpoints=[])
        if path.endswith("/files/smoke/report.json") and self.report: return 200, self.report
        return MISSING


@pytest.fixture
def service(monkeypatch):
    with on_a_socket(Refusing(), monkeypatch) as state:
        monkeypatch.setenv("DATABRICKS_HOST", state.host)
        monkeypatch.setenv("DATABRICKS_TOKEN", "x")
        yield state


@pytest.fixture
def ws(tmp_path):
    settings = dict(catalog="acme_dev", vector_index="delta_sync", ai_search_endpoint="acme", ai_search_embedding="gte", serving_token="")
    return open_workspace(load_config("dev", ROOT, platform="databricks", **settings))


def made(ws, name): return try_check(CHECKS[name], ws)


def test_what_is_asked_of_a_workspace(service, ws):
    "The SDK's own client asks a socket: who we are, AI Search, where is served, the endpoint that embeds."
    rows = {name: made(ws, name) for name in ("login", "AI Search", "serving", "embedder")}
    assert {row.state for row in rows.values()} == {"passed"}, rows
    assert ME in rows["login"].seen and "acme is there" in rows["AI Search"].seen and rows["embedder"].seen == "gte, 2 numbers a text"


def no(status, code, message): return status, dict(error_code=code, message=message)


@pytest.mark.parametrize(
    "check, path, answer, fix",
    [
        (
            "AI Search", "/vector-search/endpoints",
            no(400, "FEATURE_DISABLED", "Vector Search is not enabled in this region."), "vector_index = faiss in [dev]",
        ),
        ("AI Search", "/vector-search/endpoints", no(404, "ENDPOINT_NOT_FOUND", "No API found"), "in a region that has it"),
        ("AI Search", "/vector-search/endpoints", no(403, "PERMISSION_DENIED", "No permission"), "CAN USE on acme"),
        ("embedder", "/gte/invocations", no(404, "RESOURCE_DOES_NOT_EXIST", "Endpoint gte does not exist."), "`ai_search_embedding`"),
        ("embedder", "/gte/invocations", no(403, "PERMISSION_DENIED", "No permission"), "CAN QUERY on the endpoint gte"),
        ("embedder", "/gte/invocations", no(403, "PERMISSION_DENIED", "The access token has expired"), "run it again"),
        ("login", "/scim/v2/Me", no(401, "UNAUTHENTICATED", "Credential was not sent"), "databricks auth login"),
        ("login", "/scim/v2/Me", no(403, "PERMISSION_DENIED", "Invalid access token: Token is expired"), "run it again"),
    ],
)
def test_each_refusal_names_what_is_missing(service, ws, check, path, answer, fix):
    service.says[path] = answer
    row = made(ws, check)
    assert row.state == "failed" and answer[1]["message"].split(":")[0].rstrip(".") in row.seen and fix in row.fix + row.seen, row


class Spark:
    "A session that refuses, in Spark's words."
    def __init__(self, words): self.words = words
    def createDataFrame(self, *_): raise RuntimeError(self.words)
    def sql(self, *_): raise RuntimeError(self.words)


@pytest.mark.parametrize(
    "words, fix",
    [
        ("[NO_SUCH_CATALOG_EXCEPTION] Catalog 'acme_dev' was not found.", "CREATE CATALOG acme_dev"),
        ("[INSUFFICIENT_PERMISSIONS] User does not have CREATE TABLE on Schema 'acme_dev.reference'.", "CREATE TABLE"),
        ("[QUOTA_EXCEEDED] Cannot create 1 table: limit 10000 reached", "llmops doctor --databricks"),
    ],
)
def test_a_table_that_cannot_be_made(ws, monkeypatch, words, fix):
    monkeypatch.setattr(type(ws), "spark", Spark(words))
    row = made(ws, "table")
    assert row.state == "failed" and row.seen.endswith(words) and fix in row.fix, row


def test_without_a_session_it_says_what_the_environment_lacks(ws, monkeypatch):
    monkeypatch.setitem(sys.modules, "databricks.connect", None)
    row = made(ws, "session")
    assert row.state == "failed" and "databricks-connect" in row.fix, row


# --- what the service says of a run

def a_run(*tasks): return Run.from_dict(strict(Run, dict(run_id=77, tasks=list(tasks))).as_dict())


def a_task(key, result="SUCCESS", message="", **more):
    ended = dict(life_cycle_state="TERMINATED", result_state=result) if result else dict(life_cycle_state="RUNNING")
    return dict(task_key=key, state=ended | dict(state_message=message)) | more


def a_condition(outcome):
    return a_task("value_is_seen", condition_task=dict(op="EQUAL_TO", left="", right="seen", outcome=outcome))


@pytest.mark.parametrize(
    "tasks, failed",
    [
        ([a_task("checks"), a_condition("true"), a_task("gpu", "EXCLUDED"), a_task("verdict")], {}),
        ([a_task("checks"), a_condition("false"), a_task("gpu", "EXCLUDED")], {"condition": "`value_is_seen`"}),
        (
            [a_task("checks"), a_condition("true"), a_task("gpu", "FAILED", "GPU_1xA10 is not available in region eu-north-1")],
            {"task gpu": "finetune = off in [dev]"},
        ),
        ([a_task("checks", "FAILED", "Library installation failed"), a_task("gpu", "UPSTREAM_FAILED")], {"task checks": "`environments`"}),
        ([a_task("checks", "TIMEDOUT")], {"task checks": "its log"}),
    ],
)
def test_what_the_service_knows_of_a_run(ws, tasks, failed):
    "A condition that saw nothing, a region without serverless GPU, an environment that could not be made."
    rows = {row.check: row for row in rows_of_run(a_run(*tasks), ws.config)}
    assert {name for name, row in rows.items() if row.state == "failed"} == set(failed)
    assert all(fix in rows[name].fix for name, fix in failed.items()), rows


def test_the_verdict_names_all_that_failed(service, ws, tmp_path):
    "What the tasks saw and what the service says of the run, in one report and one message; fixed, it passes."
    ws.store = tmp_path
    run = a_run(a_task("checks"), a_condition("false"), a_task("gpu", "EXCLUDED"), a_task("verdict", None))
    service.says["/jobs/runs/get"] = 200, {k: v for k, v in run.as_dict().items()}
    keep_rows(ws, "checks", [Row("kernel", "passed", "Python 3.12.3"), Row("secret", "failed", "no scope", "create-scope acme")], "77")
    keep_rows(ws, "gpu", [Row("GPU", "failed", "of yesterday")], "76")
    with pytest.raises(DataError, match="(?s)2 of 3 checks failed.*create-scope acme.*condition") as error: verdict_task(ws, "77")
    report = json.loads((tmp_path / "smoke" / "report.json").read_text())
    assert "yesterday" not in str(error.value) and [row["check"] for row in report["rows"]] == ["kernel", "secret", "condition"]
    service.says["/jobs/runs/get"] = 200, a_run(a_task("checks"), a_condition("true"), a_task("verdict", None)).as_dict()
    keep_rows(ws, "checks", [Row("kernel", "passed", "Python 3.12.3")], "77")
    assert [row.state for row in verdict_task(ws, "77")] == ["passed", "passed"]
    service.says["/jobs/runs/get"] = no(403, "PERMISSION_DENIED", "No permission to view the run")
    with pytest.raises(DataError, match="No permission to view"): verdict_task(ws, "77")


def test_the_job_is_what_the_tasks_expect():
    "Conditions read the values that are left, the tasks are those that a task can run, and a GPU is asked for last, as by fine-tuning."
    from llmops_ref.runner.smoke import GPU_WANTED, SEEN, SMOKE, _TASKS
    for target in ("dev", "staging", "prod"):
        jobs = load_bundle(ROOT, target, VALUES).typed()["jobs"]
        tasks, tuning = ({task.task_key: task for task in jobs[name].tasks} for name in ("smoke", "finetune"))
        left = [tasks[key].condition_task.left for key in ("value_is_seen", "gpu_is_asked_for")]
        assert left == [f"{{{{tasks.values.values.{name}}}}}" for name in (SEEN, GPU_WANTED)] and _TASKS.keys() <= tasks.keys()
        assert tasks["value_is_seen"].condition_task.right == "seen" and tasks["verdict"].run_if.value == "ALL_DONE"
        assert {d.task_key: d.outcome for d in tasks["gpu"].depends_on} == {"gpu_is_asked_for": "true"}
        assert all(task.timeout_seconds <= 1800 and not task.max_retries for task in tasks.values() if not task.condition_task)
        asked, wanted = (t["gpu" if t is tasks else "finetune"].ai_runtime_task.deployments[0].compute for t in (tasks, tuning))
        assert asked == wanted and tasks["gpu"].environment_key == tuning["finetune"].environment_key
        told = [task.spark_python_task.parameters for task in tasks.values() if task.spark_python_task]
        assert [words[0] for words in told] == ["smoke", "smoke_verdict"] and all("run={{job.run_id}}" in words for words in told)
        file = load_config(target, ROOT, **load_bundle(ROOT, target, VALUES).settings()).store + "/handed_over/smoke.json"
        assert tasks["values"].notebook_task.base_parameters == dict(file=file)
    assert " smoke_gpu " in (ROOT / "resources" / "runtime" / "smoke.sh").read_text() and len(SMOKE) == 3


# --- doctor

def findings(config): return {f.about: f for f in check_workspace(config)}


@pytest.fixture
def dev(monkeypatch):
    monkeypatch.delenv("LLMOPS_SCHEMA", raising=False)
    return load_config("dev", ROOT, platform="databricks", catalog="acme_dev")


def test_doctor_reads_the_report(service, dev):
    "Of the copy with the developer's name on it, and says how to get one where there is none."
    found = findings(dev)
    assert found["smoke job"].state == "note" and "databricks bundle run smoke -t dev" in found["smoke job"].fix
    assert any(f"/dev_ada_lovelace_{dev.schema}/" in path for _, path, *_ in service.asked if "report.json" in path)
    rows = [vars(Row("file", "passed", "1 MB")), vars(Row("GPU", "failed", "PyTorch finds no GPU", "Take another --var gpu."))]
    service.report = dict(env="dev", made=1764500000.0, commit="0123456789ab", run="77", rows=rows)
    found = findings(dev)
    assert (found["smoke job"].state, found["smoke: file"].state, found["smoke: GPU"].state) == ("fail", "ok", "fail")
    assert found["smoke: GPU"].fix == "Take another --var gpu."


@pytest.mark.parametrize(
    "path, answer, about, says",
    [
        ("/catalogs/acme_dev", no(404, "CATALOG_DOES_NOT_EXIST", "'acme_dev' does not exist."), "catalog", "CREATE CATALOG acme_dev"),
        (
            "/effective-permissions/CATALOG/acme_dev", (200, dict(privilege_assignments=[])), "rights in acme_dev",
            f"GRANT USE CATALOG, CREATE SCHEMA ON CATALOG acme_dev TO `{ME}`",
        ),
        ("/scim/v2/Me", no(403, "PERMISSION_DENIED", "Token is expired"), "login", "databricks auth login"),
    ],
)
def test_doctor_before_anything_is_made(service, dev, path, answer, about, says):
    "A catalog that is not there, no right to create a schema, a login that has ended."
    service.says[path] = answer
    found = findings(dev)[about]
    assert found.state == "fail" and says in found.fix, found


def test_a_second_developer_with_the_same_short_name(service, dev):
    schema = f"dev_ada_lovelace_{dev.schema}"
    service.says[f"/schemas/acme_dev.{schema}"] = 200, dict(name=schema, owner="ada.lovelace@partner.example")
    found = findings(dev)["your copy"]
    assert found.state == "fail" and "ada.lovelace@partner.example" in found.found and "name_prefix" in found.fix
    service.says[f"/schemas/acme_dev.{schema}"] = 200, dict(name=schema, owner=ME)
    assert "your copy" not in findings(dev)


def test_a_command_line_that_is_too_old(service, dev, tmp_path, monkeypatch):
    command = tmp_path / "databricks"
    command.write_text("#!/bin/sh\necho 'Databricks CLI v0.229.0'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = findings(dev)["databricks command"]
    assert found.state == "fail" and "v0.229.0, older than 1." in found.found


# --- in the middle of a stage, and nobody there

def test_a_token_that_expires_in_the_middle_of_a_stage(service):
    "It is no missing right, and what is done is not lost: the message says so."
    service.says["/serving-endpoints"] = no(403, "PERMISSION_DENIED", "Invalid access token: Token is expired")
    with pytest.raises(SettingsError, match="Token is expired. The login has ended") as error, asking_for("the endpoint assistant"):
        list(service.client.serving_endpoints.list())
    assert REMEDIES["expired"] in str(error.value) and "Ask its owner" not in str(error.value)
    service.says["/serving-endpoints"] = no(403, "PERMISSION_DENIED", "User has no access")
    with pytest.raises(SettingsError, match="Ask its owner"), asking_for("the endpoint assistant"):
        list(service.client.serving_endpoints.list())


def test_a_judge_on_a_workspace_is_looked_for_first(service):
    "Before a run begins, as the index is: the SDK would wait for minutes in the middle of it."
    judged = open_workspace(load_config("dev", ROOT, platform="local", judge_model="databricks:/large", judge_url=""))
    assert check_judges(judged) is None
    service.says["/scim/v2/Me"] = no(403, "PERMISSION_DENIED", "Token is expired")
    with pytest.raises(SettingsError, match="databricks:/large.*Or set a model of another provider"): check_judges(judged)
    patience = brief_client().config
    assert patience.retry_timeout_seconds + patience.http_timeout_seconds <= 20


def test_nobody_waits_for_minutes(monkeypatch):
    "A host that takes the connection and says nothing: each check gives up by itself, in the time that it was given."
    for key in [k for k in os.environ if k.startswith("DATABRICKS_")]: monkeypatch.delenv(key)
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("DATABRICKS_TOKEN", "x")
    monkeypatch.setattr("databricks.sdk.retries.random", lambda: 0)
    short = brief_client
    monkeypatch.setattr("llmops_ref.core.client.brief_client", lambda seconds=10: short(1))
    config = load_config("dev", ROOT, platform="databricks", vector_index="delta_sync", catalog="acme_dev")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("DATABRICKS_HOST", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(SettingsError, match="Nobody answers there.* Or set vector_index = faiss"): check_databricks(config)
        assert {f.about: f.fix for f in check_workspace(config)} == {"login": REMEDIES["unreachable"]}
