"""`negfacediff verify-recogniser` and its flow: the tables and figures of sets whose answer is known."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from face_networks import save_linear
from verification_material import lfw_order, material, save_bin, save_colour_network

from flows import cli
from flows import verify_recogniser as flow_module
from flows.deployments import DEPLOYMENTS
from flows.verify_recogniser import verify_recogniser
from negfacediff_core.recognition import verify as verify_module
from negfacediff_core.recognition.embedding import embed_all
from negfacediff_core.recognition.verification_tables import markdown, plain_text, tables

SAME = lfw_order(10, 10)
# of twenty pairs in each fold two are wrong, and one in the first fold alone
WRONG = {"lfw": [20 * fold + place for fold in range(10) for place in (0, 10)], "agedb_30": [0]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sets, LFW of 90% and AgeDB-30 of 99.5%, and two recognisers that see colours alone."""
    made = tmp_path_factory.mktemp("verification")
    for name, wrong in WRONG.items():
        save_bin(made / "sets" / f"{name}.bin", SAME, wrong)
    for seed in (0, 1):
        save_colour_network(made / f"net{seed}.onnx", seed=seed)
    return made


@pytest.fixture(scope="module")
def shown():
    """The artifacts that the flow makes: text by key."""
    return {}


@pytest.fixture(scope="module")
def results(folder, shown):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow_module, "create_markdown_artifact", lambda text, key, _: shown.update({key: text}))
        return verify_recogniser.fn(
            recognisers=[f"{folder}/net0.onnx", f"{folder}/net1.onnx,name=other"],
            sets=[f"{folder}/sets"],
            out=f"{folder}/out",
            draws=50,
            batch=16,
            threads=2,
        )


def test_known_accuracies_come_out(results):
    assert list(results["sets"]) == ["LFW", "AgeDB-30"]
    for name in ("net0", "other"):
        figures = results["figures"][name]
        assert figures["LFW"]["accuracies"] == pytest.approx([0.9] * 10)
        assert figures["LFW"]["accuracy"] == pytest.approx(0.9)
        assert figures["AgeDB-30"]["accuracies"] == pytest.approx([0.95] + [1.0] * 9)
        assert figures["AgeDB-30"]["accuracy_std"] == pytest.approx(np.std([0.95] + [1.0] * 9))
    low, high = results["figures"]["net0"]["LFW"]["intervals"]["accuracy"]
    assert 0.8 < low < 0.9 < high < 1.0
    # both see the same right and the same wrong pairs
    assert results["differences"]["other"]["LFW"]["accuracy"] == {"difference": 0.0, "low": 0.0, "high": 0.0}
    assert results["sets"]["LFW"]["images"] == len({tuple(one) for one in material(SAME, WRONG["lfw"])})


def test_the_files_hold_what_is_returned(results, folder):
    assert json.loads((folder / "out" / "results.json").read_text()) == results
    assert (folder / "out" / "table.md").read_text() == markdown(results)
    assert (folder / "out" / "table.txt").read_text() == plain_text(results)


def test_the_artifact_is_the_table(results, folder, shown):
    assert shown["verify-recogniser"].startswith(markdown(results))
    assert f"{folder}/out/results.json" in shown["verify-recogniser"]


def test_the_table_is_like_those_of_papers(results):
    accuracies, rates, differences = tables(results)
    assert accuracies.head == ["recogniser", "LFW", "AgeDB-30", "average"]
    assert accuracies.rows[1] == ["other", "90.00 ± 0.00", "99.50 ± 1.50", "94.75"]
    assert rates.head[-2:] == ["TAR@1e-3", "TAR@1e-4"] and rates.rows[0][:3] == ["LFW", "net0", "200"]
    # 100 impostor pairs tell nothing of a FAR of 1e-3
    assert rates.rows[0][-1].endswith("*") and "Fewer than 1/FAR impostor pairs" in markdown(results)
    assert differences.rows[0][:3] == ["LFW", "other", "+0.00 [+0.00, +0.00]"]
    for table in (accuracies, rates, differences):
        assert {len(row) for row in table.rows} == {len(table.head)}
    lines = plain_text(results).splitlines()
    assert [line for line in lines if line.startswith("other")] == [
        "other       90.00 ± 0.00  99.50 ± 1.50    94.75"
    ]


