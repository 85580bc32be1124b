"""The life cycle as a user meets it: one command, offline, resumable, with errors that say what to do."""
import json, os, re, shutil, signal, subprocess, sys
from pathlib import Path

import grimp, psutil, pytest

from conftest import PATIENCE, no_network, until
from llmops_ref.core.config import load_config
from llmops_ref.runner.plan import STAGES, lessons
from llmops_ref.core.workspace import open_workspace

QUESTION = "How do I point an alias at a specific model version?"


def metrics(project, env="staging", volatile=("version", "second", "ms", "tok_s", "mb", "load", "memory", "embedded", "cut")):
    "Metrics that must not depend on the machine's mood."
    stages = json.loads(project.inside("status", "--env", env, "--json").stdout)["stages"]
    return {f"{s['stage']}.{k}": v for s in stages for k, v in s["metrics"].items() if not any(word in k.lower() for word in volatile)}


def test_every_stage_ran_without_a_network(finished):
    stages = json.loads(finished.llmops("status", "--env", "staging", "--json").stdout)["stages"]
    assert [s["stage"] for s in stages] == [s.notebook for s in STAGES]
    assert [s["state"] for s in stages] == ["up to date"] * len(STAGES)
    if not no_network(): pytest.skip("the life cycle ran, but this system does not let us cut the network off (unshare -rn)")


def test_nothing_keeps_running_after_a_run(finished):
    "No kernel, no model server, no endpoint: a run cleans up after itself."
    def of_this_project(process):
        try: return process.environ().get("LLMOPS_SETTINGS", "").startswith(str(finished.root))
        except psutil.Error: return False
    assert [p.cmdline() for p in psutil.process_iter() if of_this_project(p)] == []
    assert list((finished.root / "stores" / "staging" / "services").iterdir()) == []


def test_second_run_does_nothing(finished):
    again = finished.llmops("run", "--env", "staging")
    assert again.returncode == 0 and "Everything is up to date" in again.stdout
    assert "  ran " not in again.stdout


def test_lessons_are_read_in_an_executed_notebook_and_not_run(finished):
    "They have been tested, and an assertion about a bound that somebody moved must end no run. Their outputs are the repository's."
    there = json.loads((finished.root / "nbs" / "06_validation.ipynb").read_text())["cells"]
    executed = finished.root / "runs" / "staging" / "latest" / "06_validation.ipynb"
    ran = {cell["id"]: cell for cell in json.loads(executed.read_text())["cells"] if "id" in cell}
    taught = lessons(there)
    assert len(taught) > 3 and all(ran[cell["id"]]["execution_count"] is None for cell in taught)
    assert [ran[cell["id"]]["outputs"] for cell in taught] == [cell["outputs"] for cell in taught] and any(c["outputs"] for c in taught)
    start = next(i for i, cell in enumerate(there) if "parameters" in cell["metadata"].get("tags", []))
    assert all(ran[cell["id"]]["execution_count"] for cell in there[start + 1 :] if cell["cell_type"] == "code")


def test_aliases_are_those_that_mlflow_knows(finished):
    "We read its database, in a thousandth of the time: the same answer for models and prompts, also after a change that went round us."
    ws = open_workspace(load_config("staging", finished.root))
    client = ws.mlflow().MlflowClient()
    assert ws.alias("assistant", "champion") == str(client.get_model_version_by_alias(ws.registered("assistant"), "champion").version)
    assert ws.current("prompt:answer_prompt@champion") == str(ws.prompt("answer_prompt", "champion").version)
    version = ws.alias("assistant", "champion")
    client.set_registered_model_alias(ws.registered("assistant"), "spare", version)
    assert ws.alias("assistant", "spare") == version
    client.delete_registered_model_alias(ws.registered("assistant"), "spare")
    assert ws.alias("assistant", "spare") is None and ws.alias("nothing", "champion") is None


