"""
Captioned pictures: where they come from, how they reach a model, and how they are drawn again.

A data set has `len()`, `captions(i) -> list of str`, `image(i, min_side=0) -> PIL image in RGB`, which may be
shrunk as long as its shorter side stays at min_side pixels, and `fingerprint() -> str`. Layouts, `--data`:

    scenes    built in: one or two coloured shapes, drawn on the fly, deterministic, no download
    fake      random pixels and random words, of any size, to measure with
    imagenet  train/ and val/; beside them, if any, train_list.txt, val_list.txt: `relative/path.JPEG label`
    folder    any tree of images
    pairs     images, each with a text file of the same stem: one caption a line
    coco      a folder of images and a JSON of captions: MS-COCO's own, or the Karpathy split
    tsv       lines `caption TAB path of the image`, as of Conceptual Captions
    tar       WebDataset shards: key.jpg, key.txt (one caption a line), the next key, ...

A view turns samples into tensors: Pixels for AugVAE, Tokens (encoded once, mapped into memory) for BiART.
`batches()` feeds either, endlessly; which sample comes when is a pure function of seed, epoch, rank, world
and step. A sample that cannot be read raises Unreadable, is logged, and another takes its place.

The built-in scenes come with an oracle. `read_scene` reads the attributes back from pixels and
`parse_caption` from words, so text-to-image and image-to-text are scored by whether the content is right.
"""
import contextlib
import datetime
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import sys
import tarfile
import textwrap
import time
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps


@dataclass
class DataConfig:
    data: str = "scenes"  # scenes (built in), imagenet, folder, pairs, coco, tsv, tar or fake
    train_dir: str = ""  # folder; tsv: the file; tar: shards, as x{00..99}.tar, a glob, a,b or @list
    train_captions: str = ""  # coco: captions JSON of the training images
    val_dir: str = ""  # validation data, as train_dir
    val_captions: str = ""  # coco: captions JSON of the validation images
    n_scenes: int = 12288  # scenes, fake: how many different ones to train on
    fake_size: tuple[int, ...] = (256, 256)  # fake: width and height, pixels
    index_dir: str = ""  # tar: folder for the shards' indices; empty: beside the shards
    shuffle_buffer: int = 4096  # tar: how many samples are shuffled among each other, besides the shards
    crop_scale: float = 0.75  # least share of the centre square's area in a training crop; 1 = centre crop
    crop_of: str = "square"  # what crop_scale is a share of: centre square, or picture: all of it (release)
    workers: int = 0  # loader processes per rank; 0 reads in the training process

    limits = {"n_scenes": "[1, inf)", "shuffle_buffer": "[0, inf)", "crop_scale": "(0, 1]",
              "workers": "[0, inf)"}
    choices = {"data": ("scenes", "fake", "imagenet", "folder", "pairs", "coco", "tsv", "tar"),
               "crop_of": ("square", "picture")}


class Dataset:
    """What all layouts have in common: n samples. The fingerprint leaves out what is in the images."""
    captioned = True  # whether captions(i) holds any
    shard_starts = None  # of data in few large files, to be read front to back: the first sample of each

    def __len__(self):
        return self.n


def fingerprint(*parts):
    """Arrays and plain values -> a short hash."""
    h = hashlib.sha256()
    for part in parts:
        h.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return h.hexdigest()[:16]


# -----------------------------------------------------------------------------
# Built-in scenes: one or two things, each with size, colour and shape, and how the first lies to the second

