"""How far few steps end from the solution of the ODE that DDIM and DPM-Solver++ both solve.

    OMP_NUM_THREADS=1 python benchmarks/convergence.py [--generator FOLDER]

From the same noise the deterministic samplers all approach one latent as steps grow more. The table is the
root mean square of the distance to it, that of DDIM with 500 steps, in units of that latent's own; guided by
a negative with w = 0.5. DPM-Solver++ ends here or there by where its steps lie (`spacing`).
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine, write_results
from plain import PlainSampler

from negfacediff_core.diffusion.checkpoint import Generator, load_generator
from negfacediff_core.diffusion.spacing import SPACINGS

DEMO = Path(__file__).parents[1] / "packs" / "demo"
IDENTITIES, FINE, W = 8, 500, 0.5
STEPS = (10, 15, 20, 30, 50)
ROWS: dict[str, tuple[str, dict[str, str]]] = {
    "DDIM": ("ddim", {}),
    **{f"DPM-Solver++, {spacing}": ("dpm_solver", {"spacing": spacing}) for spacing in SPACINGS},
}


def latents_of(generator: Generator, sampler: str, steps: int, **options: str) -> torch.Tensor:
    """Sample the latents of the first held-out identities, each with the next as its negative."""
    contexts = np.load(DEMO / "contexts" / "heldout.npz")["contexts"][: 2 * IDENTITIES].astype(np.float32)
    plain = PlainSampler(generator, sampler, W, steps=steps, **options)
    pairs = zip(contexts[:IDENTITIES], contexts[IDENTITIES:], strict=True)
    return torch.cat(
        [plain.latents(towards, away, identity, [0], 0) for identity, (towards, away) in enumerate(pairs)]
    )


def main() -> None:
    """Run and print everything; write `results/convergence.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--generator", type=Path, default=DEMO / "generator", help="default: the demo's")
    generator = load_generator(parser.parse_args().generator)
    fine = latents_of(generator, "ddim", FINE)
    size = fine.square().mean().sqrt()
    distances: dict[str, dict[int, float]] = {}
    print(f"{'steps':>28}" + "".join(f"{steps:>8}" for steps in STEPS))
    for name, (sampler, options) in ROWS.items():
        print(f"{name:>28}", end="", flush=True)
        distances[name] = {}
        for steps in STEPS:
            apart = (latents_of(generator, sampler, steps, **options) - fine).square().mean().sqrt()
            distances[name][steps] = float(apart / size)
            print(f"{distances[name][steps]:>8.4f}", end="", flush=True)
        print()
    results: dict[str, Any] = {"machine": machine(), "identities": IDENTITIES, "w": W, "fine": FINE}
    print(f"written to {write_results('convergence', {**results, 'distances': distances})}")


if __name__ == "__main__":
    main()
