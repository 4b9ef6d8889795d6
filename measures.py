"""The measures: Frechet distance, inception score, precision and recall, bits per dimension. Definitions only.

Paper: simple diffusion, section 5, appendix C (FID, IS; tables 2 to 9). Each docstring names the source of its measure.
Needs: schedule.py. Next: evaluate.py (and plumbing/features.py, the networks behind the features).

Shapes: features (N, D) float32; probabilities (N, classes); images uint8 (N, H, W, 3), x (B, 3, H, W) in [-1, 1].
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

from schedule import alpha_sigma, diffuse, eps_from_v


# ------------------------------------------------------------------------------------------ measures of features

class Moments:
    """Mean and covariance of features, updated batch by batch in float64 (Chan et al. 1979).

    We do not use sum x^2 - n mean^2: far from 0 these two numbers are almost equal, and their difference is rounding.
    """

    def __init__(self, features=None):
        self.n, self.mean, self.scatter = 0, 0.0, 0.0
        if features is not None:
            self.add(features)

    def add(self, features):
        """Add a batch of features (B, D)."""
        features = features.double()
        n, mean = len(features), features.mean(0)
        centred, step = features - mean, mean - self.mean
        self.scatter = self.scatter + centred.T @ centred + torch.outer(step, step) * (self.n * n / (self.n + n))
        self.mean = self.mean + step * (n / (self.n + n))
        self.n += n

    @property
    def covariance(self):
        return self.scatter / (self.n - 1)


def frechet_distance(a, b):
    """Return the squared Frechet (Wasserstein-2) distance of two Gaussians with Moments a and b. Heusel 2017, eq. 6.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2). The matrix R C_b R with R = C_a^1/2 has the same eigenvalues as
    C_a C_b and is symmetric. So we take the trace of the root from it: the eigenvalues are real, and we can cut off
    those that rounding has made negative.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return distance.clamp(min=0).item()                                   # cuts off rounding; nan stays nan


