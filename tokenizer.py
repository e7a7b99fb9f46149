"""
Byte-level byte pair encoding (BPE): text -> integers -> the same text.

Text becomes UTF-8 bytes, so a vocabulary of 256 ids can already write anything. BPE then makes the common
things short: it takes the pair of neighbouring ids that occurs most often in some training text, gives it
an id of its own, and repeats. To encode new text, the same merges are done in the order they were learned.
Merges never cross words, which keeps the tokens meaningful and lets training count each distinct word once.
The same class also reads the merge list that comes with CLIP, and then gives exactly CLIP's ids.

>>> tok = Tokenizer.train(["low lower lowest slow"], vocab_size=261)
>>> tok.merges                      # "l"+"o" is now 256, "lo"+"w" is 257, " "+"low" is 258
[(108, 111), (256, 119), (32, 257)]
>>> tok.encode("low lower")
[257, 258, 101, 114]
>>> tok.decode([257, 258, 101, 114])
'low lower'

References:
1) BPE for text, Sennrich et al. 2016, https://arxiv.org/abs/1508.07909
2) GPT-2, from bytes, words keep the space before them: https://github.com/openai/gpt-2, src/encoder.py
3) CLIP, lower-case, a mark on a word's last byte: https://github.com/openai/CLIP, clip/simple_tokenizer.py
"""
import functools
import gzip
import hashlib
import html
import itertools
import json
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from typing import NamedTuple

FILE_FORMAT = "byte-level BPE tokenizer"  # the first field of a saved file, by which load knows its own
CLIP_MERGES = 48894  # the merge list holds 262144, CLIP stops at this many: 49408 - 2*256 - 2
CACHE_WORDS = 2**16  # the ids of this many distinct words are remembered, some 10 MB


# -----------------------------------------------------------------------------
# The two loops of BPE: learning merges from counted words, and applying them to one word

def pairs(ids):
    """The neighbours: [1, 2, 3] -> (1, 2), (2, 3)."""
    return zip(ids, ids[1:])


def replace_pair(ids, pair, new_id):
    """Replaces every `pair` by `new_id`, from left to right: ([1, 1, 1, 2], (1, 1), 9) -> [9, 1, 2]."""
    out = []
    for i in ids:
        if out and (out[-1], i) == pair:
            out[-1] = new_id
        else:
            out.append(i)
    return out


def learn_merges(word_counts, first_id, n_merges):
    """
    Learns up to `n_merges` merges, fewer if no pair is left that occurs at least twice. `word_counts` maps
    a word (tuple of ids) to how often it occurs; the i-th merge makes the id first_id + i.
    ({(1, 2, 3): 5, (1, 2): 1}, 256, 2) -> [(1, 2), (256, 3)]

    This is the whole idea, hundreds of times slower:

        words, merges = list(word_counts), []
        while len(merges) < n_merges:
            counts = Counter()
            for word, original in zip(words, word_counts):
                for pair in pairs(word):
                    counts[pair] += word_counts[original]
            best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)  # of equals the smallest
            if counts[best] < 2:
                break
            words = [replace_pair(word, best, first_id + len(merges)) for word in words]
            merges.append(best)
    """
    # Here only the words that hold the merged pair are counted anew. The heap is not told when a count falls:
    # what comes out on top is compared with the true count, and goes back if it promised too much.
    words, counts = [list(word) for word in word_counts], list(word_counts.values())
    pair_counts = Counter()
    pair_words = defaultdict(set)  # pair -> indices of words that have it, or had it once
    for w, word in enumerate(words):
        for pair in pairs(word):
            pair_counts[pair] += counts[w]
            pair_words[pair].add(w)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapify(heap)
    merges = []
    while heap and len(merges) < n_merges:
        promised, best = heappop(heap)
        count = pair_counts[best]
        if count != -promised:
            heappush(heap, (-count, best))
            continue
        if count < 2:
            break
        new_id = first_id + len(merges)
        merges.append(best)
        new_pairs = set()  # those with new_id; a count of any other pair can only fall
        for w in pair_words.pop(best):
            for pair in pairs(words[w]):
                pair_counts[pair] -= counts[w]
            words[w] = replace_pair(words[w], best, new_id)
            for pair in pairs(words[w]):
                pair_counts[pair] += counts[w]
                if new_id in pair:
                    pair_words[pair].add(w)
                    new_pairs.add(pair)
        for pair in new_pairs:
            heappush(heap, (-pair_counts[pair], pair))
    return merges


