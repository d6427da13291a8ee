"""Check Kubernetes manifests against the API: its client's models, and the schemas of Dask's operator."""

import re
from functools import cache
from importlib.resources import files

import jsonschema
import yaml
from kubernetes import client

PLAIN = {"str": str, "int": int, "float": (int, float), "bool": bool, "object": object}
CRDS = files("dask_kubernetes") / "operator/deployment/helm/dask-kubernetes-operator/crds"


def check(document):
    """Raise AssertionError, ValueError or jsonschema's error unless `document` is an object of the API."""
    kind, version = document["kind"], document["apiVersion"]
    if version == "kubernetes.dask.org/v1":
        _check_dask(document)
        return
    group, _, number = version.rpartition("/")
    found = [
        name for name in dir(client) if re.fullmatch(f"(?:[A-Z][a-z]+)?{number.capitalize()}{kind}", name)
    ]
    assert found, f"there is no {kind} in {version} ({group or 'core'})"
    _check_value(document, min(found, key=len), kind)


def _check_dask(document):
    _validator(document["kind"]).validate(document)
    for part in ("worker", "scheduler"):
        if part in document["spec"]:
            pod = document["spec"][part]["spec"]
            _check_value(pod, "V1PodSpec", f"{document['metadata']['name']}.{part}")


@cache
def _validator(kind):
    # half a megabyte of YAML, which the parser in C reads in a tenth of the time
    definition = yaml.load((CRDS / f"{kind.lower()}.yaml").read_text(), yaml.CSafeLoader)
    (version,) = definition["spec"]["versions"]
    return jsonschema.Draft202012Validator(version["schema"]["openAPIV3Schema"])


def _check_value(value, kind, place):
    """Check a value against a type as the client writes it: str, list[V1Container], dict(str, str), V1Pod."""
    if inner := re.fullmatch(r"[Ll]ist\[(.+)\]", kind):
        assert isinstance(value, list), f"{place} is no list"
        for number, entry in enumerate(value):
            _check_value(entry, inner[1], f"{place}[{number}]")
    elif inner := re.fullmatch(r"[Dd]ict[(\[](\w+), (.+)[)\]]", kind):
        assert isinstance(value, dict), f"{place} is no mapping"
        for key, entry in value.items():
            _check_value(entry, inner[2], f"{place}.{key}")
    elif kind in PLAIN:
        right = isinstance(value, PLAIN[kind]) and (kind == "bool" or not isinstance(value, bool))
        assert right or kind == "object", f"{place} is {value!r}, which is no {kind}"
    else:
        _check_model(value, getattr(client, kind), place)


def _check_model(value, model, place):
    assert isinstance(value, dict), f"{place} is {value!r}, which is no {model.__name__}"
    types = {model.attribute_map[name]: kind for name, kind in model.openapi_types.items()}
    unknown = set(value) - set(types)
    assert not unknown, f"{place} has {unknown}, which a {model.__name__} has not"
    attributes = {name: value.get(key) for name, key in model.attribute_map.items()}
    model(**attributes)  # raises ValueError where something is missing
    for key, entry in value.items():
        _check_value(entry, types[key], f"{place}.{key}")
