"""What the repository says of itself: workflows, forms, hooks, the recipe and the wheel agree with the project."""

import re
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import lightning_gap

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))
}
JOBS = {f"{name}/{key}": job for name, flow in WORKFLOWS.items() for key, job in flow["jobs"].items()}
STEPS = [step for job in JOBS.values() for step in job.get("steps", [])]
PYTHONS = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.", line)}


def read(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def targets():
    """The targets of the Makefile that are no files."""
    (line,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE.replace("\\\n", " "), flags=re.M)
    return set(line.split())


def recipe(target):
    """The commands of a target, with the variables in their place."""
    lines = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.M).group(1)
    return [line.strip().replace("$(VENV)", ".venv") for line in lines.splitlines()]


def values(job, name):
    """What a name of a job's matrix takes."""
    return job.get("strategy", {}).get("matrix", {}).get(name, [])


def test_there_are_the_three_workflows():
    assert set(WORKFLOWS) == {"tests", "docs", "release"}


def test_each_target_is_one_that_is_described_as_such():
    rules = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, flags=re.M))
    assert targets() == rules


def test_workflows_call_what_the_makefile_has():
    called = set()
    for job in JOBS.values():
        for step in job.get("steps", []):
            for target in re.findall(r"\bmake ([^\n]*)", step.get("run", "")):
                word = target.split(maxsplit=1)[0] if "${{" not in target else target
                (variable,) = re.findall(r"\$\{\{ matrix\.(\w+) \}\}", word) or [None]
                each = values(job, variable) if variable else [None]
                called |= {re.sub(r"\$\{\{[^}]*\}\}", str(value), word) for value in each}
    assert called <= targets()
    # What .ci/run asks for is asked for here, too.
    here = set(re.findall(r"^make ([\w-]+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), flags=re.M))
    assert here <= called


@pytest.mark.parametrize("name", JOBS)
def test_jobs_end_and_may_no_more_than_they_must(name):
    job = JOBS[name]
    flow = WORKFLOWS[name.partition("/")[0]]
    assert flow["permissions"] == {"contents": "read"}
    assert "group" in flow["concurrency"]
    assert "uses" in job or 0 < job["timeout-minutes"] <= 120
    allowed = {"id-token": "write"} if name == "release/publish" else None
    assert job.get("permissions") == allowed
    assert job.get("environment") == ("pypi" if name == "release/publish" else None)


def test_actions_are_pinned_alike():
    used = [step["uses"] for step in STEPS if "uses" in step]
    versions = dict(use.split("@") for use in used)
    assert all(re.fullmatch(r"v\d+|release/v\d+", version) for version in versions.values())
    assert {use.partition("@")[0]: use.partition("@")[2] for use in used} == versions
    assert len(set(used)) == len(versions)
    checkouts = [step for step in STEPS if "checkout" in step.get("uses", "")]
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_a_release_is_what_was_tested():
    release = WORKFLOWS["release"]
    assert release[True] == {"push": {"tags": ["v*"]}}  # YAML reads `on` as true
    assert release["jobs"]["tests"]["uses"] == "./.github/workflows/tests.yml"
    assert set(release["jobs"]["publish"]["needs"]) == {"tests", "build"}
    assert "workflow_call" in WORKFLOWS["tests"][True]
    assert any("lightning_gap.__version__" in step.get("run", "") for step in release["jobs"]["build"]["steps"])


def test_classifiers_are_the_pythons_that_are_tested():
    jobs = WORKFLOWS["tests"]["jobs"]
    for job in ("suite", "versions"):
        assert jobs[job]["runs-on"] == "ubuntu-latest"
        assert set(values(jobs[job], "python")) == PYTHONS
    assert set(values(jobs["versions"], "dependencies")) == {"lowest", "latest"}
    oldest, newest = min(PYTHONS, key=Version), max(PYTHONS, key=Version)
    assert PROJECT["requires-python"] == f">={oldest}"
    assert values(jobs["portable"], "python") == [oldest, newest]
    assert PYPROJECT["tool"]["mypy"]["python_version"] == oldest
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    systems = [line for line in PROJECT["classifiers"] if line.startswith("Operating System")]
    assert systems == ["Operating System :: POSIX :: Linux"]  # where all tests run


@pytest.mark.parametrize("variable", ["CORE", "PORTABLE"])
def test_files_that_the_makefile_names_are_there(variable):
    (files,) = re.findall(rf"^{variable} := (.*)$", MAKEFILE.replace("\\\n", " "), flags=re.M)
    assert [name for name in files.split() if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("name", ["bug", "idea"])
def test_forms_are_complete(name):
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert all({"type", "id", "attributes"} <= set(field) and field["attributes"]["label"] for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_dependabot_knows_both_ecosystems():
    updates = read(".github/dependabot.yml")["updates"]
    assert [update["package-ecosystem"] for update in updates] == ["pip", "github-actions"]


def test_hooks_are_the_commands_of_the_makefile():
    (local,) = read(".pre-commit-config.yaml")["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == [*recipe("lint"), *recipe("types")]
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in local["hooks"])


def test_the_recipe_needs_what_the_package_needs():
    conda = read("conda/recipe.yaml")
    assert conda["context"]["version"] == lightning_gap.__version__
    assert conda["package"]["name"] == PROJECT["name"]
    assert conda["build"]["noarch"] == "python"
    assert conda["about"]["license"] == PROJECT["license"]
    scripts = [f"{name} = {target}" for name, target in PROJECT["scripts"].items()]
    assert conda["build"]["python"]["entry_points"] == scripts
    python, *run = conda["requirements"]["run"]
    assert python == f"python {PROJECT['requires-python']}"
    needed = [Requirement(line) for line in PROJECT["dependencies"]]
    expected = [({"torch": "pytorch"}.get(each.name, each.name), each.specifier) for each in needed]
    assert [(line.split()[0], SpecifierSet(line.split()[1])) for line in run] == expected
    host = [line.replace(" ", "") for line in conda["requirements"]["host"]]
    assert host == [f"python{PROJECT['requires-python']}", "pip", *PYPROJECT["build-system"]["requires"]]


def test_the_papers_of_a_repository_are_there():
    for name in ("SECURITY.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", ".github/pull_request_template.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert len(text) > 200
        links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
        assert [link for link in links if not (ROOT / link).exists()] == []
        asked = {word for line in re.findall(r"`make ([a-z -]+)`", text) for word in line.split()}
        assert asked <= targets()


def test_the_wheel_holds_the_package_alone(tmp_path):
    wheel = pytest.importorskip("hatchling.builders.wheel")
    (built,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    package = ROOT / "lightning_gap"
    assert {name for name in names if name.endswith(".py")} == {
        path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")
    }
    assert {name for name in names if not name.endswith(".py")} == {
        "lightning_gap/py.typed",
        "lightning_gap/dashboards/report.html.j2",
        *(path.relative_to(ROOT).as_posix() for suffix in ("cpp", "h") for path in package.rglob(f"*.{suffix}")),
    }
    assert f"Version: {lightning_gap.__version__}\n" in metadata
