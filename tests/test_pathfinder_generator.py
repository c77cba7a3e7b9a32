"""The drawn Pathfinder pictures: is the label right, can it be seen, and does nothing else give
it away?"""

import functools
import hashlib
import heapq

import numpy as np
import pytest

from preprocess import pathfinder_generator as generator

LEVELS = tuple(generator.LEVELS)


@pytest.fixture(scope="module", params=LEVELS)
def level(request):
    return request.param


_chunk = functools.cache(generator.draw_chunk)


@pytest.fixture(scope="module")
def scenes(level):
    return _chunk(level, 0, 0)


def test_the_label_is_what_the_geometry_says(level, scenes):
    length = generator.LEVELS[level].contour_length
    for i in range(generator.CHUNK):
        paths = []
        for dot in scenes.dots[i]:
            for path in (0, 1):
                chain = scenes.dashes[i][scenes.path[i] == path]
                assert len(chain) == length
                # that the chain holds together is tested below
                paths += [path for tip in (chain[0, 0], chain[-1, 1]) if np.array_equal(tip, dot)]
        assert len(paths) == 2, "each dot is on one end of one long path"
        assert scenes.labels[i] == (paths[0] == paths[1])
        assert np.linalg.norm(scenes.dots[i, 0] - scenes.dots[i, 1]) >= generator.MIN_DOT_DISTANCE
    assert scenes.labels.sum() == generator.CHUNK // 2
    assert len(np.unique(scenes.labels[::2])) == 2, "no order in the labels"


def test_paths_keep_apart_and_hold_together(scenes):
    """The free space between two paths is more than 1.6 times that between two dashes of one
    path."""
    positions = np.linspace(0, 1, 7)[:, None]
    for i in range(60):
        real = scenes.path[i] >= 0
        dashes, path = scenes.dashes[i][real], scenes.path[i][real]
        points = dashes[:, 0, None] * (1 - positions) + dashes[:, 1, None] * positions
        gap = np.linalg.norm(points[:, None, :, None] - points[None, :, None], axis=-1).min((2, 3))
        gap -= generator.PADDLE_THICKNESS
        different = path[:, None] != path
        assert gap[different].min() > 1.6 * generator.PADDLE_MARGIN
        neighbours = np.eye(len(path), k=1, dtype=bool) & ~different
        assert np.allclose(gap[neighbours], generator.PADDLE_MARGIN, atol=0.01)
        turns = _turns(dashes)[np.diff(path) == 0]
        assert turns.max() <= 90 / generator.CONTINUITY + 0.2


def _turns(dashes):
    """Degrees between consecutive dashes [k, 2, 2]."""
    direction = dashes[:, 1] - dashes[:, 0]
    angle = np.arctan2(direction[:, 1], direction[:, 0])
    turn = np.abs(np.diff(angle))
    return np.degrees(np.minimum(turn, 2 * np.pi - turn))


def test_the_picture_alone_says_the_label(scenes):
    """A walk from dot to dot over a slightly blurred picture, along the brightest way: its
    darkest point tells the label."""
    count = 100
    darkest = np.array([_darkest_on_best_way(scenes.images[i]) for i in range(count)])
    labels = scenes.labels[:count] == 1
    accuracy = ((darkest > 20.5) == labels).mean()
    print(f"accuracy of the walk {accuracy:.3f}")
    assert accuracy >= 0.97


