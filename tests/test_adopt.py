"""A team brings its own documents: one command makes them the corpus, and the whole life cycle runs on them."""
import json, shutil

import pytest
from markdown_it import MarkdownIt

from conftest import ROOT, SAMPLE, Project
from handbooks import KETTLES, NEWCOMER, pages
from llmops_ref.core.config import load_config
from llmops_ref.evaluation.questions import load_questions
from llmops_ref.kit.fork import git
from llmops_ref.core.scoring import is_refusal, says_reference
from llmops_ref.core.workspace import open_workspace

QUICK = dict(
    HUB_PROBE_QUESTIONS="1", HUB_MAX_SECONDS_PER_ANSWER="120", PROMPT_QUESTIONS="2", PROMPT_REPORT_QUESTIONS="2",
    PROMPT_BEHAVIOUR="0", VALIDATION_QUESTIONS="4", RED_TEAM_ATTACKS="3", MONITORING_PROBES="3", SMOKE_QUESTIONS="1",
    GATE_MODE="inform", GATE_P95_SECONDS="120", FINETUNE_SECONDS="0",
    FINETUNE_HELD_OUT="8", MONITORING_SIMULATED="0",
)


LIFE_CYCLE = pytest.mark.slow(reason="a whole life cycle on the documents of somebody else")


def pdf(path, text):
    from reportlab.lib.styles import getSampleStyleSheet
    from reportlab.platypus import Paragraph, SimpleDocTemplate
    from xml.sax.saxutils import escape
    SimpleDocTemplate(str(path)).build(
        [Paragraph(escape(part), getSampleStyleSheet()["BodyText"]) for part in text.split("\n\n") if part.strip()]
    )


def mixed_documents(folder):
    "Our own guides as somebody's documents, each in another format, and two files that cannot be read."
    guides = sorted((ROOT / "nbs" / "guides").glob("*.md"))
    folder.mkdir()
    for number, path in enumerate(guides):
        text = path.read_text()
        if number % 4 == 0: (folder / path.name).write_text(text)
        elif number % 4 == 1:
            (folder / f"{path.stem}.html").write_text(f"<html><body><main>{MarkdownIt().enable('table').render(text)}</main></body></html>")
        elif number % 4 == 2: pdf(folder / f"{path.stem}.pdf", text)
        else:
            (folder / f"{path.stem}.ipynb").write_text(
                json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[dict(cell_type="markdown", metadata={}, source=text)]))
            )
    (folder / "empty.md").write_text("")
    return folder


@pytest.fixture(scope="module")
def adopted(tmp_path_factory) -> Project:
    "A project that has adopted a folder, and has run once."
    project = Project(tmp_path_factory.mktemp("adopted") / "project", **QUICK)
    mixed_documents(project.root / "handbook")
    project.before = (project.root / "settings.ini").read_text()
    project.said = project.llmops("adopt", "handbook")
    assert project.said.returncode == 0, project.said.stderr
    project.ran = project.llmops("run", "--env", "dev", offline=True)
    assert project.ran.returncode == 0, project.ran.stdout[-3000:] + project.ran.stderr[-3000:]
    return project


def asked(project, question): return json.loads(project.llmops("ask", question, "--json").stdout)


@LIFE_CYCLE
def test_answers_cite_the_documents(adopted):
    "Four formats, trained on, validated, deployed; what the model says stands in the page that it cites."
    documents = {path.name for path in (adopted.root / "handbook").iterdir()}
    questions = load_questions(adopted.root / "data" / "handbook_questions.jsonl", drafts=True).query("type != 'unanswerable'").head(12)
    said = adopted.llmops("ask", stdin="\n".join(questions.question)).stdout
    replies = [json.loads(line) for line in said.splitlines()]
    cited = [[reply["passages"][n - 1]["document_id"] for n in reply["citations"]] for reply in replies]
    assert sum(map(bool, cited)) >= 2, [reply["answer"] for reply in replies]       # how many hangs on rounding, and so on the machine
    assert {name for names in cited for name in names} <= documents
    assert any(set(names) & set(q.gold) for names, q in zip(cited, questions.itertuples()))


