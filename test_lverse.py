"""
Tests, by file and in the order of the pipeline: tokenizer, data, augvae, biart, train, sample.

$ pytest -q -n 2  # in two processes, by pytest-xdist; without -n it is one

They compare with brute force, a reference, or the long way round; the last ones run the real commands.
"""
import argparse
import base64
import concurrent.futures
import contextlib
import copy
import csv
import ctypes
import dataclasses
import doctest
import gzip
import hashlib
import http.client
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import urllib.error
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torchvision.transforms import RandomResizedCrop

import augvae
import biart as biart_module
import data
import sample as sample_module
import tokenizer as tokenizer_module
import train
from augvae import LPIPS, AugVAE, AugVAEConfig, Codebook, Upsample, codebook_use
from biart import BiART, BiARTConfig, sample_token
from data import DataConfig
from tokenizer import Tokenizer

aten = torch.ops.aten
HERE = os.path.dirname(os.path.abspath(__file__))


def assert_same_values_and_gradients(f, g, inputs, tolerance, parameters=(), amp=False):
    """
    f(*inputs) and g(*inputs) agree, in dtype and up to a share `tolerance` of the largest value; so do the
    gradients of inputs and parameters. Both draw the same random numbers; amp runs them in bfloat16 autocast.
    """
    results = []
    for function in (f, g):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):  # one each: it caches weights
            y = function(*inputs)
        loss = (y * torch.randn(y.shape, dtype=y.dtype)).sum()
        results.append([y, *torch.autograd.grad(loss, [*inputs, *parameters])])
    for a, b in zip(*results):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()

# -----------------------------------------------------------------------------
# tokenizer.py

TOK_TEXTS = [
    "A young boy in the park is throwing a frisbee, and the dog's catching it.\n",
    "Two dogs play in the park; they've seen 3 other dogs and 12 birds there!\n",
    "it's a dog, isn't it? the dogs aren't in the snow_park  today...\r\n",
    "banana bananas aaaaaaa anananana  \t\n",
    "naïve café — déjà vu, كلب يلعب في الحديقة 犬が公園で遊ぶ 👩‍👩‍👧‍👦👍🏽\n",
]

TOK_HARD_TEXTS = [
    "", " ", "   ", "\n", "\r\n", "one\r\ntwo\rthree\n\nfour", " leading and trailing  ",
    "tab\tand\x0bothers\x85\u3000.", "\u2028\u2029 \u200b", "\x00", "a\x00b\x01\x1c\x1f\x7f",
    "👩‍👩‍👧‍👦 👍🏽🇮🇳", "ٱلْعَرَبِيَّة لغة", "日本語のキャプション",
    "\u0301", "a\u0301\u0327 \u0345", "\u200d\ufeff\u202e",
    "\ue000\uffff\U0010ffff", "Ⅷ ½ ² 3½ ٣", "1234567890 12,345.67", "under_score __init__ _",
    "don't DON'T 'tis ''", "<|endoftext|> <end> <pad> </w>", "x" * 500,
]

# the golden clip_bpe.json: what OpenAI's CLIP tokenizer gives, without start and end tokens
TOK_CLIP_GOLDEN = [
    ("A young boy in the park throwing a frisbee.", [320, 1888, 1876, 530, 518, 1452, 9734, 320, 45768, 269]),
    ("it's the dog's ball, isn't it? they've seen 3 dogs; we'll go",
     [585, 568, 518, 1929, 568, 1069, 267, 2923, 713, 585, 286, 889, 1200, 2041, 274, 3255, 282, 649,
      1342, 861]),
    ("  Mixed   CASE\twith\nwhitespace ", [6780, 2068, 593, 4699, 2138]),
    ("naïve café — déjà vu", [1097, 35689, 563, 15304, 2005, 25466, 73, 21259, 13230]),
    ("日本語のキャプション",
     [39121, 44353, 34002, 252, 21575, 47121, 2429, 96, 2429, 245, 37665, 2429, 100, 26875]),
    ("Ⅷ ½ ² 3½ cups of 東京 タワー",
     [158, 227, 371, 33613, 41175, 274, 33613, 11463, 539, 48338, 21078, 361, 34941, 2429, 107, 30391]),
    ("under_score __init__ a_b", [1798, 318, 4431, 3838, 42670, 3838, 320, 318, 321]),
    ("1234567890 12,345.67",
     [272, 273, 274, 275, 276, 277, 278, 279, 280, 271, 272, 273, 267, 274, 275, 276, 269, 277, 278]),
    ("don't DON'T Don'T", [847, 713, 847, 713, 847, 713]),
    ("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
     [23126, 23126, 23126, 23126, 23126, 23126, 23126, 23126, 44413]),
    ("ٱلْعَرَبِيَّة हिन्दी ไทย",
     [149, 109, 37899, 149, 496, 148, 373, 149, 492, 24933, 149, 492, 35330, 149, 494, 23853, 149, 236,
      149, 495, 20915, 29446, 26721, 26090, 19389, 29552, 25751, 31718, 245, 33091]),
    ("<|startoftext|>hello<|endoftext|>", [49406, 3306, 49407]),
    ("", []),
]


def tok_trained(vocab_size=300):
    return Tokenizer.train(TOK_TEXTS, vocab_size)


def tok_clip():
    here = os.path.dirname(os.path.abspath(tokenizer_module.__file__))
    path = os.environ.get("LVERSE_CLIP_BPE") or os.path.join(
        here, "..", "shared", "data", "clip", "bpe_simple_vocab_16e6.txt.gz")
    if not os.path.exists(path):
        pytest.skip(f"CLIP's merge list is not at {path} (set LVERSE_CLIP_BPE)")
    return Tokenizer.load(path)


def tok_random_text(rng):
    """Any Unicode text: mostly from a few busy blocks, sometimes from anywhere."""
    blocks = [(0, 0x80), (0x20, 0x7f), (0x80, 0x250), (0x300, 0x370), (0x600, 0x700), (0x2000, 0x2070),
              (0x4e00, 0x4e40), (0x1f300, 0x1f650), (0, 0x110000)]
    text = ""
    for _ in range(rng.randrange(8)):
        start, stop = rng.choice(blocks)
        text += "".join(chr(rng.randrange(start, stop)) for _ in range(rng.randrange(8)))
    return "".join(c for c in text if not 0xd800 <= ord(c) < 0xe000)


def tok_merge_everywhere(ids, pair, new_id):
    out, i = [], 0
    while i < len(ids):
        found = tuple(ids[i:i + 2]) == pair
        out.append(new_id if found else ids[i])
        i += 2 if found else 1
    return out


def tok_brute_force_train(texts, vocab_size):
    """Counts everything again after every merge."""
    words = [list(word.encode()) for text in texts for word in tokenizer_module.trained_words(text)]
    merges = []
    while len(merges) < vocab_size - 258:
        counts = Counter((word[i], word[i + 1]) for word in words for i in range(len(word) - 1))
        pair = min(counts, key=lambda p: (-counts[p], p), default=None)
        if pair is None or counts[pair] < 2:
            break
        words = [tok_merge_everywhere(word, pair, 256 + len(merges)) for word in words]
        merges.append(pair)
    return merges


def test_tokenizer_docstring_example():
    tok = Tokenizer.train(["low lower lowest slow"], vocab_size=261)
    assert tok.merges == [(108, 111), (256, 119), (32, 257)]
    assert tok.encode("low lower") == [257, 258, 101, 114]
    assert (len(tok), tok.end, tok.pad) == (261, 259, 260)


@pytest.mark.parametrize("text", TOK_TEXTS + TOK_HARD_TEXTS, ids=ascii)
def test_tokenizer_round_trip(text):
    for tok in (Tokenizer.train([], 258), tok_trained()):
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert all(0 <= i < tok.end for i in ids)


def test_tokenizer_round_trip_random_unicode():
    rng = random.Random(0)
    tok = tok_trained()
    for _ in range(500):
        text = tok_random_text(rng)
        assert "".join(tokenizer_module.trained_words(text)) == text
        assert tok.decode(tok.encode(text)) == text


def test_tokenizer_words():
    words = tokenizer_module.trained_words("It's  2 late_\n in 2024,\t\tthey said...")
    assert words == ["It", "'s", " ", " 2", " late", "_", "\n", " in", " 2", "0", "2", "4", ",",
                     "\t", "\t", "they", " said", "..."]


@pytest.mark.parametrize("vocab_size", [258, 259, 300, 10000])
def test_tokenizer_training_equals_brute_force(vocab_size):
    assert Tokenizer.train(TOK_TEXTS, vocab_size).merges == tok_brute_force_train(TOK_TEXTS, vocab_size)


def test_tokenizer_training_equals_brute_force_on_repetitive_text():
    # few letters and long runs: overlapping pairs, equal counts, one word hit many times by one merge
    rng = random.Random(1)
    for _ in range(20):
        texts = ["".join(rng.choice("aab ") for _ in range(rng.randrange(1, 200))) for _ in range(4)]
        assert Tokenizer.train(texts, 500).merges == tok_brute_force_train(texts, 500)


def test_tokenizer_naive_loop_in_the_docstring_gives_the_same_merges():
    loop = textwrap.dedent(tokenizer_module.learn_merges.__doc__.split("slower:\n\n")[1])
    words = [word for text in TOK_TEXTS for word in tokenizer_module.trained_words(text)]
    counts = Counter(tuple(word.encode()) for word in words)
    for n_merges in (0, 1, 50, 10000):
        names = {**vars(tokenizer_module), "word_counts": counts, "first_id": 256, "n_merges": n_merges}
        exec(loop, names)
        assert names["merges"] == tokenizer_module.learn_merges(counts, 256, n_merges)
    assert 20 < len(names["merges"]) < 10000  # it stopped where no pair was left


def test_tokenizer_training_stops_early():
    assert len(Tokenizer.train([], 1000)) == 258
    assert len(Tokenizer.train(["abc"], 1000)) == 258
    assert len(Tokenizer.train(["abc abc"], 1000)) == 258 + 2
    assert len(Tokenizer.train(TOK_TEXTS, 300)) == 300


def test_tokenizer_training_ignores_order():
    assert Tokenizer.train(TOK_TEXTS, 350).merges == Tokenizer.train(iter(TOK_TEXTS[::-1]), 350).merges


def test_tokenizer_encode_equals_brute_force():
    rng = random.Random(2)
    tok = tok_trained(10000)
    vocabulary = [word for text in TOK_TEXTS for word in text.split()]
    for _ in range(200):
        text = " ".join(rng.choices(vocabulary, k=5)) + "".join(rng.choices("abn ", k=30))
        text += tok_random_text(rng)
        expected = []
        for word in tokenizer_module.trained_words(text):
            ids = list(word.encode())
            for new_id, pair in enumerate(tok.merges, 256):
                ids = tok_merge_everywhere(ids, pair, new_id)
            expected += ids
        assert tok.encode(text) == expected


def test_tokenizer_cache_is_bounded(monkeypatch):
    expected = tok_trained().encode(TOK_TEXTS[0])
    monkeypatch.setattr(tokenizer_module, "CACHE_WORDS", 3)
    tok = tok_trained()
    assert tok.encode(TOK_TEXTS[0]) == expected
    assert tok.encode_word.cache_info().currsize <= 3


def test_tokenizer_bad_vocab_size():
    for vocab_size in (257, 0, -1):
        with pytest.raises(ValueError, match=f"{vocab_size}.*258"):
            Tokenizer.train(TOK_TEXTS, vocab_size)
    with pytest.raises(TypeError):
        Tokenizer.train("one string", 300)


def test_tokenizer_decode_special_and_bad_ids():
    tok = tok_trained()
    ids = tok.encode("the dog")
    assert tok.decode([tok.pad] + ids + [tok.end, tok.pad]) == "the dog"
    assert tok.decode([]) == ""
    assert tok.decode([0xc3]) == "\ufffd"  # half a character
    for bad in (-1, len(tok)):
        with pytest.raises(ValueError, match=f"{bad}.*{len(tok) - 1}"):
            tok.decode([bad])


def test_tokenizer_encode_refuses_lone_surrogates():
    with pytest.raises(ValueError):
        tok_trained().encode("a\ud800")


def test_tokenizer_encode_padded():
    tok = tok_trained()
    ids = tok.encode("the dog's in the snow")
    n = len(ids)
    assert tok.encode_padded("the dog's in the snow", n + 3) == (ids + [tok.end, tok.pad, tok.pad], False)
    assert tok.encode_padded("the dog's in the snow", n + 1) == (ids + [tok.end], False)
    assert tok.encode_padded("the dog's in the snow", n) == (ids[:-1] + [tok.end], True)
    assert tok.encode_padded("the dog's in the snow", 1) == ([tok.end], True)
    assert tok.encode_padded("", 1) == ([tok.end], False)
    with pytest.raises(ValueError, match="0"):
        tok.encode_padded("", 0)


def test_tokenizer_save_load_fingerprint(tmp_path):
    tok = tok_trained()
    path = tmp_path / "tok.json"
    path.write_text("an older file is replaced")
    tok.save(path)
    assert os.listdir(tmp_path) == ["tok.json"]  # the temporary file is gone
    again = Tokenizer.load(str(path))
    assert (again.merges, len(again), again.end, again.pad) == (tok.merges, len(tok), tok.end, tok.pad)
    assert again.encode(TOK_TEXTS[4]) == tok.encode(TOK_TEXTS[4])
    assert again.fingerprint() == tok.fingerprint() == tok_trained().fingerprint()
    others = [tok_trained(299), Tokenizer.train(TOK_TEXTS[1:], 300), Tokenizer.train([], 258)]
    others += [Tokenizer("clip", [])]  # no merges either, but other bytes
    assert len({t.fingerprint() for t in [tok, *others]}) == 5


def test_tokenizer_pickles():
    # a data loader with worker processes sends the tokenizer to them
    tok = tok_trained()
    assert pickle.loads(pickle.dumps(tok)).encode(TOK_TEXTS[4]) == tok.encode(TOK_TEXTS[4])


def test_tokenizer_load_refuses_bad_files(tmp_path):
    good = tmp_path / "good.json"
    tok_trained().save(good)
    content = good.read_text()
    data = json.loads(content)
    bad = {
        "empty": "", "truncated": content[:-10], "not_json": "BPE, honestly", "binary": "\x00\x01",
        "number": "7", "list": "[]", "null": "null", "nested": "[" * 100000, "other_object": '{"model": 1}',
        "other_format": json.dumps({**data, "format": "BPE"}),
        "no_kind": json.dumps({"format": data["format"], "merges": data["merges"]}),
        "wrong_kind": json.dumps({**data, "kind": "wordpiece"}),
        "list_kind": json.dumps({**data, "kind": ["clip"]}),
        "no_merges": json.dumps({"format": data["format"], "kind": data["kind"]}),
    }
    bad_merges = {"text": "ab", "flat": [1, 2], "triple": [[1, 2, 3]], "from_the_future": [[1, 256]],
                  "negative": [[-1, 2]], "floats": [[1.0, 2]], "strings": [["a", "b"]], "null": None}
    for name, merges in bad_merges.items():
        bad[f"merges_{name}"] = json.dumps({**data, "merges": merges})
    for name, content in bad.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "latin1").write_bytes(b"\xff\xfe\xe9")
    (tmp_path / "folder").mkdir()
    for name in [*bad, "latin1", "folder", "missing"]:
        with pytest.raises(ValueError, match=name) as info:
            Tokenizer.load(tmp_path / name)
        assert type(info.value) is ValueError and "\n" not in str(info.value)


def test_tokenizer_load_refuses_bad_merge_lists(tmp_path):
    short = gzip.compress(b"a header\ni n\nt h\n")
    bad = {"missing": None, "not_gzip": b"i n\nt h\n", "empty": b"", "truncated": short[:-12], "short": short,
           "no_pairs": gzip.compress(b"header\nhello\n"), "unknown_symbol": gzip.compress(b"header\nin g\n"),
           "garbled": short[:10] + b"\xff" * 30, "latin1": gzip.compress(b"header\n\xff\xfe")}
    for name, content in bad.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as info:
            Tokenizer.load(tmp_path / name)
        assert type(info.value) is ValueError and "\n" not in str(info.value)


def test_tokenizer_clip_golden(tmp_path):
    tok = tok_clip()
    assert (len(tok), tok.end, tok.pad) == (49408, 49407, 49406)
    tok.save(tmp_path / "clip.json")
    again = Tokenizer.load(tmp_path / "clip.json")
    assert again.fingerprint() == tok.fingerprint()
    for text, ids in TOK_CLIP_GOLDEN:
        assert tok.encode(text) == ids, text
        assert again.encode(text) == ids, text


def test_tokenizer_clip_decode():
    tok = tok_clip()
    assert tok.decode(tok.encode("  A young  boy&#39;s\tFRISBEE, 12½ ")) == "a young boy 's frisbee , 1 2 ½"
    ids, was_cut = tok.encode_padded("a dog", 5)
    assert ids == [320, 1929, tok.end, tok.pad, tok.pad] and not was_cut
    assert tok.decode(ids) == "a dog"
    assert tok.decode(tok.encode("x" * 500)) == "x" * 500


def test_tokenizer_load_reads_both_kinds_and_captions_have_one_end(tmp_path):
    tok = tok_clip()
    assert tok.encode("a<|endoftext|>b") == [320, tok.end, 321]  # as CLIP
    for text in ("a<|endoftext|>b", "<|startoftext|>a &lt;|EndOfText|&gt; b"):
        assert tok.encode_padded(text, 4) == ([320, 321, tok.end, tok.pad], False)
        assert tok.encode_padded(text, 2) == ([320, tok.end], True)
    path = os.environ.get("LVERSE_CLIP_BPE") or os.path.join(
        HERE, "..", "shared/data/clip/bpe_simple_vocab_16e6.txt.gz")
    assert Tokenizer.load(path).fingerprint() == tok.fingerprint()
    (tmp_path / "short").write_bytes(gzip.compress(b"a header\ni n"))
    with pytest.raises(ValueError, match="short .*only 1 merges"):
        Tokenizer.load(tmp_path / "short")


def test_tokenizer_clip_words():
    # needs no merge list
    words = tokenizer_module.clip_words
    assert words("It's <B>20Ⅷ½</B>!") == ["it", "'s", "<", "b", ">", "2", "0", "ⅷ", "½", "</", "b", ">!"]
    assert words("snow_man DON'T, we'LL") == ["snow", "_", "man", "don", "'t", ",", "we", "'ll"]
    # vowel signs are marks, neither letter nor number
    assert words("हिन्दी") == ["ह", "ि", "न", "्", "द", "ी"]
    assert words("&amp;amp;lt; &nbsp; x\u3000y") == ["&", "lt", ";", "x", "y"]
    assert words("a<|StartOfText|>b <|endoftext|>") == ["a", "<|startoftext|>", "b", "<|endoftext|>"]
    assert words("'ſtop 'Sir") == ["'ſ", "top", "'s", "ir"]
    assert words("a\x1cb\u0345c") == ["a", "\x1c", "b", "c"]

# -----------------------------------------------------------------------------
# data.py

KINDS = list(itertools.product(data.SIZES, data.COLOURS, data.SHAPES))


def test_scenes_are_deterministic_and_hold_out_combinations():
    train_scenes = data.Scenes("train", 300)
    assert train_scenes.scene(7) == data.Scenes("train", 10).scene(7)
    assert train_scenes.scene(7) != data.Scenes("val", 10).scene(7)
    assert np.array_equal(np.asarray(train_scenes.image(7)), np.asarray(data.Scenes("train", 10).image(7)))
    contents = {}
    for split, held in (("train", False), ("val", False), ("heldout", True)):
        scenes = [data.Scenes(split, 200).scene(i) for i in range(200)]
        contents[split] = {data.facts(things, relation) for things, relation, *_ in scenes}
        assert all(any(map(data.held_out, things)) == held for things, *_ in scenes)
        assert {len(things) for things, *_ in scenes} == {1, 2}
    assert not contents["train"] & contents["val"]


def test_one_kind_in_eight_is_held_out_and_every_pair_of_attributes_is_seen():
    seen = [kind for kind in KINDS if not data.held_out(kind)]
    assert len(KINDS) == 192 and len(seen) == 168
    drawn = {thing for i in range(1500) for thing in data.Scenes("train", 1500).scene(i)[0]}
    assert drawn == set(seen)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(kind[i], kind[j]) for kind in seen} == {(kind[i], kind[j]) for kind in KINDS}


def test_oracle_reads_rendered_scenes_and_captions():
    for split in ("train", "heldout"):
        scenes = data.Scenes(split, 80)
        for i in range(len(scenes)):
            things, relation, _, captions = scenes.scene(i)
            truth = data.facts(things, relation)
            assert data.read_scene(scenes.image(i)) == truth
            full, partial = captions[:data.N_FULL], captions[data.N_FULL:]
            assert len(full) == 4 and len(partial) == 2
            for caption in full:
                assert data.parse_caption(caption) == truth, caption
            for caption in partial:
                assert data.matches(data.parse_caption(caption), truth), caption


@pytest.mark.slow
def test_oracle_reads_every_thing_in_every_place():
    rng = random.Random(0)
    lattice = [data.LATTICE * i for i in range(2, 9)]
    for kind in KINDS:
        for centre in itertools.product(lattice, lattice):
            assert data.read_scene(data.draw_things([kind], [centre])) == data.facts([kind], None)
        for relation in data.RELATIONS:
            things = [kind, rng.choice(KINDS)]
            image = data.draw_things(things, data.place_things(relation, rng))
            assert data.read_scene(image) == data.facts(things, relation)


def test_oracle_refuses_what_is_no_scene():
    side = (data.SCENE_SIDE, data.SCENE_SIDE)
    assert data.read_scene(Image.new("RGB", side, data.BACKGROUND)) is None
    three = [("small", "red", "circle")] * 3
    assert data.read_scene(data.draw_things(three, [(8, 8), (20, 20), (32, 32)])) is None
    for caption in ("", "something", "a small red", "a small red circle above", "a red red circle",
                    "a small red circle above a large blue square today",
                    "a large mauve circle above a small red cross"):
        assert data.parse_caption(caption) is None


def test_every_way_to_begin_a_caption_names_things_in_either_order():
    scenes, order = data.Scenes("train", 600), {}
    for i in range(len(scenes)):
        _, relation, _, captions = scenes.scene(i)
        in_order = [any(f" {word} " in caption for name in ("left of", "above") for word in data.WORDS[name])
                    for caption in captions if relation]
        assert not relation or sum(in_order) == len(data.PHRASES) - data.N_BACKWARD
        for phrase, forward in enumerate(in_order):
            order.setdefault(phrase, []).append(forward)
    assert len(order) == len(data.PHRASES)
    for found in order.values():
        assert 0.76 < np.mean(found) < 0.91  # 5/6, and four standard deviations


def test_a_scene_said_the_other_way_round_is_the_same():
    a, b = ("small", "red", "circle"), ("large", "blue", "cross")
    assert data.facts([a, b], "above") == data.facts([b, a], "below") != data.facts([a, b], "below")


def test_captions_are_judged_by_what_they_say_and_no_more():
    scene = data.facts([("small", "red", "circle"), ("large", "orange", "arrow")], "left of")
    alone = data.facts([("small", "red", "circle")], None)
    for caption in ("a small red circle left of a large orange arrow", "an arrow right of a circle",
                    "circle left of something", "something big and orange to the right of something little",
                    "the red circle is left of an orange arrow"):
        assert data.matches(data.parse_caption(caption), scene), caption
    for caption in ("a circle right of an arrow", "a blue circle left of an arrow", "a red circle",
                    "a small orange circle left of a large red arrow", "nonsense"):
        assert not data.matches(data.parse_caption(caption), scene), caption
    for caption in ("red circle", "there is a circle", "something small", "something small and red"):
        assert data.matches(data.parse_caption(caption), alone), caption
    assert not data.matches(data.parse_caption("a circle left of something"), alone)
    assert not data.matches(data.parse_caption("a circle"), None)


def test_exact_rates_judge_by_the_caption_that_was_painted():
    scenes = data.Scenes("val", 12)
    references = [scenes.captions(i) for i in range(12)]
    pictures = [scenes.image(i) for i in range(12)]
    prompts = data.one_caption_each(references)
    assert [references[i].index(prompts[i]) % 6 for i in (0, 1, 2)] == [0, 1, 2]
    assert data.exact_rates(prompts, pictures, references, prompts) == {"t2i": 1.0, "i2t": 1.0}
    wrong = data.exact_rates(prompts, pictures[1:] + pictures[:1], references, ["a cat"] * 12)
    assert wrong["t2i"] < 0.3 and wrong["i2t"] == 0
    assert data.exact_rates(["a cat"], pictures[:1], [["a cat"]], ["a cat"]) == {}


def test_components_against_flood_fill():
    mask = np.random.RandomState(0).rand(20, 20) > 0.5
    left, sizes = {tuple(p) for p in np.argwhere(mask)}, []
    while left:
        stack, size = [left.pop()], 0
        while stack:
            y, x = stack.pop()
            size += 1
            for p in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if p in left:
                    left.remove(p)
                    stack.append(p)
        sizes.append(size)
    found = data.components(mask)
    assert [c.sum() for c in found] == sorted(sizes, reverse=True)
    assert np.array_equal(sum(c.astype(int) for c in found), mask.astype(int))


def test_image_files_of_every_mode_come_out_right(tmp_path):
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 200
    image = Image.fromarray(red)
    transparent = image.convert("RGBA")
    transparent.putalpha(0)
    cases = {"rgb.png": (image, (200, 0, 0)), "palette.png": (image.quantize(4), (200, 0, 0)),
             "grey.png": (image.convert("L"), (60, 60, 60)), "rgba.png": (transparent, (255, 255, 255)),
             "la.png": (transparent.convert("LA"), (255, 255, 255)),
             "bits.png": (Image.new("1", (8, 8), 1), (255,) * 3),
             "cmyk.jpg": (image.convert("CMYK"), (200, 0, 0)), "grey.jpg": (image.convert("L"), (60, 60, 60)),
             "grey16.png": (Image.fromarray(np.full((8, 8), 257 * 100, np.uint16)), (100, 100, 100)),
             "grey16.tif": (Image.fromarray(np.full((8, 8), 257 * 100, np.uint16)), (100, 100, 100))}
    for name, (picture, colour) in cases.items():
        picture.save(tmp_path / name)
        loaded = data.load_image(tmp_path / name, min_side=4)
        assert loaded.mode == "RGB"
        assert np.abs(np.asarray(loaded, int)[2, 2] - colour).max() <= 3, name
    image.quantize(4).save(tmp_path / "clear.png", transparency=0)
    assert np.asarray(data.load_image(tmp_path / "clear.png")).min() == 255


def test_images_come_out_upright(tmp_path):
    def transposed(x):
        return np.swapaxes(x, 0, 1)
    picture = np.zeros((16, 24, 3), int)
    picture[:8, :8], picture[8:, :8] = (200, 0, 0), (0, 200, 0)
    upright = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: transposed,
               6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(transposed(x), 2), 8: np.rot90}
    for orientation, turn in upright.items():  # what undoes each value of the EXIF tag
        exif = Image.Exif()
        exif[0x0112] = orientation
        for name, options in (("a.png", {}), ("a.tif", {}), ("a.jpg", {"quality": 100, "subsampling": 0})):
            Image.fromarray(picture.astype(np.uint8)).save(tmp_path / name, exif=exif, **options)
            found = np.asarray(data.load_image(tmp_path / name), int)
            assert np.abs(found - turn(picture)).max() <= 3, (orientation, name)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_does_no_harm(tmp_path):
    # "turn right", and a number of channels that is the text "abc", which Pillow reads but cannot write again
    turned = (b"MM\0*\0\0\0\x08\0\x02" b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
              b"\x01\x15\0\x02\0\0\0\x04abc\0" b"\0\0\0\0")
    for exif in (turned, b"", b"II*\0\xff\xff\xff\xff", b"MM" + bytes(40), b"x" * 50):
        Image.new("RGB", (8, 4), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif)
        assert data.load_image(tmp_path / "a.jpg").size == ((4, 8) if exif == turned else (8, 4))


def test_large_jpegs_are_decoded_smaller_and_look_the_same(tmp_path):
    train.photograph(1600, 1200).save(tmp_path / "large.jpg", quality=95)
    sizes = {0: (1600, 1200), 700: (1600, 1200), 300: (400, 300), 301: (800, 600), 1: (200, 150)}
    for min_side, size in sizes.items():
        assert data.load_image(tmp_path / "large.jpg", min_side).size == size
    whole, small = (data.crop_to_tensor(data.load_image(tmp_path / "large.jpg", min_side), 128)
                    for min_side in (0, 128))
    assert (whole - small).abs().mean() < 0.02


def denied(*_arguments, **_named):
    raise PermissionError(13, "Permission denied")


def test_unreadable_images_are_named(tmp_path, monkeypatch):
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8))
    for ending in ("png", "jpg"):
        picture.save(tmp_path / f"whole.{ending}")
        content = (tmp_path / f"whole.{ending}").read_bytes()
        (tmp_path / f"cut.{ending}").write_bytes(content[:len(content) // 2])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("cut.png", "cut.jpg", "text.png", "empty.jpg", "loop.png", "folder.png", "absent.png"):
        with pytest.raises(data.Unreadable, match=f"{name}[^\n]*$"):
            data.load_image(tmp_path / name, min_side=16)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(data.Unreadable, match="decompression bomb"):
        data.load_image(tmp_path / "whole.jpg", min_side=16)
    monkeypatch.setattr(Image, "open", denied)
    with pytest.raises(data.Unreadable,
                       match="whole.png is not an image that can be read .Permission denied"):
        data.load_image(tmp_path / "whole.png")


def test_crops():
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (48, 80, 3), np.uint8))
    centre = data.crop_to_tensor(image, 48)
    expected = torch.from_numpy(np.array(image)[:, 16:64]).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.allclose(centre, expected, atol=1e-6)
    a, b = (data.crop_to_tensor(image, 32, 0.5, random.Random(seed)) for seed in (1, 1))
    c = data.crop_to_tensor(image, 32, 0.5, random.Random(2))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == (3, 32, 32) and a.abs().max() <= 1
    assert (np.asarray(data.to_image(centre)) == np.array(image)[:, 16:64]).all()
    for size in (20, 100):  # resizing is Pillow's, to within rounding
        resized = image.crop((16, 0, 64, 48)).resize((size, size), Image.BILINEAR)
        ours = np.asarray(data.to_image(data.crop_to_tensor(image, size)), int)
        assert np.abs(ours - np.asarray(resized, int)).max() <= 1


def test_settings_of_data_have_ranges_and_choices():
    fields = {field.name: field for field in dataclasses.fields(DataConfig)}
    assert set(DataConfig.limits) | set(DataConfig.choices) <= set(fields)
    assert DataConfig.limits["crop_scale"] == "(0, 1]"
    # every numeric setting has a range, and every layout that can be chosen is one that open_data() knows
    assert set(DataConfig.limits) == {name for name, field in fields.items() if field.type in (int, float)}
    for name, values in DataConfig.choices.items():
        assert getattr(DataConfig, name) in values
    for name in DataConfig.choices["data"][2:]:
        with pytest.raises(ValueError, match=f"--data {name} needs --val_dir"):
            data.open_data(DataConfig(data=name), "val")


