"""
Train AugVAE-ML, AugVAE-SL and BiART, one after the other or each alone, through one loop.

On a laptop, all three stages on the built-in scenes (14 minutes on 2 CPU cores; validation losses reach
0.00004 in AugVAE-SL and 0.15 in BiART):
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
import datetime
import difflib
import functools
import glob
import hashlib
import inspect
import json
import math
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
import timeit
import weakref
from dataclasses import asdict, dataclass, field, fields, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from PIL import Image, ImageDraw
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

import augvae
import data
from augvae import LPIPS, AugVAE, AugVAEConfig, Codebook, ResBlock, from_lightning, safe_load
from biart import BiART, BiARTConfig, Block
from data import DataConfig
from tokenizer import Tokenizer

aten = torch.ops.aten
STAGES = ("augvae_ml", "augvae_sl", "biart")
LOSSES = {"l2": (F.mse_loss, False), "l1": (F.l1_loss, False),  # AugVAE's pixel loss, and whether with LPIPS
          "lpips_l2": (F.mse_loss, True), "lpips_l1": (F.l1_loss, True)}


@dataclass
class TrainConfig:
    # The run
    stage: str = "all"  # augvae_ml, augvae_sl, biart, or all of them in this order
    preset: str = "tiny"  # tiny (40 px, CPU), small (64), released (256), original (trained as the release)
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
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto is cuda, else mps where it works, else cpu
    dtype: str = "auto"  # float32, bfloat16 or float16 autocast; auto is what helps on the device
    compile: bool = False  # torch.compile the model
    checkpoint_activations: bool = False  # compute blocks' activations again in the backward pass, keep none
    shard: bool = False  # biart: spread parameters, gradients and optimizer state over the ranks (FSDP)
    bench: str = ""  # measure instead of training: augvae, biart, codebook, data, or memory (does it fit?)
    json: bool = False  # bench: print one JSON object last

    limits = {**dict.fromkeys(("max_iters", "epochs", "learning_rate", "warmup_iters", "min_lr", "grad_clip",
                               "weight_decay", "lpips_weight", "keep"), "[0, inf)"),
              **dict.fromkeys(("batch_size", "gradient_accumulation_steps", "token_grid", "cache_crops",
                               "eval_interval", "eval_images", "log_interval"), "[1, inf)"),
              "beta1": "[0, 1)", "beta2": "[0, 1)", "vocab_size": "[258, 65536]"}
    choices = {"stage": (*STAGES, "all"), "schedule": ("cosine", "plateau"), "optimizer": ("adamw", "muon"),
               "loss": tuple(LOSSES), "dtype": ("auto", "float32", "bfloat16", "float16")}


GUIDANCE = 4.0  # of what training samples, and sample.py's default

# What a preset sets: under "" for every stage, then for one.
SHORT_AUGVAE = {"batch_size": 8, "learning_rate": 2e-3, "min_lr": 2e-5, "warmup_iters": 20}
SHORT_BIART = {"batch_size": 32, "learning_rate": 3e-3, "min_lr": 3e-5, "warmup_iters": 100,
               "weight_decay": 0.1, "optimizer": "muon"}
PRESETS = {
    "tiny": {
        "": {"image_size": 40, "levels": (10, 5), "hidden": 16, "ch_mult": (1, 2, 4), "n_res_blocks": 1,
             "n_groups": 1, "z_channels": 64, "codebook_size": 512, "codebook_dim": 8,
             "token_grid": 10, "n_layer": 4, "n_head": 4, "n_embd": 128, "n_text": 16, "vocab_size": 512,
             "n_scenes": 16384, "crop_scale": 1.0, "beta2": 0.99, "eval_interval": 100},
        "augvae_ml": {**SHORT_AUGVAE, "optimizer": "muon", "max_iters": 300, "rate": 0.003, "vq_start": 100},
        "augvae_sl": {**SHORT_AUGVAE, "optimizer": "muon", "max_iters": 1400, "rate": 0.005, "locality": 0.02,
                      "eval_interval": 500, "log_interval": 100},
        "biart": {**SHORT_BIART, "max_iters": 2800, "eval_interval": 500, "log_interval": 50,
                  "code_hidden": 64, "t2i_weight": 5.0, "replace_prob": 0.1}},
    "small": {
        "": {"image_size": 64, "levels": (16, 8, 4), "hidden": 32, "ch_mult": (1, 2, 4), "n_res_blocks": 1,
             "n_groups": 1, "z_channels": 128, "codebook_size": 1024, "codebook_dim": 16, "rate": 0.0003,
             "token_grid": 16, "n_layer": 4, "n_head": 6, "n_embd": 192, "n_text": 32, "vocab_size": 2048,
             "dropout": 0.1, "crop_scale": 1.0, "beta2": 0.99, "eval_interval": 100},
        "augvae_ml": {**SHORT_AUGVAE, "max_iters": 200},
        "augvae_sl": {**SHORT_AUGVAE, "max_iters": 1200},
        "biart": {**SHORT_BIART, "max_iters": 2400, "eval_interval": 200, "t2i_weight": 3.0}},
    "released": {
        "": {"vocab_size": 49408, "warmup_iters": 2000, "loss": "lpips_l2"},
        "augvae_ml": {"data": "imagenet", "batch_size": 4, "max_iters": 300000},
        "augvae_sl": {"data": "imagenet", "batch_size": 8, "max_iters": 100000},
        "biart": {"data": "coco", "batch_size": 16, "max_iters": 100000, "learning_rate": 3e-4,
                  "min_lr": 3e-5, "weight_decay": 0.1, "beta2": 0.95}},
}

# `original` trains AugVAE as the release does: a learning rate of 4.5e-6 times a step's images, no warm-up,
# halved after 10 losses that did not fall (its own: of epochs' last batches; here: of the validation data),
# crops of 0.75 to 1 times the picture's area, gradients not clipped. The other presets differ because Adam's
# steps do not grow with the batch; a young codebook cannot follow an encoder in big steps; a cosine needs no
# noisy comparison; no square of 0.75 times a 4:3 picture's area has room in it; one bad batch should not
# undo a thousand. The release also decays biases and norms, with 1e-5; here none does.
ORIGINAL = {"learning_rate": 4.5e-6, "scale_lr": True, "warmup_iters": 0, "schedule": "plateau",
            "min_lr": 1e-6, "crop_scale": 0.75, "crop_of": "picture", "grad_clip": 0.0}
PRESETS["original"] = {**PRESETS["released"], **{stage: {**PRESETS["released"][stage], **ORIGINAL}
                                                 for stage in ("augvae_ml", "augvae_sl")}}


# -----------------------------------------------------------------------------
# The loop

@dataclass
class Progress:
    """How far a run has come: saved and restored as such."""
    step: int = 0  # optimizer steps taken, skipped ones among them
    samples: int = 0  # training samples drawn by all ranks
    samples_per_step: int = 0  # as of now
    loss: float = 0.0  # of the last step
    loss_max: float = 0.0  # the highest since the last row of the log
    grad_norm: float = 0.0  # of the last step, before clipping
    parts: dict = field(default_factory=dict)  # of the last step's loss, by name
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    val_loss: float = None  # at this very step, or None where it has not been evaluated
    val_losses: list = field(default_factory=list)  # all of them
    rates: dict = field(default_factory=dict)  # exact rates on things never seen, with val_loss
    rows: list = field(default_factory=list)  # of the log


def train(settings):
    """Train one stage from its beginning or, with --resume, from its last good checkpoint, to the end."""
    stage, config = settings.stage, settings.train
    path, bad_images = settings.path(".pt"), settings.path("_bad_images.log")
    context = Context(config.device, config.dtype, settings.wide)
    saved, saved_step = latest_checkpoint(path, stage, context.print0) if config.resume else (None, None)
    progress = Progress(**saved["progress"]) if saved else Progress()

    # The data, and how long to train on it
    train_set, val_set = open_datasets(settings, context, fresh=not saved)
    schedule = Schedule(config, context.world, len(train_set))
    if saved and progress.step >= schedule.max_iters:
        return context.print0(f"{stage}: done already, {progress.step} steps")
    if progress.samples_per_step not in (0, schedule.samples_per_step):
        context.print0(f"from now on {schedule.samples_per_step} images a step instead of "
                       f"{progress.samples_per_step}; the order of the data goes on where it was")
    progress.samples_per_step = schedule.samples_per_step

    # The model, on all ranks the same
    torch.manual_seed(config.seed)
    prepare = prepare_biart if stage == "biart" else prepare_augvae
    objective, train_view, val_view = prepare(settings, train_set, val_set, context)
    context.print0(f"{stage}: {sum(p.numel() for p in objective.model.parameters()) / 1e6:.2f} M parameters, "
                   f"{len(train_view):,} training images, {progress.samples_per_step} images a step on "
                   f"{context.world} x {context.device}, {str(context.dtype)[6:]}")
    trainer = Trainer(objective, settings, context, saved)
    del saved

    batches = data.batches(train_view, config.batch_size, seed=config.seed, start=progress.samples,
                           rank=context.rank, world=context.world, workers=settings.data.workers,
                           shuffle_buffer=settings.data.shuffle_buffer, log=bad_images)
    val_batches = validation_batches(val_view, config.batch_size, context, objective.copies)
    log, stopping = Log(settings.path(""), objective, progress, schedule, context), False
    with Signals() as signals:
        while True:
            due = progress.step % config.eval_interval == 0 or progress.step == schedule.max_iters
            if due and progress.val_loss is None:
                picture = settings.path(f"_{progress.step:06d}.png")
                progress.val_loss, progress.rates = evaluate(objective, val_batches, context, picture)
                progress.val_losses.append(progress.val_loss)
            lr = schedule.get_lr(progress.step, progress.val_losses)
            if due or progress.step == 1 or progress.step % config.log_interval == 0:
                log.write(progress, lr, draw=due)
            if (due or stopping) and progress.step != saved_step:
                trainer.save(progress, saved_step)
                saved_step = progress.step
            if stopping or progress.step == schedule.max_iters:
                break
            began = time.time()
            micro_batches = (next(batches) for _ in range(config.gradient_accumulation_steps))
            stopping = trainer.step(micro_batches, lr, progress, signals)
            log.busy += time.time() - began
            log.show(progress.step)
            if progress.skipped_in_a_row == 20:
                raise ValueError(f"20 steps in a row, up to step {progress.step}, gave no finite loss and "
                                 f"gradient; {path} holds step {saved_step}, from before")
    if stopping or signals.number:
        raise Stopped(f"{stage} stopped at step {progress.step}, saved to {path}; "
                      "--resume goes on from there", 128 + (signals.number or signal.SIGTERM))
    context.print0(f"{stage}: {progress.step - log.start} steps in {time.time() - log.began:.0f} s, "
                   f"saved to {path}")
    faults = data.count_read_errors(bad_images)
    if faults:
        context.print0(f"{stage}: {faults:,} files could not be read or were damaged: "
                       f"{bad_images} names them")


def open_datasets(settings, context, fresh):
    """-> the training data, and the part of the validation data that is looked at."""
    config, bad_images = settings.train, settings.path("_bad_images.log")
    os.makedirs(config.out_dir, exist_ok=True)
    if fresh and context.rank == 0 and os.path.exists(bad_images):
        os.remove(bad_images)
    context.barrier()
    train_set, val_set = (data.open_data(settings.data, split, bad_images) for split in ("train", "val"))
    if settings.stage == "biart" and not (train_set.captioned and val_set.captioned):
        raise ValueError(f"--stage biart needs captions, and --data {settings.data.data} has none here")
    val_set = data.validation_subset(val_set, config.eval_images, bad_images)
    n = min(len(train_set), len(val_set))
    if n < context.world:
        raise ValueError(f"{n} images are too few for {context.world} ranks")
    return train_set, val_set


def validation_batches(view, batch_size, context, copies):
    """
    This rank's share of the validation items, each `copies` times -> [(batch, its weight in the mean)]. All
    ranks get equally many batches, or a sharded model would wait for ever: some get one of weight 0.
    """
    items = [view.item(i, random.Random(i)) for i in range(context.rank, len(view), context.world)
             for _ in range(copies)]
    parts = [items[i:i + batch_size] for i in range(0, len(items), batch_size)]
    batches = [(torch.utils.data.default_collate(part), len(part)) for part in parts]
    most = math.ceil(math.ceil(len(view) / context.world) * copies / batch_size)
    return batches + [(batches[0][0], 0)] * (most - len(batches))


@torch.no_grad()
def evaluate(objective, batches, context, picture):
    """
    -> the mean validation loss over all ranks, and exact rates on things never seen, {} where there are none;
    draws examples into the file `picture`.
    """
    objective.eval()
    total = torch.zeros(2, device=context.device)  # of losses, of weights
    for batch, weight in batches:
        with context.autocast():
            loss, _ = objective(*context.to_device(batch))
        total += torch.stack([loss.float(), torch.ones_like(loss, dtype=torch.float)]) * weight
    context.all_reduce(total)
    with context.autocast():  # on all ranks: a sharded model needs all of them
        drawn = objective.picture(*context.to_device(batches[0][0]))
        rates = objective.exact_rates(context.device) if objective.heldout else {}
    if context.rank == 0:
        drawn.save(picture)
    objective.train()
    return (total[0] / total[1]).item(), rates


@dataclass
class Schedule:
    """How many images a step sees, how many steps a stage takes, and the learning rate of each."""
    config: TrainConfig
    world: int = 1  # ranks
    n: int = 0  # training images, for --epochs

    def __post_init__(self):
        c = self.config
        self.samples_per_step = self.world * c.batch_size * c.gradient_accumulation_steps
        self.max_iters = math.ceil(c.epochs * self.n / self.samples_per_step) if c.epochs else c.max_iters
        self.peak_lr = c.learning_rate * (self.samples_per_step if c.scale_lr else 1)

    def get_lr(self, step, val_losses=()):
        """Linear warm-up, then a cosine from learning_rate down to min_lr, or halved at every plateau."""
        c = self.config
        if step < c.warmup_iters:
            return self.peak_lr * (step + 1) / c.warmup_iters
        if c.schedule == "plateau":
            return max(c.min_lr, self.peak_lr * 0.5 ** count_plateaus(val_losses))
        share = (step - c.warmup_iters) / max(1, self.max_iters - c.warmup_iters)
        return c.min_lr + (self.peak_lr - c.min_lr) * (1 + math.cos(math.pi * share)) / 2


def count_plateaus(losses):
    """How often the validation loss has stopped falling, by the release's measure."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    halve = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "min", 0.5, patience=10, cooldown=10, eps=0)
    for loss in losses:
        halve.step(loss)
    return -round(math.log2(optimizer.param_groups[0]["lr"]))


