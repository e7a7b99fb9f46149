"""
Use a trained run: paint captions, caption images, complete either, look at reconstructions, score.

$ python sample.py                                  both ways on validation samples -> out/samples.png
$ python sample.py --prompt "a small red circle above a large blue square" --rerank 32
$ python sample.py --image picture.png folder       what do the pictures show?
$ python sample.py --image picture.png --beam 4     the likeliest captions; --prefix "there is a" begins them
$ python sample.py --image picture.png --prompt "a red circle ..." --keep_rows 4 keep the top, paint the rest
$ python sample.py --image picture.png --variations paint what the captions say of the picture
$ python sample.py --reconstruct a.png b.png        what do the image tokens keep?
$ python sample.py --eval                           scores on validation data, one JSON object last
$ python sample.py --serve                          a page to play with, on http://localhost:8000
$ python sample.py --export assets/scenes           what sampling needs of a run, to be used as --out_dir

Outputs go to --save_dir: pictures, a sheet of them (the first 64 rows) with captions, and samples.json
(prompts, seeds, settings, scores) or scores.json. To use a run from Python, see load().

References: SSIM, Wang et al. 2004; FID, Heusel et al. 2017, https://arxiv.org/abs/1706.08500 (with
pytorch-fid's network); BLEU, Papineni et al. 2002; ROUGE-L, Lin 2004; CIDEr-D, Vedantam et al. 2015,
https://arxiv.org/abs/1411.5726, as the MS-COCO caption evaluation computes them.
"""
import base64
import copy
import io
import json
import math
import os
import re
import signal
import sys
import threading
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import inf
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import augvae
import data
from augvae import AugVAE, build_model, fingerprint, read_checkpoint
from biart import BiART, BiARTConfig, Sampling
from tokenizer import Tokenizer
from train import GUIDANCE, Context, make_config, make_settings, parse, save_checkpoint

@dataclass
class SampleConfig:
    # The run
    out_dir: str = "out"  # folder of the run, as for train.py
    best: bool = False  # use BiART's checkpoint of the lowest validation loss instead of the last
    vae: str = ""  # AugVAE to use instead of the run's: a checkpoint of ours or a released one
    save_dir: str = ""  # folder for the outputs; empty: out_dir
    # What to do; by default both directions on validation samples
    prompt: str = ""  # paint this caption
    prompts: str = ""  # paint the captions in this text file, one a line
    image: tuple[str, ...] = ()  # caption these image files, and all images in these folders
    keep_rows: int = 0  # with --image: rows of tokens to keep; --prompt or --variations paints the rest
    variations: bool = False  # with --image: paint what the captions say of it
    prefix: str = ""  # with --image: how the captions begin
    reconstruct: tuple[str, ...] = ()  # show these images, and those in folders, beside their reconstructions
    eval: bool = False  # score reconstruction and both directions on validation data
    eval_items: int = 200  # validation samples to score
    data: str = ""  # layout of other validation data than the run's, as for train.py
    val_dir: str = ""  # that data
    val_captions: str = ""  # coco: its captions JSON
    serve: bool = False  # open a page to paint and caption on, for this machine alone
    port: int = 8000  # of that page; 0 takes a free one
    export: str = ""  # write what sampling needs of the run into this folder, parameters as float16
    bench: bool = False  # time decoding: of the run in --out_dir if given, else of a random model of 12 x 512
    # How to sample, in both directions
    n: int = 8  # samples of each input; without an input, validation samples to show
    batch_size: int = 24  # samples made at a time; they do not depend on it
    temperature: float = 1.0  # below 1 is more careful, 0 takes the likeliest token
    top_k: int = 0  # sample from the k likeliest tokens; 0: from all
    top_p: float = 1.0  # sample from the likeliest tokens that sum to this probability
    guidance: float = GUIDANCE["image"]  # of painting: above 1 follows the caption more closely
    caption_guidance: float = GUIDANCE["text"]  # of captioning
    seed: int = 0  # of the first sample; samples count up from it, inputs in steps of 1000
    rerank: int = 8  # draw so many candidates an input and show the n that explain it best; 1: as drawn
    rerank_forward: float = 0.2  # weight in it of log p(candidate | input), beside log p(input | candidate)
    beam: int = 0  # caption by a search with this many beams; 0 samples
    length_penalty: float = 1.0  # beams are ranked by log p / length ** this
    # Where and how to compute
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: cuda if there is one
    dtype: str = "auto"  # float32, bfloat16 or float16; auto: the fastest here
    download: bool = False  # fetch the networks of FID and LPIPS for --eval if torch hub's cache lacks them

    limits = {"eval_items": (1, inf), "port": (0, 65535), "n": (1, 1000), "batch_size": (1, inf),
              "temperature": (0, 1e6), "top_p": (1e-6, 1), "guidance": (0, 1e6), "caption_guidance": (0, 1e6),
              "seed": (0, 1e18), "rerank": (1, 1000), "rerank_forward": (0, 1)}  # of others: from 0
    choices = {"dtype": ("auto", "float32", "bfloat16", "float16")}

# -----------------------------------------------------------------------------
# A run: its models, and how they are sampled

