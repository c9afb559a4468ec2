"""The bank: making it, and searching it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import inreach_jax
from experiments import peers
from experiments.benchmarks import measure
from experiments.benchmarks.measure import Bench, Row, compare
from inreach_jax import NominalBank, scoring
from inreach_jax import bank as bank_lib

CONFIGS: Mapping[str, inreach_jax.InReachConfig] = {
    # A dimension per channel of the network, 232 of Lite0; and the published 1024.
    "narrow": inreach_jax.PRESETS["channels"].replace(positional="off", level_dim=None),
    "wide": inreach_jax.PRESETS["paper"].replace(positional="off"),
}
BATCH = 16
TIES = 1e-5
"""Of a squared distance: rows that differ by less in it are as near as one another in float32."""

_score_patches = jax.jit(scoring.score_patches)


def whole_bank(blocks: list[jax.Array], num_images: int) -> NominalBank:
    """A bank of all patches of [B, P, D] blocks, searched for the nearest row."""
    num_patches, dim = blocks[0].shape[1:]
    count = num_images * num_patches
    capacity = bank_lib.bank_capacity(count)
    rows = jnp.zeros((capacity + blocks[0].shape[0] * num_patches, dim), jnp.float32)
    for number, block in enumerate(blocks):
        start = np.int32(number * blocks[0].shape[0] * num_patches)
        rows = _append_rows(rows, start, block, np.ones(block.shape[:2], bool))
    multiplicity = np.ones((num_images, num_patches), np.int32)
    return bank_lib.make_bank(rows[:capacity], multiplicity=multiplicity)


_append_rows = jax.jit(bank_lib.append_rows, donate_argnums=0)


def bank_build(bench: Bench) -> list[Row]:
    """A bank of all patches of the training images from their descriptors, against faiss."""
    faiss = bench.peers.get("faiss")
    if faiss is None:
        return []
    described = bench.descriptors("train", config=CONFIGS["narrow"])
    blocks, num = list(described.blocks), described.num_images
    on_host = [np.asarray(block) for block in blocks]

    def theirs() -> Any:
        flat = np.concatenate(on_host)[:num].reshape(-1, on_host[0].shape[-1])
        index = faiss.IndexFlatL2(flat.shape[1])
        index.add(flat - flat.mean(axis=0))
        return index

    timed = bench.time({"ours": lambda: whole_bank(blocks, num), "theirs": theirs})
    bank = timed.results["ours"]
    return [
        compare(
            f"bank_build_{bank.rows.shape[1]}",
            timed.seconds["ours"],
            "numpy mean, faiss IndexFlatL2.add",
            timed.seconds["theirs"],
            agreement=f"{int(bank.count):,} rows",
            agrees=int(bank.count) == timed.results["theirs"].ntotal,
        )
    ]


def bank_search(bench: Bench) -> list[Row]:
    """The nearest rows to all patches of 16 images in a bank of all training patches.

    Whatever is compared with faiss's IndexFlatL2 must find the same neighbours: at least 99.99% of
    the rows equal and the others as near, and distances within 1e-5.
    """
    return [row for config in CONFIGS.values() for row in _bank_search(bench, config)]


def _bank_search(bench: Bench, config: inreach_jax.InReachConfig) -> list[Row]:
    train = bench.descriptors("train", config=config)
    test = bench.descriptors("test", config=config)
    bank = whole_bank(list(train.blocks), train.num_images)
    images = test.first(min(BATCH, test.num_images))
    dim = images.shape[-1]
    queries = (np.asarray(images) - np.asarray(bank.centre)).reshape(-1, dim)
    rows = np.asarray(bank.rows[: int(bank.count)])
    # A way of searching is a bank: what it holds decides how `score_patches` goes about it.
    ways = {
        "brute force": bank,
        "indexed": inreach_jax.index_bank(bank),
        "indexed in bfloat16": inreach_jax.index_bank(bank, precision=lax.Precision.DEFAULT),
    }
    ours = {name: _compiled(bank, images) for name, bank in ways.items()}
    theirs = _searches(bench, queries, rows, all_of_them=dim < 512)
    if not theirs:
        return []
    timed = bench.time(ours | theirs, warm_up=False)
    seconds = timed.seconds
    reference = timed.results[next(iter(theirs))]  # faiss where it is there
    found = {way: agreement(queries, rows, *_flat(timed.results[way]), reference) for way in ours}
    return [
        compare(
            f"bank_search_{dim}, {way}, {len(rows):,} rows",
            seconds[way],
            peer,
            seconds[peer],
            agreement=found[way][0],
            agrees=found[way][1],
        )
        for way in ours
        for peer in theirs
    ]


def _compiled(bank: NominalBank, images: jax.Array) -> Callable[[], Any]:
    """A search that is compiled, and has been tried on one image."""
    jax.block_until_ready(_score_patches(bank, images[:1]))
    search = _score_patches.lower(bank, images).compile()
    return lambda: search(bank, images)


def _flat(result: tuple[jax.Array, jax.Array]) -> tuple[np.ndarray, np.ndarray]:
    value, index = (np.asarray(x).reshape(-1) for x in result)
    return value, index


def _searches(
    bench: Bench, queries: np.ndarray, rows: np.ndarray, *, all_of_them: bool
) -> dict[str, Any]:
    """Functions to the index of the nearest row, by the peer's name, of centred arrays.

    They have been tried on the queries of one image.
    """
    searches: dict[str, Callable[[], Any]] = {}
    size = -(-len(queries) // BATCH)
    faiss = bench.peers.get("faiss")
    if faiss is not None:
        index = faiss.IndexFlatL2(rows.shape[1])
        index.add(rows)
        index.search(queries[:size], 1)
        searches["faiss IndexFlatL2"] = lambda: index.search(queries, 1)[1][:, 0]
    if not all_of_them:
        return searches
    if bench.peers.get("torch") is not None:
        from experiments.benchmarks import literal

        of_queries, of_rows = literal.tensor(queries), literal.tensor(rows)

        def of_images() -> np.ndarray:  # the whole matrix would be gigabytes
            parts = of_queries.split(size)
            return np.concatenate(
                [measure.on_host(literal.nearest(part, of_rows)[1]) for part in parts]
            )

        literal.nearest(of_queries[:size], of_rows)
        searches["torch.cdist and min"] = of_images
    if bench.peers.get("sklearn") is not None:
        from sklearn.neighbors import NearestNeighbors

        model = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(rows)
        model.kneighbors(queries[:size])
        searches["scikit-learn, brute"] = lambda: model.kneighbors(queries)[1][:, 0]
    return searches


def agreement(
    queries: np.ndarray,
    rows: np.ndarray,
    value: np.ndarray,
    ours: np.ndarray,
    theirs: np.ndarray,
) -> tuple[str, bool]:
    """Whether a search found what another has found, distances taken anew in float64.

    Args:
      queries: [Q, D] float32.
      rows: [M, D] float32.
      value: [Q] float32, squared distances that are to be checked.
      ours: [Q], the rows that they are distances to.
      theirs: [Q], the rows that the other search has found.

    Returns:
      What can be said of it, and whether distances are right to `TIES`, at least 99.99% of the rows
      equal, and the others no farther than theirs.
    """
    exact = _exact(queries, rows, ours)
    equal = ours == theirs
    off = float((np.abs(value - exact) / np.maximum(exact, 1e-30)).max())
    there = _exact(queries[~equal], rows, theirs[~equal])
    farther = (exact[~equal] - there) / np.maximum(there, 1e-30)
    worst = float(farther.max(initial=0))
    text = f"{equal.mean():.4%} equal, the rest at most {worst:.0e} farther; distances {off:.0e}"
    return text, bool(off <= TIES and worst <= TIES and equal.mean() >= 0.9999)


def _exact(queries: np.ndarray, rows: np.ndarray, index: np.ndarray) -> np.ndarray:
    """[Q] float64, squared distances of the queries to the rows of an index."""
    parts = [
        np.square(queries[i : i + 4096].astype(np.float64) - rows[index[i : i + 4096]]).sum(axis=1)
        for i in range(0, len(queries), 4096)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def patchcore(bench: Bench) -> list[Row]:
    """PatchCore's scores of 16 images, its memory a tenth of the patches, against it in torch."""
    if bench.peers.get("torch") is None:
        return []
    from experiments.benchmarks import literal

    config = CONFIGS["narrow"]
    train = bench.descriptors("train", config=config)
    test = bench.descriptors("test", config=config)
    images = test.first(min(BATCH, test.num_images))
    whole = whole_bank(list(train.blocks), train.num_images)
    # Every tenth patch: which ones a memory holds does not matter to what searching it costs.
    kept = np.zeros(int(whole.count), np.int32)
    kept[::10] = 1
    of_memory = np.flatnonzero(kept)
    capacity = bank_lib.bank_capacity(len(of_memory))
    rows = np.zeros((capacity, images.shape[-1]), np.float32)
    rows[: len(of_memory)] = np.asarray(whole.rows)[of_memory] + np.asarray(whole.centre)
    bank = bank_lib.make_bank(jnp.asarray(rows), multiplicity=kept.reshape(train.num_images, -1))
    memory = peers.Memory(bank=bank, weight=jnp.ones(capacity, jnp.float32), neighbours=9)
    score = jax.jit(peers.score)
    of_rows = literal.tensor(bank.rows[: len(of_memory)])
    queries = literal.tensor(np.asarray(images) - np.asarray(bank.centre))

    def theirs() -> list[tuple[Any, float]]:
        return [literal.patchcore_score(image, of_rows, neighbours=9) for image in queries]

    timed = bench.time({"ours": lambda: score(memory, images), "theirs": theirs})
    of_images = np.array([image for _, image in timed.results["theirs"]])
    apart = np.abs(np.asarray(timed.results["ours"][1]) / of_images - 1)
    return [
        compare(
            f"patchcore_score, {len(of_memory):,} rows",
            timed.seconds["ours"],
            "PatchCore's scoring, literally, in torch",
            timed.seconds["theirs"],
            images=len(images),
            agreement=f"image scores within {apart.max():.0e}",
            agrees=bool(apart.max() < 1e-3),
        )
    ]
