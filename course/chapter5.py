"""Exams of chapter 5, the U-ViT: unet.py and uvit.py. exams.py explains how an exam works."""
import math

import torch

from course.exams import (drops_singly, exam, image, influence, learns, NO_GRADIENT, refused, row_of, slow_norm, swish,
                          table, unbiased)


@exam("5.1", tolerance=1e-3)
class Attention:
    taught = True

    def seen(m, r, call):
        layer, x = r.fill(m.unet.Attention(12, 3)), r.normal(2, 5, 12)
        mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 1, 1]]).bool()
        order, other = torch.randperm(5, generator=r.generator), x.clone()
        other[0, 2], other[1, 1:3] = r.normal(12), r.normal(2, 12)
        out = dict(out=call(layer, x, None), shuffled=call(layer, x[:, order], None)[:, order.argsort()],
                   masked=call(layer, x, mask), hidden=call(layer, other, mask), mask=mask.float(),
                   influence=influence(lambda x: call(layer, x, mask[:1]), x[:1], r))
        with torch.no_grad():
            layer.qkv.weight[:24] *= 1000                                 # q and k times a thousand
            layer.qkv.bias[:24] *= 1000
        return dict(out, loud=call(layer, x, None), x=x)

    def see(m, r):
        call = lambda layer, x, mask: layer(x.clone()) if mask is None else layer(x.clone(), mask)
        seen, layer = Attention.seen(m, r, call), r.fill(m.unet.Attention(12, 3))
        x = r.normal(2, 5, 12)
        layers = lambda q, out: torch.func.functional_call(layer, {"qkv.weight": q, "out.weight": out}, x)
        return dict(seen, learns=[learns(layer, x), learns(layers, layer.qkv.weight, layer.out.weight)])

    def spec(m, r):
        def slow(layer, x, mask):
            B, N, C = x.shape
            n, d = layer.num_heads, C // layer.num_heads
            qkv = slow_norm(x, None, layer.norm.weight) @ layer.qkv.weight.double().T + layer.qkv.bias.double()
            out = torch.zeros(B, N, C, dtype=torch.double)
            for b in range(B):
                for head in range(n):
                    q, k, v = (qkv[b, :, part * C + head * d:part * C + (head + 1) * d] for part in range(3))
                    q, k = (slow_norm(a, None, l.weight, l.bias) for a, l in ((q, layer.norm_q), (k, layer.norm_k)))
                    for i in range(N):
                        logits = [float(q[i] @ k[j]) / math.sqrt(d) if mask is None or mask[b, j] else -math.inf
                                  for j in range(N)]
                        weights = [math.exp(l - max(logits)) for l in logits]
                        out[b, i, head * d:(head + 1) * d] = sum(w * v[j] for j, w in enumerate(weights)) / sum(weights)
            return (x.double() + out @ layer.out.weight.double().T + layer.out.bias.double()).float()
        with torch.no_grad():
            return dict(Attention.seen(m, r, slow), learns=[1.0] * 2)

    def laws(seen):
        yield float((seen["out"] - seen["loud"]).abs().max()) < 1e-2, (
            "q and k times a thousand must change nothing: they are normalised per head")
        yield all(map(float, seen["learns"])), NO_GRADIENT
        yield float((seen["out"] - seen["shuffled"]).abs().max()) < 1e-3, (
            "shuffled tokens must give the same results, shuffled: attention knows no positions")
        visible = seen["mask"].bool()
        yield float((seen["masked"] - seen["hidden"])[visible].abs().max()) < 1e-3, "a masked token changes the result"

    def picture(seen, axis):
        table(axis, seen["influence"])
        axis.set(xlabel="a token that changes; 2 is masked", ylabel="what changes in the result")


