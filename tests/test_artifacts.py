"""What Prefect shows of a run: that it moves, what a finished build leaves there, and what failed."""

import base64
import io
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from flows import artifacts
from flows.artifacts import data_url, key_of, progress_artifacts
from flows.build import build_dataset
from flows.progress import Meter
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import BuildError, PlaceError
from negfacediff_core.stages import samples
from negfacediff_core.stages.build import run_unit
from tasks import chunks

ONE = ExecutionConfig(workers=1, device="cpu", retries=0)


def shown(flow_run_id) -> dict[str, object]:
    """The artifacts of a flow run, by key."""
    mine = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
    with get_client(sync_client=True) as client:
        return {one.key: one for one in client.read_artifacts(artifact_filter=mine)}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "PERIOD", 0.05)


@flow(name="moving")
def moving(meters: list[Meter], steps: int) -> None:
    with progress_artifacts("My run", meters):
        for _ in range(steps):
            for meter in meters:
                meter.start()
                meter.advance(1)
            time.sleep(0.02)


def test_each_stage_has_a_bar_that_ends_where_the_stage_does(prefect_server, quick):
    meters = [Meter("samples", "images", total=20), Meter("aligned", "images", total=40, before=10)]
    state = moving([*meters, Meter("scores", "identities", total=0)], 20, return_state=True)
    bars = shown(state.state_details.flow_run_id)
    assert bars.keys() == {"my-run-samples", "my-run-aligned"}
    assert (bars["my-run-samples"].data, bars["my-run-aligned"].data) == (100, 75)
    assert bars["my-run-samples"].description.startswith("100%: ")
    assert bars["my-run-aligned"].description.endswith("left; 30 of 40 images")


def test_a_bar_moves_while_the_run_does(prefect_server, quick, monkeypatch):
    told = []
    update = artifacts.update_progress_artifact
    monkeypatch.setattr(
        artifacts,
        "update_progress_artifact",
        lambda made, percent, text: (told.append((percent, text)), update(made, percent, text)),
    )
    moving([Meter("samples", "images", total=30)], 30)
    percents = [percent for percent, _ in told]
    assert percents == sorted(percents) and len(set(percents)) >= 3
    assert any("images/s" in text and "left" in text for _, text in told)


@pytest.mark.parametrize("trouble", ["refuses", "hangs"])
def test_a_server_that_shows_nothing_neither_fails_a_run_nor_holds_it(
    prefect_server, quick, monkeypatch, trouble
):
    hung = threading.Event()

    def create(*arguments):
        if trouble == "hangs":
            hung.wait(60)
        raise OSError("the server is down")

    monkeypatch.setattr(artifacts, "create_progress_artifact", create)
    monkeypatch.setattr(artifacts, "PATIENCE", 0.2)
    begun = time.monotonic()
    state = moving([Meter("samples", "images", total=5)], 5, return_state=True)
    hung.set()
    assert state.is_completed()
    assert time.monotonic() - begun < 20


def test_big_pictures_are_shrunk_and_small_ones_stay():
    noise = np.random.default_rng(0).integers(0, 256, (2400, 800, 3), np.uint8)
    for side, kind in ((2, "png"), (2400, "webp")):
        buffer = io.BytesIO()
        Image.fromarray(noise[:side]).save(buffer, "PNG")
        head, _, data = data_url(buffer.getvalue()).partition(",")
        assert head == f"data:image/{kind};base64"
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert picture.format == kind.upper() and max(picture.size) <= artifacts.SIDE
        assert kind == "png" or len(data) < len(buffer.getvalue()) / 2


@pytest.mark.parametrize(
    ("words", "key"),
    [(("demo",), "demo"), (("A.b_c", "samples"), "a-b-c-samples"), (("far and none",), "far-and-none")],
)
def test_keys_are_what_prefect_takes(words, key):
    assert key_of(*words) == key


