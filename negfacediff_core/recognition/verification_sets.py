"""Finding verification sets by a path and what is said after it: `PATH[,option=value]...`."""

from collections.abc import Sequence
from pathlib import Path

from negfacediff_core.errors import ConfigError
from negfacediff_core.faces.detect import Detector
from negfacediff_core.recognition.bin_sets import read_bin
from negfacediff_core.recognition.ijbc import TemplateSet, is_template_set, read_templates
from negfacediff_core.recognition.pair_sets import ComparisonList, PairSet
from negfacediff_core.recognition.pairs import read_pairs
from negfacediff_core.recognition.path_options import parse

#: Whatever can be verified, or compared.
VerificationSet = PairSet | TemplateSet | ComparisonList

#: The names that papers give to the sets of these files, in the order of their tables.
NAMES = {
    "lfw": "LFW",
    "agedb_30": "AgeDB-30",
    "cfp_fp": "CFP-FP",
    "cfp_ff": "CFP-FF",
    "calfw": "CALFW",
    "cplfw": "CPLFW",
    "IJBC": "IJB-C",
    "IJBB": "IJB-B",
}
#: Lists that are looked for in a folder of images.
LISTS = ("pairs.txt", "pairs.csv")


def open_sets(texts: Sequence[str], detector: Detector | None = None) -> list[VerificationSet]:
    """Open sets, and check all of them but the pixels.

    A text is `PATH[,name=NAME][,images=FOLDER]`. The path is a `.bin`, a pair list (`.txt` or `.csv`, of
    images beside it or in `images`), a folder in the layout of IJB-C, a folder with a list (LISTS), or one
    that holds `.bin` sets, of which all are taken. The detector aligns pairs of images that are no crops of
    112x112. Raises ConfigError for a path that is none of these, and
    for two sets of one name; NegFaceDiffError for a set that is damaged.
    """
    found = [one for text in texts for one in _open(text, detector)]
    names = [one.name for one in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two verification sets are called {twice}: name one of them, PATH,name=NAME")
    return found


def _open(text: str, detector: Detector | None) -> list[VerificationSet]:
    path, options = parse(text, ("name", "images"))
    if not path.exists():
        raise ConfigError(f"there is no verification set {path}: check the path")
    name = options.get("name") or NAMES.get(path.stem, path.stem)
    if path.is_dir() and not is_template_set(path):
        return _open_folder(path, options, detector)
    if "images" in options and path.suffix not in (".txt", ".csv"):
        raise ConfigError(f"{text!r}: only a pair list (.txt, .csv) has its images in another folder")
    if path.is_dir():
        return [read_templates(path, name)]
    if path.suffix == ".bin":
        return [read_bin(path, name, detector)]
    if path.suffix in (".txt", ".csv"):
        return [read_pairs(path, Path(options.get("images", path.parent)), name, detector)]
    raise ConfigError(
        f"{path} is no verification set: expected a .bin, a pair list (.txt, .csv), or a folder with one, "
        "with .bin sets or in the layout of IJB-C"
    )


def _open_folder(folder: Path, options: dict[str, str], detector: Detector | None) -> list[VerificationSet]:
    """The sets in a folder: of its pair list, or all `.bin` sets, in the order of NAMES."""
    for listed in LISTS:
        if (folder / listed).is_file():
            name = options.get("name") or NAMES.get(folder.name, folder.name)
            return [read_pairs(folder / listed, Path(options.get("images", folder)), name, detector)]
    order = {stem: number for number, stem in enumerate(NAMES)}
    bins = sorted(folder.glob("*.bin"), key=lambda path: (order.get(path.stem, len(order)), path.stem))
    if not bins or options:
        asked = f", and {', '.join(options)} cannot be said of several" if bins else ""
        raise ConfigError(
            f"the folder {folder} holds no {' or '.join(LISTS)} and is not in the layout of IJB-C (meta/, "
            f"loose_crop/), and has {len(bins)} .bin sets{asked}: give one set"
        )
    return [read_bin(path, NAMES.get(path.stem, path.stem), detector) for path in bins]
