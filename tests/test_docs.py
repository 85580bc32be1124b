"""What the README and the guides say is true: their commands run, their links lead somewhere, the tests that they name are there, and the site can be read."""
import dataclasses, json, re, shlex, signal

import httpx
import pytest

from conftest import PATIENCE, ROOT, copy_of
from llmops_ref.core.config import Config
from llmops_ref.kit.docs import anchor_of, broken_links, build_site, site_pages
from llmops_ref.kit.fork import TUTORIAL, read_upstream
from llmops_ref.runner.plan import STAGES, stage_code
from test_chat import chromium
from test_workflows import test_what_is_called_exists as exists

PAGES = {
    name: (ROOT / name).read_text()
    for name in [
        "README.md", "CONTRIBUTING.md", "AGENTS.md",
        *(f"nbs/guides/{path.name}" for path in sorted((ROOT / "nbs" / "guides").glob("*.md"))),
    ]
}


def said(text: str) -> list[str]:
    "The commands of a page: lines of its blocks, and what stands between backticks."
    blocks = [
        line
        for language, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.M | re.S)
        if language in ("", "bash")
        for line in block.splitlines()
    ]
    lines = [
        re.sub(r"(?:\s{2,}|(?<=') )#.*$", "", re.sub(r"^\s*(?:[A-Z_]+=(?:'[^']*'|\S+) )+", "", line)).strip() for line in blocks
    ] + re.findall(r"`((?:\.venv/bin/)?(?:llmops|make|nbdev-\w+) [^`]+)`", text)
    return [
        line
        for line in lines
        if re.match(r"(make|(\.venv/bin/)?(llmops|nbdev-[\w-]+)|databricks|git)( |$)", line)
        and "..." not in line
        and "--help" not in line
        and line.count("'") % 2 == 0
    ]

COMMANDS = {command: name for name, text in PAGES.items() for command in said(text)}

# What takes minutes is run by another test (which says the command's word, or what stands after =), and what cannot be had here by none
ELSEWHERE = {
    r"make run( TORCH=cpu)?": "test_kit.py::lived", r"make test( TORCH=cpu)?": "test_kit.py::test_the_two_commands_of_the_renamed_project",
    r"make setup( TORCH=cpu)?": "test_kit.py::acme=*INIT", r"make site": "test_docs.py::site=build_site(",
    r"make prepare": "test_kit.py::test_the_upgrade_command_of_a_renamed_project=upgrade",
    r"llmops run --env (dev|staging)": "conftest.py::pristine",
    r"llmops run --env dev --app third_party": "test_applications.py::third",
    r"llmops compare.*": "test_applications.py::test_one_table_compares_the_applications",
    r"llmops serve( assistant)?": "test_docs.py::test_the_serve_command",          # neither ends by itself
    r"llmops batch .*": "test_applications.py::test_a_batch_that_is_killed_goes_on_where_it_stopped",
    r"llmops run --env dev --only (finetune|retrieval)( --force)?": "test_run.py::test_damaged_index_is_refused_and_rebuilt=--only",
    r"llmops versions --env prod": "test_deployment.py::versions",
    r"llmops (run|approve|rollback) --env prod|llmops approve|llmops rollback": "test_deployment.py::test_approval_rollout_and_rollback",
    r"llmops (vote|review) .*": "test_feedback.py::corrected",
    r"llmops monitor .*": "test_monitoring.py::test_the_command_for_a_scheduler",
    r"llmops run --env dev --set (hub_retired=smollm2-q8_0|retrieval=off)": "test_kit.py::test_neither_fine_tuning_nor_an_index",
    r"llmops run --env dev --set finetune=off": "test_kit.py::lived",
    r"llmops adopt .*": "test_adopt.py::adopted", r"llmops init.*": "test_kit.py::acme=*INIT",
    r"llmops upgrade": "test_kit.py::test_the_upgrade_command_of_a_renamed_project",
    r"git remote add upstream .*": "test_kit.py::test_a_template_without_history",
    r"llmops run --env dev --to prompts": "test_prompts.py::test_a_new_prompt_that_is_no_better_changes_nothing",
    r"llmops questions (add|review) .*": "test_questions.py::test_a_question_is_used_once_it_is_reviewed",
    r"llmops run --env dev --set corpus=.*": "test_retrieval.py::test_own_documents_then_one_that_changes=run(own)",
    r"nbdev-test .*": "test_kit.py::test_the_two_commands_of_the_renamed_project=make(acme, \"test\"",
    r"llmops rollback --prompt": "test_prompts.py::test_going_back_to_the_previous_prompt",
    r"llmops chat.*": "test_docs.py::test_the_chat_command",
    r"llmops models add mine .*": "test_own_models.py::test_the_life_cycle_of_a_model_of_ones_own",
    r"llmops run --env dev --set chat_model=mine": "test_own_models.py::test_the_life_cycle_of_a_model_of_ones_own",
}
NOT_HERE = {
    r"databricks .*": "takes a workspace",
    r"llmops doctor .*--databricks|llmops doctor --databricks": "takes a workspace; test_kit asks an emulated one",
    r"llmops bundle connect .*": "takes a workspace; test_bundle calls what it calls",
    r"llmops destroy .* --platform databricks": "takes a workspace; test_hosting calls what it calls",
    r"llmops run --env dev --app third_party --set gateway_models=openai/.*": "takes a paid provider",
    r".* --set validation_questions=0": "takes minutes; the same command with other settings runs in test_kit",
    r".* --set finetune_profile=full": "takes half an hour; its settings are those of smoke, only more",
    r"llmops models fetch qwen.*": "downloads half a gigabyte; test_models fetches a small one",
    r"llmops run --env dev --set chat_model=qwen.*": "downloads half a gigabyte, and takes a quarter of an hour",
    r"make offline": "takes both commands again; the life cycle of `pristine` runs without a network",
    r"make lock.*": "resolves anew; the workflow `newest` does it every Monday",
    r"make run INSTALLER=pip": "takes ten minutes more; pip reads the same lock",
    r"llmops bench .*": "takes minutes; its lesson, bench.choices, measures",
    r"llmops load": "takes minutes; its lesson is bench.load",
    r"nbdev-install-hooks": "writes into the home of whoever runs it", r"git .*": "is git's own",
}


