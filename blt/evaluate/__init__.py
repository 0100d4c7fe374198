"""Tests of what reading bytes is for: text with noise, and tasks about single characters.

Everything is seeded and counts likelihood, so a small model gives a number too. Not here: the command line
(`blt.cli.suite`), and how text is scored (`blt.evaluate.scoring`): a suite gets a function `bits(text, prompt)`.
"""
