"""Validation that blocks, a person who decides, a deployment that can be taken back: on the real registry, with real endpoints."""
import contextlib, http.server, json, os, signal, subprocess, threading, time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from conftest import copy_of, until
from llmops_ref.assistant.versions import logged_settings, version_facts
from llmops_ref.release.approval import ApprovalNeeded, check_approved, decide
from llmops_ref.release.sbom import read_sbom
from llmops_ref.core.config import load_config
from llmops_ref.deployment import check_traffic, roll_out
from llmops_ref.release.champion import one_at_a_time
from llmops_ref.core.services import Service, stop_services
from llmops_ref.core.text import words
from llmops_ref.documents.asking import first_sentence
from llmops_ref.release.serving import LocalHost
from llmops_ref.search.published import open_index
from llmops_ref.validation import answers_folder, kept_answers, recall_assistant
from llmops_ref.core.files import DataError
from llmops_ref.core.workspace import open_workspace

NEW = dict(QUESTION_WORDS="150")                        # another assistant, without training another model
BRIEF = dict(RED_TEAM="", REGRESSIONS="", VALIDATION_QUESTIONS="2", ROLLOUT_QUESTIONS="4")      # where a test is about what follows


@pytest.fixture(scope="module")
def shop(finished, tmp_path_factory):
    "A copy of the finished project, to deploy in."
    project = copy_of(finished, tmp_path_factory.mktemp("shop"))
    for command in (
        "init -q",
        "add -A -- settings.ini nbs llmops_ref data",
        "-c user.name=t -c user.email=t@t commit -qm start",
    ): # a version without a commit fails validation
        subprocess.run(["git", *command.split()], cwd=project.root, check=True)
    return project


def workspace(project, **settings):
    return open_workspace(
        load_config(
            "staging", project.root, cache=project.environment["LLMOPS_CACHE"], gate_mode="inform", gate_p95_seconds=120.0, **settings
        )
    )


def alias(project, name): return workspace(project).alias("assistant", name, record=False)


def details(project, stage): return json.loads((project.root / "stores" / "staging" / "stages" / f"{stage}.json").read_text())["details"]


def versions(project): return json.loads(project.inside("versions", "--env", "staging", "--json").stdout)


def test_evidence_of_a_version(finished):
    "Facts, attacks and regressions are on record; the page loads nothing from the network."
    found = details(finished, "validation")
    assert not [p for p in found["problems"] if "git commit" not in p]         # this copy is no clone
    assert len(found["regressions"]) == 10 and sum(r["holds"] for r in found["regressions"]) >= 7, found["regressions"]
    assert found["attacks"][-1]["risk"] == "all" and found["attacks"][-1]["tried"] == 6
    page = (finished.root / "stores" / "staging" / "evidence" / f"version-{found['version']}.html").read_text()
    assert "llmops approve --env staging" in page and "<script" not in page and "http://" not in page
    ws, version = workspace(finished), found["version"]
    beside = finished.root / "stores" / "staging" / "evidence" / f"version-{version}.sbom.cdx.json"
    assert beside.read_text() == read_sbom(ws, version) and beside.name in page
    digests = {h["content"] for part in json.loads(beside.read_text())["components"] for h in part.get("hashes", [])}
    assert {version_facts(ws, version)[key] for key in ("base_sha256", "adapter_sha256", "embedder_sha256")} <= digests
    unnamed = [name for name, digest in logged_settings(ws, version)["digests"].items() if digest not in digests]
    assert set(unnamed) <= {"tokenizer"}                                       # which belongs to its embedder


def test_a_champion_is_asked_only_what_is_new(finished, monkeypatch):
    "It was a candidate once: what it answered then is kept with its version. Where it has to be asked and cannot be, that is an error."
    ws, loaded = workspace(finished), []
    version, checked = ws.alias("assistant", "champion", record=False), details(finished, "validation")
    @contextlib.contextmanager
    def load(ws, version):
        loaded.append(version)
        yield lambda state: dict(question=state["question"], answer="Loaded.", passages=[])
    monkeypatch.setattr("llmops_ref.validation.load_assistant", load)
    known = {example["question"]: example["candidate"]["text"] for example in checked["examples"]}
    with recall_assistant(ws, version, list(known)) as ask: assert {q: ask(dict(question=q))["answer"] for q in known} == known
    assert not loaded
    with recall_assistant(ws, version, [*known, "Is this one new?"]) as ask:
        assert {q: ask(dict(question=q))["answer"] for q in known} == known and ask(dict(question="Is this one new?"))["answer"] == "Loaded."
    assert loaded == [version] and "Is this one new?" not in kept_answers(answers_folder(ws, version), ["Is this one new?"])
    def broken(ws, version): raise DataError("Its weights are damaged.")
    monkeypatch.setattr("llmops_ref.validation.load_assistant", broken)
    with pytest.raises(DataError, match="damaged"), recall_assistant(ws, version, ["Is this one new?"]): pass


