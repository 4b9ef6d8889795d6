"""Exams of chapter 2, parameterisations and losses: schedule.py and train.py. exams.py explains how an exam works."""
import math

import torch

from course.exams import alpha_and_sigma, curves, exam, image, learns, letter, NO_GRADIENT, refused, row_of


LEVELS = torch.linspace(-8, 8, 17)
ENDS = torch.tensor([-15.0, 15.0, math.inf, 0.0])                         # the ends of a schedule; +inf is "no noise"


def inputs_2(r):
    """Draw x, eps (4, 3, 6, 6) and logsnr (4,) in [-8, 8]: further out a division would hide an error."""
    return r.normal(4, 3, 6, 6), r.normal(4, 3, 6, 6), r.uniform(4, low=-8, high=8)


@exam("2.1")
class Diffuse:
    taught = True

    def see(m, r):
        x, eps, logsnr = inputs_2(r)
        levels = torch.tensor([8.0, 3.0, 0.0, -3.0, -8.0])
        return dict(z=m.schedule.diffuse(x, eps, logsnr), scalar=m.schedule.diffuse(x, eps, 0.7),
                    ends=m.schedule.diffuse(x, eps, ENDS),
                    shown=m.schedule.diffuse(letter().expand(5, -1, -1, -1), r.normal(5, 3, 32, 32), levels))

    def spec(m, r):
        x, eps, logsnr = inputs_2(r)
        levels = torch.tensor([8.0, 3.0, 0.0, -3.0, -8.0])

        def slow(x, eps, logsnr):
            return torch.stack([math.sqrt(1 / (1 + math.exp(-l))) * a + math.sqrt(1 / (1 + math.exp(l))) * b
                                for a, b, l in zip(x, eps, torch.as_tensor(logsnr).expand(len(x)).tolist())])
        return dict(z=slow(x, eps, logsnr), scalar=slow(x, eps, 0.7), ends=slow(x, eps, ENDS),
                    shown=slow(letter().expand(5, -1, -1, -1), r.normal(5, 3, 32, 32), levels))

    def laws(seen):
        noise = seen["shown"][4]
        yield abs(float(noise.std()) - 1) < 0.1, (
            f"at log-SNR -8 z has standard deviation {float(noise.std()):.2f}, want about 1")
        yield float((seen["shown"][0] - letter()[0]).abs().mean()) < 0.1, "at log-SNR 8 z must look like the image"

    def picture(seen, axis):
        image(axis, row_of(seen["shown"].clamp(-1.5, 1.5)))
        axis.set_xlabel("log-SNR 8, 3, 0, -3, -8")


def conversion(number, name, given, slow, laws, picture, levels=(3.0, 0.0, -3.0), error=0.0):
    """Enter the exam of a conversion: it calls `name`(*given(x, eps, z, v), logsnr); `slow` works in float64 with alpha
    and sigma. The picture shows the conversion at these levels; the second given has an error of this size."""
    def faces(r):
        x, eps, logsnr = inputs_2(r)
        alpha, sigma = alpha_and_sigma(logsnr)
        return x, eps, (alpha * x + sigma * eps).float(), (alpha * eps - sigma * x).float(), logsnr

    def seen_of(call, r):
        *four, logsnr = faces(r)
        a, b = given(*four)
        flat = given(*(torch.ones(4, 1, 1, 1) * k for k in (0.5, -1.0, 0.25, 2.0)))
        return dict(random=call(a.clone(), b.clone(), logsnr), one=call(a.clone(), b.clone(), logsnr[0]),
                    ends=call(*flat, ENDS), truth=four, level=logsnr, shown=shown(call, r))

    def shown(call, r):
        at = torch.tensor(levels)
        (alpha, sigma), eps = alpha_and_sigma(at), r.normal(1, 3, 32, 32)
        x, eps = (part.expand(len(at), -1, -1, -1) for part in (letter(), eps))
        a, b = given(x, eps, (alpha * x + sigma * eps).float(), (alpha * eps - sigma * x).float())
        return [a, b, call(a.clone(), b + error * r.normal(1, 3, 32, 32), at)]

    class Conversion:
        taught = True

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
        "(z, v) is a rotation of (x, eps): x^2 + eps^2 = z^2 + v^2 in every pixel")


def laws_eps(seen):
    yield float((seen["random"] - seen["truth"][1]).abs().max()) < 1e-3, "the true v must give the true noise"


