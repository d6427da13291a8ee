"""Score files for the challenge FRCSyn: what is in them, where they lie, and what they cannot be made of."""

import shutil

import numpy as np
import pytest
from verification_material import crop, lfw_order, material, save_bin, save_colour_network

from flows import verify_recogniser as flow_module
from flows.verify_recogniser import open_all, verify_recogniser
from negfacediff_core.errors import ConfigError, NegFaceDiffError
from negfacediff_core.faces.embed import load_embedder
from negfacediff_core.recognition import verify as verify_module
from negfacediff_core.recognition.embedding import embed_all
from negfacediff_core.recognition.fold_accuracy import THRESHOLDS, best_threshold
from negfacediff_core.recognition.frcsyn import score_file, systems
from negfacediff_core.recognition.pairs import read_pairs
from negfacediff_core.recognition.verification_tables import markdown

SAME = lfw_order(10, 2)


def save_comparisons(folder, head="path1,path2\n"):
    """A list of the same pairs without labels, of images in files."""
    folder.mkdir()
    rows = []
    for pair, colours in enumerate(material(SAME).reshape(-1, 2, 3)):
        for side, colour in enumerate(colours):
            (folder / f"{pair}_{side}.png").write_bytes(crop(colour))
        rows.append(f"{pair}_0.png,{pair}_1.png\n")
    (folder / "AgeDB.csv").write_text(head + "".join(rows))
    return folder / "AgeDB.csv"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two networks, the same pairs with and without labels, and those of another set."""
    made = tmp_path_factory.mktemp("frcsyn")
    for name in ("real", "synthetic"):
        save_colour_network(made / f"{name}.onnx", seed=len(name))
    save_comparisons(made / "agedb")
    save_bin(made / "cfp_fp.bin", SAME)
    save_bin(made / "training.bin", lfw_order(10, 3))
    return made


def verified(folder, out):
    """Verify two recognisers on a list with labels and one without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow_module, "create_markdown_artifact", lambda *_: None)
        return verify_recogniser.fn(
            recognisers=[f"{folder}/real.onnx", f"{folder}/synthetic.onnx"],
            sets=[f"{folder}/agedb/AgeDB.csv", f"{folder}/cfp_fp.bin"],
            out=str(out),
            draws=0,
            threads=1,
            frcsyn=f"{folder}/training.bin",
        )


@pytest.fixture(scope="module")
def results(folder):
    return verified(folder, folder / "out")


def test_a_line_is_a_comparison_in_the_order_of_the_list(folder, results):
    found = sorted(str(path.relative_to(folder / "out")) for path in (folder / "out").rglob("*.txt"))
    assert found == [
        *(
            f"frcsyn/{name}/{system}.txt"
            for name in ("AgeDB", "CFP-FP")
            for system in ("baseline", "proposed")
        ),
        "table.txt",
    ]
    for recogniser, system in (("real", "baseline"), ("synthetic", "proposed")):
        network = load_embedder(folder / f"{recogniser}.onnx")
        threshold = results["frcsyn"]["thresholds"][recogniser]
        for name in ("AgeDB", "CFP-FP"):
            lines = (folder / "out" / "frcsyn" / name / f"{system}.txt").read_text().splitlines()
            assert len(lines) == len(SAME)
            for line, colours in zip(lines, material(SAME).reshape(-1, 2, 3), strict=True):
                images = np.ones((2, 112, 112, 3), np.uint8) * colours[:, None, None].astype(np.uint8)
                one, other = network.embed(images, flip=True)
                cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
                score, decision = line.split(",")
                assert float(score) == pytest.approx(cosine, abs=1e-5)
                assert decision == str(int(cosine > threshold))
            # the networks tell these pairs apart without an error
            assert [line.endswith(",1") for line in lines] == SAME.tolist()


