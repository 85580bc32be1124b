"""The two applications as a user meets them: a provider behind the gateway from the first stage to the last, streaming, batches, and both flavours of the logged model."""
import json, os, re, secrets, signal, sqlite3, subprocess, sys
from importlib import metadata

import pandas as pd, psutil, pytest

from conftest import CACHE, PATIENCE, SMALL, copy_of, until
from langchain_core.exceptions import ModelAuthenticationError

from llmops_ref.assistant.versions import assistant_digest, assistant_parts, load_logged, log_chain
from llmops_ref.assistant.chain import open_assistant
from llmops_ref.core.config import load_config
from llmops_ref.tuning.registry import tuned_files
from llmops_ref.assistant.prompt_registry import champion_prompt
from llmops_ref.validation import answers_folder
from llmops_ref.core.workspace import open_workspace
from provider import Provider

KEY = f"sk-canary-{secrets.token_hex(12)}"
QUESTION = "How do I point an alias at a specific model version?"


@pytest.fixture(scope="module")
def third(pristine, tmp_path_factory):
    "A finished project whose owners turn to the other application: a provider of its own, and our stand-in as the fallback."
    project = copy_of(pristine, tmp_path_factory.mktemp("third"))
    known = set(traces(project).index)
    with Provider("acme-large", key=KEY) as acme:
        settings = dict(
            APP="third_party", GATEWAY_MODELS="acme/acme-large", GATEWAY_FALLBACKS="local/smollm2-q8_0",
            GATEWAY_PROVIDERS=f"acme={acme.url}", PRICES="acme-large 2/8, smollm2-q8_0 0.02/0.08", PROMPT_SEARCH="0",
            HUB_RETIRED="smollm2-torch, smollm2-q4_1, minilm-st",              # which answered in the life cycle before
        )
        def llmops(*args, **more): # a question needs no process of its own
            return (project.inside if args[0] == "ask" else project.llmops)(*args, "--env", "staging", **(settings | more))
        project.environment["ACME_API_KEY"] = KEY
        done = llmops("run")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        project.left = traces(project).drop(list(known))
        gateway = project.start("serve", "gateway", "--env", "staging", **settings)    # for those who ask afterwards
        assert any("The gateway of staging is at" in line for line in gateway.stdout)
        yield project, llmops, acme, done.stdout, settings
        gateway.terminate(); gateway.wait()


def traces(project):
    rows = (
        sqlite3.connect(project.root / "stores" / "staging" / "mlflow.db").execute("select request_id, key, value from trace_tags").fetchall()
    )
    return pd.DataFrame(rows, columns=["trace", "key", "value"]).pivot(index="trace", columns="key", values="value")


def test_the_life_cycle_of_a_provider(third):
    project, llmops, acme, said, settings = third
    assert "skipped 05_finetune" in said and "a provider's model is not ours to tune" in said and len(acme.asked) > 10
    assert "cached  02_corpus" in said and "cached  03_retrieval" in said, "documents and index are the same for both applications"
    states = {s["stage"]: s["state"] for s in json.loads(project.inside("status", "--env", "staging", "--json", **settings).stdout)["stages"]}
    assert states.pop("05_finetune") == "skipped" and set(states.values()) == {"up to date"}
    assert "Everything is up to date" in llmops("run").stdout
    page = (project.root / "runs" / "staging" / "latest" / "report.html").read_text()
    assert "Without passages" in page and "Tuned model" not in page


