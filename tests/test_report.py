"""Pictures and the HTML report: what they show, that they stand alone, that foreign text is escaped."""

import io
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from jsonschema import Draft202012Validator
from PIL import Image

from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.evaluation.figures import FIGURES, GROUPS
from negfacediff_core.evaluation.plots import COLOURS, ScorePanel, det_curves, score_histogram
from negfacediff_core.evaluation.report import render_report
from negfacediff_core.evaluation.schema import check_report, report_schema
from negfacediff_core.evaluation.scores import Distribution
from negfacediff_core.evaluation.sheets import SheetPanel, _fitting, contact_sheet
from negfacediff_core.stages.models import PROJECT

PNG = b"\x89PNG\r\n\x1a\n"


def decode(png):
    assert png.startswith(PNG)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def panel(label, genuine_mean, seed=0, size=500):
    random = np.random.default_rng(seed)
    scores = (random.normal(genuine_mean, 0.1, size), random.normal(0, 0.1, 4 * size))
    return ScorePanel(label, *(Distribution.of(kind) for kind in scores))


def pixels_of(picture, colour):
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return np.argwhere((picture == wanted).all(axis=2))


@pytest.mark.parametrize("count", [1, len(COLOURS)])
def test_histogram_draws_every_dataset_in_its_colour(count):
    picture = decode(score_histogram([panel(f"set {n}", 0.3 + 0.05 * n, n) for n in range(count)]))
    drawn = [len(pixels_of(picture, colour)) > 300 for colour in COLOURS]
    assert drawn == [number < count for number in range(len(COLOURS))]


def test_histogram_places_higher_scores_further_right():
    picture = decode(score_histogram([panel("low", 0.2), panel("high", 0.6)]))
    below_the_legend = picture[150:]
    low, high = (pixels_of(below_the_legend, colour)[:, 1].max() for colour in COLOURS[:2])
    assert low < high


def test_histogram_of_streamed_scores_is_that_of_the_list():
    """Counts at bin edges and the list itself must give the same picture when they say the same."""
    levels, counts = np.array([-0.115, 0.005, 0.345]), np.array([3, 9, 2])
    listed = Distribution.of(np.repeat(levels, counts))
    counted = Distribution(levels, counts, listed.mean, listed.std, resolution=1e-4)
    assert score_histogram([ScorePanel("a", listed, listed)]) == score_histogram(
        [ScorePanel("a", counted, counted)]
    )


def test_det_curves_of_better_sets_lie_lower():
    picture = decode(det_curves([panel("worse", 0.1), panel("better", 0.2)]))[150:]
    worse, better = ({column: row for row, column in pixels_of(picture, colour)} for colour in COLOURS[:2])
    shared = worse.keys() & better.keys()
    assert len(shared) > 100
    assert all(better[column] > worse[column] for column in shared)  # rows count downwards


@pytest.mark.parametrize("plot", [score_histogram, det_curves])
def test_an_svg_is_the_same_again_takes_the_ink_of_its_page_and_escapes_labels(plot):
    evil = '<script>alert("x")</script>'
    panels = [panel(evil, 0.4), panel("plain", 0.2)]
    svg = plot(panels, "svg")
    assert svg == plot(panels, "svg")
    text = "".join(ElementTree.fromstring(svg).itertext())
    assert evil in text and b"<script" not in svg
    assert b"currentColor" in svg and b"var(--line" in svg
    assert not re.search(rb'(xlink:href|src)="(?!#)', svg)


@pytest.mark.parametrize("form", ["png", "svg"])
def test_pictures_leave_pyplot_and_its_settings_alone(form):
    before = dict(matplotlib.rcParams)
    score_histogram([panel("a", 0.4)], form)
    assert dict(matplotlib.rcParams) == before
    import sys

    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize("plot", [score_histogram, det_curves])
def test_plots_refuse_more_datasets_than_colours(plot):
    with pytest.raises(NegFaceDiffError, match="1 to 7 datasets, got 8"):
        plot([panel("a", 0.4)] * 8)


