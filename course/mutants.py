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
    "4.1": [("(logsnr - self.logsnr_min) / (self.logsnr_max - self.logsnr_min)", "(logsnr + 15.0) / 30.0", "the ends of the "
             "unshifted schedule, -15 and 15: a shifted one leaves [0, 1]"),
            ("(logsnr - self.logsnr_min) / (self.logsnr_max - self.logsnr_min)",
             "(self.logsnr_max - logsnr) / (self.logsnr_max - self.logsnr_min)", "upside down: the lower end is 0"),
            ("(logsnr - self.logsnr_min) / (self.logsnr_max - self.logsnr_min)", "torch.sigmoid(logsnr)", "a sigmoid: B.2's "
             "input is 'linear'"),
            ("self.time(sinusoid(place, self.width))", "self.time(sinusoid(logsnr, self.width))", "log-SNR itself, not its "
             "place between the ends")],
    "4.2": [("* (1 + scale) + shift", "* scale + shift", "times scale, not times 1 + scale: a block that begins at nothing"),
            ("* (1 + scale) + shift", "* (1 + shift) + scale", "scale and shift are exchanged: scale comes first"),
            ("(h + self.norm_skip(skip)) / math.sqrt(2)", "(h + skip) / math.sqrt(2)", "the skip is not normalised"),
            ("(h + self.norm_skip(skip)) / math.sqrt(2)", "h + self.norm_skip(skip)", "not divided by sqrt(2): the sum of two "
             "unit variances is 2"),
            ("return x + h", "return h", "the residual is missing"),
            ("self.conv2(self.dropout(F.silu(h)))", "self.dropout(self.conv2(F.silu(h)))", "dropout after conv2: it stands "
             "before"),
            ("self.norm2(h) * (1 + scale) + shift", "self.norm2(h * (1 + scale) + shift)", "scale and shift before the norm, "
             "which takes them away again")],
    "4.3": [("resolution > 0 and ", "", "resolution 0 means never; its logarithm is none"),
            ("< 0.5", "< -0.5", "the resolution itself must be in: at or below"),
            ("< 0.5", "> 0.5", "the other way round: dropout acts on SMALL maps (table 3)"),
            ("math.sqrt(height * width)", "max(height, width)", "the longer side; maps count as the square of equal area")],
    "4.4": [("skips.pop()", "skips.pop(0)", "skips from the wrong end: what was put down last is picked up first"),
            ("h = self.upsample[level](h)", "h = F.interpolate(h, scale_factor=2)[:, :self.widths[-2 - level]]", "enlarged "
             "without self.upsample's convolution"),
            ("attention(block(h, emb, skips.pop()), text)", "block(attention(h, text), emb, skips.pop())", "attention before "
             "the block; it comes after"),
            ("attention(block(h, emb, skips.pop()), text)", "block(h, emb, skips.pop())", "attention is left out"),
            ("attention(block(h, emb, skips.pop()), text)", "h + attention(block(h, emb, skips.pop()), text)", "a residual "
             "too many: the block has its own")],
    "5.1": [("q, k = self.norm_q(q), self.norm_k(k)", "q, k = q, k", "q and k are not normalised"),
            ("self.norm_q(q), self.norm_k(k)", "self.norm_k(q), self.norm_q(k)", "the norms of q and k are exchanged"),
            (".view(B, N, 3, self.num_heads, C // self.num_heads)", ".view(B, N, self.num_heads, C // self.num_heads, 3)"
             ".permute(0, 1, 4, 2, 3)", "qkv is cut in another order: q of all heads first, then k, then v"),
            ("return x + self.out(", "return self.out(", "the residual is missing"),
            ("(q, k, v, mask)", "(q, k, v)", "the mask is not heard"),
            ("(q, k, v, mask)", "(q / (C // self.num_heads) ** 0.5, k, v, mask)", "divided by sqrt(d) twice: "
             "scaled_dot_product_attention does it"),
            ("h.transpose(1, 2).reshape(B, N, C)", "h.reshape(B, N, C)", "heads and tokens are mixed up: transpose before "
             "reshaping")],
    "5.2": [("F.silu(self.expand(h)) ", "self.expand(h) ", "the swish is missing"),
            ("h * (1 + scale) + shift", "h * scale + shift", "times scale, not times 1 + scale"),
            ("h * (1 + scale) + shift", "h * (1 + shift) + scale", "scale and shift are exchanged: scale comes first"),
            ("return x + self.out(h)", "return self.out(h)", "the residual is missing"),
            ("(h + self.norm_skip(skip)) / math.sqrt(2)", "(h + skip) / math.sqrt(2)", "the skip is not normalised"),
            ("return x + self.out(h)", "return x + self.dropout(self.out(h))", "dropout after the last layer: it stands "
             "before")],
    "5.3": [("x = h.flatten(2).transpose(1, 2) + self.position", "x = h.flatten(2).transpose(1, 2)", "the position embedding "
             "is left out"),
            ("h.flatten(2).transpose(1, 2) + self.position", "h.transpose(2, 3).flatten(2).transpose(1, 2) + self.position",
             "tokens column by column, back row by row"),
            ("skips.append(h)", "skips.append(downsample(h) if False else self.input(z) if h.shape[-1] == z.shape[-1] else h)",
             "the skip of the finest level is the input map, not the block's output"),
            ("h = upsample(h)\n            for block, attention in blocks:\n                h = block(h, emb, skips.pop())",
             "h = upsample(h)\n            for block, attention in blocks:\n                h = block(h, emb, skips.pop(0) if "
             "len(skips) == 2 else skips.pop())", "skips from the wrong end within a level"),
            ("block(x, emb, text)", "block(x, emb)", "the text is not handed on"),
            ("h if f is None else h + f", "h", "f, the map of an outer level, is not added")],
}