def test_of_what_is_done_only_score_files_that_are_missing_are_made(folder, results, tmp_path, monkeypatch):
    shutil.copytree(folder / "out", tmp_path / "out")
    whole = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.txt")}
    embedded = []
    monkeypatch.setattr(
        verify_module, "embed_all", lambda crops, *rest: embedded.append(crops) or embed_all(crops, *rest)
    )
    monkeypatch.setattr(flow_module, "choose_threshold", lambda *_: pytest.fail("it is there"))
    assert verified(folder, tmp_path / "out") == results and not embedded
    (tmp_path / "out" / "frcsyn" / "AgeDB" / "proposed.txt").unlink()
    assert verified(folder, tmp_path / "out") == results and len(embedded) == 2
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.txt")} == whole


def test_comparisons_without_labels_have_no_figures(results):
    assert results["sets"]["AgeDB"] == {"kind": "comparisons", "images": 80, "pairs": 40}
    assert list(results["figures"]["real"]) == ["CFP-FP"]
    text = markdown(results)
    assert "AgeDB" not in text
    assert "threshold that judges the pairs of training best: baseline (real) " in text


def test_comparisons_alone_make_no_table(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(flow_module, "create_markdown_artifact", lambda *_: None)
    results = verify_recogniser.fn(
        recognisers=[f"{folder}/synthetic.onnx"],
        sets=[f"{folder}/agedb/AgeDB.csv"],
        out=str(tmp_path),
        threads=1,
        frcsyn=f"{folder}/training.bin",
    )
    assert "###" not in markdown(results)
    assert (tmp_path / "frcsyn" / "AgeDB" / "proposed.txt").stat().st_size
    assert not (tmp_path / "frcsyn" / "AgeDB" / "baseline.txt").exists()


def test_scores_are_written_as_the_challenge_has_them():
    assert score_file(np.array([0.5, 0.25, -0.125]), 0.25) == b"0.500000,1\n0.250000,0\n-0.125000,0\n"


def test_the_first_of_two_recognisers_is_the_baseline():
    assert systems(["a", "b"]) == {"a": "baseline", "b": "proposed"}
    assert systems(["a"]) == {"a": "proposed"}
    with pytest.raises(ConfigError, match="3 recognisers are given"):
        systems(["a", "b", "c"])


@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_judges_more_pairs_rightly(seed):
    random = np.random.default_rng(seed)
    same = random.random(60) < 0.5
    distances = np.where(same, random.normal(1.2, 0.5, 60), random.normal(2, 0.5, 60)).clip(0, 4)
    right = [int(((distances < one) == same).sum()) for one in THRESHOLDS]
    assert best_threshold(distances, same) == THRESHOLDS[right.index(max(right))]


def refused(folder, recognisers=("real",), sets=("cfp_fp.bin",), frcsyn=""):
    """What is said before anything is embedded."""
    with pytest.raises(NegFaceDiffError) as error:
        open_all(
            [f"{folder}/{one}.onnx" for one in recognisers],
            [f"{folder}/{one}" for one in sets],
            "cpu",
            "",
            128,
            frcsyn and f"{folder}/{frcsyn}",
        )
    return str(error.value)


def test_what_score_files_cannot_be_made_of_is_refused(folder, tmp_path):
    assert "AgeDB does not say which pairs are genuine" in refused(folder, sets=["agedb/AgeDB.csv"])
    assert "one set of pairs that are said to be" in refused(folder, frcsyn="agedb/AgeDB.csv")
    assert "no folder of score files can be called 'a/b'" in refused(
        folder, sets=["cfp_fp.bin,name=a/b"], frcsyn="training.bin"
    )
    (folder / "agedb" / "mixed.csv").write_text("0_0.png,0_1.png\n1_0.png,1_1.png,1\n")
    assert "line 2: '1_0.png,1_1.png,1' is no pair" in refused(folder, sets=["agedb/mixed.csv"])


def test_a_list_without_labels_needs_no_head(tmp_path):
    listed = save_comparisons(tmp_path / "set", head="")
    assert len(read_pairs(listed, listed.parent, "set").pairs) == len(SAME)
