"""What a newcomer asks first: dev is really built, and every question that this project shows to people is asked in it."""
import json, random, re

import pytest

from conftest import ROOT, Project
from llmops_ref.core.config import load_config
from llmops_ref.core.scoring import names_gold
from llmops_ref.core.workspace import open_workspace
from llmops_ref.feedback.chat import example_questions
from llmops_ref.kit.fork import TUTORIAL, read_upstream
from llmops_ref.documents.prominence import ask_first, first_questions
from llmops_ref.release.champion import open_champion
from llmops_ref.search.published import open_index

SHOWN = 2                                           # passages that the model is shown; `retrieval_k`

# The objects that answer the questions of our pages, beyond those of `first_questions.jsonl` and `questions.jsonl`.
ACCEPTED = {
    "point an alias at a model version": ["mlflow.MlflowClient.set_registered_model_alias"],
    "How do I make my second adapter the active one?": ["peft.PeftModel.set_adapter"],
}
# Questions about documents of one's own, and those that nothing here answers.
ELSEWHERE = {"How do I install it?", "What happens to votes?", "How do I report a bug?", "How do I bake bread?"}

ASKED = re.compile(r"""llmops (?:ask|search)\b[^\n"'`]*?(?:\\?"|')([^"'\\]+)(?:\\?"|')""")


def told() -> dict[str, str]:
    "Each question that a page, a guide, a lesson or a help text asks `llmops`, and the first place of it."
    pages = [ROOT / "README.md", *sorted((ROOT / "nbs").rglob("*.ipynb")), *sorted((ROOT / "nbs" / "guides").glob("*.md"))]
    found = {}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        if page.suffix == ".ipynb":                 # outputs are of some earlier run
            text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
        for question in ASKED.findall(text): found.setdefault(question, page.name)
    return {question: page for question, page in found.items() if "{" not in question}


def gold_of(question: str, files: list[dict]) -> list[str]:
    return ACCEPTED.get(question) or next((q["gold"] for q in files if q["question"] == question), [])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The corpus and the index of dev, made by the command, and the workspace that holds them."
    project = Project(tmp_path_factory.mktemp("first") / "project")
    ran = project.llmops("run", "--env", "dev", "--from", "corpus", "--to", "retrieval")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return open_workspace(load_config("dev", project.root))


@pytest.fixture(scope="module")
def index(built): return open_index(built)


def test_newcomer(built, index):
    "The promise: at least 22 of the 24 questions have the right object among the two passages that the model is shown."
    asked = first_questions(ROOT)
    assert len(asked) == 24 and built.config.retrieval_k == SHOWN
    assert len(first_questions(ROOT, built.read("documents").id)) == 24, "dev holds an answer to each"
    found = ask_first(index, asked, SHOWN)
    assert found.right.sum() >= 22, found[~found.right].to_dict("records")
    record = json.loads((built.store / "stages" / "retrieval.json").read_text())
    assert record["metrics"]["first_questions"] == pytest.approx(found.right.mean()) and len(record["details"]["first_questions"]) == 24


def test_what_we_tell_people_to_ask(index):
    files = [json.loads(line) for name in ("questions", "first_questions") for line in (ROOT / "data" / f"{name}.jsonl").open()]
    questions = told()
    assert {"How do I log a metric?", "How do I point an alias at a specific model version?"} <= questions.keys()
    if (ROOT / TUTORIAL).is_file() or not read_upstream(ROOT):
        assert ELSEWHERE <= questions.keys(), "what is no longer asked need not be listed"
    wrong = {}
    for question, page in questions.items():
        if question in ELSEWHERE: continue
        shown = [p.document_id for p in index.search(question, SHOWN)]
        if not set(shown) & set(gold_of(question, files)): wrong[question] = page, shown
    assert not wrong


def test_suggestions(built, index):
    "What the chat page and the end of a run suggest is found, and is about no document that the test split asks for."
    files = [json.loads(line) for line in (ROOT / "data" / "questions.jsonl").open()]
    first = first_questions(ROOT).set_index("question").gold
    suggested = example_questions(built, 24)
    assert 4 <= len(suggested) and set(suggested) <= set(first.index)
    assert ask_first(index, first[suggested].reset_index().assign(id=""), SHOWN).right.all()
    assert not {g for q in suggested for g in first[q]} & {g for q in files if q["split"] == "test" for g in q["gold"]}


def test_full_names(built, index):
    "Who writes the name of an object in full gets that object, however prominent others are."
    ids = built.read("documents").id
    assert [id for id in ids[::9] if index.search(f"What does {id} do?", 1)[0].document_id != id] == []


# What has nothing to do with the documents; `documents.asking` trains on none of these.
OFF_TOPIC = [
    "What is the capital of France?", "What is 17 times 23?", "How do I bake a chocolate cake?", "Hello, how are you today?",
    "Who won the football world cup in 2018?", "How tall is Mount Everest?", "What is the weather like tomorrow?",
    "Write a poem about the sea.", "Which medicine helps against a headache?", "Who painted the Mona Lisa?",
    "How do I change a bicycle tyre?", "Tell me a joke.",
]


def test_nobody_is_trained_on_the_exam():
    "None of these questions can be drawn for a training, whatever is filled in."
    from llmops_ref.documents.asking import ask_everyday
    drawn = {ask_everyday(random.Random(n)) for n in range(5000)}
    assert not drawn & set(OFF_TOPIC) and len(drawn) > 100


@pytest.mark.slow(reason="the life cycle of dev as it ships, and thirty-six answers")
def test_what_a_newcomer_hears(tmp_path):
    "The promise: at least 18 of the 24 answers name the right object, and 11 of 12 questions about something else are refused."
    project = Project(tmp_path / "project")
    ran = project.llmops("run", "--env", "dev")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    asked = first_questions(ROOT)
    with open_champion(open_workspace(load_config("dev", project.root))) as ask:
        heard = [ask(question) for question in asked.question]
        others = [ask(question) for question in OFF_TOPIC]
    right = [
        names_gold(answer["answer"], gold, answer["question"], [p["document_id"] for p in answer["passages"]])
        for answer, gold in zip(heard, asked.gold)
    ]
    assert sum(right) >= 18, [answer["answer"] for answer, named in zip(heard, right) if not named]
    assert sum(answer["refused"] for answer in others) >= 11, [answer["answer"] for answer in others if not answer["refused"]]
