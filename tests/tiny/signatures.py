"""Names of arguments that other libraries' functions take, read from their files: nothing of theirs is imported.

`ACCEPTED` is what Transformer Engine's versions take of what this project and megatron-core call. Its entry for a
version was written by `python tests/tiny/signatures.py FOLDER`, FOLDER having that version's `transformer_engine`.
"""

import ast
import importlib.util
import json
import sys
from pathlib import Path

ACCEPTED: dict[str, dict[str, list[str]]] = json.loads(Path(__file__).with_suffix(".json").read_text())
# What is called -> the files of the package it is defined in; to the second, a base, the first hands **kwargs on.
ENGINE = {
    "Linear.__init__": "pytorch/module/linear.py",
    "Linear.forward": "pytorch/module/linear.py",
    "RMSNorm.__init__": "pytorch/module/rmsnorm.py pytorch/ops/basic/rmsnorm.py",
    "DotProductAttention.__init__": "pytorch/attention/dot_product_attention/dot_product_attention.py",
    "DotProductAttention.forward": "pytorch/attention/dot_product_attention/dot_product_attention.py",
    "autocast": "pytorch/quantization.py",
    "Float8CurrentScaling": "common/recipe/__init__.py",
    "Float8BlockScaling": "common/recipe/__init__.py",
    "QParams": "common/recipe/__init__.py",
}


def installed_engine() -> Path | None:
    """The folder of the installed transformer_engine, which is not imported; None where there is none."""
    spec = importlib.util.find_spec("transformer_engine")
    return Path(spec.origin).parent if spec and spec.origin else None


def parameters_of(folder: Path, name: str) -> set[str]:
    """Of a function, a method, or a dataclass's constructor of the engine in this folder: the names it takes."""
    return {taken for file in ENGINE[name].split() for taken in _parameters(folder / file, name)}


def _parameters(file: Path, name: str) -> set[str]:
    owner, _, method = name.partition(".")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (definition,) = [node for node in tree.body if getattr(node, "name", None) == owner]
    if isinstance(definition, ast.FunctionDef):
        return _names(definition)
    assert isinstance(definition, ast.ClassDef)
    functions = {node.name: node for node in definition.body if isinstance(node, ast.FunctionDef)}
    if method or "__init__" in functions:
        return _names(functions[method or "__init__"])
    fields = [node.target for node in definition.body if isinstance(node, ast.AnnAssign)]
    return {field.id for field in fields if isinstance(field, ast.Name)}


def _names(function: ast.FunctionDef) -> set[str]:
    arguments = function.args
    return {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}


if __name__ == "__main__":
    engine = Path(sys.argv[1]) / "transformer_engine"
    print(json.dumps({name: sorted(parameters_of(engine, name)) for name in ENGINE}))
