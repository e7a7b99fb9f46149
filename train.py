"""
Train AugVAE-ML, AugVAE-SL and BiART, one after the other or each alone, through one loop.

On a laptop, all three stages on the built-in scenes (13 minutes on 2 CPU cores; validation losses reach 0.001 in the
AugVAE stages and 0.31 in BiART):
$ python train.py

On your own captioned pictures, in the MS-COCO layout:
$ python train.py --preset small --data coco --train_dir IMAGES --train_captions JSON --val_dir IMAGES --val_captions JSON

On 8 GPUs, one stage, on ImageNet (other layouts: data.py):
$ torchrun --nproc_per_node=8 train.py --stage augvae_ml --preset released --workers 2 \
      --train_dir /path/to/imagenet/train --val_dir /path/to/imagenet/val --batch_size 4 --epochs 2

A run lives in --out_dir: {stage}.pt (checkpoint), {stage}.csv and {stage}_loss.png (log and curve), {stage}_{step}.png
(pictures as training goes), tokenizer.json. sample.py reads it.
"""
import argparse
import contextlib
import csv
import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import os
import random
import re
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
from augvae import AugVAE, AugVAEConfig
from biart import BiART, BiARTConfig
from data import DataConfig
from tokenizer import Tokenizer

STAGES = ("augvae_ml", "augvae_sl", "biart")


@dataclass
class TrainConfig:
    stage: str = "all"  # augvae_ml, augvae_sl, biart, or all of them in this order
    preset: str = "tiny"  # tiny (64 px scenes, minutes on a CPU), small (64 px pictures), released (256 px, GPUs)
    out_dir: str = "out"  # where the run lives
    resume: bool = False  # go on with the run in out_dir
    overwrite: bool = False  # start anew over the run in out_dir
    seed: int = 1337  # of initial weights, order and crops
    batch_size: int = 8  # images per rank and micro-step
    gradient_accumulation_steps: int = 1  # micro-steps to an optimizer step
    max_iters: int = 100000  # optimizer steps of a stage
    epochs: float = 0.0  # passes over the training data, instead of max_iters
    learning_rate: float = 1e-4  # after warm-up
    min_lr: float = 1e-6  # at the end of the cosine decay
    warmup_iters: int = 100  # steps of linear warm-up
    weight_decay: float = 1e-5  # on weights of two and more dimensions
    optimizer: str = "adamw"  # adamw, or muon: orthogonalised steps for the matrices inside layers, AdamW for the rest
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.999  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0 does not clip
    loss: str = "l2"  # AugVAE's pixel loss: l2 or l1
    token_grid: int = 32  # side of the grid that AugVAE-SL keeps and BiART models
    vocab_size: int = 8192  # largest text vocabulary to train
    eval_interval: int = 1000  # steps between validation, pictures and checkpoint
    eval_images: int = 256  # validation images, spread over the validation set
    log_interval: int = 10  # steps between log lines
    cache_tokens: str = ""  # folder of the data as tokens, for runs to share; empty: tokens/ in out_dir
    cache_crops: int = 1  # random crops of a training image to keep the tokens of; 1 is the centre crop
    bench: str = ""  # measure instead of training: data (images/s of the loader)
    json: bool = False  # bench: print one JSON object last
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto is cuda where there is one
    dtype: str = "auto"  # float32, bfloat16 or float16 autocast; auto is what helps on the device
    compile: bool = False  # torch.compile the model


