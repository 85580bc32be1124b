"""Providers and the gateway over real sockets: every fault that a provider has, a real one that is killed, and Unity Gateway in the SDK's own types."""
import json, os, signal, threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import httpx, psutil, pytest
from databricks.sdk import WorkspaceClient
from databricks.sdk.service.catalog import ModelProviderService, ModelService
from langchain_core.exceptions import (
    ModelAPIError, ModelAuthenticationError, ModelConnectionError, ModelInvalidRequestError, ModelNotFoundError,
    ModelPermissionDeniedError, ModelRateLimitError, ModelTimeoutError,
)

from conftest import CACHE
from llmops_ref.assistant.chain import DIRECT_PROMPT, make_chain
from llmops_ref.assistant.versions import assistant_parts
from llmops_ref.core.config import SettingsError, load_config
from llmops_ref.models.gateway import gateway_endpoint, publish_gateway, workspace_services
from llmops_ref.models.llm import BadReply, Endpoint, chat_client
from llmops_ref.core.services import running_services, stop_services
from llmops_ref.core.workspace import open_workspace
from provider import FAULTS, Provider
from socket_workspace import MISSING, SocketWorkspace, on_a_socket, strict

EXPECTED = {
    "400": (ModelInvalidRequestError, 1), "401": (ModelAuthenticationError, 1), "403": (ModelPermissionDeniedError, 1),
    "404": (ModelNotFoundError, 1), "429": (ModelRateLimitError, 3), "429-after": (ModelRateLimitError, 3),
    "500": (ModelAPIError, 3), "503": (ModelAPIError, 3), "hang": (ModelTimeoutError, 3),
    "close": (ModelConnectionError, 3), "cut-json": (BadReply, 1), "html": (BadReply, 1),
    "empty-choices": (BadReply, 1), "null-content": (BadReply, 1),
}  # class, and how often the provider is asked with two retries


# --- one client, one provider

def client_of(provider, **more): return chat_client(Endpoint(provider.url, "large", "sk-right", "ACME_API_KEY"), timeout=1.0, **more)


def test_every_fault_is_in_the_table(): assert {*EXPECTED, "hang-mid-stream", "length"} == set(FAULTS)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("fault", EXPECTED)
def test_a_fault_has_its_class_and_is_retried_only_where_that_helps(fault, stream):
    kind, times = EXPECTED[fault]
    with Provider() as acme:
        acme.fault = fault
        with pytest.raises(kind) as caught: list(client_of(acme).stream("Hi")) if stream else client_of(acme).invoke("Hi")
        assert len(acme.asked) == times
    assert "large at http://127.0.0.1" in str(caught.value), "the error names the model and the address"
    if fault in ("401", "403"): assert "ACME_API_KEY" in str(caught.value) and "sk-right" not in str(caught.value)


def test_a_server_is_given_the_time_that_it_asks_for():
    with Provider() as acme:
        acme.faults = ["429-after"]
        assert client_of(acme).invoke("Hi").text == acme.answer
        first, second = (asked["at"] for asked in acme.asked)
        assert second - first >= 1.0, "Retry-After: 1"


def test_what_passes_is_retried():
    with Provider() as acme:
        acme.faults = ["503", "close"]
        assert client_of(acme).invoke("Hi").text == acme.answer and len(acme.asked) == 3


def test_nobody_there():
    with Provider() as gone: url = gone.url
    with pytest.raises(ModelConnectionError, match="Nothing answers at that address"):
        chat_client(Endpoint(url, "large"), retries=1).invoke("Hi")


def test_a_stream_that_hangs_gives_what_it_had_and_then_an_error():
    got = []
    with Provider() as acme:
        acme.fault = "hang-mid-stream"
        with pytest.raises(ModelTimeoutError):
            for chunk in client_of(acme).stream("Hi"): got.append(chunk.text)
    assert "".join(got) == "Use `mlflow.log_metric` "


def test_an_answer_that_was_cut_says_so():
    with Provider() as acme:
        acme.fault = "length"
        assert "answer" in make_chain(client_of(acme)).invoke({"question": "How?"})["cut"]


# --- the gateway, with a provider, another one, and a judge

