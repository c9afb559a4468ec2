"""A fitted detector as one file that runs without this library: `inreach_jax.exported`.

The program and its arrays are kept apart. As constants of the program, the weights and the bank
would be read, checked and copied by every compilation, one for each batch size; as arguments they
are read once, straight from the file to the device, and the program stays small.
"""

import contextlib
import dataclasses
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inreach_jax import exported
from inreach_jax.backbones import Backbone
from inreach_jax.config import InReachConfig
from inreach_jax.pipeline import make_score_fn
from inreach_jax.types import NominalBank

PLATFORMS = ("cpu", "cuda", "tpu")

_LOCATIONS = "jax_traceback_in_locations_limit"


def export_score(
    backbone: Backbone,
    bank: NominalBank,
    *,
    config: InReachConfig,
    size: tuple[int, int] | None = None,
    threshold: float | None = None,
    platforms: Sequence[str] = PLATFORMS,
    command: str | None = None,
) -> bytes:
    """The scoring function with its weights and its bank, from uint8 images to scores.

    Args:
      backbone: That the bank was fitted with.
      bank: Of one device or many; its arrays become part of the artefact.
      config: That the bank was fitted with.
      size: (H, W) of the images that it will take; None for `config.resize`, which saves resizing
        them.
      threshold: Images that score at least this are anomalous, and the artefact says so; None for
        scores only.
      platforms: That it will run on, as `jax.export` calls them.
      command: What the artefact was made by, for its manifest.

    Returns:
      The artefact, for `exported.load_exported`. Equal arguments give equal bytes.

    Raises:
      ValueError: size or threshold are out of range, or the bank does not fit backbone and config.
    """
    height, width = config.resize if size is None else size
    if height < 1 or width < 1:
        raise ValueError(f"size must be a (height, width) of two positive integers; got {size}")
    if threshold is not None and not np.isfinite(threshold):
        raise ValueError(f"threshold must be a finite number; got {threshold}")
    if not np.isfinite(np.asarray(bank.rows[: int(bank.count)])).all():
        raise ValueError("bank has rows that are not finite; it was not exported")

    score = make_score_fn(backbone, config)
    per_image = bank.per_image  # static: part of the program
    fields = {
        field.name: getattr(bank, field.name)
        for field in dataclasses.fields(bank)
        # How many images will come is open, and the index wants to know.
        if field.name not in ("index", "per_image") and getattr(bank, field.name) is not None
    }
    tree: dict[str, Any] = {"variables": backbone.variables, "bank": fields}
    if threshold is not None:
        tree["threshold"] = np.float32(threshold)
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = ["/".join(str(key.key) for key in path) for path, _ in leaves]
    # As it is in the file: a flat dict of NumPy arrays needs no class of this library.
    arrays = {name: np.asarray(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)}

    def flat_score(arrays: dict[str, jax.Array], images: jax.Array) -> dict[str, jax.Array]:
        nested = jax.tree.unflatten(structure, [arrays[name] for name in names])
        bank = NominalBank(**nested["bank"], per_image=per_image)
        outputs = dataclasses.asdict(score(nested["variables"], bank, images))
        if threshold is not None:
            outputs["anomalous"] = outputs["image"] >= nested["threshold"]
        return outputs

    shape = jax.export.symbolic_shape(f"b, {height}, {width}, 3")
    with _without_locations():
        program = jax.export.export(jax.jit(flat_score), platforms=tuple(platforms))(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays),
            jax.ShapeDtypeStruct(shape, jnp.uint8),
        )
    outputs = jax.tree.unflatten(program.out_tree, program.out_avals)
    manifest = {
        "format_version": exported.FORMAT_VERSION,
        "backbone": backbone.name,
        "weights_digest": backbone.weights_digest,
        "config": config.to_dict(),
        "size": [height, width],
        "threshold": threshold,
        "bank_rows": int(bank.count),
        "platforms": list(program.platforms),
        "arrays": {name: _spec(x) for name, x in arrays.items()},
        "inputs": {"images": _spec(program.in_avals[-1])},
        "outputs": {name: _spec(x) for name, x in sorted(outputs.items())},
        "versions": {
            "jax": jax.__version__,
            "calling_convention": program.calling_convention_version,
        },
        "command": command,
    }
    return _pack(manifest, bytes(program.serialize()), arrays)


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Leaves out where in which file each operation was written: the paths of this machine."""
    before: int = getattr(jax.config, _LOCATIONS)
    jax.config.update(_LOCATIONS, 0)
    try:
        yield
    finally:
        jax.config.update(_LOCATIONS, before)


def _pack(manifest: dict[str, Any], program: bytes, arrays: dict[str, np.ndarray]) -> bytes:
    """The zip file. Arrays do not shrink: they are stored as they are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:

        def write(name: str, data: bytes | memoryview, method: int) -> None:
            info = zipfile.ZipInfo(name)  # of a fixed date
            info.compress_type = method
            archive.writestr(info, data)

        write(
            exported.MANIFEST,
            (json.dumps(manifest, indent=2) + "\n").encode(),
            zipfile.ZIP_DEFLATED,
        )
        write(exported.PROGRAM, program, zipfile.ZIP_DEFLATED)
        for name, x in arrays.items():
            file = io.BytesIO()
            np.lib.format.write_array(file, x, allow_pickle=False)
            write(exported.ARRAY.format(name), file.getbuffer(), zipfile.ZIP_STORED)
    return buffer.getvalue()


def _spec(x: Any) -> dict[str, Any]:
    """Shape and dtype; dimensions that depend on the batch are text."""
    shape = [n if isinstance(n, int) else str(n) for n in x.shape]
    return {"shape": shape, "dtype": str(np.dtype(x.dtype))}
