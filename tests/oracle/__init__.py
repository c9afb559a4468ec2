"""InReaCh in float64 NumPy, literally as specified, to check the library against.

Nothing here imports the library or shares its formulation: channels are dicts of lists,
neighbourhoods are unfolded before they are pooled, pooling follows the rule for its bins, and
every nearest neighbour is settled by the sum of squared differences itself.

Shape legend as in `inreach_jax.types`: N images, S seeds, P = Hp * Wp patches in row-major order,
D dimensions, M bank rows, T test images.
"""

from .channels import (
    ChannelId,
    Element,
    Member,
    Radii,
    collect,
    members,
    nominal,
    nominal_precision_recall,
    radii,
)
from .maps import auroc, gaussian, score, smooth_map, upsample
from .matching import associate, mutual_nearest, nearest, squared_distances
from .patches import (
    adaptive_average_pool,
    descriptors,
    is_positional,
    neighbourhoods,
    position,
    transpose_mse,
    upsample_bilinear,
)
from .support import (
    choose_span,
    growth_exponent,
    score_by_images,
    seed_distances,
    span,
    spread_at,
    usual_exponent,
)

__all__ = [
    "ChannelId",
    "Element",
    "Member",
    "Radii",
    "adaptive_average_pool",
    "associate",
    "auroc",
    "choose_span",
    "collect",
    "descriptors",
    "gaussian",
    "growth_exponent",
    "is_positional",
    "members",
    "mutual_nearest",
    "nearest",
    "neighbourhoods",
    "nominal",
    "nominal_precision_recall",
    "position",
    "radii",
    "score",
    "score_by_images",
    "seed_distances",
    "smooth_map",
    "span",
    "spread_at",
    "squared_distances",
    "transpose_mse",
    "upsample",
    "upsample_bilinear",
    "usual_exponent",
]