def test_approval_rollout_and_rollback(shop):
    "A new version waits for a person, is rolled out in steps beside the old one, and is taken back."
    before = alias(shop, "champion")
    (weights,) = (shop.root / "stores" / "staging" / "artifacts" / "models").glob("*/artifacts/artifacts/adapter.gguf")
    weights.rename(weights.with_suffix(".away"))                                # the champion is compared with, and not loaded for it
    waiting = shop.llmops("run", "--env", "staging", "--from", "validation", APPROVAL="person", ROLLOUT_STEPS="50%", **NEW, **BRIEF)
    weights.with_suffix(".away").rename(weights)
    assert waiting.returncode == 3, waiting.stdout + waiting.stderr
    assert details(shop, "validation")["against_champion"] and "champion not compared" not in waiting.stdout
    assert "waits for a person: nobody has approved it yet" in waiting.stderr and "llmops approve --env staging" in waiting.stderr
    assert alias(shop, "champion") == before and alias(shop, "challenger") != before
    assert "waits for a person" in (shop.root / "runs" / "staging" / "latest" / "report.html").read_text()

    unseen = shop.inside("approve", "--env", "staging", APPROVAL="person")
    assert unseen.returncode == 1 and "Nobody can be asked here" in unseen.stderr
    alone = shop.llmops("run", "--env", "staging", "--only", "deployment", APPROVAL="person", ROLLOUT_STEPS="50%", **NEW, **BRIEF)
    assert alone.returncode == 3

    approved = shop.inside("approve", "--env", "staging", "--yes", "--by", "Ada", APPROVAL="person")
    assert approved.returncode == 0 and "Approved by Ada" in approved.stdout and "gates" in approved.stdout, approved.stderr
    done = shop.llmops(
        "run", "--env", "staging", "--from", "validation", "--to", "deployment", APPROVAL="person", ROLLOUT_STEPS="50%", **NEW, **BRIEF
    )
    assert done.returncode == 0, done.stdout + done.stderr
    new = alias(shop, "champion")
    assert new != before and alias(shop, "previous") == before
    rollout = pd.DataFrame(details(shop, "deployment")["rollout"])
    assert set(rollout.share) == {0.5, 1.0} and set(rollout[rollout.share == 1.0].version) == {new}
    assert {v["version"]: v["approval"] for v in versions(shop)}[new] == "Approved"

    unsure = shop.inside("rollback", "--env", "staging")           # it was made where no commit could be named, so it did not pass
    assert unsure.returncode == 1 and f"Version {before}, which served before, is FAILED" in unsure.stderr and alias(shop, "champion") == new
    start = time.time()
    back = shop.llmops("rollback", "--env", "staging", "--yes")
    print(f"rollback took {time.time() - start:.1f} s")
    assert back.returncode == 0 and f"Version {before} of the assistant is champion" in back.stdout
    assert f"Version {before} serves now: somebody went back to it from version {new}" in shop.inside("status", "--env", "staging").stdout
    assert json.loads(shop.llmops("ask", "How do I log a metric?", "--env", "staging", "--json").stdout)["version"] == before
    again = shop.llmops("run", "--env", "staging", "--only", "deployment", "--force", APPROVAL="person", **NEW, **BRIEF)
    assert again.returncode == 1 and "was taken back" in again.stderr and alias(shop, "champion") == before
    assert f"Version {before} serves now" in (shop.root / "runs" / "staging" / "latest" / "report.html").read_text()
    shop.llmops("rollback", "--env", "staging", "--yes")
    assert alias(shop, "champion") == new and not list((shop.root / "stores" / "staging" / "services").glob("*.json"))
    shown = shop.inside("approve", "--env", "staging", "--version", new, APPROVAL="person").stdout
    assert "It serves already." in shown and "No version serves yet" not in shown       # the evidence is of the day when another one served


