"""Verification sets: `.bin`, pair lists and IJB-C's layout, read as they are meant or refused."""

import os
import pickle
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from verification_material import colours, crop, lfw_order, material, save_bin, save_colour_network

from negfacediff_core.errors import ConfigError, NegFaceDiffError
from negfacediff_core.faces.align import TEMPLATE_112
from negfacediff_core.faces.embed import load_embedder
from negfacediff_core.recognition.bin_sets import read_bin
from negfacediff_core.recognition.embedding import Embedding
from negfacediff_core.recognition.ijbc import is_template_set, pool, read_templates, template_cosines
from negfacediff_core.recognition.pairs import read_pairs
from negfacediff_core.recognition.path_options import parse
from negfacediff_core.recognition.verification_sets import open_sets
from negfacediff_core.recognition.verify import template_figures, verify

SAME = lfw_order(10, 1)


def shown(pair_set):
    """The colours of all pairs, as they are decoded: `(2P, 3)`."""
    return np.array([pair_set.crops.read(place)[5, 7] for place in pair_set.pairs.ravel()])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("form", ["bytes", "arrays", "numpy"])
def test_every_form_of_bin_is_read(tmp_path, protocol, form):
    images, same = [crop(colour) for colour in material(SAME)], [bool(one) for one in SAME]
    if form != "bytes":
        images = [np.frombuffer(image, np.uint8).reshape(-1, 1).copy() for image in images]
    if form == "numpy":
        same = list(SAME) if protocol % 2 else SAME
    path = tmp_path / "faces.bin"
    path.write_bytes(pickle.dumps((images, same), protocol))
    read = read_bin(path, "faces")
    np.testing.assert_array_equal(shown(read), material(SAME))
    np.testing.assert_array_equal(read.same, SAME)
    assert read.folds.tolist() == np.repeat(np.arange(10), 2).tolist()
    assert read.crops.side == 112 and read.crops.read(0).shape == (112, 112, 3)


def python_2_pickle(images, same):
    """What cPickle of Python 2 writes by protocol 2: its strings are bytes without a mark."""
    listed = b"".join(b"T" + struct.pack("<i", len(image)) + image for image in images)
    flags = b"".join(b"\x88" if one else b"\x89" for one in same)
    return b"\x80\x02](" + listed + b"eq\x01](" + flags + b"eq\x02\x86q\x03."


def test_a_bin_of_python_2_is_read(tmp_path):
    path = tmp_path / "faces.bin"
    path.write_bytes(python_2_pickle([crop(colour) for colour in material(SAME)], SAME))
    np.testing.assert_array_equal(shown(read_bin(path, "faces")), material(SAME))


def test_equal_crops_are_kept_once(tmp_path):
    read = read_bin(save_bin(tmp_path / "faces.bin", SAME), "faces")
    assert len(read.crops) == len({tuple(colour) for colour in material(SAME)}) < 2 * len(SAME)


