"""`negfacediff whose`: copies of stored images are found, whatever was done to them within reason."""

import io
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from flows.cli import main
from negfacediff_core.export.perceptual import BITS, FORM, distances, image_hash
from negfacediff_core.stages import origin, unit_hashes
from negfacediff_core.stages.origin import ALIKE, find_origins
from negfacediff_core.store.layout import ArraySpec, Grid, StageSpec
from negfacediff_core.store.runs import write_run
from negfacediff_core.store.shards import commit, prepare
from negfacediff_core.store.tables import rows_of

COLUMNS = (("identity", "int64"), ("replicate", "int64"), ("status", "string"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache folder, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "negfacediff" / "hashes"


def pictures(count, seed):
    """Smooth pictures `(count, 64, 64, 3)` with a little noise."""
    random = np.random.default_rng(seed)
    coarse = random.uniform(0, 255, (count, 24, 24, 3)).astype(np.uint8)
    smooth = np.stack([np.asarray(Image.fromarray(one).resize((64, 64), Image.BICUBIC)) for one in coarse])
    return (smooth + random.normal(0, 2, smooth.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A store with images of 4 identities x 3, of which the last one failed; and the images `(4, 3, ...)`."""
    store = tmp_path_factory.mktemp("whose") / "store"
    arrays = (ArraySpec("image", "u1", (64, 64, 3)),)
    spec = StageSpec(str(store), "samples", 1, {}, {}, Grid(4, 3, 2, 3), arrays=arrays, columns=COLUMNS)
    prepare(spec)
    images = pictures(12, seed=0).reshape(4, 3, 64, 64, 3)
    images[3, 2] = 0
    for unit in spec.grid.units():
        identities = np.array(spec.grid.identities_of(unit))
        status = ["ok"] * 6 if unit.identity_block == 0 else [*["ok"] * 5, "failed"]
        rows = rows_of(
            spec, {"identity": identities.repeat(3), "replicate": np.tile(range(3), 2), "status": status}
        )
        commit(
            spec,
            unit,
            arrays={"image": images[identities]},
            rows=rows,
            started=time.time(),
            seconds={},
            device="cpu",
        )
    place = {"fingerprint": spec.fingerprint, "identities": 4, "replicates": 3}
    write_run(str(store), "faces", {"stages": {"samples": place}})
    write_run(str(store), "few", {"stages": {"samples": {**place, "identities": 1}}})
    return store, images


def find(store, *images):
    """The origins of images."""
    hashes = np.concatenate([image_hash(image[None]) for image in images])
    return find_origins(str(store), hashes, images.__getitem__, threads=1, progress=lambda *_: None)


def compressed(image, quality):
    """An image as JPEG of a quality gives it back."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def resized(image, size):
    """An image at another size."""
    return np.asarray(Image.fromarray(image).resize(size, Image.LANCZOS))


def test_the_same_pixels_are_found_with_their_place_and_runs(stored):
    store, images = stored
    first, last = find(store, images[0, 1], images[3, 1])
    assert (first.exact, first.distance, first.identity, first.replicate) == (True, 0, 0, 1)
    assert first.runs == ("faces", "few") and last.runs == ("faces",)
    assert (last.identity, last.replicate) == (3, 1) and first.stage.startswith("samples/")


@pytest.mark.parametrize(
    "change",
    [
        lambda image: compressed(image, 75),
        lambda image: compressed(image, 50),
        lambda image: resized(image, (32, 32)),
        lambda image: resized(image, (100, 90)),
        lambda image: compressed(resized(image, (128, 128)), 50),
    ],
)
def test_recompressed_and_resized_copies_are_found(stored, change):
    store, images = stored
    copies = [change(image) for image in images.reshape(12, 64, 64, 3)[:11]]
    found = find(store, *copies)
    assert [(one.identity, one.replicate) for one in found] == [divmod(number, 3) for number in range(11)]
    assert all(one.found and not one.exact for one in found)


def test_other_images_and_what_failed_are_not_found(stored):
    store, images = stored
    strangers = find(store, *pictures(20, seed=1), images[3, 2])
    assert not any(one.found for one in strangers)
    assert min(one.distance for one in strangers[:-1]) > 2 * ALIKE


def test_equal_hashes_alone_are_not_the_same_pixels(stored):
    store, images = stored
    changed = images[1, 1].copy()
    changed[0, 0, 0] ^= 1
    (found,) = find(store, changed)
    assert found.found and not found.exact and (found.identity, found.replicate) == (1, 1)


def test_hashes_hold_255_bits_whatever_the_size():
    images = pictures(4, seed=2)
    hashes = image_hash(images)
    assert hashes.shape == (4, 32) and not (hashes[:, -1] & 1).any() and BITS == 255
    apart = distances(hashes, image_hash(images[:, :, ::-1]))
    assert apart.shape == (4, 4) and (np.diag(apart) > 60).all()
    bits = np.unpackbits(hashes, axis=1)
    assert (distances(hashes, hashes) == (bits[:, None] != bits).sum(axis=2)).all()


def test_the_form_of_hashes_stays():
    """Hashes are kept: whoever changes them counts FORM up, and writes these anew."""
    noise = np.random.default_rng(0).integers(0, 256, (1, 40, 48, 3), dtype=np.uint8)
    assert FORM == 1
    known = image_hash(noise).tobytes().hex()
    assert known == "abb4b6ba1cdcda0a68c107b302c3fc0c8a2b0576378535ab6bade8553969738c"


def counted(monkeypatch, name):
    """Count the calls of a function that reads a unit."""
    calls, function = [], getattr(unit_hashes, name)
    for module in (unit_hashes, origin):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, lambda *given: calls.append(given[1]) or function(*given))
    return calls


def test_a_store_is_read_once_and_then_only_where_hashes_are_alike(stored, cache, monkeypatch):
    store, images = stored
    stranger, copy = pictures(1, seed=5)[0], compressed(images[3, 0], 75)
    expected = find(store, stranger, copy)
    assert len(list(cache.glob("*/*.npy"))) == 2
    read = counted(monkeypatch, "read_arrays")
    assert find(store, stranger)[0] == expected[0] and not read
    assert find(store, copy, stranger) == expected[::-1] and [unit.identity_block for unit in read] == [1]


@pytest.mark.parametrize("content", [b"", b"no hashes", b"\x93NUMPY\x01\x00"])
def test_hashes_that_are_damaged_are_made_anew(stored, cache, caplog, content):
    store, images = stored
    expected = find(store, images[1, 1])
    kept = {path: path.read_bytes() for path in cache.glob("*/*.npy")}
    for path in kept:
        path.write_bytes(content)
    assert find(store, images[1, 1]) == expected
    assert "are computed anew" in caplog.text
    assert {path: path.read_bytes() for path in kept} == kept


def test_another_unit_has_other_hashes(stored, cache, monkeypatch):
    """What is kept is known by the content of a unit, not by its place."""
    store, images = stored
    find(store, images[0, 0])
    record = unit_hashes.read_record

    def made_anew(spec, unit):
        found = record(spec, unit)
        return replace(found, sha256={path: digest[::-1] for path, digest in found.sha256.items()})

    monkeypatch.setattr(unit_hashes, "read_record", made_anew)
    read = counted(monkeypatch, "read_rows")
    assert find(store, images[0, 0])[0].exact and len(read) == 2


def test_a_cache_that_cannot_be_written_costs_time_alone(stored, tmp_path, monkeypatch):
    store, images = stored
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert find(store, images[2, 2])[0].exact


def test_many_questions_are_compared_in_parts(stored, monkeypatch):
    store, images = stored
    asked = [images[1, 0], *pictures(5, seed=6), images[3, 1], images[0, 2]]
    whole = find(store, *asked)
    monkeypatch.setattr(origin, "_COMPARED", 12)
    assert find(store, *asked) == whole
    assert [one.exact for one in whole] == [True, *[False] * 5, True, True]


def test_the_command_says_which_image_it_is(stored, tmp_path, capsys):
    store, images = stored
    Image.fromarray(images[2, 0]).save(tmp_path / "same.png")
    Image.fromarray(images[2, 1]).save(tmp_path / "copy.jpg", quality=80)
    Image.fromarray(pictures(1, seed=3)[0]).save(tmp_path / "other.png")
    with pytest.raises(SystemExit) as stop:
        main(["whose", str(tmp_path), str(store)])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert "same.png: identity 2, image 0 of the run faces, samples/" in said and "(the same pixels)" in said
    assert "copy.jpg: identity 2, image 1 of the run faces" in said and "of 255 bits differ" in said
    assert "other.png: not from" in said and "3 images: 2 from there, 1 not." in said
    with pytest.raises(SystemExit) as stop:
        main(["whose", str(tmp_path / "other.png"), str(store)])
    assert stop.value.code == 1


def test_images_of_a_folder_that_cannot_be_compared_are_named(stored, tmp_path, capsys):
    store, images = stored
    folder = tmp_path / "asked"
    folder.mkdir()
    Image.fromarray(images[2, 0]).save(folder / "same.png")
    (folder / "broken.png").write_bytes(b"no image")
    Image.new("RGB", (8, 30)).save(folder / "small.png")
    with pytest.raises(SystemExit) as stop:
        main(["whose", str(folder), str(store)])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "same.png: identity 2, image 0" in said
    assert "broken.png: not compared, no image that can be read." in said
    assert "small.png: not compared, too small" in said
    assert "3 images: 1 from there, 0 not, 2 not compared." in said


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.png", None, "There is no image"),
        ("broken.png", b"no image", "no image that can be read"),
        ("small.png", (8, 8), "16 x 16 pixels at least"),
    ],
)
def test_what_is_no_image_is_refused(stored, tmp_path, capsys, name, content, said):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        Image.new("RGB", content).save(path)
    with pytest.raises(SystemExit) as stop:
        main(["whose", str(path), str(stored[0])])
    assert stop.value.code == 2 and said in capsys.readouterr().err
