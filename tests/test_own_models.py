"A team's own model: a folder of `save_pretrained` or a repository, added by one command, converted by llama.cpp's own converter, served."
import hashlib, json, os, re, shutil, signal, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import CACHE, ROOT, SMALL, Project
from llmops_ref.core.config import SettingsError, load_config
from llmops_ref.core.files import DataError
from llmops_ref.core.workspace import open_workspace
from llmops_ref.models import entry
from llmops_ref.models.catalog import find_model, read_models
from llmops_ref.models.convert import ARCHIVES
from llmops_ref.models.entry import add
from llmops_ref.models.fetch import fetch, here
from llmops_ref.models.weights import base_gguf, checkpoint, encoded, shipped
from test_models import Served, until

COMMIT = "0a1b2c3" + "0" * 33


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    "A Llama of two layers that knows nothing, with the tokenizer of the base model that we ship; its weights in three files."
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    config = load_config("dev", ROOT, models="data/models.toml")
    file = shipped(open_workspace(config), find_model(config, "smollm2"))
    words, folder = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(17)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=8192, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
    ))
    model.save_pretrained(folder, max_shard_size="13MB")
    words.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    return folder


@pytest.fixture
def ws(tmp_path):
    "A workspace with a catalogue of its own, and the cache of converted weights that all tests share."
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copy(ROOT / "data" / "models.toml", tmp_path)
    return open_workspace(load_config("dev", tmp_path, cache=CACHE, store="store", models="models.toml", platform="local"))


@pytest.fixture
def mine(ws, tiny) -> Path:
    "A copy of the tiny model, to break."
    return shutil.copytree(tiny, ws.config.root / "mine")


@pytest.fixture
def words(monkeypatch):
    "Where llama.cpp's own check of the words is not what is tested: it takes five seconds."
    monkeypatch.setattr(entry, "check_words", lambda ws, folder: None)


def altered(folder: Path, name: str, **more) -> None:
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | more))


def test_the_converter_is_pinned():
    "A new version of llama.cpp is a new archive: whoever moves the lock writes down its digest, as the package index states it."
    version = re.search(r"^xllamacpp==(\S+)$", (ROOT / "requirements.lock").read_text(), flags=re.M)[1]
    assert version in ARCHIVES, f"write the SHA-256 of xllamacpp-{version}.tar.gz into ARCHIVES of nbs/lib/models/convert.ipynb"


KILLED = """
import sys
from pathlib import Path
from llmops_ref.core.config import load_config
from llmops_ref.core.workspace import open_workspace
from llmops_ref.models.convert import to_gguf
root, cache, folder, target = sys.argv[1:]
to_gguf(open_workspace(load_config("dev", root, cache=cache, store="store", platform="local")), Path(folder), Path(target))
"""


def kill_in_the_middle(ws, folder, target):
    "A conversion that is killed leaves nothing that looks like a model."
    arguments = [str(ws.config.root), CACHE, str(folder), str(target)]
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], env=environment, start_new_session=True)
    until(lambda: list(target.parent.glob(f".{target.name}.part/*/mine")))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not target.exists() and list(target.parent.glob(".*.part"))


def test_added_converted_and_served(ws, mine):
    "The whole way of a folder with shards: its entry, the file that llama.cpp makes of it (at the second try), and an answer."
    from llmops_ref.models.llm import chat_client, serve_gguf
    before = (ws.config.root / "models.toml").read_text()
    model = add(ws, "mine", "./mine")
    assert (ws.config.root / "models.toml").read_text().startswith(before) and find_model(ws.config, "mine") == model
    assert (model.context, model.licence, model.model, str(model.sources[0])) == (8192, "apache-2.0", "mine", "folder mine")
    assert model.file == "model.safetensors.index.json" and len([name for name in model.pins if name.endswith(".safetensors")]) > 1
    assert here(ws, model) == mine / model.file and checkpoint(ws, model) == mine
    kill_in_the_middle(ws, mine, ws.cache(model.sha256, "mine.gguf"))
    made = encoded(ws, model, "q4_1")
    assert made.parent == ws.cached(model.sha256, "")
    assert sorted(path.name for path in made.parent.glob("*.gguf")) == ["mine.Q4_1.gguf", "mine.gguf"]
    assert not list(made.parent.glob(".*.part")) and made.stat().st_size < base_gguf(ws, model).stat().st_size / 2
    with serve_gguf(made) as endpoint: answer = chat_client(endpoint, max_tokens=4).invoke("Which is it?")
    assert answer.usage_metadata["output_tokens"] == 4 and answer.response_metadata["model_name"] == "mine.Q4_1"