def images(seed, identities=3, replicates=4, side=64):
    return np.random.default_rng(seed).integers(
        0, 255, (identities, replicates, side, side, 3), dtype=np.uint8
    )


def find(picture, cell):
    """The one place (row, column) of a cell in a picture."""
    corners = np.argwhere((picture == cell[0, 0]).all(axis=2))
    height, width = cell.shape[:2]
    places = [(r, c) for r, c in corners if np.array_equal(picture[r : r + height, c : c + width], cell)]
    assert len(places) == 1
    return places[0]


def test_contact_sheet_shows_every_image_unchanged_in_aligned_cells():
    left, right = images(0), images(1)
    picture = decode(contact_sheet([SheetPanel("a", left), SheetPanel("b", right)]))
    place = {
        (name, i, r): find(picture, block[i, r])
        for name, block in (("left", left), ("right", right))
        for i in range(3)
        for r in range(4)
    }
    shift = place["right", 0, 0][1] - place["left", 0, 0][1]
    for i in range(3):
        for r in range(4):
            (row, column), (other_row, other_column) = place["left", i, r], place["right", i, r]
            assert row == other_row and other_column - column == shift
            assert row == place["left", i, 0][0] and column == place["left", 0, r][1]
    assert place["left", 1, 0][0] > place["left", 0, 0][0] and place["left", 0, 1][1] > place["left", 0, 0][1]


def test_long_titles_end_with_their_panels():
    names = ["demo.kept.training-images-3f2a91", "short"]
    narrow = [images(number, replicates=2) for number in range(3)]
    panels = [SheetPanel(name, block) for name, block in zip([*names, names[0]], narrow, strict=True)]
    picture = decode(contact_sheet(panels))
    starts = [find(picture, block[0, 0])[1] for block in narrow]
    titles = (picture[:28] < 128).any(axis=(0, 2))
    for start in starts[1:]:
        assert not titles[start - 20 : start].any()
    assert not titles[-4:].any() and titles[starts[2] : -4].any()
    assert _fitting("short", 100) == "short"
    assert re.fullmatch(r"demo.*….*3f2a91", _fitting(names[0], 150))


def test_small_images_are_enlarged_by_a_whole_factor():
    small = images(2, side=16)
    picture = decode(contact_sheet([SheetPanel("a", small)]))
    find(picture, small[2, 3].repeat(4, axis=0).repeat(4, axis=1))


def test_images_without_a_face_are_framed_and_the_others_are_not():
    block = images(3)
    original = block.copy()
    detected = np.ones((3, 4), dtype=bool)
    detected[1, 2] = False
    picture = decode(contact_sheet([SheetPanel("a", block, detected)]))
    find(picture, block[1, 1])
    row, column = find(picture, block[1, 2][3:-3, 3:-3])
    frame = picture[row - 2, column : column + 20]
    assert (frame == frame[0]).all() and not (frame[0] == 255).all()
    np.testing.assert_array_equal(block, original)


def test_what_was_taken_out_is_white_and_a_note_says_so():
    block, taken_out = images(3), np.zeros((3, 4), dtype=bool)
    taken_out[1, 2] = True
    whole, shown = (decode(contact_sheet([SheetPanel("a", block, None, mask)])) for mask in (None, taken_out))
    row, column = find(whole, block[1, 2])
    assert (shown[row : row + 64, column : column + 64] == 255).all()
    find(shown, block[1, 1])
    # a line of text beneath the images, which the sheet without white places has not
    assert len(shown) > len(whole) and (shown[len(whole) :] < 200).any()


def test_images_of_two_generators_are_shown_at_one_size():
    small, large = images(2, side=64), images(3, side=96)
    picture = decode(contact_sheet([SheetPanel("a", small), SheetPanel("b", large)]))
    nearest = np.arange(96) * 64 // 96
    row, _ = find(picture, large[1, 2])
    assert find(picture, small[1, 2][nearest][:, nearest])[0] == row


