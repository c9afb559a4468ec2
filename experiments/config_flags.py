"""Flags for every option of `InReachConfig`, on top of a preset."""

import dataclasses
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

from absl import flags

from inreach_jax import PRESETS, InReachConfig

_FLAG_NAMES = tuple(field.name for field in dataclasses.fields(InReachConfig))


def define() -> None:
    """Defines --preset and a flag per option; those not given keep the preset's value."""
    flags.DEFINE_enum("preset", "default", sorted(PRESETS), "Options to start from.")
    hints = get_type_hints(InReachConfig)
    docs = _option_docs()
    for name in _FLAG_NAMES:
        hint, text = hints[name], docs[name]
        if get_origin(hint) is Literal:
            flags.DEFINE_enum(name, None, list(get_args(hint)), text)
        elif hint is bool:
            flags.DEFINE_boolean(name, None, text)
        elif hint is float:
            flags.DEFINE_float(name, None, text)
        elif hint is int:
            flags.DEFINE_integer(name, None, text)
        else:  # numbers, or "none"
            flags.DEFINE_list(name, None, text)


def parse() -> InReachConfig:
    """The config that the flags describe.

    Raises:
      ValueError: a value is out of range.
    """
    values = flags.FLAGS.flag_values_dict()
    hints = get_type_hints(InReachConfig)
    changes = {
        name: _parse_list(name, hints[name], value) if isinstance(value, list) else value
        for name in _FLAG_NAMES
        if (value := values[name]) is not None
    }
    return PRESETS[values["preset"]].replace(**changes)


def _parse_list(name: str, hint: Any, value: list[str]) -> Any:
    if value == ["none"] and type(None) in get_args(hint):
        return None
    try:
        numbers = tuple(int(v) for v in value)
    except ValueError as error:
        raise ValueError(f"--{name} takes whole numbers; got {','.join(value)}") from error
    if name in ("resize", "crop") and len(numbers) == 1:
        return numbers * 2
    if name == "level_dim" and len(numbers) == 1:
        return numbers[0]
    return numbers


def _option_docs() -> dict[str, str]:
    """What `InReachConfig`'s docstring says of each attribute."""
    text = (InReachConfig.__doc__ or "").partition("Attributes:")[2]
    parts = re.split(r"\n\s{6}(\w+): ", text)
    return {
        name: " ".join(body.split()) for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }
