"""Variation of training crops against Pillow's operations, and the loader that applies it."""

import numpy as np
import pytest
import torch
from crop_folders import crops, nobody, save_crops
from PIL import Image, ImageEnhance, ImageOps

from negfacediff_core.recognition.loader import Loader, epoch_order
from negfacediff_core.recognition.pixel_operations import OPERATIONS
from negfacediff_core.recognition.randaugment import (
    ERASED,
    POLICIES,
    UNVARIED,
    Variation,
    apply_variation,
    plan_variation,
)
from negfacediff_core.recognition.set_openers import open_set

STRENGTH = 16 / 30
STRONG = Variation(flip=0.5, operations=4, magnitude=16, erase=0.5, seed=3)
PUBLISHED = STRONG._replace(policy="idiff-face")


def vary(pictures, rows, epoch, variation):
    """Decide and do it."""
    return apply_variation(pictures, plan_variation(rows, epoch, variation), variation)


@pytest.fixture(scope="module")
def pictures():
    """Eight pictures `(8, 3, 112, 112)` uint8, one of them of a narrow range and one of a single colour."""
    found = crops(8, 1)[:, 0]
    found[1] = found[1] // 4 + 70
    found[2] = 90
    return torch.from_numpy(found).permute(0, 3, 1, 2).contiguous()


def affine(*matrix):
    """Pillow's transform of the same name, the nearest pixel."""
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, matrix)


def turned(degrees):
    """A turn about the centre."""
    return lambda image: image.rotate(degrees)


# Of the sign +1, as Pillow does it: by 16 of 30 of the full strength.
SHEAR, SHIFT, MORE = 0.3 * STRENGTH, int(150 / 331 * 112 * STRENGTH), 1 + 0.9 * STRENGTH
PILLOW = {
    "shear_x": affine(1, SHEAR, 0, 0, 1, 0),
    "shear_y": affine(1, 0, 0, SHEAR, 1, 0),
    "translate_x": affine(1, 0, SHIFT, 0, 1, 0),
    "translate_y": affine(1, 0, 0, 0, 1, SHIFT),
    "rotate": turned(-30 * STRENGTH),
    "brightness": lambda image: ImageEnhance.Brightness(image).enhance(MORE),
    "colour": lambda image: ImageEnhance.Color(image).enhance(MORE),
    "contrast": lambda image: ImageEnhance.Contrast(image).enhance(MORE),
    "sharpness": lambda image: ImageEnhance.Sharpness(image).enhance(MORE),
    "posterise": lambda image: ImageOps.posterize(image, 6),
    "solarise": lambda image: ImageOps.solarize(image, 119),
    "autocontrast": ImageOps.autocontrast,
    "equalise": ImageOps.equalize,
    "grey": lambda image: image.convert("L").convert("RGB"),
}


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "identity"])
def test_operations_do_what_those_of_pillow_do(name, pictures):
    found = OPERATIONS[name](pictures, torch.full((len(pictures),), STRENGTH, dtype=torch.float64))
    assert found.dtype == torch.uint8
    expected = np.stack(
        [np.asarray(PILLOW[name](Image.fromarray(one.permute(1, 2, 0).numpy()))) for one in pictures]
    )
    difference = np.abs(found.permute(0, 2, 3, 1).numpy().astype(int) - expected)
    # turned and sheared coordinates that lie between two pixels may go to either
    share = 0.01 if name in ("shear_x", "shear_y", "rotate") else 0.0
    assert (difference > 1).mean() <= share, (difference > 1).mean()


@pytest.mark.parametrize("name", ["shear_x", "translate_y", "rotate", "brightness", "sharpness"])
def test_signs_turn_operations_round(name, pictures):
    amounts = torch.full((len(pictures),), STRENGTH, dtype=torch.float64)
    one, other = (OPERATIONS[name](pictures, sign * amounts) for sign in (1, -1))
    assert not torch.equal(one[:1], other[:1])


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "identity"])
def test_each_image_has_its_own_amount(name, pictures):
    amounts = torch.linspace(-1, 1, len(pictures), dtype=torch.float64)
    alone = [OPERATIONS[name](pictures[i : i + 1], amounts[i : i + 1]) for i in range(len(pictures))]
    assert torch.equal(OPERATIONS[name](pictures, amounts), torch.cat(alone))


@pytest.mark.parametrize("variation", [STRONG, PUBLISHED], ids=["fixed", "idiff-face"])
def test_variation_depends_on_seed_epoch_and_row_alone(variation, pictures):
    rows = torch.arange(100, 108)
    together = vary(pictures, rows, 2, variation)
    alone = [vary(pictures[i : i + 1], rows[i : i + 1], 2, variation) for i in range(len(pictures))]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(vary(pictures.flip(0), rows.flip(0), 2, variation).flip(0), together)
    for other in (
        vary(pictures, rows + 1, 2, variation),
        vary(pictures, rows, 3, variation),
        vary(pictures, rows, 2, variation._replace(seed=4)),
    ):
        assert not torch.equal(other, together)


