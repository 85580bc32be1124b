"""LoRA training, step by step from the plain Trainer to ours: tokens/s and MFU of each rung, in one process.

    python benchmarks/finetune_gpu.py                       a tiny model, on whatever is there: does it run?
    python benchmarks/finetune_gpu.py smollm2               SmolLM2-135M (random weights of its shape): two CPU cores, or a GPU
    python benchmarks/finetune_gpu.py 1b 7b --row 4096      on a GPU: Llama-shaped models, random weights (throughput does not depend on them)
    python benchmarks/finetune_gpu.py 7b --rungs 8 7        the two to compare: what a user would run, and ours

It needs torch, transformers, peft, accelerate, and this repository beside it. Two speeds are given, because a rung can be
faster in two ways. *Tokens* are those that the examples have, without padding and with each passage as often as an example
holds it: a rung that reads a passage once for four examples has more of them a second. *Places* are what goes through the
layers, padding included: a rung that uses the device better has more of those. MFU counts places, 4 operations a parameter
and place that goes through it (LoRA: forward, and backward without the frozen weights' gradients), over what the device can
do: layers for each place of a row, the output layer for those of which logits are made, embeddings not at all. Attention
scores and recomputation do not count.

What a rung computes in is in its name. The weights that learn are float32 everywhere, as PEFT makes them. Rungs 2 to 5 add
one thing each to the plain Trainer in float32. To be compared are 7 and 8: ours, and what a user would run, the plain
Trainer with `bf16=True` on bfloat16 weights. Without that switch its adapters compute in float32, which costs a third.
Activations are kept, unless `--recompute` says otherwise for every rung.
"""
import argparse, gc, json, random, statistics, sys, tempfile, time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, logging

sys.path.insert(0, str(Path(__file__).parent.parent))
from llmops_ref.tuning.training import answer_loss, collate, pack_rows

SHAPES = {  # layers, width, inner width, heads, heads of keys and values, words
    "tiny": (2, 64, 128, 4, 2, 512),
    "smollm2": (30, 576, 1536, 9, 3, 49152),
    "1b": (16, 2048, 8192, 32, 8, 128256),
    "7b": (32, 4096, 14336, 32, 8, 32000),
}
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "A10": 125e12}         # dense bfloat16, operations a second
logging.set_verbosity_error()


def examples(words, groups, rng):
    "Groups of four examples of our shape: 180 tokens of instructions and passages that they share, 20 of a question, 25 to 55 of an answer."
    def tokens(n): return [rng.randrange(words) for _ in range(n)]
    return [[(start + tokens(20), tokens(rng.randint(25, 55))) for _ in range(4)] for start in (tokens(180) for _ in range(groups))]


def build(shape, dtype, device, recompute):
    layers, width, inner, heads, kv, words = SHAPES[shape]
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, max_position_embeddings=8192, tie_word_embeddings=shape == "smollm2",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device): model = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=MODULES, task_type="CAUSAL_LM"))
    if recompute:
        if hasattr(model, "activation_checkpointing_enable"):           # its name since transformers 5.23
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=dict(use_reentrant=False))
        else: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        model.disable_input_require_grads()         # a hook that only the reentrant kind needs: the compiler would give up at it
    return model


def padded(batch):
    "What the plain Trainer is given: each example on its own, padded to the longest of its batch."
    length = max(len(p) + len(a) for p, a in batch)
    ids = torch.tensor([(p + a) + [0] * (length - len(p) - len(a)) for p, a in batch])
    labels = torch.tensor([[-100] * len(p) + a + [-100] * (length - len(p) - len(a)) for p, a in batch])
    mask = torch.tensor([[1] * (len(p) + len(a)) + [0] * (length - len(p) - len(a)) for p, a in batch])
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def whole_loss(model, batch, items=None):
    "A packed row whose every place goes through the output layer."
    from llmops_ref.tuning.training import sees
    mask = sees(batch["group"][0], batch["branch"][0])[None, None]
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask, use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), batch["labels"][0])


def fill(row, length):
    "A row of exactly this length, for the compiler: what is added sees only itself and is not learned."
    more = length - len(row["labels"])
    return row | {
        key: [*row[key], *values]
        for key, values in dict(
            input_ids=[0] * more, position_ids=[0] * more, branch=list(range(1, more + 1)), labels=[-100] * more, group=[-1] * more
        ).items()
    }


def rate(model, batches, loss, collator, counts, windows, per_window, device, autocast):
    "Run a Trainer over the batches; tokens of the examples and places computed a second, medians of windows after one of warm-up."
    stamps = []
    class Timed(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs, use_cache=False).loss if loss is None else loss(model, inputs)

        def training_step(self, *arguments, **more):
            out = super().training_step(*arguments, **more)
            if device == "cuda": torch.cuda.synchronize()
            stamps.append(time.perf_counter())
            return out
    steps = (windows + 1) * per_window
    Timed(
        model=model,
        train_dataset=batches[:steps],
        data_collator=collator,
        args=TrainingArguments(
            tempfile.gettempdir(), max_steps=steps, per_device_train_batch_size=1, learning_rate=1e-4,
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
            train_sampling_strategy="sequential", use_cpu=device == "cpu", dataloader_pin_memory=False,
            bf16=autocast,
        ),
    ).train()
    rates = []
    for w in range(1, windows + 1):
        first, last = w * per_window, (w + 1) * per_window
        seconds = stamps[last - 1] - stamps[first - 1]
        rates.append([sum(c[i] for c in counts[first:last]) / seconds for i in (0, 1)])
    return [statistics.median(r[i] for r in rates) for i in (0, 1)]