def test_a_champion_that_cannot_be_asked_ends_nothing(third, tmp_path):
    "Somebody tried a provider once, and what is left of that version does not load. The next one says so, and takes its place."
    project, *_ = third
    other = copy_of(project, tmp_path)
    ws = open_workspace(load_config("staging", other.root))
    champion = ws.alias("assistant", "champion", record=False)
    source = ws.mlflow().MlflowClient().get_model_version(ws.registered("assistant"), champion).source
    (logged,) = (other.root / "stores" / "staging" / "artifacts" / "models").glob(source.removeprefix("models:/"))
    logged.rename(logged.with_name("gone"))
    done = other.llmops("run", "--env", "staging", "--only", "validation", RED_TEAM="", REGRESSIONS="", VALIDATION_QUESTIONS="2")
    assert done.returncode == 0 and "champion not compared" in done.stdout, done.stdout + done.stderr
    checked = json.loads((other.root / "stores" / "staging" / "stages" / "validation.json").read_text())["details"]
    (remark,) = [gate["remark"] for gate in checked["gates"] if gate["gate"] == "comparison with the champion"]
    assert "it could not be asked" in remark and checked["against_champion"] is None and checked["champion"] == champion
    page = (other.root / "stores" / "staging" / "evidence" / f"version-{checked['version']}.html").read_text()
    assert f"There is no comparison with version {champion}, which serves now: it could not be asked" in page
    assert ws.alias("assistant", "challenger", record=False) == checked["version"] != champion


def test_each_trace_says_who_served_at_what_price_with_which_prompt(third):
    project, *_ = third
    tags = project.left[project.left.purpose == "probe"]
    assert (
        len(tags)
        and set(tags.served_by) <= {"acme-large", ""}
        and set(tags.app) == {"third_party"}
        and tags.cost_usd.astype(float).max() > 0
    )
    assert tags["mlflow.linkedPrompts"].str.contains("answer_prompt").all()
    spans = sqlite3.connect(project.root / "stores" / "staging" / "mlflow.db").execute("select trace_id, type from spans").fetchall()
    assert {"AGENT", "RETRIEVER", "CHAT_MODEL"} <= {kind for trace, kind in spans if trace in project.left.index}


def test_a_planted_key_is_in_nothing_that_a_run_wrote(third):
    "Notebooks and their metadata, logs, MLflow, traces, tables, the report."
    project, *_ = third
    searched = 0
    for path in project.root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            searched += 1
            assert KEY.encode() not in path.read_bytes(), f"the key is in {path}"
    assert searched > 300


def test_the_fallback_answers_when_the_provider_is_down(third):
    project, llmops, acme, *_ = third
    acme.fault = "503"
    reply = json.loads(llmops("ask", QUESTION, "--json").stdout)
    acme.fault = None
    assert reply["served_by"] == "smollm2-q8_0" and reply["answer"]


def test_streamed_and_whole_are_the_same_answer(third):
    project, llmops, acme, *_ = third
    acme.answer, before = "Use `mlflow.MlflowClient.set_registered_model_alias` [1]. It moves an alias [9] to a version.", acme.answer
    whole, streamed = (json.loads(llmops("ask", QUESTION, "--json", *more).stdout) for more in ([], ["--stream"]))
    printed = llmops("ask", QUESTION, "--stream").stdout
    acme.answer = before
    assert whole["answer"] == streamed["answer"] and "[9]" not in whole["answer"]
    assert printed.splitlines()[0] == whole["answer"]
    assert 0 < streamed["first_token_seconds"] < streamed["seconds"]


def test_a_version_asks_whom_it_was_validated_with(third):
    "Somebody changes the provider's model in the settings: what serves stays as it was, and with the next run it is another version."
    project, llmops, acme, *_ = third
    reply = json.loads(
        llmops(
            "ask", QUESTION, "--json", GATEWAY_MODELS="local/smollm2-q4_1", GATEWAY_FALLBACKS="", GATEWAY_PROVIDERS=""
        ).stdout
    )
    assert reply["served_by"] == "acme-large" and reply["answer"]
    one, other = (
        open_workspace(load_config("staging", project.root, app="third_party", gateway_models=[model], gateway_providers=[f"acme={acme.url}"]))
        for model in ("acme/acme-large", "acme/acme-small")
    )
    digests = [assistant_digest(assistant_parts(ws, champion_prompt(one)[0])[0], {}) for ws in (one, one, other)]
    assert digests[0] == digests[1] != digests[2]
    assert answers_folder(one, one.alias("assistant", "champion")) is None, "what a provider said once is no evidence of today"


