"""MLflow's judges against a judge on a socket: one that is right, one that talks nonsense, one that is not there, one that goes away."""
import json, os, time

import pandas as pd, pytest

from llmops_ref.evaluation import judges as module
from llmops_ref.core.config import SettingsError, load_config
from llmops_ref.evaluation.judges import agreement_table, judge_answers, make_judges
from llmops_ref.core.workspace import open_workspace
from provider import Provider

ANSWERS = pd.DataFrame(
    [
        dict(
            question=f"How do I log a metric, case {n}?", answer=answer, reference="Use `mlflow.log_metric`.",
            gold=["mlflow.log_metric"], passages=[dict(text="mlflow.log_metric(key, value) Log a metric.")],
            correct=correct, grounded=grounded,
        )
        for n, (answer, correct, grounded) in enumerate(
            [("Use `mlflow.log_metric` [1].", 1.0, 1.0), ("Use `os.remove`.", 0.0, 0.2), ("Call log_metric, it logs one.", 0.0, 1.0)]
        )
    ]
)


def verdict(text):
    return json.dumps(
        dict(result="yes" if "log_metric` [1]" in text or "Call log_metric" in text else "no", rationale="as the passages say")
    )


@pytest.fixture
def asked(tmp_path, monkeypatch):
    "Judges as the settings make them, for a judge at an address."
    monkeypatch.setenv("JUDGE_API_KEY", "sk-right")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return lambda url, **settings: make_judges(
        open_workspace(load_config("dev", store=str(tmp_path), **dict(judge_model="openai:/acme-large", judge_url=url) | settings))
    )


def test_a_judge_reads_every_answer(asked):
    with Provider(key="sk-right") as judge:
        judge.answer_to = verdict
        judged = judge_answers(asked(judge.url), ANSWERS)
        assert (
            judged.judge_correct.tolist() == [1, 0, 1]
            and set(judged.judge_error) == {""}
            and "as the passages say" in judged.judge_rationale[0]
        )
        texts = [str(request["body"]["messages"]) for request in judge.asked]
        assert (
            len(texts) == 6 and sum("Log a metric." in text for text in texts) == 3
        ), "only the judge of groundedness is shown the passages"
        assert {request["path"] for request in judge.asked} == {"/v1/chat/completions"}
    table = agreement_table(judged).set_index("judge")
    assert table.agree.round(2).to_dict() == dict(judge_correct=0.67, judge_grounded=1.0) and table.no_verdict.sum() == 0


def test_nonsense_is_named_and_the_rest_is_kept(asked):
    with Provider(key="sk-right") as judge:
        judge.answer_to = lambda text: (
            "I would rather talk about boats."
            if "case 0" in text
            else '{"result": "perhaps", "rationale": "x"}' if "case 1" in text else verdict(text)
        )
        judged = judge_answers(asked(judge.url), ANSWERS, workers=1)
    assert judged.judge_correct.isna().tolist() == [True, True, False]
    assert "boats" in judged.judge_error[0] and "perhaps" in judged.judge_error[1] and judged.judge_error[2] == ""
    assert agreement_table(judged).no_verdict.tolist() == [2, 2] and judged.correct.tolist() == ANSWERS.correct.tolist()


@pytest.mark.parametrize(
    "text", ['{"verdict": "yes"}', "[1]", "null", "", '{"result": true}', '{"result": "yes", "rationale": null}'], ids=str
)
def test_json_of_another_form_is_nonsense_too(asked, text):
    "Each answer is asked about: somebody is there."
    with Provider(key="sk-right") as judge:
        judge.answer_to = lambda _: text
        judged = judge_answers(asked(judge.url), ANSWERS, workers=1)
        assert len(judge.asked) == 6 and judged.judge_correct.isna().all() and judged.judge_error.str.contains("judge_grounded").all()


