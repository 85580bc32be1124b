"""A team forks the project, renames it, works on it, follows upstream, and asks what is missing.

The fork here is a real one: a git clone, named otherwise by `llmops init`. `renamed` borrows the environment of these tests; `acme`
has one of its own, in which its two commands run. That takes minutes, so the tests that need it are slow ones.
"""
import copy, json, os, re, shutil, subprocess

import psutil
import pytest
from databricks.sdk.service.catalog import PermissionsChange, Privilege

from conftest import BIN, ROOT, SMALL, Project
from llmops_ref.core.config import SettingsError, load_config
from llmops_ref.kit.doctor import NEEDED, _rights_in, check_workspace
from llmops_ref.kit.fork import (
    FIRST_PAGE, TUTORIAL, Identity, fork_project, git, read_identity, read_upstream, relink, upgrade_project, version_of, write_readme,
)
from llmops_ref.runner.plan import STAGES
from llmops_ref.core.files import DataError
from test_bundle import Emulator

HERE = read_identity(ROOT)
ACME = next(
    i
    for i in (
        Identity("acme-assistant", "acme_assistant", "acme_assistant", "Answers questions about what Acme sells"),
        Identity("apex-helper", "apex_helper", "apex_helper", "Answers questions about what Apex rents"),
    )
    if i.name != HERE.name
)
INIT = ["init", "--name", ACME.name, "--about", ACME.about, "--yes"]
STAGE_NAMES = [stage.name for stage in STAGES]
alone = not any(stats.isup for name, stats in psutil.net_if_stats().items() if not name.startswith("lo"))


def committed(folder, text):
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", text)


def clone_of(upstream: Project, folder) -> Project:
    "Somebody's fork of it."
    subprocess.run(["git", "clone", "-q", "--origin", "upstream", upstream.root, folder], check=True)
    for key, value in {"user.name": "Bob", "user.email": "bob@example.com"}.items(): git(folder, "config", key, value)
    fork = copy.copy(upstream)
    fork.root, fork.environment = folder, upstream.environment | dict(PYTHONPATH=str(folder))
    return fork


@pytest.fixture(scope="module")
def upstream(tmp_path_factory) -> Project:
    "This project as a repository of its own, and nobody's fork, even if these tests run in one."
    project = Project(tmp_path_factory.mktemp("upstream"), **SMALL)
    pyproject = project.root / "pyproject.toml"
    pyproject.write_text(re.sub(r"\n*\[tool\.upstream\].*", "\n", pyproject.read_text(), flags=re.S))
    if read_upstream(ROOT): give_back_the_first_page(project.root)
    git(project.root, "init", "-q", "-b", "main")
    for key, value in {"user.name": "Ada", "user.email": "ada@example.com"}.items(): git(project.root, "config", key, value)
    committed(project.root, "Begin")
    return project