def test_a_key_that_is_refused_is_one_clear_error(third):
    project, llmops, acme, *_ = third
    acme.fault = "401"
    done = llmops("run", "--only", "prompts", "--force", GATEWAY_FALLBACKS="")
    acme.fault = None
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "The key was refused. Set the right one in" in said and "Traceback" not in said and KEY not in said
    assert "Resume with:" in said and "--only prompts" in said.partition("Resume with:")[2]


def test_without_an_index(third):
    "retrieval = off: the same stages, prompts of their own, no passages."
    project, llmops, acme, *_ = third
    done = llmops("run", "--from", "prompts", "--to", "validation", "--set", "retrieval=off")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    details = json.loads((project.root / "stores" / "staging" / "stages" / "validation.json").read_text())["details"]
    assert len(details["examples"]) == 4 and all(
        e["passages"] == [] and e["candidate"]["text"] and e["candidate"]["citations"] == [] for e in details["examples"]
    )


@pytest.mark.slow(reason="serves five systems, one after the other, to measure them")
def test_one_table_compares_the_applications(finished):
    table = {row["system"]: row for row in json.loads(finished.llmops("compare", "--env", "staging", "--json", VALIDATION_QUESTIONS="2").stdout)}
    assert list(table) == ["provider, passages", "provider, direct", "own base, passages", "own tuned, passages", "own tuned, direct"]
    assert (
        table["provider, direct"]["tokens_read"] < table["provider, passages"]["tokens_read"]
        and table["own tuned, direct"]["citation_precision"] is None
    )
    assert all(row["memory_mb"] > 50 and row["usd_per_1000"] > 0 and row["p50_seconds"] > row["first_token"] > 0 for row in table.values())


def batch_rows(project): return open_workspace(load_config("staging", project.root)).read("answers")


def test_a_batch_that_is_killed_goes_on_where_it_stopped(finished):
    ws = open_workspace(load_config("staging", finished.root))
    ws.write(
        "tickets", pd.DataFrame(dict(id=[f"t{n}" for n in range(6)], question=[f"How do I log metric number {n}?" for n in range(6)]))
    )
    run = finished.start("batch", "tickets", "answers", "--env", "staging", "--slice", "2")
    until(lambda: ws.current("table:answers") or run.poll() is not None)
    for process in psutil.Process(run.pid).children(recursive=True) + [psutil.Process(run.pid)]: process.send_signal(signal.SIGKILL)
    run.wait()
    first = batch_rows(finished)
    assert len(first) in (2, 4)
    again = json.loads(finished.llmops("batch", "tickets", "answers", "--env", "staging", "--json").stdout)
    assert again == dict(answered=6 - len(first), failed=0, before=len(first))
    rows = batch_rows(finished)
    assert (
        sorted(rows.id) == sorted(f"t{n}" for n in range(6))
        and (rows.answer.str.len() > 0).all()
        and rows.served_by.str.contains("adapter").all()
    )
    assert json.loads(finished.inside("batch", "tickets", "answers", "--env", "staging", "--json").stdout)["answered"] == 0


def test_who_loads_a_version_hears_of_other_packages(tmp_path, caplog):
    code, model = tmp_path / "code.py", tmp_path / "model"
    code.write_text(
        "import mlflow\nclass Model(mlflow.pyfunc.PythonModel):\n    def predict(self, context, model_input: list[str]) -> list[str]:"
        " return model_input\nmlflow.models.set_model(Model())\n"
    )
    import mlflow
    mlflow.pyfunc.save_model(model, python_model=str(code), pip_requirements=["pandas==1.0", f"numpy=={metadata.version('numpy')}"])
    assert load_logged(str(model)).predict(["Hello"]) == ["Hello"]
    assert f"was logged with pandas 1.0 (here {metadata.version('pandas')}). Its verdict" in caplog.text


