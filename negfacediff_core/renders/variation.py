"""What changes from image to image: pose, expression, gaze, light, camera, clothes, backdrop and sensor."""

import math
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from negfacediff_core.renders.look import Colour, Vector, vector
from negfacediff_core.renders.shade import Light

#: Expressions as sums of facial actions, with how often each is drawn. "*" stands for Left and Right.
EXPRESSIONS: dict[str, tuple[float, dict[str, float]]] = {
    "smile": (0.31, {"mouthSmile*": 1.0, "cheekSquint*": 0.5, "eyeSquint*": 0.3}),
    "grin": (0.15, {"mouthSmile*": 0.9, "jawOpen": 0.25, "mouthUpperUp*": 0.5, "mouthLowerDown*": 0.4}),
    "open": (0.1, {"jawOpen": 0.6}),
    "surprise": (0.07, {"jawOpen": 0.5, "browInnerUp": 1.0, "browOuterUp*": 0.8, "eyeWide*": 0.8}),
    "frown": (0.04, {"browDown*": 0.6, "mouthFrown*": 0.8}),
    "squint": (0.08, {"eyeSquint*": 0.8, "eyeBlink*": 0.25}),
    "blink": (0.02, {"eyeBlink*": 0.9}),
    "raise": (0.08, {"browInnerUp": 0.6, "browOuterUp*": 0.6}),
    "pucker": (0.05, {"mouthPucker": 0.8}),
    "press": (0.06, {"mouthPress*": 0.7, "mouthRollLower": 0.4}),
    "sneer": (0.04, {"noseSneer*": 0.5, "mouthUpperUp*": 0.3}),
}
BACKDROP_CELLS = 16


class Variation(NamedTuple):
    """One image's draw; angles in radians, distances in centimetres, colours linear RGB."""

    expression: dict[str, float]  # name -> strength
    yaw: float
    pitch: float
    roll: float
    gaze: Vector  # unit
    distance: float  # camera to the eyes
    light: Light
    exposure: float
    skin_brightness: float
    hair_volume: float
    glasses: float  # uniform in [0, 1], compared with how often the identity wears them
    cloth: Colour
    neckline: float
    backdrop: NDArray[np.float64]  # (BACKDROP_CELLS, BACKDROP_CELLS, 3)
    zoom: float
    jitter: NDArray[np.float64]  # (2,) standard normal: where the crop is off
    scale: float  # uniform in [0, 1]: the face's size within a range of scales
    position: NDArray[np.float64]  # (2,) uniform in [0, 1]: where a face of a range of scales lies
    tilt: float  # its in-plane rotation
    blur: float  # standard deviation in pixels of a 112-pixel face; 0 for none
    sensor_noise: float
    grey: bool


def draw_variation(rng: Generator) -> Variation:
    """Draw one image's variation; every quantity is drawn every time, so that one never shifts another."""
    yaw = float(np.clip(rng.normal(0, 0.30), -1.0, 1.0))
    sideways, upwards = rng.normal(0, 0.14) - 0.3 * yaw, rng.normal(0, 0.08)
    gaze = np.array([math.sin(sideways), math.cos(sideways) * math.cos(upwards), math.sin(upwards)])
    return Variation(
        expression=_draw_expression(rng),
        yaw=yaw,
        pitch=float(np.clip(rng.normal(0, 0.15), -0.5, 0.5)),
        roll=float(rng.normal(0, 0.08)),
        gaze=vector(gaze / np.linalg.norm(gaze)),
        distance=float(rng.uniform(55, 140)),
        light=_draw_light(rng),
        exposure=float(np.exp(rng.normal(0.0, 0.2))),
        skin_brightness=float(np.exp(rng.normal(0, 0.03))),
        hair_volume=float(1 + rng.normal(0, 0.08)),
        glasses=float(rng.random()),
        cloth=vector(rng.uniform(0.02, 0.7) * np.exp(rng.normal(0, 0.35, 3))),
        neckline=float(rng.choice([-1.0, 1.0, 2.0])),
        backdrop=_draw_backdrop(rng),
        zoom=float(np.exp(rng.normal(0, 0.03))),
        jitter=rng.normal(0, 1, 2),
        scale=float(rng.random()),
        position=rng.random(2),
        tilt=float(rng.normal(0, 0.14)),
        blur=float(rng.uniform(0.3, 1.3)) if rng.random() < 0.35 else 0.0,
        sensor_noise=float(rng.uniform(0, 0.016)),
        grey=bool(rng.random() < 0.08),
    )


