"""`experiments.parity`: on made-up inputs, quickly; the reference's own are golden_test's."""

import pathlib

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import inreach_jax
from experiments import common_flags, parity
from tests import oracle

N, T, SIDE, SEEDS = 6, 2, 64, 3


@pytest.fixture(scope="module")
def given() -> dict[str, np.ndarray]:
    """What IN holds: a texture under noise; position on, which no reference file has."""
    rng = np.random.default_rng(0)
    texture = rng.uniform(40, 215, (SIDE // 4, SIDE // 4, 3)).repeat(4, 0).repeat(4, 1)
    images = np.clip(texture + 8 * rng.standard_normal((N + T, SIDE, SIDE, 3)), 0, 255)
    images = images.astype(np.uint8)
    masks = np.zeros((N + T, SIDE, SIDE), np.uint8)
    for i in (2, N):
        images[i, 16:32, 8:40] = 255 - images[i, 16:32, 8:40]
        masks[i, 16:32, 8:40] = 255
    return {
        "images": images[:N],
        "masks": masks[:N],
        "test_images": images[N:],
        "test_masks": masks[N:],
        "taps": np.array([2, 4]),
        "batch_statistics": np.array(True),
        "positional": np.array(True),
        "assoc_depth": np.array(SEEDS),
        "min_channel_length": np.array(2),
        "max_channel_std": np.array(8),
        "pos_embed_weight": np.array(5.0),
    }


@pytest.fixture(scope="module")
def result(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    backbone = inreach_jax.load_backbone("efficientnet_lite0")
    return parity.compute(given, backbone=backbone, batch_size=4)


def test_shapes_and_dtypes(result: dict[str, np.ndarray]) -> None:
    patches = (SIDE // 4) ** 2
    rows = len(result["nominal"])
    assert {name: (x.shape, x.dtype.name) for name, x in result.items()} == {
        "descriptors": ((N, 1026, patches), "float32"),
        "mutual_seed_patch": ((SEEDS, N, patches), "int16"),
        "nearest_distance": ((SEEDS, N, patches), "float32"),
        "nominal": ((rows, 2), "int32"),
        "test_patch_distances": ((T, patches), "float32"),
        "test_maps": ((T, SIDE, SIDE), "float32"),
        "test_image_scores": ((T,), "float32"),
        "pixel_auroc": ((), "float64"),
        "image_auroc": ((), "float64"),
        "nominal_precision": ((), "float64"),
        "nominal_recall": ((), "float64"),
    }
    assert rows


def test_against_the_oracle(given: dict[str, np.ndarray], result: dict[str, np.ndarray]) -> None:
    descriptors = result["descriptors"].swapaxes(1, 2)
    grid = (SIDE // 4, SIDE // 4)
    np.testing.assert_allclose(
        descriptors[0, :, 1024:], oracle.position(grid, weight=5.0), atol=1e-6
    )
    mutual, distance = oracle.associate(descriptors, num_seeds=SEEDS, pairs="earlier")
    assert (result["mutual_seed_patch"] == mutual).mean() > 0.999
    compared = np.isfinite(distance)
    np.testing.assert_array_equal(np.isfinite(result["nearest_distance"]), compared)
    np.testing.assert_allclose(result["nearest_distance"][compared], distance[compared], rtol=1e-4)
    members = oracle.members(
        result["mutual_seed_patch"], result["nearest_distance"], veto=True, index_order="swapped"
    )
    nominal = oracle.nominal(
        descriptors, members, min_channel_length=2, radius_filter="std", max_channel_std=8.0
    )
    assert parity.compare({"nominal": result["nominal"]}, {"nominal": np.array(nominal)})[0][
        "within"
    ]
    assert given["masks"].any()


def test_masks_are_not_needed(given: dict[str, np.ndarray]) -> None:
    without = {k: v for k, v in given.items() if not k.endswith("masks")}
    backbone = inreach_jax.load_backbone("efficientnet_lite0")
    result = parity.compute(without, backbone=backbone, batch_size=4)
    assert not {"pixel_auroc", "image_auroc", "nominal_precision"} & set(result)


@pytest.mark.parametrize("name", list(parity._COMPARISONS))
def test_compare_notices(result: dict[str, np.ndarray], name: str) -> None:
    assert all(row["within"] for row in parity.compare(result, result))
    other = dict(result)
    other[name] = 2 * result[name] + result[name].dtype.type(1)
    failed = [row["result"] for row in parity.compare(result, other) if not row["within"]]
    assert failed == [name]


def test_binary(
    given: dict[str, np.ndarray],
    result: dict[str, np.ndarray],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags.FLAGS.mark_as_parsed()
    source, target = tmp_path / "in.npz", tmp_path / "out.npz"
    np.savez(source, **given, test_image_scores=2 * result["test_image_scores"])
    with (
        flagsaver.flagsaver(
            (parity._INPUT, str(source)),
            (parity._OUTPUT, str(target)),
            (parity._COMPARE, True),
            (common_flags.BATCH_SIZE, 4),
        ),
        pytest.raises(SystemExit) as exit_,
    ):
        parity.main()
    assert exit_.value.code == 1
    assert "test_image_scores" in capsys.readouterr().out
    with np.load(target) as written:
        np.testing.assert_allclose(
            written["test_image_scores"], result["test_image_scores"], rtol=1e-5
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"taps": None}, "lacks taps"),
        ({"images": np.zeros((6, 64, 64, 3), np.float32)}, "images must be uint8"),
        ({"masks": np.zeros((6, 32, 64), np.uint8)}, "masks must have shape"),
        ({"test_images": np.zeros((2, 32, 32, 3), np.uint8), "test_masks": None}, "same size"),
    ],
)
def test_bad_input(
    given: dict[str, np.ndarray],
    tmp_path: pathlib.Path,
    change: dict[str, np.ndarray | None],
    message: str,
) -> None:
    fields = {k: v for k, v in (given | change).items() if v is not None}
    np.savez(tmp_path / "in.npz", **fields)
    with pytest.raises(ValueError, match=message):
        parity.read_input(str(tmp_path / "in.npz"))


def test_input_that_is_no_archive(tmp_path: pathlib.Path) -> None:
    (tmp_path / "in.npz").write_text("not an archive")
    with pytest.raises(ValueError, match="is not an .npz file"):
        parity.read_input(str(tmp_path / "in.npz"))
    with pytest.raises(FileNotFoundError):
        parity.read_input(str(tmp_path / "none.npz"))
