"""The chat page: its server over HTTP, and the page in a real browser, with a host that says what it is told to and real traces."""
import json, os, re, shutil, threading, time

import httpx
import pandas as pd
import pytest
import uvicorn
from starlette.testclient import TestClient

from conftest import ROOT
from llmops_ref.feedback.chat import AT_ONCE, HEADERS, PAGE, champion_host, chat_app, example_questions
from llmops_ref.core.config import load_config
from llmops_ref.core.services import stop_services
from llmops_ref.core.workspace import open_workspace

SCRIPT = "<img src=x onerror=\"document.title='broken in'\"><script>document.title='broken in'</script>"
ME = dict(session="a-test-session")
GOOD = "Use `mlflow.log_metric` [1]. It logs one value under a key, at a step if you give one [1, 2]."


@pytest.fixture(scope="module")
def ws(tmp_path_factory):
    "A real store of its own, with the documents and questions that a review looks at."
    ws = open_workspace(load_config("dev", ROOT, store=str(tmp_path_factory.mktemp("chat"))))
    ws.write("documents", pd.DataFrame(dict(id=["mlflow.log_metric", "mlflow.log_metrics", "mlflow.log_param"])))
    ws.write(
        "questions",
        pd.DataFrame(
            dict(
                id=["q1", "q2"], question=["How do I log several metrics at once?", "How do I log a parameter of a run?"],
                type="howto", gold=[["mlflow.log_metrics"], ["mlflow.log_param"]], answer="", split=["test", "train"],
            )
        ),
    )
    ws.mlflow()
    return ws


class Teller:
    "A host that answers as it is told: `pieces` are strings to send, events to wait for, or an error to raise."
    def __init__(self, ws): self.ws, self.pieces, self.closed, self.asked = ws, [GOOD], threading.Event(), []

    def stream(self, question, version=None, inputs=None):
        self.closed.clear()
        self.asked.append((question, inputs))
        try:
            sent = ""
            for piece in list(self.pieces):
                if isinstance(piece, Exception): raise piece
                if isinstance(piece, threading.Event): piece.wait(20)
                else:
                    yield piece
                    sent += piece
            yield self.facts(question, sent)
        finally: self.closed.set()

    def facts(self, question, answer):
        passages = [
            dict(
                number=1, document_id="mlflow.log_metric", heading="Summary", similarity=0.73,
                text="mlflow.log_metric(key, value, step=None)\nLog a metric under the current run. " + SCRIPT,
            ),
            dict(
                number=2, document_id="mlflow.log_metrics", heading="Args", similarity=0.55,
                text="mlflow.log_metrics(metrics, step=None)\nArgs:\n    metrics: Dictionary of metric name to value.",
            ),
        ]
        facts = dict(
            citations=[1, 2], refused=False, passages=passages, version="7", app="self_hosted",
            served_by="SmolLM2-135M-Instruct.Q8_0 + adapter", seconds=1.08, first_token_seconds=0.31, prompt_tokens=277,
            completion_tokens=32, cost_usd=2.99e-05,
        )
        mlflow = self.ws.mlflow()
        with mlflow.start_span("predict", "AGENT") as root:
            root.set_inputs(dict(request=dict(input=[dict(role="user", content=question)])))
            for name, kind, seconds in (
                ("read", "CHAIN", 0), ("IndexRetriever", "RETRIEVER", 0.01), ("prompt", "CHAIN", 0), ("Chat", "CHAT_MODEL", 0.04),
                ("check", "CHAIN", 0),
            ):
                with mlflow.start_span(name, kind): time.sleep(seconds)
            facts["trace_id"] = root.trace_id
            root.set_outputs(dict(output=[dict(content=[dict(text=answer)])], custom_outputs=facts))
        return facts | dict(answer=answer)


@pytest.fixture
def host(ws): return Teller(ws)


@pytest.fixture
def app(ws, host): return chat_app(ws, host, ["How do I log a metric?", "What is a run?"])


