"""Laws of dwt.py."""
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import dwt as D


def slow_levels(x):
    """5/3 analysis of a list by definition: filters (-1, 2, 6, 2, -1)/8 and (-1, 2, -1)/2, mirrored at the ends."""
    n = len(x)

    def at(i):                                                            # whole-sample symmetric: x[-1] = x[1]
        i = abs(i)
        return x[2 * (n - 1) - i] if i >= n else x[i]
    low = [(-at(k - 2) + 2 * at(k - 1) + 6 * at(k) + 2 * at(k + 1) - at(k + 2)) / 8 for k in range(0, n, 2)]
    high = [(-at(k - 1) + 2 * at(k) - at(k + 1)) / 2 for k in range(1, n, 2)]
    return low, high


@pytest.mark.parametrize("n", [4, 6, 10, 16])
def test_one_level_equals_the_slow_definition_borders_included(n):
    """Trap 6. Kills: Haar sold as 5/3; half-sample or periodic borders; a gain."""
    x = torch.randn(n, dtype=torch.float64)
    low, high = D._split(x)
    slow_low, slow_high = slow_levels(x.tolist())
    assert_close(low, torch.tensor(slow_low, dtype=torch.float64))
    assert_close(high, torch.tensor(slow_high, dtype=torch.float64))


def test_two_samples_are_enough():
    assert_close(D._merge(*D._split(torch.tensor([3.0, 5.0]))), torch.tensor([3.0, 5.0]))


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("size", [(16, 16), (8, 24), (40, 16)])
def test_perfect_reconstruction(levels, size):
    """Kills: an inverse in the wrong order, or for squares only, or for one level only."""
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        x = torch.randn(2, 3, *size, dtype=dtype)
        y = D.dwt(x, levels)
        assert y.shape == (2, 3 * 4 ** levels, size[0] >> levels, size[1] >> levels)
        assert (D.idwt(y, levels) - x).abs().max() < bound
        assert (D.dwt(D.idwt(y, levels), levels) - y).abs().max() < bound


def test_constant_has_gain_one_and_ramps_have_no_detail():
    """Kills: a hidden gain that changes the SNR; high-pass filters that see a slope."""
    y = D.dwt(torch.full((1, 3, 16, 16), 0.7), 2)
    assert_close(y[:, :3], torch.full((1, 3, 4, 4), 0.7))
    assert y[:, 3:].abs().max() < 1e-6
    low, high = D._split(torch.arange(16.0))
    assert_close(high[:-1], torch.zeros(7))                               # the last one sees the mirrored border
    assert_close(low[1:-1], torch.arange(2.0, 14.0, 2))


def test_white_noise_has_the_stated_variance_per_band():
    """The numbers of `band_noise_variances`: 46/64 and 3/2 per axis."""
    ll, lh, hl, hh = D._analyse(torch.randn(1, 1, 1024, 1024, generator=torch.Generator().manual_seed(0)))
    for band, want in ((ll, (46 / 64) ** 2), (lh, 46 / 64 * 1.5), (hl, 46 / 64 * 1.5), (hh, 1.5 ** 2)):
        assert band.var().item() == pytest.approx(want, rel=0.02)


def test_packing_is_space_to_depth_and_local():
    """Kills: a reshape without permute, which scatters a detail over the picture."""
    x = torch.zeros(1, 1, 32, 32)
    x[..., 20, 8] = 1.0                                                   # in the coarse cell (5, 2) of 4 x 4 pixels
    touched = D.dwt(x, 2)[0].abs().amax(0).nonzero()
    assert (touched - torch.tensor([5, 2])).abs().max() <= 1
    y = D.dwt(torch.randn(1, 1, 8, 8), 2)
    lh = D._analyse(D.idwt(y, 2))[1]                                      # finest LH: channels 4..7 are its 2 x 2 cells
    assert_close(y[0, 4:8].reshape(2, 2, 2, 2), lh[0, 0].reshape(2, 2, 2, 2).permute(1, 3, 0, 2), atol=1e-5, rtol=1e-5)


def test_gradient_is_the_adjoint():
    """<dwt(x), y> = <x, dwt^T(y)>, with dwt^T by autograd. Kills: a detached or in-place step."""
    x = torch.randn(1, 2, 8, 12, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, 32, 2, 3, dtype=torch.float64)
    (D.dwt(x, 2) * y).sum().backward()
    other = torch.randn_like(x)
    assert_close((D.dwt(other, 2) * y).sum(), (other * x.grad).sum())
    y = torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: D.idwt(a, 1), y)


def test_sizes_and_names_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="divisible by 4"):
        D.dwt(torch.zeros(1, 3, 10, 8), 2)
    with pytest.raises(ValueError, match="channels"):
        D.idwt(torch.zeros(1, 6, 4, 4), 1)
    for name in ("dwt", "dwt_0", "haar_1", "conv_3", "conv", ""):
        with pytest.raises(ValueError, match="patching"):
            D.patch_factor(name)


@pytest.mark.parametrize("patching", ["none", "dwt_1", "dwt_2", "dwt_3", "conv_2", "conv_4"])
def test_both_ends_of_a_network_fit_together(patching):
    f = D.patch_factor(patching)
    h = D.EmbedInput(3, 8, patching)(torch.randn(2, 3, 16, 24))
    assert h.shape == (2, 8, 16 // f, 24 // f)
    assert D.ProjectOutput(8, 3, patching)(h).shape == (2, 3, 16, 24)


# ---- the page

def test_the_page_prints_the_claims_of_the_header(tmp_path, monkeypatch, capsys):
    """`python dwt.py`. Kills: an error that is not rounding, bands under another band's name, energy that does not add
    up, variances of an orthogonal transform (1 everywhere)."""
    monkeypatch.chdir(tmp_path)
    D.main()
    first, header, *rows, last = capsys.readouterr().out.splitlines()
    assert "reconstruction error" in first and float(first.split()[-1]) < 1e-6
    table = {name: values for name, *values in (row.split() for row in rows)}
    assert list(table) == ["LL2", "LH2", "HL2", "HH2", "LH1", "HL1", "HH1"]
    assert {name: size for name, (size, *_) in table.items()} == {
        name: "128x128" if name.endswith("2") else "256x256" for name in table}
    shares = {name: float(share.rstrip("%")) for name, (_, _, share, _) in table.items()}
    assert sum(shares.values()) == pytest.approx(100, abs=0.05) and shares["LL2"] > 90
    variance = {name: float(values[-1]) for name, values in table.items()}
    low, high = 46 / 64, 3 / 2                                            # per axis; 0.72 is 46/64
    assert variance["LH1"] == variance["HL1"] == pytest.approx(low * high, abs=6e-4)
    assert variance["HH1"] == pytest.approx(high ** 2, abs=6e-4)
    assert variance["LL2"] == pytest.approx(0.189, abs=6e-4)
    with Image.open(tmp_path / "figures" / "dwt.png") as picture:
        assert min(picture.size) > 400