def test_a_bit_and_a_byte(ws, mine, words):
    "A flipped bit in a shard or in the tokenizer is refused and named, a shard that is cut off before it is added at all."
    model = add(ws, "mine", "mine")
    shard = max(mine.glob("model-*.safetensors"))
    for path in shard, mine / "tokenizer.json":
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        with pytest.raises(DataError, match=f"{path.name} is damaged or was replaced"): shipped(ws, model)
        path.write_bytes(whole)
    assert shipped(ws, model) == mine / model.file
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(DataError, match=f"{shard.name} is damaged or cut off"): add(ws, "cut", "mine")
    shard.unlink()
    with pytest.raises(DataError, match=f"folder mine lacks {shard.name}, which model.safetensors.index.json names"): add(ws, "cut", "mine")
    with pytest.raises(DataError, match="The model mine is not on this machine. Fetch it"): shipped(ws, model)
    with pytest.raises(DataError, match=f"folder mine: there is no {mine / shard.name}. Fix"): fetch(ws, model)
    assert "cut" not in read_models(ws.config)


def refused(ws, source="mine", **more) -> str:
    "What is said of a model that is not added; nothing of it is left."
    (ws.config.root / "store").mkdir(exist_ok=True)         # with the lock
    before, files = (ws.config.root / "models.toml").read_bytes(), sorted(os.listdir(ws.config.root))
    with pytest.raises((DataError, SettingsError)) as error: add(ws, "new", source, **more)
    assert (ws.config.root / "models.toml").read_bytes() == before and sorted(os.listdir(ws.config.root)) == files
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_used_is_said_in_one_line(ws, mine, monkeypatch):
    "Each reason with its remedy, before anything is written; what llama.cpp does not know, by its own converter."
    whole = (mine / "config.json").read_text()
    altered(mine, "config.json", model_type="gptj", architectures=["GPTJForCausalLM"])
    assert "llama.cpp has no decoder for GPTJForCausalLM." in refused(ws)
    altered(mine, "config.json", model_type="unheard")
    assert "transformers" in (said := refused(ws)) and "has no decoder for the model type 'unheard'" in said
    (mine / "config.json").write_text(whole)
    kept = (mine / "tokenizer.json").read_text()
    altered(mine, "tokenizer.json", pre_tokenizer=dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False))
    assert "llama.cpp does not know how its tokenizer cuts words" in refused(ws)
    (mine / "tokenizer.json").write_text(kept)
    (mine / "chat_template.jinja").rename(mine / "elsewhere")
    assert "folder mine has no chat template, so it was never taught to answer" in refused(ws)
    (mine / "elsewhere").rename(mine / "chat_template.jinja")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=10_000_000))
    assert "of memory, and this machine has 10. Take a smaller one" in refused(ws)
    (mine / "README.md").unlink()
    assert "folder mine states no licence. Find out which holds, and name it: --licence mit." in refused(ws)
    (mine / "tokenizer.json").unlink()
    assert "folder mine holds no tokenizer" in refused(ws)
    for shard in mine.glob("*.safetensors*"): shard.unlink()
    (mine / "pytorch_model.bin").write_bytes(b"pickled")
    assert "holds only pickled weights (pytorch_model.bin)" in refused(ws)
    assert "There is no folder" in refused(ws, "nowhere")


class Hub(Served):
    "Hugging Face as its library asks it: the list of files at a commit, with what the repository states of itself, and the files."
    def __init__(self, folder: Path, **stated):
        super().__init__()
        self.folder, self.stated, self.flipped = folder, stated, ""

    def content(self, name):
        content = (self.folder / name).read_bytes()
        return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:] if name == self.flipped else content

    def listed(self, path):
        kept_apart = path.suffix in (".safetensors", ".gguf") or path.name == "tokenizer.json"
        lfs = dict(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size=path.stat().st_size, pointerSize=130)
        return dict(rfilename=path.name, size=path.stat().st_size, blobId="0" * 40) | (dict(lfs=lfs) if kept_apart else {})

    def answer(self, request):
        parts = request.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, revision = parts[3], (parts[5:] or ["main"])[0]
            if repo not in ("tiny", "gated"): return request.say(404, x_error_code="RepoNotFound")
            if revision not in ("main", COMMIT): return request.say(404, x_error_code="RevisionNotFound")
            files = [self.listed(path) for path in sorted(self.folder.iterdir())]
            facts = dict(id=f"acme/{repo}", sha=COMMIT, siblings=files, gated=repo == "gated" and "manual", **self.stated)
            return request.say(200, json.dumps(facts).encode(), content_type="application/json")
        _, repo, _, revision, name = (parts + [""] * 5)[:5]
        if not parts[1:]: return request.say(200)
        if repo == "gated": return request.say(403, x_error_code="GatedRepo")
        if not (self.folder / name).is_file(): return request.say(404, x_error_code="EntryNotFound")
        self.asked.append((request.command, name))
        content = self.content(name)
        request.say(200, content, etag=f'"{hashlib.sha256(content).hexdigest()}"', x_repo_commit=COMMIT)


@pytest.fixture
def hub(tiny, monkeypatch):
    for name in list(os.environ):
        if name.startswith("HF_"): monkeypatch.delenv(name)
    card, weights = dict(license="other", license_name="acme-open"), dict(parameters=dict(F32=6_365_504), total=6_365_504)
    with Hub(tiny, cardData=card, safetensors=weights) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("no_proxy", "*")
        yield hub


