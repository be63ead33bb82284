"""The only room that knows diffusers: its folders become forwards, checkpoints and samplers, and our runs become folders.

families   what is known of each family of networks, a file each   networks   the table of them
pipeline   a pipeline folder, opened                               parts      its VAE, tokenizers and text encoders
encode     latents and text embeddings                             sampling   pictures from a model
lora       LoRAs on a network                                      custom_diffusion   cross-attention and one new word
adapters   a model with or without one of these two                saving     pipelines and checkpoints that we write
trajectory what the network saw in pictures while it drew them

A model folder is read as `save_pretrained` left it: model_index.json, scheduler/, unet/ or transformer/, and vae/,
tokenizer/ and text_encoder/ where pictures and captions have to be encoded; with the `checkpoint-N` folders that training
scripts put beside them. safetensors only: weights in .bin files are pickles and are never opened.
"""

from diffusers.utils import logging as diffusers_logging

from whence.models.adapters import Adapter, adapter_of, open_model
from whence.models.custom_diffusion import FILE as CUSTOM_FILE
from whence.models.custom_diffusion import PRIOR as PRIOR_FILE
from whence.models.custom_diffusion import (
    CustomDiffusion,
    Prior,
    WithText,
    network_with_text,
    save_custom,
    save_prior,
    text_digest,
    with_token,
)
from whence.models.encode import EncodedImages, check_conditions, check_parts, encode_images, try_parts
from whence.models.families.dit import call_dit
from whence.models.families.family import Family, needs, needs_of
from whence.models.families.flux import CallFlux
from whence.models.families.pixart import call_pixart, call_pixart_with_size
from whence.models.families.stable_diffusion import call_unet_with_text, call_unet_with_tokens
from whence.models.families.stable_diffusion_3 import call_sd3
from whence.models.families.stable_diffusion_xl import call_sdxl
from whence.models.families.unet import call_unet, call_unet_with_labels
from whence.models.lora import TARGETS, Lora, save_lora, with_new_lora
from whence.models.lora_files import DIFFUSERS as LORA_FILE
from whence.models.networks import NETWORKS, family_of, load_network, new_network, tell_labels
from whence.models.pipeline import OPENING, SCHEDULERS, Model, forward_of, model_classes, weights_digest
from whence.models.sampling import (
    Prompted,
    cond_of,
    denoise,
    draw_with_text,
    guidance_of,
    labels_in_turn,
    sample,
    start_noise,
)
from whence.models.saving import new_scheduler, save_pipeline, scheduler_of, with_weights
from whence.models.trajectory import Recorded

diffusers_logging.set_verbosity_error()

__all__ = [
    "CUSTOM_FILE",
    "LORA_FILE",
    "NETWORKS",
    "OPENING",
    "PRIOR_FILE",
    "SCHEDULERS",
    "TARGETS",
    "Adapter",
    "CallFlux",
    "CustomDiffusion",
    "EncodedImages",
    "Family",
    "Lora",
    "Model",
    "Prior",
    "Prompted",
    "Recorded",
    "WithText",
    "adapter_of",
    "call_dit",
    "call_pixart",
    "call_pixart_with_size",
    "call_sd3",
    "call_sdxl",
    "call_unet",
    "call_unet_with_labels",
    "call_unet_with_text",
    "call_unet_with_tokens",
    "check_conditions",
    "check_parts",
    "cond_of",
    "denoise",
    "draw_with_text",
    "encode_images",
    "family_of",
    "forward_of",
    "guidance_of",
    "labels_in_turn",
    "load_network",
    "model_classes",
    "needs",
    "needs_of",
    "network_with_text",
    "new_network",
    "new_scheduler",
    "open_model",
    "sample",
    "save_custom",
    "save_lora",
    "save_pipeline",
    "save_prior",
    "scheduler_of",
    "start_noise",
    "tell_labels",
    "text_digest",
    "try_parts",
    "weights_digest",
    "with_new_lora",
    "with_token",
    "with_weights",
]
