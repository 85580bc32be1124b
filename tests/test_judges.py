"""MLflow's judges against a judge on a socket: one that is right, one that talks nonsense, one that is not there."""
import json, time

import pandas as pd, pytest

from llmops_ref.config import SettingsError, load_config
from llmops_ref.judges import agreement_table, check_judges, judge_answers, make_judges
from llmops_ref.workspace import open_workspace
from provider import Provider

ANSWERS = pd.DataFrame([dict(question=f"How do I log a metric, case {n}?", answer=answer, reference="Use `mlflow.log_metric`.", gold=["mlflow.log_metric"], passages=[dict(text="mlflow.log_metric(key, value) Log a metric.")],
                             correct=correct, grounded=grounded) for n, (answer, correct, grounded) in enumerate([("Use `mlflow.log_metric` [1].", 1.0, 1.0), ("Use `os.remove`.", 0.0, 0.2), ("Call log_metric, it logs one.", 0.0, 1.0)])])


def verdict(text): return json.dumps(dict(result="yes" if "log_metric` [1]" in text or "Call log_metric" in text else "no", rationale="as the passages say"))


@pytest.fixture
def asked(tmp_path, monkeypatch):
    "Judges as the settings make them, for a judge at an address."
    monkeypatch.setenv("JUDGE_API_KEY", "sk-right")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return lambda url, **settings: make_judges(open_workspace(load_config("dev", store=str(tmp_path), judge_model="openai:/acme-large", judge_url=url, **settings)))


def test_a_judge_reads_every_answer(asked):
    with Provider(key="sk-right") as judge:
        judge.answer_to = verdict
        judged = judge_answers(asked(judge.url), ANSWERS)
        assert judged.judge_correct.tolist() == [1, 0, 1] and set(judged.judge_error) == {""} and "as the passages say" in judged.judge_rationale[0]
        texts = [str(request["body"]["messages"]) for request in judge.asked[1:]]
        assert len(texts) == 6 and sum("Log a metric." in text for text in texts) == 3, "only the judge of groundedness is shown the passages"
        assert {request["path"] for request in judge.asked} == {"/v1/chat/completions"}
    table = agreement_table(judged).set_index("judge")
    assert table.agree.round(2).to_dict() == dict(judge_correct=0.67, judge_grounded=1.0) and table.no_verdict.sum() == 0


def test_nonsense_is_named_and_the_rest_is_kept(asked):
    with Provider(key="sk-right") as judge:
        judge.answer_to = lambda text: "I would rather talk about boats." if "case 0" in text else '{"result": "perhaps", "rationale": "x"}' if "case 1" in text else verdict(text)
        judged = judge_answers(asked(judge.url), ANSWERS, workers=1)
    assert judged.judge_correct.isna().tolist() == [True, True, False]
    assert "boats" in judged.judge_error[0] and "perhaps" in judged.judge_error[1] and judged.judge_error[2] == ""
    assert agreement_table(judged).no_verdict.tolist() == [2, 2] and judged.correct.tolist() == ANSWERS.correct.tolist()


@pytest.mark.parametrize("fault, says", [("down", "does not answer"), ("401", "answers 401"), ("html", None)])
def test_a_judge_that_is_not_there_costs_no_minutes(asked, fault, says):
    "MLflow alone tries again for three minutes an answer."
    with Provider(key="sk-right") as judge:
        judge.fault = fault
        judges = asked("http://127.0.0.1:9/v1" if fault == "down" else judge.url)
        start = time.time()
        judged = judge_answers(judges, ANSWERS, workers=1)
        assert time.time() - start < 30
    assert judged.judge_correct.isna().all() and all(judged.judge_error) and (says is None or says in judged.judge_error[0])


def test_settings_that_cannot_work_are_named_before_any_work(project, monkeypatch):
    done = project.llmops("run", JUDGE_MODEL="openai:/acme-large", JUDGE_URL="https://llm.acme.example/v1")
    assert done.returncode == 1 and "JUDGE_API_KEY is not set" in done.stderr and "Running:" not in done.stdout
