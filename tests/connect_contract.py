"""What the stages ask of a `DatabricksWorkspace`, check by check: `python connect_contract.py FOLDER` prints a line of JSON for each.

It runs in an environment of its own, where nothing of the project is but its wheel, against whatever workspace that
environment names: the one of tests/sail_workspace.py, or a real one. FOLDER holds settings.ini. Where CONTRACT_RULES names
the rules of the former, what a workspace refuses is tried, too.
"""
import contextlib, gc, json, logging, os, sys, tempfile, time, traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pandas as pd

from llmops_ref.core.config import SettingsError, load_config
from llmops_ref.core.connect import UnityError
from llmops_ref.core.files import DataError
from llmops_ref.core.tables import Changes, Tables
from llmops_ref.core.workspace import open_workspace

RULES = os.environ.get("CONTRACT_RULES")
PREFIX = f"contract_{os.urandom(4).hex()}_"             # several may check one workspace
NOON = pd.Timestamp("2026-03-29T12:34:56.789012Z")
made = []


def name(table): made.append(PREFIX + table); return PREFIX + table


def same(there: pd.DataFrame, here: pd.DataFrame, by: str):
    "Equal to the letter, types too; the order of rows is no content."
    there, here = (frame.sort_values(by, ignore_index=True) for frame in (there, here))
    pd.testing.assert_frame_equal(there, here)


@contextlib.contextmanager
def expect(kind, *says):
    try: yield
    except kind as error:
        assert type(error) is kind and all(word in str(error) for word in says), f"{type(error).__name__}: {error}"
        assert "\n" not in str(error) and len(str(error)) < 900, str(error)
    else: raise AssertionError(f"no {kind.__name__} was raised")


@contextlib.contextmanager
def rule(**rules):
    Path(RULES).write_text(json.dumps(rules))
    try: yield
    finally: Path(RULES).unlink()


# --- what comes back is what was written

def check_times_come_back_in_utc(ws, here):
    table = name("requests")
    ws.add(table, pd.DataFrame(dict(trace_id=["t1", "t2"], time=[NOON, NOON - pd.Timedelta(days=1)])), "trace_id")
    with zone(ws, "Asia/Tokyo"): rows = ws.read(table)
    assert str(rows.time.dt.tz) == "UTC" and rows.time.max() == NOON
    assert min(rows.time.max(), pd.Timestamp.now(tz="UTC")) - pd.Timedelta(days=1)              # as `collect_requests` says it


def check_a_time_in_the_hour_that_clocks_repeat(ws, here):
    table, twice = name("clocks"), [pd.Timestamp("2026-10-25T00:30Z"), pd.Timestamp("2026-10-25T01:30Z")]
    with zone(ws, "Europe/Berlin"):
        ws.write(table, pd.DataFrame(dict(id=["a", "b"], time=twice)))
        assert ws.read(table).sort_values("id").time.tolist() == twice


@contextlib.contextmanager
def zone(ws, name):
    try: before = ws.spark.conf.get("spark.sql.session.timeZone")
    except Exception: before = "UTC"
    ws.spark.conf.set("spark.sql.session.timeZone", name)
    try: yield
    finally: ws.spark.conf.set("spark.sql.session.timeZone", before)


FRAMES = dict(
    documents=pd.DataFrame(dict(id=["a", "b"], package=["p", "p"], text=["x", "ünïcode \U0001f600"], words=[1, 2], digest=["1", "2"])),
    chunks=pd.DataFrame(dict(id=["a", "b"], position=[0, 1], text=["it's", 'a "quote"'], digest=["1", "2"])),
    questions=pd.DataFrame(dict(id=["q1", "q2"], question=["How?", "Why?"], gold=[["a", "b"], []], reviewed=[True, False], split=["train", "test"])),
    unanswerable=pd.DataFrame(dict(id=["q3"], gold=[[]], note=[None])),
    vectors=pd.DataFrame(dict(id=["a", "b"], vector=[[0.5, 0.25], [1.0, -1.0]])),
    requests=pd.DataFrame(
        dict(id=["t1", "t2"], time=[NOON, NOON], refused=[False, True], passages=[["a"], []], grounded=[0.5, None], invented=[None, None],
             prompt_tokens=[3, 0], seconds=[0.25, 1.0], user=["", "u"])
    ).astype(dict(grounded=float, invented=float)),
    votes=pd.DataFrame(dict(id=["f1"], time=[NOON], good=[True], reason=[""], comment=["line\nline"], source=["user"])),
)