def laws_x(seen):
    alpha, _ = alpha_and_sigma(seen["level"])
    yield float(((seen["random"] - seen["truth"][0]) * alpha).abs().max()) < 1e-3, (
        "the true noise must give the true image")


def picture_v(seen, axis):
    x, eps, z, _ = seen["truth"]
    for name, part in (("z", z), ("v", seen["random"])):
        axis.scatter(x[0].flatten(), part[0].flatten(), s=6, label=f"{name} against x")
    axis.set(xlabel="x", ylabel=f"log-SNR {float(seen['level'][0]):.1f}")
    axis.legend(fontsize=8)


def picture_eps(seen, axis):
    image(axis, torch.cat([row_of(part.clamp(-2, 2)) for part in seen["shown"]], -2))
    axis.set(xlabel="log-SNR 3, 0, -3: the noise shows no letter", yticks=(16, 48, 80), yticklabels=("z", "v", "eps"))


def picture_x(seen, axis):
    z, _, x = seen["shown"]
    image(axis, torch.cat([row_of(part.clamp(-1.5, 1.5)) for part in (z, x)], -2))
    axis.set(xlabel="log-SNR 4, 0, -4, -8: an error of 0.03 in eps\nhides the image where the noise is strong",
             yticks=(16, 48), yticklabels=("z", "x"))


conversion("2.2", "v_from_x_eps", lambda x, eps, z, v: (x, eps), lambda x, eps, a, s: a * eps - s * x, laws_v,
           picture_v)
conversion("2.3", "eps_from_v", lambda x, eps, z, v: (z, v), lambda z, v, a, s: s * z + a * v, laws_eps,
           picture_eps)
conversion("2.4", "x_from_eps", lambda x, eps, z, v: (z, eps), lambda z, eps, a, s: (z - s * eps) / a, laws_x,
           picture_x, levels=(4.0, 0.0, -4.0, -8.0), error=0.03)


