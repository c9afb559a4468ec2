"""The published algorithm once more, in PyTorch and step by step: the yardstick.

Imported only where PyTorch is installed. Written from docs/design.md, as one would write it down:
neighbourhoods are unfolded, distances are `torch.cdist`, channels are lists that Python loops over.
What PyTorch does in one call is done in one call (the mutual matches of a pair of images, the
statistics of a channel), so that it is a yardstick and no straw man.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.ndimage
import torch
from torch.nn import functional

from inreach_jax import InReachConfig

Tensor = Any
Patch = tuple[int, int]
"""(image, patch)."""


def tensor(x: Any) -> Tensor:
    """An array of ours, where PyTorch computes."""
    return torch.from_numpy(np.array(x)).to(torch.get_default_device())


def preprocess(
    image: np.ndarray, *, mean: Sequence[float], std: Sequence[float], config: InReachConfig
) -> Tensor:
    """[H, W, 3] uint8 -> [1, 3, h, w] float32: resized, cropped and normalised."""
    x = tensor(image).permute(2, 0, 1)[None].float().contiguous()
    x = functional.interpolate(x, config.resize, mode="bilinear", antialias=config.antialias)
    top, left = ((r - c) // 2 for r, c in zip(config.resize, config.crop, strict=True))
    x = x[:, :, top : top + config.crop[0], left : left + config.crop[1]]
    shift, scale = (torch.tensor(value).view(1, 3, 1, 1) for value in (mean, std))
    return (x - shift) / scale


def describe(levels: Sequence[Tensor], *, level_dim: int | None, descriptor_dim: int) -> Tensor:
    """[B, C, h, w] per level -> [B, P, D]: unfolded, upsampled, pooled, concatenated, pooled."""
    size = levels[0].shape[2:]
    pooled = []
    for level in levels:
        num, channels, height, width = level.shape
        patches = functional.unfold(level, 3, padding=1).view(num, channels * 9, height, width)
        if patches.shape[2:] != size:
            patches = functional.interpolate(patches, size, mode="bilinear", align_corners=False)
        patches = patches.flatten(2).transpose(1, 2)  # [B, P, C * 9]
        dim = channels if level_dim is None else level_dim
        pooled.append(functional.adaptive_avg_pool1d(patches, dim))
    joined = torch.cat(pooled, dim=2)
    return functional.adaptive_avg_pool1d(joined, min(descriptor_dim, joined.shape[2]))


def associate(descriptors: Tensor, *, config: InReachConfig) -> dict[Patch, list[Patch]]:
    """The members of each channel, by the seed patch that founded it, which is the first of them.

    Args:
      descriptors: [N, P, D] of all training images, the seeds first.
      config: Uses `num_seeds`.
    """
    num_images, num_patches = descriptors.shape[:2]
    every = torch.arange(num_patches)
    channels: dict[Patch, list[Patch]] = defaultdict(list)
    for image in range(num_images):
        best = torch.full((num_patches,), math.inf)
        founder_seed = torch.full((num_patches,), -1)
        founder_patch = torch.full((num_patches,), -1)
        for seed in range(config.num_seeds):
            if seed == image:
                continue
            distance = torch.cdist(descriptors[seed], descriptors[image])
            value, of_image = distance.min(dim=0)
            mutual = distance.argmin(dim=1)[of_image] == every
            closer = mutual & (value < best)
            best[closer] = value[closer]
            founder_seed[closer] = seed
            founder_patch[closer] = of_image[closer]
        for patch, founder in enumerate(
            zip(founder_seed.tolist(), founder_patch.tolist(), strict=True)
        ):
            if founder[0] >= 0:
                channels[founder].append((image, patch))
    return {
        (seed, patch): [(seed, patch), *channels[seed, patch]]
        for seed in range(config.num_seeds)
        for patch in range(num_patches)
    }


def nominal_patches(
    descriptors: Tensor, channels: dict[Patch, list[Patch]], *, config: InReachConfig
) -> list[Patch]:
    """What the channels that are kept keep, in order.

    Args:
      descriptors: [N, P, D].
      channels: Of `associate`.
      config: Uses `min_channel_length` and `max_channel_std`, the filter being the published one.
    """
    nominal = set()
    for members in channels.values():
        images, patches = zip(*members, strict=True)
        x = descriptors[list(images), list(patches)]
        radii = torch.linalg.vector_norm(x - x.mean(dim=0), dim=1)
        keep = radii < config.max_channel_std * radii.std(correction=0)
        kept = [member for member, good in zip(members, keep.tolist(), strict=True) if good]
        if len(kept) > config.min_channel_length:
            nominal.update(kept)
    return sorted(nominal)


def mutual_nearest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest row of each side to each row of the other: [A, D] and [B, D] -> [A], [B]."""
    distance = torch.cdist(a, b)
    return distance.argmin(dim=1), distance.argmin(dim=0)


