"""What weight files hold: cutting networks out, what does not fit, what is damaged, what would run code."""

import os
import re
import shlex
import sys
import types

import numpy as np
import pytest
import torch
from diffusion_reference import DECODER_FILE, ENCODER_FILE, UNET_FILE, same_weights
from safetensors.torch import save_file

from negfacediff_core.diffusion.checkpoint import load_generator, weight_files
from negfacediff_core.diffusion.schedule import linear
from negfacediff_core.diffusion.state_dicts import read_state_dict
from negfacediff_core.diffusion.training import load_state
from negfacediff_core.errors import WeightsError
from negfacediff_core.tensor_files import replacing, write_tensors


def compvis(release, whole_model):
    """A latent-diffusion checkpoint with the first stage of `release`, which loses its own files."""
    inner = {"loss.discriminator.main.0.weight": torch.ones(2, 2)}
    for name in (DECODER_FILE, ENCODER_FILE):
        inner |= torch.load(release / name, weights_only=True)
        (release / name).unlink()
    if not whole_model:
        return inner
    state = {f"first_stage_model.{key}": value for key, value in inner.items()}
    state |= {"betas": torch.ones(10), "scale_factor": torch.tensor(1.0)}
    for part in ("model.diffusion_model.out", "cond_stage_model.embedding", "model_ema.diffusion_model"):
        state[f"{part}.weight"] = torch.ones(2)
    return state


@pytest.mark.parametrize("whole_model", [True, False])
@pytest.mark.parametrize(
    "name", ["first_stage.ckpt", "checkpoints/first_stage.ckpt", "first_stage.safetensors"]
)
def test_the_first_stage_is_cut_out_of_a_latent_diffusion_checkpoint(saved, release, whole_model, name):
    state = compvis(release, whole_model)
    if name.endswith("ckpt"):
        torch.save({"epoch": 3, "global_step": 7, "state_dict": state, "lr_schedulers": []}, release / name)
    else:
        save_file(state, release / name)
    assert weight_files(release)["decoder"] == release / name
    generator = load_generator(release, with_encoder=True)
    assert same_weights(generator.decoder, saved[2]) and same_weights(generator.encoder, saved[3])


@pytest.mark.parametrize("whole_model", [True, False])
def test_what_no_latent_diffusion_checkpoint_holds_is_named(release, whole_model):
    state = compvis(release, whole_model)
    torch.save({"state_dict": state | {"refiner.weight": torch.ones(1)}}, release / "first_stage.ckpt")
    with pytest.raises(
        WeightsError, match=r"1 unknown \(refiner\.weight\).*begin with decoder\., quantize\."
    ):
        load_generator(release)
    missing = {key: value for key, value in state.items() if "decoder.conv_in.weight" not in key}
    torch.save({"state_dict": missing}, release / "first_stage.ckpt")
    with pytest.raises(WeightsError, match=r"first_stage\.ckpt.*1 missing \(decoder\.conv_in\.weight\)"):
        load_generator(release)


@pytest.fixture
def lightning_checkpoint(release, monkeypatch):
    """A first stage as a training framework saves it, with an object of a class that is unknown here."""
    module = types.ModuleType("pytorch_lightning.callbacks")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    path = release / "first_stage.ckpt"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
        patch.setitem(sys.modules, module.__name__, module)
        callback = module.ModelCheckpoint()
        callback.best = 0.5
        saved = {"state_dict": compvis(release, True), "callbacks": {module.ModelCheckpoint: callback}}
        torch.save(saved, path)
    return path


def recipe_of(error):
    """The code of the one-line command that an error message gives."""
    command = re.search(r"run (python -c \".*\") in its folder", str(error.value))[1]
    return shlex.split(command)[2]


def test_a_foreign_class_is_refused_with_a_command_that_takes_the_weights_out(
    saved, lightning_checkpoint, monkeypatch
):
    folder = lightning_checkpoint.parent
    with pytest.raises(
        WeightsError, match=r"asks for pytorch_lightning\.callbacks\.ModelCheckpoint"
    ) as error:
        load_generator(folder)
    monkeypatch.chdir(folder)
    try:
        exec(recipe_of(error), {})
    finally:
        torch.serialization.clear_safe_globals()
    (folder / "first_stage-tensors.ckpt").replace(lightning_checkpoint)
    assert same_weights(load_generator(folder).decoder, saved[2])


