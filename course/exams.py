"""The exams: one for each exercise. What is seen of the student's function, what it should be, and why.

    see(m, r)      in the student's process: {name: tensors} from m.schedule, m.dwt, ... on random inputs from r
    spec(m, r)     in the judge's: the same from a slow loop or a closed form, on the same random inputs
    laws(seen)     yields (holds, message): what must be true of what was seen, in words, before equality is looked at
    picture(seen, axis)    what a student sees once it is right
    tolerance      of equality, relative and absolute

The specification is there to be read: it is the definition without cleverness. Where it needs layers it takes those of
m, which for the judge are the project's own.
"""
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
            f"512 px at noise_d 64: the end points are {ends[0]:.2f} and {ends[1]:.2f}: they move, too: 10.84 and -19.16")

    def picture(seen, axis):
        curves(axis, TIMES, {"64 px": seen["same"], "128 px": seen["shift_128"], "512 px": seen["shift_512"]}, "t",
               "log-SNR of a pixel, noise_d 64")


@exam("1.4")
class Interpolated:
    def see(m, r):
        t = r.uniform(7, low=0.05, high=0.95)
        low, high = 2 ** r.integer(4, 6), 2 ** r.integer(6, 8)
        return dict(random=m.schedule.logsnr_interpolated(t, 256, low, high, -12.0, 9.0),
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


conversion("2.2", "v_from_x_eps", lambda x, eps, z, v: (x, eps), lambda x, eps, a, s: a * eps - s * x, laws_v,
           picture_v)
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
        yield float((low - 3).abs().max()) < 1e-5, (
            f"the low band of a constant 3 is {float(low[1]):.4g}: its gain must be 1")
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
                    refused=[refused(m.dwt.dwt, torch.zeros(1, 1, *size), 2) for size in ((6, 8), (8, 6))],
                    shown=shown)

    def spec(m, r):
        return dict(one=slow_dwt(r.normal(2, 3, 8, 12), 1), two=slow_dwt(r.normal(1, 2, 16, 8), 2),
                    none=r.normal(1, 2, 4, 4), refused=[torch.tensor(1.0)] * 2, shown=slow_dwt(letter(64), 1))

    def laws(seen):
        yield all(map(float, seen["refused"])), "6 x 8 does not divide by 4, nor does 8 x 6: want ValueError"
        low = F.avg_pool2d(letter(64), 2)
        yield float((seen["shown"][:, :3] - low).abs().mean()) < 0.2, (
            "the low band must come first, and look like the image")

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
        def slow(y, levels):                                              # the matrix, column by column, transposed
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
            f"with y = dwt(x): sum(y y) = {inner[0]:.5g}, sum(x adjoint(y)) = {inner[1]:.5g}: they must be one number")

    def picture(seen, axis):
        image(axis, row_of([letter(16)[0, :1], seen["shown"][0]])[0])
        axis.set_xlabel("x, and the adjoint of its wavelet transform: not x")


# ------------------------------------------------------------------------------------------ 4 the U-Net