@pytest.fixture
def client(app): return TestClient(app)


@pytest.fixture
def served(app):
    "The application behind a real server; gives its address."
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started: time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def events(text):
    return [
        (lines[0].removeprefix("event: "), json.loads(lines[1].removeprefix("data: ")))
        for lines in (block.split("\n") for block in text.split("\n\n") if block)
    ]


def ask(client, question="How do I log a metric?", **said):
    return events(
        client.post("/api/ask", content=json.dumps(ME | dict(question=question) | said), headers={"content-type": "application/json"}).text
    )


def votes(ws): return ws.read("feedback") if ws.current("table:feedback") else pd.DataFrame(columns=["trace_id", "event_id"])


# --- the server

def test_files_and_headers(client):
    for name in PAGE:
        answer = client.get(f"/{name}")
        assert answer.status_code == 200 and all(answer.headers[key] == value for key, value in HEADERS.items()), name
        outside = [
            word
            for word in answer.text.replace("http://www.w3.org/2000/svg", "").split()
            if "http://" in word or "https://" in word or "//cdn" in word
        ]
        assert not outside, outside
    assert (
        "innerHTML" not in client.get("/chat.js").text and "style=" not in client.get("/").text and "onclick=" not in client.get("/").text
    )
    for missing in ("/app.py", "/../app.py", "/%2e%2e/app.py", "/page/index.html"):
        refused = client.get(missing)
        assert refused.status_code == 404 and refused.headers["content-security-policy"], missing
    assert client.get("/api/info").json()["questions"] == ["How do I log a metric?", "What is a run?"]


def test_an_answer_in_pieces(client, host):
    host.pieces = ["Use ", "`mlflow.log_metric`", " [1]."]
    *pieces, (last, facts) = ask(client, "How? \ud800 " + SCRIPT)
    assert [p for _, p in pieces] == host.pieces and last == "facts" and facts["answer"] == "Use `mlflow.log_metric` [1]."
    question, inputs = host.asked[0]
    assert question == "How? ? " + SCRIPT and inputs == dict(user="session-a-test-session")


@pytest.mark.parametrize(
    "said",
    [
        dict(question="  "), dict(question=["a", "list"]), dict(question="y" * 4001),
        dict(question="Who am I?", session=""), dict(question="Who am I?", session="<b>"),
    ],
)
def test_what_is_no_question(client, host, said):
    refused = client.post("/api/ask", json=ME | said)
    assert refused.status_code == 400 and refused.json()["error"].endswith((".", "?")) and not host.asked


JSON = {"content-type": "application/json"}

@pytest.mark.parametrize(
    "status, content, headers",
    [
        (400, b'["no", "object"]', {}), (400, b"[" * 60_000, {}), (400, b"{", {}), (400, b"\xff\xfe", {}),
        (413, b'{"question": "' + b"y" * 70_000 + b'"}', {}),
        (415, b"question=How", {"content-type": "application/x-www-form-urlencoded"}),
        (415, b'{"question": "How?"}', {"content-type": "text/plain"}),
        (403, b"{}", {"origin": "https://evil.example"}), (403, b"{}", {"origin": "null"}),
        (403, b"{}", {"sec-fetch-site": "cross-site"}), (403, b"{}", {"sec-fetch-site": "same-site"}),
    ],
)
@pytest.mark.parametrize("path", ["/api/ask", "/api/vote", "/api/review"])
def test_what_is_refused(client, host, path, status, content, headers):
    for body in (
        content,
        iter([content[i : i + 1000] for i in range(0, len(content), 1000)]),
    ): # with its length, and in pieces that do not say it
        refused = client.post(path, content=body, headers=JSON | headers)
        assert refused.status_code == status and refused.json()["error"].endswith(".") and not host.asked


def test_other_names_of_the_server(ws, host):
    "A page elsewhere whose name resolves to this machine gets nothing."
    mine = TestClient(chat_app(ws, host, names=("127.0.0.1", "localhost")), base_url="http://localhost:8080")
    assert mine.get("/").status_code == 200 and mine.get("/", headers={"host": "evil.example:8080"}).status_code == 400