class Trap:
    """Makes a folder as soon as it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_code_in_a_checkpoint_is_never_run_not_even_by_that_command(
    lightning_checkpoint, tmp_path, monkeypatch
):
    with pytest.raises(WeightsError) as error:
        load_generator(lightning_checkpoint.parent)
    trap = Trap(tmp_path / "sprung")
    for path in (lightning_checkpoint, lightning_checkpoint.parent / UNET_FILE):
        torch.save({"state_dict": {"weight": torch.ones(1)}, "callbacks": trap}, path)
        with pytest.raises(WeightsError, match=r"more than tensors.*was not loaded"):
            load_generator(path.parent if path == lightning_checkpoint else path.parents[1])
    monkeypatch.chdir(lightning_checkpoint.parent)
    try:
        with pytest.raises(Exception, match="posix"):
            exec(recipe_of(error), {})
    finally:
        torch.serialization.clear_safe_globals()
    assert not (tmp_path / "sprung").exists()
    # what would have happened otherwise
    torch.load(lightning_checkpoint, weights_only=False)
    assert (tmp_path / "sprung").is_dir()


def rename_a_key(state):
    state["eps_model.final.wait"] = state.pop("eps_model.final.weight")


def reshape_a_key(state):
    state["eps_model.final.bias"] = torch.zeros(4)


def drop_many_keys(state):
    for key in [key for key in state if ".middle." in key]:
        del state[key]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (rename_a_key, r"1 missing \(final\.weight\); 1 unknown \(final\.wait\)"),
        (reshape_a_key, r"1 of another shape \(final\.bias is \(4,\) and should be \(3,\)\)"),
        (drop_many_keys, r"\d+ missing \(middle\.\S+, middle\.\S+, middle\.\S+, \.\.\.\)"),
        (
            lambda state: state.update({"eps_model.final.bias": torch.zeros(3, dtype=torch.int8)}),
            r"1 not stored as plain floating-point numbers \(final\.bias is int8\)",
        ),
        (
            lambda state: state.update({"eps_model.final.bias": torch.zeros(3).to_sparse()}),
            r"floating-point numbers \(final\.bias is sparse_coo\)",
        ),
        (lambda state: state.update(alpha_bars=linear(60).buffers()["alpha_bars"]), "another noise schedule"),
    ],
)
def test_weights_that_do_not_fit_are_named(release, edit, message):
    state = torch.load(release / UNET_FILE, weights_only=True)
    edit(state)
    torch.save(state, release / UNET_FILE)
    with pytest.raises(WeightsError, match=message):
        load_generator(release)


# Plain texts, bytes without any sense, and another protocol: each makes torch raise another error, or warn.
DAMAGED = [
    *(b"not a checkpoint at all", b"hello world", b"just some text\n", b"0" * 64, b"gone", b"\x80\x04N."),
    *(np.random.default_rng(seed).bytes(300) for seed in range(40)),
]


def damages(path):
    """Yield after each of many ways of damaging a file."""
    whole = path.read_bytes()
    for damaged in (*DAMAGED, *(whole[: len(whole) * share // 100] for share in (0, 1, 50, 99))):
        path.write_bytes(damaged)
        yield


def test_damaged_and_foreign_files_are_refused(release):
    path = release / UNET_FILE
    for _ in damages(path):
        with pytest.raises(WeightsError, match=r"ema_averaged_model\.ckpt .*damaged"):
            read_state_dict(path)
        with pytest.raises(WeightsError, match="cannot be read"):
            load_state(path)
    with pytest.raises(WeightsError, match=r"ema_averaged_model\.ckpt .*damaged"):
        load_generator(release)
    for content in ({"step": 3}, {3: torch.ones(1)}, [torch.ones(1)], torch.ones(1)):
        torch.save(content, path)
        with pytest.raises(WeightsError, match="flat state dict"):
            read_state_dict(path)


def test_damaged_safetensors_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(300)}, path)
    for _ in damages(path):
        with pytest.raises(WeightsError, match=r"model\.safetensors cannot be read: it is damaged"):
            read_state_dict(path)


def test_a_file_is_replaced_in_one_piece_or_not_at_all(tmp_path):
    path = tmp_path / "new folder" / "state.pt"
    write_tensors(path, {"weight": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="disk full"), replacing(path) as file:
        file.write(b"half of it")
        raise RuntimeError("disk full")
    assert path.read_bytes() == before and [found.name for found in path.parent.iterdir()] == ["state.pt"]
    assert torch.equal(read_state_dict(path)["weight"], torch.ones(2))
