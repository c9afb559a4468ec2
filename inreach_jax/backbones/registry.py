"""Backbones by name. To add one: write its module and `BackboneSpec`, and a line below."""

import os
from collections.abc import Mapping
from pathlib import Path

import jax

from inreach_jax.backbones import efficientnet_lite, wide_resnet
from inreach_jax.backbones import weights as weights_lib
from inreach_jax.backbones.spec import Backbone, BackboneSpec

BACKBONES: Mapping[str, BackboneSpec] = {
    spec.name: spec
    for spec in (
        efficientnet_lite.EFFICIENTNET_LITE0,
        wide_resnet.WIDE_RESNET50_2,
    )
}


def load_backbone(name: str, *, weights: str | os.PathLike[str] | None = None) -> Backbone:
    """Loads a frozen backbone. Nothing is downloaded.

    Args:
      name: One of `BACKBONES`.
      weights: A `.safetensors`, `.npz` or (where PyTorch is installed) `.pth` file with PyTorch's
        names. None for the place where the backbone's weights are usually kept: in this package
        for efficientnet_lite0, in the caches of the Hugging Face hub or PyTorch for
        wide_resnet50_2.

    Returns:
      The backbone, its variables on the default device.

    Raises:
      ValueError: there is no such backbone, or the file cannot be read or does not hold exactly
        its weights; all differences are listed.
      FileNotFoundError: there is no such file; without `weights`, says where to get it.
    """
    if name not in BACKBONES:
        raise ValueError(f"name must be one of {sorted(BACKBONES)}; got {name!r}")
    return load_spec(BACKBONES[name], weights=weights)


def load_spec(spec: BackboneSpec, *, weights: str | os.PathLike[str] | None = None) -> Backbone:
    """`load_backbone` for a backbone that need not be registered; same arguments and errors."""
    path = spec.find_weights() if weights is None else Path(weights).expanduser()
    variables, digest = weights_lib.convert(
        weights_lib.read_weights(path),
        table=spec.conversion_table(),
        shapes=spec.variable_shapes(),
        ignore=spec.ignore,
        source=str(path),
    )
    return Backbone(spec=spec, variables=jax.device_put(variables), weights_digest=digest)