SIZES = {"small": 4, "large": 8}  # radius, pixels
COLOURS = {"red": (214, 48, 49), "orange": (240, 128, 30), "yellow": (245, 203, 32), "lime": (160, 215, 50),
           "green": (30, 140, 80), "teal": (20, 150, 150), "cyan": (110, 210, 240), "blue": (41, 98, 216),
           "purple": (142, 68, 173), "pink": (235, 100, 165), "brown": (125, 75, 40), "black": (45, 52, 54)}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "star", "hourglass", "arrow")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0),  # where the first thing lies
             "above": (0, -1), "below": (0, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
WORDS = {"small": ("small", "little"), "large": ("large", "big"), "left of": ("left of", "to the left of"),
         "right of": ("right of", "to the right of"), "above": ("above", "over"), "below": ("below", "under")}
# How a caption begins, and which article it uses; with "the", a relation is stated. A scene has one of each,
# and those after the first N_FULL leave attributes out.
PHRASES = (("", "a"), ("there is ", "a"), ("", "the"), ("we see ", "a"), ("", "a"), ("", ""))
N_FULL, N_BACKWARD = 4, 1
SCENE_SIDE = 40  # pixels
BACKGROUND = (250, 248, 242)
# Pixels. Things lie on this lattice, and most corners on it or half of it, so that cells of this side see the
# same edges in things of either size and of several shapes, as small parts of natural pictures recur, too.
LATTICE = 4


def held_out(thing):
    """
    Whether a kind of thing, (size, colour, shape), is drawn in no training and no validation scene: one kind
    in eight, spread so that every pair of its attributes occurs in other kinds, and every one often.
    """
    size, colour, shape = (list(of).index(word) for of, word in zip((SIZES, COLOURS, SHAPES), thing))
    return (colour + 3 * shape + 4 * size) % 8 == 0


def outline(shape, x, y, r):
    """Corners of a shape of radius r around (x, y); None for a circle, which has none."""
    half = {  # right half, from top to bottom, in radii; the left one mirrors it
        "square": [(1, -1), (1, 1)],
        "triangle": [(0, -1), (1, 1)],
        "cross": [(0.5, -1), (0.5, -0.5), (1, -0.5), (1, 0.5), (0.5, 0.5), (0.5, 1)],
        "diamond": [(0, -1), (1, 0), (0, 1)],
        "star": [(0, -1), (0.36, -0.42), (1, -0.36), (0.55, 0.2), (0.7, 1), (0, 0.62)],
        "hourglass": [(1, -1), (0, 0), (1, 1)],
        "arrow": [(0, -1), (1, 0), (0.5, 0), (0.5, 1)]}.get(shape)
    corners = half and half + [(-dx, dy) for dx, dy in reversed(half)]
    return corners and [(x + dx * r, y + dy * r) for dx, dy in corners]


def draw_things(things, centres, scale=4):
    """[(size, colour, shape)], [(x, y)] in pixels -> 40x40 PIL image, antialiased by drawing `scale`-fold."""
    image = Image.new("RGB", (SCENE_SIDE * scale,) * 2, BACKGROUND)
    draw = ImageDraw.Draw(image)
    for (size, colour, shape), (x, y) in zip(things, centres):
        x, y, r = x * scale, y * scale, SIZES[size] * scale
        corners = outline(shape, x, y, r)
        if corners:
            # Pillow draws the right and the lower edge, too
            draw.polygon([(cx - (cx > x), cy - (cy > y)) for cx, cy in corners], fill=COLOURS[colour])
        else:
            draw.ellipse((x - r, y - r, x + r - 1, y + r - 1), fill=COLOURS[colour])
    return image.reduce(scale)


def paraphrases(things, relation, rng):
    """
    One or two (size, colour, shape), and the relation of two -> six captions, of which two leave attributes
    out: "a red circle left of something small". Five go from left to right or from top to bottom, as most
    people do, and one, any of them, the other way: were it three and three, which thing is named first would
    not tell where it lies, and the two could be told apart only after what the relation means is known.
    """
    def name(thing, article, full):
        kept = 7 if full else rng.randrange(1, 8)  # three bits, one an attribute
        words = [rng.choice(WORDS.get(word, (word,))) for i, word in enumerate(thing) if kept >> i & 1]
        if not kept & 4:  # no shape
            return "something " + " and ".join(words)
        if article == "a" and (words[0][0] in "aeiou" or words[0] == "hourglass"):
            article = "an"
        return " ".join([article, *words]).strip()

    captions, backward = [], rng.sample(range(len(PHRASES)), N_BACKWARD)
    for i, (beginning, article) in enumerate(PHRASES):
        in_order, rel = things, relation
        if relation and (i in backward) == (relation in ("left of", "above")):
            in_order, rel = things[::-1], OPPOSITE[relation]
        first, *second = (name(thing, article, i < N_FULL) for thing in in_order)
        link = ["is"] * (article == "the") + [rng.choice(WORDS[rel])] if second else []
        captions.append(beginning + " ".join([first, *link, *second]))
    return captions


def split_of(things, relation):
    """`heldout` where one of the things is; else one combination in ten of things and relation is `val`."""
    if any(map(held_out, things)):
        return "heldout"
    key = repr(sorted(facts(things, relation)))
    return "val" if zlib.crc32(key.encode()) % 10 == 0 else "train"


class Scenes(Dataset):
    """Scene i of `train`, `val` or `heldout` depends on (split, i) alone; the splits share no combination."""

    def __init__(self, split, n):
        self.split, self.n = split, n

    def scene(self, i):
        """-> (things, relation or None, centres, captions); one scene in four has a single thing."""
        rng = random.Random(f"scene {self.split} {i}")
        while True:
            things = [(rng.choice(list(SIZES)), rng.choice(list(COLOURS)), rng.choice(SHAPES))
                      for _ in range(1 if rng.random() < 0.25 else 2)]
            relation = rng.choice(list(RELATIONS)) if len(things) == 2 else None
            if split_of(things, relation) == self.split:
                break
        return things, relation, place_things(relation, rng), paraphrases(things, relation, rng)

    def fingerprint(self):
        return fingerprint("scenes", self.split, self.n)

    def image(self, i, min_side=0):
        things, _, centres, _ = self.scene(i)
        return draw_things(things, centres)

    def captions(self, i):
        return self.scene(i)[-1]


def place_things(relation, rng):
    """-> centres [(x, y)] in pixels on the lattice: of a thing alone, or of two in this relation."""
    if not relation:
        return [(LATTICE * rng.randint(2, 8), LATTICE * rng.randint(2, 8))]
    near, far = ([LATTICE * along, LATTICE * rng.randint(4, 6)]
                 for along in rng.choice(((2, 7), (2, 8), (3, 8))))
    centres = [near, far] if relation in ("left of", "above") else [far, near]
    upright = relation in ("above", "below")
    return [(across, along) if upright else (along, across) for along, across in centres]


def facts(things, relation):
    """
    The content of a scene, or of a caption, where None is what it leaves out -> statements, frozenset of
    (size, colour, shape, relation, size, colour, shape), the same whichever thing is named first.
    """
    if not relation:
        return frozenset({(*things[0], "alone", None, None, None)})
    first, second = things
    return frozenset({(*first, relation, *second), (*second, OPPOSITE[relation], *first)})


def matches(said, seen):
    """Whether what a caption says, as facts(), holds of a scene's facts. Either may be None: it does not."""
    return bool(said and seen) and any(all(word in (None, fact) for word, fact in zip(statement, truth))
                                       for statement in said for truth in seen)


def parse_caption(caption):
    """A caption in the built-in grammar -> its facts(); None for anything else."""
    text = " " + " ".join(caption.lower().split()) + " "
    for plain, words in (*WORDS.items(), ("a", ("an",))):
        for word in sorted(words, key=len, reverse=True):
            text = text.replace(f" {word} ", f" {plain} ")
    size, colour, shape = ("|".join(words) for words in (SIZES, COLOURS, SHAPES))
    thing = (rf"(?:(?:(?:a|the) )?(?:({size}) )?(?:({colour}) )?({shape})|something"
             rf"(?: ({size}))?(?: (?:and )?({colour}))?) ")
    grammar = rf" (?:there is |we see )?{thing}(?:(?:is )?({'|'.join(RELATIONS)}) {thing})?"
    match = re.fullmatch(grammar, text)
    if not match:
        return None
    found = match.groups()
    things = [(a or d, b or e, c) for a, b, c, d, e in (found[:5], found[6:])]
    return facts(things, found[5]) if any(things[0]) or found[5] else None


def one_caption_each(references):
    """One of each item's captions; which one changes from item to item."""
    return [captions[i % len(captions)] for i, captions in enumerate(references)]


def exact_rates(prompts, pictures, references, captions):
    """
    Of scenes: {"t2i": share of the pictures that hold what their prompts say, "i2t": share of the captions
    that say what holds of the scene}. What a prompt or caption leaves out may be anything. references: the
    scenes' own captions, of which the first leaves nothing out. {} for other captions.
    """
    said, scenes = map(parse_caption, prompts), [parse_caption(of_scene[0]) for of_scene in references]
    if not all(scenes):
        return {}
    right = {"t2i": list(map(matches, said, map(read_scene, pictures))),
             "i2t": list(map(matches, map(parse_caption, captions), scenes))}
    return {way: sum(found) / len(scenes) for way, found in right.items()}


def components(mask):
    """A boolean array (h, w) -> boolean arrays of its 4-connected components, largest first."""
    padded = np.zeros(np.add(mask.shape, 2), int)
    labels = padded[1:-1, 1:-1]
    labels[mask] = np.arange(1, mask.sum() + 1)
    while True:  # every pixel takes the largest label around it until nothing changes
        around = padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]
        spread = functools.reduce(np.maximum, around, labels) * mask
        if (spread == labels).all():
            break
        labels[:] = spread
    ids, sizes = np.unique(labels[labels > 0], return_counts=True)
    return [labels == i for i in ids[np.argsort(-sizes)]]


