"""What is measured: Frechet distance, inception score, precision and recall, bits per dimension. Mathematics alone.

Paper: simple diffusion, section 5, appendix C (FID, IS; tables 2 to 9); each measure's own source stands over it.
Read before: schedule.py. Read after: features.py, evaluate.py.

Shapes: features (N, D) float32; probabilities (N, classes); images uint8 (N, H, W, 3), x (B, 3, H, W) in [-1, 1].
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

from schedule import alpha_sigma, diffuse, eps_from_v


# ------------------------------------------------------------------------------------------ figures from features

class Moments:
    """Mean and covariance of features that come in any portions, in float64 (the update of Chan et al. 1979).

    Sums of squares would cancel: sum x^2 - n mean^2 loses what a mean far from 0 has in common.
    """

    def __init__(self, features=None):
        self.n, self.mean, self.scatter = 0, 0.0, 0.0
        if features is not None:
            self.add(features)

    def add(self, features):
        """features (B, D)."""
        features = features.double()
        n, mean = len(features), features.mean(0)
        away, step = features - mean, mean - self.mean
        self.scatter = self.scatter + away.T @ away + torch.outer(step, step) * (self.n * n / (self.n + n))
        self.mean = self.mean + step * (n / (self.n + n))
        self.n += n

    @property
    def covariance(self):
        return self.scatter / (self.n - 1)


def frechet_distance(a, b):
    """Squared Frechet (Wasserstein-2) distance of two Gaussians with the Moments a and b. Heusel et al. 2017, eq. 6.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2). The trace of the root is taken from R C_b R with R = C_a^1/2: it
    has the eigenvalues of C_a C_b and is symmetric, so they come out real, and rounding below 0 can be cut off.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return distance.clamp(min=0).item()                                   # rounding; a nan stays one


