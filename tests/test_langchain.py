"""LangChain's own test suites on our classes, and the index as a logged MLflow model."""
import json

import pandas as pd, pytest
from langchain_core.documents import Document
from langchain_tests.integration_tests import EmbeddingsIntegrationTests, RetrieversIntegrationTests, VectorStoreIntegrationTests

from llmops_ref.assistant.chain import retriever_class
from llmops_ref.core.config import load_config
from llmops_ref.models.embedding import open_embedder
from llmops_ref.search.published import publish_index
from llmops_ref.search.vector_index import Index, build_index
from llmops_ref.search.vectorstore import IndexStore, OnnxEmbeddings, log_retriever
from llmops_ref.core.workspace import open_workspace

CHUNKS = pd.DataFrame(
    [
        (f"d{n}#0", f"d{n}", "docs", "markdown", "", text)
        for n, text in enumerate(["Log a metric.", "Log a parameter.", "Train an adapter.", "Delete a cluster."])
    ],
    columns=["id", "document_id", "package", "kind", "heading", "text"],
)


@pytest.fixture(scope="session")
def embedder(): return open_embedder(open_workspace(load_config("dev")))


class TestVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self): return IndexStore(self.get_embeddings())


class TestRetriever(RetrieversIntegrationTests):
    retriever_constructor = retriever_class()
    retriever_query_example = "How do I log a metric?"

    @pytest.fixture(autouse=True)
    def index(self, tmp_path, embedder):
        build_index(tmp_path / "index", CHUNKS, embedder.embed(CHUNKS.text.tolist(), "document"), "0", embedder.digest)
        type(self).retriever_constructor_params = dict(index=Index(tmp_path / "index", embedder), k=4)


class TestEmbeddings(EmbeddingsIntegrationTests):
    embeddings_class = OnnxEmbeddings

    @property
    def embedding_model_params(self): return dict(embedder=open_embedder(open_workspace(load_config("dev"))))


def test_a_store_over_a_published_index_is_its_own(tmp_path, embedder):
    build_index(tmp_path / "index", CHUNKS, embedder.embed(CHUNKS.text.tolist(), "document"), "0", embedder.digest)
    index = Index(tmp_path / "index", embedder)
    store = IndexStore.from_index(index)
    store.add_documents([Document("Rotate a secret.", id="new")])
    assert store.similarity_search("rotate a secret", k=1)[0].id == "new"
    assert store.get_by_ids(["d0#0"])[0].metadata["package"] == "docs"
    assert len(index) == 4 and [p.chunk_id for p in index.search("log a metric", 1)] == ["d0#0"]


def test_the_index_as_a_logged_model(tmp_path, embedder):
    "Logged from code, loaded by its registered name, asked for JSON; without a pickle."
    ws = open_workspace(load_config("dev", store=str(tmp_path / "dev")))
    publish_index(ws, CHUNKS, embedder.embed(CHUNKS.text.tolist(), "document"), "0", embedder.digest)
    version = log_retriever(ws)
    model = ws.mlflow().pyfunc.load_model(f"models:/{ws.registered('retriever')}/{version}")
    found = model.predict(pd.DataFrame({"question": ["How do I log a metric?", "remove a cluster"]}), params=dict(k=2))
    assert [json.loads(passages)[0]["document_id"] for passages in found] == ["d0", "d3"] and len(json.loads(found[0])) == 2
    assert not list((tmp_path / "dev").rglob("*.pkl"))