class Stopped(Exception):
    """A signal asked for the end; args: what to say, the program's exit status."""


class Signals:
    """SIGTERM and SIGINT while training: the first lets the loop finish its step and save, a second kills."""

    def __enter__(self):
        self.number, self.caught_at = 0, 0.0
        self.before = {n: signal.signal(n, self.catch) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def catch(self, number, _frame):
        # Ctrl-C reaches a rank from the terminal and from torchrun: what comes within a second is one signal.
        if self.number and time.monotonic() - self.caught_at > 1:
            os._exit(128 + number)
        if not self.number:
            self.number, self.caught_at = number, time.monotonic()

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Trainer:
    """An objective on its device, wrapped for DDP, FSDP or torch.compile, with what a step needs."""

    def __init__(self, objective, settings, context, saved=None):
        self.objective, self.settings, self.context = objective, settings, context
        config, model = settings.train, objective.model
        sharded = config.shard and settings.stage == "biart"
        if saved:
            for key, value in self.identity().items():
                if saved[key] != value:
                    raise ValueError(f"{settings.path('.pt')} belongs to another {key} ({saved[key]}) than "
                                     f"the present one ({value})")
            model.load_state_dict(saved["model"])
        objective.to(context.device).train()
        if config.checkpoint_activations:
            checkpoint_activations(model)
        if sharded:
            shard(model)
        self.optimizer = make_optimizer(model, config, context)
        grad_scaler = getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)  # the first from 2.3 on
        self.scaler = grad_scaler(enabled=context.dtype is torch.float16)  # does nothing for other types
        torch.manual_seed(config.seed + context.rank)
        if saved:
            load_optimizer(self.optimizer, saved["optimizer"])
            if saved["scaler"]:  # empty where the run was in another type than float16 until now
                self.scaler.load_state_dict(saved["scaler"])
            context.restore_random_state(saved["random"])
            context.print0(f"resuming at step {saved['progress']['step']}")
        if config.compile:  # or nearest() would not see that it asks for full float32; collect() reads values
            for name in ("nearest", "collect"):
                setattr(Codebook, name, torch.compiler.disable(getattr(Codebook, name)))
        self.wrapped = torch.compile(objective) if config.compile else objective
        if context.world > 1 and not sharded:
            self.wrapped = DDP(self.wrapped, broadcast_buffers=False)

    def identity(self):
        """What a checkpoint must agree in with the present settings."""
        return {**self.objective.parents, "config": asdict(self.objective.model.config)}

    def save(self, progress, saved_step):
        """Write all that --resume needs. saved_step: that of the checkpoint there, if it is of this run."""
        model, rank = self.objective.model, self.context.rank
        content = {
            "stage": self.settings.stage, "settings": dict(self.settings.given), **self.identity(),
            "model": full_state_dict(model.state_dict(), rank),
            "optimizer": full_state_dict(self.optimizer.state_dict(), rank),
            "scaler": self.scaler.state_dict(), "progress": asdict(progress),
            "random": self.context.random_states()}
        if rank == 0:  # at step 0, older ones are of a run over which --overwrite starts this one
            save_checkpoint(self.settings.path(".pt"), content, saved_step,
                            keep=self.settings.train.keep if progress.step else 0,
                            best=progress.val_loss == min(progress.val_losses))
        self.context.barrier()  # or another rank would look for what is not yet there

    def step(self, micro_batches, lr, progress, signals=None):
        """
        One optimizer step on this rank's micro-batches, all ranks together. -> whether any rank has caught a
        signal. A step whose loss or gradient is not finite is skipped, and counted in progress.
        """
        context, config, total, parts = self.context, self.settings.train, 0.0, {}
        n = config.gradient_accumulation_steps
        for i, batch in enumerate(micro_batches):
            last = i == n - 1 or not isinstance(self.wrapped, DDP)
            with contextlib.nullcontext() if last else self.wrapped.no_sync():
                with context.autocast():
                    loss, parts = self.wrapped(*context.to_device(batch))
                self.scaler.scale(loss / n).backward()
            total = total + loss.detach() / n
        self.scaler.unscale_(self.optimizer)
        parameters = self.objective.model.parameters()
        norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        # Summed over ranks, so that all take the same turn: the mean loss, and whether anyone caught a signal
        caught = torch.tensor(float(bool(signals and signals.number)), device=total.device)
        loss, stopping = context.all_reduce(torch.stack([total.float() / context.world, caught])).tolist()
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        parts = {**parts, **self.objective.after_step(skipped)}
        progress.step, progress.val_loss, progress.rates = progress.step + 1, None, {}
        progress.samples += progress.samples_per_step
        progress.loss, progress.loss_max = loss, max(progress.loss_max, loss)
        progress.grad_norm, progress.parts = norm, {name: float(value) for name, value in parts.items()}
        progress.skipped += skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if skipped else 0
        return stopping > 0


