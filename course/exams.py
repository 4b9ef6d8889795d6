"""The exams: one for each exercise. What is seen of the student's function, what it should be, and why.

    see(m, r)      in the student's process: {name: tensors} from m.schedule, m.dwt, ... on random inputs from r
    spec(m, r)     in the judge's: the same from a slow loop or a closed form, on the same random inputs
    laws(seen)     yields (holds, message): what must be true of what was seen, told in words, before equality is looked at
    picture(seen, axis)    what a student sees once it is right
    tolerance      of equality, relative and absolute

The specification is there to be read: it is the definition without cleverness. Where it needs layers it takes those of m,
which for the judge are the project's own.
"""
import functools
import math

import torch
import torch.nn.functional as F

EXAMS = {}


class Inputs:
    """Random inputs, the same for student and judge: they are asked for in the same order, from one seed."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed + 7919)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def integer(self, low, high):
        return int(torch.randint(low, high, (), generator=self.generator))

    def fill(self, module):
        """Weights of a module, all of them random, so that no layer hides behind a zero. In evaluation mode."""
        with torch.no_grad():
            for _, p in sorted(module.named_parameters()):
                p.copy_(self.normal(*p.shape) * (0.5 if p.ndim < 2 else p[0].numel() ** -0.5))
        return module.eval()


def exam(number, tolerance=1e-4):
    """Class decorator: its functions become the exam of exercise `number`."""
    def enter(described):
        described.tolerance = tolerance
        EXAMS[number] = described
        return described
    return enter


def refused(function, *args):
    """Does function(*args) raise ValueError? Any other error is the student's."""
    try:
        function(*args)
    except ValueError:
        return 1.0
    return 0.0


def curves(axis, x, lines, xlabel, ylabel):
    for name, y in lines.items():
        axis.plot(x, y, label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        axis.legend(fontsize=8)


def image(axis, x):
    """x (C, H, W) or (H, W), from its least to its largest value."""
    x = x if x.ndim == 2 else x[:3].permute(1, 2, 0)
    x = (x - x.min()) / (x.max() - x.min()).clamp(min=1e-6)
    axis.imshow(x, cmap="gray", interpolation="nearest")
    axis.set(xticks=[], yticks=[])


def row_of(images):
    """Images (C, H, W) side by side, one white pixel between."""
    parts = [part for x in images for part in (x, torch.ones_like(x[..., :1]))]
    return torch.cat(parts[:-1], -1)


def letter(size=32):
    """A picture to look at: a white ring with a bar on a slope. (1, 3, size, size) in [-1, 1]."""
    y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) / size * 2 - 1] * 2, indexing="ij")
    radius = (x ** 2 + y ** 2).sqrt()
    shape = ((radius > 0.5) & (radius < 0.72)) | ((x - y).abs() < 0.16) & (radius < 0.9)
    ground = torch.stack([0.6 * x, 0.3 * y, -0.5 * x])
    return torch.where(shape, torch.tensor(0.95), ground)[None]


TIMES = torch.linspace(0, 1, 101)


def alpha_and_sigma(logsnr):
    """In float64, from the definition: alpha^2 / sigma^2 = e^logsnr and alpha^2 + sigma^2 = 1; shaped (B, 1, 1, 1)."""
    e = torch.exp(-torch.as_tensor(logsnr).double().reshape(-1, 1, 1, 1))
    return (1 / (1 + e)).sqrt(), (e / (1 + e)).sqrt()


# ------------------------------------------------------------------------------------------ 1 noise schedules

@exam("1.1")
class Cosine:
    def see(m, r):
        t = r.uniform(6, 5, low=0.05, high=0.95)
        return dict(curve=m.schedule.logsnr_cosine(TIMES), narrow=m.schedule.logsnr_cosine(t, -8.0, 5.0),
                    number=m.schedule.logsnr_cosine(torch.tensor(0.5)))

    def spec(m, r):
        def slow(t, low, high):                                           # alpha = cos(angle), sigma = sin(angle)
            first, last = (math.acos(math.sqrt(1 / (1 + math.exp(-end)))) for end in (high, low))
            angle = first + t.double() * (last - first)
            return (2 * (angle.cos().log() - angle.sin().log())).float()
        return dict(curve=slow(TIMES, -15, 15), narrow=slow(r.uniform(6, 5, low=0.05, high=0.95), -8, 5),
                    number=slow(torch.tensor(0.5), -15, 15))

    def laws(seen):
        curve = seen["curve"]
        yield bool((curve.diff() < 0).all()), "log-SNR must fall as t grows: t = 0 is clean"
        yield abs(float(curve[0]) - 15) < 1e-2 and abs(float(curve[-1]) + 15) < 1e-2, (
            f"the end points are {float(curve[0]):.3g} and {float(curve[-1]):.3g}, want 15 and -15")
        yield abs(float(seen["number"])) < 1e-3, "at t = 1/2 there is as much signal as noise: log-SNR 0"

    def picture(seen, axis):
        curves(axis, TIMES, {"": seen["curve"]}, "t", "log-SNR")


@exam("1.2", tolerance=1e-6)
class AlphaSigma:
    def see(m, r):
        logsnr = r.uniform(3, 4, low=-14, high=14)
        curve = torch.linspace(-10, 10, 101)
        return dict(random=m.schedule.alpha_sigma(logsnr), clean=m.schedule.alpha_sigma(torch.tensor([20.0, 30.0])),
                    curve=m.schedule.alpha_sigma(curve))

    def spec(m, r):
        def slow(logsnr):
            e = torch.exp(-logsnr.double())                               # sigma^2 / alpha^2
            return [(1 / (1 + e)).sqrt().float(), (e / (1 + e)).sqrt().float()]
        return dict(random=slow(r.uniform(3, 4, low=-14, high=14)), clean=slow(torch.tensor([20.0, 30.0])),
                    curve=slow(torch.linspace(-10, 10, 101)))

    def laws(seen):
        alpha, sigma = (part.double() for part in seen["random"])
        yield bool(((alpha ** 2 + sigma ** 2 - 1).abs() < 1e-5).all()), "alpha^2 + sigma^2 must be 1"
        yield bool((seen["clean"][1] > 0).all()), "sigma is 0 at log-SNR 30: 1 - alpha^2 rounds away, sigmoid(-l) not"

    def picture(seen, axis):
        curves(axis, torch.linspace(-10, 10, 101), dict(zip(("alpha", "sigma"), seen["curve"])), "log-SNR", "")


@exam("1.3")
class Shift:
    def see(m, r):
        image_d, noise_d = 2 ** r.integer(7, 10), 2 ** r.integer(4, 7)
        t = r.uniform(7, low=0.05, high=0.95)
        shifted = m.schedule.logsnr_shifted
        return dict(random=shifted(t, image_d, noise_d, -12.0, 9.0), same=shifted(TIMES, 64, 64),
                    shift_128=shifted(TIMES, 128, 64), shift_512=shifted(TIMES, 512, 64))

    def spec(m, r):
        image_d, noise_d = 2 ** r.integer(7, 10), 2 ** r.integer(4, 7)
        t = r.uniform(7, low=0.05, high=0.95)

        def slow(t, image_d, noise_d, *ends):                             # the SNR itself, times the ratio of the areas
            snr = torch.exp(m.schedule.logsnr_cosine(t, *ends).double())
            return torch.log(snr * noise_d ** 2 / image_d ** 2).float()
        return dict(random=slow(t, image_d, noise_d, -12.0, 9.0), same=slow(TIMES, 64, 64),
                    shift_128=slow(TIMES, 128, 64), shift_512=slow(TIMES, 512, 64))

    def laws(seen):
        moved = (seen["shift_128"] - seen["same"])[1:-1]
        yield float(moved.std()) < 1e-3, "the whole curve moves by one number, the same at every t"
        yield abs(float(moved.mean()) + 1.386) < 1e-2, (
            f"128 px at noise_d 64 move by {float(moved.mean()):.3f}, want 2 log(64 / 128) = -1.386")
        ends = float(seen["shift_512"][0]), float(seen["shift_512"][-1])
        yield abs(ends[0] - 10.84) < 0.02 and abs(ends[1] + 19.16) < 0.02, (
            f"512 px at noise_d 64: the end points are {ends[0]:.2f} and {ends[1]:.2f}, want 10.84 and -19.16: they move, too")

    def picture(seen, axis):
        curves(axis, TIMES, {"64 px": seen["same"], "128 px": seen["shift_128"], "512 px": seen["shift_512"]}, "t",
               "log-SNR of a pixel, noise_d 64")