def check_frames_of_the_stages_come_back_as_on_a_laptop(ws, here):
    for noun, frame in FRAMES.items():
        table = name(noun)
        ws.write(table, frame), here.write(table, frame if noun != "unanswerable" else frame.assign(note=pd.array([None], "string"), gold=[["x"]]))
        if noun == "unanswerable": continue                                     # the library of a laptop refuses a column of nothing
        same(ws.read(table), here.read(table), "id")
    rows = ws.read(PREFIX + "unanswerable")
    assert rows.note.isna().all() and rows.gold.map(len).tolist() == [0]


def check_frames_without_rows(ws, here):
    table = name("empty")
    ws.write(table, FRAMES["votes"][:0])
    rows = ws.read(table)
    assert len(rows) == 0 and rows.columns.tolist() == FRAMES["votes"].columns.tolist() and str(rows.time.dt.tz) == "UTC"
    ws.write(table, FRAMES["votes"], mode="append")
    same(ws.read(table), FRAMES["votes"].assign(time=FRAMES["votes"].time.astype("datetime64[us, UTC]")), "id")
    nothing = name("nothing_known")
    ws.write(nothing, pd.DataFrame(dict(id=[], said=[])))
    assert ws.read(nothing).columns.tolist() == ["id", "said"]
    assert ws.add(name("never_made"), pd.DataFrame(dict(id=[])), "id") == 0 and ws.current(f"table:{PREFIX}never_made") is None


def check_a_column_of_nothing_takes_the_type_that_is_there(ws, here):
    table = name("grounded")
    ws.add(table, pd.DataFrame(dict(id=["a"], grounded=[0.5])), "id")
    ws.add(table, pd.DataFrame(dict(id=["b"], grounded=[None])), "id")
    ws.write(table, pd.DataFrame(dict(id=["c"], grounded=[None])), mode="append")
    assert str(ws.read(table).grounded.dtype) == "float64" and ws.read(table).grounded.count() == 1


# --- the books, merges, rows one by one

def check_versions_and_books(ws, here):
    table = name("books")
    assert [ws.write(table, pd.DataFrame(dict(title=["Emma"]))) for _ in range(2)] == ["0", "1"]
    assert ws.write(table, pd.DataFrame(dict(pages=[474]))) == "2" and ws.read(table).columns.tolist() == ["pages"]
    assert ws.reads[f"table:{table}"] == ws.writes[f"table:{table}"] == ws.current(f"table:{table}") == "2"
    assert ws.changes_since(table, "1") is None


def check_merge(ws, here):
    table, rows = name("merged"), pd.DataFrame(dict(id=["a", "b", "c"], digest=["1", "2", "3"]))
    for side in (ws, here):
        assert str(side.merge(table, rows)) == "3 new" and str(side.merge(table, rows)) == "nothing changed"
        assert side.table_version(table) == "0", "nothing changed is no commit"
        assert str(side.merge(table, rows.assign(digest=["1", "9", "3"])[1:])) == "1 changed, 1 gone"
        assert side.changes_since(table, "0") == Changes(changed=1, gone=1), side.changes_since(table, "0")
        assert str(side.merge(table, rows.assign(words=1))) == "3 new", "other columns: written anew"
        assert str(side.merge(table, pd.DataFrame(dict(id=[], digest=[], words=[])))) == "3 gone" and len(side.read(table)) == 0
        assert str(side.merge(table, rows.assign(words=2))) == "3 new"
        with expect(DataError, "more than once"): side.merge(table, rows.assign(id="a", words=2))
    same(ws.read(table), here.read(table), "id")


def check_merge_of_lists_and_digests_of_rows(ws, here):
    table, rows = name("lists"), pd.DataFrame(dict(id=["a", "b"], parts=[["x"], ["y", "z"]]))
    ws.merge(table, rows)
    assert str(ws.merge(table, ws.read(table).drop(columns="digest"))) == "nothing changed"
    assert str(ws.merge(table, rows.assign(parts=[["x"], ["y"]]))) == "1 changed"


def check_add(ws, here):
    table, votes = name("added"), pd.DataFrame(dict(id=["t1", "t1", "t2"], vote=["up", "up", "down"]))
    for side in (ws, here):
        assert [side.add(table, votes, "id"), side.add(table, votes, "id")] == [2, 0]
        assert side.add(table, pd.DataFrame(dict(id=["t3"], vote=["up"], comment=["thanks"])), "id") == 1, "a column more"
        assert side.add(table, pd.DataFrame(dict(id=["t4"])), "id") == 1, "two columns less"
        with expect(DataError, "holds text, and these rows have numbers"): side.add(table, pd.DataFrame(dict(id=[6], vote=["up"])), "id")
    same(ws.read(table).fillna(""), here.read(table).fillna(""), "id")


