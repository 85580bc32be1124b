"""A Databricks workspace of one machine, for the real client: Spark Connect and REST behind one address, with TLS and a token.

Run as a process: `python sail_workspace.py FOLDER`. Spark is Sail; what Databricks has and Sail has not is added here:
Unity Catalog's tables that outlive a session, `DESCRIBE HISTORY`, the numbers that a `MERGE` reports, the version of the
runtime, tokens that end, grants that are missing, secrets, and the statements of a SQL warehouse.

FOLDER/workspace.json says where it listens. What it must refuse stands in FOLDER/rules.json, read before each request.
"""
import asyncio, base64, datetime, io, json, os, re, ssl, sys, threading, time, uuid
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

CATALOG, SCHEMA = "llmops_dev", "reference"
RUNTIME = "17.3.x-scala2.13"
os.environ |= dict(
    RUST_LOG="error", SAIL_CATALOG__DEFAULT_CATALOG=f'"{CATALOG}"', SAIL_CATALOG__DEFAULT_DATABASE=f'["{SCHEMA}"]',
    SAIL_CATALOG__LIST=f'[{{name="{CATALOG}", type="memory", initial_database=["{SCHEMA}"]}}]',
)

import grpc
import pyarrow as pa
from deltalake import DeltaTable
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from pysail.spark import SparkConnectServer
from pyspark.sql.connect.proto import base_pb2

FOLDER = Path(sys.argv[1]).resolve() if __name__ == "__main__" else None
SESSION = str(uuid.uuid4())                             # Sail's one session: its catalog lasts as long as that
TOKEN = "dapi-of-a-test"
SECURE = "--plain" not in sys.argv                      # else without TLS and without a token, for a client that is Spark's own
HISTORY = re.compile(r"\s*DESCRIBE HISTORY (\S+)(?: LIMIT (\d+))?\s*$", re.I)
MERGE = re.compile(r"\s*MERGE\b.*?\bINTO (\S+)", re.I | re.S)
SPARK_ERROR = "org.apache.spark.sql.AnalysisException"


def rules() -> dict:
    "`tokens` that are good, `over`: sessions that are, `refuse`: a list of {on, code, condition, message, times}, for statements with `on`."
    try: told = json.loads((FOLDER / "rules.json").read_text())
    except (FileNotFoundError, ValueError): told = {}
    return dict(tokens=[TOKEN], over=[], refuse=[], runtime=RUNTIME) | told


refused = {}                                            # rule -> how often, since the rules were written


class Refused(Exception):
    def __init__(self, code, message, condition=""): self.code, self.message, self.condition = code, message, condition


def check(text: str):
    for rule in rules()["refuse"]:
        if not re.search(rule["on"], text): continue
        key = json.dumps(rule)
        refused[key] = refused.get(key, 0) + 1
        if refused[key] <= rule.get("times", 1e9): raise Refused(rule["code"], rule["message"], rule.get("condition", ""))


# --- what Sail says, and what Databricks would