@pytest.mark.parametrize(
    "panels", [[], [SheetPanel("a", images(0)), SheetPanel("b", images(0, replicates=3))]]
)
def test_sheets_that_cannot_be_aligned_are_refused(panels):
    with pytest.raises(NegFaceDiffError, match="as many identities and replicates"):
        contact_sheet(panels)


def dataset(**changes):
    settings = {"rule": "none", "w": 0.0, "sampler": "ddim", "steps": 20, "identities": 32, "images": 256}
    figures = {figure.key: 0.5 for figure in FIGURES if not figure.optional}
    return settings | figures | {"fdr": 2.0, "eer": 0.125} | changes


def report(*datasets, **changes):
    whole = {"seconds": 12.3, "device": "cpu", "versions": {"torch": "2.13.0"}}
    return {"datasets": list(datasets) or [dataset()]} | whole | changes


class Page(HTMLParser):
    """Collects tags with attributes, the text, and the cells of each table row."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.words, self.rows, self.in_cell = [], [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.words.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data.strip()

    def row(self, title):
        return next(row for row in self.rows if row and row[0] == title)


def test_report_shows_figures_side_by_side_with_differences():
    second = dataset(rule="far", w=0.5, fdr=4.5, eer=0.06, detected_fraction=0.25, fdr_interval=[4.0, 5.25])
    page = Page(render_report(report(dataset(fdr_interval=[1.75, 2.25]), second), {}))
    assert page.row("FDR") == ["FDR", "2.00[1.75, 2.25]", "4.50[4.00, 5.25]+2.50"]
    assert page.row("EER") == ["EER", "12.50%", "6.00%−6.50 points"]
    assert page.row("Genuine mean")[1:] == ["0.500", "0.5000.000"]
    assert page.row("rule") == ["rule", "none", "far"]
    assert ["", "none, w = 0", "far, w = 0.5"] in page.rows
    text = "".join(page.words)
    assert "FDR goes from 2.00 to 4.50 (×2.25)" in text
    kinds = [attributes.get("class") for tag, attributes in page.tags if tag == "span"]
    assert set(kinds) == {None, "interval", "difference"}  # None: names of groups


@pytest.mark.parametrize(
    "eer, limits, words, kind",
    [
        (0.0852, [-0.0753, 0.006], "−3.98 [−7.53,\N{NO-BREAK SPACE}+0.60] points", "difference"),
        (0.0852, [-0.0753, -0.006], "−3.98 [−7.53,\N{NO-BREAK SPACE}−0.60] points", "difference better"),
        (0.1648, [0.006, 0.0753], "+3.98 [+0.60,\N{NO-BREAK SPACE}+7.53] points", "difference worse"),
        (0.12499, [-0.02, -0.00001], "0.00 [−2.00,\N{NO-BREAK SPACE}0.00] points", "difference"),
        (0.1252, [0.0001, 0.0003], "+0.02 [+0.01,\N{NO-BREAK SPACE}+0.03] points", "difference worse"),
        (0.1252, None, "+0.02 points", "difference"),
        (0.12501, None, "0.00 points", "difference"),
    ],
)
def test_differences_have_a_sign_a_unit_and_a_colour_where_they_say_something(eer, limits, words, kind):
    second = dataset(eer=eer) | ({"eer_difference": limits} if limits else {})
    html = render_report(report(dataset(), second), {})
    assert f'<span class="{kind}">{words}</span>' in html


def test_what_rounds_to_zero_has_no_sign_and_what_is_negative_a_minus():
    page = Page(render_report(report(dataset(impostor_mean=-0.0001, genuine_mean=-0.25)), {}))
    assert page.row("Impostor mean")[1] == "0.000" and page.row("Genuine mean")[1] == "−0.250"


def test_the_lead_of_several_is_the_best_against_the_first():
    first, best = dataset(name="a"), dataset(name="c", fdr=4.0, eer=0.0625)
    others = [dataset(name="b", fdr=3.0), dataset(name="n", fdr=None, eer=None)]
    page = render_report(report(first, others[0], best, others[1]), {})
    assert (
        "From a to c, the best by FDR of 4 datasets, FDR goes from 2.00 to 4.00 (×2.00) and EER from 12.5% "
        "to 6.2%." in page
    )
    page = render_report(report(best, first, others[0]), {})
    assert "Of 3 datasets c, the first, has the highest FDR: 4.00, with an EER of 6.2%." in page


def test_what_does_not_compare_is_said_before_all_and_shows_no_winner():
    warning = "These figures are not comparable, for the judges differ."
    whole = report(dataset(), dataset(fdr=4.5), warnings=[warning])
    text = "".join(Page(render_report(whole, {})).words)
    assert text.index(warning) < text.index("s of work")
    assert "FDR goes from" not in text
    html = render_report(whole, {})
    assert "difference better" not in html and "difference worse" not in html and "+2.50" in html


def test_notes_captions_and_the_date_are_shown():
    picture = contact_sheet([SheetPanel("a", images(0, 1, 1))])
    given = {"notes": ["No interval, for A < B."], "captions": {"contact_sheet": "Same noise."}}
    text = "".join(
        Page(render_report(report(made="2026-03-01", **given), {"contact_sheet.png": picture})).words
    )
    assert "2026-03-01; 12 s of work on cpu" in text
    assert "No interval, for A < B." in text and "Click or tap to enlarge. Same noise." in text


def test_operating_points_and_attributes_have_their_tables():
    def point(most, fnmr, threshold):
        return {"fmr_at_most": most, "fmr": most, "fnmr": fnmr, "threshold": threshold}

    first = dataset(at_fmr=[point(0.1, 0.02, -0.05), point(0.001, 0.5, 0.25), point(0.0, 1.0, None)])
    first["at_fmr"].append({"fmr_at_most": 1e-5, "fmr": None, "fnmr": None, "threshold": None})
    second = dataset(at_fmr=[point(0.1, 0.01, 0.125)], attributes={"dark & light": 3, "b": 1})
    page = Page(render_report(report(first, second), {}))
    assert page.row("10%") == ["10%", "2.00%from −0.050", "1.00%from 0.125"]
    assert page.row("0.1%") == ["0.1%", "50.00%from 0.250", "n/a"]
    assert page.row("0%") == ["0%", "100.00%none matches", "n/a"]
    assert page.row("0.001%") == ["0.001%", "n/afewer than 100,000 impostor pairs", "n/a"]
    assert page.row("dark & light") == ["dark & light", "n/a", "3 (75.0%)"]
    assert "Operating points" not in render_report(report(), {})


def test_intervals_and_differences_are_explained_where_they_are_shown():
    def terms(*datasets):
        tags = Page(render_report(report(*datasets), {})).tags
        return {a["id"] for tag, a in tags if tag == "dt"} & {"interval", "difference"}

    assert terms(dataset()) == set()
    assert terms(dataset(fdr_interval=[1.0, 3.0])) == {"interval"}
    assert terms(dataset(), dataset()) == {"difference"}


def test_the_published_schema_is_that_of_the_figures_and_can_fail():
    path = PROJECT / "docs" / "report.schema.json"
    schema = json.loads(path.read_text(encoding="utf-8"))
    assert schema == report_schema(), f"write json.dumps(report_schema(), indent=2) to {path}"
    Draft202012Validator.check_schema(schema)
    judge = Draft202012Validator(schema)
    assert judge.is_valid(report(dataset(eer=None, fdr_interval=[1.0, 3.0])))
    assert not judge.is_valid(report(dataset(eer="12%")))
    assert not judge.is_valid(report(dataset(fdr_interval=[1.0])))
    assert not judge.is_valid(report(dataset(lineage={"samples": "aa11"})))
    broken = dataset()
    del broken["fdr"]
    assert not judge.is_valid(report(broken))


def test_report_stands_alone_and_embeds_the_pictures():
    picture = contact_sheet([SheetPanel("a", images(0, 1, 1))])
    drawing = score_histogram([panel("a", 0.4)], "svg")
    pictures = {"extra_plot.png": picture, "contact_sheet.png": picture, "histogram.png": picture}
    page = render_report(report(), {**pictures, "histogram.svg": drawing})
    tags = Page(page).tags
    assert [a["aria-label"] for tag, a in tags if tag == "svg"] == ["histogram"]
    pictures = [attributes for tag, attributes in tags if tag == "img"]
    assert [attributes["alt"] for attributes in pictures] == ["contact sheet", "extra plot"]
    assert all(attributes["src"].startswith("data:image/png;base64,iVBOR") for attributes in pictures)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in tags}
    assert not re.search(r"""(src|href)=["'](?!data:|#)|url\((?!#)|@import""", page)
    # a sheet is enlarged by a tick, which needs no script
    assert sum(tag == "input" and a["type"] == "checkbox" for tag, a in tags) == len(pictures)


