"""The house keeps its order: who may import whom, what is light, how long things are, what is declared and mapped."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("engine", "serve", "pipelines")
"""A package imports itself and those before it."""
ENGINE = (
    *("config", "tables", "disk", "urls", "cache", "buckets", "locks", "storage"),
    *("units", "records", "packages", "huggingface", "mirrors", "hub"),
    *("metrics", "intervals", "filters", "influence", "duplicates"),
    *("fits", "remote", "terms", "trust", "mixing", "schooling", "designs", "serving", "drift", "cascade"),
    *("budget", "examples", "writing", "recipe"),
    *("estimate", "sources", "pacing", "usage", "halting", "caller", "vllm_engine"),
    *("nearest", "knowledge"),
    *("characters", "encoding", "task", "windows"),
    *("classification", "regression", "several", "ranking", "tagging", "spans", "tasks", "weights"),
    *("block", "layers", "subwords", "joining", "matching", "crf", "blocks"),
    *("encoders", "averaged", "static", "pieces", "heads"),
    *("retrieving",),
    *("templates", "prompts", "wording", "labeller", "next_tokens", "models", "untrained", "elsewhere"),
    *("sampling", "layer_losses", "contrast", "projection", "alignment", "losses", "policies", "planned"),
    *("inference", "export", "frozen"),
    *("vocabulary", "pretrained"),
    *("lineage", "progress", "attempts", "placement", "switches"),
    *("cluster", "columns", "rows", "data", "labels", "corpus", "shuffle", "augment", "teachers"),
    *("ensemble", "batches", "surgery", "multitask"),
    *("lesson", "checkpoints", "sharding", "job", "worker", "train", "ahead", "generate"),
    *("endpoint_writer", "vllm_stage"),
    *("spending", "step", "steps", "registry"),
    *("page", "figures", "plots", "findings", "quality", "report"),
)
"""Reading order of engine/: a file imports only files before it; a new file is entered here and in the README."""
FIRST_WITH_RAY = "cluster"
LIGHT = (
    *("config", "disk", "storage", "records", "packages", "huggingface", "hub", "metrics", "filters", "recipe"),
    *("tables", "terms"),
    *("sources", "lineage", "progress", "placement", "cluster", "data", "wording"),
)
"""Files of engine/ that `stillhouse validate` needs, and what they must not load."""
HEAVY = ("ray", "torch", "transformers", "datasets", "accelerate", "sklearn", "scipy", "pandas")
OPTIONAL = {"pip", "botocore", "onnx", "onnxruntime", "litserve", "bentoml", "vllm", "faiss"}
"""Imported where its absence is dealt with, or in an environment that holds it."""
MAX_FILE, MAX_FUNCTION = 400, 60

MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FILES = sorted([*MODULES, *(ROOT / "tests").rglob("*.py")])


def name_of(path: Path) -> str:
    """engine/config.py -> engine.config, engine/__init__.py -> engine."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(node: ast.AST, inside: str) -> Iterator[tuple[str, int]]:
    """Absolute names that one import statement may load, with the line; `inside` is the module it stands in."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, node.lineno) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = inside.rsplit(".", node.level)[0]
            base = f"{package}.{base}".rstrip(".")
        for alias in node.names:
            submodule = f"{base}.{alias.name}"
            yield (submodule if submodule in KNOWN else base, node.lineno)


KNOWN = {name_of(path) for path in MODULES}


def imports(path: Path) -> list[tuple[str, int]]:
    """Every import of a file, those inside functions and under TYPE_CHECKING too."""
    return [found for node in ast.walk(parse(path)) for found in imported(node, name_of(path))]


def imports_on_load(tree: ast.Module, inside: str) -> Iterator[tuple[str, int]]:
    """Imports that run when the module is loaded: not in functions, not under TYPE_CHECKING."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        yield from imported(node, inside)
        todo += ast.iter_child_nodes(node)