class Catalog:
    "The tables as Databricks knows them: where they are, and what Delta's log says of them."
    def __init__(self, sail):
        self.merging = threading.Lock()
        from pyspark.sql import SparkSession
        self.spark = SparkSession.builder.remote(f"sc://127.0.0.1:{sail}/;session_id={SESSION}").getOrCreate()
        self.spark.conf.set("spark.sql.warehouse.dir", str(FOLDER / "spark-warehouse"))

    def folder(self, name) -> Path:
        for row in self.spark.sql(f"DESCRIBE TABLE EXTENDED {name}").collect():
            if row.col_name == "Location": return Path(urlsplit(row.data_type).path)
        raise LookupError(name)

    def history(self, name, limit=None) -> pa.Table:
        try: folder = self.folder(name)
        except Exception as error:
            if "not found" not in str(error).lower(): raise
            raise Refused("INTERNAL", f"[TABLE_OR_VIEW_NOT_FOUND] The table or view {name} cannot be found.", "TABLE_OR_VIEW_NOT_FOUND")
        rows = [
            dict(version=h["version"], operation="MERGE" if h["operation"] == "MERGE" else h["operation"],
                 operationMetrics={k: str(v) for k, v in (h.get("operationMetrics") or {}).items()})
            for h in DeltaTable(str(folder)).history(int(limit) if limit else None)
        ]
        return pa.Table.from_pylist(rows, schema=HISTORY_SCHEMA)

    def merged(self, name, before: str) -> pa.Table:    # the row that a MERGE returns on Databricks
        last = self.history(name, 1).to_pylist()[0]
        seen = {k: int(v) for k, v in last["operationMetrics"] if v.isdigit()} if str(last["version"]) != before else {}
        number = lambda word: next((v for k, v in seen.items() if k.replace("_", "").lower() == f"numtargetrows{word}"), 0)
        counts = [number(word) for word in ("updated", "deleted", "inserted")]
        names = ("num_affected_rows", "num_updated_rows", "num_deleted_rows", "num_inserted_rows")
        return pa.table({name: [n] for name, n in zip(names, (sum(counts), *counts))})

    def run(self, text, forward) -> pa.Table | None:
        "The answer of Databricks where it differs from Sail's; `forward` lets Sail do the statement."
        check(text)
        if found := HISTORY.match(text): return self.history(*found.groups())
        if found := MERGE.match(text):
            with self.merging:                          # so that what it reports is its own
                before = str(self.history(found[1], 1).to_pylist()[0]["version"])
                forward()
                return self.merged(found[1], before)
        if text.lstrip().upper().startswith("CREATE TABLE"):
            forward()
            return pa.table(dict(num_affected_rows=[0], num_inserted_rows=[0]))


HISTORY_SCHEMA = pa.schema([("version", pa.int64()), ("operation", pa.string()), ("operationMetrics", pa.map_(pa.string(), pa.string()))])


def as_delta(text: str) -> str: return f"{text} USING delta" if text.lstrip().upper().startswith("CREATE TABLE") else text

def bound(text: str, values: dict) -> str:              # Sail takes no parameters in a command
    for key, value in values.items():
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        text = text.replace(f":{key}", f"'{quoted}'")
    return text

def as_databricks(error: Exception) -> Refused | None:  # what Sail says in words of its own
    text = str(error.details() if isinstance(error, grpc.RpcError) else error)
    for words, condition in (("Failed to commit transaction", "DELTA_CONCURRENT_APPEND"), ("Table already exists", "TABLE_OR_VIEW_ALREADY_EXISTS")):
        if words in text: return Refused("INTERNAL", f"[{condition}] {text}", condition)