class Runs:
    """Is pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def named(module, name, arguments):
    """A pickle that calls a function of any name, whether it is there or not."""
    return b"c" + f"{module}\n{name}\n".encode() + pickle.dumps(arguments, 0)[:-1] + b"R."


@pytest.mark.parametrize(
    "content",
    [
        lambda target: pickle.dumps(([Runs(os.mkdir, target)], [True])),
        lambda target: pickle.dumps(([Runs(eval, f"__import__('os').mkdir({target!r})")], [True])),
        lambda target: pickle.dumps(([Runs(getattr, np.ndarray, "tofile")], [True])),
        lambda target: named("numpy.core.multiarray", "fromfile", (target,)),
        lambda target: named("os", "system", (f"mkdir {target}",)),
        lambda target: named("posix", "mkdir", (target,)),
        # a dotted name reaches what a module imports
        lambda target: pickle.dumps(os.mkdir).replace(b"posix", b"numpy"),
        # a state for the function that stands in for one of numpy's
        lambda target: b"cnumpy.core.multiarray\n_reconstruct\n}(X\x08\x00\x00\x00__code__I1\nub.",
    ],
)
def test_a_bin_that_asks_for_code_is_refused_and_runs_nothing(tmp_path, content):
    target, path = tmp_path / "made", tmp_path / "faces.bin"
    path.write_bytes(content(str(target)))
    with pytest.raises(NegFaceDiffError, match=r"faces\.bin"):
        read_bin(path, "faces")
    assert not target.exists()


IMAGES = [crop(colour) for colour in colours(20)]
FLAGS = [True, False] * 5
BAD_BINS = {
    "no pickle": (b"\xff\xd8\xff\xe0 a picture", "no verification set"),
    "empty": (b"", "no verification set"),
    "odd count": (pickle.dumps((IMAGES[:-1], FLAGS)), "19 images for 10 pairs: each pair takes two"),
    "other flags": (pickle.dumps((IMAGES, [2, *FLAGS[1:]])), "says 2 of a pair"),
    "text for flags": (pickle.dumps((IMAGES, "yes" * 5)), "holds a str where a list of booleans"),
    "numbers for images": (pickle.dumps(([7] * 20, FLAGS)), "holds a int where an encoded image"),
    "three parts": (pickle.dumps((IMAGES, FLAGS, 1)), "no verification set"),
    "one kind": (pickle.dumps((IMAGES, [True] * 10)), "10 pairs, all of them genuine"),
    "too few pairs": (pickle.dumps((IMAGES[:4], FLAGS[:2])), "none is in fold 2 of 0 to 9"),
    "no image": (pickle.dumps(([*IMAGES[:-1], b"JFIF"], FLAGS)), "image 19 cannot be read as an image"),
    "other size": (pickle.dumps(([*IMAGES[:-1], crop((1, 2, 3), 96)], FLAGS)), "image 19 has 96x96 pixels"),
}


@pytest.mark.parametrize("kind", BAD_BINS)
def test_a_bad_bin_is_refused_with_its_name_and_the_reason(tmp_path, kind):
    content, reason = BAD_BINS[kind]
    path = tmp_path / "faces.bin"
    path.write_bytes(content)
    with pytest.raises(NegFaceDiffError, match=reason) as error:
        read_bin(path, "faces")
    assert str(path) in str(error.value)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_bin_is_read_or_refused_and_asks_for_no_memory(tmp_path, data):
    images = [bytes([n]) * 5 for n in range(20)]
    whole = bytearray(pickle.dumps((images, np.array(FLAGS)), data.draw(st.sampled_from([2, 4, 5]))))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "faces.bin"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with pytest.raises(NegFaceDiffError, match=r"faces\.bin"):  # the images are none
        read_bin(path, "faces")


@pytest.fixture
def people(tmp_path):
    """LFW's layout: four images of each of twenty people, one colour a person."""
    shades = np.unique(np.random.default_rng(3).integers(0, 256, (25, 3)), axis=0)[:20]
    for number, shade in enumerate(shades):
        for image in range(1, 5):
            file = tmp_path / "lfw" / f"Person_{number}" / f"Person_{number}_{image:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(crop(shade))
    return tmp_path / "lfw"


def pairs_txt(head="10\t2"):
    """Ten folds of two genuine and two impostor pairs."""
    lines = [head] if head else []
    for fold in range(10):
        a, b = 2 * fold, 2 * fold + 1
        lines += [f"Person_{a}\t1\t2", f"Person_{b}\t3\t4"]
        lines += [f"Person_{a}\t1\tPerson_{b}\t2", f"Person_{b}\t4\tPerson_{a}\t3"]
    return "\n".join(lines) + "\n"


def test_lfw_pairs_are_read_in_their_folds(people):
    (people / "pairs.txt").write_text(pairs_txt())
    (read,) = open_sets([str(people)])
    assert read.name == "LFW"
    assert read.same.tolist() == [True, True, False, False] * 10
    assert read.folds.tolist() == np.repeat(np.arange(10), 4).tolist()
    assert len(read.crops) == 60 and read.crops.names[0] == "Person_0/Person_0_0001.png"
    shades = shown(read).reshape(40, 2, 3)
    np.testing.assert_array_equal((shades[:, 0] == shades[:, 1]).all(axis=1), read.same)


