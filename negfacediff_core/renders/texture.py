"""Small numeric pieces of the painted surface: smooth steps and value noise, as numba functions."""

import math

from negfacediff_core.errors import ConfigError

try:
    from numba import njit
except ModuleNotFoundError as error:
    raise ConfigError(
        "Rendering faces needs the extra [render]: run NEGFACEDIFF_EXTRAS=render ./run ..., or install "
        "negfacediff[render]."
    ) from error

#: How every inner loop here is compiled. Divisions may become multiplications and sums be fused, which
#: repeats bit for bit on one machine; nothing else of fast-math is allowed, because order and NaN must mean
#: what they say.
compiled = njit(cache=True, error_model="numpy", fastmath={"arcp", "contract"})


@compiled
def smoothstep(value: float, start: float, end: float) -> float:
    """Rise smoothly from 0 at `start` to 1 at `end` (which may lie below `start`)."""
    t = min(1.0, max(0.0, (value - start) / (end - start)))
    return t * t * (3.0 - 2.0 * t)


@compiled
def _lattice(i: int, j: int, k: int, seed: int) -> float:
    """Hash a lattice point to [0, 1]."""
    h = (i * 374761393 + j * 668265263 + k * 2147483647 + seed * 1274126177) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 1274126177) & 0xFFFFFFFF
    return ((h ^ (h >> 16)) & 0xFFFF) / 65535.0


@compiled
def noise(x: float, y: float, z: float, seed: int) -> float:
    """Value noise in [-1, 1]: smooth, one feature a unit of length, another field for each integer `seed`."""
    i, j, k = math.floor(x), math.floor(y), math.floor(z)
    u, v, w = smoothstep(x - i, 0.0, 1.0), smoothstep(y - j, 0.0, 1.0), smoothstep(z - k, 0.0, 1.0)
    total = 0.0
    for a in range(2):
        for b in range(2):
            weight = (u if a else 1.0 - u) * (v if b else 1.0 - v)
            near, far = _lattice(i + a, j + b, k, seed), _lattice(i + a, j + b, k + 1, seed)
            total += weight * (near + (far - near) * w)
    return 2.0 * total - 1.0


@compiled
def bump(distance: float, width: float) -> float:
    """Gaussian bump: 1 at distance 0, 1 / e at `width`."""
    return math.exp(-((distance / width) ** 2))
