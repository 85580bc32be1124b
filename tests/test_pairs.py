"Who writes the training pairs besides our templates: a teacher on a socket, and users whose corrections a reviewer let in."
import json
from types import SimpleNamespace

import pandas as pd
import pytest
from langchain_core.exceptions import ModelError

from llmops_ref.core.config import load_config
from llmops_ref.feedback.votes import record_feedback
from llmops_ref.feedback.inference_table import collect_requests
from llmops_ref.tuning.pairs import build_pairs, check_pairs
from llmops_ref.feedback.review import review_feedback
from llmops_ref.evaluation.reviewed import reviewed_cases
from llmops_ref.runner.plan import find_stage, reasons, stage_code
from llmops_ref.tuning.teacher import open_teacher
from llmops_ref.core.files import DataError
from llmops_ref.core.workspace import open_workspace
from provider import Provider

VERBS = [
    "Create a run", "Delete a trace", "Log a metric", "Load the prompt", "Search all models", "Register one dataset",
    "Save some weights", "Stop the server", "Rename an experiment", "Restore that version", "Copy a policy",
    "Count every token",
]
CHUNKS = pd.DataFrame(
    [
        dict(document_id=f"pkg.Api.m{i}", kind="method", position=0, text=f"pkg.Api.m{i}(x)\n{verb} with option {i}{i}.")
        for i, verb in enumerate(VERBS)
    ]
)
QUESTIONS = pd.DataFrame(
    [
        dict(id="q1", question="Is it still on after midnight?", gold=["pkg.Api.m7"], answer="Use `pkg.Api.m7`.", split="test"),
        dict(id="q2", question="Can I read the prompt?", gold=["pkg.Api.m3"], answer="Use `pkg.Api.m3`.", split="train"),
    ]
)


class Everything:
    def search(self, question, k): return [SimpleNamespace(document_id=d) for d in CHUNKS.document_id]


def build(**more): return build_pairs(Everything(), CHUNKS, QUESTIONS, examples=16, held_out=8, k=2, **more)


@pytest.fixture
def taught(tmp_path, monkeypatch):
    "A teacher as the settings make it, for an address."
    monkeypatch.setenv("TEACHER_API_KEY", "sk-right")
    return lambda url: open_teacher(
        open_workspace(load_config("dev", store=str(tmp_path), teacher_url=url, teacher_model="acme-large", chat_retries=0))
    )


def write_about(text):
    "What a good teacher says of the entry in a request, and a test question beside it, as people tend to ask the same."
    verb = next(verb for verb in VERBS if f"{verb} with option" in text)
    return json.dumps(
        dict(
            pairs=[dict(question=f"my case {n}: how would somebody {verb.lower()}", answer=f"{verb} with option.") for n in range(5)]
            + [dict(question=QUESTIONS.question[0], answer=f"{verb} with option.")]
        )
    )


def test_a_teacher_writes_the_questions_about_documents_only(taught):
    with Provider(key="sk-right") as provider:
        provider.answer_to = write_about
        ours, theirs = build(), build(teacher=taught(provider.url))
        asked = len(provider.asked)
        assert {r["body"]["response_format"]["type"] for r in provider.asked} == {"json_schema"} and all(
            "<entry>" in str(r["body"]["messages"]) for r in provider.asked
        )
        again = build(teacher=taught(provider.url))
        assert len(provider.asked) == asked, "replies that were paid for are kept"
    assert again.messages.tolist() == theirs.messages.tolist() and len(ours) == len(theirs)
    answerable = ours.document_id != ""
    assert (theirs.kind[answerable & (ours.kind != "human")] == "teacher").mean() > 0.8 and (theirs.kind == "human").sum() == (
        ours.kind == "human"
    ).sum() > 0
    assert theirs[~answerable].question.tolist() == ours[~answerable].question.tolist(), "what is to be refused stays as it was"
    one = theirs[theirs.kind == "teacher"].iloc[0]
    verb = VERBS[int(one.document_id.rpartition("m")[2])]
    assert verb.lower() in one.question and one.source == "teacher acme-large" and one.question in one.messages[-2]["content"]
    assert one.messages[-1]["content"] == f"Use `{one.document_id}` [{list(one.shown).index(one.document_id) + 1}]. {verb} with option."
    check_pairs(theirs, QUESTIONS)                  # the test question, which the teacher wrote too, is not among them