@pytest.mark.parametrize("head", ["20", ""])
def test_a_list_without_folds_is_divided_by_kind(people, tmp_path, head):
    listed = tmp_path / "dev.txt"
    listed.write_text(pairs_txt(head))
    (read,) = open_sets([f"{listed},images={people},name=dev"])
    assert read.name == "dev"
    for kind in (read.same, ~read.same):
        assert np.bincount(read.folds[kind]).tolist() == [2] * 10


def test_a_list_without_a_head_may_begin_with_names_that_are_numbers(tmp_path):
    """As those of our own exports are."""
    for person in range(20):
        for image in (1, 2):
            file = tmp_path / f"{person:07}" / f"{person:07}_{image:04}.png"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(crop((person, 9, 9)))
    lines = [f"{n:07} 1 2\n{n:07} 1 {19 - n:07} 2\n" for n in range(20)]
    (tmp_path / "pairs.txt").write_text("".join(lines))
    (read,) = open_sets([str(tmp_path)])
    assert read.same.tolist() == [True, False] * 20
    assert read.crops.names[:2] == ["0000000/0000000_0001.png", "0000000/0000000_0002.png"]


@pytest.mark.parametrize("head", ["path1,path2,same\n", ""])
def test_a_csv_is_read(people, head):
    files = [[f"Person_{n}/Person_{n}_000{image}.png" for image in (1, 2)] for n in range(20)]
    rows = [f"{first},{second},1" for first, second in files]
    rows += [f"{files[n][0]},{files[19 - n][1]},false" for n in range(20)]
    listed = people / "pairs.csv"
    listed.write_text(head + "\n".join(rows) + "\n")
    (read,) = open_sets([str(people)])
    assert read.same.tolist() == [True] * 20 + [False] * 20
    assert np.bincount(read.folds[read.same]).tolist() == [2] * 10


BAD_LISTS = {
    "count": (pairs_txt("10\t3"), "holds 40 pairs, and its first line says 60"),
    "odd line": ("10 2\nPerson_1 1\n", "line 2: 'Person_1 1' is no pair"),
    "no number": ("Person_1 1 two\n", "line 1: 'Person_1 1 two' is no pair"),
    "missing image": ("Person_1 1 9\nPerson_1 1 Person_2 1\n" * 10, "names 1 images that are not there"),
    "no pairs": ("", "holds no pairs"),
    "one kind": ("Person_1 1 2\n" * 10, "all of them genuine"),
}


@pytest.mark.parametrize("kind", BAD_LISTS)
def test_a_bad_list_is_refused_with_its_name_and_the_reason(people, kind):
    content, reason = BAD_LISTS[kind]
    path = people / "pairs.txt"
    path.write_text(content)
    with pytest.raises(NegFaceDiffError, match=reason) as error:
        read_pairs(path, people, "LFW")
    assert str(path) in str(error.value)


@pytest.mark.parametrize("line", ["a.png,b.png", "a.png,b.png,perhaps", "a.png,b.png,c.png,1"])
def test_a_bad_line_of_a_csv_is_named(people, line):
    path = people / "pairs.csv"
    path.write_text(f"path1,path2,same\n{line}\n")
    with pytest.raises(NegFaceDiffError, match=r"pairs.csv, line 2: .*path1,path2,same"):
        read_pairs(path, people, "LFW")


@pytest.mark.parametrize("second", ["Person_0/Person_0_0002.png", "none.png"])
def test_a_pair_whose_third_cell_is_mistyped_is_no_head(people, second):
    path = people / "pairs.csv"
    path.write_text(f"Person_0/Person_0_0001.png,{second},yess\n")
    with pytest.raises(NegFaceDiffError, match=r"pairs.csv, line 1: .*yess' is no pair"):
        read_pairs(path, people, "LFW")


