"""The report in a real browser: no network, no complaint, and its controls work."""

import base64
import html
import io
import pathlib
import re
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from experiments import report
from tests import browser

EVIL = "<img src=x onerror=alert(1)>\"'&</script><script>alert(2)</script>.png"
SCORES = np.array([9.0, 5.0, 4.0, 3.5, 3.0, 1.0])  # the last one is not shown


def colours(seed: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)


def card(name: str, score: float) -> report.Card:
    reason = report.Reason(patch=colours(3), nominal=colours(4), source=EVIL, distance=2.0)
    missing = report.Reason(patch=colours(5), nominal=None, source="b10.png", distance=1.0)
    return report.Card(
        name=name,
        score=score,
        p_value=0.01,
        pixels=colours(1),
        heat=colours(2),
        reasons=[reason, missing],
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    names = ["b10.png", "b9.png", EVIL, "a/c.png", "d.png"]
    report.write_report(
        path,
        title=f"folder {EVIL}",
        cards=[card(name, score) for name, score in zip(names, SCORES, strict=False)],
        scores=SCORES,
        threshold=4.5,
        knots=(np.array([0.0, 2.0, 4.0, 6.0]), np.array([1.0, 0.5, 0.1, 0.01])),
        skipped=[(EVIL, "it is <b>empty</b>")],
        facts=[("Images", "six")],
    )
    return path


@pytest.fixture(scope="module")
def page(path: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    with browser.page(tmp_path_factory.mktemp("profile")) as page:
        page.open(path)
        yield page


def shown(page: browser.Page) -> list[str]:
    names: list[str] = page.run(
        "[...document.querySelectorAll('.card')].filter(c => !c.hidden).map(c => c.dataset.name)"
    )
    return names


def choose(page: browser.Page, name: str, value: object, event: str) -> None:
    field = "checked" if isinstance(value, bool) else "value"
    literal = str(value).lower() if isinstance(value, bool) else f"'{value}'"
    page.run(
        f"(n => {{ n.{field} = {literal}; n.dispatchEvent(new Event('{event}')); }})"
        f"(document.getElementById('{name}'))"
    )


def test_names_are_escaped(path: pathlib.Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "<img src=x" not in text
    assert "alert(2)</script>" not in text
    assert text.count("<script") == 2
    assert html.escape("it is <b>empty</b>") in text


def test_it_needs_nothing_else(path: pathlib.Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    sources = re.findall(r"(?:src|href)=\"([^\"]*)\"", text)
    assert len(sources) == 1 + 5 * (2 + 3)  # the icon; per card, two images and three patches
    assert all(source.startswith("data:") for source in sources)


def test_it_says_what_is_not_shown(path: pathlib.Path) -> None:
    assert "The 5 most suspicious of 6 images are shown" in path.read_text(encoding="utf-8")


def test_it_loads_without_network_or_complaint(page: browser.Page, path: pathlib.Path) -> None:
    # Lazy images below the fold load when they are scrolled to.
    page.run("window.scrollTo(0, document.body.scrollHeight)")
    page.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    others = {url for url in page.requests if not url.startswith("data:")}
    assert others == {path.as_uri()}
    assert page.complaints == []
    assert page.run("document.title") == f"folder {EVIL}"
    assert page.run("document.querySelectorAll('#histogram rect').length") == 60
    assert page.run("document.querySelector('.card img').naturalWidth") == 16
    assert page.run("document.querySelectorAll('h1 img, td script').length") == 0


def test_sorting(page: browser.Page) -> None:
    odd = ["b10.png", "b9.png", EVIL, "a/c.png", "d.png"]
    assert shown(page) == odd
    choose(page, "order", "calm", "change")
    assert shown(page) == odd[::-1]
    choose(page, "order", "name", "change")
    assert [name for name in shown(page) if name != EVIL] == [
        *("a/c.png", "b9.png", "b10.png", "d.png")
    ]
    choose(page, "order", "odd", "change")
    assert shown(page) == odd


def test_the_slider(page: browser.Page) -> None:
    def over() -> list[str]:
        names: list[str] = page.run(
            "[...document.querySelectorAll('.card.over')].map(c => c.dataset.name)"
        )
        return names

    assert over() == ["b10.png", "b9.png"]
    assert page.run("document.getElementById('above').textContent") == "2"
    assert page.run("document.getElementById('alarms').textContent") == "5.6%"
    choose(page, "threshold", 250, "input")  # of 1 to 9
    assert page.run("document.getElementById('value').textContent") == "3.000"
    assert len(over()) == 5
    assert page.run("document.getElementById('alarms').textContent") == "22%"
    choose(page, "threshold", 1000, "input")
    assert over() == ["b10.png"]
    choose(page, "only", True, "change")
    assert shown(page) == ["b10.png"]
    choose(page, "only", False, "change")
    choose(page, "find", "A/C", "input")
    assert shown(page) == ["a/c.png"]
    choose(page, "find", "", "input")
    assert len(shown(page)) == 5
    assert page.complaints == []


def test_large_images_are_shown_smaller() -> None:
    uri = report._data_uri(np.zeros((100, 2000, 3), np.uint8))
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert image.size == (512, 26)


def test_odd_patches_lie_apart() -> None:
    patches = np.zeros((6, 6), np.float32)
    patches[1, 1], patches[1, 2], patches[4, 4], patches[5, 0] = 9, 8, 7, 6
    assert report.odd_patches(patches, num=3, apart=2) == [(1, 1), (4, 4), (5, 0)]
    assert report.odd_patches(patches, num=9, apart=6) == [(1, 1)]


def test_windows_stay_inside() -> None:
    pixels = np.arange(32 * 32 * 3).reshape(32, 32, 3)
    top_left = report.window(pixels, where=(0, 0), grid=(8, 8), side=10)
    np.testing.assert_array_equal(top_left, pixels[:10, :10])
    inside = report.window(pixels, where=(4, 2), grid=(8, 8), side=4)
    np.testing.assert_array_equal(inside, pixels[16:20, 8:12])
    assert report.window(pixels, where=(7, 7), grid=(8, 8), side=99).shape == (32, 32, 3)
