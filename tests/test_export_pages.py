"""Pages of an export: the card's licence, YAML, the datasheet, Croissant, and where it all came from."""

import hashlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image

from negfacediff_core.errors import ConfigError
from negfacediff_core.export.about import About
from negfacediff_core.export.card import READING, card, licence_page
from negfacediff_core.export.croissant import croissant
from negfacediff_core.export.datasheet import datasheet
from negfacediff_core.export.formats import FORMATS
from negfacediff_core.export.layout import Layout, Sample
from negfacediff_core.export.licence import terms_of
from negfacediff_core.export.manifest import FileSum
from negfacediff_core.export.selection import grown_extent, select
from negfacediff_core.export.settings import ExportConfig

NC = "CC BY-NC 4.0"


def about(form="imagefolder", **changes):
    """A description with characters that Markdown and YAML could stumble over."""
    described = About(
        run="faces: #1",
        made="2026-01-02",
        version="0.1.0",
        layout=Layout(np.array([3, 8]), np.array([2, 4]), 112, 96, "jpg", facts=("norm",)),
        settings=ExportConfig(format=form, encoding="jpeg").model_dump(mode="json"),
        method={"negative": "far", "curve": "0:1 | 1:0"},
        figures={"EER": "6.3%"},
        licences=[{"part": "samples: generator", "licence": NC, "source": "a | b"}],
        terms=terms_of([NC]),
        acknowledged=None,
        gate=None,
        files=[FileSum("labels.csv", 12, "0" * 64), FileSum("shard-000007.tar", 12, "1" * 64)],
    )
    return replace(described, **changes)


@pytest.mark.parametrize("form", FORMATS)
def test_the_card_says_what_may_be_done(form):
    text = card(about(form))
    _, front, body = text.split("---\n", 2)
    content = yaml.safe_load(front)
    assert content["license"] == "cc-by-nc-4.0" and content["pretty_name"].startswith("faces: #1")
    assert ("configs" in content) == (form != "rec") and content["size_categories"] == ["n<1K"]
    assert "- Not for commercial use." in body and "| samples: generator | a \\| b | CC BY-NC 4.0 |" in body
    assert "2 to 4 (on average 3.0) images each" in body and "96x112 pixels, JPEG" in body
    assert "Not done: nobody looked" in body and form in READING
    assert "LAST" not in body and "SUFFIX" not in body
    assert "Only as the terms of its licence allow" in body


@pytest.mark.parametrize(
    ("licences", "said"),
    [
        (["?"], {"license_name": "not-determined", "license_link": "LICENSE.md"}),
        (
            ["CC BY-NC-SA 4.0", "non-commercial research"],
            {
                "license_name": "cc-by-nc-sa-4.0-non-commercial-research-only",
                "license_link": "LICENSE.md",
            },
        ),
        (
            ["CC BY-NC 2.5"],
            {
                "license_name": "cc-by-nc-2.5",
                "license_link": "https://creativecommons.org/licenses/by-nc/2.5/",
            },
        ),
    ],
)
def test_a_licence_without_an_identifier_has_a_name_and_a_link(licences, said):
    described = about(terms=terms_of(licences))
    front = yaml.safe_load(card(described).split("---\n", 2)[1])
    assert front["license"] == "other" and said.items() <= front.items()
    assert all(f"- {one}" in licence_page(described) for one in described.terms.conditions)


def test_sizes_are_the_words_of_hugging_face():
    sizes = [10**power for power in range(2, 13)]
    words = [
        yaml.safe_load(card(about(layout=Sized(images))).split("---\n", 2)[1])["size_categories"][0]
        for number in sizes
        for images in (number, 10 * number - 1)
    ]
    assert words == [word for word in SIZES for _ in range(2)]


# as in datasets/utils/resources/size_categories.json
SIZES = [
    "n<1K",
    *("1K<n<10K", "10K<n<100K", "100K<n<1M"),
    *("1M<n<10M", "10M<n<100M", "100M<n<1B"),
    *("1B<n<10B", "10B<n<100B", "100B<n<1T"),
    "n>1T",
]


class Sized(Layout):
    """A layout of so many images, which would not fit in the memory."""

    def __init__(self, images):
        super().__init__(np.array([3, 8]), np.array([2, images - 2]), 112, 96, "jpg")


def test_pages_say_whether_the_terms_were_accepted():
    accepted, open_ = about(acknowledged="2026-03-04"), about()
    for page in (card, licence_page, datasheet):
        assert "accepted these terms on 2026-03-04" in page(accepted)
        assert "Not acknowledged" in page(open_)
        assert "cknowledged" not in page(about(terms=terms_of(["MIT"])))


def test_the_datasheet_answers_all_seven_groups_of_questions():
    text = datasheet(about())
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == [
        "Motivation",
        "Composition",
        "Collection",
        "Preprocessing",
        "Uses",
        "Distribution",
        "Maintenance",
    ]
    assert "JPEG of quality 95 without chroma subsampling" in text and "curve | 0:1 \\| 1:0" in text
    assert "as the generator made them" in datasheet(about(settings={**about().settings, "images": "raw"}))