# -----------------------------------------------------------------------------
# Stages: what the loop trains

class AugVAEObjective(nn.Module):
    """Pixel loss + LPIPS, if asked for, + commitment. forward((images,)) -> loss, {part: value}."""
    copies = 1  # of a sample in a validation batch
    parents = {}  # fingerprints of what made its training data

    def __init__(self, vae, config):
        super().__init__()
        self.model, self.config = vae, config
        self.pixel_loss, perceptual = LOSSES[config.loss]
        self.lpips = LPIPS(config.vgg_weights, config.lpips_weights) if perceptual else None
        self.parts = ("pixel", *["lpips"] * perceptual, "commit", "codebook_use", "perplexity")
        self.heldout = None

    def forward(self, images):
        reconstruction, commitment, _ = self.model(images, collect=self.training)
        parts = {"pixel": self.pixel_loss(reconstruction.float(), images)}
        loss = parts["pixel"]
        if self.lpips:
            parts["lpips"] = self.lpips(reconstruction.float(), images).mean()
            loss = loss + self.config.lpips_weight * parts["lpips"]
        parts["commit"] = commitment
        return loss + commitment, {name: value.detach() for name, value in parts.items()}

    def after_step(self, skipped):
        """The codebook's own step, from what the forward passes collected; a skipped step drops that."""
        if skipped:
            self.model.codebook.discard()
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

    def __init__(self, biart, vae, tokenizer, parents=None, heldout=None):
        super().__init__()
        self.model, self.parents, self.heldout = biart, parents or {}, heldout
        self.helpers = vae, tokenizer  # a tuple: no submodules to be trained

    def forward(self, text, image, null):
        return self.model(text, image, null if self.training else None)

    def after_step(self, skipped):
        return {}

    def decode(self, codes):
        """Image codes (B, n_image) -> PIL images."""
        side = self.model.config.image_side
        return [data.to_image(x) for x in self.helpers[0].decode([codes.view(-1, side, side)])]

    def caption(self, codes):
        return [self.helpers[1].decode(ids.tolist())
                for ids in self.model.generate(codes, "text", guidance=GUIDANCE)[0]]

    def picture(self, text, image, null):
        """Captions under the images painted from them; then images over the captions given to them."""
        text, image = text[:16:2], image[:16:2]
        painted, _ = self.model.generate(text, "image", guidance=GUIDANCE)
        pictures = self.decode(torch.cat([painted, image]))
        captions = [self.helpers[1].decode(ids.tolist()) for ids in text] + self.caption(image)
        return data.contact_sheet(pictures, captions, columns=len(text))

    def exact_rates(self, device):
        """Of scenes with things never seen: {"t2i": share painted right, "i2t": share captioned right}."""
        (vae, tokenizer), scenes = self.helpers, self.heldout
        references = [scenes.captions(i) for i in range(len(scenes))]
        prompts = data.one_caption_each(references)
        text = [tokenizer.encode_padded(prompt, self.model.config.n_text)[0] for prompt in prompts]
        images = [data.crop_to_tensor(scenes.image(i), vae.config.image_size) for i in range(len(scenes))]
        codes = vae.encode(torch.stack(images).to(device))[0].flatten(1)
        painted, _ = self.model.generate(torch.tensor(text, device=device), "image", guidance=GUIDANCE)
        return data.exact_rates(prompts, self.decode(painted), references, self.caption(codes))


