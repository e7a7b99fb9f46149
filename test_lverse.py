"""
Tests, by file: tokenizer, data, augvae, biart, train, sample, README.md.

$ pytest -q -n 2         all, in two processes (by pytest-xdist)
$ pytest -m "not slow"   all but those that train or start processes

They compare with brute force, another implementation, or a slower way to the same result. The slow ones run
the real commands on a miniature of everything.
"""
import base64
import concurrent.futures
import contextlib
import copy
import csv
import doctest
import gzip
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import pickle
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import warnings
import zlib
from argparse import Namespace
from collections import Counter
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.random import RandomState
from PIL import Image, PngImagePlugin
from pytest import approx, fixture, mark, param, raises, skip, warns
from torch import allclose, equal, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import augvae
import data
import sample
import tokenizer as tokenizer_module
import train
from augvae import EMA_EPS, LPIPS, AugVAE, AugVAEConfig, Codebook
from biart import (GEN, OTHER, PLAUSIBLE, REF, BiART, BiARTConfig, Block, GraphedStep, LinearAfter,
                   LinearCrossEntropy, Sampling, linear_after, norm_linear, sample_token)
from data import (DataConfig, crop_to_tensor, draw_things, facts, load_image, matches, parse_caption,
                  read_scene)
from tokenizer import Tokenizer, clip_words, learn_merges, trained_words

aten = torch.ops.aten
slow, old_torch = mark.slow, mark.old_torch  # see pyproject.toml
HERE = os.path.dirname(os.path.abspath(__file__))

@fixture(autouse=True)
def seed():
    torch.manual_seed(0)

def assert_same_gradients(f, g, inputs, tolerance, parameters=(), amp=False):
    """f(*inputs) and g(*inputs) have the same dtypes, values and gradients of inputs and parameters, up to a
    share `tolerance` of the largest. Both draw the same random numbers. amp: in bfloat16 autocast."""
    results = []
    for function in (f, g):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            y = function(*inputs)
        loss = (y * torch.randn(y.shape, dtype=y.dtype)).sum()
        results.append([y, *torch.autograd.grad(loss, [*inputs, *parameters])])
    for a, b in zip(*results):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()

# -----------------------------------------------------------------------------
# tokenizer.py

TEXTS = [
    "A young boy in the park is throwing a frisbee, and the dog's catching it.\n",
    "Two dogs play in the park; they've seen 3 other dogs and 12 birds there!\n",
    "it's a dog, isn't it? the dogs aren't in the snow_park  today...\r\n",
    "banana bananas aaaaaaa anananana  \t\n",
    "naïve café — déjà vu, كلب يلعب في الحديقة 犬が公園で遊ぶ 👩‍👩‍👧‍👦👍🏽\n",
]
HARD_TEXTS = [
    "", "   ", "\r\n", "one\r\ntwo\rthree\n\nfour", " leading and trailing  ", "tab\tand\x0bothers\x85.",
    "\u3000\u2028\u2029 \u200b", "a\x00b\x01\x1c\x1f\x7f", "👍🏽🇮🇳", "ٱلْعَرَبِيَّة لغة", "a\u0301\u0327 \u0345",
    "\u200d\ufeff\u202e\ue000\uffff\U0010ffff", "Ⅷ ½ ² 3½ ٣ 12,345.67", "under_score __init__ _",
    "don't DON'T 'tis ''", "<|endoftext|> <pad> </w>", "x" * 500,
]
# What OpenAI's own tokenizer gives, without start and end tokens
CLIP_GOLDEN = [
    ("it's the dog's ball, isn't it? they've seen 3 dogs; we'll go",
     [585, 568, 518, 1929, 568, 1069, 267, 2923, 713, 585, 286, 889, 1200, 2041, 274, 3255, 282, 649,
      1342, 861]),
    ("  Mixed   CASE\twith\nwhitespace ", [6780, 2068, 593, 4699, 2138]),
    ("don't DON'T Don'T", [847, 713, 847, 713, 847, 713]),
    ("naïve café — déjà vu", [1097, 35689, 563, 15304, 2005, 25466, 73, 21259, 13230]),
    ("Ⅷ ½ ² 3½ cups of 東京 タワー",
     [158, 227, 371, 33613, 41175, 274, 33613, 11463, 539, 48338, 21078, 361, 34941, 2429, 107, 30391]),
    ("a" * 70, [23126, 23126, 23126, 23126, 23126, 23126, 23126, 23126, 44413]),
    ("日本語のキャプション",
     [39121, 44353, 34002, 252, 21575, 47121, 2429, 96, 2429, 245, 37665, 2429, 100, 26875]),
    ("ٱلْعَرَبِيَّة हिन्दी ไทย",
     [149, 109, 37899, 149, 496, 148, 373, 149, 492, 24933, 149, 492, 35330, 149, 494, 23853, 149, 236,
      149, 495, 20915, 29446, 26721, 26090, 19389, 29552, 25751, 31718, 245, 33091]),
    ("under_score __init__ a_b", [1798, 318, 4431, 3838, 42670, 3838, 320, 318, 321]),
    ("<|startoftext|>hello<|endoftext|>", [49406, 3306, 49407]),
]

def trained(vocab_size=300):
    return Tokenizer.train(TEXTS, vocab_size)

def clip_tokenizer():
    path = os.path.join(HERE, "..", "shared", "data", "clip", "bpe_simple_vocab_16e6.txt.gz")
    path = os.environ.get("LVERSE_CLIP_BPE", path)
    if not os.path.exists(path):
        skip(f"CLIP's merge list is not at {path} (set LVERSE_CLIP_BPE)")
    return Tokenizer.load(path)

def random_text(rng):
    """Unicode text, mostly from a few blocks."""
    blocks = [(0, 0x80), (0x20, 0x7f), (0x80, 0x250), (0x300, 0x370), (0x600, 0x700), (0x2000, 0x2070),
              (0x4e00, 0x4e40), (0x1f300, 0x1f650), (0, 0x110000)]
    text = ""
    for _ in range(rng.randrange(8)):
        start, stop = rng.choice(blocks)
        text += "".join(chr(rng.randrange(start, stop)) for _ in range(rng.randrange(8)))
    return "".join(c for c in text if not 0xd800 <= ord(c) < 0xe000)

def merge_everywhere(ids, pair, new_id):
    out, i = [], 0
    while i < len(ids):
        found = tuple(ids[i:i + 2]) == pair
        out.append(new_id if found else ids[i])
        i += 2 if found else 1
    return out

def brute_force_train(texts, vocab_size):
    """By the loop in a docstring."""
    counts = Counter(tuple(word.encode()) for text in texts for word in trained_words(text))
    names = {**vars(tokenizer_module), "word_counts": counts, "first_id": 256, "n_merges": vocab_size - 258}
    exec(textwrap.dedent(learn_merges.__doc__.split("slower:\n\n")[1]), names)
    return names["merges"]

def test_the_examples_in_the_docstrings():
    assert doctest.testmod(tokenizer_module) == (0, 4)

def test_text_comes_back_exactly():
    rng = Random(0)
    for tokenizer in (Tokenizer.train([], 258), trained()):
        for text in TEXTS + HARD_TEXTS + [random_text(rng) for _ in range(300)]:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert all(0 <= i < tokenizer.end for i in ids)

def test_text_is_cut_into_words():
    assert trained_words("It's  2 late_\n in 2024,\t\tthey said...") == [
        "It", "'s", " ", " 2", " late", "_", "\n", " in", " 2", "0", "2", "4", ",", "\t", "\t", "they",
        " said", "..."]
    for text, words in (
            ("It's <B>20Ⅷ½</B>!", ["it", "'s", "<", "b", ">", "2", "0", "ⅷ", "½", "</", "b", ">!"]),
            ("हिन्दी", ["ह", "ि", "न", "्", "द", "ी"]),  # vowel signs are neither letters nor numbers
            ("&amp;amp;lt; &nbsp; x\u3000y", ["&", "lt", ";", "x", "y"]),
            ("a<|StartOfText|>b <|endoftext|>", ["a", "<|startoftext|>", "b", "<|endoftext|>"]),
            ("'ſtop 'Sir a\x1cb\u0345c", ["'ſ", "top", "'s", "ir", "a", "\x1c", "b", "c"])):
        assert clip_words(text) == words

def test_training_equals_brute_force():
    for vocab_size, size in ((258, 258), (300, 300), (10000, 306)):
        tokenizer = Tokenizer.train(reversed(TEXTS), vocab_size)
        assert tokenizer.merges == brute_force_train(TEXTS, vocab_size) and len(tokenizer) == size
    # Overlapping pairs, equal counts
    rng = Random(1)
    for _ in range(20):
        texts = ["".join(rng.choices("aab ", k=rng.randrange(1, 200))) for _ in range(4)]
        assert Tokenizer.train(texts, 500).merges == brute_force_train(texts, 500)
    for texts, size in (([], 258), (["abc"], 258), (["abc abc"], 260)):
        assert len(Tokenizer.train(texts, 1000)) == size
    with raises(ValueError, match="257.*258"):
        Tokenizer.train(TEXTS, 257)
    with raises(TypeError):
        Tokenizer.train("one string", 300)

def test_encoding_equals_brute_force(monkeypatch):
    rng = Random(2)
    tokenizer, remembers_little = trained(10000), trained(10000)
    vocabulary = [word for text in TEXTS for word in text.split()]
    for length in [30] * 200 + [5000]:
        text = " ".join(rng.choices(vocabulary, k=5)) + "".join(rng.choices("abn ", k=length))
        text += random_text(rng) + "".join(rng.choices("abn", k=length))
        expected = []
        for word in trained_words(text):
            ids = list(word.encode())
            for new_id, pair in enumerate(tokenizer.merges, 256):
                ids = merge_everywhere(ids, pair, new_id)
            expected += ids
        assert tokenizer.encode(text) == tokenizer.encode(text) == expected
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer_module, "CACHE_WORDS", 3)
            assert remembers_little.encode(text) == expected
    assert len(remembers_little.cache) == 3
    with raises(ValueError):
        tokenizer.encode("a\ud800")  # a lone surrogate

def test_decoding_and_padding():
    tokenizer, text = trained(), "the dog's in the snow"
    ids, end, pad = tokenizer.encode(text), tokenizer.end, tokenizer.pad
    n = len(ids)
    assert tokenizer.decode([pad, *ids, end, pad]) == text
    assert tokenizer.decode([0xc3]) == "\ufffd"  # half a character
    for bad in (-1, len(tokenizer)):
        with raises(ValueError, match=f"{bad}.*{len(tokenizer) - 1}"):
            tokenizer.decode([bad])
    assert tokenizer.encode_padded(text, n + 3) == (ids + [end, pad, pad], False)
    assert tokenizer.encode_padded(text, n + 1) == (ids + [end], False)
    assert tokenizer.encode_padded(text, n) == (ids[:-1] + [end], True)
    assert tokenizer.encode_padded(text, 1) == ([end], True)
    assert tokenizer.encode_padded("", 1) == ([end], False)
    with raises(ValueError, match="0"):
        tokenizer.encode_padded("", 0)

def test_a_tokenizer_is_saved_and_loaded(tmp_path):
    tokenizer, path = trained(), tmp_path / "tokenizer.json"
    path.write_text("an older file is replaced")
    tokenizer.save(path)
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    for again in (Tokenizer.load(str(path)), pickle.loads(pickle.dumps(tokenizer))):
        assert (again.merges, len(again), again.end, again.pad) == (tokenizer.merges, 300, 298, 299)
        assert again.encode(TEXTS[4]) == tokenizer.encode(TEXTS[4])
        assert again.fingerprint() == tokenizer.fingerprint()
    others = trained(299), Tokenizer.train([], 258), Tokenizer("clip", [])
    assert len({other.fingerprint() for other in (tokenizer, *others)}) == 4

def test_bad_tokenizer_files_are_refused(tmp_path):
    good = {"format": tokenizer_module.FILE_FORMAT, "kind": "trained", "merges": [[97, 98]]}
    content, clip_list = json.dumps(good).encode(), gzip.compress(b"a header\ni n\nt h")
    bad = [b"", content[:-10], b"BPE, honestly", b"\xff\xfe\xe9", b"7", b"[]", b"null", b"[" * 100000,
           b'{"model": 1}', clip_list[:-12], clip_list[:10] + b"\xff" * 30]
    bad += [gzip.compress(b"header\n" + lines) for lines in (b"hello\n", b"in g\n", b"\xff\xfe")]
    merges = ["ab", [1, 2], [[1, 2, 3]], [[1, 256]], [[-1, 2]], [[1.0, 2]], [["a", "b"]], None]
    for name, values in {"format": ["BPE"], "kind": ["wordpiece", ["clip"]], "merges": merges}.items():
        bad += [json.dumps({**good, name: value}).encode() for value in values]
    path = tmp_path / "file"
    for content in [*bad, clip_list]:
        path.write_bytes(content)
        with raises(ValueError, match="cannot read") as info:
            Tokenizer.load(path)
        assert str(path) in str(info.value) and "\n" not in str(info.value)
    assert "only 2 merges" in str(info.value)
    for path in (tmp_path, tmp_path / "missing"):
        with raises(ValueError, match=str(path)):
            Tokenizer.load(path)

def test_clips_merge_list(tmp_path):
    clip = clip_tokenizer()
    assert (len(clip), clip.end, clip.pad) == (49408, 49407, 49406)
    clip.save(tmp_path / "clip.json")
    again = Tokenizer.load(tmp_path / "clip.json")
    assert again.fingerprint() == clip.fingerprint()
    for text, ids in CLIP_GOLDEN:
        assert clip.encode(text) == again.encode(text) == ids, text
    assert clip.decode(clip.encode("  A young  boy&#39;s\tFRISBEE, 12½ ")) == "a young boy 's frisbee , 1 2 ½"
    word = "".join(Random(0).choices("etaoinshrdlu", k=1000))
    assert clip.decode(clip.encode(word)) == word
    # A text may spell out special tokens, a padded caption has only its own end
    assert clip.encode("a<|endoftext|>b") == [320, clip.end, 321]
    for text in ("a<|endoftext|>b", "<|startoftext|>a &lt;|EndOfText|&gt; b"):
        assert clip.encode_padded(text, 4) == ([320, 321, clip.end, clip.pad], False)
        assert clip.encode_padded(text, 2) == ([320, clip.end], True)

# -----------------------------------------------------------------------------
# data.py

def noise(path, i, size=64):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RandomState(i).randint(0, 256, (size, size, 3), np.uint8)).save(path)
    return path

def n_faults(log):
    return len(set(Path(log).read_text().splitlines())) if os.path.exists(log) else 0

