"""How well is a LoRA on a real latent text-to-image model attributed?

python benchmarks/latent.py DATA [FOLDER]      about two hours of one core; goes on where it was cut off

DATA/train and DATA/val are imagefolders with captions (`text` in metadata.jsonl), here CIFAR-10 cars and horses. In FOLDER
(runs/latent) are made, with whence's own commands wherever it has one: an autoencoder (32 x 32 x 3 to 8 x 8 x 4), a CLIP of
random weights whose text embeddings tell captions apart, a UNet2DConditionModel trained on DATA/train; a LoRA on it, trained
on 128 pictures of DATA/val; pictures drawn for prompts, and their scores; a ledger that trains the LoRA again on random
halves. The result is the LDS of each method with its interval and the noise ceiling.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import _record
from _record import RUNS, SMOKE, record
from whence.data.images import image_folder
from whence.data.saving import save_png
from whence.evaluation.lds import bootstrap, predict
from whence.evaluation.ledger import Ledger
from whence.evaluation.source import Source
from whence.storage.files import progress
from whence.storage.scores import load_scores

SIDE, LATENTS, WIDTH, TOKENS, TUNED = 32, 4, 32, 24, 128
METHODS = ("pixel_cosine", "d_trak", "trak", "influence", "averaged_metagradient", "further_training")
# The LoRA was trained with batches of 16; 100 steps are half of its training.
SETTINGS, BEST = ("--set", "masks=2", "--set", "steps=100", "--set", "batch_size=16"), "further_training"
PROMPTS = ("a photo of an automobile", "a photo of a horse")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ENCODER, NETWORK = (16, 32, 64), (48, 96)
STEPS = {"autoencoder": 2500, "base": 4000, "lora": 200, "drawing": 50}
DRAWN, DRAWS, DIM, TEST = 16, 50, 4096, 16
if SMOKE:
    SIDE, WIDTH, TUNED, ENCODER, NETWORK, METHODS, SETTINGS = 16, 8, 6, (8, 8, 8), (8,), ("pixel_cosine", "d_trak"), ()
    STEPS = dict.fromkeys(STEPS, 2)
    DRAWN, DRAWS, DIM, TEST = 3, 2, 8, 4


def whence(*words):
    print("whence", *words, flush=True)
    done = _record.whence(*words)
    print(done.out, flush=True)
    if done.code:
        raise SystemExit(done.err)


def autoencoder(pictures, folder, steps=STEPS["autoencoder"], batch=16):
    """Trained on squared error and the error of slopes, with a little of the KL divergence; latents of variance 1."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        latent_channels=LATENTS,
        block_out_channels=ENCODER,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    every = pictures.batch(range(len(pictures))).x0
    for step in progress(range(steps), "autoencoder"):
        x = every[torch.randint(len(every), (batch,), generator=torch.Generator().manual_seed(step))]
        q = model.encode(x).latent_dist
        y = model.decode(q.sample()).sample
        slopes = sum((torch.diff(y, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (2, 3))
        loss = (y - x).square().mean() + 0.2 * slopes + 1e-5 * q.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        z = torch.cat([model.encode(x).latent_dist.mode() for x in every[:1024].split(64)])
    model.register_to_config(scaling_factor=1 / float(z.std()))
    model.eval().save_pretrained(folder)


def text_encoder(folder):
    """A CLIP of letters with random weights: captions get embeddings of their own, which is all that is asked of it."""
    words = [letter + end for letter in LETTERS for end in ("", "</w>")]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    source = folder / "tokenizer"
    source.mkdir(parents=True, exist_ok=True)
    (source / "vocab.json").write_text(json.dumps(vocab))
    (source / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(source, model_max_length=TOKENS).save_pretrained(source)
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        initializer_factor=10.0,
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")


def parts(pictures, folder):
    """A pipeline folder whose network has no weights yet."""
    if (folder / "model_index.json").exists():
        return folder
    autoencoder(pictures, folder / "vae")
    text_encoder(folder)
    network = UNet2DConditionModel(
        sample_size=SIDE // 4,
        in_channels=LATENTS,
        out_channels=LATENTS,
        block_out_channels=NETWORK,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D")[-len(NETWORK) :],
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")[: len(NETWORK)],
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    network.save_config(folder / "unet")
    return completed(folder)


def completed(folder):
    """The scheduler and the index of a pipeline folder, which say that the rest of it is there."""
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def tuning_set(source, folder, count=TUNED):
    """`count` pictures with their captions, as many of each kind."""
    if folder.exists():
        return folder
    part = folder.with_suffix(".tmp")
    shutil.rmtree(part, ignore_errors=True)
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    kinds = sorted({row["text"] for row in rows})
    chosen = [row for kind in kinds for row in [r for r in rows if r["text"] == kind][: count // len(kinds)]]
    for row in chosen:
        (part / row["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / row["file_name"], part / row["file_name"])
    (part / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return part.rename(folder)


def main(data, folder):
    folder.mkdir(parents=True, exist_ok=True)
    made = parts(image_folder(data / "train", SIDE), folder / "parts")
    base, lora, run, ledger = (folder / name for name in ("base", "lora", "run", "ledger"))
    from_base = ("--pretrained_model_name_or_path", base)
    whence("train", "text", "--pretrained_model_name_or_path", made, "--train_data_dir", data / "train",
           "--output_dir", base, "--max_train_steps", STEPS["base"], "--train_batch_size", 32, "--learning_rate", 1e-3,
           "--random_flip", "--ema_decay", 0.995, "--checkpointing_steps", 500)  # fmt: skip
    train = ("--train_data_dir", tuning_set(data / "val", folder / "tuning"))
    whence("train", "lora", *from_base, *train, "--output_dir", lora, "--rank", 4, "--max_train_steps", STEPS["lora"],
           "--train_batch_size", 16, "--learning_rate", 3e-3, "--lr_warmup_steps", 20, "--ema_decay", 0.98,
           "--max_grad_norm", 0, "--checkpointing_steps", 100)  # fmt: skip
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    attribute = ("attribute", base, "--lora", lora, *train, "--output_dir", run, "--parameters", "lora")
    whence(*attribute, "--generate", DRAWN, "--prompts", prompts, "--guidance_scale", 1, "--num_inference_steps",
           STEPS["drawing"], "--draws", DRAWS, "--dim", DIM, *SETTINGS,
           *[word for name in METHODS for word in ("--method", name)])  # fmt: skip
    whence("ledger", "plan", ledger, "--model", base, "--lora", lora, *train, "--test", TEST, "--tune", 0, "--seeds", 2,
           "--stack", 1)  # fmt: skip
    whence("ledger", "run", ledger, *train)
    whence("ledger", "measure", ledger, *train, "--query_data_dir", run / "generated")
    whence("lds", run, "--ledger", ledger, *train)
    table = Ledger(ledger, images := Source.read(ledger).images(train[1], None, ledger),
                   Source.read(ledger).study(images)).table("loss").role("test")  # fmt: skip
    masks, outputs = table.averaged()
    found = {path.parent.name: load_scores(path.parent) for path in run.glob("scores/*/scores.json")}
    judged = bootstrap({name: predict(scores.values.numpy(), masks) for name, scores in found.items()}, outputs)
    limit = table.ceiling().spearman
    rows = {name: _numbers(judged.interval(name)) for name in found}
    over = {name: _numbers(judged.difference(BEST, name)) for name in found if BEST in found and name != BEST}
    record(
        "latent", {"question": __doc__.split("\n")[0], "lds": rows, "ceiling": _numbers(limit), f"{BEST} over": over}
    )


def _numbers(interval):
    return {name: round(getattr(interval, name), 4) for name in ("estimate", "low", "high")}


def some_pictures(folder):
    """DATA of a few pictures for a smoke run."""
    texts = [{"text": PROMPTS[i % 2]} for i in range(TUNED)]
    for part in ("train", "val"):
        x0 = torch.rand(TUNED, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
        save_png(folder / part, x0, [f"{i}" for i in range(TUNED)], texts)
    return folder


if __name__ == "__main__":
    torch.set_num_threads(1)
    data = some_pictures(RUNS / "latent-data") if SMOKE else Path(sys.argv[1])
    main(data, Path(sys.argv[2]) if len(sys.argv) > 2 else RUNS / "latent")
