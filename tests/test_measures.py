"""Laws of measures.py."""
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import measures as M
import schedule as S


def gaussian(mean, covariance):
    """Moments that are exactly these."""
    moments = M.Moments()
    moments.n, moments.mean, moments.scatter = 2, mean.double(), covariance.double()
    return moments


def random_covariance(d, seed):
    a = torch.randn(d, 2 * d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / (2 * d)


# ---- Frechet distance

def test_moments_in_any_portions_are_the_same():
    """Kills: the statistics of a batch taken for the set's; sums of squares that cancel in float32."""
    x = torch.randn(301, 7, generator=torch.Generator().manual_seed(0)) * 0.01 + 1000
    whole, portions, single = M.Moments(x), M.Moments(), M.Moments()
    for part in x.split(64):
        portions.add(part)
    for row in x[torch.randperm(301)]:                                    # shuffled as well
        single.add(row[None])
    expected = np.cov(x.double().numpy().T)
    for moments in (whole, portions, single):
        assert moments.n == 301
        assert_close(moments.mean, x.double().mean(0), rtol=1e-12, atol=1e-12)
        assert_close(moments.covariance, torch.from_numpy(expected), rtol=1e-8, atol=1e-12)


def test_distance_of_a_set_to_itself_is_zero_also_when_its_covariance_is_singular():
    for n in (500, 20):
        x = torch.randn(n, 64, generator=torch.Generator().manual_seed(1))
        assert M.frechet_distance(M.Moments(x), M.Moments(x[torch.randperm(n)])) < 1e-5
        assert M.frechet_distance(M.Moments(x), M.Moments(x + 1)) == pytest.approx(64, rel=1e-6)


def test_distance_of_two_gaussians_is_the_closed_form():
    """Commuting: |m|^2 + sum (s_a - s_b)^2. Kills: a covariance in place of its root; the distance unsquared."""
    m, a, b = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([1.0, 4.0, 0.25]), torch.tensor([2.0, 1.0, 0.01])
    expected = m.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    got = M.frechet_distance(gaussian(torch.zeros(3), a.diag()), gaussian(m, b.diag()))
    assert got == pytest.approx(expected.item(), rel=1e-6)


def test_distance_with_covariances_that_do_not_commute():
    """The root's trace from the eigenvalues of C_a C_b, by another routine. Kills: the elementwise or Cholesky root."""
    a, b = random_covariance(12, 0), random_covariance(12, 1)
    cross = np.sqrt(np.linalg.eigvals((a @ b).numpy()).astype(complex)).sum().real
    zero = torch.zeros(12)
    assert M.frechet_distance(gaussian(zero, a), gaussian(zero, b)) == pytest.approx(
        float(a.trace() + b.trace() - 2 * cross), rel=1e-9)
    assert M.frechet_distance(gaussian(zero, b), gaussian(zero, a)) == pytest.approx(
        M.frechet_distance(gaussian(zero, a), gaussian(zero, b)), rel=1e-9)


def test_a_distance_of_nan_stays_nan():
    """Kills: a distance of nan that is printed as 0."""
    lost = gaussian(torch.full((3,), float("nan")), torch.eye(3))
    assert math.isnan(M.frechet_distance(gaussian(torch.zeros(3), torch.eye(3)), lost))


# ---- the other figures

def test_inception_score_has_its_bounds():
    """1 for images that all look alike, the number of classes for sure and varied ones."""
    sure = torch.eye(8).repeat(100, 1)
    assert M.inception_score(sure, 1) == pytest.approx((8, 0), abs=1e-5)
    assert M.inception_score(torch.full((800, 8), 1 / 8)) == pytest.approx((1, 0), abs=1e-5)
    assert M.inception_score(torch.eye(8)[:1].repeat(800, 1)) == pytest.approx((1, 0), abs=1e-5)
    # p = (0.9, 0.1) and (0.1, 0.9): exp(log 2 - H(0.1)), by hand
    two = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).repeat(500, 1)
    assert M.inception_score(two, 1)[0] == pytest.approx(2 * 0.9 ** 0.9 * 0.1 ** 0.1, rel=1e-6)


def test_parts_of_the_inception_score_are_shuffled():
    """Kills: strided parts, which labels that go round and round leave with half of the classes."""
    mean, deviation = M.inception_score(torch.eye(36).repeat(56, 1))
    assert mean > 31 and 0 < deviation < 1


def test_missing_classes_cost_recall_and_distance_but_not_precision():
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 16, generator=g) * 5

    def draw(classes, n=600):
        return centres[torch.randint(classes, (n,), generator=g)] + torch.randn(n, 16, generator=g)
    real, all_classes, half = draw(10), draw(10), draw(5)
    precision, recall = M.precision_recall(real, all_classes)
    precision_half, recall_half = M.precision_recall(real, half)
    assert precision > 0.75 and recall > 0.75
    assert precision_half > 0.75 and recall_half < 0.6 * recall           # about half is left
    distance = [M.frechet_distance(M.Moments(real), M.Moments(x)) for x in (all_classes, half)]
    assert distance[1] > 5 * distance[0]
    blurred = draw(10) + 20 * torch.randn(600, 16, generator=g)           # outside: precision goes
    assert M.precision_recall(real, blurred)[0] < 0.1


def test_bootstrap_is_the_standard_error():
    x = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = 1.96 * x.std().item() / 20
    assert M.bootstrap(lambda i: x[i].mean().item(), 400, 2000) == pytest.approx(expected, rel=0.07)


def test_histogram_distance():
    a, b = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 7.0])
    assert M.histogram_distance(a, a * 5) == 0 and M.histogram_distance(a, b) == 1
    assert M.histogram_distance(a, torch.tensor([1.0, 3.0, 0.0])) == pytest.approx(0.5)