def test_a_stream_that_breaks(client, host, caplog):
    from llmops_ref.core.files import DataError
    host.pieces = ["Use", DataError("The endpoint ended it in the middle.")]
    assert ask(client) == [("piece", "Use"), ("failed", "The endpoint ended it in the middle.")]
    host.pieces = ["Use", RuntimeError("/secret/path")]
    assert "secret" not in str(ask(client)[-1]) and "/secret/path" in caplog.text, "for the log, not for browsers"
    assert client.app.state.chat.running == 0


def test_a_client_that_goes_away(served, app, host):
    "The generator is closed, and nothing is left over."
    before = threading.active_count()
    for pieces in (["a "] * 100_000, ["a ", threading.Event()]):       # while it is sent, and while it is waited for
        host.pieces = pieces
        with httpx.stream("POST", f"{served}/api/ask", json=ME | dict(question="How?"), timeout=10) as response: next(response.iter_text())
        if isinstance(pieces[-1], threading.Event): pieces[-1].set()
        assert host.closed.wait(10)
    for _ in range(100):
        if app.state.chat.running == 0: break
        time.sleep(0.05)
    assert app.state.chat.running == 0 and threading.active_count() <= before + 8


def test_more_than_it_can_answer(client, app):
    app.state.chat.running = AT_ONCE
    refused = client.post("/api/ask", json=ME | dict(question="How?"))
    assert refused.status_code == 503 and "in a moment" in refused.json()["error"]


def test_votes(client, ws):
    trace_id = ask(client)[-1][1]["trace_id"]
    vote = ME | dict(
        trace_id=trace_id, good=False, reason="wrong", comment=SCRIPT, correction="Use `mlflow.log_metric`.", event_id="event-1"
    )
    together = [threading.Thread(target=client.post, args=("/api/vote",), kwargs=dict(json=vote)) for _ in range(3)]
    for t in together: t.start()
    for t in together: t.join()
    rows = votes(ws)[lambda f: f.trace_id == trace_id]
    assert len(rows) == 1, "the same event is one vote"
    assert (rows.good.item(), rows.reason.item(), rows.comment.item(), rows.correction.item(), rows.source.item()) == (
        False, "wrong", SCRIPT, "Use `mlflow.log_metric`.", "session-a-test-session",
    )
    assert client.post("/api/vote", json=vote | dict(good=True, event_id="event-2")).status_code == 200, "people change their minds"
    other = client.post("/api/vote", json=vote | dict(session="another-session"))
    assert other.status_code == 403 and "somebody else" in other.json()["error"]
    for wrong, status in (
        (dict(good="yes"), 400), (dict(reason="no such"), 400), (dict(comment="y" * 2001), 400),
        (dict(trace_id="tr-nothing"), 422),
    ):
        assert client.post("/api/vote", json=vote | wrong | dict(event_id="event-3")).status_code == status, wrong
    assert len(votes(ws)[lambda f: f.trace_id == trace_id]) == 2


def test_a_trace(client):
    trace = client.get(f"/api/trace/{ask(client)[-1][1]['trace_id']}").json()
    assert [s["name"] for s in trace["steps"]] == [
        "Read the question", "Search", "Fill in the prompt", "Write the answer", "Check citations",
    ]
    assert trace["complete"] and all(0 <= s["at"] and s["at"] + s["seconds"] <= trace["seconds"] + 1e-6 for s in trace["steps"])
    missing = client.get("/api/trace/tr-none")
    assert missing.status_code == 404 and "look again" in missing.json()["error"]


