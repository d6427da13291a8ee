"""The command line: documented throughout, and one paragraph for everything that a user can mend."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings
from typer.testing import CliRunner

from flows import cli, presets
from negfacediff_core.config import BuildConfig
from negfacediff_core.errors import ConfigError


def commands(group: typer.core.TyperGroup, path: tuple[str, ...] = ()):
    for name, command in group.commands.items():
        yield (*path, name), command
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_and_option_is_explained(path):
    command = COMMANDS[path]
    assert command.help and command.help.strip().endswith(".")
    for parameter in command.params:
        assert parameter.name == "help" or getattr(parameter, "help", None), f"{parameter.name} has no help"
    result = CliRunner().invoke(cli.app, [*path, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_help_fills_the_lines_of_a_narrow_terminal():
    said = CliRunner().invoke(cli.app, ["verify", "--help"], env={"COLUMNS": "80"}).output
    text = said.partition("The exit code")[2].partition("╭")[0].strip()
    *full, _ = [line.strip() for line in text.splitlines()]
    assert len(full) > 3 and all(len(line) > 60 for line in full)


def test_help_comes_at_once_without_loading_torch_or_prefect():
    code = (
        "import sys; from flows.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'prefect', 'distributed', 'matplotlib', 'zarr'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("name", presets.preset_texts())
def test_every_preset_is_valid_commented_and_has_its_own_name(name):
    text = presets.preset_texts()[name]
    assert presets.load_build(name).name == name
    assert len(presets.headline(text)) > 20
    assert "paper:" in text or "as published" in text or "arXiv" in text


def test_presets_are_listed_and_printed(capsys: pytest.CaptureFixture[str]):
    run("presets")
    assert set(presets.preset_texts()) <= set(re.findall(r"[\w-]+", capsys.readouterr().out))
    run("presets", "demo")
    assert BuildConfig.model_validate(yaml.safe_load(capsys.readouterr().out)).name == "demo"


def test_fields_names_every_setting(capsys: pytest.CaptureFixture[str]):
    run("fields")
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("identities", "samples.w", "contexts.seed", "evaluation.protocol"))


def test_settings_are_read_as_yaml_scalars_into_nested_fields():
    build = presets.load_build(
        "demo", ["samples.w=0.3", "negatives.rule=close", "embeddings.flip=true", "name=mine", "images=9"]
    )
    assert (build.samples.w, build.negatives.rule, build.embeddings.flip) == (0.3, "close", True)
    assert (build.name, build.images) == ("mine", 9)


def test_the_rule_null_is_what_yaml_makes_of_its_name(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nnegatives:\n  rule: null\n")
    assert presets.load_build(str(file)).negatives.rule == "null"
    assert presets.load_build("demo", ["negatives.rule=null"]).negatives.rule == "null"


def test_a_file_of_ones_own_is_a_preset(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nidentities: 4\n")
    assert presets.load_build(str(file), ["images=2"]) == BuildConfig(name="mine", identities=4, images=2)


def test_the_demo_builds_differ_by_the_negative_alone():
    plain, far = (build.model_dump() for build in presets.demo_builds())
    assert (plain["negatives"]["rule"], plain["samples"]["w"]) == ("none", 0.0)
    assert (far["negatives"]["rule"], far["samples"]["w"]) == ("far", 0.5)
    for build in (plain, far):
        del build["name"], build["negatives"]["rule"], build["samples"]["w"]
    assert plain == far


def run(*arguments: str) -> int:
    """Run the command line in this process and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return stop.value.code


