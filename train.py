"""
Train AugVAE-ML, AugVAE-SL and BiART, one after the other or each alone, with one loop.

On a laptop, all three stages on the built-in scenes (15 to 30 minutes on 2 CPU cores):
$ python train.py

On 8 GPUs, one stage, on ImageNet (data.py lists the other layouts):
$ torchrun --nproc_per_node=8 train.py --stage augvae_ml --preset released --workers 2 --batch_size 4 \\
      --epochs 2 --train_dir /path/to/imagenet/train --val_dir /path/to/imagenet/val

A run is a folder, --out_dir: {stage}.pt (last checkpoint), {stage}_best.pt (lowest validation loss),
{stage}.csv (log), {stage}_{step}.png (pictures), tokenizer.json, tokens/, prompts.txt (examples).
"""
import argparse
import contextlib
import datetime
import functools
import inspect
import math
import os
import random
import re
import shutil
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from math import inf
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.flop_counter import FlopCounterMode

import data
from augvae import LPIPS, AugVAE, AugVAEConfig, Codebook, ResBlock, fingerprint, read_checkpoint
from biart import BiART, BiARTConfig, Block, Sampling
from data import DataConfig
from tokenizer import Tokenizer

STAGES = ("augvae_ml", "augvae_sl", "biart")
LOSSES = {"l2": F.mse_loss, "l1": F.l1_loss}  # between an image and its reconstruction
GUIDANCE = {"image": 4.0, "text": 1.5}  # of generated samples. Captions suffer if it is strong

@dataclass
class TrainConfig:
    # The run
    stage: str = "all"  # augvae_ml, augvae_sl, biart, or all of them in this order
    preset: str = "tiny"  # tiny (40 px, CPU), small (48 px, CPU) or released (256 px)
    out_dir: str = "out"  # folder of the run
    resume: bool = False  # continue the run in out_dir
    overwrite: bool = False  # start anew over the run in out_dir
    init_from: str = ""  # AugVAE to start from: a checkpoint of ours or a released one
    seed: int = 1337  # of initial weights, order and crops
    # How long, and how fast it learns
    max_iters: int = 100000  # optimizer steps of a stage
    epochs: float = 0.0  # passes over the training data, instead of max_iters
    batch_size: int = 8  # images per rank and micro-step
    gradient_accumulation_steps: int = 1  # micro-steps to an optimizer step
    learning_rate: float = 1e-4  # after warm-up
    warmup_iters: int = 100  # steps of linear warm-up
    optimizer: str = "adamw"  # adamw, or muon: Muon for the matrices of layers, AdamW for the rest
    weight_decay: float = 1e-5  # of weights with two or more dimensions
    beta2: float = 0.999  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0 does not clip
    # AugVAE
    loss: str = "l2"  # between an image and its reconstruction: l2 or l1
    lpips_weight: float = 0.0  # of the perceptual loss LPIPS; 0 does without it
    token_grid: int = 32  # side of the grid that AugVAE-SL keeps and BiART models
    # BiART
    init_biart: str = ""  # fine-tune: the run whose BiART, AugVAE and tokenizer to begin with
    vocab_size: int = 8192  # largest text vocabulary to train
    tokenizer: str = ""  # use this vocabulary instead: tokenizer.json, or CLIP's .txt.gz
    # Validation and log
    eval_interval: int = 1000  # steps between validation, pictures and checkpoint
    eval_images: int = 256  # validation images, spread over the validation set
    log_interval: int = 10  # steps between log lines
    # Where and how to compute
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: cuda if there is one, else cpu
    dtype: str = "auto"  # float32, bfloat16 or float16 autocast; auto: the fastest on CUDA, float32 on a CPU
    compile: bool = False  # torch.compile the model
    checkpoint_activations: bool = False  # recompute blocks in the backward pass: saves memory, takes time
    bench: bool = False  # time a step of a stage on random data instead of training

    limits = {"seed": (0, 2 ** 31), "epochs": (0, 1e6), "batch_size": (1, inf), "beta2": (0, 0.9999),
              "gradient_accumulation_steps": (1, inf), "token_grid": (1, inf), "vocab_size": (258, 65536),
              "eval_interval": (1, inf), "eval_images": (1, inf), "log_interval": (1, inf)}  # others: from 0
    choices = {"stage": (*STAGES, "all"), "preset": ("tiny", "small", "released"),
               "optimizer": ("adamw", "muon"), "loss": tuple(LOSSES),
               "dtype": ("auto", "float32", "bfloat16", "float16")}

# What a preset sets: under "" for every stage, then for one stage. The command line wins over both.
ON_CPU = {"hidden": 16, "n_res_blocks": 1, "n_groups": 1, "z_channels": 64, "n_layer": 4, "crop_scale": 1.0,
          "optimizer": "muon", "beta2": 0.99, "eval_interval": 500}
AUGVAE_ON_CPU = {"batch_size": 8, "learning_rate": 2e-3, "warmup_iters": 20}
BIART_ON_CPU = {"batch_size": 32, "learning_rate": 3e-3, "warmup_iters": 100, "weight_decay": 0.1,
                "code_hidden": 64, "t2i_weight": 5.0, "replace_prob": 0.1}