def template(size, shape):
    """How a thing of this size and shape covers a 19 x 19 field around its centre: shares in [0, 1]."""
    image = draw_things([(size, "black", shape)], [(SCENE_SIDE // 2, SCENE_SIDE // 2)])
    dark = np.asarray(image.convert("L"), np.float32)
    return ((dark.max() - dark) / (dark.max() - dark.min()))[11:30, 11:30]


TEMPLATES = {}  # (size, shape) -> template(), filled at first use


def read_scene(image):
    """
    The oracle: a PIL image, scaled to 40x40 -> its facts(), or None where it shows neither one thing nor two.
    Colour is the nearest of the twelve in a thing's inside; size and shape are the template that fits best;
    the relation is the longer way from one centre to the other.
    """
    if not TEMPLATES:
        TEMPLATES.update({(size, shape): template(size, shape) for size in SIZES for shape in SHAPES})
    pixels = np.asarray(image.resize((SCENE_SIDE, SCENE_SIDE), Image.BOX), np.float32)
    palette = np.array(list(COLOURS.values()), np.float32)
    distance = np.linalg.norm(pixels - np.float32(BACKGROUND), axis=2)
    found = []
    for mask in components(distance > 60):
        if mask.sum() < 12:
            break
        colour = np.median(pixels[mask & (distance >= np.median(distance[mask]))], axis=0)
        nearest = int(np.linalg.norm(palette - colour, axis=1).argmin())
        # How far each pixel is on the way from the background to the thing's colour, against each template
        cover = np.clip(distance / np.linalg.norm(colour - np.float32(BACKGROUND)), 0, 1) * mask
        ys, xs = np.nonzero(mask)
        x, y = (xs.min() + xs.max()) // 2, (ys.min() + ys.max()) // 2
        around = np.pad(cover, 12)[y + 2:y + 24, x + 2:x + 23]  # a field that can shift by one, down by two
        fields = np.lib.stride_tricks.sliding_window_view(around, (19, 19))[:, :, None]  # (4, 3, 1, 19, 19)
        errors = np.square(fields - list(TEMPLATES.values())).sum((3, 4))  # (4, 3, templates)
        size, shape = list(TEMPLATES)[errors.min((0, 1)).argmin()]
        found.append(((size, list(COLOURS)[nearest], shape), (x, y)))
    if len(found) == 1:
        return facts([found[0][0]], None)
    if len(found) != 2:
        return None
    (first, (x1, y1)), (second, (x2, y2)) = found
    dx, dy = int(x1) - int(x2), int(y1) - int(y2)
    step = ((dx > 0) - (dx < 0), 0) if abs(dx) > abs(dy) else (0, (dy > 0) - (dy < 0))
    relation = next((name for name, way in RELATIONS.items() if way == step), None)
    return facts([first, second], relation) if relation else None


# -----------------------------------------------------------------------------
# Reading and writing files, and what to do with those that cannot be read

IMAGE_EXTENSIONS = {"bmp", "gif", "jfif", "jpeg", "jpg", "png", "ppm", "tif", "tiff", "webp"}


class Unreadable(ValueError):
    """An image, caption file or shard cannot be read; the message is one sentence that names it."""


def write_fault(log, fault):
    """Add a sentence to a text file; without one, to stderr."""
    if not log:
        return print(fault, file=sys.stderr)
    with open(log, "a", encoding="utf-8", errors="backslashreplace") as f:
        f.write(fault + "\n")


def count_read_errors(log):
    """How many different sentences a log holds."""
    with contextlib.suppress(FileNotFoundError), open(log, "rb") as f:
        return len(set(f))
    return 0


def load_image(file, min_side=0, name=None, formats=None):
    """
    Any file that Pillow reads (a path, or an open file and its name) -> PIL image in RGB, upright by its EXIF
    tag, transparency laid over white, 16-bit grey scaled to 8. A JPEG is decoded at 1/2, 1/4 or 1/8 of its
    size where its shorter side stays at `min_side` pixels or more; 0 keeps its size. `formats`: Pillow's
    names of those to try, None for all.
    Raises Unreadable where it is no whole image, or has more pixels than twice Pillow's MAX_IMAGE_PIXELS.
    """
    try:
        with Image.open(file, formats=formats) as image:
            if min_side:
                image.draft("RGB", (min_side, min_side))
            image.load()
            with contextlib.suppress(Exception):  # what broken EXIF data raises, which costs the turn alone
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip instead of scale
                image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as e:  # broken files make Pillow's decoders fail in every way
        why = getattr(e, "strerror", None) or " ".join(str(e).split()) or type(e).__name__
        raise Unreadable(f"{name or file} is not an image that can be read ({why})") from None


def read_bytes(path, start=0, size=-1):
    """-> `size` bytes of a file from `start` on; all of them, if negative."""
    try:
        with open(path, "rb") as f:
            f.seek(start)
            return f.read(size)
    except OSError as e:
        raise Unreadable(f"there is no file {path} that can be read ({e.strerror})") from None


def decode_text(content, name):
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise Unreadable(f"{name} is not UTF-8 (byte {e.start})") from None


def read_text(path):
    return decode_text(read_bytes(path), path)


def decode_captions(content, name):
    """The bytes of a caption file -> its captions, one a line. Raises Unreadable if not UTF-8 or if empty."""
    captions = [line.strip() for line in decode_text(content, name).split("\n") if line.strip()]
    if not captions:
        raise Unreadable(f"caption file {name} is empty")
    return captions


@contextlib.contextmanager
def atomic_write(path, aside=None, part=None):
    """
    Open a file for writing, named `part` until all is written and on disk, and `path` then. The file that was
    there before can be moved `aside`. Raises OSError where it cannot be written, and leaves that one alone.
    """
    part = part or f"{path}.part"
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if aside:
            os.replace(path, aside)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # torch.save turns a full disk into a RuntimeError
        raise OSError(f"{path} could not be written ({e}); what was there before is untouched") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(part)


class ProgressLine:
    """
    How far rank 0 is with something that takes long:
        encoding: 1,280 of 12,288 (10%), 412.0/s, 0:00:27 left
    A terminal shows one line that is overwritten; elsewhere, as in a log file, there is one every 5 seconds.
    """
    def __init__(self, what, total, start=0):
        self.what, self.total, self.start, self.terminal = what, total, start, sys.stdout.isatty()
        self.began = self.shown = time.monotonic()

    def show(self, done):
        now, finished = time.monotonic(), done == self.total
        due = now - self.shown > (0.5 if self.terminal else 5.0) or finished and self.shown > self.began
        if due and os.environ.get("RANK", "0") == "0":  # as torchrun sets it
            self.shown, speed = now, (done - self.start) / (now - self.began)
            left = datetime.timedelta(seconds=round((self.total - done) / speed))
            print(f"{self.what}: {done:,} of {self.total:,} ({done / self.total:.0%}), {speed:,.1f}/s, "
                  f"{left} left", end="     \r" if self.terminal and not finished else "\n", flush=True)


def progress(items, size, what):
    """Yield a sequence in chunks of `size`, with a ProgressLine."""
    line = ProgressLine(what, len(items))
    for start in range(0, len(items), size):
        yield items[start:start + size]
        line.show(min(start + size, len(items)))


def try_read(read, *args):
    """-> (read(*args), ""), or (None, what is wrong) where that raises Unreadable."""
    try:
        return read(*args), ""
    except Unreadable as e:
        return None, str(e)


def read_each(read, indices):
    """-> try_read(read, i) of each index, as two lists: results, faults."""
    return zip(*(try_read(read, i) for i in indices))


class Batches(torch.utils.data.Dataset):
    """[a batch of keys] -> read(keys)"""

    def __init__(self, read):
        self.read = read

    def __getitem__(self, keys):
        return self.read(keys)


def load(read, batches_of_keys, log="", workers=0, n=1000):
    """
    Yield the results of read(keys) -> (results, faults) for batches of keys. A fault says what was wrong with
    one of the samples read, or "", and is logged once. Raises OSError where there are no results, or more
    than half of the first thousand reads (of all n, if fewer) have failed.
    """
    loader = torch.utils.data.DataLoader(Batches(read), batch_size=None, sampler=batches_of_keys,
                                         collate_fn=tuple, num_workers=workers,
                                         pin_memory=torch.cuda.is_available(),
                                         generator=torch.Generator())  # leaves the global one as it is
    logged, reads, failures = {""}, 0, 0
    for results, faults in loader:
        reads, failures = reads + len(faults), failures + sum(map(bool, faults))
        for fault in faults:
            if fault not in logged:
                logged.add(fault)
                write_fault(log, fault)
        if results is None or failures > min(n, 1000) / 2 and 2 * failures > reads:
            raise OSError(f"{failures} of {reads} samples could not be read"
                          + (f": {log} names them" if log else ""))
        yield results


CHUNK = 64  # samples that are read, and of a token cache encoded, together


def read_chunks(read, indices, what, log="", workers=0, n=None):
    """
    Yield (64 indices, [read(i) of each, or None where it is Unreadable]), with progress(). Raises OSError
    where most of them, or of the n that they are a rest of, cannot be read.
    """
    chunks = [indices[i:i + CHUNK] for i in range(0, len(indices), CHUNK)]
    return zip(progress(indices, CHUNK, what),
               load(functools.partial(read_each, read), chunks, log, workers, n or len(indices)))


# -----------------------------------------------------------------------------
# Layouts on disk

class ImageFiles(Dataset):
    """
    Images by {path below a root: its captions, if any}: what most layouts come down to.
    Raises ValueError where there is none, `what` being what was looked for, or none of a hundred is there.
    """

    def __init__(self, source, root, captions, what="image"):
        if not captions:
            raise ValueError(f"{source} holds no {what}")
        some = list(captions)[::-(-len(captions) // 100)]
        if not any(os.path.lexists(os.path.join(root, path)) for path in some):
            raise ValueError(f"there is no {os.path.join(root, some[0])}, nor another image of {source}")
        self.root, self.captioned = root, any(captions.values())
        records = ["\0".join([path, *texts]).encode("utf-8", "surrogatepass")
                   for path, texts in captions.items()]
        self.n, self.ends = len(records), np.cumsum([len(record) for record in records])
        # in one piece, which loader processes share; of a list of strings each would soon have a copy
        self.records = np.frombuffer(b"".join(records), np.uint8)

    def record(self, i):
        """-> [path, caption, caption, ...]"""
        content = self.records[self.ends[i - 1] if i else 0:self.ends[i]].tobytes()
        return content.decode("utf-8", "surrogatepass").split("\0")

    def fingerprint(self):
        return fingerprint(self.records, self.ends)

    def image(self, i, min_side=0):
        return load_image(os.path.join(self.root, self.record(i)[0]), min_side)

    def captions(self, i):
        return [text.encode("utf-8", "replace").decode() for text in self.record(i)[1:]]


def list_files(folder):
    """
    All files below a folder, as sorted paths relative to it. Links are followed, but into no folder twice: a
    loop of links ends. Raises ValueError where there is no such folder, OSError where one cannot be listed.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"there is no folder {folder!r}")

    def refuse(error):
        raise OSError(f"folder {error.filename} cannot be read ({error.strerror})")

    found, visited = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        if os.path.realpath(parent) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(parent))
        folders.sort()
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in files]
    return sorted(found)


def is_image(path):
    return os.path.splitext(path)[1][1:].lower() in IMAGE_EXTENSIONS


def read_folder(folder):
    return ImageFiles(folder, folder, dict.fromkeys(filter(is_image, list_files(folder)), ()))


def read_imagenet(folder):
    """Images named in FOLDER_list.txt, by paths from it or from the list; without a list, all in it."""
    listing = f"{os.path.normpath(folder)}_list.txt"
    if not os.path.exists(listing):
        return read_folder(folder)
    paths = [line.rsplit(None, 1)[0] for line in read_text(listing).split("\n") if len(line.split()) > 1]
    below = any(os.path.exists(os.path.join(folder, path)) for path in paths[:100])
    return ImageFiles(listing, folder if below else os.path.dirname(listing), dict.fromkeys(paths, ()))


class Pairs(ImageFiles):
    """Images with a caption file of the same path but for the ending `.txt`; others are left out."""

    def __init__(self, folder):
        paths = list_files(folder)
        stems = {path[:-4] for path in paths if path.endswith(".txt")}
        images = [path for path in filter(is_image, paths) if os.path.splitext(path)[0] in stems]
        super().__init__(folder, folder, dict.fromkeys(images, ()), "image with a text file of the same stem")
        self.captioned = True

    def captions(self, i):
        path = os.path.join(self.root, os.path.splitext(self.record(i)[0])[0] + ".txt")
        return decode_captions(read_bytes(path), path)


def read_coco(folder, captions, split):
    """
    A folder of images, and a JSON of one of two kinds. MS-COCO's own: `images` (id, file_name) and
    `annotations` (image_id, caption). The Karpathy split: `images` (filepath if any, filename, split,
    sentences with `raw`), of which `train` takes train and restval. Images without a caption are left out.
    Raises ValueError where a file is missing, broken, or empty.
    """
    text, texts = read_text(captions), {}
    try:
        record = json.loads(text)
        if "annotations" in record:
            for annotation in record["annotations"]:
                texts.setdefault(annotation["image_id"], []).append(str(annotation["caption"]))
            items = [(str(image["file_name"]), texts.get(image["id"])) for image in record["images"]]
        else:
            splits = ("train", "restval") if split == "train" else (split,)
            items = [(os.path.join(image.get("filepath", ""), image["filename"]),
                      [str(sentence["raw"]) for sentence in image["sentences"]])
                     for image in record["images"] if image["split"] in splits]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{captions} is neither a COCO captions JSON (`images` and `annotations`) nor a "
                         f"Karpathy split ({type(e).__name__}: {e})") from None
    captioned = {path: several for path, several in items if several}
    return ImageFiles(captions, folder, captioned, "captioned image")


def read_tsv(path):
    """Lines `caption TAB path`, paths from where the file lies; lines of one path belong to one image."""
    texts = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        caption, image, *_ = (field.strip() for field in f"{line}\t".split("\t"))
        if line.strip():
            if not caption or not image:
                raise ValueError(f"{path}, line {number}: {line[:60]!r} is not a caption, a tab, and a path")
            texts.setdefault(image, []).append(caption)
    return ImageFiles(path, os.path.dirname(path), texts, "captioned image")


class Fake(Dataset):
    """Images of random pixels, a caption of eight random words each; a pure function of (split, i)."""

    def __init__(self, split, n, size):
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"--fake_size {','.join(map(str, size))} is not a width,height such as 500,375")
        self.split, self.n, self.size = split, n, size

    def fingerprint(self):
        return fingerprint("fake", self.split, self.n, self.size)

    def image(self, i, min_side=0):
        rng = np.random.RandomState(zlib.crc32(f"{self.split} {i}".encode()))
        return Image.frombytes("RGB", tuple(self.size), rng.bytes(3 * self.size[0] * self.size[1]))

    def captions(self, i):
        return [" ".join(random.Random(f"fake {self.split} {i}").choices((*COLOURS, *SHAPES), k=8))]


# -----------------------------------------------------------------------------
# Tar shards

# Where in its shard a sample's image and text begin, and their lengths, in bytes; 0 and 0 without a text
SAMPLE = np.dtype([("image", "i8"), ("image_size", "i8"), ("text", "i8"), ("text_size", "i8")])


def expand_shards(pattern):
    """
    "a/{00..02}.tar,b/*.tar,@list.txt" -> ["a/00.tar", "a/01.tar", "a/02.tar", "b/x.tar", ..., and the lines
    of the list, as paths from where it lies]; of a folder, its *.tar. Raises ValueError where one is no file.
    """
    found = []
    for part in filter(None, re.split(r",(?![^{]*})", pattern)):  # at the commas outside braces
        if part.startswith("@"):
            lines = filter(None, map(str.strip, read_text(part[1:]).split("\n")))
            names = [os.path.join(os.path.dirname(part[1:]), line) for line in lines]
        else:
            names = expand_braces(os.path.join(part, "*.tar") if os.path.isdir(part) else part)
        found += [path for name in names for path in sorted(glob.glob(name)) or [name]]
    for path in found or [pattern]:
        if not os.path.isfile(path):
            raise ValueError(f"there is no tar shard {path}")
    return found


def expand_braces(pattern):
    """"{08..10}{a,b}" -> ["08a", "08b", "09a", ...], as in a shell."""
    match = re.search(r"{([^{}]*)}", pattern)
    if not match:
        return [pattern]
    names, span = match[1].split(","), re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        names = [f"{i:0{len(span[1])}d}" for i in range(int(span[1]), int(span[2]) + 1)]
    before, after = pattern[:match.start()], expand_braces(pattern[match.end():])
    return [before + name + rest for name in names for rest in after]


def index_shard(path):
    """
    A tar -> its samples that have an image, an array of SAMPLE in the order of the file, and what is wrong
    with it, or "". Reads headers alone. Members of one path, up to the name's first dot, are one sample.
    """
    members, fault = [], ""
    try:
        with tarfile.open(path, "r:") as tar:
            with contextlib.suppress(tarfile.ReadError):  # cut inside a member: the block at tar.offset tells
                for member in tar:
                    members.append(member)
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # what a whole tar ends with
                fault = f"tar shard {path} is cut or damaged at byte {tar.offset:,}"
    except tarfile.ReadError as e:
        fault = f"{path} is not a tar shard that can be read ({e}); compressed ones have to be unpacked"
    samples = {}  # {(folder, key): {"image" or "txt": (offset, size)}}
    for member in members:
        folder, name = os.path.split(member.name)
        key, _, extension = name.partition(".")
        kind = "image" if extension.lower() in IMAGE_EXTENSIONS else extension.lower()
        if kind in ("image", "txt") and member.isreg():
            samples.setdefault((folder, key), {}).setdefault(kind, (member.offset_data, member.size))
    found = np.array([(*sample["image"], *sample.get("txt", (0, 0))) for sample in samples.values()
                      if "image" in sample], SAMPLE)
    ends = np.maximum(found["image"] + found["image_size"], found["text"] + found["text_size"])
    return found[ends <= os.path.getsize(path)], fault


def load_shard_index(path, index_dir):
    """index_shard(), kept beside the shard or in index_dir, by a name that tells if the shard has changed."""
    stat = os.stat(path)
    name = f"{os.path.basename(path)}.{stat.st_size:x}.{stat.st_mtime_ns:x}.npz"
    if index_dir:
        name = f"{zlib.crc32(os.path.abspath(path).encode()):08x}_{name}"
    index_path = os.path.join(index_dir or os.path.dirname(path), name)
    if not os.path.exists(index_path):
        try:
            samples, fault = index_shard(path)
        except OSError as e:  # which may pass, and so is not kept
            return np.zeros(0, SAMPLE), f"tar shard {path} cannot be read ({e.strerror})"
        try:  # ranks may write one at once, each under a name of its own
            with atomic_write(index_path, part=f"{index_path}.{os.getpid()}.part") as f:
                np.savez(f, samples=samples, fault=np.array(fault))
        except OSError as e:
            raise OSError(f"the index {e}; --index_dir names another folder for it") from None
    with np.load(index_path) as found:
        return found["samples"], str(found["fault"])


class Tar(Dataset):
    """
    WebDataset shards, read where their indices say. Samples without a text are left out where others have
    one. Of shards that are cut, what is whole is used. Indices take 20 to 30 s per million members, once, and
    ranks that start together share the work.
    Raises ValueError where no sample is left, OSError where an index cannot be written.
    """

    def __init__(self, paths, index_dir="", log=""):
        if index_dir:
            os.makedirs(index_dir, exist_ok=True)
        shuffled = random.Random().sample(paths, len(paths))  # each rank begins with other shards
        indices = {path: load_shard_index(path, index_dir)
                   for [path] in progress(shuffled, 1, "indexing tar shards")}
        shards, faults = zip(*(indices[path] for path in paths))
        for fault in filter(None, faults):
            write_fault(log, fault)
        samples, shard = np.concatenate(shards), np.repeat(np.arange(len(paths)), list(map(len, shards)))
        has_text = samples["text_size"] > 0
        self.captioned = bool(has_text.any())
        usable = has_text if self.captioned else ~has_text
        self.samples, self.n = samples[usable], int(usable.sum())
        used, self.shard_starts = np.unique(shard[usable], return_index=True)
        self.paths = [paths[i] for i in used]
        if not self.paths:
            raise ValueError(f"none of the {len(paths)} tar shards, {paths[0]} for one, holds an image")

    def fingerprint(self):
        return fingerprint([os.path.basename(path) for path in self.paths], self.shard_starts, self.samples)

    def read(self, i, kind):
        """-> bytes of the image or text of sample i, and what to call it."""
        path = self.paths[np.searchsorted(self.shard_starts, i, "right") - 1]
        start, size = int(self.samples[i][kind]), int(self.samples[i][f"{kind}_size"])
        content = read_bytes(path, start - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE + size)
        name = content[:100].rstrip(bytes(1)).decode("utf-8", "replace")  # a member's header begins with it
        return content[tarfile.BLOCKSIZE:], f"{path}: {name}"

    def image(self, i, min_side=0):
        content, name = self.read(i, "image")
        return load_image(io.BytesIO(content), min_side, name)

    def captions(self, i):
        return decode_captions(*self.read(i, "text")) if self.captioned else []


# -----------------------------------------------------------------------------
# Data sets by their names, and parts of them

UNCAPTIONED = ("imagenet", "folder")  # layouts that have no captions


def open_data(config, split, log=""):
    """
    DataConfig, and `train`, `val` or, for scenes, `heldout` -> data set; broken tar shards go to the log.
    Raises ValueError where settings are missing or contradict, or where there is no data.
    """
    n = config.n_scenes if split == "train" else 1024
    where, captions = (getattr(config, f"{split}_{name}", "") for name in ("dir", "captions"))
    needs = {"scenes": "", "fake": "", "coco": f"IMAGES and --{split}_captions JSON", "tsv": "FILE.tsv",
             "tar": "SHARDS"}.get(config.data, "FOLDER")
    if where and not needs:
        raise ValueError(f"--data {config.data} reads no --{split}_dir {where}: name its layout by --data")
    if needs and not where or config.data == "coco" and not captions:
        raise ValueError(f"--data {config.data} needs --{split}_dir {needs}")
    return {"scenes": lambda: Scenes(split, n), "fake": lambda: Fake(split, n, config.fake_size),
            "imagenet": lambda: read_imagenet(where), "folder": lambda: read_folder(where),
            "pairs": lambda: Pairs(where), "coco": lambda: read_coco(where, captions, split),
            "tsv": lambda: read_tsv(where),
            "tar": lambda: Tar(expand_shards(where), config.index_dir, log)}[config.data]()


class Subset(Dataset):
    """Some items of a data set, as a data set."""

    def __init__(self, dataset, indices):
        self.dataset, self.indices = dataset, indices
        self.n, self.captioned = len(indices), dataset.captioned

    def fingerprint(self):
        return fingerprint(self.dataset.fingerprint(), self.indices)

    def image(self, i, min_side=0):
        return self.dataset.image(self.indices[i], min_side)

    def captions(self, i):
        return self.dataset.captions(self.indices[i])


def validation_subset(dataset, count, log=""):
    """`count` samples (all, if fewer) drawn at random from those that can be read, the same each time."""
    order = np.random.RandomState(0).permutation(len(dataset)).tolist()
    read = functools.partial(read_each, lambda i: bool((dataset.captions(i), dataset.image(i, 64))))
    results = load(read, [[i] for i in order], log, n=len(order))
    readable = (i for i, [found] in zip(order, results) if found)
    return Subset(dataset, list(itertools.islice(readable, count)))


def all_captions(dataset, log=""):
    """Every caption that can be read."""
    chunks = read_chunks(dataset.captions, range(len(dataset)), "reading captions", log)
    return [caption for _, results in chunks for captions in results if captions for caption in captions]


# -----------------------------------------------------------------------------
# Crops

def crop_to_tensor(image, size, scale=1.0, rng=None, crop_of="square"):
    """
    PIL image -> float tensor (3, size, size) in [-1, 1]: the centre square, or, given an rng, a random square
    of `scale` to 1 times its area. With crop_of="picture", times the picture's area: ten tries at a square
    that has room, and else the centre square (as torchvision's RandomResizedCrop).
    """
    w, h = image.size
    side = min(w, h)
    x, y = (w - side) // 2, (h - side) // 2
    if rng and scale < 1:
        area = {"square": side * side, "picture": w * h}[crop_of]
        tries = (max(1, round((area * rng.uniform(scale, 1)) ** 0.5)) for _ in range(10))
        fitting = next((tried for tried in tries if tried <= side), None)
        if fitting:
            side = fitting
            x, y = rng.randint(0, w - side), rng.randint(0, h - side)
    if side != max(w, h):
        image = image.crop((x, y, x + side, y + side))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, side, side), uint8
    if side != size:  # as Pillow would resize it, to within rounding, in half the time
        pixels = F.interpolate(pixels[None], size=(size, size), mode="bilinear", antialias=True)[0]
    return pixels.float().div_(127.5).sub_(1)


def min_crop_side(size, scale):
    """The shorter side, in pixels, of the image whose smallest crop has side `size`. See crop_to_tensor."""
    return math.ceil(size / scale ** 0.5)


class Pixels:
    """Images alone, for AugVAE: item(i, rng) -> (tensor (3, size, size) in [-1, 1],)."""

    def __init__(self, dataset, size, crop_scale, crop_of="square"):
        self.dataset, self.size, self.crop_scale, self.crop_of = dataset, size, crop_scale, crop_of
        self.shard_starts = dataset.shard_starts

    def __len__(self):
        return len(self.dataset)

    def item(self, i, rng):
        image = self.dataset.image(i, min_crop_side(self.size, self.crop_scale))
        return (crop_to_tensor(image, self.size, self.crop_scale, rng, self.crop_of),)


# -----------------------------------------------------------------------------
# The order of samples, and their batches

class ResumableBatchSampler:
    """
    Batches of (index, position), endlessly: epoch after epoch, each a fresh permutation of the data, cut into
    global batches of world * batch_size, of which every rank takes its own stretch. `position` counts the
    samples that all ranks have drawn since training began; `start` is the one to begin with, on any number of
    ranks. An epoch may end inside a batch, where the next goes on: nothing is dropped or doubled.

    Of shards, given by the first sample of each, the permutation is one that reads files from front to back:
    shards in a random order, every sample moved by up to `shuffle_buffer` places, and each rank on shards of
    its own.
    """

    def __init__(self, n, batch_size, *, seed=0, start=0, rank=0, world=1, shard_starts=None,
                 shuffle_buffer=4096):
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.start, self.rank, self.world = start, rank, world
        self.shard_starts, self.shuffle_buffer = shard_starts, shuffle_buffer

    def permutation(self, epoch):
        """-> (n,), which sample comes at each position of an epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        if self.shard_starts is None:
            return torch.randperm(self.n, generator=generator)
        shards = np.split(np.arange(self.n), self.shard_starts[1:])
        in_order = np.concatenate([shards[s] for s in torch.randperm(len(shards), generator=generator)])
        delays = torch.rand(self.n, generator=generator, dtype=torch.float64) * self.shuffle_buffer
        shuffled = in_order[(torch.arange(self.n) + delays).argsort().numpy()]
        # the first stretch of these goes to the positions of rank 0, the next to those of rank 1, ...
        ranks = np.arange(epoch * self.n, (epoch + 1) * self.n) // self.batch_size % self.world
        permutation = np.empty_like(shuffled)
        permutation[np.argsort(ranks, kind="stable")] = shuffled
        return permutation

    def __iter__(self):
        epoch, stride = -1, self.world * self.batch_size
        for begin in itertools.count(self.start + self.rank * self.batch_size, stride):
            batch = []
            for position in range(begin, begin + self.batch_size):
                if position // self.n != epoch:
                    epoch = position // self.n
                    permutation = self.permutation(epoch)
                batch.append((int(permutation[position % self.n]), position))
            yield batch


def draw(view, seed, keys):
    """
    [(i, position)] -> a view's item(i, rng) of each, as a list of stacked tensors, and the faults of all
    reads. rng depends on the seed and the position alone. For a sample that cannot be read it draws another;
    after a hundred in a row there is None instead of a batch.
    """
    items, faults = [], []
    for i, position in keys:
        rng = random.Random(f"{seed} {position}")
        for _ in range(100):
            item, fault = try_read(view.item, i, rng)
            faults.append(fault)
            if item:
                break
            i = rng.randrange(len(view))
        items.append(item)
    return torch.utils.data.default_collate(items) if all(items) else None, faults


def batches(view, batch_size, *, seed=0, start=0, rank=0, world=1, workers=0, shuffle_buffer=4096, log=""):
    """
    An endless iterator over batches of a view, each a list of stacked tensors. See ResumableBatchSampler for
    what comes when. Samples that cannot be read are named in the text file `log`; OSError where most cannot.
    """
    sampler = ResumableBatchSampler(len(view), batch_size, seed=seed, start=start, rank=rank, world=world,
                                    shard_starts=view.shard_starts, shuffle_buffer=shuffle_buffer)
    return load(functools.partial(draw, view, seed), sampler, log, workers)


# -----------------------------------------------------------------------------
# The token cache: a data set as tokens, encoded once, in a folder of
#
#     key.json               what the tokens depend on
#     00000.npy, 00001.npy   the parts, 1,024 samples each: a row for every one that can be read
#
# A row is codes (crops, n_image), texts (n_texts, n_text), both uint16, and n_texts; texts are filled up with
# zeros to the most in the part. A part appears when all of it is on disk: what is there is done.

PART = 16 * CHUNK


class Tokens:
    """
    The samples of a token cache, for BiART. Its files are mapped, not read: the processes of a machine share
    one copy, of which only what is used is in memory.
    item(i, rng) -> (text ids (n_text,) of a random caption; image codes (n_image,) of a random crop; null, a
    bool tensor, true with probability null_prob: the reference side is to be blanked, for guidance).
    """
    shard_starts = None

    def __init__(self, folder, null_prob=0.0):
        self.folder, self.null_prob = folder, null_prob
        paths = map(functools.partial(part_path, folder), itertools.count())
        self.parts = [np.load(path, mmap_mode="r") for path in itertools.takewhile(os.path.exists, paths)]
        self.ends = np.cumsum([len(rows) for rows in self.parts])

    def __reduce__(self):  # a loader process maps the files anew instead of being sent a copy
        return Tokens, (self.folder, self.null_prob)

    def __len__(self):
        return int(self.ends[-1])

    def item(self, i, rng):
        part = np.searchsorted(self.ends, i, "right")
        row = self.parts[part][i - self.ends[part]]  # counted from the end of the part
        text = row["texts"][rng.randrange(row["n_texts"])]
        null = torch.tensor(rng.random() < self.null_prob)
        codes = row["codes"][rng.randrange(len(row["codes"]))]
        text, codes = (torch.from_numpy(ids.astype(np.int64)) for ids in (text, codes))
        return text, codes, null


class TokenCacheSource:
    """
    A captioned data set on its way to tokens, of images `size` pixels wide and texts `n_text` tokens long.
    One crop is the centre square; several are random ones of `scale` to 1 times it, by the numbers of sample
    and crop. `log` names what cannot be read, `workers` are loader processes.
    """

    def __init__(self, dataset, tokenizer, n_text, size, crops=1, scale=1.0, log="", workers=0):
        if len(tokenizer) > 1 << 16:
            raise ValueError(f"the token cache holds ids below 65536: {len(tokenizer):,} tokens are too many")
        self.dataset, self.tokenizer, self.n_text, self.size = dataset, tokenizer, n_text, size
        self.crops, self.scale = crops, scale if crops > 1 else 1.0
        self.log, self.workers = log, workers

    def key(self):
        return {"tokenizer": self.tokenizer.fingerprint(), "data": self.dataset.fingerprint(),
                "transforms": f"{self.size} px, {self.crops} x {self.scale}, {self.n_text} ids a text"}

    def read(self, i):
        """-> text ids (n_texts, n_text), how many texts were cut, crops (crops, 3, size, size) in [-1, 1]."""
        captions = self.dataset.captions(i)
        ids, cut = zip(*(self.tokenizer.encode_padded(caption, self.n_text) for caption in captions))
        image = self.dataset.image(i, min_crop_side(self.size, self.scale))
        crops = [crop_to_tensor(image, self.size, self.scale, random.Random(f"{i} {n}"))
                 for n in range(self.crops)]
        return np.array(ids, np.uint16), sum(cut), torch.stack(crops)


def build_token_cache(source, encode, folder, key, own=False, rank=0, world=1, all_reduce=lambda x: x):
    """
    Encode a TokenCacheSource into a folder for Tokens(), or what is left to do of it; -> the folder.
    encode: images (B, 3, size, size) -> codes (B, n_image), below 65536. key: a dict of what else the codes
    depend on. all_reduce: adds a tensor up over all ranks and returns the sum, and so makes them wait.
    Every rank writes parts of its own; a run that was killed goes on with those that are missing, on as many
    ranks as it likes. Samples that cannot be read are left out.
    Raises ValueError where the folder holds tokens of something else; the run's own are made anew instead.
    """
    n = len(source.dataset)
    claim_folder(folder, {**key, **source.key()}, own, rank)
    done = torch.zeros(-(-n // PART), dtype=torch.int32)
    if rank == 0:  # whose view of a network file system counts
        done += torch.tensor([os.path.exists(part_path(folder, part)) for part in range(len(done))])
    mine = np.flatnonzero(all_reduce(done).numpy() == 0)[rank::world]
    rows = [row for part in mine for row in range(part * PART, min(n, (part + 1) * PART))]
    n_cut, n_texts = all_reduce(encode_rows(source, encode, folder, rows, world)).tolist()
    if n_cut and rank == 0:
        print(f"warning: {n_cut:,} of {n_texts:,} captions are longer than --n_text {source.n_text} and "
              "were cut", flush=True)
    return folder


def part_path(folder, part):
    return os.path.join(folder, f"{part:05d}.npy")


def claim_folder(folder, key, own, rank):
    """Rank 0 writes key.json where there is none, or our own of another key, whose parts it removes first."""
    path, found = os.path.join(folder, "key.json"), {}
    if os.path.exists(path):
        try:
            found = dict(json.loads(read_text(path)))
        except (ValueError, TypeError):
            raise ValueError(f"{path} does not describe a token cache") from None
    differ = [name for name, value in key.items() if found and found.get(name) != value]
    if differ and not own:
        raise ValueError(f"{folder} holds tokens of another {' and '.join(differ)}: "
                         "remove it, or name another folder")
    if rank == 0 and (differ or not found):
        os.makedirs(folder, exist_ok=True)
        for part in glob.glob(os.path.join(glob.escape(folder), "*.npy")) if differ else ():
            os.remove(part)
        with atomic_write(path) as f:
            f.write(json.dumps(key).encode())


def encode_rows(source, encode, folder, rows, world):
    """
    Encode and write the parts that the rows make up; -> tensor (captions cut, captions). Mostly unreadable
    parts come last: were it all of them, as of a disk that is gone, read_chunks() raises before.
    """
    n, counts, samples, last = len(source.dataset), torch.zeros(2, dtype=torch.int64), [], []
    for chunk, results in read_chunks(source.read, rows, "encoding", source.log, source.workers, n // world):
        found = [result for result in results if result]
        if found:
            texts, cut, images = zip(*found)
            counts += torch.tensor([sum(cut), sum(map(len, texts))])
            codes = encode(torch.cat(images)).cpu().numpy()  # (B * crops, n_image)
            if codes.max() > 65535:
                raise ValueError(f"the token cache holds codes below 65536, not {codes.max()}")
            samples += zip(texts, codes.reshape(len(found), source.crops, -1))
        if (chunk[-1] + 1) % PART == 0 or chunk[-1] + 1 == n:
            last.append((part_path(folder, chunk[-1] // PART), samples))
            if 2 * len(samples) > PART:
                write_part(*last.pop())
            samples = []
    for path, samples in last:
        write_part(path, samples)
    return counts


def write_part(path, samples):
    """[(text ids (n_texts, n_text), codes (crops, n_image))] -> a file of a row for each."""
    rows = np.zeros(0)
    if samples:
        texts, codes = samples[0]
        most = max(len(texts) for texts, _ in samples)
        rows = np.zeros(len(samples), [("codes", "u2", codes.shape), ("n_texts", "i8"),
                                       ("texts", "u2", (most, texts.shape[1]))])
    for row, (texts, codes) in zip(rows, samples):
        row["codes"], row["n_texts"], row["texts"][:len(texts)] = codes, len(texts), texts
    with atomic_write(path) as f:
        np.save(f, rows)


# -----------------------------------------------------------------------------
# Drawing

def to_image(x):
    """Tensor (3, H, W) in [-1, 1] -> PIL image."""
    pixels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def font(size):
    """Pillow's own font; before Pillow 10.1 it has one size only."""
    try:
        return ImageFont.load_default(size=size)
    except TypeError:
        return ImageFont.load_default()


def contact_sheet(images, captions=None, columns=8, side=128):
    """PIL images, and a text under each or None -> one image, `columns` wide, every picture `side` pixels."""
    rows = [textwrap.wrap(c, width=max(8, side // 7)) for c in captions] if captions else [[] for _ in images]
    text = 15 * max(len(r) for r in rows) + (4 if captions else 0)
    columns = min(columns, len(images))
    size = columns * (side + 6) + 6, -(-len(images) // columns) * (side + text + 6) + 6
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, rows)):
        x, y = 6 + i % columns * (side + 6), 6 + i // columns * (side + text + 6)
        resample = Image.NEAREST if image.width < side else Image.LANCZOS
        sheet.paste(image.resize((side, side), resample), (x, y))
        for j, line in enumerate(lines):
            draw.text((x, y + side + 2 + 15 * j), line, fill="black", font=font(12))
    return sheet
