"""Draws the pictures of the Pathfinder task: do two dots lie on one dashed path?

A picture holds two long paths of dashes that never come near each other, many short distractor
paths, and two dots on ends of the long paths: on both ends of one path (label 1) or on one end of
each (label 0).

Labels do not leak, by construction. Scenes of paths are drawn first, all alike, without label or
dots. Then couples of scenes are looked for in which, after a turn of one picture, both ends of one
path of one scene lie where ends of two paths of the other do; the first gets its dots and label 1,
the second its own and label 0. So both classes have the same paths, dashes and ink, and the same
places and distances of the dots. (Both pairs in one scene keep the distance but not the places:
58 % for a logistic regression on pixels.)

The same seed gives the same bytes on every machine and for any number of workers: scenes come in
chunks of a fixed size with their own counter-based random numbers, coordinates are exact in
float32, and what is not (one square root per pixel) is rounded the same everywhere.

n scenes, D dashes of a scene. Lengths are in pixels, (x, y) with (0, 0) the picture's upper left
corner, so pixel [row, column] has its centre at (column + 0.5, row + 0.5).
"""

import math
from dataclasses import dataclass

import numpy as np

SIDE = 32
# Pictures drawn together from one stream of random numbers; changing it changes every picture.
CHUNK = 500

PADDLE_LENGTH = 2.0  # of a dash, its round ends included
PADDLE_THICKNESS = 1.0
PADDLE_MARGIN = 1.0  # free space between two dashes of one path
CONTINUITY = 1.8  # a path turns by at most 90 / CONTINUITY degrees from dash to dash
DASH_GRAY, DOT_GRAY = 150, 255
DOT_RADIUS = 1.75

# Between the centre lines of different paths: their free space is nearly twice that within a path.
# With 5.0 around the ends, where dots may come, no path seems to go on in another one (with 4.0
# one in ten pictures of the hardest level could not be solved).
CLEARANCE, TIP_CLEARANCE = 3.25, 5.0
BORDER = 2.0  # between a centre line and the picture's edge, so that dots are whole
MIN_DOT_DISTANCE = 7.0
# How far the dots of a couple's two pictures, turned the same way, may be from each other, and by
# how much their distances may differ.
DOT_TOLERANCE, DISTANCE_TOLERANCE = 1.5, 0.4

# A dash is all points within PADDLE_THICKNESS / 2 of a segment of length _CORE; _STEP is between
# the segments of consecutive dashes.
_CORE = PADDLE_LENGTH - PADDLE_THICKNESS
_STEP = PADDLE_MARGIN + PADDLE_THICKNESS

# Rounded to 1/1024: cosines differ in the last bit between machines, these do not, and sums of
# them are exact in float32.
_NUM_DIRECTIONS = 64
_ANGLES = [2 * math.pi * k / _NUM_DIRECTIONS for k in range(_NUM_DIRECTIONS)]
_DIRECTIONS = np.float32(
    [[round(math.cos(a) * 1024) / 1024, round(math.sin(a) * 1024) / 1024] for a in _ANGLES]
)
_TRIALS = 8
_ALONG = np.array([0, 0.5, 1, 2, 3, 4], np.float32)  # in lengths of a dash's segment
_MAX_TURN = int(_NUM_DIRECTIONS / 4 / CONTINUITY)

_CELLS = 2  # cells a pixel in the grid of forbidden places
_FRAME = 4  # pixels around the picture, so that what is stamped near an edge stays in the grid
_GRID = _CELLS * (SIDE + 2 * _FRAME)


@dataclass(frozen=True)
class Level:
    """One difficulty."""

    contour_length: int  # dashes of a long path
    distractor_length: int  # dashes of a distractor
    distractor_trials: int  # how many of them are tried


LEVELS = {
    "curv_baseline": Level(6, 2, 20),
    "curv_contour_length_9": Level(9, 3, 14),
    "curv_contour_length_14": Level(14, 4, 10),
}


@dataclass(frozen=True)
class Scenes:
    """A chunk of labelled pictures and the geometry they were drawn from."""

    images: np.ndarray  # uint8 [n, 32, 32]
    labels: np.ndarray  # int64 [n], 1 = both dots on one path
    dashes: np.ndarray  # float32 [n, D, 2, 2], (x, y) of both ends of each dash's centre line
    path: np.ndarray  # int16 [n, D], a dash's path: 0 and 1 the long ones; -1: there is no dash
    dots: np.ndarray  # float32 [n, 2, 2], (x, y)


