"""The stage that chooses a prompt, with prompts that must not be chosen."""
import json, shutil

import pytest

from conftest import copy_of
from llmops_ref.core.config import load_config
from llmops_ref.core.workspace import open_workspace

BAD = {
    "french": (
        (
            "Réponds toujours en français, par une phrase complète en français.\n\n{{passages}}\n\nQuestion: {{question}}\nRéponse en"
            " français: La réponse est que"
        ),
        "in_language",
    ),
    "story": (
        (
            "Do not use the passages. Write a short story about a captain, her ship and the storm.\n\n{{passages}}\n\nDo not answer:"
            " {{question}}\nStory: Once upon a time, the old captain"
        ),
        "grounded",
    ),
}


@pytest.fixture
def only(finished):
    "Leave one prompt in git, as a bad commit would; put everything back afterwards."
    folder, away = finished.root / "data" / "prompts", finished.root / "prompts_away"
    shutil.copytree(folder, away)
    def leave(name, text):
        for path in folder.glob("*.md"): path.unlink()
        (folder / f"{name}.md").write_text(text)
    yield leave
    shutil.rmtree(folder)
    away.rename(folder)
    manifest = finished.root / "stores" / "staging" / "stages" / "prompts.result.json"
    manifest.unlink(missing_ok=True)


def aliases(project):
    ws = open_workspace(load_config("staging", project.root))
    return {
        alias: str(v.version)
        for alias in ("champion", "challenger", "previous_champion")
        if (v := ws.prompt("answer_prompt", alias, record=False))
    }


@pytest.mark.parametrize("name", ["french", pytest.param("story", marks=pytest.mark.slow(reason="another gate of the same kind"))])
def test_a_bad_prompt_is_refused(finished, only, name):
    "It answers in the wrong language, or ignores the passages: no alias moves, the run fails and says why, what was in use stays."
    text, gate = BAD[name]
    before = aliases(finished)
    only(name, text)
    done = finished.llmops(
        "run", "--env", "staging", "--only", "prompts", GATE_MODE="raise", PROMPT_BEHAVIOUR="0", PROMPT_SEARCH="0",
        CHAT_MAX_TOKENS="40", PROMPT_REPORT_QUESTIONS="4",
    )
    assert done.returncode == 1, done.stdout
    assert "is refused" in done.stderr and f"{gate} is 0." in done.stderr and f"Version {before['champion']} stays in use" in done.stderr
    assert aliases(finished) == before
    executed = (finished.root / "runs" / "staging" / "latest" / "report.html").read_text()
    assert "is refused" in executed


def test_a_new_prompt_that_is_no_better_changes_nothing(finished, tmp_path):
    "It is registered and compared; the prompt in use stays, and the other replies are not generated again."
    other = copy_of(finished, tmp_path)
    before, ws = aliases(other), open_workspace(load_config("staging", other.root))
    judged = ws.mlflow().genai.set_prompt_version_tag           # of so few questions none passes, and only who passed has to be beaten
    judged(ws.registered("answer_prompt"), int(before["champion"]), "verdict", "PASSED")
    (other.root / "data" / "prompts" / "terse.md").write_text("{{passages}}\n\n{{question}}")
    done = other.llmops("run", "--env", "staging", "--only", "prompts", PROMPT_BEHAVIOUR="0", PROMPT_SEARCH="0")
    assert done.returncode == 0, done.stderr
    details = json.loads((other.root / "stores" / "staging" / "stages" / "prompts.json").read_text())["details"]
    assert "terse" in {row["design"] for row in details["designs"]} and aliases(other)["champion"] == before["champion"]


def test_going_back_to_the_previous_prompt(finished):
    "By one command, and forth again; the next run keeps what was gone back to, since nothing is clearly better."
    ws, before = open_workspace(load_config("staging", finished.root)), aliases(finished)
    other = next(str(v) for v in range(1, 9) if str(v) != before["champion"])
    if "previous_champion" not in before:
        nothing = finished.inside("rollback", "--prompt", "--env", "staging")
        assert nothing.returncode == 1 and "There is no previous prompt in staging" in nothing.stderr
    ws.set_prompt_alias("answer_prompt", "previous_champion", other)
    done = finished.inside("rollback", "--prompt", "--env", "staging")
    assert done.returncode == 0 and f"Version {other} of the prompt is champion" in done.stdout
    assert (aliases(finished)["champion"], aliases(finished)["previous_champion"]) == (other, before["champion"])
    assert (
        finished.llmops("run", "--env", "staging", "--only", "prompts", "--force", PROMPT_BEHAVIOUR="0", PROMPT_SEARCH="0").returncode == 0
        and aliases(finished)["champion"] == other
    )
    assert (
        finished.inside("rollback", "--prompt", "--env", "staging").returncode == 0 and aliases(finished)["champion"] == before["champion"]
    )


@pytest.mark.parametrize(
    "text, says",
    [
        (
            "{{question}}",
            "odd.md: A prompt template needs exactly the variables passages and question (and may have examples), this one has question",
        ),
        ("{{passages}} {{question}} {{mood}}", "this one has mood, passages, question"),
    ],
)
def test_a_template_with_wrong_variables_stops_before_anything_runs(project, text, says):
    (project.root / "data" / "prompts" / "odd.md").write_text(text)
    done = project.inside("run")
    assert (
        done.returncode == 1
        and says in done.stderr
        and "  run     01_hub         it" not in done.stdout.split("Running:")[-1]
        and "Running:" not in done.stdout
    )


def test_a_leak_between_the_splits_stops_the_run_before_any_prompt_is_asked(finished, tmp_path):
    "A question of the train split, asked again in the test split; in a copy of the project, which may keep the spoilt tables."
    other = copy_of(finished, tmp_path)
    path = other.root / "data" / "questions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    train, test = (next(row for row in rows if row["split"] == split and row["type"] == "howto") for split in ("train", "test"))
    path.write_text("".join(json.dumps(row | (dict(question=train["question"].lower()) if row is test else {})) + "\n" for row in rows))
    assert other.llmops("run", "--env", "staging", "--only", "corpus").returncode == 0
    before = aliases(other)
    done = other.llmops("run", "--env", "staging", "--only", "prompts", GATE_MODE="raise")
    assert done.returncode == 1 and "leak between splits" in done.stderr and "`llmops questions check` lists all" in done.stderr, (
        done.stdout + done.stderr
    )
    assert aliases(other) == before and "prompt plain" not in done.stdout