def pack(path, members):
    """Write a tar file with members (name, bytes)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

def coco(tmp_path, n=4):
    """An MS-COCO layout, whose last image has no caption -> folder, JSON path."""
    path, record = tmp_path / "captions.json", {"images": [], "annotations": []}
    for i in range(n):
        noise(tmp_path / "images" / f"{i}.png", i)
        record["images"].append({"id": i + 100, "file_name": f"{i}.png"})
    for i in range(2 * n - 2):
        record["annotations"].append({"image_id": i // 2 + 100, "caption": f"caption {i}"})
    path.write_text(json.dumps(record))
    return tmp_path / "images", path

def layout(kind, base):
    """Write four images, noise(i) with captions `red i` and `blue i` -> settings."""
    names = [f"class {i % 2}/{i // 2}.png" for i in range(4)]  # some names are equal
    captions = [[f"red {i}", f"blue {i}"] for i in range(4)]
    where, more = base / "train", {}
    for i, name in enumerate(names):
        noise(where / name, i)
    if kind == "pairs":
        for name, texts in zip(names, captions):
            (where / name).with_suffix(".txt").write_text("\n".join([*texts, "", " "]))
        noise(where / "uncaptioned.png", 99)
    elif kind == "karpathy":
        path, images = base / "split.json", []
        for i, split in enumerate(("train", "restval", "train", "restval", "val", "test")):
            images.append({"filepath": names[i % 4][:7], "filename": names[i % 4][8:], "split": split,
                           "sentences": [{"raw": text} for text in captions[i % 4]]})
        path.write_text(json.dumps({"images": images}))
        more = {"train_captions": path, "val_captions": path}
    elif kind == "tsv":
        where = base / "train.tsv"
        lines = [f"red {i}\ttrain/{name}\nblue {i}\ttrain/{name}\n" for i, name in enumerate(names)]
        where.write_text("".join(lines))
    elif kind == "tar":
        for shard in (0, 1):
            members = []
            for i in (shard, shard + 2):
                members += [(f"{i}.png", (where / names[i]).read_bytes()), (f"{i}.json", b"{}"),
                            (f"{i}.txt", "\n".join(captions[i]).encode())]
            pack(base / f"00{shard}.tar", members)
        where = base / "{000..001}.tar"
    return {"data": kind.replace("karpathy", "coco"), "train_dir": where, "val_dir": where, **more}

@mark.parametrize("kind", ["imagenet", "folder", "pairs", "karpathy", "tsv", "tar"])
def test_every_layout(kind, tmp_path, capsys):
    settings = {name: str(value) for name, value in layout(kind, tmp_path).items()}
    dataset = data.open_data(DataConfig(**settings), "train")
    expected = {Image.open(noise(tmp_path / "x.png", i)).tobytes(): i for i in range(4)}
    for i in range(len(dataset)):
        number = expected.pop(dataset.image(i).tobytes())
        assert dataset.captions(i) == ([f"red {number}", f"blue {number}"] if dataset.captioned else [])
    assert not expected and dataset.captioned == (settings["data"] not in ("imagenet", "folder"))
    assert dataset.fingerprint() == data.open_data(DataConfig(**settings), "train").fingerprint()
    assert len(pickle.loads(pickle.dumps(dataset))) == 4
    assert ("1 images without a caption" in capsys.readouterr().out) == (kind == "pairs")
    if kind == "karpathy":
        val = data.open_data(DataConfig(**settings), "val")
        assert len(val) == 1 and val.fingerprint() != dataset.fingerprint()
    with raises((ValueError, OSError), match="absent"):
        data.open_data(DataConfig(**{**settings, "train_dir": "absent"}), "train")

def test_settings_of_layouts():
    assert len(data.open_data(DataConfig(n_scenes=3), "train")) == 3
    for name in DataConfig.choices["data"][1:]:
        with raises(ValueError, match=f"--data {name} needs --val_dir"):
            data.open_data(DataConfig(data=name), "val")
    with raises(ValueError, match="--data coco needs --val_captions"):
        data.open_data(DataConfig(data="coco", val_dir="here"), "val")
    with raises(ValueError, match="scenes reads no --val_dir here: set --data"):
        data.open_data(DataConfig(val_dir="here"), "val")

def test_coco_layout(tmp_path):
    folder, path = coco(tmp_path)
    dataset = data.read_coco(folder, path, "train")
    assert len(dataset) == 3  # the last image has no caption
    assert dataset.captions(1) == ["caption 2", "caption 3"] and dataset.image(1).size == (64, 64)
    half = tmp_path / "half.json"  # of a character, which UTF-8 cannot hold
    half.write_text(path.read_text().replace("caption 3", "\\ud83d"))
    assert data.read_coco(folder, half, "train").captions(1) == ["caption 2", "?"]
    with raises(ValueError, match="there is no absent/0.png, nor another image of .*captions.json"):
        data.read_coco("absent", path, "train")
    for text, message in (("{", "neither MS-COCO's"), ("[]", "neither"), ('{"images": [1]}', "neither"),
                          ("\xe9", "half.json is not UTF-8"),
                          ('{"images": [], "annotations": []}', "half.json holds no captioned image")):
        half.write_bytes(text.encode("latin-1"))
        with raises(ValueError, match=message):
            data.read_coco(folder, half, "train")

def test_bad_lists_are_refused(tmp_path):
    noise(tmp_path / "a.png", 0)
    for text, message in (("caption a.png\n", "line 1: 'caption a.png' is not"), ("\ta.png\n", "holds no"),
                          ("x\ta.png\ny\t\n", "line 2"), ("", "holds no captioned image"),
                          ("x\tb.png\n", "there is no .*b.png")):
        (tmp_path / "list.tsv").write_text(text)
        with raises(ValueError, match=message):
            data.read_tsv(tmp_path / "list.tsv")
    (tmp_path / "odd.tsv").write_text("﻿a \x07 b\ta.png\textra\n\n\U0001f600\ta.png\n", encoding="utf-8")
    assert data.read_tsv(tmp_path / "odd.tsv").captions(0) == ["a b", "\U0001f600"]
    (tmp_path / "train").mkdir()
    for read in (data.read_folder, data.Pairs):
        with raises(ValueError, match="holds no image"):
            read(tmp_path / "train")

def test_loops_of_links_and_bad_folders(tmp_path):
    noise(tmp_path / "a" / "b" / "0.png", 0)
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    for path in ("elsewhere/1.png", "a/.hidden/2.png", "a/__MACOSX/3.png", "a/._0.png"):
        noise(tmp_path / path, 1)
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    assert data.list_files(tmp_path / "a") == ["b/0.png", "linked/1.png"]
    with raises(OSError, match="folder .*/c cannot be read .No such file"):
        data.list_files(tmp_path / "c")

def test_every_mode_becomes_rgb(tmp_path):
    image, white = Image.new("RGB", (8, 8), (200, 0, 0)), (255, 255, 255)
    transparent = image.convert("RGBA")
    transparent.putalpha(0)
    grey16 = Image.fromarray(np.full((8, 8), 257 * 100, np.uint16))
    cases = {"rgb.png": (image, (200, 0, 0)), "palette.png": (image.quantize(4), (200, 0, 0)),
             "grey.png": (image.convert("L"), (60, 60, 60)), "rgba.png": (transparent, white),
             "la.png": (transparent.convert("LA"), white), "grey16.png": (grey16, (100, 100, 100))}
    for name, (picture, colour) in cases.items():
        picture.save(tmp_path / name)
        loaded = load_image(tmp_path / name, min_side=4)
        assert loaded.mode == "RGB"
        assert np.abs(np.asarray(loaded, int)[2, 2] - colour).max() <= 3, name
    image.quantize(4).save(tmp_path / "clear.png", transparency=0)
    assert np.asarray(load_image(tmp_path / "clear.png")).min() == 255

@mark.filterwarnings("ignore:Corrupt EXIF data")
def test_exif(tmp_path):
    picture, exif = Image.new("RGB", (24, 16), "red"), Image.Exif()
    picture.paste("lime", (0, 8, 8, 16))
    exif[0x0112] = 6  # turn right
    for name in ("a.png", "a.tif", "a.jpg"):
        picture.save(tmp_path / name, exif=exif, quality=95)
        found, expected = load_image(tmp_path / name), picture.transpose(Image.ROTATE_270)
        assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).mean() < 10, name
    # "turn right", and "abc" channels, which Pillow cannot write again
    turned = (b"MM\0*\0\0\0\x08\0\x02" b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
              b"\x01\x15\0\x02\0\0\0\x04abc\0" b"\0\0\0\0")
    for exif in (turned, b"II*\0\xff\xff\xff\xff", b"x" * 50):
        Image.new("RGB", (8, 4), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif)
        assert sorted(load_image(tmp_path / "a.jpg").size) == [4, 8]

def test_large_jpegs(tmp_path):
    Image.effect_noise((16, 12), 300).resize((1600, 1200), Image.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    for min_side, height in {0: 1200, 700: 1200, 300: 300, 301: 600, 1: 150}.items():
        assert load_image(tmp_path / "a.jpg", min_side).height == height
    whole, small = (crop_to_tensor(load_image(tmp_path / "a.jpg", side), 128) for side in (0, 128))
    assert (whole - small).abs().mean() < 0.02

def denied(*_arguments, **_named):
    raise PermissionError(13, "Permission denied")

def test_unreadable_images_are_named(tmp_path, monkeypatch):
    for ending in ("png", "jpg"):
        content = noise(tmp_path / f"whole.{ending}", 0).read_bytes()
        (tmp_path / f"cut.{ending}").write_bytes(content[:len(content) // 2])
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "fifo.png")
    for name in ("cut.png", "cut.jpg", "loop.png", "absent.png", "fifo.png"):
        with raises(data.Unreadable, match=f"{name} (is not|that can be read)[^\n]*$"):
            load_image(tmp_path / name, min_side=16)
    with raises(data.Unreadable, match="^the upload is not an image .* .unknown format.$"):
        load_image(io.BytesIO(b"no picture"), name="the upload")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with raises(data.Unreadable, match="decompression bomb"):
        load_image(tmp_path / "whole.jpg", min_side=16)

def test_tar_patterns(tmp_path):
    for name in ("00", "01", "02", "10", "9"):
        pack(tmp_path / f"{name}.tar", [])
    for pattern, names in {"{00..02}.tar": "00 01 02", "{0..1}{0..0}.tar": "00 10", "{9..10}.tar": "9 10",
                           "0*.tar": "00 01 02", "": "00 01 02 10 9"}.items():
        found = data.expand_shards(os.path.join(tmp_path, pattern))
        assert [os.path.basename(path)[:-4] for path in found] == names.split(), pattern
    for pattern in ("{00..03}.tar", "{02..00}.tar", "b*.tar"):
        with raises(ValueError, match="there is no tar shard .*/"):
            data.expand_shards(os.path.join(tmp_path, pattern))

def test_tar_shards(tmp_path):
    picture = noise(tmp_path / "0.png", 0).read_bytes()
    pack(tmp_path / "0.tar", [("x/1.png", picture), ("y/1.txt", b"y"), ("x/1.txt", b"one\ntwo\n"),
                              ("y/1.png", picture), ("x/2.seg.png", b""), ("x/2.txt", b"no image"),
                              ("3.JPG", picture), ("3.TXT", "dreißig".encode()), ("4.png", picture)])
    pack(tmp_path / "1.tar", [("5.png", b"broken"), ("5.txt", b"\xff"), ("6.png", picture), ("6.txt", b" ")])
    paths = [tmp_path / "0.tar", tmp_path / "1.tar"]
    both = data.Tar(paths, log=tmp_path / "log")
    assert "0.tar: left out 1 members, x/2.seg.png for one: a name" in (tmp_path / "log").read_text()
    assert len(both) == 5 and both.shard_starts.tolist() == [0, 3]
    assert [both.captions(i) for i in range(3)] == [["one", "two"], ["y"], ["dreißig"]]
    assert all(np.array_equal(both.image(i), Image.open(tmp_path / "0.png")) for i in range(3))
    for i, read, message in ((3, both.image, "512, is not an image"), (3, both.captions, "is not UTF-8"),
                             (4, both.captions, "is empty")):
        with raises(data.Unreadable, match=f"1.tar, byte .*{message}"):
            read(i)
    pack(tmp_path / "1.tar", [("7.png", picture), ("7.txt", b"seven")])
    assert data.Tar(paths).captions(3) == ["seven"]  # not from the old index
    pack(tmp_path / "2.tar", [("8.png", picture)])
    uncaptioned = data.Tar([tmp_path / "2.tar"])
    assert not uncaptioned.captioned and uncaptioned.captions(0) == []

def test_broken_tar_shards(tmp_path):
    picture = noise(tmp_path / "0.png", 0).read_bytes()
    members = [((f"{i}.txt", b"text"), (f"{i}.png", picture)) for i in range(6)]
    pack(tmp_path / "whole.tar", itertools.chain(*members))
    size = 3 * 512 + 512 * math.ceil(len(picture) / 512)  # two headers, a block of text, the image
    whole = (tmp_path / "whole.tar").read_bytes()
    damaged = {"cut": whole[:2 * size + 1700], "header": whole[:3 * size], "zero": b"",
               "garbage": whole[:4 * size] + b"\xaa" * 512 + whole[4 * size + 512:],
               "gzip": gzip.compress(whole)}
    for name, content in damaged.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
    paths = [tmp_path / f"{name}.tar" for name in ("whole", *damaged)]
    for log in (tmp_path / "log", tmp_path / "again"):  # now with an index of the whole one
        dataset = data.Tar(paths, log=log)
        assert len(dataset) == 6 + 2 + 3 + 4
        assert all(dataset.image(i).size == (64, 64) and dataset.captions(i) == ["text"] for i in range(15))
        named = {re.search(r"(\w+).tar cannot be read to its end \(", line)[1] for line in log.open()}
        assert named == set(damaged)
    with raises(ValueError, match="2 tar shards, .*zero.tar for one, hold no image"):
        data.Tar([tmp_path / "zero.tar", tmp_path / "gzip.tar"])

def test_index_of_a_tar_shard(tmp_path, monkeypatch):
    shards, apart = tmp_path / "shards", tmp_path / "apart"
    shard, picture = str(shards / "0.tar"), noise(apart / "0.png", 0)
    shards.mkdir()
    pack(shard, [("0.png", picture.read_bytes())])
    picture.unlink()
    with monkeypatch.context() as broken, raises(ValueError, match="hold no image"):
        broken.setattr(tarfile, "open", denied)  # by a disk that comes back later
        data.Tar([shard], apart, tmp_path / "log")
    rename = os.replace

    def refuse(part, path):
        if os.path.dirname(path) == str(shards):
            raise PermissionError(13, "Permission denied")
        rename(part, path)
    with monkeypatch.context() as read_only:
        read_only.setattr(os, "replace", refuse)
        assert len(data.Tar([shard])) == 1 and os.listdir(shards) == ["0.tar"]
        data.open_data(DataConfig(data="tar", train_dir=shard), "train", index_dir=str(apart))
        assert os.listdir(shards) == ["0.tar"] and len(os.listdir(apart)) == 1
        read_only.setattr(tarfile, "open", denied)
        assert len(data.Tar([shard], apart)) == 1
    assert len(data.Tar([shard])) == 1 and len(os.listdir(shards)) == 2

def test_crops():
    image = Image.fromarray(RandomState(0).randint(0, 256, (48, 80, 3), np.uint8))
    centre = crop_to_tensor(image, 48)
    expected = torch.from_numpy(np.array(image)[:, 16:64]).permute(2, 0, 1).float() / 127.5 - 1
    assert allclose(centre, expected, atol=1e-6)
    a, b, c = (crop_to_tensor(image, 32, 0.5, Random(seed)) for seed in (1, 1, 2))
    assert equal(a, b) and not equal(a, c) and a.shape == (3, 32, 32) and a.abs().max() <= 1
    for size in (20, 100):  # as Pillow, up to rounding
        resized = image.crop((16, 0, 64, 48)).resize((size, size), Image.BILINEAR)
        ours = np.asarray(data.to_image(crop_to_tensor(image, size)), int)
        assert np.abs(ours - np.asarray(resized, int)).max() <= 1

class Numbers:
    """A view of numbers, with a random number each. Some cannot be read."""
    shard_starts = None

    def __init__(self, n, bad=()):
        self.n, self.bad = n, set(bad)

    def __len__(self):
        return self.n

    def item(self, i, rng):
        if i in self.bad:
            raise data.Unreadable(f"number {i} is bad")
        return torch.tensor(i), torch.tensor(rng.random())

def drawn(view, steps, batch_size, **options):
    loader = data.batches(view, batch_size, **options)
    found = [next(loader) for _ in range(steps)]
    return tuple(torch.cat(column).tolist() for column in zip(*found))

@mark.parametrize("shard_starts", [None, np.array([0, 4, 5, 11, 17])], ids=["single files", "shards"])
def test_every_epoch_is_whole_and_resumes(shard_starts, monkeypatch):
    monkeypatch.setattr(data, "SHUFFLE_BUFFER", 3)

    def keys(world, start=0, seed=5):
        streams = [data.sample_order(23, 4, seed, start, rank, world, shard_starts) for rank in range(world)]
        return [key for _ in range(24 // world) for stream in streams for key in next(stream)]
    for world in (1, 2, 3):
        order = keys(world)
        assert [position for _, position in order] == list(range(96))
        for epoch in range(4):
            assert {i for i, position in order if position // 23 == epoch} == set(range(23))
        for start in (3, 8, 28):
            assert keys(world, start)[:96 - start] == order[start:]
        assert keys(world, seed=6) != order and order[:23] != order[23:46]
        assert shard_starts is not None or order == keys(1)  # shards are dealt to ranks

def test_shards_are_read_front_to_back(monkeypatch):
    starts, n, world, buffer = np.arange(0, 1200, 100), 1200, 3, 20
    monkeypatch.setattr(data, "SHUFFLE_BUFFER", buffer)
    order = []
    for rank in range(world):
        stream = data.sample_order(n, 8, 1, 0, rank, world, starts)
        order.append([i for _ in range(n // world // 8) for i, _ in next(stream)])
    assert sum(len({i // 100 for i in mine}) for mine in order) <= 12 + 2 * 2  # two may meet in a shard
    for mine in order:
        for shard in {i // 100 for i in mine}:
            positions, numbers = zip(*((at, i) for at, i in enumerate(mine) if i // 100 == shard))
            assert positions[-1] - positions[0] < len(positions) + 2 * buffer
            assert len(numbers) < 50 or list(numbers) != sorted(numbers)
            assert np.abs(np.argsort(numbers) - np.arange(len(numbers))).max() <= buffer

@mark.parametrize("processes", [(0,), param((0, 1, 2), marks=slow)])
def test_bad_samples_are_replaced(tmp_path, processes):
    bad, found, whole = (2, 3, 11), [], drawn(Numbers(23), 12, 4)
    for workers in processes:
        log = tmp_path / f"{workers}.log"
        found.append(drawn(Numbers(23, bad=bad), 12, 4, workers=workers, log=log))
        assert set(log.read_text().splitlines()) == {f"number {i} is bad" for i in bad}
        assert n_faults(log) == 3
    assert all(other == found[0] for other in found)
    for i, j in zip(whole[0], found[0][0]):
        assert j not in bad and (i == j or i in bad)
    late = drawn(Numbers(23, bad=bad), 5, 4, start=28)
    assert late == tuple(column[28:] for column in found[0])

def test_mostly_bad_data_stops_the_run(tmp_path):
    log = tmp_path / "log"
    with raises(OSError, match=f"samples could not be read: see {log}$") as error:
        drawn(Numbers(5000, bad=range(3000)), 1000, 8, log=log)
    bad, tried = (int(word) for word in str(error.value).split() if word.isdigit())
    assert 500 < bad < 600 and bad < tried < 1100
    with raises(OSError, match="could not be read"):
        drawn(Numbers(10, bad=range(10)), 1, 2, log=log)
    drawn(Numbers(5000, bad=range(2000)), 1000, 8, log=log)

def test_validation_samples_can_be_read(tmp_path):
    dataset = data.read_coco(*map(str, coco(tmp_path, n=9)), "val")
    (tmp_path / "images" / "3.png").write_bytes(b"")
    (tmp_path / "images" / "5.png").unlink()
    some = data.validation_subset(dataset, 4, tmp_path / "log")
    again = data.validation_subset(dataset, 4)
    assert len(some) == 4 and len(data.validation_subset(dataset, 100)) == 6
    assert n_faults(tmp_path / "log") <= 2 and some.fingerprint() == again.fingerprint()
    assert [some.captions(i) for i in range(4)] == [dataset.captions(i) for i in some.indices]
    for i in range(5):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"")
    with raises(OSError, match="could not be read"):
        data.validation_subset(dataset, 4)

def brightness(images):
    """A stand-in for an encoder: (B, 3, 64, 64) -> codes (B, 4)."""
    return images.unflatten(2, (4, 16)).mean((1, 3, 4)).add(1).mul(500).int()

def encodable(tmp_path, tokenizer=None, **options):
    """A TokenSource of 40 samples in pairs. Image 3 and caption file 7 are broken."""
    folder = tmp_path / "pairs"
    if not folder.exists():
        for i in range(40):
            path = noise(folder / f"{i:02d}.png", i, 70)
            path.with_suffix(".txt").write_text("\n".join(f"caption {i} {j}" for j in range(i % 3 + 1)))
        (folder / "03.png").write_bytes(b"no image")
        (folder / "07.txt").write_bytes(b"\xff")
    tokenizer = tokenizer or Tokenizer.train(["caption 1 2 3"] * 4, 270)
    options = {"n_text": 12, "size": 64, "made_from": {"augvae": "a"}, **options}
    return data.TokenSource(data.Pairs(folder), tokenizer, log=tmp_path / "log", **options)

def encoded(source, folder, encode=brightness, **options):
    data.cache_tokens(source, encode, str(folder), **options)
    return str(folder)

def cache_files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

@fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 4)
    monkeypatch.setattr(data, "BLOCK", 8)

def test_the_token_cache(tmp_path, small_blocks, capsys):
    source = encodable(tmp_path)
    dataset, tok = source.dataset, source.tokenizer
    tokens = data.Tokens(encoded(source, tmp_path / "out"), null_prob=0.5)
    kept = [i for i in range(40) if i not in (3, 7)]
    assert len(tokens) == 38 and all(isinstance(rows, np.memmap) for rows in tokens.blocks)
    assert n_faults(tmp_path / "log") == 2 and "07.txt is not" in (tmp_path / "log").read_text()
    assert data.all_captions(dataset) == [text for i in range(40) if i != 7 for text in dataset.captions(i)]
    for row, i in enumerate(kept):
        expected = brightness(crop_to_tensor(dataset.image(i), 64)[None])[0]
        texts = {tuple(tok.encode_padded(text, 12)[0]) for text in dataset.captions(i)}
        items = [tokens.item(row, Random(k)) for k in range(60)]
        assert all(equal(codes, expected.long()) for _, codes, _ in items)
        assert {tuple(text.tolist()) for text, _, _ in items} == texts
        assert 10 < sum(null.item() for *_, null in items) < 50
    assert sorted(os.listdir(tmp_path / "out")) == [*(f"0000{i}.npy" for i in range(5)), "key.json"]
    assert len(pickle.dumps(tokens)) < 1000
    assert "warning" not in capsys.readouterr().out
    encoded(encodable(tmp_path, n_text=3), tmp_path / "cut")
    assert "--n_text 3 cuts 76 of 76 captions" in capsys.readouterr().out

@slow
@mark.parametrize("method, n", [("fork", 2), ("spawn", 1)])  # spawn: Windows and macOS
def test_loader_processes_change_nothing(method, n, tmp_path, monkeypatch):
    loader = torch.utils.data.DataLoader
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *arguments, **options: loader(
        *arguments, **options, multiprocessing_context=method if options["num_workers"] else None))
    a, b = (encoded(encodable(tmp_path, workers=workers), tmp_path / str(workers))
            for workers in (0, n))
    assert cache_files(a) == cache_files(b)
    pack(tmp_path / "0.tar", [(f"{i}.png", noise(tmp_path / "x.png", i).read_bytes()) for i in range(10)])
    for view in (data.Tokens(a, 0.5), data.Pixels(data.Tar([tmp_path / "0.tar"]), 32, 0.5)):
        streams = [data.batches(view, 3, seed=1, start=7, workers=workers) for workers in (0, n)]
        for _ in range(6):
            assert all(equal(x, y) for x, y in zip(*map(next, streams)))

def build_on_ranks(tmp_path, world, folder):
    """cache_tokens() on ranks that are threads -> how many images each encoded."""
    barrier, sums, counts = threading.Barrier(world, timeout=60), {}, [0] * world

    def work(rank):
        def all_reduce(tensor):
            sums[rank] = tensor.clone()
            barrier.wait()
            total = sum(sums.values())
            barrier.wait()
            return total

        def count_and_encode(images):
            counts[rank] += len(images)
            return brightness(images)
        data.cache_tokens(encodable(tmp_path), count_and_encode, str(folder), rank=rank, world=world,
                          all_reduce=all_reduce)
    with concurrent.futures.ThreadPoolExecutor(world) as threads:
        list(threads.map(work, range(world)))
    return counts

def test_ranks_finish_a_killed_token_cache(tmp_path, small_blocks, monkeypatch):
    source = encodable(tmp_path)
    whole = cache_files(encoded(source, tmp_path / "whole"))
    calls, moments = {name: getattr(os, name) for name in ("fsync", "replace", "remove")}, [0]

    def mortal(call):
        def call_or_die(*arguments):
            moments[0] -= 1
            if moments[0] == 0:
                raise KeyboardInterrupt
            return call(*arguments)
        return call_or_die
    for k in itertools.count(1):  # dies at the k-th write or removal
        folder, moments[0], died = tmp_path / f"killed {k}", k, False
        with monkeypatch.context() as patched:
            for name, call in calls.items():
                patched.setattr(os, name, mortal(call))
            try:
                encoded(source, folder)
            except KeyboardInterrupt:
                died = True
        done = [np.load(path) for path in folder.glob("*.npy")]
        counts = build_on_ranks(tmp_path, k % 3 + 1, folder)
        assert sum(counts) == 38 - sum(map(len, done)) and cache_files(folder) == whole
        assert done or all(counts)
        if not died:
            break
    assert k == 3 * 6 + 1 and sum(counts) == 0

def test_other_tokens_are_made_again(tmp_path, small_blocks, capsys):
    source, out = encodable(tmp_path), str(tmp_path / "out")
    others = {"augvae": encodable(tmp_path, made_from={"augvae": "b"}),
              "tokenizer": encodable(tmp_path, tokenizer=Tokenizer.train(["text"], 258)),
              "sizes": encodable(tmp_path, n_text=11),
              "data and files": replace(source, dataset=data.Subset(source.dataset, range(30)))}
    for name, other in others.items():
        encoded(source, out)
        encoded(source, out, None)  # nothing is encoded anew
        capsys.readouterr()
        encoded(other, out)
        assert f"{out} are made again: {name} changed" in capsys.readouterr().out
    assert len(data.Tokens(out)) == 28 and len(os.listdir(out)) == 4 + 1
    os.utime(tmp_path / "pairs" / "05.png", (0, 0))
    for options in ({}, {"anew": True}):  # a file has changed
        with raises(TypeError):
            encoded(other, out, None, **options)
        encoded(other, out)

def test_too_large_ids_are_refused(tmp_path, monkeypatch):
    source = encodable(tmp_path)
    with raises(ValueError, match="codes up to 65535, not 70000"):
        encoded(source, tmp_path / "out", lambda x: torch.full((len(x), 4), 70000))
    with monkeypatch.context() as huge, raises(ValueError, match="65,537 tokens"):
        huge.setattr(Tokenizer, "__len__", lambda self: 65537)
        encodable(tmp_path)
    images = {path: path.read_bytes() for path in (tmp_path / "pairs").glob("[012]*.png")}
    for path in images:
        path.write_bytes(b"")
    with raises(OSError, match="samples could not be read"):
        encoded(source, tmp_path / "bad")
    for path, content in images.items():  # the disk is back
        path.write_bytes(content)
    assert len(data.Tokens(encoded(source, tmp_path / "bad"))) == 38

KINDS = list(itertools.product(data.SIZES, data.COLOURS, data.SHAPES))

def test_scenes_and_held_out_kinds():
    train_scenes = data.Scenes("train", 1500)
    assert train_scenes.scene(7) == data.Scenes("train", 10).scene(7) != data.Scenes("val", 10).scene(7)
    contents = {}
    for split, held in (("train", False), ("val", False), ("heldout", True)):
        scenes = [data.Scenes(split, 200).scene(i) for i in range(200)]
        contents[split] = {facts(things, relation) for things, relation, *_ in scenes}
        assert all(any(map(data.held_out, things)) == held for things, *_ in scenes)
        assert {len(things) for things, *_ in scenes} == {1, 2}
    assert not contents["train"] & contents["val"]
    # every pair of attributes is seen
    seen = [kind for kind in KINDS if not data.held_out(kind)]
    assert len(KINDS) == 192 and len(seen) == 168
    assert {thing for i in range(1500) for thing in train_scenes.scene(i)[0]} == set(seen)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(kind[i], kind[j]) for kind in seen} == {(kind[i], kind[j]) for kind in KINDS}

def test_oracle_reads_scenes():
    for split in ("train", "heldout"):
        scenes = data.Scenes(split, 80)
        for i in range(80):
            things, relation, _, captions = scenes.scene(i)
            truth = facts(things, relation)
            assert read_scene(scenes.image(i)) == truth
            assert len(captions) == 6 and data.N_FULL == 4
            for caption in captions[:4]:
                assert parse_caption(caption) == truth, caption
            for caption in captions[4:]:
                assert matches(parse_caption(caption), truth), caption

@slow
def test_oracle_reads_everything_everywhere():
    rng, centres = Random(0), list(itertools.product(range(8, 36, data.LATTICE), repeat=2))
    for kind in KINDS:
        for centre in rng.sample(centres, 8):
            assert read_scene(draw_things([kind], [centre])) == facts([kind], None)
        for relation in data.RELATIONS:
            things = [kind, rng.choice(KINDS)]
            image = draw_things(things, data.place_things(relation, rng))
            assert read_scene(image) == facts(things, relation)

def test_captions_are_judged():
    scene = facts([("small", "red", "circle"), ("large", "orange", "arrow")], "left of")
    assert scene == facts([("large", "orange", "arrow"), ("small", "red", "circle")], "right of")
    alone = facts([("small", "red", "circle")], None)
    for caption in ("a small red circle left of a large orange arrow", "an arrow right of a circle",
                    "something big and orange to the right of something little",
                    "the red circle is left of an orange arrow"):
        assert matches(parse_caption(caption), scene), caption
    for caption in ("a circle right of an arrow", "a blue circle left of an arrow", "a red circle",
                    "an orange circle left of a red arrow", "nonsense"):
        assert not matches(parse_caption(caption), scene), caption
    for caption in ("red circle", "there is a circle", "something small and red"):
        assert matches(parse_caption(caption), alone), caption
    assert not matches(parse_caption("a circle left of something"), alone)
    assert not matches(parse_caption("a circle"), None)

def test_exact_rates():
    scenes = data.Scenes("val", 12)
    references = [scenes.captions(i) for i in range(12)]
    pictures = [scenes.image(i) for i in range(12)]
    prompts = data.one_caption_each(references)
    assert [references[i].index(prompts[i]) % 6 for i in (0, 1, 2)] == [0, 1, 2]
    assert data.exact_rates(prompts, pictures, references, prompts) == {"t2i": 1.0, "i2t": 1.0}
    wrong = data.exact_rates(prompts, pictures[1:] + pictures[:1], references, ["a cat"] * 12)
    assert wrong["t2i"] < 0.3 and wrong["i2t"] == 0
    assert data.exact_rates(["a cat"], pictures[:1], [["a cat"]], ["a cat"]) == {}

def test_contact_sheets(tmp_path, capsys):
    sheet = data.contact_sheet([Image.new("RGB", (64, 64), "red")] * 5, ["a long caption " * 8] * 5, 3, 96)
    assert sheet.width == 3 * 102 + 6 and sheet.height > 2 * 102
    assert (np.asarray(sheet)[50, 50] == (255, 0, 0)).all()
    run = Namespace(config=sample.SampleConfig(), save_dir=tmp_path)
    rows = [[{"picture": Image.new("RGB", (8, 8)), "image": "a"}] * 2] * 65
    sample.save_samples(run, "made", rows, 2)  # shows 64 rows
    assert Image.open(tmp_path / "made.png").size == (2 * 134 + 6, 64 * 153 + 6)
    assert "the first 64 rows" in capsys.readouterr().out and len(os.listdir(tmp_path)) == 2 * 65 + 2

def png16(path, kind, colour, clear):
    """A PNG of one 16-bit colour. kind: 0 grey, 2 RGB. clear: the transparent colour."""
    colour, clear = (np.array(x, ">u2").tobytes() for x in (colour, clear))
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", bytes([0, 0, 0, 4, 0, 0, 0, 4, 16, kind, 0, 0, 0])), (b"tRNS", clear),
                       (b"IDAT", zlib.compress((b"\0" + colour * 4) * 4)), (b"IEND", b"")):
        content += len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")
    path.write_bytes(content)
    return path

def test_deep_and_odd_images(tmp_path):
    grey, image = np.full((8, 8), 257 * 100, np.uint16), Image.new("RGB", (8, 8))
    tif, pgm, notes, eps = (tmp_path / name for name in ("a.tif", "a.pgm", "notes.png", "eps.png"))
    pgm.write_bytes(b"P5 8 8 65535\n" + grey.astype(">u2").tobytes())
    Image.fromarray(grey).save(tif)
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "x" * 2_000_000, zip=True)
    image.save(notes, pnginfo=info)
    for path, expected in ((tif, 100), (pgm, 100), (notes, 0),
                           (png16(tmp_path / "a.png", 0, [257 * 40], [257 * 40]), 255),
                           (png16(tmp_path / "b.png", 0, [257 * 40], [257 * 40 + 1]), 40),
                           (png16(tmp_path / "c.png", 2, [257 * 40, 0, 5], [257 * 40, 0, 5]), 255)):
        assert (np.asarray(load_image(path)) == expected).all(), path
    image.save(eps, "EPS")  # Pillow would start Ghostscript
    with raises(data.Unreadable, match="eps.png is not an image that can be read .unknown format"):
        load_image(eps)
    whole = tif.read_bytes()  # in it, a tag's number, its type, count and value
    for name, tag, value in (("twelve", b"\x02\1\3\0\1\0\0\0", 12), ("inverted", b"\x06\1\3\0\1\0\0\0", 0)):
        at = whole.index(tag) + len(tag)
        (tmp_path / f"{name}.tif").write_bytes(whole[:at] + bytes([value]) + whole[at + 1:])
    for name, dtype in (("float", np.float32), ("deep", np.int32)):
        Image.fromarray(grey.astype(dtype)).save(tmp_path / f"{name}.tif")
    for name in ("twelve", "inverted", "float", "deep"):
        with raises(data.Unreadable, match=f"{name}.tif is not .* has no certain white"):
            load_image(tmp_path / f"{name}.tif")

def test_captions_are_cleaned(tmp_path):
    odd, clean = "\ta\0 \x07\x1bcat \u3000on\x7f\x9f a\x85mat ", "a cat on a mat"
    path, picture = tmp_path / "captions.json", noise(tmp_path / "0.png", 0)
    texts = [odd, None, math.nan, [odd], 7, " \0\n", f"one\r\ntwo\n{odd}"]
    notes = [(0, text) for text in texts] + [(1, None), (2, "again")]
    coco = {"images": [{"id": i, "file_name": f"{i % 2}.png"} for i in range(4)],  # each is there twice
            "annotations": [{"image_id": i, "caption": text} for i, text in notes]}
    split = {"images": [{"filename": "0.png", "split": "train", "sentences": [{"raw": x} for x in texts]}]}
    for record, more in ((coco, ["again"]), (split, [])):
        path.write_text(json.dumps(record))
        dataset = data.read_coco(tmp_path, path, "train")
        assert len(dataset) == 1 and dataset.captions(0) == [clean, f"one two {clean}", *more]
        assert dataset.left_out == {"images without a caption": len(more), "captions without words": 5}
    path.write_text('{"images": ' + "[" * 200_000)
    with raises(ValueError, match=r"^[^\n]*captions.json is neither MS-COCO's[^\n]*$"):
        data.read_coco(tmp_path, path, "train")
    lines = f"{odd}\rone\r\n \0\ntwo\n".encode()
    (tmp_path / "0.txt").write_bytes(lines)
    pack(tmp_path / "0.tar", [("0.png", picture.read_bytes()), ("0.txt", lines)])
    for dataset in (data.Pairs(tmp_path), data.Tar([tmp_path / "0.tar"])):
        assert dataset.captions(0) == [clean, "one", "two"]
    path.write_text(f"{odd.strip()}\t0.png\r\n \0\t0.png\r\n")
    assert data.read_tsv(path).captions(0) == [clean]

def test_endings(tmp_path):
    for name, text in (("a.JPG", "a.TXT"), ("b.pgm", "b.txt"), ("c.Png", "c.Txt"), ("d.tiff", "d.text")):
        Image.new("L", (8, 8)).save(tmp_path / name)
        (tmp_path / text).write_text(name)
    pairs = data.Pairs(tmp_path)
    assert [pairs.captions(i) for i in range(len(pairs))] == [["a.JPG"], ["b.pgm"], ["c.Png"]]
    assert len(data.read_folder(tmp_path)) == 4 and pairs.left_out["images without a caption"] == 1

def test_members_of_tar_shards(tmp_path):
    shards, picture = tmp_path / "[v2] shards", noise(tmp_path / "0.png", 0).read_bytes()
    members, config = [("./a.png", picture), ("./a.txt", b"a")], DataConfig(data="tar", train_dir=str(shards))
    shards.mkdir()
    hidden = [(f"{name}.png", b"") for name in ("._b", ".c", "__MACOSX/d", "x/.y/e")]
    pack(shards / "0.tar", hidden + members)
    assert len(data.open_data(config, "train", tmp_path / "log")) == 1 and not (tmp_path / "log").exists()
    assert len(list(shards.glob("*.npy"))) == 1
    link, sparse, *same = map(tarfile.TarInfo, ("b.png", "c.png", "./A.jpg", "./a.jpg"))
    link.type, link.linkname, sparse.pax_headers = tarfile.LNKTYPE, "./a.png", {"GNU.sparse.map": "0,0"}
    for bad, why in (([link, sparse], "2 members, b.png for one: it is not a plain file"),
                     (same, "1 members, ./a.jpg for one: its key has another image")):
        pack(shards / "0.tar", members)
        with tarfile.open(shards / "0.tar", "a") as tar:
            for member in bad:
                tar.addfile(member)
        for name in ("log", "again"):  # no index is kept, so it is said again
            assert data.open_data(config, "train", tmp_path / name).captions(0) == ["a"]
            assert f"left out {why}" in (tmp_path / name).read_text()

def test_tokens_follow_the_files(tmp_path, small_blocks, capsys):
    encodable(tmp_path)
    text, picture = (tmp_path / "pairs" / f"05.{ending}" for ending in ("txt", "png"))

    def again():
        n = []
        encoded(encodable(tmp_path), tmp_path / "out", lambda x: n.append(len(x)) or brightness(x))
        return sum(n), capsys.readouterr().out.count("out are made again: files changed\n")

    os.utime(picture, (0, 0))
    assert again() == (38, 0)
    for change in (lambda: text.write_text("right"), lambda: os.utime(text, (9, 9)),
                   lambda: noise(picture, 5, 71) and os.utime(picture, (0, 0)),  # only its size is new
                   lambda: os.utime(picture, (9, 9))):
        assert again() == (0, 0)
        change()
        assert again() == (38, 1)

# -----------------------------------------------------------------------------
# augvae.py

TINY = AugVAEConfig(image_size=32, levels=(8, 4, 2), hidden=8, ch_mult=(1, 2, 4), ch_mult_inner=(2, 4),
                    n_res_blocks=1, n_groups=4, z_channels=16, codebook_size=24, codebook_dim=6)

def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1

def test_the_configuration():
    with torch.device("meta"):
        vae = AugVAE(AugVAEConfig())
    assert sum(g * g for g in vae.config.grids) == 5440
    n = sum(t.numel() for t in vae.state_dict().values())
    assert round(n / 1e6) == 225
    for field, value, message in (("levels", (8, 4, 3), "levels"), ("hidden", 6, "n_groups"),
                                  ("ch_mult", (0, 1, 1), "ch_mult 0"), ("single_level", 5, "side 5")):
        with raises(ValueError, match=message):
            replace(TINY, **{field: value})

def channels_last(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()

def norm_and_conv(dtype=torch.float32):
    norm, conv = nn.GroupNorm(2, 8, eps=1e-6), nn.Conv2d(8, 6, 3, padding=1)
    for p in norm.parameters():
        nn.init.normal_(p)
    return norm.to(dtype), conv.to(dtype).to(memory_format=torch.channels_last)

def assert_equals_plain(norm, conv, x, dropout):
    assert_same_gradients(
        lambda x: augvae.norm_silu_conv(x, norm, conv, dropout),
        lambda x: conv(F.silu(norm(x)) * F.dropout(torch.ones_like(x), dropout)), [x],
        {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[x.dtype],
        [*norm.parameters(), *conv.parameters()], amp=x.dtype is torch.bfloat16)

@mark.parametrize("dropout", [0.0, 0.5])
@mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_silu_conv_equals_plain(dtype, dropout):
    norm, conv = norm_and_conv(torch.float64 if dtype is torch.float64 else torch.float32)
    assert_equals_plain(norm, conv, channels_last(3, 8, 6, 5, dtype=dtype), dropout)

def test_norm_silu_conv_keeps_its_input():
    (norm, conv), kept, x = norm_and_conv(), [], channels_last(2, 8, 16, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        augvae.norm_silu_conv(x, norm, conv)
    assert [t.data_ptr() for t in kept if t.numel() >= x.numel()] == [x.data_ptr()]

@mark.parametrize("norm_layout", [torch.contiguous_format, torch.channels_last])
@mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_layouts_on_cuda(dtype, norm_layout, monkeypatch):
    norm, conv = norm_and_conv()
    x, seen = channels_last(3, 8, 6, 5, dtype=dtype), []

    def watch(module, name, first, last, layout):
        original = getattr(module, name)

        def watched(*args, **options):
            for t in args[first:last]:
                assert t.is_contiguous(memory_format=layout) and t.dtype == dtype, name
            seen.append(name)
            return original(*args, **options)
        monkeypatch.setattr(module, name, watched)

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(augvae, "norm_takes_channels_last", lambda *_: norm_layout is torch.channels_last)
    watch(torch, "native_group_norm", 0, 1, norm_layout)
    watch(aten, "native_group_norm_backward", 0, 2, norm_layout)
    watch(F, "conv2d", 0, 1, torch.channels_last)
    watch(aten, "convolution_backward", 1, 2, torch.channels_last)
    assert_equals_plain(norm, conv, x, 0.0)
    assert seen[:5] == ["native_group_norm", "conv2d", "native_group_norm", "convolution_backward",
                        "native_group_norm_backward"]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        y = augvae.norm_silu_conv(x, norm, conv)
    for t in (y, torch.autograd.grad(y.sum(), x)[0]):
        assert t.is_contiguous(memory_format=torch.channels_last) and t.dtype == dtype

def test_misread_channels_last(monkeypatch):
    takes, backward = augvae.norm_takes_channels_last.__wrapped__, aten.native_group_norm_backward
    assert takes(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(aten, "native_group_norm_backward", lambda grad, x, *rest: backward(
        grad if x.is_contiguous() else -grad, x, *rest))
    assert not takes(torch.device("cpu"), torch.float32)
    wrong = torch.ones(2), torch.ones(3)  # as CUDA before torch 2.14
    monkeypatch.setattr(torch, "native_group_norm", lambda *_: wrong[0] @ wrong[1])
    assert not takes(torch.device("cpu"), torch.float32)

def test_blocks_equal_plain_ones():
    block = augvae.ResBlock(8, 16, replace(TINY, ae_dropout=0.3))

    def plain(x):
        h = block.layer1.conv(F.silu(block.layer1.norm(x)))
        h = F.silu(block.layer2.norm(h))
        return block.shortcut(x) + block.layer2.conv(h * F.dropout(torch.ones_like(h), 0.3, block.training))

    for training in (True, False):
        assert_same_gradients(block.train(training), plain, [channels_last(2, 8, 4, 4)], 1e-5,
                              list(block.parameters()))
    up = augvae.Upsample(5, 5, 3, padding=1).double()
    x = torch.randn(2, 5, 6, 7, dtype=torch.double, requires_grad=True)
    assert_same_gradients(
        up, lambda x: F.conv2d(F.interpolate(x, scale_factor=2), up.weight, up.bias, padding=1), [x], 1e-12,
        list(up.parameters()))

def test_nearest_codes():
    book, z = Codebook(TINY), torch.randn(500, 6)
    distance = torch.cdist(z.double(), book.weight.double()).square()
    for chunk in (1, 24 * 7, 2 ** 24):
        assert equal(book.nearest(z, chunk), distance.argmin(1))
    book.config = replace(TINY, rate=0.3)  # prefers common codes
    book.cluster_size.copy_(torch.arange(24.0) ** 3)
    p = book.cluster_size / book.cluster_size.sum()
    mean = sum(p[k] * book.weight[k] for k in range(24))
    var = sum(p[k] * (book.weight[k] - mean).square().sum() for k in range(24))
    brute = (distance - 0.3 * var * (p + 1e-9).log()).argmin(1)
    assert (book.nearest(z) == brute).float().mean() > 0.99  # all but numerical ties

def test_codes_are_searched_in_full_fp32(monkeypatch, request):
    book, addmm, precisions = Codebook(TINY), torch.addmm, []

    def watched(*args, **options):
        precisions.append(torch.get_float32_matmul_precision())
        return addmm(*args, **options)

    monkeypatch.setattr(torch, "addmm", watched)
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    torch.set_float32_matmul_precision("high")
    book.nearest(torch.randn(9, 6))
    with raises(RuntimeError):
        book.nearest(torch.randn(9, 5))
    assert precisions == ["highest"] * 2 and torch.get_float32_matmul_precision() == "high"

def test_quantising_is_straight_through():
    book = Codebook(TINY).train()
    before = copy.deepcopy(book.state_dict())
    z = torch.randn(2, 6, 4, 4, requires_grad=True)
    z_q, codes, loss = book(z)
    grad = torch.randn_like(z)
    assert equal(torch.autograd.grad(z_q, z, grad, retain_graph=True)[0], grad)
    expected = 2 * (z - book.lookup(codes)) / z.numel()
    assert allclose(torch.autograd.grad(loss, z)[0], expected, atol=1e-7)
    assert all(equal(before[k], v) for k, v in book.state_dict().items())

def test_training_quantises_from_vq_start():
    book, z = Codebook(replace(TINY, vq_start=2)), torch.randn(2, 6, 4, 4)
    for n in range(4):
        z_q, codes, loss = book.train()(z)
        assert equal(z_q, z) and loss == 0 if n < 2 else loss > 0
        assert allclose(z_q, book.lookup(codes), atol=1e-6) == (n >= 2)
        assert allclose(book.eval()(z)[0], book.lookup(codes), atol=1e-6)
        book.collect(z, codes)
        book.update()

def test_ranks_move_the_codebook_as_one_does(monkeypatch):
    """Three ranks, each with a third of the vectors of two levels, against loops."""
    monkeypatch.setattr(augvae, "DEAD_BELOW", 0.5)
    book = Codebook(replace(TINY, codebook_size=96))  # three revivals per update
    z = torch.randn(1, 6, 8, 8)
    book.collect(z, book(z)[1])
    book.update()
    levels = [torch.randn(3, side * side, 6) for side in (4, 2)]  # rank, vector, dim
    counts, sums, drawn = torch.zeros(96), torch.zeros(96, 6), []
    for level, z in enumerate(levels):
        keys = torch.rand(z.shape[:2], generator=torch.Generator().manual_seed(64 + level)).log()
        for rank in range(3):
            for i, k in enumerate(book.nearest(z[rank]).tolist()):
                counts[k] += 1
                sums[k] += z[rank, i]
                drawn.append((keys[rank, i] / (z[rank, i] - book.weight[k]).square().sum(), z[rank, i]))
    decay = 2 / 11  # of the second update
    sizes = decay * book.cluster_size + (1 - decay) * counts
    sums = decay * book.embed_sum + (1 - decay) * sums
    threshold = 0.5 * 60 / 96
    dead = [k for k in range(96) if sizes[k] < threshold][:3]
    for k, (_, vector) in zip(dead, sorted(drawn, key=lambda pair: pair[0], reverse=True)):
        sizes[k], sums[k] = 2 * threshold, 2 * threshold * vector

    ranks, messages = [copy.deepcopy(book) for _ in range(3)], []
    monkeypatch.setattr(augvae.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(augvae.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(augvae.dist, "all_reduce", lambda t: messages.append(t.clone()))
    for last in (False, True):  # they send, then receive the sum
        for rank, own in enumerate(ranks):
            monkeypatch.setattr(augvae.dist, "get_rank", lambda rank=rank: rank)
            own = own if last else copy.deepcopy(own)
            parts = [z[rank].T.reshape(1, 6, side, side) for z, side in zip(levels, (4, 2))]
            own.collect(parts[0] + 1, own(parts[0])[1])
            own.discard()  # a skipped step changes nothing
            for part in parts:
                own.collect(part, own(part)[1])
            use, perplexity = (float(x) for x in own.update())
        assert len(messages) == 3
        total = sum(messages)
        monkeypatch.setattr(augvae.dist, "all_reduce", lambda t, total=total: t.copy_(total))
    alive = sizes > 0
    for own in ranks:
        assert allclose(own.cluster_size, sizes) and allclose(own.embed_sum, sums, atol=1e-6)
        assert allclose(own.weight[alive], sums[alive] / sizes[alive, None], rtol=1e-3)
        assert equal(own.weight[~alive], book.weight[~alive])
        assert all(equal(getattr(own, name), value) for name, value in ranks[0].state_dict().items())
    shares = (counts / 60).tolist()
    assert use == approx(np.mean(counts.numpy() > 0))
    assert perplexity == approx(math.exp(-sum(p * math.log(p) for p in shares if p)), rel=1e-5)

def test_the_connections_of_the_drawing():
    vae, h = AugVAE(TINY), images()
    for i, z in enumerate(vae.features(h)):
        h = vae.encoders[i](h)
        assert h.shape == (2, 16, TINY.grids[i], TINY.grids[i])
        assert allclose(F.conv2d(h, vae.pre_quant.weight, vae.pre_quant.bias[i]), z, atol=1e-6)
    codes = vae.encode(images())
    assert [tuple(c.shape) for c in codes] == [(2, 8, 8), (2, 4, 4), (2, 2, 2)]
    assert all(c.dtype == torch.int64 and 0 <= c.min() and c.max() < 24 for c in codes)
    q = [vae.post_quant(vae.codebook.lookup(c), i) for i, c in enumerate(codes)]
    h = vae.decoders[0](q[2])
    h = vae.decoders[1](torch.cat([q[1], h], 1))
    h = vae.decoders[2](torch.cat([q[0], h], 1))
    decoded = vae.decode(codes)
    assert decoded.shape == (2, 3, 32, 32) and allclose(h.clamp(-1, 1), decoded, atol=1e-6)
    reconstruction, commitment, same = vae.train()(images())
    assert allclose(reconstruction, h, atol=1e-5) and commitment > 0
    assert all(equal(a, b) for a, b in zip(codes, same))
    with raises(ValueError, match=r"grids \(8, 4\)"):
        vae.decode(codes[:2])
    with raises(ValueError, match="outside"):
        vae.decode([codes[0], codes[1], codes[2] + 24])

def test_single_level_keeps_what_it_needs():
    ml = AugVAE(TINY)
    codes = ml.encode(images())
    for level, side in enumerate(TINY.levels):
        sl = ml.single_level(side)
        assert [c.tolist() for c in sl.encode(images())] == [codes[level].tolist()]
        # AugVAE-ML, with zeros for every missing half
        h = ml.post_quant(ml.codebook.lookup(codes[level]), level)
        h = ml.decoders[2 - level](h if level == 2 else torch.cat([h, torch.zeros_like(h)], 1))
        for decoder in list(ml.decoders)[3 - level:]:
            h = decoder(torch.cat([torch.zeros_like(h), h], 1))
        assert allclose(sl.decode([codes[level]]), h.clamp(-1, 1), atol=1e-5)
        reconstruction, commitment, _ = sl(images())
        (reconstruction.square().mean() + commitment).backward()
        assert all(p.grad is not None for p in sl.parameters())
        with raises(ValueError, match="already"):
            sl.single_level(side)

RELEASE_ORDER = "conv_in down mid up norm_out conv_out block attn downsample upsample".split()

def release_order(name):
    """Sorts tensors of encoders and decoders: levels from fine to coarse, blocks before attention."""
    words = [word for word in name.split(".")[1:] if word.isdigit() or word in RELEASE_ORDER]
    return [int(word) if word.isdigit() else RELEASE_ORDER.index(word) for word in words[:4]]

def released_shapes(c, single_level=0):
    """Names and shapes of a released checkpoint's tensors, in its order. c: the release's options."""
    options = {ours: c[theirs] for ours, theirs in augvae.RELEASED_SETTINGS.items()}
    vae = AugVAE(AugVAEConfig(**options, single_level=single_level))
    ours, shapes = {name: x.shape for name, x in vae.state_dict().items()}, {}

    def add_coders(kind):
        found = {}
        for name in ours:
            if name.startswith(kind):
                theirs = re.sub(r"(down|up)_(\d)_(block|attn)_(\d)", r"\1.\2.\3.\4", name)
                theirs = re.sub(r"(down|up)_(\d)_(\w+)", r"\1.\2.\3.conv", theirs)
                theirs = re.sub(r"layer(\d)\.(norm|conv)", r"\2\1", theirs)
                theirs = re.sub(r"conv_out\.(norm|conv)", r"\1_out", theirs)
                found[theirs.replace("mid_", "mid.").replace("shortcut", "nin_shortcut")] = ours[name]
        for name in sorted(found, key=release_order):
            shapes[name] = found[name]

    add_coders("encoders")
    for part in ("pre_quant", "post_quant"):
        for i in range(len(vae.config.levels)):
            shapes[f"{part}s.{i}.weight"] = ours[f"{part}.weight"]
            shapes[f"{part}s.{i}.bias"] = ours[f"{part}.bias"][1:]
    add_coders("decoders")
    for i in range(len(vae.config.levels)):
        for name in ("weight", "cluster_size", "embed_sum"):
            shapes[f"quantizers.{i}.embedding.{name.replace('sum', 'avg')}"] = ours[f"codebook.{name}"]
    shapes.update({name: shape for name, shape in ours.items() if name.startswith("connectors")})
    return shapes

def released_file(path, c, single_level=0):
    """A checkpoint as Lightning writes it. Tensor i is of RandomState(i), or equals its tied one."""
    state = {}
    for i, (name, shape) in enumerate(released_shapes(c, single_level).items()):
        r = RandomState(i).standard_normal(shape)
        if name.startswith("quantizers."):
            r = r / 2
        elif len(shape) == 1:
            r = 1 + 0.1 * r if name.endswith("weight") else 0.1 * r
        else:
            r = r / np.sqrt(np.prod(shape[1:]))
        state[name] = torch.from_numpy(r.astype(np.float32))
        if name.endswith("cluster_size"):
            state[name] = torch.ones(shape)
        elif name.endswith("embed_avg"):
            state[name] = state[name.replace("embed_avg", "weight")].clone()
        tied = re.match(r"(\w+quants|quantizers)\.[1-9]\d*\.(.*(weight|size|avg))", name)
        if tied:
            state[name] = state[f"{tied[1]}.0.{tied[2]}"]
    state["loss.perceptual_loss.lin0.model.1.weight"] = torch.ones(1)
    settings = Namespace(**c, loss_type="lpips_l2")
    torch.save({"epoch": 3, "state_dict": state,
                "hyper_parameters": {"args": settings, "batch_size": 8}}, path)
    return path

RELEASED = {"resolution": 32, "ch_mult": [1, 2], "attn_resolutions": [16, 8, 4, 2], "num_res_blocks": 1,
            "hidden_dim": 32, "z_channels": 32, "codebook_dim": 32, "num_tokens": 64, "use_attn": False,
            "dropout": 0.1, "quant_beta": 0.25}
ATTENTIVE = {**RELEASED, "ch_mult": [1, 1, 2], "attn_resolutions": [8, 4, 2], "num_res_blocks": 2,
             "z_channels": 48, "codebook_dim": 16, "num_tokens": 100, "use_attn": True}

has_namespaces = mark.skipif(not hasattr(torch.serialization, "safe_globals"),
                             reason="torch reads no Namespace with weights_only before 2.5")

# What the released code computes: SHA-256 of the tokens as int32, every 997th value of the reconstruction,
# commitment (of the decoded levels), mean squared error, and gradient norms of the sum of these two
@has_namespaces
@mark.parametrize("c, single_level, tokens, pixels, commitment, mse, norms", [
    (RELEASED, 0, "c89f5c1fa90efd50",
     [0.347915, 0.267447, -0.027976, 0.778806, 0.356596, -0.013522, -0.563661], 0.29926315, 0.66311485,
     [0.691998, 1.509000, 0.322852, 0.274588, 0.636714, 0.817374]),
    (RELEASED, 8, "afd44e983ed316fc",
     [-0.033409, -0.098346, -0.470951, 0.315475, -0.289876, -0.185737, -0.027495], 0.08632058, 0.63940877,
     [0.559810, 1.229984, 0.402413, 0.226730, 0.945299, 1.310286]),
    (ATTENTIVE, 0, "1c14f3e6ba63a1d3",
     [-0.101659, -0.06568, -0.649225, -0.474758, 0.323068, -0.26233, -0.240731], 0.17847651, 0.64587975,
     [1.603102, 3.714169, 0.753489, 0.351581, 1.658548, 1.054135]),
    (ATTENTIVE, 4, "c2f9e7937507908d",
     [0.242536, -0.589855, 0.123157, 0.359199, -0.423972, -0.285846, 0.395595], 0.06335053, 0.86143166,
     [1.770344, 4.651626, 0.961495, 0.541367, 3.581799, 2.439164])])
def test_released_weights(c, single_level, tokens, pixels, commitment, mse, norms, tmp_path):
    vae = AugVAE.load(released_file(tmp_path / "released.ckpt", c, single_level))
    assert vae.config.grids == ((single_level,) if single_level else tuple(c["attn_resolutions"]))
    assert (vae.config.ae_dropout, vae.config.attention) == (0.1, c["use_attn"])
    x = torch.from_numpy(RandomState(1000).uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32))
    reconstruction, loss, codes = vae(x)
    flat = torch.cat([code.flatten(1) for code in codes], 1).numpy().astype(np.int32)
    assert hashlib.sha256(flat.tobytes()).hexdigest()[:16] == tokens
    assert reconstruction.flatten()[::997].tolist() == approx(pixels, abs=1e-4)
    assert loss.item() == approx(commitment, rel=1e-5)
    error = F.mse_loss(reconstruction, x)
    assert error.item() == approx(mse, rel=1e-5)
    (error + loss).backward()
    layers = (vae.encoders[0].conv_in, vae.encoders[1].conv_in, vae.pre_quant, vae.post_quant,
              vae.decoders[0].conv_in, vae.decoders[-1].conv_out.conv)
    assert [layer.weight.grad.norm().item() for layer in layers] == approx(norms, rel=1e-3)
    # The codebook trains on, without the quick decay of its first updates
    codes = vae.train()(x, collect=True)[2]
    vae.codebook.update()
    counts = torch.bincount(torch.cat([code.flatten() for code in codes]), minlength=c["num_tokens"])
    assert allclose(vae.codebook.cluster_size, 0.99 + 0.01 * counts)

class Payload:
    """Must not run."""
    def __reduce__(self):
        return os.system, ("touch pwned",)

def is_refused(message, path, *stages):
    with raises(ValueError, match=message) as info:
        augvae.read_checkpoint(path, *stages) if stages else AugVAE.load(path)
    assert path in str(info.value) and "\n" not in str(info.value) and not os.path.exists("pwned")

@has_namespaces
def test_bad_released_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = torch.load(released_file("whole.ckpt", RELEASED), weights_only=False)
    wrong = {**whole["state_dict"], "post_quants.1.weight": torch.ones(32, 32, 1, 1)}
    for message, changes in (
            (r"asks to run \w+\.system", {"hyper_parameters": {"args": Payload()}}),
            ("asks to run .*AugVAEConfig", {"callbacks": TINY}),
            ("'args'", {"hyper_parameters": {}}),
            ("resolution", {"hyper_parameters": {"args": Namespace()}}),
            ("pre_quants.0.bias", {"state_dict": {}}),
            ("post_quants.1.weight is not equal", {"state_dict": wrong})):
        torch.save({**whole, **changes}, "changed.ckpt")
        is_refused(message, "changed.ckpt")
    args = whole["hyper_parameters"]["args"]
    torch.save({**whole, "hyper_parameters": args}, "bare.ckpt")
    AugVAE.load("bare.ckpt")

def test_bad_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vae, config = AugVAE(TINY), asdict(TINY)
    content = {"stage": "augvae_ml", "config": config, "model": vae.state_dict()}
    torch.save(content, "augvae_ml.pt")
    again = AugVAE.load("augvae_ml.pt")
    assert again.config == TINY and not again.training
    assert augvae.fingerprint(again) == augvae.fingerprint(vae) != augvae.fingerprint(AugVAE(TINY))
    is_refused("no checkpoint biart.pt: `train.py --stage biart` makes it", "biart.pt", "biart")
    is_refused("of augvae_ml, not of biart", "augvae_ml.pt", "biart")
    for message, saved in (("not a whole checkpoint", [1, 2]), ("of another project, not", {"weights": 2})):
        torch.save(saved, "other.pt")
        is_refused(message, "other.pt", "biart")
    whole = (tmp_path / "augvae_ml.pt").read_bytes()
    for damaged in (b"", whole[:5000], whole[:-100]):
        (tmp_path / "augvae_sl.pt").write_bytes(damaged)
        is_refused(r"augvae_sl.pt is not a whole checkpoint \(\w+\)$", "augvae_sl.pt")
    (tmp_path / "augvae_sl_best.pt").write_bytes(whole)
    is_refused("copy augvae_sl_best.pt", "augvae_sl.pt", "augvae_sl")
    for message, changes in (
            (r"older version .*settings ema_eps, dead_below\): train it anew",
             {"config": {**config, "ema_eps": 1e-5, "dead_below": 0.03}}),
            ("levels", {"config": {**config, "image_size": 33}}),
            ("invalid", {"config": {**config, "codebook_size": "many"}}),
            (r"codebook.weight.*\[24, 6\]", {"config": {**config, "codebook_size": 25}})):
        torch.save({**content, **changes}, "changed.pt")
        is_refused(message, "changed.pt")
    torch.save({"stage": "augvae_ml"}, "changed.pt")
    is_refused("'config'", "changed.pt")

@fixture
def lpips_weights(tmp_path, monkeypatch):
    """Paths of LPIPS's two files in torch hub's cache, made by rule."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", denied)
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    vgg = {"classifier.0.bias": torch.zeros(3)}
    for n, i, o in zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), widths, widths[1:]):
        r = RandomState(n)
        weight = r.standard_normal((o, i, 3, 3)) * (2 / (9 * i)) ** 0.5
        vgg[f"features.{n}.weight"] = torch.from_numpy(weight).float()
        vgg[f"features.{n}.bias"] = torch.from_numpy(r.standard_normal(o) * 0.1).float()
    heads = [RandomState(100 + i).rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))]
    lpips = {f"lin{i}.model.1.weight": torch.from_numpy(head).float() for i, head in enumerate(heads)}
    paths = cache / augvae.VGG_FILE[0], cache / augvae.LPIPS_FILE[0]
    torch.save(vgg, paths[0])
    torch.save(lpips, paths[1])
    return paths

