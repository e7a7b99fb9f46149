"""
Use a trained run: paint captions, caption images, complete either, look at reconstructions, score.

$ python sample.py                                  both ways on validation items -> out/samples.png
$ python sample.py --prompt "a small red circle above a large blue square" --rerank 32
$ python sample.py --prompts captions.txt           one caption a line
$ python sample.py --image picture.png folder       what do the pictures show?
$ python sample.py --image picture.png --beam 4     the likeliest captions instead of random ones
$ python sample.py --image picture.png --prefix "there is a"                     ... that begin like this
$ python sample.py --image picture.png --prompt "a red circle ..." --keep_rows 4 keep top rows, paint the rest
$ python sample.py --image picture.png --variations paint what the captions say of it
$ python sample.py --reconstruct a.png b.png        what do the image tokens keep?
$ python sample.py --eval --rerank 8                scores on validation data, one JSON object last
$ python sample.py --serve                          a page to play with, on http://localhost:8000
$ python sample.py --export assets/scenes           the run as weights alone, to be used as --out_dir

--save_dir gets pictures, a contact sheet, samples.json (prompts, seeds, settings, scores) or scores.json, and
with --html page.html: all of it, and the run's curves and grids. From Python, see load().

References: SSIM, Wang et al. 2004; FID, Heusel et al. 2017, https://arxiv.org/abs/1706.08500 (pytorch-fid's
network); BLEU, Papineni et al. 2002, ROUGE-L, Lin 2004, CIDEr-D, Vedantam et al. 2015,
https://arxiv.org/abs/1411.5726, as the MS-COCO caption evaluation computes them.
"""
import base64
import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import re
import select
import signal
import socket
import socketserver
import sys
import threading
import time
import traceback
from collections import Counter
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median

# On Linux, big tensors lie in huge pages: an eighth of the page faults, and weights are read up to a fifth
# faster. PyTorch looks at this when it is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import augvae
import data
from biart import OTHER, BiART, BiARTConfig
from tokenizer import Tokenizer
from train import (GUIDANCE, STAGES, Context, Parser, TrainConfig, build_model, configure, fingerprint,
                   load_augvae, load_checkpoint, save_checkpoint)


@dataclasses.dataclass
class SampleConfig:
    # The run
    out_dir: str = "out"  # the run to use, as train.py's
    best: bool = False  # use BiART's checkpoint of the lowest validation loss, not the last
    vae: str = ""  # AugVAE to use instead of the run's: a checkpoint of ours or a released one
    save_dir: str = ""  # where to put what is made; empty is out_dir
    html: bool = False  # put the run's curves and grids, the samples and the scores on one page
    # What to do; without any of these, both directions on validation items
    prompt: str = ""  # paint this caption
    prompts: str = ""  # paint the captions in this text file, one a line
    image: tuple[str, ...] = ()  # caption these image files, and all images in these folders
    keep_rows: int = 0  # with --image: keep so many token rows and paint the rest by --prompt or --variations
    variations: bool = False  # with --image: paint what the captions say of it
    prefix: str = ""  # with --image: how the captions begin
    reconstruct: tuple[str, ...] = ()  # show these images, and those in folders, over their reconstructions
    eval: bool = False  # score reconstruction and both directions on validation data
    eval_items: int = 200  # validation items to score
    eval_pairs: int = 64  # so many of them for retrieval, each image against each caption
    serve: bool = False  # a page to paint and caption on, at --host and --port
    host: str = "127.0.0.1"  # serve: where to listen; others than this are open to other machines
    port: int = 8000  # serve: where to listen; 0 takes a free one
    export: str = ""  # put the run's weights alone into this folder, parameters as float16
    bench: bool = False  # measure decoding of a model of 12 x 512 instead, in float32 if --dtype is auto
    json: bool = False  # bench: print one JSON object last
    # How to sample, in both directions
    n: int = 8  # samples to make of each input (at most --beam); without an input, validation items to show
    batch_size: int = 128  # samples made at a time; the results are the same
    temperature: float = 1.0  # below 1 is more careful, 0 takes the likeliest token
    top_k: int = 0  # sample from the k likeliest tokens; 0 from all
    top_p: float = 1.0  # sample from the likeliest tokens that sum to this probability
    guidance: float = GUIDANCE  # classifier-free guidance: above 1 follows what is given closer
    window: int = 0  # tokens a pass looks for, the same sample in fewer passes; 1: one by one, 0: the fastest
    seed: int = 0  # of an input's first sample; others count up from it, the next input's from 1000 further
    rerank: int = 8  # draw this many candidates an input; the n that explain it best come first; 1: as drawn
    rerank_forward: float = 0.2  # share of log p(candidate | input) in that, beside log p(input | candidate)
    beam: int = 0  # caption by a search with this many beams; 0 samples
    length_penalty: float = 1.0  # of beams, which are ranked by log p / length ** this
    # Where and how to compute
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto is cuda where there is one
    dtype: str = "auto"  # float32, bfloat16 or float16 autocast; auto is what helps on the device
    # Weights for --eval
    fid_weights: str = ""  # file of Inception's, for FID; empty looks in torch hub's cache
    vgg_weights: str = ""  # file of VGG-16's, for LPIPS; empty looks in torch hub's cache
    lpips_weights: str = ""  # file of LPIPS's own; empty looks in torch hub's cache
    download: bool = False  # fetch what --eval misses of these, hash checked; else it leaves the metric out

    limits = {"window": "[0, 1024]", "keep_rows": "[0, inf)", "eval_items": "[1, inf)",
              "eval_pairs": "[1, inf)", "n": "[1, 1000]", "batch_size": "[1, inf)",
              "temperature": "[0, 1e6]", "top_k": "[0, inf)", "top_p": "(0, 1]", "guidance": "[0, 1e6]",
              "seed": "[0, 1e18]", "rerank": "[1, 1000]", "rerank_forward": "[0, 1]", "beam": "[0, inf)",
              "length_penalty": "[0, inf)", "port": "[0, 65535]"}
    choices = {"dtype": ("auto", "float32", "bfloat16", "float16")}


# -----------------------------------------------------------------------------
# A run, and how it is sampled in both directions

def load(out_dir="out", **settings):
    """
    A trained run, to use from Python; settings are fields of SampleConfig. Raises ValueError, a sentence,
    where the run is incomplete or a setting out of range.

    >>> run = load("out")
    >>> pictures = run.paint("a small red circle above a large blue square", n=4, rerank=8)  # PIL images
    >>> captions = run.caption(pictures[0], n=2, prefix="there is")  # strings
    >>> scores = run.score(captions[0], pictures[0])  # {"t2i": log p(image | caption), "i2t": ...}, nats
    >>> completed = run.paint("two crosses", image=pictures[0], keep_rows=4)
    """
    config, = configure(vars(SampleConfig(out_dir=out_dir, **settings)), "", SampleConfig)
    return Run(config)