def nearest(queries: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest row and which one it is: [Q, D] and [M, D] -> [Q], [Q]."""
    value, index = torch.cdist(queries, rows).min(dim=1)
    return value, index


def span_distances(
    queries: Tensor, rows: Tensor, *, per_image: int, span: int, growth: float
) -> Tensor:
    """The larger one of the spreads at 1 and, less the usual growth, at a span.

    Args:
      queries: [Q, D].
      rows: [M, D], of images of `per_image` each.
      per_image: Rows.
      span: Images.
      growth: At least 1.

    Returns:
      [Q].
    """
    of_images = torch.cdist(queries, rows).view(len(queries), -1, per_image).amin(dim=2)
    found = of_images.sort(dim=1).values
    same = found[:, 0] <= found[:, 1] / 3
    nearest, last = (
        torch.where(same, found[:, place + 1], found[:, place]) for place in (0, span - 1)
    )
    return torch.maximum(nearest, last / growth)


def score_map(patches: Tensor, *, config: InReachConfig) -> np.ndarray:
    """[Hp, Wp] -> [h, w], upsampled and smoothed."""
    mode: dict[str, Any] = {"mode": config.upsampling}
    if config.upsampling == "bilinear":
        mode["align_corners"] = False
    map_ = functional.interpolate(patches[None, None], config.crop, **mode)[0, 0].cpu().numpy()
    smooth: np.ndarray = scipy.ndimage.gaussian_filter(map_, config.smoothing_sigma)
    return smooth


def score(
    distance: Tensor, *, grid: tuple[int, int], config: InReachConfig
) -> tuple[float, np.ndarray]:
    """Image score and map of an image whose patches have these distances, [P]."""
    value = distance if config.distance == "euclidean" else distance**2
    map_ = score_map(value.view(grid), config=config)
    return float(map_.max() - config.image_contrast * map_.mean()), map_


def patchcore_score(queries: Tensor, rows: Tensor, *, neighbours: int) -> tuple[Tensor, float]:
    """PatchCore's patch scores [Q] and its image score (Roth et al., CVPR 2022, equation 7)."""
    distance, index = nearest(queries, rows)
    oddest = int(distance.argmax())
    row = rows[index[oddest]]
    near = torch.cdist(row[None], rows)[0].topk(neighbours, largest=False).indices
    to_near = torch.linalg.vector_norm(rows[near] - queries[oddest], dim=1)
    share = torch.exp(distance[oddest] - torch.logsumexp(to_near, dim=0))
    return distance, float((1 - share) * distance[oddest])


def append_position(x: Tensor, *, grid: tuple[int, int], weight: float) -> Tensor:
    """[P, D] -> [P, D + 2]: column and row, each from 0 to the weight."""
    height, width = grid
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([column / width, row / height], dim=-1).view(-1, 2)
    return torch.cat([x, weight * place], dim=1)