@pytest.mark.parametrize("form", FORMATS)
def test_croissant_names_files_columns_and_what_is_responsible(form):
    content = json.loads(croissant(about(form)))
    assert content["conformsTo"] == [
        "http://mlcommons.org/croissant/1.1",
        "http://mlcommons.org/croissant/RAI/1.0",
    ]
    assert content["rai:hasSyntheticData"] is True and content["license"].endswith("/by-nc/4.0/")
    assert all(content[f"rai:{name}"] for name in ("dataCollection", "dataBiases", "dataLimitations"))
    listed = {one["@id"]: one for one in content["distribution"]}
    assert listed["labels.csv"]["sha256"] == "0" * 64
    assert "shard-000007.tar" in listed and ("data" in listed) == (form != "rec")
    key = "key" if form in ("rec", "webdataset") else "path"
    labels, *images = content["recordSet"]
    columns = [field["source"]["extract"]["column"] for field in labels["field"]]
    assert columns == [key, "label", "identity", "replicate", "norm"]
    assert [one["field"][0]["dataType"] for one in images] == ["sc:ImageObject"] * (form != "rec")
    assert "creator" not in content and "Not for commercial use." in content["rai:dataUseCases"]


@pytest.mark.slow  # the import of `mlcroissant` takes seconds
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("form", FORMATS)
def test_mlcroissant_accepts_it_and_reads_labels_and_images(tmp_path, monkeypatch, caplog, form):
    mlcroissant = pytest.importorskip("mlcroissant")
    place = pytest.importorskip("etils.epath").Path(tmp_path / "cache")
    monkeypatch.setattr("mlcroissant._src.operation_graph.operations.extract.EXTRACT_PATH", place)
    folder, key = tmp_path / "out", "key" if form in ("rec", "webdataset") else "path"
    pictures = written(form, folder)
    listed = [sum_of(path) for path in sorted(folder.iterdir()) if path.is_file()]
    (folder / "croissant.json").write_text(croissant(about(form, run="faces", layout=SMALL, files=listed)))
    dataset = mlcroissant.Dataset(str(folder / "croissant.json"))
    assert not dataset.metadata.ctx.issues.errors
    assert dataset.metadata.data_limitations
    labels = list(dataset.records("labels"))
    assert [record["labels/identity"] for record in labels] == [3, 8, 8] and labels[0]["labels/norm"] == 2.5
    if form == "rec":
        return
    leads = ("label", "replicate") if form == "huggingface" else (key,)
    images = {place_of(one, "images", leads): one["images/image"] for one in dataset.records("images")}
    for record, picture in zip(labels, pictures, strict=True):
        assert (np.asarray(images.pop(place_of(record, "labels", leads)).convert("RGB")) == picture).all()
    assert not images and "Could not match" not in caplog.text


SMALL = Layout(np.array([3, 8]), np.array([1, 2]), 8, 8, "png", facts=("norm",))


def written(form, folder):
    """Write three images as a format has them; returns their pixels."""
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    samples = []
    for number, (label, identity, replicate) in enumerate([(0, 3, 1), (1, 8, 0), (1, 8, 1)]):
        encoded = io.BytesIO()
        Image.fromarray(pictures[number]).save(encoded, "png")
        samples.append(Sample(number, label, identity, replicate, encoded.getvalue(), (2.5,)))
    folder.mkdir()
    made = FORMATS[form].write(0, samples, SMALL)
    for path, content in {**made.files, **made.appends}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        parts = content if isinstance(content, (tuple, list)) else [content]
        (folder / path).write_bytes(b"".join(parts))
    FORMATS[form].finish(folder, SMALL)
    return pictures


def place_of(record, records, fields):
    """What leads from an image to its labels; a cell is a number or, in bytes or as a path, a text."""
    cells = (record[f"{records}/{field}"] for field in fields)
    return tuple(cell.decode() if isinstance(cell, bytes) else str(cell) for cell in cells)


def sum_of(path):
    """A file as the manifest lists it."""
    content = path.read_bytes()
    return FileSum(path.name, len(content), hashlib.sha256(content).hexdigest())


def test_exactly_so_many_of_the_first_identities_are_taken():
    usable = np.array([[1, 1, 1, 0], [0, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    chosen = select(usable, least=1, exactly=3, identities=2)
    assert chosen.identities.tolist() == [0, 2]
    assert chosen.chosen.tolist() == [[True, True, True, False], [True, False, True, True]]
    assert (chosen.short, chosen.missing, chosen.lacking) == (2, 5, 0)
    assert select(usable, least=4, exactly=2, identities=0).identities.tolist() == [4]
    assert select(usable, least=1, exactly=3, identities=9).lacking == 6


def test_growth_takes_the_cheaper_axis():
    nine_of_ten = np.arange(1000).reshape(100, 10) % 10 != 0
    # nine images each suffice: a few identities more are the least work
    assert grown_extent(nine_of_ten, 9, 104, (4, 5)) == (108, 10)
    # nobody has eleven yet: more images of each
    assert grown_extent(nine_of_ten, 11, 100, (4, 5)) == (100, 15)
    half = np.zeros((10, 4), bool)
    half[:5] = True
    # half of the identities never qualify
    assert grown_extent(half, 4, 6, (1, 4))[1] == 4


def test_where_no_image_is_usable_more_are_not_advised():
    with pytest.raises(ConfigError, match="none of the images can be used, and more would be no better"):
        select(np.zeros((3, 3), bool), least=1, exactly=0, identities=2)
