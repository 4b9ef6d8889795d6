"""Exams of chapter 4, the U-Net: unet.py. exams.py explains how an exam works."""
import math

import torch
import torch.nn.functional as F

from course.exams import (drops_singly, exam, image, learns, letter, NO_GRADIENT, row_of, slow_norm, swish,
                          unbiased)


@exam("4.1", tolerance=1e-3)                                              # sines of angles up to 1000
class LevelEmbedding:
    taught = True
    untaught = "label",

    def seen(m, r, call):
        moved, plain = m.unet.Embedding(16, -19.16, 10.84, 5), m.unet.Embedding(16, -15.0, 15.0, 5)
        plain.load_state_dict(r.fill(moved).state_dict())
        odd, curve = m.unet.Embedding(16, -20.0, 14.0, 5), torch.linspace(-19.16, 10.84, 61)
        odd.load_state_dict(moved.state_dict())
        ends = torch.tensor([-19.16, 10.84]), torch.tensor([-15.0, 15.0])
        return dict(random=call(moved, r.uniform(4, low=-18, high=10), 4), scalar=call(moved, torch.tensor(0.5), 3),
                    odd=call(odd, r.uniform(4, low=-18, high=12), 4), moved=call(moved, ends[0], 2),
                    plain=call(plain, ends[1], 2), curve=call(moved, curve, 61),
                    plain_curve=call(plain, torch.linspace(-15, 15, 61), 61))

    def see(m, r):
        return LevelEmbedding.seen(m, r, lambda layer, logsnr, batch: layer.of_logsnr(logsnr, batch))

    def spec(m, r):
        def slow(layer, logsnr, batch):
            places = [(float(l) - layer.logsnr_min) / (layer.logsnr_max - layer.logsnr_min)
                      for l in logsnr.reshape(-1).expand(batch)]
            return layer.time(m.unet.sinusoid(torch.tensor(places), layer.sinusoid_channels))
        return LevelEmbedding.seen(m, r, slow)

    def laws(seen):
        yield float((seen["moved"] - seen["plain"]).abs().max()) < 2e-2, (
            "the ends of a shifted schedule, -19.16 and 10.84, must get the embeddings of the plain one's, -15 and 15")
        yield float(seen["scalar"].std(0).max()) < 1e-6, "a scalar log-SNR must give every example the same row"

    def picture(seen, axis):
        rows, columns = (F.normalize(curve - curve.mean(0), dim=1) for curve in (seen["curve"], seen["plain_curve"]))
        axis.imshow(rows @ columns.T, cmap="Blues", vmin=0, vmax=1, origin="lower", aspect="auto",
                    extent=(-15, 15, -19.16, 10.84))
        axis.set(xlabel="log-SNR of a plain schedule", ylabel="log-SNR of a shifted one")
        axis.set_title("dark: the same embedding", fontsize=8, loc="right")


@exam("4.2", tolerance=1e-3)
class ResBlock:
    taught = True

    def seen(m, r, call):
        x, skip, emb = r.normal(2, 8, 6, 6) + 0.5, 3 * r.normal(2, 8, 6, 6), r.normal(2, 12)
        plain, joined = r.fill(m.unet.ResBlock(8, 12)), r.fill(m.unet.ResBlock(8, 12, skip=True))
        dropped = r.fill(m.unet.ResBlock(8, 12, dropout=1.0)).train()
        half = r.fill(m.unet.ResBlock(8, 12, dropout=0.5))
        picture, shown = r.fill(m.unet.ResBlock(3, 12)), letter().expand(3, -1, -1, -1)
        return dict(plain=call(plain, x, emb, None), joined=call(joined, x, emb, skip),
                    louder=call(joined, x, emb, 5 * skip), dropped=call(dropped, x, emb, None), x=x,
                    bias=dropped.conv2.bias, rested=call(half, x, emb, None),
                    shown=call(picture, shown, r.normal(3, 12), None))

    def see(m, r):
        call = lambda block, x, emb, skip: block(x.clone(), emb.clone(), *(() if skip is None else (skip.clone(),)))
        seen, half = ResBlock.seen(m, r, call), r.fill(m.unet.ResBlock(8, 12, dropout=0.5, skip=True))
        x, emb, skip = r.normal(1, 8, 6, 6), r.normal(1, 12), r.normal(1, 8, 6, 6)
        many = lambda n: half(*(one.repeat_interleave(n, 0) for one in (x, emb, skip)))
        return dict(seen, unbiased=unbiased(many, half), single=drops_singly(half, half.conv2, x, emb, skip),
                    learns=learns(half.eval(), x, emb, skip))

    def spec(m, r):
        def slow(block, x, emb, skip):
            norm = lambda layer, a: slow_norm(a, layer.num_groups, layer.weight, layer.bias)
            conv = lambda layer, a: F.conv2d(a, layer.weight.double(), layer.bias.double(), padding=1)
            h = norm(block.norm1, x)
            if skip is not None:
                h = (h + norm(block.norm_skip, skip)) / math.sqrt(2)
            h = norm(block.norm2, conv(block.conv1, swish(h)))
            film = emb.double() @ block.film.weight.double().T + block.film.bias.double()
            C = x.shape[1]
            h = torch.stack([torch.stack([h[b, c] * (1 + film[b, c]) + film[b, C + c] for c in range(C)])
                             for b in range(len(x))])
            h = swish(h) * (0 if block.training else 1)                   # the one block in training has dropout 1
            return (x.double() + conv(block.conv2, h)).float()
        return dict(ResBlock.seen(m, r, slow), unbiased=1.0, single=1.0, learns=1.0)

    def laws(seen):
        yield float((seen["dropped"] - seen["x"] - seen["bias"].reshape(1, -1, 1, 1)).abs().max()) < 1e-4, (
            "with dropout 1, x and the bias of conv2 must remain: dropout belongs right before conv2")
        yield bool(seen["unbiased"]), (
            "in training dropout must act once, right before conv2, and keep the mean of evaluation mode")
        yield bool(seen["single"]), "dropout must drop single numbers, not whole channels or places of the map"
        yield bool(seen["learns"]), NO_GRADIENT
        yield float((seen["joined"] - seen["louder"]).abs().max()) < 1e-2, (
            "a skip times five must change nothing: h and skip are both normalised before they are added")

    def picture(seen, axis):
        image(axis, row_of([letter()[0], *seen["shown"]]))
        axis.set_xlabel("x, and x + h with random weights for three embeddings")


