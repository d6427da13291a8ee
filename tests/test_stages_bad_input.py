"""Bad input of a build is refused in one clear sentence before anything is written."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import yaml
from stage_builds import EXECUTION, changed, make

from negfacediff_core.errors import ConfigError, StoreError, WeightsError
from negfacediff_core.stages.build import plan_build, run_unit
from negfacediff_core.store.layout import Unit


def refused(build, store, error, match):
    with pytest.raises(error, match=match):
        plan_build(build, str(store))
    assert not Path(store).exists(), "nothing may be written before the inputs are good"


@pytest.mark.parametrize(
    "field", ["samples__generator", "aligned__detector", "embeddings__judge", "contexts__file"]
)
def test_missing_weights_are_named(field, tiny_build, tmp_path):
    changes = {field: "packs/nothing-here"}
    if field.startswith("contexts"):
        changes["contexts__source"] = "file"
    refused(changed(tiny_build, **changes), tmp_path / "store", WeightsError, "packs/nothing-here")


def test_corrupt_weights_are_named(tiny_build, tiny_pack, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_pack, broken)
    checkpoint = broken / "generator" / "checkpoints" / "ema_averaged_model.ckpt"
    for file in (checkpoint, broken / "faces" / "detector.onnx", broken / "judge" / "judge.onnx"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    store = tmp_path / "store"
    for field, part, name in (
        ("samples__generator", "generator", "ema_averaged_model"),
        ("aligned__detector", "faces", "detector"),
        ("embeddings__judge", "judge", "judge"),
    ):
        refused(changed(tiny_build, **{field: str(broken / part)}), store, WeightsError, name)


def test_the_judge_must_not_be_the_generators_own_recogniser(tiny_build, tiny_pack, tmp_path):
    generator = tmp_path / "generator"
    shutil.copytree(tiny_pack / "generator", generator)
    config = generator / ".hydra" / "config.yaml"
    content = yaml.safe_load(config.read_text())
    judge = (tiny_pack / "judge" / "judge.onnx").read_bytes()
    content["constants"]["conditioner_sha256"] = hashlib.sha256(judge).hexdigest()
    config.write_text(yaml.safe_dump(content))
    build = changed(tiny_build, samples__generator=str(generator))
    refused(build, tmp_path / "store", ConfigError, "would judge its own work")


def test_settings_that_do_not_fit_the_weights_are_refused(tiny_build, tmp_path):
    store = tmp_path / "store"
    refused(
        changed(tiny_build, samples__steps=51), store, ConfigError, r"samples\.steps is 51.* 50 timesteps"
    )
    # DPM-Solver++ goes between timesteps, of which there is one fewer.
    whole = changed(tiny_build, samples__sampler="dpm_solver", samples__steps=50)
    refused(whole, store, ConfigError, r"samples\.steps is 50.* dpm_solver takes 49")
    assert plan_build(changed(tiny_build, samples__steps=50), str(tmp_path / "other"))
    refused(changed(tiny_build, negatives__pool=1), store, ConfigError, r"negatives\.pool is 1")


def test_a_store_that_cannot_be_written_is_refused(tiny_build, tmp_path):
    (tmp_path / "store").write_text("a file stands here")
    with pytest.raises(StoreError, match="a file stands where a folder is needed"):
        plan_build(tiny_build, str(tmp_path / "store"))


def test_weights_that_change_under_a_build_are_refused(tiny_build, tiny_pack, tmp_path):
    pack = tmp_path / "pack"
    shutil.copytree(tiny_pack, pack)
    build = changed(tiny_build, samples__generator=str(pack / "generator"), samples__seed=1)
    specs = make(build, tmp_path / "store", stages=("contexts", "negatives"))
    config = pack / "generator" / ".hydra" / "config.yaml"
    config.write_text(config.read_text() + "\n# another\n")
    os.utime(config, ns=(1, 1))
    spec = specs["samples"]
    from negfacediff_core.stages import models, samples

    models._generator.cache_clear()
    samples._cached_engine.cache_clear()
    with pytest.raises(WeightsError, match=r"samples 00000-000: .* has changed since this build was planned"):
        run_unit(spec, Unit(0, 0), EXECUTION)
