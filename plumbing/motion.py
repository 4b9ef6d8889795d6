"""How a drawn scene moves: a function of the scene's own random numbers and of the frame, exact at every frame."""
import math

import numpy as np


def moved(scene, rng, frame, colours):
    """Return the scene (data.Glyphs.scene) at a frame; frame 0 is the scene itself.

    From frame to frame the letter turns by 1 to 3 degrees, drifts by up to 0.8 % of the shorter side, and goes a
    fifteenth of the way to one of `colours` [(r, g, b), ...], where it stays. Its ground does not move.

    rng: draws the motion; seed it alike for all frames of a scene.
    """
    turn = math.radians(rng.uniform(1, 3) * rng.choice([-1, 1]))
    drift = rng.uniform(-0.008, 0.008, 2)
    target = np.array(colours[rng.integers(len(colours))])
    return scene | dict(
        angle=scene["angle"] + frame * turn, x=scene["x"] + frame * drift[0], y=scene["y"] + frame * drift[1],
        letter_rgb=scene["letter_rgb"] + min(1, frame / 15) * (target - scene["letter_rgb"]))
