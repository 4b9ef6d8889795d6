"""Exams of chapter 8, cascade and distillation: cascade.py and distill.py. exams.py explains how an exam works."""
import functools
import math

import torch
import torch.nn.functional as F

from course.chapter6 import inputs_6, slow_ddim
from course.exams import alpha_and_sigma, exam, image, letter, refused, row_of


def slow_blur(x, sigma):
    """Blur x (C, h, w): add nine shifted copies, weighted by e^(-distance^2 / 2 sigma^2). Repeat the border outside."""
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
        """Draw eight examples. At shares of a half, every combination of noise and blur occurs twice."""
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
        yield float((same - x).abs().max()) < 1e-6, "aug_noise = 0, aug_blur = 0: the image must not change"
        yield bool((none == math.inf).all()), "without noise the log-SNR must be +inf"
        reported = seen["noise_alone"][1]
        yield float((reported - level).abs().max()) < 1e-3, "each example must get the log-SNR of its own s"
        alpha, sigma = alpha_and_sigma(reported)
        yield float((seen["noise_alone"][0] - alpha * x - sigma * noise).abs().max()) < 1e-3, (
            "image and log-SNR do not agree: the image must be alpha low_res + sigma noise at that log-SNR")
        noisy = (seen["both"][1] < math.inf).tolist()
        yield noisy == (draws[0] < 0.5).tolist(), "noise must go to the examples with draws[0] < aug_noise only"
        alpha, sigma = alpha_and_sigma(level)
        yield float((seen["flat"][0] - alpha * 0.4 - sigma * noise).abs().max()) < 1e-3, (
            "a flat image with blur and noise: the noise must stay sharp, so blur first")

    def picture(seen, axis):
        image(axis, row_of(seen["shown"][0].clamp(-1.5, 1.5)))
        reported = ", ".join("none" if level == math.inf else f"{level:.1f}" for level in seen["shown"][1].tolist())
        axis.set_xlabel(f"unchanged, blurred, noisy, both; log-SNR: {reported}")


@exam("8.2")
class HandOver:
    times = [0.0, 0.2, 0.4, 0.6]
    wrong_words = "raw", "Clean", "", "noise", "cleaned", "re"

    def seen_of(hand_over, m, r):
        def low_schedule(t):
            return m.schedule.logsnr_shifted(t, 16, 32)
        x, noise, s = r.normal(3, 3, 4, 4), r.normal(3, 3, 4, 4), float(r.uniform(1, low=0.2, high=0.8))
        words = "truncated", "renoised", "clean"
        seen = {name: hand_over(x, name, s, low_schedule, noise) for name in words}
        zero = {f"{name}_0": hand_over(x, name, 0.0, low_schedule, noise) for name in words}
        big = r.normal(1, 3, 32, 32)
        shown = [hand_over(letter(32), "renoised", s, low_schedule, big) for s in HandOver.times]
        return dict(**seen, **zero, shown=[z for z, _ in shown], reported=[level for _, level in shown],
                    given=[x, noise, low_schedule(torch.tensor(s))])

    def see(m, r):
        x = torch.zeros(1, 3, 4, 4)
        return dict(HandOver.seen_of(m.cascade.hand_over, m, r),
                    refused=[refused(m.cascade.hand_over, x, word, s, m.schedule.logsnr_cosine, x)
                             for word in HandOver.wrong_words for s in (0.0, 0.5)])

    def spec(m, r):
        def slow(x, handoff, s, low_schedule, noise):
            if handoff == "clean" or s == 0:
                return x, torch.tensor([math.inf] * len(x))
            levels = [float(low_schedule(torch.tensor(s)))] * len(x)
            if handoff == "truncated":
                return x, torch.tensor(levels)
            alpha, sigma = (float(part) for part in alpha_and_sigma(levels[0]))
            return torch.stack([alpha * one + sigma * more for one, more in zip(x, noise)]), torch.tensor(levels)
        return dict(HandOver.seen_of(slow, m, r), refused=[torch.tensor(1.0)] * 12)

    def laws(seen):
        yield all(float(flag) for flag in seen["refused"]), (
            "any other word than truncated, renoised, clean must raise ValueError, also if s = 0")
        x, noise, level = seen["given"]
        yield torch.equal(seen["truncated"][0], x), "truncated: low_res already is z_s; add nothing"
        alpha, sigma = alpha_and_sigma(level)
        yield float((seen["renoised"][0] - alpha * x - sigma * noise).abs().max()) < 1e-3, (
            "renoised: the image must be alpha_s low_res + sigma_s noise, at the level of s")
        for name in ("clean", "truncated_0", "renoised_0"):
            z, reported = seen[name]
            yield bool((reported == math.inf).all()) and float((z - x).abs().max()) < 1e-6, (
                f"{name.replace('_0', ' with s = 0')}: want the image unchanged and the level +inf")

    def picture(seen, axis):
        image(axis, row_of([z[0].clamp(-1.5, 1.5) for z in seen["shown"]]))
        levels = [float(level) for level in seen["reported"]]
        text = ", ".join("none" if level == math.inf else f"{level:.1f}" for level in levels)
        axis.set_xlabel(f"renoised, s = 0, 0.2, 0.4, 0.6; log-SNR: {text}")


def slow_target(z_t, z_s, logsnr_t, logsnr_s):
    """Return the x that leads to z_s, in float64: a DDIM step is linear in x, so x = 0 and x = 1 determine it."""
    zero, one = (slow_ddim(z_t, torch.full_like(z_t, x), logsnr_t, logsnr_s) for x in (0.0, 1.0))
    return (z_s.double() - zero) / (one - zero)


