"""Reading a complete gallery: whom it shows, and its faces in blocks that are searched."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.contexts.vectors import normalise
from negfacediff_core.evaluation.leakage import Block
from negfacediff_core.store.layout import StageSpec, Unit, read_spec
from negfacediff_core.store.shards import read_arrays, read_rows

# Units that are searched together, and such parts that a process keeps: at width 512, 16 of 268 MB each.
# A larger gallery is read again for every unit of generated images.
UNITS, KEPT = 512, 16

_loading = threading.Lock()


class People(NamedTuple):
    """Whom a gallery shows: by row the `person` `(M,)` int64, -1 where no face was found, and the names of
    the images.
    """

    person: NDArray[np.int64]
    names: tuple[str, ...]


@dataclass(frozen=True)
class StoredGallery:
    """A complete gallery as the recogniser in this role sees it: an iterable of blocks of its faces."""

    spec: StageSpec
    role: str

    def __len__(self) -> int:
        return -(-len(units_of(self.spec)) // UNITS)

    def __iter__(self) -> Iterator[Block]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> Block:
        with _loading:  # threads that start together would otherwise each read it
            return _stored(self.spec.store, self.spec.fingerprint, self.role, number)


def people_of(spec: StageSpec) -> People:
    """Return whom a complete gallery shows; StoreError if a unit is not committed or damaged."""
    return _people(spec.store, spec.fingerprint)


def units_of(spec: StageSpec) -> list[Unit]:
    """All units of a gallery, whose extent is its limit."""
    return [Unit(block, 0) for block in range(-(-(spec.grid.limit or 0) // spec.grid.block_identities))]


@lru_cache(maxsize=2)
def _people(store: str, digest: str) -> People:
    spec = read_spec(store, "gallery", digest)
    parts = [read_rows(spec, unit) for unit in units_of(spec)]
    person = np.concatenate([part.column("person").to_numpy() for part in parts])
    seen = np.concatenate([np.array(part.column("status").to_pylist()) == "ok" for part in parts])
    names = chain.from_iterable(part.column("name").to_pylist() for part in parts)
    return People(np.where(seen, person, -1), tuple(names))


@lru_cache(maxsize=KEPT)
def _stored(store: str, digest: str, role: str, number: int) -> Block:
    spec = read_spec(store, "gallery", digest)
    rows, vectors = [], []
    for unit in units_of(spec)[number * UNITS : (number + 1) * UNITS]:
        numbers = np.array(spec.grid.identities_of(unit), np.int64)
        seen = np.array(read_rows(spec, unit).column("status").to_pylist()) == "ok"
        rows.append(numbers[seen])
        vectors.append(normalise(read_arrays(spec, unit)[f"{role}_embedding"][seen]))
    return Block.of(np.concatenate(rows), np.concatenate(vectors))
