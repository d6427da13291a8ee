"""`negfacediff verify-recogniser`: its options, and what it prints."""

from typing import Annotated, Literal

import typer

from flows.command import Verbose, print_places, show_log


def verify_recogniser(
    sets: Annotated[
        list[str],
        typer.Argument(
            metavar="SET",
            help="Verification sets: .bin files (lfw.bin, ...) or a folder of them, pair lists (LFW's "
            "pairs.txt, or a CSV of path1,path2,same), folders in the layout of IJB-C. After a path: "
            ",name=NAME and, of a pair list, ,images=FOLDER.",
        ),
    ],
    recogniser: Annotated[
        list[str],
        typer.Option(
            metavar="PATH",
            help="A recogniser: an insightface pack (folder), an .onnx file, or weights of an iResNet (.pt, "
            ".pth, .ckpt, .safetensors). May be repeated: the others are compared with the first. After a "
            "path: ,name=NAME ,colour=BGR ,pixels=0..1 (or 0..255, -1..1), and "
            ",torchscript=yes for any network in TorchScript, whose code then runs.",
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder for the tables and figures.")] = "verification",
    flip: Annotated[
        bool, typer.Option(help="Add the embedding of the mirror image, the form that papers report.")
    ] = True,
    detector_scores: Annotated[
        bool, typer.Option(help="Weigh the images of an IJB-C template by their detector's scores.")
    ] = True,
    draws: Annotated[
        int, typer.Option(min=0, max=100_000, help="Resamples of the pairs for intervals; 0: none.")
    ] = 1000,
    batch: Annotated[
        int,
        typer.Option(min=1, max=4096, help="Images that a network takes at a time (ONNX: at most 32)."),
    ] = 32,
    threads: Annotated[
        int, typer.Option(min=0, max=1024, help="Batches at work at a time; 0: a core each.")
    ] = 0,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where networks run.")] = "cpu",
    detector: Annotated[
        str,
        typer.Option(
            metavar="PACK",
            help="An insightface pack: its detector aligns pairs of images that are no crops of 112x112.",
        ),
    ] = "",
    detector_size: Annotated[
        int, typer.Option(min=32, max=1280, help="Side of the detector's input, in pixels.")
    ] = 128,
    frcsyn: Annotated[
        str,
        typer.Option(
            metavar="SET",
            help="Write score files for the challenge FRCSyn as well, of two recognisers the first as the "
            "baseline. Decisions are by the threshold that judges this set best: pairs of the training data.",
        ),
    ] = "",
    verbose: Verbose = False,
) -> None:
    """Verify recognisers on test sets: ten-fold accuracy, TAR at FAR, EER, in tables like those of papers.

    Everything but the images' pixels is checked before anything is embedded. The tables are written as they
    grow. Sets whose figures are there, of the same recognisers and settings, are not verified again.
    """
    show_log(verbose)
    from flows.launch import launch
    from flows.verify_recogniser import open_once
    from flows.verify_recogniser import verify_recogniser as verify_flow
    from negfacediff_core.recognition.frcsyn import FOLDER
    from negfacediff_core.recognition.verification_tables import plain_text

    open_once(tuple(recogniser), tuple(sets), device, detector, detector_size, frcsyn)
    results = launch(
        verify_flow,
        after_interrupt=f"Figures so far are in {out}; the same command goes on with the next set:",
        recognisers=recogniser,
        sets=sets,
        out=out,
        flip=flip,
        detector_scores=detector_scores,
        draws=draws,
        batch=batch,
        threads=threads,
        device=device,
        detector=detector,
        detector_size=detector_size,
        frcsyn=frcsyn,
    )
    print(f"\n{plain_text(results)}")
    scores = {"scores": f"{out}/{FOLDER}"} if frcsyn else {}
    print_places(table=f"{out}/table.md", figures=f"{out}/results.json", **scores)
