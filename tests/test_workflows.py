"""The workflows, without GitHub: what they may do, that they call only what exists, and their shell, run with stand-ins for `gh`, `curl` and `databricks`."""
import io, json, os, re, shlex, shutil, stat, subprocess, tarfile
from pathlib import Path

import pytest, typer, yaml
from databricks.sdk.core import Config
from databricks.sdk.credentials_provider import DefaultCredentials
from databricks.sdk.oidc_token_supplier import AzureDevOpsOIDCTokenSupplier

from conftest import BIN, ROOT
from llmops_ref.commands.cli import app
from llmops_ref.core.config import explain, load_config

FOLDER, GUIDE = ROOT / ".github" / "workflows", (ROOT / "nbs" / "guides" / "ci.md").read_text()
WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("*.yaml"))}
JOBS = {(file, name): job for file, workflow in WORKFLOWS.items() for name, job in workflow["jobs"].items()}
AZURE, GITLAB = (yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", GUIDE, re.M | re.S))
BUNDLE = yaml.safe_load((ROOT / "databricks.yml").read_text())
RESOURCES = {
    key
    for path in (ROOT / "resources").glob("*.yml")
    for kind in ("jobs", "apps")
    for key in yaml.safe_load(path.read_text())["resources"].get(kind, {})
}

# Who may write what. Whoever adds a line here has thought about it.
MAY_WRITE = {
    ("test.yaml", "comment"): {"pull-requests"}, ("newest.yaml", "badge"): {"contents"},
    ("docs.yaml", "publish"): {"pages", "id-token"}, ("test.yaml", "staging"): {"id-token"},
    ("release.yaml", "prod"): {"id-token"}, ("deploy.yaml", "deploy"): {"id-token"},
}


def triggers(workflow): return workflow[True]                 # YAML takes `on` for yes
def steps(job): return job.get("steps", [])
def azure_steps(stage):
    return [step for job in stage["jobs"] for step in (job.get("steps") or job["strategy"]["runOnce"]["deploy"]["steps"])]

SCRIPTS = [(f"{file} {name} {n}", step["run"]) for (file, name), job in JOBS.items() for n, step in enumerate(steps(job)) if "run" in step]
SCRIPTS += [
    (f"azure {stage['stage']} {n}", step["script"])
    for stage in AZURE["stages"]
    for n, step in enumerate(azure_steps(stage))
    if "script" in step
]
SCRIPTS += [
    (f"gitlab {name}", "\n".join([*job.get("before_script", []), *job.get("script", []), *job.get("after_script", [])]))
    for name, job in GITLAB.items()
    if isinstance(job, dict) and {"script", "before_script"} & job.keys()
]
SCRIPTS += [("devcontainer", json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())["postCreateCommand"])]

COMMAND = re.compile(
    r"""(?:^|[;&|({!]|\bthen|\bif)\s*(?:[A-Z_]+=\S+\ )*(make|(?:\.venv/bin/)?llmops|databricks)((?:\ +(?:"[^"]*"|[^\s|;&)>"]+))+)""",
    re.M | re.X,
)
def commands(script: str) -> list[tuple[str, list[str]]]:     # (make, llmops or databricks; its words)
    "What a script calls, where a shell would look for a command; options that stand in ${NAME:+...} count."
    return [
        (program.rpartition("/")[2], shlex.split(words))
        for program, words in COMMAND.findall(re.sub(r"\$\{\w+:\+([^}]*)\}", r"\1", script))
    ]


# --- what they may do

def test_every_action_is_pinned_by_its_commit():
    "By 40 digits, with the version beside them, and the same ones everywhere; a tag can be moved to other code."
    pins = {}
    for path in FOLDER.glob("*.yaml"):
        for used in re.findall(r"^\s*(?:- )?uses:\s*(.+)$", path.read_text(), re.M):
            if used.startswith("./"): assert (ROOT / used).is_file(), used; continue
            pin = re.fullmatch(r"([\w.-]+/[\w./-]+)@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)", used)
            assert pin, f"{path.name}: {used} is not pinned by 40 digits with its version in a comment"
            assert pins.setdefault(pin[1], pin.groups()[1:]) == pin.groups()[1:], f"{pin[1]} is pinned to two commits"
    assert (
        len(pins) >= 3
        and yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text())["updates"][0]["package-ecosystem"] == "github-actions"
    )