def test_a_path_says_what_it_is_or_is_refused(tmp_path):
    for name in ("cplfw", "lfw", "own", "agedb_30"):
        save_bin(tmp_path / "sets" / f"{name}.bin", SAME)
    assert [one.name for one in open_sets([str(tmp_path / "sets")])] == ["LFW", "AgeDB-30", "CPLFW", "own"]
    one = str(tmp_path / "sets" / "own.bin")
    assert [read.name for read in open_sets([one, f"{one},name=again"])] == ["own", "again"]
    (tmp_path / "empty").mkdir()
    for text, reason in {
        str(tmp_path / "nowhere.bin"): "there is no verification set",
        str(tmp_path / "empty"): "has 0 .bin sets",
        f"{tmp_path / 'sets'},name=all": "4 .bin sets, and name cannot be said of several",
        f"{one},images={tmp_path}": "only a pair list",
        f"{one},nmae=x": "is not understood",
        f"{one},name=": "is not understood",
        __file__: "is no verification set",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            open_sets([text])
    with pytest.raises(ConfigError, match="two verification sets are called own"):
        open_sets([one, one])
    with pytest.raises(ConfigError, match="with the options name and images"):
        parse("a.bin,name=x,name=y", ("name", "images"))


@pytest.fixture
def ijbc(tmp_path):
    """A small set in IJB-C's layout: images of 150 pixels, whose faces stand 19 pixels off the template."""
    folder = tmp_path / "IJBC"
    (folder / "meta").mkdir(parents=True)
    (folder / "loose_crop").mkdir()
    # image, template, medium, detector's score
    rows = [(1, 7, 1, 0.5), (2, 7, 1, 0.5), (3, 7, 2, 1.0), (4, 9, 3, 1.0), (5, 12, 4, 0.25)]
    for (number, *_), colour in zip(rows, colours(5), strict=True):
        image = np.zeros((150, 150, 3), np.uint8)
        image[19:131, 19:131] = colour
        Image.fromarray(image).save(folder / "loose_crop" / f"{number}.jpg", quality=100, subsampling=0)
    points = " ".join(f"{value:.4f}" for value in (TEMPLATE_112 + 19).ravel())
    tids = "".join(f"{n}.jpg {template} {medium}\n" for n, template, medium, _ in rows)
    (folder / "meta" / "ijbc_face_tid_mid.txt").write_text(tids)
    scores = "".join(f"{n}.jpg {points} {score}\n" for n, _, _, score in rows)
    (folder / "meta" / "ijbc_name_5pts_score.txt").write_text(scores)
    (folder / "meta" / "ijbc_template_pair_label.txt").write_text("7 9 1\n7 12 0\n12 9 0\n")
    return folder


def test_templates_are_read_and_their_faces_aligned(ijbc):
    assert is_template_set(ijbc)
    (read,) = open_sets([str(ijbc)])
    assert read.name == "IJB-C"
    assert read.templates.tolist() == [0, 0, 0, 1, 2]
    assert [len(set(read.media[:3].tolist())), len(set(read.media.tolist()))] == [2, 4]
    assert read.pairs.tolist() == [[0, 1], [0, 2], [2, 1]] and read.same.tolist() == [True, False, False]
    for place, colour in enumerate(colours(5)):
        crops = read.crops.read(place)
        assert crops.shape == (112, 112, 3)
        # the face fills the crop: nothing of the black around it is left
        assert np.abs(crops.astype(int) - colour).max() <= 3


@pytest.mark.parametrize("weigh", [False, True])
def test_templates_are_the_mean_of_each_medium_summed_over_media(ijbc, weigh):
    read = read_templates(ijbc, "IJB-C")
    e = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    s = [0.5, 0.5, 1.0, 1.0, 0.25] if weigh else [1] * 5
    pooled = pool(read, [(0, e[:2]), (2, e[2:])], 4, weigh)
    expected = np.stack([(s[0] * e[0] + s[1] * e[1]) / 2 + s[2] * e[2], e[3], e[4]])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(pooled, expected, atol=1e-6)
    np.testing.assert_allclose(
        template_cosines(pooled, read.pairs),
        [pooled[a] @ pooled[b] for a, b in ((0, 1), (0, 2), (2, 1))],
        rtol=1e-5,
    )


def test_templates_are_verified_by_their_pooled_embeddings(ijbc, tmp_path):
    read = read_templates(ijbc, "IJB-C")
    told = []
    network = load_embedder(save_colour_network(tmp_path / "net.onnx"))
    verified = verify(read, Embedding(network, batch=2), told.append, draws=100)
    crops = np.stack([read.crops.read(place) for place in range(5)])
    pooled = pool(read, [(0, network.embed(crops, flip=True))], network.width)
    cosines = template_cosines(pooled, read.pairs)
    assert verified.figures == template_figures(cosines, read.same)
    assert (verified.figures["genuine"], verified.figures["impostor"]) == (1, 2)
    assert list(verified.figures["tar"]) == ["1e-1", "1e-2", "1e-3", "1e-4", "1e-5", "1e-6"]
    assert told == [2, 2, 1] and not len(verified.draws)


def test_templates_that_cancel_out_are_refused(ijbc):
    read = read_templates(ijbc, "IJB-C")
    e = np.array([[1, 0], [1, 0], [-0.5, 0], [0, 1], [1, 1]], np.float32)
    with pytest.raises(NegFaceDiffError, match="a template of IJB-C has no direction"):
        pool(read, [(0, e)], 2, weigh=True)


BAD_META = {
    "label of an unknown template": (
        "template_pair_label",
        "7 99 1\n7 12 0\n",
        "compares 1 templates .* template 99",
    ),
    "one kind": ("template_pair_label", "7 9 1\n", "must say 1"),
    "a word too few": ("face_tid_mid", "1.jpg 7\n", "expected lines of 3 cells"),
    "text for a number": ("template_pair_label", "7 nine 1\n", "is not as IJB-C has it"),
    "another order": ("face_tid_mid", "2.jpg 7 1\n1.jpg 7 1\n", "first difference: line 1"),
    "a missing image": ("face_tid_mid", "8.jpg 7 1\n", "first difference: line 1"),
}


@pytest.mark.parametrize("kind", BAD_META)
def test_bad_lists_of_templates_are_refused(ijbc, kind):
    file, content, reason = BAD_META[kind]
    (ijbc / "meta" / f"ijbc_{file}.txt").write_text(content)
    with pytest.raises(NegFaceDiffError, match=reason):
        read_templates(ijbc, "IJB-C")


def changed(path, content):
    """Write a file, and have it later than it was."""
    before = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(before + 10**9, before + 10**9))