def prepare_augvae(settings, train_set, val_set, _context):
    """-> objective, training view, validation view."""
    config, ml = settings.train, settings.stage == "augvae_ml"
    vae = AugVAE(settings.augvae) if ml and not config.init_from else read_augvae("augvae_ml", settings)
    if ml and vae.config.single_level:
        raise ValueError(f"{config.init_from} is AugVAE-SL, of which no AugVAE-ML can be made: "
                         "--stage augvae_sl trains it, --stage biart uses it")
    if not ml and not vae.config.single_level:
        vae = vae.single_level(config.token_grid)
    size = vae.config.image_size
    train_view = data.Pixels(train_set, size, settings.data.crop_scale, settings.data.crop_of)
    return AugVAEObjective(vae, config), train_view, data.Pixels(val_set, size, 1.0)


def prepare_biart(settings, train_set, val_set, context):
    """As prepare_augvae. Both data sets are encoded to tokens here, unless an earlier run has done it."""
    config = settings.train
    if config.batch_size % 2:
        raise ValueError(f"--batch_size {config.batch_size} is odd: "
                         "half of every batch runs in each direction")
    vae = read_augvae("augvae_sl", settings).to(context.device)
    if not vae.config.single_level:
        raise ValueError(f"{config.init_from} is AugVAE-ML, BiART needs AugVAE-SL: "
                         "--stage augvae_sl makes it of that")
    tokenizer = prepare_tokenizer(settings, train_set, context)
    parents = {"augvae": fingerprint(vae), "tokenizer": tokenizer.fingerprint()}
    biart_config = replace(
        settings.biart, text_vocab=len(tokenizer), end_token=tokenizer.end, pad_token=tokenizer.pad,
        image_vocab=vae.config.codebook_size, image_side=vae.config.single_level,
        code_dim=vae.config.codebook_dim)
    biart = BiART(biart_config)
    biart.know_codes(vae.codebook.weight.cpu())

    @torch.no_grad()
    def encode(images):
        with context.autocast():
            return vae.encode(images.to(context.device))[0].flatten(1)

    def view(split, dataset, crops, null_prob):
        source = data.TokenCacheSource(
            dataset, tokenizer, biart_config.n_text, vae.config.image_size, crops, settings.data.crop_scale,
            settings.path("_bad_images.log"), settings.data.workers)
        folder = os.path.join(config.cache_tokens or os.path.join(config.out_dir, "tokens"), split)
        data.build_token_cache(source, encode, folder, parents, not config.cache_tokens, context.rank,
                               context.world, lambda x: context.all_reduce(x.to(context.device)).cpu())
        return data.Tokens(folder, null_prob)

    train_view = view("train", train_set, config.cache_crops, biart_config.null_prob)
    val_view = view("val", val_set, 1, 0.0)
    heldout = data.Scenes("heldout", 64) if settings.data.data == "scenes" else None
    return BiARTObjective(biart, vae, tokenizer, parents, heldout), train_view, val_view


def read_augvae(name, settings):
    """That of --init_from, else of this stage in out_dir. ValueError where it contradicts what was given."""
    given, own = settings.train.init_from, os.path.join(settings.train.out_dir, f"{name}.pt")
    checkpoint = None if given else load_checkpoint(own, name)
    vae = load_augvae(given) if given else build_model(AugVAE, AugVAEConfig, checkpoint, own)
    if settings.stage != "biart":  # each stage of AugVAE has its own of these; BiART's tokens keep theirs
        vae.config.rate, vae.config.locality = settings.augvae.rate, settings.augvae.locality
    side = vae.config.single_level or settings.train.token_grid
    for key, value in {**asdict(vae.config), "token_grid": side}.items():
        if settings.given.get(key, value) != value:
            raise ValueError(f"--{key} {settings.given[key]} contradicts {given or own}, which has {value}")
    return vae


def prepare_tokenizer(settings, train_set, context):
    """The run's own with --resume, or that of --tokenizer, or a new one of all training captions."""
    config, began = settings.train, time.time()
    path = os.path.join(config.out_dir, "tokenizer.json")
    tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer else None
    if config.resume and os.path.exists(path):
        own = Tokenizer.load(path)
        if tokenizer and tokenizer.fingerprint() != own.fingerprint():
            raise ValueError(f"--tokenizer {config.tokenizer} contradicts {path}, which the run began with")
        return own
    if not tokenizer:
        captions = data.all_captions(train_set, settings.path("_bad_images.log"))
        tokenizer = Tokenizer.train(captions, config.vocab_size)
        context.print0(f"tokenizer: {len(tokenizer)} tokens from {len(captions):,} captions "
                       f"in {time.time() - began:.1f} s")
    if context.rank == 0:
        tokenizer.save(path)
    return tokenizer


# -----------------------------------------------------------------------------
# Settings: one command line, made from the fields of the dataclasses

class Settings(NamedTuple):
    """All settings of one stage, made once: a class's defaults < the preset's < what was given."""
    stage: str
    given: dict  # what the command line said
    train: TrainConfig
    data: DataConfig
    augvae: AugVAEConfig
    biart: BiARTConfig

    def path(self, ending):
        """A file of this stage in the run's folder."""
        return os.path.join(self.train.out_dir, f"{self.stage}{ending}")

    @property
    def wide(self):  # enough for bfloat16 to gain more on a CPU than its casts cost
        return self.biart.n_embd >= 512 if self.stage == "biart" else self.augvae.hidden >= 64


CONFIGS = TrainConfig, DataConfig, AugVAEConfig, BiARTConfig


def configure(given, stage, *classes):
    """An instance of each class for a stage. ValueError outside of its `limits` (intervals) and `choices`."""
    return [from_values(cls, {**preset_values(given, stage), **given}) for cls in classes]


def preset_values(given, stage):
    preset = given.get("preset", TrainConfig.preset)
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset!r} is none of: {', '.join(PRESETS)}")
    return {**PRESETS[preset].get("", {}), **PRESETS[preset].get(stage, {})}


def from_values(cls, values):
    """A config class with those of its fields that are among the values, checked."""
    names = {f.name for f in fields(cls)}
    values = {name: value for name, value in values.items() if name in names}
    for name, value in values.items():
        choices, interval = (getattr(cls, kind, {}).get(name) for kind in ("choices", "limits"))
        if choices and value not in choices:
            raise ValueError(f"--{name} {value!r} is none of: {', '.join(choices)}")
        if interval and not in_interval(value, interval):
            raise ValueError(f"--{name} {value} is not in {interval}")
    return cls(**values)


