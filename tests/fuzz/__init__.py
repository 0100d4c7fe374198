"""Fuzzers: a short form in the test suite, a long form as one command each."""