def test_an_approval_is_for_one_content_and_one_verdict(shop):
    ws = workspace(shop, approval="person")
    version = ws.alias("assistant", "challenger", record=False)
    decide(ws, version, True, by="Ada")
    assert "Ada" in check_approved(ws, version)
    ws.mlflow().MlflowClient().set_model_version_tag(ws.registered("assistant"), version, "approval_digest", "0" * 64)
    with pytest.raises(ApprovalNeeded, match="for another content"): check_approved(ws, version)
    with pytest.raises(DataError, match="validated again while you read"): decide(ws, version, True, by="Ada", run="another")
    ws.mlflow().MlflowClient().set_model_version_tag(ws.registered("assistant"), version, "digest", "0" * 64)
    with pytest.raises(DataError, match="is not what was logged"): check_approved(ws, version)
    before = len(versions(shop))
    again = shop.llmops("run", "--env", "staging", "--only", "validation", "--force", **NEW, **BRIEF)
    assert again.returncode == 0, again.stderr
    latest = ws.alias("assistant", "challenger", record=False)
    with pytest.raises(ApprovalNeeded, match="nobody has approved it"): check_approved(ws, latest)
    twice = shop.llmops("run", "--env", "staging", "--only", "validation", "--force", **NEW, **BRIEF)
    assert twice.returncode == 0 and len(versions(shop)) == before + 1  # the one whose digest was forged is logged anew, and no other


def test_a_rejected_version_is_not_deployed(shop):
    other, before = NEW | BRIEF, alias(shop, "champion")
    if alias(shop, "challenger") == before: assert shop.llmops("run", "--env", "staging", "--only", "validation", **other).returncode == 0
    assert "Why?" in shop.inside("reject", "--env", "staging", "--by", "Ada").stderr
    assert shop.inside("reject", "--env", "staging", "--by", "Ada", "--reason", "q001 is wrong").returncode == 0
    for approval in ("person", "none"):
        refused = shop.llmops("run", "--env", "staging", "--only", "deployment", APPROVAL=approval, **other)
        assert refused.returncode == 1 and "Ada rejected it: q001 is wrong" in refused.stderr and alias(shop, "champion") == before


def test_killed_between_registering_and_the_verdict(shop):
    "The version is there, without a verdict; the old champion serves, and the next run goes on with it and makes no second one."
    other, before, champion = dict(QUESTION_WORDS="130") | BRIEF, len(versions(shop)), alias(shop, "champion")
    process = shop.start("run", "--env", "staging", "--only", "validation", **other)
    until(lambda: len(versions(shop)) > before or process.poll() is not None, pause=0.2)
    import psutil
    for child in psutil.Process(process.pid).children(recursive=True): child.kill()
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = versions(shop)[0]
    assert newest["validation"] == "PENDING" and alias(shop, "champion") == champion
    unready = shop.inside("approve", "--env", "staging", "--version", newest["version"], "--yes", "--by", "Ada")
    assert unready.returncode == 1 and "validation status PENDING" in unready.stderr
    done = shop.llmops("run", "--env", "staging", "--only", "validation", **other)
    assert done.returncode == 0, done.stderr
    assert len(versions(shop)) == before + 1 and versions(shop)[0]["validation"] != "PENDING"


class Broken(http.server.BaseHTTPRequestHandler):
    "A version that came up, passed its smoke test, and fails on what people ask."
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(500); self.end_headers(); self.wfile.write(b'{"detail": "out of memory"}')
    def log_message(self, *_): pass


class Named(http.server.BaseHTTPRequestHandler):
    "A version that answers at once with its name."
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        said = dict(output=[dict(content=[dict(text="Yes.")])], custom_outputs=dict(version=self.server.version))
        body = json.dumps(said).encode()
        self.send_response(200); self.send_header("Content-Type", "application/json"); self.send_header("Content-Length", str(len(body)))
        self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass


@contextlib.contextmanager
def endpoints(**kinds):
    "Servers that stand for versions in a host; each knows its version."
    servers = {version: http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) for version, kind in kinds.items()}
    for version, server in servers.items():
        server.version = version
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield {v: Service(f"endpoint-{v}", os.getpid(), 0.0, s.server_port, v, os.getpid()) for v, s in servers.items()}
    finally:
        for server in servers.values(): server.shutdown()


def test_a_rollout_that_fails_gives_all_traffic_back(shop):
    ws, host = workspace(shop), LocalHost(workspace(shop))
    try:
        with endpoints(old=Named, new=Broken) as host.endpoints:
            host.share({"old": 1.0})
            with pytest.raises(DataError, match="ended at 50% of the traffic: .*Version old has all of it again"):
                roll_out(
                    host.share, "old", "new", [0.5], lambda share: check_traffic(host.ask, ["How do I log a metric?"] * 12, 120, "new", share)
                )
            assert {host.ask("How do I log a metric?")["version"] for _ in range(6)} == {"old"}
    finally: stop_services(ws, owner=os.getpid())


