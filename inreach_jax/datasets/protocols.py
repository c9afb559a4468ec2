"""Which images are fitted and which are scored, from a seed, written down so that it can be rerun.

A *protocol* turns the listing of a category into a *manifest*: the names of the images to fit and
to score, in order, with the SHA-256 of every file. Making one is a pure function of the listing,
the options and the seed; nothing else, neither the machine nor the time, has a part in it.

- "clean": the training images in listing order; all test images are scored.
- "noise": a training set of constant size with an exact share of anomalous images. These come from
  a reserved list of anomalous test images, and reserved images are never scored: what is scored is
  the same for every share, and none of it was trained on.
- "official": the released evaluation. Images drawn from the whole test set, good ones among them,
  are appended to the training images and *stay in the test set*.
- "transductive": the noise protocol's training set is both fitted and scored.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from inreach_jax import sharding
from inreach_jax.datasets import files
from inreach_jax.datasets.splits import GOOD, Dataset, Split, join

PROTOCOLS = ("clean", "noise", "official", "transductive")

NUM_CONTAMINATE = 40
"""How many images the released evaluation adds."""

_MAX_NUM_TRAIN = 120
_SCHEMA, _VERSION = "inreach_jax.manifest", 1
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """An image of a listing.

    Attributes:
      name: The file's, relative to the category, with "/" between folders.
      label: `GOOD`, or what is wrong.
      sha256: Of the file's bytes, in hexadecimal; of sets made in memory, of shape and pixels.
      mask_sha256: Likewise of the mask; None where the image is good.
    """

    name: str
    label: str
    sha256: str
    mask_sha256: str | None

    def __post_init__(self) -> None:
        problem = _entry_problem(self)
        if problem:
            raise ValueError(f"entry {self.name!r}: {problem}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is fitted and what is scored, and how the choice was made.

    Attributes:
      category: The data set's name.
      protocol: One of `PROTOCOLS`.
      seed: Of the draws.
      ratio: Share of the training images that is anomalous, as asked for; 0 where the protocol
        takes none.
      overlap: Whether test images that are trained on are scored as well.
      max_ratio: Highest ratio that images were reserved for; 0 where the protocol takes none.
      train: What is fitted, in order: seeds are taken from the front.
      test: What is scored, in order.
    """

    category: str
    protocol: str
    seed: int
    ratio: float
    overlap: bool
    max_ratio: float
    train: tuple[Entry, ...]
    test: tuple[Entry, ...]

    def __post_init__(self) -> None:
        problems = _manifest_problems(self)
        if problems:
            raise ValueError(
                f"the manifest of {self.category!r} contradicts itself: {'; '.join(problems)}"
            )


def list_entries(
    dataset: Dataset, *, progress: Callable[[str, int, int | None], None] | None = None
) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """Hashes all files of a category; every one is read, with several processes by one of them.

    Args:
      dataset: Any.
      progress: Called with "hashing", how many images are done and how many there are.

    Returns:
      The training and the test images, as `make_manifest` takes them.

    Raises:
      OSError: a file cannot be read.
      ValueError: a set made in memory has images that cannot be decoded.
    """
    every, num_train = join(dataset.train, dataset.test), len(dataset.train)
    total = len(every)
    # Of the image, of the mask, and whether there is one: what processes can tell one another.
    digests = np.zeros((total, 65), np.uint8)
    for i in range(jax.process_index(), total, jax.process_count()):
        entry = _entry(every, i)
        of_mask = entry.mask_sha256 or "00" * 32
        flag = f"{entry.mask_sha256 is not None:02x}"
        digests[i] = np.frombuffer(bytes.fromhex(entry.sha256 + of_mask + flag), np.uint8)
        if progress is not None:
            progress("hashing", min(i + jax.process_count(), total), total)
    entries = []
    for name, label, digest in zip(every.names, every.labels, sharding.merge(digests), strict=True):
        text = digest.tobytes().hex()
        mask = text[64:128] if digest[64] else None
        entries.append(Entry(name=name, label=label, sha256=text[:64], mask_sha256=mask))
    return tuple(entries[:num_train]), tuple(entries[num_train:])