def test_every_figure_says_what_it_means_when_pointed_at_and_in_the_glossary():
    tags = Page(render_report(report(), {})).tags
    shown = [figure for figure in FIGURES if not figure.optional]
    links = {a["href"]: a["title"] for tag, a in tags if tag == "a"}
    assert links == {f"#{figure.key}": figure.definition for figure in shown}
    assert {a["id"] for tag, a in tags if tag == "dt"} == {figure.key for figure in shown}


def test_figures_stand_under_the_names_of_their_groups():
    page = Page(render_report(report(), {}))
    shown = [group for group in GROUPS if any(f.group == group and not f.optional for f in FIGURES)]
    assert [row[0] for row in page.rows if len(row) == 1] == shown
    assert {figure.group for figure in FIGURES} <= set(GROUPS)


def test_the_page_has_a_dark_form():
    assert "prefers-color-scheme: dark" in render_report(report(), {})


def test_report_escapes_text_from_outside():
    evil = '<script>alert("x")</script>'
    page = render_report(
        report(
            dataset(name=evil, settings={evil: evil}, lineage={evil: evil}),
            title=evil,
            device=evil,
            judge=evil,
            versions={evil: evil},
            licences=[{"part": evil, "licence": evil, "source": evil}],
        ),
        {f"{evil}.png": PNG},
    )
    assert "<script" not in page and 'alert("x")' not in page
    assert "".join(Page(page).words).count(evil) >= 12


