"""Imports run one way, and what a laptop runs loads neither torch nor the engine."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "megatron.pretrain"

# From the ground floor up: a room imports from its own floor and from those below it.
FLOORS = (
    {"errors", "setting"},
    {"config", "megatron_flags", "tokenizer", "tokenizer_config"},
    {"device", "layout"},
    {"data", "model", "optim"},
    {"checks", "cli", "checkpoint", "health", "log", "export", "plan", "train.recording", "train.state", "train.step"},
    {"train"},
    {"main"},
)

LIGHT_MODULES = ("errors", "config", "checks", "cli", "plan", "tokenizer", "data.blend", "data.indexed",
                 "data.mixture", "data.mixture_env", "data.preprocess", "export.batch", "export.jobs",
                 "export.to_megatron", "model.flops", "optim.schedule")


def module_files() -> dict[str, Path]:
    """Every module of the package, by its name below `megatron.pretrain` ("" for the package itself)."""
    folder = ROOT / "megatron" / "pretrain"
    names = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = module_files()


def imported_names(path: Path, module: str | None = None) -> Iterator[str]:
    """Every absolute name that `path` imports, at its top or inside a function.

    `from a import b` yields `a.b`, because b may be a module. `module` is the file's own name below the
    package, from which relative imports are resolved.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                inside = (f"{PACKAGE}.{module}" if module else PACKAGE).split(".")
                depth = node.level - (path.name == "__init__.py")
                base = ".".join(inside[:len(inside) - depth] + ([base] if base else []))
            yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def rooms_used(path: Path, module: str | None = None) -> frozenset[str]:
    """The modules of the package that a file imports, by their names below it."""
    used = set()
    for name in imported_names(path, module):
        if not name.startswith(PACKAGE + "."):
            continue
        below = name[len(PACKAGE) + 1:]
        while below and below not in MODULES:
            below = below.rpartition(".")[0]
        used.add(below)
    return frozenset(used - {""})


def reached(path: Path, module: str | None = None) -> set[str]:
    """The modules that a file imports, and those that they import, and so on."""
    seen: set[str] = set()
    waiting = set(rooms_used(path, module))
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting |= rooms_used(MODULES[name], name) - seen
    return seen


def floor_of(module: str) -> int:
    """The floor of a module: of its own entry in FLOORS, or else of the room it stands in."""
    for name in (module, module.split(".")[0]):
        for floor, rooms in enumerate(FLOORS):
            if name in rooms:
                return floor
    raise AssertionError(f"megatron/pretrain has a room {module!r} that FLOORS does not place: say in "
                         f"{Path(__file__).name} which floor it stands on")


def test_imports_run_one_way():
    upward = [f"{module} imports {used}" for module, path in MODULES.items() if module
              for used in rooms_used(path, module)
              if floor_of(used) > floor_of(module)]
    assert not upward


def test_no_module_imports_itself_in_a_circle():
    circles = [module for module, path in MODULES.items() if module and module in reached(path, module)]
    assert not circles


def test_megatron_is_a_namespace():
    assert not (ROOT / "megatron" / "__init__.py").exists()
    assert [path.name for path in (ROOT / "megatron").iterdir() if path.is_dir()
            and path.name != "__pycache__"] == ["pretrain"]


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.split(".")[0] == "export"))
def test_export_runs_without_the_trainer(module: str):
    assert not {name for name in reached(MODULES[module], module)
                if name.split(".")[0] in ("train", "layout", "device")}


@pytest.mark.parametrize("tool", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.name)
def test_tools_run_without_the_trainer(tool: Path):
    assert not {name for name in reached(tool) if name.split(".")[0] in ("train", "layout", "device")}


def test_no_code_edits_the_import_path():
    edits = [str(path.relative_to(ROOT)) for folder in ("megatron", "tools", "neo")
             for path in (ROOT / folder).rglob("*.py")
             if "sys.path.append" in path.read_text() or "sys.path.insert" in path.read_text()]
    assert not edits


def test_light_modules_load_neither_torch_nor_the_engine(run_tool):
    statements = ["import importlib, sys"]
    for module in LIGHT_MODULES:
        statements.append(f"importlib.import_module('{PACKAGE}.{module}')")
        statements.append("heavy = {'torch', 'megatron.core', 'transformers'} & set(sys.modules)")
        statements.append(f"assert not heavy, f'{module} loads {{heavy}}'")
    outcome = run_tool("-c", "\n".join(statements))
    assert outcome.returncode == 0, outcome.stderr
