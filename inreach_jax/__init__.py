"""Fully unsupervised image anomaly detection with inter-realization channels, in JAX.

The training images may themselves contain anomalies, and nobody labels anything.
"""

from inreach_jax.backbones import BACKBONES, Backbone, load_backbone
from inreach_jax.calibration import calibrate, p_values, threshold
from inreach_jax.checkpoint import (
    restore_bank,
    restore_calibration,
    save_bank,
    save_calibration,
)
from inreach_jax.config import PRESETS, InReachConfig
from inreach_jax.pipeline import (
    DescriptorSet,
    extract,
    fit,
    fit_descriptors,
    make_score_fn,
    score_descriptor_set,
    score_images,
)
from inreach_jax.types import Calibration, NominalBank, PValues, Scores

__all__ = [
    "BACKBONES",
    "PRESETS",
    "Backbone",
    "Calibration",
    "DescriptorSet",
    "InReachConfig",
    "NominalBank",
    "PValues",
    "Scores",
    "calibrate",
    "extract",
    "fit",
    "fit_descriptors",
    "load_backbone",
    "make_score_fn",
    "p_values",
    "restore_bank",
    "restore_calibration",
    "save_bank",
    "save_calibration",
    "score_descriptor_set",
    "score_images",
    "threshold",
]
