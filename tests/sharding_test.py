"""The same numbers on one device and on many, whatever mesh they stand in."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import inreach_jax
from inreach_jax import Budget, InReachConfig, NominalBank, Scores, scoring, sharding
from inreach_jax.backbones import Backbone
from tests import tiny

Array = np.ndarray[Any, Any]

NUM_TRAIN, NUM_TEST, BATCH = 13, 5, 2
CONFIGS = {
    "all": InReachConfig(
        resize=(36, 36), crop=(32, 32), level_dim=None, num_seeds=5, smoothing_sigma=2.0
    ),
    "thinned": InReachConfig(
        resize=(36, 36), crop=(32, 32), level_dim=None, num_seeds=5, max_bank_rows=7 * NUM_TRAIN
    ),
    "channels": tiny.CONFIG,
    "paper": tiny.CONFIG.replace(radius_filter="rms", max_channel_std=1.5),
    "aligned": tiny.CONFIG.replace(alignment="rotation", radius_filter="std"),
}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone()


@pytest.fixture(scope="module")
def train() -> Array:
    return tiny.images(NUM_TRAIN, seed=2)


@pytest.fixture(scope="module")
def unseen() -> Array:
    return tiny.images(NUM_TEST, seed=3)


def mesh_of(*shape: int, kind: AxisType = AxisType.Auto) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    names = tuple("xyz"[: len(shape)])
    return Mesh(devices, names, axis_types=(kind,) * len(shape))


MESHES: dict[str, Callable[[], Mesh]] = {
    "2": lambda: mesh_of(2),
    "3": lambda: mesh_of(3),
    "8": lambda: mesh_of(8),
    "explicit 2x1x2": lambda: mesh_of(2, 1, 2, kind=AxisType.Explicit),
}


def used(bank: NominalBank) -> dict[str, Array]:
    """What a bank says, without its padding."""
    count = int(bank.count)
    return {
        **{name: np.asarray(getattr(bank, name))[:count] for name in ("rows", "image", "patch")},
        "multiplicity": np.asarray(bank.multiplicity)[:count],
        "centre": np.asarray(bank.centre),
        "span": np.asarray(-1 if bank.span is None else bank.span),
        "reference": np.zeros(0) if bank.reference is None else np.asarray(bank.reference),
    }


def joined(scores: Sequence[Scores]) -> Scores:
    return jax.tree.map(lambda *x: np.concatenate(x), *scores)


def assert_same(actual: Scores, expected: Scores) -> None:
    np.testing.assert_array_equal(actual.nearest, expected.nearest)
    for name in ("image", "maps", "patches"):
        np.testing.assert_allclose(
            getattr(actual, name), getattr(expected, name), rtol=1e-6, atol=1e-6, err_msg=name
        )


@pytest.fixture(scope="module")
def alone(backbone: Backbone, train: Array, unseen: Array) -> Callable[[str], Any]:
    """The bank and the scores of a single device."""
    found: dict[str, tuple[NominalBank, Scores, Scores]] = {}

    def of(name: str) -> tuple[NominalBank, Scores, Scores]:
        if name not in found:
            config = CONFIGS[name]
            bank = inreach_jax.fit(backbone, train, config=config, batch_size=BATCH)
            kwargs: Any = {"config": config, "batch_size": BATCH}
            found[name] = (
                bank,
                joined(list(inreach_jax.score_images(backbone, bank, unseen, **kwargs))),
                joined(
                    list(inreach_jax.score_images(backbone, bank, train, leave_out=True, **kwargs))
                ),
            )
        return found[name]

    return of


@pytest.mark.parametrize("mesh", list(MESHES))
@pytest.mark.parametrize("name", ["all", "paper"])
def test_a_mesh_changes_nothing(
    name: str, mesh: str, backbone: Backbone, train: Array, unseen: Array, alone: Any
) -> None:
    bank, scores, left_out = alone(name)
    of_mesh, config = MESHES[mesh](), CONFIGS[name]
    sharded = inreach_jax.fit(backbone, train, config=config, batch_size=BATCH, mesh=of_mesh)
    jax.tree.map(np.testing.assert_array_equal, used(sharded), used(bank))
    shards = sharded.rows.addressable_shards
    assert len(shards) == of_mesh.size
    assert shards[0].data.shape[0] * of_mesh.size == sharded.rows.shape[0]
    kwargs: Any = {"config": config, "batch_size": BATCH, "mesh": of_mesh}
    for of_bank in (sharded, bank):
        found = joined(list(inreach_jax.score_images(backbone, of_bank, unseen, **kwargs)))
        assert_same(found, scores)
    found = joined(
        list(inreach_jax.score_images(backbone, sharded, train, leave_out=True, **kwargs))
    )
    assert_same(found, left_out)


@pytest.mark.parametrize("name", ["thinned", "channels", "aligned"])
def test_other_options_do_not_see_the_mesh(
    name: str, backbone: Backbone, train: Array, unseen: Array, alone: Any
) -> None:
    bank, scores, _ = alone(name)
    mesh, config = mesh_of(4), CONFIGS[name]
    sharded = inreach_jax.fit(backbone, train, config=config, batch_size=BATCH, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, used(sharded), used(bank))
    kwargs: Any = {"config": config, "batch_size": BATCH, "mesh": mesh}
    assert_same(joined(list(inreach_jax.score_images(backbone, sharded, unseen, **kwargs))), scores)


@pytest.mark.parametrize(
    ("name", "mesh"), [("all", "3"), ("all", "explicit 2x1x2"), ("paper", "explicit 2x1x2")]
)
def test_score_fn_on_a_users_mesh(
    name: str, mesh: str, backbone: Backbone, unseen: Array, alone: Any
) -> None:
    bank, scores, _ = alone(name)
    of_mesh, config = MESHES[mesh](), CONFIGS[name]
    score = jax.jit(inreach_jax.make_score_fn(backbone, config, mesh=of_mesh))
    # As it came, and placed beforehand; with the mesh set, as it is inside a larger program.
    assert_same(joined([score(backbone.variables, bank, jnp.asarray(unseen))]), scores)
    placed = scoring.shard_bank(bank, mesh=of_mesh)
    whole = NamedSharding(of_mesh, PartitionSpec())
    variables = jax.device_put(backbone.variables, whole)
    with jax.set_mesh(of_mesh):
        found = score(variables, placed, jax.device_put(unseen, whole))
    assert_same(joined([found]), scores)


def test_a_mesh_that_is_set_is_no_hindrance(
    backbone: Backbone, train: Array, unseen: Array, alone: Any
) -> None:
    bank, scores, _ = alone("all")
    mesh = mesh_of(2, 2, kind=AxisType.Explicit)
    with jax.set_mesh(mesh):
        sharded = inreach_jax.fit(
            backbone, train, config=CONFIGS["all"], batch_size=BATCH, mesh=mesh
        )
        blocks = inreach_jax.score_images(
            backbone, sharded, unseen, config=CONFIGS["all"], batch_size=BATCH, mesh=mesh
        )
        found = joined(list(blocks))
    jax.tree.map(np.testing.assert_array_equal, used(sharded), used(bank))
    assert_same(found, scores)


def test_descriptor_sets_are_sharded(
    backbone: Backbone, train: Array, unseen: Array, alone: Any
) -> None:
    bank, scores, left_out = alone("all")
    kwargs: Any = {"config": CONFIGS["all"], "batch_size": BATCH, "mesh": mesh_of(4)}
    described = inreach_jax.extract(backbone, train, **kwargs)
    assert described.blocks[0].shape[0] == 4 * BATCH
    sharded = inreach_jax.fit_descriptors(described, config=CONFIGS["all"])
    jax.tree.map(np.testing.assert_array_equal, used(sharded), used(bank))
    found = inreach_jax.score_descriptor_set(
        sharded, described, config=CONFIGS["all"], leave_out=True
    )
    assert_same(joined(list(found)), left_out)
    tested = inreach_jax.extract(backbone, unseen, **kwargs)
    found = inreach_jax.score_descriptor_set(sharded, tested, config=CONFIGS["all"])
    assert_same(joined(list(found)), scores)


BLOCK = BATCH * tiny.NUM_PATCHES * tiny.DIM * 4


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    "budget",
    [
        Budget(device=0),
        Budget(device=BLOCK, host=2 * BLOCK, disk=BLOCK),
        Budget(device=0, host=100 * BLOCK),
        Budget(device=0, disk=100 * BLOCK),
    ],
)
def test_what_is_kept_where_changes_nothing(
    budget: Budget, shards: int, backbone: Backbone, train: Array, alone: Any, tmp_path: Any
) -> None:
    bank, _, _ = alone("paper")
    budget = Budget(device=budget.device, host=budget.host, disk=budget.disk, directory=tmp_path)
    other = inreach_jax.fit(
        backbone,
        train,
        config=CONFIGS["paper"],
        batch_size=BATCH,
        mesh=None if shards == 1 else mesh_of(shards),
        budget=budget,
    )
    jax.tree.map(np.testing.assert_array_equal, used(other), used(bank))
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_nothing_is_transferred_behind_the_back(
    backbone: Backbone, train: Array, unseen: Array
) -> None:
    for config in (CONFIGS["all"], CONFIGS["paper"]):
        for mesh in (None, mesh_of(2)):
            kwargs: Any = {"config": config, "batch_size": BATCH, "mesh": mesh}
            bank = inreach_jax.fit(backbone, train, **kwargs)
            with jax.transfer_guard("disallow"):
                described = inreach_jax.fit(backbone, train, **kwargs)
                list(inreach_jax.score_images(backbone, described, unseen, **kwargs))
            jax.tree.map(np.testing.assert_array_equal, used(described), used(bank))


def test_exchange_undoes_gather() -> None:
    mesh = mesh_of(2, 2)
    axes = sharding.mesh_axes(mesh)
    x = jnp.arange(24.0).reshape(8, 3)

    def of_shard(mine: jax.Array) -> jax.Array:
        everyone = sharding.gather(mine, axes)
        return sharding.exchange(everyone[None], axes)[lax_shard(axes)]

    def lax_shard(axes: sharding.Axes) -> jax.Array:
        return sharding.first_row(1, axes)

    split = sharding.split(mesh)
    again = sharding.shard_map(of_shard, mesh=mesh, in_specs=(split,), out_specs=split)(x)
    np.testing.assert_array_equal(again, x)