def slow_norm(x, groups, weight, bias=None):
    """Group norm of a map (B, C, H, W), or layer norm of tokens (..., C) if groups is None. In float64."""
    x, shape = x.double(), x.shape
    flat = x.reshape(*shape[:-1], 1, -1) if groups is None else x.reshape(shape[0], groups, -1)
    flat = (flat - flat.mean(-1, keepdim=True)) / (flat.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    axes = (1, -1) + (1,) * (len(shape) - 2) if groups else (-1,)
    y = flat.reshape(shape) * weight.double().reshape(axes)
    return y if bias is None else y + bias.double().reshape(axes)


def swish(x):
    return x / (1 + torch.exp(-x))


@exam("4.1")
class LevelEmbedding:
    def seen(m, r, call):
        moved, plain = m.unet.Embedding(16, -19.16, 10.84, 5), m.unet.Embedding(16, -15.0, 15.0, 5)
        plain.load_state_dict(r.fill(moved).state_dict())
        curve = torch.linspace(-19.16, 10.84, 61)
        ends = torch.tensor([-19.16, 10.84]), torch.tensor([-15.0, 15.0])
        return dict(random=call(moved, r.uniform(4, low=-18, high=10), 4), scalar=call(moved, torch.tensor(0.5), 3),
                    moved=call(moved, ends[0], 2), plain=call(plain, ends[1], 2), curve=call(moved, curve, 61))

    def see(m, r):
        return LevelEmbedding.seen(m, r, lambda layer, logsnr, batch: layer.of_logsnr(logsnr, batch))

    def spec(m, r):
        def slow(layer, logsnr, batch):
            places = [(float(l) - layer.logsnr_min) / (layer.logsnr_max - layer.logsnr_min)
                      for l in logsnr.reshape(-1).expand(batch)]
            return layer.time(m.unet.sinusoid(torch.tensor(places), layer.width))
        return LevelEmbedding.seen(m, r, slow)

    tolerance = 1e-2                                                      # sines of angles up to 1000

    def laws(seen):
        yield float((seen["moved"] - seen["plain"]).abs().max()) < 2e-2, (
            "the ends of a shifted schedule, -19.16 and 10.84, must be told as the plain one's ends, -15 and 15, are")
        yield float(seen["scalar"].std(0).max()) < 1e-6, "one level for all must give every example the same row"

    def picture(seen, axis):
        channels = {f"channel {i}": seen["curve"][:, i] for i in range(4)}
        curves(axis, torch.linspace(-19.16, 10.84, 61), channels, "log-SNR", "embedding")


@exam("4.2", tolerance=1e-3)
class ResBlock:
    def seen(m, r, call):
        x, skip, emb = r.normal(2, 8, 6, 6) + 0.5, 3 * r.normal(2, 8, 6, 6), r.normal(2, 12)
        plain, joined = r.fill(m.unet.ResBlock(8, 12)), r.fill(m.unet.ResBlock(8, 12, skip=True))
        dropped = r.fill(m.unet.ResBlock(8, 12, dropout=1.0)).train()
        picture, shown = r.fill(m.unet.ResBlock(3, 12)), letter().expand(3, -1, -1, -1)
        return dict(plain=call(plain, x, emb, None), joined=call(joined, x, emb, skip),
                    louder=call(joined, x, emb, 5 * skip), dropped=call(dropped, x, emb, None), x=x,
                    bias=dropped.conv2.bias,
                    shown=call(picture, shown, r.normal(3, 12), None))

    def see(m, r):
        return ResBlock.seen(m, r, lambda block, x, emb, skip: block(x, emb) if skip is None else block(x, emb, skip))

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
            h = swish(h) * (0 if block.training else 1)                   # the only one in training drops everything
            return (x.double() + conv(block.conv2, h)).float()
        return ResBlock.seen(m, r, slow)

    def laws(seen):
        yield float((seen["dropped"] - seen["x"] - seen["bias"].reshape(1, -1, 1, 1)).abs().max()) < 1e-4, (
            "with dropout 1 must remain x and the bias of conv2: dropout stands right before conv2")
        yield float((seen["joined"] - seen["louder"]).abs().max()) < 1e-2, (
            "a skip five times as loud must change nothing: both sides are normalised before they are added")

    def picture(seen, axis):
        image(axis, row_of([letter()[0], *seen["shown"]]))
        axis.set_xlabel("x, and x + h by random weights under three embeddings")


SIDES = [(4, 4), (8, 8), (16, 16), (32, 32), (64, 64), (8, 32), (8, 16), (12, 20), (24, 40), (23, 22)]
RESOLUTIONS = (0, 8, 16, 32)


@exam("4.3")
class Dropout:
    def see(m, r):
        sizes = SIDES + [(r.integer(3, 90), r.integer(3, 90)) for _ in range(10)]
        return dict(table=[bool(m.unet.at_or_below(h, w, d)) for h, w in sizes for d in RESOLUTIONS])

    def spec(m, r):
        sizes = SIDES + [(r.integer(3, 90), r.integer(3, 90)) for _ in range(10)]
        return dict(table=[float(d > 0 and h * w < 2 * d * d) for h, w in sizes for d in RESOLUTIONS])

    def laws(seen):
        table = {(*size, d): bool(seen["table"][4 * i + j]) for i, size in enumerate(SIDES)
                 for j, d in enumerate(RESOLUTIONS)}
        yield not any(table[h, w, 0] for h, w in SIDES), "resolution 0 means never"
        yield table[16, 16, 16], "from 16 x 16 down: 16 x 16 itself has dropout"
        yield table[8, 8, 16] and not table[32, 32, 16], "smaller maps have it, larger ones have not"
        yield table[8, 32, 16], "8 x 32 has the area of 16 x 16"

    def picture(seen, axis):
        table = torch.stack(seen["table"])[:20].reshape(5, 4)
        axis.imshow(table, cmap="Blues", vmin=0, vmax=1.5)
        axis.set(xticks=range(4), xticklabels=["never (0)", "8", "16", "32"], yticks=range(5), xlabel="dropout from",
                 yticklabels=[f"{h} x {w}" for h, w in SIDES[:5]])


@exam("4.4", tolerance=1e-3)
class WayUp:
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
        return dict(out=out, uses=uses)

    def see(m, r):
        with torch.no_grad():
            return WayUp.seen(m, r, lambda net, h, skips, emb: net.ascend(h, skips, emb))

    def spec(m, r):
        def slow(net, h, skips, emb):
            last = len(skips)
            for level in range(3):
                for i in range((2, 3, 2)[level]):                         # k + 1, coarsest level first
                    last -= 1
                    block, attention = net.up[level][i]
                    h = attention(block(h, emb, skips[last]), None)
                h = net.upsample[level](h) if level < 2 else h
            return h
        with torch.no_grad():
            return WayUp.seen(m, r, slow)

    def laws(seen):
        for i, use in enumerate(seen["uses"]):
            yield float(use) > 1e-6, f"skip {i} of {len(seen['uses'])} changes nothing: each of them has its block"

    def picture(seen, axis):
        axis.bar(range(len(seen["uses"])), [float(use) for use in seen["uses"]])
        axis.set(xlabel="skip, the finest first", ylabel="what it changes at the end")


# ------------------------------------------------------------------------------------------ 5 the U-ViT

@exam("5.1", tolerance=1e-3)
class Attention:
    def seen(m, r, call):
        layer, x = r.fill(m.unet.Attention(12, 3)), r.normal(2, 5, 12)
        mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 1, 1]]).bool()
        order, other = torch.randperm(5, generator=r.generator), x.clone()
        other[0, 2], other[1, 1:3] = r.normal(12), r.normal(2, 12)
        out = dict(out=call(layer, x, None), shuffled=call(layer, x[:, order], None)[:, order.argsort()],
                   masked=call(layer, x, mask), hidden=call(layer, other, mask), mask=mask.float())
        with torch.no_grad():
            layer.qkv.weight[:24] *= 1000                                 # q and k, a thousand times as loud
            layer.qkv.bias[:24] *= 1000
        return dict(out, loud=call(layer, x, None), x=x)

    def see(m, r):
        return Attention.seen(m, r, lambda layer, x, mask: layer(x) if mask is None else layer(x, mask))

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
            return Attention.seen(m, r, slow)

    def laws(seen):
        yield float((seen["out"] - seen["loud"]).abs().max()) < 1e-2, (
            "q and k a thousand times as loud must change nothing: they are normalised, per head")
        yield float((seen["out"] - seen["shuffled"]).abs().max()) < 1e-3, (
            "tokens in another order must give the same in that order: attention knows no places")
        visible = seen["mask"].bool()
        yield float((seen["masked"] - seen["hidden"])[visible].abs().max()) < 1e-3, "a masked token was looked at"

    def picture(seen, axis):
        both = torch.cat([seen["x"][0], torch.full((1, 12), torch.nan), seen["out"][0]])
        axis.imshow(both, cmap="coolwarm", vmin=-3, vmax=3)
        axis.set(yticks=(2, 8), yticklabels=("x", "x + attention"), xlabel="channel")


