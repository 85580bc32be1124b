"""Retrieval as a team meets it: documents of its own, one that changes, readers while an index is published, Spark."""
import json, multiprocessing, time
from concurrent.futures import ProcessPoolExecutor

import numpy as np, pandas as pd, pytest

from conftest import Project
from llmops_ref.assistant.chain import as_retriever, make_chain
from llmops_ref.core.config import load_config
from llmops_ref.models.embedding import chosen_embedder, open_embedder
from llmops_ref.models.weights import shipped
from llmops_ref.search.published import LiveIndex, embed_texts, open_index, publish_index
from llmops_ref.search.vector_index import Index, build_index, open_reranker
from llmops_ref.core.workspace import open_workspace

PAGES = {
    "guide/restart.md": (
        "# Restart the mill\n\n## After a power cut\n\nOpen the red valve, wait for the pressure to fall below two bar, and press the green"
        " button twice.\n\n## After a repair\n\nAsk the shift leader for the blue key before anything else is touched.\n"
    ),
    "guide/shifts.html": (
        "<html><head><title>Shifts</title><script>var x = 1</script></head><body><nav>Home</nav><main><h1>Shifts</h1><p>The night shift"
        " begins at ten in the evening and ends at six, and hands over in the canteen.</p></main></body></html>"
    ),
    "notes/oil.rst": "Oil\n===\n\nChange the gear oil every four hundred hours; take grade sixty eight, never a thinner one.\n",
    "notes/dust.ipynb": json.dumps(
        dict(
            nbformat=4,
            nbformat_minor=5,
            metadata={},
            cells=[
                dict(
                    cell_type="markdown",
                    metadata={},
                    source=["# Dust\n", "The filter of the dust extractor is cleaned with compressed air on every Friday."],
                )
            ],
        )
    ),
}
QUESTIONS = [
    ("How do I start again after a power cut?", "guide/restart.md"),
    ("When does the night shift begin?", "guide/shifts.html"), ("Which gear oil?", "notes/oil.rst"),
    ("How is the dust filter cleaned?", "notes/dust.ipynb"), ("Who may enter the silo?", "safety.pdf"),
]
QUOTES = {
    "How do I start again after a power cut?": "Open the red valve", "When does the night shift begin?": "at ten in the evening",
    "Which gear oil?": "grade sixty eight", "How is the dust filter cleaned?": "compressed air", "Who may enter the silo?": "Only two people",
}


def pdf(path, text, password=None):
    from reportlab.lib.pdfencrypt import StandardEncryption
    from reportlab.pdfgen.canvas import Canvas
    page = Canvas(str(path), encrypt=StandardEncryption(password) if password else None)
    page.drawString(72, 720, text)
    page.save()


@pytest.fixture
def own(tmp_path) -> Project:
    "A project whose corpus is a folder of mixed documents."
    project = Project(
        tmp_path / "project", CORPUS="documents", QUESTIONS="questions.jsonl", CORPUS_MAX_UNREADABLE="0.3", CORPUS_MIN_WORDS="5"
    )
    for name, text in PAGES.items():
        (project.root / "documents" / name).parent.mkdir(parents=True, exist_ok=True)
        (project.root / "documents" / name).write_text(text)
    pdf(project.root / "documents" / "safety.pdf", "Only two people with a rope and a gas meter may enter the silo together.")
    pdf(project.root / "documents" / "wages.pdf", "Nobody may read this page.", password="secret")
    (project.root / "questions.jsonl").write_text(
        "".join(
            json.dumps(dict(id=f"q{n}", question=q, type="howto", gold=[gold], answer="See there.", split="test" if n % 2 else "train"))
            + "\n"
            for n, (q, gold) in enumerate(QUESTIONS)
        )
    )
    return project


def result(project, stage): return json.loads((project.root / "stores" / "dev" / "stages" / f"{stage}.json").read_text())

def run(project, *args):
    done = project.llmops("run", "--env", "dev", "--from", "corpus", "--to", "retrieval", *args)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout

def found(project, question):
    return [p["document_id"] for p in json.loads(project.inside("search", question, "-k", "3", "--json").stdout)["passages"]]


def test_own_documents_then_one_that_changes(own):
    "A mixed folder is read and searched; a changed document costs its own chunks, a deleted one is gone, an untouched folder runs nothing."
    run(own)
    assert [s["source"] for s in result(own, "corpus")["details"]["skipped"]] == ["wages.pdf"]
    for question, gold in QUESTIONS: assert found(own, question)[0] == gold
    quoting = make_chain(None, "{{quote}}", as_retriever(open_index(open_workspace(load_config("dev", own.root))), 2))
    for question, says in QUOTES.items():
        answer = quoting.invoke(dict(question=question))
        assert says in answer["answer"] and answer["citations"] == [1] and answer["served_by"] == "quote", answer["answer"]
    assert quoting.invoke(dict(question="Who won the cup?"))["refused"]
    first = result(own, "retrieval")["metrics"]
    assert first["embedded"] > 0 and first["hybrid_recall@1"] == 1.0

    assert "nothing" in run(own).lower() or "up to date" in run(own).lower()

    page = own.root / "documents" / "guide" / "restart.md"
    page.write_text(page.read_text().replace("the blue key", "the yellow key"))
    assert "input folder:documents" in own.inside("run", "--env", "dev", "--from", "corpus", "--to", "retrieval", "--dry-run").stdout
    said = run(own)
    assert "1 changed" in said, said                    # the plan of 03: how many rows of its input changed
    assert result(own, "corpus")["metrics"]["cut"] == 1 and result(own, "retrieval")["metrics"]["embedded"] == 1
    assert "yellow key" in own.inside("search", "which key after a repair", "--json").stdout

    (own.root / "documents" / "notes" / "oil.rst").unlink()
    lines = (own.root / "questions.jsonl").read_text().splitlines(keepends=True)
    (own.root / "questions.jsonl").write_text("".join(line for line in lines if "oil.rst" not in line))
    run(own)
    assert result(own, "retrieval")["metrics"]["embedded"] == 0 and "notes/oil.rst" not in found(own, "Which gear oil?")


