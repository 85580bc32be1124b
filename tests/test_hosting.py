"""Model Serving and Apps over a real socket: the SDK's own client, a service that reads every body with the SDK's own classes, and the registry of this machine."""
import contextlib, functools, os, shutil, uuid
from types import SimpleNamespace

import pytest
from databricks.sdk import WorkspaceClient
from databricks.sdk.service.serving import (
    EndpointCoreConfigInput, EndpointCoreConfigOutput, EndpointPendingConfig, EndpointState,
    EndpointStateConfigUpdate as Update, EndpointStateReady as Ready, ServedEntityInput, ServedEntityOutput,
    ServedModelState, ServingEndpointDetailed, TrafficConfig,
)
from databricks.sdk.service.catalog import ModelVersionInfo, PermissionsChange
from databricks.sdk.service.apps import (
    App, AppDeployment, AppDeploymentState, AppDeploymentStatus, ApplicationState, ApplicationStatus, ComputeState,
    ComputeStatus,
)

from conftest import ROOT
from llmops_ref.runner.bundle import destroy
from llmops_ref.core.config import SettingsError, load_config
from llmops_ref.deployment import check_traffic, hand_over, roll_out, smoke_test
from llmops_ref.release.champion import rollback
from llmops_ref.release.hosting import AppHost, ModelServingHost, endpoint_name
from llmops_ref.core.files import DataError
from llmops_ref.core.workspace import Workspace
from socket_workspace import BREAKS, MISSING, SocketWorkspace, on_a_socket, strict

QUESTION = "How do I log a metric?"
BUSY = 409, {"error_code": "RESOURCE_CONFLICT", "message": "Endpoint is currently being updated"}


