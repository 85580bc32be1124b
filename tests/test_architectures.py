"""Any decoder that transformers and llama.cpp both know, proven without weights.

Tiny random models are saved as any other, converted by llama.cpp's own converter, trained by our training and served by
our serving. What llama.cpp answers must be what transformers and PEFT compute, base and tuned, word for word of the vocabulary.
"""
import json, shutil, subprocess, sys

import numpy as np
import pandas as pd
import pytest

from llmops_ref.core.config import SettingsError, load_config
from llmops_ref.core.files import DataError
from llmops_ref.core.workspace import open_workspace
from llmops_ref.models.convert import converter, to_gguf
from llmops_ref.models.llm import ask_llama, chat_client, serve_gguf
from llmops_ref.tuning.training import Recipe, check_served, encode, fit, prepare_training
from llmops_ref.tuning.variants import OURS, adapter_to_gguf, merge_adapter

from conftest import CACHE

TOLERANCE = dict(gemma2=0.005, gemma3_text=0.005)        # of a log-probability: llama.cpp looks up Gemma's GELU in a table of 16 bits
EXACT = 1e-4                                        # of all others, in float32 throughout: 0.000007 was seen
AS_SERVED = 0.03                        # with llama.cpp's usual 16 bits in attention: 0.009 was seen. Adapters move them by 1 to 7

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = dict(
    chatml=CHATML,
    qwen="{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}" + CHATML,
    thinks=CHATML.replace("+ m.content", "+ ('<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last else '') + m.content"),
    llama=(
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}"
        "{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    mistral=(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% else %}{{ raise_exception('There are users and assistants.') }}"
        "{% endif %}{% endfor %}"
    ),
    gemma=(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
        "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    phi=(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
)
IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPECIAL = dict(                                     # the first is the beginning of a text where there is one, the last the end
    chatml=IM, qwen=IM, thinks=IM, llama=["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    mistral=["<s>", "[INST]", "[/INST]", "</s>"], gemma=["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"],
    phi=["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"],
)
ROPE = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
KINDS = dict(   # template, the name that llama.cpp has for the tokenizer, does it begin with a token of its own, and the shape
    llama=("llama", "llama-bpe", True, dict(tie_word_embeddings=True, attention_bias=True, rope_parameters=ROPE)),
    mistral=("mistral", "tekken", True, dict(tie_word_embeddings=False, head_dim=32, sliding_window=None)),
    qwen2=("qwen", "qwen2", False, dict(tie_word_embeddings=True)),
    qwen3=("thinks", "qwen2", False, dict(tie_word_embeddings=False, head_dim=32)),
    gemma3_text=("gemma", "gpt-2", True, dict(num_hidden_layers=6, head_dim=32, query_pre_attn_scalar=32, sliding_window=16)),
    gemma2=("gemma", None, True, dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=16)),                # and SentencePiece
    phi3=("phi", "gpt-2", False, dict(tie_word_embeddings=False)),                      # three matrices of attention in one
    olmo2=("chatml", "gpt-2", True, dict(tie_word_embeddings=False)),                   # a beginning that its template does not write
    granite=("chatml", "gpt-2", False, dict(embedding_multiplier=2.0, residual_multiplier=0.7, attention_multiplier=0.2)),
)   # granite is rotated like llama; its adapter is written by llama.cpp
SHAPE = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    initializer_range=0.15,
)
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = """
    The ship lay still where the river ends, and there were three men on her deck who had never been there before. One of them,
    the eldest, was reading the weather. "Here it comes," he said, "and where it comes from there is more." The others heard him,
    and neither of them answered. They had loaded the last of the timber, the ropes were tied, the papers were signed; there was
    nothing left to prepare, and nothing to hurry for. When the wind reached the harbour it threw over the chairs before the inn,
    and then the lantern over its door. How far is it to the other shore? Nobody had asked before. Whoever wanted to know went there.
""".split("\n")                                     # whatever it says: short pieces that differ in how they are joined
PROMPTS = [
    [dict(role="user", content="How do I load it?")],
    [dict(role="user", content="x = f(1)"), dict(role="assistant", content="Yes."), dict(role="user", content="And then, where to?")],
]
PAIRS = pd.DataFrame(
    [
        (f"p{n}", n // 2, "train", [dict(role="user", content=f"How do I load {n}?"), dict(role="assistant", content=f"Use `load({n})`.")])
        for n in range(4)
    ],
    columns=["id", "group", "split", "messages"],
)


def tokenizer_of(template, begins):
    "Words of bytes, with the pieces of this file."
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    core, cut = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), cut])
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=330, initial_alphabet=cut.alphabet(), show_progress=False))
    first, *_, last = special = SPECIAL[template]
    core.add_special_tokens(special)
    if begins: core.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=[(first, core.token_to_id(first))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=first if begins else None, eos_token=last, add_bos_token=begins, chat_template=TEMPLATES[template],
    )