def test_lpips_equals_the_lpips_package(lpips_weights):
    lpips = LPIPS(download=False).train()  # no dropout wakes up
    x = torch.from_numpy(RandomState(7).uniform(-1, 1, (4, 3, 32, 32))).float()
    a, b = x[:2], x[2:].clone().requires_grad_()
    distance = lpips(a, b)
    # What lpips 0.1.4 gives, net="vgg", with the same weights
    assert distance.tolist() == approx([0.661448061466217, 0.6806221008300781], rel=1e-5)
    gradient = torch.autograd.grad(distance.sum(), b)[0]
    assert gradient.norm().item() == approx(0.029269661754369736, rel=1e-4)
    assert not any(p.requires_grad for p in lpips.parameters())
    same = torch.zeros(1, 3, 16, 16, requires_grad=True)
    lpips(same, same.detach()).backward()
    assert same.grad.abs().max() == 0 == lpips(same, same)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lpips(a, b).tolist() == approx(distance.tolist(), rel=0.05)

def test_weights_are_downloaded_and_checked(lpips_weights, tmp_path, monkeypatch):
    vgg, lpips = lpips_weights
    for path, other, url, name in ((vgg, lpips, augvae.VGG_FILE[2], "features.0.weight"),
                                   (lpips, vgg, augvae.LPIPS_FILE[2], "lin0.model.1.weight")):
        path.rename(tmp_path / "aside")
        for download, why in ((True, "Permission denied"), (False, "may not be downloaded")):
            with raises(OSError, match=re.escape(url)) as info:
                LPIPS(download)
            assert str(path) in str(info.value) and why in str(info.value)
        path.write_bytes(other.read_bytes())
        with raises(ValueError, match=name):
            LPIPS()
        (tmp_path / "aside").rename(path)
    monkeypatch.undo()  # the real download, of a file on this disk
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with raises(OSError, match="hash"):
        augvae.find_weights("other.pth", "0" * 64, lpips.as_uri())
    assert sorted(vgg.parent.iterdir()) == sorted(lpips_weights)  # nothing half-done remains
    content = lpips.read_bytes()
    path = augvae.find_weights("other.pth", hashlib.sha256(content).hexdigest(), lpips.as_uri())
    assert Path(path).read_bytes() == content

