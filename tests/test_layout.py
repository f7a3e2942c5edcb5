"""The shape of the house, checked from the syntax tree: who imports whom, sizes, banned things.

Each rule is a function of one parsed file, so that the last test can show each saying no.
"""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mla_deploy"

# Arrows point down this list only. The ground floor's modules may use one another.
GROUND = ("errors", "strict_json", "shapes", "targets", "door", "fields", "text_fields",
          "rope", "experts", "layer_facts", "wrapper", "quantization", "config",
          "found_config", "latent_store", "cache_plan", "devices", "machine", "jetson",
          "callable_package", "trust", "text_file")  # fmt: skip
FLOORS: tuple[tuple[str, ...], ...] = (
    GROUND,
    ("bundle", "checkpoint", "device", "weight_forms"),
    ("source",),
    ("export", "rewrite"),
    ("runtime", "engine", "foreign"),
    ("validate",),
    ("device_package", "bench", "compress", "plan"),
    ("cli",),
)
# Third-party libraries a package may load when it is imported, and those it may load in a function.
AT_IMPORT = {
    "source": {"torch", "transformers", "numpy", "networkx", "huggingface_hub", "greenlet"},
    "export": {"torch", "transformers", "numpy", "onnx", "onnx_ir", "onnxscript", "ml_dtypes"},
    "rewrite": {"numpy", "onnx", "onnx_ir", "onnxscript"},
    "weight_forms": {"torch"},
    "engine": {"numpy", "onnx_ir"},  # tensorrt by name, in the worker: `tensorrt_api.py`
    "runtime": {"numpy", "onnxruntime", "torch", "ml_dtypes"},
    "device": {"numpy"},  # tensorrt by name: `device/library.py`
    "foreign": {"numpy", "onnx", "onnx_ir", "onnxruntime", "networkx", "torch"},
    "device_package": {"numpy", "onnx_ir"},
    "validate": {"numpy", "torch", "onnx_ir"},  # onnx_ir: the mutants are graph surgery
    "plan": {"torch"},
    "bench": {"numpy", "torch", "transformers", "onnxruntime", "onnx_ir"},
    "compress": {"numpy", "torch", "transformers", "safetensors"},
    "cli": {"click"},
    # One file, imported in functions only.
    "mla_deploy/checkpoint/values.py": {"torch"},
}
IN_FUNCTIONS = {
    "bundle": {"numpy", "onnx"},
    "checkpoint": {"torch", "numpy", "safetensors"},
    "export": {"tokenizers"},  # of a text that rounding is fitted to
    "validate": {
        "tokenizers",
        "jinja2",
        "markupsafe",
        "jsonschema",
        "onnx",
    },  # onnx: parses a graph that is probed
    "bench": {"openvino", "llama_cpp", "gguf"},  # peers, which may not be installed
    "compress": {"gguf", "tokenizers", "jinja2", "markupsafe"},
    "cli": {"rich", "tokenizers"},
}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_POSITIONAL, MEDIAN_LINES = 400, 60, 5, 200
# A longer file or function stands here with its reason.
LONGER = {
    "mla_deploy/source/attention_seam.py:attention": "transformers calls it with these six",
    "mla_deploy/source/indexer_seam.py:_pooled": "stands in for a forward that takes these",
    "mla_deploy/source/seams.py:_delta_attention": "stands in for a function that takes these",
}
# Methods whose parameters a framework gives, one per value of a pattern or input of a module.
FRAMEWORK_CALLS = {"forward", "pattern", "check", "rewrite"}
OPENERS = {
    "mla_deploy/door.py": "it is the door",
    "mla_deploy/device/files.py": "runs on a device, without the door",
    "mla_deploy/device/power.py": "runs on a device, without the door",
    "mla_deploy/machine.py": "reads /proc, the kernel's own words",
    "mla_deploy/cli/entry.py": "the null device, when the reader of our output is gone",
}
TOP_LEVEL = {
    "pyproject.toml", "README.md", "mla_deploy", "plugins", "models", "tests", "Makefile",
    "CHANGELOG.md", "SECURITY.md", "LICENSE", "docs", "bench", ".ci", ".gitignore",
    ".pre-commit-config.yaml",
}  # fmt: skip
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "core", "misc"}

