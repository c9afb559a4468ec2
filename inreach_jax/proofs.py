"""What proves that a search by bounds has missed nothing, and what is done where it does not.

Whoever searches by bounds looks at the distances of a few rows in full. These are the nearest if
what bounds the others exceeds the distance that decides, and what rounding may have added to it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from inreach_jax import distances

UNIT = 2.0**-23
"""Twice the rounding of float32, for products that are nearly as precise."""

_STEPS = 32
"""Roundings besides those of the sums over dimensions, and some to spare."""

Slots = tuple[jax.Array, jax.Array]
"""Squared distances [T, G] and rows [T, G] of the nearest images so far, ascending."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """What the queries of one call share. M' is M, or more where there is padding.

    Attributes:
      rows: [M, D] float32.
      heads: [M', E] float32 or bfloat16, what stands for the rows in products.
      norm: [M'] float32, squared, of the heads and `lowered`; infinite where a row is no neighbour.
      loose: [] float32, how far a head may be off.
      valid: [M'] bool, rows that may be neighbours; None for all.
      row_label: [M'] int32, None where there are no labels.
      per_image: Consecutive rows that make an image; 0 where all rows are as one.
      span: [] int32, how many images decide; None for `num`.
      num: T, images that are told apart.
      same_image: Share of the distance to the second image within which the first does not count.
      full: Queries that are searched in full together.
    """

    rows: jax.Array
    heads: jax.Array
    norm: jax.Array
    loose: jax.Array
    valid: jax.Array | None
    row_label: jax.Array | None
    per_image: int
    span: jax.Array | None
    num: int
    same_image: float
    full: int

    @property
    def precision(self) -> lax.Precision:
        """Of products of heads: at any, what is multiplied is exact."""
        whole = self.heads.dtype == jnp.float32
        return lax.Precision.HIGHEST if whole else lax.Precision.DEFAULT

    def nothing(self, *, size: int, like: jax.Array) -> Slots:
        """Slots of queries that nothing is known of.

        Args:
          size: G.
          like: As for `fill`.

        Returns:
          Infinite distances [T, G], and rows.
        """
        shape = (self.num, size)
        return (
            fill(like, shape=shape, value=jnp.inf, dtype=jnp.float32),
            fill(like, shape=shape, value=0, dtype=jnp.int32),
        )


def look_at(
    search: Search, queries: jax.Array, row: jax.Array, *, label: jax.Array | None, slots: Slots
) -> Slots:
    """Computes the distances [G, D] to rows [n, G], and keeps the lowest.

    Args:
      search: What the queries share.
      queries: [G, D] float32.
      row: [n, G] int32, >= 0. Those past the last row do not count, nor do those out of use.
      label: [G] int32, whose rows are no neighbours; None where there are no labels.
      slots: The nearest images so far.

    Returns:
      The nearest images, these rows among them.
    """
    num_rows = search.rows.shape[0]
    usable = row < num_rows
    if search.valid is not None:
        usable &= jnp.take(search.valid, row)
    if label is not None and search.row_label is not None:
        usable &= jnp.take(search.row_label, row) != label[None, :]
    row = jnp.minimum(row, num_rows - 1)
    there = jnp.take(search.rows, row.T, axis=0)
    value = distances.squared_distance(jnp.broadcast_to(queries[:, None], there.shape), there)
    value = jnp.concatenate([slots[0], jnp.where(usable, value.T, jnp.inf)])
    row = jnp.concatenate([slots[1], row])
    return nearest_of(value, row, per_image=search.per_image, num=search.num)


def lowered(sq_norm: jax.Array, *, width: int) -> jax.Array:
    """What stands for a squared norm, so that |a|^2 + |b|^2 - 2ab is never above |a - b|^2.

    Sums over `width` numbers are off by `width / 2` units of what is summed up at most, in any
    order, if they are rounded to nearest, or if what is cut off comes after two products each, as
    on matrix units. Of |a|^2 + |b|^2 that is half from the norms, and half from 2ab, which is no
    more.

    Args:
      sq_norm: [...] float32, |a|^2.
      width: Numbers that a has.

    Returns:
      [...] float32, less by what rounding may add to the distance.
    """
    return sq_norm * (1 - (width + _STEPS) * UNIT)


def threshold(search: Search, *, slots: Slots, loose: jax.Array) -> jax.Array:
    """What the squared distance of two heads must exceed, so that their rows do not count.

    Args:
      search: What the queries share.
      slots: The nearest images so far, of which some decide.
      loose: [G] float32, by how much the queries' heads may be off.

    Returns:
      [G] float32: what decides, and what rounding may add to distances and to heads.
    """
    decides = _deciding(search, slots) * (1 + (search.rows.shape[1] + _STEPS) * UNIT)
    return jnp.square(jnp.sqrt(decides) + (loose + search.loose))


def _deciding(search: Search, slots: Slots) -> jax.Array:
    """[G]: images that are farther than this do not change the answer."""
    value, _ = slots
    if search.span is None:
        return value[-1]
    # If not even the nearest other row that was seen makes the first image the same, none does.
    same = value[0] < search.same_image**2 * value[1]
    last = search.span + same.astype(jnp.int32)
    place = jnp.arange(1, search.num + 1, dtype=jnp.int32)[:, None]
    return jnp.min(jnp.where(place == last[None], value, jnp.inf), axis=0)


def nearest_of(
    value: jax.Array, row: jax.Array, *, per_image: int, num: int
) -> tuple[jax.Array, jax.Array]:
    """The nearest row of each of the nearest images, among some.

    Args:
      value: [n, Q] float32, squared distances.
      row: [n, Q] int32, of which rows.
      per_image: Consecutive rows that make an image; 0 where all rows are as one, and num is 1.
      num: T, images that are looked for.

    Returns:
      [T, Q] float32, ascending, infinite where there are not as many; [T, Q] int32, the lowest rows
      on ties.
    """
    values, rows = [], []
    for _ in range(num):
        lowest = jnp.min(value, axis=0)
        attains = value == lowest[None]
        # Where NaN attains no minimum: any row.
        index = jnp.min(jnp.where(attains, row, jnp.max(row, axis=0, keepdims=True)), axis=0)
        values.append(lowest)
        rows.append(index)
        if per_image:
            value = jnp.where(row // per_image == index[None] // per_image, jnp.inf, value)
    return jnp.stack(values), jnp.stack(rows)


def complete(
    search: Search,
    queries: jax.Array,
    opened: jax.Array,
    *,
    label: jax.Array | None,
    slots: Slots,
    tile: int | None,
) -> Slots:
    """Searches in full what is not proved, in groups.

    Args:
      search: What the queries share.
      queries: [Q, D] float32.
      opened: [Q] int32, negative where nothing is proved.
      label: [Q] int32, or None.
      slots: What was found.
      tile: Rows per product; None for what suits the device.

    Returns:
      The slots, all of them right.
    """
    num = queries.shape[0]
    size = min(search.full, num)
    order = jnp.argsort(opened >= 0).astype(jnp.int32)
    num_open = jnp.sum(opened < 0, dtype=jnp.int32)

    def of_group(carry: tuple[jax.Array, Slots]) -> tuple[jax.Array, Slots]:
        i, slots = carry
        who = lax.dynamic_slice_in_dim(order, jnp.minimum(i * size, num - size), size)
        of_q = None if label is None else jnp.take(label, who)
        value, row = _nearest_in_full(search, jnp.take(queries, who, axis=0), of_q, tile=tile)
        kept = jnp.take(opened >= 0, who)
        return i + 1, put(who, of=slots, part=(value, row), kept=kept)

    _, slots = lax.while_loop(
        lambda carry: carry[0] * size < num_open, of_group, (jnp.zeros_like(num_open), slots)
    )
    return slots


def _nearest_in_full(
    search: Search, queries: jax.Array, label: jax.Array | None, *, tile: int | None
) -> Slots:
    """The nearest images by all products, at full precision."""
    num_rows = search.rows.shape[0]
    valid, row_label = (
        None if x is None else x[:num_rows] for x in (search.valid, search.row_label)
    )
    if not search.per_image:
        labels = None if label is None or row_label is None else (label, row_label)
        value, row = distances.nearest(queries, search.rows, valid=valid, labels=labels, tile=tile)
        return value[None], row[None]
    each = (-1, search.per_image)
    value, row = distances.nearest_each(
        queries,
        search.rows.reshape(*each, search.rows.shape[1]),
        valid=None if valid is None else valid.reshape(each),
        tile=tile,
    )
    row += search.per_image * jnp.arange(len(row), dtype=jnp.int32)[:, None]
    if label is not None and row_label is not None:
        own = row_label.reshape(each)[:, :1] == label[None, :]
        value = jnp.where(own, jnp.inf, value)
    unknown = jnp.any(jnp.isnan(value), axis=0)  # must show, wherever it ranks
    negated, image = lax.top_k(-value.T, min(search.num, len(value)))
    row = jnp.take_along_axis(row.T, image, axis=1)
    value = jnp.where(unknown[:, None], jnp.nan, -negated)
    missing = ((0, 0), (0, search.num - value.shape[1]))
    value = jnp.pad(value, missing, constant_values=jnp.inf)
    return value.T, jnp.pad(row, missing).T


def in_chunks(
    search: Search,
    queries: jax.Array,
    *,
    prove: Callable[[jax.Array, jax.Array | None], tuple[Slots, jax.Array]],
    label: jax.Array | None,
    limit: int,
    tile: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A chunk of queries at a time, and those that are not proved then in full.

    Args:
      search: What the queries share.
      queries: [Q, D] float32.
      prove: From a chunk [G, D] and its labels [G] int32, or None, to its slots, and how many
        blocks were opened for each [G] int32, negative where nothing is proved.
      label: [Q] int32, or None.
      limit: Most queries of a chunk.
      tile: As for `complete`.

    Returns:
      As `pruning.nearest`: squared distances [Q, T], rows [Q, T], and blocks opened [Q].
    """
    num = queries.shape[0]
    num_chunks = -(-num // limit)
    chunk = -(-num // num_chunks)

    def of_chunk(i: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        start = jnp.minimum(i * chunk, num - chunk)

        def part(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, start, chunk)

        (value, row), opened = prove(part(queries), None if label is None else part(label))
        return tuple(
            lax.dynamic_update_slice_in_dim(whole, new, start, axis=0)
            for whole, new in zip(found, (value.T, row.T, opened), strict=True)
        )

    like = queries[0, 0] + search.loose
    if label is not None and search.row_label is not None:
        like = jnp.where(label[0] == search.row_label[0], like, 0)
    init = (
        fill(like, shape=(num, search.num), value=jnp.inf, dtype=jnp.float32),
        fill(like, shape=(num, search.num), value=0, dtype=jnp.int32),
        fill(like, shape=(num,), value=0, dtype=jnp.int32),
    )
    value, row, opened = lax.fori_loop(0, num_chunks, of_chunk, init)
    value, row = complete(search, queries, opened, label=label, slots=(value.T, row.T), tile=tile)
    return value.T, row.T, opened


def masked(
    *, heads: tuple[jax.Array, jax.Array, jax.Array], valid: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Heads of zeros for rows that are out of use.

    Args:
      heads: [M, E], their squared norms [M], and by how much they are off [M].
      valid: [M] bool; None for all.

    Returns:
      The same, of which those out of use are zero.
    """
    if valid is None:
        return heads
    short, norm, loose = heads
    return (
        jnp.where(valid[:, None], short, 0),
        jnp.where(valid, norm, 0),
        jnp.where(valid, loose, 0),
    )


def columns(who: jax.Array, *, of: Slots) -> Slots:
    """The slots of some queries.

    Args:
      who: [G] int32, which.
      of: Of all.

    Returns:
      Those of G.
    """
    return jnp.take(of[0], who, axis=1), jnp.take(of[1], who, axis=1)


def put(who: jax.Array, *, of: Slots, part: Slots, kept: jax.Array | None = None) -> Slots:
    """Slots with those of some queries replaced.

    Args:
      who: [G] int32, which.
      of: Of all.
      part: In place of theirs.
      kept: [G] bool, where they stay as they are; None for nowhere.

    Returns:
      Those of all.
    """
    if kept is not None:
        old = columns(who, of=of)
        part = (
            jnp.where(kept[None, :], old[0], part[0]),
            jnp.where(kept[None, :], old[1], part[1]),
        )
    return of[0].at[:, who].set(part[0]), of[1].at[:, who].set(part[1])


def fill(like: jax.Array, *, shape: tuple[int, ...], value: Any, dtype: Any) -> jax.Array:
    """A constant that loops under `jax.shard_map` accept as a carry.

    Args:
      like: [], what varies over every mesh axis over which anything that the loop reads varies.
      shape: Of the constant.
      value: Of each entry.
      dtype: Of the constant.

    Returns:
      An array.
    """
    return jnp.broadcast_to(jnp.full_like(like, value, dtype=dtype), shape)


def largest(loose: jax.Array) -> jax.Array:
    """The most that heads may be off.

    Args:
      loose: Any shape, float32.

    Returns:
      The maximum [] float32; infinite where one is NaN.
    """
    return jnp.where(jnp.any(jnp.isnan(loose)), jnp.inf, jnp.max(loose))
