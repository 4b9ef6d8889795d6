"""Exams of chapter 1, noise schedules: schedule.py. exams.py explains how an exam works."""
import math

import torch

from course.exams import curves, exam, TIMES


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
        yield bool((curve.diff() < 0).all()), "log-SNR must fall as t grows: t = 0 is the clean image"
        yield abs(float(curve[0]) - 15) < 1e-2 and abs(float(curve[-1]) + 15) < 1e-2, (
            f"the end points are {float(curve[0]):.3g} and {float(curve[-1]):.3g}, want 15 and -15")
        yield abs(float(seen["number"])) < 1e-3, "at t = 1/2 signal and noise are equal: log-SNR must be 0"

    def picture(seen, axis):
        curves(axis, TIMES, {"": seen["curve"]}, "t", "log-SNR")


@exam("1.2", tolerance=1e-6)
class AlphaSigma:
    def see(m, r):
        logsnr = r.uniform(3, 4, low=-14, high=14)
        curve = torch.linspace(-10, 10, 101)
        return dict(random=m.schedule.alpha_sigma(logsnr), clean=m.schedule.alpha_sigma(torch.tensor([20.0, 30.0])),
                    ends=m.schedule.alpha_sigma(torch.tensor([-15.0, 15.0, math.inf])),
                    curve=m.schedule.alpha_sigma(curve))

    def spec(m, r):
        def slow(logsnr):
            e = torch.exp(-logsnr.double())                               # sigma^2 / alpha^2
            return [(1 / (1 + e)).sqrt().float(), (e / (1 + e)).sqrt().float()]
        return dict(random=slow(r.uniform(3, 4, low=-14, high=14)), clean=slow(torch.tensor([20.0, 30.0])),
                    ends=slow(torch.tensor([-15.0, 15.0, math.inf])),
                    curve=slow(torch.linspace(-10, 10, 101)))

    def laws(seen):
        alpha, sigma = (part.double() for part in seen["random"])
        yield bool(((alpha ** 2 + sigma ** 2 - 1).abs() < 1e-5).all()), "alpha^2 + sigma^2 must be 1"
        yield bool((seen["clean"][1] > 0).all()), (
            "sigma is 0 at log-SNR 30: 1 - alpha^2 rounds to 0, sigmoid(-l) does not")
        yield [float(part[2]) for part in seen["ends"]] == [1, 0], "at log-SNR +inf alpha must be 1 and sigma 0"

    def picture(seen, axis):
        curves(axis, torch.linspace(-10, 10, 101), dict(zip(("alpha", "sigma"), seen["curve"])), "log-SNR", "")


@exam("1.3")
class Shift:
    def see(m, r):
        image_d, noise_d = 2 ** r.integer(7, 10), 2 ** r.integer(4, 7)
        t = r.uniform(7, low=0.05, high=0.95)
        shifted = m.schedule.logsnr_shifted
        return dict(random=shifted(t, image_d, noise_d, -12.0, 9.0), same=shifted(TIMES, 64, 64),
                    smaller=shifted(TIMES, 32, 64),
                    shift_128=shifted(TIMES, 128, 64), shift_512=shifted(TIMES, 512, 64))

    def spec(m, r):
        image_d, noise_d = 2 ** r.integer(7, 10), 2 ** r.integer(4, 7)
        t = r.uniform(7, low=0.05, high=0.95)

        def slow(t, image_d, noise_d, *ends):                             # shift the SNR by the ratio of the areas
            snr = torch.exp(m.schedule.logsnr_cosine(t, *ends).double())
            return torch.log(snr * noise_d ** 2 / image_d ** 2).float()
        return dict(random=slow(t, image_d, noise_d, -12.0, 9.0), same=slow(TIMES, 64, 64),
                    smaller=slow(TIMES, 32, 64),
                    shift_128=slow(TIMES, 128, 64), shift_512=slow(TIMES, 512, 64))

    def laws(seen):
        moved = (seen["shift_128"] - seen["same"])[1:-1]
        yield float(moved.std()) < 1e-3, "the shift must be the same number at every t"
        yield abs(float(moved.mean()) + 1.386) < 1e-2, (
            f"128 px at noise_d 64: the curve moves by {float(moved.mean()):.3f}, want -1.386")
        ends = float(seen["shift_512"][0]), float(seen["shift_512"][-1])
        yield abs(ends[0] - 10.84) < 0.02 and abs(ends[1] + 19.16) < 0.02, (
            f"512 px at noise_d 64: the end points are {ends[0]:.2f}, {ends[1]:.2f}; they move as well: 10.84, -19.16")

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
        yield abs(float(seen["curve"][-1] - seen["low"][-1])) < 1e-2, (
            "at t = 1 the schedule must be the shift of noise_d_low")
        yield abs(float(seen["curve"][0] - seen["high"][0])) < 1e-2, (
            "at t = 0 the schedule must be the shift of noise_d_high")
        yield bool((seen["curve"].diff() < 0).all()), "log-SNR must fall as t grows"

    def picture(seen, axis):
        curves(axis, TIMES, {"shift 32": seen["low"], "shift 256": seen["high"], "interpolated": seen["curve"]}, "t",
               "log-SNR, 512 px")