def test_users_of_an_app(client, ws, host, monkeypatch):
    "The name in the header counts on Databricks Apps, and nowhere else."
    header = {"x-forwarded-email": "ana@example.com"}
    client.post("/api/ask", json=ME | dict(question="How?"), headers=header)
    assert host.asked[-1][1] == dict(user="session-a-test-session") and client.get("/api/info", headers=header).json()["user"] == ""
    monkeypatch.setenv("DATABRICKS_APP_NAME", "assistant")
    client.post(
        "/api/ask",
        json=dict(question="How?"),
        headers=header | {"origin": "https://app.example", "x-forwarded-host": "app.example", "sec-fetch-site": "same-origin"},
    )
    assert host.asked[-1][1] == dict(user="ana@example.com") and client.get("/api/info", headers=header).json()["user"] == "ana@example.com"
    assert client.post("/api/ask", json=ME | dict(question="How?")).status_code == 401
    few = TestClient(chat_app(ws, host, reviewers=["bo@example.com"]))
    assert (
        few.get("/api/reviews", headers=header).status_code == 403
        and few.get("/api/reviews", headers={"x-forwarded-email": "bo@example.com"}).status_code == 200
    )


def test_example_questions(ws): assert example_questions(ws) == ["How do I log a parameter of a run?"], "none of the test split"


# --- the page, in a browser