LOAD = """
import json, sys, warnings
warnings.filterwarnings("ignore")
import mlflow
assert "llmops_ref" not in sys.modules
flavour, uri, questions = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
if flavour == "langchain":
    chain = mlflow.langchain.load_model(uri)
    answers = [chain.invoke(dict(question=q)) for q in questions]
    print(json.dumps([[a["answer"], a["citations"]] for a in answers]))
else:
    model = mlflow.pyfunc.load_model(uri)
    answers = [model.predict(dict(input=[dict(role="user", content=q)])) for q in questions]
    print(json.dumps([[a["output"][0]["content"][0]["text"], a["custom_outputs"]["citations"]] for a in answers]))
"""


def test_both_flavours_answer_alike_in_a_clean_process(finished):
    "Logged as code, loaded by a process that knows only where the registry is, with unpickling forbidden."
    ws = open_workspace(load_config("staging", finished.root, cache=CACHE, chat_max_tokens=int(SMALL["CHAT_MAX_TOKENS"])))
    template, prompt = champion_prompt(ws)
    version = ws.alias("assistant", "champion", record=False)
    model, adapter, _ = tuned_files(ws)
    log_chain(ws, template, adapter, f"{ws.registered('answer_prompt')}/{prompt}", model)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LLMOPS_")} | dict(
        MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false", MLFLOW_TRACKING_URI=f"sqlite:///{ws.path('mlflow.db')}",
        MLFLOW_REGISTRY_URI=f"sqlite:///{ws.path('mlflow.db')}", PYTHONPATH="", HF_HUB_OFFLINE="1",
    )
    script = finished.root.parent / "load.py"
    script.write_text(LOAD)
    def load(flavour, uri):
        done = subprocess.run(
            [sys.executable, "-P", str(script), flavour, uri, json.dumps([QUESTION, "How do I log a metric?"])],
            cwd=finished.root.parent, env=environment, capture_output=True, text=True, timeout=PATIENCE,
        )
        assert done.returncode == 0, f"{flavour}: {done.stderr[-3000:]}"
        return json.loads(done.stdout.splitlines()[-1])
    agent, chain = load("pyfunc", f"models:/{ws.registered('assistant')}/{version}"), load(
        "langchain", f"models:/{ws.registered('assistant_chain')}/1"
    )
    assert agent == chain and all(answer for answer, _ in agent)
    assert not [path for path in ws.store.rglob("*") if path.suffix in (".pkl", ".pickle")]


def test_the_fine_tuned_model_on_an_endpoint_of_its_own(finished):
    "Another process serves base and adapter over the OpenAI protocol, with a key; the chain is pointed at it by a setting."
    serving = finished.start("serve", "chat_model", "--env", "staging")
    try:
        key, url = next(
            found.groups() for line in serving.stdout if (found := re.fullmatch(r"export CHAT_API_KEY=(\S+) LLMOPS_CHAT_URL=(\S+)\n", line))
        )
        os.environ["CHAT_API_KEY"] = key
        with open_assistant(
            open_workspace(load_config("staging", finished.root, chat_url=url)),
            champion_prompt(open_workspace(load_config("staging", finished.root)))[0],
        ) as chain:
            assert chain.invoke({"question": QUESTION})["served_by"] == "chat_model"
        os.environ["CHAT_API_KEY"] = "sk-wrong"
        with (
            open_assistant(open_workspace(load_config("staging", finished.root, chat_url=url))) as chain,
            pytest.raises(ModelAuthenticationError, match="Set the right one in CHAT_API_KEY"),
        ):
            chain.invoke({"question": QUESTION})
    finally:
        os.environ.pop("CHAT_API_KEY", None)
        serving.terminate(); serving.wait()
