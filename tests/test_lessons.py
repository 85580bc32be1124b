"""The lessons of a fork: whatever its settings say, they teach the same, and they pass."""
import configparser, os, shutil, subprocess
from dataclasses import fields
from typing import get_args

import pytest

from conftest import BIN, CACHE, ROOT, Project
from llmops_ref.core.config import Config, _parse, load_config
from llmops_ref.kit.fork import write_setting

# What another team would write; all other settings are moved by their type. `platform` stays: lessons are for this machine.
NOWHERE = "http://127.0.0.1:9/v1"
OTHER = dict(
    store="elsewhere/{env}", cache=CACHE, catalog="acme_{env}", schema="desk", experiment="/Shared/desk", secret_scope="desk",
    hub_retired="smollm2-torch", corpus="nbs/guides", corpus_packages="mlflow, peft", corpus_exclude="mlflow.store.*",
    questions="data/other.jsonl", ai_search_endpoint="desk", ai_search_embedding="other", reranker="cross-encoder/desk",
    chat_url=NOWHERE, chat_name="desk", models="data/other.toml", chat_model="qwen2.5-coder-0.5b",
    embedder_model="bge-small-en",
    finetune_start="auto", prices="smollm2-q8_0 0.03/0.09", gateway_models="acme/large",
    gateway_fallbacks="local/smollm2-q8_0", gateway_providers=f"acme={NOWHERE}", gateway_guardrail="The request must be polite.",
    gateway_judge="acme/large", gateway_url=NOWHERE, prompts="data/other_prompts", judge_model="openai:/large", judge_url=NOWHERE,
    teacher_url=NOWHERE, teacher_model="large", finetune_modules="q_proj, v_proj", finetune_variants="merged-q8_0",
    finetune_serve="merged-q8_0", finetune_scaling="25%", red_team="", regressions="", gates="token_f1 >= 0.3",
    serving_token="desk_token", index_questions="data/others.jsonl.gz", rollout_steps="20%", reviewers="ada", licences="mit",
)


def moved(key: str, kind, value) -> str:
    "Another legal value of a setting."
    if key in OTHER: return OTHER[key]
    if kind is bool: return str(not value).lower()
    if choices := get_args(kind): return next(choice for choice in choices if choice != value)
    if kind is int: return str(value + 1)
    if value > 1: return f"{2 * value:g}"
    return "0.4" if value == 0.5 else f"{value / 2 + 0.25:g}"


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    "A project in which every setting has another value, in whichever section it stands."
    project = Project(tmp_path_factory.mktemp("other") / "project")
    data = project.root / "data"
    shutil.copy(data / "questions.jsonl", data / "other.jsonl")
    shutil.copytree(data / "prompts", data / "other_prompts")
    shutil.copy(data / "models.toml", data / "other.toml")
    written = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=(";",))
    written.read(project.root / "settings.ini")
    keys = {f.name: f.type for f in fields(Config) if f.name not in ("env", "root", "origin", "used", "platform")}
    sections = dict(DEFAULT=written.defaults()) | {name: written._sections[name] for name in written.sections()}
    for section, own in sections.items():
        for key in keys.keys() & own.keys():
            write_setting(project.root, key, moved(key, keys[key], _parse(own[key], keys[key])), section)
    for env in ("dev", "staging", "prod"):
        before, now = load_config(env, ROOT), load_config(env, project.root)
        assert not {key for key in keys.keys() - OTHER if getattr(before, key) == getattr(now, key)}, "moved, and the same in " + env
    return project


@pytest.mark.parametrize(
    "pattern", [pytest.param(r"^0\d_", id="stages"), pytest.param(r".", id="all", marks=pytest.mark.slow(reason="some seventy notebooks"))]
)
def test_lessons_rest_on_no_setting(other, pattern):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LLMOPS_", "MLFLOW_"))}
    done = subprocess.run(
        [str(BIN / "nbdev-test"), "--file-re", pattern, "--n-workers", "1"], cwd=other.root, capture_output=True, text=True,
        env=environment | dict(PYTHONPATH=str(other.root), LLMOPS_PLATFORM="local", HF_HUB_OFFLINE="1"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