def test_too_many_unreadable_files_stop_the_stage(own):
    done = own.llmops("run", "--env", "dev", "--from", "corpus", "--to", "corpus", "--set", "corpus_max_unreadable=0.1")
    assert done.returncode != 0 and "wages.pdf" in done.stdout + done.stderr and "corpus_max_unreadable" in done.stdout + done.stderr


@pytest.fixture
def lesson(tmp_path):
    "A workspace with chunks to publish."
    ws = open_workspace(load_config("dev", store=str(tmp_path / "dev")))
    texts = [f"Valve {n} opens at {n} bar and closes at {n - 1}." for n in range(40)]
    chunks = pd.DataFrame(
        dict(
            id=[f"v{n}#0" for n in range(40)], document_id=[f"v{n}" for n in range(40)], package="mill", kind="markdown",
            heading="", text=texts,
        )
    )
    return ws, chunks, open_embedder(ws)


def ask_live(store, count):
    "In a process of its own: the versions that each of many answers was made of."
    live = LiveIndex(open_workspace(load_config("dev", store=store)))
    return [sorted({p.text.rsplit("v", 1)[1] for p in live.search(f"Which valve opens at {n % 40} bar?", 5)}) for n in range(count)]


def test_a_thousand_queries_while_an_index_is_published(lesson):
    ws, chunks, embedder = lesson
    vectors = embedder.embed(chunks.text.tolist(), "document")
    def publish(n): publish_index(ws, chunks.assign(text=chunks.text + f" Since v{n}"), vectors, str(n), embedder.digest)
    publish(0)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        readers, n = [pool.submit(ask_live, str(ws.store), 500) for _ in range(2)], 0
        while not all(r.done() for r in readers): publish(n := n + 1); time.sleep(0.05)
        answers = [versions for r in readers for versions in r.result()]
    assert len(answers) == 1000 and {len(versions) for versions in answers} == {1}, "each answer is of one version"
    assert len({versions[0] for versions in answers}) > 1, "readers follow what is published"


def test_spark_embeds_the_same(lesson):
    ws, chunks, embedder = lesson
    texts = chunks.text.tolist()
    assert np.allclose(embed_texts(ws, texts, embedder, spark_above=10), embedder.embed(texts, "document"), atol=1e-4)


def test_a_cross_encoder_decides_the_order(lesson, tmp_path):
    "A real cross-encoder (of random weights: none can be had offline) is loaded from its folder and reorders what was found."
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification
    folder = tmp_path / "cross-encoder"
    BertForSequenceClassification(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1)
    ).save_pretrained(folder)
    ws, chunks, embedder = lesson
    AutoTokenizer.from_pretrained(shipped(ws, chosen_embedder(ws)).parent).save_pretrained(folder)
    build_index(tmp_path / "index", chunks, embedder.embed(chunks.text.tolist(), "document"), "0", embedder.digest)
    reranker = open_reranker(str(folder))
    index, question = Index(tmp_path / "index", embedder, reranker), "Which valve opens at 7 bar?"
    passages = index.search(question, 5)
    scores = reranker(question, passages)
    assert list(scores) == sorted(scores, reverse=True)
    assert {p.chunk_id for p in passages} <= {p.chunk_id for p in Index(tmp_path / "index", embedder).search(question, 20)}


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf_pq"])
def test_filters_hold_in_every_kind_of_index(lesson, tmp_path, kind):
    _, chunks, embedder = lesson
    chunks = pd.concat([chunks] * 30, ignore_index=True)
    chunks["id"], chunks["package"] = [f"c{n}" for n in range(len(chunks))], ["mill" if n % 7 else "silo" for n in range(len(chunks))]
    chunks["document_id"] = chunks.id
    vectors = np.tile(embedder.embed(chunks.text.tolist()[:40], "document"), (30, 1)) + np.random.default_rng(0).normal(
        0, 0.01, (len(chunks), 384)
    ).astype(np.float32)
    build_index(tmp_path / kind, chunks, vectors, "0", embedder.digest, kind)
    index = Index(tmp_path / kind, embedder)
    for method in ("dense", "bm25", "hybrid"):
        passages = index.search("Which valve opens at 7 bar?", 20, method, filters={"package": "silo"})
        assert len(passages) == 20 and {p.package for p in passages} == {"silo"}


def test_a_gpu_finds_the_same(lesson, tmp_path):
    import faiss
    if not getattr(faiss, "get_num_gpus", int)():
        pytest.skip("needs an NVIDIA GPU and faiss-gpu in the place of faiss-cpu: FAISS sees no GPU")
    _, chunks, embedder = lesson
    vectors = embedder.embed(chunks.text.tolist(), "document")
    build_index(tmp_path / "index", chunks, vectors, "0", embedder.digest)
    index = Index(tmp_path / "index", embedder)
    assert index.gpu is not None
    assert (index.gpu.search(vectors, 5)[1] == index.vectors.search(vectors, 5)[1]).all()