def noise(path, i, size=64):
    """Write image number i of random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(i).randint(0, 256, (size, size, 3), np.uint8)).save(path)
    return path


def pack(path, members):
    """Write a tar of (name, bytes)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_crops_of_the_whole_picture_are_those_of_torchvision():
    def boxes(w, h, crop_of, n=400):
        # a picture whose colours tell where a pixel was, so that a crop tells what it shows
        ramp = np.zeros((h, w, 3), np.uint8)
        ramp[..., 0], ramp[..., 1] = np.arange(w)[None], np.arange(h)[:, None]
        crops = (data.crop_to_tensor(Image.fromarray(ramp), 64, 0.75, random.Random(i), crop_of)
                 for i in range(n))
        crops = [(c + 1) * 127.5 for c in crops]
        sides = np.array([(c[0, 0, -1] - c[0, 0, 0]) * 64 / 63 for c in crops])
        return sides, np.array([c[0].mean() for c in crops])

    for w, h in ((120, 120), (128, 120), (160, 120)):
        sides, centres = boxes(w, h, "picture")
        torch.manual_seed(0)
        tried = [RandomResizedCrop.get_params(torch.empty(3, h, w), [0.75, 1.0], [1.0, 1.0])
                 for _ in range(2000)]
        assert np.mean(sides) == pytest.approx(np.mean([t[3] for t in tried]), abs=1.5)
        assert np.std(centres) == pytest.approx(np.std([t[1] + t[3] / 2 for t in tried]), abs=1)
    # of 4:3 pictures the release shows all the height
    assert sides.min() > 117 > boxes(160, 120, "square")[0].min() + 10


def coco(tmp_path, n=4, size=64):
    """A small data set in the MS-COCO captions layout -> (folder, JSON path, the JSON's content)."""
    for i in range(n):
        noise(tmp_path / "images" / f"{i}.png", i, size)
    record = {"images": [{"id": i + 100, "file_name": f"{i}.png"} for i in range(n)],
              "annotations": [{"image_id": i // 2 + 100, "caption": f"caption {i}"}
                              for i in range(2 * n - 2)]}
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(record))
    return tmp_path / "images", path, record


def layout(kind, base, n=4):
    """
    A data set of n images below a folder, in one of the layouts -> settings for train.py. Image i is noise(i)
    as PNG and has captions `red i` and `blue i`, or none.
    """
    names = [f"class {i % 2}/{i}.png" for i in range(n)]
    captions = [[f"red {i}", f"blue {i}"] for i in range(n)]
    for i, name in enumerate(names):
        noise(base / "train" / name, i)
    where = base / "train"
    more = {}
    if kind in ("imagenet with lists", "imagenet with long lists"):
        prefix = "train/" if "long" in kind else ""
        (base / "train_list.txt").write_text("".join(f"{prefix}{name} {i % 2}\n"
                                                     for i, name in enumerate(names)))
        noise(where / "class 0" / "unlisted.png", 99)
    elif kind == "pairs":
        for name, texts in zip(names, captions):
            (where / name).with_suffix(".txt").write_text("\n".join([*texts, "", " "]))
        noise(where / "uncaptioned.png", 99)
    elif kind == "karpathy":
        splits = ["train", "restval"]
        record = {"images": [{"filepath": os.path.dirname(name), "filename": os.path.basename(name),
                              "split": splits[i % 2],
                              "sentences": [{"raw": text} for text in captions[i]]}
                             for i, name in enumerate(names)]}
        record["images"] += [{**record["images"][0], "split": "val"},
                             {**record["images"][0], "split": "test"}]
        (base / "split.json").write_text(json.dumps(record))
        more = {"train_captions": base / "split.json", "val_captions": base / "split.json"}
    elif kind == "tsv":
        where = base / "train.tsv"
        where.write_text("".join(f"{text}\ttrain/{name}\n" for name, texts in zip(names, captions)
                                 for text in texts))
    elif kind == "tar":
        for shard in range(2):
            pack(base / f"{shard:03d}.tar", [member for i in range(shard, n, 2) for member in (
                (f"{i}.png", (base / "train" / names[i]).read_bytes()), (f"{i}.json", b"{}"),
                (f"{i}.txt", "\n".join(captions[i]).encode()))])
        where = base / "{000..001}.tar"
    return {"data": kind.split()[0].replace("karpathy", "coco"), "train_dir": where, "val_dir": where, **more}


LAYOUTS = ["imagenet with lists", "imagenet with long lists", "imagenet without", "folder", "pairs",
           "karpathy", "tsv", "tar"]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout(kind, tmp_path):
    settings = {name: str(value) for name, value in layout(kind, tmp_path).items()}
    dataset = data.open_data(DataConfig(**settings), "train")
    expected = {noise(tmp_path / "expected.png", i).read_bytes(): i for i in range(4)}
    found = []
    for i in range(len(dataset)):
        dataset.image(i).save(tmp_path / "again.png")
        found.append(expected.pop((tmp_path / "again.png").read_bytes()))
        assert dataset.captions(i) == ([f"red {found[-1]}", f"blue {found[-1]}"] if dataset.captioned else [])
    assert sorted(found) == [0, 1, 2, 3]
    assert dataset.captioned == (settings["data"] not in data.UNCAPTIONED)
    assert dataset.fingerprint() == data.open_data(DataConfig(**settings), "train").fingerprint()
    assert len(pickle.loads(pickle.dumps(dataset))) == 4
    if kind == "karpathy":
        val = data.open_data(DataConfig(**settings), "val")
        assert len(val) == 1 and val.fingerprint() != dataset.fingerprint()
    with pytest.raises(ValueError, match=f"--data {settings['data']} needs --train_dir"):
        data.open_data(DataConfig(data=settings["data"]), "train")
    with pytest.raises(ValueError, match="there is no .*absent"):
        data.open_data(DataConfig(**{**settings, "train_dir": "absent"}), "train")


def test_captions_keep_their_image_where_stems_are_equal(tmp_path):
    for i, folder in enumerate(("a", "b", "a/c")):
        noise(tmp_path / folder / "same.png", i)
        (tmp_path / folder / "same.txt").write_text(f"in {folder}")
    dataset = data.Pairs(str(tmp_path))
    assert {dataset.record(i)[0]: dataset.captions(i) for i in range(3)} == {
        f"{folder}/same.png": [f"in {folder}"] for folder in ("a", "b", "a/c")}


def test_coco_layout(tmp_path):
    folder, path, _ = coco(tmp_path)
    dataset = data.read_coco(str(folder), str(path), "train")
    assert len(dataset) == 3  # the last image has no caption
    assert dataset.captions(1) == ["caption 2", "caption 3"]
    assert dataset.image(1).size == (64, 64)
    (tmp_path / "empty").mkdir()
    cases = [("absent", path, "there is no absent/0.png, nor another image of .*captions.json"),
             (folder, tmp_path / "absent.json", "there is no file .*absent.json"),
             (tmp_path / "empty", path, "there is no .*empty/0.png, nor")]
    for name, text in (("broken", "{"), ("list", "[]"), ("keys", '{"images": [1]}'),
                       ("number", '{"annotations": 3}')):
        (tmp_path / f"{name}.json").write_text(text)
        cases.append((folder, tmp_path / f"{name}.json", "neither a COCO captions JSON"))
    (tmp_path / "latin.json").write_bytes(path.read_bytes().replace(b"caption", b"\xe9"))
    cases.append((folder, tmp_path / "latin.json", "latin.json is not UTF-8"))
    (tmp_path / "none.json").write_text('{"images": [], "annotations": []}')
    cases.append((folder, tmp_path / "none.json", "no captioned image"))
    for images, captions, message in cases:
        with pytest.raises(ValueError, match=message):
            data.read_coco(str(images), str(captions), "train")


def test_bad_lists_are_refused_with_a_sentence(tmp_path):
    noise(tmp_path / "a.png", 0)
    cases = {"caption a.png\n": "line 1: 'caption a.png' is not", "\ta.png\n": "line 1",
             "x\ta.png\ny\t\n": "line 2",
             "": "holds no captioned image|holds no image", "x\tb.png\n": "there is no .*b.png",
             "\xe9\ta.png": "not UTF-8"}
    for text, message in cases.items():
        (tmp_path / "list.tsv").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=message):
            data.read_tsv(str(tmp_path / "list.tsv"))
    (tmp_path / "odd.tsv").write_text("﻿a  b\ta.png\textra\n\n\U0001f600\ta.png\n", encoding="utf-8")
    assert data.read_tsv(str(tmp_path / "odd.tsv")).captions(0) == ["a  b", "\U0001f600"]
    (tmp_path / "train_list.txt").write_text("n01/absent.JPEG 3\n")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="there is no .*n01/absent.JPEG"):
        data.read_imagenet(str(tmp_path / "train"))
    for read in (data.read_folder, data.Pairs, data.read_imagenet):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="holds no image"):
            read(str(tmp_path / "empty"))


def test_a_loop_of_links_ends_and_a_locked_folder_is_refused(tmp_path, monkeypatch):
    noise(tmp_path / "a" / "b" / "0.png", 0)
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a" / "self")
    noise(tmp_path / "elsewhere" / "1.png", 1)
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    assert data.list_files(str(tmp_path / "a")) == ["b/0.png", "linked/1.png", "self"]
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)
    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(OSError, match="folder .*/a/b cannot be read .Permission denied"):
        data.list_files(str(tmp_path / "a"))


def test_tar_patterns(tmp_path):
    for name in ("00", "01", "02", "10", "a,b"):
        pack(tmp_path / f"{name}.tar", [])

    def names(pattern):
        return [os.path.basename(path)[:-4] for path in data.expand_shards(pattern)]
    base = str(tmp_path)
    (tmp_path / "list.txt").write_text("10.tar\n\n00.tar\n")
    assert names(f"{base}/{{00..02}}.tar") == ["00", "01", "02"]
    assert names(f"{base}/{{00,02}}.tar,{base}/1?.tar") == ["00", "02", "10"]
    assert names(f"{base}/{{0,1}}{{0..0}}.tar") == ["00", "10"]
    assert names(f"@{base}/list.txt,{base}/01.tar") == ["10", "00", "01"]
    assert names(base) == ["00", "01", "02", "10", "a,b"]
    assert data.expand_braces("x{8..11}") == ["x8", "x9", "x10", "x11"]
    for pattern in (f"{base}/{{00..03}}.tar", f"{base}/b*.tar", f"@{base}/absent.txt", ","):
        with pytest.raises(ValueError, match="there is no"):
            data.expand_shards(pattern)


def test_tar_shards_are_grouped_by_key_and_read_in_place(tmp_path):
    picture = noise(tmp_path / "0.png", 0).read_bytes()
    long = "very_long_folder_name/" * 9
    pack(tmp_path / "0.tar", [("x/1.png", picture), ("y/1.txt", b"y"), ("x/1.txt", b"one\ntwo\n"),
                              ("y/1.png", picture),
                              ("x/2.seg.png", b""), ("x/2.txt", b"no image"), (f"{long}3.JPG", picture),
                              (f"{long}3.TXT", "dreißig".encode()), ("4.png", picture)])
    dataset = data.Tar([str(tmp_path / "0.tar")])
    # 4 has no caption
    assert [dataset.captions(i) for i in range(len(dataset))] == [["one", "two"], ["y"], ["dreißig"]]
    assert all(np.array_equal(dataset.image(i), Image.open(tmp_path / "0.png")) for i in range(3))
    pack(tmp_path / "1.tar", [("5.png", b"broken"), ("5.txt", b"\xff"), ("6.png", picture),
                              ("6.txt", b" \n")])
    both = data.Tar([str(tmp_path / "0.tar"), str(tmp_path / "1.tar")])
    assert len(both) == 5 and both.shard_starts.tolist() == [0, 3]
    for i, read, message in ((3, both.image, "1.tar: 5.png is not an image"),
                             (3, both.captions, "1.tar: 5.txt is not UTF-8"),
                             (4, both.captions, "1.tar: 6.txt is empty")):
        with pytest.raises(data.Unreadable, match=message):
            read(i)
    # the old index is not used for a new shard
    pack(tmp_path / "1.tar", [("7.png", picture), ("7.txt", b"seven")])
    assert data.Tar([str(tmp_path / "0.tar"), str(tmp_path / "1.tar")]).captions(3) == ["seven"]
    pack(tmp_path / "2.tar", [("8.png", picture)])
    uncaptioned = data.Tar([str(tmp_path / "2.tar")])
    assert not uncaptioned.captioned and uncaptioned.captions(0) == []


def test_broken_tar_shards(tmp_path, monkeypatch):
    picture = noise(tmp_path / "0.png", 0).read_bytes()
    for name in ("whole", "cut", "header", "zero", "garbage"):
        pack(tmp_path / f"{name}.tar", [m for i in range(6)
                                        for m in ((f"{i}.txt", b"text"), (f"{i}.png", picture))])
    # of a sample: two headers, a block of text, the image
    size = 4 * 512 + 512 * -(-len(picture) // 512) - 512
    content = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[:2 * size + 1700])  # inside the third image
    (tmp_path / "header.tar").write_bytes(content[:3 * size])
    (tmp_path / "garbage.tar").write_bytes(content[:4 * size] + b"\xaa" * 512 + content[4 * size + 512:])
    (tmp_path / "zero.tar").write_bytes(b"")
    with gzip.open(tmp_path / "gzip.tar", "wb") as f:
        f.write(content)
    names = ["whole", "cut", "header", "zero", "garbage", "gzip"]
    log = tmp_path / "log"
    for _ in range(2):  # the second time from the indices
        dataset = data.Tar([str(tmp_path / f"{name}.tar") for name in names], log=str(log))
        assert len(dataset) == 6 + 2 + 3 + 4
        assert all(dataset.image(i).size == (64, 64) and dataset.captions(i) == ["text"]
                   for i in range(len(dataset)))
    assert data.count_read_errors(log) == 5
    for name, message in zip(names[1:], ["is cut"] * 2 + ["not a tar shard", "is cut", "not a tar shard"]):
        assert [line for line in log.read_text().splitlines() if f"{name}.tar" in line
                and message in line], name
    with pytest.raises(ValueError, match="none of the 2 tar shards, .*zero.tar for one, holds an image"):
        data.Tar([str(tmp_path / f"{name}.tar") for name in ("zero", "gzip")])
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError):
        data.Tar([str(tmp_path / "whole.tar")], str(tmp_path / "file"))
    before = sorted(os.listdir(tmp_path))
    apart = str(tmp_path / "apart")
    with monkeypatch.context() as locked:
        locked.setattr(tarfile, "open", denied)
        with pytest.raises(ValueError, match="holds an image"):
            data.Tar([str(tmp_path / "whole.tar")], apart, str(log))
    assert "whole.tar cannot be read (Permission denied)" in log.read_text()
    assert len(data.Tar([str(tmp_path / "whole.tar")], apart)) == 6  # it was not taken for empty for good
    assert len(os.listdir(tmp_path / "apart")) == 1
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "apart"])


def test_tar_shards_are_read_by_several_threads_at_once(tmp_path):
    # were they to share one open file, each would seek where another is about to read
    pack(tmp_path / "0.tar", [member for i in range(50) for member in (
        (f"{i}.png", noise(tmp_path / "x.png", i, 8).read_bytes()), (f"{i}.txt", b"%d\n" % i * 200))])
    dataset = data.Tar([str(tmp_path / "0.tar")])
    expected = [(dataset.captions(i), dataset.image(i).tobytes()) for i in range(50)]

    def read(_=None):
        return [(dataset.captions(i), dataset.image(i).tobytes()) for _ in range(4) for i in range(50)]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(read, range(4)))
    assert found == [expected * 4] * 4


def test_fake_images():
    dataset = data.open_data(DataConfig(data="fake", n_scenes=3, fake_size=(30, 20)), "train")
    val = data.open_data(DataConfig(data="fake", fake_size=(30, 20)), "val")
    assert len(dataset) == 3 and dataset.image(1).size == (30, 20)
    assert len(dataset.captions(1)[0].split()) == 8
    assert np.array_equal(dataset.image(1), dataset.image(1))
    assert not np.array_equal(dataset.image(1), val.image(1))
    for size in ((30,), (0, 20)):
        with pytest.raises(ValueError, match="fake_size"):
            data.open_data(DataConfig(data="fake", fake_size=size), "train")


class Numbers:
    """A view whose items are their own numbers, and what the generator says; of some the files are bad."""

    def __init__(self, n, shard_starts=None, bad=()):
        self.n, self.shard_starts, self.bad = n, shard_starts, set(bad)

    def __len__(self):
        return self.n

    def item(self, i, rng):
        if i in self.bad:
            raise data.Unreadable(f"number {i} is bad")
        return torch.tensor(i), torch.tensor(rng.random())


def drawn(view, steps, batch_size, **options):
    """The numbers of some batches, and what the generators said."""
    loader = data.batches(view, batch_size, **options)
    found = [next(loader) for _ in range(steps)]
    return ([i for numbers, _ in found for i in numbers.tolist()],
            [x for _, said in found for x in said.tolist()])


SHARD_STARTS = np.array([0, 4, 5, 11, 17])


