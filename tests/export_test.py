"""The artefact: it scores as the library does, without the library."""

import io
import json
import pathlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import inreach_jax
from inreach_jax import InReachConfig, NominalBank, exported
from inreach_jax.backbones import Backbone
from tests import tiny

# One bank of each kind, and crops and images that are not square.
CONFIGS = {
    "channels": tiny.CONFIG,
    "all": inreach_jax.PRESETS["default"].replace(
        resize=(36, 44), crop=(32, 40), level_dim=None, num_seeds=4, smoothing_sigma=2.0
    ),
    "aligned": tiny.CONFIG.replace(alignment="rotation"),
    "tiled": tiny.CONFIG.replace(resize=(40, 56), crop=(32, 48), tile=(40, 40)),
}
SIZES = {"channels": None, "all": (50, 60), "aligned": (40, 36), "tiled": None}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone()


@pytest.fixture(scope="module", params=list(CONFIGS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def banks(backbone: Backbone) -> dict[str, NominalBank]:
    return {
        name: inreach_jax.fit(backbone, tiny.images(7), config=config, batch_size=tiny.BATCH)
        for name, config in CONFIGS.items()
    }


@pytest.fixture(scope="module")
def artefacts(backbone: Backbone, banks: dict[str, NominalBank]) -> dict[str, bytes]:
    return {
        name: inreach_jax.export_score(
            backbone, banks[name], config=config, size=SIZES[name], command="made by a test"
        )
        for name, config in CONFIGS.items()
    }


@pytest.fixture(scope="module")
def load(artefacts: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("artefacts")

    def load(name: str) -> tuple[Callable[[Any], dict[str, jax.Array]], dict[str, Any]]:
        (folder / name).write_bytes(artefacts[name])
        return inreach_jax.load_exported(folder / name)

    return load


def images_for(name: str, num: int) -> np.ndarray:
    height, width = SIZES[name] or CONFIGS[name].resize
    images = np.array(tiny.images(num, seed=num, side=60)[:, :height, :width])
    images[-1, 10:20, 10:22] = 255 - images[-1, 10:20, 10:22]
    return images


def members(artefact: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(artefact)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_index_is_left_out(
    name: str, artefacts: dict[str, bytes], backbone: Backbone, banks: dict[str, NominalBank]
) -> None:
    artefact = inreach_jax.export_score(
        backbone,
        inreach_jax.index_bank(banks[name]),
        config=CONFIGS[name],
        size=SIZES[name],
        command="made by a test",
    )
    assert artefact == artefacts[name]


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_scores_are_those_of_the_library(
    name: str, batch: int, load: Any, backbone: Backbone, banks: dict[str, NominalBank]
) -> None:
    score, _ = load(name)
    images = images_for(name, batch)
    actual = score(images)
    expected = jax.jit(inreach_jax.make_score_fn(backbone, CONFIGS[name]))(
        backbone.variables, banks[name], images
    )
    for output in ("image", "maps", "patches"):
        want = np.asarray(getattr(expected, output))
        assert actual[output].shape == want.shape
        np.testing.assert_allclose(
            np.asarray(actual[output]), want, rtol=1e-5, atol=1e-6 * want.max()
        )
    np.testing.assert_array_equal(actual["nearest"], expected.nearest)
    assert "anomalous" not in actual


def test_manifest_says_what_it_is(name: str, load: Any, backbone: Backbone) -> None:
    score, manifest = load(name)
    height, width = SIZES[name] or CONFIGS[name].resize
    assert InReachConfig.from_dict(manifest["config"]) == CONFIGS[name]
    assert manifest["backbone"] == "tiny"
    assert manifest["weights_digest"] == backbone.weights_digest
    assert manifest["size"] == [height, width]
    assert manifest["threshold"] is None
    assert manifest["platforms"] == ["cpu", "cuda", "tpu"]
    assert manifest["versions"]["jax"] == jax.__version__
    assert manifest["command"] == "made by a test"
    assert manifest["inputs"] == {"images": {"shape": ["b", height, width, 3], "dtype": "uint8"}}
    actual = score(images_for(name, 1))
    assert manifest["outputs"].keys() == actual.keys()
    for output, x in actual.items():
        spec = manifest["outputs"][output]
        assert spec["shape"] == ["b", *x.shape[1:]]
        assert spec["dtype"] == x.dtype


def test_a_threshold_decides(
    backbone: Backbone, banks: dict[str, NominalBank], tmp_path: pathlib.Path
) -> None:
    images = images_for("channels", 7)
    (scores,) = inreach_jax.score_images(
        backbone, banks["channels"], images, config=tiny.CONFIG, batch_size=7
    )
    threshold = float(np.sort(scores.image)[-2:].mean())
    artefact = inreach_jax.export_score(
        backbone, banks["channels"], config=tiny.CONFIG, threshold=threshold
    )
    (tmp_path / "a").write_bytes(artefact)
    score, manifest = inreach_jax.load_exported(tmp_path / "a")
    assert manifest["threshold"] == threshold
    assert score(images)["anomalous"].tolist() == [False] * 6 + [True]


def test_program_and_arrays_are_kept_apart(
    name: str, artefacts: dict[str, bytes], banks: dict[str, NominalBank]
) -> None:
    files = members(artefacts[name])
    manifest = json.loads(files.pop(exported.MANIFEST))
    files.pop(exported.PROGRAM)
    assert files.keys() == {f"arrays/{array}.npy" for array in manifest["arrays"]}
    rows = np.load(io.BytesIO(files["arrays/bank/rows.npy"]), allow_pickle=False)
    np.testing.assert_array_equal(rows, banks[name].rows)
    assert "arrays/variables/params/conv_0/kernel.npy" in files
    with zipfile.ZipFile(io.BytesIO(artefacts[name])) as archive:
        info = archive.getinfo("arrays/bank/rows.npy")
        assert info.compress_type == zipfile.ZIP_STORED


def test_no_path_of_this_machine_goes_along(name: str, artefacts: dict[str, bytes]) -> None:
    program = members(artefacts[name])[exported.PROGRAM]
    assert len(program) > 1000
    assert b".py" not in program


def test_equal_arguments_give_equal_bytes(
    backbone: Backbone, banks: dict[str, NominalBank], artefacts: dict[str, bytes]
) -> None:
    again = inreach_jax.export_score(
        backbone, banks["channels"], config=tiny.CONFIG, command="made by a test"
    )
    assert again == artefacts["channels"]


_WITHOUT = """
import importlib.util, sys
import numpy as np
for name in ("inreach_jax", "flax", "orbax", "PIL", "matplotlib", "absl"):
    sys.modules[name] = None  # importing it fails
import exported
score, manifest = exported.load_exported("artefact")
np.savez("scores.npz", **score(np.load("images.npy")))
"""


def test_it_runs_where_the_library_is_not(
    backbone: Backbone,
    banks: dict[str, NominalBank],
    artefacts: dict[str, bytes],
    tmp_path: pathlib.Path,
) -> None:
    """A folder with the artefact and a copy of the loader is all there is."""
    images = images_for("all", 3)
    np.save(tmp_path / "images.npy", images)
    (tmp_path / "artefact").write_bytes(artefacts["all"])
    shutil.copy(exported.__file__, tmp_path / "exported.py")
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", _WITHOUT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    expected = jax.jit(inreach_jax.make_score_fn(backbone, CONFIGS["all"]))(
        backbone.variables, banks["all"], images
    )
    with np.load(tmp_path / "scores.npz") as actual:
        np.testing.assert_allclose(actual["image"], expected.image, rtol=1e-5)
        np.testing.assert_allclose(actual["maps"], expected.maps, rtol=1e-5)


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((2, 36, 40, 3), np.uint8), "36"),
        (np.zeros((2, 36, 36, 3), np.float32), "float32"),
        (np.zeros((36, 36, 3), np.uint8), "36"),
    ],
)
def test_other_images_are_refused(images: np.ndarray, message: str, load: Any) -> None:
    score, _ = load("channels")
    with pytest.raises((ValueError, TypeError), match=message):
        score(images)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": (0, 36)}, r"size must be a \(height, width\) .* got \(0, 36\)"),
        ({"threshold": float("nan")}, "threshold must be a finite number; got nan"),
    ],
)
def test_what_is_out_of_range_is_refused(
    options: Any, message: str, backbone: Backbone, banks: dict[str, NominalBank]
) -> None:
    with pytest.raises(ValueError, match=message):
        inreach_jax.export_score(backbone, banks["channels"], config=tiny.CONFIG, **options)


