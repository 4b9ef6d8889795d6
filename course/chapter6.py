"""Exams of chapter 6, sampling: sample.py. exams.py explains how an exam works."""
import math

import torch

from course.exams import alpha_and_sigma, exam, image, letter, row_of


def inputs_6(r):
    """Draw z_t, x_hat (4, 3, 5, 5) and logsnr_t, logsnr_s (4,), where logsnr_s is larger by 0.5 to 4."""
    logsnr_t = r.uniform(4, low=-6, high=4)
    return r.normal(4, 3, 5, 5), r.normal(4, 3, 5, 5), logsnr_t, logsnr_t + r.uniform(4, low=0.5, high=4)


def slow_ddim(z_t, x_hat, logsnr_t, logsnr_s):
    """Take a DDIM step in float64. Song et al.: z / alpha against sigma / alpha is a straight line of slope eps."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_and_sigma(logsnr_t), alpha_and_sigma(logsnr_s)
    slope = (z_t.double() / alpha_t - x_hat.double()) / (sigma_t / alpha_t)
    return alpha_s * (z_t.double() / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) * slope)


@exam("6.1")
class Ddim:
    levels = [-2.0, 0.0, 2.0, 6.0]
    ends = torch.tensor([-15.0, -15.0, 13.0, 2.0]), torch.tensor([-14.0, 15.0, 15.0, math.inf])

    def walk(step, r):
        """Step from log-SNR -6 to each of the levels, with the picture itself as x_hat."""
        start, goal = r.normal(4, 3, 32, 32), torch.tensor(Ddim.levels)
        alpha, sigma = alpha_and_sigma(-6.0)
        z = (alpha * letter().double() + sigma * start[:1]).float().expand(4, -1, -1, -1)
        return z[0], step(z, letter().expand(4, -1, -1, -1), torch.full((4,), -6.0), goal)

    def see(m, r):
        step, inputs = m.sample.ddim_step, inputs_6(r)
        z, x, t, s = inputs
        return dict(random=step(*inputs), scalar=step(z, x, t[0], s[0]), stay=step(z, x, t, t), given=inputs,
                    ends=step(z, x, *Ddim.ends), walk=Ddim.walk(step, r))

    def spec(m, r):
        def step(*inputs):
            return slow_ddim(*inputs).float()
        inputs = inputs_6(r)
        z, x, t, s = inputs
        return dict(random=step(*inputs), scalar=step(z, x, t[0], s[0]), stay=z, given=inputs,
                    ends=step(z, x, *Ddim.ends), walk=Ddim.walk(step, r))

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
                        "x_hat is the picture: the noise stays the same and its share falls")


def slow_posterior(z_t, x_hat, logsnr_t, logsnr_s):
    """Return mean, variance and sigma_ts^2 of q(z_s | z_t, x_hat), by Bayes and in float64.

    z_s has the law N(alpha_s x, sigma_s^2) and z_t given z_s has N(alpha_ts z_s, sigma_ts^2). The precisions add up.
    """
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
    far = torch.tensor([-15.0, -15.0, 13.0, -14.0]), torch.tensor([-14.0, 15.0, 15.0, 0.0])

    def seen_of(step, r):
        """Call step(z_t, x_hat, logsnr_t, logsnr_s, nu, noise)."""
        z, x, t, s = inputs_6(r)
        noise, nu = r.normal(4, 3, 5, 5), float(r.uniform(1))
        zero, one, (alpha, _) = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), alpha_and_sigma(t)
        return dict(mean=step(z, x, t, s, nu, torch.zeros_like(z)), random=step(z, x, t, s, nu, noise),
                    scalar=step(z, x, t[0], s[0], nu, noise), ends=step(z, x, *Ddpm.far, nu, noise),
                    on_the_way=step((alpha * x).float(), x, t, s, nu, 0 * noise),
                    deviation=[step(zero, zero, *Ddpm.ends, nu, one) for nu in Ddpm.share], given=[x, t, s])

    def see(m, r):
        seen, (zero, one) = Ddpm.seen_of(m.sample.ddpm_step, r), (torch.zeros(2, 2, 128, 128), torch.ones(1, 1, 1, 1))
        seen["default"] = m.sample.ddpm_step(0 * one, 0 * one, *Ddpm.ends, noise=one)
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
            "for z_t = alpha_t x_hat the mean must be alpha_s x_hat: check the weights of z_t and of x_hat")
        _, lower, upper = (float(part) for part in slow_posterior(zero, zero, *Ddpm.ends))
        variance = [float(one) ** 2 for one in seen["deviation"]]
        for name, got, want in (("nu = 0", variance[0], lower), ("nu = 1", variance[-1], upper),
                                ("nu = 1/2, in logs", variance[10], math.sqrt(lower * upper))):
            yield abs(got / want - 1) < 1e-2, (
                f"from log-SNR -1 to 1, {name}: the variance is {got:.4g}, want {want:.4g}")
        first, second = (draw.double().flatten() for draw in seen["drawn"])
        want = math.sqrt(upper ** 0.2 * lower ** 0.8)
        yield abs(float(first.std()) / want - 1) < 0.05 and abs(float(first.mean())) < 0.05 * want, (
            f"noise = None: draw it here; the result has standard deviation {float(first.std()):.3g}, want {want:.3g}")
        yield abs(float((first * second).mean())) < 0.1 * want ** 2, "noise = None: two calls must draw two noises"
        maps = torch.corrcoef(seen["drawn"][0].reshape(4, -1))
        yield bool((maps - torch.eye(4)).abs().max() < 0.1), (
            "noise = None: each image and each channel must have its own noise")

    def picture(seen, axis):
        variance = [float(one) ** 2 for one in seen["deviation"]]
        axis.semilogy(Ddpm.share, variance, label="variance of the step's noise")
        axis.axhline(variance[0], color="0.6", ls=":", label="c sigma_s$^2$")
        axis.axhline(variance[-1], color="0.6", ls="--", label="c sigma_t$^2$")
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
        yield float((seen["one"] - cond).abs().max()) < 1e-3, (
            "w = 1 must turn guidance off and return v_cond (w = 1 + eta)")
        yield torch.equal(seen["one"], cond), "w = 1 gives v_cond with a rounding error; it must be v_cond to the bit"
        yield float((seen["none"] - null).abs().max()) < 1e-3, "w = 0 must return v_null"
        past = ((seen["random"] - cond) * (cond - null)).sum()
        yield float(past) > 0, "w > 1 must go past v_cond, away from v_null"

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
        x[2] = -x[2].abs()                                                # negative: the percentile is of |x|, not of x
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
                place = percentile * (len(sizes) - 1)                     # between two values: interpolate linearly
                below, above = sizes[math.floor(place)], sizes[math.ceil(place)]
                s = max(1.0, below + (place - math.floor(place)) * (above - below))
                out += [max(-s, min(s, value)) / s for value in one.flatten().tolist()]
            return torch.tensor(out).reshape(x.shape)
        return Dynamic.seen_of(slow, r)

    def laws(seen):
        most = float(torch.cat([seen["random"], seen["default"]]).abs().max())
        yield most < 1 + 1e-4, (
            f"|x| reaches {most:.3g}; after clipping to [-s, s] and dividing by s it is at most 1")
        inside, _ = seen["given"]
        yield float((seen["inside"] - inside).abs().max()) < 1e-4, (
            "an image within [-1, 1] must not change: s is at least 1")
        yield float((torch.cat(seen["alone"]) - seen["random"]).abs().max()) < 1e-4, (
            "an image gives another result alone than in a batch: each image has its own s")

    def picture(seen, axis):
        x = 2.2 * letter(48) + 0.6                                        # like a prediction with strong guidance
        image(axis, row_of([x.clamp(-1, 1)[0], seen["shown"][0]]))
        axis.set_xlabel("a prediction far outside [-1, 1]: clipped, and thresholded")
