"""What importing the library loads, and that reading order is import order."""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "inreach_jax"

# A module imports only from lines above its own.
ORDER = (
    "types",
    "config",
    "sharding",
    "products",
    "distances",
    "proofs",
    "pruning",
    "rounded",
    "images",
    "backbones",
    "descriptors",
    "tiling",
    "store",
    "extraction",
    "association",
    "channels",
    "support",
    "projection",
    "bank",
    "reduction",
    "fitting",
    "scoring",
    "calibration",
    "pipeline",
    "memory",
    "exported",
    "export",
    "metrics",
    "checkpoint",
    "datasets",
)
# Which parts may import these, wherever in the file.
ONLY = {
    "PIL": {"datasets"},
    "absl": set(),
    "array_record": {"datasets"},
    "etils": {"datasets"},
    "flax": {"backbones"},
    "importlib_resources": {"datasets"},
    "matplotlib": set(),
    "optax": {"projection"},
    "orbax": {"checkpoint"},
    "safetensors": {"backbones"},
    "scipy": {"calibration", "metrics"},
    "skimage": {"datasets"},
    "sklearn": set(),
    "tensorflow": set(),
    "tensorflow_datasets": {"datasets"},
    "torch": {"backbones"},
    "tqdm": set(),
}
# What `import inreach_jax` must not load: slow, or not needed to score.
NOT_LOADED = (
    "PIL",
    "array_record",
    "inreach_jax.datasets",
    "matplotlib",
    "orbax",
    "skimage",
    "tensorflow",
    "tensorflow_datasets",
    "tensorstore",
    "torch",
    "tqdm",
)

FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: pathlib.Path) -> str:
    """The part of the library that a file belongs to: a module or a package below the root."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: pathlib.Path) -> Iterator[str]:
    """Full names of whatever a file imports, be it inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_file_has_its_place() -> None:
    assert {part_of(path) for path in FILES} - {"__init__"} <= set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_upwards(path: pathlib.Path) -> None:
    part = part_of(path)
    for name in imported(path):
        package, *rest = name.split(".")
        if package == "inreach_jax":
            assert rest, f"{path}: import a module of the library, not all of it"
            if part != "__init__" and rest[0] != part:
                assert ORDER.index(rest[0]) < ORDER.index(part), f"{path} imports {name}"
        else:
            assert package not in ("experiments", "tests", "third_party"), f"{path} imports {name}"
            assert part in ONLY.get(package, {part}), f"{path} imports {name}"


def test_modules_of_a_package_do_not_import_it() -> None:
    """`from inreach_jax.backbones import x` inside backbones would be a cycle."""
    for path in FILES:
        package = "inreach_jax." + ".".join(path.relative_to(PACKAGE).parent.parts)
        if path.parent != PACKAGE and path.name != "__init__.py":
            modules = {p.stem for p in path.parent.glob("*.py")}
            for name in imported(path):
                if name.startswith(package + "."):
                    assert name.removeprefix(package + ".").split(".")[0] in modules, path


def test_import_is_light() -> None:
    code = (
        "import sys, inreach_jax\n"
        "print(*sorted(sys.modules))\n"
        "import jax\n"
        "assert not jax._src.xla_bridge._backends, 'a device was initialised'\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert "inreach_jax.pipeline" in loaded
    assert loaded.isdisjoint(NOT_LOADED)
    assert result.stderr == ""
