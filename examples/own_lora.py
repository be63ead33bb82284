# %% [markdown]
# # Which of my pictures made what my LoRA draws?
#
# A LoRA is trained on a handful of pictures, and what it draws leans on some of them more than on others. Which ones? The whole way: a
# base, a LoRA on it, pictures drawn with it, and the scores of the LoRA's own training images. About a minute on a slow core, half of
# which goes into a stand-in for Stable Diffusion, so that nothing is downloaded.

# %%
import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits

import whence
from whence.data.saving import save_png

digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 8 - 1
words = "zero one two three four five six seven eight nine".split()
captions = [f"a {words[digit]}" for digit in digits.target]

# %% [markdown]
# ## The stand-in
#
# The parts of a Stable Diffusion pipeline, as small as they can be: an autoencoder from 8 to 4 pixels, a CLIP of letters with random
# weights, which tells captions apart and knows nothing else, and a network. Who has a base skips this cell and says `base = Path("sd15")`.

# %%
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def autoencoder(steps: int = 80) -> AutoencoderKL:
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**levels, block_out_channels=(16, 16), norm_num_groups=4, sample_size=8, mid_block_add_attention=False)
    optimizer = torch.optim.AdamW(vae.parameters(), 5e-3)
    for _ in range(steps):
        batch = x[torch.randint(len(x), (32,))]
        optimizer.zero_grad()
        (vae.decode(vae.encode(batch).latent_dist.sample()).sample - batch).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        vae.register_to_config(scaling_factor=1 / float(vae.encode(x[::8]).latent_dist.mode().std()))
    return vae


def clip_of_letters(folder: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    letters = [chr(97 + i) + end for end in ("", "</w>") for i in range(26)]
    vocab = {word: i for i, word in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 52, "eos_token_id": 53, "max_position_embeddings": 12, "initializer_factor": 10.0}
    config = CLIPTextConfig(vocab_size=len(vocab), **sizes, **ends)
    return CLIPTokenizer.from_pretrained(folder, model_max_length=12), CLIPTextModel(config)


def base_on(folder: Path, rows: list[int], steps: int = 160) -> None:
    torch.manual_seed(0)
    noises = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    vae, scheduler = autoencoder(), DDPMScheduler(**noises, steps_offset=1, clip_sample=False)
    tokenizer, encoder = clip_of_letters(Path("letters"))
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "mid_block_type": None, "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"block_out_channels": (32,), "layers_per_block": 1, "cross_attention_dim": 16, "attention_head_dim": 8}
    unet = UNet2DConditionModel(4, norm_num_groups=8, **blocks, **sizes)
    with torch.no_grad():
        latents = vae.encode(x[rows]).latent_dist.mode() * vae.config.scaling_factor
        words = tokenizer([captions[i] for i in rows], padding="max_length", return_tensors="pt").input_ids
        text = encoder(words)[0]
    optimizer = torch.optim.AdamW(unet.parameters(), 3e-3)
    for _ in range(steps):
        some, t = torch.randint(len(rows), (32,)), torch.randint(1000, (32,))
        noise = torch.randn(32, *latents.shape[1:])
        optimizer.zero_grad()
        guess = unet(scheduler.add_noise(latents[some], noise, t), t, text[some]).sample
        (guess - scheduler.get_velocity(latents[some], noise, t)).square().mean().backward()
        optimizer.step()
    parts = {"vae": vae, "unet": unet, "text_encoder": encoder, "tokenizer": tokenizer, "scheduler": scheduler}
    pipeline = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(folder)


base = Path("base")
if not base.exists():
    base_on(base, [i for i in range(800) if digits.target[i] < 6])
sorted(path.name for path in base.iterdir())

# %% [markdown]
# ## The LoRA
#
# The base has seen the digits from zero to five. The LoRA learns two more, sixes and nines, from 60 pictures; their captions are a column
# `text` of `own/metadata.jsonl`.

# %%
from whence.training.recipe import NewLora, Schedule
from whence.training.runs import Pictures

rows = [i for i in range(800) if digits.target[i] in (6, 9)][:60]
if not Path("own").exists():
    save_png("own", x[rows], [f"{words[digits.target[i]]}-{i:03d}" for i in rows], [{"text": captions[i]} for i in rows])
recipe = whence.Recipe(NewLora(base, rank=8), whence.AdamW(1e-2), Schedule(120, 10), batch_size=16, ema=0.98)
whence.train(recipe, Pictures(Path("own")), Path("lora"))
sorted(path.name for path in Path("lora").iterdir())

# %% [markdown]
# The same from the command line, where a LoRA trained elsewhere does as well, whatever wrote it:
#
#     whence train lora --pretrained_model_name_or_path base --train_data_dir own --rank 8 --learning_rate 1e-2 --output_dir lora
#     whence attribute base --lora lora --train_data_dir own --generate 4 --prompts prompts.txt --parameters lora --output_dir run
#
# ## Draw with it, and ask
#
# Two pictures of each prompt. What is attributed is the LoRA: its weights alone get gradients (`parameters="lora"`), and its own 60
# images are asked about, not those of the base.

# %%
prompts = ["a six", "a nine"]
drawn = whence.Sampling(4, steps=20, prompts=prompts, guidance=1.0)
task = whence.task_from_pretrained(base, "own", drawn, root="run", adapter=whence.Lora(Path("lora")))
scores = whence.d_trak(draws=whence.uniform(10), dim=1024, damping=0.01, parameters="lora")(task)
scores

# %% [markdown]
# ## Is that more than chance?
#
# Half of the images are sixes. If the scores said nothing, half of the ten strongest would have the caption that was drawn. And another
# run, with other noise, would it name the same ones?

# %%
for query in range(4):
    strongest = [name for name, _ in scores.top(query, k=10)]
    asked = prompts[query % 2].removeprefix("a ")
    same = sum(name.startswith(asked) for name in strongest)
    print(f"{asked}: {same} of the 10 strongest are of this digit; another run would correlate by {scores.reliability[query]:.2f}")

# %% [markdown]
# ## What to believe
#
# The prompt of a picture is part of what is asked, and images with the same caption have much in common by that alone: look at which of
# the sixes come first. Where another run would not agree, draw more (`draws=whence.uniform(100)`). What the LoRA would draw without some
# images is asked by `whence preview base --lora lora --train_data_dir own --without FILE`; how far scores of a LoRA predict its
# retraining was measured in `docs/stable-diffusion.md`.
