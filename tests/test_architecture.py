"""The house rules that a reader relies on: imports point down, files stay small, every recipe loads."""

import ast
import importlib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from jaxtron.config import dump, load, settings
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.run.configuration import Configuration, configuration_type
from jaxtron.run.history import CHANGES, KINDS
from jaxtron.sharding.folding import FLAGS

ROOT = Path(__file__).parent.parent
FILES = sorted(ROOT.glob("jaxtron/**/*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
RECIPES = sorted(ROOT.glob("configs/*.yaml"))

# A package may import those of lower floors; packages of one floor are peers that do not know each other.
FLOORS = [
    {"interrupts"},
    {"__init__", "typing", "config", "roles", "quiet", "words"},
    {"help"},
    {"command", "gpus", "sharding", "kernels"},
    {"pipeline", "data", "optim", "runtime"},
    {"layers", "pictures"},
    {"models"},
    {"checkpoint", "preprocess", "weights"},
    {"run", "curate"},
    {"train", "plan", "generate"},
    {"convert", "doctor", "evaluate", "launch", "runs", "serve"},
    {"api"},
    {"__main__"},
]
FLOOR = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
# Inside a package of many rooms: a file may import those of lower floors, and rooms of one floor are peers.
INNER_FLOORS = {
    "plan": [
        {"table", "machine", "memory_use"},
        {"layout", "hint", "resident"},
        {"compiled", "formula"},
        {"plan"},
        {"search"},
        {"html", "report", "compare", "schedule", "request", "traffic"},
        {"show"},
        {"__main__"},
    ],
}
# the dispatcher imports the one verb that was asked for
LAZY = {"jaxtron/__main__.py"}
# by two classes each; no more, please
SHARED_NAMES = {"Stack"}
COLLECTIVES = ("psum", "pmax", "all_gather", "psum_scatter", "ppermute", "all_to_all", "all_reduce", "permute")
MOST_FILES = 15
MOST_FILE_LINES = 500
MOST_FUNCTION_LINES = 100


def package_of(path: Path) -> str:
    return path.relative_to(ROOT / "jaxtron").parts[0].removesuffix(".py")


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Those of a file, also of its classes and other functions."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def first_party(node: ast.AST) -> list[str]:
    """Packages of `jaxtron` that an import statement names."""
    if isinstance(node, ast.ImportFrom) and node.module:
        parts = node.module.split(".")
        if parts[0] == "jaxtron":
            return [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("jaxtron.")]
    return []


def test_imports_point_down() -> None:
    wrong = []
    for path in FILES:
        here = package_of(path)
        for node in ast.walk(TREES[path]):
            upward = [package for package in first_party(node) if package != here and FLOOR[package] >= FLOOR[here]]
            wrong += [f"{place(path, node)} imports {package}" for package in upward]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", INNER_FLOORS)
def test_imports_point_down_inside_a_package(package: str) -> None:
    floors = {room: floor for floor, rooms in enumerate(INNER_FLOORS[package]) for room in rooms}
    for path in FILES:
        if package_of(path) != package or path.name == "__init__.py":
            continue
        here = path.relative_to(ROOT / "jaxtron" / package).parts[0].removesuffix(".py")
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[:2] == ["jaxtron", package]:
                for room in node.module.split(".")[2:3] or [alias.name for alias in node.names]:
                    assert room == here or floors[room] < floors[here], f"{path}:{node.lineno} imports {room}"


def test_no_room_is_crowded() -> None:
    rooms: dict[Path, int] = {}
    for path in FILES:
        if path.name != "__init__.py":
            rooms[path.parent] = rooms.get(path.parent, 0) + 1
    crowded = {str(room): count for room, count in rooms.items() if count > MOST_FILES}
    assert not crowded, f"more than {MOST_FILES} files in a folder, make rooms inside: {crowded}"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """The modules of `jaxtron` that a file imports at any place."""
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            # `from jaxtron.plan import layout` names a module, `from jaxtron.plan.layout import text` does not
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & modules) or {node.module}
    return found & modules


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {module_of(path) for path in FILES}
    graph = {module_of(path): imported_modules(path, modules) for path in FILES}
    assert graph["jaxtron.run.session"] >= {"jaxtron.run.step", "jaxtron.sharding.rules"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_no_import_hides_in_a_function() -> None:
    hidden = [
        f"{place(path, node)} hides an import in {function.name}"
        for path in FILES
        if str(path.relative_to(ROOT)) not in LAZY
        for function in functions(path)
        for node in ast.walk(function)
        if first_party(node)
    ]
    assert not hidden, "\n".join(hidden)


def test_files_and_functions_stay_small() -> None:
    large = [f"{place(path, TREES[path])}" for path in FILES if path.read_text().count("\n") > MOST_FILE_LINES]
    for path in FILES:
        for function in functions(path):
            assert function.end_lineno is not None
            if function.end_lineno - function.lineno >= MOST_FUNCTION_LINES:
                large.append(f"{place(path, function)} {function.name}")
    assert not large, "\n".join(large)


def test_only_sharding_knows_the_axes_of_the_mesh() -> None:
    """Elsewhere they are `rules.axes(flag)`, and one device's code is a `region` or `over_tensor`."""
    for path in FILES:
        if package_of(path) in ("sharding", "kernels"):
            continue
        for node in ast.walk(TREES[path]):
            assert not (isinstance(node, ast.Attribute) and node.attr in ("shard_map", "axis_names")), path
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("PartitionSpec", "axis_index", *COLLECTIVES):
                words = [word for part in node.args for word in ast.walk(part) if isinstance(word, ast.Constant)]
                named = [word.value for word in words if isinstance(word.value, str) and word.value in FLAGS]
                asked = [flag for part in node.args for flag in asked_flags(part)]
                assert named == asked, f"{path}:{node.lineno} names the axis {named} in {name}"


def asked_flags(node: ast.AST) -> list[str]:
    """Flags in calls such as `rules.axes("tensor")`."""
    calls = (call for call in ast.walk(node) if isinstance(call, ast.Call))
    asks = [call for call in calls if getattr(call.func, "attr", "") in ("axes", "parts")]
    return [word.value for call in asks for word in call.args if isinstance(word, ast.Constant)]


def test_every_file_imports() -> None:
    for path in FILES:
        if path.name != "__main__.py":
            importlib.import_module(module_of(path))


def test_every_file_says_what_it_is() -> None:
    silent = [place(path, tree) for path, tree in TREES.items() if tree.body and not ast.get_docstring(tree)]
    assert not silent, "\n".join(silent)


def test_recipes_load_and_survive_saving(tmp_path: Path) -> None:
    for path in RECIPES:
        config_type = configuration_type([str(path)])
        config = load(config_type, path).resolved()
        saved = tmp_path / path.name
        saved.write_text(dump(config))
        assert load(config_type, saved) == config, path.name


def test_every_setting_says_whether_a_run_may_go_on_with_another_value() -> None:
    known = {name for name, setting in settings(Configuration).items() if not setting.is_section}
    named = [
        f"{section}.{name}".removeprefix(".")
        for section, kinds in CHANGES.items()
        for names in kinds.values()
        for name in names.split()
    ]
    assert len(named) == len(set(named)) == len(KINDS), "a setting is named twice in CHANGES of run/history.py"
    # a model's settings are its family's to name, what it does not name may not change
    named_there = [f"model.{name}" for words in (ModelConfig.FREE, ModelConfig.CONTENT) for name in words.split()]
    assert {*named, *named_there} <= known, "CHANGES of run/history.py, or a FamilyConfig, names what is no setting"
    known = {name for name in known if not name.startswith("model.")}
    # one of an optional section, such as train.batch_ramp.start, is as the section
    forgotten = [name for name in known if not any(name == own or name.startswith(f"{own}.") for own in named)]
    assert not forgotten, f"add {forgotten} to CHANGES of run/history.py"


def test_settings_are_documented_in_one_way() -> None:
    for path in FILES:
        for node in ast.walk(TREES[path]):
            for field in node.body if isinstance(node, ast.ClassDef) else ():
                described = [
                    keyword
                    for call in ast.walk(field)
                    if isinstance(field, ast.AnnAssign) and isinstance(call, ast.Call)
                    for keyword in call.keywords
                    if keyword.arg == "description"
                ]
                assert not described, f"{path}:{field.lineno} describe it in a docstring below"


def test_no_two_classes_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for path in FILES:
        for node in TREES[path].body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    shared = {name: found for name, found in places.items() if len(found) > 1 and name not in SHARED_NAMES}
    assert not shared, f"name them by their role: {shared}"
