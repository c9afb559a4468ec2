"""The steps of the algorithm, each on its own."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import skimage.measure
from jax import lax

import inreach_jax
from experiments.benchmarks import measure
from experiments.benchmarks.measure import Bench, Row, compare
from inreach_jax import association, channels, descriptors, distances, metrics
from inreach_jax import images as images_lib
from inreach_jax.backbones import BACKBONES, BackboneSpec, weights
from inreach_jax.datasets.files import read_image
from inreach_jax.types import UNMATCHED, SeedMatches

PAPER = inreach_jax.PRESETS["paper"].replace(positional="off")
"""The published options; the test for position is left out on both sides."""
BATCH_SHAPE = (8, 224, 224, 3)
"""Of the images that backbones are compared on."""
WIDE_TAPS = BACKBONES["wide_resnet50_2"].default_taps


def difference(ours: Any, theirs: Any) -> float:
    """The largest difference over the largest value."""
    theirs = np.asarray(measure.on_host(theirs))
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def preprocessing(bench: Bench) -> list[Row]:
    """Image files, decoded, resized, cropped and normalised, against Pillow and PyTorch."""
    if bench.peers.get("torch") is None:
        return []
    from PIL import Image

    from experiments.benchmarks import literal

    config = bench.config
    scale: dict[str, Any] = {"mean": bench.backbone.spec.mean, "std": bench.backbone.spec.std}
    step = jax.jit(
        lambda images: images_lib.normalize(
            images_lib.resize_and_crop(images, config=config), **scale, config=config
        )
    )
    with bench.image_files(16) as files:

        def ours() -> list[jax.Array]:
            return [step(read_image(file)[None]) for file in files]

        def theirs() -> list[Any]:
            images = (np.array(Image.open(file).convert("RGB")) for file in files)
            return [literal.preprocess(image, **scale, config=config) for image in images]

        timed = bench.time({"ours": ours, "theirs": theirs})
    found = zip(timed.results["ours"], timed.results["theirs"], strict=True)
    apart = max(difference(a, b.permute(0, 2, 3, 1)) for a, b in found)
    return [
        compare(
            "preprocessing",
            timed.seconds["ours"],
            "Pillow and torch interpolate",
            timed.seconds["theirs"],
            images=len(files),
            agreement=f"within {apart:.0e} of the largest value",
            agrees=apart < 2e-2,  # antialiasing filters are cut off differently
        )
    ]


def backbone(bench: Bench) -> list[Row]:
    """Feature maps of 8 images of 224 pixels; Wide-ResNet-50-2 against torchvision's."""
    rng = np.random.default_rng(0)
    batch = jnp.asarray(rng.standard_normal(BATCH_SHAPE, np.float32))
    lite = bench.backbone
    forward = jax.jit(lite.spec.apply)
    timed = bench.time({"ours": lambda: forward(lite.variables, batch)})
    rows = [compare("backbone_lite0", timed.seconds["ours"], "none", images=len(batch))]
    torch, torchvision = bench.peers.get("torch"), bench.peers.get("torchvision")
    if torch is None or torchvision is None:
        return rows
    from experiments.benchmarks import literal

    spec = BACKBONES["wide_resnet50_2"]
    model = torchvision.models.wide_resnet50_2(weights=None).eval()
    variables = _variables(model, spec)
    wide = jax.jit(spec.apply)
    blocks = [
        block for stage in (1, 2, 3, 4) for block in getattr(model, f"layer{stage}").children()
    ][: max(WIDE_TAPS) + 1]
    x = literal.tensor(batch).permute(0, 3, 1, 2).contiguous()

    def theirs() -> list[Any]:
        taps = []
        with torch.inference_mode():
            y = model.maxpool(model.relu(model.bn1(model.conv1(x))))
            for number, block in enumerate(blocks):
                y = block(y)
                if number in WIDE_TAPS:
                    taps.append(y)
        return taps

    timed = bench.time({"ours": lambda: wide(variables, batch), "theirs": theirs})
    found = zip(timed.results["ours"], timed.results["theirs"], strict=True)
    apart = max(difference(a, b.permute(0, 2, 3, 1)) for a, b in found)
    row = compare(
        "backbone_wide_resnet50_2",
        timed.seconds["ours"],
        "torchvision",
        timed.seconds["theirs"],
        images=len(batch),
        agreement=f"within {apart:.0e} of the largest value",
        agrees=apart < 1e-4,
    )
    return [*rows, row]


def _variables(model: Any, spec: BackboneSpec) -> Any:
    """The weights of a PyTorch model as ours."""
    state = {name: value.cpu().numpy() for name, value in model.state_dict().items()}
    variables, _ = weights.convert(
        state,
        table=spec.conversion_table(),
        shapes=spec.variable_shapes(),
        ignore=spec.ignore,
        source="torchvision",
    )
    return jax.device_put(variables)


