import shutil

import numpy as np
import pytest
import torch
import yaml
from diffusion_reference import TINY_MODEL, randomised

from negfacediff_core.diffusion.checkpoint import (
    load_generator,
    read_state_dict,
    save_generator,
    weight_files,
)
from negfacediff_core.diffusion.first_stage import FirstStageSettings, VQDecoder, VQEncoder
from negfacediff_core.diffusion.release_config import CONFIG_FILE, first_stage_settings, read_config
from negfacediff_core.diffusion.schedule import linear
from negfacediff_core.diffusion.training import load_state
from negfacediff_core.diffusion.unet import ConditionalUNet
from negfacediff_core.errors import ConfigError, WeightsError

FIRST_STAGE = FirstStageSettings(ch=32, ch_mult=(1, 2), num_res_blocks=1, n_embed=16)
UNET_FILE = "checkpoints/ema_averaged_model.ckpt"
DECODER_FILE = "first_stage_decoder_state_dict.pt"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    unet = randomised(ConditionalUNet(**TINY_MODEL))
    decoder, encoder = randomised(VQDecoder(FIRST_STAGE)), randomised(VQEncoder(FIRST_STAGE))
    diffusion = {"T": 50, "schedule_type": "linear"}
    save_generator(
        folder,
        unet,
        decoder,
        encoder,
        model=TINY_MODEL,
        diffusion=diffusion,
        image_size=16,
        conditioner_sha256="ab12",
    )
    return folder, unet, decoder, encoder


@pytest.fixture
def release(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "release")


def edit_config(folder, edit):
    path = folder / CONFIG_FILE
    config = yaml.safe_load(path.read_text())
    edit(config)
    path.write_text(yaml.safe_dump(config))


def edit_state(path, edit):
    state = torch.load(path, weights_only=True)
    edit(state)
    torch.save(state, path)


def same_weights(first, second):
    states = first.state_dict(), second.state_dict()
    return list(states[0]) == list(states[1]) and all(
        value.dtype == torch.float32 and torch.equal(value, states[1][key])
        for key, value in states[0].items()
    )


def test_a_saved_generator_loads_bit_for_bit(saved):
    folder, unet, decoder, encoder = saved
    generator = load_generator(folder, with_encoder=True)
    assert same_weights(generator.unet, unet)
    assert same_weights(generator.decoder, decoder)
    assert same_weights(generator.encoder, encoder)
    assert generator.latent_shape == (3, 8, 8)
    assert (generator.context_width, generator.image_size, generator.folder) == (16, 16, folder)
    assert torch.equal(generator.schedule.betas, linear(50).betas)
    assert not generator.unet.training and not any(p.requires_grad for p in generator.unet.parameters())
    assert load_generator(folder).encoder is None
    assert read_config(folder)["constants"]["conditioner_sha256"] == "ab12"


def test_half_precision_files_load_as_float32(saved, tmp_path):
    _, unet, decoder, encoder = saved
    diffusion = {"T": 50, "schedule_type": "linear"}
    networks = (unet, decoder, encoder)
    save_generator(
        tmp_path, *networks, model=TINY_MODEL, diffusion=diffusion, image_size=16, dtype=torch.float16
    )
    loaded = load_generator(tmp_path).unet.state_dict()
    assert all(torch.equal(loaded[key], value.half().float()) for key, value in unet.state_dict().items())
    stored = torch.load(tmp_path / UNET_FILE, weights_only=True)
    assert stored["betas"].dtype == torch.float32 and stored["eps_model.final.bias"].dtype == torch.float16


def test_a_release_with_bare_keys_and_hydra_references_loads(saved, release):
    def as_published(config):
        config["model"] |= {"_target_": "somewhere.UNet", "input_channels": "${constants.input_channels}"}
        config["constants"]["image_size"] = "${data.size}"
        config["data"] = {"size": 16, "where": "${hydra:runtime.cwd}"}
        config["diffusion"]["_target_"] = "somewhere.${constants.name}"
        config["constants"]["name"] = "ddpm"

    edit_config(release, as_published)
    state = torch.load(release / UNET_FILE, weights_only=True)
    bare = {key.removeprefix("eps_model."): value for key, value in state.items() if "eps_model." in key}
    torch.save(bare, release / UNET_FILE)
    generator = load_generator(release)
    assert same_weights(generator.unet, saved[1])
    assert read_config(release)["diffusion"]["_target_"] == "somewhere.ddpm"