def settings(tmp_path, first, second=None, **more):
    providers = [f"first={first.url}"] + ([f"second={second.url}"] if second else [])
    return load_config(
        "dev", store=str(tmp_path / "store"), cache=CACHE, gateway_models=["first/large"],
        gateway_fallbacks=["second/small"] if second else [], gateway_providers=providers, gateway_timeout=2, **more,
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "A gateway with a provider and a fallback; both may be given faults."
    with (
        pytest.MonkeyPatch.context() as patch,
        Provider("large", key="sk-planted-first") as first,
        Provider("small", "The small one answers.", key="sk-planted-second") as second,
    ):
        patch.setenv("FIRST_API_KEY", "sk-planted-first"); patch.setenv("SECOND_API_KEY", "sk-planted-second")
        folder = tmp_path_factory.mktemp("gateway")
        ws = open_workspace(settings(folder, first, second, prices=["large 1000/1000", "small 0/0"], gateway_budget=1.0))
        endpoint = gateway_endpoint(ws)
        yield ws, endpoint, first, second
        stop_services(ws)


@pytest.fixture
def route(two):
    ws, endpoint, first, second = two
    for provider in (first, second): provider.fault, provider.faults, provider.asked = None, [], []
    return endpoint, first, second


@pytest.mark.parametrize("fault", [f for f in EXPECTED if f != "400"])
def test_the_fallback_answers_in_the_place_of_a_broken_provider(route, fault):
    endpoint, first, second = route
    first.fault = fault
    reply = chat_client(endpoint, timeout=10).invoke("Hi")
    assert (reply.text, reply.response_metadata["model_name"]) == ("The small one answers.", "small")
    assert len(first.asked) == 1, "not asked again"


def test_the_keys_arrive_and_the_first_is_asked_first(route):
    endpoint, first, second = route
    reply = chat_client(endpoint).invoke("Hi")
    assert (reply.text, reply.response_metadata["model_name"]) == (first.answer, "large")
    assert first.asked[0]["headers"]["authorization"] == "Bearer sk-planted-first" and second.asked == []


def test_both_refuse_the_key(route):
    "A refused key is not tried again, neither by the gateway nor by the client."
    endpoint, first, second = route
    first.fault = second.fault = "401"
    with pytest.raises(ModelAuthenticationError, match="FIRST_API_KEY, SECOND_API_KEY"): chat_client(endpoint).invoke("Hi")
    assert (len(first.asked), len(second.asked)) == (1, 1)


def test_streamed_through_the_gateway(route):
    endpoint, first, second = route
    assert "".join(chunk.text for chunk in chat_client(endpoint).stream("Hi")).strip() == first.answer
    first.fault = "503"
    chunks = list(chat_client(endpoint).stream("Hi"))
    assert "".join(chunk.text for chunk in chunks).strip() == "The small one answers."
    first.fault = "hang-mid-stream"
    with pytest.raises((BadReply, ModelTimeoutError, ModelAPIError)): list(chat_client(endpoint, timeout=5).stream("Hi"))


def test_keys_are_nowhere_to_be_read(two):
    "Not on the disk, not in a command line; MLflow shows a mask."
    ws, endpoint, *_ = two
    chat_client(endpoint).invoke("Hi")
    for path in ws.store.rglob("*"):
        if path.is_file(): assert b"sk-planted" not in path.read_bytes(), path
    for service in running_services(ws):
        for process in (psutil.Process(service.pid), *psutil.Process(service.pid).children(recursive=True)):
            assert "sk-planted" not in " ".join(process.cmdline())
    listed = httpx.get(endpoint.base_url.replace("/gateway/mlflow/v1", "/api/3.0/mlflow/gateway/secrets/list")).text
    assert "first/large" in listed and "sk-planted" not in listed


def test_another_declaration_beside_it_takes_nothing_away(two, route, monkeypatch):
    ws, (endpoint, first, _) = two[0], route
    monkeypatch.setenv("LLMOPS_RUN", str(os.getppid()))        # another process, which lives
    other = open_workspace(replace(ws.config, gateway_fallbacks=[]))
    try:
        assert (there := gateway_endpoint(other)).base_url != endpoint.base_url and chat_client(there).invoke("Hi").text == first.answer
        assert chat_client(endpoint).invoke("Hi").text == first.answer
    finally: stop_services(other, os.getppid())
    first.fault = "503"
    assert chat_client(endpoint).invoke("Hi").text == "The small one answers."


def test_a_budget_that_is_used_up_refuses(route):
    "At 1,000 dollars a million tokens a dollar is 1,000 tokens. (The last test of this gateway.)"
    endpoint, first, second = route
    client, answered = chat_client(endpoint, retries=0), 0
    with pytest.raises(ModelRateLimitError, match="Budget limit exceeded"):
        for answered in range(40): client.invoke("word " * 60)
    assert 2 <= answered < 30
    with pytest.raises(ModelRateLimitError, match="budget is used up"): client.invoke("Hi")


def test_shares_and_a_guardrail(tmp_path, monkeypatch):
    "Traffic is shared as declared, and a request that a judge finds to break the rule reaches no provider."
    verdict = lambda text: json.dumps(dict(result="no" if "my boss" in text else "yes", rationale="It asks for a salary."))
    with Provider("large", key="k") as first, Provider("small", key="k") as second, Provider("judge", key="k") as judge:
        judge.answer_to = verdict
        for name in ("FIRST", "SECOND", "THIRD"): monkeypatch.setenv(f"{name}_API_KEY", "k")
        config = load_config(
            "dev", store=str(tmp_path / "store"), cache=CACHE, gateway_models=["first/large 80%", "second/small 20%"],
            gateway_providers=[f"first={first.url}", f"second={second.url}", f"third={judge.url}"],
            gateway_guardrail="The request must not ask for a salary.", gateway_judge="third/judge",
        )
        ws = open_workspace(config)
        try:
            client = chat_client(gateway_endpoint(ws), retries=0)
            for _ in range(60): client.invoke("Hi")
            assert len(first.asked) + len(second.asked) == 60 and 0 < len(second.asked) < len(first.asked)
            with pytest.raises(ModelInvalidRequestError, match="Guardrail 'rule' blocked: It asks for a salary"):
                client.invoke("What is the salary of my boss?")
            assert len(first.asked) + len(second.asked) == 60
        finally: stop_services(ws)


# --- real models, one of which dies

@pytest.fixture
def agent(tmp_path, monkeypatch):
    "The agent as MLflow serves it, without an index, behind a gateway with two real models; and its workspace."
    from llmops_ref.assistant.agent import AssistantAgent
    config = load_config(
        "dev", app="third_party", store=str(tmp_path / "store"), cache=CACHE, gateway_models=["local/smollm2-q8_0"],
        gateway_fallbacks=["local/smollm2-q4_1"], retrieval="off", chat_slots=2, chat_max_tokens=2,
    )
    ws = open_workspace(config)
    try:
        monkeypatch.setenv("ASSISTANT_GATEWAY_URL", gateway_endpoint(ws).base_url)
        ws.mlflow()
        served = AssistantAgent()
        served.load_context(SimpleNamespace(model_config=assistant_parts(ws, DIRECT_PROMPT)[0], artifacts={}))
        yield served, ws
    finally: stop_services(ws)
    assert running_services(ws) == []


@pytest.mark.parametrize("requests", [40, pytest.param(200, marks=pytest.mark.slow(reason="the same for as long as it takes"))])
def test_the_primary_is_killed_in_the_middle_of_many_requests(agent, requests):
    "None is lost, and each trace says who served it."
    served, ws = agent
    before = 3 * requests // 10
    primary, done = next(s for s in running_services(ws) if s.name.endswith("smollm2-q8_0")), threading.Semaphore(0)
    def ask(n):
        try: return served.predict(dict(input=[dict(role="user", content=f"What is {n} plus {n}?")]))
        finally: done.release()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, n) for n in range(requests)]
        for _ in range(before): done.acquire()
        os.kill(primary.pid, signal.SIGKILL)
        answers = [answer.result() for answer in answers]
    assert len(answers) == requests and all(answer.output[0].content[0]["text"] for answer in answers)
    traces = ws.mlflow().search_traces(
        locations=[ws.mlflow().get_experiment_by_name(ws.experiment).experiment_id], max_results=500, return_type="list"
    )
    by = [trace.info.tags["served_by"] for trace in sorted(traces, key=lambda trace: trace.info.request_time)]
    assert len(by) == requests and set(by) == {"smollm2-q8_0", "smollm2-q4_1"} and by[0] == "smollm2-q8_0" and by[-1] == "smollm2-q4_1"
    assert by.count("smollm2-q8_0") >= before and all(
        trace.info.state.value == "OK" and float(trace.info.tags["cost_usd"]) > 0 for trace in traces
    )


