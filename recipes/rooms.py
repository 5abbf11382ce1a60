"""Rooms by the image method, computed once and kept: `python -m recipes.rooms`.

Source: Allen & Berkley, "Image method for efficiently simulating small-room acoustics" (JASA 65,
1979). A shoebox room; a wall reflects the same share of every frequency, from the wanted
reverberation time by Eyring's formula; an image arrives after distance / c, weakened by distance
and by the walls it crossed. Arrivals fall between samples: each is a windowed sinc of 16 taps.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.signal import butter, sosfilt

from recipes.corpus import RATE
from recipes.settings import Settings, from_arguments

SOUND = 343.0
"""Metres a second, at 20 °C."""

TAPS = 16
"""Samples an arrival is spread over, half of them before it."""


class Rooms(Settings):
    """How many rooms, and what they are like.

    Attributes:
        target: the file.
        rooms: how many.
        places: of speakers in each.
        sides: shortest and longest room, metres: length, width, height.
        reverberation_s: T60, uniform.
        distance: of a speaker from the microphone, metres; near and far ones alike.
        longest_s: where a response is cut.
        seed: of everything.
    """

    target: Path
    rooms: int = 60
    places: int = 4
    sides: tuple[tuple[float, float, float], tuple[float, float, float]] = (
        (3.0, 2.5, 2.3),
        (9.0, 7.0, 3.8),
    )
    reverberation_s: tuple[float, float] = (0.15, 0.8)
    distance: tuple[float, float] = (0.3, 4.0)
    longest_s: float = 0.5
    seed: int = 1


def reflection(sides: NDArray[np.float64], reverberation_s: float) -> float:
    """Pressure reflected by a wall, by Eyring's formula.  sides: [3] metres → 0…1"""
    volume = float(sides.prod())
    surface = 2 * float(sides[0] * sides[1] + sides[1] * sides[2] + sides[0] * sides[2])
    absorbed = 1 - np.exp(-24 * np.log(10) * volume / (SOUND * surface * reverberation_s))
    return float(np.sqrt(1 - absorbed))


def response(
    sides: NDArray[np.float64],
    source: NDArray[np.float64],
    microphone: NDArray[np.float64],
    beta: float,
    length: int,
    rate: int = RATE,
) -> NDArray[np.float64]:
    """Impulse response from a source to a microphone, both in metres from one corner.

    sides, source, microphone: [3]; beta: pressure reflected by each wall → [length], the direct
    sound at ``distance · rate / c`` samples with the gain ``1 / distance``.
    """
    reach = SOUND * length / rate
    count = [int(np.ceil(reach / (2 * side))) for side in sides]
    grid = np.meshgrid(*(np.arange(-n, n + 1) for n in count), indexing="ij")
    cells = np.stack([axis.ravel() for axis in grid], 1)  # [K, 3]
    out = np.zeros(length + TAPS)
    for flip in np.ndindex(2, 2, 2):
        mirrored = np.array(flip)
        image = (1 - 2 * mirrored) * source + 2 * cells * sides
        distance = np.linalg.norm(image - microphone, axis=1)
        # walls crossed: |n − q| at the near side and |n| at the far one, on each axis
        crossed = (np.abs(cells - mirrored) + np.abs(cells)).sum(1)
        near = distance < reach
        gain = beta ** crossed[near] / np.maximum(distance[near], 0.05)
        at = distance[near] * rate / SOUND
        _spread(out, at, gain)
    return out[:length]


def without_bias(out: NDArray[np.float64], rate: int = RATE) -> NDArray[np.float64]:
    """Takes out what lies below 80 Hz, as the paper does: all images push the same way.  [N] → [N]

    Their sum is a slow pressure no real room has, and it would outlast the sound.
    """
    return np.asarray(sosfilt(butter(2, 80, "high", fs=rate, output="sos"), out))


def _spread(out: NDArray[np.float64], at: NDArray[np.float64], gain: NDArray[np.float64]) -> None:
    """Adds windowed sincs of the given gains at fractional samples, in place."""
    first = np.floor(at).astype(np.int64) - TAPS // 2 + 1
    offsets = np.arange(TAPS)
    where = first[:, None] + offsets
    x = where - at[:, None]
    kernel = np.sinc(x) * (0.5 + 0.5 * np.cos(np.pi * x / (TAPS / 2)))
    inside = (where >= 0) & (where < len(out))
    np.add.at(out, where[inside], (gain[:, None] * kernel)[inside])


@dataclass(frozen=True, slots=True)
class Bank:
    """Responses of many rooms.

    Attributes:
        responses: float32 [rooms, places, samples]; the direct sound is at sample 0 with gain 1,
            so labels stay exact and distance shows in what follows.
    """

    responses: NDArray[np.float32]

    def draw(self, rng: np.random.Generator, speakers: int) -> list[NDArray[np.float32]]:
        """A place in one room for each speaker, no two the same while there are enough."""
        room = self.responses[int(rng.integers(len(self.responses)))]
        places = rng.permutation(len(room))
        return [room[places[number % len(places)]] for number in range(speakers)]


def load(folder: Path) -> Bank | None:
    """The bank of a data folder, if it has one."""
    path = folder / "rooms.npy"
    return Bank(np.load(path, mmap_mode="r")) if path.exists() else None


def make(settings: Rooms) -> Bank:
    """Draws rooms, a microphone and places in each, and computes their responses."""
    rng = np.random.default_rng(settings.seed)
    length = int(settings.longest_s * RATE)
    responses = np.zeros((settings.rooms, settings.places, length), np.float32)
    low, high = (np.array(sides) for sides in settings.sides)
    for room in responses:
        sides = rng.uniform(low, high)
        beta = reflection(sides, rng.uniform(*settings.reverberation_s))
        microphone = np.append(rng.uniform(0.25, 0.75, 2) * sides[:2], rng.uniform(0.7, 1.2))
        for place in room:
            source = _place(rng, sides, microphone, settings.distance)
            delay = np.linalg.norm(source - microphone) * RATE / SOUND
            whole = response(sides, source, microphone, beta, length + int(delay))
            whole = without_bias(whole)
            direct = round(float(delay))
            part = whole[direct : direct + length]
            place[: len(part)] = part / whole[direct]
    return Bank(responses)


def _place(
    rng: np.random.Generator,
    sides: NDArray[np.float64],
    microphone: NDArray[np.float64],
    distance: tuple[float, float],
) -> NDArray[np.float64]:
    """Somewhere a head may be: 1 to 1.8 m high, 0.2 m from the walls, at the wanted distance."""
    wanted = np.exp(rng.uniform(*np.log(distance)))
    best, missed = microphone, np.inf
    for _ in range(200):
        source = rng.uniform([0.2, 0.2, 1.0], [*(sides[:2] - 0.2), min(1.8, sides[2] - 0.2)])
        off = abs(float(np.linalg.norm(source - microphone)) - wanted)
        if off < missed:
            best, missed = source, off
    return best


def main() -> None:
    """Command line of the stage."""
    settings = from_arguments(Rooms, "rooms", "compute a bank of rooms")
    settings.target.parent.mkdir(parents=True, exist_ok=True)
    bank = make(settings)
    np.save(settings.target, bank.responses.astype(np.float16))
    print(f"{len(bank.responses)} rooms in {settings.target}")


if __name__ == "__main__":
    main()
