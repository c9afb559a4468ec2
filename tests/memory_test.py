"""Memory that is planned: what it is made of, that it is refused, and that it is kept to."""

import dataclasses
from typing import Any

import numpy as np
import pytest

import inreach_jax
from inreach_jax import Budget, InReachConfig, memory
from inreach_jax import bank as bank_lib
from inreach_jax.backbones import Backbone
from tests import tiny

ALL = InReachConfig(resize=(36, 36), crop=(32, 32), level_dim=None, num_seeds=5)
ROW = 4 * tiny.DIM


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone()


def plan(backbone: Backbone, **changes: Any) -> dict[str, memory.Item]:
    options: dict[str, Any] = {"config": ALL, "num_images": 20, "batch_size": 2} | changes
    return {item.what.split(",")[0]: item for item in memory.plan(backbone, **options)}


def test_items_follow_from_the_shapes(backbone: Backbone) -> None:
    items = plan(backbone)
    assert items["weights"].num_bytes == sum(
        np.asarray(x).nbytes for x in _leaves(backbone.variables)
    )
    assert items["descriptors"].num_bytes == 2 * 2 * tiny.NUM_PATCHES * ROW
    assert items["seeds"].num_bytes == 2 * 5 * tiny.NUM_PATCHES * ROW
    # A bank of all patches, padded to a multiple of 1024 rows.
    assert items["bank"].num_bytes == 2048 * ROW
    assert items["backbone"].num_bytes > 2 * 2 * 32 * 32 * 3 * 4


def test_an_index_is_counted(backbone: Backbone) -> None:
    rows = np.random.default_rng(0).normal(size=(2048, tiny.DIM)).astype(np.float32)
    bank = bank_lib.make_bank(rows, multiplicity=np.ones((32, 64), np.int32))
    index = inreach_jax.index_bank(bank).index
    held = sum(x.nbytes for x in _leaves(index))
    without, items = plan(backbone), plan(backbone, indexed=True)
    counted = items["bank with its index"].num_bytes - without["bank"].num_bytes
    assert 0.5 * counted < held < 1.5 * counted


def _leaves(tree: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(tree)


def test_options_make_it_smaller(backbone: Backbone) -> None:
    def of(what: str, **changes: Any) -> int:
        return plan(backbone, **changes)[what].num_bytes

    assert of("bank", num_images=2000) > 10 * of("bank")
    limited = ALL.replace(max_bank_rows=1000)
    assert of("bank", config=limited) == of("bank", config=limited, num_images=900) < of("bank")
    assert of("seeds", config=ALL.replace(num_seeds=3)) < of("seeds")
    assert of("descriptors", batch_size=1) < of("descriptors")


def test_descriptors_are_where_the_budget_says(backbone: Backbone) -> None:
    block = 2 * tiny.NUM_PATCHES * ROW
    budget = Budget(device=3 * block, host=2 * block, disk=block)
    config = tiny.CONFIG.replace(radius_filter="std")
    items = memory.plan(backbone, config=config, num_images=20, batch_size=2, budget=budget)
    kept = {x.place: x.num_bytes for x in items if x.option == "memory_budget"}
    assert kept == {"device": 3 * block, "host": 2 * block, "disk": block}
    unlimited = memory.plan(backbone, config=config, num_images=20, batch_size=2)
    (everything,) = (x for x in unlimited if x.option == "memory_budget")
    assert (everything.place, everything.num_bytes) == ("device", 10 * block)


def test_what_cannot_fit_is_refused(backbone: Backbone) -> None:
    items = memory.plan(backbone, config=ALL, num_images=20, batch_size=2)
    needed = memory.peak(items, place="device")
    memory.check(items, limit=needed)
    with pytest.raises(ValueError, match=r"are needed on each device.*: lower \w+, or use more"):
        memory.check(items, limit=needed - 1)
    huge = [dataclasses.replace(items[-1], what="wishes", num_bytes=2**60, option="hopes")]
    with pytest.raises(ValueError, match=r"most of it for wishes .*lower hopes"):
        memory.check(huge)
    available = memory.device_bytes()
    assert available is None or available > 2**24


def test_budget_is_in_bytes() -> None:
    with pytest.raises(ValueError, match=r"budget.host must be >= 0 bytes; got -1"):
        Budget(host=-1)
    places = Budget(device=10, host=25, disk=5).places(num_blocks=9, block_bytes=10)
    assert places == {"device": 1, "host": 2, "disk": 0, "nowhere": 6}
    assert Budget().keeps_all(num_blocks=9, block_bytes=10**12)
    assert not Budget(device=0).keeps_all(num_blocks=1, block_bytes=1)


def test_fit_takes_what_is_left_of_images(backbone: Backbone) -> None:
    """A budget of nothing reads images again and again, in any order, and says so to nobody."""
    read: list[int] = []

    class Images(list[np.ndarray]):
        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return super().__getitem__(index)

    images = Images(tiny.images(7, seed=2))
    config = tiny.CONFIG.replace(radius_filter="rms", max_channel_std=1.5, positional="on")
    inreach_jax.fit(backbone, images, config=config, batch_size=3, budget=Budget(device=0))
    assert read.count(6) == 3  # association, radii, bank