BAD_INPUT = {
    "unknown preset": (["build", "demmo"], ["'demmo'", "did you mean demo? Presets", "negfacediff-paper"]),
    "missing file": (["build", "nowhere.yaml"], ["nowhere.yaml", "check the path"]),
    "unknown field": (
        ["build", "demo", "--set", "samples.stpes=3"],
        ["samples.stpes", "did you mean samples.steps? `neg", "negfacediff fields"],
    ),
    "field of the wrong part": (["build", "demo", "--set", "w=3"], ["no field w", "did you mean samples.w"]),
    "field of execution": (["build", "demo", "--set", "batch_size=3"], ["--batch-size"]),
    "value out of range": (
        ["build", "demo", "--set", "samples.steps=0"],
        ["samples.steps is 0", "greater than or equal to 1", "Sampling steps"],
    ),
    "mistyped choice": (
        ["build", "demo", "--set", "samples.sampler=dddim"],
        ["samples.sampler is 'dddim'", "'ddim'", "'ddpm'", "did you mean ddim? samples.sampler: "],
    ),
    "mistyped value": (["build", "demo", "--set", "identities=many"], ["identities is 'many'", "integer"]),
    "impossible pair": (
        ["build", "demo", "--set", "negatives.rule=none"],
        ["negatives.rule is none but samples.w is not 0"],
    ),
    "number for the section of the rule": (
        ["build", "demo", "--set", "negatives=5"],
        ["negatives is 5, but it has fields of its own", "negatives.rule"],
    ),
    "list for the section of the rule": (["build", "demo", "--set", "negatives=[1]"], ["negatives is [1]"]),
    "word for the section of the rule": (["build", "demo", "--set", "negatives=far"], ["negatives is 'far'"]),
    "number for the section of the weight": (
        ["build", "demo", "--set", "samples=3", "--set", "negatives.rule=none"],
        ["samples is 3", "samples.generator"],
    ),
    "setting without value": (["build", "demo", "--set", "samples.w"], ["'samples.w'", "field=value"]),
    "setting below a value": (["build", "demo", "--set", "samples.w.x=1"], ["single value"]),
    "unknown executor": (
        ["build", "demo", "--executor", "dassk"],
        ["executor is 'dassk'", "allowed. executor: threads, dask (local processes)"],
    ),
    "unknown device": (["build", "demo", "--device", "gpu"], ["device is 'gpu'", "cpu, cuda, or one GPU"]),
    "impossible name": (["build", "demo", "--set", "name=X"], ["name is 'X'", "lower-case letters"]),
    "missing weights": (
        ["build", "demo", "--set", "samples.generator=no/such/folder"],
        ["no/such/folder", "give the path"],
    ),
    "folder that is no store": (["status", str(Path(__file__).parent)], ["There is no store at", "Check"]),
    "no such store": (["status", "no-such-store"], ["no-such-store", "Check the path"]),
}


@pytest.mark.parametrize(("arguments", "said"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_paragraph_and_exit_code_2(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("Error: ")
    assert len(shown.err.strip().splitlines()) == 1
    assert "Traceback" not in shown.err + shown.out
    assert "?." not in shown.err and "pattern" not in shown.err
    for words in said:
        assert words in shown.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "just words"])
def test_a_build_file_that_is_no_mapping_is_refused(text: str, tmp_path: Path):
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"odd\.yaml"):
        presets.load_build(str(file))


@pytest.fixture
def tiny_preset(tiny_build, tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_build.model_dump()))
    return file


def test_corrupt_weights_are_refused_before_anything_is_written(tiny_preset, tiny_pack, tmp_path, capsys):
    broken = shutil.copytree(tiny_pack / "generator", tmp_path / "broken")
    checkpoint = broken / "checkpoints/ema_averaged_model.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    store = tmp_path / "store"
    assert run("build", str(tiny_preset), "--store", str(store), "--set", f"samples.generator={broken}") == 2
    said = capsys.readouterr().err
    assert "ema_averaged_model.ckpt" in said and len(said.strip().splitlines()) == 1
    assert not store.exists()


def test_a_store_that_cannot_be_written_is_refused(tiny_preset, tmp_path, capsys):
    (tmp_path / "taken").write_text("a file")
    assert run("build", str(tiny_preset), "--store", str(tmp_path / "taken")) == 2
    said = capsys.readouterr().err
    assert "a file stands where a folder is needed" in said and len(said.strip().splitlines()) == 1


def test_a_prefect_server_that_does_not_answer_is_named(tiny_preset, tmp_path, capsys):
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert run("build", str(tiny_preset), "--store", str(tmp_path / "store")) == 2
    said = capsys.readouterr().err
    assert "PREFECT_API_URL is http://127.0.0.1:9/api" in said and "prefect server start" in said