# -----------------------------------------------------------------------------
# biart.py

GPT = BiARTConfig(n_layer=2, n_head=2, n_embd=16, n_text=6, text_vocab=20, end_token=18, pad_token=19,
                  image_vocab=12, image_side=3)

def text_and_codes(n=4, seed=0):
    """Random text (n, 6), of 2, 5, 3, 4 ... words and an end token, and image codes (n, 9)."""
    g = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 18, (n, 6), generator=g)
    for row, length in zip(text, (2, 5, 3, 4) * n):
        row[length], row[length + 1:] = 18, 19
    return text, torch.randint(0, 12, (n, 9), generator=g)

def biart(seed=0, **changes):
    """A small random model, whose weights are so large that every part changes the result."""
    torch.manual_seed(seed)
    model = BiART(replace(GPT, **changes)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model

@mark.parametrize("rows", [1, 40])
@mark.parametrize("bias", [False, True])
@mark.parametrize("amp", [False, True])
def test_fused_linear_layers_equal_plain_ones(rows, bias, amp):
    layer, ln = nn.Linear(12, 20, bias), nn.LayerNorm(12)
    nn.init.normal_(ln.weight)
    nn.init.normal_(ln.bias)
    x = torch.randn(rows, 3, 12, requires_grad=True)
    for fused, plain, parameters in (
            (lambda x: linear_after(F.gelu, x, layer), lambda x: layer(F.gelu(x)), []),
            (lambda x: norm_linear(x, ln, layer), lambda x: layer(ln(x)), [*ln.parameters()])):
        assert_same_gradients(fused, plain, [x], 3e-2 if amp else 1e-5,
                              [*layer.parameters(), *parameters], amp)
        with torch.no_grad():
            assert equal(fused(x), plain(x))

@mark.parametrize("max_logits", [1, 70, 2 ** 22])
@mark.parametrize("amp", [False, True])
def test_chunked_cross_entropy_equals_plain(max_logits, amp, monkeypatch):
    monkeypatch.setattr("biart.MAX_LOGITS", max_logits)
    h, weight = torch.randn(9, 6, requires_grad=True), torch.randn(20, 6, requires_grad=True)
    targets, token_weights = torch.randint(0, 20, (9,)), torch.rand(9)

    def chunked(h, weight):
        return LinearCrossEntropy.apply(h, weight, targets, token_weights)[0]

    def plain(h, weight):
        return (token_weights * F.cross_entropy(F.linear(h, weight), targets, reduction="none")).sum()

    assert_same_gradients(chunked, plain, [h, weight], 3e-2 if amp else 1e-5, amp=amp)
    with torch.no_grad():
        _, nll = LinearCrossEntropy.apply(h, weight, targets, token_weights)
        assert allclose(nll, F.cross_entropy(F.linear(h, weight), targets, reduction="none"))

def test_blocks_keep_no_norm_and_no_gelu():
    """It keeps the input, q, k, v, attention's output, the middle, 4 x hidden."""
    block, saved = Block(GPT), []
    x = torch.randn(8, 24, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        block(x)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() / x.nbytes for t in saved}
    assert sum(size for size in sizes.values() if size >= 1) == 10

@mark.skipif(not hasattr(torch.compiler, "is_compiling"), reason="came with torch 2.3")
def test_a_compiled_model(monkeypatch):
    results = []
    for compiled in (False, True):
        model = biart(code_hidden=8)
        if compiled:  # torch.compile gets the plain layers
            monkeypatch.setattr(LinearAfter, "apply", None)
        loss, _ = (torch.compile(model, backend="eager") if compiled else model)(*text_and_codes())
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 20
    for a, b in zip(*results):
        assert allclose(a, b, atol=1e-6)

@mark.parametrize("positions", ["modality", "sequence"])
@mark.parametrize("to", ["image", "text"])
@torch.no_grad()
def test_no_token_sees_the_future(to, positions):
    model = biart(positions=positions)
    x = model.embed(*text_and_codes(), to)
    h = model.transformer(x)
    for j in range(15):
        changed = x.clone()
        changed[:, j] = torch.randn(16)
        same = torch.isclose(model.transformer(changed), h, atol=1e-6).all(2).all(0)
        assert same[:j].all() and not same[j:].any()

def test_layouts_segments_and_positions():
    model, (text, image) = biart(), text_and_codes()
    t2i, i2t = model.embed(text, image, "image"), model.embed(text, image, "text")
    segment = model.segment.weight  # a token has the same position on both sides
    assert allclose(t2i[:, :6] - segment[REF], i2t[:, 9:] - segment[GEN], atol=1e-6)
    assert allclose(t2i[:, 6:] - segment[GEN], i2t[:, :9] - segment[REF], atol=1e-6)
    expected = model.row_position.weight[1] + model.column_position.weight[2] + segment[GEN]
    assert allclose(model.position_embedding("image", GEN)[5], expected)
    expected = model.token["text"].weight[text[2, 1]] + model.text_position.weight[1] + segment[REF]
    assert allclose(t2i[2, 1], expected)
    absolute = biart(positions="sequence")
    position, segment = absolute.position.weight, absolute.segment.weight
    for modality, start in (("image", 6), ("text", 9)):
        assert allclose(absolute.position_embedding(modality, GEN)[0], position[start] + segment[GEN])
        assert allclose(absolute.position_embedding(modality, REF)[0], position[0] + segment[REF])

@torch.no_grad()
def test_the_loss_of_both_directions():
    model, (text, image), by_hand = biart(), text_and_codes(), {}
    for to, samples in (("image", [0, 2]), ("text", [1, 3])):
        targets, n_ref = (image, 6) if to == "image" else (text, 9)
        logits = model.logits(model.transformer(model.embed(text, image, to)), to)[:, n_ref - 1:-1]
        nll = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=19)
        n_tokens = torch.tensor([9] * 4 if to == "image" else [3, 6, 4, 5])
        by_hand[to] = (nll.sum(1) / n_tokens)[samples].mean().item()
        for start in (0, 4):
            log_p, count = model.log_likelihood(text, image, to, start)
            assert allclose(log_p, -nll[:, start:].sum(1), atol=1e-5)
            assert equal(count, (n_tokens - start).clamp(min=0))
    for weight in (1.0, 3.0):
        loss, parts = biart(t2i_weight=weight)(text, image)
        assert parts == approx({"t2i": by_hand["image"], "i2t": by_hand["text"]}, rel=1e-5)
        assert loss == approx((weight * by_hand["image"] + by_hand["text"]) / (weight + 1), rel=1e-5)
    with raises(ValueError, match="batch size 3 is odd"):
        model(text[:3], image[:3])

def test_null_blanks_the_reference_side():
    model, (text, image) = biart(), text_and_codes()
    other = text_and_codes(seed=1)[0]
    yes = torch.ones(4, dtype=torch.bool)
    assert equal(model.embed(text, image, "image", yes), model.embed(other, image, "image", yes))
    assert equal(model.embed(text, image, "text", yes)[:, 9:], model.embed(text, image, "text")[:, 9:])
    for null, same in ((yes, True), (torch.tensor([True, True, False, True]), False)):
        assert (model(text, image, null)[1]["t2i"] == model(other, image, null)[1]["t2i"]) == same

def test_image_tokens_are_replaced():
    model, (text, image) = biart(replace_prob=1.0), text_and_codes()
    plain = {to: model.embed(text, image, to) for to in OTHER}
    assert equal(plain["image"][:, 6:], model.embed_side(image, "image", GEN))
    torch.manual_seed(0)
    shuffled = image.flatten()[torch.randperm(36)].view(4, 9)
    model.train()
    torch.manual_seed(0)
    expected = torch.cat([plain["image"][:, :6], model.embed_side(shuffled, "image", GEN)], 1)
    assert equal(model.embed(text, image, "image"), expected)
    assert equal(model.embed(text, image, "text"), plain["text"])
    model.config.replace_prob = 0.25
    image = torch.arange(4000 * 9).view(4000, 9)
    assert abs((model.replace_some(image) != image).float().mean().item() - 0.25) < 0.02

def test_code_embeddings():
    model, vectors = biart(code_hidden=5, code_dim=3), torch.randn(12, 3) * 4 + 1
    model.set_code_vectors(vectors)
    codes = model.token["image"]
    assert abs(codes.vectors.mean(0)).max() < 1e-5 and abs(codes.vectors.std() - 1) < 0.05
    assert allclose(codes.weight, 0.2 * codes.own + codes.c_proj(F.gelu(codes.c_fc(codes.vectors))))
    assert equal(codes(torch.tensor([[3, 7]])), codes.weight[[3, 7]][None])
    with torch.no_grad():
        kept = codes.eval().weight
        assert kept is codes.weight
        codes.own.add_(1)
        assert allclose(model.train().eval().token["image"].weight, kept + 0.2)
    model(*text_and_codes())[0].backward()
    assert all(p.grad is not None for p in codes.parameters())
    biart().set_code_vectors(vectors)

def logits_by_hand(model, ref, to, tokens, guidance):
    """Logits of the token behind a list of tokens, (V,), for one ref (1, n_ref)."""
    both = []
    for null in (False, True):
        ref_side = model.embed_side(ref, OTHER[to], REF, torch.tensor([null]))
        gen_side = model.embed_side(torch.tensor([tokens], dtype=torch.long), to, GEN)
        both.append(model.logits(model.transformer(torch.cat([ref_side, gen_side], 1))[0, -1], to))
    logits, null_logits = both
    p = logits.softmax(0)
    if guidance != 1:
        logits = logits + (guidance - 1) * (1 - p.max()) * (logits - null_logits)
        logits[p < PLAUSIBLE * p.max()] = -torch.inf
    if to == "text":
        logits[model.config.pad_token] = -torch.inf
    return logits

def generate_by_hand(model, ref, to, seed, prefix, sampling):
    """One sample: the whole sequence for every token."""
    length, tokens = model.config.length(to), list(prefix)
    uniform = torch.rand(length, generator=torch.Generator().manual_seed(seed))
    while len(tokens) < length:
        logits = logits_by_hand(model, ref, to, tokens, sampling.guidance)
        tokens.append(sample_token(logits[None], uniform[len(tokens)][None], sampling).item())
        if to == "text" and tokens[-1] == 18:
            return tokens + [19] * (length - len(tokens))
    return tokens

