"""Typical wrong answers: {exercise: [(old, new, its name), ...]}, small edits of our own functions.

Two uses. When a student's numbers are wrong, they are compared with those of each mistake, and the name of the one that
fits is the grader's message. And `python exercises.py check` makes sure that each loses its points.
Not for students: what is edited is the right answer. `old` must stand in the function exactly once.
"""
MUTANTS = {
    "1.1": [("math.exp(-0.5 * logsnr_max)", "math.exp(-logsnr_max)", "the angle of e^-logsnr: the half is missing, for "
             "log-SNR is of squares"),
            ("-2.0 * torch.log", "-torch.log", "log(alpha / sigma): log-SNR is of the squares, twice that"),
            ("t * (t_max - t_min)", "t * t_max", "t_min + t t_max: at t = 1 the angle is too large"),
            ("-2.0 * torch.log", "2.0 * torch.log", "the sign: log-SNR falls from t = 0 to t = 1"),
            ("t_min + t * (t_max - t_min)", "0.5 * math.pi * t.clamp(1e-4, 1 - 1e-4)", "the plain cosine: the end points are "
             "not used")],
    "1.2": [("torch.sqrt(torch.sigmoid(-logsnr))", "torch.sqrt(1 - torch.sigmoid(logsnr))", "1 - alpha^2: rounds to zero at "
             "high log-SNR"),
            ("torch.sqrt(torch.sigmoid(logsnr)), torch.sqrt(torch.sigmoid(-logsnr))",
             "torch.sigmoid(logsnr), torch.sigmoid(-logsnr)", "these are the squares: the root is missing"),
            ("torch.sqrt(torch.sigmoid(logsnr)), torch.sqrt(torch.sigmoid(-logsnr))",
             "torch.sqrt(torch.sigmoid(-logsnr)), torch.sqrt(torch.sigmoid(logsnr))", "alpha and sigma are exchanged"),
            ("torch.sqrt(torch.sigmoid(logsnr)), torch.sqrt(torch.sigmoid(-logsnr))",
             "torch.sqrt(torch.sigmoid(2 * logsnr)), torch.sqrt(torch.sigmoid(-2 * logsnr))",
             "log-SNR is already the log of the squares")],
    "1.3": [("2.0 * math.log(noise_d / image_d)", "math.log(noise_d / image_d)", "shift moved by log instead of 2 log: "
             "averages are over areas, not over lengths"),
            ("noise_d / image_d", "image_d / noise_d", "the shift's sign: a larger image gets MORE noise"),
            ("logsnr_cosine(t, logsnr_min, logsnr_max) + 2.0 * math.log(noise_d / image_d)",
             "(logsnr_cosine(t, logsnr_min, logsnr_max) + 2.0 * math.log(noise_d / image_d)).clamp(logsnr_min, logsnr_max)",
             "clipped to the old end points: they move, too"),
            ("2.0 * math.log(noise_d / image_d)", "2.0 * math.log2(noise_d / image_d)", "log2 instead of the natural log")],
    "1.4": [("t * low + (1.0 - t) * high", "t * high + (1.0 - t) * low", "the weights of eq. 6 as printed: at t = 1 the low "
             "one must hold (appendix A)"),
            ("t * low + (1.0 - t) * high", "0.5 * (low + high)", "the mean of both at every t: nothing goes from one to the "
             "other"),
            ("image_d, noise_d_high, logsnr_min", "noise_d_high, image_d, logsnr_min", "image_d and noise_d are exchanged in "
             "the high one"),
            ("image_d, noise_d_low, logsnr_min, logsnr_max", "image_d, noise_d_low", "logsnr_min and logsnr_max are not "
             "handed on")],
    "2.1": [("sigma * eps", "sigma ** 2 * eps", "sigma^2 is the variance; the noise is multiplied by its root"),
            ("alpha * x + sigma * eps", "x + sigma * eps", "alpha is missing: variance exploding, not preserving"),
            ("alpha * x + sigma * eps", "sigma * x + alpha * eps", "alpha and sigma are exchanged"),
            ("alpha_sigma_for(x, logsnr)", "alpha_sigma_for(x, torch.as_tensor(logsnr).float().mean())",
             "one level for the whole batch: each example has its own")],
    "2.2": [("alpha * eps - sigma * x", "sigma * x - alpha * eps", "the sign of v: alpha eps - sigma x"),
            ("alpha * eps - sigma * x", "alpha * eps + sigma * x", "a plus: then v is no rotation, and x does not come back"),
            ("alpha * eps - sigma * x", "alpha * x - sigma * eps", "x and eps are exchanged"),
            ("alpha * eps - sigma * x", "eps - x", "eps - x is flow matching's velocity, not this one")],
    "2.3": [("sigma * z + alpha * v", "alpha * z + sigma * v", "alpha and sigma are exchanged"),
            ("sigma * z + alpha * v", "sigma * z - alpha * v", "the sign of v"),
            ("sigma * z + alpha * v", "alpha * z - sigma * v", "that is x"),
            ("sigma * z + alpha * v", "(z - alpha * v) / sigma", "v taken for x")],
    "2.4": [("(z - sigma * eps) / alpha", "(z - sigma * eps)", "not divided by alpha"),
            ("(z - sigma * eps) / alpha", "(z - eps) / alpha", "the noise comes in with sigma"),
            ("(z - sigma * eps) / alpha", "(z - alpha * eps) / sigma", "alpha and sigma are exchanged"),
            ("(z - sigma * eps) / alpha", "alpha * z - sigma * eps", "that would be right for v, not for eps")],
    "2.5": [('loss == "v_mse"', 'loss != "v_mse"', "the two losses are exchanged"),
            ("error.square().mean()", "error.abs().mean()", "the absolute error, not the squared"),
            ("error.square().mean()", "error.square().sum()", "a sum over the batch: losses here are means"),
            ("eps_from_v(z, v, logsnr) - eps", "v - eps", "v compared with eps: first turn it into one"),
            ("multiscale_mse(error, multiscale) if multiscale else error.square().mean()", "error.square().mean()",
             "multiscale is not heard")],
    "2.6": [("* k / d", "* (k / d) ** 2", "weighted 1/s^2: the mean over pixels has that already, the paper's weight is 1/s"),
            ("* k / d", "", "not weighted by 1/s"),
            ("F.avg_pool2d(error, k).square()", "F.avg_pool2d(error.square(), k)", "squared before averaging: then averaging "
             "changes nothing"),
            ("d / k >= base", "d / k > base", "the last scale, s = base, is left out"),
            ("0 < base <= d", "base <= d", "base 0 is not refused")],
    "3.1": [("0.5 * (even + after)", "even", "this is Haar: the right neighbour is missing"),
            ("torch.cat([even[..., 1:], even[..., -1:]], -1)", "torch.cat([even[..., 1:], even[..., :1]], -1)",
             "periodic at the end; the signal is mirrored"),
            ("0.25 * (before + high)", "0.5 * (before + high)", "a half instead of a quarter: the low band is no average"),
            ("torch.cat([high[..., :1], high[..., :-1]], -1)", "torch.cat([0 * high[..., :1], high[..., :-1]], -1)",
             "zero before the start; the signal is mirrored"),
            ("return low, high", "return high, low", "low and high are exchanged"),
            ("return low, high", "return low * 2 ** 0.5, high / 2 ** 0.5", "orthonormal scaling: here the low band has gain 1")],
    "3.2": [("low - 0.25 * (before + high)", "low + 0.25 * (before + high)", "the update is done again, not undone"),
            ("high + 0.5 * (even + after)", "high + 0.5 * (low + torch.cat([low[..., 1:], low[..., -1:]], -1))",
             "predicted from the low band: undo the update first"),
            ("torch.stack([even, odd], -1).flatten(-2)", "torch.cat([even, odd], -1)", "not interleaved: even samples, then odd "
             "ones"),
            ("[even, odd]", "[odd, even]", "odd samples in the even places"),
            ("torch.cat([even[..., 1:], even[..., -1:]], -1)", "torch.cat([even[..., 1:], even[..., :1]], -1)",
             "periodic at the end; the signal is mirrored")],
    "3.3": [("torch.cat([x] + details, 1)", "torch.cat(details + [x], 1)", "the low band comes first"),
            ("details.insert(0,", "details.append(", "details from the finest to the coarsest: the other way round"),
            ("torch.cat([lh, hl, hh], 1)", "torch.cat([hl, lh, hh], 1)", "LH and HL are exchanged"),
            ("F.pixel_unshuffle(torch.cat([lh, hl, hh], 1), 2 ** (levels - 1 - level))",
             "F.avg_pool2d(torch.cat([lh, hl, hh], 1), 2 ** (levels - 1 - level)).repeat(1, 4 ** (levels - 1 - level), 1, 1)",
             "finer bands averaged down: information is lost; space-to-depth moves it"),
            ("x.shape[-2] % factor or x.shape[-1] % factor", "x.shape[-2] % factor", "the width is not checked")],
    "3.4": [("torch.autograd.grad(dwt(x, levels), x, y)[0]", "idwt(y, levels)", "that is the inverse; the transform is not "
             "orthogonal"),
            ("torch.autograd.grad(dwt(x, levels), x, y)[0]", "dwt(idwt(y, levels), levels)[:, :x.shape[1]].repeat_interleave("
             "2 ** levels, 2).repeat_interleave(2 ** levels, 3)", "the low band, enlarged"),
            ("dwt(x, levels), x, y)[0]", "dwt(x, levels), x, y)[0] / factor ** 2", "divided by the number of bands: the adjoint "
             "has no factor")],
    "6.1": [("eps_from_x(z_t, x_hat, logsnr_t)", "torch.randn_like(z_t)", "fresh noise: DDIM keeps the eps that x_hat "
             "implies"),
            ("logsnr_t), logsnr_s)", "logsnr_t), logsnr_t)", "one level for both, and nothing moves: eps is read off "
             "at t, then mixed with x_hat at s"),
            ("x_hat, logsnr_t), logsnr_s)", "x_hat, logsnr_s), logsnr_t)", "t and s are exchanged: z_t is at level t"),
            ("eps_from_x(z_t, x_hat, logsnr_t)", "z_t", "z_t taken for the noise: x_hat's share must be taken out "
             "first")],
    "6.2": [("torch.exp(0.5 * log_variance)",
             "torch.sqrt(c * (noise_param * sigma_t ** 2 + (1 - noise_param) * sigma_s ** 2))",
             "interpolated linearly: nu mixes the LOG variances"),
            ("torch.exp(0.5 * log_variance)", "torch.exp(0.5 * (log_variance - torch.log(c) + c))",
             "appendix A as printed: the first term of each log variance must be log(1 - exp(..))"),
            ("torch.exp(0.5 * log_variance)",
             "torch.sqrt(c ** 2 * sigma_s ** 2 * sigma_t ** 2 / torch.exp(log_variance))", "the bounds are exchanged: "
             "nu = 0 is the lower one, c sigma_s^2"),
            ("torch.exp(0.5 * log_variance)", "torch.exp(log_variance)", "the noise is multiplied by the variance; it "
             "wants its root"),
            ("alpha_s / alpha_t) * z_t", "alpha_t / alpha_s) * z_t", "alpha_s and alpha_t are exchanged in the mean"),
            ("mean = r * (alpha_s / alpha_t) * z_t + c * alpha_s * x_hat", "mean = alpha_s * x_hat",
             "the mean of q(z_s | x_hat): given z_t, too, it is pulled towards z_t")],
    "6.3": [("v_cond + (w - 1) * (v_cond - v_null)", "v_null + w * (v_cond - v_null)", "v_null + w (v_cond - v_null) "
             "rounds: start from v_cond, so that w = 1 is off to the bit"),
            ("(w - 1)", "w", "w taken for eta: w = 1 + eta, so that w = 1 is off"),
            ("(v_cond - v_null)", "(v_null - v_cond)", "the sign: guidance leads away from v_null"),
            ("v_cond + (w - 1) * (v_cond - v_null)", "v_null + (w - 1) * (v_cond - v_null)", "counted from v_null: w = "
             "1 would be unconditional")],
    "6.4": [(".clamp(min=1)", "", "s below 1 is not raised to 1: images within the range are stretched"),
            ("x.abs().flatten(1), percentile, dim=1)", "x.abs().flatten(), percentile).expand(len(x))", "one s for the "
             "batch: each image has its own"),
            ("x.clamp(-s, s) / s", "x.clamp(-1, 1)", "static clipping: s is not used"),
            ("x.clamp(-s, s) / s", "x / s", "not clipped: what is beyond the percentile stays outside"),
            ("x.clamp(-s, s) / s", "x.clamp(-s, s)", "not divided by s"),
            ("x.abs().flatten(1)", "x.flatten(1)", "the percentile of x: dark pixels leave the range, too, so of |x|")],
    "7.1": [("F.avg_pool2d(levels[-1], height // h)", "levels[-1][..., ::height // h, ::width // w]",
             "every second pixel, not the average: the noise does not shrink"),
            ("F.avg_pool2d(", "F.max_pool2d(", "the largest of each window, not the average"),
            ("F.avg_pool2d(levels[-1], height // h)", "F.interpolate(levels[-1], (h, w), mode='bilinear')",
             "bilinear: by a factor of 4 it reads four pixels of sixteen"),
            ("tuple(x.shape[-2:]) != tuple(sizes[0])", "False", "the size of x itself is not checked"),
            (" or height // h != width // w", "", "two factors, one for each side, are not refused"),
            ("F.avg_pool2d(levels[-1]", "F.avg_pool2d(x", "from x by the factor between neighbours: it counts from the "
             "level above")],
    "7.2": [("lambda t, down=power * math.log(s / side[-1]): base(t) - down for s",
             "lambda t: base(t) - power * math.log(s / side[-1]) for s", "a lambda in a loop: all of them see the last "
             "s; bind it as a default argument"),
            ("base(t) - down", "base(t) + down", "the sign: a larger level has more noise"),
            ("side[-1]", "side[0]", "counted from the highest level: base is the schedule of the lowest"),
            ("math.sqrt(h * w)", "h * w", "areas for sides: twice the shift"),
            ("math.log(s", "math.log2(s", "log2 instead of the natural log"),
            ("down=power *", "down=2.0 *", "power is not heard")],
    "7.3": [("zip(x, eps, logsnr)", "zip(x, [F.adaptive_avg_pool2d(eps[0], e.shape[-2:]) for e in eps], logsnr)",
             "the lower levels' noise is the average of the highest one's: each level has its own"),
            ("schedule(t) for", "schedules[0](t) for", "one schedule for all levels: each has its own"),
            ("measure(v_r, *level) for", "measure(v_r, *level) * len(v_r) / len(t) for", "with rows, divided by the "
             "whole batch: the mean is over a level's own rows"),
            ("weights or [1.0]", "[1.0]", "the weights are not used"),
            ("weights or [1.0] * len(losses)", "(weights or [1.0] * len(losses))[::-1]", "weights from the lowest "
             "level on: lists are highest first"),
            ("return sum(", "return 1 / len(losses) * sum(", "the mean over the levels: eq. 3 is their sum")],
    "7.4": [("f = network.in_adapter(h)", "f = 0 * network.in_adapter(h)", "nothing comes down: in_adapter(h) is f of "
             "the level below"),
            ("h + network.out_adapter(g[:rows])", "network.out_adapter(g[:rows])", "what comes back replaces the "
             "coarsest map: it is added to it"),
            ("+ condition[:rows]", "", "the outer levels are not told the condition"),
            ("of_logsnr(logsnr[0], rows)", "of_logsnr(logsnr[-1][:rows], rows)", "the lowest level's log-SNR told to "
             "all: each level embeds its own"),
            ("0, len(z[1]) - rows))", "len(z[1]) - rows, 0))", "f given to the last rows: the FIRST rows have the "
             "higher level"),
            ("[outer.output(h)] + v", "v + [outer.output(h)]", "lowest first: lists go from the highest level down")],
    "8.1": [("gaussian_augment(low_res, logsnr, noise)",
             "gaussian_augment(low_res, logsnr, torch.where((blurred < aug_blur)[:, None, None, None], "
             "blur_augment(noise, sigma), noise))", "the noise is blurred, too: blur first, then noise"),
            ("low_schedule(s)", "low_schedule(s.mean())", "one level for the whole batch: each example has its own s"),
            ("low_schedule(s), torch.inf", "low_schedule(s), low_schedule(0 * s)", "no noise told as the level of t = "
             "0: none has a level of its own, +inf"),
            ("noise), logsnr", "noise), low_schedule(s)", "a level is told to examples that got no noise: there it is "
             "+inf"),
            ("(some < aug_noise", "(blurred < aug_noise", "one number decides on noise and blur: they are independent, "
             "draws[0] and draws[1]"),
            ("blurred < aug_blur", "blurred > aug_blur", "the share is turned round: blur where draws[1] < aug_blur")],
    "8.2": [('if handoff == "renoised"', 'if handoff != "clean"', "truncated is noised again: it is z_s already"),
            (" or s == 0", "", "s = 0 is noised and told as the level of t = 0: it is none, +inf"),
            ('handoff == "clean" or s == 0', "s == 0", "a level is told for clean, where there is no noise"),
            ('handoff == "clean" or', 'handoff != "renoised" or', "truncated is told to be clean: the noise is there, "
             "its level must be told"),
            ("float(low_schedule(torch.tensor(float(s))))", "float(s)", "the time s told for its log-SNR"),
            ("handoff not in HANDOFFS", "False", "a word that is no handoff is not refused")],
    "8.3": [("sigma_s / sigma_t", "sigma_t / sigma_s", "r upside down: sigma_s / sigma_t, 0 at the last step"),
            ("(alpha_s - r * alpha_t)", "alpha_s", "r alpha_t is missing below: z_t holds some of x as well"),
            (" / (alpha_s - r * alpha_t)", "", "not divided: that is x times (alpha_s - r alpha_t)"),
            ("(z_s - r * z_t) / (alpha_s - r * alpha_t)", "z_s / alpha_s", "z_s / alpha_s: right only where sigma_s = "
             "0; else its noise must be taken out"),
            ("sigma_s / sigma_t", "sigma_s", "r = sigma_s: the eps of z_t is (z_t - alpha_t x) / sigma_t")],
    "8.4": [("t - 0.5 / steps", "t - 1 / steps", "no middle: the teacher's steps are half as long as the student's"),
            (".clamp(min=0)", "", "not clamped: by rounding, the last step ends below t = 0"),
            ("x = [step_target(*level) for level in zip(z, z_s, levels[0], levels[2])]", "x = x_hat",
             "the teacher's second x_hat as the target: one step with it lands elsewhere"),
            ("levels[0], levels[2])", "levels[1], levels[2])", "solved from the middle: the student's step begins at "
             "t"),
            ("zip(z, x, levels[0])", "zip(z_s, x, levels[2])", "v at the end of the step: the student is asked at t, "
             "about z"),
            ("x_hat = [x_from_v(*level) for", "x_hat = [x_from_v(*level).clamp(-1, 1) for", "the teacher is clipped: "
             "then the student would learn the clipping")],
}
