"""Frozen convolutional networks, from images to feature maps. They know nothing of InReaCh."""

from inreach_jax.backbones.registry import BACKBONES, load_backbone, load_spec
from inreach_jax.backbones.spec import Backbone, BackboneSpec

__all__ = ["BACKBONES", "Backbone", "BackboneSpec", "load_backbone", "load_spec"]
