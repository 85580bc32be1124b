"""Any encoder: what it says of itself is read, converted, compared with sentence-transformers, and searched with."""
import json, os, shutil, subprocess, sys

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from llmops_ref.assistant.versions import assistant_parts
from llmops_ref.core.config import SettingsError, load_config
from llmops_ref.core.files import DataError, file_digest
from llmops_ref.core.workspace import open_workspace
from llmops_ref.models import embedding
from llmops_ref.models.embedding import chosen_embedder, embedder_digest, embedder_folder, open_embedder
from llmops_ref.models.probes import measure
from llmops_ref.models.weights import weights
from llmops_ref.search.published import embed_batches, embed_chunks, index_maker, open_faiss, publish_index
from llmops_ref.search.vector_index import Index

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:?!'",
         *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"), "log", "metric", "query", "passage", "valve", "adapter", "cluster", "שלום"]
TEXTS = [
    "Log a metric.", "", "Which VALVE opens at 7 bar?", "valve " * 300, "🙂 שלום", "delete a cluster, and then another: all of them!",
]
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)


def tokenizer(first=0, lower=True, pieces=False):
    "A tokenizer of its own, whose padding has the number `first`; it begins and ends a text, and splits words into pieces."
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = WORDS[1:1 + first] + WORDS[:1] + WORDS[1 + first:]
    numbers = {word: n for n, word in enumerate(words)}
    made = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    if lower: made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", numbers["[CLS]"]), ("[SEP]", numbers["[SEP]"])]
    )
    special = dict(unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def layers(kind, pad=0, **changed):
    "Random layers of an architecture, far enough from zero that no two texts look alike."
    import torch, transformers
    sizes = dict(vocab_size=len(WORDS), pad_token_id=pad, max_position_embeddings=64, type_vocab_size=2) | SMALL | changed
    if kind == "DistilBert":
        sizes = dict(vocab_size=len(WORDS), dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64)
    torch.manual_seed(5)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    with torch.no_grad():
        for weight in model.parameters(): weight.add_(torch.randn_like(weight) * 0.2)
    return model


def save(folder, kind="Bert", pad=0, pooling="mean", normalise=True, dense=None, length=None, prompts=None, lower=True, **config):
    "A model as sentence-transformers writes it."
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer
    inner = folder.with_name(f"{folder.name}-layers")
    layers(kind, pad, **config).save_pretrained(inner)
    tokenizer(pad, lower).save_pretrained(inner)
    first = Transformer(str(inner), **(dict(max_seq_length=length) if length else {}))
    modules = [first, Pooling(32, pooling)]
    if dense: modules.append(Dense(32, dense))
    if normalise: modules.append(Normalize())
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save(str(folder), create_model_card=False)
    return folder


def entry(folder, name, leave_out=()):
    "The entry of a folder, all of whose files are named."
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    beside = [file for file in files if file != "model.safetensors" and not file.endswith(".md") and file not in leave_out]
    weights = folder / "model.safetensors"
    return f"""
[{name}]
kind = "embedder"
model = "acme/{name}"
licence = "mit"
parameters_m = 0.1
context = 64
file = "model.safetensors"
beside = {json.dumps(beside)}
encoding = "st"
encodings = ["st", "onnx"]
bytes = {weights.stat().st_size}
sha256 = "{file_digest(weights)}"
sources = [{{ kind = "folder", path = "{folder}" }}]
"""


def workspace(folder, *entries, **settings):
    (folder / "models.toml").write_text("".join(entries))
    named = dict(platform="local", models=str(folder / "models.toml"), store=str(folder / "store"), cache=str(folder / "cache"))
    return open_workspace(load_config("dev", ROOT, **(named | dict(embedder_model="ours", vector_index="faiss", reranker="off") | settings)))


def theirs(folder, of, texts=TEXTS):
    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = min(128, model.max_seq_length)
    prompt = {"query": model.prompts.get("query"), "document": model.prompts.get("passage")}[of]       # by hand, as their author means it
    return model.encode(texts, prompt=prompt or "", normalize_embeddings=True, show_progress_bar=False)


ENCODERS = {
    "bert, mean": dict(),
    "bert, first token, not normalised": dict(pooling="cls", normalise=False),
    "bert, several poolings": dict(pooling=("max", "mean_sqrt_len_tokens", "lasttoken", "weightedmean"), normalise=False),
    "bert, a dense layer": dict(dense=12),
    "bert, 32 tokens, prompts": dict(length=32, prompts=dict(query="query: ", passage="passage: ")),
    "bert, lower case by the model": dict(lower=False),
    "roberta, padding 1": dict(kind="XLMRoberta", pad=1, type_vocab_size=1, max_position_embeddings=66, length=64),
    "mpnet, padding 1": dict(kind="MPNet", pad=1, max_position_embeddings=66, length=64),
    "distilbert, no kinds of token": dict(kind="DistilBert"),
    "modernbert": dict(kind="ModernBert", cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3, local_attention=8),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_vectors_are_those_of_sentence_transformers(tmp_path, name):
    folder = save(tmp_path / "model", **ENCODERS[name])
    if name == "bert, lower case by the model":
        (folder / "sentence_bert_config.json").write_text(json.dumps(
            json.loads((folder / "sentence_bert_config.json").read_text()) | dict(do_lower_case=True)
        ))
    ws = workspace(tmp_path, entry(folder, "ours"))
    embedder = open_embedder(ws)
    for of in ("query", "document"):
        expected, found = theirs(folder, of), embedder.embed(TEXTS, of)
        assert found.shape == expected.shape == (len(TEXTS), embedder.dimension)
        assert np.abs(expected - found).max() < 1e-5
        assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        assert np.abs(embedder.embed(TEXTS[::-1], of, batch=2)[::-1] - found).max() < 1e-5         # whatever the company
    assert len(np.unique(expected.round(3), axis=0)) == len(TEXTS)     # no two texts are the same to it
    if "prompts" in name: assert np.abs(embedder.embed(TEXTS, "query") - embedder.embed(TEXTS, "document")).max() > 0.01


def test_layers_alone_are_pooled_by_their_mean(tmp_path):
    layers("Bert").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    embedder = open_embedder(workspace(tmp_path, entry(tmp_path / "model", "ours")))
    assert (embedder.manifest["pooling"], embedder.manifest["tokens"]) == (["mean"], 64)
    assert np.abs(theirs(tmp_path / "model", "document") - embedder.embed(TEXTS, "document")).max() < 1e-5


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "A folder with two models in one catalogue: of 32 numbers with prompts, and of 12."
    folder = tmp_path_factory.mktemp("two")
    save(folder / "ours", prompts=dict(query="query: ", passage="passage: "))
    save(folder / "other", dense=12)
    workspace(folder, entry(folder / "ours", "ours"), entry(folder / "other", "other"))
    return folder


def opened(two, tmp_path, model="ours", **settings):
    named = dict(models=str(two / "models.toml"), store=str(tmp_path / "store"), cache=str(two / "cache"), embedder_model=model)
    return open_workspace(load_config("dev", ROOT, platform="local", vector_index="faiss", reranker="off", **(named | settings)))


CHUNKS = pd.DataFrame([
    dict(id=f"{name}#0", document_id=name, package="plant", kind="function", heading="", text=text, digest=name)
    for name, text in (("valve", "The valve opens at 7 bar."), ("adapter", "adapter adapter"), ("metric", "Log a metric."))
])


def published(ws):
    embedder = open_embedder(ws)
    vectors, fresh = embed_chunks(ws, CHUNKS, embedder)
    return embedder, publish_index(ws, CHUNKS, vectors, "1", embedder.digest), fresh


def test_an_index_has_the_dimension_of_its_encoder_and_finds(two, tmp_path):
    for model, dimension in (("ours", 32), ("other", 12)):
        ws = opened(two, tmp_path / model, model)
        embedder, folder, _ = published(ws)
        index = open_faiss(ws)
        assert index.manifest["dimension"] == index.vectors.d == embedder.dimension == dimension
        assert index_maker(ws)[0].name == model
        for chunk in CHUNKS.itertuples():
            found, = index.search(chunk.text, 1)
            cosine = theirs(two / model, "query", [chunk.text])[0] @ theirs(two / model, "document", [chunk.text])[0]
            assert found.document_id == chunk.document_id and abs(found.similarity - cosine) < 1e-4    # each with its own prefix


def test_another_encoder_embeds_anew_and_no_index_is_asked_by_it(two, tmp_path):
    ws = opened(two, tmp_path)
    ours, folder, fresh = published(ws)
    assert (fresh, published(ws)[2]) == (3, 0)
    changed = opened(two, tmp_path, "other")
    assert open_faiss(changed).embedder.digest == ours.digest           # until it has been built anew, by the one that made it
    other = open_embedder(changed)
    with pytest.raises(DataError, match="was made by another embedding model"): Index(folder, other)
    with pytest.raises(DataError, match="was made by another embedding model"):         # the catalogue has forgotten who made it
        open_faiss(workspace(tmp_path, entry(two / "other", "other"), embedder_model="other"))
    assert published(changed)[2] == 3
    assert (open_faiss(changed).embedder.digest, index_maker(changed)[0].name) == (other.digest, "other")


def test_a_changed_prefix_is_another_embedder(two, tmp_path):
    shutil.copytree(two / "ours", tmp_path / "ours")
    ws = workspace(tmp_path, entry(tmp_path / "ours", "ours"))
    before, folder, _ = published(ws)
    said = tmp_path / "ours" / "config_sentence_transformers.json"
    said.write_text(said.read_text().replace("passage: ", "Passage, "))
    after = open_embedder(ws)
    assert before.digest != after.digest and after.manifest["prompts"]["document"] == "Passage, "
    with pytest.raises(DataError, match="was made by another embedding model"): open_faiss(ws)
    assert published(ws)[2] == 3


def test_eight_bits_of_any_model(two, tmp_path):
    ws = opened(two, tmp_path)
    exact, small = (open_embedder(ws, precision) for precision in ("fp32", "int8"))
    cosines = (exact.embed(TEXTS, "query") * small.embed(TEXTS, "query")).sum(1)
    assert exact.digest != small.digest and small.manifest["prompts"] == exact.manifest["prompts"]
    assert 0.95 < cosines.min() and np.abs(exact.embed(TEXTS, "query") - small.embed(TEXTS, "query")).max() > 0


def test_a_version_takes_the_encoder_along_and_names_it(two, tmp_path):
    ws = opened(two, tmp_path, app="self_hosted", chat_url="http://127.0.0.1:9/v1", retrieval="hybrid")
    embedder, *_ = published(ws)
    settings, files = assistant_parts(ws, "{{passages}} {{question}}")
    assert settings["embedder"] == dict(model="ours", precision="fp32", digest=embedder.digest)
    moved = shutil.copytree(files["embedder"], tmp_path / "taken along")
    assert (embedding.Embedder(moved).embed(TEXTS, "query") == embedder.embed(TEXTS, "query")).all()
    rows = pd.DataFrame(dict(row=range(len(TEXTS)), text=TEXTS))        # as a worker of Spark, which gets the folder's path
    vectors = np.stack(next(embed_batches([rows], str(moved))).vector.tolist())
    assert np.abs(vectors - embedder.embed(TEXTS, "document")).max() < 1e-5
    (moved / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="tokenizer.json is damaged or was replaced"): embedding.Embedder(moved)


def test_a_probe_goes_by_the_entry(two, tmp_path):
    ws, pairs = opened(two, tmp_path), [(text, text, "cluster cluster") for text in CHUNKS.text]
    for variant, runner in (("ours-onnx", "onnxruntime"), ("ours-st", "sentence-transformers")):
        file = weights(ws, variant)
        result = measure(dict(kind="embedder", runner=runner, asks=pairs, file=str(file), folder=str(file.parent)))
        assert [answer["found"][0] for answer in result["answers"]] == CHUNKS.text.tolist()


def test_serving_needs_neither_pytorch_nor_its_libraries(two, tmp_path):
    embedder_folder(opened(two, tmp_path), chosen_embedder(opened(two, tmp_path)))
    code = f"""
import sys
from llmops_ref.core.config import load_config
from llmops_ref.core.workspace import open_workspace
from llmops_ref.models.embedding import open_embedder
named = dict(models={str(two / "models.toml")!r}, store={str(tmp_path)!r}, cache={str(two / "cache")!r}, embedder_model="ours")
print(open_embedder(open_workspace(load_config("dev", platform="local", **named))).embed(["Log a metric."], "query").shape)
print(sorted({{"torch", "transformers", "sentence_transformers", "mlflow"}} & set(sys.modules)))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ, check=True).stdout
    assert said.split("\n")[:2] == ["(1, 32)", "[]"]


def without(two, tmp_path, change=lambda folder: None, leave_out=()):
    shutil.copytree(two / "other", tmp_path / "other")
    change(tmp_path / "other")
    return workspace(tmp_path, entry(tmp_path / "other", "ours", leave_out))


def rewrite(name, **changed):
    def change(folder): (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changed))
    return change


def add_module(folder):
    modules = json.loads((folder / "modules.json").read_text())
    more = dict(idx=9, name="9", path="9_LSTM", type="sentence_transformers.models.LSTM")
    (folder / "modules.json").write_text(json.dumps([*modules, more]))


@pytest.mark.parametrize("change, leave_out, said", [
    (rewrite("2_Dense/config.json", activation_function="acme.Swish"), (), "with the function acme.Swish"),
    (rewrite("2_Dense/config.json", activation_function="torch.nn.Nothing"), (), "cannot be converted: .*Nothing"),
    (add_module, (), "names sentence_transformers.models.LSTM"),
    (lambda folder: None, ("1_Pooling/config.json",), "1_Pooling/config.json is not in `beside`"),
    (lambda folder: None, ("modules.json",), "its entry does not name it. Add it to `beside`"),
    (lambda folder: None, ("2_Dense/model.safetensors",), "cannot be converted"),
], ids=["function of somebody", "function of nobody", "module", "pooling", "modules", "weights of a layer"])
def test_what_cannot_be_had_is_refused_by_its_name(two, tmp_path, change, leave_out, said):
    ws = without(two, tmp_path, change, leave_out)
    with pytest.raises(DataError, match=f"ours.*{said}|{said}"): open_embedder(ws)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]     # nothing half there


def test_a_model_that_is_meant_for_another_similarity_is_refused(two, tmp_path):
    shutil.copytree(two / "ours", tmp_path / "ours")
    modules = json.loads((tmp_path / "ours" / "modules.json").read_text())
    (tmp_path / "ours" / "modules.json").write_text(json.dumps([part for part in modules if not part["type"].endswith("Normalize")]))
    rewrite("config_sentence_transformers.json", similarity_fn_name="dot")(tmp_path / "ours")
    with pytest.raises(DataError, match="ours is meant for dot"): open_embedder(workspace(tmp_path, entry(tmp_path / "ours", "ours")))


def test_vectors_that_differ_are_not_used(two, tmp_path, monkeypatch):
    whole = embedding.export_onnx
    def shifted(original, inputs, target):          # a conversion that goes wrong without a word
        for part in original[0].auto_model.parameters(): part.data.add_(0.01)
        made = whole(original, inputs, target)
        for part in original[0].auto_model.parameters(): part.data.sub_(0.01)
        return made
    monkeypatch.setattr(embedding, "export_onnx", shifted)
    ws = without(two, tmp_path)
    with pytest.raises(DataError, match="ours was converted, and its vectors of a query differ by 0.*where 0.0001 is allowed"):
        open_embedder(ws)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_altered_weights_and_another_model_are_refused(two, tmp_path):
    ws = without(two, tmp_path)
    before = embedder_digest(ws, chosen_embedder(ws), "fp32")
    weights_file = tmp_path / "other" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match="damaged or was replaced"): open_embedder(ws)
    shutil.copy(two / "other" / "model.safetensors", weights_file)
    assert embedder_digest(ws, chosen_embedder(ws), "fp32") == before
    with pytest.raises(SettingsError, match="There is no model 'minilm'"): open_embedder(workspace(tmp_path, embedder_model="minilm"))