def test_a_repository(ws, hub, words):
    "Its entry pins a commit and every file without moving a weight; what comes later is verified, and a flipped bit named."
    model = add(ws, "tiny", "hf:acme/tiny")
    assert not [name for _, name in hub.asked if name.endswith(".safetensors")]
    assert (model.sources[0].revision, model.licence, model.parameters_m, model.model) == (COMMIT, "acme-open", 6.366, "acme/tiny")
    assert find_model(ws.config, "tiny") == model and here(ws, model) is None
    shutil.rmtree(ws.cached(model.sha256, ""), ignore_errors=True)
    for hub.flipped in min(model.beside, key=lambda name: "00002" not in name), "tokenizer.json":
        with pytest.raises(DataError, match=f"it gave another file {hub.flipped}: SHA-256"): fetch(ws, model)
        assert here(ws, model) is None and not list(ws.cached(model.sha256, "").glob("*.*s*"))
    hub.flipped = ""
    assert fetch(ws, model).name == "model.safetensors.index.json" and here(ws, model)
    assert checkpoint(ws, model) == ws.cached(model.sha256, "") and (checkpoint(ws, model) / "tokenizer.json").is_file()


def test_a_repository_that_cannot_be_had(ws, hub, words, monkeypatch):
    "Missing, gated, of another revision, without a licence, not there at all: one line each."
    assert "acme/absent cannot be looked at: there is no such repository, or it is private" in refused(ws, "hf:acme/absent")
    assert "acme/gated cannot be looked at: its owner asks for an agreement" in refused(ws, "hf:acme/gated")
    assert "it has no revision v9" in refused(ws, "hf:acme/tiny@v9")
    hub.stated["cardData"] = {}
    assert "huggingface acme/tiny states no licence" in refused(ws, "hf:acme/tiny")
    assert add(ws, "licensed", f"hf:acme/tiny@{COMMIT}", licence="mit").licence == "mit"
    with pytest.raises(SettingsError, match="There is a model 'licensed' in models.toml already"): add(ws, "licensed", "hf:acme/tiny")
    hub.close()
    assert "acme/tiny cannot be looked at: it cannot be reached: [Errno 111] Connection refused" in refused(ws, "hf:acme/tiny")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in refused(ws, "hf:acme/tiny")


def test_a_repository_of_ggufs(ws, tmp_path, hub):
    "One of several files is meant, and has to be named."
    hub.folder = tmp_path / "ggufs"
    hub.folder.mkdir()
    for name in ("tiny-q8_0.gguf", "tiny-q4_k_m.gguf"): (hub.folder / name).write_bytes(b"GGUF" + name.encode())
    hub.stated |= dict(gguf=dict(architecture="qwen2", context_length=32768, total=494_032_768, chat_template="{{ messages }}"))
    assert "Say which: --file tiny-q4_k_m.gguf or --file tiny-q8_0.gguf." in refused(ws, "hf:acme/tiny")
    assert "acme/tiny holds no tiny.gguf. It holds tiny-q4_k_m.gguf, tiny-q8_0.gguf." in refused(ws, "hf:acme/tiny", file="tiny.gguf")
    model = add(ws, "tiny", "hf:acme/tiny", file="tiny-q8_0.gguf")
    assert (list(model.variants), model.context, model.parameters_m) == (["tiny-q8_0"], 32768, 494)
    assert fetch(ws, model).read_bytes() == b"GGUFtiny-q8_0.gguf"


def test_a_folder_with_a_gguf(ws, tmp_path):
    "The file says itself what it is; here the one that we ship."
    config = load_config("dev", ROOT, models="data/models.toml")
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "small.Q4_1.gguf").symlink_to(shipped(open_workspace(config), find_model(config, "smollm2")))
    model, known = add(ws, "small", "share", "apache-2.0", "small.Q4_1.gguf"), find_model(ws.config, "smollm2")
    assert (model.sha256, model.bytes, model.context, model.encoding) == (known.sha256, known.bytes, known.context, known.encoding)
    assert model.parameters_m == known.parameters_m


@pytest.mark.slow("a life cycle of its own")
def test_the_life_cycle_of_a_model_of_ones_own(tiny, tmp_path):
    "Two commands: the model is added, and a version tuned from it serves. Its answers are rubbish, which gates in dev say and do not end."
    project = Project(tmp_path, **SMALL)
    shutil.copytree(tiny, project.root / "tiny")
    added = project.llmops("models", "add", "mine", "./tiny")
    assert added.returncode == 0 and "run --env dev --set chat_model=mine" in added.stderr, added.stderr
    done = project.llmops("run", "--env", "dev", "--set", "chat_model=mine")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = project.inside("status", "--env", "dev", "--json", CHAT_MODEL="mine").stdout
    states = {stage["stage"]: stage["state"] for stage in json.loads(said)["stages"]}
    assert set(states.values()) == {"up to date"}, states
    asked = project.llmops("ask", "--env", "dev", "How do I log a metric?", CHAT_MODEL="mine")
    assert asked.returncode == 0, asked.stderr
    rows = {row["name"]: row for row in json.loads(project.inside("models", "list", "--json").stdout)}
    assert rows["mine"]["place"] == "here" and rows["mine"]["train_minutes"] > 0