class PretendGPU(TorchFunctionMode):
    """Tensors say that they are on a GPU, so the cache takes the way with a mask."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function == torch.Tensor.device.__get__:
            return torch.device("cuda")
        if kwargs and "device" in kwargs:
            kwargs = {**kwargs, "device": "cpu"}
        return function(*("cpu" if isinstance(x, torch.device) else x for x in args), **(kwargs or {}))

@mark.parametrize("positions", ["modality", "sequence"])
@mark.parametrize("to", ["image", "text"])
@mark.parametrize("options", [{}, {"temperature": 0}, {"guidance": 2.5, "temperature": 0.8},
                              {"top_k": 4, "top_p": 0.7}])
@torch.no_grad()
def test_cached_generation_equals_uncached(to, positions, options):
    model, (text, image) = biart(2, positions=positions), text_and_codes(2)
    model.token["text"].weight[18] += 1
    ref, gen = (text, image) if to == "image" else (image, text)
    sampling = Sampling(**options)
    for n_prefix, seeds in ((0, [5, 6, 7, 8]), (2, None), (gen.shape[1], None)):
        prefix = gen[:, :n_prefix] if n_prefix else None
        expected = [generate_by_hand(model, ref[i // 2:i // 2 + 1], to, seeds[i] if seeds else i,
                                     gen[i // 2, :n_prefix].tolist(), sampling) for i in range(4)]
        tokens, log_p = model.generate(ref, to, 2, prefix, sampling, seeds)
        assert tokens.tolist() == expected and (to == "image" or n_prefix == 2 or 19 in tokens)
        with PretendGPU():
            assert equal(model.generate(ref, to, 2, prefix, sampling, seeds)[0], tokens)
        pairs = {"text": text.repeat_interleave(2, 0), "image": image.repeat_interleave(2, 0), to: tokens}
        assert allclose(log_p, model.log_likelihood(**pairs, to=to, start=n_prefix)[0], atol=1e-5)

@mark.parametrize("fails", [False, True])
def test_graphs_record_and_replay(fails, monkeypatch):
    calls, recording = [], []

    class Graph:
        def replay(self):  # reads and writes the memory that was recorded
            calls.append("replay")
            self.h.copy_(self.x * 2)

    @contextlib.contextmanager
    def record(graph, capture_error_mode):
        recording.append(graph)
        if fails:
            raise RuntimeError("operation not permitted")
        yield
        recording.pop()

    def step(x):
        if recording:
            recording[0].x, recording[0].h = x, torch.empty_like(x)
            return recording[0].h
        calls.append("step")
        return x * 2

    for name in ("current_stream", "synchronize", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: recording.clear())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    graphed = GraphedStep(step)
    with warns(UserWarning, match="no CUDA graphs here") if fails else contextlib.nullcontext():
        for i in range(5):
            assert graphed(torch.tensor([float(i)])).tolist() == [2 * i]
    assert calls == (["step"] * 5 if fails else ["step"] + ["replay"] * 4)

@torch.no_grad()
def test_a_decoding_step_stays_in_its_memory():
    """A recorded graph reads and writes the memory of the first step for ever."""
    model, (text, _) = biart(), text_and_codes(2)
    with PretendGPU():
        h, cache = model.prefill(text, "image", text[:, :0], 1.0, n=2)
        places = [x.data_ptr() for x in (cache.position, *cache.kv)]
        for position in (6, 7):
            assert cache.position.tolist() == [position]
            model.decode_step(h, cache)
            assert [x.data_ptr() for x in (cache.position, *cache.kv)] == places
            assert all(kv[:, :, :, position].any() and not kv[:, :, :, position + 1].any() for kv in cache.kv)

def test_sampling_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.5]])
    uniform = (torch.arange(20000) + 0.5) / 20000

    def shares(**options):
        tokens = sample_token(logits.repeat(20000, 1), uniform, Sampling(**options))
        return torch.bincount(tokens, minlength=5) / 20000

    assert allclose(shares(), logits[0].softmax(0), atol=2e-3)
    assert allclose(shares(temperature=0.5), (2 * logits[0]).softmax(0), atol=2e-3)
    three = torch.tensor([2.0, 1.0, -torch.inf, -torch.inf, 1.5]).softmax(0)
    assert allclose(shares(top_k=3), three, atol=2e-3)
    assert allclose(shares(top_p=0.8), three, atol=2e-3)  # the two likeliest sum to 0.75, three to 0.92
    assert shares(top_p=0.7)[[1, 2, 3]].sum() == 0
    assert shares(top_p=1e-6)[0] == 1 and shares(temperature=0)[0] == 1 and shares(top_k=1)[0] == 1
    for end in (torch.tensor([1 - 1e-7]), torch.tensor([1 - 2 ** -24])):  # the last token that can occur
        assert sample_token(logits, end, Sampling()).item() == 4
        assert sample_token(logits, end, Sampling(top_k=3)).item() == 1
        assert sample_token(logits[:, :3].log(), end, Sampling()).item() == 1  # token 2 has p = 0

def beam_search_by_hand(model, image, width, prefix, length_penalty, guidance):
    """Whole sequences, no cache, one image -> texts and their scores, best first."""
    c = model.config

    def score(beam):
        return beam[1] / (len(beam[0]) - len(prefix)) ** length_penalty

    beams = [(list(prefix), 0.0)]
    for _ in range(c.n_text - len(prefix)):
        grown = []
        for tokens, log_p in beams:
            if c.end_token in tokens:
                grown.append((tokens, log_p))
                continue
            next_log_p = logits_by_hand(model, image, "text", tokens, guidance).log_softmax(0).tolist()
            grown += [(tokens + [word], log_p + next_log_p[word]) for word in range(c.pad_token)]
        beams = sorted(grown, key=score, reverse=True)[:width]
    texts = [tokens + [c.pad_token] * (c.n_text - len(tokens)) for tokens, _ in beams]
    return texts, [score(beam) for beam in beams]

@mark.parametrize("n_text, width", [(3, 100), (6, 4)])  # more than there are texts
@mark.parametrize("prefix", [[], [2]])
@mark.parametrize("length_penalty, guidance", [(0.0, 1.0), (0.7, 2.0), (1.0, 1.0)])
@torch.no_grad()
def test_beam_search_against_brute_force(n_text, width, prefix, length_penalty, guidance):
    changes = {"text_vocab": 6, "end_token": 4, "pad_token": 5} if n_text == 3 else {}
    model, image = biart(seed=3, n_text=n_text, **changes), text_and_codes(2)[1]
    model.token["text"].weight[model.config.end_token] += 0.3  # captions end at different lengths
    given = torch.tensor([prefix] * 2, dtype=torch.long)
    found, scores = model.beam_search(image, width, given, length_penalty, guidance)
    for i in range(2):
        texts, expected = beam_search_by_hand(model, image[i:i + 1], width, prefix, length_penalty, guidance)
        assert found[i, :4].tolist() == texts[:4]
        assert allclose(scores[i, :len(texts)], torch.tensor(expected), atol=1e-5)
    greedy, _ = model.generate(image, "text", 1, given, Sampling(temperature=0, guidance=guidance))
    assert equal(model.beam_search(image, 1, given, length_penalty, guidance)[0][:, 0], greedy)

def test_one_batch_is_learned_both_ways():
    model, (text, image) = BiART(replace(GPT, n_embd=32)), text_and_codes(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        order = torch.randperm(4)
        loss, _ = model(text[order], image[order])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    likeliest = Sampling(temperature=0)
    assert equal(model.eval().generate(text, "image", sampling=likeliest)[0], image)
    assert equal(model.generate(image, "text", sampling=likeliest)[0], text)

# -----------------------------------------------------------------------------
# train.py

MINIATURE = ["--image_size=64", "--levels=8,4", "--token_grid=8", "--ch_mult", "1,1,1,2", "--hidden=8",
             "--n_groups=4", "--z_channels=16", "--codebook_size=32", "--codebook_dim=8", "--n_layer=1",
             "--n_head=2", "--n_embd=16", "--n_scenes=24", "--batch_size=4", "--max_iters=4",
             "--eval_interval=2", "--log_interval=1", "--eval_images=6", "--vq_start=2", "--device=cpu"]
SMALL = [*MINIATURE, "--image_size=8", "--levels=4,2", "--token_grid=4", "--ch_mult=1,2"]
STEADY = ["--dropout=0", "--replace_prob=0", "--null_prob=0"]  # no random numbers in a step of BiART
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
torch.set_num_threads(1)  # as in run(), for equal bits

def started(*command, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([str(c) for c in command], cwd=HERE, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

def run(*command, ok=True, **environment):
    """Run a command in the repository -> what it printed. It must succeed or, with ok=False, fail."""
    process = started(*command, **environment)
    try:
        printed, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert (process.returncode == 0) == ok, printed
    return printed

def refused(*command):
    """It must fail with a sentence, without a traceback -> what it printed."""
    printed = run(sys.executable, *command, ok=False)
    assert "Traceback" not in printed, printed
    return printed

def last_json(printed):
    """The last JSON object that a command printed."""
    return json.loads([line for line in printed.splitlines() if line.startswith("{")][-1])

def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))

def losses(out, stage):
    return [float(row["loss"]) for row in rows(out / f"{stage}.csv")]

def checkpoint(out, stage):
    return augvae.read_checkpoint(str(out / f"{stage}.pt"), stage)

@fixture(scope="module")
def finished(tmp_path_factory):
    """A miniature run, made by the real command."""
    out = tmp_path_factory.mktemp("run") / "out"
    printed = run(sys.executable, "train.py", *MINIATURE, "--out_dir", out)
    return out, printed

@fixture
def copied_run(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "copy")

def train_in(out, *given):
    train.main([*map(str, given), f"--out_dir={out}"])

def sample_in(out, *given):
    sample.main([*map(str, given), f"--out_dir={out}"])

def assert_equal_runs(a, b, *stages):
    """Equal to the last bit: losses, weights, and the optimizer's averages."""
    for stage in stages:
        assert losses(a, stage) == losses(b, stage)
        ours, theirs = ([c["model"], c["optimizer"]] for c in (checkpoint(a, stage), checkpoint(b, stage)))
        for x, y in zip(tree_flatten(ours)[0], tree_flatten(theirs)[0]):
            assert equal(x, y) if isinstance(x, torch.Tensor) else x == y

@slow
@old_torch
def test_training_makes_a_whole_run(finished, capsys):
    out, printed = finished
    for stage in train.STAGES:
        log = rows(out / f"{stage}.csv")
        assert [int(row["step"]) for row in log] == [1, 2, 3, 4] and f"{stage} 4/4 loss" in printed
        assert [bool(row["val_loss"]) for row in log] == [False, True, False, True]
        for row in log:
            assert all(0 < float(row[name]) < math.inf for name in ("loss", "images_per_s", "peak_gb"))
        assert all(Image.open(out / f"{stage}_00000{step}.png").width > 100 for step in (0, 2, 4))
        last = checkpoint(out, stage)["progress"]
        best = augvae.read_checkpoint(str(out / f"{stage}_best.pt"), stage)["progress"]
        assert last["step"] == 4 and best["val_loss"] == last["best_val_loss"] <= last["val_loss"]
    assert "codebook_use" in printed and not list(out.rglob("*.part"))
    # A finished run that is resumed does nothing
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    train_in(out, "--resume")
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before
    assert capsys.readouterr().out.count(": 0 steps in ") == 3

def wait_for(process, beginning):
    while not process.stdout.readline().startswith(beginning):
        assert process.poll() is None, f"it ended without a line {beginning}"

@slow
def test_a_killed_run_continues_to_the_last_bit(finished, tmp_path):
    resume = []
    for line, seconds in (("augvae_ml 3/4", 0), ("augvae_sl 3/4", 0.2), ("biart 3/4", 0.01)):
        process = started(sys.executable, "train.py", *MINIATURE, "--out_dir", tmp_path, *resume)
        wait_for(process, line)
        time.sleep(seconds)
        process.kill()
        process.communicate()
        resume = ["--resume"]
    train_in(tmp_path, "--resume")
    assert_equal_runs(tmp_path, finished[0], *train.STAGES)

@slow
@mark.parametrize("launcher", [[sys.executable], TORCHRUN], ids=["alone", "torchrun"])
def test_a_stopped_run_continues_to_the_last_bit(launcher, copied_run, tmp_path):
    whole = shutil.copytree(copied_run, tmp_path / "whole")
    given = [*MINIATURE, "--stage=biart", "--max_iters=150", "--eval_interval=150", "--log_interval=10",
             "--batch_size=2", "--overwrite"]
    run(*launcher, "train.py", *given, "--out_dir", whole)
    process = started(*launcher, "train.py", *given, "--out_dir", copied_run)
    wait_for(process, "biart 20/")
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    step = checkpoint(copied_run, "biart")["progress"]["step"]
    assert 20 <= step < 150 and f"biart stopped at step {step} and saved" in printed
    assert process.returncode if launcher is TORCHRUN else process.returncode == 128 + signal.SIGTERM
    run(*launcher, "train.py", "--out_dir", copied_run, "--resume")
    assert_equal_runs(whole, copied_run, "biart")

def test_a_second_signal_ends_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with train.Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # the same Ctrl-C, by way of torchrun
        assert signals.number == signal.SIGINT and not codes
        signals.caught_at -= 2
        signal.raise_signal(signal.SIGINT)
    assert codes == [128 + signal.SIGINT]

@slow
def test_accumulating_and_recomputing(copied_run, tmp_path):
    def biart(*given):
        train_in(copied_run, *MINIATURE, "--stage=biart", "--overwrite", *given)
        return losses(copied_run, "biart")

    train_in(tmp_path, *MINIATURE, "--stage=augvae_ml", "--checkpoint_activations")
    assert losses(tmp_path, "augvae_ml") == losses(copied_run, "augvae_ml")
    assert biart("--dropout=0.3") == biart("--dropout=0.3", "--checkpoint_activations")
    whole = biart(*STEADY, "--batch_size=8")
    parts = biart(*STEADY, "--batch_size=4", "--gradient_accumulation_steps=2")
    assert parts == approx(whole, rel=1e-4)

@slow
@mark.skipif(not hasattr(torch.compiler, "is_compiling"), reason="came with torch 2.3")
@mark.parametrize(("stage", "most_graphs", "most_breaks"), [("augvae_ml", 8, 3), ("biart", 1, 0)])
def test_compiled_steps_equal_plain_ones(stage, most_graphs, most_breaks, finished, tmp_path, monkeypatch):
    graphs, compiled, eager = [], torch.compile, torch._dynamo.lookup_backend("aot_eager")
    for name in ("nearest", "collect"):  # wrap() changes them for good
        monkeypatch.setattr(Codebook, name, getattr(Codebook, name))
    monkeypatch.setattr(torch, "compile", lambda network: compiled(
        network, backend=lambda graph, inputs: graphs.append(graph) or eager(graph, inputs)))
    out = shutil.copytree(finished[0], tmp_path / "out") if stage == "biart" else tmp_path / "out"
    given = [*(MINIATURE if stage == "biart" else [*SMALL, "--vq_start=0"]), *STEADY, f"--stage={stage}"]
    train_in(out, *given, "--overwrite")
    plain = losses(out, stage)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train_in(out, *given, "--overwrite", "--compile")
    assert losses(out, stage) == approx(plain, rel=1e-4)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    assert 0 < len(graphs) <= most_graphs and breaks <= most_breaks, (len(graphs), breaks)

@slow
def test_infinite_steps_are_skipped(tmp_path, monkeypatch):
    plain, factors = train.AugVAEObjective.forward, iter([1, torch.nan, torch.inf, 1, 1, 1])

    def forward(self, images):
        loss, parts = plain(self, images)
        return (loss * next(factors) if self.training else loss), parts

    monkeypatch.setattr(train.AugVAEObjective, "forward", forward)
    train_in(tmp_path, *SMALL, "--stage=augvae_ml", "--max_iters=6")
    log, model = rows(tmp_path / "augvae_ml.csv"), checkpoint(tmp_path, "augvae_ml")["model"]
    assert [row["skipped"] for row in log] == ["0", "1", "2", "2", "2", "2"]
    assert [math.isfinite(float(row["loss"])) for row in log] == [True, False, False, True, True, True]
    assert all(x.isfinite().all() for x in model.values())
    assert model["codebook.updates"] == 4  # a skipped step does not move the codebook
    with raises(ValueError, match="20 steps in a row, up to step 70,"):
        train.Progress(step=69, skipped_in_a_row=19).count(finite=False)

@slow
@mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="came with torch 2.3")
def test_autocast_and_scaled_gradients(tmp_path, monkeypatch):
    plain, scaler, products, logs = train.AugVAEObjective.forward, torch.amp.GradScaler, set(), []

    def forward(self, images):
        products.add((self.training, (torch.ones(1, 1) @ torch.ones(1, 1)).dtype))
        return plain(self, images)

    monkeypatch.setattr(train.AugVAEObjective, "forward", forward)
    for scales in (False, True):  # by 2^16, which changes no digit
        monkeypatch.setattr(torch.amp, "GradScaler", lambda enabled, s=scales: scaler("cpu", enabled=s))
        train_in(tmp_path, *SMALL, "--stage=augvae_ml", "--dtype=bfloat16", "--grad_clip=0.01", "--overwrite")
        log = rows(tmp_path / "augvae_ml.csv")
        logs.append([float(row[name]) for row in log for name in ("loss", "grad_norm")])
    assert logs[1] == approx(logs[0], rel=1e-3)
    assert products == {(True, torch.bfloat16), (False, torch.bfloat16)}

@slow
def test_a_full_disk_loses_nothing(copied_run):
    for later in ("augvae_sl.pt", "biart.pt"):  # else augvae_ml may not be trained on
        (copied_run / later).unlink()
    before = {path: path.read_bytes() for path in copied_run.glob("*.pt*")}
    blocks = (copied_run / "augvae_ml.pt").stat().st_size // 1024 // 2
    printed = run("bash", "-c", f"ulimit -f {blocks}; exec {sys.executable} train.py --out_dir {copied_run} "
                  "--resume --max_iters=6 --stage=augvae_ml", ok=False)
    assert "could not be written" in printed and "Traceback" not in printed
    assert {path: path.read_bytes() for path in copied_run.glob("*.pt*")} == before
    train_in(copied_run, "--resume", "--max_iters=6", "--stage=augvae_ml")
    assert checkpoint(copied_run, "augvae_ml")["progress"]["step"] == 6

def test_the_best_checkpoint_is_a_link(tmp_path, monkeypatch):
    context, progress = train.Context("cpu", "float32"), train.Progress(val_loss=1.0, best_val_loss=1.0)
    settings = train.make_settings({"out_dir": str(tmp_path), "stage": "biart"}, "biart")
    last, best = tmp_path / "biart.pt", tmp_path / "biart_best.pt"
    state = Namespace(model=nn.Linear(1, 1), key={}, state_dict=dict)

    def save():
        train.save(settings, state, state, state, progress, context)
        return last.samefile(best), last.read_bytes() == best.read_bytes()

    (tmp_path / "biart.pt.part").write_text("of a killed run")
    assert save() == (True, True)
    progress.val_loss = 2.0
    assert save() == (False, False)
    monkeypatch.setattr(os, "link", denied)
    progress.val_loss = 1.0
    assert save() == (False, True) and len(os.listdir(tmp_path)) == 2

@slow
@has_namespaces
def test_released_weights_in_runs(tmp_path):
    ml, sl = (str(released_file(tmp_path / f"{side}.ckpt", RELEASED, side)) for side in (0, 8))
    vocabulary = str(tmp_path / "words.json")
    Tokenizer.train(data.Scenes("train", 9).captions(3), 300).save(vocabulary)

    def go(name, *given):
        train_in(tmp_path / name, "--n_layer=1", "--n_head=2", "--n_embd=16", "--n_scenes=8",
                 "--batch_size=4", "--max_iters=1", "--eval_images=4", "--device=cpu", *given)
        return tmp_path / name

    kept = go("ml", "--stage=augvae_ml", f"--init_from={ml}", "--max_iters=0") / "augvae_ml.pt"
    assert augvae.fingerprint(AugVAE.load(str(kept))) == augvae.fingerprint(AugVAE.load(ml))
    out = go("all", f"--init_from={kept}", "--token_grid=4", f"--tokenizer={vocabulary}")
    assert AugVAE.load(str(out / "augvae_sl.pt")).config.grids == (4,)
    assert Tokenizer.load(out / "tokenizer.json").fingerprint() == Tokenizer.load(vocabulary).fingerprint()
    go("all", "--resume")
    go("biart", "--stage=biart", f"--init_from={sl}", f"--tokenizer={vocabulary}")
    for message, *given in (
            ("is an AugVAE-ML", "--stage=biart", f"--init_from={ml}"),
            ("is an AugVAE-SL", "--stage=augvae_ml", f"--init_from={sl}"),
            ("--hidden 8 contradicts .*0.ckpt", "--stage=augvae_ml", f"--init_from={ml}", "--hidden=8")):
        with raises(ValueError, match=message):
            go("refused", *given)

