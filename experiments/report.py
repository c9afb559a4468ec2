"""The report: one HTML file that needs nothing else, neither a server nor the network.

Whatever comes from file names is escaped by the template engine, and the page's own policy allows
no script but the one in it, no request at all.
"""

import base64
import dataclasses
import hashlib
import io
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

_TEMPLATES = pathlib.Path(__file__).parent / "templates"
_QUALITY, _MAX_SIDE = 85, 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reason:
    """A patch that is odd, and the nominal patch that it was compared with.

    Attributes:
      patch: [h, w, 3] uint8, the patch and what is around it.
      nominal: [h, w, 3] uint8, likewise; None where its image could not be read again.
      source: The name of the image that the nominal patch is from.
      distance: Between the two.
    """

    patch: np.ndarray
    nominal: np.ndarray | None
    source: str
    distance: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """An image that is shown.

    Attributes:
      name: Of the image.
      score: Of the image.
      p_value: Of the image.
      pixels: [h, w, 3] uint8, what was scored of it.
      heat: [h, w, 3] uint8, its map in colours.
      reasons: The oddest patches first.
    """

    name: str
    score: float
    p_value: float
    pixels: np.ndarray
    heat: np.ndarray
    reasons: Sequence[Reason]


def write_report(
    path: pathlib.Path,
    *,
    title: str,
    cards: Sequence[Card],
    scores: np.ndarray,
    threshold: float,
    knots: tuple[np.ndarray, np.ndarray],
    skipped: Sequence[tuple[str, str]],
    facts: Sequence[tuple[str, str]],
) -> None:
    """Writes the report whole or not at all.

    Args:
      path: Of the file.
      title: Of the page.
      cards: The images that are shown, the most suspicious first.
      scores: [N] of all images, shown or not.
      threshold: Where the slider begins.
      knots: [K] scores, ascending, and [K] the shares of good images expected at or above them.
      skipped: Names of files, and why they were passed over.
      facts: What the reader should know, as pairs of a term and what it is.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    data: dict[str, Any] = {
        "scores": [round(float(score), 6) for score in scores],
        "threshold": round(float(threshold), 6),
        "knots": [[round(float(x), 6) for x in knots[0]], [float(f"{x:.3g}") for x in knots[1]]],
    }
    html = environment.get_template("report.html").render(
        title=title,
        cards=cards,
        num_images=len(scores),
        skipped=skipped,
        facts=facts,
        data=data,
        style=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(path)


def odd_patches(patches: np.ndarray, *, num: int, apart: int) -> list[tuple[int, int]]:
    """The oddest patches that do not lie next to one another.

    Args:
      patches: [Hp, Wp] float32.
      num: At most so many.
      apart: Patches that are nearer than this to a chosen one, in rows and columns, are left out.

    Returns:
      (row, column) pairs, the oddest first.
    """
    left = np.array(patches, np.float64)
    chosen: list[tuple[int, int]] = []
    while len(chosen) < num and np.isfinite(left).any():
        row, column = (int(i) for i in np.unravel_index(np.argmax(left), left.shape))
        chosen.append((row, column))
        left[
            max(row - apart + 1, 0) : row + apart, max(column - apart + 1, 0) : column + apart
        ] = -np.inf
    return chosen


def window(
    pixels: np.ndarray, *, where: tuple[int, int], grid: tuple[int, int], side: int
) -> np.ndarray:
    """A patch and what is around it, moved inside where it would lie over the border.

    Args:
      pixels: [h, w, 3] uint8.
      where: Row and column of the patch.
      grid: (Hp, Wp) of the patches.
      side: Of the window, in pixels; less where the image is smaller.

    Returns:
      [side, side, 3] uint8.
    """
    corner = []
    for position, num, length in zip(where, grid, pixels.shape[:2], strict=True):
        centre = (position + 0.5) * length / num
        corner.append(int(np.clip(round(centre - side / 2), 0, max(length - side, 0))))
    top, left = corner
    return pixels[top : top + side, left : left + side]


def _data_uri(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    image.save(buffer, format="JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
