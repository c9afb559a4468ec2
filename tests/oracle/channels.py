"""From mutual nearest neighbours to channels, and from those to the nominal patches."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
ChannelId = tuple[int, int]  # (seed, patch): the channel's first element
Element = tuple[int, int]  # (image, patch)


class Member(NamedTuple):
    """Patch `patch` of image `image` joins the channel that `channel` founded."""

    channel: ChannelId
    image: int
    patch: int


class Radii(NamedTuple):
    """Distances of a channel's elements to their mean, and the scale they are compared with."""

    radii: Float  # [span]
    scale: float  # standard deviation or root mean square of the radii; infinite for "none"


def members(
    mutual_seed_patch: npt.ArrayLike,
    distance: npt.ArrayLike,
    *,
    veto: bool,
    index_order: Literal["matched", "swapped"],
) -> list[Member]:
    """Who joins which channel, in the order of (image, image patch).

    The best seed of a patch is the one with the nearest patch, the first of equally near ones.
    Its patch q matched to image j's patch p makes, if "matched", (j, p) a member of the channel
    (seed, q); if "swapped", the order of the released implementation, (j, q) a member of the
    channel (seed, p).

    Args:
      mutual_seed_patch: [S, N, P], -1 where there is no mutual match.
      distance: [S, N, P], infinite where not compared; squared or not.
      veto: choose the best seed among all, and drop the patch if that seed's match is not mutual;
        else choose it among the seeds with a mutual match.
      index_order: see above.
    """
    mutual_seed_patch, distance = np.asarray(mutual_seed_patch), np.asarray(distance)
    num_seeds, num_images, num_patches = mutual_seed_patch.shape
    out = []
    for j in range(num_images):
        for p in range(num_patches):
            eligible = [
                s
                for s in range(num_seeds)
                if np.isfinite(distance[s, j, p]) and (veto or mutual_seed_patch[s, j, p] >= 0)
            ]
            if not eligible:
                continue
            best = min(eligible, key=lambda s: (distance[s, j, p], s))
            q = int(mutual_seed_patch[best, j, p])
            if q < 0:
                continue
            if index_order == "matched":
                out.append(Member((best, q), j, p))
            else:
                out.append(Member((best, p), j, q))
    return out


def collect(members: Sequence[Member]) -> dict[ChannelId, list[Element]]:
    """The elements of each channel: the seed's patch, and then the members as they come."""
    channels: dict[ChannelId, list[Element]] = {}
    for channel, image, patch in members:
        channels.setdefault(channel, [channel]).append((image, patch))
    return channels


def radii(
    descriptors: npt.ArrayLike,
    elements: Sequence[Element],
    radius_filter: Literal["none", "std", "rms"],
) -> Radii:
    """Distances of a channel's elements, seed included, to their mean.

    Args:
      descriptors: [N, P, D].
      elements: the channel.
      radius_filter: "std": the scale is the population standard deviation of the radii; "rms":
        their root mean square; "none": infinity.
    """
    descriptors = np.asarray(descriptors)
    x = np.array([descriptors[image, patch] for image, patch in elements], np.float64)
    r = np.sqrt(((x - x.mean(axis=0)) ** 2).sum(axis=1))
    if radius_filter == "std":
        return Radii(r, float(np.sqrt(((r - r.mean()) ** 2).mean())))
    if radius_filter == "rms":
        return Radii(r, float(np.sqrt((r**2).mean())))
    return Radii(r, np.inf)


def nominal(
    descriptors: npt.ArrayLike | None,
    members: Sequence[Member],
    *,
    min_channel_length: int,
    radius_filter: Literal["none", "std", "rms"],
    max_channel_std: float,
) -> list[Element]:
    """The nominal patches: what the radius filter leaves of the channels that are long enough.

    Args:
      descriptors: [N, P, D]; not used, and may be None, where `radius_filter` is "none".
      members: as `members` returns them.
      min_channel_length: channels must be longer than this, seed included, before the filter and
        after it.
      radius_filter: scale of the radii; "none" keeps every element.
      max_channel_std: elements, the seed no exception, with r >= max_channel_std * scale go.

    Returns:
      (image, patch), sorted; as often as there are kept channels that hold the patch.
    """
    out: list[Element] = []
    for elements in collect(members).values():
        if len(elements) <= min_channel_length:
            continue
        if radius_filter == "none":
            kept = elements
        else:
            if descriptors is None:
                raise ValueError("a radius filter needs descriptors; got None")
            r, scale = radii(descriptors, elements, radius_filter)
            kept = [
                e for e, ri in zip(elements, r, strict=True) if not ri >= max_channel_std * scale
            ]
        if len(kept) > min_channel_length:
            out.extend(kept)
    return sorted(out)


def nominal_precision_recall(
    nominal: Sequence[Element],
    masks: npt.NDArray[np.uint8],
    grid: tuple[int, int],
    *,
    mask_threshold: int,
    recall: Literal["patches", "released"],
) -> tuple[float, float]:
    """How much of the bank is good, and how much of what is good is in the bank.

    A patch is good if no pixel of its block is anomalous.

    Args:
      nominal: (image, patch) of the bank's rows.
      masks: uint8 [N, H, W], H and W multiples of the grid's.
      grid: (Hp, Wp).
      mask_threshold: pixels >= this are anomalous.
      recall: "patches": distinct good nominal patches / good patches. "released": good rows of
        the bank, each repetition counted / (patches - anomalous pixels // (H // Hp)).

    Returns:
      Share of the rows ("released": repetitions counted; "patches": distinct) that are good, and
      recall.
    """
    num_images, height, width = masks.shape
    hp, wp = grid
    bh, bw = height // hp, width // wp
    good: dict[Element, bool] = {}
    for j in range(num_images):
        for p in range(hp * wp):
            y, x = p // wp * bh, p % wp * bw
            good[j, p] = not (masks[j, y : y + bh, x : x + bw] >= mask_threshold).any()
    rows = list(nominal) if recall == "released" else sorted(set(nominal))
    hits = sum(good[row] for row in rows)
    if recall == "released":
        anomalous_pixels = int((masks >= mask_threshold).sum())
        return hits / len(rows), hits / (num_images * hp * wp - anomalous_pixels // bh)
    return hits / len(rows), hits / sum(good.values())
