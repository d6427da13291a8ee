"""Release folders: which files are found, what the configuration may say, that loading gives all back."""

import copy
import shutil

import pytest
import torch
import yaml
from diffusion_reference import (
    DECODER_FILE,
    ENCODER_FILE,
    TINY_DIFFUSION,
    TINY_MODEL,
    UNET_FILE,
    same_weights,
)
from safetensors.torch import save_file

from negfacediff_core.diffusion.checkpoint import (
    load_generator,
    open_release,
    save_generator,
    weight_files,
)
from negfacediff_core.diffusion.first_stage import FirstStageSettings
from negfacediff_core.diffusion.release_config import CONFIG_FILE, first_stage_settings, read_config
from negfacediff_core.diffusion.schedule import linear
from negfacediff_core.errors import ConfigError, NegFaceDiffError, WeightsError


def edit_config(folder, edit):
    path = folder / CONFIG_FILE
    config = yaml.safe_load(path.read_text())
    edit(config)
    path.write_text(yaml.safe_dump(config))


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_any_floating_point_type_load_as_float32(saved, tmp_path, dtype):
    _, unet, *first_stage = saved
    settings = {"model": TINY_MODEL, "diffusion": TINY_DIFFUSION, "image_size": 16}
    save_generator(tmp_path, unet, *first_stage, **settings, dtype=dtype)
    loaded = load_generator(tmp_path).unet.state_dict()
    assert all(value.dtype == torch.float32 for value in loaded.values())
    assert all(torch.equal(loaded[key], value.to(dtype).float()) for key, value in unet.state_dict().items())
    stored = torch.load(tmp_path / UNET_FILE, weights_only=True)
    assert stored["betas"].dtype == torch.float32 and stored["eps_model.final.bias"].dtype == dtype


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


def as_safetensors(path):
    """Store a state dict in the other format, in place of the first."""
    save_file(torch.load(path, weights_only=True), path.with_suffix(".safetensors"))
    path.unlink()


def test_every_file_may_be_safetensors(saved, release):
    for name in (UNET_FILE, DECODER_FILE, ENCODER_FILE):
        as_safetensors(release / name)
    assert {path.suffix for path in weight_files(release).values()} == {".yaml", ".safetensors"}
    generator = load_generator(release, with_encoder=True)
    networks = (generator.unet, generator.decoder, generator.encoder)
    assert all(map(same_weights, networks, saved[1:]))


def test_safetensors_stand_behind_the_other_format_and_in_the_same_order_of_names(release):
    checkpoints = release / "checkpoints"
    whole = checkpoints / "ema_averaged_model.ckpt"
    for name in ("model", "ema_averaged_model_900", "ema_averaged_model_1000", "ema_averaged_model"):
        shutil.copy(whole, checkpoints / f"{name}.safetensors")
    assert weight_files(release)["unet"] == whole
    whole.unlink()
    for name in ("ema_averaged_model", "ema_averaged_model_1000", "ema_averaged_model_900", "model"):
        assert weight_files(release)["unet"] == checkpoints / f"{name}.safetensors"
        (checkpoints / f"{name}.safetensors").unlink()


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (CONFIG_FILE, "no generator at .*config.yaml is missing"),
        (UNET_FILE, r"no weights: put ema_averaged_model\.ckpt"),
        (DECODER_FILE, f"holds no {DECODER_FILE}.*first_stage.ckpt"),
    ],
)
def test_missing_files_are_named(release, gone, message):
    (release / gone).unlink()
    with pytest.raises(WeightsError, match=message):
        load_generator(release)


def test_a_missing_folder_or_encoder_is_named(release, tmp_path):
    with pytest.raises(WeightsError, match=r"no generator at .*nowhere: \.hydra/config\.yaml is missing"):
        load_generator(tmp_path / "nowhere")
    (release / ENCODER_FILE).unlink()
    assert load_generator(release).encoder is None
    with pytest.raises(WeightsError, match=f"holds no {ENCODER_FILE}"):
        load_generator(release, with_encoder=True)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: config.pop("model"), "no section 'model'"),
        (lambda config: config["model"].update(depth=3), "depth"),
        (lambda config: config["model"].update(input_channels="${constants.nothing}"), "refers to nothing"),
        (lambda config: config["constants"].update(image_size="${constants.image_size}"), "refers to itself"),
        (lambda config: config["constants"].update(image_size="${a.b}", a="${c}"), "refers to nothing"),
        (
            lambda config: (
                config.update(a={"b": "x ${c.d}"}, c={"d": "${model.depth}"})
                or config["model"].update(depth="${a.b}")
            ),
            r"\$\{a\.b\} refers to itself",
        ),
        (
            lambda config: config["model"].update(condition_type="FiLM"),
            "condition_type is 'FiLM'.*knows AdaGN",
        ),
        (lambda config: config["model"].update(input_channels=4), "input_channels is 4.*have 3 channels"),
        (
            lambda config: config["latent_diffusion"]["first_stage"].update(ddconfig={"in_channels": 1}),
            "in_channels is 1.*must be 3",
        ),
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
    (release / CONFIG_FILE).write_text("model: &model {inside: *model}\nconstants: {}\ndiffusion: {}\n")
    with pytest.raises(ConfigError, match="nested without end"):
        load_generator(release)


# Of every type, near and far from what is allowed.
ODD = [None, -1, 0, 1.5, "x", [], {}, [0], [None, None], 10**30, True, float("nan"), ["a", "b"], "${model}"]


def places(tree, path=()):
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def test_no_value_anywhere_in_a_configuration_ends_in_anything_but_a_clear_error(release):
    whole = yaml.safe_load((release / CONFIG_FILE).read_text())
    refused = 0
    for number, place in enumerate(places(whole)):
        for value in ODD[number % 5 :: 5]:
            config = copy.deepcopy(whole)
            section = config
            for key in place[:-1]:
                section = section[key]
            section[place[-1]] = value
            (release / CONFIG_FILE).write_text(yaml.safe_dump(config))
            try:
                open_release(release)
            except NegFaceDiffError as error:
                refused += 1
                assert len(str(error).splitlines()) == 1, (place, value)
    assert refused > 40