PRESETS = {
    "tiny": {
        "": {**ON_CPU, "image_size": 40, "levels": (10, 5), "ch_mult": (1, 2, 4), "codebook_size": 512,
             "codebook_dim": 8, "token_grid": 10, "n_head": 4, "n_embd": 128, "n_text": 16,
             "vocab_size": 512, "n_scenes": 16384},
        "augvae_ml": {**AUGVAE_ON_CPU, "max_iters": 300, "rate": 0.003, "vq_start": 100},
        "augvae_sl": {**AUGVAE_ON_CPU, "max_iters": 1400, "rate": 0.005, "log_interval": 100},
        "biart": {**BIART_ON_CPU, "max_iters": 2800, "log_interval": 50}},
    "small": {
        "": {**ON_CPU, "image_size": 48, "levels": (6, 3), "ch_mult": (1, 2, 4, 4), "codebook_size": 1024,
             "codebook_dim": 16, "token_grid": 6, "n_head": 8, "n_embd": 256, "n_text": 20,
             "vocab_size": 2048, "rate": 0.001},
        "augvae_ml": {**AUGVAE_ON_CPU, "max_iters": 200, "vq_start": 80},
        "augvae_sl": {**AUGVAE_ON_CPU, "max_iters": 2200, "log_interval": 100},
        "biart": {**BIART_ON_CPU, "batch_size": 64, "max_iters": 3000, "log_interval": 50}},
    "released": {
        "": {"vocab_size": 49408, "warmup_iters": 2000, "lpips_weight": 0.1},
        "augvae_ml": {"data": "imagenet", "batch_size": 4, "max_iters": 300000},
        "augvae_sl": {"data": "imagenet", "batch_size": 8, "max_iters": 100000},
        "biart": {"data": "coco", "batch_size": 16, "max_iters": 100000, "learning_rate": 3e-4,
                  "weight_decay": 0.1, "beta2": 0.95}},
}

# -----------------------------------------------------------------------------
# The loop

@dataclass
class Progress:
    """How far a stage has come; part of a checkpoint."""
    step: int = 0  # optimizer steps taken, skipped ones included
    max_iters: int = 0  # optimizer steps to take
    samples: int = 0  # training samples seen by all ranks
    samples_per_step: int = 0
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    val_loss: float = None  # at this step; None: not computed yet
    best_val_loss: float = inf
    rows: list = field(default_factory=list)  # of the log

    def count(self, finite):
        """Count a step, taken or skipped. ValueError after 20 skipped steps in a row."""
        self.step += 1
        self.samples += self.samples_per_step
        self.val_loss = None
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == 20:
            raise ValueError(f"20 steps in a row, up to step {self.step}, had no finite loss and gradient: "
                             "--resume with a lower --learning_rate or --grad_clip")

def train(settings):
    """Train one stage, from its beginning or its checkpoint (--resume) to its end."""
    config, context = settings.train, Context(settings.train.device, settings.train.dtype)
    objective, batches, val_batches, progress, saved = prepare(settings, context)
    optimizer, scaler = make_optimizer(objective.model, config, context, saved)
    network = wrap(objective, config, context)
    log = Log(settings, objective, val_batches[0], progress, context)
    last = {}  # what the log says of the last step
    saved_step, stopping = progress.step if saved else None, False
    n_micro_steps = config.gradient_accumulation_steps
    with Signals() as signals:
        while True:
            # Validate, log, save
            due = progress.step % config.eval_interval == 0 or progress.step >= progress.max_iters
            if due and progress.val_loss is None:
                last["val_loss"] = evaluate(objective, val_batches, progress, settings, context)
            if progress.step != saved_step and (due or progress.step % config.log_interval == 0):
                log.write(progress, last)
            if progress.step != saved_step and (due or stopping):
                save(settings, objective, optimizer, scaler, progress, context)
                saved_step = progress.step
            if stopping or progress.step >= progress.max_iters:
                break

            # Forward, backward. All randomness depends on seed, step and rank: a resumed run repeats it
            began = time.monotonic()
            torch.manual_seed((config.seed * 1_000_003 + progress.step) * context.world + context.rank)
            loss = 0.0
            for micro_step in range(n_micro_steps):
                # Under DDP, the last backward pass adds the gradients up over all ranks
                network.require_backward_grad_sync = micro_step == n_micro_steps - 1
                with context.autocast():
                    micro_loss, parts = network(*context.to_device(log.wait_for(batches)))
                scaler.scale(micro_loss / n_micro_steps).backward()
                loss += micro_loss.detach().float() / n_micro_steps

            # Clip and step. If loss or gradient is not finite, all ranks skip the step
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(objective.model.parameters(), config.grad_clip or inf)
            # One all-reduce, and one look at the device: mean loss, norm, whether any rank caught a signal
            numbers = torch.stack([loss, grad_norm, torch.full_like(loss, signals.number > 0)])
            loss, grad_norm, caught = context.all_reduce(numbers / context.world).tolist()
            stopping = caught > 0
            finite = math.isfinite(loss + grad_norm)
            lr = get_lr(progress.step, config, progress.max_iters)
            if finite:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            parts.update(objective.after_step(finite))  # AugVAE's codebook takes its own step
            last = {"loss": loss, "grad_norm": grad_norm, "lr": lr, **parts}  # parts: of the last micro-step
            progress.count(finite)
            log.seconds += time.monotonic() - began
    if stopping or signals.number:
        data.print0(f"{settings.stage} stopped at step {progress.step} and saved {settings.path('.pt')}: "
                    "--resume continues there")
        raise SystemExit(128 + (signals.number or signal.SIGTERM))
    log.finish(progress)

@torch.no_grad()
def evaluate(objective, val_batches, progress, settings, context):
    """-> the mean validation loss over all ranks. Rank 0 draws {stage}_{step}.png."""
    objective.eval()
    total = torch.zeros(2, device=context.device)  # loss, samples
    with context.autocast():
        for batch in val_batches:
            loss, _ = objective(*context.to_device(batch))
            total[0] += loss.float() * len(batch[0])
            total[1] += len(batch[0])
        if context.rank == 0:
            picture = objective.picture(*context.to_device(val_batches[0]))
            picture.save(settings.path(f"_{progress.step:06d}.png"))
    objective.train()
    loss, n = context.all_reduce(total).tolist()
    progress.val_loss = loss / n
    progress.best_val_loss = min(progress.best_val_loss, progress.val_loss)
    return progress.val_loss