def load(out_dir="out", **settings):
    """A trained run, to use from Python. Settings are fields of SampleConfig. ValueError if one is wrong.

    >>> run = load("out")
    >>> pictures = run.paint("a small red circle above a large blue square", n=4, rerank=8)  # PIL images
    >>> captions = run.caption(pictures[0], n=2, prefix="there is")  # strings
    >>> scores = run.score(captions[0], pictures[0])  # {"t2i": log p(image | caption), "i2t": ...}, nats
    >>> completed = run.paint("two crosses", image=pictures[0], keep_rows=4)"""
    return Run(make_config(SampleConfig, vars(SampleConfig(out_dir=out_dir, **settings))))

class Run:
    """The models of a run, and the settings to sample them with."""
    def __init__(self, config, biart=True):
        """Load AugVAE and, unless reconstructions are all that is wanted, BiART and its tokenizer."""
        self.config, self.save_dir = config, config.save_dir or config.out_dir
        self.context = Context(config.device, config.dtype)
        vae_path = config.vae or os.path.join(config.out_dir, "augvae_sl.pt")
        self.vae = AugVAE.load(vae_path).to(self.context.device)
        self.image_side = self.vae.config.single_level  # tokens
        if biart:
            path = os.path.join(config.out_dir, "biart_best.pt" if config.best else "biart.pt")
            checkpoint = read_checkpoint(path, "biart")
            self.settings = checkpoint["settings"]
            self.tokenizer = Tokenizer.load(os.path.join(config.out_dir, "tokenizer.json"))
            if checkpoint["augvae"] != fingerprint(self.vae):
                raise ValueError(f"{path} was trained with another AugVAE than {vae_path}")
            if checkpoint["tokenizer"] != self.tokenizer.fingerprint():
                raise ValueError(f"{path} was trained with another tokenizer than that of {config.out_dir}")
            self.biart = build_model(BiART, BiARTConfig, checkpoint, path)
            self.biart.to(self.context.device, self.context.dtype)

    def paint(self, prompt, n=1, image=None, **settings):
        """A caption -> n PIL images. They keep the first keep_rows rows of tokens of `image`, a PIL image."""
        groups = self.with_settings(**settings).paint_all([prompt], n, [image] if image else None)
        return [record["picture"] for record in next(groups)]

    def caption(self, image, n=1, **settings):
        """A PIL image -> n captions."""
        groups = self.with_settings(**settings).caption_all([image], n)
        return [record["caption"] for record in next(groups)]

    def score(self, caption, image):
        """Caption, PIL image -> {"t2i": log p(image | caption), "i2t": log p(caption | image)}, in nats."""
        text, (codes, _) = self.tokenize([caption]), self.encode([image])
        with self.context.autocast():
            return {"t2i": self.biart.log_likelihood(text, codes, "image")[0].item(),
                    "i2t": self.biart.log_likelihood(text, codes, "text")[0].item()}

    def paint_all(self, prompts, n=1, images=None, on_token=None):
        """Captions -> for each, one after the other, a list of n records, best first: {"picture": PIL image,
        "prompt", and what candidates() says}. images: PIL images to complete, one a caption."""
        self.check_kept(images)
        n_kept = self.config.keep_rows * self.image_side
        for indices in self.input_batches(len(prompts), n, "painting"):
            text = self.tokenize([prompts[i] for i in indices])
            prefix = self.encode([images[i] for i in indices])[0][:, :n_kept] if images else None
            for i, group in zip(indices, self.candidates(text, "image", n, indices, prefix, on_token)):
                pixels = self.decode(torch.stack([record["tokens"] for record in group[:n]]))
                yield [{"picture": data.to_image(x), "prompt": prompts[i], **record}
                       for x, record in zip(pixels, group)]

    def caption_all(self, images, n=1, on_token=None):
        """PIL images -> as paint_all(), with "caption" instead of "prompt"."""
        ids, n_text = self.tokenizer.encode(self.config.prefix.strip()), self.biart.config.n_text
        if len(ids) >= n_text:
            raise ValueError(f"--prefix has {len(ids)} tokens, and a whole caption at most {n_text}")
        for indices in self.input_batches(len(images), n, "captioning"):
            codes, pixels = self.encode([images[i] for i in indices])
            prefix = codes.new_tensor(ids).expand(len(indices), -1)
            for x, group in zip(pixels, self.candidates(codes, "text", n, indices, prefix, on_token)):
                yield [{"picture": data.to_image(x), **record,
                        "caption": self.tokenizer.decode(record["tokens"].tolist()).strip()}
                       for record in group[:n]]

    def candidates(self, ref, to, n, indices, prefix=None, on_token=None):
        """Generate, judge and rank: all uses come down to this.

        ref (B, n_ref): text for to="image", image codes for to="text". prefix (B, m): the first GEN tokens,
        None only for images. indices: the numbers of these inputs, for the seeds.
        -> for each input a list of at least n records, best first (as drawn with --rerank 1): {"tokens":
        (n_gen,), "seed": None for beams, "scores": {"forward": log p(candidate | input), "reverse":
        log p(input | candidate)}, nats}."""
        c = self.config
        searching = to == "text" and c.beam > 0
        n = c.beam if searching else max(n, c.rerank)
        repeated = ref.repeat_interleave(n, 0)
        with self.context.autocast():
            if searching:
                seeds = [None] * len(repeated)
                tokens, _ = self.biart.beam_search(ref, n, prefix, c.length_penalty, c.caption_guidance)
                tokens = tokens.flatten(0, 1)
                forward, _ = self.biart.log_likelihood(tokens, repeated, "text", prefix.shape[1])
            else:
                seeds = [c.seed + 1000 * i + j for i in indices for j in range(n)]
                guidance = c.guidance if to == "image" else c.caption_guidance
                sampling = Sampling(c.temperature, c.top_k, c.top_p, guidance)
                tokens, forward = self.biart.generate(ref, to, n, prefix, sampling, seeds, on_token)
            if to == "image":
                reverse, _ = self.biart.log_likelihood(repeated, tokens, "text")
            else:
                reverse, _ = self.biart.log_likelihood(tokens, repeated, "image")
        records = [{"tokens": row, "seed": seed, "scores": {"forward": round(f, 3), "reverse": round(r, 3)}}
                   for row, seed, f, r in zip(tokens, seeds, forward.tolist(), reverse.tolist())]
        groups = [records[i:i + n] for i in range(0, len(records), n)]
        if c.rerank > 1 and not searching:
            for group in groups:
                group.sort(key=self.rerank_score, reverse=True)
        return groups

    def rerank_score(self, record):
        """What --rerank sorts by. `reverse` alone would accept a deformed circle as a circle."""
        share, scores = self.config.rerank_forward, record["scores"]
        return share * scores["forward"] + (1 - share) * scores["reverse"]

    def input_batches(self, count, n, task):
        """The inputs' numbers, 0 ... count - 1, as many at a time as --batch_size allows."""
        drawn = max(n, self.config.rerank, self.config.beam)
        return data.progress(range(count), max(1, self.config.batch_size // drawn), task)

    def check_kept(self, images):
        """Raises ValueError unless images to complete and --keep_rows go together."""
        kept, side = self.config.keep_rows, self.image_side
        if bool(images) != bool(kept):
            raise ValueError("an image to complete needs --keep_rows, and the other way round")
        if kept >= side:
            raise ValueError(f"--keep_rows {kept} is not in 1 to {side - 1}, of {side} rows of tokens")

    def crop(self, image):
        """PIL image -> (3, size, size) in [-1, 1], as the models take it."""
        return data.crop_to_tensor(data.to_rgb(image), self.vae.config.image_size)

    def encode(self, images):
        """PIL images -> codes LongTensor (B, n), finest grid first, and the crops (B, 3, size, size)."""
        pixels = torch.stack([self.crop(image) for image in images]).to(self.context.device)
        with self.context.autocast():
            return torch.cat([grid.flatten(1) for grid in self.vae.encode(pixels)], 1), pixels

    def decode(self, codes):
        """Codes (B, n) as encode() gives them -> images (B, 3, size, size) in [-1, 1]."""
        sides = self.vae.config.grids
        grids = codes.split([side ** 2 for side in sides], dim=1)
        with self.context.autocast():
            return self.vae.decode([grid.view(-1, side, side) for grid, side in zip(grids, sides)]).float()

    def tokenize(self, captions):
        """Captions -> LongTensor (B, n_text). Says where one is cut."""
        n_text, rows = self.biart.config.n_text, []
        for caption in captions:
            ids, cut = self.tokenizer.encode_padded(caption, n_text)
            rows.append(ids)
            if cut:
                print(f"warning: a caption was cut to {self.tokenizer.decode(ids)!r}", file=sys.stderr)
        return torch.tensor(rows, device=self.context.device)

    def with_settings(self, **settings):
        """The same models with other sampling settings. The device stays the same."""
        other = copy.copy(self)
        other.config = make_config(SampleConfig, vars(replace(self.config, **settings)))
        return other

    def examples(self):
        """Prompts for the page: those in the run's prompts.txt."""
        path = os.path.join(self.config.out_dir, "prompts.txt")
        return data.clean_captions(data.read_text(path).split("\n")) if os.path.exists(path) else []

# -----------------------------------------------------------------------------
# Files in, files out

def read_images(run, paths):
    """Image files and folders -> records {"image": path, "picture": PIL image, as the models take it}. In a
    folder, unreadable images are left out with a warning. ValueError for others, and if no image is left."""
    records = []
    for path in paths:
        files = [path]
        if os.path.isdir(path):
            files = [os.path.join(path, name) for name in sorted(os.listdir(path))
                     if data.is_image(name) and not data.is_hidden(name)]
        for file in files:
            try:
                records.append({"image": file, "picture": data.to_image(run.crop(data.load_image(file)))})
            except data.Unreadable as e:
                if file == path:
                    raise
                print(f"warning: {e}", file=sys.stderr)
    if not records:
        raise ValueError(f"{', '.join(paths)} is not an image or a folder of images")
    return records

def save_samples(run, name, rows, columns=8):
    """Write records: each picture, as soon as it is there, to {name}_{i}.png; what is known of them to
    samples.json; and a sheet of pictures over their captions, the first 64 rows, to {name}.png."""
    entries, columns = [], columns if 2 <= columns <= 16 else 8  # no sheet of one column, or too wide
    for row in rows:
        for record in row:
            file = f"{name}_{len(entries)}.png"
            path = os.path.join(run.save_dir, file)
            record["picture"].save(path)
            known = {key: value for key, value in record.items() if key not in ("picture", "tokens")}
            entries.append({"file": file, **known})
            print(f"{path}: {label(record)}")
    save_json(run, "samples", entries)
    shown, path = entries[:64 * columns], os.path.join(run.save_dir, f"{name}.png")
    pictures = [data.load_image(os.path.join(run.save_dir, entry["file"])) for entry in shown]
    data.contact_sheet(pictures, [label(entry) for entry in shown], columns).save(path)
    which = ", the first 64 rows" if len(shown) < len(entries) else ""
    print(f"wrote {path}{which}")

def save_json(run, name, content):
    """{name}.json: the content, and the settings that made it."""
    path = os.path.join(run.save_dir, f"{name}.json")
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as f:  # not all file names are UTF-8
        json.dump({"settings": asdict(run.config), name: content}, f, indent=1, ensure_ascii=False)

def label(record):
    """The words under a picture."""
    if "prompt" in record:
        return f"paint: {record['prompt']}"
    if "caption" in record:
        return f"it says: {record['caption']}"
    return record["image"]

def reconstruct(run, paths):
    """Images, each beside what its tokens keep of it."""
    shown, pairs = read_images(run, paths), []
    for some in data.progress(shown, 8, "reconstruction"):
        decoded = run.decode(run.encode([record["picture"] for record in some])[0])
        for record, x in zip(some, decoded):
            pairs.append([record, {"picture": data.to_image(x), "image": f"{record['image']}, its tokens"}])
    save_samples(run, "reconstructed", pairs)

def caption_files(run):
    """--image: n captions of each image."""
    shown, n = read_images(run, run.config.image), run.config.n
    captioned = run.caption_all([record["picture"] for record in shown], n)
    rows = ([{**image, **record} for record in group] for image, group in zip(shown, captioned))
    save_samples(run, "captioned", rows, min(n, run.config.beam or n))

def repaint_files(run):
    """--image with --prompt or --variations: each image, then n pictures that begin with its first rows."""
    c, shown = run.config, read_images(run, run.config.image)
    images, n = [record["picture"] for record in shown], c.n
    if c.variations:
        captioned = list(run.caption_all(images, n))
        n = len(captioned[0])  # with --beam, at most that many
        prompts = [record["caption"] for group in captioned for record in group]
        repeated = [image for image in images for _ in range(n)]
        painted = run.paint_all(prompts, 1, repeated if c.keep_rows else None)
    else:
        painted = run.paint_all([c.prompt] * len(images), n, images)
    painted = [record for group in painted for record in group]
    rows = [[record, *painted[i * n:(i + 1) * n]] for i, record in enumerate(shown)]
    save_samples(run, "repainted", rows, n + 1)

def paint_prompts(run):
    """--prompt or --prompts: n pictures of each caption."""
    c, prompts = run.config, [run.config.prompt]
    if c.prompts:
        prompts = data.decode_captions(Path(c.prompts).read_bytes(), c.prompts)
    save_samples(run, "painted", run.paint_all(prompts, c.n), c.n)

def show_both_directions(run, dataset):
    """Validation samples: a caption, painted, and beside it the image, captioned anew."""
    references = [dataset.captions(i) for i in range(len(dataset))]
    painted = run.paint_all([captions[0] for captions in references])
    captioned = run.caption_all([dataset.image(i) for i in range(len(dataset))])
    pairs = []
    for captions, paintings, found in zip(references, painted, captioned):
        pairs.append([paintings[0], {**found[0], "references": captions}])
    save_samples(run, "samples", pairs)

# -----------------------------------------------------------------------------
# Metrics of pictures

def psnr(x, y):
    """Images (B, 3, H, W) in [0, 1], twice -> peak signal-to-noise ratio (B,), dB, at most 100."""
    return -10 * (x - y).square().mean((1, 2, 3)).clamp_min(1e-10).log10()

def ssim(x, y):
    """Images (B, C, H, W) in [0, 1], twice, 11 pixels or more -> structural similarity (B,), at most 1."""
    x, y = x.cpu().double(), y.cpu().double()  # Apple's GPUs have no float64
    # a Gaussian window, sigma 1.5, as in Wang et al. 2004
    window = torch.exp(-torch.arange(-5, 6).double().square() / (2 * 1.5 ** 2))
    window = (torch.outer(window, window) / window.sum() ** 2).expand(x.shape[1], 1, 11, 11)
    mx, my, xx, yy, xy = (F.conv2d(z, window, groups=len(window)) for z in (x, y, x * x, y * y, x * y))
    vx, vy, vxy = xx - mx * mx, yy - my * my, xy - mx * my  # variances and covariance
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    index = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return index.mean((1, 2, 3))

# Name in torch hub's cache, first digits of the SHA-256 hash, address
FID_FILE = ("pt_inception-2015-12-05-6726825d.pth", "6726825d", "https://github.com/mseitzer/pytorch-fid/"
            "releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth")

class FIDInception(nn.Module):
    """FID's network, PIL images of one size -> features (B, 2048): Inception v3 with other pooling."""
    def __init__(self, download=True):
        super().__init__()
        from torchvision.models import inception_v3  # imported here because nothing else needs it
        path = augvae.find_weights(*FID_FILE, download)
        net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        net.load_state_dict(augvae.safe_load(path))
        for block in net.children():
            if hasattr(block, "branch_pool"):
                block.register_forward_hook(self.replace_pooling)
        net.fc = nn.Identity()
        self.net = net.eval().requires_grad_(False)

    def replace_pooling(self, block, inputs, output):
        """Compute a block's last branch again: with averages that leave out the padding, or a maximum."""
        if block is self.net.Mixed_7c:
            pooled = F.max_pool2d(inputs[0], 3, stride=1, padding=1)
        else:
            pooled = F.avg_pool2d(inputs[0], 3, stride=1, padding=1, count_include_pad=False)
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
    """FID of features (N, D) and (M, D): |mean_x - mean_y|^2 + tr(C_x) + tr(C_y) - 2 tr((C_x C_y)^(1/2)). A
    QR decomposition gives C = R'R, and the last trace is the sum of the singular values of R_x R_y'."""
    if min(len(x), len(y)) < 2:
        raise ValueError(f"FID needs two sets of at least 2 images, not {len(x)} and {len(y)}")
    x, y = x.double(), y.double()
    rx = torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5).R
    ry = torch.linalg.qr((y - y.mean(0)) / (len(y) - 1) ** 0.5).R
    root = torch.linalg.svdvals(rx @ ry.T).sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + rx.square().sum() + ry.square().sum() - 2 * root).item()

