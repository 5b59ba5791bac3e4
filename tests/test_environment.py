"""The files that describe the environment say the same: pyproject.toml, environment.yml, Makefile, pre-commit, CI."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import jaxtyping
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()


def by_name(lines):
    """Requirement lines as {canonical name: (extras, bounds)}; each name may appear once."""
    requirements = [Requirement(line) for line in lines]
    names: list[str] = [canonicalize_name(requirement.name) for requirement in requirements]
    assert len(names) == len(set(names)), f"listed twice: {sorted(n for n in names if names.count(n) > 1)}"
    return {
        name: (frozenset(requirement.extras), str(requirement.specifier))
        for name, requirement in zip(names, requirements, strict=True)
    }


def pyproject_requirements():
    extras = PROJECT["optional-dependencies"]
    return by_name([*PROJECT["dependencies"], *(line for extra in extras.values() for line in extra)])


def conda_pip_lines():
    (section,) = [entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict)]
    return section


def conda_requirements():
    return by_name([line for line in conda_pip_lines() if not line.startswith("-")])


def makefile_torch():
    found = re.search(r"^TORCH\s*:=\s*(\S+)$", MAKEFILE, re.MULTILINE)
    assert found, "the Makefile does not pin torch"
    return found[1]


def constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    versions: dict[str, Version] = {canonicalize_name(name): Version(version) for name, version in pins}
    return versions


def test_environment_yml_lists_the_dependencies_of_pyproject():
    project, conda = pyproject_requirements(), conda_requirements()
    # torch is a range for those who install the package, and one release in the environments that the project makes
    del project["torch"], conda["torch"]
    assert conda == project


def test_environment_yml_installs_the_project_with_the_same_constraints():
    assert [line for line in conda_pip_lines() if line.startswith("-")] == ["-c constraints.txt", "-e ."]


def test_torch_is_one_release_everywhere():
    assert conda_requirements()["torch"] == (frozenset(), f"=={makefile_torch()}")
    assert constraints()["torch"] == Version(makefile_torch())
    (torch,) = [Requirement(line) for line in PROJECT["dependencies"] if Requirement(line).name == "torch"]
    assert torch.specifier.contains(makefile_torch())


def test_every_dependency_is_in_the_constraints_and_within_its_bounds():
    pins = constraints()
    outside = {
        name: str(pins.get(name, "not listed"))
        for name, (_, bounds) in pyproject_requirements().items()
        if name not in pins or not Requirement(f"{name}{bounds}").specifier.contains(pins[name])
    }
    assert not outside, f"run `make lock`: {outside}"


def test_what_the_core_imports_at_the_top_of_a_module_is_a_declared_dependency():
    declared = by_name(PROJECT["dependencies"])
    distributions = packages_distributions()  # {"PIL": ["pillow"], ...}
    undeclared = set()
    for path in (ROOT / "l2m_viz").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for name in {name.partition(".")[0] for name in names} - {"l2m_viz", *sys.stdlib_module_names}:
                if not {canonicalize_name(each) for each in distributions.get(name, [])} & set(declared):
                    undeclared.add(f"{path.relative_to(ROOT)}: {name}")
    assert not undeclared


def test_constraints_name_no_build_of_one_machine():
    text = (ROOT / "constraints.txt").read_text()
    requirements = [line for line in text.splitlines() if not line.startswith("#")]
    assert not [line for line in requirements if re.search(r"[+@/]|^nvidia-|^l2m", line)]


def test_python_floor_is_equal_everywhere():
    floor = PROJECT["requires-python"].removeprefix(">=")
    dotless = "py" + floor.replace(".", "")
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    (conda_python,) = [
        entry for entry in CONDA["dependencies"] if isinstance(entry, str) and entry.startswith("python")
    ]
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    gate = [step["with"] for step in workflow["jobs"]["gate"]["steps"] if "with" in step]
    setup = (ROOT / "tools/setup_env.py").read_text()

    assert f">={floor}" in str(Requirement(conda_python).specifier).split(",")
    assert tools["ruff"]["target-version"] == dotless
    assert tools["pyright"]["pythonVersion"] == floor
    assert gate[0]["python-version"] == floor
    assert f"sys.version_info < ({floor.replace('.', ', ')})" in setup


@pytest.mark.parametrize(
    ("package", "repository"),
    [
        ("ruff", "astral-sh/ruff-pre-commit"),
        ("pyright", "RobertCraigie/pyright-python"),
        ("nbstripout", "kynan/nbstripout"),
    ],
)
def test_pre_commit_runs_the_versions_of_make_lint(package, repository):
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (revision,) = [hook["rev"] for hook in hooks if hook["repo"].endswith(repository)]
    assert pyproject_requirements()[package][1] == f"=={revision.removeprefix('v')}"


def test_readme_names_only_targets_that_the_makefile_has():
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
    code = re.findall(r"```.*?```|`[^`]+`", (ROOT / "README.md").read_text(), re.DOTALL)
    named = {name for piece in code for name in re.findall(r"\bmake ([a-z]+)", piece)}
    assert {"demo", "test"} <= named, "the README does not say how to start"
    assert named <= targets, f"no such target: {sorted(named - targets)}"


def test_every_target_is_phony_and_described():
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
    described = set(re.findall(r"^([a-z]+):.*## \S", MAKEFILE, re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert phony
    assert targets == described == set(phony[1].split())


def test_shapes_are_checked_in_tests_and_doctests():
    from l2m_viz.geometry import to_normalized

    with pytest.raises(jaxtyping.TypeCheckError):
        to_normalized(torch.zeros(3), (4, 5))
    # pytest imports a module of a folder without __init__.py under another name, where the hook does not see it
    folders = {path.parent for path in (ROOT / "l2m_viz").rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]