def test_a_table_that_is_not_complete_has_dashes(results):
    partly = {
        **results,
        "figures": {"net0": {"LFW": results["figures"]["net0"]["LFW"]}, "other": {}},
        "differences": {},
    }
    accuracies, rates = tables(partly)
    assert accuracies.rows == [["net0", "90.00 ± 0.00", "-", "-"], ["other", "-", "-", "-"]]
    assert len(rates.rows) == 1


def test_templates_have_columns_of_their_own(results):
    tar = {"1e-1": 1.0, "1e-4": 0.5, "1e-5": 0.25}
    figures = {"genuine": 9, "impostor": 10**6, "eer": 0.1, "auc": 0.9, "tar": tar, "tar_closest": tar}
    more = {
        **results,
        "sets": {**results["sets"], "IJB-C": {"kind": "templates"}},
        "figures": {**results["figures"], "net0": {**results["figures"]["net0"], "IJB-C": figures}},
    }
    table = tables(more)[0]
    assert table.head[-2:] == ["IJB-C @1e-5", "IJB-C @1e-4"]
    assert table.rows[0][-3:] == ["94.75", "25.00", "50.00"] and table.rows[1][-2:] == ["-", "-"]
    assert tables(more)[1].head[-4:] == ["TAR@1e-1", "TAR@1e-3", "TAR@1e-4", "TAR@1e-5"]
    assert "IJB-C: TAR at FAR" in table.title


def again(folder, out, **given):
    """Verify as `results` was made; returns the results, and how often a set was embedded."""
    embedded = []

    def noted(crops, *rest):
        embedded.append(crops)
        return embed_all(crops, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow_module, "create_markdown_artifact", lambda *_: None)
        patch.setattr(verify_module, "embed_all", noted)
        parameters = {
            "recognisers": [f"{folder}/net0.onnx", f"{folder}/net1.onnx,name=other"],
            "sets": [f"{folder}/sets"],
            "draws": 50,
            "batch": 16,
            "threads": 1,
        }
        return verify_recogniser.fn(out=str(out), **(parameters | given)), len(embedded)


@pytest.fixture
def copied(results, folder, tmp_path):
    """A folder with the results of both sets."""
    (tmp_path / "results.json").write_bytes((folder / "out" / "results.json").read_bytes())
    return tmp_path


def test_what_is_done_is_not_verified_again(results, folder, copied, capsys):
    assert again(folder, copied) == (results, 0)
    assert "as nothing they depend on has changed: LFW, AgeDB-30" in capsys.readouterr().out
    assert (copied / "table.txt").read_text() == plain_text(results)