def stream_of(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer: writer.write_table(table)
    return sink.getvalue()


# --- Spark Connect

class Gateway(grpc.GenericRpcHandler):
    "Between a client of Databricks Connect and Sail."
    def __init__(self, sail, catalog):
        self.channel = grpc.insecure_channel(f"127.0.0.1:{sail}", options=[("grpc.max_receive_message_length", -1)])
        self.catalog, self.server_session, self.own = catalog, "", set()
        self.methods = {m.name: m for m in base_pb2.DESCRIPTOR.services_by_name["SparkConnectService"].methods}

    def service(self, call):
        name = call.method.rpartition("/")[2]
        if name not in self.methods: return None
        method, path = self.methods[name], call.method
        asks, says = (getattr(base_pb2, kind.name) for kind in (method.input_type, method.output_type))
        make = {(False, True): self.channel.unary_stream, (True, False): self.channel.stream_unary, (False, False): self.channel.unary_unary}
        kind = (name == "AddArtifacts", name in ("ExecutePlan", "ReattachExecute"))
        ask = make[kind](path, asks.SerializeToString, says.FromString)
        handler = {(False, True): (grpc.unary_stream_rpc_method_handler, self.streaming), (True, False): (grpc.stream_unary_rpc_method_handler, self.single),
                   (False, False): (grpc.unary_unary_rpc_method_handler, self.single)}[kind]
        return handler[0](lambda request, context: handler[1](name, ask, request, context, says), asks.FromString, says.SerializeToString)

    def admit(self, context):
        said = dict(context.invocation_metadata())
        token = said.get("authorization", "").removeprefix("Bearer ")
        if SECURE and token not in rules()["tokens"]: context.abort(grpc.StatusCode.UNAUTHENTICATED, "Invalid access token.")
        note(session=said.get("x-databricks-session-id"), cluster=said.get("x-databricks-cluster-id"),
             image=said.get("x-databricks-client-image-version"), agent=said.get("user-agent", ""))

    def ours(self, request):                            # the client's session is Sail's one
        self.client_session = request.session_id
        request.session_id = SESSION
        if hasattr(request, "client_observed_server_side_session_id"): request.ClearField("client_observed_server_side_session_id")
        return request

    def theirs(self, answer, session):
        answer.session_id = session
        self.server_session = answer.server_side_session_id or self.server_session
        return answer

    def single(self, name, ask, request, context, says):
        self.admit(context)
        try:
            if name == "AddArtifacts":
                requests = list(request)
                session = requests[0].session_id
                return self.theirs(ask(iter([self.ours(r) for r in requests])), session)
            session = request.session_id
            if name == "ReleaseSession": return says(session_id=session, server_side_session_id=self.server_session)
            if name == "ReleaseExecute" and request.operation_id in self.own:
                return says(session_id=session, server_side_session_id=self.server_session)
            answer = self.theirs(ask(self.ours(request)), session)
        except grpc.RpcError as error: return pass_on(context, error)
        if name == "AnalyzePlan" and answer.HasField("spark_version"):
            answer.spark_version.MergeFromString(b"\x82\x32" + bytes([len(runtime := rules()["runtime"])]) + runtime.encode())        # field 800, of Databricks
        return answer

    def streaming(self, name, ask, request, context, says):
        self.admit(context)
        session, command = request.session_id, request.plan.command if name == "ExecutePlan" else None
        self.ours(request)
        def forward(): return [answer for answer in ask(request)]
        try:
            if session in rules()["over"]: raise Refused("INTERNAL", "[INVALID_HANDLE.SESSION_CLOSED] The handle is invalid. Session was closed.", "INVALID_HANDLE.SESSION_CLOSED")
            if command is not None and command.HasField("write_operation") and not command.write_operation.HasField("source"):
                command.write_operation.source = "delta"
            text = (command.sql_command.input.sql.query or command.sql_command.sql) if command is not None and command.HasField("sql_command") else ""
            if text:
                if command.sql_command.input.HasField("sql"): command.sql_command.input.sql.query = as_delta(text)
                else: command.sql_command.sql = as_delta(text)
                table = self.catalog.run(text, forward)
                if table is not None:
                    yield from self.answer(table, request.operation_id, session, says)
                    return
            for answer in ask(request): yield self.theirs(answer, session)
        except Refused as error: refuse(context, error)
        except grpc.RpcError as error: refuse(context, said) if (said := as_databricks(error)) else pass_on(context, error)

    def answer(self, table, operation, session, says):
        self.own.add(operation)
        same = dict(session_id=session, server_side_session_id=self.server_session, operation_id=operation)
        first = says(**same, response_id=str(uuid.uuid4()))
        first.sql_command_result.relation.local_relation.data = stream_of(table)
        yield first
        last = says(**same, response_id=str(uuid.uuid4()))
        last.result_complete.SetInParent()
        yield last


def refuse(context, error: Refused):
    "As Spark's server says no: a status with the class and the condition of the error."
    info = error_details_pb2.ErrorInfo(
        reason=SPARK_ERROR, domain="org.apache.spark",
        metadata=dict(classes=json.dumps([SPARK_ERROR]), errorClass=error.condition, sqlState="42000") if error.condition else {},
    )
    detail = any_pb2.Any()
    detail.Pack(info)
    status = status_pb2.Status(code=getattr(code_pb2, error.code), message=error.message, details=[detail] if error.condition else [])
    context.abort_with_status(rpc_status.to_status(status))


def pass_on(context, error):
    context.set_trailing_metadata(tuple((k, v) for k, v in error.trailing_metadata() or () if not k.startswith("grpc-") or k == "grpc-status-details-bin"))
    context.abort(error.code(), error.details())


def note(**said):
    with (FOLDER / "asked.jsonl").open("a") as file: file.write(json.dumps(said) + "\n")


# --- REST: secrets, the version of a cluster, and the statements of a warehouse

class Rest(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm, catalog, results, awake = "HTTP/1.1", True, None, {}, False
    def log_message(self, *args): pass

    def reply(self):
        size = int(self.headers.get("Content-Length") or 0)
        body, address = json.loads(self.rfile.read(size) or "{}") if size else {}, urlsplit(self.path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        query = {k: v[0] for k, v in parse_qs(address.query).items()}
        if address.path.startswith("/results/"):        # a signed address: it is a secret itself, and takes no token
            if self.headers.get("Authorization"): return self.send(400, b"{}")
            return self.send(200, self.results[address.path.rpartition("/")[2]], "application/octet-stream")
        if token not in rules()["tokens"] and not address.path.startswith("/.well-known"): status, answer = 403, dict(error_code="PERMISSION_DENIED", message="Invalid access token.")
        else: status, answer = self.answer(address.path, body, query)
        self.send(status, json.dumps(answer).encode())
    do_GET = do_POST = reply

    def send(self, status, content, kind="application/json"):
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(content))}.items(): self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    def answer(self, path, body, query):
        note(rest=path)
        if path == "/.well-known/databricks-config": return 200, dict(oidc_endpoint=f"{self.address}/oidc", account_id="a", workspace_id="1")
        if path == "/api/2.0/secrets/get":
            scopes = rules().get("secrets", {})
            if query["scope"] not in scopes: return 404, dict(error_code="RESOURCE_DOES_NOT_EXIST", message=f"Scope {query['scope']} does not exist!")
            if query["key"] not in scopes[query["scope"]]:
                return 404, dict(error_code="RESOURCE_DOES_NOT_EXIST", message=f"Secret does not exist with scope: {query['scope']} and key: {query['key']}")
            value = scopes[query["scope"]][query["key"]]
            if value is None: return 403, dict(error_code="PERMISSION_DENIED", message="User does not have READ permission on the scope.")
            return 200, dict(key=query["key"], value=base64.b64encode(value.encode()).decode())
        if path == "/api/2.1/clusters/get":
            if query["cluster_id"] != "1130-101112-abcdefgh": return 400, dict(error_code="INVALID_PARAMETER_VALUE", message=f"Cluster {query['cluster_id']} does not exist")
            return 200, dict(cluster_id=query["cluster_id"], spark_version=RUNTIME, state="RUNNING")
        if path.startswith("/api/2.0/sql/statements"): return self.statements(path, body)
        return 404, dict(error_code="ENDPOINT_NOT_FOUND", message=path)

    def statements(self, path, body):
        parts = path.removeprefix("/api/2.0/sql/statements").strip("/").split("/")
        if not parts[0]:                                # a new one
            if body["warehouse_id"] not in rules().get("warehouses", ["a1b2c3d4e5f6"]):
                return 400, dict(error_code="INVALID_PARAMETER_VALUE", message=f"Endpoint {body['warehouse_id']} does not exist.")
            assert body["disposition"] == "EXTERNAL_LINKS" and body["format"] == "ARROW_STREAM", body
            id = str(uuid.uuid4())
            self.results[id] = dict(statement_id=id, status=dict(state="PENDING"))
            work = threading.Thread(target=self.execute, args=(id, body), daemon=True)
            work.start()
            if not self.awake: type(self).awake = True
            else: work.join(30)                         # as it was asked to; the first time it is asleep, and says PENDING
            parts = [id]
        answer = self.results[parts[0]]
        if parts[1:3] == ["result", "chunks"]: return 200, dict(external_links=[answer["links"][int(parts[3])]])
        links = answer.get("links")
        return 200, {k: v for k, v in answer.items() if k != "links"} | (dict(result=dict(external_links=links[:1])) if links else {})

    def execute(self, id, body):
        text, values = body["statement"], {p["name"]: p.get("value") for p in body.get("parameters", [])}
        try:
            def forward(): return self.catalog.spark.sql(as_delta(bound(text, values)))
            table = self.catalog.run(text, forward)
            table = forward().toArrow() if table is None else table
        except Exception as error:
            said = error if isinstance(error, Refused) else as_databricks(error) or Refused("", str(error)[:500])
            return self.results[id].update(status=dict(state="FAILED", error=dict(error_code="BAD_REQUEST", message=said.message)))
        half, address = max(1, len(table) // 2), f"{self.address}/results"       # two chunks, where there are two rows
        chunks, links = [table[:half], table[half:]] if len(table) > 1 else [table][:len(table)], []
        for n, chunk in enumerate(chunks):
            name = str(uuid.uuid4())
            self.results[name] = stream_of(chunk)
            links.append(dict(chunk_index=n, row_count=len(chunk), external_link=f"{address}/{name}") | (dict(next_chunk_index=n + 1) if n + 1 < len(chunks) else {}))
        columns = [dict(name=f.name, position=n, type_text=WORDS.get(str(f.type), "STRING")) for n, f in enumerate(table.schema)]
        manifest = dict(format="ARROW_STREAM", total_row_count=len(table), total_chunk_count=len(chunks), truncated=False, schema=dict(column_count=len(columns), columns=columns))
        self.results[id].update(status=dict(state="SUCCEEDED"), manifest=manifest, links=links)


WORDS = {"int64": "BIGINT", "double": "DOUBLE", "bool": "BOOLEAN", "timestamp[us, tz=UTC]": "TIMESTAMP", "int32": "INT", "float": "FLOAT",
         "list<element: string>": "ARRAY<STRING>"}


# --- one address for both

async def front(cert, key, grpc_port, rest_port, told):
    "TLS for both; what a client wants is in its handshake."
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    context.set_alpn_protocols(["h2", "http/1.1"])

    async def pipe(reader, writer):
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except (ConnectionError, ssl.SSLError): pass
        finally: writer.close()

    async def served(reader, writer):
        kind = writer.get_extra_info("ssl_object").selected_alpn_protocol()
        there = await asyncio.open_connection("127.0.0.1", grpc_port if kind == "h2" else rest_port)
        await asyncio.gather(pipe(reader, there[1]), pipe(there[0], writer))

    server = await asyncio.start_server(served, "127.0.0.1", 0, ssl=context)
    told(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def certificate() -> tuple[str, str]:
    "For `localhost`, of an authority of its own (ca.pem); of a day."
    import trustme
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(FOLDER / "ca.pem"))
    ours = authority.issue_cert("localhost", "127.0.0.1")
    ours.private_key_and_cert_chain_pem.write_to_path(str(FOLDER / "server.pem"))
    return str(FOLDER / "server.pem"), str(FOLDER / "server.pem")


def main():
    os.chdir(FOLDER)                                    # where Sail keeps the tables
    sail = SparkConnectServer("127.0.0.1", 0)
    sail.start(background=True)
    port = sail.listening_address[1]
    catalog = Catalog(port)
    server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)])
    server.add_generic_rpc_handlers((Gateway(port, catalog),))
    plain = server.add_insecure_port("127.0.0.1:0")
    server.start()
    Rest.catalog = catalog
    rest = ThreadingHTTPServer(("127.0.0.1", 0), Rest)
    threading.Thread(target=rest.serve_forever, daemon=True).start()
    def told(front_port):
        ready, host = FOLDER / "workspace.tmp", f"https://localhost:{front_port}" if SECURE else f"http://127.0.0.1:{front_port}"
        Rest.address = host
        ready.write_text(json.dumps(dict(host=host, spark=f"sc://127.0.0.1:{plain}", token=TOKEN)))
        ready.rename(FOLDER / "workspace.json")
    if SECURE: asyncio.run(front(*certificate(), plain, rest.server_port, told))
    told(rest.server_port)
    threading.Event().wait()


if __name__ == "__main__": main()
