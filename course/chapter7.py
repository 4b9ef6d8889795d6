"""Exams of chapter 7, Matryoshka: nested_unet.py. exams.py explains how an exam works."""
import functools
import math

import torch
import torch.nn.functional as F

from course.exams import alpha_and_sigma, curves, exam, image, learns, letter, NO_GRADIENT, refused, row_of, TIMES


def enlarged(x, side):
    """Enlarge (C, h, w) to (C, side, w side / h): each pixel becomes a square."""
    return x.repeat_interleave(side // x.shape[-2], -2).repeat_interleave(side // x.shape[-2], -1)


@exam("7.1")
class Pyramid:
    sizes = [(64, 64), (32, 32), (16, 16), (8, 8)]

    def seen_of(pyramid, r):
        x, y = r.normal(2, 3, 24, 16), r.normal(1, 2, 16, 32)
        shown = letter(64) + 0.7 * r.normal(1, 3, 64, 64)
        return dict(three=pyramid(x, [(24, 16), (12, 8), (3, 2)]), wide=pyramid(y, [(16, 32), (4, 8)]),
                    one=pyramid(x, [(24, 16)]), noise=pyramid(r.normal(1, 3, 64, 64), Pyramid.sizes),
                    shown=pyramid(shown, Pyramid.sizes))

    def see(m, r):
        f, x = m.nested_unet.pyramid, torch.zeros(1, 3, 24, 16)
        return dict(Pyramid.seen_of(f, r),
                    other_size=[refused(f, x, [(48, 32)]), refused(f, x, [(16, 24), (8, 12)])],
                    no_divisor=[refused(f, x, [(24, 16), (10, 8)]), refused(f, x, [(24, 16), (12, 8), (5, 4)])],
                    two_factors=[refused(f, x, [(24, 16), (12, 4)]), refused(f, x, [(24, 16), (8, 8)])])

    def spec(m, r):
        def slow(x, sizes):                                               # each level straight from the image
            levels = []
            for h, w in sizes:
                k = x.shape[-1] // w
                rows = [torch.stack([x[..., i * k:(i + 1) * k, j * k:(j + 1) * k].double().mean((-2, -1))
                                     for j in range(w)], -1) for i in range(h)]
                levels.append(torch.stack(rows, -2).float())
            return levels
        yes = [torch.tensor(1.0)] * 2
        return dict(Pyramid.seen_of(slow, r), other_size=yes, no_divisor=yes, two_factors=yes)

    def laws(seen):
        for name, says in (("other_size", "x does not have the first size"),
                           ("no_divisor", "a size does not divide the size before it"),
                           ("two_factors", "height and width shrink by different factors")):
            yield all(float(flag) for flag in seen[name]), f"{says}: this must raise ValueError"
        for level, k in zip(seen["noise"], (1, 2, 4, 8)):
            yield abs(float(level.std()) * k - 1) < 0.25, (
                f"white noise, {k} times smaller: its standard deviation is {float(level.std()):.3f}, but the average "
                f"of {k} x {k} pixels has 1/{k}")

    def picture(seen, axis):
        image(axis, row_of([enlarged(level[0], 64).clamp(-1.5, 1.5) for level in seen["shown"]]))
        axis.set_xlabel("64, 32, 16, 8 px: averaging removes the noise and keeps the picture")


@exam("7.2")
class LevelSchedules:
    def seen_of(schedules, m, r):
        def base(t):
            return m.schedule.logsnr_shifted(t, 64, 32)
        power, t = float(r.uniform(1, low=0.5, high=3)), r.uniform(5, low=0.1, high=0.9)
        sizes = [(256, 256), (128, 128), (64, 64)]
        return dict(random=[f(t) for f in schedules(base, [(96, 96), (32, 32), (16, 16), (8, 8)], power)],
                    oblong=[f(t) for f in schedules(base, [(64, 128), (8, 16)], power)],
                    tall=[f(t) for f in schedules(base, [(80, 48), (20, 12), (5, 3)], power)],
                    single=[f(t) for f in schedules(base, [(16, 16)], power)],
                    curves=[f(TIMES) for f in schedules(base, sizes)], base=base(TIMES),
                    number=[f(torch.tensor(0.5)) for f in schedules(base, sizes, 1.0)])

    def see(m, r):
        return LevelSchedules.seen_of(m.nested_unet.level_schedules, m, r)

    def spec(m, r):
        def slow(base, sizes, power=2.0):                                 # divide the SNR itself by k^power
            def snr(k, t):
                return torch.log(torch.exp(base(t).double()) / k ** power).float()
            lowest = sizes[-1][0] * sizes[-1][1]
            return [functools.partial(snr, math.sqrt(h * w / lowest)) for h, w in sizes]
        return LevelSchedules.seen_of(slow, m, r)

    def laws(seen):
        top, middle, low = seen["curves"]
        yield float((top - low).abs().max()) > 0.1, (
            "all levels have the same schedule: a lambda in a loop sees the last value; bind the value")
        yield float((low - seen["base"]).abs().max()) < 1e-3, "the lowest level must follow base unchanged"
        for name, one, k in (("256", top, 4), ("128", middle, 2)):
            gap = float((low - one).mean())
            yield abs(gap - 2 * math.log(k)) < 1e-2, (
                f"power 2: {name} px lies {gap:.3f} below the lowest level of 64 px, want "
                f"{2 * math.log(k):.3f}")

    def picture(seen, axis):
        names = "256 px", "128 px", "64 px, the lowest"
        curves(axis, TIMES, dict(zip(names, seen["curves"])), "t", "log-SNR of a pixel")


@exam("7.3")
class NestedLoss:
    taught = recorded = True

    sizes = [(8, 8), (4, 4), (2, 2)]

    def model(calls):
        """Return a simple network that records its inputs in `calls`."""
        def call(z, logsnr, cond):
            calls.append([*z, *logsnr, *cond.values()])
            return [0.5 * level.sin() + 0.1 * l[:len(level)].reshape(-1, 1, 1, 1) for level, l in zip(z, logsnr)]
        return call

    def inputs(m, r):
        x, eps = ([r.normal(4, 3, *size) for size in NestedLoss.sizes] for _ in range(2))
        base = [-2.0, 1.0, 3.0]                                           # each level's log-SNR at t = 1/2
        schedules = [lambda t, at=at: m.schedule.logsnr_cosine(t) + at for at in base]
        return x, eps, {"shade": r.normal(4)}, r.uniform(4, low=0.2, high=0.8), schedules

    def cases(r):
        weights = r.uniform(3, low=0.5, high=3).tolist()
        return {"all": {}, "weighted": dict(weights=weights), "mixed": dict(rows=[1, 2, 4]),
                "mixed_weighted": dict(weights=weights, rows=[2, 4, 4]),
                "top": dict(weights=[1.0, 0.0, 0.0], rows=[2, 3, 4])}

    def seen_of(m, r, loss):
        """Call loss(calls, x, cond, t, eps, schedules, kind, **case)."""
        x, eps, cond, t, schedules = NestedLoss.inputs(m, r)
        seen, calls = dict(x=x, eps=eps, logsnr=[schedule(t) for schedule in schedules]), {}
        for name, case in NestedLoss.cases(r).items():
            for kind in ("eps_mse", "v_mse"):
                calls[name] = []
                seen[f"{name}_{kind}"] = loss(calls[name], x, cond, t, eps, schedules, kind, **case)
        first = [[part[:2] for part in parts] for parts in (x, eps)]
        seen["top_alone"] = loss([], first[0], {"shade": cond["shade"][:2]}, t[:2], first[1], schedules, "v_mse",
                                 weights=[1.0, 0.0, 0.0])
        shown = [F.avg_pool2d(letter(64), k) for k in (1, 2, 4)]
        noises, view = [r.normal(*level.shape) for level in shown], []
        halves = [lambda t, k=k: m.schedule.logsnr_cosine(t) - 2 * math.log(k) for k in (4, 2, 1)]
        seen["shown_loss"] = loss(view, shown, {}, torch.tensor([0.25]), noises, halves, "v_mse")
        for name in ("all", "mixed"):
            seen[f"calls_{name}"] = float(len(calls[name]))
            seen[f"inputs_{name}"] = calls[name][0] if calls[name] else []
        return dict(seen, shown=view[0][:3] if view else [])

    def see(m, r):
        def loss(calls, x, cond, t, eps, schedules, kind, **case):
            measure = functools.partial(m.train.prediction_loss, loss=kind)
            return m.nested_unet.nested_loss(NestedLoss.model(calls), x, cond, t, eps, schedules, measure, **case)
        seen = NestedLoss.seen_of(m, r, loss)
        x, eps, _, t, schedules = NestedLoss.inputs(m, r)
        model = lambda weight: lambda z, logsnr, cond: [w * level for w, level in zip(weight, z)]
        return dict(seen, learns=learns(lambda weight: m.nested_unet.nested_loss(
            model(weight), x, {}, t, eps, schedules, m.train.prediction_loss), torch.ones(3)))

    def slow(calls, x, cond, t, eps, schedules, kind, weights=None, rows=None):
        """Compute the loss example by example and level by level, in float64."""
        z, logsnr, total = [], [], 0.0
        for level in range(len(x)):
            z.append([]), logsnr.append([])
            n, loss = len(x[level]) if rows is None else rows[level], 0.0
            for i in range(n):
                l = schedules[level](t[i])
                alpha, sigma = (part.reshape(1, 1, 1) for part in alpha_and_sigma(l))
                one, noise = x[level][i].double(), eps[level][i].double()
                look = alpha * one + sigma * noise
                error = 0.5 * look.sin() + 0.1 * l - (alpha * noise - sigma * one)
                loss = loss + (error ** 2).mean() * (1 if kind == "v_mse" else float(alpha) ** 2) / n
                z[-1].append(look.float()), logsnr[-1].append(l)
            total = total + (1.0 if weights is None else weights[level]) * loss
        calls.append([*map(torch.stack, z), *map(torch.stack, logsnr), *cond.values()])
        return total.float()

    def spec(m, r):
        return dict(NestedLoss.seen_of(m, r, NestedLoss.slow), learns=1.0)

    def laws(seen):
        yield float(seen["calls_all"]) == 1, "call the model once, with the lists of all levels"
        yield bool(seen["learns"]), NO_GRADIENT
        for name, z, x, eps, logsnr in zip(("highest", "middle", "lowest"), seen["inputs_all"], seen["x"], seen["eps"],
                                           seen["logsnr"]):
            alpha, sigma = alpha_and_sigma(logsnr)
            yield float((z - alpha * x - sigma * eps).abs().max()) < 1e-3, (
                f"the {name} level must be alpha x + sigma eps with its own x, its own noise and its own schedule at t")
        yield abs(float(seen["weighted_v_mse"] - seen["all_v_mse"])) > 1e-3, (
            "the weights change nothing: each must multiply the loss of its level")
        yield abs(float(seen["top_v_mse"] - seen["top_alone"])) < 1e-3, (
            "with rows, the loss of the highest level must be the mean over its own rows")

    def picture(seen, axis):
        image(axis, row_of([enlarged(level[0], 64).clamp(-1.5, 1.5) for level in seen["shown"]]))
        axis.set_xlabel("one t, three levels, as the network sees them:\n"
                        "each has its own noise; a larger level has more")


def network_7(m, r):
    """Build a network of three levels, 32, 16 and 8 px, with random weights. The innermost reads a text of width 6."""
    common = dict(emb_channels=16, channel_mult=(1, 2), num_res_blocks=(1, 1), num_heads=2)
    inner = m.unet.UNet((8, 8), 8, attn_resolutions=(4,), num_classes=3, text_channels=6, **common)
    middle, outer = (m.unet.UNet(size, 4, attn_resolutions=(), num_classes=None, middle=False, **common)
                     for size in ((16, 16), (32, 32)))
    nested = m.nested_unet.NestedUNet
    return r.fill(nested(nested(inner, middle), outer))


def slow_denoise(network, z, logsnr, condition, text, f=None):
    """Send each example by itself through the levels that it has: down to the innermost, then up."""
    made, last = [[] for _ in z], []
    for i in range(len(z[-1])):
        inside, levels = network, []
        while hasattr(inside, "inner"):
            levels += [inside] if inside.outer is not None else []
            inside = inside.inner
        first = [len(level) > i for level in z].index(True)               # the example's highest level
        visited, from_above = [], f[i:i + 1] if f is not None and first == 0 else None
        emb = [embed.of_logsnr(logsnr[k][i:i + 1], 1) + condition[i:i + 1] if k >= first else None
               for k, embed in enumerate([level.outer.embed for level in levels] + [inside.embed])]
        for k in range(first, len(levels)):
            h, skips = levels[k].outer.descend(z[k][i:i + 1], emb[k], f=from_above)
            from_above = levels[k].in_adapter(h)
            visited.append((k, h, skips))
        h = inside.features(z[-1][i:i + 1], emb[-1], tuple(part[i:i + 1] for part in text), from_above)
        made[-1].append(inside.output(h))
        for k, coarsest, skips in reversed(visited):
            h = levels[k].outer.ascend(coarsest + levels[k].out_adapter(h), skips, emb[k])
            made[k].append(levels[k].outer.output(h))
        if first == 0:
            last.append(h)
    return [torch.cat(level) for level in made], torch.cat(last)


@exam("7.4", tolerance=1e-3)
class Denoise:
    taught = True
    untaught = "embed.label",

    def seen_of(denoise, m, r):
        network = network_7(m, r)
        z = [r.normal(3, 3, side, side) for side in (32, 16, 8)]
        logsnr = [r.uniform(3, low=-8, high=8) for _ in range(3)]
        condition, f = r.normal(3, 16), r.normal(3, 4, 16, 16)
        text = r.normal(3, 5, 6), torch.arange(5) < torch.tensor([[2], [5], [3]])
        rows = [[part[:n] for part, n in zip(parts, (1, 2, 3))] for parts in (z, logsnr)]
        with torch.no_grad():
            extra, innermost = (condition, text), network.inner.inner
            seen = dict(three=denoise(network, z, logsnr, *extra),
                        from_above=denoise(network.inner, z[1:], logsnr[1:], *extra, f),
                        single=denoise(m.nested_unet.NestedUNet(innermost), z[2:], logsnr[2:], *extra),
                        mixed=denoise(network, *rows, *extra), innermost=denoise(innermost, z[2:], logsnr[2:], *extra))
            moved = []
            for adapters in ("random", "zero"):
                if adapters == "zero":
                    for layer in (network, network.inner):
                        for p in (*layer.in_adapter.parameters(), *layer.out_adapter.parameters()):
                            p.zero_()
                    seen["zero"] = denoise(network, z, logsnr, *extra)
                plain, _ = denoise(network, z, logsnr, *extra)
                for changed in range(3):
                    other = [-level if k == changed else level for k, level in enumerate(z)]
                    v, _ = denoise(network, other, logsnr, *extra)
                    moved += [(a - b).abs().mean() for a, b in zip(v, plain)]
        return dict(seen, moved=torch.stack(moved).reshape(2, 3, 3))      # adapters, input, output

    def see(m, r):
        seen, network = Denoise.seen_of(m.nested_unet.denoise, m, r), network_7(m, r)
        z, logsnr = [r.normal(1, 3, side, side) for side in (32, 16, 8)], [r.uniform(1, high=2) for _ in range(3)]
        text = r.normal(1, 5, 6), torch.ones(1, 5).bool()
        adapters = [layer.weight for level in (network, network.inner)
                    for layer in (level.in_adapter, level.out_adapter)]
        v, _ = m.nested_unet.denoise(network, z, logsnr, r.normal(1, 16), text)
        value = sum(level.square().sum() for level in v)
        reached = torch.autograd.grad(value, adapters, allow_unused=True) if value.requires_grad else [None]
        return dict(seen, learns=float(all(g is not None and bool(g.any()) for g in reached)))

    def spec(m, r):
        return dict(Denoise.seen_of(slow_denoise, m, r), learns=1.0)

    def laws(seen):
        alone = seen["innermost"][0]
        yield float((seen["zero"][2] - alone).abs().max()) < 1e-3, (
            "with both adapters at zero the lowest level must equal the innermost network by itself")
        yield bool(seen["learns"]), "the adapters get no gradient and stay at zero: did you use .detach() or no_grad?"
        yield float((seen["mixed"][2][2:] - alone[2:]).abs().max()) < 1e-3, (
            "mixed batch: an example without a higher level must get f = 0, as the innermost network by itself")
        for other in (1, 2):
            yield float(seen["moved"][0, other, 0]) > 1e-4, "out_adapter: a lower level does not change the highest"
        for other in (0, 1):
            yield float(seen["moved"][0, other, 2]) > 1e-4, "in_adapter: a higher level does not change the lowest"

    def picture(seen, axis):
        moved = seen["moved"]
        table = torch.cat([moved[0], torch.full((3, 1), torch.nan), moved[1]], 1)
        axis.imshow(table, cmap="Blues", vmin=0, vmax=2 * float(moved.max()))
        for i in range(3):
            for j in (0, 1, 2, 4, 5, 6):
                axis.text(j, i, f"{float(table[i, j]):.2f}", ha="center", va="center", fontsize=8)
        levels = ["32 px", "16 px", "8 px"]
        axis.set_xticks((0, 1, 2, 4, 5, 6), [f"v {name}" for name in levels] * 2, fontsize=7)
        axis.set_yticks(range(3), [f"z {name}" for name in levels], fontsize=7)
        axis.set_xlabel("mean change of each v when one z changes its sign;\n"
                        "right: the same with both adapters at zero", fontsize=9)