def test_report_shows_lineage_licences_versions_and_definitions():
    page = Page(
        render_report(
            report(
                dataset(lineage={"contexts": "aa11", "samples": "bb22"}),
                dataset(w=0.5, lineage={"contexts": "aa11", "samples": "cc33"}),
                licences=[{"part": "generator", "licence": "CC BY-NC-SA 4.0", "source": "IDiff-Face"}],
            ),
            {},
        )
    )
    assert page.row("contexts") == ["contexts", "aa11", "aa11"] and page.row("samples")[2] == "cc33"
    assert page.row("generator") == ["generator", "CC BY-NC-SA 4.0", "IDiff-Face"]
    assert page.row("torch") == ["torch", "2.13.0"]
    text = "".join(page.words)
    for figure in FIGURES:
        assert (figure.definition in text) == (not figure.optional)


@pytest.mark.parametrize("missing", [None, float("nan"), float("inf")])
def test_figures_that_do_not_exist_are_not_numbers(missing):
    page = Page(render_report(report(dataset(), dataset(fdr=missing, eer=missing)), {}))
    assert page.row("FDR") == ["FDR", "2.00", "n/a"]
    page = Page(render_report(report(dataset(fdr=missing), dataset(fdr=3.0)), {}))
    assert page.row("FDR") == ["FDR", "n/a", "3.00"]


@pytest.mark.parametrize("key", ["device", "versions", "seconds", "datasets"])
def test_missing_keys_are_named(key):
    broken = report()
    del broken[key]
    with pytest.raises(NegFaceDiffError, match=key):
        check_report(broken)


def test_missing_figures_are_named():
    broken = dataset()
    del broken["fdr"], broken["steps"]
    with pytest.raises(NegFaceDiffError, match=r"datasets\[1\].steps, datasets\[1\].fdr"):
        render_report(report(dataset(), broken), {})
    with pytest.raises(NegFaceDiffError, match="any dataset"):
        render_report(report() | {"datasets": []}, {})