@pytest.mark.parametrize("shard_starts", [None, SHARD_STARTS], ids=["single files", "shards"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_epoch_holds_every_sample_once_and_resumes_anywhere(shard_starts, world):
    n, batch, steps = 23, 2, 12
    view, options = Numbers(n, shard_starts), {"seed": 5, "world": world, "shuffle_buffer": 3}
    ranks = [drawn(view, steps, batch, rank=rank, **options) for rank in range(world)]
    # side by side again, a global batch after the other
    order = [numbers[i * batch + j] for i in range(steps) for numbers, _ in ranks for j in range(batch)]
    for epoch in range(len(order) // n):
        assert sorted(order[epoch * n:(epoch + 1) * n]) == list(range(n))
    for start in range(steps):
        rank = start % world
        again = drawn(view, steps - start, batch, rank=rank, start=start * batch * world, **options)
        assert again == tuple(column[start * batch:] for column in ranks[rank])
    assert drawn(view, steps, batch, **{**options, "seed": 6})[0] != ranks[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("shard_starts", [None, SHARD_STARTS], ids=["single files", "shards"])
@pytest.mark.parametrize("world", [1, 3])
def test_loader_processes_change_no_batch(shard_starts, world):
    options = {"seed": 5, "rank": world - 1, "world": world, "shuffle_buffer": 3}
    view, start = Numbers(23, shard_starts), 7 * 2 * world
    expected = drawn(view, 12, 2, **options)
    for workers in (1, 2):
        assert drawn(view, 12, 2, workers=workers, **options) == expected
        late = drawn(view, 5, 2, workers=workers, start=start, **options)
        assert late == tuple(column[14:] for column in expected)


def test_order_covers_every_sample_once_and_resumes():
    n, batch = 23, 4

    def sampler(batch_size, **options):
        return iter(data.ResumableBatchSampler(n, batch_size, seed=5, **options))
    for world in (1, 2, 3):
        steps = 12
        positions, indices = [], []
        streams = [sampler(batch, rank=rank, world=world) for rank in range(world)]
        for _ in range(steps):
            for stream in streams:
                for index, position in next(stream):
                    indices.append(index)
                    positions.append(position)
        assert positions == list(range(steps * batch * world))
        for epoch in range(len(positions) // n):
            assert sorted(indices[epoch * n:(epoch + 1) * n]) == list(range(n))
        for other in (1, 2, 3):  # what one number of ranks began, another goes on with
            begun = 7 * batch * world
            late = [sampler(batch, start=begun, rank=rank, world=other) for rank in range(other)]
            after = [position for _ in range(5) for stream in late for _, position in next(stream)]
            assert after == list(range(begun, begun + 5 * batch * other))
            assert next(sampler(1, start=begun)) == [(indices[begun], begun)]
        # the ranks' batches side by side are the batch of one rank with a batch as large as all of them
        whole = next(sampler(batch * world, start=3))
        assert whole == [key for rank in range(world)
                         for key in next(sampler(batch, start=3, rank=rank, world=world))]


def test_shards_are_read_front_to_back_each_by_one_rank():
    starts, n, world, buffer = np.arange(0, 1200, 100), 1200, 3, 20
    order = [[] for _ in range(world)]
    for rank in range(world):
        stream = iter(data.ResumableBatchSampler(n, 8, seed=1, rank=rank, world=world, shard_starts=starts,
                                                 shuffle_buffer=buffer))
        order[rank] = [i for _ in range(n // world // 8) for i, _ in next(stream)]
    # split where ranks meet
    assert sum(len({i // 100 for i in mine}) for mine in order) <= 12 + 2 * (world - 1)
    for mine in order:
        for shard in {i // 100 for i in mine}:
            positions, numbers = zip(*((at, i) for at, i in enumerate(mine) if i // 100 == shard))
            assert positions[-1] - positions[0] < len(positions) + 2 * buffer
            assert len(numbers) < 50 or list(numbers) != sorted(numbers)
            # a sample has moved by what the buffer holds, and as many others at most have moved past it
            assert np.abs(np.argsort(numbers) - np.arange(len(numbers))).max() <= buffer
    sampler = data.ResumableBatchSampler(n, 8, shard_starts=starts, shuffle_buffer=buffer)
    assert len({sampler.permutation(epoch)[0] // 100 for epoch in range(5)}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])  # spawn is what Windows and macOS have
def test_batches_are_the_same_with_and_without_workers(method, tmp_path, monkeypatch):
    pack(tmp_path / "0.tar", [(f"{i}.png", noise(tmp_path / "x.png", i).read_bytes()) for i in range(10)])
    loader = torch.utils.data.DataLoader
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *arguments, **options: loader(
        *arguments, **options, multiprocessing_context=method if options["num_workers"] else None))
    view = data.Pixels(data.Tar([str(tmp_path / "0.tar")]), 32, 0.5)
    view.item(0, None)  # so that this process has the shard open when others begin
    streams = [data.batches(view, 3, seed=1, start=7, workers=workers) for workers in (0, 2)]
    for _ in range(6):
        a, b = map(next, streams)
        assert torch.equal(a[0], b[0])


def test_batches_leave_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    next(data.batches(Numbers(8), 2))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("processes", [(0,), pytest.param((0, 1, 2), marks=pytest.mark.slow)])
def test_bad_samples_are_replaced_logged_and_counted(tmp_path, processes):
    bad, found = (2, 3, 11), []
    whole = drawn(Numbers(23), 12, 4)
    for workers in processes:
        log = tmp_path / f"{workers}.log"
        found.append(drawn(Numbers(23, bad=bad), 12, 4, workers=workers, log=str(log)))
        assert set(log.read_text().splitlines()) == {f"number {i} is bad" for i in bad}
        assert data.count_read_errors(log) == 3
    assert all(other == found[0] for other in found)
    for i, j in zip(whole[0], found[0][0]):
        assert j not in bad and (i == j or i in bad)
    late = drawn(Numbers(23, bad=bad), 5, 4, start=28)
    assert late == tuple(column[28:] for column in found[0])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_mostly_bad_data_stops_the_run(tmp_path, workers):
    log = str(tmp_path / "log")
    with pytest.raises(OSError, match=f"samples could not be read: {log} names them$") as error:
        drawn(Numbers(5000, bad=range(3000)), 1000, 8, workers=workers, log=log)
    bad, tried = (int(word) for word in str(error.value).split() if word.isdigit())
    assert 500 < bad < 600 and bad < tried < 1100
    with pytest.raises(OSError, match="could not be read"):
        drawn(Numbers(10, bad=range(10)), 1, 2, workers=workers, log=log)
    drawn(Numbers(5000, bad=range(2000)), 1000, 8, workers=workers, log=log)


def test_validation_items_can_be_read(tmp_path):
    folder, path, _ = coco(tmp_path, n=9)
    (folder / "3.png").write_bytes(b"")
    (folder / "5.png").unlink()
    dataset = data.read_coco(str(folder), str(path), "val")
    some = data.validation_subset(dataset, 4, str(tmp_path / "log"))
    again = data.validation_subset(dataset, 4)
    assert len(some) == 4 and len(data.validation_subset(dataset, 100)) == 6
    assert data.count_read_errors(tmp_path / "log") <= 2
    assert [some.captions(i) for i in range(4)] == [again.captions(i) for i in range(4)]
    for i in range(5):
        (folder / f"{i}.png").write_bytes(b"")
    with pytest.raises(OSError, match="could not be read"):
        data.validation_subset(dataset, 4)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_a_line_that_is_overwritten_or_one_every_five_seconds(monkeypatch, terminal):
    clock, out = [0.0], io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(data, "time", argparse.Namespace(monotonic=lambda: clock[0]))

    def work(n, seconds):
        chunks = []
        for chunk in data.progress(range(n), 4, "encoding"):
            chunks += chunk
            clock[0] += seconds
        assert chunks == list(range(n))  # in order, none left out
        printed = out.getvalue()
        out.truncate(out.seek(0))
        return re.findall(r"encoding: (.*?) *([\r\n])", printed)

    lines = work(1001, 0.4)  # 250 chunks of four in 100 s, and one of one
    assert lines[-1] == ("1,001 of 1,001 (100%), 10.0/s, 0:00:00 left", "\n")
    assert {end for _, end in lines[:-1]} == {"\r" if terminal else "\n"}
    assert len(lines) == (126 if terminal else 20)
    assert lines[0][0] == ("8 of 1,001 (1%), 10.0/s, 0:01:39 left" if terminal
                           else "52 of 1,001 (5%), 10.0/s, 0:01:35 left")
    assert work(20, 0.05) == []  # what is done at once needs no line
    assert work(0, 1.0) == []
    monkeypatch.setenv("RANK", "1")
    assert work(1001, 0.4) == []


@pytest.mark.parametrize("terminal", [True, False])
def test_training_shows_how_far_it_is_on_a_terminal_alone(tmp_path, terminal):
    objective = argparse.Namespace(parts=(), heldout=None)
    log = train.Log(str(tmp_path / "biart"), objective, train.Progress(step=3),
                    argparse.Namespace(max_iters=10), argparse.Namespace(rank=0))
    shown = []
    log.progress_line.terminal, log.progress_line.show = terminal, shown.append
    for step in range(4, 11):
        log.show(step)
    assert shown == ([4, 5, 6, 7, 8, 9] if terminal else []) and log.progress_line.start == 3


def brightness(images):
    """A stand-in for an encoder: (B, 3, 64, 64) -> codes (B, 4)."""
    return images.unflatten(2, (4, 16)).mean((1, 3, 4)).add(1).mul(500).int()


def encodable(tmp_path, n=40, **options):
    """A data set in pairs, with image 3 and caption file 7 broken, and a tokenizer, as a TokenCacheSource."""
    if not (tmp_path / "pairs").exists():
        for i in range(n):
            noise(tmp_path / "pairs" / f"{i:02d}.png", i, 70)
            (tmp_path / "pairs" / f"{i:02d}.txt").write_text("\n".join(f"caption {i} {j}"
                                                                       for j in range(i % 3 + 1)))
        (tmp_path / "pairs" / "03.png").write_bytes(b"no image")
        (tmp_path / "pairs" / "07.txt").write_bytes(b"\xff")
    dataset, tok = data.Pairs(str(tmp_path / "pairs")), Tokenizer.train(["caption 1 2 3"] * 4, 270)
    return data.TokenCacheSource(dataset, tok, 12, 64, log=str(tmp_path / "log"), **options), dataset, tok


def cache_files(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


def codes_of(tokens):
    """-> (samples, crops, n_image)"""
    return np.concatenate([part["codes"] for part in tokens.parts])


def test_token_cache_equals_encoding_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 7)
    monkeypatch.setattr(data, "PART", 14)
    source, dataset, tok = encodable(tmp_path)
    tokens = data.Tokens(data.build_token_cache(source, brightness, str(tmp_path / "out"), {}), null_prob=0.5)
    kept = [i for i in range(40) if i not in (3, 7)]
    assert len(tokens) == 38 and all(isinstance(part, np.memmap) for part in tokens.parts)
    assert all(part["codes"].dtype == part["texts"].dtype == np.uint16 for part in tokens.parts)
    assert data.count_read_errors(tmp_path / "log") == 2
    for row, i in enumerate(kept):
        expected = brightness(data.crop_to_tensor(dataset.image(i), 64)[None])[0]
        texts = {tuple(tok.encode_padded(text, 12)[0]) for text in dataset.captions(i)}
        items = [tokens.item(row, random.Random(k)) for k in range(60)]
        assert all(torch.equal(codes, expected.long()) for _, codes, _ in items)
        assert {tuple(text.tolist()) for text, _, _ in items} == texts
        assert 10 < sum(null.item() for *_, null in items) < 50
    assert sorted(os.listdir(tmp_path / "out")) == ["00000.npy", "00001.npy", "00002.npy", "key.json"]
    assert len(pickle.dumps(tokens)) < 1000
    again = pickle.loads(pickle.dumps(tokens))
    items = [several.item(9, random.Random(1)) for several in (tokens, again)]
    assert all(torch.equal(x, y) for x, y in zip(*items))

    several, dataset, _ = encodable(tmp_path, crops=3, scale=0.5)
    tokens = data.Tokens(data.build_token_cache(several, brightness, str(tmp_path / "crops"), {}))
    codes = codes_of(tokens)
    assert codes.shape == (38, 3, 4) and len(tokens) == 38
    assert (codes[:, 0] != codes[:, 1]).any()
    assert len({tuple(tokens.item(0, random.Random(k))[1].tolist()) for k in range(60)}) == 3
    crop = data.crop_to_tensor(dataset.image(5), 64, 0.5, random.Random("5 2"))
    assert torch.equal(torch.from_numpy(codes[kept.index(5), 2].astype(np.int32)), brightness(crop[None])[0])


@pytest.mark.slow
def test_loader_processes_change_no_token(tmp_path):
    folders = [data.build_token_cache(encodable(tmp_path, crops=2, scale=0.5, workers=workers)[0], brightness,
                                      str(tmp_path / f"{workers} workers"), {}) for workers in (0, 2)]
    assert cache_files(folders[0]) == cache_files(folders[1])
    a, b = (data.batches(data.Tokens(folders[0]), 8, seed=1, workers=workers) for workers in (0, 1))
    assert all(torch.equal(x, y) for x, y in zip(next(a), next(b)))


def build_on_ranks(tmp_path, world, encode, folder):
    """build_token_cache() on as many ranks, which are threads here -> how many images each has encoded."""
    barrier, sums, encoded = threading.Barrier(world, timeout=60), {}, [0] * world

    def work(rank):
        def all_reduce(tensor):
            sums[rank] = tensor.clone()
            barrier.wait()
            total = sum(sums.values())
            barrier.wait()
            return total

        def count_and_encode(images):
            encoded[rank] += len(images)
            return encode(images)
        data.build_token_cache(encodable(tmp_path)[0], count_and_encode, folder, {}, False, rank, world,
                               all_reduce)
    with concurrent.futures.ThreadPoolExecutor(world) as threads:
        list(threads.map(work, range(world)))
    return encoded


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_a_token_cache(tmp_path, monkeypatch, world):
    monkeypatch.setattr(data, "CHUNK", 5)
    monkeypatch.setattr(data, "PART", 10)
    alone = data.build_token_cache(encodable(tmp_path)[0], brightness, str(tmp_path / "alone"), {})
    encoded = build_on_ranks(tmp_path, world, brightness, str(tmp_path / "out"))
    assert sum(encoded) == 38 and all(encoded)
    assert cache_files(tmp_path / "out") == cache_files(alone)
    assert alone == str(tmp_path / "alone")


def test_a_token_cache_goes_on_after_a_kill_at_any_moment(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 4)
    monkeypatch.setattr(data, "PART", 8)
    source = encodable(tmp_path)[0]
    whole = cache_files(data.build_token_cache(source, brightness, str(tmp_path / "whole"), {}))
    fsync, replace, remove, moments = os.fsync, os.replace, os.remove, [0]

    def mortal(call):
        def call_or_die(*arguments):
            moments[0] -= 1
            if moments[0] == 0:
                raise KeyboardInterrupt
            return call(*arguments)
        return call_or_die
    for k in itertools.count(1):  # dies at the k-th write, renaming or removal
        folder, moments[0] = str(tmp_path / f"killed {k}"), k
        for name, call in (("fsync", fsync), ("replace", replace), ("remove", remove)):
            monkeypatch.setattr(os, name, mortal(call))
        died = False
        try:
            data.build_token_cache(source, brightness, folder, {})
        except KeyboardInterrupt:
            died = True
        for name, call in (("fsync", fsync), ("replace", replace), ("remove", remove)):
            monkeypatch.setattr(os, name, call)
        done = [np.load(path) for path in pathlib.Path(folder).glob("*.npy")]
        encoded = build_on_ranks(tmp_path, k % 3 + 1, brightness, folder)
        assert sum(encoded) == 38 - sum(map(len, done)) and cache_files(folder) == whole
        if not died:
            break
    assert k == 3 * 6 + 1 and sum(encoded) == 0  # of a key and five parts


def test_a_token_cache_goes_on_after_an_error_and_refuses_what_does_not_match(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 4)
    monkeypatch.setattr(data, "PART", 4)
    source, dataset, tok = encodable(tmp_path)
    data.build_token_cache(source, brightness, str(tmp_path / "whole"), {"augvae": "a"})
    calls, out = [], str(tmp_path / "out")

    def killed(images):
        calls.append(len(images))
        if len(calls) == 7:
            raise KeyboardInterrupt
        return brightness(images)
    with pytest.raises(KeyboardInterrupt):
        data.build_token_cache(source, killed, out, {"augvae": "a"})
    assert len(data.Tokens(out)) == 6 * 4 - 2  # without image 3 and text 7
    data.build_token_cache(source, killed, out, {"augvae": "a"})
    assert sum(calls[7:]) == 38 - (6 * 4 - 2)
    assert cache_files(out) == cache_files(tmp_path / "whole")
    before = len(calls)
    data.build_token_cache(source, killed, out, {"augvae": "a"})
    assert len(calls) == before

    def of(dataset, tok, **options):
        return data.TokenCacheSource(dataset, tok, 12, 64, **options)
    others = {"augvae": (source, {"augvae": "b"}),
              "tokenizer": (of(dataset, Tokenizer.train(["text"], 258)), {"augvae": "a"}),
              "data": (of(data.Subset(dataset, range(30)), tok), {"augvae": "a"}),
              "transforms": (of(dataset, tok, crops=2, scale=0.5), {"augvae": "a"})}
    for name, (other, key) in others.items():
        with pytest.raises(ValueError,
                           match=f"{out} holds tokens of another {name}: remove it, or name another folder"):
            data.build_token_cache(other, killed, out, key)
    assert len(calls) == before
    data.build_token_cache(others["data"][0], killed, out, {"augvae": "b"}, own=True)
    assert len(data.Tokens(out)) == 28
    (tmp_path / "out" / "key.json").write_text("{")
    with pytest.raises(ValueError, match="key.json does not describe a token cache"):
        data.build_token_cache(source, killed, out, {"augvae": "a"})


def test_a_token_cache_refuses_what_it_cannot_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 4)
    monkeypatch.setattr(data, "PART", 4)
    source, dataset, tok = encodable(tmp_path)
    with pytest.raises(ValueError, match="codes below 65536, not 70000"):
        data.build_token_cache(source, lambda x: torch.full((len(x), 4), 70000), str(tmp_path / "out"), {})

    class Huge(Tokenizer):
        def __len__(self):
            return 65537
    with pytest.raises(ValueError, match="65,537 tokens"):
        data.TokenCacheSource(dataset, Huge(tok.kind, tok.merges), 12, 64)

    def full(*_arguments):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="00000.npy could not be written .*No space left on device"):
            data.build_token_cache(source, brightness, str(tmp_path / "out"), {})
    images = {path: path.read_bytes() for path in (tmp_path / "pairs").glob("[012]*.png")}
    for path in images:
        path.write_bytes(b"")
    with pytest.raises(OSError, match="samples could not be read"):
        data.build_token_cache(encodable(tmp_path)[0], brightness, str(tmp_path / "bad"), {})
    for path, content in images.items():  # the disk is there again: nothing is left out for good
        path.write_bytes(content)
    assert len(data.Tokens(data.build_token_cache(source, brightness, str(tmp_path / "bad"), {}))) == 38


def test_contact_sheet_has_room_for_everything():
    sheet = data.contact_sheet([Image.new("RGB", (64, 64), "red")] * 5, ["a long caption " * 8] * 5,
                               columns=3, side=96)
    assert sheet.width == 3 * 102 + 6 and sheet.height > 2 * 102
    assert (np.asarray(sheet)[50, 50] == (255, 0, 0)).all()


# -----------------------------------------------------------------------------
# augvae.py

TINY = AugVAEConfig(image_size=32, levels=(8, 4, 2), hidden=8, ch_mult=(1, 2, 4), ch_mult_inner=(2, 4),
                    n_res_blocks=1, n_groups=4, z_channels=16, codebook_size=24, codebook_dim=6)


def images(n=2, side=32, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_default_is_the_released_model():
    with torch.device("meta"):
        vae = AugVAE(AugVAEConfig())
    assert sum(g * g for g in vae.config.grids) == 5440
    # codebook and its averages included
    assert round(sum(t.numel() for t in vae.state_dict().values()) / 1e6) == 225


@pytest.mark.parametrize("field, value, message", [
    ("levels", (8, 4, 3), "levels"), ("hidden", 6, "n_groups"), ("single_level", 5, "no grid of side 5")])
def test_augvae_config_names_what_does_not_fit(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **{field: value})


def norm_and_conv(dtype=torch.float32):
    torch.manual_seed(0)
    norm, conv = nn.GroupNorm(2, 8, eps=1e-6), nn.Conv2d(8, 6, 3, padding=1)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.to(dtype), conv.to(dtype).to(memory_format=torch.channels_last)


def channels_last(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_silu_conv_equals_its_plain_version(dtype, dropout):
    amp = dtype is torch.bfloat16
    norm, conv = norm_and_conv(torch.float32 if amp else dtype)

    def plain(x):
        return conv(F.silu(norm(x)) * (F.dropout(torch.ones_like(x), dropout) if dropout else 1))

    assert_same_values_and_gradients(
        lambda x: augvae.norm_silu_conv(x, norm, conv, dropout), plain,
        [channels_last(3, 8, 6, 5, dtype=dtype)],
        {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype],
        [*norm.parameters(), *conv.parameters()], amp)


def test_blocks_equal_their_plain_version():
    torch.manual_seed(0)
    block = augvae.ResBlock(8, 16, dataclasses.replace(TINY, ae_dropout=0.3))

    def plain(x):
        h = block.layer1.conv(F.silu(block.layer1.norm(x)))
        h = F.silu(block.layer2.norm(h))
        return block.shortcut(x) + block.layer2.conv(h * F.dropout(torch.ones_like(h), 0.3, block.training))

    for block_or_eval in (block.train(), block.eval()):
        assert_same_values_and_gradients(block_or_eval, plain, [channels_last(2, 8, 4, 4)], 1e-5,
                                         list(block.parameters()))
    last = augvae.NormSiLUConv(8, 6, TINY)
    assert_same_values_and_gradients(last, lambda x: last.conv(F.silu(last.norm(x))),
                                     [channels_last(2, 8, 4, 4)], 1e-5, list(last.parameters()))


def test_norm_silu_conv_keeps_its_input_alone():
    (norm, conv), kept = norm_and_conv(), []
    x = channels_last(2, 8, 16, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        augvae.norm_silu_conv(x, norm, conv)
    assert [t.data_ptr() for t in kept if t.numel() >= x.numel()] == [x.data_ptr()]


@pytest.mark.parametrize("amp", [False, True])
def test_on_cuda_group_norm_gets_nchw_and_convolutions_channels_last(amp, monkeypatch):
    """Before torch 2.14 CUDA's group norm refuses other layouts; its backward pass reads them as NCHW."""
    norm, conv = norm_and_conv()
    x = channels_last(3, 8, 6, 5, dtype=torch.bfloat16 if amp else torch.float32)

    def plain(x):
        return conv(F.silu(norm(x)) * F.dropout(torch.ones_like(x), 0.5))

    def fused(x):
        return augvae.norm_silu_conv(x, norm, conv, 0.5)

    def watch(module, name, first, last, layout, dtype):
        original = getattr(module, name)

        def watched(*args, **options):
            for t in args[first:last]:
                assert t.is_contiguous(memory_format=layout) and t.dtype == dtype, name
            seen.append(name)
            return original(*args, **options)
        monkeypatch.setattr(module, name, watched)

    seen = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    watch(torch, "native_group_norm", 0, 1, torch.contiguous_format, torch.float32)
    watch(torch.ops.aten, "native_group_norm_backward", 0, 2, torch.contiguous_format, torch.float32)
    watch(F, "conv2d", 0, 1, torch.channels_last, x.dtype)
    watch(torch.ops.aten, "convolution_backward", 1, 2, torch.channels_last, x.dtype)
    assert_same_values_and_gradients(fused, plain, [x], 3e-2 if amp else 1e-5,
                                     [*norm.parameters(), *conv.parameters()], amp)
    assert seen[:5] == ["native_group_norm", "conv2d", "native_group_norm", "convolution_backward",
                        "native_group_norm_backward"]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        y = fused(x)
    for t in (y, torch.autograd.grad(y.sum(), x)[0]):  # as the layers before and behind want it
        assert t.is_contiguous(memory_format=torch.channels_last) and t.dtype == x.dtype


def test_upsample_is_nearest_then_convolution():
    torch.manual_seed(0)
    up, x = Upsample(5).double(), torch.randn(2, 5, 6, 7, dtype=torch.double, requires_grad=True)
    assert_same_values_and_gradients(
        up, lambda x: F.conv2d(F.interpolate(x, scale_factor=2), up.weight, up.bias, padding=1), [x], 1e-12,
        list(up.parameters()))


def test_nearest_code_is_brute_force():
    torch.manual_seed(0)
    book, z = Codebook(TINY), torch.randn(100, 6)
    brute = torch.cdist(z.double(), book.weight.double()).argmin(1)
    for chunk in (1, 24 * 7, 2 ** 24):
        assert torch.equal(book.nearest(z, chunk), brute)


def test_entropy_constrained_quantisation_is_brute_force():
    torch.manual_seed(0)
    book, z = Codebook(dataclasses.replace(TINY, rate=0.3)), torch.randn(500, 6)
    book.cluster_size.copy_(torch.arange(24.0) ** 3)
    p = book.cluster_size / book.cluster_size.sum()
    mean = sum(p[k] * book.weight[k] for k in range(24))
    var = sum(p[k] * (book.weight[k] - mean).square().sum() for k in range(24))
    brute = (torch.cdist(z, book.weight).square() - 0.3 * var * (p + 1e-9).log()).argmin(1)
    assert (book.nearest(z) == brute).float().mean() > 0.99  # all but numerical ties
    plain = Codebook(TINY)
    plain.load_state_dict(book.state_dict())
    assert codebook_use(torch.bincount(brute, minlength=24))[1] < codebook_use(
        torch.bincount(plain.nearest(z), minlength=24))[1]


@pytest.mark.parametrize("setting, tf32", [("allow_tf32", True), ("fp32_precision", "tf32")])
def test_codes_are_searched_in_full_fp32_where_tf32_is_allowed(setting, tf32, monkeypatch):
    matmul, addmm, seen = torch.backends.cuda.matmul, torch.addmm, []
    if setting == "fp32_precision" and not hasattr(torch.backends, setting):
        pytest.skip(f"torch {torch.__version__} has no {setting}")
    monkeypatch.setattr(torch, "addmm", lambda *args, **options: seen.append(matmul.allow_tf32) or
                        addmm(*args, **options))
    book, before = Codebook(TINY), getattr(matmul, setting)
    try:
        setattr(matmul, setting, tf32)
        book.nearest(torch.randn(9, 6))
        with pytest.raises(RuntimeError):
            book.nearest(torch.randn(9, 5))
        after = getattr(matmul, setting)
    finally:
        setattr(matmul, setting, before)
    assert seen == [False, False] and after == tf32


def test_quantising_is_straight_through_and_leaves_the_codebook_alone():
    torch.manual_seed(0)
    book = Codebook(TINY).train()
    before = {k: v.clone() for k, v in book.state_dict().items()}
    z = torch.randn(2, 6, 4, 4, requires_grad=True)
    z_q, codes, loss = book(z)
    assert torch.allclose(z_q, book.lookup(codes), atol=1e-6)
    grad = torch.randn_like(z)
    assert torch.equal(torch.autograd.grad(z_q, z, grad, retain_graph=True)[0], grad)
    expected = 2 * (z - book.lookup(codes)) / z.numel()
    assert torch.allclose(torch.autograd.grad(loss, z)[0], expected, atol=1e-7)
    assert all(torch.equal(before[k], v) for k, v in book.state_dict().items())


def test_training_quantises_from_vq_start_on():
    torch.manual_seed(0)
    book, z = Codebook(dataclasses.replace(TINY, vq_start=2)).train(), torch.randn(2, 6, 4, 4)
    for n in range(4):
        z_q, codes, loss = book(z)
        assert torch.equal(z_q, z) and loss == 0 if n < 2 else loss > 0
        assert torch.allclose(z_q, book.lookup(codes), atol=1e-6) == (n >= 2)
        assert torch.allclose(book.eval()(z)[0], book.lookup(codes), atol=1e-6)
        book.train().collect(z, codes)
        book.update()
    fresh = AugVAE(dataclasses.replace(TINY, vq_start=1)).train()
    x = torch.randn(2, 3, TINY.image_size, TINY.image_size)
    whole, commitment, _ = fresh(x)
    assert commitment == 0 and torch.allclose(whole, fresh.reconstruct(fresh.features(x)), atol=1e-5)


def test_joint_ema_update_against_a_loop():
    torch.manual_seed(0)
    book = Codebook(dataclasses.replace(TINY, dead_below=0.0, ema_decay=0.9, ema_eps=1e-9))
    book.cluster_size.fill_(2.0)
    book.embed_sum.copy_(2 * book.weight)
    book.updates.fill_(10_000)  # past the warm-up of the decay
    sizes, sums = book.cluster_size.clone(), book.embed_sum.clone()
    levels = [torch.randn(2, 6, s, s) for s in (4, 2)]
    codes = [book(z)[1] for z in levels]
    for z, code in zip(levels, codes):
        book.collect(z, code)
    use, perplexity = book.update()
    sizes, sums = 0.9 * sizes, 0.9 * sums
    for z, code in zip(levels, codes):
        for vector, k in zip(z.permute(0, 2, 3, 1).reshape(-1, 6), code.flatten()):
            sizes[k] += 0.1
            sums[k] += 0.1 * vector
    assert torch.allclose(book.weight, sums / sizes[:, None], atol=1e-5)
    everything = torch.cat([c.flatten() for c in codes])
    p = torch.bincount(everything, minlength=24) / len(everything)
    assert use == pytest.approx((p > 0).float().mean().item())
    assert perplexity == pytest.approx(math.exp(-sum(q * math.log(q) for q in p.tolist() if q)), rel=1e-5)
    assert codebook_use(torch.ones(24)) == (1.0, pytest.approx(24))


def test_a_skipped_step_discards_what_was_collected():
    torch.manual_seed(0)
    book, z = Codebook(TINY), torch.randn(2, 6, 4, 4)
    other = copy.deepcopy(book)
    book.collect(z + 1, book(z + 1)[1])
    book.discard()
    for b in (book, other):
        b.collect(z, b(z)[1])
        b.update()
        assert b.pending is None
    assert all(torch.equal(book.state_dict()[name], value) for name, value in other.state_dict().items())


def test_ranks_move_the_codebook_as_one_rank_with_all_vectors_does(monkeypatch):
    """Three ranks, each with a third of the batch and one all_reduce; what is expected comes from loops."""
    torch.manual_seed(0)
    book = Codebook(dataclasses.replace(TINY, codebook_size=96, dead_below=0.5))  # three revivals an update
    z = torch.randn(3, 16, 6)  # rank, vector, dim
    keys = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)).log()
    counts, sums, drawn = torch.zeros(96), torch.zeros(96, 6), []
    for rank in range(3):
        for i, k in enumerate(book.nearest(z[rank]).tolist()):
            counts[k] += 1
            sums[k] += z[rank, i]
            drawn.append((keys[rank, i] / (z[rank, i] - book.weight[k]).square().sum(), rank, i))
    sizes, sums = 0.9 * counts, 0.9 * sums  # the first update's decay is 1/10
    threshold = 0.5 * 48 / 96
    dead = [k for k in range(96) if sizes[k] < threshold][:3]
    for k, (_, rank, i) in zip(dead, sorted(drawn, reverse=True)):
        sizes[k], sums[k] = 2 * threshold, 2 * threshold * z[rank, i]
    ranks, messages = [copy.deepcopy(book) for _ in range(3)], []
    monkeypatch.setattr(augvae.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(augvae.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(augvae.dist, "all_reduce", lambda t: messages.append(t.clone()))
    for message in (0, 1):  # all ranks once to see what they send, and again to receive the sum of it
        for rank, own in enumerate(ranks):
            monkeypatch.setattr(augvae.dist, "get_rank", lambda rank=rank: rank)
            part = z[rank].view(1, 4, 4, 6).permute(0, 3, 1, 2)
            own.collect(part, own(part)[1])
            if message:
                own.update()
            else:
                own.reduce(own.pending)
                own.discard()
        total = sum(messages)
        assert len(messages) == 3
        monkeypatch.setattr(augvae.dist, "all_reduce", lambda t, total=total: t.copy_(total))
    for own in ranks:
        assert torch.allclose(own.cluster_size, sizes) and torch.allclose(own.embed_sum, sums, atol=1e-6)
        alive = sizes > 0
        assert torch.allclose(own.weight[alive], sums[alive] / sizes[alive, None], rtol=1e-3)
        assert torch.equal(own.weight[~alive], book.weight[~alive])
        assert all(torch.equal(getattr(own, name), value) for name, value in ranks[0].state_dict().items())


def test_dead_codes_are_revived_with_their_state():
    torch.manual_seed(0)
    book = Codebook(TINY)
    z = torch.randn(4, 6, 8, 8) + 50  # far from all codes: one code takes everything
    assert len(book(z)[1].unique()) == 1
    for _ in range(60):  # one newborn a step
        book.collect(z, book(z)[1])
        book.update()
    assert len(book(z)[1].unique()) > 20
    assert (book.cluster_size > 0).all() and book.weight.isfinite().all()
    assert torch.allclose(book.embed_sum / book.cluster_size[:, None], book.weight, rtol=1e-3)
    assert (book.weight - 50).abs().max() < 5  # every code comes from the batch


def test_encode_and_decode_shapes_and_values():
    torch.manual_seed(0)
    vae = AugVAE(TINY)
    codes = vae.encode(images())
    assert [tuple(c.shape) for c in codes] == [(2, 8, 8), (2, 4, 4), (2, 2, 2)]
    assert all(c.dtype == torch.int64 and 0 <= c.min() and c.max() < 24 for c in codes)
    decoded = vae.decode(codes)
    assert decoded.shape == (2, 3, 32, 32) and decoded.abs().max() <= 1
    reconstruction, commitment, same = vae.train()(images())
    assert torch.allclose(reconstruction.clamp(-1, 1), decoded, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(codes, same)) and commitment > 0
    with pytest.raises(ValueError, match=r"grids \(8, 4\)"):
        vae.decode(codes[:2])
    with pytest.raises(ValueError, match="outside"):
        vae.decode([codes[0], codes[1], codes[2] + 24])


def test_every_level_counts_and_decoders_run_coarse_to_fine():
    torch.manual_seed(0)
    vae = AugVAE(TINY)
    codes = vae.encode(images())
    for i in range(3):
        changed = [c.clone() for c in codes]
        changed[i] = (changed[i] + 1) % 24
        assert not torch.allclose(vae.decode(changed), vae.decode(codes))
    q = [vae.post_quant(vae.codebook.lookup(c), i) for i, c in enumerate(codes)]
    h = vae.decoders[0](q[2])
    h = vae.decoders[1](torch.cat([q[1], h], 1))
    h = vae.decoders[2](torch.cat([q[0], h], 1))
    assert torch.allclose(h.clamp(-1, 1), vae.decode(codes), atol=1e-6)


def test_encoders_are_chained_on_continuous_features():
    torch.manual_seed(0)
    vae, h = AugVAE(TINY), images()
    for encoder, grid, z, i in zip(vae.encoders, TINY.grids, vae.features(h), range(3)):
        h = encoder(h)
        assert h.shape == (2, 16, grid, grid)
        assert torch.allclose(F.conv2d(h, vae.pre_quant.weight, vae.pre_quant.bias[i]), z, atol=1e-6)


def test_single_level_surgery():
    torch.manual_seed(0)
    ml = AugVAE(TINY)
    for side in TINY.levels:
        sl = ml.single_level(side)
        level = TINY.levels.index(side)
        codes = ml.encode(images())
        assert [c.shape[-1] for c in sl.encode(images())] == [side]
        assert torch.equal(sl.encode(images())[0], codes[level])
        # what ML computes with every missing half at zero
        h = ml.post_quant(ml.codebook.lookup(codes[level]), level)
        h = ml.decoders[2 - level](h if level == 2 else torch.cat([h, torch.zeros_like(h)], 1))
        for decoder in list(ml.decoders)[3 - level:]:
            h = decoder(torch.cat([torch.zeros_like(h), h], 1))
        assert torch.allclose(sl.decode([codes[level]]), h.clamp(-1, 1), atol=1e-5)
        loss, commitment, _ = sl(images())
        (loss.square().mean() + commitment).backward()
        assert all(p.grad is not None for p in sl.parameters())
        with pytest.raises(ValueError, match="already"):
            sl.single_level(side)
    with pytest.raises(ValueError, match="no grid of side 5"):
        ml.single_level(5)


def test_shuffled_cells_against_a_loop():
    x, order = torch.randn(2, 3, 12, 12), torch.randperm(18)
    moved = augvae.shuffle_cells(x, order, 3)

    def cell(images, i):
        image, row, column = i // 9, i % 9 // 3, i % 3
        return images[image, :, 4 * row:4 * row + 4, 4 * column:4 * column + 4]

    for i in range(18):
        assert torch.equal(cell(moved, i), cell(x, int(order[i])))


def test_locality_is_none_where_features_look_at_their_own_cell_alone():
    torch.manual_seed(0)
    vae = AugVAE(dataclasses.replace(TINY, locality=0.1)).single_level(TINY.levels[0])
    size, side = TINY.image_size // TINY.levels[0], TINY.levels[0]
    x = torch.randn(2, 3, TINY.image_size, TINY.image_size)
    own = nn.Conv2d(3, TINY.codebook_dim, size, stride=size)  # a cell's features, of its pixels alone
    far = nn.Conv2d(3, TINY.codebook_dim, 3 * size, stride=size, padding=size)
    for conv, low, high in ((own, 0, 1e-6), (far, 0.5, 10)):
        vae.features = lambda images, conv=conv: [conv(images)]
        assert low <= vae.locality_loss(x, vae.features(x)[0]) <= high
    del vae.features
    with_it, without = (vae.train(mode)(x)[1] for mode in (True, False))
    assert with_it > without and vae.config.single_level == side
    vae.config.locality = 0.0
    assert torch.allclose(vae.train()(x)[1], without)


def test_attention_sits_where_the_release_has_it():
    plain, attentive = AugVAE(TINY), AugVAE(dataclasses.replace(TINY, attention=True))
    added = ({n.rsplit(".", 2)[0] for n in attentive.state_dict()}
             - {n.rsplit(".", 2)[0] for n in plain.state_dict()})
    expected = set()
    for i, top in enumerate((2, 1, 1)):
        expected |= {f"encoders.{i}.down_{top}_attn_0", f"encoders.{i}.mid_attn_1"}
    for i, top in enumerate((1, 1, 2)):
        expected |= {f"decoders.{i}.up_{top}_attn_{j}" for j in (0, 1)} | {f"decoders.{i}.mid_attn_1"}
    assert added == expected
    block, x = attentive.encoders[0].mid_attn_1, torch.randn(2, 32, 4, 4)
    torch.nn.init.normal_(block.proj_out.weight)
    q, k, v = (conv(block.norm(x)).flatten(2) for conv in (block.q, block.k, block.v))
    weights = (torch.einsum("bci,bcj->bij", q, k) / 32 ** 0.5).softmax(2)
    plain = x + block.proj_out(torch.einsum("bij,bcj->bci", weights, v).view(2, 32, 4, 4))
    assert torch.allclose(block(x), plain, atol=1e-5)


def released_shapes(c, single_level=0):
    """Names and shapes of a released checkpoint's tensors, in its order; `c` holds the release's options."""
    shapes, z, h = {}, c["z_channels"], c["hidden_dim"]

    def norm(name, channels):
        shapes.update({f"{name}.weight": (channels,), f"{name}.bias": (channels,)})

    def conv(name, i, o, k=3):
        shapes.update({f"{name}.weight": (o, i, k, k), f"{name}.bias": (o,)})

    def block(name, i, o):
        norm(f"{name}.norm1", i)
        conv(f"{name}.conv1", i, o)
        norm(f"{name}.norm2", o)
        conv(f"{name}.conv2", o, o)
        if i != o:
            conv(f"{name}.nin_shortcut", i, o, 1)

    def attention(name, channels):
        if c["use_attn"]:
            norm(f"{name}.norm", channels)
            for part in ("q", "k", "v", "proj_out"):
                conv(f"{name}.{part}", channels, channels, 1)

    def middle(name, channels):
        block(f"{name}.mid.block_1", channels, channels)
        attention(f"{name}.mid.attn_1", channels)
        block(f"{name}.mid.block_2", channels, channels)

    def resolution(name, n, i, o, attends):
        for j in range(n):
            block(f"{name}.block.{j}", o if j else i, o)
        for j in range(n if attends else 0):
            attention(f"{name}.attn.{j}", o)

    def encoder(name, i, mults):
        conv(f"{name}.conv_in", i, h)
        for j, (a, b) in enumerate(zip([1, *mults], mults)):
            resolution(f"{name}.down.{j}", c["num_res_blocks"], h * a, h * b, j == len(mults) - 1)
            if j < len(mults) - 1:
                conv(f"{name}.down.{j}.downsample.conv", h * b, h * b)
        middle(name, h * mults[-1])
        norm(f"{name}.norm_out", h * mults[-1])
        conv(f"{name}.conv_out", h * mults[-1], z)

    def decoder(name, i, o, mults):
        conv(f"{name}.conv_in", i, h * mults[-1])
        middle(name, h * mults[-1])
        for j, (a, b) in enumerate(zip([*mults[1:], mults[-1]], mults)):
            resolution(f"{name}.up.{j}", c["num_res_blocks"] + 1, h * a, h * b, j == len(mults) - 1)
            if j:
                conv(f"{name}.up.{j}.upsample.conv", h * b, h * b)
        norm(f"{name}.norm_out", h * mults[0])
        conv(f"{name}.conv_out", h * mults[0], o)

    levels, dim = len(c["attn_resolutions"]), c["codebook_dim"]
    depth = c["attn_resolutions"].index(single_level) + 1 if single_level else levels
    for i in range(depth):
        encoder(f"encoders.{i}", z if i else 3, [2, 4] if i else c["ch_mult"])
    for i in range(levels):
        conv(f"pre_quants.{i}", z, dim, 1)
    for i in range(levels):
        conv(f"post_quants.{i}", dim, z, 1)
    for i in range(depth):
        last = i == depth - 1
        decoder(f"decoders.{i}", z if i == 0 and not single_level else 2 * z, 3 if last else z,
                c["ch_mult"] if last else [2, 4])
    for i in range(levels):
        shapes.update({f"quantizers.{i}.embedding.weight": (c["num_tokens"], dim),
                       f"quantizers.{i}.embedding.cluster_size": (c["num_tokens"],),
                       f"quantizers.{i}.embedding.embed_avg": (c["num_tokens"], dim)})
    for i in range(depth if single_level else 0):
        conv(f"connectors.{i}", z, 2 * z, 1)
    return shapes


def released_state(c, single_level=0):
    """Weights by rule: numpy's RandomState(i) for tensor i, scaled by what it is; tied ones are one."""
    state = {}
    for i, (name, shape) in enumerate(released_shapes(c, single_level).items()):
        r = np.random.RandomState(i).standard_normal(shape)
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
    return state


def released_file(path, c, single_level=0, **changes):
    """A checkpoint as Lightning writes them; returns its path."""
    settings = {**c, "loss_type": "lpips_l2"}
    torch.save({"epoch": 3, "global_step": 9, "pytorch-lightning_version": "1.5.0",
                "optimizer_states": [{"state": {}}],
                "state_dict": {**released_state(c, single_level),
                               "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1)},
                "hyper_parameters": {"args": argparse.Namespace(**settings), "batch_size": 8},
                **changes}, path)
    return str(path)


RELEASED = {"resolution": 32, "ch_mult": [1, 2], "attn_resolutions": [16, 8, 4, 2], "num_res_blocks": 1,
            "hidden_dim": 32, "z_channels": 32, "codebook_dim": 32, "num_tokens": 64, "use_attn": False,
            "dropout": 0.1, "quant_beta": 0.25, "quant_ema_decay": 0.9, "quant_ema_eps": 1e-5}
ATTENTIVE = {**RELEASED, "ch_mult": [1, 1, 2], "attn_resolutions": [8, 4, 2], "num_res_blocks": 2,
             "z_channels": 48, "codebook_dim": 16, "num_tokens": 100, "use_attn": True}
# What the released code computes: SHA-256 of the tokens as int32, every 997th value of the reconstruction,
# commitment (of the levels that are decoded), mean squared error, and gradient norms of the sum of the two.
RELEASED_NUMBERS = [
    (RELEASED, 0, "c89f5c1fa90efd50",
     [0.347915, 0.267447, -0.027976, 0.778806, 0.356596, -0.013522, -0.563661],
     0.2992631494998932, 0.6631148457527161,
     {"encoders.0.conv_in": 0.6919979453086853, "encoders.1.conv_in": 1.5089997053146362,
      "pre_quant": 0.3228518068790436, "post_quant": 0.2745877206325531,
      "decoders.0.conv_in": 0.6367138624191284, "decoders.3.conv_out": 0.8173741102218628}),
    (RELEASED, 8, "afd44e983ed316fc",
     [-0.033409, -0.098346, -0.470951, 0.315475, -0.289876, -0.185737, -0.027495],
     0.08632057905197144, 0.6394087672233582,
     {"encoders.0.conv_in": 0.5598099827766418, "encoders.1.conv_in": 1.2299842834472656,
      "pre_quant": 0.402413010597229, "post_quant": 0.22673025727272034,
      "decoders.0.conv_in": 0.9452989101409912, "decoders.1.conv_out": 1.310286283493042}),
    (ATTENTIVE, 0, "1c14f3e6ba63a1d3",
     [-0.101659, -0.06568, -0.649225, -0.474758, 0.323068, -0.26233, -0.240731],
     0.1784765124320984, 0.6458797454833984,
     {"encoders.0.conv_in": 1.6031019687652588, "encoders.1.conv_in": 3.7141685485839844,
      "pre_quant": 0.753489077091217, "post_quant": 0.35158100724220276,
      "decoders.0.conv_in": 1.6585478782653809, "decoders.2.conv_out": 1.0541353225708008}),
    (ATTENTIVE, 4, "c2f9e7937507908d",
     [0.242536, -0.589855, 0.123157, 0.359199, -0.423972, -0.285846, 0.395595],
     0.06335052847862244, 0.8614316582679749,
     {"encoders.0.conv_in": 1.770343542098999, "encoders.1.conv_in": 4.651626110076904,
      "pre_quant": 0.961495041847229, "post_quant": 0.5413671731948853,
      "decoders.0.conv_in": 3.581798791885376, "decoders.1.conv_out": 2.43916392326355}),
]


has_namespaces = pytest.mark.skipif(not hasattr(torch.serialization, "safe_globals"),
                                    reason="torch reads no Namespace with weights_only before 2.5")


@has_namespaces
@pytest.mark.parametrize("c, single_level, tokens, pixels, commitment, mse, norms", RELEASED_NUMBERS)
def test_released_weights_give_released_numbers(c, single_level, tokens, pixels, commitment, mse, norms,
                                                tmp_path):
    vae = train.load_augvae(released_file(tmp_path / "released.ckpt", c, single_level))
    config = vae.config
    assert config.grids == ((single_level,) if single_level else tuple(c["attn_resolutions"]))
    assert (config.ae_dropout, config.ema_decay, config.attention) == (0.1, 0.9, c["use_attn"])
    x = torch.from_numpy(np.random.RandomState(1000).uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32))
    reconstruction, loss, codes = vae(x)
    flat = torch.cat([code.flatten(1) for code in codes], 1).numpy().astype(np.int32)
    assert hashlib.sha256(flat.tobytes()).hexdigest()[:16] == tokens
    assert reconstruction.flatten()[::997].tolist() == pytest.approx(pixels, abs=1e-4)
    assert loss.item() == pytest.approx(commitment, rel=1e-5)
    error = F.mse_loss(reconstruction, x)
    assert error.item() == pytest.approx(mse, rel=1e-5)
    (error + loss).backward()
    parameters = dict(vae.named_parameters())
    for name, norm in norms.items():
        name = name.replace("conv_out", "conv_out.conv")
        assert parameters[f"{name}.weight"].grad.norm().item() == pytest.approx(norm, rel=1e-3), name
    # one-way and lossless: saved and read again as one of ours
    stage = "augvae_sl" if single_level else "augvae_ml"
    content = {"stage": stage, "progress": {}, "config": dataclasses.asdict(config),
               "model": vae.state_dict()}
    train.save_checkpoint(tmp_path / "ours.pt", content)
    again = train.load_augvae(tmp_path / "ours.pt")
    assert train.fingerprint(again) == train.fingerprint(vae) and again.config == config
    assert torch.equal(again(x)[0], reconstruction) and torch.equal(again(x)[1], loss)


@has_namespaces
@pytest.mark.parametrize("single_level", [0, 8])
def test_released_weights_give_golden_values(single_level, tmp_path):
    path = os.path.join(HERE, "..", "shared", "golden", "augvae_sl.npz" if single_level else "augvae_ml.npz")
    if not os.path.exists(path):
        pytest.skip(f"no golden values at {path}")
    vae = train.load_augvae(released_file(tmp_path / "released.ckpt", RELEASED, single_level))
    golden = np.load(path)
    x = torch.from_numpy(np.random.RandomState(1000).uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32))
    with torch.no_grad():
        reconstruction, _, codes = vae(x)
    assert (torch.cat([code.flatten(1) for code in codes], 1).numpy() == golden["tokens"]).all()
    assert np.abs(reconstruction.numpy() - golden["reconstruction"]).max() < 1e-4


@has_namespaces
def test_released_codebook_trains_on(tmp_path):
    vae = train.load_augvae(released_file(tmp_path / "released.ckpt", RELEASED))
    codes = vae.train()(images(), collect=True)[2]
    vae.codebook.update()
    counts = torch.bincount(torch.cat([c.flatten() for c in codes]), minlength=64)
    # at the file's decay from the first step on
    assert torch.allclose(vae.codebook.cluster_size, 0.9 + 0.1 * counts)
    untrained = train.load_augvae(tmp_path / "released.ckpt")
    assert not torch.equal(vae.codebook.weight, untrained.codebook.weight)


@has_namespaces
def test_what_is_no_released_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, args = released_state(RELEASED), argparse.Namespace(**RELEASED)
    path = released_file("released.ckpt", RELEASED)
    with open(path, "rb") as f:
        whole = f.read()
    with open("truncated.ckpt", "wb") as f:
        f.write(whole[:len(whole) // 2])
    torch.save([1, 2], "list.ckpt")
    cases = [("absent.ckpt", "no file absent.ckpt"), ("truncated.ckpt", "not a whole checkpoint"),
             ("list.ckpt", "holds a list")]
    for i, (message, changes) in enumerate([
            (r"asks to run (os|posix|nt)\.system", {"callbacks": Payload()}),
            (r"asks to run (os|posix|nt)\.system", {"hyper_parameters": {"args": Payload()}}),
            ("asks to run .*AugVAEConfig", {"callbacks": TINY}),
            ("'hyper_parameters'|'args'", {"hyper_parameters": {}}),
            ("resolution", {"hyper_parameters": {"args": argparse.Namespace()}}),
            ("pre_quants.0.bias", {"state_dict": {}}),
            ("Missing key.*conv_out.norm.bias",
             {"state_dict": {k: v for k, v in state.items() if k != "encoders.0.norm_out.bias"}}),
            ("Unexpected key.*decoders.0.extra",
             {"state_dict": {**state, "decoders.0.extra": torch.ones(2)}}),
            ("post_quants.1.weight is not equal",
             {"state_dict": {**state, "post_quants.1.weight": torch.ones(32, 32, 1, 1)}}),
            (r"encoders.0.conv_in.weight: .*\[32, 1, 3, 3\]",
             {"state_dict": {**state, "encoders.0.conv_in.weight": torch.ones(32, 1, 3, 3)}}),
            ("levels",
             {"hyper_parameters": {"args": argparse.Namespace(**{**RELEASED, "resolution": 36})}})]):
        cases.append((released_file(f"{i}.ckpt", RELEASED, **changes), message))
    for path, message in cases:
        with pytest.raises(ValueError, match=message) as info:
            train.load_augvae(path)
        assert path in str(info.value) and "\n" not in str(info.value)
    assert not os.path.exists("pwned")
    # the Namespace itself may be what the hyper-parameters are
    train.load_augvae(released_file("bare.ckpt", RELEASED, hyper_parameters=args))


def lpips_files(folder):
    """The two files of weights that LPIPS reads, filled by rule; returns their paths."""
    convolutions = [(0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256),
                    (14, 256, 256), (17, 256, 512), (19, 512, 512), (21, 512, 512), (24, 512, 512),
                    (26, 512, 512), (28, 512, 512)]
    vgg = {}
    for n, i, o in convolutions:
        r = np.random.RandomState(n)
        weight = r.standard_normal((o, i, 3, 3)) * (2 / (9 * i)) ** 0.5
        vgg[f"features.{n}.weight"] = torch.from_numpy(weight).float()
        vgg[f"features.{n}.bias"] = torch.from_numpy(r.standard_normal(o) * 0.1).float()
    vgg["classifier.0.bias"] = torch.zeros(3)
    heads = [np.random.RandomState(100 + i).rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))]
    lpips = {f"lin{i}.model.1.weight": torch.from_numpy(head).float() for i, head in enumerate(heads)}
    torch.save(vgg, folder / "vgg.pth")
    torch.save(lpips, folder / "lpips.pth")
    return str(folder / "vgg.pth"), str(folder / "lpips.pth")


def test_lpips_equals_the_lpips_package(tmp_path):
    lpips = LPIPS(*lpips_files(tmp_path)).train()  # nothing in it wakes up
    x = torch.from_numpy(np.random.RandomState(7).uniform(-1, 1, (4, 3, 32, 32))).float()
    a, b = x[:2], x[2:].clone().requires_grad_()
    distance = lpips(a, b)
    # the numbers are those of the package lpips 0.1.4, net="vgg", with the same weights
    assert distance.tolist() == pytest.approx([0.661448061466217, 0.6806221008300781], rel=1e-5)
    gradient = torch.autograd.grad(distance.sum(), b)[0]
    assert gradient.norm().item() == pytest.approx(0.029269661754369736, rel=1e-4)
    assert torch.allclose(lpips(b, a), distance) and not any(p.requires_grad for p in lpips.parameters())
    same = torch.zeros(1, 3, 16, 16, requires_grad=True)
    lpips(same, same.detach()).backward()
    assert same.grad.abs().max() == 0 == lpips(same, same)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lpips(a, b).tolist() == pytest.approx(distance.tolist(), rel=0.05)


def test_lpips_in_the_loss(tmp_path):
    vgg, weights = lpips_files(tmp_path)
    torch.manual_seed(0)
    vae, x = AugVAE(TINY), images()
    for loss, pixel in (("lpips_l2", F.mse_loss), ("lpips_l1", F.l1_loss)):
        config = train.TrainConfig(loss=loss, lpips_weight=0.3, vgg_weights=vgg, lpips_weights=weights)
        objective = train.AugVAEObjective(vae, config).eval()
        total, parts = objective(x)
        reconstruction, commitment, _ = vae(x)
        perceptual = objective.lpips(reconstruction, x).mean()
        expected = pixel(reconstruction, x) + 0.3 * perceptual + commitment
        assert total.item() == pytest.approx(expected.item(), rel=1e-5)
        assert parts["lpips"].item() == pytest.approx(perceptual.item(), rel=1e-5)
        assert set(parts) <= set(objective.parts)
    assert not any("lpips" in name or "features" in name for name in objective.model.state_dict())
    assert train.TrainConfig().lpips_weight == 0.1
    assert train.configure({"preset": "released"}, "augvae_ml", train.TrainConfig)[0].loss == "lpips_l2"


def test_weights_of_lpips_come_from_a_file_the_cache_or_a_checked_download(tmp_path, monkeypatch):
    vgg, weights = lpips_files(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    cache, asked = tmp_path / "hub" / "checkpoints", []

    def offline(url, *_, **__):
        asked.append(url)
        raise urllib.error.URLError("no network")

    with monkeypatch.context() as without_network:
        without_network.setattr(torch.hub, "download_url_to_file", offline)
        LPIPS(vgg, weights)
        train.AugVAEObjective(AugVAE(TINY), train.TrainConfig())
        assert not asked  # nothing is fetched unless it is needed
        for given, flag, url in ((("", weights), "--vgg_weights", "https://download.pytorch.org/"),
                                 ((vgg, ""), "--lpips_weights", "https://raw.githubusercontent.com/")):
            with pytest.raises(OSError, match=re.escape(url)) as info:
                LPIPS(*given)
            for part in (flag, str(cache), ".pth", "no network", "--loss l2"):
                assert part in str(info.value)
        for name, source in ((augvae.VGG_FILE[0], vgg), (augvae.LPIPS_FILE[0], weights)):
            cache.mkdir(parents=True, exist_ok=True)
            os.link(source, cache / name)
        LPIPS()  # both are in the cache now
    content = (tmp_path / "lpips.pth").read_bytes()
    url = (tmp_path / "lpips.pth").as_uri()
    with pytest.raises(OSError, match="hash"):
        augvae.find_weights("lpips_weights", "", "other.pth", "0" * 64, url)
    assert sorted(os.listdir(cache)) == sorted([augvae.VGG_FILE[0], augvae.LPIPS_FILE[0]])
    digest = hashlib.sha256(content).hexdigest()
    with open(augvae.find_weights("lpips_weights", "", "other.pth", digest, url), "rb") as f:
        assert f.read() == content
    for given, message in (((weights, weights), "not torchvision's VGG-16"),
                           ((vgg, vgg), "lin0.model.1.weight")):
        with pytest.raises(ValueError, match=message):
            LPIPS(*given)


# -----------------------------------------------------------------------------
# biart.py

GPT = BiARTConfig(n_layer=2, n_head=2, n_embd=16, n_text=6, text_vocab=20, end_token=18, pad_token=19,
                  image_vocab=12, image_side=3)


def captions_and_codes(n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 18, (n, 6), generator=g)
    for row, length in zip(text, (2, 5, 3, 4) * n):
        row[length], row[length + 1:] = 18, 19
    return text, torch.randint(0, 12, (n, 9), generator=g)


def biart(seed=0, **changes):
    torch.manual_seed(seed)
    model = BiART(dataclasses.replace(GPT, **changes)).eval()
    for p in model.parameters():  # larger than the initialisation, so that every path matters
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("kind", ["norm", "norm without bias", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_linear_layers_equal_their_plain_versions(kind, rows, dtype):
    torch.manual_seed(0)
    layer, ln = nn.Linear(12, 20, bias=kind != "norm without bias"), nn.LayerNorm(12)
    nn.init.normal_(ln.weight)
    nn.init.normal_(ln.bias)
    parameters = [*layer.parameters(), *(() if kind == "gelu" else ln.parameters())]
    x = torch.randn(rows, 1, 12, requires_grad=True)

    def fused(x):
        return (biart_module.gelu_linear(x, layer) if kind == "gelu" else
                biart_module.norm_linear(x, ln, layer))

    def plain(x):
        return layer(F.gelu(x) if kind == "gelu" else ln(x))

    seen = []
    for f in (fused, plain):
        # not shared: it caches weights
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            y = f(x)
        torch.manual_seed(1)
        loss = (y.float() * torch.randn(y.shape)).sum()
        seen.append([y, *torch.autograd.grad(loss, [x, *parameters])])
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            assert torch.equal(f(x), y)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for a, b in zip(*seen):
        assert a.dtype == b.dtype and (a - b).abs().max() <= tolerance * b.abs().max()


def test_how_single_rows_go_is_tried_once():
    biart_module.rows_go_in_parts.cache_clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = biart_module.rows_go_in_parts()
    assert found in (False, True) and found == biart_module.rows_go_in_parts()
    assert biart_module.rows_go_in_parts.cache_info().misses == 1


@pytest.mark.parametrize("rows", [1, 2, 5, 17, 70])  # one row goes another way
@pytest.mark.parametrize("out", [32, 20, 7])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("pays", [True, False])
@torch.no_grad()
def test_packed_weights_give_the_same_product(rows, out, biased, pays, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(biart_module, "packing_pays", lambda *_: pays)
    x, weight = torch.randn(rows, 12), nn.Parameter(torch.randn(out, 12))
    bias = torch.randn(out) if biased else None
    plain = F.linear(x[:, None], weight, bias)
    with biart_module.packed([weight], rows):
        built = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")  # not in torch for macOS
        assert (getattr(weight, "packed", None) is not None) == (built and pays)
        assert torch.allclose(biart_module.linear(x[:, None], weight, bias), plain, atol=1e-5)
        assert torch.allclose(biart_module.linear(x.t()[:12, :12].t(), weight, bias),  # another layout
                              F.linear(x[:12], weight, bias), atol=1e-5)
    weight.mul_(2)  # what was laid out does not outlive it
    assert torch.allclose(biart_module.linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out", [32, 20, 7])  # 16 parts, 4, 1
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("in_parts", [False, True])
def test_one_row_has_the_same_product_and_gradients(dtype, out, biased, in_parts, monkeypatch):
    torch.manual_seed(0)
    seen, tolerance = [], {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    tensors = [torch.randn(1, 1, 12), torch.randn(out, 12), torch.randn(out)]
    monkeypatch.setattr(biart_module, "rows_go_in_parts", lambda: in_parts)
    for product in (biart_module.linear, F.linear):
        x, weight, bias = (t.to(torch.float64 if dtype is torch.float64 else torch.float32, copy=True)
                           .requires_grad_() for t in tensors)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            y = product(x, weight, bias if biased else None)
        seen.append([y, *torch.autograd.grad(y.float().square().sum(), [x, weight])])
    for a, b in zip(*seen):
        assert a.dtype == b.dtype and (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 7), (2, 1, 8)])
def test_gelu_of_one_row_has_the_same_values_and_gradients(shape):
    x = torch.randn(shape, requires_grad=True)
    ours, plain = (f(x) for f in (biart_module.gelu, F.gelu))
    assert ours.shape == plain.shape and torch.allclose(ours, plain, atol=1e-6)
    grads = (torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, plain))
    assert torch.allclose(*grads, atol=1e-5)


@torch.no_grad()
def test_other_types_than_float32_are_not_packed(monkeypatch):
    monkeypatch.setattr(biart_module, "packing_pays", lambda *_: True)
    double, weight = torch.randn(4, 4).double(), torch.randn(4, 4)
    with biart_module.packed([double], 3), torch.autocast("cpu", dtype=torch.bfloat16):
        assert getattr(double, "packed", None) is None
        with biart_module.packed([weight], 3):
            assert biart_module.linear(torch.randn(3, 4), weight).dtype == torch.bfloat16
    with pytest.raises(KeyError), biart_module.packed([weight], 3):
        raise KeyError
    assert weight.packed is None


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"), reason="torch without oneDNN")
def test_whether_packing_pays_is_tried_once_for_a_power_of_two(monkeypatch):
    real, tried, weight = biart_module.packing_pays, [], torch.randn(24, 12)
    real.cache_clear()
    monkeypatch.setattr(biart_module, "packing_pays", lambda *key: tried.append(key) or real(*key))
    for rows in (3, 4, 256):
        with biart_module.packed([weight], rows):
            assert (getattr(weight, "packed", None) is not None) == real(*tried[-1])
    with biart_module.packed([weight], 257):
        assert weight.packed is not None
    assert tried == [(4, 24, 12)] * 2 + [(256, 24, 12)] and real.cache_info().misses == 2


@pytest.mark.parametrize("code_hidden", [0, 8])
def test_generation_and_scores_are_the_same_with_packed_weights(code_hidden, monkeypatch):
    model, (text, image) = biart(code_hidden=code_hidden), captions_and_codes()
    seen = []
    for packs in (True, False):
        monkeypatch.setattr(biart_module, "packing_pays", lambda *_, packs=packs: packs)  # 256 rows at most
        seen.append([*model.generate(text, "image", n=2, guidance=2.0), *model.generate(image, "text"),
                     *model.beam_search(image, 2), *model.log_likelihood(text, image, "image")])
        assert not any(getattr(p, "packed", None) is not None for p in model.parameters())
    for a, b in zip(*seen):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 70, 2 ** 22])
def test_chunked_cross_entropy_equals_its_plain_version(chunk, monkeypatch):
    monkeypatch.setattr(biart_module.LinearCrossEntropy, "chunk", chunk)
    torch.manual_seed(0)
    h, weight = torch.randn(9, 6, requires_grad=True), torch.randn(20, 6, requires_grad=True)
    targets, token_weights = torch.randint(0, 20, (9,)), torch.rand(9)
    total, nll = biart_module.LinearCrossEntropy.apply(h, weight, targets, token_weights, True)
    plain = F.cross_entropy(h @ weight.t(), targets, reduction="none")
    assert torch.allclose(nll, plain) and torch.allclose(total, (plain * token_weights).sum())
    for a, b in zip(torch.autograd.grad(3 * total, [h, weight]),
                    torch.autograd.grad(3 * (plain * token_weights).sum(), [h, weight])):
        assert torch.allclose(a, b, atol=1e-5)


def test_blocks_keep_no_norm_and_no_gelu():
    """All that a block keeps for backward: its input, q k v, attention's output, middle and hidden layer."""
    block, held = biart_module.Block(GPT), {}
    parameters = {p.data_ptr() for p in block.parameters()}
    x = torch.randn(2, 24, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: held.update({t.untyped_storage().data_ptr(): t}) or t, lambda t: t):
        block(x)
    sizes = [t.untyped_storage().nbytes() / x.untyped_storage().nbytes()
             for k, t in held.items() if k not in parameters]
    assert sum(size for size in sizes if size >= 1) == 10


def test_the_last_block_leaves_out_what_predicts_nothing():
    model, (text, image) = biart(), captions_and_codes()
    x = model.embed(text, image, "image")
    whole = model.transformer(x)
    expected = torch.cat([whole[:2, 5:].flatten(0, 1), whole[2:, 8:].flatten(0, 1)])
    assert torch.allclose(model.transformer(x, [5, 8]), expected, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.compiler, "is_compiling"), reason="came with torch 2.3")
def test_compiled_it_learns_the_same_and_keeps_no_function_of_its_own(monkeypatch):
    seen, batch = [], captions_and_codes()
    for compiled in (False, True):
        model = biart(code_hidden=8, dropout=0.0)
        if compiled:
            monkeypatch.setattr(biart_module.LinearAfter, "apply", None)
        loss, _ = (torch.compile(model, backend="eager") if compiled else model)(*batch)
        loss.backward()
        seen.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(seen[0]) == len(seen[1]) > 20
    for a, b in zip(*seen):
        assert torch.allclose(a, b, atol=1e-6)


def test_old_torch_does_not_compile(tmp_path, monkeypatch):
    monkeypatch.delattr(torch.compiler, "is_compiling", raising=False)
    with pytest.raises(ValueError, match="--compile needs torch 2.3 or newer, this is"):
        train.main([*MINIATURE, "--stage=augvae_ml", "--compile", "--out_dir", str(tmp_path)])


@pytest.mark.parametrize("positions", ["modality", "sequence"])
@pytest.mark.parametrize("to", ["image", "text"])
def test_no_token_sees_the_future(to, positions):
    model, (text, image) = biart(positions=positions), captions_and_codes()
    x = model.embed(text, image, to)
    h = model.transformer(x)
    assert h.shape == (4, 15, 16)
    for j in range(15):
        changed = x.clone()
        changed[:, j] = torch.randn(16)
        same = torch.isclose(model.transformer(changed), h, atol=1e-6).all(2).all(0)
        assert same[:j].all() and not same[j:].any()


def test_layouts_segments_and_positions():
    model, (text, image) = biart(), captions_and_codes()
    t2i, i2t = model.embed(text, image, "image"), model.embed(text, image, "text")
    segment = model.segment.weight
    # a token keeps its position on whichever side it stands; only the segment changes
    assert torch.allclose(t2i[:, :6] - segment[0], i2t[:, 9:] - segment[1], atol=1e-6)
    assert torch.allclose(t2i[:, 6:] - segment[1], i2t[:, :9] - segment[0], atol=1e-6)
    place = model.position_embedding("image", 1)
    expected = model.row_position.weight[1] + model.column_position.weight[2] + segment[1]
    assert torch.allclose(place[5], expected)
    absolute = biart(positions="sequence")
    position, segment = absolute.position.weight, absolute.segment.weight
    assert torch.allclose(absolute.position_embedding("image", 1)[0], position[6] + segment[1])
    assert torch.allclose(absolute.position_embedding("image", 0)[0], position[0] + segment[0])


def test_merged_forward_is_the_two_directions():
    model, (text, image) = biart(), captions_and_codes()
    loss, parts = model(text, image)
    by_hand = {}
    for to, pick in (("image", [0, 2]), ("text", [1, 3])):
        total = []
        for i in pick:
            h = model.transformer(model.embed(text[i:i + 1], image[i:i + 1], to))
            log_p = model.logits(h, to).log_softmax(-1)[0]
            if to == "image":
                total.append(-sum(log_p[5 + j, image[i, j]] for j in range(9)) / 9)
            else:
                length = (text[i] != 19).sum()
                total.append(-sum(log_p[8 + j, text[i, j]] for j in range(length)) / length)
        by_hand[to] = sum(total) / 2
    assert parts["t2i"].item() == pytest.approx(by_hand["image"].item(), rel=1e-5)
    assert parts["i2t"].item() == pytest.approx(by_hand["text"].item(), rel=1e-5)
    assert loss.item() == pytest.approx(sum(by_hand.values()).item() / 2, rel=1e-5)
    for to, pick in (("image", [0, 2]), ("text", [1, 3])):
        log_p, count = model.log_likelihood(text, image, to)
        assert (-log_p / count)[pick].mean().item() == pytest.approx(by_hand[to].item(), rel=1e-5)
    with pytest.raises(ValueError, match="odd"):
        model(text[:3], image[:3])


def test_reference_loss_is_an_option():
    model, (text, image) = biart(ref_loss=0.5), captions_and_codes()
    plain = biart()
    h = plain.transformer(plain.embed(text[::2], image[::2], "image"))
    log_p, scored = plain.logits(h, "text").log_softmax(-1), text[::2, 1:] != 19
    nll = -log_p[:, :5].gather(2, text[::2, 1:, None])[..., 0] * scored
    expected = plain(text, image)[1]["t2i"] + 0.5 * (nll.sum(1) / scored.sum(1)).mean()
    assert model(text, image)[1]["t2i"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_padding_is_not_scored():
    model, (text, image) = biart(), captions_and_codes()
    with torch.no_grad():
        # what the padding's own score does cannot matter: it is never a target
        model.token["text"].weight[19] += 5
    _, count = model.log_likelihood(text, image, "text")
    assert count.tolist() == [3, 6, 4, 5]


def test_null_blanks_the_reference_side():
    model, (text, image) = biart(), captions_and_codes()
    other = captions_and_codes(seed=1)
    yes, no = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    assert torch.equal(model.embed(text, image, "image", yes),
                       model.embed(other[0], image, "image", yes))
    assert torch.equal(model.embed(text, image, "text", yes)[:, 9:],
                       model.embed(text, image, "text", no)[:, 9:])
    assert torch.equal(model.embed(text, image, "text", no), model.embed(text, image, "text"))
    _, parts = model(text, image, yes)
    assert parts["t2i"] == model(other[0], image, yes)[1]["t2i"]


def test_directions_are_weighted():
    text, image = captions_and_codes()
    loss, parts = biart(t2i_weight=3.0)(text, image)
    assert torch.allclose(loss, (3 * parts["t2i"] + parts["i2t"]) / 4)
    assert torch.allclose(biart()(text, image)[0], (parts["t2i"] + parts["i2t"]) / 2)


def test_inputs_are_replaced_in_training_alone_and_on_the_gen_image_alone():
    model, (text, image) = biart(replace_prob=1.0), captions_and_codes()
    plain = {to: model.embed(text, image, to) for to in ("image", "text")}
    torch.manual_seed(0)
    shuffled = image.flatten()[torch.randperm(36)].view(4, 9)
    model.train()
    torch.manual_seed(0)
    expected = torch.cat([plain["image"][:, :6], model.embed_side(shuffled, "image", 1)], 1)
    assert torch.equal(model.embed(text, image, "image"), expected)
    assert torch.equal(model.embed(text, image, "text"), plain["text"])
    model.config.replace_prob = 0.25
    torch.manual_seed(0)
    image = torch.arange(4000 * 9).view(4000, 9)
    seen = []
    model.embed_side = lambda tokens, modality, *_: seen.append(tokens) or torch.zeros(4000, 1, 1)
    model.embed(text, image, "image")
    share = (seen[1] != image).float().mean().item()
    assert abs(share - 0.25) < 0.02


def test_code_embeddings_are_of_what_codes_look_like():
    model, vectors = biart(code_hidden=5, code_dim=3), torch.randn(12, 3) * 4 + 1
    vectors[7] = vectors[2]
    model.know_codes(vectors)
    codes, text = model.token["image"], captions_and_codes()[0]
    assert abs(codes.vectors.mean(0)).max() < 1e-5 and abs(codes.vectors.std() - 1) < 0.05
    expected = 0.2 * codes.own + codes.c_proj(F.gelu(codes.c_fc(codes.vectors)))
    assert torch.allclose(codes.weight, expected)
    assert torch.equal(codes(torch.tensor([[3, 7]])), codes.weight[[3, 7]][None])
    with torch.no_grad():
        codes.own.zero_()
        assert codes.train().weight[7].equal(codes.weight[2])  # what looks alike is alike
        kept = codes.eval().weight
        assert kept is codes.weight  # computed once
        codes.own.add_(1)
        assert torch.allclose(model.train().eval().token["image"].weight, kept + 0.2)  # and anew
    loss, _ = model(text, captions_and_codes()[1])
    loss.backward()
    assert all(p.grad is not None for p in codes.parameters())
    assert not biart().know_codes(vectors)


def guided(conditional, null, guidance):
    """Logits (V,) with guidance, one token after the other."""
    p = conditional.softmax(0).tolist()
    if guidance == 1:
        return conditional.clone()
    doubt = 1 - max(p)
    return torch.stack([c + (guidance - 1) * doubt * (c - n) if share >= 0.03 * max(p) else c - torch.inf
                        for c, n, share in zip(conditional, null, p)])


def uncached(model, ref, to, length, seed, given=(), temperature=1.0, top_k=0, top_p=1.0, guidance=1.0):
    """Generation the long way round: the whole sequence anew for every token, one sample at a time."""
    uniform = torch.rand(length, generator=torch.Generator().manual_seed(seed))
    tokens = list(given)
    while len(tokens) < length:
        scores = []
        for null in (False, True):
            x = model.embed_side(ref, {"text": "image", "image": "text"}[to], 0, torch.tensor([null]))
            if tokens:
                x = torch.cat([x, model.embed_side(torch.tensor([tokens]), to, 1)], 1)
            scores.append(model.logits(model.transformer(x)[0, -1], to))
        logits = guided(*scores, guidance)
        if to == "text":
            logits[19] = -torch.inf
        u = uniform[len(tokens)][None]
        tokens.append(sample_token(logits[None], u, temperature, top_k, top_p).item())
        if to == "text" and tokens[-1] == 18:
            tokens += [19] * (length - len(tokens))
    return tokens


@pytest.mark.parametrize("positions", ["modality", "sequence"])
@pytest.mark.parametrize("to", ["image", "text"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"guidance": 2.5, "temperature": 0.8},
                                     {"top_k": 4, "top_p": 0.7}])
def test_cached_generation_equals_uncached(to, positions, options):
    model, (text, image) = biart(positions=positions), captions_and_codes(2)
    ref, gen = (text, image) if to == "image" else (image, text)
    seeds = [5, 6, 7, 8]
    for given in (0, 1):
        prefix = gen[:, :given] if given else None
        with torch.no_grad():
            expected = [uncached(model, ref[i // 2:i // 2 + 1], to, gen.shape[1], seeds[i],
                                 gen[i // 2, :given].tolist(), **options) for i in range(4)]
        found, log_p = model.generate(ref, to, n=2, prefix=prefix, seeds=seeds, **options)
        assert found.tolist() == expected
        whole = {"text": text, "image": image, to: found}
        assert torch.allclose(log_p, model.log_likelihood(**whole, to=to, start=given)[0], atol=1e-5)


def test_generated_tokens_belong_to_their_modality():
    model, (text, image) = biart(), captions_and_codes(4)
    painted, _ = model.generate(text, "image", n=8)
    assert painted.shape == (32, 9) and painted.min() >= 0 and painted.max() < 12
    said, _ = model.generate(image, "text", n=8)
    assert said.shape == (32, 6) and said.max() < 20
    for row in said.tolist():
        if 18 in row:
            assert set(row[row.index(18) + 1:]) <= {19}
            row = row[:row.index(18)]
        assert 19 not in row


@pytest.mark.parametrize("fails", [None, "CUDAGraph", "graph"])
def test_graphs_record_the_second_call_and_replay_from_then_on(fails, monkeypatch):
    done, recording = [], []

    class Graph:
        def __init__(self):
            if fails == "CUDAGraph":
                raise RuntimeError("not implemented")

        def replay(self):
            done.append(self.kv_len)

    @contextlib.contextmanager
    def record(graph, capture_error_mode):
        recording.append(graph)
        if fails == "graph":
            raise RuntimeError("operation not permitted")
        yield
        recording.pop()

    def step(kv_len):
        if recording:  # what is recorded does not run
            recording[-1].kv_len = kv_len
        else:
            done.append(kv_len)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    for name in ("current_stream", "synchronize", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: recording.clear())
    graphed, kv_lens = biart_module.GraphedStep(step), [128, 128, 128, 256, 256, 256]
    graphed(kv_lens[0])
    with pytest.warns(UserWarning, match="no CUDA graphs here") if fails else contextlib.nullcontext():
        for kv_len in kv_lens[1:]:
            graphed(kv_len)
    assert done == kv_lens


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_candidates_share_the_keys_and_values_of_their_prompt(guidance):
    model, (text, _) = biart(), captions_and_codes(2)
    cache = biart_module.KVCache(n_head=2, n=8, length=9)
    model.prefill(text, "image", text[:, :0], guidance, cache)
    batch = 2 if guidance == 1 else 4
    assert [kv.shape for kv in cache.prompt] == [(2, batch * 2, 6, 8)] * 2  # 2 heads; not 8 times as many
    assert [kv.shape for kv in cache.own] == [(2, batch, 2 * 8, 9, 8)] * 2


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch.distributed.fsdp._fully_shard") is None,
                    reason="fully_shard came with torch 2.6")
def test_ranks_of_a_sharded_model_stop_together(tmp_path):
    (tmp_path / "job.py").write_text(f"""
import datetime, os, sys; sys.path.insert(0, {HERE!r})
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from test_lverse import biart, captions_and_codes
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
model, rank, image = biart(), dist.get_rank(), captions_and_codes(8)[1]
whole = [model.generate(row[None], "text", seeds=[i])[0] for i, row in enumerate(image)]
lengths = [(row != 19).sum().item() for row in whole]
picks = lengths.index(min(lengths)), lengths.index(max(lengths))  # one caption each, of other lengths
for block in model.blocks:
    fully_shard(block)
fully_shard(model)
register_fsdp_forward_method(model, "generate")
i = picks[rank]
same = torch.equal(model.generate(image[i:i + 1], "text", seeds=[i])[0], whole[i])
print("equal" if same and lengths[picks[0]] < lengths[picks[1]] else "different", flush=True)
dist.barrier()
os._exit(0)  # as train.py leaves: gloo's thread may abort Python's own way out
""")
    assert run(*TORCHRUN, tmp_path / "job.py").count("equal") == 2


def test_a_sample_depends_on_its_own_seed_alone():
    model, (text, _) = biart(), captions_and_codes(4)
    together, _ = model.generate(text, "image", seeds=[11, 12, 13, 14])
    assert torch.equal(together[2:3], model.generate(text[2:3], "image", seeds=[13])[0])
    assert not torch.equal(together[2:3], model.generate(text[2:3], "image", seeds=[14])[0])


@pytest.mark.parametrize("to", ["image", "text"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"guidance": 2.5, "temperature": 0.8},
                                     {"top_k": 4}, {"top_p": 0.7}])
def test_a_window_finds_the_same_sample_where_guesses_are_mostly_wrong(to, options, monkeypatch):
    look = biart_module.Draft.look  # it stays open, however wrong they are
    monkeypatch.setattr(biart_module.Draft, "look", lambda self, sharded: [*look(self, sharded)[:2], 1.0])
    model, (text, image) = biart().double(), captions_and_codes(3)
    ref, gen = (text, image) if to == "image" else (image, text)
    for n, prefix_len, window in itertools.product((1, 4), (0, 1, 4, gen.shape[1]), (2, 5, 16)):
        given = dict(n=n, prefix=gen[:, :prefix_len], **options)
        expected, expected_log_p = model.generate(ref, to, window=1, **given)
        assert model.passes <= gen.shape[1] - 1
        found, log_p = model.generate(ref, to, window=window, **given)
        assert torch.equal(found, expected) and torch.allclose(log_p, expected_log_p)


def test_a_window_finds_the_same_sample_where_guesses_are_mostly_right():
    torch.manual_seed(0)
    model, (text, image) = BiART(dataclasses.replace(GPT, n_embd=32, image_side=6)), captions_and_codes(16)
    image = image[:, :1].repeat(1, 36)  # of one colour each, with a spot
    image[torch.arange(16), torch.arange(16) + 10] = 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        order = torch.randperm(16)  # so that every sample runs both ways
        optimizer.zero_grad()
        model(text[order], image[order])[0].backward()
        optimizer.step()
    model.eval().double()
    for options in ({}, {"guidance": 1.5}, {"top_p": 0.9}, {"temperature": 0}):
        one_by_one, _ = model.generate(text[:4], "image", n=2, window=1, **options)
        assert model.passes == 35
        for window in (4, 16, 64):  # the last is longer than the image
            found, log_p = model.generate(text[:4], "image", n=2, window=window, **options)
            assert torch.equal(found, one_by_one)
            assert torch.allclose(log_p, model.log_likelihood(text[:4], found, "image")[0])
            assert model.passes <= (12 if options == {"temperature": 0} else 34)
    captions, _ = model.generate(image, "text")
    assert torch.equal(model.generate(image, "text", window=4)[0], captions)


@pytest.mark.parametrize("alike", [True, False])
def test_a_window_is_opened_once_a_guess_was_right_and_weights_are_laid_out_then(alike, monkeypatch):
    model, (text, _), widths, laid_out = biart(image_side=5), captions_and_codes(1), [], []
    read, packed = biart_module.Draft.read, biart_module.packed
    monkeypatch.setattr(biart_module.Draft, "read", lambda self, W: widths.append(W) or read(self, W))
    monkeypatch.setattr(biart_module, "packed", lambda weights, rows:
                        laid_out.append((len(weights) > 0, rows)) or packed(weights, rows))
    monkeypatch.setattr(biart_module, "sample_token", lambda logits, uniform, **_:
                        (uniform * 1e4).long() % (1 if alike else 12))
    model.generate(text, "image", window=4)
    assert widths == ([1] + [4] * 6 if alike else [1] * 24)
    assert laid_out == [(False, 1), (True, 4)][:1 + alike]


def test_sampling_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.5]])
    uniform = (torch.arange(20000) + 0.5) / 20000

    def shares(**options):
        return torch.bincount(sample_token(logits.repeat(20000, 1), uniform, **options), minlength=5) / 20000

    assert torch.allclose(shares(), logits[0].softmax(0), atol=2e-3)
    assert torch.allclose(shares(temperature=0.5), (2 * logits[0]).softmax(0), atol=2e-3)
    kept = torch.tensor([2.0, 1.0, -torch.inf, -torch.inf, 1.5])
    assert torch.allclose(shares(top_k=3), kept.softmax(0), atol=2e-3)
    p = logits[0].softmax(0)  # 0.44, 0.16, 0.06, 0.02, 0.27 at temperature 1; in order 0.44, 0.71, 0.88
    kept = torch.tensor([p[0], 0, 0, 0, p[4]]) / (p[0] + p[4])
    assert torch.allclose(shares(top_p=0.7), kept, atol=2e-3)
    assert shares(top_p=1e-6)[0] == 1 and shares(temperature=0)[0] == 1 and shares(top_k=1)[0] == 1
    # the last of the cumulative distribution, never a token beyond or of no probability
    for end in (1 - 1e-7, 1.0):
        assert sample_token(logits, torch.tensor([end])).item() == 4
        assert sample_token(logits, torch.tensor([end]), top_k=3).item() == 1
        assert sample_token(torch.tensor([[1.0, 2.0, -torch.inf]]), torch.tensor([end])).item() == 1


def every_caption(prefix):
    """All texts of the toy vocabulary below: up to 3 of 4 words, closed by the end token if there is room."""
    for n in range(4 - len(prefix)):
        for words in itertools.product(range(4), repeat=n):
            caption = [*prefix, *words, 4][:3]
            yield caption + [5] * (3 - len(caption))


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("prefix", [(), (2,)])
def test_beam_search_against_exhaustive_search(length_penalty, prefix):
    model = biart(seed=3, text_vocab=6, end_token=4, pad_token=5, n_text=3)
    image = captions_and_codes(2)[1]
    texts = torch.tensor(list(every_caption(prefix)))
    count = 1 + 4 + 16 + 64 if not prefix else 1 + 4 + 16
    assert len(texts) == len({tuple(t) for t in texts.tolist()}) == count
    given = torch.tensor([prefix] * 2, dtype=torch.long)
    found, scores = model.beam_search(image, len(texts) + 30, given, length_penalty)
    for i in range(2):
        expected = []
        for text in texts:  # p of a text, the padding token ruled out, counted from behind the prefix
            h = model.transformer(model.embed(text[None], image[i:i + 1], "text"))[0, 8:11]
            logits = model.logits(h, "text").detach()
            logits[:, 5] = -torch.inf
            scored = [j for j in range(len(prefix), 3) if text[j] != 5]
            log_p = sum(logits[j].log_softmax(-1)[text[j]].item() for j in scored)
            expected.append(log_p / len(scored) ** length_penalty)
        best = int(np.argmax(expected))
        assert found[i, 0].tolist() == texts[best].tolist()
        assert scores[i, 0].item() == pytest.approx(expected[best], abs=1e-5)
        ranked = sorted(expected, reverse=True)
        # the search left nothing out
        assert torch.allclose(scores[i, :len(texts)], torch.tensor(ranked), atol=1e-5)


def brute_force_beam(model, image, width, guidance):
    """Beam search the long way round: whole sequences, no cache, one image; scores are mean log p."""
    beams = [([], 0.0)]
    for _ in range(6):
        grown = []
        for tokens, log_p in beams:
            if 18 in tokens:
                grown.append((tokens, log_p))
                continue
            scores = []
            for null in (False, True):
                x = model.embed_side(image, "image", 0, torch.tensor([null]))
                x = torch.cat([x, model.embed_side(torch.tensor([tokens], dtype=torch.long), "text", 1)], 1)
                scores.append(model.logits(model.transformer(x)[0, -1], "text"))
            logits = guided(*scores, guidance)
            logits[19] = -torch.inf
            grown += [(tokens + [word], log_p + p)
                      for word, p in enumerate(logits.log_softmax(-1).tolist()) if word != 19]
        beams = sorted(grown, key=lambda beam: -beam[1] / len(beam[0]))[:width]
    return [tokens + [19] * (6 - len(tokens)) for tokens, _ in beams]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_beams_against_a_search_without_cache(guidance):
    model, (_, image) = biart(seed=5), captions_and_codes(3)
    with torch.no_grad():
        model.token["text"].weight[18] += 0.3  # so that captions end at different lengths
        expected = [brute_force_beam(model, row[None], 4, guidance) for row in image]
    assert model.beam_search(image, 4, guidance=guidance)[0].tolist() == expected
    greedy, _ = model.generate(image, "text", temperature=0, guidance=guidance)
    assert torch.equal(model.beam_search(image, 1, guidance=guidance)[0][:, 0], greedy)


def test_guidance_takes_only_what_is_plausible_and_leaves_alone_what_is_sure():
    class Logits(torch.nn.Module):
        next_logits, config = BiART.next_logits, biart().config
        logits = staticmethod(lambda h, to: h)

    conditional = torch.tensor([0.5, 0.4, 0.099, 0.001]).log()
    null = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()
    sure = torch.tensor([0.999, 0.001 / 3, 0.001 / 3, 0.001 / 3]).log()
    logits, log_p = Logits().next_logits(torch.stack([conditional, sure, null, null]), "image", 5.0)
    assert torch.allclose(log_p, torch.stack([conditional, sure]))
    p = logits.softmax(1)
    assert p[0, 3] == 0 and p[0, 1] > 0.9  # the ratio 4 to the power 2, times 0.4 / 0.5
    torch.testing.assert_close(p[0, 1] / p[0, 0], torch.tensor(0.8 * 4 ** 2), rtol=1e-4, atol=0)
    torch.testing.assert_close(p[1], torch.tensor([1.0, 0, 0, 0]))


def test_likelihoods_in_parts_and_both_ways():
    model, (text, image) = biart(), captions_and_codes(6)
    for to in ("image", "text"):
        whole, count = model.log_likelihood(text, image, to)
        parts, same = model.log_likelihood(text, image, to, chunk=1)
        assert torch.allclose(whole, parts, atol=1e-5) and torch.equal(count, same)
    for to, ref in (("image", "text"), ("text", "image")):
        few = {to: {"text": text, "image": image}[to], ref: {"text": text, "image": image}[ref][:2]}
        paired = {side: tokens.repeat_interleave(6 // len(tokens), 0) for side, tokens in few.items()}
        expected, _ = model.log_likelihood(**paired, to=to)
        for chunk in (1, 4000, 2 ** 26):  # one REF side with one GEN side, one with all three, all at once
            assert torch.allclose(model.log_likelihood(**few, to=to, chunk=chunk)[0], expected)


def test_one_batch_is_learned_both_ways():
    torch.manual_seed(0)
    model, (text, image) = BiART(dataclasses.replace(GPT, n_embd=32)), captions_and_codes(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        order = torch.randperm(4)  # so that every sample runs both ways
        loss, _ = model(text[order], image[order])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert torch.equal(model.eval().generate(text, "image", temperature=0)[0], image)
    assert torch.equal(model.generate(image, "text", temperature=0)[0], text)


# -----------------------------------------------------------------------------
# train.py and sample.py

MINIATURE = ["--image_size=64", "--levels=8,4", "--token_grid=8", "--ch_mult", "1,1,1,2", "--hidden=8",
             "--n_groups=4", "--z_channels=16", "--codebook_size=32", "--codebook_dim=8", "--n_layer=1",
             "--n_head=2", "--n_embd=16", "--n_scenes=24", "--batch_size=4", "--max_iters=4",
             "--eval_interval=2", "--log_interval=1", "--eval_images=6", "--vq_start=2"]
STEADY = ["--dropout=0", "--replace_prob=0"]  # nothing that depends on how a batch is cut


def run(*command, ok=True, **environment):
    """Run a command in the repository; return what it printed. It must succeed or, with ok=False, fail."""
    process = subprocess.run([str(c) for c in command], cwd=HERE, capture_output=True, text=True, timeout=300,
                             check=False, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    assert (process.returncode == 0) == ok, process.stdout + process.stderr
    return process.stderr + process.stdout


def python(*arguments, ok=True):
    return run(sys.executable, *arguments, ok=ok)


def last_json(printed):
    """The JSON object that a command printed last, whatever warnings the libraries print behind it."""
    return json.loads([line for line in printed.splitlines() if line.startswith("{")][-1])


def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A miniature run through all stages, made by the real command."""
    out = tmp_path_factory.mktemp("run") / "out"
    printed = python("train.py", *MINIATURE, "--out_dir", out)
    return out, printed


@pytest.fixture
def copied_run(finished, tmp_path):
    """A copy of the miniature run, to be changed."""
    return shutil.copytree(finished[0], tmp_path / "out")


@pytest.mark.slow
@pytest.mark.old_torch
def test_train_all_leaves_a_whole_run(finished):
    out, printed = finished
    for stage in train.STAGES:
        log = rows(out / f"{stage}.csv")
        assert list(log[0])[:2] == ["step", "loss"]
        assert [int(r["step"]) for r in log] == [1, 2, 3, 4]
        assert all(math.isfinite(float(r["loss"])) for r in log)
        assert all(math.isfinite(float(r["val_loss"])) for r in log[1::2])
        assert not any(r["val_loss"] for r in log[::2])
        for name in (f"{stage}_loss.png", f"{stage}_000000.png", f"{stage}_000004.png"):
            assert Image.open(out / name).size[0] > 100
        checkpoint = train.load_checkpoint(out / f"{stage}.pt", stage)
        assert checkpoint["progress"]["step"] == 4 and f"{stage} 4/4 loss" in printed
    assert "codebook_use" in rows(out / "augvae_ml.csv")[0] and "ETA" in printed and "images/s" in printed
    assert len(Tokenizer.load(out / "tokenizer.json")) > 258
    assert not [name for name in os.listdir(out) if name.endswith((".part", ".tmp"))]


@pytest.fixture(scope="module")
def loaded(finished):
    """The miniature run as Python has it."""
    return sample_module.load(str(finished[0]))


@pytest.mark.slow
def test_sample_every_way(finished, tmp_path, capfd):
    out, _ = finished
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        data.Scenes("val", 3).image(i).save(pictures / f"{i}.png")
    (pictures / "notes.txt").write_text("not a picture")
    (pictures / "broken.png").write_text("nor this")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a small red circle above a large blue square\n\n  two crosses \n", encoding="utf-8")

    def samples(*arguments):
        """Run a use -> what it printed, its samples.json, its folder; files named there must be pictures."""
        where = tmp_path / str(len(os.listdir(tmp_path)))
        sample_module.main([str(a) for a in ("--out_dir", out, "--save_dir", where, *arguments)])
        printed = "".join(capfd.readouterr())
        with open(where / "samples.json", encoding="utf-8") as f:
            record = json.load(f)
        assert all(Image.open(where / entry["file"]).size == (64, 64) for entry in record["samples"])
        return printed, record["samples"], where

    printed, made, where = samples("--n", 3)
    assert "paint:" in printed and "it says:" in printed and Image.open(where / "samples.png").width > 300
    assert len(made) == 6 and len(made[-1]["references"]) == 6
    printed, made, where = samples("--n=2", "--prompt", "red circle " * 40, "--rerank=5")
    assert "was cut" in printed and Image.open(where / "painted.png").height > 64
    assert len(made) == 2
    first, second = (0.2 * entry["scores"]["forward"] + 0.8 * entry["scores"]["reverse"] for entry in made)
    assert first >= second
    printed, made, _ = samples("--prompts", prompts, "--n=2", "--rerank=1")
    asked = ["a small red circle above a large blue square"] * 2 + ["two crosses"] * 2
    assert [entry["prompt"] for entry in made] == asked
    assert [entry["seed"] for entry in made] == [0, 1, 1000, 1001]
    printed, made, _ = samples("--image", pictures, pictures / "0.png", "--n=3", "--prefix", "there is a",
                               "--temperature=2")
    assert "broken.png is not an image" in printed and len(made) == 12
    assert all(entry["caption"].startswith("there is a") for entry in made)
    printed, made, _ = samples("--image", pictures / "0.png", "--beam=3")
    assert len(made) == 3 and all(entry["seed"] is None for entry in made)
    printed, made, _ = samples("--image", pictures / "0.png", pictures / "1.png", "--variations", "--n=2")
    assert [entry.get("image") for entry in made[::3]] == [str(pictures / f"{i}.png") for i in (0, 1)]
    assert len(made) == 6
    printed, made, where = samples("--reconstruct", pictures / "0.png", pictures / "1.png")
    assert len(made) == 4 and Image.open(where / "reconstructed.png").width < 300
    where = tmp_path / "command"
    printed = python("sample.py", "--out_dir", out, "--save_dir", where, "--prompt", "a red circle", "--n=1")
    assert "paint: a red circle" in printed
    assert sorted(os.listdir(where)) == ["painted.png", "painted_0.png", "samples.json"]


@pytest.mark.slow
def test_a_recorded_seed_makes_the_sample_again(loaded):
    prompts = ["a small red circle above a large blue square", "two crosses", "a large black cross"]
    images = [data.Scenes("val", 3).image(i) for i in range(3)]

    def same(a, b):  # but for the rounding of sums, which depends on the batch
        return np.abs(np.asarray(a["picture"], int) - np.asarray(b["picture"], int)).max() <= 1

    painted, captioned = list(loaded.paint_all(prompts, 3)), list(loaded.caption_all(images, 3))
    for size in (1, 4):  # in other batches
        again = loaded.with_settings(batch_size=size)
        for group, others in zip(painted, again.paint_all(prompts, 3)):
            assert all(map(same, group, others))
        for group, others in zip(captioned, again.caption_all(images, 3)):
            assert [record["caption"] for record in group] == [record["caption"] for record in others]
    record = painted[2][1]
    alone = next(loaded.with_settings(seed=record["seed"], rerank=1).paint_all(prompts[2:]))[0]
    assert same(record, alone) and record["scores"] == pytest.approx(alone["scores"], abs=2e-3)
    assert not same(record, painted[2][0])
    record = captioned[1][2]
    again = next(loaded.with_settings(seed=record["seed"], rerank=1).caption_all(images[1:2]))
    assert record["caption"] == again[0]["caption"]


@pytest.mark.slow
def test_reranking_orders_by_the_reverse_direction(loaded):
    for share in (0.0, 0.25, 1.0):
        used = loaded.with_settings(rerank=6, rerank_forward=share)
        text = used.tokenize(["a small red circle above a large blue square", "two crosses"])
        for i, group in enumerate(used.candidates(text, "image")):
            assert sorted(c["seed"] for c in group) == list(range(1000 * i, 1000 * i + 6))
            expected = []
            for c in group:
                sides = text[i:i + 1], c["tokens"][None]
                forward, reverse = (used.biart.log_likelihood(*sides, to)[0].item()
                                    for to in ("image", "text"))
                assert c["scores"] == pytest.approx({"forward": forward, "reverse": reverse}, abs=1e-3)
                expected.append(share * forward + (1 - share) * reverse)
            assert expected == pytest.approx(sorted(expected, reverse=True), abs=1e-3)


@pytest.mark.slow
def test_windows_change_no_sample(loaded):
    sides = {"image": loaded.tokenize(["a cross", "two crosses"]),
             "text": loaded.encode([data.Scenes("val", 2).image(i) for i in range(2)])[0]}
    for n, window in itertools.product((1, 3), (0, 7)):
        for to, ref in sides.items():
            groups, others = (loaded.with_settings(window=w).candidates(ref, to, n) for w in (window, 1))
            for group, other in zip(groups, others):
                assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(group, other))


@pytest.mark.slow
def test_completion_keeps_rows_and_words(loaded):
    used = loaded.with_settings(keep_rows=5, prefix="the large", rerank=1)
    images = [data.Scenes("val", 2).image(i) for i in range(2)]
    codes, _ = used.encode(images)
    painted = list(used.paint_all(["a cross", "a circle"], 2, images))
    text = used.tokenize(["a cross", "a circle"])
    for i, group in enumerate(used.candidates(text, "image", 2, prefix=codes[:, :40])):
        tokens = torch.stack([record["tokens"] for record in group])
        assert torch.equal(tokens[:, :40], codes[i, :40].expand(2, -1))
        assert not torch.equal(tokens[:, 40:], codes[i, 40:])
        for x, record in zip(used.decode(tokens), painted[i]):
            assert np.array_equal(data.to_image(x), record["picture"])
    assert all(record["caption"].startswith("the large")
               for group in used.caption_all(images, 4) for record in group)


@pytest.mark.slow
def test_a_run_from_python(loaded, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(finished[0].parent)  # where the run is `out`
    lines = doctest.DocTestParser().get_examples(sample_module.load.__doc__)
    names = {"load": sample_module.load}
    for line in lines:
        exec(line.source, names)
    assert len(lines) == 5 and len(names["pictures"]) == 4 and len(names["completed"]) == 1
    assert len(names["captions"]) == 2 and names["captions"][0].startswith("there is")
    # the same samples as from the command line
    arguments = ["--n=3", "--seed=5", "--rerank=4", "--save_dir", str(tmp_path)]
    sample_module.main([*arguments, "--prompt", "a cross"])
    pictures = loaded.paint("a cross", n=3, seed=5, rerank=4)
    for i, picture in enumerate(pictures):
        assert np.array_equal(picture, Image.open(tmp_path / f"painted_{i}.png"))
    sample_module.main([*arguments, "--image", str(tmp_path / "painted_0.png")])
    entries = json.loads((tmp_path / "samples.json").read_text(encoding="utf-8"))["samples"]
    captions = loaded.caption(pictures[0], n=3, seed=5, rerank=4)
    assert captions == [entry["caption"] for entry in entries]
    # the scores by which re-ranking goes, of images of any size and mode
    image = pictures[0].convert("P").resize((90, 70))
    text, codes = loaded.tokenize(["two crosses"]), loaded.encode([image])[0]
    for direction, to in (("t2i", "image"), ("i2t", "text")):
        expected = loaded.biart.log_likelihood(text, codes, to)[0].item()
        assert loaded.score("two crosses", image)[direction] == pytest.approx(expected, rel=1e-5)
    assert loaded.config == sample_module.SampleConfig(out_dir=str(finished[0]))  # unchanged
    with pytest.raises(TypeError, match="temprature"):
        loaded.paint("a cross", temprature=1)
    with pytest.raises(ValueError, match=r"--top_p 0 is not in \(0, 1\]"):
        loaded.paint("a cross", top_p=0)
    with pytest.raises(ValueError, match="keep_rows.* go together"):
        loaded.paint("a cross", image=image)
    with pytest.raises(ValueError, match="no checkpoint absent"):
        sample_module.load("absent")


def page_content(page):
    """What is shown on the page that sample.py wrote or serves."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


@pytest.mark.slow
def test_scores_of_a_run(finished, tmp_path):
    out, _ = finished
    printed = python("sample.py", "--out_dir", out, "--save_dir", tmp_path, "--eval", "--eval_items", 4,
                     "--eval_pairs=3", "--guidance", 2, "--rerank=2", "--html")
    scores = last_json(printed)
    captions = {"bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider_d", "t2i_exact", "i2t_exact"}
    assert set(scores) == {"psnr", "ssim", "l1", "codebook_use", "perplexity", "t2i_bits", "i2t_bits",
                           "t2i_recall1", "t2i_recall5", "i2t_recall1", "i2t_recall5"} | {
        f"{name}{way}{suffix}" for name in captions for way in ("", "_rerank") for suffix in ("", "_heldout")}
    assert 0 < scores["codebook_use"] <= 1
    assert all(0 <= scores[k] <= 1 for k in scores if "exact" in k or "recall" in k)
    assert scores["t2i_recall5"] == 1 and scores["t2i_bits"] > 0
    with open(tmp_path / "scores.json", encoding="utf-8") as f:
        assert json.load(f)["scores"] == scores
    python("sample.py", "--out_dir", out, "--save_dir", tmp_path, "--prompt", "<b>a cross & more</b>",
           "--html", "--n=2")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    content = page_content(page)
    assert content["made"]["scores"]["scores"] == scores and not content["live"]
    prompts = [entry["prompt"] for entry in content["made"]["samples"]["samples"]]
    assert prompts == ["<b>a cross & more</b>"] * 2 and content["made"]["samples"]["settings"]["n"] == 2
    assert "augvae_ml_loss.png" in content["figures"]["augvae_ml"] and len(content["figures"]) == 3
    assert page.count("data:image/png;base64,") >= 2 + 3 * 2
    for word in ("http:", "https:", "<b>", "src=\"", "@import", "url("):  # loads nothing, runs no prompt
        assert word not in page, word


@pytest.mark.slow
def test_retrieval_against_brute_force(loaded):
    used = loaded.with_settings(eval_pairs=7)
    some = data.validation_subset(data.Scenes("val", 50), 9)
    scores = sample_module.likelihood_scores(used, some)
    text = used.tokenize([some.captions(i)[i % 6] for i in range(9)])
    image = used.encode([some.image(i) for i in range(9)])[0]

    def log_p(i, j, to):  # of text i and image j
        return used.biart.log_likelihood(text[i:i + 1], image[j:j + 1], to)[0].item()

    for way, to, back in (("t2i", "image", "text"), ("i2t", "text", "image")):
        best, five = 0, 0
        for i in range(7):
            pairs = [(i, j) if way == "t2i" else (j, i) for j in range(7)]
            order = sorted(range(7), key=lambda j: -log_p(*pairs[j], back))
            best, five = best + (order[0] == i), five + (i in order[:5])
        assert (scores[f"{way}_recall1"], scores[f"{way}_recall5"]) == (best / 7, five / 7)
        count = 9 * 64 if to == "image" else (text != used.tokenizer.pad).sum().item()
        bits = -sum(log_p(i, i, to) for i in range(9)) / math.log(2) / count
        assert scores[f"{way}_bits"] == pytest.approx(bits, rel=1e-4)


def test_pixel_metrics_are_those_of_scikit_image():
    r = np.random.RandomState(0)
    x = r.uniform(0, 1, (2, 16, 20, 3))
    y = np.clip(x + 0.2 * r.standard_normal(x.shape), 0, 1)
    x[1, :, 8:] = y[1, :, 8:]
    y[1, 3:] = 0.8
    x, y = (torch.from_numpy(z).permute(0, 3, 1, 2).float() for z in (x, y))
    # skimage 0.26: structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    # data_range=1)
    found = sample_module.ssim(x, y).tolist()
    assert found == pytest.approx([0.8583676359885152, 0.02295141904273806], abs=1e-6)
    # ... and with use_sample_covariance=True
    found = sample_module.ssim(x, y, sample_covariance=True).tolist()
    assert found == pytest.approx([0.8583618086467656, 0.022880373592528747], abs=1e-6)
    found = sample_module.psnr(x, y).tolist()
    assert found == pytest.approx([15.238565608588463, 8.254377459922488], rel=1e-5)
    assert sample_module.l1(x, y).tolist() == pytest.approx((x - y).abs().mean((1, 2, 3)).tolist())
    assert sample_module.ssim(x, x).tolist() == pytest.approx([1, 1])
    assert sample_module.psnr(x, x).tolist() == [100, 100]


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file of weights for FID's Inception, made by the rule used for the reference package."""
    from torchvision.models import inception_v3
    shapes = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    for i, (name, x) in enumerate(shapes.items()):
        if x.dim():
            r = torch.from_numpy(np.random.RandomState(i).standard_normal(tuple(x.shape)).astype(np.float32))
            positive = name.endswith(("weight", "var"))
            shapes[name] = (r * (2 / x[0].numel()) ** 0.5 if x.dim() > 1 else
                            1 + 0.1 * r.abs() if positive else 0.1 * r)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(shapes, path)
    return path


@pytest.mark.slow
def test_fid_is_that_of_pytorch_fid(inception):
    network = sample_module.FIDInception(inception)
    features = []
    for seed, low, high in ((1, 0, 256), (2, 60, 200)):
        pixels = np.random.RandomState(seed).randint(low, high, (6, 6, 6, 3)).astype(np.uint8)
        features.append(network([Image.fromarray(x).resize((64, 64), Image.BILINEAR) for x in pixels]))
    assert features[0].shape == (6, 2048)
    # pytorch-fid 0.3.0 with the same weights, on the same pictures as files
    expected = [0.11701524, 0.38984084, 0.0, 0.0, 0.07742107, 0.35763389, 0.27759412]
    assert features[0][0, ::300].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    found = features[0].mean().item(), features[0].numpy().std()
    assert found == pytest.approx((0.88425825, 1.16023334), rel=1e-5)
    assert sample_module.frechet_distance(*features) == pytest.approx(237.80561675471512, rel=1e-5)


def test_frechet_distance_is_that_of_pytorch_fid():
    r = np.random.RandomState(0)
    a = r.standard_normal((50, 8)) @ r.standard_normal((8, 8))
    b = r.standard_normal((40, 8)) @ r.standard_normal((8, 8)) + 0.5
    a, b = torch.from_numpy(a), torch.from_numpy(b)
    assert sample_module.frechet_distance(a, b) == pytest.approx(26.481021681034264, rel=1e-9)
    assert sample_module.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    few = sample_module.frechet_distance(a[:3], b[:5])  # fewer samples than dimensions, the long way round
    ca, cb = (torch.cov(z.T) for z in (a[:3], b[:5]))
    root = torch.linalg.eigvals(ca @ cb).real.clamp_min(0).sqrt().sum()
    expected = (a[:3].mean(0) - b[:5].mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * root
    assert few == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="at least 2"):
        sample_module.frechet_distance(a[:1], b)


def test_caption_metrics_are_those_of_pycocoevalcap():
    said = ["a dog runs on the grass", "two men ride a red bike down the street", "a cat", "the the the the"]
    references = [["a brown dog is running on grass", "the dog runs across the green grass"],
                  ["two men riding a bike on a street", "men ride down the street on a red bike",
                   "two people on a bike"],
                  ["a cat sits on a mat", "cat"], ["there is the cat on the mat"]]
    said, references = [s.split() for s in said], [[r.split() for r in others] for others in references]
    # pycocoevalcap 1.2: Bleu(4), Rouge(), Cider()
    expected = [0.784318099699277, 0.5656471679021834, 0.34944481658187443, 4.385543619059521e-05]
    assert sample_module.bleu(said, references) == pytest.approx(expected, rel=1e-9)
    assert sample_module.rouge_l(said, references) == pytest.approx(0.6370244983879116, rel=1e-9)
    assert sample_module.cider_d(said, references) == pytest.approx(1.7065427774416457, rel=1e-9)
    perfect = sample_module.caption_scores([others[0] for others in CAPTIONS], CAPTIONS)
    assert perfect["bleu4"] == pytest.approx(1) and perfect["rouge_l"] == 1 and perfect["cider_d"] > 5
    nothing = sample_module.caption_scores(["", ""], CAPTIONS)
    assert max(nothing.values()) < 1e-4


CAPTIONS = [["A dog runs on the grass.", "the dog is running"], ["Two men ride a bike!"]]


@pytest.mark.parametrize(("caption", "words"), [
    # as Stanford's PTBTokenizer and COCO's list of punctuation have it
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
def test_caption_words_by_the_coco_convention(caption, words):
    assert sample_module.caption_words(caption) == words.split()


@pytest.mark.slow
def test_psnr_against_the_formula(loaded):
    some = data.validation_subset(data.Scenes("val", 50), 3)
    expected = []
    for i in range(3):
        x = data.crop_to_tensor(some.image(i), 64)[None]
        y = loaded.vae.decode(loaded.vae.encode(x))
        a, b = (np.asarray((t + 1) / 2, np.float64) for t in (x, y))
        expected.append(10 * math.log10(1 / ((a - b) ** 2).mean()))
    found = sample_module.reconstruction_scores(loaded, some)["psnr"]
    assert found == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.slow
@pytest.mark.old_torch
def test_resume_continues_exactly(finished, tmp_path):
    whole, _ = finished
    out = tmp_path / "out"
    for stage in train.STAGES:
        python("train.py", *MINIATURE, "--out_dir", out, "--stage", stage, "--max_iters=2")
        # the schedule of four steps from its middle on
        checkpoint = train.load_checkpoint(out / f"{stage}.pt", stage)
        assert checkpoint["progress"]["step"] == 2
        python("train.py", *MINIATURE, "--out_dir", out, "--stage", stage, "--resume")
        ours, theirs = rows(out / f"{stage}.csv"), rows(whole / f"{stage}.csv")
        assert [r["step"] for r in ours] == [r["step"] for r in theirs]
        assert [r["loss"] for r in ours] == [r["loss"] for r in theirs]


@pytest.mark.slow
def test_coco_data_through_all_stages(tmp_path, inception):
    folder, path, _ = coco(tmp_path, n=6)
    where = ["--data=coco", "--train_dir", folder, "--train_captions", path, "--val_dir", folder,
             "--val_captions", path]
    out = tmp_path / "out"
    python("train.py", *MINIATURE, *where, "--out_dir", out, "--max_iters=2")
    assert "it says" in python("sample.py", "--out_dir", out, "--n=2")
    scores = last_json(python("sample.py", "--out_dir", out, "--eval", "--eval_items=2", "--beam=2",
                              "--fid_weights", inception))
    assert {"t2i_bits", "i2t_recall1", "cider_d", "fid", "rfid"} <= set(scores) and "t2i_exact" not in scores
    assert scores["t2i_bits"] > 0 and scores["i2t_bits"] > 0 and scores["fid"] > 0 and scores["rfid"] > 0


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def losses(out, stage):
    return {r["step"]: r["loss"] for r in rows(out / f"{stage}.csv")}


@pytest.mark.slow
def test_two_ranks_train_as_one_with_twice_the_batch(tmp_path):
    out, alone = tmp_path / "out", tmp_path / "alone"
    given = [*MINIATURE, *STEADY, "--locality=0", "--device=cpu", "--max_iters=5"]
    run(*TORCHRUN, "train.py", *given, "--out_dir", out, "--batch_size=2")
    alone.mkdir()
    for stage, before in zip(train.STAGES, (None, "augvae_ml.pt", "augvae_sl.pt")):
        if before:  # both from the very same model
            shutil.copy(out / before, alone)
        python("train.py", *given, "--out_dir", alone, f"--stage={stage}", "--batch_size=4", "--overwrite")
        together, single = (train.load_checkpoint(d / f"{stage}.pt", stage) for d in (out, alone))
        assert together["progress"]["samples"] == single["progress"]["samples"] == 20
        for name, value in together["model"].items():
            off = (value.float() - single["model"][name].float()).abs().max()
            # the codebook's sums are far above 1
            assert off <= 1e-5 * max(1, value.abs().max()), (stage, name, off)
        for ours, theirs in zip(losses(out, stage).values(), losses(alone, stage).values()):
            assert float(ours) == pytest.approx(float(theirs), rel=1e-4)


@pytest.mark.slow
def test_ranks_keep_one_codebook_bit_for_bit(tmp_path):
    (tmp_path / "job.py").write_text(f"""
import os, sys; sys.path.insert(0, {HERE!r})
import torch, torch.distributed as dist
from augvae import Codebook, AugVAEConfig
dist.init_process_group("gloo")
book = Codebook(AugVAEConfig(codebook_size=64, codebook_dim=4))
with torch.random.fork_rng():
    torch.manual_seed(0)
    book.weight.normal_()
torch.manual_seed(dist.get_rank())
for step in range(50):
    for _ in range(2):
        z = torch.randn(3, 4, 5, 5) * (1 + dist.get_rank())
        book.collect(z, book(z)[1])
    book.update()
books = [torch.empty_like(book.weight) for _ in range(2)]
dist.all_gather(books, book.weight)
print("equal" if torch.equal(*books) and book.cluster_size.sum() > 0 else "drifted apart", flush=True)
dist.destroy_process_group()
os._exit(0)  # as train.py leaves: gloo's thread may abort Python's own way out
""")
    printed = run(*TORCHRUN, tmp_path / "job.py")
    assert printed.count("equal") == 2 and "drifted" not in printed


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch(finished, tmp_path):
    out, _ = finished
    for name, batch in (("whole", 8), ("parts", 4)):
        shutil.copytree(out, tmp_path / name)
        python("train.py", *MINIATURE, *STEADY, "--out_dir", tmp_path / name, "--stage=biart", "--overwrite",
               "--batch_size", batch, "--gradient_accumulation_steps", 8 // batch)
    whole, parts = (losses(tmp_path / name, "biart") for name in ("whole", "parts"))
    for step, loss in whole.items():
        assert float(loss) == pytest.approx(float(parts[step]), rel=1e-4)


@pytest.mark.slow
def test_sharded_and_checkpointed_training_has_the_same_losses(finished, tmp_path):
    out, _ = finished

    def biart(name, launcher, *given):
        if not (tmp_path / name).exists():
            shutil.copytree(out, tmp_path / name)
        run(*launcher, "train.py", *MINIATURE, *STEADY, "--out_dir", tmp_path / name, "--stage=biart",
            "--device=cpu", "--optimizer=adamw", "--learning_rate=1e-2", *given)
        return list(map(float, losses(tmp_path / name, "biart").values()))

    plain = biart("plain", [sys.executable], "--overwrite")
    assert biart("again", [sys.executable], "--overwrite", "--checkpoint_activations") == plain
    if importlib.util.find_spec("torch.distributed.fsdp._fully_shard") is None:  # it came with torch 2.6
        run(sys.executable, "train.py", *MINIATURE, "--out_dir", tmp_path / "again", "--stage=biart",
            "--shard", ok=False)
        return
    two = ["--batch_size=2", "--shard", "--checkpoint_activations"]
    biart("sharded", TORCHRUN, "--overwrite", "--max_iters=2", "--learning_rate=1e-2", *two)
    biart("plain2", [sys.executable], "--overwrite", "--max_iters=2", "--learning_rate=1e-2")
    # a sharded run's checkpoint is an ordinary one: it goes on sharded, or alone
    shutil.copytree(tmp_path / "sharded", tmp_path / "unsharded")
    expected = biart("plain2", [sys.executable], "--resume", "--max_iters=4")
    assert biart("sharded", TORCHRUN, "--resume", "--max_iters=4", *two) == pytest.approx(expected, rel=1e-4)
    unsharded = biart("unsharded", [sys.executable], "--resume", "--max_iters=4", "--shard=false")
    assert unsharded == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_activation_checkpointing_keeps_augvae_losses(finished, tmp_path):
    out, _ = finished
    python("train.py", *MINIATURE, "--out_dir", tmp_path / "out", "--stage=augvae_ml",
           "--checkpoint_activations")
    assert losses(tmp_path / "out", "augvae_ml") == losses(out, "augvae_ml")


def started(*command):
    return subprocess.Popen([str(c) for c in command], cwd=HERE, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_exactly(finished, tmp_path):
    whole, _ = finished
    out, rng = tmp_path / "out", random.Random(0)
    for _ in range(4):
        process = started(sys.executable, "train.py", *MINIATURE, "--out_dir", out,
                          *(["--resume"] if any(out.glob("*.pt")) else []))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=rng.uniform(3, 7))
        process.kill()
        process.communicate()
    python("train.py", *MINIATURE, "--out_dir", out, *(["--resume"] if any(out.glob("*.pt")) else []))
    for stage in train.STAGES:
        assert losses(out, stage) == losses(whole, stage)
        ours, theirs = (train.load_checkpoint(d / f"{stage}.pt", stage)["model"] for d in (out, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def spoil(folder):
    """Break two images of four below a folder that layout() made, in different ways."""
    (folder / "train" / "class 0" / "2.png").write_bytes(b"")
    (folder / "train" / "class 1" / "3.png").unlink()
    (folder / "train" / "class 1" / "3.png").symlink_to("3.png")


@pytest.mark.slow
def test_tar_shards_through_all_stages_the_last_on_two_ranks(tmp_path):
    settings = layout("tar", tmp_path, 14)
    whole = (tmp_path / "000.tar").read_bytes()
    (tmp_path / "002.tar").write_bytes(whole[:len(whole) // 2])
    pack(tmp_path / "003.tar", [("x.png", b"no image"), ("x.txt", b"words")])
    where = [f"--{name}={value}" for name, value in {**settings, "train_dir": tmp_path}.items()]
    torchrun = [*TORCHRUN, "train.py"]
    rest = [a for a in MINIATURE if not a.startswith(("--max_iters", "--batch_size"))]
    rest += [*where, "--batch_size=2", "--epochs=0.6", "--cache_tokens", str(tmp_path / "cache"),
             "--cache_crops=2"]
    for stage in train.STAGES[:2]:
        train.main([*rest, "--stage", stage, "--out_dir", str(tmp_path / "out")])
    printed = run(*torchrun, *rest, "--stage=biart", "--workers=1", "--device=cpu", "--out_dir",
                  tmp_path / "out")
    n = len(data.Tar(data.expand_shards(str(tmp_path))))
    assert n == 14 + 3 + 1
    for stage, batch in zip(train.STAGES, (2, 2, 4)):
        assert len(rows(tmp_path / "out" / f"{stage}.csv")) == math.ceil(0.6 * n / batch)
        assert "002.tar is cut" in (tmp_path / "out" / f"{stage}_bad_images.log").read_text()
    assert "biart: 2 files could not be read or were damaged: " in printed
    assert "003.tar: x.png is not an image" in (tmp_path / "out" / "biart_bad_images.log").read_text()
    tokens = data.Tokens(str(tmp_path / "cache" / "train"))
    assert len(tokens) == n - 1 and codes_of(tokens).shape[1] == 2
    # another run uses the same cache, unless its models differ
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    train.main([*rest, "--stage=biart", "--out_dir", str(tmp_path / "out"), "--overwrite"])
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    train.main([*rest, "--stage=augvae_sl", "--out_dir", str(tmp_path / "out"), "--overwrite", "--seed=3"])
    with pytest.raises(ValueError, match="cache/train holds tokens of another augvae"):
        train.main([*rest, "--stage=biart", "--out_dir", str(tmp_path / "out"), "--overwrite"])
    own = [a for a in rest if "cache" not in a]
    train.main([*own, "--stage=biart", "--out_dir", str(tmp_path / "out"), "--overwrite"])
    assert (tmp_path / "out" / "tokens" / "train" / "00000.npy").exists()


@pytest.mark.slow
def test_training_goes_on_over_bad_images_and_resumes_exactly(tmp_path, capsys):
    settings = layout("folder", tmp_path / "data", 7)
    spoil(tmp_path / "data")
    whole = [*MINIATURE, "--stage=augvae_ml", "--workers=1",
             *(f"--{name}={value}" for name, value in settings.items())]
    train.main([*whole, "--out_dir", str(tmp_path / "a")])
    assert "augvae_ml: 2 files could not be read or were damaged" in capsys.readouterr().out
    train.main([*whole, "--out_dir", str(tmp_path / "b"), "--max_iters=2"])
    train.main([*whole, "--out_dir", str(tmp_path / "b"), "--resume"])
    ours, theirs = (rows(tmp_path / name / "augvae_ml.csv") for name in "ab")
    assert [r["loss"] for r in ours] == [r["loss"] for r in theirs]
    names = set((tmp_path / "a" / "augvae_ml_bad_images.log").read_text().splitlines())
    assert len(names) == 2 and all(any(bad in name for name in names)
                                   for bad in ("2.png is not", "3.png is not"))
    for name in ("0", "1", "4", "5"):
        (tmp_path / "data" / "train" / f"class {int(name) % 2}" / f"{name}.png").write_bytes(b"")
    assert "samples could not be read" in refused("train.py", *whole, "--out_dir", tmp_path / "c")


def test_settings_of_data_that_contradict_are_refused(tmp_path):
    where = ["--data=folder", "--train_dir", str(tmp_path), "--val_dir", str(tmp_path), "--out_dir",
             str(tmp_path / "out")]
    for arguments, message in [
        ([], "--data folder has no captions, which --stage biart needs"),
        (["--stage=augvae_ml"], "holds no image"),
        (["--stage=augvae_ml", "--epochs=1", "--max_iters=3"], "--epochs 1.0 and --max_iters 3"),
        (["--stage=augvae_ml", "--epochs=-1"], "--epochs -1.0"),
        (["--bench=gpu"], "--bench 'gpu' is none of: augvae, codebook, biart, data"),
    ]:
        with pytest.raises(ValueError, match=message):
            train.main([*where, *arguments])
    (tmp_path / "train").mkdir()
    original = ["--stage=augvae_ml", "--preset=released", "--train_dir", str(tmp_path / "train"),
                "--val_dir=absent", "--batch_size=4", "--epochs=2", "--out_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="train holds no image"):  # the preset says that it is ImageNet
        train.main(original)
    message = "--data scenes reads no --train_dir .*train: name its layout by --data"
    with pytest.raises(ValueError, match=message):
        train.main([*original, "--preset=tiny"])


@pytest.mark.slow
def test_sampling_refuses_data_without_captions(finished, tmp_path):
    noise(tmp_path / "0.png", 0)
    with pytest.raises(ValueError, match="--data folder has no captions"):
        sample_module.main(["--data=folder", "--val_dir", str(tmp_path), "--out_dir", str(finished[0])])


@pytest.mark.slow
def test_bench_data_measures_both(capsys, monkeypatch):
    monkeypatch.setitem(train.BENCHES, "data", lambda given, context: bench_data(
        given, context, rounds=1, sources=((300, 200, 2), (400, 500, 1))))
    bench_data = train.bench_data
    train.main(["--bench=data", "--json"])
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert {"median_s", "peak_gb", "device", "dtype", "size"} <= set(found) and found["median_s"] > 0
    assert len(lines) == len(found) and len(found["images_s"]) == 2
    assert all(set(rates) == {"ours", "torchvision"} and min(rates.values()) > 0
               for rates in found["images_s"].values())


@pytest.mark.slow
@pytest.mark.parametrize("what, sizes", [
    ("augvae", ["--image_size=32", "--levels=8,4", "--hidden=8", "--n_groups=2", "--codebook_size=16",
                "--z_channels=8", "--checkpoint_activations"]),
    ("codebook", ["--codebook_size=16", "--codebook_dim=4", "--batch_size=1"]),
    ("biart", ["--n_layer=1", "--n_head=2", "--n_embd=16", "--n_text=8", "--dtype=bfloat16"])])
def test_benches_of_training_measure(what, sizes, capsys):
    train.main([f"--bench={what}", "--json", "--device=cpu", *sizes])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"median_s", "peak_gb", "device", "dtype", "size"} <= set(found) and found["device"] == "cpu"
    assert found["dtype"] == ("bfloat16" if what == "biart" else found["dtype"]) and found["median_s"] > 0
    assert found["min_s"] <= found["median_s"] <= found["max_s"]


def test_the_bench_of_sampling_measures(capsys, monkeypatch):
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "text_vocab": 20, "end_token": 18, "pad_token": 19,
             "image_vocab": 12}
    monkeypatch.setattr(sample_module, "BiARTConfig", lambda n_layer, n_head, n_embd, image_side: BiARTConfig(
        image_side=image_side * 3 // 8, **sizes))
    sample_module.main(["--bench", "--json", "--device=cpu"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["tokens_per_s"]) == {"1", "8"} and found["tokens_per_s"]["1"] > 0
    assert found["dtype"] == "float32"
    assert {"median_s", "peak_gb", "device", "size", "guidance_cost", "image_s", "growth",
            "share_of_floor"} <= set(found)


@pytest.mark.slow
def test_last_best_and_older_checkpoints(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    names = sorted(p.name for p in out.glob("augvae_ml*.pt"))
    assert names == ["augvae_ml.pt", "augvae_ml_00000002.pt", "augvae_ml_best.pt"]
    val = {int(r["step"]): float(r["val_loss"]) for r in rows(out / "augvae_ml.csv") if r["val_loss"]}
    best = train.load_checkpoint(out / "augvae_ml_best.pt", "augvae_ml")
    assert best["progress"]["val_loss"] <= min(val.values()) + 1e-6

    def older():
        return [int(path[-11:-3]) for path in train.older_checkpoints(out / "augvae_ml.pt")]

    # steps are in order, the newest first, and --keep says how many stay
    assert older() == [2]
    for step in range(9, 12):
        content = {"stage": "augvae_ml", "progress": {"step": step + 1}}
        train.save_checkpoint(str(out / "augvae_ml.pt"), content, previous=step, keep=2)
    assert older() == [11, 10]


@pytest.mark.slow
def test_a_broken_last_checkpoint_gives_way_to_the_one_before(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    last = out / "biart.pt"
    last.write_bytes(last.read_bytes()[:3000])
    # the settings of the run come from its checkpoint: nothing but --resume need be given
    printed = python("train.py", "--out_dir", out, "--resume")
    assert "biart.pt is not a whole checkpoint" in printed and "going back to" in printed
    assert "resuming at step 2" in printed
    assert losses(out, "biart") == losses(finished[0], "biart")
    assert train.load_checkpoint(last, "biart")["progress"]["step"] == 4
    for path in out.glob("biart*.pt"):
        path.write_bytes(b"")
    assert "not a whole checkpoint" in refused("train.py", "--out_dir", out, "--resume", "--stage=biart")


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_loses_nothing(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    before = {path.name: path.read_bytes() for path in out.glob("*.pt")}
    # half a checkpoint is all that can be written
    blocks = (out / "augvae_ml.pt").stat().st_size // 1024 // 2
    command = (f"ulimit -f {blocks}; exec {sys.executable} train.py --out_dir {out} --resume --max_iters=6 "
               "--stage=augvae_ml")
    printed = run("bash", "-c", command, ok=False)
    assert "could not be written" in printed and "Traceback" not in printed
    assert {path.name: path.read_bytes() for path in out.glob("*.pt")} == before
    assert not list(out.glob("*.part"))
    printed = python("train.py", "--out_dir", out, "--resume", "--max_iters=6", "--stage=augvae_ml")
    assert "resuming at step 4" in printed


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[sys.executable], TORCHRUN], ids=["alone", "torchrun"])
def test_a_signal_ends_a_run_after_the_step_and_it_goes_on_exactly(launcher, finished, tmp_path):
    given = [*MINIATURE, "--stage=augvae_sl", "--max_iters=60", "--eval_interval=50", "--device=cpu",
             "--batch_size=2"]
    for name in ("whole", "cut"):
        shutil.copytree(finished[0], tmp_path / name)
    run(*launcher, "train.py", *given, "--out_dir", tmp_path / "whole", "--overwrite")
    process = started(*launcher, "train.py", *given, "--out_dir", tmp_path / "cut", "--overwrite")
    for line in process.stdout:
        if line.startswith("augvae_sl 10/"):
            process.send_signal(signal.SIGTERM)
            break
    printed, _ = process.communicate(timeout=60)
    step = train.load_checkpoint(tmp_path / "cut" / "augvae_sl.pt", "augvae_sl")["progress"]["step"]
    assert 10 <= step < 60 and f"stopped at step {step}, saved to" in printed
    assert process.returncode not in (0, None)
    if launcher is not TORCHRUN:
        assert process.returncode == 128 + signal.SIGTERM
    run(*launcher, "train.py", "--out_dir", tmp_path / "cut", "--resume")
    assert losses(tmp_path / "cut", "augvae_sl") == losses(tmp_path / "whole", "augvae_sl")


def test_a_second_signal_ends_at_once(monkeypatch):
    codes, before = [], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(os, "_exit", codes.append)
    with train.Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # the same Ctrl-C, by way of torchrun
        assert signals.number == signal.SIGINT and not codes
        signals.caught_at -= 2
        signal.raise_signal(signal.SIGINT)
        assert codes == [128 + signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_steps_without_a_finite_loss_are_skipped_and_counted(tmp_path, monkeypatch):
    plain, calls = train.AugVAEObjective.forward, []

    def forward(self, images, broken=(2, 3)):
        loss, parts = plain(self, images)
        if self.training:
            calls.append(1)
            if len(calls) in broken or len(calls) > 6:
                loss = loss * (torch.nan if len(calls) == 2 else torch.inf)
        return loss, parts

    monkeypatch.setattr(train.AugVAEObjective, "forward", forward)
    given = [*MINIATURE, "--stage=augvae_ml", "--out_dir", str(tmp_path)]
    train.main([*given, "--max_iters=6"])
    log = rows(tmp_path / "augvae_ml.csv")
    assert [int(r["skipped"]) for r in log] == [0, 1, 2, 2, 2, 2]
    assert [math.isfinite(float(r["loss"])) for r in log] == [True, False, False, True, True, True]
    checkpoint = train.load_checkpoint(tmp_path / "augvae_ml.pt", "augvae_ml")
    assert all(v.isfinite().all() for v in checkpoint["model"].values())
    assert checkpoint["model"]["codebook.updates"] == 4  # nor did the codebook move in the skipped steps
    with pytest.raises(ValueError, match="20 steps in a row.*augvae_ml.pt holds step 13"):
        train.main([*given, "--resume", "--max_iters=40", "--eval_interval=13"])
    checkpoint = train.load_checkpoint(tmp_path / "augvae_ml.pt", "augvae_ml")
    assert all(v.isfinite().all() for v in checkpoint["model"].values())


@pytest.mark.slow
def test_a_rank_that_fails_takes_the_job_down(tmp_path):
    (tmp_path / "job.py").write_text(f"""
import os, sys; sys.path.insert(0, {HERE!r})
import train
plain = train.AugVAEObjective.after_step
def after_step(self, skipped):
    if os.environ["RANK"] == "1":
        raise RuntimeError("rank one has had enough")
    return plain(self, skipped)
train.AugVAEObjective.after_step = after_step
train.main(sys.argv[1:])
""")
    printed = run(*TORCHRUN, tmp_path / "job.py", *MINIATURE, "--device=cpu", "--out_dir", tmp_path / "out",
                  "--batch_size=2", ok=False)  # within run()'s time limit
    assert "rank one has had enough" in printed


def test_settings_are_typed_layered_and_documented():
    parser = train.Parser((train.TrainConfig, DataConfig, AugVAEConfig, BiARTConfig), {})
    given = parser.settings(["--levels", "16,8", "--learning_rate=0.5", "--resume", "--attention", "false",
                             "--n_layer", "3"])
    assert given == {"levels": (16, 8), "learning_rate": 0.5, "resume": True, "attention": False,
                     "n_layer": 3}
    config, gpt = train.configure({**given, "preset": "tiny"}, "biart", train.TrainConfig, BiARTConfig)
    assert config.learning_rate == 0.5 and gpt.n_layer == 3
    assert config.batch_size == train.PRESETS["tiny"]["biart"]["batch_size"]
    for cls in (train.TrainConfig, DataConfig, AugVAEConfig, BiARTConfig, sample_module.SampleConfig):
        for f in dataclasses.fields(cls):
            if not f.metadata:
                described = [a.help for a in train.Parser((cls,), {})._actions if a.dest == f.name]
                assert len(described) == 1 and not described[0].strip().startswith("["), f.name
    for preset in train.PRESETS:
        for stage in train.STAGES:
            train.configure({"preset": preset}, stage,
                            train.TrainConfig, DataConfig, AugVAEConfig, BiARTConfig)


@pytest.mark.slow
def test_help_lists_every_setting():
    printed = python("train.py", "--help")
    assert "--codebook_size" in printed and "--n_embd" in printed and "$ python train.py" in printed
    assert "--guidance" in python("sample.py", "--help")


def test_learning_rate_schedule():
    config = train.TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110)
    rates = [train.Schedule(config).get_lr(step) for step in range(111)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    scaled = train.Schedule(train.TrainConfig(epochs=1.5, scale_lr=True, batch_size=3), world=2, n=10)
    assert (scaled.samples_per_step, scaled.max_iters, scaled.peak_lr) == (6, 3, pytest.approx(6e-4))


@pytest.mark.slow
def test_the_arithmetic_of_the_release(monkeypatch, tmp_path):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=10, cooldown=10,
                                                           min_lr=0.02)
    losses, rng = [], random.Random(0)
    config = train.TrainConfig(schedule="plateau", learning_rate=0.5, min_lr=0.02, warmup_iters=0)
    for step in range(400):
        losses.append(1 / (1 + min(step, 150) / 9) + rng.choice([0, 0, 0.3, 1e-6]))
        reference.step(losses[-1])
        rate = train.Schedule(config).get_lr(step, losses)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
    assert train.count_plateaus(losses) > 3
    original, = train.configure({"preset": "original"}, "augvae_sl", train.TrainConfig)
    assert (original.learning_rate, original.scale_lr, original.schedule, original.warmup_iters,
            original.grad_clip, original.weight_decay, original.beta1, original.beta2) == (
        4.5e-6, True, "plateau", 0, 0, 1e-5, 0.9, 0.999)
    assert train.configure({"preset": "original"}, "biart", train.TrainConfig)[0].schedule == "cosine"
    # a run that is resumed in the middle knows of the plateau what one in a piece knows
    monkeypatch.setattr(train, "count_plateaus", len)
    flags = [*MINIATURE, "--stage=augvae_ml", "--schedule=plateau", "--learning_rate=1e-4", "--scale_lr",
             "--warmup_iters=0", "--gradient_accumulation_steps=2", "--min_lr=0"]
    train.main([*flags, "--out_dir", str(tmp_path / "whole")])
    train.main([*flags, "--out_dir", str(tmp_path / "halves"), "--max_iters=2"])
    train.main([*flags, "--out_dir", str(tmp_path / "halves"), "--resume"])
    whole, halves = (train.load_checkpoint(tmp_path / name / "augvae_ml.pt", "augvae_ml")["progress"]
                     for name in ("whole", "halves"))
    assert whole["val_losses"] == halves["val_losses"] and len(whole["val_losses"]) == 3
    rates = [float(row["lr"]) for row in rows(tmp_path / "whole" / "augvae_ml.csv")]
    halved = [float(row["lr"]) for row in rows(tmp_path / "halves" / "augvae_ml.csv")]
    assert rates == pytest.approx([4e-4, 2e-4, 2e-4, 1e-4]) == halved


@pytest.mark.slow
@has_namespaces
def test_released_weights_and_given_tokenizers_in_runs(tmp_path, capsys):
    ml, sl = released_file(tmp_path / "ml.ckpt", RELEASED), released_file(tmp_path / "sl.ckpt", RELEASED, 8)
    vocabulary, picture = str(tmp_path / "words.json"), str(tmp_path / "scene.png")
    Tokenizer.train(data.Scenes("train", 9).captions(3), 300).save(vocabulary)
    data.Scenes("val", 1).image(0).save(picture)

    def go(name, *arguments):
        train.main(["--out_dir", str(tmp_path / name), "--n_layer=1", "--n_head=2", "--n_embd=16",
                    "--n_scenes=8", "--batch_size=4", "--max_iters=1", "--eval_interval=1",
                    "--eval_images=4", *arguments])
        return tmp_path / name

    def paint(out, *arguments):
        sample_module.main(["--out_dir", str(out), "--n=1", "--prompt", "a red circle", *arguments])

    kept = go("ml", "--stage=augvae_ml", "--init_from", ml, "--max_iters=0") / "augvae_ml.pt"
    assert train.fingerprint(train.load_augvae(kept)) == train.fingerprint(train.load_augvae(ml))
    out = go("cut", "--stage=augvae_sl", "--init_from", str(kept), "--token_grid=4")
    cut = train.load_augvae(out / "augvae_sl.pt")
    assert cut.config.grids == (4,)
    out = go("both", "--stage=all", "--init_from", ml, "--token_grid=8",  # ml alone starts there
             "--tokenizer", vocabulary)
    assert train.load_checkpoint(out / "augvae_sl.pt", "augvae_sl")["config"]["single_level"] == 8
    trained = train.load_augvae(out / "augvae_ml.pt")
    assert train.fingerprint(trained) != train.fingerprint(train.load_augvae(ml))
    paint(out)
    out = go("biart", "--stage=biart", "--init_from", sl, "--tokenizer", vocabulary)
    assert Tokenizer.load(out / "tokenizer.json").fingerprint() == Tokenizer.load(vocabulary).fingerprint()
    paint(out, "--vae", sl)
    assert Image.open(out / "painted_0.png").size == (32, 32)
    with pytest.raises(ValueError, match="another augvae than the one in .*augvae_sl.pt"):
        paint(out, "--vae", str(tmp_path / "cut" / "augvae_sl.pt"))
    with pytest.raises(ValueError, match="no checkpoint"):
        paint(out)
    for path in (ml, sl, str(kept)):
        sample_module.main(["--out_dir", str(tmp_path / "new"), "--vae", path, "--reconstruct", picture])
    assert "reconstructed.png" in capsys.readouterr().out
    torch.save({"state_dict": Payload()}, tmp_path / "bad.ckpt")
    for message, *arguments in (
            ("BiART needs AugVAE-SL", "--stage=biart", "--init_from", ml),
            ("is AugVAE-SL", "--stage=augvae_ml", "--init_from", sl),
            ("--hidden 8 contradicts", "--init_from", ml, "--hidden=8"),
            ("--token_grid 4 contra", "--stage=augvae_sl", "--init_from", sl, "--token_grid=4"),
            ("asks to run", "--init_from", str(tmp_path / "bad.ckpt")),
            ("of biart, not of augvae_ml or augvae_sl", "--init_from", str(out / "biart.pt")),
            ("no file", "--init_from=absent"), ("none of: cosine, plateau", "--schedule=linear"),
            ("none of: square, picture", "--crop_of=circle"),
            ("absent as a tokenizer", "--stage=biart", "--init_from", sl, "--tokenizer=absent")):
        with pytest.raises(ValueError, match=message):
            go("refused", *arguments)
    other = str(tmp_path / "other.json")
    Tokenizer.train(["another text altogether"], 300).save(other)
    with pytest.raises(ValueError, match="contradicts .*tokenizer.json"):
        go("biart", "--stage=biart", "--init_from", sl, "--tokenizer", other, "--resume", "--max_iters=2")
    printed = refused("sample.py", "--out_dir", out, "--vae", tmp_path / "bad.ckpt", "--prompt", "x")
    assert "asks to run" in printed


@pytest.mark.slow
def test_a_run_with_clips_vocabulary(finished, tmp_path):
    tok_clip()
    path = os.environ.get("LVERSE_CLIP_BPE") or os.path.join(
        HERE, "..", "shared/data/clip/bpe_simple_vocab_16e6.txt.gz")
    flags = [*MINIATURE, "--stage=biart", "--init_from", str(finished[0] / "augvae_sl.pt"),
             "--tokenizer", path, "--max_iters=1"]
    train.main([*flags, "--out_dir", str(tmp_path)])
    sample_module.main(["--out_dir", str(tmp_path), "--vae", str(finished[0] / "augvae_sl.pt"), "--n=2"])
    assert train.load_checkpoint(tmp_path / "biart.pt", "biart")["config"]["text_vocab"] == 49408


def refused(*command):
    """The command must fail with one sentence, not with a traceback; returns it."""
    printed = python(*command, ok=False)
    assert "Traceback" not in printed, printed
    return printed


@pytest.mark.slow
def test_bad_settings_are_refused_with_a_sentence(finished, tmp_path):
    out, _ = finished
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    assert "did you mean --max_iters" in refused("train.py", "--max_iter", "3")
    assert "exists" in refused("train.py", *MINIATURE, "--out_dir", out)
    for arguments, message in [
        (["--stage=gan"], "none of: augvae_ml, augvae_sl, biart, all"),
        (["--preset=huge"], "tiny, small, released"),
        (["--data=mnist"], "none of: scenes, fake, imagenet"), (["--data=coco"], "needs --train_dir"),
        (["--data=coco", "--train_dir=absent", "--train_captions=absent.json"], "no file absent.json"),
        (["--stage=biart"], "no checkpoint"), (["--resume"], "finds no checkpoint"),
        (["--device=tpu"], "--device"), (["--dtype=int8"], "none of: auto"),
        (["--loss=l3"], "none of: l2, l1"), (["--levels=8,3"], "levels"),
    ]:
        with pytest.raises(ValueError, match=message):
            train.main([*MINIATURE, "--out_dir", str(tmp_path / "new"), *arguments])
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before


@pytest.mark.slow
def test_bad_checkpoints_are_refused(finished, copied_run):
    out = finished[0]
    whole = {path.stem: path.read_bytes() for path in (*out.glob("*.pt"), out / "tokenizer.json")}

    def attempt(message, *arguments, **changes):
        """Sampling must fail while files of the run are missing (None) or have another content."""
        for stem, content in {**whole, **changes}.items():
            path = copied_run / (stem + (".json" if stem == "tokenizer" else ".pt"))
            path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            sample_module.main(["--out_dir", str(copied_run), "--n=1", *arguments])

    attempt("no checkpoint", biart=None)
    attempt("not a whole checkpoint", biart=whole["biart"][:5000])
    attempt("not a whole checkpoint", augvae_sl=b"")
    attempt("of augvae_ml, not of biart", biart=whole["augvae_ml"])
    attempt("another augvae", augvae_sl=retouched(out / "augvae_sl.pt"))
    Tokenizer.train(["another text altogether"], 300).save(copied_run / "other.json")
    attempt("another tokenizer", tokenizer=(copied_run / "other.json").read_bytes())
    attempt("cannot read", tokenizer=b"{")
    attempt("cannot read", tokenizer=None)
    attempt("--prompt is empty", "--prompt", " ")
    attempt("absent.png is not an image", "--image", "absent.png")
    attempt("not an image", "--image", os.path.join(HERE, "README.md"))
    attempt("not an image", "--reconstruct", os.path.join(HERE, "README.md"))


@pytest.mark.slow
def test_bad_uses_are_refused(finished, tmp_path):
    out, picture, empty = finished[0], tmp_path / "a.png", tmp_path / "empty"
    data.Scenes("val", 1).image(0).save(picture)
    empty.mkdir()
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    image = ["--image", str(picture)]
    for arguments, message in [
        (["--prompts", "absent.txt"], "there is no file 'absent.txt'"),
        (["--prompts", str(tmp_path / "blank.txt")], "is empty"),
        (["--prompts", str(tmp_path / "latin1.txt")], "is not UTF-8"),
        (["--image", str(empty)], "no image in the folder"),
        ([*image, "--prompt", "a cross"], "--keep_rows"),
        ([*image, "--prompt", "a cross", "--keep_rows=8"], "8 is not in 1 to 7"),
        (["--keep_rows=2"], "needs --image"), ([*image, "--keep_rows=2"], "needs --prompt or --variations"),
        (["--prefix=a"], "--prefix needs --image"),
        ([*image, "--prefix", "red circle " * 40], "tokens"),
        (["--prompt", "a", "--eval"], "different uses"), (["--prompt", "a", "--beam=3"], "does not paint"),
        ([*image, "--beam=3", "--rerank=2"], "both choose"),
        ([*image, "--beam=3", "--top_k=5"], "does not sample"),
        (["--eval", "--fid_weights", "absent.pth"], "no file absent.pth"),
        (["--eval", "--fid_weights", str(tmp_path / "weights.pth")], "is not a whole checkpoint"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample_module.main(["--out_dir", str(out), "--save_dir", str(tmp_path / "made"), *arguments])


@pytest.mark.slow
def test_a_bad_setting_of_sampling_ends_the_program_with_a_sentence():
    assert "sample.py: --rerank 0 is not in [1, 1000]" in refused("sample.py", "--rerank=0")


@pytest.mark.parametrize(("argument", "message"), [
    ("--n=0", "--n 0 is not in [1, 1000]"), ("--batch_size=-2", "--batch_size -2 is not in [1, inf)"),
    ("--keep_rows=-1", "--keep_rows -1 is not in [0, inf)"), ("--rerank=0", "--rerank 0 is not in [1, 1000]"),
    ("--rerank_forward=1.5", "--rerank_forward 1.5 is not in [0, 1]"),
    ("--top_p=0", "--top_p 0.0 is not in (0, 1]"), ("--temperature=nan", "--temperature nan is not in"),
    ("--guidance=inf", "--guidance inf is not in [0, 1e6]"), ("--guidance=nan", "--guidance nan is not in"),
    ("--length_penalty=inf", "--length_penalty inf is not in"), ("--seed=-1", "--seed -1 is not in [0,"),
    ("--dtype=int8", "--dtype 'int8' is none of: auto, float32"),
])
def test_settings_of_sampling_out_of_range_are_refused(argument, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sample_module.main([argument])


def retouched(path):
    """The bytes of a checkpoint in which one weight is another."""
    checkpoint = torch.load(path, weights_only=True)
    next(iter(checkpoint["model"].values())).add_(1)
    torch.save(checkpoint, f"{path}.retouched")
    with open(f"{path}.retouched", "rb") as f:
        content = f.read()
    os.remove(f"{path}.retouched")
    return content


class Payload:
    """What unpickling must not run."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"stage": "biart", "model": Payload()}, "biart.pt")
    with pytest.raises(ValueError, match="asks to run posix.system"):
        train.load_checkpoint("biart.pt", "biart")
    assert not os.path.exists("pwned")


def test_a_failed_save_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "biart.pt"
    train.save_checkpoint(path, {"stage": "biart", "progress": {"step": 1}})
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space left"):
        train.save_checkpoint(path, {"stage": "biart", "progress": {"step": 2}})
    assert train.load_checkpoint(path, "biart")["progress"]["step"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("module", ["augvae", "biart", "tokenizer", "data", "train", "sample"])
def test_imports_are_quiet_and_one_way(module):
    code = (f"import sys; import {module}; import torch; assert not torch.cuda.is_initialized(); "
            "print(sorted({'train', 'sample'} & set(sys.modules)))")
    printed = python("-c", code).strip()
    assert printed == {"train": "['train']", "sample": "['sample', 'train']"}.get(module, "[]")


# -----------------------------------------------------------------------------
# CUDA without a GPU
#
# Tensors on "cuda" are fake: shapes and types without values. Those on the CPU are real, and what comes there
# from the device is zeros. So the real commands run whole, over a CUDA runtime that does nothing, each in a
# process of its own, and what CUDA or NCCL would refuse is refused.

CUDA_RUNTIME = """
#define DOES_NOTHING(name) int name() { return 0; }
#define GIVES(name, type, value) int name(type *out) { *out = value; return 0; }
DOES_NOTHING(cudaGetLastError) DOES_NOTHING(cudaPeekAtLastError) DOES_NOTHING(cudaDeviceSynchronize)
DOES_NOTHING(cudaStreamQuery) DOES_NOTHING(cudaStreamSynchronize) DOES_NOTHING(cudaStreamWaitEvent)
DOES_NOTHING(cudaStreamGetPriority) DOES_NOTHING(cudaEventQuery) DOES_NOTHING(cudaEventRecord)
DOES_NOTHING(cudaEventSynchronize) DOES_NOTHING(cudaEventDestroy) DOES_NOTHING(cudaEventRecordWithFlags)
GIVES(cudaGetDeviceCount, int, 8) GIVES(cudaDeviceGetAttribute, int, 8) GIVES(cudaEventCreate, long, 1)
GIVES(cudaEventCreateWithFlags, long, 1) GIVES(cudaStreamCreateWithPriority, long, 1)
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


class PretendedCUDA(TorchDispatchMode):
    """Every operation on tensors of "cuda" passes through here, and on to PyTorch's fake tensors."""
    values = {torch.long: 1, torch.bfloat16: 16.0}  # 16 is what the trial of bfloat16 hopes for
    by_value = {**train.TensorBytes.made_up,
                aten._local_scalar_dense.default: lambda x: PretendedCUDA.values.get(x.dtype, 0.0),
               # all rows differ
               aten.unique_dim.default: lambda x, *_: (x, x.new_empty(len(x)), x.new_empty(len(x)))}

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.capturing = self.searching = False
        self.seen = Counter()  # what happened how often

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given, _ = tree_flatten((args, kwargs))
        devices = {getattr(x, "fake_device", x) for x in given if isinstance(x, (FakeTensor, torch.device))}
        if not any(device.type == "cuda" for device in devices):
            return func(*args, **kwargs)
        self.check(func, given)
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
        return torch.zeros(x.shape, dtype=x.dtype)

    def has_no_graphs(self):
        raise RuntimeError("a build without CUDA graphs says so where one is made")

    def check(self, func, given):
        """What CUDA refuses, before torch 2.14 (group norm) or in a graph, and what would round tokens."""
        tensors, name = [x for x in given if isinstance(x, torch.Tensor)], str(func)
        if "native_group_norm" in name:
            self.seen["group norm"] += 1
            assert all(x.is_contiguous() for x in tensors), f"{name} wants NCHW"
        if self.capturing:
            masks = "index" not in name or any(x.dtype is torch.bool for x in tensors)
            assert func not in self.by_value or not masks, f"a captured step looks at a value: {name}"
            random = torch.Tag.nondeterministic_seeded in func.tags and "attention" not in name
            assert not random, f"a captured step draws numbers: {name}"
        if self.searching and "mm" in name:
            self.seen["search"] += 1
            assert not torch.backends.cuda.matmul.allow_tf32, "the nearest code is searched in TF32"


def pretend_cuda(world=1):
    """Make this process rank 0 of `world`, each with a GPU; -> the mode that counts and checks."""
    mode, cuda = PretendedCUDA(), torch.cuda
    os.environ.update(RANK="0", LOCAL_RANK="3" if world > 1 else "0", WORLD_SIZE=str(world))
    cuda.is_available = cuda.is_initialized = cuda.is_bf16_supported = lambda *_, **__: True
    cuda._initialized, cuda._lazy_init = True, lambda: None
    cuda.device_count, cuda.current_device = lambda: 8, lambda: int(os.environ["LOCAL_RANK"])
    cuda.set_device = torch._utils._get_device_index  # the check that the real one begins with
    cuda.synchronize = cuda.set_stream = cuda.manual_seed_all = lambda *_: None
    fake_tensor.init_gpu_context = fake_tensor.init_cuda_context = lambda *_: None
    # A module's parameters become fake ones, and what is made of numbers comes from the CPU
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    tensor, tolist = torch.tensor, torch.Tensor.tolist
    torch.tensor = lambda *given, device=None, **more: tensor(*given, **more).to(device)
    torch.Tensor.tolist = lambda self: tolist(self.cpu())
    torch.Tensor.pin_memory = lambda self, *_: self
    pretend_graphs(mode)
    pretend_nccl(world)
    save, nearest = torch.save, Codebook.nearest

    def saved(x):
        if not isinstance(x, FakeTensor):
            return x
        mode.seen["saved from the device"] += bool(x.dim())
        return torch.zeros(x.shape, dtype=x.dtype)

    def searched(*given):
        mode.searching = True
        codes = nearest(*given)
        mode.searching = False
        return codes
    torch.save = lambda content, *given, **more: save(tree_map(saved, content), *given, **more)
    Codebook.nearest = searched
    mode.__enter__()
    return mode


def pretend_graphs(mode):
    def rng_state(*_):
        assert not mode.capturing, "a captured step reads or sets the CUDA generator"
        return torch.zeros(16, dtype=torch.uint8)

    @contextlib.contextmanager
    def graph(*_, **__):
        mode.capturing = True
        yield
        mode.capturing = False
    torch.cuda.get_rng_state = torch.cuda.set_rng_state = rng_state
    torch.cuda.graph = graph
    torch.cuda.CUDAGraph = lambda: argparse.Namespace(replay=lambda: mode.seen.update(["replay"]))


def pretend_nccl(world):
    """Collectives that change nothing, with the checks of NCCL and DDP; token caches are made as if alone."""
    DDP, start = torch.nn.parallel.DistributedDataParallel, dist.init_process_group
    build, clip = data.build_token_cache, torch.nn.utils.clip_grad_norm_

    def all_reduce(x, *_):
        assert x.is_cuda and x.is_contiguous(), f"NCCL cannot sum this tensor on {x.device}"

    def all_gather_object(values, value):
        values[:] = [value] * len(values)

    def init(self, module, **_):
        nn.Module.__init__(self)
        self.module = module

    def clip_grad_norm_(parameters, *given):
        parameters = list(parameters)
        assert all(p.grad is not None for p in parameters), "DDP would wait for a gradient that never comes"
        return clip(parameters, *given)

    def build_token_cache(*given, **more):
        given = inspect.signature(build).bind(*given, **more)
        add = given.arguments["all_reduce"]
        given.arguments.update(rank=0, world=1, all_reduce=lambda x: add(x) * 0 + x)
        return build(*given.args, **given.kwargs)
    dist.init_process_group = lambda *_, **__: start("fake", rank=0, world_size=world, store=FakeStore())
    dist.all_reduce, dist.all_gather_object = all_reduce, all_gather_object
    DDP.__init__, DDP.forward = init, lambda self, *given: self.module(*given)
    DDP.no_sync = lambda self: contextlib.nullcontext()
    torch.nn.utils.clip_grad_norm_, data.build_token_cache = clip_grad_norm_, build_token_cache


@pytest.fixture(scope="session")
def on_cuda(tmp_path_factory):
    """on_cuda(function, *arguments): calls one of the functions below in a process with a CUDA runtime."""
    if torch.version.cuda is None or not shutil.which("cc"):
        pytest.skip("needs a CUDA build of PyTorch and a C compiler")
    folder = tmp_path_factory.mktemp("cuda")
    library = folder / "libcuda.so.1"
    (folder / "runtime.c").write_text(CUDA_RUNTIME)
    run("cc", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, folder / "runtime.c")

    def call(function, *given):
        code = f"import os, test_lverse as t; print(dict(t.{function.__name__}(*{given!r})), flush=True)"
        return run(sys.executable, "-c", f"{code}; os._exit(0)", LD_PRELOAD=str(library))
    return call


def train_on_cuda(out, world, runs):
    """All stages, a step a run, each in its precision, with activations checkpointed or not, and resumed."""
    mode = pretend_cuda(world)
    given = [*MINIATURE, "--device=cuda", "--out_dir", out, "--eval_images=16", "--eval_interval=1"]
    for i, (dtype, again) in enumerate(runs):
        train.main([*given, f"--dtype={dtype}", f"--checkpoint_activations={again}", f"--max_iters={i + 1}",
                    *(["--resume"] if i else [])])
    return mode.seen


@pytest.mark.slow
@pytest.mark.parametrize("world, runs", [
    pytest.param(1, [("float32", False), ("bfloat16", True), ("float16", False), ("float32", True)],
                 id="the only GPU"),
    pytest.param(8, [("bfloat16", False), ("float16", True)], id="rank 0 of 8", marks=pytest.mark.old_torch)])
def test_all_stages_train_and_resume_on_cuda(world, runs, on_cuda, tmp_path):
    printed = on_cuda(train_on_cuda, str(tmp_path / "out"), world, runs)
    assert all(f"{what}'" in printed for what in ("group norm", "search", "replay"))
    for stage in train.STAGES:
        steps = len(runs)
        assert train.load_checkpoint(tmp_path / "out" / f"{stage}.pt", stage)["progress"]["step"] == steps
        assert f"cuda:{3 if world > 1 else 0}" in printed and f"{stage} {steps}/{steps} loss" in printed


def decode_on_cuda(graphs):
    """Every way of decoding, in fp32 and bfloat16, with graphs or on a device that lacks them."""
    mode = pretend_cuda()
    if not graphs:
        torch.cuda.CUDAGraph = mode.has_no_graphs
    model = biart().to("cuda")
    text, image = (x.to("cuda") for x in captions_and_codes())
    ways = [{}, {"temperature": 0}, {"guidance": 2.0, "top_k": 5, "top_p": 0.9, "n": 2, "window": 3}]
    directions = ("image", text, image), ("text", image, text)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            for way, (to, ref, prefix) in itertools.product(ways, directions):
                model.generate(ref, to, **way)
                model.generate(ref, to, prefix=prefix[:, :2], **way)
            model.beam_search(image, 3, guidance=2.0)
            model.beam_search(image, 2, prefix=text[:, :2])
            model.log_likelihood(text, image, "image")
            model.log_likelihood(text, image[:1], "text", start=2)
    return mode.seen


@pytest.mark.slow
@pytest.mark.old_torch
@pytest.mark.parametrize("graphs", [True, False])
def test_all_decoding_goes_through_graphs_on_cuda(graphs, on_cuda):
    printed = on_cuda(decode_on_cuda, graphs)
    assert ("'replay'" in printed) == graphs == ("no CUDA graphs here" not in printed)


def sample_on_cuda(out, picture):
    mode = pretend_cuda()
    train.main([*MINIATURE, "--device=cuda", "--out_dir", out, "--max_iters=0"])
    for use in ([f"--image={picture}", "--beam=3"], [f"--image={picture}", "--keep_rows=2", "--variations"],
                ["--prompt=a cross", "--guidance=2", "--rerank=3"], [f"--reconstruct={picture}"],
                ["--eval", "--eval_items=2", "--eval_pairs=2"]):
        sample_module.main(["--device=cuda", "--out_dir", out, "--n=2", *use])
    return mode.seen


@pytest.mark.slow
@pytest.mark.old_torch
def test_every_use_of_sample_on_cuda(on_cuda, tmp_path):
    data.Scenes("val", 1).image(0).save(tmp_path / "a.png")
    printed = on_cuda(sample_on_cuda, str(tmp_path / "out"), str(tmp_path / "a.png"))
    assert "paint: a cross" in printed and "'replay'" in printed and "t2i_bits" in printed


def count_gathered():
    """-> a function that says how many tensors, each whole from its shards, there were at most at once."""
    from torch.distributed.tensor import DTensor
    plain, whole, most = DTensor.full_tensor, [], [0]

    def full_tensor(self, *given, **more):
        tensor = plain(self, *given, **more)
        whole.append(weakref.ref(tensor))
        most[0] = max(most[0], sum(x() is not None for x in whole))
        return tensor
    DTensor.full_tensor = full_tensor
    return lambda: most[0]


def shard_on_cuda(out):
    mode, gathered = pretend_cuda(8), count_gathered()
    given = [*MINIATURE, "--device=cuda", "--out_dir", out, "--eval_images=16", "--max_iters=1"]
    for stage in train.STAGES:
        mode.seen.clear()
        train.main([*given, f"--stage={stage}", "--shard", "--optimizer=adamw"])
    return {**mode.seen, "gathered at once": gathered()}


needs_fully_shard = pytest.mark.skipif(
    importlib.util.find_spec("torch.distributed.fsdp._fully_shard") is None, reason="came with torch 2.6")


@pytest.mark.slow
@needs_fully_shard
def test_a_sharded_run_gathers_onto_the_cpu(on_cuda, tmp_path):
    printed = on_cuda(shard_on_cuda, str(tmp_path))
    assert "biart 1/1 loss" in printed and "saved from the device" not in printed
    assert int(re.search(r"'gathered at once': (\d+)", printed)[1]) <= 2


def dtype_on_cuda(emulated):
    """Cards before Ampere emulate bfloat16: from torch 2.6 on that counts as supported."""
    pretend_cuda()
    torch.cuda.is_bf16_supported = lambda including_emulation=True: including_emulation or not emulated
    torch.cuda.get_device_capability = lambda *_: (7, 0) if emulated else (8, 0)
    return {"dtype": train.Context("cuda", "auto", wide=True).dtype}


@pytest.mark.slow
@pytest.mark.parametrize("emulated, dtype", [(True, "float16"), (False, "bfloat16")])
def test_emulated_bfloat16_is_not_chosen(emulated, dtype, on_cuda):
    assert f"'dtype': torch.{dtype}" in on_cuda(dtype_on_cuda, emulated)


def test_tiny_numbers_count_as_zero():
    """On the threads of parallel work, too: those take over what holds when they start."""
    job = """
import torch, train
train.Context("cpu", "float32", wide=False)
print((torch.full((2 ** 22,), 1e-38) * 0.1).count_nonzero().item())
"""
    assert run(sys.executable, "-c", job, OMP_NUM_THREADS="2").split()[-1] == "0"


MEMORY = {"preset": "released", "loss": "l2", "hidden": 64, "n_layer": 4, "vocab_size": 2048}


def memory_on_cuda(stage, given):
    """The most that a step holds, GB, as PyTorch's own tracker sees it."""
    from torch.distributed._tools.mem_tracker import MemTracker
    pretend_cuda()
    settings = train.Settings(stage, given, *train.configure(given, stage, *train.CONFIGS))
    objective, batch = train.objective_and_batch(settings)
    trainer = train.Trainer(objective, settings, train.Context("cuda", settings.train.dtype, wide=True))
    trainer.step([batch], 0.0, train.Progress())
    tracker = MemTracker()
    tracker.track_external(objective, trainer.optimizer)
    with tracker:
        trainer.step([batch], 0.0, train.Progress())
    return {"peak": tracker.get_tracker_snapshot("peak")[torch.device("cuda:0")]["Total"] / 2 ** 30}


needs_counting = pytest.mark.skipif(not importlib.util.find_spec("torch.distributed._tools.mem_tracker"),
                                    reason="before torch 2.5 it is not seen when memory is free again")


@pytest.mark.slow
@needs_counting
@pytest.mark.parametrize("stage, given", [
    ("augvae_ml", {"dtype": "bfloat16"}), ("augvae_sl", {"dtype": "float32", "checkpoint_activations": True}),
    ("biart", {"dtype": "bfloat16"})])
def test_bench_memory_counts_what_pytorch_does(stage, given, on_cuda):
    given = {**MEMORY, **given}
    held = counted(stage, given)
    peak = float(re.search(r"'peak': ([\d.]+)", on_cuda(memory_on_cuda, stage, given))[1])
    assert held["peak"] == pytest.approx(peak, rel=0.02)
    assert held["optimizer"] == pytest.approx(2 * held["gradients"], rel=0.1)  # AdamW's two averages
    assert held["weights"] == pytest.approx(held["gradients"], rel=0.15) and 0 < held["activations"] < peak


def counted(stage, given):
    return train.count_memory(train.Settings(stage, given, *train.configure(given, stage, *train.CONFIGS)))


@pytest.mark.slow
@needs_counting
def test_bench_memory_names_the_largest_batch(capsys):
    train.main(["--bench=memory", "--stage=biart", "--preset=tiny", "--json"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["biart"]
    for card, batch_size in told["largest"].items():
        free = int(card) - 1 - told["with DDP"] - told["per_image"] * (batch_size - told["batch_size"])
        assert batch_size % 2 == 0 and -0.02 * int(card) <= free < 0.02 * int(card)
    with pytest.raises(ValueError, match="--shard"):
        train.main(["--bench=memory", "--shard"])
    plain, perceptual = (counted("augvae_ml", {"preset": "tiny", "loss": s}) for s in ("l2", "lpips_l2"))
    vgg = 14.7e6 * 4 / 2 ** 30  # of which no file is needed here
    assert perceptual["weights"] - plain["weights"] == pytest.approx(vgg, rel=0.01)
    assert perceptual["gradients"] == pytest.approx(plain["gradients"], rel=0.01)


@needs_counting
@pytest.mark.parametrize("rows, n", [(16, 1), (4, 4)])
def test_generation_holds_one_cache(rows, n, monkeypatch):
    monkeypatch.setattr(biart_module, "packing_pays", lambda *_: False)  # oneDNN takes no fakes
    c = BiARTConfig(n_layer=4, n_head=4, n_embd=256, n_text=32, image_side=8, text_vocab=300, image_vocab=64)
    with torch.device("meta"):
        model = BiART(c)
    with FakeTensorMode(allow_non_fake_inputs=True), train.TensorBytes() as tensors:
        model.to_empty(device="cpu")
        weights = tensors.now
        model.generate(torch.zeros(rows, c.n_text, dtype=torch.long), "image", n=n, guidance=2.0)
    cache = c.n_layer * 2 * 2 * rows * n * (c.n_text + c.n_image) * c.n_embd * 4  # of both halves, in bytes
    assert tensors.most - weights < 1.5 * cache


# -----------------------------------------------------------------------------
# Ranks that do not keep step, by gloo: each job runs on every rank, and ends by an alarm where it hangs

def on_two_ranks(job, *given):
    code = f"import os, signal; signal.alarm(100); import test_lverse as t; t.{job.__name__}(*{given!r})"
    return run(*TORCHRUN, "--no-python", sys.executable, "-c", f"{code}; os._exit(0)")


class Waiting(TorchDispatchMode):
    """As with NCCL a sum comes back at once, and only who reads it waits for it."""

    def __init__(self):
        super().__init__()
        self.works, plain = {}, dist.all_reduce

        def all_reduce(x):
            self.works[x.untyped_storage().data_ptr()] = x, plain(x, async_op=True)
        dist.all_reduce = all_reduce
        for name in ("tolist", "cpu"):  # which no operation precedes where a tensor is on the CPU
            look = getattr(torch.Tensor, name)
            setattr(torch.Tensor, name, lambda self, look=look: look(self.clone()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in tree_flatten((args, kwargs))[0] if self.works else ():
            plain = isinstance(x, torch.Tensor) and x.layout is torch.strided  # oneDNN's have no storage
            if plain and x.untyped_storage().data_ptr() in self.works:
                self.works.pop(x.untyped_storage().data_ptr())[1].wait()
        return func(*args, **kwargs or {})


def late_rank(out):
    """Every update of the codebook is printed; saving takes a while, as that of large checkpoints does."""
    save, update = torch.save, Codebook.update

    def told(self):
        print(f"codebook {os.environ['RANK']} {self.weight.double().sum().item()}\n", end="", flush=True)
        return update(self)
    Codebook.update = told
    torch.save = lambda *given, **more: (time.sleep(isinstance(given[0], dict)), save(*given, **more))
    with Waiting():
        train.main([*MINIATURE, "--device=cpu", "--out_dir", out, "--batch_size=2", "--max_iters=2"])


@pytest.mark.slow
@pytest.mark.old_torch
def test_ranks_wait_for_each_other_where_sums_come_back_at_once(tmp_path):
    printed = on_two_ranks(late_rank, str(tmp_path))
    books = re.findall(r"codebook (\d) (\S+)", printed)
    first, second = ([state for rank, state in books if rank == one] for one in "01")
    assert first == second and len(first) == 4 and "biart 2/2 loss" in printed


def sharded_rank(out):
    """Validation batches and the captions' ends differ between ranks: rank 1 ends a caption at once."""
    plain, gathered = biart_module.sample_token, count_gathered()
    end = Tokenizer.load(os.path.join(out, "tokenizer.json")).end

    def sample_token(logits, *given, **how):
        at_once = os.environ["RANK"] == "1" and logits.shape[1] > end
        return torch.full((len(logits),), end) if at_once else plain(logits, *given, **how)
    biart_module.sample_token = sample_token
    train.main([*MINIATURE, "--device=cpu", "--out_dir", out, "--stage=biart", "--overwrite", "--shard",
                "--optimizer=adamw", "--max_iters=2", "--eval_images=5"])
    print(f"rank {os.environ['RANK']} gathered {gathered()}\n", end="", flush=True)


@pytest.mark.slow
@needs_fully_shard
def test_sharded_ranks_keep_step_in_validation_and_pictures(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "out")
    printed = on_two_ranks(sharded_rank, str(tmp_path / "out"))
    assert "biart 2/2 loss" in printed and int(re.search(r"rank 1 gathered (\d+)", printed)[1]) <= 2


def leaving_rank(out):
    """destroy_process_group as it is in 2 of 7 runs with torch 2.1: never returns, and lets no thread run."""
    dist.destroy_process_group = lambda *_: ctypes.PyDLL(None).sleep(1000)
    given = ["--device=cpu", "--out_dir", out, "--stage=augvae_ml", "--max_iters=1"]
    sys.argv = ["train.py", *MINIATURE, *given]
    runpy.run_path(os.path.join(HERE, "train.py"), run_name="__main__")


@pytest.mark.slow
@pytest.mark.old_torch
def test_leaving_waits_for_no_thread_of_gloo(tmp_path):
    assert "augvae_ml: 1 steps" in on_two_ranks(leaving_rank, str(tmp_path))


# -----------------------------------------------------------------------------
# Settings that a resumed run gets anew, other devices, other systems

def test_a_resumed_optimizer_takes_the_settings_given_now(tmp_path, monkeypatch):
    plain, groups = torch.optim.AdamW.step, []

    def step(self, *given, **more):
        if len(self.param_groups) > 1:  # not where a step is tried
            groups.append([{**group, "params": None} for group in self.param_groups])
        return plain(self, *given, **more)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    given = [*MINIATURE, "--device=cpu", "--stage=augvae_ml", "--out_dir", str(tmp_path)]
    train.main([*given, "--max_iters=1"])
    train.main([*given, "--max_iters=2", "--resume", "--weight_decay=0.5", "--beta1=0.8", "--beta2=0.7"])
    before, after = groups[-2:]
    assert [group["weight_decay"] for group in after] == [group["weight_decay"] and 0.5 for group in before]
    assert {group["betas"] for group in after} == {(0.8, 0.7)} != {group["betas"] for group in before}
    init = torch.optim.AdamW.__init__

    def refuses(self, *given, fused=None, **more):
        if fused:
            raise RuntimeError("no fused kernel on this device")
        init(self, *given, **more)
    monkeypatch.setattr(torch.optim.AdamW, "__init__", refuses)
    train.main([*given, "--max_iters=3", "--resume"])
    assert not any(group["fused"] for group in groups[-1])


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")
def test_auto_is_cuda_else_mps_where_a_step_works_else_the_cpu(monkeypatch):
    assert train.Context("auto", "auto", wide=False).device.type == "cpu"
    monkeypatch.setattr(train, "try_step", lambda device: None)
    with pytest.raises(ValueError, match="--device 'mps' cannot be used here"):
        train.Context("auto", "auto", wide=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="--device 'cuda:0' cannot be used here"):
        train.Context("auto", "auto", wide=False)


@pytest.mark.slow
def test_import_and_training_without_what_windows_lacks(tmp_path):
    given = [*MINIATURE, "--stage=augvae_ml", "--max_iters=1", "--device=cpu", f"--out_dir={tmp_path}"]
    python("-c", "import sys, signal, torch\n"
           "sys.modules['resource'] = None  # so that importing it fails\n"
           "number = signal.SIGTERM; del signal.SIGTERM\n"
           "import sample, train\n"
           f"signal.SIGTERM = number; train.main({given})")


# -----------------------------------------------------------------------------
# README.md

README = pathlib.Path(HERE, "README.md").read_text(encoding="utf-8")
# a diff, and the commands below it
CHANGES = re.findall(r"```diff\n(.*?)```\n+```\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None, reason="changes are applied by git")
@pytest.mark.parametrize("diff, commands", CHANGES)
def test_the_changes_in_the_readme_can_be_made_and_run(diff, commands, tmp_path):
    for name in ("augvae", "biart", "data", "sample", "tokenizer", "train"):
        shutil.copy(os.path.join(HERE, f"{name}.py"), tmp_path)
    subprocess.run(["git", "apply", "--recount", "-C1", "-"], cwd=tmp_path, input=diff, text=True, check=True)
    changed = sum(line[:1] in "+-" and line[:3] not in ("+++", "---") for line in diff.splitlines() if line)
    assert changed <= 15
    noise(tmp_path / "IMAGES" / "cats" / "0.png", 0)
    noise(tmp_path / "IMAGES" / "dogs" / "1.png", 1)
    for command in commands.splitlines():
        script, *given = shlex.split(command.split("#")[0])[1:]
        small = [*MINIATURE, "--device=cpu"] if script == "train.py" else []
        process = subprocess.run([sys.executable, script, *map(str, small), *given], cwd=tmp_path,
                                 capture_output=True, text=True, check=False,
                                 env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.slow
def test_the_lines_of_python_in_the_readme_run(finished, tmp_path, monkeypatch, capsys):
    lines, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(lines.replace('"out"', repr(str(finished[0]))), {})
    assert Image.open("painting.png").size == (64, 64) and "t2i" in capsys.readouterr().out


def test_the_readme_names_every_change_it_promises():
    assert len(CHANGES) == 3


# -----------------------------------------------------------------------------
# sample.py: a run as weights alone, and its page

@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """-> the folder of the miniature run's weights, and the run that they were rounded in."""
    folder = tmp_path_factory.mktemp("exported") / "scenes"
    rounded = sample_module.load(str(finished[0]))
    sample_module.export(rounded, str(folder))
    return folder, rounded


@pytest.mark.slow
def test_an_exported_run_is_the_run(finished, loaded, exported, monkeypatch, tmp_path):
    folder, rounded = exported
    assert sorted(os.listdir(folder)) == ["augvae_sl.pt", "biart.pt", "tokenizer.json"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6e6
    for stage in ("augvae_sl", "biart"):
        checkpoint = train.load_checkpoint(folder / f"{stage}.pt", stage)
        assert not {"optimizer", "random", "scaler"} & set(checkpoint)
        assert str(finished[0]) not in str(checkpoint) and checkpoint["settings"]["image_size"] == 64
    run, prompt = sample_module.load(str(folder)), "a small red circle above a large blue square"
    pictures = run.paint(prompt, n=3)
    assert all(np.array_equal(a, b) for a, b in zip(pictures, rounded.paint(prompt, n=3)))
    assert run.caption(pictures[0], n=2) == rounded.caption(pictures[0], n=2)
    scores, before = (each.score(prompt, pictures[0]) for each in (run, loaded))
    assert scores == pytest.approx(before, rel=1e-3) and scores != before
    # the command line takes it as any run; from an exported run it makes the same again
    sample_module.main(["--out_dir", str(folder), "--export", str(tmp_path)])
    assert train.fingerprint(train.load_augvae(tmp_path / "augvae_sl.pt")) == train.fingerprint(run.vae)


@pytest.mark.slow
def test_what_is_no_exported_run_is_refused(finished, exported, tmp_path):
    folder = shutil.copytree(exported[0], tmp_path / "scenes")

    def attempt(message, change, name="biart.pt"):
        content = torch.load(exported[0] / name, weights_only=True)
        change(content)
        torch.save(content, folder / name)
        with pytest.raises(ValueError, match=message):
            sample_module.load(str(folder))
        shutil.copy(exported[0] / name, folder)

    attempt("biart.pt does not hold the weights .*ln_f", lambda c: c["model"].pop("ln_f.weight"))
    attempt("biart.pt does not hold .*size mismatch", lambda c: c["config"].update(n_embd=32))
    attempt("biart.pt does not hold .*wings", lambda c: c["config"].update(wings=2))
    attempt("biart.pt does not hold .*model", lambda c: c.pop("model"))
    attempt("augvae_sl.pt does not hold", lambda c: c.update(model={}), "augvae_sl.pt")
    attempt("another augvae", lambda c: c["model"]["codebook.weight"].add_(1), "augvae_sl.pt")
    attempt("not a checkpoint of this project, or of an older", lambda c: c.pop("progress"))
    with pytest.raises(ValueError, match="would overwrite the run"):
        sample_module.main(["--out_dir", str(folder), "--export", f"{folder}/../scenes"])
    with pytest.raises(ValueError, match="weights alone: there is nothing to resume"):
        train.main(["--resume", "--out_dir", str(folder)])
    for arguments in (["--export="], ["--serve", "--html"], ["--serve", "--host="], ["--serve", "--prompt=a"],
                      ["--serve", "--n=65"]):
        with pytest.raises(ValueError, match="is empty|leave out|different uses|64 pictures"):
            sample_module.main(["--out_dir", str(folder), *arguments])


def test_generation_shows_its_steps_and_can_be_ended():
    model, (text, codes) = biart(), captions_and_codes()
    for window, n in ((1, 2), (7, 1)):
        seen = []
        tokens, _ = model.generate(text, "image", n, seeds=range(len(text) * n), window=window,
                                on_step=lambda *step, seen=seen: seen.append([x.clone() for x in step]))
        assert len(seen) == model.passes
        for so_far, known in seen:
            for row, final, count in zip(so_far, tokens, known):
                assert torch.equal(row[:count], final[:count])
        assert all((b > a).any() and (b >= a).all() for (_, a), (_, b) in zip(seen, seen[1:]))

    def leave(_tokens, _known):
        raise ConnectionError
    with pytest.raises(ConnectionError):
        model.generate(codes, "text", on_step=leave)


@pytest.fixture
def server(loaded, monkeypatch):
    """The miniature run's page, served from a thread."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # to be put back
    run = loaded.with_settings(port=0)
    server = sample_module.Server(run, sample_module.page(run, live=True))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    server.ending = True
    thread.join()


def answer(server, path, asked=None):
    """-> the status, and the lines of the answer, or the page."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    connection.request("GET" if asked is None else "POST", path, None if asked is None else json.dumps(asked))
    response = connection.getresponse()
    content = response.read().decode()
    connection.close()
    return response.status, (content if content.startswith("<") else
                             [json.loads(line) for line in content.splitlines()])


def raw_answer(server, request):
    """-> the status that is answered to these bytes, and what is behind it."""
    with socket.create_connection(server.server_address, timeout=30) as connection:
        with contextlib.suppress(ConnectionError):  # refused while we still send
            connection.sendall(request)
        content = b""
        while part := connection.recv(2 ** 16):
            content += part
    return int(content.split()[1]) if content else None, content.decode().partition("\r\n\r\n")[2]


def shown(url):
    """A picture of the page -> array."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition("data:image/png;base64,")[2]))))


def png(image, kind="PNG"):
    content = io.BytesIO()
    image.save(content, kind)
    return base64.b64encode(content.getvalue()).decode()


@pytest.mark.slow
def test_the_page_paints_what_the_command_line_paints(server, finished, tmp_path):
    prompt = "a small red circle above a large blue square"
    arguments = ["--out_dir", str(finished[0]), "--save_dir", str(tmp_path), "--seed=5", "--prompt", prompt]
    status, lines = answer(server, "/paint", {"prompt": prompt, "seed": 5, "top_k": 9, "temperature": 2})
    *steps, last = lines[1:]
    assert status == 200 and lines[0] == {"notes": []} and len(steps) > 3 and len(last["records"]) == 8
    assert all(len(step["pictures"]) == len(step["known"]) == 8 for step in steps)
    assert steps[0]["known"] == [1] * 8 and sum(steps[-1]["known"]) > 7 * 8 * 7
    for order in ("--rerank=8", "--rerank=1"):  # best first, or by seed
        sample_module.main([*arguments, order, "--top_k=9", "--temperature=2", "--n=8"])
        entries = json.loads((tmp_path / "samples.json").read_text(encoding="utf-8"))["samples"]
        records = last["records"]
        if order == "--rerank=1":
            records = sorted(records, key=lambda record: record["seed"])
        for entry, record in zip(entries, records):
            assert np.array_equal(shown(record["picture"]), Image.open(tmp_path / entry["file"]))
            assert (record["seed"], record["scores"]) == (entry["seed"], entry["scores"])
    scores = [record["score"] for record in last["records"]]
    assert scores == sorted(scores, reverse=True)
    status, page = answer(server, "/")
    content = page_content(page)
    assert status == 200 and content["live"] and content["side"] == 8
    assert content["settings"]["guidance"] == train.GUIDANCE
    assert "biart_loss.png" in content["figures"]["biart"] and "samples" not in content["made"]


@pytest.mark.slow
def test_the_page_captions_and_completes_pictures(server, loaded):
    image = data.Scenes("val", 3).image(2)
    picture = data.to_image(loaded.crop(image.resize((90, 80))))
    for kind in ("PNG", "BMP", "WEBP"):
        sent = png(image.resize((90, 80)), kind)
        status, lines = answer(server, "/caption", {"image": sent, "n": 3, "seed": 7})
        sent = Image.open(io.BytesIO(base64.b64decode(sent)))
        assert status == 200
        captions = [record["caption"] for record in lines[-1]["records"]]
        assert captions == loaded.caption(sent, n=3, seed=7, rerank=3)
    status, lines = answer(server, "/caption", {"image": png(picture), "n": 1})
    codes, _ = loaded.encode([picture])
    assert np.array_equal(shown(lines[1]["picture"]), picture)
    assert np.array_equal(shown(lines[1]["reconstruction"]), data.to_image(loaded.decode(codes)[0]))
    asked = {"prompt": "two crosses", "image": png(picture), "keep_rows": 5, "n": 2, "seed": 3}
    status, lines = answer(server, "/paint", asked)
    painted = loaded.paint("two crosses", n=2, image=picture, keep_rows=5, seed=3, rerank=2)
    assert lines[1]["known"] == [41, 41]
    for record, expected in zip(lines[-1]["records"], painted):
        assert np.array_equal(shown(record["picture"]), expected)
    # what is lost of a prompt is said
    status, lines = answer(server, "/paint", {"prompt": "red circle zebra " * 30, "n": 1})
    assert "too long" in lines[0]["notes"][0] and "zebra" in lines[0]["notes"][1]


BAD_REQUESTS = [  # what is asked of /paint, and the sentence that comes with 400
    ([], "not an object in JSON"), ("{", "not an object in JSON"), ("[" * 100_000, "not an object in JSON"),
    ("\xff", "not an object in JSON"), ({"prompt": ""}, "prompt is empty"), ({}, "prompt is empty"),
    ({"prompt": "a" * 2001}, "longer than 2,000"), ({"prompt": 7}, "prompt is not str"),
    ({"prompt": "\ud800"}, "surrogates"), ({"prompt": "a", "out_dir": "/etc"}, "no setting: 'out_dir'"),
    ({"prompt": "a", "device": "cuda"}, "no setting"), ({"prompt": "a", "n": 65}, "--n 65 is above 64"),
    ({"prompt": "a", "n": 0}, "--n 0 is not in"), ({"prompt": "a", "n": 1.5}, "n is not int"),
    ({"prompt": "a", "n": True}, "n is not int"), ({"prompt": "a", "n": 10 ** 400}, "is above 64"),
    ({"prompt": "a", "seed": -1}, "--seed -1 is not in"), ({"prompt": "a", "seed": 10 ** 30}, "--seed 1000"),
    ({"prompt": "a", "temperature": math.nan}, "--temperature nan"),
    ({"prompt": "a", "temperature": -math.inf}, "--temperature -inf"),
    ({"prompt": "a", "temperature": 10 ** 400}, "--temperature inf"),
    ({"prompt": "a", "top_p": 0}, "--top_p 0"), ({"prompt": "a", "guidance": -1}, "--guidance -1.0 is not"),
    ({"prompt": "a", "temperature": "1"}, "temperature is not float"),
    ({"prompt": "a", "top_p": None}, "top_p is not float"), ({"prompt": "a", "guidance": 1e9}, "--guidance"),
    ({"prompt": "a", "temperature": 1e300}, "--temperature 1e+300 is not"),
    ({"prompt": "a", "keep_rows": 3}, "go together"), ({"prompt": "a", "image": "AAAA"}, "go together"),
    ({"prompt": "a", "image": "AAAA", "keep_rows": 8}, "8 is not in 1 to 7"),
    ({"prompt": "a", "image": "no base64", "keep_rows": 3}, "not in base64"),
    ({"prompt": "a", "image": "AAAA", "keep_rows": 3}, "not an image"),
    ({"prompt": "a", "image": ["AAAA"], "keep_rows": 3}, "image is not str"),
]


def paint_request(body):
    return b"POST /paint HTTP/1.0\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@pytest.mark.slow
def test_hostile_requests_are_refused_and_the_server_goes_on(server):
    def status(head, body=b"", path="/paint", method="POST"):
        request = f"{method} {path} HTTP/1.1\r\n{head}\r\n\r\n".encode() + body
        return raw_answer(server, request)[0]

    small = Image.new("RGB", (40, 40), "red")
    for asked, sentence in BAD_REQUESTS:
        text = asked if isinstance(asked, str) else json.dumps(asked)
        body = text.encode("latin-1" if text == "\xff" else "utf-8")
        code, error = raw_answer(server, paint_request(body))
        assert code == 400 and sentence in json.loads(error)["error"], (text[:80], code, error)
    # other formats, half a picture, a bomb
    for image in (png(small, "TIFF"), png(small, "PPM"), png(small)[:60],
                  png(Image.new("1", (7100, 7100))), base64.b64encode(b"GIF89a" + bytes(40)).decode()):
        code, [line] = answer(server, "/caption", {"image": image})
        assert code == 400 and "not an image that can be read" in line["error"], line
    assert answer(server, "/caption", {"n": 2})[0] == 400
    # odd addresses, methods, hosts and lengths
    here = "Host: localhost\r\n"
    for path in ("/../sample.py", "/assets/page.html", "/samples.json", "//etc/passwd", "/paint/",
                 "/%2e%2e/x", "x", "/?x=1", "/\0", "http://localhost/"):
        assert status("Host: localhost", path=path, method="GET") in (404, 400), path
        assert status(here + "Content-Length: 2", b"{}", path=path) in (404, 400), path
    for method in ("PUT", "DELETE", "HEAD", "OPTIONS", "CONNECT", "TRACE", "G\0T", "get"):
        assert status("Host: localhost", path="/", method=method) == 501, method
    page = {"path": "/", "method": "GET"}
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io:80", "", "192.168.0.1", "[::2]"):
        assert status(f"Host: {host}", **page) == 403, host
    assert status("Accept: */*", **page) == 403
    for origin in ("http://evil.example", "null", "https://localhost", "http://localhost:1"):
        assert status(f"{here}Origin: {origin}\r\nContent-Length: 2", b"{}") == 403, origin
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "localhost:1\r\nOrigin: http://localhost:1"):
        assert status(f"Host: {host}", **page) == 200, host
    assert status("Host: localhost") == 411
    assert status(here + "Transfer-Encoding: chunked", b"2\r\n{}\r\n0\r\n\r\n") == 411
    for length in ("-1", "two", "1e3", "", "0x10", "9" * 30, "+5", "²"):
        assert status(f"{here}Content-Length: {length}", b"{}") == 400, length
    assert status(here + "Content-Length: 10000001", bytes(10_000_001)) == 413
    assert status(here + "Content-Length: 99999999999") == 413
    assert raw_answer(server, b"\x16\x03\x01\x02\x00\x01\r\n\r\n")[0] == 400  # TLS
    assert raw_answer(server, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n")[0] == 431
    assert raw_answer(server, b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n")[0] == 414
    assert not server.queue and answer(server, "/paint", {"prompt": "a cross", "n": 1})[0] == 200
    # numbers so small or large that float32 has none of them
    for setting in ({"temperature": 1e-300}, {"top_p": 1e-300}, {"temperature": 1e6}, {"guidance": 1e6}):
        assert "records" in answer(server, "/paint", {"prompt": "a cross", "n": 1, **setting})[1][-1], setting


@pytest.mark.slow
def test_what_fails_inside_is_not_shown_and_the_server_goes_on(server, monkeypatch, capfd):
    def fail(*_given):
        raise RuntimeError("a secret")
    with monkeypatch.context() as patched:
        patched.setattr(sample_module, "prompt_notes", fail)
        status, lines = answer(server, "/paint", {"prompt": "a"})
        assert status == 500 and lines == [{"error": "something went wrong on the server"}]
    with monkeypatch.context() as patched:
        patched.setattr(sample_module.Run, "decode", fail)  # in an answer that has begun
        status, lines = answer(server, "/paint", {"prompt": "a"})
        assert status == 200 and lines == [{"notes": []}, {"error": "something went wrong on the server"}]
    assert capfd.readouterr().err.count("RuntimeError: a secret") == 2
    assert answer(server, "/paint", {"prompt": "a", "n": 1})[0] == 200 and not server.queue


def wait_until(true, seconds=10):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.slow
def test_a_client_that_leaves_ends_its_work(server, monkeypatch):
    steps, stay = [], sample_module.Handler.stay

    def slowly(self, *step):
        steps.append(step)
        time.sleep(0.05)
        stay(self)
    monkeypatch.setattr(sample_module.Handler, "stay", slowly)
    request = paint_request(b'{"prompt": "a cross"}')
    first, second = (socket.create_connection(server.server_address) for _ in range(2))
    first.sendall(request)
    wait_until(lambda: len(steps) > 2)
    second.sendall(request)
    wait_until(lambda: len(server.queue) == 2)
    second.close()  # while it waits
    wait_until(lambda: len(server.queue) == 1)
    first.close()  # while its pictures are painted
    wait_until(lambda: not server.queue)
    assert len(steps) < 40  # of 63 passes for one alone


@pytest.mark.slow
def test_twenty_at_once_are_served_and_too_many_are_told(server, loaded, monkeypatch):
    def one(seed):
        return answer(server, "/paint", {"prompt": "a large cross", "n": 1, "seed": seed})
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(one, range(20)))
    for seed, (status, lines) in enumerate(answers):
        assert status == 200
        assert np.array_equal(shown(lines[-1]["records"][0]["picture"]),
                              loaded.paint("a large cross", seed=seed, rerank=1)[0])
    idle = [socket.create_connection(server.server_address) for _ in range(64)]
    assert raw_answer(server, b"")[0] == 503
    for connection in idle:
        connection.close()
    wait_until(lambda: one(3)[0] == 200)
    # half a request, or one that comes byte by byte, does not keep its place
    monkeypatch.setattr(sample_module.Handler, "timeout", 0.5)
    for start in (b"", b"GET / HT", paint_request(bytes(50))[:-40]):
        began = time.monotonic()
        with socket.create_connection(server.server_address) as connection:
            connection.sendall(start)
            with contextlib.suppress(ConnectionError):
                while time.monotonic() < began + 10:
                    connection.settimeout(0.1)
                    with contextlib.suppress(TimeoutError, socket.timeout):
                        if not connection.recv(100):
                            break
                    connection.sendall(b"a")
        assert time.monotonic() - began < 5
    assert one(3)[0] == 200


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_the_server_says_where_it_is_and_ends_on_signals(finished):
    for number, host in ((signal.SIGTERM, "127.0.0.1"), (signal.SIGINT, "0.0.0.0")):
        process = started(sys.executable, "sample.py", "--serve", "--port=0", "--host", host,
                          "--out_dir", finished[0])
        said = "".join(process.stdout.readline() for _ in range(1 + (host == "0.0.0.0")))
        port = re.search(r"http://[\w.]+:(\d+) paints", said)[1]
        server = argparse.Namespace(server_address=("127.0.0.1", int(port)))
        assert answer(server, "/paint", {"prompt": "a cross", "n": 1})[0] == 200
        if host == "127.0.0.1":
            printed = refused("sample.py", "--serve", "--port", port, "--out_dir", finished[0])
            assert f"cannot listen on --host 127.0.0.1 --port {port} (Address already in use)" in printed
        process.send_signal(number)
        printed, _ = process.communicate(timeout=10)
        assert process.returncode == 0 and printed.endswith("ended\n") and "Traceback" not in printed
        assert ("no password" in said) == (host == "0.0.0.0")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser",
                                                "google-chrome"))), None)


class Browser:
    """A page in headless Chromium, driven over its DevTools protocol: JSON on two pipes, closed by zeros."""

    def __init__(self, profile, url, width=1280):
        (theirs, self.to), (self.back, answers) = os.pipe(), os.pipe()

        def place_pipes():  # where Chromium looks for them
            for theirs_at, place in ((theirs, 3), (answers, 4)):
                os.dup2(theirs_at, place)
                os.set_inheritable(place, True)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync",
                 "--remote-debugging-pipe", f"--user-data-dir={profile}", f"--window-size={width},1000"]
        self.process = subprocess.Popen([CHROMIUM, *flags], close_fds=False, preexec_fn=place_pipes,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(answers)
        self.number, self.session, self.faults = 0, {}, []
        target = self.call("Target.createTarget", url=url)["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        self.call("Runtime.enable")
        self.call("Log.enable")

    def call(self, method, **params):
        self.number += 1
        os.write(self.to, json.dumps({"id": self.number, "method": method, "params": params,
                                      **self.session}).encode() + b"\0")
        while True:  # events come, too
            content = b""
            while not content.endswith(b"\0"):
                part = os.read(self.back, 1)
                assert part, "Chromium has ended"
                content += part
            message = json.loads(content[:-1])
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.faults.append(message)
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]

    def run(self, script):
        """-> the value of a JavaScript expression; waits for promises."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script, seconds=30):
        wait_until(lambda: self.run(script), seconds)

    def close(self):
        with contextlib.suppress(AssertionError, OSError):
            self.session = {}
            self.call("Browser.close")
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.back)


@pytest.fixture
def browse(tmp_path):
    """browse(url, width) -> a Browser, closed at the end. It must not have found a fault in the page."""
    if not CHROMIUM:
        pytest.skip("there is no Chromium here")
    browsers = []

    def browse(url, width=1280):
        browsers.append(Browser(tmp_path / f"profile_{len(browsers)}", url, width))
        browsers[-1].wait("location.href != 'about:blank' && document.readyState == 'complete'")
        return browsers[-1]
    yield browse
    for browser in browsers:
        browser.close()
    assert not [fault for browser in browsers for fault in browser.faults]


@pytest.mark.slow
def test_the_page_in_a_browser(server, loaded, browse, tmp_path):
    page, prompt = browse("http://localhost:%d/" % server.server_address[1], width=390), "a small red circle"
    idle = "!document.body.dataset.busy && "
    page.run("document.getElementById('prompt').focus(); document.getElementById('seed').value = 3")
    page.call("Input.insertText", text=prompt)
    for kind in ("rawKeyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)
    page.wait(idle + "document.querySelectorAll('.painting').length == 8")
    urls = page.run("[...document.querySelectorAll('.painting img')].map(image => image.src)")
    for url, expected in zip(urls, loaded.paint(prompt, n=8, seed=3, rerank=8)):
        assert np.array_equal(shown(url), expected)
    said = page.run("document.getElementById('status').textContent")
    assert "explains the caption best comes first" in said
    # one of them back: what does it show, and what else could begin like this?
    page.run("document.querySelectorAll('.painting button')[2].click()")
    page.run("document.querySelector('.tools .caption button').click()")
    page.wait(idle + "document.querySelectorAll('.says li').length > 0")
    picture = Image.fromarray(shown(urls[2]))
    said = page.run("[...document.querySelectorAll('.says button')].map(x => x.firstChild.textContent)")
    assert said == list(dict.fromkeys(loaded.caption(picture, n=4, seed=3, rerank=4)))
    page.run("document.querySelector('.tools input[type=range]').value = 6")
    page.run("document.querySelector('.tools input[type=text]').value = 'two crosses'")
    page.run("document.querySelector('.tools button.complete').click()")
    page.wait(idle + "document.querySelectorAll('.painting').length == 16")
    url = page.run("document.querySelector('.painting img').src")
    completed = loaded.paint("two crosses", 8, picture, keep_rows=6, seed=3, rerank=8)
    assert np.array_equal(shown(url), completed[0])
    # a file is dropped; what is no picture is refused with a sentence
    drop = """{const data = new DataTransfer(), bytes = Uint8Array.from(atob('%s'), c => c.charCodeAt(0));
              data.items.add(new File([bytes], 'a.png', {type: 'image/png'}));
              document.dispatchEvent(new DragEvent('drop', {dataTransfer: data, cancelable: true}))}"""
    page.run(drop % png(data.Scenes("val", 1).image(0)))
    page.wait(idle + "document.querySelectorAll('.captioned').length == 2")
    assert page.run("document.querySelector('.captioned .pair img').naturalWidth") == 64
    assert page.run("innerWidth") == 390 and page.run("document.documentElement.scrollWidth <= 390")
    assert not page.faults
    page.run(drop % base64.b64encode(b"no picture").decode())
    page.wait("document.getElementById('status').textContent.includes('not an image that can be read')")
    page.faults.clear()  # the browser notes the refusal, too


@pytest.mark.slow
def test_the_page_in_a_file_shows_what_was_made(finished, browse, tmp_path):
    sample_module.main(["--out_dir", str(finished[0]), "--save_dir", str(tmp_path), "--html", "--n=2",
                        "--prompt", "</script><b>a cross & more</b>"])
    page = browse((tmp_path / "page.html").as_uri())
    assert page.run("document.querySelectorAll('#made figure img').length") > 8
    assert page.run("[...document.images].every(image => image.naturalWidth > 0)")
    assert "paint: </script><b>a cross & more</b>" in page.run("document.body.innerText")
    assert page.run("document.querySelector('b') === null && document.getElementById('ask').hidden")


@pytest.mark.slow
def test_the_shipped_weights_have_the_scores_recorded(tmp_path):
    shipped = pathlib.Path(HERE, "assets", "scenes")
    assert sum(path.stat().st_size for path in shipped.iterdir()) < 6e6
    recorded = json.loads((shipped / "scores.json").read_text())
    found = last_json(python("sample.py", "--out_dir", shipped, "--save_dir", tmp_path, "--eval",
                             "--eval_items", recorded["settings"]["eval_items"]))
    assert set(found) == set(recorded["scores"])
    for name, score in recorded["scores"].items():  # one item's worth of rounding is allowed
        assert found[name] == pytest.approx(score, rel=0.03, abs=0.03), name