def test_each_job_may_do_no_more_than_it_needs():
    for file, workflow in WORKFLOWS.items(): assert workflow["permissions"] == {}, f"{file} grants something to every job"
    for where, job in JOBS.items():
        granted = job["permissions"]
        assert set(granted.values()) <= {"read", "write"} and {
            scope for scope, level in granted.items() if level == "write"
        } == MAY_WRITE.get(where, set()), where
        if MAY_WRITE.get(where, set()) - {"id-token"}:
            assert not any(
                "checkout" in step.get("uses", "") or re.search(r"\bmake\b(?! (run|test|test-all) \$)|\.venv", step.get("run", ""))
                for step in steps(job)
            ), f"{where} holds a token that may write, and runs code of the repository"
        if "uses" in job:
            assert all(
                called["permissions"].items() <= granted.items() for called in WORKFLOWS[Path(job["uses"]).name]["jobs"].values()
            ), "what is called gets what it asks for"


def test_a_stranger_gets_nothing():
    "No run with our rights on a pull request, nothing from an event in a shell, no credentials left in a clone."
    for file, workflow in WORKFLOWS.items():
        assert not {"pull_request_target", "workflow_run", "issue_comment"} & set(triggers(workflow)), file
    for where, script in SCRIPTS: assert "${{" not in script, f"{where}: hand it over in `env`; in `run` it would be shell"
    for where, job in JOBS.items():
        for step in steps(job):
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False and "ref" not in step["with"], where


def test_nothing_is_stored():
    "No secret, and the names that Databricks' own code reads."
    texts = {path.name: path.read_text() for path in FOLDER.glob("*.yaml")} | {"guide": GUIDE}
    known = {attribute.env for attribute in Config.attributes() if attribute.env} | {"DATABRICKS_OIDC_TOKEN"}
    kinds = {provider.auth_type() for provider in DefaultCredentials()._auth_providers}
    for name, text in texts.items():
        assert not re.search(r"\bsecrets\.\w|DATABRICKS_TOKEN\b|CLIENT_SECRET", text), f"{name} uses a stored secret"
        assert set(re.findall(r"\bDATABRICKS_[A-Z_]+\b", text)) <= known, name
    assert [
        JOBS["deploy.yaml", "deploy"]["env"]["DATABRICKS_AUTH_TYPE"],
        AZURE["variables"]["DATABRICKS_AUTH_TYPE"],
        GITLAB[".databricks"]["variables"]["DATABRICKS_AUTH_TYPE"],
    ] == ["github-oidc", "azure-devops-oidc", "env-oidc"]
    assert {"github-oidc", "azure-devops-oidc", "env-oidc"} <= kinds


def test_nothing_runs_for_ever_or_twice():
    for where, job in JOBS.items(): assert "uses" in job or 0 < job["timeout-minutes"] <= 360, where
    for file, workflow in WORKFLOWS.items(): assert "workflow_call" in triggers(workflow) or workflow["concurrency"]["group"], file
    assert JOBS["deploy.yaml", "deploy"]["concurrency"] == {
        "group": "deploy-${{ inputs.target }}",
        "cancel-in-progress": False,
    }, "a deployment is not stopped half-way by the next one"
    assert (
        WORKFLOWS["test.yaml"]["concurrency"]["cancel-in-progress"] == "${{ github.event_name == 'pull_request' }}"
    ), "the workflow of a push deploys"


def test_what_is_deployed_was_tested():
    staging, prod = JOBS["test.yaml", "staging"], JOBS["release.yaml", "prod"]
    assert (
        set(staging["needs"]) == {"test", "run"}
        and staging["if"] == "github.event_name == 'push'"
        and triggers(WORKFLOWS["test.yaml"])["push"] == {"branches": ["main"]}
    )
    assert prod["needs"] == ["tested", "everything"] and triggers(WORKFLOWS["release.yaml"]) == {"release": {"types": ["released"]}}
    assert (
        staging["uses"] == prod["uses"] == "./.github/workflows/deploy.yaml"
        and {staging["with"]["target"], prod["with"]["target"]} == {"staging", "prod"} <= BUNDLE["targets"].keys()
    )
    assert (
        JOBS["deploy.yaml", "deploy"]["environment"] == "${{ inputs.target }}"
    ), "the environment holds the reviewers and is the subject of the policy"