@exam("1.4")
class Interpolated:
    def see(m, r):
        t = r.uniform(7, low=0.05, high=0.95)
        return dict(random=m.schedule.logsnr_interpolated(t, 256, 2 ** r.integer(4, 6), 2 ** r.integer(6, 8), -12.0, 9.0),
                    curve=m.schedule.logsnr_interpolated(TIMES, 512, 32, 256),
                    low=m.schedule.logsnr_shifted(TIMES, 512, 32), high=m.schedule.logsnr_shifted(TIMES, 512, 256))

    def spec(m, r):
        def slow(t, image_d, low, high, *ends):
            out = []
            for one in t.tolist():
                parts = [float(m.schedule.logsnr_shifted(torch.tensor(one), image_d, d, *ends)) for d in (low, high)]
                out.append(one * parts[0] + (1 - one) * parts[1])
            return torch.tensor(out)
        t = r.uniform(7, low=0.05, high=0.95)
        return dict(random=slow(t, 256, 2 ** r.integer(4, 6), 2 ** r.integer(6, 8), -12.0, 9.0),
                    curve=slow(TIMES, 512, 32, 256), low=m.schedule.logsnr_shifted(TIMES, 512, 32),
                    high=m.schedule.logsnr_shifted(TIMES, 512, 256))

    def laws(seen):
        yield abs(float(seen["curve"][-1] - seen["low"][-1])) < 1e-2, "at t = 1 the shift of noise_d_low must hold"
        yield abs(float(seen["curve"][0] - seen["high"][0])) < 1e-2, "at t = 0 the shift of noise_d_high must hold"
        yield bool((seen["curve"].diff() < 0).all()), "log-SNR must fall as t grows"

    def picture(seen, axis):
        curves(axis, TIMES, {"shift 32": seen["low"], "shift 256": seen["high"], "interpolated": seen["curve"]}, "t",
               "log-SNR, 512 px")


# ------------------------------------------------------------------------------------------ 2 parameterisations, losses

def inputs_2(r):
    """x, eps (4, 3, 6, 6) and logsnr (4,), from -8 to 8 so that a division does not hide an error."""
    return r.normal(4, 3, 6, 6), r.normal(4, 3, 6, 6), r.uniform(4, low=-8, high=8)


@exam("2.1")
class Diffuse:
    def see(m, r):
        x, eps, logsnr = inputs_2(r)
        levels = torch.tensor([8.0, 3.0, 0.0, -3.0, -8.0])
        return dict(z=m.schedule.diffuse(x, eps, logsnr), scalar=m.schedule.diffuse(x, eps, 0.7),
                    shown=m.schedule.diffuse(letter().expand(5, -1, -1, -1), r.normal(5, 3, 32, 32), levels))

    def spec(m, r):
        x, eps, logsnr = inputs_2(r)
        levels = torch.tensor([8.0, 3.0, 0.0, -3.0, -8.0])

        def slow(x, eps, logsnr):
            return torch.stack([math.sqrt(1 / (1 + math.exp(-l))) * a + math.sqrt(1 / (1 + math.exp(l))) * b
                                for a, b, l in zip(x, eps, torch.as_tensor(logsnr).expand(len(x)).tolist())])
        return dict(z=slow(x, eps, logsnr), scalar=slow(x, eps, 0.7),
                    shown=slow(letter().expand(5, -1, -1, -1), r.normal(5, 3, 32, 32), levels))

    def laws(seen):
        noise = seen["shown"][4]
        yield abs(float(noise.std()) - 1) < 0.1, f"at log-SNR -8 z has deviation {float(noise.std()):.2f}, want about 1"
        yield float((seen["shown"][0] - letter()[0]).abs().mean()) < 0.1, "at log-SNR 8 z must look like the image"

    def picture(seen, axis):
        image(axis, row_of(seen["shown"].clamp(-1.5, 1.5)))
        axis.set_xlabel("log-SNR 8, 3, 0, -3, -8")


def conversion(number, name, given, slow, laws, picture):
    """Exams of the conversions: `name`(*given(x, eps, z, v), logsnr), `slow` in float64 with alpha and sigma."""
    def faces(r):
        x, eps, logsnr = inputs_2(r)
        alpha, sigma = alpha_and_sigma(logsnr)
        return x, eps, (alpha * x + sigma * eps).float(), (alpha * eps - sigma * x).float(), logsnr

    def seen_of(call, r):
        *four, logsnr = faces(r)
        a, b = given(*four)
        ends = given(*(torch.ones(2, 1, 1, 1) * k for k in (0.5, -1.0, 0.25, 2.0)))
        return dict(random=call(a, b, logsnr), one=call(a, b, logsnr[0]),
                    ends=call(*ends, torch.tensor([-6.0, 6.0])), truth=four, level=logsnr)

    class Conversion:
        def see(m, r):
            return seen_of(getattr(m.schedule, name), r)

        def spec(m, r):
            return seen_of(lambda a, b, logsnr: slow(a.double(), b.double(), *alpha_and_sigma(logsnr)).float(), r)
    Conversion.laws, Conversion.picture = staticmethod(laws), staticmethod(picture)
    exam(number, tolerance=1e-3)(Conversion)


def laws_v(seen):
    x, eps, z, _ = seen["truth"]
    v, (alpha, sigma) = seen["random"], alpha_and_sigma(seen["level"])
    yield float((alpha * z - sigma * v - x).abs().max()) < 1e-3, "x = alpha z - sigma v must give x back"
    yield float((x.square() + eps.square() - z.square() - v.square()).abs().max()) < 1e-2, (
        "(z, v) is (x, eps) turned: x^2 + eps^2 = z^2 + v^2, pixel by pixel")


def laws_eps(seen):
    yield float((seen["random"] - seen["truth"][1]).abs().max()) < 1e-3, "from the true v must come the true noise"


def laws_x(seen):
    alpha, _ = alpha_and_sigma(seen["level"])
    yield float(((seen["random"] - seen["truth"][0]) * alpha).abs().max()) < 1e-3, (
        "from the true noise must come the true image")


def picture_v(seen, axis):
    x, eps, z, _ = seen["truth"]
    for name, part in (("z", z), ("v", seen["random"])):
        axis.scatter(x[0].flatten(), part[0].flatten(), s=6, label=f"{name} against x")
    axis.set(xlabel="x", ylabel=f"log-SNR {float(seen['level'][0]):.1f}")
    axis.legend(fontsize=8)


def picture_truth(which, label):
    def picture(seen, axis):
        axis.plot([-3, 3], [-3, 3], color="0.8")
        axis.scatter(seen["truth"][which].flatten(), seen["random"].flatten(), s=4)
        axis.set(xlabel=f"the true {label}", ylabel=f"{label} as computed")
    return picture


conversion("2.2", "v_from_x_eps", lambda x, eps, z, v: (x, eps), lambda x, eps, a, s: a * eps - s * x, laws_v, picture_v)
conversion("2.3", "eps_from_v", lambda x, eps, z, v: (z, v), lambda z, v, a, s: s * z + a * v, laws_eps,
           picture_truth(1, "eps"))
conversion("2.4", "x_from_eps", lambda x, eps, z, v: (z, eps), lambda z, eps, a, s: (z - s * eps) / a, laws_x,
           picture_truth(0, "x"))


