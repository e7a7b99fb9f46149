"""
BiART: one GPT that paints an image from a caption and captions an image, over text and AugVAE's image tokens.

    text -> image    t_1 ... t_64   i_1 ... i_1024      segment: REF x 64,   GEN x 1024
    image -> text    i_1 ... i_1024 t_1 ... t_64        segment: REF x 1024, GEN x 64

What a token embeds to is token + segment + position: the segment (REF, what is given; GEN, what is generated)
is how the model knows which way it runs. Attention is causal over the whole sequence in both layouts; the
first GEN token is predicted at the last REF position. Both layouts have one length, so half a batch each way
goes through in one forward.

References:
1) L-Verse, Kim et al. 2022, https://arxiv.org/abs/2111.11133 (section 3.2); the authors' recipe is minGPT
   plus a two-entry segment embedding.
2) GPT-2, Radford et al. 2019, for the blocks and the initialisation.
3) Classifier-free guidance, Ho & Salimans 2022, https://arxiv.org/abs/2207.12598.
"""
import math
import warnings
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

REF, GEN = 0, 1
OTHER = {"text": "image", "image": "text"}


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
    text_vocab: int = derived(49408)
    end_token: int = derived(49407)  # closes every caption
    pad_token: int = derived(49406)  # fills up behind it
    image_vocab: int = derived(8192)
    image_side: int = derived(32)  # rows, and columns, of image tokens

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.positions not in ("modality", "sequence"):
            raise ValueError(f"positions {self.positions!r} is none of: modality, sequence")

    @property
    def n_image(self):
        return self.image_side ** 2

    def length(self, modality):
        return {"text": self.n_text, "image": self.n_image}[modality]

    def vocab(self, modality):
        return {"text": self.text_vocab, "image": self.image_vocab}[modality]


# -----------------------------------------------------------------------------
# The transformer

def linear(x, weight, bias=None):
    """
    x (..., in), weight (out, in), bias (out,) or None -> (..., out), contiguous: F.linear. On a CPU the few
    rows of a decoding step go as a batch of products, each with a sixteenth of the weights: BLAS then reads
    these, of which each is needed once, up to twice as fast. Up to 4 rows do best to the weights' right.
    """
    rows = x.reshape(-1, x.shape[-1])
    if x.is_cuda or x.dtype != torch.float32 or len(rows) > 16:
        return F.linear(x, weight, bias)
    parts = weight.view(math.gcd(len(weight), 16), -1, weight.shape[1])
    rows = rows.expand(len(parts), -1, -1)
    y = torch.bmm(rows, parts.mT) if rows.shape[1] > 4 else torch.bmm(parts, rows.mT).mT  # (16, rows, part)
    # reshape alone may give a view with gaps between channels, for which no fused attention is chosen
    y = y.transpose(0, 1).reshape(*x.shape[:-1], -1).contiguous()
    return y if bias is None else y + bias.to(y.dtype)


