"""Rewards that a run cannot learn from, and one that differs with every answer."""


def letters(completions, answers, **columns):
    return [sum(map(ord, text)) / 1000 for text in completions]


def nothing(completions, answers, **columns):
    return [None] * len(completions)


def wrong(completions, answers, **columns):
    return [0.0] * len(completions)


def same(completions, answers, **columns):
    return [0.7] * len(completions)