@pytest.mark.parametrize(
    "fault, says",
    [("401", "Set the right one in TEACHER_API_KEY"), ("404", "no such model"), ("html", "no working chat model"), ("503", "overloaded")],
)
def test_a_teacher_that_cannot_answer_is_asked_once(taught, fault, says):
    with Provider(key="sk-right") as provider:
        provider.fault = fault
        with pytest.raises(ModelError, match=says): build(teacher=taught(provider.url))
        assert len(provider.asked) == 1


def test_a_teacher_that_talks_nonsense_is_named(taught):
    with Provider(key="sk-right", answer="As a language model, I love questions.") as provider:
        with pytest.raises(DataError, match="acme-large wrote nothing usable about .* 'As a language model"):
            build(teacher=taught(provider.url))
        assert len(provider.asked) <= 8


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "A store in which two people asked, and the tables that a review looks into."
    ws = open_workspace(load_config("dev", store=str(tmp_path_factory.mktemp("store"))))
    mlflow = ws.mlflow()
    mlflow.set_experiment(ws.experiment)
    ws.write("documents", pd.DataFrame(dict(id=CHUNKS.document_id)))
    ws.write("questions", QUESTIONS)
    for question in ("How do I keep my weights?", "is it STILL on after midnight"):
        with mlflow.start_span("assistant", span_type="AGENT") as span:
            span.set_inputs(dict(input=[dict(role="user", content=question)]))
            span.set_outputs(dict(output=[dict(content=[dict(text="Use `pkg.Api.m0` [1].")])], custom_outputs={}))
            mlflow.update_current_trace(tags=dict(purpose="traffic"))
    mlflow.flush_trace_async_logging()
    return ws, collect_requests(ws).set_index("question").trace_id


def vote(store, question="How do I keep my weights?", **more):
    ws, traces = store
    return record_feedback(ws, traces[question], good=False, **more)["feedback_id"]


def test_a_correction_is_learned_once_a_reviewer_lets_it_in(store):
    ws, _ = store
    wanted = dict(correction="Use `pkg.Api.m6` [2]. It saves some weights.")
    feedback, unread, refused = vote(store, **wanted), vote(store, **wanted), vote(store, **wanted)
    assert (
        reviewed_cases(ws).empty and ws.reads["table:reviewed"] is None
    ), "a vote alone changes nothing, and a stage that looks will notice the first review"
    review_feedback(ws, feedback, by="ann")
    review_feedback(ws, refused, by="ann", accept=False)
    cases = reviewed_cases(ws)
    assert (
        cases.id.tolist() == [feedback, refused]
        and cases.accepted.tolist() == [True, False]
        and ws.current("table:reviewed") == ws.reads["table:reviewed"] == "1"
    )
    pairs = build(reviewed=cases[cases.accepted])
    learned = pairs[pairs.kind == "reviewed"]
    assert (
        len(learned) >= 1
        and set(learned.split) == {"train"}
        and set(learned.source) == {f"feedback {feedback}"}
        and unread not in str(pairs.source.tolist())
    )
    one = learned.iloc[0]
    assert "How do I keep my weights?" in one.messages[-2]["content"] and one.messages[-1]["content"].startswith(
        f"Use `pkg.Api.m6` [{list(one.shown).index('pkg.Api.m6') + 1}]."
    )
    finetune = find_stage("finetune")
    ws.path("stages", "finetune.json").write_text(
        json.dumps(dict(code=stage_code(finetune, ws.config.root), params={}, reads={"table:reviewed": None}, writes={}))
    )
    assert reasons(ws, finetune) == ["input table:reviewed was not there before"], "the first review is a reason to train again"
    with pytest.raises(DataError, match="was accepted by ann already"): review_feedback(ws, feedback, by="bob")
    with pytest.raises(DataError, match="was rejected by ann already"): review_feedback(ws, refused, by="bob")


