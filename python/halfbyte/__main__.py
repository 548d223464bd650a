"""`python -m halfbyte`, for what starts Python itself, such as torchrun."""

from halfbyte.cli import main

main()