# --- what they call

@pytest.mark.parametrize("where, script", SCRIPTS, ids=[where.replace(" ", "-") for where, _ in SCRIPTS])
def test_what_is_called_exists(where, script):
    "Targets and variables of the Makefile, commands and options of llmops, targets and jobs of the bundle; and bash can read it."
    makefile = (ROOT / "Makefile").read_text()
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    for program, words in commands(script):
        if program == "make":
            for word in words:
                assert re.search(
                    rf"^{re.escape(word)}:|^{re.escape(word)} *\?=" if "=" not in word else rf"^{word.split('=')[0]} *\?=", makefile, re.M
                ), f"the Makefile has no {word}"
        elif program == "llmops":
            command = typer.main.get_command(app)
            while hasattr(command, "commands"):
                assert words and words[0] in command.commands, f"llmops has no command {words[:1]}"
                command, words = command.commands[words[0]], words[1:]
            command.make_context(command.name, list(words))                        # names an option that is not there
        elif words[0] == "bundle":
            assert words[1] in ("deploy", "run", "destroy") and words[words.index("-t") + 1] in {*BUNDLE["targets"], "$TARGET"}
            assert words[1] != "run" or words[2] in RESOURCES, f"the bundle has no {words[2]}"
        else: assert words[:2] in (["fs", "cp"], ["auth", "login"]), words


def test_the_check_of_commands_sees_them():
    found = [words for _, script in SCRIPTS for words in commands(script)]
    assert (
        ("make", ["test", "TORCH=cpu"]) in found
        and ("llmops", ["summary", "--env", "dev", "--against", "main-run"]) in found
        and ("databricks", ["bundle", "deploy", "-t", "$TARGET"]) in found
    )
    assert ("llmops", ["config", "--env", "staging", "--json"]) in found and not any(
        "min" in " ".join(words) for program, words in found if program == "make"
    ), "what is only printed is no command"


def test_the_guide_names_what_there_is():
    "Variables are those of the bundle; the token that Azure's steps ask for is the one that Databricks' code looks for."
    named = set(re.findall(r"BUNDLE_VAR_([A-Z_]+)\b", GUIDE))
    assert {"APPROVERS", "CATALOG"} <= named and {name.lower() for name in named} <= BUNDLE["variables"].keys()
    assert {name for _, script in SCRIPTS for name in re.findall(r"BUNDLE_VAR_([a-z_]+)=", script)} | {
        name.removeprefix("BUNDLE_VAR_") for job in JOBS.values() for name in job.get("env", {}) if name.startswith("BUNDLE_VAR_")
    } <= BUNDLE["variables"].keys()
    for link in re.findall(r"\]\((\.\./[^)]+)\)", GUIDE): assert (ROOT / "nbs" / "guides" / link).resolve().exists(), link
    with pytest.raises(ValueError, match="SYSTEM_ACCESSTOKEN"): AzureDevOpsOIDCTokenSupplier()
    for stage in AZURE["stages"]:
        for step in azure_steps(stage):
            if any(program == "databricks" for program, _ in commands(step.get("script", ""))):
                assert step["env"]["SYSTEM_ACCESSTOKEN"] == "$(System.AccessToken)" and "BUNDLE_VAR_service_principal" in step["env"]


# --- their shell, run

