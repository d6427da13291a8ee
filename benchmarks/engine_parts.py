"""The parts of the engine's benchmark: what each times, in the plain form and in the engine."""

import os

import torch
from floors import floor_seconds, operations_of, peak_bytes
from networks import rows_of, without_networks
from plain import IMAGES, PlainDecoder
from steps import (
    MOST_DIFFERENT,
    MOST_OUTSIDE,
    Row,
    Setup,
    engine_for,
    engine_step,
    pair_operations,
    plain_step,
    step_error,
    step_floor,
    steps_timed,
)

from negfacediff_core.diffusion.engine import DECODED_AT_ONCE
from negfacediff_core.diffusion.precision import PRECISIONS, products_in

#: Samplers and their steps: two evaluations each, with a negative.
SAMPLINGS = {
    "DDPM-1000": ("ddpm", 1000),
    "DDIM-200": ("ddim", 200),
    "DDIM-50": ("ddim", 50),
    "DPM-Solver++ 20": ("dpm_solver", 20),
}


def evaluations(setup: Setup) -> list[Row]:
    """Guided steps at several batches: two evaluations an image each."""
    batches = [1, 8] if setup.kind == "cpu" else [1, 8, 50]
    rows = []
    for precision in setup.precisions:
        error = step_error(setup, precision)
        # a GPU may take kernels that round otherwise, such as Winograd's
        most = MOST_DIFFERENT if precision == "fp32" and setup.kind == "cpu" else None
        rows.append(Row(f"relative difference, {precision}", error, target=most, at_most=True))
        for batch in batches:
            plain = plain_step(setup, batch)
            here = engine_step(setup, batch, precision)
            rows.append(
                setup.row(
                    f"evaluations, {precision}, batch {batch}",
                    plain / here,
                    plain=plain / (2 * batch),
                    here=here / (2 * batch),
                    floor=step_floor(setup, batch, precision) / (2 * batch),
                    note=f"{2 * batch / here:.3g} evaluations/s",
                )
            )
    if setup.kind == "cuda":
        exact, fast = (plain_step(setup, IMAGES, products) / (2 * IMAGES) for products in ("fp32", "tf32"))
        rows.append(Row("the plain form itself in TF32", exact / fast, plain=exact, here=fast))
        rows += largest_batches(setup)
    return rows


def largest_batches(setup: Setup) -> list[Row]:
    """Double the batch in bfloat16 until it does not fit or no longer gains; the best is kept."""
    rows, best = [], 0.0
    for batch in (64, 128, 256, 512, 1024) if not setup.quick else (64, 256):
        torch.cuda.reset_peak_memory_stats()
        try:
            here = engine_step(setup, batch, "bf16")
        except torch.OutOfMemoryError as error:
            rows.append(Row(f"batch {batch}", 0.0, note=str(error)))
            break
        floor = step_floor(setup, batch, "bf16")
        note = f"{2 * batch / here:.4g} evaluations/s; {peak_bytes('cuda') / 2**30:.1f} GiB"
        rows.append(
            Row(f"batch {batch}, share of the floor", floor / here, here=here / (2 * batch), note=note)
        )
        if batch / here > best:
            best, setup.once["best batch"] = batch / here, batch
    share = best * pair_operations(setup) / setup.rates["bf16"]
    note = f"at batch {setup.once['best batch']}; of the operations that no sharing saves"
    return [*rows, setup.row("share of the bf16 matrix rate", share, note=note)]


def decoding(setup: Setup) -> list[Row]:
    """The first stage: latents to images."""
    decoder, batch = setup.generator.decoder, 4 if setup.kind == "cpu" else DECODED_AT_ONCE["cuda"]
    latents = torch.randn(batch, *setup.generator.latent_shape, device=setup.device)
    plain_form = PlainDecoder(decoder)
    rows = []
    with torch.inference_mode(), products_in("fp32", latents.device):
        expected = plain_form(latents)
        with torch.device("meta"):
            whole = type(decoder)(decoder.settings)
            codes = torch.zeros(1, *setup.generator.latent_shape)
            needed = operations_of(lambda: whole(codes, quantize=False))
        plain = setup.seconds(lambda: plain_form(latents)) / batch
        setup.once["plain decoding"] = plain
        for precision in setup.precisions:
            ours = decoder.in_precision(PRECISIONS[precision].dtype)
            error = float((ours(latents) - expected).norm() / expected.norm())
            here = setup.seconds(lambda ours=ours: ours(latents)) / batch
            setup.once[f"decoding {precision}"] = here
            rows.append(
                setup.row(
                    f"decoding, {precision}",
                    plain / here,
                    plain=plain,
                    here=here,
                    floor=floor_seconds(needed, 0, setup.rates, precision),
                    note=f"relative difference {error:.1e}",
                )
            )
        other = ours.to(memory_format=torch.contiguous_format)
        here = setup.seconds(lambda: other(latents)) / batch
        rows.append(Row("decoding, bf16, channels first", plain / here, plain=plain, here=here))
    return rows


