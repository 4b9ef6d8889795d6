"""The exams: one for each exercise. What is seen of the student's function, what it should be, and why.

    see(m, r)      in the student's process: {name: tensors} from m.schedule, m.dwt, ... on random inputs from r
    spec(m, r)     in the judge's: the same from a slow loop or a closed form, on the same random inputs
    laws(seen)     yields (holds, message): what must be true of what was seen, told in words, before equality is looked at
    picture(seen, axis)    what a student sees once it is right
    tolerance      of equality, relative and absolute

The specification is there to be read: it is the definition without cleverness. Where it needs layers it takes those of m,
which for the judge are the project's own.
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
        axis.set_xlabel("z at log-SNR -6, and one step from there to -2, 0, 2, 6;\nx_hat is the picture: the noise stays, "
                        "its share falls")


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
            yield abs(got / want - 1) < 1e-2, f"from log-SNR -1 to 1, {name}: the variance is {got:.4g}, want {want:.4g}"
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
        yield float(((seen["random"] - cond) * (cond - null)).sum()) > 0, "w > 1 must lead away from v_null, past v_cond"

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
        yield most < 1 + 1e-4, f"|x| up to {most:.3g} is left; after clipping to [-s, s] and dividing by s it is at most 1"
        inside, _ = seen["given"]
        yield float((seen["inside"] - inside).abs().max()) < 1e-4, (
            "an image within [-1, 1] must stay as it is: s is 1 at least")
        yield float((torch.cat(seen["alone"]) - seen["random"]).abs().max()) < 1e-4, (
            "an image comes out differently when it is alone: each has its own s")

    def picture(seen, axis):
        x = 2.2 * letter(48) + 0.6                                        # as a prediction under strong guidance
        image(axis, row_of([x.clamp(-1, 1)[0], seen["shown"][0]]))
        axis.set_xlabel("a prediction far out of [-1, 1]: clipped, and thresholded")
