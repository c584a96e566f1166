"""Drawings, by Pillow alone, of environments that their library does not draw or only with more packages."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 240, 180  # of a picture, in pixels
FINE = 3  # drawn larger by this factor and then reduced, for smooth edges

WHITE, BLACK, GREY = (255, 255, 255), (40, 40, 40), (170, 170, 170)
BLUE, RED, GREEN = (52, 101, 164), (200, 60, 50), (70, 150, 70)
# A colour for each channel of a grid.
CHANNELS = (
    (87, 117, 144), (249, 199, 79), (249, 65, 68), (144, 190, 109), (67, 170, 139),
    (248, 150, 30), (157, 78, 221), (255, 255, 255), (39, 125, 161), (243, 114, 44),
)  # fmt: skip

Number = float | int
Point = tuple[Number, Number]


class Canvas:
    """A picture in units of its own: x from -`across` to `across`, y upwards, 0 in the middle.

    Args:
        across: half the width.
    """

    def __init__(self, across: Number) -> None:
        self._unit = FINE * WIDTH / 2 / across
        self._image = Image.new("RGB", (FINE * WIDTH, FINE * HEIGHT), WHITE)
        self._draw = ImageDraw.Draw(self._image)

    def line(self, *points: Point, color: tuple[int, int, int], width: Number = 0.02) -> None:
        """Points joined by lines, `width` across."""
        pixels = max(1, round(width * self._unit))
        self._draw.line([self._at(p) for p in points], fill=color, width=pixels, joint="curve")

    def dot(self, center: Point, radius: Number, color: tuple[int, int, int]) -> None:
        """A filled circle."""
        (x, y), r = self._at(center), radius * self._unit
        self._draw.ellipse((x - r, y - r, x + r, y + r), fill=color)

    def box(
        self, center: Point, width: Number, height: Number, color: tuple[int, int, int]
    ) -> None:
        """A filled rectangle."""
        (x, y), w, h = self._at(center), width / 2 * self._unit, height / 2 * self._unit
        self._draw.rectangle((x - w, y - h, x + w, y + h), fill=color)

    def picture(self) -> np.ndarray:
        """The pixels, uint8 [HEIGHT, WIDTH, 3]."""
        return np.asarray(self._image.resize((WIDTH, HEIGHT), Image.Resampling.BOX))

    def _at(self, point: Point) -> Point:
        x, y = point
        return FINE * WIDTH / 2 + x * self._unit, FINE * HEIGHT / 2 - y * self._unit


def cart_pole(x: float, angle: float) -> np.ndarray:
    """A cart at `x` with a pole that leans to the right by `angle`."""
    canvas, ground = Canvas(2.6), -0.9
    canvas.line((-2.6, ground), (2.6, ground), color=GREY)
    for end in (-2.4, 2.4):
        canvas.line((end, ground - 0.1), (end, ground + 0.1), color=RED, width=0.04)
    canvas.box((x, ground), 0.6, 0.3, BLACK)
    # Longer than the physics has it (1.0), which is easier to see.
    tip = (x + 1.6 * float(np.sin(angle)), ground + 1.6 * float(np.cos(angle)))
    canvas.line((x, ground), tip, color=RED, width=0.12)
    canvas.dot((x, ground), 0.08, GREY)
    return canvas.picture()


def pendulum(angle: float, torque: float = 0.0) -> np.ndarray:
    """A rod that stands up at an angle of 0; the bar below shows a torque between -2 and 2."""
    canvas = Canvas(1.6)
    tip = (-float(np.sin(angle)), float(np.cos(angle)))
    canvas.line((-1.0, -1.12), (1.0, -1.12), color=GREY)
    canvas.line((0, -1.12), (-torque / 2, -1.12), color=BLUE, width=0.06)
    canvas.line((0, 0), tip, color=RED, width=0.16)
    canvas.dot(tip, 0.08, RED)
    canvas.dot((0, 0), 0.06, BLACK)
    return canvas.picture()


def acrobot(first: float, second: float) -> np.ndarray:
    """Two rods; the first hangs down at an angle of 0, the second is in line with it at 0."""
    canvas = Canvas(3.0)
    along = lambda angle: (float(np.sin(angle)), -float(np.cos(angle)))
    (x, y), (u, v) = along(first), along(first + second)
    canvas.line((-3, 1), (3, 1), color=GREEN)  # the tip has to get above this
    canvas.line((0, 0), (x, y), color=BLUE, width=0.18)
    canvas.line((x, y), (x + u, y + v), color=RED, width=0.18)
    canvas.dot((0, 0), 0.1, BLACK)
    canvas.dot((x, y), 0.1, BLACK)
    return canvas.picture()


def mountain_car(position: float, goal: float = 0.5) -> np.ndarray:
    """A car in a valley, and the flag it has to reach."""
    canvas = Canvas(0.95)
    height = lambda x: 0.45 * float(np.sin(3 * x)) + 0.55
    at = lambda x: (x + 0.3, height(x) - 0.6)
    canvas.line(*(at(x) for x in np.linspace(-1.25, 0.65, 100)), color=BLACK, width=0.012)
    x, y = at(goal)
    canvas.line((x, y), (x, y + 0.2), color=BLACK, width=0.012)
    canvas.box((x + 0.05, y + 0.17), 0.1, 0.06, GREEN)
    x, y = at(position)
    canvas.dot((x, y + 0.05), 0.05, RED)
    return canvas.picture()


def grid(channels: np.ndarray) -> np.ndarray:
    """A grid of [rows, columns, channels], where each channel that is on has a colour."""
    picture = np.zeros((*channels.shape[:2], 3), np.uint8)
    for i in range(channels.shape[2]):
        picture[channels[..., i] > 0] = CHANNELS[i % len(CHANNELS)]
    size = max(1, HEIGHT // len(picture))
    return picture.repeat(size, 0).repeat(size, 1)


# Of the names that gymnax and Gymnasium share: the drawing, the fields of gymnax's state that it takes, and
# where these stand in Gymnasium's.
CLASSIC: dict[str, tuple[Callable[..., np.ndarray], tuple[str, ...], tuple[int, ...]]] = {
    "CartPole-v1": (cart_pole, ("x", "theta"), (0, 2)),
    "Pendulum-v1": (pendulum, ("theta", "last_u"), (0,)),
    "Acrobot-v1": (acrobot, ("joint_angle1", "joint_angle2"), (0, 1)),
    "MountainCar-v0": (mountain_car, ("position",), (0,)),
    "MountainCarContinuous-v0": (mountain_car, ("position",), (0,)),
}


def of_gymnax(name: str, state: Any) -> np.ndarray | None:
    """A state of gymnax's classic control; None for other environments."""
    if name not in CLASSIC:
        return None
    drawing, fields, _ = CLASSIC[name]
    return drawing(*(float(np.asarray(getattr(state, field))) for field in fields))


def of_gymnasium(name: str, state: Sequence[float] | np.ndarray) -> np.ndarray | None:
    """A state of Gymnasium's classic control; None for other environments."""
    if name not in CLASSIC:
        return None
    drawing, _, places = CLASSIC[name]
    return drawing(*(float(state[i]) for i in places))
