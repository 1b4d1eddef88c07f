"""Imports go one way, and megatron-core, optional packages and torch are imported only where that is meant."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From below. Modules of one line may import each other, as long as that makes no circle.
ORDER = (
    ("prism_kernels",),
    (
        "config",
        "batch",
        "agree",
        "platform",
        "megatron_patches",
        "parallel",
        "text",
        "exit_codes",
        "console",
        "json_lines",
        "meeting",
        "program",
    ),
    ("data",),
    ("model",),
    ("checkpoint",),
    ("convert",),
    ("plan",),
    ("train",),
    ("generate",),
    ("rewards",),
    ("evaluate",),
    ("rl",),
    ("analyze",),
    ("study",),
    ("launching", "loading"),
    ("launch", "tools", "benchmarks"),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
MEGATRON = {"megatron_patches", "parallel", "model", "checkpoint", "train"}


def product_files() -> list[Path]:
    folders = ("prism_mcore", "kernels/prism_kernels", "launch", "tools", "benchmarks")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def unit_of(file: Path) -> str | None:
    """What of ORDER a file belongs to; None for prism_mcore/__init__.py, which re-exports."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        return "prism_kernels"
    if parts[0] != "prism_mcore":
        return parts[0]
    return None if parts[1] == "__init__" else parts[1]


def imports(file: Path, at_start_only: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted module or name) of every import, those for type checkers left out."""

    def walk(nodes: list[ast.stmt]) -> Iterator[tuple[int, str]]:
        for node in nodes:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                yield from walk(node.orelse)
            elif isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"{file}:{node.lineno}: a relative import"
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
            elif not (at_start_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
                for child in ast.iter_child_nodes(node):
                    yield from walk([child]) if isinstance(child, ast.stmt) else walk_expression(child)

    def walk_expression(node: ast.AST) -> Iterator[tuple[int, str]]:
        yield from walk([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])

    yield from walk(ast.parse(file.read_text(encoding="utf-8")).body)


def imported_unit(module: str) -> str | None:
    """What of ORDER an import reaches; None for other packages and for prism_mcore itself."""
    first, *rest = module.split(".")
    if first == "prism_mcore":
        return rest[0] if rest and rest[0] in LEVEL else None
    return "prism_kernels" if first == "prism_kernels" else None


def test_every_module_has_its_place():
    unplaced = {unit for unit in map(unit_of, product_files()) if unit is not None} - LEVEL.keys()
    assert not unplaced, f"not in ORDER: {sorted(unplaced)}"


def test_no_import_runs_upwards():
    upwards = [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for file in product_files()
        if (own := unit_of(file)) is not None
        for line, module in imports(file)
        if (other := imported_unit(module)) is not None and LEVEL[other] > LEVEL[own]
    ]
    assert not upwards, "\n".join(upwards)


def test_there_are_no_circles():
    """Between files, counting what is imported when a file is loaded and what functions import later."""
    modules = {module_name(file): file for file in product_files()}
    graph = {
        name: {target for _, module in imports(file) if (target := module_of(module, modules)) and target != name}
        for name, file in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            pytest.fail(" -> ".join([*path[path.index(name) :], name]))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_of(module: str, modules: dict[str, Path]) -> str | None:
    """The file behind an import of a module or of a name in one."""
    while module:
        if module in modules:
            return module
        module = module.rpartition(".")[0]
    return None


def test_megatron_core_is_imported_in_few_places():
    elsewhere = [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for file in product_files()
        if unit_of(file) not in MEGATRON | {"benchmarks"}
        for line, module in imports(file)
        if module.split(".")[0] == "megatron"
    ]
    assert not elsewhere, "\n".join(elsewhere)


@pytest.mark.parametrize("program", ["midtrain", "rl", "generate", "score", "evaluate", "study"])
def test_help_needs_no_torch(program):
    """A wrong flag or --help answers at once."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{program}.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path('launch/{program}.py', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    heavy = [name for name in ('torch', 'megatron', 'transformers') if name in sys.modules]\n"
        "    print(end.code, heavy, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip().splitlines()[-1] == "0 []", done.stderr


def test_importing_the_package_is_instant():
    code = "import sys, prism_mcore; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_no_file_of_the_product_is_long():
    long = {str(file.relative_to(ROOT)): n for file in product_files() if (n := line_count(file)) >= 450}
    assert not long, f"each file holds one thing and has under 450 lines: {long}"


def line_count(file: Path) -> int:
    return file.read_text(encoding="utf-8").count("\n")


@pytest.mark.parametrize("file, function", [("train/loop.py", "train"), ("rl/loop.py", "train")])
def test_the_loops_fit_on_a_screen(file, function):
    tree = ast.parse((ROOT / "prism_mcore" / file).read_text(encoding="utf-8"))
    (loop,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.lineno + 1 < 40
