"""The card of a pack: its README.md, written from what training and evaluation left in the pack itself."""

import hashlib
import io
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flows.pack_evaluation import FIGURES_FILE, IDENTITIES, IMAGES, PRECISION, RULES, SOURCES
from negfacediff_core.errors import ConfigError
from negfacediff_core.evaluation.plots import COLOURS
from negfacediff_core.tensor_files import read_tensors

TRAINING = "training"
_TEMPLATE = Path(__file__).with_suffix(".md")
NETWORKS = ("recogniser", "judge", "detector", "first-stage", "generator")
# What the card tells of a network: the key of a figure, its title and form. The rest stands in training/.
_FIGURES = {
    "recogniser": (("narrowed_fdr", "FDR", ".1f"), ("narrowed_eer", "EER", ".1%")),
    "judge": (("fdr", "FDR", ".1f"), ("eer", "EER", ".1%")),
    "detector": (
        ("crops_recall", "recall", ".1%"),
        ("false_positives", "false positives", ".1%"),
        ("crops_landmark_error", "landmark error in eye distances", ".3f"),
    ),
    "first-stage": (("psnr", "PSNR in dB", ".1f"), ("codes_used", "codes used", ".0%")),
    "generator": (("held_out_loss", "loss", ".3f"), ("parameters", "parameters", ",")),
}
_SOURCE_TITLES = {"file": "held-out identities", "fitted": "fitted", "uniform": "uniform"}


def record_training(pack: Path, network: str, checkpoint: Path, figures: Mapping[str, Any]) -> None:
    """Write `pack`/training/<network>.json: settings, figures and loss curve of the training of `network`."""
    state = read_tensors(checkpoint)
    note = {
        "settings": state.get("origin") or state["settings"],
        "figures": {key: value for key, value in figures.items() if isinstance(value, int | float | str)},
        "curve": [_point(row) for row in state["curve"]],
    }
    folder = pack / TRAINING
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{network}.json").write_text(json.dumps(note) + "\n", encoding="utf-8")


def write_card(pack: Path) -> Path:
    """Write `pack`/README.md and its picture of the loss curves.

    Raises ConfigError if a network has not been trained, or the pack not evaluated.
    """
    notes = {network: _read(pack / TRAINING / f"{network}.json", network) for network in NETWORKS}
    rows = _read(pack / FIGURES_FILE, "evaluation")
    (pack / TRAINING / "curves.png").write_bytes(_curves(notes))
    text = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        networks="\n".join(_network_row(network, notes[network]) for network in NETWORKS),
        settings="\n".join(_settings_line(network, notes[network]) for network in NETWORKS),
        summary="\n".join(_summary(rows)),
        every="\n".join(_every(rows)),
        extent=f"{IDENTITIES} identities x {IMAGES} images",
        sampler=f"{rows[0]['sampler'].upper()} with {rows[0]['steps']} steps",
        precision=PRECISION,
        files="\n".join(_files(pack)),
        size=f"{sum(path.stat().st_size for path in _weights(pack)) / 1e6:.1f}",
    )
    card = pack / "README.md"
    card.write_text(text, encoding="utf-8")
    return card


def _read(path: Path, what: str) -> Any:
    if not path.exists():
        command = "evaluate" if what == "evaluation" else f"train {what}"
        raise ConfigError(f"{path} is not there yet: run `negfacediff pack {command}` first.")
    return json.loads(path.read_text(encoding="utf-8"))


def _point(row: Any) -> tuple[int, float]:
    """Step and loss of a curve's row, which is a mapping or starts with them."""
    return (row["step"], row["loss"]) if isinstance(row, dict) else (row[0], row[1])


def _network_row(network: str, note: Mapping[str, Any]) -> str:
    figures = note["figures"]
    shown = ", ".join(
        f"{title} {figures[key]:{form}}" for key, title, form in _FIGURES[network] if key in figures
    )
    minutes = f"{figures['seconds'] / 60:.0f} min" if "seconds" in figures else ""
    return f"| {network} | {note['curve'][-1][0]:,} | {minutes} | {shown} |"


def _settings_line(network: str, note: Mapping[str, Any]) -> str:
    return f"- **{network}**: `{json.dumps(note['settings'])}`"


def _summary(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line a source and rule: means over the seeds, and the lowest and highest gain over no negative."""
    for source, _ in SOURCES:
        plain = {row["seed"]: row["fdr"] for row in rows if (row["source"], row["rule"]) == (source, "none")}
        for rule, w in RULES:
            chosen = [row for row in rows if (row["source"], row["rule"]) == (source, rule)]
            if not chosen:
                continue
            gains = [row["fdr"] / plain[row["seed"]] for row in chosen]
            gain = "" if rule == "none" else f"{min(gains):.2f} to {max(gains):.2f}"
            cells = (
                f"{statistics.mean(row[key] for row in chosen):{form}}"
                for key, form in (("fdr", ".2f"), ("eer", ".1%"), ("detected_fraction", ".1%"))
            )
            clipped = statistics.mean(row["clipped_fraction"] for row in chosen)
            row = [_SOURCE_TITLES[source], rule, f"{w:g}", *cells, f"{clipped:.2%}", gain]
            yield f"| {' | '.join(row)} |"


def _every(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in sorted(rows, key=lambda row: (row["source"], row["rule"], row["seed"])):
        cells = [
            _SOURCE_TITLES[row["source"]],
            row["rule"],
            str(row["seed"]),
            f"{row['fdr']:.2f}",
            f"{row['eer']:.2%}",
            f"{row['fmr100']:.1%}",
            f"{row['genuine_mean']:.3f} ± {row['genuine_std']:.3f}",
            f"{row['impostor_mean']:.3f} ± {row['impostor_std']:.3f}",
            f"{row['detected_fraction']:.1%}",
            f"{row['clipped_fraction']:.2%}",
        ]
        yield f"| {' | '.join(cells)} |"


def _weights(pack: Path) -> list[Path]:
    kinds = {".onnx", ".ckpt", ".pt", ".npz", ".yaml"}
    return sorted(path for path in pack.rglob("*") if path.suffix in kinds)


def _files(pack: Path) -> Iterator[str]:
    for path in _weights(pack):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        yield f"| `{path.relative_to(pack)}` | {path.stat().st_size / 1e6:.2f} | `{digest[:16]}` |"


def _curves(notes: Mapping[str, Any]) -> bytes:
    figure = Figure(figsize=(11, 2.3), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (network, note), colour in zip(
        figure.subplots(1, len(notes)), notes.items(), COLOURS, strict=False
    ):
        steps, losses = zip(*note["curve"], strict=True)
        axes.plot(steps, losses, color=colour, linewidth=1)
        axes.set_yscale("log")
        axes.set_title(network, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7, which="both")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