def _darkest_on_best_way(image):
    weights = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 0.6**2))
    weights /= weights.sum()
    blurred = image.astype(float)
    for axis in (0, 1):
        blurred = np.apply_along_axis(np.convolve, axis, blurred, weights, "same")
    start, goal = _find_dots(image)
    best, queue = {start: blurred[start]}, [(-blurred[start], start)]
    while queue:
        darkest, (row, column) = heapq.heappop(queue)
        if (row, column) == goal:
            return -darkest
        for place in ((row + dy, column + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
            if min(place) >= 0 and max(place) < len(image):
                value = min(-darkest, blurred[place])
                if value > best.get(place, -1):
                    best[place] = value
                    heapq.heappush(queue, (-value, place))
    raise AssertionError("the whole picture is connected at gray 0")


def _find_dots(image):
    """Centres of the two dots: only they are brighter than a dash."""
    rows, columns = np.nonzero(image > generator.DASH_GRAY)
    first = (rows - rows[0]) ** 2 + (columns - columns[0]) ** 2 <= 25
    assert not first.all(), "two dots"
    return tuple(
        (int(rows[s].mean().round()), int(columns[s].mean().round())) for s in (first, ~first)
    )


def test_every_dot_is_whole_and_brightest(scenes):
    assert scenes.images.shape == (generator.CHUNK, 32, 32) and scenes.images.dtype == np.uint8
    bright = (scenes.images > generator.DASH_GRAY).sum((1, 2))
    assert bright.min() >= 2 * 7 and bright.max() <= 2 * 13


GOLDEN = {
    "curv_baseline": "1c433695de79025f",
    "curv_contour_length_9": "4efb82d2f516f775",
    "curv_contour_length_14": "08adb9f112b36ee0",
}


def test_a_seed_means_these_bytes(level, scenes):
    """Equal on every machine and with every NumPy. To renew: print what is compared (and say in
    the commit why it changed)."""
    digest = hashlib.sha256(scenes.images.tobytes() + scenes.labels.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == GOLDEN[level]


def test_chunks_seeds_and_levels_are_different_pictures():
    drawn = [
        ("curv_baseline", 0, 0),
        ("curv_baseline", 0, 1),
        ("curv_baseline", 1, 0),
        ("curv_contour_length_9", 0, 0),
    ]
    images = np.concatenate([_chunk(*what).images for what in drawn])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == 4 * generator.CHUNK


@pytest.mark.parametrize(
    "what", [("curv_baseline", -1, 0), ("curv_baseline", 2**64, 0), ("hard", 0, 0)]
)
def test_impossible_arguments_are_named(what):
    with pytest.raises(ValueError, match=r"seed must be between|'hard' is not in list"):
        generator.draw_chunk(*what)


# ---- nothing else gives the label away --------------------------------------------------------


def _draw(level, chunks):
    drawn = [_chunk(level, 0, chunk) for chunk in range(chunks)]
    images = np.concatenate([s.images for s in drawn])
    labels = np.concatenate([s.labels for s in drawn])
    dashes = np.concatenate([(s.path >= 0).sum(1) for s in drawn])
    dots = np.concatenate([s.dots for s in drawn])
    return images, labels, dashes, np.linalg.norm(dots[:, 0] - dots[:, 1], axis=1)


def _logistic_regression_accuracy(features, labels):
    """Newton's method with a little weight decay on the first 60 %, accuracy on the rest."""
    x = features.reshape(len(features), -1).astype(float)
    cut = len(x) * 6 // 10
    scale = x[:cut].std(0)
    x = (x - x[:cut].mean(0)) / np.where(scale > 0, scale, 1)
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    weights = np.zeros(x.shape[1])
    for _ in range(6):
        p = 1 / (1 + np.exp(-np.clip(x[:cut] @ weights, -30, 30)))
        gradient = x[:cut].T @ (p - labels[:cut]) + 30 * weights
        hessian = (x[:cut].T * (p * (1 - p))) @ x[:cut] + 30 * np.eye(x.shape[1])
        weights -= np.linalg.solve(hessian, gradient)
    return ((x[cut:] @ weights > 0) == (labels[cut:] == 1)).mean()


def _statistics(images, dashes, distance):
    ink, lit = images.sum((1, 2)), (images > 0).sum((1, 2))
    columns = [ink, lit, dashes, distance]
    return np.stack([*columns, *(c.astype(float) ** 2 for c in columns)], 1)


def _largest_gap(a, b):
    """Kolmogorov-Smirnov statistic: the largest difference of the two distribution functions,
    and its 0.1 % bound."""
    grid = np.unique(np.concatenate([a, b]))
    gap = [np.searchsorted(np.sort(s), grid, side="right") / len(s) for s in (a, b)]
    return np.abs(gap[0] - gap[1]).max(), 1.95 * np.sqrt(1 / len(a) + 1 / len(b))


def _check_no_leak(level, chunks):
    images, labels, dashes, distance = _draw(level, chunks)
    pixels = _logistic_regression_accuracy(images, labels)
    statistics = _logistic_regression_accuracy(_statistics(images, dashes, distance), labels)
    print(f"{level}: {len(labels):,} pictures, accuracy of logistic regression: ", end="")
    print(f"pixels {pixels:.4f}, ink, lit pixels, dashes, distance {statistics:.4f}")
    assert pixels < 0.55
    assert statistics < 0.55
    for name, values in (
        ("ink", images.sum((1, 2))),
        ("dashes", dashes),
        ("distance", distance),
    ):
        gap, bound = _largest_gap(values[labels == 0], values[labels == 1])
        means = [values[labels == label].mean() for label in (0, 1)]
        print(f"  {name}: mean {means[0]:.3f} and {means[1]:.3f}, ", end="")
        print(f"largest gap of the distributions {gap:.4f} (bound {bound:.4f})")
        # the pairs' distances are matched within a tolerance, not drawn from one distribution
        assert gap < bound + (0.02 if name == "distance" else 0)


def test_no_leak(level):
    _check_no_leak(level, 5)


@pytest.mark.slow
def test_no_leak_in_many_pictures(level):
    _check_no_leak(level, 80)


def test_the_leak_check_finds_a_leak():
    """Not vacuous: a dash in a corner of one class in three is found, and so is one dash more in
    one class in four."""
    images, labels, dashes, distance = _draw("curv_baseline", 5)
    planted = images.copy()
    planted[np.flatnonzero(labels)[::3], 1, 1:4] = 100
    assert _logistic_regression_accuracy(planted, labels) > 0.55
    statistics = _statistics(images, dashes + 4 * labels, distance)
    assert _logistic_regression_accuracy(statistics, labels) > 0.55
    gap, bound = _largest_gap((dashes + labels)[labels == 0], (dashes + labels)[labels == 1])
    assert gap > bound