def in_interval(value, interval):
    """(0.5, "(0, 1]") -> True. A bracket includes its end, a parenthesis does not; NaN is in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    return low < value < high or value == low and interval[0] == "[" or value == high and interval[-1] == "]"


class Parser(argparse.ArgumentParser):
    """`--name value` for each field of some dataclasses; help and its groups are the comments around it."""

    def __init__(self, classes, defaults, **kwargs):
        super().__init__(usage="%(prog)s [--setting value ...]", allow_abbrev=False, **kwargs,
                         formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                             prog, max_help_position=38, width=170))
        for cls in classes:
            group = self.add_argument_group(cls.__name__.removesuffix("Config"))
            wanted = {f.name: f for f in fields(cls) if not f.metadata.get("derived")}
            for line in inspect.getsource(cls).splitlines():
                heading = re.fullmatch("    # (.*)", line)
                setting = re.match(r"    (\w+): [^#]*(?:# (.*))?", line)
                if heading:
                    group = self.add_argument_group(heading[1])
                elif setting and setting[1] in wanted:
                    f, comment = wanted[setting[1]], setting[2]
                    note = f"{comment} [{defaults.get(f.name, f.default)}]".replace("%", "%%")
                    group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=note, **KINDS[f.type])

    def settings(self, argv):
        """argv -> dict of what was given. An unknown name ends the program with the names that are valid."""
        found, unknown = self.parse_known_args(argv)
        if unknown:
            names = sorted(s for a in self._actions for s in a.option_strings)
            close = difflib.get_close_matches(unknown[0].split("=")[0], names, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            self.error(f"unknown setting {unknown[0]}{hint}; valid are {' '.join(names)}")
        return vars(found)


def true_or_false(text):
    words = "false", "no", "0", "true", "yes", "1"
    return words.index(text.lower()) >= 3


def whole_numbers(text):
    return tuple(int(part) for part in text.replace(",", " ").split())


KINDS = {  # how argparse reads a setting of each type; of a wrong value it says the function's name
    int: {"type": int, "metavar": "int"},
    float: {"type": float, "metavar": "float"},
    str: {"metavar": "text"},
    bool: {"type": true_or_false, "metavar": "bool", "nargs": "?", "const": True},
    tuple[int, ...]: {"type": whole_numbers, "metavar": "int,int,..."},
    tuple[str, ...]: {"metavar": "text", "nargs": "+"}}


# -----------------------------------------------------------------------------
# Checkpoints

def save_checkpoint(path, checkpoint, previous=None, keep=0, best=False):
    """
    Write a dict of tensors and plain values. `previous`, the step of the file at path, moves to a name of its
    own first, so that a whole checkpoint is always there; `keep` of those stay. The best is copied aside.
    """
    stem, part = os.fspath(path).removesuffix(".pt"), f"{path}.part"  # one name: a kill leaves one such file
    aside = None if previous is None else f"{stem}_{previous:08d}.pt"
    for name, kept_as in [(path, aside), (f"{stem}_best.pt", None)][:1 + best]:
        with data.atomic_write(name, kept_as, part) as f:
            torch.save(checkpoint, f)
    for old in older_checkpoints(path)[keep:]:
        os.remove(old)


def older_checkpoints(path):
    """What save_checkpoint kept of a stage's earlier checkpoints, the newest first."""
    stem = os.fspath(path).removesuffix(".pt")
    return sorted(glob.glob(f"{glob.escape(stem)}_{'[0-9]' * 8}.pt"), reverse=True)


def latest_checkpoint(path, stage, print0=print):
    """The newest that can be read, and its step if it is the one at path; (None, None) if there is none."""
    there = [p for p in (path, *older_checkpoints(path)) if os.path.exists(p)]
    for candidate, before in zip(there, [*there[1:], None]):
        try:
            checkpoint = load_checkpoint(candidate, stage)
            return checkpoint, checkpoint["progress"]["step"] if candidate == path else None
        except ValueError as e:
            if not before:
                raise
            print0(f"warning: {e}; going back to {before}")
    return None, None


def load_checkpoint(path, stage):
    """What save_checkpoint wrote for this stage. ValueError where it is missing, damaged, or not that."""
    if not os.path.exists(path):
        raise ValueError(f"there is no checkpoint {path}: `train.py --stage {stage}` makes it")
    return check_stage(safe_load(path), path, stage)


def check_stage(checkpoint, path, *stages):
    if not {"stage", "progress"} <= set(checkpoint):
        raise ValueError(f"{path} is not a checkpoint of this project, or of an older version: train it anew")
    if checkpoint["stage"] not in stages:
        raise ValueError(f"{path} is a checkpoint of {checkpoint['stage']}, not of {' or '.join(stages)}")
    return checkpoint


def build_model(cls, config_cls, checkpoint, path):
    """A model as a checkpoint describes it, in eval mode on the CPU. ValueError where it is another's."""
    try:
        model = cls(config_cls(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    except (AttributeError, KeyError, RuntimeError, TypeError) as e:  # other names, shapes or things
        why = " ".join(str(e).split())[:200]
        raise ValueError(f"{path} does not hold the weights of this {cls.__name__} ({why})") from None
    return model.eval()


def load_augvae(path):
    """The AugVAE of one of our checkpoints or a released one, in eval mode on the CPU; else ValueError."""
    checkpoint = safe_load(path)
    if "state_dict" in checkpoint:  # Lightning's name
        return from_lightning(AugVAE, checkpoint, path)
    return build_model(AugVAE, AugVAEConfig, check_stage(checkpoint, path, *STAGES[:2]), path)


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
        torch.set_flush_denormal(True)  # or the tiny gradients of sure tokens make a step an eighth slower
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if works(try_step, "mps") else "cpu"
        if device == "cuda":  # set_device wants an index
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        try:
            self.device = torch.device(device)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as e:
            raise ValueError(f"--device {device!r} cannot be used here ({str(e).splitlines()[0]})") from None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32; the codebook's search asks for more by itself
        if self.world > 1 and not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))  # rank 0 tokenises alone
        self.dtype = getattr(torch, best_dtype(self.device, wide) if dtype == "auto" else dtype)
        if dtype == "float16" and self.device.type != "cuda" or not works(self.autocast):
            raise ValueError(f"--dtype {dtype} cannot be used on {self.device}: float16 needs a CUDA device, "
                             "and bfloat16 a CUDA device or a CPU")

    def autocast(self):
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def to_device(self, batch):
        return [x.to(self.device, non_blocking=True) for x in batch]

    def all_reduce(self, tensor):
        """Add a tensor up over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self):
        """Wait for all ranks to have come this far. NCCL's sum only enqueues; looking at it waits."""
        self.all_reduce(torch.zeros(1, device=self.device)).item()

    def print0(self, *text):
        if self.rank == 0:
            print(*text, flush=True)

    def generators(self):
        return {self.device.type: getattr(torch, self.device.type), "cpu": torch.random}

    def random_states(self):
        """The generators' states on every rank, as a list."""
        states = [{name: module.get_rng_state() for name, module in self.generators().items()}] * self.world
        if self.world > 1:
            dist.all_gather_object(states, states[self.rank])
        return states

    def restore_random_state(self, states):
        """Go on with this rank's own; a rank that the saved run did not have keeps what its seed gave it."""
        own = states[self.rank] if self.rank < len(states) else {}
        for name, module in self.generators().items():
            if name in own:
                module.set_rng_state(own[name])

    def timeit(self, function):
        """Seconds that a call takes, with what it leaves the device to do."""
        self.synchronize()
        began = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - began

    def synchronize(self):
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def peak_gb(self):
        """Most memory held so far, GB of 2^30 bytes: of tensors on CUDA, else of the process; no Windows."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2 ** 30
        with contextlib.suppress(ImportError):
            import resource
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, else KB
            return peak / 2 ** (30 if sys.platform == "darwin" else 20)
        return math.nan

    def device_name(self):
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type


def works(trial, *args):
    """Whether something works here, found out by doing it: devices and builds differ in what they lack."""
    try:
        trial(*args)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AssertionError):
        return False
    return True


def try_step(device):
    block = ResBlock(2, 2, AugVAEConfig(n_groups=1)).to(device)
    block(torch.ones(1, 2, 4, 4, device=device)).sum().backward()


def step_fused(device):
    p = torch.ones(1, device=device, requires_grad=True)
    p.grad = torch.ones_like(p)
    torch.optim.AdamW([p], fused=True).step()


def best_dtype(device, wide):
    """The fastest that the device computes in by itself; wide: the model gains more than casts cost a CPU."""
    if device.type == "cuda":
        try:
            in_hardware = torch.cuda.is_bf16_supported(including_emulation=False)
        except TypeError:  # before torch 2.6, which counts no emulation
            in_hardware = torch.cuda.is_bf16_supported()
        return "bfloat16" if in_hardware else "float16"
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        if wide and "amx_bf16" in f.read():
            return "bfloat16"
    return "float32"


# -----------------------------------------------------------------------------
# Optimizer, and what spreads or saves memory

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
    counts = [sum(p.numel() for p in group["params"]) for group in groups]
    context.print0("{:,} parameters with orthogonal steps, {:,} others with weight decay, "
                   "{:,} without".format(*counts))
    fused = works(step_fused, context.device)  # on CPUs from torch 2.4 on
    return Muon(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=fused or None)


def load_optimizer(optimizer, state):
    """
    Restore a saved state dict; of a sharded parameter, this rank's part. Learning rate, weight decay, betas
    and whether it is fused stay as set now. ValueError where it is that of another optimizer.
    """
    groups = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in groups] != [group["params"] for group in state["param_groups"]]:
        raise ValueError("--optimizer is another than the one that the run was saved with: keep that")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state["state"].items():
        p = params[i]
        if hasattr(p, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor
            for key, value in values.items():
                if value.shape == p.shape:
                    values[key] = distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def full_state_dict(tree, rank):
    """All ranks together, tensor by tensor: what is sharded becomes whole, and all is on rank 0's CPU."""
    if isinstance(tree, dict):
        return {key: full_state_dict(value, rank) for key, value in tree.items()}
    if isinstance(tree, list):
        return [full_state_dict(value, rank) for value in tree]
    if isinstance(tree, torch.Tensor):
        whole = tree.full_tensor() if hasattr(tree, "full_tensor") else tree
        return whole.cpu() if rank == 0 else None
    return tree