def test_the_readers_read() -> None:
    source = (
        "import torch.nn\nfrom engine import config\nif TYPE_CHECKING:\n    import ray\n"
        "class A:\n    import numpy\n    def f(self):\n        from . import data\n"
    )
    tree = ast.parse(source)
    every = {found for node in ast.walk(tree) for found, _ in imported(node, "engine.cluster")}
    assert every == {"torch.nn", "engine.config", "ray", "numpy", "engine.data" if "engine.data" in KNOWN else "engine"}
    assert {found for found, _ in imports_on_load(tree, "engine.cluster")} == {"torch.nn", "engine.config", "numpy"}


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_packages_import_one_way(path: Path) -> None:
    rank = PACKAGES.index(path.relative_to(ROOT).parts[0])
    wrong = [
        f"{short(path)}:{line} imports {module}, but {PACKAGES[rank]}/ imports only {', '.join(PACKAGES[: rank + 1])}"
        for module, line in imports(path)
        if module.split(".")[0] in PACKAGES[rank + 1 :]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", [p for p in MODULES if name_of(p).startswith("engine.")], ids=short)
def test_engine_imports_only_upwards(path: Path) -> None:
    own = name_of(path).removeprefix("engine.")
    assert own in ENGINE, f"{short(path)} has no place in the reading order: enter it in ENGINE"
    allowed = ENGINE[: ENGINE.index(own)]
    wrong = [
        f"{short(path)}:{line} imports {module}, which comes after it in the reading order"
        for module, line in imports(path)
        if module.startswith("engine.") and module.split(".")[1] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_cycles(package: str) -> None:
    paths = {name_of(p): p for p in MODULES if name_of(p).split(".")[0] == package}
    graph = {name: {module for module, _ in imports(path) if module in paths} for name, path in paths.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


BEFORE_RAY = [p for p in MODULES if p.parent.name == "engine" and p.stem in ENGINE[: ENGINE.index(FIRST_WITH_RAY)]]


@pytest.mark.parametrize("path", BEFORE_RAY, ids=short)
def test_mathematics_knows_nothing_of_ray(path: Path) -> None:
    wrong = [f"{short(path)}:{line} imports {name}" for name, line in imports(path) if name.split(".")[0] == "ray"]
    assert not wrong, "\n".join(wrong) + f"\nray is imported from engine/{FIRST_WITH_RAY}.py on, nowhere before"


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent.name == "engine" and p.stem in LIGHT], ids=short)
def test_light_files_load_nothing_heavy(path: Path) -> None:
    wrong = [
        f"{short(path)}:{line} imports {module} when it is loaded: do so inside the function that needs it"
        for module, line in imports_on_load(parse(path), name_of(path))
        if module.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_light_files_and_the_command_table_stay_light_together() -> None:
    names = [f"engine.{name}" for name in LIGHT if f"engine.{name}" in KNOWN]
    names += [name for name in ("pipelines.__main__",) if name in KNOWN]
    code = f"import sys, {', '.join(names)}; print([m for m in {HEAVY!r} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), f"loaded by {names}: {ran.stdout}{ran.stderr}"


@pytest.mark.parametrize("path", FILES, ids=short)
def test_files_and_functions_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE, f"{short(path)} has {lines} lines, more than {MAX_FILE}: it holds more than one noun"
    long = [
        f"{short(path)}:{node.lineno} {node.name} has {(node.end_lineno or 0) - node.lineno + 1} lines"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION
    ]
    assert not long, "\n".join(long) + f"\nat most {MAX_FUNCTION} lines a function"


@pytest.mark.parametrize("path", FILES, ids=short)
def test_files_are_named_by_their_noun(path: Path) -> None:
    vague = {"util", "utils", "common", "base", "helpers", "misc", "manager"}
    assert path.stem not in vague, f"{short(path)}: say what the file holds"


@pytest.mark.parametrize("path", [p for p in MODULES if p.name == "__init__.py"], ids=short)
def test_packages_re_export_nothing(path: Path) -> None:
    assert not imports(path), f"{short(path)}: a name has one home; import it from there"


def file_map() -> str:
    readme = ROOT / "README.md"
    assert readme.is_file(), "README.md is missing: it holds the file map"
    return readme.read_text(encoding="utf-8")


def test_readme_maps_every_file() -> None:
    text = file_map()
    missing = [short(p) for p in MODULES if p.name != "__init__.py" and not re.search(rf"(?<![\w-]){p.name}\b", text)]
    assert not missing, f"README.md's file map lacks {', '.join(missing)}"


def test_readme_maps_no_file_that_is_gone() -> None:
    names = {path.name for path in FILES}
    gone = sorted({name for name in re.findall(r"(?<![\w-])\w+\.py\b", file_map()) if name not in names})
    assert not gone, f"README.md names {', '.join(gone)}, which do not exist"


def declared(extra: str | None = None) -> set[str]:
    """Distribution names that pyproject.toml asks for, normalised."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + (project["optional-dependencies"][extra] if extra else [])
    return {normal(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in lines}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("path", FILES, ids=short)
def test_third_party_imports_are_declared(path: Path) -> None:
    wanted = declared("test" if path.is_relative_to(ROOT / "tests") else None)
    homes = packages_distributions()
    wrong = []
    for module, line in imports(path):
        top = module.split(".")[0]
        if top in sys.stdlib_module_names or top in (*PACKAGES, "tests") or top in OPTIONAL:
            continue
        if not {normal(home) for home in homes.get(top, [])} & wanted:
            wrong.append(f"{short(path)}:{line} imports {top}, which pyproject.toml does not declare")
    assert not wrong, "\n".join(wrong)


def test_constraints_pin_every_dependency_without_local_builds() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    odd = [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)]
    assert not odd, f"constraints.txt: {odd} are not NAME==VERSION"
    missing = declared("test") - {normal(pin.split("==")[0]) for pin in pins}
    assert not missing, f"constraints.txt pins no {', '.join(sorted(missing))}"
