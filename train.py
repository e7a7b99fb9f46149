"""
Train AugVAE-ML, AugVAE-SL and BiART, one after the other or each alone, through one loop.

On a laptop, all three stages on the built-in scenes (13 minutes on 2 CPU cores; validation losses reach 0.001
in AugVAE-SL and 0.26 in BiART):
$ python train.py

On your own captioned pictures, in the MS-COCO layout:
$ python train.py --preset small --data coco \\
      --train_dir IMAGES --train_captions JSON --val_dir IMAGES --val_captions JSON

On 8 GPUs, one stage, on ImageNet (other layouts: data.py):
$ torchrun --nproc_per_node=8 train.py --stage augvae_ml --preset released --workers 2 --batch_size 4 \\
      --epochs 2 --train_dir /path/to/imagenet/train --val_dir /path/to/imagenet/val

A run lives in --out_dir: {stage}.pt (checkpoint), {stage}.csv and {stage}_loss.png (log and curve),
{stage}_{step}.png (pictures as training goes), tokenizer.json. sample.py reads it.
"""
import argparse
import contextlib
import csv
import dataclasses
import difflib
import functools
import glob
import hashlib
import inspect
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import data
from augvae import LPIPS, AugVAE, AugVAEConfig, Codebook, ResBlock, from_lightning, safe_load
from biart import BiART, BiARTConfig, Block
from data import DataConfig
from tokenizer import Tokenizer

STAGES = ("augvae_ml", "augvae_sl", "biart")


@dataclass
class TrainConfig:
    # The run
    stage: str = "all"  # augvae_ml, augvae_sl, biart, or all of them in this order
    preset: str = "tiny"  # tiny (64 px, CPU), small (64), released (256), original (trained as the release)
    out_dir: str = "out"  # where the run lives
    resume: bool = False  # go on with the run in out_dir
    overwrite: bool = False  # start anew over the run in out_dir
    init_from: str = ""  # AugVAE that this run's first stage begins with: our checkpoint or a released one
    seed: int = 1337  # of initial weights, order and crops
    # How long, and how fast it learns
    max_iters: int = 100000  # optimizer steps of a stage
    epochs: float = 0.0  # passes over the training data, instead of max_iters
    batch_size: int = 8  # images per rank and micro-step
    gradient_accumulation_steps: int = 1  # micro-steps to an optimizer step
    learning_rate: float = 1e-4  # after warm-up
    scale_lr: bool = False  # multiply learning_rate by the number of images in a step
    schedule: str = "cosine"  # cosine, or plateau: halves the rate where the validation loss stops falling
    warmup_iters: int = 100  # steps of linear warm-up
    min_lr: float = 1e-6  # at the end of the schedule
    optimizer: str = "adamw"  # adamw, or muon: orthogonalised steps for matrices in layers, AdamW elsewhere
    weight_decay: float = 1e-5  # on weights of two and more dimensions
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.999  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0 does not clip
    # AugVAE's training
    loss: str = "l2"  # AugVAE's loss between images: l2, l1, or either with LPIPS: lpips_l2, lpips_l1
    lpips_weight: float = 0.1  # of LPIPS in that
    vgg_weights: str = ""  # torchvision's VGG-16, for LPIPS; empty: from the torch hub cache, or a download
    lpips_weights: str = ""  # LPIPS's own weights for VGG-16; empty: as above
    token_grid: int = 32  # side of the grid that AugVAE-SL keeps and BiART models
    # BiART's text and tokens
    vocab_size: int = 8192  # largest text vocabulary to train
    tokenizer: str = ""  # vocabulary to use instead of training one: tokenizer.json or CLIP's .txt.gz
    cache_tokens: str = ""  # folder of the data as tokens, for runs to share; empty: tokens/ in out_dir
    cache_crops: int = 1  # random crops of a training image to keep the tokens of; 1 is the centre crop
    # What is looked at and kept
    eval_interval: int = 1000  # steps between validation, pictures and checkpoint
    eval_images: int = 256  # validation images, spread over the validation set
    log_interval: int = 10  # steps between log lines
    keep: int = 1  # older checkpoints kept beside the last and the best
    # Where and how to compute
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto is cuda where there is one
    dtype: str = "auto"  # float32, bfloat16 or float16 autocast; auto is what helps on the device
    compile: bool = False  # torch.compile the model
    checkpoint_activations: bool = False  # compute blocks' activations again in the backward pass, keep none
    shard: bool = False  # biart: spread parameters, gradients and optimizer state over the ranks (FSDP)
    bench: str = ""  # measure instead of training: a step of augvae or biart, the codebook, or reading data
    json: bool = False  # bench: print one JSON object last


# What a preset sets: under "" for every stage, then for one.
PRESETS = {
    "tiny": {
        "": {"image_size": 64, "levels": (8, 4, 2), "hidden": 16, "ch_mult": (1, 2, 4, 4), "n_res_blocks": 1,
             "n_groups": 1, "z_channels": 64, "codebook_size": 128, "codebook_dim": 8, "rate": 0.003,
             "token_grid": 8, "n_layer": 4, "n_head": 4, "n_embd": 128, "n_text": 16, "vocab_size": 512,
             "n_scenes": 16384, "crop_scale": 1.0, "beta2": 0.99, "eval_interval": 100},
        "augvae_ml": {"batch_size": 8, "max_iters": 200, "learning_rate": 2e-3, "min_lr": 2e-5,
                      "warmup_iters": 20},
        "augvae_sl": {"batch_size": 8, "max_iters": 800, "learning_rate": 2e-3, "min_lr": 2e-5,
                      "warmup_iters": 20},
        "biart": {"batch_size": 32, "max_iters": 3600, "learning_rate": 3e-3, "min_lr": 3e-5,
                  "warmup_iters": 100, "weight_decay": 0.1, "optimizer": "muon",
                  "eval_interval": 500, "log_interval": 50},
    },
    "small": {
        "": {"image_size": 64, "levels": (16, 8, 4), "hidden": 32, "ch_mult": (1, 2, 4), "n_res_blocks": 1,
             "n_groups": 1, "z_channels": 128, "codebook_size": 1024, "codebook_dim": 16, "rate": 0.0003,
             "token_grid": 16, "n_layer": 4, "n_head": 6, "n_embd": 192, "n_text": 32, "vocab_size": 2048,
             "dropout": 0.1, "crop_scale": 1.0, "beta2": 0.99, "eval_interval": 100},
        "augvae_ml": {"batch_size": 8, "max_iters": 200, "learning_rate": 2e-3, "min_lr": 2e-5,
                      "warmup_iters": 20},
        "augvae_sl": {"batch_size": 8, "max_iters": 1200, "learning_rate": 2e-3, "min_lr": 2e-5,
                      "warmup_iters": 20},
        "biart": {"batch_size": 32, "max_iters": 2400, "learning_rate": 3e-3, "min_lr": 3e-5,
                  "weight_decay": 0.1, "optimizer": "muon", "eval_interval": 200},
    },
    "released": {
        "": {"vocab_size": 49408, "warmup_iters": 2000, "loss": "lpips_l2"},
        "augvae_ml": {"data": "imagenet", "batch_size": 4, "max_iters": 300000},
        "augvae_sl": {"data": "imagenet", "batch_size": 8, "max_iters": 100000},
        "biart": {"data": "coco", "batch_size": 16, "max_iters": 100000, "learning_rate": 3e-4,
                  "min_lr": 3e-5, "weight_decay": 0.1, "beta2": 0.95},
    },
}