class Run:
    """The models of a run in out_dir, and the settings by which they are sampled."""

    def __init__(self, config, biart=True):
        """Load AugVAE, which suffices for reconstructions, and, unless told not to, BiART."""
        self.config, self.save_dir = config, config.save_dir or config.out_dir
        self.context = Context(config.device, config.dtype, wide=False)
        path = config.vae or os.path.join(config.out_dir, "augvae_sl.pt")
        if not os.path.exists(path):
            raise ValueError(f"there is no checkpoint {path}: `train.py` makes those of a run")
        self.vae = load_augvae(path).to(self.context.device)
        self.image_side = self.vae.config.single_level  # tokens
        if biart:
            self.load_biart()

    def candidates(self, ref, to, n=1, indices=None, prefix=None, on_step=None):
        """
        The heart of all uses: generate the GEN side of inputs, look at it from both directions, and order it.

        ref (B, n_ref): text for to="image", image codes for to="text". prefix (B, m): the first GEN tokens.
        indices: the numbers of these inputs, by which their seeds are chosen; None: 0, 1, 2, ... on_step: as
        generate() calls it.
        -> for each input a list of n records in the order drawn; with --rerank all of them, best first:
        {"tokens": (n_gen,), "seed": what gives them again (None for beams), "scores": {"forward":
        log p(candidate | input, prefix), "reverse": log p(input | candidate)}, nats}.
        """
        c, n = self.config, max(n, self.config.rerank)
        prefix = ref[:, :0] if prefix is None else prefix
        # float32 holds no less: what is below comes to the same
        temperature, top_p = c.temperature if c.temperature > 1e-6 else 0, max(c.top_p, 1e-6)
        with self.context.autocast():
            if to == "text" and c.beam:
                n, seeds = c.beam, [[None] * c.beam for _ in ref]
                tokens, _ = self.biart.beam_search(ref, n, prefix, c.length_penalty, c.guidance)
                tokens = tokens.flatten(0, 1)
                forward, _ = self.biart.log_likelihood(tokens, ref, to, prefix.shape[1])
            else:
                seeds = [[c.seed + 1000 * i + j for j in range(n)] for i in indices or range(len(ref))]
                tokens, forward = self.biart.generate(
                    ref, to, n, prefix, temperature, c.top_k, top_p, c.guidance,
                    seeds=[seed for row in seeds for seed in row], window=c.window, on_step=on_step)
            # What was drawn more than once is judged once
            whole = torch.cat([ref.repeat_interleave(n, 0), tokens], dim=1)
            different, which = whole.unique(dim=0, return_inverse=True)
            ref_side, gen_side = different.split([ref.shape[1], tokens.shape[1]], dim=1)
            judged, _ = self.biart.log_likelihood(**{OTHER[to]: ref_side, to: gen_side}, to=OTHER[to])
            reverse = judged[which]
        groups, (forward, reverse) = [], (x.view(len(ref), n).tolist() for x in (forward, reverse))
        for of_input in zip(tokens.view(len(ref), n, -1), seeds, forward, reverse):
            group = list(zip(*of_input))
            if c.rerank > 1 and group[0][1] is not None:  # beams are in order
                group.sort(key=lambda candidate: self.rerank_score(*candidate[2:]), reverse=True)
            groups.append([{"tokens": x, "seed": seed,
                            "scores": {"forward": round(log_p, 3), "reverse": round(reverse_log_p, 3)}}
                           for x, seed, log_p, reverse_log_p in group])
        return groups

    def rerank_score(self, forward, reverse):
        """What --rerank orders by. By `reverse` alone, a crippled circle passes for a circle."""
        share = self.config.rerank_forward
        return share * forward + (1 - share) * reverse

    def paint_all(self, prompts, n=1, images=None, on_step=None, choose=None):
        """
        Captions -> yields for each, as they get done, n records with "picture", a PIL image, and "prompt"; or
        those that `choose` takes of the list of all. images: PIL images, one a caption, whose first
        --keep_rows rows of tokens are kept.
        """
        n_kept = self.config.keep_rows * self.image_side
        for indices in self.input_batches(len(prompts), n, "painting"):
            text = self.tokenize([prompts[i] for i in indices])
            prefix = self.encode([images[i] for i in indices])[0][:, :n_kept] if images else None
            groups = [choose(group) if choose else group[:n]
                      for group in self.candidates(text, "image", n, indices, prefix, on_step)]
            pixels = self.decode(torch.stack([record["tokens"] for group in groups for record in group]))
            pictures = map(data.to_image, pixels)
            for i, group in zip(indices, groups):
                yield [{"picture": next(pictures), "prompt": prompts[i], **record} for record in group]

    def caption_all(self, images, n=1, on_step=None, choose=None):
        """PIL images -> yields for each, as paint_all(), records with "caption" and "picture", as encoded."""
        ids, n_text = self.tokenizer.encode(self.config.prefix.strip()), self.biart.config.n_text
        if len(ids) >= n_text:
            raise ValueError(f"--prefix has {len(ids)} tokens, and a whole caption at most {n_text}")
        for indices in self.input_batches(len(images), n, "captioning"):
            codes, pixels = self.encode([images[i] for i in indices])
            prefix = codes.new_tensor(ids).expand(len(indices), -1)
            for x, group in zip(pixels, self.candidates(codes, "text", n, indices, prefix, on_step)):
                yield [{"picture": data.to_image(x),
                        "caption": self.tokenizer.decode(record["tokens"].tolist()).strip(), **record}
                       for record in (choose(group) if choose else group[:n])]

    def input_batches(self, count, n, task):
        """Numbers of inputs, 0 ... count - 1, so many at a time that n samples of each fit --batch_size."""
        drawn = max(n, self.config.rerank, self.config.beam)
        return data.progress(range(count), max(1, self.config.batch_size // drawn), task)

    # From Python, one input at a time; settings of SampleConfig hold for this call
    def paint(self, prompt, n=1, image=None, **settings):
        """A caption -> n PIL images; of `image`, a PIL image, the first keep_rows rows of tokens are kept."""
        run, images = self.with_settings(**settings), [image] if image else None
        run.check_kept(images)
        return [record["picture"] for record in next(run.paint_all([prompt], n, images))]

    def caption(self, image, n=1, **settings):
        """A PIL image -> n captions."""
        return [record["caption"] for record in next(self.with_settings(**settings).caption_all([image], n))]

    def score(self, caption, image):
        """Caption, PIL image -> {"t2i": log p(image | caption), "i2t": log p(caption | image)}, in nats."""
        text, (codes, _) = self.tokenize([caption]), self.encode([image])
        with self.context.autocast():
            return {direction: self.biart.log_likelihood(text, codes, to)[0].item()
                    for direction, to in (("t2i", "image"), ("i2t", "text"))}

    def check_kept(self, images):
        """Raises ValueError unless there are images to complete, and --keep_rows fits, or neither."""
        kept, side = self.config.keep_rows, self.image_side
        if bool(images) != bool(kept):
            raise ValueError("an image to complete and keep_rows, how many rows of it to keep, go together")
        if kept >= side:
            raise ValueError(f"--keep_rows {kept} is not in 1 to {side - 1}, of {side} rows of tokens")

    def crop(self, image):
        """PIL image -> (3, size, size) in [-1, 1], as the models take it."""
        return data.crop_to_tensor(image.convert("RGB"), self.vae.config.image_size)

    def encode(self, images):
        """PIL images -> codes LongTensor (B, n), finest grid first; what was encoded (B, 3, size, size)."""
        pixels = torch.stack([self.crop(image) for image in images]).to(self.context.device)
        with self.context.autocast():
            return torch.cat([grid.flatten(1) for grid in self.vae.encode(pixels)], 1), pixels

    def decode(self, codes):
        """Codes (B, n), as encode() gives them -> images (B, 3, size, size) in [-1, 1]."""
        sides = self.vae.config.grids
        flat = codes.split([side ** 2 for side in sides], dim=1)
        with self.context.autocast():
            return self.vae.decode([grid.unflatten(1, (s, s)) for grid, s in zip(flat, sides)]).float()

    def tokenize(self, captions):
        """Captions -> LongTensor (B, n_text); says so where one is cut."""
        n_text = self.biart.config.n_text
        rows = [self.tokenizer.encode_padded(caption, n_text) for caption in captions]
        for ids, cut in rows:
            if cut:
                print(f"warning: the prompt is longer than {n_text - 1} tokens and was cut to "
                      f"{self.tokenizer.decode(ids)!r}", file=sys.stderr)
        return torch.tensor([ids for ids, _ in rows], device=self.context.device)

    def load_biart(self):
        """BiART and the tokenizer. Raises ValueError where they belong to another run."""
        c = self.config
        path = os.path.join(c.out_dir, "biart_best.pt" if c.best else "biart.pt")
        checkpoint = load_checkpoint(path, "biart")
        self.settings = checkpoint["settings"]
        self.tokenizer = Tokenizer.load(os.path.join(c.out_dir, "tokenizer.json"))
        if checkpoint["augvae"] != fingerprint(self.vae):
            raise ValueError(f"{path} was trained with another augvae than the one in {c.vae or c.out_dir}")
        if checkpoint["tokenizer"] != self.tokenizer.fingerprint():
            raise ValueError(f"{path} was trained with another tokenizer than the one in {c.out_dir}")
        biart = build_model(BiART, BiARTConfig, checkpoint, path)
        self.biart = biart.to(self.context.device, self.context.dtype)

    def with_settings(self, **settings):
        """The same models, sampled by other settings. What they were loaded by (device, ...) stays."""
        other = copy.copy(self)
        other.config, = configure(vars(dataclasses.replace(self.config, **settings)), "", SampleConfig)
        return other


# -----------------------------------------------------------------------------
# Uses: what is read, what is made of it, what is written

def read_images(run, paths):
    """
    Image files, and folders of them by name -> records {"image": path, "picture": PIL image, as the models
    take it}. A folder's unreadable images are passed over with a warning. Raises ValueError for a file that
    is no image, and for a folder without one.
    """
    records = []
    for path in paths:
        files, n_before = [path], len(records)
        if os.path.isdir(path):
            files = [os.path.join(path, name) for name in sorted(os.listdir(path)) if data.is_image(name)]
        for file in files:
            try:
                records.append({"image": file, "picture": data.to_image(run.crop(data.load_image(file)))})
            except data.Unreadable as e:
                if file == path:
                    raise
                print(f"warning: {e}", file=sys.stderr)
        if len(records) == n_before:
            raise ValueError(f"there is no image in the folder {path}")
    return records


def save_samples(run, name, groups, columns):
    """
    Write lists of records that belong together: each picture, as it comes, as {name}_{i}.png; what is known
    of them in samples.json; all of them, words below, on {name}.png, past 64 rows on {name}_sheet_2.png, ...
    """
    entries = []
    for record in itertools.chain.from_iterable(groups):
        file = f"{name}_{len(entries)}.png"
        path = os.path.join(run.save_dir, file)
        record["picture"].save(path)
        known = {key: value for key, value in record.items() if key not in ("picture", "tokens")}
        entries.append({"file": file, **known})
        print(f"{record.get('image', path)}: {label(record)}")
    save_json(run, "samples", entries)
    for page, start in enumerate(range(0, len(entries), 64 * columns), 1):
        sheet = entries[start:start + 64 * columns]
        pictures = [data.load_image(os.path.join(run.save_dir, entry["file"])) for entry in sheet]
        path = os.path.join(run.save_dir, f"{name}_sheet_{page}.png" if page > 1 else f"{name}.png")
        data.contact_sheet(pictures, [label(entry) for entry in sheet], columns).save(path)
        print(f"wrote {path}")


def save_json(run, name, made):
    """{name}.json: what was made, and by which settings."""
    with open(os.path.join(run.save_dir, f"{name}.json"), "w", encoding="utf-8") as f:
        json.dump({"settings": dataclasses.asdict(run.config), name: made}, f, indent=1, ensure_ascii=False)


def label(record):
    """The words under a picture."""
    return (f"paint: {record['prompt']}" if "prompt" in record else
            f"it says: {record['caption']}" if "caption" in record else record["image"])


def sheet_columns(group_size):
    """How wide a sheet is: where it can be, so that each group of pictures is a row."""
    return group_size if 2 <= group_size <= 16 else 8


def reconstructions(run, shown):
    """read_images()'s records -> yields rows: the images, and below them what their tokens keep of them."""
    for row in data.progress(shown, 8, "reconstruction"):
        codes, _ = run.encode([record["picture"] for record in row])
        yield row
        yield [{"picture": data.to_image(x), "image": f"{record['image']}, its tokens"}
               for record, x in zip(row, run.decode(codes))]


def save_captions(run, shown):
    """n captions of each image."""
    n = min(run.config.n, run.config.beam or run.config.n)
    captioned = run.caption_all([record["picture"] for record in shown], n)
    groups = ([{**image, **record} for record in group] for image, group in zip(shown, captioned))
    save_samples(run, "captioned", groups, sheet_columns(n))


def save_repaintings(run, shown):
    """Each image, then n more that begin with its first rows: painted by --prompt, or by its captions."""
    c, n, images = run.config, run.config.n, [record["picture"] for record in shown]
    if c.keep_rows:
        run.check_kept(images)
    prompts, n_each = [c.prompt] * len(images), n
    if c.variations:
        n, n_each = min(n, c.beam or n), 1
        prompts = [record["caption"] for group in run.caption_all(images, n) for record in group]
        images = [image for image in images for _ in range(n)]
    painted = itertools.chain.from_iterable(run.paint_all(prompts, n_each, images))
    groups = ([record, *itertools.islice(painted, n)] for record in shown)
    save_samples(run, "repainted", groups, sheet_columns(n + 1))


def save_both_directions(run, dataset):
    """Validation items: what is painted of a caption of each, over what is said of its image."""
    items, columns = range(len(dataset)), min(8, len(dataset))
    references = [dataset.captions(i) for i in items]
    painted = [record for record, in run.paint_all([captions[0] for captions in references])]
    captioned = [{"references": captions, **record} for captions, (record,) in
                 zip(references, run.caption_all([dataset.image(i) for i in items]))]
    rows = [records[i:i + columns] for i in items[::columns] for records in (painted, captioned)]
    save_samples(run, "samples", rows, columns)


# -----------------------------------------------------------------------------
# Metrics of pictures

def psnr(x, y):
    """Images (B, 3, H, W) in [0, 1], twice -> dB (B,), at most 100."""
    return -10 * (x - y).square().mean((1, 2, 3)).clamp_min(1e-10).log10()


def l1(x, y):
    """Images (B, 3, H, W) in [0, 1], twice -> mean absolute difference (B,)."""
    return (x - y).abs().mean((1, 2, 3))


def ssim(x, y, sample_covariance=False):
    """
    Images (B, C, H, W) in [0, 1], twice, 11 pixels or more -> structural similarity (B,) in Gaussian windows
    of 11 x 11, sigma 1.5, as in Wang et al. 2004. sample_covariance divides by N - 1, scikit-image's default.
    """
    B, device = len(x), "cpu" if x.device.type == "mps" else x.device  # Apple's GPUs lack float64
    x, y = (z.to(device).double().flatten(0, 1)[:, None] for z in (x, y))  # (B * C, 1, H, W)
    window = torch.exp(-torch.arange(-5, 6, device=device).double().square() / (2 * 1.5 ** 2))
    window = torch.outer(window, window)[None, None] / window.sum() ** 2
    mx, my, xx, yy, xy = (F.conv2d(z, window) for z in (x, y, x * x, y * y, x * y))
    norm = 121 / 120 if sample_covariance else 1
    vx, vy, vxy = norm * (xx - mx * mx), norm * (yy - my * my), norm * (xy - mx * my)
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    index = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return index.view(B, -1).mean(1)


# Name in torch hub's cache, how its SHA-256 hash begins, address
FID_FILE = ("pt_inception-2015-12-05-6726825d.pth", "6726825d", "https://github.com/mseitzer/pytorch-fid/"
            "releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth")


class FIDInception(nn.Module):
    """
    FID's network: PIL images of one size -> features (B, 2048). It is torchvision's Inception v3 but for its
    pooling branches: averages leave out padding, the last block takes a maximum. `path` holds its weights.
    """

    def __init__(self, path):
        super().__init__()
        from torchvision.models import inception_v3  # here, because nothing else needs it
        net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        try:
            net.load_state_dict(augvae.safe_load(path))
        except (RuntimeError, TypeError):  # other names, shapes or things
            raise ValueError(f"{path} does not hold FID's Inception, {FID_FILE[0]}") from None
        for block in net.children():
            if hasattr(block, "branch_pool"):
                block.register_forward_hook(self.pool_anew)
        net.fc = nn.Identity()
        self.net = net.eval().requires_grad_(False)

    def pool_anew(self, block, inputs, output):
        """A block's output with its last branch, of branch_pool's channels, computed behind FID's pooling."""
        pooled = (F.max_pool2d(*inputs, 3, stride=1, padding=1) if block is self.net.Mixed_7c else
                  F.avg_pool2d(*inputs, 3, stride=1, padding=1, count_include_pad=False))
        branch = block.branch_pool(pooled)
        return torch.cat([output[:, :-branch.shape[1]], branch], dim=1)

    def forward(self, pictures):
        features, device = [], next(self.parameters()).device
        for i in range(0, len(pictures), 50):
            x = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures[i:i + 50]]))
            x = x.to(device).permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)
            x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
            features.append(self.net(2 * x - 1).cpu())
        return torch.cat(features)