def test_the_next_question_goes_by_the_new_shares(shop, monkeypatch):
    "Under traffic that keeps the gateway's memory of the old ones warm. No question fails meanwhile, and nobody waits for that memory to end."
    ws, ended, failed, asked = workspace(shop), threading.Event(), [], []
    host = LocalHost(ws)
    def ask_on():
        while not ended.wait(0.05):
            try: asked.append(host.ask("Who is there?")["version"])
            except DataError as error: failed.append(error)
    def waits(seconds): raise AssertionError(f"somebody waits for {seconds} s")
    try:
        with endpoints(a=Named, b=Named) as host.endpoints:
            host.share({"a": 1.0})
            monkeypatch.setattr("llmops_ref.release.serving.time", SimpleNamespace(sleep=waits))
            askers = [threading.Thread(target=ask_on, daemon=True) for _ in range(2)]
            for asker in askers: asker.start()
            for version in ("b", "a", "b"):
                host.share({version: 1.0})
                assert {host.ask("Who is there?")["version"] for _ in range(8)} == {version}
            host.share({"a": 0.5, "b": 0.5})
            assert {host.ask("Who is there?")["version"] for _ in range(20)} == {"a", "b"}
            ended.set()
            for asker in askers: asker.join(60)
            assert not failed and set(asked) == {"a", "b"}
    finally:
        ended.set()
        stop_services(ws, owner=os.getpid())


def test_an_endpoint_that_never_comes_up_changes_nothing(shop):
    before = alias(shop, "champion")
    done = shop.llmops("run", "--env", "staging", "--only", "deployment", "--force", SERVING_TIMEOUT="1")
    assert done.returncode == 1 and "did not answer within 1 s" in done.stderr and alias(shop, "champion") == before


def test_two_deployments_at_once(shop):
    with one_at_a_time(workspace(shop)):
        second = shop.llmops("rollback", "--env", "staging")
    assert second.returncode == 1 and "Another deployment or rollback of staging is in progress" in second.stderr


def test_a_version_with_an_alias_is_not_deleted(shop):
    version = alias(shop, "champion")
    done = shop.inside("versions", "--env", "staging", "--remove", version)
    assert done.returncode == 1 and "champion" in done.stderr and version in {v["version"] for v in versions(shop)}
    unknown = shop.inside("versions", "--env", "staging", "--remove", "999")
    assert unknown.returncode == 1 and "no version 999" in unknown.stderr


BLOCKS = dict(
    GATE_MODE="raise", VALIDATION_QUESTIONS="8", GATE_NAMES_GOLD="0", GATE_CITATION_PRECISION="0", GATE_REGRESSIONS="0.7",
    GATES="",
)  # what 16 pairs cannot teach, and what hangs on rounding: which of ten regressions hold; all other gates stand
FEW = dict(VALIDATION_QUESTIONS="4")                     # enough to see what is broken altogether


def test_a_good_version_passes_the_gates_that_block(shop):
    "The control of the three tests that follow."
    done = shop.llmops("run", "--env", "staging", "--only", "validation", "--force", **BLOCKS)
    assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout + done.stderr


def refused(shop, **environment):
    "Run validation with gates that raise; what it says, and that no alias moved."
    before = alias(shop, "champion"), alias(shop, "challenger")
    done = shop.llmops("run", "--env", "staging", "--only", "validation", **BLOCKS | environment)
    assert done.returncode == 1 and "Validation failed" in done.stderr, done.stdout + done.stderr
    assert (alias(shop, "champion"), alias(shop, "challenger")) == before
    return done.stderr


def told_by_their_texts(project, n=3): # Question -> the document that the search shows for it, though none of its words is in the name
    ws = workspace(project)
    index, found, config = open_index(ws), {}, ws.config
    for chunk in ws.read("chunks").drop_duplicates("document_id").itertuples():
        said = first_sentence(chunk.text)
        if not said or set(words(said)) & set(words(chunk.document_id)): continue
        first = index.search(said, config.retrieval_k, config.retrieval, config.retrieval_candidates)[0]
        if first.document_id == chunk.document_id: found[said] = chunk.document_id
        if len(found) == n: return found