class Machine:
    "As much of GitHub's runner as our steps use: expressions in `env` and `if`, outputs, the summary, and stand-ins that write down how they were called."
    def __init__(self, folder: Path, **context):               # context: "github.event_name", "inputs.target", "vars" ...
        if missing := [name for name in ("jq", "git") if not shutil.which(name)]:
            pytest.skip(f"needs {missing[0]}, which the machines of GitHub have")
        self.root, self.context, self.log, self.failed, self.said, self.outputs, self.outcomes = (
            folder, {"vars": {}} | context, folder / ".calls", False, "", {}, {},
        )
        self.environment = dict(
            PATH=f"{folder / 'bin'}:{os.environ['PATH']}", HOME=str(folder), RUNNER_TEMP=str(folder / "temp"),
            GITHUB_REPOSITORY="ann/desk", GITHUB_RUN_ID="77", GITHUB_SHA="f00d", GITHUB_ACTOR="ann",
            GITHUB_SERVER_URL=f"file://{folder}/github", GH_TOKEN="t", GITHUB_HEAD_REF="", GIT_CONFIG_GLOBAL="/dev/null",
        )
        for name in ("PATH", "ENV", "OUTPUT", "STEP_SUMMARY"):
            self.environment[f"GITHUB_{name}"] = str(folder / f".{name}")
            (folder / f".{name}").touch()
        for program in ("make", "gh", "curl"): self.stand_in(program)

    def stand_in(self, name: str, body: str = "", where: str = "bin"):
        "A program that notes its name and words, and then does what `body` says; it fails where the file `fail` holds the beginning of what it was called with."
        path = self.root / where / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f'#!/bin/bash\ncall="{name} $*"\necho "$call" >> {self.log}\nif [ -s {self.root}/fail ] && [[ "$call" == "$(cat'
            f' {self.root}/fail)"* ]]; then exit 1; fi\n{body}\n'
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def calls(self, *programs: str) -> list[str]:
        return [
            line for line in (self.log.read_text().splitlines() if self.log.exists() else []) if not programs or line.split()[0] in programs
        ]

    def value(self, path: str):
        if path == "toJSON(vars)": return json.dumps(self.context["vars"])
        kind, _, rest = path.partition(".")
        if kind == "vars": return self.context["vars"].get(rest, "")
        if kind == "steps":
            _, step, what, *name = path.split(".")
            return self.outcomes.get(step, "skipped") if what == "outcome" else self.outputs.get(step, {}).get(name[0], "")
        return self.context.get(path, "")

    def fill(self, text) -> str: return re.sub(r"\$\{\{\s*(.+?)\s*\}\}", lambda m: str(self.value(m[1])), str(text))

    def wanted(self, condition: str) -> bool:
        "Whether a step runs; without always() or cancelled() only if nothing failed before."
        text = re.sub(r"^\$\{\{\s*|\s*\}\}$", "", str(condition or ""))
        if self.failed and not re.search(r"always\(\)|cancelled\(\)", text): return False
        text = re.sub(
            r"'[^']*'|[a-z_]+(?:\.[\w-]+)+",
            lambda m: m[0] if m[0].startswith("'") else repr(self.value(m[0])),
            text.replace("always()", "True").replace("!cancelled()", "True").replace("&&", " and ").replace("||", " or "),
        )
        return not text or bool(eval(text))

    def run(self, job: dict, only: str | None = None) -> "Machine":
        "The steps of a job that have a script, in order; or only the one whose name begins so."
        for step in steps(job):
            if only and not step.get("name", "").startswith(only): continue
            if not self.wanted(step.get("if")): continue
            if "run" not in step: continue
            given = {key: self.fill(value) for key, value in {**job.get("env", {}), **step.get("env", {})}.items()}
            done = subprocess.run(
                ["bash", "-e", "-c", step["run"]], cwd=self.root, env=self.environment | given, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, timeout=60,
            )
            self.said += done.stdout
            self.failed = self.failed or done.returncode != 0
            self.outcomes[step.get("id", "")] = "failure" if done.returncode else "success"
            if "id" in step: self.outputs[step["id"]] = dict(line.split("=", 1) for line in self.read(".OUTPUT").splitlines())
            self.environment |= dict(line.split("=", 1) for line in self.read(".ENV").splitlines())
            for folder in self.read(".PATH").splitlines(): self.environment["PATH"] = f"{folder}:{self.environment['PATH']}"
            for name in (".OUTPUT", ".ENV", ".PATH"): (self.root / name).write_text("")
        return self

    def read(self, name): return (self.root / name).read_text()
    @property
    def summary(self): return self.read(".STEP_SUMMARY")


@pytest.fixture
def machine(tmp_path): return lambda **context: Machine(tmp_path, **{key.replace("__", "."): value for key, value in context.items()})


