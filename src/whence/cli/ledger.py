"""The part of the command line that retrains: banks, benches, ledgers, LDS and counterfactuals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as Grid

from whence.data.saving import save_png
from whence.diffusion.draws import stratified
from whence.diffusion.outputs import OUTPUTS
from whence.evaluation import banks, bench, counterfactual, designs, preview
from whence.evaluation.ceiling import ceiling
from whence.evaluation.lds import bootstrap, predict
from whence.evaluation.ledger import Ledger, calibrate
from whence.evaluation.source import Source
from whence.models import adapter_of, open_model
from whence.storage.files import write_json
from whence.storage.scores import load_scores
from whence.task import drawing, prompts_in
from whence.types import Engine, Images, WhenceError

BankName = Annotated[str, typer.Argument(help="digits, cifar2 or cifar2-1000.")]
Data = Annotated[Path | None, typer.Option("--data_dir", help="Folder with train/ and val/ for the cifar2 banks.")]
Output = Annotated[Path, typer.Option("--output_dir", help="Folder of the work; goes on where an earlier run stopped.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 ...")]
Shard = Annotated[str, typer.Option(help="i/N: this process takes every N-th block, from i.")]
LedgerFolder = Annotated[Path, typer.Argument(help="The ledger's folder.")]
TrainData = Annotated[Path, typer.Option("--train_data_dir", help="Imagefolder of the training images.")]
CaptionColumn = Annotated[str, typer.Option("--caption_column", help="Of the images, for a model that reads text.")]
Resolution = Annotated[int | None, typer.Option(help="Default: that of the model.")]
app = typer.Typer(no_args_is_help=True, help="Retrain a model on subsets, and keep what comes out.")


def recipe(name: str, data_dir: Path | None) -> banks.Recipe:
    """The recipe of a bank by name."""
    if name == "digits":
        return banks.digits()
    if name in ("cifar2", "cifar2-1000"):
        if data_dir is None:
            raise WhenceError(f"bank {name} needs --data_dir, a folder with train/ and val/ of CIFAR-2 pictures")
        return banks.cifar2(data_dir, 1000 if name == "cifar2-1000" else 5000)
    raise WhenceError(f"unknown bank {name!r}; accepted: digits, cifar2, cifar2-1000")


def bank(
    name: BankName, output_dir: Output, data_dir: Data = None, shard: Shard = "0/1", device: Device = "cpu"
) -> None:
    """Build a bank: train all its models, measure its queries. The bank is in OUTPUT_DIR/bank."""
    ledger = banks.build(recipe(name, data_dir), name, output_dir, _shard(shard), Engine(device))
    typer.echo(json.dumps(ledger.status()))


def run_bench(
    name: BankName,
    output_dir: Output = Path("runs/bench"),
    methods: Annotated[list[str], typer.Option(help="Rows to compute; all by default. May be repeated.")] = [],  # noqa: B006
    bank_dir: Annotated[
        Path | None, typer.Option("--bank_dir", help="A bank built here; default: the shipped one.")
    ] = None,
    data_dir: Data = None,
    draws: Annotated[int, typer.Option(min=1)] = 100,
    dim: Annotated[int, typer.Option(min=1)] = 4096,
    device: Device = "cpu",
) -> None:
    """Print how close every method comes to retraining, with intervals and the ceiling."""
    chosen = recipe(name, data_dir)
    found = banks.load(name, chosen, bank_dir)
    settings = bench.Settings(bench.uniform(draws), dim)
    result = bench.run(found, chosen, output_dir, methods or None, settings, Engine(device))
    Console(width=170).print(bench.grid(result))
    for method, why in result["skipped"].items():
        typer.echo(f"{method}: {why}")
    typer.echo(f"result: {output_dir / 'bench.json'}, {output_dir / 'bench.png'}")


@app.command()
def plan(
    ledger: LedgerFolder,
    model: Annotated[Path, typer.Option(help="A model made by `whence train`: its recipe is what is repeated.")],
    train_data_dir: TrainData,
    test: Annotated[int, typer.Option(min=0, help="Random subsets to judge scores on.")] = 64,
    tune: Annotated[int, typer.Option(min=0, help="Random subsets to choose settings on.")] = 32,
    fit: Annotated[int, typer.Option(min=0, help="Random subsets for removal-based methods.")] = 0,
    fraction: Annotated[float, typer.Option(help="Share of the images in a random subset.")] = 0.5,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings per subset; 2 or more for a noise ceiling.")] = 2,
    leave_one_out: Annotated[bool, typer.Option("--leave_one_out")] = False,
    leave_out_by: Annotated[
        str | None, typer.Option("--leave_out_by", help="A column: leave out each of its values.")
    ] = None,
    stack: Annotated[
        int | None, typer.Option(min=1, help="Models per stacked training; default: the fastest here.")
    ] = None,
    lora: Annotated[
        Path | None, typer.Option(help="Retrain this LoRA of `whence train --lora` on --model instead.")
    ] = None,
    custom_diffusion: Annotated[
        Path | None, typer.Option("--custom_diffusion", help="Likewise, of `whence train --custom_diffusion`.")
    ] = None,
    caption_column: CaptionColumn = "text",
    resolution: Resolution = None,
) -> None:
    """Decide what will be retrained. A plan never changes afterwards."""
    source = Source(model, adapter_of(lora, custom_diffusion), caption_column)
    images = source.images(train_data_dir, resolution, ledger)
    study = source.study(images)
    n, own = len(images), study.training.seed
    drawn = [("test", test, 1000), ("tune", tune, 200_000), ("fit", fit, 400_000)]
    subsets = [*designs.full(n, range(own + 1, own + 1 + seeds))]
    for role, count, first in drawn:
        if count:
            every = range(own + first, own + first + seeds)
            subsets += designs.fixed(n, count, fraction, every, role, seed=first)
    if leave_one_out:
        subsets += designs.leave_out(n, None, range(own + 1, own + 1 + seeds))
    if leave_out_by is not None:
        subsets += designs.leave_out(n, _players(images, leave_out_by), range(own + 1, own + 1 + seeds))
    if stack is None:
        speeds = calibrate(study, images)
        stack = min(speeds, key=lambda size: speeds[size])
        typer.echo(
            "milliseconds per step and model: " + ", ".join(f"{k} together {1e3 * v:.1f}" for k, v in speeds.items())
        )
    made = Ledger.plan(ledger, study, images, subsets, stack)
    source.write(ledger)
    typer.echo(
        f"{len(made.units)} trainings of {study.training.steps} steps, {stack} together; next: whence ledger run"
    )


@app.command("run")
def run_ledger(
    ledger: LedgerFolder,
    train_data_dir: TrainData,
    resolution: Resolution = None,
    shard: Shard = "0/1",
    device: Device = "cpu",
) -> None:
    """Train what is missing. Start it several times with --shard 0/2, 1/2 ... to use several processes or machines."""
    made = _open(ledger, train_data_dir, resolution)
    made.run(_shard(shard), Engine(device))
    typer.echo(json.dumps(made.status()))


@app.command()
def status(ledger: LedgerFolder, train_data_dir: TrainData, resolution: Resolution = None) -> None:
    """Trainings done, failed and missing, by role."""
    typer.echo(json.dumps(_open(ledger, train_data_dir, resolution).status()))


@app.command()
def verify(ledger: LedgerFolder, train_data_dir: TrainData, resolution: Resolution = None) -> None:
    """Re-hash every finished training."""
    _open(ledger, train_data_dir, resolution).verify()
    typer.echo("every finished unit is what was written")


@app.command()
def measure(
    ledger: LedgerFolder,
    train_data_dir: TrainData,
    query_data_dir: Annotated[Path, typer.Option("--query_data_dir")],
    name: Annotated[str, typer.Option(help="Name of the measurement.")] = "loss",
    output: Annotated[str, typer.Option(help="What is measured.")] = "loss",
    draws: Annotated[int, typer.Option(min=2, help="Stratified timesteps with antithetic noise; an even number.")] = 20,
    resolution: Resolution = None,
    device: Device = "cpu",
) -> None:
    """Measure queries in every finished training, on draws that are the same for all of them."""
    if output not in OUTPUTS:
        raise WhenceError(f"unknown output {output!r}; accepted: {', '.join(OUTPUTS)}")
    made = _open(ledger, train_data_dir, resolution)
    queries = Source.read(ledger).images(query_data_dir, resolution, ledger / "queries")
    made.measure(name, queries, OUTPUTS[output], stratified(draws, seed=777), Engine(device))
    typer.echo(f"measured {len(queries)} queries as {name!r}")


def lds(
    run: Annotated[Path, typer.Argument(help="A run folder of `whence attribute`.")],
    ledger: Annotated[Path, typer.Option(help="The ledger that retrained the same images.")],
    train_data_dir: TrainData,
    name: Annotated[str, typer.Option(help="Name of the measurement of the same queries.")] = "loss",
    resolution: Resolution = None,
) -> None:
    """The linear datamodeling score of every method in a run folder, with its interval and the noise ceiling."""
    made = _open(ledger, train_data_dir, resolution)
    test = made.table(name).role("test")
    if not test.units:
        raise WhenceError(f"{ledger} has no finished test units; plan some with --test, then run and measure")
    found = {path.parent.name: load_scores(path.parent) for path in sorted(run.glob("scores/*/scores.json"))}
    if not found:
        raise WhenceError(f"{run} holds no finished scores; run `whence attribute ... --output_dir {run}` first")
    for method, scores in found.items():
        if list(scores.query_ids) != list(test.query_ids):
            raise WhenceError(f"the scores of {method} are for other queries than measurement {name!r}; measure those")
        if list(scores.train_ids) != list(made.images.ids):
            raise WhenceError(f"the scores of {method} are for other training images than the ledger")
    masks, outputs = test.averaged()
    judged = bootstrap({m: predict(s.values.numpy(), masks) for m, s in found.items()}, outputs, test.better or "lower")
    table = Grid("method", "LDS", "95 %", box=None, pad_edge=False)
    for method in found:
        interval = judged.interval(method)
        table.add_row(method, f"{interval.estimate:.3f}", f"{interval.low:.3f} to {interval.high:.3f}")
    limit = ceiling(test.outputs, test.subsets).spearman
    table.add_row("ceiling", f"{limit.estimate:.3f}", f"{limit.low:.3f} to {limit.high:.3f}", style="bold")
    Console().print(table)


def run_counterfactual(
    name: BankName,
    output_dir: Output,
    bench_dir: Annotated[Path, typer.Option("--bench_dir", help="Folder of `whence bench`, whose scores are used.")],
    methods: Annotated[list[str], typer.Option(help="Methods to follow.")] = ["d_trak", "pixel_cosine"],  # noqa: B006
    queries: Annotated[int, typer.Option(min=2, help="Generated queries looked at.")] = 8,
    bank_dir: Annotated[Path | None, typer.Option("--bank_dir")] = None,
    data_dir: Data = None,
    device: Device = "cpu",
) -> None:
    """Take away what the methods name, retrain, draw again, and compare with random removal and with another seed."""
    chosen = recipe(name, data_dir)
    found = banks.load(name, chosen, bank_dir)
    scores = {method: load_scores(bench_dir / "rows" / method / "generated") for method in methods}
    generated = found.queries["generated"]
    result = counterfactual.run(
        counterfactual.Plan(),
        chosen.study,
        chosen.train,
        generated,
        range(len(generated)),
        open_model(banks.train_reference(chosen, bench_dir)),
        scores,
        range(queries),
        chosen.draws,
        output_dir,
        Engine(device),
    )
    write_json(output_dir / "counterfactual.json", result)
    counterfactual.plot(result, output_dir / "counterfactual.png")
    table = Grid("removed by", "images", "rise of loss", "95 %", "l2", "SSIM", "worth random", box=None, pad_edge=False)
    for arm in result["arms"]:
        rise, worth = arm["dL"], arm["worth_random"]
        table.add_row(
            arm["arm"],
            str(arm["removed"]),
            f"{rise['mean']:+.4f}",
            f"{rise['low']:+.4f} to {rise['high']:+.4f}",
            f"{arm['l2']['mean']:.2f}",
            f"{arm['ssim']['mean']:.3f}",
            f"{worth:.0f}" if worth is not None else f"> {result['largest_random']}",
        )
    Console(width=120).print(table)


def run_preview(
    model: Annotated[
        Path, typer.Argument(help="A folder of `whence train`, or what --lora or --custom_diffusion lies on.")
    ],
    train_data_dir: TrainData,
    without: Annotated[
        list[str], typer.Option(help="Images to leave out, as column=value or id=NAME; may be repeated.")
    ],
    generate: Annotated[int, typer.Option(min=1, help="Pictures to draw.")] = 8,
    prompts: Annotated[Path | None, typer.Option(help="A prompt per line, for a model that reads text.")] = None,
    guidance_scale: Annotated[
        float, typer.Option("--guidance_scale", min=0.0, help="Classifier-free, with prompts; 1 for none.")
    ] = 7.5,
    lora: Annotated[Path | None, typer.Option(help="A LoRA of `whence train --lora` on the model.")] = None,
    custom_diffusion: Annotated[
        Path | None, typer.Option("--custom_diffusion", "--custom-diffusion", help="Likewise, Custom Diffusion.")
    ] = None,
    caption_column: CaptionColumn = "text",
    output_dir: Output = Path("runs/preview"),
    points: Annotated[
        int,
        typer.Option(
            min=1, help="Trainings differentiated on the way from the model to the one without; more for more."
        ),
    ] = 1,
    retrain: Annotated[bool, typer.Option("--retrain", help="Train the truth, too, and compare.")] = False,
    num_inference_steps: Annotated[int, typer.Option("--num_inference_steps", min=1)] = 50,
    seed: Annotated[int, typer.Option(help="Of the pictures' first noise.")] = 0,
    resolution: Resolution = None,
    device: Device = "cpu",
) -> None:
    """The model's pictures as they would be without some images, by differentiating its training, without training again."""
    source, engine = Source(model, adapter_of(lora, custom_diffusion), caption_column), Engine(device)
    opened, images = source.opened, source.images(train_data_dir, resolution, output_dir)
    removed = preview.chosen(images, without)
    texts = None if prompts is None else prompts_in(prompts)
    draw = drawing(opened, generate, seed, num_inference_steps, engine, texts, guidance_scale, resolution)
    found = preview.preview(opened.final.load(), source.study(images), images, removed, draw, retrain, engine, points)
    names = [f"seed{seed}-{i:04d}" for i in range(generate)]
    for kind in ("before", "predicted", "retrained"):
        pictures = getattr(found, kind)
        if pictures is not None:
            save_png(output_dir / kind, pictures, names)
    facts = {"without": without, "images": int(removed.sum()), "of": len(images), **found.facts()}
    title = f"Without {', '.join(without)}: {facts['images']} of {len(images)} images"
    preview.plot(found, title, output_dir / "preview.png")
    write_json(output_dir / "preview.json", facts)
    typer.echo(json.dumps(facts))
    typer.echo(f"pictures: {output_dir / 'preview.png'}")


def _open(root: Path, train_data_dir: Path, resolution: int | None) -> Ledger:
    source = Source.read(root)
    images = source.images(train_data_dir, resolution, root)
    return Ledger(root, images, source.study(images))


def _players(images: Images, column: str) -> list[list[int]]:
    if column not in images.meta:
        raise WhenceError(f"no column {column!r} in the training images; there is {', '.join(images.meta) or 'none'}")
    return list(designs.groups(images.meta[column]).values())


def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise WhenceError(f"--shard {text!r}; accepted: i/N, like 0/2") from None
    return index, count


def register(main: Any) -> None:
    """Add these commands to the main command line."""
    main.add_typer(app, name="ledger")
    commands = {
        "bank": bank,
        "bench": run_bench,
        "lds": lds,
        "counterfactual": run_counterfactual,
        "preview": run_preview,
    }
    for name, command in commands.items():
        main.command(name)(command)
