"""Several workers at once, each a process with an engine of its own and one thread."""

import multiprocessing
import sys
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

#: Images a worker makes, and the steps that each takes.
IMAGES, STEPS = 2, 2


def images_per_second(workers: int, kind: str, size: str, precision: str) -> float:
    """Image steps a second of all workers, from the start of the first to the end of the last."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(workers), context.SimpleQueue()
    processes = [
        context.Process(target=_work, args=(number, kind, size, precision, barrier, results))
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"a worker of {workers} ended with {[p.exitcode for p in processes]}")
    times = [results.get() for _ in processes]
    seconds = max(end for _, end in times) - min(start for start, _ in times)
    return workers * IMAGES * STEPS / seconds


def _work(number: int, kind: str, size: str, precision: str, barrier: Barrier, results: Any) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch
    from networks import random_generator, rows_of, without_decoder

    from negfacediff_core.diffusion.engine import SamplerSettings, SamplingEngine

    torch.set_num_threads(1)
    generator = without_decoder(random_generator(size, kind if kind == "cpu" else f"{kind}:{number}"))
    settings = SamplerSettings("dpm_solver", steps=STEPS, w=0.5)
    engine = SamplingEngine(generator, settings, batch_size=IMAGES, precision=precision)
    rows = rows_of(generator, IMAGES)
    engine.sample(*rows, seed=0)
    barrier.wait(timeout=300)
    start = time.time()
    engine.sample(*rows, seed=0)
    results.put((start, time.time()))
