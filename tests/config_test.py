"""The options: what they refuse, how they travel, and how the presets differ."""

import dataclasses
import functools
import inspect
import json
import math
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import pytest

from inreach_jax.config import FEATURE_OPTIONS, PRESETS, InReachConfig

_HINTS = get_type_hints(InReachConfig)


def _wrong_values(name: str) -> list[Any]:
    """Values that no option of this type may take, plus what is out of this one's range."""
    hint = _HINTS[name]
    optional = type(None) in get_args(hint)
    wrong: list[Any] = [] if optional else [None]
    if get_origin(hint) is Literal:
        return [*wrong, "", "other", get_args(hint)[0].upper(), True, 1, [get_args(hint)[0]]]
    if hint is bool:
        return [*wrong, 0, 1, "yes"]
    if hint is float:
        wrong += [1.01, 2] if name == "image_contrast" else []
        return [*wrong, -1, -1e-9, math.nan, math.inf, "4", True, (1.0,)]
    if name == "taps":
        return [*wrong, (), (-1, 2), (2, 1), (1, 1), (0.5,), (True,), 3, "123"]
    if get_origin(hint) is tuple or name == "tile":
        return [*wrong, (0, 8), (8, -1), (8,), (8, 8, 8), (8.0, 8.0), (True, 8), 224, "88"]
    assert hint in (int, int | None)
    wrong += [0, -1, 1.0, 2.5, True, "3", (1,), math.inf]
    return [*wrong, 256] if name == "mask_threshold" else wrong


@pytest.mark.parametrize(
    "name, value", [(name, value) for name in _HINTS for value in _wrong_values(name)]
)
def test_what_is_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as error:
        InReachConfig(**{name: value})
    assert str(error.value).startswith(name)
    assert repr(value if not isinstance(value, list) else tuple(value)) in str(error.value)
    with pytest.raises(ValueError, match=name):
        PRESETS["official"].replace(**{name: value})


def test_limits_themselves_are_allowed() -> None:
    config = InReachConfig(
        resize=(1, 2),
        crop=(1, 2),
        taps=(0,),
        level_dim=1,
        descriptor_dim=1,
        position_weight=0.0,
        spread_growth=1e-9,
        max_bank_rows=1,
        num_seeds=1,
        min_channel_length=1,
        max_channel_std=0.0,
        image_contrast=0.0,
        smoothing_sigma=0.0,
        mask_threshold=255,
    )
    assert config.replace(image_contrast=1).image_contrast == 1.0
    assert config.replace(max_bank_rows=None).max_bank_rows is None
    assert config.mask_threshold == 255
    assert config.replace(mask_threshold=1).mask_threshold == 1


def test_tiles_are_not_normalised_by_themselves() -> None:
    assert PRESETS["default"].replace(tile=(224, 224)).tile == (224, 224)
    with pytest.raises(ValueError, match="tile changes what batch_norm = 'image' computes"):
        PRESETS["official"].replace(tile=(224, 224))


@pytest.mark.parametrize("crop", [(257, 10), (10, 257)])
def test_crop_fits_into_the_resized_image(crop: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"crop {crop} is larger than resize")):
        InReachConfig(crop=crop)


@pytest.mark.parametrize("radius_filter", ["std", "rms"])
def test_a_filter_that_drops_everything_is_refused(radius_filter: Any) -> None:
    with pytest.raises(ValueError, match="max_channel_std"):
        InReachConfig(radius_filter=radius_filter, max_channel_std=0)


def test_spread_must_be_allowed_to_grow() -> None:
    for value in (0, 0.0):
        with pytest.raises(ValueError, match="^spread_growth must be above 0"):
            InReachConfig(spread_growth=value)
        with pytest.raises(ValueError, match="^spread_growth must be above 0"):
            PRESETS["paper"].replace(spread_growth=value)


def test_every_option_is_documented() -> None:
    text = inspect.cleandoc(InReachConfig.__doc__ or "")
    documented = re.findall(r"^  (\w+): ", text, flags=re.MULTILINE)
    assert documented == [field.name for field in dataclasses.fields(InReachConfig)]


@pytest.mark.parametrize("name", PRESETS)
def test_round_trips(name: str) -> None:
    config = PRESETS[name].replace(taps=(1, 4))
    options = config.to_dict()
    assert list(options) == list(_HINTS)
    assert InReachConfig.from_dict(options) == config
    through_json = InReachConfig.from_dict(json.loads(json.dumps(options)))
    assert through_json == config
    assert hash(through_json) == hash(config)
    assert through_json.taps == (1, 4)


def test_whole_numbers_do_for_floats() -> None:
    config = InReachConfig(smoothing_sigma=4)
    assert config == InReachConfig(smoothing_sigma=4.0)
    assert json.dumps(config.to_dict()["smoothing_sigma"]) == "4.0"


def test_names_must_be_those_of_this_version() -> None:
    options = InReachConfig().to_dict()
    with pytest.raises(ValueError, match=r"unknown \['seeds'\], missing \[\]"):
        InReachConfig.from_dict({**options, "seeds": 3})
    del options["veto"], options["pairs"]
    with pytest.raises(ValueError, match=r"unknown \[\], missing \['pairs', 'veto'\]"):
        InReachConfig.from_dict(options)
    with pytest.raises(TypeError, match="seeds"):
        InReachConfig(seeds=3)  # type: ignore[call-arg]


def test_replace_leaves_the_original() -> None:
    config = InReachConfig()
    changed = config.replace(num_seeds=3)
    assert (config.num_seeds, changed.num_seeds) == (40, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_seeds = 3  # type: ignore[misc]


def test_equal_options_share_a_compilation() -> None:
    traces = []

    @functools.partial(jax.jit, static_argnames="config")
    def scale(x: jax.Array, *, config: InReachConfig) -> jax.Array:
        traces.append(config)
        return x * config.position_weight

    for config in (InReachConfig(), InReachConfig(position_weight=5), PRESETS["default"]):
        assert float(scale(jnp.ones(()), config=config)) == 5.0
    assert len(traces) == 1
    assert float(scale(jnp.ones(()), config=InReachConfig(position_weight=2))) == 2.0
    assert len(traces) == 2


def test_options_of_descriptors_are_the_first_ones() -> None:
    names = [field.name for field in dataclasses.fields(InReachConfig)]
    assert list(FEATURE_OPTIONS) == names[: names.index("position_weight") + 1]


def _difference(a: InReachConfig, b: InReachConfig) -> dict[str, Any]:
    return {k: v for k, v in b.to_dict().items() if a.to_dict()[k] != v}


def test_presets_differ_by_these_options_only() -> None:
    assert set(PRESETS) == {"default", "robust", "channels", "paper", "official"}
    assert PRESETS["default"] == PRESETS["robust"] == InReachConfig()
    assert _difference(PRESETS["default"], PRESETS["channels"]) == {
        "projection": "none",
        "nominal": "channels",
        "max_bank_rows": None,
        "num_seeds": 10,
        "distance": "squared",
        "image_contrast": 0.0,
    }
    assert _difference(PRESETS["channels"], PRESETS["paper"]) == {
        "antialias": False,
        "level_dim": 1024,
        "descriptor_dim": 1024,
        "radius_filter": "std",
        "upsampling": "nearest",
        "smoothing_sigma": 13.0,
    }
    assert _difference(PRESETS["paper"], PRESETS["official"]) == {
        "channel_order": "bgr",
        "normalization": "released",
        "batch_norm": "image",
        "pairs": "earlier",
        "veto": True,
        "index_order": "swapped",
        "mask_threshold": 255,
        "recall": "released",
    }