def test_a_release_that_describes_no_first_stage_has_the_published_one(release):
    for described in (True, {}, {"other": 1}):
        edit_config(release, lambda config, described=described: config.update(latent_diffusion=described))
        assert first_stage_settings(read_config(release)) == FirstStageSettings()


def test_weight_files_prefer_averaged_weights_and_the_last_step(release):
    checkpoints = release / "checkpoints"
    (checkpoints / "ema_averaged_model.ckpt").rename(checkpoints / "model.ckpt")
    assert weight_files(release)["unet"].name == "model.ckpt"
    for step in (900, 1000):
        shutil.copy(checkpoints / "model.ckpt", checkpoints / f"ema_averaged_model_{step}.ckpt")
    assert weight_files(release)["unet"].name == "ema_averaged_model_1000.ckpt"
    (release / DECODER_FILE).rename(checkpoints / DECODER_FILE)
    files = weight_files(release)
    assert set(files) == {"config", "unet", "decoder"} and files["decoder"].parent == checkpoints
    assert load_generator(release).image_size == 16


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (CONFIG_FILE, "no generator at .*config.yaml is missing"),
        (UNET_FILE, r"no weights: put ema_averaged_model\.ckpt"),
        (DECODER_FILE, f"holds no {DECODER_FILE}"),
    ],
)
def test_missing_files_are_named(release, gone, message):
    (release / gone).unlink()
    with pytest.raises(WeightsError, match=message):
        load_generator(release)


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
        (lambda state: state.update(alpha_bars=linear(60).buffers()["alpha_bars"]), "another noise schedule"),
    ],
)
def test_weights_that_do_not_fit_are_named(release, edit, message):
    edit_state(release / UNET_FILE, edit)
    with pytest.raises(WeightsError, match=message):
        load_generator(release)


class Stranger:
    def __reduce__(self):
        return print, ("this must never run",)


# Plain texts, bytes without any sense, and another protocol: each makes torch raise another error, or warn.
DAMAGED = [
    *(b"not a checkpoint at all", b"hello world", b"just some text\n", b"0" * 64, b"gone", b"\x80\x04N."),
    *(np.random.default_rng(seed).bytes(300) for seed in range(40)),
]


def test_damaged_and_foreign_files_are_refused(release, capsys):
    path = release / UNET_FILE
    whole = path.read_bytes()
    for damaged in (*DAMAGED, *(whole[: len(whole) * share // 100] for share in (0, 1, 50, 99))):
        path.write_bytes(damaged)
        with pytest.raises(WeightsError, match=r"ema_averaged_model\.ckpt .*damaged"):
            load_generator(release)
        with pytest.raises(WeightsError, match="cannot be read"):
            load_state(path)
    torch.save({"weight": Stranger()}, path)
    with pytest.raises(WeightsError, match="more than tensors"):
        load_generator(release)
    torch.save({"step": 3}, path)
    with pytest.raises(WeightsError, match="flat state dict"):
        read_state_dict(path)
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: config.pop("model"), "no section 'model'"),
        (lambda config: config["model"].update(depth=3), "depth"),
        (lambda config: config["model"].update(input_channels="${constants.nothing}"), "refers to nothing"),
        (lambda config: config["constants"].update(image_size="${constants.image_size}"), "refers to itself"),
        (lambda config: config["constants"].update(image_size=15), "image_size is 15.*multiple of 4"),
        (lambda config: config["diffusion"].update(schedule_type="warm"), "schedule_type is 'warm'"),
    ],
)
def test_configurations_that_cannot_be_built_are_refused(release, edit, message):
    edit_config(release, edit)
    with pytest.raises(ConfigError, match=message):
        load_generator(release)


def test_a_configuration_that_is_not_yaml_is_refused(release):
    (release / CONFIG_FILE).write_text("model: [unclosed")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_generator(release)