@exam("2.5")
class PredictionLoss:
    taught, untaught = True, ("z", "x", "eps")                            # of one error; which of them it uses is free

    def see(m, r):
        x, eps, logsnr = inputs_2(r)
        z, v = m.schedule.diffuse(x, eps, logsnr), r.normal(4, 3, 6, 6)
        losses = {}
        for loss in ("eps_mse", "v_mse"):
            losses[loss] = [m.train.prediction_loss(*(part[i:i + 1] for part in (v, z, x, eps, logsnr)), loss)
                            for i in range(4)]
            losses[loss + "_all"] = m.train.prediction_loss(v, z, x, eps, logsnr, loss)
            losses[loss + "_ends"] = [m.train.prediction_loss(
                v[:1], m.schedule.diffuse(x[:1], eps[:1], end[None]), x[:1], eps[:1], end[None], loss)
                for end in ENDS[:2]]
            losses[loss + "_multiscale"] = m.train.prediction_loss(v, z, x, eps, logsnr, loss, 3)
        off = 0.1 * r.normal(1, 3, 6, 6)
        one = lambda level, loss: m.train.prediction_loss(
            m.schedule.v_from_x_eps(x[:1], eps[:1], level) + off, m.schedule.diffuse(x[:1], eps[:1], level), x[:1],
            eps[:1], level, loss)
        losses["shown"] = [one(level, loss) for loss in ("eps_mse", "v_mse") for level in LEVELS[:, None]]
        perfect = m.schedule.v_from_x_eps(x, eps, logsnr)
        return dict(**losses, perfect=m.train.prediction_loss(perfect, z, x, eps, logsnr, "v_mse"),
                    learns=[learns(lambda v: m.train.prediction_loss(v, z, x, eps, logsnr, *more), v)
                            for more in (("eps_mse",), ("v_mse",), ("v_mse", 3))],
                    default=m.train.prediction_loss(v, z, x, eps, logsnr), level=logsnr)

    def spec(m, r):
        x, eps, logsnr = inputs_2(r)
        v, (alpha, sigma) = r.normal(4, 3, 6, 6).double(), alpha_and_sigma(logsnr)
        z = alpha * x + sigma * eps
        ends = [(v[:1] - a * eps[:1] + b * x[:1], a) for a, b in map(alpha_and_sigma, ENDS[:2])]
        ends = dict(eps_mse=[((a * error) ** 2).mean().float() for error, a in ends],
                    v_mse=[(error ** 2).mean().float() for error, _ in ends])
        errors = dict(eps_mse=sigma * z + alpha * v - eps, v_mse=v - (alpha * eps - sigma * x))
        out = {}
        for loss, error in errors.items():
            out[loss] = [(error[i] ** 2).mean().float() for i in range(4)]
            out[loss + "_all"], out[loss + "_ends"] = (error ** 2).mean().float(), ends[loss]
            halves = torch.stack([error[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(0)
            out[loss + "_multiscale"] = ((error ** 2).mean() / 6 + (halves ** 2).mean() / 3).float()
        off = (0.1 * r.normal(1, 3, 6, 6)).double().square().mean()
        out["shown"] = [off.float() * weight for weight in (*torch.sigmoid(LEVELS), *torch.ones(len(LEVELS)))]
        return dict(**out, perfect=torch.tensor(0.0), default=out["eps_mse_all"], level=logsnr, learns=[1.0] * 3)

    def laws(seen):
        snr = torch.exp(seen["level"])
        ratio = torch.stack(seen["eps_mse"]) / torch.stack(seen["v_mse"]) / (snr / (1 + snr))
        yield abs(float(seen["perfect"])) < 1e-6, "the true v must have loss 0"
        yield all(map(float, seen["learns"])), NO_GRADIENT
        yield float((ratio - 1).abs().max()) < 1e-2, "the loss on eps must be SNR / (1 + SNR) times the loss on v"

    def picture(seen, axis):
        losses = torch.stack(seen["shown"]).reshape(2, -1)
        curves(axis, LEVELS, dict(zip(("eps_mse", "v_mse"), losses)), "log-SNR", "loss of the same error of v")
        axis.set_yscale("log")


@exam("2.6")
class Multiscale:
    taught = True

    def see(m, r):
        error = r.normal(2, 3, 16, 16)
        f = m.train.multiscale_mse
        return dict(bases=[f(error, base) for base in (2, 4, 8, 16)], odd=f(r.normal(2, 3, 12, 12), 3),
                    flat=f(torch.ones(1, 3, 16, 16), 2), wide=f(r.normal(1, 1, 12, 20), 4),
                    ends=f(r.normal(1, 1, 12, 12), 1),
                    oblong=[f(r.normal(1, 1, 48, 80), 16), f(r.normal(1, 1, 9, 5), 5)],
                    refused=[refused(f, error, base) for base in (0, 17, -1)], learns=learns(lambda e: f(e, 4), error))

    def spec(m, r):
        def slow(error, base):
            height, width = error.shape[-2:]
            d, k, total = math.sqrt(height * width), 1, 0.0
            while math.log2(d / k / base) > -0.5:
                rows, columns = (-(-side // k) for side in (height, width))
                part = lambda i, n, side: slice(i * side // n, -(-(i + 1) * side // n))
                blocks = torch.stack([error.double()[:, :, part(i, rows, height), part(j, columns, width)].mean((2, 3))
                                      for i in range(rows) for j in range(columns)])
                total, k = total + (blocks ** 2).mean() * k / d, 2 * k
            return total.float()
        error = r.normal(2, 3, 16, 16)
        return dict(bases=[slow(error, base) for base in (2, 4, 8, 16)], odd=slow(r.normal(2, 3, 12, 12), 3),
                    flat=slow(torch.ones(1, 3, 16, 16), 2), wide=slow(r.normal(1, 1, 12, 20), 4),
                    ends=slow(r.normal(1, 1, 12, 12), 1),
                    oblong=[slow(r.normal(1, 1, 48, 80), 16), slow(r.normal(1, 1, 9, 5), 5)],
                    refused=[1.0] * 3, learns=1.0)

    def laws(seen):
        yield abs(float(seen["flat"]) - 15 / 16) < 1e-4, (
            f"an error of 1 everywhere, 16 px, base 2: {float(seen['flat']):.4g}, want 1/16 + 1/8 + 1/4 + 1/2 = 0.9375")
        yield bool(seen["learns"]), NO_GRADIENT
        yield all(map(float, seen["refused"])), "bases 0, -1 and 17 at 16 px must raise ValueError"
        yield float(seen["bases"][3]) < float(seen["bases"][0]), "with base = d only the full resolution counts"

    def picture(seen, axis):
        axis.bar([str(base) for base in (2, 4, 8, 16)], [float(value) for value in seen["bases"]])
        axis.set(xlabel="base, of white noise at 16 px", ylabel="loss")