# How the release trains AugVAE, and what all other presets do instead:
#
#   the release                                  instead, and why
#   learning rate 4.5e-6 times a step's images   given as it is used: Adam's steps do not grow with the batch
#   no warm-up                                   linear: Adam's first averages are of few batches, and a young
#                                                codebook cannot follow an encoder in big steps
#   halved, down to 1e-6, after 10 losses (of    cosine: reaches its end at max_iters, whatever eval_interval
#     epochs' last batches) that did not fall    is, and depends on no comparison of noisy numbers
#   crops: 0.75 to 1 times the picture's area    times the centre square's: in a 4:3 picture no square of more
#                                                than 0.75 times its area has room, so that all stay one size
#   gradients as they are                        clipped to norm 1: one bad batch does not undo a thousand
#   weight decay 1e-5 on all parameters          not on biases and norms, which it would only pull to zero
#
# Preset `original` is `released` with the left column, but for two things: the loss watched is the validation
# loss at every --eval_interval, the same number on all ranks; and weight decay, where 1e-5 makes no
# difference worth an option.
ORIGINAL = {"learning_rate": 4.5e-6, "scale_lr": True, "warmup_iters": 0, "schedule": "plateau",
            "min_lr": 1e-6, "crop_scale": 0.75, "crop_of": "picture", "grad_clip": 0.0}
PRESETS["original"] = {**PRESETS["released"], **{stage: {**PRESETS["released"][stage], **ORIGINAL}
                                                 for stage in ("augvae_ml", "augvae_sl")}}


# -----------------------------------------------------------------------------
# Settings: one command line, made from the fields of the dataclasses

class Parser(argparse.ArgumentParser):
    """
    `--name value` and `--name=value` for every field of some dataclasses; what is not given stays out of the
    result. The help is the comments: one beside each field, and one on a line of its own, or the class's
    name, above a group of them.
    """

    def __init__(self, classes, defaults, **kwargs):
        super().__init__(usage="%(prog)s [--setting value ...]", allow_abbrev=False, **kwargs,
                         formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                             prog, max_help_position=38, width=170))
        for cls in classes:
            group, fields = None, {f.name: f for f in dataclasses.fields(cls)}
            source = inspect.getsource(cls)
            for title, name, note in re.findall(r"^    (?:# (.*)|(\w+): .*?  # (.*))$", source, re.MULTILINE):
                if title or group is None:
                    group = self.add_argument_group(title or cls.__name__.removesuffix("Config"))
                if name and not fields[name].metadata.get("derived"):
                    read, metavar, extra = kinds[fields[name].type]
                    note = f"{note} [{defaults.get(name, fields[name].default)}]".replace("%", "%%")
                    group.add_argument(f"--{name}", type=read, default=argparse.SUPPRESS, metavar=metavar,
                                       help=note, **extra)

    def settings(self, argv):
        """argv -> dict of what was given. An unknown name ends the program with the names that are valid."""
        found, unknown = self.parse_known_args(argv)
        if unknown:
            names = sorted(s for a in self._actions for s in a.option_strings)
            name = unknown[0].split("=")[0]
            close = difflib.get_close_matches(name, names, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            self.error(f"unknown setting {unknown[0]}{hint}; valid are {' '.join(names)}")
        return vars(found)


def true_or_false(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def int_tuple(text):
    try:
        return tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 8,4,2") from None


# How a setting of each type is read: conversion, how the help calls it, what else argparse should know.
kinds = {int: (int, "int", {}), float: (float, "float", {}), str: (str, "text", {}),
         bool: (true_or_false, "bool", {"nargs": "?", "const": True}),
         tuple[int, ...]: (int_tuple, "int,int,...", {}), tuple[str, ...]: (str, "text", {"nargs": "+"})}


def preset_values(preset, stage):
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset!r} is none of: {', '.join(PRESETS)}")
    return {**PRESETS[preset].get("", {}), **PRESETS[preset].get(stage, {})}


def configure(given, stage, *classes):
    """Settings of one stage, an instance of each class: its defaults < the preset's < what was given."""
    preset = preset_values(given.get("preset", TrainConfig.preset), stage)
    return [filled(cls, {**preset, **given}) for cls in classes]


def filled(cls, values):
    """A config class with those of its fields that are among the values."""
    return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})


# -----------------------------------------------------------------------------
# Checkpoints

def older_checkpoints(path):
    """{step: path} of what save_checkpoint kept of a stage's earlier checkpoints."""
    stem = os.fspath(path).removesuffix(".pt")
    found = (re.fullmatch(rf"{re.escape(stem)}_(\d+)\.pt", name)
             for name in glob.glob(f"{glob.escape(stem)}_*.pt"))
    return {int(match[1]): match[0] for match in found if match}


def save_checkpoint(path, checkpoint, previous=None, keep=0, best=False):
    """
    Write a dict of tensors and plain values. `previous`, the step of the file at path, moves to a name of its
    own first, so that a whole checkpoint is always there; `keep` of those stay. The best is copied aside.
    """
    stem = os.fspath(path).removesuffix(".pt")
    aside = None if previous is None else f"{stem}_{previous:08d}.pt"
    with data.atomic_write(path, aside, f"{path}.part") as f:  # one name: a kill leaves at most one such file
        torch.save(checkpoint, f)
    if best:
        with open(path, "rb") as f, data.atomic_write(f"{stem}_best.pt", part=f"{path}.part") as copy:
            shutil.copyfileobj(f, copy)
    for _, old in sorted(older_checkpoints(path).items(), reverse=True)[keep:]:
        os.remove(old)


def latest_checkpoint(path, stage, print0=print):
    """
    The newest checkpoint of a stage that can be read, and whether it is the one at path; (None, False) where
    there is none at all. Says which it had to pass over.
    """
    older = [old for _, old in sorted(older_checkpoints(path).items(), reverse=True)]
    there = [p for p in (path, *older) if os.path.exists(p)]
    for i, candidate in enumerate(there):
        try:
            checkpoint = load_checkpoint(candidate, stage)
        except ValueError as e:
            if i + 1 == len(there):
                raise
            print0(f"warning: {e}; going back to {there[i + 1]}")
        else:
            return checkpoint, candidate == path
    return None, False