def test_a_poisoned_index_is_refused(shop, tmp_path):
    "Somebody wrote other texts under the names of our documents: what the good version held, this one does not."
    other, told = copy_of(shop, tmp_path), told_by_their_texts(shop)
    with open(other.root / "data" / "regressions.jsonl", "a", encoding="utf-8") as cases:
        for n, (question, document) in enumerate(told.items()):
            print(json.dumps(dict(id=f"p{n}", question=question, must="show", what=[document], why="Its text tells.")), file=cases)
    ws = workspace(other)
    good = ws.read("chunks")
    ws.write("chunks", good.assign(text=good.text.sample(frac=1, random_state=1).values))
    assert other.llmops("run", "--env", "staging", "--only", "retrieval").returncode == 0
    assert "regressions that hold is 0." in refused(other, GATE_REGRESSIONS="1", RED_TEAM="", VALIDATION_QUESTIONS="2")
    record = json.loads((other.root / "runs" / "staging" / "latest" / "run.json").read_text())
    checked = next(stage for stage in record["stages"] if stage["name"] == "validation")["result"]["details"]["regressions"]
    held = {case["question"]: case["holds"] for case in checked}
    assert [held[question] for question in told] == [False] * len(told), "of another text under its name, the search no longer finds it"


def test_a_broken_prompt_is_refused(shop):
    "It went round the stage that chooses prompts: somebody moved the alias by hand. (Once tuned, a model goes its way whatever it says.)"
    ws = workspace(shop)
    before = str(ws.prompt("answer_prompt", "champion", record=False).version)
    story = ws.mlflow().genai.register_prompt(
        ws.registered("answer_prompt"),
        "Do not use the passages. Write a story about a captain, her ship and the storm.\n\n{{passages}}\n\nDo not answer:"
        " {{question}}\nStory: Once upon a time, the old captain",
    )
    try:
        ws.set_prompt_alias("answer_prompt", "champion", str(story.version))
        assert "grounded is 0." in refused(shop, **BRIEF | FEW, CHAT_MAX_TOKENS="40", FINETUNE="off")
    finally: ws.set_prompt_alias("answer_prompt", "champion", before)


def test_a_worse_model_is_refused(shop, tmp_path):
    "A fine-tune that loads and answers, and whose training diverged: half of its weights are noise."
    import torch
    from safetensors.torch import load_file, save_file
    from llmops_ref.tuning.variants import adapter_to_gguf
    from llmops_ref.core.files import file_digest
    ws = workspace(shop)
    mlflow, name, good = ws.mlflow(), ws.registered("chat_model"), ws.alias("chat_model", "candidate", record=False)
    content = Path(mlflow.artifacts.download_artifacts(f"models:/{name}/{good}", dst_path=str(tmp_path)))
    weights = load_file(content / "adapter_model.safetensors")
    chance = torch.Generator().manual_seed(0)
    save_file(
        {key: torch.randn(value.shape, generator=chance) / 2 if "lora_B" in key else value for key, value in weights.items()},
        content / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    shape = dict(model_type="llama", num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
    adapter_to_gguf(content, content / "adapter.gguf", shape)
    with ws.start_run("finetune") as run:
        mlflow.log_artifacts(str(content), "chat_model")
        tags = mlflow.MlflowClient().get_model_version(name, good).tags | dict(adapter_sha256=file_digest(content / "adapter.gguf"))
        ws.set_alias("chat_model", "candidate", str(mlflow.register_model(f"runs:/{run.info.run_id}/chat_model", name, tags=tags).version))
    try: says = refused(shop, **BRIEF | FEW, GATES="token_f1 >= 0.9")
    finally: ws.set_alias("chat_model", "candidate", good)
    assert "readable is 0." in says or "grounded is 0." in says
    assert "token_f1 is 0." in says and "must be at least 0.9" in says, "a gate of its own, by one line in the settings"
    assert "Quoting the best sentence" in says and "lets quotes compete" in says, "no model at all would be right more often"


def test_a_verdict_by_other_gates_says_so(shop):
    "Somebody tries a gate. The version is judged anew; who reads its verdict reads what it was before, and by which gates."
    done = shop.llmops("run", "--env", "staging", "--only", "validation", "--set", "gates=token_f1 >= 0.99", **BRIEF)
    assert done.returncode == 0 and "token_f1 ≥ 0.99 is new" in done.stdout and "What --set says holds for this run" in done.stdout
    checked = details(shop, "validation")
    row = next(v for v in versions(shop) if v["version"] == checked["version"])
    assert row["validation"] == "FAILED" and row["before"].startswith("It PASSED on ") and row["before"][:200] == checked["before"][:200]
    said = shop.inside("versions", "--env", "staging").stdout
    assert f"Version {row['version']} is FAILED now. It PASSED on " in said
    if checked["champion"] == checked["version"]: assert "it goes on serving" in shop.inside("summary", "--env", "staging").stdout