@exam("5.2", tolerance=1e-3)
class MLP:
    def seen(m, r, call):
        x, skip, emb = r.normal(2, 5, 8) + 0.5, 3 * r.normal(2, 5, 8), r.normal(2, 12)
        plain, joined = r.fill(m.uvit.MLPBlock(8, 12)), r.fill(m.uvit.MLPBlock(8, 12, skip=True))
        dropped = r.fill(m.uvit.MLPBlock(8, 12, dropout=1.0)).train()
        return dict(plain=call(plain, x, emb, None), joined=call(joined, x, emb, skip),
                    louder=call(joined, x, emb, 5 * skip), alone=call(plain, x[:, 2:3], emb, None),
                    dropped=call(dropped, x, emb, None), x=x, bias=dropped.out.bias)

    def see(m, r):
        return MLP.seen(m, r, lambda block, x, emb, skip: block(x, emb) if skip is None else block(x, emb, skip))

    def spec(m, r):
        def slow(block, x, emb, skip):
            dense = lambda layer, a: a @ layer.weight.double().T + layer.bias.double()
            film, out = dense(block.film, emb.double()), torch.zeros_like(x)
            for b in range(x.shape[0]):
                for n in range(x.shape[1]):                               # token by token: none knows of another
                    h = slow_norm(x[b, n], None, block.norm.weight)
                    if skip is not None:
                        h = (h + slow_norm(skip[b, n], None, block.norm_skip.weight)) / math.sqrt(2)
                    h = swish(dense(block.expand, h))
                    half = len(h)
                    h = (h * (1 + film[b, :half]) + film[b, half:]) * (0 if block.training else 1)
                    out[b, n] = (x[b, n].double() + dense(block.out, h)).float()
            return out
        with torch.no_grad():
            return MLP.seen(m, r, slow)

    def laws(seen):
        yield float((seen["dropped"] - seen["x"] - seen["bias"]).abs().max()) < 1e-4, (
            "with dropout 1 must remain x and the bias of the last layer: dropout stands right before it")
        yield float((seen["joined"] - seen["louder"]).abs().max()) < 1e-2, (
            "a skip five times as loud must change nothing: both sides are normalised before they are added")
        yield float((seen["plain"][:, 2:3] - seen["alone"]).abs().max()) < 1e-4, "a token's result depends on others"

    def picture(seen, axis):
        both = torch.cat([seen["x"][0], torch.full((1, 8), torch.nan), seen["plain"][0]])
        axis.imshow(both, cmap="coolwarm", vmin=-3, vmax=3)
        axis.set(yticks=(2, 8), yticklabels=("x", "x + mlp"), xlabel="channel")