def describe(bench: Bench) -> list[Row]:
    """Feature maps to descriptors of 1024 dimensions, against unfolding, upsampling and pooling."""
    if bench.peers.get("torch") is None:
        return []
    rng = np.random.default_rng(0)
    lite = bench.levels("train", 8, config=PAPER)
    shapes = [(56, 256)] * 3 + [(28, 512)] * 4 + [(14, 1024)] * 5 + [(7, 2048)]
    wide = [rng.random((1, side, side, c), np.float32) for side, c in shapes]
    return [
        _describe(bench, "descriptors_lite0", lite),
        _describe(bench, "descriptors_wide_resnet50_2", wide),
    ]


def _describe(bench: Bench, name: str, levels: Any) -> Row:
    from experiments.benchmarks import literal

    options: dict[str, Any] = {
        "level_dim": PAPER.level_dim,
        "descriptor_dim": PAPER.descriptor_dim,
    }
    levels = [jnp.asarray(level) for level in levels]
    step = jax.jit(functools.partial(descriptors.describe, **options))
    of_torch = [literal.tensor(level).permute(0, 3, 1, 2).contiguous() for level in levels]
    timed = bench.time(
        {"ours": lambda: step(levels), "theirs": lambda: literal.describe(of_torch, **options)}
    )
    apart = difference(timed.results["ours"], timed.results["theirs"])
    return compare(
        name,
        timed.seconds["ours"],
        "torch unfold, interpolate, pool",
        timed.seconds["theirs"],
        images=len(levels[0]),
        agreement=f"within {apart:.0e} of the largest value",
        agrees=apart < 1e-4,
    )


def mutual_nn(bench: Bench) -> list[Row]:
    """Mutual nearest neighbours of 3136 x 1024 and as many, a 56 x 56 grid in the paper's D.

    Rows are centred already, as association hands them over. Against the plain product of the same
    matrices at the same precision, which no exact search by products beats, and against torch.cdist
    and its minima in both directions.
    """
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal((3136, 1024), np.float32)) for _ in range(2))
    search = jax.jit(distances.mutual_nearest).lower(a, b).compile()
    product = jax.jit(
        lambda a, b: lax.dot_general(
            a, b, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
        )
    )
    functions: dict[str, Any] = {
        "search": lambda: search(a, b),
        "product": lambda: product(a, b),
    }
    if bench.peers.get("torch") is not None:
        from experiments.benchmarks import literal

        p, q = literal.tensor(a), literal.tensor(b)

        functions |= {"torch": lambda: literal.mutual_nearest(p, q), "sgemm": lambda: p @ q.T}
    timed = bench.time(functions)
    seconds = timed.seconds
    analysis = search.memory_analysis()
    memory = analysis.temp_size_in_bytes if analysis is not None else math.nan
    of = functools.partial(compare, "mutual_nn", seconds["search"])
    rows = [of("float32 matrix product, XLA", seconds["product"])]
    if "torch" in functions:
        found = zip(timed.results["search"], timed.results["torch"], strict=True)
        equal = float(np.mean([np.asarray(x) == measure.on_host(y) for x, y in found]))
        rows += [
            of("float32 matrix product, torch", seconds["sgemm"]),
            of(
                "torch.cdist and argmin",
                seconds["torch"],
                agreement=f"{equal:.4%} equal",
                agrees=equal >= 0.999,
            ),
        ]
    whole = a.shape[0] * b.shape[0] * 4 / 2**20
    return [
        *rows,
        measure.constant(
            "mutual_nn_memory",
            "MiB beyond inputs and outputs",
            memory / 2**20,
            "the whole distance matrix",
            whole,
        ),
    ]


