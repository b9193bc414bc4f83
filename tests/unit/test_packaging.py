"""The files that describe the project (requirements, lock, environment, wheel, workflows) agree with each other."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import helpers

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCKS = [ROOT / "requirements.lock", ROOT / "tests" / "benchmarks" / "requirements.lock"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYTHONS = ("3.11", "3.12", "3.13")


def locked(path):
    """Requirements of a lock file, each with the number of its hashes."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    return [(Requirement(line.split("--hash")[0]), line.count("--hash=sha256:")) for line in lines]


def run(*command):
    """Run a module of this Python in the repository; fail with what it wrote."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def applies(requirement, environment):
    return requirement.marker is None or requirement.marker.evaluate(environment)


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("system", "machine"), [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")])
def test_lock_satisfies_every_requirement(python, system, machine):
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": system,
        "platform_system": system.capitalize(),
        "platform_machine": machine,
        "extra": "",
    }
    extras = PROJECT["optional-dependencies"]
    lines = sum((extras[name] for name in ("cpu", "book", "cluster", "test")), PROJECT["dependencies"])
    pins = {canonicalize_name(pin.name): pin for pin, _ in locked(LOCKS[0]) if applies(pin, environment)}
    for requirement in map(Requirement, lines):
        if applies(requirement, environment):
            pin = pins.get(canonicalize_name(requirement.name))
            assert pin is not None, f"{requirement.name} is not locked: make the lock again (see pyproject.toml)"
            version = str(pin.specifier).removeprefix("==")
            assert requirement.specifier.contains(version), f"{pin} is locked, {requirement} is wanted"


@pytest.mark.parametrize("path", sorted((ROOT / "src" / "helpers").glob("*.py")), ids=lambda path: path.stem)
def test_imports_are_declared(path):
    """On Colab only what makes the book may lack something: the extra `book` alone has papermill and Jupyter Book."""
    extras = PROJECT["optional-dependencies"]
    more = {"cluster": "cluster"} | dict.fromkeys(("book", "cli", "execution", "site"), "book")
    lines = PROJECT["dependencies"] + extras["cpu"] + extras.get(more.get(path.stem), [])
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"helpers"}:
        providers = {canonicalize_name(provider) for provider in packages_distributions()[name]}
        assert providers & declared, f"{path.name} imports {name}, which pyproject.toml does not ask for"


@pytest.mark.parametrize(("name", "older"), [
    ("scipy", "1.14.1"),  # bootstrap takes no `rng`
    ("joblib", "1.3.2"),  # Parallel has no "generator_unordered"
])
def test_packages_that_lack_what_the_helpers_call_are_not_accepted(name, older):
    (requirement,) = (Requirement(line) for line in PROJECT["dependencies"] if Requirement(line).name == name)
    assert not requirement.specifier.contains(older)


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.parent.name)
def test_lock_pins_versions_and_hashes_and_names_no_place(path):
    for requirement, hashes in locked(path):
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), f"{requirement} is not pinned"
        assert hashes > 0, f"{requirement} has no hash"
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"://|--(extra-)?index-url|--find-links|@ |(^|\s)/", text, re.MULTILINE)


def test_benchmark_lock_adds_and_replaces_nothing_of_the_main_lock():
    main, bench = ({canonicalize_name(pin.name) for pin, _ in locked(path)} for path in LOCKS)
    assert not main & bench


def test_environment_installs_the_project_and_jupyterlab_alone():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, pip = environment["dependencies"]
    python, version = conda[0].split("=")
    assert environment["name"] == PROJECT["name"]
    assert python == "python" and version in PYTHONS and conda[1:] == ["jupyterlab", "pip"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"`conda activate {PROJECT['name']}`" in readme and "`jupyter lab notebooks`" in readme
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)
    extras = re.fullmatch(r"--editable \.\[(.+)\]", *pip["pip"]).group(1).split(",")
    assert set(extras) == {"cpu", "book", "test"} <= set(PROJECT["optional-dependencies"])


def test_versions_agree():
    assert helpers.__version__ == PROJECT["version"]


def test_wheel_holds_the_helpers_and_the_claims_only(tmp_path):
    run("hatchling", "build", "--target", "wheel", "--directory", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {path.name for path in (ROOT / "src" / "helpers").iterdir() if path.is_file()}
    assert names == {f"helpers/{name}" for name in sources | {"claims.yml"}}


@pytest.mark.parametrize("schema", ["vendor.github-workflows", "custom.github-workflows-require-timeout"])
def test_workflows_follow_their_schema(schema):
    run("check_jsonschema", "--builtin-schema", schema, *map(str, WORKFLOWS))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_pin_actions_and_ask_for_little(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        writes = {scope for scope, level in job.get("permissions", {}).items() if level == "write"}
        assert writes <= ({"pages", "id-token"} if (path.stem, name) == ("book", "deploy") else set())
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step.get("uses", f"a/b@{'0' * 40}")), step
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_the_link_check_leaves_out_what_is_not_there_yet():
    """Pages that are made with the site (tests/book follows their links), and an address that is a placeholder."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "links.yml").read_text(encoding="utf-8"))
    options = shlex.split(workflow["jobs"]["links"]["steps"][-1]["with"]["args"])
    left_out = [value for name, value in zip(options, options[1:], strict=False) if name == "--exclude"]
    made = [path.with_suffix("").as_uri() for path in (ROOT / "book").glob("*.md.jinja") if path.name[:4] != "card"]
    url = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"]
    there = [path.as_uri() for path in (ROOT / "book").glob("*.md")]
    (made if "/OWNER/" in url else there).append(f"{url}/blob/main/README.md")
    assert all(any(re.search(pattern, address) for pattern in left_out) for address in made)
    assert not any(re.search(pattern, address) for pattern in left_out for address in there)


def test_workflow_tests_every_supported_python():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
    assert tuple(workflow["jobs"]["test"]["strategy"]["matrix"]["python"]) == PYTHONS


def test_hooks_are_tools_of_the_lock():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    pins = {canonicalize_name(pin.name) for pin, _ in locked(LOCKS[0])}
    for repository in config["repos"]:
        for hook in repository["hooks"]:
            assert hook["language"] == "system" and hook["entry"].split()[0] in pins
