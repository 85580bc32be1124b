"""AI Search over a real socket: a server that speaks its REST protocol in the SDK's own types, and the SDK's own client."""
import json, os
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest
from databricks.sdk import WorkspaceClient
from databricks.sdk.service.vectorsearch import (
    ColumnInfo, DeleteDataResult, DeleteDataStatus, DeleteDataVectorIndexResponse, EndpointInfo, EndpointStatus,
    EndpointStatusState, EndpointType, QueryVectorIndexResponse, ResultData, ResultManifest, UpsertDataResult,
    UpsertDataStatus, UpsertDataVectorIndexResponse, VectorIndex,
)

from llmops_ref.search.ai_search import COLUMNS, AISearchIndex, create_search_index, delete_chunks, index_body, sync_search_index, upsert_chunks
from llmops_ref.core.config import SettingsError, load_config
from llmops_ref.search.published import publish_to_ai_search
from llmops_ref.core.files import DataError
from llmops_ref.core.workspace import open_workspace
from socket_workspace import MISSING, SocketWorkspace, on_a_socket

NAME, TABLE, ENDPOINT = "llmops_dev.reference.chunks_index", "llmops_dev.reference.chunks", "llmops"
MANAGED = dict(source_table=TABLE, embedding_endpoint="databricks-gte-large-en")
OWN = dict(source_table=TABLE, vector_column="embedding", dimension=4)
FAST = dict(poll=0.01, timeout=5)


class Service(SocketWorkspace):
    "The state of a small AI Search."
    prefix = "/api/2.0/vector-search/"

    def __init__(self):
        super().__init__()
        self.endpoints, self.indexes = {}, {}
        self.endpoint_states, self.index_states = ["ONLINE"], ["ONLINE_NO_PENDING_UPDATE"]     # one a look; the last one stays
        self.rows, self.pages, self.failed, self.on_sync, self.indexed = [], [], [], None, 7

    def answer(self, method, path, query, body):
        part = path.removeprefix("/api/2.0/vector-search/").split("/")
        if part[0] == "endpoints":
            if method == "POST":
                self.endpoints[body["name"]] = EndpointType(body["endpoint_type"])
                return 200, {"name": body["name"]}
            if part[1] not in self.endpoints: return MISSING
            state = self.endpoint_states.pop(0) if len(self.endpoint_states) > 1 else self.endpoint_states[0]
            return (
                200,
                EndpointInfo(
                    name=part[1],
                    endpoint_type=self.endpoints[part[1]],
                    endpoint_status=EndpointStatus(state=EndpointStatusState(state), message="Out of capacity."),
                ).as_dict(),
            )
        if part[0] != "indexes": return MISSING
        if method == "POST" and len(part) == 1:
            if body["name"] in self.indexes: return 409, {"error_code": "RESOURCE_ALREADY_EXISTS", "message": "It exists."}
            self.indexes[body["name"]] = VectorIndex.from_dict(body).as_dict()
            return 200, self.indexes[body["name"]]
        if part[1] not in self.indexes: return MISSING
        action = part[2] if len(part) > 2 else None
        if action is None:
            state = self.index_states.pop(0) if len(self.index_states) > 1 else self.index_states[0]
            return 200, self.indexes[part[1]] | {
                "status": dict(
                    detailed_state=state, ready=state.startswith("ONLINE"), indexed_row_count=self.indexed,
                    message="The table has no change data feed.",
                )
            }
        if action == "sync":
            if self.on_sync: self.on_sync()
            return 200, {}
        if action in ("query", "query-next-page"):
            rows, token = (
                (self.rows, "1") if action == "query" else (self.pages[int(body["page_token"]) - 1], str(int(body["page_token"]) + 1))
            )
            rows = rows[body["query_type"]] if isinstance(rows, dict) else rows
            manifest = ResultManifest(columns=[ColumnInfo(name=c) for c in (*body["columns"], "score")]) if action == "query" else None
            return (
                200,
                QueryVectorIndexResponse(
                    manifest=manifest,
                    result=ResultData(data_array=rows, row_count=len(rows)),
                    next_page_token=token if int(token) <= len(self.pages) else None,
                ).as_dict(),
            )
        keys = [row["id"] for row in json.loads(body["inputs_json"])] if action == "upsert-data" else query["primary_keys"]
        bad = [key for key in keys if key in self.failed]
        response, result, status = (
            (UpsertDataVectorIndexResponse, UpsertDataResult, UpsertDataStatus)
            if action == "upsert-data"
            else (DeleteDataVectorIndexResponse, DeleteDataResult, DeleteDataStatus)
        )
        return (
            200,
            response(
                result=result(failed_primary_keys=bad, success_row_count=len(keys) - len(bad)),
                status=status.PARTIAL_SUCCESS if bad else status.SUCCESS,
            ).as_dict(),
        )