def shard(model):
    """Spread a BiART over all ranks, block by block. Raises ValueError where torch has no fully_shard."""
    try:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    except ImportError:
        raise ValueError(f"--shard needs torch 2.6 or newer, this is {torch.__version__}") from None
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    register_fsdp_forward_method(model, "generate")


def checkpoint_activations(model):
    """Blocks keep inputs alone and run again in the backward pass: less memory for a third more time."""
    for module in model.modules():
        if isinstance(module, (Block, ResBlock)):
            module.forward = functools.partial(run_again, module.forward)


def run_again(forward, *args, **kwargs):
    if not torch.is_grad_enabled():  # checkpoint() looks at the generator: no CUDA graph allows it
        return forward(*args, **kwargs)
    return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, **kwargs)


# -----------------------------------------------------------------------------
# The log

class Log:
    """{stem}.csv, a row a logged step; {stem}_loss.png, drawn from it; and a line on the screen. Rank 0's."""

    def __init__(self, stem, objective, progress, schedule, context):
        self.stem, self.stage, self.last = stem, os.path.basename(stem), schedule.max_iters
        self.start, self.began, self.busy = progress.step, time.time(), 0.0  # busy: seconds in steps
        self.context, self.rows = context, progress.rows
        self.progress_line = data.ProgressLine(self.stage, self.last, self.start)
        self.columns = ["step", "loss", "val_loss", "lr", "images_per_s", "loss_max", "grad_norm", "skipped",
                        *objective.parts, *["heldout_t2i", "heldout_i2t"] * bool(objective.heldout)]
        self.rows[:] = [row for row in self.rows if row["step"] < self.start]  # the last comes again
        if context.rank == 0:
            with data.atomic_write(f"{stem}.csv", part=f"{stem}.csv.part") as f:
                f.write("".join([",".join(self.columns) + "\n", *map(self.line, self.rows)]).encode())

    def show(self, step):
        """How far it is, between the lines of the log: on a terminal alone, where that is overwritten."""
        if self.progress_line.terminal and step < self.last:
            self.progress_line.show(step)

    def line(self, row):
        values = [row.get(name) for name in self.columns]
        return ",".join("" if x is None else f"{x:.6g}" if x % 1 else f"{x:.0f}" for x in values) + "\n"

    def write(self, p, lr, draw=False):
        """A Progress: its loss is that of the step itself, loss_max the highest since the row before."""
        rates = "".join(f" {name} {rate:.0%}" for name, rate in p.rates.items())
        rates = rates and f" | heldout{rates}"
        if p.step == 0:
            return self.context.print0(f"{self.stage} 0/{self.last} val {p.val_loss:.4f}{rates}")
        done = p.step - self.start
        speed = done * p.samples_per_step / self.busy if self.busy else 0.0
        eta = int((time.time() - self.began) / max(1, done) * (self.last - p.step))
        found = {**vars(p), **p.parts, "lr": lr, "images_per_s": speed,
                 **{f"heldout_{name}": rate for name, rate in p.rates.items()}}
        self.rows.append({name: found[name] for name in self.columns if name in found})
        p.loss_max = 0.0
        if self.context.rank:
            return
        with open(f"{self.stem}.csv", "a", newline="") as f:
            f.write(self.line(self.rows[-1]))
        print(f"{self.stage} {p.step}/{self.last} loss {p.loss:.4f} "
              + " ".join(f"{name} {value:.4g}" for name, value in p.parts.items())
              + (f" | skipped {p.skipped}" if p.skipped else "")
              + (f" | val {p.val_loss:.4f}{rates}" if p.val_loss is not None else "")
              + f" | lr {lr:.1e} | {speed:.0f} images/s | ETA {eta // 60}:{eta % 60:02d}", flush=True)
        if draw:
            self.draw()

    def draw(self, width=640, height=360, margin=50, scale=3):
        """
        Training loss (grey) and validation loss (red), logarithmic, and exact rates on things never seen, 0
        at the bottom and 100 % at the top; drawn larger and reduced.
        """
        curves = [(name, colour, [(row["step"], math.log10(row[name])) for row in self.rows
                                  if row[name] is not None and 0 < row[name] < math.inf])
                  for name, colour in (("loss", (150, 150, 160)), ("val_loss", (214, 48, 49)))]
        points = [point for _, _, curve in curves for point in curve]
        if not points:
            return
        right, low, high = max(x for x, _ in points), min(y for _, y in points), max(y for _, y in points)
        image = Image.new("RGB", (width * scale, height * scale), "white")
        draw, font = ImageDraw.Draw(image), data.font(13 * scale)

        def at(x, y, dx=0, dy=0):  # a step and a logarithm -> pixels, with an offset
            y = (y - low) / max(high - low, 1e-3)
            return ((margin + x / right * (width - 1.5 * margin) + dx) * scale,
                    (height - margin - y * (height - 1.6 * margin) + dy) * scale)

        for i in range(5):
            x, y = round(right * i / 4), low + (high - low) * i / 4
            draw.line([at(0, y), at(right, y)], fill=(225, 225, 225), width=scale)
            draw.text(at(0, y, 2 - margin, -8), f"{10 ** y:.3g}", fill="black", font=font)
            draw.text(at(x, low, -10, 6), str(x), fill="black", font=font)
        for i, (name, colour, curve) in enumerate(curves):
            draw.line([at(x, y) for x, y in curve], fill=colour, width=2 * scale)
            draw.text(((margin + 10 + 90 * i) * scale, 4 * scale), name, fill=colour, font=font)
        for name, colour in (("heldout_t2i", (41, 98, 216)), ("heldout_i2t", (39, 174, 96))):
            curve = [(row["step"], low + (high - low) * row[name]) for row in self.rows if name in row]
            if curve:
                draw.line([at(x, y) for x, y in curve], fill=colour, width=2 * scale)
                draw.text(at(*curve[-1], -75, -18), name, fill=colour, font=font)
                draw.text(at(right, high, -30, -18), "100 %", fill="black", font=font)
        draw.text(((width - 2 * margin) * scale, 4 * scale), self.stage, fill="black", font=font)
        image.reduce(scale).save(f"{self.stem}_loss.png")