def get_lr(step, config, max_iters):
    """Linear warm-up, then a cosine from learning_rate down to a hundredth of it."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    share = (step - config.warmup_iters) / max(1, max_iters - config.warmup_iters)
    return config.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2)

class Signals:
    """SIGTERM and Ctrl-C in training: the first lets the loop finish its step and save, a second kills."""
    def __enter__(self):
        self.number, self.caught_at = 0, 0.0
        self.before = {n: signal.signal(n, self.catch) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def catch(self, number, _frame):
        if not self.number:
            self.number, self.caught_at = number, time.monotonic()
        elif time.monotonic() - self.caught_at > 1:  # sooner, it is the same Ctrl-C by way of torchrun
            os._exit(128 + number)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

# -----------------------------------------------------------------------------
# What the loop trains: a model with its loss

class AugVAEObjective(nn.Module):
    """Pixel loss + LPIPS, if asked for, + commitment. forward(images) -> loss, {part: value}."""
    columns = ("pixel", "lpips", "commit", "codebook_use", "perplexity")  # of the log

    def __init__(self, vae, config):
        super().__init__()
        self.model, self.pixel_loss, self.lpips_weight = vae, LOSSES[config.loss], config.lpips_weight
        self.lpips = LPIPS() if config.lpips_weight else None
        self.key = {"config": asdict(vae.config)}  # the same in a checkpoint and the run that resumes it

    def forward(self, images):
        images = images.contiguous(memory_format=torch.channels_last)
        reconstruction, commitment, _ = self.model(images, collect=self.training)
        reconstruction = reconstruction.float()
        pixel = self.pixel_loss(reconstruction, images)
        loss, parts = pixel + commitment, {"pixel": pixel.detach(), "commit": commitment.detach()}
        if self.lpips:
            lpips = self.lpips(reconstruction, images).mean()
            loss, parts["lpips"] = loss + self.lpips_weight * lpips, lpips.detach()
        return loss, parts

    def after_step(self, finite):
        """Move the codebook, or forget what it collected if the step was skipped."""
        if not finite:
            self.model.codebook.discard()
            return {}
        use, perplexity = self.model.codebook.update()
        return {"codebook_use": use, "perplexity": perplexity}

    def picture(self, images):
        """-> a sheet: images over their reconstructions."""
        images = images[:8]
        pairs = torch.cat([images, self.model.decode(self.model.encode(images))])
        return data.contact_sheet([data.to_image(x) for x in pairs], columns=len(images))

class BiARTObjective(nn.Module):
    """Cross-entropy in both directions. forward(text, image codes, null) -> loss, {part: value}."""
    columns = ("t2i", "i2t")

    def __init__(self, biart, vae, tokenizer, made_from):
        super().__init__()
        self.model, self.tokenizer = biart, tokenizer
        self.vae = [vae]  # in a list, because a submodule would be trained
        biart.use_cuda_graphs = False  # a refused capture can break the random numbers of training
        self.key = {**made_from, "config": asdict(biart.config)}

    def forward(self, text, image, null):
        return self.model(text, image, null if self.training else None)

    def after_step(self, finite):
        return {}

    def picture(self, text, image, null):
        """Paintings over their captions, then images over the captions that they are given."""
        text, image = text[:16:2], image[:16:2]  # every sample is there twice
        painted, _ = self.model.generate(text, "image", sampling=Sampling(guidance=GUIDANCE["image"]))
        ids, _ = self.model.generate(image, "text", sampling=Sampling(guidance=GUIDANCE["text"]))
        captions = [self.tokenizer.decode(row.tolist()) for row in torch.cat([text, ids])]
        side, [vae] = self.model.config.image_side, self.vae
        decoded = vae.decode([torch.cat([painted, image]).view(-1, side, side)])
        return data.contact_sheet([data.to_image(x) for x in decoded], captions, columns=len(text))

def prepare(settings, context):
    """-> objective, training batches, validation batches, progress, the checkpoint to resume or None."""
    config, bad_images, saved = settings.train, settings.path("_bad_images.log"), None
    if config.resume and os.path.exists(settings.path(".pt")):
        saved = read_checkpoint(settings.path(".pt"), settings.stage)
    os.makedirs(config.out_dir, exist_ok=True)
    if not saved and context.rank == 0 and os.path.exists(bad_images):
        os.remove(bad_images)
    context.barrier()
    train_set, val_set = (data.open_data(settings.data, split, bad_images, config.out_dir)
                          for split in ("train", "val"))
    if config.stage in ("biart", "all") and not (train_set.captioned and val_set.captioned):
        raise ValueError(f"--stage biart needs captions, and --data {settings.data.data} has none here")
    val_set = data.validation_subset(val_set, config.eval_images, bad_images)
    if min(len(train_set), len(val_set)) < context.world:
        raise ValueError(f"{min(len(train_set), len(val_set))} images are too few for {context.world} ranks")

    torch.manual_seed(config.seed)  # all ranks begin with the same weights
    resumed = saved is not None
    if settings.stage == "biart":
        objective, train_view, val_view = prepare_biart(settings, train_set, val_set, resumed, context)
    else:
        objective, train_view, val_view = prepare_augvae(settings, train_set, val_set, resumed)
    if saved:
        for key, value in objective.key.items():
            if saved[key] != value:
                raise ValueError(f"{settings.path('.pt')} has another {key}: {saved[key]}, not {value}")
        objective.model.load_state_dict(saved["model"])
    objective.to(context.device).train()

    progress = Progress(**saved["progress"]) if saved else Progress()
    progress.samples_per_step = context.world * config.batch_size * config.gradient_accumulation_steps
    progress.max_iters = config.max_iters
    if config.epochs:  # counted in samples: the number of ranks may have changed
        n_left = config.epochs * len(train_view) - progress.samples
        progress.max_iters = progress.step + max(0, math.ceil(n_left / progress.samples_per_step))
    n_parameters = sum(p.numel() for p in objective.model.parameters())
    data.print0(f"{settings.stage}: {n_parameters / 1e6:.2f} M parameters, {len(train_view):,} training "
                f"images, {progress.samples_per_step} a step, from step {progress.step}, on "
                f"{context.world} x {context.device}, {str(context.dtype)[6:]}")
    batches = data.batches(train_view, config.batch_size, seed=config.seed, start=progress.samples,
                           rank=context.rank, world=context.world,
                           workers=context.workers(settings.data.workers), log=bad_images)
    return objective, batches, validation_batches(val_view, settings, context), progress, saved

def validation_batches(view, settings, context):
    """This rank's validation batches, a list. BiART gets every sample twice, once for each direction."""
    items = []
    for i in range(context.rank, len(view), context.world):
        items += [view.item(i, random.Random(i)) for _ in range(2 if settings.stage == "biart" else 1)]
    size = settings.train.batch_size
    return [torch.utils.data.default_collate(items[i:i + size]) for i in range(0, len(items), size)]

