"""Alarms that ring when they should, and only then: on real questions, real embeddings, and the stage itself."""
import json

import numpy as np
import pandas as pd
import pytest

from conftest import copy_of
from llmops_ref.core.config import load_config
from llmops_ref.models.embedding import open_embedder
from llmops_ref.feedback.inference_table import COLUMNS
from llmops_ref.monitoring import look_at, rehearse, render_monitoring
from llmops_ref.feedback.rehearsal import question_topics
from llmops_ref.core.workspace import open_workspace

ANSWER = dict(
    dict.fromkeys(COLUMNS, ""), status="OK", answer="Use it [1].", cited=True, refused=False, passages=["a"],
    similarity=0.6, grounded=0.9, readable=1.0, first_token_seconds=0.3, prompt_tokens=300, completion_tokens=20,
    cost_usd=1e-4, sequence=0,
)
ANSWERS = pd.DataFrame([ANSWER | dict(seconds=s) for s in (0.7, 0.9, 1.0, 1.1, 1.4)])
NO_VOTES = pd.DataFrame(columns=["feedback_id", "trace_id", "time", "good", "reason", "comment", "correction", "source"])


class Kept:
    "An embedder that embeds a text once."
    def __init__(self, embedder): self.embedder, self.known = embedder, {}

    def embed(self, texts, of):
        new = [t for t in dict.fromkeys(texts) if t not in self.known]
        if new: self.known |= dict(zip(new, self.embedder.embed(new, of)))
        return np.stack([self.known[t] for t in texts])


@pytest.fixture(scope="module")
def material(finished):
    "Settings, an embedder, and questions about the documents of the finished project."
    config = load_config("staging", finished.root, cache=finished.environment["LLMOPS_CACHE"], monitoring_simulated=100)
    ws = open_workspace(config)
    return config, Kept(open_embedder(ws, "int8")), question_topics(ws.read("chunks"))


AGAIN = pytest.mark.slow(reason="more weeks of the same")


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 20), marks=AGAIN)], ids=["eight", "twelve more"])
def test_no_alarm_on_steady_weeks(material, seeds):
    config, embedder, topics = material
    alarms = {
        seed: seen.alarms for seed in seeds if (seen := rehearse(config, ANSWERS, topics, embedder, faults=False, seed=seed).look).alarms
    }
    assert not alarms


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=AGAIN), pytest.param(2, marks=AGAIN)])
def test_a_hidden_drift_and_a_hidden_outage_are_found_on_their_days(material, seed):
    config, embedder, topics = material
    played = rehearse(config, ANSWERS, topics, embedder, seed=seed)
    assert (played.planted.found == played.planted.day).all(), played.planted
    assert {"corpus", "deployment"} <= set(played.look.triggers.stage)


@pytest.mark.parametrize("change", ["empty", "one row", "duplicated", "all-null votes", "the future", "a clock that goes backwards"])
def test_windows_that_are_odd(material, change):
    config, embedder, topics = material
    now = pd.Timestamp("2026-11-27 12:00", tz="UTC")
    rows = pd.DataFrame(
        [
            ANSWER
            | dict(
                trace_id=f"t{i}", seconds=1.0, question=f"How do I log a metric {i}?", purpose="traffic", time=now - pd.Timedelta(hours=i)
            )
            for i in range(40)
        ]
    )
    votes = NO_VOTES
    if change == "empty": rows = rows.head(0)
    if change == "one row": rows = rows.head(1)
    if change == "duplicated": rows = pd.concat([rows, rows, rows], ignore_index=True)
    if change == "all-null votes":
        votes = pd.DataFrame(
            [
                dict(feedback_id=f"f{i}", trace_id=f"t{i}", time=now, good=None, reason=None, comment=None, correction=None, source="user")
                for i in range(40)
            ]
        )
    if change == "the future": rows = rows.assign(time=rows.time + pd.Timedelta(days=400))
    if change == "a clock that goes backwards": rows = rows.assign(time=rows.time.to_numpy()[::-1])
    seen = look_at(config, rows, votes, embedder, now)
    assert len(seen.requests) == {"empty": 0, "one row": 1, "the future": 0}.get(change, 40)
    assert not seen.alarms and seen.requests.time.is_monotonic_increasing
    assert ("NO TRAFFIC" if change in ("empty", "the future") else "NO ALARM") in render_monitoring(config, seen, "Odd.")


def test_the_command_for_a_scheduler(finished, tmp_path):
    "Exit code 4 names a breach, with the command that does something about it; the page and the tables are there."
    project, start = copy_of(finished, tmp_path), pd.Timestamp.now(tz="UTC")        # other tests may have asked before
    asked = project.inside(
        "ask", "--env", "staging",
        stdin="".join(f"How do I log {what}?\n" for what in ("a metric", "a parameter", "a model", "an artifact")),
    )
    assert asked.returncode == 0, asked.stderr
    run = (project.root / "runs" / "staging" / "latest").resolve()
    calm = project.inside("monitor", "--env", "staging", "--fail-on", "breach", MONITORING_MAX_P95_SECONDS="0.001", MONITORING_PROBES="0")
    assert calm.returncode == 0, "where gates inform, slow answers are said and are no alarm: " + calm.stdout + calm.stderr
    broken = project.inside(
        "monitor", "--env", "staging", "--fail-on", "breach", "--json", MONITORING_MAX_P95_SECONDS="0.001",
        MONITORING_PROBES="6", MONITORING_FALSE_ALARMS="0.02", GATE_MODE="raise",
    )
    assert broken.returncode == 4, broken.stdout + broken.stderr
    said = json.loads(broken.stdout)
    assert [s["signal"] for s in said["signals"] if s["breached"]] == ["slow answers"]
    assert said["triggers"][0]["stage"] == "deployment" and said["triggers"][0]["command"] in (
        "llmops versions --env staging",
        "llmops rollback --env staging",
    ), "the second, if other tests had asked another version"
    assert (project.root / "runs" / "staging" / "latest").resolve() == run, "a look is no run: the last report stays where it was"
    page = (project.root / said["page"]).read_text()
    assert "1 ALARM" in page and "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")
    ws = open_workspace(load_config("staging", project.root))
    signals = ws.read("signals")
    assert signals[signals.breached.astype(bool)].signal.tolist() == ["slow answers"] and ws.read("triggers").stage.tolist() == [
        "deployment"
    ]
    requests = ws.read("requests")
    assert requests.purpose[requests.time > start].value_counts()["traffic"] == 4, "what we ask ourselves is no traffic"
