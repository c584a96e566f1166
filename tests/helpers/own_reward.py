"""A reward of one's own, which is of no use, but differs with every answer."""


def letters(completions, answers, **columns):
    return [sum(map(ord, text)) / 1000 for text in completions]
