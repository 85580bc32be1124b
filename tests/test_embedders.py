"""Any encoder: what it says of itself is read, converted, compared with sentence-transformers, and searched with."""
import json, shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from llmops_ref.core.config import SettingsError, load_config
from llmops_ref.core.files import DataError, file_digest
from llmops_ref.core.workspace import open_workspace
from llmops_ref.models.catalog import read_models
from llmops_ref.models.embedding import Embedder, chosen_embedder, embedder_digest, embedder_folder, open_embedder
from llmops_ref.search.published import embed_chunks, index_maker, open_faiss, publish_index
from llmops_ref.search.vector_index import Index, build_index

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:?!'",
         *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"), "log", "metric", "query", "passage", "valve", "adapter", "cluster", "שלום"]
TEXTS = ["Log a metric.", "", "Which VALVE opens at 7 bar?", "valve " * 300, "🙂 שלום", "delete a cluster, and then another: all of them!"]
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
    return getattr(model, f"encode_{of}")(texts, normalize_embeddings=True, show_progress_bar=False)


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
