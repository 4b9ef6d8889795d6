"""Exams of chapter 3, the wavelet: dwt.py. exams.py explains how an exam works."""
import torch
import torch.nn.functional as F

from course.exams import curves, exam, image, learns, letter, NO_GRADIENT, refused, row_of


def slow_level(x):
    """Transform a list of numbers by one level. The standard's filters: (-1, 2, 6, 2, -1)/8 and (-1, 2, -1)/2."""
    n = len(x)

    def at(i):                                                            # mirrored about the end samples
        i = abs(i)
        return x[2 * (n - 1) - i] if i >= n else x[i]
    low = [(-at(k - 2) + 2 * at(k - 1) + 6 * at(k) + 2 * at(k + 1) - at(k + 2)) / 8 for k in range(0, n, 2)]
    high = [(-at(k - 1) + 2 * at(k) - at(k + 1)) / 2 for k in range(1, n, 2)]
    return low, high


def slow_split(x):
    """Apply slow_level along the last axis of x (..., N)."""
    pairs = [slow_level(line) for line in x.double().reshape(-1, x.shape[-1]).tolist()]
    return [torch.tensor([pair[i] for pair in pairs]).reshape(*x.shape[:-1], -1) for i in (0, 1)]


def slow_dwt(x, levels):
    """Build dwt from slow_split, with space-to-depth by slicing."""
    details = []
    for level in range(levels):
        low, high = slow_split(x)
        ll, lh, hl, hh = (part.transpose(-1, -2) for half in (low, high) for part in slow_split(half.transpose(-1, -2)))
        factor, bands, x = 2 ** (levels - 1 - level), torch.cat([lh, hl, hh], 1), ll
        packed = [bands[:, c:c + 1, i::factor, j::factor] for c in range(bands.shape[1]) for i in range(factor)
                  for j in range(factor)]
        details = [torch.cat(packed, 1)] + details
    return torch.cat([x] + details, 1).float()


def worst(band, wanted):
    """Return the largest error of a band (N,), and in words the number there."""
    error = (band - wanted).abs()
    n = int(error.argmax())
    return float(error[n]), f"{float(band[n]):.4g} at [{n}]"


@exam("3.1")
class Split:
    taught = True

    def see(m, r):
        wave = torch.sin(torch.arange(64) / 5.0) + (torch.arange(64) > 40)
        return dict(random=m.dwt._split(r.normal(2, 3, 10)), two=m.dwt._split(r.normal(1, 2)),
                    line=m.dwt._split(torch.arange(12.0)), flat=m.dwt._split(torch.full((8,), 3.0)),
                    wave=m.dwt._split(wave), learns=learns(m.dwt._split, r.normal(2, 8)))

    def spec(m, r):
        wave = torch.sin(torch.arange(64) / 5.0) + (torch.arange(64) > 40)
        return dict(random=slow_split(r.normal(2, 3, 10)), two=slow_split(r.normal(1, 2)),
                    line=slow_split(torch.arange(12.0)), flat=slow_split(torch.full((8,), 3.0)), wave=slow_split(wave),
                    learns=1.0)

    def laws(seen):
        low, high = seen["flat"]
        error, place = worst(high, 0)
        yield error < 1e-5, f"the high band of a constant is {place}: it must be zero"
        yield bool(seen["learns"]), NO_GRADIENT
        error, place = worst(low, 3)
        yield error < 1e-5, f"the low band of a constant 3 is {place}: its gain must be 1"
        error, place = worst(seen["line"][1][:-1], 0)
        yield error < 1e-5, (f"the high band of a straight line is {place}: it must be zero inside; predict from both "
                             "neighbours (Haar uses one)")

    def band(key, i, place):
        return ("low", "high")[i]

    def picture(seen, axis):
        low, high = seen["wave"]
        curves(axis, range(32), {"low": low, "high": high}, "n", "a wave with a jump")


@exam("3.2")
class Merge:
    taught = True

    def see(m, r):
        low, high = r.normal(2, 3, 5), r.normal(2, 3, 5)
        wave = torch.sin(torch.arange(64) / 5.0) + (torch.arange(64) > 40)
        parts = slow_split(wave)
        return dict(random=m.dwt._merge(low, high), back=m.dwt._merge(*slow_split(r.normal(4, 12))),
                    smooth=m.dwt._merge(parts[0], torch.zeros(32)), wave=m.dwt._merge(*parts),
                    learns=learns(m.dwt._merge, low, high))

    def spec(m, r):
        low, high = r.normal(2, 3, 5), r.normal(2, 3, 5)

        def solve(low, high):                                             # invert the matrix of slow_split
            n = 2 * low.shape[-1]
            matrix = torch.cat(slow_split(torch.eye(n)), -1).T.double()   # column n: the transform of sample n
            return torch.linalg.solve(matrix, torch.cat([low, high], -1).double().unsqueeze(-1)).squeeze(-1).float()
        x = r.normal(4, 12)
        wave = torch.sin(torch.arange(64) / 5.0) + (torch.arange(64) > 40)
        return dict(random=solve(low, high), back=x, smooth=solve(slow_split(wave)[0], torch.zeros(32)), wave=wave,
                    learns=1.0)

    def laws(seen):
        wave = torch.sin(torch.arange(64) / 5.0) + (torch.arange(64) > 40)
        yield float((seen["wave"] - wave).abs().max()) < 1e-4, "_merge must give back what _split took apart"
        yield bool(seen["learns"]), NO_GRADIENT

    def picture(seen, axis):
        curves(axis, range(64), {"both bands": seen["wave"], "the low band alone": seen["smooth"]}, "n", "")


