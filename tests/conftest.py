"""What the tests share: a copy of the project to run and to break, and the real life cycle, run once.

The lessons of a notebook are tested in the notebook (`nbdev-test`). Here is what needs another process: the command,
kernels that get killed, servers, a machine without a network.
"""
import atexit, configparser, contextlib, copy, json, os, shutil, subprocess, sys, tempfile, threading, time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from filelock import FileLock

from llmops_ref.core.config import begin_process
from llmops_ref.kit.fork import write_setting

pytest.register_assert_rewrite("watching")
from watching import watched

begin_process()
ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent

# In a worker of pytest-xdist the main module has no spec, by which Spark's client believes that doctests run, and leaves.
if getattr(sys.modules["__main__"], "__spec__", None) is None: sys.modules["__main__"].__spec__ = ModuleSpec("__main__", None)

# A life cycle that is complete but small: every stage does its real work on little data.
SMALL = dict(
    CORPUS_DOCUMENTS="220", CORPUS_PACKAGES="mlflow, databricks-sdk, langchain-core, langchain, transformers, peft",
    HUB_PROBE_QUESTIONS="1", HUB_MAX_SECONDS_PER_ANSWER="120", PROMPT_QUESTIONS="2", FINETUNE_EXAMPLES="16",
    FINETUNE_HELD_OUT="4", CHAT_MAX_TOKENS="24", VALIDATION_QUESTIONS="4", RED_TEAM_ATTACKS="6", MONITORING_PROBES="3",
    SMOKE_QUESTIONS="1", GATE_MODE="inform", GATE_P95_SECONDS="120", PROMPT_REPORT_QUESTIONS="4", PROMPT_BEHAVIOUR="1",
    PROMPT_SEARCH="1", EMBEDDER="int8",
)  # no timed assertions: CI machines may be slow

# The tests are about the sample, also in a fork whose settings name other documents by now (`llmops adopt`).
SAMPLE = {
    ("DEFAULT", "corpus"): "packages", ("DEFAULT", "questions"): "data/questions.jsonl",
    ("DEFAULT", "prompts"): "data/prompts", ("DEFAULT", "regressions"): "data/regressions.jsonl",
    ("DEFAULT", "passage_words"): "32", ("DEFAULT", "finetune"): "on", ("dev", "draft_questions"): "false",
    ("dev", "chat_max_tokens"): "40", ("dev", "prompt_report_questions"): "6", ("smoke", "finetune_examples"): "48",
    ("smoke", "finetune_tokens"): "1024", ("smoke", "finetune_lr"): "0.0005",
}

# Converted weights, made once for all projects and all workers: the first process makes the folder, the others are told.
if "TESTS_CACHE" not in os.environ:
    os.environ["TESTS_CACHE"] = tempfile.mkdtemp(prefix="llmops-cache-")
    atexit.register(shutil.rmtree, os.environ["TESTS_CACHE"], ignore_errors=True)
CACHE = os.environ["TESTS_CACHE"]


def no_network() -> list[str]:
    "A prefix that runs a command without any network but loopback, where the system lets us; else nothing."
    probe = (
        subprocess.run(["unshare", "-rn", "ip", "link", "set", "lo", "up"], capture_output=True)
        if shutil.which("unshare") and shutil.which("ip")
        else None
    )
    return ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"] if probe and probe.returncode == 0 else []


class Project:
    "A copy of the tracked files in a folder of its own, and the `llmops` command in it."
    def __init__(self, folder: Path, **settings):
        self.root = folder
        listed = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True,
            text=True, check=True,
        )
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        here = configparser.ConfigParser(interpolation=None, default_section="", inline_comment_prefixes=(";",))
        here.read(folder / "settings.ini")
        for (section, key), value in SAMPLE.items():
            if here.has_option(section, key): write_setting(folder, key, value, section)
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("LLMOPS_", "MLFLOW_"))}
        self.environment = (
            keep | {f"LLMOPS_{k}": v for k, v in (dict(CACHE=CACHE) | settings).items()} | dict(PYTHONPATH=str(folder), HF_HUB_OFFLINE="1")
        )

    def llmops(
        self, *args: str, stdin: str | None = None, timeout: float = 900, offline: bool = False, **settings
    ) -> subprocess.CompletedProcess:
        "Run the command to its end."
        environment = self.environment | {f"LLMOPS_{k}": v for k, v in settings.items()}
        command = [*(no_network() if offline else []), str(BIN / "llmops"), *args]
        return subprocess.run(command, cwd=self.root, env=environment, input=stdin or "", capture_output=True, text=True, timeout=timeout)

    def inside(self, *args: str, stdin: str = "", **settings) -> SimpleNamespace: # `returncode stdout stderr`, as of a process
        "The same command in this process: what starts no kernel and no server needs no interpreter of its own."
        from typer.testing import CliRunner
        from llmops_ref.commands.cli import app
        environment = self.environment | {f"LLMOPS_{k}": v for k, v in settings.items()}
        with patch.dict(os.environ, environment, clear=True), contextlib.chdir(self.root), _same_mlflow():
            done = CliRunner().invoke(app, list(args), input=stdin, prog_name="llmops")
        if done.exception and not isinstance(done.exception, SystemExit): raise done.exception      # what a user would see as a stack trace
        return SimpleNamespace(returncode=done.exit_code, stdout=done.stdout, stderr=done.stderr)

    def start(self, *args: str, **settings) -> subprocess.Popen:
        "Start the command and come back at once."
        return subprocess.Popen(
            [str(BIN / "llmops"), *args], cwd=self.root,
            env=self.environment | {f"LLMOPS_{k}": v for k, v in settings.items()} | dict(PYTHONUNBUFFERED="1"),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )


