"""Tiles: put together they are the whole, up to its border, and less halo than needed shows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import inreach_jax
from inreach_jax import InReachConfig, NominalBank, Scores, pipeline, tiling
from inreach_jax.backbones import BACKBONES, Backbone, efficientnet_lite
from tests import tiny

REACH = tiling.network_reach(tiny.SPEC, taps=(0, 1))
# Neither square nor a multiple of a core, in images that are larger still.
WHOLE = tiny.CONFIG.replace(resize=(120, 160), crop=(104, 152), positional="on")
TILED = WHOLE.replace(tile=(56, 48))
ALL = inreach_jax.PRESETS["default"].replace(
    **{name: getattr(WHOLE, name) for name in ("resize", "crop", "positional", "level_dim")}
)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return tiny.images(4, side=160)[:, :130]


@pytest.fixture(scope="module")
def bank(backbone: Backbone, images: np.ndarray) -> NominalBank:
    return inreach_jax.fit(backbone, images, config=WHOLE, batch_size=4)


@pytest.fixture(scope="module")
def unseen() -> np.ndarray:
    images = np.array(tiny.images(2, seed=1, side=160)[:, :130])
    images[1, 60:80, 70:90] = 255 - images[1, 60:80, 70:90]
    return images


def score(
    backbone: Backbone, bank: NominalBank, images: np.ndarray, config: InReachConfig
) -> Scores:
    (scores,) = inreach_jax.score_images(
        backbone, bank, images, config=config, batch_size=len(images)
    )
    return scores


def describe(backbone: Backbone, images: np.ndarray, config: InReachConfig) -> np.ndarray:
    (block,) = inreach_jax.extract(
        backbone, images, config=config.replace(positional="off"), batch_size=len(images)
    ).blocks
    return np.asarray(block)


# How far the network looks.


def expected_halo(stages: Any, taps: tuple[int, ...]) -> int:
    """Of a patch's descriptor, by the textbook's recurrence for receptive fields."""
    kernels = [(3, 2)]
    blocks = []
    for repeats, size, stride, _, _ in stages:
        for i in range(repeats):
            kernels.append((size, stride if i == 0 else 1))
            blocks.append(len(kernels))
    strides = np.cumprod([stride for _, stride in kernels])
    halos = []
    for tap in taps:
        first, last, jump = 0, 0, 1  # pixels that a cell looks at, counted from its own first one
        for size, stride in kernels[: blocks[tap]]:
            # TensorFlow pads an even width by size - stride in all, less of it before.
            pad = max(size - stride, 0) // 2
            first -= pad * jump
            last += (size - 1 - pad) * jump
            jump *= stride
        # The neighbourhood of 3 x 3 cells, then bilinear upsampling: a cell on either side.
        cells = 1 + (jump > strides[blocks[taps[0]] - 1])
        halos.append(max(-first + cells * jump, last + cells * jump - (jump - 1)))
    coarsest = int(strides[blocks[taps[-1]] - 1])
    return -(-max(halos) // coarsest) * coarsest


@pytest.mark.parametrize("taps", [(4, 7, 10), (2, 4), (4,)])
def test_reach_is_that_of_the_layers(taps: tuple[int, ...]) -> None:
    reach = tiling.network_reach(BACKBONES["efficientnet_lite0"], taps=taps)
    assert reach.halo == expected_halo(efficientnet_lite.LITE0_STAGES, taps)
    assert reach.patch == {2: 4, 4: 8}[taps[0]]
    assert reach.stride == {10: 16, 4: 8}[taps[-1]]


def test_reach_is_known_while_tracing() -> None:
    tiling.network_reach.cache_clear()
    halo = jax.jit(lambda x: x + tiling.network_reach(tiny.SPEC, taps=(0, 1)).halo)(0)
    assert int(halo) == REACH.halo == 16


def test_halo_covers_what_descriptors_depend_on(backbone: Backbone, images: np.ndarray) -> None:
    """Pixels farther away than the halo change nothing; nearer ones do."""
    config = WHOLE.replace(resize=WHOLE.crop)
    changed = np.array(images[:1, :104, :152])
    whole = describe(backbone, changed, config).reshape(26, 38, -1)
    row, column = 48, 72
    changed[:, :row] ^= 255
    changed[:, :, :column] ^= 255
    differs = (describe(backbone, changed, config).reshape(26, 38, -1) != whole).any(axis=-1)
    far = (slice((row + REACH.halo) // 4, None), slice((column + REACH.halo) // 4, None))
    assert not differs[far].any()
    assert differs[(row + 4) // 4, :].any()


# Where windows lie.


@pytest.mark.parametrize("crop, tile", [
    ((104, 152), (56, 48)),
    ((104, 152), (104, 64)),
    ((40, 48), (400, 400)),
    ((64, 8), (40, 40)),
])  # fmt: skip
def test_every_patch_is_far_from_borders_that_are_not_the_crops(
    crop: tuple[int, int], tile: tuple[int, int]
) -> None:
    config = tiny.CONFIG.replace(resize=crop, crop=crop, tile=tile)
    tiles = tiling.make_tiling(REACH, config=config)
    assert tiles.grid == (crop[0] // 4, crop[1] // 4)
    assert sorted(tiles.patches.ravel()[tiles.source]) == list(range(np.prod(tiles.grid)))
    for corner, patches in zip(tiles.corners, tiles.patches, strict=True):
        rows, columns = np.divmod(patches, tiles.grid[1])
        for axis, index in enumerate((rows, columns)):
            low, high = corner[axis], corner[axis] + tiles.window[axis]
            assert low % REACH.stride == 0 <= low <= high <= crop[axis]
            assert low == 0 or index.min() * 4 - low >= REACH.halo
            assert high == crop[axis] or high - (index.max() + 1) * 4 >= REACH.halo


def test_a_tile_as_large_as_the_crop_is_the_crop() -> None:
    config = WHOLE.replace(tile=(1000, 1000), crop=(104, 152))
    tiles = tiling.make_tiling(REACH, config=config)
    assert tiles.window == (104, 152)
    assert tiles.corners.tolist() == [[0, 0]]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"crop": (100, 152)}, r"crop must be of multiples of .* stride, 8; got \(100, 152\)"),
        ({"tile": (56, 50)}, r"tile must be of multiples of .* stride, 8; got \(56, 50\)"),
        ({"halo": 12}, r"halo must be of multiples of .* stride, 8; got 12"),
        ({"tile": (32, 48)}, r"tile \(32, 48\) leaves nothing between halos of 16 pixels"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(
    changes: Any, message: str, backbone: Backbone, images: np.ndarray
) -> None:
    config = TILED.replace(**changes)
    with pytest.raises(ValueError, match=message):
        inreach_jax.fit(backbone, images, config=config, batch_size=4)


# What comes of them.


def test_descriptors_are_those_of_the_whole(backbone: Backbone, images: np.ndarray) -> None:
    whole = describe(backbone, images, WHOLE)
    tiled = describe(backbone, images, TILED)
    np.testing.assert_allclose(tiled, whole, rtol=1e-5, atol=1e-5 * np.abs(whole).max())


def test_too_small_a_halo_shows_where_tiles_meet(backbone: Backbone, images: np.ndarray) -> None:
    """So that the halo is no larger than it must be, and the test above can fail."""
    whole = describe(backbone, images, WHOLE)
    config = TILED.replace(halo=REACH.halo - REACH.stride)
    off = np.abs(describe(backbone, images, config) - whole).max(axis=(0, 2)).reshape(26, 38)
    assert (off > 1e-3 * np.abs(whole).max()).any()
    assert off[0, 0] < 1e-5 * np.abs(whole).max()  # where the tile's corner is the crop's


def test_banks_and_scores_are_those_of_the_whole(
    backbone: Backbone, bank: NominalBank, images: np.ndarray, unseen: np.ndarray
) -> None:
    tiled_bank = inreach_jax.fit(backbone, images, config=TILED, batch_size=4)
    assert tiled_bank.count == bank.count
    np.testing.assert_array_equal(tiled_bank.patch, bank.patch)
    np.testing.assert_allclose(tiled_bank.rows, bank.rows, atol=1e-4)
    expected = score(backbone, bank, unseen, WHOLE)
    actual = score(backbone, tiled_bank, unseen, TILED)
    for name in ("image", "maps", "patches"):
        want = np.asarray(getattr(expected, name))
        np.testing.assert_allclose(getattr(actual, name), want, rtol=1e-4, atol=1e-5 * want.max())
    np.testing.assert_array_equal(actual.nearest, expected.nearest)
    assert actual.image[1] > actual.image[0]


def test_scores_of_a_bank_of_all_patches(
    backbone: Backbone, images: np.ndarray, unseen: np.ndarray
) -> None:
    tiled = ALL.replace(tile=TILED.tile)
    bank = inreach_jax.fit(backbone, images, config=ALL, batch_size=4)
    expected = score(backbone, bank, unseen, ALL)
    actual = score(backbone, bank, unseen, tiled)
    np.testing.assert_allclose(actual.maps, expected.maps, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(actual.image, expected.image, rtol=1e-4)


def test_what_the_bank_drops_is_never_held(
    backbone: Backbone, images: np.ndarray, unseen: np.ndarray
) -> None:
    """With too many patches for the bank, the same ones are kept as of whole images."""
    # What whitens is fitted to the patches that are kept of the seeds, or to all of them.
    config = ALL.replace(max_bank_rows=400, projection="none")
    tiled = config.replace(tile=TILED.tile)
    whole_bank = inreach_jax.fit(backbone, images, config=config, batch_size=4)
    bank = inreach_jax.fit(backbone, images, config=tiled, batch_size=3)
    assert len(bank.rows) == 400 < 4 * 26 * 38
    for name in ("image", "patch", "multiplicity"):
        np.testing.assert_array_equal(getattr(bank, name), getattr(whole_bank, name))
    np.testing.assert_allclose(bank.rows, whole_bank.rows, atol=1e-4)
    late = inreach_jax.fit(backbone, iter(images), config=tiled, batch_size=4)
    np.testing.assert_allclose(late.rows, whole_bank.rows, atol=1e-4)
    assert int(bank.span) == int(whole_bank.span)
    np.testing.assert_allclose(
        score(backbone, bank, unseen, tiled).image,
        score(backbone, whole_bank, unseen, config).image,
        rtol=1e-4,
    )


def test_tiles_inside_other_programs(
    backbone: Backbone, bank: NominalBank, unseen: np.ndarray
) -> None:
    """The pure function is the same: jitted, vmapped over banks, differentiated."""
    pure = inreach_jax.make_score_fn(backbone, TILED)
    expected = score(backbone, bank, unseen, WHOLE)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), bank, bank)
    both = jax.jit(jax.vmap(pure, in_axes=(None, 0, None)))(backbone.variables, stacked, unseen)
    for i in range(2):
        np.testing.assert_allclose(both.image[i], expected.image, rtol=1e-4)

    def loss(config: InReachConfig) -> Any:
        one = functools.partial(pipeline.score_crops, spec=backbone.spec, config=config)
        return jax.jit(jax.grad(lambda x: one(backbone.variables, bank, x).image.sum()))

    crops = jnp.asarray(unseen[:, 10:114, 4:156], jnp.float32)
    tiled, whole = loss(TILED)(crops), loss(WHOLE)(crops)
    assert np.abs(whole).max() > 0
    np.testing.assert_allclose(tiled, whole, atol=1e-4 * np.abs(whole).max())
