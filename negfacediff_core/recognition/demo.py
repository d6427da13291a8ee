"""The two recognisers of the demo pack: one conditions the generator, the other judges what it makes."""

from typing import Any, NamedTuple

from negfacediff_core.recognition.projection import ProjectionSettings
from negfacediff_core.recognition.train import TrainingSettings


class DemoNetwork(NamedTuple):
    """An `architecture` for `build_backbone`, how it is trained, and how its embeddings are narrowed."""

    architecture: dict[str, Any]
    settings: TrainingSettings
    projection: ProjectionSettings | None = None


# Another family, another input grid and another seed: the judge shares nothing with the recogniser but the
# renders.
DEMO_NETWORKS: dict[str, DemoNetwork] = {
    "recogniser": DemoNetwork(
        {
            "family": "iresnet",
            "layers": [1, 2, 2, 1],
            "channels": [32, 64, 96, 128],
            "width": 128,
            "stem_stride": 2,
            "input_pool": 2,
            "activation": "leaky",
        },
        TrainingSettings(steps=2400, seed=1),
        # Held-out identities differ in about 14 of the 128 dimensions. In 20 evened ones they are told apart
        # a little better (FDR 10.0 against 8.8), and they fill them: a uniform draw lies among faces.
        ProjectionSettings(width=20),
    ),
    "judge": DemoNetwork(
        {
            "family": "plain",
            "layers": [2, 2, 2],
            "channels": [48, 96, 160],
            "neck": 80,
            "width": 128,
            "input_pool": 3,
        },
        TrainingSettings(steps=2400, seed=2),
    ),
}