def _draw_expression(rng: Generator) -> dict[str, float]:
    """None, one or two expressions of strength [.2, .9]; a second one only adds to the first."""
    names = list(EXPRESSIONS)
    chances = np.array([chance for chance, _ in EXPRESSIONS.values()])
    expression: dict[str, float] = {}
    for _ in range(int(rng.choice([0, 1, 1, 2]))):
        name = names[rng.choice(len(names), p=chances / chances.sum())]
        expression[name] = max(expression.get(name, 0.0), float(rng.uniform(0.2, 0.9)))
    return expression


def _draw_light(rng: Generator) -> Light:
    azimuth, elevation = rng.normal(0, 0.75), rng.uniform(-0.1, 1.1)
    key = _direction(azimuth, elevation)
    lamps = [np.concatenate([key, rng.uniform(0.4, 1.15) * np.exp(rng.normal(0, 0.1, 3))])]
    fill = _direction(azimuth + rng.choice([-1, 1]) * rng.uniform(1.0, 2.5), 0.3)
    fill_colour = rng.uniform(0.1, 0.5) * np.exp(rng.normal(0, 0.15, 3))
    if rng.random() < 0.6:
        lamps.append(np.concatenate([fill, fill_colour]))
    level = rng.uniform(0.25, 0.7)
    sky = level * np.exp(rng.normal(0, 0.08, 3))
    ground = 0.6 * level * np.exp(rng.normal(0, 0.1, 3)) * np.array([1.08, 1.0, 0.93])
    return Light(lamps=np.array(lamps), ambient=np.stack([sky, ground]))


def _direction(azimuth: float, elevation: float) -> NDArray[np.float64]:
    """Unit vector; azimuth 0 is straight ahead of the face."""
    flat = math.cos(elevation)
    return np.array([math.sin(azimuth) * flat, math.cos(azimuth) * flat, math.sin(elevation)])


def _draw_backdrop(rng: Generator) -> NDArray[np.float64]:
    """Draw a blurred backdrop: a lit wall, soft mottling, out-of-focus spots, or out-of-focus bands."""
    base = rng.uniform(0.03, 0.65) * np.exp(rng.normal(0, 0.18, 3))
    kind = rng.integers(4)
    axis = np.linspace(-1, 1, BACKDROP_CELLS)
    x, y = np.meshgrid(axis, axis)
    turn = rng.uniform(0, 2 * np.pi)
    along = (math.cos(turn) * x + math.sin(turn) * y)[..., None]
    picture = base * np.exp(rng.uniform(0, 0.7) * along)
    if kind == 1:
        for _ in range(6):
            wave = rng.normal(0, 3.0, 2)
            phase = wave[0] * x + wave[1] * y + rng.uniform(0, 2 * np.pi)
            picture = picture * np.exp(
                (rng.normal(0, 0.22) + rng.normal(0, 0.08, 3)) * np.sin(phase)[..., None]
            )
    elif kind == 2:
        for _ in range(int(rng.integers(3, 9))):
            centre, radius = rng.uniform(-1.2, 1.2, 2), rng.uniform(0.12, 0.5)
            spot = np.exp(-(((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / radius**2))
            picture = picture * np.exp(rng.normal(0, 0.8) + rng.normal(0, 0.25, 3)) ** spot[..., None]
    elif kind == 3:
        for edge in rng.uniform(-1, 1, int(rng.integers(1, 5))):
            side = 1 / (1 + np.exp(-12 * (along - edge)))
            picture = picture * np.exp(rng.normal(0, 0.5) + rng.normal(0, 0.12, 3)) ** side
    return np.clip(picture, 0.004, 1.0)