def prepare_augvae(settings, train_set, val_set, resumed):
    """-> objective, training view, validation view."""
    config = settings.train
    if resumed:
        vae = read_augvae(settings, settings.stage)
    elif settings.stage == "augvae_sl" or config.init_from:
        vae = read_augvae(settings, "augvae_ml", config.init_from)
    else:
        vae = AugVAE(settings.augvae)
    if settings.stage == "augvae_ml" and vae.config.single_level:
        raise ValueError(f"{config.init_from} is an AugVAE-SL: --stage augvae_sl trains it")
    if config.stage == "all" and not vae.config.single_level and config.token_grid not in vae.config.levels:
        raise ValueError(f"--token_grid {config.token_grid} is none of --levels {vae.config.levels}")
    if settings.stage == "augvae_sl" and not vae.config.single_level:
        vae = vae.single_level(config.token_grid)
    train_view = data.Pixels(train_set, vae.config.image_size, settings.data.crop_scale)
    return AugVAEObjective(vae, config), train_view, data.Pixels(val_set, vae.config.image_size, 1.0)

def prepare_biart(settings, train_set, val_set, resumed, context):
    """As prepare_augvae. Encodes both data sets to tokens, unless that is done."""
    config = settings.train
    if config.init_biart and not resumed and context.rank == 0:  # copies make this run whole
        for name in ("augvae_sl.pt", "tokenizer.json"):
            with data.atomic_write(os.path.join(config.out_dir, name)) as f:
                f.write(data.read_bytes(os.path.join(config.init_biart, name)))
    context.barrier()
    vae = read_augvae(settings, "augvae_sl", config.init_from).to(context.device)
    if not vae.config.single_level:
        raise ValueError(f"{config.init_from} is an AugVAE-ML: --stage augvae_sl makes the AugVAE-SL of it")
    tokenizer = prepare_tokenizer(settings, train_set, context)
    biart_config = replace(
        settings.biart, text_vocab=len(tokenizer), end_token=tokenizer.end, pad_token=tokenizer.pad,
        image_vocab=vae.config.codebook_size, image_side=vae.config.single_level,
        code_dim=vae.config.codebook_dim)
    biart = BiART(biart_config)
    biart.set_code_vectors(vae.codebook.weight.cpu())
    made_from = {"augvae": fingerprint(vae), "tokenizer": tokenizer.fingerprint()}
    if config.init_biart and not resumed:
        path = os.path.join(config.init_biart, "biart.pt")
        start = read_checkpoint(path, "biart")
        if [start[key] for key in made_from] != list(made_from.values()):
            raise ValueError(f"{path} does not belong to the AugVAE and the tokenizer beside it")
        biart.load_state_dict(start["model"])

    @torch.no_grad()
    def encode(images):
        with context.autocast():
            return vae.encode(images.to(context.device))[0].flatten(1)

    def tokens(split, dataset, null_prob):
        source = data.TokenSource(
            dataset, tokenizer, biart_config.n_text, vae.config.image_size, made_from,
            settings.path("_bad_images.log"), context.workers(settings.data.workers))
        folder = os.path.join(config.out_dir, "tokens", split)
        data.cache_tokens(source, encode, folder, anew=config.overwrite and not resumed,
                          rank=context.rank, world=context.world, all_reduce=context.all_reduce)
        return data.Tokens(folder, null_prob)

    train_view = tokens("train", train_set, biart_config.null_prob)
    val_view = tokens("val", val_set, 0.0)
    path = os.path.join(config.out_dir, "prompts.txt")  # examples, for the page
    if context.rank == 0 and not (resumed and os.path.exists(path)):
        with data.atomic_write(path) as f:
            f.write("\n".join(val_set.captions(i)[0] for i in range(min(4, len(val_set)))).encode())
    return BiARTObjective(biart, vae, tokenizer, made_from), train_view, val_view

def read_augvae(settings, stage, path=""):
    """The AugVAE at a path, or that of a stage of this run. ValueError if it contradicts the command line."""
    path = path or os.path.join(settings.train.out_dir, f"{stage}.pt")
    if not os.path.exists(path):
        raise ValueError(f"no checkpoint {path}: --stage {stage} makes it")
    vae = AugVAE.load(path)
    vae.config.rate = settings.augvae.rate  # --rate need not be the checkpoint's
    found = {**asdict(vae.config), "token_grid": vae.config.single_level or settings.train.token_grid}
    for key, value in found.items():
        if settings.given.get(key, value) != value:
            raise ValueError(f"--{key} {settings.given[key]} contradicts {path}, which has {value}")
    return vae

