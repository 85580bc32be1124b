"""Nothing leaves this machine by itself, and what goes to this machine itself passes no proxy; what goes outside takes it."""
import json, os, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import grpc, httpx, pytest, requests
from langchain_core.exceptions import ModelConnectionError

from conftest import BIN, PATIENCE, ROOT
from llmops_ref.core.client import brief_client
from llmops_ref.core.config import LOOPBACK, SettingsError, load_config, stay_private
from llmops_ref.core.services import start_service, stop_service
from llmops_ref.core.workspace import open_workspace
from llmops_ref.documents.folder import SPARK_FILES
from llmops_ref.models.llm import Endpoint, chat_client, openai_client
from llmops_ref.release.hosting import served_entity
from llmops_ref.release.serving import ask_endpoint
from provider import Provider
from watching import PROXIES, check_kept, watched

DEAD = "http://127.0.0.1:9"                         # nobody listens at the port `discard`
SET = {
    "capitals": dict(HTTP_PROXY=DEAD, HTTPS_PROXY=DEAD, ALL_PROXY=DEAD),
    "small letters": dict(http_proxy=DEAD, https_proxy=DEAD, all_proxy=DEAD, no_proxy="localhost"),
    "what no client can use": dict(http_proxy="http://proxy:port", https_proxy="127.0.0.1:9", ALL_PROXY="socks5://127.0.0.1:9"),
}
ANSWER = "How do I log a parameter of a run?"


def test_the_hook_sees(tmp_path):
    seen = watched(SimpleNamespace(environment=dict(os.environ), root=ROOT), tmp_path)
    code = "import http.client, socket\ntry: http.client.HTTPConnection('10.255.255.1', timeout=0.01).connect()\nexcept OSError: pass"
    subprocess.run([sys.executable, "-c", code], env=seen.environment, check=True)
    with pytest.raises(AssertionError, match="10.255.255.1"): check_kept(seen)


def test_a_whole_life_cycle(pristine):
    "The run that all tests share: eight stages, a training among them, in an empty home folder."
    assert check_kept(pristine.seen), "the model of this machine was asked"


def test_a_question(finished, tmp_path):
    seen = watched(finished, tmp_path, **SET["capitals"])
    done = subprocess.run(
        [BIN / "llmops", "ask", "--env", "staging", ANSWER], cwd=finished.root, env=seen.environment, capture_output=True, text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0 and done.stdout.strip() and "proxy" not in done.stderr, done.stdout + done.stderr
    assert check_kept(seen), "the model of this machine was asked"


@pytest.mark.parametrize("proxies", ["small letters", "what no client can use"])
def test_a_search(finished, proxies):
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in finished.environment if name.lower() in PROXIES]: patch.delitem(finished.environment, name)
        for name, proxy in SET[proxies].items(): patch.setitem(finished.environment, name, proxy)
        found = finished.inside("search", "--env", "staging", ANSWER)
    assert found.returncode == 0 and "log_param" in found.stdout


def test_a_version_in_a_process_that_is_not_ours(finished, tmp_path):
    "As Model Serving loads it: MLflow comes first, and nothing of ours has begun the process. Its variables are those that we give it."
    ws = open_workspace(load_config("staging", finished.root))
    variables = served_entity(ws.config, ws.registered("assistant"), ws.deployed()).environment_vars
    seen = watched(finished, tmp_path, **SET["what no client can use"], **variables)
    store = f"sqlite:///{finished.root}/stores/staging/mlflow.db"
    uri = f"models:/{ws.registered('assistant')}/{ws.deployed()}"
    code = f"""import mlflow
mlflow.set_tracking_uri({store!r}); mlflow.set_registry_uri({store!r})
model = mlflow.pyfunc.load_model({uri!r}, suppress_warnings=True)
print(model.predict(dict(input=[dict(role='user', content={ANSWER!r})]))['output'][0]['content'][0]['text'])
"""
    (tmp_path / "hook" / "serves.py").write_text(code)              # with a name: Spark's client ends a process whose code has none
    done = subprocess.run(
        [sys.executable, "-m", "serves"], cwd=tmp_path, env=seen.environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr[-2000:]
    check_kept(seen)


def test_a_stage_with_spark(project, tmp_path):
    "The client of Spark waited for ever. A folder of so many pages is read by Spark; the sample's packages take longer."
    pages = project.root / "pages"
    pages.mkdir()
    for n in range(SPARK_FILES + 1):
        (pages / f"p{n}.md").write_text(f"# Rule {n}\n\nWho holds card {n} opens the door of room {n} in the house.\n")
    rows = [
        dict(
            id=f"q{n}", question=f"Which door does card {n} open?", type="howto", gold=[f"p{n}.md"], answer=f"That of room {n}.",
            split=split,
        )
        for n, split in enumerate(["test", "train"] * 4)
    ]
    (project.root / "data" / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = watched(project, tmp_path, **SET["capitals"], LLMOPS_CORPUS="pages", LLMOPS_QUESTIONS="data/own.jsonl", LLMOPS_REGRESSIONS="")
    done = subprocess.run(
        [BIN / "llmops", "run", "--env", "dev", "--only", "corpus"], cwd=project.root, env=seen.environment, capture_output=True, text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0 and f"{SPARK_FILES + 1} documents" in done.stdout, done.stdout + done.stderr
    check_kept(seen)


class Local:
    "A server of this machine that answers every question of every client with the same few words."
    def __enter__(self):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): pass
            def answer(self):
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                said = json.dumps(dict(userName="ada", experiments=[])).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)
            do_GET = do_POST = answer
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *error): self.server.shutdown(); self.server.server_close()