@exam("8.3", tolerance=1e-3)
class StepTarget:
    far = torch.tensor([-15.0, -15.0, 2.0, -8.0]), torch.tensor([-2.0, 15.0, 15.0, 15.0])

    def seen_of(target, r):
        z_t, z_s, t, s = inputs_6(r)
        s = s + 1
        x, ends = r.normal(4, 3, 5, 5), torch.full((4,), math.inf)
        x_hats = [F.avg_pool2d(letter(48), 12).repeat_interleave(12, 2).repeat_interleave(12, 3), letter(48)]
        z, levels = [r.normal(1, 3, 48, 48)], [torch.tensor([level]) for level in (-6.0, 0.5, 3.0)]
        for x_hat, here, there in zip(x_hats, levels, levels[1:]):
            z.append(slow_ddim(z[-1], x_hat, here, there).float())
        return dict(random=target(z_t, z_s, t, s), known=target(z_t, slow_ddim(z_t, x, t, s).float(), t, s),
                    clean=target(z_t, z_s, t, ends), far=target(z_t, z_s, *StepTarget.far),
                    given=[z_t, z_s, t, s, x], x_hats=x_hats,
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
        yield float((seen["clean"] - z_s).abs().max()) < 1e-3, "where sigma_s = 0 the target must be z_s"
        yield float((seen["known"] - x).abs().max()) < 1e-2, (
            "where one DDIM step with an x made z_s, the target must be that x")
        landed = slow_ddim(z_t, seen["random"], t, s)
        yield float((landed - z_s).abs().max()) < 1e-2, "one DDIM step with this x must land on z_s"

    def picture(seen, axis):
        image(axis, row_of([part[0].clamp(-1.2, 1.2) for part in (*seen["x_hats"], seen["shown"])]))
        axis.set_xlabel("x_hat of the first step, of the second,\nand the x whose single step lands at the same place")


@exam("8.4", tolerance=1e-3)
class TwoStepTarget:
    def x_of(z, logsnr):
        """Return the teacher's x_hat: outside [-1, 1] in places, and different at each time."""
        return 1.5 * (1.5 * z.double()).sin() + 0.1 * logsnr.double().reshape(-1, 1, 1, 1)

    def teacher(walk):
        """Return a teacher that records its inputs in `walk`."""
        def predict(z, logsnr):
            walk.append([*z, *logsnr])
            return [((alpha * level - TwoStepTarget.x_of(level, l)) / sigma).float()
                    for level, l, (alpha, sigma) in zip(z, logsnr, map(alpha_and_sigma, logsnr))]
        return predict

    def faithful(z, logsnr):
        """A teacher with the same x_hat at every time: 0.3 everywhere."""
        return [((alpha * level - 0.3) / sigma).float()
                for level, (alpha, sigma) in zip(z, map(alpha_and_sigma, logsnr))]

    def schedules(m):
        def guarded(down):
            def schedule(t):                                              # before t = 0 there is no process
                return torch.where(t < 0, torch.nan, m.schedule.logsnr_cosine(t, -8.0, 6.0) - down)
            return schedule
        return [guarded(2 * math.log(2)), guarded(0.0)]

    def seen_of(target, m, r):
        """Call target(predict, schedules, z, t, steps)."""
        schedules, steps = TwoStepTarget.schedules(m), 4
        t = torch.tensor([0.25 - 2e-8, 0.5, 0.75, 1.0])                   # the first is 1/4 with a rounding error
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
        """Take two steps of slow_ddim, then slow_target, in float64."""
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
            "by rounding, a schedule gets a time below 0: clamp the end of the last step")
        yield len(seen["walk"]) == 8, "call the teacher twice, each time with all levels"
        levels = [seen["levels"][i:i + 2] for i in (0, 2, 4)]
        for ask, asked, says in ((0, seen["walk"][2:4], "t"), (1, seen["walk"][6:], "t - 1/(2 steps)")):
            yield all(float((one - level).abs().max()) < 1e-3 for one, level in zip(asked, levels[ask])), (
                f"call number {ask + 1} of the teacher must be at {says}")
        for k, z in enumerate(seen["z"]):
            alpha, sigma = alpha_and_sigma(levels[0][k])
            yield float((alpha * z - sigma * seen["same_x"][k] - 0.3).abs().max()) < 1e-2, (
                "if the teacher has the same x_hat at both times, the target must be that x, as v at t")
            x, z_s = alpha * z - sigma * seen["random"][k], z
            for here, there in zip(levels, levels[1:]):
                z_s = slow_ddim(z_s, TwoStepTarget.x_of(z_s, here[k]), here[k], there[k])
            yield float((slow_ddim(z, x, levels[0][k], levels[2][k]) - z_s).abs().max()) < 1e-2, (
                "one step of the student must land where the teacher's two steps do: return v at t of that x")

    def picture(seen, axis):
        """Draw z / alpha against sigma / alpha, where a DDIM step is a straight line."""
        (z, here, middle, there), v, end = seen["path"], seen["shown"], seen["end"]
        alpha, sigma = alpha_and_sigma(here)
        landed = slow_ddim(z, alpha * z - sigma * v, here, end)
        points = [(level / a, s / a) for level, (a, s) in ((z, (alpha, sigma)), (middle, alpha_and_sigma(there)),
                                                           (landed, alpha_and_sigma(end)))]
        for pixel in range(6):
            x, y = [float(s) for _, s in points], [float(level[0, 0, 0, pixel]) for level, _ in points]
            axis.plot(x, y, "o-", color="C0", ms=3, lw=1, label="teacher, two steps" if pixel == 0 else None)
            axis.plot(x[::2], y[::2], "--", color="C1", label="student, one step" if pixel == 0 else None)
        axis.set(xlabel="sigma / alpha: t = 1 is right, t = 0 is left", ylabel="z / alpha of six pixels")
        axis.legend(fontsize=8)