def check_two_that_add_the_same(ws, here):
    table, rows = name("race"), pd.DataFrame(dict(id=["a", "b"], vote=["up", "up"]))
    with ThreadPoolExecutor(2) as pool: added = sorted(pool.map(lambda _: ws.add(table, rows, "id"), range(2)))
    assert len(ws.read(table)) == 2 and sum(added) == 2, added


# --- Spark itself

def check_spark_frames(ws, here):
    table, copy = name("first"), name("copied")
    ws.write(table, pd.DataFrame(dict(document_id=["a", "b"], position=[0, 0], text=["x", "y"])))
    chunks = ws.read_spark(table).where("position = 0")
    assert chunks.where(chunks.document_id.isin(["a"])).select("document_id", "text").toPandas().text.tolist() == ["x"]     # examples.py
    assert ws.write(copy, ws.read_spark(table)) == "0" and len(ws.read(copy)) == 2


def check_work_on_rows(ws, here):
    from llmops_ref.documents.folder import DOCUMENT_SCHEMA, read_batches
    folder, heard = Path(tempfile.mkdtemp(dir=os.environ.get("CONTRACT_SHARED"))), []
    for n in range(5): (folder / f"page{n}.md").write_text(f"# Page {n}\n\nIt says {n}.")
    files = pd.DataFrame(dict(path=[str(file) for file in sorted(folder.glob("*.md"))], root=str(folder)))
    handler = type("Handler", (logging.Handler,), dict(emit=lambda self, record: heard.append(record.getMessage())))()
    logging.getLogger("llmops_ref.core.unity").addHandler(handler)
    rows = ws.map_batches(files, read_batches, DOCUMENT_SCHEMA)
    logging.getLogger("llmops_ref.core.unity").removeHandler(handler)
    assert sorted(rows.id) == [f"page{n}.md" for n in range(5)] and str(rows.words.dtype) == "int64" and (rows.problem == "").all()
    assert ws.map_batches(files[:0], read_batches, DOCUMENT_SCHEMA).columns.tolist() == rows.columns.tolist()
    return heard


def check_functions_by_value(ws, here):
    def shout(frames):
        for frame in frames: yield frame.assign(text=frame.text.str.upper())[["text"]]
    shout.__module__ = "__main__"
    assert sorted(ws.map_batches(pd.DataFrame(dict(text=["a", "b"])), shout, "text string").text) == ["A", "B"]


# --- without Spark, as in an App

@contextlib.contextmanager
def through_a_warehouse(ws):
    with mock.patch.dict(os.environ, {"DATABRICKS_WAREHOUSE_ID": os.environ.get("CONTRACT_WAREHOUSE", "a1b2c3d4e5f6")}):
        other = open_workspace(ws.config)
        assert type(other.statements).__name__ == "WarehouseStatements"
        other.statements.pause = 0.05
        yield other


def check_a_warehouse_reads_the_same(ws, here):
    if not RULES and "CONTRACT_WAREHOUSE" not in os.environ: return "CONTRACT_WAREHOUSE names none"
    with through_a_warehouse(ws) as app:
        for noun, frame in FRAMES.items():
            if noun not in ("questions", "requests", "vectors"): continue
            table = name(f"app_{noun}")
            ws.write(table, frame)
            same(app.read(table), ws.read(table), "id")
            ws.write(table, frame[:0])
            same(app.read(table), ws.read(table), "id")
            assert app.reads == {f"table:{name}": "1" for name in [table]} | app.reads and app.current(f"table:{table}") == "1"
        with expect(DataError, "does not exist"): app.read(PREFIX + "nowhere")
        assert app.current(f"table:{PREFIX}nowhere") is None
        with expect(UnityError, "only a SQL warehouse is there"): app.map_batches(pd.DataFrame(dict(id=["a"])), list, "id string")