def test_a_set_has_another_digest_where_anything_has_changed(ijbc, people, tmp_path):
    (people / "pairs.txt").write_text(pairs_txt())
    save_bin(tmp_path / "own.bin", SAME)
    texts = [str(ijbc), str(people), str(tmp_path / "own.bin")]
    images = [ijbc / "loose_crop" / "3.jpg", people / "Person_2" / "Person_2_0001.png"]
    first = [one.digest for one in open_sets(texts)]
    assert len(set(first)) == 3 and all(first)
    assert [one.digest for one in open_sets(texts)] == first
    for image in images:
        changed(image, crop((7, 7, 7)))
    save_bin(tmp_path / "own.bin", SAME, wrong=[3])
    second = [one.digest for one in open_sets(texts)]
    assert not set(first) & set(second)
    labels = ijbc / "meta" / "ijbc_template_pair_label.txt"
    changed(labels, labels.read_bytes().replace(b"7 12 0", b"7 12 1"))
    changed(people / "pairs.txt", pairs_txt().replace("Person_0\t1\t2", "Person_0\t1\t3").encode())
    third = [one.digest for one in open_sets(texts)]
    assert third[0] != second[0] and third[1] != second[1] and third[2] == second[2]


def test_missing_files_of_a_template_set_are_named(ijbc):
    (ijbc / "loose_crop" / "3.jpg").unlink()
    with pytest.raises(NegFaceDiffError, match=r"lacks 1 of 5 images .* 3\.jpg"):
        read_templates(ijbc, "IJB-C")
    (ijbc / "meta" / "ijbc_name_5pts_score.txt").unlink()
    with pytest.raises(NegFaceDiffError, match=r"one file meta/\*_name_5pts_score.txt, and holds none"):
        read_templates(ijbc, "IJB-C")


def test_landmarks_that_fall_together_are_refused(ijbc):
    path = ijbc / "meta" / "ijbc_name_5pts_score.txt"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([f"1.jpg {'5.0 ' * 10}{first.split()[-1]}", *others]) + "\n")
    with pytest.raises(NegFaceDiffError, match=r"landmarks that are not finite or fall together .*1\.jpg"):
        read_templates(ijbc, "IJB-C")
