"""
BiART: one GPT that paints an image from a caption and captions an image, over text and AugVAE's image tokens.

    text -> image                                   image -> text
    tokens    t_1 ... t_64  i_1 ... i_1024          tokens    i_1 ... i_1024  t_1 ... t_64
    segment   REF ... REF   GEN ... GEN             segment   REF ... REF     GEN ... GEN
    predicts   -  ... i_1   i_2 ...  -              predicts   -  ... t_1     t_2 ...  -

A token's embedding is token + segment + position. The segment says which side is given (REF) and which is
generated (GEN), and so which way the model runs. Attention is causal over the whole sequence in both layouts.
Both have the same length, so that half of a batch runs each way in one forward pass.

References:
1) L-Verse, Kim et al. 2022, https://arxiv.org/abs/2111.11133 (section 3.2); the authors' recipe is minGPT
   plus a two-entry segment embedding.
2) GPT-2, Radford et al. 2019, for the blocks and the initialisation.
3) Classifier-free guidance, Ho & Salimans 2022, https://arxiv.org/abs/2207.12598; its choice among plausible
   tokens is contrastive decoding's, Li et al. 2022, https://arxiv.org/abs/2210.15097.
"""
import contextlib
import functools
import math
import timeit
import warnings
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

is_compiling = getattr(torch.compiler, "is_compiling", lambda: False)  # came with torch 2.3
REF, GEN = 0, 1
OTHER = {"text": "image", "image": "text"}
# With guidance, tokens less than so many times as likely as the likeliest are out. The odds that a thing
# never seen begins at a place are nearly as small: at 0.03, some captions gave nothing but empty pictures.
PLAUSIBLE = 0.003
FASTEST_WINDOWS = {4: 16, 16: 8, 256: 4}  # of generate(), measured on 2 cores: up to so many images, this one


def derived(default):
    """A setting that follows from the tokenizer or AugVAE, and so is not asked for on the command line."""
    return field(default=default, metadata={"derived": True})


@dataclass
class BiARTConfig:
    """The defaults are the released size, over CLIP's vocabulary and the 32x32 grid of AugVAE-SL."""
    n_layer: int = 24  # transformer blocks
    n_head: int = 16  # attention heads
    n_embd: int = 1024  # channels of the residual stream
    dropout: float = 0.0  # of embeddings and residual branches; on attention it would cost the fused kernel
    n_text: int = 64  # text tokens in a sequence, end and padding included
    positions: str = "modality"  # modality (text: index; image: row + column), sequence (published: absolute)
    null_prob: float = 0.1  # how often training blanks the whole REF side, for classifier-free guidance
    ref_loss: float = 0.0  # weight of the cross-entropy over REF tokens; 0 trains on GEN tokens alone
    t2i_weight: float = 1.0  # weight of text -> image in the loss, where image -> text has 1
    replace_prob: float = 0.0  # share of GEN image tokens that are others of the batch in training's inputs
    code_hidden: int = 0  # image tokens are embedded by an MLP of so many units of AugVAE's codes; 0: learned
    text_vocab: int = derived(49408)  # entries of the tokenizer
    end_token: int = derived(49407)  # closes every caption
    pad_token: int = derived(49406)  # fills up behind it
    image_vocab: int = derived(8192)  # entries of the codebook
    image_side: int = derived(32)  # rows, and columns, of image tokens
    code_dim: int = derived(256)  # length of a code

    limits = {"n_layer": "[1, inf)", "n_head": "[1, inf)", "n_embd": "[1, inf)", "dropout": "[0, 1)",
              "n_text": "[2, inf)", "null_prob": "[0, 1]", "ref_loss": "[0, inf)",
              "t2i_weight": "[0, inf)", "replace_prob": "[0, 1]", "code_hidden": "[0, inf)"}
    choices = {"positions": ("modality", "sequence")}

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")

    @property
    def n_image(self):
        return self.image_side ** 2

    def length(self, modality):
        return {"text": self.n_text, "image": self.n_image}[modality]

    def vocab(self, modality):
        return {"text": self.text_vocab, "image": self.image_vocab}[modality]


# -----------------------------------------------------------------------------
# The transformer

