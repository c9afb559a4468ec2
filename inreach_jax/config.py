"""Every option of the algorithm, and the presets, which are nothing but values for them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints


@dataclasses.dataclass(frozen=True, kw_only=True)
class InReachConfig:
    """The options of InReaCh; hashable, so that it can be a static argument of `jax.jit`.

    The defaults are `PRESETS["default"]`; docs/design.md says how each was chosen. "Released"
    marks a behaviour of the released reference implementation that the paper does not describe.

    Attributes:
      resize: Height and width that images are resized to, in pixels.
      crop: Height and width of the central crop of the resized image.
      tile: Height and width of what the network sees of the crop at a time, halo included, in
        pixels; None for all of it. For images too large for memory: results stay the same
        (`inreach_jax.tiling`).
      halo: Pixels around a tile that only inform its patches; None for as many as the network
        looks. Less is faster, and approximate near the borders of tiles. Unused without a tile.
      antialias: Whether the resize low-pass filters when it shrinks (released: no).
      alignment: "rotation" turns each image, in steps of a degree, to where it matches the first
        training image best over the central half (in the paper, but off in the released code).
      channel_order: Order in which colours reach the backbone (released: "bgr").
      normalization: "backbone" for what the backbone was trained with, or "released" for
        (x / 255 - [.456, .406, .485]) / [.229, .224, .225] in channel order.
      batch_norm: "running" for the backbone's running statistics, or "image" for the statistics
        of each single image (released: the backbone is left in training mode).
      taps: Blocks of the backbone whose outputs are used, finest first; None for the backbone's
        own choice. The first one's grid is the grid of patches.
      level_dim: Dimensions that each level's 3x3 neighbourhoods are pooled to; None for one per
        channel of the level, which is the mean over the neighbourhood.
      descriptor_dim: Upper limit of D: wider concatenated levels are pooled to it.
      positional: Whether position is part of the descriptor; "auto" decides by the test of
        `images.is_positional` on the training images.
      position_weight: Distance, in descriptor units, that position adds from one edge of the grid
        to the other.
      projection: A linear map of descriptors, fitted to the seeds, before they are compared
        (`inreach_jax.projection`). "none" (published); "whitened", which keeps D: directions count
        the less the more patches of one channel vary along them; or whitened and then shorter:
        "pca", the directions in which they vary most; "learned", trained so that patches of one
        channel are near and others are far.
      projected_dim: Dimensions that "pca" and "learned" leave of D; position comes on top.
      nominal: Which patches are the bank. "channels": those of the channels that are kept, and a
        patch is scored by its nearest (published). "all": every patch, and one that is scored must
        be shared by several images (`inreach_jax.support`).
      spread_growth: With "all", the share by which asking for more images to share a patch may
        make its channel wider. It decides how many are asked for.
      max_bank_rows: Upper limit of the rows; of more nominal patches some are kept. With "all" each
        image keeps equally many, and one at least. None for no limit.
      bank_reduction: Which ones (`inreach_jax.reduction`). "random": drawn by a fixed seed;
        "k_centre": again and again the one farthest from those kept, with "all" within each image,
        without position; "channels", for nominal "channels" only: of each channel in turn. With
        "k_centre" and nominal "channels" all nominal patches are gathered first, and must fit.
      num_seeds: S, the number of seed images. With "channels" the first ones of the training set,
        with "all" spread evenly over it, and at most all of it.
      pairs: "all" compares each image with every other seed image; "earlier" only with seeds that
        precede it (released).
      veto: Whether a patch whose nearest seed patch is not mutual joins no channel at all, even if
        a farther seed has a mutual match (released).
      index_order: "matched" puts the matched patches into the channel. "swapped" is the released
        order: (image patch, seed patch) pairs are read the other way round.
      min_channel_length: Channels with a span of at most this, seed included, are dropped.
      radius_filter: Scale of the radii r = |x - mean| of a channel's members. "none": no member is
        dropped; "std": standard deviation of the radii (published); "rms": their root mean square,
        which no radius exceeds sqrt(span - 1) times, so it wants a limit of about 2.
      max_channel_std: Members with r >= max_channel_std * scale are dropped.
      distance: "euclidean" or "squared" (published) distances to the bank make the map.
      image_contrast: The image score is the maximum of the map less this share of its mean:
        what is unlike the bank as a whole, by its pose or its light, is not a defect.
      upsampling: How patch scores become a map: "bilinear" (half-pixel) or "nearest" (released).
      smoothing_sigma: Standard deviation in pixels of the Gaussian that smooths the map; 0: none.
      mask_threshold: Test masks, uint8 after the same resize and crop, are anomalous where >= this
        (released: 255, so that blurred edges are not).
      recall: "patches" counts nominal recall over the good patches. "released" divides by
        (patches - nonzero mask pixels // patch side) and counts repeated bank rows each time.
    """

    resize: tuple[int, int] = (256, 256)
    crop: tuple[int, int] = (224, 224)
    tile: tuple[int, int] | None = None
    halo: int | None = None
    antialias: bool = True
    alignment: Literal["none", "rotation"] = "none"
    channel_order: Literal["rgb", "bgr"] = "rgb"
    normalization: Literal["backbone", "released"] = "backbone"
    batch_norm: Literal["running", "image"] = "running"
    taps: tuple[int, ...] | None = None
    level_dim: int | None = 512
    descriptor_dim: int = 512
    positional: Literal["auto", "on", "off"] = "auto"
    position_weight: float = 5.0
    projection: Literal["none", "whitened", "pca", "learned"] = "whitened"
    projected_dim: int = 128
    nominal: Literal["channels", "all"] = "all"
    spread_growth: float = 0.1
    max_bank_rows: int | None = 120_000
    bank_reduction: Literal["random", "k_centre", "channels"] = "random"
    num_seeds: int = 40
    pairs: Literal["all", "earlier"] = "all"
    veto: bool = False
    index_order: Literal["matched", "swapped"] = "matched"
    min_channel_length: int = 3
    radius_filter: Literal["none", "std", "rms"] = "none"
    max_channel_std: float = 5.0
    distance: Literal["euclidean", "squared"] = "euclidean"
    image_contrast: float = 0.5
    upsampling: Literal["bilinear", "nearest"] = "bilinear"
    smoothing_sigma: float = 4.0
    mask_threshold: int = 128
    recall: Literal["patches", "released"] = "patches"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, list):  # what JSON makes of a tuple
                value = tuple(value)
                object.__setattr__(self, name, value)
            if hint is float and type(value) is int:
                value = float(value)
                object.__setattr__(self, name, value)
            choices = get_args(hint)
            if get_origin(hint) is Literal:
                if value not in choices:
                    raise ValueError(f"{name} must be one of {list(choices)}; got {value!r}")
            elif name in ("resize", "crop", "tile"):
                if not (value is None and type(None) in choices) and (
                    not isinstance(value, tuple)
                    or len(value) != 2
                    or not all(_is_int(v) and v > 0 for v in value)
                ):
                    raise ValueError(
                        f"{name} must be a (height, width) of two positive integers; got {value!r}"
                    )
            elif name == "taps":
                if value is not None and (
                    not isinstance(value, tuple)
                    or not value
                    or not all(_is_int(v) and v >= 0 for v in value)
                    or list(value) != sorted(set(value))
                ):
                    raise ValueError(
                        "taps must be None or block numbers >= 0 in ascending order, without "
                        f"repeats; got {value!r}"
                    )
            elif hint is bool:
                if not isinstance(value, bool):
                    raise ValueError(f"{name} must be True or False; got {value!r}")
            elif hint is float:
                if not isinstance(value, float) or not 0 <= value < float("inf"):
                    raise ValueError(f"{name} must be a finite number >= 0; got {value!r}")
            elif not (value is None and type(None) in choices) and not (
                _is_int(value) and value >= 1
            ):
                raise ValueError(f"{name} must be an integer >= 1; got {value!r}")
        if any(c > r for c, r in zip(self.crop, self.resize, strict=True)):
            raise ValueError(
                f"crop {self.crop} is larger than resize {self.resize}; lower crop or raise resize"
            )
        if self.tile is not None and self.nominal == "all" and self.bank_reduction == "k_centre":
            raise ValueError(
                "with tile only the patches that the bank keeps are described, so that none can be "
                "chosen by bank_reduction = 'k_centre'; use 'random', or no tile"
            )
        if self.tile is not None and self.batch_norm == "image":
            raise ValueError(
                "tile changes what batch_norm = 'image' computes, statistics of the whole image; "
                "use 'running', or no tile"
            )
        if self.mask_threshold > 255:
            raise ValueError(f"mask_threshold must be in [1, 255]; got {self.mask_threshold}")
        if self.spread_growth == 0:
            raise ValueError("spread_growth must be above 0: no span keeps the spread as it is")
        if self.image_contrast > 1:
            raise ValueError(f"image_contrast must be in [0, 1]; got {self.image_contrast}")
        if self.bank_reduction == "channels" and self.nominal != "channels":
            raise ValueError(
                "bank_reduction 'channels' needs nominal 'channels'; got nominal "
                f"{self.nominal!r}: change it, or set bank_reduction to 'random' or 'k_centre'"
            )
        if self.max_channel_std == 0 and self.radius_filter != "none":
            raise ValueError("max_channel_std 0 drops every member; set it above 0")

    def replace(self, **changes: Any) -> "InReachConfig":
        """A copy with some options changed, checked like a new one.

        >>> PRESETS["paper"].replace(crop=(192, 256)).crop
        (192, 256)
        """
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain JSON-serialisable values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "InReachConfig":
        """Inverse of `to_dict`.

        Raises:
          ValueError: a name is unknown or missing, or a value is out of range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        unknown, missing = sorted(set(options) - names), sorted(names - set(options))
        if unknown or missing:
            raise ValueError(
                f"not the options of this version: unknown {unknown}, missing {missing}"
            )
        return cls(**options)


FEATURE_OPTIONS = (
    *("resize", "crop", "tile", "halo", "antialias", "alignment"),
    *("channel_order", "normalization", "batch_norm"),
    *("taps", "level_dim", "descriptor_dim", "positional", "position_weight"),
)
"""The options that descriptors depend on; the others concern what comes after them."""


SCORE_OPTIONS = (
    *("distance", "image_contrast", "upsampling", "smoothing_sigma"),
    *("mask_threshold", "recall"),
)
"""The options that concern what comes after the bank."""


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_CHANNELS: dict[str, Any] = {
    "projection": "none",
    "nominal": "channels",
    "max_bank_rows": None,
    "num_seeds": 10,
    "distance": "squared",
    "image_contrast": 0.0,
}
_PUBLISHED: dict[str, Any] = {
    **_CHANNELS,
    "antialias": False,
    "level_dim": 1024,
    "descriptor_dim": 1024,
    "radius_filter": "std",
    "upsampling": "nearest",
    "smoothing_sigma": 13.0,
}

PRESETS: Mapping[str, InReachConfig] = {
    # Chosen by measurement: docs/design.md, "Defaults". "robust" is its name among the presets.
    "default": InReachConfig(),
    "robust": InReachConfig(),
    # The published algorithm at its best: no radius filter, less smoothing.
    "channels": InReachConfig(**_CHANNELS),
    # What the paper describes.
    "paper": InReachConfig(**_PUBLISHED),
    # What the released reference computes: docs/reference.md.
    "official": InReachConfig(
        **_PUBLISHED,
        channel_order="bgr",
        normalization="released",
        batch_norm="image",
        pairs="earlier",
        veto=True,
        index_order="swapped",
        mask_threshold=255,
        recall="released",
    ),
}
