"""The arrays that flow through the library, as frozen pytrees.

Shape legend, used everywhere:

    B  images in a batch          P  patches per image, Hp * Wp, row-major
    N  images in a set            D  descriptor dimensions
    S  seed images                M  bank rows

A channel is identified by an integer in [0, S * P), `seed * P + seed_patch`: the patch of a seed
image that founded it. Whatever belongs to no channel has the id `UNMATCHED`.
"""

import dataclasses

import jax

UNMATCHED = -1


def _static(default: int) -> int:
    """A field that is part of a pytree's structure: arrays have their shapes from it."""
    value: int = dataclasses.field(default=default, metadata={"static": True})
    return value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Association:
    """Mutual nearest neighbours between images and the seed images (paper, section 3.2).

    Image patch p of image j and patch `mutual_seed_patch[s, j, p]` of seed s are each other's
    nearest; where p has no such partner the entry is `UNMATCHED`. Pairs of images that were not
    compared (an image with itself) are `UNMATCHED` at distance infinity throughout.
    """

    mutual_seed_patch: jax.Array  # [S, N, P] int32 in [0, P), or UNMATCHED
    sq_distance: jax.Array  # [S, N, P] float32, squared, to the nearest patch of seed s


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedMatches:
    """What the patches of the seeds have found among those seeds that they were compared with."""

    sq_distance: jax.Array  # [S, P] float32, squared, to the nearest patch; infinite for none
    seed: jax.Array  # [S, P] int32, of which seed; S for none
    patch: jax.Array  # [S, P] int32 in [0, P), which patch if the match is mutual, or UNMATCHED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Members:
    """Who belongs to which channel.

    Each image patch joins at most one channel, the one of its best seed patch. `patch` is the
    patch that the channel receives: the image patch itself, or with the released index order
    (`InReachConfig.index_order`) another one of the same image.
    """

    channel: jax.Array  # [N, P] int32 in [0, S * P), or UNMATCHED
    patch: jax.Array  # [N, P] int32 in [0, P)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Channels:
    """Channels and what the filter left of them. The seed patch counts as a member."""

    span: jax.Array  # [S * P] int32, realizations in the channel before the radius filter
    spread: jax.Array  # [S * P] float32, the scale that the radius filter compares radii with
    kept_span: jax.Array  # [S * P] int32, realizations kept; 0 where the channel was dropped
    kept_by: jax.Array  # [N, P] int32, the channel that keeps what a patch brings, or UNMATCHED
    multiplicity: jax.Array  # [N, P] int32, kept channels that hold the patch; nominal where > 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BankIndex:
    """What makes searching a bank faster: see `inreach_jax.pruning` and `inreach_jax.rounded`.

    It is of the rows as they were when it was made, and is made anew rather than saved. Heads of
    padding rows are 0.
    """

    heads: jax.Array  # [M, E] float32 or 16 bits, rows along the basis and what is left, or rows
    norm: jax.Array  # [M] float32, squared, of the heads, less what rounding may add to distances
    slack: jax.Array  # [] float32, how far a head may be off
    basis: jax.Array | None = None  # [D, d] float32, directions; None: heads are rounded rows
    scale: jax.Array | None = None  # [] float32, power of two, of rows before they are rounded
    num_images: int = _static(0)  # [] int32, static: nearest images told apart; 0 without a span


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NominalBank:
    """The nominal patches, ready to be searched.

    Rows at and beyond `count` are padding and are never a neighbour. The original descriptors are
    `rows + centre`, unless there is a projection: rows are then what it makes of their difference
    from the centre, and so are queries. Each nominal patch stands once, in the order of (image,
    patch).

    With a span, a patch is as far from the bank as from the nearest row of its span-th nearest
    image, less the usual growth, or of its nearest one, and every image has equally many rows: see
    `inreach_jax.support`.
    """

    rows: jax.Array  # [M, D] float32, descriptors less `centre`; [M, d] where they are projected
    centre: jax.Array  # [D] float32, mean of the nominal descriptors
    image: jax.Array  # [M] int32, index of the training image that a row comes from
    patch: jax.Array  # [M] int32, index of its patch
    multiplicity: jax.Array  # [M] int32, kept channels that hold the patch; with a span 1
    count: jax.Array  # [] int32, rows in use
    span: jax.Array | None = None  # [] int32, realizations that must share a patch; None: any row
    growth: jax.Array | None = None  # [] float32 >= 1, usual spread there over that at 1; None: 1
    reference: jax.Array | None = None  # [h, w, 3] float32, what images are aligned to, if they are
    index: BankIndex | None = None  # from `bank.index_bank`, to be searched faster
    projection: jax.Array | None = None  # [D, d] float32, of descriptors less `centre`; None: whole
    per_image: int = _static(0)  # [] int32, static: rows of each image where there is a span


PER_ROW = ("rows", "image", "patch", "multiplicity")
"""The fields of a `NominalBank` that have an entry per row."""

INDEX_PER_ROW = ("heads", "norm")
"""Those of a `BankIndex`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """How anomalous images are, and where. Descriptor distances, >= 0, higher is odder.

    Euclidean, or squared where `InReachConfig.distance` says so.
    """

    image: jax.Array  # [B] float32
    maps: jax.Array  # [B, h, w] float32, smoothed, pixel by pixel over the cropped image
    patches: jax.Array  # [B, Hp, Wp] float32, before smoothing, of the image as it was aligned
    nearest: jax.Array  # [B, Hp, Wp] int32, the bank row nearest to each patch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What scores mean: how many good images would have one as high.

    Between knots, the logarithm of the share is linear in the score. An image's oddest pixel is the
    maximum of its map.
    """

    image: jax.Array  # [K] float32, ascending scores of images
    pixel: jax.Array  # [K] float32, ascending scores of images' oddest pixels
    log_share: jax.Array  # [K] float32, of good images at or above either, <= 0, descending
    anomalous_share: jax.Array  # [] float32, of the images that it was made from, as estimated
    num_images: jax.Array  # [] int32, that it was made from


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PValues:
    """Scores as shares of good images, in (0, 1): low is odd.

    A pixel's is the share of good images that have a pixel as odd *anywhere*: in a good image,
    nearly all of them are close to 1.
    """

    image: jax.Array  # [B] float32
    maps: jax.Array  # [B, h, w] float32
