"""Every preset that ships is sampled for real: tiny, with random weights of a thousand timesteps."""

import numpy as np
import pytest
import yaml
from conftest import save_tiny_generator
from face_networks import save_recogniser

from flows import presets
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.stages.build import plan_build, run_unit
from negfacediff_core.store.records import pending
from negfacediff_core.store.shards import prepare, read_arrays, read_rows


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    save_tiny_generator(folder, T=1000)
    return folder


# All thousand steps, a minute each, or the fields of negfacediff with another evaluation.
LONG = ("adaptdiff", "negfacediff-ddpm", "frcsyn-500k", "sdfr-1m", "datacv-10k", "datacv-20k", "datacv-100k")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in presets.preset_texts()],
)
def test_every_preset_makes_its_images(name, release, tiny_pack, tmp_path):
    values = yaml.safe_load(presets.preset_texts()[name])
    tiny = {
        "identities": 3,
        "images": 1,
        "block_identities": 3,
        "block_images": 1,
        "samples.generator": release,
        "aligned.detector": tiny_pack / "faces",
        "embeddings.judge": tiny_pack / "judge",
    }
    if values["embeddings"].get("recogniser"):
        tiny["embeddings.recogniser"] = save_recogniser(tmp_path / "recogniser", tiny_pack)
    if values["negatives"].get("pool"):
        tiny["negatives.pool"] = 3
    if values["contexts"]["source"] == "file":
        tiny["contexts.file"] = tmp_path / "contexts.npz"
        np.savez(tiny["contexts.file"], contexts=np.random.default_rng(0).standard_normal((3, 16)))
    build = presets.load_build(name, [f"{field}={value}" for field, value in tiny.items()])
    specs = {spec.name: spec for spec in plan_build(build, str(tmp_path / "store"))}
    for stage in ("contexts", "negatives", "samples"):
        prepare(specs[stage])
        for unit in pending(specs[stage]):
            run_unit(specs[stage], unit, ExecutionConfig(device="cpu"))
    (unit,) = specs["samples"].grid.units()
    images, rows = read_arrays(specs["samples"], unit)["image"], read_rows(specs["samples"], unit)
    assert images.shape == (3, 1, 32, 32, 3) and images.std() > 10
    assert len(np.unique(images.reshape(3, -1), axis=0)) == 3
    assert rows.column("status").to_pylist() == ["ok"] * 3
    for column in ("sampler", "steps"):
        assert set(rows.column(column).to_pylist()) == {values["samples"][column]}
    assert (set(rows.column("negative").to_pylist()) == {-1}) == (values["negatives"]["rule"] == "none")


def test_the_published_presets_differ_from_each_other_as_they_say():
    builds = {name: presets.load_build(name).model_dump() for name in presets.preset_texts()}

    def differences(one, other):
        return {
            f"{section}.{field}"
            for section, fields in builds[one].items()
            if isinstance(fields, dict)
            for field, value in fields.items()
            if builds[other][section][field] != value
        }

    assert differences("negfacediff", "negfacediff-paper") == {"samples.ddim_alpha", "samples.precision"}
    assert differences("negfacediff", "fast") == {"samples.sampler", "samples.steps"}
    assert differences("negfacediff-ddpm", "adaptdiff") == {"samples.w", "samples.weight"}
    assert differences("negfacediff", "idiff-face") == {"negatives.rule", "negatives.pool", "samples.w"}