def test_a_bank_of_another_config_is_refused(
    backbone: Backbone, banks: dict[str, NominalBank]
) -> None:
    with pytest.raises(ValueError, match="the bank's D"):
        inreach_jax.export_score(backbone, banks["channels"], config=tiny.CONFIG.replace(taps=(0,)))


def repack(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def damaged(kind: str, artefact: bytes) -> bytes:
    files = members(artefact)
    if kind == "no zip":
        return b"PK or not"
    if kind == "cut short":
        return artefact[: len(artefact) // 2]
    if kind == "a flipped bit":
        where = artefact.index(files["arrays/bank/rows.npy"]) + 200
        return artefact[:where] + bytes([artefact[where] ^ 1]) + artefact[where + 1 :]
    if kind == "an array missing":
        del files["arrays/bank/rows.npy"]
    elif kind == "no manifest":
        del files[exported.MANIFEST]
    elif kind == "another format":
        manifest = json.loads(files[exported.MANIFEST])
        files[exported.MANIFEST] = json.dumps(manifest | {"format_version": 99}).encode()
    elif kind == "a pickle":
        buffer = io.BytesIO()
        np.save(buffer, np.array([{}], object), allow_pickle=True)
        files["arrays/bank/rows.npy"] = buffer.getvalue()
    return repack(files)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("no zip", "not a zip file"),
        ("cut short", "not a zip file"),
        ("a flipped bit", "Bad CRC-32"),
        ("an array missing", "bank/rows"),
        ("no manifest", "manifest.json"),
        ("another format", "its format is 99, and 1 is read"),
        ("a pickle", "allow_pickle"),
    ],
)
def test_damage_is_noticed(
    kind: str, message: str, artefacts: dict[str, bytes], tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "artefact"
    path.write_bytes(damaged(kind, artefacts["channels"]))
    with pytest.raises(ValueError, match=f"{path} is not an exported detector.*{message}"):
        inreach_jax.load_exported(path)


def test_a_file_that_is_not_there_says_so(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        inreach_jax.load_exported(tmp_path / "none")