def samplers(setup: Setup) -> list[Row]:
    """Images a second, from a few steps of each sampler and the decoding."""
    if "plain decoding" not in setup.once:
        decoding(setup)
    one = plain_step(setup, setup.plain_images) / setup.plain_images
    rows = []
    for precision in setup.precisions if setup.kind == "cpu" else ["bf16"]:
        images = {}
        for name, (sampler, steps) in SAMPLINGS.items():
            step = engine_step(setup, setup.batch, precision, sampler) / setup.batch
            plain = steps * one + setup.once["plain decoding"]
            here = images[name] = steps * step + setup.once[f"decoding {precision}"]
            floor = steps * step_floor(setup, setup.batch, precision) / setup.batch
            timed = [steps_timed(setup, batch) for batch in (setup.batch, setup.plain_images)]
            note = f"{1 / here:.4g} images/s, plain {1 / plain:.4g}"
            note += f"; extrapolated from {timed[0]} steps, plain from {timed[1]}"
            rows.append(
                setup.row(
                    f"{name}, {precision}", plain / here, plain=plain, here=here, floor=floor, note=note
                )
            )
        published = SAMPLINGS["DDPM-1000"][1] * one + setup.once["plain decoding"]
        here = images["DPM-Solver++ 20"]
        what = f"DPM-Solver++ 20 against plain DDPM-1000, {precision}"
        rows.append(setup.row(what, published / here, plain=published, here=here))
    return rows


def outside(setup: Setup) -> list[Row]:
    """What the engine takes beside its networks, until images are on the host: they are left out, and timed.

    On a GPU some of it runs while the networks do, so that this is the most that it can cost.
    """
    if "plain decoding" not in setup.once:
        decoding(setup)
    rows = []
    for name in ("DPM-Solver++ 20",) if setup.quick else ("DPM-Solver++ 20", "DDPM-1000"):
        sampler, steps = SAMPLINGS[name]
        stubs = without_networks(setup.generator)
        engine = engine_for(stubs, sampler, steps, setup.batch, "fp32", acceleration="eager")
        work = rows_of(setup.generator, setup.batch)
        engine.sample(*work, seed=0)
        without = setup.seconds(lambda engine=engine, work=work: engine.sample(*work, seed=0)) / setup.batch
        precision = setup.precisions[-1]
        step = engine_step(setup, setup.batch, precision) / setup.batch
        whole = without + steps * step + setup.once[f"decoding {precision}"]
        what = f"time outside the networks, {name}, {precision}"
        target = MOST_OUTSIDE if setup.size == "full" else None
        rows.append(Row(what, without / whole, here=without, target=target, at_most=True))
    return rows


def unit(setup: Setup) -> list[Row]:
    """A unit of the demo, from stored contexts to committed images."""
    from stored_unit import compare_units  # the store's packages are wanted here alone

    rows = []
    for precision in setup.precisions:
        plain, here, written = compare_units(setup.device, precision, images=4 if setup.quick else 16)
        note = f"of it {written:.3g} s writing to the store"
        rows.append(Row(f"unit of the demo, {precision}", plain / here, plain=plain, here=here, note=note))
    return rows


def workers(setup: Setup) -> list[Row]:
    """Images a second of several workers, each with an engine of its own, against one."""
    from scaling import images_per_second

    most = torch.cuda.device_count() if setup.kind == "cuda" else len(os.sched_getaffinity(0))
    counts = [count for count in (1, 2, 4, 8, 16) if count <= most]
    rates = {
        count: images_per_second(count, setup.kind, setup.size, setup.precisions[-1]) for count in counts
    }
    return [
        Row(f"{count} workers", rate / rates[1], here=1 / rate, note=f"{rate:.3g} steps x images/s")
        for count, rate in rates.items()
    ]