class Serving(SocketWorkspace):
    "Endpoints of Model Serving. A version in `broken` is never built, one in `stuck` never gets ready, one in `silent` comes up and gives empty answers; a change of shares takes as many looks as `shares_take` says, one entry a change."
    prefix = "/"

    def __init__(self):
        super().__init__()
        self.endpoints, self.broken, self.stuck, self.silent, self.builds, self.turn, self.shares_take = {}, set(), set(), set(), 2, 0, []
        self.versions = {}                              # registered model -> numbers

    def answer(self, method, path, query, body):
        part = path.removeprefix("/api/2.0/").strip("/").split("/")
        if path.startswith("/api/2.1/unity-catalog/models/"): return self._models(method, *path.split("/")[5:])
        if part[0] != "serving-endpoints": return 404, {}                        # the SDK looks for the host's metadata
        if method == "POST" and len(part) == 1:
            if body["name"] in self.endpoints:
                return 400, {"error_code": "RESOURCE_ALREADY_EXISTS", "message": f"Endpoint {body['name']} exists."}
            self.endpoints[body["name"]] = dict(config={}, pending=body["config"], looks=0, update=Update.IN_PROGRESS, takes=self.builds)
            strict(EndpointCoreConfigInput, body["config"])
            return 200, self._shown(body["name"])
        if part[1] not in self.endpoints: return MISSING
        there = self.endpoints[part[1]]
        if method == "DELETE":
            del self.endpoints[part[1]]
            return 200, {}
        if method == "PUT":
            if there["update"] == Update.IN_PROGRESS: return BUSY
            for entity in body["served_entities"]: strict(ServedEntityInput, entity)
            assert sum(r["traffic_percentage"] for r in strict(TrafficConfig, body["traffic_config"]).as_dict()["routes"]) == 100
            new = {e["entity_version"] for e in body["served_entities"]} - {e["entity_version"] for e in there["config"]["served_entities"]}
            there |= dict(
                pending=body, looks=0, update=Update.IN_PROGRESS,
                takes=self.builds if new else self.shares_take.pop(0) if self.shares_take else 0,
            )
            return 200, self._shown(part[1])
        if method == "GET":
            self._build(there)
            return 200, self._shown(part[1])
        return self._ask(there, part[3] if part[2] == "served-models" else None, body)

    def _models(self, method, name, versions, number=None):
        if name not in self.versions: return MISSING
        if method == "DELETE":
            assert not self.endpoints, "a version that is served cannot be removed"
            self.versions[name].remove(int(number))
            return 200, {}
        return 200, dict(model_versions=[ModelVersionInfo(version=n).as_dict() for n in self.versions[name]])

    def _build(self, there):
        if there["update"] != Update.IN_PROGRESS: return
        there["looks"] += 1
        new = {e["entity_version"] for e in there["pending"]["served_entities"]} - {
            e["entity_version"] for e in there["config"].get("served_entities", [])
        }
        if new & self.broken and there["looks"] > 1: there |= dict(update=Update.UPDATE_FAILED, pending=None)
        elif there["looks"] > there["takes"] and not new & (self.stuck | self.broken):
            there |= dict(config=there["pending"], pending=None, update=Update.NOT_UPDATING)

    def _shown(self, name):
        there, message = self.endpoints[name], "pip could not install the requirements."
        def entities(config):
            return [
                ServedEntityOutput.from_dict(
                    e
                    | dict(
                        state=ServedModelState(deployment_state_message=message if e["entity_version"] in self.broken else None).as_dict()
                    )
                )
                for e in config.get("served_entities", [])
            ]
        def table(config): return TrafficConfig.from_dict(config["traffic_config"]) if "traffic_config" in config else None
        pending = there["pending"] and EndpointPendingConfig(
            served_entities=entities(there["pending"]), traffic_config=table(there["pending"])
        )
        return ServingEndpointDetailed(
            name=name,
            state=EndpointState(config_update=there["update"], ready=Ready.READY if there["config"] else Ready.NOT_READY),
            pending_config=pending or None,
            config=EndpointCoreConfigOutput(served_entities=entities(there["config"]), traffic_config=table(there["config"])),
        ).as_dict()

    def _ask(self, there, entity, body):
        assert body["input"][0]["role"] == "user" and set(body) == {"input", "custom_inputs"}
        if entity is None:
            routes = [r["served_entity_name"] for r in there["config"]["traffic_config"]["routes"] for _ in range(r["traffic_percentage"])]
            entity, self.turn = routes[37 * self.turn % 100], self.turn + 1
        version = next(e["environment_vars"]["ASSISTANT_VERSION"] for e in there["config"]["served_entities"] if e["name"] == entity)
        text = "" if version in self.silent else f"Call mlflow.log_metric [1], says version {version}."
        return 200, dict(
            output=[dict(type="message", content=[dict(type="output_text", text=text)])],
            custom_outputs=dict(version=version, passages=[dict(number=1)], citations=[1], seconds=0.1),
        )


@pytest.fixture
def serving(monkeypatch, clock):
    with on_a_socket(Serving(), monkeypatch) as state: yield state


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    "Three versions of an assistant in a registry of this machine; who serves them is another matter."
    root = tmp_path_factory.mktemp("registry")
    shutil.copy(ROOT / "settings.ini", root)
    ws = Workspace(load_config("prod", root))
    code = root / "model.py"
    code.write_text(
        "import mlflow\nclass Model(mlflow.pyfunc.PythonModel):\n    def predict(self, context, model_input: list[str]) -> list[str]:"
        " return model_input\nmlflow.models.set_model(Model())\n"
    )
    client = ws.mlflow()
    with client.start_run(): logged = client.pyfunc.log_model(name="assistant", python_model=str(code), pip_requirements=["mlflow"])
    for _ in range(3): client.register_model(logged.model_uri, ws.registered("assistant"))
    return root


def workspace(registry, **settings):
    return Workspace(
        load_config(
            "prod",
            registry,
            **dict(platform="databricks", store="stores/prod", rollout_steps=["10%", "50%"], rollout_questions=5, serving_timeout=60)
            | settings,
        )
    )


@pytest.fixture
def ws(registry):
    ws = workspace(registry)
    for name in ("champion", "previous"):
        if ws.alias("assistant", name, record=False):
            ws.mlflow().MlflowClient().delete_registered_model_alias(ws.registered("assistant"), name)
    return ws