def apply_merges(ids, pair_ids):
    """
    Merges one word as far as it goes. `pair_ids` maps a pair to the id that it becomes; ids are given in the
    order of learning, so the pair with the smallest new id merges first, of equals the leftmost.
    ([104, 101, 108, 108, 111], {(108, 108): 256, (101, 256): 257}) -> [104, 257, 111]
    """
    # A linked list with a heap of possible merges: n log n, so that a "word" of 100,000 letters is harmless.
    # The None at the end merges with nothing, and stands for both missing neighbours: ids[n] and ids[-1].
    n = len(ids)
    ids = [*ids, None]
    before, after = list(range(-1, n)), list(range(1, n + 2))
    heap = [(pair_ids[pair], i) for i, pair in enumerate(pairs(ids)) if pair in pair_ids]
    heapify(heap)
    while heap:
        new_id, i = heappop(heap)
        j = after[i]
        if pair_ids.get((ids[i], ids[j])) != new_id:
            continue  # one of the two has merged with its other neighbour since
        ids[i], ids[j] = new_id, None
        k = after[i] = after[j]
        before[k] = i
        for left, right in ((before[i], i), (i, k)):
            candidate = pair_ids.get((ids[left], ids[right]))
            if candidate is not None:
                heappush(heap, (candidate, left))
    return [i for i in ids if i is not None]


# -----------------------------------------------------------------------------
# The two kinds of tokenizer: how they cut text into words, and number their first ids

CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"


def trained_words(text):
    r"""
    Cuts text into words and loses nothing: "It's  2 late_\n" -> ["It", "'s", " ", " 2", " late", "_", "\n"]
    One space goes with the word after it, digits stand alone, and of a run of white space the last space is
    left to the word that follows. Every character is in one of [^\W\d_], \d, [^\w\s], _ and \s.
    """
    return re.findall(rf"{CONTRACTIONS}| ?[^\W\d_]+| ?\d| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+", text)


def clip_words(text):
    r"""Cleans and cuts like CLIP: " IT&#39;s\n 20  ⅷ." -> ["it", "'s", "2", "0", "ⅷ", "."]"""
    text = html.unescape(html.unescape(text))
    # CLIP also lets ftfy repair the text. Its `regex`, unlike `re`, takes U+001C..U+001F for no white space.
    return clip_pattern().findall(re.sub(r"[^\S\x1c-\x1f]+", " ", text).strip().lower())


@functools.cache
def clip_pattern():
    r"""
    CLIP needs the package `regex` for \p{L} and \p{N}, all of Unicode's letters and numbers. But \w is just
    these two and "_", so a class of the numbers (some 130 ranges) is all that Python's own `re` lacks.
    """
    numbers = ""
    for kind, run in itertools.groupby(range(sys.maxunicode + 1), lambda c: unicodedata.category(chr(c))[0]):
        if kind == "N":
            codes = list(run)
            numbers += f"{chr(codes[0])}-{chr(codes[-1])}"
    # CLIP ignores case, which after lower() matters in two places only: "ſ" is taken for an "s" here, and
    # the combining iota U+0345, a mark whose capital is a letter, fits no class at all and vanishes.
    fixed = rf"(?i:<\|startoftext\|>|<\|endoftext\|>|{CONTRACTIONS})"
    return re.compile(rf"{fixed}|[^\W_{numbers}]+|[{numbers}]|(?:[^\w \u0345]|_)+")


# GPT-2 had the idea to write merges of bytes as readable text: bytes that are visible in Latin-1 stand for
# themselves, the other 68 borrow the characters from U+0100 on: a space is written "Ġ". CLIP's ids have
# the visible ones first, so a space is 220.
VISIBLE = bytes([*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)])
HIDDEN = bytes(b for b in range(256) if b not in VISIBLE)


