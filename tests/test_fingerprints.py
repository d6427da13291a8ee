"""Fingerprints: what changes the result moves its place, and nothing else does."""

import shutil
from dataclasses import fields

import numpy as np
import pytest
from context_material import save_generator_with_empty_context, save_pack, save_pictures
from pydantic import BaseModel
from stage_builds import changed

from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.diffusion.engine import SamplerSettings
from negfacediff_core.stages import STAGES, plan_build

# What the sources of contexts that embed images must be given.
FOLDER = {"contexts__source": "folder", "contexts__folder": "FILE", "contexts__recogniser": "FILE"}
TWO_STAGE = {
    "contexts__source": "two_stage",
    "contexts__generator": "FILE",
    "contexts__recogniser": "FILE",
    "contexts__steps": 3,
}
# By field: another value, the first stage that must move (None: nothing may), and what else must be set for
# the field to matter at all.
FIELDS = {
    "name": ("other", None, {}),
    "identities": (6, "evaluation", {"negatives__pool": 5}),
    "images": (4, "evaluation", {}),
    "block_identities": (3, None, {}),
    "block_images": (3, None, {}),
    "contexts__source": ("fitted", "contexts", {"contexts__file": "FILE"}),
    "contexts__file": ("OTHER", "contexts", {"contexts__source": "file", "contexts__file": "FILE"}),
    "contexts__folder": ("OTHER", "contexts", FOLDER),
    "contexts__recogniser": ("OTHER", "contexts", FOLDER),
    "contexts__detector_size": (64, "contexts", FOLDER),
    "contexts__generator": ("OTHER", "contexts", TWO_STAGE),
    "contexts__steps": (4, "contexts", TWO_STAGE),
    "contexts__margin": (0.1, "contexts", {"contexts__source": "mixup", "contexts__file": "FILE"}),
    "contexts__packing_steps": (7, "contexts", {"contexts__source": "packed"}),
    "contexts__count": (9, "contexts", {"contexts__source": "packed"}),
    "contexts__max_cosine": (0.9, "contexts", {"contexts__count": 5, "contexts__max_cosine": 0.8}),
    "contexts__seed": (1, "contexts", {}),
    "negatives__rule": ("close", "negatives", {}),
    "negatives__count": (2, "negatives", {}),
    "negatives__weights": ("rank", "negatives", {"negatives__count": 2}),
    "negatives__pool": (4, "negatives", {}),
    "negatives__rand": ("ring", "negatives", {"negatives__rule": "rand"}),
    "negatives__mid": ("paper", "negatives", {"negatives__rule": "mid"}),
    "negatives__seed": (1, "negatives", {"negatives__rule": "rand"}),
    "samples__generator": ("OTHER", "samples", {}),
    "samples__sampler": ("dpm_solver", "samples", {}),
    "samples__steps": (3, "samples", {}),
    "samples__eta": (0.5, "samples", {}),
    "samples__w": (1.0, "samples", {}),
    "samples__weight": ("adaptive", "samples", {}),
    "samples__curve": ("0:1 1:0.2", "samples", {"samples__weight": "piecewise", "samples__curve": "0:1 1:0"}),
    "samples__cfg": (1.0, "samples", {"samples__generator": "FILE"}),
    "samples__interval_low": (0.2, "samples", {}),
    "samples__interval_high": (0.8, "samples", {}),
    "samples__transform": ("idperturb", "samples", {}),
    "samples__lower_bound": (0.5, "samples", {"samples__transform": "idperturb"}),
    "samples__safe": (True, "samples", {"samples__transform": "idperturb"}),
    "samples__ddim_alpha": ("paper", "samples", {}),
    "samples__final_noise": ("paper", "samples", {"samples__sampler": "ddpm"}),
    "samples__precision": ("bf16", "samples", {}),
    "samples__seed": (1, "samples", {}),
    "aligned__detector": ("OTHER", "aligned", {}),
    "aligned__detector_size": (64, "aligned", {}),
    "aligned__threshold": (0.6, "aligned", {}),
    "aligned__template": ("legacy", "aligned", {}),
    "embeddings__judge": ("OTHER", "embeddings", {}),
    "embeddings__flip": (True, "embeddings", {}),
    "evaluation__protocol": ("paper", "evaluation", {}),
    "evaluation__bootstrap": (11, "evaluation", {}),
    "evaluation__seed": (1, "evaluation", {}),
}