class LinearAfter(torch.autograd.Function):
    """
    linear(f(x, *params), weight, bias), which keeps x for the backward pass and works out f(x) there again. f
    is a layer norm or GELU: a small part of the product's time, and more memory than the product's own input.
    """
    @staticmethod
    def forward(ctx, f, x, weight, bias, *params):
        ctx.f, ctx.biased = f, bias is not None
        ctx.save_for_backward(x, weight, *params)
        return linear(f(x, *params), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, *params = ctx.saved_tensors
        leaves = [t.detach().requires_grad_() for t in (x, *params)]
        with torch.enable_grad():
            y = ctx.f(*leaves)
        amp_dtype = grad.dtype  # that of autocast, which the backward pass is outside of
        rows, seen = grad.flatten(0, -2), y.detach().flatten(0, -2).to(amp_dtype)
        grad_x, *grad_params = torch.autograd.grad(y, leaves, (grad @ weight.to(amp_dtype)).to(y.dtype))
        return None, grad_x, rows.t() @ seen, rows.sum(0) if ctx.biased else None, *grad_params

    @staticmethod
    def call(f, x, weight, bias, *params):
        if torch.is_grad_enabled():
            return LinearAfter.apply(f, x, weight, bias, *params)
        return linear(f(x, *params), weight, bias)  # nothing to keep: decoding does without apply's overhead


class NormLinear(nn.Linear):
    """A layer norm, then a linear layer."""

    def __init__(self, in_features, out_features, bias=True):
        super().__init__(in_features, out_features, bias)
        self.norm = nn.LayerNorm(in_features)

    def normed(self, x, weight, bias):
        return F.layer_norm(x, self.norm.normalized_shape, weight, bias, self.norm.eps)

    def forward(self, x):
        return LinearAfter.call(self.normed, x, self.weight, self.bias, self.norm.weight, self.norm.bias)


class GELULinear(nn.Linear):
    """GELU, then a linear layer."""

    def forward(self, x):
        return LinearAfter.call(F.gelu, x, self.weight, self.bias)


class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        # Query, key and value in one. Without bias: the key's has no effect, so its gradient is rounding
        # noise, which Adam would blow up to full steps, others on two GPUs than on one.
        self.c_attn = NormLinear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, pos=None, mask=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, nh, T, hs)
        q, k, v = qkv
        if cache is not None:  # (2, B, nh, T_max, hs): keys and values of all positions so far
            cache.index_copy_(3, pos, qkv[1:])
        if mask is not None:
            k, v = cache[:, :, :, :mask.shape[-1]]
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(linear(y, self.c_proj.weight, self.c_proj.bias))


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = NormLinear(config.n_embd, 4 * config.n_embd)
        self.c_proj = GELULinear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.c_fc(x)))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)

    def forward(self, x, rows=None, cache=None, pos=None, mask=None):
        """(B, T, C) -> the same; with rows, of all B * T positions those alone: (len(rows), C)."""
        x = x + self.attn(x, cache, pos, mask)
        if rows is not None:
            x = x.flatten(0, 1)[rows]
        return x + self.mlp(x)