def test_the_published_policy_draws_a_strength_for_each_operation():
    names = POLICIES["idiff-face"].names
    assert len(names) == 13 and "grey" in names and not {"shear_y", "translate_y"} & set(names)
    plans = {each.policy: plan_variation(torch.arange(2000), 0, each) for each in (STRONG, PUBLISHED)}
    fixed, drawn = (torch.stack(plans[name].amounts[1:5]) * 30 for name in ("fixed", "idiff-face"))
    assert (fixed.abs().round(decimals=9) == 16).all()
    numbers, counts = drawn.abs().round().unique(return_counts=True)
    assert numbers.tolist() == list(range(1, 17)) and counts.min() > 400 and counts.max() < 600
    for amounts in (fixed, drawn):
        assert (amounts > 0).double().mean() == pytest.approx(0.5, abs=0.02)
    shares = torch.tensor([counts[0] for counts in zip(*plans["idiff-face"].counts[1:5], strict=True)])
    assert (shares / 2000 - 1 / 13).abs().max() < 0.03


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_nobody_waits_for_a_gpu_that_varies_crops(pictures):
    rows = torch.arange(8)
    plan, crops = plan_variation(rows, 0, PUBLISHED).pinned(), pictures.cuda()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        varied = apply_variation(crops, plan.to(crops.device), PUBLISHED)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    difference = varied.cpu().int() - vary(pictures, rows, 0, PUBLISHED).int()
    assert (difference.abs() > 1).double().mean() < 0.02


def test_nothing_is_varied_where_nothing_is_asked(pictures):
    before = pictures.clone()
    assert torch.equal(vary(pictures, torch.arange(8), 0, UNVARIED), pictures)
    mirrored = vary(pictures, torch.arange(8), 0, UNVARIED._replace(flip=1.0))
    assert torch.equal(mirrored, pictures.flip(3))
    vary(pictures, torch.arange(8), 0, STRONG)
    assert torch.equal(pictures, before)


def test_erasing_takes_a_rectangle_of_the_size_that_it_should():
    white = torch.full((400, 3, 112, 112), 255, dtype=torch.uint8)
    erased = vary(white, torch.arange(400), 0, UNVARIED._replace(erase=1.0))[:, 0] == ERASED
    shares = erased.float().mean(dim=(1, 2))
    assert shares.min() > 0.018 and shares.max() < 0.34
    assert shares.mean() == pytest.approx(0.17, abs=0.02)
    for one in erased[:50]:
        lines, columns = one.any(1).nonzero()[:, 0], one.any(0).nonzero()[:, 0]
        assert one.sum() == (lines.max() - lines.min() + 1) * (columns.max() - columns.min() + 1)
    some = vary(white, torch.arange(400), 0, UNVARIED._replace(erase=0.25))
    assert (some != 255).flatten(1).any(1).float().mean() == pytest.approx(0.25, abs=0.07)


def test_every_operation_is_as_likely_as_another():
    grey = torch.arange(256, dtype=torch.uint8).repeat(49).view(1, 1, 112, 112).expand(700, 3, 112, 112)
    chosen = vary(grey, torch.arange(700), 0, UNVARIED._replace(operations=1, magnitude=16))
    same = (chosen == grey).flatten(1).all(1).float().mean()
    # besides the identity: colour, autocontrast and equalise leave a full grey ramp as it is
    assert same == pytest.approx(4 / 14, abs=0.06)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """Five identities, four crops of each."""
    folder = save_crops(tmp_path_factory.mktemp("loader") / "set", 5, 4)
    return open_set(folder, folder, nobody)


def test_batches_are_the_same_whatever_the_number_of_threads(training):
    parts = list(epoch_order(len(training), 6, seed=1, epoch=4))
    found = [
        list(Loader(training, STRONG, threads, torch.device("cpu")).batches(4, parts)) for threads in (1, 3)
    ]
    assert len(found[0]) == 3
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    plain = next(Loader(training, UNVARIED, 1, torch.device("cpu")).batches(0, parts))
    assert (plain.crops.permute(0, 2, 3, 1).numpy() == training.read(parts[0])).all()
    assert (plain.labels.numpy() == training.labels[parts[0]]).all()


def test_an_epoch_takes_every_image_once_in_another_order():
    first, second = (epoch_order(20, 5, seed=0, epoch=epoch) for epoch in (0, 1))
    assert first.shape == (4, 5) and sorted(first.ravel()) == list(range(20))
    assert (first != second).any()
    assert epoch_order(22, 5, seed=0, epoch=0).shape == (4, 5)
    assert epoch_order(3, 5, seed=0, epoch=0).shape == (1, 3)


def test_an_image_that_cannot_be_read_ends_the_batches(tmp_path):
    folder = save_crops(tmp_path / "set", 2, 2)
    training = open_set(folder, tmp_path, nobody)
    (folder / "0001" / "1.png").write_bytes(b"no image")
    parts = list(epoch_order(4, 2, seed=0, epoch=0))
    with pytest.raises(Exception, match=r"0001/1\.png is no image"):
        list(Loader(training, UNVARIED, 2, torch.device("cpu")).batches(0, parts))