# -----------------------------------------------------------------------------
# Metrics of captions. `captions` are lists of words, `references` holds for each a list of such lists.

ABBREVIATION = r"(?:mr|mrs|ms|dr|st|vs|etc|ave|no)\.|(?:[^\W\d_]\.){2,}"
ENDING = r"'(?:s|m|d|re|ve|ll)\b"
WORD = re.compile(rf"{ABBREVIATION}|{ENDING}|\d+(?:[.,:]\d+)+|[#@]?\w+(?:[-/.']+\w+)*|[^\w\s]")
PUNCTUATION = set(".,:;?!-'\"`()[]{}…–—“”‘")

def caption_words(caption):
    """The words of a caption by the MS-COCO convention: the Penn Treebank's, in lower case, without
    punctuation. "A dog's t-shirt isn't here!" -> ["a", "dog", "'s", "t-shirt", "is", "n't", "here"]"""
    text = caption.lower().replace("’", "'")
    text = re.sub(r"\b(can(?=not\b)|(?:gon|wan)(?=na\b)|got(?=ta\b)|(?:gim|lem)(?=me\b))", r"\1 ", text)
    text = re.sub(rf"(?<=\w)(n't\b|{ENDING})", r" \1", text)
    return [word for word in WORD.findall(text) if word not in PUNCTUATION]