@exam("2.5")
class PredictionLoss:
    def see(m, r):
        x, eps, logsnr = inputs_2(r)
        z, v = m.schedule.diffuse(x, eps, logsnr), r.normal(4, 3, 6, 6)
        losses = {}
        for loss in ("eps_mse", "v_mse"):
            losses[loss] = [m.train.prediction_loss(*(part[i:i + 1] for part in (v, z, x, eps, logsnr)), loss)
                            for i in range(4)]
            losses[loss + "_all"] = m.train.prediction_loss(v, z, x, eps, logsnr, loss)
            losses[loss + "_multiscale"] = m.train.prediction_loss(v, z, x, eps, logsnr, loss, 3)
        perfect = m.schedule.v_from_x_eps(x, eps, logsnr)
        return dict(**losses, perfect=m.train.prediction_loss(perfect, z, x, eps, logsnr, "v_mse"),
                    default=m.train.prediction_loss(v, z, x, eps, logsnr), level=logsnr)

    def spec(m, r):
        x, eps, logsnr = inputs_2(r)
        v, (alpha, sigma) = r.normal(4, 3, 6, 6).double(), alpha_and_sigma(logsnr)
        z = alpha * x + sigma * eps
        errors = dict(eps_mse=sigma * z + alpha * v - eps, v_mse=v - (alpha * eps - sigma * x))
        out = {}
        for loss, error in errors.items():
            out[loss] = [(error[i] ** 2).mean().float() for i in range(4)]
            out[loss + "_all"] = (error ** 2).mean().float()
            halves = torch.stack([error[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(0)
            out[loss + "_multiscale"] = ((error ** 2).mean() / 6 + (halves ** 2).mean() / 3).float()
        return dict(**out, perfect=torch.tensor(0.0), default=out["eps_mse_all"], level=logsnr)

    def laws(seen):
        snr = torch.exp(seen["level"])
        ratio = torch.stack(seen["eps_mse"]) / torch.stack(seen["v_mse"]) / (snr / (1 + snr))
        yield abs(float(seen["perfect"])) < 1e-6, "the true v must have no loss"
        yield float((ratio - 1).abs().max()) < 1e-2, "the loss on eps must be SNR / (1 + SNR) times that on v"

    def picture(seen, axis):
        order = seen["level"].argsort()
        curves(axis, seen["level"][order], {name: torch.stack(seen[name])[order] for name in ("eps_mse", "v_mse")},
               "log-SNR", "loss of a random prediction")


@exam("2.6")
class Multiscale:
    def see(m, r):
        error = r.normal(2, 3, 16, 16)
        f = m.train.multiscale_mse
        return dict(bases=[f(error, base) for base in (2, 4, 8, 16)], odd=f(r.normal(2, 3, 12, 12), 3),
                    flat=f(torch.ones(1, 3, 16, 16), 2), wide=f(r.normal(1, 1, 8, 32), 4),
                    refused=[refused(f, error, 0), refused(f, error, 17)])

    def spec(m, r):
        def slow(error, base):
            height, width = error.shape[-2:]
            d, k, total = math.sqrt(height * width), 1, 0.0
            while d / k >= base and height % k == 0 and width % k == 0:
                blocks = error.double().reshape(*error.shape[:2], height // k, k, width // k, k).mean((3, 5))
                total, k = total + (blocks ** 2).mean() * k / d, 2 * k
            return total.float()
        error = r.normal(2, 3, 16, 16)
        return dict(bases=[slow(error, base) for base in (2, 4, 8, 16)], odd=slow(r.normal(2, 3, 12, 12), 3),
                    flat=slow(torch.ones(1, 3, 16, 16), 2), wide=slow(r.normal(1, 1, 8, 32), 4),
                    refused=[torch.tensor(1.0)] * 2)

    def laws(seen):
        yield abs(float(seen["flat"]) - 15 / 16) < 1e-4, (
            f"an error of 1 everywhere, 16 px, base 2: {float(seen['flat']):.4g}, want 1/16 + 1/8 + 1/4 + 1/2 = 0.9375")
        yield float(seen["bases"][3]) < float(seen["bases"][0]), "with base = d only the full resolution counts"

    def picture(seen, axis):
        axis.bar([str(base) for base in (2, 4, 8, 16)], [float(value) for value in seen["bases"]])
        axis.set(xlabel="base, of white noise at 16 px", ylabel="loss")


# ------------------------------------------------------------------------------------------ 3 the wavelet

def slow_level(x):
    """One level of a list of numbers, from the filters of the standard: (-1, 2, 6, 2, -1)/8 and (-1, 2, -1)/2."""
    n = len(x)

    def at(i):                                                            # mirrored about the end samples
        i = abs(i)
        return x[2 * (n - 1) - i] if i >= n else x[i]
    low = [(-at(k - 2) + 2 * at(k - 1) + 6 * at(k) + 2 * at(k + 1) - at(k + 2)) / 8 for k in range(0, n, 2)]
    high = [(-at(k - 1) + 2 * at(k) - at(k + 1)) / 2 for k in range(1, n, 2)]
    return low, high


def slow_split(x):
    """slow_level along the last axis. x (..., N)."""
    pairs = [slow_level(line) for line in x.double().reshape(-1, x.shape[-1]).tolist()]
    return [torch.tensor([pair[i] for pair in pairs]).reshape(*x.shape[:-1], -1) for i in (0, 1)]


def slow_dwt(x, levels):
    """From slow_split; space-to-depth by slicing."""
    details = []
    for level in range(levels):
        low, high = slow_split(x)
        ll, lh, hl, hh = (part.transpose(-1, -2) for half in (low, high) for part in slow_split(half.transpose(-1, -2)))
        factor, bands, x = 2 ** (levels - 1 - level), torch.cat([lh, hl, hh], 1), ll
        packed = [bands[:, c:c + 1, i::factor, j::factor] for c in range(bands.shape[1]) for i in range(factor)
                  for j in range(factor)]
        details = [torch.cat(packed, 1)] + details
    return torch.cat([x] + details, 1).float()


@exam("3.1")
class Split:
    def see(m, r):
        wave = torch.sin(torch.arange(64) / 5.0) + (torch.arange(64) > 40)
        return dict(random=m.dwt._split(r.normal(2, 3, 10)), two=m.dwt._split(r.normal(1, 2)),
                    line=m.dwt._split(torch.arange(12.0)), flat=m.dwt._split(torch.full((8,), 3.0)),
                    wave=m.dwt._split(wave))

    def spec(m, r):
        wave = torch.sin(torch.arange(64) / 5.0) + (torch.arange(64) > 40)
        return dict(random=slow_split(r.normal(2, 3, 10)), two=slow_split(r.normal(1, 2)),
                    line=slow_split(torch.arange(12.0)), flat=slow_split(torch.full((8,), 3.0)), wave=slow_split(wave))

    def laws(seen):
        low, high = seen["flat"]
        yield float(high.abs().max()) < 1e-5, "the high band of a constant must be zero"
        yield float((low - 3).abs().max()) < 1e-5, f"the low band of a constant 3 is {float(low[1]):.4g}: its gain must be 1"
        yield float(seen["line"][1][:-1].abs().max()) < 1e-5, (
            "the high band of a straight line must be zero inside: one neighbour alone, as in Haar, is not enough")

    def picture(seen, axis):
        low, high = seen["wave"]
        curves(axis, range(32), {"low": low, "high": high}, "n", "a wave with a jump")


@exam("3.2")
class Merge:
    def see(m, r):
        low, high = r.normal(2, 3, 5), r.normal(2, 3, 5)
        wave = torch.sin(torch.arange(64) / 5.0) + (torch.arange(64) > 40)
        parts = slow_split(wave)
        return dict(random=m.dwt._merge(low, high), back=m.dwt._merge(*slow_split(r.normal(4, 12))),
                    smooth=m.dwt._merge(parts[0], torch.zeros(32)), wave=m.dwt._merge(*parts))

    def spec(m, r):
        low, high = r.normal(2, 3, 5), r.normal(2, 3, 5)

        def solve(low, high):                                             # the matrix of slow_split, inverted
            n = 2 * low.shape[-1]
            matrix = torch.cat(slow_split(torch.eye(n)), -1).T.double()   # columns: what each sample becomes
            return torch.linalg.solve(matrix, torch.cat([low, high], -1).double().unsqueeze(-1)).squeeze(-1).float()
        x = r.normal(4, 12)
        wave = torch.sin(torch.arange(64) / 5.0) + (torch.arange(64) > 40)
        return dict(random=solve(low, high), back=x, smooth=solve(slow_split(wave)[0], torch.zeros(32)), wave=wave)

    def laws(seen):
        wave = torch.sin(torch.arange(64) / 5.0) + (torch.arange(64) > 40)
        yield float((seen["wave"] - wave).abs().max()) < 1e-4, "what _split has taken apart must come back"

    def picture(seen, axis):
        curves(axis, range(64), {"both bands": seen["wave"], "the low band alone": seen["smooth"]}, "n", "")


@exam("3.3")
class Packing:
    def see(m, r):
        shown = m.dwt.dwt(letter(64), 1)
        return dict(one=m.dwt.dwt(r.normal(2, 3, 8, 12), 1), two=m.dwt.dwt(r.normal(1, 2, 16, 8), 2),
                    none=m.dwt.dwt(r.normal(1, 2, 4, 4), 0),
                    refused=[refused(m.dwt.dwt, torch.zeros(1, 1, 6, 8), 2), refused(m.dwt.dwt, torch.zeros(1, 1, 8, 6), 2)],
                    shown=shown)

    def spec(m, r):
        return dict(one=slow_dwt(r.normal(2, 3, 8, 12), 1), two=slow_dwt(r.normal(1, 2, 16, 8), 2),
                    none=r.normal(1, 2, 4, 4), refused=[torch.tensor(1.0)] * 2, shown=slow_dwt(letter(64), 1))

    def laws(seen):
        yield all(float(flag) for flag in seen["refused"]), "6 x 8 does not divide by 4, nor does 8 x 6: want ValueError"
        low = F.avg_pool2d(letter(64), 2)
        yield float((seen["shown"][:, :3] - low).abs().mean()) < 0.2, "the low band must come first, and look like the image"

    def picture(seen, axis):
        ll, lh, hl, hh = seen["shown"][0].chunk(4)
        mosaic = torch.cat([torch.cat([ll, 0.5 * hl], -1), torch.cat([0.5 * lh, 0.5 * hh], -1)], -2)
        image(axis, mosaic.clamp(-1, 1))


@exam("3.4")
class Adjoint:
    def see(m, r):
        return dict(random=m.dwt.adjoint(r.normal(2, 8, 4, 2), 1), two=m.dwt.adjoint(r.normal(1, 16, 2, 3), 2),
                    x=m.dwt.dwt(letter(32), 1), shown=m.dwt.adjoint(m.dwt.dwt(letter(32), 1), 1))

    def spec(m, r):
        def slow(y, levels):                                              # the matrix, column by column, transposed
            batch, channels, h, w = y.shape
            shape = channels // 4 ** levels, h * 2 ** levels, w * 2 ** levels
            units = torch.eye(shape[0] * shape[1] * shape[2]).reshape(-1, *shape)
            columns = slow_dwt(units, levels).flatten(1)                  # (pixels, coefficients)
            return (y.flatten(1) @ columns.T).reshape(batch, *shape)
        r1, r2 = r.normal(2, 8, 4, 2), r.normal(1, 16, 2, 3)
        shown = slow_dwt(letter(32), 1)
        return dict(random=slow(r1, 1), two=slow(r2, 2), x=shown, shown=slow(shown, 1))

    def laws(seen):
        inner = float((seen["x"] ** 2).sum()), float((letter(32) * seen["shown"]).sum())
        yield abs(inner[0] - inner[1]) < 1e-3 * abs(inner[0]), (
            f"with y = dwt(x): sum(y y) = {inner[0]:.5g}, sum(x adjoint(y)) = {inner[1]:.5g}: they must be one number")

    def picture(seen, axis):
        image(axis, row_of([letter(32)[0], seen["shown"][0]]))
        axis.set_xlabel("x, and the adjoint of its wavelet transform: not x")


# ------------------------------------------------------------------------------------------ 6 sampling

def inputs_6(r):
    """z_t, x_hat (4, 3, 5, 5); logsnr_t, logsnr_s (4,), s from half a unit to four closer to the image."""
    logsnr_t = r.uniform(4, low=-6, high=4)
    return r.normal(4, 3, 5, 5), r.normal(4, 3, 5, 5), logsnr_t, logsnr_t + r.uniform(4, low=0.5, high=4)


def slow_ddim(z_t, x_hat, logsnr_t, logsnr_s):
    """Song et al.: one straight line in z / alpha against sigma / alpha, whose slope is eps. In float64."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_and_sigma(logsnr_t), alpha_and_sigma(logsnr_s)
    slope = (z_t.double() / alpha_t - x_hat.double()) / (sigma_t / alpha_t)
    return alpha_s * (z_t.double() / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) * slope)


@exam("6.1")
class Ddim:
    levels = [-2.0, 0.0, 2.0, 6.0]

    def walk(step, r):
        """From log-SNR -6 in one step each to the others, x_hat being the picture itself."""
        start, goal = r.normal(4, 3, 32, 32), torch.tensor(Ddim.levels)
        alpha, sigma = alpha_and_sigma(-6.0)
        z = (alpha * letter().double() + sigma * start[:1]).float().expand(4, -1, -1, -1)
        return z[0], step(z, letter().expand(4, -1, -1, -1), torch.full((4,), -6.0), goal)

    def see(m, r):
        step, inputs = m.sample.ddim_step, inputs_6(r)
        z, x, t, s = inputs
        return dict(random=step(*inputs), scalar=step(z, x, t[0], s[0]), stay=step(z, x, t, t), given=inputs,
                    walk=Ddim.walk(step, r))

    def spec(m, r):
        def step(*inputs):
            return slow_ddim(*inputs).float()
        inputs = inputs_6(r)
        z, x, t, s = inputs
        return dict(random=step(*inputs), scalar=step(z, x, t[0], s[0]), stay=z, given=inputs, walk=Ddim.walk(step, r))

    def laws(seen):
        z, x, t, s = seen["given"]
        yield float((seen["stay"] - z).abs().max()) < 1e-3, "a step from a level to itself must leave z as it is"
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_and_sigma(t), alpha_and_sigma(s)
        kept = (seen["random"] - alpha_s * x) * sigma_t - (z - alpha_t * x) * sigma_s
        yield float(kept.abs().max()) < 1e-3, "the eps that x_hat implies must be the same before and after the step"

    def picture(seen, axis):
        z, steps = seen["walk"]
        image(axis, row_of([z.clamp(-1.5, 1.5), *steps.clamp(-1.5, 1.5)]))
        axis.set_xlabel("z at log-SNR -6, and one step from there to -2, 0, 2, 6;\n"
                        "x_hat is the picture: the noise stays, its share falls")


def slow_posterior(z_t, x_hat, logsnr_t, logsnr_s):
    """Bayes: z_s has the law N(alpha_s x, sigma_s^2), and z_t given z_s N(alpha_ts z_s, sigma_ts^2); the precisions of
    the two add up. -> mean, variance, sigma_ts^2, in float64."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_and_sigma(logsnr_t), alpha_and_sigma(logsnr_s)
    alpha_ts = alpha_t / alpha_s
    upper = sigma_t ** 2 - alpha_ts ** 2 * sigma_s ** 2
    lower = 1 / (alpha_ts ** 2 / upper + 1 / sigma_s ** 2)
    mean = lower * (alpha_ts * z_t.double() / upper + alpha_s * x_hat.double() / sigma_s ** 2)
    return mean, lower, upper


@exam("6.2", tolerance=1e-3)
class Ddpm:
    share = [i / 20 for i in range(21)]
    ends = torch.tensor(-1.0), torch.tensor(1.0)

    def seen_of(step, r):
        """step(z_t, x_hat, logsnr_t, logsnr_s, nu, noise)"""
        z, x, t, s = inputs_6(r)
        noise, nu = r.normal(4, 3, 5, 5), float(r.uniform(1))
        zero, one, (alpha, _) = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), alpha_and_sigma(t)
        return dict(mean=step(z, x, t, s, nu, torch.zeros_like(z)), random=step(z, x, t, s, nu, noise),
                    scalar=step(z, x, t[0], s[0], nu, noise),
                    on_the_way=step((alpha * x).float(), x, t, s, nu, 0 * noise),
                    deviation=[step(zero, zero, *Ddpm.ends, nu, one) for nu in Ddpm.share], given=[x, t, s])

    def see(m, r):
        seen, (zero, one) = Ddpm.seen_of(m.sample.ddpm_step, r), (torch.zeros(1, 1, 128, 128), torch.ones(1, 1, 1, 1))
        seen["default"] = m.sample.ddpm_step(zero[..., :1, :1], zero[..., :1, :1], *Ddpm.ends, noise=one)
        seen["drawn"] = [m.sample.ddpm_step(zero, zero, *Ddpm.ends) for _ in range(2)]
        return seen

    def spec(m, r):
        def slow(z, x, t, s, nu, noise):
            mean, lower, upper = slow_posterior(z, x, t, s)
            return (mean + (upper ** nu * lower ** (1 - nu)).sqrt() * noise).float()
        zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        return dict(Ddpm.seen_of(slow, r), default=slow(zero, zero, *Ddpm.ends, 0.2, one))

    def laws(seen):
        (x, _, s), zero = seen["given"], torch.zeros(1)
        alpha_s, _ = alpha_and_sigma(s)
        yield float((seen["on_the_way"] - alpha_s * x).abs().max()) < 1e-2, (
            "from z_t = alpha_t x_hat the mean must go to alpha_s x_hat: check the weights of z_t and of x_hat")
        _, lower, upper = (float(part) for part in slow_posterior(zero, zero, *Ddpm.ends))
        variance = [float(one) ** 2 for one in seen["deviation"]]
        for name, got, want in (("nu = 0", variance[0], lower), ("nu = 1", variance[-1], upper),
                                ("nu = 1/2, in logs", variance[10], math.sqrt(lower * upper))):
            yield abs(got / want - 1) < 1e-2, (
                f"from log-SNR -1 to 1, {name}: the variance is {got:.4g}, want {want:.4g}")
        first, second = (draw.double().flatten() for draw in seen["drawn"])
        want = math.sqrt(upper ** 0.2 * lower ** 0.8)
        yield abs(float(first.std()) / want - 1) < 0.05 and abs(float(first.mean())) < 0.05 * want, (
            f"noise = None: it must be drawn; the result has deviation {float(first.std()):.3g}, want {want:.3g}")
        yield abs(float((first * second).mean())) < 0.1 * want ** 2, "noise = None: two calls must draw two noises"

    def picture(seen, axis):
        variance = [float(one) ** 2 for one in seen["deviation"]]
        axis.semilogy(Ddpm.share, variance, label="variance of the step's noise")
        axis.axhline(variance[0], color="0.6", ls=":", label="c sigma_s$^2$: the data are one point")
        axis.axhline(variance[-1], color="0.6", ls="--", label="c sigma_t$^2$: the data are N(0, 1)")
        axis.plot(0.2, float(seen["default"]) ** 2, "o", color="C1", label="the paper's 0.2")
        axis.set(xlabel="nu, from log-SNR -1 to 1", ylim=(0.85 * variance[0], 2.2 * variance[-1]))
        axis.legend(fontsize=7, loc="upper left")


@exam("6.3")
class Guidance:
    scales = [0.0, 1.0, 2.0, 4.0]

    def seen_of(guide, r):
        cond, null, w = r.normal(4, 3, 8, 8), r.normal(4, 3, 8, 8), float(r.uniform(1, low=2, high=7))
        to, origin = torch.tensor([1.0, 0.6]), torch.tensor([0.3, 0.4])
        return dict(random=guide(cond, null, w), one=guide(cond, null, 1.0), none=guide(cond, null, 0.0),
                    each=guide(cond, null, r.uniform(4, 1, 1, 1, low=0, high=4)), given=[cond, null],
                    line=[guide(to, origin, w) for w in Guidance.scales])

    def see(m, r):
        return Guidance.seen_of(m.sample.guide, r)

    def spec(m, r):
        def slow(cond, null, w):                                          # eq. 7 as it is printed
            eta = torch.as_tensor(w).double() - 1
            return ((1 + eta) * cond.double() - eta * null.double()).float()
        return Guidance.seen_of(slow, r)

    def laws(seen):
        cond, null = seen["given"]
        yield float((seen["one"] - cond).abs().max()) < 1e-3, "w = 1 must be off: it gives v_cond (w = 1 + eta)"
        yield torch.equal(seen["one"], cond), "w = 1 gives v_cond but for rounding; it must be v_cond to the bit"
        yield float((seen["none"] - null).abs().max()) < 1e-3, "w = 0 must give v_null"
        past = ((seen["random"] - cond) * (cond - null)).sum()
        yield float(past) > 0, "w > 1 must lead past v_cond, away from v_null"

    def picture(seen, axis):
        points = torch.stack(seen["line"])
        axis.plot(points[:, 0], points[:, 1], color="0.7", zorder=0)
        axis.scatter(points[:, 0], points[:, 1], c=["C0", "C1", "C2", "C3"])
        for w, (x, y), name in zip(Guidance.scales, points.tolist(), (", v_null", ", v_cond", "", "")):
            axis.annotate(f"w = {w:g}{name}", (x, y), (6, -10), textcoords="offset points", fontsize=8)
        axis.set(xlabel="v of one pixel", ylabel="v of another")
        axis.margins(x=0.3, y=0.2)


@exam("6.4")
class Dynamic:
    def seen_of(clip, r):
        x = r.normal(4, 3, 6, 6) * torch.tensor([0.2, 1.5, 4.0, 1.0]).reshape(-1, 1, 1, 1)
        x[2] = -x[2].abs()                                                # dark: the percentile is of |x|, not of x
        inside = r.uniform(2, 3, 6, 6, low=-1)
        return dict(random=clip(x, 0.8), default=clip(x), alone=[clip(x[i:i + 1], 0.8) for i in range(4)],
                    inside=clip(inside, 0.9), given=[inside, x], shown=clip(2.2 * letter(48) + 0.6, 0.97))

    def see(m, r):
        return Dynamic.seen_of(m.sample.clip_dynamic, r)

    def spec(m, r):
        def slow(x, percentile=0.995):
            out = []
            for one in x:
                sizes = sorted(one.abs().flatten().tolist())
                place = percentile * (len(sizes) - 1)                     # between two of them: on the straight line
                below, above = sizes[math.floor(place)], sizes[math.ceil(place)]
                s = max(1.0, below + (place - math.floor(place)) * (above - below))
                out += [max(-s, min(s, value)) / s for value in one.flatten().tolist()]
            return torch.tensor(out).reshape(x.shape)
        return Dynamic.seen_of(slow, r)

    def laws(seen):
        most = float(torch.cat([seen["random"], seen["default"]]).abs().max())
        yield most < 1 + 1e-4, (
            f"|x| up to {most:.3g} is left; after clipping to [-s, s] and dividing by s it is at most 1")
        inside, _ = seen["given"]
        yield float((seen["inside"] - inside).abs().max()) < 1e-4, (
            "an image within [-1, 1] must stay as it is: s is 1 at least")
        yield float((torch.cat(seen["alone"]) - seen["random"]).abs().max()) < 1e-4, (
            "an image comes out differently when it is alone: each has its own s")

    def picture(seen, axis):
        x = 2.2 * letter(48) + 0.6                                        # as a prediction under strong guidance
        image(axis, row_of([x.clamp(-1, 1)[0], seen["shown"][0]]))
        axis.set_xlabel("a prediction far out of [-1, 1]: clipped, and thresholded")


# ------------------------------------------------------------------------------------------ 7 Matryoshka

def enlarged(x, side):
    """(C, h, w) -> (C, side, w side / h), each pixel a square."""
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
        def slow(x, sizes):                                               # each level from the image itself
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
        for name, says in (("other_size", "x is not of the first size"),
                           ("no_divisor", "a size does not divide the one before it"),
                           ("two_factors", "height and width come down by two different factors")):
            yield all(float(flag) for flag in seen[name]), f"{says}: want ValueError"
        for level, k in zip(seen["noise"], (1, 2, 4, 8)):
            yield abs(float(level.std()) * k - 1) < 0.25, (
                f"white noise of deviation 1, {k} times smaller: it has deviation {float(level.std()):.3f}, the "
                f"average of {k} x {k} has 1/{k}")

    def picture(seen, axis):
        image(axis, row_of([enlarged(level[0], 64).clamp(-1.5, 1.5) for level in seen["shown"]]))
        axis.set_xlabel("64, 32, 16, 8 px: the noise averages away, the picture stays")


@exam("7.2")
class LevelSchedules:
    def seen_of(schedules, m, r):
        def base(t):
            return m.schedule.logsnr_shifted(t, 64, 32)
        power, t = float(r.uniform(1, low=0.5, high=3)), r.uniform(5, low=0.1, high=0.9)
        sizes = [(256, 256), (128, 128), (64, 64)]
        return dict(random=[f(t) for f in schedules(base, [(96, 96), (32, 32), (16, 16), (8, 8)], power)],
                    oblong=[f(t) for f in schedules(base, [(64, 128), (8, 16)], power)],
                    single=[f(t) for f in schedules(base, [(16, 16)], power)],
                    curves=[f(TIMES) for f in schedules(base, sizes)], base=base(TIMES),
                    number=[f(torch.tensor(0.5)) for f in schedules(base, sizes, 1.0)])

    def see(m, r):
        return LevelSchedules.seen_of(m.nested_unet.level_schedules, m, r)

    def spec(m, r):
        def slow(base, sizes, power=2.0):                                 # the SNR itself, divided by k^power
            def snr(k, t):
                return torch.log(torch.exp(base(t).double()) / k ** power).float()
            lowest = sizes[-1][0] * sizes[-1][1]
            return [functools.partial(snr, math.sqrt(h * w / lowest)) for h, w in sizes]
        return LevelSchedules.seen_of(slow, m, r)

    def laws(seen):
        top, middle, low = seen["curves"]
        yield float((top - low).abs().max()) > 0.1, (
            "all levels have one schedule: a lambda made in a loop sees the loop variable's last value, unless bound")
        yield float((low - seen["base"]).abs().max()) < 1e-3, "the lowest level must have the base's schedule as it is"
        for name, one, k in (("256", top, 4), ("128", middle, 2)):
            gap = float((low - one).mean())
            yield abs(gap - 2 * math.log(k)) < 1e-2, (
                f"power 2, {name} px lies {gap:.3f} below the 64 px of the lowest level, want 2 log {k} = "
                f"{2 * math.log(k):.3f}")

    def picture(seen, axis):
        names = "256 px", "128 px", "64 px, the lowest"
        curves(axis, TIMES, dict(zip(names, seen["curves"])), "t", "log-SNR of a pixel")


@exam("7.3")
class NestedLoss:
    sizes = [(8, 8), (4, 4), (2, 2)]

    def model(looks):
        """A network that keeps what it is shown, and says something simple about it."""
        def call(z, logsnr, cond):
            looks.append([*z, *logsnr, *cond.values()])
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
        """loss(looks, model, x, cond, t, eps, schedules, kind, **case)"""
        x, eps, cond, t, schedules = NestedLoss.inputs(m, r)
        seen, looks = dict(x=x, eps=eps, logsnr=[schedule(t) for schedule in schedules]), {}
        for name, case in NestedLoss.cases(r).items():
            for kind in ("eps_mse", "v_mse"):
                looks[name] = []
                seen[f"{name}_{kind}"] = loss(looks[name], x, cond, t, eps, schedules, kind, **case)
        first = [[part[:2] for part in parts] for parts in (x, eps)]
        seen["top_alone"] = loss([], first[0], {"shade": cond["shade"][:2]}, t[:2], first[1], schedules, "v_mse",
                                 weights=[1.0, 0.0, 0.0])
        shown = [F.avg_pool2d(letter(64), k) for k in (1, 2, 4)]
        noises, view = [r.normal(*level.shape) for level in shown], []
        halves = [lambda t, k=k: m.schedule.logsnr_cosine(t) - 2 * math.log(k) for k in (4, 2, 1)]
        seen["shown_loss"] = loss(view, shown, {}, torch.tensor([0.25]), noises, halves, "v_mse")
        for name in ("all", "mixed"):
            seen[f"calls_{name}"] = float(len(looks[name]))
            seen[f"looks_{name}"] = looks[name][0] if looks[name] else []
        return dict(seen, shown=view[0][:3] if view else [])

    def see(m, r):
        def loss(looks, x, cond, t, eps, schedules, kind, **case):
            measure = functools.partial(m.train.prediction_loss, loss=kind)
            return m.nested_unet.nested_loss(NestedLoss.model(looks), x, cond, t, eps, schedules, measure, **case)
        return NestedLoss.seen_of(m, r, loss)

    def slow(looks, x, cond, t, eps, schedules, kind, weights=None, rows=None):
        """Example by example and level by level, in float64."""
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
        looks.append([*map(torch.stack, z), *map(torch.stack, logsnr), *cond.values()])
        return total.float()

    def spec(m, r):
        return NestedLoss.seen_of(m, r, NestedLoss.slow)

    def laws(seen):
        yield float(seen["calls_all"]) == 1, "the model must be called once, with the lists of all levels"
        for name, z, x, eps, logsnr in zip(("highest", "middle", "lowest"), seen["looks_all"], seen["x"], seen["eps"],
                                           seen["logsnr"]):
            alpha, sigma = alpha_and_sigma(logsnr)
            yield float((z - alpha * x - sigma * eps).abs().max()) < 1e-3, (
                f"the {name} level is not alpha x + sigma eps with its own x, its own noise, and its own schedule at t")
        yield abs(float(seen["weighted_v_mse"] - seen["all_v_mse"])) > 1e-3, (
            "the weights change nothing: each multiplies its level's loss")
        yield abs(float(seen["top_v_mse"] - seen["top_alone"])) < 1e-3, (
            "with rows, the highest level's loss must be that of its own examples alone: the mean over its rows")

    def picture(seen, axis):
        image(axis, row_of([enlarged(level[0], 64).clamp(-1.5, 1.5) for level in seen["shown"]]))
        axis.set_xlabel("one t, three levels, as the network sees them:\n"
                        "each has its own noise, and more of it the larger it is")


def network_7(m, r):
    """Three levels, 32, 16 and 8 px, random weights everywhere; the innermost one reads a text of width 6."""
    common = dict(emb_channels=16, channel_mult=(1, 2), num_res_blocks=(1, 1), num_heads=2)
    inner = m.unet.UNet((8, 8), 8, attn_resolutions=(4,), num_classes=3, text_channels=6, **common)
    middle, outer = (m.unet.UNet(size, 4, attn_resolutions=(), num_classes=None, middle=False, **common)
                     for size in ((16, 16), (32, 32)))
    nested = m.nested_unet.NestedUNet
    return r.fill(nested(nested(inner, middle), outer))


def slow_denoise(network, z, logsnr, condition, text, f=None):
    """Each example by itself, through the levels that it has: down to the innermost, then up."""
    made, last = [[] for _ in z], []
    for i in range(len(z[-1])):
        inside, levels = network, []
        while hasattr(inside, "inner"):
            levels += [inside] if inside.outer is not None else []
            inside = inside.inner
        first = [len(level) > i for level in z].index(True)               # its highest level
        waiting, comes = [], f[i:i + 1] if f is not None and first == 0 else None
        emb = [embed.of_logsnr(logsnr[k][i:i + 1], 1) + condition[i:i + 1] if k >= first else None
               for k, embed in enumerate([level.outer.embed for level in levels] + [inside.embed])]
        for k in range(first, len(levels)):
            h, skips = levels[k].outer.descend(z[k][i:i + 1], emb[k], f=comes)
            comes = levels[k].in_adapter(h)
            waiting.append((k, h, skips))
        h = inside.features(z[-1][i:i + 1], emb[-1], tuple(part[i:i + 1] for part in text), comes)
        made[-1].append(inside.output(h))
        for k, coarsest, skips in reversed(waiting):
            h = levels[k].outer.ascend(coarsest + levels[k].out_adapter(h), skips, emb[k])
            made[k].append(levels[k].outer.output(h))
        if first == 0:
            last.append(h)
    return [torch.cat(level) for level in made], torch.cat(last)


@exam("7.4", tolerance=1e-3)
class Denoise:
    def seen_of(denoise, m, r):
        network = network_7(m, r)
        z = [r.normal(3, 3, side, side) for side in (32, 16, 8)]
        logsnr = [r.uniform(3, low=-8, high=8) for _ in range(3)]
        condition, f = r.normal(3, 16), r.normal(3, 4, 16, 16)
        text = r.normal(3, 5, 6), torch.arange(5) < torch.tensor([[2], [5], [3]])
        rows = [[part[:n] for part, n in zip(parts, (1, 2, 3))] for parts in (z, logsnr)]
        with torch.no_grad():
            told, innermost = (condition, text), network.inner.inner
            seen = dict(three=denoise(network, z, logsnr, *told),
                        from_above=denoise(network.inner, z[1:], logsnr[1:], *told, f),
                        single=denoise(m.nested_unet.NestedUNet(innermost), z[2:], logsnr[2:], *told),
                        mixed=denoise(network, *rows, *told), innermost=denoise(innermost, z[2:], logsnr[2:], *told))
            moved = []
            for adapters in ("random", "zero"):
                if adapters == "zero":
                    for layer in (network, network.inner):
                        for p in (*layer.in_adapter.parameters(), *layer.out_adapter.parameters()):
                            p.zero_()
                    seen["zero"] = denoise(network, z, logsnr, *told)
                plain, _ = denoise(network, z, logsnr, *told)
                for changed in range(3):
                    other = [-level if k == changed else level for k, level in enumerate(z)]
                    v, _ = denoise(network, other, logsnr, *told)
                    moved += [(a - b).abs().mean() for a, b in zip(v, plain)]
        return dict(seen, moved=torch.stack(moved).reshape(2, 3, 3))      # adapters, input, output

    def see(m, r):
        return Denoise.seen_of(m.nested_unet.denoise, m, r)

    def spec(m, r):
        return Denoise.seen_of(slow_denoise, m, r)

    def laws(seen):
        alone = seen["innermost"][0]
        yield float((seen["zero"][2] - alone).abs().max()) < 1e-3, (
            "with both adapters at zero the lowest level must say what the innermost network says by itself")
        yield float((seen["mixed"][2][2:] - alone[2:]).abs().max()) < 1e-3, (
            "mixed batch: an example without a higher level must get f = 0: what the innermost network says by itself")
        for other in (1, 2):
            yield float(seen["moved"][0, other, 0]) > 1e-4, "out_adapter: the highest level hears nothing of a lower"
        for other in (0, 1):
            yield float(seen["moved"][0, other, 2]) > 1e-4, "in_adapter: the lowest level hears nothing of a higher"

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
        axis.set_xlabel("how far each v moves when the sign of one z is changed;\n"
                        "right: the same with both adapters at zero", fontsize=9)


# ------------------------------------------------------------------------------------------ 8 cascade and distillation

def slow_blur(x, sigma):
    """Nine shifted copies of x (C, h, w), weighted by e^(-distance^2 / 2 sigma^2); outside the nearest pixel."""
    height, width = x.shape[-2:]
    out, total = torch.zeros_like(x, dtype=torch.float64), 0.0
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            weight = math.exp(-(i * i + j * j) / (2 * sigma * sigma))
            rows = (torch.arange(height) + i).clamp(0, height - 1)
            columns = (torch.arange(width) + j).clamp(0, width - 1)
            out, total = out + weight * x.double()[:, rows][:, :, columns], total + weight
    return out / total


@exam("8.1")
class Augment:
    def inputs(r):
        """Eight examples; of each pair of shares a half, one has both spoilings, one each, one none."""
        draws = r.uniform(3, 8, low=0.05, high=0.45)
        draws[0, 4:] += 0.5
        draws[1, [1, 3, 5, 7]] += 0.5
        return r.normal(8, 3, 6, 5), r.uniform(8, low=0.2, high=0.9), r.normal(8, 3, 6, 5), draws

    def seen_of(augment, m, r):
        def low_schedule(t):
            return m.schedule.logsnr_shifted(t, 8, 32)
        x, s, noise, draws = Augment.inputs(r)
        call = functools.partial(augment, x, s, noise, low_schedule)
        flat = torch.full((8, 3, 6, 5), 0.4)
        four = letter(32).expand(4, -1, -1, -1), torch.full((4,), 0.55), r.normal(4, 3, 32, 32)
        which = torch.tensor([[0.9, 0.9, 0.1, 0.1], [0.9, 0.1, 0.9, 0.1], [0.5] * 4])
        return dict(both=call(draws, 0.5, 0.5), noise_alone=call(draws), blur_alone=call(draws, 0.0, 1.0, (0.3, 0.9)),
                    nothing=call(draws, 0.0, 0.0), flat=augment(flat, s, noise, low_schedule, draws, 1.0, 1.0),
                    shown=augment(*four, low_schedule, which, 0.5, 0.5, (0.8, 1.2)),
                    given=[x, noise, draws, low_schedule(s)])

    def see(m, r):
        return Augment.seen_of(m.cascade.augment, m, r)

    def spec(m, r):
        def slow(x, s, noise, low_schedule, draws, aug_noise=1.0, aug_blur=0.0, blur_range=(0.4, 0.6)):
            images, levels = [], []
            for i in range(len(x)):
                (some, blurred, amount), one = draws[:, i].tolist(), x[i].double()
                if blurred < aug_blur:
                    one = slow_blur(one, blur_range[0] + (blur_range[1] - blur_range[0]) * amount)
                level = math.inf
                if some < aug_noise:
                    level = float(low_schedule(s[i]))
                    alpha, sigma = (float(part) for part in alpha_and_sigma(level))
                    one = alpha * one + sigma * noise[i].double()
                images.append(one.float()), levels.append(level)
            return torch.stack(images), torch.tensor(levels)
        return Augment.seen_of(slow, m, r)

    def laws(seen):
        x, noise, draws, level = seen["given"]
        same, none = seen["nothing"]
        yield float((same - x).abs().max()) < 1e-6, "aug_noise = 0, aug_blur = 0: the image must stay as it is"
        yield bool((none == math.inf).all()), "where there is no noise the level must be told as +inf"
        told = seen["noise_alone"][1]
        yield float((told - level).abs().max()) < 1e-3, "each example must be told the level of its own s"
        alpha, sigma = alpha_and_sigma(told)
        yield float((seen["noise_alone"][0] - alpha * x - sigma * noise).abs().max()) < 1e-3, (
            "what is told is not what is there: z must be alpha low_res + sigma noise at the level that is told")
        noisy = (seen["both"][1] < math.inf).tolist()
        yield noisy == (draws[0] < 0.5).tolist(), "noise goes to the examples with draws[0] < aug_noise, and only there"
        alpha, sigma = alpha_and_sigma(level)
        yield float((seen["flat"][0] - alpha * 0.4 - sigma * noise).abs().max()) < 1e-3, (
            "a flat image with blur and noise: the noise must come through sharp, so blur first")

    def picture(seen, axis):
        image(axis, row_of(seen["shown"][0].clamp(-1.5, 1.5)))
        told = ", ".join("none" if level == math.inf else f"{level:.1f}" for level in seen["shown"][1].tolist())
        axis.set_xlabel(f"as it is, blurred, noisy, both; level told: {told}")


@exam("8.2")
class HandOver:
    times = [0.0, 0.2, 0.4, 0.6]

    def seen_of(hand_over, m, r):
        def low_schedule(t):
            return m.schedule.logsnr_shifted(t, 16, 32)
        x, noise, s = r.normal(3, 3, 4, 4), r.normal(3, 3, 4, 4), float(r.uniform(1, low=0.2, high=0.8))
        words = "truncated", "renoised", "clean"
        seen = {name: hand_over(x, name, s, low_schedule, noise) for name in words}
        zero = {f"{name}_0": hand_over(x, name, 0.0, low_schedule, noise) for name in words}
        big = r.normal(1, 3, 32, 32)
        shown = [hand_over(letter(32), "renoised", s, low_schedule, big) for s in HandOver.times]
        return dict(**seen, **zero, shown=[z for z, _ in shown], told=[level for _, level in shown],
                    given=[x, noise, low_schedule(torch.tensor(s))])

    def see(m, r):
        x = torch.zeros(1, 3, 4, 4)
        return dict(HandOver.seen_of(m.cascade.hand_over, m, r),
                    refused=[refused(m.cascade.hand_over, x, word, 0.5, m.schedule.logsnr_cosine, x)
                             for word in ("raw", "Clean", "")])

    def spec(m, r):
        def slow(x, handoff, s, low_schedule, noise):
            if handoff == "clean" or s == 0:
                return x, torch.tensor([math.inf] * len(x))
            levels = [float(low_schedule(torch.tensor(s)))] * len(x)
            if handoff == "truncated":
                return x, torch.tensor(levels)
            alpha, sigma = (float(part) for part in alpha_and_sigma(levels[0]))
            return torch.stack([alpha * one + sigma * more for one, more in zip(x, noise)]), torch.tensor(levels)
        return dict(HandOver.seen_of(slow, m, r), refused=[torch.tensor(1.0)] * 3)

    def laws(seen):
        yield all(float(flag) for flag in seen["refused"]), (
            "a word that is none of truncated, renoised, clean: want ValueError")
        x, noise, level = seen["given"]
        yield torch.equal(seen["truncated"][0], x), "truncated: low_res is z_s already; nothing may be added"
        alpha, sigma = alpha_and_sigma(level)
        yield float((seen["renoised"][0] - alpha * x - sigma * noise).abs().max()) < 1e-3, (
            "renoised: alpha_s low_res + sigma_s noise, at the level of s")
        for name in ("clean", "truncated_0", "renoised_0"):
            z, told = seen[name]
            yield bool((told == math.inf).all()) and float((z - x).abs().max()) < 1e-6, (
                f"{name.replace('_0', ' with s = 0')}: the image as it is, and the level +inf")

    def picture(seen, axis):
        image(axis, row_of([z[0].clamp(-1.5, 1.5) for z in seen["shown"]]))
        told = ", ".join("none" if float(level) == math.inf else f"{float(level):.1f}" for level in seen["told"])
        axis.set_xlabel(f"renoised, s = 0, 0.2, 0.4, 0.6; level told: {told}")


def slow_target(z_t, z_s, logsnr_t, logsnr_s):
    """The DDIM step is a straight line in x: from where it leads with x = 0 and with x = 1 one reads off which x leads
    to z_s. In float64."""
    zero, one = (slow_ddim(z_t, torch.full_like(z_t, x), logsnr_t, logsnr_s) for x in (0.0, 1.0))
    return (z_s.double() - zero) / (one - zero)


@exam("8.3", tolerance=1e-3)
class StepTarget:
    def seen_of(target, r):
        z_t, z_s, t, s = inputs_6(r)
        s = s + 1
        x, ends = r.normal(4, 3, 5, 5), torch.full((4,), math.inf)
        looks = [F.avg_pool2d(letter(48), 12).repeat_interleave(12, 2).repeat_interleave(12, 3), letter(48)]
        z, levels = [r.normal(1, 3, 48, 48)], [torch.tensor([level]) for level in (-6.0, 0.5, 3.0)]
        for look, here, there in zip(looks, levels, levels[1:]):
            z.append(slow_ddim(z[-1], look, here, there).float())
        return dict(random=target(z_t, z_s, t, s), known=target(z_t, slow_ddim(z_t, x, t, s).float(), t, s),
                    clean=target(z_t, z_s, t, ends), given=[z_t, z_s, t, s, x], looks=looks,
                    shown=target(z[0], z[2], levels[0], levels[2]))

    def see(m, r):
        return StepTarget.seen_of(m.distill.step_target, r)

    def spec(m, r):
        def slow(z_t, z_s, logsnr_t, logsnr_s):
            if bool((logsnr_s == math.inf).all()):                        # alpha_s = 1, sigma_s = 0: to x itself
                return z_s
            return slow_target(z_t, z_s, logsnr_t, logsnr_s).float()
        return StepTarget.seen_of(slow, r)

    def laws(seen):
        z_t, z_s, t, s, x = seen["given"]
        yield float((seen["clean"] - z_s).abs().max()) < 1e-3, "where sigma_s = 0 the target must be z_s itself"
        yield float((seen["known"] - x).abs().max()) < 1e-2, "if one DDIM step with an x made z_s, that x is the target"
        landed = slow_ddim(z_t, seen["random"], t, s)
        yield float((landed - z_s).abs().max()) < 1e-2, "one DDIM step with this x must land on z_s"

    def picture(seen, axis):
        image(axis, row_of([part[0].clamp(-1.2, 1.2) for part in (*seen["looks"], seen["shown"])]))
        axis.set_xlabel("x_hat of a first step, of a second one,\nand the x with which one step lands where the two do")


@exam("8.4", tolerance=1e-3)
class TwoStepTarget:
    def x_of(z, logsnr):
        """What the teacher sees in z: not within [-1, 1], and something else at each time."""
        return 1.5 * (1.5 * z.double()).sin() + 0.1 * logsnr.double().reshape(-1, 1, 1, 1)

    def teacher(walk):
        """It keeps what it is asked in `walk`."""
        def predict(z, logsnr):
            walk.append([*z, *logsnr])
            return [((alpha * level - TwoStepTarget.x_of(level, l)) / sigma).float()
                    for level, l, (alpha, sigma) in zip(z, logsnr, map(alpha_and_sigma, logsnr))]
        return predict

    def faithful(z, logsnr):
        """A teacher that sees the same x at every time: the number 0.3 everywhere."""
        return [((alpha * level - 0.3) / sigma).float()
                for level, (alpha, sigma) in zip(z, map(alpha_and_sigma, logsnr))]

    def schedules(m):
        def guarded(down):
            def schedule(t):                                              # no process before t = 0
                return torch.where(t < 0, torch.nan, m.schedule.logsnr_cosine(t, -8.0, 6.0) - down)
            return schedule
        return [guarded(2 * math.log(2)), guarded(0.0)]

    def seen_of(target, m, r):
        """target(walk, predict, schedules, z, t, steps)"""
        schedules, steps = TwoStepTarget.schedules(m), 4
        t = torch.tensor([0.25 - 2e-8, 0.5, 0.75, 1.0])                   # the first is 1/4 but for rounding
        z, walk = [r.normal(4, 3, 4, 4), r.normal(4, 3, 2, 2)], []
        seen = dict(random=target(TwoStepTarget.teacher(walk), schedules, z, t, steps), z=z, walk=walk)
        seen["levels"] = [[f(time) for f in schedules] for time in (t, t - 0.125, (t - 0.25).clamp(min=0))]
        seen["plain"] = target(TwoStepTarget.teacher([]), schedules[1:], z[1:], t[1:2], 2)
        seen["same_x"] = target(TwoStepTarget.faithful, schedules, z, t, steps)
        path, start = [], 1.3 * torch.linspace(-1, 1, 6).reshape(1, 1, 1, 6)
        shown = [lambda t: m.schedule.logsnr_cosine(t, -2.0, 6.0)]
        seen["shown"] = target(TwoStepTarget.teacher(path), shown, [start], torch.tensor([1.0]), 1)
        return dict(seen, path=path, end=shown[0](torch.tensor([0.0])))

    def see(m, r):
        return TwoStepTarget.seen_of(m.distill.two_step_target, m, r)

    def slow(predict, schedules, z, t, steps):
        """Two steps of slow_ddim, then slow_target, in float64."""
        times = t, t - 1 / (2 * steps), torch.tensor([max(0.0, one - 1 / steps) for one in t.tolist()])
        now = [level.double() for level in z]
        for here, there in zip(times, times[1:]):
            said = predict([level.float() for level in now], [schedule(here) for schedule in schedules])
            for k, (schedule, v) in enumerate(zip(schedules, said)):
                alpha, sigma = alpha_and_sigma(schedule(here))
                now[k] = slow_ddim(now[k], alpha * now[k] - sigma * v.double(), schedule(here), schedule(there))
        out = []
        for schedule, first, last in zip(schedules, z, now):
            alpha, sigma = alpha_and_sigma(schedule(t))
            out.append(((alpha * first - slow_target(first, last, schedule(t), schedule(times[2]))) / sigma).float())
        return out

    def spec(m, r):
        return TwoStepTarget.seen_of(TwoStepTarget.slow, m, r)

    def laws(seen):
        yield all(bool(v.isfinite().all()) for v in seen["random"]), (
            "the schedule is asked about a time below 0, by rounding: clamp the end of the last step")
        yield len(seen["walk"]) == 8, "the teacher must be asked twice, each time about all levels"
        levels = [seen["levels"][i:i + 2] for i in (0, 2, 4)]
        for ask, asked, says in ((0, seen["walk"][2:4], "t"), (1, seen["walk"][6:], "t - 1/(2 steps)")):
            yield all(float((one - level).abs().max()) < 1e-3 for one, level in zip(asked, levels[ask])), (
                f"the teacher's look number {ask + 1} must be at {says}")
        for k, z in enumerate(seen["z"]):
            alpha, sigma = alpha_and_sigma(levels[0][k])
            yield float((alpha * z - sigma * seen["same_x"][k] - 0.3).abs().max()) < 1e-2, (
                "a teacher that sees the same x at both times: that x must be the target, as v at t")
            x, z_s = alpha * z - sigma * seen["random"][k], z
            for here, there in zip(levels, levels[1:]):
                z_s = slow_ddim(z_s, TwoStepTarget.x_of(z_s, here[k]), here[k], there[k])
            yield float((slow_ddim(z, x, levels[0][k], levels[2][k]) - z_s).abs().max()) < 1e-2, (
                "one step of the student does not land where the teacher's two do: v at t of the x that leads there")

    def picture(seen, axis):
        """In z / alpha against sigma / alpha a DDIM step is a straight line."""
        (z, here, middle, there), v, end = seen["path"], seen["shown"], seen["end"]
        alpha, sigma = alpha_and_sigma(here)
        landed = slow_ddim(z, alpha * z - sigma * v, here, end)
        points = [(level / a, s / a) for level, (a, s) in ((z, (alpha, sigma)), (middle, alpha_and_sigma(there)),
                                                           (landed, alpha_and_sigma(end)))]
        for pixel in range(6):
            x, y = [float(s) for _, s in points], [float(level[0, 0, 0, pixel]) for level, _ in points]
            axis.plot(x, y, "o-", color="C0", ms=3, lw=1, label="teacher, two steps" if pixel == 0 else None)
            axis.plot(x[::2], y[::2], "--", color="C1", label="student, one step" if pixel == 0 else None)
        axis.set(xlabel="sigma / alpha: from t = 1, right, over t = 1/2 to t = 0", ylabel="z / alpha of six pixels")
        axis.legend(fontsize=8)