def prepare_tokenizer(settings, train_set, context):
    """That of --tokenizer, that of the run (--resume), or a new one of all training captions."""
    config = settings.train
    path = os.path.join(config.out_dir, "tokenizer.json")
    begun = (config.resume or config.init_biart) and os.path.exists(path)
    if config.tokenizer or begun:
        tokenizer = Tokenizer.load(config.tokenizer or path)
    else:
        captions = data.all_captions(train_set, settings.path("_bad_images.log"))
        tokenizer = Tokenizer.train(captions, config.vocab_size)
        data.print0(f"tokenizer: {len(tokenizer)} tokens from {len(captions):,} captions")
    if begun and Tokenizer.load(path).fingerprint() != tokenizer.fingerprint():
        raise ValueError(f"--tokenizer {config.tokenizer} contradicts {path}, with which the run began")
    if context.rank == 0 and not begun:
        tokenizer.save(path)
    return tokenizer

# -----------------------------------------------------------------------------
# Checkpoints

def save(settings, objective, optimizer, scaler, progress, context):
    """{stage}.pt, and {stage}_best.pt if the validation loss is the lowest: all that --resume needs."""
    if context.rank == 0:
        content = {"stage": settings.stage, "settings": settings.given, **objective.key,
                   "model": objective.model.state_dict(), "optimizer": optimizer.state_dict(),
                   "scaler": scaler.state_dict(), "progress": asdict(progress)}
        if progress.val_loss == progress.best_val_loss:
            save_checkpoint(settings.path("_best.pt"), content)
            link(settings.path("_best.pt"), settings.path(".pt"))  # last: a killed run saves both again
        else:
            save_checkpoint(settings.path(".pt"), content)
    context.barrier()  # the next stage reads it, on all ranks

def save_checkpoint(path, content):
    """Write a dict of tensors and plain values. The old file stays until the new one is whole."""
    with data.atomic_write(path) as f:
        torch.save(content, f)

def link(source, path):
    """Give a file a second name, or copy it where the disk has no links."""
    with contextlib.suppress(OSError):
        os.remove(f"{path}.part")
    try:
        os.link(source, f"{path}.part")
    except OSError:
        shutil.copyfile(source, f"{path}.part")
    os.replace(f"{path}.part", path)

def settings_of_run(out_dir, given):
    """What the command line of a run said, from its newest checkpoint. {} if there is no run yet."""
    paths = [os.path.join(out_dir, f"{stage}.pt") for stage in STAGES]
    paths = [path for path in paths if os.path.exists(path)]
    if not paths:
        if not {"stage", "data", "preset"} & set(given):  # else a mistyped folder would train scenes
            raise ValueError(f"--resume finds no checkpoint of {', '.join(STAGES)} in {out_dir}. To start a "
                             "run there, give --stage, --data or --preset, too")
        data.print0(f"there is no run in {out_dir} to resume: starting one")
        return {}
    newest = max(paths, key=os.path.getmtime)
    saved = read_checkpoint(newest, *STAGES)
    if "optimizer" not in saved:
        raise ValueError(f"{newest} holds weights alone: there is nothing to resume")
    return saved["settings"]

def settings_to_fine_tune(given):
    """What --init_biart decides: the size of BiART."""
    path = os.path.join(given["init_biart"], "biart.pt")
    config = read_checkpoint(path, "biart")["config"]
    names = "n_layer", "n_head", "n_embd", "n_text", "positions", "code_hidden"
    size = {name: config[name] for name in names}
    for name, value in size.items():
        if given.get(name, value) != value:
            raise ValueError(f"--{name} {given[name]} contradicts {path}, which has {value}")
    return size

# -----------------------------------------------------------------------------
# Settings: every field of the config classes is one

CONFIGS = TrainConfig, DataConfig, AugVAEConfig, BiARTConfig

class Settings(NamedTuple):
    """All settings of a stage. Later ones win: class defaults, then the preset, then the command line."""
    stage: str
    given: dict  # what the command line said
    train: TrainConfig
    data: DataConfig
    augvae: AugVAEConfig
    biart: BiARTConfig

    def path(self, ending):
        """A file of this stage in the run's folder."""
        return os.path.join(self.train.out_dir, f"{self.stage}{ending}")

def make_settings(given, stage):
    preset = PRESETS[make_config(TrainConfig, given).preset]
    values = {**preset[""], **preset.get(stage, {}), **given}
    return Settings(stage, given, *(make_config(cls, values) for cls in CONFIGS))

def make_config(cls, values):
    """A config class filled from a dict. ValueError outside of its limits and choices."""
    values = {f.name: values[f.name] for f in fields(cls) if f.name in values}
    for name, value in values.items():
        choices = getattr(cls, "choices", {}).get(name, (value,))
        if value not in choices:
            raise ValueError(f"--{name} {value!r} is none of: {', '.join(choices)}")
        low, high = cls.limits.get(name, (0, inf)) if type(value) in (int, float) else (value, value)
        if not low <= value <= high:  # nor is NaN
            raise ValueError(f"--{name} {value} is not in the range from {low} to {high}")
    return cls(**values)