def test_a_finished_build_shows_figures_pictures_licences_and_where_its_report_is(
    tiny_build, tmp_path, prefect_server
):
    state = build_dataset(tiny_build, ONE, str(tmp_path), return_state=True)
    assert state.message.startswith("15 images of 5 identities, from ")
    by_key = shown(state.state_details.flow_run_id)
    page = Path(state.result()["stages"]["evaluation"], "report.html")
    assert str(page) in by_key["tiny-report"].data and page.exists()
    text = by_key["tiny"].data
    found = [
        text.index(part)
        for part in (
            "15 images",
            str(page),
            "| FDR |",
            "data:image/",
            "| Faces found",
            "### Licences",
            "### Lineage",
        )
    ]
    assert found == sorted(found)
    assert "samples: generator" in text
    assert by_key["tiny-samples"].data == 100


def test_a_build_whose_artifacts_are_refused_is_complete_all_the_same(
    tiny_build, tmp_path, prefect_server, monkeypatch
):
    def refuse(*arguments):
        raise OSError("too large")

    monkeypatch.setattr(artifacts, "create_markdown_artifact", refuse)
    monkeypatch.setattr(artifacts, "create_link_artifact", refuse)
    assert build_dataset(tiny_build, ONE, str(tmp_path), return_state=True).is_completed()


def test_units_that_failed_are_listed_with_why_and_how_to_go_on(
    tiny_build, tmp_path, prefect_server, monkeypatch
):
    def poisoned(spec, unit, execution):
        if (spec.name, unit.name) == ("samples", "00001-000"):
            raise OSError("a | b\nlasting trouble")
        return run_unit(spec, unit, execution)

    monkeypatch.setattr(chunks, "run_unit", poisoned)
    state = build_dataset(tiny_build, ONE, str(tmp_path), return_state=True)
    assert state.is_failed()
    resume = f"negfacediff resume {tmp_path} tiny"
    for word in ("samples 00001-000", "lasting trouble", resume, "resume-failed/resume-failed", "Retry"):
        assert word in state.message
    text = shown(state.state_details.flow_run_id)["tiny-failed"].data
    (row,) = [line for line in text.splitlines() if line.startswith("| samples")]
    assert "00001-000" in row and "a \\| b lasting trouble" in row and "logs/00001-000.txt" in row
    assert resume in text and f"store `{tmp_path}` and run `tiny`" in text


@pytest.mark.slow
def test_images_that_failed_are_counted_in_a_build_that_is_complete(
    tiny_build, tmp_path, prefect_server, monkeypatch
):
    engine_of = samples._engine

    class Broken:
        """An engine that makes no numbers of the first image."""

        def __init__(self, engine):
            self.engine = engine

        def __getattr__(self, name):
            return getattr(self.engine, name)

        def sample(self, towards, away, shares, identities, replicates, seed):
            images, clipped = self.engine.sample(towards, away, shares, identities, replicates, seed)
            clipped[(identities == 0) & (replicates == 0)] = np.nan
            return images, clipped

    monkeypatch.setattr(samples, "_engine", lambda *arguments: Broken(engine_of(*arguments)))
    state = build_dataset(tiny_build, ONE, str(tmp_path), return_state=True)
    assert state.is_completed()
    assert f"1 image failed: to make them again, negfacediff retry-failed {tmp_path} tiny" in state.message
    text = shown(state.state_details.flow_run_id)["tiny-failed"].data
    assert "| samples | 00000-000 | 1 |" in text and "image 0 of identity 0" in text


def test_a_build_that_cannot_write_says_how_to_go_on(tiny_build, tmp_path, prefect_server, monkeypatch):
    def full(spec, unit, execution):
        raise PlaceError("The disk is full.")

    monkeypatch.setattr(chunks, "run_unit", full)
    with pytest.raises(BuildError, match=r"The disk is full\. What is committed stays.*negfacediff resume"):
        build_dataset(tiny_build, ONE, str(tmp_path))