@pytest.fixture(scope="session")
def planned():
    "What `llmops bundle plan` says of an environment whose catalog has another name."
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LLMOPS_", "BUNDLE_VAR_"))} | dict(
        BUNDLE_VAR_service_principal="5e0c", BUNDLE_VAR_approvers="leads", BUNDLE_VAR_catalog="main"
    )
    return subprocess.run(
        [str(BIN / "llmops"), "bundle", "plan", "--env", "staging", "--json"], cwd=ROOT, env=environment,
        capture_output=True, text=True, check=True,
    ).stdout


HOST, DEPLOY = dict(DATABRICKS_HOST="https://x.example", DATABRICKS_CLIENT_ID="5e0c"), JOBS["deploy.yaml", "deploy"]

def site(machine, target, planned, serving_token="", **variables):
    "A machine with everything that the job `deploy` calls."
    here = machine(inputs__target=target, vars=variables)
    shutil.copy(ROOT / "requirements.lock", here.root)
    program = here.stand_in(
        "databricks", 'if [ "$1 $2" = "fs cp" ]; then mkdir -p "$5/1" "$5/2"; echo "the last run" > "$5/2/summary.md"; fi', "kept"
    ).read_bytes()
    with tarfile.open(here.root / "databricks.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("databricks"); entry.size, entry.mode = len(program), 0o755
        archive.addfile(entry, io.BytesIO(program))
    here.stand_in("curl", f"cat {here.root}/databricks.tar.gz")
    settings = dict(
        settings=[
            row | (dict(value=serving_token) if row["key"] == "serving_token" else {}) for row in explain(load_config("staging", ROOT))
        ]
    )
    (here.root / "plan.json").write_text(planned); (here.root / "settings.json").write_text(json.dumps(settings, default=str))
    here.stand_in(
        "llmops",
        f'echo "catalog $LLMOPS_CATALOG $BUNDLE_VAR_catalog" >> {here.root}/catalogs\ncase "$*" in *plan*--json) cat'
        f' {here.root}/plan.json;; config*) cat {here.root}/settings.json;; esac',
        ".venv/bin",
    )
    return here


def done(here):
    return [call for call in here.calls("databricks", "llmops") if not re.match(r"llmops (config|bundle plan)|databricks fs", call)]

STAGING = [
    "databricks bundle deploy -t staging", "databricks bundle run smoke -t staging", "databricks bundle run data_and_index -t staging",
    "databricks bundle run finetune -t staging", "llmops bundle connect --env staging",
    "databricks bundle run deployment -t staging",
]
REMOVED = ["llmops destroy --env staging --platform databricks --yes", "databricks bundle destroy -t staging --auto-approve"]
PROD = [
    "databricks bundle deploy -t prod", "databricks bundle run smoke -t prod", "llmops bundle connect --env prod",
    "databricks bundle run data_and_index -t prod", "databricks bundle run finetune -t prod",
]


@pytest.mark.parametrize("target", ["staging", "prod"])
def test_without_a_workspace_it_says_so_and_does_nothing(machine, target):
    here = machine(inputs__target=target).run(DEPLOY)
    assert not here.failed and here.calls() == [] and here.said.count("\n") == 1
    assert here.said.startswith(f"Nothing is deployed to {target}: there is no variable DATABRICKS_HOST") and here.summary == here.said


@pytest.mark.parametrize(
    "target, variables, missing",
    [("staging", dict(DATABRICKS_HOST="https://x.example"), "DATABRICKS_CLIENT_ID"), ("prod", HOST, "BUNDLE_VAR_APPROVERS")],
)
def test_half_a_workspace_is_a_failure(machine, target, variables, missing):
    "A release that is green and deployed nothing would be worse."
    here = machine(inputs__target=target, vars=variables).run(DEPLOY)
    assert here.failed and here.calls() == [] and f"no {missing}. Set it" in here.said


def test_staging_is_deployed_run_and_removed(machine, planned):
    here = site(machine, "staging", planned, **HOST, BUNDLE_VAR_CATALOG="main", OTHER="x").run(DEPLOY)
    assert not here.failed, here.said
    assert done(here) == STAGING + REMOVED and here.calls("make") == ["make setup TORCH=cpu"]
    version = re.search(r"^databricks-bundles==(.+)$", (ROOT / "requirements.lock").read_text(), re.M)[1]
    assert f"/v{version}/databricks_cli_{version}_linux_amd64.tar.gz" in here.calls("curl")[0]
    assert set(here.read("catalogs").splitlines()[2:]) == {"catalog main main"}, "llmops looks where the bundle was deployed to"
    assert (
        here.environment["LLMOPS_EXPERIMENT"].startswith("/Shared/")
        and "BUNDLE_VAR_catalog" in here.environment
        and "OTHER" not in here.environment
    )
    assert "serving_token is empty" in here.summary and "the last run" in here.summary


def test_monitoring_runs_in_staging_where_there_are_traces(machine, planned):
    here = site(machine, "staging", planned, serving_token="trace_writer", **HOST).run(DEPLOY)
    assert done(here) == [*STAGING, "databricks bundle run monitoring -t staging", *REMOVED]


@pytest.mark.parametrize(
    "broken, left",
    [
        ("databricks bundle deploy", STAGING[:1] + REMOVED), ("databricks bundle run smoke", STAGING[:2] + REMOVED),
        ("databricks bundle run finetune", STAGING[:4] + REMOVED),
        ("llmops destroy", STAGING + REMOVED), ("make setup", []),
    ],
)
def test_staging_is_removed_however_it_went(machine, planned, broken, left):
    "If it was begun: what could not be installed has deployed nothing."
    here = site(machine, "staging", planned, **HOST)
    (here.root / "fail").write_text(broken)
    assert (
        here.run(DEPLOY).failed and done(here) == left and ("the last run" in here.summary) == bool(left)
    ), "what there was to see is kept"


def test_prod_ends_at_a_person(machine, planned):
    "The model is connected before a version can be made, and nothing is ever removed."
    here = site(machine, "prod", planned, **HOST, BUNDLE_VAR_APPROVERS="leads").run(DEPLOY)
    assert not here.failed and done(here) == PROD, here.said
    assert here.environment["BUNDLE_VAR_approvers"] == "leads" and "waits for one of the approvers" in here.summary


def test_the_guide_deploys_as_we_do():
    "Azure DevOps and GitLab run the same commands in the same order."
    said = lambda script: [f"{program} {' '.join(words)}" for program, words in commands(script) if program != "make"]
    azure = {stage["stage"]: [call for step in azure_steps(stage) for call in said(step.get("script", ""))] for stage in AZURE["stages"]}
    assert azure["staging"] == STAGING + REMOVED and azure["prod"] == PROD
    assert [said("\n".join(GITLAB[name]["script"])) for name in ("staging", "remove", "prod")] == [STAGING, REMOVED, PROD]
    install = next(step["run"] for step in steps(DEPLOY) if "requirements.lock" in step.get("run", "")).splitlines()[:3]
    for script in [
        *(step["script"] for stage in AZURE["stages"] for step in azure_steps(stage) if "requirements.lock" in step.get("script", "")),
        "\n".join(GITLAB[".databricks"]["before_script"]),
    ]:
        assert all(line in script for line in install)


def test_gitlab_skips_in_one_line(tmp_path):
    script = "\n".join([*GITLAB[".databricks"]["before_script"], *GITLAB["staging"]["script"]])
    skipped = subprocess.run(
        ["bash", "-e", "-c", script], cwd=tmp_path, env=dict(PATH=os.environ["PATH"], CI_ENVIRONMENT_NAME="staging"),
        capture_output=True, text=True,
    )
    assert (skipped.returncode, skipped.stdout, skipped.stderr) == (
        0,
        "Nothing is deployed: there is no variable DATABRICKS_HOST for the environment staging.\n",
        "",
    )


# --- the numbers of a pull request

def test_the_newest_run_of_main_that_is_kept(machine):
    "Pushes to main only: a fork may call its branch main, too. Artifacts end; then one line, and no failure."
    here = machine(github__event_name="pull_request")
    here.stand_in(
        "gh",
        f'case "$1 $2" in "run list") printf "3\\n2\\n1\\n";; "run download") [ "$3" = "$(cat {here.root}/kept)" ] || exit 1; mkdir -p'
        ' main-run; echo "$3" > main-run/run.json;; esac',
    )
    for kept, got in (("2", "2\n"), ("none", None)):
        shutil.rmtree(here.root / "main-run", ignore_errors=True); here.log.unlink(missing_ok=True); here.said = ""
        (here.root / "kept").write_text(kept)
        assert not here.run(JOBS["test.yaml", "run"], "Fetch").failed, here.said
        assert (here.read("main-run/run.json") if got else None) == got and (here.said == "") == bool(got)
    assert (
        "--branch main --event push" in here.calls("gh")[0]
        and len(here.calls("gh")) == 4
        and here.said == "No run of main is kept, so there is nothing to compare with.\n"
    )
    assert machine(github__event_name="push").run(JOBS["test.yaml", "run"], "Fetch").said == "", "main compares with nothing"


@pytest.mark.parametrize("branch, called", [("", "llmops summary --env dev"), ("try-it", "llmops summary --env dev --against main-run")])
def test_the_summary(machine, branch, called):
    here = machine()
    here.environment["GITHUB_HEAD_REF"] = branch
    here.stand_in("llmops", "echo '| number | main | this |'", ".venv/bin")
    assert (
        not here.run(JOBS["test.yaml", "run"], "Put the numbers").failed
        and here.summary == "The run left no report. The log says where it stopped.\n"
    )
    (here.root / "runs/dev/1").mkdir(parents=True)
    (here.root / "runs/dev/1/run.json").write_text("{}")
    (here.root / "runs/dev/latest").symlink_to("1")
    assert not here.run(JOBS["test.yaml", "run"], "Put the numbers").failed, here.said
    assert (
        here.calls("llmops") == [called]
        and here.summary.endswith("| number | main | this |\n")
        and here.read("report/run.json") == "{}"
        and "main" in here.read("report/comment.md")
    )


MARK = re.search(r'mark="(.+)"', (FOLDER / "test.yaml").read_text())[1]

@pytest.fixture
def comment(machine):
    "Runs the step that comments, on a pull request that has the comments given; says what was sent to GitHub."
    def run(comments, head="ann/desk", actor="ann", report="| a table |"):
        here = machine(github__event__pull_request__number=5, github__event__pull_request__head__repo__full_name=head)
        here.environment["GITHUB_ACTOR"] = actor
        (here.root / "comments.json").write_text(json.dumps(comments))
        (here.root / "report.md").write_text(report or "")
        here.stand_in(
            "gh",
            f'if [ "$1 $2" = "run download" ]; then [ -s {here.root}/report.md ] || exit 1; mkdir -p report; cp {here.root}/report.md'
            f' report/comment.md; fi\nfor word in "$@"; do if [ "$before" = --jq ]; then jq -r "$word" {here.root}/comments.json; fi;'
            ' before=$word; done',
        )
        assert not here.run(JOBS["test.yaml", "comment"]).failed, here.said
        return here, [call for call in here.calls("gh") if "--method" in call]
    return run


def by(who, body, id): return dict(id=id, user=dict(login=who), body=body)

BOT = "github-actions[bot]"

@pytest.mark.parametrize(
    "comments, sent",
    [
        ([], "--method POST repos/ann/desk/issues/5/comments"),
        (
            [by("ann", "Nice.", 1), by(BOT, f"{MARK}\nold numbers", 2), by(BOT, "Another workflow's", 3)],
            "--method PATCH repos/ann/desk/issues/comments/2",
        ),
        ([by("mallory", f"{MARK}\nmade up", 1), by(BOT, f"I quote: {MARK}", 2)], "--method POST repos/ann/desk/issues/5/comments"),
    ],
    ids=["first", "again", "not-ours"],
)
def test_one_comment_which_is_brought_up_to_date(comment, comments, sent):
    here, calls = comment(comments)
    assert len(calls) == 1 and sent in calls[0] and calls[0].endswith("body=@body.md")
    assert here.read("body.md").startswith(f"{MARK}\n| a table |") and "/ann/desk/actions/runs/77" in here.read("body.md")


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(head="eve/desk"), "from a fork or from Dependabot"),
        (dict(actor="dependabot[bot]"), "from a fork or from Dependabot"),
        (dict(report=None), "the run left no report"),
    ],
)
def test_no_comment_is_one_line(comment, given, says):
    here, calls = comment([], **given)
    assert calls == [] and here.said.count("\n") == 1 and here.said.startswith("No comment: ") and says in here.said
    assert "report" in given or here.calls("gh") == [], "a fork's token is not even tried"