@slow
def test_fine_tuning_begins_with_another_run(finished, tmp_path):
    given = "--stage=biart", f"--init_biart={finished[0]}", "--n_scenes=8", "--eval_images=4", "--device=cpu"
    train_in(tmp_path, *given, "--batch_size=4", "--max_iters=0")
    for name in ("augvae_sl.pt", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes()
    model = checkpoint(tmp_path, "biart")["model"]
    for name, value in checkpoint(finished[0], "biart")["model"].items():
        assert equal(model[name], value), name
    with raises(ValueError, match="--n_embd 32 contradicts"):
        train_in(tmp_path / "new", *given, "--n_embd=32")

@slow
def test_runs_refuse_bad_checkpoints(finished, copied_run):
    content = checkpoint(copied_run, "augvae_sl")
    content["model"]["encoders.0.conv_in.bias"].add_(1)
    torch.save(content, copied_run / "vae.pt")
    torch.save({"stage": "biart", "settings": Payload()}, copied_run / "payload.pt")
    Tokenizer.train(["another text altogether"], 300).save(copied_run / "words.json")
    files = {path.name: path.read_bytes() for path in copied_run.iterdir() if path.is_file()}

    def attempt(message, name, content, main, *given):
        for path in ("augvae_sl.pt", "biart.pt", "tokenizer.json"):
            (copied_run / path).write_bytes(content if path == name else files[path])
        with raises(ValueError, match=message) as info:
            main(["--out_dir", str(copied_run), *given])
        assert "\n" not in str(info.value)

    resume = train.main, "--resume", "--stage=biart"
    for use in (resume, (sample.main, "--prompt=a", "--device=cpu")):
        attempt(r"asks to run \w+\.system", "biart.pt", files["payload.pt"], *use)
        attempt("of augvae_sl, not of biart", "biart.pt", files["vae.pt"], *use)
        attempt("(?i)another augvae", "augvae_sl.pt", files["vae.pt"], *use)
        attempt("another tokenizer", "tokenizer.json", files["words.json"], *use)
    attempt("another config", "", b"", *resume, "--n_embd=32")
    attempt("--optimizer is not the one", "", b"", *resume, "--optimizer=adamw")
    # The way out of a damaged checkpoint
    shutil.copy(copied_run / "biart_best.pt", copied_run / "biart.pt")
    train_in(copied_run, "--resume", "--stage=biart")
    assert_equal_runs(copied_run, finished[0], "biart")

@slow
@mark.parametrize("stage", train.STAGES)
def test_bench_of_training(stage, tmp_path, capsys, monkeypatch):
    if stage != "biart":  # one measures it
        monkeypatch.setattr(train.Context, "peak_flops", lambda self: 1e9)
    train_in(tmp_path / "out", *SMALL, f"--stage={stage}", "--bench", "--dtype=bfloat16")
    found = re.search(rf"{stage}: (\d+) ms a step of 4, ([\d.]+) images/s, (\d+)% of the device's peak in "
                      r"matrix products, ([\d.]+) GB at most, bfloat16", capsys.readouterr().out)
    assert float(found[2]) > 0 and (stage == "biart" or int(found[3]) > 0) and not (tmp_path / "out").exists()

def test_settings_are_documented(capsys):
    given = train.parse(["--levels", "10,5", "--learning_rate=0.5", "--resume", "--no-attention"], "",
                        *train.CONFIGS)
    assert given == {"levels": (10, 5), "learning_rate": 0.5, "resume": True, "attention": False}
    config, preset = train.make_settings(given, "biart").train, train.PRESETS["tiny"]
    assert config.learning_rate == 0.5 and config.batch_size == preset["biart"]["batch_size"]
    assert config.token_grid == preset[""]["token_grid"] and config.grad_clip == 1
    known = {f.name for cls in train.CONFIGS for f in fields(cls) if not f.metadata}
    for name, preset in train.PRESETS.items():
        assert all(set(values) <= known for values in preset.values())
        for stage in train.STAGES:
            train.make_settings({"preset": name}, stage)
    for argument, message in [("--max_iter=3", "unrecognized arguments: --max_iter=3"),
                              ("--levels=8,x", "--levels: invalid whole_numbers value: '8,x'")]:
        with raises(SystemExit):
            train.main([argument])
        assert message in capsys.readouterr().err
    for cls in (*train.CONFIGS, sample.SampleConfig):
        with raises(SystemExit):
            train.parse(["--help"], "What it does", cls)
        printed = capsys.readouterr().out
        described = dict(re.findall(r"\n  --(\w+)(?:, --no-\w+)?\s(.*?)(?=\n  --|\n\n|$)", printed, re.S))
        defaults = {f.name: f.default for f in fields(cls) if not f.metadata}
        assert set(described) == set(defaults)
        assert set(cls.limits) <= {name for name, x in defaults.items() if type(x) in (int, float)}
        for name, (low, high) in cls.limits.items():
            assert low <= defaults[name] <= high, name
        for name, default in defaults.items():
            text = " ".join(described[name].split())
            assert len(text) > 12 and text.endswith(f"[{default}]"), text

def test_bad_settings_are_refused(tmp_path):
    (tmp_path / "augvae_ml.pt").write_bytes(b"")
    for message, *given in [
            ("--stage 'gan' is none of: augvae_ml, augvae_sl, biart, all", "--stage=gan"),
            ("--eval_interval 0 is not in the range from 1 to inf", "--eval_interval=0"),
            ("--beta2 nan is not in", "--beta2=nan"), ("levels (8, 3)", "--levels=8,3"),
            ("--batch_size 3 is odd", "--batch_size=3"), ("cannot read absent", "--tokenizer=absent"),
            ("--token_grid 5 is none of --levels (8, 4)", "--token_grid=5"),
            ("--epochs 1.0 and --max_iters 4", "--epochs=1"), ("finds no checkpoint", "--resume"),
            ("augvae_ml.pt exists: --resume continues it", f"--out_dir={tmp_path}"),
            ("--device 'tpu' cannot be used here", "--device=tpu"),
            ("--dtype float16 cannot be used on cpu", "--dtype=float16")]:
        with raises(ValueError, match=re.escape(message)):
            train.main([*MINIATURE, f"--out_dir={tmp_path}/new", *given])
    assert [path.name for path in tmp_path.rglob("*.*")] == ["augvae_ml.pt"]

def test_learning_rate_schedule():
    config = train.TrainConfig(learning_rate=1.0, warmup_iters=10)
    rates = [train.get_lr(step, config, 110) for step in (0, 8, 9, 10, 60, 110)]
    assert rates == approx([0.1, 0.9, 1, 1, 0.505, 0.01])

def orthogonalise_by_svd(matrix):
    """What five Newton-Schulz steps do to singular values."""
    u, s, v = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s ** 3 + 2.0315 * s ** 5
    assert s.min() > 0.6 and s.max() < 1.3
    return u * s @ v

def test_muon_adamw_equals_a_plain_loop():
    model = nn.ModuleDict({"wide": nn.Linear(6, 3), "tall": nn.Linear(2, 5), "conv": nn.Conv2d(2, 4, 3),
                           "embedding": nn.Embedding(4, 3), "norm": nn.LayerNorm(3)})
    config, context = train.TrainConfig(optimizer="muon", weight_decay=0.3), train.Context("cpu", "float32")
    optimizer, _ = train.make_optimizer(model, config, context)
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    momentum = {name: 0 for name in ("wide.weight", "tall.weight", "conv.weight")}
    others = [x for name, x in plain.items() if "bias" in name or "norm" in name]
    adamw = torch.optim.AdamW([{"params": [plain["embedding.weight"]], "weight_decay": 0.3},
                               {"params": others, "weight_decay": 0}])
    for lr in (0.1, 0.05, 0.02):
        for group in (*optimizer.param_groups, *adamw.param_groups):
            group["lr"] = lr
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            plain[name].grad = p.grad.clone()
            if name in momentum:
                momentum[name] = 0.95 * momentum[name] + p.grad
                update = orthogonalise_by_svd((p.grad + 0.95 * momentum[name]).flatten(1)).view_as(p)
                size = 0.2 * max(len(p), p[0].numel()) ** 0.5
                plain[name] = (1 - lr * 0.3) * plain[name] - lr * size * update
        optimizer.step()
        adamw.step()
    for name, p in model.named_parameters():
        assert allclose(p, plain[name], rtol=0, atol=1e-5 if name in momentum else 1e-7), name
    # A resumed optimizer takes the settings given now
    saved = {"optimizer": optimizer.state_dict(), "scaler": {}}
    config = replace(config, beta2=0.7)
    resumed, _ = train.make_optimizer(model, config, context, saved)
    assert [group["betas"] for group in resumed.param_groups] == [(0.9, 0.7)] * 3

@mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_and_type_are_chosen(monkeypatch):
    context = train.Context("auto", "auto")
    assert (context.device.type, context.dtype) == ("cpu", torch.float32)
    monkeypatch.setitem(sys.modules, "resource", None)  # Windows
    assert math.isnan(context.peak_gb())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with raises(ValueError, match="--device 'cuda:0' cannot be used here"):
        train.Context("auto", "auto")
    context.device, matrix = torch.device("cuda"), torch.randn(256, 256)
    monkeypatch.setattr(torch, "randn", lambda *_, device: matrix)
    for capability, seconds, dtype in (((8, 0), None, "bfloat16"), ((7, 1), [1.0, 2.0], "bfloat16"),
                                       ((7, 0), [2.0, 1.0], "float16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        context.timeit = lambda _, seconds=seconds: seconds.pop(0)  # of bfloat16, of float32
        assert context.best_dtype() == dtype

@slow
def test_imports_are_quiet_and_one_way():
    """Tiny numbers count as zero, also on threads, which begin after Context."""
    job = """
import sys, torch, biart, data
assert "train" not in sys.modules
import train
assert "sample" not in sys.modules
train.Context("cpu", "float32")
import sample
assert not torch.cuda.is_initialized()
print((torch.full((2 ** 22,), 1e-38) * 0.1).count_nonzero().item())
"""
    assert run(sys.executable, "-c", job, OMP_NUM_THREADS="2").strip() == "0"

TWICE = [*STEADY, "--max_iters=3", "--gradient_accumulation_steps=2"]

def train_on_a_rank(out):
    """All stages, by gloo. Ranks print their codebooks after each update."""
    update = Codebook.update

    def told(self):
        found = update(self)
        seed = torch.initial_seed()
        print(f"codebook {os.environ['RANK']} {augvae.fingerprint(self)} {seed}\n", end="", flush=True)
        return found
    Codebook.update = told
    train.main([*MINIATURE, *TWICE, "--out_dir", out, "--batch_size=2"])
    os._exit(0)

@slow
@old_torch
def test_two_ranks_train_as_one(tmp_path):
    out, alone = tmp_path / "out", tmp_path / "alone"
    code = f"import signal, {__name__} as t; signal.alarm(100); t.train_on_a_rank({str(out)!r})"
    printed = run(*TORCHRUN, "--no-python", sys.executable, "-c", code)
    first, second = (re.findall(rf"codebook {rank} (\w+)", printed) for rank in (0, 1))
    assert first == second and len(set(first)) == 6
    assert len(set(re.findall(r"codebook \d \w+ (\d+)", printed))) == 6  # seeds: 3 steps, 2 ranks
    for stage, before in zip(train.STAGES, (None, "augvae_ml.pt", "augvae_sl.pt")):
        if before:
            shutil.copy(out / before, alone)
        train_in(alone, *MINIATURE, *TWICE, f"--stage={stage}", "--overwrite")
        together, single = checkpoint(out, stage), checkpoint(alone, stage)
        assert together["progress"]["samples"] == single["progress"]["samples"] == 24
        for name, value in together["model"].items():
            assert allclose(value, single["model"][name], rtol=1e-4, atol=1e-4), (stage, name)
        assert losses(out, stage) == approx(losses(alone, stage), rel=1e-4)
    # What two ranks began, one continues
    for folder in (out, alone):
        train_in(folder, "--resume", "--stage=biart", "--batch_size=4", "--max_iters=6")
    assert losses(out, "biart") == approx(losses(alone, "biart"), rel=1e-4)

@slow
def test_a_finished_run_is_trained_on(copied_run, monkeypatch):
    def files():
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copied_run.rglob("*.*")}

    before, encode, n = files(), data.encode_blocks, []
    monkeypatch.setattr(data, "encode_blocks", lambda *given: n.append(len(given[-1])) or encode(*given))
    for stage in ("all", "augvae_ml", "augvae_sl"):
        with raises(ValueError, match="would train augvae_.. on, but biart.pt was made from it"):
            train_in(copied_run, "--resume", "--max_iters=6", f"--stage={stage}")
        assert files() == before
    train_in(copied_run, "--resume", "--stage=biart", "--max_iters=6")
    assert checkpoint(copied_run, "biart")["progress"]["step"] == len(losses(copied_run, "biart")) == 6
    train_in(copied_run, *MINIATURE, "--stage=biart", "--overwrite")  # only this encodes anew
    assert n == [0, 0, 24, 6] and checkpoint(copied_run, "biart")["progress"]["step"] == 4

def test_where_a_run_begins(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = train.parse(["--out_dir=~/x", "--image", "~/a", "b~"], "", sample.SampleConfig)
    assert given == {"out_dir": f"{tmp_path}/x", "image": [f"{tmp_path}/a", "b~"]}
    for name in ("stage", "data", "preset"):
        assert train.settings_of_run(str(tmp_path), {name: "given"}) == {}  # --resume starts it
    pack(tmp_path / "0.tar", [("0.png", noise(tmp_path / "0.png", 0).read_bytes())])
    given = [*SMALL, "--data=tar", *(f"--{split}_dir={tmp_path / '0.tar'}" for split in ("train", "val"))]
    with raises(ValueError, match="--stage biart needs captions, and --data tar has none here"):
        train_in(tmp_path / "new", *given)
    assert not list(tmp_path.rglob("augvae*"))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    with raises(ValueError, match="start one torchrun a node"):
        train_in(tmp_path / "slurm", *SMALL)
    assert not (tmp_path / "slurm").exists()

@slow
def test_epochs_count_samples(tmp_path, monkeypatch):
    train_in(tmp_path, *SMALL, "--stage=augvae_ml", "--max_iters=3")  # of 4 images; 24 are an epoch
    monkeypatch.setattr(train.Context, "all_reduce", lambda self, tensor: tensor)
    context = train.Context("cpu", "float32")
    given = {**checkpoint(tmp_path, "augvae_ml")["settings"], "epochs": 2.0, "resume": True}
    for context.world, n_left in ((1, 9), (2, 5), (3, 3)):
        progress = train.prepare(train.make_settings(given, "augvae_ml"), context)[3]
        assert (progress.step, progress.max_iters) == (3, 3 + n_left)

@slow
def test_bad_fine_tuning_is_refused(copied_run, tmp_path):
    given = "--stage=biart", f"--init_biart={copied_run}", "--n_scenes=8", "--eval_images=4", "--device=cpu"
    shutil.copytree(copied_run, tmp_path / "used").joinpath("biart.pt").unlink()
    before = cache_files(copied_run / "tokens" / "train")
    for message, out, *more in (
            ("--n_embd 32 contradicts", "new", "--n_embd=32"),
            ("no checkpoint absent/biart.pt", "new", "--init_biart=absent"),
            ("augvae_sl.pt exists, and --init_biart brings another", "used"),
            ("needs another --out_dir", copied_run, "--overwrite"),
            *(("is for --stage biart, and brings", "new", other) for other in (
                "--stage=all", "--init_from=a.pt", f"--tokenizer={copied_run / 'tokenizer.json'}"))):
        with raises(ValueError, match=message):
            train_in(tmp_path / out, *given, *more)
    assert not (tmp_path / "new").exists() and cache_files(copied_run / "tokens" / "train") == before

@slow
def test_torchrun_restarts_a_killed_rank(tmp_path):
    given = ["train.py", *SMALL, "--stage=augvae_ml", "--max_iters=30", "--eval_interval=10", "--out_dir"]
    run(*TORCHRUN, *given, tmp_path / "whole")
    process = started(*TORCHRUN, "--max_restarts=1", *given, tmp_path / "killed", "--resume",
                      TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    wait_for(process, "augvae_ml 11/")
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
            os.kill(int(child), signal.SIGKILL)
    try:
        printed, _ = process.communicate(timeout=100)
    finally:
        process.terminate()  # its ranks, too
    assert process.returncode == 0 and "from step 10" in printed, printed
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed", "augvae_ml")

# -----------------------------------------------------------------------------
# CUDA without a GPU
#
# Tensors on "cuda" are fake: shapes and types without values. What comes from there to the CPU is zeros. The
# real commands run, in a process with a CUDA runtime that does nothing. What CUDA or NCCL refuse is refused.

CUDA_RUNTIME = """
#define NOTHING(name) int cuda##name() { return 0; }
#define GIVES(name, type, value) int cuda##name(type *out) { *out = value; return 0; }
NOTHING(GetLastError) NOTHING(PeekAtLastError) NOTHING(DeviceSynchronize) NOTHING(StreamQuery)
NOTHING(StreamSynchronize) NOTHING(StreamWaitEvent) NOTHING(StreamGetPriority) NOTHING(EventQuery)
NOTHING(EventRecord) NOTHING(EventSynchronize) NOTHING(EventDestroy) NOTHING(EventRecordWithFlags)
GIVES(GetDeviceCount, int, 8) GIVES(DeviceGetAttribute, int, 8) GIVES(EventCreate, long, 1)
GIVES(EventCreateWithFlags, long, 1) GIVES(StreamCreateWithPriority, long, 1)
static __thread int device;
int cudaSetDevice(int index) { device = index; return 0; }
int cudaGetDevice(int *index) { *index = device; return 0; }
int cudaStreamIsCapturing(void *stream, int *is) { *is = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *low, int *high) { *low = *high = 0; return 0; }
int cuDevicePrimaryCtxGetState(int index, int *flags, int *active) { *flags = 0; *active = 1; return 0; }
/* compute capability 8.8, wherever a version keeps it */
int cudaGetDeviceProperties(int *p) { for (int i = 72; i < 160; i++) p[i] = 8; return 0; }
int cudaGetDeviceProperties_v2(int *p) { return cudaGetDeviceProperties(p); }
"""

def places(indices):
    """Indices as they are, but a mask as the indices of half its places."""
    return [i.new_empty(i.numel() // 2, dtype=torch.long) if i is not None and i.dtype is torch.bool else i
            for i in indices]

class PretendedCUDA(TorchDispatchMode):
    """Every operation on tensors of "cuda" passes through here, and on to PyTorch's fake tensors."""
    by_value = {  # operations that look at values
        aten._local_scalar_dense.default: lambda x: {torch.long: 1, torch.bool: 0}.get(x.dtype, -1.0),
        aten.nonzero.default: lambda x: x.new_empty(x.numel() // 2, x.dim(), dtype=torch.long),
        aten.rand.generator: lambda size, generator, **given: torch.empty(size, **given),  # for old torch
        aten.index.Tensor: lambda x, at: aten.index(x, places(at)),
        aten.index_put_.default: lambda x, at, *rest: aten.index_put_(x, places(at), *rest)}
    products = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default,
                aten.matmul.default, aten.linear.default, aten.convolution.default,
                aten.convolution_backward.default)

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.capturing = False
        self.current = 0  # device
        self.looks = 0  # at values, in this step of training
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given, _ = tree_flatten((args, kwargs))
        devices = {getattr(x, "fake_device", x) for x in given if isinstance(x, (FakeTensor, torch.device))}
        if not any(device.type == "cuda" for device in devices):
            return func(*args, **kwargs)
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        if func in (*self.products, aten.stack.default, aten.cat.default):  # fake tensors let these pass
            assert len({getattr(x, "fake_device", x.device) for x in tensors}) == 1, f"{func} on two devices"
            assert func not in self.products or len({x.dtype for x in tensors}) == 1, f"{func} of two types"
        masked = any(getattr(x, "dtype", None) is torch.bool for x in tree_flatten(args[1:2])[0])
        looks = func in self.by_value and (masked or "index" not in str(func))
        self.looks += looks
        if self.capturing:
            assert not looks, f"{func} looks at a value"
            random = torch.Tag.nondeterministic_seeded in func.tags and "attention" not in str(func)
            assert not random, f"{func} draws numbers"
        args, kwargs = tree_map(self.enter, (args, kwargs))
        with self.fake:
            out = self.by_value.get(func, func)(*args, **kwargs)
        return tree_map(self.leave, out)

    def enter(self, x):
        if not isinstance(x, torch.Tensor) or isinstance(x, FakeTensor):
            return x
        assert not self.capturing or not x.dim(), "a captured step copies from the CPU"
        return self.fake.from_tensor(x)

    def leave(self, x):
        if not isinstance(x, FakeTensor) or x.is_cuda:
            return x
        assert not self.capturing, "a captured step copies to the CPU"
        self.looks += 1
        return torch.full(x.shape, -1.0 if x.dtype.is_floating_point else 0, dtype=x.dtype)

def pretend_cuda(world=1):
    """Make this process rank 0 of `world`, each with a GPU; -> the mode that counts and checks."""
    mode, cuda = PretendedCUDA(), torch.cuda
    os.environ.update(RANK="0", LOCAL_RANK="3" if world > 1 else "0", WORLD_SIZE=str(world))
    cuda.is_available = cuda.is_initialized = cuda.is_bf16_supported = lambda *_, **__: True
    cuda._initialized, cuda._lazy_init = True, lambda: None
    cuda.device_count, cuda.current_device = lambda: 8, lambda: mode.current
    cuda.get_device_capability = lambda *_: (8, 8)
    cuda.set_device = lambda device: setattr(mode, "current", torch._utils._get_device_index(device))
    cuda.synchronize = cuda.set_stream = lambda *_: None
    cuda.manual_seed_all = lambda *_: setattr(mode, "looks", 0)  # a step of training begins with it
    count = train.Progress.count

    def counted(progress, finite):
        assert mode.looks <= 2, f"a step looks at the device {mode.looks} times"
        count(progress, finite)
    train.Progress.count = counted
    cuda.max_memory_allocated = lambda *_: 2 ** 30
    fake_tensor.init_gpu_context = fake_tensor.init_cuda_context = lambda *_: None
    # A module's parameters become fake ones, and what is made of numbers comes from the CPU
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    tensor, tolist, save = torch.tensor, torch.Tensor.tolist, torch.save
    torch.tensor = lambda *given, device=None, **more: tensor(*given, **more).to(device)
    torch.Tensor.new_tensor = lambda self, x: tensor(x, dtype=self.dtype).to(self.device)
    torch.Tensor.tolist = FakeTensor.tolist = lambda self: tolist(self.cpu())  # one look
    torch.Tensor.pin_memory = lambda self, *_: self
    torch.save = lambda content, *given: save(tree_map(
        lambda x: torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, FakeTensor) else x, content), *given)

    def rng_state(*_):
        assert not mode.capturing, "a captured step reads or sets the CUDA generator"
        return torch.zeros(16, dtype=torch.uint8)

    @contextlib.contextmanager
    def graph(*_, **__):
        mode.capturing = True
        yield
        mode.capturing = False
    cuda.get_rng_state, cuda.set_rng_state, cuda.graph = rng_state, rng_state, graph
    cuda.CUDAGraph = lambda: Namespace(replay=lambda: mode.seen.update(["replay"]))
    pretend_nccl(world)
    mode.__enter__()
    return mode

def pretend_nccl(world):
    """Collectives that change nothing, with the checks of NCCL and DDP; token caches are made as if alone."""
    DDP, start = torch.nn.parallel.DistributedDataParallel, dist.init_process_group
    cache_tokens, clip = data.cache_tokens, nn.utils.clip_grad_norm_

    def all_reduce(x):
        assert x.is_cuda and x.is_contiguous(), f"NCCL cannot sum this tensor on {x.device}"
        assert x.device.index == torch.cuda.current_device(), f"NCCL is on another device than {x.device}"

    def init(self, module, **_):
        nn.Module.__init__(self)
        self.module = module

    def clip_grad_norm_(parameters, *given):
        parameters = list(parameters)
        assert all(p.grad is not None for p in parameters), "DDP would wait for a gradient that never comes"
        return clip(parameters, *given)

    def alone(*given, all_reduce, **more):
        more.update(rank=0, world=1, all_reduce=lambda x: all_reduce(x) * 0 + x)
        return cache_tokens(*given, **more)

    def init_process_group(backend, **_):
        assert backend == "nccl"
        start("fake", rank=0, world_size=world, store=FakeStore())
    dist.init_process_group = init_process_group
    dist.all_reduce = all_reduce
    DDP.__init__, DDP.forward = init, lambda self, *given: self.module(*given)
    nn.utils.clip_grad_norm_, data.cache_tokens = clip_grad_norm_, alone

@fixture(scope="session")
def on_cuda(tmp_path_factory):
    """Calls a function of this file in a process with a CUDA runtime."""
    if torch.version.cuda is None or not shutil.which("cc"):
        skip("needs a CUDA build of PyTorch and a C compiler")
    folder = tmp_path_factory.mktemp("cuda")
    library = folder / "libcuda.so.1"
    (folder / "runtime.c").write_text(CUDA_RUNTIME)
    run("cc", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, folder / "runtime.c")

    def call(function, *given):
        code = f"import os, {__name__} as t; print(dict(t.{function.__name__}(*{given!r})), flush=True)"
        return run(sys.executable, "-c", f"{code}; os._exit(0)", LD_PRELOAD=str(library))
    return call

def work_on_cuda(out, world, picture):
    """All stages, on one GPU, and every use of sample.py, with graphs; on 8 all stages, each resumed."""
    mode, device = pretend_cuda(world), ["--device=cuda", f"--out_dir={out}"]
    given = [*SMALL, "--image_size=16", "--ch_mult=1,1,2", "--batch_size=8", "--eval_images=8", *device]
    if world > 1:
        for stage in train.STAGES:
            train.main([*given, f"--stage={stage}", "--dtype=bfloat16", "--max_iters=1"])
            train.main([*given, f"--stage={stage}", "--dtype=float16", "--max_iters=2", "--resume"])
        return mode.seen
    train.main([*given, "--optimizer=adamw", "--max_iters=2", "--checkpoint_activations"])
    for use in ([f"--image={picture}", "--beam=3"], [f"--image={picture}", "--keep_rows=2", "--variations"],
                ["--prompt=a cross", "--guidance=2", "--rerank=3"], [f"--reconstruct={picture}"],
                ["--eval", "--eval_items=2"]):
        sample.main([*device, "--n=2", *use])
    return mode.seen

@slow
@old_torch
@mark.parametrize("world", [1, 8])
def test_all_stages_and_uses_on_cuda(world, on_cuda, pictures, tmp_path):
    out = tmp_path / "out"
    printed = on_cuda(work_on_cuda, str(out), world, str(pictures / "0.png"))
    for stage in train.STAGES:
        assert checkpoint(out, stage)["progress"]["step"] == 2 and f"{stage} 2/2 loss" in printed
    assert f"cuda:{3 if world > 1 else 0}" in printed
    for what in ("'replay'", "paint: a cross", "t2i_bits"):
        assert (what in printed) == (world == 1)
    assert "no CUDA graphs here" not in printed

# -----------------------------------------------------------------------------
# With a GPU: `pytest -q -m gpu`. Speeds go to $GPU_TABLE, by default gpu_table.md in the temporary folder.

DEVICE = "cuda"
SHIPPED = os.path.join(HERE, "assets", "scenes")
LITTLE = ["--preset=tiny", "--n_scenes=64", "--eval_images=16"]
FEW_STEPS = [*LITTLE, *STEADY, "--vq_start=4", "--log_interval=1", "--eval_interval=5"]

@fixture
def card():
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.set_float32_matmul_precision("highest")  # Context sets both for the whole process
    torch.backends.cudnn.benchmark = False

def gpu(test):
    test = mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")(test)
    return mark.gpu(mark.usefixtures("card")(test))

@fixture(scope="session")
def table(request):
    path = Path(os.environ.get("GPU_TABLE") or os.path.join(tempfile.gettempdir(), "gpu_table.md"))
    lines = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}",
             "\n| stage | dtype | batch | ms a step | images/s | share of peak | GB | tokens/s |", "|---" * 8]
    yield lines
    path.write_text("\n".join([*lines, ""]))
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", path, *lines, sep="\n")

@fixture(scope="module")
def cpu_run(tmp_path_factory):
    train_in(out := tmp_path_factory.mktemp("cpu"), *FEW_STEPS, "--max_iters=10", "--device=cpu")
    return out

def train_stage(stage, other, out, *given):
    for name in train.STAGES[:train.STAGES.index(stage)]:  # the stages before it
        shutil.copy(other / f"{name}.pt", out)
    train_in(out, *given, f"--stage={stage}", f"--device={DEVICE}")

@gpu
@mark.parametrize("dtype, tolerance", [("float32", 0.01), ("bfloat16", 0.05), ("float16", 0.03)])
@mark.parametrize("stage", train.STAGES)
def test_a_stage_learns_as_on_the_cpu(stage, dtype, tolerance, cpu_run, tmp_path, monkeypatch):
    scaler = getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)  # with its own scale, it skips steps
    monkeypatch.setattr(torch.amp, "GradScaler", partial(scaler, init_scale=256.0), raising=False)
    train_stage(stage, cpu_run, tmp_path, *FEW_STEPS, f"--dtype={dtype}", "--max_iters=5")
    train_in(tmp_path, "--resume", "--max_iters=10")
    found, expected = (rows(out / f"{stage}.csv") for out in (tmp_path, cpu_run))
    assert len(found) == len(expected) == 10 and found[-1]["skipped"] == "0"
    for name in {"loss", "val_loss", "pixel", "t2i", "i2t"} & set(expected[0]):
        ours, theirs = ([float(row[name]) for row in log if row[name]] for log in (found, expected))
        assert ours == approx(theirs, rel=tolerance), name

@gpu
def test_codes_are_those_of_the_cpu(table, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.set_float32_matmul_precision("high")  # as in training; the search of codes keeps to full fp32
    vae = AugVAE.load(f"{SHIPPED}/augvae_sl.pt")
    pixels = torch.stack([crop_to_tensor(image, vae.config.image_size) for image in scenes(256)])
    book, (z,), (expected,) = copy.deepcopy(vae.codebook).double(), vae.features(pixels), vae.encode(pixels)
    found = vae.to(DEVICE).encode(pixels.to(DEVICE))[0].cpu()
    p = (book.cluster_size + EMA_EPS) / (book.cluster_size + EMA_EPS).sum()
    var = p @ (book.weight - p @ book.weight).square().sum(1)
    costs = torch.cdist(z.double().permute(0, 2, 3, 1).flatten(0, 2), book.weight).square()
    costs = costs / var - book.config.rate * p.log()  # as Codebook.nearest
    more = costs.gather(1, found.view(-1, 1)) - costs.gather(1, expected.view(-1, 1))
    table[0] += f"; {(more != 0).sum()} of {len(more):,} codes are not the CPU's"
    assert (more != 0).float().mean() < 1e-3 and more.abs().max() < 1e-4

@gpu
@mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float16, 0.01), (torch.bfloat16, 0.03)])
def test_norm_silu_conv_in_both_layouts(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    norm, conv = (module.to(DEVICE) for module in norm_and_conv())
    x = channels_last(3, 8, 6, 5).detach().to(DEVICE, dtype).requires_grad_()

    def with_gradients(y):
        return y, *torch.autograd.grad(y.float().sin().sum(), [x, *norm.parameters(), *conv.parameters()])

    expected = with_gradients(conv(F.silu(norm(x.float()))))
    for takes in {False, augvae.norm_takes_channels_last(x.device, dtype)}:
        monkeypatch.setattr(augvae, "norm_takes_channels_last", lambda *_, takes=takes: takes)
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            y = augvae.norm_silu_conv(x, norm, conv)
        for a, b in zip(with_gradients(y), expected):
            assert (a - b).abs().max() <= tolerance * b.abs().max()

@gpu
@mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@mark.parametrize("guidance", [1.0, 4.0])
@mark.parametrize("to", ["image", "text"])
def test_graphs_change_no_token(to, guidance, dtype, monkeypatch):
    run, made, results, record = sample.load(SHIPPED, device=DEVICE, dtype=dtype), [], [], GraphedStep.record
    monkeypatch.setattr(GraphedStep, "record", lambda self: made.append(record(self)) or made[-1])
    ref = run.tokenize([PROMPT, "two crosses"]) if to == "image" else run.encode(scenes(2))[0]
    for graphs in (False, True):
        monkeypatch.setattr(BiART, "use_cuda_graphs", graphs)
        with run.context.autocast():
            results.append(run.biart.generate(ref, to, 3, sampling=Sampling(guidance=guidance)))
        assert len(made) == graphs and all(made)
    assert equal(results[0][0], results[1][0]) and allclose(results[0][1], results[1][1], atol=0.01)

@gpu
@mark.parametrize("stage", train.STAGES)
def test_a_step_hardly_waits_and_keeps_no_memory(stage, cpu_run, tmp_path, monkeypatch):
    count, seen = train.Progress.count, []

    def counted(self, finite):
        seen.append((sum("synchroniz" in str(w.message) for w in caught), torch.cuda.memory_allocated()))
        count(self, finite)

    monkeypatch.setattr(train.Progress, "count", counted)
    monkeypatch.setattr(train.Log, "write", lambda *_: torch.cuda.set_sync_debug_mode("warn"))  # no log
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_stage(stage, cpu_run, tmp_path, *LITTLE, "--dtype=float16", "--max_iters=12")
    torch.cuda.set_sync_debug_mode("default")
    waits, held = zip(*seen[6:])  # float16 skips the first, others choose kernels
    assert {b - a for a, b in zip(waits, waits[1:])} <= {1, 2} and max(held) - min(held) < 2 ** 20

@gpu
@mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_two_cards_train_as_one(tmp_path):
    code = f"import test_lverse as t; t.MINIATURE += ['--device={DEVICE}']; t.train_on_a_rank('{tmp_path}/2')"
    printed = run(*TORCHRUN, "--no-python", sys.executable, "-c", code)
    first, second = (re.findall(rf"codebook {rank} (\w+)", printed) for rank in (0, 1))
    assert first == second and len(set(first)) == 6
    for stage in train.STAGES:
        train_stage(stage, tmp_path / "2", tmp_path, *MINIATURE, *TWICE)
        assert losses(tmp_path / "2", stage) == approx(losses(tmp_path, stage), rel=0.02)

@gpu
@mark.parametrize("stage", train.STAGES)
@mark.parametrize("dtype", ["auto", "float32"])
def test_the_speed_of_training(stage, dtype, table, monkeypatch, capsys):
    timeit = train.Context.timeit  # 20 steps, 4 at a time without a wait between them
    monkeypatch.setattr(train.Context, "timeit", lambda self, step: timeit(
        self, lambda: [step() for _ in range(4)]) / 4)
    train.main(["--bench", "--preset=released", "--lpips_weight=0", f"--stage={stage}", f"--dtype={dtype}",
                f"--device={DEVICE}"])
    (ms, batch, *rest, dtype), = re.findall(r"(\d+) ms a step of (\d+), (\S+) images/s, (\d+%) .* (\S+) GB "
                                            r"at most, (\w+)", capsys.readouterr().out)
    table.append(f"| {stage} | {dtype} | {batch} | {ms} | {' | '.join(rest)} | |")

@gpu
def test_the_speed_of_decoding(table, capsys):
    sample.main(["--bench", f"--device={DEVICE}"])
    printed = capsys.readouterr().out
    found, gb = re.findall(r"batch (.), (.*): (\d+) tokens/s.* (\w+)\n", printed), printed.split()[-4]
    for b, how, n, dtype in found:
        table.append(f"| decoding, {how} | {dtype} | {b} | {1e3 * int(b) / int(n):.2f} | | | {gb} | {n} |")
    assert len(found) == 4

# -----------------------------------------------------------------------------
# sample.py: what users do with a run

PROMPT = "a small red circle above a large blue square"

@fixture(scope="module")
def loaded(finished):
    return sample.load(str(finished[0]))

@fixture
def made_by(finished, tmp_path, capfd):
    """Runs sample.py -> what it printed, its list of samples, the folder they are in."""
    def call(*arguments):
        where = tmp_path / f"made_{len(os.listdir(tmp_path))}"
        sample_in(finished[0], "--save_dir", where, *arguments)
        samples = json.loads((where / "samples.json").read_text())["samples"]
        for entry in samples:
            assert Image.open(where / entry["file"]).size == (64, 64)
        return "".join(capfd.readouterr()), samples, where
    return call

def scenes(n):
    return [data.Scenes("val", n).image(i) for i in range(n)]

@fixture
def pictures(tmp_path):
    """A folder of three pictures and two texts, one named .png."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("notes.txt", "broken.png"):
        (folder / name).write_text("no picture")
    for i, image in enumerate(scenes(3)):
        image.save(folder / f"{i}.png")
    return folder

@slow
def test_prompts_are_painted(made_by, tmp_path):
    printed, samples, where = made_by("--n=3")
    assert "paint:" in printed and "it says:" in printed and Image.open(where / "samples.png").width > 300
    assert len(samples) == 6 and len(samples[-1]["references"]) == 6
    printed, samples, where = made_by("--n=2", "--prompt", "red circle " * 40, "--rerank=5")
    assert "was cut" in printed and Image.open(where / "painted.png").height > 64 and len(samples) == 2
    assert sorted(os.listdir(where)) == ["painted.png", "painted_0.png", "painted_1.png", "samples.json"]
    first, second = (0.2 * x["scores"]["forward"] + 0.8 * x["scores"]["reverse"] for x in samples)
    assert first >= second
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n\n  two crosses \n", encoding="utf-8")
    _, samples, _ = made_by("--prompts", tmp_path / "prompts.txt", "--n=2", "--rerank=1")
    assert [entry["prompt"] for entry in samples] == [PROMPT, PROMPT, "two crosses", "two crosses"]
    assert [entry["seed"] for entry in samples] == [0, 1, 1000, 1001]

@slow
def test_pictures_are_captioned(made_by, pictures):
    first, second = pictures / "0.png", pictures / "1.png"
    printed, samples, _ = made_by("--image", pictures, first, "--n=3", "--prefix=there is a")
    assert "broken.png is not an image" in printed and len(samples) == 12
    assert all(entry["caption"].startswith("there is a") for entry in samples)
    _, samples, _ = made_by("--image", first, "--beam=3")
    assert [entry["seed"] for entry in samples] == [None] * 3
    _, samples, _ = made_by("--image", first, second, "--variations", "--n=2")
    assert [entry.get("image") for entry in samples[::3]] == [str(first), str(second)] and len(samples) == 6
    _, samples, where = made_by("--image", first, second, "--prompt=two crosses", "--keep_rows=4", "--n=2")
    made = [Image.open(where / entry["file"]) for entry in samples]
    assert [entry.get("prompt") for entry in samples] == [None, "two crosses", "two crosses"] * 2
    assert not np.array_equal(made[1], made[4])  # they keep rows of different pictures
    _, samples, where = made_by("--reconstruct", first, second)
    assert len(samples) == 4 and Image.open(where / "reconstructed.png").width == 542

@slow
def test_a_seed_makes_the_sample_again(loaded):
    prompts, images = [PROMPT, "two crosses", "a cross"], scenes(3)

    def same(a, b):  # up to the rounding of sums
        return np.abs(np.asarray(a["picture"], int) - np.asarray(b["picture"], int)).max() <= 1

    for size in (1, 24):
        run = loaded.with_settings(batch_size=size)
        painted, captioned = list(run.paint_all(prompts, 3)), list(run.caption_all(images, 3))
        record = painted[2][1]
        [alone] = next(loaded.with_settings(seed=record["seed"], rerank=1).paint_all(prompts[2:]))
        assert same(record, alone) and not same(record, painted[2][0])
        assert record["scores"] == approx(alone["scores"], abs=2e-3) and record["seed"] // 1000 == 2
        record = captioned[1][2]
        [alone] = next(loaded.with_settings(seed=record["seed"], rerank=1).caption_all(images[1:2]))
        assert record["caption"] == alone["caption"] and record["seed"] // 1000 == 1

@slow
@mark.parametrize("share", [0.0, 0.25, 1.0])
def test_reranking(share, loaded):
    run = loaded.with_settings(rerank=6, rerank_forward=share)
    texts = run.tokenize([PROMPT, "two crosses"])
    for i, group in enumerate(run.candidates(texts, "image", 1, range(2))):
        assert sorted(record["seed"] for record in group) == list(range(1000 * i, 1000 * i + 6))
        expected = []
        for record in group:
            text, image = texts[i:i + 1], record["tokens"][None]
            forward = run.biart.log_likelihood(text, image, "image")[0].item()
            reverse = run.biart.log_likelihood(text, image, "text")[0].item()
            assert record["scores"] == approx({"forward": forward, "reverse": reverse}, abs=1e-3)
            expected.append(share * forward + (1 - share) * reverse)
        assert expected == approx(sorted(expected, reverse=True), abs=1e-3)

@slow
def test_completion_keeps_rows(loaded):
    run, prompts = loaded.with_settings(keep_rows=5, rerank=1), ["a cross", "a circle"]
    codes, _ = run.encode(scenes(2))
    painted = list(run.paint_all(prompts, 2, scenes(2)))
    for i, group in enumerate(run.candidates(run.tokenize(prompts), "image", 2, range(2), codes[:, :40])):
        tokens = torch.stack([record["tokens"] for record in group])
        assert equal(tokens[:, :40], codes[i, :40].expand(2, -1))
        for x, record in zip(run.decode(tokens), painted[i]):
            assert np.array_equal(data.to_image(x), record["picture"])

@slow
def test_a_run_in_python(loaded, made_by, finished):
    # it paints what the command paints
    _, _, where = made_by("--prompt=a cross", "--n=2", "--seed=5", "--rerank=4")
    pictures = loaded.paint("a cross", n=2, seed=5, rerank=4)
    for i, picture in enumerate(pictures):
        assert np.array_equal(picture, Image.open(where / f"painted_{i}.png"))
    # it scores images of any size and mode
    image = pictures[0].convert("P").resize((90, 70))
    text, (codes, _) = loaded.tokenize(["two crosses"]), loaded.encode([image])
    for direction, to in (("t2i", "image"), ("i2t", "text")):
        expected = loaded.biart.log_likelihood(text, codes, to)[0].item()
        assert loaded.score("two crosses", image)[direction] == approx(expected, rel=1e-5)
    assert len(loaded.examples()) == 4 and all(map(parse_caption, loaded.examples()))
    # it refuses what does not fit, and its own settings stay
    with raises(TypeError, match="temprature"):
        loaded.paint("a cross", temprature=1)
    with raises(ValueError, match="needs --keep_rows"):
        loaded.paint("a cross", image=image)
    assert loaded.config == sample.SampleConfig(out_dir=str(finished[0]))

@slow
def test_lines_of_python_in_load_and_readme(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished[0].parent)  # the run is `out` there
    names = {"load": sample.load}
    for line in doctest.DocTestParser().get_examples(sample.load.__doc__):
        exec(line.source, names)
    assert len(names["pictures"]) == 4 and len(names["captions"]) == 2 and len(names["completed"]) == 1
    assert names["captions"][0].startswith("there is")
    lines, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(lines, {})
    assert Image.open("painting.png").size == (64, 64) and "t2i" in capsys.readouterr().out

@slow
def test_bench_of_decoding(finished, monkeypatch, capsys):
    sample_in(finished[0], "--bench", "--device=cpu")
    small = BiARTConfig(n_layer=1, n_head=2, n_embd=16, image_side=4)
    monkeypatch.setattr(sample, "BiARTConfig", lambda **_: small)
    sample.main(["--bench", "--device=cpu"])
    printed = capsys.readouterr().out
    found = re.findall(r"batch (\d), guidance (\d): [1-9]\d* tokens/s, .* x (\d+) tokens .* float32", printed)
    assert found == [(batch, guidance, n) for n in ("64", "16") for guidance in "14" for batch in "18"]

@slow
def test_a_run_with_clips_vocabulary(finished, tmp_path):
    clip_tokenizer().save(tmp_path / "clip.json")
    vae = finished[0] / "augvae_sl.pt"
    train_in(tmp_path, *MINIATURE, "--stage=biart", f"--init_from={vae}", "--max_iters=1",
             f"--tokenizer={tmp_path / 'clip.json'}")
    sample_in(tmp_path, f"--vae={vae}", "--n=2")
    assert checkpoint(tmp_path, "biart")["config"]["text_vocab"] == 49408

@slow
def test_bad_uses_are_refused(finished, pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9\n")
    picture = "--image", pictures / "0.png"
    for message, *arguments in [
        ("absent.txt", "--prompts=absent.txt"), ("--prompt is empty", "--prompt", " "),
        ("is empty", "--prompts", tmp_path / "blank.txt"), ("UTF-8", "--prompts", tmp_path / "latin1.txt"),
        ("empty is not an image or", "--image", tmp_path / "empty"), ("needs --image", "--keep_rows=2"),
        ("broken.png is not an image", "--image", pictures / "broken.png"), ("needs --image", "--prefix=a"),
        ("no file absent.png", "--reconstruct=absent.png"), ("not paint", "--prompt=a", "--beam=3"),
        ("8 is not in 1 to 7", *picture, "--prompt=a", "--keep_rows=8"),
        ("needs --keep_rows", *picture, "--prompt=a"), ("needs --prompt or", *picture, "--keep_rows=2"),
        ("a whole caption at most", *picture, "--prefix", "red circle " * 40),
        ("different uses", "--prompt=a", "--eval"), ("different uses", "--serve", "--export=x"),
        ("leave out --rerank and --top_k", *picture, "--beam=3", "--rerank=2", "--top_k=5"),
        ("--data folder has no captions", "--data=folder", "--val_dir", pictures),
    ]:
        with raises((ValueError, OSError), match=message):
            sample_in(finished[0], f"--save_dir={tmp_path}", *arguments)
    assert "sample.py: --rerank 0 is not in the range from 1 to 1000" in refused("sample.py", "--rerank=0")

@slow
def test_export(finished, loaded, tmp_path):
    folder, rounded = tmp_path / "exported", sample.load(str(finished[0]))
    sample.export(rounded, str(folder))
    assert sorted(os.listdir(folder)) == ["augvae_sl.pt", "biart.pt", "prompts.txt", "tokenizer.json"]
    for stage in ("augvae_sl", "biart"):
        content = checkpoint(folder, stage)
        assert "optimizer" not in content and str(finished[0]) not in str(content)
    run = sample.load(str(folder))
    assert run.examples() == loaded.examples()
    pictures = run.paint(PROMPT, n=3)
    for picture, expected in zip(pictures, rounded.paint(PROMPT, n=3)):
        assert np.array_equal(picture, expected)
    assert run.caption(pictures[0], n=2) == rounded.caption(pictures[0], n=2)
    scores, before = run.score(PROMPT, pictures[0]), loaded.score(PROMPT, pictures[0])
    assert scores == approx(before, rel=1e-3) and scores != before
    with raises(ValueError, match="would overwrite the run"):
        sample_in(folder, "--export", folder / ".." / "exported")
    with raises(ValueError, match="weights alone: there is nothing to resume"):
        train_in(folder, "--resume")

@slow
def test_shipped_weights(tmp_path):
    shipped = Path(HERE, "assets", "scenes")
    assert sum(path.stat().st_size for path in shipped.iterdir()) < 6e6
    recorded = json.loads((shipped / "scores.json").read_text())
    found = last_json(run(sys.executable, "sample.py", "--out_dir", shipped, "--save_dir", tmp_path, "--eval",
                          "--eval_items", recorded["settings"]["eval_items"]))
    assert found == approx(recorded["scores"], rel=0.03, abs=0.03)

@slow
def test_python_sees_what_the_command_sees(loaded, tmp_path):
    picture, exif = scenes(1)[0], Image.Exif()
    exif[0x0112] = 6  # turn right
    picture.save(tmp_path / "phone.jpg", exif=exif)
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    picture.save(tmp_path / "cutout.png")
    paths = [png16(tmp_path / "rgb16.png", 2, [9999, 0, 5], [9999, 0, 5]), *tmp_path.iterdir()]
    for path, record in zip(paths, sample.read_images(loaded, list(map(str, paths)))):
        image = Image.open(path)
        image.load()
        before = image.mode, image.size, image.info.copy(), image.tobytes()
        codes, [pixels] = loaded.encode([image])
        assert np.array_equal(data.to_image(pixels), record["picture"]), path
        assert (image.mode, image.size, image.info, image.tobytes()) == before, path

@slow
@mark.parametrize("use", ["--reconstruct", "--image"])
def test_names_that_are_not_utf8(use, finished, tmp_path):
    scenes(1)[0].save(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \xe2\x98\x83.png"))
    printed = run(sys.executable, "sample.py", use, tmp_path, "--n=1", "--rerank=1", "--save_dir",
                  tmp_path / "made", "--out_dir", finished[0], PYTHONIOENCODING="ascii")
    assert "Traceback" not in printed and printed.isascii()
    samples = json.loads((tmp_path / "made" / "samples.json").read_text(encoding="utf-8"))["samples"]
    assert samples[0]["image"] == f"{tmp_path}/caf\udce9 ☃.png"

@slow
def test_scores_of_small_pictures(tmp_path, capsys):
    train_in(tmp_path, *SMALL)
    sample_in(tmp_path, "--eval", "--eval_items=4", "--rerank=1")
    scores = last_json(capsys.readouterr().out)
    assert "psnr" in scores and "ssim" not in scores

# -----------------------------------------------------------------------------
# README.md

README = Path(HERE, "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"(?:^|&& )(?:python|torchrun --\S+) (train|sample)\.py([^#&\n]*)",
                      "".join(README.split("```")[1::2]).replace("\\\n", ""), re.MULTILINE)

def test_the_readme_names_what_there_is():
    assert len(README.splitlines()) <= 220 and len(README.split()) <= 1900
    for path in re.findall(r"\]\(([\w/.]+)\)", README):
        assert os.path.exists(os.path.join(HERE, path)), path
    known = {"nproc_per_node", "max_restarts", "nnodes", "rdzv_endpoint", "rdzv_backend", "help", "system"}
    for config in (*train.CONFIGS, sample.SampleConfig):
        known |= set(vars(config()))
    for name in re.findall(r"--([a-z]\w+)", README + train.__doc__ + sample.__doc__):
        assert name in known, name
    for command in (" && python train.py && python sample.py", " pytest pytest-xdist && pytest -q -n 2"):
        assert f"\npip install -r requirements.txt{command}\n" in README

@slow
def test_the_commands_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(os.path.join(HERE, "assets"), tmp_path / "assets")
    images, captions = coco(tmp_path / "made")
    for i in range(4):
        noise(tmp_path / "emoji" / f"{i}.png", i)
    for script, given in COMMANDS:
        given = shlex.split(given)
        for name, value in zip(given, given[1:]):
            if value.endswith(".tsv"):
                Path(value).write_text("".join(f"thing {i}\t{i}.png\n" for i in range(4)))
            elif name in ("--train_dir", "--val_dir"):
                shutil.copytree(images, value, dirs_exist_ok=True)
            elif name in ("--train_captions", "--val_captions"):
                Path(value).parent.mkdir(exist_ok=True)
                shutil.copy(captions, value)
            elif name == "--tokenizer":
                Tokenizer.train(["a caption"], 300).save(value)
        if script == "train":
            small = [word for word in MINIATURE if "max_iters" not in word or "--epochs" not in given]
            train.main([*given, *small, "--workers=0", "--lpips_weight=0"])
        elif "--serve" not in given:
            sample.main([*given, "--eval_items=2", "--device=cpu"])
    assert len(COMMANDS) >= 9

@slow
@mark.skipif(shutil.which("git") is None, reason="git applies the change")
def test_the_change_in_the_readme(tmp_path):
    for name in ("augvae", "biart", "data", "tokenizer", "train"):
        shutil.copy(os.path.join(HERE, f"{name}.py"), tmp_path)
    diff, = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    subprocess.run(["git", "apply", "--recount", "-C1"], cwd=tmp_path, input=diff, text=True, check=True)
    loss = re.search(r"`--loss (\w+)`", README)[1]
    command = [sys.executable, "train.py", *SMALL, "--stage=augvae_ml", "--max_iters=1"]
    subprocess.run([*command, f"--loss={loss}"], cwd=tmp_path, check=True)
    wrong = subprocess.run([*command, "--loss=l3"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert f"--loss 'l3' is none of: l2, l1, {loss}" in wrong.stderr

def test_the_recipe_of_the_emoji(tmp_path):
    picture = io.BytesIO()
    Image.new("RGBA", (72, 72), (255, 0, 0, 0)).save(picture, "PNG")
    codes, tags = [f"{i:X}" for i in range(60)], list("abcde")
    concepts = [{"hexcode": code, "label": f"thing {code}", "tags": tags, "group": 0} for code in codes]
    concepts[0]["skins"] = [{"hexcode": "0-FE0F", "label": "thing 0: dark"}]
    (tmp_path / "packages").mkdir()
    for name, path in (("emoji-datasource-google-16.0.0", "img/google/64/{}.png"),
                       ("emoji-datasource-twitter-16.0.0", "img/twitter/64/{}.png"),
                       ("lobehub-fluent-emoji-3d-1.1.0", "assets/{}.webp")):
        files = [(f"package/{path.format(code.lower())}", picture.getvalue()) for code in codes]
        pack(tmp_path / "packages" / f"{name}.tgz", files[bool("google" in name):])  # Noto has no thing 0
    content = json.dumps([*concepts, {"hexcode": "1F3FB", "label": "no group"}]).encode()
    pack(tmp_path / "packages" / "emojibase-data-17.0.0.tgz", [("package/en/data.json", content)])
    run(sys.executable, "assets/emoji.py", tmp_path)
    lists = {name: data.read_tsv(tmp_path / f"{name}.tsv") for name in ("train", "heldout", "val")}
    assert sum(map(len, lists.values())) == 3 * 60 - 1 + 2
    assert lists["train"].image(0).size == (64, 64) and lists["train"].image(0).getpixel((9, 9)) == (255,) * 3
    things = {name: {tuple(text.split(", ")) for i in range(len(some)) for text in some.captions(i)[:1]}
              for name, some in lists.items()}
    for thing, style in things["heldout"]:
        assert {s for t, s in things["train"] if t == thing} == {"noto", "flat", "3d"} - {style}
    assert not {t for t, _ in things["val"]} & {t for t, _ in things["train"] | things["heldout"]}
    assert lists["train"].captions(0) == ["thing 1, noto", "noto thing 1", "a, b, c, d, noto"]

# -----------------------------------------------------------------------------
# sample.py: metrics, and the scores of a run

def test_pixel_metrics_equal_scikit_image():
    r = RandomState(0)
    x = r.uniform(0, 1, (2, 16, 20, 3))
    y = np.clip(x + 0.2 * r.standard_normal(x.shape), 0, 1)
    x[1, :, 8:] = y[1, :, 8:]
    y[1, 3:] = 0.8
    x, y = (torch.from_numpy(z).permute(0, 3, 1, 2).float() for z in (x, y))
    # skimage 0.26: structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    # data_range=1)
    found = sample.ssim(x, y).tolist()
    assert found == approx([0.8583676359885152, 0.02295141904273806], abs=1e-6)
    found = sample.psnr(x, y).tolist()
    assert found == approx([15.238565608588463, 8.254377459922488], rel=1e-5)
    assert sample.ssim(x, x).tolist() == approx([1, 1])
    assert sample.psnr(x, x).tolist() == [100, 100]

@fixture(scope="module")
def inception(tmp_path_factory):
    """A TORCH_HOME with weights for FID's network, made by rule."""
    from torchvision.models import inception_v3
    shapes = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    for i, (name, x) in enumerate(shapes.items()):
        if x.dim():
            r = torch.from_numpy(RandomState(i).standard_normal(tuple(x.shape)).astype(np.float32))
            positive = name.endswith(("weight", "var"))
            shapes[name] = (r * (2 / x[0].numel()) ** 0.5 if x.dim() > 1 else
                            1 + 0.1 * r.abs() if positive else 0.1 * r)
    home = tmp_path_factory.mktemp("torch_home")
    (home / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(shapes, home / "hub" / "checkpoints" / sample.FID_FILE[0])
    return home

@slow
def test_fid_equals_pytorch_fid(inception, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(inception))
    network = sample.FIDInception(download=False)
    features = []
    for seed, low, high in ((1, 0, 256), (2, 60, 200)):
        pixels = RandomState(seed).randint(low, high, (6, 6, 6, 3)).astype(np.uint8)
        features.append(network([Image.fromarray(x).resize((64, 64), Image.BILINEAR) for x in pixels]))
    assert features[0].shape == (6, 2048)
    # pytorch-fid 0.3.0, with the same weights and pictures
    expected = [0.11701524, 0.38984084, 0.0, 0.0, 0.07742107, 0.35763389, 0.27759412]
    assert features[0][0, ::300].tolist() == approx(expected, rel=1e-4, abs=1e-5)
    found = features[0].mean().item(), features[0].numpy().std()
    assert found == approx((0.88425825, 1.16023334), rel=1e-5)
    assert sample.frechet_distance(*features) == approx(237.80561675471512, rel=1e-5)

def test_frechet_distance_equals_pytorch_fid():
    r = RandomState(0)
    a = r.standard_normal((50, 8)) @ r.standard_normal((8, 8))
    b = r.standard_normal((40, 8)) @ r.standard_normal((8, 8)) + 0.5
    a, b = torch.from_numpy(a), torch.from_numpy(b)
    assert sample.frechet_distance(a, b) == approx(26.481021681034264, rel=1e-9)
    assert sample.frechet_distance(a, a) == approx(0, abs=1e-9)
    # fewer samples than dimensions
    few = sample.frechet_distance(a[:3], b[:5])
    cov_a, cov_b = torch.cov(a[:3].T), torch.cov(b[:5].T)
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()
    means = (a[:3].mean(0) - b[:5].mean(0)).square().sum()
    assert few == approx((means + cov_a.trace() + cov_b.trace() - 2 * root).item(), rel=1e-5)
    with raises(ValueError, match="at least 2 images, not 1 and 40"):
        sample.frechet_distance(a[:1], b)

def test_caption_metrics_equal_pycocoevalcap():
    said = ["a dog runs on the grass", "two men ride a red bike down the street", "a cat", "the the the the"]
    references = [["a brown dog is running on grass", "the dog runs across the green grass"],
                  ["two men riding a bike on a street", "men ride down the street on a red bike",
                   "two people on a bike"],
                  ["a cat sits on a mat", "cat"], ["there is the cat on the mat"]]
    said, references = [s.split() for s in said], [[r.split() for r in others] for others in references]
    # pycocoevalcap 1.2: Bleu(4), Rouge(), Cider()
    expected = [0.784318099699277, 0.5656471679021834, 0.34944481658187443, 4.385543619059521e-05]
    assert sample.bleu(said, references) == approx(expected, rel=1e-9)
    assert sample.rouge_l(said, references) == approx(0.6370244983879116, rel=1e-9)
    assert sample.cider_d(said, references) == approx(1.7065427774416457, rel=1e-9)
    references = [["A dog runs on the grass.", "the dog is running"], ["Two men ride a bike!"]]
    perfect = sample.caption_scores([others[0] for others in references], references)
    assert perfect["bleu4"] == approx(1) and perfect["rouge_l"] == 1 and perfect["cider_d"] > 5
    nothing = sample.caption_scores(["", ""], references)
    assert max(nothing.values()) < 1e-4

@mark.parametrize(("caption", "words"), [
    # what Stanford's PTBTokenizer and COCO's list of punctuation give
    ("A dog's ball, isn't it? They've seen 3 dogs; we'll go.",
     "a dog 's ball is n't it they 've seen 3 dogs we 'll go"),
    ("black-and-white t-shirt at 10:30 a.m. on St. John's street...",
     "black-and-white t-shirt at 10:30 a.m. on st. john 's street"),
    ("U.S. flag & a 50% off sign: $3.50 and/or more", "u.s. flag & a 50 % off sign $ 3.50 and/or more"),
    ("gonna wanna dogs' tails -- o'clock, he's \"old\"", "gon na wan na dogs tails o'clock he 's old"),
    ("it’s a “curly” quote – dash — em … dots", "it 's a curly quote dash em dots"),
    ("end.Start no space,here too\t1,000 x*y 'single'", "end.start no space here too 1,000 x * y single"),
    ("he can't, I cannot (really)", "he ca n't i can not really"), ("...", ""), ("", ""),
])
def test_caption_words(caption, words):
    assert sample.caption_words(caption) == words.split()

@slow
def test_scores_of_a_run(finished, loaded, inception, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(inception))  # it has FID's weights, but none for LPIPS
    monkeypatch.setattr(sample, "RETRIEVAL_PAIRS", 3)
    sample_in(finished[0], "--save_dir", tmp_path, "--eval", "--eval_items=4", "--guidance=2", "--rerank=2")
    printed = capsys.readouterr().out
    assert "LPIPS is left out" in printed and "FIDInception is left out" not in printed
    scores = last_json(printed)
    generated = {"bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider_d", "t2i_exact", "i2t_exact", "fid"}
    expected = {"psnr", "ssim", "rfid", "codebook_use", "perplexity", "t2i_bits", "i2t_bits",
                "t2i_recall1", "t2i_recall5", "i2t_recall1", "i2t_recall5"}
    for name in generated:
        expected |= {name, f"{name}_rerank", f"{name}_heldout", f"{name}_rerank_heldout"}
    assert set(scores) == expected
    assert scores["t2i_recall5"] == 1 and scores["fid"] > 0
    recorded = json.loads((tmp_path / "scores.json").read_text())
    assert recorded["scores"] == scores and recorded["settings"]["eval_items"] == 4
    # A metric that may be downloaded is not left out
    monkeypatch.setattr(torch.hub, "download_url_to_file", denied)
    with raises(OSError, match=augvae.VGG_FILE[0]):
        sample.load_metric(loaded.with_settings(download=True), LPIPS)

@slow
def test_scores_against_brute_force(loaded, monkeypatch):
    monkeypatch.setattr(sample, "RETRIEVAL_PAIRS", 7)
    some = data.Scenes("val", 9)
    scores = sample.likelihood_scores(loaded, some)
    text = loaded.tokenize([some.captions(i)[i % 6] for i in range(9)])
    image, x = loaded.encode(scenes(9))
    errors = (loaded.decode(image) - x).double().square().mean((1, 2, 3)) / 4  # of pixels in [0, 1]
    found = sample.reconstruction_scores(loaded, some)["psnr"]
    assert found == approx(np.mean([10 * math.log10(1 / error) for error in errors.tolist()]), rel=1e-4)

    def log_p(i, j, to):  # of text i and image j
        return loaded.biart.log_likelihood(text[i:i + 1], image[j:j + 1], to)[0].item()

    for direction, to, back in (("t2i", "image", "text"), ("i2t", "text", "image")):
        n_better = []  # answers than the right one, for each query
        for query in range(7):
            if direction == "t2i":
                log_ps = [log_p(query, answer, back) for answer in range(7)]
            else:
                log_ps = [log_p(answer, query, back) for answer in range(7)]
            n_better.append(sum(x > log_ps[query] for x in log_ps))
        for k in (1, 5):
            assert scores[f"{direction}_recall{k}"] == sum(n < k for n in n_better) / 7
        n_tokens = image.numel() if to == "image" else (text != loaded.tokenizer.pad).sum().item()
        bits = -sum(log_p(i, i, to) for i in range(9)) / math.log(2) / n_tokens
        assert scores[f"{direction}_bits"] == approx(bits, rel=1e-4)

@slow
@mark.parametrize("beam", [0, 2])
def test_first_and_best_candidates_are_scored(beam, loaded):
    run, some = loaded.with_settings(rerank=3, beam=beam), data.Scenes("val", 4)
    scores = sample.generation_scores(run, some)
    references = [some.captions(i) for i in range(4)]
    captioned = list(run.caption_all([data.to_image(run.crop(image)) for image in scenes(4)], 3))
    first = best = [records[0]["caption"] for records in captioned]
    if not beam:
        first = [min(records, key=lambda record: record["seed"])["caption"] for records in captioned]
    for captions, suffix in ((first, ""), (best, "_rerank")):
        for name, value in sample.caption_scores(captions, references).items():
            assert scores[name + suffix] == approx(value)

# -----------------------------------------------------------------------------
# sample.py: the page

@fixture
def server(loaded):
    server = sample.PageServer(loaded.with_settings(port=0))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()

def connect(port):
    return contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60))