# --- Unity Gateway

class Catalog(SocketWorkspace):
    "Model provider services and model services, as Unity Catalog keeps them."
    prefix = "/api/2.1/unity-catalog/"

    def __init__(self):
        super().__init__()
        self.kept = {}

    def answer(self, method, path, query, body):
        name = path.removeprefix("/api/2.1/unity-catalog/")
        if method == "POST":
            kind = dict(zip(("model-provider-services", "model-services"), (ModelProviderService, ModelService)))[name]
            made = strict(kind, body)
            name = f"{name}/{query['parent'][0].removeprefix('schemas/')}.{query[name.replace('-', '_')[:-1] + '_id'][0]}"
            self.kept[name] = made.as_dict() | dict(name=name, created_by="me")
        elif name not in self.kept: return MISSING
        elif method == "PATCH":
            assert query["update_mask"] == ["config"]
            self.kept[name] |= body
        return 200, self.kept[name]


@pytest.fixture
def catalog(monkeypatch):
    with on_a_socket(Catalog(), monkeypatch) as state:
        monkeypatch.setenv("DATABRICKS_HOST", state.client.config.host); monkeypatch.setenv("DATABRICKS_TOKEN", "dapi-x")
        yield state


def on_databricks(**more):
    return load_config(
        "prod",
        **(
            dict(
                platform="databricks", store="/Volumes/a/b/c",
                gateway_models=["openai/gpt-5-mini 90%", "anthropic/claude-haiku-4-5 10%"],
                gateway_fallbacks=["databricks/databricks-gpt-oss-20b"],
            )
            | more
        ),
    )