def ladder(shape, row, windows, per_window, device, rungs, recompute=False):
    rng, out = random.Random(1), []
    groups = examples(SHAPES[shape][-1], (windows + 1) * per_window * max(1, row // 400) + 8, rng)
    flat = [one for group in groups for one in group]
    size = max(1, row // 260)
    batches = [flat[i:i + size] for i in range(0, len(flat), size)]
    rows = pack_rows(groups, row)
    answers = sum(label >= 0 for r in rows for label in r["labels"]) / sum(
        len(r["labels"]) for r in rows
    )  # share of the places whose logits are needed
    real = {id(g): [len(p) + len(a) for p, a in g] for g in groups}
    lengths = iter([n for g in groups for n in real[id(g)]])
    packed = []
    for r in rows:                                  # which examples a row holds: as many as it has branches
        branches = len({(g, b) for g, b in zip(r["group"], r["branch"]) if b})
        packed.append((sum(next(lengths) for _ in range(branches)), len(r["labels"])))
    plain = [(sum(len(p) + len(a) for p, a in b), len(b) * max(len(p) + len(a) for p, a in b)) for b in batches]
    full = [fill(r, row) for r in rows]
    fixed, half = [(c[0], row) for c in packed], torch.bfloat16
    own = device == "cuda"                          # there `answer_loss` has its own autocast; the others need the Trainer's
    table = [ # name, weights, rows, loss (None: the model's own), collator, counts, compiled, the Trainer's autocast
        ("plain Trainer, padded, float32", torch.float32, batches, None, lambda b: padded(b[0]), plain, False, False),
        ("packed rows, float32", torch.float32, rows, whole_loss, collate, packed, False, False),
        ("+ bfloat16 with autocast", half, rows, whole_loss, collate, packed, False, True),
        ("+ compiled", half, full, whole_loss, collate, fixed, True, True),
        ("+ only answers' logits", half, full, answer_loss, collate, fixed, True, not own),
        ("ours on a CPU: packed, float32, only answers' logits", torch.float32, rows, answer_loss, collate, packed, False, False),
        ("ours on a GPU: packed, bfloat16 with autocast, only answers' logits", half, rows, answer_loss, collate, packed, False, not own),
        ("plain Trainer, padded, bfloat16 with autocast", half, batches, None, lambda b: padded(b[0]), plain, False, True),
    ]
    for name, dtype, data, loss, collator, counts, compiled, autocast in [table[n - 1] for n in rungs or range(1, len(table) + 1)]:
        try:
            model = build(shape, dtype, device, recompute)
            layers, head = (
                sum(p.numel() for p in part.parameters()) for part in (model.base_model.model.model.layers, model.get_output_embeddings())
            )
            parameters = layers + head * (answers if loss is answer_loss else 1)
            if compiled: model.base_model.model.model.compile(dynamic=False)
            tokens, computed = rate(model, data, loss, collator, counts, windows, per_window, device, autocast)
            peak = next((p for key, p in PEAK.items() if device == "cuda" and key in torch.cuda.get_device_name()), None)
            out.append(
                dict(
                    model=shape, rung=name + ", recomputed" * recompute, tokens_s=round(tokens), places_s=round(computed),
                    mfu=round(4 * parameters * computed / peak, 3) if peak else None,
                    times=round(tokens / (out[0]["tokens_s"] or float("nan")), 2) if out else 1.0,
                    memory_gb=round(torch.cuda.max_memory_allocated() / 1e9, 1) if device == "cuda" else None,
                )
            )
        except (RuntimeError, torch.OutOfMemoryError) as error:
            out.append(
                dict(
                    model=shape, rung=name, tokens_s=0, places_s=0, mfu=None, times=0, memory_gb=None,
                    error=str(error).strip().splitlines()[0][:160],
                )
            )
        print(json.dumps(out[-1]), flush=True)
        model = None
        gc.collect()
        if device == "cuda": torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
        torch._dynamo.reset()
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["tiny"], help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--row", type=int, help="tokens of a packed row; 4096 on a GPU, 1024 on a CPU")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of a window; 8 on a GPU, 2 on a CPU")
    parser.add_argument("--rungs", type=int, nargs="*", help="only these, from 1, in this order; 8 and 7 are those to compare on a GPU")
    parser.add_argument("--recompute", action="store_true", help="compute activations twice, to hold fewer of them")
    chosen, device = parser.parse_args(), "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else f'CPU, {torch.get_num_threads()} threads'}, torch {torch.__version__}")
    rows = [
        r
        for shape in chosen.shapes
        for r in ladder(
            shape, chosen.row or (4096 if device == "cuda" else 1024), chosen.windows,
            chosen.steps or (8 if device == "cuda" else 2), device, chosen.rungs, chosen.recompute,
        )
    ]
    print("\n| model | | tokens/s | places/s | MFU | tokens/s, times the first row's | GB |\n|---|---|--:|--:|--:|--:|--:|")
    for r in rows:
        print(
            f"| {r['model']} | {r['rung']} | {r['tokens_s']:,} | {r['places_s']:,} |"
            f" {'' if r['mfu'] is None else format(r['mfu'], '.1%')} | {r['times']:.2f} | {r['memory_gb'] or ''} |"
            + (f" {r['error']}" if 'error' in r else "")
        )