def draw_chunk(level: str, seed: int, chunk: int) -> Scenes:
    """Draws the pictures chunk * CHUNK ... (chunk + 1) * CHUNK - 1 of a level, a key of LEVELS; a
    pure function of its arguments. Raises: ValueError for a seed that is not in 0 .. 2^64 - 1."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"the seed must be between 0 and 2^64 - 1, not {seed}")
    words = np.random.SeedSequence([seed, list(LEVELS).index(level), chunk])
    random = _Random(np.random.Philox(key=words.generate_state(2, np.uint64)))
    shape = LEVELS[level]
    drawn: list[tuple[np.ndarray, np.ndarray]] = []
    wanted, couples = CHUNK, np.zeros((0, 2, 2), np.int64)
    while len(couples) < CHUNK // 2:
        wanted += 3 * CHUNK // 5  # enough at once, as a rule
        while sum(len(path) for _, path in drawn) < wanted:
            drawn.append(_draw_scenes(shape, 3 * CHUNK, random))
        dashes = np.concatenate([d for d, _ in drawn])[:wanted]
        ends = _ends(dashes, shape.contour_length)
        couples = _find_couples(ends)
    # in an order of its own, or every second picture would have label 1
    order = np.argsort(random.below(1 << 32, CHUNK), kind="stable")
    scene, pair = couples[: CHUNK // 2].reshape(CHUNK, 2)[order].T
    labels = order % 2
    dots = np.take_along_axis(ends[scene], _PAIRS[labels, pair][:, :, None], 1)
    path = np.concatenate([p for _, p in drawn])[scene]
    symmetry = random.below(8, CHUNK)
    dashes, dots = _turn(dashes[scene], symmetry), _turn(dots, symmetry)
    return Scenes(_render(dashes, path, dots), labels, dashes, path, dots)


class _Random:
    """Integers from raw words: NumPy promises only these never to change."""

    def __init__(self, bits: np.random.Philox):
        self.bits = bits

    def below(self, bound: int, *shape: int) -> np.ndarray:
        """int64 in 0 .. bound - 1; the bias of at most bound / 2^32 is of no matter here."""
        words = self.bits.random_raw(math.prod(shape)).reshape(shape) >> np.uint64(32)
        return ((words * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def _draw_scenes(level: Level, count: int, random: _Random) -> tuple[np.ndarray, np.ndarray]:
    """Tries `count` scenes without dots; returns dashes and path (see Scenes) of those where
    both long paths found their way."""
    forbidden = np.zeros((count, _GRID * _GRID), bool)  # to the centre line of the next path
    forbidden_tips = np.zeros_like(forbidden)  # to the ends of the next long path
    long_paths: list[np.ndarray] = []
    for _ in range(2):
        kept, path = _grow_path(level.contour_length, forbidden, random)
        tips = np.stack([path[:, 0, 0], path[:, -1, 1]], 1)
        good = ~np.take_along_axis(forbidden_tips[kept], _cell(tips), 1).any(1)
        kept, path, tips = kept[good], path[good], tips[good]
        forbidden, forbidden_tips = forbidden[kept], forbidden_tips[kept]
        long_paths = [*(earlier[kept] for earlier in long_paths), path]
        _stamp(forbidden, path.reshape(len(path), -1, 2), CLEARANCE)
        _stamp(forbidden, tips, TIP_CLEARANCE)
        _stamp(forbidden_tips, path.reshape(len(path), -1, 2), TIP_CLEARANCE)
    n = len(forbidden)
    dashes = long_paths
    path_of_dash = [np.full((n, level.contour_length), i, np.int16) for i in range(2)]
    for trial in range(level.distractor_trials):
        kept, path = _grow_path(level.distractor_length, forbidden, random)
        _stamp(forbidden, path.reshape(len(path), -1, 2), CLEARANCE, kept)
        dashes.append(np.zeros((n, level.distractor_length, 2, 2), np.float32))
        dashes[-1][kept] = path
        path_of_dash.append(np.full((n, level.distractor_length), -1, np.int16))
        path_of_dash[-1][kept] = 2 + trial
    return np.concatenate(dashes, 1), np.concatenate(path_of_dash, 1)


def _grow_path(length: int, forbidden: np.ndarray, random: _Random):
    """Grows one path of `length` dashes in each scene of `forbidden` [n, cells]: int64 [m], the
    scenes where it found its way; float32 [m, length, 2, 2], the dashes there.

    Each dash takes one of several random turns that stay in the picture and off the forbidden
    cells and the path itself, the first of those with the most room ahead."""
    kept = np.arange(len(forbidden))
    blocked = forbidden.copy()
    path = np.zeros((len(forbidden), length, 2, 2), np.float32)
    for i in range(length):
        n = len(kept)
        if i == 0:
            span = int((SIDE - 2 * BORDER) * 16)
            start = random.below(span + 1, n, _TRIALS, 2).astype(np.float32) / 16
            start += np.float32(BORDER)
            heading = random.below(_NUM_DIRECTIONS, n, _TRIALS)
        else:
            turn = random.below(2 * _MAX_TURN + 1, n, _TRIALS) - _MAX_TURN
            heading = (heading[:, None] + turn) % _NUM_DIRECTIONS
            start = path[:, i - 1, 1][:, None] + np.float32(_STEP) * _DIRECTIONS[heading]
        segment = np.float32(_CORE) * _DIRECTIONS[heading]
        # three points on the dash, then three ahead of it
        points = start[:, :, None] + segment[:, :, None] * _ALONG[:, None]
        cells = _cell(np.clip(points, 0, SIDE))
        free = ((points >= BORDER) & (points <= SIDE - BORDER)).all(3)
        free &= ~blocked[kept[:, None, None], cells]
        room = free[:, :, :3].all(2) * (1 + np.logical_and.accumulate(free[:, :, 3:], 2).sum(2))
        rows = np.flatnonzero(room.any(1))
        choice = room[rows].argmax(1)
        path[rows, i, 0] = start[rows, choice]
        path[rows, i, 1] = start[rows, choice] + segment[rows, choice]
        heading = heading[rows, choice]
        kept, path = kept[rows], path[rows]
        # The dash before last is the nearest that the next one must keep away from: its
        # neighbour is close by design.
        if i > 0:
            _stamp(blocked, path[:, i - 1], CLEARANCE, kept)
    return kept, path


# Two ends of the long paths by [label, choice]; ends 0 and 1 are of one path, 2 and 3 of the
# other. Label 1 has two choices.
_PAIRS = np.array([[[0, 2], [0, 3], [1, 2], [1, 3]], [[0, 1], [2, 3], [0, 1], [2, 3]]])


def _ends(dashes: np.ndarray, contour_length: int) -> np.ndarray:
    """float32 [n, 4, 2], the ends of both long paths, where dots may come."""
    ends = (0, 0), (contour_length - 1, 1), (contour_length, 0), (2 * contour_length - 1, 1)
    return np.stack([dashes[:, dash, end] for dash, end in ends], 1)


def _find_couples(ends: np.ndarray) -> np.ndarray:
    """Finds couples of scenes with dots at nearly the same places, as a turn or mirror image of
    the picture makes them, one with a pair of ends on two paths, the other on one; each scene in
    one couple at most. int64 [m, label, (scene, choice in _PAIRS)], the best couples first."""
    n = len(ends)
    places = []
    for label, choices in ((0, 4), (1, 2)):
        pairs = ends[:, _PAIRS[label, :choices]].reshape(n * choices, 2, 2) - np.float32(SIDE / 2)
        # the dot farther from the middle first, in the same eighth of the picture
        far = (pairs**2).sum(2).argmax(1)
        row = np.arange(len(pairs))
        pairs = np.stack([pairs[row, far], pairs[row, 1 - far]], 1)
        pairs *= np.where(pairs[:, :1] < 0, np.float32(-1), np.float32(1))
        steep = pairs[:, 0, 1] > pairs[:, 0, 0]
        pairs[steep] = pairs[steep][:, :, ::-1]
        places.append(pairs)
    zero, one = places
    length_zero, length_one = (np.sqrt(((p[:, 0] - p[:, 1]) ** 2).sum(1)) for p in (zero, one))
    apart = np.zeros((len(zero), len(one)), np.float32)
    for dot in (0, 1):
        dx, dy = (zero[:, None, dot, axis] - one[None, :, dot, axis] for axis in (0, 1))
        np.maximum(apart, dx * dx + dy * dy, out=apart)
    good = apart <= DOT_TOLERANCE**2
    good &= np.abs(length_zero[:, None] - length_one) <= DISTANCE_TOLERANCE
    good &= (length_zero >= MIN_DOT_DISTANCE)[:, None] & (length_one >= MIN_DOT_DISTANCE)
    a, b = np.nonzero(good)
    used = np.zeros(n, bool)
    couples = []
    for k in np.argsort(apart[a, b], kind="stable"):
        scenes = a[k] // 4, b[k] // 2
        if scenes[0] != scenes[1] and not used[scenes[0]] and not used[scenes[1]]:
            used[list(scenes)] = True
            couples.append([[scenes[0], a[k] % 4], [scenes[1], b[k] % 2]])
    return np.array(couples, np.int64).reshape(-1, 2, 2)


def _turn(points: np.ndarray, symmetry: np.ndarray) -> np.ndarray:
    """Points [n, ..., 2] of scene i under symmetry 0..7 of the square: bits for mirrored x,
    mirrored y and swapped axes."""
    shape = (-1,) + (1,) * (points.ndim - 2)
    x = np.where((symmetry & 1).reshape(shape), SIDE - points[..., 0], points[..., 0])
    y = np.where((symmetry & 2).reshape(shape), SIDE - points[..., 1], points[..., 1])
    swap = (symmetry & 4).reshape(shape) > 0
    return np.stack([np.where(swap, y, x), np.where(swap, x, y)], -1)


def _cell(points: np.ndarray) -> np.ndarray:
    """Index into the flattened grid of forbidden places of (x, y) in pixels."""
    cells = np.floor((points + _FRAME) * _CELLS).astype(np.int64)
    return cells[..., 1] * _GRID + cells[..., 0]


def _disc(radius: float) -> np.ndarray:
    """Offsets in the flattened grid of the cells within `radius` pixels."""
    reach = int(radius * _CELLS)
    steps = np.arange(-reach, reach + 1)
    dy, dx = np.meshgrid(steps, steps, indexing="ij")
    within = dx**2 + dy**2 <= (radius * _CELLS) ** 2
    return (dy * _GRID + dx)[within]


def _stamp(grid: np.ndarray, points: np.ndarray, radius: float, scenes=None) -> None:
    """Forbids, in place, all cells within `radius` of points [n, k, 2] of the scenes [n] (None:
    of all, in order)."""
    rows = np.arange(len(grid)) if scenes is None else scenes
    offsets = _disc(radius)
    for k in range(points.shape[1]):
        centre = rows * grid.shape[1] + _cell(points[:, k])
        grid.reshape(-1)[centre[:, None] + offsets] = True


def _render(dashes: np.ndarray, path: np.ndarray, dots: np.ndarray) -> np.ndarray:
    """Pictures uint8 [n, 32, 32]: gray by distance to the nearest shape, edges softened over one
    pixel."""
    n = len(dashes)
    frame = 4
    width = SIDE + 2 * frame
    pictures = np.zeros((n, width * width), np.float32)

    def paint(middle, half_segment, radius, gray, present):
        """Paints one capsule (a disc if half_segment is None) into each scene that has it."""
        reach = math.ceil(PADDLE_LENGTH / 2 + 0.5)
        steps = np.arange(-reach, reach + 1)
        dy, dx = (g.reshape(-1) for g in np.meshgrid(steps, steps, indexing="ij"))
        rows = np.flatnonzero(present)
        corner = np.floor(middle[rows]).astype(np.int64)
        # from the capsule's middle to each pixel's centre
        x = (corner[:, 0, None] + dx + np.float32(0.5)) - middle[rows, 0, None]
        y = (corner[:, 1, None] + dy + np.float32(0.5)) - middle[rows, 1, None]
        if half_segment is not None:
            along = half_segment[rows]
            length2 = (along[:, 0] ** 2 + along[:, 1] ** 2)[:, None]
            position = np.clip((x * along[:, 0, None] + y * along[:, 1, None]) / length2, -1, 1)
            x = x - position * along[:, 0, None]
            y = y - position * along[:, 1, None]
        coverage = np.clip(np.float32(radius + 0.5) - np.sqrt(x * x + y * y), 0, 1)
        pixel = (corner[:, 1, None] + dy + frame) * width + (corner[:, 0, None] + dx + frame)
        scene = rows[:, None]
        pictures[scene, pixel] = np.maximum(pictures[scene, pixel], np.float32(gray) * coverage)

    for k in range(dashes.shape[1]):
        start, end = dashes[:, k, 0], dashes[:, k, 1]
        radius, present = PADDLE_THICKNESS / 2, path[:, k] >= 0
        paint((start + end) / 2, (end - start) / 2, radius, DASH_GRAY, present)
    for k in range(2):
        paint(dots[:, k], None, DOT_RADIUS, DOT_GRAY, np.ones(n, bool))
    inner = pictures.reshape(n, width, width)[:, frame:-frame, frame:-frame]
    return np.floor(inner + np.float32(0.5)).astype(np.uint8)