def ngrams(words, n):
    """Count all runs of n words."""
    return Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))

def bleu(captions, references):
    """Corpus BLEU-1 to BLEU-4. A caption's length is compared with the reference nearest in length."""
    logs, length, reference_length = [], sum(len(words) for words in captions), 0
    for n in range(1, 5):
        matched, total = 0, 0
        for words, others in zip(captions, references):
            found, allowed = ngrams(words, n), Counter()
            for other in others:
                allowed |= ngrams(other, n)  # the larger count of each n-gram
            matched += sum((found & allowed).values())  # the smaller count
            total += sum(found.values())
        logs.append(math.log((matched + 1e-15) / (total + 1e-9)))
    for words, others in zip(captions, references):
        differences = [len(other) - len(words) for other in others]
        reference_length += len(words) + min(differences, key=lambda d: (abs(d), d))
    brevity = math.exp(min(0, 1 - (reference_length + 1e-9) / (length + 1e-15)))
    return [brevity * math.exp(sum(logs[:n]) / n) for n in range(1, 5)]

def common_length(a, b):
    """Length of the longest common subsequence of two lists of words."""
    best = [0] * (len(b) + 1)  # best[j]: of b[:j] and the words of a so far
    for word in a:
        before = best.copy()
        for j, other in enumerate(b):
            best[j + 1] = before[j] + 1 if word == other else max(before[j + 1], best[j])
    return best[-1]