SIDES = [(4, 4), (8, 8), (16, 16), (32, 32), (64, 64), (8, 32), (8, 12), (12, 20), (24, 40), (23, 22)]
RESOLUTIONS = (0, 8, 16, 32)


@exam("4.3")
class Dropout:
    def sizes(r):
        pairs = [(r.integer(3, 90), r.integer(3, 90)) for _ in range(10)]
        return SIDES + [(h, w) for h, w in pairs if all(h * w != 2 * d * d for d in RESOLUTIONS)]    # no ties

    def see(m, r):
        sizes = Dropout.sizes(r)
        return dict(table=[bool(m.unet.at_or_below(h, w, d)) for h, w in sizes for d in RESOLUTIONS])

    def spec(m, r):
        sizes = Dropout.sizes(r)
        return dict(table=[float(d > 0 and h * w < 2 * d * d) for h, w in sizes for d in RESOLUTIONS])

    def laws(seen):
        table = {(*size, d): bool(seen["table"][4 * i + j]) for i, size in enumerate(SIDES)
                 for j, d in enumerate(RESOLUTIONS)}
        yield not any(table[h, w, 0] for h, w in SIDES), "resolution 0 must mean never"
        yield table[16, 16, 16], "from 16 x 16 down: 16 x 16 itself must have dropout"
        yield table[8, 8, 16] and not table[32, 32, 16], "smaller maps must have dropout, larger ones must not"
        yield table[8, 32, 16], "8 x 32 must count as 16 x 16, which has the same area"

    def picture(seen, axis):
        table = torch.stack(seen["table"])[:20].reshape(5, 4)
        axis.imshow(table, cmap="Blues", vmin=0, vmax=1.5)
        axis.set(xticks=range(4), xticklabels=["never (0)", "8", "16", "32"], yticks=range(5), xlabel="dropout from",
                 yticklabels=[f"{h} x {w}" for h, w in SIDES[:5]])


@exam("4.4", tolerance=1e-3)
class WayUp:
    taught = True
    untaught = "embed.", "input.", "down.", "downsample.", "middle.", "output."

    def seen(m, r, call):
        net = r.fill(m.unet.UNet((16, 24), 8, 12, (1, 2, 2), (1, 2, 1), attn_resolutions=(5,), num_heads=2,
                                 num_classes=3))
        emb, z = r.normal(2, 12), r.normal(2, 3, 16, 24)
        h, skips = net.descend(z, emb)
        out = call(net, h, list(skips), emb)
        uses = []
        for i, skip in enumerate(skips):
            other = call(net, h, [*skips[:i], skip + r.normal(*skip.shape), *skips[i + 1:]], emb)
            uses.append(float((other - out).abs().mean()))
        reader = r.fill(m.unet.UNet((8, 8), 8, 12, (1, 2), (1, 1), attn_resolutions=(8, 4), num_heads=2, num_classes=3,
                                    text_channels=6))
        text = r.normal(2, 3, 6), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
        h, skips = reader.descend(r.normal(2, 3, 8, 8), emb, text)
        return dict(out=out, uses=uses, text=call(reader, h, skips, emb, text))

    def see(m, r):
        with torch.no_grad():
            return WayUp.seen(m, r, lambda net, h, skips, emb, *text: net.ascend(h, list(skips), emb, *text))

    def spec(m, r):
        def slow(net, h, skips, emb, text=None):
            last, levels = len(skips), len(net.up)
            for level in range(levels):
                for i in range((2, 3, 2)[level] if levels == 3 else 2):   # k + 1, coarsest level first
                    last -= 1
                    block, attention = net.up[level][i]
                    h = attention(block(h, emb, skips[last]), text)
                h = net.upsample[level](h) if level < levels - 1 else h
            return h
        with torch.no_grad():
            return WayUp.seen(m, r, slow)

    def laws(seen):
        for i, use in enumerate(seen["uses"]):
            yield float(use) > 1e-6, (
                f"skip {i} of {len(seen['uses'])} changes nothing: each skip must go into a block of its own")

    def picture(seen, axis):
        axis.bar(range(len(seen["uses"])), [float(use) for use in seen["uses"]])
        axis.set(xlabel="skip, the finest first", ylabel="mean change of the output")
