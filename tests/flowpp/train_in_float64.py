"""`python -m flowpp`, but in float64: by which test_processes.py tells rounding from mistakes."""

import torch

from flowpp.__main__ import main

torch.set_default_dtype(torch.float64)
main()