@exam("3.3")
class Packing:
    taught = True

    def see(m, r):
        shown = m.dwt.dwt(letter(64), 1)
        return dict(one=m.dwt.dwt(r.normal(2, 3, 8, 12), 1), two=m.dwt.dwt(r.normal(1, 2, 16, 8), 2),
                    three=m.dwt.dwt(r.normal(1, 1, 8, 16), 3), none=m.dwt.dwt(r.normal(1, 2, 4, 4), 0),
                    refused=[refused(m.dwt.dwt, torch.zeros(1, 1, *size), 2) for size in ((6, 8), (8, 6))],
                    shown=shown)

    def spec(m, r):
        return dict(one=slow_dwt(r.normal(2, 3, 8, 12), 1), two=slow_dwt(r.normal(1, 2, 16, 8), 2),
                    three=slow_dwt(r.normal(1, 1, 8, 16), 3), none=r.normal(1, 2, 4, 4), refused=[1.0] * 2,
                    shown=slow_dwt(letter(64), 1))

    def laws(seen):
        yield all(map(float, seen["refused"])), "6 x 8 and 8 x 6 do not divide by 4: they must raise ValueError"
        low = F.avg_pool2d(letter(64), 2)
        yield float((seen["shown"][:, :3] - low).abs().mean()) < 0.2, (
            "the low band must come first and look like the image")

    def band(key, i, place):
        channels, levels = dict(one=(3, 1), two=(2, 2), three=(1, 3), none=(2, 0), shown=(3, 1))[key]
        at = place[1] // channels                                         # 0 LL; 1 to 3 the coarsest details; 4 to 15
        finer = max(0, at.bit_length() - 1) // 2
        return f"{('LL', 'LH', 'HL', 'HH')[at // 4 ** finer]}{levels - finer}"

    def picture(seen, axis):
        ll, lh, hl, hh = seen["shown"][0].chunk(4)
        mosaic = torch.cat([torch.cat([ll, 0.5 * hl], -1), torch.cat([0.5 * lh, 0.5 * hh], -1)], -2)
        image(axis, mosaic.clamp(-1, 1))


@exam("3.4")
class Adjoint:
    def see(m, r):
        return dict(random=m.dwt.adjoint(r.normal(2, 8, 4, 2), 1), two=m.dwt.adjoint(r.normal(1, 16, 2, 3), 2),
                    x=m.dwt.dwt(letter(16)[:, :1], 1), shown=m.dwt.adjoint(m.dwt.dwt(letter(16)[:, :1], 1), 1))

    def spec(m, r):
        def slow(y, levels):                                              # the transpose of the matrix of slow_dwt
            batch, channels, h, w = y.shape
            shape = channels // 4 ** levels, h * 2 ** levels, w * 2 ** levels
            units = torch.eye(shape[0] * shape[1] * shape[2]).reshape(-1, *shape)
            columns = slow_dwt(units, levels).flatten(1)                  # (pixels, coefficients)
            return (y.flatten(1) @ columns.T).reshape(batch, *shape)
        r1, r2 = r.normal(2, 8, 4, 2), r.normal(1, 16, 2, 3)
        shown = slow_dwt(letter(16)[:, :1], 1)
        return dict(random=slow(r1, 1), two=slow(r2, 2), x=shown, shown=slow(shown, 1))

    def laws(seen):
        inner = float((seen["x"] ** 2).sum()), float((letter(16)[:, :1] * seen["shown"]).sum())
        yield abs(inner[0] - inner[1]) < 1e-3 * abs(inner[0]), (
            f"with y = dwt(x): sum(y y) = {inner[0]:.5g}, sum(x adjoint(y)) = {inner[1]:.5g}: they must be equal")

    def picture(seen, axis):
        image(axis, row_of([letter(16)[0, :1], seen["shown"][0]])[0])
        axis.set_xlabel("x, and adjoint(dwt(x))")


@exam("3.5")
class Coefficients:
    def levels(r):
        return torch.cat([torch.tensor([-15.0, 15.0]), r.uniform(7, low=-8, high=8)])

    def see(m, r):
        logsnr = Coefficients.levels(r)
        alpha, sigma = m.schedule.alpha_sigma(logsnr)
        c, d = m.precondition.coefficients(alpha, sigma, 0.09, 1.5)
        equal_c, equal_d = m.precondition.coefficients(alpha, sigma, 0.8, 0.8)
        images = m.precondition.coefficients(alpha[:, None, None, None], sigma[:, None, None, None], 0.6, 0.7)
        return dict(c=c, d=d, images=torch.stack(images), equal_c=equal_c, equal_d=equal_d, shown=logsnr)

    def spec(m, r):
        logsnr = Coefficients.levels(r)
        a, b = torch.sigmoid(logsnr.double()), torch.sigmoid(-logsnr.double())                  # alpha^2, sigma^2

        def slow(s, n):                                                   # by the moments of v and z
            vz, zz, vv = (a * b).sqrt() * (n * n - s * s), a * s * s + b * n * n, b * s * s + a * n * n
            return (vz / zz).float(), (vv - vz ** 2 / zz).sqrt().float()
        c, d = slow(0.09, 1.5)
        return dict(c=c, d=d, images=torch.stack(slow(0.6, 0.7))[..., None, None, None], equal_c=torch.zeros(9),
                    equal_d=torch.full((9,), 0.8), shown=logsnr)

    def laws(seen):
        yield float(seen["equal_c"].abs().max()) < 1e-5, "s = n: c must be 0"
        yield float((seen["equal_d"] - 0.8).abs().max()) < 1e-5, "s = n: d must be n"

    def picture(seen, axis):
        order = seen["shown"].argsort()
        for name in ("c", "d"):
            axis.plot(seen["shown"][order], seen[name][order], ".-", label=name)
        axis.set_xlabel("log SNR; s = 0.09, n = 1.5")
        axis.legend()
