"""Training a decoder with Lightning."""

import time

# The settings of training are read first of all, so this is when the command began.
COMMAND_STARTED = time.monotonic()