def read_clip_merges(content):
    """The bytes of CLIP's merge list, bpe_simple_vocab_16e6.txt.gz -> merges: pairs of ids."""
    symbols = [chr(b) for b in VISIBLE] + [chr(256 + i) for i in range(len(HIDDEN))]
    symbols += [symbol + "</w>" for symbol in symbols]
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    merges = []
    for line in gzip.decompress(content).decode("utf-8").split("\n")[1:CLIP_MERGES + 1]:  # [0] is a header
        left, right = line.split(" ")
        merges.append((ids[left], ids[right]))
        ids[left + right] = len(ids)
    if len(merges) < CLIP_MERGES:
        raise ValueError(f"only {len(merges)} merges, CLIP's list has at least {CLIP_MERGES}")
    return merges


class Kind(NamedTuple):
    """Everything in which the kinds of tokenizer differ."""
    words: Callable  # text -> its words, cleaned
    byte_order: bytes  # the byte that each of the ids 0..255 stands for
    marks_word_end: bool  # True: ids 256..511 are the same bytes once more, as the last one of a word
    specials: dict  # role -> how it is spelled in text, if at all; these tokens have the last ids


KINDS = {
    "trained": Kind(trained_words, bytes(range(256)), False, {"end": None, "pad": None}),
    # CLIP has no token for padding. Its start token is of no other use here, so that is what pads, and the
    # vocabulary stays at 49408. CLIP also finds both where a text spells them out, and so does this.
    "clip": Kind(clip_words, VISIBLE + HIDDEN, True, {"pad": "<|startoftext|>", "end": "<|endoftext|>"}),
}