# What a preset sets: under "" for every stage, then for one.
PRESETS = {
    "tiny": {
        "": {"image_size": 64, "levels": (8, 4, 2), "hidden": 16, "ch_mult": (1, 2, 4, 4), "n_res_blocks": 1,
             "n_groups": 1, "z_channels": 64, "codebook_size": 128, "codebook_dim": 8, "rate": 0.003, "token_grid": 8,
             "n_layer": 4, "n_head": 4, "n_embd": 128, "n_text": 16, "vocab_size": 512,
             "n_scenes": 16384, "crop_scale": 1.0, "beta2": 0.99, "eval_interval": 100},
        "augvae_ml": {"batch_size": 8, "max_iters": 200, "learning_rate": 2e-3, "min_lr": 2e-5, "warmup_iters": 20},
        "augvae_sl": {"batch_size": 8, "max_iters": 900, "learning_rate": 2e-3, "min_lr": 2e-5, "warmup_iters": 20},
        "biart": {"batch_size": 32, "max_iters": 3200, "learning_rate": 3e-3, "min_lr": 3e-5, "warmup_iters": 100,
                  "weight_decay": 0.1, "optimizer": "muon", "eval_interval": 500, "log_interval": 50},
    },
    "small": {
        "": {"image_size": 64, "levels": (8, 4, 2), "hidden": 32, "ch_mult": (1, 2, 4, 4), "n_res_blocks": 1,
             "n_groups": 1, "z_channels": 128, "codebook_size": 1024, "codebook_dim": 16, "rate": 0.001, "token_grid": 8,
             "n_layer": 6, "n_head": 6, "n_embd": 192, "n_text": 32, "vocab_size": 2048, "dropout": 0.1,
             "crop_scale": 1.0, "beta2": 0.99, "eval_interval": 100},
        "augvae_ml": {"batch_size": 8, "max_iters": 400, "learning_rate": 2e-3, "min_lr": 2e-5, "warmup_iters": 20},
        "augvae_sl": {"batch_size": 8, "max_iters": 1800, "learning_rate": 2e-3, "min_lr": 2e-5, "warmup_iters": 20},
        "biart": {"batch_size": 32, "max_iters": 2400, "learning_rate": 2e-3, "min_lr": 2e-5, "weight_decay": 0.1,
                  "optimizer": "muon"},
    },
    "released": {
        "": {"vocab_size": 49408, "warmup_iters": 2000},
        "augvae_ml": {"data": "imagenet", "batch_size": 4, "max_iters": 300000},
        "augvae_sl": {"data": "imagenet", "batch_size": 8, "max_iters": 100000},
        "biart": {"data": "coco", "batch_size": 16, "max_iters": 100000, "learning_rate": 3e-4, "min_lr": 3e-5, "weight_decay": 0.1,
                  "beta2": 0.95},
    },
}


# -----------------------------------------------------------------------------
# Settings: one command line, made from the fields of the dataclasses

class Parser(argparse.ArgumentParser):
    """`--name value` and `--name=value` for every field of some dataclasses; what is not given stays out of the result."""

    def __init__(self, classes, defaults, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)
        for cls in classes:
            group = self.add_argument_group(cls.__name__)
            comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
            for f in dataclasses.fields(cls):
                if f.metadata.get("derived"):
                    continue
                note = f"{comments.get(f.name, '')} [{defaults.get(f.name, f.default)}]".replace("%", "%%")
                read, metavar, extra = kinds[f.type]
                group.add_argument(f"--{f.name}", type=read, default=argparse.SUPPRESS, metavar=metavar,
                                   help=note.strip(), **extra)

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
         bool: (true_or_false, "bool", {"nargs": "?", "const": True}), tuple[int, ...]: (int_tuple, "int,int,...", {}),
         tuple[str, ...]: (str, "text", {"nargs": "+"})}


def preset_values(preset, stage):
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset!r} is none of: {', '.join(PRESETS)}")
    return {**PRESETS[preset].get("", {}), **PRESETS[preset].get(stage, {})}


def configure(given, stage, *classes):
    """Settings of one stage, as one instance of each class: the class's defaults < the preset's < what was given."""
    values = {**preset_values(given.get("preset", TrainConfig.preset), stage), **given}
    return [cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}) for cls in classes]


# -----------------------------------------------------------------------------
# Checkpoints

def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain values; the file appears whole or not at all."""
    part = f"{path}.part"
    try:
        with open(part, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:
        raise OSError(f"{path} could not be written ({e}); what was there before is untouched") from None
    os.replace(part, path)


def load_checkpoint(path, stage):
    """
    The dict that save_checkpoint wrote for this stage. Nothing in the file is executed.
    Raises ValueError where it is missing, truncated, not one of ours, or of another stage.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path}: `train.py --stage {stage}` makes it") from None
    except Exception as e:  # noqa: BLE001 - a broken file fails in many ways: zip, pickle, end of file, ...
        raise ValueError(f"{path} is not a whole checkpoint ({type(e).__name__})") from None
    if not isinstance(checkpoint, dict) or "stage" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of this project")
    if checkpoint["stage"] != stage:
        raise ValueError(f"{path} is a checkpoint of stage {checkpoint['stage']}, not of {stage}")
    return checkpoint