# --- the rest

@pytest.mark.parametrize("url, goes", [("https://github.com/ann/desk/actions/runs/1", True), ("", False)])
def test_only_what_passed_on_main_is_released(machine, url, goes):
    here = machine()
    here.stand_in("gh", f"echo '{url}'")
    assert here.run(JOBS["release.yaml", "tested"]).failed != goes
    assert (
        "--workflow test.yaml --branch main --event push --commit f00d --status success" in here.calls("gh")[0]
        and (url or "no green run") in here.said
    )


@pytest.mark.parametrize(
    "run, test, colour, says",
    [
        ("6", "58", "brightgreen", r"\d{4}-\d\d-\d\d: make run 6 min, make test-all 58 min"),
        ("6", "", "red", r"\d{4}-\d\d-\d\d: failed"),
        ("", "", "red", r"\d{4}-\d\d-\d\d: failed"),
    ],
)
def test_the_badge(machine, run, test, colour, says):
    "A branch with one file and no history, pushed to a repository that is there; a failure is shown, with its date."
    here = machine(needs__newest__outputs__test=test)
    there = here.root / "github" / "ann" / "desk"
    git = lambda *words: subprocess.run(["git", "--git-dir", str(there), *words], capture_output=True, text=True, check=True).stdout
    subprocess.run(["git", "init", "--quiet", "--bare", str(there)], check=True)
    for minutes in ("99", run):
        shutil.rmtree(here.root / "badges", ignore_errors=True)
        here.context["needs.newest.outputs.run"] = minutes
        assert not here.run(JOBS["newest.yaml", "badge"]).failed, here.said
    badge = json.loads(git("show", "badges:newest.json"))
    assert badge == dict(schemaVersion=1, label="newest dependencies", message=badge["message"], color=colour) and re.fullmatch(
        says, badge["message"]
    )
    assert (
        git("rev-list", "--count", "badges") == "1\n"
        and git("ls-tree", "--name-only", "badges") == "newest.json\n"
        and here.summary.endswith(f"{badge['message']}\n")
    )
    assert JOBS["newest.yaml", "badge"]["if"] == "${{ !cancelled() }}" and "/badges/newest.json" in GUIDE