def pieces_of(template, folder):
    "A SentencePiece vocabulary, as Google ships it: in `tokenizer.model`."
    import io, sentencepiece
    from transformers import GemmaTokenizer
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=(written := io.BytesIO()), vocab_size=340, model_type="bpe", byte_fallback=True,
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2,
        pad_id=0, pad_piece="<pad>", eos_id=1, eos_piece="<eos>", bos_id=2, bos_piece="<bos>", unk_id=3,
        control_symbols=["<mask>", "<start_of_turn>", "<end_of_turn>"],
    )
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    turns = dict(additional_special_tokens=["<start_of_turn>", "<end_of_turn>"])
    tokenizer = GemmaTokenizer.from_pretrained(folder, add_bos_token=True, **turns)
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def save_model(kind, folder, tokenizer, shape):
    "A random model whose norms are no ones and whose biases are no zeros: those would hide mistakes."
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE | ids | shape, vocab_size=len(tokenizer)))
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "norm" in name: values.add_(0.3 * torch.randn_like(values))
            elif name.endswith("bias"): values.normal_(0, 0.5)
    for part in (model.float(), tokenizer): part.save_pretrained(folder)


# The converter knows a tokenizer by the digest of a text that it cuts, and ours are nobody's. So it is told what they are.
RUN = """
import json, runpy, sys
root, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path[:0] = [root, root + "/gguf-py"]
from conversion.base import TextModel
for script, arguments, pre in jobs:
    TextModel.get_vocab_base_pre = lambda self, tokenizer, pre=pre: pre
    sys.argv = [script, *arguments]
    runpy.run_path(f"{root}/{script}", run_name="__main__")
"""