def rouge_l(captions, references):
    """ROUGE-L: the mean F-measure (beta 1.2) of the longest common subsequence."""
    total = 0.0
    for words, others in zip(captions, references):
        words, others = words or [""], [other or [""] for other in others]
        lengths = [common_length(words, other) for other in others]
        precision = max(lengths) / len(words)
        recall = max(length / len(other) for length, other in zip(lengths, others))
        if precision and recall:
            total += (1 + 1.2 ** 2) * precision * recall / (recall + 1.2 ** 2 * precision)
    return total / len(captions)

def cider_d(captions, references):
    """CIDEr-D, 0 to 10. An n-gram counts less, the more images have it in references; one image scores 0."""
    documents, total = Counter(), 0.0  # images in whose references an n-gram occurs
    for others in references:
        documents.update({gram for other in others for n in range(1, 5) for gram in ngrams(other, n)})

    def tf_idf(words, n):
        return {gram: count * (math.log(len(captions)) - math.log(max(1, documents[gram])))
                for gram, count in ngrams(words, n).items()}

    for words, others in zip(captions, references):
        for other in others:
            # the reference implementation counts bigrams: an empty caption is as long as one word
            difference = max(1, len(words)) - max(1, len(other))
            penalty = math.exp(-difference ** 2 / (2 * 6.0 ** 2))
            for n in range(1, 5):
                x, y = tf_idf(words, n), tf_idf(other, n)
                product = sum(min(x[gram], y[gram]) * y[gram] for gram in x if gram in y)
                norm = math.hypot(*x.values()) * math.hypot(*y.values())
                total += 10 / 4 * penalty * product / (norm or 1) / len(others)
    return total / len(captions)

def caption_scores(captions, references):
    """Captions, and for each a list of right ones, texts -> {"bleu1", ... "bleu4", "rouge_l", "cider_d"}."""
    captions = [caption_words(caption) for caption in captions]
    references = [[caption_words(other) for other in others] for others in references]
    scores = {f"bleu{n}": value for n, value in enumerate(bleu(captions, references), 1)}
    return {**scores, "rouge_l": rouge_l(captions, references), "cider_d": cider_d(captions, references)}

