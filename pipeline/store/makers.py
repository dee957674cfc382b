"""Who made a store's rows: the versions and the device on which a row's last bits depend, beside what the config says.

A harvest that was stopped and goes on after `pip upgrade torch`, or on another GPU, would put rows of two kinds into one store.
It is refused, or asked for (`mixed`), and then the root says who: `made_by`, FORMAT.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.base.errors import DamagedError, MismatchError, StoreError
from pipeline.store.reader import Store
from pipeline.store.root import write_root

Maker = Mapping[str, str]
"""Library → version, and `device`: the name of the GPU, or cpu."""


def require_makers(store: Store, makers: Sequence[Maker], *, mixed: bool, also: Sequence[Maker] = ()) -> None:
    """Raise MismatchError, unless `mixed`, where rows of these makers would stand beside rows of another: of those on record, and
    `also` of these.

    A store where no shard is committed yet takes any one maker. One that does not say who made its rows takes none.
    """
    if mixed:
        return
    others = [maker for maker in makers[1:] if maker != makers[0]]
    if others:
        raise MismatchError(
            f"{store.where}: the processes of this harvest differ ({difference(makers[0], others[0])}), so its rows would in "
            "their last bits; run it on equal ones, or give --mixed, which the store records"
        )
    made_by = [*(store.made_by or ()), *also]
    if any_committed(store) and makers[0] not in made_by:
        there = made_by[-1] if made_by else dict.fromkeys(makers[0], "unknown")
        raise MismatchError(
            f"{store.where}: its rows were made by others ({difference(there, makers[0])}), so further ones would differ in "
            "their last bits; go back to those, harvest to another path, or give --mixed, which the store records"
        )


def require_extender(path: str, n_train: int, makers: Sequence[Maker], *, mixed: bool) -> None:
    """Before a store is extended, for which a ragged last shard is given up: raises as `require_makers` where it is one."""
    try:
        store = Store.load(path)
    except (StoreError, DamagedError):
        return  # there is none, or whoever goes on with it will say so
    if n_train > store.train.n_sequences:
        require_makers(store, makers, mixed=mixed)


def record_makers(store: Store, makers: Sequence[Maker], *, mixed: bool) -> None:
    """Write down who makes the shards that are missing, before the first of them is made. Raises as `require_makers`."""
    require_makers(store, makers, mixed=mixed)
    made_by = (store.made_by or [dict.fromkeys(makers[0], "unknown")]) if any_committed(store) else []
    for maker in makers:
        if maker not in made_by:
            made_by.append(dict(maker))
    if made_by != store.made_by:
        write_root(store.files, store.attributes | {"made_by": made_by})


def add_makers(store: Store, makers: Sequence[Maker], *, mixed: bool) -> None:
    """Write down who made a store's shards in parts, as they said. Raises MismatchError, unless `mixed`, for unlike ones."""
    made_by = [dict(maker) for maker in store.made_by or ()]
    made_by += [dict(maker) for maker in makers if maker not in made_by]
    if len(made_by) > 1 and not mixed and made_by != store.made_by:
        raise MismatchError(
            f"{store.where}: its parts were made by others ({difference(made_by[0], made_by[1])}), so their rows differ in their "
            "last bits; run the odd ones again with --repair, or give --mixed, which the store records"
        )
    if made_by != store.made_by:
        write_root(store.files, store.attributes | {"made_by": made_by})


def difference(there: Maker, here: Maker) -> str:
    """What tells two makers apart, in words."""
    names = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    return "; ".join(f"{name}: {there.get(name, 'none')}, here {here.get(name, 'none')}" for name in names)


def any_committed(store: Store) -> bool:
    """Whether a shard is there."""
    return any(split.has_record(k) for split in store.splits for k in range(split.n_shards))
