"""`make docs`: a page per module, from docstrings, without a warning."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_every_module_has_a_page(tmp_path: pathlib.Path) -> None:
    recipe = subprocess.run(
        ["make", "--dry-run", "docs"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.replace("\\\n", " ")
    (line,) = (line for line in recipe.split("\n") if " -m pdoc " in line)
    arguments = line.split(" -m pdoc ")[1].split()
    assert arguments[arguments.index("--output-directory") + 1] == "build/docs"
    arguments[arguments.index("build/docs")] = str(tmp_path)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pdoc", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for path in (ROOT / "inreach_jax").rglob("[a-z]*.py"):
        page = tmp_path / path.relative_to(ROOT).with_suffix(".html")
        assert page.is_file(), page
    text = (tmp_path / "inreach_jax.html").read_text("utf-8")
    assert "make_score_fn" in text
