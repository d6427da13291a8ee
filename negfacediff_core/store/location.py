"""Opening the place of a store: a local folder or an fsspec URL, behind the same few verbs."""

from negfacediff_core.errors import StoreError
from negfacediff_core.store.place import Entry, Location
from negfacediff_core.store.place_local import LocalLocation
from negfacediff_core.store.place_remote import RemoteLocation, without_credentials

__all__ = ["Entry", "LocalLocation", "Location", "RemoteLocation", "locate", "without_credentials"]


def locate(url: str) -> Location:
    """Return the place of `url`: a path or `file://` is local, any other scheme goes through fsspec."""
    if not url.strip():
        raise StoreError("The store has no name: give a folder, or an address such as s3://bucket/faces.")
    if "://" in url and not url.startswith("file://"):
        return RemoteLocation(url)
    return LocalLocation(url.removeprefix("file://"))