def answer(server, path, asked=None, **headers):
    """GET, or POST an object or bytes -> the status, and the page or the lines of the answer."""
    body = asked if asked is None or isinstance(asked, bytes) else json.dumps(asked)
    with connect(server.server_address[1]) as connection:
        connection.request("GET" if asked is None else "POST", path, body, headers)
        response = connection.getresponse()
        content = response.read().decode()
    if content.startswith("<"):
        return response.status, content
    return response.status, [json.loads(line) for line in content.splitlines()]

def shown(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition("data:image/png;base64,")[2]))))

def base64_of(image, kind="PNG"):
    content = io.BytesIO()
    image.save(content, kind)
    return base64.b64encode(content.getvalue()).decode()

@slow
def test_the_page_paints(server, loaded):
    status, page = answer(server, "/")
    content = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert status == 200 and content["settings"]["guidance"] == train.GUIDANCE["image"]
    for word in ("http:", "https:", "src=\"", "@import", "url("):  # it loads nothing from elsewhere
        assert word not in page, word
    prompt, settings = "a small red circle", {"seed": 5, "top_k": 9, "temperature": 2}
    status, lines = answer(server, "/paint", {"prompt": prompt, "n": 3, **settings})
    first, *rows, last = lines
    side = loaded.image_side
    assert status == 200 and first == {"notes": []}
    assert [row["known"] for row in rows] == [side * (i + 1) for i in range(side)]
    records, painted = last["records"], loaded.paint(prompt, n=3, rerank=3, **settings)
    for record, expected in zip(records, painted):
        assert np.array_equal(shown(record["picture"]), expected)
        drawn = rows[-1]["pictures"][record["seed"] - 5]  # in the order of the seeds
        assert np.array_equal(shown(drawn), expected)
    assert len(records) == 3 and records[0]["score"] >= records[2]["score"]
    _, lines = answer(server, "/paint", {"prompt": "red circle " * 60, "n": 1})
    assert "too long" in lines[0]["notes"][0]