def bare(command): return command.removeprefix(".venv/bin/").strip()
def found(table, command): return next((value for pattern, value in table.items() if re.fullmatch(pattern, bare(command))), None)

QUICK = [command for command in COMMANDS if not found(ELSEWHERE, command) and not found(NOT_HERE, command)]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_exists(command):
    "Command, options and targets are there, and each is run: here, or by the test that the table names."
    exists(COMMANDS[command], re.sub(r"<([^>]*)>", "x", command))
    if where := found(ELSEWHERE, command):
        file, name, proof = re.match(r"(\S+)::(\w+)(.*)", where).groups()
        source = re.search(rf"^def {name}\(.*?(?=^def |^@|^class |\Z)", (ROOT / "tests" / file).read_text(), re.M | re.S)
        assert source and (proof.partition("=")[2] or f'"{bare(command).split()[1]}"') in source[0], f"{where} does not run it"


def test_the_tables_name_what_is_said():
    if read_upstream(ROOT) and not (ROOT / TUTORIAL).is_file(): pytest.skip("this fork threw the tutorial away, which says some of it")
    for pattern in [*ELSEWHERE, *NOT_HERE]:
        assert any(re.fullmatch(pattern, bare(command)) for command in COMMANDS), f"no page says {pattern}"


def test_quick_commands_run(finished, tmp_path):
    "One after the other, in a copy of a project whose life cycle has run."
    project, failed = copy_of(finished, tmp_path), {}
    for command in QUICK:
        words = shlex.split(bare(command))
        if words[0] != "llmops" or "<" in command: continue
        words = ["staging" if word == "dev" and words[i - 1] == "--env" and words[1] != "bundle" else word for i, word in enumerate(words)][
            1:
        ]  # where the life cycle has run
        if "--env" not in words and words[0] not in ("bundle", "questions", "todo", "doctor"): words += ["--env", "staging"]
        starts = words[0] == "run" and "--dry-run" not in words        # kernels
        done = (project.llmops if starts else project.inside)(*words)
        if done.returncode and command not in FAILS: failed[command] = done.stdout[-500:] + done.stderr[-1500:]
        if command in FAILS: assert done.returncode == 1 and FAILS[command] in done.stderr, done.stderr
    assert not failed, "\n\n".join(f"{command}\n{text}" for command, text in failed.items())

FAILS = {
    ".venv/bin/llmops run --env dev --only corpus --set questions=data/red_team.jsonl": "needs the key",
    ".venv/bin/llmops bundle plan --env prod": "service_principal",
    "llmops bundle plan --env staging": "service_principal", "llmops destroy": "Nobody can be asked",
    "llmops ask": "Which question?", "llmops search": "Which question?",            # in a table of how long they take
}  # to show how


def test_the_chat_command(finished):
    with httpx.Client(transport=httpx.HTTPTransport(retries=6)) as client:            # the address is said, then the server starts
        process = finished.start("chat", "--env", "staging", "--port", "0")
        try:
            address = next(m[0] for line in process.stdout if (m := re.search(r"http://\S+", line)))
            assert "Ask a question" in client.get(address).text and client.get(f"{address}/api/info").json()["env"] == "staging"
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


