"""What an export outlives: kills, power failures, disks that forget, and another in its place."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from exports import contents, export, finished_run, ignored

from flows import export as flow
from negfacediff_core.errors import ConfigError, DamagedError, StoreError
from negfacediff_core.export import draft
from negfacediff_core.export.manifest import check_manifest


@pytest.fixture(autouse=True)
def no_sync(monkeypatch):
    """Tests end before the power fails, and other programs' files are not theirs to wait for."""
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture(scope="module")
def store(tiny_build, tiny_store, tmp_path_factory):
    """A finished run of 5 identities x 3 images, of which some show no face."""
    return finished_run(tiny_build, tiny_store, tmp_path_factory.mktemp("export"))


@pytest.mark.parametrize("form", ["imagefolder", "rec", "webdataset", "huggingface"])
def test_an_export_that_was_cut_short_goes_on(store, tmp_path, monkeypatch, form):
    monkeypatch.setitem(flow.FORMATS, form, flow.FORMATS[form]._replace(piece=1))
    monkeypatch.setattr(flow, "CHECKPOINT", 0.0)
    export(store, tmp_path / "whole", format=form)
    whole = contents(tmp_path / "whole")
    written, made = flow.written_pieces, []

    def dying(*arguments):
        # each run writes one piece, notes it, and dies in the midst of the next
        return written_until(written, made, *arguments)

    monkeypatch.setattr(flow, "written_pieces", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            export(store, tmp_path / "out", format=form)
        assert not (tmp_path / "out").exists()
        for path in (tmp_path / "out.partial").glob("*.*"):
            if path.suffix in (".rec", ".tar", ".csv"):
                path.write_bytes(path.read_bytes() + b"torn")
    monkeypatch.setattr(flow, "written_pieces", written)
    export(store, tmp_path / "out", format=form)
    assert contents(tmp_path / "out") == whole
    assert made == [0, 1] and not (tmp_path / "out.partial").exists()


def written_until(written, made, job, folder, workers, pieces):
    """As `written_pieces`, but die before the second piece."""

    @contextmanager
    def first_alone():
        with written(job, folder, workers, pieces) as results:

            def until():
                made.append(pieces[0].number)
                yield next(iter(results))
                raise KeyboardInterrupt

            yield until()

    return first_alone()


@pytest.mark.parametrize("removed", [0, 1, 2])
def test_an_export_that_was_cut_short_at_its_end_goes_on(store, tmp_path, monkeypatch, removed):
    export(store, tmp_path / "whole")
    unlink, left = Path.unlink, iter(range(removed))

    def dying(path, **options):
        if path.name.startswith(".") and next(left, None) is None:
            raise KeyboardInterrupt
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dying)
        with pytest.raises(KeyboardInterrupt):
            export(store, tmp_path / "out")
    assert (tmp_path / "out.partial" / ".state.json").exists() == (removed == 0)
    export(store, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("form", ["imagefolder", "huggingface"])
def test_images_that_a_power_failure_has_taken_are_written_again(store, tmp_path, monkeypatch, form):
    monkeypatch.setitem(flow.FORMATS, form, flow.FORMATS[form]._replace(piece=1))
    export(store, tmp_path / "whole", format=form)
    whole = contents(tmp_path / "whole")
    written = flow.written_pieces
    monkeypatch.setattr(flow, "_complete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(store, tmp_path / "out", format=form)
    first, second, *_ = sorted(path for path in whole if path.startswith(("images/", "data/")))
    (tmp_path / "out.partial" / first).write_bytes(b"")
    (tmp_path / "out.partial" / second).unlink()
    made = []

    def counted(job, folder, workers, pieces):
        made.extend(piece.number for piece in pieces)
        return written(job, folder, workers, pieces)

    monkeypatch.undo()
    monkeypatch.setitem(flow.FORMATS, form, flow.FORMATS[form]._replace(piece=1))
    monkeypatch.setattr(flow, "written_pieces", counted)
    export(store, tmp_path / "out", format=form)
    assert contents(tmp_path / "out") == whole and list(check_manifest(tmp_path / "out", ignored)) == []
    assert made and made[0] == 0 and len(made) <= 2


def interrupted(*arguments):
    """The process is killed here."""
    raise KeyboardInterrupt


def test_a_disk_that_does_not_keep_an_image_is_noticed_at_once(store, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pread", lambda handle, length, offset: bytes(length - 1))
    with pytest.raises(DamagedError, match=r"\.png does not hold what was written there"):
        export(store, tmp_path / "out")


def test_few_files_are_open_at_a_time(tmp_path):
    with draft.draft(tmp_path / "out", "plan") as begun:
        for number in range(5):
            begun.append({f"shard-{number}.tar": bytes(number + 1), "labels.csv": b"line"}, [])
        # the last shard, the labels, and a lock and two lists of the draft's own
        held = {path.resolve() for path in Path("/proc/self/fd").iterdir()}
        names = {path.name for path in begun.folder.iterdir() if path in held}
        assert names == {".lock", ".own", ".sums", "labels.csv", "shard-4.tar"}
        begun.checkpoint()
    for number in range(5):
        path = tmp_path / "out.partial" / f"shard-{number}.tar"
        path.write_bytes(path.read_bytes() + b"torn")
    with draft.draft(tmp_path / "out", "plan") as begun:
        assert begun.pieces == 5
        assert [path.stat().st_size for path in sorted(begun.folder.glob("*.tar"))] == [1, 2, 3, 4, 5]


def test_errors_of_other_places_are_not_said_to_be_the_exports(tmp_path):
    with pytest.raises(FileNotFoundError), draft.draft(tmp_path / "out", "plan"):
        (tmp_path / "elsewhere").read_bytes()
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(StoreError, match=r"cannot write .*out.partial.*: a file stands where"),
        draft.draft(tmp_path / "file" / "out", "plan"),
    ):
        pass


def test_the_same_again_does_nothing_and_another_is_refused(store, tmp_path, monkeypatch):
    export(store, tmp_path / "out")
    before = contents(tmp_path / "out")
    monkeypatch.setattr(flow, "written_pieces", None)
    export(store, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    with pytest.raises(ConfigError, match="is there already"):
        export(store, tmp_path / "out", encoding="jpeg")


def test_the_beginning_of_another_export_is_left_alone(store, tmp_path):
    with draft.draft(tmp_path / "out", "another") as begun:
        begun.append({"labels.csv": b"a"}, [])
        begun.checkpoint()
    with pytest.raises(ConfigError, match="beginning of another export"):
        export(store, tmp_path / "out")
    with draft.draft(tmp_path / "out", "another") as begun:
        assert begun.pieces == 1
        with (
            pytest.raises(StoreError, match="another process is writing"),
            draft.draft(tmp_path / "out", "another"),
        ):
            pass
    (tmp_path / "out.partial" / ".state.json").write_text("{")
    with pytest.raises(StoreError, match="damaged: remove"), draft.draft(tmp_path / "out", "another"):
        pass


def test_a_disk_that_forgets_is_noticed(store, tmp_path, monkeypatch):
    finish = flow.FORMATS["rec"].finish

    def forgetting(folder, layout):
        finish(folder, layout)
        content = bytearray((folder / "labels.csv").read_bytes())
        content[40] ^= 1
        (folder / "labels.csv").write_bytes(content)

    monkeypatch.setitem(flow.FORMATS, "rec", flow.FORMATS["rec"]._replace(finish=forgetting))
    with pytest.raises(DamagedError, match=r"labels.csv does not hold what was written"):
        export(store, tmp_path / "out", format="rec")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_a_killed_export_goes_on_and_leaves_no_process(store, tmp_path):
    script = "\n".join(
        (
            "import sys",
            "from flows import export as flow",
            "from negfacediff_core.export.settings import ExportConfig",
            "if __name__ == '__main__':",
            "    flow.FORMATS['rec'] = flow.FORMATS['rec']._replace(piece=1)",
            "    flow.CHECKPOINT = 0.0",
            "    two = flow.DEFAULT_EXECUTION.model_copy(update={'workers': 2})",
            "    settings = ExportConfig(format='rec')",
            "    flow.export_dataset.fn('tiny', sys.argv[2], settings, execution=two, store=sys.argv[1])",
        )
    )
    command = [sys.executable, "-c", script, str(store)]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    process = subprocess.Popen([*command, str(tmp_path / "out")], start_new_session=True)
    while not (tmp_path / "out.partial" / "train.rec").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while _alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(process.pid)
    subprocess.run([*command, str(tmp_path / "out")], check=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _alive(session):
    """Whether a process of the session still runs."""
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True