def parse(argv, description, *configs):
    """The command line -> a dict. A field's comment is its help. A comment on its own line begins a group."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--setting value ...]", description=description, allow_abbrev=False,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=36))
    for cls in configs:
        group = parser.add_argument_group(cls.__name__)
        settings = {f.name: f for f in fields(cls) if not f.metadata.get("derived")}
        for line in inspect.getsource(cls).splitlines():
            heading, setting = re.fullmatch("    # (.*)", line), re.match(r"    (\w+): [^#]*# (.*)", line)
            if heading:
                group = parser.add_argument_group(heading[1])
            elif setting and setting[1] in settings:
                f = settings[setting[1]]
                text = f"{setting[2]} [{f.default}]".replace("%", "%%")
                group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, **KINDS[f.type]).help = text
    return vars(parser.parse_args(argv))

def whole_numbers(text):
    return tuple(int(part) for part in text.replace(",", " ").split())

KINDS = {  # how argparse reads each type; its error messages name the function
    int: {"type": int, "metavar": "int"},
    float: {"type": float, "metavar": "float"},
    str: {"type": os.path.expanduser, "metavar": "text"},  # --out_dir=~/x
    bool: {"action": argparse.BooleanOptionalAction},  # --resume, --no-resume
    tuple[int, ...]: {"type": whole_numbers, "metavar": "int,int,..."},
    tuple[str, ...]: {"type": os.path.expanduser, "metavar": "text", "nargs": "+"}}

# -----------------------------------------------------------------------------
# Where and how to compute

class Context:
    """Device, precision, and the place of this process among those of torchrun."""
    def __init__(self, device, dtype):
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
            raise ValueError("these tasks of SLURM do not know each other: start one torchrun a node, "
                             "srun --ntasks-per-node=1 torchrun --nproc_per_node=8 ... train.py ...")
        torch.set_flush_denormal(True)  # tiny gradients would make a step on a CPU an eighth slower
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":  # set_device wants an index
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        try:
            self.device = torch.device(device)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as e:
            raise ValueError(f"--device {device!r} cannot be used here ({str(e).splitlines()[0]})") from None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32; the codebook asks for full fp32 by itself
            torch.backends.cudnn.benchmark = True  # shapes do not change
        if self.world > 1 and not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            # Long, because rank 0 draws pictures alone
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))
        self.dtype = getattr(torch, self.best_dtype() if dtype == "auto" else dtype)
        if self.dtype is torch.float16 and self.device.type != "cuda":
            raise ValueError(f"--dtype float16 cannot be used on {self.device}: it needs cuda")

    def best_dtype(self):
        """The fastest type that the device has in hardware."""
        if self.device.type != "cuda":
            return "float32"
        if torch.cuda.get_device_capability(self.device) >= (8, 0):
            return "bfloat16"
        # Iluvatar's cards say 7.1 and have bfloat16. V100 and T4 emulate it, which is slow
        x = torch.randn(4096, 4096, device=self.device)
        try:
            y = x.bfloat16()
            right = torch.allclose((y @ y).float(), x @ x, rtol=0.1, atol=5.0)  # sums have a deviation of 64
            faster = self.timeit(lambda: y @ y) < self.timeit(lambda: x @ x)
        except RuntimeError:
            right = faster = False
        votes = self.all_reduce(torch.tensor([float(right and faster)])).item()  # all ranks take one type
        return "bfloat16" if votes == self.world else "float16"

    def workers(self, asked):
        """Loader processes of a rank: as asked, or by default some for a GPU and none for a CPU."""
        if asked < 0 and self.device.type == "cuda":
            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            return min(4, max(2, (os.cpu_count() or 1) // ranks_here - 1))
        return max(asked, 0)

    def autocast(self):
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def to_device(self, batch):
        return [x.to(self.device, non_blocking=True) for x in batch]

    def all_reduce(self, tensor):
        """-> the sum of a tensor over all ranks, on its device. May overwrite the tensor."""
        if self.world == 1:
            return tensor
        total = tensor.to(self.device)  # NCCL adds up tensors on GPUs alone
        dist.all_reduce(total)
        return total.to(tensor.device)

    def barrier(self):
        """Wait for all ranks. NCCL's all_reduce only enqueues, so look at its result."""
        self.all_reduce(torch.zeros(1, device=self.device)).item()

    def timeit(self, function):
        """Seconds that a call takes, the device's part included."""
        self.synchronize()
        began = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - began

    def synchronize(self):
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def peak_gb(self):
        """Most memory used so far, in 2^30 bytes: by tensors on CUDA, else by the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2 ** 30
        with contextlib.suppress(ImportError):
            import resource
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, else KB
            return peak / 2 ** (30 if sys.platform == "darwin" else 20)
        return math.nan

    def peak_flops(self):
        """Floating-point operations a second in one large matrix product."""
        n = 8192 if self.device.type == "cuda" else 2048
        a = torch.randn(n, n, device=self.device, dtype=self.dtype)
        return 2 * n ** 3 / min(self.timeit(lambda: a @ a) for _ in range(10))

# -----------------------------------------------------------------------------
# Optimizer; DDP, torch.compile and activation checkpointing

def orthogonalise(matrix, steps=5):
    """(rows, columns) -> the same singular vectors with singular values of 0.7 to 1.2 (Newton-Schulz)."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x if wide else x.T

class MuonAdamW(torch.optim.AdamW):
    """Muon for the parameter group named "muon", AdamW for the others. Muon's step is the momentum made
    orthogonal, so a matrix learns equally fast in all directions (Jordan et al. 2024). It is as large as
    AdamW's, so both take one learning rate (Liu et al. 2025, arXiv 2502.16982)."""
    momentum = 0.95

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if group["name"] == "muon" and p.grad is not None:
                    self.muon_step(p, group["lr"], group["weight_decay"])
                    p.grad = None  # AdamW passes over parameters without gradient
        super().step()

    def muon_step(self, p, lr, weight_decay):
        state = self.state[p]
        if not state:  # AdamW wants a "step" in every state that it loads
            state.update(step=torch.zeros(()), momentum=torch.zeros_like(p))
        average = state["momentum"]
        average.mul_(self.momentum).add_(p.grad)
        update = orthogonalise((p.grad + self.momentum * average).flatten(1)).view_as(p)
        p.mul_(1 - lr * weight_decay)
        p.add_(update, alpha=-lr * 0.2 * max(update.flatten(1).shape) ** 0.5)

