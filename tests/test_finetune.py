"Training in processes of its own: killed, on two devices, on a full disk."
import functools, importlib.metadata, json, resource, signal, subprocess, sys, warnings
from dataclasses import replace

import pandas as pd
import pytest

from conftest import PATIENCE
from llmops_ref.tuning.training import Recipe, fit, last_checkpoint, launch, prepare_training
from llmops_ref.core.files import DataError

RECIPE = Recipe(rank=4, lr=0.05, tokens=64, epochs=2, checks=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A random Llama of two layers and a tokenizer of 48 words, saved as any other."
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    folder = tmp_path_factory.mktemp("base")
    core = Tokenizer(models.WordLevel({w: n for n, w in enumerate(["?", "</s>", *(f"w{n}" for n in range(46))])}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(1)
    shape = dict(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.5, max_position_embeddings=64,
    )
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="?", eos_token="</s>",
        chat_template="{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}",
    ).save_pretrained(folder)
    return folder


def pairs(n=96):
    rows = [
        (
            f"{split}{i}", f"{split}{i // 4}", split,
            [dict(role="user", content=f"w1 w{i // 4 % 9} w{i % 30} w2"), dict(role="assistant", content=f"w{40 + i // 4 % 2}")],
        )
        for split, many in (("train", n), ("validation", 8))
        for i in range(many)
    ]
    return pd.DataFrame(rows, columns=["id", "group", "split", "messages"])


def start(folder, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "llmops_ref.tuning.training", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def kill_at(folder, step):
    "Start a training and kill it, without a warning, when it reports a step."
    with start(folder) as process:
        for line in process.stdout:
            if line.startswith("{") and json.loads(line)["step"] == step: break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (folder / "result.json").exists()


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    "What a training that nothing disturbs leaves, in one of the number formats that a process may find fastest."
    @functools.cache
    def train(dtype):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("llmops_ref.tuning.training.training_dtype", lambda device: dtype)
            return fit(prepare_training(tmp_path_factory.mktemp("undisturbed"), base, pairs(), RECIPE))
    return train


def test_killed_and_resumed(base, undisturbed, tmp_path):
    "Killed twice, called a third time: the same steps and the same loss as if nothing had happened."
    def kept(): return int(last_checkpoint(folder).name.rpartition("-")[2])
    folder = prepare_training(tmp_path, base, pairs(), RECIPE)
    kill_at(folder, 5)
    step = kept()                                                           # 4, or more where we are slow to hear of step 5
    assert step >= 4 and step % 4 == 0
    (folder / "checkpoints" / f"checkpoint-{step + 2}").mkdir()             # one that was being written: it has no state yet
    kill_at(folder, step + 5)
    assert kept() >= step + 4 and kept() % 4 == 0
    assert prepare_training(tmp_path, base, pairs(), RECIPE) == folder      # what the stage does first
    result = fit(folder)
    whole = undisturbed(result["dtype"])
    assert result["steps"] == whole["steps"] and result["loss"] == pytest.approx(whole["loss"], rel=0.01)
    assert [h["step"] for h in result["history"] if h["loss"] is not None] == list(range(1, result["steps"] + 1))
    assert (folder / "adapter" / "adapter_model.safetensors").is_file() and not (folder / "checkpoints").exists()


def test_other_pairs_are_another_training(base, tmp_path):
    first = prepare_training(tmp_path, base, pairs(), RECIPE)
    kill_at(first, 7)
    second = prepare_training(tmp_path, base, pairs(88), RECIPE)
    assert second != first and not first.exists() and last_checkpoint(second) is None


def test_other_code_is_another_training(base, tmp_path, monkeypatch):
    "What an older version has trained, or begun to, is not taken for the work of this one."
    first = prepare_training(tmp_path, base, pairs(), RECIPE)
    assert prepare_training(tmp_path, base, pairs(), RECIPE) == first
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1")
    assert prepare_training(tmp_path, base, pairs(), RECIPE) != first


def test_the_result_counts_what_was_learned_from(base, undisturbed, tmp_path):
    "A machine that is too slow takes fewer steps; the pairs that it never came to are not counted."
    whole = undisturbed("float32")
    assert whole["pairs"] == 96 and whole["steps"] == whole["wanted"]
    short = fit(prepare_training(tmp_path, base, pairs(), replace(RECIPE, seconds=1e-6, checks=1)))
    assert short["steps"] == short["best_step"] == 3 < short["wanted"] and 0 < short["pairs"] < 96


def test_activations_computed_again(base, undisturbed, tmp_path, monkeypatch):
    "It takes less memory and learns the same; and by the name that transformers will still know."
    whole = undisturbed("float32")
    monkeypatch.setattr("llmops_ref.tuning.training.training_dtype", lambda device: "float32")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*gradient_checkpointing(_enable)?` is deprecated", category=FutureWarning)
        again = fit(prepare_training(tmp_path, base, pairs(), replace(RECIPE, recompute=True)))
    assert again["steps"] == whole["steps"] and again["loss"] == pytest.approx(whole["loss"], rel=0.01)


def test_two_devices(base, tmp_path, monkeypatch):
    "The same entry point under torchrun: two processes that each read one row learn what one process learns from two."
    recipe = replace(RECIPE, rows_per_step=2, epochs=4)
    told = []
    two = launch(
        prepare_training(tmp_path / "two", base, pairs(), recipe), processes=2, on_step=lambda step, steps, text: told.append(step)
    )
    monkeypatch.setattr("llmops_ref.tuning.training.training_dtype", lambda device: two["dtype"])       # another moment may choose another
    one = fit(prepare_training(tmp_path / "one", base, pairs(), recipe))
    assert (one["processes"], two["processes"]) == (1, 2) and two["steps"] == one["steps"] == told[-1]
    assert two["first_loss"] == pytest.approx(one["first_loss"], rel=0.01) and two["loss"] == pytest.approx(one["loss"], rel=0.1)


def test_full_disk(base, undisturbed, tmp_path):
    "A checkpoint that cannot be written costs nothing but itself: the one before is whole, and training goes on from it."
    folder = prepare_training(tmp_path, base, pairs(), RECIPE)
    kill_at(folder, 7)
    def no_room(): signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    with start(folder, preexec_fn=no_room) as process: _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "A checkpoint could not be written" in said and "The one of step 4 is whole" in said, said[-2000:]
    assert [p.name for p in folder.glob("checkpoints/checkpoint-*")] == ["checkpoint-4"]
    result = fit(folder)
    assert result["loss"] == pytest.approx(undisturbed(result["dtype"])["loss"], rel=0.01)


def test_nothing_to_learn(base, tmp_path):
    with pytest.raises(DataError, match="no training pairs"):
        prepare_training(tmp_path, base, pairs().query("split == 'validation'"), RECIPE)
    broken = pairs()
    broken.at[3, "messages"] = [dict(role="user", content="w1")]
    with pytest.raises(DataError, match="Training pair train3 has the roles user"): prepare_training(tmp_path, base, broken, RECIPE)
    assert not list(tmp_path.iterdir())