def test_what_only_shows_imports_no_model_and_no_mlflow(finished):
    "Help, a plan and a status are read a hundred times a day."
    slow = {"torch", "mlflow", "transformers", "langchain_core", "onnxruntime", "faiss", "pyspark"}
    script = f"import sys\nfrom llmops_ref.commands.cli import app\ntry: app()\nfinally: print(sorted({slow} & set(sys.modules)), file=sys.stderr)"
    for words in (["--help"], ["status", "--env", "staging"], ["run", "--env", "staging"], ["why", "retrieval", "--env", "staging"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *words], cwd=finished.root, env=finished.environment, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stderr.splitlines()[-1] == "[]", (words, done.stderr[-500:])


def test_report_stands_alone(finished):
    page = (finished.root / "runs" / "staging" / "latest" / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", page), "the report loads something from outside"
    for stage in STAGES: assert stage.notebook in page
    for link in re.findall(r'href="([^"#]+\.(?:html|ipynb))"', page):
        assert (finished.root / "runs" / "staging" / "latest" / link).exists(), f"broken link {link}"


def test_asking_the_champion(finished):
    "The right passage is shown, with the sentence that answers. (Whether a model of this size cites it depends on its training, which is tiny here.)"
    reply = json.loads(finished.llmops("ask", QUESTION, "--env", "staging", "--json").stdout)
    shown = {p["document_id"]: p["text"] for p in reply["passages"]}
    assert "Set a registered model alias pointing to a model version" in shown["mlflow.MlflowClient.set_registered_model_alias"]
    assert reply["answer"].strip() and set(reply["citations"]) <= {p["number"] for p in reply["passages"]}


def test_many_questions_from_standard_input(finished):
    done = finished.inside("search", "-k", "2", "--env", "staging", stdin=f"{QUESTION}\nlog a metric\n")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["question"] for row in rows] == [QUESTION, "log a metric"]
    assert all(len(row["passages"]) == 2 for row in rows)


def test_prose_does_not_run_a_stage_again_but_code_does(finished):
    path = finished.root / "nbs" / "03_retrieval.ipynb"
    original, notebook = path.read_text(), json.loads(path.read_text())
    prose = next(c for c in notebook["cells"][2:] if c["cell_type"] == "markdown")
    prose["source"].append("\n\nOne more sentence.")
    path.write_text(json.dumps(notebook))
    assert json.loads(finished.inside("why", "03", "--env", "staging", "--json").stdout)["reasons"] == []
    code = next(c for c in reversed(notebook["cells"]) if c["cell_type"] == "code")
    code["source"].append("\n1 + 1")
    path.write_text(json.dumps(notebook))
    assert json.loads(finished.inside("why", "03", "--env", "staging", "--json").stdout)["reasons"] == ["03_retrieval.ipynb changed"]
    path.write_text(original)


def test_a_changed_library_concerns_only_the_stages_that_stand_on_it(finished):
    "However deep it lies: grimp, which knows nothing of our cache, says who imports it, at first or at second hand."
    graph = grimp.build_graph("llmops_ref")
    for module in ("feedback.drift", "documents.chunking", "models.weights"):
        above, expected = graph.find_downstream_modules(f"llmops_ref.{module}") | {f"llmops_ref.{module}"}, []
        for stage in STAGES:
            used = re.findall(r"from (llmops_ref[\w.]+) import", (finished.root / "nbs" / f"{stage.notebook}.ipynb").read_text())
            if above & {f"llmops_ref.{stage.name}", *used}: expected.append(stage.notebook)
        path = finished.root.joinpath("llmops_ref", *module.split(".")).with_suffix(".py")
        original = path.read_text()
        path.write_text(original + "\nMORE = 1\n")
        found = json.loads(finished.llmops("status", "--env", "staging", "--json").stdout)["stages"]
        path.write_text(original)
        assert [s["stage"] for s in found if s["state"] == "stale"] == expected and 0 < len(expected) < 8, (module, expected)


def test_a_setting_concerns_only_the_stages_that_read_it(finished):
    def stale(**settings):
        return [
            s["stage"]
            for s in json.loads(finished.inside("status", "--env", "staging", "--json", **settings).stdout)["stages"]
            if s["state"] == "stale"
        ]
    assert stale() == []
    assert "01_hub" not in (changed := stale(RETRIEVAL_K="4")) and "04_prompts" in changed and "02_corpus" not in changed
    assert stale(CHUNK_WORDS="70") == ["02_corpus"]


def test_changed_questions_are_noticed(finished):
    path = finished.root / "data" / "questions.jsonl"
    original = path.read_text()
    path.write_text(original.replace("specific model version", "particular model version", 1))
    assert "input file:data/questions.jsonl" in finished.inside("why", "corpus", "--env", "staging").stdout
    path.write_text(original)


def at_work(runner):
    "The kernel of the stage that a run is in the middle of: the one that has told how far it is. (Another may wait for the next stage.)"
    def found():
        assert (run := psutil.Process(runner)).status() != psutil.STATUS_ZOMBIE, "the run has ended"
        for process in run.children(recursive=True):
            try:
                progress = Path(process.environ().get("LLMOPS_PROGRESS", "/nowhere"))
                if (
                    "ipykernel_launcher" in " ".join(process.cmdline())
                    and progress.exists()
                    and json.loads(progress.read_text())["done"] > 0
                ):
                    return process
            except (psutil.Error, OSError): pass                                           # it just ended
    return until(found, pause=0.01)


def test_killed_kernel_then_resume(finished):
    "kill -9 of a kernel: the run fails and names the way on; the next run completes with the same numbers."
    before = metrics(finished)
    (finished.root / "stores" / "staging" / "stages" / "retrieval.json").unlink()          # as if it had never run
    shutil.rmtree(finished.root / "stores" / "staging" / "tables" / "embeddings")          # and so that it takes a while
    run = finished.start("run", "--env", "staging")
    at_work(run.pid).send_signal(signal.SIGKILL)
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 1
    assert (
        "03_retrieval failed" in output
        and "The kernel died" in output
        and re.search(r"Resume with: +\S*llmops run --env staging --from 03", output)
    )
    done = finished.llmops("run", "--env", "staging")
    assert done.returncode == 0, done.stderr
    assert "ran     03_retrieval" in done.stdout
    assert metrics(finished) == before


def test_a_kernel_that_is_killed_while_it_waits_is_replaced(project, tmp_path, monkeypatch):
    "And each is of our interpreter, whatever Python somebody has called python3 in their home."
    (tmp_path / "kernels" / "python3").mkdir(parents=True)
    spec = dict(argv=["/bin/false", "{connection_file}"], display_name="of another project", language="python")
    (tmp_path / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    from llmops_ref.core.config import load_config
    from llmops_ref.runner.pipeline import _Kernels
    from llmops_ref.core.workspace import Workspace
    with _Kernels(Workspace(load_config("dev", project.root))) as kernels:
        kernels.prepare(STAGES[1])
        killed = kernels.waiting[0]
        os.kill(killed.manager.provisioner.pid, signal.SIGKILL)
        until(lambda: not killed.alive())
        taken = kernels.take(STAGES[1])
        try: assert taken is not killed and taken.alive() and not os.path.exists(killed.scratch.name)
        finally: taken.stop()


def test_environments_are_apart(project):
    "A run in prod leaves no trace in dev, and the kernel really ran prod."
    questions = (project.root / "data" / "questions.jsonl").read_text().splitlines(keepends=True)
    (project.root / "data" / "few.jsonl").write_text("".join(line for line in questions if '["langchain_core.' in line or "[]" in line))
    done = project.llmops("run", "--env", "prod", "--only", "corpus", CORPUS_PACKAGES="langchain-core", QUESTIONS="data/few.jsonl")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (project.root / "stores").iterdir()) == ["prod"]
    assert not (project.root / "runs" / "dev").exists()
    executed = json.loads((project.root / "runs" / "prod" / "latest" / "02_corpus.ipynb").read_text())
    injected = [c for c in executed["cells"] if "injected-parameters" in c["metadata"].get("tags", [])]
    assert 'env = "prod"' in "".join(injected[0]["source"])


def broken_questions(p): (p.root / "data" / "questions.jsonl").open("a").write("{not json\n")
def broken_attacks(p): (p.root / "data" / "red_team.jsonl").open("a").write("{not json\n")
def untag(p):
    path = p.root / "nbs" / "02_corpus.ipynb"
    path.write_text(path.read_text().replace('"parameters"', '"other"'))
def old_key(p): (p.root / "settings.ini").write_text((p.root / "settings.ini").read_text().replace("seed = 17", "sead = 17"))
def garble(p):
    path = p.root / "nbs" / "03_retrieval.ipynb"
    path.write_text(path.read_text().replace("MEASURES = [", "MEASURES = = ["))
def nothing(p): pass

BAD = {
    "unknown environment": (nothing, ["run", "--env", "qa"], {}, "Unknown environment 'qa'"),
    "unknown stage": (nothing, ["run", "--only", "vectors"], {}, "Unknown stage 'vectors'. The stages are: 01_hub"),
    "stages in the wrong order": (nothing, ["run", "--from", "05", "--to", "02"], {}, "wrong order"),
    "bad parameter": (nothing, ["run", "--set", "retrieval_k=many"], {}, "retrieval_k = 'many'"),
    "an environment as a parameter": (nothing, ["run", "--set", "env=prod"], {}, "'env' is not a setting"),
    "only and to": (nothing, ["run", "--only", "03", "--to", "02"], {}, "No stage is left"),
    "a syntax error in a notebook": (garble, ["run"], {}, "03_retrieval.ipynb holds a syntax error"),
    "unknown parameter": (nothing, ["run", "--set", "retrival_k=3"], {}, "did you mean 'retrieval_k'"),
    "unknown key in the file": (old_key, ["run"], {}, "settings.ini [DEFAULT] sead: unknown key; did you mean 'seed'"),
    "broken line in the questions": (broken_questions, ["run"], {}, "line 155: not valid JSON"),
    "a stage without its tag": (untag, ["run"], {}, "02_corpus.ipynb must have exactly one cell with the tag `parameters`"),
    "a package that is not installed": (
        nothing, ["run", "--only", "corpus"], dict(CORPUS_PACKAGES="no-such-thing"),
        "names the package 'no-such-thing' in `corpus_packages`, but it is not installed",
    ),
    "no package": (nothing, ["run"], dict(CORPUS_PACKAGES=" "), "expected the name of at least one installed package"),
    "an empty corpus": (nothing, ["run", "--only", "corpus"], dict(CORPUS_EXCLUDE="*"), "there are no documents"),
    "a folder that is not there": (nothing, ["run", "--only", "corpus"], dict(CORPUS="no/such/folder"), "names the folder"),
    "an unknown chunker": (nothing, ["run"], dict(CHUNKER="semantic"), "expected structure or recursive or whole"),
    "AI Search without a workspace": (nothing, ["run"], dict(VECTOR_INDEX="direct_access"), "No workspace is configured"),
    "AI Search on a local table": (
        nothing, ["run"], dict(VECTOR_INDEX="delta_sync"), "vector_index = delta_sync follows a Unity Catalog table",
    ),
    "an unknown benchmark": (nothing, ["bench", "speed"], {}, "There is no benchmark 'speed'"),
    "a provider without a key": (
        nothing, ["run", "--app", "third_party"], dict(GATEWAY_MODELS="openai/gpt-5-mini"),
        "The secret OPENAI_API_KEY is not set. Set it in the environment",
    ),
    "an unknown provider": (
        nothing, ["run", "--app", "third_party"], dict(GATEWAY_MODELS="opnai/gpt-5-mini"),
        "the provider 'opnai', which the gateway does not know",
    ),
    "a price that cannot be read": (nothing, ["run"], dict(PRICES="gpt-5-mini"), "`prices` holds 'gpt-5-mini'"),
    "an unknown thing to serve": (
        nothing, ["serve", "model"], {},
        "There is no 'model' to serve. There are assistant, front, chat_model, gateway",
    ),
    "a broken line in the attacks": (broken_attacks, ["run"], {}, "line 27: not valid JSON"),
    "a share that is none": (nothing, ["run"], dict(ROLLOUT_STEPS="10%, 150%"), "`rollout_steps` is 10%, 150%. It must hold shares"),
    "a gate on what nobody measures": (nothing, ["run"], dict(GATES="politeness >= 0.9"), "names 'politeness', which nobody measures"),
    "nothing to approve": (nothing, ["approve"], {}, "No version of the assistant has passed validation in prod"),
    "nothing to go back to": (nothing, ["rollback"], {}, "nothing was ever deployed"),
    "nothing to promote": (nothing, ["promote"], {}, "No fine-tuned model has passed validation in staging"),
    "a load of no askers": (nothing, ["load", "--askers", "many"], {}, "--askers takes numbers with commas"),
    "a batch without a table": (nothing, ["batch", "tickets", "answers", "--version", "1"], {}, "The table 'tickets' does not exist"),
    "nothing deployed": (nothing, ["ask", "Anything?"], {}, "Nothing is deployed in dev yet"),
    "no index": (nothing, ["search", "Anything?"], {}, "No index is published in dev"),
}

# As a user calls it, one of each kind: an argument, a file, data, a key, a table that is not there.
AS_PROCESSES = {
    "unknown environment", "unknown key in the file", "an empty corpus", "a provider without a key", "a batch without a table",
}


@pytest.mark.parametrize("case", BAD, ids=lambda c: c.replace(" ", "-"))
def test_bad_input_is_one_clear_error(project, case):
    breaks, command, settings, expected = BAD[case]
    breaks(project)
    done = (project.llmops if case in AS_PROCESSES else project.inside)(*command, **settings)
    assert done.returncode == 1
    assert expected in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    tables = project.root / "stores" / "dev" / "tables"
    assert not tables.exists() or not list(tables.iterdir()), "something was written"


def test_busy_port(project):
    import socket
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0)); listener.listen()
        done = project.inside("run", SERVING_PORT=str(listener.getsockname()[1]))
    assert done.returncode == 1 and "is in use" in done.stderr and "  ran " not in done.stdout