@pytest.fixture
def service(monkeypatch):
    "The service on a socket, and a client of it."
    state = Service()
    with on_a_socket(state, monkeypatch): yield state


def existing(service, kind="delta_sync", endpoint_type="STANDARD", **spec):
    service.endpoints[ENDPOINT] = EndpointType(endpoint_type)
    service.indexes[NAME] = VectorIndex.from_dict(index_body(NAME, ENDPOINT, kind, **(spec or MANAGED))).as_dict()


def row(document, number=0, score=0.5): return [f"{document}#{number}", document, "mlflow", "Summary", f"Text of {document}.", score]


# --- creating

@pytest.mark.parametrize(
    "kind, spec",
    [
        ("delta_sync", MANAGED), ("delta_sync", OWN), ("delta_sync", OWN | dict(columns=(*COLUMNS, "kind"))),
        ("direct_access", dict(dimension=4)),
    ],
)
def test_create_waits_and_is_idempotent(service, kind, spec):
    service.endpoint_states = ["PROVISIONING", "PROVISIONING", "ONLINE"]
    service.index_states = [
        "PROVISIONING_INITIAL_SNAPSHOT", "PROVISIONING_INITIAL_SNAPSHOT", "PROVISIONING_INITIAL_SNAPSHOT",
        "ONLINE_NO_PENDING_UPDATE",
    ]
    seen = []
    made = create_search_index(service.client, NAME, ENDPOINT, kind, **spec, **FAST, on_wait=lambda seconds, text: seen.append(text))
    assert made["status"]["indexed_row_count"] == 7
    assert service.requests("POST /api/2.0/vector-search/endpoints") == [dict(name=ENDPOINT, endpoint_type="STANDARD")]
    assert service.requests("POST /api/2.0/vector-search/indexes") == [
        index_body(NAME, ENDPOINT, kind, **spec)
    ], "what is sent is what `index_body` shows"
    assert any("endpoint llmops: PROVISIONING" in text for text in seen) and any("PROVISIONING_INITIAL_SNAPSHOT" in text for text in seen)
    create_search_index(service.client, NAME, ENDPOINT, kind, **spec, **FAST)
    assert [m for m, *_ in service.asked].count("POST") == 2, "the second time, nothing is created"


def test_two_that_create_at_once(service, monkeypatch):
    "Both see nothing; the slower one is told that it exists, and uses it."
    existing(service)
    found = service.indexes.pop(NAME)
    answer = service.answer
    def late(method, path, query, body):
        result = answer(method, path, query, body)
        if result is MISSING: service.indexes[NAME] = found
        return result
    monkeypatch.setattr(service, "answer", late)
    assert create_search_index(service.client, NAME, ENDPOINT, **MANAGED, **FAST)["name"] == NAME


@pytest.mark.parametrize("there, wanted, says", [
    (OWN | dict(dimension=768), OWN, "its dimension is 768, not 4"),
    (OWN | dict(source_table="llmops_dev.reference.other"), OWN, "its source table is llmops_dev.reference.other"),
    (MANAGED, OWN, "its vector column is None, not embedding"),
    (MANAGED | dict(embedding_endpoint="another"), MANAGED, "its embedding endpoint is another")])
def test_another_index_of_that_name_is_refused(service, there, wanted, says):
    existing(service, **there)
    with pytest.raises(DataError, match=says) as error: create_search_index(service.client, NAME, ENDPOINT, **wanted, **FAST)
    assert "delete_index" in str(error.value)
    assert {method for method, *_ in service.asked} == {"GET"}, "nothing was changed"


def test_endpoint_of_another_type_is_refused(service):
    existing(service, endpoint_type="STORAGE_OPTIMIZED")
    with pytest.raises(SettingsError, match="is STORAGE_OPTIMIZED, not STANDARD"):
        create_search_index(service.client, NAME, ENDPOINT, **MANAGED, **FAST)