def test_unity_gateway_is_made_once_and_then_follows_the_declaration(catalog):
    assert set(publish_gateway(catalog.client, on_databricks()).values()) == {"created"}
    route = catalog.kept["model-services/llmops_prod.reference.assistant"]["config"]["routing"]
    assert [(d["name"], d["traffic_percentage"]) for d in route["destinations"]] == [
        ("openai-gpt-5-mini", 90),
        ("anthropic-claude-haiku-4-5", 10),
    ]
    assert route["fallback"]["destinations"][0]["pay_per_token_config"] == {"model": "models/system.ai.databricks-gpt-oss-20b"}
    assert "secrets/llmops_prod.reference.openai_api_key" in json.dumps(catalog.kept) and "plaintext" not in json.dumps(
        catalog.kept
    ), "keys go by reference"
    catalog.asked.clear()
    assert set(publish_gateway(catalog.client, on_databricks()).values()) == {"unchanged"}
    assert {method for method, *_ in catalog.asked} == {"GET"}
    changed = publish_gateway(catalog.client, on_databricks(gateway_models=["openai/gpt-5-mini 50%", "anthropic/claude-haiku-4-5 50%"]))
    assert [name for name, what in changed.items() if what == "updated"] == ["model-services/llmops_prod.reference.assistant"]


def test_the_route_of_a_workspace_is_an_endpoint(catalog):
    endpoint = gateway_endpoint(open_workspace(on_databricks()))
    assert (
        endpoint.base_url == f"{os.environ['DATABRICKS_HOST']}/ai-gateway/mlflow/v1" and endpoint.model == "llmops_prod.reference.assistant"
    )
    assert endpoint.api_key() == "dapi-x" and endpoint.backup.model == "llmops_prod.reference.assistant_backup"


def test_what_unity_gateway_lacks_is_said(catalog):
    with pytest.raises(SettingsError, match="set a budget policy"): workspace_services(on_databricks(gateway_budget=5.0))


def test_a_real_workspace():
    "The same declaration, on a workspace of yours."
    missing = [name for name in ("DATABRICKS_HOST", "LLMOPS_TEST_GATEWAY_SCHEMA") if not os.environ.get(name)]
    if missing:
        pytest.skip(
            f"needs a Databricks workspace: {', '.join(missing)} not set (LLMOPS_TEST_GATEWAY_SCHEMA: catalog.schema in which services may"
            " be made)"
        )
    catalog, schema = os.environ["LLMOPS_TEST_GATEWAY_SCHEMA"].split(".")
    config = on_databricks(catalog=catalog, schema=schema, gateway_models=["databricks/databricks-gpt-oss-20b"], gateway_fallbacks=[])
    publish_gateway(WorkspaceClient(), config)
    assert chat_client(gateway_endpoint(open_workspace(config))).invoke("What is the capital of France? Answer in one word.").text