def make_manifest(
    category: str,
    train_entries: Sequence[Entry],
    test_entries: Sequence[Entry],
    *,
    protocol: str,
    seed: int = 0,
    ratio: float = 0.0,
    overlap: bool = False,
    max_ratio: float = 0.5,
    num_train: int | None = None,
    num_contaminate: int = NUM_CONTAMINATE,
) -> Manifest:
    """Chooses what is fitted and what is scored. Pure: equal arguments, equal manifests.

    With "noise", round(max_ratio * num_train) anomalous test images are reserved, in an order drawn
    from the seed, and the first round(ratio * num_train) of them are trained on: a lower ratio's
    are among a higher one's. The other training images are good ones of the training set, and all
    are shuffled, so that seeds can be anomalous, too.

    Args:
      category: The data set's name.
      train_entries: Of its training images, in listing order, from `list_entries`.
      test_entries: Of its test images.
      protocol: One of `PROTOCOLS`.
      seed: Of the draws, >= 0; "clean" draws nothing.
      ratio: Share of the training images that is anomalous, in [0, max_ratio]; of "noise" and
        "transductive" only.
      overlap: Of "noise" only: the training set stays the same, but all test images are scored,
        those that are trained on among them.
      max_ratio: Highest ratio that results are to be compared at, in [0, 1]; "noise" and
        "transductive" reserve so many images, whatever `ratio` is.
      num_train: How many images "noise" and "transductive" train on. None: the largest number up
        to 120 that there are good training images for and that leaves at least half of the
        anomalous test images to be scored.
      num_contaminate: How many test images "official" appends.

    Returns:
      The manifest.

    Raises:
      ValueError: an argument is out of range, the protocol does not take it, a name occurs twice,
        or there are too few images.
    """
    train, test = tuple(train_entries), tuple(test_entries)
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}; got {protocol!r}")
    if seed < 0:
        raise ValueError(f"seed must be >= 0; got {seed}")
    names = [entry.name for entry in train + test]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"names must be unique in a category; {category} has twice: {twice}")
    drawn = protocol in ("noise", "transductive")
    if not drawn and (ratio != 0 or num_train is not None):
        raise ValueError(
            f"ratio and num_train are options of the protocols noise and transductive; got ratio = "
            f"{ratio:g} and num_train = {num_train} with {protocol}"
        )
    if overlap and protocol != "noise":
        raise ValueError(f"overlap is an option of the protocol noise; got it with {protocol}")
    if protocol != "official" and num_contaminate != NUM_CONTAMINATE:
        raise ValueError(
            f"num_contaminate is an option of the protocol official; got {num_contaminate} with "
            f"{protocol}"
        )

    if protocol == "official":
        if not 0 <= num_contaminate <= len(test):
            raise ValueError(
                f"num_contaminate must be in [0, {len(test)}], the number of test images of "
                f"{category}; got {num_contaminate}"
            )
        order = np.random.default_rng(seed).permutation(len(test))[:num_contaminate]
        train += tuple(test[i] for i in order)
    elif drawn:
        train, reserved = _draw(
            category, train, test, seed=seed, ratio=ratio, max_ratio=max_ratio, num_train=num_train
        )
        if protocol == "transductive":
            test = train
        elif not overlap:
            test = tuple(entry for entry in test if entry not in reserved)
    return Manifest(
        category=category,
        protocol=protocol,
        seed=int(seed),
        ratio=float(ratio),
        overlap=overlap or protocol in ("official", "transductive"),
        max_ratio=float(max_ratio) if drawn else 0.0,
        train=train,
        test=test,
    )