# -----------------------------------------------------------------------------
# Scores of a run

RETRIEVAL_PAIRS = 64  # images for retrieval, each scored with each caption

def evaluate(run, val, heldout):
    """Score a run on validation data, and on kinds of scenes never seen (or None) -> all scores by name."""
    inception = load_metric(run, FIDInception)
    val = data.validation_subset(val, run.config.eval_items)
    scores = {**reconstruction_scores(run, val, inception), **likelihood_scores(run, val),
              **generation_scores(run, val, inception)}
    if heldout:
        heldout = data.validation_subset(heldout, run.config.eval_items)
        for name, value in generation_scores(run, heldout, inception).items():
            scores[f"{name}_heldout"] = value
    scores = {name: round(value, 4) for name, value in scores.items()}
    save_json(run, "scores", scores)
    return scores

def load_metric(run, network):
    """-> a metric's network on the run's device, or None, with a message, where its weights are missing."""
    try:
        return network(download=run.config.download).to(run.context.device)
    except OSError as error:
        if run.config.download:
            raise
        print(f"{network.__name__} is left out ({error}); --download fetches it")

def reconstruction_scores(run, val, inception=None):
    """-> "psnr", "ssim", "codebook_use", "perplexity", and "lpips", "rfid" where there are weights."""
    metrics, lpips, side = {"psnr": psnr}, None, run.vae.config.image_size
    if side >= 11:  # its window
        metrics["ssim"] = ssim
    if side >= 16:  # VGG halves it four times
        lpips = load_metric(run, augvae.LPIPS)
    if lpips:
        metrics["lpips"] = lambda x, y: lpips(2 * x - 1, 2 * y - 1)
    totals, originals, reconstructions = dict.fromkeys(metrics, 0.0), [], []
    counts = torch.zeros(run.vae.config.codebook_size)
    for indices in data.progress(range(len(val)), 50, "reconstruction"):
        codes, pixels = run.encode([val.image(i) for i in indices])
        decoded = run.decode(codes)
        for name, metric in metrics.items():
            totals[name] += metric((pixels + 1) / 2, (decoded + 1) / 2).sum().item()
        counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
        originals += [data.to_image(image) for image in pixels]
        reconstructions += [data.to_image(image) for image in decoded]
    scores = {name: total / len(val) for name, total in totals.items()}
    if inception:
        scores["rfid"] = frechet_distance(inception(originals), inception(reconstructions))
    scores["codebook_use"], scores["perplexity"] = augvae.codebook_use(counts).tolist()
    return scores

def likelihood_scores(run, val):
    """-> "t2i_bits", "i2t_bits": bits per generated token; "t2i_recall1", "t2i_recall5": how often the right
    image is among the 1 or 5 that explain a caption best, by log p(caption | image); "i2t_recall1" and
    "i2t_recall5": the same of captions that explain an image."""
    text = run.tokenize(data.one_caption_each([val.captions(i) for i in range(len(val))]))
    image = torch.cat([run.encode([val.image(i) for i in indices])[0]
                       for indices in data.progress(range(len(val)), 50, "encoding")])
    sides, n, scores = {"text": text, "image": image}, min(RETRIEVAL_PAIRS, len(val)), {}
    for direction, query, answer in (("t2i", "text", "image"), ("i2t", "image", "text")):
        pairs = {query: sides[query][:n].repeat(n, 1), answer: sides[answer][:n].repeat_interleave(n, 0)}
        with run.context.autocast():
            log_p, n_tokens = run.biart.log_likelihood(text, image, to=answer)
            table, _ = run.biart.log_likelihood(**pairs, to=query)
        scores[f"{direction}_bits"] = -log_p.sum().item() / math.log(2) / n_tokens.sum().item()
        table = table.view(n, n)  # log p(query | answer): a row an answer, a column a query
        n_better = (table > table.diag()).sum(0)  # answers that explain a query better than the right one
        for k in (1, 5):
            scores[f"{direction}_recall{k}"] = (n_better < k).double().mean().item()
    return scores

def generation_scores(run, dataset, inception=None):
    """Paint a caption of each item and caption each image -> caption_scores(), "fid" and, of built-in scenes,
    "t2i_exact", "i2t_exact", the shares that are right in everything said. They score the candidates drawn
    first, and with --rerank also the best: "..._rerank"."""
    references = [dataset.captions(i) for i in range(len(dataset))]
    images = [data.to_image(run.crop(dataset.image(i))) for i in range(len(dataset))]
    prompts, n, scores = data.one_caption_each(references), run.config.rerank, {}

    def first_and_best(group):
        # The smallest seed was drawn first. Beams have none
        return min(group, key=lambda record: record["seed"] or 0), group[0]

    painted = [first_and_best(group) for group in run.paint_all(prompts, n)]
    captioned = [first_and_best(group) for group in run.caption_all(images, n)]
    for i, suffix in enumerate(["", "_rerank"] if n > 1 else [""]):
        pictures = [records[i]["picture"] for records in painted]
        captions = [records[i]["caption"] for records in captioned]
        found = caption_scores(captions, references)
        rates = data.exact_rates(prompts, pictures, references, captions)
        found.update({f"{direction}_exact": rate for direction, rate in rates.items()})
        if inception:
            found["fid"] = frechet_distance(inception(images), inception(pictures))
        scores.update({name + suffix: value for name, value in found.items()})
    return scores