def frechet_distance(x, y):
    """
    FID of features (N, D) and (M, D): |mean_x - mean_y|^2 + tr(C_x) + tr(C_y) - 2 tr((C_x C_y)^(1/2)), C the
    covariance. As C = R'R, with the R of the centred features' QR decomposition, the last trace is the sum of
    the singular values of R_x R_y': no root of a matrix, and exact where N < D, too.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"FID is between two sets of at least 2 images, not {len(x)} and {len(y)}")
    (mx, rx), (my, ry) = ((z.mean(0), torch.linalg.qr((z - z.mean(0)) / (len(z) - 1) ** 0.5).R)
                          for z in (x.double(), y.double()))
    root = torch.linalg.svdvals(rx @ ry.T).sum()
    return ((mx - my).square().sum() + rx.square().sum() + ry.square().sum() - 2 * root).item()


# -----------------------------------------------------------------------------
# Metrics of captions

ABBREVIATION = r"(?:mr|mrs|ms|dr|st|vs|etc|ave|no)\.|(?:[^\W\d_]\.){2,}"
ENDING = r"'(?:s|m|d|re|ve|ll)\b"
WORD = re.compile(rf"{ABBREVIATION}|{ENDING}|\d+(?:[.,:]\d+)+|[#@]?\w+(?:[-/.']+\w+)*|[^\w\s]")
PUNCTUATION = set(".,:;?!-'\"`()[]{}…–—“”‘")


def caption_words(caption):
    """
    A caption as words by the MS-COCO convention, the Penn Treebank's in lower case, without punctuation:
    "A dog's t-shirt isn't here!" -> ["a", "dog", "'s", "t-shirt", "is", "n't", "here"]
    (COCO's tool means to drop brackets but lets them through as "-lrb-"; here they are dropped.)
    """
    text = caption.lower().replace("’", "'")
    text = re.sub(r"\b(can(?=not\b)|(?:gon|wan)(?=na\b)|got(?=ta\b)|(?:gim|lem)(?=me\b))", r"\1 ", text)
    text = re.sub(rf"(?<=\w)(n't\b|{ENDING})", r" \1", text)
    return [word for word in WORD.findall(text) if word not in PUNCTUATION]


def ngrams(words):
    """All runs of one to four words, counted."""
    return Counter(tuple(words[i:i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def bleu(captions, references):
    """
    Corpus BLEU-1 ... BLEU-4. captions: each a list of words; references: for each caption a list of such
    lists. A caption's reference length is that of the reference nearest in length.
    """
    matched, total, length, reference_length = [0] * 4, [0] * 4, 0, 0
    for words, others in zip(captions, references):
        allowed = Counter()  # an n-gram counts as often as the reference that has most of it
        for other in others:
            allowed |= ngrams(other)
        for gram, count in ngrams(words).items():
            matched[len(gram) - 1] += min(count, allowed[gram])
            total[len(gram) - 1] += count
        length += len(words)
        reference_length += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
    brevity = math.exp(min(0, 1 - (reference_length + 1e-9) / (length + 1e-15)))
    logs = [math.log((m + 1e-15) / (t + 1e-9)) for m, t in zip(matched, total)]
    return [brevity * math.exp(sum(logs[:n]) / n) for n in range(1, 5)]


def common_length(a, b):
    """Length of the longest common subsequence of two lists of words."""
    best = [0] * (len(b) + 1)  # of the words of a so far and b[:j]
    for word in a:
        before = best.copy()
        for j, other in enumerate(b):
            best[j + 1] = before[j] + 1 if word == other else max(before[j + 1], best[j])
    return best[-1]


def rouge_l(captions, references):
    """Mean over captions of the longest common subsequence's F-measure (beta 1.2); lists as for bleu()."""
    total = 0.0
    for words, others in zip(captions, references):
        words, others = words or [""], [other or [""] for other in others]
        lengths = [common_length(words, other) for other in others]
        precision = max(lengths) / len(words)
        recall = max(n / len(other) for n, other in zip(lengths, others))
        if precision and recall:
            total += (1 + 1.2 ** 2) * precision * recall / (recall + 1.2 ** 2 * precision)
    return total / len(captions)


def cider_d(captions, references):
    """
    CIDEr-D, 0 to 10; lists of words as for bleu(). Document frequencies are those of these references, so the
    score is of the set as a whole, and 0 for a single image.
    """
    documents = Counter(gram for others in references for gram in set().union(*map(ngrams, others)))

    def tf_idf(words):
        """-> for n = 1 ... 4 {n-gram: weight}, and the norm of this vector."""
        vectors = [{} for _ in range(4)]
        for gram, count in ngrams(words).items():
            weight = count * (math.log(len(captions)) - math.log(max(1, documents[gram])))
            vectors[len(gram) - 1][gram] = weight
        return [(vector, math.sqrt(sum(v * v for v in vector.values()))) for vector in vectors]

    total = 0.0
    for words, others in zip(captions, references):
        found = tf_idf(words)
        for other in others:
            # the reference package counts bigrams, so an empty caption is as long as one word
            penalty = math.exp(-(max(1, len(words)) - max(1, len(other))) ** 2 / (2 * 6.0 ** 2))
            for (x, x_norm), (y, y_norm) in zip(found, tf_idf(other)):
                product = sum(min(v, y[gram]) * y[gram] for gram, v in x.items() if gram in y)
                total += 10 / 4 * penalty * product / (x_norm * y_norm or 1) / len(others)
    return total / len(captions)


def caption_scores(captions, references):
    """Captions, and for each a list of right ones -> {"bleu1", ... "bleu4", "rouge_l", "cider_d"}."""
    captions = [caption_words(caption) for caption in captions]
    references = [[caption_words(other) for other in others] for others in references]
    return {**{f"bleu{n}": value for n, value in enumerate(bleu(captions, references), 1)},
            "rouge_l": rouge_l(captions, references), "cider_d": cider_d(captions, references)}


# -----------------------------------------------------------------------------
# Scores of a run

def load_metric(run, network, **files):
    """A metric's network, by its files {flag: name, hash and address}; None, said, where one is missing."""
    c = run.config
    paths = [augvae.find_weights(flag, getattr(c, flag), *file, c.download) for flag, file in files.items()]
    if all(paths):
        return network(*paths).to(run.context.device)
    print(f"{network.__name__} is left out, as its weights are not in torch hub's cache: "
          f"give them by {' and '.join(f'--{flag}' for flag in files)}, or --download")


def evaluate(run, val, heldout):
    """
    Score on --eval_items of each data set -> all scores below by name, which scores.json gets, too. Those of
    `heldout`, the built-in scenes' split of things never seen (or None), have "_heldout" behind their names.
    """
    inception = load_metric(run, FIDInception, fid_weights=FID_FILE)
    val, unseen = (part and data.validation_subset(part, run.config.eval_items) for part in (val, heldout))
    scores = {**reconstruction_scores(run, val, inception), **likelihood_scores(run, val),
              **generation_scores(run, val, inception)}
    if unseen:
        found = generation_scores(run, unseen, inception)
        scores.update({f"{name}_heldout": value for name, value in found.items()})
    scores = {name: round(value, 4) for name, value in scores.items()}
    save_json(run, "scores", scores)
    return scores


def reconstruction_scores(run, val, inception=None):
    """
    -> {"psnr" (dB), "ssim", "l1" (of 0 to 1)}, "lpips" and "rfid" where there are weights, means over images;
    "codebook_use", the share of codes in use, and their "perplexity".
    """
    metrics = {"psnr": psnr, "ssim": ssim, "l1": l1}
    lpips = load_metric(run, augvae.LPIPS, vgg_weights=augvae.VGG_FILE, lpips_weights=augvae.LPIPS_FILE)
    if lpips:
        metrics["lpips"] = lambda x, y: lpips(2 * x - 1, 2 * y - 1)
    values, pictures = {name: [] for name in metrics}, ([], [])
    counts = torch.zeros(run.vae.config.codebook_size)
    for indices in data.progress(range(len(val)), 50, "reconstruction"):
        codes, originals = run.encode([val.image(i) for i in indices])
        reconstructed = run.decode(codes)
        for name, metric in metrics.items():
            values[name] += metric((originals + 1) / 2, (reconstructed + 1) / 2).tolist()
        counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
        for kept, pixels in zip(pictures, (originals, reconstructed)):
            kept += map(data.to_image, pixels)
    scores = {name: sum(of_images) / len(of_images) for name, of_images in values.items()}
    if inception:
        scores["rfid"] = frechet_distance(*map(inception, pictures))
    scores["codebook_use"], scores["perplexity"] = augvae.codebook_use(counts)
    return scores


def likelihood_scores(run, val):
    """
    -> "t2i_bits", "i2t_bits": bits per generated token on one caption an image; "..._recall1", "..._recall5",
    of the first --eval_pairs of them: how often the right one of all images is among the one or five that
    explain a text best, by log p(text | image) (t2i), and the right text among those that explain an image.
    """
    text = run.tokenize(data.one_caption_each([val.captions(i) for i in range(len(val))]))
    image = torch.cat([run.encode([val.image(i) for i in indices])[0]
                       for indices in data.progress(range(len(val)), 50, "encoding")])
    sides, scores, n = {"text": text, "image": image}, {}, run.config.eval_pairs
    for direction, query, answer in (("t2i", "text", "image"), ("i2t", "image", "text")):
        with run.context.autocast():
            log_p, n_tokens = run.biart.log_likelihood(**sides, to=answer)
        scores[f"{direction}_bits"] = -log_p.sum().item() / math.log(2) / n_tokens.sum().item()
        queries, table = sides[query][:n], []  # log p(query | answer), a row an answer
        for answers in data.progress(sides[answer][:n], 8, f"retrieval of {answer}"):
            with run.context.autocast():
                pairs = {query: queries.repeat(len(answers), 1), answer: answers}
                table.append(run.biart.log_likelihood(**pairs, to=query)[0].view(len(answers), -1))
        table = torch.cat(table)
        ranks = (table > table.diag()).sum(0)  # how many answers explain a query better than its own does
        scores.update({f"{direction}_recall{k}": (ranks < k).double().mean().item() for k in (1, 5)})
    return scores


def generation_scores(run, dataset, inception=None):
    """
    Of a picture painted of one caption an item, and a caption given to its image -> "bleu1" ... "bleu4",
    "rouge_l", "cider_d", against all captions of the item; of built-in scenes "t2i_exact", "i2t_exact", the
    shares that are right in all that the prompt or caption says; "fid", where there are weights.
    With --rerank all of these again, "..._rerank", of the best candidate; without the suffix, of the first.
    """
    references = [dataset.captions(i) for i in range(len(dataset))]
    images = [data.to_image(run.crop(dataset.image(i))) for i in range(len(dataset))]
    prompts, n, scores = data.one_caption_each(references), run.config.rerank, {}

    def first_and_best(group):
        first = min(group, key=lambda record: record["seed"] or 0)
        return [first, group[0]] if n > 1 else [first]

    painted = run.paint_all(prompts, n, choose=first_and_best)
    captioned = run.caption_all(images, n, choose=first_and_best)
    for suffix, painted_records, caption_records in zip(("", "_rerank"), zip(*painted), zip(*captioned)):
        pictures = [record["picture"] for record in painted_records]
        captions = [record["caption"] for record in caption_records]
        found = caption_scores(captions, references)
        rates = data.exact_rates(prompts, pictures, references, captions)
        found.update({f"{way}_exact": rate for way, rate in rates.items()})
        if inception:
            found["fid"] = frechet_distance(inception(images), inception(pictures))
        scores.update({name + suffix: value for name, value in found.items()})
    return scores


# -----------------------------------------------------------------------------
# A page of it all, in a file or live

MOST = {"bytes": 10_000_000, "characters": 2000, "n": 64, "pixels": 50_000_000, "connections": 64}  # served
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")
PLAYED = ("n", "temperature", "top_k", "top_p", "guidance", "seed", "keep_rows")  # settings of the page
LOCAL = {"127.0.0.1", "localhost", "::1"}


def data_url(picture):
    """A PIL image, or the path of a PNG file -> its PNG as text that a page shows."""
    png = io.BytesIO()
    png.write(picture.read_bytes()) if isinstance(picture, Path) else picture.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def page(run, live=False):
    """
    assets/page.html with the run's scores, samples, curves and grids from save_dir and out_dir in it, one
    file to send around; or, live, with controls that ask serve() in place of the samples.
    """
    out_dir, save_dir, made, figures = Path(run.config.out_dir).absolute(), Path(run.save_dir), {}, {}
    for path in filter(Path.exists, (save_dir / f"{name}.json" for name in ("scores", "samples")[:2 - live])):
        made[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    for entry in made.get("samples", {}).get("samples", ()):
        entry["picture"] = data_url(save_dir / entry["file"])
    for stage in STAGES:  # its loss curve, and up to four of its grids of pictures, first and last among them
        grids = sorted(out_dir.glob(f"{stage}_[0-9]*.png"), key=lambda path: (len(path.name), path))
        chosen = dict.fromkeys(grids[i * (len(grids) - 1) // 3] for i in range(4) if grids)
        figures[stage] = {path.name: data_url(path) for path in (*out_dir.glob(f"{stage}_loss.png"), *chosen)}
    content = {"title": out_dir.name, "live": live, "side": run.image_side, "most": MOST, "made": made,
               "figures": figures, "settings": {name: getattr(run.config, name) for name in PLAYED}}
    text = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")  # nothing in it ends the script
    template = Path(__file__).with_name("assets") / "page.html"
    return template.read_text(encoding="utf-8").replace(">DATA<", f">{text}<", 1)


def read_request(run, path, body):
    """
    -> the run with the settings that a request's JSON asks for, the prompt to /paint, or "", and the image to
    /caption or to complete, a PIL image as the models take it, or None. ValueError, a sentence, for all else.
    """
    kinds = {f.name: f.type for f in dataclasses.fields(SampleConfig) if f.name in PLAYED}
    try:
        asked = json.loads(body)
        settings = {name: float(str(value)) if kinds.get(name) is float and type(value) is int else value
                    for name, value in asked.items()}  # a whole number may be too large for a float
    except (ValueError, AttributeError, RecursionError):
        raise ValueError("the request is not an object in JSON") from None
    for name, value in settings.items():
        kind = {"prompt": str, "image": str, **kinds}.get(name)
        if type(value) is not kind:
            raise ValueError(f"{name} is not {kind.__name__}" if kind else f"no setting: {name[:50]!r}")
    prompt, image = (settings.pop(name, "") for name in ("prompt", "image"))
    if len(prompt) > MOST["characters"]:
        raise ValueError(f"the prompt is longer than {MOST['characters']:,} characters")
    n = settings.get("n", run.config.n)
    if n > MOST["n"]:
        raise ValueError(f"--n {n} is above {MOST['n']}, the most at a time")
    run = run.with_settings(**{**settings, "n": n, "rerank": n})
    if path == "/paint":
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        run.check_kept(image)
    elif not image:
        raise ValueError("there is no picture to caption")
    if image:
        try:
            content = io.BytesIO(base64.b64decode(image, validate=True))
        except ValueError:
            raise ValueError("the picture is not in base64") from None
        image = data.to_image(run.crop(data.load_image(content, name="the file", formats=FORMATS)))
    return run, prompt, image or None


def prompt_notes(run, prompt):
    """Sentences on what of a prompt is lost on the model."""
    ids, cut = run.tokenizer.encode_padded(prompt, run.biart.config.n_text)
    notes = [f"The prompt is too long: only “{run.tokenizer.decode(ids)}” was read."] if cut else []
    if configure(run.settings, "biart", data.DataConfig)[0].data == "scenes":  # each known word is one token
        unknown = [word for word in dict.fromkeys(re.findall(r"\w+", prompt))
                   if min(len(run.tokenizer.encode(text)) for text in (word, f" {word}")) > 1]
        notes += [f"Words the model has never seen: {', '.join(unknown)}."] if unknown else []
    return notes


class Refused(Exception):
    """An HTTP status, and a sentence."""


class Handler(BaseHTTPRequestHandler):
    """
    GET / is the page; POST /paint and /caption stream lines of JSON: {"waiting": requests before this one},
    {"notes": [...]}, {"known": tokens of each sample, "pictures": [...]}, {"records": [...]} last, or
    {"error": ...}. Nothing of a request names a file.
    """
    timeout = 20  # s that a read or write may take; a whole request may take as long, too
    default_request_version = "HTTP/1.0"  # of what cannot be read: 0.9 has no status
    server_version, sys_version = "sample.py", ""
    started = False  # whether the answer has begun

    def setup(self):
        super().setup()
        self.deadline = threading.Timer(self.timeout, self.hang_up)
        self.deadline.daemon = True
        self.deadline.start()

    def finish(self):
        self.deadline.cancel()
        super().finish()

    def hang_up(self, how=socket.SHUT_RDWR):
        with contextlib.suppress(OSError):  # where the client did
            self.connection.shutdown(how)

    def do_GET(self):
        try:
            self.check_sender()
            if self.command == "POST":
                self.post()
            elif self.path != "/":
                raise Refused(404, "there is nothing at this address")
            else:
                self.head(200, "text/html")
                self.wfile.write(self.server.page)
        except Refused as e:
            self.send_error(*e.args)
        except OSError:
            pass  # the client left
        except Exception:
            traceback.print_exc()
            self.send_error(500, "something went wrong on the server")

    do_POST = do_GET

    def check_sender(self):
        """Keeps other sites from using a visitor's server, by a form or by a name of theirs for it."""
        host = self.headers.get("Host", "")
        known = {*LOCAL, self.server.run.config.host, self.connection.getsockname()[0]}
        if (re.sub(r":\d*$", "", host).strip("[]") not in known
                or self.headers.get("Origin", f"http://{host}") != f"http://{host}"):
            raise Refused(403, "this server answers its own page alone")

    def post(self):
        work = {"/paint": self.paint, "/caption": self.caption}.get(self.path)
        if not work:
            raise Refused(404, "there is nothing at this address")
        body = self.body()
        self.deadline.cancel()
        try:
            with self.server.reading:  # one large picture at a time
                run, prompt, image = read_request(self.server.run, self.path, body)
            notes = prompt_notes(run, prompt)
        except (ValueError, OverflowError) as e:
            raise Refused(400, str(e)) from None
        with self.turn():
            self.send(notes=notes)
            work(run, prompt, image)

    def body(self):
        length = self.headers.get("Content-Length")
        if length is None or "Transfer-Encoding" in self.headers:
            raise Refused(411, "a request needs a Content-Length")
        if not re.fullmatch("[0-9]{1,20}", length):
            raise Refused(400, "the Content-Length is no number")
        if int(length) > MOST["bytes"]:
            raise Refused(413, f"the request is larger than {MOST['bytes'] // 1_000_000} MB")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError
        return body

    @contextlib.contextmanager
    def turn(self):
        """The models work for one at a time, first come, first served."""
        queue, before = self.server.queue, 0
        queue.append(self)
        try:
            while queue[0] is not self:
                self.stay()
                if queue.index(self) != before:
                    before = queue.index(self)
                    self.send(waiting=before)
                time.sleep(0.02)
            yield
        finally:
            queue.remove(self)

    def stay(self, *_):
        """Raises ConnectionError where nobody waits for the answer any more."""
        came = select.select([self.connection], [], [], 0)[0]
        if self.server.ending or came and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionError

    def paint(self, run, prompt, image):
        rows = -1

        def on_step(tokens, known):
            nonlocal rows
            self.stay()
            before, rows = rows, known.sum().item() // (len(known) * run.image_side)
            if rows > before:  # the guesses are there, too: the page covers them
                pictures = [data_url(data.to_image(x)) for x in run.decode(tokens)]
                self.send(known=known.tolist(), pictures=pictures)

        self.send_records(run, run.paint_all([prompt], run.config.n, image and [image], on_step))

    def caption(self, run, _prompt, image):
        codes, _ = run.encode([image])
        self.send(picture=data_url(image), reconstruction=data_url(data.to_image(run.decode(codes)[0])))
        self.send_records(run, run.caption_all([image], run.config.n, self.stay))

    def send_records(self, run, groups):
        group = next(groups)
        for record in group:
            record.update(picture=data_url(record["picture"]), score=run.rerank_score(**record["scores"]))
            del record["tokens"]
        self.send(records=group)

    def head(self, status, kind):
        self.started = True
        self.send_response(status)
        for name, value in (("Content-Type", f"{kind}; charset=utf-8"), ("Cache-Control", "no-store"),
                            ("X-Frame-Options", "DENY"), ("X-Content-Type-Options", "nosniff")):
            self.send_header(name, value)
        self.end_headers()

    def send(self, **line):
        if not self.started:
            self.head(200, "application/x-ndjson")
        self.wfile.write(json.dumps(line).encode() + b"\n")

    def send_error(self, code, message=None, explain=None):
        """As the last line of an answer that has begun. Called by the base class, too."""
        with contextlib.suppress(OSError):
            if not self.started:
                self.head(code, "application/json")
            self.send(error=message or HTTPStatus(code).phrase)
            self.hang_up(socket.SHUT_WR)
            while self.deadline.is_alive() and self.connection.recv(2 ** 16):
                pass  # closing on what is not read yet would take the answer back

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """Serves a run's page. A thread a connection; the models are used by the first in the queue."""
    request_queue_size = 128
    server_bind = socketserver.TCPServer.server_bind  # looks up no name, which may take long

    def __init__(self, run, page):
        self.run, self.page, self.queue, self.ending = run, page.encode(), [], False
        Image.MAX_IMAGE_PIXELS = MOST["pixels"] // 2  # Pillow refuses what has twice as many
        self.reading, self.free = threading.Lock(), threading.Semaphore(MOST["connections"])
        self.address_family = socket.AF_INET6 if ":" in run.config.host else socket.AF_INET
        super().__init__((run.config.host, run.config.port), Handler)

    def process_request(self, request, client_address):
        if self.free.acquire(blocking=False):
            return super().process_request(request, client_address)
        with contextlib.suppress(OSError):
            request.sendall(b'HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\n\r\n'
                            b'{"error": "too many connections: try again later"}\n')
        self.shutdown_request(request)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # a client that left or was too slow
            super().handle_error(request, client_address)


def serve(run):
    """Until Ctrl-C or SIGTERM. Raises ValueError where there is no listening."""
    c, content = run.config, page(run, live=True)
    try:
        server = Server(run, content)
    except OSError as e:
        raise ValueError(f"cannot listen on --host {c.host} --port {c.port} ({e.strerror})") from None
    where = "localhost" if c.host in LOCAL else f"[{c.host}]" if ":" in c.host else c.host
    if c.host not in LOCAL:
        print("whoever reaches this port can use it: there is no password, no encryption")
    print(f"http://{where}:{server.server_address[1]} paints and captions; Ctrl-C ends it", flush=True)
    for number in (signal.SIGTERM, signal.SIGINT):  # which a shell's background job ignores
        signal.signal(number, signal.default_int_handler)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("\nended")
    finally:
        server.server_close()
        server.ending = True
        until = time.monotonic() + 5  # Python must not wind up under a thread that computes
        while server.queue and time.monotonic() < until:
            time.sleep(0.02)


def export(run, folder):
    """
    The run as weights alone: augvae_sl.pt, biart.pt and tokenizer.json in `folder`, to be used as the run is.
    Parameters are float16, half the size; the codebook stays as it is, for codes are compared by distance.
    """
    if os.path.isdir(folder) and os.path.samefile(folder, run.config.out_dir):
        raise ValueError(f"--export {folder} would overwrite the run: name another folder")
    os.makedirs(folder, exist_ok=True)
    for p in (*run.vae.parameters(), *run.biart.parameters()):
        p.data = p.data.half().float()
    words = {"preset", *TrainConfig.choices, *data.DataConfig.choices}  # other texts may be paths
    settings = {name: value for name, value in run.settings.items()
                if name in words or not isinstance(value, str)}
    parents = {"augvae": fingerprint(run.vae), "tokenizer": run.tokenizer.fingerprint()}
    for stage, model in (("augvae_sl", run.vae), ("biart", run.biart)):
        halved = {name: p.data.half() for name, p in model.named_parameters()}
        path = os.path.join(folder, f"{stage}.pt")
        save_checkpoint(path, {"stage": stage, "settings": settings, "progress": {"step": 0}, **parents,
                               "config": dataclasses.asdict(model.config),
                               "model": {**model.state_dict(), **halved}})
    run.tokenizer.save(os.path.join(folder, "tokenizer.json"))
    size = sum(os.path.getsize(os.path.join(folder, name))
               for name in ("augvae_sl.pt", "biart.pt", "tokenizer.json"))
    print(f"wrote {folder}, {size / 1e6:.1f} MB: `python sample.py --out_dir {folder}` uses it")


# -----------------------------------------------------------------------------
# Measurements

@torch.no_grad()
def bench(config):
    """
    Speed of decoding images, 12 layers of 512, medians: tokens/s from context 64 to 320 at batch 1 and 8; a
    whole image of 1024 tokens; how much longer a token takes at its end; cost of guidance.
    """
    context = Context(config.device, "float32" if config.dtype == "auto" else config.dtype, wide=False)
    torch.manual_seed(0)
    before = context.peak_gb()
    short, whole = (BiART(BiARTConfig(n_layer=12, n_head=8, n_embd=512, image_side=side)).eval()
                    .to(context.device, context.dtype) for side in (16, 32))
    text = torch.randint(0, short.config.end_token, (8, 64), device=context.device)

    def seconds(model, batch, left=None, **settings):
        """Of painting all tokens, or the last `left`."""
        codes = text.new_zeros(batch, model.config.n_image)
        prefix = codes[:, :-left] if left else None
        settings = {"prefix": prefix, "window": 1, **settings}
        times = [context.timeit(lambda: model.generate(text[:batch], "image", **settings))
                 for _ in range(4)]
        return median(times[1:])

    weights = sum(p.numel() for p in short.blocks.parameters()) + short.token["image"].weight.numel()
    memory = torch.ones(2 ** 28 if context.device.type == "cuda" else 2 ** 26, device=context.device)
    bandwidth = memory.nbytes / min(context.timeit(memory.sum) for _ in range(5))  # bytes/s of reading
    speed, share_of_floor, one = {}, {}, seconds(short, 1)
    for batch, taken in ((1, one), (8, seconds(short, 8))):
        cache = 2 * short.config.n_layer * short.config.n_embd * batch * (64 + 320) / 2  # its mean size
        floor = (weights + cache) * context.dtype.itemsize * 256 / bandwidth
        speed[str(batch)], share_of_floor[str(batch)] = batch * 256 / taken, floor / taken
        print(f"batch {batch}: {batch * 256 / taken:.1f} tokens/s from context 64 to 320, "
              f"{floor / taken:.0%} of what reading weights and cache at {bandwidth / 1e9:.0f} GB/s allows")
    guidance, image = seconds(short, 1, guidance=2.0) / one, seconds(whole, 1)
    windows = {}  # here no guess is ever right; in turns, as a machine's speed drifts
    for batch in (1, 8):
        pairs = [[context.timeit(functools.partial(short.generate, text[:batch], "image", window=window))
                  for window in (1, 0)] for _ in range(6)]
        windows[str(batch)] = median(a / b for a, b in pairs[1:])
    growth = (seconds(whole, 1, 96) - seconds(whole, 1, 32)) / 64 / (one / 256)
    print(f"guidance costs {guidance:.2f} times as much; a whole image of 1024 tokens takes {image:.1f} s; "
          f"a token at its end takes {growth:.2f} times as long; windows of guesses, none of them right: "
          f"{windows['1']:.2f} and {windows['8']:.2f} times the speed at batch 1 and 8")
    measured = {"tokens_per_s": speed, "share_of_floor": share_of_floor, "guidance_cost": guidance,
                "image_s": image, "growth": growth, "window_speed": windows,
                "median_s": one, "peak_gb": context.peak_gb() - before,
                "device": context.device_name(), "dtype": str(context.dtype)[6:], "size": [12, 512, 64, 320]}
    if config.json:
        print(json.dumps(measured))


# -----------------------------------------------------------------------------
# The command line

def check_uses(c, given):
    """Raises ValueError, a sentence, for settings that do not go together."""
    uses = [f"--{name}" for name in ("prompt", "prompts", "image", "reconstruct", "eval", "serve", "export")
            if getattr(c, name)]
    sampling = [f"--{name}" for name in ("temperature", "top_k", "top_p") if name in given]
    texts = ("prompt", "prompts", "image", "prefix", "reconstruct", "host", "export")
    mistakes = [
        *((name in given and not "".join(given[name]).strip(), f"--{name} is empty") for name in texts),
        *((getattr(c, name) and not c.image, f"--{name} needs --image")
          for name in ("keep_rows", "variations", "prefix")),
        (len(uses) > 1 and uses != ["--prompt", "--image"], f"{' and '.join(uses)} are different uses"),
        (c.prompt and c.image and not c.keep_rows, "--prompt with --image needs --keep_rows, how many"),
        (c.keep_rows and not (c.prompt or c.variations), "--keep_rows needs --prompt or --variations, too"),
        (c.prompt and (c.variations or c.prefix), "--variations and --prefix do not go with --prompt"),
        (c.prompts and not os.path.isfile(c.prompts), f"there is no file {c.prompts!r} for --prompts"),
        (c.html and (c.serve or c.export), "--html shows what is made: leave out --serve and --export"),
        (c.serve and c.n > MOST["n"], f"--serve paints {MOST['n']} pictures at a time, not {c.n}"),
        (c.beam and (c.prompt or c.prompts), "--beam searches for captions: it does not paint"),
        (c.beam and given.get("rerank", 1) > 1, "--beam and --rerank both choose captions: leave one out"),
        (c.beam and c.image and not c.variations and sampling,
         f"--beam {c.beam} searches and does not sample: leave out {' and '.join(sampling)}")]
    for made, sentence in mistakes:
        if made:
            raise ValueError(sentence)


def open_validation(run, given):
    """The run's validation data, or what is given, and, of built-in scenes, those of things never seen."""
    config, = configure({**run.settings, **given}, "biart", data.DataConfig)
    val = data.open_data(config, "val")
    if not val.captioned:
        raise ValueError(f"--data {config.data} has no captions to paint: name captioned data")
    return val, data.open_data(config, "heldout") if config.data == "scenes" else None


def main(argv):
    given = Parser((SampleConfig, data.DataConfig), {}, description=__doc__).settings(argv)
    config, = configure(given, "", SampleConfig)
    check_uses(config, given)
    if config.bench:
        return bench(config)
    if config.export:
        return export(Run(dataclasses.replace(config, device="cpu", dtype="float32")), config.export)
    run, scores = Run(config, biart=not config.reconstruct), None
    if config.serve:
        return serve(run)
    os.makedirs(run.save_dir, exist_ok=True)
    if config.reconstruct:
        shown = read_images(run, config.reconstruct)
        save_samples(run, "reconstructed", reconstructions(run, shown), min(8, len(shown)))
    elif config.image:
        save = save_repaintings if config.prompt or config.variations else save_captions
        save(run, read_images(run, config.image))
    elif config.prompt or config.prompts:
        prompts = [config.prompt] if config.prompt else data.decode_captions(
            Path(config.prompts).read_bytes(), config.prompts)
        save_samples(run, "painted", run.paint_all(prompts, config.n), sheet_columns(config.n))
    else:
        val, heldout = open_validation(run, given)
        if config.eval:
            scores = evaluate(run, val, heldout)
        else:
            save_both_directions(run, data.validation_subset(val, config.n))
    if config.html:
        path = os.path.join(run.save_dir, "page.html")
        Path(path).write_text(page(run), encoding="utf-8")
        print(f"wrote {path}")
    if scores:
        print(json.dumps(scores))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
