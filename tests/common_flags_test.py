"""Every option of the algorithm is a flag, and means what the config means by it."""

import dataclasses
import inspect
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from absl import flags
from jax import lax

from experiments import common_flags
from inreach_jax import PRESETS, InReachConfig
from tests import binary

HINTS = get_type_hints(InReachConfig)
OPTIONS = [field.name for field in dataclasses.fields(InReachConfig)]


@pytest.fixture(autouse=True)
def _unparse() -> Any:
    binary.unparse()
    yield
    binary.unparse()


def parse(*args: str) -> InReachConfig:
    assert flags.FLAGS(["program", *args]) == ["program"]
    return common_flags.config()


def text_of(value: Any) -> str:
    if value is None:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def values(name: str) -> list[Any]:
    """Values that an option may have, other than its default."""
    hint, default = HINTS[name], getattr(InReachConfig(), name)
    if get_origin(hint) is Literal:
        listed = list(get_args(hint))
    elif hint is bool:
        listed = [True, False]
    elif hint is float:
        listed = [0.25, 1.0]
    elif name == "resize":
        listed = [(300, 280)]
    elif name == "crop":
        listed = [(200, 120)]
    elif name == "tile":
        listed = [(128, 96)]
    elif name == "taps":
        listed = [None, (3,), (0, 2, 5)]
    else:
        listed = [7, *([None] if type(None) in get_args(hint) else [])]
    return [value for value in listed if value != default]


@pytest.mark.parametrize("name, value", [(name, v) for name in OPTIONS for v in values(name)])
def test_round_trip(name: str, value: Any) -> None:
    # What one option is refused without.
    needed = {"nominal": "channels"} if value == "channels" and name != "nominal" else {}
    options: dict[str, Any] = {**needed, name: value}
    config = parse(*(f"--{option}={text_of(x)}" for option, x in options.items()))
    assert config == InReachConfig(**options)
    assert config != InReachConfig()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str) -> None:
    assert parse(f"--preset={preset}") == PRESETS[preset]
    binary.unparse()
    text = [f"--{k}={text_of(getattr(PRESETS[preset], k))}" for k in OPTIONS]
    assert parse(*text) == PRESETS[preset]
    binary.unparse()
    changed = parse(f"--preset={preset}", "--num_seeds=4", "--taps=1,2", "--level_dim=none")
    assert changed == PRESETS[preset].replace(num_seeds=4, taps=(1, 2), level_dim=None)


def test_no_flags_are_the_default() -> None:
    assert parse() == InReachConfig()


@pytest.mark.parametrize("name", ["resize", "crop"])
def test_one_number_is_a_square(name: str) -> None:
    config = parse("--resize=240", f"--{name}=200", "--crop=160")
    assert config.crop == (160, 160)
    assert config.resize == ((200, 200) if name == "resize" else (240, 240))


def test_booleans_have_both_forms() -> None:
    assert parse("--noantialias", "--veto") == InReachConfig(antialias=False, veto=True)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--taps="], r"taps must be None or block numbers .* got \(\)"),
        (["--taps=1,x"], "--taps takes whole numbers; got 1,x"),
        (["--taps=1.5"], "--taps takes whole numbers; got 1.5"),
        (["--resize=none"], "--resize takes whole numbers; got none"),
        (["--level_dim=8,8"], r"level_dim must be an integer >= 1; got \(8, 8\)"),
        (["--level_dim=0"], "level_dim must be an integer >= 1; got 0"),
        (["--crop=1,2,3"], r"crop must be a \(height, width\)"),
        (["--crop=300"], "crop .* is larger than resize"),
        (["--num_seeds=0"], "num_seeds must be an integer >= 1; got 0"),
        (["--position_weight=nan"], "position_weight must be a finite number"),
    ],
)
def test_values_out_of_range(args: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(*args)


@pytest.mark.parametrize("name", [n for n in OPTIONS if get_origin(HINTS[n]) is Literal])
def test_choices_are_those_of_the_option(name: str) -> None:
    with pytest.raises(flags.IllegalFlagValueError, match=name):
        parse(f"--{name}=other")


@pytest.mark.parametrize("name", OPTIONS)
def test_help_is_what_the_config_says(name: str) -> None:
    text = flags.FLAGS[name].help
    documented = inspect.cleandoc(InReachConfig.__doc__ or "").partition(f"\n  {name}: ")[2]
    first_line = documented.partition("\n")[0]
    assert len(first_line) > 20
    assert first_line in text


@pytest.mark.parametrize(
    "args, expected",
    [
        ([], [0.0, 0.1, 0.4]),
        (["--ratios=0.4,0,0.40,.25"], [0.0, 0.25, 0.4]),
        (["--ratios=0.5"], [0.5]),
    ],
)
def test_ratios_are_in_order(args: list[str], expected: list[float]) -> None:
    parse(*args)
    assert common_flags.ratios() == expected


@pytest.mark.parametrize(
    "value, message",
    [
        ("", r"--ratios must be in \[0, 0.5\]; got \[\]"),
        ("0,0.6", r"--ratios must be in \[0, 0.5\]; got \[0.0, 0.6\]"),
        ("-0.1,0", r"--ratios must be in \[0, 0.5\]; got \[-0.1, 0.0\]"),
        ("nan", r"--ratios must be in \[0, 0.5\]; got \[nan\]"),
        ("0,40%", "--ratios takes numbers; got 0,40%"),
        ("0,,0.1", "--ratios takes numbers; got 0,,0.1"),
    ],
)
def test_ratios_out_of_range(value: str, message: str) -> None:
    parse(f"--ratios={value}")
    with pytest.raises(ValueError, match=message):
        common_flags.ratios()


def test_needed_flags() -> None:
    parse("--category=screw")
    assert common_flags.required(common_flags.CATEGORY) == "screw"
    with pytest.raises(ValueError, match="--data_dir is needed: The folder"):
        common_flags.required(common_flags.DATA_DIR)


def test_precision_is_what_the_flag_says() -> None:
    parse()
    assert common_flags.precision() == lax.Precision.HIGHEST
    parse("--precision=fast")
    assert common_flags.precision() == lax.Precision.DEFAULT
