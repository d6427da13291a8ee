"""Places that hold a store: local folders and fsspec URLs, and what goes wrong with them."""

import sys
import threading
import time

import pytest
from fsspec.registry import _registry

from negfacediff_core.errors import StoreError
from negfacediff_core.store.location import locate


def test_places_that_cannot_be_written_say_so(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="a file stands where a folder is needed"):
        locate(str(tmp_path / "file")).check_writable()
    with pytest.raises(StoreError, match=r"cannot read .*nothing.json: it is missing"):
        locate(str(tmp_path)).read_bytes("nothing.json")
    with pytest.raises(StoreError, match=r"cannot open nowhere://x"):
        locate("nowhere://x")


def test_an_address_whose_client_is_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    monkeypatch.delitem(_registry, "s3", raising=False)  # nor used before
    with pytest.raises(StoreError, match=r"cannot open s3://bucket/x: Install s3fs .*negfacediff\[s3\]"):
        locate("s3://bucket/x")


@pytest.mark.parametrize(
    "number, reason", [(28, "disk is full"), (30, "read-only"), (5, "Input/output error")]
)
def test_a_failing_disk_is_explained_and_leaves_nothing(number, reason, tmp_path, monkeypatch):
    place = locate(str(tmp_path))
    place.write_atomic("file", b"old")

    def fail(handle):
        raise OSError(number, "Input/output error")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(StoreError, match=reason):
        place.write_atomic("file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert place.read_bytes("file") == b"old"


def test_a_lock_has_one_holder(tmp_path):
    order = []
    place = locate(str(tmp_path))

    def second():
        with place.lock("stage"):
            order.append("second")

    with place.lock("stage"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