def load_checkpoint(path, stage):
    """
    The dict that save_checkpoint wrote for this stage. Nothing in the file is executed.
    Raises ValueError where it is missing, truncated, not one of ours, or of another stage.
    """
    if not os.path.exists(path):
        raise ValueError(f"there is no checkpoint {path}: `train.py --stage {stage}` makes it")
    checkpoint = safe_load(path)
    if "stage" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of this project")
    if checkpoint["stage"] != stage:
        raise ValueError(f"{path} is a checkpoint of stage {checkpoint['stage']}, not of {stage}")
    return checkpoint


def build_model(cls, config_cls, checkpoint):
    """A model as a checkpoint describes it, in eval mode on the CPU."""
    model = cls(config_cls(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    return model.eval()


def load_augvae(path):
    """
    The AugVAE in a checkpoint of one of our AugVAE stages or a released one, in eval mode on the CPU.
    Raises ValueError where it is neither.
    """
    checkpoint = safe_load(path)
    if "state_dict" in checkpoint:  # Lightning's name
        return from_lightning(AugVAE, checkpoint, path)
    stage = checkpoint.get("stage", "something else")
    if stage not in ("augvae_ml", "augvae_sl"):
        raise ValueError(f"{path} is a checkpoint of {stage}, not of an AugVAE")
    return build_model(AugVAE, AugVAEConfig, checkpoint)


def fingerprint(model):
    """Short hash of all weights, by which a checkpoint names the model it belongs to."""
    h = hashlib.sha256()
    for tensor in model.state_dict().values():
        h.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()[:16]


# -----------------------------------------------------------------------------
# Where and how to compute

class Context:
    """Device, precision and the place of this process among all that torchrun started."""

    def __init__(self, device, dtype, wide):
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and self.world > 1:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        try:
            self.device = torch.device(device)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as e:
            raise ValueError(f"--device {device!r} cannot be used here ({str(e).splitlines()[0]})") from None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype {dtype!r} is none of: auto, float32, bfloat16, float16")
        if dtype == "float16" and self.device.type == "cpu":
            raise ValueError("--dtype float16 needs a GPU: on a CPU it is float32 or bfloat16")
        if dtype == "auto":
            if self.device.type == "cuda":
                dtype = "bfloat16" if self.can(self.multiply_bfloat16) else "float16"
            else:  # autocast's casts cost a small model more than its products gain
                dtype = "bfloat16" if wide and "amx_bf16" in cpu_flags() else "float32"
        self.dtype = getattr(torch, dtype)

    def works(self, trial):
        """Whether something works here, found out by doing it: CUDA-like builds differ in what they lack."""
        try:
            trial()
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return False
        return True

    def multiply_bfloat16(self):
        x = torch.ones(16, 16, device=self.device, dtype=torch.bfloat16)
        if (x @ x)[0, 0].item() != 16 or not torch.cuda.is_bf16_supported():
            raise RuntimeError("no bfloat16, or emulated")

    def step_fused(self):
        p = torch.ones(1, device=self.device, requires_grad=True)
        p.grad = torch.ones_like(p)
        torch.optim.AdamW([p], fused=True).step()

    def scaler(self):
        """Loss scaling, which float16 needs; it does nothing for other types."""
        enabled = self.dtype is torch.float16
        if hasattr(torch.amp, "GradScaler"):  # from torch 2.3 on
            return torch.amp.GradScaler(self.device.type, enabled=enabled)
        return torch.cuda.amp.GradScaler(enabled=enabled)

    def autocast(self):
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def all_reduce(self, tensor):
        """Add a tensor up over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def timeit(self, function):
        """How long a call takes, what it leaves the device to do included."""
        self.synchronize()
        began = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - began

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_gb(self):
        """Most memory held so far, GB of 2^30 bytes: of tensors on a GPU, of the whole process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2 ** 30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20

    def device_name(self):
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def barrier(self):
        """For all ranks to have come this far."""
        self.all_reduce(torch.zeros(1, device=self.device))

    def all_gather(self, value):
        """What every rank has, as a list; values are small and picklable."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def random_state(self):
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {"cpu": torch.get_rng_state(), "cuda": cuda}

    def restore_random_state(self, states):
        """Go on with this rank's own; a rank that the saved run did not have keeps what its seed gave it."""
        if self.rank < len(states):
            torch.set_rng_state(states[self.rank]["cpu"])
            if self.device.type == "cuda" and states[self.rank]["cuda"] is not None:
                torch.cuda.set_rng_state(states[self.rank]["cuda"], self.device)

    def print0(self, *text):
        if self.rank == 0:
            print(*text, flush=True)


def cpu_flags():
    try:
        with open("/proc/cpuinfo") as f:
            return next((line.split() for line in f if line.startswith("flags")), [])
    except OSError:
        return []


# -----------------------------------------------------------------------------
# Stages: what the one loop below trains

class AugVAEObjective(nn.Module):
    """Pixel loss + LPIPS, if asked for, + commitment. forward((images,)) -> loss, {part: value}."""
    copies = 1  # of a sample in a validation batch

    def __init__(self, vae, config):
        super().__init__()
        losses = {"l2": (F.mse_loss, False), "l1": (F.l1_loss, False),  # pixel loss, and whether with LPIPS
                  "lpips_l2": (F.mse_loss, True), "lpips_l1": (F.l1_loss, True)}
        if config.loss not in losses:
            raise ValueError(f"--loss {config.loss!r} is none of: {', '.join(losses)}")
        pixel_loss, perceptual = losses[config.loss]
        self.model = vae
        self.terms = {"pixel": (1.0, pixel_loss)}  # weight and loss
        if perceptual:
            self.lpips = LPIPS(config.vgg_weights, config.lpips_weights)  # outside of what checkpoints hold
            self.terms["lpips"] = (config.lpips_weight, self.lpips)
        self.parts = (*self.terms, "commit", "codebook_use", "perplexity")

    def forward(self, images):
        reconstruction, commitment, _ = self.model(images, collect=self.training)
        parts = {name: loss(reconstruction.float(), images).mean() for name, (_, loss) in self.terms.items()}
        loss = sum(weight * parts[name] for name, (weight, _) in self.terms.items()) + commitment
        return loss, {name: value.detach() for name, value in (*parts.items(), ("commit", commitment))}

    def after_step(self, skipped):
        """The codebook's own step, from what the forward passes collected; a skipped step drops that."""
        if skipped:
            self.model.codebook.pending = None
            return {}
        use, perplexity = self.model.codebook.update()
        return {"codebook_use": use, "perplexity": perplexity}

    def picture(self, images):
        """Inputs over reconstructions."""
        images = images[:8]
        pairs = torch.cat([images, self.model.decode(self.model.encode(images))])
        return data.contact_sheet([data.to_image(x) for x in pairs], columns=len(images))


class BiARTObjective(nn.Module):
    """Cross-entropy in both directions. forward((text, image codes, null)) -> loss, {part: value}."""
    parts = ("t2i", "i2t")
    copies = 2  # of a sample in a validation batch: one runs each way

    def __init__(self, biart, vae, tokenizer):
        super().__init__()
        self.model, self.helpers = biart, (vae, tokenizer)  # a tuple: no submodules to be trained

    def forward(self, text, image, null):
        return self.model(text, image, null if self.training else None)

    def after_step(self, skipped):
        return {}

    def picture(self, text, image, null):
        """Captions under the images painted from them; then images over the captions given to them."""
        vae, tokenizer = self.helpers
        text, image = text[:16:2], image[:16:2]
        painted = self.model.generate(text, "image")
        said = self.model.generate(image, "text")
        side = self.model.config.image_side
        pixels = torch.cat([vae.decode([codes.view(-1, side, side)]) for codes in (painted, image)])
        captions = [tokenizer.decode(ids.tolist()) for ids in torch.cat([text, said])]
        return data.contact_sheet([data.to_image(x) for x in pixels], captions, columns=len(text))


def read_augvae(name, given):
    """
    The AugVAE of --init_from, or else the one that the stage of that name left in out_dir.
    Raises ValueError where it contradicts what was asked for.
    """
    config = configure(given, name, TrainConfig)[0]
    path = config.init_from or os.path.join(config.out_dir, f"{name}.pt")
    if config.init_from:
        vae = load_augvae(path)
    else:
        vae = build_model(AugVAE, AugVAEConfig, load_checkpoint(path, name))
    has = dataclasses.asdict(vae.config)
    if vae.config.single_level:
        has["token_grid"] = vae.config.single_level
    for key, value in has.items():
        if given.get(key, value) != value:
            raise ValueError(f"--{key} {given[key]} contradicts {path}, which has {value}")
    return vae


def bad_images(config, stage):
    """Where a stage notes what data it could not read."""
    return os.path.join(config.out_dir, f"{stage}_bad_images.log")


def prepare_augvae(stage, given, train_data, val_data, _context):
    """-> objective, training view, validation view, what the checkpoint says of the models it belongs to."""
    config, data_config, vae_config = configure(given, stage, TrainConfig, DataConfig, AugVAEConfig)
    if stage == "augvae_ml" and not config.init_from:
        vae = AugVAE(vae_config)
    else:
        vae = read_augvae("augvae_ml", given)
    if stage == "augvae_ml" and vae.config.single_level:
        raise ValueError(f"{config.init_from} is AugVAE-SL, of which no AugVAE-ML can be made: "
                         "--stage augvae_sl trains it, --stage biart uses it")
    if stage == "augvae_sl" and not vae.config.single_level:
        vae = vae.single_level(config.token_grid)
    size = vae.config.image_size
    views = (data.Pixels(train_data, size, data_config.crop_scale, data_config.crop_of),
             data.Pixels(val_data, size, 1.0))
    return AugVAEObjective(vae, config), *views, {}


def prepare_biart(stage, given, train_data, val_data, context):
    """As prepare_augvae: trains or reads (--resume, --tokenizer) the tokenizer, encodes both data sets."""
    config, data_config, biart_config = configure(given, stage, TrainConfig, DataConfig, BiARTConfig)
    log = bad_images(config, stage)
    if config.batch_size % 2:
        raise ValueError(f"--batch_size {config.batch_size} is odd: "
                         "half of every batch runs in each direction")
    vae = read_augvae("augvae_sl", given).to(context.device)
    if not vae.config.single_level:
        raise ValueError(f"{config.init_from} is AugVAE-ML, BiART needs AugVAE-SL: "
                         "--stage augvae_sl makes it of that")
    path = os.path.join(config.out_dir, "tokenizer.json")
    given_tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer else None
    if config.resume and os.path.exists(path):
        tokenizer = Tokenizer.load(path)
        if given_tokenizer and given_tokenizer.fingerprint() != tokenizer.fingerprint():
            raise ValueError(f"--tokenizer {config.tokenizer} contradicts {path}, which the run began with")
    elif given_tokenizer:
        tokenizer = given_tokenizer
        if context.rank == 0:
            tokenizer.save(path)
    else:
        began = time.time()
        texts = data.all_captions(train_data, log)
        tokenizer = Tokenizer.train(texts, config.vocab_size)
        context.print0(f"tokenizer: {len(tokenizer)} tokens from {len(texts):,} captions "
                    f"in {time.time() - began:.1f} s")
        if context.rank == 0:
            tokenizer.save(path)
    biart_config = dataclasses.replace(
        biart_config, text_vocab=len(tokenizer), end_token=tokenizer.end, pad_token=tokenizer.pad,
        image_vocab=vae.config.codebook_size, image_side=vae.config.single_level)

    @torch.no_grad()
    def encode(images):
        with context.autocast():
            return vae.encode(images.to(context.device))[0].flatten(1)

    def add(tensor):
        return context.all_reduce(tensor.to(context.device)).cpu()

    views, key = [], {"augvae": fingerprint(vae), "tokenizer": tokenizer.fingerprint()}
    own = not config.cache_tokens
    splits = ("train", train_data, config.cache_crops, biart_config.null_prob), ("val", val_data, 1, 0.0)
    for split, dataset, crops, null_prob in splits:
        source = data.TokenCacheSource(dataset, tokenizer, biart_config.n_text, vae.config.image_size, crops,
                                data_config.crop_scale, log, data_config.workers)
        folder = os.path.join(config.cache_tokens or os.path.join(config.out_dir, "tokens"), split)
        data.build_token_cache(source, encode, folder, key, own, context.rank, context.world, add)
        views.append(data.Tokens(folder, null_prob))
    objective = BiARTObjective(BiART(biart_config), vae, tokenizer)
    return objective, *views, key


# -----------------------------------------------------------------------------
# The loop

def get_lr(step, config, factor=1.0):
    """Linear warm-up, then a cosine from learning_rate down to min_lr at max_iters, or a Plateau's factor."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    if config.schedule == "plateau":
        return max(config.min_lr, config.learning_rate * factor)
    share = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.min_lr + (config.learning_rate - config.min_lr) * (1 + math.cos(math.pi * share)) / 2


@dataclass
class Plateau:
    """
    Halves `factor` after more than 10 losses in a row with no new best, by 1 in 10,000; then 10 do not count.
    Like torch.optim.lr_scheduler.ReduceLROnPlateau(factor=0.5, patience=10, cooldown=10), in plain numbers.
    """
    factor: float = 1.0
    best: float = math.inf
    bad: int = 0
    cooldown: int = 0

    def step(self, loss):
        better = loss < self.best * (1 - 1e-4)
        self.best = loss if better else self.best
        self.bad = 0 if better or self.cooldown else self.bad + 1
        self.cooldown = max(0, self.cooldown - 1)
        if self.bad > 10:
            self.factor, self.bad, self.cooldown = self.factor / 2, 0, 10


def orthogonalise(matrix, steps=5):
    """(rows, columns) -> the same singular vectors, values 0.7 to 1.2: Newton-Schulz, by products alone."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x if wide else x.T


class Muon(torch.optim.AdamW):
    """
    AdamW, but in groups with "orthogonal" the step is the momentum, orthogonalised, so that a matrix turns
    equally fast in all directions, weak ones too (Jordan et al. 2024). It is scaled to the size of AdamW's
    steps, hence one learning rate for both (Liu et al. 2025, arXiv 2502.16982).
    """
    momentum = 0.95

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"] if group["orthogonal"] else ():
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:  # "step" is there for AdamW's loading of states, which asks for it
                    state.update(step=torch.zeros(()), momentum=torch.zeros_like(p))
                average = state["momentum"]
                average.mul_(self.momentum).add_(p.grad)
                update = orthogonalise((p.grad + self.momentum * average).flatten(1)).view_as(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * max(update.flatten(1).shape) ** 0.5)
                p.grad = None  # AdamW passes over what has no gradient
        super().step()


def make_optimizer(model, config, context):
    """Weight decay for weights of two and more dimensions; with muon, those in layers are orthogonalised."""
    layers = {module.weight for module in model.modules() if config.optimizer == "muon"
              and isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))}
    hidden = [p for p in model.parameters() if p in layers]
    decay = [p for p in model.parameters() if p.dim() >= 2 and p not in layers]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": hidden, "weight_decay": config.weight_decay, "orthogonal": True},
              {"params": decay, "weight_decay": config.weight_decay, "orthogonal": False},
              {"params": rest, "weight_decay": 0.0, "orthogonal": False}]
    context.print0("{:,} parameters with orthogonal steps, {:,} others with weight decay, {:,} without".format(
        *(sum(p.numel() for p in group["params"]) for group in groups)))
    fused = {"fused": True} if context.works(context.step_fused) else {}  # on CPUs from torch 2.4 on
    return Muon(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), **fused)


