"""House rules of the public interface, by reflection."""

import ast
import collections.abc
import dataclasses
import importlib
import inspect
import pathlib
import pkgutil
import re
import textwrap
import typing
from collections.abc import Callable, Iterator
from types import ModuleType, UnionType
from typing import Any

import flax.linen as nn
import pytest
from jax import lax

import inreach_jax
from inreach_jax import extraction, types

PACKAGE = pathlib.Path(inreach_jax.__file__).parent
MODULES = [
    importlib.import_module(info.name)
    for info in pkgutil.walk_packages(inreach_jax.__path__, "inreach_jax.")
]

# What configures a function rather than being worked on. Names and paths are no options.
_OPTION_TYPES = (bool, int, float, inreach_jax.InReachConfig, lax.Precision, extraction.Progress)
_OPTION_ORIGINS = (typing.Literal, tuple, collections.abc.Callable)
# Options may be positional here, where nothing else is worked on.
_POSITIONAL_OPTIONS = {
    "inreach_jax.backbones.efficientnet_lite.conversion_table": {"stages"},
    "inreach_jax.backbones.layers.check_call": {"num_blocks"},
    "inreach_jax.backbones.wide_resnet.conversion_table": {"stages"},
    "inreach_jax.bank.bank_capacity": {"count"},
    "inreach_jax.descriptors.position": {"grid"},
    "inreach_jax.extraction.DescriptorSet.first": {"num"},
    "inreach_jax.extraction.Extractor.block": {"number"},
    "inreach_jax.extraction.Feed.crops": {"number"},
    "inreach_jax.extraction.descriptor_dim": {"config"},
    "inreach_jax.pipeline.make_score_fn": {"config"},
    "inreach_jax.extraction.patch_grid": {"config"},
    "inreach_jax.extraction.position_of": {"grid"},
    # As the functions of jax.lax have them.
    "inreach_jax.sharding.agree": {"value"},
    "inreach_jax.sharding.exchange": {"axes"},
    "inreach_jax.sharding.first_row": {"num_rows", "axes"},
    "inreach_jax.sharding.gather": {"axes"},
    "inreach_jax.sharding.least": {"axes"},
    "inreach_jax.sharding.of_shard": {"axes"},
    "inreach_jax.sharding.shard_map": {"f"},
    "inreach_jax.sharding.total": {"axes"},
}
_SECTIONS = ("Args:", "Returns:", "Yields:", "Raises:")


def is_ours(member: Any) -> bool:
    return getattr(member, "__module__", "").startswith("inreach_jax")


