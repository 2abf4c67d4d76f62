"""All tests run in the same environment."""

from tests import environment

environment.clean()  # before any test module or product module reads a variable