@LIFE_CYCLE
def test_drafts_are_asked_in_dev_and_everywhere_called_drafts(adopted):
    corpus = json.loads((adopted.root / "stores" / "dev" / "stages" / "corpus.json").read_text())
    assert corpus["metrics"]["drafts"] == corpus["metrics"]["questions"] == 30 and "30 of them drafts" in corpus["headline"]
    assert "30 of the 30 evaluation questions are drafts" in (adopted.root / "runs" / "dev" / "latest" / "report.html").read_text()
    left = {f["about"]: f for f in json.loads(adopted.inside("todo", "--json").stdout)["findings"]}
    assert (
        left["corpus"]["state"] == left["questions"]["state"] == "ok"
        and "30 questions" in left["drafts"]["found"]
        and "says little" in left["drafts"]["found"]
    )
    staging = adopted.inside("run", "--env", "staging", "--to", "corpus")
    assert staging.returncode == 1 and "only drafts" in staging.stderr, "nothing is gated on what nobody has read"


@LIFE_CYCLE
def test_prose_is_scored_as_prose(adopted):
    "No answer has to name a function: the gate is on what the reference says, and the pairs are sentences of pages that no test question is about."
    checked = json.loads((adopted.root / "stores" / "dev" / "stages" / "validation.json").read_text())
    gates = {gate["gate"] for gate in checked["details"]["gates"]}
    assert "says_reference" in gates and "names_gold" not in gates
    watched = json.loads((adopted.root / "stores" / "dev" / "stages" / "monitoring.json").read_text())
    ws = open_workspace(load_config("dev", adopted.root))
    pairs, questions = ws.read("training_pairs"), ws.read("questions")
    answers = ws.read("requests").query("purpose == 'probe'").merge(questions, on="question", suffixes=("", "_of_reference"))
    right = [
        is_refusal(a.answer) if a.type == "unanswerable" else says_reference(a.answer, a.answer_of_reference, a.question)
        for a in answers.itertuples()
    ]
    assert len(right) == watched["metrics"]["probes"] == 3 and watched["metrics"]["probe_correct"] == pytest.approx(
        sum(right) / 3
    ), "a page's name is in no answer"
    answers = [messages[-1]["content"] for messages in pairs.messages]
    assert sum(answer.startswith("According to [") for answer in answers) > len(answers) / 2 and not any(
        answer.startswith("Use `") for answer in answers
    )
    tested = {g for gold in questions[questions.split == "test"].gold for g in gold}
    assert not tested & set(pairs.shown.explode().str.replace(r"#\d+$", "", regex=True))
    assert adopted.inside("questions", "check", "--env", "dev").returncode == 0


@LIFE_CYCLE
def test_a_correction_in_prose_finds_its_page(adopted):
    "Somebody votes an answer down and says what would have been right: the page that was shown and says it is what the next model learns from."
    learned = load_questions(adopted.root / "data" / "handbook_questions.jsonl", drafts=True).query(
        "split == 'train' and type != 'unanswerable'"
    )
    q = learned.iloc[0]
    reply = asked(adopted, q.question)
    assert q.gold[0] in {p["document_id"] for p in reply["passages"]}, "the search shows the page"
    vote = json.loads(adopted.inside("vote", reply["trace_id"], "--down", "--correction", q.answer, "--by", "ann", "--json").stdout)
    nonsense = adopted.inside("review", vote["feedback_id"], "--accept", "--answer", "Elephants paint violins at dusk.", "--by", "bob")
    assert nonsense.returncode == 1 and "no page that was shown says it" in nonsense.stderr
    row = json.loads(adopted.inside("review", vote["feedback_id"], "--accept", "--by", "bob", "--json").stdout)
    assert row["gold"] == q.gold[0] and row["answer"] == q.answer
    liked = next(r for other in learned.iloc[1:7].itertuples() if (r := asked(adopted, other.question))["citations"])
    good = json.loads(adopted.inside("vote", liked["trace_id"], "--up", "--by", "eve", "--json").stdout)
    assert (
        "According" not in json.loads(adopted.inside("review", good["feedback_id"], "--accept", "--by", "bob", "--json").stdout)["answer"]
    ), "the form comes with the next pair"


@LIFE_CYCLE
def test_only_named_settings_change_and_a_second_time_nothing(adopted):
    before, after = adopted.before.splitlines(), (adopted.root / "settings.ini").read_text().splitlines()
    new = [line for line in after if line not in before]
    changed = {line.split("=")[0].strip() for line in new}
    assert changed == {key for _, key in SAMPLE} - {
        "finetune"
    }, "what the other tests put back: `make test` stays green in a fork that has adopted"
    (adopted.root / "settings.ini").write_text(
        (adopted.root / "settings.ini").read_text().replace("passage_words = 50", "passage_words = 44")
    )
    again = json.loads(adopted.inside("adopt", "handbook", "--json").stdout)
    assert again["settings"] == [] and again["drafts"] == [] and again["kept"] == 30, "what somebody decided since stays"
    (adopted.root / "handbook" / "parking.md").write_text(
        "# Parking\n\n## Where cars stand\n\nCars stand behind the northern building, and nobody pays for that.\n"
    )
    more = json.loads(adopted.inside("adopt", "handbook", "--questions", "40", "--json").stdout)
    assert {g for q in more["drafts"] for g in q["gold"]} == {"parking.md"} and more["kept"] == 30
    (adopted.root / "handbook" / "parking.md").unlink()
    lost = adopted.inside("adopt", "handbook")
    assert "about pages that are gone" in lost.stderr and more["drafts"][0]["id"] in lost.stderr