def test_damaged_index_is_refused_and_rebuilt(finished):
    "One bit has changed: the search does not answer, and the command that the error advises mends it."
    pointer = finished.root / "stores" / "staging" / "index" / "current.json"
    vectors = pointer.parent / json.loads(pointer.read_text())["folder"] / "vectors.faiss"
    damaged = bytearray(vectors.read_bytes()); damaged[len(damaged) // 2] ^= 4
    vectors.write_bytes(damaged)
    done = finished.llmops("search", "log a metric", "--env", "staging")
    assert done.returncode == 1 and "vectors.faiss is damaged or was replaced" in done.stderr and "--only retrieval --force" in done.stderr
    assert finished.llmops("run", "--env", "staging", "--only", "retrieval", "--force").returncode == 0
    assert finished.llmops("search", "log a metric", "--env", "staging").returncode == 0


def test_damaged_model_is_refused(finished):
    "One bit of the weights that serve has changed, or the file is gone: the assistant does not answer, and says why."
    artifacts = finished.root / "stores" / "staging" / "artifacts"
    original = {path: path.read_bytes() for path in artifacts.rglob("SmolLM2*.gguf")}
    def ask(): return finished.llmops("ask", "How do I log a metric?", "--env", "staging")
    for path, content in original.items():
        path.unlink()                                           # it may be a hard link: never write through it
        damaged = bytearray(content); damaged[len(damaged) // 2] ^= 4
        path.write_bytes(damaged)
    changed = ask()
    for path in original: path.unlink()
    missing = ask()
    for path, content in original.items(): path.write_bytes(content)
    assert changed.returncode == 1 and "is damaged or was replaced" in changed.stderr and "llmops rollback" in changed.stderr
    assert missing.returncode == 1 and "\nError: " in f"\n{missing.stderr}" and "missing" in missing.stderr
    assert ask().returncode == 0


def test_two_runs_of_one_environment(project):
    "The second one stops with a clear message; it does not mix with the first."
    from filelock import FileLock
    (project.root / "stores" / "dev").mkdir(parents=True)
    with FileLock(project.root / "stores" / "dev" / ".run.lock"):
        done = project.inside("run")
    assert done.returncode == 1 and "Another run of dev is in progress" in done.stderr
