"""Node noise by loops over rows, members and sites, in NumPy: models and the estimate of their gradient."""

import itertools

import numpy as np

SIGMA = 0.125


class Member:
    """One member of a pair: its products, and what they were given."""

    def __init__(self, noise, pair, sign):
        self.noise, self.pair, self.sign, self.seen = noise, pair, sign, {}
        self.count = itertools.count()

    def at(self, path, *where, site=0):
        """The noise of a site: of this pair, at the steps of loops or places of an axis."""
        return self.noise[path][site][(self.pair, *where)]

    def add(self, y, terms, e, row):
        """``y + sign sigma e``; each of ``terms`` is (path, what its gradient is of the noise)."""
        for path, gradient in terms:
            # By the order of the program, which the members of a pair share unless it names a key.
            self.seen[path, row, next(self.count)] = (gradient, e)
        return y + self.sign * SIGMA * e

    def dot(self, path, x, w, e, row, *more):
        """A product of a row; ``more`` are terms of parameters that share the noise."""
        return self.add(x @ w, [(path, ("outer", x)), *more], e, row)


def credit_of(d, gamma):
    c = d.copy()
    for t in reversed(range(len(d) - 1)):
        c[t] += gamma * c[t + 1]
    return c


def estimate(model, params, noise, pairs, gamma):
    """The gradient estimate: for a minimiser, so of minus the mean score.

    Args:
      model: ``model(member, params) -> scores [rows]``.
      params: arrays by path.
      noise: lists of arrays ``[pairs, ...]`` by path.
      pairs: number of pairs.
      gamma: of the credit.
    """
    total = {k: np.zeros(v.shape) for k, v in params.items()}
    scores = np.zeros((2 * pairs, 0))
    table = []
    for pair in range(pairs):
        both = [Member(noise, pair, sign) for sign in (1, -1)]
        scores = [np.asarray(model(m, params)) for m in both]
        table += scores
        d = (scores[0] - scores[1]) / len(scores[0])
        c = credit_of(d, gamma)
        for m in both:
            for (path, row, _), (gradient, e) in m.seen.items():
                weighed = (d.sum() if row is None else c[row]) * e
                total[path] += of(gradient, weighed, params[path]) / 2
    factor = -1 / (SIGMA * 2 * pairs)
    return np.stack(table), {k: factor * v for k, v in total.items()}


def of(gradient, weighed, w):
    """What a parameter gets of credit times noise."""
    kind, *x = gradient
    if kind == "outer":
        return np.outer(x[0], weighed)
    if kind == "outer.T":
        return np.outer(weighed, x[0])
    if kind == "times":
        return x[0] * weighed
    out = np.zeros(w.shape)
    if kind == "slice":
        out[x[0]] = of(x[1], weighed, w[x[0]])
    else:
        assert kind == "kernel"
        out += x[0][..., None] * weighed
    return out