@exam("5.3", tolerance=2e-3)
class Tokens:
    def seen(m, r, call):
        net, reader = (r.fill(m.uvit.UViT((16, 24), 8, 12, (1, 2, 2), (1, 2), 2, num_heads=2, num_classes=3,
                                          text_channels=width)) for width in (0, 6))
        z, emb, f = r.normal(2, 3, 16, 24), r.normal(2, 12), r.normal(2, 8, 16, 24)
        text = r.normal(2, 3, 6), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
        out = dict(out=call(net, z, emb, None, None), text=call(reader, z, emb, text, None),
                   f=call(net, z, emb, None, f), refused=refused(lambda: net.features(z[..., :16], emb)))
        with torch.no_grad():
            net.position[7] += 3 * r.normal(16)                           # the token of row 1, column 1 of 4 x 6
        return dict(out, moved=call(net, z, emb, None, None))

    def see(m, r):
        with torch.no_grad():
            return Tokens.seen(m, r, lambda net, *given: net.features(*given))

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
            return dict(Tokens.seen(m, r, slow), refused=1.0)

    def laws(seen):
        yield bool(seen["refused"]), "an image of another size must be refused: ValueError"
        yield float((seen["out"] - seen["moved"]).abs().max()) > 1e-4, "the position embedding changes nothing"
        yield float((seen["out"] - seen["f"]).abs().max()) > 1e-4, "f, the map of an outer level, changes nothing"

    def picture(seen, axis):
        image(axis, row_of([seen["out"][0, :3], (seen["moved"] - seen["out"])[0, :3]]))
        axis.set_xlabel("the last map; what another position of token 7 changes")
