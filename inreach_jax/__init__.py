"""Fully unsupervised image anomaly detection with inter-realization channels, in JAX.

The training images may themselves contain anomalies, and nobody labels anything.
"""

from inreach_jax.backbones import BACKBONES, Backbone, load_backbone
from inreach_jax.checkpoint import FitJournal, restore_bank, save_bank
from inreach_jax.config import PRESETS, InReachConfig
from inreach_jax.export import export_score
from inreach_jax.exported import load_exported
from inreach_jax.extraction import DescriptorSet, extract
from inreach_jax.fitting import fit, fit_descriptors
from inreach_jax.pipeline import make_score_fn, score_descriptor_set, score_images
from inreach_jax.store import Budget
from inreach_jax.types import NominalBank, Scores

__all__ = [
    "BACKBONES",
    "PRESETS",
    "Backbone",
    "Budget",
    "DescriptorSet",
    "FitJournal",
    "InReachConfig",
    "NominalBank",
    "Scores",
    "export_score",
    "extract",
    "fit",
    "fit_descriptors",
    "load_backbone",
    "load_exported",
    "make_score_fn",
    "restore_bank",
    "save_bank",
    "score_descriptor_set",
    "score_images",
]