class Tokenizer:
    """
    Text -> ids and back. Made by Tokenizer.train or Tokenizer.load.
    len(tokenizer) is the size of the vocabulary, ids are 0 <= id < len(tokenizer);
    tokenizer.end and tokenizer.pad are the ids of the two special tokens, which stand for no text.
    """

    def __init__(self, kind, merges):
        self.kind, self.rules = kind, KINDS[kind]
        self.merges = [tuple(pair) for pair in merges]
        byte_order = self.rules.byte_order
        self.byte_ids = bytes(byte_order.index(b) for b in range(256))  # byte -> id, for bytes.translate
        self.vocab = [bytes([b]) for b in byte_order]  # id -> bytes
        if self.rules.marks_word_end:
            self.vocab += [token + b" " for token in self.vocab]
        self.pair_ids = {pair: i for i, pair in enumerate(self.merges, len(self.vocab))}
        for left, right in self.merges:
            self.vocab.append(self.vocab[left] + self.vocab[right])
        special_ids = {role: i for i, role in enumerate(self.rules.specials, len(self.vocab))}
        self.end, self.pad = special_ids["end"], special_ids["pad"]
        self.spelled_ids = {text: special_ids[role] for role, text in self.rules.specials.items() if text}
        self.vocab += [b""] * len(special_ids)
        self.encode_word = functools.lru_cache(CACHE_WORDS)(self.encode_word)

    def __reduce__(self):
        return Tokenizer, (self.kind, self.merges)  # pickled without what is remembered

    def __len__(self):
        return len(self.vocab)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """
        Learns a vocabulary from texts (any iterable of strings, read once).
        vocab_size counts everything: 256 bytes, the merges, and the 2 special tokens. It is an upper limit:
        training stops early when no pair of tokens occurs twice any more. The same texts always give the
        same vocabulary. Raises ValueError if vocab_size is below 258, TypeError if texts is a single string.
        """
        if vocab_size < 258:
            raise ValueError(f"vocab_size is {vocab_size} but must be at least 258: 256 bytes + end + pad")
        if isinstance(texts, str):
            raise TypeError("texts is a single string but must be an iterable of strings")
        counts = Counter(word for text in texts for word in trained_words(text))
        word_counts = {tuple(word.encode("utf-8")): count for word, count in counts.items()}
        return cls("trained", learn_merges(word_counts, first_id=256, n_merges=vocab_size - 258))

    def encode(self, text: str) -> list[int]:
        """
        Text to ids, without end or pad: "low lower" -> [257, 258, 101, 114]. For a trained tokenizer all text
        is ordinary text; a CLIP one has the ids 49406 and 49407 for "<|startoftext|>" and "<|endoftext|>".
        Raises ValueError (as UnicodeEncodeError) if text contains a lone surrogate, which is no character.
        """
        return [i for word in self.rules.words(text) for i in self.encode_word(word)]

    def encode_word(self, word):
        """The ids of a single word as rules.words found it: " lower" -> (258, 101, 114)."""
        if word in self.spelled_ids:
            return (self.spelled_ids[word],)
        ids = list(word.encode("utf-8").translate(self.byte_ids))
        if self.rules.marks_word_end:
            ids[-1] += 256
        return tuple(apply_merges(ids, self.pair_ids))

    def encode_padded(self, text: str, length: int) -> tuple[list[int], bool]:
        """
        Exactly `length` >= 1 ids, and whether the text had to be cut: text, end token, then pad tokens.
        A text that is too long is cut, not its end token: [257, 258, 101, 114] in 4 -> [257, 258, 101, end]
        What spells out one of CLIP's special tokens is left out, so that the first end token is the end.
        Raises ValueError if length is below 1.
        """
        if length < 1:
            raise ValueError(f"length is {length} but must be at least 1, for the end token")
        ids = [i for i in self.encode(text) if i not in (self.end, self.pad)]
        padded = ids[:length - 1] + [self.end] + [self.pad] * (length - 1 - len(ids))
        return padded, len(ids) >= length

    def decode(self, ids: Iterable[int]) -> str:
        """
        Ids to text; end and pad give none. What a trained tokenizer has encoded comes back exactly; from CLIP
        it comes in lower case with a space between any two words. Ids that a model made up need not be valid
        UTF-8: broken parts become U+FFFD. Raises ValueError if an id is not in 0..len(tokenizer)-1.
        """
        tokens = []
        for i in ids:
            if not 0 <= i < len(self.vocab):
                raise ValueError(f"token id {i} is out of range, valid ids are 0 to {len(self.vocab) - 1}")
            tokens.append(self.vocab[i])
        text = b"".join(tokens).decode("utf-8", errors="replace")
        return text.strip() if self.rules.marks_word_end else text

    def fingerprint(self) -> str:
        """16 hex digits that identify the vocabulary, to tell if a model was trained with another one."""
        return hashlib.sha256(json.dumps([self.kind, self.merges]).encode()).hexdigest()[:16]

    def save(self, path):
        """Writes a JSON file, all at once: whoever looks sees the old file or the new, never half of it."""
        temporary = f"{os.fspath(path)}.tmp"
        with open(temporary, "w", encoding="utf-8") as f:
            json.dump({"format": FILE_FORMAT, "kind": self.kind, "merges": self.merges}, f)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """
        Reads what save wrote, or CLIP's merge list, gzipped as it comes: its ids are exactly CLIP's 49408.
        Raises ValueError if the file is missing, damaged, or something else.
        """
        try:
            with open(path, "rb") as f:
                content = f.read()
            if content.startswith(b"\x1f\x8b"):  # of a gzipped file
                return cls("clip", read_clip_merges(content))
            record = json.loads(content)
            if not isinstance(record, dict) or record.get("format") != FILE_FORMAT:
                raise ValueError("JSON of something else")
            if record["kind"] not in KINDS:
                raise ValueError(f"kind {record['kind']!r} is none of: {', '.join(KINDS)}")
            if any(i < 0 for pair in record["merges"] for i in pair):
                raise ValueError("negative ids in merges")
            return cls(record["kind"], record["merges"])  # fails where a merge is no pair of earlier ids
        except Exception as e:  # a damaged file fails in many ways: gzip, UTF-8, JSON, ids, ...
            raise ValueError(f"cannot read {path} as a tokenizer file ({type(e).__name__}: {e})") from e
