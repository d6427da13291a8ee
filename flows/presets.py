"""From a preset's name or a YAML file, and `field=value` settings, to a checked `BuildConfig`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from reprlib import Repr
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.errors import ConfigError
from negfacediff_core.recognition.recipe import RecogniserConfig

SUFFIXES = (".yaml", ".yml")
# Wrong fields that a message explains; the rest are counted.
NAMED = 5
# What a message shows of a value that somebody typed: a few lines of YAML can stand for gigabytes.
_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 200, 200


def preset_texts() -> dict[str, str]:
    """Return the shipped presets: name -> YAML text, sorted by name."""
    folder = files("deployments") / "presets"
    found = {
        item.name.removesuffix(".yaml"): item for item in folder.iterdir() if item.name.endswith(".yaml")
    }
    return {name: found[name].read_text(encoding="utf-8") for name in sorted(found)}


def headline(text: str) -> str:
    """Return what a preset says of itself: its first line, which is a comment."""
    return text.splitlines()[0].lstrip("# ").rstrip()


def preset_text(name: str) -> str:
    """Return the YAML text of the preset `name`; raises ConfigError, with the nearest name."""
    presets = preset_texts()
    if name not in presets:
        raise ConfigError(
            f"There is no preset {_SHORT.repr(name)}{_nearest(name, presets)} "
            f"Presets are {', '.join(presets)}; a file of your own ends in .yaml."
        )
    return presets[name]


def load_build(source: str, settings: Sequence[str] = ()) -> BuildConfig:
    """Read preset or file `source`, apply `field=value` settings in order, and check the whole.

    Raises ConfigError, naming the field, its value and what is allowed.
    """
    values = read_values(source, preset_text)
    for setting in settings:
        apply_setting(values, setting)
    return check_build(values, source)


def demo_builds() -> list[BuildConfig]:
    """Return the two builds of the demo: the preset, after the same without its negative."""
    preset = load_build("demo")
    values = preset.model_dump()
    plain = {
        **values,
        "name": "demo-none",
        "negatives": {**values["negatives"], "rule": "none"},
        "samples": {**values["samples"], "w": 0.0},
    }
    return [
        check_build(plain, "the demo's build without a negative"),
        check_build({**values, "name": f"demo-{preset.negatives.rule}"}, "the demo's build"),
    ]


def demo_store(out: str) -> str:
    """Return the store of a demo in the folder `out`; raises ConfigError if that is no local folder."""
    if not out or "://" in out:
        raise ConfigError(
            f"--out {out!r} is no local folder; the demo writes its report and pictures to one."
        )
    return str(Path(out) / "store")


def check_build(values: Mapping[str, Any], source: str) -> BuildConfig:
    """Validate the plain `values` of a build, said to come from `source`; raises ConfigError."""
    try:
        return BuildConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, BuildConfig)}") from error


def check_execution(values: Mapping[str, Any]) -> ExecutionConfig:
    """Validate how a build is to be run; raises ConfigError."""
    try:
        return ExecutionConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, ExecutionConfig)) from error


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Say in one paragraph what pydantic found wrong with the fields of `model`."""
    details = error.errors(include_url=False)
    more = [f"And {len(details) - NAMED} more."] if len(details) > NAMED else []
    return " ".join([*(_explain_one(dict(detail), model) for detail in details[:NAMED]), *more])


def fields_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted name, like `samples.steps`, and the field of every setting of `model`."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from fields_of(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def describe_fields(model: type[BaseModel] = BuildConfig) -> list[tuple[str, str, str]]:
    """Return name, default and meaning of every field of a `model`, in order."""
    return [(name, str(info.default), info.description or "") for name, info in fields_of(model)]


def read_values(source: str, shipped: Callable[[str], str]) -> dict[str, Any]:
    """Read the `field: value` lines of a YAML file, or of the text of what is `shipped` by that name.

    Raises ConfigError for what cannot be read, or holds anything else.
    """
    path = Path(source)
    if path.suffix in SUFFIXES:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path with a null byte
            raise ConfigError(
                f"The file {source} cannot be read ({error}): check the path, or name what ships "
                "(`negfacediff presets` lists it)."
            ) from error
    else:
        text = shipped(source)
    values = _parse(text, f"{source} is not YAML")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold `field: value` lines; it holds a {type(values).__name__}.")
    return values


def _parse(text: str, wrong: str) -> Any:
    """Parse YAML of plain values; ConfigError that begins with `wrong` for anything else."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        # besides its own error: impossible dates and numbers, mistyped `!!timestamp`, nesting without end
        raise ConfigError(f"{wrong}: {_clipped(' '.join(str(error).split()))}.") from error


def _clipped(said: str) -> str:
    """Leave out the middle of what another check says, where it repeats a value of any length."""
    return said if len(said) <= 600 else f"{said[:300]} ... {said[-300:]}"


def apply_setting(values: dict[str, Any], setting: str) -> None:
    """Put one `field=value` into the nested `values`; the value is read as a YAML scalar."""
    name, equals, text = setting.partition("=")
    path = name.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(
            f"--set {_SHORT.repr(setting)} is not field=value: write for example --set samples.w=0.3."
        )
    value = _parse(text, f"--set {_SHORT.repr(setting)}: the value is not YAML")
    for part in path[:-1]:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {_SHORT.repr(setting)}: {part} is a single value and has no fields.")
        values = inner
    values[path[-1]] = value


def _explain_one(detail: dict[str, Any], model: type[BaseModel]) -> str:
    name = ".".join(str(part) for part in detail["loc"])
    known = dict(fields_of(model))
    if detail["type"] == "extra_forbidden":
        if model is BuildConfig and name in ExecutionConfig.model_fields:
            return f"{name} is no part of what is built: give it as the option --{name.replace('_', '-')}."
        shown = _SHORT.repr(name)[1:-1]
        of = " recogniser" if model is RecogniserConfig else ""
        return f"there is no field {shown}{_nearest(name, known)} `negfacediff fields{of}` lists all fields."
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{_clipped(message)}."
    message, end = message[0].lower() + message[1:], "."
    if detail["type"] == "enum":
        choices = cast("type[StrEnum]", known[name].annotation)
        end = _nearest(str(detail["input"]), [choice.value for choice in choices])
    elif detail["type"] == "string_pattern_mismatch":
        message = "that is none of the values allowed"  # they follow in words; the pattern says it in signs
    elif detail["type"] == "model_type":
        example = next((f", for example {field}" for field in known if field.startswith(f"{name}.")), "")
        message = f"it has fields of its own: set those{example}"
    meaning = f" {name}: {known[name].description}" if name in known else ""
    return f"{name} is {_SHORT.repr(detail['input'])}, but {message}{end}{meaning}"


def _nearest(word: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """Return the end of a sentence: `; did you mean x?`, or a full stop.

    Of dotted names the last part alone is tried as well.
    """
    near = get_close_matches(word, known, n=1)
    if not near:
        last = {name.split(".")[-1]: name for name in known}
        near = [last[match] for match in get_close_matches(word.split(".")[-1], last, n=1)]
    return f"; did you mean {near[0]}?" if near else "."