def inception_score(probabilities, splits=10):
    """exp E KL(p(y|x) || p(y)) (Salimans et al. 2016): mean and standard deviation over `splits` parts of the set.

    From 1 (every image read alike, or never sure) to the number of classes; never more than a part has images. The set
    is shuffled first: labels that go round and round would leave each part of a stride with some classes only.
    """
    scores, order = [], np.random.default_rng(0).permutation(len(probabilities))
    for part in np.array_split(order, min(splits, len(order))):
        part = probabilities[torch.from_numpy(part)].double().clamp(min=1e-12)
        marginal = part.mean(0, keepdim=True)
        scores.append((part * (part.log() - marginal.log())).sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(real, fake, k=3):
    """Kynkaanniemi et al. 2019: (share of fakes inside the real set's manifold, share of reals inside the fakes').

    The manifold of a set is the union of balls, one about each member, that reach to its k-th nearest neighbour.
    """
    def manifold(x):
        return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(k + 1, 1).values  # 1st: itself

    between = torch.cdist(real, fake, compute_mode="donot_use_mm_for_euclid_dist")              # (reals, fakes)
    precision = (between <= manifold(real)[:, None]).any(0).float().mean().item()
    recall = (between <= manifold(fake)[None, :]).any(1).float().mean().item()
    return precision, recall


def bootstrap(statistic, n, times, seed=0):
    """Half the 95 % interval of statistic(indices): 1.96 standard deviations over `times` resamples of n indices.

    Not the percentiles: a resample repeats some images, so its Frechet distance is biased upwards, and the percentiles
    would lie above the figure itself. The spread serves all the same; near a distance of 0 it is too wide (1.8 times,
    measured at N(0, I) against itself). The samples alone are drawn again, not the images they are compared with.
    """
    rng = np.random.default_rng(seed)
    return 1.96 * float(np.std([statistic(torch.from_numpy(rng.integers(n, size=n))) for _ in range(times)], ddof=1))


def histogram_distance(a, b):
    """Total variation of two histograms (counts): 0 the same, 1 nothing in common."""
    return 0.5 * (a / a.sum() - b / b.sum()).abs().sum().item()


def colour_histogram(images):
    """Counts of 4 x 4 x 4 colours over all pixels of uint8 images (N, H, W, 3) -> (64,)."""
    level = images.long() // 64
    return torch.bincount((level[..., 0] * 16 + level[..., 1] * 4 + level[..., 2]).flatten(), minlength=64).double()


# ------------------------------------------------------------------------------------------ the variational bound

def variational_bound(model, x, cond, schedule, points=16, generator=None):
    """-log p(x) of 8-bit images x (B, 3, H, W) in [-1, 1] is at most this, in bits per dimension, image by image.

    Three parts (Kingma et al. 2021, "Variational diffusion models"; weight -d lambda / dt, with the half):
      prior            KL(q(z_1 | x) || N(0, I)): what the noisy end still knows
      diffusion        1/2 E_t[-lambda'(t) |eps - eps_hat|^2] = 1/2 (lambda_max - lambda_min) E[|eps - eps_hat|^2] for
                       uniform lambda: the schedule drops out. One lambda at random in each of `points` equal strata.
      reconstruction   -log p(x | z_0): a softmax over the 256 grey levels
    # Paper: section 2 leaves out the half, and prints L_x = -log p(x | z_0) where its bound on log p(x) wants +log p.

    Near lambda = 15 the noise is far below a grey level. Who knows that pixels are whole grey levels could tell it from
    z, but no network here does: that costs 1 / (2 ln 2) bits for each unit of lambda, so the bound is loose, though fit
    to compare like with like.

    Returns a dict of (B,): prior, diffusion, reconstruction, total; and logsnr, eps_mse, v_mse of (B, points).
    """
    def normal(shape):
        return torch.randn(shape, generator=generator).to(x.device)

    logsnr_max, logsnr_min = schedule(torch.tensor([0.0, 1.0])).tolist()
    alpha, sigma = (value.item() for value in alpha_sigma(torch.tensor(logsnr_min, dtype=torch.float64)))
    prior = 0.5 * ((alpha * x).square() + sigma ** 2 - 1 - 2 * math.log(sigma)).flatten(1).mean(1)
    where = (torch.arange(points) + torch.rand(len(x), points, generator=generator)) / points
    logsnr = (logsnr_min + (logsnr_max - logsnr_min) * where).to(x.device)                      # (B, points)
    eps_mse, v_mse = [], []
    for column in logsnr.T:
        eps = normal(x.shape)
        z = diffuse(x, eps, column)
        v_hat = model(z, column, cond)
        error = (eps_from_v(z, v_hat, column) - eps).square().flatten(1).mean(1)
        eps_mse.append(error)
        v_mse.append(error / torch.sigmoid(column))                       # eps-MSE = SNR / (1 + SNR) v-MSE
    eps_mse, v_mse = torch.stack(eps_mse, 1), torch.stack(v_mse, 1)
    diffusion = 0.5 * (logsnr_max - logsnr_min) * eps_mse.mean(1)

    # The decoder: the level's probability is in proportion to q(z_0 | level).
    alpha, sigma = (value.item() for value in alpha_sigma(torch.tensor(logsnr_max, dtype=torch.float64)))
    levels = torch.arange(256, device=x.device) / 127.5 - 1
    reconstruction = []
    for image in x:
        z = alpha * image.flatten() + sigma * normal(image.numel())
        level = ((image.flatten() + 1) * 127.5).round().long()
        nats = [F.cross_entropy(-0.5 * ((zs[:, None] - alpha * levels) / sigma).square(), ys, reduction="sum")
                for zs, ys in zip(z.split(65536), level.split(65536))]
        reconstruction.append(sum(nats) / image.numel())
    reconstruction = torch.stack(reconstruction)
    parts = dict(prior=prior, diffusion=diffusion, reconstruction=reconstruction)
    parts = {name: value / math.log(2) for name, value in parts.items()}
    return dict(parts, total=sum(parts.values()), logsnr=logsnr, eps_mse=eps_mse, v_mse=v_mse)