Rule = Callable[[str, ast.Module], Iterator[str]]


def _sources() -> list[str]:
    """Every Python file of the project, as its path from the root."""
    folders = (PACKAGE, ROOT / "tests", ROOT / "bench", ROOT / "models", ROOT / "docs")
    found = [path for folder in folders for path in folder.rglob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def _in_package() -> list[str]:
    return [name for name in _sources() if name.startswith("mla_deploy/")]


def _parsed(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


def _part(name: str) -> str:
    """`mla_deploy/export/trace.py` -> export; `mla_deploy/door.py` -> door."""
    return name.split("/")[1].removesuffix(".py")


def _floor(part: str) -> int:
    return next(index for index, parts in enumerate(FLOORS) if part in parts)


def _imports(tree: ast.Module) -> Iterator[tuple[str, bool, bool]]:
    """(module, for types only, inside a function) of every import."""

    def walk(node: ast.AST, types: bool, inside: bool) -> Iterator[tuple[str, bool, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, types, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.level == 1:
                continue  # of the same package: `device/`, whose files are copied to a device
            elif isinstance(child, ast.ImportFrom) and child.module:
                names = [alias.name for alias in child.names]
                whole = child.module == "mla_deploy"
                modules = [f"mla_deploy.{name}" for name in names] if whole else [child.module]
                yield from ((module, types, inside) for module in modules)
            else:
                test = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
                function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(child, types or test, inside or function)

    yield from walk(tree, False, False)


def arrows_point_down(name: str, tree: ast.Module) -> Iterator[str]:
    part = _part(name)
    for module, _, _ in _imports(tree):
        pieces = module.split(".")
        if pieces[0] != "mla_deploy" or len(pieces) < 2 or part == "cli":
            continue
        other = pieces[1]
        if other in ("__version__", part):
            continue
        known = any(other in parts for parts in FLOORS)
        if not known:
            yield f"imports {module}: import from the module that defines it"
        elif part in GROUND and other in GROUND:
            continue
        elif {part, other} == {"export", "rewrite"}:
            if part == "rewrite":
                yield "rewrite imports export: the arrow goes from export to rewrite"
        elif _floor(other) >= _floor(part):
            yield f"imports {module}, which stands on the same floor or above"


def loads_only_its_libraries(name: str, tree: ast.Module) -> Iterator[str]:
    part = _part(name)
    early = AT_IMPORT.get(part, set()) | AT_IMPORT.get(name, set())
    late = early | IN_FUNCTIONS.get(part, set())
    for module, types, inside in _imports(tree):
        library = module.partition(".")[0]
        if types or library == "mla_deploy" or library in sys.stdlib_module_names:
            continue
        if library not in (late if inside else early):
            where = "in a function" if inside else "at import"
            yield f"loads {library} {where}"


def is_of_a_readable_size(name: str, tree: ast.Module) -> Iterator[str]:
    if name in LONGER:
        return
    last = max((node.end_lineno or 0 for node in ast.walk(tree) if hasattr(node, "end_lineno")),
               default=0)  # fmt: skip
    if last > MAX_FILE_LINES:
        yield f"has {last} lines, wanted at most {MAX_FILE_LINES}"
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if f"{name}:{node.name}" in LONGER:
            continue
        lines = (node.end_lineno or 0) - node.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            yield f"{node.name} has {lines} lines, wanted at most {MAX_FUNCTION_LINES}"
        if node.name in FRAMEWORK_CALLS or node.name.startswith("test_"):
            continue  # pytest gives a test its parameters by name
        positional = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
        if len([arg for arg in positional if arg not in ("self", "cls")]) > MAX_POSITIONAL:
            yield f"{node.name} takes {len(positional)} positional parameters"


def has_a_docstring(name: str, tree: ast.Module) -> Iterator[str]:
    if tree.body and not ast.get_docstring(tree):
        yield "has no docstring that says what it owns"


def opens_through_the_door(name: str, tree: ast.Module) -> Iterator[str]:
    if name in OPENERS:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _opens(node):
            yield f"line {node.lineno}: {ast.unparse(node)[:60]} goes around mla_deploy.door"


def _opens(call: ast.Call) -> bool:
    """Calls that open a path by its name. `Folder.read_bytes` and `Stage.write_bytes` take more
    arguments than `Path`'s methods of the same name, which is how they are told apart."""
    target, given = call.func, len(call.args) + len(call.keywords)
    if isinstance(target, ast.Name):
        return target.id == "open"
    if not isinstance(target, ast.Attribute):
        return False
    owner = ast.unparse(target.value)
    if target.attr == "open":
        return owner in ("os", "io", "codecs", "gzip", "tarfile") or owner.startswith("Path(")
    return (
        target.attr in ("read_text", "write_text")
        or (target.attr == "read_bytes" and given == 0)
        or (target.attr == "write_bytes" and given == 1)
    )


def asserts_nothing(name: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield f"line {node.lineno}: assert is gone under `python -O`; raise an error of ours"


def trusts_no_remote_code(name: str, tree: ast.Module) -> Iterator[str]:
    word = "trust_remote_code"
    for node in ast.walk(tree):
        keys = node.keys if isinstance(node, ast.Dict) else []
        if (
            (isinstance(node, (ast.keyword, ast.arg)) and node.arg == word)
            or (isinstance(node, ast.Name) and node.id == word)
            or any(isinstance(key, ast.Constant) and key.value == word for key in keys)
        ):
            yield f"mentions {word} as a setting"


PACKAGE_RULES: tuple[Rule, ...] = (
    arrows_point_down,
    loads_only_its_libraries,
    opens_through_the_door,
    asserts_nothing,
    trusts_no_remote_code,
)
EVERYWHERE: tuple[Rule, ...] = (is_of_a_readable_size, has_a_docstring)


@pytest.mark.parametrize("rule", PACKAGE_RULES, ids=lambda rule: rule.__name__)
def test_package_files(rule: Rule) -> None:
    names = [name for name in _in_package() if name != "mla_deploy/__init__.py"]
    assert [f"{name}: {told}" for name in names for told in rule(name, _parsed(name))] == []


@pytest.mark.parametrize("rule", EVERYWHERE, ids=lambda rule: rule.__name__)
def test_all_files(rule: Rule) -> None:
    assert [f"{name}: {told}" for name in _sources() for told in rule(name, _parsed(name))] == []


def test_every_package_part_has_a_floor() -> None:
    parts = {_part(name) for name in _in_package()} - {"__init__"}
    assert parts <= {part for parts in FLOORS for part in parts}


def test_median_file_is_short() -> None:
    lengths = [len((ROOT / name).read_text("utf-8").splitlines()) for name in _in_package()]
    assert statistics.median(lengths) < MEDIAN_LINES


def test_verb_files_hide_no_logic() -> None:
    """A verb parses, calls one function and prints: under 80 lines."""
    from mla_deploy.cli.group import group

    for verb in group.commands:
        assert len((PACKAGE / "cli" / f"{verb}.py").read_text("utf-8").splitlines()) < 80


def test_no_file_is_named_for_nothing() -> None:
    stems = {name: set(re.split(r"[/_.]", name)) for name in _sources()}
    assert [name for name, words in stems.items() if words & BANNED_NAMES] == []


def test_top_level_is_fixed() -> None:
    found = {name.split("/")[0] for name in _kept_files()}
    assert found <= TOP_LEVEL


def test_no_path_of_somebody_s_machine() -> None:
    """A folder of the machine it was written on is of no use to a reader."""
    private = re.compile("|".join(("/" + "work/", "/" + "root/", "/home/" + r"\w+/")))
    texts = [ROOT / name for name in _kept_files() if not name.endswith((".safetensors", ".png"))]
    told = [
        path.relative_to(ROOT).as_posix()
        for path in texts
        if path.is_file() and private.search(path.read_text("utf-8", errors="replace"))
    ]
    assert told == []


def _kept_files() -> list[str]:
    """What git keeps, or would keep if it were added."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode != 0:
        pytest.skip("not a git checkout, so build products cannot be told from files we keep")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (arrows_point_down, "mla_deploy/config.py", "from mla_deploy.bundle import open_bundle"),
        (arrows_point_down, "mla_deploy/runtime/onnx.py", "import mla_deploy.validate.cases"),
        (arrows_point_down, "mla_deploy/runtime/onnx.py", "from mla_deploy import open_runner"),
        (arrows_point_down, "mla_deploy/bundle.py", "def f():\n import mla_deploy.checkpoint"),
        (arrows_point_down, "mla_deploy/rewrite/order.py", "import mla_deploy.export"),
        (arrows_point_down, "mla_deploy/source/model.py", "from mla_deploy import read_config"),
        (loads_only_its_libraries, "mla_deploy/door.py", "import torch"),
        (loads_only_its_libraries, "mla_deploy/config.py", "def f():\n import numpy"),
        (loads_only_its_libraries, "mla_deploy/bundle.py", "import numpy"),
        (loads_only_its_libraries, "mla_deploy/validate/cases.py", "import onnxruntime"),
        (loads_only_its_libraries, "mla_deploy/cli/run.py", "from rich.table import Table"),
        (opens_through_the_door, "mla_deploy/bundle.py", "open('x')"),
        (opens_through_the_door, "mla_deploy/bundle.py", "import os\nos.open('x', 0)"),
        (opens_through_the_door, "mla_deploy/bundle.py", "path.read_bytes()"),
        (opens_through_the_door, "mla_deploy/bundle.py", "path.write_text(report)"),
        (asserts_nothing, "mla_deploy/bundle.py", "assert size > 0"),
        (trusts_no_remote_code, "mla_deploy/source/model.py", "f(trust_remote_code=False)"),
        (trusts_no_remote_code, "mla_deploy/source/model.py", "d = {'trust_remote_code': 1}"),
        (is_of_a_readable_size, "bench/decode.py", "x = 1\n" * (MAX_FILE_LINES + 1)),
        (is_of_a_readable_size, "bench/decode.py", "def f():\n" + " x = 1\n" * MAX_FUNCTION_LINES),
        (is_of_a_readable_size, "bench/decode.py", "def f(a, b, c, d, e, g): pass"),
        (has_a_docstring, "bench/decode.py", "x = 1"),
    ],
)
def test_each_rule_can_say_no(rule: Rule, name: str, text: str) -> None:
    assert list(rule(name, ast.parse(text)))


def test_rules_allow_what_is_meant() -> None:
    allowed = (
        (arrows_point_down, "mla_deploy/export/trace.py", "from mla_deploy.rewrite import order"),
        (arrows_point_down, "mla_deploy/cli/run.py", "from mla_deploy import open_runner"),
        (opens_through_the_door, "mla_deploy/bundle.py", "folder.read_bytes('a', max_bytes=1)"),
        (opens_through_the_door, "mla_deploy/bundle.py", "stage.write_bytes('a', data)"),
        (loads_only_its_libraries, "mla_deploy/bundle.py",
         "if TYPE_CHECKING:\n import torch"),
    )  # fmt: skip
    for rule, name, text in allowed:
        assert not list(rule(name, ast.parse(text)))