@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright (pip install playwright)")
    if not (program := shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")):
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    options = [
        "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync",
    ]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, headless=True, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, served):
    "The page, open; afterwards nothing went elsewhere, nothing ran that should not, no error was left in the console."
    context = chromium.new_context(viewport=dict(width=1000, height=800))
    page, requests, problems = context.new_page(), [], []
    page.on("request", lambda r: requests.append(r.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" and not m.text.startswith("Failed to load") else None)
    page.set_default_timeout(10_000)
    page.goto(served)
    page.wait_for_selector("#examples button")
    yield page
    assert not [url for url in requests if not url.startswith((served, "data:"))]
    assert not problems and "broken in" not in page.title()
    context.close()


def say(page, text):
    page.fill("#question", text)
    page.press("#question", "Enter")


def said(page): return page.locator(".turn").last.locator(".said")


def until(page, holds):                             # the page's policy forbids Playwright's own way to wait, which is `eval`
    for _ in range(200):
        if holds(): return
        page.wait_for_timeout(50)
    raise AssertionError("it did not come to that")


def wide(page): return page.evaluate("document.documentElement.scrollWidth > innerWidth")


def test_ask_check_and_vote(page, host, ws):
    go = threading.Event()
    host.pieces = ["Use `mlflow.log", go, "_metric` [1]. "]
    say(page, "How do I log a metric? " + SCRIPT)
    until(page, lambda: "mlflow.log" in said(page).text_content())
    assert (
        said(page).locator("code").text_content() == "mlflow.log"
        and said(page).get_attribute("aria-busy") == "true"
        and page.is_visible("#stop")
        and not page.is_visible("#send")
    )
    assert page.text_content(".asked") == "How do I log a metric? " + SCRIPT, "a script is text"
    go.set()
    page.click(".cite:enabled")
    assert said(page).locator("code").text_content() == "mlflow.log_metric" and said(page).get_attribute("aria-busy") == "false"
    passage = page.locator(".passage.open")
    assert "mlflow.log_metric" in passage.text_content() and SCRIPT in passage.text_content() and "0.73" in passage.text_content()
    page.keyboard.press("Escape")
    assert not page.is_visible(".passages") and page.evaluate("document.activeElement.className") == "cite", "back where it was opened"

    page.click(".to-steps")
    page.wait_for_selector(".bars li")
    assert page.locator(".bars li").count() == 5 and "277 + 32" in page.text_content(".steps") and "$0.00003" in page.text_content(".steps")

    page.dblclick(".down")
    assert page.is_visible(".vote")
    page.click(".reasons label:has-text('It is wrong')")
    until(page, lambda: len(votes(ws)[lambda f: f.trace_id == page.locator(".steps code").text_content()]) == 1)
    page.fill(".vote .comment", SCRIPT)
    page.fill(".vote .correction", "Use `mlflow.log_metric`; it logs one value.")
    page.click(".vote .primary")
    page.wait_for_selector(".thanks:not([hidden])")
    assert "Thank you" in page.text_content(".thanks")
    rows = votes(ws)[lambda f: f.trace_id == page.locator(".steps code").text_content()]
    assert list(rows.good) == [False, False], "the click, and what was said of it"
    last = rows.sort_values("time").iloc[-1]
    assert (last.reason, last.comment, last.correction) == ("wrong", SCRIPT, "Use `mlflow.log_metric`; it logs one value.")
    page.click(".up")
    until(page, lambda: page.get_attribute(".up", "aria-pressed") == "true")
    assert page.get_attribute(".down", "aria-pressed") == "false"


def test_scripts_in_an_answer(page, host):
    host.pieces = [SCRIPT, " `", SCRIPT, "` **" + SCRIPT + "** [1]"]
    say(page, "Break in")
    page.wait_for_selector(".under:not([hidden])")
    assert SCRIPT in said(page).text_content() and not page.locator(".said img, .said script").count()
    page.click(".to-passages")
    assert not page.locator(".passages img, .passages script").count()


def test_what_is_not_sent(page, host):
    say(page, "   ")
    page.fill("#question", "y" * 4001)
    page.press("#question", "Enter")
    assert "1 too long" in page.text_content("#hint") and not host.asked and not page.locator(".turn").count()


def test_stop_break_and_again(page, host, served):
    from llmops_ref.core.files import DataError
    wait = threading.Event()
    host.pieces = ["Half of it", wait]
    say(page, "How?")
    until(page, lambda: said(page).text_content() == "Half of it")
    page.click("#stop")
    page.wait_for_selector(".notice:not([hidden])")
    assert "You stopped" in page.text_content(".notice") and said(page).text_content() == "Half of it"
    wait.set()
    assert host.closed.wait(10), "and the model stopped, too"

    host.pieces = ["The first half", DataError("The endpoint ended it.")]
    say(page, "And now?")
    again = page.locator(".turn").last
    again.locator(".again").wait_for()
    assert (
        "broke off" in again.text_content()
        and "The endpoint ended it." in again.text_content()
        and "The first half" in said(page).text_content()
    )
    host.pieces = [GOOD]
    again.locator(".again").click()
    again.locator(".under").wait_for()
    assert not again.locator(".notice").is_visible() and again.locator(".cite").count() == 3


def test_without_a_server(page):
    page.route("**/api/ask", lambda route: route.abort())
    say(page, "Is anybody there?")
    page.wait_for_selector(".notice:not([hidden])")
    assert "cannot be reached" in page.text_content(".notice") and page.is_visible(".again")


def focused(page):
    return page.evaluate("document.activeElement.id || document.activeElement.className || document.activeElement.textContent")


def tab_to(page, selector, limit=25):
    for _ in range(limit):
        page.keyboard.press("Tab")
        if page.evaluate("s => document.activeElement.matches(s)", selector): return
    raise AssertionError(f"{selector} cannot be reached; the focus is at {focused(page)}")


def test_by_keyboard(page, host, ws):
    assert focused(page) == "question"
    page.keyboard.type("How do I log")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("a metric?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".under:not([hidden])")
    assert host.asked[0][0] == "How do I log\na metric?" and focused(page) == "question"
    for _ in range(25):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.matches('.cite')"): break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", "the focus is to be seen"
    page.keyboard.press("Enter")
    assert page.is_visible(".passage.open")
    page.keyboard.press("Escape")
    tab_to(page, ".down")
    page.keyboard.press("Enter")
    page.wait_for_selector(".vote:not([hidden])")
    page.keyboard.press("Space")
    tab_to(page, ".correction")
    page.keyboard.type("Use `mlflow.log_metric`.")
    tab_to(page, ".vote .primary")
    page.keyboard.press("Enter")
    page.wait_for_selector(".thanks:not([hidden])")
    last = votes(ws).sort_values("time").iloc[-1]
    assert (last.reason, last.correction) == ("wrong", "Use `mlflow.log_metric`.")


@pytest.mark.parametrize("width", [320, 360])
def test_on_a_small_screen(page, host, width):
    page.set_viewport_size(dict(width=width, height=640))
    assert not wide(page)
    host.pieces = ["A `mlflow." + "very_long_name_" * 12 + "` [1] https://example.com/" + "x" * 200 + "\n```\n" + "code " * 60 + "\n```"]
    say(page, "word" * 60)
    page.wait_for_selector(".under:not([hidden])")
    for opens in (".to-passages", ".to-steps", ".down"): page.click(opens)
    page.wait_for_selector(".bars li")
    assert not wide(page)
    page.goto(page.url.partition("#")[0] + "#review")
    page.wait_for_selector(".case, #review-notice:not([hidden])")
    assert not wide(page)


def test_settings(page):
    page.click("#open-settings")
    page.click("#theme label:has-text('Dark')")
    page.check("#show-passages")
    page.keyboard.press("Escape")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 19, 22)"
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    say(page, "How?")
    page.wait_for_selector(".passages:not([hidden])")
    kept = page.evaluate("Object.keys(localStorage).sort()")
    assert kept == ["assistant.passages", "assistant.session", "assistant.theme"], "settings and the session, and nothing else"


def test_review(page, client, ws):
    def vote(question, **said):
        assert (
            client.post(
                "/api/vote",
                json=ME | dict(trace_id=ask(client, question)[-1][1]["trace_id"], good=False, reason="wrong", event_id="one") | said,
            ).status_code
            == 200
        )
    vote("How do I write down one metric? " + SCRIPT, comment=SCRIPT, correction="Use `mlflow.log_metrik`.")
    page.click("#to-review")
    case = page.locator(".case").filter(has_text="write down one metric")
    case.wait_for()
    assert (
        SCRIPT in case.locator(".comment").text_content()
        and "It is wrong" in case.text_content()
        and not case.locator("img, script").count()
    )
    case.locator(".accept").click()
    assert "needs a name" in case.locator(".wrong").text_content() and focused(page) == "name"
    page.fill("#name", "Ada")
    case.locator(".accept").click()
    until(page, lambda: "Did you mean" in case.locator(".wrong").text_content())
    case.locator(".right").fill("Use `mlflow.log_metric`.")
    case.locator(".accept").click()
    page.wait_for_selector(".decided")
    row = ws.read("reviewed").iloc[-1]
    assert (row.accepted, row.by, row.answer, row.gold, row.uses) == (True, "Ada", "Use `mlflow.log_metric`.", "mlflow.log_metric", "pair")


# --- with what was deployed

def test_the_deployed_champion(finished, chromium):
    "The whole way: a browser asks the version that the life cycle deployed, and its vote is in the table."
    ws = open_workspace(load_config("staging", finished.root, cache=finished.environment["LLMOPS_CACHE"]))
    host = champion_host(ws)
    app = chat_app(ws, host, example_questions(ws))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started: time.sleep(0.02)
    context = chromium.new_context()
    try:
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
        page.set_default_timeout(60_000)
        page.click("#examples button >> nth=0")
        page.wait_for_selector(".under:not([hidden])")
        page.click(".to-steps")
        page.locator(".steps", has_text=re.compile("Write the answer|Refuse")).first.wait_for()      # steps are shown as they are written
        page.click(".down")
        page.fill(".vote .correction", "Use `mlflow.log_metric`.")
        page.click(".vote .primary")
        page.wait_for_selector(".thanks:not([hidden])")
        trace_id = page.locator(".steps code").text_content()
        assert votes(ws)[lambda f: f.trace_id == trace_id].sort_values("time").correction.iloc[-1] == "Use `mlflow.log_metric`."
    finally:
        context.close()
        server.should_exit = True
        host.close()
        stop_services(ws, owner=os.getpid())
