"""plumbing/features.py: the network that grades samples, and the user's Inception."""
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import data as D
import measures as M
from plumbing import UserError
from plumbing import features as X


@pytest.fixture(scope="module")
def scenes():
    """Held-out scenes, as uint8 (N, H, W, 3)."""
    return torch.from_numpy(np.stack([D.Glyphs((32, 32), held_out=True).draw(i) for i in range(144)]))


@pytest.fixture
def features():
    torch.manual_seed(0)
    net = X.GlyphNet(X.scene_heads(D.Glyphs()))
    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):     # statistics that are not a batch's own
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return X.GlyphFeatures(net)


def test_features_are_computed_in_evaluation_mode(features, scenes):
    """Trap 18. Kills: batch norm or dropout left on: a figure that depends on the batches, and on chance."""
    features.net.train()
    once, again = features(scenes[:50]), features(scenes[:50])
    alone = torch.cat([features(scenes[i:i + 1])["features"] for i in range(50)])
    assert torch.equal(once["features"], again["features"])
    assert_close(once["features"], alone, rtol=1e-4, atol=1e-5)
    assert_close(once["character"].sum(1), torch.ones(50))


def test_noise_raises_the_distance_step_by_step(features, scenes):
    g, distances = torch.Generator().manual_seed(0), []
    real = M.Moments(features(scenes[:72])["features"])
    noise = torch.randn(72, 32, 32, 3, generator=g)
    for amount in (0, 8, 16, 32, 64):
        noisy = (scenes[72:] + amount * noise).clamp(0, 255).to(torch.uint8)
        distances.append(M.frechet_distance(real, M.Moments(features(noisy)["features"])))
    assert all(a < b for a, b in zip(distances, distances[1:])), distances


def test_answers_are_what_the_scene_shows():
    source = D.Glyphs()
    heads = X.scene_heads(source)
    for i in range(50):
        answers, scene = X.scene_answers(source, i), source.scene(i)
        assert set(answers) == set(heads) and all(0 <= answers[h] < heads[h] for h in heads)
        assert source.classes[answers["character"]] == scene["character"]
        assert D.GROUNDS[answers["texture"]] == scene["texture"]
        assert [list(D.COLOURS)[answers[h]] for h in ("letter", "ground")] == [scene["letter"], scene["ground"]]


def test_the_glyph_network_learns(scenes):
    """A few steps on a few scenes: all heads get better than chance. (Its rate in full: benchmarks/RESULTS.md.)"""
    source = D.Glyphs((32, 32), held_out=True)
    answers = [X.scene_answers(source, i) for i in range(144)]
    answers = {h: torch.tensor([a[h] for a in answers]) for h in answers[0]}
    net = X.train_glyph_net(scenes, answers, X.scene_heads(source), steps=60, batch=64)
    assert not net.training
    output = X.GlyphFeatures(net)(scenes)
    for head, chance in (("character", 1 / 36), ("letter", 1 / 10), ("ground", 1 / 10)):
        assert (output[head].argmax(1) == answers[head]).double().mean() > 3 * chance, head


class Stub(torch.nn.Module):
    """A TorchScript Inception's manners: (B, 3, 299, 299) in 0..255, features on request, probabilities without."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x, return_features: bool = False):
        assert x.shape[1:] == (3, 299, 299)
        mean = self.dropout(x.mean(dim=(2, 3)))
        if return_features:
            return mean
        return torch.softmax(mean / 50, 1)


def test_torchscript_features(tmp_path, scenes):
    """Trap 18 for the user's network. Kills: dropout left on; a resize that aliases; another range than 0..255."""
    torch.jit.script(Stub().train()).save(str(tmp_path / "net.pt"))
    network = X.TorchScriptFeatures(str(tmp_path / "net.pt"))
    output = network(scenes[:4])
    assert_close(output["features"], scenes[:4].float().mean((1, 2)), rtol=0.02, atol=0.5)
    assert_close(output["character"].sum(1), torch.ones(4))
    stripes = torch.zeros(1, 1024, 1024, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    resized = network.resized(stripes)
    assert resized.shape == (1, 3, 299, 299) and (resized[..., 4:-4] - 127.5).abs().max() < 8
    (tmp_path / "no.pt").write_bytes(b"no network")
    with pytest.raises(UserError, match="no.pt: not a TorchScript file"):
        X.TorchScriptFeatures(str(tmp_path / "no.pt"))


@pytest.mark.parametrize("side", [20, 400])
def test_the_clean_resize_is_pillows_bicubic_in_floats(side):
    """Parmar et al. 2022. Kills: bilinear, rounding to whole levels, overshoot that is not cut off at the end."""
    image = torch.randint(0, 2, (1, side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8) * 255
    got = X.TorchScriptFeatures.resized(image)
    for channel in range(3):
        plane = Image.fromarray(image[0, :, :, channel].numpy().astype(np.float32), mode="F")
        want = np.asarray(plane.resize((299, 299), Image.Resampling.BICUBIC))
        if side == 20:
            assert want.min() < -5 and want.max() > 260 and (want % 1 > 0.2).mean() > 0.3
        assert_close(got[0, channel], torch.tensor(want).clamp(0, 255))


def scripted(tmp_path, module):
    torch.jit.script(module.eval()).save(str(tmp_path / "net.pt"))
    return X.TorchScriptFeatures(str(tmp_path / "net.pt"))


class Logits(torch.nn.Module):
    def forward(self, x, return_features: bool = False):
        return x.mean(dim=(2, 3))


class WithBias(torch.nn.Module):
    def forward(self, x, return_features: bool = False, no_output_bias: bool = False):
        mean = x.mean(dim=(2, 3)) / 50
        return torch.softmax(mean if no_output_bias else mean + torch.arange(3), 1)


class Pair(torch.nn.Module):
    def forward(self, x, return_features: bool = False):
        return x, x


def test_networks_with_other_manners(tmp_path, scenes):
    """Kills: logits taken for probabilities, the output's bias left in (the original score had none), a traceback."""
    with pytest.raises(UserError, match="no probabilities"):
        scripted(tmp_path, Logits())(scenes[:2])
    with pytest.raises(UserError, match="want forward"):
        scripted(tmp_path, Pair())(scenes[:2])
    mean = scripted(tmp_path, Logits()).resized(scenes[:2]).mean((2, 3)) / 50
    assert_close(scripted(tmp_path, WithBias())(scenes[:2])["character"], mean.softmax(1), rtol=1e-4, atol=1e-5)


def test_features_that_are_not_finite_stop_it(features, scenes):
    """Kills: a traceback from linear algebra."""
    def broken(images):
        return {"features": features(images)["features"] * float("nan")}
    with pytest.raises(UserError, match="not finite"):
        X.describe([(torch.arange(4), scenes[:4])], broken)
    with pytest.raises(UserError, match="1 image"):
        X.describe([(torch.arange(1), scenes[:1])], features)


def test_all_that_workers_are_sent_can_be_pickled():
    """Where processes are not forked (macOS, Windows) the loader's parts travel by pickle. Kills: a lambda."""
    assert pickle.loads(pickle.dumps(X._readable))([None, (1, 2)]) == [(1, 2)]
    pickle.loads(pickle.dumps(X.Examples(D.Glyphs((16, 16)), range(3))))
