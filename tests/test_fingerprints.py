"""Fingerprints: what changes the result moves its place, and nothing else does."""

import inspect
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from context_material import save_generator_with_empty_context, save_pack, save_pictures
from face_networks import save_linear
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from stage_builds import changed, planned

from negfacediff_core import config
from negfacediff_core.config import BuildConfig, ExecutionConfig, LeakageConfig
from negfacediff_core.diffusion.engine import SamplerSettings
from negfacediff_core.stages.build import STAGES, plan_build, run_unit
from negfacediff_core.store.shards import read_arrays, read_rows

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
    "samples__spacing": ("time", "samples", {"samples__sampler": "dpm_solver"}),
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
    "embeddings__recogniser": ("OTHER", "embeddings", {"embeddings__recogniser": "FILE"}),
    "embeddings__band_low": (0.1, "embeddings", {"embeddings__recogniser": "FILE"}),
    "embeddings__band_high": (0.5, "embeddings", {"embeddings__recogniser": "FILE"}),
    "embeddings__quality": ("OTHER", "embeddings", {"embeddings__quality": "FILE"}),
    "embeddings__attributes": ("OTHER", "embeddings", {"embeddings__attributes": "FILE"}),
    "evaluation__protocol": ("paper", "evaluation", {}),
    "evaluation__bootstrap": (11, "evaluation", {}),
    "evaluation__match_cosine": (0.3, "evaluation", {}),
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
        recogniser = save_pack(place / "recogniser", pack) / "recogniser.onnx"
        recogniser.write_bytes(recogniser.read_bytes() + bytes([0xF8, 0x3F, 2]))  # not the judge's file
        for network in ("quality", "attributes"):
            save_linear(place / f"{network}.onnx", 1 + (network == "attributes"), seed=number)
        save_generator_with_empty_context(place / "generator", pack, value=number)
        np.savez(place / "file", contexts=rng.standard_normal((9, 16)).astype(np.float32))
    return folder


def from_stage(first):
    """The stages that move with `first`: itself and all that are made of it."""
    names = list(STAGES)
    return [] if first is None else names[names.index(first) :]


def moved_by(before, after, store):
    pairs = zip(plan_build(before, str(store)), plan_build(after, str(store)), strict=True)
    return [old.name for old, new in pairs if old.fingerprint != new.fingerprint]


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
    assert moved_by(base, other, tmp_path) == from_stage(first)


# Where the tiny build takes fewer values than the field does. Its generator has 50 timesteps.
NARROWER = {
    "identities": (5, 60),
    "images": (1, 60),
    "negatives__count": (1, 4),
    "negatives__pool": (5, 60),
    "samples__steps": (1, 50),
}