def public_members(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Functions and classes that a module defines."""
    for name, member in vars(module).items():
        defined_here = getattr(member, "__module__", None) == module.__name__
        if not name.startswith("_") and defined_here and callable(member):
            yield f"{module.__name__}.{name}", member


CLASSES = {
    name: member
    for module in MODULES
    for name, member in public_members(module)
    if inspect.isclass(member)
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: member
    for module in MODULES
    for name, member in public_members(module)
    if inspect.isfunction(member)
} | {
    f"{class_name}.{name}": inspect.unwrap(getattr(cls, name))
    for class_name, cls in CLASSES.items()
    for name, member in vars(cls).items()
    if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, classmethod))
}


def parameters(name: str) -> list[inspect.Parameter]:
    listed = list(inspect.signature(FUNCTIONS[name]).parameters.values())
    return listed[1:] if listed and listed[0].name in ("self", "cls") else listed


def source_tree(function: Callable[..., Any]) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def test_something_is_looked_at() -> None:
    assert {"inreach_jax.fitting.fit", "inreach_jax.distances.nearest"} <= FUNCTIONS.keys()
    assert "inreach_jax.extraction.DescriptorSet.select" in FUNCTIONS
    assert "inreach_jax.types.Scores" in CLASSES
    assert len(FUNCTIONS) > 50


@pytest.mark.parametrize(
    "module",
    [inreach_jax, *(m for m in MODULES if hasattr(m, "__all__"))],
    ids=lambda module: module.__name__,
)
def test_all_is_sorted_and_complete(module: ModuleType) -> None:
    names = module.__all__
    constants = [n for n in names if n.isupper()]
    classes = [n for n in names if not n.isupper() and n[0].isupper()]
    functions = [n for n in names if n[0].islower()]
    assert names == sorted(constants) + sorted(classes) + sorted(functions)
    public = {
        name
        for name, member in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(member)
    }
    assert set(names) == public
    if module is inreach_jax:
        for name in classes + functions:
            assert is_ours(getattr(module, name))


@pytest.mark.parametrize("module", [inreach_jax, *MODULES], ids=lambda module: module.__name__)
def test_modules_say_what_they_are(module: ModuleType) -> None:
    first, *rest = (module.__doc__ or "").split("\n")
    assert len(first) > 20
    assert not rest or rest[0] == "" or first[-1] not in ".:", module.__name__


@pytest.mark.parametrize("name", CLASSES)
def test_classes_are_documented(name: str) -> None:
    cls = CLASSES[name]
    doc = cls.__dict__.get("__doc__") or ""
    # A dataclass without a docstring has its signature for one.
    assert doc
    assert not doc.startswith(f"{cls.__name__}(")
    if dataclasses.is_dataclass(cls) and cls.__module__ != types.__name__:
        own = set(inspect.get_annotations(cls))
        if issubclass(cls, nn.Module):
            own -= {"name", "parent"}  # flax adds them
        attributes = inspect.cleandoc(doc).partition("Attributes:")[2]
        if attributes:
            assert own == set(re.findall(r"^  (\w+): ", attributes, re.MULTILINE))
        elif not issubclass(cls, nn.Module):  # those of a base class, which documents them
            assert own <= {f for base in cls.__mro__[1:] for f in inspect.get_annotations(base)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_documented(name: str) -> None:
    function = FUNCTIONS[name]
    doc = inspect.cleandoc(function.__doc__ or "")
    assert doc, "no docstring"
    sections = [line for line in doc.split("\n") if line in _SECTIONS]
    assert sections == sorted(sections, key=_SECTIONS.index)
    if "Args:" in sections:
        args = re.split(r"\n\w+:\n", doc.partition("Args:\n")[2] + "\n")[0]
        documented = re.findall(r"^  \*{0,2}(\w+): ", args, re.MULTILINE)
        assert documented == [p.name for p in parameters(name)]
        returns = inspect.signature(function).return_annotation
        if returns is not None:
            assert {"Returns:", "Yields:"} & set(sections)
    else:
        assert len(parameters(name)) <= 3, "too many to go without a word"
        assert name.rpartition(".")[2] not in inreach_jax.__all__

    raised = {
        node.exc.func.id
        for node in ast.walk(source_tree(function))
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and isinstance(node.exc.func, ast.Name)
        and not node.exc.func.id.startswith("_")
    }
    for error in raised:
        assert re.search(rf"{error}:|{error}\b", doc.partition("Raises:")[2]), (
            f"{error} undocumented"
        )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_type_hints(name: str) -> None:
    signature = inspect.signature(FUNCTIONS[name])
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in parameters(name):
        assert parameter.annotation is not inspect.Parameter.empty, parameter.name
    typing.get_type_hints(FUNCTIONS[name])  # they can be resolved


def is_option(annotation: Any) -> bool:
    if isinstance(annotation, UnionType) or typing.get_origin(annotation) is typing.Union:
        return all(is_option(a) for a in typing.get_args(annotation) if a is not type(None))
    return annotation in _OPTION_TYPES or typing.get_origin(annotation) in _OPTION_ORIGINS


@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_are_keyword_only(name: str) -> None:
    positional = {
        p.name
        for p in parameters(name)
        if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        and (p.default is not inspect.Parameter.empty or is_option(p.annotation))
    }
    assert positional == _POSITIONAL_OPTIONS.get(name, set())


def test_exceptions_to_the_rule_exist() -> None:
    assert _POSITIONAL_OPTIONS.keys() <= FUNCTIONS.keys()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_the_library_is_silent_and_asserts_nothing(path: pathlib.Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}: raise ValueError instead"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "input", "breakpoint"), f"{path}:{node.lineno}"
        if isinstance(node, ast.Import):
            assert "logging" not in {alias.name for alias in node.names}, path


def test_pytrees_state_the_shape_of_every_field() -> None:
    lines = inspect.getsource(types).split("\n")
    fields = {}
    for cls in (c for c in vars(types).values() if inspect.isclass(c)):
        assert dataclasses.is_dataclass(cls)
        assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert all(field.kw_only for field in dataclasses.fields(cls))
        fields[cls.__name__] = [field.name for field in dataclasses.fields(cls)]
        for field in fields[cls.__name__]:
            (line,) = [
                text
                for text in inspect.getsource(cls).split("\n")
                if text.startswith(f"    {field}: ")
            ]
            if line.split(": ")[1].split(" ")[0] in vars(types):  # a pytree of its own
                continue
            assert re.search(r"  # \[[\w, *]*\] (float32|int32)\b", line), line
            assert line in lines
    assert {"Association", "Channels", "NominalBank", "Scores"} <= fields.keys()


def test_readers_of_the_code_find_no_paths_of_a_machine() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"(?<![\w.])/(work|tmp|root|home)/", path.read_text("utf-8")), path