@exam("5.2", tolerance=1e-3)
class MLP:
    taught = True

    def seen(m, r, call):
        x, skip, emb = r.normal(2, 5, 8) + 0.5, 3 * r.normal(2, 5, 8), r.normal(2, 12)
        plain, joined = r.fill(m.uvit.MLPBlock(8, 12)), r.fill(m.uvit.MLPBlock(8, 12, skip=True))
        dropped, half = r.fill(m.uvit.MLPBlock(8, 12, dropout=1.0)).train(), r.fill(m.uvit.MLPBlock(8, 12, dropout=0.5))
        return dict(plain=call(plain, x, emb, None), joined=call(joined, x, emb, skip),
                    louder=call(joined, x, emb, 5 * skip), alone=call(plain, x[:, 2:3], emb, None),
                    dropped=call(dropped, x, emb, None), x=x, bias=dropped.out.bias,
                    rested=call(half, x, emb, None),
                    influence=influence(lambda x: call(plain, x, emb[:1], None), x[:1], r))

    def see(m, r):
        call = lambda block, x, emb, skip: block(x.clone(), emb.clone(), *(() if skip is None else (skip.clone(),)))
        seen, half = MLP.seen(m, r, call), r.fill(m.uvit.MLPBlock(8, 12, dropout=0.5, skip=True))
        x, emb, skip = r.normal(1, 5, 8), r.normal(1, 12), r.normal(1, 5, 8)
        many = lambda n: half(*(one.repeat_interleave(n, 0) for one in (x, emb, skip)))
        return dict(seen, unbiased=unbiased(many, half), single=drops_singly(half, half.out, x, emb, skip),
                    learns=learns(half.eval(), x, emb, skip))

    def spec(m, r):
        def slow(block, x, emb, skip):
            dense = lambda layer, a: a @ layer.weight.double().T + layer.bias.double()
            film, out = dense(block.film, emb.double()), torch.zeros_like(x)
            for b in range(x.shape[0]):
                for n in range(x.shape[1]):                               # token by token: they do not mix
                    h = slow_norm(x[b, n], None, block.norm.weight)
                    if skip is not None:
                        h = (h + slow_norm(skip[b, n], None, block.norm_skip.weight)) / math.sqrt(2)
                    h = swish(dense(block.expand, h))
                    half = len(h)
                    h = (h * (1 + film[b, :half]) + film[b, half:]) * (0 if block.training else 1)
                    out[b, n] = (x[b, n].double() + dense(block.out, h)).float()
            return out
        with torch.no_grad():
            return dict(MLP.seen(m, r, slow), unbiased=1.0, single=1.0, learns=1.0)

    def laws(seen):
        yield float((seen["dropped"] - seen["x"] - seen["bias"]).abs().max()) < 1e-4, (
            "with dropout 1, x and the bias of the last layer must remain: dropout belongs right before it")
        yield bool(seen["unbiased"]), (
            "in training dropout must act once, right before the last layer, and keep the mean of evaluation mode")
        yield bool(seen["single"]), "dropout must drop single numbers, not whole tokens or channels"
        yield bool(seen["learns"]), NO_GRADIENT
        yield float((seen["joined"] - seen["louder"]).abs().max()) < 1e-2, (
            "a skip times five must change nothing: h and skip are both normalised before they are added")
        yield float((seen["plain"][:, 2:3] - seen["alone"]).abs().max()) < 1e-4, (
            "a token's result depends on other tokens")

    def picture(seen, axis):
        table(axis, seen["influence"])
        axis.set(xlabel="a token that changes: no other token sees it", ylabel="what changes in the result")


@exam("5.3", tolerance=2e-3)
class Tokens:
    taught = True
    untaught = "embed.", "output."

    def seen(m, r, call):
        net, reader = (r.fill(m.uvit.UViT((16, 24), 8, 12, (1, 2, 2), (1, 2), 2, num_heads=2, num_classes=3,
                                          text_channels=width)) for width in (0, 6))
        z, emb, f = r.normal(2, 3, 16, 24), r.normal(2, 12), r.normal(2, 8, 16, 24)
        tall = r.fill(m.uvit.UViT((24, 8), 8, 12, (1, 2, 2), (1, 2), 1, num_heads=2, num_classes=3))
        text = r.normal(2, 3, 6), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
        out = dict(out=call(net, z, emb, None, None), text=call(reader, z, emb, text, None),
                   f=call(net, z, emb, None, f),
                   tall=call(tall, torch.cat([z[..., :8], z[:, :, :8, 8:16]], 2), emb, None, None),
                   refused=[refused(net.features, small, emb) for small in (z[..., :16], z[..., :8, :])])
        with torch.no_grad():
            net.position[7] += 3 * r.normal(16)                           # the token of row 1, column 1 of 4 x 6
        return dict(out, moved=call(net, z, emb, None, None))

    def see(m, r):
        with torch.no_grad():
            seen = Tokens.seen(m, r, lambda net, *given: net.features(*given))
            net = r.fill(m.uvit.UViT((8, 8), 8, 12, (1, 2), (1,), 1, num_heads=2, num_classes=3))
            return dict(seen, learns=learns(net.features, r.normal(1, 3, 8, 8), r.normal(1, 12)))

    def spec(m, r):
        def slow(net, z, emb, text, f):
            h, skips = net.input(z) + (0 if f is None else f), []
            for level in (0, 1):
                for i in range((1, 2)[level]):
                    h = net.down[level][i][0](h, emb)
                    skips.append(h)
                h = net.downsample[level](h)
            H, W = h.shape[-2:]
            x = torch.stack([h[:, :, n // W, n % W] + net.position[n] for n in range(H * W)], 1)
            for block in net.transformer:
                x = block(x, emb, text)
            h = torch.stack([torch.stack([x[:, row * W + column] for column in range(W)], -1) for row in range(H)], -2)
            for level in (1, 0):
                h = net.upsample[1 - level](h)
                for i in range((1, 2)[level]):
                    h = net.up[1 - level][i][0](h, emb, skips.pop())
            return h
        with torch.no_grad():
            return dict(Tokens.seen(m, r, slow), refused=[1.0] * 2, learns=1.0)

    def laws(seen):
        yield all(map(float, seen["refused"])), "an image of another size must raise ValueError"
        yield bool(seen["learns"]), NO_GRADIENT
        yield float((seen["out"] - seen["moved"]).abs().max()) > 1e-4, "the position embedding changes nothing"
        yield float((seen["out"] - seen["f"]).abs().max()) > 1e-4, "f, the map of an outer level, changes nothing"

    def picture(seen, axis):
        image(axis, row_of([seen["out"][0, :3], (seen["moved"] - seen["out"])[0, :3]]))
        axis.set_xlabel("the last map, and its change when the position of token 7 changes")