def test_colours_of_grey_images_are_far_from_colourful_ones():
    rng = torch.Generator().manual_seed(0)
    colourful = torch.randint(0, 256, (20, 8, 8, 3), generator=rng, dtype=torch.uint8)
    grey = colourful[..., :1].expand(-1, -1, -1, 3)
    histogram = M.colour_histogram(colourful)
    assert histogram.shape == (64,) and histogram.sum() == 20 * 64
    assert M.histogram_distance(histogram, M.colour_histogram(grey)) > 0.8


# ---- the variational bound

class Gaussian(torch.nn.Module):
    """E[x | z] for x ~ N(0, s^2), as v."""

    def __init__(self, s):
        super().__init__()
        self.s = s

    def forward(self, z, logsnr, cond):
        alpha, sigma = S.alpha_sigma_for(z, logsnr)
        return S.v_from_x(z, alpha * self.s ** 2 / (alpha ** 2 * self.s ** 2 + sigma ** 2) * z, logsnr)


class BlackOrWhite(torch.nn.Module):
    """E[x | z] for pixels that are -1 or 1 with equal chance, as v."""

    def forward(self, z, logsnr, cond):
        alpha, sigma = S.alpha_sigma_for(z, logsnr)
        return S.v_from_x(z, torch.tanh(alpha * z / sigma ** 2), logsnr)


def test_bound_of_gaussian_data_is_their_entropy():
    """prior + diffusion + a Gaussian decoder = h(x) = 1/2 log2(2 pi e s^2).

    Kills: the half forgotten; lambda weighted as if t were uniform; the error of v or x in place of eps.
    """
    s, g = 0.15, torch.Generator().manual_seed(0)
    x = s * torch.randn(64, 3, 16, 16, generator=g)
    bound = M.variational_bound(Gaussian(s), x, {}, S.logsnr_cosine, points=32, generator=g)
    decoder = 0.5 * math.log2(2 * math.pi * math.e * math.exp(-15.0))     # sigma_0 / alpha_0 squared
    bits = (bound["prior"] + bound["diffusion"]).double() + decoder
    error_bar = 4 * bits.std().item() / 8
    assert error_bar < 0.08
    assert bits.mean().item() == pytest.approx(0.5 * math.log2(2 * math.pi * math.e * s * s), abs=error_bar)


@pytest.mark.parametrize("schedule", [S.logsnr_cosine, lambda t: S.logsnr_shifted(t, 64, 32)])
def test_bound_of_black_and_white_noise_is_one_bit(schedule):
    """The whole bound with its decoder: a fair bit a pixel costs one bit, whatever the schedule."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (48, 3, 16, 16), generator=g).float() * 2 - 1
    bound = M.variational_bound(BlackOrWhite(), x, {}, schedule, points=48, generator=g)
    error_bar = 4 * bound["total"].std().item() / 48 ** 0.5
    assert error_bar < 0.05 and bound["total"].mean().item() == pytest.approx(1, abs=error_bar)
    assert bound["reconstruction"].max() < 0.02


def test_decoder_knows_nothing_from_noise_alone():
    """Kills: a decoder that is not normalised over the levels. With z_0 all noise each of 256 levels is as likely."""
    bound = M.variational_bound(BlackOrWhite(), torch.ones(2, 3, 8, 8), {}, lambda t: -12 - 2 * t, points=2)
    assert_close(bound["reconstruction"], torch.full((2,), 8.0), rtol=2e-3, atol=0)


def test_bound_counts_what_the_noisy_end_still_knows():
    """A schedule that ends at lambda = 1, where z still shows x: the prior term KL(q(z_1 | x) || N(0, I)) is large.

    Kills: no prior term, one without its logarithm. The bound then is the entropy plus KL(q(z_1) || N(0, I)).
    """
    s, g = 0.2, torch.Generator().manual_seed(0)
    x = s * torch.randn(200, 3, 8, 8, generator=g)
    bound = M.variational_bound(Gaussian(s), x, {}, lambda t: 15 - 14 * t, points=24, generator=g)
    signal, noise = 1 / (1 + math.exp(-1)) * s * s, 1 / (1 + math.exp(1))  # variances of the two parts of z_1
    prior = 0.5 * (signal + noise - 1 - math.log(noise)) / math.log(2)
    assert bound["prior"].mean().item() == pytest.approx(prior, rel=0.02)
    bits = (bound["prior"] + bound["diffusion"]).double() + 0.5 * math.log2(2 * math.pi * math.e * math.exp(-15.0))
    entropy, variance = 0.5 * math.log2(2 * math.pi * math.e * s * s), signal + noise
    error_bar = 4 * bits.std().item() / 200 ** 0.5
    gap = 0.5 * (variance - 1 - math.log(variance)) / math.log(2)
    assert error_bar < 0.1 and bits.mean().item() == pytest.approx(entropy + gap, abs=error_bar)


def test_bound_gives_the_error_of_v_beside_that_of_eps():
    """Against eps and z of our own: a network that always says 0 errs by v itself. Kills: alpha for sigma."""
    seen = []
    class Zero(torch.nn.Module):
        def forward(self, z, logsnr, cond):
            seen.append(z)
            return torch.zeros_like(z)
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    bound = M.variational_bound(Zero(), x, {}, lambda t: 3 - 6 * t, points=4)
    assert bound["logsnr"].shape == bound["eps_mse"].shape == (3, 4)
    for k, z in enumerate(seen):
        logsnr = bound["logsnr"][:, k]
        alpha, sigma = S.alpha_sigma_for(x, logsnr)
        v = S.v_from_x_eps(x, (z - alpha * x) / sigma, logsnr)
        assert_close(bound["v_mse"][:, k], v.square().mean((1, 2, 3)), rtol=1e-3, atol=1e-4)
