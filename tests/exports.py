"""Exports of a small store in this process, and what tests ask of them."""

import shutil

from flows import export as flow
from negfacediff_core.export.settings import ExportConfig
from negfacediff_core.store.runs import read_run, write_run

ONE = flow.DEFAULT_EXECUTION.model_copy(update={"workers": 1})


def finished_run(tiny_build, tiny_store, folder):
    """A store in the folder with a finished run of 5 identities x 3 images, of which some show no face."""
    store = shutil.copytree(tiny_store, folder / "store")
    record = read_run(str(store), "tiny")
    write_run(str(store), "tiny", {**record, "config": tiny_build.model_dump(mode="json"), "seconds": 1.0})
    return store


def export(store, out, **asked):
    """Export in this process, without Prefect around it."""
    return flow.export_dataset.fn("tiny", str(out), ExportConfig(**asked), execution=ONE, store=str(store))


def contents(folder):
    """All files of a folder by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ignored(done, total):
    """Progress that nobody looks at."""