def run_converter(root, jobs):
    done = subprocess.run([sys.executable, "-c", RUN, str(root), json.dumps(jobs)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def ws(tmp_path_factory):
    return open_workspace(load_config("dev", store=str(tmp_path_factory.mktemp("store")), cache=CACHE, platform="local"))


@pytest.fixture(scope="module")
def made(ws, tmp_path_factory):
    "Folder of each kind: `model`, `base.gguf`, `fit` of our training, `adapter.gguf` of ours, `theirs.gguf` of llama.cpp's converter."
    parent, root, jobs, adapters = tmp_path_factory.mktemp("tiny"), converter(ws), [], []
    for kind, (template, pre, begins, shape) in KINDS.items():
        folder = parent / kind
        tokenizer = tokenizer_of(template, begins) if pre else pieces_of(template, folder / "model")
        save_model(kind, folder / "model", tokenizer, shape)
        if kind == "phi3":                          # Phi-4, of the same architecture, says so of its tokenizer
            (path := folder / "model" / "tokenizer_config.json").write_text(
                json.dumps(json.loads(path.read_text()) | dict(tokenizer_class="GPT2Tokenizer"))
            )
        jobs.append(("convert_hf_to_gguf.py", [str(folder / "model"), "--outfile", str(folder / "base.gguf"), "--outtype", "f32"], pre))
        recipe = Recipe(rank=4, lr=0.05, tokens=512, epochs=2, modules=("all",))
        trained = prepare_training(folder / "fit", folder / "model", PAIRS, recipe)
        assert fit(trained)["steps"] == 2
        trained.joinpath("adapter").rename(folder / "adapter")
        shape = json.loads((folder / "model" / "config.json").read_text())
        adapter_to_gguf(folder / "adapter", folder / "adapter.gguf", shape, lambda: root)
        adapters.append(
            ("convert_lora_to_gguf.py",
             [str(folder / "adapter"), "--base", str(folder / "model"), "--outfile", str(folder / "theirs.gguf")], "")
        )
    run_converter(root, jobs + adapters)
    return parent


@pytest.fixture
def exact(monkeypatch):
    "Attention in 32 bits, where llama.cpp would take 16 for some of it."
    import xllamacpp
    def params(make=xllamacpp.CommonParams):
        made = make()
        made.cache_type_k = made.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        made.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return made
    monkeypatch.setattr(xllamacpp, "CommonParams", params)


def log_probabilities(endpoint, ids, many, scale):
    "Of each word of the vocabulary after a prompt, with the adapter on or off. What is then written is fixed: half a letter has no report."
    said = ask_llama(
        endpoint, "/completion", prompt=ids, n_predict=1, n_probs=many, cache_prompt=False, lora=[dict(id=0, scale=scale)],
        logit_bias=[[ids_of_a(endpoint), 1e4]],
    )
    found = np.full(many, np.nan)
    for word in said["completion_probabilities"][0]["top_logprobs"]: found[word["id"]] = word["logprob"]
    return found

def ids_of_a(endpoint): return ask_llama(endpoint, "/tokenize", content="a")["tokens"][0]


def models_of(folder):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager")
    return AutoTokenizer.from_pretrained(folder / "model"), PeftModel.from_pretrained(base, folder / "adapter").eval()

def expected(model, ids):
    import torch
    with torch.no_grad(): return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).numpy()

def prompt_ids(tokenizer, messages):
    pair = pd.DataFrame([dict(id="p", group=0, messages=[*messages, dict(role="assistant", content="So.")])])
    return encode(tokenizer, pair, 256)[0][0][0]


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_serves_what_transformers_trained(made, exact, kind):
    "Every log-probability, after two prompts, of the base and of the base with its adapter."
    folder = made / kind
    tokenizer, model = models_of(folder)
    with serve_gguf(folder / "base.gguf", folder / "adapter.gguf", slots=1) as endpoint:
        for messages in PROMPTS:
            ids = prompt_ids(tokenizer, messages)
            tuned = expected(model, ids)
            with model.disable_adapter(): base = expected(model, ids)
            assert abs(tuned - base).max() > 0.3
            for scale, wanted in ((0.0, base), (1.0, tuned)):
                found = log_probabilities(endpoint, ids, len(tokenizer), scale)
                np.testing.assert_allclose(found, wanted, atol=TOLERANCE.get(kind, EXACT), rtol=0)


@pytest.mark.parametrize("kind", sorted(OURS))
def test_our_adapter_is_that_of_llama_cpps_converter(made, kind):
    import gguf
    ours, theirs = (gguf.GGUFReader(str(made / kind / f"{name}.gguf")) for name in ("adapter", "theirs"))
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert ours.get_field(key).contents() == theirs.get_field(key).contents()
    matrices, wanted = ({t.name: t.data for t in reader.tensors} for reader in (ours, theirs))
    assert matrices.keys() == wanted.keys() and len(matrices) >= 2 * 2 * 4
    for name in wanted: np.testing.assert_array_equal(matrices[name], wanted[name], err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_read_as_they_are_learned(made, kind):
    "The tokens of a chat, counted where an application asks: one beginning, one system prompt, and the end of a turn that stops."
    folder, (template, _, begins, _) = made / kind, KINDS[kind]
    check_served(folder / "base.gguf", folder / "model", PAIRS)
    tokenizer, _ = models_of(folder)
    with serve_gguf(folder / "base.gguf", slots=1) as endpoint:
        for messages in PROMPTS:
            ids = prompt_ids(tokenizer, messages)
            reply = chat_client(endpoint, max_tokens=1).invoke([(m["role"], m["content"]) for m in messages])
            assert reply.usage_metadata["input_tokens"] == len(ids)
            assert ids.count(tokenizer.bos_token_id) == begins
            assert tokenizer.decode(ids).count("You help.") == (template == "qwen")


def test_an_adapter_and_its_merger_as_they_are_served(made):
    "With nothing changed for the test: 16 bits in attention, and 8 in the merged matrices."
    folder = made / "llama"
    tokenizer, model = models_of(folder)
    ids = prompt_ids(tokenizer, PROMPTS[1])
    wanted = expected(model, ids)
    merged = merge_adapter(folder / "base.gguf", folder / "adapter.gguf", folder / "merged.gguf")
    with serve_gguf(folder / "base.gguf", folder / "adapter.gguf") as endpoint:
        assert abs(log_probabilities(endpoint, ids, len(tokenizer), 1.0) - wanted).max() < AS_SERVED
    with serve_gguf(merged) as endpoint:
        difference = log_probabilities(endpoint, ids, len(tokenizer), 1.0) - wanted
        assert AS_SERVED < abs(difference).max() < 0.5 and abs(difference).mean() < 0.1         # rounded, and the same model


def test_a_request_is_never_longer_than_the_model_reads(made):
    "The model reads 256 tokens, our serving offers 2,048."
    from langchain_core.exceptions import ModelInvalidRequestError
    with serve_gguf(made / "qwen2" / "base.gguf") as endpoint:
        with pytest.raises(ModelInvalidRequestError, match="If the prompt is too long, lower"):
            chat_client(endpoint, retries=0).invoke("x " * 300)
    tokenizer, model = models_of(made / "qwen2")
    pair = PAIRS.head(1).assign(messages=[[dict(role="user", content="x " * 300), dict(role="assistant", content="So.")]])
    with pytest.raises(DataError, match="the model reads 256 at most"): encode(tokenizer, pair, model.config.max_position_embeddings)


def test_a_template_without_a_place_for_a_system_prompt_refuses_one(made):
    "llama.cpp would put it into the question; a training that raised something else, or left it out, would teach another prompt."
    asked = [dict(role="system", content="Be brief."), *PAIRS.messages[0]]
    for kind, refuses in dict(gemma3_text="System role not supported", mistral="There are users and assistants").items():
        with pytest.raises(DataError, match=f"refuses the messages of training pair p0: {refuses}"):
            check_served(made / kind / "base.gguf", made / kind / "model", PAIRS.head(1).assign(messages=[asked]))
    for kind in ("qwen2", "llama"): check_served(made / kind / "base.gguf", made / kind / "model", PAIRS.head(1).assign(messages=[asked]))


def with_template(folder, target, template):
    shutil.copytree(folder / "model", target)
    (target / "chat_template.jinja").write_text(template)
    return target


def test_a_template_that_differs_is_found_before_the_training(made, tmp_path):
    "Trained with one template and served with another: a space is enough. And an end at which llama.cpp goes on."
    base, template = made / "llama" / "base.gguf", TEMPLATES["llama"]
    spaced = with_template(made / "llama", tmp_path / "spaced", template.replace("m.content | trim", "' ' + m.content | trim"))
    with pytest.raises(DataError, match="llama.cpp reads the prompt of training pair p0 otherwise than it would be learned: token 8 "):
        check_served(base, spaced, PAIRS)
    endless = template.replace("'<|eot_id|>'", "('<|end_header_id|>' if loop.last and m.role == 'assistant' else '<|eot_id|>')")
    with pytest.raises(DataError, match=r"llama.cpp does not stop at '<\|end_header_id\|>'"):
        check_served(base, with_template(made / "llama", tmp_path / "endless", endless), PAIRS)


def test_matrices_that_a_model_has_not_are_named(made, tmp_path):
    "Phi-3 has one matrix in the place of three, and PEFT's other kinds of adapter have no place in a GGUF."
    trained = prepare_training(tmp_path, made / "phi3" / "model", PAIRS, Recipe())
    with pytest.raises(SettingsError, match="names gate_proj, k_proj, q_proj, up_proj, v_proj, which this model has not.*gate_up_proj"):
        fit(trained)
    adapter = shutil.copytree(made / "granite" / "adapter", tmp_path / "adapter")
    config, shape = adapter / "adapter_config.json", json.loads((made / "granite" / "model" / "config.json").read_text())
    with pytest.raises(SettingsError, match="An adapter of a granite is written by llama.cpp's converter"):
        adapter_to_gguf(adapter, tmp_path / "never.gguf", shape)
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(use_rslora=True)))
    with pytest.raises(SettingsError, match="asks for use_rslora, which llama.cpp cannot serve"):
        adapter_to_gguf(adapter, tmp_path / "never.gguf", shape)


def test_a_vocabulary_that_lost_its_order_is_found_before_the_training(ws, tmp_path):
    """A SentencePiece vocabulary that transformers saved again has no `tokenizer.model`. llama.cpp's converter takes it, gives
    each piece the same score, and its server then joins other letters than transformers does."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
    core.train_from_iterator(" ".join(TEXT).split(), trainers.BpeTrainer(vocab_size=400, special_tokens=pieces, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATES["mistral"],
    )
    save_model("mistral", tmp_path / "model", tokenizer, dict(sliding_window=None))
    base = to_gguf(ws, tmp_path / "model", tmp_path / "base.gguf", "f32")
    asked = dict(role="user", content=" ".join(" ".join(TEXT).split()))
    with pytest.raises(DataError, match="otherwise than it would be learned.*with all files of its tokenizer"):
        check_served(base, tmp_path / "model", PAIRS.assign(messages=[[asked, PAIRS.messages[0][1]]] * 4))