def apply_manifest(
    dataset: Dataset,
    manifest: Manifest,
    *,
    verify: bool = True,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Dataset:
    """The images that a manifest names, once every one is known to be what it was.

    Args:
      dataset: The category that the manifest was made of, or a copy of it.
      manifest: From `make_manifest` or `read_manifest`.
      verify: Compares labels and the digests of all files, which are read for it; False where the
        manifest has just been made of this very data set.
      progress: Called with "verifying", how many images are done and how many there are.

    Returns:
      A data set whose splits have the manifest's images in its order; read when indexed.

    Raises:
      OSError: a file cannot be read.
      ValueError: the data set is another one, or images of the manifest are missing or changed;
        all of them are named.
    """
    if dataset.name != manifest.category:
        raise ValueError(
            f"the manifest is of category {manifest.category!r}; got the data set {dataset.name!r}"
        )
    every = join(dataset.train, dataset.test)
    places = {name: i for i, name in enumerate(every.names)}
    wanted = {entry.name: entry for entry in manifest.train + manifest.test}
    problems = []
    for done, (name, entry) in enumerate(wanted.items(), start=1):
        if name not in places:
            problems.append(f"{name}: missing")
        elif verify:
            problems += _differences(entry, every, places[name])
        if progress is not None:
            progress("verifying", done, len(wanted))
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(
            f"category {dataset.name!r} is not what the manifest was made of, {len(problems)} "
            f"problem(s):{listed}\nGet the same version of the data set, or make a new manifest"
        )

    def pick(entries: Sequence[Entry]) -> Split:
        return every.select([places[entry.name] for entry in entries])

    return Dataset(name=dataset.name, train=pick(manifest.train), test=pick(manifest.test))


def write_manifest(path: files.Path, manifest: Manifest) -> None:
    """Writes a manifest as JSON, whole or not at all; equal manifests give equal bytes.

    Raises:
      OSError: the file cannot be written.
    """
    content = {"schema": _SCHEMA, "version": _VERSION, **dataclasses.asdict(manifest)}
    target = pathlib.Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n")
    temporary.replace(target)


def read_manifest(path: files.Path) -> Manifest:
    """Reads what `write_manifest` wrote, and accepts nothing else.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no manifest, one of another version, or contradicts itself.
    """
    try:
        content = json.loads(
            pathlib.Path(path).read_text(encoding="utf-8"),
            object_pairs_hook=_object,
            parse_constant=_no_constant,
        )
        if not isinstance(content, dict) or content.get("schema") != _SCHEMA:
            raise ValueError(f'not a manifest: "schema" must be {_SCHEMA!r}')
        if content.get("version") != _VERSION:
            raise ValueError(
                f"its version is {content.get('version')!r}, this library reads {_VERSION}; make "
                "it again"
            )
        fields = _checked(
            {k: v for k, v in content.items() if k not in ("schema", "version")}, Manifest, "it"
        )
        for part in ("train", "test"):
            fields[part] = tuple(
                Entry(**_checked(entry, Entry, f"{part}[{i}]"))
                for i, entry in enumerate(fields[part])
            )
        return Manifest(**fields)
    except ValueError as error:  # JSON's and Unicode's errors are some, too
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def _draw(
    category: str,
    train: Sequence[Entry],
    test: Sequence[Entry],
    *,
    seed: int,
    ratio: float,
    max_ratio: float,
    num_train: int | None,
) -> tuple[tuple[Entry, ...], frozenset[Entry]]:
    """The noise protocol's training images in order, and what is reserved."""
    if not 0 <= max_ratio <= 1:
        raise ValueError(f"max_ratio must be in [0, 1]; got {max_ratio}")
    if not 0 <= ratio <= max_ratio:
        raise ValueError(f"ratio must be in [0, max_ratio = {max_ratio:g}]; got {ratio}")
    good = [entry for entry in train if entry.label == GOOD]
    odd = [entry for entry in test if entry.label != GOOD]
    counts = f"{category} has {len(good)} good training images and {len(odd)} anomalous test images"
    if num_train is None:
        num_train = _largest_num_train(len(good), len(odd), max_ratio=max_ratio)
        if num_train is None:
            raise ValueError(
                f"no number of training images leaves half of the anomalous test images to be "
                f"scored at ratios up to {max_ratio:g}: {counts}. Lower max_ratio or give num_train"
            )
    if num_train < 1:
        raise ValueError(f"num_train must be >= 1; got {num_train}")
    num_reserved, num_odd = round(max_ratio * num_train), round(ratio * num_train)
    if ratio > 0 and num_odd == 0:
        raise ValueError(
            f"ratio {ratio:g} of {num_train} training images is not one image; raise ratio or "
            "num_train"
        )
    if len(odd) <= num_reserved or len(good) < num_train - num_odd:
        raise ValueError(
            f"{num_train} training images at ratios up to {max_ratio:g} need more than "
            f"{num_reserved} anomalous test images and at least {num_train - num_odd} good "
            f"training images; {counts}. Lower num_train or max_ratio"
        )
    # The order of the draws is part of the protocol: others would be other training sets.
    rng = np.random.default_rng(seed)
    reserved = [odd[i] for i in rng.permutation(len(odd))[:num_reserved]]
    chosen = [good[i] for i in rng.permutation(len(good))[: num_train - num_odd]]
    chosen += reserved[:num_odd]
    return tuple(chosen[i] for i in rng.permutation(num_train)), frozenset(reserved)


def _largest_num_train(num_good: int, num_odd: int, *, max_ratio: float) -> int | None:
    for num in range(min(_MAX_NUM_TRAIN, num_good), 0, -1):
        reserved = round(max_ratio * num)
        if 2 * reserved <= num_odd and num_odd > 0 and (reserved > 0 or max_ratio == 0):
            return num
    return None


def _entry(split: Split, index: int) -> Entry:
    """Reads and hashes."""
    good = split.labels[index] == GOOD
    if split.encoded is not None:
        image, mask = split.encoded[index]
        digests = _sha256(image), None if good or mask is None else _sha256(mask)
    else:
        arrays = split.images[index], split.masks[index]
        digest, mask_digest = (_sha256(f"{x.shape}".encode(), x.tobytes()) for x in arrays)
        digests = digest, None if good else mask_digest
    return Entry(
        name=split.names[index],
        label=split.labels[index],
        sha256=digests[0],
        mask_sha256=digests[1],
    )


def _sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _differences(wanted: Entry, split: Split, index: int) -> list[str]:
    try:
        got = _entry(split, index)
    except OSError as error:
        return [f"{wanted.name}: cannot be read ({error.strerror or error})"]
    problems = []
    if got.label != wanted.label:
        problems.append(f"{wanted.name}: labelled {got.label}, not {wanted.label}")
    if got.sha256 != wanted.sha256:
        problems.append(f"{wanted.name}: changed, its SHA-256 is {got.sha256}")
    if got.mask_sha256 != wanted.mask_sha256:
        problems.append(f"{wanted.name}: its mask changed, the SHA-256 is {got.mask_sha256}")
    return problems


def _entry_problem(entry: Entry) -> str | None:
    parts = entry.name.split("/")
    if "\\" in entry.name or any(part in ("", ".", "..") for part in parts) or ":" in parts[0]:
        return "names must be relative to the category, with / between folders"
    if not entry.label:
        return "its label is empty"
    for digest in (entry.sha256, entry.mask_sha256):
        if digest is not None and not _DIGEST.fullmatch(digest):
            return f"SHA-256 is 64 hexadecimal digits in lower case; got {digest!r}"
    if (entry.mask_sha256 is None) != (entry.label == GOOD):
        return "anomalous images have masks and good ones none"
    return None


def _manifest_problems(manifest: Manifest) -> list[str]:
    problems = []
    if manifest.protocol not in PROTOCOLS:
        problems.append(f"there is no protocol {manifest.protocol!r}")
    if manifest.seed < 0:
        problems.append(f"seed must be >= 0; got {manifest.seed}")
    in_range = 0 <= manifest.ratio <= manifest.max_ratio <= 1
    if not in_range:
        problems.append(
            f"0 <= ratio <= max_ratio <= 1 must hold; got {manifest.ratio} and {manifest.max_ratio}"
        )
    for part, entries in (("train", manifest.train), ("test", manifest.test)):
        if not entries:
            problems.append(f"{part} is empty")
        if len({entry.name for entry in entries}) < len(entries):
            problems.append(f"{part} names an image twice")
    both = {entry.name for entry in manifest.train} & {entry.name for entry in manifest.test}
    if both and not manifest.overlap:
        problems.append(f"without overlap, images are trained on and scored: {sorted(both)}")
    if manifest.protocol == "transductive" and manifest.train != manifest.test:
        problems.append("transductive scores what was trained on, in the same order")
    if manifest.protocol in ("noise", "transductive") and in_range:
        num = sum(entry.label != GOOD for entry in manifest.train)
        if num != round(manifest.ratio * len(manifest.train)):
            problems.append(
                f"{num} of {len(manifest.train)} training images are anomalous, which is not a "
                f"ratio of {manifest.ratio:g}"
            )
    return problems


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of keys that occur twice, Python would keep the last without a word."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"keys occur twice among {keys}")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# What JSON gives for the annotations of the two dataclasses; bool is an int to Python.
_JSON_TYPES: dict[str, Callable[[Any], bool]] = {
    "seed": lambda x: isinstance(x, int) and not isinstance(x, bool),
    "ratio": lambda x: isinstance(x, float) and math.isfinite(x),
    "max_ratio": lambda x: isinstance(x, float) and math.isfinite(x),
    "overlap": lambda x: isinstance(x, bool),
    "train": lambda x: isinstance(x, list),
    "test": lambda x: isinstance(x, list),
    "mask_sha256": lambda x: x is None or isinstance(x, str),
}


def _checked(content: Any, cls: type[Entry | Manifest], where: str) -> dict[str, Any]:
    """A JSON object that has the fields of a class and no others, each of its type."""
    names = [field.name for field in dataclasses.fields(cls)]
    if not isinstance(content, dict) or sorted(content) != sorted(names):
        raise ValueError(f"{where} must have exactly the keys {', '.join(names)}")
    for name in names:
        if not _JSON_TYPES.get(name, lambda x: isinstance(x, str))(content[name]):
            raise ValueError(f"{where}: {name} is of the wrong type: {content[name]!r}"[:200])
    return dict(content)