def make_optimizer(model, config, context, saved=None):
    """-> optimizer and gradient scaler, new or with a checkpoint's state. May raise ValueError."""
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    matrices = {layer.weight for layer in layers} if config.optimizer == "muon" else set()
    groups = {"muon": [], "decay": [], "no_decay": []}
    for p in model.parameters():
        name = "muon" if p in matrices else "decay" if p.dim() >= 2 else "no_decay"
        groups[name].append(p)
    optimizer = MuonAdamW([{"name": name, "params": params,
                            "weight_decay": 0.0 if name == "no_decay" else config.weight_decay}
                           for name, params in groups.items()],
                          lr=config.learning_rate, betas=(0.9, config.beta2),
                          fused=torch.__version__ >= "2.5" or None)  # before, not on all devices
    grad_scaler = getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)  # the first since torch 2.3
    scaler = grad_scaler(enabled=context.dtype is torch.float16)  # does nothing for other types
    if saved:
        own, its = optimizer.state_dict()["param_groups"], saved["optimizer"]["param_groups"]
        if [group["params"] for group in own] != [group["params"] for group in its]:
            raise ValueError("--optimizer is not the one that the run began with: keep that one")
        # Not the saved groups, so that --weight_decay and others can change
        optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": own})
        if saved["scaler"]:  # empty if the run was not in float16 until now
            scaler.load_state_dict(saved["scaler"])
    return optimizer, scaler

def wrap(objective, config, context):
    """An objective -> the module to call in training: itself, with torch.compile and DDP if asked for."""
    if config.checkpoint_activations:
        for module in objective.model.modules():
            if isinstance(module, (Block, ResBlock)):
                module.forward = functools.partial(recomputed, module.forward)
    network = objective
    if config.compile:
        Codebook.nearest = torch.compiler.disable(Codebook.nearest)  # it switches TF32 off
        Codebook.collect = torch.compiler.disable(Codebook.collect)  # it looks at values
        network = torch.compile(network)
    if context.world == 1:
        return network
    new_name = "forward_sync_buffers" in inspect.signature(DDP).parameters  # since torch 2.13
    sync_buffers = {"forward_sync_buffers" if new_name else "broadcast_buffers": False}
    return DDP(network, gradient_as_bucket_view=True, **sync_buffers)

def recomputed(forward, *args):
    """forward(*args), which runs again in the backward pass and keeps only its inputs until then."""
    if not torch.is_grad_enabled():  # nothing to save, and checkpoint() would break a CUDA graph
        return forward(*args)
    return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False)

# -----------------------------------------------------------------------------
# The log

class Log:
    """A row of numbers for each logged step, on the screen and in {stage}.csv. Rank 0 writes it."""
    columns = ("step", "loss", "val_loss", "lr", "grad_norm", "skipped", "ms", "images_per_s", "peak_share",
               "peak_gb", "waiting")  # ms: of a step; waiting: share of the time in which no data was there

    def __init__(self, settings, objective, batch, progress, context):
        self.settings, self.context, self.first_step = settings, context, progress.step
        self.seconds = self.waited = 0.0  # in training steps; for data
        self.columns = (*self.columns, *objective.columns)
        self.peak = None
        if context.device.type == "cuda":  # operations a second, and of a step: 3 times a forward pass
            self.peak = context.peak_flops()
            with FlopCounterMode(display=False) as counter, context.autocast(), torch.no_grad():
                objective(*context.to_device(batch))
            share = progress.samples_per_step / context.world / len(batch[0])
            self.flops = 3 * counter.get_total_flops() * share
        header = {name: name for name in self.columns}
        self.write_csv("w", [header, *progress.rows])

    def write_csv(self, mode, rows):
        if self.context.rank:
            return
        with open(self.settings.path(".csv"), mode, encoding="utf-8") as f:
            for row in rows:
                values = [row.get(name, "") for name in self.columns]
                f.write(",".join(f"{x:.6g}" if isinstance(x, float) else str(x) for x in values) + "\n")

    def wait_for(self, batches):
        """The next batch."""
        began = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - began
        return batch

    def write(self, progress, last):
        """Write a row. last: numbers of the last step, and val_loss if it was computed, by name."""
        row = {"step": progress.step, **{name: float(value) for name, value in last.items()}}
        left = "?"
        if "loss" in row:  # not before the first step
            seconds = self.seconds / (progress.step - self.first_step)  # a step
            left = datetime.timedelta(seconds=round(seconds * (progress.max_iters - progress.step)))
            row.update(skipped=progress.skipped, ms=1000 * seconds, waiting=self.waited / self.seconds,
                       images_per_s=progress.samples_per_step / seconds, peak_gb=self.context.peak_gb())
            if self.peak:
                row["peak_share"] = self.flops / seconds / self.peak
            progress.rows.append(row)
            self.write_csv("a", [row])
        numbers = " ".join(f"{name} {row[name]:.4g}" for name in self.columns[1:] if name in row)
        place = f"{self.settings.stage} {progress.step}/{progress.max_iters}"
        data.print0(f"{place} {numbers} ETA {left}")

    def finish(self, progress):
        path, n_steps = self.settings.path, progress.step - self.first_step
        data.print0(f"{self.settings.stage}: {n_steps} steps in {self.seconds:.0f} s, "
                    f"saved to {path('.pt')}")
        if os.path.exists(path("_bad_images.log")):
            data.print0(f"some files could not be read: see {path('_bad_images.log')}")

# -----------------------------------------------------------------------------
# How fast?