@pytest.mark.parametrize(
    "fault, says, times",
    [
        ("down", "Failed to connect to http://127.0.0.1:9", 0), ("401", "Incorrect API key", 1),
        ("404", "does not exist", 1), ("hang", "timed out after 1", 1), ("close", "Failed to connect", 2),
        ("503", "overloaded", 3),
    ],
)
def test_a_judge_that_is_not_there_costs_no_minutes(asked, monkeypatch, fault, says, times):
    "MLflow alone tries again for three minutes an answer, and for an hour if the judge hangs."
    monkeypatch.setattr(module, "WAITS", (0.1, 0.1))
    with Provider(key="sk-right") as judge:
        judge.fault = fault
        judges = asked("http://127.0.0.1:9/v1" if fault == "down" else judge.url, chat_timeout=1.0)
        start = time.time()
        judged = judge_answers(judges, ANSWERS)
        assert time.time() - start < 5 and len(judge.asked) == times
    assert (
        judged.judge_correct.isna().all()
        and says in judged.judge_error[0]
        and judged.judge_error[1:].str.startswith("not asked any more").all()
        and judged.judge_error[1:].str.contains(says).all()
    )
    assert (
        agreement_table(judged).no_verdict.tolist() == [3, 3]
        and "OPENAI_API_KEY" not in os.environ
        and "sk-right" not in repr(judges) + judged.to_json()
    )


@pytest.mark.parametrize("fault", ["503", "close", "hang"])
def test_a_judge_that_goes_away_is_left_in_peace(asked, monkeypatch, fault):
    "Verdicts that were given are kept."
    monkeypatch.setattr(module, "WAITS", (0.1, 0.1))
    with Provider(key="sk-right") as judge:
        judge.answer_to = verdict
        judge.faults, judge.fault = [None, None], fault
        judged = judge_answers(asked(judge.url, chat_timeout=1.0), pd.concat([ANSWERS] * 3, ignore_index=True), workers=1)
        assert len(judge.asked) == 2 + 3 * {"503": 3, "close": 2, "hang": 1}[fault]
    assert (
        judged.judge_correct.notna().tolist() == [True] + [False] * 8
        and judged.judge_error[0] == ""
        and judged.judge_error[4:].str.startswith("not asked any more").all()
    )


@pytest.mark.parametrize("faults", [["429"], ["503", "503"], ["close"]], ids=str)
def test_what_passes_costs_no_verdict(asked, monkeypatch, faults):
    monkeypatch.setattr(module, "WAITS", (0.1, 0.1))
    with Provider(key="sk-right") as judge:
        judge.answer_to, judge.faults = verdict, faults
        judged = judge_answers(asked(judge.url), ANSWERS)
    assert judged.judge_correct.tolist() == [1, 0, 1] and set(judged.judge_error) == {""}


def test_without_a_model_there_is_no_judge(asked):
    judges = asked("", judge_model="")
    assert not judges and judges.by_name == {}


@pytest.mark.parametrize(
    "model, says",
    [
        ("opnai:/gpt-5-mini", "the provider 'opnai'"), ("gpt-5-mini", "must be a provider and a model"),
        ("openai:/gpt 5", "must be a provider and a model"),
        ("anthropic:/claude-haiku-4-5", "ANTHROPIC_API_KEY is not set"),
        ("databricks:/databricks-claude-sonnet-4-5", "No workspace is configured"),
    ],
    ids=lambda value: value.split(":")[0],
)
def test_a_judge_that_cannot_be_reached_is_named_at_once(asked, monkeypatch, tmp_path, model, says):
    for name in [name for name in os.environ if name.startswith(("DATABRICKS_", "ANTHROPIC_", "ARM_"))]: monkeypatch.delenv(name)
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(SettingsError, match=says): asked("", judge_model=model)


def test_settings_that_cannot_work_are_named_before_any_work(project, monkeypatch):
    done = project.inside("run", JUDGE_MODEL="openai:/acme-large", JUDGE_URL="https://llm.acme.example/v1")
    assert done.returncode == 1 and "JUDGE_API_KEY is not set" in done.stderr and "Running:" not in done.stdout