def restore(cls, config_cls, checkpoint):
    """A model as a checkpoint describes it, in eval mode on the CPU."""
    model = cls(config_cls(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    return model.eval()


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
        if dtype == "auto":
            if self.device.type == "cuda":
                dtype = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
            else:  # autocast's casts cost a small model more than its products gain
                dtype = "bfloat16" if wide and "amx_bf16" in cpu_flags() else "float32"
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype {dtype!r} is none of: auto, float32, bfloat16, float16")
        if dtype == "float16" and self.device.type == "cpu":
            raise ValueError("--dtype float16 needs a GPU: on a CPU it is float32 or bfloat16")
        self.dtype = getattr(torch, dtype)

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

    def sum(self, tensor):
        """Add a tensor up over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def say(self, *text):
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
    """Pixel loss + commitment. forward((images,)) -> loss, {part: value}."""
    parts = ("pixel", "commit", "codebook_use", "perplexity")
    copies = 1  # of a sample in a validation batch

    def __init__(self, vae, loss):
        super().__init__()
        losses = {"l2": F.mse_loss, "l1": F.l1_loss}
        if loss not in losses:
            raise ValueError(f"--loss {loss!r} is none of: {', '.join(losses)}")
        self.model, self.pixel_loss = vae, losses[loss]

    def forward(self, images):
        reconstruction, commitment, _ = self.model(images, collect=self.training)
        pixel = self.pixel_loss(reconstruction.float(), images)
        return pixel + commitment, {"pixel": pixel.detach(), "commit": commitment.detach()}

    def after_step(self):
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
        self.model, self.helpers = biart, (vae, tokenizer)  # a tuple, so that they are no submodules to be trained

    def forward(self, text, image, null):
        return self.model(text, image, null if self.training else None)

    def after_step(self):
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
    """The AugVAE that an earlier stage left in out_dir. Raises ValueError where it contradicts what was asked for."""
    path = os.path.join(configure(given, name, TrainConfig)[0].out_dir, f"{name}.pt")
    checkpoint = load_checkpoint(path, name)
    for key, value in checkpoint["config"].items():
        if given.get(key, value) != value:
            raise ValueError(f"--{key} {given[key]} contradicts {path}, which has {value}")
    return restore(AugVAE, AugVAEConfig, checkpoint)


def bad_images(config, stage):
    """Where a stage notes what data it could not read."""
    return os.path.join(config.out_dir, f"{stage}_bad_images.log")


def prepare_augvae(stage, given, train_data, val_data, _context):
    """-> (objective, training view, validation view, what the checkpoint says of the models it belongs to)."""
    config, data_config, vae_config = configure(given, stage, TrainConfig, DataConfig, AugVAEConfig)
    if stage == "augvae_ml":
        vae = AugVAE(vae_config)
    else:
        vae = read_augvae("augvae_ml", given).single_level(config.token_grid)
    size = vae.config.image_size
    views = data.Pixels(train_data, size, data_config.crop_scale), data.Pixels(val_data, size, 1.0)
    return AugVAEObjective(vae, config.loss), *views, {}


def prepare_biart(stage, given, train_data, val_data, context):
    """As prepare_augvae: trains (or, with --resume, reads) the tokenizer, and encodes both data sets, once."""
    config, data_config, biart_config = configure(given, stage, TrainConfig, DataConfig, BiARTConfig)
    log = bad_images(config, stage)
    if config.batch_size % 2:
        raise ValueError(f"--batch_size {config.batch_size} is odd: half of every batch runs in each direction")
    vae = read_augvae("augvae_sl", given).to(context.device)
    path = os.path.join(config.out_dir, "tokenizer.json")
    if config.resume and os.path.exists(path):
        tokenizer = Tokenizer.load(path)
    else:
        began = time.time()
        texts = data.all_captions(train_data, log)
        tokenizer = Tokenizer.train(texts, config.vocab_size)
        context.say(f"tokenizer: {len(tokenizer)} tokens from {len(texts):,} captions in {time.time() - began:.1f} s")
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
        return context.sum(tensor.to(context.device)).cpu()

    views, key = [], {"augvae": fingerprint(vae), "tokenizer": tokenizer.fingerprint()}
    own = not config.cache_tokens
    splits = ("train", train_data, config.cache_crops, biart_config.null_prob), ("val", val_data, 1, 0.0)
    for split, dataset, crops, null_prob in splits:
        source = data.Encodable(dataset, tokenizer, biart_config.n_text, vae.config.image_size, crops,
                                data_config.crop_scale, log, data_config.workers)
        folder = os.path.join(config.cache_tokens or os.path.join(config.out_dir, "tokens"), split)
        data.encode_tokens(source, encode, folder, key, own, context.rank, context.world, add)
        views.append(data.Tokens(folder, null_prob))
    objective = BiARTObjective(BiART(biart_config), vae, tokenizer)
    return objective, *views, key


# -----------------------------------------------------------------------------
# The loop

def learning_rate_at(step, config):
    """Linear warm-up, then a cosine from learning_rate down to min_lr at max_iters."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    share = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.min_lr + (config.learning_rate - config.min_lr) * (1 + math.cos(math.pi * share)) / 2


def orthogonalise(matrix, steps=5):
    """(rows, columns) -> the same singular vectors, singular values of 0.7 to 1.2: Newton-Schulz, by products alone."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x if wide else x.T


class Muon(torch.optim.AdamW):
    """
    AdamW, but in groups with "orthogonal" the step is the momentum, orthogonalised, so that a matrix turns equally fast in
    all directions, weak ones too (Jordan et al. 2024). It is scaled to the size of AdamW's steps, hence one learning rate
    for both (Liu et al. 2025, arXiv 2502.16982).
    """
    momentum = 0.95

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"] if group["orthogonal"] else ():
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("momentum", torch.zeros_like(p))
                average.mul_(self.momentum).add_(p.grad)
                update = orthogonalise((p.grad + self.momentum * average).flatten(1)).view_as(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * max(update.flatten(1).shape) ** 0.5)
                p.grad = None  # AdamW passes over what has no gradient
        super().step()


def make_optimizer(model, config, context):
    """Weight decay for all weights of two and more dimensions; with muon, those inside layers are orthogonalised."""
    layers = {module.weight for name, module in model.named_modules()
              if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)) and not name.startswith("head.")}
    hidden = [p for p in model.parameters() if p in layers and config.optimizer == "muon"]
    decay = [p for p in model.parameters() if p.dim() >= 2 and not any(p is h for h in hidden)]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": hidden, "weight_decay": config.weight_decay, "orthogonal": True},
              {"params": decay, "weight_decay": config.weight_decay, "orthogonal": False},
              {"params": rest, "weight_decay": 0.0, "orthogonal": False}]
    context.say("{:,} parameters with orthogonal steps, {:,} others with weight decay, {:,} without".format(
        *(sum(p.numel() for p in group["params"]) for group in groups)))
    fused = {"fused": True} if context.device.type == "cuda" else {}
    return Muon(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), **fused)


def train(stage, given):
    """Run one stage from its beginning, or, with --resume, from its checkpoint, to max_iters."""
    config, data_config, vae_config, biart_config = configure(
        given, stage, TrainConfig, DataConfig, AugVAEConfig, BiARTConfig)
    if config.optimizer not in ("adamw", "muon"):
        raise ValueError(f"--optimizer {config.optimizer!r} is none of: adamw, muon")
    path = os.path.join(config.out_dir, f"{stage}.pt")
    saved = load_checkpoint(path, stage) if config.resume and os.path.exists(path) else None
    wide = biart_config.n_embd >= 512 if stage == "biart" else vae_config.hidden >= 64
    log_path = bad_images(config, stage)
    if not saved and os.path.exists(log_path) and os.environ.get("RANK", "0") == "0":
        os.remove(log_path)
    context = Context(config.device, config.dtype, wide)
    context.sum(torch.zeros(1, device=context.device))  # rank 0 may still be writing the stage before
    os.makedirs(config.out_dir, exist_ok=True)
    datasets = [data.open_data(data_config, split, log_path) for split in ("train", "val")]
    if config.epochs:
        a_step = context.world * config.batch_size * config.gradient_accumulation_steps
        config.max_iters = math.ceil(config.epochs * len(datasets[0]) / a_step)
    if saved and saved["step"] >= config.max_iters:
        context.say(f"{stage}: done already, {saved['step']} steps")
        return

    if stage == "biart" and not all(d.captioned for d in datasets):
        raise ValueError(f"--stage biart needs captions, and --data {data_config.data} has none here")
    datasets[1] = data.spread(datasets[1], config.eval_images, log_path)
    if min(map(len, datasets)) < context.world:
        raise ValueError(f"{min(map(len, datasets))} images are too few for {context.world} ranks")
    torch.manual_seed(config.seed)  # all ranks build the same model
    prepare = prepare_biart if stage == "biart" else prepare_augvae
    objective, train_view, val_view, surroundings = prepare(stage, given, *datasets, context)
    model = objective.model
    objective.to(context.device)
    context.say(f"{stage}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(train_view):,} "
                f"training images, {context.world} x {config.batch_size} x {config.gradient_accumulation_steps} images "
                f"a step, {context.device}, {str(context.dtype)[6:]}")
    optimizer = make_optimizer(model, config, context)
    scaler = context.scaler()
    torch.manual_seed(config.seed + context.rank)
    start = 0
    if saved:
        for key, value in surroundings.items():
            if saved[key] != value:
                raise ValueError(f"{path} belongs to another {key} than the one in {config.out_dir}")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"])
        start = saved["step"]
        context.say(f"resuming at step {start}")
    wrapped = torch.compile(objective) if config.compile else objective
    if context.world > 1:
        wrapped = DistributedDataParallel(wrapped, broadcast_buffers=False)

    micro = config.gradient_accumulation_steps
    loader = data.batches(train_view, config.batch_size, config.seed, start * micro, context.rank, context.world,
                          data_config.workers, data_config.shuffle_buffer, log_path)

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
        total = context.sum(total)
        if context.rank == 0:
            with context.autocast():
                picture = objective.picture(*to_device(val_batches[0]))
            picture.save(os.path.join(config.out_dir, f"{stage}_{step:06d}.png"))
        objective.train()
        return (total[0] / total[1]).item()

    log = Log(os.path.join(config.out_dir, stage), objective.parts, start) if context.rank == 0 else None
    objective.train()
    began, spent, seen, step = time.time(), 0.0, 0, start
    loss, parts = None, {}  # of the last step
    while True:
        lr = learning_rate_at(step, config)
        evaluating = step % config.eval_interval == 0 or step == config.max_iters
        evaluating &= step > start or not saved  # a checkpoint that was just read need not be written again
        val_loss = evaluate() if evaluating else None
        if step == start:
            if evaluating:
                context.say(f"{stage} 0/{config.max_iters} val {val_loss:.4f}")
        elif context.rank == 0 and (evaluating or step == 1 or step % config.log_interval == 0):
            parts = {k: float(v) for k, v in parts.items()}
            log.write(step, float(loss), val_loss, lr, seen / spent, parts)
            eta = int((time.time() - began) / (step - start) * (config.max_iters - step))
            print(f"{stage} {step}/{config.max_iters} loss {float(loss):.4f} "
                  + " ".join(f"{k} {v:.4g}" for k, v in parts.items())
                  + (f" | val {val_loss:.4f}" if evaluating else "")
                  + f" | lr {lr:.1e} | {seen / spent:.0f} images/s | ETA {eta // 60}:{eta % 60:02d}", flush=True)
        if evaluating and context.rank == 0:
            log.draw()
            save_checkpoint(path, {
                "stage": stage, "step": step, "config": dataclasses.asdict(model.config), "model": model.state_dict(),
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "rng": torch.get_rng_state(),
                "val_loss": val_loss, "settings": dict(given), **surroundings})
        if step == config.max_iters:
            break

        tick = time.time()
        for group in optimizer.param_groups:
            group["lr"] = lr
        for i in range(micro):
            batch = to_device(next(loader))
            last = i == micro - 1
            with contextlib.nullcontext() if last or context.world == 1 else wrapped.no_sync():
                with context.autocast():
                    loss, parts = wrapped(*batch)
                scaler.scale(loss / micro).backward()
        scaler.unscale_(optimizer)
        if config.grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        loss, parts = loss.detach(), {**parts, **objective.after_step()}
        step += 1
        spent += time.time() - tick
        seen += config.batch_size * micro * context.world
    context.say(f"{stage}: {step - start} steps in {time.time() - began:.0f} s, saved to {path}")
    faults = data.count_faults(log_path)
    if faults:
        context.say(f"{stage}: {faults:,} files could not be read or were damaged: {log_path} names them")


class Log:
    """{stem}.csv, a row a logged step, and {stem}_loss.png, the curve drawn from it."""

    def __init__(self, stem, parts, start):
        self.stem, self.columns = stem, ["step", "loss", "val_loss", "lr", "images_per_s", *parts]
        rows = [row for row in self.rows() if int(row["step"]) <= start] if start else []
        with open(f"{stem}.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, self.columns)
            writer.writeheader()
            writer.writerows(rows)

    def rows(self):
        if not os.path.exists(f"{self.stem}.csv"):
            return []
        with open(f"{self.stem}.csv", newline="") as f:
            return list(csv.DictReader(f))

    def write(self, step, loss, val_loss, lr, rate, parts):
        with open(f"{self.stem}.csv", "a", newline="") as f:
            csv.writer(f).writerow([step, f"{loss:.6g}", "" if val_loss is None else f"{val_loss:.6g}", f"{lr:.4g}",
                                    f"{rate:.1f}", *(f"{parts[k]:.5g}" if k in parts else "" for k in self.columns[5:])])

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
            draw.text((at(x, low)[0] - 10 * scale, (height - margin + 6) * scale), str(x), fill="black", font=font)
        for i, (name, colour, points) in enumerate(curves):
            draw.line([at(x, y) for x, y in points], fill=colour, width=2 * scale)
            draw.text(((margin + 10 + 90 * i) * scale, 4 * scale), name, fill=colour, font=font)
        draw.text(((width - 2 * margin) * scale, 4 * scale), os.path.basename(self.stem), fill="black", font=font)
        image.reduce(scale).save(f"{self.stem}_loss.png")


# -----------------------------------------------------------------------------
# Measurements

def photograph(width, height):
    """Smooth colours and the grain of a camera, which as JPEG of quality 90 take 1.5 to 2 bits a pixel."""
    smooth = Image.effect_noise((width // 100, height // 100), 300).resize((width, height), Image.BICUBIC)
    turned = smooth.transpose(Image.ROTATE_180)
    colours = Image.merge("RGB", (smooth, turned, smooth.transpose(Image.FLIP_LEFT_RIGHT)))
    return Image.blend(colours, Image.effect_noise((width, height), 40).convert("RGB"), 0.1)


def bench_data(_config, size=256, rounds=7, seconds=0.5,
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    return {"median_s": 1 / next(iter(medians.values()))["ours"], "peak_gb": peak, "device": "cpu",
            "dtype": "float32", "size": size, "images_s": medians}


BENCHES = {"data": bench_data}


# -----------------------------------------------------------------------------

def main(argv):
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=TrainConfig.preset)
    first.add_argument("--stage", default=TrainConfig.stage)
    seen, _ = first.parse_known_args(argv)
    defaults = preset_values(seen.preset, seen.stage)
    given = Parser((TrainConfig, DataConfig, AugVAEConfig, BiARTConfig), defaults, description=__doc__).settings(argv)
    stage = given.get("stage", "all")
    if stage not in (*STAGES, "all"):
        raise ValueError(f"--stage {stage!r} is none of: {', '.join(STAGES)}, all")
    stages = STAGES if stage == "all" else (stage,)
    config, data_config = configure(given, stage, TrainConfig, DataConfig)
    if config.bench:
        if config.bench not in BENCHES:
            raise ValueError(f"--bench {config.bench!r} is none of: {', '.join(BENCHES)}")
        measured = BENCHES[config.bench](config)
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
        raise ValueError(f"{there[0]} exists: --resume goes on with it, --overwrite starts anew, and another --out_dir "
                         "keeps both")
    if config.resume and not there:
        raise ValueError(f"--resume finds no checkpoint of {' or '.join(stages)} in {config.out_dir}")
    for name in stages:
        train(name, given)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
