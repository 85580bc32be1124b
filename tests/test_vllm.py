"""What can be held without a GPU: that vLLM would take our adapters, and that we ask it what it understands. vLLM itself is not run.

The rules are those of vLLM 0.33, told from its source: `vllm/lora/peft_helper.py`, `lora_model.py`, `utils.py`, `vllm/config/lora.py`."""
import json, re, shlex
from pathlib import Path

import pytest
from safetensors import safe_open

from conftest import ROOT
from llmops_ref.assistant.chain import open_assistant
from llmops_ref.core.config import load_config
from llmops_ref.core.workspace import open_workspace
from llmops_ref.tuning.training import Recipe, load_for_training
from provider import Provider
from test_finetune import base

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)          # that --max-lora-rank takes
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}         # of Llama, Qwen, Gemma, Mistral
OPTIONS = {"--enable-lora", "--max-lora-rank", "--lora-modules", "--max-model-len", "--generation-config", "--api-key"}
REQUEST = {
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "seed", "stop", "stream", "stream_options",
    "logprobs", "top_logprobs", "presence_penalty", "frequency_penalty",
}


def misfits(folder: Path) -> list[str]:
    "What its loader would refuse, or pass over without a word."
    config, wrong = json.loads((folder / "adapter_config.json").read_text()), []
    wrong += [f"{key} is missing" for key in ("r", "lora_alpha", "target_modules") if not config.get(key)]
    wrong += [f"{key} is {config[key]}" for key in ("modules_to_save", "use_dora", "rank_pattern", "alpha_pattern") if config.get(key)]
    if config.get("bias", "none") != "none": wrong.append("bias is trained")
    if config["r"] > max(RANKS): wrong.append("its rank is too large")
    with safe_open(folder / "adapter_model.safetensors", "pt") as matrices:
        shapes = {name: matrices.get_slice(name).get_shape() for name in matrices.keys()}
    named = {name: re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name) for name in shapes}
    wrong += [f"{name} is no matrix of LoRA" for name, match in named.items() if not match]
    wrong += [f"{match[1]} is no linear layer" for match in named.values() if match and match[1].rpartition(".")[2] not in LINEAR]
    sides = {side: {match[1] for match in named.values() if match and match[2] == side} for side in "AB"}
    if sides["A"] != sides["B"]: wrong.append("matrices without their other half")
    wrong += [f"{name} has another rank" for name, shape in shapes.items() if config["r"] != shape["lora_B" in name]]
    return wrong


def test_the_adapter_that_the_project_carries():
    assert misfits(ROOT / "data" / "adapters" / "smollm2") == []


@pytest.mark.parametrize("layers", [0, 1], ids=["all layers", "the last layer"])
def test_an_adapter_as_our_training_saves_it(base, tmp_path, layers):
    model, _ = load_for_training(base, Recipe(rank=8, layers=layers))
    model.save_pretrained(tmp_path)
    assert misfits(tmp_path) == []


def test_what_it_would_not_take_is_seen(tmp_path, base):
    "Of a check that never fails nobody learns anything."
    model, _ = load_for_training(base, Recipe(rank=8))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | dict(use_dora=True, r=16)))
    found = misfits(tmp_path)
    assert "use_dora is True" in found and any("has another rank" in text for text in found)


def test_the_recipe_says_what_the_settings_say():
    "Options that exist, the name under which the assistant asks, a rank that holds our adapters."
    guide = (ROOT / "nbs" / "guides" / "databricks.md").read_text()
    command = shlex.split(re.search(r"^vllm serve .*$", guide, re.M)[0])
    options = {word: following for word, following in zip(command, [*command[1:], ""]) if word.startswith("--")}
    assert options.keys() <= OPTIONS
    config = load_config("prod", ROOT, platform="local")
    assert options["--lora-modules"].partition("=")[0] == config.chat_name == re.search(r"^chat_name = (.*)$", guide, re.M)[1]
    assert int(options["--max-lora-rank"]) in RANKS and int(options["--max-lora-rank"]) >= config.finetune_rank


def test_we_ask_in_the_protocol_and_nothing_else(tmp_path):
    "Each field of a request is one of OpenAI's; the adapter is asked by its name."
    with Provider(key="sk-vllm") as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHAT_API_KEY", "sk-vllm")
        config = load_config(
            "prod", ROOT, store=str(tmp_path), platform="local", app="self_hosted", chat_url=server.url, chat_name="chat_model",
        )
        with open_assistant(open_workspace(config), "Q: {{question}}", passages=False) as chain:
            assert chain.invoke(dict(question="How do I log a metric?"))["answer"].startswith("Use `mlflow.log_metric`")
    asked, = server.asked
    assert asked["path"] == "/v1/chat/completions" and asked["body"]["model"] == "chat_model"
    assert asked["headers"]["authorization"] == "Bearer sk-vllm" and asked["body"].keys() <= REQUEST
