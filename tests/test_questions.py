"""The evaluation questions as people work on them: by the command, on a file that must not be spoilt."""
import json

import pandas as pd
import pytest

from conftest import PATIENCE, ROOT
from llmops_ref.bench.choices import SEARCH_QUESTIONS
from llmops_ref.evaluation.questions import load_questions, twins
from llmops_ref.core.scoring import names_gold

ASKED = "Which call tells whether a metric was logged?"
ADD = (
    "questions", "add", "--question", ASKED, "--gold", "mlflow.MlflowClient.get_metric_history", "--answer",
    "Use `mlflow.MlflowClient.get_metric_history`; it lists what was logged.", "--type", "howto",
)


def file(project): return project.root / "data" / "questions.jsonl"


def change(project, id, **values):
    "Edit one question by hand, as a careless person would."
    rows = [json.loads(line) for line in file(project).read_text().splitlines()]
    file(project).write_text("".join(json.dumps(row | values if row["id"] == id else row, ensure_ascii=False) + "\n" for row in rows))


def test_our_own_questions_are_clean(project):
    done = project.llmops("questions", "check")
    assert (
        done.returncode == 0
        and "154 questions, 0 problems; gold objects not looked up, since the stage corpus has not run in dev." in done.stdout
    ), (done.stdout + done.stderr)


def test_what_the_search_is_chosen_by_is_not_what_it_is_measured_by():
    "No object is gold on both sides, in the file for the search and in the other one, and no question stands on both."
    more = [json.loads(line) for line in (ROOT / SEARCH_QUESTIONS).read_text().splitlines()]
    ours = [json.loads(line) for line in (ROOT / "data" / "questions.jsonl").read_text().splitlines()]
    side = lambda q: dict(train="choosing", validation="choosing").get(q["split"], "measuring")
    sides = {}
    for q in more + ours:
        for gold in q["gold"]: sides.setdefault(gold, set()).add(side(q))
    assert not {gold for gold, found in sides.items() if len(found) > 1}
    asked = pd.DataFrame(more + ours)
    assert asked.id.is_unique and len(more) >= 370
    where = {q["id"]: side(q) for q in more + ours}
    assert not [(a, b) for a, b, _ in twins(asked) if where[a] != where[b]]
    assert not [q["id"] for q in more if q["gold"] and not names_gold(q["answer"], q["gold"], q["question"])]


def test_our_reference_answers_are_right_by_our_own_scorer(project):
    questions = load_questions(file(project))
    assert [q.id for q in questions[questions.type != "unanswerable"].itertuples() if not names_gold(q.answer, q.gold, q.question)] == []


def test_a_question_is_used_once_it_is_reviewed(project):
    before = file(project).read_bytes()
    added = project.inside(*ADD, "--by", "Ada")
    assert (
        added.returncode == 0 and added.stdout.startswith("q155 is a draft of the test split") and "not looked up" in added.stderr
    ), added.stderr
    assert file(project).read_bytes().startswith(before) and "q155" not in set(load_questions(file(project)).id)
    assert ASKED in project.inside("questions", "list", "--drafts").stdout
    assert project.inside("questions", "check").returncode == 0
    done = project.inside("questions", "review", "q155")
    assert done.returncode == 1 and "Say --accept or --reject" in done.stderr
    assert project.inside("questions", "review", "q155", "--accept", "--by", "Grace").returncode == 0
    row = json.loads(file(project).read_text().splitlines()[-1])
    assert [row["by"], row["reviewed_by"], "status" in row] == ["Ada", "Grace", False] and "q155" in set(load_questions(file(project)).id)
    again = project.inside("questions", "review", "q155", "--reject")
    assert again.returncode == 1 and "was reviewed already" in again.stderr and load_questions(file(project)).id.iloc[-1] == "q155"


def test_a_rejected_question_leaves_no_trace(project):
    before = file(project).read_bytes()
    added = json.loads(
        project.inside("questions", "add", "--question", "What does a pizza cost?", "--type", "unanswerable", "--json").stdout
    )
    assert added["answer"] == "I cannot answer that from the documents." and added["draft"] and added["notes"] == []
    assert project.inside("questions", "review", added["id"], "--reject").returncode == 0
    assert file(project).read_bytes() == before


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"--type": "riddle"}, "has type 'riddle', expected one of lookup, howto"),
        (
            {"--question": "how can i point, or pin, an alias to a specific version of the model"},
            "a near-duplicate (83% of the words) of q001",
        ),
        (
            {
                "--question": "How do I point an alias at a specific model version",
                "--gold": "mlflow.MlflowClient.set_registered_model_alias",
                "--answer": "Use `set_registered_model_alias`.",
            },
            "the same question as q001. Delete",
        ),
        ({"--split": "train"}, "is gold in the test split already, and would leak. Leave out the split, or say test."),
        ({"--answer": "Just look."}, "names none of the gold objects. Name `mlflow.MlflowClient.get_metric_history` in it"),
        ({"--answer": None}, "Give --answer: a reference answer, which names one of them."),
    ],
    ids=["type", "twin", "same", "gold of the other split", "answer", "nothing to ask"],
)
def test_a_bad_question_is_refused_and_the_file_stays(project, arguments, says):
    before, values = file(project).read_bytes(), dict(zip(ADD[2::2], ADD[3::2])) | arguments
    done = project.inside("questions", "add", *[part for pair in values.items() if pair[1] is not None for part in pair])
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert file(project).read_bytes() == before


def test_people_who_add_at_once_do_not_overwrite_each_other(project):
    words = ("apples", "pears", "plums", "cherries")
    jobs = [project.start("questions", "add", "--type", "unanswerable", "--question", f"What do {word} cost in Rome?") for word in words]
    said = [job.communicate(timeout=PATIENCE)[0] for job in jobs]
    rows = load_questions(file(project), drafts=True).query("draft")
    assert rows.id.tolist() == ["q155", "q156", "q157", "q158"] and {q.split()[2] for q in rows.question} == set(words), said


def test_check_finds_leaks_and_broken_gold(project):
    "In a file that somebody edited by hand, and with the documents of a corpus that has run."
    from llmops_ref.core.config import load_config
    from llmops_ref.core.workspace import open_workspace
    import pandas as pd
    questions = load_questions(file(project))
    train, test = (questions[(questions.split == split) & (questions.type == "howto")].iloc[0] for split in ("train", "test"))
    open_workspace(load_config("dev", project.root)).write(
        "documents", pd.DataFrame(dict(id=sorted({g for gold in questions.gold for g in gold})))
    )
    assert "0 problems; gold objects looked up among" in project.inside("questions", "check").stdout
    change(project, test.id, question=train.question.lower().rstrip("?"))
    change(project, "q003", gold=["mlflow.genai.load_promt"], answer="Use `mlflow.genai.load_promt`.")
    done = project.inside("questions", "check")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "leak between splits: the same question as" in done.stdout
    assert (
        "q003  gold object mlflow.genai.load_promt is not among the documents\n      Write mlflow.genai.load_prompt, if" in done.stdout
        and "2 problems" in done.stdout
    )
    report = json.loads(project.inside("questions", "check", "--json").stdout)
    assert len(report["problems"]) == 2 and report["gold_looked_up"]
    change(project, test.id, question=test.question, gold=list(train.gold))
    done = project.inside("questions", "check")
    assert done.returncode == 1 and "is gold in both splits. Move the question" in done.stderr