def checkpoint_activations(model):
    """Blocks keep inputs alone and run again in the backward pass: much less memory for a third more time."""
    for module in model.modules():
        if isinstance(module, (Block, ResBlock)):
            module.forward = functools.partial(torch.utils.checkpoint.checkpoint, module.forward,
                                               use_reentrant=False)


def shard(model):
    """Spread a BiART over all ranks, block by block. Raises ValueError where torch has no fully_shard."""
    try:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    except ImportError:
        raise ValueError(f"--shard needs torch 2.6 or newer, this is {torch.__version__}") from None
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    model.use_cuda_graphs = False
    register_fsdp_forward_method(model, "generate")


def full_state_dict(tree):
    """A state dict with every sharded tensor put together; all ranks must ask for it."""
    if isinstance(tree, dict):
        return {key: full_state_dict(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [full_state_dict(value) for value in tree]
    return tree.full_tensor() if hasattr(tree, "full_tensor") else tree


def load_optimizer(optimizer, state):
    """Load full_state_dict()'s state dict, cutting up again what belongs to a sharded parameter."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state["state"].items():
        p = params[i]
        if hasattr(p, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor
            for key, value in values.items():
                if value.shape == p.shape:
                    values[key] = distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
    optimizer.load_state_dict(state)


class Stopped(Exception):
    """A signal asked for the end; args: what to say, the signal's number."""


class Signals:
    """
    SIGTERM and SIGINT while training: the first lets the loop finish its step and save, a second ends the
    process at once.
    """

    def __enter__(self):
        self.number, self.at = 0, 0.0
        self.before = {n: signal.signal(n, self.catch) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def catch(self, number, _frame):
        # Ctrl-C reaches a rank from the terminal and from torchrun: what comes within a second is one signal.
        if self.number and time.monotonic() - self.at > 1:
            os._exit(128 + number)
        if not self.number:
            self.number, self.at = number, time.monotonic()

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train_step(wrapped, objective, optimizer, scaler, config, context, batches, signals=None):
    """
    One optimizer step on this rank's micro-batches. -> the mean loss over ranks, the gradient's norm, the
    parts of the loss, whether the step was skipped because one of these is not finite, and whether any rank
    has caught a signal.
    """
    total, parts, micro = 0.0, {}, config.gradient_accumulation_steps
    for i, batch in enumerate(batches):
        last = i == micro - 1 or not isinstance(wrapped, DistributedDataParallel)
        with contextlib.nullcontext() if last else wrapped.no_sync():
            with context.autocast():
                loss, parts = wrapped(*batch)
            scaler.scale(loss / micro).backward()
        total = total + loss.detach() / micro
    scaler.unscale_(optimizer)
    norm = float(full_state_dict(nn.utils.clip_grad_norm_(objective.model.parameters(), config.grad_clip or math.inf)))
    # Summed over ranks, so that all take the same turn: the mean loss, and whether anyone caught a signal
    caught = float(signals is not None and signals.number > 0)
    status = torch.stack([total.float() / context.world, torch.tensor(caught, device=total.device)])
    loss, stopping = context.all_reduce(status).tolist()
    skip = not (math.isfinite(loss) and math.isfinite(norm))
    if not skip:
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    parts = {k: float(v) for k, v in {**parts, **objective.after_step(skip)}.items()}
    return loss, norm, parts, skip, stopping


def train(stage, given):
    """Run one stage from its beginning, or, with --resume, from its last good checkpoint, to max_iters."""
    config, data_config, vae_config, biart_config = configure(
        given, stage, TrainConfig, DataConfig, AugVAEConfig, BiARTConfig)
    if config.optimizer not in ("adamw", "muon"):
        raise ValueError(f"--optimizer {config.optimizer!r} is none of: adamw, muon")
    if config.schedule not in ("cosine", "plateau"):
        raise ValueError(f"--schedule {config.schedule!r} is none of: cosine, plateau")
    sharded = config.shard and stage == "biart"
    if sharded and config.optimizer == "muon":
        raise ValueError("--shard goes with --optimizer adamw: muon needs whole matrices")
    wide = biart_config.n_embd >= 512 if stage == "biart" else vae_config.hidden >= 64
    context = Context(config.device, config.dtype, wide)
    micro = config.gradient_accumulation_steps
    samples_per_step = context.world * config.batch_size * micro
    if config.scale_lr:
        config.learning_rate *= samples_per_step
    path, log_path = os.path.join(config.out_dir, f"{stage}.pt"), bad_images(config, stage)
    saved, newest = latest_checkpoint(path, stage, context.print0) if config.resume else (None, False)
    os.makedirs(config.out_dir, exist_ok=True)
    if not saved and context.rank == 0 and os.path.exists(log_path):
        os.remove(log_path)
    context.barrier()
    datasets = [data.open_data(data_config, split, log_path) for split in ("train", "val")]
    if config.epochs:
        config.max_iters = math.ceil(config.epochs * len(datasets[0]) / samples_per_step)
    if saved and saved["step"] >= config.max_iters:
        context.print0(f"{stage}: done already, {saved['step']} steps")
        return
    if stage == "biart" and not all(d.captioned for d in datasets):
        raise ValueError(f"--stage biart needs captions, and --data {data_config.data} has none here")
    datasets[1] = data.validation_subset(datasets[1], config.eval_images, log_path)
    if min(map(len, datasets)) < context.world:
        raise ValueError(f"{min(map(len, datasets))} images are too few for {context.world} ranks")
    torch.manual_seed(config.seed)  # all ranks build the same model
    prepare = prepare_biart if stage == "biart" else prepare_augvae
    objective, train_view, val_view, surroundings = prepare(stage, given, *datasets, context)
    model = objective.model
    context.print0(f"{stage}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
                f"{len(train_view):,} training images, {context.world} x {config.batch_size} x {micro} "
                f"images a step, {context.device}, {str(context.dtype)[6:]}")
    start, samples, val_loss = 0, 0, None
    on_disk = None  # the step of the checkpoint at path, where it is whole and of this run
    tally = {"loss": 0.0, "loss_max": 0.0, "grad_norm": 0.0, "skipped": 0, "in_a_row": 0, "best": math.inf,
             "parts": {}}
    if saved:
        for key, value in {**surroundings, "config": dataclasses.asdict(model.config)}.items():
            if saved[key] != value:
                raise ValueError(f"{path} belongs to another {key} ({saved[key]}) "
                                 f"than the present one ({value})")
        model.load_state_dict(saved["model"])
        start, samples, val_loss, tally = saved["step"], saved["samples"], saved["val_loss"], saved["tally"]
        on_disk = start if newest else None
        context.print0(f"resuming at step {start}")
        if len(saved["random"]) != context.world or saved["samples_per_step"] != samples_per_step:
            context.print0(f"from now on {context.world} ranks instead of {len(saved['random'])}, "
                        f"{samples_per_step} images a step instead of {saved['samples_per_step']}; "
                        "the order of the data goes on where it was")
    objective.to(context.device)
    if config.checkpoint_activations:
        checkpoint_activations(model)
    if sharded:
        shard(model)
    optimizer, plateau, scaler = make_optimizer(model, config, context), Plateau(), context.scaler()
    torch.manual_seed(config.seed + context.rank)
    if saved:
        load_optimizer(optimizer, saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        plateau = Plateau(**saved["plateau"])
        context.restore_random_state(saved["random"])
    del saved
    wrapped = torch.compile(objective) if config.compile else objective
    if context.world > 1 and not sharded:
        wrapped = DistributedDataParallel(wrapped, broadcast_buffers=False)

    def to_device(batch):
        return [x.to(context.device, non_blocking=True) for x in batch]

    mine = [val_view.item(i, random.Random(i)) for i in range(context.rank, len(val_view), context.world)
            for _ in range(objective.copies)]
    val_batches = [torch.utils.data.default_collate(mine[i:i + config.batch_size])
                   for i in range(0, len(mine), config.batch_size)]

    @torch.no_grad()
    def evaluate():
        objective.eval()
        total = torch.zeros(2, device=context.device)
        for batch in val_batches:
            with context.autocast():
                loss, _ = objective(*to_device(batch))
            total += torch.stack([loss.float(), torch.ones_like(loss, dtype=torch.float)]) * len(batch[0])
        total = context.all_reduce(total)
        with context.autocast():
            picture = objective.picture(*to_device(val_batches[0]))  # on all ranks: a sharded model needs all
        if context.rank == 0:
            picture.save(os.path.join(config.out_dir, f"{stage}_{step:06d}.png"))
        objective.train()
        return (total[0] / total[1]).item()

    def save():
        content = {
            "stage": stage, "step": step, "samples": samples, "samples_per_step": samples_per_step,
            "val_loss": val_loss, "config": dataclasses.asdict(model.config),
            "model": full_state_dict(model.state_dict()), "optimizer": full_state_dict(optimizer.state_dict()),
            "scaler": scaler.state_dict(), "tally": tally, "plateau": dataclasses.asdict(plateau),
            "random": context.all_gather(context.random_state()), "settings": dict(given), **surroundings}
        if context.rank == 0:
            save_checkpoint(path, content, on_disk, config.keep,
                            best=val_loss is not None and val_loss <= tally["best"])
            for stale in older_checkpoints(path).values() if step == 0 else ():
                os.remove(stale)  # of another run, over which --overwrite starts this one
        context.barrier()  # or another rank would look for what is not yet there

    log = Log(os.path.join(config.out_dir, stage), objective.parts, start) if context.rank == 0 else None
    loader = data.batches(train_view, config.batch_size, seed=config.seed, start=samples, rank=context.rank,
                          world=context.world, workers=data_config.workers,
                          shuffle_buffer=data_config.shuffle_buffer, log=log_path)
    objective.train()
    began, spent, step = time.time(), 0.0, start
    with Signals() as signals:
        stopping = 0
        while True:
            due = step % config.eval_interval == 0 or step == config.max_iters
            if due and val_loss is None:
                val_loss = evaluate()
                tally["best"] = min(tally["best"], val_loss)
                plateau.step(val_loss)
            lr = get_lr(step, config, plateau.factor)
            if context.rank == 0 and step == 0:
                print(f"{stage} 0/{config.max_iters} val {val_loss:.4f}", flush=True)
            elif context.rank == 0 and (due or step == 1 or step % config.log_interval == 0):
                speed = (step - start) * samples_per_step / spent if spent else 0.0
                log.write(step, val_loss, lr, speed, tally)
                eta = int((time.time() - began) / max(1, step - start) * (config.max_iters - step))
                print(f"{stage} {step}/{config.max_iters} loss {tally['loss']:.4f} "
                      + " ".join(f"{k} {v:.4g}" for k, v in tally["parts"].items())
                      + (f" | skipped {tally['skipped']}" if tally["skipped"] else "")
                      + (f" | val {val_loss:.4f}" if val_loss is not None else "")
                      + f" | lr {lr:.1e} | {speed:.0f} images/s | ETA {eta // 60}:{eta % 60:02d}", flush=True)
                tally["loss_max"] = 0.0
            if (due or stopping) and step != on_disk:
                if context.rank == 0 and due:
                    log.draw()
                save()
                on_disk = step
            if step == config.max_iters or stopping:
                break

            tick = time.time()
            for group in optimizer.param_groups:
                group["lr"] = lr
            batches = (to_device(next(loader)) for _ in range(micro))
            loss, norm, parts, skip, stopping = train_step(
                wrapped, objective, optimizer, scaler, config, context, batches, signals)
            tally.update(loss=loss, loss_max=max(tally["loss_max"], loss), grad_norm=norm, parts=parts,
                         skipped=tally["skipped"] + skip, in_a_row=tally["in_a_row"] + 1 if skip else 0)
            step, samples, val_loss = step + 1, samples + samples_per_step, None
            spent += time.time() - tick
            if tally["in_a_row"] == 20:
                raise ValueError(f"20 steps in a row, up to step {step}, gave no finite loss and gradient; "
                                 f"{path} holds step {on_disk}, from before")
    if stopping or signals.number:
        raise Stopped(f"{stage} stopped at step {step}, saved to {path}; --resume goes on from there",
                      signals.number or 15)
    context.print0(f"{stage}: {step - start} steps in {time.time() - began:.0f} s, saved to {path}")
    faults = data.count_read_errors(log_path)
    if faults:
        context.print0(f"{stage}: {faults:,} files could not be read or were damaged: {log_path} names them")


class Log:
    """{stem}.csv, a row a logged step, and {stem}_loss.png, the curve drawn from it."""

    def __init__(self, stem, parts, start):
        self.stem = stem
        self.columns = ["step", "loss", "val_loss", "lr", "images_per_s", "loss_max", "grad_norm", "skipped",
                        *parts]
        rows = [row for row in self.rows() if int(row["step"]) < start]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        with data.atomic_write(f"{stem}.csv", part=f"{stem}.csv.part") as f:
            f.write(text.getvalue().encode())

    def rows(self):
        if not os.path.exists(f"{self.stem}.csv"):
            return []
        with open(f"{self.stem}.csv", newline="") as f:
            return [row for row in csv.DictReader(f) if row["step"].isdigit()]

    def write(self, step, val_loss, lr, speed, tally):
        """loss is that of the step itself, loss_max the highest since the row before."""
        row = [step, f"{tally['loss']:.6g}", "" if val_loss is None else f"{val_loss:.6g}", f"{lr:.4g}",
               f"{speed:.1f}", f"{tally['loss_max']:.6g}", f"{tally['grad_norm']:.4g}", tally["skipped"]]
        parts = [f"{tally['parts'][k]:.5g}" if k in tally["parts"] else "" for k in self.columns[len(row):]]
        with open(f"{self.stem}.csv", "a", newline="") as f:
            csv.writer(f).writerow([*row, *parts])

    def draw(self, width=640, height=360, margin=50):
        """Training loss (grey) and validation loss (red) against steps, on a logarithmic scale."""
        rows = self.rows()
        curves = []
        for name, colour in (("loss", (150, 150, 160)), ("val_loss", (214, 48, 49))):
            points = [(int(r["step"]), float(r[name])) for r in rows if r[name]]
            points = [(x, math.log10(y)) for x, y in points if y > 0 and math.isfinite(y)]
            if points:
                curves.append((name, colour, points))
        if not curves:
            return
        xs, ys = zip(*(p for _, _, points in curves for p in points))
        low, high, right = min(ys), max(max(ys), min(ys) + 1e-3), max(max(xs), 1)
        scale = 3  # drawn larger and reduced, for smooth lines
        image = Image.new("RGB", (width * scale, height * scale), "white")
        draw = ImageDraw.Draw(image)
        font = data.font(13 * scale)

        def at(x, y):
            return ((margin + x / right * (width - 1.5 * margin)) * scale,
                    (height - margin - (y - low) / (high - low) * (height - 1.6 * margin)) * scale)

        for i in range(5):
            y = low + (high - low) * i / 4
            draw.line([at(0, y), at(right, y)], fill=(225, 225, 225), width=scale)
            draw.text((2 * scale, at(0, y)[1] - 8 * scale), f"{10 ** y:.3g}", fill="black", font=font)
            x = round(right * i / 4)
            draw.text((at(x, low)[0] - 10 * scale, (height - margin + 6) * scale), str(x),
                      fill="black", font=font)
        for i, (name, colour, points) in enumerate(curves):
            draw.line([at(x, y) for x, y in points], fill=colour, width=2 * scale)
            draw.text(((margin + 10 + 90 * i) * scale, 4 * scale), name, fill=colour, font=font)
        draw.text(((width - 2 * margin) * scale, 4 * scale), os.path.basename(self.stem),
                  fill="black", font=font)
        image.reduce(scale).save(f"{self.stem}_loss.png")


# -----------------------------------------------------------------------------
# Measurements

# What --bench measures; every function returns "median_s" of a step, "size", and what else it found. Sizes
# are the released ones, or fixed ones to compare by, unless given on the command line; presets have no say.

def timed(step, context, unit, units, rounds=5):
    """Median time of step(), after one call for warm-up, and what it is of the fastest the device can do."""
    with FlopCounterMode(display=False) as counter:
        step()
    seconds = [context.timeit(step) for _ in range(rounds)]
    median, n = statistics.median(seconds), 8192 if context.device.type == "cuda" else 2048
    a = torch.randn(n, n, device=context.device, dtype=context.dtype)
    peak = 2 * n ** 3 / min(context.timeit(lambda: a @ a) for _ in range(10))
    flops = counter.get_total_flops()
    print(f"{median:.3f} s a step ({min(seconds):.3f} to {max(seconds):.3f}), "
          f"{units / median:,.1f} {unit}/s, {flops / 1e9:,.0f} GFLOP in products, "
          f"{flops / median / peak:.0%} of what one large product reaches", flush=True)
    return {"median_s": median, "min_s": min(seconds), "max_s": max(seconds), f"{unit}_per_s": units / median,
            "share_of_peak": flops / median / peak}


def training_step(objective, config, context, *batch):
    """A step of training as train() does it, on the same batch again and again."""
    objective.train().to(context.device)
    if config.checkpoint_activations:
        checkpoint_activations(objective.model)
    optimizer, scaler = make_optimizer(objective.model, config, context), context.scaler()
    wrapped = torch.compile(objective) if config.compile else objective
    batch = [x.to(context.device) for x in batch]
    batches = [batch] * config.gradient_accumulation_steps
    return lambda: train_step(wrapped, objective, optimizer, scaler, config, context, batches)


def bench_augvae(given, context):
    """A training step of AugVAE-ML; released: 256 pixels, 2 images."""
    config, sizes = filled(TrainConfig, {"batch_size": 2, **given}), filled(AugVAEConfig, given)
    images = torch.rand(config.batch_size, 3, sizes.image_size, sizes.image_size) * 2 - 1
    step = training_step(AugVAEObjective(AugVAE(sizes), config), config, context, images)
    return {**timed(step, context, "images", len(images) * config.gradient_accumulation_steps, rounds=3),
            "size": list(images.shape)}


def bench_codebook(given, context):
    """32,768 vectors of 256 against 8192 codes: forward, backward and the codebook's own step."""
    config, sizes = filled(TrainConfig, {"batch_size": 8, **given}), filled(AugVAEConfig, given)
    codebook = Codebook(sizes).to(context.device)
    z = torch.randn(config.batch_size, sizes.codebook_dim, 64, 64, device=context.device, requires_grad=True)

    def step():
        z_q, codes, loss = codebook(z)
        (z_q.sum() + loss).backward()
        codebook.collect(z, codes)
        codebook.update()
    n = len(z) * 64 * 64
    return {**timed(step, context, "vectors", n), "size": [n, sizes.codebook_dim, sizes.codebook_size]}


def bench_biart(given, context):
    """A training step of BiART, 12 layers of 512, on 64 + 1024 tokens, 2 samples: one each way."""
    config = filled(TrainConfig, {"batch_size": 2, **given})
    model = BiART(filled(BiARTConfig, {"n_layer": 12, "n_head": 8, "n_embd": 512, **given}))
    c, B = model.config, config.batch_size
    text = torch.randint(0, c.end_token, (B, c.n_text))
    image = torch.randint(0, c.image_vocab, (B, c.n_image))
    null = torch.zeros(B, dtype=torch.bool)
    step = training_step(BiARTObjective(model, None, None), config, context, text, image, null)
    T = c.n_text + c.n_image
    return {**timed(step, context, "tokens", B * T * config.gradient_accumulation_steps),
            "size": [c.n_layer, c.n_embd, T, B]}


def photograph(width, height):
    """Smooth colours and the grain of a camera, which as JPEG of quality 90 take 1.5 to 2 bits a pixel."""
    smooth = Image.effect_noise((width // 100, height // 100), 300).resize((width, height), Image.BICUBIC)
    turned = smooth.transpose(Image.ROTATE_180)
    colours = Image.merge("RGB", (smooth, turned, smooth.transpose(Image.FLIP_LEFT_RIGHT)))
    return Image.blend(colours, Image.effect_noise((width, height), 40).convert("RGB"), 0.1)


def bench_data(_given, _context, size=256, rounds=7, seconds=0.5,
               sources=((500, 375, 32), (2048, 1536, 8), (4032, 3024, 2))):
    """
    Images/s of one core, by its time: JPEG file -> random crop -> tensor, here, and by torchvision's
    ImageFolder, RandomResizedCrop and ToTensor on the same files in turns; medians of the rounds.
    """
    from torchvision import datasets, transforms  # which nothing else here needs
    usual = transforms.Compose([transforms.RandomResizedCrop(size), transforms.ToTensor()])
    threads, rng, medians = torch.get_num_threads(), random.Random(0), {}
    torch.set_num_threads(1)
    for width, height, count in sources:
        with tempfile.TemporaryDirectory() as folder:
            os.mkdir(os.path.join(folder, "class"))
            for i in range(count):
                photograph(width, height).save(os.path.join(folder, "class", f"{i}.jpg"), quality=90)
            view = data.Pixels(data.read_folder(folder), size, DataConfig.crop_scale)
            peer = datasets.ImageFolder(folder, usual)
            rates = {"ours": [], "torchvision": []}
            for _ in range(rounds):
                for name, rate in rates.items():
                    began, done = time.process_time(), 0
                    while time.process_time() - began < seconds or done < count:
                        if name == "ours":
                            view.item(done % count, rng)
                        else:
                            peer[done % count]
                        done += 1
                    rate.append(done / (time.process_time() - began))
        ours, theirs = (statistics.median(rate) for rate in rates.values())
        medians[f"{width}x{height}"] = {"ours": ours, "torchvision": theirs}
        print(f"{width} x {height} JPEG to {size} x {size}: {ours:.0f} images/s per core, "
              f"torchvision {theirs:.0f}, {ours / theirs:.2f} times as many", flush=True)
    torch.set_num_threads(threads)
    return {"median_s": 1 / next(iter(medians.values()))["ours"], "size": size, "images_s": medians}


BENCHES = {"augvae": bench_augvae, "codebook": bench_codebook, "biart": bench_biart, "data": bench_data}


# -----------------------------------------------------------------------------

def main(argv):
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=TrainConfig.preset)
    first.add_argument("--stage", default=TrainConfig.stage)
    seen, _ = first.parse_known_args(argv)
    defaults = preset_values(seen.preset, seen.stage)
    parser = Parser((TrainConfig, DataConfig, AugVAEConfig, BiARTConfig), defaults, description=__doc__)
    given = parser.settings(argv)
    if given.get("resume"):  # as the run was started, but for what is given now
        given = {**settings_of(given.get("out_dir", TrainConfig.out_dir)), **given}
    stage = given.get("stage", "all")
    if stage not in (*STAGES, "all"):
        raise ValueError(f"--stage {stage!r} is none of: {', '.join(STAGES)}, all")
    stages = STAGES if stage == "all" else (stage,)
    config, data_config = configure(given, stage, TrainConfig, DataConfig)
    if config.bench:
        if config.bench not in BENCHES:
            raise ValueError(f"--bench {config.bench!r} is none of: {', '.join(BENCHES)}")
        context = Context(config.device, config.dtype, wide=True)
        before = context.peak_gb()
        measured = BENCHES[config.bench](given, context)
        measured.update(peak_gb=context.peak_gb() - before, device=context.device_name(),
                        dtype=str(context.dtype)[6:])
        print(f"{measured['peak_gb']:.2f} GB more than before at most, {measured['device']}, "
              f"{measured['dtype']}")
        if config.json:
            print(json.dumps(measured))
        return
    if "biart" in stages and data_config.data in data.UNCAPTIONED:
        raise ValueError(f"--data {data_config.data} has no captions, which --stage biart needs: "
                         "train --stage augvae_ml, then augvae_sl")
    if not 0 <= config.epochs < math.inf:
        raise ValueError(f"--epochs {config.epochs} is not a number of passes over the data")
    if config.epochs and "max_iters" in given:
        raise ValueError(f"--epochs {config.epochs} and --max_iters {config.max_iters} contradict: give one")
    there = [p for p in (os.path.join(config.out_dir, f"{name}.pt") for name in stages) if os.path.exists(p)]
    if there and not (config.resume or config.overwrite):
        raise ValueError(f"{there[0]} exists: --resume goes on with it, --overwrite starts anew, "
                         "and another --out_dir keeps both")
    for name in stages:
        train(name, given)
        given = {**given, "init_from": ""}  # the next stage begins with what this one left


def settings_of(out_dir):
    """What was given on the command line of the run in out_dir, by the stage that was at work last."""
    paths = {stage: os.path.join(out_dir, f"{stage}.pt") for stage in STAGES}
    there = [stage for stage in STAGES if os.path.exists(paths[stage]) or older_checkpoints(paths[stage])]
    if not there:
        raise ValueError(f"--resume finds no checkpoint of {', '.join(STAGES)} in {out_dir}")
    written = {stage: max(map(os.path.getmtime, glob.glob(f"{glob.escape(out_dir)}/{stage}*.pt")))
               for stage in there}
    stage = max(there, key=written.get)
    saved, _ = latest_checkpoint(paths[stage], stage, print0=lambda _: None)
    return {key: value for key, value in saved["settings"].items()
            if key not in ("resume", "overwrite", "out_dir")}


if __name__ == "__main__":
    status, text = 0, ""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        status, text = 1, error
    except Stopped as stopped:
        text, number = stopped.args
        status = 128 + number
    except KeyboardInterrupt:
        status, text = 1, "interrupted before training began; nothing was overwritten"
    if status:
        rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"train.py: {rank}{text}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        # Not by sys.exit: gloo's thread may still hold the last tensors that it summed, and letting go of
        # them while Python winds up aborts the process.
        os._exit(status)
    sys.exit(status)
