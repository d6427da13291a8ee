"""DATASHEET.md: answers to the questions of "Datasheets for Datasets" (Gebru et al., arXiv 1803.09010)."""

from typing import Any

from negfacediff_core.export.about import LIMITS, NO_REAL_PEOPLE, NOT_FOR, About, checked_for_leakage
from negfacediff_core.export.card import licence_table, table


def datasheet(about: About) -> str:
    """Return the datasheet in Markdown."""
    idle = {"variant"} if about.settings["format"] != "rec" else set()
    idle |= {"quality"} if about.settings["encoding"] == "png" else set()
    asked = {
        name: _text(value) for name, value in about.settings.items() if value is not None and name not in idle
    }
    facts = ", ".join(about.layout.facts)
    terms = f"{about.terms.text} {about.accepted}".rstrip()
    answers = {
        "Motivation": {
            "For what purpose was it created?": about.uses,
            "Who created it?": "Whoever ran the build: fill in your name before you publish it.",
        },
        "Composition": {
            "What do the instances represent?": f"{NO_REAL_PEOPLE} {about.size}.",
            "How many are there?": f"{about.size}; {about.images_each} images each.",
            "Is it a sample of a larger set?": "It is what was selected of the run "
            f"`{about.run}`, by:\n\n{table(('setting', 'value'), asked)}",
            "Is there a label?": "The identity that the image was made for, and as facts of each image: "
            f"{facts}. That the image shows that identity was not checked by people.",
            "Is anything missing?": "Images that failed, show no face, or were not selected are left out.",
            "Are there recommended splits?": "No: all of it is for training.",
            "Are there errors or noise?": LIMITS,
            "Does it contain data that might be confidential, or offensive?": "No text and no names. Faces "
            "can be unsightly where sampling failed; nobody looked at every image.",
            "Does it relate to people, and can they be identified?": f"{NO_REAL_PEOPLE} "
            f"{checked_for_leakage(about)}",
        },
        "Collection": {
            "How was the data acquired?": f"Computed:\n\n{table(('', ''), about.method)}",
            "Over what time?": f"The newest image was made on {about.made}.",
            "Were people involved, and did they consent?": "No people were photographed for it. The images "
            "that the generator was trained on have terms of their own; see the weights below.",
        },
        "Preprocessing": {
            "Was the data preprocessed?": _preprocessing(about),
        },
        "Uses": {"What may it be used for?": about.uses, "What should it not be used for?": NOT_FOR},
        "Distribution": {
            "Under which licence?": f"{terms}\n\n{licence_table(about)}",
        },
        "Maintenance": {
            "Who maintains it?": "Whoever publishes it: fill in how you can be reached.",
            "Can it be checked?": "`manifest.json` holds the SHA-256 of every file and the fingerprints of "
            "all that it was made from: the same build makes the same images.",
        },
    }
    parts = [f"# Datasheet of {about.title}"]
    for section, questions in answers.items():
        parts.append(f"## {section}")
        parts += [f"**{question}** {answer}" for question, answer in questions.items()]
    return "\n\n".join(parts) + "\n"


def _text(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _preprocessing(about: About) -> str:
    encoded = about.settings["encoding"].upper()
    if about.settings["encoding"] == "jpeg":
        encoded += f" of quality {about.settings['quality']} without chroma subsampling"
    if about.settings["images"] == "raw":
        return f"No: the images are as the generator made them, encoded as {encoded}."
    return (
        "The face of each image was found, brought to the five points of the 112x112 template by a "
        f"similarity transform, and encoded as {encoded}."
    )