@slow
def test_the_page_captions_and_completes(server, loaded):
    image = scenes(3)[2].resize((90, 80))
    status, lines = answer(server, "/caption", {"image": base64_of(image), "n": 3, "seed": 7})
    captions = [record["caption"] for record in lines[-1]["records"]]
    assert status == 200 and captions == loaded.caption(image, n=3, seed=7, rerank=3)
    assert sorted(text.strip() for text in lines[-2]["captions"]) == sorted(captions)
    asked = {"prompt": "two crosses", "image": base64_of(image, "BMP"), "keep_rows": 5, "n": 2, "seed": 3}
    status, lines = answer(server, "/paint", asked)
    painted = loaded.paint("two crosses", n=2, image=image, keep_rows=5, seed=3, rerank=2)
    assert status == 200 and lines[1]["known"] == 6 * loaded.image_side
    for record, expected in zip(lines[-1]["records"], painted):
        assert np.array_equal(shown(record["picture"]), expected)

@slow
@mark.parametrize(("asked", "pattern"), [
    ([], "not a JSON object"), (b"{", "line 1"), ({"prompt": " "}, "needs a prompt"),
    ({"prompt": 7}, "prompt cannot be '7'"), ({"prompt": "\ud800"}, "surrogates"),
    ({"prompt": "a", "out_dir": "/etc"}, "out_dir cannot be"), ({"prompt": "a", "n": 1.5}, "n cannot be"),
    ({"prompt": "a", "n": 10 ** 400}, "--n 1000"), ({"prompt": "a", "keep_rows": 3}, "needs --keep_rows"),
    ({"prompt": "a", "temperature": math.nan}, "--temperature nan"),
    ({"prompt": "a", "image": "AAAA", "keep_rows": 99}, "99"),
    ({"prompt": "a", "image": "AAAA", "keep_rows": 3}, "not an image"),
], ids=str)
def test_bad_requests_are_refused(asked, pattern, server):
    status, lines = answer(server, "/paint", asked)
    assert status == 400 and re.search(pattern, lines[0]["error"]), lines

@slow
def test_other_sites_and_bad_pictures(server, monkeypatch):
    good = {"prompt": "a cross", "n": 1}
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io:80"):  # DNS rebinding
        assert answer(server, "/", Host=host)[0] == answer(server, "/paint", good, Host=host)[0] == 400, host
    for origin in ("http://evil.example", "null", "https://localhost", "http://localhost:1"):  # cross-site
        status, lines = answer(server, "/paint", good, Host="localhost", Origin=origin)
        assert status == 400 and lines == [{"error": "this server answers its own page only"}], origin
    for path in ("/../sample.py", "/assets/page.html", "//etc/passwd", "/?x=1"):
        assert answer(server, path)[0] == answer(server, path, good)[0] == 400, path
    for length in ("-1", "two", "10000001"):
        status, lines = answer(server, "/paint", b"", **{"Content-Length": length})
        assert status == 400 and "Content-Length of at most 10,000,000" in lines[0]["error"], length
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # Pillow refuses twice as many
    red, large = Image.new("RGB", (40, 40), "red"), Image.new("1", (200, 101))
    for image in (base64_of(red, "TIFF"), base64_of(large), base64_of(red)[:60]):
        status, lines = answer(server, "/caption", {"image": image})
        assert status == 400 and "not an image" in lines[0]["error"], lines
    for host in ("localhost", "127.0.0.1:8000"):
        assert "records" in answer(server, "/paint", good, Host=host, Origin=f"http://{host}")[1][-1]

@slow
@mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_server_ends_on_signals(number, finished):
    process = started(sys.executable, "sample.py", "--serve", "--port=0", "--out_dir", finished[0])
    port = int(re.search(r"http://localhost:(\d+) paints", process.stdout.readline())[1])
    printed = refused("sample.py", "--serve", "--port", port, "--out_dir", finished[0])
    assert f"cannot listen on --port {port} (Address already in use)" in printed
    with connect(port) as connection:
        connection.request("POST", "/paint", json.dumps({"prompt": "a cross", "n": 64}))
        connection.getresponse()  # it ends while it paints
        process.send_signal(number)
        printed, _ = process.communicate(timeout=10)
    assert process.returncode == 0 and "Traceback" not in printed

CHROMIUM = shutil.which("chromium-headless-shell") or shutil.which("chromium")
CLICKS = """
const until = async condition => { while (!condition()) await new Promise(done => setTimeout(done, 50)) }
const all = selector => [...document.querySelectorAll(selector)]
async function click() {
  $("prompt").value = "a small red circle"
  $("seed").value = 3
  $("paint").click()
  await until(() => all(".painting").length === 8)
  const painted = all(".painting img").map(image => image.src)
  const dataTransfer = new DataTransfer()
  dataTransfer.items.add(new File([await (await fetch(painted[2])).blob()], "a.png"))
  document.dispatchEvent(new DragEvent("drop", {dataTransfer, cancelable: true}))
  await until(() => all(".says button").length)
  const captions = all(".says button").map(button => button.firstChild.textContent.slice(0, -1))
  const [rows, words] = all(".tools input")
  rows.value = 5
  words.value = "two crosses"
  all(".tools button")[0].click()  // paint the rest
  await until(() => all(".painting").length === 16)
  const completed = all(".painting img")[0].src, fits = document.documentElement.scrollWidth <= innerWidth
  caption("data:,AAAA")
  await until(() => $("status").className === "bad")
  return {painted, captions, completed, fits, status: $("status").textContent}
}
const report = result => fetch("/report", {method: "POST", body: JSON.stringify(result)})
window.onerror = message => report({error: message})
click().then(report, error => report({error: String(error)}))
"""

@slow
@mark.skipif(not CHROMIUM, reason="there is no Chromium here")
def test_the_page_in_a_browser(server, loaded, tmp_path, monkeypatch):
    reports, answer_others = queue.Queue(), sample.PageHandler.answer

    def answer_or_report(self):
        if self.path != "/report":
            return answer_others(self)
        reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    monkeypatch.setattr(sample.PageHandler, "answer", answer_or_report)
    page = server.page.replace(b"</body>", f"<script>{CLICKS}</script></body>".encode())
    server.page = page.replace(b"connect-src 'self'", b"connect-src 'self' data:")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
             "--window-size=390,900", f"--user-data-dir={tmp_path / 'profile'}"]
    browser = subprocess.Popen([CHROMIUM, *flags, f"http://localhost:{server.server_address[1]}/"],
                               stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        found = reports.get(timeout=90)
    finally:
        os.killpg(browser.pid, signal.SIGKILL)  # it may be started by a script
        browser.wait()
    assert "error" not in found, found
    for url, expected in zip(found["painted"], loaded.paint("a small red circle", n=8, seed=3, rerank=8)):
        assert np.array_equal(shown(url), expected)
    picture = Image.fromarray(shown(found["painted"][2]))
    assert found["captions"] == list(dict.fromkeys(loaded.caption(picture, n=4, seed=3, rerank=4)))
    completed = loaded.paint("two crosses", 8, picture, keep_rows=5, seed=3, rerank=8)
    assert np.array_equal(shown(found["completed"]), completed[0])
    assert found["fits"] and "not an image that can be read" in found["status"]