class LinearCrossEntropy(torch.autograd.Function):
    """
    h (N, C), weight (V, C), targets (N,), share (N,), with_gradient -> sum of share * cross-entropy, a scalar
    to differentiate, and the cross-entropies themselves (N,), nats, to read. The scores (N, V) exist a chunk
    of rows at a time only: the gradient is worked out while a chunk is there, so that the backward pass has
    nothing to do again.
    """
    chunk = 2 ** 22  # scores held at once

    @staticmethod
    def forward(ctx, h, weight, targets, share, with_gradient):
        rows = max(1, LinearCrossEntropy.chunk // len(weight))
        nll = torch.empty(len(h), device=h.device)
        grad_h, grad_weight = torch.empty_like(h) if with_gradient else None, None
        scale = share.max()  # comes in at the end: float16 would lose such small gradients on the way
        for start in range(0, len(h), rows):
            part = slice(start, start + rows)
            scores = F.linear(h[part], weight)  # (rows, V), in autocast's type
            amp_dtype, scores = scores.dtype, scores.float()
            top = scores.logsumexp(1, keepdim=True)
            wanted = targets[part, None]
            nll[part] = (top - scores.gather(1, wanted))[:, 0]
            if with_gradient:  # of the scores: share * (softmax - one-hot)
                grad = scores.sub_(top).exp_().scatter_add_(1, wanted, -torch.ones_like(top))
                grad = grad.mul_((share[part] / scale)[:, None]).to(amp_dtype)
                grad_h[part] = grad @ weight
                product = grad.t() @ h[part]
                grad_weight = product.to(weight.dtype) if start == 0 else grad_weight.add_(product)
        ctx.save_for_backward(grad_h, grad_weight, scale)
        ctx.mark_non_differentiable(nll)
        return (nll * share).sum(), nll

    @staticmethod
    def backward(ctx, grad, _):
        grad_h, grad_weight, scale = ctx.saved_tensors
        return grad_h.mul_(grad * scale), grad_weight.mul_(grad * scale), None, None, None


# -----------------------------------------------------------------------------
# The model

class BiART(nn.Module):
    """
    Text is LongTensor (B, n_text), padded behind its end token; images LongTensor (B, n_image), row by row.
    A direction is named by what it generates: to="image" or to="text".
    """
    use_cuda_graphs = True  # decode by CUDA graphs on CUDA; not where blocks communicate, as a sharded model's do

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.token = nn.ModuleDict({m: nn.Embedding(c.vocab(m), c.n_embd) for m in OTHER})
        self.null = nn.ParameterDict({m: nn.Parameter(torch.empty(c.n_embd)) for m in OTHER})
        self.segment = nn.Embedding(2, c.n_embd)
        if c.positions == "modality":
            self.text_position = nn.Embedding(c.n_text, c.n_embd)
            self.row_position = nn.Embedding(c.image_side, c.n_embd)
            self.column_position = nn.Embedding(c.image_side, c.n_embd)
        else:
            self.position = nn.Embedding(c.n_text + c.n_image, c.n_embd)
        self.drop = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = nn.LayerNorm(c.n_embd)
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
            elif "norm" in name:
                nn.init.ones_(p)
            else:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.n_layer) if residual else std)

    def position_embedding(self, modality, segment):
        """Segment + position embeddings of one side of the sequence: (n, C)."""
        c = self.config
        if c.positions == "sequence":
            start = 0 if segment == REF else c.length(OTHER[modality])
            position = self.position.weight[start:start + c.length(modality)]
        elif modality == "text":
            position = self.text_position.weight
        else:
            position = (self.row_position.weight[:, None] + self.column_position.weight[None]).flatten(0, 1)
        return position + self.segment.weight[segment]

    def embed(self, tokens, modality, segment, null=None):
        """tokens (B, n), from the start of their side -> (B, n, C), blanked where null (B,) is true."""
        x = self.token[modality](tokens)
        if null is not None:
            x = torch.where(null[:, None, None], self.null[modality].to(x.dtype), x)
        return x + self.position_embedding(modality, segment)[:tokens.shape[1]]

    def sequence(self, text, image, to, null=None):
        """The embedded layout of one direction: (B, n_text + n_image, C). null (B,) blanks REF sides."""
        sides = {"text": text, "image": image}
        ref = OTHER[to]
        return torch.cat([self.embed(sides[ref], ref, REF, null), self.embed(sides[to], to, GEN)], dim=1)

    def trunk(self, x, rows=None, cache=None, pos=None, mask=None):
        """
        (B, T, C) -> (B, T, C), before the final norm. With rows, LongTensor into all B * T positions, the
        last block goes on with those alone, as where only some are needed: (len(rows), C). cache, pos and
        mask: see new_cache and decode_step.
        """
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            x = block(x, rows if last else None, None if cache is None else cache[i], pos, mask)
        return x

    def logits(self, h, modality):
        """
        Hidden states (..., C) -> scores of the next token (..., vocab of the modality it belongs to): image
        positions are scored over the image codes only, text positions over the text only. As in GPT-2, the
        weights are the embedding's.
        """
        return linear(self.norm(h), self.token[modality].weight)

    def scored(self, tokens, modality):
        """Which tokens count: all but the padding. A text is scored up to and including its end token."""
        return (tokens != self.config.pad_token if modality == "text"
                else torch.ones_like(tokens, dtype=torch.bool))

    def cross_entropy(self, h, targets, modality):
        """
        Hidden states (B, n, C), each one place before its target (B, n) -> the mean over samples of the mean
        over a sample's scored tokens, a scalar; and each sample's sum over these (B,), to read. Nats.
        """
        scored = self.scored(targets, modality)
        share = scored / scored.sum(1, keepdim=True) / len(targets)
        mean, nll = LinearCrossEntropy.apply(self.norm(h).flatten(0, 1), self.token[modality].weight,
                                             targets.flatten(), share.flatten(), torch.is_grad_enabled())
        return mean, (nll.view_as(targets) * scored).sum(1)

    def forward(self, text, image, null=None):
        """
        A training step's loss: samples 0, 2, 4 ... run text -> image, 1, 3, 5 ... image -> text, in one pass.

        text (B, n_text), image (B, n_image), null bool (B,) or None -> loss, a scalar in nats a token, the
        mean of the two directions, and {"t2i": ..., "i2t": ...}. Each direction is the mean over its samples
        of the sample's mean over its scored tokens, which does not depend on how a batch is spread over
        ranks. B must be even.
        """
        if len(text) % 2:
            raise ValueError(f"batch size {len(text)} is odd: half of a batch runs in each direction")
        c, B, T = self.config, len(text) // 2, self.config.n_text + self.config.n_image
        halves, layouts, rows = [], [], []
        for to, pick in (("image", slice(0, None, 2)), ("text", slice(1, None, 2))):
            first = 0 if c.ref_loss else c.length(OTHER[to]) - 1  # of positions that predict what is scored
            rows.append(positions(B, T, first, text.device) + len(halves) * B * T)
            halves.append((to, first, {"text": text[pick], "image": image[pick]}))
            layouts.append(self.sequence(text[pick], image[pick], to, None if null is None else null[pick]))
        h = self.trunk(torch.cat(layouts), torch.cat(rows))
        losses = []
        for (to, first, sides), part in zip(halves, h.split([len(r) for r in rows])):
            ref, part = OTHER[to], part.view(B, T - first, -1)
            n_ref = c.length(ref) - 1 - first
            loss, _ = self.cross_entropy(part[:, n_ref:-1], sides[to], to)
            if c.ref_loss:
                loss = loss + c.ref_loss * self.cross_entropy(part[:, :n_ref], sides[ref][:, 1:], ref)[0]
            losses.append(loss)
        return sum(losses) / 2, {"t2i": losses[0].detach(), "i2t": losses[1].detach()}

    @torch.no_grad()
    def log_likelihood(self, text, image, to, chunk=2 ** 26):
        """
        log p(GEN side | REF side), nats: (B,), and the number of tokens it is the sum over: (B,). Any B: rows
        go through a few at a time, so that about `chunk` numbers are held at once, scores and activations of
        one block together.
        """
        c, targets = self.config, {"text": text, "image": image}[to]
        few = max(1, chunk // (c.length(to) * c.vocab(to) + 8 * c.n_embd * (c.n_text + c.n_image)))
        total = []
        for t, i, wanted in zip(text.split(few), image.split(few), targets.split(few)):
            first, B, T = c.length(OTHER[to]) - 1, len(t), c.n_text + c.n_image
            h = self.trunk(self.sequence(t, i, to), positions(B, T, first, t.device)).view(B, T - first, -1)
            total.append(self.cross_entropy(h[:, :-1], wanted, to)[1])
        return -torch.cat(total), self.scored(targets, to).sum(1)

    def score_candidates(self, ref, candidates, to):
        """
        What both directions say of candidates (B, n, n_gen) for ref (B, n_ref), nats, (B, n) each: forward
        log p(candidate | ref) and reverse log p(ref | candidate). The latter re-ranks without a second model.
        """
        B, n, _ = candidates.shape
        sides = {OTHER[to]: ref.repeat_interleave(n, 0), to: candidates.flatten(0, 1)}
        return tuple(self.log_likelihood(sides["text"], sides["image"], way)[0].view(B, n)
                     for way in (to, OTHER[to]))

    # -------------------------------------------------------------------------
    # Generation: prefill() reads the prompt, decode_step() adds a token, generate() and beam_search() choose it

    def new_cache(self, batch, dtype):
        """Room for the keys and values of a whole sequence: (n_layer, 2, batch, n_head, T, head size)."""
        c = self.config
        return torch.zeros(c.n_layer, 2, batch, c.n_head, c.n_text + c.n_image, c.n_embd // c.n_head,
                           dtype=dtype, device=self.segment.weight.device)

    def prefill(self, ref, to, n, prefix, guidance):
        """
        ref (B, n_ref) and the first GEN tokens, prefix (B, m) -> scores of the next one (B * n, V), and the
        cache. The prompt goes through once for each row of ref; its cache is then copied to that row's n
        candidates. With guidance, a second half of the cache is of a blanked REF side.
        """
        null = torch.zeros(len(ref), dtype=torch.bool, device=ref.device)
        if guidance != 1:
            ref, prefix, null = ref.repeat(2, 1), prefix.repeat(2, 1), torch.cat([null, ~null])
        x = torch.cat([self.embed(ref, OTHER[to], REF, null), self.embed(prefix, to, GEN)], dim=1)
        B, T, _ = x.shape
        cache = self.new_cache(B, F.linear(x[0, :1], x[0, :1]).dtype)  # products' type, under autocast too
        h = self.trunk(x, positions(B, T, T - 1, x.device), cache, torch.arange(T, device=x.device))
        return self.next_logits(h.repeat_interleave(n, 0), to, guidance), cache.repeat_interleave(n, 2)

    def decode_step(self, x, pos, kv_len, to, cache, guidance):
        """
        The embedding x (rows, C) of a token that stands at position `pos`, LongTensor (1,) -> scores of the
        next (rows, V). Of the cache, positions below `kv_len` are looked at, and those up to `pos` count.
        """
        mask = (torch.arange(kv_len, device=x.device) <= pos)[None]  # (1, kv_len)
        x = x[:, None] if guidance == 1 else x[:, None].repeat(2, 1, 1)
        return self.next_logits(self.trunk(x, None, cache, pos, mask)[:, 0], to, guidance)

    def next_logits(self, h, to, guidance):
        logits = self.logits(h, to).float()
        if guidance != 1:
            logits, blank = logits.chunk(2)
            logits = blank + guidance * (logits - blank)
        if to == "text":
            logits[:, self.config.pad_token] = -torch.inf
        return logits

    @torch.no_grad()
    def generate(self, ref, to, n=1, prefix=None, temperature=1.0, top_k=0, top_p=1.0, guidance=1.0,
                 seeds=None):
        """
        Sample the GEN side from the REF side, with a key-value cache.

        ref: text (B, n_text) for to="image", image codes (B, n_image) for to="text".
        n: candidates for each row of ref, sharing its prompt: result rows 0..n-1 are ref 0's, and so on.
        prefix: (B, m), the first GEN tokens, to be continued: rows of an image, words of a caption.
        temperature: 0 is greedy.
        top_k: keep the k likeliest, 0 all. top_p in (0, 1]: keep the likeliest that sum to p.
        guidance: logits = null + guidance * (conditional - null); null: the same model on a blanked REF side.
        seeds: B * n integers; a seed gives the same sample whatever else is in the batch. None: 0, 1, 2, ...

        -> LongTensor (B * n, n_image), or (B * n, n_text), which is padded behind its end token.
        """
        c = self.config
        rows, start, total = len(ref) * n, c.length(OTHER[to]), c.length(to)
        prefix = ref[:, :0] if prefix is None else prefix
        given = prefix.shape[1]
        out = torch.full((rows, total), c.pad_token if to == "text" else 0, device=ref.device)
        out[:, :given] = prefix.repeat_interleave(n, 0)
        seeds = range(rows) if seeds is None else seeds
        uniform = torch.stack([torch.rand(total, generator=torch.Generator().manual_seed(int(s)))
                               for s in seeds])
        uniform = uniform.to(ref.device)
        place = self.position_embedding(to, GEN)
        done = torch.zeros(rows, dtype=torch.bool, device=ref.device)
        logits, cache = self.prefill(ref, to, n, prefix, guidance)
        pos = torch.tensor([start + given], device=ref.device)  # where the next token stands

        def step(kv_len):
            """In place and without a look at any value, so that a graph can replay it."""
            token = sample_token(logits, uniform.index_select(1, pos - start)[:, 0], temperature, top_k, top_p)
            if to == "text":
                token = torch.where(done, c.pad_token, token)
                done.logical_or_(token == c.end_token)
            out.index_copy_(1, pos - start, token[:, None])
            x = self.token[to](token) + place.index_select(0, pos - start)
            logits.copy_(self.decode_step(x, pos, kv_len, to, cache, guidance))
            pos.add_(1)

        step = Replayed(step) if ref.is_cuda and self.use_cuda_graphs else step
        for i in range(given, total):
            step(min(start + total, -(-(start + i + 1) // 128) * 128))  # every 128 tokens a longer look
            if to == "text" and i % (16 if ref.is_cuda else 1) == 0 and done.all():  # a GPU waits for this
                break
        return out

    @torch.no_grad()
    def beam_search(self, image, width, prefix=None, length_penalty=1.0, guidance=1.0):
        """
        The likeliest captions of image codes (B, n_image) -> LongTensor (B, width, n_text), best first, and
        their scores (B, width): log p / length ** length_penalty, where length counts the tokens found, the
        end token with them.

        Each step keeps the `width` best continuations of all beams, ended ones among them. Width 1 is greedy.
        prefix (B, m): the first tokens of the caption. The beams of an image share its cached prompt.
        """
        c, B = self.config, len(image)
        prefix = image[:, :0] if prefix is None else prefix
        given = prefix.shape[1]
        out = image.new_full((B, width, c.n_text), c.pad_token)
        out[:, :, :given] = prefix[:, None]
        log_p = image.new_zeros((B, width), dtype=torch.float)
        log_p[:, 1:] = -torch.inf  # all beams begin alike: one is enough
        length, done = torch.zeros_like(log_p), torch.zeros_like(log_p, dtype=torch.bool)
        stay = log_p.new_full((c.text_vocab,), -torch.inf)  # how an ended beam goes on: padding, for certain
        stay[c.pad_token] = 0
        place = self.position_embedding("text", GEN)
        logits, cache = self.prefill(image, "text", width, prefix, guidance)
        for i in range(given, c.n_text):
            step = torch.where(done[..., None], stay, logits.log_softmax(-1).view(B, width, -1))
            total = log_p[..., None] + step  # (B, width, V)
            length = length + ~done
            scores, best = (total / length[..., None] ** length_penalty).flatten(1).topk(width)
            parent, token = best // c.text_vocab, best % c.text_vocab
            log_p = total.flatten(1).gather(1, best)
            length, done = length.gather(1, parent), done.gather(1, parent)
            out = out.gather(1, parent[..., None].expand_as(out))
            out[:, :, i] = token
            done = done | (token == c.end_token)
            if i + 1 == c.n_text or done.all():
                return out, scores
            rows = (torch.arange(B, device=image.device)[:, None] * width + parent).flatten()
            rows = rows if guidance == 1 else torch.cat([rows, rows + len(rows)])
            found = slice(c.n_image + given, c.n_image + i)  # only this differs between an image's beams
            cache[..., found, :] = cache[:, :, rows, :, found]
            x = self.token["text"](token.flatten()) + place[i]
            pos = torch.tensor([c.n_image + i], device=image.device)
            logits = self.decode_step(x, pos, c.n_image + i + 1, "text", cache, guidance)


class Replayed:
    """
    step(kv_len) on a CUDA device, recorded as a graph: launched at once and not kernel by kernel. For each
    kv_len the first call runs as it is, which also warms up, and the second records. A device without graphs
    is found out by trying.
    """
    def __init__(self, step):
        self.step, self.graphs, self.works = step, {}, True

    def __call__(self, kv_len):
        if kv_len not in self.graphs or not self.works:
            self.graphs[kv_len] = None
            return self.step(kv_len)
        if self.graphs[kv_len] is None:
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # loaders' threads may go on
                    self.step(kv_len)
            except RuntimeError as e:  # nothing of the step has run yet
                torch.cuda.set_stream(stream)
                torch.cuda.synchronize()
                warnings.warn(f"no CUDA graphs here, decoding goes kernel by kernel ({e})", stacklevel=2)
                self.works = False
                return self.step(kv_len)
            self.graphs[kv_len] = graph
        self.graphs[kv_len].replay()


def positions(B, T, first, device):
    """Where positions from `first` on lie in B * T, sequence by sequence: LongTensor (B * (T - first),)."""
    return torch.arange(B * T, device=device).view(B, T)[:, first:].flatten()


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
