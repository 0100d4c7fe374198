"""Evaluation: bits per byte of texts, the noise and character suites, lm-evaluation-harness, and the cache check.

Suites are seeded and compare likelihoods, so that small models give numbers, too. A suite calls a function
`bits(text, prompt)` of `scoring` and does not depend on the kind of model. Not here: the command line (`blt.cli`).
"""
