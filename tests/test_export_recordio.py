"""RecordIO: what is written is read back by a strict reader, which refuses whatever is malformed."""

import struct
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from negfacediff_core.errors import ConfigError, DamagedError
from negfacediff_core.export import recordio
from negfacediff_core.export.layout import Layout, Sample
from negfacediff_core.export.read_recordio import MAGIC, read_records, read_set

PAYLOADS = st.lists(st.one_of(st.binary(max_size=9), st.just(MAGIC)), max_size=8).map(b"".join)


def layout(counts, variant, suffix="png"):
    """An export of identities 10, 20, ... with so many images each."""
    identities = 10 * np.arange(1, len(counts) + 1)
    return Layout(identities, np.array(counts), 112, 112, suffix, facts=("norm",), variant=variant)


def samples_of(described):
    """Samples with images of odd lengths, some of which hold the magic number."""
    labels = np.repeat(np.arange(len(described.counts)), described.counts)
    return [
        Sample(n, int(label), 10 * int(label) + 10, n, MAGIC * (n % 3) + bytes([n]) * (n + 1), (n / 8,))
        for n, label in enumerate(labels)
    ]


def write_all(folder, described):
    """Write a set in two pieces, as an export does."""
    samples = samples_of(described)
    for piece, part in enumerate((samples[:2], samples[2:])):
        for path, content in recordio.write(piece, part, described).appends.items():
            with (folder / path).open("ab") as file:
                file.write(content)
    recordio.finish(folder, described)
    return samples


@settings(max_examples=40)
@given(st.lists(PAYLOADS, min_size=1, max_size=5))
def test_any_payload_survives(payloads):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.rec"
        path.write_bytes(b"".join(map(recordio.record, payloads)))
        assert path.stat().st_size % 4 == 0
        assert [payload for _, payload in read_records(path)] == payloads


def test_the_magic_number_is_left_out_only_at_multiples_of_four():
    framed = recordio.record(b"abcd" + MAGIC + b"e" + MAGIC)
    flags = [(1, 4), (3, 5)]
    words = [struct.pack("<I", flag << 29 | length) for flag, length in flags]
    assert framed == MAGIC + words[0] + b"abcd" + MAGIC + words[1] + b"e" + MAGIC + b"\0\0\0"


@pytest.mark.parametrize("variant", ["header", "headerless"])
def test_a_set_is_read_back(tmp_path, variant):
    described = layout([3, 1, 2], variant)
    samples = write_all(tmp_path, described)
    found = read_set(tmp_path)
    first = int(variant == "header")
    assert [image.image for image in found.images] == [sample.image for sample in samples]
    assert [image.labels for image in found.images] == [(float(sample.label),) for sample in samples]
    assert [image.key for image in found.images] == list(range(first, first + 6))
    assert (found.classes, found.height, found.width) == (3, 112, 112)
    assert found.ranges == ([(1, 4), (4, 5), (5, 7)] if first else [])
    assert (tmp_path / "property").read_text() == "3,112,112\n"
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    assert lines[:2] == ["key,label,identity,replicate,norm", f"{first},0,10,0,0"] and len(lines) == 7
    if not first:
        listed = (tmp_path / "train.tsv").read_text().splitlines()
        assert listed[3] == "3\t0000020/0003.png\t1"


def test_the_header_says_what_insightface_reads_there(tmp_path):
    write_all(tmp_path, layout([3, 1, 2], "header"))
    _, payload = next(read_records(tmp_path / "train.rec"))
    # flag 2, label unused, ids; then the first identity's key and the end
    assert struct.unpack("<IfQQff", payload) == (2, 0.0, 0, 0, 7.0, 10.0)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("train.rec", lambda data: data[:-4], "ends within the record"),
        ("train.rec", lambda data: data + b"\0\0\0\0", "no record begins"),
        ("train.rec", lambda data: b"\0" + data[1:], "no record begins at byte 0"),
        ("train.rec", lambda data: data[:7] + b"\xff" + data[8:], "ends within the record"),
        ("train.rec", lambda data: data[:16] + b"\x05" + data[17:], "header is not|record 0 says"),
        ("train.rec", lambda data: data.replace(b"\x01\x01\0\0", b"\x01\x01\0\x07", 1), "padded with zeros"),
        ("train.idx", lambda data: data.replace(b"1\t", b"1 "), "not a key, a tab"),
        ("train.idx", lambda data: data + b"0\t0\n", "twice"),
        ("train.idx", lambda data: data.replace(b"\n1\t", b"\n99\t"), "does not name the offset"),
        ("property", lambda data: b"3;112;112", "classes,height,width"),
        ("property", lambda data: b"2,112,112", "label 2.0 of 2"),
    ],
)
def test_what_is_malformed_is_refused(tmp_path, file, change, said):
    write_all(tmp_path, layout([3, 1, 2], "header"))
    content = (tmp_path / file).read_bytes()
    assert change(content) != content
    (tmp_path / file).write_bytes(change(content))
    with pytest.raises(DamagedError, match=said):
        read_set(tmp_path)


def test_identities_records_that_point_elsewhere_are_refused(tmp_path):
    described = layout([3, 1, 2], "header")
    wrong = layout([2, 2, 2], "header")
    for path, content in recordio.write(0, samples_of(described), described).appends.items():
        (tmp_path / path).write_bytes(content)
    recordio.finish(tmp_path, wrong)
    with pytest.raises(DamagedError, match="where their images are"):
        read_set(tmp_path)


def test_more_labels_than_float32_holds_are_refused():
    most = 2**24 - 3
    many = Layout(np.broadcast_to(0, most), np.broadcast_to(1, most), 112, 112, "png", variant="headerless")
    recordio.check(many)
    with pytest.raises(ConfigError, match="exact up to 16,777,216"):
        recordio.check(replace(many, variant="header"))