def give_back_the_first_page(root):
    "A fork has one of its own, and what was there as a guide (unless somebody threw that away)."
    page, guide = json.loads((root / FIRST_PAGE).read_text()), root / TUTORIAL
    short = "# A page\n\n> Of a project\n\nA live line for each stage, a closing table. [hub](../01_hub.ipynb)\n"
    text = guide.read_text() if guide.is_file() else short
    text = relink(re.sub(r"\A# .+\n\n> .+\n", f"# {HERE.name}\n\n> {HERE.about}\n", text), "nbs/guides", "nbs")
    page["cells"] = [dict(cell_type="markdown", id="first", metadata={}, source=text.splitlines(keepends=True))]
    (root / FIRST_PAGE).write_text(json.dumps(page, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    guide.unlink(missing_ok=True)
    write_readme(root)


OWN_ENVIRONMENT = pytest.mark.slow(reason="a renamed project installs itself, and runs its own life cycle and lessons")
ANOTHER_HISTORY = pytest.mark.slow(reason="the upgrade of a fork once more, which has another history")


def called(project, *words) -> subprocess.CompletedProcess:
    "Its command, as its package has it."
    return subprocess.run(
        [str(BIN / "python"), "-c", f"from {ACME.package}.commands.cli import app; app()", *words], cwd=project.root, env=project.environment,
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )


@pytest.fixture(scope="module")
def renamed(upstream, tmp_path_factory) -> Project:
    "A fork of it, renamed by `llmops init`."
    fork = clone_of(upstream, tmp_path_factory.mktemp("fork") / "renamed")
    done = fork.llmops(*INIT, "--no-smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    return fork


@pytest.fixture(scope="module")
def acme(upstream, tmp_path_factory) -> Project:
    "A fork of it, renamed by `llmops init` with its smoke test, in an environment of its own."
    if alone: pytest.skip("no network: a renamed project installs itself from a package index")
    fork = clone_of(upstream, tmp_path_factory.mktemp("fork") / "acme")
    fork.said = fork.llmops(*INIT)
    assert fork.said.returncode == 0, fork.said.stdout[-3000:] + fork.said.stderr[-3000:]
    fork.environment.pop("PYTHONPATH")
    return fork


def make(project, *words, timeout=1800, **variables):
    environment = {
        key: value for key, value in project.environment.items() if words[0] != "test" or not key.startswith("LLMOPS_")
    }  # lessons are about the settings as they stand
    return subprocess.run(
        ["make", *words], cwd=project.root, env=environment | variables, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=timeout,
    )


def ended(project):
    "How each stage of the last run ended."
    return {s["name"]: s["state"] for s in json.loads((project.root / "runs" / "dev" / "latest" / "run.json").read_text())["stages"]}


# --- a new name

def test_init_renames_everything_and_records_where_it_comes_from(renamed, upstream):
    acme = renamed
    assert read_identity(acme.root) == ACME
    assert git(acme.root, "status", "--porcelain") == "" and git(acme.root, "log", "-1", "--format=%s") == f"Name it {ACME.name}"
    assert git(acme.root, "rev-list", "--count", "HEAD") == str(
        1 + int(git(upstream.root, "rev-list", "--count", "HEAD"))
    ), "its history is kept"
    taken = read_upstream(acme.root)
    assert (taken.name, taken.commit) == (HERE.name, git(upstream.root, "rev-parse", "HEAD"))
    left = [
        name for name in git(acme.root, "grep", "-lIE", rf"\b({HERE.name}|{HERE.package})\b").splitlines() if not name.startswith("data/")
    ]
    assert set(left) <= {"pyproject.toml", "CHANGELOG.md", "CITATION.cff", "LICENSE"}, left
    assert os.access(acme.root / ".ci" / "run", os.X_OK), "what was executable still is"
    assert not (acme.root / HERE.package).exists()
    first = (acme.root / "README.md").read_text()
    assert first.startswith(f"# {ACME.name}\n\n> {ACME.about}\n") and "TODO" in first and "Nothing has run yet." in first
    assert "SmolLM2" not in first and "%" not in first, "neither our model nor our numbers"
    tutorial = (acme.root / "nbs" / "guides" / "tutorial.md").read_text()
    assert "A live line for each stage" in tutorial and "](../01_hub.ipynb)" in tutorial, "what the first page was is a guide"
    plan = called(acme, "bundle", "plan", "--env", "dev")
    assert f"{ACME.name} in dev" in plan.stdout and f"{ACME.catalog}_dev" in plan.stdout and f"{ACME.name} finetune dev" in plan.stdout, (
        plan.stdout + plan.stderr
    )


def test_a_second_init_changes_nothing(renamed):
    before = git(renamed.root, "rev-parse", "HEAD")
    again = called(renamed, *INIT, "--no-smoke")
    assert again.returncode == 0 and f"It is called {ACME.name} already" in again.stdout, again.stdout + again.stderr
    assert git(renamed.root, "rev-parse", "HEAD") == before


@pytest.fixture(scope="module")
def lived(acme) -> Project:
    "Its life cycle has run in dev, by `make run`; without fine-tuning, which the exercises do."
    acme.ran = make(acme, "run", LLMOPS_FINETUNE="off")
    assert acme.ran.returncode == 0, acme.ran.stdout[-3000:] + acme.ran.stderr[-3000:]
    return acme


@pytest.fixture
def desk(lived) -> Project:
    "It, with what an exercise changes in its files taken back afterwards."
    before = git(lived.root, "rev-parse", "HEAD")
    yield lived
    git(lived.root, "reset", "-q", "--hard", before)
    git(lived.root, "clean", "-qfd")


@OWN_ENVIRONMENT
def test_the_two_commands_of_the_renamed_project(lived):
    "`make run` goes through the life cycle, here without fine-tuning; `make test` runs the lessons, and of the tests those that need no life cycle of their own."
    acme = lived
    tried = ("hub", "corpus")                           # by the smoke test of `init`
    assert (
        ended(acme) == {name: "skipped" if name == "finetune" else "cached" if name in tried else "ran" for name in STAGE_NAMES}
        and (acme.root / "runs" / "dev" / "latest" / "report.html").is_file()
    )
    assert json.loads(shell(acme, '.venv/bin/llmops ask "How do I log a metric?" --json').stdout)["answer"]
    assert "champion" in shell(acme, ".venv/bin/llmops versions --env dev --json").stdout
    quick = "tests/test_notebooks.py tests/test_workflows.py tests/test_docs.py tests/test_kit.py -p no:cacheprovider"
    tested = make(acme, "test", PYTEST_ADDOPTS=f"{quick} -k 'not quick_commands and not chat_command and not serve_command'")
    assert tested.returncode == 0, tested.stdout[-4000:] + tested.stderr[-2000:]
    assert " passed" in tested.stdout and git(acme.root, "status", "--porcelain") == "", "neither leaves anything that git would see"


# --- the exercises of the guides, each to its check, in the fork

def shell(project, line, **variables) -> subprocess.CompletedProcess:
    "A line of a guide, as somebody types it."
    return subprocess.run(
        ["bash", "-c", line], cwd=project.root, env=project.environment | {f"LLMOPS_{k}": v for k, v in variables.items()},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900,
    )


def exercise(project, guide, heading) -> list[str]:
    "The commands of the first block under a heading (or after some words) of a guide, as the fork has it."
    text = (project.root / "nbs" / "guides" / guide).read_text().partition(heading)[2]
    return [line.strip() for line in re.search(r"^ *```\n(.*?)^ *```", text, re.M | re.S)[1].splitlines()]


def done(project, line, **variables) -> str:
    "What a line says that must succeed."
    ran = shell(project, line, **variables)
    assert ran.returncode == 0, f"{line}\n{ran.stdout[-3000:]}{ran.stderr[-3000:]}"
    return ran.stdout


@OWN_ENVIRONMENT
def test_exercise_what_would_a_setting_cost(desk):
    plan, = exercise(desk, "learn.md", "**Exercise.** Before you change a setting")
    said = done(desk, plan)
    for stage in ("01_hub", "02_corpus"): assert re.search(rf"cached +{stage}", said), said
    for stage in ("03_retrieval", "04_prompts", "06_validation"): assert re.search(rf"run +{stage} .*retrieval_k", said), said
    assert re.search("run +05_finetune", said) and re.search("maybe +07_deployment", said), said
    assert "retrieval_k" in done(desk, ".venv/bin/llmops why prompts")


@OWN_ENVIRONMENT
def test_exercise_a_prompt_of_your_own(desk):
    write, run = exercise(desk, "learn.md", "### Exercise 1")
    done(desk, write)
    said = done(desk, run)
    assert re.search(r"ran +04_prompts .*\bmine\b", said), said
    page = (desk.root / "runs" / "dev" / "latest" / "report.html").read_text()
    assert re.search(r"Every design.*?<td[^>]*>\s*mine\b", page, re.S)


@OWN_ENVIRONMENT
def test_exercise_fail_well(desk):
    line, = exercise(desk, "learn.md", "### Exercise 2")
    ran = shell(desk, line)
    assert ran.returncode == 1 and "red_team.jsonl" in ran.stderr and "line 1" in ran.stderr and "needs the key" in ran.stderr, ran.stderr
    assert "Running:" not in ran.stdout and "Traceback" not in ran.stderr


@OWN_ENVIRONMENT
def test_exercise_once_round_the_loop(desk):
    ask, vote, review, run, where = exercise(desk, "learn.md", "### Exercise 3")
    trace = re.search(r"tr-\w+", done(desk, ask))[0]
    given = re.search(r"\ba-\w+", done(desk, vote.replace("tr-...", trace)))[0]
    done(desk, review.replace("a-...", given))
    done(desk, run)
    way = done(desk, where.replace("a-...", given)).strip().splitlines()
    assert re.match(" *serves +version ", way[-4]) and re.match(" *(holds|not yet) +version ", way[-2]), way     # two lines a step


@OWN_ENVIRONMENT
def test_exercise_a_question(desk):
    add, check = exercise(desk, "learn.md", "- Write a question")
    added = re.search(r"\b[a-z]\d+\b", done(desk, add))[0]
    done(desk, check)
    assert added in done(desk, ".venv/bin/llmops questions list --drafts")
    done(desk, f".venv/bin/llmops questions review {added} --accept")
    assert added not in done(desk, ".venv/bin/llmops questions list --drafts")


@OWN_ENVIRONMENT
def test_exercise_a_gate(desk):
    "One line, a commit, and staging stops with its name; nobody has to touch a lesson."
    settings = desk.root / "settings.ini"
    line = re.search(r"`(gates = [^`]*token_f1 [^`]+)`", (desk.root / "nbs" / "guides" / "learn.md").read_text())[1]
    settings.write_text(re.sub(r"^gates =[^;\n]*", f"{line} ", settings.read_text(), flags=re.M))
    committed(desk.root, "Add a gate")
    ran = shell(desk, ".venv/bin/llmops run --env staging", FINETUNE="off", VALIDATION_QUESTIONS="4", GATE_MODE="raise")
    assert ran.returncode == 1, ran.stdout[-2000:]
    assert re.search(r"token_f1 is 0\.\d+, must be at least 0\.99", ran.stderr), ran.stderr[-2000:]


@OWN_ENVIRONMENT
def test_exercise_a_signal(desk):
    ours = '    Signal("unreadable answers"'
    mine = '    Signal("long answers", "quality", _answers, lambda r, c: r.answer.str.len() > 400, lambda c: 0.1),'
    edit(desk, "lib/feedback/signals.ipynb", ours, f"{mine}\n{ours}")
    assert make(desk, "prepare").returncode == 0
    assert "long answers" in done(desk, ".venv/bin/llmops monitor --env dev")


@OWN_ENVIRONMENT
def test_exercise_documents_and_a_readme_with_their_numbers(desk):
    "Somebody's folder is adopted, answered from with a citation, and the first page of the fork shows the numbers of that run."
    assert re.search(r"made from", done(desk, ".venv/bin/llmops todo").splitlines()[0])
    done(desk, "cp -r nbs/guides handbook")
    adopt, run = exercise(desk, "learn.md", "cp -r nbs/guides handbook")
    done(desk, adopt)
    done(desk, run, FINETUNE="off")
    reply = json.loads(done(desk, '.venv/bin/llmops ask "What happens to votes?" --json'))
    cited = {reply["passages"][n - 1]["document_id"] for n in reply["citations"]}
    assert cited and cited <= {path.name for path in (desk.root / "handbook").iterdir()}, reply
    assert "are drafts" in (desk.root / "runs" / "dev" / "latest" / "report.html").read_text()
    write = re.search(r"`(\.venv/bin/jupyter execute [^`]+)`", (desk.root / "README.md").read_text())[1]
    done(desk, write)
    page = (desk.root / "README.md").read_text()
    assert "Nothing has run yet." not in page and re.search(r"\| Right answers, \w+.* \| \d+% \(of \d+; ", page), page
    assert git(desk.root, "status", "--porcelain", "--", "README.md", "nbs/index.ipynb").split()[1::2] == ["README.md", "nbs/index.ipynb"]


@OWN_ENVIRONMENT
def test_neither_fine_tuning_nor_an_index(acme):
    "Two stages fewer, and another base model, since the first was retired: the rest passes, to the end. The model is asked directly, validated, deployed and watched."
    done = subprocess.run(
        [".venv/bin/llmops", "run", "--env", "dev", "--set", "finetune=off", "--set", "retrieval=off", "--set", "hub_retired=smollm2-q8_0"],
        cwd=acme.root, env=acme.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    states = ended(acme)
    assert states["finetune"] == "skipped" and {states[name] for name in ("prompts", "validation", "deployment", "monitoring")} == {
        "ran"
    }, states
    asked = subprocess.run(
        [".venv/bin/llmops", "ask", "How do I log a metric?", "--json"], cwd=acme.root, env=acme.environment, capture_output=True, text=True
    )
    reply = json.loads(asked.stdout)
    assert reply["answer"] and not reply["passages"], "what is deployed knows no passages"


@pytest.mark.parametrize(
    "words, says",
    [
        (["--name", "Acme Assistant"], "such as weather-desk"),
        (["--name", "an-assistant-with-a-very-long-name"], "at most 22 characters"),
        (["--name", "pandas"], "would hide a package"), (["--name", "data"], "a folder of the project"),
        (["--name", "acme-desk", "--package", "acme_desk", "--about", "short"], "ten characters"),
        (["--name", "acme-desk", "--catalog", "Acme-Prod"], "--catalog takes"),
        (["--name", "acme-desk", "--about", 'Say "hello" to everybody'], "without quotes"),
        (["--name", "acme-desk", "--app", "theirs"], "--app takes"),
        (["--name", "acme-desk", "--host", "acme.example"], "--host takes the address"), ([], "Say --name"),
    ],
)
def test_a_name_that_would_not_do_is_refused_before_anything_changes(upstream, words, says):
    done = upstream.inside("init", *words, "--yes", "--no-smoke")
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert git(upstream.root, "status", "--porcelain") == ""


def test_init_refuses_what_is_not_committed_and_shows_what_it_would_do(upstream, tmp_path):
    fork = clone_of(upstream, tmp_path / "fork")
    shown = fork.inside(*INIT, "--dry-run")
    assert (
        shown.returncode == 0
        and "pyproject.toml" in shown.stdout
        and git(fork.root, "status", "--porcelain") == ""
        and read_identity(fork.root) == HERE
    )
    (fork.root / "settings.ini").write_text((fork.root / "settings.ini").read_text() + "\n")
    done = fork.inside(*INIT, "--no-smoke")
    assert done.returncode == 1 and "settings.ini" in done.stderr and "git stash" in done.stderr
    shutil.rmtree(fork.root / ".git")
    done = fork.inside(*INIT, "--no-smoke")
    assert done.returncode == 1 and "git init" in done.stderr


def test_application_and_workspace_are_written_where_they_are_read(upstream, tmp_path):
    fork = clone_of(upstream, tmp_path / "fork")
    done = fork.inside(*INIT, "--no-smoke", "--app", "third_party", "--host", "https://adb-1.2.azuredatabricks.net/")
    assert done.returncode == 0, done.stderr
    assert (
        load_config("prod", fork.root).app == "third_party"
        and "workspace:\n  host: https://adb-1.2.azuredatabricks.net\n" in (fork.root / "databricks.yml").read_text()
    )


# --- upstream

def cell_with(path, text):
    found = json.loads(path.read_text())
    return found, next(cell for cell in found["cells"] if text in "".join(cell["source"]))


def edit(project, notebook, old, new):
    "Change a cell of a notebook, as an editor does."
    path = project.root / "nbs" / notebook
    found, cell = cell_with(path, old)
    cell["source"] = "".join(cell["source"]).replace(old, new).splitlines(keepends=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def exported(root):
    "As much of `make prepare` as needs no environment of its own."
    subprocess.run([BIN / "nbdev-export"], cwd=root, env=os.environ | dict(PYTHONPATH=str(root)), check=True)
    write_readme(root)


def test_a_renamed_fork_takes_over_what_upstream_changed(renamed, upstream):
    "Both change the same notebook in other cells, and the settings beside each other; both are there afterwards, in the package too, and the fork's data are its own."
    acme = renamed
    edit(acme, "lib/feedback/signals.ipynb", "A share of rows that must stay under a bound.", "A share of rows that Acme keeps under a bound.")
    settings = acme.root / "settings.ini"
    settings.write_text(re.sub(r"^retrieval_k = 2 ", "retrieval_k = 4 ", settings.read_text(), flags=re.M))
    (acme.root / "data" / "questions.jsonl").write_text('{"id": "q1"}\n')
    committed(acme.root, "Make it ours")

    edit(upstream, "lib/feedback/signals.ipynb", "How likely so many bad ones are", "How probable so many bad ones are")
    edit(upstream, "index.ipynb", "A live line for each stage", "One live line for each stage")
    edit(upstream, "lib/core/scoring.ipynb", "from collections import Counter", "from collections import Counter        # " + HERE.package)
    settings = upstream.root / "settings.ini"
    settings.write_text(
        settings.read_text()
        .replace("retrieval_candidates = 100", "retrieval_candidates = 60")
        .replace("retrieval_k = 2 ", "retrieval_k = 3 ")
    )
    with (upstream.root / "data" / "questions.jsonl").open("a") as questions: questions.write("\n")
    committed(upstream.root, "Go on")

    git(acme.root, "fetch", "-q", "upstream")
    now, changed, conflicts = upgrade_project(acme.root, prepare=exported)
    assert not conflicts and now.commit == read_upstream(acme.root).commit == git(upstream.root, "rev-parse", "HEAD")
    assert now.version == read_upstream(acme.root).version == version_of(upstream.root, HERE.package) != "unknown"
    module = (acme.root / ACME.package / "feedback/signals.py").read_text()
    assert "that Acme keeps under" in module and "How probable so many" in module
    assert f"# {ACME.package}" in (acme.root / ACME.package / "core/scoring.py").read_text(), "what upstream wrote came under our name"
    assert (
        re.search(r"^retrieval_k = 4 ", (acme.root / "settings.ini").read_text(), re.M)
        and "retrieval_candidates = 60" in (acme.root / "settings.ini").read_text()
    )
    assert "One live line for each stage" in (acme.root / "nbs" / "guides" / "tutorial.md").read_text(), "what upstream tells arrives as a guide"
    assert "TODO" in (acme.root / "README.md").read_text() and "TODO" in (acme.root / "nbs" / "index.ipynb").read_text()
    assert (acme.root / "data" / "questions.jsonl").read_text() == '{"id": "q1"}\n'
    assert git(acme.root, "status", "--porcelain") == "" and git(acme.root, "log", "-1", "--format=%s").startswith(f"Take over {HERE.name}")
    assert "nothing is new" in called(acme, "upgrade").stdout


@OWN_ENVIRONMENT
def test_the_upgrade_command_of_a_renamed_project(acme, upstream):
    "It fetches, merges, prepares (which README and package prove) and commits; no edit of upstream is lost."
    edit(upstream, "index.ipynb", "A live line for each stage, a closing table", "A live line for each stage, then a closing table")
    edit(upstream, "lib/feedback/signals.ipynb", "if the true share is at the bound", "if the true share were at the bound")
    committed(upstream.root, "Say it better")
    done = subprocess.run([".venv/bin/llmops", "upgrade", "--json"], cwd=acme.root, env=acme.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert not said["conflicts"] and said["now"]["commit"] == git(upstream.root, "rev-parse", "HEAD")
    assert "if the true share were at the bound" in (acme.root / ACME.package / "feedback/signals.py").read_text()
    assert "then a closing table" in (acme.root / "nbs" / "guides" / "tutorial.md").read_text()
    assert "TODO" in (acme.root / "README.md").read_text(), "its first page is its own"
    assert git(acme.root, "status", "--porcelain") == ""


@ANOTHER_HISTORY
def test_own_commits_before_the_rename_stay(upstream, tmp_path):
    "A team that had worked before it ran `init`, and appended to pyproject.toml: the first upgrade brings upstream's change and takes nothing of theirs away."
    fork = clone_of(upstream, tmp_path / "fork")
    (fork.root / "own.md").write_text("ours\n")
    faq = fork.root / "nbs" / "guides" / "faq.md"
    faq.write_text(faq.read_text() + "\nOurs.\n")
    committed(fork.root, "Work before the rename")
    assert fork.inside(*INIT, "--no-smoke").returncode == 0
    with (fork.root / "pyproject.toml").open("a") as file: file.write("\n[tool.ruff]\nline-length = 200\n")
    committed(fork.root, "Choose a linter")
    (upstream.root / "data" / "more.jsonl").write_text("{}\n")
    for n in range(2):
        cost = upstream.root / "nbs" / "guides" / "cost.md"
        cost.write_text(cost.read_text() + f"\nTheirs {n}.\n")
        committed(upstream.root, f"Add {n}")
        git(fork.root, "fetch", "-q", "upstream")
        now, changed, conflicts = upgrade_project(fork.root, prepare=lambda root: None)
        assert not conflicts and f"Theirs {n}." in (fork.root / "nbs" / "guides" / "cost.md").read_text(), (changed, conflicts)
    assert (
        (fork.root / "own.md").read_text() == "ours\n"
        and faq.read_text().endswith("\nOurs.\n")
        and "line-length = 200" in (fork.root / "pyproject.toml").read_text()
    )
    assert (fork.root / "data" / "more.jsonl").exists(), "a new file of data arrives; what is there stays"
    with pytest.raises(SettingsError, match="a branch of yours"): upgrade_project(fork.root, "main", prepare=lambda root: None)
    with pytest.raises(SettingsError, match="is older than"): upgrade_project(fork.root, "upstream/main~1", prepare=lambda root: None)

    def broken(root): raise DataError("no disk left")
    cost.write_text(cost.read_text() + "\nTheirs 3.\n")
    committed(upstream.root, "Add 3")
    git(fork.root, "fetch", "-q", "upstream")
    before = git(fork.root, "rev-parse", "HEAD"), read_upstream(fork.root)
    with pytest.raises(DataError, match="no disk left"): upgrade_project(fork.root, prepare=broken)
    assert (git(fork.root, "rev-parse", "HEAD"), read_upstream(fork.root)) == before and git(
        fork.root, "status", "--porcelain"
    ) == "", "half an upgrade is none"


@ANOTHER_HISTORY
def test_a_template_without_history(upstream, tmp_path):
    "GitHub's *Use this template* copies the files and drops the history: the first tree says where it came from."
    folder = tmp_path / "template"
    shutil.copytree(upstream.root, folder, ignore=shutil.ignore_patterns(".git", "runs", "stores"), symlinks=True)
    git(folder, "init", "-q", "-b", "main")
    for key, value in {"user.name": "Bob", "user.email": "bob@example.com"}.items(): git(folder, "config", key, value)
    committed(folder, "Initial commit")
    (folder / "own.md").write_text("ours\n")
    committed(folder, "Work")
    fork_project(folder, ACME)
    git(folder, "remote", "add", "upstream", str(upstream.root))
    cost = upstream.root / "nbs" / "guides" / "cost.md"
    cost.write_text(cost.read_text() + "\nFor templates.\n")
    committed(upstream.root, "Add for templates")
    git(folder, "fetch", "-q", "upstream")
    now, changed, conflicts = upgrade_project(folder, prepare=lambda root: None)
    assert not conflicts and "For templates." in (folder / "nbs" / "guides" / "cost.md").read_text() and (folder / "own.md").exists(), (
        changed,
        conflicts,
    )


def test_a_conflict_is_named_and_left_in_a_notebook_that_opens(renamed, upstream):
    acme = renamed
    for project, word in ((acme, "Acme's"), (upstream, "Upstream's")):
        edit(project, "lib/feedback/rehearsal.ipynb", "# rehearsal", f"# rehearsal\n\n{word} words")
        committed(project.root, "Differ")
    done = called(acme, "upgrade")
    assert done.returncode == 1 and "nbs/lib/feedback/rehearsal.ipynb" in done.stderr and "git reset --hard" in done.stderr, done.stderr
    text = json.dumps(json.loads((acme.root / "nbs" / "lib/feedback/rehearsal.ipynb").read_text()))
    assert "Acme's words" in text and "Upstream's words" in text
    git(acme.root, "reset", "-q", "--hard")


def test_upgrade_says_how_to_begin(upstream, renamed, tmp_path):
    done = upstream.inside("upgrade")
    assert done.returncode == 1 and "llmops init" in done.stderr
    fork = clone_of(renamed, tmp_path / "fork")
    git(fork.root, "remote", "remove", "upstream")
    done = fork.inside("upgrade", "upstream/main")
    assert done.returncode == 1 and "git remote add upstream" in done.stderr


# --- what is missing

def test_doctor_passes_here_and_names_what_would_stop_a_run(project):
    done = project.llmops("doctor", "--local", "--json")
    found = {f["about"]: f for f in json.loads(done.stdout)["findings"]}
    assert done.returncode == 0 and all(f["fix"] for f in found.values() if f["state"] != "ok"), done.stdout
    assert found["weights of smollm2"]["state"] == found["parameters"]["state"] == "ok"

    pyproject = project.root / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace('allowed_cell_metadata_keys = ["tags"]', ""))
    done = project.inside("doctor", "--local")
    assert done.returncode == 1 and "allowed_cell_metadata_keys" in done.stdout and "1 would stop a run" in done.stdout

    done = project.inside("doctor", "--local", "--env", "prod", "--json", RETRIEVAL_K="many")
    assert done.returncode == 1 and "LLMOPS_RETRIEVAL_K" in json.dumps(json.loads(done.stdout)["findings"])


def test_doctor_on_a_workspace(tmp_path):
    "The SDK's client asks an emulated workspace: no catalog, then too few rights in it, then enough."
    emulator = Emulator(tmp_path, dict(os.environ))
    try:
        config = load_config("dev", ROOT, platform="databricks", catalog="llm_dev", serving_token="traces")
        def states(): return {f.about: f for f in check_workspace(config, emulator.client)}
        found = states()
        assert found["login"].state == "ok" and found["catalog"].state == "fail" and "CREATE CATALOG llm_dev" in found["catalog"].fix
        assert found["secrets"].state == "fail" and "llmops" in found["secrets"].fix

        emulator.client.catalogs.create("llm_dev")
        me = emulator.client.current_user.me().user_name
        emulator.client.grants.update("CATALOG", "llm_dev", changes=[PermissionsChange(add=[Privilege.USE_CATALOG], principal=me)])
        found = states()
        assert found["catalog"].state == "ok"
        def rights():  # the emulator gives each catalog to whoever asks
            return _rights_in(emulator.client, "CATALOG", "llm_dev", "somebody-else", NEEDED)[0]
        assert rights().state == "fail" and f"GRANT CREATE SCHEMA ON CATALOG llm_dev TO `{me}`" in rights().fix
        emulator.client.grants.update(
            "CATALOG", "llm_dev", changes=[PermissionsChange(add=[Privilege.CREATE_SCHEMA], principal="another-user")]
        )
        assert rights().state == "fail", "what somebody else may do is not what we may"
        emulator.client.grants.update("CATALOG", "llm_dev", changes=[PermissionsChange(add=[Privilege.CREATE_SCHEMA], principal=me)])
        emulator.client.secrets.create_scope("llmops")
        emulator.client.secrets.put_secret("llmops", "traces", string_value="x")
        found = states()
        assert found["secrets"].state == rights().state == "ok"
    finally: emulator.process.terminate(); emulator.process.wait(); emulator.log.close()


def test_todo_names_the_sample_until_it_is_gone(upstream, tmp_path):
    fork = clone_of(upstream, tmp_path / "fork")
    assert fork.inside(*INIT, "--no-smoke").returncode == 0
    def todo():
        return {f["about"]: f["state"] for f in json.loads(called(fork, "todo", "--json").stdout)["findings"]}
    first = todo()
    assert first["name"] == "ok" and {
        first[about] for about in ("corpus", "questions", "data/prompts", "data/regressions.jsonl", "prices", "reviewers", "README.md")
    } == {"note"}
    questions = fork.root / "data" / "questions.jsonl"
    lines = questions.read_text().splitlines(keepends=True)
    questions.write_text("".join(lines[:20]) + lines[20].replace('"split"', '"status": "draft", "split"'))
    (fork.root / "settings.ini").write_text(
        (fork.root / "settings.ini")
        .read_text()
        .replace("corpus = packages ", "corpus = documents ")
        .replace("reviewers = ", "reviewers = ada ")
    )
    shutil.rmtree(fork.root / "data" / "prompts")
    page = fork.root / "nbs" / "index.ipynb"
    page.write_text(page.read_text().replace("TODO", "Here is").replace("Nothing has run yet.", "Right answers: 50%"))
    write_readme(fork.root)
    second = todo()
    assert (
        second["corpus"] == second["questions"] == second["README.md"] == "ok"
        and second["drafts"] == "note"
        and "reviewers" not in second
        and "data/prompts" not in second
    )
    shutil.rmtree(fork.root / ".git")
    third = todo()
    assert (
        third["data"] == third["drafts"] == "note" and "data/red_team.jsonl" not in third
    ), "without the commit that was taken over, what needs no comparison is still said"
