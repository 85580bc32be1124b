"""What people, editors, git and a full disk do to files: it is read, or named with what to do."""
import contextlib, errno, shutil, sqlite3, subprocess

import pytest

from conftest import ROOT, copy_of
from llmops_ref.assistant.prompt_registry import designs
from llmops_ref.core.config import load_config
from llmops_ref.core.files import write_atomic
from llmops_ref.core.workspace import open_workspace
from llmops_ref.evaluation.questions import add_question, load_questions
from llmops_ref.kit.fork import write_setting
from llmops_ref.models.catalog import read_models
from llmops_ref.runner.plan import STAGES, preflight


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_of_an_editor_on_windows_are_read(project, encoding):
    "Settings, questions, cases, prompts, models and notebooks; what we change in them is UTF-8 from then on."
    root, before = project.root, load_config("dev", project.root)
    names = ["settings.ini", "data/models.toml", "data/questions.jsonl", "data/red_team.jsonl", "data/regressions.jsonl", "pyproject.toml"]
    names += [f"data/prompts/{path.name}" for path in (root / "data" / "prompts").glob("*.md")] + ["nbs/02_corpus.ipynb"]
    for name in names: (root / name).write_bytes((root / name).read_text(encoding="utf-8").replace("\n", "\r\n").encode(encoding))
    config = load_config("dev", root)
    assert config == before and read_models(config) == read_models(load_config("dev", ROOT)) and designs(open_workspace(config))
    preflight(open_workspace(config), [STAGES[1]])
    add_question(root / config.questions, "Wie heißt der Befehl für Läufe?", ["mlflow.start_run"], "`mlflow.start_run` [1].", "howto")
    write_setting(root, "seed", "18")
    assert load_config("dev", root).seed == 18 and load_questions(root / config.questions, drafts=True).question.iloc[-1].startswith("Wie heißt")
    for name in ("settings.ini", config.questions): (root / name).read_bytes().decode("utf-8")


SPOILED = {
    "data/questions.jsonl": b'{"question": "Caf\xe9?"}\n', "data/red_team.jsonl": b"<<<<<<< HEAD\n", "data/regressions.jsonl": b"caf\xe9\n",
    "data/models.toml": b"=======\n>>>>>>> theirs\n", "data/prompts/plain.md": b"Caf\xe9\n", "nbs/04_prompts.ipynb": b"<<<<<<< HEAD\n",
    "settings.ini": b"; caf\xe9\n", "pyproject.toml": b"<<<<<<< HEAD\n",
}

@pytest.mark.parametrize("name", SPOILED)
def test_bytes_that_are_no_text_and_conflicts_are_named_before_a_run(project, name):
    "With file, line and what to do, by a run and by the doctor."
    path = project.root / name
    path.write_bytes(path.read_bytes().rstrip(b"\n") + b"\n" + SPOILED[name])
    line = path.read_bytes()[:path.read_bytes().index(SPOILED[name][-6:])].count(b"\n") + 1
    remedy = "Save the file as UTF-8" if b"\xe9" in SPOILED[name] else "git left a conflict there"
    for command in ("run", "doctor"):
        done = project.inside(command, "--env", "dev")
        said = " ".join((done.stdout + done.stderr).split())
        assert done.returncode == 1 and f"{path.name}, line {line}" in said and remedy in said, (command, said)


def test_without_git_the_commit_is_unknown_and_what_needs_git_says_so(project, tmp_path, monkeypatch):
    "`status` and the plan of a run ask for no git at all."
    monkeypatch.setitem(project.environment, "PATH", str(tmp_path))
    for words in ("status", "run --dry-run"): assert project.inside(*words.split(), "--env", "dev").returncode == 0
    done = project.inside("upgrade")
    assert done.returncode == 1 and "The command git is not installed" in done.stderr, done.stderr


def test_a_database_of_another_mlflow_is_named(finished, tmp_path):
    "MLflow's own database; that of a newer one is left as it is."
    project = copy_of(finished, tmp_path)
    file = project.root / "stores" / "staging" / "mlflow.db"
    with contextlib.closing(sqlite3.connect(file)) as tables, tables: tables.execute("UPDATE alembic_version SET version_num = 'f00d'")
    before = file.read_bytes()
    for command in ("versions", "doctor"):
        done = project.inside(command, "--env", "staging")
        assert done.returncode == 1 and "of a newer MLflow than our" in done.stdout + done.stderr, done.stdout + done.stderr
    assert file.read_bytes() == before


def test_a_full_disk_leaves_no_half_of_a_file(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode: pytest.skip("may not mount")
    try:
        write_atomic(disk / "note.txt", "whole")
        with pytest.raises(OSError) as full: write_atomic(disk / "note.txt", b"0" * 200_000)
        assert full.value.errno == errno.ENOSPC and [p.name for p in disk.iterdir()] == ["note.txt"]
        assert (disk / "note.txt").read_text() == "whole"
    finally: subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_make_knows_an_environment_that_came_from_another_folder(tmp_path):
    "Its commands name the other folder's Python. One of our own is left, as is one that does not say where it was made."
    (tmp_path / ".venv").mkdir()
    for name in ("Makefile", "requirements.lock", "pyproject.toml"): shutil.copy(ROOT / name, tmp_path)
    def planned(stamp):
        (tmp_path / ".venv" / "installed").write_text(stamp)
        return subprocess.run(["make", "-n", "setup"], cwd=tmp_path, capture_output=True, text=True).stdout
    assert "rm -rf .venv" in planned("/where/it/was\n")
    assert "rm -rf" not in planned(f"{tmp_path.resolve()}\n") + planned("")
