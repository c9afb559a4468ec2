"""Fully unsupervised image anomaly detection with inter-realization channels, in JAX.

The training images may themselves contain anomalies, and nobody labels anything.
"""

from inreach_jax.backbones import BACKBONES, Backbone, load_backbone
from inreach_jax.bank import index_bank
from inreach_jax.calibration import calibrate, p_values, threshold
from inreach_jax.checkpoint import (
    FitJournal,
    restore_bank,
    restore_calibration,
    save_bank,
    save_calibration,
)
from inreach_jax.config import PRESETS, InReachConfig
from inreach_jax.export import export_score
from inreach_jax.exported import load_exported
from inreach_jax.extraction import DescriptorSet, extract
from inreach_jax.fitting import fit, fit_descriptors
from inreach_jax.pipeline import make_score_fn, score_descriptor_set, score_images
from inreach_jax.store import Budget
from inreach_jax.types import Calibration, NominalBank, PValues, Scores

__all__ = [
    "BACKBONES",
    "PRESETS",
    "Backbone",
    "Budget",
    "Calibration",
    "DescriptorSet",
    "FitJournal",
    "InReachConfig",
    "NominalBank",
    "PValues",
    "Scores",
    "calibrate",
    "export_score",
    "extract",
    "fit",
    "fit_descriptors",
    "index_bank",
    "load_backbone",
    "load_exported",
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
