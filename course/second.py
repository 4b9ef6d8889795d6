"""A second right solution of every exercise, written in another way than the lecture's. For lecturers only.

`python -m course check` puts these functions into the lecture's files. There they must get all points, and train: a
statement that allows an answer with which a program of the project breaks is wrong. This file is read and never
imported: each function uses the imports of the file that it is put into.
"""


def logsnr_cosine(t, logsnr_min=-15.0, logsnr_max=15.0):
    first, last = (math.atan2(1.0, math.exp(end / 2)) for end in (logsnr_max, logsnr_min))
    angle = torch.as_tensor(t) * (last - first) + first                   # alpha = cos(angle), sigma = sin(angle)
    return 2 * (angle.cos().log() - angle.sin().log())


def alpha_sigma(logsnr):
    logsnr = torch.as_tensor(logsnr)
    return torch.exp(-F.softplus(-logsnr) / 2), torch.exp(-F.softplus(logsnr) / 2)


def logsnr_shifted(t, image_d, noise_d, logsnr_min=-15.0, logsnr_max=15.0):
    times = image_d / noise_d
    return logsnr_cosine(t, logsnr_min, logsnr_max) - math.log(times * times)


def logsnr_interpolated(t, image_d, noise_d_low, noise_d_high, logsnr_min=-15.0, logsnr_max=15.0):
    low = logsnr_shifted(t, image_d, noise_d_low, logsnr_min, logsnr_max)
    return low + (1 - torch.as_tensor(t)) * 2 * math.log(noise_d_high / noise_d_low)


def diffuse(x, eps, logsnr):
    return sum(weight * part for weight, part in zip(alpha_sigma_for(x, logsnr), (x, eps)))


def v_from_x_eps(x, eps, logsnr):
    alpha, sigma = alpha_sigma_for(x, logsnr)
    angle = torch.atan2(sigma, alpha)
    return angle.cos() * eps - angle.sin() * x


def eps_from_v(z, v, logsnr):
    alpha, sigma = alpha_sigma_for(z, logsnr)
    angle = torch.atan2(sigma, alpha)
    return angle.sin() * z + angle.cos() * v


def x_from_eps(z, eps, logsnr):
    alpha, sigma = alpha_sigma_for(z, logsnr)
    return z / alpha - eps * (sigma / alpha)


def prediction_loss(v, z, x, eps, logsnr, loss="eps_mse", multiscale=0):
    error = v - v_from_x_eps(x, eps, logsnr)
    if loss == "eps_mse":                                                 # alpha times the error of v
        error = error * logsnr.sigmoid().sqrt().view(-1, 1, 1, 1)
    return multiscale_mse(error, multiscale) if multiscale > 0 else (error * error).mean()