def test_what_overrides_an_adopted_setting_is_named(project):
    mixed_documents(project.root / "handbook")
    done = project.inside("adopt", "handbook", CORPUS="packages")
    assert done.returncode == 1 and "Without effect" in done.stderr and "LLMOPS_CORPUS" in done.stderr
    again = project.inside("adopt", "handbook", CORPUS="packages")
    assert again.returncode == 1 and again.stderr == done.stderr, "nothing was left to change, and it is without effect all the same"


def test_a_project_without_its_data_adopts_nothing(project):
    mixed_documents(project.root / "handbook")
    (project.root / "data").rename(project.root / "away")
    try: done = project.inside("adopt", "handbook")
    finally: (project.root / "away").rename(project.root / "data")
    assert done.returncode == 1 and done.stderr.startswith("Error: The project has no folder data") and "git checkout" in done.stderr


def test_what_cannot_be_adopted(project):
    "Bad folders are named in the first second, and nothing is written."
    (project.root / "one").mkdir()
    (project.root / "one" / "page.md").write_text("# Only one\n\nHere is a whole sentence about a single thing.\n")
    (project.root / "pictures").mkdir()
    (project.root / "pictures" / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    before, there = (project.root / "settings.ini").read_text(), set((project.root / "data").glob("*_questions.jsonl"))
    for words, says in (
        (["nowhere"], "There is no folder nowhere"), ([str(project.root)], "the project itself"),
        (["one"], "at least two documents"), (["pictures"], "holds no document"),
        (["README.md"], "There is no folder README.md"),
    ):
        done = project.inside("adopt", *words)
        assert done.returncode == 1 and says in done.stderr, done.stderr
    shutil.copytree(ROOT / "nbs" / "guides", project.root / "guides")
    assert project.inside("adopt", "guides", "--dry-run").returncode == 0
    assert (project.root / "settings.ini").read_text() == before and set((project.root / "data").glob("*_questions.jsonl")) == there


# --- a handbook that is too small to train on

@LIFE_CYCLE
def test_twelve_pages_are_quoted(tmp_path):
    "Too little to train on: the best sentence of the best page, with its citation, is validated, deployed, and right."
    project = Project(tmp_path / "project", **QUICK | dict(PROMPT_REPORT_QUESTIONS="4", VALIDATION_QUESTIONS="0"))
    (project.root / "handbook").mkdir()
    for name, text in pages(KETTLES).items(): (project.root / "handbook" / name).write_text(text)
    said = project.llmops("adopt", "handbook")
    assert said.returncode == 0 and "Too few sentences to train on" in said.stderr, said.stdout + said.stderr
    git(project.root, "init", "-q")                     # a version without a commit is not complete
    for key, value in {"user.name": "Ada", "user.email": "ada@example.com"}.items(): git(project.root, "config", key, value)
    git(project.root, "add", "-A")
    git(project.root, "commit", "-qm", "Adopt")
    ran = project.llmops("run", "--env", "dev", offline=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    results = {path.stem: json.loads(path.read_text()) for path in (project.root / "stores" / "dev" / "stages").glob("*.json")}
    assert results["prompts"]["details"]["winner"] == "extract" and results["validation"]["details"]["verdict"] == "PASSED"
    answered = project.llmops("ask", stdin="\n".join([*NEWCOMER, "Who is the president of France?"])).stdout
    replies = [json.loads(line) for line in answered.splitlines()]
    assert len(replies) == len(NEWCOMER) + 1
    wrong = {
        question: reply["answer"]
        for (question, (words, page)), reply in zip(NEWCOMER.items(), replies)
        if words not in reply["answer"] or [reply["passages"][n - 1]["document_id"] for n in reply["citations"]] != [page]
    }
    assert len(wrong) <= 1, wrong                       # the search may miss a page
    assert is_refusal(replies[-1]["answer"]), "what is on no page is refused"