def test_after_an_interruption_the_sets_that_are_left_are_verified(results, folder, tmp_path, monkeypatch):
    write, written = flow_module._write, []

    def interrupted(where, partly):
        write(where, partly)
        written.append(list(partly["done"]))
        if len(written) == 3:  # the second set by the first recogniser
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(flow_module, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            again(folder, tmp_path)
    assert written == [[], ["LFW"], ["LFW"]]
    assert again(folder, tmp_path) == (results, 2)


def test_what_decides_the_figures_makes_all_of_them_anew(results, folder, copied):
    bgr = [f"{folder}/net0.onnx,colour=BGR"]
    assert again(folder, copied, flip=False)[1] == 4
    assert again(folder, copied, flip=False, recognisers=bgr)[1] == 2
    assert again(folder, copied, flip=False, recognisers=bgr, draws=0)[1] == 2
    assert again(folder, copied, flip=False, recognisers=[f"{bgr[0]},pixels=0..1"], draws=0)[1] == 2
    (copied / "results.json").write_text("cut sho")
    assert again(folder, copied) == (results, 4)


def test_a_set_that_has_changed_is_verified_again(results, folder, copied):
    for name, wrong in WRONG.items():
        save_bin(copied / "sets" / f"{name}.bin", SAME, wrong if name == "lfw" else [0, 1])
    found, embedded = again(folder, copied, sets=[f"{copied}/sets"])
    assert embedded == 2 and found["done"]["LFW"] == results["done"]["LFW"]
    assert found["figures"]["net0"]["LFW"] == results["figures"]["net0"]["LFW"]
    assert found["figures"]["net0"]["AgeDB-30"]["accuracies"][0] == pytest.approx(0.9)


def test_what_the_command_has_opened_the_flow_takes(folder, tmp_path, monkeypatch):
    opened, open_all = [], flow_module.open_all
    monkeypatch.setattr(flow_module, "open_all", lambda *given: opened.append(given) or open_all(*given))
    given = (f"{folder}/net0.onnx",), (f"{folder}/sets/lfw.bin",), "cpu", "", 128, ""
    flow_module.open_once(*given)
    for count in (1, 2):  # what a second flow finds may be something else
        again(folder, tmp_path, recognisers=list(given[0]), sets=list(given[1]))
        assert len(opened) == count


def run(*arguments):
    """Run the command line in this process and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["verify-recogniser", *arguments])
    return stop.value.code


def launcher(monkeypatch, launch):
    """Have the command start its flow with `launch`; Prefect's server, slow to import, is left aside."""
    monkeypatch.setitem(sys.modules, "flows.launch", SimpleNamespace(launch=launch))


def test_the_command_prints_the_tables_and_says_where_they_lie(
    folder, tmp_path, monkeypatch, capsys, results
):
    given = {}

    def launched(flow, after_interrupt, **parameters):
        given.update(parameters, said=after_interrupt)
        return results

    launcher(monkeypatch, launched)
    out = str(tmp_path / "out")
    net = f"{folder}/net0.onnx"
    assert run(f"{folder}/sets", "--recogniser", net, "--out", out, "--no-flip", "--threads", "1") == 0
    assert given == {
        "recognisers": [net],
        "sets": [f"{folder}/sets"],
        "out": out,
        "flip": False,
        "detector_scores": True,
        "draws": 1000,
        "batch": 32,
        "threads": 1,
        "device": "cpu",
        "detector": "",
        "detector_size": 128,
        "frcsyn": "",
        "said": f"Figures so far are in {out}; the same command goes on with the next set:",
    }
    printed = capsys.readouterr().out
    assert plain_text(results) in printed and f"{out}/table.md" in printed


BAD = {
    "no recogniser": (["{folder}/sets"], "recogniser"),
    "missing set": (
        ["{folder}/none.bin", "--recogniser", "{folder}/net0.onnx"],
        "there is no verification set",
    ),
    "missing recogniser": (["{folder}/sets", "--recogniser", "{folder}/none.onnx"], "There is no"),
    "a set twice": (
        ["{folder}/sets", "{folder}/sets/lfw.bin", "--recogniser", "{folder}/net0.onnx"],
        "two verification sets are called LFW",
    ),
    "no such pixels": (["{folder}/sets", "--recogniser", "{folder}/net0.onnx,pixels=2"], "pixels one of"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_paragraph_before_anything_starts(folder, monkeypatch, capsys, kind):
    arguments, reason = BAD[kind]
    launcher(monkeypatch, lambda *_, **__: pytest.fail("it was started"))
    assert run(*(argument.format(folder=folder) for argument in arguments)) == 2
    assert reason in capsys.readouterr().err


def test_one_size_of_crops_fits_all_recognisers_or_nothing_is_embedded(folder, monkeypatch, tmp_path, capsys):
    save_linear(tmp_path / "wide.onnx", 4, size=128)
    launcher(monkeypatch, lambda *_, **__: pytest.fail("it was started"))
    net = f"{folder}/net0.onnx"
    assert run(f"{folder}/sets", "--recogniser", net, "--recogniser", f"{tmp_path}/wide.onnx") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(r"the images of LFW have 112x112 pixels, and wide\.onnx takes 128x128", error)


def test_the_form_of_the_deployment_asks_for_no_store():
    deployment = next(one for one in DEPLOYMENTS if one.flow == "verify-recogniser")
    assert deployment.form("/data/faces") == {"out": "/data/faces/verification"}
