"""Reading across units: one array or column over the first identities x replicates of a stage."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.store.layout import StageSpec
from negfacediff_core.store.shards import read_arrays, read_rows


def read_array(spec: StageSpec, name: str, identities: int, replicates: int) -> NDArray:
    """Return `(identities, replicates, *item)` of an array per replicate.

    Raises:
        StoreError: if a unit of that extent is not committed, or is damaged.
    """
    array = next(array for array in spec.arrays if array.name == name)
    values = np.empty((identities, replicates, *array.item), array.dtype)
    grid = replace(spec.grid, identities=identities, replicates=replicates)
    for unit in grid.units():
        part = read_arrays(spec, unit)[name]
        first, start = grid.identities_of(unit).start, grid.replicates_of(unit).start
        place = values[first : first + part.shape[0], start : start + part.shape[1]]
        place[:] = part[: place.shape[0], : place.shape[1]]
    return values


def read_column(spec: StageSpec, name: str, identities: int, replicates: int) -> NDArray:
    """Return a column of the rows as `(identities, replicates)`; errors as `read_array`."""
    grid = replace(spec.grid, identities=identities, replicates=replicates)
    parts = [read_rows(spec, unit) for unit in grid.units()]
    values = np.empty((identities, replicates), parts[0].column(name).to_numpy().dtype)
    for part in parts:
        identity, replicate = part.column("identity").to_numpy(), part.column("replicate").to_numpy()
        inside = (identity < identities) & (replicate < replicates)
        values[identity[inside], replicate[inside]] = part.column(name).to_numpy()[inside]
    return values