@contextlib.contextmanager
def _same_mlflow():
    "A command points MLflow at the store of its project; the test goes on with its own."
    mlflow = sys.modules.get("mlflow")
    before = (mlflow.get_tracking_uri(), mlflow.get_registry_uri()) if mlflow else None
    try: yield
    finally:
        if before: mlflow.set_tracking_uri(before[0]), mlflow.set_registry_uri(before[1])


def _link_or_copy(source, target):
    if Path(source).suffix in (".gguf", ".onnx", ".safetensors"): os.link(source, target)
    else: shutil.copy2(source, target)


def copy_of(finished: Project, folder: Path) -> Project:
    "A copy of a project with all that its runs left, to change things in. Whatever opens its store finds that it is a copy."
    project = copy.copy(finished)
    project.root = folder / "project"
    shutil.copytree(finished.root, project.root, copy_function=_link_or_copy, symlinks=True)
    project.environment = finished.environment | dict(PYTHONPATH=str(project.root))
    return project


PATIENCE = 600                                      # seconds: on a busy machine what a test waits for comes late, and that is no failure


def until(holds, pause: float = 0.05):
    "What `holds()` gives, once it is true."
    deadline = time.monotonic() + PATIENCE
    while not (found := holds()):
        assert time.monotonic() < deadline, f"it did not come to that within {PATIENCE} s"
        time.sleep(pause)
    return found


def pytest_configure(config):
    config.heard = os.dup(1)                                    # where people look, before pytest begins to keep what is printed


FIRST = "deployment kit finetune first_questions gateway retrieval applications feedback run prompts monitoring docs bundle".split()


def pytest_collection_modifyitems(items):
    "The longest files first, so that no worker is left alone. The first makes the life cycle; the next five do without it meanwhile."
    def rank(item):
        name = item.path.stem.removeprefix("test_")
        return FIRST.index(name) if name in FIRST else len(FIRST)
    items.sort(key=rank)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    "A test that takes minutes says so every minute, so that nobody wonders whether it hangs."
    begun, ended = time.time(), threading.Event()
    def tell():
        while not ended.wait(60):
            os.write(item.config.heard, f"\n  ... {item.nodeid} since {(time.time() - begun) / 60:.0f} min\n".encode())
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try: return (yield)
    finally:
        ended.set()
        teller.join()


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> Project:
    "A project whose whole life cycle has run once, without a network, and watched; all workers share it, and nobody writes into it."
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ: shared = shared.parent
    with FileLock(shared / "pristine.lock"):
        if not (shared / "pristine.json").exists():
            project = Project(shared / "pristine", **SMALL)
            for design in ("extract_then_answer", "structured_no_refusal"):                 # four others compete
                (project.root / "data" / "prompts" / f"{design}.md").unlink(missing_ok=True)
            seen, runs = watched(project, shared / "watched"), copy.copy(project)
            runs.environment = seen.environment
            done = runs.llmops("run", "--env", "staging", offline=True)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            facts = dict(root=str(project.root), environment=project.environment, home=str(seen.home), reached=str(seen.reached))
            (shared / "pristine.json").write_text(json.dumps(facts))
        facts = json.loads((shared / "pristine.json").read_text())
    project = object.__new__(Project)
    project.root, project.environment = Path(facts["root"]), facts["environment"]
    project.seen = SimpleNamespace(home=Path(facts["home"]), reached=Path(facts["reached"]))        # for `check_kept`
    return project


@pytest.fixture(scope="module")
def finished(pristine, tmp_path_factory) -> Project:
    "A project whose whole life cycle has run once, for the tests of one file."
    return copy_of(pristine, tmp_path_factory.mktemp("finished"))


@pytest.fixture
def project(tmp_path) -> Project:
    "A fresh copy, in which nothing has run."
    return Project(tmp_path / "project", **SMALL)