def associate(bench: Bench) -> list[Row]:
    """Association of 24 images with 10 seeds and the channels that come of it, each on its own."""
    if bench.peers.get("torch") is None:
        return []
    from experiments.benchmarks import literal

    described = bench.descriptors("train", config=PAPER)
    images = described.first(min(24, described.num_images))
    num_images, num_patches, _ = images.shape
    config = PAPER.replace(num_seeds=min(10, num_images))
    seeds = images[: config.num_seeds]
    index = jnp.arange(num_images, dtype=jnp.int32)
    theirs = literal.tensor(images)

    @jax.jit
    def members(seeds: jax.Array, images: jax.Array) -> Any:
        def one_more(number: jax.Array, matches: SeedMatches) -> SeedMatches:
            return association.associate_seed(seeds, matches, number=number, config=config)

        matches = jax.tree.map(
            jnp.asarray,
            association.nothing_compared(num_seeds=config.num_seeds, num_patches=images.shape[1]),
        )
        matches = lax.fori_loop(1, config.num_seeds, one_more, matches)
        each = jax.tree.map(lambda x: x[None], matches)
        known = association.members_of_seeds(each, config=config)
        return association.members_of_images(
            seeds, known, images, image_index=index, num_images=num_images, config=config
        )

    @jax.jit
    def keep(seeds: jax.Array, images: jax.Array, members: Any) -> jax.Array:
        num = config.num_seeds * num_patches
        sums = channels.add_sums(
            jnp.zeros((num, images.shape[2]), jnp.float32), seeds, images, members
        )
        span = channels.channel_span(members, num_channels=num)
        offset = sums / span[:, None].astype(jnp.float32)
        radii = channels.member_radii(seeds, offset, images, members)
        of_founders = jnp.linalg.norm(offset, axis=1)
        return channels.filter_channels(
            members, radii, of_founders, num_seeds=config.num_seeds, config=config
        ).multiplicity

    associated = bench.time(
        {
            "ours": lambda: members(seeds, images),
            "theirs": lambda: literal.associate(theirs, config=config),
        }
    )
    joined, lists = associated.results["ours"], associated.results["theirs"]
    expected = np.full((num_images, num_patches), UNMATCHED)
    for (seed, of_seed), list_ in lists.items():
        for image, patch in list_[1:]:  # the first one is the seed patch
            expected[image, patch] = seed * num_patches + of_seed
    equal = float((np.asarray(joined.channel) == expected).mean())
    filtered = bench.time(
        {
            "ours": lambda: keep(seeds, images, joined),
            "theirs": lambda: literal.nominal_patches(theirs, lists, config=config),
        }
    )
    found = np.asarray(filtered.results["ours"]) > 0
    kept = filtered.results["theirs"]
    jaccard = jaccard_index(set(map(tuple, np.argwhere(found).tolist())), set(kept))
    return [
        compare(
            "association",
            associated.seconds["ours"],
            "the same, literally, in torch",
            associated.seconds["theirs"],
            agreement=f"{equal:.4%} of patches join the same channel",
            agrees=equal >= 0.998,
        ),
        compare(
            "channels",
            filtered.seconds["ours"],
            "the same, literally, in torch",
            filtered.seconds["theirs"],
            agreement=f"Jaccard index {jaccard:.4f} of nominal patches",
            agrees=jaccard >= 0.99,
        ),
    ]


def jaccard_index(a: set[Any], b: set[Any]) -> float:
    """How much two sets have in common."""
    return len(a & b) / max(len(a | b), 1)


def measures(bench: Bench) -> list[Row]:
    """AUROC of pixels against scikit-learn's, AUPRO against a loop over thresholds and regions."""
    maps, masks = _maps(num=16, side=224)
    rows = []
    if bench.peers.get("sklearn") is not None:
        import sklearn.metrics

        roc_auc: Any = sklearn.metrics.roc_auc_score
        functions: dict[str, Any] = {
            "ours": lambda: metrics.auroc(maps, masks),
            "theirs": lambda: roc_auc(masks.reshape(-1), maps.reshape(-1)),
        }
        timed = bench.time(functions)
        apart = abs(timed.results["ours"] - timed.results["theirs"])
        rows.append(
            compare(
                "auroc",
                timed.seconds["ours"],
                "scikit-learn",
                timed.seconds["theirs"],
                agreement=f"within {apart:.0e}",
                agrees=apart < 1e-9,
            )
        )
    timed = bench.time(
        {"ours": lambda: metrics.aupro(maps, masks), "theirs": lambda: literal_aupro(maps, masks)}
    )
    apart = abs(timed.results["ours"] - timed.results["theirs"])
    return [
        *rows,
        compare(
            "aupro",
            timed.seconds["ours"],
            "a loop over 200 thresholds and all regions",
            timed.seconds["theirs"],
            agreement=f"within {apart:.0e}; ours is exact",
            agrees=apart < 5e-3,
        ),
    ]


def _maps(*, num: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and squares that they are higher in, on every other image."""
    rng = np.random.default_rng(0)
    masks = np.zeros((num, side, side), bool)
    for image in masks[::2]:
        for _ in range(2):
            top, left = rng.integers(0, side - side // 5, 2)
            image[top : top + side // 6, left : left + side // 7] = True
    noise = rng.standard_normal(masks.shape).astype(np.float32)
    return noise + masks, masks


def literal_aupro(maps: np.ndarray, masks: np.ndarray, *, limit: float = 0.3) -> float:
    """AUPRO as it is usually computed: threshold after threshold, region after region."""
    labels = [skimage.measure.label(mask) for mask in masks]
    regions = [
        (image, label == number)
        for image, label in enumerate(labels)
        for number in range(1, int(label.max()) + 1)
    ]
    good = ~masks
    rates, overlaps = [0.0], [0.0]
    for threshold in np.linspace(maps.max(), maps.min(), 200):
        called = maps >= threshold
        rates.append(float(called[good].mean()))
        overlaps.append(float(np.mean([called[image][region].mean() for image, region in regions])))
    inside = [(x, y) for x, y in zip(rates, overlaps, strict=True) if x <= limit]
    x, y = map(list, zip(*inside, strict=True))
    x.append(limit)
    y.append(float(np.interp(limit, rates, overlaps)))
    return float(np.trapezoid(y, x)) / limit