def bench(settings):
    """Time a training step of one stage on random data, and say how much memory it takes."""
    config, context = settings.train, Context(settings.train.device, settings.train.dtype)
    B, side = config.batch_size, settings.augvae.image_size
    if settings.stage == "biart":
        c = replace(settings.biart, text_vocab=config.vocab_size, end_token=config.vocab_size - 1,
                    pad_token=config.vocab_size - 2, image_vocab=settings.augvae.codebook_size,
                    image_side=config.token_grid, code_dim=settings.augvae.codebook_dim)
        text, image = (torch.randint(0, c.vocab(m) - 2, (B, c.length(m))) for m in ("text", "image"))
        objective = BiARTObjective(BiART(c), None, None, {})
        batch = [text, image, torch.zeros(B, dtype=torch.bool)]
    else:
        vae = AugVAE(settings.augvae)
        if settings.stage == "augvae_sl":
            vae = vae.single_level(config.token_grid)
        objective = AugVAEObjective(vae, config)
        batch = [torch.rand(B, 3, side, side) * 2 - 1]
    objective.to(context.device).train()
    optimizer, scaler = make_optimizer(objective.model, config, context)
    network, batch = wrap(objective, config, context), context.to_device(batch)

    def step():
        with context.autocast():
            loss, _ = network(*batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        objective.after_step(True)

    with FlopCounterMode(display=False) as counter:
        step()
    seconds = statistics.median(context.timeit(step) for _ in range(5))
    share = counter.get_total_flops() / seconds / context.peak_flops()
    data.print0(f"{settings.stage}: {1000 * seconds:.0f} ms a step of {B}, "
                f"{context.world * B / seconds:.1f} images/s, {share:.0%} of the device's "
                f"peak in matrix products, {context.peak_gb():.2f} GB at most, {str(context.dtype)[6:]}")

# -----------------------------------------------------------------------------

def main(argv):
    given = parse(argv, __doc__, *CONFIGS)
    out_dir, saved = given.get("out_dir", TrainConfig.out_dir), {}
    if given.get("resume"):
        saved = settings_of_run(out_dir, given)
    if given.get("init_biart") and not saved:
        saved = settings_to_fine_tune(given)
    given = {**saved, **given, "out_dir": out_dir}  # the run may have been moved there
    stage = make_config(TrainConfig, given).stage
    runs = []  # settings of every stage
    for name in STAGES if stage == "all" else (stage,):
        runs.append(make_settings(given, name))
        given = {**given, "init_from": ""}  # the next stage begins with what this one made
    check_settings(runs)
    for settings in runs:
        if settings.train.bench:
            bench(settings)
        else:
            train(settings)

def check_settings(runs):
    """ValueError for settings that do not fit together, before anything is written."""
    for settings in runs:
        config, given, path = settings.train, settings.given, settings.path(".pt")
        if config.compile and not hasattr(torch.compiler, "is_compiling"):
            raise ValueError(f"--compile needs torch 2.3 or newer, this is {torch.__version__}")
        if config.epochs and "max_iters" in given:
            raise ValueError(f"--epochs {config.epochs} and --max_iters {config.max_iters}: give one of them")
        if config.lpips_weight and settings.augvae.image_size < 16:
            raise ValueError(f"--lpips_weight needs pictures of 16 pixels, not {settings.augvae.image_size}")
        if settings.stage == "biart" and config.batch_size % 2:
            raise ValueError(f"--batch_size {config.batch_size} is odd: half of a batch runs each way")
        if settings.stage == "biart" and config.tokenizer:
            Tokenizer.load(config.tokenizer)
        if os.path.exists(path) and not (config.resume or config.overwrite or config.bench):
            raise ValueError(f"{path} exists: --resume continues it, --overwrite starts anew")
        check_later_stages(settings)
        if config.init_biart:
            if len(runs) > 1 or settings.stage != "biart" or config.init_from or config.tokenizer:
                raise ValueError("--init_biart is for --stage biart, and brings AugVAE and tokenizer along: "
                                 "leave out --init_from and --tokenizer")
            own = os.path.join(config.out_dir, "augvae_sl.pt")
            if os.path.exists(own) and not (config.resume or config.overwrite):
                raise ValueError(f"{own} exists, and --init_biart brings another: choose another --out_dir")
            if os.path.realpath(config.init_biart) == os.path.realpath(config.out_dir):
                raise ValueError(f"--init_biart {config.init_biart} needs another --out_dir")

def check_later_stages(settings):
    """ValueError if --resume would train a stage on, though a later one was made from it."""
    config, given, stage = settings.train, settings.given, settings.stage
    later = [f"{name}.pt" for name in STAGES[STAGES.index(stage) + 1:]
             if os.path.exists(os.path.join(config.out_dir, f"{name}.pt"))]
    if config.resume and later and os.path.exists(settings.path(".pt")):
        saved = read_checkpoint(settings.path(".pt"), stage)
        longer = config.epochs or config.max_iters > saved["progress"]["step"]
        for name in ("max_iters", "epochs"):
            if longer and given.get(name) != saved["settings"].get(name):
                raise ValueError(f"--{name} {given.get(name)} would train {stage} on, but {later[-1]} was "
                                 "made from it. To train the last stage alone for longer, give --stage biart "
                                 "--resume; else choose another --out_dir")

if __name__ == "__main__":
    status = 0
    sys.stdout.reconfigure(errors="backslashreplace")  # the console may lack a character
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, KeyboardInterrupt) as error:
        status = 1
        print(f"train.py: {str(error) or 'interrupted'}", file=sys.stderr)
    except SystemExit as stopped:
        status = stopped.code
    if dist.is_initialized():
        # gloo's thread may hold tensors while Python shuts down: sys.exit would abort, and
        # destroy_process_group would wait for ever (torch 2.1)
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