# -----------------------------------------------------------------------------
# A page in the browser, for this machine alone

MAX_BYTES = 10_000_000  # of a request
REQUEST = {"prompt": str, "image": str, "n": int, "temperature": (int, float), "top_k": int,
           "top_p": (int, float), "guidance": (int, float), "seed": int, "keep_rows": int}

def serve(run):
    """Serve the page until Ctrl-C or SIGTERM ends the process. ValueError where the port cannot be used."""
    try:
        server = PageServer(run)
    except OSError as e:
        raise ValueError(f"cannot listen on --port {run.config.port} ({e.strerror})") from None
    print(f"http://localhost:{server.server_address[1]} paints and captions; Ctrl-C ends it", flush=True)
    # An ordinary exit would shut torch down while other threads still compute, and crash
    for number in (signal.SIGTERM, signal.SIGINT):  # background jobs of a shell ignore SIGINT otherwise
        signal.signal(number, lambda *_: os._exit(0))
    server.serve_forever()

class PageServer(ThreadingHTTPServer):
    """A thread for each request. The lock `models` gives the run to one of them at a time."""
    def __init__(self, run):
        super().__init__(("127.0.0.1", run.config.port), PageHandler)
        self.run, self.models = run, threading.Lock()
        content = {"title": Path(run.config.out_dir).absolute().name, "side": run.image_side,
                   "prompts": run.examples(), "max_bytes": MAX_BYTES,
                   "settings": {name: getattr(run.config, name) for name in REQUEST}}
        text = json.dumps(content).replace("<", "\\u003c")  # so "</script>" in a prompt cannot end the script
        template = Path(__file__).with_name("assets") / "page.html"
        self.page = template.read_text(encoding="utf-8").replace(">DATA<", f">{text}<").encode()

class PageHandler(BaseHTTPRequestHandler):
    """GET / answers with the page. POST /paint and /caption answer with lines of JSON: {"notes":
    [sentences]}; as tokens come, {"known": number, "pictures": [URLs]} or {"captions": [...]}; last
    {"records": [...]} or {"error": sentence}. A client that leaves ends its work: writing raises OSError."""
    timeout = 20  # seconds that one read or write may take
    started = False  # whether the status has been sent

    def do_GET(self):
        try:
            self.answer()
        except ValueError as e:
            self.send_error(400, str(e))
        except OSError:
            pass  # the client has left
        except Exception:
            self.send_error(500, "something went wrong: the server's terminal says what")
            raise

    do_POST = do_GET

    def answer(self):
        host = self.headers.get("Host", "")  # another name for this machine: DNS rebinding, an attack
        ours = host.split(":")[0] in ("localhost", "127.0.0.1")
        if not ours or self.headers.get("Origin", f"http://{host}") != f"http://{host}":
            raise ValueError("this server answers its own page only")
        if self.command == "GET" and self.path == "/":
            self.send(page=self.server.page)
        elif self.command == "POST" and self.path in ("/paint", "/caption"):
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > MAX_BYTES:
                raise ValueError(f"a request needs a Content-Length of at most {MAX_BYTES:,} bytes")
            body = self.rfile.read(int(length))
            with self.server.models:
                self.work(*read_request(self.server.run, body))
        else:
            raise ValueError("there is nothing at this address")

    def work(self, run, prompt, image):
        def show(tokens, n_known):
            if not prompt:
                self.send(captions=[run.tokenizer.decode(row[:n_known].tolist()) for row in tokens])
            elif n_known % run.image_side == 0:
                self.send(known=n_known, pictures=[data_url(data.to_image(x)) for x in run.decode(tokens)])

        _, cut = run.tokenizer.encode_padded(prompt, run.biart.config.n_text)
        self.send(notes=["The prompt is too long: its end was cut off."] if cut else [])
        if prompt:
            groups = run.paint_all([prompt], run.config.n, [image] if image else None, on_token=show)
        else:
            groups = run.caption_all([image], run.config.n, on_token=show)
        records = next(groups)
        for record in records:
            record.update(picture=data_url(record["picture"]), score=run.rerank_score(record))
            del record["tokens"]
        self.send(records=records)

    def send(self, status=200, page=None, **line):
        """Write the page or a line of JSON. The first call writes the header, too."""
        if not self.started:
            self.started = True
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if page else "application/x-ndjson")
            self.end_headers()
        self.wfile.write(page or json.dumps(line).encode() + b"\n")

    def send_error(self, code, message=None, explain=None):  # the base class calls it, too
        self.send(code, error=message or "the request cannot be read")

def read_request(run, body):
    """JSON -> the run with the settings in it, the prompt or "", a PIL image or None. Raises ValueError."""
    asked = json.loads(body)
    if not isinstance(asked, dict):
        raise ValueError("the request is not a JSON object")
    for name, value in asked.items():
        if not isinstance(value, REQUEST.get(name, ())):
            raise ValueError(f"{name[:50]} cannot be {str(value)[:50]!r}")
    prompt, image = asked.pop("prompt", "").strip(), asked.pop("image", "")
    if not prompt and not image:
        raise ValueError("the request needs a prompt or an image")
    n = asked.pop("n", run.config.n)
    run = run.with_settings(**asked, n=n, rerank=n)
    if prompt:
        run.check_kept(image)
    if image:
        file = io.BytesIO(base64.b64decode(image))
        image = data.load_image(file, name="the file", formats=("PNG", "JPEG", "GIF", "WEBP", "BMP"))
    return run, prompt, image or None