def host_of(serving, ws): return ModelServingHost(ws, serving.client, poll=1.0)


@pytest.fixture
def clock(monkeypatch):
    "The host's own clock: a wait costs a look and no time, so that a busy machine gives up after as many looks as a quiet one."
    now = [0.0]
    def sleep(seconds): now[0] += seconds
    monkeypatch.setattr("llmops_ref.release.hosting.time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))


def deploy(host, ws, version):
    "What the stage does, in its order."
    host.start(version)
    smoke_test(functools.partial(host.ask, version=version, purpose="smoke test"), [QUESTION], 60)
    return hand_over(ws, host, version, [QUESTION] * 5)


def changes(serving):
    return [m for m, path, *_ in serving.asked if m in ("PUT", "DELETE") or m == "POST" and path == "/api/2.0/serving-endpoints"]


def test_first_version_rollout_and_rollback(serving, ws):
    "The endpoint is made when there is a version; the next one takes over in steps; going back builds nothing."
    host = host_of(serving, ws)
    assert deploy(host, ws, "1").empty and host.traffic() == {"1": 100} and ws.alias("assistant", "champion") == "1"
    entity = serving.endpoints[endpoint_name(ws.config)]["config"]["served_entities"][0]
    assert (
        entity["entity_name"] == "llmops_prod.reference.assistant"
        and entity["scale_to_zero_enabled"]
        and (entity["workload_size"], entity["workload_type"]) == ("Small", "CPU")
    )

    table = deploy(host, ws, "2")
    assert (
        list(dict.fromkeys(table.share)) == [0.1, 0.5, 1.0]
        and set(table[table.share == 0.1].version) == {"1", "2"}
        and set(table[table.share == 1.0].version) == {"2"}
    )
    assert host.traffic() == {"1": 0, "2": 100}, "the way back stays built, without traffic"

    serving.builds = 10 ** 6                            # from now on nothing can be built
    assert host.ask(QUESTION)["version"] == "2"
    version, asked, answer = rollback(ws, QUESTION, host, any_verdict=True)
    assert asked == QUESTION
    assert version == "1" and "says version 1" in answer and host.ask(QUESTION)["version"] == "1" and host.traffic() == {"1": 100, "2": 0}
    assert (ws.alias("assistant", "champion"), ws.alias("assistant", "previous")) == ("1", "2")

    serving.builds = 2
    deploy(host, ws, "3")
    assert host.traffic() == {"1": 0, "3": 100}, "what is two versions back is let go"


def test_a_version_gets_a_machine_that_holds_it(serving, ws, monkeypatch):
    "By its size; what is up keeps its own through every change; a version that fits nowhere is refused before anything is asked."
    host, sizes = host_of(serving, ws), {"1": 310.0, "2": 9000.0, "3": 500_000.0}
    monkeypatch.setattr(ModelServingHost, "_size_mb", lambda self, version: sizes[version])
    host.start("1")
    host.start("2")
    sizes["1"] = 9000.0                                 # whatever it is said to be now: it is up
    host.share({"1": 0.9, "2": 0.1})
    entities = serving.endpoints[endpoint_name(ws.config)]["config"]["served_entities"]
    assert {e["entity_version"]: e["workload_type"] for e in entities} == {"1": "CPU", "2": "GPU_SMALL"}
    before = changes(serving)
    with pytest.raises(SettingsError, match="needs about 601.0 GB of memory, and the largest type of Model Serving on aws"): host.start("3")
    assert changes(serving) == before and host.traffic() == {"1": 90, "2": 10}


def test_the_first_version_ever_that_fits_nowhere_makes_no_endpoint(serving, registry, monkeypatch):
    monkeypatch.setattr(ModelServingHost, "_size_mb", lambda self, version: 9000.0)
    with pytest.raises(SettingsError, match="`serving_type` = CPU has 4"): host_of(serving, workspace(registry, serving_type="CPU")).start("1")
    assert not changes(serving)
    host_of(serving, workspace(registry, serving_type="CPU_LARGE")).start("1")          # somebody knows better
    assert serving.endpoints[endpoint_name(workspace(registry).config)]["config"]["served_entities"][0]["workload_type"] == "CPU_LARGE"


def test_the_same_version_again_changes_nothing(serving, ws):
    host = host_of(serving, ws)
    deploy(host, ws, "1")
    serving.asked.clear()
    deploy(host, ws, "1")
    assert changes(serving) == []


def test_a_killed_rollout_is_set_right_by_the_next(serving, ws):
    host = host_of(serving, ws)
    deploy(host, ws, "1")
    host.start("2"); host.share({"1": 0.5, "2": 0.5})   # and here it was killed
    deploy(host, ws, "1")
    assert host.traffic() == {"1": 100, "2": 0} and ws.alias("assistant", "champion") == "1"


@pytest.mark.parametrize(
    "why, says",
    [
        ("broken", "did not take the change .*pip could not install the requirements. What served before goes on serving: version 1 100%"),
        ("stuck", "not ready after 10.* s .*Traffic at this moment: version 1 100%"),
    ],
)
def test_a_version_that_never_comes_up_changes_nothing(serving, registry, ws, why, says):
    deploy(host_of(serving, ws), ws, "1")
    getattr(serving, why).add("2")
    hasty = workspace(registry, serving_timeout=10)
    with pytest.raises(DataError, match=says): deploy(host_of(serving, hasty), hasty, "2")
    assert ws.alias("assistant", "champion") == "1" and host_of(serving, ws).ask(QUESTION)["version"] == "1"


def test_a_version_that_fails_under_traffic_gets_none(serving, ws):
    "It passes for the smoke test's questions and is silent later: all traffic goes back."
    host = host_of(serving, ws)
    deploy(host, ws, "1")
    host.start("2")
    serving.silent.add("2")
    check = lambda share: check_traffic(functools.partial(host.ask, purpose="rollout"), [QUESTION] * 5, 60, "2", share)
    with pytest.raises(DataError, match="ended at 50% of the traffic: Version 2 gave an empty answer"):
        roll_out(host.share, "1", "2", [0.5], check)
    assert host.traffic() == {"1": 100, "2": 0}


def test_a_step_that_takes_too_long_is_taken_back_when_it_arrives(serving, registry, ws):
    "The change of shares is still under way when the rollout gives up: it is waited for, and undone."
    deploy(host_of(serving, ws), ws, "1")
    host_of(serving, ws).start("2")
    hasty = workspace(registry, serving_timeout=30)
    host, serving.shares_take = host_of(serving, hasty), [45]
    with pytest.raises(DataError, match="ended at 10% of the traffic: .*not ready after 30.* s.*Version 1 has all of it again"):
        roll_out(host.share, "1", "2", [0.1], lambda share: None)
    assert host.traffic() == {"1": 100, "2": 0}


def test_going_back_on_another_machine_stands(serving, ws):
    "While version 3 takes over from 2, somebody goes back to 1: nothing more is shared, and 1 stays champion."
    host = host_of(serving, ws)
    deploy(host, ws, "1"); deploy(host, ws, "2")
    ask, asked = host.ask, []
    def interrupted(question, version=None, purpose="traffic"):
        if purpose == "rollout" and not asked:
            asked.append(question)
            rollback(ws, QUESTION, host_of(serving, ws), any_verdict=True)
        return ask(question, version, purpose)
    host.ask = interrupted
    with pytest.raises(DataError, match="Version 1 became champion while version 3 was taking over"): deploy(host, ws, "3")
    assert ws.alias("assistant", "champion") == "1" and host_of(serving, ws).traffic()["1"] == 100


def test_the_registry_fails_at_the_last_step(serving, ws, monkeypatch):
    "Traffic and alias go together: if the alias cannot be moved, the traffic goes back."
    host = host_of(serving, ws)
    deploy(host, ws, "1")
    def fails(*_): raise DataError("The registry is down.")
    monkeypatch.setattr("llmops_ref.deployment.make_champion", fails)
    with pytest.raises(DataError, match="ended at 100% of the traffic: The registry is down. Version 1 has all of it again"):
        deploy(host, ws, "2")
    assert host.traffic() == {"1": 100, "2": 0} and ws.alias("assistant", "champion") == "1"


def test_monitoring_brings_nothing_up(serving, ws):
    host = host_of(serving, ws)
    deploy(host, ws, "1")
    serving.asked.clear()
    host.reach("1")
    with pytest.raises(DataError, match="Version 2 is champion of prod, and is not up"): host.reach("2")
    assert changes(serving) == []


# --- an API that fails now and then

def test_a_create_that_breaks_off_after_it_worked(serving, ws):
    "The SDK asks again and is told that the endpoint exists: it is ours, and there is one."
    serving.refuse = [None, None, BREAKS]               # two looks, then the creation
    host = host_of(serving, ws)
    host.start("1")
    assert host.traffic() == {"1": 100} and changes(serving) == ["POST", "POST"] and len(serving.endpoints) == 1


def test_an_update_that_breaks_off_after_it_worked(serving, ws):
    host = host_of(serving, ws)
    host.start("1")
    serving.asked.clear()
    serving.refuse = [None, None, BREAKS]               # two looks, then the update
    host.start("2")
    assert changes(serving) == ["PUT", "PUT"] and host.traffic() == {"1": 100, "2": 0}


def test_a_busy_service_is_asked_again(serving, ws):
    serving.refuse = [None, None, (429, {"Retry-After": "0"}), (503, {"Retry-After": "0"})]
    host = host_of(serving, ws)
    host.start("1")
    assert changes(serving) == ["POST"] * 3 and host.traffic() == {"1": 100}


def test_two_deployments_at_once(serving, ws):
    "The second one is told, and does not touch what the first has begun."
    host = host_of(serving, ws)
    host.start("1")
    serving.endpoints[host.name] |= dict(
        update=Update.IN_PROGRESS,
        looks=-(10**6),
        pending=serving.endpoints[host.name]["config"]
        | dict(served_entities=[dict(name="assistant-9", entity_name="x", entity_version="9")]),
    )
    with pytest.raises(DataError, match="being changed by somebody else: Endpoint is currently being updated. Nothing was changed"):
        host.start("2")
    assert [e["entity_version"] for e in serving.endpoints[host.name]["pending"]["served_entities"]] == ["9"]


@pytest.mark.parametrize(
    "status, kind, says",
    [
        (403, SettingsError, "the right to manage it"),
        (500, DataError, "failed on the endpoint llmops-prod-reference-assistant: The service says no"),
    ],
)
def test_errors_are_ours(serving, ws, status, kind, says):
    serving.refuse = [(status, {})]
    with pytest.raises(kind, match=says): host_of(serving, ws).start("1")


def test_what_is_not_there(serving, ws):
    host = host_of(serving, ws)
    with pytest.raises(DataError, match="does not know the endpoint"): host.ask(QUESTION)
    with pytest.raises(DataError, match="nothing was ever deployed"): rollback(ws, QUESTION, host)
    host.start("1")
    with pytest.raises(DataError, match="Version 2 is not up at the endpoint .*It has version 1 100%"): host.share({"1": 0.5, "2": 0.5})


def test_destroy_removes_what_jobs_made(serving, registry, ws):
    "The endpoint goes, then the versions, without which a bundle removes no model; twice is no error, and what the bundle declares is named as left."
    host_of(serving, ws).start("1")
    there = workspace(registry, vector_index="faiss")
    assistant = there.registered("assistant")
    serving.versions = {assistant: [1, 2]}
    removed, left = destroy(there, serving.client)
    assert (
        removed == ["Model Serving endpoint llmops-prod-reference-assistant", f"2 versions of {assistant}"]
        and serving.endpoints == {}
        and serving.versions == {assistant: []}
    )
    assert "databricks bundle destroy -t prod" in left[0] and destroy(there, serving.client)[0] == []


# --- Apps

class Apps(SocketWorkspace):
    "One App at most, its deployments, what it may use, and the App itself, which lets in who has an OAuth token. A version in `broken` does not come up."
    prefix = "/"

    def __init__(self):
        super().__init__()
        self.app, self.deployments, self.granted, self.broken = None, [], [], set()

    def answer(self, method, path, query, body):
        if path == "/.well-known/databricks-config": return 200, dict(oidc_endpoint=f"{self.host}/oidc")
        here = self.host
        if path == "/oidc/.well-known/oauth-authorization-server":
            return 200, dict(authorization_endpoint=f"{here}/oidc/authorize", token_endpoint=f"{here}/oidc/token")
        if path == "/oidc/token": return 200, dict(access_token="oauth", token_type="Bearer", expires_in=3600)
        if path == "/app/responses":
            if self.authorization != "Bearer oauth": return 401, {}
            version = next(v.value for v in self.app.active_deployment.env_vars if v.name == "ASSISTANT_VERSION")
            return 200, dict(
                output=[dict(content=[dict(text=f"Version {version} says so.")])],
                custom_outputs=dict(version=version, passages=[], citations=[], seconds=0.1),
            )
        if path.startswith("/api/2.1/unity-catalog/permissions/"):
            self.granted.append((path.removeprefix("/api/2.1/unity-catalog/permissions/"), strict(PermissionsChange, body["changes"][0])))
            return 200, {}
        if not path.startswith("/api/2.0/apps"): return 404, {}
        part = path.removeprefix("/api/2.0/apps").strip("/").split("/")
        if method == "POST" and part == [""]:
            self.app = strict(App, body)
            self.app.compute_status, self.app.service_principal_client_id, self.app.url = (
                ComputeStatus(state=ComputeState.ACTIVE),
                "app-7",
                f"{here}/app",
            )
            return 200, self.app.as_dict()
        if self.app is None or part[0] != self.app.name: return MISSING
        if method == "POST" and part[1] == "start":
            self.app.compute_status = ComputeStatus(state=ComputeState.ACTIVE)
            return 200, self.app.as_dict()
        if method == "POST":
            made = strict(AppDeployment, body)
            version = next(v.value for v in made.env_vars if v.name == "ASSISTANT_VERSION")
            made.deployment_id, made.status = str(len(self.deployments)), AppDeploymentStatus(
                state=AppDeploymentState.FAILED if version in self.broken else AppDeploymentState.SUCCEEDED, message="It did not start."
            )
            self.deployments.append(made)
            if version not in self.broken:
                self.app.active_deployment, self.app.app_status = made, ApplicationStatus(state=ApplicationState.RUNNING)
            return 200, made.as_dict()
        if method == "DELETE":
            self.app = None
            return 200, {}
        return 200, self.deployments[int(part[2])].as_dict() if len(part) > 1 else self.app.as_dict()


@pytest.fixture
def apps(monkeypatch):
    with on_a_socket(Apps(), monkeypatch) as state:
        monkeypatch.setenv("APP_CLIENT_ID", "us"); monkeypatch.setenv("APP_CLIENT_SECRET", "secret")
        @contextlib.contextmanager                      # what a version says before the App has it
        def loaded(ws, version):
            yield lambda question: dict(
                question=question["question"], answer=f"Version {version} says so.", passages=[], citations=[], seconds=0.1
            )
        monkeypatch.setattr("llmops_ref.release.hosting.load_assistant", loaded)
        yield state


def test_an_app_from_its_first_version_to_the_way_back(apps, registry, ws):
    "It is made with the first version and what it may use; the next one is tried here first, and then deployed there; going back deploys the old one."
    one = workspace(registry, rollout_steps=[])
    host = AppHost(one, apps.client)
    deploy(host, one, "1")
    assert host.name == endpoint_name(one.config, 30) != endpoint_name(one.config) and len(host.name) <= 30
    assert apps.app.resources[0].experiment.experiment_id == ws.mlflow().get_experiment_by_name(ws.experiment).experiment_id
    (on, change), = set((name, c.principal) for name, c in apps.granted)
    assert (on, change) == ("schema/llmops_prod.reference", "app-7")
    assert {v.name: v.value for v in apps.deployments[0].env_vars}[
        "ASSISTANT_URI"
    ] == "models:/llmops_prod.reference.assistant/1" and apps.deployments[0].command == ["python", "app.py"]
    deploy(host, one, "1")
    assert len(apps.deployments) == 1, "the same version again is no deployment"
    deploy(host, one, "2")
    assert host.serves() == "2" and host.ask(QUESTION)["version"] == "2" and len(apps.deployments) == 2
    assert rollback(one, QUESTION, AppHost(one, apps.client), any_verdict=True)[0] == "1" and host.ask(QUESTION)["version"] == "1"


def test_an_app_that_does_not_come_up_gets_the_old_version_back(apps, registry, ws):
    one = workspace(registry, rollout_steps=[])
    host = AppHost(one, apps.client)
    deploy(host, one, "1")
    apps.broken.add("2")
    with pytest.raises(DataError, match="ended at 100% of the traffic: The workspace failed on the App .*Version 1 has all of it again"):
        deploy(host, one, "2")
    assert host.serves() == "1" and ws.alias("assistant", "champion") == "1"


def test_an_app_that_sleeps_is_woken(apps, registry, ws):
    one = workspace(registry, rollout_steps=[])
    host = AppHost(one, apps.client)
    deploy(host, one, "1")
    apps.app.compute_status, apps.app.app_status = ComputeStatus(state=ComputeState.STOPPED), ApplicationStatus(
        state=ApplicationState.UNAVAILABLE
    )
    assert host.serves() is None
    deploy(host, one, "1")
    assert host.serves() == "1" and apps.app.compute_status.state == ComputeState.ACTIVE


def test_what_an_app_cannot(apps, registry, ws, monkeypatch):
    one = workspace(registry, rollout_steps=[])
    with pytest.raises(SettingsError, match="Leave it empty"): AppHost(ws, apps.client).start("1")
    with pytest.raises(SettingsError, match="traffic cannot be shared"): AppHost(one, apps.client).share({"1": 0.5, "2": 0.5})
    monkeypatch.delenv("APP_CLIENT_ID")
    with pytest.raises(SettingsError, match="APP_CLIENT_ID is not set"): AppHost(one, apps.client).start("1")
    assert apps.app is None, "before anything is made"


# --- a workspace of yours

def test_on_a_real_workspace():
    "The same life of an endpoint, with two versions of a registered assistant of yours."
    needed = ("DATABRICKS_HOST", "LLMOPS_TEST_CATALOG", "LLMOPS_TEST_VERSIONS")
    if missing := [name for name in needed if not os.environ.get(name)]:
        pytest.skip(
            f"needs a Databricks workspace: {', '.join(missing)} not set (LLMOPS_TEST_CATALOG: a catalog with the registered model"
            " reference.assistant; LLMOPS_TEST_VERSIONS: two of its versions, such as 1,2)"
        )
    from llmops_ref.core.workspace import open_workspace
    host = ModelServingHost(
        open_workspace(load_config("staging", platform="databricks", catalog=os.environ["LLMOPS_TEST_CATALOG"])), WorkspaceClient()
    )
    host.name = f"llmops-test-{uuid.uuid4().hex[:8]}"   # not the one that people use
    old, new = os.environ["LLMOPS_TEST_VERSIONS"].split(",")
    try:
        host.start(old); host.start(new)
        assert host.ask(QUESTION, new)["version"] == new
        host.share({old: 0.5, new: 0.5})
        assert {host.ask(QUESTION)["version"] for _ in range(30)} == {old, new}
        host.share({old: 1.0})
        assert host.ask(QUESTION)["version"] == old
    finally: host.remove()
