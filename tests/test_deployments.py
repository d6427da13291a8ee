"""The table of deployments: what it lists is there, its forms can be read, and wrong values are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError, validate

from flows.deployments import DEPLOYMENTS, ENTRYPOINTS, prefect_yaml, runner_deployment
from flows.presets import load_build, preset_texts
from negfacediff_core.config import BuildConfig, ExecutionConfig

PROJECT = Path(__file__).parents[1]
SCHEMAS = {
    flow: parameter_schema(load_flow_from_entrypoint(entrypoint)).model_dump_for_openapi()
    for flow, entrypoint in ENTRYPOINTS.items()
}


def boxes(flow):
    """Every box of a flow's form: its name, what the schema says of it, and whether a model is behind it."""
    schema = SCHEMAS[flow]
    models = {flow: schema["properties"]}
    models |= {name: one["properties"] for name, one in schema["definitions"].items() if "properties" in one}
    for model, fields in models.items():
        for name, field in fields.items():
            behind = schema["definitions"].get(field.get("$ref", "").removeprefix("#/definitions/"), {})
            yield f"{model}.{name}", field, behind


def test_the_flows_and_presets_that_are_asked_for_are_in_the_table():
    names = [deployment.full_name for deployment in DEPLOYMENTS]
    assert len(set(names)) == len(names)
    assert {
        *(f"build-dataset/{name}" for name in ("demo", "paper", "adaptdiff", "frcsyn-500k")),
        *(
            f"{name}/{name}"
            for name in (
                "grow-dataset",
                "evaluate",
                "compare",
                "resume-failed",
                "verify-store",
                "export-dataset",
            )
        ),
    } <= set(names)
    for flow, entrypoint in ENTRYPOINTS.items():
        assert load_flow_from_entrypoint(entrypoint).name == flow


def test_prefect_yaml_is_that_of_the_table():
    path = PROJECT / "deployments" / "prefect.yaml"
    assert path.read_text(encoding="utf-8") == prefect_yaml(), "run `python -m flows.deployments`"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert [f"{ENTRYPOINTS[one.flow]}/{one.name}" for one in DEPLOYMENTS] == [
        f"{one['entrypoint']}/{one['name']}" for one in content["deployments"]
    ]
    scheduled = [schedule for one in content["deployments"] for schedule in one.get("schedules", ())]
    assert scheduled and not any(schedule["active"] for schedule in scheduled)
    assert all(schedule["timezone"] == "UTC" for schedule in scheduled)


def test_the_nightly_growth_ends_where_the_demo_has_no_more_contexts():
    nightly = next(one for one in DEPLOYMENTS if one.cron)
    there = np.load(PROJECT / load_build(nightly.parameters["run"], []).contexts.file)["contexts"]
    assert nightly.parameters["until_identities"] == len(there)


@pytest.mark.parametrize("flow", ["export-dataset", "train-recogniser"])
def test_where_files_go_is_asked_and_not_taken_from_the_store(flow):
    form = next(one for one in DEPLOYMENTS if one.flow == flow).form("/data/faces")
    assert "out" not in form and "out" in SCHEMAS[flow]["required"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda one: one.full_name)
def test_a_form_begins_with_values_that_it_takes(deployment):
    form = deployment.form("/data/faces")
    assert validate(form, SCHEMAS[deployment.flow], ignore_required=True) == []
    if deployment.preset:
        assert deployment.preset in preset_texts()
        assert BuildConfig.model_validate(form["build"]) == load_build(deployment.preset)


@pytest.mark.parametrize("flow", ENTRYPOINTS)
def test_every_box_of_a_form_is_described_and_is_of_one_kind(flow):
    seen = 0
    for name, field, behind in boxes(flow):
        seen += 1
        assert field.get("title") or behind.get("title"), name
        assert len(field.get("description") or behind.get("description") or "") > 8, name
        assert not {"anyOf", "oneOf"} & field.keys(), f"{name} would be shown as tabs or JSON"
        assert field.get("type") != "array" or field["items"]["type"] in ("string", "integer"), name
        limits = {"minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"} & field.keys()
        if limits and "." in name and not name.startswith(flow):
            assert "Allowed: " in field["description"], name
    assert seen >= 3


def test_what_is_changed_first_comes_first():
    build = SCHEMAS["build-dataset"]
    order = sorted(build["properties"], key=lambda name: build["properties"][name]["position"])
    assert order == ["store", "build", "execution"]
    fields = list(build["definitions"]["BuildConfig"]["properties"])
    assert fields[:3] == ["name", "identities", "images"] and fields[-1] == "block_images"
    assert list(build["definitions"]["SamplesConfig"]["properties"])[:4] == [
        "generator",
        "w",
        "sampler",
        "steps",
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("build.identities", 1),
        ("build.name", "Faces of 2026"),
        ("build.negatives.rule", "fur"),
        ("build.samples.steps", "many"),
        ("build.aligned.detector_size", 33),
        ("execution.retries", -1),
        ("execution.executor", "spark"),
        ("store", ""),
    ],
)
def test_a_wrong_value_is_refused_at_submission_and_its_field_is_named(field, value):
    form = {"execution": {}, **json.loads(json.dumps(DEPLOYMENTS[0].form("/data/faces")))}
    *boxes_above, name = field.split(".")
    box = form
    for part in boxes_above:
        box = box[part]
    box[name] = value
    with pytest.raises(ValidationError, match=f"field '{field}'"):
        validate(form, SCHEMAS["build-dataset"], raise_on_error=True, ignore_required=True)


@pytest.mark.parametrize("name", sorted(preset_texts()))
def test_a_whole_configuration_is_taken_at_submission(name):
    form = {"build": load_build(name).model_dump(mode="json"), "store": "/data/faces"}
    validate(form, SCHEMAS["build-dataset"], raise_on_error=True, ignore_required=True)


def test_a_box_that_is_left_empty_is_none():
    form = DEPLOYMENTS[0].form("/data/faces")["build"]
    form["embeddings"]["quality"] = ""
    assert BuildConfig.model_validate(form).embeddings.quality is None


def test_a_served_deployment_is_found_by_its_module_wherever_it_runs():
    nightly = next(one for one in DEPLOYMENTS if one.cron)
    made = runner_deployment(nightly, "/data/faces", active=True)
    assert made.entrypoint == "flows.grow.grow_dataset"
    assert made.parameters == nightly.form("/data/faces")
    assert [(schedule.active, schedule.schedule.timezone) for schedule in made.schedules] == [(True, "UTC")]
    assert made.concurrency_limit == 1
    assert made.enforce_parameter_schema


@pytest.mark.parametrize(("variable", "executor"), [("tcp://scheduler:8786",) * 2, ("", "threads")])
def test_forms_of_a_pool_begin_with_the_executor_that_a_variable_names(variable, executor):
    form = yaml.safe_load(prefect_yaml())["deployments"][0]["parameters"]
    assert form["execution"] == {"executor": "{{ $NEGFACEDIFF_EXECUTOR }}"}
    form |= {"store": "/data/faces", "execution": {"executor": variable}}
    assert validate(form, SCHEMAS["build-dataset"], ignore_required=True) == []
    assert ExecutionConfig.model_validate(form["execution"]).executor == executor