def check_a_warehouse_adds_and_merges(ws, here):
    if not RULES and "CONTRACT_WAREHOUSE" not in os.environ: return "CONTRACT_WAREHOUSE names none"
    table, rows = name("app_votes"), FRAMES["votes"].assign(comment=["it's \"quoted\"; DROP TABLE x --"], uses=[["a", "b"]])
    with through_a_warehouse(ws) as app:
        assert [app.add(table, rows, "id"), app.add(table, rows, "id")] == [1, 0]
        assert app.add(table, rows.assign(id="f2", weight=0.5, time=[None]), "id") == 1
        with expect(DataError, "holds text, and these rows have numbers"): app.add(table, pd.DataFrame(dict(id=[6])), "id")
        there = ws.read(table).sort_values("id", ignore_index=True)
        assert there.time[0] == NOON and there.comment[0] == rows.comment[0] and list(there.uses[0]) == ["a", "b"] and there.weight[1] == 0.5
        merged = name("app_merged")
        ws.merge(merged, pd.DataFrame(dict(id=["a", "b"], digest=["1", "2"])))
        assert str(app.merge(merged, pd.DataFrame(dict(id=["b", "c"], digest=["3", "4"])))) == "1 new, 1 changed, 1 gone"
        if RULES:
            with refusing("INSUFFICIENT_PERMISSIONS", "User does not have MODIFY on Table.", on="MERGE"):
                with expect(UnityError, "GRANT USE SCHEMA, SELECT, MODIFY"): app.add(table, rows.assign(id="f3"), "id")
        with mock.patch.dict(os.environ, DATABRICKS_WAREHOUSE_ID="gone" if RULES else "0000000000000000"):
            with expect(UnityError, "The SQL warehouse of DATABRICKS_WAREHOUSE_ID is not there"): open_workspace(ws.config).read(table)


# --- what is missing

def check_a_table_that_is_not_there(ws, here):
    for ask in (ws.read, ws.read_spark, ws.table_version):
        with expect(DataError, PREFIX + "nowhere", "does not exist. Run the stages before this one."): ask(PREFIX + "nowhere")
    assert ws.current(f"table:{PREFIX}nowhere") is None and not ws._is_there(PREFIX + "nowhere")
    with expect(DataError, "`team`.`wiki`.`pages`") if not RULES else expect(DataError, "pages"): ws.read("team.wiki.pages")


def check_secrets(ws, here):
    if not RULES: return "a real workspace has secrets of its own"
    with rule(secrets=dict(llmops=dict(KEY="grün", LOCKED=None))):
        assert ws.secret("KEY") == "grün"
        with expect(SettingsError, "The secret OTHER is not in the scope 'llmops'", "databricks secrets put-secret llmops OTHER"): ws.secret("OTHER")
        with expect(SettingsError, "We may not read the secret LOCKED"): ws.secret("LOCKED")
    with mock.patch.dict(os.environ, DATABRICKS_TOKEN=""), expect(UnityError, "give DATABRICKS_HOST and DATABRICKS_TOKEN"): ws.secret("KEY")
    with rule(secrets={}), expect(SettingsError, "is not in the scope 'llmops'"): ws.secret("KEY")


def refusing(condition, message, on="DESCRIBE HISTORY|SELECT", code="INTERNAL", **more):
    return rule(refuse=[dict(on=on, code=code, condition=condition, message=f"[{condition}] {message}") | more])


def check_what_a_workspace_refuses(ws, here):
    if not RULES: return "a real workspace refuses what it refuses"
    table = name("refused")
    ws.write(table, pd.DataFrame(dict(id=["a"])))
    with refusing("INSUFFICIENT_PERMISSIONS", "User does not have SELECT on Table."):
        with expect(UnityError, table, "GRANT USE SCHEMA, SELECT, MODIFY"): ws.read(table)
        with expect(UnityError, "A right is missing"): ws.current(f"table:{table}")          # and not None, as if it were not there
        with expect(UnityError, "A right is missing"): ws.add(table, pd.DataFrame(dict(id=["b"])), "id")
    with refusing("SCHEMA_NOT_FOUND", "The schema cannot be found."):
        with expect(UnityError, "databricks bundle deploy -t dev"): ws.read(table)
    with refusing("NO_SUCH_CATALOG_EXCEPTION", "Catalog 'llmops_dev' was not found."):
        with expect(UnityError, "The catalog llmops_dev is not there"): ws.read(table)
    with refusing("QUOTA_EXCEEDED", "Too many."), expect(UnityError, "A limit of the workspace is reached"): ws.read(table)
    with refusing("SOMETHING_NEW", "Nobody knows."), expect(UnityError, "We could not read the table", "SOMETHING_NEW"): ws.read(table)
    assert ws.read(table).id.tolist() == ["a"]


def check_somebody_else_commits(ws, here):
    if not RULES: return "not to be provoked"
    table = name("conflict")
    ws.add(table, pd.DataFrame(dict(id=["a"])), "id")
    with refusing("DELTA_CONCURRENT_APPEND", "ConcurrentAppendException: Files were added.", on="MERGE", times=2):
        assert ws.add(table, pd.DataFrame(dict(id=["b"])), "id") == 1
    no_wait = mock.patch("llmops_ref.core.connect.time", SimpleNamespace(sleep=lambda seconds: None))
    with no_wait, refusing("DELTA_CONCURRENT_APPEND", "ConcurrentAppendException: Files were added.", on="MERGE", times=9):
        with expect(DataError, table, "somebody else wrote at the same moment"): ws.add(table, pd.DataFrame(dict(id=["c"])), "id")
    assert sorted(ws.read(table).id) == ["a", "b"]