# -----------------------------------------------------------------------------
# Measurements

# What --bench measures; every function returns "median_s" of a step, "size", and what else it found. Sizes
# are the released ones, or fixed ones to compare by, unless given on the command line; presets have no say.

def timed(step, context, unit, units, rounds=3):
    """Seconds that step() takes, after a call for warm-up, and its share of the fastest the device can do."""
    with FlopCounterMode(display=False) as counter:
        step()
    seconds = [context.timeit(step) for _ in range(rounds)]
    median, n = statistics.median(seconds), 8192 if context.device.type == "cuda" else 2048
    a = torch.randn(n, n, device=context.device, dtype=context.dtype)
    peak = 2 * n ** 3 / min(context.timeit(lambda: a @ a) for _ in range(10))  # of one large product
    flops = counter.get_total_flops()
    return {"median_s": median, "min_s": min(seconds), "max_s": max(seconds), f"{unit}_per_s": units / median,
            "gflop_in_products": flops / 1e9, "share_of_peak": flops / median / peak}


def objective_and_batch(settings):
    """What a stage trains, and a batch of noise for it, without a run that came before."""
    config, B = settings.train, settings.train.batch_size
    if settings.stage == "biart":
        c = replace(settings.biart, text_vocab=config.vocab_size, image_side=config.token_grid,
                    image_vocab=settings.augvae.codebook_size)
        text, image = (torch.randint(0, c.vocab(name), (B, c.length(name))) for name in ("text", "image"))
        return BiARTObjective(BiART(c), None, None), [text, image, torch.zeros(B, dtype=torch.bool)]
    vae, side = AugVAE(settings.augvae), settings.augvae.image_size
    if settings.stage == "augvae_sl":
        vae = vae.single_level(config.token_grid)
    return AugVAEObjective(vae, config), [torch.rand(B, 3, side, side) * 2 - 1]


def bench_training(stage, given, context, **defaults):
    """A step of training as train() does it, on the same 2 samples again and again."""
    values = {"batch_size": 2, **defaults, **given}
    settings = Settings(stage, given, *(from_values(cls, values) for cls in CONFIGS))
    config, (objective, batch) = settings.train, objective_and_batch(settings)
    trainer = Trainer(objective, settings, context)
    micro_batches = [context.to_device(batch)] * config.gradient_accumulation_steps
    found = timed(lambda: trainer.step(micro_batches, config.learning_rate, Progress()),
                  context, "images", config.batch_size * config.gradient_accumulation_steps)
    return {**found, "size": [list(x.shape) for x in batch]}


def bench_codebook(given, context):
    """32,768 vectors of 256 against 8192 codes: forward, backward and the codebook's own step."""
    config, sizes = from_values(TrainConfig, {"batch_size": 8, **given}), from_values(AugVAEConfig, given)
    codebook = Codebook(sizes).to(context.device)
    z = torch.randn(config.batch_size, sizes.codebook_dim, 64, 64, device=context.device, requires_grad=True)

    def step():
        z_q, codes, loss = codebook(z)
        (z_q.sum() + loss).backward()
        codebook.collect(z, codes)
        codebook.update()

    n = len(z) * 64 * 64
    return {**timed(step, context, "vectors", n), "size": [n, sizes.codebook_dim, sizes.codebook_size]}