#: Fields that choose which others matter.
KINDS = ("samples__sampler", "negatives__rule", "negatives__rand", "samples__w")


def all_fields(model, prefix=""):
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from all_fields(field.annotation, f"{prefix}{name}__")
        else:
            yield prefix + name


def test_the_table_of_fields_is_complete():
    assert set(FIELDS) == set(all_fields(BuildConfig))
    sampled = {name.removeprefix("samples__") for name in FIELDS if name.startswith("samples__")}
    settings = {field.name for field in fields(SamplerSettings)} - {"interval"}
    assert settings | {"interval_low", "interval_high"} <= sampled


@pytest.fixture(scope="module")
def others(tiny_pack, tmp_path_factory):
    """Other weights and files: the same kinds, other bytes."""
    folder = tmp_path_factory.mktemp("others")
    shutil.copytree(tiny_pack, folder / "pack")
    config = folder / "pack" / "generator" / ".hydra" / "config.yaml"
    config.write_text(config.read_text() + "\n# another\n")
    for file in (folder / "pack" / "faces" / "detector.onnx", folder / "pack" / "judge" / "judge.onnx"):
        # An unknown field of the protocol buffer: another file, the same network.
        file.write_bytes(file.read_bytes() + bytes([0xF8, 0x3F, 1]))
    rng = np.random.default_rng(0)
    for number, (name, pack) in enumerate({"FILE": tiny_pack, "OTHER": folder / "pack"}.items()):
        place = folder / name
        save_pictures(place / "folder", range(7 + number))
        save_pack(place / "recogniser", pack)
        save_generator_with_empty_context(place / "generator", pack, value=number)
        np.savez(place / "file", contexts=rng.standard_normal((9, 16)).astype(np.float32))
    return folder


@pytest.mark.parametrize("field", FIELDS)
def test_only_what_changes_the_result_moves_its_place(field, tiny_build, others, tmp_path):
    value, first, setting = FIELDS[field]
    places = {"samples__generator": "generator", "aligned__detector": "faces", "embeddings__judge": "judge"}

    def real(key, value):
        if value not in ("FILE", "OTHER"):
            return value
        if key in places and value == "OTHER":
            return str(others / "pack" / places[key])
        (found,) = (others / value).glob(f"{key.partition('__')[2]}*")
        return str(found)

    before = {key: real(key, each) for key, each in setting.items()}
    if field == "contexts__source":
        before["contexts__source"] = "file"
    base = changed(tiny_build, **before)
    other = changed(base, **{field: real(field, value)})
    pairs = zip(plan_build(base, str(tmp_path)), plan_build(other, str(tmp_path)), strict=True)
    moved = [old.name for old, new in pairs if old.fingerprint != new.fingerprint]
    names = list(STAGES)
    assert moved == ([] if first is None else names[names.index(first) :])


def test_how_a_build_runs_is_no_part_of_it():
    assert not set(ExecutionConfig.model_fields) & set(BuildConfig.model_fields)


@pytest.mark.parametrize(
    "changes",
    [
        {"samples__sampler": "ddpm", "samples__steps": 7},
        {"samples__sampler": "ddpm", "samples__eta": 0.5},
        {"negatives__seed": 5, "negatives__rand": "ring"},
        {"negatives__rule": "null", "negatives__pool": 4},
        {"negatives__rule": "rand", "negatives__rand": "ring", "negatives__seed": 5},
        {"negatives__weights": "rank"},
        {"samples__lower_bound": 0.3},
        {
            "samples__w": 0.0,
            "samples__weight": "piecewise",
            "samples__curve": "0:1 1:0",
            "samples__interval_low": 0.2,
        },
    ],
)
def test_settings_without_effect_move_nothing(changes, tiny_build, tmp_path):
    kept = {key: value for key, value in changes.items() if key in KINDS}
    without = plan_build(changed(tiny_build, **kept), str(tmp_path))
    together = plan_build(changed(tiny_build, **changes), str(tmp_path))
    assert [spec.fingerprint for spec in without] == [spec.fingerprint for spec in together]
