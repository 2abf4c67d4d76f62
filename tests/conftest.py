"""What holds for all tests."""

from tests import environment

environment.clean()  # before any test module or product module reads a variable