def photograph(width, height):
    """Smooth colours and the grain of a camera, which as JPEG of quality 90 take 1.5 to 2 bits a pixel."""
    smooth = Image.effect_noise((width // 100, height // 100), 300).resize((width, height), Image.BICUBIC)
    turned = (smooth.transpose(way) for way in (Image.ROTATE_180, Image.FLIP_LEFT_RIGHT))
    grain = Image.effect_noise((width, height), 40).convert("RGB")
    return Image.blend(Image.merge("RGB", (smooth, *turned)), grain, 0.1)


def rate(read, n):
    """Calls of read(0) to read(n - 1) in a second of this core's time."""
    rounds, seconds = timeit.Timer(lambda: [read(i) for i in range(n)], timer=time.process_time).autorange()
    return rounds * n / seconds


def bench_data(_given, _context, size=256, rounds=7,
               sources=((500, 375, 32), (2048, 1536, 8), (4032, 3024, 2))):
    """Images/s of one core, JPEG file to random crop, here and by torchvision in turns; medians of rounds."""
    from torchvision import datasets, transforms  # which nothing else here needs
    usual = transforms.Compose([transforms.RandomResizedCrop(size), transforms.ToTensor()])
    threads, rng, medians = torch.get_num_threads(), random.Random(0), {}
    torch.set_num_threads(1)
    for width, height, n in sources:
        with tempfile.TemporaryDirectory() as folder:
            os.mkdir(os.path.join(folder, "class"))
            for i in range(n):
                photograph(width, height).save(os.path.join(folder, "class", f"{i}.jpg"), quality=90)
            ours = functools.partial(data.Pixels(data.read_folder(folder), size, 0.75).item, rng=rng)
            theirs = datasets.ImageFolder(folder, usual).__getitem__
            rates = [(rate(ours, n), rate(theirs, n)) for _ in range(rounds)]
        a, b = (statistics.median(column) for column in zip(*rates))
        medians[f"{width}x{height}"] = {"ours": a, "torchvision": b}
    torch.set_num_threads(threads)
    return {"median_s": 1 / next(iter(medians.values()))["ours"], "size": size, "images_s": medians}


# Does it fit? What a GPU would hold in a step of training, counted over fake tensors: shapes without numbers

def places(indices):
    """Indices as they are, but for a mask as many as it may hold."""
    return [i.new_empty(i.numel() // 2, dtype=torch.long) if i is not None and i.dtype is torch.bool else i
            for i in indices]


class TensorBytes(TorchDispatchMode):
    """Bytes of all tensors there are, and the most there were; where values are looked at, made-up ones."""
    made_up = {
        aten._local_scalar_dense.default: lambda x: 1.0 if x.is_floating_point() else 1,
        aten.nonzero.default: lambda x: x.new_empty(x.numel() // 2, x.dim(), dtype=torch.long),
        aten.bincount.default: lambda x, weights=None, minlength=0: x.new_empty(minlength),
        aten.rand.generator: lambda size, generator, **given: torch.empty(size, **given),  # for old torch
        aten.index.Tensor: lambda x, at: aten.index(x, places(at)),
        aten.index_put_.default: lambda x, at, *rest: aten.index_put_(x, places(at), *rest)}

    def __init__(self):
        super().__init__()
        self.now, self.most, self.storages = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = self.made_up.get(func, func)(*args, **kwargs or {})
        for x in tree_flatten(out)[0]:
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.storages:
                self.storages.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return out

    def forget(self, key, nbytes):
        self.storages.discard(key)
        self.now -= nbytes


def lpips_shapes(_path):
    """What LPIPS reads from its two files, by name."""
    from torchvision.models import vgg16
    layers = vgg16().features
    heads = {f"lin{i}.model.1.weight": torch.empty(1, layers[tap - 1].out_channels, 1, 1)
             for i, tap in enumerate(LPIPS.taps)}
    return {**{f"features.{name}": x for name, x in layers.state_dict().items()}, **heads}


def count_memory(settings):
    """
    GB of 2^30 bytes that a step of training holds on a GPU: {"weights": LPIPS's among them, "gradients",
    "optimizer", "activations": kept for the backward pass, "peak"}. Attention is taken to be fused. Not
    counted are convolutions' workspaces, gaps between tensors and CUDA itself.
    """
    from unittest import mock  # takes 50 ms, and nothing else needs it
    config, after = settings.train, {}
    context = Context("cpu", "float32", wide=True)
    context.dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16  # float16 is as large
    context.print0 = lambda *_: None
    no_files = mock.patch.multiple(augvae, find_weights=lambda *_: "", safe_load=lpips_shapes)
    with no_files, torch.device("meta"):
        objective, batch = objective_and_batch(settings)
    as_on_cuda = mock.patch.multiple(torch.Tensor, is_cuda=True, tolist=lambda x: [1.0] * len(x))
    with as_on_cuda, FakeTensorMode(allow_non_fake_inputs=True), TensorBytes() as tensors:
        objective.to_empty(device="cpu")
        objective.to = lambda _: objective  # it is where it should be
        weights, batch = tensors.now, [torch.empty_like(x, device="cpu") for x in batch]
        trainer = Trainer(objective, settings, context)
        for p in objective.model.parameters():
            p.grad = torch.empty_like(p)
        trainer.optimizer.step()  # now its state is there, as in all steps but the first
        trainer.optimizer.zero_grad()
        objective.register_forward_hook(lambda *_: after.update(forward=tensors.now))
        trainer.optimizer.register_step_pre_hook(  # Muon's calls AdamW's, and this again
            lambda *_: after.update({"backward": tensors.now, **after}))
        micro_batches, tensors.most = [batch] * min(2, config.gradient_accumulation_steps), 0
        trainer.step(micro_batches, 0.0, Progress())
        gradients = after["backward"] - tensors.now
        held = {"weights": weights, "gradients": gradients, "optimizer": tensors.now - weights,
                "activations": after["forward"] - tensors.now - gradients * (len(micro_batches) - 1),
                "peak": tensors.most}
    return {name: n / 2 ** 30 for name, n in held.items()}


def bench_stage_memory(stage, given, cards=(16, 32, 40, 80)):
    """What a GPU would hold, and the largest --batch_size for cards of some GB; CUDA itself takes one."""
    @functools.lru_cache(None)
    def count(batch_size):
        classes = configure({**given, "batch_size": batch_size}, stage, *CONFIGS)
        held = count_memory(Settings(stage, given, *classes))
        return {**held, "with DDP": held["peak"] + held["gradients"]}  # its buckets are another copy of them

    config = configure(given, stage, TrainConfig)[0]
    B, multiple, largest = config.batch_size, 2 if stage == "biart" else 1, {}
    held, slope = count(B), (count(2 * B)["with DDP"] - count(B)["with DDP"]) / B
    for gb in cards:  # foretold by a line through two points, then counted
        n = int(B + (gb - 1 - held["with DDP"]) / slope) // multiple * multiple
        while n > 0 and count(n)["with DDP"] > gb - 1:
            n -= multiple
        largest[gb] = max(n, 0)
    how = "float32" if config.dtype == "float32" else "16 bits"
    how += ", --checkpoint_activations" * config.checkpoint_activations
    parts = ", ".join(f"{name} {gb:.2f}" for name, gb in held.items())
    print(f"{stage}, {how}, --batch_size {B}: {parts} GB, {slope:.2f} an image\n  largest --batch_size: "
          + ", ".join(f"{n} on {gb} GB" for gb, n in largest.items()), flush=True)
    return {**held, "batch_size": B, "per_image": slope, "largest": largest}


def bench_memory(given, config):
    """Does it fit? Needs neither a GPU nor its memory."""
    if config.shard or config.compile:
        raise ValueError("--bench memory counts neither --shard nor --compile")
    with FakeTensorMode(), TensorBytes() as tensors:
        torch.empty(1)
    if tensors.now:
        raise ValueError(f"--bench memory needs a newer torch than {torch.__version__}, which does not tell "
                         "when a tensor's memory is free again")
    return {stage: bench_stage_memory(stage, given)
            for stage in (STAGES if config.stage == "all" else (config.stage,))}


BENCHES = {"augvae": functools.partial(bench_training, "augvae_ml"), "codebook": bench_codebook,
           "biart": functools.partial(bench_training, "biart", n_layer=12, n_head=8, n_embd=512,
                                      vocab_size=49408), "data": bench_data}


def run_bench(given, config):
    if config.bench not in (*BENCHES, "memory"):
        raise ValueError(f"--bench {config.bench!r} is none of: {', '.join(BENCHES)}, memory")
    if config.bench == "memory":
        measured = bench_memory(given, config)
        return print(json.dumps(measured)) if config.json else None
    context = Context(config.device, config.dtype, wide=True)
    before = context.peak_gb()
    measured = BENCHES[config.bench](given, context)
    measured.update(peak_gb=context.peak_gb() - before,  # more than before at most
                    device=context.device_name(), dtype=str(context.dtype)[6:])
    for name, value in measured.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    if config.json:
        print(json.dumps(measured))


# -----------------------------------------------------------------------------

def main(argv):
    seen = vars(Parser(CONFIGS, {}, add_help=False).parse_known_args(argv)[0])
    defaults = preset_values(seen, seen.get("stage"))  # which --help shows
    given = Parser(CONFIGS, defaults, description=__doc__).settings(argv)
    if given.get("resume"):  # as the run was started, but for what is given now
        given = {**settings_of_run(given.get("out_dir", TrainConfig.out_dir)), **given}
    stage = given.get("stage", TrainConfig.stage)
    config, data_config = configure(given, stage, TrainConfig, DataConfig)
    stages = STAGES if stage == "all" else (stage,)
    if config.bench:
        return run_bench(given, config)
    if "biart" in stages and data_config.data in data.UNCAPTIONED:
        raise ValueError(f"--data {data_config.data} has no captions, which --stage biart needs: "
                         "train --stage augvae_ml, then augvae_sl")
    if config.compile and not hasattr(torch.compiler, "is_compiling"):
        raise ValueError(f"--compile needs torch 2.3 or newer, this is {torch.__version__}")
    if config.epochs and "max_iters" in given:
        raise ValueError(f"--epochs {config.epochs} and --max_iters {config.max_iters} contradict: give one")
    for path in (os.path.join(config.out_dir, f"{name}.pt") for name in stages):
        if os.path.exists(path) and not (config.resume or config.overwrite):
            raise ValueError(f"{path} exists: --resume goes on with it, --overwrite starts anew, "
                             "and another --out_dir keeps both")
    for name in stages:
        train(Settings(name, given, *configure(given, name, *CONFIGS)))
        given = {**given, "init_from": ""}  # the next stage begins with what this one left


def settings_of_run(out_dir):
    """What was given on the command line of the run in out_dir, by the stage that was at work last."""
    files = [path for stage in STAGES for path in glob.glob(f"{glob.escape(out_dir)}/{stage}*.pt")]
    if not files:
        raise ValueError(f"--resume finds no checkpoint of {', '.join(STAGES)} in {out_dir}")
    newest = os.path.basename(max(files, key=os.path.getmtime))
    stage = next(stage for stage in STAGES if newest.startswith(stage))
    saved, _ = latest_checkpoint(os.path.join(out_dir, f"{stage}.pt"), stage, print0=lambda _: None)
    if "optimizer" not in saved:
        raise ValueError(f"{newest} in {out_dir} holds weights alone: there is nothing to resume")
    return {key: value for key, value in saved["settings"].items()
            if key not in ("resume", "overwrite", "out_dir")}


if __name__ == "__main__":
    status, text = 0, ""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        status, text = 1, error
    except Stopped as stopped:
        text, status = stopped.args
    except KeyboardInterrupt:
        status, text = 1, "interrupted before training began; nothing was overwritten"
    if status:
        rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"train.py: {rank}{text}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        # Not by sys.exit: gloo's thread may still hold tensors that it summed, and letting go of them while
        # Python winds up aborts the process. Nor by destroy_process_group, which waits for that thread while
        # the thread waits for Python (torch 2.1).
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