def test_minutes_are_those_of_what_succeeded(machine):
    here = machine()
    (here.root / "fail").write_text("make test-all")
    newest = JOBS["newest.yaml", "newest"]
    here.run(dict(newest, steps=[step for step in steps(newest) if step.get("id")]))
    assert here.failed and here.calls("make") == ["make run TORCH=cpu", "make test-all TORCH=cpu"]
    assert list(here.outputs["run"]) == ["minutes"] and here.outputs["run"]["minutes"].isdigit() and here.outputs["test"] == {}
    assert newest["outputs"] == {name: f"${{{{ steps.{name}.outputs.minutes }}}}" for name in ("run", "test")}


@pytest.mark.parametrize("variable, built", [("true", True), ("", False)])
def test_the_site(machine, variable, built):
    here = machine(vars=dict(PAGES=variable))
    here.stand_in("nbdev-docs", "", ".venv/bin")
    assert not here.run(JOBS["docs.yaml", "build"]).failed
    assert here.calls() == (["make setup TORCH=cpu", "nbdev-docs "] if built else []) and (here.said == "") == built
    assert built or here.said.startswith("No site is published: ") and here.said.count("\n") == 1
    assert JOBS["docs.yaml", "publish"]["if"] == "needs.build.outputs.pages" and all(
        step.get("if") == "steps.pages.outputs.there" for step in steps(JOBS["docs.yaml", "build"])[1:]
    )


def test_the_container_is_of_one_version():
    image = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())["image"]
    assert re.fullmatch(r"\S+:\d[\w.-]*3\.11[\w.-]*", image), "a tag that says which Python"
