"""Flags that several binaries have, defined once, and flags for every option of the algorithm.

Each binary uses those that its docstring names. `--helpfull` lists all.
"""

import dataclasses
import inspect
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

from absl import flags
from jax import lax

from inreach_jax import BACKBONES, PRESETS, Budget, InReachConfig
from inreach_jax.datasets import (
    PROTOCOLS,
    Dataset,
    list_categories,
    list_prepared,
    load_category,
    load_prepared,
)

CATEGORY = flags.DEFINE_string("category", None, "A category of the data set.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "The folder that the categories are in.")
TFDS_DIR = flags.DEFINE_string("tfds_dir", None, "Where prepared sets are.")
WORKDIR = flags.DEFINE_string("workdir", None, "The folder for the results.")
BANK = flags.DEFINE_string("bank", None, "The folder that a bank was saved in.")
SIZE = flags.DEFINE_list("size", None, "Height and width of images, in pixels.")
BACKBONE = flags.DEFINE_enum(
    "backbone", "efficientnet_lite0", sorted(BACKBONES), "The network that features come from."
)
WEIGHTS = flags.DEFINE_string("weights", None, "Its weights; by default in well-known places.")
SEED = flags.DEFINE_integer("seed", 0, "Of everything random.", lower_bound=0)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images per step.", lower_bound=1)
PROTOCOL = flags.DEFINE_enum(
    "protocol", None, PROTOCOLS, "What is trained on and scored: docs/data.md."
)
OVERLAP = flags.DEFINE_enum(
    "overlap", "no", ("no", "yes", "both"), "Noise: whether what is trained on is scored, too."
)
RATIOS = flags.DEFINE_list("ratios", ["0", "0.1", "0.4"], "Anomalous shares of training images.")
NUM_TRAIN = flags.DEFINE_integer(
    "num_train",
    None,
    "Training images; by default as many as there are for, up to 120.",
    lower_bound=1,
)
SEEDS = flags.DEFINE_integer("seeds", 1, "Draws of training images: seeds 0, 1, ...", lower_bound=1)
DISTRIBUTED = flags.DEFINE_boolean(
    "distributed", False, "Whether this is one of several processes: docs/scaling.md."
)
DEVICES = flags.DEFINE_integer(
    "devices", None, "Devices of each process to use; by default all.", lower_bound=1
)
MEMORY_BUDGET = flags.DEFINE_list(
    "memory_budget",
    [],
    "What descriptors may take where they are needed more than once, as in device=4G,host=16G,"
    "disk=100G; by default what they need, on the device.",
)
CHECKPOINT_EVERY = flags.DEFINE_integer(
    "checkpoint_every",
    512,
    "Images between two savings of a fit's progress; 0: none.",
    lower_bound=0,
)
PRECISION = flags.DEFINE_enum(
    "precision",
    "highest",
    ("highest", "fast"),
    "How large banks are searched: in float32, or by products of 16 bits that are proved to find "
    "the same neighbours, sooner where the hardware multiplies these.",
)
PRESET = flags.DEFINE_enum("preset", "default", sorted(PRESETS), "Options to start from.")


def required(flag: flags.FlagHolder[Any]) -> Any:
    """The value of a flag that a binary cannot do without.

    Raises:
      ValueError: it was not given.
    """
    if flag.value is None:
        raise ValueError(f"--{flag.name} is needed: {flags.FLAGS[flag.name].help}")
    return flag.value


def categories() -> list[str]:
    """All categories in --data_dir or --tfds_dir.

    Raises:
      OSError: nothing is there.
      ValueError: both flags or none are given.
    """
    prepared = _prepared()
    names = list_categories(required(DATA_DIR)) if prepared is None else list_prepared(prepared)
    return list(names)


def load(category: str) -> Dataset:
    """One category, from --data_dir or --tfds_dir.

    Raises:
      OSError: nothing is there.
      ValueError: as `load_category` and `load_prepared`; both flags or none are given.
    """
    prepared = _prepared()
    if prepared is None:
        return load_category(required(DATA_DIR), category)
    return load_prepared(prepared, category)


def _prepared() -> str | None:
    """The folder of prepared sets, if they are to be read."""
    if TFDS_DIR.value is not None and DATA_DIR.value is not None:
        raise ValueError("--data_dir and --tfds_dir are two places for one set; give one of them")
    return TFDS_DIR.value


def config() -> InReachConfig:
    """The options that the flags describe: those of --preset, and what is given beside it.

    Raises:
      ValueError: a value is out of range.
    """
    changes = {
        name: _parse_list(name, value) if isinstance(value, list) else value
        for name, holder in _OPTIONS.items()
        if (value := holder.value) is not None
    }
    return PRESETS[PRESET.value].replace(**changes)


def precision() -> lax.Precision:
    """Of the products that --precision asks for."""
    return lax.Precision.HIGHEST if PRECISION.value == "highest" else lax.Precision.DEFAULT


def budget() -> Budget:
    """What --memory_budget allows.

    Raises:
      ValueError: it cannot be understood.
    """
    places: dict[str, Any] = {}
    for part in MEMORY_BUDGET.value:
        match = re.fullmatch(r"(device|host|disk)=(\d+(?:\.\d+)?)([KMGT]?)", part)
        if match is None:
            raise ValueError(
                "--memory_budget takes places and sizes, as in device=4G,host=16G,disk=100G; got "
                f"{part!r}"
            )
        place, number, unit = match.groups()
        places[place] = int(float(number) * 1024 ** " KMGT".index(unit or " "))
    return Budget(**places)


def size() -> tuple[int, int] | None:
    """The height and width of --size.

    Raises:
      ValueError: it is not one or two whole numbers above 0.
    """
    if SIZE.value is None:
        return None
    try:
        numbers = [int(text) for text in SIZE.value]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise ValueError(f"--size takes H,W, whole numbers above 0; got {','.join(SIZE.value)}")
    return numbers[0], numbers[-1]


def ratios() -> list[float]:
    """The shares of --ratios, ascending.

    Raises:
      ValueError: one is no number in [0, 0.5].
    """
    try:
        values = sorted({float(ratio) for ratio in RATIOS.value})
    except ValueError as error:
        raise ValueError(f"--ratios takes numbers; got {','.join(RATIOS.value)}") from error
    if not values or not 0 <= values[0] <= values[-1] <= 0.5:
        raise ValueError(f"--ratios must be in [0, 0.5]; got {values}")
    return values


def _define_options() -> dict[str, flags.FlagHolder[Any]]:
    """A flag per option, whose help is what `InReachConfig`'s docstring says of it."""
    # From Python 3.13 on, docstrings come without their indentation.
    text = inspect.cleandoc(InReachConfig.__doc__ or "").partition("Attributes:")[2]
    parts = re.split(r"\n {2}(\w+): ", text)
    docs = {
        name: " ".join(body.split()) for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }
    hints = get_type_hints(InReachConfig)
    holders = {}
    for field in dataclasses.fields(InReachConfig):
        name, hint = field.name, hints[field.name]
        holder: flags.FlagHolder[Any]
        if get_origin(hint) is Literal:
            holder = flags.DEFINE_enum(name, None, list(get_args(hint)), docs[name])
        elif hint is bool:
            holder = flags.DEFINE_boolean(name, None, docs[name])
        elif hint is float:
            holder = flags.DEFINE_float(name, None, docs[name])
        elif hint is int:
            holder = flags.DEFINE_integer(name, None, docs[name])
        else:
            holder = flags.DEFINE_list(name, None, f"{docs[name]} Whole numbers, or none.")
        holders[name] = holder
    return holders


def _parse_list(name: str, value: list[str]) -> Any:
    hint = get_type_hints(InReachConfig)[name]
    if value == ["none"] and type(None) in get_args(hint):
        return None
    try:
        numbers = tuple(int(v) for v in value)
    except ValueError as error:
        raise ValueError(f"--{name} takes whole numbers; got {','.join(value)}") from error
    if name in ("resize", "crop", "tile") and len(numbers) == 1:
        return numbers * 2
    if get_type_hints(InReachConfig)[name] == int | None and len(numbers) == 1:
        return numbers[0]
    return numbers


_OPTIONS = _define_options()