@pytest.fixture
def begin(monkeypatch):
    "A function that sets proxies and nothing else, and begins as each process of ours does."
    def begun(**given):
        for name in [name for name in os.environ if name.lower() in PROXIES]: monkeypatch.delenv(name)
        for name, value in given.items(): monkeypatch.setenv(name, value)
        before = dict(os.environ)
        stay_private()
        for name in os.environ.keys() - before.keys(): monkeypatch.setitem(os.environ, name, os.environ[name])
    return begun


@pytest.mark.parametrize("proxies", ["capitals", "small letters"])
def test_every_client_asks_this_machine_directly(begin, monkeypatch, proxies):
    from huggingface_hub import get_session
    from mlflow.store.tracking.rest_store import RestStore
    from mlflow.utils.rest_utils import MlflowHostCreds
    import urllib.request
    begin(**SET[proxies])
    with Local() as url:
        assert urllib.request.urlopen(url, timeout=5).status == 200
        assert httpx.get(url, timeout=5).status_code == requests.get(url, timeout=5).status_code == 200
        assert get_session().get(url, timeout=5).status_code == 200
        assert RestStore(lambda: MlflowHostCreds(url)).search_experiments() == []
        for name in [name for name in os.environ if name.startswith("DATABRICKS_")]: monkeypatch.delenv(name)
        monkeypatch.setenv("DATABRICKS_HOST", url)
        monkeypatch.setenv("DATABRICKS_TOKEN", "x")
        assert brief_client().current_user.me().user_name == "ada"


@pytest.mark.parametrize("proxies", SET)
def test_our_clients_and_services_need_no_beginning(monkeypatch, tmp_path, proxies):
    "Without `stay_private`, and with proxies at which a client ends while it is made."
    for name in [name for name in os.environ if name.lower() in PROXIES]: monkeypatch.delenv(name)
    ws = open_workspace(load_config("dev", ROOT, store=str(tmp_path), cache=str(tmp_path)))
    for name, value in SET[proxies].items(): monkeypatch.setenv(name, value)
    with Provider() as provider:
        endpoint = Endpoint(provider.url, provider.model, provider.key)
        assert chat_client(endpoint).invoke("Hello").content == provider.answer
        assert openai_client(endpoint).chat.completions.create(model="m", messages=[]).choices[0].message.content == provider.answer
    with Local() as url, pytest.raises(KeyError, match="output"): ask_endpoint(url, "Hello")        # it was reached, and is no endpoint
    service = start_service(ws, "files", [sys.executable, "-m", "http.server", "{port}", "--bind", "127.0.0.1"], "1", ready="/")
    stop_service(ws, service, grace=1)


class Proxy:
    "A proxy that remembers what it was asked for, and lets nobody through."
    def __enter__(self):
        self.asked, self.heard = [], threading.Event()
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): pass
            def do_CONNECT(handler):
                self.asked.append(handler.path)
                self.heard.set()
                handler.send_error(403)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *error): self.server.shutdown(); self.server.server_close()


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_provider_outside_is_asked_through_the_proxy(begin, name):
    "The whole address is in the request, and the host is one that only a proxy could know."
    with Provider() as provider:
        begin(**{name: provider.url.removesuffix("/v1")})
        outside = Endpoint("http://llm.acme.example/v1", provider.model, provider.key)
        assert chat_client(outside).invoke("Hello").content == provider.answer
        assert openai_client(outside).chat.completions.create(model="m", messages=[]).choices[0].message.content == provider.answer
        assert {asked["path"] for asked in provider.asked} == {"http://llm.acme.example/v1/chat/completions"}


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy"])
def test_with_tls_and_grpc_too(begin, name):
    with Proxy() as proxy:
        begin(**{name: proxy.url})
        with pytest.raises(ModelConnectionError, match=f"through the proxy {proxy.url}"):
            chat_client(Endpoint("https://llm.acme.example/v1", "large", "sk"), retries=0).invoke("Hello")
        with pytest.raises(OSError): requests.get("https://hub.acme.example", timeout=5)
        assert proxy.asked == ["llm.acme.example:443", "hub.acme.example:443"]
        proxy.heard.clear()
        with grpc.insecure_channel("spark.acme.example:15002") as channel:
            channel.subscribe(lambda state: None, try_to_connect=True)
            assert proxy.heard.wait(30) and proxy.asked[2] == "spark.acme.example:15002"


def test_a_dead_proxy_is_named(begin):
    begin(HTTPS_PROXY=DEAD)
    with pytest.raises(ModelConnectionError, match=f"through the proxy {DEAD}, which does not answer"):
        chat_client(Endpoint("https://llm.acme.example/v1", "large", "sk"), retries=0).invoke("Hello")
    begin(**SET["what no client can use"])
    with pytest.raises(SettingsError, match="ALL_PROXY is 'socks5://127.0.0.1:9': it speaks socks5"):
        chat_client(Endpoint("https://llm.acme.example/v1", "large", "sk"))


def test_lists_of_exemptions_hold_this_machine(begin):
    begin(HTTPS_PROXY=DEAD, NO_PROXY="intern.example")
    assert {os.environ[name] for name in ("NO_PROXY", "no_proxy", "no_grpc_proxy")} == {",".join(["intern.example", *LOOPBACK])}