def check_a_session_that_is_over(ws, here):
    if not RULES: return "not to be provoked"
    table = name("long_stage")
    ws.write(table, pd.DataFrame(dict(id=["a"])))
    for ask in (lambda: ws.read(table), lambda: ws.write(table, pd.DataFrame(dict(id=["b"])), mode="append"), lambda: ws.merge(table, FRAMES["chunks"])):
        before = ws.spark.session_id
        with rule(over=[before]): ask()
        assert ws.spark.session_id != before
    assert len(ws.read(table)) == 2


def check_a_token_that_ends_in_the_middle(ws, here):
    if not RULES or not os.environ.get("DATABRICKS_HOST", "").startswith("https"): return "no token is asked for"
    table = name("token")
    ws.write(table, pd.DataFrame(dict(id=["a"])))
    with rule(tokens=[]):
        for ask in (lambda: ws.read(table), lambda: ws.write(table, pd.DataFrame(dict(id=["b"]))), lambda: ws.add(table, FRAMES["chunks"], "id"), lambda: ws.secret("KEY")):
            with expect(UnityError, "a token is missing or has ended", "databricks auth login") if ask.__code__.co_names[-1] != "secret" else contextlib.suppress(SettingsError): ask()
    assert ws.read(table).id.tolist() == ["a"], "what was there is there"


def check_how_a_session_is_opened(ws, here):
    "Serverless whatever DATABRICKS_CLUSTER_ID says where the runtime is a client's, a cluster where it is not; what the server was told."
    if not os.environ.get("DATABRICKS_HOST", "").startswith("https"): return "needs Databricks Connect"
    from llmops_ref.core.connect import open_session
    def opened(**environ):
        before = dict(os.environ)
        os.environ |= environ
        try: return open_session(ws.config, anew=True).sql("SELECT 1 AS one").toArrow().to_pylist() and told()
        finally: os.environ.clear(); os.environ.update(before)
    def told(): return json.loads(Path(RULES).with_name("asked.jsonl").read_text().splitlines()[-1])
    if not RULES: return "its cluster is not ours"
    cluster = "1130-101112-abcdefgh"
    serverless = opened(DATABRICKS_RUNTIME_VERSION="client.5.1", DATABRICKS_CLUSTER_ID=cluster)
    assert serverless["session"] and not serverless["cluster"], serverless
    assert opened(DATABRICKS_RUNTIME_VERSION="17.3", DATABRICKS_CLUSTER_ID=cluster)["cluster"] == cluster
    assert opened(DATABRICKS_CLUSTER_ID=cluster)["cluster"] == cluster
    with expect(UnityError, "The cluster of DATABRICKS_CLUSTER_ID is not there"): opened(DATABRICKS_CLUSTER_ID="gone")
    with rule(runtime="16.4.x-scala2.12"), expect(UnityError, "databricks-connect is newer than the workspace's Spark"): opened()
    with expect(UnityError, "cannot be reached"): opened(DATABRICKS_HOST="https://localhost:9")
    with expect(UnityError, "DATABRICKS_HOST and DATABRICKS_TOKEN"): opened(DATABRICKS_TOKEN="")
    return serverless


def main(folder):
    home = Path(tempfile.mkdtemp())
    names = {key: os.environ[f"CONTRACT_{key.upper()}"] for key in ("catalog", "schema") if f"CONTRACT_{key.upper()}" in os.environ}
    names = dict(catalog="llmops_dev", schema="reference") | names
    ws = open_workspace(load_config("dev", folder, platform="databricks", store="/Volumes/x/y/z", **names))
    here = Tables(load_config("dev", folder, platform="local", store=str(home), **names))
    for check in [value for key, value in globals().items() if key.startswith("check_")]:
        begun = time.monotonic()
        try: said = dict(ok=True, facts=check(ws, here))
        except Exception: said = dict(ok=False, facts=traceback.format_exc()[-3000:])
        print(json.dumps(dict(check=check.__name__, seconds=round(time.monotonic() - begun, 2)) | said), flush=True)
    gc.collect()                                        # a session that was replaced and is collected has locked the client up
    for table in dict.fromkeys(made):
        with contextlib.suppress(Exception): ws.spark.sql(f"DROP TABLE IF EXISTS {ws._name(table)}").collect()


if __name__ == "__main__": main(sys.argv[1])