def data_url(picture):
    png = io.BytesIO()
    picture.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()

# -----------------------------------------------------------------------------
# Export and speed

def export(run, folder):
    """The files of a run that sampling needs. Parameters become float16, but not the codebook, since
    codes are chosen by small differences."""
    os.makedirs(folder, exist_ok=True)
    if os.path.samefile(folder, run.config.out_dir):
        raise ValueError(f"--export {folder} would overwrite the run: name another folder")
    for p in (*run.vae.parameters(), *run.biart.parameters()):
        p.data = p.data.half().float()
    settings = {name: run.settings[name] for name in ("preset", "data") if name in run.settings}
    made_from = {"augvae": fingerprint(run.vae), "tokenizer": run.tokenizer.fingerprint()}
    for stage, model in (("augvae_sl", run.vae), ("biart", run.biart)):
        weights = model.state_dict()
        weights.update({name: p.data.half() for name, p in model.named_parameters()})
        content = {"stage": stage, "settings": settings, **made_from, "config": asdict(model.config)}
        save_checkpoint(os.path.join(folder, f"{stage}.pt"), {**content, "model": weights})
    run.tokenizer.save(os.path.join(folder, "tokenizer.json"))
    if run.examples():
        Path(folder, "prompts.txt").write_text("\n".join(run.examples()), encoding="utf-8")
    print(f"wrote {folder}: `python sample.py --out_dir {folder}` uses it")

@torch.no_grad()
def bench(config, given):
    """Tokens a second of decoding images, of one and of 8 at a time, with and without guidance."""
    if "out_dir" in given:
        run = Run(config)
        context, model = run.context, run.biart
    else:
        context = Context(config.device, config.dtype)
        model = BiART(BiARTConfig(n_layer=12, n_head=8, n_embd=512, image_side=16)).eval()
        model.to(context.device, context.dtype)
    c = model.config
    text = torch.full((8, c.n_text), c.pad_token, device=context.device)
    for batch, guidance in ((1, 1.0), (8, 1.0), (1, 4.0), (8, 4.0)):
        paint = partial(model.generate, text[:batch], "image", sampling=Sampling(guidance=guidance))
        with context.autocast():
            seconds = median(context.timeit(paint) for _ in range(3))
        print(f"batch {batch}, guidance {guidance:g}: {batch * c.n_image / seconds:.0f} tokens/s, "
              f"{seconds:.2f} s, {batch} x {c.n_image} tokens on {context.device}, {str(context.dtype)[6:]}")
    print(f"{context.peak_gb():.2f} GB at most")

# -----------------------------------------------------------------------------
# The command line

def check_uses(c, given):
    """Raises ValueError, a sentence, for settings that do not go together."""
    def refuse(wrong, sentence):
        if wrong:
            raise ValueError(sentence)

    for name in ("prompt", "prompts", "image", "prefix", "reconstruct", "export"):
        refuse(name in given and not "".join(given[name]).strip(), f"--{name} is empty")
    for name in ("keep_rows", "variations", "prefix"):
        refuse(getattr(c, name) and not c.image, f"--{name} needs --image")
    for name in ("prefix", "beam"):
        refuse(getattr(c, name) and (c.prompt or c.prompts), f"--{name} is for captions: it does not paint")
    uses = ("prompt", "prompts", "image", "variations", "reconstruct", "eval", "serve", "export", "bench")
    uses = [f"--{name}" for name in uses if getattr(c, name)]
    pairs = (["--prompt", "--image"], ["--image", "--variations"])
    refuse(len(uses) > 1 and uses not in pairs, f"{' and '.join(uses)} are different uses")
    refuse(c.keep_rows and uses == ["--image"], "--keep_rows needs --prompt or --variations, too")
    drawing = [f"--{name}" for name in ("rerank", "temperature", "top_k", "top_p") if name in given]
    refuse(c.beam and uses == ["--image"] and drawing, f"with --beam, leave out {' and '.join(drawing)}")

def open_validation(run, given):
    """The validation data of the run or the command line; and scenes with things never seen, or None."""
    named = {name: given[name] for name in ("data", "val_dir", "val_captions") if name in given}
    config = make_settings({**run.settings, **named}, "biart").data
    val = data.open_data(config, "val")
    if not val.captioned:
        raise ValueError(f"--data {config.data} has no captions to paint: name captioned data")
    return val, data.open_data(config, "heldout") if config.data == "scenes" else None

def main(argv):
    given = parse(argv, __doc__, SampleConfig)
    config = make_config(SampleConfig, given)
    check_uses(config, given)
    if config.bench:
        return bench(config, given)
    if config.export:
        return export(Run(replace(config, device="cpu", dtype="float32")), config.export)
    run = Run(config, biart=not config.reconstruct)
    if config.serve:
        return serve(run)
    os.makedirs(run.save_dir, exist_ok=True)
    if config.reconstruct:
        reconstruct(run, config.reconstruct)
    elif config.image and (config.prompt or config.variations):
        repaint_files(run)
    elif config.image:
        caption_files(run)
    elif config.prompt or config.prompts:
        paint_prompts(run)
    else:
        val, heldout = open_validation(run, given)
        if config.eval:
            print(json.dumps(evaluate(run, val, heldout)))
        else:
            show_both_directions(run, data.validation_subset(val, config.n))

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # the console may lack a character
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
    except KeyboardInterrupt:
        sys.exit("sample.py: interrupted")