def inception_score(probabilities, splits=10):
    """Return exp E KL(p(y|x) || p(y)): mean and standard deviation over `splits` parts of the set. Salimans 2016.

    The score goes from 1 (all images get the same probabilities) to the number of classes. It cannot exceed the number
    of images in a part. We shuffle the set first: labels often come in a cycle, and a regular part of a cycle could
    lack some classes.
    """
    scores, order = [], np.random.default_rng(0).permutation(len(probabilities))
    for part in np.array_split(order, min(splits, len(order))):
        part = probabilities[torch.from_numpy(part)].double().clamp(min=1e-12)
        marginal = part.mean(0, keepdim=True)
        scores.append((part * (part.log() - marginal.log())).sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(real, fake, k=3):
    """Return (share of fakes in the manifold of the reals, share of reals in that of the fakes). Kynkaanniemi 2019.

    The manifold of a set is a union of balls. Each member is the centre of one, which reaches to its k-th nearest
    neighbour in the set.
    """
    def distances(a, b):                                                  # exact: a matrix product would round more
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")

    def radii(x):
        return distances(x, x).kthvalue(k + 1, 1).values                  # k + 1: the nearest of all is x itself

    between = distances(real, fake)                                       # (reals, fakes)
    precision = (between <= radii(real)[:, None]).any(0).float().mean().item()
    recall = (between <= radii(fake)[None, :]).any(1).float().mean().item()
    return precision, recall


def bootstrap(statistic, n, times, seed=0):
    """Return half the 95 % interval of statistic(indices): 1.96 standard deviations over `times` resamples of n.

    We do not use percentiles. A resample repeats some images, which biases its Frechet distance upwards, so the
    percentiles would lie above the measured value. The spread is still useful. Near a distance of 0 it is too wide:
    1.8 times, measured at N(0, I) against itself. Only the samples are drawn again, not the real images.
    """
    rng = np.random.default_rng(seed)
    return 1.96 * float(np.std([statistic(torch.from_numpy(rng.integers(n, size=n))) for _ in range(times)], ddof=1))


def histogram_distance(a, b):
    """Return the total variation of two histograms (counts): 0 if they are equal, 1 if they have nothing in common."""
    return 0.5 * (a / a.sum() - b / b.sum()).abs().sum().item()


def colour_histogram(images):
    """Count the pixels of uint8 images (N, H, W, 3) in 4 x 4 x 4 bins of colour -> (64,)."""
    level = images.long() // 64
    return torch.bincount((level[..., 0] * 16 + level[..., 1] * 4 + level[..., 2]).flatten(), minlength=64).double()


# ------------------------------------------------------------------------------------------ the variational bound

def variational_bound(model, x, cond, schedule, points=16, generator=None):
    """Return an upper bound on -log p(x) of 8-bit images x (B, 3, H, W) in [-1, 1], in bits per dimension, per image.

    It has three parts (Kingma et al. 2021, "Variational diffusion models"; weight -d lambda / dt, with the half):
      prior            KL(q(z_1 | x) || N(0, I)): what z_1 still shows of x
      diffusion        1/2 E_t[-lambda'(t) |eps - eps_hat|^2] = 1/2 (lambda_max - lambda_min) E[|eps - eps_hat|^2] for
                       uniform lambda: the schedule drops out. We draw one lambda in each of `points` equal intervals.
      reconstruction   -log p(x | z_0): a softmax over the 256 grey levels
    # Paper: section 2 leaves out the half. It prints L_x = -log p(x | z_0), where its bound on log p(x) needs +log p.

    The bound is loose. Near lambda = 15 the noise is far below one grey level. A model that knew that pixels are whole
    grey levels could remove this noise exactly, but our networks do not know it. That costs 1 / (2 ln 2) bits for each
    unit of lambda. Use the bound to compare our models with each other.

    Returns a dict of (B,): prior, diffusion, reconstruction, total; and logsnr, eps_mse, v_mse of (B, points).
    """
    logsnr_max, logsnr_min = schedule(torch.tensor([0.0, 1.0])).tolist()
    where = (torch.arange(points) + torch.rand(len(x), points, generator=generator)) / points
    logsnr = (logsnr_min + (logsnr_max - logsnr_min) * where).to(x.device)                      # (B, points)
    eps_mse, v_mse = _errors(model, x, cond, logsnr, generator)
    nats = dict(prior=_prior(x, logsnr_min),
                diffusion=0.5 * (logsnr_max - logsnr_min) * eps_mse.mean(1),
                reconstruction=_reconstruction(x, logsnr_max, generator))
    bits = {name: value / math.log(2) for name, value in nats.items()}
    return dict(bits, total=sum(bits.values()), logsnr=logsnr, eps_mse=eps_mse, v_mse=v_mse)


def _prior(x, logsnr):
    """Return KL(q(z_1 | x) || N(0, I)) in nats per dimension, (B,). logsnr: a number, that of t = 1."""
    alpha, sigma = _alpha_sigma_float64(logsnr)
    return 0.5 * ((alpha * x).square() + sigma ** 2 - 1 - 2 * math.log(sigma)).flatten(1).mean(1)


def _errors(model, x, cond, logsnr, generator):
    """Return the mean squared errors of eps_hat and of v_hat at logsnr (B, points), each (B, points)."""
    eps_mse, v_mse = [], []
    for column in logsnr.T:                                               # (B,)
        eps = _normal(x.shape, x.device, generator)
        z = diffuse(x, eps, column)
        v_hat = model(z, column, cond)
        error = (eps_from_v(z, v_hat, column) - eps).square().flatten(1).mean(1)
        eps_mse.append(error)
        v_mse.append(error / torch.sigmoid(column))                       # eps-MSE = SNR / (1 + SNR) v-MSE
    return torch.stack(eps_mse, 1), torch.stack(v_mse, 1)


def _reconstruction(x, logsnr, generator):
    """Return -log p(x | z_0) in nats per dimension, (B,). logsnr: a number, that of t = 0.

    The decoder gives each grey level a probability in proportion to q(z_0 | level).
    """
    alpha, sigma = _alpha_sigma_float64(logsnr)
    levels = torch.arange(256, device=x.device) / 127.5 - 1
    reconstruction = []
    for image in x:
        z = alpha * image.flatten() + sigma * _normal((image.numel(),), x.device, generator)
        level = ((image.flatten() + 1) * 127.5).round().long()
        # 65536 pixels at a time: the logits are 256 times as large as the image.
        nats = [F.cross_entropy(-0.5 * ((zs[:, None] - alpha * levels) / sigma).square(), ys, reduction="sum")
                for zs, ys in zip(z.split(65536), level.split(65536))]
        reconstruction.append(sum(nats) / image.numel())
    return torch.stack(reconstruction)


def _alpha_sigma_float64(logsnr):
    """Return alpha and sigma as Python floats."""
    return (value.item() for value in alpha_sigma(torch.tensor(logsnr, dtype=torch.float64)))


def _normal(shape, device, generator):
    """Draw N(0, I) on the CPU, so that the numbers do not depend on the device."""
    return torch.randn(shape, generator=generator).to(device)