def multiscale_mse(error, base):
    height, width = error.shape[2:]
    d, total = (height * width) ** 0.5, 0
    if base <= 0 or base > d:
        raise ValueError(f"base {base} of an image of side {d:.1f}")
    for i in range(max(0, math.ceil(math.log2(d / base) - 0.5)) + 1):
        small = F.interpolate(error, (-(-height // 2 ** i), -(-width // 2 ** i)), mode="area")
        total = total + 2 ** i / d * (small * small).mean()
    return total


def _split(x):
    left = x[..., 0::2]
    high = x[..., 1::2] - (left + torch.cat([x[..., 2::2], x[..., -2:-1]], -1)) / 2
    return left + (torch.cat([high[..., :1], high], -1)[..., :-1] + high) / 4, high


def _merge(low, high):
    x = low.new_empty(*low.shape[:-1], 2 * low.shape[-1])
    even = low - (torch.cat([high[..., :1], high], -1)[..., :-1] + high) / 4
    x[..., 0::2], x[..., 1::2] = even, high + (even + torch.cat([even, even[..., -1:]], -1)[..., 1:]) / 2
    return x


def dwt(x, levels):
    if any(side % 2 ** levels for side in x.shape[-2:]):
        raise ValueError(f"{levels} levels do not divide {tuple(x.shape[-2:])}")
    bands = []
    for _ in range(levels):
        x, *details = _analyse(x)
        bands = [torch.cat(details, 1), *bands]
    for i, band in enumerate(bands):
        f, (B, C, H, W) = 2 ** i, band.shape
        band = band.reshape(B, C, H // f, f, W // f, f).permute(0, 1, 3, 5, 2, 4)
        bands[i] = band.reshape(B, C * f * f, H // f, W // f)
    return torch.cat([x, *bands], 1)


def adjoint(y, levels):
    f, (B, C, H, W) = 2 ** levels, y.shape
    _, transposed = torch.func.vjp(lambda x: dwt(x, levels), y.new_zeros(B, C // f ** 2, H * f, W * f))
    return transposed(y)[0]


def coefficients(alpha, sigma, s, n):
    zz, vz = (alpha * s) ** 2 + (sigma * n) ** 2, alpha * sigma * (n - s) * (n + s)
    return vz / zz, ((alpha / n) ** 2 + (sigma / s) ** 2) ** -0.5


class Embedding:
    def of_logsnr(self, logsnr, batch_size):
        place = torch.as_tensor(logsnr, dtype=torch.float32, device=self.time[0].weight.device).reshape(-1)
        place = (place - self.logsnr_min) / (self.logsnr_max - self.logsnr_min)
        if len(place) < batch_size:
            place = place.repeat(batch_size)
        return self.time(sinusoid(place, self.sinusoid_channels))


class ResBlock:
    def forward(self, x, emb, skip=None):
        scale, shift = self.film(emb).unsqueeze(-1).unsqueeze(-1).split(x.shape[1], 1)
        h = self.norm1(x)
        if skip is not None:
            h = (h + self.norm_skip(skip)) * 0.5 ** 0.5
        h = self.norm2(self.conv1(h * h.sigmoid()))
        h = h + h * scale + shift
        return self.conv2(self.dropout(h * h.sigmoid())) + x


def at_or_below(height, width, resolution):
    return height * width < 2 * resolution ** 2


class UNet:
    def ascend(self, h, skips, emb, text=None):
        skips = list(skips)
        for level, blocks in enumerate(self.up):
            if level > 0:
                h = self.upsample[level - 1](h)
            for block, attention in blocks:
                *skips, skip = skips
                h = attention(block(h, emb, skip), text)
        return h


class Attention:
    def forward(self, x, mask=None):
        q, k, v = (part.reshape(*x.shape[:2], self.num_heads, -1) for part in self.qkv(self.norm(x)).chunk(3, -1))
        logits = torch.einsum("bind,bjnd->bnij", self.norm_q(q), self.norm_k(k)).float() / q.shape[-1] ** 0.5
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None, :], float("-inf"))
        h = torch.einsum("bnij,bjnd->bind", logits.softmax(-1).to(v.dtype), v)
        return x + self.out(h.flatten(2))


class MLPBlock:
    def forward(self, x, emb, skip=None):
        h = self.norm(x)
        if skip is not None:
            h = (h + self.norm_skip(skip)) * 0.5 ** 0.5
        h = self.expand(h)
        h = h * h.sigmoid()
        film = self.film(emb).unsqueeze(1)
        return self.out(self.dropout(h + h * film[..., :h.shape[-1]] + film[..., h.shape[-1]:])) + x


class UViT:
    def features(self, z, emb, text=None, f=None):
        if tuple(z.shape[2:]) != tuple(self.size):
            raise ValueError(f"an image of {tuple(z.shape[2:])}, want {self.size}")
        h, kept = self.input(z), []
        if f is not None:
            h = h + f
        for i, pairs in enumerate(self.down):
            for pair in pairs:
                h = pair[0](h, emb)
                kept.append(h)
            h = self.downsample[i](h)
        height, width = h.shape[2:]
        x = h.permute(0, 2, 3, 1).reshape(len(h), height * width, -1) + self.position
        for block in self.transformer:
            x = block(x, emb, text)
        h = x.reshape(len(x), height, width, -1).permute(0, 3, 1, 2)
        for i, pairs in enumerate(self.up):
            h = self.upsample[i](h)
            for pair in pairs:
                h = pair[0](h, emb, kept.pop())
        return h


def ddim_step(z_t, x_hat, logsnr_t, logsnr_s):
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (alpha_sigma_for(z_t, logsnr) for logsnr in (logsnr_t, logsnr_s))
    return alpha_s * x_hat + sigma_s / sigma_t * (z_t - alpha_t * x_hat)


def ddpm_step(z_t, x_hat, logsnr_t, logsnr_s, noise_param=0.2, noise=None):
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (alpha_sigma_for(z_t, logsnr) for logsnr in (logsnr_t, logsnr_s))
    c = -torch.expm1(torch.as_tensor(logsnr_t).reshape(-1, 1, 1, 1) - torch.as_tensor(logsnr_s).reshape(-1, 1, 1, 1))
    c = c.to(z_t)
    deviation = c.sqrt() * sigma_t ** noise_param * sigma_s ** (1 - noise_param)
    if noise is None:
        noise = torch.randn(z_t.shape, dtype=z_t.dtype, device=z_t.device)
    return (1 - c) * alpha_s / alpha_t * z_t + c * alpha_s * x_hat + deviation * noise


def guide(v_cond, v_null, w):
    return w * v_cond + (1 - w) * v_null


def clip_dynamic(x, percentile=0.995):
    sizes = x.abs().flatten(1).sort(1).values
    place = percentile * (sizes.shape[1] - 1)
    below = int(place)
    above = min(below + 1, sizes.shape[1] - 1)
    s = torch.lerp(sizes[:, below], sizes[:, above], place - below).clamp(min=1).reshape(-1, 1, 1, 1)
    return (x / s).clamp(-1, 1)


def pyramid(x, sizes):
    if list(x.shape[2:]) != list(sizes[0]):
        raise ValueError(f"an image of {tuple(x.shape[2:])}, want {sizes[0]}")
    levels = [x]
    for h, w in sizes[1:]:
        B, C, H, W = levels[-1].shape
        k = H // h
        if (h * k, w * k) != (H, W):
            raise ValueError(f"{h} x {w} does not divide {H} x {W}")
        levels.append(levels[-1].reshape(B, C, h, k, w, k).mean((3, 5)))
    return levels


def level_schedules(base, sizes, power=2.0):
    def below(down):
        return lambda t: base(t) - down
    lowest = sizes[-1][0] * sizes[-1][1]
    return [below(power / 2 * math.log(h * w / lowest)) for h, w in sizes]


def nested_loss(model, x, cond, t, eps, schedules, measure, weights=None, rows=None):
    if weights is None:
        weights = [1.0] * len(x)
    given = []
    for r, schedule in enumerate(schedules):
        n, logsnr = len(x[r]) if rows is None else rows[r], schedule(t)
        given.append([diffuse(x[r][:n], eps[r][:n], logsnr[:n]), x[r][:n], eps[r][:n], logsnr[:n]])
    said, total = model([level[0] for level in given], [level[3] for level in given], cond), 0.0
    for r in range(len(weights)):
        total = total + weights[r] * measure(said[r], *given[r])
    return total


def denoise(network, z, logsnr, condition, text=None, f=None):
    if not isinstance(network, NestedUNet):
        emb = condition + network.embed.of_logsnr(logsnr[0], len(condition))
        last = network.features(z[0], emb, text, f)
        return [network.output(last)], last
    if network.outer is None:
        return denoise(network.inner, z, logsnr, condition, text, f)
    n, outer = len(z[0]), network.outer
    emb = condition[:n] + outer.embed.of_logsnr(logsnr[0], n)
    h, skips = outer.descend(z[0], emb, f=f)
    down = network.in_adapter(h)
    down = torch.cat([down, down.new_zeros(len(z[1]) - n, *down.shape[1:])])
    v, last = denoise(network.inner, z[1:], logsnr[1:], condition, text, down)
    h = outer.ascend(h + network.out_adapter(last)[:n], skips, emb)
    return [outer.output(h), *v], h


def augment(low_res, s, noise, low_schedule, draws, aug_noise=1.0, aug_blur=0.0, blur_range=(0.4, 0.6)):
    (first, last), each = blur_range, (-1, 1, 1, 1)
    blurred = blur_augment(low_res, (1 - draws[2]) * first + draws[2] * last)
    image = torch.where((draws[1] < aug_blur).reshape(each), blurred, low_res)
    level = low_schedule(s).masked_fill(draws[0] >= aug_noise, float("inf"))
    noisy = gaussian_augment(image, low_schedule(s), noise)
    return torch.where((draws[0] < aug_noise).reshape(each), noisy, image), level


def hand_over(low_res, handoff, s, low_schedule, noise):
    if handoff not in ("truncated", "renoised", "clean"):
        raise ValueError(f"no such handoff: {handoff}")
    level = low_res.new_full((len(low_res),), float("inf"))
    if handoff != "clean" and s > 0:
        level = level.fill_(float(low_schedule(torch.tensor(float(s)))))
        if handoff == "renoised":
            low_res = gaussian_augment(low_res, level, noise)
    return low_res, level


def step_target(z_t, z_s, logsnr_t, logsnr_s):
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (alpha_sigma_for(z_t, logsnr) for logsnr in (logsnr_t, logsnr_s))
    return (sigma_t * z_s - sigma_s * z_t) / (alpha_s * sigma_t - alpha_t * sigma_s)


def two_step_target(predict, schedules, z, t, steps):
    now, here = list(z), t
    for back in (0.5, 1.0):
        there = torch.clamp(t - back / steps, min=0)
        said = predict(now, [schedule(here) for schedule in schedules])
        for r, schedule in enumerate(schedules):
            x_hat = x_from_v(now[r], said[r], schedule(here))
            now[r] = ddim_step(now[r], x_hat, schedule(here), schedule(there))
        here = there
    targets = []
    for r, schedule in enumerate(schedules):
        x = step_target(z[r], now[r], schedule(t), schedule(there))
        targets.append(v_from_x(z[r], x, schedule(t)))
    return targets