def causal_attention(q, k, v):
    """q, k, v (B, nh, T, hs) -> softmax(q k^T / sqrt(hs)) v, without a look ahead: (B, nh, T, hs)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class CausalSelfAttention(nn.Module):
    """attention(ln(x)): the layer norm in front is part of it."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        # Query, key and value in one. Without bias: the key's has no effect, so its gradient is rounding
        # noise, which Adam would blow up to full steps, others on two GPUs than on one.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.ln = nn.LayerNorm(config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x, attend):
        B, T, C = x.shape
        qkv = norm_linear(x, self.ln, self.c_attn)  # = self.c_attn(self.ln(x))
        q, k, v = qkv.view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4).unbind()  # (B, nh, T, hs)
        y = attend(q, k, v)  # causal_attention, or while decoding KVCache.attend, which equals it
        y = y.transpose(1, 2).reshape(B, T, C)
        y = linear(y, self.c_proj.weight, self.c_proj.bias)  # = self.c_proj(y)
        return dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """mlp(ln(x)): the layer norm in front is part of it."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.ln = nn.LayerNorm(config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x):
        x = norm_linear(x, self.ln, self.c_fc)  # = self.c_fc(self.ln(x))
        x = gelu_linear(x, self.c_proj)  # = self.c_proj(F.gelu(x))
        return dropout(x, self.dropout, self.training)


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)

    def forward(self, x, attend=causal_attention, starts=None):
        """(B, T, C) -> (B, T, C), or, with starts, the part of it that `tails` leaves: (N, C)."""
        x = x + self.attn(x, attend)  # x + attn(ln(x))
        x = x if starts is None else tails(x, starts)
        x = x + self.mlp(x)  # x + mlp(ln(x))
        return x


class CodeEmbedding(nn.Module):
    """
    Embeddings of the image codes, (V, C), as nn.Embedding's: weight = own_share * own + MLP(AugVAE's code
    vectors). What is learned of one code so holds for all that look alike, on both ends, as output weights
    are the same. As Adam's steps are of one size, a small own_share lets what codes have in common go first.
    """
    own_share = 0.2

    def __init__(self, config):
        super().__init__()
        c = config
        self.register_buffer("vectors", torch.randn(c.image_vocab, c.code_dim))  # see know_codes()
        self.c_fc = nn.Linear(c.code_dim, c.code_hidden)
        self.c_proj = nn.Linear(c.code_hidden, c.n_embd)
        self.own = nn.Parameter(torch.empty(c.image_vocab, c.n_embd))
        self.kept = None

    @property
    def weight(self):
        """(V, C). Decoding asks for it at every token: in eval mode it is computed once."""
        if self.kept is not None and not torch.is_grad_enabled():
            return self.kept
        with torch.autocast(self.own.device.type, enabled=False):
            weight = self.own_share * self.own + self.c_proj(F.gelu(self.c_fc(self.vectors)))
        if not (self.training or torch.is_grad_enabled()):
            self.kept = weight
        return weight

    def train(self, mode=True):
        self.kept = None
        return super().train(mode)

    def forward(self, tokens):
        return F.embedding(tokens, self.weight)


# -----------------------------------------------------------------------------
# The model

class BiART(nn.Module):
    """
    Text is LongTensor (B, n_text), padded behind its end token; images LongTensor (B, n_image), row by row.
    A direction is named by what it generates: to="image" or to="text".
    """
    use_cuda_graphs = True  # on CUDA, decode by graphs, unless the blocks are sharded

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.token = nn.ModuleDict({m: nn.Embedding(c.vocab(m), c.n_embd) for m in OTHER})
        if c.code_hidden:
            self.token["image"] = CodeEmbedding(c)
        self.null = nn.ParameterDict({m: nn.Parameter(torch.empty(c.n_embd)) for m in OTHER})
        self.segment = nn.Embedding(2, c.n_embd)
        if c.positions == "modality":
            self.text_position = nn.Embedding(c.n_text, c.n_embd)
            self.row_position = nn.Embedding(c.image_side, c.n_embd)
            self.column_position = nn.Embedding(c.image_side, c.n_embd)
        else:
            self.position = nn.Embedding(c.n_text + c.n_image, c.n_embd)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd)
        self.init_weights()

    def init_weights(self):
        """
        GPT-2's: normal(0, 0.02), projections into the residual stream scaled down by sqrt(2 n_layer). The
        0.02 suits the released width of 1024; narrower models start proportionally larger, or attention takes
        long to wake up.
        """
        std = 0.02 * (1024 / self.config.n_embd) ** 0.5
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith(("ln.weight", "ln_f.weight")):
                nn.init.ones_(p)
            elif name == "token.image.own":
                nn.init.zeros_(p)
            elif name.startswith("token.image.c_"):  # so that embeddings get this std, too
                nn.init.normal_(p, std=p.shape[1] ** -0.5 * (1 if "c_fc" in name else 1.5 * std))
            else:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.n_layer) if residual else std)

    @torch.no_grad()
    def know_codes(self, vectors):
        """With code_hidden: AugVAE's codes (image_vocab, code_dim), kept with mean 0 and variance 1."""
        if self.config.code_hidden:
            self.token["image"].vectors.copy_((vectors - vectors.mean(0)) / vectors.std())

    def position_embedding(self, modality, segment):
        """Segment + position embeddings of one side of the sequence: (n, C)."""
        c = self.config
        if c.positions == "sequence":
            start = 0 if segment == REF else c.length(OTHER[modality])
            position = self.position.weight[start:start + c.length(modality)]
        elif modality == "text":
            position = self.text_position.weight
        else:  # (side, 1, C) + (1, side, C)
            position = (self.row_position.weight[:, None] + self.column_position.weight[None]).flatten(0, 1)
        return position + self.segment.weight[segment]

    def embed_side(self, tokens, modality, segment, null=None):
        """tokens (B, n), the first n of a side -> (B, n, C), replaced by null embeddings where null (B,)."""
        x = self.token[modality](tokens)
        if null is not None:
            x = torch.where(null[:, None, None], self.null[modality].to(x.dtype), x)
        return x + self.position_embedding(modality, segment)[:tokens.shape[1]]

    def embed(self, text, image, to, null=None):
        """
        The layout of one direction: (B, n_text + n_image, C). Where null (B,), its REF side is blank. In
        training, replace_prob of the GEN image's tokens are others of the batch: what comes next must then be
        read off the caption, and cannot be what once followed the tokens before.
        """
        if to == "image" and self.training and self.config.replace_prob:
            others = image.flatten()[torch.randperm(image.numel(), device=image.device)].view_as(image)
            replaced = torch.rand(image.shape, device=image.device) < self.config.replace_prob
            image = torch.where(replaced, others, image)
        sides, ref = {"text": text, "image": image}, OTHER[to]
        ref_side, gen_side = self.embed_side(sides[ref], ref, REF, null), self.embed_side(sides[to], to, GEN)
        return torch.cat([ref_side, gen_side], dim=1)

    def transformer(self, x, starts=None, cache=None):
        """
        (B, T, C) -> (B, T, C), before the final layer norm. With starts, the last block's MLP skips the
        positions before them, and the result is what `tails` leaves: (N, C).
        """
        x = dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.blocks):
            attend = functools.partial(cache.attend, i) if cache is not None else causal_attention
            x = block(x, attend, starts if i == self.config.n_layer - 1 else None)
        return x

    def logits(self, h, modality):
        """
        Hidden states (..., C) -> logits of the next token (..., vocab of the modality it belongs to): image
        positions choose among the image codes only, text positions among the text only. As in GPT-2, the
        weights are the embedding's.
        """
        return linear(self.ln_f(h), self.token[modality].weight)  # = self.ln_f(h) @ weight.T

    def loss_mask(self, tokens, modality):
        """(B, n) -> bool (B, n), which tokens count: all but padding. The end token is no padding."""
        return (tokens != self.config.pad_token if modality == "text"
                else torch.ones_like(tokens, dtype=torch.bool))

    def cross_entropy(self, h, targets, modality):
        """
        Hidden states (B, n, C), each of the position before its target, and targets (B, n) -> the mean over
        samples of the mean over a sample's tokens, a scalar; and each sample's sum, to read: (B,). Nats.
        Padding does not count.
        """
        mask = self.loss_mask(targets, modality)
        token_weights = mask / mask.sum(1, keepdim=True) / len(targets)
        # = (token_weights * F.cross_entropy(self.logits(h), targets)).sum(), and the cross-entropies
        mean, nll = LinearCrossEntropy.apply(self.ln_f(h).flatten(0, 1), self.token[modality].weight,
                                             targets.flatten(), token_weights.flatten(),
                                             torch.is_grad_enabled())
        return mean, (nll.view_as(targets) * mask).sum(1)

    def forward(self, text, image, null=None):
        """
        A training step's loss: samples 0, 2, 4 ... run text -> image, 1, 3, 5 ... image -> text, in one pass.

        text (B, n_text), image (B, n_image), null bool (B,) or None -> loss, a scalar in nats a token, the
        mean of the two directions (weighted by t2i_weight and 1), and {"t2i": ..., "i2t": ...}. Each is the
        mean over its samples of the sample's mean over its tokens, which does not depend on how a batch is
        spread over ranks.
        Raises ValueError where B is odd.
        """
        if len(text) % 2:
            raise ValueError(f"batch size {len(text)} is odd: half of a batch runs in each direction")
        c, B, T = self.config, len(text) // 2, self.config.n_text + self.config.n_image
        halves = {"image": {"text": text[0::2], "image": image[0::2]},
                  "text": {"text": text[1::2], "image": image[1::2]}}
        nulls = (None, None) if null is None else (null[0::2], null[1::2])
        x = torch.cat([self.embed(**sides, to=to, null=n) for (to, sides), n in zip(halves.items(), nulls)])
        starts = [0 if c.ref_loss else c.length(OTHER[to]) - 1 for to in halves]  # what predicts a target
        h = self.transformer(x, starts).split([B * (T - start) for start in starts])
        losses = []
        for (to, sides), start, part in zip(halves.items(), starts, h):
            ref, part = OTHER[to], part.view(B, T - start, -1)
            last_ref = c.length(ref) - 1 - start  # it predicts the first GEN token
            loss, _ = self.cross_entropy(part[:, last_ref:-1], sides[to], to)
            if c.ref_loss:
                loss = loss + c.ref_loss * self.cross_entropy(part[:, :last_ref], sides[ref][:, 1:], ref)[0]
            losses.append(loss)
        t2i, i2t = losses
        loss = (c.t2i_weight * t2i + i2t) / (c.t2i_weight + 1)
        return loss, {"t2i": t2i.detach(), "i2t": i2t.detach()}

    # -------------------------------------------------------------------------
    # Generation: prefill reads the prompt, decode_step adds tokens, generate and beam_search choose them

    def packed(self, to, rows):
        """`packed`, of all layers and the logits of `to`; of none for single rows or sharded blocks."""
        layers = [layer.weight for layer in self.blocks.modules() if isinstance(layer, nn.Linear)]
        return packed([] if self.sharded or rows == 1 else [*layers, self.token[to].weight], rows)

    @property
    def sharded(self):
        """Whether blocks fetch weights from other ranks (FSDP); then all ranks must do equally many steps."""
        return hasattr(self.blocks[0].attn.c_attn.weight, "full_tensor")

    def prefill(self, ref, to, prefix, guidance=1, cache=None):
        """
        ref (B, n_ref) and the first GEN tokens, prefix (B, m) -> hidden states of the last REF token and of
        the prefix: (B, 1 + m, C). With guidance, the B prompts with a blank REF side go along as the second
        half of the batch: (2 B, 1 + m, C). The cache, if any, keeps the prompts' keys and values.
        """
        null = torch.zeros(len(ref), dtype=torch.bool, device=ref.device)
        if guidance != 1:
            ref, prefix, null = ref.repeat(2, 1), prefix.repeat(2, 1), torch.cat([null, ~null])
        x = torch.cat([self.embed_side(ref, OTHER[to], REF, null), self.embed_side(prefix, to, GEN)], dim=1)
        h = self.transformer(x, [ref.shape[1] - 1], cache)
        return h.view(len(x), -1, x.shape[2])

    def decode_step(self, x, pos, kv_len, guidance, cache):
        """
        Embeddings x (B, n, W, C): W tokens of each of n candidates, at pos (B, n, W), counted from behind the
        prompt -> hidden states (B, n, W, C), or with guidance (2 B, n, W, C). Of the candidates' own keys and
        values the first kv_len are read; no pos lies beyond.
        """
        if guidance != 1:
            x, pos = x.repeat(2, 1, 1, 1), pos.repeat(2, 1, 1)
        cache.seek(pos, kv_len)
        return self.transformer(x.flatten(1, 2), cache=cache).view_as(x)

    def next_logits(self, h, to, guidance):
        """
        Hidden states (B, ..., C), or with guidance (2 B, ..., C) -> logits by which to choose what follows,
        and the log p that it has without guidance, (B, ..., V) each.
        Classifier-free guidance with two changes. It is scaled by doubt, 1 - max p: in full, it would
        multiply the small odds that a thing begins here, token by token, and all samples would paint it at
        the same place. And it chooses only among tokens that are plausible without it, as contrastive
        decoding does.
        """
        logits = self.logits(h, to).float()
        logits, blank = (logits, None) if guidance == 1 else logits.chunk(2)
        log_p = logits.log_softmax(-1)
        if guidance != 1:
            p = log_p.exp()
            p_max = p.amax(-1, keepdim=True)
            logits = logits + (guidance - 1) * (1 - p_max) * (logits - blank)
            logits = logits.masked_fill(p < PLAUSIBLE * p_max, -torch.inf)
        if to == "text":
            logits[..., self.config.pad_token] = -torch.inf
        return logits, log_p

    @torch.no_grad()
    def generate(self, ref, to, n=1, prefix=None, temperature=1.0, top_k=0, top_p=1.0, guidance=1.0,
                 seeds=None, window=0, on_step=None):
        """
        Sample the GEN side from the REF side, with a key-value cache.

        ref: text (B, n_text) for to="image", image codes (B, n_image) for to="text".
        n: candidates for each row of ref, sharing its prompt: result rows 0..n-1 are ref 0's, and so on.
        prefix: (B, m), the first GEN tokens, to be continued: rows of an image, words of a caption.
        temperature: 0 is greedy.
        top_k: keep the k likeliest, 0 all. top_p in (0, 1]: keep the likeliest that sum to p.
        guidance: logits = conditional + (guidance - 1) * doubt * (conditional - null), where null is the same
            model on a blank REF side; see next_logits. 1 is none.
        seeds: B * n integers; a seed gives the same sample whatever else is in the batch. None: 0, 1, 2, ...
        window: tokens that a pass looks for: the same sample in fewer passes, see Draft. 1 is token by
            token; 0 takes what was fastest on a CPU for so many images, and 1 elsewhere.
        on_step: called before each pass with the tokens so far, as below, and how many of each sample are
            known (B * n,), at times fewer than before; the others are guesses. What it raises ends the work.

        -> LongTensor (B * n, n_image), or (B * n, n_text), which is padded behind its end token; and the
        log p of what follows the prefix, without guidance and at temperature 1, nats: (B * n,).
        self.passes says how many passes it took, that through the prompt aside.
        """
        prefix = ref[:, :0] if prefix is None else prefix
        window = window or fastest_window(to, len(ref) * n, ref.device)
        choose = functools.partial(sample_token, temperature=temperature, top_k=top_k, top_p=top_p)
        seeds = range(len(ref) * n) if seeds is None else seeds
        draft = Draft(self.config, to, prefix, n, seeds, window, choose)
        position = F.pad(self.position_embedding(to, GEN)[prefix.shape[1]:], (0, 0, 0, window))

        def step(kv_len, W):
            """One pass. In place and without a look at any value, so that a graph can replay it."""
            tokens, at = draft.read(W)
            x = self.token[to](tokens) + position[at]  # (B, n, W, C)
            h = self.decode_step(x, at, kv_len, guidance, cache)
            draft.accept(*self.next_logits(h, to, guidance), tokens, at)

        step = GraphedStep(step) if ref.is_cuda and self.use_cuda_graphs and not self.sharded else step
        # On a GPU each kv_len has a graph of its own, and a look waits for all passes before it
        multiple, look_every = (128, 8) if ref.is_cuda else (1, 1)
        rows = draft.pos.numel() * (1 if guidance == 1 else 2)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.packed(to, rows))
            cache = KVCache(self.config.n_head, n, len(position))
            h = self.prefill(ref, to, prefix, guidance, cache)[:, -1]
            draft.begin(*self.next_logits(h, to, guidance))
            self.passes, farthest, W = 0, 0, 1
            while self.passes < draft.last:
                if (window > 1 or to == "text") and (self.passes - 1) % look_every == 0:
                    nearest, farthest, hits = draft.look(self.sharded)
                    if nearest == draft.last:
                        break
                    W_before, W = W, window if hits >= 0.5 else 1  # where enough guesses are right
                    if W > W_before:
                        stack.enter_context(self.packed(to, rows * W))
                    elif W < W_before and to == "image":
                        draft.pos.clamp_(max=nearest)  # the slowest sets the time; in step, no mask is needed
                if on_step:
                    on_step(draft.so_far(), draft.known())
                kv_len = -(-(farthest + W) // multiple) * multiple
                step(min(kv_len, len(position)), W)
                farthest += W
                self.passes += 1
        return draft.result()

    @torch.no_grad()
    def beam_search(self, image, width, prefix=None, length_penalty=1.0, guidance=1.0):
        """
        The likeliest captions of image codes (B, n_image) -> LongTensor (B, width, n_text), best first, and
        their scores (B, width): log p / length ** length_penalty, where length counts the tokens found, the
        end token with them.

        Each step keeps the `width` best continuations of all beams, ended ones among them. Width 1 is greedy.
        prefix (B, m), m < n_text: the first tokens of the caption.
        """
        c, B = self.config, len(image)
        prefix = image[:, :0] if prefix is None else prefix
        n_new = c.n_text - prefix.shape[1]
        tokens = image.new_full((B, width, n_new), c.pad_token)
        log_p = image.new_zeros((B, width), dtype=torch.float)
        log_p[:, 1:] = -torch.inf  # all beams begin alike: one is enough
        length, done = torch.zeros_like(log_p), torch.zeros_like(log_p, dtype=torch.bool)
        pad_only = log_p.new_full((c.text_vocab,), -torch.inf)  # behind an end token: padding, for certain
        pad_only[c.pad_token] = 0
        position = self.position_embedding("text", GEN)[prefix.shape[1]:]
        with self.packed("text", B * width * (1 if guidance == 1 else 2)):
            cache = KVCache(c.n_head, width, n_new)
            h = self.prefill(image, "text", prefix, guidance, cache)[:, -1]
            logits = self.next_logits(h, "text", guidance)[0][:, None].expand(B, width, -1)
            for i in range(n_new):
                next_log_p = torch.where(done[..., None], pad_only, logits.log_softmax(-1))
                total = log_p[..., None] + next_log_p  # (B, width, V)
                length = length + ~done
                scores, best = (total / length[..., None] ** length_penalty).flatten(1).topk(width)
                parent, token = best // c.text_vocab, best % c.text_vocab
                log_p = total.flatten(1).gather(1, best)
                length, done = length.gather(1, parent), done.gather(1, parent)
                tokens = tokens.gather(1, parent[..., None].expand_as(tokens))
                tokens[:, :, i] = token
                done = done | (token == c.end_token)
                if i + 1 == n_new or done.all():
                    return torch.cat([prefix[:, None].expand(B, width, -1), tokens], 2), scores
                cache.reorder(parent, i)
                pos = torch.full((B, width, 1), i, device=image.device)
                x = self.token["text"](token[..., None]) + position[i]  # (B, width, 1, C)
                h = self.decode_step(x, pos, i + 1, guidance, cache)[:, :, 0]
                logits, _ = self.next_logits(h, "text", guidance)

    # -------------------------------------------------------------------------
    # Scores: the same model judges what it generated, in both directions

    @torch.no_grad()
    def log_likelihood(self, text, image, to, start=0, chunk=0):
        """
        log p(GEN side | REF side), nats: (N,), and the number of tokens it is the sum over: (N,), of N GEN
        sides, where those before `start` are given. There are N REF sides, or fewer, each for the next n GEN
        sides, which share what is computed of it, if it is an image. Any N: rows go through a few at a time,
        so that about `chunk` numbers are held at once, activations of one block. 0: what a CPU's cache holds,
        elsewhere 16 times as many.
        """
        c, sides, nll = self.config, {"text": text, "image": image}, []
        ref, n = sides[OTHER[to]], len(sides[to]) // len(sides[OTHER[to]])
        if to == "image":  # few tokens to share, and without sharing attention is fused
            ref, n = ref.repeat_interleave(n, 0), 1
        mask = self.loss_mask(sides[to], to)
        n_gen = max(2, int(mask.sum(1).max()))  # behind the longest text there is only padding
        gen = sides[to][:, :n_gen].unflatten(0, (len(ref), n))
        chunk = chunk or (2 ** 22 if image.device.type == "cpu" else 2 ** 26)
        rows = max(1, chunk // (8 * c.n_embd * (c.length(OTHER[to]) // n + n_gen)))
        parts = [(r, g) for r, of_r in zip(ref.split(max(1, rows // n)), gen.split(max(1, rows // n)))
                 for g in of_r.split(rows, 1)]
        with self.packed(to, len(parts[0][0]) * n_gen):
            for r, g in parts:  # (B, n_ref), (B, n, n_gen)
                if n == 1:
                    h = self.prefill(r, to, g[:, 0, :-1])  # (B, n_gen, C)
                else:
                    cache = KVCache(c.n_head, g.shape[1], n_gen - 1)
                    h = self.prefill(r, to, r[:, :0], cache=cache)  # (B, 1, C)
                    x = self.embed_side(g[..., :-1].flatten(0, 1), to, GEN).unflatten(0, g.shape[:2])
                    pos = torch.arange(n_gen - 1, device=x.device).expand(x.shape[:3])
                    more = self.decode_step(x, pos, n_gen - 1, 1, cache)  # (B, n, n_gen - 1, C)
                    h = torch.cat([h[:, None].expand_as(more[:, :, :1]), more], 2).flatten(0, 1)
                nll.append(self.cross_entropy(h[:, start:], g.flatten(0, 1)[:, start:], to)[1])
        return -torch.cat(nll), mask[:, start:].sum(1)


# -----------------------------------------------------------------------------
# Decoding

def fastest_window(to, rows, device):
    """The window that was fastest on 2 cores for so many samples; elsewhere, and for captions, 1."""
    if to == "text" or device.type != "cpu":
        return 1
    return next((window for most, window in FASTEST_WINDOWS.items() if rows <= most), 1)


class Draft:
    """
    n candidates of each of B prompts while they are generated: all tokens behind the prefix, known up to pos
    and guesses from there on, which become known by Jacobi iteration. A pass takes the last known token, c,
    and guesses behind it, x y z; at each it picks the token that follows, d e f g, by that token's own random
    number. d is right. If x = d, e is right too; if then y is not e, f and g are guesses, and the next pass
    takes e f g g.
    """
    def __init__(self, config, to, prefix, n, seeds, window, choose):
        """choose: logits (N, V), random numbers (N,) -> tokens (N,)."""
        self.config, self.to, self.prefix, self.choose = config, to, prefix, choose
        (B, m), total, device = prefix.shape, config.length(to), prefix.device
        uniform = torch.stack([torch.rand(total, generator=torch.Generator().manual_seed(int(seed)))
                               for seed in seeds])
        # what follows the prefix, and behind it room for a window that begins at the last token
        self.uniform = F.pad(uniform.view(B, n, total)[..., m:], (0, 2 * window)).to(device)
        self.tokens = torch.zeros_like(self.uniform, dtype=torch.long)  # (B, n, total - m + 2 window)
        self.log_p = torch.zeros_like(self.uniform)  # of the tokens, each given those before it
        self.pos = torch.zeros_like(self.tokens[..., :1])  # where each sample's last known token stands
        self.total, self.last = total - m, max(0, total - m - 1)
        # The share of first guesses that were right, lately. At 0.45 the first pass goes token by token, and
        # opens a window if its guess proves right.
        self.hits = torch.full((), 0.45, device=device)

    def begin(self, logits, log_p):
        """What follows the prompts, logits and log p (B, V), gives the first token, and the first guesses."""
        self.tokens[:] = self.pick(logits[:, None, None].expand(*self.pos.shape, -1), self.pos)
        self.log_p[:] = log_p.gather(1, self.tokens[..., 0])[..., None]

    def pick(self, logits, at):
        """logits (B, n, W, V) of the tokens at (B, n, W) -> these tokens (B, n, W)."""
        return self.choose(logits.flatten(0, 2), self.uniform.gather(2, at).flatten()).view_as(at)

    def read(self, W):
        """-> the last known token and the W - 1 guesses behind it, (B, n, W), and where they stand."""
        at = self.pos + torch.arange(W, device=self.pos.device)
        return self.tokens.gather(2, at), at

    def accept(self, logits, log_p, tokens, at):
        """From read(), and what follows it, (B, n, W, V): new tokens, known as far as guesses are right."""
        W, found, more = at.shape[2], self.pick(logits, at + 1), 1
        if W > 1:
            right = (found[..., :-1] == tokens[..., 1:]).cumprod(2)  # 1 as long as all guesses were
            more = right.sum(2, keepdim=True) + 1
            self.tokens.scatter_(2, at + 1 + W, found[..., -1:].expand_as(at))  # guesses: the same again
        self.tokens.scatter_(2, at + 1, found)
        self.log_p.scatter_(2, at + 1, log_p.gather(3, found[..., None])[..., 0])
        self.pos.add_(more).clamp_(max=self.last)
        first_guess = tokens[..., :2][..., -1]  # without any: the same again
        self.hits.lerp_((found[..., 0] == first_guess).float().mean(), 1 - 0.85 ** self.pos.numel())

    def look(self, sharded):
        """-> the lowest pos of samples that go on (last, if none does), the highest, hits. GPUs wait."""
        pos = self.pos
        if self.to == "text":  # what has ended is at the end
            known = torch.arange(self.tokens.shape[2], device=pos.device) <= pos
            ended = ((self.tokens == self.config.end_token) & known).any(2, keepdim=True)
            pos = pos.masked_fill(ended, self.last)
        nearest = pos.min()
        if sharded:  # ranks end together, as blocks fetch their weights from all of them
            torch.distributed.all_reduce(nearest, torch.distributed.ReduceOp.MIN)
        return nearest.item(), self.pos.max().item(), self.hits.item()

    def so_far(self):
        """All tokens, the prefix with them: (B * n, total)."""
        tokens = self.tokens[..., :self.total]
        return torch.cat([self.prefix[:, None].expand(*tokens.shape[:2], -1), tokens], 2).flatten(0, 1)

    def known(self):
        """How many of each sample's tokens are known: (B * n,)."""
        return self.prefix.shape[1] + 1 + self.pos.flatten()

    def result(self):
        """-> what generate() returns."""
        tokens, log_p = self.so_far(), self.log_p[..., :self.total].flatten(0, 1)
        if self.to == "text":
            ended = (tokens == self.config.end_token).long()
            behind = ended.cumsum(1) > ended
            tokens = tokens.masked_fill(behind, self.config.pad_token)
            log_p = log_p.masked_fill(behind[:, self.prefix.shape[1]:], 0)
        return tokens, log_p.sum(1)


class KVCache:
    """
    Keys and values of all blocks while decoding: the prompts', and those of the tokens that n candidates of
    each add, at most `length`. Those of n = 1 follow their prompt's in a row; else a prompt's are kept once,
    for all of its candidates.
    """
    def __init__(self, n_head, n, length):
        self.n_head, self.n, self.length = n_head, n, length
        self.prompt, self.own = [], []  # of each block: (2, B * nh, T, hs), and (2, B, nh * n, length, hs)

    def add_prompt(self, k, v):
        """The next block's k and v (B, nh, T, hs) of the prompts."""
        kv = torch.stack([k, v])
        self.own_start = k.shape[2] if self.n == 1 else 0  # where own tokens begin in their row
        self.prompt.append(kv.flatten(1, 2) if self.n > 1 else None)
        self.own.append(F.pad(kv, (0, 0, 0, self.length)) if self.n == 1 else
                        kv.new_zeros(2, len(k), k.shape[1] * self.n, self.length, k.shape[3]))

    def seek(self, pos, kv_len):
        """The next tokens stand at pos (B, n, W) behind the prompt; own keys are read up to kv_len."""
        self.kv_len, pos = self.own_start + kv_len, self.own_start + pos
        of_head = pos.repeat(1, self.n_head, 1)  # (B, nh * n, W)
        future = torch.arange(self.kv_len, device=pos.device) > (pos if self.n == 1 else of_head)[..., None]
        self.mask = torch.zeros_like(future, dtype=self.own[0].dtype).masked_fill_(future, -torch.inf)
        # Attention is a third faster without a mask that hides nothing; only a CPU can afford the look
        if self.n == 1 and future.is_cpu and not future.any():
            self.mask = None
        starts = torch.arange(0, self.own[0][0, ..., 0].numel(), self.own[0].shape[3], device=pos.device)
        self.index = (starts.view_as(of_head[..., :1]) + of_head).flatten()  # in own keys, one below another

    def attend(self, i, q, k, v):
        """
        Attention in block i. The first time, q, k, v (B, nh, T, hs) are of prompts, and this is
        causal_attention. Then they are of W tokens of each candidate, (B, nh, n * W, hs), which attend to
        the prompt, to their candidate's tokens before them, and to themselves. -> the shape of q.
        """
        if i == len(self.own):
            self.add_prompt(k, v)
            return causal_attention(q, k, v)
        kv = torch.stack([k, v]).view(2, -1, k.shape[-1])  # (2, B * nh * n * W, hs)
        self.own[i].view(2, -1, k.shape[-1]).index_copy_(1, self.index, kv)
        own_k, own_v = self.own[i].narrow(3, 0, self.kv_len).unbind()
        if self.n == 1:  # the mask is (B, 1, W, kv_len), for all heads
            return F.scaled_dot_product_attention(q, own_k, own_v, self.mask)
        # = the same over rows of the prompt's keys and then the candidate's own, side by side
        (prompt_k, prompt_v), own_k, own_v = self.prompt[i], own_k.flatten(0, 1), own_v.flatten(0, 1)
        q = (q * q.shape[-1] ** -0.5).flatten(0, 1)  # (B * nh, n * W, hs)
        own_q = q.reshape(len(own_k), -1, q.shape[-1])  # (B * nh * n, W, hs)
        prompt_scores = torch.bmm(q, prompt_k.mT)  # (B * nh, n * W, T)
        own_scores = torch.baddbmm(self.mask.flatten(0, 1), own_q, own_k.mT)  # (B * nh * n, W, kv_len)
        scores = torch.cat([prompt_scores.view(*own_q.shape[:2], -1), own_scores], dim=2)
        prompt_p, own_p = scores.softmax(-1).split([prompt_k.shape[1], self.kv_len], dim=2)
        y = torch.bmm(prompt_p.reshape_as(prompt_scores), prompt_v)  # (B * nh, n * W, hs)
        return torch.baddbmm(y.view_as(own_q), own_p, own_v).view(k.shape)

    def reorder(self, parent, kv_len):
        """Candidate j takes over the first kv_len tokens of candidate parent[:, j] of its prompt."""
        for own in self.own:  # with guidance, of twice as many prompts
            own = own[..., :self.own_start + kv_len, :].unflatten(2, (self.n_head, self.n))
            index = parent.repeat(own.shape[1] // len(parent), 1)[None, :, None, :, None, None]
            own.copy_(own.gather(3, index.expand_as(own)))  # (2, B, nh, n, kv_len, hs)


def sample_token(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """
    logits (B, V), uniform (B,) in [0, 1) -> LongTensor (B,), by inverting the cumulative distribution: one
    random number a token, so that a sample depends on its own seed alone.
    """
    if temperature == 0:
        return logits.argmax(-1)
    ranked = bool(top_k) or top_p < 1
    if ranked:  # the likeliest first
        logits, order = logits.topk(min(top_k or logits.shape[1], logits.shape[1]))
    p = (logits / temperature).softmax(-1)
    if top_p < 1:  # drop what lies wholly behind the first top_p of the mass; the likeliest always stays
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    cumulative = p.cumsum(-1)
    total = cumulative[:, -1:]
    below = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(cumulative, below, right=True)  # the first whose cumulative mass is above
    return (order.gather(1, token) if ranked else token)[:, 0]


# -----------------------------------------------------------------------------
# Same result, less memory or time

def tails(x, starts):
    """
    (B, T, C), and for each equal part of the batch a first position -> all from there on: (N, C). Hidden
    states that predict nothing need no MLP in the last block, and no logits.
    """
    parts = zip(x.chunk(len(starts)), starts)
    return torch.cat([part[:, start:].flatten(0, 1) for part, start in parts])


@contextlib.contextmanager
def packed(weights, rows):
    """
    While this lasts, `linear` multiplies by copies of these weights (out, in) that oneDNN laid out, if they
    are float32 on a CPU and products are, too. Products with more than 256 rows then take up to a fifth less
    time; for fewer rows, weights are laid out if packing_pays(). One row needs no copies. Inside another
    `packed`, what that has laid out stays as it is.
    """
    product = torch.ones(1, 1) @ torch.ones(1, 1)  # of another type under autocast
    may = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and product.dtype == torch.float32
    tried = 2 ** (rows - 1).bit_length()  # rows, rounded up to a power of two, so that trials are few
    weights = [w for w in weights if may and w.device.type == "cpu" and w.dtype == torch.float32
               and getattr(w, "packed", None) is None and (rows > 256 or packing_pays(tried, *w.shape))]
    try:
        for weight in weights:
            weight.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        yield
    finally:
        for weight in weights:
            weight.packed = None


@functools.cache
def packing_pays(rows, n_out, n_in):
    """
    Whether `linear` is faster by a copy of a weight that oneDNN laid out than by F.linear: a trial, once a
    process. For 2 to 64 rows it was two to five times as fast on an AMD CPU; on an Intel one twice as fast
    with 512 channels, and half as fast with 128. Sums may differ in the last digit.
    """
    x, weight, bias = torch.ones(rows, n_in), torch.ones(n_out, n_in), torch.ones(n_out)
    plain = seconds(linear, x, weight, bias)
    weight.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    return seconds(linear, x, weight, bias) < 0.9 * plain


def seconds(product, *tensors):
    """-> how long product(*tensors) takes, the shortest of five times."""
    return min(timeit.repeat(functools.partial(product, *tensors), number=1, repeat=5))


def linear(x, weight, bias=None):
    """F.linear, by oneDNN if `packed`: x (..., in), weight (out, in), bias (out,) or None -> (..., out)."""
    if x.is_cpu and x.numel() == x.shape[-1]:  # one row, packed or not
        return (linear_in_parts if rows_go_in_parts() else F.linear)(x, weight, bias)
    copy = getattr(weight, "packed", None)
    return (F.linear(x, weight, bias) if copy is None else
            torch.ops.mkldnn._linear_pointwise(x, copy, bias, "none", [], ""))


def linear_in_parts(x, weight, bias=None):
    """F.linear of one row, as a batch of 16 products with (out / 16, in) of the weight each."""
    n = math.gcd(len(weight), 16)
    parts, x_each = weight.view(n, -1, weight.shape[1]), x.reshape(1, 1, -1).expand(n, -1, -1).mT
    y = torch.bmm(parts, x_each) if bias is None else torch.baddbmm(bias.view(n, -1, 1), parts, x_each)
    return y.view(*x.shape[:-1], -1)


@functools.cache
def rows_go_in_parts():
    """
    Whether linear_in_parts takes a single row faster than F.linear, both bound by reading weights: a trial,
    once a process. It took half the time on an AMD CPU, and twice the time on an Intel one. Sums may differ
    in the last digit.
    """
    row, weight = torch.ones(1, 512), torch.ones(8192, 512)
    with torch.autocast("cpu", enabled=False):
        return seconds(linear_in_parts, row, weight) < 0.8 * seconds(F.linear, row, weight)


def dropout(x, p, training):
    """F.dropout, at no cost where nothing is dropped."""
    return F.dropout(x, p) if p and training else x


def norm_linear(x, ln, layer):
    """layer(ln(x)) for a layer norm and a linear layer; the backward pass keeps x alone."""
    def norm(x, weight, bias):
        return F.layer_norm(x, ln.normalized_shape, weight, bias, ln.eps)

    return linear_after(norm, x, layer, ln.weight, ln.bias)


def gelu_linear(x, layer):
    """layer(F.gelu(x)) for a linear layer; the backward pass keeps x alone."""
    return linear_after(gelu, x, layer)


def gelu(x):
    """
    F.gelu. Contiguous numbers on a CPU go to oneDNN, which for a single row takes longer to set up than to
    compute; as a transposed view, which is not contiguous, the row goes to PyTorch's own.
    """
    if x.is_cpu and x.numel() == x.shape[-1] and x.shape[-1] % 2 == 0:
        return F.gelu(x.view(-1, 2).mT).mT.reshape(x.shape)
    return F.gelu(x)


def linear_after(f, x, layer, *params):
    """layer(f(x, *params))"""
    if torch.is_grad_enabled() and not is_compiling():  # torch.compile finds what to compute again by itself
        return LinearAfter.apply(f, x, layer.weight, layer.bias, *params)
    return linear(f(x, *params), layer.weight, layer.bias)  # without the overhead of apply


class LinearAfter(torch.autograd.Function):
    """
    linear(f(x, *params), weight, bias), which keeps x for the backward pass, and not f(x): that is computed
    again. For a layer norm or GELU this takes little time, and f(x) would take as much memory as x, or more.
    """
    @staticmethod
    def forward(ctx, f, x, weight, bias, *params):
        ctx.f, ctx.has_bias = f, bias is not None
        ctx.save_for_backward(x, weight, *params)
        return linear(f(x, *params), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, *params = ctx.saved_tensors
        leaves = [t.detach().requires_grad_() for t in (x, *params)]
        with torch.enable_grad():
            y = ctx.f(*leaves)
        amp_dtype = grad.dtype  # autocast's dtype; backward runs outside autocast
        grad_rows, y_rows = grad.flatten(0, -2), y.detach().flatten(0, -2).to(amp_dtype)  # (N, out), (N, in)
        grad_y = (grad @ weight.to(amp_dtype)).to(y.dtype)
        grad_x, *grad_params = torch.autograd.grad(y, leaves, grad_y)
        grad_bias = grad_rows.sum(0) if ctx.has_bias else None
        return None, grad_x, grad_rows.t() @ y_rows, grad_bias, *grad_params


class LinearCrossEntropy(torch.autograd.Function):
    """
    h (N, C), weight (V, C), targets (N,), token_weights (N,), with_gradient -> two things:
    (token_weights * nll).sum(), a scalar to differentiate, and nll (N,), nats, to read, where
    nll = F.cross_entropy(h @ weight.T, targets, reduction="none").

    The logits (N, V) exist for a chunk of rows at a time only. The gradient is computed with them, so that
    the backward pass need not compute them again.
    """
    chunk = 2 ** 22  # logits held at once

    @staticmethod
    def forward(ctx, h, weight, targets, token_weights, with_gradient):
        chunk_rows = max(1, LinearCrossEntropy.chunk // len(weight))
        nll = torch.empty(len(h), device=h.device)
        grad_h, grad_weight = torch.empty_like(h) if with_gradient else None, None
        scale = token_weights.max()  # multiplied in at the end: float16 would lose such small gradients
        for start in range(0, len(h), chunk_rows):
            part = slice(start, start + chunk_rows)
            logits = linear(h[part], weight)  # (rows, V), in autocast's dtype
            amp_dtype, logits = logits.dtype, logits.float()
            log_total = logits.logsumexp(1, keepdim=True)
            target = targets[part, None]
            nll[part] = (log_total - logits.gather(1, target))[:, 0]
            if with_gradient:  # of the logits: token_weights * (softmax - one-hot)
                grad = logits.sub_(log_total).exp_().scatter_add_(1, target, -torch.ones_like(log_total))
                grad = grad.mul_((token_weights[part] / scale)[:, None]).to(amp_dtype)
                grad_h[part] = grad @ weight
                product = grad.t() @ h[part]
                grad_weight = product.to(weight.dtype) if start == 0 else grad_weight.add_(product)
        ctx.save_for_backward(grad_h, grad_weight, scale)
        ctx.mark_non_differentiable(nll)
        return (nll * token_weights).sum(), nll

    @staticmethod
    def backward(ctx, grad, _):
        grad_h, grad_weight, scale = ctx.saved_tensors
        return grad_h.mul_(grad * scale), grad_weight.mul_(grad * scale), None, None, None


class GraphedStep:
    """
    step(*sizes) on a CUDA device, recorded as a graph, which is launched at once and not kernel by kernel.
    For each sizes the first call runs as it is, which warms up, and the second records. Whether a device can
    do graphs is found out by trying.
    """
    def __init__(self, step):
        self.step, self.graphs, self.works = step, {}, True

    def __call__(self, *sizes):
        if sizes not in self.graphs or not self.works:
            self.graphs[sizes] = None
            return self.step(*sizes)
        if self.graphs[sizes] is None:
            stream = torch.cuda.current_stream()
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # loaders' threads may go on
                    self.step(*sizes)
            except RuntimeError as e:  # nothing of the step has run yet
                torch.cuda.set_stream(stream)
                torch.cuda.synchronize()
                warnings.warn(f"no CUDA graphs here, decoding goes kernel by kernel ({e})", stacklevel=2)
                self.works = False
                return self.step(*sizes)
            self.graphs[sizes] = graph
        self.graphs[sizes].replay()
