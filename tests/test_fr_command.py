"""`negfacediff train-recogniser`, `prune` and `onnx`, the flow behind them, and the recipes that ship."""

import hashlib
import json
import shutil

import pytest
import torch
from crop_folders import RECIPE, save_crops

from flows import cli, launch, recipes
from flows import train_recogniser as flow_module
from flows.cli import BAD_INPUT, main
from flows.recipes import load_recipe, recipe_texts
from flows.train_recogniser import train_recogniser
from negfacediff_core.errors import ConfigError, DamagedError, StoppedError, StoreError
from negfacediff_core.faces.embed import load_embedder
from negfacediff_core.recognition.backbones import build_backbone
from negfacediff_core.recognition.recipe import RecogniserConfig, TrainingExecution

QUICK = {"batch_size": 16, "epochs": 1, "operations": 0}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Eight identities, four crops of each."""
    return save_crops(tmp_path_factory.mktemp("command") / "set", 8, 4)


@pytest.fixture
def without_prefect(monkeypatch):
    """Flows run here, and their artifacts by key are what is returned."""
    shown = {}
    monkeypatch.setattr(
        flow_module, "create_markdown_artifact", lambda text, key, _: shown.update({key: text})
    )
    monkeypatch.setattr(
        launch, "launch", lambda flow, after_interrupt="", **parameters: flow.fn(**parameters)
    )
    return shown


def command(*arguments):
    """Run a command line in this process."""
    cli.app([*arguments], standalone_mode=False)


def test_a_training_a_filter_and_a_training_of_it(source, tmp_path, without_prefect, monkeypatch, capsys):
    bars = []
    monkeypatch.setattr(
        flow_module,
        "progress_artifacts",
        lambda name, meters: bars.append((name, meters[0])) or open_nothing(),
    )
    options = ["--recipe", "small", *(f"--set={name}={value}" for name, value in QUICK.items())]
    out = tmp_path / "out"
    command("train-recogniser", str(source), "--out", str(out), *options, "--threads", "1")
    said = capsys.readouterr().out
    assert "Best epoch 1 of 1: EER" in said and f"pack     {out}/pack" in said
    ((name, meter),) = bars
    assert name == "train-recogniser"
    assert meter.complete and meter.total == 16 and meter.noun == "images"
    report = json.loads((out / "report.json").read_text())
    assert (report["images"], report["identities"], report["held_out_identities"]) == (24, 6, 2)
    assert f"`{out}/pack`" in without_prefect["train-recogniser-figures"]
    assert report["origin"]["kind"] == "files" and "torch" in report["versions"]
    written = hashlib.sha256((out / "pack" / "recogniser.onnx").read_bytes()).hexdigest()
    assert report["files"]["pack/recogniser.onnx"] == written and str(tmp_path) not in str(report["files"])
    assert load_embedder(out / "pack").width == load_embedder(out / "sdfr" / "recogniser.onnx").width == 128

    written = (out / "pack" / "recogniser.onnx").stat().st_mtime_ns
    command("train-recogniser", str(source), "--out", str(out), *options, "--threads", "1")
    assert "Best epoch 1 of 1: EER" in capsys.readouterr().out
    assert (out / "pack" / "recogniser.onnx").stat().st_mtime_ns == written and len(bars) == 1

    command("prune", str(out), "--rule", "diffprob", "--apart", "0.001", "--out", str(tmp_path / "kept.csv"))
    assert "of 24 images kept" in capsys.readouterr().out
    rows = (tmp_path / "kept.csv").read_text().splitlines()
    assert (
        rows[0] == "image,identity,replicate,samples" and len(rows) - 1 >= report["held_out_identities"] * 4
    )
    again = load_recipe("small", [f"{name}={value}" for name, value in QUICK.items()])
    (tmp_path / "kept.csv").write_text(
        "\n".join([rows[0], *(f"{i:04d}/{k}.png,,," for i in range(5) for k in range(4))])
    )
    second = train_recogniser.fn(
        out=str(tmp_path / "second"),
        folder=str(source),
        recipe=again,
        filter=str(tmp_path / "kept.csv"),
        execution=TrainingExecution(device="cpu", threads=1),
    )
    assert (second["identities"], second["held_out_identities"]) == (3, 2)


class open_nothing:
    """A context that does nothing."""

    def __enter__(self):
        return None

    def __exit__(self, *exception):
        return None


def test_weights_of_others_become_a_pack(tmp_path, capsys):
    with torch.device("cpu"):
        network = build_backbone(
            {"family": "iresnet", "layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "width": 16}
        )
    weights = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save(weights, tmp_path / "backbone.pth")
    command("onnx", str(tmp_path / "backbone.pth"), "--out", str(tmp_path / "out"))
    assert "pack" in capsys.readouterr().out
    assert load_embedder(tmp_path / "out" / "pack").width == 16


@pytest.mark.parametrize("name", recipe_texts())
def test_recipes_that_ship_are_valid_and_say_what_they_are(name):
    text = recipe_texts()[name]
    assert text.startswith("# ") and len(text.splitlines()[0]) > 40
    assert isinstance(load_recipe(name), RecogniserConfig)


def test_the_paper_s_recipe_is_that_of_the_paper():
    recipe = load_recipe("paper")
    assert (recipe.backbone, recipe.head, recipe.scale, recipe.head_margin) == (
        "iresnet50",
        "cosface",
        64,
        0.35,
    )
    assert (recipe.learning_rate, recipe.peak_rate, recipe.momentum) == (0.1, 0.1, 0.9)
    assert (recipe.weight_decay, recipe.dropout, recipe.epochs) == (5e-4, 0.4, 40)
    assert (recipe.operations, recipe.magnitude, recipe.flip) == (4, 16, 0.5)
    assert (recipe.policy, recipe.clip, recipe.erase) == ("idiff-face", 5, 0)
    plateau = load_recipe("paper-plateau")
    assert (plateau.epochs, plateau.patience, plateau.stop) == (200, 5, 6)
    schedule = {"schedule": "plateau", "epochs": 200, "patience": 5, "stop": 6}
    assert plateau == recipe.model_copy(update=schedule)


def test_settings_change_a_recipe(tmp_path):
    assert load_recipe("small", ["drops=[3, 5]", "head=arcface"]).drops == (3, 5)
    file = tmp_path / "mine.yaml"
    file.write_text("backbone: iresnet18\n")
    assert load_recipe(str(file)) == RecogniserConfig(backbone="iresnet18")
    assert recipes.check_training_execution({"processes": 2}).processes == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["There is no folder nowhere", "the name of a run as well"]),
        (["{source}", "--recipe", "papre"], ["no recipe 'papre'", "paper, paper-plateau, small"]),
        (["{source}", "--set", "hed=arcface"], ["did you mean head?", "negfacediff fields recogniser"]),
        (["{source}", "--set", "head=softmax"], ["head is 'softmax'", "arcface"]),
        (["{source}", "--processes", "0"], ["processes is 0"]),
        (["{source}", "demo"], ["is no store"]),
        (["{source}", "--out", "s3://bucket/out"], ["no local folder"]),
    ],
)
def test_bad_input_is_told_before_prefect_starts(source, arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["train-recogniser", *(argument.format(source=source) for argument in arguments)])
    assert stop.value.code == BAD_INPUT
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert not list(tmp_path.iterdir())


def test_the_flow_wants_one_source(tmp_path, source):
    for given in ({}, {"run": "demo", "folder": str(source)}):
        with pytest.raises(ConfigError, match="either run"):
            train_recogniser.fn(out=str(tmp_path / "out"), **given)
    with pytest.raises(ConfigError, match="no local folder"):
        train_recogniser.fn(out="s3://bucket/out", folder=str(source))


def test_a_run_of_a_store_is_trained_on(tiny_store, tmp_path, without_prefect):
    def train():
        return train_recogniser.fn(
            out=str(tmp_path / "out"),
            cache=str(tmp_path / "cache"),
            run="tiny",
            store=str(tiny_store),
            recipe=RECIPE.model_copy(update={"held_out": 0.1, "epochs": 1}),
            execution=TrainingExecution(device="cpu", threads=1),
        )

    result = train()
    assert result["source"] == f"run tiny of {tiny_store}" and result["held_out_identities"] == 2
    rows = (tmp_path / "out" / "dynamics" / "images.csv").read_text().splitlines()[1:]
    assert len(rows) == result["images"] and all(len(row.split(",")[2]) == 1 for row in rows)
    assert result["origin"]["kind"] == "aligned" and result["licences"]
    assert "licence of the images" in without_prefect["train-recogniser-figures"]
    assert list((tmp_path / "cache").glob("crops-*.u8")) and not list((tmp_path / "out").glob("*.u8"))
    # what is lost of a finished training, and its state can tell, the same command makes again
    final = tmp_path / "out" / "dynamics" / "final.npz"
    content = final.read_bytes()
    final.unlink()
    assert train() == result and final.read_bytes() == content


def test_damaged_crops_are_told_before_a_training_begins(source, tmp_path, monkeypatch):
    folder = shutil.copytree(source, tmp_path / "set")
    damaged = [folder / "0003" / "1.png", folder / "0006" / "0.png"]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:2000])

    def train():
        train_recogniser.fn(
            out=str(tmp_path / "out"),
            folder=str(folder),
            recipe=RECIPE,
            execution=TrainingExecution(device="cpu"),
        )

    with pytest.raises(DamagedError, match=r"2 of 32 crops cannot be trained on: .*0003/1\.png is no image"):
        train()
    listed = tmp_path / "out" / "unreadable.txt"
    assert [line.split()[0] for line in listed.read_text().splitlines()] == list(map(str, damaged))
    for path in damaged:
        path.unlink()

    def fit(job, progress):
        raise StoppedError("it begins")

    monkeypatch.setattr(flow_module, "fit", fit)
    with pytest.raises(StoppedError, match="it begins"):
        train()
    assert not listed.exists()


def test_a_damaged_report_is_told(source, tmp_path):
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(StoreError, match=r"report\.json is damaged: delete it"):
        train_recogniser.fn(out=str(tmp_path), folder=str(source), recipe=RECIPE)
