"""The evaluation of a pack, and its card."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from flows.pack_card import NETWORKS, record_training, write_card
from flows.pack_evaluation import FIGURES_FILE, IDENTITIES, IMAGES, RULES, SOURCES, cases
from negfacediff_core.errors import ConfigError


def test_every_source_and_rule_is_built_with_every_seed():
    found = list(cases(Path("some/pack"), seeds=(0, 1, 2)))
    assert Counter((case.source, case.rule) for case in found) == {
        (source, rule): 3 for source, _ in SOURCES for rule, _ in RULES
    }
    assert len({case.build.name for case in found}) == len(found)
    for case in found:
        assert (case.build.identities, case.build.images) == (IDENTITIES, IMAGES)
        assert (case.build.samples.w == 0) == (case.rule == "none")
        assert case.build.samples.generator == "some/pack/generator"


def test_builds_of_one_seed_share_contexts_and_noise():
    for seed in (0, 5):
        found = [case.build for case in cases(Path("pack"), seeds=(seed,)) if case.source == "uniform"]
        assert len({build.contexts.model_dump_json() for build in found}) == 1
        assert {build.samples.seed for build in found} == {seed}


@pytest.fixture
def pack(tmp_path):
    """A pack with the notes of its trainings and its evaluation, where rule far doubles the FDR."""
    for network in NETWORKS:
        checkpoint = tmp_path / "checkpoint.pt"
        torch.save({"settings": {"seed": 7}, "curve": [[20, 2.0], [40, 1.5]]}, checkpoint)
        record_training(tmp_path, network, checkpoint, {"eer": 0.02, "seconds": 120.0, "curve": []})
    figures = {
        "sampler": "ddim",
        "steps": 20,
        "eer": 0.1,
        "fmr100": 0.2,
        "genuine_mean": 0.5,
        "genuine_std": 0.1,
        "impostor_mean": 0.0,
        "impostor_std": 0.1,
        "detected_fraction": 0.975,
        "clipped_fraction": 0.01,
    }
    rows = [
        {"source": source, "seed": seed, "rule": rule, "fdr": (3.0 + seed) * (2 if rule == "far" else 1)}
        | figures
        for seed in (0, 1)
        for source, _ in SOURCES
        for rule, _ in RULES
    ]
    (tmp_path / FIGURES_FILE).write_text(json.dumps(rows))
    return tmp_path


def test_the_card_shows_every_run_and_the_gain(pack):
    text = write_card(pack).read_text()
    assert "DDIM with 20 steps" in text
    for title in ("held-out identities", "fitted", "uniform"):
        assert f"| {title} | far | 0.5 | 7.00 | 10.0% | 97.5% | 1.00% | 2.00 to 2.00 |" in text
        assert f"| {title} | none | 0 | 3.50 | 10.0% | 97.5% | 1.00% |  |" in text
        for seed in (0, 1):
            assert f"| {title} | rand | {seed} | {3 + seed}.00 |" in text
    for network in NETWORKS:
        assert f"| {network} | 40 | 2 min | {'EER 2.0%' if network == 'judge' else ''} |" in text
    assert '`{"seed": 7}`' in text
    assert (pack / "training" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("file", "command"), [("training/judge.json", "train judge"), (FIGURES_FILE, "evaluate")]
)
def test_a_missing_part_names_the_command_that_makes_it(pack, file, command):
    (pack / file).unlink()
    with pytest.raises(ConfigError, match=f"negfacediff pack {command}"):
        write_card(pack)
