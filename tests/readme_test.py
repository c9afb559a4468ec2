"""What README.md says works as it stands: its commands, its code and its links."""

import importlib.util
import pathlib
import re

import numpy as np
import pytest

from inreach_jax.datasets import make_demo

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_opens_with_the_two_commands() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    first = blocks("sh")[0]
    assert re.findall(r"^make (\w+)", first, re.MULTILINE) == ["demo", "test"]
    assert TEXT.index(first) < 100
    assert {"demo", "test", "lint", "help"} <= targets


def test_binaries_exist() -> None:
    names = re.findall(r"python -m (experiments\.\w+)", TEXT)
    assert names
    for name in names:
        assert importlib.util.find_spec(name) is not None


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), target


def test_flags_exist() -> None:
    from absl import flags

    from experiments import (  # noqa: F401
        ablation,
        benchmark,
        contamination,
        folder,
        inspect,
        mvtec,
        parity,
        predict,
        prepare,
    )

    for flag in re.findall(r"--(\w+)", TEXT):
        if flag != "helpfull":
            assert flag in flags.FLAGS, flag


def test_code_runs() -> None:
    (code,) = blocks("python")
    dataset = make_demo("brick", num_train=12, num_test=4, size=64)
    names: dict[str, object] = {"images": dataset.train.images, "batch": dataset.test.images}
    exec(compile(code, "README.md", "exec"), names)
    scores = names["scores"]
    assert scores.image.shape == (4,)  # type: ignore[attr-defined]
    assert scores.maps.shape == (4, 224, 224)  # type: ignore[attr-defined]
    assert np.isfinite(scores.maps).all()  # type: ignore[attr-defined]
