"""What builds leave in a store, wherever it is."""

from negfacediff_core.store.location import locate


def results(store):
    """Every file that holds results, by path: none that is hidden, and no records, runs and logs."""
    place = locate(str(store))
    paths = [entry.path for entry in place.walk("")]
    return {
        path: place.read_bytes(path)
        for path in paths
        if not {"done", "runs", "logs"} & set(path.split("/")) and path.rsplit("/", 1)[-1][0] != "."
    }
