"""Recogniser networks: state dicts of the published iResNets, shapes, seeds and errors."""

import json
from pathlib import Path

import pytest
import torch

from negfacediff_core.errors import ConfigError
from negfacediff_core.recognition.backbones import IRESNET_LAYERS, IResNet, build_backbone
from negfacediff_core.recognition.demo import DEMO_NETWORKS

DATA = Path(__file__).parent / "data"
SMALL = {
    "iresnet": {"family": "iresnet", "layers": [1, 1], "channels": [8, 16], "width": 12, "input_pool": 4},
    "plain": {
        "family": "plain",
        "layers": [1, 2],
        "channels": [8, 16],
        "neck": 4,
        "width": 12,
        "input_pool": 3,
    },
}


@pytest.mark.parametrize("depth", [50, 100])
def test_iresnet_has_the_state_dict_of_the_reference(depth: int) -> None:
    manifest = json.loads((DATA / f"iresnet{depth}_manifest.json").read_text())
    with torch.device("meta"):
        network = IResNet(IRESNET_LAYERS[depth])
    found = [[key, list(t.shape), str(t.dtype)[6:]] for key, t in network.state_dict().items()]
    assert found == manifest["keys"]
    assert sum(p.numel() for p in network.parameters()) == manifest["param_count"]


@pytest.mark.parametrize("depth", [18, 34])
def test_shallow_iresnets_end_in_the_same_grid(depth: int) -> None:
    with torch.device("meta"):
        network = IResNet(IRESNET_LAYERS[depth])
        assert network(torch.zeros(2, 3, 112, 112)).shape == (2, 512)
    assert network.fc.in_features == 512 * 7 * 7


@pytest.mark.parametrize("family", SMALL)
def test_embeddings_depend_on_each_crop_alone(family: str) -> None:
    network = build_backbone(SMALL[family]).eval()
    crops = torch.rand(3, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = network(crops)
    assert together.shape == (3, 12)
    torch.testing.assert_close(together[1:2], network(crops[1:2]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize("family", SMALL)
def test_pooled_crops_give_the_same_embedding(family: str) -> None:
    network = build_backbone(SMALL[family]).eval()
    crops = torch.rand(2, 3, 112, 112) * 2 - 1
    pooled = torch.nn.functional.avg_pool2d(crops, SMALL[family]["input_pool"])
    torch.testing.assert_close(network.embed_pooled(pooled), network(crops))


def test_block_is_the_formula_of_the_paper() -> None:
    network = build_backbone(SMALL["iresnet"], seed=3).eval()
    block = network.layer1[0]
    for norm in (block.bn1, block.bn2, block.bn3, block.downsample[1]):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 8, 6, 6)

    def normalise(values: torch.Tensor, norm: torch.nn.BatchNorm2d) -> torch.Tensor:
        column = (1, -1, 1, 1)
        scaled = (values - norm.running_mean.view(column)) / (norm.running_var.view(column) + 1e-5).sqrt()
        return scaled * norm.weight.view(column) + norm.bias.view(column)

    inner = torch.conv2d(normalise(x, block.bn1), block.conv1.weight, padding=1)
    inner = normalise(inner, block.bn2)
    inner = torch.where(inner > 0, inner, 0.25 * inner)
    inner = normalise(torch.conv2d(inner, block.conv2.weight, stride=2, padding=1), block.bn3)
    shortcut = normalise(torch.conv2d(x, block.downsample[0].weight, stride=2), block.downsample[1])
    torch.testing.assert_close(block(x), inner + shortcut, atol=1e-5, rtol=1e-4)


def test_weights_come_from_the_seed_and_leave_global_randomness_alone() -> None:
    before = torch.get_rng_state()
    first, same, other = (build_backbone(SMALL["plain"], seed).fc.weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_embedding_keeps_no_common_direction() -> None:
    network = build_backbone(SMALL["iresnet"])
    network.train()
    embeddings = network(torch.rand(16, 3, 112, 112) * 2 - 1)
    torch.testing.assert_close(embeddings.mean(0), torch.zeros(12), atol=1e-5, rtol=0)
    assert not network.features.bias.requires_grad
    assert not network.features.weight.requires_grad


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ({"family": "vit"}, "iresnet, plain"),
        ({"layers": [1]}, "iresnet, plain"),
        (SMALL["iresnet"] | {"depth": 3}, "depth"),
        (SMALL["iresnet"] | {"layers": [1, 1, 1]}, "as many `channels` as `layers`"),
        (SMALL["iresnet"] | {"activation": "gelu"}, "prelu, leaky"),
        (SMALL["plain"] | {"layers": [0, 1]}, "at least one convolution"),
    ],
)
def test_impossible_architectures_are_refused(architecture: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_backbone(architecture)


def test_demo_networks_are_small_and_apart() -> None:
    networks = {name: build_backbone(row.architecture) for name, row in DEMO_NETWORKS.items()}
    assert set(networks) == {"recogniser", "judge"}
    megabytes = sum(p.numel() for n in networks.values() for p in n.parameters()) * 4 / 1e6
    assert megabytes < 7
    assert type(networks["recogniser"]) is not type(networks["judge"])
    assert len({row.settings.seed for row in DEMO_NETWORKS.values()}) == 2