def test_the_serve_command(finished):
    "What is deployed, behind MLflow's server: the line that it prints to try it works, and nothing is left running."
    process = finished.start("serve", "assistant", "--env", "staging")
    try:
        address = next(m[0] for line in process.stdout if (m := re.search(r"http://\S+", line)))
        reply = (
            httpx.post(
                f"{address}/responses",
                json=dict(model="assistant", input=[dict(role="user", content="How do I log a metric?")]),
                timeout=PATIENCE,
            )
            .raise_for_status()
            .json()
        )
        assert reply["output"][0]["content"][0]["text"]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    with pytest.raises(httpx.ConnectError): httpx.get(address)


# --- links and names

def links(text):
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S)) if not re.match(r"\w+:", link)]


@pytest.mark.parametrize("name", [*PAGES, *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "nbs").rglob("*.ipynb")))])
def test_links_lead_somewhere(name):
    text = PAGES.get(name) or "\n\n".join(
        "".join(cell["source"]) for cell in json.loads((ROOT / name).read_text())["cells"] if cell["cell_type"] == "markdown"
    )
    for link in links(text):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.resolve().exists(), f"{name} links to {link}, which is not there"
        if anchor and target.suffix == ".md":
            assert anchor in [
                anchor_of(h) for h in re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            ], f"{name} links to the heading {link}, which is not there"


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.notebook)
def test_stages_open_alike(stage):
    "What it reads and leaves, why it exists, and five lines: settings, time, Databricks, something to try, how it fails. Settings and commands are there."
    cells = [
        "".join(cell["source"])
        for cell in json.loads((ROOT / "nbs" / f"{stage.notebook}.ipynb").read_text())["cells"]
        if cell["cell_type"] == "markdown"
    ]
    assert cells[1].startswith("#| export\n\nReads ") and " Leaves " in cells[1] and len(cells[2].split()) > 40
    rows = dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", cells[3], re.M))
    assert list(rows) == ["settings", "time here", "on Databricks", "to try", "how it fails"]
    for name in re.findall(r"`(\w+)`", rows["settings"]):
        assert any(f.name.startswith(name) for f in dataclasses.fields(Config)), f"there is no setting {name}"
    for command in said("\n".join(cells[3:4])): exists(stage.notebook, command)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.notebook)
def test_stages_end_with_what_they_stand_on(stage):
    "Three or four libraries that are worth reading next, and that the stage really uses."
    last = json.loads((ROOT / "nbs" / f"{stage.notebook}.ipynb").read_text())["cells"][-1]
    assert "".join(last["source"]).startswith("## What it stands on\n\n")
    named = re.findall(r"\]\(lib/(\w+/\w+)\.ipynb\)", "".join(last["source"]))
    assert 3 <= len(named) <= 4 and {f"{name}.py" for name in named} <= stage_code(stage, ROOT).keys()


def test_the_tests_that_the_security_page_names():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGES["nbs/guides/security.md"])
    assert len(named) > 20
    for file, test in named: assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file} has no {test}"


def test_citation_version_and_changelog_agree():
    import yaml
    from llmops_ref import __version__
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    first = re.search(r"^## (\S+) \((\S+)\)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert (cited["version"], str(cited["date-released"])) == first.groups() and cited["license"] == "Apache-2.0"
    assert __version__.startswith(first[1]) or (ROOT / "pyproject.toml").read_text().count(
        "[tool.upstream]"
    ), "a fork counts its own versions"


# --- the site

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages") / "site"
    build_site(ROOT, folder)
    return folder


def test_no_link_of_the_site_is_broken(site):
    assert broken_links(site) == []
    pages = site_pages(ROOT)
    assert len(pages) == len(list((ROOT / "nbs").rglob("*.ipynb"))) + len(
        list((ROOT / "nbs" / "guides").glob("*.md"))
    ), "every notebook and every guide is a page"
    assert {str(path.relative_to(site)) for path in site.rglob("*.html")} == set(pages.page)
    for path in site.rglob("*.html"):
        assert "<script src" not in path.read_text() and 'href="http' not in path.read_text().partition("<body>")[0], "nothing from outside"


def test_the_site_in_a_browser(site, chromium):
    "Nothing sticks out on a small screen, every picture loads, text can be told from its ground by day and by night."
    for scheme, width in (("light", 360), ("dark", 1280)):
        context = chromium.new_context(viewport=dict(width=width, height=800), color_scheme=scheme)
        page = context.new_page()
        for name in ("index.html", "05_finetune.html", "08_monitoring.html", "guides/components.html", "guides/ci.html"):
            page.goto((site / name).as_uri())
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} is wider than {width} pixels"
            assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)"), f"a picture of {name} is missing"
            assert contrast(*page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")) > 7
        context.close()


def contrast(*colours): # Of two CSS colours, as WCAG defines it
    def light(colour):
        return sum(
            w * (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4)
            for w, c in zip((0.2126, 0.7152, 0.0722), (int(n) / 255 for n in re.findall(r"\d+", colour)[:3]))
        )
    low, high = sorted(map(light, colours))
    return (high + 0.05) / (low + 0.05)