def test_every_accepted_case_is_trained_on_and_none_is_held_out():
    "Whatever the draw: also where a template would ask about the same document, and where its docstring has no first sentence."
    terse = pd.DataFrame([dict(document_id="pkg.Api.terse", kind="method", position=0, text="pkg.Api.terse(x)\nTerse.")])
    cases = pd.DataFrame(
        [
            dict(id=f"f{n}", question=f"My real problem number {n}?", gold=[name], answer=f"Use `{name}`.")
            for n, name in enumerate(["pkg.Api.m3", "pkg.Api.m6", "pkg.Api.terse", "pkg.Api.m6"])
        ]
    )
    for seed in range(25):
        pairs = build_pairs(Everything(), pd.concat([CHUNKS, terse]), QUESTIONS, examples=8, held_out=4, k=2, reviewed=cases, seed=seed)
        learned = pairs[pairs.kind == "reviewed"]
        assert set(learned.source) == {f"feedback f{n}" for n in range(4)} and set(learned.split) == {"train"}, seed
        assert not set(pairs[pairs.split == "validation"].shown.explode()) & set(learned.document_id), seed


def test_more_pairs_than_a_corpus_has_are_not_made():
    pairs = build_pairs(Everything(), CHUNKS, QUESTIONS, examples=4000, held_out=4, k=2)
    assert 4 < len(pairs) < 4000 and check_pairs(pairs, QUESTIONS)["validation"] == 4
    with pytest.raises(DataError, match="0 to train on, .* `finetune_held_out`"):
        check_pairs(build_pairs(Everything(), CHUNKS, QUESTIONS, examples=4, held_out=4000, k=2), QUESTIONS)


def test_nothing_that_exists_is_called_invented():
    "A name of the test split may not be asked, but it exists: to refuse it would be taught wrongly."
    chunks = pd.DataFrame(
        [
            dict(
                document_id=f"pkg.Api.{verb}_{noun}", kind="method", position=0,
                text=f"pkg.Api.{verb}_{noun}(x)\n{verb.capitalize()} the {noun} of this kind {n}.",
            )
            for n, (verb, noun) in enumerate((v, o) for v in ("load", "save", "find", "drop") for o in ("run", "model", "trace", "prompt"))
            if (verb, noun) != ("drop", "run")
        ]
    )
    hidden = pd.DataFrame(
        [dict(document_id="pkg.Api.drop_run", kind="method", position=0, text="pkg.Api.drop_run(x)\nDrop a run for good and all.")]
    )
    class Index:
        def search(self, question, k): return [SimpleNamespace(document_id=d) for d in chunks.document_id]
    test = QUESTIONS.assign(gold=[["pkg.Api.drop_run"], []], answer="I cannot answer that from the documents.")
    asked = [
        q
        for seed in range(30)
        for q in (
            build_pairs(Index(), pd.concat([chunks, hidden]), test, examples=16, held_out=4, k=2, seed=seed)
            .query("kind == 'invented'")
            .question
        )
    ]
    assert not [q for q in asked if "drop_run" in q]


@pytest.mark.parametrize("given, says", [
    (dict(), "says that the answer was bad, not which one would be good"),
    (dict(correction="Use `pkg.Api.m6`.", source="synthetic"), "is made up"),
    (dict(correction="Use `pkg.Api.m6`, or mail me: ann@example.com"), r"personal data \(email\)"),
    (dict(correction="Use the button."), "names no document in backticks"),
    (dict(correction="Use `pkg.m6`."), "Did you mean `pkg.Api.m6`"),
    (dict(correction="Use `pkg.Api.m7`."), "The test split asks about pkg.Api.m7"),
    (dict(question="is it STILL on after midnight", correction="Use `pkg.Api.m6`."), "The test split asks the same")])
def test_what_must_not_be_learned_is_not_let_in(store, given, says):
    ws, _ = store
    before, feedback = ws.current("table:reviewed"), vote(store, **given)
    with pytest.raises(DataError, match=says): review_feedback(ws, feedback, by="ann")
    assert ws.current("table:reviewed") == before, "and it can still be rejected"


def test_a_review_has_a_name_and_a_case(store):
    with pytest.raises(DataError, match="say who reviews"): review_feedback(store[0], "fb", by=" ")
    with pytest.raises(DataError, match="There is no feedback 'fb'"): review_feedback(store[0], "fb", by="ann")


def test_a_refusal_can_be_what_was_right(store):
    ws, _ = store
    feedback = vote(store, correction="I cannot answer that from the documents.")
    review_feedback(ws, feedback, by="ann")
    cases = reviewed_cases(ws)
    pairs = build(reviewed=cases[cases.id == feedback])
    learned = pairs[pairs.kind == "reviewed"]
    assert (
        len(learned) >= 1
        and set(learned.document_id) == {""}
        and learned.messages.iloc[0][-1]["content"] == "I cannot answer that from the documents."
    )