def numbers_of(name):
    """A strategy for the values of a numeric field, by its declared bounds; None for other fields."""
    *sections, last = name.split("__")
    model = BuildConfig
    for section in sections:
        model = model.model_fields[section].annotation
    field = model.model_fields[last]
    if field.annotation not in (int, float):
        return None
    bounds = {type(bound): bound for bound in field.metadata}
    low = bounds[Ge].ge if Ge in bounds else bounds[Gt].gt
    high = bounds[Le].le if Le in bounds else bounds[Lt].lt
    if field.annotation is float:
        return st.floats(low, high, exclude_min=Gt in bounds, exclude_max=Lt in bounds)
    high -= Lt in bounds
    step = bounds[MultipleOf].multiple_of if MultipleOf in bounds else 1
    low, high = NARROWER.get(name, (low, high))
    return st.integers(-(-low // step), high // step).map(lambda number: number * step)


NUMBERS = {name: found for name in FIELDS if (found := numbers_of(name)) is not None}


@settings(max_examples=60)
@given(data=st.data())
def test_any_two_numbers_of_a_field_have_two_places_or_one(data, tiny_build, tmp_path_factory):
    """As above, for every number that a field takes; those of the context sources that read files aside."""
    name = data.draw(st.sampled_from([name for name in NUMBERS if "FILE" not in FIELDS[name][2].values()]))
    _, first, setting = FIELDS[name]
    values = data.draw(st.tuples(NUMBERS[name], NUMBERS[name]))
    assume(values[0] != values[1])
    if name == "contexts__max_cosine":
        values = [0.8 + abs(value) / 10 for value in values]  # what five contexts can be drawn for
    if name == "contexts__count":
        values = [5 + value % 1000 for value in values]
    assume(values[0] != values[1])
    others = {"negatives__pool": 5} if name == "identities" else {}
    pair = [changed(tiny_build, **{**setting, **others, name: value}) for value in values]
    assert moved_by(*pair, tmp_path_factory.mktemp("store")) == from_stage(first)


def test_how_a_build_runs_is_no_part_of_it():
    assert not set(ExecutionConfig.model_fields) & set(BuildConfig.model_fields)
    assert set(inspect.signature(plan_build).parameters) == {"build", "store"}


#: Every field of how a build runs, with another value than the default.
EXECUTION = {
    "executor": "dask",
    "workers": 3,
    "threads_per_worker": 2,
    "batch_size": 1,
    "device": "cpu",
    "faces_device": "cpu",
    "acceleration": "eager",
    "retries": 0,
    "approve_above_hours": 1.0,
    "calibration": "h100",
    "adaptive": True,
    "accept_licences": True,
}


def test_the_table_of_execution_is_complete():
    models = [
        model
        for _, model in inspect.getmembers(config, inspect.isclass)
        if issubclass(model, config.Model) and model is not config.Model
    ]
    sections = {field.annotation for field in BuildConfig.model_fields.values()}
    # the places of a gate are tried in test_leakage_gate
    assert {model for model in models if model not in sections} == {
        BuildConfig,
        ExecutionConfig,
        LeakageConfig,
    }
    assert set(EXECUTION) == set(ExecutionConfig.model_fields)
    default = ExecutionConfig()
    assert all(getattr(default, name) != value for name, value in EXECUTION.items())


@pytest.fixture(scope="module")
def one_unit(tiny_build, tmp_path_factory):
    """The first samples of the tiny build, made as the defaults say but for the device."""
    return first_samples(tiny_build, ExecutionConfig(device="cpu"), tmp_path_factory.mktemp("one"))


def first_samples(build, execution, store):
    specs = planned(build, store)
    for name in ("contexts", "negatives", "samples"):
        run_unit(specs[name], specs[name].grid.units()[0], execution)
    torch.set_num_threads(1)
    samples = specs["samples"]
    unit = samples.grid.units()[0]
    return samples.path, read_arrays(samples, unit)["image"], read_rows(samples, unit).drop(["clipped"])


@pytest.mark.parametrize("field", EXECUTION)
def test_how_a_build_runs_changes_neither_place_nor_pixels(field, one_unit, tiny_build, tmp_path):
    execution = ExecutionConfig(**{"device": "cpu", field: EXECUTION[field]})
    path, images, rows = first_samples(tiny_build, execution, tmp_path)
    assert path == one_unit[0]
    # Another batch size or number of threads adds in another order.
    assert np.abs(images.astype(int) - one_unit[1]).max() <= (field in ("batch_size", "threads_per_worker"))
    assert rows.equals(one_unit[2])


#: Settings under which a field has no effect, by the settings: fields with other values.
INERT = [
    (
        {"samples__sampler": "ddpm"},
        {
            "samples__steps": 7,
            "samples__eta": 0.5,
            "samples__ddim_alpha": "paper",
            "samples__spacing": "time",
        },
    ),
    ({"samples__sampler": "ddim"}, {"samples__final_noise": "paper", "samples__spacing": "time"}),
    *(
        (
            {"samples__sampler": sampler},
            {"samples__eta": 0.5, "samples__ddim_alpha": "paper", "samples__final_noise": "paper"},
        )
        for sampler in ("dpm_solver", "dpm_solver_2s")
    ),
    (
        {"samples__w": 0.0},
        {"samples__weight": "adaptive", "samples__interval_low": 0.2, "samples__interval_high": 0.7},
    ),
    ({"samples__w": 0.0}, {"samples__weight": "piecewise", "samples__curve": "0:1 1:0"}),
    ({"samples__transform": "none"}, {"samples__lower_bound": 0.3}),
    (
        {"negatives__rule": "null"},
        {
            "negatives__pool": 4,
            "negatives__weights": "rank",
            "negatives__seed": 5,
            "negatives__rand": "ring",
            "negatives__mid": "paper",
        },
    ),
    *(
        (
            {"negatives__rule": rule},
            {"negatives__seed": 5, "negatives__rand": "ring", "negatives__weights": "rank"},
        )
        for rule in ("far", "close", "mid")
    ),
    *(({"negatives__rule": rule}, {"negatives__mid": "paper"}) for rule in ("far", "close", "rand")),
    ({"contexts__source": "file", "contexts__file": "FILE"}, {"contexts__seed": 7}),
    (FOLDER, {"contexts__seed": 7}),
]
# A curve goes with the weight that follows it.
ALONE = [
    (base, name, value)
    for base, inert in INERT
    if "samples__curve" not in inert
    for name, value in inert.items()
]


def set_all(build, changes, others):
    """The build with `changes`, in which FILE stands for one of its kind."""
    real = {
        key: str(next((others / "FILE").glob(f"{key.partition('__')[2]}*"))) if value == "FILE" else value
        for key, value in changes.items()
    }
    return changed(build, **real)


@pytest.mark.parametrize(("base", "inert"), INERT)
def test_settings_without_effect_move_nothing_together(base, inert, tiny_build, others, tmp_path):
    before, after = set_all(tiny_build, base, others), set_all(tiny_build, base | inert, others)
    assert moved_by(before, after, tmp_path) == []


@pytest.mark.parametrize(("base", "name", "value"), ALONE)
def test_settings_without_effect_move_nothing_alone(base, name, value, tiny_build, others, tmp_path):
    before, after = set_all(tiny_build, base, others), set_all(tiny_build, base | {name: value}, others)
    assert moved_by(before, after, tmp_path) == []


# --- weights -----------------------------------------------------------------------------------------------

#: Every field that is a path, with the source that reads it.
PATHS = {
    "contexts__file": {"contexts__source": "file"},
    "contexts__folder": FOLDER,
    "contexts__recogniser": FOLDER,
    "contexts__generator": TWO_STAGE,
    "samples__generator": {},
    "aligned__detector": {},
    "embeddings__judge": {},
    "embeddings__recogniser": {"embeddings__recogniser": "FILE"},
    "embeddings__quality": {"embeddings__quality": "FILE"},
    "embeddings__attributes": {"embeddings__attributes": "FILE"},
}


def test_the_table_of_paths_is_complete():
    assert {name for name, (value, _, _) in FIELDS.items() if value == "OTHER"} == set(PATHS)


@pytest.mark.parametrize("field", PATHS)
def test_the_same_files_elsewhere_move_nothing(field, tiny_build, others, tmp_path):
    given_file = {field: "FILE"} if field.startswith("contexts") else {}
    base = set_all(tiny_build, PATHS[field] | given_file, others)
    section, name = field.split("__")
    path = getattr(getattr(base, section), name)
    copy = tmp_path / "elsewhere" / "copy"
    if Path(path).is_dir():
        shutil.copytree(path, copy)
    else:
        copy = copy.with_suffix(".npz")
        copy.parent.mkdir()
        shutil.copy(path, copy)
    assert moved_by(base, changed(base, **{field: str(copy)}), tmp_path / "store") == []


def another_weight(path):
    """Change one number of a state dict."""
    state = torch.load(path, weights_only=True)
    key = next(key for key, value in state.items() if value.is_floating_point() and "alpha" not in key)
    state[key].view(-1)[0] += 1
    torch.save(state, path)


def another_comment(path):
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(content) + "# the same, in other bytes\n")


@pytest.mark.parametrize(
    ("file", "change", "moves"),
    [
        (".hydra/config.yaml", another_comment, True),
        ("checkpoints/ema_averaged_model.ckpt", another_weight, True),
        ("first_stage_decoder_state_dict.pt", another_weight, True),
        ("first_stage_encoder_state_dict.pt", another_weight, False),  # nothing is encoded
    ],
)
def test_every_file_that_images_depend_on_moves_them(file, change, moves, tiny_build, tmp_path):
    folder = shutil.copytree(tiny_build.samples.generator, tmp_path / "generator")
    change(folder / file)
    after = changed(tiny_build, samples__generator=str(folder))
    assert moved_by(tiny_build, after, tmp_path / "store") == (from_stage("samples") if moves else [])


@pytest.mark.parametrize("stage", STAGES)
def test_code_that_makes_something_else_moves_its_stage(stage, tiny_build, tmp_path, monkeypatch):
    before = plan_build(tiny_build, str(tmp_path))
    module = inspect.getmodule(STAGES[stage].plan)
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    after = plan_build(tiny_build, str(tmp_path))
    moved = [old.name for old, new in zip(before, after, strict=True) if old.fingerprint != new.fingerprint]
    assert moved == from_stage(stage)