def test_failures_are_told_at_once(service):
    service.endpoint_states = ["PROVISIONING", "OFFLINE"]
    with pytest.raises(DataError, match="endpoint llmops is OFFLINE. Out of capacity."):
        create_search_index(service.client, NAME, ENDPOINT, **MANAGED, **FAST)
    service.endpoint_states, service.index_states = ["ONLINE"], ["OFFLINE_FAILED"]
    with pytest.raises(DataError, match="OFFLINE_FAILED: The table has no change data feed"):
        create_search_index(service.client, NAME, ENDPOINT, **MANAGED, **FAST)


def test_deadline(service, monkeypatch):
    now = [0.0]                                         # a clock of its own: no machine is too slow for it
    def sleep(seconds): now[0] += seconds
    monkeypatch.setattr("llmops_ref.search.ai_search.time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    service.endpoint_states = ["PROVISIONING"]
    with pytest.raises(DataError, match="endpoint llmops was not ready after 0 seconds; its last state was PROVISIONING"):
        create_search_index(service.client, NAME, ENDPOINT, **MANAGED, timeout=0.05, poll=0.01)
    service.endpoint_states, service.index_states, now[0] = ["ONLINE"], ["PROVISIONING_INITIAL_SNAPSHOT"], 0.0
    with pytest.raises(DataError, match="last state was PROVISIONING_INITIAL_SNAPSHOT, 7 rows"):
        create_search_index(service.client, NAME, ENDPOINT, **MANAGED, timeout=0.2, poll=60)
    assert now[0] == pytest.approx(0.2), "a long poll does not outlast the deadline"


def test_bad_settings_send_nothing(service):
    for call in (
        lambda: create_search_index(service.client, "llmops-dev.reference.x", ENDPOINT, **MANAGED),
        lambda: create_search_index(service.client, NAME, ENDPOINT, "faiss"),
        lambda: create_search_index(service.client, NAME, ENDPOINT, endpoint_type="HUGE", **MANAGED),
        lambda: AISearchIndex(service.client, "a.b"), lambda: sync_search_index(service.client, "a b.c.d"),
        lambda: delete_chunks(service.client, "x", ["a"]),
    ):
        with pytest.raises(SettingsError): call()
    assert service.asked == []


# --- keeping it fresh

def test_sync_does_not_believe_the_state_from_before(service):
    existing(service)
    service.indexed = 3
    def begin():
        service.index_states = [
            "ONLINE_NO_PENDING_UPDATE", "ONLINE_NO_PENDING_UPDATE", "ONLINE_TRIGGERED_UPDATE", "ONLINE_NO_PENDING_UPDATE",
        ]
    service.on_sync, seen = begin, []
    assert sync_search_index(service.client, NAME, rows=3, **FAST, on_wait=lambda seconds, text: seen.append(text)) == 3
    assert [text.split(": ")[1] for text in seen] == ["ONLINE_NO_PENDING_UPDATE, 3 rows of 3"] * 2 + [
        "ONLINE_TRIGGERED_UPDATE, 3 rows of 3"
    ]
    assert len(service.requests("/sync")) == 1


def test_sync_waits_for_the_rows(service):
    existing(service)
    service.on_sync = lambda: service.index_states.append("ONLINE_TRIGGERED_UPDATE") or service.index_states.reverse()
    with pytest.raises(DataError, match="7 rows of 8"): sync_search_index(service.client, NAME, rows=8, timeout=0.1, poll=0.01)
    assert sync_search_index(service.client, NAME, rows=7, grace=0, **FAST) == 7, "with no time of grace, idle is idle"


def test_sync_that_fails(service):
    existing(service)
    service.on_sync = lambda: service.index_states.__setitem__(
        slice(None), ["ONLINE_PIPELINE_FAILED", "ONLINE_TRIGGERED_UPDATE", "ONLINE_PIPELINE_FAILED"]
    )
    with pytest.raises(DataError, match="ONLINE_PIPELINE_FAILED.*change data feed.*still answers"):
        sync_search_index(service.client, NAME, **FAST)
    assert service.index_states == ["ONLINE_PIPELINE_FAILED"], "the failure of the last sync was not taken for one of this"


def test_sync_of_what_follows_no_table(service):
    existing(service, "direct_access", dimension=4)
    with pytest.raises(SettingsError, match="upsert_chunks"): sync_search_index(service.client, NAME, **FAST)


CHUNKS = pd.DataFrame(
    [(f"d{i}#0", f"d{i}", "mlflow", None if i == 1 else "Summary", f"Text\x00 {i}", i) for i in range(5)], columns=[*COLUMNS, "words"]
)
VECTORS = np.eye(5, 4, dtype=np.float32)


def test_upsert_and_delete_in_batches(service):
    existing(service, "direct_access", dimension=4)
    assert upsert_chunks(service.client, NAME, CHUNKS, VECTORS, batch=2) == 5
    sent = [json.loads(body["inputs_json"]) for body in service.requests("/upsert-data")]
    assert [len(rows) for rows in sent] == [2, 2, 1]
    assert sent[0][1] == dict(id="d1#0", document_id="d1", package="mlflow", heading=None, text="Text  1", embedding=[0, 1, 0, 0])
    assert delete_chunks(service.client, NAME, CHUNKS.id.tolist(), batch=3) == 5
    assert [query["primary_keys"] for method, path, query, body in service.asked if method == "DELETE"] == [
        ["d0#0", "d1#0", "d2#0"],
        ["d3#0", "d4#0"],
    ]


def test_half_a_failure_names_the_keys_and_goes_on(service):
    existing(service, "direct_access", dimension=4)
    service.failed = ["d1#0", "d4#0"]
    with pytest.raises(DataError, match="2 of 5 chunks could not be written to .*: d1#0, d4#0"):
        upsert_chunks(service.client, NAME, CHUNKS, VECTORS, batch=2)
    assert len(service.requests("/upsert-data")) == 3
    with pytest.raises(DataError, match="1 of 2 chunks could not be deleted from .*: d4#0"):
        delete_chunks(service.client, NAME, ["d3#0", "d4#0"])


def test_upsert_refuses_before_it_writes(service):
    existing(service, "direct_access", dimension=4)
    bad = VECTORS.copy(); bad[2, 2] = np.nan
    for chunks, vectors, says in (
        (CHUNKS, np.eye(5, 3), "dimension 4"), (CHUNKS, VECTORS[:4], "5 vectors"), (CHUNKS, bad, "not numbers"),
        (pd.concat([CHUNKS, CHUNKS.head(1)]), np.eye(6, 4), "twice"),
        (CHUNKS.drop(columns="heading"), VECTORS, "lack the columns heading"),
    ):
        with pytest.raises(DataError, match=says): upsert_chunks(service.client, NAME, chunks, vectors)
    existing(service)
    with pytest.raises(SettingsError, match="sync_search_index"): upsert_chunks(service.client, NAME, CHUNKS, VECTORS)
    assert not service.requests("/upsert-data")


# --- searching

def test_one_passage_of_each_document(service):
    existing(service)
    service.rows = [row("log_metric", 0, 0.9), row("log_metric", 1, 0.8), row("log_param", 0, 0.6), row("set_tag", 0, 0.5)]
    found = AISearchIndex(service.client, NAME).search("record a number", k=2, method="dense")
    assert [(p.chunk_id, p.package, p.score) for p in found] == [("log_metric#0", "mlflow", 0.9), ("log_param#0", "mlflow", 0.6)]
    assert [p.similarity for p in found] == pytest.approx([(3 - 1 / 0.9) / 2, (3 - 1 / 0.6) / 2])
    assert service.requests("/query") == [
        dict(columns=list(COLUMNS), num_results=50, query_type="ANN", query_text="record a number")
    ], "Databricks embeds: no vector is sent"


def test_the_kind_of_a_passage_comes_where_the_index_has_it(service):
    existing(service, **OWN | dict(columns=(*COLUMNS, "kind")))
    *there, score = row("log_metric", 0, 0.9)
    service.rows = [[*there, "function", score], [*row("log_param", 0, 0.6)[:-1], None, 0.6]]
    found = AISearchIndex(service.client, NAME).search("q", method="dense", vector=np.eye(4, dtype=np.float32)[0])
    assert [(p.document_id, p.kind) for p in found] == [("log_metric", "function"), ("log_param", "")]
    assert service.requests("/query")[0]["columns"] == [*COLUMNS, "kind"]


def test_methods_and_what_they_send(service):
    "Our own vectors: dense sends the vector, bm25 the text, hybrid both, and asks a second time for the cosines."
    existing(service, **OWN)
    service.rows = dict(HYBRID=[row("a", 0, 1.0), row("b", 0, 0.4)], ANN=[row("b", 0, 1.0), row("c", 0, 0.5)], FULL_TEXT=[row("a", 0, 7.5)])
    index, vector = AISearchIndex(service.client, NAME), np.eye(4, dtype=np.float32)[0]
    assert [(p.document_id, p.score, p.similarity) for p in index.search("q", method="hybrid", vector=vector)] == [
        ("a", 1.0, 0.0),
        ("b", 0.4, 1.0),
    ]
    assert [(p.document_id, p.score, p.similarity) for p in index.search("q", method="bm25", candidates=3, k=1)] == [("a", 7.5, 0.0)]
    hybrid, dense, words = service.requests("/query")
    assert (hybrid["query_type"], hybrid["query_text"], hybrid["query_vector"]) == ("HYBRID", "q", [1, 0, 0, 0])
    assert (dense["query_type"], dense["query_vector"], "query_text" in dense) == ("ANN", [1, 0, 0, 0], False)
    assert words == dict(columns=list(COLUMNS), num_results=4, query_type="FULL_TEXT", query_text="q")
    AISearchIndex(service.client, NAME, cosines=False).search("q", method="hybrid", vector=vector, k=500)
    assert len(service.requests("/query")) == 4 and service.requests("/query")[-1]["num_results"] == 200
    with pytest.raises(SettingsError, match="no search method 'sparse'"): index.search("q", method="sparse")


def test_the_embedder_is_used_and_checked(service):
    existing(service, **OWN)
    class Embedder:
        def embed(self, texts, of): return np.ones((len(texts), size))
    service.rows, size = [row("a")], 4
    index = AISearchIndex(service.client, NAME, Embedder())
    assert index.search("q", method="dense")[0].document_id == "a" and service.requests("/query")[0]["query_vector"] == [1, 1, 1, 1]
    size = 384
    with pytest.raises(SettingsError, match="dimension 4, and the question's has 384"): index.search("q")


def test_pages_until_there_is_enough(service):
    existing(service)
    service.rows, service.pages = [row("a", n) for n in range(3)], [[row("a", 3), row("b")], [row("c")], [row("d")]]
    found = AISearchIndex(service.client, NAME).search("q", k=3, method="dense", candidates=2500)
    assert [p.document_id for p in found] == ["a", "b", "c"]
    assert service.requests("/query")[0]["num_results"] == 2500
    assert service.requests("/query-next-page") == [
        dict(endpoint_name=ENDPOINT, page_token="1"),
        dict(endpoint_name=ENDPOINT, page_token="2"),
    ]


@pytest.mark.parametrize(
    "endpoint_type, expected",
    [
        ("STANDARD", dict(filters_json='{"package": "mlflow", "kind": ["class", "function"]}')),
        ("STORAGE_OPTIMIZED", dict(filter_string="package = 'mlflow' AND kind IN ('class', 'function')")),
    ],
)
def test_filters(service, endpoint_type, expected):
    existing(service, endpoint_type=endpoint_type)
    service.rows, mine = [row("a")], {"package": "mlflow", "kind": ["class", "function"]}
    index = AISearchIndex(service.client, NAME)
    assert index.search("q", filters=mine)[0].document_id == "a"
    for body in service.requests("/query"): assert {k: v for k, v in body.items() if k.startswith("filter")} == expected
    assert len(service.requests("/query")) == 2, "the request for the cosines is filtered too"
    with pytest.raises(SettingsError, match="no column colour"): index.search("q", filters={"colour": "red"})
    index.search("q", filters=mine)
    assert len(service.requests(f"GET /api/2.0/vector-search/endpoints/{ENDPOINT}")) == 1, "the type of the endpoint is looked up once"


def test_odd_questions(service):
    existing(service)
    index = AISearchIndex(service.client, NAME)
    assert index.search("") == index.search(" \n") == index.search("\x00") == index.search("q", k=0) == []
    assert service.requests("/query") == []
    assert index.search("x" * 100_000, method="bm25") == [] and len(service.requests("/query")[0]["query_text"]) == 20_000
    index.search("a\x00b \ud800 🙂", method="bm25")
    assert service.requests("/query")[1]["query_text"] == "a b ? 🙂"


# --- when it goes wrong

def test_no_such_index(service):
    with pytest.raises(DataError, match="does not know the index .*create_search_index"): AISearchIndex(service.client, NAME)
    with pytest.raises(DataError, match="does not know"): sync_search_index(service.client, NAME)
    existing(service)
    index = AISearchIndex(service.client, NAME)
    service.indexes.clear()
    with pytest.raises(DataError, match="does not know"): index.search("q")


def test_busy_is_asked_again(service):
    existing(service)
    service.rows, service.refuse = [row("a")], []
    index = AISearchIndex(service.client, NAME)
    service.refuse = [(429, {"Retry-After": "0"}), (503, {"Retry-After": "0"})]
    assert [p.document_id for p in index.search("q", method="bm25")] == ["a"]
    assert len(service.requests("/query")) == 3


@pytest.mark.parametrize(
    "status, kind, says",
    [
        (500, DataError, "failed on the index .*says no"), (400, DataError, "says no"),
        (403, SettingsError, "SELECT on the index"), (401, SettingsError, "SELECT on the index"),
    ],
)
def test_errors_are_ours(service, status, kind, says):
    existing(service)
    index = AISearchIndex(service.client, NAME)
    service.refuse = [(status, {})]
    with pytest.raises(kind, match=says): index.search("q")


def test_busy_for_ever(service):
    existing(service)
    service.client.api_client._api_client._retry_timeout_seconds = 1
    service.refuse = [(429, {"Retry-After": "1"})] * 9
    with pytest.raises(DataError, match="Timed out"): AISearchIndex(service.client, NAME)


def test_on_a_real_workspace():
    "workspace: search an index that exists, by every method."
    needed = ("DATABRICKS_HOST", "LLMOPS_TEST_SEARCH_INDEX")
    if missing := [name for name in needed if not os.environ.get(name)]:
        pytest.skip(
            f"needs a Databricks workspace: {', '.join(missing)} not set (LLMOPS_TEST_SEARCH_INDEX: catalog.schema.index over our chunk"
            " table, embedded by Databricks)"
        )
    index = AISearchIndex(WorkspaceClient(), os.environ["LLMOPS_TEST_SEARCH_INDEX"])
    for method in ("hybrid", "dense", "bm25"):
        found = index.search("How do I log a metric?", k=3, method=method)
        assert 0 < len(found) <= 3 and len({p.document_id for p in found}) == len(found)
    assert all(-1 <= p.similarity <= 1 for p in index.search("log a metric", method="dense"))
    assert {p.package for p in index.search("log a metric", filters={"package": "mlflow"})} == {"mlflow"}


# --- as the retrieval stage uses it

def test_only_chunks_that_changed_are_sent(service, tmp_path):
    "direct_access: a second publication sends what differs, and takes out what is gone."
    ws = open_workspace(load_config("dev", store=str(tmp_path / "dev"), vector_index="direct_access", ai_search_endpoint=ENDPOINT))
    chunks = pd.DataFrame(
        [(f"d{n}#0", f"d{n}", "docs", "text", "", f"Text {n}", f"digest{n}") for n in range(5)],
        columns=["id", "document_id", "package", "kind", "heading", "text", "digest"],
    )
    vectors = np.eye(5, 4, dtype=np.float32)
    assert publish_to_ai_search(ws, service.client, chunks, vectors, **FAST).new == 5
    changed = chunks.assign(digest=["digest0", "other", *chunks.digest[2:]]).iloc[:4]
    assert str(publish_to_ai_search(ws, service.client, changed, vectors[:4], **FAST)) == "1 changed, 1 gone"
    assert [[row["id"] for row in json.loads(body["inputs_json"])] for body in service.requests("upsert-data")] == [
        [f"d{n}#0" for n in range(5)],
        ["d1#0"],
    ]
    assert [query["primary_keys"] for method, path, query, body in service.asked if method == "DELETE"] == [["d4#0"]]
    service.failed = ["d2#0"]                               # refused: the next publication tries again
    with pytest.raises(DataError, match="d2#0"): publish_to_ai_search(ws, service.client, changed.assign(digest="new"), vectors[:4], **FAST)
    service.failed = []
    assert publish_to_ai_search(ws, service.client, changed.assign(digest="new"), vectors[:4], **FAST).changed == 4
