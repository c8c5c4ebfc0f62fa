"""Makes docs/images/icon.png and banner.png, which pyproject.toml names for the registry: one scene from noise to picture.

    python -m devtools.icon        (in the environment that dev.py makes)

Three bands of falling noise stand for the three experts of the paper's base stage.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from ediffi_core.shapeworld import render
from ediffi_core.shapeworld.world import Scene, SceneObject

IMAGES = Path(__file__).parents[1] / "docs" / "images"
ICON = 400  # pixels a side
BANNER = (1680, 720)  # 21:9
NOISE = (1.0, 0.35, 0.0)  # of each band, in units of the whole range of colours


def noised(picture: np.ndarray, rng: np.random.Generator, grain: int) -> np.ndarray:
    """(H, W, 3) in [0, 1] with the noise of NOISE in bands from left to right, in squares of `grain` pixels."""
    height, width = picture.shape[:2]
    cells = rng.standard_normal((height // grain + 1, width // grain + 1, 3))
    noise = cells.repeat(grain, 0).repeat(grain, 1)[:height, :width]
    bands = np.array(NOISE)[np.arange(width) * len(NOISE) // width]
    return np.clip(picture + bands[None, :, None] * noise, 0, 1)


def scene(*objects: tuple[str, str, float, float, float], style: str) -> Scene:
    items = (SceneObject(shape, color, "large", "center", x, y, radius) for shape, color, x, y, radius in objects)
    return Scene(tuple(items), "beige", style, 7)


def saved(picture: np.ndarray, name: str) -> None:
    image = Image.fromarray((picture * 255).round().astype(np.uint8)).quantize(128)
    image.save(IMAGES / name, optimize=True)


def main() -> None:
    rng = np.random.default_rng(0)
    heart = scene(("heart", "red", 0.5, 0.52, 0.34), style="flat")
    saved(noised(render(heart, ICON), rng, 10), "icon.png")

    width, height = BANNER
    row = [("circle", "orange", 0.2), ("heart", "red", 0.5), ("star", "blue", 0.8)]
    three = scene(*((shape, color, x, 0.5, 0.11) for shape, color, x in row), style="striped")
    whole = render(three, width)
    top = (width - height) // 2
    saved(noised(whole[top : top + height], rng, 24), "banner.png")


if __name__ == "__main__":
    main()
